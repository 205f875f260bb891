"""Prefix tuning: learned keys and values in front of the text in every layer, made by a small network while training.

    K_l <- [P^k_l; K_l],  V_l <- [P^v_l; V_l]        P_i = W2 tanh(W1 e_i + b1) + b2,  e: (P, D)

Source: Li & Liang 2021 (arXiv 2101.00190), section 4.3 for the network, which is dropped after training: saved is P
alone, 2 * L * P * K values a side (K: width of all key heads together). A network of inner width M is trained with
P * D + (D + 1) * M + (M + 1) * 2 * L * K values a side; without one, what is saved is what is trained.

Encoder-decoders. The paper writes [PREFIX; x; PREFIX'; y]: a prefix for the encoder, one for the decoder. Its authors'
code (seq2seq/prefixTuning.py) has a third one, before the source in the decoder's cross-attention, each with a network
of its own; `cross` says whether ours has it. A bias by distance (T5) is 0 for a prefix (our choice). Positions: see
`odqa.frozen.key_values`.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import nn

from odqa.errors import DataError
from odqa.frozen.backbone import Backbone
from odqa.frozen.key_values import KeyValueMethod, of_side, parameters_by_side, vectors_of_words
from odqa.frozen.prompt_tuning import PromptTuning
from odqa.frozen.words import check_length, random_words, words_of


class PrefixTuning(KeyValueMethod):
    """`length` virtual positions a layer.

    `inner` is the network's inner width M (512 in the paper for table-to-text); None trains the prefix itself. A
    network starts at random, as torch's linear maps do and e as a standard normal (the authors' code); a prefix without
    one starts as the keys and values of real words ("vocabulary": random ones; "text": those of `text`), section 7.4.
    """

    kind: ClassVar[str] = "prefix-tuning"

    def __init__(
        self,
        backbone: Backbone,
        *,
        length: int,
        inner: int | None = 512,
        start: Literal["vocabulary", "text"] = "vocabulary",
        text: str | None = None,
        cross: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, length=length, inner=inner, start=start, text=text, cross=cross, seed=seed)
        check_length(backbone, self.kind, length)
        if start not in ("vocabulary", "text") or (start == "text") != (text is not None):
            raise DataError(
                f"prefix-tuning: start is {start!r}, text is {text!r}. Use start: vocabulary, or text with a text."
            )
        self._choose_sides(backbone, ("self", "encoder", "decoder", *(["cross"] if cross else [])))
        if inner is None:
            words = random_words(backbone, length, seed) if text is None else words_of(backbone, text, length)
            self.prompt = parameters_by_side(vectors_of_words(backbone, self.sites, words))
            return
        if text is not None:
            raise DataError("prefix-tuning: a network starts at random. Set inner: null to start from a text.")
        self.networks = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for side, found in self.sites.items():
                shape = len(found), found[0].heads, found[0].head_width
                self.networks[side] = PrefixNetwork(length, backbone.width, inner, shape)

    def layer_vectors(self, side: str, layer: int) -> torch.Tensor:
        if self.settings["inner"] is None:
            return of_side(self.prompt, side)[:, layer]
        network = self.networks[side]
        assert isinstance(network, PrefixNetwork)
        return network.layer(layer)

    @torch.no_grad()
    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """The prefix itself, without the network that made it."""
        if self.settings["inner"] is None:
            return super().saved_tensors()
        vectors = {side: self.side_vectors(side) for side in self.sites}
        return {"prompt" if side == "self" else f"prompt.{side}": tensor for side, tensor in vectors.items()}

    def saved_settings(self) -> dict[str, Any]:
        return {**self.settings, "inner": None}


@torch.no_grad()
def prefix_of_prompt(backbone: Backbone, prompt: PromptTuning) -> PrefixTuning:
    """The prefix that a causal model itself computes from a soft prompt: the same logits, at less cost.

    What comes first in a causal model does not depend on what follows, so the prompt's keys and values need to be
    computed once only, and not in every forward pass. Raises DataError for a model that is not causal.
    """
    if backbone.architecture != "causal":
        raise DataError(f"prefix-tuning: {backbone.name} is no causal model, so a soft prompt is no prefix of it.")
    prefix = PrefixTuning(backbone, length=prompt.length, inner=None)
    vectors = vectors_of_words(backbone, prefix.sites, prompt.prompt.to(backbone.device, backbone.model.dtype))
    of_side(prefix.prompt, "self").copy_(vectors["self"])
    return prefix


class PrefixNetwork(nn.Module):
    """W2 tanh(W1 e + b1) + b2 for `length` vectors e of `width`; `shape` of the prefix: layers, heads, head width."""

    def __init__(self, length: int, width: int, inner: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape
        self.vectors = nn.Parameter(torch.randn(length, width))
        self.hidden = nn.Linear(width, inner)
        self.out = nn.Linear(inner, 2 * shape[0] * shape[1] * shape[2])

    def layer(self, number: int) -> torch.Tensor:
        """(2, heads, P, head width) of one layer; only its part of the last map is computed."""
        layers, heads, width = self.shape
        weight = self.out.weight.view(2, layers, heads * width, -1)[:, number].flatten(0, 1)
        bias = self.out.bias.view(2, layers, heads * width)[:, number].flatten()
        vectors = nn.functional.linear(self.hidden(self.vectors).tanh(), weight, bias)  # (P, 2 * heads * width)
        return vectors.view(-1, 2, heads, width).permute(1, 2, 0, 3)
