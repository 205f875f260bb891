"""What all benchmarks share: taking turns, and results with the machine they were measured on."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

from odqa.runtime import progress

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "eval" / "results"


def save_result(path: Path, result: dict[str, object]) -> None:
    """Write a result with the machine it was measured on; file names only, no paths."""
    machine = {"python": platform.python_version(), "processor": processor(), "cores": os.cpu_count()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, "machine": machine}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def interleaved(
    systems: "dict[str, Callable[[int], object]]",
    questions: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[list[float]]]:
    """Seconds by system, round and question; the systems take turns at each question. The first is a warm-up.

    Wall seconds; with `time.process_time` as the clock the processor's, which a busy machine stretches less.
    """
    for run in systems.values():
        run(0)
    seconds: dict[str, list[list[float]]] = {name: [] for name in systems}
    with progress("bench", repeats * questions, "rounds") as bar:
        for _ in range(repeats):
            for each in seconds.values():
                each.append([])
            for number in range(questions):
                for name, run in systems.items():
                    started = clock()
                    run(number)
                    seconds[name][-1].append(clock() - started)
                bar.advance()
    return seconds


def dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
