"""Trimming: a passage that does not fit is cut down to the sentences that match the question best.

Extractive compression without a model. A sentence scores the sum of the weights of the question's terms that it holds;
a term weighs its inverse document frequency among the passages that were found for this question, so that what all of
them are about counts little, and what sets a sentence apart counts most. Sentences: `odqa.sentences`.

The invariant: a trimmed passage is whole sentences of the passage, in their order, with its id and title. Neighbours
stay as they stood; where something between two kept sentences is missing stands `GAP`, in the text itself. It is a
token of its own, so no answer matches across it, and a reader that copies a span across it copies the mark with it.
What is missing before the first and after the last kept sentence is not marked.

Sources: the weight is BM25's (Robertson & Zaragoza 2009, with Lucene's + 1, which keeps it positive); sentence overlap
with the query is the classic query-biased summary (Tombros & Sanderson 1998).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

from odqa.sentences import sentence_spans
from odqa.text import token_string, tokenize
from odqa.types import Hit, Query

GAP = " … "  # one token of most vocabularies

_spans = lru_cache(maxsize=1 << 12)(sentence_spans)  # 4,096 passages: those of about 40 questions


class SentenceTrimmer:
    """Says in which shorter forms a passage may be packed.

    A passage is offered whole, then with its `sentences` best-matching sentences, then with one fewer, down to the best
    one; the packer takes the first that fits. Only the first `whole` hits are offered whole (None: every hit; 0: none,
    then all that is packed is trimmed). `around` neighbours on each side of a kept sentence are kept with it. Ties keep
    the earlier sentence, so that a passage without any of the question's terms keeps its beginning.
    """

    def __init__(self, sentences: int = 3, *, around: int = 0, whole: int | None = None) -> None:
        if sentences < 1 or around < 0 or (whole is not None and whole < 0):
            raise ValueError(
                f"sentences is {sentences} (at least 1), around is {around} and whole is {whole} (at least 0, or None)"
            )
        self.sentences, self.around, self.whole = sentences, around, whole

    def forms(self, hit: Hit, rank: int, weights: Mapping[str, float]) -> tuple[Hit, ...]:
        """What may be packed of the hit at a rank (from 0), longest first, no text twice; `weights`: `term_weights`.

        The whole passage is the hit itself, unchanged.
        """
        text = hit.passage.text
        spans = _spans(text)
        scores = [_overlap(text[start:end], weights) for start, end in spans]
        best = sorted(range(len(spans)), key=lambda place: -scores[place])
        choices = [self._with_neighbours(best[:count], len(spans)) for count in range(self.sentences, 0, -1)]
        if self.whole is None or rank < self.whole:
            choices.insert(0, tuple(range(len(spans))))
        return tuple(
            hit if len(kept) == len(spans) else _replace_text(hit, join_sentences(text, spans, kept))
            for kept in dict.fromkeys(choices)
        )

    def _with_neighbours(self, places: Sequence[int], n: int) -> tuple[int, ...]:
        near = {place + step for place in places for step in range(-self.around, self.around + 1)}
        return tuple(sorted(near & set(range(n))))


def term_weights(query: Query, hits: Sequence[Hit]) -> dict[str, float]:
    """Inverse document frequency of the question's terms among the hits: ln(1 + (N - n + 0.5) / (n + 0.5)).

    N passages, n of them with the term in their text (titles do not count); all weights are above zero. Punctuation is
    no term.
    """
    texts = [token_string(hit.passage.text) for hit in hits]
    weights = {}
    for term in sorted({token for token in tokenize(query.text) if token.isalnum()}):
        n = sum(f" {term} " in text for text in texts)
        weights[term] = math.log1p((len(texts) - n + 0.5) / (n + 0.5))
    return weights


def join_sentences(text: str, spans: Sequence[tuple[int, int]], kept: Sequence[int]) -> str:
    """The kept sentences, rising: what stood between neighbours stays, anything left out becomes `GAP`."""
    first, last = spans[kept[0]]
    joined = text[first:last]
    for before, place in pairwise(kept):
        start, end = spans[place]
        joined += (text[spans[before][1] : start] if place == before + 1 else GAP) + text[start:end]
    return joined


def _replace_text(hit: Hit, text: str) -> Hit:
    return replace(hit, passage=replace(hit.passage, text=text))


def _overlap(sentence: str, weights: Mapping[str, float]) -> float:
    tokens = token_string(sentence)
    return sum(weight for term, weight in weights.items() if f" {term} " in tokens)
