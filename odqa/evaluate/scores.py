"""A run scored: every question judged, every metric with its n, matcher and interval; and that as JSON."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from odqa.errors import DataError
from odqa.evaluate.funnel import OUTCOMES, Outcome, QuestionResult, TextOf, first_step, judge
from odqa.evaluate.intervals import RESAMPLES, bootstrap_interval
from odqa.evaluate.metrics import DEPTHS, Metric, within
from odqa.evaluate.selective import Selective, selective
from odqa.text import Matcher, broken_patterns, exact_match, f1
from odqa.types import Gold, Trace


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
class RePass:
    """Questions that a pass after the first read again, put right, and put wrong."""

    read: int
    mended: int
    undone: int


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

    @property
    def re_passes(self) -> dict[int, "RePass"]:
        """What each pass after the first did, by its number; empty for a run of one pass."""
        last = max((question.passes for question in self.questions), default=1)
        return {
            number: RePass(
                sum(question.passes >= number for question in self.questions),
                sum(question.mended_by(number) for question in self.questions),
                sum(question.undone_by(number) for question in self.questions),
            )
            for number in range(2, last + 1)
        }

    @property
    def picks(self) -> dict[str, float]:
        """Exact match in percent of ways to choose among the samples of a second pass; empty without one.

        Of a question without samples (it was not read again) the first answer counts.
        """
        names = list(dict.fromkeys(name for question in self.questions for name in question.picks))
        if not names:
            return {}
        first = [question.right[0] if question.right else question.em for question in self.questions]
        rights = {
            name: [q.picks.get(name, right) for q, right in zip(self.questions, first, strict=True)] for name in names
        }
        rights = {"first pass": first, **rights, "last pass": [question.em for question in self.questions]}
        return {name: 100 * sum(right) / len(right) for name, right in rights.items()}

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
            **(
                {"re_passes": {str(n): asdict(found) for n, found in again.items()}}
                if (again := self.re_passes)
                else {}
            ),
            **({"picks": {name: round(em, 4) for name, em in picks.items()}} if (picks := self.picks) else {}),
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
                    QuestionResult(
                        **{"final_rank": item[final], **item, "answers": tuple(item["answers"])}
                        | {"right": tuple(item.get("right", ()))}
                    )
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
    in_collection: Collection[str] | None = None,
) -> Evaluation:
    """Score a run.

    `text_of` maps a passage id to its text, without the title (a store's look-up; not called for packed passages).
    recall@k is measured for the `depths` that the run retrieved to; one that went to 20 has no recall@100.
    `in_collection` are the ids of the questions that any passage of the collection answers (None: nobody has looked).
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
        held = None if in_collection is None else trace.query.id in in_collection
        questions.append(judge(trace, by_id[trace.query.id], text_of, matcher=matcher, in_collection=held))
        shape.see(trace)
    _check_same_questions({question.id for question in questions}, strangers, by_id)
    scores = []
    for metric in [*shape.metrics(depths, matcher), *([Metric("ceiling")] if in_collection is not None else [])]:
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
        values[Metric("recall", k)] = [within(result.rank, k) for result in judged if by_id[result.id].answers]
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
        retrieve, rerank = first_step(trace.steps, "retrieve"), first_step(trace.steps, "rerank")
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
        **({} if question.in_collection is None else {"in_collection": question.in_collection}),
        **({"right": list(question.right)} if question.right else {}),
        **({"picks": dict(question.picks)} if question.picks else {}),
    }
