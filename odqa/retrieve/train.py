"""Training a bi-encoder: a method on the frozen encoder of an index, for questions, passages or both.

A batch is B questions, each with its right passage and some that were taken for it; every passage of the batch is a
negative of every question, but for those that answer it. What a batch holds and the order of batches depend on seed
and epoch alone. Loss and gradient cache: `odqa.frozen.contrast`; the loop: `odqa.frozen.fit`. Nothing here reads a dev
file.

Where questions alone are trained, passages keep the vectors that the index has: a step encodes questions only, and what
is trained is searched without encoding the collection again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from odqa.artifacts import Draft
from odqa.corpus.examples import Epochs, Example
from odqa.corpus.store import PassageStore
from odqa.errors import DataError
from odqa.frozen.backbone import Backbone, fingerprint
from odqa.frozen.contrast import ContrastBatch, Texts, encode_texts, in_batch_loss
from odqa.frozen.fit import FitSettings, fit
from odqa.frozen.method import Method
from odqa.retrieve import dense
from odqa.retrieve.dense import LENGTH_STEP, Encoder
from odqa.retrieve.tuned import Side, Sides, save_description
from odqa.retrieve.vectors import VectorSearcher
from odqa.runtime import batches_by_length, peak_memory_bytes
from odqa.text import has_answer, token_string
from odqa.types import Gold, Passage, Query

CHECKPOINT = "checkpoint.safetensors"
_DEPTHS = (1, 5, 20)  # of the recall that is measured on tune questions


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """What training batches look like; values are our choice.

    `questions` a batch, each with at most `hard` negatives, drawn from the `pool` hardest. Texts are encoded in parts
    of at most `part_tokens` padded tokens; with `cache` only one part is in memory at a time (the gradient cache).
    `source_weights` repeats the rows of a source within an epoch (1 if not named).
    """

    questions: int = 64
    hard: int = 1
    pool: int = 20
    part_tokens: int = 4096
    cache: bool = True
    source_weights: Mapping[str, int] | None = None
    seed: int = 0


class BiEncoder:
    """The frozen encoder of an index with a method attached for one side, or for both if one model does both."""

    def __init__(self, encoder: Encoder, side: Sides, create: Callable[[Backbone], Method]) -> None:
        """`create` makes the method for the frozen model. Raises DataError for sides that no one method can have."""
        if encoder.method is not None:
            raise DataError(f"{encoder.method}: the encoder has a method already. Train on an index of the frozen one.")
        if side == "both" and encoder.passage_folder != encoder.question_folder:
            raise DataError(
                "training: questions and passages have models of their own, and a method is for one model. Train one "
                "side (side: questions or passages)."
            )
        self.encoder, self.side = encoder, side
        self.trained: tuple[Side, ...] = ("questions", "passages") if side == "both" else (side,)
        self.tower = encoder.tower(self.trained[0], trainable=True)
        if self.tower.device.type == "cpu" and hasattr(self.tower.model, "set_attn_implementation"):
            # Its backward pass is a third faster than the fused one on processors (docs/LOG.md).
            self.tower.model.set_attn_implementation("eager")
        self.backbone = self.tower.backbone()
        self.method = create(self.backbone)
        self.in_memory = fingerprint(self.backbone.model)
        self.method.attach(self.backbone)

    @property
    def device(self) -> torch.device:
        return self.tower.device

    def check_frozen(self) -> None:
        """Raises AssertionError if a bit of the backbone has changed since it was loaded."""
        self.method.detach()
        if fingerprint(self.backbone.model) != self.in_memory:
            raise AssertionError(f"the frozen weights of {self.backbone.name} have changed")
        self.method.attach(self.backbone)

    def questions(self, texts: Sequence[str], part_tokens: int) -> Texts | torch.Tensor:
        """Questions of a batch: texts to encode, or their vectors if the method is not for them."""
        settings = self.encoder.resolved
        if "questions" not in self.trained:
            return torch.from_numpy(self.encoder.encode_questions(texts))
        return self._texts([settings.query_prefix + text for text in texts], settings.query_max_tokens, part_tokens)

    def passages(self, passages: Sequence[Passage], part_tokens: int) -> Texts:
        """Passages of a batch as texts to encode."""
        settings = self.encoder.resolved
        return self._texts([settings.passage_text(p) for p in passages], settings.passage_max_tokens, part_tokens)

    def vectors(self, texts: Texts | torch.Tensor, *, cache: bool) -> torch.Tensor:
        """(N, D), float32; with the gradient of the method where texts are encoded."""
        if isinstance(texts, torch.Tensor):
            return texts.to(self.device)
        return encode_texts(lambda part: self.tower.vectors(dict(part)), texts, cache=cache)

    def encode_questions(self, texts: Sequence[str]) -> np.ndarray:
        """`Encoder.encode_questions` with the method as it is now."""
        settings = self.encoder.resolved
        if "questions" not in self.trained:
            return self.encoder.encode_questions(texts)
        return self.tower.encode([settings.query_prefix + text for text in texts], settings.query_max_tokens)

    def encode_passages(self, passages: Sequence[Passage]) -> np.ndarray:
        """`Encoder.encode_passages` with the method as it is now."""
        settings = self.encoder.resolved
        if "passages" not in self.trained:
            return self.encoder.encode_passages(passages)
        return self.tower.encode([settings.passage_text(p) for p in passages], settings.passage_max_tokens)

    def _texts(self, texts: Sequence[str | tuple[str, str]], max_tokens: int | None, part_tokens: int) -> Texts:
        encodings = self.tower.tokenise(texts, max_tokens)
        lengths = [len(encoding.ids) for encoding in encodings]
        rows = list(batches_by_length(lengths, part_tokens, LENGTH_STEP))
        parts = [self.tower.inputs([encodings[row] for row in part]) for part in rows]
        return Texts(parts, [torch.tensor(part) for part in rows])


class KnownVectors:
    """The passage vectors of an index, by passage."""

    def __init__(self, store: PassageStore, vectors: VectorSearcher) -> None:
        self.store, self.searcher = store, vectors
        self._rows: dict[str, int | None] = {}

    def __contains__(self, passage: Passage) -> bool:
        """Whether the index has the passage. Raises DataError if it has another text under its id."""
        if passage.id not in self._rows:
            row = self.store.row_of(passage.id) if passage.id in self.store else None
            if row is not None and self.store[row].text != passage.text:
                raise DataError(
                    f"training: passage {passage.id!r} of the training files is another text in the index. Name the "
                    "files that the index was built from under passages."
                )
            self._rows[passage.id] = row
        return self._rows[passage.id] is not None

    def of(self, passages: Sequence[Passage]) -> torch.Tensor:
        """(N, D) float32 of passages that the index has."""
        return torch.from_numpy(self.searcher.take(np.array([self._rows[p.id] for p in passages], np.int64)))

    def search(self, vectors: np.ndarray, k: int) -> list[list[Passage]]:
        """The k best passages of each question."""
        found = self.searcher.search(vectors, k).rows.tolist()
        return [self.store.rows([row for row in rows if row >= 0]) for rows in found]


class ContrastBatches:
    """`batches(i)`: the i-th training batch. `known` has the passages' vectors; None: their texts are encoded."""

    def __init__(
        self, examples: Sequence[Example], model: BiEncoder, settings: BatchSettings, known: KnownVectors | None
    ) -> None:
        self.model, self.settings, self.known = model, settings, known
        self.examples = [e for e in examples if e.answers and self._has(e.passage)]
        self.left_out = len(examples) - len(self.examples)
        if not self.examples:
            raise DataError(
                "training: no example has an answer and a passage that the index has. Rows of a training file name "
                "their passages by positive_ids; name the file that holds these under passages."
            )
        self.epochs = Epochs(self.examples, settings.questions, weights=settings.source_weights, seed=settings.seed)

    def __call__(self, index: int) -> ContrastBatch:
        chances = np.random.default_rng([self.settings.seed, index])
        chosen = [self.examples[at] for at in self.epochs(index)]
        passages = {example.passage.id: example.passage for example in chosen}
        for example in chosen:
            passages |= {passage.id: passage for passage in self._draw(example, chances)}
        column = {passage_id: at for at, passage_id in enumerate(passages)}
        listed = list(passages.values())
        tokens = self.settings.part_tokens
        return ContrastBatch(
            self.model.questions([example.question for example in chosen], tokens),
            self.known.of(listed) if self.known is not None else self.model.passages(listed, tokens),
            torch.tensor([column[example.passage.id] for example in chosen]),
            left_out(chosen, listed),
        )

    def _draw(self, example: Example, chances: np.random.Generator) -> list[Passage]:
        """Negatives from the hardest ones, without replacement."""
        hardest = [p for p in example.negatives[: self.settings.pool] if self._has(p)]
        drawn = chances.permutation(len(hardest))[: self.settings.hard]
        return [hardest[number] for number in drawn]

    def _has(self, passage: Passage) -> bool:
        return self.known is None or passage in self.known


def left_out(examples: Sequence[Example], passages: Sequence[Passage]) -> torch.Tensor:
    """bool (B, U): passage j is no negative of question i, because it holds an answer or is known to be right.

    An answer is found as `odqa.text.has_answer` finds it. The question's own passage is not left out, but every other
    one with the same text is.
    """
    strings = [token_string(passage.text) for passage in passages]
    holders: dict[str, list[int]] = {}  # of a token: few passages of a batch have an answer's rarest one
    for column, text in enumerate(strings):
        for token in set(text.split()):
            holders.setdefault(token, []).append(column)
    own = {passage.id: column for column, passage in enumerate(passages)}
    columns: dict[str, list[int]] = {}
    for column, passage in enumerate(passages):
        columns.setdefault(passage.text, []).append(column)
    found = np.zeros((len(examples), len(passages)), bool)
    for row, example in enumerate(examples):
        for needle in map(token_string, example.answers):
            rarest: list[int] = min((holders.get(token, []) for token in needle.split()), key=len, default=[])
            found[row, [column for column in rarest if needle in strings[column]]] = True
        for right in example.positives:
            found[row, columns.get(right.text, [])] = True
        found[row, own[example.passage.id]] = False
    return torch.from_numpy(found)


@dataclass(frozen=True, slots=True)
class Asked:
    """A tune question; `candidates` are ranked where the collection's vectors are not those of the method."""

    query: Query
    gold: Gold
    candidates: tuple[Passage, ...] = ()


def recall_scores(
    model: BiEncoder, asked: Sequence[Asked], known: KnownVectors | None, depths: Sequence[int] = _DEPTHS
) -> dict[str, float]:
    """Share (0 to 100) of questions with an answer in the first k passages.

    With `known`, of the whole index; else of the question's candidates, which is more than a search would find.
    """
    questions = model.encode_questions([one.query.text for one in asked])
    if known is not None:
        ranked = known.search(questions, max(depths))
    else:
        distinct = {passage.id: passage for one in asked for passage in one.candidates}
        vectors = dict(zip(distinct, model.encode_passages(list(distinct.values())), strict=True))
        ranked = []
        for one, question in zip(asked, questions, strict=True):
            scores = {passage.id: float(vectors[passage.id] @ question) for passage in one.candidates}
            ranked.append(sorted(one.candidates, key=lambda passage, of=scores: -of[passage.id]))  # type: ignore[misc]
    holds = [
        [has_answer(passage.text, one.gold.answers) for passage in found[: max(depths)]]
        for one, found in zip(asked, ranked, strict=True)
    ]
    return {f"recall@{k}": 100 * sum(any(row[:k]) for row in holds) / len(holds) for k in depths}


def train_bi_encoder(
    model: BiEncoder,
    examples: Sequence[Example],
    tune: Mapping[str, Sequence[Asked]],
    draft: Draft,
    *,
    batches: BatchSettings,
    temperature: float,
    fit_settings: FitSettings,
    known: KnownVectors | None,
    stored: torch.dtype = torch.float16,
    log: Callable[[str], None] = lambda line: None,
) -> None:
    """Train the method into `draft`: its files, what it was trained for, and curve.json.

    `known` has the passages' vectors where questions alone are trained. Scores on tune are each set's own, and their
    mean over the sets as "tune.recall@k". Resumes from the checkpoint in `draft` (declare `CHECKPOINT` as scratch). The
    backbone is guarded: AssertionError if one of its bits changed.
    """
    get = ContrastBatches(examples, model, batches, known)
    log(f"{len(get.examples)} examples, {get.left_out} left out, {get.epochs.per_epoch} batches an epoch")

    def evaluate() -> dict[str, float]:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=fit_settings.autocast):
            found = {name: recall_scores(model, asked, known) for name, asked in tune.items()}
        names = next(iter(found.values()))
        mean = {f"tune.{name}": round(sum(s[name] for s in found.values()) / len(found), 2) for name in names}
        own = {f"{of}.{name}": round(score, 1) for of, scores in found.items() for name, score in scores.items()}
        return mean | own

    def loss_of(batch: ContrastBatch) -> torch.Tensor:
        questions = model.vectors(batch.questions, cache=batches.cache)
        passages = model.vectors(batch.passages, cache=batches.cache)
        own, none = batch.own.to(model.device), batch.left_out.to(model.device)
        return in_batch_loss(questions, passages, own, none, temperature=temperature)

    count = model.method.count(model.backbone)
    result = fit(
        {"method": model.method},
        get,
        loss_of,
        fit_settings,
        checkpoint=draft.path / CHECKPOINT,
        evaluate=evaluate if tune else None,
        log=log,
    )
    model.check_frozen()
    model.method.save(draft.path, dtype=stored)
    save_description(draft.path, model.side, weights_of(model.encoder), asdict(model.encoder.resolved))
    curve = [{key: value for key, value in entry.items() if key != "seconds"} for entry in result.curve]
    draft.write_json("curve.json", curve)
    draft.counts |= {
        "trainable": count.trainable,
        "frozen": count.frozen,
        "examples": len(get.examples),
        "left_out": get.left_out,
        "questions_seen": fit_settings.steps * fit_settings.accumulate * get.epochs.size,
    }
    draft.extra["backbone"] = {"name": model.backbone.name, "fingerprint": model.backbone.fingerprint}
    draft.measured |= {"training_seconds": round(result.seconds, 1), "peak_memory_bytes": peak_memory_bytes()}


def weights_of(encoder: Encoder) -> dict[str, Any]:
    """Fingerprints of an encoder's two models, by side."""
    return {side: dense.fingerprint(encoder.folder(side)) for side in ("questions", "passages")}
