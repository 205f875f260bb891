"""Records of small tasks, made from passages and reading examples: what templates are filled with.

| task | is read | is written |
| --- | --- | --- |
| read | question, passage | answer |
| cloze | sentence (with a gap), passage | missing |
| title | passage | title |
| answered | question, passage | is_answered (no, yes) |
| wanted | question | kind (person, place, time, number, other) |
| which_title | passage, first, second | title, or second_is_right (no, yes) |
| order | first, second (neighbours) | first_came_first (no, yes) |
| same_article | first, second (sentences) | is_same (no, yes) |
| scrambled | sentence | is_scrambled (no, yes) |

odqa-mini was pre-trained on the first three, under instructions of its own; `answered`, `wanted`, `which_title` and
`order` are the tasks that were held out (`odqa.lm.tasks.HELD_OUT`); it has not seen the last two either. Both values of
a yes/no field, and the five kinds, are as likely. Passages are cut to sentences of at most `LONGEST` words. Ours.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from odqa.corpus.examples import Example
from odqa.errors import DataError
from odqa.lm.instructions import Record
from odqa.lm.tasks import GAP, Corpus
from odqa.sentences import sentence_spans
from odqa.types import Passage

KINDS = ("person", "place", "time", "number", "other")
LONGEST = 32  # our choice: words of a passage that is shown
TRIES = 2000  # our choice: draws after which a task is said to be empty
_PHRASE = re.compile(r"(?:\b[A-Z][\w-]+(?: [A-Z][\w-]+)*|\b\d[\d,.]*\d\b|\b\d+\b)")
_ASKED = (  # what a question's words say of its answer, the first that fits
    ("number", re.compile(r"\bhow (many|much|old|tall|long|far|big|large|high|deep|fast)\b", re.IGNORECASE)),
    ("time", re.compile(r"\b(when|(what|which) (year|date|day|month|century|decade))\b", re.IGNORECASE)),
    ("place", re.compile(r"\b(where|(what|which) (city|country|state|town|county|continent|place))\b", re.IGNORECASE)),
    ("person", re.compile(r"\b(who|whom|whose)\b", re.IGNORECASE)),
)

Make = Callable[[Corpus, np.random.Generator], Record | None]


@dataclass(frozen=True, slots=True)
class Task:
    """How records are made (None: what was drawn does not suit), and what a template of the task must have."""

    make: Make
    reads: tuple[str, ...]
    writes: str
    choices: int = 0


def draw_record(task: str, corpus: Corpus, rng: np.random.Generator) -> Record:
    """A record of a task, drawn by `rng`. Raises DataError for a task that the corpus has nothing for."""
    for _ in range(TRIES):
        if (found := TASKS[task].make(corpus, rng)) is not None:
            return found
    raise DataError(
        f"mixture: the task {task} is empty: {TRIES:,} draws from {len(corpus.passages):,} passages and "
        f"{len(corpus.examples):,} examples gave no record. Give more of them, or leave the task out."
    )


def _read(corpus: Corpus, rng: np.random.Generator) -> Record | None:
    if (example := _example(corpus, rng)) is None:
        return None
    found = _with_answer(example)
    return None if found is None else {"question": example.question, "passage": found[0], "answer": found[1]}


def _cloze(corpus: Corpus, rng: np.random.Generator) -> Record | None:
    if not (sentences := _sentences(corpus, rng)):
        return None
    sentence = sentences[int(rng.integers(len(sentences)))]
    phrases = [match for match in _PHRASE.finditer(sentence) if match.start() > 0]
    if not phrases:
        return None
    gap = phrases[int(rng.integers(len(phrases)))]
    gapped = f"{sentence[: gap.start()]}{GAP}{sentence[gap.end() :]}"
    return {"sentence": gapped, "passage": sentence, "missing": gap[0]}


def _title(corpus: Corpus, rng: np.random.Generator) -> Record | None:
    passage = _passage(corpus, rng)
    text = None if passage is None else _beginning(passage)
    return None if passage is None or not text or not passage.title else {"passage": text, "title": passage.title}


def _answered(corpus: Corpus, rng: np.random.Generator) -> Record | None:
    if (example := _example(corpus, rng)) is None:
        return None
    is_answered = int(rng.integers(2))
    if is_answered:
        found = _with_answer(example)
        return None if found is None else {"question": example.question, "passage": found[0], "is_answered": 1}
    others = [
        sentence
        for sentence in _sentences_of(example.passage.text)
        if not any(answer.lower() in sentence.lower() for answer in example.answers)
    ]
    if not others:
        return None
    sentence = others[int(rng.integers(len(others)))]
    return {"question": example.question, "passage": sentence, "is_answered": 0}


def _wanted(corpus: Corpus, rng: np.random.Generator) -> Record | None:
    """A kind is drawn first, then a question of it: all are as likely."""
    if not corpus.examples:
        return None
    kind = int(rng.integers(len(KINDS)))
    for _ in range(20):
        question = corpus.examples[int(rng.integers(len(corpus.examples)))].question
        if kind_of(question) == KINDS[kind]:
            return {"question": question, "kind": kind}
    return None


def kind_of(question: str) -> str:
    """One of `KINDS`, by the words of the question."""
    return next((kind for kind, words in _ASKED if words.search(question)), "other")


def _which_title(corpus: Corpus, rng: np.random.Generator) -> Record | None:
    right, wrong = _passage(corpus, rng), _passage(corpus, rng)
    if right is None or wrong is None or not right.title or not wrong.title or right.title == wrong.title:
        return None
    second = int(rng.integers(2))
    titles = [wrong.title, right.title] if second else [right.title, wrong.title]
    record = {"passage": _beginning(right), "first": titles[0], "second": titles[1], "title": right.title}
    return {**record, "second_is_right": second} if record["passage"] else None


def _order(corpus: Corpus, rng: np.random.Generator) -> Record | None:
    sentences = _sentences(corpus, rng)
    if len(sentences) < 2:
        return None
    at, came_first = int(rng.integers(len(sentences) - 1)), int(rng.integers(2))
    first, second = sentences[at : at + 2] if came_first else reversed(sentences[at : at + 2])
    return {"first": first, "second": second, "first_came_first": came_first}


def _same_article(corpus: Corpus, rng: np.random.Generator) -> Record | None:
    one, other = _passage(corpus, rng), _passage(corpus, rng)
    if one is None or other is None or one.title == other.title:
        return None
    is_same = int(rng.integers(2))
    own, others = _sentences_of(one.text), _sentences_of((one if is_same else other).text)
    if len(own) < 2 or len(others) < 2:
        return None
    return {"first": own[0], "second": others[1], "is_same": is_same}


def _scrambled(corpus: Corpus, rng: np.random.Generator) -> Record | None:
    if not (sentences := _sentences(corpus, rng)):
        return None
    words = sentences[int(rng.integers(len(sentences)))].split()
    is_scrambled = int(rng.integers(2))
    if len(words) < 8:
        return None
    if is_scrambled:
        words = [words[number] for number in rng.permutation(len(words))]
    return {"sentence": " ".join(words), "is_scrambled": is_scrambled}


TASKS: Mapping[str, Task] = {
    "read": Task(_read, ("question", "passage"), "answer"),
    "cloze": Task(_cloze, ("sentence", "passage"), "missing"),
    "title": Task(_title, ("passage",), "title"),
    "answered": Task(_answered, ("question", "passage"), "is_answered", 2),
    "wanted": Task(_wanted, ("question",), "kind", len(KINDS)),
    "which_title": Task(_which_title, ("passage", "first", "second"), "title or second_is_right", 2),
    "order": Task(_order, ("first", "second"), "first_came_first", 2),
    "same_article": Task(_same_article, ("first", "second"), "is_same", 2),
    "scrambled": Task(_scrambled, ("sentence",), "is_scrambled", 2),
}


def _passage(corpus: Corpus, rng: np.random.Generator) -> Passage | None:
    return corpus.passages[int(rng.integers(len(corpus.passages)))] if corpus.passages else None


def _example(corpus: Corpus, rng: np.random.Generator) -> Example | None:
    return corpus.examples[int(rng.integers(len(corpus.examples)))] if corpus.examples else None


def _sentences(corpus: Corpus, rng: np.random.Generator) -> list[str]:
    passage = _passage(corpus, rng)
    return [] if passage is None else _sentences_of(passage.text)


def _sentences_of(text: str) -> list[str]:
    """Its sentences of five to `LONGEST` words, in order."""
    found = [text[start:end] for start, end in sentence_spans(text)]
    return [sentence for sentence in found if 5 <= len(sentence.split()) <= LONGEST]


def _beginning(passage: Passage) -> str:
    """Its first words, up to `LONGEST`."""
    return " ".join(passage.text.split()[:LONGEST])


def _with_answer(example: Example) -> tuple[str, str] | None:
    """The first sentence with one of the answers, and that answer as it stands there."""
    for sentence in _sentences_of(example.passage.text):
        for answer in example.answers:
            at = sentence.lower().find(answer.lower())
            if at >= 0:
                return sentence, sentence[at : at + len(answer)]
    return None
