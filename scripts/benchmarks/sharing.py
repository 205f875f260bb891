"""Measures what an evaluation saves when its systems compute equal leading stages once: an eval recipe, on the first
questions of its sets, with and without sharing, a process each; then one more system over the finished runs, and the
same evaluation again. Answers and traces must have the same bytes. CPU seconds beside wall seconds, because the former
stand still when other processes want the machine.
"""

import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import RESULTS, ROOT, save_result

_STAGES = ("retrieve", "rerank", "pack", "read")


@dataclass(frozen=True, slots=True)
class Seconds:
    """What one evaluation took."""

    wall: float
    cpu: float

    def as_json(self) -> dict[str, float]:
        """Say it as the result file does."""
        return {"wall": round(self.wall, 1), "cpu": round(self.cpu, 1)}


def sharing(
    recipe: Annotated[str, typer.Argument(help="An eval recipe whose index is built.")] = "eval/table2-mini.yaml",
    limit: Annotated[int, typer.Option(min=1, help="Questions of each set.")] = 30,
    sets: Annotated[int, typer.Option(min=1, help="Question sets of the recipe, the first ones.")] = 2,
    out: Annotated[Path, typer.Option(help="Where the result goes; a table beside it.")] = RESULTS / "sharing.json",
) -> None:
    """An evaluation with and without shared stages: seconds, and equal bytes."""
    limits = [f"--set=questions.{number}.limit={limit}" for number in range(sets)]
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: Path(folder) / name for name in ("shared", "apart")}
        seconds = {
            "apart": _evaluate(recipe, runs["apart"], [*limits, "--no-share"]),
            "shared": _evaluate(recipe, runs["shared"], limits),
        }
        last = _last_system(recipe)
        one_more = [*limits, f"--set=pipelines=[{json.dumps(_another_budget(last))}]", "--set=gains=[]"]
        seconds["one more system, nothing to share"] = _evaluate(recipe, Path(folder) / "alone", one_more)
        seconds["one more system over the finished runs"] = _evaluate(recipe, runs["shared"], one_more)
        seconds["the same evaluation again"] = _evaluate(recipe, runs["shared"], limits)
        systems = {name: _measured(path) for name, path in runs.items()}
        differing = [
            run for run, found in systems["apart"].items() if systems["shared"][run]["bytes"] != found["bytes"]
        ]
    if differing:
        typer.echo(f"other answers or traces with sharing: {', '.join(differing)}", err=True)
        raise typer.Exit(1)
    stages = {name: _stage_seconds(found) for name, found in systems.items()}
    result = {
        "what": "seconds of `odqa eval`, a process each, with and without sharing; equal answers and traces",
        "recipe": recipe,
        "systems": len(systems["apart"]) // sets,
        "question_sets": sets,
        "questions_a_set": limit,
        "seconds": {name: value.as_json() for name, value in seconds.items()},
        "ratio": {
            "wall": round(seconds["apart"].wall / seconds["shared"].wall, 2),
            "cpu": round(seconds["apart"].cpu / seconds["shared"].cpu, 2),
        },
        "seconds_by_stage": stages,
        "equal_bytes": True,
    }
    save_result(out, result)
    table = _table(result)
    out.with_suffix(".md").write_text(table, encoding="utf-8")
    typer.echo(table)


def _evaluate(recipe: str, out: Path, options: list[str]) -> Seconds:
    """Wall and CPU seconds of one evaluation, from the shell to the report."""
    command = [sys.executable, "-m", "odqa.cli", "eval", recipe, "--out", str(out), *options]
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 1):  # 1: a number of the recipe is missed, which few questions may do
        typer.echo(done.stderr[-2000:], err=True)
        raise typer.Exit(2)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Seconds(time.perf_counter() - started, cpu)


def _last_system(recipe: str) -> dict[str, Any]:
    from odqa import config
    from odqa.recipes import load_recipe

    settings = load_recipe(recipe, "eval").settings
    assert isinstance(settings, config.EvalRecipe)
    last = settings.pipelines[-1]
    return {"recipe": last.recipe, "name": last.name, "set": dict(last.set)}


def _another_budget(system: dict[str, Any]) -> dict[str, Any]:
    """The same leading stages, another packing."""
    return {**system, "name": "one-more", "set": {**system["set"], "packer.budget": 256}}


def _measured(root: Path) -> dict[str, dict[str, Any]]:
    """By system and question set: seconds of the stages, and a hash of answers and traces."""
    found = {}
    for manifest in sorted(root.glob("*/*/*/manifest.json")):
        record = json.loads(manifest.read_text(encoding="utf-8"))
        folder = manifest.parent
        name = f"{re.sub('-[0-9a-f]{8}$', '', folder.parent.name)}/{folder.name}"
        digest = hashlib.sha256(b"".join((folder / file).read_bytes() for file in ("answers.jsonl", "traces.jsonl")))
        found[name] = {"stages": record["measured"]["stages"], "bytes": digest.hexdigest()}
    return {name: one for name, one in found.items() if not name.startswith("one-more/")}


def _stage_seconds(systems: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Seconds of each stage over all systems."""
    return {
        stage: round(sum(one["stages"].get(stage, {}).get("seconds", 0.0) for one in systems.values()), 1)
        for stage in _STAGES
    }


def _table(result: dict[str, Any]) -> str:
    """The result as markdown."""
    seconds, stages = result["seconds"], result["seconds_by_stage"]
    rows = [
        f"| {stage}, wall seconds | {stages['apart'][stage]:.1f} | {stages['shared'][stage]:.1f} | |"
        for stage in stages["apart"]
    ]
    rows += [
        f"| shell to report, {kind} seconds | {seconds['apart'][kind]:.1f} | {seconds['shared'][kind]:.1f} | "
        f"{result['ratio'][kind]:.2f} |"
        for kind in ("wall", "cpu")
    ]
    more = {name: f"{one['cpu']:.1f} CPU seconds ({one['wall']:.1f} wall)" for name, one in seconds.items()}
    lines = [
        f"# `{result['recipe']}` with and without shared stages",
        "",
        f"{result['systems']} systems, {result['question_sets']} sets of {result['questions_a_set']} questions; a "
        "process each, one after the other, on a machine that others used too. Answers and traces have the same bytes.",
        "",
        "| | each system by itself (`--no-share`) | shared | ratio |",
        "| --- | ---: | ---: | ---: |",
        *rows,
        "",
        "One more system with the leading stages of the last one takes "
        f"{more['one more system over the finished runs']} over the finished runs and "
        f"{more['one more system, nothing to share']} elsewhere; the same evaluation again takes "
        f"{more['the same evaluation again']}, most of it for loading.",
    ]
    return "\n".join(lines) + "\n"
