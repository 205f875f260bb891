"""What users say of answers, right or wrong, on disk: examples for a tuning that goes on while a prompt is in use.

    marks/USER.jsonl     one JSON object a line, the newest last

A line has `time` (seconds since 1970), `ask` (the number of the question), `recipe` (hash of the pipeline that
answered), `question`, `answer` (empty: it abstained), `passage_ids` (packed, in reading order) and `is_right`. Of a
generative reader that answered from one text also `prompt`, that text, and `continuation`, the answer as it follows it,
else null: those two are what black-box tuning learns from, through the model's API alone:

    prompt = PromptInUse(Path("users/alice/news"), engine)
    hand_over(Marks(Path("served")).of("alice"), prompt)

(`odqa.frozen.in_use`). Nothing is kept of a question that nobody marks. A user's file has a bound.
"""

import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from odqa.errors import DataError
from odqa.serve.errors import bad
from odqa.serve.keys import NAME

if TYPE_CHECKING:
    from odqa.frozen.in_use import PromptInUse

FOLDER = "marks"
_MOST_BYTES = 64 << 20  # our choice: of a user's file


@dataclass(frozen=True, slots=True)
class Mark:
    """One line, see the module."""

    ask: str
    recipe: str
    question: str
    answer: str
    passage_ids: tuple[str, ...]
    prompt: str | None = None
    continuation: str | None = None
    is_right: bool = False
    time: float = 0.0


class Marks:
    """The marks below a server's folder. Safe to use from several threads."""

    def __init__(self, folder: Path, *, most_bytes: int = _MOST_BYTES) -> None:
        self.folder, self._most = folder / FOLDER, most_bytes
        self._lock = threading.Lock()

    def add(self, user: str, mark: Mark, *, is_right: bool) -> Mark:
        """Keep one; it is on disk when this returns. Raises ApiError for a user who has too many."""
        made = replace(mark, is_right=is_right, time=round(time.time(), 3))
        line = (json.dumps(asdict(made), ensure_ascii=False) + "\n").encode()
        file = self._file(user)
        with self._lock:
            self.folder.mkdir(parents=True, exist_ok=True)
            with file.open("a+b") as handle:
                size = _cut(handle)
                if size + len(line) > self._most:
                    raise bad(f"Your marks take {size:,} bytes, and there is no room for more.", code="full")
                handle.write(line)
                handle.flush()
                os.fsync(handle.fileno())
        return made

    def of(self, user: str) -> list[Mark]:
        """A user's marks in the order in which they came; of one answer the last one counts.

        A last line without its end is what a killed process left, and is left out. Raises DataError for a damaged one.
        """
        file = self._file(user)
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        found: dict[str, Mark] = {}
        for number, line in enumerate(text.split("\n")[:-1], start=1):
            try:
                record: dict[str, Any] = json.loads(line)
                mark = Mark(**record | {"passage_ids": tuple(record["passage_ids"])})
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(f"{file}:{number}: not a mark ({error}). Remove the line.") from error
            found.pop(mark.ask, None)
            found[mark.ask] = mark
        return list(found.values())

    def _file(self, user: str) -> Path:
        assert NAME.fullmatch(user)
        return self.folder / f"{user}.jsonl"


def hand_over(marks: Sequence[Mark], prompt: "PromptInUse") -> int:
    """Give marks to a prompt in use, as examples of its next tuning; how many it did not have yet.

    Left out are marks without the text that was answered from: nothing can be learned from them through an API.
    """
    known = {(one.text, one.answer): one.is_right for one in prompt.marks()}
    given = 0
    for mark in marks:
        if mark.prompt is None or mark.continuation is None:
            continue
        if known.get((mark.prompt, mark.continuation)) != mark.is_right:
            prompt.mark(mark.prompt, mark.continuation, is_right=mark.is_right)
            given += 1
    return given


def _cut(handle: BinaryIO) -> int:
    """Cut off a line without its end, which a killed process left; the bytes that stay."""
    handle.seek(max(0, handle.seek(0, os.SEEK_END) - 1))
    if handle.read(1) not in (b"", b"\n"):
        handle.seek(0)
        handle.truncate(handle.read().rfind(b"\n") + 1)
    return handle.seek(0, os.SEEK_END)
