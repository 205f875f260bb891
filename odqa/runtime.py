"""What the machine offers: devices, number formats, memory, how batches run on it, and progress on stderr.

torch is imported inside the functions that need it, so that the command line can answer without it.
"""

import contextlib
import itertools
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from odqa.errors import DataError

if TYPE_CHECKING:
    import torch

K = TypeVar("K")
V = TypeVar("V")

# Tokens a batch, on a processor and on a CUDA device. Measured for MiniLM: activations should stay in the cache.
BATCH_TOKENS = (2048, 65_536)


@cache
def processor_flags() -> frozenset[str]:
    """Instruction-set flags of the processor (Linux on x86; empty elsewhere)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def has_fast_bf16() -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 on this processor (AVX512-BF16 or AMX)."""
    return bool({"avx512_bf16", "amx_bf16"} & processor_flags())


def choose_device(name: str = "auto") -> "torch.device":
    """`auto` takes a CUDA device where torch sees one, else the processor. Raises DataError for a missing one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DataError(f"device {name!r} is not a device that torch knows (auto, cpu, cuda, cuda:N).") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DataError(
            f"device {name!r} is not here: torch sees {torch.cuda.device_count()} CUDA devices. Use device: cpu."
        )
    return device


def choose_dtype(name: str, device: "torch.device") -> "torch.dtype":
    """`auto` is bfloat16 where it is fast (CUDA, AVX512-BF16, AMX), else float32. Raises DataError for another name."""
    import torch

    if name == "auto":
        fast = device.type == "cuda" or (device.type == "cpu" and has_fast_bf16())
        return torch.bfloat16 if fast else torch.float32
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in names:
        raise DataError(f"dtype {name!r} is not one of auto, {', '.join(names)}.")
    return names[name]


def run_batches(
    work: Callable[[list[int]], None],
    lengths: Sequence[int],
    *,
    device: "torch.device",
    batch_tokens: int | None = None,
    step: int = 16,
) -> None:
    """Call `work` with batches of row numbers, rows of equal padded length together, until every row had its turn.

    `lengths` are the rows' tokens; a batch holds at most `batch_tokens` (None: `BATCH_TOKENS`) once padded to a
    multiple of `step`, or one row. On a processor batches run side by side, each on one core; `work` must allow that.
    A row is padded by its own length, never by its neighbours': what a model says of it does not depend on them.
    """
    import torch

    batch_tokens = batch_tokens or BATCH_TOKENS[device.type == "cuda"]
    if device.type != "cpu" or torch.get_num_threads() == 1:
        for batch in batches_by_length(lengths, batch_tokens, step):
            work(batch)
    else:
        share = -(-sum(lengths) // torch.get_num_threads())  # few rows: every core gets some
        with _single_threaded_workers() as pool:
            list(pool.map(work, batches_by_length(lengths, min(batch_tokens, share), step)))


def batches_by_length(lengths: Sequence[int], batch_tokens: int, step: int) -> Iterator[list[int]]:
    """Cut rows into batches of at most `batch_tokens` tokens, longest rows first (memory peaks at once).

    The rows of a batch need the same padding to a multiple of `step`.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for padded, rows in itertools.groupby(order, key=lambda i: max(1, -(-lengths[i] // step)) * step):
        size = max(1, batch_tokens // padded)
        while batch := list(itertools.islice(rows, size)):
            yield batch


@contextlib.contextmanager
def _single_threaded_workers() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch would use for one operation, each of which runs its own operations alone.

    A batch a thread needs no barriers between threads, at which an operation spread over all cores stands still when
    another process wants one of them: measured three times as fast then, for a single question twenty times.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # the workers' calls also told torch what threads made later begin with


class Recent(dict[K, V]):
    """A dictionary that keeps what was added last, at most `limit` entries; `store` adds."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def store(self, found: Mapping[K, V]) -> None:
        """Add entries, and let the oldest go."""
        self.update(found)
        for key in list(itertools.islice(self, max(0, len(self) - self.limit))):
            del self[key]


def peak_memory_bytes() -> int:
    """The largest resident size this process has had, in bytes (ru_maxrss is in KiB on Linux, in bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextlib.contextmanager
def progress(label: str, total: int | None, unit: str = "") -> Iterator["Progress"]:
    """A progress line on stderr; silent when stderr is not a terminal."""
    bar = Progress(label, total, unit)
    try:
        yield bar
    finally:
        bar.close()


class Progress:
    """Counts `advance`d units and shows rate and time left, once the job has lasted two seconds.

    Bytes (the unit "B") are shown in k, M and G.
    """

    def __init__(self, label: str, total: int | None, unit: str = "") -> None:
        self._bar = None
        self._label, self._total, self._unit = label, total, unit
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, desc=label, unit=f" {unit}" if unit else "", unit_scale=unit == "B", delay=2,
                file=sys.stderr, leave=False,
            )  # fmt: skip

    def advance(self, count: int = 1) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def over(self, items: Iterable[V]) -> Iterator[V]:
        """The items as they are; each is counted when the next one is asked for."""
        for item in items:
            yield item
            self.advance()

    def note(self, words: str) -> None:
        """Show further words behind the count, from the next `advance` on."""
        if self._bar is not None:
            self._bar.set_postfix_str(words, refresh=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
