"""Article text to passages: consecutive, disjoint blocks of at most 100 words, as DPR cut Wikipedia.

What a word is: a run of characters without blanks, as in DPR's released passages. Scripts written without blanks get
a rule of their own, since a whole paragraph would count as one word: a word is two characters of Han, Hiragana or
Katakana, or four letters of Thai, Lao, Khmer or Myanmar (marks above and below not counted), with the punctuation that
follows. Both numbers are chosen near the mean word length of these languages.

Where the cuts are: at blanks. Only a run without blanks that holds more than a quarter of a passage is cut inside, as a
Chinese paragraph must be, but not the one Chinese name of an English article.

The last block: DPR fills it up from the article's beginning, which repeats text. Here it stays short, but a tail of
fewer than a quarter of a block shares evenly with the block before it, so that no passage is a fragment: 210 words
give 100 + 55 + 55.

The invariant: the passages in order are the article, every word once.

The other way to cut: windows of n sentences, one every m sentences, so that neighbours share n - m of them and no
sentence is torn. Line ends of the article end sentences. The last window is the first that reaches the article's end.

Sources: Karpukhin et al. 2020, section 4.1; Tamber et al. 2023 ("Pre-processing matters!", windows 6-3 and 8-4, cut as
castorini/docTTTTTquery's and Pyserini's scripts for MS MARCO documents do).
"""

import re
from dataclasses import dataclass
from itertools import pairwise

from odqa.sentences import split_sentences

_EAST_ASIAN = "\u3040-\u30ff\u3105-\u312f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_SOUTH_EAST_ASIAN = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\ua9e0-\ua9ff\uaa60-\uaa7f"
# Vowel signs and tone marks of these scripts belong to the letter before them; a cut there would tear the letter.
_MARKS = "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece"  # Thai, Lao
_MARKS += "\u102b-\u103e\u1056-\u1059\u17b4-\u17d3\u17dd\u3099\u309a"  # Myanmar, Khmer, Kana
_WITHOUT_BLANKS = re.compile(f"[{_EAST_ASIAN}{_SOUTH_EAST_ASIAN}]")
_RUN = re.compile(r"\S+")
_WORD = re.compile(
    rf"(?:[{_EAST_ASIAN}][{_MARKS}]*){{1,2}}[^\w\s]*"
    rf"|(?:[{_SOUTH_EAST_ASIAN}][{_MARKS}]*){{1,4}}[^\w\s]*"
    rf"|[^\s{_EAST_ASIAN}{_SOUTH_EAST_ASIAN}]+"
)
_SMALL = 4  # a tail, or a run without blanks, is small below (up to) a quarter of a passage; chosen


def split_article(article_text: str, *, words: int = 100) -> list[str]:
    """Cut an article into passages of at most `words` words; blanks and line ends become one blank each.

    An empty article has no passages. Raises ValueError if `words` is not positive.
    """
    if words < 1:
        raise ValueError(f"a passage needs at least one word, not {words}")
    tokens = article_text.split()
    if not _WITHOUT_BLANKS.search(article_text):
        return [" ".join(tokens[start:end]) for start, end in pairwise(_cuts([1] * len(tokens), words))]
    # A passage is a slice of the text, from its first piece to its last: pieces that touch stay together.
    text = " ".join(tokens)
    pieces = _pieces(text, largest=max(1, words // _SMALL))
    cuts = _cuts([count for _, _, count in pieces], words)
    return [text[pieces[start][0] : pieces[end - 1][1]] for start, end in pairwise(cuts)]


def split_into_windows(article_text: str, *, sentences: int, stride: int) -> list[str]:
    """Cut an article into windows of `sentences` sentences, a new one every `stride`; one blank joins sentences.

    An empty article has no passages. Raises ValueError unless 1 <= stride <= sentences.
    """
    if not 1 <= stride <= sentences:
        raise ValueError(f"a window of {sentences} sentences cannot move by {stride}")
    found = [
        " ".join(sentence.split())
        for line in article_text.splitlines()
        for sentence in split_sentences(line, scripts="any")
    ]
    starts = range(0, max(1, len(found) - sentences + stride), stride) if found else ()
    return [" ".join(found[start : start + sentences]) for start in starts]


@dataclass(frozen=True, slots=True)
class Cut:
    """How articles are cut: blocks of `words`, or windows of `sentences` every `stride` if `sentences` is not 0."""

    words: int = 100
    sentences: int = 0
    stride: int = 0

    def __call__(self, article_text: str) -> list[str]:
        """The passages of an article."""
        if self.sentences:
            return split_into_windows(article_text, sentences=self.sentences, stride=self.stride)
        return split_article(article_text, words=self.words)


def count_words(text: str) -> int:
    """Count words as `split_article` does."""
    return sum(1 for _ in _WORD.finditer(text)) if _WITHOUT_BLANKS.search(text) else len(text.split())


def _pieces(text: str, *, largest: int) -> list[tuple[int, int, int]]:
    """List what a cut may not fall into, as (start, end, words): small runs without blanks, the words of large ones."""
    pieces: list[tuple[int, int, int]] = []
    for run in _RUN.finditer(text):
        spans = [word.span() for word in _WORD.finditer(text, run.start(), run.end())]
        if len(spans) <= largest:
            pieces.append((*run.span(), len(spans)))
        else:
            pieces.extend((start, end, 1) for start, end in spans)
    return pieces


def _cuts(counts: list[int], words: int) -> list[int]:
    """Return where the blocks begin, and where the last one ends: [0, 100, 155, 210] for 210 pieces of one word."""
    if not counts:
        return []
    # 1. Fill the blocks one after the other.
    cuts, filled = [0], 0
    for index, count in enumerate(counts):
        if filled + count > words:
            cuts.append(index)
            filled = 0
        filled += count
    cuts.append(len(counts))
    # 2. Let the last two share evenly if the last is small.
    if len(cuts) > 2 and filled < words // _SMALL:
        left = sum(counts[cuts[-3] :])
        filled = 0
        for index in range(cuts[-3], len(counts)):
            filled += counts[index]
            if 2 * filled >= left:
                cuts[-2] = index + 1
                break
    return cuts
