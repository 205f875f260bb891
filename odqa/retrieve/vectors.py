"""Vector search, exact and FAISS, behind the same two calls: `build_vectors` once, `load_vectors(...).search` later.

Passage vectors come as numbered npy parts (float16 or float32, no pickle), row after row, and are memory-mapped; the
score is the inner product, so cosine needs vectors of unit length. Order: higher score, then lower row. The exact
search keeps to it everywhere, on a processor and on another device of torch; FAISS decides on its own which of several
equal scores at the cut it returns. A FAISS index may be refined: what it finds is scored again with better vectors,
which stay on disk.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from odqa.artifacts import Draft
from odqa.corpus.arrays import save_pieces
from odqa.corpus.store import MEMORY
from odqa.errors import ArtifactError, ArtifactMismatch, DataError
from odqa.retrieve.faiss_build import build_faiss, check_finite, last_line
from odqa.retrieve.parts import VectorParts
from odqa.retrieve.rankings import Rankings, check_depth, no_hits, rank_entries
from odqa.runtime import choose_device

if TYPE_CHECKING:
    import torch

_BLOCK_BYTES = 32 << 20  # scores that are held at once in exact search; the block's vectors are of that order too
_SLACK = 1e-5  # of a query's largest score: well above the rounding of a float32 sum of a thousand products
_PAIRS = 8192  # pairs that are scored at once
_DEVICE_BYTES = 512 << 20  # ours: the same on another device
# Vectors that are kept in memory as float32; turning float16 into it costs more than the search.
_KEPT_BYTES = 256 << 20

Refine = Literal["vectors", "int8"]
Metric = Literal["inner-product", "l2", "dpr-hnsw"]
"""Of a FAISS index: dpr-hnsw is L2 over one more dimension, which makes the order that of inner products
(DPR, dpr/indexer/faiss_indexers.py: DenseHNSWFlatIndexer)."""


@dataclass(frozen=True, slots=True)
class VectorSettings:
    """How vectors are searched.

    `faiss`: None searches exactly; otherwise an index-factory string such as "IVF1024,PQ48" or "HNSW32,SQ8" (metric:
    inner product). `search`: knobs for FAISS's ParameterSpace, e.g. {"nprobe": 32} or {"quantizer_efSearch": 64}.
    `train_rows`: the most vectors that a FAISS index is trained on. `keep`: whether the vectors stay in the artifact
    when FAISS has its own copy; the exact search always keeps them. `refine`: score what FAISS finds again, with the
    stored "vectors" or with codes of a byte a dimension ("int8"); `refine_factor` candidates for each hit asked for.
    """

    faiss: str | None = None
    search: Mapping[str, float] = field(default_factory=dict)
    train_rows: int = 200_000
    keep: bool = False
    refine: Refine | None = None
    refine_factor: int = 4

    def __post_init__(self) -> None:
        if self.refine is not None and self.faiss is None:
            raise DataError("vectors: refine is for a FAISS index; the exact search has nothing to refine. Remove it.")
        if self.refine_factor < 1:
            raise DataError(f"vectors: refine_factor is {self.refine_factor}; a hit needs 1 candidate at least.")

    @property
    def keeps_vectors(self) -> bool:
        return self.keep or self.faiss is None or self.refine == "vectors"


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


def build_vectors(
    vectors: Path, settings: VectorSettings, draft: Draft, name: str = "search", *, memory: int = MEMORY
) -> None:
    """Make the vectors in the folder `vectors` searchable, within `memory` bytes: the folder `name` of `draft`.

    Working files lie in `NAME/index.faiss.shards`; declare that name as scratch of the artifact. Raises DataError for
    vectors that are not finite, for what FAISS says about its factory string, and for an index type that needs more.
    """
    parts = VectorParts(vectors)
    meta = {"rows": len(parts), "width": parts.width, "faiss": settings.faiss, "search": dict(settings.search)}
    if settings.faiss is None:
        for first, block in parts.blocks(8192):
            check_finite(block, f"{vectors}: rows {first} to {first + len(block) - 1}")
    else:
        build_faiss(
            parts,
            settings.faiss,
            draft,
            f"{name}/index.faiss",
            train_rows=settings.train_rows,
            memory=memory,
            renumber_codes="ht" in settings.search,
        )
    if settings.refine is not None:
        meta |= {"refine": settings.refine, "refine_factor": settings.refine_factor}
    if settings.refine == "int8":
        draft.part(f"{name}/int8", lambda path: _save_int8(parts, path))
    draft.write_json(f"{name}/search.json", meta)


def load_vectors(
    path: Path,
    vectors: Path,
    *,
    search: Mapping[str, float] | None = None,
    passages: int | None = None,
    device: str = "cpu",
) -> "VectorSearcher":
    """Open what `build_vectors` made in `path` over the parts in `vectors`; `search` replaces stored FAISS knobs.

    `passages`: how many there are; ArtifactMismatch if there is not one vector for each. `device`: where to search, a
    processor or a CUDA device (for a FAISS index with a build of FAISS that has it; DataError without).
    """
    try:
        meta = json.loads((path / "search.json").read_text(encoding="utf-8"))
        factory, knobs, rows = meta["faiss"], meta["search"], meta["rows"]
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path}: no vector index here ({error}). Build the index again.") from error
    if passages is not None and rows != passages:
        raise ArtifactMismatch(f"{path}: {rows:,} vectors for {passages:,} passages. Build the index again.")
    if factory is None:
        parts = VectorParts(vectors)
        _check_complete(parts, meta)
        return ExactVectors(parts) if device == "cpu" else DeviceVectors(parts, device)
    file = path / "rows.npy"  # of an index made elsewhere
    found = FaissVectors(
        path / "index.faiss",
        search=knobs if search is None else search,
        metric=meta.get("metric", "inner-product"),
        rows=np.load(file, mmap_mode="r", allow_pickle=False) if file.is_file() else None,
        count=rows,
        device=device,
    )
    if "refine" not in meta:
        return found
    better = Int8Vectors(path / "int8") if meta["refine"] == "int8" else VectorParts(vectors)
    _check_complete(better, meta)
    return RefinedVectors(found, better, meta["refine_factor"])


def _check_complete(parts: "VectorParts | Int8Vectors", meta: Mapping[str, Any]) -> None:
    if (len(parts), parts.width) != (meta["rows"], meta["width"]):
        raise ArtifactError(
            f"{parts.path}: {len(parts):,} vectors of width {parts.width}; the index was made with {meta['rows']:,} of "
            f"width {meta['width']}. Build the index again."
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
        return np.concatenate([block for _, block in self.parts.blocks(len(self.parts))])

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
            queries, columns = _candidates(best, block, vectors)
            scores = _inner(vectors, block.__getitem__, queries, columns)
            _merge(best, queries, first + columns, scores)
        return best

    def take(self, rows: np.ndarray) -> np.ndarray:
        """float32 (n, D): the vectors of rows. See `VectorSearcher.take`."""
        return self._whole[rows] if self._is_small else self.parts.rows(rows)


class DeviceVectors:
    """The exact search on a device of torch: matrix products there; candidates are scored as `ExactVectors` does it.

    The rankings are the same, bit by bit. The vectors stay on the device, in the number format of their files, if they
    take at most `keep_bytes` (None: four fifths of a CUDA device's free memory); else they are sent there, block by
    block, for every batch of queries.
    """

    source = "dense"

    def __init__(self, parts: VectorParts, device: str, *, keep_bytes: int | None = None) -> None:
        self.parts = parts
        self.device = choose_device(device)
        self._keep_bytes = keep_bytes

    def search(self, vectors: np.ndarray, k: int) -> Rankings:
        """At most k rows a vector of (Q, D). Raises ValueError for k < 1, DataError for a wrong width or NaN."""
        import torch

        vectors = _checked(vectors, self.parts.width)
        best = no_hits(len(vectors), min(k, len(self.parts)) if k >= 1 else k, self.source)
        if not len(vectors):
            return best
        on_device = torch.from_numpy(vectors).to(self.device)
        rows = max(best.depth, 1024, _DEVICE_BYTES // (4 * len(vectors)))
        for first, part in self._parts():
            for start in range(0, len(part), rows):
                block = part[start : start + rows].to(self.device).float()  # (n, D)
                queries, columns = _device_candidates(best, block, on_device)

                def take(wanted: np.ndarray, block: "torch.Tensor" = block) -> np.ndarray:
                    found: np.ndarray = block[torch.from_numpy(wanted).to(self.device)].cpu().numpy()
                    return found

                scores = _inner(vectors, take, queries, columns)
                _merge(best, queries, first + start + columns, scores)
        return best

    def take(self, rows: np.ndarray) -> np.ndarray:
        """float32 (n, D): the vectors of rows. See `VectorSearcher.take`."""
        return self.parts.rows(rows)

    def _parts(self) -> "Iterator[tuple[int, torch.Tensor]]":
        """(first row, (n, D) in the files' format) over the collection, kept on the device or not."""
        if self._is_kept:
            yield from self._kept
            return
        for number, first in enumerate(self.parts.starts[:-1].tolist()):
            yield first, _tensor(self.parts.part(number))

    @cached_property
    def _is_kept(self) -> bool:
        import torch

        limit = self._keep_bytes
        if limit is None:
            limit = int(0.8 * torch.cuda.mem_get_info(self.device)[0]) if self.device.type == "cuda" else 0
        return len(self.parts) * self.parts.width * self.parts.part(0).itemsize <= limit

    @cached_property
    def _kept(self) -> "list[tuple[int, torch.Tensor]]":
        """One tensor: a search over many small parts would wait for the device's queue."""
        import torch

        first = _tensor(self.parts.part(0))
        whole = torch.empty((len(self.parts), self.parts.width), dtype=first.dtype, device=self.device)
        for number, start in enumerate(self.parts.starts[:-1].tolist()):
            part = _tensor(self.parts.part(number))
            whole[start : start + len(part)] = part.to(self.device)
        return [(0, whole)]


def read_faiss(path: Path, metric: Metric) -> Any:
    """A FAISS index made elsewhere. Raises DataError for a file that is none, or one of another metric."""
    import faiss

    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise DataError(f"{path}: FAISS cannot read it ({last_line(error)}).") from error
    names = {faiss.METRIC_INNER_PRODUCT: "inner-product", faiss.METRIC_L2: "l2"}
    found = names.get(index.metric_type, f"number {index.metric_type}")
    if found != {"dpr-hnsw": "l2"}.get(metric, metric):
        raise DataError(f"{path}: this index has the metric {found}; the sidecar says {metric}.")
    return index


class FaissVectors:
    """A FAISS index, memory-mapped: opening takes no longer for a larger one. Hits of equal scores are in row order.

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
        device: str = "cpu",
    ) -> None:
        import faiss

        self._metric, self._rows, self._count = metric, rows, count
        try:
            self._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise ArtifactError(f"{path}: FAISS cannot read it ({last_line(error)}). Build it again.") from error
        if count is not None and self._index.ntotal != count:
            raise ArtifactError(f"{path}: {self._index.ntotal:,} vectors instead of {count:,}. Build it again.")
        space = faiss.ParameterSpace()
        for knob, value in search.items():
            try:
                space.set_index_parameter(self._index, knob, value)
            except RuntimeError as error:
                raise DataError(
                    f"FAISS does not know the search setting {knob!r} for this {type(self._index).__name__}"
                    f" ({last_line(error)})."
                ) from error
        if device != "cpu":
            self._index = _to_gpu(self._index, device)

    @property
    def width(self) -> int:
        return int(self._index.d) - (self._metric == "dpr-hnsw")

    def search(self, vectors: np.ndarray, k: int) -> Rankings:
        """At most k rows a vector of (Q, D). Raises ValueError for k < 1, DataError for a wrong width or NaN."""
        vectors = _checked(vectors, self.width)
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
                f"a FAISS index of this type does not give its vectors back ({last_line(error)}). Use an index "
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


class Int8Vectors:
    """Vectors in a byte a dimension, memory-mapped: codes.npy int8 (N, D) times scales.npy float32 (N,)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._codes = np.load(path / "codes.npy", mmap_mode="r", allow_pickle=False)
            self._scales = np.load(path / "scales.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path}: no vectors here ({error}). Build the index again.") from error

    def __len__(self) -> int:
        return len(self._scales)

    @property
    def width(self) -> int:
        return int(self._codes.shape[1])

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """float32 (n, D): the vectors of n rows, in that order."""
        found: np.ndarray = self._codes[rows] * self._scales[rows][:, None]
        return found


class RefinedVectors:
    """What FAISS finds, scored again with better vectors: of factor * k candidates the k best."""

    source = "dense"

    def __init__(self, found: FaissVectors, better: "VectorParts | Int8Vectors", factor: int) -> None:
        self._found, self._better, self._factor = found, better, factor

    def search(self, vectors: np.ndarray, k: int) -> Rankings:
        """At most k rows a vector of (Q, D). Raises ValueError for k < 1, DataError for a wrong width or NaN."""
        check_depth(k)
        candidates = self._found.search(vectors, k * self._factor).rows
        queries, places = np.nonzero(candidates >= 0)
        rows = candidates[queries, places]
        scores = _inner(np.ascontiguousarray(vectors, np.float32), self._better.rows, queries, rows)
        return rank_entries(queries, rows, scores, count=len(vectors), k=min(k, len(self._better)), source=self.source)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """float32 (n, D): the better vectors of rows. See `VectorSearcher.take`."""
        return self._better.rows(rows)


def _candidates(best: Rankings, block: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(query, column) of all that may enter `best` from a block, float32 (n, D).

    The matrix product is fast, but its last bits depend on its shape, so that equal passages would not tie and a query
    would depend on its batch. It only chooses candidates, with some slack; these are scored one by one.
    """
    k, n = best.depth, len(block)
    scores = vectors @ block.T  # (Q, n)
    bar = best.scores[:, -1:]
    if k < n and np.isneginf(bar).any():  # for lists that are not full yet: the block's own k-th best
        bar = np.maximum(bar, np.partition(scores, n - k, axis=1)[:, n - k : n - k + 1])
    enters = scores >= bar - _SLACK * np.abs(scores).max(axis=1, keepdims=True)
    queries, columns = np.nonzero(enters)
    return queries, columns


def _device_candidates(best: Rankings, block: "torch.Tensor", vectors: "torch.Tensor") -> tuple[np.ndarray, np.ndarray]:
    """`_candidates` on a device: tensors (n, D) and (Q, D) there, numbers here."""
    import torch

    k, n = best.depth, len(block)
    scores = vectors @ block.T  # (Q, n)
    bar = torch.from_numpy(best.scores[:, -1:].copy()).to(scores.device)
    if k < n and bool(torch.isneginf(bar).any()):
        bar = torch.maximum(bar, scores.topk(k, dim=1).values[:, -1:])
    enters = scores >= bar - _SLACK * scores.abs().amax(dim=1, keepdim=True)
    queries, columns = torch.nonzero(enters, as_tuple=True)
    return queries.cpu().numpy(), columns.cpu().numpy()


def _merge(best: Rankings, queries: np.ndarray, rows: np.ndarray, scores: np.ndarray) -> None:
    """Put scored entries (query, row) into `best`."""
    changed, places_of = np.unique(queries, return_inverse=True)  # after many blocks: few
    old_queries, places = np.nonzero(best.rows[changed] >= 0)
    merged = rank_entries(
        np.concatenate([old_queries, places_of]),
        np.concatenate([best.rows[changed[old_queries], places], rows]),
        np.concatenate([best.scores[changed[old_queries], places], scores]),
        count=len(changed),
        k=best.depth,
        source=best.source,
    )
    best.rows[changed], best.scores[changed] = merged.rows, merged.scores


def _inner(
    vectors: np.ndarray, take: Callable[[np.ndarray], np.ndarray], queries: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """float32 (N,): the inner products of N pairs, each summed in the same order whatever stands around it.

    `take` gives float32 (n, D), the passage vectors of n columns.
    """
    products = np.empty(len(queries), np.float32)
    for start in range(0, len(queries), _PAIRS):
        part = slice(start, start + _PAIRS)
        products[part] = (vectors[queries[part]] * take(columns[part])).sum(axis=1, dtype=np.float64)
    return products


def _tensor(part: np.ndarray) -> "torch.Tensor":
    """A copy of a mapped part."""
    import torch

    return torch.from_numpy(np.array(part))


def _to_gpu(index: Any, device: str) -> Any:
    """The index on a CUDA device. Raises DataError where torch or this build of FAISS has none."""
    import faiss

    place = choose_device(device)
    if place.type != "cuda" or not hasattr(faiss, "StandardGpuResources"):
        raise DataError(
            f"device {device!r}: this build of FAISS ({faiss.__version__}) searches on the processor only. Install "
            "faiss-gpu in the place of faiss-cpu, take the exact search (faiss: null), or set device: cpu."
        )
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), place.index or 0, index)


def _save_int8(parts: VectorParts, path: Path) -> None:
    """Write codes.npy and scales.npy: the largest value of a vector becomes 127."""
    path.mkdir()
    codes = np.lib.format.open_memmap(path / "codes.npy", "w+", np.int8, (len(parts), parts.width))

    def scales() -> Iterator[np.ndarray]:
        for first, block in parts.blocks(8192):
            largest = np.abs(block).max(axis=1)
            largest[largest == 0] = 1
            codes[first : first + len(block)] = np.rint(block * (127 / largest)[:, None])
            yield largest / 127

    save_pieces(path / "scales.npy", np.float32, scales())
    codes.flush()


def _checked(vectors: np.ndarray, width: int) -> np.ndarray:
    vectors = np.ascontiguousarray(vectors, np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise DataError(f"query vectors have the shape {vectors.shape}; this index needs (queries, {width}).")
    check_finite(vectors, "query vectors")
    return vectors
