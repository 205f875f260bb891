"""The extractive reader: a frozen encoder, a small learned part, a span head, one softmax over all packed passages.

Each packed passage is read apart, together with the question: [CLS] question [SEP] title [SEP] text [SEP]. Rows are
made of separately tokenised pieces, so that prices add up exactly and what was packed is what is read, to the token.
Distribution and loss: `odqa.frozen.spans`. How likely an answer is right: `odqa.read.calibration`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid

from odqa.artifacts import sha256_file, sha256_json
from odqa.errors import ArtifactError, DataError, RecipeError
from odqa.frozen.backbone import Backbone, fingerprint, load_backbone
from odqa.frozen.method import TENSORS, Method, load_method, load_tensors
from odqa.frozen.rows import Rows
from odqa.frozen.spans import SpanBatch, SpanHead, span_scores
from odqa.read.calibration import CALIBRATION, Calibration, load_calibration
from odqa.runtime import Recent, run_batches
from odqa.text import normalize_answer
from odqa.types import Answer, Candidate, Hit, PackedContext, Query, TokenCosts

KIND = "span-reader"
READER = "reader.json"
HEAD = "head.safetensors"

# The numbers that a confidence is computed from, in nats.
#   answer_odds  is there an answer? The highest, over passages, log-odds of a passage's spans against its own "no
#                answer" (Devlin et al. 2019 take the best span instead of the sum; on tune they are alike). No prior of
#                ranks is in it, and passages that rightly say "not here" have no say.
#   choice       is it this one? log P(the answer | there is one).
FEATURES = ("answer_odds", "choice")


class SpanModel:
    """The frozen encoder with its method attached and the span head: rows in, span scores out.

    `no_answer` says what the head was trained for: "shared", the "no answer" entries of all passages compete in the one
    softmax; "row", each passage's entry competes with its own spans only (`odqa.frozen.spans.row_loss`). `calibration`
    turns numbers of a reading into a confidence; None: the reader is uncalibrated.
    """

    def __init__(
        self,
        backbone: Backbone,
        method: Method,
        head: SpanHead,
        longest: int,
        no_answer: Literal["shared", "row"] = "shared",
        *,
        calibration: Calibration | None = None,
    ) -> None:
        self.backbone, self.method, self.longest = backbone, method, longest
        self.no_answer, self.calibration = no_answer, calibration
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


@dataclass(frozen=True, slots=True)
class Reading:
    """An answer, and the numbers that its confidence comes from: all of `FEATURES`, None if no span was found."""

    answer: Answer
    features: Mapping[str, float] | None


@dataclass(frozen=True, slots=True)
class _RowReading:
    """One row by itself: log-sum over its spans, the score of its "no answer", its best spans (score, first, last)."""

    log_spans: float
    no_answer: float
    spans: tuple[tuple[float, int, int], ...]


class SpanReader:
    """The reader stage. `abstain_below`: answer nothing when the confidence is lower (0.0: always answer).

    Confidence needs a calibrated reader; without one it is None, and an `abstain_below` above 0 is a RecipeError.
    `candidates` spans are kept a question; equal texts (after SQuAD normalisation) are one candidate, with their
    probabilities added if `combine` is "sum". Before normalising, `rank_prior` w multiplies the probability of every
    span of the passage of rank r by r ** -w, `score_prior` v by exp(v (s - s_best)) with the scores s that hits come
    with (our choices; 0: passages count alike). `batch_tokens` bounds rows x width of a forward pass (None: what is
    fast on the device). Passages are read apart, so a row that is met again says the same: one that is in `memory` is
    not read again, which an evaluation of many packings uses.
    """

    def __init__(
        self,
        model: SpanModel,
        *,
        candidates: int = 5,
        combine: str = "sum",
        rank_prior: float = 0.0,
        score_prior: float = 0.0,
        abstain_below: float = 0.0,
        batch_tokens: int | None = None,
        memory: "Recent[tuple[str, str, str], _RowReading] | None" = None,
    ) -> None:
        if abstain_below > 0 and model.calibration is None:
            raise RecipeError(
                f"reader span: abstain_below is {abstain_below}, and this reader is uncalibrated, so that it has no "
                "confidence. Calibrate it with scripts/calibrate_reader.py, or leave abstain_below out."
            )
        self.model = model
        self.candidates, self.combine = candidates, combine
        self.rank_prior, self.score_prior, self.abstain_below = rank_prior, score_prior, abstain_below
        self.batch_tokens, self.memory = batch_tokens, memory

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

    def read(self, contexts: Sequence[PackedContext]) -> list[Answer]:
        """One answer a context; a context without passages is answered with an empty text and score 0 (certain)."""
        return [reading.answer for reading in self.readings(contexts)]

    def readings(self, contexts: Sequence[PackedContext]) -> list[Reading]:
        """`read`, with what a calibration is fitted on."""
        pairs = [(c.query.text, hit.passage.title, hit.passage.text) for c in contexts for hit in c.hits]
        rows = iter(self._read_rows(pairs))
        return [self._read_one(context, [next(rows) for _ in context.hits]) for context in contexts]

    def _read_rows(self, pairs: Sequence[tuple[str, str, str]]) -> list["_RowReading"]:
        """What each row (question, title, text) says by itself; rows that are remembered are not read again."""
        memory = {} if self.memory is None else self.memory
        known = {pair: memory[pair] for pair in pairs if pair in memory}
        new = list(dict.fromkeys(pair for pair in pairs if pair not in known))
        known |= zip(new, self._forward(new), strict=True)
        if self.memory is not None:
            self.memory.store(known)
        return [known[pair] for pair in pairs]

    def _forward(self, pairs: Sequence[tuple[str, str, str]]) -> list["_RowReading"]:
        """The forward passes: rows of similar length together, `batch_tokens` at a time."""
        rows, device = self.model.rows, self.backbone.device
        readings: list[_RowReading | None] = [None] * len(pairs)

        @torch.inference_mode()
        def work(chunk: list[int]) -> None:
            batch = rows.batch([pairs[r] for r in chunk], range(len(chunk))).to(device)
            spans = self.model.spans(batch).float().cpu()  # (R, T, W)
            no_answer = spans[:, 0, 0].clone()
            spans[:, 0, 0] = float("-inf")
            log_spans = spans.flatten(1).logsumexp(1)
            scores, places = spans.flatten(1).topk(min(4 * self.candidates, spans[0].numel()), dim=1)
            for i, r in enumerate(chunk):
                best = zip(scores[i].tolist(), places[i].tolist(), strict=True)
                found = [(score, *divmod(place, self.model.longest)) for score, place in best if score > float("-inf")]
                spans_found = tuple((score, first, first + more) for score, first, more in found)
                readings[r] = _RowReading(log_spans[i].item(), no_answer[i].item(), spans_found)

        run_batches(work, [rows.length(*pair) for pair in pairs], device=device, batch_tokens=self.batch_tokens)
        return [reading for reading in readings if reading is not None]

    def _read_one(self, context: PackedContext, rows: Sequence["_RowReading"]) -> Reading:
        """One answer from what the rows of its passages say."""
        if not rows:
            return self._decide(Answer(context.query.id, "", 0.0), None)
        priors = torch.tensor(self._priors(context))
        log_spans = torch.tensor([row.log_spans for row in rows]) + priors
        no_answer = torch.tensor([row.no_answer for row in rows]) + priors
        log_all, log_none = self._normaliser(log_spans, no_answer)
        best = sorted(
            (-(score + prior), number, first, last)
            for number, (row, prior) in enumerate(zip(rows, priors.tolist(), strict=True))
            for score, first, last in row.spans
        )
        found = []
        for negated, number, first, last in best:
            passage = context.hits[number].passage
            offsets = self.model.rows.passage(passage.title, passage.text).offsets
            at = self.model.rows.text_start(context.query.text, passage.title)
            start, end = offsets[first - at][0], offsets[last - at][1]
            found.append(Candidate(passage.text[start:end], -negated - log_all, passage.id, start, end))
        answer = self._answer(context.query.id, found, log_none)
        features = {
            "answer_odds": (log_spans - no_answer).max().item(),
            # Less log P(any answer), from the spans: 1 - P(no answer) is rounded away where it is small.
            "choice": answer.score - (log_spans.logsumexp(0).item() - log_all),
        }
        return self._decide(answer, features if found else None)

    def _normaliser(self, log_spans: torch.Tensor, no_answer: torch.Tensor) -> tuple[float, float]:
        """What is subtracted from a span's score for its log-probability, and log P(no answer), from (R,) and (R,).

        "shared": one softmax over everything. "row": P(no answer) is that of the passage that is least sure of it (our
        choice; passages are no independent witnesses), and the spans of all passages share the rest.
        """
        if self.model.no_answer == "shared":
            log_all = torch.cat([log_spans, no_answer]).logsumexp(0)
            return log_all.item(), (no_answer.logsumexp(0) - log_all).item()
        odds = (log_spans - no_answer).max()
        return (log_spans.logsumexp(0) - logsigmoid(odds)).item(), logsigmoid(-odds).item()

    def _priors(self, context: PackedContext) -> list[float]:
        """What each passage's spans are given beforehand, in nats: less for a passage that was ranked lower."""
        ranks = context.ranks or range(1, len(context.hits) + 1)
        priors = [-self.rank_prior * math.log(rank) for rank in ranks]
        # Scores of two stages do not compare: of hits behind a re-ranker's depth only their rank counts.
        if self.score_prior and len({hit.source for hit in context.hits}) == 1:
            best = max(hit.score for hit in context.hits)
            priors = [p + self.score_prior * (hit.score - best) for p, hit in zip(priors, context.hits, strict=True)]
        return priors

    def _answer(self, query_id: str, spans: list[Candidate], log_none: float) -> Answer:
        """Join equal texts, and put "no answer" among the candidates; the best text comes first if there is one."""
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
        chosen = ranked[0] if ranked else nothing
        return Answer(query_id, chosen.text, chosen.logprob, _chosen_first(chosen, [*ranked, nothing]))

    def _decide(self, answer: Answer, features: Mapping[str, float] | None) -> Reading:
        """Say how sure the answer is, and withhold one that is not sure enough; where no span was found it is 0.0."""
        calibration = self.model.calibration
        if calibration is None:
            return Reading(answer, features)
        confidence = 0.0 if features is None else calibration.confidence(features)
        if answer.text and confidence < self.abstain_below:
            nothing = next(candidate for candidate in answer.candidates if not candidate.text)
            candidates = _chosen_first(nothing, answer.candidates)
            answer = replace(answer, text="", score=nothing.logprob, candidates=candidates)
        return Reading(replace(answer, confidence=confidence), features)


def _chosen_first(chosen: Candidate, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The chosen candidate, then the others, the likelier ones first."""
    rest = sorted(candidates, key=lambda candidate: -candidate.logprob)
    return (chosen, *(candidate for candidate in rest if candidate is not chosen))


def save_span_reader(folder: Path, model: SpanModel, *, dtype: torch.dtype = torch.float16) -> None:
    """Write what was learned: the method, the head, and the settings that reading needs. The backbone is only named."""
    (folder / CALIBRATION).unlink(missing_ok=True)  # of what lay here before
    model.method.save(folder, dtype=dtype)
    head = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in model.head.named_parameters()}
    save_file(head, folder / HEAD)
    settings = {"backbone": model.backbone.name, "longest": model.longest, "no_answer": model.no_answer}
    (folder / READER).write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load_span_reader(
    folder: Path, *, backbone: str | None = None, device: str = "auto", dtype: str = "auto"
) -> SpanModel:
    """Load a saved span reader on its backbone (`backbone` names another place of the same weights).

    It is calibrated if its folder holds a calibration.json. Raises ArtifactError if the folder is no span reader,
    ArtifactMismatch if it was trained on another backbone, or calibrated as another reader.
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
    calibration = load_calibration(folder, reader=trained_part(folder), known=FEATURES)
    no_answer = settings.get("no_answer", "shared")
    return SpanModel(frozen, method, head, int(settings["longest"]), no_answer, calibration=calibration)


def trained_part(folder: Path) -> str:
    """The sha256 that stands for what a saved span reader has learned: its method and its head."""
    return sha256_json([sha256_file(folder / name) for name in (TENSORS, HEAD)])
