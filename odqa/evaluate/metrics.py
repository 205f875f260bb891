"""What is measured: a metric is a value whose text is what one types to get it, and reads one judged question."""

from collections.abc import Callable
from dataclasses import dataclass

from odqa.errors import DataError
from odqa.evaluate.funnel import QuestionResult

DEPTHS = (1, 5, 20, 100)  # the k of recall@k that the literature prints (DPR: 1, 5, 20, 100)


@dataclass(frozen=True, slots=True)
class Metric:
    """What is measured; `str()` and `repr()` are what one types, `Metric.parse` reads it back."""

    name: str
    k: int | None = None

    def __str__(self) -> str:
        return self.name if self.k is None else f"{self.name}@{self.k}"

    __repr__ = __str__

    @property
    def unit(self) -> str:
        return "tokens" if self.name == "tokens" else "%"

    @classmethod
    def parse(cls, text: str) -> "Metric":
        """Raises DataError with the names that there are."""
        name, at, depth = text.partition("@")
        if name in _WITH_DEPTH and depth.isdecimal() and int(depth) > 0:
            return cls(name, int(depth))
        if name in _VALUES and name not in _WITH_DEPTH and not at:
            return cls(name)
        known = ", ".join(f"{name}@k" if name in _WITH_DEPTH else name for name in _VALUES)
        raise DataError(f"{text!r} is not a metric of odqa ({known}).")

    def value(self, question: "QuestionResult") -> float | None:
        """0 to 100, or tokens; None where the metric says nothing about the question."""
        return _VALUES[self.name](question, self.k or 0)


def within(rank: int | None, k: int) -> float:
    return 100.0 * (rank is not None and rank <= k)


def _answerable(value: Callable[[QuestionResult, int], float]) -> Callable[[QuestionResult, int], float | None]:
    return lambda question, k: value(question, k) if question.is_answerable else None


_VALUES: dict[str, Callable[[QuestionResult, int], float | None]] = {
    "em": lambda question, _: 100.0 * question.em,
    "f1": lambda question, _: None if question.f1 is None else 100.0 * question.f1,
    "recall": _answerable(lambda question, k: within(question.retrieve_rank, k)),
    "rerank_recall": _answerable(lambda question, k: within(question.rerank_rank, k)),
    "final_recall": _answerable(lambda question, k: within(question.final_rank, k)),
    "recall_in_context": _answerable(lambda question, _: 100.0 * question.in_context),
    "ceiling": lambda question, _: (
        100.0 * question.in_collection if question.is_answerable and question.in_collection is not None else None
    ),
    "tokens": lambda question, _: float(question.tokens),
}
_WITH_DEPTH = frozenset({"recall", "rerank_recall", "final_recall"})
