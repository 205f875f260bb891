"""Fusion of several rankings of the same queries into one.

All ways are sums over the lists of something a list gives to its rows, so both reduce to `_sum_by_row`. Pure functions
of arrays; they know no passages. Ties: lower row first.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from odqa.retrieve.rankings import Rankings, rank_entries
from odqa.types import Hit

Normalise = Literal["none", "min-max", "z-score"]


def reciprocal_rank_fusion(runs: Sequence[Rankings], k: int, *, c: float = 60.0) -> Rankings:
    """Fuse by rank: score(p) = sum over runs of 1 / (c + rank), rank from 1; a run that lacks p adds nothing.

    Source: Cormack et al. 2009, eq. 1 (there c = 60). Raises ValueError if `runs` is empty or of unequal length.
    """
    _check(runs)
    given = [np.broadcast_to(1.0 / (c + np.arange(1, run.depth + 1)), run.rows.shape) for run in runs]
    return _sum_by_row(runs, given, np.zeros(len(runs[0])), k)


def weighted_fusion(
    runs: Sequence[Rankings], weights: Sequence[float], k: int, *, normalise: Normalise = "min-max"
) -> Rankings:
    """Fuse by score: score(p) = sum over runs of weight * s(p), s being the run's scores normalised per query.

    A run that lacks p gives it the lowest score of its list, because p is at best just below the cut; a run without any
    hit for a query gives that query nothing. `normalise`: "min-max" maps a list to 0 ... 1, "z-score" to mean 0 and
    standard deviation 1 (a list of equal scores becomes zeros in both), "none" keeps the scores.
    Raises ValueError if `runs` is empty or of unequal length, or if there is not one weight a run.
    """
    if len(weights) != len(runs):
        raise ValueError(f"{len(weights)} weights for {len(runs)} runs; give one each")
    return _weighted_sum(runs, weights, k, _NORMALISERS[normalise])


def alpha_fusion(sparse: Rankings, dense: Rankings, k: int, *, alpha: float, normalise: bool = False) -> Rankings:
    """Fuse as published: score(p) = dense(p) + alpha * sparse(p) over the union of both lists.

    A list that lacks p gives it its lowest score, so a list of a single hit decides nothing. `normalise`: each list
    becomes (s - (min + max) / 2) / (max - min) first; one of equal scores becomes zeros (Pyserini divides by zero).
    Source: Ma et al. 2021, arXiv 2104.05740, as Pyserini's HybridSearcher computes it; the hybrid of Spider (Ram et al.
    2022, arXiv 2112.07708) is the same without normalisation, its lambda being alpha.
    Raises ValueError if the lists are not of the same queries.
    """
    normaliser = _centred if normalise else _NORMALISERS["none"]
    return _weighted_sum((sparse, dense), (alpha, 1.0), k, normaliser)


def fuse_hits_by_rank(lists: Sequence[Sequence[Hit]], c: float = 60.0) -> list[Hit]:
    """`reciprocal_rank_fusion` of one query's lists of hits, such as those of several passes.

    Ties keep the order of first appearance; every hit is then of the source "fused".
    """
    scores: dict[str, float] = {}
    for found in lists:
        for rank, hit in enumerate(found, start=1):
            scores[hit.passage.id] = scores.get(hit.passage.id, 0.0) + 1.0 / (c + rank)
    return _fused(lists, scores)


def fuse_hits_by_score(lists: Sequence[Sequence[Hit]]) -> list[Hit]:
    """The mean of a passage's scores over one query's lists; a list that lacks it gives its lowest score.

    So the fused scores are of the same size as a list's own. An empty list has no say. Ties and source: see
    `fuse_hits_by_rank`.
    """
    lists = [found for found in lists if found]
    lowest = sum(min(hit.score for hit in found) for found in lists)
    scores: dict[str, float] = {}
    for found in lists:
        least = min(hit.score for hit in found)
        for hit in found:
            scores[hit.passage.id] = scores.get(hit.passage.id, lowest) + hit.score - least
    return _fused(lists, {passage_id: score / len(lists) for passage_id, score in scores.items()})


def _fused(lists: Sequence[Sequence[Hit]], scores: Mapping[str, float]) -> list[Hit]:
    passages = {hit.passage.id: hit.passage for found in reversed(lists) for hit in found}
    order = sorted(scores, key=lambda passage_id: -scores[passage_id])
    return [Hit(passages[passage_id], scores[passage_id], "fused") for passage_id in order]


def _weighted_sum(runs: Sequence[Rankings], weights: Sequence[float], k: int, normaliser: "_Normaliser") -> Rankings:
    _check(runs)
    scores = [normaliser(_masked(run)) for run in runs]
    lowest = [np.ma.filled(list_scores.min(axis=1), 0.0) for list_scores in scores]
    # With s_l(p) = min_l where list l lacks p:
    # sum over l of w_l s_l(p)  =  sum over l of w_l min_l  +  sum over those l that have p of w_l (s_l(p) - min_l)
    base = np.sum([weight * least for weight, least in zip(weights, lowest, strict=True)], axis=0)
    given = [
        weight * (np.ma.filled(list_scores, 0.0) - least[:, None])
        for weight, list_scores, least in zip(weights, scores, lowest, strict=True)
    ]
    return _sum_by_row(runs, given, base, k)


def _masked(run: Rankings) -> np.ma.MaskedArray:
    """The scores in float64 with the empty places masked."""
    return np.ma.masked_array(np.where(run.rows < 0, 0.0, run.scores.astype(np.float64)), mask=run.rows < 0)


def _min_max(scores: np.ma.MaskedArray) -> np.ma.MaskedArray:
    low, high = scores.min(axis=1, keepdims=True), scores.max(axis=1, keepdims=True)
    return _divide(scores - low, high - low)


def _centred(scores: np.ma.MaskedArray) -> np.ma.MaskedArray:
    low, high = scores.min(axis=1, keepdims=True), scores.max(axis=1, keepdims=True)
    return _divide(scores - (low + high) / 2, high - low)


def _z_score(scores: np.ma.MaskedArray) -> np.ma.MaskedArray:
    return _divide(scores - scores.mean(axis=1, keepdims=True), scores.std(axis=1, keepdims=True))


def _divide(values: np.ma.MaskedArray, spread: np.ma.MaskedArray) -> np.ma.MaskedArray:
    """values / spread; a list without spread has zeros for values and keeps them."""
    filled = spread.filled(0.0)
    quotient: np.ma.MaskedArray = values / np.where(filled > 0, filled, 1.0)
    return quotient


_Normaliser = Callable[[np.ma.MaskedArray], np.ma.MaskedArray]
_NORMALISERS: dict[Normalise, _Normaliser] = {
    "none": lambda scores: scores,
    "min-max": _min_max,
    "z-score": _z_score,
}


def _sum_by_row(runs: Sequence[Rankings], given: Sequence[np.ndarray], base: np.ndarray, k: int) -> Rankings:
    """Rank the union of the runs' rows by base (Q,) + the sum of what each run gives (Q, depth) to a row."""
    rows = np.concatenate([run.rows for run in runs], axis=1)  # (Q, L), L = sum of depths
    gifts = np.concatenate(given, axis=1)
    queries = np.broadcast_to(np.arange(len(rows))[:, None], rows.shape)
    is_hit = rows >= 0
    queries, rows, gifts = queries[is_hit], rows[is_hit], gifts[is_hit]
    order = np.lexsort((rows, queries))  # stable: the gifts to one row are summed in the order of the runs
    queries, rows, gifts = queries[order], rows[order], gifts[order]
    is_first = np.ones(len(rows), bool)
    is_first[1:] = (queries[1:] != queries[:-1]) | (rows[1:] != rows[:-1])
    sums = np.bincount(np.cumsum(is_first) - 1, weights=gifts) if len(rows) else gifts
    queries, rows = queries[is_first], rows[is_first]
    scores = (base[queries] + sums).astype(np.float32)
    source = "+".join(dict.fromkeys(run.source for run in runs))
    return rank_entries(queries, rows, scores, count=len(base), k=k, source=source)


def _check(runs: Sequence[Rankings]) -> None:
    if not runs or len({len(run) for run in runs}) != 1:
        raise ValueError(
            f"fusion needs rankings of the same queries, got lists for {[len(run) for run in runs]} queries"
        )
