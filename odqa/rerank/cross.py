"""Re-ranking with a cross-encoder: one model reads question and passage together and gives the pair a score.

Any sequence-classification model that transformers loads, from a folder or hub name. It does not know how the passages
were found: their old scores do not enter the new ones.

Source: Nogueira & Cho 2019 (arXiv 1901.04085), the model; scores equal those of sentence-transformers' CrossEncoder
before its activation. The invariant: the passages that come in are the passages that go out.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from odqa.errors import DataError, RecipeError
from odqa.runtime import choose_device, choose_dtype, progress
from odqa.types import Hit, Query

_PAIRS_AT_ONCE = 8192  # our choice: pairs tokenised and sorted together; bounds memory, loses little of the sorting
_ROUND_TO = 16  # rows are padded to a multiple of this: with ever-changing shapes the processor's memory grows
_DEFAULT_TOKENS = 512  # if neither tokenizer nor configuration says the window: that of BERT
_NO_WINDOW = 10**9

_log = logging.getLogger(__name__)


class CrossEncoderReranker:
    """Scores (question, passage) pairs with the model in `model`.

    Score: the logit of a model with one label; with two labels the log-odds of `positive_label`, which order the
    passages as its probability does. Higher is better; scores of different models do not compare.

    Only the first `depth` hits of a query are scored (None: all); the others follow behind in their old order, with
    their old scores and sources, so scores do not compare across that border.

    `title_separator` stands between title and text; None leaves titles out. A pair longer than `max_tokens` (None: the
    model's window) loses the end of its passage, never a part of its question; each call logs how many were cut.

    Batches hold pairs of similar length of all queries, at most `batch_tokens` tokens with padding. `dtype` "auto" is
    bfloat16 where that is fast; the last layer stays in float32, so that close passages do not tie.

    Raises DataError for a model that does not load or has no trained classification head, RecipeError for one with
    another number of labels.
    """

    def __init__(
        self,
        model: str,
        *,
        depth: int | None = None,
        title_separator: str | None = " ",
        max_tokens: int | None = None,
        positive_label: int = 1,
        batch_tokens: int = 16384,
        device: str = "auto",
        dtype: str = "auto",
        **load_options: Any,
    ) -> None:
        if depth is not None and depth < 1:
            raise RecipeError(f"reranker cross: depth is {depth}; it must be at least 1 (leave it out to re-rank all).")
        if positive_label not in (0, 1):
            raise RecipeError(f"reranker cross: positive_label is {positive_label}; it must be 0 or 1.")
        self.name, self.depth, self.title_separator = model, depth, title_separator
        self.positive_label, self.batch_tokens = positive_label, batch_tokens
        self.tokenizer, self.model = _load(model, load_options)
        self.labels = int(self.model.config.num_labels)
        if self.labels not in (1, 2):
            raise RecipeError(
                f"reranker cross: {model} has {self.labels} labels; a re-ranker has 1 (a score) or 2 (no, yes)."
            )
        self.max_tokens = _choose_max_tokens(model, self.tokenizer, self.model.config, max_tokens)
        if not {"device_map", "quantization_config"} & load_options.keys():
            where = choose_device(device)
            self.model.to(device=where, dtype=choose_dtype(dtype, where))
        if self.model.dtype != torch.float32:
            _keep_last_layer_precise(self.model, self.labels)

    def rerank(self, queries: Sequence[Query], hits: Sequence[Sequence[Hit]]) -> list[list[Hit]]:
        """The same passages by the model's score, best first; ties keep the incoming order; no hits give no hits.

        Raises DataError naming the query whose question leaves no room for a passage, or the query and the passage
        whose score is not a number.
        """
        pairs = [
            _Pair(query, hit, number)
            for number, (query, found) in enumerate(zip(queries, hits, strict=True))
            for hit in found[: self.depth]
        ]
        renewed: list[list[Hit]] = [[] for _ in queries]
        for pair, score in zip(pairs, self._score(pairs), strict=True):
            renewed[pair.number].append(Hit(pair.hit.passage, score, "cross"))
        for ranking in renewed:
            ranking.sort(key=lambda hit: -hit.score)  # stable: ties keep their order
        rest = ([] if self.depth is None else list(found[self.depth :]) for found in hits)
        return [ranking + behind for ranking, behind in zip(renewed, rest, strict=True)]

    def _score(self, pairs: Sequence["_Pair"]) -> list[float]:
        """One score a pair, in their order."""
        scores = [math.nan] * len(pairs)
        cut = 0
        with progress("rerank", len(pairs), "pairs") as bar:
            for start in range(0, len(pairs), _PAIRS_AT_ONCE):
                block = pairs[start : start + _PAIRS_AT_ONCE]
                rows, long = self._encode(block)
                cut += long
                for batch in _batches([len(row["input_ids"]) for row in rows], self.batch_tokens):
                    for number, score in zip(batch, self._forward([rows[number] for number in batch]), strict=True):
                        scores[start + number] = score
                    bar.advance(len(batch))
        for pair, score in zip(pairs, scores, strict=True):
            if not math.isfinite(score):
                raise DataError(
                    f"query {pair.query.id}, passage {pair.hit.passage.id}: {self.name} gives the score {score} in "
                    f"{str(self.model.dtype).removeprefix('torch.')}. Use dtype: float32."
                )
        if cut:
            _log.warning("rerank: %d of %d passages were cut at %d tokens", cut, len(pairs), self.max_tokens)
        return scores

    def _encode(self, pairs: Sequence["_Pair"]) -> tuple[list[dict[str, list[int]]], int]:
        """The model's input for each pair, unpadded, and how many passages had to be cut."""
        if not pairs:
            return [], 0
        questions = [pair.query.text for pair in pairs]
        passages = [self._passage_text(pair.hit) for pair in pairs]
        rows = _rows(self.tokenizer(questions, passages, verbose=False))
        long = [number for number, row in enumerate(rows) if len(row["input_ids"]) > self.max_tokens]
        if long:
            for number in long:
                self._check_question(pairs[number].query)
            shortened = self.tokenizer(
                [questions[number] for number in long],
                [passages[number] for number in long],
                truncation="only_second",
                max_length=self.max_tokens,
            )
            for number, row in zip(long, _rows(shortened), strict=True):
                rows[number] = row
        return rows, len(long)

    def _check_question(self, query: Query) -> None:
        tokens = len(self.tokenizer(query.text, add_special_tokens=False, verbose=False)["input_ids"])
        if tokens + self.tokenizer.num_special_tokens_to_add(pair=True) >= self.max_tokens:
            raise DataError(
                f"query {query.id}: the question takes {tokens} tokens, {self.name} reads at most {self.max_tokens} "
                "together with a passage. Shorten the question."
            )

    def _passage_text(self, hit: Hit) -> str:
        if self.title_separator is None or not hit.passage.title:
            return hit.passage.text
        return hit.passage.title + self.title_separator + hit.passage.text

    @torch.inference_mode()
    def _forward(self, rows: list[dict[str, list[int]]]) -> list[float]:
        """Scores of one batch of rows."""
        batch = self.tokenizer.pad(rows, padding="longest", pad_to_multiple_of=_ROUND_TO, return_tensors="pt")
        width = int(batch["input_ids"].shape[1])
        if width > self.max_tokens:  # rounded up past the window: the columns too many hold padding only
            kept = (
                slice(0, self.max_tokens)
                if self.tokenizer.padding_side == "right"
                else slice(width - self.max_tokens, width)
            )
            batch = {name: tensor[:, kept] for name, tensor in batch.items()}
        inputs = {name: tensor.to(self.model.device) for name, tensor in batch.items()}  # (B, T) each
        logits = self.model(**inputs).logits.float()  # (B, labels)
        if self.labels == 1:
            return cast(list[float], logits[:, 0].tolist())
        return cast(list[float], (logits[:, self.positive_label] - logits[:, 1 - self.positive_label]).tolist())


@dataclass(frozen=True, slots=True)
class _Pair:
    """A query and one of its hits; `number` is the query's place in the call."""

    query: Query
    hit: Hit
    number: int


def _rows(encoded: Mapping[str, list[list[int]]]) -> list[dict[str, list[int]]]:
    """From lists by feature to features by row."""
    return [dict(zip(encoded.keys(), values, strict=True)) for values in zip(*encoded.values(), strict=True)]


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of rows, longest rows first, in batches of at most `batch_tokens` tokens once padded (or of one row)."""
    batch: list[int] = []
    longest = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        padded = -(-lengths[number] // _ROUND_TO) * _ROUND_TO
        if batch and (len(batch) + 1) * longest > batch_tokens:
            yield batch
            batch = []
        longest = padded if not batch else longest
        batch.append(number)
    if batch:
        yield batch


def _load(name: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Tokenizer and frozen model. Refuses a model whose classification head would be drawn at random."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, report = AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        raise DataError(f"re-ranker {name!r} does not load: {str(error).splitlines()[0]}") from error
    if report["missing_keys"]:
        raise DataError(
            f"re-ranker {name!r} has no trained classification head ({min(report['missing_keys'])} is missing). "
            "Use a cross-encoder, or train one on this model."
        )
    return tokenizer, model.requires_grad_(False).eval()


def _choose_max_tokens(name: str, tokenizer: Any, config: Any, asked: int | None) -> int:
    """The longest pair in tokens: what is asked for, at most the window of the tokenizer and of the model."""
    windows = [int(tokenizer.model_max_length)] if tokenizer.model_max_length < _NO_WINDOW else []
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        windows.append(positions)
    window = min(windows, default=_DEFAULT_TOKENS if asked is None else asked)
    if asked is not None and asked > window:
        raise RecipeError(f"reranker cross: max_tokens is {asked}, but {name} reads at most {window}.")
    if asked is not None and asked < 8:
        raise RecipeError(f"reranker cross: max_tokens is {asked}; a question and a passage need at least 8.")
    return asked or window


def _keep_last_layer_precise(model: nn.Module, labels: int) -> None:
    """Let the last linear layer, the one that makes the logits, compute in float32.

    In bfloat16 a logit has 8 significant bits: near 8.0 the next one is 0.0625 away, and passages tie.
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and layer.out_features == labels]
    if layers:
        layers[-1].float()
        layers[-1].register_forward_pre_hook(lambda _layer, args: tuple(value.float() for value in args))
