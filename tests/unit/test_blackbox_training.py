"""`trainer: blackbox` in a recipe: a prompt that a pipeline reads with, found without a gradient, resumed, refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from odqa import training
from odqa.artifacts import load_artifact
from odqa.errors import RecipeError
from odqa.recipes import Places, load_recipe
from tests.command_line import ok, refused
from tests.small_world import passages, questions, write_jsonl, write_yaml
from tests.tiny_models import tiny_llama


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Black-box tuning of two word vectors of a tiny model, on packed contexts of one passage."""
    folder = tmp_path_factory.mktemp("blackbox")
    rows, text = questions(4), {passage.id: passage for passage in passages()}
    write_jsonl(folder / "tune.jsonl", rows[:2])
    found = [text[row["positive_ids"][0]] for row in rows]
    examples = [row | {"title": p.title, "passage": p.text} for row, p in zip(rows, found, strict=True)]
    write_jsonl(folder / "train.jsonl", examples)
    listed = [{"id": p.id, "title": p.title, "text": p.text} for p in passages(20)]
    source = {"kind": "passages", "file": str(write_jsonl(folder / "passages.jsonl", listed))}
    write_yaml(folder / "index.yaml", {"kind": "index", "passages": source, "bm25": {}})
    reader = {"kind": "lm", "model": str(tiny_llama(folder / "model", window=512)), "max_new_tokens": 2}
    reader |= {"device": "cpu", "dtype": "float32"}
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
            "trainer": {"kind": "blackbox", "calls": 24, "population": 4, "dimensions": 8, "tune_every": 2},
            "tune": [{"name": "towns", "file": str(folder / "tune.jsonl")}],
        },
    )


def test_a_searched_prompt_is_one_that_a_pipeline_reads_with(recipe: Path, tmp_path: Path) -> None:
    folder = Path(ok("train", recipe, "--artifacts", tmp_path).out.strip())
    artifact = load_artifact(folder, "method", verify=True)
    curve = json.loads((folder / "curve.json").read_text())
    assert [entry["calls"] for entry in curve] == [0, 8, 16, 24]
    assert curve[-1]["tune"] > curve[0]["tune"] and {"tune.em", "tune.f1"} <= set(curve[-1])
    counts = artifact.manifest["counts"]
    assert (counts["calls"], counts["questions_seen"], counts["trainable"]) == (24, 48, 8)
    assert counts["tune_calls"] == 1 + 2 * 3 and not (folder / "journal.jsonl").exists()
    pipeline = Path(yaml.safe_load(recipe.read_text())["pipeline"])
    answered = ok("ask", pipeline, "--set", f"reader.method={folder}", "--artifacts", tmp_path, "who").out
    assert isinstance(answered, str)
    assert "trained already" in ok("train", recipe, "--artifacts", tmp_path).err


def test_a_search_starts_from_a_prompt_that_was_trained_before(recipe: Path, tmp_path: Path) -> None:
    """Such as a provider's own p0: what it gives on tune is where the new search begins."""
    first = Path(ok("train", recipe, "--artifacts", tmp_path).out.strip())
    changes = ("--set", f"start={first}", "--set", "trainer.seed=2", "--out", tmp_path / "on")
    later = Path(ok("train", recipe, *changes, "--artifacts", tmp_path).out.strip())
    before, after = (json.loads((folder / "curve.json").read_text()) for folder in (first, later))
    assert after[0]["tune"] == pytest.approx(before[-1]["tune"], abs=1e-6)
    assert after[-1]["tune"] >= after[0]["tune"]


def test_a_killed_search_ends_with_the_same_bytes(recipe: Path, tmp_path: Path) -> None:
    def train(name: str, log: Any) -> Path:
        return training.train(recipe, places=Places(artifacts=tmp_path), out=tmp_path / name, log=log).path

    def die(line: str) -> None:
        if line.startswith("step 4"):
            raise KeyboardInterrupt

    whole = train("whole", lambda line: None)
    with pytest.raises(KeyboardInterrupt):
        train("parts", die)
    said: list[str] = []
    parts = train("parts", said.append)
    assert "resumed after 4 of 6 generations" in said
    for name in ("method.safetensors", "curve.json"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


def test_a_recipe_that_cannot_be_searched_is_one_clear_error(recipe: Path, tmp_path: Path) -> None:
    fit = "fit={steps: 2, learning_rates: {method: 0.1}}"
    for change, message in {
        "trainer=null": "trained by gradients (fit) or by a trainer. Give one of them",
        fit: "trained by gradients (fit) or by a trainer. Give one of them",
        "method={kind: lora}": "trainer blackbox searches for a prompt; the method is lora. Use prompt-tuning.",
        "tune=[]": "trainer blackbox chooses by tune questions",
        "trainer.calls=3": "the budget of 3 calls is smaller than one generation (4)",
        "trainer.seed=0": "seed",
    }.items():
        assert message in refused("train", recipe, "--set", change, "--artifacts", tmp_path)
    with pytest.raises(RecipeError, match="its trainer has no learning rates"):
        training.sweep(recipe, [0.1], places=Places(artifacts=tmp_path))


def test_recipes_from_before_there_were_trainers_keep_their_hashes() -> None:
    resolved = load_recipe("pipelines/mini-prompt-50.yaml").resolved
    assert "trainer" not in resolved and resolved["fit"]["steps"] == 250
