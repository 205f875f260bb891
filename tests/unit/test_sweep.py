"""Comparing learning rates: what is kept, what is not touched, that a killed sweep goes on, and what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from odqa import training
from odqa.artifacts import load_artifact
from odqa.errors import DataError, RecipeError
from odqa.recipes import Places, load_recipe
from tests.command_line import ok, refused
from tests.small_world import passages, questions, write_jsonl, write_yaml
from tests.tiny_models import tiny_llama


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompt tuning of a tiny model that answers closed-book questions in packed contexts of one passage."""
    folder = tmp_path_factory.mktemp("sweep")
    rows, text = questions(4), {passage.id: passage for passage in passages()}
    write_jsonl(folder / "tune.jsonl", rows[:2])
    found = [text[row["positive_ids"][0]] for row in rows]
    examples = [row | {"title": p.title, "passage": p.text} for row, p in zip(rows, found, strict=True)]
    write_jsonl(folder / "train.jsonl", examples)
    listed = [{"id": p.id, "title": p.title, "text": p.text} for p in passages(20)]
    source = {"kind": "passages", "file": str(write_jsonl(folder / "passages.jsonl", listed))}
    write_yaml(folder / "index.yaml", {"kind": "index", "passages": source, "bm25": {}})
    model = tiny_llama(folder / "model", window=512)
    reader = {"kind": "lm", "model": str(model), "max_new_tokens": 2, "device": "cpu", "dtype": "float32"}
    first = {"kind": "pipeline", "index": str(folder / "index.yaml"), "retriever": {"kind": "bm25"}, "k": 2}
    write_yaml(folder / "pipeline.yaml", first | {"packer": {"budget": 400}, "reader": reader})
    return write_yaml(
        folder / "prompt.yaml",
        {
            "kind": "train-lm-reader",
            "pipeline": str(folder / "pipeline.yaml"),
            "method": {"kind": "prompt-tuning", "length": 2},
            "train": str(folder / "train.jsonl"),
            "passages": [str(folder / "passages.jsonl")],
            "contexts": {"questions": 2},
            "fit": {"steps": 8, "learning_rates": {"method": 0.01}, "evaluate_every": 4, "keep_best": "tune.f1"},
            "tune": [{"name": "towns", "file": str(folder / "tune.jsonl")}],
            "autocast": False,
        },
    )


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    return record


def test_rates_are_compared_on_tune_beside_the_recipes_own_artifact(recipe: Path, tmp_path: Path) -> None:
    trained = Path(ok("train", recipe, "--artifacts", tmp_path).out.strip())
    before = (trained / "method.safetensors").read_bytes()
    swept = ok("train", recipe, "--sweep", "0.1,0.001", "--steps", "3", "--artifacts", tmp_path)
    record = record_of(tmp_path / "prompt-sweep")
    # The metric is what keep_best names; rates stand in order, the best one is marked.
    assert record["metric"] == "tune.f1" and record["steps"] == 3 and set(record["scores"]) == {"0.001", "0.1"}
    lines = [line.split() for line in swept.out.splitlines()]
    assert [line[0] for line in lines[:2]] == ["0.001", "0.1"] and "after 3 steps" in swept.out
    assert [line[0] for line in lines if line[-1] == "best"] == [f"{record['best']:g}"]
    assert (trained / "method.safetensors").read_bytes() == before
    # Curves are kept, trained values are not.
    artifact = load_artifact(tmp_path / "prompt-sweep", training.SWEEP, verify=True)
    assert sorted(artifact.manifest["files"]) == ["curve-0.001.json", "curve-0.1.json", "sweep.json"]
    assert not list(artifact.path.rglob("*.safetensors"))
    curve = json.loads((artifact.path / "curve-0.1.json").read_text())
    assert curve[-1]["step"] == 3 and curve[-1]["tune.f1"] == record["scores"]["0.1"]


def test_without_rates_five_around_the_recipes_own_and_a_quarter_of_its_steps(recipe: Path, tmp_path: Path) -> None:
    swept = ok("train", recipe, "--sweep", "around", "--artifacts", tmp_path, "--json").json
    assert sorted(map(float, swept["scores"])) == [0.00111, 0.00333, 0.01, 0.03, 0.09] and swept["steps"] == 2
    assert "swept already" in ok("train", recipe, "--sweep", "around", "--artifacts", tmp_path).err


def test_a_killed_sweep_goes_on_with_the_rates_that_are_left(recipe: Path, tmp_path: Path) -> None:
    places = Places(artifacts=tmp_path)
    said: list[str] = []

    def die(line: str) -> None:
        said.append(line)
        if len([entry for entry in said if entry.startswith("learning rate")]) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.sweep(recipe, [0.1, 0.001], steps=2, places=places, log=die)
    said.clear()
    training.sweep(recipe, [0.1, 0.001], steps=2, places=places, log=said.append)
    assert len([line for line in said if line.startswith("step 2 ")]) == 1
    again = training.sweep(recipe, [0.1, 0.001], steps=2, places=places, out=tmp_path / "whole")
    assert record_of(tmp_path / "prompt-sweep") == record_of(again.path)


def test_a_rate_that_diverges_is_out(recipe: Path, tmp_path: Path) -> None:
    # Weight decay multiplies by 1 - 1e37 a step: what is trained is infinite after the second one.
    decayed = ("fit.weight_decay=1",)
    swept = ok("train", recipe, "--sweep", "0.001,1e37", "--steps", "4", "--artifacts", tmp_path, "--set", *decayed)
    record = record_of(tmp_path / "prompt-sweep")
    assert record["scores"]["1e+37"] is None and record["best"] == 0.001 and "diverged" in swept.out
    with pytest.raises(DataError, match=r"every learning rate of .* diverged"):
        training.sweep(recipe, [1e37], steps=4, places=Places(artifacts=tmp_path), changes=decayed)


def test_what_cannot_be_compared_is_refused(recipe: Path, tmp_path: Path) -> None:
    line = refused("train", recipe, "--sweep", "0.1,x")
    assert line == "RecipeError: --sweep 0.1,x: expected learning rates above 0 such as 0.01,0.03,0.1, or around."
    assert refused("train", recipe, "--steps", "3").startswith("RecipeError: --steps goes with --sweep.")
    assert "compared on tune questions" in refused("train", recipe, "--sweep", "0.1", "--set", "tune=[]")
    other = load_recipe("pipelines/reranker-lora.yaml")
    with pytest.raises(RecipeError, match="for recipes of kind train-lm-reader only"):
        training.sweep(other, [0.1])


def test_a_training_leaves_its_curve_as_a_picture(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = Places(artifacts=tmp_path)
    pytest.importorskip("matplotlib", reason="pictures need the extra plots")
    drawn = training.train(recipe, places=places, out=tmp_path / "drawn")
    assert "<svg" in (drawn.path / training.PICTURE).read_text(encoding="utf-8")
    assert training.PICTURE not in drawn.manifest["files"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # import matplotlib now fails
    said: list[str] = []
    plain = training.train(recipe, places=places, out=tmp_path / "plain", log=said.append)
    assert plain.hash == drawn.hash and not (plain.path / training.PICTURE).exists()
    assert any(line.startswith("the picture of the loss is missing.") and "odqa[plots]" in line for line in said)
