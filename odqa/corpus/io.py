"""Passage and question files in the formats people have: DPR's, FlashRAG's, Pyserini's and plain jsonl, gzipped or not.

Read, and written so that those systems read them.

Readers stream: one line in memory at a time. Every mistake is a DataError of one line that names file and line. What
a line means is decided by the file's name (.tsv, .csv, .jsonl, with or without .gz) and by its columns or keys; nothing
is guessed from the content of a text, except for FlashRAG's titles (see `split_contents`).
"""

import ast
import contextlib
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from odqa.errors import DataError
from odqa.types import Gold, Passage, Query

TREC_COLUMNS = "query Q0 passage rank score tag"
FileFormat = Literal["dpr", "pyserini", "flashrag"]
"""Whose passage and question files; Pyserini's and FlashRAG's passages are the same jsonl."""

_WATCHED_IDS = 2_000_000  # ours: about 200 MB; beyond it only the store, which sees all ids, looks for duplicates
_LONGEST_FIELD = 1 << 24  # characters of one csv field: articles fit, a file swallowed by an open quote does not


def read_trec_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and columns of the lines of a TREC run (may be gzipped), blank ones left out: `TREC_COLUMNS`.

    Raises DataError with the number of a line that has not six.
    """
    for number, line in read_lines(path):
        columns = line.split()
        if columns and len(columns) != 6:
            raise DataError(f"{path}: line {number} has {len(columns)} columns; a TREC run has 6: {TREC_COLUMNS}.")
        if columns:
            yield number, columns


def read_passages(path: Path) -> Iterator[Passage]:
    """Stream the passages of a collection file.

    - `.tsv`: DPR's psgs_w100: tab-separated with csv quoting; the header names `id`, `text` and (optionally) `title`,
      in any order.
    - `.jsonl`: an object a line: `{"id", "text", "title"}` (title optional), or `{"id", "contents"}`. In `contents` a
      first line that is followed by another is the title and loses one pair of enclosing double quotes (FlashRAG's and
      Pyserini's Wikipedia files); contents of one line have no title.

    A missing file, a wrong header or an unknown extension is a DataError at once, a damaged line when it is reached.
    Ids that are not "1", "2", ... in order are remembered to find duplicates, at most two million of them.
    """
    kind, path = _kind(path, {".tsv": "tsv", ".jsonl": "jsonl", ".json": "jsonl"})
    records = _Table(path, required=("id", "text")) if kind == "tsv" else _JsonLines(path)
    return _passages(path, records)


def read_questions(path: Path) -> list[Query]:
    """The questions of a file, without their answers, in file order.

    - `.jsonl`: `{"id", "question", ...}`; without ids, the line number (from 1) is the id.
    - `.csv` or `.tsv`: DPR's `question<TAB>answers` without a header; the id is the line number (from 1).

    Raises DataError for an empty file, an empty question or an id that stands twice.
    """
    return [row.query for row in _question_rows(path)]


def read_gold(path: Path) -> list[Gold]:
    """What a question file knows to be right, in file order: answers and, where given, ids of gold passages.

    jsonl: `answers` (or FlashRAG's `golden_answers`, NQ-open's `answer`) is a list of strings and may be empty, which
    says that only abstaining is right; `positive_ids` or `passage_ids` is a list of ids. DPR's csv: the second column
    is a Python list literal of answers. Raises DataError as `read_questions` does, and where answers are missing.
    """
    golds = []
    for row in _question_rows(path):
        if row.answers is None:
            raise DataError(f"{path}:{row.line}: no answers (expected a key 'answers'); gold needs them.")
        golds.append(Gold(row.query.id, row.answers, row.passage_ids))
    return golds


def save_passages(path: Path, passages: Iterable[Passage], file_format: FileFormat) -> int:
    """Write a collection as another system reads it; how many passages. A name that ends in .gz is gzipped.

    - `dpr`: psgs_w100.tsv, columns id, text, title, csv quoting (facebookresearch/DPR, dpr/data/retriever_data.py).
    - `pyserini`, `flashrag`: jsonl with id and contents, the title in double quotes as its first line (Pyserini's
      wikipedia-dpr collection; RUC-NLPIR/FlashRAG, docs/original_docs/building-index.md).

    `read_passages` gives the same passages back. Raises DataError for a title with a line break.
    """
    count = 0
    with writing(path) as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        if file_format == "dpr":
            table.writerow(("id", "text", "title"))
        for passage in passages:
            count += 1
            if "\n" in passage.title or "\r" in passage.title:
                raise DataError(f"{path}: the title of passage {passage.id!r} has a line break; no format here can.")
            if file_format == "dpr":
                table.writerow((passage.id, passage.text, passage.title))
            else:
                file.write(_json_line({"id": passage.id, "contents": join_contents(passage)}))
    return count


def save_questions(
    path: Path, queries: Sequence[Query], gold: Sequence[Gold], file_format: Literal["dpr", "flashrag"]
) -> None:
    """Write questions with their answers, in the same order, as another system reads them.

    - `dpr`: question, tab, Python list of answers (DPR's nq-test.qa.csv). It has no ids: they become line numbers.
    - `flashrag`: jsonl with id, question, golden_answers (flashrag/dataset/dataset.py).
    """
    with writing(path) as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        for query, known in zip(queries, gold, strict=True):
            if file_format == "dpr":
                table.writerow((query.text, repr(list(known.answers))))
            else:
                record = {"id": query.id, "question": query.text, "golden_answers": list(known.answers)}
                file.write(_json_line(record))


def join_contents(passage: Passage) -> str:
    """Title and text as Pyserini and FlashRAG keep them: the quoted title, a line break, the text."""
    if not passage.title and "\n" not in passage.text:
        return passage.text
    return f'"{passage.title}"\n{passage.text}'


@contextlib.contextmanager
def writing(path: Path) -> Iterator[IO[str]]:
    """A UTF-8 text file that is there whole or not at all; gzipped, the same bytes each time, if its name says .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with contextlib.ExitStack() as stack:
            raw: Any = stack.enter_context(temporary.open("wb"))
            if path.suffix == ".gz":
                raw = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))
            yield stack.enter_context(io.TextIOWrapper(raw, encoding="utf-8", newline=""))
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)


def _json_line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True)
class _QuestionRow:
    line: int
    query: Query
    answers: tuple[str, ...] | None
    passage_ids: tuple[str, ...]


class _JsonLines:
    """Iterates over (line number, object) of a jsonl file; blank lines are skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for line, text in read_lines(self.path):
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{self.path}:{line}: not JSON ({error}).") from error
            if not isinstance(value, dict):
                raise DataError(f"{self.path}:{line}: expected a JSON object, found {type(value).__name__}.")
            yield line, value


class _Table:
    """Iterates over (line number, column -> cell) of a tab-separated file with csv quoting and a header."""

    def __init__(self, path: Path, required: Sequence[str]) -> None:
        self.path = path
        self.header = next((cells for _, cells in _cells(path)), None)
        if self.header is None:
            raise DataError(f"{path}: the file is empty.")
        missing = [name for name in required if name not in self.header]
        if missing:
            found = ", ".join(self.header)[:200]
            raise DataError(f"{path}:1: no column {' and '.join(missing)} in the header (found: {found}).")

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        assert self.header is not None
        rows = _cells(self.path)
        next(rows)
        for line, cells in rows:
            if len(cells) != len(self.header):
                raise DataError(f"{self.path}:{line}: {len(cells)} columns, the header has {len(self.header)}.")
            yield line, dict(zip(self.header, cells, strict=True))


class _Ids:
    """Refuses an id that stands twice, naming both lines; costs nothing while ids count up from "1"."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._counted = 0  # ids "1" ... this were seen, one a call, in order
        self._first_line = 0
        self._lines: dict[str, int] = {}

    def add(self, passage_id: str, line: int) -> None:
        if not self._lines and passage_id == str(self._counted + 1):
            self._counted += 1
            return
        is_number = passage_id.isascii() and passage_id.isdecimal() and passage_id[0] != "0"
        is_counted = is_number and int(passage_id[:19]) <= self._counted
        if is_counted or passage_id in self._lines:
            where = f"line {self._lines[passage_id]}" if passage_id in self._lines else "an earlier line"
            raise DataError(f"{self.path}:{line}: the id {passage_id!r} stands twice (first in {where}).")
        if len(self._lines) < _WATCHED_IDS:
            self._lines[passage_id] = line


def _passages(path: Path, records: _Table | _JsonLines) -> Iterator[Passage]:
    ids = _Ids(path)
    is_empty = True
    for line, record in records:
        passage_id = _id(path, line, record)
        ids.add(passage_id, line)
        if "text" in record:
            title, text = record.get("title"), record["text"]
        elif "contents" in record:
            title, text = split_contents(record["contents"])
        else:
            raise DataError(
                f"{path}:{line}: neither 'text' nor 'contents' in this passage (found: {', '.join(record)})."
            )
        if not isinstance(text, str) or not isinstance(title, str | None):
            raise DataError(f"{path}:{line}: text and title must be strings.")
        if "\n" in (title or "") or "\n" in passage_id:
            raise DataError(f"{path}:{line}: a line break inside an id or a title; is a quote left open before it?")
        is_empty = False
        yield Passage(passage_id, text, title or "")
    if is_empty:
        raise DataError(f"{path}: the file has no passages.")


def split_contents(contents: object) -> tuple[str, object]:
    """(title, text) of `contents`: a first line before further ones is the title, without its enclosing quotes."""
    if not isinstance(contents, str) or "\n" not in contents:
        return "", contents
    title, text = contents.split("\n", 1)
    if len(title) >= 2 and title[0] == title[-1] == '"':
        title = title[1:-1]
    return title, text


def _question_rows(path: Path) -> list[_QuestionRow]:
    kind, path = _kind(path, {".jsonl": "jsonl", ".json": "jsonl", ".csv": "dpr", ".tsv": "dpr"})
    rows = list(_dpr_questions(path) if kind == "dpr" else _json_questions(path))
    if not rows:
        raise DataError(f"{path}: the file has no questions.")
    ids = _Ids(path)
    for row in rows:
        if not row.query.text.strip():
            raise DataError(f"{path}:{row.line}: the question is empty.")
        ids.add(row.query.id, row.line)
    return rows


def _json_questions(path: Path) -> Iterator[_QuestionRow]:
    for line, record in _JsonLines(path):
        text = record.get("question")
        if not isinstance(text, str):
            found = ", ".join(record) or "nothing"
            raise DataError(f"{path}:{line}: no string under the key 'question' (found: {found}).")
        query_id = _id(path, line, record) if "id" in record else str(line)
        answers = _strings(path, line, record, ("answers", "golden_answers", "answer"))
        passage_ids = _strings(path, line, record, ("positive_ids", "passage_ids"))
        yield _QuestionRow(line, Query(query_id, text), answers, passage_ids or ())


def _dpr_questions(path: Path) -> Iterator[_QuestionRow]:
    for line, cells in _cells(path):
        if len(cells) != 2:
            raise DataError(f"{path}:{line}: expected question<TAB>list of answers, found {len(cells)} columns.")
        try:
            answers = ast.literal_eval(cells[1])
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise DataError(f"{path}:{line}: the answers are not a Python list literal: {cells[1][:60]!r}.") from error
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise DataError(f"{path}:{line}: the answers must be a list of strings, found {cells[1][:60]!r}.")
        yield _QuestionRow(line, Query(str(line), cells[0]), tuple(answers), ())


def _strings(path: Path, line: int, record: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, ...] | None:
    """The list under the first of `keys` that is there, as strings (ids may be numbers); None if none is."""
    for key in keys:
        if key in record:
            values = record[key]
            if not isinstance(values, list) or not all(type(value) in (str, int) for value in values):
                raise DataError(f"{path}:{line}: {key!r} must be a list of strings.")
            return tuple(str(value) for value in values)
    return None


def _id(path: Path, line: int, record: Mapping[str, Any]) -> str:
    value = record.get("id")
    if type(value) not in (str, int) or value == "":
        raise DataError(f"{path}:{line}: no id (expected a string or a whole number under 'id', found {value!r}).")
    return str(value)


def _kind(path: Path, kinds: Mapping[str, str]) -> tuple[str, Path]:
    """What `path` holds, by its extension before `.gz`. Raises DataError for a missing file or an unknown extension."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}.")
    extension = Path(path.name.removesuffix(".gz")).suffix.lower()
    if extension not in kinds:
        raise DataError(
            f"{path}: unknown kind of file {extension!r} (expected {', '.join(kinds)}, or one of them with .gz)."
        )
    return kinds[extension], path


def _cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of a tab-separated file; the number is that of the line a quoted cell ends in.

    Quotes are read as leniently as DPR reads them, so that its 21M rows pass; the callers check what comes out.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader((text for _, text in read_lines(path)), delimiter="\t")
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: broken csv quoting ({error}).") from error
        if cells:
            yield reader.line_num, cells


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end) of a UTF-8 text file, gunzipped if its first bytes say gzip."""
    line = 0
    try:
        with open_text(path) as file:
            for line, text in enumerate(file, 1):
                yield line, text
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 after line {line} ({error.reason}).") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file after line {line} ({error}).") from error


def open_text(path: Path) -> IO[str]:
    """A UTF-8 text file, gunzipped if its first bytes say gzip; line ends stay as they are."""
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    # newline="": the csv reader wants line ends as they are; utf-8-sig drops the mark that spreadsheets put first
    return (
        gzip.open(path, "rt", encoding="utf-8-sig", newline="")
        if is_gzip
        else path.open(encoding="utf-8-sig", newline="")
    )
