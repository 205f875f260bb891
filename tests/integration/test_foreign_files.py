"""Files of other systems, through the commands: ours are exported and scored alike when they come back."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from odqa.corpus.io import read_passages, read_questions
from odqa.runs import load_run
from tests.command_line import ok, refused
from tests.small_world import World, passages, questions, write_jsonl, write_qa_csv


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scored run over BM25."""
    out = tmp_path_factory.mktemp("foreign") / "bm25"
    ok("run", world.pipeline("bm25"), world.questions, "--out", out, "--artifacts", world.artifacts)
    ok("eval", out, "--questions", world.questions, "--artifacts", world.artifacts)
    return out


def export(world: World, source: Path, out: Path, file_format: str, *more: str | Path) -> Path:
    done = ok("export", source, "--format", file_format, "--out", out, "--artifacts", world.artifacts, *more)
    assert done.out == f"{out}\n"
    return out


def scores(world: World, *arguments: str | Path) -> dict[str, float]:
    found = ok("eval", *arguments, "--artifacts", world.artifacts, "--json").json
    return {score["name"]: score["value"] for score in found["scores"]}


def own_scores(run: Path) -> dict[str, float]:
    return {score["name"]: score["value"] for score in load_run(run).scores()["scores"]}


@pytest.mark.parametrize("file_format", ["dpr", "pyserini", "flashrag"])
def test_a_run_exported_as_json_scores_as_it_did(world: World, run: Path, tmp_path: Path, file_format: str) -> None:
    file = export(world, run, tmp_path / "run.json", file_format, "--questions", world.questions)
    found, own = scores(world, file), own_scores(run)
    names = {"recall@1", "recall@5", "recall@20"} | ({"em", "f1"} if file_format == "flashrag" else set())
    assert set(found) == names
    assert found == {name: own[name] for name in names}
    assert found["recall@1"] > 0
    assert scores(world, file, "--questions", world.questions) == found


def test_a_run_exported_as_trec_scores_as_it_did(world: World, run: Path, tmp_path: Path) -> None:
    file = export(world, run, tmp_path / "run.trec.gz", "trec", "--tag", "mine")
    found = scores(world, file, "--questions", world.questions, "--index", world.index)
    assert found == {name: value for name, value in own_scores(run).items() if name.startswith("recall@")}
    with gzip.open(file, "rt") as lines:
        first = next(lines).split()
    trace = next(load_run(run).traces())
    assert first[:4] == [trace.query.id, "Q0", trace.steps[0].ids[0], "1"] and first[5] == "mine"
    line = refused("eval", file, "--questions", world.questions, "--artifacts", world.artifacts)
    assert "has neither a text nor has_answer. Name the index that has its text: --index" in line


def test_the_stage_says_whose_ranking(world: World, run: Path, tmp_path: Path) -> None:
    packed = export(world, run, tmp_path / "packed.trec", "trec", "--stage", "pack").read_text().splitlines()
    found = [step.ids for trace in load_run(run).traces() for step in trace.steps if step.stage == "pack"]
    assert [line.split()[2] for line in packed] == [passage_id for ids in found for passage_id in ids]
    line = refused("export", run, "--format", "trec", "--stage", "rerank", "--out", tmp_path / "x.trec")
    assert line.endswith("question 'q0' has no rerank step (it has retrieve, pack, read).")
    assert not (tmp_path / "x.trec").exists()


def dpr_run(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """DPR's retrieval json without ids: the right passage second, one that has nothing first."""
    texts = {passage.id: passage for passage in passages()}
    found = []
    for row in rows:
        right = texts[row["positive_ids"][0]]
        wrong = next(p for p in texts.values() if p.id != right.id and row["answers"][0] not in p.text)
        ctxs = [{"id": p.id, "title": p.title, "text": p.text, "score": "1.0"} for p in (wrong, right)]
        found.append({"question": row["question"], "answers": row["answers"], "ctxs": ctxs})
    return found


def test_dpr_json_without_ids_is_matched_by_its_questions(world: World, tmp_path: Path) -> None:
    rows = dpr_run(questions())
    file = tmp_path / "nq-test.json"
    file.write_text(json.dumps(rows[::-1]))  # another order than the question file's
    assert scores(world, file) == {"recall@1": 0.0}
    assert scores(world, file, "--questions", world.questions) == {"recall@1": 0.0}
    ids = {row["question"]: row["id"] for row in questions()}
    # Ids that count differently do not mislead: the words decide.
    rows[0]["ctxs"].reverse()
    file.write_text(json.dumps([row | {"id": ids[rows[place - 1]["question"]]} for place, row in enumerate(rows)]))
    assert scores(world, file, "--questions", world.questions) == {"recall@1": 8.3333}  # 1 of 12


def test_the_report_says_n_matcher_interval_and_what_is_missing(world: World, tmp_path: Path) -> None:
    rows = dpr_run(questions())
    for row in rows:
        row["ctxs"][0]["has_answer"] = True  # the file's own verdict is wrong
    (tmp_path / "dpr.json").write_text(json.dumps(rows[:10]))
    out = ok("eval", tmp_path / "dpr.json", "--questions", world.questions, "--artifacts", world.artifacts).out
    assert "recall@1" in out and "has_answer string" in out and " 12 " in out and "95% interval" in out
    assert "2 questions are not in the run and count as misses (first: q10)" in out
    assert "has_answer in the file is not ours for 10 of 20 passages looked at; ours counts" in out
    assert "funnel" not in out and "em" not in out.split()


def test_patterns_as_answers_need_the_regex_matcher(world: World, tmp_path: Path) -> None:
    """As in CuratedTREC; there is no F1 against a pattern."""
    ctx = {"id": "1", "contents": '"t"\nbuilt in 1407'}
    row = {
        "id": "1",
        "question": "when",
        "golden_answers": [r"14\d\d"],
        "output": {"retrieval_result": [ctx], "pred": "1407"},
    }
    (tmp_path / "run.json").write_text(json.dumps([row]))
    assert scores(world, tmp_path / "run.json", "--matcher", "regex") == {"em": 100.0, "recall@1": 100.0}
    assert scores(world, tmp_path / "run.json") == {"em": 0.0, "f1": 0.0, "recall@1": 0.0}


def test_runs_that_cannot_be_scored_are_refused_in_one_line(world: World, tmp_path: Path) -> None:
    (tmp_path / "run.trec").write_text("q0 Q0 1 1 2.0 x\n")
    (tmp_path / "other.trec").write_text("0 Q0 1 1 2.0 x\n")
    (tmp_path / "dpr.json").write_text(json.dumps([{"question": "never asked", "ctxs": []}]))
    arguments = ("--artifacts", world.artifacts)
    assert "no answers in the run. Name a file that has them: --questions" in refused("eval", tmp_path / "run.trec")
    asked = ("--questions", world.questions, *arguments)
    assert "an answer file of another question set: 0 ids in common" in refused("eval", tmp_path / "other.trec", *asked)
    assert "the question 'never asked' is not in" in refused("eval", tmp_path / "dpr.json", *asked)
    line = refused("eval", tmp_path / "run.trec", "--matcher", "fuzzy", *asked)
    assert line == "RecipeError: --matcher fuzzy: expected one of string, regex, characters."


def test_options_that_do_not_go_with_what_is_scored_are_refused(world: World, run: Path, tmp_path: Path) -> None:
    """Not passed over in silence: the number would then mean something else than was asked."""
    (tmp_path / "run.trec").write_text("q0 Q0 1 1 2.0 x\n")
    asked = ("--questions", world.questions, "--artifacts", world.artifacts)
    assert "--save, --set and --no-share go with" in refused(
        "eval", tmp_path / "run.trec", "--save", tmp_path / "x", *asked
    )
    assert "--index and --tag go with" in refused("eval", run, "--tag", "x", *asked)
    assert "--matcher goes with a run" in refused("eval", world.eval, "--matcher", "regex")
    assert ok("eval", run, *asked, "--json").json["scores"] == load_run(run).scores()["scores"]


def test_another_systems_trec_run_also_reranks(world: World, run: Path, tmp_path: Path) -> None:
    file = export(world, run, tmp_path / "run.trec.gz", "trec")
    settings = ("--set", "reranker.kind=scores", "--set", f"reranker.run={file}", "--artifacts", world.artifacts)
    ok("run", world.pipeline("dense"), world.questions, "--out", tmp_path / "again", *settings)
    assert load_run(tmp_path / "again").manifest["counts"]["questions"] == 12


def test_passages_go_out_and_come_back(world: World, tmp_path: Path) -> None:
    index = world.artifacts / "towns"
    for name, file_format in (("p.tsv.gz", "dpr"), ("p.jsonl", "pyserini"), ("q.jsonl", "flashrag")):
        assert list(read_passages(export(world, index, tmp_path / name, file_format))) == passages()
    assert list(read_passages(export(world, world.index, tmp_path / "r.tsv", "dpr"))) == passages()


def test_questions_go_out_and_come_back(world: World, tmp_path: Path) -> None:
    file = export(world, world.questions, tmp_path / "q.csv", "dpr")
    assert file.read_text() == write_qa_csv(tmp_path / "by-hand.csv").read_text()
    again = export(world, file, tmp_path / "q.jsonl", "flashrag")
    assert [query.text for query in read_questions(again)] == [row["question"] for row in questions()]
    assert set(json.loads(again.read_text().splitlines()[0])) == {"id", "question", "golden_answers"}


def test_training_examples_go_out_as_dprs(world: World, tmp_path: Path) -> None:
    texts = {passage.id: passage for passage in passages()}
    rows = [
        {**row, "title": texts[row["positive_ids"][0]].title, "passage": texts[row["positive_ids"][0]].text,
         "negative_ids": ["60"], "source": "towns"}
        for row in questions(3)
    ]  # fmt: skip
    source = write_jsonl(tmp_path / "train.jsonl", rows)
    file = export(world, source, tmp_path / "train.json", "dpr-training", "--index", world.index)
    samples = json.loads(file.read_text())
    assert [sample["positive_ctxs"][0]["passage_id"] for sample in samples] == ["1", "6", "11"]
    assert {sample["hard_negative_ctxs"][0]["title"] for sample in samples} == {texts["60"].title}
    line = refused("export", source, "--format", "dpr-training", "--out", tmp_path / "x.json")
    assert "'1' is neither a field of the row nor a known passage" in line


def test_exports_that_make_no_sense_are_refused_in_one_line(world: World, run: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "x", "--artifacts", world.artifacts)
    assert "--format excel: expected one of trec, dpr," in refused("export", run, "--format", "excel", *out)
    assert "a run has no format 'dpr-training'" in refused("export", run, "--format", "dpr-training", *out)
    assert "an index has no format 'trec'" in refused("export", world.index, "--format", "trec", *out)
    assert "a file has no format 'trec'" in refused("export", world.questions, "--format", "trec", *out)
    assert "and dpr holds them. Name --questions" in refused("export", run, "--format", "dpr", *out)
    assert "neither a run nor an index" in refused("export", tmp_path, "--format", "dpr", *out)
    assert "no such file" in refused("export", tmp_path / "nothing", "--format", "dpr", *out)
    few = write_jsonl(tmp_path / "few.jsonl", questions(2))
    assert "no question 'q2', which" in refused("export", run, "--format", "dpr", "--questions", few, *out)
    assert not (tmp_path / "x").exists()
