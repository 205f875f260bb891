"""Re-ranking in stages: a cheap re-ranker orders many hits, a dear one the first few of what comes.

It scores nothing itself and knows no model: each stage re-scores as many hits as its own depth says. The invariant: the
passages that come in are the passages that go out, and what a later stage did not score stays behind what it did, in
the order of the stage before.

Source: Matveeva et al. 2006 (SIGIR), nested ranking; Nogueira et al. 2019 (arXiv 1910.14424) with BERT.
"""

from collections.abc import Sequence

from odqa.stages import ChecksQueries, Reranker
from odqa.types import Hit, Query


class CascadeReranker:
    """Applies `stages` one after the other. Scores of different stages do not compare; the order is the result.

    Raises ValueError without stages.
    """

    def __init__(self, stages: Sequence[Reranker]) -> None:
        if not stages:
            raise ValueError("a cascade needs at least one stage")
        self.stages = tuple(stages)

    def rerank(self, queries: Sequence[Query], hits: Sequence[Sequence[Hit]]) -> list[list[Hit]]:
        """The same passages in the order of the last stage; beyond its depth, in that of the stage before."""
        ranked = [list(found) for found in hits]
        for stage in self.stages:
            ranked = stage.rerank(queries, ranked)
        return ranked

    def check_queries(self, queries: Sequence[Query]) -> None:
        """Raises DataError if a stage cannot serve one of the queries."""
        for stage in self.stages:
            if isinstance(stage, ChecksQueries):
                stage.check_queries(queries)
