"""`odqa report` of real small runs, and what eval recipes say of a collection's ceiling and of questions left out."""

import json
from pathlib import Path

import pytest

from tests.command_line import ok, refused
from tests.small_world import World, questions, write_jsonl, write_yaml


@pytest.fixture(scope="module")
def out(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of the small world's evaluation, with its ceiling."""
    folder = tmp_path_factory.mktemp("runs")
    ok("eval", world.eval, "--artifacts", world.artifacts, "--out", folder, "--set", "ceiling=true")
    return folder


def test_a_folder_of_an_evaluation_becomes_one_comparison(world: World, out: Path) -> None:
    (evaluation,) = [path for path in out.iterdir() if path.is_dir()]
    told = ok("report", evaluation, "--artifacts", world.artifacts, "--sample", "5")
    assert told.out == f"{evaluation / 'report.html'}\n"
    page = (evaluation / "report.html").read_text(encoding="utf-8")
    assert "dense against span" in page and page.count('class="card"') == 5
    found = ok("report", evaluation, "--artifacts", world.artifacts, "--json").json
    assert [system["system"] for system in found["systems"]] == ["span", "dense"]
    assert sum(group["n"] for group in found["systems"][0]["by_question_word"]) == 12
    assert found["systems"][0]["recall"]["retrieved"][0][:2] == [1, 100.0]


def test_one_run_becomes_a_page_or_markdown(world: World, out: Path, tmp_path: Path) -> None:
    (run,) = out.glob("*/span-*/towns")
    ok("report", run, "--out", tmp_path / "r.md", "--artifacts", world.artifacts)
    paper = (tmp_path / "r.md").read_text(encoding="utf-8")
    assert paper.startswith("# towns\n") and "exact match by answer type" in paper
    ok("report", run, "--out", tmp_path / "r.html", "--artifacts", tmp_path / "none")  # without the index, too
    assert "<!doctype html>" in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "is written as .html or .md" in refused("report", run, "--out", tmp_path / "r.pdf")
    assert "neither a run nor a folder of" in refused("report", tmp_path)


def test_the_ceiling_counts_answers_in_the_whole_collection_and_is_kept(world: World, out: Path) -> None:
    for scores in out.glob("*/*/towns/scores.json"):
        found = {score["name"]: score for score in json.loads(scores.read_text())["scores"]}
        assert (found["ceiling"]["value"], found["ceiling"]["n"]) == (100.0, 12)  # every town has its passage
        assert found["ceiling"]["value"] >= found["recall@20"]["value"]
    (kept,) = (world.artifacts / "ceilings").glob("*.json")
    assert len(json.loads(kept.read_text())["found"]) == 12
    kept.write_text(json.dumps({"found": [questions()[0]["id"]]}))  # it is read, and not made again
    told = ok("eval", world.eval, "--artifacts", world.artifacts, "--out", out, "--set", "ceiling=true").out
    assert any(line.split()[:2] == ["ceiling", "8.3"] for line in told.splitlines())
    kept.write_text("[")
    line = refused("eval", world.eval, "--artifacts", world.artifacts, "--out", out, "--set", "ceiling=true")
    assert line.startswith(f"DataError: {kept}: ") and line.endswith("is made again.")
    kept.unlink()


def test_questions_of_other_files_are_left_out_whatever_their_case(world: World, tmp_path: Path) -> None:
    rows = questions()
    known = [{"id": str(number), "question": row["question"].upper()} for number, row in enumerate(rows[:4])]
    file = write_jsonl(tmp_path / "known.jsonl", known)
    asked = {"name": "towns", "file": str(world.questions), "split": "dev", "without": [str(file)], "limit": 5}
    recipe = write_yaml(
        tmp_path / "e.yaml", {"kind": "eval", "pipelines": [str(world.pipeline("bm25"))], "questions": [asked]}
    )
    ok("eval", recipe, "--artifacts", world.artifacts, "--out", tmp_path / "runs")
    (folder,) = [path.parent for path in tmp_path.glob("runs/*/*/towns/manifest.json")]
    answered = [json.loads(line)["id"] for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert answered == [row["id"] for row in rows[4:9]]
    source = json.loads((folder / "manifest.json").read_text())["inputs"]["questions"]
    assert source["first"] == "5" and len(source["without"]) == 64
    every = write_jsonl(tmp_path / "every.jsonl", [{"id": r["id"], "question": r["question"]} for r in rows])
    line = refused("eval", recipe, "--artifacts", world.artifacts, "--set", f"questions.0.without=[{every}]")
    assert "every question is in" in line and "none is left" in line
