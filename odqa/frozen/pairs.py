"""A relevance head over a frozen encoder, and the losses that train it. Knows tensors only.

A pair of question and passage is one row; its score is linear in the encoder's [CLS] state. N rows of G questions are
scored together: `group` (N,) says whose row it is, `positive` (N,) whether its passage answers.

    listwise    -log( exp s_p / (exp s_p + sum over negatives of exp s_n) )       a positive against all negatives
    pointwise   binary cross-entropy of every row (Nogueira & Cho 2019, arXiv 1901.04085)
    distilled   cross-entropy from softmax(teacher / t) to softmax(s) over the rows of a question (Hinton et al. 2015)

With several positives each is compared with the negatives alone, never with another positive; the mean counts a
question once. Listwise: Gao et al. 2021 (arXiv 2101.08751), eq. 2, "localized contrastive estimation".
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from odqa.frozen.rows import RowInputs
from odqa.frozen.spans import group_logsumexp

Loss = Literal["listwise", "pointwise"]


class PairHead(nn.Module):
    """One score a row from its [CLS] state."""

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.empty(width).normal_(0.0, 0.02, generator=generator))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(R, T, D) encoder states of any float type -> (R,) scores in float32; a row's does not depend on the others.

        A matrix product would add up a row in an order that depends on how many rows there are.
        """
        return (states[:, 0].float() * self.weight).sum(-1) + self.bias


@dataclass(slots=True)
class PairBatch:
    """N rows of G questions, in parts of similar length: part i holds the rows `rows[i]`.

    `group`, `positive`: (N,). `teacher`: (N,) scores of another re-ranker, NaN where there is none.
    """

    parts: list[RowInputs]
    rows: list[torch.Tensor]
    group: torch.Tensor
    positive: torch.Tensor
    teacher: torch.Tensor

    def to(self, device: torch.device) -> "PairBatch":
        parts, rows = [part.to(device) for part in self.parts], [rows.to(device) for rows in self.rows]
        return PairBatch(parts, rows, self.group.to(device), self.positive.to(device), self.teacher.to(device))


def listwise_loss(scores: torch.Tensor, group: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """Mean over questions, in nats. A question without a positive or without a negative adds nothing."""
    groups = int(group.max()) + 1
    against = group_logsumexp(scores[~positive], group[~positive], groups)  # (G,), -inf without negatives
    own = group[positive]
    losses = nn.functional.softplus(against[own] - scores[positive])
    count = torch.bincount(own, minlength=groups).clamp(min=1)
    return (losses / count[own]).sum() / groups


def pointwise_loss(scores: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """Mean over rows, in nats; positives weigh as much together as negatives do."""
    share = positive.float().mean().clamp(1e-6, 1 - 1e-6)
    weights = torch.where(positive, 0.5 / share, 0.5 / (1 - share))
    return nn.functional.binary_cross_entropy_with_logits(scores, positive.float(), weights)


def distillation_loss(
    scores: torch.Tensor, teacher: torch.Tensor, group: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Mean over questions of the cross-entropy from teacher to student, in nats, over rows that have a teacher."""
    known = ~teacher.isnan()
    scores, teacher, group = scores[known], teacher[known] / temperature, group[known]
    if not len(group):
        return scores.sum()  # zero, with a gradient of zero
    groups = int(group.max()) + 1
    log_student = scores - group_logsumexp(scores, group, groups)[group]
    target = (teacher - group_logsumexp(teacher, group, groups)[group]).exp()
    asked = int((torch.bincount(group) > 0).sum())
    loss: torch.Tensor = -(target * log_student).sum() / asked
    return loss
