"""Joins the traces of a run with gold answers, after the run, and says how good it was and where answers were lost.

Nothing here retrieves, reads or knows a model. A metric is a value whose text is what one types to get it: `recall@20`.
Rates are in percent (0 to 100), `tokens` in tokens a question. Every score carries its question set, split, n, matcher
and a 95% interval: percentile bootstrap over questions (Efron 1979), seeded. A question that the run abstained on is
wrong, one that the run lacks is an error; neither leaves a mean.

Metrics, for a question with gold answers:

    em, f1              of the last answer (`odqa.text`)
    recall@k            an answer is in one of the first k passages that the first pass retrieved
    rerank_recall@k     the same after the first pass's re-ranker
    final_recall@k      the same in the ranking that the first pass packs from: rerank_recall@k with a re-ranker, and
                        recall@k without, so that systems with and without one compare
    recall_in_context   an answer is in the kept text of one packed passage of any pass (titles do not count)
    tokens              tokens given to the reader, summed over its passes

Without gold answers (unanswerable), only abstaining is right: em and f1 count it; recall has nothing to find and leaves
it out, so that its n is smaller.

The funnel gives each question exactly one outcome. A wrong one belongs to the stage that came nearest in any pass:

    not retrieved             no passage that a retriever returned holds an answer
    reranked away             one was retrieved, and re-ranking lost it: it is not among the re-ranked, or it would have
                              been packed in the retriever's order (it stood within the first m, m passages were packed)
                              and is not within the first m any more
    not packed                one came to the packer, and did not fit, was a duplicate, ranked too low, or was trimmed
                              to sentences without the answer
    misread                   one was packed, and the reader said something else (or should have abstained)
    undone by a re-pass       an earlier pass answered right, the last one does not
    correct                   right, and a packed passage holds an answer (or rightly abstained)
    correct without evidence  right, though no packed passage holds an answer: known by heart, or guessed

So recall_in_context is the share of `correct`, `misread` and those `undone by a re-pass` that had their evidence. In a
closed-book run a question is `correct without evidence` or `not retrieved`.

Answering or not (selective prediction) is judged from the confidence of the best answer, given or withheld: see
`Decision` and what follows it. Confidence is a reader's calibrated probability; a run without it has no such numbers.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from odqa.errors import DataError
from odqa.text import Matcher, broken_patterns, exact_match, f1, has_answer
from odqa.types import Answer, Gold, PackedContext, Step, Trace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Outcome = Literal[
    "not retrieved",
    "reranked away",
    "not packed",
    "misread",
    "undone by a re-pass",
    "correct",
    "correct without evidence",
]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
DEPTHS = (1, 5, 20, 100)  # the k of recall@k that the literature prints (DPR: 1, 5, 20, 100)
RESAMPLES = 2000  # our choice: the ends of an interval then wander by about 0.1 points for n = 376
TextOf = Callable[[str], str]


# --- metrics ----------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True, slots=True)
class QuestionResult:
    """One question judged.

    Ranks count from 1 and are those of the first passage with an answer in the first pass, None if there is none. `f1`
    is 0 to 1, None against patterns. `tokens` is summed over `passes`. `confidence` is the reader's in its best answer,
    and `best_is_right` says whether that answer is, be it given or withheld; None: the reader is not calibrated.
    """

    id: str
    answers: tuple[str, ...]
    prediction: str
    outcome: Outcome
    em: bool
    f1: float | None
    retrieve_rank: int | None
    rerank_rank: int | None
    final_rank: int | None
    in_context: bool
    tokens: int
    passes: int
    confidence: float | None = None
    best_is_right: bool | None = None

    @property
    def is_answerable(self) -> bool:
        return bool(self.answers)

    @property
    def decision(self) -> "Decision | None":
        """What selective metrics need; None without a confidence."""
        if self.confidence is None or self.best_is_right is None:
            return None
        return Decision(self.confidence, is_right=self.best_is_right, is_answerable=self.is_answerable)


def _within(rank: int | None, k: int) -> float:
    return 100.0 * (rank is not None and rank <= k)


def _answerable(value: Callable[[QuestionResult, int], float]) -> Callable[[QuestionResult, int], float | None]:
    return lambda question, k: value(question, k) if question.is_answerable else None


_VALUES: dict[str, Callable[[QuestionResult, int], float | None]] = {
    "em": lambda question, _: 100.0 * question.em,
    "f1": lambda question, _: None if question.f1 is None else 100.0 * question.f1,
    "recall": _answerable(lambda question, k: _within(question.retrieve_rank, k)),
    "rerank_recall": _answerable(lambda question, k: _within(question.rerank_rank, k)),
    "final_recall": _answerable(lambda question, k: _within(question.final_rank, k)),
    "recall_in_context": _answerable(lambda question, _: 100.0 * question.in_context),
    "tokens": lambda question, _: float(question.tokens),
}
_WITH_DEPTH = frozenset({"recall", "rerank_recall", "final_recall"})


# --- one question -----------------------------------------------------------------------------------------------------


def judge(trace: Trace, gold: Gold, text_of: TextOf, *, matcher: Matcher = "string") -> QuestionResult:
    """Compare one trace with its gold answers. `text_of` gives the text of a passage that was found but not packed."""
    finder = _Finder(gold, text_of, matcher)
    right = [exact_match(answer.text, gold.answers, matcher) for answer in trace.answers]
    in_context = any(finder.in_kept_text(context) for context in trace.contexts)
    retrieved, reranked = _first(trace.steps, "retrieve"), _first(trace.steps, "rerank")
    final = reranked or retrieved
    return QuestionResult(
        id=trace.query.id,
        answers=gold.answers,
        prediction=trace.answer.text,
        outcome=_outcome(trace, finder, right, in_context),
        em=right[-1],
        f1=f1(trace.answer.text, gold.answers, matcher) if matcher != "regex" else None,
        retrieve_rank=finder.rank(retrieved.ids) if retrieved else None,
        rerank_rank=finder.rank(reranked.ids) if reranked else None,
        final_rank=finder.rank(final.ids) if final else None,
        in_context=in_context,
        tokens=sum(context.tokens for context in trace.contexts),
        passes=len(trace.answers),
        confidence=trace.answer.confidence,
        best_is_right=None if trace.answer.confidence is None else _best_is_right(trace.answer, gold, matcher),
    )


def _best_is_right(answer: Answer, gold: Gold, matcher: Matcher) -> bool:
    """Whether the answer, or the best candidate of one that was withheld, is right; never for an unanswerable one."""
    texts = [answer.text, *(candidate.text for candidate in answer.candidates)]
    best = next((text for text in texts if text), "")
    return bool(gold.answers and best) and exact_match(best, gold.answers, matcher)


class _Finder:
    """Which passages hold an answer to one question; each is looked at once, and only when asked for."""

    def __init__(self, gold: Gold, text_of: TextOf, matcher: Matcher) -> None:
        self._answers, self._text_of, self._matcher = gold.answers, text_of, matcher
        self._known: dict[str, bool] = {}

    @property
    def is_answerable(self) -> bool:
        return bool(self._answers)

    def holds(self, passage_id: str) -> bool:
        if passage_id not in self._known:
            self._known[passage_id] = has_answer(self._text_of(passage_id), self._answers, self._matcher)
        return self._known[passage_id]

    def rank(self, ids: Sequence[str]) -> int | None:
        """Rank from 1 of the first passage with an answer."""
        if not self._answers:
            return None
        return next((rank for rank, passage_id in enumerate(ids, start=1) if self.holds(passage_id)), None)

    def in_kept_text(self, context: PackedContext) -> bool:
        return any(has_answer(hit.passage.text, self._answers, self._matcher) for hit in context.hits)


def _outcome(trace: Trace, finder: _Finder, right: Sequence[bool], in_context: bool) -> Outcome:
    if right[-1]:
        return "correct" if in_context or not finder.is_answerable else "correct without evidence"
    if any(right):
        return "undone by a re-pass"
    if in_context or not finder.is_answerable:
        return "misread"
    passes = sorted({step.pass_no for step in trace.steps})
    losses = [_loss([step for step in trace.steps if step.pass_no == number], finder) for number in passes]
    return max(losses, key=OUTCOMES.index, default="not retrieved")


def _loss(steps: Sequence[Step], finder: _Finder) -> Outcome:
    """Where one pass lost the answer, given that it did not pack it."""
    retrieved = [rank for step in steps if step.stage == "retrieve" if (rank := finder.rank(step.ids)) is not None]
    if not retrieved:
        return "not retrieved"
    reranked = _first(steps, "rerank")
    if reranked is None:
        return "not packed"
    rank = finder.rank(reranked.ids)
    if rank is None:
        return "reranked away"
    packed = _first(steps, "pack")
    reach = len(packed.ids) if packed else 0
    return "reranked away" if min(retrieved) <= reach < rank else "not packed"


def _first(steps: Sequence[Step], stage: str) -> Step | None:
    return next((step for step in steps if step.stage == stage), None)


# --- a run ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Score:
    """A metric over a question set: mean and the ends of its 95% interval, in `unit`; `matcher` says who compared."""

    name: str
    value: float
    low: float
    high: float
    n: int
    question_set: str
    split: str
    matcher: str

    @property
    def unit(self) -> str:
        return Metric.parse(self.name).unit


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A run, scored. `budget` is the most tokens that one pass may give to the reader (0: nothing was packed).

    `seed` and `resamples` are those of the intervals; `measured` is the run's manifest entry (seconds a stage, peak
    memory), the only part that differs between two equal runs.
    """

    question_set: str
    split: str
    matcher: Matcher
    scores: tuple[Score, ...]
    questions: tuple[QuestionResult, ...]
    budget: int
    seed: int
    resamples: int
    notes: tuple[str, ...] = ()
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_reranked(self) -> bool:
        """Whether a re-ranker made the ranking that was packed from."""
        return any(Metric.parse(score.name).name == "rerank_recall" for score in self.scores)

    @property
    def selective(self) -> "Selective | None":
        """How well confidence tells right answers from wrong ones; None if a question has none."""
        decisions = [decision for question in self.questions if (decision := question.decision) is not None]
        if not decisions or len(decisions) < len(self.questions):
            return None
        return selective(decisions, seed=self.seed, resamples=self.resamples)

    @property
    def funnel(self) -> dict[Outcome, int]:
        """How many questions had each outcome; the counts add up to the number of questions."""
        counts = Counter(question.outcome for question in self.questions)
        return {outcome: counts[outcome] for outcome in OUTCOMES}

    def score(self, name: str) -> Score:
        """Raises DataError with the metrics that were measured."""
        metric = str(Metric.parse(name))
        for score in self.scores:
            if score.name == metric:
                return score
        measured = ", ".join(score.name for score in self.scores)
        raise DataError(f"{metric} was not measured on {self.question_set} {self.split} (measured: {measured}).")

    def to_json(self) -> dict[str, Any]:
        """The content of scores.json: percent and tokens with four decimals, keys in a fixed order."""
        return {
            "question_set": self.question_set,
            "split": self.split,
            "matcher": self.matcher,
            "n": len(self.questions),
            "budget": self.budget,
            "interval": {"kind": "percentile bootstrap, 95%", "seed": self.seed, "resamples": self.resamples},
            "scores": [_score_to_json(score) for score in self.scores],
            "funnel": self.funnel,
            "selective": None if (selective := self.selective) is None else selective.to_json(),
            "notes": list(self.notes),
            "questions": [_question_to_json(question) for question in self.questions],
            "measured": dict(self.measured),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Evaluation":
        """What `to_json` gave. Raises DataError for anything else."""
        try:
            where = {key: record[key] for key in ("question_set", "split")}
            # scores.json of the first version has no final_rank; it is one of the two others.
            is_reranked = any(score["name"].startswith("rerank_recall@") for score in record["scores"])
            final = "rerank_rank" if is_reranked else "retrieve_rank"
            return cls(
                **where,
                matcher=record["matcher"],
                scores=tuple(Score(**score, **where) for score in record["scores"]),
                questions=tuple(
                    QuestionResult(**{"final_rank": item[final], **item, "answers": tuple(item["answers"])})
                    for item in record["questions"]
                ),
                budget=record["budget"],
                seed=record["interval"]["seed"],
                resamples=record["interval"]["resamples"],
                notes=tuple(record["notes"]),
                measured=record["measured"],
            )
        except (KeyError, TypeError) as error:
            raise DataError(
                f"these are not scores of this version of odqa ({error!r}). Score the run again."
            ) from error


def evaluate(
    traces: Iterable[Trace],
    gold: Sequence[Gold],
    text_of: TextOf,
    *,
    question_set: str,
    split: str,
    matcher: Matcher = "string",
    depths: Sequence[int] = DEPTHS,
    seed: int = 0,
    resamples: int = RESAMPLES,
    measured: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Score a run.

    `text_of` maps a passage id to its text, without the title (a store's look-up; not called for packed passages).
    recall@k is measured for the `depths` that the run retrieved to; one that went to 20 has no recall@100.
    Raises DataError if run and gold are not about the same questions, or if there are none.
    """
    by_id = _by_id(gold)
    questions: list[QuestionResult] = []
    shape = _Shape()
    strangers = []
    for trace in traces:
        if trace.query.id not in by_id:
            strangers.append(trace.query.id)
            continue
        questions.append(judge(trace, by_id[trace.query.id], text_of, matcher=matcher))
        shape.see(trace)
    _check_same_questions({question.id for question in questions}, strangers, by_id)
    scores = []
    for metric in shape.metrics(depths, matcher):
        values = [value for question in questions if (value := metric.value(question)) is not None]
        if values:
            mean = bootstrap_interval(values, seed=seed, resamples=resamples)
            numbers = (mean.value, mean.low, mean.high, len(values))
            scores.append(Score(str(metric), *numbers, question_set, split, _matcher_name(metric, matcher)))
    return Evaluation(
        question_set,
        split,
        matcher,
        scores=tuple(scores),
        questions=tuple(questions),
        budget=shape.budget,
        seed=seed,
        resamples=resamples,
        notes=_notes(gold, matcher),
        measured=measured or {},
    )


@dataclass(frozen=True, slots=True)
class RankedResult:
    """One question of a run that another system made, judged.

    `rank` from 1 is that of the first passage with an answer (None: there is none) among `depth` passages; `prediction`
    is None if the system reads nothing.
    """

    id: str
    rank: int | None
    depth: int
    prediction: str | None = None


def evaluate_rankings(
    results: Iterable[RankedResult],
    gold: Sequence[Gold],
    *,
    question_set: str,
    split: str = "",
    matcher: Matcher = "string",
    depths: Sequence[int] = DEPTHS,
    seed: int = 0,
    resamples: int = RESAMPLES,
    notes: Sequence[str] = (),
) -> Evaluation:
    """Score a run of which only rankings, and perhaps answers, are known: recall@k, and em and f1 if it answers.

    There is no funnel and no recall in context, for nobody knows what the reader saw, and `questions` is empty. A gold
    question that the run lacks counts as a miss, and a note says how many. Raises DataError for one without gold.
    """
    by_id = _by_id(gold)
    found = {result.id: result for result in results}
    strangers = [query_id for query_id in found if query_id not in by_id]
    if strangers or not found:
        _check_same_questions(set(found) & set(by_id), strangers, by_id)
    missing = [query_id for query_id in by_id if query_id not in found]
    depth = max(result.depth for result in found.values())
    is_read = any(result.prediction is not None for result in found.values())
    judged = [found.get(query_id, RankedResult(query_id, None, 0)) for query_id in by_id]
    values: dict[Metric, list[float]] = {}
    if is_read:
        answered = [(result.prediction or "", by_id[result.id].answers) for result in judged]
        values[Metric("em")] = [100.0 * exact_match(text, answers, matcher) for text, answers in answered]
        if matcher != "regex":
            values[Metric("f1")] = [100.0 * f1(text, answers, matcher) for text, answers in answered]
    for k in (k for k in depths if k <= depth):
        values[Metric("recall", k)] = [_within(result.rank, k) for result in judged if by_id[result.id].answers]
    scores = []
    for metric, measured in values.items():
        if measured:
            mean = bootstrap_interval(measured, seed=seed, resamples=resamples)
            numbers = (mean.value, mean.low, mean.high, len(measured))
            scores.append(Score(str(metric), *numbers, question_set, split, _matcher_name(metric, matcher)))
    told = [*notes, *_notes(gold, matcher)]
    if missing:
        told.append(f"{len(missing)} questions are not in the run and count as misses (first: {missing[0]})")
    return Evaluation(question_set, split, matcher, tuple(scores), (), 0, seed, resamples, notes=tuple(told))


@dataclass(slots=True)
class _Shape:
    """What a run did, to know which metrics mean something for it: depths in passages, the largest budget in tokens."""

    retrieved: int = 0
    reranked: int = 0
    budget: int = 0
    has_contexts: bool = False
    has_hits: bool = False

    def see(self, trace: Trace) -> None:
        retrieve, rerank = _first(trace.steps, "retrieve"), _first(trace.steps, "rerank")
        self.retrieved = max(self.retrieved, len(retrieve.ids) if retrieve else 0)
        self.reranked = max(self.reranked, len(rerank.ids) if rerank else 0)
        for context in trace.contexts:
            self.budget = max(self.budget, context.budget)
            self.has_contexts = True
            self.has_hits |= bool(context.hits)

    def metrics(self, depths: Sequence[int], matcher: Matcher) -> list[Metric]:
        """In the order of the report."""
        metrics = [Metric("em")] if matcher == "regex" else [Metric("em"), Metric("f1")]  # no F1 against a pattern
        metrics += [Metric("recall", k) for k in depths if k <= self.retrieved]
        metrics += [Metric("rerank_recall", k) for k in depths if k <= self.reranked]
        metrics += [Metric("final_recall", k) for k in depths if k <= (self.reranked or self.retrieved)]
        metrics += [Metric("recall_in_context")] if self.retrieved or self.has_hits else []
        return metrics + ([Metric("tokens")] if self.has_contexts else [])


def _by_id(gold: Sequence[Gold]) -> dict[str, Gold]:
    by_id = {item.query_id: item for item in gold}
    if len(by_id) != len(gold):
        twice = Counter(item.query_id for item in gold).most_common(1)[0][0]
        raise DataError(f"gold answers of question {twice!r} are given more than once. Make ids unique.")
    if not by_id:
        raise DataError("the file of gold answers is empty; there is nothing to score.")
    return by_id


def _check_same_questions(judged: set[str], strangers: Sequence[str], by_id: Mapping[str, Gold]) -> None:
    unanswered = [query_id for query_id in by_id if query_id not in judged]
    if not strangers and not unanswered:
        return
    faults = [
        f"{len(ids)} {what} (first: {', '.join(ids[:3])})"
        for ids, what in (
            (strangers, "questions of the run have no gold record"),
            (unanswered, "gold questions are not in the run"),
        )
        if ids
    ]
    raise DataError(f"an answer file of another question set: {len(judged)} ids in common; {'; '.join(faults)}.")


def _matcher_name(metric: Metric, matcher: Matcher) -> str:
    """Who compared with the gold answers."""
    if metric.name in ("em", "f1"):
        return {"string": "SQuAD normalisation", "regex": "DrQA regex", "characters": "characters"}[matcher]
    return "" if metric.name == "tokens" else f"has_answer {matcher}"


def _notes(gold: Sequence[Gold], matcher: Matcher) -> tuple[str, ...]:
    broken = [pattern for item in gold for pattern in broken_patterns(item.answers)] if matcher == "regex" else []
    return (f"{len(broken)} answer patterns do not compile and find nothing, as in DPR",) if broken else ()


# --- intervals --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the ends of its 95% interval."""

    value: float
    low: float
    high: float


def bootstrap_interval(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Percentile bootstrap of a mean over questions (Efron 1979). The same seed gives the same interval.

    Raises ValueError without values.
    """
    import numpy as np

    if not len(values):
        raise ValueError("an interval needs at least one value")
    array = np.asarray(values, dtype=np.float64)
    low, high = np.percentile(_resampled_means(array, seed, resamples), (2.5, 97.5))
    return Interval(float(array.mean()), float(low), float(high))


def paired_difference(
    first: Sequence[float], second: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Mean of second - first over the same questions in the same order, with its paired bootstrap interval.

    Both systems are resampled together: what makes a question hard for both cancels. Raises ValueError if the lengths
    differ or are 0.
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    return bootstrap_interval(differences, seed=seed, resamples=resamples)


def _resampled_means(values: "NDArray[np.float64]", seed: int, resamples: int) -> "NDArray[np.float64]":
    """(resamples,) means of samples with replacement, made in blocks of at most 4 million indices (32 MB)."""
    import numpy as np

    n = len(values)
    generator = np.random.default_rng(seed)
    block = max(1, min(resamples, 4_000_000 // n))
    sizes = [block] * (resamples // block) + [resamples % block] * (resamples % block > 0)
    return np.concatenate([values[generator.integers(0, n, size=(size, n))].mean(axis=1) for size in sizes])


# --- answering or not -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Decision:
    """A question on which a reader may abstain: its best answer's confidence (0 to 1, or any score that rises with it).

    `is_right` is about that answer, given or withheld; the best answer to an unanswerable question is wrong.
    """

    confidence: float
    is_right: bool
    is_answerable: bool = True


@dataclass(frozen=True, slots=True)
class RiskCoverage:
    """What answering only above a threshold costs (El-Yaniv & Wiener 2010): one point a distinct confidence, falling.

    `coverage` is the share of questions answered with at least this confidence, `risk` the share of wrong ones among
    them, both 0 to 1. `area` is AURC, the mean over all questions of the risk at their own confidence (Geifman &
    El-Yaniv 2017): lower is better, 0 only if nothing is wrong.
    """

    thresholds: tuple[float, ...]
    coverage: tuple[float, ...]
    risk: tuple[float, ...]
    area: float


@dataclass(frozen=True, slots=True)
class Selective:
    """Confidence judged on n questions. Rates, areas and their intervals are in percent, like all scores.

    `auroc_right` tells right answers from wrong ones, `auroc_answerable` answerable from unanswerable questions; None
    where one of the two kinds is missing. `calibration_error` is `calibration_error` below, with its bins.
    """

    n: int
    answerable: int
    right: int
    auroc_right: Interval | None
    auroc_answerable: Interval | None
    aurc: float
    calibration_error: float

    def to_json(self) -> dict[str, Any]:
        def interval(value: Interval | None) -> dict[str, float] | None:
            if value is None:
                return None
            return {name: round(getattr(value, name), 4) for name in ("value", "low", "high")}

        return {
            "n": self.n,
            "answerable": self.answerable,
            "right": self.right,
            "auroc_right": interval(self.auroc_right),
            "auroc_answerable": interval(self.auroc_answerable),
            "aurc": round(self.aurc, 4),
            "calibration_error": round(self.calibration_error, 4),
        }


def selective(decisions: Sequence[Decision], *, seed: int = 0, resamples: int = RESAMPLES) -> Selective:
    """All selective metrics that need no threshold. Raises ValueError without decisions."""

    def separation(of: Callable[[Decision], bool]) -> Interval | None:
        positive = [decision.confidence for decision in decisions if of(decision)]
        negative = [decision.confidence for decision in decisions if not of(decision)]
        if not positive or not negative:
            return None
        return auroc_interval(positive, negative, seed=seed, resamples=resamples)

    return Selective(
        n=len(decisions),
        answerable=sum(decision.is_answerable for decision in decisions),
        right=sum(decision.is_right for decision in decisions),
        auroc_right=separation(lambda decision: decision.is_right),
        auroc_answerable=separation(lambda decision: decision.is_answerable),
        aurc=100.0 * risk_coverage(decisions).area,
        calibration_error=100.0 * calibration_error(decisions),
    )


def risk_coverage(decisions: Sequence[Decision]) -> RiskCoverage:
    """The risk-coverage curve. Questions of equal confidence come in together, for no threshold tells them apart.

    Raises ValueError without decisions.
    """
    import numpy as np

    if not decisions:
        raise ValueError("a risk-coverage curve needs at least one decision")
    confidence = np.array([decision.confidence for decision in decisions])
    wrong = np.array([not decision.is_right for decision in decisions])
    order = np.argsort(-confidence, kind="stable")
    confidence, wrong = confidence[order], wrong[order]
    ends = np.flatnonzero(np.append(confidence[1:] != confidence[:-1], True)) + 1  # questions answered at each point
    risk = np.cumsum(wrong)[ends - 1] / ends
    area = float((risk * np.diff(ends, prepend=0)).sum() / len(decisions))
    coverage = ends / len(decisions)
    return RiskCoverage(tuple(confidence[ends - 1].tolist()), tuple(coverage.tolist()), tuple(risk.tolist()), area)


def auroc(
    positive: "Sequence[float] | NDArray[np.float64]", negative: "Sequence[float] | NDArray[np.float64]"
) -> float:
    """P(a positive scores above a negative), ties counting half: the area under the ROC curve (Hanley & McNeil 1982).

    0 to 1. Raises ValueError if one side is empty.
    """
    import numpy as np

    if not len(positive) or not len(negative):
        raise ValueError("an AUROC needs at least one positive and one negative")
    below = np.sort(np.asarray(negative, dtype=np.float64))
    sides: tuple[Literal["left", "right"], ...] = ("left", "right")
    places = [np.searchsorted(below, positive, side=side) for side in sides]
    return float(np.mean(places) / len(below))


def auroc_interval(
    positive: Sequence[float], negative: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """AUROC in percent with its percentile bootstrap interval; positives and negatives are resampled apart."""
    import numpy as np

    generator = np.random.default_rng(seed)
    above, below = (np.asarray(side, dtype=np.float64) for side in (positive, negative))
    value = auroc(above, below)
    again = [auroc(generator.choice(above, len(above)), generator.choice(below, len(below))) for _ in range(resamples)]
    low, high = np.percentile(again, (2.5, 97.5))
    return Interval(100.0 * value, 100.0 * float(low), 100.0 * float(high))


def calibration_error(decisions: Sequence[Decision], *, bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 5) over bins of equal mass, not of equal width.

    Sorted by confidence and cut into `bins` parts of equal size (our choice: 10; fewer if there are fewer decisions);
    the mean over decisions of |mean confidence - share right| of their bin. 0 to 1.

    Raises ValueError without decisions.
    """
    import numpy as np

    if not decisions:
        raise ValueError("a calibration error needs at least one decision")
    ordered = sorted(decisions, key=lambda decision: (decision.confidence, decision.is_right))
    confidence = np.array([decision.confidence for decision in ordered])
    right = np.array([float(decision.is_right) for decision in ordered])
    parts = np.array_split(np.arange(len(ordered)), min(bins, len(ordered)))
    gaps = [abs(confidence[part].mean() - right[part].mean()) * len(part) for part in parts]
    return float(sum(gaps) / len(ordered))


def threshold_keeping(decisions: Sequence[Decision], share: float = 0.9) -> float:
    """The highest confidence that can be asked for while at least `share` (0 to 1) of the right answers are given.

    Answers with exactly this confidence are given. Raises ValueError if no answer is right.
    """
    right = sorted((decision.confidence for decision in decisions if decision.is_right), reverse=True)
    if not right:
        raise ValueError("no answer is right; there is nothing to keep")
    return right[max(1, math.ceil(round(share * len(right), 9))) - 1]


def refused(decisions: Iterable[Decision], threshold: float) -> list[float]:
    """100.0 for each decision below the threshold, else 0.0: the values of a share with its interval."""
    return [100.0 * (decision.confidence < threshold) for decision in decisions]


# --- two runs ---------------------------------------------------------------------------------------------------------


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


# --- JSON -------------------------------------------------------------------------------------------------------------


def _score_to_json(score: Score) -> dict[str, Any]:
    numbers = {"value": round(score.value, 4), "low": round(score.low, 4), "high": round(score.high, 4)}
    return {"name": score.name, **numbers, "n": score.n, "matcher": score.matcher}


def _question_to_json(question: QuestionResult) -> dict[str, Any]:
    return {
        "id": question.id,
        "answers": list(question.answers),
        "prediction": question.prediction,
        "outcome": question.outcome,
        "em": question.em,
        "f1": None if question.f1 is None else round(question.f1, 6),
        "retrieve_rank": question.retrieve_rank,
        "rerank_rank": question.rerank_rank,
        "final_rank": question.final_rank,
        "in_context": question.in_context,
        "tokens": question.tokens,
        "passes": question.passes,
        "confidence": None if question.confidence is None else round(question.confidence, 6),
        "best_is_right": question.best_is_right,
    }
