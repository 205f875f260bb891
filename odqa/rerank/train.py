"""Training a cross-encoder re-ranker: a method and a relevance head on a frozen encoder.

A group is one question with its positives and N negatives, drawn from the hardest passages that hold no answer. What a
group holds and the order of batches depend on seed and epoch alone. Losses: `odqa.frozen.pairs`; the loop:
`odqa.frozen.fit`. Nothing here reads a dev file.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from odqa.artifacts import Draft
from odqa.corpus.examples import Epochs, Example
from odqa.errors import DataError
from odqa.frozen.backbone import Backbone, fingerprint
from odqa.frozen.fit import FitSettings, fit
from odqa.frozen.method import Method
from odqa.frozen.pairs import Loss, PairBatch, PairHead, distillation_loss, listwise_loss, pointwise_loss
from odqa.frozen.rows import RowInputs, Rows, split_by_length
from odqa.runtime import peak_memory_bytes
from odqa.text import has_answer
from odqa.types import Gold, Hit, Passage, Query

KIND = "reranker"
DESCRIPTION = "reranker.json"
HEAD = "head.safetensors"
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """What training groups look like; values are our choice.

    `groups` questions a batch, each with at most `positives` right passages and `negatives` wrong ones, drawn from the
    `pool` hardest. `parts`: a batch is computed in parts of similar length, to save padding. `source_weights` repeats
    the rows of a source within an epoch (1 if not named).
    """

    groups: int = 8
    positives: int = 2
    negatives: int = 5
    pool: int = 24
    parts: int = 3
    source_weights: Mapping[str, int] | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class LossSettings:
    """`kind` of the loss on labels; `distillation` is the weight of the loss on a teacher's scores (0: none)."""

    kind: Loss = "listwise"
    distillation: float = 0.0
    temperature: float = 1.0


class PairModel:
    """The frozen encoder with its method attached and the relevance head: rows in, scores out."""

    def __init__(self, backbone: Backbone, method: Method, head: PairHead) -> None:
        self.backbone, self.method = backbone, method
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

    def scores(self, inputs: RowInputs) -> torch.Tensor:
        """(R,) scores in float32."""
        states = self.backbone.model(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, token_type_ids=inputs.token_type_ids
        ).last_hidden_state
        scores: torch.Tensor = self.head(states)
        return scores

    def batch_scores(self, batch: PairBatch) -> torch.Tensor:
        """(N,) scores, in the order of the batch's rows."""
        parts = torch.cat([self.scores(part) for part in batch.parts])
        return torch.empty_like(parts).index_copy(0, torch.cat(batch.rows), parts)


class PairBatches:
    """`batches(i)`: the i-th training batch."""

    def __init__(self, examples: Sequence[Example], rows: Rows, settings: GroupSettings) -> None:
        self.rows, self.settings = rows, settings
        self.examples = [e for e in examples if e.negatives and self._fits(e.question, e.positives[0])]
        self.left_out = len(examples) - len(self.examples)
        if not self.examples:
            raise DataError("training: no example has a passage that answers and one that does not.")
        self.epochs = Epochs(self.examples, settings.groups, weights=settings.source_weights, seed=settings.seed)

    def __call__(self, index: int) -> PairBatch:
        chances = np.random.default_rng([self.settings.seed, index])
        pairs: list[tuple[str, str, str]] = []
        group: list[int] = []
        positive: list[bool] = []
        teacher: list[float] = []
        for at, chosen in enumerate(self.epochs(index)):
            example = self.examples[chosen]
            scores = dict(zip((p.id for p in example.ranking), example.scores, strict=True))
            right = [p for p in example.positives if self._fits(example.question, p)][: self.settings.positives]
            wrong = self._draw(example, chances)
            for passage in (*right, *wrong):
                pairs.append((example.question, passage.title, passage.text))
                group.append(at)
                teacher.append(scores.get(passage.id, float("nan")))
            positive += [True] * len(right) + [False] * len(wrong)
        order = split_by_length([self.rows.length(*pair) for pair in pairs], self.settings.parts)
        parts = [self.rows.inputs([pairs[row] for row in part]) for part in order]
        rows = [torch.tensor(part) for part in order]
        return PairBatch(parts, rows, torch.tensor(group), torch.tensor(positive), torch.tensor(teacher))

    def _draw(self, example: Example, chances: np.random.Generator) -> list[Passage]:
        """Negatives from the hardest ones, without replacement."""
        hardest = [p for p in example.negatives[: self.settings.pool] if self._fits(example.question, p)]
        chosen = chances.permutation(len(hardest))[: self.settings.negatives]
        return [hardest[number] for number in chosen]

    def _fits(self, question: str, passage: Passage) -> bool:
        return self.rows.length(question, passage.title, passage.text) <= self.rows.window


@torch.inference_mode()
def rank_candidates(model: PairModel, query: Query, hits: Sequence[Hit]) -> list[Hit]:
    """Hits with the model's scores, best first; for scores while training."""
    lengths = [model.rows.length(query.text, hit.passage.title, hit.passage.text) for hit in hits]
    scored: list[Hit] = []
    for part in split_by_length(lengths, 2):
        inputs = model.rows.inputs([(query.text, hits[i].passage.title, hits[i].passage.text) for i in part])
        scores = model.scores(inputs.to(model.backbone.device)).tolist()
        scored += [Hit(hits[i].passage, score, "cross") for i, score in zip(part, scores, strict=True)]
    return sorted(scored, key=lambda hit: -hit.score)


def recall_scores(
    model: PairModel, questions: Sequence[tuple[Query, Gold, Sequence[Hit]]], depths: Sequence[int] = (1, 3)
) -> dict[str, float]:
    """Share (0 to 100) of questions with an answer in the first k passages after re-ranking."""
    found = dict.fromkeys(depths, 0)
    for query, gold, hits in questions:
        ranked = rank_candidates(model, query, hits)
        holds = [has_answer(hit.passage.text, gold.answers) for hit in ranked[: max(depths)]]
        for k in depths:
            found[k] += any(holds[:k])
    return {f"recall@{k}": 100 * count / len(questions) for k, count in found.items()}


def train_reranker(
    model: PairModel,
    examples: Sequence[Example],
    tune: Mapping[str, Sequence[tuple[Query, Gold, Sequence[Hit]]]],
    draft: Draft,
    *,
    groups: GroupSettings,
    loss: LossSettings,
    fit_settings: FitSettings,
    stored: torch.dtype = torch.float16,
    log: Callable[[str], None] = lambda line: None,
) -> None:
    """Train method and head into `draft`: the re-ranker's files, and curve.json with loss and tune scores on the way.

    Resumes from the checkpoint in `draft` (declare `CHECKPOINT` as scratch). The backbone is guarded: AssertionError if
    one of its bits changed.
    """
    batches = PairBatches(examples, model.rows, groups)
    log(f"{len(batches.examples)} examples, {batches.left_out} left out, {batches.epochs.per_epoch} batches an epoch")

    def evaluate() -> dict[str, float]:
        with torch.autocast(model.backbone.device.type, torch.bfloat16, enabled=fit_settings.autocast):
            return {
                f"{name}.{metric}": round(value, 1)
                for name, questions in tune.items()
                for metric, value in recall_scores(model, questions).items()
            }

    def loss_of(batch: PairBatch) -> torch.Tensor:
        batch = batch.to(model.backbone.device)
        scores = model.batch_scores(batch)
        if loss.kind == "listwise":
            value = listwise_loss(scores, batch.group, batch.positive)
        else:
            value = pointwise_loss(scores, batch.positive)
        if loss.distillation:
            value = value + loss.distillation * distillation_loss(scores, batch.teacher, batch.group, loss.temperature)
        return value

    count = model.method.count(model.backbone)
    result = fit(
        {"method": model.method, "head": model.head},
        batches,
        loss_of,
        fit_settings,
        checkpoint=draft.path / CHECKPOINT,
        evaluate=evaluate if tune else None,
        log=log,
    )
    model.check_frozen()
    save_reranker(draft.path, model, dtype=stored)
    curve = [{key: value for key, value in entry.items() if key != "seconds"} for entry in result.curve]
    draft.write_json("curve.json", curve)
    draft.counts |= {
        "trainable": count.trainable + sum(tensor.numel() for tensor in model.head.parameters()),
        "frozen": count.frozen,
        "examples": len(batches.examples),
        "left_out": batches.left_out,
        "questions_seen": fit_settings.steps * fit_settings.accumulate * groups.groups,
    }
    draft.extra["backbone"] = {"name": model.backbone.name, "fingerprint": model.backbone.fingerprint}
    draft.measured |= {"training_seconds": round(result.seconds, 1), "peak_memory_bytes": peak_memory_bytes()}


def save_reranker(folder: Path, model: PairModel, *, dtype: torch.dtype = torch.float16) -> None:
    """Write what was learned: the method and the head. The backbone is only named."""
    model.method.save(folder, dtype=dtype)
    head = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in model.head.named_parameters()}
    save_file(head, folder / HEAD)
    text = json.dumps({"backbone": model.backbone.name}, indent=1, sort_keys=True) + "\n"
    (folder / DESCRIPTION).write_text(text, encoding="utf-8")
