"""Vector search, exact and FAISS, behind the same two calls: `build_vectors` once, `load_vectors(...).search` later.

Passage vectors come as numbered npy parts (float16 or float32, no pickle), row after row, and are memory-mapped; the
score is the inner product, so cosine needs vectors of unit length. Order: higher score, then lower row. The exact
search keeps to it everywhere; FAISS decides on its own which of several equal scores at the cut it returns.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from odqa.artifacts import Draft
from odqa.errors import ArtifactError, DataError
from odqa.retrieve.rankings import Rankings, check_depth, no_hits, rank_entries
from odqa.runtime import progress

_BLOCK_BYTES = 32 << 20  # scores that are held at once in exact search; the block's vectors are of that order too
_SLACK = 1e-5  # of a query's largest score: well above the rounding of a float32 sum of a thousand products
_PAIRS = 8192  # pairs that are scored at once
_KEPT_BYTES = (
    256 << 20
)  # vectors that are kept in memory as float32; turning float16 into it costs more than the search
_TRAIN_SEED = 20201004  # ours; which vectors a FAISS index is trained on


Metric = Literal["inner-product", "l2", "dpr-hnsw"]
"""Of a FAISS index: dpr-hnsw is L2 over one more dimension, which makes the order that of inner products
(DPR, dpr/indexer/faiss_indexers.py: DenseHNSWFlatIndexer)."""


class VectorParts:
    """The vectors of a collection in files `part-00000.npy` ... of one folder: an (N, D) matrix that is never whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        files = sorted(path.glob("part-*.npy"))
        if not files:
            raise ArtifactError(f"{path}: no vectors here (part-00000.npy is missing). Build the index again.")
        self.parts = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
        widths = {part.shape[1:] for part in self.parts}
        if len(widths) != 1 or len(next(iter(widths))) != 1:
            raise ArtifactError(f"{path}: parts of different shapes {sorted(widths)}. Build the index again.")

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def width(self) -> int:
        return int(self.parts[0].shape[1])

    def row(self, row: int) -> np.ndarray:
        """float32 (D,): one vector. Raises IndexError outside 0 ... len - 1."""
        for part in self.parts:
            if 0 <= row < len(part):
                return np.asarray(part[row], np.float32)
            row -= len(part)
        raise IndexError(row)

    def blocks(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, float32 (n, D) with n <= rows) over the whole matrix."""
        first = 0
        for part in self.parts:
            for start in range(0, len(part), rows):
                block = np.asarray(part[start : start + rows], np.float32)
                yield first + start, block
            first += len(part)

    def sample(self, count: int) -> np.ndarray:
        """float32 (count, D): vectors drawn without replacement, the same ones every time, in row order."""
        rows = np.sort(np.random.default_rng(_TRAIN_SEED).permutation(len(self))[:count])
        ends = np.cumsum([len(part) for part in self.parts])
        drawn = np.empty((len(rows), self.width), np.float32)
        for part, end in zip(self.parts, ends, strict=True):
            in_part = (rows >= end - len(part)) & (rows < end)
            drawn[in_part] = part[rows[in_part] - (end - len(part))]
        return drawn


@dataclass(frozen=True, slots=True)
class VectorSettings:
    """How vectors are searched.

    `faiss`: None searches exactly; otherwise an index-factory string such as "IVF1024,PQ48" or "HNSW32,SQ8" (metric:
    inner product). `search`: knobs for FAISS's ParameterSpace, e.g. {"nprobe": 32} or {"quantizer_efSearch": 64}.
    `train_rows`: the most vectors that a FAISS index is trained on. `keep`: whether the vectors stay in the artifact
    when FAISS has its own copy; the exact search always keeps them.
    """

    faiss: str | None = None
    search: Mapping[str, float] = field(default_factory=dict)
    train_rows: int = 200_000
    keep: bool = False

    @property
    def keeps_vectors(self) -> bool:
        return self.keep or self.faiss is None


class VectorSearcher(Protocol):
    """Ranks the rows of a collection by inner product with query vectors."""

    def search(self, vectors: np.ndarray, k: int) -> Rankings:
        """At most k rows a vector of (Q, D). Raises ValueError for k < 1, DataError for a wrong width or NaN."""
        ...

    def take(self, rows: np.ndarray) -> np.ndarray:
        """float32 (n, D): the vectors of rows, as they are searched (perhaps quantised).

        Raises DataError for a FAISS index that cannot give its vectors back.
        """
        ...


def build_vectors(vectors: Path, settings: VectorSettings, draft: Draft, name: str = "search") -> None:
    """Make the vectors in the folder `vectors` searchable: the folder `name` of `draft`.

    Raises DataError for vectors that are not finite and for what FAISS says about its factory string.
    """
    parts = VectorParts(vectors)
    if settings.faiss is not None:
        draft.part(f"{name}/index.faiss", lambda path: _save_faiss(parts, settings, path))
    else:
        for first, block in parts.blocks(8192):
            _check_finite(block, f"{vectors}: rows {first} to {first + len(block) - 1}")
    meta = {"rows": len(parts), "width": parts.width, "faiss": settings.faiss, "search": dict(settings.search)}
    draft.write_json(f"{name}/search.json", meta)


def load_vectors(
    path: Path, vectors: Path, *, search: Mapping[str, float] | None = None
) -> "ExactVectors | FaissVectors":
    """Open what `build_vectors` made in `path` over the parts in `vectors`; `search` replaces stored FAISS knobs."""
    try:
        meta = json.loads((path / "search.json").read_text(encoding="utf-8"))
        faiss, knobs = meta["faiss"], meta["search"]
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path}: no vector index here ({error}). Build the index again.") from error
    if faiss is None:
        return ExactVectors(VectorParts(vectors))
    rows = path / "rows.npy"  # of an index made elsewhere
    return FaissVectors(
        path / "index.faiss",
        search=knobs if search is None else search,
        metric=meta.get("metric", "inner-product"),
        rows=np.load(rows, mmap_mode="r", allow_pickle=False) if rows.is_file() else None,
        count=meta["rows"],
    )


class ExactVectors:
    """Every inner product, block by block: the memory needed is that of one block, whatever the collection's size.

    A collection of at most 256 MiB in float32 is one block, kept from the first search on.
    """

    source = "dense"

    def __init__(self, parts: VectorParts) -> None:
        self.parts = parts
        self._is_small = 4 * len(parts) * parts.width <= _KEPT_BYTES

    @cached_property
    def _whole(self) -> np.ndarray:
        return np.concatenate(self.parts.parts).astype(np.float32)

    def _blocks(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, float32 (n, D) with n <= rows) over the collection."""
        if not self._is_small:
            return self.parts.blocks(rows)
        return ((start, self._whole[start : start + rows]) for start in range(0, len(self._whole), rows))

    def search(self, vectors: np.ndarray, k: int) -> Rankings:
        """At most k rows a vector of (Q, D). Raises ValueError for k < 1, DataError for a wrong width or NaN."""
        vectors = _checked(vectors, self.parts.width)
        best = no_hits(len(vectors), min(k, len(self.parts)) if k >= 1 else k, self.source)
        block_rows = max(best.depth, 1024, _BLOCK_BYTES // (4 * max(len(vectors), 1)))
        for first, block in self._blocks(min(block_rows, 65_536)):
            _merge(best, first, block, vectors)
        return best

    def take(self, rows: np.ndarray) -> np.ndarray:
        """float32 (n, D): the vectors of rows. See `VectorSearcher.take`."""
        return self._whole[rows] if self._is_small else np.stack([self.parts.row(row) for row in rows.tolist()])


def read_faiss(path: Path, metric: Metric) -> Any:
    """A FAISS index made elsewhere. Raises DataError for a file that is none, or one of another metric."""
    import faiss

    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise DataError(f"{path}: FAISS cannot read it ({_last_line(error)}).") from error
    names = {faiss.METRIC_INNER_PRODUCT: "inner-product", faiss.METRIC_L2: "l2"}
    found = names.get(index.metric_type, f"number {index.metric_type}")
    if found != {"dpr-hnsw": "l2"}.get(metric, metric):
        raise DataError(f"{path}: this index has the metric {found}; the sidecar says {metric}.")
    return index


class FaissVectors:
    """A FAISS index in memory. Hits whose scores are equal are put in row order.

    `rows` int64 (N,) is the passage row of each FAISS row (None: the same); `count` bounds what FAISS may answer. The
    score of an L2 index is minus the squared distance.
    """

    source = "dense"

    def __init__(
        self,
        path: Path,
        *,
        search: Mapping[str, float],
        metric: Metric = "inner-product",
        rows: np.ndarray | None = None,
        count: int | None = None,
    ) -> None:
        import faiss

        self._metric, self._rows, self._count = metric, rows, count
        try:
            self._index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise ArtifactError(f"{path}: FAISS cannot read it ({_last_line(error)}). Build it again.") from error
        space = faiss.ParameterSpace()
        for knob, value in search.items():
            try:
                space.set_index_parameter(self._index, knob, value)
            except RuntimeError as error:
                raise DataError(
                    f"FAISS does not know the search setting {knob!r} for this {type(self._index).__name__}"
                    f" ({_last_line(error)})."
                ) from error

    def search(self, vectors: np.ndarray, k: int) -> Rankings:
        """At most k rows a vector of (Q, D). Raises ValueError for k < 1, DataError for a wrong width or NaN."""
        vectors = _checked(vectors, self._index.d - (self._metric == "dpr-hnsw"))
        check_depth(k)
        k = min(k, self._index.ntotal)
        if self._metric == "dpr-hnsw":
            vectors = np.hstack([vectors, np.zeros((len(vectors), 1), np.float32)])
        scores, rows = self._index.search(vectors, k)
        queries = np.broadcast_to(np.arange(len(rows))[:, None], rows.shape)
        is_hit = rows >= 0
        hits = rows[is_hit]
        if self._count is not None and len(hits) and hits.max() >= self._count:
            raise ArtifactError(
                f"FAISS answers with row {hits.max()} of {self._count}: its ids are not rows. Rebuild it."
            )
        if self._rows is not None:
            hits = np.asarray(self._rows)[hits]
        found = scores[is_hit] if self._metric == "inner-product" else -scores[is_hit]
        return rank_entries(queries[is_hit], hits, found, count=len(rows), k=k, source=self.source)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """float32 (n, D): the vectors of rows. See `VectorSearcher.take`."""
        import faiss

        wanted = np.ascontiguousarray(rows if self._rows is None else self._faiss_rows[rows], np.int64)
        try:
            lists = faiss.try_extract_index_ivf(self._index)
            if lists is not None:
                lists.make_direct_map()
            vectors: np.ndarray = self._index.reconstruct_batch(wanted)
        except RuntimeError as error:
            raise DataError(
                f"a FAISS index of this type does not give its vectors back ({_last_line(error)}). Use an index "
                "without faiss, or with faiss: Flat."
            ) from error
        return vectors[:, :-1] if self._metric == "dpr-hnsw" else vectors

    @cached_property
    def _faiss_rows(self) -> np.ndarray:
        """int64: the FAISS row of each passage row, where `rows` says the opposite."""
        assert self._rows is not None
        inverse = np.empty(len(self._rows), np.int64)
        inverse[np.asarray(self._rows)] = np.arange(len(self._rows))
        return inverse


def _merge(best: Rankings, first: int, block: np.ndarray, vectors: np.ndarray) -> None:
    """Put into `best` what a later block has to offer: float32 (n, D), the passage vectors of the rows from `first` on.

    The matrix product is fast, but its last bits depend on its shape, so that equal passages would not tie and a query
    would depend on its batch. It only chooses candidates, with some slack; these are scored one by one.
    """
    k, n = best.depth, len(block)
    scores = vectors @ block.T  # (Q, n)
    bar = best.scores[:, -1:]
    if k < n and np.isneginf(bar).any():  # for lists that are not full yet: the block's own k-th best
        bar = np.maximum(bar, np.partition(scores, n - k, axis=1)[:, n - k : n - k + 1])
    enters = scores >= bar - _SLACK * np.abs(scores).max(axis=1, keepdims=True)
    changed = np.flatnonzero(enters.any(axis=1))  # after many blocks: few
    queries, columns = np.nonzero(enters[changed])
    old_queries, places = np.nonzero(best.rows[changed] >= 0)
    merged = rank_entries(
        np.concatenate([old_queries, queries]),
        np.concatenate([best.rows[changed[old_queries], places], first + columns]),
        np.concatenate([best.scores[changed[old_queries], places], _inner(vectors[changed], block, queries, columns)]),
        count=len(changed),
        k=k,
        source=best.source,
    )
    best.rows[changed], best.scores[changed] = merged.rows, merged.scores


def _inner(vectors: np.ndarray, block: np.ndarray, queries: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """float32 (N,): the inner products of N pairs, each summed in the same order whatever stands around it."""
    products = np.empty(len(queries), np.float32)
    for start in range(0, len(queries), _PAIRS):
        part = slice(start, start + _PAIRS)
        products[part] = (vectors[queries[part]] * block[columns[part]]).sum(axis=1, dtype=np.float64)
    return products


def _save_faiss(parts: VectorParts, settings: VectorSettings, path: Path) -> None:
    """Train on a sample, add all parts, write. One file, the same bytes each time."""
    import faiss

    factory = str(settings.faiss)
    try:
        index = faiss.index_factory(parts.width, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = f"vectors of width {parts.width} ({_last_line(error)})"
        raise DataError(f"FAISS cannot make {factory!r} for {reason}.") from error
    _skip_polysemous_training(index, settings)
    with _faiss_threads(1 if "HNSW" in factory else None):  # HNSW's graph depends on the order of insertion
        if not index.is_trained:
            try:
                index.train(parts.sample(settings.train_rows))
            except RuntimeError as error:
                reason = f"{min(len(parts), settings.train_rows)} vectors ({_last_line(error)})"
                raise DataError(f"FAISS cannot train {factory!r} on {reason}.") from error
        with progress("faiss", len(parts), "vectors") as bar:
            for first, block in parts.blocks(65_536):
                _check_finite(block, f"{parts.path}: rows {first} to {first + len(block) - 1}")
                index.add(block)
                bar.advance(len(block))
    faiss.write_index(index, str(path))


def _skip_polysemous_training(index: Any, settings: VectorSettings) -> None:
    """Leave out the renumbering of PQ codes (for PQ48, 48 times two seconds) that only a search by `ht` uses."""
    import faiss

    if "ht" in settings.search:
        return
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    if hasattr(inner, "do_polysemous_training"):
        inner.do_polysemous_training = False


@contextmanager
def _faiss_threads(count: int | None) -> Iterator[None]:
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count or before)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _checked(vectors: np.ndarray, width: int) -> np.ndarray:
    vectors = np.ascontiguousarray(vectors, np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise DataError(f"query vectors have the shape {vectors.shape}; this index needs (queries, {width}).")
    _check_finite(vectors, "query vectors")
    return vectors


def _check_finite(vectors: np.ndarray, where: str) -> None:
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise DataError(f"{where}: vector {row} of them holds NaN or infinity. Does the encoder work in this dtype?")


def _last_line(error: Any) -> str:
    """FAISS reports file, line and condition of its C++ before what matters."""
    return str(error).strip().splitlines()[-1].split("failed: ")[-1].strip()
