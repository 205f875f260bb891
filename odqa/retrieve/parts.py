"""The vectors of a collection as numbered npy files: a matrix that is never whole in memory."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from odqa.errors import ArtifactError
from odqa.runtime import Recent

_OPEN_PARTS = 256  # ours: parts that stay mapped; each holds one of the files that a process may have open (1,024)
_SAMPLE_SEED = 20201004  # ours; which vectors a FAISS index is trained on


class VectorParts:
    """The vectors in `part-00000.npy` ... of one folder: an (N, D) matrix. Opening reads the files' headers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = sorted(path.glob("part-*.npy"))
        if not self._files:
            raise ArtifactError(f"{path}: no vectors here (part-00000.npy is missing). Build the index again.")
        shapes = [_shape(file) for file in self._files]
        widths = {shape[1:] for shape in shapes}
        if len(widths) != 1 or len(next(iter(widths))) != 1:
            raise ArtifactError(f"{path}: parts of different shapes {sorted(widths)}. Build the index again.")
        self.width: int = shapes[0][1]
        self.starts = np.cumsum([0, *(shape[0] for shape in shapes)])  # the row that each part begins with; then N
        self._mapped: Recent[int, np.ndarray] = Recent(_OPEN_PARTS)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def count(self) -> int:
        """The number of parts."""
        return len(self._files)

    def part(self, number: int) -> np.ndarray:
        """(n, D): one part as it is stored, memory-mapped."""
        if number not in self._mapped:
            self._mapped.store({number: np.load(self._files[number], mmap_mode="r", allow_pickle=False)})
        return self._mapped[number]

    def row(self, row: int) -> np.ndarray:
        """float32 (D,): one vector. Raises IndexError outside 0 ... len - 1."""
        vector: np.ndarray = self.rows(np.array([row]))[0]
        return vector

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """float32 (n, D): the vectors of n rows, in that order. Raises IndexError outside 0 ... len - 1."""
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)} vectors")
        found = np.empty((len(rows), self.width), np.float32)
        numbers = np.searchsorted(self.starts, rows, "right") - 1
        for number in np.unique(numbers).tolist():
            inside = numbers == number
            found[inside] = self.part(number)[rows[inside] - self.starts[number]]
        return found

    def blocks(self, rows: int, within: range | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, float32 (n, D) with n <= rows) over the whole matrix; a block lies in one part.

        `within`: only the blocks that begin in this range of rows.
        """
        for number, first in enumerate(self.starts[:-1].tolist()):
            last = int(self.starts[number + 1])
            starts = [start for start in range(first, last, rows) if within is None or start in within]
            if starts:
                part = np.load(self._files[number], mmap_mode="r", allow_pickle=False)
                for start in starts:
                    yield start, np.asarray(part[start - first : start - first + rows], np.float32)

    def sample(self, count: int) -> np.ndarray:
        """float32 (count, D): vectors drawn without replacement, the same ones every time, in row order.

        The memory is that of the sample: what is drawn from is never listed when it is much larger.
        """
        if count >= len(self):
            return self.rows(np.arange(len(self)))
        drawn = np.random.default_rng(_SAMPLE_SEED).choice(len(self), count, replace=False, shuffle=False)
        return self.rows(np.sort(drawn))


def _shape(file: Path) -> tuple[int, ...]:
    """The shape that the header of an npy file names."""
    try:
        with file.open("rb") as stream:
            major, _ = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
            shape: tuple[int, ...] = read(stream)[0]
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: not an npy file ({error}). Build the index again.") from error
    return shape
