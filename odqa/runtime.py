"""What the machine offers: devices, number formats, memory, and progress on stderr.

torch is imported inside the functions that need it, so that the command line can answer without it.
"""

import contextlib
import resource
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from odqa.errors import DataError

if TYPE_CHECKING:
    import torch


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
    """Counts `advance`d units and shows rate and time left, once the job has lasted two seconds."""

    def __init__(self, label: str, total: int | None, unit: str = "") -> None:
        self._bar = None
        self._label, self._total, self._unit = label, total, unit
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, desc=label, unit=f" {unit}" if unit else "", delay=2, file=sys.stderr, leave=False
            )

    def advance(self, count: int = 1) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
