"""Re-ranking by the score of each (question, passage) pair, whatever gives the scores.

What every such re-ranker shares: which hits are scored, what the score that a hit came with still counts, batches of
pairs of similar length, what is remembered, and what happens to scores that are no numbers. The models are behind
`odqa.rerank.models.PairScorer`. The invariant: the passages that come in are the passages that go out.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from odqa.errors import DataError, RecipeError
from odqa.rerank.models import ROUND_TO, PairScorer
from odqa.runtime import Recent, progress, run_batches
from odqa.types import Hit, Passage, Query

_PAIRS_AT_ONCE = 8192  # our choice: pairs tokenised and sorted together; bounds memory, loses little of the sorting

_log = logging.getLogger(__name__)


class PairReranker:
    """Orders hits by the scores of a `PairScorer`, the `model` that a subclass loads; `source` is that of its hits.

    `retriever_weight` w adds w times the score that a hit came with, so that what the first stage knows and the model
    does not still counts. 0 is the model alone. The sum of the two raw scores is our choice; w depends on the scales of
    both and is to be chosen on tune questions.

    Only the first `depth` hits of a query are scored (None: all); the others follow behind in their old order, with
    their old scores and sources, so scores do not compare across that border.

    Batches hold pairs of similar length of all queries, at most `batch_tokens` tokens with padding (None: what is fast
    on the device). Pairs whose score is in `memory` are not computed again: for an evaluation whose systems re-rank
    many of the same passages with one model. A pair that is too long for the model loses the end of its passage; each
    call logs how many were cut.

    Raises RecipeError for a depth below 1 or a weight below 0.
    """

    model: PairScorer

    def __init__(
        self,
        source: str,
        *,
        depth: int | None,
        retriever_weight: float,
        batch_tokens: int | None,
        memory: Recent[tuple[str, Passage], float] | None,
    ) -> None:
        if depth is not None and depth < 1:
            raise RecipeError(
                f"reranker {source}: depth is {depth}; it must be at least 1 (leave it out to re-rank all)."
            )
        if not 0 <= retriever_weight < math.inf:
            raise RecipeError(f"reranker {source}: retriever_weight is {retriever_weight}; it must be 0 or more.")
        self.source, self.depth, self.retriever_weight = source, depth, retriever_weight
        self.batch_tokens, self.memory = batch_tokens, memory

    def rerank(self, queries: Sequence[Query], hits: Sequence[Sequence[Hit]]) -> list[list[Hit]]:
        """The same passages by the model's score, best first; ties keep the incoming order; no hits give no hits.

        Raises DataError naming the query whose question leaves no room for a passage, or the query and the passage
        whose score is not a number: the model's, or with a `retriever_weight` the one it came with.
        """
        pairs = [
            _Pair(query, hit, number)
            for number, (query, found) in enumerate(zip(queries, hits, strict=True))
            for hit in found[: self.depth]
        ]
        renewed: list[list[Hit]] = [[] for _ in queries]
        priors = [self._prior(pair) for pair in pairs]
        for pair, score, prior in zip(pairs, self._known_or_scored(pairs), priors, strict=True):
            renewed[pair.number].append(Hit(pair.hit.passage, score + prior, self.source))
        for ranking in renewed:
            ranking.sort(key=lambda hit: -hit.score)  # stable: ties keep their order
        rest = ([] if self.depth is None else list(found[self.depth :]) for found in hits)
        return [ranking + behind for ranking, behind in zip(renewed, rest, strict=True)]

    def score_pairs(self, pairs: Sequence[tuple[Query, Passage]]) -> list[float]:
        """The model's score of each pair by itself, in their order: no depth, no `retriever_weight`.

        Raises DataError as `rerank` does.
        """
        found = [Hit(passage, 0.0, self.source) for _, passage in pairs]
        return self._known_or_scored([_Pair(query, hit, 0) for (query, _), hit in zip(pairs, found, strict=True)])

    def _prior(self, pair: "_Pair") -> float:
        """What the score that a hit came with adds."""
        if not self.retriever_weight:
            return 0.0
        if not math.isfinite(pair.hit.score):
            raise DataError(
                f"query {pair.query.id}, passage {pair.hit.passage.id}: it comes from {pair.hit.source!r} with the "
                f"score {pair.hit.score}, which retriever_weight cannot count. Set retriever_weight: 0."
            )
        return self.retriever_weight * pair.hit.score

    def _known_or_scored(self, pairs: Sequence["_Pair"]) -> list[float]:
        """The model's score of each pair, in their order; those that are remembered are not computed again."""
        if self.memory is None:
            return self._score(pairs)
        keys = [(pair.query.text, pair.hit.passage) for pair in pairs]
        new = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self.memory}
        known = {key: self.memory[key] for key in keys if key not in new}
        known |= zip(new, self._score(list(new.values())), strict=True)
        self.memory.store(known)
        return [known[key] for key in keys]

    def _score(self, pairs: Sequence["_Pair"]) -> list[float]:
        """The model's score of each pair, in their order."""
        scores = [math.nan] * len(pairs)
        cut = 0
        with progress("rerank", len(pairs), "pairs") as bar:
            for start in range(0, len(pairs), _PAIRS_AT_ONCE):
                block = pairs[start : start + _PAIRS_AT_ONCE]
                rows, long = self.model.encode([(pair.query, pair.hit.passage) for pair in block])
                cut += long

                def score(batch: list[int], start: int = start, rows: Sequence[Any] = rows) -> None:
                    found = self.model.scores([rows[number] for number in batch])
                    for number, value in zip(batch, found, strict=True):
                        scores[start + number] = value
                    bar.advance(len(batch))

                lengths = [len(row["input_ids"]) for row in rows]
                run_batches(score, lengths, device=self.model.device, batch_tokens=self.batch_tokens, step=ROUND_TO)
        for pair, value in zip(pairs, scores, strict=True):
            if not math.isfinite(value):
                raise DataError(
                    f"query {pair.query.id}, passage {pair.hit.passage.id}: {self.model.name} gives the score {value} "
                    f"in {str(self.model.dtype).removeprefix('torch.')}. Use dtype: float32."
                )
        if cut:
            _log.warning("rerank: %d of %d passages were cut at %d tokens", cut, len(pairs), self.model.max_tokens)
        return scores


@dataclass(frozen=True, slots=True)
class _Pair:
    """A query and one of its hits; `number` is the query's place in the call."""

    query: Query
    hit: Hit
    number: int
