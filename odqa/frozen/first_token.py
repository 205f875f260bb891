"""The last layer of a BERT for the first token alone, which is all that a [CLS] score reads.

The other tokens of the last layer give their keys and values, and nothing else of them is ever looked at. What is left
out are their queries, output maps and feed-forward parts: 10 of the 12 D x D products a token has in a layer whose
inner width is 4 D, so about 10 / (12 L) of all products of L layers. What is computed is the same, up to rounding.
"""

from typing import Any

import torch
from torch import nn


def keep_first_token(model: nn.Module) -> bool:
    """Let the BERT in `model` compute its last hidden state for the first token alone: (B, 1, D) and not (B, T, D).

    `model` is a `BertModel`, or a model that holds one and reads nothing but its first token, as a
    `BertForSequenceClassification` does. Returns whether it was one; any other model is left as it is.
    """
    from transformers import BertForSequenceClassification, BertModel

    bert: Any = model.bert if type(model) is BertForSequenceClassification else model
    if type(bert) is not BertModel or bert.config.is_decoder:
        return False
    layers = bert.encoder.layer
    if len(layers) and not isinstance(layers[-1], FirstTokenLayer):
        layers[-1] = FirstTokenLayer(layers[-1])
    return True


class FirstTokenLayer(nn.Module):
    """A `BertLayer` with the same weights whose output is that of the first token, (B, 1, D)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *_unused: Any, **_options: Any
    ) -> torch.Tensor:
        """(B, T, D) -> (B, 1, D). `attention_mask`: (B, 1, T or 1, T), bool or added to the logits; None: no pads."""
        attention = self.layer.attention.self
        first = hidden_states[:, :1]

        def heads(states: torch.Tensor) -> torch.Tensor:
            split = states.view(*states.shape[:2], -1, attention.attention_head_size)
            return split.transpose(1, 2)  # (B, H, T, D/H)

        context = nn.functional.scaled_dot_product_attention(
            heads(attention.query(first)),
            heads(attention.key(hidden_states)),
            heads(attention.value(hidden_states)),
            attn_mask=None if attention_mask is None else attention_mask[:, :, :1],
        )
        attended = self.layer.attention.output(context.transpose(1, 2).flatten(2), first)
        states: torch.Tensor = self.layer.feed_forward_chunk(attended)
        return states
