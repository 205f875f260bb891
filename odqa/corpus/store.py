"""The text store: every passage of a collection, memory-mapped, reached by row or by id.

Layout of a store folder:

    part-00000.arrow ...   Arrow IPC files of `part_rows` passages (the last one fewer), columns id, title, text
    ids.hash.npy           uint64, sorted hashes of the ids        } only if the ids are not
    ids.row.npy            int64, the row of each of those hashes  } "1", "2", ... in row order
    store.json             rows of each part, and which of the two id schemes holds

A passage's row is its position in the source, from 0. Every other array of an index (postings, vectors) speaks of rows;
ids appear again only when hits are made. Opening maps files and reads nothing else, whatever the size. Building holds
one part in memory (a part also ends where its text would take too much), and ids are sorted a share at a time: the
peak is `memory`, whatever the number of passages and their lengths.
"""

import hashlib
import json
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from odqa.artifacts import Draft
from odqa.corpus.arrays import save_pieces
from odqa.errors import ArtifactError, DataError
from odqa.runtime import Recent
from odqa.types import Passage

PART_ROWS = 100_000  # ours: about 70 MB of text a part for 100-word passages, 210 parts for the 21M of Wikipedia
MEMORY = 3_000_000_000  # ours, bytes: three quarters of the default budget of an index build; programs need the rest
_OPEN_PARTS = 256  # ours: parts that stay mapped; each holds one of the files that a process may have open (1,024)
_CHARACTER_BYTES = 12  # of memory while a part is made: in Python up to 4, in UTF-8 up to 4, and again in its buffers
_PASSAGE_BYTES = 400  # the same for a passage beside its text: four Python objects, places in lists and offsets
_ID_BYTES = 64  # the same for an id that is sorted: its text, its hash, its row, and the order of them
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
    passages: Iterable[Passage],
    draft: Draft,
    name: str = "passages",
    *,
    part_rows: int = PART_ROWS,
    memory: int = MEMORY,
) -> None:
    """Write `passages` into the store folder `name` of `draft`, one numbered part after the other.

    A part has `part_rows` passages, or fewer where they would take more than `memory` bytes while it is made. A part
    that an earlier try finished is kept. A source that is `Resumable` goes on behind it; another is drawn from its
    start and what is known dropped: it must give the same passages in the same order each time. The marks of a
    resumable source lie in `name`.marks, which is scratch. Raises DataError for no passages or an id that stands twice.
    """
    if draft.has(f"{name}/{_META}"):
        return
    folder = draft.path / name
    source = _Source(passages)
    counts: list[int] = []
    if isinstance(passages, Resumable):
        counts = _take_up(passages, draft, name)
    while True:
        part = _part_name(len(counts))
        if draft.has(f"{name}/{part}"):  # it says itself how long it is: this try may have another memory
            counts.append(_map_part(folder, len(counts)).num_rows)
            source.drop(counts[-1])
        else:
            block = source.take(part_rows, memory)
            if not block:
                break
            draft.part(f"{name}/{part}", lambda path, block=block: _save_part(path, block))  # type: ignore[misc]
            counts.append(len(block))
            del block  # before the next one is drawn
        if isinstance(passages, Resumable) and not source.is_ahead:
            draft.write_json(f"{name}.marks/{part}.json", {"counts": counts, "mark": passages.mark()})
    if not counts:
        raise DataError("the collection has no passages.")
    is_dense = _ids_are_row_numbers(folder, counts)
    if not is_dense:
        _save_ids(draft, name, counts, memory)
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
        self._tables: Recent[int, pa.RecordBatch] = Recent(_OPEN_PARTS)  # parts that were touched, mapped
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

    def ranges(self, *, rows: int, size: int, within: range | None = None) -> Iterator[range]:
        """The rows in consecutive ranges of at most `rows` passages and `size` bytes of text; one passage at least.

        Text is counted with titles, in UTF-8; no text is read for it. `within`: of these rows only.
        """
        within = range(len(self)) if within is None else within
        start, taken = within.start, 0  # of the range that is open: its first row, and its bytes in earlier parts
        for part, first in enumerate(self._starts[:-1]):
            low, high = max(first, within.start), min(first + self.part_rows[part], within.stop)
            if low >= high:
                continue
            lengths = _text_bytes(_map_part(self.path, part))[low - first : high - first]
            before, base = taken + np.concatenate([[0], np.cumsum(lengths)]), 0
            while True:
                fits = low + int(np.searchsorted(before, base + size, "right")) - 1
                stop = max(min(start + rows, fits), start + 1)
                if stop >= high:
                    break
                yield range(start, stop)
                start, base = stop, int(before[stop - low])
            taken = int(before[-1]) - base
        if start < within.stop:
            yield range(start, within.stop)

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
            self._tables.store({part: _map_part(self.path, part)})
        return self._tables[part]


def _part_name(part: int) -> str:
    return f"part-{part:05d}.arrow"


class _Source:
    """A stream of passages that is drawn a part at a time."""

    def __init__(self, passages: Iterable[Passage]) -> None:
        self._passages = iter(passages)
        self._waiting: list[Passage] = []  # the one that did not fit into the last part

    @property
    def is_ahead(self) -> bool:
        """Whether a passage was drawn that is in no part yet: a mark would leave it out."""
        return bool(self._waiting)

    def drop(self, count: int) -> None:
        for _ in islice(self, count):
            pass

    def take(self, rows: int, memory: int) -> list[Passage]:
        """At most `rows` passages that take at most `memory` bytes while a part is made of them; one at least."""
        block: list[Passage] = []
        taken = 0
        for passage in self:
            taken += _PASSAGE_BYTES + _CHARACTER_BYTES * (len(passage.id) + len(passage.title) + len(passage.text))
            if block and taken > memory:
                self._waiting.append(passage)
                break
            block.append(passage)
            if len(block) == rows:
                break
        return block

    def __iter__(self) -> Iterator[Passage]:
        return self

    def __next__(self) -> Passage:
        return self._waiting.pop() if self._waiting else next(self._passages)


def _text_bytes(batch: pa.RecordBatch) -> np.ndarray:
    """int64 (rows,): UTF-8 bytes of title and text."""
    lengths: np.ndarray = pc.add(pc.binary_length(batch[1]), pc.binary_length(batch[2])).to_numpy(zero_copy_only=False)
    return lengths


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


def _save_ids(draft: Draft, name: str, counts: Sequence[int], memory: int) -> None:
    """Write the hashes of all ids in ascending order, and the rows they belong to.

    The hashes lie on disk; what is sorted at once is a share of the numbers that a hash may be, small enough for
    `memory`. Raises DataError if an id stands twice.
    """
    folder, rows = draft.path / name, max(memory // _ID_BYTES, 1)
    with tempfile.TemporaryDirectory(prefix=".ids", suffix=".tmp", dir=draft.path) as scratch:
        file = Path(scratch) / "hashes.npy"
        save_pieces(file, np.uint64, (_hashes(folder, part) for part in range(len(counts))))
        hashes = np.load(file, mmap_mode="r", allow_pickle=False)
        for share in _sorted_shares(hashes, rows):
            _refuse_duplicates(folder, counts, hashes[share], share)
        sorted_hashes = (hashes[share] for share in _sorted_shares(hashes, rows))
        draft.part(f"{name}/ids.hash.npy", lambda path: save_pieces(path, np.uint64, sorted_hashes))
        draft.part(f"{name}/ids.row.npy", lambda path: save_pieces(path, np.int64, _sorted_shares(hashes, rows)))


def _hashes(folder: Path, part: int) -> np.ndarray:
    """uint64 (rows,): the hash of each id of a part."""
    ids: list[Any] = _map_part(folder, part)[0].to_pylist()
    return np.array([_hash(passage_id) for passage_id in ids], np.uint64)


def _sorted_shares(hashes: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    """int64 (n,): the rows of ascending hashes, and of equal ones ascending; n is about `rows` as hashes are even."""
    shares = -(-len(hashes) // rows)
    for share in range(shares):
        low, high = ((number << 64) // shares for number in (share, share + 1))
        found = []
        for start in range(0, len(hashes), rows):
            block = hashes[start : start + rows]
            found.append(start + np.flatnonzero((block >= np.uint64(low)) & (block <= np.uint64(high - 1))))
        inside = np.concatenate(found)
        yield inside[np.argsort(hashes[inside], kind="stable")]


def _refuse_duplicates(folder: Path, counts: Sequence[int], hashes: np.ndarray, rows: np.ndarray) -> None:
    """Raises DataError if an id stands twice; `hashes` ascend, and `rows` are theirs."""
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
