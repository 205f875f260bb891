"""The distribution over spans: against plain loops, and its loss."""

import itertools
import math

import torch

from odqa.frozen.spans import SpanBatch, log_normaliser, marginal_loss, span_scores

SCORES = torch.tensor(
    [
        [[0.5, 0.1], [1.0, -1.0], [2.0, 0.3], [0.0, 1.5]],
        [[-0.2, 0.4], [0.7, 0.2], [9.0, 9.0], [9.0, 9.0]],
    ]
)  # (R=2, T=4, 2)
IN_TEXT = torch.tensor([[False, True, True, True], [False, True, False, False]])
LONGEST = 2


def by_hand(row: int) -> dict[tuple[int, int], float]:
    """Every allowed span of a row and its score s_i + e_j, with "no answer" at (0, 0)."""
    spans = {(0, 0): SCORES[row, 0].sum().item()}
    for i, j in itertools.product(range(4), repeat=2):
        if i <= j < i + LONGEST and IN_TEXT[row, i] and IN_TEXT[row, j]:
            spans[i, j] = (SCORES[row, i, 0] + SCORES[row, j, 1]).item()
    return spans


def test_spans_are_those_of_a_double_loop() -> None:
    spans = span_scores(SCORES, IN_TEXT, LONGEST)
    for row in range(2):
        found = {
            (i, i + w): spans[row, i, w].item()
            for i in range(4)
            for w in range(LONGEST)
            if spans[row, i, w] > -math.inf
        }
        expected = by_hand(row)
        assert found.keys() == expected.keys()
        assert all(math.isclose(found[key], expected[key], abs_tol=1e-6) for key in found)


def test_one_softmax_runs_over_all_passages_of_a_question() -> None:
    spans = span_scores(SCORES, IN_TEXT, LONGEST)
    total = sum(math.exp(score) for row in range(2) for score in by_hand(row).values())
    assert math.isclose(log_normaliser(spans, torch.tensor([0, 0]), 1).item(), math.log(total), rel_tol=1e-6)


def test_the_loss_is_minus_log_of_the_probability_of_all_right_spans() -> None:
    gold = torch.tensor([[0, 2, 3], [0, 1, 1], [1, 0, 0]])  # question 0: two spans; question 1: no answer
    zeros = torch.zeros(2, 4, dtype=torch.long)
    batch = SpanBatch(zeros, zeros, zeros, IN_TEXT, torch.tensor([0, 1]), gold)
    losses = []
    for row, right in ((0, [(2, 3), (1, 1)]), (1, [(0, 0)])):
        spans = by_hand(row)
        total = sum(map(math.exp, spans.values()))
        losses.append(-math.log(sum(math.exp(spans[key]) for key in right) / total))
    loss = marginal_loss(span_scores(SCORES, IN_TEXT, LONGEST), batch)
    assert math.isclose(loss.item(), sum(losses) / 2, rel_tol=1e-5)


def test_the_loss_has_finite_gradients_beside_forbidden_spans() -> None:
    scores = SCORES.clone().requires_grad_()
    zeros = torch.zeros(2, 4, dtype=torch.long)
    batch = SpanBatch(zeros, zeros, zeros, IN_TEXT, torch.tensor([0, 0]), torch.tensor([[0, 2, 2]]))
    marginal_loss(span_scores(scores, IN_TEXT, LONGEST), batch).backward()
    assert scores.grad is not None and torch.isfinite(scores.grad).all()
    assert scores.grad[1, 2:].abs().sum() == 0  # outside the text nothing is learned


def test_scores_of_any_size_stay_finite() -> None:
    spans = span_scores(SCORES * 1e4, IN_TEXT, LONGEST)
    assert torch.isfinite(log_normaliser(spans, torch.tensor([0, 1]), 2)).all()
