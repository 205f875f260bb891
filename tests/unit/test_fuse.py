"""Fusion; every expected score is worked out in a comment."""

from collections.abc import Callable

import numpy as np
import pytest

from odqa.retrieve.fuse import (
    alpha_fusion,
    fuse_hits_by_rank,
    fuse_hits_by_score,
    reciprocal_rank_fusion,
    weighted_fusion,
)
from odqa.retrieve.rankings import Rankings, rank_entries
from odqa.types import Hit, Passage


def run(rows: list[list[int]], scores: list[list[float]], source: str = "a") -> Rankings:
    return Rankings(np.array(rows, np.int64), np.array(scores, np.float32), source)


EMPTY = -np.inf
A = run([[3, 1, 2]], [[9.0, 5.0, 1.0]])
B = run([[2, 7, -1]], [[0.8, 0.4, EMPTY]], "b")


def test_reciprocal_rank_fusion_adds_one_over_c_plus_rank() -> None:
    fused = reciprocal_rank_fusion([A, B], 10, c=60)
    # 2: 1/63 + 1/61 = 0.032266; 3: 1/61 = 0.016393; 1 and 7: 1/62 = 0.016129 each, so the lower row first
    assert fused.rows[0].tolist() == [2, 3, 1, 7, *[-1] * 6]
    assert fused.scores[0, :4] == pytest.approx([0.032266, 0.016393, 0.016129, 0.016129], abs=1e-6)
    assert fused.source == "a+b"


def test_a_small_c_trusts_the_first_ranks() -> None:
    # c = 0: 2: 1/3 + 1/1 = 4/3; 3: 1; 1 and 7: 1/2
    assert reciprocal_rank_fusion([A, B], 4, c=0).scores[0] == pytest.approx([4 / 3, 1, 0.5, 0.5])


def test_weighted_fusion_gives_a_missing_passage_the_minimum_of_the_list() -> None:
    fused = weighted_fusion([A, B], [0.1, 1.0], 10, normalise="none")
    # minima: a 1.0, b 0.4
    # 3: 0.1 * 9 + 0.4 = 1.3; 2: 0.1 * 1 + 0.8 = 0.9; 1: 0.1 * 5 + 0.4 = 0.9; 7: 0.1 * 1 + 0.4 = 0.5
    assert fused.scores[0, :4] == pytest.approx([1.3, 0.9, 0.9, 0.5])
    assert [fused.rows[0, 0], {*fused.rows[0, 1:3].tolist()}, fused.rows[0, 3]] == [3, {1, 2}, 7]


def test_min_max_maps_each_list_to_zero_to_one() -> None:
    fused = weighted_fusion([A, B], [0.5, 0.5], 10, normalise="min-max")
    # a: 3 -> 1, 1 -> 0.5, 2 -> 0; b: 2 -> 1, 7 -> 0; missing -> 0
    # 3: 0.5; 2: 0.5; 1: 0.25; 7: 0
    assert fused.rows[0, :4].tolist() == [2, 3, 1, 7]
    assert fused.scores[0, :4] == pytest.approx([0.5, 0.5, 0.25, 0.0])


def test_z_score_maps_each_list_to_mean_0_and_deviation_1() -> None:
    fused = weighted_fusion([A, B], [1.0, 1.0], 10, normalise="z-score")
    # a: mean 5, deviation sqrt(32 / 3) = 3.265986 -> 3: 1.224745, 1: 0, 2: -1.224745; b: mean 0.6, deviation 0.2 -> +-1
    # 3: 1.224745 - 1 = 0.224745; 2: -1.224745 + 1 = -0.224745; 1: 0 - 1 = -1; 7: -1.224745 - 1 = -2.224745
    assert fused.rows[0, :4].tolist() == [3, 2, 1, 7]
    assert fused.scores[0, :4] == pytest.approx([0.224745, -0.224745, -1.0, -2.224745], abs=1e-5)


@pytest.mark.parametrize("normalise", ["min-max", "z-score"])
def test_a_list_of_equal_scores_says_nothing(normalise: str) -> None:
    equal = run([[5, 1]], [[0.3, 0.3]], "b")
    fused = weighted_fusion([A, equal], [1.0, 1.0], 4, normalise=normalise)  # type: ignore[arg-type]
    assert np.isfinite(fused.scores).all()
    assert fused.rows[0].tolist() == [3, 1, 2, 5]  # 5 has the minimum of A, as 2 has, and a higher row


@pytest.mark.parametrize("normalise", ["none", "min-max", "z-score"])
def test_a_list_without_hits_leaves_the_other_as_it_is(normalise: str) -> None:
    nothing = run([[-1, -1]], [[EMPTY, EMPTY]], "b")
    fused = weighted_fusion([A, nothing], [1.0, 1.0], 4, normalise=normalise)  # type: ignore[arg-type]
    assert fused.rows[0].tolist() == [3, 1, 2, -1]
    assert reciprocal_rank_fusion([A, nothing], 4).rows[0].tolist() == [3, 1, 2, -1]
    assert reciprocal_rank_fusion([nothing, nothing], 4).rows[0].tolist() == [-1] * 4


def test_queries_do_not_mix() -> None:
    rng = np.random.default_rng(0)
    runs = []
    for _ in range(3):
        rows = np.stack([rng.permutation(30)[:8] for _ in range(5)])
        runs.append(Rankings(rows, -np.sort(-rng.random((5, 8)).astype(np.float32), axis=1), "x"))
    for fuse in (
        lambda runs: reciprocal_rank_fusion(runs, 6),
        lambda runs: weighted_fusion(runs, [0.2, 0.3, 0.5], 6, normalise="z-score"),
    ):
        together = fuse(runs)
        for query in range(5):
            alone = fuse([Rankings(r.rows[query : query + 1], r.scores[query : query + 1], "x") for r in runs])
            assert (together.rows[query] == alone.rows[0]).all()
            assert (together.scores[query] == alone.scores[0]).all()


# --- the published hybrid


def published(
    sparse: dict[int, float], dense: dict[int, float], alpha: float, *, normalise: bool = False
) -> dict[int, float]:
    """The rule of arXiv 2104.05740 passage by passage, without odqa: union, missing = the list's minimum."""
    scores = {}
    for passage in {*sparse, *dense}:
        total = 0.0
        for weight, found in ((alpha, sparse), (1.0, dense)):
            least, most = (min(found.values()), max(found.values())) if found else (0.0, 1.0)
            score = found.get(passage, least)
            if normalise:
                score = (score - (least + most) / 2) / (most - least)
            total += weight * score
        scores[passage] = total
    return scores


def test_alpha_fusion_is_dense_plus_alpha_times_sparse() -> None:
    fused = alpha_fusion(A, B, 10, alpha=0.1)
    # minima: A (sparse) 1.0, B (dense) 0.4; 3: 0.4 + 0.1 * 9 = 1.3; 1: 0.4 + 0.5 = 0.9; 2: 0.8 + 0.1 = 0.9;
    # 7: 0.4 + 0.1 = 0.5
    assert fused.scores[0, :4] == pytest.approx([1.3, 0.9, 0.9, 0.5])
    assert (fused.rows[0, 0], fused.rows[0, 3], fused.source) == (3, 7, "a+b")


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0, 1.2, 30.0])
def test_alpha_fusion_equals_the_published_rule(alpha: float, normalise: bool) -> None:
    """Random lists as retrievers give them: some overlap, a tenth short, on the scales of BM25 and of DPR."""
    rng = np.random.default_rng(7)
    count, depth, k = 200, 20, 15
    lists: list[list[dict[int, float]]] = [[], []]
    for which, (scale, shift) in enumerate(((6.0, 12.0), (3.0, 75.0))):
        for _ in range(count):
            length = depth if rng.random() > 0.1 else int(rng.integers(2, depth))
            rows = rng.permutation(50)[:length]
            scores = np.sort(rng.normal(shift, scale, length).astype(np.float32))[::-1]
            lists[which].append(dict(zip(rows.tolist(), scores.tolist(), strict=True)))
    runs = [as_rankings(found, depth) for found in lists]
    fused = alpha_fusion(*runs, k, alpha=alpha, normalise=normalise)
    for query in range(count):
        expected = published(lists[0][query], lists[1][query], alpha, normalise=normalise)
        best = sorted(expected.values(), reverse=True)[:k]
        assert fused.scores[query, : len(best)] == pytest.approx(best, rel=1e-6, abs=1e-6)  # float32 of float64 sums
        for row, score in zip(fused.rows[query], fused.scores[query], strict=True):
            assert row < 0 or expected[int(row)] == pytest.approx(score, rel=1e-6, abs=1e-6)


def as_rankings(lists: list[dict[int, float]], depth: int) -> Rankings:
    rows, scores = np.full((len(lists), depth), -1, np.int64), np.full((len(lists), depth), EMPTY, np.float32)
    for query, found in enumerate(lists):
        rows[query, : len(found)], scores[query, : len(found)] = list(found), list(found.values())
    return Rankings(rows, scores, "x")


def test_alpha_fusion_of_a_list_without_hits_is_the_other_list() -> None:
    nothing = run([[-1, -1]], [[EMPTY, EMPTY]])
    for normalise in (False, True):
        assert alpha_fusion(nothing, B, 3, alpha=1.2, normalise=normalise).rows[0].tolist() == [2, 7, -1]
        assert alpha_fusion(A, nothing, 3, alpha=1.2, normalise=normalise).rows[0].tolist() == [3, 1, 2]


def test_alpha_fusion_of_equal_scores_does_not_divide_by_zero() -> None:
    fused = alpha_fusion(run([[5, 1]], [[0.3, 0.3]]), B, 4, alpha=1.0, normalise=True)
    # sparse becomes zeros; dense: 2 -> 0.5, 7 -> -0.5, missing -> -0.5
    assert fused.rows[0].tolist() == [2, 1, 5, 7] and fused.scores[0] == pytest.approx([0.5, -0.5, -0.5, -0.5])


def test_alpha_fusion_is_weighted_fusion_of_raw_scores() -> None:
    """What recipes with kind hybrid, normalise none and weights [alpha, 1] have computed all along."""
    one, other = alpha_fusion(A, B, 4, alpha=1.2), weighted_fusion([A, B], [1.2, 1.0], 4, normalise="none")
    assert (one.rows == other.rows).all() and (one.scores == other.scores).all()


def test_wrong_arguments_are_value_errors() -> None:
    with pytest.raises(ValueError, match="same queries"):
        reciprocal_rank_fusion([], 5)
    with pytest.raises(ValueError, match="same queries"):
        reciprocal_rank_fusion([A, run([[1], [2]], [[1.0], [1.0]])], 5)
    with pytest.raises(ValueError, match="1 weights for 2 runs"):
        weighted_fusion([A, B], [1.0], 5)
    with pytest.raises(ValueError, match="at least one place"):
        reciprocal_rank_fusion([A, B], 0)


def test_rank_entries_orders_by_score_then_row_and_cuts() -> None:
    ranked = rank_entries(
        np.array([1, 0, 1, 1]), np.array([4, 9, 2, 8]), np.array([0.5, 1.0, 0.5, 0.7]), count=3, k=2, source="x"
    )
    assert ranked.rows.tolist() == [[9, -1], [8, 2], [-1, -1]]
    assert ranked.scores.tolist() == [[1.0, EMPTY], [pytest.approx(0.7), 0.5], [EMPTY, EMPTY]]


def test_rankings_refuse_arrays_of_other_shapes_and_types() -> None:
    with pytest.raises(ValueError, match="one shape"):
        Rankings(np.zeros((1, 2), np.int64), np.zeros((1, 3), np.float32), "x")
    with pytest.raises(ValueError, match="int64"):
        Rankings(np.zeros((1, 2), np.int32), np.zeros((1, 2), np.float32), "x")


# --- hits of several passes of one question


def hits(*scored: tuple[str, float]) -> list[Hit]:
    return [Hit(Passage(passage_id, passage_id), score, "test") for passage_id, score in scored]


def test_hits_are_fused_by_rank_and_ties_keep_the_order_of_first_appearance() -> None:
    fused = fuse_hits_by_rank([hits(("a", 9.0), ("b", 8.0)), hits(("c", 0.2), ("b", 0.1))])
    # b: 2/62; a and c: 1/61 each
    assert [(hit.passage.id, hit.source) for hit in fused] == [("b", "fused"), ("a", "fused"), ("c", "fused")]
    assert [hit.score for hit in fused] == pytest.approx([2 / 62, 1 / 61, 1 / 61])


def test_hits_are_fused_by_mean_score_and_a_list_that_lacks_one_gives_its_lowest() -> None:
    fused = fuse_hits_by_score([hits(("a", 9.0), ("b", 7.0)), [], hits(("c", 5.0), ("b", 4.0), ("d", 1.0))])
    # a: (9 + 1) / 2; b: (7 + 4) / 2; c: (7 + 5) / 2; d: (7 + 1) / 2
    assert [(hit.passage.id, hit.score) for hit in fused] == [("c", 6.0), ("b", 5.5), ("a", 5.0), ("d", 4.0)]


@pytest.mark.parametrize("fuse", [fuse_hits_by_rank, fuse_hits_by_score])
def test_nothing_found_in_any_pass_is_nothing(fuse: Callable[[list[list[Hit]]], list[Hit]]) -> None:
    assert fuse([[], []]) == fuse([]) == []
