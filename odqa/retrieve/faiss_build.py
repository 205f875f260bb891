"""FAISS indexes built within bounded memory: trained on a sample, filled in shards, merged on disk.

An inverted-file index (IVF) of any size is built so: the lists of the shards are written one behind the other into the
file that FAISS would have written had it held everything (its last section; tested byte by byte). Indexes of other
types (HNSW, flat codes) are one structure that FAISS holds whole: what they will need is computed before a build
starts, and more than there may be is an error.
"""

import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from odqa.artifacts import Draft
from odqa.errors import DataError
from odqa.retrieve.parts import VectorParts
from odqa.runtime import progress

_BLOCK_ROWS = 8192  # vectors that are added at once: a part as an encoder leaves it, 25 MB at 768 dimensions
_GROWTH = 2  # FAISS's arrays double when they are full, and are copied: measured 1.1 to 2.0 times their content
_TRAINING = 1.3  # ours: of the sample, which k-means holds with what it computes for it
_ID_BYTES = 8  # of each vector in an inverted list


@dataclass(frozen=True, slots=True)
class BuildMemory:
    """What FAISS needs to build an index, in bytes: `training` first, then `vector` for each vector that it holds.

    `in_shards`: the vectors need not be held together.
    """

    training: int
    vector: float
    in_shards: bool

    def whole(self, rows: int) -> int:
        """Bytes to hold `rows` vectors while they are added."""
        return int(rows * self.vector * _GROWTH)


def build_memory(factory: str, width: int, *, train_rows: int) -> BuildMemory:
    """What an index-factory string needs for vectors of a width. Raises DataError if FAISS cannot make it."""
    import faiss

    index = make_index(factory, width)
    is_changed = isinstance(faiss.downcast_index(index), faiss.IndexPreTransform)  # training keeps a second sample
    training = 0 if index.is_trained else int(train_rows * 4 * width * (is_changed + _TRAINING))
    lists: Any = faiss.try_extract_index_ivf(index)
    if lists is not None:
        has_plain_lists = isinstance(faiss.downcast_InvertedLists(lists.invlists), faiss.ArrayInvertedLists)
        return BuildMemory(training, lists.code_size + _ID_BYTES, has_plain_lists)
    inner: Any = faiss.downcast_index(index)
    if is_changed:
        inner = faiss.downcast_index(inner.index)
    if hasattr(inner, "hnsw"):
        links = inner.hnsw.nb_neighbors(0)  # 2 M on the ground floor; one vector in M stands on the next, with M
        beside = 4 * (links + 2) + 20  # links, a level, an offset and a lock
        return BuildMemory(training, _code_bytes(faiss.downcast_index(inner.storage), width) + beside, False)
    return BuildMemory(training, _code_bytes(inner, width), False)


def check_build(factory: str, width: int, *, rows: int, train_rows: int, memory: int) -> None:
    """Raises DataError in one line if FAISS would need more than `memory` bytes to build an index of `rows` vectors."""
    needs = build_memory(factory, width, train_rows=min(train_rows, rows))
    if needs.training > memory:
        fits = int(min(train_rows, rows) * memory / needs.training)
        raise DataError(
            f"training {factory!r} on {min(train_rows, rows):,} vectors of width {width} needs about "
            f"{_gigabytes(needs.training)} and this build may hold {_gigabytes(memory)} (three quarters of "
            f"memory_budget). Set train_rows: {fits} or memory_budget: {_budget(needs.training)}."
        )
    if not needs.in_shards and needs.whole(rows) > memory:
        raise DataError(
            f"{factory!r} is built in one piece: {rows:,} vectors of width {width} need up to "
            f"{_gigabytes(needs.whole(rows))} and this build may hold {_gigabytes(memory)} (three quarters of "
            f"memory_budget). Take an IVF index, which is built in shards, or set memory_budget: "
            f"{_budget(needs.whole(rows))}."
        )


def make_index(factory: str, width: int) -> Any:
    """An empty index with the metric inner product. Raises DataError for what FAISS says about its factory string."""
    import faiss

    try:
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise DataError(f"FAISS cannot make {factory!r} for vectors of width {width} ({last_line(error)}).") from error
    return index


def build_faiss(
    parts: VectorParts,
    factory: str,
    draft: Draft,
    name: str,
    *,
    train_rows: int,
    memory: int,
    renumber_codes: bool = False,
) -> None:
    """Train on a sample, add all parts, write the file `name`; the same bytes each time, whatever the memory.

    Shards lie in `NAME.shards`; declare that name as scratch of the artifact. `renumber_codes`: train polysemous codes
    (for PQ48, 48 times two seconds), which only a search by `ht` uses. Raises DataError as `check_build` does, for
    vectors that are not finite, and for what FAISS says.
    """
    if draft.has(name):
        return
    rows = len(parts)
    check_build(factory, parts.width, rows=rows, train_rows=train_rows, memory=memory)
    needs = build_memory(factory, parts.width, train_rows=min(train_rows, rows))
    work = f"{name}.shards"
    trained = draft.part(f"{work}/trained", lambda path: _train(parts, factory, train_rows, renumber_codes, path))
    threads = 1 if "HNSW" in factory else None  # HNSW's graph depends on the order of insertion
    shards = [range(rows)]
    if needs.in_shards and needs.whole(rows) > memory:
        shards = list(_shards(parts, int(memory / (needs.vector * _GROWTH))))
    with progress("faiss", rows, "vectors") as bar, _faiss_threads(threads):
        if len(shards) == 1:
            draft.part(name, lambda path: _fill(parts, trained, shards[0], path))
            bar.advance(rows)
            return
        files = []
        for shard in shards:
            file = f"{work}/{shard.start:010d}-{shard.stop:010d}"
            files.append(draft.part(file, lambda path, shard=shard: _fill(parts, trained, shard, path)))  # type: ignore[misc]
            bar.advance(len(shard))
    draft.part(name, lambda path: _merge(trained, files, rows, path))


def _train(parts: VectorParts, factory: str, train_rows: int, renumber_codes: bool, path: Path) -> None:
    """Write the index, trained and empty."""
    import faiss

    index = make_index(factory, parts.width)
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    if hasattr(inner, "do_polysemous_training"):
        inner.do_polysemous_training = renumber_codes
    if not index.is_trained:
        sample = parts.sample(train_rows)
        check_finite(sample, f"{parts.path}: of the {len(sample)} to train on")
        try:
            index.train(sample)
        except RuntimeError as error:
            raise DataError(f"FAISS cannot train {factory!r} on {len(sample)} vectors ({last_line(error)}).") from error
    faiss.write_index(index, str(path))


def _shards(parts: VectorParts, rows: int) -> Iterator[range]:
    """Cut the rows where blocks of vectors end, into shards of at most `rows`, one block at least.

    The codes of a vector may depend, in their last bits, on the block that it was added with.
    """
    start = end = 0
    for number in range(parts.count):
        for first in range(parts.starts[number], parts.starts[number + 1], _BLOCK_ROWS):
            stop = min(first + _BLOCK_ROWS, int(parts.starts[number + 1]))
            if stop - start > rows and end > start:
                yield range(start, end)
                start = end
            end = stop
    yield range(start, end)


def _fill(parts: VectorParts, trained: Path, rows: range, path: Path) -> None:
    """Add some rows to the trained index and write it. A vector's id is its row."""
    import faiss

    index = faiss.read_index(str(trained))
    is_all = rows == range(len(parts))
    for first, block in parts.blocks(_BLOCK_ROWS, within=rows):
        check_finite(block, f"{parts.path}: rows {first} to {first + len(block) - 1}")
        if is_all:
            index.add(block)
        else:
            index.add_with_ids(block, np.arange(first, first + len(block)))
    faiss.write_index(index, str(path))


def _merge(trained: Path, shards: Sequence[Path], rows: int, path: Path) -> None:
    """Write the index that holds the lists of all shards, a list at a time.

    The lists are the last section of the file of every IVF index (faiss/impl/index_write.cpp, write_InvertedLists):
    "ilar", the number of lists and the bytes of a code, then for lists most of which are empty "sprs" with pairs of
    number and size, for others "full" with sizes, and at last the codes and ids of each list.
    """
    import faiss

    empty = faiss.read_index(str(trained))
    empty.ntotal = rows
    lists = faiss.extract_index_ivf(empty)
    lists.ntotal = rows
    count, code_size = int(lists.nlist), int(lists.code_size)
    head = faiss.serialize_index(empty).tobytes()
    section = b"ilar" + struct.pack("<QQ", count, code_size)
    tail = section + b"sprs" + struct.pack("<Q", 0)
    if not head.endswith(tail):
        raise DataError(f"{path.name}: this version of FAISS ({faiss.__version__}) keeps its lists in another way.")
    filled = [_Lists(shard) for shard in shards]
    sizes = sum((shard.sizes for shard in filled), np.zeros(count, np.int64))
    with path.open("wb") as file:
        file.write(head[: -len(tail)] + section)
        used = np.flatnonzero(sizes)
        if len(used) > count // 2:
            file.write(b"full" + struct.pack("<Q", count))
            sizes.astype(np.uint64).tofile(file)
        else:
            file.write(b"sprs" + struct.pack("<Q", 2 * len(used)))
            np.stack([used, sizes[used]], axis=1).astype(np.uint64).tofile(file)
        for number in used.tolist():
            for shard in filled:
                file.write(shard.codes(number))
            for shard in filled:
                file.write(shard.ids(number))


class _Lists:
    """The inverted lists of a shard's file, memory-mapped."""

    def __init__(self, path: Path) -> None:
        import faiss

        self._index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        lists: Any = faiss.extract_index_ivf(self._index).invlists
        self._lists = lists
        self.sizes = np.array([lists.list_size(number) for number in range(lists.nlist)], np.int64)

    def codes(self, number: int) -> bytes:
        return self._bytes(self._lists.get_codes(number), int(self.sizes[number]) * int(self._lists.code_size))

    def ids(self, number: int) -> bytes:
        return self._bytes(self._lists.get_ids(number), int(self.sizes[number]))

    def _bytes(self, pointer: Any, count: int) -> bytes:
        import faiss

        array: np.ndarray = faiss.rev_swig_ptr(pointer, count)
        return array.tobytes() if count else b""


def _code_bytes(index: Any, width: int) -> float:
    """Bytes of a vector in an index that is one array; of a type that does not say, those of a float32 vector."""
    try:
        return float(index.sa_code_size())
    except RuntimeError:
        return 4.0 * width


@contextmanager
def _faiss_threads(count: int | None) -> Iterator[None]:
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count or before)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def check_finite(vectors: np.ndarray, where: str) -> None:
    """Raises DataError that begins with `where` for NaN and infinity."""
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise DataError(f"{where}: vector {row} of them holds NaN or infinity. Does the encoder work in this dtype?")


def last_line(error: Any) -> str:
    """FAISS reports file, line and condition of its C++ before what matters."""
    return str(error).strip().splitlines()[-1].split("failed: ")[-1].strip()


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _budget(size: float) -> str:
    """A memory budget of which three quarters are at least `size`."""
    return f"{math.ceil(size / 0.75 / 1e9)} GB"
