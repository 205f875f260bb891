"""DPR's embedding files: a pickled list of (passage id, vector) pairs, `wikipedia_passages_0` and its like.

A pickle is a program. This one is read by an unpickler that knows the five names with which numpy pickles an array, and
answers them with stand-ins of our own: nothing of numpy, and nothing else, is ever called with what a file says. The
stand-ins keep shape, number format and bytes, from which the array is made here. Any other global is refused by name.

Written by generate_dense_embeddings.py of facebookresearch/DPR, read by its dense_retriever.py (iterate_encoded_files).
A file is in memory as a whole while it is read (DPR's 50 for Wikipedia: 1.3 GB each, and about ten seconds), one file
at a time.
"""

import math
import pickle
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NoReturn

import numpy as np

from odqa.errors import DataError

_DTYPES = ("f2", "f4", "f8")
_WIDEST = 1 << 20  # ours, values of a vector


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The pairs of one file: `ids` (N,), `vectors` float32 (N, D)."""

    ids: tuple[str, ...]
    vectors: np.ndarray


def read_embeddings(path: Path) -> Embeddings:
    """One embedding file. An id may be a string or a whole number; what stands behind id and vector is not used.

    Raises DataError for a file that is no such pickle, that names any other global (it says which), and for a pair that
    is none, vectors of different widths, NaN or infinity.
    """
    path = Path(path)
    pairs = _unpickle(path)
    if not isinstance(pairs, list) or not pairs:
        found = "an empty list" if isinstance(pairs, list) else f"a {type(pairs).__name__}"
        raise DataError(f"{path}: expected a list of (id, vector) pairs, found {found}.")
    ids, vectors = [], np.empty((0, 0), np.float32)
    for number, pair in enumerate(pairs):
        where = f"{path}: record {number + 1}"
        if not isinstance(pair, tuple | list) or len(pair) < 2 or not isinstance(pair[1], _Array):
            raise DataError(f"{where}: expected an id and a numpy array.")
        if not _is_id(pair[0]):
            raise DataError(f"{where}: expected a string or a whole number for an id, found {_shown(pair[0])}.")
        vector = pair[1].to_numpy(where)
        if number == 0:
            vectors = np.empty((len(pairs), len(vector)), np.float32)
        if len(vector) != vectors.shape[1]:
            raise DataError(f"{where}: a vector of width {len(vector)}, the first has {vectors.shape[1]}.")
        if not np.isfinite(vector).all():
            raise DataError(f"{where}: the vector of {pair[0]!r} holds NaN or infinity.")
        vectors[number] = vector
        ids.append(str(pair[0]))
    return Embeddings(tuple(ids), vectors)


def save_embeddings(path: Path, pairs: Iterable[tuple[str, np.ndarray]]) -> int:
    """Write pairs as DPR's dense_retriever.py reads them: pickle protocol 4, float32; how many. All are in memory."""
    path = Path(path)
    found = [(passage_id, np.array(vector, np.float32)) for passage_id, vector in pairs]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        pickle.dump(found, file, protocol=4)
    temporary.replace(path)
    return len(found)


def read_ids(path: Path) -> list[str]:
    """The ids of a FAISS index's rows: a text file with one a line, or DPR's index_meta.dpr, a pickled list of them."""
    path = Path(path)
    with path.open("rb") as file:
        is_pickle = file.read(1) == b"\x80"
    if not is_pickle:
        try:
            return path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not text in UTF-8 ({error.reason}); expected an id a line.") from error
    ids = _unpickle(path)
    if not isinstance(ids, list) or not all(_is_id(found) for found in ids):
        raise DataError(f"{path}: expected a pickled list of ids (strings or whole numbers).")
    return [str(found) for found in ids]


def _is_id(found: object) -> bool:
    return (type(found) is str and found != "") or (type(found) is int and abs(found) < 1 << 63)


def _shown(found: object) -> str:
    """A value of a pickle for a message. Only short ones as they are: a nested one may be longer than any memory."""
    return repr(found)[:40] if type(found) in (str, float, bool, type(None)) else f"a {type(found).__name__}"


# --- the unpickler ----------------------------------------------------------------------------------------------------


class _Dtype:
    """Stands for numpy.dtype: the number format of an array."""

    __slots__ = ("code", "order")

    def __init__(self, code: object = "", *_: object) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "="):
            self.order = state[1]

    def to_numpy(self, where: str) -> np.dtype[Any]:
        if self.code not in _DTYPES:
            raise DataError(f"{where}: an array of {_shown(self.code)}; expected floating-point numbers.")
        return np.dtype(f"{self.order}{self.code}")


class _Array:
    """Stands for numpy.ndarray: what its pickle says."""

    __slots__ = ("data", "dtype", "shape")

    def __init__(self, *_: object) -> None:
        self.shape: object = None
        self.dtype: object = None
        self.data: object = None

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) == 5:
            _, self.shape, self.dtype, _, self.data = state

    def to_numpy(self, where: str) -> np.ndarray:
        """float32 (D,). One dimension, or one row or column; DataError for anything else."""
        shape, data = self.shape, self.data
        if isinstance(data, str):  # protocols 0 and 1 of Python 2
            data = data.encode("latin-1", "replace")
        if not isinstance(self.dtype, _Dtype) or not isinstance(data, bytes | bytearray):
            raise DataError(f"{where}: an array whose pickle lacks its numbers.")
        sides = shape if isinstance(shape, tuple) and len(shape) <= 2 else ()
        if not sides or not all(type(side) is int and 0 < side <= _WIDEST for side in sides):
            raise DataError(f"{where}: an array that is not one vector.")
        dtype = self.dtype.to_numpy(where)
        width = math.prod(sides)
        if width != max(sides) or width * dtype.itemsize != len(data):
            raise DataError(f"{where}: an array of the shape {shape} in {len(data)} bytes; expected one vector.")
        return np.frombuffer(data, dtype).astype(np.float32)


class _Call:
    """A function that a pickle may call, and do nothing else with."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, _: object) -> NoReturn:
        raise pickle.UnpicklingError("a function has no state")


def _from_buffer(data: object, dtype: object, shape: object, _order: object = "C") -> _Array:
    """numpy's own way in protocol 5."""
    found = _Array()
    found.shape, found.dtype, found.data = shape, dtype, data
    return found


def _latin_1(text: object, encoding: object) -> bytes:
    """How Python pickles bytes in protocols 0 to 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("bytes of an unknown encoding")
    return text.encode("latin-1")


def _globals() -> dict[tuple[str, str], Any]:
    """All that a pickle may name. numpy 2 calls its parts numpy._core, numpy 1 numpy.core."""
    known: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _Call(_latin_1),
    }
    for core in ("numpy.core", "numpy._core"):
        known[f"{core}.multiarray", "_reconstruct"] = _Call(_Array)
        known[f"{core}.numeric", "_frombuffer"] = _Call(_from_buffer)
    return known


class _ArrayUnpickler(pickle._Unpickler):
    """Admits arrays of numbers; every other global is an error that names it.

    It is the standard library's unpickler in Python. The one in C is faster, and can be made to ask for any amount of
    memory by one number in a damaged file (the place of a memo entry); here memory is bounded by the file's size.
    """

    def __init__(self, file: "_Bounded") -> None:
        super().__init__(file, encoding="latin1")
        self._file, self._globals = file, _globals()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._globals[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _Refused("a persistent id")

    def get_extension(self, code: int) -> NoReturn:
        raise _Refused(f"extension {code}")

    def _load_bytearray(self: Any) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(self._file.check(length))))  # not made before its bytes are there

    dispatch: ClassVar[Any] = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: _load_bytearray}


class _Bounded:
    """A file of which no more can be asked for than it has."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.readline = file.readline

    def check(self, count: int) -> int:
        if count > self._size:
            raise EOFError(f"{count} bytes asked for in a file of {self._size}")
        return count

    def read(self, count: int) -> bytes:
        return self._file.read(self.check(count))

    def readinto(self, buffer: bytearray) -> int:
        return self._file.readinto(buffer)  # type: ignore[attr-defined,no-any-return]


class _Refused(Exception):
    """A global that no embedding file needs."""


def _unpickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _ArrayUnpickler(_Bounded(file, path.stat().st_size)).load()
    except _Refused as refused:
        raise DataError(
            f"{path}: the pickle asks for {str(refused)[:200]!r}; numpy arrays alone are read. Do not open it "
            "elsewhere unless you trust who made it."
        ) from None
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file.") from error
    except Exception as error:  # pickle's errors have no common base: a damaged file may raise nearly anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path}: no pickle, or a damaged one ({reason}).") from error


def iterate_embeddings(paths: Iterable[Path]) -> Iterator[Embeddings]:
    """Several files one after the other. Raises DataError if their widths differ."""
    width: int | None = None
    for path in paths:
        found = read_embeddings(path)
        if width is not None and found.vectors.shape[1] != width:
            raise DataError(f"{path}: vectors of width {found.vectors.shape[1]}, the files before have {width}.")
        width = found.vectors.shape[1]
        yield found
