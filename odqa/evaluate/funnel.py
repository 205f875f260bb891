"""One question judged: its trace beside its gold answers, with the one outcome that says where the answer was lost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from odqa.evaluate.selective import Decision
from odqa.text import Matcher, exact_match, f1, has_answer
from odqa.types import Answer, Gold, PackedContext, Step, Trace

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
ORACLE = "oracle over the samples"
TextOf = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class QuestionResult:
    """One question judged.

    Ranks count from 1 and are those of the first passage with an answer in the first pass, None if there is none. `f1`
    is 0 to 1, None against patterns. `tokens` is summed over `passes`. `confidence` is the reader's in its best answer,
    and `best_is_right` says whether that answer is, be it given or withheld; None: the reader is not calibrated.
    `in_collection` says whether any passage of the collection holds an answer; None: nobody has looked. `right` says of
    each pass whether its answer is; empty for one pass, where `em` does. `picks` says of each way to choose among the
    candidates of a second pass whether its choice is right.
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
    in_collection: bool | None = None
    right: tuple[bool, ...] = ()
    picks: Mapping[str, bool] = field(default_factory=dict)

    @property
    def is_answerable(self) -> bool:
        return bool(self.answers)

    def mended_by(self, pass_no: int) -> bool:
        """Whether this pass put right what the one before had wrong."""
        return self._change(pass_no) == (False, True)

    def undone_by(self, pass_no: int) -> bool:
        """Whether this pass put wrong what the one before had right."""
        return self._change(pass_no) == (True, False)

    def _change(self, pass_no: int) -> tuple[bool, ...]:
        """Whether the answer was right before a pass and after it; empty if there was no such pass."""
        return self.right[pass_no - 2 : pass_no] if 2 <= pass_no <= len(self.right) else ()

    @property
    def decision(self) -> "Decision | None":
        """What selective metrics need; None without a confidence."""
        if self.confidence is None or self.best_is_right is None:
            return None
        return Decision(self.confidence, is_right=self.best_is_right, is_answerable=self.is_answerable)


def judge(
    trace: Trace, gold: Gold, text_of: TextOf, *, matcher: Matcher = "string", in_collection: bool | None = None
) -> QuestionResult:
    """Compare one trace with its gold answers. `text_of` gives the text of a passage that was found but not packed."""
    finder = _Finder(gold, text_of, matcher)
    right = [exact_match(answer.text, gold.answers, matcher) for answer in trace.answers]
    in_context = any(finder.in_kept_text(context) for context in trace.contexts)
    retrieved, reranked = first_step(trace.steps, "retrieve"), first_step(trace.steps, "rerank")
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
        in_collection=in_collection,
        right=tuple(right) if len(right) > 1 else (),
        picks=_picks(trace, gold, matcher),
    )


def _picks(trace: Trace, gold: Gold, matcher: Matcher) -> dict[str, bool]:
    """What could have been chosen among the candidates that a second pass was shown, and whether it is right."""
    step = first_step(trace.steps, "recurse")
    if step is None or not isinstance(picks := step.notes.get("picks"), Mapping):
        return {}
    drawn = step.notes.get("candidates")
    texts = [one["text"] for one in drawn if isinstance(one, Mapping)] if isinstance(drawn, list) else []
    found = {name: exact_match(text, gold.answers, matcher) for name, text in picks.items()}
    return {**found, ORACLE: any(exact_match(text, gold.answers, matcher) for text in texts)}


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
    came = [step for step in steps if step.stage == "fuse"] or [step for step in steps if step.stage == "retrieve"]
    retrieved = [rank for step in came if (rank := finder.rank(step.ids)) is not None]
    if not retrieved:
        return "not retrieved"
    reranked = first_step(steps, "rerank")
    if reranked is None:
        return "not packed"
    rank = finder.rank(reranked.ids)
    if rank is None:
        return "reranked away"
    packed = first_step(steps, "pack")
    reach = len(packed.ids) if packed else 0
    return "reranked away" if min(retrieved) <= reach < rank else "not packed"


def first_step(steps: Sequence[Step], stage: str) -> Step | None:
    return next((step for step in steps if step.stage == stage), None)
