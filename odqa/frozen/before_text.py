"""Word vectors directly before the text, for methods that make them: how they get in, and why nobody sees them.

They stand between padding and text. Rows of a batch may have different vectors, and different numbers of them: shorter
ones are padded on their left, and the mask hides that. Positions: see `odqa.frozen.prompt_tuning`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from odqa.frozen.backbone import SOURCE_MASK, Backbone, takes
from odqa.frozen.layout import insert, remove, text_positions, text_start
from odqa.frozen.words import check_room

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Words:
    """Word vectors (B, P, D) of a batch; `shown` (B, P), 1 for those that are there, the last ones of each row."""

    vectors: torch.Tensor
    shown: torch.Tensor


@dataclass(frozen=True, slots=True)
class Given:
    """What a model is called with: token ids (B, T), None where it is given word vectors; mask (B, T), 1 for text."""

    ids: torch.Tensor | None
    mask: torch.Tensor


class BeforeText:
    """Puts `words(B)`, always P of them, before the text of whoever calls the model, until `remove`.

    `of_text` makes the vectors (B, P, D) from what the model is called with, in the place of those of `words`.
    """

    def __init__(
        self,
        backbone: Backbone,
        kind: str,
        length: int,
        words: Callable[[int], Words],
        of_text: Callable[[Given], torch.Tensor] | None = None,
    ) -> None:
        self.backbone, self.kind, self.length, self.words, self.of_text = backbone, kind, length, words, of_text
        self._is_aside = False
        model = backbone.model
        self._is_causal = backbone.architecture == "causal"
        reader = model.get_encoder() if backbone.architecture == "seq2seq" else model
        self._gives_positions = takes(reader, "position_ids")
        self._handles = [reader.register_forward_pre_hook(self._add, with_kwargs=True)]
        if backbone.architecture == "seq2seq":
            self._handles.append(reader.register_forward_hook(_tell_mask, with_kwargs=True))
            self._handles.append(model.register_forward_pre_hook(self._widen_source, with_kwargs=True))
        else:
            self._handles.append(model.register_forward_hook(self._hide, with_kwargs=True))

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Whoever calls the model inside the block calls it as it is: `of_text` may."""
        self._is_aside = True
        try:
            yield
        finally:
            self._is_aside = False

    def _add(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        if self._is_aside:
            return args, kwargs
        kwargs = {**dict(zip(("input_ids",), args, strict=False)), **kwargs}
        if has_text(kwargs.get("past_key_values")):
            return (), self._go_on(kwargs)
        vectors, ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids")
        vectors = self.backbone.embed(kwargs.pop("input_ids")) if vectors is None else vectors  # (B, T, D)
        batch, width = vectors.shape[:2]
        if self._is_causal:
            check_room(self.backbone, self.kind, self.length, width)
        words = self.words(batch)
        mask = kwargs.get("attention_mask")
        text = vectors.new_ones(batch, width, dtype=torch.long) if mask is None else mask
        start = text_start(text)
        if text.shape[1] == width + self.length:  # widened by `_widen_source`
            start = self._start(text, words.shown)
            text = remove(text, start, self.length)
        elif mask is not None or not words.shown.all():
            kwargs["attention_mask"] = insert(text, start, words.shown.to(text))
        own = words.vectors if self.of_text is None else self.of_text(Given(ids, text))
        kwargs["inputs_embeds"] = insert(vectors, start, own.to(vectors.dtype))
        if self._gives_positions:
            given = kwargs.get("position_ids")
            places = text_positions(text) if given is None else given.expand(batch, -1)
            kwargs["position_ids"] = positions_with(self.backbone, places, start, words.shown)
        if (types := kwargs.get("token_type_ids")) is not None:
            kwargs["token_type_ids"] = insert(types, start, types.new_zeros(batch, self.length))
        return (), kwargs

    def _hide(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._is_aside:
            return output
        vectors, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        for name in ("logits", "last_hidden_state"):
            values = output.get(name)
            if values is not None and vectors is not None and values.shape[1] == vectors.shape[1]:
                wide = vectors.new_ones(vectors.shape[:2]) if mask is None else mask
                output[name] = remove(values, self._start(wide, self.words(len(wide)).shown), self.length)
        return output

    def _widen_source(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        mask, encoded = kwargs.get("attention_mask"), kwargs.get("encoder_outputs")
        if mask is not None and (encoded is None or encoded[0].shape[1] != mask.shape[1]):
            kwargs = {**kwargs, "attention_mask": self._widen(mask)}
        return args, kwargs

    def _go_on(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A later step of generation: the cache has the vectors, mask and positions do not know of them yet."""
        changed = dict(kwargs)
        if (mask := kwargs.get("attention_mask")) is not None:
            changed["attention_mask"] = self._widen(mask)
        if (positions := kwargs.get("position_ids")) is not None:
            changed["position_ids"] = positions + self.words(len(positions)).shown.sum(1, keepdim=True)
        return changed

    def _widen(self, mask: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, P + T), ones where the vectors are."""
        return insert(mask, text_start(mask), self.words(len(mask)).shown.to(mask))

    def _start(self, wide: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        """(B, P + T) mask with the vectors in it -> (B,) where each row's P vectors begin, its pads first."""
        return text_start(wide) - self.length + shown.sum(1)


def positions_with(backbone: Backbone, places: torch.Tensor, start: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """The text's positions (B, T) -> those of vectors and text (B, P + T)."""
    if backbone.architecture == "causal":
        return insert(places + shown.sum(1, keepdim=True), start, text_positions(shown))
    length = shown.shape[1]
    last = max(backbone.window or length, length)
    own = torch.arange(last - length, last, device=places.device)
    return insert(places, start, own.expand(len(places), -1))


def _tell_mask(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if (mask := kwargs.get("attention_mask")) is not None and hasattr(output, "last_hidden_state"):
        setattr(output, SOURCE_MASK, mask)


def has_text(cache: Any) -> bool:
    """Whether a call goes on from a text that the model has read."""
    return cache is not None and int(cache.get_seq_length()) > 0
