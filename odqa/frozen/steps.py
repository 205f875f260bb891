"""Generation step by step, for rows that come and go: what a server needs and `generate` of `transformers` does not do.

    steps = make_steps(backbone)
    logits = steps.join([Text(ids), Text(vectors=prompt, parts=bank.parts("anna"))])   # reads; one tensor a row
    logits = steps.step([token, other])                                                # (R, V), what follows these
    steps.keep([1])                                                                    # row 0 has ended

Rows of a causal model lie in one key/value cache, the text's ends side by side:

    row 0      . . . . a b c d          a row joins: it is read apart, and padded on the left to the others' width
    row 1      a b c d e f g h          a row leaves: its entries go, and columns that only it had

Positions are counted a row, and vectors of methods are put in at the attention (`odqa.frozen.mixture`), so that a row
gets what it gets alone. Encoder-decoders count positions of their decoder by the batch, so there rows start together
and new ones wait until the last has ended (`can_join` says so).

It knows tokens, vectors and logits. Who may join when, and which token follows, is `odqa.serve.scheduler`'s business.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import torch

from odqa.errors import DataError
from odqa.frozen.attention import Site
from odqa.frozen.backbone import SOURCE_MASK, Backbone, takes
from odqa.frozen.layout import text_positions
from odqa.frozen.mixture import NOTHING, Mixture, Parts, Workshop


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """What a row goes on from: token `ids`, or word `vectors` (T, D) in their place; and the parts of its method.

    `wants_all`: logits of all T places of the text are given back, not only of the last.
    """

    ids: Sequence[int] = ()
    vectors: torch.Tensor | None = None
    parts: Parts = NOTHING
    wants_all: bool = False

    def __len__(self) -> int:
        return len(self.ids) if self.vectors is None else len(self.vectors)


class Steps(Protocol):
    """A batch whose rows change."""

    @property
    def can_join(self) -> bool:
        """Whether new rows may be taken in now."""
        ...

    def join(self, texts: Sequence[Text]) -> list[torch.Tensor]:
        """Read new rows, behind those that are there; float32 logits, (1, V) or (T, V) a row, of what follows each
        place. Raises ValueError for a text without tokens, or if `can_join` is False."""
        ...

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Add a token to each row; float32 logits (R, V) of what follows."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, given in order."""
        ...


def make_steps(backbone: Backbone) -> Steps:
    """The stepwise engine for a model that writes. Raises DataError for an encoder."""
    if backbone.architecture == "encoder":
        raise DataError(f"{backbone.name} is an encoder and writes no text. Name a causal model or encoder-decoder.")
    return CausalSteps(backbone) if backbone.architecture == "causal" else SourceSteps(backbone)


class CausalSteps:
    """Rows that join and leave between any two steps; see the module.

    What a method puts before a row's text lies in the row's part of the cache from the start, so that a step need not
    put it there again (`odqa.frozen.attention` would, for whoever calls the model).
    """

    can_join = True

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._rows = _Rows(backbone)
        self._cache = _RowCache()
        self._slots: list[int] = []  # where in the cache, and in all that follows, each row is
        self._positions: list[int] = []  # of the token that comes next
        self._takes_positions = takes(backbone.model, "position_ids")
        self._keeps_some = takes(backbone.model, "logits_to_keep")

    @torch.inference_mode()
    def join(self, texts: Sequence[Text]) -> list[torch.Tensor]:
        _check(texts)
        found: dict[int, torch.Tensor] = {}
        order: list[int] = []
        for numbers in _of_like_lengths(texts):
            logits = self._read([texts[number] for number in numbers])
            found |= dict(zip(numbers, logits, strict=True))
            order += numbers
        first = len(self._slots)
        self._slots += [first + order.index(number) for number in range(len(texts))]
        return [found[number] for number in range(len(texts))]

    def _read(self, texts: Sequence[Text]) -> list[torch.Tensor]:
        """Rows in one forward pass, into the next slots."""
        from transformers import DynamicCache

        inputs, mask = _padded(self.backbone, texts)
        keep = {"logits_to_keep": 1} if self._keeps_some and not any(text.wants_all for text in texts) else {}
        read = DynamicCache()
        with self._rows.attached([text.parts for text in texts]):
            logits = self._forward({**inputs, **keep}, mask, text_positions(mask), read)
        states = [(layer.keys, layer.values) for layer in read.layers]
        self._cache.add(states, [len(text) for text in texts], [self._before(text.parts) for text in texts])
        self._positions += [text.parts.moved + len(text) for text in texts]
        self._rows.add([replace(text.parts, layers={}, moved=0) for text in texts])
        return [row[-len(text) :] if text.wants_all else row[-1:] for row, text in zip(logits, texts, strict=True)]

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        device = self.backbone.device
        opened, mask = self._cache.open(device)
        places = torch.tensor(self._positions, device=device)[:, None]
        slots = torch.tensor(self._slots, device=device)
        ids = torch.empty(len(tokens), 1, dtype=torch.long, device=device)
        ids[slots, 0] = torch.tensor(tokens, device=device)
        with self._rows.attached():
            logits = self._forward({"input_ids": ids}, mask, places, opened)
        self._cache.close()
        self._positions = [position + 1 for position in self._positions]
        return logits[slots, -1]

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        # The last slots move into those that get free: one row's copy a row that leaves.
        kept = [self._slots[row] for row in rows]
        moving = iter([slot for slot in kept if slot >= len(kept)])
        stays = set(kept)
        sources = [slot if slot in stays else next(moving) for slot in range(len(kept))]
        self._slots = [sources.index(slot) for slot in kept]
        self._positions = [self._positions[slot] for slot in sources]
        self._rows.keep(sources)
        self._cache.keep(sources)

    @property
    def width(self) -> int:
        """Columns of the cache that are in use."""
        return self._cache.width

    def _before(self, parts: Parts) -> list[torch.Tensor] | None:
        """What a method puts before the text, a layer: (P, 2, heads, head width); None: nothing."""
        if not parts.layers:
            return None
        return [parts.layers[site.name] for site in self._rows.sites]

    def _forward(self, inputs: dict[str, Any], mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        if self._takes_positions:
            inputs = {**inputs, "position_ids": positions}
        output = self.backbone.model(**inputs, attention_mask=mask, past_key_values=cache, use_cache=True)
        logits: torch.Tensor = output.logits.float()
        return logits


class _RowCache:
    """Keys and values of rows whose texts end at the same column, in buffers with room to grow.

    One buffer a layer and kind, (rows, heads, columns, head width). A step writes one column in place; a row that joins
    is written into its own part; when a row leaves, the rest moves together, and unused columns are forgotten. Where a
    row has no text there are zeros, never what another row has left: the mask hides both, but a number that is none
    would come through any mask.
    """

    def __init__(self) -> None:
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._lengths: list[int] = []
        self._end = 0

    @property
    def width(self) -> int:
        return max(self._lengths, default=0)

    def add(
        self,
        read: Sequence[tuple[torch.Tensor, torch.Tensor]],
        lengths: Sequence[int],
        before: Sequence[Sequence[torch.Tensor] | None],
    ) -> None:
        """Take in rows: keys and values a layer, (R, heads, T, head width) with pads before texts of these `lengths`,
        and what stands before each text, see `CausalSteps._before`."""
        wholes = [n + (0 if vectors is None else len(vectors[0])) for n, vectors in zip(lengths, before, strict=True)]
        first, rows = len(self._lengths), len(self._lengths) + len(lengths)
        self._make_room(read, rows, max([self.width, *wholes]))
        for number, (length, whole, vectors) in enumerate(zip(lengths, wholes, before, strict=True)):
            for layer, (buffers, own) in enumerate(zip(self._buffers, read, strict=True)):
                for kind, (buffer, texts) in enumerate(zip(buffers, own, strict=True)):
                    row = buffer[first + number]
                    row[:, : self._end - whole] = 0
                    row[:, self._end - length : self._end] = texts[number, :, texts.shape[2] - length :]
                    if vectors is not None:
                        row[:, self._end - whole : self._end - length] = vectors[layer][:, kind].transpose(0, 1)
        self._lengths += wholes

    def open(self, device: torch.device) -> tuple[Any, torch.Tensor]:
        """What the model computes a step with: a cache of `transformers`, and the mask (R, width + 1)."""
        from transformers import DynamicCache

        width = self.width
        if self._end == self._buffers[0][0].shape[2]:
            self._make_room(self._buffers, len(self._lengths), width)
        opened = DynamicCache()
        rows, start, end = len(self._lengths), self._end - width, self._end
        opened.layers = [
            _layer_class()(keys[:rows, :, start:], values[:rows, :, start:], end - start)
            for keys, values in self._buffers
        ]
        columns = torch.arange(width + 1, device=device)
        lengths = torch.tensor(self._lengths, device=device)[:, None]
        return opened, (columns >= width - lengths).long()

    def close(self) -> None:
        """The step is done: each row has a column more."""
        self._end += 1
        self._lengths = [length + 1 for length in self._lengths]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; each stands where it is to be, or behind all of those places."""
        for new, old in enumerate(rows):
            if new != old:
                start = self._end - self._lengths[old]
                for buffers in self._buffers:
                    for buffer in buffers:
                        buffer[new, :, :start] = 0
                        buffer[new, :, start : self._end] = buffer[old, :, start : self._end]
        self._lengths = [self._lengths[row] for row in rows]
        if not rows:
            self._buffers, self._end = [], 0

    def _make_room(self, like: Sequence[tuple[torch.Tensor, torch.Tensor]], rows: int, width: int) -> None:
        """Buffers for so many rows, with `width` columns before the end and some behind it; what is there stays."""
        if self._buffers:
            held, _, columns, _ = self._buffers[0][0].shape
            if rows <= held and width <= self._end < columns:
                return
            rows = max(rows, held if rows <= held else min(2 * held, rows + _ROWS))
        end, used = width + _COLUMNS, self.width
        made = []
        for layer, pair in enumerate(like):
            both = []
            for kind, tensor in enumerate(pair):
                buffer = tensor.new_zeros(rows, tensor.shape[1], end + _COLUMNS, tensor.shape[3])
                if self._buffers:
                    old = self._buffers[layer][kind][: len(self._lengths), :, self._end - used : self._end]
                    buffer[: len(self._lengths), :, end - used : end] = old
                both.append(buffer)
            made.append((both[0], both[1]))
        self._buffers, self._end = made, end


_SHORT = 8  # our choice: tokens of padding that cost nothing to speak of
_COLUMNS, _ROWS = 64, 16  # our choice: room before and behind the texts, and for rows, when buffers are made


@cache
def _layer_class() -> Any:
    """A layer of `transformers`' cache over buffers, which it does not lengthen."""
    from transformers.cache_utils import DynamicLayer

    class RowLayer(DynamicLayer):  # type: ignore[misc]
        """Buffers (R, heads, columns, head width) each, of which `length` columns are there already."""

        def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
            super().__init__()
            self.is_initialized, self._held, self._length = True, (keys, values), length

        def get_seq_length(self) -> int:
            return self._length

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_options: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            end = self._length + key_states.shape[2]
            for buffer, states in zip(self._held, (key_states, value_states), strict=True):
                buffer[:, :, self._length : end] = states
            return self._held[0][:, :, :end], self._held[1][:, :, :end]

    return RowLayer


class SourceSteps:
    """An encoder-decoder's rows, which start together. A row that has left is computed on until the last one has."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._rows = _Rows(backbone)
        self._going: list[int] = []  # numbers of the rows that have not left
        self._source: tuple[torch.Tensor, torch.Tensor] | None = None
        self._cache: Any = None

    @property
    def can_join(self) -> bool:
        return not self._going

    @torch.inference_mode()
    def join(self, texts: Sequence[Text]) -> list[torch.Tensor]:
        from transformers import DynamicCache, EncoderDecoderCache

        _check(texts)
        if not self.can_join:
            raise ValueError("join: rows of an encoder-decoder start together; wait until all have left")
        if any(text.wants_all for text in texts):
            raise ValueError("join: an encoder-decoder has no logits for places of its source")
        self._rows.keep([])
        self._rows.add([text.parts for text in texts])
        encoder = self.backbone.model.get_encoder()
        inputs, mask = _padded(self.backbone, texts, "right")
        if takes(encoder, "position_ids"):
            inputs["position_ids"] = text_positions(mask)
        with self._rows.attached():
            output = encoder(**inputs, attention_mask=mask, return_dict=True)
        self._source = output.last_hidden_state, getattr(output, SOURCE_MASK, mask)
        self._cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self._going = list(range(len(texts)))
        logits = self.step([self.backbone.decoder_start()] * len(texts))
        return [row[None] for row in logits]

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        assert self._source is not None
        states, mask = self._source
        ids = torch.full((len(states), 1), self.backbone.padding, device=self.backbone.device)
        ids[self._going, 0] = torch.tensor(tokens, device=self.backbone.device)
        with self._rows.attached():
            output = self.backbone.model(
                encoder_outputs=(states,),
                attention_mask=mask,
                decoder_input_ids=ids,
                past_key_values=self._cache,
                use_cache=True,
            )
        logits: torch.Tensor = output.logits[self._going, -1].float()
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        self._going = [self._going[row] for row in rows]
        if not rows:
            self._source = self._cache = None


class _Rows:
    """The parts of the rows that are there, attached while the model computes; stacked anew only when they change."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone, self._workshop = backbone, Workshop(backbone)
        self._parts: list[Parts] = []
        self._mixture: Mixture | None = None

    @property
    def sites(self) -> list[Site]:
        """The attentions of a causal model, in the order of its cache's layers."""
        return self._workshop.sites["self"]

    def add(self, parts: Sequence[Parts]) -> None:
        self._parts, self._mixture = [*self._parts, *parts], None

    def keep(self, rows: Sequence[int]) -> None:
        self._parts, self._mixture = [self._parts[row] for row in rows], None

    @contextmanager
    def attached(self, others: Sequence[Parts] | None = None) -> Iterator[None]:
        """The rows' parts inside the block, or those of `others`."""
        parts = self._parts if others is None else others
        if all(_is_nothing(part) for part in parts):
            yield
            return
        mixture = self._mixture if others is None else None
        mixture = Mixture(self._workshop, parts) if mixture is None else mixture
        if others is None:
            self._mixture = mixture
        with mixture.attached():
            yield


def _is_nothing(parts: Parts) -> bool:
    """Whether a row is computed as the frozen model computes it."""
    return parts.words is None and not (parts.layers or parts.updates or parts.bottlenecks or parts.norms)


def _check(texts: Sequence[Text]) -> None:
    for number, text in enumerate(texts):
        if not len(text):
            raise ValueError(f"join: text {number} has no tokens")


def _of_like_lengths(texts: Sequence[Text]) -> list[list[int]]:
    """Numbers of texts that are read together, so that less than half of what is computed is padding."""
    groups: list[list[int]] = []
    for number in sorted(range(len(texts)), key=lambda number: len(texts[number])):
        shortest = len(texts[groups[-1][0]]) if groups else 0
        if groups and len(texts[number]) <= 2 * shortest + _SHORT:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def _padded(
    backbone: Backbone, texts: Sequence[Text], side: str = "left"
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the model is called with, ids (B, T) or word vectors (B, T, D) if any row has those; and the mask (B, T)."""
    longest = max(len(text) for text in texts)
    places = [slice(longest - len(t), longest) if side == "left" else slice(0, len(t)) for t in texts]
    ids = torch.full((len(texts), longest), backbone.padding)
    mask = torch.zeros_like(ids)
    for row, (text, place) in enumerate(zip(texts, places, strict=True)):
        mask[row, place] = 1
        if text.vectors is None:
            ids[row, place] = torch.tensor(text.ids)
    ids, mask = ids.to(backbone.device), mask.to(backbone.device)
    if all(text.vectors is None for text in texts):
        return {"input_ids": ids}, mask
    vectors = backbone.embed(ids).clone()
    for row, (text, place) in enumerate(zip(texts, places, strict=True)):
        if text.vectors is not None:
            vectors[row, place] = text.vectors.to(vectors)
    return {"inputs_embeds": vectors}, mask
