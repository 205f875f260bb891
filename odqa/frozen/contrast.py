"""The loss that trains a bi-encoder, and the gradient cache that lets its batch be large. Knows tensors only.

A batch has B questions and U different passages: the right one of each question, and those that were taken for it.
Every passage is a negative of every question, unless it is left out for it.

    s_ij = q_i . p_j / temperature
    loss = mean over i of -log( exp s_i,own(i) / sum over j that are not left out for i of exp s_ij )

Source: Karpukhin et al. 2020 (arXiv 2004.04906), section 3.2, who have temperature 1 and leave nothing out.

The gradient cache (Gao et al. 2021, arXiv 2101.06983): the loss needs the vectors of the whole batch, but the gradient
of a vector is all that its encoder needs of the loss. So texts are encoded in parts without keeping anything but the
vectors; the loss gives the gradients of these; and each part is encoded once more, now to pass its gradients on. That
is what checkpointing a part does (`torch.utils.checkpoint`), with the random state and the number format of the first
time. Memory is that of one part, whatever B is; the price is one more forward pass.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Inputs = Mapping[str, torch.Tensor]


@dataclass(slots=True)
class Texts:
    """N texts in parts of similar length: part i, what the encoder takes, holds the texts `rows[i]`."""

    parts: Sequence[Inputs]
    rows: Sequence[torch.Tensor]


@dataclass(slots=True)
class ContrastBatch:
    """B questions and U passages, each as texts to encode or as vectors that are known: (B, D), (U, D) float32.

    `own` (B,) is the column of each question's right passage; `left_out` (B, U) says which passages are no negatives of
    a question. The right one never is left out.
    """

    questions: Texts | torch.Tensor
    passages: Texts | torch.Tensor
    own: torch.Tensor
    left_out: torch.Tensor


def in_batch_loss(
    questions: torch.Tensor,
    passages: torch.Tensor,
    own: torch.Tensor,
    left_out: torch.Tensor,
    *,
    temperature: float,
) -> torch.Tensor:
    """Mean over questions, in nats: (B, D) and (U, D) vectors -> a scalar. Computed in float32 under autocast, too.

    In bfloat16 a cosine of 0.5 is known to 0.002, which a temperature of 0.05 makes 0.04 nats.
    """
    with torch.autocast(questions.device.type, enabled=False):
        scores = questions.float() @ passages.float().T / temperature  # (B, U)
        return nn.functional.cross_entropy(scores.masked_fill(left_out, float("-inf")), own)


def encode_texts(encode: Callable[[Inputs], torch.Tensor], texts: Texts, *, cache: bool) -> torch.Tensor:
    """(N, D) vectors, row i for text i, part by part; with `cache` nothing of a part is kept but its vectors."""
    parts = [checkpoint(encode, part, use_reentrant=False) if cache else encode(part) for part in texts.parts]
    vectors = torch.cat(parts)
    return torch.empty_like(vectors).index_copy(0, torch.cat(list(texts.rows)).to(vectors.device), vectors)
