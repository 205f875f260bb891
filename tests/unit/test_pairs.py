"""The losses of a re-ranker, against plain loops."""

import math

import pytest
import torch

from odqa.frozen.pairs import PairHead, distillation_loss, listwise_loss, pointwise_loss

SCORES = [1.0, -0.5, 0.3, 2.0, 0.1, -1.0]
GROUP = torch.tensor([0, 0, 0, 1, 1, 1])
POSITIVE = torch.tensor([True, False, False, True, True, False])


def test_listwise_compares_each_positive_with_the_negatives_alone() -> None:
    def against(positive: int, negatives: list[int]) -> float:
        return -math.log(
            math.exp(SCORES[positive])
            / (math.exp(SCORES[positive]) + sum(math.exp(SCORES[negative]) for negative in negatives))
        )

    expected = (against(0, [1, 2]) + (against(3, [5]) + against(4, [5])) / 2) / 2
    loss = listwise_loss(torch.tensor(SCORES), GROUP, POSITIVE)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_listwise_with_one_positive_is_cross_entropy() -> None:
    scores = torch.tensor([SCORES[:3]])
    loss = listwise_loss(scores[0], torch.zeros(3, dtype=torch.long), torch.tensor([True, False, False]))
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(scores, torch.tensor([0])).item())


def test_a_question_without_negatives_adds_nothing_and_leaves_gradients_finite() -> None:
    scores = torch.tensor(SCORES, requires_grad=True)
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    loss = listwise_loss(scores, group, torch.tensor([True, False, False, True, True, True]))
    only = listwise_loss(torch.tensor(SCORES[:3]), GROUP[:3], POSITIVE[:3])
    assert loss.item() == pytest.approx(only.item() / 2)
    loss.backward()
    assert scores.grad is not None and scores.grad.isfinite().all()
    assert scores.grad[3:].abs().sum() == 0 and (scores.grad[:3] != 0).all()


def test_pointwise_weighs_both_classes_alike() -> None:
    few = torch.tensor([True, False, False, False])
    scores = torch.zeros(4, requires_grad=True)
    pointwise_loss(scores, few).backward()
    assert scores.grad is not None and scores.grad[0].item() == pytest.approx(-3 * scores.grad[1].item())
    sure = pointwise_loss(torch.tensor([9.0, -9.0, -9.0, -9.0]), few)
    assert sure.item() < 1e-3 < pointwise_loss(torch.tensor([-9.0, 9.0, 9.0, 9.0]), few).item()


def test_distillation_is_smallest_where_the_student_ranks_as_the_teacher() -> None:
    teacher = torch.tensor([2.0, 0.0, -2.0, 1.0, float("nan"), 0.0])

    def at(scores: list[float]) -> float:
        return distillation_loss(torch.tensor(scores), teacher, GROUP, 2.0).item()

    perfect = at([1.0, 0.0, -1.0, 0.5, 7.0, 0.0])  # the teacher's at temperature 2; what it does not know is free
    entropy = -sum(
        p * math.log(p) for values in ([1.0, 0.0, -1.0], [0.5, 0.0]) for p in torch.tensor(values).softmax(0).tolist()
    )
    assert perfect == pytest.approx(entropy / 2, rel=1e-5)
    assert at([-1.0, 0.0, 1.0, 0.0, 7.0, 0.5]) > perfect


def test_distillation_without_a_teacher_has_no_gradient() -> None:
    scores = torch.tensor(SCORES, requires_grad=True)
    loss = distillation_loss(scores, torch.full((6,), float("nan")), GROUP, 1.0)
    loss.backward()
    assert loss.item() == 0 and scores.grad is not None and not scores.grad.any()


def test_the_head_reads_the_first_state_in_float32() -> None:
    head = PairHead(4)
    states = torch.randn(3, 5, 4).bfloat16()
    scores = head(states)
    assert scores.dtype == torch.float32 and scores.shape == (3,)
    assert torch.allclose(scores, states[:, 0].float() @ head.weight + head.bias)
