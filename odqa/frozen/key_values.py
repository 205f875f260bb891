"""What methods have in common that put learned keys and values before the text in every layer.

A side is a stack of attentions: "self" in encoders and causal models; "encoder", "decoder" (its self-attention) and
"cross" (its attention to the source) in encoder-decoders. Each side has L layers and vectors of its own. How they reach
the layers: `odqa.frozen.attention`.

Positions. In a causal model the text goes on at position P, as behind any text of P tokens, and as in the code of Li &
Liang and in PEFT. In encoders and encoder-decoders it stays where it is without the vectors (our choice, for BERT,
whose positions end at 512), and so do distances in T5.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from odqa.errors import DataError
from odqa.frozen.attention import Attached, GivesVectors, Site, Vectors, keys_and_values, sites
from odqa.frozen.backbone import Backbone, takes
from odqa.frozen.layout import text_positions
from odqa.frozen.method import Method
from odqa.frozen.words import check_room


class KeyValueMethod(Method):
    """Installs `layer_vectors` in every attention of the chosen `sides` (those that the backbone does not have count
    nothing)."""

    def _choose_sides(self, backbone: Backbone, sides: Sequence[str]) -> None:
        self.sites = {side: found for side, found in sites(backbone).items() if side in sides}
        self._attached: list[Attached] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def length(self) -> int:
        """P."""
        return int(self.settings["length"])

    def virtual_tokens(self, backbone: Backbone) -> int:
        return self.length if backbone.architecture == "causal" else 0

    @abstractmethod
    def layer_vectors(self, side: str, layer: int) -> torch.Tensor:
        """Keys and values of one layer: (2, heads, P, head width)."""

    def side_vectors(self, side: str) -> torch.Tensor:
        """Those of all layers: (2, L, heads, P, head width)."""
        return torch.stack([self.layer_vectors(side, layer) for layer in range(len(self.sites[side]))], dim=1)

    def _install(self, backbone: Backbone) -> None:
        def vectors(side: str, layer: int) -> GivesVectors:
            def of_all_rows() -> Vectors:
                return Vectors(*self.layer_vectors(side, layer).to(backbone.model.dtype).unsqueeze(1))

            return of_all_rows

        places = {
            site.name: vectors(side, layer) for side, found in self.sites.items() for layer, site in enumerate(found)
        }
        self._attached.append(Attached(backbone.model, places))
        if backbone.architecture == "causal" and takes(backbone.model, "position_ids"):
            self._handles.append(backbone.model.register_forward_pre_hook(self._move_text(backbone), with_kwargs=True))

    def _remove(self, backbone: Backbone) -> None:
        self._attached.pop().remove()
        while self._handles:
            self._handles.pop().remove()

    def _move_text(self, backbone: Backbone) -> Any:
        def move(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            width, positions = text_of_call(args, kwargs)
            check_room(backbone, self.kind, self.length, width)
            return args, {**kwargs, "position_ids": positions + self.length}

        return move


def text_of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, torch.Tensor]:
    """Of a call of a causal model: how many tokens it has then seen, pads too, and the positions (B, T) it is given.

    If it is given none, those that count text.
    """
    ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else (*args, kwargs.get("inputs_embeds"))[0]
    mask, cache, positions = (kwargs.get(name) for name in ("attention_mask", "past_key_values", "position_ids"))
    seen = 0 if cache is None else int(cache.get_seq_length())
    if positions is None:
        mask = ids.new_ones(len(ids), seen + ids.shape[1], dtype=torch.long) if mask is None else mask
        positions = text_positions(mask)[:, seen:]
    return seen + ids.shape[1], positions.expand(len(ids), -1)


def parameters_by_side(vectors: dict[str, torch.Tensor]) -> nn.Parameter | nn.ParameterDict:
    """One parameter where there is one stack of layers, else one a side."""
    parameters = {side: nn.Parameter(tensor) for side, tensor in vectors.items()}
    return parameters["self"] if list(parameters) == ["self"] else nn.ParameterDict(parameters)


def of_side(parameters: nn.Parameter | nn.ParameterDict, side: str) -> torch.Tensor:
    """A side's tensor out of `parameters_by_side`."""
    tensor: torch.Tensor = parameters[side] if isinstance(parameters, nn.ParameterDict) else parameters
    return tensor


def vectors_of_words(backbone: Backbone, found: dict[str, list[Site]], words: torch.Tensor) -> dict[str, torch.Tensor]:
    """The keys and values that the frozen backbone has for words: by side (2, L, heads, P, head width).

    `words` are (P,) token ids, or (P, D) vectors. Raises DataError for a backbone whose layers have keys of different
    shapes.
    """
    known = keys_and_values(backbone, words)
    vectors = {}
    for side, places in found.items():
        if len({(site.heads, site.head_width) for site in places}) > 1:
            raise DataError(f"{backbone.name}: the keys of its {side} layers differ in shape, which is not supported.")
        vectors[side] = torch.stack([known[site.name] for site in places], dim=1).contiguous()
    return vectors
