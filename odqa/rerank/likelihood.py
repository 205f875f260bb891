"""Re-ranking with a frozen language model and no training: how likely is the question, given the passage?

    s(q, p) = 1/|q| sum over t of log P(q_t | q_<t, p, instruction)          nats a token

Unsupervised passage re-ranking (UPR): Sachan et al. 2022, arXiv 2204.07496, with the wording of the authors' code. Any
causal or encoder-decoder language model. How the passages were found counts only if `retriever_weight` says so.
"""

import string
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, cast

import torch

from odqa.errors import DataError, RecipeError
from odqa.frozen.backbone import load_backbone
from odqa.models import is_encoder_decoder
from odqa.rerank.models import Pair, Row
from odqa.rerank.pairs import PairReranker
from odqa.runtime import Recent
from odqa.types import Passage, Query

PROMPT = "Passage: {title} {text}. Please write a question based on this passage."
_QUESTIONS = 256  # our choice: questions kept as token ids; all passages of a question come together
_DEFAULT_TOKENS = 512  # if neither tokenizer nor configuration says the window: what the authors cut at
_NO_WINDOW = 10**9  # tokenizers that know no window give a length beyond any model's


class QuestionLikelihoodReranker(PairReranker):
    """Scores passages by the mean log-probability of the question's tokens; see `PairReranker` for the other settings.

    `model` is a folder or hub name; `architecture` None takes what its configuration says. `prompt` words the passage
    and the instruction, with the fields {text} and perhaps {title} (of an untitled passage it goes with the blank
    behind it). Scores are nats a token, at most 0; they compare between the passages of one question.

    `max_tokens` (None: the model's window) bounds what one forward pass reads: of a causal model prompt and question,
    of an encoder-decoder the prompt. A longer passage loses its end; instruction and question stay whole.
    `load_options` go to `from_pretrained`.

    Raises DataError for a model that does not load, RecipeError for a prompt without {text} or with unknown fields, or
    for a `max_tokens` beyond the window.
    """

    def __init__(
        self,
        model: str,
        *,
        architecture: Literal["causal", "seq2seq"] | None = None,
        prompt: str = PROMPT,
        depth: int | None = None,
        retriever_weight: float = 0.0,
        max_tokens: int | None = None,
        batch_tokens: int | None = None,
        memory: Recent[tuple[str, Passage], float] | None = None,
        device: str = "auto",
        dtype: str = "auto",
        **load_options: Any,
    ) -> None:
        super().__init__(
            "likelihood", depth=depth, retriever_weight=retriever_weight, batch_tokens=batch_tokens, memory=memory
        )
        self.model = QuestionScorer(
            model,
            architecture=architecture,
            prompt=prompt,
            max_tokens=max_tokens,
            device=device,
            dtype=dtype,
            **load_options,
        )


class QuestionScorer:
    """A frozen language model as a `PairScorer`.

    A row's `input_ids` are all tokens of the pair, the question's last; `question` is how many of them are the
    question's. A causal model reads "PROMPT QUESTION" as one text. An encoder-decoder reads the prompt and is scored on
    the question with the token that ends it, as in the authors' code.
    """

    def __init__(
        self,
        name: str,
        *,
        architecture: Literal["causal", "seq2seq"] | None = None,
        prompt: str = PROMPT,
        max_tokens: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        **load_options: Any,
    ) -> None:
        _check_prompt(prompt)
        self.name, self.prompt = name, prompt
        architecture = architecture or ("seq2seq" if is_encoder_decoder(name) else "causal")
        self.backbone = load_backbone(name, architecture, device=device, dtype=dtype, **load_options)
        self.is_causal = architecture == "causal"
        self._before, self._behind = _special_tokens(self.backbone.tokenizer)
        self._empty = self._wording(Passage("", ""), "")
        self._least = len(self._prompts([self._empty])[0])
        self.window = _window(self.backbone.window, self.backbone.tokenizer)
        if max_tokens is not None and max_tokens > self.window:
            raise RecipeError(
                f"reranker likelihood: max_tokens is {max_tokens}, but {name} reads at most {self.window}."
            )
        self.max_tokens = max_tokens or self.window
        self.dtype = cast(torch.dtype, self.backbone.model.dtype)
        self._question = lru_cache(maxsize=_QUESTIONS)(self._encode_question)

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def encode(self, pairs: Sequence[Pair]) -> tuple[list[Row], int]:
        """See `PairScorer.encode`."""
        prompts = self._prompts([self._wording(passage, passage.text) for _, passage in pairs])
        rows: list[Row] = []
        cut = 0
        for (query, passage), prompt in zip(pairs, prompts, strict=True):
            question = self._question(query.text)
            room = self._room(query, len(question))
            if len(prompt) > room:
                prompt = self._shortened(query, passage, room)
                cut += 1
            rows.append({"input_ids": [*prompt, *question], "question": [len(question)]})
        return rows, cut

    @torch.inference_mode()
    def scores(self, rows: Sequence[Row]) -> list[float]:
        """See `PairScorer.scores`; a question without tokens is as likely after any passage: 0.0."""
        lengths = [row["question"][0] for row in rows]
        sources = [row["input_ids"][: len(row["input_ids"]) - n] for row, n in zip(rows, lengths, strict=True)]
        targets = [row["input_ids"][len(row["input_ids"]) - n :] for row, n in zip(rows, lengths, strict=True)]
        if not any(lengths):
            return [0.0] * len(rows)
        losses = self.backbone.token_losses(sources, targets).sum(dim=1).tolist()  # (B,) nats
        return [-loss / max(1, n) for loss, n in zip(losses, lengths, strict=True)]

    def _wording(self, passage: Passage, text: str) -> str:
        prompt = self.prompt if passage.title else self.prompt.replace("{title} ", "")
        return prompt.format(title=passage.title, text=text)  # braces in a value stay as they are

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids without special tokens; in data the text of one is text."""
        if not texts:
            return []
        encoded = self.backbone.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return [list(row) for row in encoded["input_ids"]]

    def _prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids, with what the tokenizer puts around a text; nothing behind a causal model's, which is to go on."""
        behind = [] if self.is_causal else self._behind
        return [[*self._before, *ids, *behind] for ids in self._encode(texts)]

    def _encode_question(self, text: str) -> list[int]:
        """The question's own tokens: as a prompt goes on with them, or as a decoder writes them, with an end."""
        if not self.is_causal:
            return [*self._encode([text])[0], *self._behind]
        before, whole = self._encode([self._empty, f"{self._empty} {text}"])
        common = next((at for at, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        return whole[common:]

    def _room(self, query: Query, question: int) -> int:
        """Tokens that a prompt may have beside a question. Raises DataError if the question leaves no room."""
        used = question if self.is_causal else 0
        if used + self._least >= self.max_tokens or question > self.window:
            raise DataError(
                f"query {query.id}: the question takes {question} tokens, {self.name} reads at most {self.max_tokens} "
                "together with a passage. Shorten the question."
            )
        return self.max_tokens - used

    def _shortened(self, query: Query, passage: Passage, room: int) -> list[int]:
        """The prompt with as many characters of the passage as fit into `room` tokens."""

        def prompt(characters: int) -> list[int]:
            return self._prompts([self._wording(passage, passage.text[:characters])])[0]

        kept = bisect_right(range(len(passage.text)), room, key=lambda n: len(prompt(n))) - 1
        if kept < 0:
            raise DataError(
                f"query {query.id}, passage {passage.id}: its title and the question leave no room for its text in the "
                f"{self.max_tokens} tokens that {self.name} reads."
            )
        return prompt(kept)


def _check_prompt(prompt: str) -> None:
    """Raises RecipeError for a prompt without {text}, or with anything but it and {title} in braces."""
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None]
    except ValueError as error:
        raise RecipeError(f"reranker likelihood: prompt: {error}. Write {{{{ and }}}} for braces.") from error
    if unknown := sorted(set(fields) - {"title", "text"}):
        raise RecipeError(f"reranker likelihood: prompt: {{{unknown[0]}}} is not a field (title, text).")
    if "text" not in fields:
        raise RecipeError(f"reranker likelihood: prompt: {prompt!r} does not contain {{text}}.")


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts in front of and behind a text."""
    bare, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    start = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def _window(stated: int | None, tokenizer: Any) -> int:
    """The longest text in tokens that configuration and tokenizer both allow."""
    windows = [int(tokenizer.model_max_length)] if tokenizer.model_max_length < _NO_WINDOW else []
    return min(windows + ([stated] if stated is not None else []), default=_DEFAULT_TOKENS)
