"""Search over texts alone: which instruction, which demonstrations, in which order. Nothing is trained, nothing stored
but a text, and any API that writes text will do: no vectors, no log-probabilities.

The search: every instruction without demonstrations first; then, until the budget is spent, one change of the best
prompt at a time (another instruction; a demonstration more, fewer, exchanged or moved), which stays if it is not worse
on the training set. It is the simplest evolution there is, one parent and one child (our choice). What was best on tune
comes back. A call is one pass of the training set with one prompt, as in `odqa.frozen.blackbox`; a prompt that was
tried before costs nothing.

An example that is a demonstration is not asked about: the prompt has its answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from odqa.errors import DataError
from odqa.frozen.engine import Ask, Engine, Prompted, Sampling


@dataclass(frozen=True, slots=True)
class Example:
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """An instruction, and the numbers of the training examples that are shown, in order."""

    instruction: str
    shown: tuple[int, ...] = ()


Render = Callable[[str, Sequence[Example], str], str]
IsRight = Callable[[str, str], bool]


@dataclass(frozen=True, slots=True)
class TextTask:
    """`render(instruction, demonstrations, text)` is what the model goes on from; `is_right(written, answer)` judges.

    `stop` and `max_tokens` as in `Sampling`; texts are written greedily.
    """

    train: Sequence[Example]
    tune: Sequence[Example]
    render: Render
    is_right: IsRight
    max_tokens: int = 16
    stop: tuple[str, ...] = ("\n",)


@dataclass(frozen=True, slots=True)
class TextResult:
    """The prompt that was `best` on tune, its share of right tune answers, and the budget that was spent.

    `curve`: after each call (calls, best share on train, best share on tune so far).
    """

    best: TextPrompt
    quality: float
    calls: int
    tune_calls: int
    curve: list[dict[str, Any]]


def search_texts(
    engine: Engine,
    task: TextTask,
    instructions: Sequence[str],
    *,
    calls: int,
    demonstrations: int = 4,
    seed: int = 1,
    log: Callable[[str], None] = lambda line: None,
) -> TextResult:
    """Search with a budget of `calls` for a prompt of at most so many `demonstrations`.

    Raises DataError without instructions or examples, or with a budget that does not try every instruction once.
    """
    if not instructions or not task.train or not task.tune:
        missing = "instructions" if not instructions else "train examples" if not task.train else "tune examples"
        raise DataError(f"text search: there are no {missing}.")
    if len(set(instructions)) != len(instructions):
        raise DataError("text search: an instruction is there twice.")
    if calls < len(instructions):
        raise DataError(
            f"text search: the budget of {calls} calls is smaller than the first round, one for each of "
            f"{len(instructions)} instructions. Raise calls or give fewer."
        )
    if not 0 <= demonstrations < len(task.train):
        raise DataError(
            f"text search: {demonstrations} demonstrations of {len(task.train)} training examples leave nothing to ask "
            "about. Show fewer."
        )
    return _TextSearch(engine, task, instructions, calls, demonstrations, seed, log).run()


class _TextSearch:
    def __init__(
        self,
        engine: Engine,
        task: TextTask,
        instructions: Sequence[str],
        calls: int,
        demonstrations: int,
        seed: int,
        log: Callable[[str], None],
    ) -> None:
        self.engine, self.task, self.instructions, self.budget, self.log = engine, task, instructions, calls, log
        self.most, self.chances = demonstrations, np.random.default_rng(seed)
        self.tried: dict[TextPrompt, float] = {}
        self.best: TextPrompt | None = None
        self.quality, self.tune_calls = -1.0, 0
        self.curve: list[dict[str, Any]] = []

    def run(self) -> TextResult:
        # 1. Every instruction by itself.
        for instruction in self.instructions:
            self._try(TextPrompt(instruction))
        parent = max(self.tried, key=lambda prompt: self.tried[prompt])
        # 2. Changes of the best one. The space may be smaller than the budget: 50 misses in a row end the search.
        missed = 0
        while len(self.tried) < self.budget and missed < 50:
            child = self._changed(parent)
            if child in self.tried:
                missed += 1
                continue
            missed = 0
            if self._try(child) >= self.tried[parent]:
                parent = child
        assert self.best is not None
        return TextResult(self.best, self.quality, len(self.tried), self.tune_calls, self.curve)

    def _try(self, prompt: TextPrompt) -> float:
        """The share of right answers on train; also tried on tune if no other prompt is better on train."""
        share = right_share(self.engine, self.task, prompt, self.task.train)
        is_promising = share >= max(self.tried.values(), default=-1.0)
        self.tried[prompt] = share
        if is_promising:
            self.tune_calls += 1
            quality = right_share(self.engine, self.task, prompt, self.task.tune)
            if quality > self.quality:
                self.best, self.quality = prompt, quality
        entry = {"calls": len(self.tried), "train": max(self.tried.values()), "tune": self.quality}
        self.curve.append(entry)
        self.log(" ".join(f"{name} {value:.4g}" for name, value in entry.items()))
        return share

    def _changed(self, prompt: TextPrompt) -> TextPrompt:
        """One change, drawn evenly among the kinds that are possible."""
        shown = list(prompt.shown)
        free = [number for number in range(len(self.task.train)) if number not in prompt.shown]
        kinds = ["instruction"] if len(self.instructions) > 1 else []
        kinds += ["more"] if len(shown) < self.most else []
        kinds += ["fewer", "exchange"] if shown else []
        kinds += ["move"] if len(shown) > 1 else []
        if not kinds:
            return prompt
        kind = kinds[self._draw(len(kinds))]
        if kind == "instruction":
            others = [one for one in self.instructions if one != prompt.instruction]
            return TextPrompt(others[self._draw(len(others))], prompt.shown)
        if kind == "more":
            shown.insert(self._draw(len(shown) + 1), free[self._draw(len(free))])
        elif kind == "exchange":
            shown[self._draw(len(shown))] = free[self._draw(len(free))]
        else:
            moved = shown.pop(self._draw(len(shown)))
            if kind == "move":
                shown.insert(self._draw(len(shown) + 1), moved)
        return TextPrompt(prompt.instruction, tuple(shown))

    def _draw(self, count: int) -> int:
        return int(self.chances.integers(count))


def right_share(engine: Engine, task: TextTask, prompt: TextPrompt, examples: Sequence[Example]) -> float:
    """The share (0 to 1) of examples that are answered right; those that the prompt shows are left out."""
    shown = [task.train[number] for number in prompt.shown]
    asked = [one for one in examples if one not in shown]
    right = [
        task.is_right(written, one.answer)
        for written, one in zip(answer_all(engine, task, prompt, [one.text for one in asked]), asked, strict=True)
    ]
    return sum(right) / len(right)


def answer_all(engine: Engine, task: TextTask, prompt: TextPrompt, texts: Sequence[str]) -> list[str]:
    """What the model writes about each text, with this prompt."""
    shown = [task.train[number] for number in prompt.shown]
    sampling = Sampling(max_tokens=task.max_tokens, stop=task.stop)
    asks = [Ask(Prompted(task.render(prompt.instruction, shown, text)), sampling) for text in texts]
    return [written[0].text for written in engine.generate(asks)]
