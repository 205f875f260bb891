"""What a report says about runs, as plain values: numbers by kind, curves, times, and a sample of questions.

One pass over the traces of each run; of its questions only the sample's traces are kept. How it looks is decided by
`odqa.report.page` (HTML) and `odqa.report.paper` (markdown).
"""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from odqa.evaluate import (
    OUTCOMES,
    Comparison,
    Evaluation,
    Group,
    Interval,
    Outcome,
    QuestionResult,
    answer_type,
    break_down,
    compare,
    question_word,
    reach_curve,
    recall_curve,
)
from odqa.evaluate.breakdowns import ANSWER_TYPES, QUESTION_WORDS
from odqa.text import Matcher, answer_spans, has_answer
from odqa.types import Passage, Trace

_IN_COLLECTION = {None: "", True: "; the collection has one", False: "; the collection has none"}
_LOST_EARLY: tuple[Outcome, ...] = ("reranked away", "not packed")

LookUp = Callable[[str], Passage | None]
"""The passage with this id; None where it is not known."""


@dataclass(frozen=True, slots=True)
class Source:
    """A scored run as it comes to a report. `traces` may be gone through once; `facts` say what it was made of."""

    name: str
    evaluation: Evaluation
    traces: Iterable[Trace]
    facts: Mapping[str, str]
    look_up: LookUp = lambda _: None


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of one stage: in sum, and a question's in the middle and at the 95th percentile; `shared`: not timed."""

    stage: str
    total: float
    median: float
    slow: float
    questions: int
    shared: int

    def to_json(self) -> dict[str, Any]:
        numbers = {name: round(getattr(self, name), 6) for name in ("total", "median", "slow")}
        return {"stage": self.stage, **numbers, "questions": self.questions, "shared": self.shared}


@dataclass(frozen=True, slots=True)
class Shown:
    """One question of the sample under one system. `missed` is the best passage with an answer that was not packed."""

    result: QuestionResult
    trace: Trace
    where: str
    missed: tuple[int, Passage] | None


@dataclass(frozen=True, slots=True)
class SystemPart:
    """What is told of one system on one question set."""

    name: str
    evaluation: Evaluation
    facts: Mapping[str, str]
    by_word: tuple[Group, ...]
    by_type: tuple[Group, ...]
    by_ceiling: tuple[Group, ...]
    recall: tuple[tuple[str, tuple[tuple[int, Interval], ...]], ...]  # (retrieved or re-ranked, points)
    reach: tuple[tuple[int, float], ...]
    stages: tuple[StageTimes, ...]  # the slowest first
    slowest: tuple[tuple[str, float], ...]  # question id, seconds over all stages
    shown: Mapping[str, Shown]

    def to_json(self) -> dict[str, Any]:
        """The numbers, without questions."""
        return {
            "system": self.name,
            "question_set": self.evaluation.question_set,
            "split": self.evaluation.split,
            "funnel": self.evaluation.funnel,
            "by_question_word": [group.to_json() for group in self.by_word],
            "by_answer_type": [group.to_json() for group in self.by_type],
            "by_ceiling": [group.to_json() for group in self.by_ceiling],
            "recall": {
                name: [[k, *(round(getattr(at, end), 4) for end in ("value", "low", "high"))] for k, at in points]
                for name, points in self.recall
            },
            "reach": [[tokens, round(share, 4)] for tokens, share in self.reach],
            "stages": [stage.to_json() for stage in self.stages],
        }


@dataclass(frozen=True, slots=True)
class Section:
    """All systems on one question set; `comparisons` are of each later system with the first."""

    question_set: str
    split: str
    matcher: Matcher
    systems: tuple[SystemPart, ...]
    comparisons: tuple[tuple[str, str, Comparison], ...]
    texts: Mapping[str, str]  # the questions, by id
    sample: tuple[str, ...]  # ids, in the order in which they are shown

    @property
    def title(self) -> str:
        return f"{self.question_set} {self.split}".strip()

    @property
    def n(self) -> int:
        return len(self.systems[0].evaluation.questions)


def gather(
    sources: Sequence[Source], *, sample: int, seed: int = 0, advance: Callable[[], None] = lambda: None
) -> list[Section]:
    """Group runs by their question set and work out what a report says of them; `sample` questions of a set are shown.

    `advance` is called after each run.

    Raises DataError if runs that name the same question set were asked different questions.
    """
    groups: dict[tuple[str, str], list[Source]] = {}
    for source in sources:
        groups.setdefault((source.evaluation.question_set, source.evaluation.split), []).append(source)
    return [_section(group, sample, seed, advance) for group in groups.values()]


def _section(sources: Sequence[Source], sample: int, seed: int, advance: Callable[[], None]) -> Section:
    first = sources[0]
    comparisons = tuple(
        (first.name, other.name, compare(first.evaluation, other.evaluation, seed=first.evaluation.seed))
        for other in sources[1:]
    )
    chosen = choose_sample([source.evaluation for source in sources], sample, seed=seed)
    texts: dict[str, str] = {}
    systems = []
    for source in sources:
        systems.append(_system(source, set(chosen), texts))
        advance()
    evaluation = first.evaluation
    return Section(
        evaluation.question_set, evaluation.split, evaluation.matcher, tuple(systems), comparisons, texts, tuple(chosen)
    )


def choose_sample(evaluations: Sequence[Evaluation], size: int, *, seed: int = 0) -> list[str]:
    """At most `size` question ids. Of several systems first those whose outcome is not the same in all, half of them.

    The rest is taken from the outcomes in turn (of the last system), so that a rare loss is there to look at; within an
    outcome at random by `seed`. The order is that of the outcomes, then of the question file.
    """
    last = evaluations[-1].questions
    outcomes = [{question.id: question.outcome for question in item.questions} for item in evaluations]
    shuffled = list(last)
    random.Random(seed).shuffle(shuffled)
    differing = [q for q in shuffled if len({by_id[q.id] for by_id in outcomes}) > 1]
    chosen = {question.id for question in differing[: size // 2]}
    piles = [[q for q in shuffled if q.outcome == outcome and q.id not in chosen] for outcome in OUTCOMES]
    while len(chosen) < size and any(piles):
        for pile in piles:
            if pile and len(chosen) < size:
                chosen.add(pile.pop().id)
    return [q.id for outcome in OUTCOMES for q in last if q.outcome == outcome and q.id in chosen]


def _system(source: Source, chosen: set[str], texts: dict[str, str]) -> SystemPart:
    evaluation = source.evaluation
    results = {question.id: question for question in evaluation.questions}
    times: dict[str, list[float]] = {}
    shared: dict[str, int] = {}
    totals: list[tuple[str, float]] = []
    reaches: list[int | None] = []
    shown: dict[str, Shown] = {}
    depth = reranked = 0
    for trace in source.traces:
        result = results[trace.query.id]
        texts.setdefault(trace.query.id, trace.query.text)
        for step in trace.steps:
            if math.isfinite(step.seconds):
                times.setdefault(step.stage, []).append(step.seconds)
            else:
                shared[step.stage] = shared.get(step.stage, 0) + 1
            depth = max(depth, len(step.ids)) if step.stage == "retrieve" else depth
            reranked = max(reranked, len(step.ids)) if step.stage == "rerank" else reranked
        totals.append((result.id, math.fsum(step.seconds for step in trace.steps if math.isfinite(step.seconds))))
        if result.is_answerable:
            reaches.append(tokens_to_answer(trace, result.answers, evaluation.matcher))
        if result.id in chosen:
            missed = _missed(result, trace, source.look_up, evaluation.matcher)
            shown[result.id] = Shown(result, trace, where_lost(result, trace), missed)
    questions, is_pattern = evaluation.questions, evaluation.matcher == "regex"

    def by(kind_of: Callable[[QuestionResult], str], order: Sequence[str]) -> tuple[Group, ...]:
        return tuple(break_down(questions, kind_of, order=order, seed=evaluation.seed))

    known = [question for question in questions if question.in_collection is not None and question.is_answerable]
    held = {True: "some passage holds an answer", False: "no passage holds one"}
    curves = [("retrieved", tuple(recall_curve(questions, "recall", depth, seed=evaluation.seed)))]
    if reranked:
        points = recall_curve(questions, "final_recall", reranked, seed=evaluation.seed)
        curves.append(("re-ranked", tuple(points)))
    stages = [
        _stage_times(stage, times.get(stage, []), shared.get(stage, 0)) for stage in dict.fromkeys([*times, *shared])
    ]
    return SystemPart(
        source.name,
        evaluation,
        source.facts,
        by_word=by(lambda question: question_word(texts[question.id]), QUESTION_WORDS),
        by_type=() if is_pattern else by(lambda q: answer_type(texts[q.id], q.answers), ANSWER_TYPES),
        by_ceiling=tuple(break_down(known, lambda q: held[bool(q.in_collection)], order=tuple(held.values()))),
        recall=tuple((name, points) for name, points in curves if points),
        reach=tuple(reach_curve(reaches, evaluation.budget)) if any(reach is not None for reach in reaches) else (),
        stages=tuple(sorted(stages, key=lambda stage: -stage.total)),
        slowest=tuple(sorted(totals, key=lambda item: -item[1])[:5]),
        shown=shown,
    )


def _stage_times(stage: str, seconds: Sequence[float], shared: int) -> StageTimes:
    ordered = sorted(seconds) or [0.0]
    at = [ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] for share in (0.5, 0.95)]
    return StageTimes(stage, math.fsum(seconds), at[0], at[1], len(seconds), shared)


# --- one question -----------------------------------------------------------------------------------------------------


def tokens_to_answer(trace: Trace, answers: Sequence[str], matcher: Matcher) -> int | None:
    """Tokens of the reader's budget up to the end of the first packed passage with an answer, in the first pass.

    What the context costs without passages is counted first, then the passages best first. None: no packed passage
    holds an answer, or their prices are not in the trace.
    """
    step = next((step for step in trace.steps if step.stage == "pack"), None)
    if step is None or not trace.contexts or len(step.tokens) != len(step.ids):
        return None
    context = trace.contexts[0]
    texts = {hit.passage.id: hit.passage.text for hit in context.hits}
    spent = context.tokens - sum(step.tokens)
    for passage_id, price in zip(step.ids, step.tokens, strict=True):
        spent += price
        if has_answer(texts.get(passage_id, ""), answers, matcher):
            return spent
    return None


def where_lost(result: QuestionResult, trace: Trace) -> str:
    """The outcome in a sentence with the ranks that explain it."""
    packed = len(trace.contexts[-1].hits) if trace.contexts else 0
    retrieved = next((len(step.ids) for step in trace.steps if step.stage == "retrieve"), 0)
    ranks = [f"retrieved at rank {result.retrieve_rank}"] if result.retrieve_rank else []
    ranks += [f"re-ranked to {result.rerank_rank}"] if result.rerank_rank else []
    found = " and ".join(ranks)
    match result.outcome:
        case "not retrieved":
            told = (
                f"No answer in the {retrieved} passages that were retrieved" if retrieved else "Nothing was retrieved"
            )
            return f"{told}{_IN_COLLECTION[result.in_collection]}."
        case "reranked away":
            lost = "lost by the re-ranker" if result.rerank_rank is None else "then out of reach"
            return f"A passage with an answer was {found}: {lost}; {packed} were packed."
        case "not packed":
            return f"A passage with an answer was {found or 'found'}, and not packed; {packed} were."
        case "misread":
            if not result.is_answerable:
                return "There is no answer: saying nothing would have been right."
            said = "said nothing" if not result.prediction else "said something else"
            return f"A passage with an answer was packed{f' ({found})' if found else ''}; the reader {said}."
        case "undone by a re-pass":
            return "An earlier pass was right, the last one is not."
        case "correct without evidence":
            return "Right, though no packed passage holds an answer: known by heart, or guessed."
        case "correct":
            return "Right to say nothing." if not result.is_answerable else f"Right{f'; {found}' if found else ''}."


def _missed(result: QuestionResult, trace: Trace, look_up: LookUp, matcher: Matcher) -> tuple[int, Passage] | None:
    """Rank and passage of the first one with an answer, where one came to the packer or the re-ranker and was lost."""
    rank = result.final_rank or result.retrieve_rank
    if result.outcome not in _LOST_EARLY or rank is None:
        return None
    steps = {step.stage: step for step in reversed(trace.steps) if step.pass_no == 1}
    step = steps.get("rerank") if result.final_rank and "rerank" in steps else steps.get("retrieve")
    passage = look_up(step.ids[rank - 1]) if step is not None and rank <= len(step.ids) else None
    return None if passage is None else (rank, passage)


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a passage's text: plain, a gold answer, what the reader said, or both."""

    text: str
    is_gold: bool = False
    is_said: bool = False


def pieces(text: str, answers: Sequence[str], said: str, matcher: Matcher) -> list[Piece]:
    """Cut a text where gold answers and the prediction begin and end; the pieces joined are the text."""
    gold = answer_spans(text, answers, matcher)
    told = answer_spans(text, [said], "string" if matcher == "regex" else matcher) if said else []
    cuts = sorted({0, len(text), *(end for span in (*gold, *told) for end in span)})

    def inside(spans: Sequence[tuple[int, int]], start: int, end: int) -> bool:
        return any(low <= start and end <= high for low, high in spans)

    return [
        Piece(text[start:end], inside(gold, start, end), inside(told, start, end))
        for start, end in itertools.pairwise(cuts)
    ]
