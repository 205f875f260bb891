"""A mixture of tasks under templates: batches for training, tests under templates and from articles kept apart.

Nothing in an item says which task it is but its wording. Item n depends on seed and n alone. Articles are kept for
testing by a hash of their title, so whoever trains on the same files trains on the same ones.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from odqa.corpus.examples import Example
from odqa.errors import DataError
from odqa.frozen.backbone import Backbone, fingerprint
from odqa.frozen.fit import FitResult, FitSettings, fit
from odqa.frozen.method import Method
from odqa.lm.instructions import Template, parse_template
from odqa.lm.records import TASKS, draw_record
from odqa.lm.tasks import Corpus
from odqa.text import exact_match
from odqa.types import Passage

NEW_TOKENS = 12  # our choice: what an answer may have at most
_BLOCK = 8  # our choice: batches whose items are sorted by length together
_REDRAWS = 50  # our choice: of an item that is too long


@dataclass(frozen=True, slots=True)
class Wordings:
    """The templates of a task."""

    cluster: str
    train: tuple[Template, ...]
    test: tuple[Template, ...]


def read_templates(tasks: Mapping[str, Any], where: str) -> dict[str, Wordings]:
    """Templates of a file by task (`cluster`, `train`, `test` each), checked against what the tasks' records have.

    Raises DataError for an unknown task, or a template that lacks a field of its task; `where` is the file.
    """
    found = {}
    for name, texts in tasks.items():
        if name not in TASKS:
            raise DataError(f"{where}: tasks.{name} is no task; there are {', '.join(TASKS)}.")
        task = TASKS[name]
        sides = []
        for part in ("train", "test"):
            texts_of = getattr(texts, part)
            parsed = tuple(parse_template(text, f"{where}: tasks.{name}.{part}.{n}") for n, text in enumerate(texts_of))
            for template in parsed:
                template.check(reads=task.reads, writes=task.writes, choices=task.choices)
            sides.append(parsed)
        found[name] = Wordings(texts.cluster, *sides)
    return found


def split_articles(
    passages: Sequence[Passage], examples: Sequence[Example], share: float, *, long_share: float = 0.0
) -> tuple[Corpus, Corpus]:
    """Articles to train on, and to test on: of the latter about `share`. By title."""

    def is_kept(title: str) -> bool:
        return int.from_bytes(hashlib.sha256(title.encode()).digest()[:4], "big") < share * 2**32

    parts = []
    for kept in (False, True):
        parts.append(
            Corpus(
                [passage for passage in passages if is_kept(passage.title) is kept],
                [example for example in examples if is_kept(example.passage.title) is kept],
                long_share,
            )
        )
    return parts[0], parts[1]


@dataclass(frozen=True, slots=True)
class Item:
    """A worded record: what is read, what is to be written, as text."""

    task: str
    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Mixture:
    """Tasks with shares, a corpus, templates: `item(n)`.

    `examples`: so many different items (None: no two are the same draw). Sources of more than `longest` tokens are
    drawn again. Raises DataError for a mixture without tasks, or with a task that has no share or no record.
    """

    corpus: Corpus
    templates: Mapping[str, Sequence[Template]]
    encode: Callable[[str], list[int]]
    shares: Mapping[str, float]
    longest: int = 96
    examples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.shares:
            raise DataError("mixture: there is no task in it. Name some.")
        for name, share in self.shares.items():
            if share <= 0:
                raise DataError(f"mixture: the task {name} is empty (its share is {share:g}). Leave it out.")
            if not self.templates.get(name):
                raise DataError(f"mixture: the task {name} is empty: it has no template. Write one, or leave it out.")
            draw_record(name, self.corpus, np.random.default_rng(0))

    def item(self, number: int) -> Item:
        rng = np.random.default_rng([self.seed, number if self.examples is None else number % self.examples])
        names = list(self.shares)
        chances = np.array([self.shares[name] for name in names])
        name = names[int(rng.choice(len(names), p=chances / chances.sum()))]
        for _ in range(_REDRAWS):
            templates = self.templates[name]
            template = templates[int(rng.integers(len(templates)))]
            source, target = template.fill(draw_record(name, self.corpus, rng))
            if len(self.encode(source)) <= self.longest:
                return Item(name, source, target)
        raise DataError(
            f"mixture: {template.where}: {_REDRAWS} records in a row give more than {self.longest} tokens. Raise "
            "longest, or shorten the template."
        )


def encoder_of(backbone: Backbone) -> Callable[[str], list[int]]:
    """Text to token ids as the backbone reads it: without the end that some tokenizers put behind a causal text."""
    ends = backbone.end_tokens() if backbone.architecture == "causal" else frozenset[int]()

    def encode(text: str) -> list[int]:
        ids: list[int] = backbone.tokenizer(text, verbose=False)["input_ids"]
        return ids[:-1] if ids and ids[-1] in ends else ids

    return encode


def target_of(backbone: Backbone, text: str) -> list[int]:
    """The token ids to write, the end of the text included."""
    said = f" {text}" if backbone.architecture == "causal" else text
    ids: list[int] = backbone.tokenizer(said, add_special_tokens=False, verbose=False)["input_ids"]
    return [*ids, *sorted(backbone.end_tokens())[:1]]


class ItemBatches:
    """`batches(i)`: token ids of sources and targets of the i-th batch of `size` items of a mixture.

    Items of a block of batches are sorted by length: a batch has little padding, and the batches of a block come in
    any order.
    """

    def __init__(self, backbone: Backbone, mixture: Mixture, size: int) -> None:
        self.backbone, self.mixture, self.size = backbone, mixture, size
        self._block, self._batches = -1, list[list[tuple[list[int], list[int]]]]()

    def __call__(self, index: int) -> tuple[list[list[int]], list[list[int]]]:
        block, place = divmod(index, _BLOCK)
        if block != self._block:
            self._block, self._batches = block, self._plan(block)
        chosen = self._batches[place]
        return [source for source, _ in chosen], [target for _, target in chosen]

    def _plan(self, block: int) -> list[list[tuple[list[int], list[int]]]]:
        count = _BLOCK * self.size
        items = [self.mixture.item(number) for number in range(block * count, (block + 1) * count)]
        pairs = [(self.mixture.encode(item.source), target_of(self.backbone, item.target)) for item in items]
        pairs.sort(key=lambda pair: len(pair[0]))
        batches = [pairs[start : start + self.size] for start in range(0, count, self.size)]
        order = np.random.default_rng([self.mixture.seed, 1, block]).permutation(_BLOCK)
        return [batches[number] for number in order.tolist()]


@dataclass(frozen=True, slots=True)
class Exam:
    """Items of each task that a model writes answers to; a right one is an exact match."""

    items: Sequence[Item]

    @classmethod
    def draw(cls, mixture: Mixture, count: int) -> "Exam":
        """`count` items of each task of a mixture."""
        found: dict[str, list[Item]] = {name: [] for name in mixture.shares}
        number = 0
        while any(len(items) < count for items in found.values()):
            item = mixture.item(number)
            number += 1
            if len(found[item.task]) < count:
                found[item.task].append(item)
        return cls([item for items in found.values() for item in items])

    def scores(self, backbone: Backbone, method: Method | None = None, *, batch_size: int = 32) -> list[float]:
        """100 or 0 an item, written greedily; a method that is not attached is for this."""
        if method is not None and not method.is_attached:
            method.attach(backbone)
            try:
                return self.scores(backbone, batch_size=batch_size)
            finally:
                method.detach()
        encode = encoder_of(backbone)
        sources = [encode(item.source) for item in self.items]
        order = sorted(range(len(sources)), key=lambda at: len(sources[at]))
        scores = [0.0] * len(sources)
        ends = backbone.end_tokens()
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            written = backbone.generate([sources[at] for at in chosen], max_new_tokens=NEW_TOKENS, do_sample=False)
            for at, ids in zip(chosen, written, strict=True):
                text = backbone.tokenizer.decode([i for i in ids if i not in ends], skip_special_tokens=True)
                scores[at] = 100.0 * exact_match(text, (self.items[at].target,))
        return scores


def train_on_mixture(
    backbone: Backbone,
    method: Method,
    batches: Callable[[int], tuple[list[list[int]], list[list[int]]]],
    settings: FitSettings,
    *,
    checkpoint: Path,
    evaluate: Callable[[], dict[str, float]] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> FitResult:
    """Train a method; it is detached again. Raises AssertionError if a frozen weight has changed."""
    before = fingerprint(backbone.model)
    method.attach(backbone)
    try:
        result = fit(
            {"method": method},
            batches,
            lambda batch: backbone.loss(*batch),
            settings,
            checkpoint=checkpoint,
            evaluate=evaluate,
            log=log,
        )
    finally:
        method.detach()
    if fingerprint(backbone.model) != before:
        raise AssertionError(f"the frozen weights of {backbone.name} have changed")
    return result


def by_name(names: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    """Mean score of each name (task, cluster), rounded to two digits."""
    found: dict[str, list[float]] = {}
    for name, score in zip(names, scores, strict=True):
        found.setdefault(name, []).append(score)
    return {name: round(sum(values) / len(values), 2) for name, values in found.items()}
