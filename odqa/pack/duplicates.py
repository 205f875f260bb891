"""Duplicates among the hits of one query: the same text twice spends a window and tells a reader nothing new."""

from collections.abc import Iterable, Sequence

from odqa.text import tokenize
from odqa.types import Hit

SHINGLE = 3  # words a shingle, our choice: one changed word then spoils three shingles of a passage's hundred


def mark_duplicates(hits: Sequence[Hit]) -> list[bool]:
    """For each hit, whether a better ranked one has its id or its text (case and blanks aside; titles do not count)."""
    ids: set[str] = set()
    texts: set[str] = set()
    marks = []
    for hit in hits:
        text = " ".join(hit.passage.text.casefold().split())
        marks.append(hit.passage.id in ids or text in texts)
        ids.add(hit.passage.id)
        texts.add(text)
    return marks


class NearDuplicates:
    """The passages kept so far for one query, and whether another one resembles one of them.

    Resemblance is the Jaccard index of two texts' sets of shingles: |A & B| / |A | B|, from 0 to 1, where a shingle is
    `SHINGLE` words in a row, case and punctuation aside. Passages whose windows overlap by two thirds of their words
    resemble each other by one half. A text shorter than a shingle is one shingle.
    Source: Broder 1997, On the resemblance and containment of documents.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._kept: list[frozenset[tuple[str, ...]]] = []

    def resembles_a_kept_one(self, hit: Hit) -> bool:
        shingles = _shingles(hit.passage.text)
        return any(_resemblance(shingles, kept) >= self.threshold for kept in self._kept)

    def keep(self, hit: Hit) -> None:
        self._kept.append(_shingles(hit.passage.text))


def resemblance(first: str, second: str) -> float:
    """How much alike two texts are, 0 to 1; 1 if neither has a word."""
    return _resemblance(_shingles(first), _shingles(second))


def _resemblance(first: frozenset[tuple[str, ...]], second: frozenset[tuple[str, ...]]) -> float:
    both = len(first & second)
    return both / (len(first) + len(second) - both)


def _shingles(text: str) -> frozenset[tuple[str, ...]]:
    words = [token for token in tokenize(text) if token.isalnum()]
    return frozenset(_runs(words, SHINGLE))


def _runs(words: Sequence[str], width: int) -> Iterable[tuple[str, ...]]:
    """Every `width` words in a row; the whole text if it is shorter, so that no text is without a shingle."""
    return (tuple(words[start : start + width]) for start in range(max(1, len(words) - width + 1)))
