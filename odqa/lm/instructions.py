"""Instructions as templates: a small language to word one task in many ways, in the manner of T0.

    Passage: {passage} Does it answer "{question}"? ||| {is_answered?no|yes}

Before ||| stands what the model reads, behind it what it is to write. {name} is a field of the record as it is,
{name?a|b|c} the text whose number, from 0, is in the field; {{ and }} are braces. A file of templates has several for
each task, some of them for testing only. Source: Sanh et al. 2021 (arXiv 2110.08207), section 4; their language
(promptsource) is Jinja, which this one is a small part of.

Knows text and records, no tensors; which fields a task's records have: `odqa.lm.records`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from odqa.errors import DataError

Record = Mapping[str, str | int]
BORDER = "|||"
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_NAME = re.compile(r"[a-z_]+")


@dataclass(frozen=True, slots=True)
class Field:
    """A field to be put in; with `choices` it is the number of one of them."""

    name: str
    choices: tuple[str, ...] = ()


Side = tuple[str | Field, ...]


@dataclass(frozen=True, slots=True)
class Template:
    """One wording of a task. `where` is what errors name."""

    where: str
    source: Side
    target: Side

    def fill(self, record: Record) -> tuple[str, str]:
        """What is read and what is to be written of a record.

        Raises DataError for a field that the record lacks, or a number that has no choice.
        """
        return self._say(self.source, record), self._say(self.target, record)

    def check(self, *, reads: Sequence[str], writes: str, choices: int) -> None:
        """Raises DataError unless the source has all of `reads` and no other field, and the target has `writes`.

        `writes` may be any of several fields, "a or b"; where it is a number, with that many `choices`.
        """
        source, target = (
            {part.name for part in side if isinstance(part, Field)} for side in (self.source, self.target)
        )
        wanted = set(writes.split(" or "))
        missing = [f"{{{name}}} before {BORDER}" for name in reads if name not in source]
        missing += [] if target & wanted else [f"{{{writes}}} behind {BORDER}"]
        if missing:
            raise DataError(f"{self.where}: the template has no {' and no '.join(missing)}. Put it in.")
        known = {*reads, *wanted}
        if unknown := sorted((source - set(reads)) | (target - known)):
            raise DataError(
                f"{self.where}: {{{unknown[0]}}} is not a field that may stand there. The task's records have "
                f"{', '.join(reads)} to be read and {writes} to be written."
            )
        for part in self.target:
            if isinstance(part, Field) and part.choices and len(part.choices) != choices:
                raise DataError(
                    f"{self.where}: {{{part.name}?...}} has {len(part.choices)} choices; the task has "
                    f"{choices or 'none'}."
                )

    def _say(self, side: Side, record: Record) -> str:
        return "".join(part if isinstance(part, str) else self._value(part, record) for part in side)

    def _value(self, field: Field, record: Record) -> str:
        if field.name not in record:
            raise DataError(f"{self.where}: the record has no field {field.name} (it has {', '.join(record)}).")
        value = record[field.name]
        if not field.choices:
            return str(value)
        if not isinstance(value, int) or not 0 <= value < len(field.choices):
            raise DataError(f"{self.where}: {field.name} is {value!r}; there are {len(field.choices)} choices.")
        return field.choices[value]


def _fields(side: Side) -> set[str]:
    return {part.name for part in side if isinstance(part, Field)}


def parse_template(text: str, where: str) -> Template:
    """Read a template. Raises DataError, naming `where`, for one that has not two sides, or a brace that is alone."""
    sides = text.split(BORDER)
    if len(sides) != 2:
        raise DataError(f"{where}: {BORDER} stands {len(sides) - 1} times in the template; it must stand once.")
    source, target = (_parse(side.strip(), where) for side in sides)
    for name, side in (("before", source), ("behind", target)):
        if not side:
            raise DataError(f"{where}: nothing stands {name} {BORDER}.")
    return Template(where, source, target)


def _parse(side: str, where: str) -> Side:
    parts: list[str | Field] = []
    start = 0

    def add(text: str) -> None:
        if parts and isinstance(parts[-1], str):
            parts[-1] += text
        elif text:
            parts.append(text)

    for found in _PIECE.finditer(side):
        add(side[start : found.start()])
        start = found.end()
        if found[0] in ("{{", "}}"):
            add(found[0][0])
        elif found[1] is None:
            raise DataError(f"{where}: a {found[0]} stands alone in the template. Write {found[0] * 2} for a brace.")
        else:
            name, asks, choices = found[1].partition("?")
            if not _NAME.fullmatch(name):
                raise DataError(f"{where}: {found[0]} names no field. A name has small letters and _ only.")
            parts.append(Field(name, tuple(choices.split("|")) if asks else ()))
    add(side[start:])
    return tuple(parts)
