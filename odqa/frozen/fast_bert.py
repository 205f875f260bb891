"""A BERT that scores by its first token, made fast: only that token in the last layer, and linear maps in bfloat16.

The last layer. Its other tokens give their keys and values, and nothing else of them is ever looked at. What is left
out are their queries, output maps and feed-forward parts: 10 of the 12 D x D products a token has in a layer whose
inner width is 4 D, so about 10 / (12 L) of all products of L layers. What is computed is the same, up to rounding.

The number format. Nearly all the time goes into linear maps, and nearly all that a small format spoils happens between
them, where a state is summed up over the layers. So the maps compute in bfloat16, sums and normalisations in float32:
as fast as a model that is bfloat16 throughout, and the error of a score is a third smaller (docs/LOG.md).
"""

from typing import Any

import torch
from torch import nn


def speed_up(model: nn.Module, dtype: torch.dtype) -> bool:
    """Make the BERT in `model` fast and keep all of it in float32 but its layers' linear maps, which get `dtype`.

    Its last hidden state is then that of the first token alone: (B, 1, D) and not (B, T, D). `model` is a `BertModel`,
    or one that reads nothing but the first token, as a `BertForSequenceClassification` does; it must be in float32.
    Returns whether it was one; any other model is left as it is.
    """
    from transformers import BertForSequenceClassification, BertModel

    bert: Any = model.bert if type(model) is BertForSequenceClassification else model
    if type(bert) is not BertModel or bert.config.is_decoder:
        return False
    layers = bert.encoder.layer
    if len(layers) and not isinstance(layers[-1], FirstTokenLayer):
        layers[-1] = FirstTokenLayer(layers[-1])
    if dtype != torch.float32:
        for linear in (module for module in layers.modules() if isinstance(module, nn.Linear)):
            linear.to(dtype)
            linear.register_forward_pre_hook(lambda map_, args: (args[0].to(map_.weight.dtype),))
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
