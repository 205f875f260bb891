"""Two runs on the same questions, paired; and numbers beside what a recipe expects of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from odqa.errors import DataError
from odqa.evaluate.funnel import QuestionResult
from odqa.evaluate.intervals import RESAMPLES, Interval, paired_difference
from odqa.evaluate.metrics import Metric
from odqa.evaluate.scores import Evaluation, Score


@dataclass(frozen=True, slots=True)
class Difference:
    """A metric of two runs on the same questions; `delta` is second - first, in the metric's unit."""

    name: str
    first: float
    second: float
    delta: Interval
    n: int

    @property
    def is_clear(self) -> bool:
        """Whether the 95% interval leaves zero out."""
        return self.delta.low > 0 or self.delta.high < 0


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs, paired; `changed` are the questions whose exact match or outcome differs, in question order."""

    differences: tuple[Difference, ...]
    changed: tuple[tuple[QuestionResult, QuestionResult], ...]

    @property
    def won(self) -> list[tuple[QuestionResult, QuestionResult]]:
        """Questions that only the second run answers right."""
        return [(first, second) for first, second in self.changed if second.em and not first.em]

    @property
    def lost(self) -> list[tuple[QuestionResult, QuestionResult]]:
        """Questions that only the first run answers right."""
        return [(first, second) for first, second in self.changed if first.em and not second.em]

    @property
    def moved(self) -> list[tuple[QuestionResult, QuestionResult]]:
        """Questions that both answer right or both wrong, for another reason."""
        return [(first, second) for first, second in self.changed if first.em == second.em]


def compare(
    first: Evaluation,
    second: Evaluation,
    *,
    metrics: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Paired comparison in the metrics that both have (of `metrics`, if given).

    Without a re-ranker in either of them, final_recall would repeat recall, and is left out unless asked for. Raises
    DataError if the two are not about the same questions.
    """
    other = {question.id: question for question in second.questions}
    here = {question.id for question in first.questions}
    if here != set(other):
        counts = (
            f"{len(here - set(other))} questions are only in the first, {len(set(other) - here)} only in the second"
        )
        raise DataError(f"runs of different question sets cannot be paired: {counts}.")
    if first.matcher != second.matcher:
        raise DataError(f"runs scored with different matchers cannot be paired: {first.matcher}, {second.matcher}.")
    pairs = [(question, other[question.id]) for question in first.questions]
    names = [score.name for score in first.scores if score.name in {score.name for score in second.scores}]
    if metrics is not None:
        names = [name for name in names if name in metrics]
    elif not first.is_reranked and not second.is_reranked:
        names = [name for name in names if Metric.parse(name).name != "final_recall"]
    return Comparison(
        tuple(_difference(Metric.parse(name), pairs, seed, resamples) for name in names),
        tuple((a, b) for a, b in pairs if a.em != b.em or a.outcome != b.outcome),
    )


def _difference(
    metric: Metric, pairs: Sequence[tuple[QuestionResult, QuestionResult]], seed: int, resamples: int
) -> Difference:
    values = [(metric.value(a), metric.value(b)) for a, b in pairs]
    known = [(a, b) for a, b in values if a is not None and b is not None]
    first, second = [a for a, _ in known], [b for _, b in known]
    delta = paired_difference(first, second, seed=seed, resamples=resamples)
    return Difference(str(metric), math.fsum(first) / len(known), math.fsum(second) / len(known), delta, len(known))


# What a re-ranker is for, in the order of a pipeline; the depths are our choice: the best passage, and DPR's 20.
GAIN_METRICS = ("final_recall@1", "final_recall@20", "recall_in_context", "em", "f1")


@dataclass(frozen=True, slots=True)
class Gain:
    """What the system `second` has more than `first` on one question set, paired by question."""

    first: str
    second: str
    question_set: str
    split: str
    differences: tuple[Difference, ...]

    @property
    def name(self) -> str:
        return f"{self.first} -> {self.second}"

    def check(self, expectations: Sequence["Expectation"]) -> list["Check"]:
        """Put each expectation beside the difference. Raises DataError for a metric that one of the two lacks."""
        found = {difference.name: difference for difference in self.differences}
        missing = [expected.name for expected in expectations if expected.name not in found]
        if missing:
            raise DataError(f"{self.name} on {self.question_set}: {missing[0]} was not measured in both.")
        return [Check(expected, self._score(found[expected.name])) for expected in expectations]

    def to_json(self) -> dict[str, Any]:
        """The entry of a result file: numbers with four decimals."""
        rows = [
            {
                "name": item.name,
                "from": round(item.first, 4),
                "to": round(item.second, 4),
                **{key: round(getattr(item.delta, key), 4) for key in ("value", "low", "high")},
                "n": item.n,
            }
            for item in self.differences
        ]
        where = {"question_set": self.question_set, "split": self.split}
        return {"from": self.first, "to": self.second, **where, "differences": rows}

    def _score(self, item: Difference) -> Score:
        interval = (item.delta.value, item.delta.low, item.delta.high)
        return Score(item.name, *interval, item.n, self.question_set, self.split, "paired")


def measure_gain(
    first_name: str,
    first: Evaluation,
    second_name: str,
    second: Evaluation,
    *,
    metrics: Sequence[str] = GAIN_METRICS,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Gain:
    """`compare` two systems in some metrics, in their order. Metrics that one of the two lacks are left out."""
    comparison = compare(first, second, metrics=metrics, seed=seed, resamples=resamples)
    differences = tuple(sorted(comparison.differences, key=lambda item: metrics.index(item.name)))
    return Gain(first_name, second_name, first.question_set, first.split, differences)


# --- expectations -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Expectation:
    """A number that a recipe promises: `value` give or take `tolerance`, both in the metric's unit.

    With `is_lower_bound` it may be larger; with `must_be_clear` its whole 95% interval must lie above 0, too.
    """

    name: str
    value: float
    tolerance: float
    is_lower_bound: bool = False
    must_be_clear: bool = False


@dataclass(frozen=True, slots=True)
class Check:
    """An expectation beside what was found."""

    expected: Expectation
    found: Score

    @property
    def ok(self) -> bool:
        """Compared at the four decimals that scores.json keeps, so that a file and a fresh run agree."""
        if self.expected.must_be_clear and round(self.found.low, 4) <= 0:
            return False
        above = round(self.found.value - self.expected.value, 4)
        return above >= -self.expected.tolerance and (self.expected.is_lower_bound or above <= self.expected.tolerance)


def check_expectations(evaluation: Evaluation, expectations: Sequence[Expectation]) -> list[Check]:
    """Put each expectation beside its score. Raises DataError for a metric that was not measured."""
    return [Check(expected, evaluation.score(expected.name)) for expected in expectations]
