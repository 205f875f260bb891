"""The whole way through the command line: index, ask, run, evaluate, explain, compare, train; on a small world and on
the embedded collection. Tiny readers answer noise, so what is checked is where things go, not what they say."""

import json
from pathlib import Path

import pytest
import yaml

from odqa.artifacts import load_artifact
from odqa.corpus.examples import read_rankings
from odqa.recipes import FOLDERS
from odqa.runs import load_run
from tests.command_line import odqa, ok, refused
from tests.small_world import TOWNS, World, passages, questions, write_jsonl, write_yaml

ROOT = Path(__file__).parents[2]
PIPELINES = ["span", "bm25", "dense", "lm", "closed"]


# --- index and ask ----------------------------------------------------------------------------------------------------


def test_an_index_holds_the_passages_and_what_the_recipe_asked_for(world: World) -> None:
    folder = world.artifacts / "towns"
    artifact = load_artifact(folder, "index", verify=True)
    assert artifact.manifest["counts"]["passages"] == 60
    assert artifact.manifest["recipe"]["dense"]["question_model"] == str(world.encoder)
    assert {name.split("/")[0] for name in artifact.manifest["files"]} == {"passages", "bm25", "dense"}


def test_indexing_again_does_nothing_and_says_so(world: World) -> None:
    before = (world.artifacts / "towns/manifest.json").read_bytes()
    outcome = ok("index", world.index, "--artifacts", world.artifacts)
    assert outcome.out == f"{world.artifacts / 'towns'}\n" and "built already" in outcome.err
    assert (world.artifacts / "towns/manifest.json").read_bytes() == before


def test_index_as_json_is_one_value(world: World) -> None:
    found = ok("index", world.index, "--artifacts", world.artifacts, "--json").json
    assert found["path"] == str(world.artifacts / "towns") and found["passages"] == 60
    assert found["manifest"]["kind"] == "index"


@pytest.mark.parametrize("name", PIPELINES)
def test_the_answer_alone_is_on_stdout_and_the_evidence_on_stderr(world: World, name: str) -> None:
    arguments = (
        "ask",
        world.pipeline(name),
        f"when was the bridge of {TOWNS[40].lower()} built",
        "--artifacts",
        world.artifacts,
    )
    outcome = ok(*arguments)
    assert outcome.out.count("\n") == 1
    assert "stages" in outcome.err and "\nread " in outcome.err
    if name not in ("closed", "dense"):
        assert f"1. {TOWNS[40]}  [41, " in outcome.err
    quiet = ok(*arguments, "--quiet")
    assert quiet.out == outcome.out and "stages" not in quiet.err


@pytest.mark.parametrize("name", PIPELINES)
def test_ask_as_json_has_answer_passages_and_trace(world: World, name: str) -> None:
    asked = f"how high is the tower of {TOWNS[10]}"
    found = ok("ask", world.pipeline(name), asked, "--artifacts", world.artifacts, "--json").json
    assert found["id"] == "question" and isinstance(found["text"], str)
    assert found["trace"]["question"] == asked
    stages = ["pack", "read"] if name == "closed" else ["retrieve", "pack", "read"]
    assert [step["stage"] for step in found["trace"]["steps"]] == [step["stage"] for step in found["timings"]] == stages
    if name == "closed":
        assert found["passage_ids"] == []
    elif name != "dense":
        assert found["passage_ids"][0] == "11"


def test_ask_builds_the_index_when_told_to(world: World, tmp_path: Path) -> None:
    arguments = ("ask", world.pipeline("bm25"), "where", "--artifacts", tmp_path)
    assert odqa(*arguments).code == 2
    assert ok(*arguments, "--build").err.count("60 passages in") == 1
    assert ok(*arguments).out == ok("ask", world.pipeline("bm25"), "where", "--artifacts", world.artifacts).out


def test_a_pipeline_may_name_an_index_by_its_folder(world: World) -> None:
    folder = world.artifacts / "towns"
    assert ok("ask", world.pipeline("span"), "where is korbar", "--set", f"index={folder}").out


# --- run, eval, explain, diff -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The evaluation of the small world: folder of the run by the name of its pipeline."""
    out = tmp_path_factory.mktemp("runs")
    ok("eval", world.eval, "--artifacts", world.artifacts, "--out", out, "--save", out / "report")
    return {path.parent.parent.name.rpartition("-")[0]: path.parent for path in out.rglob("scores.json")}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_run_answers_every_question_in_order(world: World, tmp_path: Path, name: str) -> None:
    arguments = ("run", world.pipeline(name), world.questions, "--out", tmp_path / "r", "--artifacts", world.artifacts)
    assert ok(*arguments).out == f"{tmp_path / 'r'}\n"
    run = load_run(tmp_path / "r")
    assert [answer["id"] for answer in run.answers()] == [row["id"] for row in questions()]
    assert [trace.query.text for trace in run.traces()] == [row["question"] for row in questions()]
    assert run.manifest["counts"]["questions"] == 12
    again = ok(*arguments, "--json")
    assert "answered already" in again.err and again.json["manifest"] == run.manifest


def test_no_gold_answer_enters_a_run(world: World, tmp_path: Path) -> None:
    """The same questions without answers give the same bytes."""
    bare = write_jsonl(tmp_path / "bare.jsonl", ({"id": r["id"], "question": r["question"]} for r in questions()))
    for folder, file in (("bare", bare), ("full", world.questions)):
        ok("run", world.pipeline("span"), file, "--out", tmp_path / folder, "--artifacts", world.artifacts)
    for name in ("answers.jsonl", "traces.jsonl"):
        assert (tmp_path / "bare" / name).read_bytes() == (tmp_path / "full" / name).read_bytes()


def test_a_question_is_answered_alike_alone_and_in_a_run(world: World, scored: dict[str, Path]) -> None:
    (answer, *_) = load_run(scored["span"]).answers()
    alone = ok("ask", world.pipeline("span"), questions()[0]["question"], "--artifacts", world.artifacts, "--json").json
    assert (alone["text"], alone["passage_ids"]) == (answer["text"], answer["passage_ids"])
    assert alone["score"] == pytest.approx(answer["score"], abs=1e-4)  # another batch, other last bits


def test_an_evaluation_scores_every_pipeline_and_says_where_answers_were_lost(scored: dict[str, Path]) -> None:
    found = {name: json.loads((folder / "scores.json").read_text()) for name, folder in scored.items()}
    values = {name: {s["name"]: s["value"] for s in scores["scores"]} for name, scores in found.items()}
    assert all(scores["n"] == sum(scores["funnel"].values()) == 12 for scores in found.values())
    # Names of towns are rare words: BM25 finds each at once, and its passage fits. A random encoder finds some.
    assert set(values) == {"span", "dense"}
    assert values["span"]["recall@1"] == values["span"]["recall_in_context"] == 100.0
    assert found["span"]["funnel"]["not retrieved"] == 0
    lost = found["dense"]["funnel"]["not retrieved"]
    assert 0 < lost < 12 and values["dense"]["recall@20"] == pytest.approx(100 * (12 - lost) / 12, abs=1e-3)


def test_a_report_is_saved_as_markdown_and_json(scored: dict[str, Path]) -> None:
    stem = scored["span"].parents[2] / "report"
    saved = json.loads(stem.with_name("report.json").read_text())
    assert [system["pipeline_name"] for system in saved["systems"]] == ["span", "dense"]
    assert saved["systems"][0]["inputs"]["questions"]["sha256"]
    assert "| metric | span | dense | unit | n | matcher |" in stem.with_name("report.md").read_text()


def test_eval_prints_one_table_or_one_json_value_and_reuses_its_runs(world: World, scored: dict[str, Path]) -> None:
    out = scored["span"].parents[2]
    text = ok("eval", world.eval, "--artifacts", world.artifacts, "--out", out)
    assert text.out.startswith("towns dev\nmetric") and text.err.count("answered already") == 2
    found = ok("eval", world.eval, "--artifacts", world.artifacts, "--out", out, "--json").json
    assert found["ok"] and [system["n"] for system in found["systems"]] == [12, 12]


@pytest.mark.parametrize(("value", "code"), [(100, 0), (97, 1)])
def test_eval_exits_with_1_when_an_expected_number_is_missed(
    world: World, scored: dict[str, Path], value: float, code: int
) -> None:
    out = scored["span"].parents[2]
    expected = f"questions.0.expected={{span: {{recall@5: {{value: {value}, tolerance: 2}}}}}}"
    outcome = odqa("eval", world.eval, "--artifacts", world.artifacts, "--out", out, "--set", expected)
    assert outcome.code == code
    assert outcome.out.splitlines()[-1].split()[-1] == ("NO" if code else "yes")


def test_explain_shows_the_scores_or_one_question_with_its_outcome(scored: dict[str, Path]) -> None:
    assert "where was the answer lost?" in ok("explain", scored["span"]).out
    assert ok("explain", scored["span"], "--json").json["n"] == 12
    one = ok("explain", scored["span"], "--id", "q3").out
    assert f"gold: {questions()[3]['answers'][0]}" in one and "outcome: " in one and "retrieve: " in one
    assert ok("explain", scored["span"], "--id", "q3", "--json").json["question"] == questions()[3]["question"]


def test_diff_pairs_two_runs(scored: dict[str, Path]) -> None:
    out = ok("diff", scored["span"], scored["dense"]).out
    assert "difference" in out and " questions changed: " in out
    found = ok("diff", scored["span"], scored["dense"], "--json").json
    recall = next(item for item in found["differences"] if item["name"] == "recall@1")
    assert (recall["n"], recall["first"]) == (12, 100.0)
    assert recall["delta"]["value"] == pytest.approx(recall["second"] - 100) and recall["delta"]["high"] < 0
    assert found["changed"] and all(pair[0]["id"] == pair[1]["id"] for pair in found["changed"])
    same = ok("diff", scored["span"], scored["span"], "--json").json
    assert same["changed"] == [] and {item["delta"]["value"] for item in same["differences"]} == {0.0}


# --- train ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def training(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training recipe over 40 questions, three steps long."""
    folder = tmp_path_factory.mktemp("training")
    all_passages = passages()
    rows = [
        {
            "id": f"t{number}",
            "question": f"when was the bridge of {passage.title} built",
            "answers": [str(1400 + 7 * (number + 1))],
            "title": passage.title,
            "passage": passage.text,
            "negative_ids": [all_passages[number + 1].id],
            "source": "towns",
        }
        for number, passage in enumerate(all_passages[:40])
    ]
    recipe = {
        "kind": "train-span-reader",
        "backbone": str(world.encoder),
        "method": {"kind": "lora", "rank": 2, "alpha": 4},
        "longest": 8,
        "train": str(write_jsonl(folder / "train.jsonl", rows)),
        "passages": [str(world.passages)],
        "groups": {"groups": 4},
        "fit": {"steps": 3, "learning_rates": {"method": 0.01, "head": 0.01}, "evaluate_every": 2},
        "tune": [{"name": "towns", "file": str(world.questions), "limit": 5}],
        "device": "cpu",
    }
    return write_yaml(folder / "tiny-reader.yaml", recipe)


def test_a_reader_is_trained_and_then_reads(world: World, training: Path, tmp_path: Path) -> None:
    outcome = ok("train", training, "--artifacts", tmp_path)
    folder = tmp_path / "tiny-reader"
    assert outcome.out == f"{folder}\n" and "40 examples, 0 left out, 10 batches an epoch" in outcome.err
    artifact = load_artifact(folder, "span-reader", verify=True)
    assert set(artifact.manifest["files"]) == {
        "curve.json", "head.safetensors", "method.json", "method.safetensors", "reader.json",
    }  # fmt: skip
    curve = json.loads((folder / "curve.json").read_text())
    assert [entry["step"] for entry in curve] == [2, 3] and all("towns.em" in entry for entry in curve)
    asked = ("ask", world.pipeline("span"), "where is korbar", "--artifacts", world.artifacts)
    trained = ok(*asked, "--set", f"reader.model={folder}", "--json").json
    assert trained["score"] != ok(*asked, "--json").json["score"]
    again = ok("train", training, "--artifacts", tmp_path, "--json")
    assert "trained already" in again.err and again.json["manifest"]["counts"]["examples"] == 40


def test_hard_negatives_are_mined_and_train_a_reranker_that_reranks(
    world: World, training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = yaml.safe_load(training.read_text())
    mining = {
        "kind": "mine",
        "train": recipe["train"],
        "passages": recipe["passages"],
        "pipelines": [str(world.pipeline("span"))],
        "depth": 6,
        "limits": {"towns": 30},
    }
    write_yaml(tmp_path / "towns-mined.yaml", mining)
    places = ("--artifacts", str(world.artifacts))
    mined = ok("mine", tmp_path / "towns-mined.yaml", *places, "--json").json
    assert mined["manifest"]["counts"] == {"questions": 30}
    rankings = read_rankings(Path(mined["path"]))
    assert len(rankings) == 30 and all(len(r.ids) == 6 and any(r.holds) for r in rankings.values())
    assert "mined already" in ok("mine", tmp_path / "towns-mined.yaml", *places).err

    settings = {key: recipe[key] for key in ("backbone", "method", "train", "passages", "device")}
    settings |= {
        "kind": "train-reranker",
        "rankings": str(tmp_path / "towns-mined.yaml"),
        "groups": {"groups": 4, "negatives": 3},
        "fit": {"steps": 3, "learning_rates": {"method": 0.01, "head": 0.01}, "evaluate_every": 2},
        "candidates": str(world.pipeline("span")),
        "candidate_depth": 5,
        "tune": [{"name": "towns", "file": str(world.questions), "limit": 5}],
    }
    write_yaml(tmp_path / "towns-reranker.yaml", settings)
    made = ok("train", tmp_path / "towns-reranker.yaml", *places, "--json").json
    assert made["manifest"]["counts"]["examples"] == 30 and made["manifest"]["counts"]["questions_seen"] == 12
    curve = json.loads((Path(made["path"]) / "curve.json").read_text())
    assert [entry["step"] for entry in curve] == [2, 3] and all("towns.recall@1" in entry for entry in curve)
    again = ok("train", tmp_path / "towns-reranker.yaml", *places)
    assert "trained already" in again.err

    reranker = f"reranker={{kind: cross-encoder, model: {made['path']}, device: cpu, dtype: float32}}"
    asked = ("ask", world.pipeline("span"), "how high is the tower of korbar", *places, "--set", reranker, "--json")
    steps = {step["stage"]: step for step in ok(*asked).json["trace"]["steps"]}
    assert sorted(steps["rerank"]["ids"]) == sorted(steps["retrieve"]["ids"])
    assert steps["rerank"]["scores"] == sorted(steps["rerank"]["scores"], reverse=True)


def test_a_question_side_is_trained_searched_and_mined_with(world: World, training: Path, tmp_path: Path) -> None:
    """Train on the frozen index; an index with the method takes its vectors over; what is mined is ranked by it."""
    recipe = yaml.safe_load(training.read_text())
    rows = [json.loads(line) for line in Path(recipe["train"]).read_text(encoding="utf-8").splitlines()]
    known = [row | {"positive_ids": [str(number)]} for number, row in enumerate(rows, 1)]  # to find their vectors by
    recipe["train"] = str(write_jsonl(tmp_path / "known.jsonl", known))
    settings = {key: recipe[key] for key in ("method", "train", "passages", "device", "tune")}
    settings |= {
        "kind": "train-bi-encoder",
        "index": str(world.index),
        "side": "questions",
        "batch": {"questions": 8, "hard": 1},
        "fit": {"steps": 3, "learning_rates": {"method": 0.05}, "evaluate_every": 2},
    }
    write_yaml(tmp_path / "towns-questions.yaml", settings)
    places = ("--artifacts", str(world.artifacts))
    made = ok("train", tmp_path / "towns-questions.yaml", *places, "--json").json
    assert made["manifest"]["counts"]["examples"] == 40 and made["manifest"]["counts"]["questions_seen"] == 24
    curve = json.loads((Path(made["path"]) / "curve.json").read_text())
    assert [entry["step"] for entry in curve] == [2, 3] and all("tune.recall@1" in entry for entry in curve)
    assert "trained already" in ok("train", tmp_path / "towns-questions.yaml", *places).err

    index = yaml.safe_load(world.index.read_text())
    index["dense"] |= {"method": made["path"], "vectors": {"given": str(world.index)}}
    write_yaml(tmp_path / "towns-tuned.yaml", index)
    built = ok("index", tmp_path / "towns-tuned.yaml", *places, "--json").json
    frozen = load_artifact(world.artifacts / "towns")
    vectors = "dense/vectors/part-00000.npy"
    assert built["manifest"]["files"][vectors] == frozen.manifest["files"][vectors]
    assert "built already" in ok("index", tmp_path / "towns-tuned.yaml", *places).err

    pipeline = yaml.safe_load(world.pipeline("dense").read_text()) | {"index": str(tmp_path / "towns-tuned.yaml")}
    write_yaml(tmp_path / "dense-tuned.yaml", pipeline)
    asked = f"how high is the tower of {TOWNS[10]}"
    steps = [
        ok("ask", file, asked, *places, "--json").json["trace"]["steps"][0]
        for file in (world.pipeline("dense"), tmp_path / "dense-tuned.yaml")
    ]
    assert steps[0]["scores"] != steps[1]["scores"]
    mining = {"kind": "mine", "train": recipe["train"], "passages": recipe["passages"], "depth": 6}
    write_yaml(tmp_path / "mined-again.yaml", mining | {"pipelines": [str(tmp_path / "dense-tuned.yaml")]})
    mined = ok("mine", tmp_path / "mined-again.yaml", *places, "--json").json
    assert mined["manifest"]["counts"] == {"questions": 40}
    again = ["--set", f"rankings={mined['path']}", "--set", f"start={made['path']}", "--out", str(tmp_path / "second")]
    second = ok("train", tmp_path / "towns-questions.yaml", *places, *again, "--json").json
    assert second["manifest"]["inputs"]["start"] == made["manifest"]["files"]["method.safetensors"]["sha256"]


def test_a_training_names_what_has_to_be_mined_first(world: World, training: Path, tmp_path: Path) -> None:
    mining = {"kind": "mine", "train": "x", "passages": ["y"], "pipelines": ["z"]}
    write_yaml(tmp_path / "later.yaml", mining)
    recipe = yaml.safe_load(training.read_text()) | {"rankings": str(tmp_path / "later.yaml")}
    recipe["groups"] = {"groups": 4, "packed": 2}
    line = refused("train", write_yaml(tmp_path / "reader.yaml", recipe), "--artifacts", tmp_path)
    assert line.endswith(f"Mine them with: odqa mine {tmp_path / 'later.yaml'}")


def test_two_trainings_of_one_recipe_give_the_same_bytes(training: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        ok("train", training, "--out", tmp_path / name, "--set", "tune=[]")
    one, two = (load_artifact(tmp_path / name) for name in ("one", "two"))
    assert one.manifest["files"] == two.manifest["files"]


# --- what odqa carries ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", sorted(f"{f}/{p.name}" for f in FOLDERS for p in (ROOT / f).glob("*.yaml")))
def test_every_shipped_recipe_validates_on_the_command_line(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(ok("check", recipe, "--json").json["hash"]) == 64


def test_the_embedded_dump_becomes_an_index_that_answers_and_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any folder, offline, with what the package carries; on every tenth question to save time."""
    monkeypatch.chdir(tmp_path)
    built = ok("index", "indexes/embedded.yaml")
    assert built.out == "artifacts/embedded\n" and "104 articles" in built.err
    found = ok("ask", "pipelines/embedded.yaml", "who tutored elizabeth i in latin", "--json").json
    titles = [passage["title"] for passage in found["trace"]["passages"]]
    assert "Elizabeth I" in titles and found["text"]
    every_tenth = (ROOT / "odqa/assets/questions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[::10]
    Path("some.jsonl").write_text("".join(every_tenth), encoding="utf-8")
    evaluated = ok(
        "eval",
        "eval/embedded.yaml",
        "--set",
        "questions.0.file=some.jsonl",
        "--set",
        "questions.0.expected={}",
        "--json",
    )
    assert not list(tmp_path.glob("artifacts/.*"))
    for system in evaluated.json["systems"]:
        values = {score["name"]: score["value"] for score in system["scores"]}
        # Loose on purpose: the numbers proper are in eval/embedded.yaml.
        assert system["n"] == len(every_tenth) and values["recall@20"] > 60
