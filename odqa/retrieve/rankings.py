"""Rankings of many queries as two arrays; Hit objects are made from them only at the end.

At 21M passages and depth 1,000 a list of hits per query is mostly waste: search, fusion and cuts work on rows and
scores. One order holds everywhere in this package: higher score first, and of equal scores the lower row first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from odqa.corpus.store import PassageStore
from odqa.types import Hit


@dataclass(frozen=True, slots=True)
class Rankings:
    """The ranked rows of Q queries, at most k each.

    `rows` is int64 (Q, k), best first; -1 fills the end of a list that has fewer than k hits. `scores` is float32
    (Q, k), -inf where there is no hit. `source` names the stage for `Hit.source`.
    """

    rows: np.ndarray
    scores: np.ndarray
    source: str

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or self.rows.shape != self.scores.shape:
            raise ValueError(f"rows {self.rows.shape} and scores {self.scores.shape} must have one shape (Q, k)")
        if self.rows.dtype != np.int64 or self.scores.dtype != np.float32:
            raise ValueError(f"rows must be int64 and scores float32, not {self.rows.dtype} and {self.scores.dtype}")

    def __len__(self) -> int:
        """The number of queries."""
        return len(self.rows)

    @property
    def depth(self) -> int:
        """The most hits a query may have here."""
        return int(self.rows.shape[1])

    def cut(self, k: int) -> "Rankings":
        """The first k of every list."""
        return Rankings(self.rows[:, :k], self.scores[:, :k], self.source)

    def hits(self, store: PassageStore) -> list[list[Hit]]:
        """The rankings as hits with their passages, one list a query."""
        return [
            [Hit(store[row], score, self.source) for row, score in zip(rows, scores, strict=True) if row >= 0]
            for rows, scores in zip(self.rows.tolist(), self.scores.tolist(), strict=True)
        ]


class Searcher(Protocol):
    """Ranks the rows of one index for a batch of query texts."""

    def search(self, texts: Sequence[str], k: int) -> Rankings:
        """At most k rows a text, in the order of this package. Raises ValueError for k < 1."""
        ...


def rank_entries(
    queries: np.ndarray, rows: np.ndarray, scores: np.ndarray, *, count: int, k: int, source: str
) -> Rankings:
    """Rank loose entries (query number, row, score), all (N,), into lists of at most k for `count` queries.

    A (query, row) pair must not stand twice. Order: higher score, then lower row.
    """
    order = np.lexsort((rows, -scores, queries))
    queries, rows, scores = queries[order], rows[order], scores[order]
    ranks = np.arange(len(queries)) - np.searchsorted(queries, queries)
    kept = ranks < k
    ranked = no_hits(count, k, source)
    ranked.rows[queries[kept], ranks[kept]] = rows[kept]
    ranked.scores[queries[kept], ranks[kept]] = scores[kept]
    return ranked


def no_hits(count: int, k: int, source: str) -> Rankings:
    """Rankings of `count` queries without a hit, to be filled."""
    check_depth(k)
    return Rankings(np.full((count, k), -1, np.int64), np.full((count, k), -np.inf, np.float32), source)


def check_depth(k: int) -> None:
    """Raises ValueError unless k is at least 1."""
    if k < 1:
        raise ValueError(f"k is {k}; a ranking has at least one place")
