"""The generative reader: a frozen language model reads a prompt with the packed passages and writes the answer.

Any causal or encoder-decoder model behind a `Backbone`. The prompt is made of token PIECES: instruction, every passage
and the question are tokenised apart and concatenated. So a passage costs the same wherever it stands, prices add up
exactly, and what was packed is what the model sees; nothing is truncated here, a prompt of another length than the
packer paid for is refused.

It does not know where passages come from, nor gold answers. What it does to a model's text is in `AnswerRules`, and
nowhere else; `describe` shows all of it. A model's own generation settings (sampling, penalties) are not inherited.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar

import torch
from transformers import AutoConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from odqa.errors import DataError, RecipeError
from odqa.frozen.backbone import Backbone, frozen_guard, load_backbone
from odqa.models import embedded_folder
from odqa.read.prompts import AnswerRules, Demonstration, Messages, Piece, Prompt, PromptTemplate, find_template
from odqa.runtime import progress
from odqa.types import Answer, Candidate, Hit, PackedContext, Query, TokenCosts

T = TypeVar("T")

# How configurations name the longest text they were made for, most common first.
_WINDOW_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
_NO_WINDOW = 10**9  # tokenizers that know no window give a length beyond any model's
_FRAMES = 256  # our choice: frames (prompts without passages) kept as token ids
# Everything a model's own generation settings may ask for and this reader does not do unless told to.
_PLAIN: Mapping[str, Any] = {
    "do_sample": False,
    "early_stopping": False,
    "min_new_tokens": 0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
}


@dataclass(frozen=True, slots=True)
class Generation:
    """One text that the model wrote: as it came (`raw`), cleaned (`text`), and what ended it (`stop`).

    `stop` is the stop string, "end of text", or "max_new_tokens" for a text that was cut off. `tokens` counts the
    generated tokens with the one that ended the text. `logprob` is their log-probability in nats under the model as it
    is (no temperature, no top-k or top-p).
    """

    text: str
    raw: str
    stop: str
    tokens: int
    logprob: float

    @property
    def mean_logprob(self) -> float:
        """Nats a token."""
        return self.logprob / self.tokens


class LmReader:
    """Reads all packed passages in one prompt and generates an answer.

    Prompt: `prompt` is a template or the name of one, `demonstrations` are shown before the question, `chat` words it
    as a conversation by the tokenizer's chat template, with `chat_options` for that template.

    Window: `window` tokens, if not given what the configuration or else the tokenizer says. A causal model shares it
    with the answer (`max_new_tokens`), an encoder-decoder model does not. `reserved` tokens stay free for what a method
    puts in front of the text.

    Decoding: greedy; with `beams` > 1 beam search, ranked by log-probability / length ** `length_penalty` (0.0, our
    choice: by log-probability); with `sample` independent samples (`temperature`, `top_k`, `top_p`; 0 and 1.0 switch
    the latter two off), ranked by log-probability. `candidates` texts are generated a question, equal answers count
    once. The noise of a sample depends on `seed`, the query's id and the number of the sample: not on the batch.
    `batch_size` is the number of texts written at once, over all questions, samples and beams.

    `score` says what `Answer.score` is: the "sum" of the answer's token log-probabilities or their "mean"; a
    candidate's `logprob` is always the sum. `guard` checks before and after each call of `read` that no weight has
    changed; this hashes the whole model twice.

    Raises RecipeError for settings that contradict each other or the model.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompt: PromptTemplate | str = "open-book",
        *,
        demonstrations: Sequence[Demonstration] = (),
        chat: bool = False,
        chat_options: Mapping[str, Any] | None = None,
        window: int | None = None,
        reserved: int = 0,
        max_new_tokens: int = 32,
        candidates: int = 1,
        beams: int = 1,
        length_penalty: float = 0.0,
        sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        rules: AnswerRules | None = None,
        score: Literal["sum", "mean"] = "sum",
        batch_size: int = 8,
        guard: bool = False,
    ) -> None:
        if backbone.architecture == "encoder":
            raise RecipeError(
                f"reader lm: {backbone.name} is an encoder and cannot write. Use a causal or seq2seq model."
            )
        _check_decoding(candidates, beams, sample, max_new_tokens, batch_size)
        _check_sampling(temperature, top_k, top_p)
        if score not in ("sum", "mean"):
            raise RecipeError(f"reader lm: score is {score!r}; it must be sum or mean.")
        self.backbone = backbone
        self.rules = AnswerRules() if rules is None else rules
        template = find_template(prompt) if isinstance(prompt, str) else prompt
        renderer = _chat_renderer(backbone, chat_options or {}) if chat else None
        self.prompt = Prompt(template, tuple(demonstrations), renderer)
        self.window = _choose_window(backbone, window)
        self.candidates, self.beams, self.length_penalty = candidates, beams, length_penalty
        self.sample, self.temperature, self.top_k, self.top_p, self.seed = sample, temperature, top_k, top_p, seed
        self.max_new_tokens, self.batch_size, self.score, self.guard = max_new_tokens, batch_size, score, guard
        answer_room = max_new_tokens if backbone.architecture == "causal" else 0
        self._copies = candidates if sample else 1
        self.limit = self.window - answer_room - reserved
        """The longest prompt in tokens."""
        if self.limit < 1:
            raise RecipeError(
                f"reader lm: max_new_tokens {max_new_tokens} and reserved {reserved} leave no room for a prompt in the "
                f"window of {self.window} tokens."
            )
        # A packer asks for prices several times a question; demonstrations are long.
        self._frame = lru_cache(maxsize=_FRAMES)(self._encode_frame)
        # A conversation brings its own special tokens.
        self._prefix, self._suffix = ([], []) if chat else _special_tokens(backbone)
        self._ends = _end_tokens(backbone)
        unknown = {backbone.tokenizer.unk_token_id} - self._ends  # stands for rare characters in data
        self._reserved = frozenset(backbone.tokenizer.all_special_ids) - unknown

    def costs(self, query: Query, hits: Sequence[Hit]) -> TokenCosts:
        """Exact prices in tokens; None for a passage that does not fit beside the question even alone.

        Raises DataError if the question alone does not fit the window, RecipeError if the prompt reads no passages.
        """
        before, after = self._frame(query.text)
        fixed = len(before) + len(after)
        if fixed > self.limit:
            raise DataError(
                f"query {query.id}: the question takes {fixed} tokens with its prompt; {self.backbone.name} has room "
                f"for {self.limit} (window of {self.window}). Shorten the question or the demonstrations."
            )
        prices = [len(ids) for ids in self._encode([self.prompt.passage(hit.passage) for hit in hits])]
        return TokenCosts(fixed, tuple(price if fixed + price <= self.limit else None for price in prices), self.limit)

    def show(self, hits: Sequence[Hit]) -> str:
        """Packed passages as the prompt words them."""
        return "".join(self.prompt.passage(hit.passage).text for hit in hits).rstrip()

    def read(self, contexts: Sequence[PackedContext]) -> list[Answer]:
        """One answer a context. `candidates` holds the distinct non-empty answers, best first.

        Abstains (empty text) if the best generation is empty after cleaning. Raises ValueError for a context that was
        packed for another prompt, DataError if the model's output is not a number.
        """
        return [
            self._answer(context.query, generations)
            for context, generations in zip(contexts, self.generate(contexts), strict=True)
        ]

    def generate(self, contexts: Sequence[PackedContext]) -> list[list[Generation]]:
        """What the model writes for each context: `candidates` generations, best first, equal ones included."""
        prompts = [self.encode(context) for context in contexts]
        # Neighbours in length share a batch, so that little of it is padding.
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        results: list[list[Generation]] = [[] for _ in prompts]
        guard = frozen_guard(self.backbone) if self.guard else contextlib.nullcontext()
        with guard, progress("read", len(prompts), "questions") as bar:
            for batch in _chunks(order, max(1, self.batch_size // max(self.beams, self._copies))):
                queries = [contexts[number].query for number in batch]
                generated = self._generate(queries, [prompts[number] for number in batch])
                for number, generations in zip(batch, generated, strict=True):
                    results[number] = generations
                bar.advance(len(batch))
        return results

    def encode(self, context: PackedContext) -> list[int]:
        """The token ids of the prompt: exactly `context.tokens` of them, or ValueError."""
        query = context.query
        before, after = self._frame(query.text)
        passages = self._encode([self.prompt.passage(hit.passage) for hit in context.hits])
        ids = [*before, *(token for passage in passages for token in passage), *after]
        if len(ids) != context.tokens or len(ids) > self.limit:
            raise ValueError(
                f"query {query.id}: the context says {context.tokens} tokens, its prompt has {len(ids)} and the reader "
                f"room for {self.limit}. Pack it with the costs of this reader."
            )
        return ids

    def describe(self) -> dict[str, object]:
        """Everything that decides an answer besides the weights, as JSON values."""
        template = self.prompt.template
        decoding: dict[str, object] = {"how": "greedy"}
        if self.sample:
            decoding = {"how": "sample", "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
            decoding["seed"] = self.seed
        elif self.beams > 1:
            decoding = {"how": "beams", "beams": self.beams, "length_penalty": self.length_penalty}
        return {
            "backbone": self.backbone.name,
            "fingerprint": self.backbone.fingerprint,
            "window": self.window,
            "limit": self.limit,
            "prompt": template.name,
            "chat": self.prompt.chat is not None,
            "demonstrations": len(self.prompt.demonstrations),
            "max_new_tokens": self.max_new_tokens,
            "candidates": self.candidates,
            "decoding": decoding,
            "stop": list(self.rules.stop),
            "cleanup": list(self.rules.cleanup),
            "abstain": list(self.rules.abstain),
        }

    def _encode_frame(self, question: str) -> tuple[list[int], list[int]]:
        """Token ids before and behind the passages, with what the tokenizer puts at both ends."""
        before, after = self.prompt.before(question), self.prompt.after(question)
        ids = self._encode([*before, *after])
        return (
            [*self._prefix, *(token for piece in ids[: len(before)] for token in piece)],
            [*(token for piece in ids[len(before) :] for token in piece), *self._suffix],
        )

    def _encode(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """Token ids of each piece by itself.

        In data the text of a special token, such as `</s>`, is text, or nothing where the vocabulary has no other way
        to write it (unigram models match it as a whole): a passage cannot end the prompt.
        """
        ids: list[list[int]] = [[] for _ in pieces]
        for is_control in (False, True):
            numbers = [number for number, piece in enumerate(pieces) if piece.is_control is is_control]
            if numbers:
                texts = [pieces[number].text for number in numbers]
                encoded = self.backbone.tokenizer(
                    texts, add_special_tokens=False, split_special_tokens=not is_control, verbose=False
                )["input_ids"]
                for number, tokens in zip(numbers, encoded, strict=True):
                    ids[number] = [token for token in tokens if is_control or token not in self._reserved]
        return ids

    @torch.inference_mode()
    def _generate(self, queries: Sequence[Query], prompts: Sequence[list[int]]) -> list[list[Generation]]:
        """One batch. Rows of the batch: the prompts, each `candidates` times in a row when sampling."""
        rows = [prompt for prompt in prompts for _ in range(self._copies)]
        ids, mask = _pad(rows, self._padding(), left=self.backbone.architecture == "causal")  # (rows, T) each
        start = ids.shape[1] if self.backbone.architecture == "causal" else 1
        noise = LogitsProcessorList()
        if self.sample:
            names = [f"{self.seed}:{query.id}:{number}" for query in queries for number in range(self._copies)]
            noise = self._sampling(names)
        output = self.backbone.model.generate(
            input_ids=ids.to(self.backbone.device),
            attention_mask=mask.to(self.backbone.device),
            logits_processor=noise,
            stopping_criteria=StoppingCriteriaList([_StopAtText(self, start)]),
            return_dict_in_generate=True,
            output_logits=True,
            **{
                **_PLAIN,
                "max_new_tokens": self.max_new_tokens,
                "num_beams": self.beams,
                "length_penalty": self.length_penalty,
                "num_return_sequences": 1 if self.sample else self.candidates,
                "eos_token_id": sorted(self._ends) or None,
                "pad_token_id": self._padding(),
            },
        )
        generated = output.sequences[:, start:]  # (rows or prompts * candidates, at most max_new_tokens)
        logprobs = _token_logprobs(generated, output.logits, output.get("beam_indices"))
        finished = [
            self._finish(tokens, values) for tokens, values in zip(generated.tolist(), logprobs.tolist(), strict=True)
        ]
        groups = list(_chunks(finished, self.candidates))
        for query, group in zip(queries, groups, strict=True):
            if not all(math.isfinite(generation.logprob) for generation in group):
                raise DataError(
                    f"query {query.id}: {self.backbone.name} gives probabilities that are not numbers in "
                    f"{str(self.backbone.model.dtype).removeprefix('torch.')}. Use dtype: float32."
                )
            if self.sample:
                group.sort(key=lambda generation: -generation.logprob)
        return groups

    def _finish(self, tokens: Sequence[int], logprobs: Sequence[float]) -> Generation:
        """Find where the row's text ends; what the batch appended behind is not part of it."""
        raw, stop, count = "", "max_new_tokens", 0
        for count, token in enumerate(tokens, start=1):
            if token in self._ends:
                stop = "end of text"
                break
            raw = self._decode(tokens[:count])
            if found := self.rules.find_stop(raw):
                stop = found[1]
                break
        return Generation(self.rules.clean(raw), raw, stop, count, sum(logprobs[:count]))

    def _answer(self, query: Query, generations: Sequence[Generation]) -> Answer:
        best = generations[0]
        distinct: dict[str, float] = {}
        for generation in generations:
            if generation.text:
                distinct.setdefault(generation.text, generation.logprob)
        return Answer(
            query.id,
            best.text,
            best.logprob if self.score == "sum" else best.mean_logprob,
            tuple(Candidate(text, logprob) for text, logprob in distinct.items()),
        )

    def _sampling(self, names: Sequence[str]) -> LogitsProcessorList:
        warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(self.temperature)] if self.temperature != 1.0 else []
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        return LogitsProcessorList([*warpers, _GumbelNoise(names)])

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self.backbone.tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def _padding(self) -> int:
        """Some models have no padding token; any does, because the mask hides it."""
        pad = self.backbone.tokenizer.pad_token_id
        return int(pad) if pad is not None else min(self._ends, default=0)


def load_lm(name: str, **options: Any) -> Backbone:
    """Load a causal or encoder-decoder LM, whichever its configuration says, from a folder or hub name.

    `options` are those of `load_backbone`: device, dtype, and what `from_pretrained` takes (device_map,
    quantization_config). Raises DataError for a model that is not there.
    """
    try:
        config = AutoConfig.from_pretrained(embedded_folder(name) or name)
    except (OSError, ValueError) as error:
        raise DataError(f"model {name!r} does not load: {str(error).splitlines()[0]}") from error
    return load_backbone(name, "seq2seq" if config.is_encoder_decoder else "causal", **options)


class _StopAtText(StoppingCriteria):  # type: ignore[misc]
    """Ends a row as soon as its text holds a stop string where `AnswerRules` lets one count."""

    def __init__(self, reader: LmReader, start: int) -> None:
        self._reader, self._start = reader, start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        rules = self._reader.rules
        texts = [self._reader._decode(row) for row in input_ids[:, self._start :].tolist()] if rules.stop else []
        ended = [rules.find_stop(text) is not None for text in texts] or [False] * len(input_ids)
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


class _GumbelNoise(LogitsProcessor):  # type: ignore[misc]
    """Adds Gumbel noise to the logits, one named generator a row: the largest sum is an exact sample of the softmax.

    So a row's sample does not depend on its neighbours, and torch's global generator is left alone.
    Source: Gumbel 1954; Maddison et al. 2014 (arXiv 1411.0030), section 2.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._generators = [torch.Generator().manual_seed(_seed(name)) for name in names]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        width = scores.shape[-1]
        noise = torch.stack([-torch.empty(width).exponential_(generator=one).log() for one in self._generators])
        return scores + noise.to(scores.device)  # (rows, V)


def _seed(name: str) -> int:
    """A generator's seed from its name, 63 bits."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def _token_logprobs(tokens: torch.Tensor, logits: Sequence[torch.Tensor], beams: torch.Tensor | None) -> torch.Tensor:
    """Log-probability of each generated token in nats: (rows, steps).

    `tokens` (rows, steps) are what was generated, `logits` has (rows or all beams, V) for each step, and `beams`
    (rows, steps) says which row of the logits a token came from (-1 behind the end; None: its own).
    """
    columns = []
    for step in range(tokens.shape[1]):
        scores = logits[step].float()
        if beams is not None:
            scores = scores[beams[:, step].clamp(min=0)]
        columns.append(scores.log_softmax(-1).gather(1, tokens[:, step : step + 1]))
    return torch.cat(columns, dim=1)


def _pad(rows: Sequence[Sequence[int]], padding: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, (rows, longest) each: 1 where there is text."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), padding)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[number, place] = torch.tensor(row)
        mask[number, place] = 1
    return ids, mask


def _chunks(items: Sequence[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _choose_window(backbone: Backbone, asked: int | None) -> int:
    """The window in tokens: the one asked for, the configuration's, the tokenizer's, in this order."""
    config = backbone.model.config.get_text_config()
    known = next((value for name in _WINDOW_NAMES if isinstance(value := getattr(config, name, None), int)), None)
    if asked is not None:
        if known is not None and asked > known:
            raise RecipeError(f"reader lm: window is {asked}, but {backbone.name} was made for at most {known} tokens.")
        return asked
    if known is not None:
        return known
    stated = backbone.tokenizer.model_max_length
    if stated < _NO_WINDOW:
        return int(stated)
    raise RecipeError(
        f"reader lm: neither the configuration nor the tokenizer of {backbone.name} says its window. Set window."
    )


def _special_tokens(backbone: Backbone) -> tuple[list[int], list[int]]:
    """What the tokenizer puts in front of and behind a text; nothing behind a causal model's, which is to go on."""
    tokenizer = backbone.tokenizer
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    start = next(place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
    behind = whole[start + len(bare) :] if backbone.architecture == "seq2seq" else []
    return whole[:start], behind


def _end_tokens(backbone: Backbone) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's and those of the model's generation settings."""
    stated = getattr(backbone.model.generation_config, "eos_token_id", None)
    ends = stated if isinstance(stated, list) else [stated]
    return frozenset(int(token) for token in [*ends, backbone.tokenizer.eos_token_id] if token is not None)


def _chat_renderer(backbone: Backbone, options: Mapping[str, Any]) -> Any:
    tokenizer = backbone.tokenizer
    if not tokenizer.chat_template:
        raise RecipeError(f"reader lm: the tokenizer of {backbone.name} has no chat template. Set chat: false.")

    def render(messages: Messages) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options))

    return render


def _check_decoding(candidates: int, beams: int, sample: bool, max_new_tokens: int, batch_size: int) -> None:
    counts = {"candidates": candidates, "beams": beams, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    for name, value in counts.items():
        if value < 1:
            raise RecipeError(f"reader lm: {name} is {value}; it must be at least 1.")
    if sample and beams > 1:
        raise RecipeError("reader lm: sample and beams exclude each other. Set beams: 1 or sample: false.")
    if not sample and candidates > beams:
        raise RecipeError(
            f"reader lm: {candidates} candidates need at least as many beams (there are {beams}) or sample: true."
        )


def _check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    if temperature <= 0:
        raise RecipeError(f"reader lm: temperature is {temperature}; it must be above 0 (greedy is sample: false).")
    if top_k < 0:
        raise RecipeError(f"reader lm: top_k is {top_k}; it must be at least 0 (0: all tokens).")
    if not 0 < top_p <= 1:
        raise RecipeError(f"reader lm: top_p is {top_p}; it must be above 0 and at most 1 (1: all tokens).")
