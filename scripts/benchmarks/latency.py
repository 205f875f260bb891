"""Measures wall seconds from the shell to the answer with a built index, of `odqa --help`, and milliseconds a
question in one process; with --index also what the index's manifest says of its building.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import RESULTS, processor, save_result, sha256
from odqa.runtime import progress


def latency(
    pipeline: Annotated[str, typer.Argument(help="A pipeline recipe whose index is built.")],
    questions: Annotated[Path, typer.Argument(help="A question file; the first 60 questions are asked.")],
    index: Annotated[Path | None, typer.Option(help="An index folder, to report how long it took to build.")] = None,
    repeats: int = 5,
    out: Path = RESULTS / "bench-latency.json",
) -> None:
    """How long a person waits: from the shell to the answer, and a question in one process."""
    from odqa import jobs
    from odqa.artifacts import load_artifact
    from odqa.corpus.io import read_questions

    asked = read_questions(questions)[:60]
    odqa = [sys.executable, "-m", "odqa.cli"]
    result: dict[str, object] = {
        "pipeline": pipeline,
        "questions": {"name": questions.name, "sha256": sha256(questions), "n": len(asked)},
        "processor": processor(),
        "shell_to_answer_seconds": _wall([*odqa, "ask", pipeline, asked[0].text, "--quiet"], repeats),
        "help_seconds": _wall([*odqa, "--help"], repeats),
    }
    loaded = jobs.load_pipeline(pipeline)
    loaded.ask(asked[0].text)
    milliseconds = []
    for query in asked:
        started = time.perf_counter()
        loaded.ask(query.text)
        milliseconds.append(1000 * (time.perf_counter() - started))
    milliseconds.sort()
    result["question_milliseconds"] = {
        "median": round(statistics.median(milliseconds), 1),
        "p95": round(milliseconds[int(0.95 * len(milliseconds))], 1),
    }
    if index is not None:
        artifact = load_artifact(index, "index")
        result["index"] = {"counts": artifact.manifest["counts"], "measured": artifact.manifest["measured"]}
    save_result(out, result)
    print(json.dumps(result, indent=1))


def _wall(command: list[str], repeats: int) -> dict[str, float]:
    """Wall seconds of a command after one warm-up: median, minimum and maximum."""
    seconds = []
    with progress("bench", repeats + 1, "runs") as bar:
        for _ in bar.over(range(repeats + 1)):
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds.append(time.perf_counter() - started)
    counted = seconds[1:]
    return {
        "median": round(statistics.median(counted), 2),
        "min": round(min(counted), 2),
        "max": round(max(counted), 2),
    }
