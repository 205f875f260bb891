"""What benchmarks share that ask other libraries: one process each, of an environment of their own."""

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import typer

from benchmarks.common import ROOT

if TYPE_CHECKING:
    from odqa.retrieve.bm25 import Bm25Settings
    from odqa.types import Passage

_WORKER = Path(__file__).parent / "peer_worker.py"
_LONGEST = 1800  # seconds that a peer may take


@dataclass(frozen=True, slots=True)
class Found:
    """What a peer answered; `asked` are the numbers of the questions that it was asked."""

    package: str
    index_seconds: float
    search_seconds: list[float]
    asked: list[int]
    rows: list[list[int]]
    peak_bytes: int


def write_work(
    folder: Path,
    passages: Iterable["Passage"],
    texts: Sequence[str],
    settings: "Bm25Settings",
    vectors: np.ndarray | None = None,
    **told: Any,
) -> None:
    """Lay out what a peer works on; see `peer_worker.py`. `told` goes into its settings."""
    folder.mkdir(parents=True, exist_ok=True)

    def line(text: str) -> str:
        return json.dumps({"text": text, "toks": Counter(settings.analyzer.terms(text))}) + "\n"

    with (folder / "passages.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(line(settings.text(passage)) for passage in passages)
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(map(line, texts))
    if vectors is not None:
        np.save(folder / "vectors.npy", vectors, allow_pickle=False)
    (folder / "settings.json").write_text(json.dumps({"k1": settings.k1, "b": settings.b, **told}), encoding="utf-8")


def ask_peer(python: Path, system: str, folder: Path) -> Found | str:
    """What a peer finds, or in a line why it does not."""
    out = folder / f"{system}.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HAYSTACK_TELEMETRY_ENABLED": "False"}
    environment.pop("PYTHONPATH", None)
    if system.startswith("odqa"):
        environment["PYTHONPATH"] = str(ROOT)
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [str(python), str(_WORKER), system, str(folder), str(out)],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=_LONGEST,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"not done after {_LONGEST} seconds"
    typer.echo(f"{system}: {time.perf_counter() - started:.0f} s", err=True)
    if done.returncode != 0 or not out.is_file():
        return (done.stderr.strip().splitlines() or ["no word why"])[-1][:200]
    return Found(**json.loads(out.read_text(encoding="utf-8")))


def as_rows(found: Found, questions: int, k: int) -> np.ndarray:
    """int64 (questions, k), -1 where there is no hit or the question was not asked."""
    rows = np.full((questions, k), -1, np.int64)
    for number, hits in zip(found.asked, found.rows, strict=True):
        rows[number, : len(hits)] = hits[:k]
    return rows


class Judge:
    """Recall by has_answer, each (question, passage) matched once whoever ranks it."""

    def __init__(self, answers: Sequence[Sequence[str]], texts: "Sequence[Passage] | Any") -> None:
        self._answers, self._passages = answers, texts
        self._known: dict[tuple[int, int], bool] = {}

    def recall(self, rows: np.ndarray, questions: Iterable[int], ks: Sequence[int]) -> dict[str, float]:
        """Percent of the questions with an answer in the first k rows."""
        asked = list(questions)
        ranks = [self._first(number, rows[number, : max(ks)].tolist()) for number in asked]
        return {f"recall@{k}": round(100 * sum(rank < k for rank in ranks) / len(asked), 2) for k in ks}

    def _first(self, question: int, rows: list[int]) -> int:
        """The place of the first passage with an answer, from 0; a large number if there is none."""
        return next((place for place, row in enumerate(rows) if row >= 0 and self._holds(question, row)), 1 << 30)

    def _holds(self, question: int, row: int) -> bool:
        from odqa.text import has_answer

        if (question, row) not in self._known:
            self._known[question, row] = has_answer(self._passages[row].text, self._answers[question])
        return self._known[question, row]
