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
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from odqa.errors import DataError
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
    """Rows that join and leave between any two steps; see the module."""

    can_join = True

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._rows = _Rows(backbone)
        self._cache: Any = None
        self._lengths: list[int] = []  # tokens of each row in the cache
        self._takes_positions = takes(backbone.model, "position_ids")
        self._keeps_some = takes(backbone.model, "logits_to_keep")

    @torch.inference_mode()
    def join(self, texts: Sequence[Text]) -> list[torch.Tensor]:
        from transformers import DynamicCache

        _check(texts)
        inputs, mask = _padded(self.backbone, texts)
        keep = {"logits_to_keep": 1} if self._keeps_some and not any(text.wants_all for text in texts) else {}
        cache = DynamicCache()
        with self._rows.attached([text.parts for text in texts]):
            logits = self._forward({**inputs, **keep}, mask, text_positions(mask), cache)
        self._take_in(cache, [len(text) for text in texts])
        self._rows.add([text.parts for text in texts])
        return [row[-len(text) :] if text.wants_all else row[-1:] for row, text in zip(logits, texts, strict=True)]

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        device = self.backbone.device
        places = torch.tensor(self._lengths, device=device)[:, None]
        width = int(self._cache.get_seq_length()) + 1
        mask = (torch.arange(width, device=device) >= width - 1 - places).long()
        inputs = {"input_ids": torch.tensor(tokens, device=device)[:, None]}
        with self._rows.attached():
            logits = self._forward(inputs, mask, places, self._cache)
        self._lengths = [length + 1 for length in self._lengths]
        return logits[:, -1]

    def keep(self, rows: Sequence[int]) -> None:
        self._lengths = [self._lengths[row] for row in rows]
        self._rows.keep(rows)
        if not rows:
            self._cache = None
            return
        unused = int(self._cache.get_seq_length()) - max(self._lengths)
        chosen = torch.tensor(rows, device=self.backbone.device)
        for layer in self._cache.layers:
            layer.keys = layer.keys[chosen, :, unused:]
            layer.values = layer.values[chosen, :, unused:]

    def _forward(self, inputs: dict[str, Any], mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        if self._takes_positions:
            inputs = {**inputs, "position_ids": positions}
        output = self.backbone.model(**inputs, attention_mask=mask, past_key_values=cache, use_cache=True)
        logits: torch.Tensor = output.logits.float()
        return logits

    def _take_in(self, cache: Any, lengths: list[int]) -> None:
        """Put the rows of another cache behind those that are there."""
        if self._cache is None:
            self._cache, self._lengths = cache, lengths
            return
        width = max(int(self._cache.get_seq_length()), int(cache.get_seq_length()))
        for own, new in zip(self._cache.layers, cache.layers, strict=True):
            own.keys = torch.cat([_widened(own.keys, width), _widened(new.keys, width)])
            own.values = torch.cat([_widened(own.values, width), _widened(new.values, width)])
        self._lengths = [*self._lengths, *lengths]


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
        self._workshop = Workshop(backbone)
        self._parts: list[Parts] = []
        self._mixture: Mixture | None = None

    def add(self, parts: Sequence[Parts]) -> None:
        self._parts, self._mixture = [*self._parts, *parts], None

    def keep(self, rows: Sequence[int]) -> None:
        self._parts, self._mixture = [self._parts[row] for row in rows], None

    @contextmanager
    def attached(self, others: Sequence[Parts] | None = None) -> Iterator[None]:
        """The rows' parts inside the block, or those of `others`."""
        parts = self._parts if others is None else others
        if all(part is NOTHING for part in parts):
            yield
            return
        mixture = self._mixture if others is None else None
        mixture = Mixture(self._workshop, parts) if mixture is None else mixture
        if others is None:
            self._mixture = mixture
        with mixture.attached():
            yield


def _check(texts: Sequence[Text]) -> None:
    for number, text in enumerate(texts):
        if not len(text):
            raise ValueError(f"join: text {number} has no tokens")


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


def _widened(states: torch.Tensor, width: int) -> torch.Tensor:
    """(R, heads, T, head width) -> (R, heads, width, head width), zeros before; the mask hides them."""
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[2], 0))
