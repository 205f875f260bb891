"""Keys and values that a method puts before those of the text, in any attention of any model of `transformers`.

    attention(Q, K, V)  ->  attention(Q, [P^k; K], [P^v; V])

The vectors are added where a layer calls its attention function, not through the key-value cache. So the cache holds
text alone and works as ever (beams, sampling, encoders that have none), and no pad stands between vectors and text. The
layers find the function under a name in their configuration; `Attached` changes that name and `remove` changes it back.

The same place shows which keys and values a frozen model has for a text, which is where deep prompts start.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from odqa.errors import DataError

if TYPE_CHECKING:
    from odqa.frozen.backbone import Backbone


_NAMES = {"eager": "odqa-eager", "sdpa": "odqa-sdpa"}  # transformers' names -> ours
_before: WeakKeyDictionary[nn.Module, "GivesVectors"] = WeakKeyDictionary()
_watchers: list[Callable[[nn.Module, torch.Tensor, torch.Tensor], None]] = []


@dataclass(frozen=True, slots=True)
class Site:
    """One attention: its module's name, and the shape of what it attends to: key heads and width of a head."""

    name: str
    heads: int
    head_width: int


class Shown:
    """Which of the vectors of R rows are there, (R, P) bool: makes an attention's mask of it and the text's.

    The layers of a model ask for the same mask one after the other, so the last one is kept.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self._last: tuple[torch.Tensor | None, tuple[int, int], torch.Tensor] | None = None

    def before(self, mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """(B, 1 or heads, 1 or queries, P + T), bool or added to logits as the text's `mask` is (None: all seen)."""
        size = len(key), key.shape[2]
        if self._last is not None and self._last[0] is mask and self._last[1] == size:
            return self._last[2]
        text = query.new_zeros(1, 1, 1, size[1]) if mask is None else mask
        visible = of_batch(self.rows, size[0])[:, None, None].expand(-1, *text.shape[1:3], -1)
        if text.dtype != torch.bool:
            lowest = torch.finfo(text.dtype).min
            visible = text.new_zeros(visible.shape).masked_fill(~visible, lowest)
        joined = torch.cat([visible, text.expand(size[0], -1, -1, -1)], dim=-1)
        self._last = mask, size, joined
        return joined


@dataclass(frozen=True, slots=True)
class Vectors:
    """Keys and values before the text of R rows: (R, heads, P, head width) each; `shown` None: all are there.

    A batch has R rows or a multiple k R: then each k neighbours (beams of a text) share a row's. With R = 1 all do.
    """

    keys: torch.Tensor
    values: torch.Tensor
    shown: Shown | None = None


GivesVectors = Callable[[], Vectors]


class Attached:
    """Vectors in the attentions of a model, until `remove`. `vectors` is by module name."""

    def __init__(self, model: nn.Module, vectors: dict[str, GivesVectors]) -> None:
        self._modules = [(model.get_submodule(name), given) for name, given in vectors.items()]
        if taken := [name for name in vectors if model.get_submodule(name) in _before]:
            raise RuntimeError(f"{taken[0]} has keys and values before its text already; detach the other method first")
        self._restore = _redirect(model)
        for module, given in self._modules:
            _before[module] = given

    def remove(self) -> None:
        for module, _ in self._modules:
            del _before[module]
        self._restore()


@torch.no_grad()
def sites(backbone: "Backbone") -> dict[str, list[Site]]:
    """All attentions in the order in which they run, by side: "self" (encoders, causal models), or "encoder", "decoder"
    (self-attention) and "cross"."""
    seen = _watch(backbone, {"input_ids": torch.zeros(1, 3, dtype=torch.long)}, torch.zeros(1, 2, dtype=torch.long))
    found: dict[str, list[Site]] = {}
    for name, (key, _) in seen.items():
        site = Site(name, key.shape[1], key.shape[3])
        if backbone.architecture != "seq2seq":
            side = "self"
        elif any(module is backbone.model.get_submodule(name) for module in backbone.model.get_encoder().modules()):
            side = "encoder"
        else:
            side = "cross" if key.shape[2] == 3 else "decoder"
        found.setdefault(side, []).append(site)
    return found


@torch.no_grad()
def keys_and_values(backbone: "Backbone", text: torch.Tensor) -> dict[str, torch.Tensor]:
    """Keys and values that the frozen model has for a text: by site name (2, heads, P, head width).

    `text` is (P,) token ids, or (P, D) word vectors. It has positions from 0 on; an encoder-decoder sees it on both
    sides (ids only).
    """
    inputs = {"inputs_embeds" if text.is_floating_point() else "input_ids": text[None]}
    seen = _watch(backbone, inputs, text[None])
    return {name: torch.stack([key[0], value[0]]).float().cpu() for name, (key, value) in seen.items()}


def _watch(
    backbone: "Backbone", text: dict[str, torch.Tensor], decoder_ids: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Run the model and note keys and values of every attention, (B, heads, T, head width) each."""
    names = {module: name for name, module in backbone.model.named_modules()}
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    inputs: dict[str, Any] = {name: tensor.to(backbone.device) for name, tensor in text.items()}
    for tensor in text.values():
        inputs["attention_mask"] = torch.ones(tensor.shape[:2], dtype=torch.long, device=backbone.device)
    if backbone.architecture != "encoder":
        inputs["use_cache"] = False
    if backbone.architecture == "seq2seq":
        inputs["decoder_input_ids"] = decoder_ids.to(backbone.device)
    restore = _redirect(backbone.model)
    with _watching(lambda module, key, value: seen.setdefault(names[module], (key, value))):
        try:
            backbone.model(**inputs)
        finally:
            restore()
    if not seen:
        raise DataError(
            f"{backbone.name}: {type(backbone.model).__name__} does not call its attention through transformers' "
            "attention interface, so no keys and values can be put before its text. Use prompt-tuning or lora."
        )
    return seen


@contextmanager
def _watching(watcher: Callable[[nn.Module, torch.Tensor, torch.Tensor], Any]) -> Iterator[None]:
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def _redirect(model: nn.Module) -> Callable[[], None]:
    """Let the attentions of a model call `_attend`; returns what undoes it. Nested calls are fine."""
    _register()
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    before = [(config, getattr(config, "_attn_implementation", None)) for config in configs.values()]
    for _, name in before:
        if name not in (None, *_NAMES, *_NAMES.values()):
            raise DataError(
                f"keys and values cannot be put before the text in attention {name!r}. Load the model with "
                f"attention: {' or '.join(_NAMES)}."
            )
    for config, name in before:
        config._attn_implementation_internal = _NAMES.get(str(name), name)

    def undo() -> None:
        for config, name in before:
            config._attn_implementation_internal = name

    return undo


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    masks = AttentionMaskInterface()
    for theirs, ours in _NAMES.items():
        AttentionInterface.register(ours, _attend_as(theirs))
        AttentionMaskInterface.register(ours, masks[theirs])


def _attend_as(name: str) -> Callable[..., Any]:
    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> Any:
        for watcher in _watchers:
            watcher(module, key, value)
        if module in _before:
            key, value, attention_mask = keys_before(module, query, key, value, attention_mask, options)
        return _own_function(module, name)(module, query, key, value, attention_mask, **options)

    return attend


def keys_before(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys, values and mask of an attention with the method's vectors before the text's, which every query sees.

    Text: (B, heads, T, head width) each. A bias by distance (T5) in `options` is 0 for the vectors, which have no
    position.
    """
    given = _before[module]()
    # Expanded before the cast: the gradients of the rows are summed in the vectors' own type.
    first_key, first_value = (of_batch(part, len(key)).to(key.dtype) for part in (given.keys, given.values))
    length, queries = first_key.shape[2], query.shape[2]
    is_causal = options.get("is_causal")
    if mask is None and queries > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        # "No mask" meant: query i sees the text's keys up to i.
        mask = torch.ones(queries, key.shape[2], dtype=torch.bool, device=key.device).tril()[None, None]
    if given.shown is not None:
        mask = given.shown.before(mask, query, key)
    elif mask is not None:
        seen = torch.ones if mask.dtype == torch.bool else torch.zeros
        mask = torch.cat([seen(*mask.shape[:-1], length, dtype=mask.dtype, device=mask.device), mask], dim=-1)
    if (bias := options.get("position_bias")) is not None:
        options["position_bias"] = nn.functional.pad(bias, (length, 0))
    return torch.cat([first_key, key], dim=2), torch.cat([first_value, value], dim=2), mask


def of_batch(given: torch.Tensor, batch: int) -> torch.Tensor:
    """What each row of a batch has of what R rows have, see `Vectors`: (R, ...) -> (B, ...).

    Raises ValueError for a batch that is no multiple of R.
    """
    rows = len(given)
    if batch % rows:
        raise ValueError(f"a batch of {batch} rows cannot be shared out among the {rows} rows that have vectors")
    if rows == 1:
        return given.expand(batch, *given.shape[1:])
    return given if rows == batch else given.repeat_interleave(batch // rows, dim=0)


def _own_function(module: nn.Module, name: str) -> Callable[..., Any]:
    """The attention function that the module would have called: models may bring their own."""
    for cls in type(module).__mro__:
        home = sys.modules[cls.__module__]
        if hasattr(home, "ALL_ATTENTION_FUNCTIONS"):
            own: Callable[..., Any] = home.ALL_ATTENTION_FUNCTIONS.get_interface(
                name, getattr(home, "eager_attention_forward", None)
            )
            return own
    raise DataError(f"attention {type(module).__name__} is not one of transformers' attention interface.")
