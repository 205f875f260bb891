"""Real kills: `odqa index`, `odqa run` and `odqa train` die by SIGKILL at random points, are started again until they
are done, and leave the same bytes as if nothing had happened."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from odqa.artifacts import load_artifact, partial_path
from tests.small_world import World, passages, questions, write_jsonl, write_yaml

ROOT = Path(__file__).parents[2]
JOBS = ["index", "run", "run-lm", "train"]
MAY_DIFFER = {"manifest.json", "timings.jsonl"}
"""The manifest has `measured`, timings.jsonl is all seconds."""


@pytest.fixture(scope="module")
def plan(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _plan(world, tmp_path_factory.mktemp("killed"), [1, 2])


@pytest.fixture(scope="module")
def killed(plan: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return _kill(plan)


@pytest.mark.parametrize("name", JOBS)
def test_a_killed_job_leaves_the_bytes_of_one_that_was_not(
    plan: dict[str, Any], killed: dict[str, list[dict[str, Any]]], name: str
) -> None:
    _check(plan, killed, name)


@pytest.mark.parametrize("name", JOBS)
def test_a_job_that_is_started_again_takes_up_what_was_done(killed: dict[str, list[dict[str, Any]]], name: str) -> None:
    """Files of an earlier try are in the result, or the job says at which step or question it goes on."""
    assert all(try_["kills"] for try_ in killed[name])
    assert any(try_["resumed"] or try_["kept"] for try_ in killed[name])
    if name != "index":
        assert any(try_["resumed"] for try_ in killed[name])


@pytest.mark.slow
@pytest.mark.parametrize("first", range(10, 40, 5))
def test_many_more_kills(world: World, tmp_path: Path, first: int) -> None:
    plan = _plan(world, tmp_path, [*range(first, first + 5)])
    killed = _kill(plan)
    for name in JOBS:
        _check(plan, killed, name)


def test_the_installed_command_survives_kills(world: World, tmp_path: Path) -> None:
    """The same through a new interpreter each time, with parts as they are: odqa index of 8,000 passages, BM25."""
    rows = [
        {"id": f"{number}-{copy}", "title": passage.title, "text": f"{passage.text} Copy {copy * 7919 % 104729}."}
        for copy in range(400)
        for number, passage in enumerate(passages(20))
    ]
    source = {"kind": "passages", "file": str(write_jsonl(tmp_path / "many.jsonl", rows))}
    recipe = write_yaml(tmp_path / "many.yaml", {"kind": "index", "passages": source, "bm25": {}})
    command = [sys.executable, "-m", "odqa.cli", "index", str(recipe), "--out"]
    started = time.monotonic()
    _run([*command, str(tmp_path / "whole")])
    seconds = time.monotonic() - started
    chance = random.Random(5)
    codes = [_run([*command, str(tmp_path / "killed")], chance.uniform(0.3, 1) * seconds) for _ in range(4)]
    assert -signal.SIGKILL in codes
    _run([*command, str(tmp_path / "killed")])
    assert _hashes(tmp_path / "killed") == _hashes(tmp_path / "whole")


# --- helpers ----------------------------------------------------------------------------------------------------------


def _plan(world: World, folder: Path, seeds: list[int]) -> dict[str, Any]:
    """What is killed: an index with terms and FAISS vectors, runs of two readers, a training. See tests/killer.py."""
    recipe = yaml.safe_load(world.index.read_text())
    recipe["dense"]["vectors"] = {"faiss": "IVF2,SQ8"}
    index = write_yaml(folder / "index.yaml", recipe)
    training = write_yaml(folder / "training.yaml", _training(world, folder))
    asked = [str(world.questions), "--artifacts", str(world.artifacts), "--set", "batch=2"]
    argv = {
        "index": ["index", str(index)],
        "run": ["run", str(world.pipeline("span")), *asked],
        "run-lm": ["run", str(world.pipeline("lm")), *asked],
        "train": ["train", str(training)],
    }
    for name in JOBS:
        (folder / name).mkdir()
    jobs = {name: {"argv": [*argv[name], "--out", "OUT"], "out": str(folder / name)} for name in JOBS}
    return {"seeds": seeds, "log": str(folder / "log"), "jobs": jobs}


def _kill(plan: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    file = Path(plan["log"]).with_name("plan.json")
    file.write_text(json.dumps(plan), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.killer", str(file)], cwd=ROOT, env=_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return found


def _run(command: list[str], delay: float | None = None) -> int:
    """Exit code of a command, killed after `delay` seconds if it still runs then; without a delay it must succeed."""
    process = subprocess.Popen(command, cwd=ROOT, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, errors = process.communicate(timeout=delay)
    except subprocess.TimeoutExpired:
        process.kill()
        _, errors = process.communicate()
    assert process.returncode in ((0,) if delay is None else (0, -signal.SIGKILL)), errors
    return process.returncode


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _check(plan: dict[str, Any], killed: dict[str, list[dict[str, Any]]], name: str) -> None:
    folder = Path(plan["jobs"][name]["out"])
    expected, whole = _hashes(folder / "whole"), _manifest(folder / "whole")
    for seed, what in zip(plan["seeds"], killed[name], strict=True):
        out = folder / f"killed-{seed}"
        assert load_artifact(out, verify=True)
        assert _hashes(out) == expected, what
        assert _manifest(out) == whole, what
        assert not partial_path(out).exists()
        if name.startswith("run"):
            assert len((out / "timings.jsonl").read_text().splitlines()) == len(questions())


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 of every data file."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name not in MAY_DIFFER)
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _manifest(folder: Path) -> dict[str, Any]:
    """All of the manifest but what was measured."""
    return {key: value for key, value in load_artifact(folder).manifest.items() if key != "measured"}


def _training(world: World, folder: Path) -> dict[str, Any]:
    """Twelve steps on the questions of the small world."""
    known = {passage.id: passage for passage in passages()}
    rows = [
        {
            "id": row["id"],
            "question": row["question"],
            "answers": row["answers"],
            "title": known[row["positive_ids"][0]].title,
            "passage": known[row["positive_ids"][0]].text,
            "negative_ids": ["60"],
            "source": "towns",
        }
        for row in questions()
    ]
    return {
        "kind": "train-span-reader",
        "backbone": str(world.encoder),
        "method": {"kind": "lora", "rank": 2, "alpha": 4},
        "longest": 8,
        "train": str(write_jsonl(folder / "train.jsonl", rows)),
        "passages": [str(world.passages)],
        "groups": {"groups": 2},
        "fit": {"steps": 12, "learning_rates": {"method": 0.01, "head": 0.01}, "evaluate_every": 5},
        "tune": [{"name": "towns", "file": str(world.questions), "limit": 3}],
        "device": "cpu",
    }
