"""The records of one big JSON value, one at a time: DPR's retrieval and training files are lists of gigabytes.

The parser is the standard library's, in C; what is held is one block of the file and the record that it cuts. jsonl
is one record a line and needs none of this (`odqa.corpus.io`).
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odqa.corpus.io import open_text
from odqa.errors import DataError

_BLOCK = 1 << 20  # characters read at once
_LONGEST = 1 << 28  # ours, characters: no record of a retrieval run is that long; a file with an open quote is
_NEAR_THE_END = 16  # characters: a number, a literal or an escape that a block cuts is no longer than that
_BLANK = " \t\n\r"


@dataclass(frozen=True, slots=True)
class Record:
    """A value of the outermost list, or of the outermost object under `key`; `number` counts from 1."""

    number: int
    key: str | None
    value: Any


def stream_records(path: Path) -> Iterator[Record]:
    """The items of the list, or the entries of the object, that a JSON file holds; gzipped or not.

    Raises DataError, with the record's number, for what is no JSON, no list or object, or ends too early.
    """
    scanner = _Scanner(path)
    try:
        opening = scanner.peek()
        if opening not in ("[", "{"):
            found = "an empty file" if not opening else f"{opening!r}"
            raise DataError(f"{path}: expected a JSON list or object of records, found {found} at its beginning.")
        yield from _records(scanner, is_object=opening == "{")
    finally:
        scanner.close()


def _records(scanner: "_Scanner", *, is_object: bool) -> Iterator[Record]:
    closing = "}" if is_object else "]"
    scanner.take()
    while scanner.peek() != closing:
        if scanner.count:
            scanner.expect(",", f"a comma or {closing}")
        scanner.count += 1
        key = None
        if is_object:
            key = scanner.value()
            if not isinstance(key, str):
                raise scanner.error(f"expected a name in quotes, found {str(key)[:40]!r}")
            scanner.expect(":", "a colon")
        yield Record(scanner.count, key, scanner.value())
    scanner.take()
    if scanner.peek():
        raise DataError(
            f"{scanner.path}: text after the end of the JSON value. One value a file; jsonl ends in .jsonl."
        )


class _Scanner:
    """A place in a file that moves on, with as much of the text behind it as was needed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0  # records begun
        self._file = open_text(path)
        self._text, self._at, self._is_end = "", 0, False
        self._decoder = json.JSONDecoder()

    def close(self) -> None:
        self._file.close()

    def error(self, what: str) -> DataError:
        return DataError(f"{self.path}: record {max(self.count, 1)}: not JSON ({what}).")

    def peek(self) -> str:
        """The next character that is not blank; nothing at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANK:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill():
                return ""

    def take(self) -> None:
        self._at += 1

    def expect(self, character: str, named: str) -> None:
        found = self.peek()
        if found != character:
            raise self.error(f"expected {named}, found {repr(found) if found else 'the end of the file'}")
        self._at += 1

    def value(self) -> Any:
        """The JSON value that begins here; more of the file is read until it is whole."""
        if not self.peek():
            raise self.error("the file ends where a value is expected")
        while True:
            try:
                found, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._is_final(error) or not self._fill():
                    raise self.error(error.msg) from error
            except RecursionError as error:
                raise self.error("nested too deeply") from error
            else:
                # The next block may go on with a number that seems whole: 1 is the beginning of 1.5 and of 1e-3.
                length = end - self._at
                is_whole = isinstance(found, str | list | dict) or end + _NEAR_THE_END <= len(self._text)
                if is_whole or not self._fill():
                    self._at += length  # the value begins where we are, before and after a block was read
                    return found

    def _is_final(self, error: json.JSONDecodeError) -> bool:
        """Whether more text cannot heal it: the fault lies before the cut, and is no string that the cut left open."""
        if len(self._text) - self._at > _LONGEST:
            return True
        return error.pos < len(self._text) - _NEAR_THE_END and not error.msg.startswith("Unterminated string")

    def _fill(self) -> bool:
        """Read as much again as is held, so that a long record costs no more than twice its length."""
        if self._is_end:
            return False
        self._text, self._at = self._text[self._at :], 0
        try:
            block = self._file.read(max(_BLOCK, len(self._text)))
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: not UTF-8 after record {self.count} ({error.reason}).") from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{self.path}: damaged gzip file after record {self.count} ({error}).") from error
        self._text += block
        self._is_end = not block
        return bool(block)
