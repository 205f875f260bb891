"""A span head over a frozen encoder, and one distribution over all spans of all passages of a question.

Every passage is encoded apart, with the question. A span (i, j) of a passage scores s_i + e_j, with i <= j < i + W; the
span at [CLS] means "no answer here". ONE softmax runs over the spans of all passages of a question together, so that
passages compete (shared normalisation, Clark & Gardner 2018, arXiv 1710.10723); the loss is the negative log of the
probability of all right spans together (their eq. 2). Knows tensors only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


class SpanHead(nn.Module):
    """Two scores a token from its encoder state: how well an answer starts here, and ends here."""

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.empty(2, width).normal_(0.0, 0.02, generator=generator))
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(R, T, D) encoder states of any float type -> (R, T, 2) scores in float32."""
        return states.float() @ self.weight.T + self.bias


@dataclass(slots=True)
class SpanBatch:
    """R passage rows of G questions, padded to T tokens.

    `input_ids`, `attention_mask`, `token_type_ids`: (R, T). `in_text`: (R, T), True where a token belongs to the
    passage's text (an answer may not start in the question or the title). `question`: (R,), which of the G questions a
    row is of, rising. `gold`: (N, 3) right spans as row, first token, last token; (row, 0, 0) is "no answer".
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_type_ids: torch.Tensor
    in_text: torch.Tensor
    question: torch.Tensor
    gold: torch.Tensor

    def to(self, device: torch.device) -> "SpanBatch":
        return SpanBatch(*(getattr(self, name).to(device) for name in self.__slots__))


def span_scores(scores: torch.Tensor, in_text: torch.Tensor, longest: int) -> torch.Tensor:
    """Scores of all spans of at most `longest` tokens: (R, T, 2), (R, T) -> (R, T, longest), -inf where no span may be.

    Entry [r, i, w] is the span from token i to token i + w. Entry [r, 0, 0] is "no answer".
    """
    start, end = scores.unbind(-1)
    ends = nn.functional.pad(end, (0, longest - 1)).unfold(1, longest, 1)  # (R, T, longest): e_{i+w}
    allowed_end = nn.functional.pad(in_text, (0, longest - 1)).unfold(1, longest, 1)
    spans = (start.unsqueeze(-1) + ends).masked_fill(~(in_text.unsqueeze(-1) & allowed_end), float("-inf"))
    no_answer = torch.zeros_like(spans, dtype=torch.bool)
    no_answer[:, 0, 0] = True
    return torch.where(no_answer, (start[:, :1] + end[:, :1]).unsqueeze(-1), spans)


def log_normaliser(spans: torch.Tensor, question: torch.Tensor, questions: int) -> torch.Tensor:
    """Log of the sum over all spans of all rows of each question: (R, T, W), (R,) -> (G,)."""
    per_row = spans.flatten(1).logsumexp(1)
    return group_logsumexp(per_row, question, questions)


def marginal_loss(spans: torch.Tensor, batch: SpanBatch) -> torch.Tensor:
    """Mean over questions of -log P(any right span), in nats. Every question must have a right span in `gold`."""
    questions = int(batch.question[-1]) + 1
    row, first, last = batch.gold.unbind(1)
    right = spans[row, first, last - first]  # (N,)
    log_right = group_logsumexp(right, batch.question[row], questions)
    return (log_normaliser(spans, batch.question, questions) - log_right).mean()


@dataclass(slots=True)
class RowTerms:
    """Log-sums of R rows: over all spans of a row (`spans`), over its right ones (`right`, -inf if there is none), and
    the score of its "no answer" (`none`). (R,) each."""

    spans: torch.Tensor
    right: torch.Tensor
    none: torch.Tensor

    @classmethod
    def join(cls, parts: Sequence["RowTerms"]) -> "RowTerms":
        """The rows of all parts, one part after the other."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__slots__))


def row_terms(spans: torch.Tensor, gold: torch.Tensor) -> RowTerms:
    """From (R, T, W) span scores and (N, 3) right spans; gold entries for "no answer" are not needed here."""
    none = spans[:, 0, 0]
    is_none = torch.zeros_like(spans[0], dtype=torch.bool)
    is_none[0, 0] = True
    answers = spans.masked_fill(is_none, float("-inf"))
    row, first, last = gold.unbind(1)
    right = group_logsumexp(answers[row, first, last - first], row, len(spans))
    return RowTerms(answers.flatten(1).logsumexp(1), right, none)


def row_loss(terms: RowTerms, question: torch.Tensor, none_weight: float = 0.5) -> torch.Tensor:
    """The loss when "no answer" belongs to a row, not to the question, in nats.

    Passages compete with their spans alone (shared normalisation, over questions that have a right span); beside it
    every row learns whether it holds the answer: the softmax of its own spans and its "no answer" (Devlin et al. 2019,
    arXiv 1810.04805, section 4.3), weighted by `none_weight` (our choice).
    """
    questions = int(question.max()) + 1
    right = group_logsumexp(terms.right, question, questions)
    answerable = right.isfinite()
    shared = (group_logsumexp(terms.spans, question, questions) - right)[answerable].sum() / questions
    target = torch.where(terms.right.isfinite(), terms.right, terms.none)
    return shared + none_weight * (torch.logaddexp(terms.spans, terms.none) - target).mean()


def group_logsumexp(values: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    """logsumexp of the values of each group: (N,), (N,) -> (groups,), -inf for a group that has none.

    Differentiable, stable for any values; those of -inf count nothing and get no gradient.
    """
    highest = torch.full((groups,), float("-inf"), dtype=values.dtype, device=values.device)
    highest = highest.scatter_reduce(0, group, values.detach(), "amax")
    shift = torch.where(highest.isfinite(), highest, torch.zeros_like(highest))
    total = torch.zeros(groups, dtype=values.dtype, device=values.device)
    total = total.index_add(0, group, (values - shift[group]).exp())
    return highest + total.clamp_min(torch.finfo(values.dtype).tiny).log()
