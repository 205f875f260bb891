"""The distribution over spans: against plain loops, and its loss."""

import itertools
import math

import torch

from odqa.frozen.spans import (
    RowTerms,
    SpanBatch,
    log_normaliser,
    marginal_loss,
    row_loss,
    row_terms,
    span_scores,
)

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


# --- "no answer" by row -----------------------------------------------------------------------------------------------


def test_the_row_loss_lets_spans_compete_over_passages_and_no_answer_within_its_own() -> None:
    """Question 0 has both rows, the answer stands in row 0 twice."""
    terms = row_terms(span_scores(SCORES, IN_TEXT, LONGEST), torch.tensor([[0, 2, 3], [0, 1, 1]]))
    own = [{key: math.exp(score) for key, score in by_hand(row).items()} for row in range(2)]
    spans = [sum(p for key, p in row.items() if key != (0, 0)) for row in own]
    right = own[0][2, 3] + own[0][1, 1]
    shared = -math.log(right / (spans[0] + spans[1]))
    rows = (-math.log(right / (spans[0] + own[0][0, 0])) - math.log(own[1][0, 0] / (spans[1] + own[1][0, 0]))) / 2
    loss = row_loss(terms, torch.tensor([0, 0]), none_weight=0.7)
    assert math.isclose(loss.item(), shared + 0.7 * rows, rel_tol=1e-5)


def test_a_context_without_an_answer_teaches_no_answer_alone() -> None:
    scores = SCORES.clone().requires_grad_()
    terms = row_terms(span_scores(scores, IN_TEXT, LONGEST), torch.empty(0, 3, dtype=torch.long))
    loss = row_loss(terms, torch.tensor([0, 1]))
    loss.backward()
    assert scores.grad is not None and scores.grad.isfinite().all()
    assert (scores.grad[:, 0] < 0).all() and (scores.grad[0, 1:] > 0).all()  # "no answer" up, spans down


def test_rows_of_several_parts_are_one_batch() -> None:
    spans, gold = span_scores(SCORES, IN_TEXT, LONGEST), torch.tensor([[0, 2, 3]])
    whole = row_terms(spans, gold)
    parts = RowTerms.join([row_terms(spans[:1], gold), row_terms(spans[1:], gold[:0])])
    question = torch.tensor([0, 0])
    assert math.isclose(row_loss(whole, question).item(), row_loss(parts, question).item(), rel_tol=1e-6)
