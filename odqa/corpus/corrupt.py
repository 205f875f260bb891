"""Questions that their passage no longer answers: one thing in an answerable question is changed.

A reader learns to be silent from questions that look as if their passage answered them. People wrote such questions for
SQuAD 2.0 (Rajpurkar, Jia & Liang 2018, arXiv 1806.03822) and mostly did one of these: another entity or number, an
antonym, a negation, another noun (their table 2). Done here by rule, so a question may stay answerable by accident; a
training signal, never a test. Rules and word list are ours.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

_NAME = re.compile(r"[A-Z][\w-]+(?: (?:of |the |and |de )*[A-Z][\w-]+)*")
_NUMBER = re.compile(r"(?<![\w.,])\d[\d,]*(?![\w%]|[.,]\d)")
_WORD = re.compile(r"\b[a-z]{4,}\b")
_AUXILIARY = re.compile(r"\b(is|are|was|were|did|does|do|has|have|had|could|would|should)\b(?! not|n't|n’t)", re.I)
_NEGATION = re.compile(r"n't\b|n’t\b| not\b| never\b")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ASKING = _words("What When Where Which Who Whom Whose Why How In On At The For By To From Of A An Is Are Was Were Did")
_COMMON = _words(
    "what when where which whom whose that this these those with from into about after before many much long does "
    "have were been being name term word kind type year people person place most more than their there them they other"
)
_PAIRS = (
    "first last|most least|more less|before after|largest smallest|highest lowest|oldest youngest|earliest latest|"
    "north south|east west|northern southern|eastern western|begin end|began ended|start stop|started stopped|"
    "increase decrease|increased decreased|rise fall|rose fell|win lose|won lost|above below|inside outside|"
    "minimum maximum|best worst|major minor|large small|larger smaller|high low|higher lower|old new|early late|"
    "earlier later|always never|all none|allowed forbidden|with without|male female|men women|positive negative|"
    "success failure|successful unsuccessful|same different|longest shortest|strong weak|support oppose|"
    "supported opposed|accept reject|accepted rejected|public private|internal external|arrive leave|arrived left|"
    "buy sell|bought sold|open closed|opened closed|similar different|common rare|appear disappear|gained lost|"
    "majority minority|winter summer|urban rural|possible impossible|legal illegal|agreed disagreed|joined left"
)
_OPPOSITE = {a: b for pair in _PAIRS.split("|") for a, b in (pair.split(), reversed(pair.split()))}


Rule = Callable[[str, str, Sequence[str], np.random.Generator], str | None]


def corrupt(question: str, passage: str, answers: Sequence[str], rng: np.random.Generator) -> str | None:
    """The question with one thing changed so that `passage` should no longer answer it; None if no rule applies.

    Names, numbers and nouns are replaced by others of the passage that are not an answer, so that the words of the new
    question still stand there. Which rule is used, and with what, `rng` draws.
    """
    rules: list[Rule] = [_name, _number, _noun, _antonym, _negation]
    # Tried in this order of chance: entities are what people change most.
    chances = np.array([0.3, 0.2, 0.2, 0.2, 0.1])
    for number in rng.choice(len(rules), size=len(rules), replace=False, p=chances):
        changed = rules[int(number)](question, passage, answers, rng)
        if changed is not None:
            return changed
    return None


def _name(question: str, passage: str, answers: Sequence[str], rng: np.random.Generator) -> str | None:
    found = [match for match in _NAME.finditer(question) if match.start() > 0 and match[0] not in _ASKING]
    answer_words = {word.lower() for answer in answers for word in answer.split()}
    others = sorted(
        {
            match[0]
            for match in _NAME.finditer(passage)
            if match[0].split()[0] not in _ASKING
            and match[0].lower() not in question.lower()
            and not answer_words & {word.lower() for word in match[0].split()}
            and not _starts_sentence(passage, match.start())
        }
    )
    return _replace(question, found, others, rng)


def _number(question: str, passage: str, answers: Sequence[str], rng: np.random.Generator) -> str | None:
    found = list(_NUMBER.finditer(question))
    if not found:
        return None
    match = found[rng.integers(len(found))]
    answered = " ".join(answers)
    others = sorted(
        {m[0] for m in _NUMBER.finditer(passage) if len(m[0]) == len(match[0]) and m[0] not in question + answered}
    )
    if not others and match[0].isdigit():
        others = [str(int(match[0]) + int(rng.integers(1, 30)))]
    return _replace(question, [match], others, rng)


def _noun(question: str, passage: str, answers: Sequence[str], rng: np.random.Generator) -> str | None:
    """A word that question and passage share becomes another one of the passage with the same ending."""
    words = set(_WORD.findall(passage)) - _COMMON
    found = [match for match in _WORD.finditer(question) if match[0] in words]
    if not found:
        return None
    match = found[rng.integers(len(found))]
    taken = set(_WORD.findall(question)) | {word for answer in answers for word in _WORD.findall(answer.lower())}
    others = sorted(word for word in words - taken if word[-2:] == match[0][-2:] and word[:4] != match[0][:4])
    return _replace(question, [match], others, rng)


def _antonym(question: str, _passage: str, _answers: Sequence[str], rng: np.random.Generator) -> str | None:
    found = [match for match in re.finditer(r"\b[a-z]+\b", question) if match[0] in _OPPOSITE]
    if not found:
        return None
    match = found[rng.integers(len(found))]
    return _replace(question, [match], [_OPPOSITE[match[0]]], rng)


def _negation(question: str, _passage: str, _answers: Sequence[str], _rng: np.random.Generator) -> str | None:
    """Negates the first auxiliary verb, or takes a negation away."""
    if _NEGATION.search(question):
        return _NEGATION.sub("", question, count=1)
    changed = _AUXILIARY.sub(lambda match: f"{match[0]}n't", question, count=1)
    return None if changed == question else changed


def _replace(
    question: str, found: Sequence[re.Match[str]], others: Sequence[str], rng: np.random.Generator
) -> str | None:
    if not found or not others:
        return None
    match, other = found[int(rng.integers(len(found)))], others[int(rng.integers(len(others)))]
    return question[: match.start()] + other + question[match.end() :]


def _starts_sentence(text: str, at: int) -> bool:
    return at == 0 or text[:at].rstrip().endswith((".", "?", "!", '"'))
