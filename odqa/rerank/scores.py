"""Re-ranking with scores that were made elsewhere: a TREC run file, or any table of scores by query and passage.

So a system that odqa cannot run (another library's re-ranker, a model behind a wall, judgements of people) ranks, and
the rest of the pipeline packs and reads. It reads no text: queries and passages are known by their ids alone.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from odqa.corpus.io import read_trec_lines
from odqa.errors import DataError
from odqa.types import Hit, Query

_log = logging.getLogger(__name__)

Scores = Mapping[str, Mapping[str, float]]
"""Score by query id, then by passage id; higher is better."""


class ScoreReranker:
    """Orders hits by the given `scores`; `name` says where they are from and becomes the source of the hits.

    A hit without a score goes behind those with one: in the old order, with its old score and source. Each call logs
    how many there were. Only the first `depth` hits of a query are looked up (None: all).
    """

    def __init__(self, scores: Scores, name: str, *, depth: int | None = None) -> None:
        self.scores, self.name, self.depth = scores, name, depth

    def check_queries(self, queries: Sequence[Query]) -> None:
        """Raises DataError if a query has no scores at all: they are then those of other questions."""
        missing = [query.id for query in queries if query.id not in self.scores]
        if missing:
            raise DataError(
                f"{self.name}: no scores for {len(missing)} of {len(queries)} queries (first: {missing[0]!r}). "
                "Give a run of the same questions, with the same ids."
            )

    def rerank(self, queries: Sequence[Query], hits: Sequence[Sequence[Hit]]) -> list[list[Hit]]:
        """The same passages by their given scores, best first; ties keep the incoming order.

        Raises DataError as `check_queries` does.
        """
        self.check_queries(queries)
        ranked, looked_up, unscored = [], 0, 0
        for query, found in zip(queries, hits, strict=True):
            given = self.scores[query.id]
            depth = len(found) if self.depth is None else self.depth
            first, rest = list(found[:depth]), list(found[depth:])
            scored = [Hit(hit.passage, given[hit.passage.id], self.name) for hit in first if hit.passage.id in given]
            behind = [hit for hit in first if hit.passage.id not in given]
            ranked.append(sorted(scored, key=lambda hit: -hit.score) + behind + rest)  # stable: ties keep their order
            looked_up, unscored = looked_up + len(first), unscored + len(behind)
        if unscored:
            _log.warning("rerank: %d of %d passages are not in %s; they go behind", unscored, looked_up, self.name)
        return ranked


def load_trec_run(path: Path, *, tag: str | None = None) -> dict[str, dict[str, float]]:
    """The scores of a TREC run file (may be gzipped), whose lines are `query Q0 passage rank score tag` in any order.

    Ranks are not used. `tag` keeps the lines of one tag, for a file that holds several runs. All scores are in memory,
    about 100 bytes each. Raises DataError with the number of a line that has not six columns, whose score is no finite
    number, or that scores a passage a second time; also if there is nothing.
    """
    scores: dict[str, dict[str, float]] = {}
    tags: dict[str, None] = {}
    for number, (query_id, _, passage_id, _, text, found) in read_trec_lines(path):
        tags[found] = None
        if tag is not None and found != tag:
            continue
        score = _score(text)
        if score is None:
            raise DataError(f"{path}: line {number}: the score {text!r} is not a finite number.")
        of_query = scores.setdefault(query_id, {})
        if passage_id in of_query:
            hint = " Name one of the file's runs under tag." if tag is None and len(tags) > 1 else ""
            raise DataError(
                f"{path}: line {number} scores passage {passage_id!r} of query {query_id!r} a second time.{hint}"
            )
        of_query[passage_id] = score
    if not scores:
        names = ", ".join(list(tags)[:5])
        raise DataError(f"{path}: no lines of tag {tag!r} (there is {names})." if tags else f"{path}: an empty run.")
    return scores


def _score(text: str) -> float | None:
    try:
        score = float(text)
    except ValueError:
        return None
    return score if math.isfinite(score) else None
