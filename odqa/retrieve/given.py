"""Passage vectors that need not be made: DPR's embedding files, a FAISS index as it is, or those of another index.

What comes in is put into the collection's order: vector i belongs to passage i, or a table says which. Everything that
can be checked is: one vector for each passage, width, metric, unit length, and for a sample of passages that the
encoder of the recipe makes the same vectors. An index with the wrong ids would else give wrong hits in silence.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from odqa.artifacts import Artifact, Draft, sha256_file
from odqa.corpus.store import PassageStore
from odqa.errors import DataError
from odqa.retrieve.dense import Encoder, fingerprint
from odqa.retrieve.dpr_embeddings import iterate_embeddings, read_ids
from odqa.retrieve.parts import VectorParts
from odqa.retrieve.tuned import TunedMethod
from odqa.retrieve.vectors import Metric, VectorSettings, read_faiss

_PART_ROWS = 100_000  # rows of a part: few files, and each is filled in whatever order the ids come
_SAMPLE = 8  # ours: passages that are encoded again
_SAME = 0.98  # ours, cosine: between encoders run in bfloat16 and float32 it is 0.999
_SAME_QUANTISED = 0.5  # ours: what a few bits a dimension leave of a vector
_UNIT = 0.02  # how far from 1 the length of a vector in float16 may be


@dataclass(frozen=True, slots=True)
class GivenVectors:
    """What a sidecar says; see `odqa.config.GivenVectors`. `name` is the sidecar's, for messages.

    Either `embeddings` (files of DPR's) or `faiss` with `metric` and `ids` (None: its rows are the collection's).
    `identity` goes into the manifest: the files, by name and sha256.
    """

    name: str
    encoder: str
    is_normalized: bool
    embeddings: tuple[Path, ...] = ()
    faiss: Path | None = None
    metric: Metric = "inner-product"
    ids: Path | None = None
    id_prefix: str = ""
    identity: Mapping[str, Any] | None = None

    def check(self, encoder: Encoder) -> None:
        """Raises DataError if the encoder of the recipe is another one, or normalises otherwise."""
        settings = encoder.resolved
        model = settings.passage_model or settings.question_model
        if _last_name(model) != _last_name(self.encoder):
            raise DataError(
                f"{self.name}: made by {self.encoder}, but the recipe encodes with {model}. Name the same in both."
            )
        if settings.normalize != self.is_normalized:
            raise DataError(
                f"{self.name}: normalized is {self.is_normalized}, but the recipe's encoder has normalize: "
                f"{settings.normalize}. Questions and passages must be treated alike."
            )


@dataclass(frozen=True, slots=True)
class IndexVectors:
    """The passage vectors of another index of the same passages, made by the same model with the same settings.

    So an encoder whose method is for questions alone needs no encoding. `name` is what the recipe says, `identity` goes
    into the manifest.
    """

    name: str
    index: Artifact

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"index": self.index.hash}

    def check(self, encoder: Encoder) -> None:
        """Raises DataError for an index without vectors, or with passages encoded by another model or otherwise."""
        file = self.index.path / "dense/encoder.json"
        if not file.is_file():
            raise DataError(f"{self.name}: an index without vectors. Name one with an encoder under given.")
        told = json.loads(file.read_text(encoding="utf-8"))
        settings = asdict(encoder.resolved)
        wrong = [key for key in _OF_PASSAGES if settings[key] != told["settings"].get(key)]
        if told["weights"]["passage"] != fingerprint(encoder.passage_folder):
            wrong.append("passage_model")
        if _passage_method(encoder.method) != _passage_method(self.index.path / "dense/method"):
            wrong.append("method")
        if wrong:
            raise DataError(
                f"{self.name}: its passages were encoded with another {', '.join(wrong)} than this recipe's. Remove "
                "vectors.given: then they are encoded."
            )

    @property
    def has_vectors(self) -> bool:
        """Whether the index kept its vectors; of one that did not, the FAISS index is copied as it is."""
        return (self.index.path / "dense/vectors").is_dir()

    def place(self, encoder: Encoder, settings: VectorSettings, draft: Draft) -> bool:
        """Copy the vectors into `draft`; True if they can be searched as `settings` say without more ado.

        Raises DataError if the passages in the draft's store are others, or the index cannot give its vectors.
        """
        _check_passages(self.name, self.index, draft)
        source = self.index.path / "dense"
        if self.has_vectors:
            draft.part("dense/vectors", partial(shutil.copytree, source / "vectors"))
            return False
        told = json.loads((source / "search/search.json").read_text(encoding="utf-8"))
        if (told["faiss"], told.get("refine")) != (settings.faiss, settings.refine):
            raise DataError(
                f"{self.name}: searched by FAISS ({told['faiss']}, refine {told.get('refine')}), and its vectors are "
                "not kept. Name the same under vectors.faiss and vectors.refine, or build that index with keep: true."
            )
        for file in sorted((source / "search").iterdir()):
            if file.name != "search.json":
                draft.part(f"dense/search/{file.name}", partial(_copy, file))
        changes: dict[str, Any] = {"search": dict(settings.search)}
        if settings.refine is not None:
            changes["refine_factor"] = settings.refine_factor
        draft.write_json("dense/search/search.json", told | changes)
        return True


# Settings of an encoder that decide the vectors of passages.
_OF_PASSAGES = ("pooling", "normalize", "passage_prefix", "passage_max_tokens", "titles", "segments")


def _passage_method(folder: Path | None) -> str | None:
    """The hash of a trained method if passages are encoded with it."""
    tuned = None if folder is None or not folder.is_dir() else TunedMethod.load(folder)
    return tuned.hash if tuned is not None and "passages" in tuned.sides else None


def _check_passages(name: str, index: Artifact, draft: Draft) -> None:
    """Raises DataError unless the draft's store has the texts of the index, file by file."""
    theirs = {file: entry["sha256"] for file, entry in index.manifest["files"].items() if file.startswith("passages/")}
    ours = {file.relative_to(draft.path).as_posix(): file for file in (draft.path / "passages").iterdir()}
    if theirs.keys() != ours.keys() or any(sha256_file(path) != theirs[file] for file, path in ours.items()):
        raise DataError(f"{name}: an index of other passages than this recipe's. Name one of the same collection.")


def _last_name(model: str) -> str:
    """Of a folder, a hub name or an embedded model: all three may be places of one model."""
    return model.rstrip("/").replace(":", "/").rsplit("/", 1)[-1]


def place_embeddings(given: GivenVectors, encoder: Encoder, store: PassageStore, draft: Draft, name: str) -> None:
    """Write DPR's embedding files as the parts of the folder `name`, in the collection's order, in the store's dtype.

    In memory: one embedding file. Raises DataError for an id that the collection lacks, one that comes twice, a passage
    without a vector, and vectors that the encoder does not make.
    """

    def write(folder: Path) -> None:
        folder.mkdir()
        seen = np.zeros(len(store), bool)
        parts: dict[int, np.memmap[Any, Any]] = {}
        for path, found in zip(given.embeddings, iterate_embeddings(given.embeddings), strict=True):
            rows = _rows(found.ids, given.id_prefix, store, str(path))
            for place in np.flatnonzero(seen[rows]):
                raise DataError(f"{path}: a second vector of passage {found.ids[int(place)]!r}.")
            seen[rows] = True
            for part in np.unique(rows // _PART_ROWS).tolist():
                if part not in parts:
                    shape = (min(_PART_ROWS, len(store) - part * _PART_ROWS), found.vectors.shape[1])
                    file = folder / f"part-{part:05d}.npy"
                    dtype = np.dtype(encoder.settings.store_dtype)
                    parts[part] = np.lib.format.open_memmap(file, "w+", dtype, shape)
                inside = rows // _PART_ROWS == part
                parts[part][rows[inside] - part * _PART_ROWS] = found.vectors[inside]
        _check_complete(seen, store, given.name)
        for mapped in parts.values():
            mapped.flush()

    folder = draft.part(name, write)
    parts = VectorParts(folder)
    sample = _sample(len(store))
    vectors = np.stack([parts.row(row) for row in sample])
    _check_alike(given, encoder, store, sample, vectors, _SAME)


def place_index(
    given: GivenVectors, encoder: Encoder, store: PassageStore, draft: Draft, name: str, search: Mapping[str, float]
) -> None:
    """Copy a FAISS index into the folder `name` and write beside it how it is searched (`odqa.retrieve.vectors`).

    Raises DataError if it has not one vector for each passage, another metric than its sidecar says, or vectors that
    the encoder does not make (for index types that can give vectors back).
    """
    assert given.faiss is not None
    index = read_faiss(given.faiss, given.metric)
    if given.ids is None and index.ntotal != len(store):
        raise DataError(
            f"{given.faiss}: {index.ntotal:,} vectors for {len(store):,} passages. An index of the same collection is "
            "needed, or under ids the passage id of each vector."
        )
    _check_faiss_ids(given, index)
    rows = np.arange(len(store)) if given.ids is None else _index_rows(given, store, index.ntotal)
    sample = _sample(index.ntotal)
    vectors = _reconstruct(index, sample)
    if vectors is not None:
        if given.metric == "dpr-hnsw":
            vectors = vectors[:, :-1]
        _check_alike(given, encoder, store, rows[sample].tolist(), vectors, _SAME_QUANTISED)
    width = int(index.d) - (given.metric == "dpr-hnsw")
    if vectors is None and width != encoder.width:
        raise DataError(f"{given.faiss}: vectors of width {width}; {given.encoder} makes {encoder.width}.")
    source = given.faiss
    draft.part(f"{name}/index.faiss", lambda path: _copy(source, path))
    if given.ids is not None:
        draft.part(f"{name}/rows.npy", lambda path: _save_rows(path, rows))
    meta = {"rows": index.ntotal, "width": width, "faiss": "given", "metric": given.metric, "search": dict(search)}
    draft.write_json(f"{name}/search.json", {**meta, "encoder_checked": vectors is not None})


def _check_faiss_ids(given: GivenVectors, index: Any) -> None:
    """What FAISS answers with must be numbers from 0; an IndexIDMap may hold any."""
    import faiss

    mapped = faiss.downcast_index(index)
    if hasattr(mapped, "id_map"):
        found = np.sort(faiss.vector_to_array(mapped.id_map))
        if not np.array_equal(found, np.arange(len(found))):
            raise DataError(
                f"{given.faiss}: its vectors have ids of their own ({found[0]} to {found[-1]}), not the numbers of rows"
                " from 0. Take the index out of its IDMap, and give its passage ids as a file under ids."
            )


def _index_rows(given: GivenVectors, store: PassageStore, count: int) -> np.ndarray:
    """int64 (count,): the passage row of each FAISS row."""
    assert given.ids is not None
    ids = read_ids(given.ids)
    if len(ids) != count:
        raise DataError(f"{given.ids}: {len(ids):,} ids for the {count:,} vectors of {given.faiss}.")
    rows = _rows(ids, given.id_prefix, store, str(given.ids))
    seen = np.zeros(len(store), bool)
    seen[rows] = True
    if seen.sum() < len(rows):
        twice = int(np.flatnonzero(np.bincount(rows) > 1)[0])
        raise DataError(f"{given.ids}: the id of passage {store[twice].id!r} stands twice.")
    _check_complete(seen, store, given.name)
    return rows


def _rows(ids: Sequence[str], prefix: str, store: PassageStore, where: str) -> np.ndarray:
    rows = np.empty(len(ids), np.int64)
    for place, found in enumerate(ids):
        try:
            rows[place] = store.row_of(found.removeprefix(prefix))
        except DataError as error:
            hint = "" if prefix or ":" not in found else f" Is {found.split(':')[0] + ':'!r} an id_prefix?"
            raise DataError(f"{where}: record {place + 1}: no passage with the id {found!r} here.{hint}") from error
    return rows


def _check_complete(seen: np.ndarray, store: PassageStore, name: str) -> None:
    if not seen.all():
        first = store[int(np.flatnonzero(~seen)[0])].id
        raise DataError(
            f"{name}: no vectors for {int((~seen).sum()):,} of {len(store):,} passages (first: {first!r}). Are all "
            "files named, and is this the collection that they were made of?"
        )


def _sample(count: int) -> list[int]:
    """A few rows from the first to the last."""
    return sorted({int(row) for row in np.linspace(0, count - 1, _SAMPLE)})


def _reconstruct(index: Any, rows: Sequence[int]) -> np.ndarray | None:
    """float32 (n, d): what a FAISS index has for some rows; None for a type that cannot say."""
    import faiss

    try:
        lists = faiss.try_extract_index_ivf(index)
        if lists is not None:
            lists.make_direct_map()
        return np.stack([index.reconstruct(row) for row in rows])
    except RuntimeError:
        return None


def _check_alike(
    given: GivenVectors, encoder: Encoder, store: PassageStore, rows: Sequence[int], vectors: np.ndarray, same: float
) -> None:
    """Encode a sample of passages again, and compare: each must be alike its own vector, and most alike that one."""
    passages = store.rows(rows)
    encoded = encoder.encode_passages(passages)
    if encoded.shape != vectors.shape:
        raise DataError(f"{given.name}: vectors of width {vectors.shape[1]}; {given.encoder} makes {encoded.shape[1]}.")
    lengths = np.linalg.norm(vectors, axis=1)
    if given.is_normalized and given.faiss is None and np.abs(lengths - 1).max() > _UNIT:
        raise DataError(
            f"{given.name}: normalized is true, but passage {passages[int(np.abs(lengths - 1).argmax())].id!r} has a "
            f"vector of length {lengths[np.abs(lengths - 1).argmax()]:.3f}."
        )
    cosines = _unit(encoded) @ _unit(vectors).T  # (n, n); the diagonal is each passage with its own
    own = cosines.diagonal()
    worst = int(np.where(own >= cosines.max(axis=1) - 1e-3, own, own - 2).argmin())  # a confusion is worse than noise
    if own[worst] < same or own[worst] < cosines[worst].max() - 1e-3:
        others = np.delete(cosines[worst], worst).max(initial=-1)
        raise DataError(
            f"{given.name}: the vector of passage {passages[worst].id!r} is not what {given.encoder} makes of it "
            f"(cosine {own[worst]:.3f}; the best of other passages' {others:.3f}). Other ids, another encoder, or "
            "other titles, prefixes or lengths?"
        )


def _unit(vectors: np.ndarray) -> np.ndarray:
    unit: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit


def _copy(source: Path, path: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, path)
    else:
        shutil.copyfile(source, path)


def _save_rows(path: Path, rows: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, rows, allow_pickle=False)
