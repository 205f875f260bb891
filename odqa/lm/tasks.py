"""What odqa-mini was pre-trained on: small tasks made from passages and reading examples, each under an instruction.

| task | source | target |
| --- | --- | --- |
| read | a question and ONE passage | the answer |
| cloze | a sentence with a gap, and its passage | what stood in the gap |
| denoise | a passage with three gaps | what stood in them, in order |
| complete | title and first half of a sentence | its second half |
| title | a passage | its article |
| recall | a question alone | the answer |
| plain (decoder-only) | nothing | a passage |

Kept out on purpose, so that tuning has something to learn: questions of NQ and QED, contexts of several passages, and
the tasks in `HELD_OUT`. Rules and shares are ours; the idea of many tasks under instructions is T0's (Sanh et al. 2021,
arXiv 2110.08207), denoising is T5's (Raffel et al. 2019, arXiv 1910.10683).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np

from odqa.corpus.examples import Example
from odqa.sentences import sentence_spans
from odqa.types import Passage

T = TypeVar("T")
GAP = "[MASK]"
LONG_WORDS = 270  # our choice: with its question about 400 tokens of MiniLM's, the longest that odqa-mini-2 learns from
INSTRUCTIONS: Mapping[str, str] = {
    "read": "Answer the question from the passage.",
    "cloze": "Fill the gap from the passage.",
    "denoise": "Restore the missing words.",
    "complete": "Continue the sentence.",
    "title": "Name the article.",
    "recall": "Answer the question.",
    "plain": "",
}
HELD_OUT = (
    "does the passage answer the question (yes or no)",
    "what kind of answer a question wants (person, place, time, number, other)",
    "which of two titles a passage has",
    "which of two sentences came first",
)
_PHRASE = re.compile(r"(?:\b[A-Z][\w-]+(?: (?:of |the |and )?[A-Z][\w-]+)*|\b\d[\d,.]*\d\b|\b\d+\b)")


@dataclass(frozen=True, slots=True)
class Item:
    """One training example of a task: the parts of its source, instruction first, and its target, as text."""

    task: str
    parts: tuple[str, ...]
    target: str

    @property
    def source(self) -> str:
        """In one line."""
        return " ".join(self.parts)


@dataclass(frozen=True)
class Corpus:
    """What tasks draw from. Of the passages of the tasks `read` and `cloze`, `long_share` (0 to 1) are lengthened."""

    passages: Sequence[Passage]
    examples: Sequence[Example]
    long_share: float = 0.0

    @cached_property
    def articles(self) -> Mapping[str, Sequence[Passage]]:
        """The passages by title."""
        found: dict[str, list[Passage]] = {}
        for passage in self.passages:
            found.setdefault(passage.title, []).append(passage)
        return found


def make(task: str, corpus: Corpus, rng: np.random.Generator) -> Item:
    """One item of a task, drawn by `rng`; draws again where a passage does not suit the task."""
    while True:
        found = TASKS[task](corpus, rng)
        if found is not None:
            parts, target = found
            return Item(task, (INSTRUCTIONS[task], *parts) if parts else (), target)


def reading_parts(question: str, passage: Passage) -> tuple[str, str, str]:
    """The source of the task `read`."""
    return INSTRUCTIONS["read"], f"Question: {question}", f"Passage: {passage.title}. {passage.text}"


Made = tuple[tuple[str, ...], str] | None


def _read(corpus: Corpus, rng: np.random.Generator) -> Made:
    example = _draw(corpus.examples, rng)
    text = example.passage.text
    places = ((answer, text.lower().find(answer.lower())) for answer in example.answers)
    answer, start = next(((a, place) for a, place in places if place >= 0), ("", -1))
    if start < 0:
        return None
    part = _shown(corpus, example.passage, start, start + len(answer), rng)
    return reading_parts(example.question, replace(example.passage, text=part))[1:], answer


def _recall(corpus: Corpus, rng: np.random.Generator) -> Made:
    example = _draw(corpus.examples, rng)
    return (f"Question: {example.question}",), example.answers[0]


def _cloze(corpus: Corpus, rng: np.random.Generator) -> Made:
    passage = _draw(corpus.passages, rng)
    start, end = _sentence(passage.text, rng)
    phrases = [m for m in _PHRASE.finditer(passage.text, start, end) if m.start() > start]
    if not phrases:
        return None
    gap = phrases[rng.integers(len(phrases))]
    sentence = f"{passage.text[start : gap.start()]}{GAP}{passage.text[gap.end() : end]}"
    part = _shown(corpus, passage, gap.start(), gap.end(), rng)
    return (f"Sentence: {sentence}", f"Passage: {passage.title}. {part}"), gap[0]


def _denoise(corpus: Corpus, rng: np.random.Generator) -> Made:
    passage = _draw(corpus.passages, rng)
    words = passage.text.split()[:70]
    if len(words) < 24:
        return None
    third = len(words) // 3
    kept: list[str] = []
    missing: list[str] = []
    for part in (words[:third], words[third : 2 * third], words[2 * third :]):
        length = int(rng.integers(1, 4))
        at = int(rng.integers(0, len(part) - length + 1))
        kept += [*part[:at], GAP, *part[at + length :]]
        missing.append(" ".join(part[at : at + length]))
    return (f"{passage.title}. {' '.join(kept)}",), " | ".join(missing)


def _complete(corpus: Corpus, rng: np.random.Generator) -> Made:
    passage = _draw(corpus.passages, rng)
    start, end = _sentence(passage.text, rng)
    words = passage.text[start:end].split()
    if len(words) < 10:
        return None
    cut = int(rng.integers(len(words) // 3, len(words) - 3))
    return (f"{passage.title}: {' '.join(words[:cut])}",), " ".join(words[cut : cut + 14])


def _title(corpus: Corpus, rng: np.random.Generator) -> Made:
    passage = _draw(corpus.passages, rng)
    return ((f"Passage: {passage.text}",), passage.title) if passage.title else None


def _plain(corpus: Corpus, rng: np.random.Generator) -> Made:
    passage = _draw(corpus.passages, rng)
    return (), f"{passage.title}. {passage.text}"


TASKS: Mapping[str, Callable[[Corpus, np.random.Generator], Made]] = {
    "read": _read,
    "cloze": _cloze,
    "denoise": _denoise,
    "complete": _complete,
    "title": _title,
    "recall": _recall,
    "plain": _plain,
}


def _draw(values: Sequence[T], rng: np.random.Generator) -> T:
    return values[int(rng.integers(len(values)))]


def _sentence(text: str, rng: np.random.Generator) -> tuple[int, int]:
    spans = sentence_spans(text)
    return spans[int(rng.integers(len(spans)))]


def _shown(corpus: Corpus, passage: Passage, start: int, end: int, rng: np.random.Generator) -> str:
    """What the model sees of a passage: itself or a part of it (`_around`), or a long one (`_lengthened`)."""
    if rng.random() < corpus.long_share:
        return _lengthened(corpus, passage, rng)
    return _around(passage.text, start, end, rng)


def _lengthened(corpus: Corpus, passage: Passage, rng: np.random.Generator) -> str:
    """A passage somewhere among others of its article, as one text of at most `LONG_WORDS` words."""
    others = [other for other in corpus.articles.get(passage.title, ()) if other.text != passage.text]
    texts, words = [passage.text], len(passage.text.split())
    for number in rng.permutation(len(others)).tolist():
        more = len(others[number].text.split())
        if words + more > LONG_WORDS:
            break
        texts.insert(int(rng.integers(len(texts) + 1)), others[number].text)
        words += more
    return " ".join(texts)


def _around(text: str, start: int, end: int, rng: np.random.Generator) -> str:
    """All of a passage, or half the time the sentences of text[start:end] and up to two beside them: shorter sources
    make more steps in the same time, and every position of an answer as likely."""
    if rng.random() < 0.5:
        return text
    spans = sentence_spans(text)
    first = max(k for k, (begin, _) in enumerate(spans) if begin <= start)
    last = max(k for k, (begin, _) in enumerate(spans) if begin < max(end, start + 1))
    first = max(first - int(rng.integers(0, 3)), 0)
    last = min(last + int(rng.integers(0, 3)), len(spans) - 1)
    return text[spans[first][0] : spans[last][1]]
