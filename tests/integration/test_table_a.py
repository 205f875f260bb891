"""The lab of tables A and D as a whole, on a tiny odqa-mini with random weights and invented towns."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.small_world import World, passages, questions, write_jsonl, write_yaml
from tests.tiny_models import tiny_odqa_mini

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/table_a.py"


@pytest.fixture(scope="module")
def base(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base recipe of four steps, in a folder that has the data that the lab asks for."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "nq-mini").mkdir()
    rows = questions()
    write_jsonl(folder / "nq-mini/nq_dev.jsonl", rows[:6])
    write_jsonl(folder / "nq-mini/squad_dev.jsonl", rows[6:10])
    write_jsonl(folder / "squad_tune.jsonl", rows[10:])
    write_jsonl(folder / "nq_tune.jsonl", rows[:2])
    text = {passage.id: passage for passage in passages()}
    examples = [
        row
        | {
            "source": "squad11-train" if number % 2 else "nq-mini-train",
            "title": text[row["positive_ids"][0]].title,
            "passage": text[row["positive_ids"][0]].text,
            "negative_ids": [],
        }
        for number, row in enumerate(rows)
    ]
    write_jsonl(folder / "train.jsonl", examples)
    model = tiny_odqa_mini(folder / "model", window=512)
    reader = {"kind": "lm", "model": str(model), "prompt": "odqa-mini", "max_new_tokens": 4}
    reader |= {"device": "cpu", "dtype": "float32"}
    pipeline = world.pipeline_recipe({"kind": "bm25"}, reader) | {"index": str(world.artifacts / "towns")}
    write_yaml(folder / "pipeline.yaml", pipeline | {"packer": {"budget": 500}})
    recipe = {
        "kind": "train-lm-reader",
        "pipeline": str(folder / "pipeline.yaml"),
        "method": {"kind": "prompt-tuning", "length": 50},
        "train": str(folder / "train.jsonl"),
        "passages": [str(world.passages)],
        "contexts": {"questions": 2, "examples": 6},
        "fit": {"steps": 4, "learning_rates": {"method": 0.01}},
        "tune": [{"name": name, "file": str(folder / f"{name}.jsonl")} for name in ("nq_tune", "squad_tune")],
        "autocast": False,
    }
    return write_yaml(folder / "base.yaml", recipe)


def run(base: Path, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    places = ["--data", str(base.parent), "--artifacts", str(base.parent / "artifacts")]
    places += ["--runs", str(base.parent / "runs"), "--base", str(base)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), *places, *arguments])
        runpy.run_path(str(SCRIPT), run_name="__main__")


def result(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def test_the_lab_trains_answers_and_says_what_was_forgotten_and_goes_on(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ("--rows", "in-context", "fine-tuning", "random-prompt-50", "--sweep", "--limit", "3", "--out")
    run(base, *arguments, str(tmp_path / "a"), monkeypatch=monkeypatch)
    record = result(tmp_path / "a.json")
    rows = {row["row"]: row for row in record["rows"]}
    assert list(rows) == ["none", "in-context", "fine-tuning", "random-prompt-50"]
    assert record["questions"]["nq_dev"]["n"] == record["questions"]["squad_dev"]["n"] == 3
    assert record["command"].startswith("python scripts/table_a.py --data DIR --sweep --rows in-context")
    assert str(base.parent) not in record["command"]
    none, tuned, control = rows["none"], rows["fine-tuning"], rows["random-prompt-50"]
    assert none["trained"] == none["bytes"] == 0 and "em_above_none" not in none["nq_dev"]
    assert tuned["share"] == 1.0 and tuned["bytes"] > 4 * tuned["trained"]
    assert tuned["loss"] != none["loss"] and set(none["loss"]) == {"cloze", "denoise", "complete", "title", "mean"}
    assert control["trained"] == 50 * 32 and "loss" not in control and tuned["nq_dev"]["em_above_none"]["value"] <= 100
    assert rows["in-context"]["seeds"] == [0, 1, 2] and len(rows["in-context"]["nq_dev"]["em_by_seed"]) == 3
    assert all(row[name]["seconds_a_question"] > 0 for row in rows.values() for name in ("nq_dev", "squad_dev"))
    # The learning rate is the sweep's, whose kinds are those of the rows.
    assert set(record["sweeps"]) == {"prompt-tuning", "fine-tuning"}
    assert tuned["trainings"][0]["learning_rate"] == record["sweeps"]["fine-tuning"]["best"]
    table = (tmp_path / "a.md").read_text(encoding="utf-8")
    assert "| fine-tuning | 1 |" in " ".join(table.split()) and "random weights with a prompt have" in table

    said = capsys.readouterr().err
    assert "the ranking is taken from" in said
    run(base, *arguments, str(tmp_path / "again"), monkeypatch=monkeypatch)
    said = capsys.readouterr().err
    assert said.count("trained already") == 2 and said.count("swept already") == 2
    assert said.count("answered already") == 2 * 6  # six systems on two sets
    again = result(tmp_path / "again.json")
    assert again["rows"] == record["rows"]


def test_table_d_is_trained_and_tuned_on_squad_alone(
    base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run(base, "--shift", "--rows", "deep-prompt", "--out", str(tmp_path / "d"), monkeypatch=monkeypatch)
    record = result(tmp_path / "d.json")
    assert [row["row"] for row in record["rows"]] == ["none", "deep-prompt"] and record["table"] == "table-d"
    manifest = result(base.parent / "artifacts/table-d/deep-prompt/manifest.json")
    assert manifest["counts"]["examples"] == 6  # of 12, all from SQuAD: every second one
    assert manifest["recipe"]["contexts"]["source_weights"]["nq-mini-train"] == 0
    assert [tune["name"] for tune in manifest["recipe"]["tune"]] == ["squad_tune"]
