"""Prompts as text: how a question, its passages and a few demonstrations are worded, and where an answer ends.

Text only; this module knows no tokens and no model. A prompt is a list of `Piece`s that the reader tokenises one by one
and concatenates, so that the price of a passage does not depend on its neighbours.

The invariant: a template is the recipe's, a value is data. A template is parsed once, before any value exists; a value
is pasted in and never parsed, so braces in a passage are braces. Pieces of data are marked, so that the reader does not
take a `</s>` in a passage for the end of the text.
"""

import difflib
import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from odqa.errors import RecipeError
from odqa.types import Passage


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a prompt. In a `is_control` piece special tokens are special, in any other they are plain text."""

    text: str
    is_control: bool = False


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A solved example to put before the question; `passage` is the evidence it shows, if any."""

    question: str
    answer: str
    passage: Passage | None = None


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """The wording of a prompt. Fields are written {like_this}; {{ and }} stand for braces.

    A prompt is a row of blocks with `separator` between them: the instruction, the demonstrations, the passages, the
    question. `question_first` puts the question before its passages. `line` stands between a question and its `answer`
    prefix, and `answer` ends the prompt; it should not end in a blank, which byte-level models do not expect there.
    `candidates` words the answers of an earlier pass, with `between` between them; they stand behind the passages.
    `passage` words one passage, `untitled` one without a title (None: as one with an empty title); a template whose
    `passage` is None reads none (closed-book). The text of a special token, such as `<s>`, is plain text in a template
    too: control tokens come from the tokenizer and its chat template.

    Raises RecipeError for a field it does not know, naming the valid ones, and for braces that do not match.
    """

    name: str
    instruction: str = ""
    passage: str | None = "Title: {title}\n{text}"
    untitled: str | None = "{text}"
    question: str = "Question: {question}"
    answer: str = "Answer:"
    separator: str = "\n\n"
    line: str = "\n"
    question_first: bool = False
    candidates: str = "Possible answers: {candidates}"
    between: str = "; "

    def __post_init__(self) -> None:
        for setting, valid in _FIELDS.items():
            template = getattr(self, setting)
            if template is not None:
                _parse(template, valid, f"prompt {self.name}.{setting}")
        if self.question and "question" not in _names(self.question):
            raise RecipeError(f"prompt {self.name}.question: {self.question!r} does not contain {{question}}.")
        if self.passage is not None and "text" not in _names(self.passage):
            raise RecipeError(f"prompt {self.name}.passage: {self.passage!r} does not contain {{text}}.")
        if self.candidates.count("{candidates}") != 1:
            raise RecipeError(f"prompt {self.name}.candidates: {self.candidates!r} must contain {{candidates}} once.")
        if not self.between.strip():
            raise RecipeError(f"prompt {self.name}.between: {self.between!r} is blank; candidates would run together.")

    def render_passage(self, passage: Passage) -> str:
        """One passage in its wording, without separator. Raises RecipeError if this template reads no passages."""
        if self.passage is None:
            others = ", ".join(name for name, other in TEMPLATES.items() if other.passage is not None)
            raise RecipeError(
                f"prompt {self.name} has no place for passages. Take one that has ({others}) or no retriever."
            )
        template = self.untitled if self.untitled is not None and not passage.title else self.passage
        return _fill(template, {"title": passage.title, "text": passage.text, "id": passage.id})

    def render_question(self, question: str) -> str:
        """The question in its wording, without the answer prefix."""
        return _fill(self.question, {"question": question})

    def labels(self) -> list[str]:
        """What this template puts before its parts and ends in a colon (Question:, Answer:), the longest first."""
        worded = [self.passage or "", self.untitled or "", self.question, self.candidates, self.answer]
        literals = [literal for text in worded for literal, _, _, _ in _FORMATTER.parse(text)]
        found = {line.strip() for literal in literals for line in literal.splitlines()}
        return sorted((label for label in found if _LABEL.search(label)), key=lambda label: (-len(label), label))

    def constant(self, setting: Literal["instruction", "answer", "separator", "line", "between"]) -> str:
        """The text of a setting that has no fields."""
        return _fill(getattr(self, setting), {})


# What may stand in braces, by setting.
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "instruction": (),
    "passage": ("title", "text", "id"),
    "untitled": ("text", "id"),
    "question": ("question",),
    "candidates": ("candidates",),
    "between": (),
    "answer": (),
    "separator": (),
    "line": (),
}


def find_template(name: str, changes: Mapping[str, Any] | None = None) -> PromptTemplate:
    """A named template, with some settings worded otherwise; RecipeError names the nearest of what there is."""
    if name not in TEMPLATES:
        raise RecipeError(f"prompt {name!r} is not one of {', '.join(TEMPLATES)}.{_did_you_mean(name, TEMPLATES)}")
    settings = tuple(PromptTemplate.__dataclass_fields__)
    for setting in changes or {}:
        if setting not in settings:
            raise RecipeError(
                f"prompt {name}: {setting!r} is not one of {', '.join(settings)}.{_did_you_mean(setting, settings)}"
            )
    return replace(TEMPLATES[name], **(changes or {}))


ChooseDemonstrations = Callable[[str], Sequence[Demonstration]]
"""From a question to what is shown before it (`odqa.read.demonstrations`)."""
Messages = list[dict[str, str]]
RenderChat = Callable[[Messages], str]
"""A tokenizer's chat template: messages with "role" and "content" to text that ends where the assistant speaks."""


def last_message(messages: Messages) -> str:
    """A chat template that shows the last message alone: of a conversation that somebody else renders."""
    return messages[-1]["content"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A template with its demonstrations, the same for all questions or chosen for each; plain or as a conversation.

    A whole prompt is `before(question)`, one `passage(p)` for each passage, `after(question)`: pieces that a reader
    tokenises apart. Separators stand at the end of a piece, where the vocabularies of current models expect line breaks
    (after a full stop, not before a word).

    With `chat` the passages and the question are the last user message, the demonstrations are turns before it, the
    instruction opens the first user message (not every model has a system role), and the assistant's turn takes the
    place of the answer prefix.
    """

    template: PromptTemplate
    demonstrations: tuple[Demonstration, ...] | ChooseDemonstrations = ()
    chat: RenderChat | None = None

    def demonstrations_for(self, question: str) -> Sequence[Demonstration]:
        """What is shown before this question."""
        return self.demonstrations(question) if callable(self.demonstrations) else self.demonstrations

    def before(self, question: str) -> list[Piece]:
        """What stands before the passages."""
        shown = self.demonstrations_for(question)
        opening, _ = self._frame(shown)
        blocks = [] if self.chat and shown else [self.template.constant("instruction")]
        if not self.chat:
            blocks += [self._demonstrate(example) for example in shown]
        if self.template.question_first:
            blocks.append(self.template.render_question(question))
        return _pieces(Piece(opening, is_control=True), *(Piece(self._close(block)) for block in blocks))

    def passage(self, passage: Passage) -> Piece:
        """One passage with the separator behind it. Raises RecipeError if the template reads no passages."""
        return Piece(self._close(self.template.render_passage(passage)))

    def after(self, question: str) -> list[Piece]:
        """What stands behind the passages, up to where the model goes on."""
        _, closing = self._frame(self.demonstrations_for(question)) if self.chat else ("", "")
        asked = "" if self.template.question_first else self.template.render_question(question)
        answer = "" if self.chat else self.template.constant("answer")
        line = self.template.constant("line") if asked and answer else ""
        return _pieces(Piece(asked + line + answer), Piece(closing, is_control=True))

    def candidates(self, candidates: Sequence[str]) -> list[Piece]:
        """Answers of an earlier pass, each a piece of its own; nothing without one. They stand behind the passages.

        Give them as `slot` cleans them.
        """
        if not candidates:
            return []
        opening, closing = self.template.candidates.split("{candidates}")
        pieces = [Piece(_fill(opening, {}))]
        for number, candidate in enumerate(candidates):
            pieces += [Piece(self.template.constant("between"))] if number else []
            pieces.append(Piece(candidate))
        return _pieces(*pieces, Piece(_fill(closing, {}) + self.template.constant("separator")))

    def slot(self, candidate: str) -> str:
        """A candidate as it may stand among others: one line, no mark between candidates, no label of the template.

        Line breaks and control characters become blanks, the mark between candidates a comma, and labels such as
        "Question:" lose their colon, so that a candidate cannot end its place and open another part of the prompt.
        Empty if nothing is left.
        """
        text = "".join(" " if unicodedata.category(char) in ("Cc", "Zl", "Zp") else char for char in candidate)
        text = text.replace(self.template.constant("between").strip(), ",")
        for label in self.template.labels():
            stem = r"\s*".join(re.escape(word) for word in label.removesuffix(":").split())
            text = re.sub(rf"({stem})\s*:", r"\1", text, flags=re.IGNORECASE)
        return " ".join(text.split()).strip(" ,")

    def text(self, question: str, passages: Sequence[Passage] = ()) -> str:
        """The whole prompt, to look at."""
        pieces = [*self.before(question), *(self.passage(passage) for passage in passages), *self.after(question)]
        return "".join(piece.text for piece in pieces)

    def messages(self, question: str, passages: Sequence[Passage] = ()) -> Messages:
        """The prompt as a conversation, for a server that renders it; made with `chat=last_message`."""
        return [*self.turns(question), {"role": "user", "content": self.text(question, passages)}]

    def turns(self, question: str) -> Messages:
        """The demonstrations as turns before the last user message."""
        return self._turns(self.demonstrations_for(question))

    def _turns(self, shown: Sequence[Demonstration]) -> Messages:
        messages: Messages = []
        for number, example in enumerate(shown):
            opening = self._close(self.template.constant("instruction")) if number == 0 else ""
            messages.append({"role": "user", "content": opening + self._ask(example)})
            messages.append({"role": "assistant", "content": example.answer})
        return messages

    def _demonstrate(self, example: Demonstration) -> str:
        asked = self._ask(example)
        answer = f"{self.template.constant('answer')} {example.answer}".strip()
        return asked + (self.template.constant("line") or self.template.constant("separator")) + answer

    def _ask(self, example: Demonstration) -> str:
        """A demonstration's passage and question, in the template's order."""
        blocks = [self.template.render_question(example.question)]
        if example.passage is not None:
            shown = self.template.render_passage(example.passage)
            blocks.insert(1 if self.template.question_first else 0, shown)
        return self.template.constant("separator").join(blocks)

    def _frame(self, shown: Sequence[Demonstration]) -> tuple[str, str]:
        """The conversation around the last user message; two empty texts without chat."""
        if self.chat is None:
            return "", ""
        messages = [*self._turns(shown), {"role": "user", "content": _SLOT}]
        parts = self.chat(messages).split(_SLOT)
        if len(parts) != 2:
            raise RecipeError(
                f"prompt {self.template.name}: the tokenizer's chat template shows the user message {len(parts) - 1} "
                "times; it must show it once, as it is. Set chat: false."
            )
        return parts[0], parts[1]

    def _close(self, block: str) -> str:
        return block + self.template.constant("separator") if block else ""


_SLOT = "[[odqa:user-message]]"  # stands for the last user message while the chat template is rendered


@dataclass(frozen=True, slots=True)
class AnswerRules:
    """Where a generated answer ends and how it is cleaned: all there is between a model's text and its answer.

    In this order: (1) the text ends at the first of the `stop` strings that comes at or after its first visible
    character; (2) blanks at both ends go; (3) the rules named in `cleanup` apply, one after the other (see `CLEANUPS`);
    (4) an answer that is one of `abstain`, but for case and final punctuation, becomes the empty text: the reader
    abstains, as it does when nothing is left.
    """

    stop: tuple[str, ...] = ("\n", "Question:")
    cleanup: tuple[str, ...] = ("prefix", "emphasis", "quotes")
    abstain: tuple[str, ...] = ("unanswerable",)

    def __post_init__(self) -> None:
        if "" in self.stop:
            raise RecipeError("stop: an empty text ends every answer before it begins. Remove it.")
        for name in self.cleanup:
            if name not in CLEANUPS:
                raise RecipeError(
                    f"cleanup: {name!r} is not one of {', '.join(CLEANUPS)}.{_did_you_mean(name, CLEANUPS)}"
                )

    def find_stop(self, text: str) -> tuple[int, str] | None:
        """Where the answer ends in a model's text (characters), and the stop string found there; None if it goes on."""
        first = len(text) - len(text.lstrip())
        found = [(place, stop) for stop in self.stop if (place := text.find(stop, first)) >= 0]
        return min(found, default=None)

    def clean(self, text: str) -> str:
        """The answer in a model's text; empty if it abstains."""
        end = self.find_stop(text)
        answer = (text if end is None else text[: end[0]]).strip()
        for name in self.cleanup:
            answer = CLEANUPS[name](answer)
        return "" if _bare(answer) in {_bare(phrase) for phrase in self.abstain} else answer


def drop_prefix(answer: str) -> str:
    """Without a leading "Answer:" or "The answer is:", which chat models like to repeat."""
    return _PREFIX.sub("", answer)


def drop_emphasis(answer: str) -> str:
    """Without Markdown's stars or underscores around the whole answer."""
    return _EMPHASIS.sub(r"\2", answer)


def drop_quotes(answer: str) -> str:
    """Without a pair of quotation marks around the whole answer; inner ones stay."""
    for opening, closing in _QUOTES:
        inner = answer[1:-1]
        if len(answer) > 2 and answer[0] == opening and answer[-1] == closing and not {opening, closing} & set(inner):
            return inner.strip()
    return answer


CLEANUPS: Mapping[str, Callable[[str], str]] = {
    "prefix": drop_prefix,
    "emphasis": drop_emphasis,
    "quotes": drop_quotes,
}
_PREFIX = re.compile(r"^(?:the\s+)?answer(?:\s+is)?\s*:\s*", re.IGNORECASE)
_EMPHASIS = re.compile(r"^(\*{1,3}|_{1,3})([^*_]+)\1$")
_QUOTES = (('"', '"'), ("'", "'"), ("`", "`"), ("\u201c", "\u201d"), ("\u2018", "\u2019"), ("\u00ab", "\u00bb"))


def _bare(text: str) -> str:
    return text.strip().rstrip(".!").casefold()


def _pieces(*pieces: Piece) -> list[Piece]:
    return [piece for piece in pieces if piece.text]


def _parse(template: str, valid: Sequence[str], where: str) -> None:
    """Check a template's fields; raises RecipeError with the place, what was found, and what is valid."""
    try:
        fields = list(_FORMATTER.parse(template))
    except ValueError as error:
        raise RecipeError(
            f"{where}: {template!r}: {error}. Write {{{{ and }}}} for braces that stand for themselves."
        ) from error
    for _, name, spec, conversion in fields:
        if name is None:
            continue
        if name not in valid:
            known = ", ".join(valid) if valid else "none here"
            raise RecipeError(f"{where}: {{{name}}} is not a field ({known}).{_did_you_mean(name, valid)}")
        if spec or conversion:
            raise RecipeError(f"{where}: {{{name}}} takes no format. Write just {{{name}}}.")


def _names(template: str) -> set[str]:
    return {name for _, name, _, _ in _FORMATTER.parse(template) if name is not None}


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Paste values into a template that `_parse` has checked; a value is never parsed."""
    return "".join(
        literal + (values[name] if name is not None else "") for literal, name, _, _ in _FORMATTER.parse(template)
    )


def _did_you_mean(name: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(valid), n=1)
    return f" Did you mean {near[0]}?" if near else ""


_FORMATTER = string.Formatter()
_LABEL = re.compile(r"\w.*:$")

# At the end of the file, because a template checks itself when it is made.
TEMPLATES: Mapping[str, PromptTemplate] = {
    template.name: template
    for template in (
        PromptTemplate("closed-book", instruction="Answer the question in a few words.", passage=None, untitled=None),
        PromptTemplate("open-book", instruction="Answer the question in a few words taken from the passages."),
        PromptTemplate(
            "open-book-or-abstain",
            instruction=(
                "Answer the question in a few words taken from the passages. "
                "If the passages do not answer it, write: unanswerable"
            ),
        ),
        PromptTemplate(
            "missing-passage",
            instruction="The passages do not answer the question. Write a short search query for the missing passage.",
            answer="Search query:",
        ),
        # The wording of SQuAD in T5's training mixture, with the article's title in front of the context
        # (Raffel et al. 2020, appendix D.15).
        PromptTemplate(
            "t5-squad",
            passage="{title} {text}",
            question="question: {question} context:",
            answer="",
            separator=" ",
            line="",
            question_first=True,
        ),
        # As odqa-mini was pre-trained to read one passage (odqa.lm.tasks); further passages follow in the same wording.
        PromptTemplate(
            "odqa-mini",
            instruction="Answer the question from the passage.",
            passage="Passage: {title}. {text}",
            untitled="Passage: {text}",
            answer="",
            separator=" ",
            line="",
            question_first=True,
        ),
        # The same for the decoder-only odqa-mini-d: parts on lines of their own.
        PromptTemplate(
            "odqa-mini-d",
            instruction="Answer the question from the passage.",
            passage="Passage: {title}. {text}",
            untitled="Passage: {text}",
            separator="\n",
            line="",
            question_first=True,
        ),
    )
}
