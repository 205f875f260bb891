"""Measures wall seconds from the shell to the answer with a built index, of `odqa --help`, and milliseconds a
question in one process, with the pipeline's re-ranker and without, in turns; with --index also what the index's
manifest says of its building.

On a machine that others use, wall time says what they did; processor time, and the ratio of the two systems, say less
of them.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.common import RESULTS, processor, save_result, sha256
from odqa.runtime import progress

if TYPE_CHECKING:
    from odqa.jobs import Loaded


def latency(
    pipeline: Annotated[str, typer.Argument(help="A pipeline recipe whose index is built.")],
    questions: Annotated[Path, typer.Argument(help="A question file; the first 60 questions are asked.")],
    index: Annotated[Path | None, typer.Option(help="An index folder, to report how long it took to build.")] = None,
    repeats: int = 5,
    out: Path = RESULTS / "bench-latency.json",
) -> None:
    """How long a person waits: from the shell to the answer, and a question in one process."""
    import torch

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
    systems = {"as it is": jobs.load_pipeline(pipeline)}
    settings = systems["as it is"].settings
    if settings.reranker is not None:
        without = ["reranker=null"]
        if settings.packer.trim is not None and settings.packer.needs_reranker:
            by_terms = settings.packer.trim.model_dump(include={"sentences", "around", "whole"})
            without.append(f"packer.trim={json.dumps(by_terms)}")
        systems["without re-ranker"] = jobs.load_pipeline(pipeline, changes=without)
    result["threads"] = torch.get_num_threads()
    result["question_milliseconds"] = _questions(systems, [query.text for query in asked])
    if index is not None:
        artifact = load_artifact(index, "index")
        result["index"] = {"counts": artifact.manifest["counts"], "measured": artifact.manifest["measured"]}
    save_result(out, result)
    print(json.dumps(result, indent=1))


def _questions(systems: "dict[str, Loaded]", asked: list[str]) -> dict[str, dict[str, object]]:
    """Milliseconds a question by system: wall, processor time of all threads, and the wall time of each stage."""
    wall: dict[str, list[float]] = {name: [] for name in systems}
    processor_time: dict[str, list[float]] = {name: [] for name in systems}
    stages: dict[str, dict[str, list[float]]] = {name: {} for name in systems}
    for loaded in systems.values():
        loaded.ask(asked[0])
    for text in asked:
        for name, loaded in systems.items():
            started, used = time.perf_counter(), time.process_time()
            trace = loaded.ask(text)
            wall[name].append(1000 * (time.perf_counter() - started))
            processor_time[name].append(1000 * (time.process_time() - used))
            for step in trace.steps:
                stages[name].setdefault(step.stage, []).append(1000 * step.seconds)
    return {
        name: {
            **_summary(wall[name]),
            "processor": _summary(processor_time[name]),
            "stages": {stage: _summary(found) for stage, found in stages[name].items()},
        }
        for name in systems
    }


def _summary(milliseconds: list[float]) -> dict[str, float]:
    ordered = sorted(milliseconds)
    return {"median": round(statistics.median(ordered), 1), "p95": round(ordered[int(0.95 * len(ordered))], 1)}


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
