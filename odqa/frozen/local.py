"""The engine in this process: a frozen backbone and the methods of a bank, behind values (`odqa.frozen.engine`).

Requests of a call go through the model together, whatever stands before their texts: prompts of any lengths, saved
methods of any kinds, nothing. What a row gets does not depend on its neighbours. No gradient is computed, and no weight
has a buffer for one: that is asserted in every call.

Used by one thread at a time, as the model is.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from odqa.errors import DataError, OdqaError
from odqa.frozen.backbone import PLAIN_GENERATION, Backbone, takes
from odqa.frozen.bank import Bank
from odqa.frozen.engine import Ask, Facts, Prompted, Sampling, Vectors, Written
from odqa.frozen.layout import text_positions
from odqa.frozen.mixture import Mixture, Parts

_CLIP_ROUNDS, _CLIP_AT = 5, 3.0  # Sun et al. 2022b, deepbbt.py
# What a model's own generation settings may not change: a request alone decides how its text goes on.
_PLAIN: Mapping[str, Any] = {
    **PLAIN_GENERATION,
    "num_beams": 1,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@dataclass(frozen=True, slots=True)
class _Row:
    """A request as the model takes it: token ids, vectors before them (P, D), what deep prompts add (L, P, D)."""

    ids: list[int]
    parts: Parts
    prompt: torch.Tensor | None
    deep: torch.Tensor | None

    @property
    def before(self) -> int:
        """P."""
        return 0 if self.prompt is None else len(self.prompt)

    @property
    def width(self) -> int:
        """Tokens that it takes from the window, without what a method adds."""
        return self.before + len(self.ids)


class LocalEngine:
    """`bank`: the saved methods that requests may name. `pass_tokens`: a call with more tokens, padding and all, goes
    through the model in several passes (32,768, our choice)."""

    def __init__(self, backbone: Backbone, bank: Bank | None = None, *, pass_tokens: int = 32_768) -> None:
        if backbone.architecture == "encoder":
            raise DataError(f"{backbone.name} is an encoder; an engine needs a model that writes.")
        self.backbone, self.pass_tokens = backbone, pass_tokens
        self.bank = Bank(backbone) if bank is None else bank
        self._before, self._behind = _special_tokens(backbone)
        self._known = int(backbone.model.get_input_embeddings().weight.shape[0])

    @cached_property
    def facts(self) -> Facts:
        vocabulary = len(self.backbone.tokenizer)
        words = self.backbone.model.get_input_embeddings().weight[:vocabulary].float()
        return Facts(
            model=self.backbone.name,
            fingerprint=self.backbone.fingerprint,
            width=self.backbone.width,
            layers=len(self._layers),
            vocabulary=vocabulary,
            window=self.backbone.window,
            embedding_spread=float(words.std(correction=0)),
            takes_deep=True,
        )

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.backbone.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [list(ids) for ids in encoded]

    def embed(self, ids: Sequence[int]) -> Vectors:
        self._check_ids("embed", ids)
        with _computing(self.backbone):
            return _values(self.backbone.embed(torch.tensor([list(ids)], device=self.backbone.device))[0])

    def spread(self, sources: Sequence[Prompted]) -> list[float]:
        seen: list[list[torch.Tensor]] = [[] for _ in self._layers]
        rows = self._rows(sources)
        for numbers in self._passes(rows, [1] * len(rows)):
            batch = [rows[number] for number in numbers]
            with self._attached(batch) as inputs, _watching(self._layers, seen, inputs.mask):
                self._next_logits(batch, inputs)
        return [_clipped_spread(torch.cat(states).flatten()) for states in seen]

    def generate(self, asks: Sequence[Ask]) -> list[list[Written]]:
        for number, ask in enumerate(asks):
            _check_sampling(number, ask.sampling)
        rows = self._rows([ask.source for ask in asks], [ask.sampling.max_tokens for ask in asks])
        copies = [(number, copy) for number, ask in enumerate(asks) for copy in range(ask.sampling.n)]
        seeds = [secrets.randbits(62) if ask.sampling.seed is None else ask.sampling.seed for ask in asks]
        found: list[Written | None] = [None] * len(copies)
        going = [rows[number] for number, _ in copies]
        for numbers in self._passes(going, [asks[number].sampling.max_tokens for number, _ in copies]):
            samplings = [asks[copies[at][0]].sampling for at in numbers]
            noise = [row_generator(seeds[copies[at][0]], copies[at][1]) for at in numbers]
            written = self._write([going[at] for at in numbers], samplings, noise)
            for at, one in zip(numbers, written, strict=True):
                found[at] = one
        texts = iter(found)
        return [[text for _ in range(ask.sampling.n) if (text := next(texts)) is not None] for ask in asks]

    def score(self, sources: Sequence[Prompted], targets: Sequence[Sequence[int]]) -> list[list[float]]:
        if len(sources) != len(targets):
            raise ValueError(f"score: {len(sources)} sources and {len(targets)} targets")
        for number, target in enumerate(targets):
            self._check_ids(f"request {number}: target", target)
            if not len(target):
                raise DataError(f"request {number}: its target has no tokens.")
        sizes = [len(target) for target in targets]
        rows = self._rows(sources, sizes)
        found: list[list[float]] = [[] for _ in rows]
        for numbers in self._passes(rows, sizes):
            batch = [rows[number] for number in numbers]
            wanted = [list(targets[number]) for number in numbers]
            with self._attached(batch, wanted) as inputs:
                scores = self._target_scores(batch, inputs, wanted)
            for number, values in zip(numbers, scores.tolist(), strict=True):
                found[number] = values[: sizes[number]]
        return found

    def choose(self, sources: Sequence[Prompted], tokens: Sequence[int]) -> NDArray[np.float32]:
        self._check_ids("choose", tokens)
        rows = self._rows(sources, [1] * len(sources))
        found = np.zeros((len(rows), len(tokens)), dtype=np.float32)
        for numbers in self._passes(rows, [1] * len(rows)):
            batch = [rows[number] for number in numbers]
            with self._attached(batch) as inputs:
                logits = self._next_logits(batch, inputs)
                found[numbers] = _values(logits.log_softmax(-1)[:, list(tokens)])
        return found

    def ids_of(self, source: Prompted) -> list[int]:
        """The token ids of a request, as the model gets them: none for a prompt alone."""
        if source.ids is not None:
            return [int(token) for token in source.ids]
        return [] if source.text is None else [*self._before, *self.tokens([source.text])[0], *self._behind]

    def check(self, source: Prompted, new: int = 0) -> int:
        """The number of tokens that a request takes from the window; raises DataError as the calls do, without one."""
        row = self._row(source)
        self._check_room("the request", row, new)
        return row.width + row.parts.moved

    # --- requests ---

    def _rows(self, sources: Sequence[Prompted], new: Sequence[int] | None = None) -> list[_Row]:
        rows, tensors = [], dict[int, torch.Tensor]()
        for number, source in enumerate(sources):
            try:
                row = self._row(source, tensors)
            except OdqaError as error:
                raise type(error)(f"request {number}: {error}") from error
            self._check_room(f"request {number}", row, 0 if new is None else new[number])
            rows.append(row)
        return rows

    def _row(self, source: Prompted, known: dict[int, torch.Tensor] | None = None) -> _Row:
        """`known`: tensors of arrays that requests share, by identity."""
        if source.text is not None and source.ids is not None:
            raise DataError("it has a text and ids; give one of them.")
        if source.method is not None and source.prompt is not None:
            raise DataError(f"it has a prompt and names the method {source.method!r}; give one of them.")
        if source.deep is not None and source.prompt is None:
            raise DataError("a deep prompt adds to the places of a prompt, and it has none.")
        ids, known = self.ids_of(source), {} if known is None else known
        self._check_ids("it", ids)
        if not ids and (source.prompt is None or self.backbone.architecture != "causal"):
            raise DataError("its text has no tokens.")
        prompt = deep = None
        if source.prompt is not None:
            prompt = self._tensor("prompt", source.prompt, (None, self.backbone.width), known)
        if source.deep is not None and prompt is not None:
            shape = len(self._layers), len(prompt), self.backbone.width
            deep = self._tensor("deep prompt", source.deep, shape, known)
        parts = self.bank.parts(source.method)
        if prompt is not None and self.backbone.architecture == "seq2seq":
            parts = Parts(words=prompt)
        return _Row(ids, parts, prompt, deep)

    def _tensor(
        self, what: str, values: Vectors, shape: tuple[int | None, ...], known: dict[int, torch.Tensor]
    ) -> torch.Tensor:
        if id(values) in known:
            return known[id(values)]
        if not isinstance(values, np.ndarray) or values.dtype != np.float32:
            raise DataError(f"its {what} is {getattr(values, 'dtype', type(values).__name__)}; it must be float32.")
        fits = values.ndim == len(shape) and all(
            want in (None, have) for want, have in zip(shape, values.shape, strict=True)
        )
        if not fits or not values.size:
            expected = "(" + ", ".join("P" if want is None else str(want) for want in shape) + ")"
            raise DataError(f"its {what} has shape {values.shape}; {self.backbone.name} takes {expected}.")
        if not np.isfinite(values).all():
            raise DataError(f"its {what} has entries that are not finite numbers.")
        tensor = torch.tensor(values).to(self.backbone.device, self.backbone.model.dtype)
        if not torch.isfinite(tensor).all():
            kind = str(self.backbone.model.dtype).removeprefix("torch.")
            raise DataError(f"its {what} has entries too large for {kind}.")
        known[id(values)] = tensor
        return tensor

    def _check_ids(self, who: str, ids: Sequence[int]) -> None:
        if len(ids) and not 0 <= min(ids) <= max(ids) < self._known:
            wrong = next(token for token in ids if not 0 <= token < self._known)
            raise DataError(f"{who} has token {wrong}; {self.backbone.name} knows tokens 0 to {self._known - 1}.")

    def _check_room(self, who: str, row: _Row, new: int) -> None:
        window = self.backbone.window
        is_causal = self.backbone.architecture == "causal"
        needs = {"text": len(row.ids), **({"prompt": row.before + row.parts.moved, "new": new} if is_causal else {})}
        if window is not None and sum(needs.values()) > window:
            raise DataError(
                f"{who} needs {sum(needs.values())} tokens ({', '.join(f'{of} {n}' for of, n in needs.items())}); "
                f"{self.backbone.name} has a window of {window}. Shorten one of them."
            )

    def _passes(self, rows: Sequence[_Row], new: Sequence[int]) -> Iterator[list[int]]:
        """Numbers of the rows of each pass: one pass if they fit `pass_tokens`, else like lengths together."""
        sizes = [row.width + more for row, more in zip(rows, new, strict=True)]
        if rows and max(sizes) * len(rows) <= self.pass_tokens:
            yield list(range(len(rows)))
            return
        batch: list[int] = []
        for number in sorted(range(len(rows)), key=lambda at: sizes[at]):
            if batch and sizes[number] * (len(batch) + 1) > self.pass_tokens:
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch

    # --- the model ---

    @cached_property
    def _layers(self) -> list[torch.nn.Module]:
        """The layers that a prompt goes through: of the model, or of its encoder."""
        side = "self" if self.backbone.architecture == "causal" else "encoder"
        names = [_layer_of(site.name) for site in self.bank.workshop.sites[side]]
        return [self.backbone.model.get_submodule(name) for name in dict.fromkeys(names)]

    @contextmanager
    def _attached(self, rows: Sequence[_Row], targets: Sequence[Sequence[int]] | None = None) -> Iterator["_Inputs"]:
        """The model computes with these rows inside the block. A causal model's inputs go on with `targets`."""
        with _computing(self.backbone):
            mixture = Mixture(self.bank.workshop, [row.parts for row in rows])
            is_causal = self.backbone.architecture == "causal"
            inputs = self._causal_inputs(rows, targets) if is_causal else _source_inputs(rows)
            remove = _add_deep(self._layers, rows, inputs.starts)
            try:
                with mixture.attached():
                    yield inputs
            finally:
                remove()

    def _causal_inputs(self, rows: Sequence[_Row], targets: Sequence[Sequence[int]] | None) -> "_Inputs":
        """Word vectors of prompt, text and target, pads on the left."""
        texts = [[*row.ids, *target] for row, target in zip(rows, targets or [()] * len(rows), strict=True)]
        flat = torch.tensor([token for text in texts for token in text], dtype=torch.long, device=self.backbone.device)
        words = torch.split(self.backbone.embed(flat[None])[0], [len(text) for text in texts])
        joined = [
            text if row.prompt is None else torch.cat([row.prompt, text]) for row, text in zip(rows, words, strict=True)
        ]
        vectors = pad_sequence(joined, batch_first=True, padding_side="left")  # (R, T, D)
        width = vectors.shape[1]
        starts = torch.tensor([width - len(one) for one in joined])
        return _Inputs(starts, torch.arange(width) >= starts[:, None], vectors)

    def _next_logits(self, rows: Sequence[_Row], inputs: "_Inputs") -> torch.Tensor:
        """(R, V) logits of what follows, float32."""
        if self.backbone.architecture == "seq2seq":
            encoded = self.backbone.encode([row.ids for row in rows])
            return self.backbone.forward(encoded, [[self.backbone.padding]] * len(rows))[:, 0].float()
        return self._causal_logits(inputs, 1)[:, -1]

    def _causal_logits(self, inputs: "_Inputs", keep: int) -> torch.Tensor:
        """(R, keep or T, V) logits of the last places, float32."""
        model = self.backbone.model
        options: dict[str, Any] = {"logits_to_keep": keep} if takes(model, "logits_to_keep") else {}
        mask = inputs.mask.long().to(self.backbone.device)
        if takes(model, "position_ids"):
            options["position_ids"] = text_positions(mask)
        output = model(inputs_embeds=inputs.vectors, attention_mask=mask, use_cache=False, **options)
        logits: torch.Tensor = output.logits[:, -keep:].float()
        return logits

    def _target_scores(self, rows: Sequence[_Row], inputs: "_Inputs", targets: list[list[int]]) -> torch.Tensor:
        """(R, longest target) log-probabilities; what stands behind a target's end means nothing."""
        if self.backbone.architecture == "seq2seq":
            return -self.backbone.token_losses([row.ids for row in rows], targets)
        longest = max(len(target) for target in targets)
        scores = self._causal_logits(inputs, longest + 1).log_softmax(-1)[:, :-1]  # place t: what follows it
        wanted = pad_sequence([torch.tensor(t) for t in targets], batch_first=True, padding_side="left").to(
            scores.device
        )
        found = scores.gather(2, wanted[:, :, None])[:, :, 0]
        ends = [values[longest - len(target) :] for values, target in zip(found, targets, strict=True)]
        return pad_sequence(ends, batch_first=True)

    def _write(
        self, rows: Sequence[_Row], samplings: Sequence[Sampling], noise: Sequence[torch.Generator]
    ) -> list[Written]:
        ends = self.backbone.end_tokens()
        with self._attached(rows) as inputs:
            start, mask = 0, inputs.mask.long().to(self.backbone.device)
            given: dict[str, Any] = {"inputs_embeds": inputs.vectors, "attention_mask": mask}
            if self.backbone.architecture == "seq2seq":
                from transformers.modeling_outputs import BaseModelOutput

                encoded = self.backbone.encode([row.ids for row in rows])
                start, states = 1, BaseModelOutput(last_hidden_state=encoded.states)
                given = {"encoder_outputs": states, "attention_mask": encoded.mask}
            output = self.backbone.model.generate(
                **given,
                **_PLAIN,
                max_new_tokens=max(sampling.max_tokens for sampling in samplings),
                eos_token_id=sorted(ends) or None,
                pad_token_id=self.backbone.padding,
                logits_processor=LogitsProcessorList([_Sampler(samplings, noise)]),
                stopping_criteria=StoppingCriteriaList([_StopRows(self._decode, samplings, start)]),
            )
        tokens = output.sequences[:, start:]  # (R, steps)
        scores = [step.float().log_softmax(-1) for step in output.logits]  # (R, V) each
        return [
            self._finish(row, tokens[row].tolist(), scores, sampling, ends) for row, sampling in enumerate(samplings)
        ]

    def _finish(
        self, row: int, tokens: list[int], scores: Sequence[torch.Tensor], sampling: Sampling, ends: frozenset[int]
    ) -> Written:
        """Find where the row's text ends; what the batch appended behind is not part of it."""
        tokens = tokens[: sampling.max_tokens]
        count, text, finish = len(tokens), None, "length"
        for place, token in enumerate(tokens):
            shown = tokens[: place + (token not in ends)]
            found = _find_stop(self._decode(shown), sampling.stop) if sampling.stop else None
            if found is not None or token in ends:
                count, finish = place + 1, "stop"
                text = self._decode(shown) if found is None else self._decode(shown)[:found]
                break
        logprobs = [float(scores[place][row, tokens[place]]) for place in range(count)]
        if not np.isfinite(logprobs).all():
            kind = str(self.backbone.model.dtype).removeprefix("torch.")
            raise DataError(f"{self.backbone.name} gives probabilities that are not numbers in {kind}. Use float32.")
        top = []
        for place in range(count if sampling.top else 0):
            values, which = scores[place][row].topk(min(sampling.top, scores[place].shape[-1]))
            top.append(dict(zip(which.tolist(), values.tolist(), strict=True)))
        text = self._decode(tokens[:count]) if text is None else text
        return Written(
            text, tuple(tokens[:count]), tuple(logprobs), "stop" if finish == "stop" else "length", tuple(top)
        )

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(
            self.backbone.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


@dataclass(frozen=True, slots=True)
class _Inputs:
    """How rows lie in the states of a layer that a prompt goes through.

    `starts` (R,): each row's first place, that of its prompt if it has one; `mask` (R, T) bool: where it is; on the
    processor. `vectors` (R, T, D): what a causal model is given.
    """

    starts: torch.Tensor
    mask: torch.Tensor
    vectors: torch.Tensor | None = None


def _source_inputs(rows: Sequence[_Row]) -> _Inputs:
    """Of an encoder-decoder: prompts end together, directly before texts that begin together."""
    longest = max(row.before for row in rows)
    starts = torch.tensor([longest - row.before for row in rows])
    ends = starts + torch.tensor([row.width for row in rows])
    places = torch.arange(int(ends.max()))
    return _Inputs(starts, (places >= starts[:, None]) & (places < ends[:, None]))


@contextmanager
def _computing(backbone: Backbone) -> Iterator[None]:
    """No autograd inside the block, and no weight that has or wants a gradient: asserted."""
    with torch.inference_mode():
        yield
    for name, tensor in backbone.model.named_parameters():
        if tensor.requires_grad or tensor.grad is not None:
            raise AssertionError(f"frozen weight {name} of {backbone.name} has been given a gradient")


def _layer_of(site: str) -> str:
    """The module of a layer from that of its attention: "transformer.h.3.attn" -> "transformer.h.3"."""
    parts = site.split(".")
    number = next(place for place, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: number + 1])


def _add_deep(layers: Sequence[torch.nn.Module], rows: Sequence[_Row], starts: torch.Tensor) -> Callable[[], None]:
    """Add the rows' deep prompts to what enters each layer, once a layer; later calls go on from a cache."""
    deep = [(number, row.deep) for number, row in enumerate(rows) if row.deep is not None]
    if not deep:
        return lambda: None
    values = torch.cat([added for _, added in deep], dim=1)  # (L, all places, D)
    lengths = [added.shape[1] for _, added in deep]
    device = values.device
    row_of = torch.tensor([number for number, _ in deep], device=device).repeat_interleave(
        torch.tensor(lengths, device=device)
    )
    place_in = torch.cat([torch.arange(length, device=device) for length in lengths])
    done: set[int] = set()

    def add_to(layer: int) -> Callable[..., Any]:
        def add(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if layer in done:
                return None
            done.add(layer)
            states = args[0] if args else kwargs["hidden_states"]
            places = starts.to(device)[row_of] + place_in
            states = states.index_put((row_of, places), values[layer].to(states.dtype), accumulate=True)
            return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

        return add

    handles = [module.register_forward_pre_hook(add_to(layer), with_kwargs=True) for layer, module in enumerate(layers)]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


@contextmanager
def _watching(layers: Sequence[torch.nn.Module], seen: list[list[torch.Tensor]], mask: torch.Tensor) -> Iterator[None]:
    """Note the states (tokens, D) that enter each layer, without those of pads: `mask` (R, T)."""

    def note(layer: int) -> Callable[..., None]:
        def see(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            seen[layer].append(states[mask.to(states.device)])

        return see

    handles = [module.register_forward_pre_hook(note(layer), with_kwargs=True) for layer, module in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _clipped_spread(values: torch.Tensor) -> float:
    values = values.float()
    for _ in range(_CLIP_ROUNDS):
        mean, spread = values.mean(), values.std(correction=0)
        values = values[(values - mean).abs() <= _CLIP_AT * spread]
    return float(values.std(correction=0))


class _Sampler(LogitsProcessor):  # type: ignore[misc]
    """Each row's logits, changed so that the largest one is the token that its own sampling draws.

    Gumbel noise from the row's generator: the largest sum is a sample of the softmax. Source: Maddison et al. 2014
    (arXiv 1411.0030), section 2.
    """

    def __init__(self, samplings: Sequence[Sampling], noise: Sequence[torch.Generator]) -> None:
        self._drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
        self._noise = [noise[row] for row in self._drawn]
        self._temperatures = torch.tensor([samplings[row].temperature for row in self._drawn])[:, None]
        self._shares = torch.tensor([samplings[row].top_p for row in self._drawn])[:, None]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self._drawn:
            return scores
        own = scores[self._drawn].float().cpu() / self._temperatures  # (drawn rows, V)
        ordered, order = own.sort(descending=True)
        shares = ordered.softmax(-1)
        # A token stays if those before it have less than the share: the likeliest one always does.
        cut = (shares.cumsum(-1) - shares) >= self._shares
        own = own.masked_fill(torch.zeros_like(cut).scatter(1, order, cut), -torch.inf)
        width = own.shape[-1]
        own -= torch.stack([torch.empty(width).exponential_(generator=one).log() for one in self._noise])
        changed = scores.clone()
        changed[self._drawn] = own.to(scores)
        return changed


class _StopRows(StoppingCriteria):  # type: ignore[misc]
    """Ends a row at its own number of tokens, or as soon as its text holds a string that stops it."""

    def __init__(self, decode: Callable[[Sequence[int]], str], samplings: Sequence[Sampling], start: int) -> None:
        self._decode, self._samplings, self._start = decode, samplings, start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        count = input_ids.shape[1] - self._start
        ended = [
            count >= sampling.max_tokens
            or (
                bool(sampling.stop) and _find_stop(self._decode(row[self._start :].tolist()), sampling.stop) is not None
            )
            for row, sampling in zip(input_ids, self._samplings, strict=True)
        ]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


def _find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the strings begins in a text."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


def row_generator(seed: int, copy: int) -> torch.Generator:
    """Of one text; those of neighbouring seeds have nothing in common, because the seed goes through SplitMix64's mix
    (Steele et al. 2014)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + copy + 1) & (2**64 - 1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & (2**64 - 1)
    return torch.Generator().manual_seed((mixed ^ (mixed >> 31)) >> 1)


def _check_sampling(number: int, sampling: Sampling) -> None:
    wrong = [
        ("max_tokens", sampling.max_tokens, sampling.max_tokens >= 1, "at least 1"),
        ("n", sampling.n, sampling.n >= 1, "at least 1"),
        ("temperature", sampling.temperature, 0 <= sampling.temperature < float("inf"), "a number from 0 on"),
        ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("top", sampling.top, sampling.top >= 0, "at least 0"),
        ("stop", sampling.stop, all(sampling.stop), "without empty strings"),
    ]
    for name, value, is_fine, expected in wrong:
        if not is_fine:
            raise DataError(f"request {number}: {name} is {value}; it must be {expected}.")


def _special_tokens(backbone: Backbone) -> tuple[list[int], list[int]]:
    """What the tokenizer puts in front of and behind a text; nothing behind a causal model's, which is to go on."""
    bare = list(backbone.tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(backbone.tokenizer("a")["input_ids"])
    start = next(place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
    behind = whole[start + len(bare) :] if backbone.architecture == "seq2seq" else []
    return whole[:start], behind


def _values(tensor: torch.Tensor) -> NDArray[np.float32]:
    values: NDArray[np.float32] = tensor.float().cpu().numpy().copy()
    return values
