"""The extractive reader: a frozen encoder, a small learned part, a span head, one softmax over all packed passages.

Each packed passage is read apart, together with the question: [CLS] question [SEP] title [SEP] text [SEP]. Rows are
made of separately tokenised pieces, so that prices add up exactly and what was packed is what is read, to the token.
Distribution and loss: `odqa.frozen.spans`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from odqa.errors import ArtifactError, DataError
from odqa.frozen.backbone import Backbone, fingerprint, load_backbone
from odqa.frozen.method import Method, load_method, load_tensors
from odqa.frozen.spans import SpanBatch, SpanHead, log_normaliser, span_scores
from odqa.text import normalize_answer
from odqa.types import Answer, Candidate, Hit, PackedContext, Query, TokenCosts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KIND = "span-reader"
READER = "reader.json"
HEAD = "head.safetensors"


@dataclass(frozen=True, slots=True)
class TokenisedPassage:
    """Token ids of title and text; `offsets[i]` are the characters of the text that its token i covers."""

    title: tuple[int, ...]
    text: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]


class Rows:
    """Assembles rows from pieces. Pieces are cached: a passage that is priced, packed and read is tokenised once."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", window: int) -> None:
        special = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
        if None in special:
            raise DataError(
                "span reader: the backbone's tokenizer lacks a [CLS], [SEP] or [PAD] token. Use an encoder."
            )
        self.cls, self.sep, self.pad = special
        self.window = window
        # A copy without the truncation (MiniLM: 128 tokens) and padding that a tokenizer file may switch on.
        pieces = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        pieces.no_truncation()
        pieces.no_padding()
        encode = pieces.encode

        @lru_cache(maxsize=16384)
        def ids(text: str) -> tuple[int, ...]:
            return tuple(encode(text, add_special_tokens=False).ids)

        @lru_cache(maxsize=16384)
        def passage(title: str, text: str) -> TokenisedPassage:
            encoded = encode(text, add_special_tokens=False)
            return TokenisedPassage(ids(title), tuple(encoded.ids), tuple(encoded.offsets))

        self.question, self.passage = ids, passage

    def length(self, question: str, title: str, text: str) -> int:
        """Tokens of the whole row."""
        passage = self.passage(title, text)
        return 4 + len(self.question(question)) + len(passage.title) + len(passage.text)

    def text_start(self, question: str, title: str) -> int:
        """Index in the row of the text's first token."""
        return 3 + len(self.question(question)) + len(self.question(title))

    def batch(
        self, pairs: Sequence[tuple[str, str, str]], question: Sequence[int], gold: Sequence[tuple[int, int, int]] = ()
    ) -> SpanBatch:
        """Rows for (question, title, text) triples, padded to a multiple of 16: many shapes make memory grow."""
        width = -(-max(self.length(*pair) for pair in pairs) // 16) * 16
        ids = torch.full((len(pairs), width), self.pad)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        in_text = torch.zeros_like(ids, dtype=torch.bool)
        for r, (asked, title, text) in enumerate(pairs):
            q, p = self.question(asked), self.passage(title, text)
            row = [self.cls, *q, self.sep, *p.title, self.sep, *p.text, self.sep]
            ids[r, : len(row)] = torch.tensor(row)
            mask[r, : len(row)] = 1
            types[r, 2 + len(q) : len(row)] = 1
            in_text[r, len(row) - 1 - len(p.text) : len(row) - 1] = True
        return SpanBatch(ids, mask, types, in_text, torch.tensor(question), torch.tensor(gold).reshape(-1, 3))


class SpanModel:
    """The frozen encoder with its method attached and the span head: rows in, span scores out."""

    def __init__(self, backbone: Backbone, method: Method, head: SpanHead, longest: int) -> None:
        self.backbone, self.method, self.longest = backbone, method, longest
        self.head = head.to(backbone.device)
        self.in_memory = fingerprint(backbone.model)  # after the cast to the compute type
        method.attach(backbone)
        self.rows = Rows(backbone.tokenizer, int(backbone.model.config.max_position_embeddings))

    def check_frozen(self) -> None:
        """Raises AssertionError if a bit of the backbone has changed since it was loaded."""
        self.method.detach()
        if fingerprint(self.backbone.model) != self.in_memory:
            raise AssertionError(f"the frozen weights of {self.backbone.name} have changed")
        self.method.attach(self.backbone)

    def spans(self, batch: SpanBatch) -> torch.Tensor:
        """(R, T, W) span scores, see `odqa.frozen.spans.span_scores`."""
        states = self.backbone.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, token_type_ids=batch.token_type_ids
        ).last_hidden_state
        return span_scores(self.head(states), batch.in_text, self.longest)


class SpanReader:
    """The reader stage. `abstain_above`: answer nothing when P(no answer) exceeds it (1.0: always answer).

    `candidates` spans are kept a question; equal texts (after SQuAD normalisation) are one candidate, with their
    probabilities added if `combine` is "sum". `rank_prior` w multiplies the probability of every span of the passage of
    rank r by r ** -w before normalising (our choice; 0: passages count alike). `batch_tokens` bounds rows x width of a
    forward pass.
    """

    def __init__(
        self,
        model: SpanModel,
        *,
        candidates: int = 5,
        combine: str = "sum",
        rank_prior: float = 0.0,
        abstain_above: float = 1.0,
        batch_tokens: int = 8192,
    ) -> None:
        self.model = model
        self.candidates, self.combine = candidates, combine
        self.rank_prior, self.abstain_above = rank_prior, abstain_above
        self.batch_tokens = batch_tokens

    @property
    def backbone(self) -> Backbone:
        return self.model.backbone

    def check_frozen(self) -> None:
        """Raises AssertionError if a bit of the backbone has changed since it was loaded."""
        self.model.check_frozen()

    def costs(self, query: Query, hits: Sequence[Hit]) -> TokenCosts:
        """Each passage costs its whole row (question, title, text, four special tokens); nothing else is charged."""
        rows = self.model.rows
        bare = rows.length(query.text, "", "")
        if bare >= rows.window:
            raise DataError(
                f"question {query.id!r} has {bare - 4} tokens; the reader's window of {rows.window} leaves no room for "
                "a passage. Shorten the question."
            )
        lengths = [rows.length(query.text, hit.passage.title, hit.passage.text) for hit in hits]
        return TokenCosts(0, tuple(n if n <= rows.window else None for n in lengths), None)

    @torch.inference_mode()
    def read(self, contexts: Sequence[PackedContext]) -> list[Answer]:
        """One answer a context; a context without passages is answered with an empty text and score 0 (certain)."""
        rows = self.model.rows
        pairs = [(c.query.text, hit.passage.title, hit.passage.text) for c in contexts for hit in c.hits]
        owner = [index for index, context in enumerate(contexts) for _ in context.hits]
        passages = [hit.passage for context in contexts for hit in context.hits]
        priors = torch.tensor([prior for context in contexts for prior in self._priors(context)])
        normalisers = torch.full((len(pairs),), float("-inf"))
        no_answer = torch.full((len(pairs),), float("-inf"))
        best: list[list[tuple[float, int, int, int]]] = [[] for _ in contexts]  # score, row, first, last token
        for chunk in self._batches([rows.length(*pair) for pair in pairs]):
            batch = rows.batch([pairs[r] for r in chunk], range(len(chunk))).to(self.backbone.device)
            spans = self.model.spans(batch).float().cpu() + priors[chunk, None, None]
            normalisers[chunk] = log_normaliser(spans, torch.arange(len(chunk)), len(chunk))
            no_answer[chunk] = spans[:, 0, 0]
            spans[:, 0, 0] = float("-inf")
            scores, flat = spans.flatten(1).topk(min(4 * self.candidates, spans[0].numel()), dim=1)
            for i, r in enumerate(chunk):
                for score, index in zip(scores[i].tolist(), flat[i].tolist(), strict=True):
                    if score > float("-inf"):
                        first, length = divmod(index, self.model.longest)
                        best[owner[r]].append((score, r, first, first + length))
        answers = []
        for index, context in enumerate(contexts):
            mine = [r for r, o in enumerate(owner) if o == index]
            if not mine:
                answers.append(Answer(context.query.id, "", 0.0))
                continue
            log_all = normalisers[mine].logsumexp(0).item()
            log_none = no_answer[mine].logsumexp(0).item() - log_all
            found = []
            for score, r, first, last in sorted(best[index], key=lambda item: (-item[0], item[1:])):
                asked, title, text = pairs[r]
                offsets = rows.passage(title, text).offsets
                at = rows.text_start(asked, title)
                start, end = offsets[first - at][0], offsets[last - at][1]
                found.append(Candidate(text[start:end], score - log_all, passages[r].id, start, end))
            answers.append(self._answer(context.query.id, found, log_none))
        return answers

    def _priors(self, context: PackedContext) -> list[float]:
        """What each passage's spans are given beforehand, in nats: less for a passage that was ranked lower."""
        by_score = sorted(range(len(context.hits)), key=lambda place: -context.hits[place].score)
        rank = {place: rank for rank, place in enumerate(by_score, 1)}
        return [-self.rank_prior * math.log(rank[place]) for place in range(len(context.hits))]

    def _answer(self, query_id: str, spans: list[Candidate], log_none: float) -> Answer:
        """Join equal texts, put "no answer" among the candidates, and decide."""
        joined: dict[str, Candidate] = {}
        for span in spans:
            key = normalize_answer(span.text) or span.text
            if key not in joined:
                joined[key] = span
            elif self.combine == "sum":
                kept = joined[key]
                total = torch.logaddexp(torch.tensor(kept.logprob), torch.tensor(span.logprob)).item()
                joined[key] = Candidate(kept.text, total, kept.passage_id, kept.start, kept.end)
        ranked = sorted(joined.values(), key=lambda candidate: -candidate.logprob)[: self.candidates]
        nothing = Candidate("", log_none)
        abstains = not ranked or torch.tensor(log_none).exp().item() > self.abstain_above
        chosen = nothing if abstains else ranked[0]
        rest = sorted([*ranked, nothing], key=lambda candidate: -candidate.logprob)
        return Answer(query_id, chosen.text, chosen.logprob, (chosen, *(c for c in rest if c is not chosen)))

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Row numbers in order of length, cut so that rows x width stays within `batch_tokens` (one row at least)."""
        batches: list[list[int]] = []
        for r in sorted(range(len(lengths)), key=lambda r: (-lengths[r], r)):
            if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= self.batch_tokens:
                batches[-1].append(r)
            else:
                batches.append([r])
        return batches


def save_span_reader(folder: Path, model: SpanModel, *, dtype: torch.dtype = torch.float16) -> None:
    """Write what was learned: the method, the head, and the settings that reading needs. The backbone is only named."""
    model.method.save(folder, dtype=dtype)
    head = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in model.head.named_parameters()}
    save_file(head, folder / HEAD)
    settings = {"backbone": model.backbone.name, "longest": model.longest}
    (folder / READER).write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load_span_reader(
    folder: Path, *, backbone: str | None = None, device: str = "auto", dtype: str = "auto"
) -> SpanModel:
    """Load a saved span reader on its backbone (`backbone` names another place of the same weights).

    Raises ArtifactError if the folder is no span reader, ArtifactMismatch if it was trained on another backbone.
    """
    settings_file = folder / READER
    if not settings_file.is_file():
        raise ArtifactError(f"{folder}: not a span reader ({READER} is missing).")
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    frozen = load_backbone(backbone or settings["backbone"], "encoder", device=device, dtype=dtype)
    method = load_method(folder, frozen)
    head = SpanHead(frozen.width)
    load_tensors(head, load_file(folder / HEAD), str(folder / HEAD))
    method.requires_grad_(False)
    head.requires_grad_(False)
    return SpanModel(frozen, method, head, int(settings["longest"]))
