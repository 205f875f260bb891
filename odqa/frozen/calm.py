"""CALM: a frozen anchor m_B that reads the states of other frozen models m_A, and so does what none of them can alone.

    H_B  ->  H_B + sum over links of f_cross(f_proj(H_A), H_B)        between chosen layers, see `odqa.frozen.links`

Trains n (D_A D_B + 4 D_B^2) values for n links, and nothing of any model. Source: Bansal et al. 2024 (arXiv
2401.02412), section 3. W_o starts at zero: a fresh composition is the anchor, to the bit.

All models read the same tokens, those that are being written too. A token of the anchor sees m_A's states of itself and
of what stands before it, no pad, and nothing that comes later. A causal m_A has keys and values of its own; they and
those of the links lie behind the anchor's in one cache object, so that beams take them along. An encoder reads the
source alone, and every token sees all of it (our choice: it would read early tokens otherwise as later ones come).
Where the source of a causal anchor ends, `odqa.frozen.layout.source_ends` says.

An encoder-decoder anchor has its links in its decoder (our choice); m_A reads source and answer in one row, without the
token that the decoder starts with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from odqa.errors import DataError
from odqa.frozen.attention import of_batch
from odqa.frozen.augment import Augmenting, ModelReader, Reads, choose_links
from odqa.frozen.backbone import Backbone, layer_list
from odqa.frozen.layout import text_positions, told_source_ends
from odqa.frozen.links import Link, causal_mask
from odqa.frozen.method import Count, Method


class Calm(Method):
    """Links between each of `models` and the anchor.

    `heads` of a link; None: as many as the anchor's attention has. `rotary` and `normalise`: see `odqa.frozen.links`.
    Raises DataError for links that are not there, heads that do not divide the anchor's width, or an m_A with another
    tokenizer; ArtifactMismatch for an m_A with other weights than a saved composition was trained with.
    """

    kind: ClassVar[str] = "calm"

    def __init__(
        self,
        backbone: Backbone,
        *,
        models: Sequence[Augmenting | Mapping[str, Any]],
        heads: int | None = None,
        rotary: bool = True,
        normalise: bool = True,
        seed: int = 0,
    ) -> None:
        heads = _choose_heads(backbone, heads, rotary)
        super().__init__(backbone, heads=heads, rotary=rotary, normalise=normalise, seed=seed)
        if not models:
            raise DataError("calm: there is no augmenting model. Name at least one under models.")
        generator = torch.Generator().manual_seed(seed)
        self.links = nn.ModuleList()
        self._parts: list[_Part] = []
        for given in models:
            named = given if isinstance(given, Augmenting) else Augmenting(**given)
            found = named.load(backbone)
            pairs = choose_links(named.links, found.layers, len(layer_list(backbone)))
            links = nn.ModuleList(
                Link(found.width, backbone.width, heads, rotary=rotary, normalise=normalise, generator=generator)
                for _ in pairs
            )
            self.links.append(links)
            reader = ModelReader(found, [first for first, _ in pairs])
            self._parts.append(_Part(found, reader, named.reads_of(found), pairs, [*links]))
        self.settings["models"] = [part.record() for part in self._parts]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._now: _Step | None = None
        self._source: _Source | None = None

    @property
    def models(self) -> list[Backbone]:
        """The augmenting models."""
        return [part.model for part in self._parts]

    @property
    def reads_source(self) -> bool:
        return any(part.reads == "source" for part in self._parts)

    @property
    def longest_text(self) -> int | None:
        return min((model.window for model in self.models if model.window is not None), default=None)

    def count(self, backbone: Backbone) -> Count:
        """Frozen are the anchor and all augmenting models."""
        own = super().count(backbone)
        frozen = own.frozen + sum(model.count_parameters() for model in self.models)
        return Count(own.trainable, frozen, own.stored_bytes)

    def _install(self, backbone: Backbone) -> None:
        model, layers = backbone.model, layer_list(backbone)
        for augmenting in self.models:
            augmenting.model.to(backbone.device)
        self._handles = [
            model.register_forward_pre_hook(partial(self._read, backbone), with_kwargs=True),
            model.register_forward_hook(self._remember, with_kwargs=True, always_call=True),
        ]
        for place in sorted({second for part in self._parts for _, second in part.pairs}):
            if place < len(layers):
                before = partial(self._add_before, place)
                self._handles.append(layers[place].register_forward_pre_hook(before, with_kwargs=True))
            else:
                self._handles.append(layers[-1].register_forward_hook(partial(self._add_behind, place)))
        if backbone.architecture == "seq2seq":
            encoder = model.get_encoder()
            self._handles.append(encoder.register_forward_pre_hook(self._note_source, with_kwargs=True))
            self._handles.append(encoder.register_forward_hook(self._note_states))

    def _remove(self, backbone: Backbone) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._now = self._source = None

    # --- what the models are given ------------------------------------------------------------------------------------

    def _read(self, backbone: Backbone, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the anchor computes: let every m_A read what is new, and make the links' keys and values of it."""
        text = self._source_and_answer(kwargs) if backbone.architecture == "seq2seq" else _causal_text(args, kwargs)
        memory = None if text.cache is None else getattr(text.cache, self._cache_name, None)
        if memory is None:
            if text.seen:
                raise DataError("calm: the cache was filled without this composition. Attach it before generating.")
            memory = [_Past.of(part, text.keeps) for part in self._parts]
        positions = text_positions(text.mask)
        asked = positions[:, positions.shape[1] - text.queries :]
        step = _Step(memory, (len(asked), text.queries), asked)
        for part, past in zip(self._parts, memory, strict=True):
            mask = part.read(text, positions, past, backbone.model.dtype)
            for (_, place), link, (keys, values) in zip(part.pairs, part.links, past.now, strict=True):
                step.reads.setdefault(place, []).append((link, keys, values, mask))
        self._now = step

    def _source_and_answer(self, kwargs: dict[str, Any]) -> "_Text":
        """What m_A reads of a call of an encoder-decoder: its source, then the decoder's tokens but for the first."""
        written, cache = kwargs.get("decoder_input_ids"), kwargs.get("past_key_values")
        if written is None:
            raise DataError(
                "calm: an encoder-decoder needs decoder_input_ids, for the augmenting model reads them too."
            )
        if kwargs.get("encoder_outputs") is None:
            ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
            mask = torch.ones_like(ids) if mask is None else mask
        else:
            ids, mask = self._source_of(kwargs["encoder_outputs"][0])
        ids, mask = of_batch(ids, len(written)), of_batch(mask, len(written))
        seen, queries = _seen(cache), written.shape[1]
        new = written if seen else torch.cat([ids, written[:, 1:]], dim=1)
        answer = mask.new_ones(len(written), seen + queries - 1)
        host = getattr(cache, "self_attention_cache", cache)
        whole = torch.cat([mask, answer], dim=1)
        return _Text(new, whole, mask.bool(), queries, seen, host, kwargs.get("use_cache") is not False)

    def _note_source(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        mask = kwargs.get("attention_mask")
        self._source = None if ids is None else _Source(ids, torch.ones_like(ids) if mask is None else mask)

    def _note_states(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if self._source is not None:
            self._source.states = output[0]

    def _source_of(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask of what these encoder states (perhaps each row several times) were made from."""
        source = self._source
        if source is None or not source.gave(states):
            raise DataError(
                "calm: which tokens the encoder's states are from is not known, for they are not the last ones that it "
                "gave. Encode the sources of a batch together, right before (a reader: passages: together)."
            )
        return source.ids, source.mask

    # --- what the anchor does with it ---------------------------------------------------------------------------------

    def _add_before(
        self, place: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self._linked(place, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._linked(place, kwargs["hidden_states"])}

    def _add_behind(self, place: int, _module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self._linked(place, output[0]), *output[1:])
        return self._linked(place, output)

    def _linked(self, place: int, hidden: torch.Tensor) -> torch.Tensor:
        step = self._now
        if step is None:
            raise RuntimeError("calm: call the whole model, not its layers: the augmenting model has read nothing.")
        if hidden.shape[:2] != step.shape:
            raise DataError(
                f"calm: the anchor has states of {hidden.shape[1]} places for a text of {step.shape[1]} tokens; a soft "
                "prompt stands before it. Attach the prompt as a prefix (prefix_of_prompt), as a reader does."
            )
        updates = [link(hidden, keys, values, mask, step.positions) for link, keys, values, mask in step.reads[place]]
        update: torch.Tensor = sum(updates[1:], start=updates[0])
        return hidden + update

    def _remember(self, _module: nn.Module, _args: Any, _kwargs: dict[str, Any], output: Any) -> None:
        """Behind the anchor: put what the links and m_A keep behind what the anchor keeps."""
        step, self._now = self._now, None
        cache = getattr(output, "past_key_values", None)
        cache = getattr(cache, "self_attention_cache", cache)
        if step is None or cache is None or getattr(cache, self._cache_name, None) is not None:
            return
        cache.layers.extend(layer for past in step.memory for layer in past.layers())
        setattr(cache, self._cache_name, step.memory)

    @property
    def _cache_name(self) -> str:
        return f"odqa_calm_{id(self)}"


@dataclass(slots=True)
class _Text:
    """What the models read in one call: `new` token ids (B, N'), the `mask` (B, T) of all columns so far.

    `source` (B, S) says which of the first S columns are the source's text, None: nobody said. The last columns are
    those of the anchor's `queries`. `cache` is the anchor's, with `seen` tokens; `keeps`: there will be one behind.
    """

    new: torch.Tensor
    mask: torch.Tensor
    source: torch.Tensor | None
    queries: int
    seen: int
    cache: Any
    keeps: bool

    def source_columns(self) -> torch.Tensor:
        """(B, S) true where the source is. Raises DataError if nobody said where it ends, and there is no cache."""
        if self.source is not None:
            return self.source
        if self.cache is None:
            raise DataError(
                "calm: an augmenting model that reads the source alone must be told where it ends. Compute with the "
                "backbone's own calls (loss, forward with targets, generate), or inside of source_ends(lengths)."
            )
        return self.mask.bool()


@dataclass(slots=True)
class _Past:
    """What an m_A and its links keep of what they have read: its cache, and a layer of keys and values a link.

    `now` are those of the links in the present call. Without a cache `kept` is None.
    """

    cache: DynamicCache | None
    kept: "list[DynamicLayer] | None"
    now: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, part: "_Part", keeps: bool) -> "_Past":
        needs_cache = keeps and part.reads == "all"
        layer = DynamicLayer if part.reads == "all" else _SourceLayer
        return cls(DynamicCache() if needs_cache else None, [layer() for _ in part.pairs] if keeps else None)

    def layers(self) -> "list[DynamicLayer]":
        return [*(self.cache.layers if self.cache is not None else ()), *(self.kept or ())]


class _SourceLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of a source, which stay when what was written behind it is taken back."""

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing to do."""


@dataclass(slots=True)
class _Step:
    """One call of the anchor: shape and positions (B, N) of its tokens, and what is read before each layer."""

    memory: list[_Past]
    shape: tuple[int, int]
    positions: torch.Tensor
    reads: dict[int, list[tuple[Link, torch.Tensor, torch.Tensor, torch.Tensor | None]]] = field(default_factory=dict)


@dataclass(slots=True)
class _Source:
    """What an encoder was given, and what it gave."""

    ids: torch.Tensor
    mask: torch.Tensor
    states: torch.Tensor | None = None

    def gave(self, states: torch.Tensor) -> bool:
        """Whether these are its states; rows may be there several times in a row (beams)."""
        own = self.states
        if own is None or len(states) % len(own) or states.shape[1:] != own.shape[1:]:
            return False
        return states is own or torch.equal(states[:: len(states) // len(own)], own)


@dataclass(slots=True)
class _Part:
    """An augmenting model with its links."""

    model: Backbone
    reader: ModelReader
    reads: Reads
    pairs: Sequence[tuple[int, int]]
    links: Sequence[Link]

    def record(self) -> dict[str, Any]:
        """As JSON values, for the saved composition."""
        return {
            "model": self.model.name,
            "architecture": self.model.architecture,
            "links": [list(pair) for pair in self.pairs],
            "reads": self.reads,
            "fingerprint": self.model.fingerprint,
        }

    def read(self, text: _Text, positions: torch.Tensor, past: _Past, dtype: torch.dtype) -> torch.Tensor | None:
        """Read what is new into `past.now`; returns what the anchor's tokens see of it, as `Link.forward` takes it.

        `positions` are those of all columns of the text.
        """
        if self.reads == "all":
            self._link(text.new, text.mask, positions[:, -text.new.shape[1] :], past, dtype)
            return causal_mask(text.mask.bool(), text.queries, text.mask.shape[1])
        width = past.kept[0].get_seq_length() if text.seen and past.kept else text.new.shape[1]
        source = text.source_columns()[:, :width]
        if not text.seen:
            self._link(text.new[:, : source.shape[1]], source, positions[:, : source.shape[1]], past, dtype)
        elif past.kept:
            past.now = [(layer.keys, layer.values) for layer in past.kept]
        if self.model.architecture == "causal":
            return causal_mask(source, text.queries, text.mask.shape[1])
        return None if bool(source.all()) else source[:, None, None].expand(-1, -1, text.queries, -1)

    def _link(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, past: _Past, dtype: torch.dtype
    ) -> None:
        states = self.reader.read(ids, mask, positions, past.cache)
        made = [
            link.keys_and_values(states[layer], positions, dtype)
            for (layer, _), link in zip(self.pairs, self.links, strict=True)
        ]
        if past.kept is not None:
            made = [layer.update(*both) for layer, both in zip(past.kept, made, strict=True)]
        past.now = made


def _causal_text(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Text:
    """What m_A reads of a call of a causal anchor."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is None:
        raise DataError(
            "calm: the anchor is given vectors, not tokens, so the augmenting model cannot read them. Attach a soft "
            "prompt as a prefix (prefix_of_prompt), as a reader does."
        )
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    seen, queries = _seen(cache), ids.shape[1]
    if mask is None:
        mask = ids.new_ones(len(ids), seen + queries)
    if mask.shape != (len(ids), seen + queries):
        raise DataError(
            f"calm: the attention mask is {tuple(mask.shape)}; it must be {(len(ids), seen + queries)}, with a column "
            "for each token so far."
        )
    ends = told_source_ends()
    source = None
    if ends is not None:
        lengths = of_batch(torch.tensor(ends, device=ids.device), len(ids))
        source = mask.bool() & (text_positions(mask) < lengths[:, None])
    return _Text(ids, mask, source, queries, seen, cache, kwargs.get("use_cache") is not False)


def _seen(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _choose_heads(backbone: Backbone, heads: int | None, rotary: bool) -> int:
    stated = backbone.model.config.get_text_config(decoder=True)
    count = getattr(stated, "num_attention_heads", None) if heads is None else heads
    if count is None:
        raise DataError(f"calm: the configuration of {backbone.name} does not say its attention heads. Set heads.")
    if count < 1 or backbone.width % count:
        raise DataError(
            f"calm: {count} heads do not divide the width {backbone.width} of {backbone.name}. Set heads to a number "
            "that does."
        )
    if rotary and backbone.width // count % 2:
        raise DataError(
            f"calm: rotary positions need heads of even width; {count} heads of {backbone.name} have width "
            f"{backbone.width // count}. Set heads, or rotary: false."
        )
    return int(count)
