"""Training the span reader: from rows of question, answers and passage to batches of token ids, and scores on tune.

A training group is one question with its passage and, for a share of the questions, one passage that does not answer
it; for another share the answer is missing altogether and "no answer" is right. Which question gets what, and the
order of batches, depend on seed and epoch alone. The loop is `odqa.frozen.fit`; nothing here reads a dev file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from odqa.artifacts import Draft
from odqa.corpus.corrupt import corrupt
from odqa.corpus.examples import Example
from odqa.errors import DataError
from odqa.frozen.fit import FitSettings, fit
from odqa.frozen.rows import Rows, split_by_length
from odqa.frozen.spans import RowTerms, SpanBatch, marginal_loss, row_loss, row_terms
from odqa.read.span import SpanModel, SpanReader, save_span_reader
from odqa.runtime import peak_memory_bytes
from odqa.text import answer_spans, exact_match, f1
from odqa.types import Answer, Gold, Hit, PackedContext, Passage, Query

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """What training groups look like.

    `groups` questions a batch. A question gets a negative beside its passage with probability `negative_share`; with
    probability `unanswerable_share` it gets the negative alone. `source_weights` repeats the rows of a source within an
    epoch (1 if not named).

    With `packed` a group is a context as a pipeline packs it: the first 1 to `packed` passages of the question's mined
    ranking (`odqa mine`; without one, of its own passage and negatives). If none of them holds the answer, the right
    passage takes the last place with probability `restore_share`. With probability `unanswerable_share` all that hold
    it are taken away; with probability `corrupted_share` the question is asked of its own passage, but changed so that
    the passage does not answer it (`odqa.corpus.corrupt`). `parts`: a batch is computed in parts of similar length, to
    save padding. Values are our choice.
    """

    groups: int = 16
    negative_share: float = 0.4
    unanswerable_share: float = 0.08
    packed: int | None = None
    restore_share: float = 0.7
    corrupted_share: float = 0.0
    parts: int = 1
    source_weights: Mapping[str, int] | None = None
    seed: int = 0


class SpanBatches:
    """`batches(i)`: the i-th training batch. Length-sorted within blocks of 64 batches, so that little is padding."""

    def __init__(self, examples: Sequence[Example], rows: Rows, longest: int, settings: GroupSettings) -> None:
        self.rows, self.longest, self.settings = rows, longest, settings
        weights = settings.source_weights or {}
        # Spans are found once; an example that has an answer but no span (longer than `longest`) is left out, and so is
        # one that is longer than the window.
        self.examples, self.spans, self.left_out = [], [], 0
        for example in examples:
            spans = token_spans(rows, example.passage, example.answers, longest)
            length = rows.length(example.question, example.passage.title, example.passage.text)
            if (spans or not example.answers) and length <= rows.window:
                self.examples.append(example)
                self.spans.append(spans)
            else:
                self.left_out += 1
        if not self.examples:
            raise DataError("training: no example has its answer in its passage.")
        self.pool = np.repeat(np.arange(len(self.examples)), [weights.get(e.source, 1) for e in self.examples])
        self.per_epoch = max(1, len(self.pool) // settings.groups)
        self._epoch, self._plan = -1, np.empty((0, 0), dtype=np.int64)

    def __call__(self, index: int) -> SpanBatch:
        chances = np.random.default_rng([self.settings.seed, index])
        pairs: list[tuple[str, str, str]] = []
        owner: list[int] = []
        gold: list[tuple[int, int, int]] = []
        for group, chosen in enumerate(self.plan(index)):
            example = self.examples[chosen]
            kind, pick = chances.random(), chances.integers(1 << 30)
            negative = example.negatives[pick % len(example.negatives)] if example.negatives else None
            unanswerable = negative is not None and kind < self.settings.unanswerable_share
            if unanswerable:
                gold.append((len(pairs), 0, 0))
            else:
                at = self.rows.text_start(example.question, example.passage.title)
                gold += [(len(pairs), at + first, at + last) for first, last in self.spans[chosen]]
                pairs.append((example.question, example.passage.title, example.passage.text))
                owner.append(group)
            share = self.settings.unanswerable_share + self.settings.negative_share
            if negative is not None and kind < share:
                pairs.append((example.question, negative.title, negative.text))
                owner.append(group)
        return self.rows.batch(pairs, owner, gold)

    def plan(self, index: int) -> np.ndarray:
        """(groups,) numbers of the examples of a batch."""
        epoch, number = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._plan_epoch(epoch)
        return self._plan[number]  # type: ignore[no-any-return]

    def _plan_epoch(self, epoch: int) -> np.ndarray:
        """(batches, groups) numbers of examples."""
        rng = np.random.default_rng([self.settings.seed, 1, epoch])
        order = rng.permutation(self.pool)[: self.per_epoch * self.settings.groups]
        lengths = np.array([len(self.rows.passage(e.passage.title, e.passage.text).text) for e in self.examples])
        block = 64 * self.settings.groups
        for start in range(0, len(order), block):
            part = order[start : start + block]
            order[start : start + block] = part[np.argsort(lengths[part], kind="stable")]
        plan = order.reshape(self.per_epoch, self.settings.groups)
        return plan[rng.permutation(len(plan))]


@dataclass(slots=True)
class PackedBatch:
    """Rows in parts; `question` (R,) says whose row it is, in the order of the parts."""

    parts: list[SpanBatch]
    question: torch.Tensor

    def to(self, device: torch.device) -> "PackedBatch":
        return PackedBatch([part.to(device) for part in self.parts], self.question.to(device))


class PackedBatches(SpanBatches):
    """Batches of contexts as a pipeline packs them; needs examples with a mined ranking."""

    def __init__(self, examples: Sequence[Example], rows: Rows, longest: int, settings: GroupSettings) -> None:
        if not any(example.ranking for example in examples):
            raise DataError("training: packed contexts need mined rankings. Name them under rankings.")
        super().__init__(examples, rows, longest, settings)

    def group(self, index: int) -> PackedBatch:
        """The batch number `index`: contexts of `settings.groups` questions, in parts of similar length."""
        chances = np.random.default_rng([self.settings.seed, index])
        pairs: list[tuple[str, str, str]] = []
        owner: list[int] = []
        right: list[list[tuple[int, int]]] = []
        for group, chosen in enumerate(self.plan(index)):
            example = self._corrupted(self.examples[chosen], chances)
            for passage in self._context(example, chances):
                pairs.append((example.question, passage.title, passage.text))
                owner.append(group)
                at = self.rows.text_start(example.question, passage.title)
                spans = token_spans(self.rows, passage, example.answers, self.longest)
                right.append([(at + first, at + last) for first, last in spans])
        parts, order = [], split_by_length([self.rows.length(*pair) for pair in pairs], self.settings.parts)
        for part in order:
            gold = [(place, first, last) for place, row in enumerate(part) for first, last in right[row]]
            parts.append(self.rows.batch([pairs[row] for row in part], [owner[row] for row in part], gold))
        return PackedBatch(parts, torch.tensor([owner[row] for part in order for row in part]))

    def _corrupted(self, example: Example, chances: np.random.Generator) -> Example:
        """The example as it is or, for a share, with a question that its passage does not answer."""
        share = self.settings.corrupted_share
        if not share or not example.answers or chances.random() >= share:
            return example
        own = example.passage
        question = corrupt(example.question, own.text, example.answers, chances)
        if question is None or self.rows.length(question, own.title, own.text) > self.rows.window:
            return example
        return replace(example, question=question, answers=(), ranking=(own,), scores=(), holds=(False,))

    def _context(self, example: Example, chances: np.random.Generator) -> list[Passage]:
        """The passages of one training context, best ranked first; of a question without answers its own."""
        assert self.settings.packed is not None
        size = int(chances.integers(1, self.settings.packed + 1))
        if not example.answers:
            return list(example.ranking[: self.settings.packed])
        kind, restored = chances.random(), chances.random() < self.settings.restore_share
        ranking = example.ranking or (example.passage, *example.negatives)
        holds = example.holds or (True, *(False for _ in example.negatives))
        held = dict(zip((p.id for p in ranking), holds, strict=True))
        held[example.passage.id] = True
        # A passage that holds the answer in too many tokens to be a span teaches nothing; nor does one over the window.
        readable = [
            p
            for p in ranking
            if self.rows.length(example.question, p.title, p.text) <= self.rows.window
            and (not held[p.id] or token_spans(self.rows, p, example.answers, self.longest))
        ]
        without = [p for p in readable if not held[p.id]]
        if kind < self.settings.unanswerable_share and without:
            return without[:size]
        context = readable[:size]
        if restored and not any(held[p.id] for p in context):
            context = [*context[: size - 1], example.passage]
        return context or [example.passage]


def token_spans(rows: Rows, passage: Passage, answers: Sequence[str], longest: int) -> list[tuple[int, int]]:
    """First and last token, within the text, of every occurrence of an answer that has at most `longest` tokens."""
    offsets = rows.passage(passage.title, passage.text).offsets
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    spans = set()
    for start, end in answer_spans(passage.text, answers):
        first = int(np.searchsorted(ends, start, side="right"))  # the first token that ends after the answer starts
        last = int(np.searchsorted(starts, end, side="left")) - 1  # the last one that starts before it ends
        if first <= last < first + longest:
            spans.add((first, last))
    return sorted(spans)


@torch.inference_mode()
def read_gold_passages(
    reader: SpanReader, questions: Sequence[tuple[Query, Gold]], passages: Mapping[str, Passage]
) -> list[Answer]:
    """Answers when the reader sees the best gold passage and nothing else."""
    hits = [Hit(passages[gold.passage_ids[0]], 0.0, "gold") for _, gold in questions]
    return reader.read(
        [PackedContext(query, "", (hit,), 0, 0) for (query, _), hit in zip(questions, hits, strict=True)]
    )


def gold_passage_scores(
    reader: SpanReader, questions: Sequence[tuple[Query, Gold]], passages: Mapping[str, Passage]
) -> dict[str, float]:
    """Mean EM and F1 (0 to 100) of `read_gold_passages`."""
    answers = read_gold_passages(reader, questions, passages)
    pairs = [(answer.text, gold.answers) for answer, (_, gold) in zip(answers, questions, strict=True)]
    return {
        "em": 100 * sum(exact_match(text, gold) for text, gold in pairs) / len(pairs),
        "f1": 100 * sum(f1(text, gold) for text, gold in pairs) / len(pairs),
    }


def train_span_reader(
    model: SpanModel,
    examples: Sequence[Example],
    tune: Mapping[str, Sequence[tuple[Query, Gold]]],
    passages: Mapping[str, Passage],
    draft: Draft,
    *,
    groups: GroupSettings,
    fit_settings: FitSettings,
    stored: torch.dtype = torch.float16,
    log: Callable[[str], None] = lambda line: None,
) -> None:
    """Train method and head into `draft`: reader files, and curve.json with the loss and the tune scores on the way.

    Resumes from the checkpoint in `draft` (declare `CHECKPOINT` as scratch). The backbone is guarded: AssertionError if
    one of its bits changed.
    """
    batches: SpanBatches
    if groups.packed is None:
        batches = SpanBatches(examples, model.rows, model.longest, groups)
        batch_at: Callable[[int], SpanBatch | PackedBatch] = batches
    else:
        batches = PackedBatches(examples, model.rows, model.longest, groups)
        batch_at = batches.group
    log(f"{len(batches.examples)} examples, {batches.left_out} left out, {batches.per_epoch} batches an epoch")
    reader = SpanReader(model)

    def evaluate() -> dict[str, float]:
        with torch.autocast(model.backbone.device.type, torch.bfloat16, enabled=fit_settings.autocast):
            return {
                f"{name}.{metric}": round(value, 1)
                for name, questions in tune.items()
                for metric, value in gold_passage_scores(reader, questions, passages).items()
            }

    def loss(batch: SpanBatch | PackedBatch) -> torch.Tensor:
        on_device = batch.to(model.backbone.device)
        if isinstance(on_device, SpanBatch):
            return marginal_loss(model.spans(on_device), on_device)
        terms = [row_terms(model.spans(part), part.gold) for part in on_device.parts]
        return row_loss(RowTerms.join(terms), on_device.question)

    count = model.method.count(model.backbone)
    modules = {"method": model.method, "head": model.head}
    result = fit(
        modules,
        batch_at,
        loss,
        fit_settings,
        checkpoint=draft.path / CHECKPOINT,
        evaluate=evaluate if tune else None,
        log=log,
    )
    model.check_frozen()
    save_span_reader(draft.path, model, dtype=stored)
    # Seconds differ between equal runs; the curve proper must not.
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
