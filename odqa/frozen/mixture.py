"""Rows of one batch that are each computed with a method of their own: other vectors, other lengths, other ranks, none.

    prompts, prefixes    [P_r; text_r]                            padded on the left, masked, positions by own length
    LoRA                 W x_r + B_r A_r x_r                      batched products of stacked factors
    adapters             h_r + U_r gelu(D_r h_r + d_r) + u_r      the same
    their norms          w_r * normalised(h_r) + b_r

Ranks are padded with zeros, which add nothing. A soft prompt of a causal model is in here as the keys and values that
the model has for it (`odqa.frozen.prefix.prefix_of_prompt`). The invariant: a row gets what it gets alone, whatever its
neighbours are. Where the parts come from: `odqa.frozen.bank`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from odqa.errors import ArtifactError, DataError
from odqa.frozen.adapter import adapted_maps, layer_norms, normalised
from odqa.frozen.attention import Attached, GivesVectors, Shown, Site, Vectors, keys_and_values, of_batch, sites
from odqa.frozen.backbone import Backbone, takes
from odqa.frozen.before_text import BeforeText, Words
from odqa.frozen.key_values import text_of_call
from odqa.frozen.lora import map_shape, target_linears
from odqa.frozen.method import as_key, check_shapes

MIXABLE = ("prompt-tuning", "deep-prompt", "prefix-tuning", "lora", "adapter")

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a method puts into the model for one row, on the model's device and in its type.

    `words`: vectors before the text (P, D). By module name: `layers`, keys and values before the text, (P, 2, heads,
    head width); `updates`, LoRA's A (r, d_in) and, with the scale in it, B^T (r, d_out); `bottlenecks`, of an adapter
    W_down (r, D), b_down (r,), W_up^T (r, D), b_up (D,); `norms`, scale and perhaps shift, (D,) each. `moved`: by how
    many positions the text of a causal model moves on.
    """

    words: torch.Tensor | None = None
    layers: Tensors = field(default_factory=dict)
    updates: Mapping[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    bottlenecks: Mapping[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    norms: Mapping[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    moved: int = 0

    @property
    def bytes(self) -> int:
        """Memory that the tensors take."""
        by_module = [*self.updates.values(), *self.bottlenecks.values(), *self.norms.values()]
        tensors = [*self.layers.values(), *(tensor for group in by_module for tensor in group)]
        tensors += [] if self.words is None else [self.words]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


NOTHING = Parts()


class Workshop:
    """Makes `Parts` out of what methods save, for one backbone; what it has to find out about that, it asks once."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    @cached_property
    def sites(self) -> dict[str, list[Site]]:
        return sites(self.backbone)

    @cached_property
    def norms(self) -> dict[str, nn.Module]:
        return {name: norm.requires_grad_(False) for name, norm in layer_norms(self.backbone).items()}

    @torch.no_grad()
    def make(self, kind: str, settings: Mapping[str, Any], tensors: Tensors, where: str) -> Parts:
        """From a method's kind, settings and saved tensors; `where` is what an error names.

        Call it while no method is attached: the model is asked for the keys and values of soft prompts. Raises
        ArtifactError for a kind that rows cannot have each for itself, or tensors that are not those of the method.
        """
        make: dict[str, Callable[[Mapping[str, Any], Tensors, str], Parts]] = {
            "prompt-tuning": self._prompt,
            "deep-prompt": self._prefix,
            "prefix-tuning": self._prefix,
            "lora": self._lora,
            "adapter": self._adapter,
        }
        if kind not in make:
            raise ArtifactError(f"{where}: {kind} cannot be one row's own; {', '.join(MIXABLE)} can.")
        return make[kind](settings, tensors, where)

    def _prompt(self, settings: Mapping[str, Any], tensors: Tensors, where: str) -> Parts:
        length = int(settings["length"])
        check_shapes({"prompt": (length, self.backbone.width)}, tensors, where)
        words = self._placed(tensors["prompt"])
        if self.backbone.architecture != "causal":
            return Parts(words=words)
        known = keys_and_values(self.backbone, words)  # (2, heads, P, head width) each
        return Parts(layers={name: self._by_position(both) for name, both in known.items()}, moved=length)

    def _prefix(self, settings: Mapping[str, Any], tensors: Tensors, where: str) -> Parts:
        length = int(settings["length"])
        sides = {side: found for side, found in self.sites.items() if side != "cross" or settings.get("cross", False)}
        names = {side: "prompt" if side == "self" else f"prompt.{side}" for side in sides}
        shapes = {
            names[side]: (2, len(found), found[0].heads, length, found[0].head_width) for side, found in sides.items()
        }
        check_shapes(shapes, tensors, where)
        layers = {
            site.name: self._by_position(tensors[names[side]][:, layer])
            for side, found in sides.items()
            for layer, site in enumerate(found)
        }
        return Parts(layers=layers, moved=length if self.backbone.architecture == "causal" else 0)

    def _lora(self, settings: Mapping[str, Any], tensors: Tensors, where: str) -> Parts:
        rank, scale = int(settings["rank"]), settings["alpha"] / settings["rank"]
        maps = target_linears(self.backbone, settings["targets"])
        shapes: dict[str, tuple[int, ...]] = {}
        for name, linear in maps.items():
            d_out, d_in = map_shape(linear)
            shapes |= {f"A.{as_key(name)}": (rank, d_in), f"B.{as_key(name)}": (d_out, rank)}
        check_shapes(shapes, tensors, where)
        return Parts(
            updates={
                name: (
                    self._placed(tensors[f"A.{as_key(name)}"]),
                    self._placed(tensors[f"B.{as_key(name)}"].float().T * scale),
                )
                for name in maps
            }
        )

    def _adapter(self, settings: Mapping[str, Any], tensors: Tensors, where: str) -> Parts:
        rank = int(settings["rank"])
        shapes: dict[str, tuple[int, ...]] = {}
        maps = adapted_maps(self.backbone, settings["targets"], cross=settings["cross"])
        for name, linear in maps.items():
            key, width = as_key(name), map_shape(linear)[0]
            shapes |= {f"down.{key}": (rank, width), f"down_bias.{key}": (rank,)}
            shapes |= {f"up.{key}": (width, rank), f"up_bias.{key}": (width,)}
        own = {name: dict(norm.named_parameters()) for name, norm in self.norms.items()} if settings["norms"] else {}
        shapes |= {
            f"norms.{as_key(name)}.{part}": (self.backbone.width,) for name, parts in own.items() for part in parts
        }
        check_shapes(shapes, tensors, where)
        return Parts(
            bottlenecks={
                name: tuple(
                    self._placed(
                        tensors[f"{part}.{as_key(name)}"].T if part == "up" else tensors[f"{part}.{as_key(name)}"]
                    )
                    for part in ("down", "down_bias", "up", "up_bias")
                )
                for name in maps
            },
            norms={
                name: tuple(self._placed(tensors[f"norms.{as_key(name)}.{part}"]) for part in parts)
                for name, parts in own.items()
            },
        )

    def _by_position(self, both: torch.Tensor) -> torch.Tensor:
        """(2, heads, P, head width) -> (P, 2, heads, head width)."""
        return self._placed(both.permute(2, 0, 1, 3))

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(self.backbone.device, self.backbone.model.dtype).contiguous()


class Mixture:
    """The parts of R rows, stacked. Inside of `attached` row r of a batch is computed with the r-th.

    A batch has R rows, or k R with beams or samples of each text next to one another. Used by one thread at a time, as
    the model is. It may be entered again and again: a server keeps it while its rows stay the same.
    """

    @torch.no_grad()
    def __init__(self, workshop: Workshop, rows: Sequence[Parts]) -> None:
        self._backbone, self._norms_of = workshop.backbone, workshop
        self.rows = tuple(rows)
        device = self._backbone.device
        self._shown: dict[tuple[int, ...], Shown | None] = {}  # by the lengths of the rows: layers of one kind share it
        self._layers = {name: self._stack_layers(name) for name in _names(row.layers for row in rows)}
        self._updates = {
            name: _stack([row.updates.get(name) for row in rows]) for name in _names(r.updates for r in rows)
        }
        self._bottlenecks = {
            name: _stack([row.bottlenecks.get(name) for row in rows]) for name in _names(r.bottlenecks for r in rows)
        }
        self._norms = {name: self._stack_norms(name) for name in _names(row.norms for row in rows)}
        self._words = _pad([row.words for row in rows])  # (R, P, D)
        self._shown_words = _shown([row.words for row in rows], device)
        moved = torch.tensor([row.moved for row in rows], device=device)[:, None]
        self._moved = moved if moved.any() else None  # (R, 1)

    @property
    def bytes(self) -> int:
        """Memory that the stacked tensors take, padding and all."""
        stacked = [group.parts for group in (*self._updates.values(), *self._bottlenecks.values())]
        stacked += self._norms.values()
        stacked += [(given().keys, given().values) for given in self._layers.values()]
        stacked += [] if self._words is None else [(self._words,)]
        return sum(tensor.numel() * tensor.element_size() for group in stacked for tensor in group)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The model computes with these rows inside the block, whoever calls it. Nothing else may be attached."""
        undo: list[Callable[[], None]] = []
        try:
            self._install(undo)
            yield
        finally:
            for step in reversed(undo):
                step()

    def _install(self, undo: list[Callable[[], None]]) -> None:
        model = self._backbone.model
        if self._layers:
            undo.append(Attached(model, self._layers).remove)
        if self._words is not None:
            length = self._words.shape[1]
            undo.append(BeforeText(self._backbone, "a row's prompt", length, self._words_of).remove)
        hooks = [(name, _add_update(group)) for name, group in self._updates.items()]
        hooks += [(name, _add_bottleneck(group)) for name, group in self._bottlenecks.items()]
        hooks += [(name, _scale(self._norms_of.norms[name], *parts)) for name, parts in self._norms.items()]
        undo += [model.get_submodule(name).register_forward_hook(hook).remove for name, hook in hooks]
        if self._moved is not None and takes(model, "position_ids"):
            undo.append(model.register_forward_pre_hook(self._move, with_kwargs=True).remove)

    def _move(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        _, positions = text_of_call(args, kwargs)
        assert self._moved is not None
        positions, window = positions + of_batch(self._moved, len(positions)), self._backbone.window
        if window is not None and int(positions.max()) >= window:
            row = int(positions.max(1).values.argmax()) * len(self.rows) // len(positions)
            raise DataError(
                f"row {row}: a prompt of {self.rows[row].moved} vectors and its text do not fit the window of {window} "
                f"tokens of {self._backbone.name}. Shorten one of them."
            )
        return args, {**kwargs, "position_ids": positions}

    def _words_of(self, batch: int) -> Words:
        assert self._words is not None
        shown = self._shown_words
        if shown is None:
            shown = self._words.new_ones(self._words.shape[:2], dtype=torch.bool)
        return Words(of_batch(self._words, batch), of_batch(shown.long(), batch))

    def _stack_layers(self, name: str) -> GivesVectors:
        own = [row.layers.get(name) for row in self.rows]
        stacked = _pad(own)  # (R, P, 2, heads, head width)
        assert stacked is not None
        keys, values = stacked.permute(2, 0, 3, 1, 4).contiguous()
        lengths = tuple(0 if row is None else len(row) for row in own)
        if lengths not in self._shown:
            shown = _shown(own, keys.device)
            self._shown[lengths] = None if shown is None else Shown(shown)
        vectors = Vectors(keys, values, self._shown[lengths])
        return lambda: vectors

    def _stack_norms(self, name: str) -> tuple[torch.Tensor, ...]:
        """Scale and perhaps shift, (R, 1, D) each; the frozen ones for rows that have none of their own."""
        frozen = tuple(self._backbone.model.get_submodule(name).parameters())
        own = [row.norms.get(name, frozen) for row in self.rows]
        return tuple(torch.stack([parts[number] for parts in own])[:, None] for number in range(len(frozen)))


def _names(parts: Iterator[Mapping[str, Any]]) -> list[str]:
    """Names of modules that any row has something for."""
    return list(dict.fromkeys(name for mapping in parts for name in mapping))


def _pad(rows: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """(n_r, ...) each -> (R, longest, ...), zeros before the shorter ones; None if no row has anything."""
    some = next((row for row in rows if row is not None), None)
    if some is None:
        return None
    nothing = some.new_zeros(0, *some.shape[1:])
    return pad_sequence([nothing if row is None else row for row in rows], batch_first=True, padding_side="left")


def _shown(rows: Sequence[torch.Tensor | None], device: torch.device) -> torch.Tensor | None:
    """Which entries of `_pad` are no padding: (R, longest) bool; None if all rows are of one length."""
    lengths = torch.tensor([0 if row is None else len(row) for row in rows], device=device)
    longest = int(lengths.max())
    if bool((lengths == longest).all()):
        return None
    return torch.arange(longest, device=device) >= longest - lengths[:, None]


@dataclass(frozen=True, slots=True)
class _Group:
    """The rows that have something for a module: n of R, their numbers `at` (n,), their parts (n, longest, ...)."""

    rows: int
    at: torch.Tensor
    parts: tuple[torch.Tensor, ...]

    def of(self, states: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> those of the group, (n, B / R * T, D)."""
        grouped = _by_row(states, self.rows)
        return grouped if len(self.at) == self.rows else grouped[self.at]

    def add(self, states: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """(B, T, D) states, with the group's changes added."""
        if len(self.at) == self.rows:
            return states + change.view_as(states)
        return _by_row(states, self.rows).index_add(0, self.at, change).view_as(states)


def _stack(rows: Sequence[tuple[torch.Tensor, ...] | None]) -> _Group:
    at = [number for number, row in enumerate(rows) if row is not None]
    own = [row for row in rows if row is not None]
    stacked = [_pad([row[number] for row in own]) for number in range(len(own[0]))]
    parts = tuple(tensor for tensor in stacked if tensor is not None)
    return _Group(len(rows), torch.tensor(at, device=parts[0].device), parts)


def _by_row(states: torch.Tensor, rows: int) -> torch.Tensor:
    """(B, T, D) -> (R, B / R * T, D)."""
    if states.ndim != 3 or states.shape[0] % rows:
        raise DataError(
            f"a linear map sees states of shape {tuple(states.shape)}, which are no batch of {rows} rows. Use prompts "
            "or prefixes for this model."
        )
    return states.reshape(rows, -1, states.shape[-1])


def _add_update(group: _Group) -> Callable[..., torch.Tensor]:
    a, b = group.parts

    def add(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return group.add(output, group.of(args[0]) @ a.mT @ b)

    return add


def _add_bottleneck(group: _Group) -> Callable[..., torch.Tensor]:
    down, down_bias, up, up_bias = group.parts

    def add(_module: nn.Module, _args: Any, h: torch.Tensor) -> torch.Tensor:
        inner = nn.functional.gelu(torch.baddbmm(down_bias[:, None], group.of(h), down.mT))
        return group.add(h, torch.baddbmm(up_bias[:, None], inner, up))

    return add


def _scale(norm: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Callable[..., torch.Tensor]:
    def scale(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        scaled = _by_row(normalised(norm, args[0]), len(weight)) * weight
        return (scaled if bias is None else scaled + bias).view_as(output)

    return scale
