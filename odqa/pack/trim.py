"""Trimming: a passage that does not fit is cut down to the sentences that match the question best.

Extractive compression. What a sentence is worth is said by a `SentenceScorer`, of which there are two: the question's
terms that it holds (`TermOverlap`, no model), or a model that reads question and sentence together (`ModelScores`).
Which model that is nobody here knows: it is handed in. Sentences: `odqa.sentences`.

The invariant: a trimmed passage is whole sentences of the passage, in their order, with its id and title. Neighbours
stay as they stood; where something between two kept sentences is missing stands `GAP`, in the text itself. It is a
token of its own, so no answer matches across it, and a reader that copies a span across it copies the mark with it.
What is missing before the first and after the last kept sentence is not marked.

Sources: the weight of a term is BM25's (Robertson & Zaragoza 2009, with Lucene's + 1, which keeps it positive);
sentence overlap with the query is the classic query-biased summary (Tombros & Sanderson 1998); sentences chosen by a
model for a reader's window: Xu et al. 2023 (RECOMP, arXiv 2310.04408), there by one that was trained for it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Protocol

from odqa.sentences import sentence_spans
from odqa.text import token_string, tokenize
from odqa.types import Hit, Passage, Query

GAP = " … "  # one token of most vocabularies

_spans = lru_cache(maxsize=1 << 12)(sentence_spans)  # 4,096 passages: those of about 40 questions


class Found:
    """A query with all its hits, best first."""

    def __init__(self, query: Query, hits: Sequence[Hit]) -> None:
        self.query, self.hits = query, hits

    @cached_property
    def weights(self) -> dict[str, float]:
        """`term_weights`, computed when first asked for."""
        return term_weights(self.query, self.hits)


@dataclass(frozen=True, slots=True)
class Cut:
    """A hit that is to be cut to its best sentences: the one at `rank` (from 0) of what was found."""

    found: Found
    rank: int

    @property
    def passage(self) -> Passage:
        return self.found.hits[self.rank].passage

    @property
    def sentences(self) -> list[str]:
        text = self.passage.text
        return [text[start:end] for start, end in _spans(text)]


class SentenceScorer(Protocol):
    """Says which sentences of a passage match the question best."""

    def scores(self, cuts: Sequence[Cut]) -> list[list[float]]:
        """For each passage one number a sentence, higher is better; numbers of different passages do not compare."""
        ...


class PairScores(Protocol):
    """A model that scores (question, passage) pairs, such as a re-ranker."""

    def score_pairs(self, pairs: Sequence[tuple[Query, Passage]]) -> list[float]:
        """One score a pair, higher is better."""
        ...


class TermOverlap:
    """A sentence scores the sum of the weights of the question's terms that it holds.

    A term weighs its inverse document frequency among the passages that were found for this question, so that what all
    of them are about counts little, and what sets a sentence apart counts most.
    """

    def scores(self, cuts: Sequence[Cut]) -> list[list[float]]:
        return [[_overlap(sentence, cut.found.weights) for sentence in cut.sentences] for cut in cuts]


class ModelScores:
    """A sentence scores what the model says of it as a passage of its own, under the title of its passage.

    All sentences of all passages of a call go to the model together. It is asked of the first `depth` hits of a query
    (None: of all); those behind are scored by `TermOverlap`: they are tried in what little room is left, one after the
    other, and would cost the most.
    """

    def __init__(self, model: PairScores, depth: int | None = None) -> None:
        if depth is not None and depth < 1:
            raise ValueError(f"depth is {depth}; it must be at least 1 (None: no bound)")
        self.model, self.depth = model, depth

    def scores(self, cuts: Sequence[Cut]) -> list[list[float]]:
        read, behind = [cut for cut in cuts if self._reads(cut)], [cut for cut in cuts if not self._reads(cut)]
        pairs = [(cut.found.query, replace(cut.passage, text=sentence)) for cut in read for sentence in cut.sentences]
        by_model = iter(self.model.score_pairs(pairs) if pairs else ())
        by_terms = iter(TermOverlap().scores(behind))
        return [[next(by_model) for _ in cut.sentences] if self._reads(cut) else next(by_terms) for cut in cuts]

    def _reads(self, cut: Cut) -> bool:
        return self.depth is None or cut.rank < self.depth


class SentenceTrimmer:
    """Says in which shorter forms a passage may be packed.

    A passage is offered whole, then with its `sentences` best-matching sentences, then with one fewer, down to the best
    one; the packer takes the first that fits. Only the first `whole` hits are offered whole (None: every hit; 0: none,
    then all that is packed is trimmed). `around` neighbours on each side of a kept sentence are kept with it. Ties keep
    the earlier sentence, so that a passage without any of the question's terms keeps its beginning. `scorer` says which
    sentences match best (None: `TermOverlap`).
    """

    def __init__(
        self,
        sentences: int = 3,
        *,
        around: int = 0,
        whole: int | None = None,
        scorer: SentenceScorer | None = None,
    ) -> None:
        if sentences < 1 or around < 0 or (whole is not None and whole < 0):
            raise ValueError(
                f"sentences is {sentences} (at least 1), around is {around} and whole is {whole} (at least 0, or None)"
            )
        self.sentences, self.around, self.whole = sentences, around, whole
        self.scorer = scorer or TermOverlap()

    def is_offered_whole(self, rank: int) -> bool:
        """Whether the hit at a rank (from 0) may be packed whole."""
        return self.whole is None or rank < self.whole

    def shortest(self, hit: Hit) -> Hit:
        """The hit cut to its shortest sentence: no form of it is shorter."""
        text = hit.passage.text
        start, end = min(_spans(text), key=lambda span: span[1] - span[0], default=(0, len(text)))
        return hit if end - start == len(text) else _replace_text(hit, text[start:end])

    def forms(self, hit: Hit, scores: Sequence[float]) -> tuple[Hit, ...]:
        """What the hit may be cut to by the scores of its sentences, longest first, no text twice.

        Where that keeps every sentence it is the hit itself, unchanged.
        """
        text = hit.passage.text
        spans = _spans(text)
        best = sorted(range(len(spans)), key=lambda place: -scores[place])
        choices = (self._with_neighbours(best[:count], len(spans)) for count in range(self.sentences, 0, -1))
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
