"""Judged questions by kind: how the question asks, what the answer is like; and what more depth or tokens would bring.

Kinds are decided by named rules over words, not by a model, so that anyone can say why a question stands where it does.
They are for English. The rules are ours.

Question words, the first one in the question that counts: who (whose, whom), when, where, why, which, what; of "how",
how many (how much) and how, for any other. A question with none of them is "other" ("the capital of france").

Answer types, of the first gold answer, the first rule that holds:

    none         there is no gold answer: only abstaining is right
    date         nothing but months, weekdays, years (three or four digits from 100 to 2099), days, eras ("bc"), decades
    number       the first word is a number in digits or words, perhaps after "about" or a currency ("$ 3.5 million")
    person-like  who asks, and the answer is one to five words that are capitalised or particles ("van", "de", "of")
    name         one to eight words, the first one capitalised: places, works, organisations, people otherwise asked for
    phrase       at most five words
    long text    more than that

In sets whose answers are all lower case no answer is person-like or a name; patterns (matcher regex) have no type.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from odqa.evaluate.funnel import QuestionResult
from odqa.evaluate.intervals import RESAMPLES, Interval, bootstrap_interval
from odqa.evaluate.metrics import Metric
from odqa.text import tokenize

QUESTION_WORDS = ("who", "when", "where", "how many", "how", "which", "what", "why", "other")
ANSWER_TYPES = ("person-like", "name", "date", "number", "phrase", "long text", "none")

_ALIKE = {"whose": "who", "whom": "who", "whos": "who"}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DATE_NOUNS = _words(
    "january february march april may june july august september october november december monday tuesday wednesday "
    "thursday friday saturday sunday spring summer autumn fall winter century centuries"
)
_DATE_WORDS = _words(
    "jan feb mar apr jun jul aug sep sept oct nov dec the of in on to and early mid late bc bce ad ce utc"
)
_NUMBER_WORDS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion trillion "
    "half dozen"
)
_BEFORE_NUMBERS = _words("about around over approximately nearly almost us $ £ € +")
_PARTICLES = _words("of de da di del der den van von la le el al bin ibn the and y")
_YEAR = re.compile(r"([1-9]\d\d|1\d\d\d|20\d\d)s?")
_DAY = re.compile(r"([1-9]|[12]\d|3[01])(st|nd|rd|th)?")


def question_word(question: str) -> str:
    """One of `QUESTION_WORDS`; see the module."""
    words = tokenize(question)
    for place, word in enumerate(words):
        kind = _ALIKE.get(word, word)
        if kind == "how" and words[place + 1 : place + 2] in (["many"], ["much"]):
            return "how many"
        if kind in QUESTION_WORDS[:-1]:
            return kind
    return "other"


def answer_type(question: str, answers: Sequence[str]) -> str:
    """One of `ANSWER_TYPES`, of the first answer; see the module."""
    if not answers:
        return "none"
    answer = answers[0]
    tokens, words = tokenize(answer), answer.split()
    if _is_date(tokens):
        return "date"
    if _is_number(tokens):
        return "number"
    if question_word(question) == "who" and _is_person_like(words):
        return "person-like"
    if len(words) <= 8 and answer[:1].isupper():
        return "name"
    return "phrase" if len(words) <= 5 else "long text"


def _is_date(tokens: Sequence[str]) -> bool:
    words = [token for token in tokens if token.isalnum()]
    is_dated = any(word in _DATE_NOUNS or (_YEAR.fullmatch(word) and len(word) > 3) for word in words)
    known = (w in _DATE_WORDS or w in _DATE_NOUNS or _YEAR.fullmatch(w) or _DAY.fullmatch(w) for w in words)
    return is_dated and all(known)


def _is_number(tokens: Sequence[str]) -> bool:
    after = [token for token in tokens if token not in _BEFORE_NUMBERS]
    return bool(after) and (after[0][0].isdecimal() or after[0] in _NUMBER_WORDS)


def _is_person_like(words: Sequence[str]) -> bool:
    return 1 <= len(words) <= 5 and words[0][0].isupper() and all(w[0].isupper() or w in _PARTICLES for w in words)


# --- groups -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Group:
    """The questions of one kind: how many, and the metrics that are known of them, by name, in percent."""

    name: str
    n: int
    scores: Mapping[str, Interval]

    def to_json(self) -> dict[str, Any]:
        found = {
            name: {end: round(getattr(score, end), 4) for end in ("value", "low", "high")}
            for name, score in self.scores.items()
        }
        return {"group": self.name, "n": self.n, "scores": found}


def break_down(
    questions: Iterable[QuestionResult],
    kind_of: Callable[[QuestionResult], str],
    *,
    order: Sequence[str] = (),
    metrics: Sequence[str] = ("em", "recall_in_context"),
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[Group]:
    """Metrics a kind, with bootstrap intervals within it. Kinds stand as in `order`, others behind by their size.

    A kind without questions is left out; a metric that says nothing about any question of a kind is left out there.
    """
    kinds: dict[str, list[QuestionResult]] = {}
    for question in questions:
        kinds.setdefault(kind_of(question), []).append(question)
    known = [kind for kind in order if kind in kinds]
    rest = sorted((kind for kind in kinds if kind not in known), key=lambda kind: (-len(kinds[kind]), kind))
    groups = []
    for kind in [*known, *rest]:
        scores = {}
        for name in metrics:
            values = [value for q in kinds[kind] if (value := Metric.parse(name).value(q)) is not None]
            if values:
                scores[name] = bootstrap_interval(values, seed=seed, resamples=resamples)
        groups.append(Group(kind, len(kinds[kind]), scores))
    return groups


# --- curves -----------------------------------------------------------------------------------------------------------

CURVE_DEPTHS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000)


def recall_curve(
    questions: Sequence[QuestionResult], name: str, depth: int, *, seed: int = 0, resamples: int = RESAMPLES
) -> list[tuple[int, Interval]]:
    """Recall at every depth of `CURVE_DEPTHS` up to `depth`, of the metric `name` (recall, final_recall).

    Empty if no question is answerable.
    """
    points = []
    for k in (k for k in CURVE_DEPTHS if k <= depth):
        values = [value for question in questions if (value := Metric(name, k).value(question)) is not None]
        if values:
            points.append((k, bootstrap_interval(values, seed=seed, resamples=resamples)))
    return points


def reach_curve(reaches: Sequence[int | None], budget: int, *, points: int = 16) -> list[tuple[int, float]]:
    """Share of questions, in percent, whose answer stands within the first t tokens that the reader was given.

    A reach counts the tokens up to the end of the first packed passage with an answer; None: there is none. `points`
    values of t, evenly spaced up to `budget` (our choice: 16). Empty without questions or budget.
    """
    if not reaches or budget < 1:
        return []
    steps = sorted({round(budget * step / points) for step in range(1, points + 1)})
    return [(t, 100.0 * sum(reach is not None and reach <= t for reach in reaches) / len(reaches)) for t in steps]
