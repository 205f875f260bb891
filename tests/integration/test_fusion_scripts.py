"""The commands that choose alpha on tune questions and that compare number formats, on a small index."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from odqa import jobs
from odqa.recipes import Places, load_recipe
from odqa.retrieve.fuse import alpha_fusion
from odqa.text import has_answer
from tests.small_world import World, questions, write_jsonl, write_yaml

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def pipeline(world: World, tmp_path: Path) -> Path:
    """A pipeline over the small world's index, its alpha not chosen yet, with comments."""
    retriever = {"kind": "alpha-hybrid", "alpha": 0.25, "depth": 30}
    reader = {"kind": "span", "model": str(world.reader), "device": "cpu", "dtype": "float32"}
    recipe = world.pipeline_recipe(retriever, reader) | {"index": str(world.artifacts / "towns")}
    path = write_yaml(tmp_path / "hybrid.yaml", recipe)
    path.write_text("# Keep me: alpha\n" + path.read_text().replace("alpha: 0.25", "alpha: 0.25  # ours"))
    return path


def run(script: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    try:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_alpha_is_chosen_on_tune_printed_left_in_a_file_and_written_into_the_recipe(
    world: World, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_jsonl(tmp_path / "squad_tune.jsonl", questions()[6:])
    before, out = pipeline.read_text(), tmp_path / "results" / "alpha.json"
    grid = ("--alphas", "0:200:50", "--at", 1, "--at", 5, "--limit", 4)
    files = (pipeline, world.questions, other)
    assert (
        run("tune_fusion.py", "alpha", *files, *grid, "--write", pipeline, "--out", out, monkeypatch=monkeypatch) == 0
    )
    result = json.loads(out.read_text())
    assert [row["alpha"] for row in result["alphas"]] == [0, 50, 100, 150, 200]
    # The means again, from the searchers themselves: 4 questions of each file, cutoffs 1 and 5.
    index = jobs.build_index(world.index, places=Places(artifacts=world.artifacts))
    for row in result["alphas"]:
        recalls = []
        for rows in (questions()[:4], questions()[6:10]):
            texts = [question["question"] for question in rows]
            runs = [searcher.search(texts, 30) for searcher in (index.bm25, index.dense)]
            fused = alpha_fusion(*runs, 5, alpha=row["alpha"]).rows.tolist()
            for k in (1, 5):
                found = [
                    any(has_answer(index.store[place].text, question["answers"]) for place in places[:k])
                    for places, question in zip(fused, rows, strict=True)
                ]
                recalls.append(100 * np.mean(found))
        assert row["mean"] == pytest.approx(np.mean(recalls), abs=1e-3)
    best = max(row["mean"] for row in result["alphas"])
    assert result["chosen"] == min(row["alpha"] for row in result["alphas"] if row["mean"] == best) > 0
    assert {name: entry["n"] for name, entry in result["questions"].items()} == {world.questions.name: 4, other.name: 4}
    chosen = f"{result['chosen']:g}"
    printed = capsys.readouterr()
    assert f"chosen alpha: {chosen} (mean {best:.2f}; the recipe has 0.25)" in printed.out
    assert pipeline.read_text() == before.replace("alpha: 0.25  # ours", f"alpha: {result['chosen']}  # ours")
    assert load_recipe(pipeline).settings.retriever.alpha == result["chosen"]  # type: ignore[attr-defined]
    assert str(tmp_path) not in json.dumps(result["questions"]) + json.dumps(result["index"])


@pytest.mark.parametrize(
    ("change", "options", "told"),
    [
        ("kind: dense", (), "its retriever is dense; only alpha-hybrid has an alpha to choose."),
        (None, ("--alphas", "2:1:0.1"), "--alphas 2:1:0.1: expected 0 <= FROM <= TO and a STEP above 0."),
        (None, ("--alphas", "0:1"), "--alphas 0:1: expected FROM:TO:STEP, such as 0:2:0.1, or one number."),
        (None, ("--write", "nowhere.yaml"), "--write nowhere.yaml: no such file here. Copy a recipe there first."),
        (None, ("--index", "nowhere"), "nowhere: the index is not built yet. Build it with: odqa index "),
    ],
)
def test_bad_input_of_alpha_is_one_line_and_leaves_nothing(
    world: World,
    pipeline: Path,
    tmp_path: Path,
    change: str | None,
    options: tuple[str, ...],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if change is not None:
        recipe = world.pipeline_recipe({"kind": "dense"}, {"kind": "span", "model": str(world.reader)})
        write_yaml(pipeline, recipe)
    out = tmp_path / "alpha.json"
    code = run("tune_fusion.py", "alpha", pipeline, world.questions, *options, "--out", out, monkeypatch=monkeypatch)
    printed = capsys.readouterr()
    assert (code, printed.out, printed.err.count("\n")) == (2, "", 1) and told in printed.err
    assert not out.exists()


def test_two_number_formats_are_compared(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "precision.json"
    assert run("bench.py", "precision", world.index, world.questions, "--out", out, monkeypatch=monkeypatch) == 0
    result = json.loads(out.read_text())
    (row,) = result["sets"]
    assert (row["n"], result["passages"]) == (12, 60)
    assert 0.5 < row["top_20_overlap"] <= 1  # a random encoder of wide weights feels bfloat16's 8 bits
    # 60 passages, cut at 100: every answer is found in both.
    assert row["float32"]["recall@100"] == row["bfloat16"]["recall@100"] == 100
    assert row["float32"]["recall@1"] <= row["float32"]["recall@5"] <= row["float32"]["recall@20"]


def test_two_number_formats_can_be_compared_on_a_sample(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "precision.json"
    options = ("--passages", "20", "--out", out)
    assert run("bench.py", "precision", world.index, world.questions, *options, monkeypatch=monkeypatch) == 0
    result = json.loads(out.read_text())
    (row,) = result["sets"]
    assert result["passages"] == 20 and row["top_20_overlap"] == 1  # all of them
    # Every third passage, the 1st, 4th, ... of 60; asked about are the 1st, 6th, 11th, ...: four of twelve are there.
    assert row["float32"]["recall@100"] == row["bfloat16"]["recall@100"] == pytest.approx(100 * 4 / 12, abs=0.01)


def test_overlap_counts_rows_that_both_tops_have() -> None:
    from odqa.retrieve.rankings import Rankings

    top_overlap = runpy.run_path(str(SCRIPTS / "bench.py"))["precision"].top_overlap

    def of(*rows: list[int]) -> Rankings:
        array = np.array(rows, np.int64)
        return Rankings(array, np.zeros(array.shape, np.float32), "x")

    # 2 of 3 in common; the order does not matter; a list of one hit against one of two shares 1 of 2
    assert top_overlap(of([1, 2, 3]), of([3, 9, 1]), 3) == pytest.approx(2 / 3)
    assert top_overlap(of([1, 2, 3], [4, -1, -1]), of([2, 1, 3], [4, 5, -1]), 3) == pytest.approx((1 + 1 / 2) / 2)
