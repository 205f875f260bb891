"""What the benchmarks compute from what they measured: floors, rates, recall, tables; no system is loaded."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from benchmarks import pipeline, pipeline_worker, sharing  # noqa: E402

from odqa.types import Gold  # noqa: E402


def test_the_floor_of_a_bert_counts_its_matrix_products() -> None:
    # 1 layer, width 2, inner 3, 5 tokens. Four 2x2 products and two 2x3: 16 + 12 = 28 multiply-adds a token, 56 flop;
    # attention: two products of 5 x 2 a token, 20 multiply-adds, 40 flop. 5 tokens: 5 * 96.
    assert pipeline.bert_flops([5], layers=1, width=2, inner=3) == 480
    assert pipeline.bert_flops([5, 5], layers=2, width=2, inner=3) == 4 * 480
    assert pipeline.bert_flops([]) == 0


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    passages = [{"id": str(n), "title": "", "text": f"the year {1900 + n}"} for n in range(9)]
    (folder / "passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))


def row(system: str, question: str, cpu: float, ids: list[str]) -> dict[str, Any]:
    return {"system": system, "question": question, "wall": 2 * cpu, "cpu": cpu, "ids": ids}


def test_systems_are_compared_on_the_questions_that_all_have_answered(tmp_path: Path) -> None:
    loaded = [{"system": name, "load_wall": 9.0, "load_cpu": 3.0} for name in ("odqa", "txtai")]
    ends = [{"system": name, "peak_memory_bytes": 2**30} for name in ("odqa", "txtai")]
    answered = [
        row("odqa", "a", 0.1, ["1", "2", "3", "4", "5"]),
        row("txtai", "a", 0.4, ["1", "2", "3", "4", "6"]),
        row("odqa", "b", 0.1, ["5", "1"]),
        row("txtai", "b", 0.2, ["5", "1"]),
        row("odqa", "c", 9.9, ["1"]),  # txtai has not come to it yet
    ]
    write_rows(tmp_path, [*loaded, *answered, *ends])
    gold = {"a": Gold("a", ("1905",)), "b": Gold("b", ("1905",)), "c": Gold("c", ("x",))}
    found = pipeline.compare(tmp_path, ["odqa", "txtai"], gold)
    ours, theirs = found["systems"]
    assert found["questions"] == 2 and found["best_peer"] == "txtai"
    # 2 questions in 0.2 and in 0.6 seconds
    assert ours["questions_a_cpu_second"] == 10.0 and theirs["questions_a_cpu_second"] == 3.33
    assert found["rate_over_the_best_peer"]["odqa"] == 3.0
    assert theirs["cpu_over_odqa"] == 3.0 and theirs["same_five_as_odqa"] == 50.0  # 4 and 2 times
    assert (ours["recall@5"], theirs["recall@5"]) == (100.0, 50.0)
    assert ours["wall_milliseconds"] == {"median": 200, "p95": 200} and ours["peak_memory_mib"] == 1024


def test_nothing_to_compare_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    write_rows(tmp_path, [row("odqa", "a", 0.1, ["1"])])
    with pytest.raises(typer.Exit):
        pipeline.compare(tmp_path, ["odqa", "txtai"], {})
    assert "no question was answered by all systems yet" in capsys.readouterr().err


def test_a_worker_answers_by_number_and_ends_with_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tmp_path / "questions.jsonl"
    asked.write_text('{"id": "a", "question": "first"}\n{"id": "b", "question": "second"}\n')
    monkeypatch.setitem(pipeline_worker.SYSTEMS, "echo", lambda work: lambda question: ([question], "12345"))
    work = {"warm_up": "x", "questions": str(asked)}
    loaded, reply, end = pipeline_worker.replies("echo", work, iter(["1\n", "end\n", "0\n"]))
    assert loaded.keys() == {"load_wall", "load_cpu"}
    assert reply["ids"] == ["second"] and reply["prompt_characters"] == 5 and reply["wall"] >= 0
    assert end["peak_memory_bytes"] > 2**20


def test_the_workers_prompt_is_that_of_our_reader() -> None:
    from odqa.read.prompts import TEMPLATES, Prompt
    from odqa.types import Passage

    passages = [{"id": "1", "title": "Danube", "text": "A river."}, {"id": "2", "title": "Rhine", "text": "Another."}]
    ours = Prompt(TEMPLATES["open-book"]).text("which river", [Passage(**passage) for passage in passages])
    assert pipeline_worker.prompt("which river", passages) == ours


def test_a_seconds_clock_adds_up_what_a_stage_does() -> None:
    spent = pipeline.Spent()

    class Stage:
        kept = 5

        def work(self, n: int) -> int:
            return sum(range(n))

    timed = pipeline._Timed(Stage(), spent, work="sums")
    assert timed.kept == 5 and timed.work(200_000) == sum(range(200_000))
    first = spent.seconds["sums"]
    timed.work(200_000)
    assert 0 < first < spent.seconds["sums"]


def test_runs_are_found_by_system_and_set_with_a_hash_of_their_bytes(tmp_path: Path) -> None:
    for version in ("one-0123abcd", "one-more-89abcdef"):
        folder = tmp_path / "table" / version / "nq"
        folder.mkdir(parents=True)
        stages = {"read": {"seconds": 1.5}, "rerank": {"seconds": 2.0}}
        (folder / "manifest.json").write_text(json.dumps({"measured": {"stages": stages}}))
        for name in ("answers.jsonl", "traces.jsonl"):
            (folder / name).write_text(version)
    found = sharing._measured(tmp_path)
    assert list(found) == ["one/nq"]  # the one that was added later is not compared
    assert sharing._stage_seconds(found) == {"retrieve": 0.0, "rerank": 2.0, "pack": 0.0, "read": 1.5}
