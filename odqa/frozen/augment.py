"""What an augmenting model is, and how it is read: the states of its linked layers, step by step, with its own cache.

The model is frozen and its body alone is run, without the map to the vocabulary. Knows tensors and token ids.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from odqa.errors import ArtifactMismatch, DataError
from odqa.frozen.backbone import Backbone, layer_list, load_backbone, takes

Pairs = tuple[tuple[int, int], ...]
Reads = Literal["all", "source"]


@dataclass(frozen=True, slots=True)
class Augmenting:
    """A model m_A: by the name of its folder or on the hub, or loaded.

    `links` are pairs (layer of m_A, layer of the anchor), a number of links, or None; see `choose_links`. A causal
    model reads "all", what has been written too, or the "source" alone; an encoder reads the source (None: all that it
    can). `fingerprint` is what its weights must be, None: whatever they are.
    """

    model: "str | Backbone"
    architecture: Literal["causal", "encoder"] = "causal"
    links: "Sequence[Sequence[int]] | int | None" = None
    reads: Reads | None = None
    fingerprint: str | None = None

    def load(self, anchor: Backbone) -> Backbone:
        """The frozen model, on the anchor's device and in its type.

        Raises DataError for one with another tokenizer than the anchor's, ArtifactMismatch for other weights than the
        links were trained on.
        """
        if isinstance(self.model, Backbone):
            found = self.model
        else:
            dtype = str(anchor.model.dtype).removeprefix("torch.")
            found = load_backbone(self.model, self.architecture, device=str(anchor.device), dtype=dtype)
        if found.architecture not in ("causal", "encoder"):
            raise DataError(f"calm: {found.name} is an encoder-decoder; an augmenting model is causal or an encoder.")
        if found.model is anchor.model:
            raise DataError(f"calm: {found.name} cannot augment itself. Load it once more.")
        if self.fingerprint not in (None, found.fingerprint):
            raise ArtifactMismatch(
                f"calm: the links were trained with an augmenting model {str(self.fingerprint)[:8]}; {found.name} is "
                f"{found.fingerprint[:8]}. Use that model or train the links again."
            )
        _check_tokenizer(found, anchor)
        return found

    def reads_of(self, found: Backbone) -> Reads:
        """What the loaded model reads. Raises DataError for an encoder that is to read more than the source."""
        if found.architecture == "encoder" and self.reads == "all":
            raise DataError(
                f"calm: {found.name} is an encoder and reads the source alone: its states of early tokens would change "
                "with later ones. Remove reads."
            )
        return self.reads or ("all" if found.architecture == "causal" else "source")


def choose_links(given: "Sequence[Sequence[int]] | int | None", layers: int, anchor_layers: int) -> Pairs:
    """Pairs (a, b): the states behind layer a of m_A are read by those that layer b + 1 of the anchor is given.

    Layer 0 is what the first layer is given. None: every layers/4-th layer of m_A, so four links, or one a layer where
    there are fewer; a number: so many. They are spread evenly, the last one at m_A's last layer, the first one before
    the anchor's first layer (our choice: what is read late cannot be computed with). Raises DataError for pairs that
    are not there or are there twice.
    """
    if given is None or isinstance(given, int):
        count = min(4, layers) if given is None else given
        if not 1 <= count <= max(layers, anchor_layers):
            raise DataError(
                f"calm: {count} links between {layers} and {anchor_layers} layers; give from 1 to "
                f"{max(layers, anchor_layers)}."
            )
        return tuple((-(-(n + 1) * layers // count), n * anchor_layers // count) for n in range(count))
    pairs = [tuple(pair) for pair in given]
    for pair in pairs:
        if len(pair) != 2 or not (0 <= pair[0] <= layers and 0 <= pair[1] <= anchor_layers):
            raise DataError(
                f"calm: {list(pair)} is no link; give pairs of a layer of the augmenting model, 0 to {layers}, and one "
                f"of the anchor, 0 to {anchor_layers}."
            )
    if not pairs or len(set(pairs)) < len(pairs):
        raise DataError(f"calm: links are {[list(pair) for pair in pairs]}; give at least one, and each once.")
    return tuple((first, second) for first, second in pairs)


class ModelReader:
    """Reads a frozen model: the states (B, T, D) that its layers `wanted` give, 0 for what the first one is given."""

    def __init__(self, backbone: Backbone, wanted: Sequence[int]) -> None:
        self.backbone = backbone
        self._body = backbone.model.base_model
        self._layers = layer_list(backbone)
        self._wanted = sorted(set(wanted))
        self._takes_positions = takes(self._body, "position_ids")

    @torch.no_grad()
    def read(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any = None
    ) -> Mapping[int, torch.Tensor]:
        """States of `ids` (B, N) at `positions` (B, N), by layer; `mask` (B, T) is that of all tokens so far.

        Raises DataError for a text longer than the model's window.
        """
        window = self.backbone.window
        longest = int(mask.sum(1).max())
        if window is not None and longest > window:
            raise DataError(
                f"calm: a text of {longest} tokens does not fit the window of {window} tokens of the augmenting model "
                f"{self.backbone.name}. Shorten the text."
            )
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long()}
        if self._takes_positions:
            inputs["position_ids"] = positions
        if self.backbone.architecture == "causal":
            inputs |= {"past_key_values": cache, "use_cache": cache is not None}
        with self._watched() as seen:
            self._body(**inputs)
        return seen

    @contextmanager
    def _watched(self) -> Iterator[dict[int, torch.Tensor]]:
        seen: dict[int, torch.Tensor] = {}

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[0] = args[0] if args else kwargs["hidden_states"]

        def behind(number: int) -> Any:
            def note(_module: nn.Module, _args: Any, output: Any) -> None:
                seen[number] = output[0] if isinstance(output, tuple) else output

            return note

        handles = [
            self._layers[0].register_forward_pre_hook(before, with_kwargs=True)
            if number == 0
            else self._layers[number - 1].register_forward_hook(behind(number))
            for number in self._wanted
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def _check_tokenizer(found: Backbone, anchor: Backbone) -> None:
    if _tokenizer(found) != _tokenizer(anchor):
        raise DataError(
            f"calm: {found.name} has another tokenizer than {anchor.name}; both must read the same tokens. Train the "
            "augmenting model with the anchor's tokenizer."
        )
    rows = int(found.model.get_input_embeddings().weight.shape[0])
    if rows < len(anchor.tokenizer):
        raise DataError(
            f"calm: {found.name} has vectors for {rows} tokens; the tokenizer of {anchor.name} has "
            f"{len(anchor.tokenizer)}. Use a model made for it."
        )


def _tokenizer(backbone: Backbone) -> object:
    """What decides the ids of a text: not what is put around it, which the anchor's tokenizer does for both."""
    backend = getattr(backbone.tokenizer, "backend_tokenizer", None)
    if backend is None:
        return backbone.tokenizer.get_vocab()
    record = json.loads(backend.to_str())
    return [record.get(part) for part in ("added_tokens", "normalizer", "pre_tokenizer", "model")]
