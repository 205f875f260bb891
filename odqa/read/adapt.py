"""Training a method for the frozen language model of a reader: contexts as the pipeline packs them, answers as targets.

As in the frozen reader of arXiv 2204.10019, the method learns on what it will really see: a training question's mined
ranking is packed by the pipeline's own packer into the reader's own prompt, to the token. Which question comes when
depends on the seed alone. The loop is `odqa.frozen.fit`; nothing here reads a dev file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from odqa.artifacts import Draft
from odqa.corpus.examples import Example
from odqa.errors import DataError
from odqa.frozen.backbone import fingerprint, frozen_guard
from odqa.frozen.blackbox import Continuation, Pairs, SearchSettings, search
from odqa.frozen.engine import Prompted
from odqa.frozen.finetuning import FineTuning
from odqa.frozen.fit import FitSettings, fit
from odqa.frozen.local import LocalEngine
from odqa.frozen.metered import Metered
from odqa.frozen.method import Method
from odqa.frozen.neural import NeuralRecursion, cost_of_passes
from odqa.frozen.prompt_tuning import PromptTuning
from odqa.read.lm import LmReader
from odqa.runtime import peak_memory_bytes
from odqa.stages import Packer
from odqa.text import as_written, exact_match, f1, has_answer
from odqa.types import Gold, Hit, PackedContext, Query

KIND = "method"
CHECKPOINT = "checkpoint.safetensors"
Again = Callable[[Sequence[PackedContext]], Sequence[PackedContext | None]]
"""What a second pass reads after a first one has read these contexts; None: nothing."""
JOURNAL = "journal.jsonl"  # of a black-box search
Targets = tuple[list[list[int]], list[list[int]]]  # prompts and answers


@dataclass(frozen=True, slots=True)
class ContextSettings:
    """Training batches: `questions` a batch out of `examples` drawn ones (None: all).

    `source_weights` is what a source's questions weigh in the draw and in an epoch (1 if not named). A context that
    holds no answer gets the question's own passage in the place of its last one. Values are our choice.
    """

    questions: int = 16
    examples: int | None = None
    source_weights: Mapping[str, float] | None = None
    seed: int = 0


class Batches(Protocol):
    """What a method is trained on: `size` of the examples a batch, `per_epoch` batches until all were seen."""

    per_epoch: int

    @property
    def examples(self) -> Sequence[Any]: ...

    @property
    def size(self) -> int: ...

    def __call__(self, index: int) -> Targets:
        """Token ids of the sources and of the targets of the `index`-th batch."""
        ...


class ContextBatches:
    """`batches(i)`: token ids of the prompts and of the answers of the i-th batch.

    With `again` the method is one for a later pass: all contexts are read once beforehand, and it learns on what is
    read again. Examples that are not read again are left out.
    """

    def __init__(
        self,
        reader: LmReader,
        packer: Packer,
        examples: Sequence[Example],
        settings: ContextSettings,
        *,
        again: Again | None = None,
    ) -> None:
        usable = [example for example in examples if example.answers]
        if not usable:
            raise DataError("training: no example has an answer.")
        self.reader, self.packer, self.settings = reader, packer, settings
        rng = np.random.default_rng([settings.seed, 0])
        weights = np.array([(settings.source_weights or {}).get(example.source, 1.0) for example in usable])
        if not weights.any():
            raise DataError("training: source_weights leave no example.")
        count = min(settings.examples or len(usable), int(np.count_nonzero(weights)))
        chosen = rng.choice(len(usable), count, replace=False, p=weights / weights.sum())
        self.examples = [usable[number] for number in chosen]
        self.per_epoch = max(1, count // settings.questions)
        self._again: dict[int, PackedContext] = {}
        if again is not None:
            found = again([self.context(example) for example in self.examples])
            kept = [number for number, one in enumerate(found) if one is not None]
            if not kept:
                raise DataError("training: the first pass gives no candidates for any example.")
            self.examples = [self.examples[number] for number in kept]
            self._again = dict(enumerate(one for one in found if one is not None))
            self.per_epoch = max(1, len(kept) // settings.questions)
        self._kept: dict[int, tuple[list[int], list[int]]] = {}
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    @property
    def size(self) -> int:
        return self.settings.questions

    def __call__(self, index: int) -> Targets:
        epoch, place = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.settings.seed, 1, epoch])
            self._epoch, self._order = epoch, rng.permutation(len(self.examples))
        size = self.settings.questions
        pairs = [self.encoded(number) for number in self._order[place * size : (place + 1) * size].tolist()]
        return [source for source, _ in pairs], [target for _, target in pairs]

    def encoded(self, number: int) -> tuple[list[int], list[int]]:
        """Prompt and answer of one example as token ids; remembered."""
        if number not in self._kept:
            example = self.examples[number]
            context = self._again.get(number) or self.context(example)
            self._kept[number] = encode_pair(self.reader, context, example.answers)
        return self._kept[number]

    def context(self, example: Example) -> PackedContext:
        """The example's ranking as the packer packs it, with its own passage put in if none of them has the answer."""
        query = Query(example.id, example.question)
        ranking = example.ranking or (example.passage, *example.negatives)
        is_closed_book = self.reader.prompt.template.passage is None
        hits = [Hit(passage, -float(rank), "mined") for rank, passage in enumerate(() if is_closed_book else ranking)]
        (context,) = self.packer.pack([query], [hits])
        if is_closed_book or holds(context, example.answers):
            return context
        kept = [hit for hit in context.hits if hit.passage.id != example.passage.id]
        # Without the last one or two: the own passage may be longer than what it takes the place of.
        for left in range(max(len(kept) - 1, 0), -1, -1):
            restored = [*kept[:left], Hit(example.passage, -float(left), "gold")]
            (context,) = self.packer.pack([query], [restored])
            if holds(context, example.answers):
                return context
        return context


def encode_pair(reader: LmReader, context: PackedContext, answers: Sequence[str]) -> tuple[list[int], list[int]]:
    """A context's prompt and the answer to be written, as token ids; of several answers one that the context has."""
    answer = next((a for a in answers if holds(context, (a,))), answers[0])
    # Of several windows one that has the answer: the others have nothing to learn it from.
    prompts, windows = reader.encode(context), context.by_window()
    texts = [[hit.passage.text for hit in window] for window in windows]
    best = next((n for n, window in enumerate(texts) if any(has_answer(t, (answer,)) for t in window)), 0)
    return prompts[best], reader.encode_answer(as_written(answer, texts[best]))


def holds(context: PackedContext, answers: Sequence[str]) -> bool:
    """Whether a packed passage has one of the answers."""
    return any(has_answer(hit.passage.text, answers) for hit in context.hits)


@dataclass(frozen=True, slots=True)
class TuneSet:
    """Questions to measure on while training, packed once."""

    contexts: Sequence[PackedContext]
    gold: Sequence[Gold]

    @classmethod
    def pack(
        cls,
        packer: Packer,
        questions: Sequence[tuple[Query, Gold]],
        hits: Sequence[Sequence[Hit]],
        *,
        again: Again | None = None,
    ) -> "TuneSet":
        """`again`: of a second pass; a question that is not read again keeps its first context."""
        contexts = packer.pack([query for query, _ in questions], hits)
        if again is not None:
            contexts = [found or first for first, found in zip(contexts, again(contexts), strict=True)]
        return cls(contexts, [gold for _, gold in questions])

    def scores(self, reader: LmReader) -> dict[str, float]:
        """Mean EM and F1, 0 to 100."""
        answers = reader.read(self.contexts)
        pairs = [(answer.text, gold.answers) for answer, gold in zip(answers, self.gold, strict=True)]
        return {
            "em": round(100 * sum(exact_match(text, gold) for text, gold in pairs) / len(pairs), 1),
            "f1": round(100 * sum(f1(text, gold) for text, gold in pairs) / len(pairs), 1),
        }


def train_method(
    reader: LmReader,
    method: Method,
    batches: Batches,
    tune: Mapping[str, TuneSet],
    draft: Draft,
    fit_settings: FitSettings,
    *,
    stored: torch.dtype = torch.float32,
    log: Callable[[str], None] = lambda line: None,
) -> None:
    """Train `method` on the reader's frozen model into `draft`: the method's files, and curve.json.

    Scores on tune are the mean over the sets as "tune.em", and each set's own. Resumes from the checkpoint in `draft`
    (declare `CHECKPOINT` as scratch). Raises AssertionError if a weight of the frozen model changed.
    """
    backbone = reader.backbone
    before = fingerprint(backbone.model)
    count = method.count(backbone)
    log(f"{len(batches.examples)} examples, {batches.per_epoch} batches an epoch, {count.trainable:,} trained values")
    if isinstance(method, NeuralRecursion):
        log(str(cost_of_passes(backbone, method, tokens=len(batches(0)[0][0]))))
    method.attach(backbone)

    def evaluate() -> dict[str, float]:
        with torch.autocast(backbone.device.type, torch.bfloat16, enabled=fit_settings.autocast):
            found = {name: chosen.scores(reader) for name, chosen in tune.items()}
        mean = {f"tune.{m}": round(sum(s[m] for s in found.values()) / len(found), 2) for m in ("em", "f1")}
        return mean | {f"{name}.{metric}": value for name, scores in found.items() for metric, value in scores.items()}

    def loss(batch: Targets) -> torch.Tensor:
        return backbone.loss(*batch)

    try:
        result = fit(
            {"method": method},
            batches,
            loss,
            fit_settings,
            checkpoint=draft.path / CHECKPOINT,
            evaluate=evaluate if tune else None,
            log=log,
        )
        method.save(draft.path, dtype=stored)
    finally:
        method.detach()
    if fingerprint(backbone.model) != before:
        raise AssertionError(f"the frozen weights of {backbone.name} have changed")
    curve = [{key: value for key, value in entry.items() if key != "seconds"} for entry in result.curve]
    draft.write_json("curve.json", curve)
    draft.counts |= {
        "trainable": count.trainable,
        "frozen": 0 if isinstance(method, FineTuning) else count.frozen,
        "examples": len(batches.examples),
        "questions_seen": curve[-1]["step"] * fit_settings.accumulate * batches.size,
    }
    draft.extra["backbone"] = {"name": backbone.name, "fingerprint": backbone.fingerprint}
    draft.extra["warnings"] = result.warnings
    draft.measured |= {"training_seconds": round(result.seconds, 1), "peak_memory_bytes": peak_memory_bytes()}


def search_prompt(
    reader: LmReader,
    method: Method,
    batches: ContextBatches,
    tune: Mapping[str, TuneSet],
    draft: Draft,
    settings: SearchSettings,
    *,
    stored: torch.dtype = torch.float32,
    log: Callable[[str], None] = lambda line: None,
) -> None:
    """Search for the vectors of a soft prompt, from those it has, through an engine: the same files as `train_method`.

    Generation g is judged by the answers of batch g, what is kept by those of all tune questions (log-likelihood a
    token). EM and F1 on tune are read at the start and at the end. Resumes from the journal in `draft` (declare
    `JOURNAL` as scratch).
    """
    if not isinstance(method, PromptTuning):
        raise DataError(f"black-box search: the method is {method.kind}; it must be prompt-tuning.")
    backbone, engine = reader.backbone, Metered(LocalEngine(reader.backbone))

    def train(generation: int) -> Pairs:
        return [(Prompted(ids=source), target) for source, target in zip(*batches(generation), strict=True)]

    known = [
        pair for chosen in tune.values() for pair in zip(chosen.contexts, chosen.gold, strict=True) if pair[1].answers
    ]
    asked = [encode_pair(reader, context, gold.answers) for context, gold in known]
    pairs = [(Prompted(ids=source), target) for source, target in asked]

    def scores() -> dict[str, float]:
        method.attach(backbone)
        try:
            found = {name: chosen.scores(reader) for name, chosen in tune.items()}
        finally:
            method.detach()
        return {f"tune.{m}": round(sum(s[m] for s in found.values()) / len(found), 2) for m in ("em", "f1")}

    with frozen_guard(backbone):
        start = method.prompt.detach().cpu().numpy().copy()
        objective = Continuation(engine, train, pairs)
        result = search(engine, objective, start, settings, journal=draft.path / JOURNAL, log=log)
        before = scores()
        with torch.no_grad():
            method.prompt.copy_(torch.from_numpy(result.best.words))
        after = scores()
    method.save(draft.path, dtype=stored)
    curve = [{"loss": -result.curve[0]["tune"], **entry} for entry in result.curve]
    curve[0] |= before
    curve[-1] |= after
    draft.write_json("curve.json", curve)
    count = method.count(backbone)
    draft.counts |= {
        "trainable": settings.dimensions,
        "frozen": count.frozen,
        "examples": len(batches.examples),
        "calls": result.calls,
        "questions_seen": result.calls * batches.settings.questions,
        "tune_calls": result.tune_calls,
    }
    draft.extra["backbone"] = {"name": backbone.name, "fingerprint": backbone.fingerprint}
    draft.extra["warnings"] = []
    draft.measured |= {
        "training_seconds": round(result.seconds, 1),
        "server_seconds": round(result.server_seconds, 1),
        "bytes_up": engine.use.bytes_up,
        "bytes_down": engine.use.bytes_down,
        "peak_memory_bytes": peak_memory_bytes(),
    }
