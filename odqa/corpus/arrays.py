"""One-dimensional npy files, written piece by piece: arrays that are never whole in memory."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np


class NpyWriter:
    """Writes an npy file of a length that is known only at its end; the bytes are those of `numpy.save`."""

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self._file = path.open("wb")
        self._dtype = np.dtype(dtype)
        self.length = 0
        self._write_header()

    def append(self, values: np.ndarray) -> None:
        np.ascontiguousarray(values, self._dtype).tofile(self._file)
        self.length += len(values)

    def _write_header(self) -> None:
        """numpy leaves room in it for the digits of any length: it may be written again over itself."""
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def __enter__(self) -> "NpyWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()


def save_pieces(path: Path, dtype: type[np.generic], pieces: Iterable[np.ndarray]) -> None:
    """Write the pieces of an array, in order."""
    with NpyWriter(path, dtype) as writer:
        for piece in pieces:
            writer.append(piece)
