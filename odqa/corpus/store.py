"""The text store: every passage of a collection, memory-mapped, reached by row or by id.

Layout of a store folder:

    part-00000.arrow ...   Arrow IPC files of `part_rows` passages (the last one fewer), columns id, title, text
    ids.hash.npy           uint64, sorted hashes of the ids        } only if the ids are not
    ids.row.npy            int64, the row of each of those hashes  } "1", "2", ... in row order
    store.json             rows of each part, and which of the two id schemes holds

A passage's row is its position in the source, from 0. Every other array of an index (postings, vectors) speaks of rows;
ids appear again only when hits are made. Opening maps files and reads nothing else, whatever the size. Building holds
one part in memory, and 16 bytes a passage where ids have to be hashed.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from odqa.artifacts import Draft
from odqa.errors import ArtifactError, DataError
from odqa.types import Passage

PART_ROWS = 100_000  # ours: about 70 MB of text a part for 100-word passages, 210 parts for the 21M of Wikipedia
_SCHEMA = pa.schema([("id", pa.large_string()), ("title", pa.large_string()), ("text", pa.large_string())])
_META = "store.json"


@runtime_checkable
class Resumable(Protocol):
    """An iterator over passages that can go on in the middle."""

    def mark(self) -> Mapping[str, Any] | None:
        """Where to go on for the passages that were not given out yet, as a JSON value."""
        ...

    def go_to(self, mark: Mapping[str, Any] | None, passages: int) -> None:
        """Go on with the passage after the first `passages`, by a mark that was taken there."""
        ...


def save_store(
    passages: Iterable[Passage], draft: Draft, name: str = "passages", *, part_rows: int = PART_ROWS
) -> None:
    """Write `passages` into the store folder `name` of `draft`, one numbered part after the other.

    A part that an earlier try finished is kept. A source that is `Resumable` goes on behind it; another is drawn from
    its start and what is known dropped: it must give the same passages in the same order each time. The marks of a
    resumable source lie in `name`.marks, which is scratch. Raises DataError for no passages or an id that stands twice.
    """
    if draft.has(f"{name}/{_META}"):
        return
    source = iter(passages)
    counts: list[int] = []
    if isinstance(source, Resumable):
        counts = _take_up(source, draft, name)
    while block := list(islice(source, part_rows)):
        part = _part_name(len(counts))
        draft.part(f"{name}/{part}", lambda path, block=block: _save_part(path, block))  # type: ignore[misc]
        counts.append(len(block))
        if isinstance(source, Resumable):
            draft.write_json(f"{name}.marks/{part}.json", {"counts": counts, "mark": source.mark()})
    if not counts:
        raise DataError("the collection has no passages.")
    folder = draft.path / name
    is_dense = _ids_are_row_numbers(folder, counts)
    if not is_dense:
        hashes, rows = _hash_ids(folder, counts)
        draft.part(f"{name}/ids.hash.npy", lambda path: _save_array(path, hashes))
        draft.part(f"{name}/ids.row.npy", lambda path: _save_array(path, rows))
    draft.write_json(f"{name}/{_META}", {"parts": counts, "ids": "row + 1" if is_dense else "hashed"})
    draft.counts["passages"] = sum(counts)


def _take_up(source: Resumable, draft: Draft, name: str) -> list[int]:
    """Let the source go on behind the last part that has a mark; the rows of the parts up to there."""
    part, counts, mark = 0, list[int](), None
    while draft.has(f"{name}.marks/{_part_name(part)}.json"):
        found = json.loads((draft.path / f"{name}.marks/{_part_name(part)}.json").read_text(encoding="utf-8"))
        counts, mark = found["counts"], found["mark"]
        part += 1
    if counts:
        source.go_to(mark, sum(counts))
    return counts


class PassageStore:
    """The passages of a collection by row (0 ... len - 1) and by id; a sequence whose items are made when asked for."""

    def __init__(self, path: Path, part_rows: Sequence[int], *, ids_are_row_numbers: bool) -> None:
        self.path = path
        self.part_rows = tuple(part_rows)
        self._starts = np.concatenate([[0], np.cumsum(part_rows)]).tolist()
        self._tables: dict[int, pa.RecordBatch] = {}  # parts that were touched, mapped
        self._hashes: np.ndarray | None = None
        if not ids_are_row_numbers:
            self._hashes = np.load(path / "ids.hash.npy", mmap_mode="r", allow_pickle=False)
            self._hash_rows = np.load(path / "ids.row.npy", mmap_mode="r", allow_pickle=False)

    @classmethod
    def open(cls, path: Path) -> "PassageStore":
        """Map the store folder `path`. Raises ArtifactError if it is not one."""
        try:
            meta = json.loads((path / _META).read_text(encoding="utf-8"))
            return cls(path, meta["parts"], ids_are_row_numbers=meta["ids"] == "row + 1")
        except (OSError, ValueError, KeyError) as error:
            raise ArtifactError(f"{path}: not a passage store ({error}). Build the index again.") from error

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> Passage:
        """The passage at `row`. Raises IndexError outside 0 ... len - 1; -1 is no passage."""
        part, offset = self._locate(row)
        table = self._table(part)
        return Passage(table[0][offset].as_py(), table[2][offset].as_py(), table[1][offset].as_py())

    def __iter__(self) -> Iterator[Passage]:
        for part in range(len(self.part_rows)):
            yield from _passages(_map_part(self.path, part))

    def rows(self, rows: Iterable[int]) -> list[Passage]:
        """The passages at `rows`, in that order."""
        return [self[int(row)] for row in rows]

    def slice(self, start: int, stop: int) -> list[Passage]:
        """The passages of rows start ... stop - 1 (cut at the end of the store), read part by part."""
        found: list[Passage] = []
        for part, first in enumerate(self._starts[:-1]):
            low, high = max(start - first, 0), min(stop - first, self.part_rows[part])
            if low < high:
                found += _passages(self._table(part).slice(low, high - low))
        return found

    def row_of(self, passage_id: str) -> int:
        """The row of the passage with this id. Raises DataError if there is none."""
        for row in self._candidate_rows(passage_id):
            part, offset = self._locate(row)
            if self._table(part)[0][offset].as_py() == passage_id:
                return row
        raise DataError(f"the collection in {self.path} has no passage with the id {passage_id!r}.")

    def __contains__(self, passage_id: object) -> bool:
        """Whether a passage has this id (a string)."""
        try:
            return isinstance(passage_id, str) and self.row_of(passage_id) >= 0
        except DataError:
            return False

    def _candidate_rows(self, passage_id: str) -> Iterator[int]:
        if self._hashes is None:
            row = int(passage_id) - 1 if passage_id.isdecimal() and len(passage_id) < 19 else -1
            return iter([row] if 0 <= row < len(self) else [])
        wanted = np.uint64(_hash(passage_id))
        low, high = np.searchsorted(self._hashes, wanted, "left"), np.searchsorted(self._hashes, wanted, "right")
        return iter(self._hash_rows[low:high].tolist())

    def _locate(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is outside the store (0 to {len(self) - 1})")
        part = bisect_right(self._starts, row) - 1
        return part, row - self._starts[part]

    def _table(self, part: int) -> pa.RecordBatch:
        if part not in self._tables:
            self._tables[part] = _map_part(self.path, part)
        return self._tables[part]


def _part_name(part: int) -> str:
    return f"part-{part:05d}.arrow"


def _save_part(path: Path, passages: Sequence[Passage]) -> None:
    columns: list[Any] = [[getattr(passage, field.name) for passage in passages] for field in _SCHEMA]
    try:
        batch = pa.record_batch(columns, schema=_SCHEMA)
    except UnicodeEncodeError as error:
        raise DataError(
            f"a passage cannot be stored as UTF-8: {error}. Half of a surrogate pair in the source?"
        ) from error
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        writer.write_batch(batch)


def _map_part(folder: Path, part: int) -> pa.RecordBatch:
    return pa.ipc.open_file(pa.memory_map(str(folder / _part_name(part)))).get_batch(0)


def _passages(batch: pa.RecordBatch) -> list[Passage]:
    columns: list[list[Any]] = [column.to_pylist() for column in batch.columns]
    ids, titles, texts = columns
    return [Passage(*fields) for fields in zip(ids, texts, titles, strict=True)]


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def _hash(passage_id: str) -> int:
    """64 bits that are the same on every machine; ids that collide are told apart by their text."""
    return int.from_bytes(hashlib.blake2b(passage_id.encode(), digest_size=8).digest(), "little")


def _ids_are_row_numbers(folder: Path, counts: Sequence[int]) -> bool:
    """Whether the ids are "1", "2", ... in row order, as in DPR's psgs_w100."""
    first = 1
    for part, count in enumerate(counts):
        if _map_part(folder, part)[0].to_pylist() != [str(number) for number in range(first, first + count)]:
            return False
        first += count
    return True


def _hash_ids(folder: Path, counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all ids in ascending order and the rows they belong to. Raises DataError if an id stands twice."""
    hashes = np.empty(sum(counts), np.uint64)
    start = 0
    for part, count in enumerate(counts):
        ids: list[Any] = _map_part(folder, part)[0].to_pylist()
        hashes[start : start + count] = [_hash(passage_id) for passage_id in ids]
        start += count
    rows = np.argsort(hashes, kind="stable")
    hashes = hashes[rows]
    _refuse_duplicates(folder, counts, hashes, rows)
    return hashes, rows


def _refuse_duplicates(folder: Path, counts: Sequence[int], hashes: np.ndarray, rows: np.ndarray) -> None:
    store = PassageStore(folder, counts, ids_are_row_numbers=True)  # by row only: the id files are not there yet
    seen: dict[str, int] = {}
    equal = np.flatnonzero(hashes[1:] == hashes[:-1])
    for row in sorted({int(rows[place]) for at in equal for place in (at, at + 1)}):
        passage_id = store[row].id
        if passage_id in seen:
            raise DataError(
                f"the id {passage_id!r} stands twice in the collection: passages {seen[passage_id] + 1} and {row + 1}"
                " (counted from 1). Ids must be unique."
            )
        seen[passage_id] = row
