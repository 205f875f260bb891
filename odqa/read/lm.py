"""The generative reader: a frozen language model reads a prompt with the packed passages and writes the answer.

Any causal or encoder-decoder model behind a `Backbone`. The prompt is made of token PIECES: instruction, every passage
and the question are tokenised apart and concatenated. So a passage costs the same wherever it stands, prices add up
exactly, and what was packed is what the model sees; nothing is truncated here, a prompt of another length than the
packer paid for is refused.

Three ways to read many passages: all in one prompt; in several windows, each a prompt with an answer of its own, joined
by their probabilities; or apart, each in a prompt that is encoded by itself, with one decoder that writes from all
encoder states in a row (Fusion-in-Decoder: Izacard & Grave 2021, arXiv 2007.01282, section 3).

It does not know where passages come from, nor gold answers. What it does to a model's text is in `AnswerRules`, and
nowhere else; `describe` shows all of it. A model's own generation settings (sampling, penalties) are not inherited.
"""

import contextlib
import copy
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.modeling_outputs import BaseModelOutput

from odqa.errors import DataError, RecipeError
from odqa.frozen.backbone import PLAIN_GENERATION, Backbone, frozen_guard, load_backbone, takes
from odqa.frozen.layout import pad_rows, text_positions
from odqa.frozen.method import Method
from odqa.frozen.neural import NeuralRecursion
from odqa.frozen.prefix import prefix_of_prompt
from odqa.frozen.prompt_tuning import PromptTuning
from odqa.models import is_encoder_decoder
from odqa.read.generated import Generation, join_windows
from odqa.read.prompts import (
    AnswerRules,
    ChooseDemonstrations,
    Demonstration,
    Messages,
    Piece,
    Prompt,
    PromptTemplate,
    find_template,
)
from odqa.runtime import progress
from odqa.text import as_written
from odqa.types import Answer, Dropped, Hit, LatentContext, PackedContext, Query, Sample, TokenCosts

T = TypeVar("T")

# How configurations name the longest text they were made for, most common first.
_WINDOW_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
_NO_WINDOW = 10**9  # tokenizers that know no window give a length beyond any model's
_FRAMES = 256  # our choice: frames (prompts without passages) kept as token ids


@dataclass(frozen=True, slots=True)
class _Source:
    """What the model writes an answer from: one prompt, or several that are encoded apart.

    `number` tells the sources of one query from each other.
    """

    query: Query
    prompts: Sequence[list[int]]
    number: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)


@dataclass(frozen=True, slots=True, eq=False)
class _Latent:
    """What a latent context of `reader` stands for: the vectors of its first pass over this context."""

    reader: "LmReader"
    context: PackedContext


class LmReader:
    """Generates an answer from a prompt with all packed passages, or from one with those of each window.

    Windows (`PackedContext.windows`) are joined: P(answer) is the mean over the windows of P(answer | window), so that
    equal answers add up (after SQuAD normalisation). An answer that a window did not write has probability 0 there, and
    a window that abstains has no say in which answer is best (our choice: it may rightly not be there). The probability
    is that of the whole text, not the mean of its tokens: only the former adds up to at most 1, so that sums mean
    something. This is RAG-Sequence with a uniform prior and its "fast decoding" (Lewis et al. 2020, arXiv 2005.11401,
    sections 2.1 and 2.5).

    `passages` "apart" is for encoder-decoders: each passage is encoded in a prompt of its own, pays for its question
    and instruction, and one decoder reads all. Then there are no windows; demonstrations are in every prompt.

    Prompt: `prompt` is a template or the name of one, `demonstrations` (the same for all questions, or a function that
    chooses them for each) are shown before the question, `chat` words it as a conversation by the tokenizer's chat
    template, with `chat_options` for that template.

    Window: `window` tokens; if not given, what the configuration or else the tokenizer says. It is no longer than what
    every method can read. A causal model shares it with the answer (`max_new_tokens`), an encoder-decoder model does
    not. A `method`, or several, are attached for good; what they put into the window, and `reserved` tokens, stay free.
    The window holds a prompt, not all prompts together.

    Decoding: greedy; with `beams` > 1 beam search, ranked by log-probability / length ** `length_penalty` (0.0, our
    choice: by log-probability); with `sample` independent samples (`temperature`, `top_k`, `top_p`; 0 and 1.0 switch
    the latter two off), ranked by log-probability. `candidates` texts are generated a question, equal answers count
    once. The noise of a sample depends on `seed`, the query's id and the number of the sample: not on the batch.
    `batch_size` is the number of texts written at once, over all questions, samples and beams.

    `is_shared`: the backbone has other users, so the method is attached only while this reader writes.

    `score` says what `Answer.score` is: the "sum" of the answer's token log-probabilities or their "mean"; a
    candidate's `logprob` is always the sum. `spelling` "passage" writes an answer as a packed passage or its title has
    it (`odqa.text.as_written`), for models whose vocabulary has no capitals or accents. `guard` checks before and after
    each call of `read` that no weight has changed; this hashes the whole model twice.

    Raises RecipeError for settings that contradict each other or the model.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompt: PromptTemplate | str = "open-book",
        *,
        method: Method | Sequence[Method] | None = None,
        passages: Literal["together", "apart"] = "together",
        demonstrations: Sequence[Demonstration] | ChooseDemonstrations = (),
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
        spelling: Literal["model", "passage"] = "model",
        batch_size: int = 8,
        guard: bool = False,
        is_shared: bool = False,
    ) -> None:
        if backbone.architecture == "encoder":
            raise RecipeError(
                f"reader lm: {backbone.name} is an encoder and cannot write. Use a causal or seq2seq model."
            )
        _check_decoding(candidates, beams, sample, max_new_tokens, batch_size)
        _check_sampling(temperature, top_k, top_p)
        if score not in ("sum", "mean"):
            raise RecipeError(f"reader lm: score is {score!r}; it must be sum or mean.")
        if spelling not in ("model", "passage"):
            raise RecipeError(f"reader lm: spelling is {spelling!r}; it must be model or passage.")
        if passages not in ("together", "apart"):
            raise RecipeError(f"reader lm: passages is {passages!r}; it must be together or apart.")
        if passages == "apart" and backbone.architecture != "seq2seq":
            raise RecipeError(
                f"reader lm: passages: apart needs an encoder-decoder, and {backbone.name} is a causal model. Set "
                "passages: together, or read several windows (packer.windows)."
            )
        self.passages, self.spelling = passages, spelling
        self.backbone = backbone
        self.rules = AnswerRules() if rules is None else rules
        template = find_template(prompt) if isinstance(prompt, str) else prompt
        renderer = _chat_renderer(backbone, chat_options or {}) if chat else None
        self.prompt = Prompt(template, demonstrations if callable(demonstrations) else tuple(demonstrations), renderer)
        methods = [method] if isinstance(method, Method) else list(method or ())
        rooms = [room for one in methods if (room := one.longest_text) is not None]
        self.window = min([_choose_window(backbone, window), *rooms])
        self.candidates, self.beams, self.length_penalty = candidates, beams, length_penalty
        self.sample, self.temperature, self.top_k, self.top_p, self.seed = sample, temperature, top_k, top_p, seed
        self.max_new_tokens, self.batch_size, self.score, self.guard = max_new_tokens, batch_size, score, guard
        answer_room = max_new_tokens if backbone.architecture == "causal" else 0
        self._copies = candidates if sample else 1
        reserved += sum(one.virtual_tokens(backbone) for one in methods)
        self.limit = self.window - answer_room - reserved
        """The longest prompt in tokens."""
        if self.limit < 1:
            raise RecipeError(
                f"reader lm: max_new_tokens {max_new_tokens} and reserved {reserved} leave no room for a prompt in the "
                f"window of {self.window} tokens."
            )
        self.is_shared = is_shared
        if backbone.architecture == "causal":  # a prompt's keys and values are computed once, by the bare model
            methods = [prefix_of_prompt(backbone, one) if isinstance(one, PromptTuning) else one for one in methods]
        self.methods = tuple(methods)
        if not is_shared:
            for one in self.methods:
                one.attach(backbone)
        # A packer asks for prices several times a question; demonstrations are long.
        self._frame = lru_cache(maxsize=_FRAMES)(self._encode_frame)
        # A conversation brings its own special tokens.
        self._prefix, self._suffix = ([], []) if chat else _special_tokens(backbone)
        self._ends = backbone.end_tokens()
        unknown = {backbone.tokenizer.unk_token_id} - self._ends  # stands for rare characters in data
        self._reserved = frozenset(backbone.tokenizer.all_special_ids) - unknown

    def costs(self, query: Query, hits: Sequence[Hit]) -> TokenCosts:
        """Exact prices in tokens; None for a passage that does not fit beside the question even alone.

        Passages that are read apart each pay for a whole prompt, and nothing else is charged. Raises DataError if the
        question alone does not fit the window, RecipeError if the prompt reads no passages.
        """
        before, after = self._frame(query.text)
        frame = len(before) + len(after)
        if frame > self.limit:
            raise DataError(
                f"query {query.id}: the question takes {frame} tokens with its prompt; {self.backbone.name} has room "
                f"for {self.limit} (window of {self.window}). Shorten the question or the demonstrations."
            )
        own = [len(ids) for ids in self._encode([self.prompt.passage(hit.passage) for hit in hits])]
        if self.passages == "together":
            return TokenCosts(frame, tuple(n if frame + n <= self.limit else None for n in own), self.limit)
        whole = tuple(frame + n if frame + n <= self.limit else None for n in own)
        return TokenCosts(0 if hits else frame, whole, None)

    def show(self, hits: Sequence[Hit]) -> str:
        """Packed passages as the prompt words them."""
        return "".join(self.prompt.passage(hit.passage).text for hit in hits).rstrip()

    def read(self, contexts: Sequence[PackedContext]) -> list[Answer]:
        """One answer a context. `candidates` holds the distinct non-empty answers, best first.

        Abstains (empty text) if the best generation is empty after cleaning. Raises ValueError for a context that was
        packed for another prompt, DataError if the model's output is not a number.
        """
        return [
            self._answer(context, generations)
            for context, generations in zip(contexts, self.generate(contexts), strict=True)
        ]

    def generate(self, contexts: Sequence[PackedContext]) -> list[list[Generation]]:
        """What the model writes for each context: `candidates` generations a window, best first, with equal ones."""
        sources: list[_Source] = []
        numbers: list[int] = []  # of the contexts that the sources are from
        for number, context in enumerate(contexts):
            prompts = self.encode(context)
            texts = [prompts] if self.passages == "apart" else [[prompt] for prompt in prompts]
            sources += [_Source(context.query, text, at) for at, text in enumerate(texts)]
            numbers += [number] * len(texts)
        written: list[list[Generation]] = [[] for _ in sources]
        # Neighbours in length share a batch, so that little of it is padding.
        order = sorted(range(len(sources)), key=lambda at: sources[at].tokens)
        guard = frozen_guard(self.backbone) if self.guard else contextlib.nullcontext()
        with guard, self._method_attached(), progress("read", len(sources), "texts") as bar:
            for batch in _chunks(order, max(1, self.batch_size // max(self.beams, self._copies))):
                generated = self._generate([sources[at] for at in batch])
                for at, generations in zip(batch, generated, strict=True):
                    written[at] = generations
                bar.advance(len(batch))
        results: list[list[Generation]] = [[] for _ in contexts]
        for number, generations in zip(numbers, written, strict=True):
            results[number] += generations
        return results

    def encode(self, context: PackedContext) -> list[list[int]]:
        """Token ids of each prompt: one a window, or one a passage that is read apart.

        Together they are exactly `context.tokens`, or ValueError.
        """
        query = context.query
        prompts = self._encode_prompts(context)
        lengths = [len(prompt) for prompt in prompts]
        if sum(lengths) != context.tokens or max(lengths) > self.limit:
            raise ValueError(
                f"query {query.id}: the context says {context.tokens} tokens, its prompts have {sum(lengths)} (the "
                f"longest {max(lengths)}) and the reader room for {self.limit}. Pack it with the costs of this reader."
            )
        return prompts

    def latent(self, contexts: Sequence[PackedContext]) -> list[LatentContext]:
        """See `odqa.stages.GivesVectors`: for a reader whose method is a `NeuralRecursion`.

        The vectors are made when they are read, for a whole batch at once. Raises DataError for a context that leaves
        no room for the method's own, RecipeError for a reader without a connector.
        """
        self._check_connector()
        for context in contexts:
            if (longest := max(len(prompt) for prompt in self._encode_prompts(context))) > self.limit:
                raise DataError(
                    f"query {context.query.id}: a prompt of {longest} tokens leaves no room for the vectors of the "
                    f"second pass ({self.limit} fit). Lower packer.budget."
                )
        return [LatentContext(context.query, _Latent(self, context)) for context in contexts]

    def read_latent(self, contexts: Sequence[LatentContext]) -> list[tuple[Answer, Mapping[str, object]]]:
        """See `odqa.stages.LatentReading`: pass 1, cut after the prompt, the connector, and pass 2 with its answer."""
        packed = []
        for latent in contexts:
            if not isinstance(latent.handle, _Latent) or latent.handle.reader is not self:
                raise ValueError(f"query {latent.query.id}: these vectors are not of this reader")
            packed.append(latent.handle.context)
        connector = self._check_connector()
        answers = self.read(packed)
        return [
            (answer, {"tokens read twice": context.tokens, "vectors": connector.vectors or context.tokens})
            for answer, context in zip(answers, packed, strict=True)
        ]

    def _check_connector(self) -> NeuralRecursion:
        for method in self.methods:
            if isinstance(method, NeuralRecursion):
                return method
        found = " and ".join(f"one of kind {method.kind}" for method in self.methods) or "none"
        raise RecipeError(
            f"reader lm: to read vectors it needs a method of kind {NeuralRecursion.kind}; it has {found}."
        )

    def draw(
        self,
        contexts: Sequence[PackedContext],
        count: int,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[list[Sample]]:
        """`count` samples a window of each context, the likelier ones first; see `odqa.stages.DrawsSamples`."""
        _check_decoding(count, 1, True, self.max_new_tokens, self.batch_size)
        _check_sampling(temperature, 0, top_p)
        drawer = copy.copy(self)
        drawer.sample, drawer.candidates, drawer.beams, drawer._copies = True, count, 1, count
        drawer.temperature, drawer.top_k, drawer.top_p, drawer.seed = temperature, 0, top_p, seed
        return [
            [self._sample(context, generation) for generation in generations]
            for context, generations in zip(contexts, drawer.generate(contexts), strict=True)
        ]

    def show_candidates(self, context: PackedContext, candidates: Sequence[str]) -> PackedContext:
        """See `odqa.stages.ReadsCandidates`; every window shows them all."""
        shown = tuple(dict.fromkeys(text for one in candidates if (text := self.prompt.slot(one))))
        if not shown:
            raise ValueError(f"query {context.query.id}: no candidate has a text")
        made = replace(context, candidates=shown)
        while max(lengths := [len(prompt) for prompt in self._encode_prompts(made)]) > self.limit:
            if made.hits:
                made = _without_lowest(made)
            elif len(made.candidates) > 1:
                made = replace(made, candidates=made.candidates[:-1])
            else:
                raise DataError(
                    f"query {context.query.id}: the question and one candidate take {max(lengths)} tokens with their "
                    f"prompt; {self.backbone.name} has room for {self.limit}. Shorten the question."
                )
        extra = len(lengths) * len(self._encode_candidates(made.candidates))
        tokens = sum(lengths)
        return replace(made, tokens=tokens, budget=max(context.budget + extra, tokens))

    def encode_answer(self, answer: str) -> list[int]:
        """The token ids that a prompt should be continued with to give this answer, the end of the text included."""
        text = self.continuation(answer)
        ids = self.backbone.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return [*ids["input_ids"], min(self._ends)] if self._ends else list(ids["input_ids"])

    def continuation(self, answer: str) -> str:
        """An answer as it follows the prompt: with a blank before it where the prompt ends in words."""
        after_words = self.prompt.chat is None and self.prompt.template.answer and not self._suffix
        return f" {answer}" if after_words else answer

    def describe(self) -> dict[str, object]:
        """Everything that decides an answer besides the weights, as JSON values."""
        template = self.prompt.template
        decoding: dict[str, object] = {"how": "greedy"}
        if self.sample:
            decoding = {"how": "sample", "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
            decoding["seed"] = self.seed
        elif self.beams > 1:
            decoding = {"how": "beams", "beams": self.beams, "length_penalty": self.length_penalty}
        shown = self.prompt.demonstrations
        return {
            "backbone": self.backbone.name,
            "fingerprint": self.backbone.fingerprint,
            "window": self.window,
            "limit": self.limit,
            "prompt": template.name,
            "passages": self.passages,
            "chat": self.prompt.chat is not None,
            "demonstrations": "chosen for each question" if callable(shown) else len(shown),
            "max_new_tokens": self.max_new_tokens,
            "candidates": self.candidates,
            "decoding": decoding,
            "stop": list(self.rules.stop),
            "cleanup": list(self.rules.cleanup),
            "spelling": self.spelling,
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

    def _encode_prompts(self, context: PackedContext) -> list[list[int]]:
        """Token ids of each prompt of a context, unchecked."""
        before, after = self._frame(context.query.text)
        after = [*self._encode_candidates(context.candidates), *after]
        read: list[tuple[Hit, ...]] = context.by_window()
        if self.passages == "apart" and context.hits:
            read = [(hit,) for hit in context.hits]
        prompts = []
        for hits in read:
            passages = self._encode([self.prompt.passage(hit.passage) for hit in hits])
            prompts.append([*before, *(token for passage in passages for token in passage), *after])
        return prompts

    def _encode_candidates(self, candidates: Sequence[str]) -> list[int]:
        """Token ids of the answers of an earlier pass, each tokenised by itself."""
        return [token for piece in self._encode(self.prompt.candidates(candidates)) for token in piece]

    @contextlib.contextmanager
    def _method_attached(self) -> Iterator[None]:
        """Inside the block the backbone computes with this reader's methods."""
        with contextlib.ExitStack() as attached:
            for one in self.methods if self.is_shared else ():
                one.attach(self.backbone)
                attached.callback(one.detach)
            yield

    def _sample(self, context: PackedContext, generation: Generation) -> Sample:
        """A generation as others see it, spelled as this reader's answers are."""
        written = [*(hit.passage.text for hit in context.hits), *(hit.passage.title for hit in context.hits)]
        text = as_written(generation.text, written) if self.spelling == "passage" else generation.text
        return Sample(text, generation.logprob, generation.tokens)

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
    def _generate(self, sources: Sequence[_Source]) -> list[list[Generation]]:
        """One batch. Rows of the batch: the sources, each `candidates` times in a row when sampling.

        Samples of a source share what is computed of its prompt: encoder states, or keys and values.
        """
        is_causal, draws_several = self.backbone.architecture == "causal", self._copies > 1
        encodes = self.passages == "apart" or (draws_several and not is_causal)
        inputs = self._encode_apart(sources) if encodes else self._prompts(sources)
        if is_causal and draws_several and not any(one.reads_source for one in self.methods):
            inputs |= self._shared_cache(sources)
        start = inputs["input_ids"].shape[1] if is_causal else 1
        noise = LogitsProcessorList()
        if self.sample:
            noise = self._sampling(
                [
                    f"{self.seed}:{source.query.id}:{source.number * self._copies + copy}"
                    for source in sources
                    for copy in range(self._copies)
                ]
            )
        output = self.backbone.model.generate(
            **inputs,
            logits_processor=noise,
            stopping_criteria=StoppingCriteriaList([_StopAtText(self, start)]),
            return_dict_in_generate=True,
            output_logits=True,
            **{
                **PLAIN_GENERATION,
                "max_new_tokens": self.max_new_tokens,
                "num_beams": self.beams,
                "length_penalty": self.length_penalty if self.beams > 1 else 1.0,
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
        for source, group in zip(sources, groups, strict=True):
            if not all(math.isfinite(generation.logprob) for generation in group):
                raise DataError(
                    f"query {source.query.id}: {self.backbone.name} gives probabilities that are not numbers in "
                    f"{str(self.backbone.model.dtype).removeprefix('torch.')}. Use dtype: float32."
                )
            if self.sample:
                group.sort(key=lambda generation: -generation.logprob)
        return groups

    def _prompts(self, sources: Sequence[_Source]) -> dict[str, Any]:
        """Token ids and mask of sources with one prompt each: (rows, T)."""
        left = self.backbone.architecture == "causal"
        ids, mask = pad_rows([source.prompts[0] for source in sources], self._padding(), "left" if left else "right")
        return {"input_ids": self._rows(ids), "attention_mask": self._rows(mask)}

    def _shared_cache(self, sources: Sequence[_Source]) -> dict[str, Any]:
        """Keys and values of all but the last token of each prompt, computed once and repeated for its samples."""
        ids, mask = pad_rows([source.prompts[0] for source in sources], self._padding(), "left")
        if ids.shape[1] < 2:
            return {}
        ids, mask = ids.to(self.backbone.device), mask.to(self.backbone.device)
        positions = {"position_ids": text_positions(mask)[:, :-1]} if takes(self.backbone.model, "position_ids") else {}
        output = self.backbone.model(
            input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True, return_dict=True, **positions
        )
        output.past_key_values.batch_repeat_interleave(self._copies)
        return {"past_key_values": output.past_key_values}

    def _encode_apart(self, sources: Sequence[_Source]) -> dict[str, Any]:
        """Encoder states (rows, T, D) and mask (rows, T): those of a source's prompts, one behind the other.

        Padding between prompts is taken out, so that states do not depend on what was encoded in one batch.
        """
        prompts = [prompt for source in sources for prompt in source.prompts]
        states: dict[int, torch.Tensor] = {}
        for batch in _chunks(sorted(range(len(prompts)), key=lambda at: len(prompts[at])), self.batch_size):
            encoded = self.backbone.encode([prompts[at] for at in batch])
            for at, found, mask in zip(batch, encoded.states, encoded.mask, strict=True):
                states[at] = found[mask.bool()]
        of_prompt = (states[at] for at in range(len(prompts)))
        joined = [torch.cat([next(of_prompt) for _ in source.prompts]) for source in sources]
        mask = pad_sequence([one.new_ones(len(one), dtype=torch.long) for one in joined], batch_first=True)
        output = BaseModelOutput(last_hidden_state=self._rows(pad_sequence(joined, batch_first=True)))
        return {"encoder_outputs": output, "attention_mask": self._rows(mask)}

    def _rows(self, values: torch.Tensor) -> torch.Tensor:
        """(sources, ...) -> (rows, ...), on the model's device: each source as often as it is sampled."""
        return values.repeat_interleave(self._copies, dim=0).to(self.backbone.device)

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

    def _answer(self, context: PackedContext, generations: Sequence[Generation]) -> Answer:
        """Join what the windows say; see the class."""
        windows = list(_chunks(generations, self.candidates))
        read = [context.hits] if self.passages == "apart" else context.by_window()
        return join_windows(context, windows, read=read, spelling=self.spelling, score=self.score)

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
    return load_backbone(name, "seq2seq" if is_encoder_decoder(name) else "causal", **options)


def _without_lowest(context: PackedContext) -> PackedContext:
    """The context without its lowest ranked passage."""
    ranks = context.ranks or tuple(range(1, len(context.hits) + 1))
    at = ranks.index(max(ranks))
    dropped = Dropped(context.hits[at].passage.id, "does not fit", 0)
    left = [number for number in range(len(ranks)) if number != at]
    return replace(
        context,
        hits=tuple(context.hits[number] for number in left),
        ranks=tuple(context.ranks[number] for number in left) if context.ranks else (),
        windows=tuple(context.windows[number] for number in left) if context.windows else (),
        dropped=(*context.dropped, dropped),
    )


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
