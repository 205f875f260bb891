"""Recursion the whole way: recipes, runs, replays, the command line, the threshold and the second prompt's training."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from odqa import jobs
from odqa.config import PipelineRecipe
from odqa.errors import RecipeError
from odqa.evaluate import Evaluation
from odqa.frozen.prefix import PrefixTuning
from odqa.read.lm import LmReader
from odqa.recipes import Places, load_recipe
from odqa.recurse import RetrievalRecursion
from odqa.runs import ANSWERS, TRACES, load_run
from odqa.types import Trace
from tests.command_line import odqa, ok, refused
from tests.small_world import World, questions, write_jsonl, write_yaml

TUNE = Path(__file__).resolve().parents[2] / "scripts/tune_recursion.py"
LISTED = {"kind": "textual", "source": "reader", "candidates": 3}
# The answer alone is searched for: other passages than for the question.
ELSEWHERE = {"kind": "retrieval", "query": "{answer}", "fusion": "new"}


def changed(world: World, path: Path, base: str, **settings: Any) -> Path:
    return write_yaml(path, yaml.safe_load(world.pipeline(base).read_text()) | settings)


@pytest.fixture(scope="module")
def again(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return changed(world, tmp_path_factory.mktemp("recipes") / "again.yaml", "bm25", recursion=ELSEWHERE, batch=5)


@pytest.fixture(scope="module")
def textual(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recursion = {"kind": "textual", "candidates": 4, "seed": 2}
    return changed(world, tmp_path_factory.mktemp("recipes") / "textual.yaml", "lm", recursion=recursion)


@pytest.fixture(scope="module")
def evaluated(world: World, again: Path, textual: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Runs of both, each after one without a recursion that its first ranking is taken from; and the report."""
    out = tmp_path_factory.mktemp("runs")
    pipelines = [
        {"recipe": str(again), "name": "once", "set": {"recursion": None}},
        {"recipe": str(again), "name": "again"},
        {"recipe": str(textual), "name": "textual"},
    ]
    values = yaml.safe_load(world.eval.read_text()) | {"pipelines": pipelines}
    recipe = write_yaml(out / "table.yaml", values)
    return out, ok("eval", recipe, "--artifacts", world.artifacts, "--out", out).out


def run_of(out: Path, name: str) -> Path:
    (folder,) = out.glob(f"table/{name}-*/towns")
    return folder


def traces(folder: Path) -> list[Trace]:
    return list(load_run(folder).traces())


def test_passages_of_a_second_pass_are_packed_and_read(evaluated: tuple[Path, str], world: World, again: Path) -> None:
    found = traces(run_of(evaluated[0], "again"))
    second = [trace for trace in found if len(trace.answers) == 2]
    assert len(second) >= 6
    new = []
    for trace in second:
        before, after = ({hit.passage.id for hit in context.hits} for context in trace.contexts)
        new.append(after - before)
        steps = {step.stage: step for step in trace.steps if step.pass_no == 2}
        assert steps["recurse"].notes["query"] == trace.answers[0].text
        assert set(steps["pack"].ids) == after <= set(steps["retrieve"].ids)
    assert sum(map(bool, new)) >= 3
    # What is packed is what the reader is given: its price is that of these very passages.
    reader = jobs.load_pipeline(again, places=Places(artifacts=world.artifacts)).pipeline.reader
    for trace in second:
        context = trace.contexts[1]
        costs = reader.costs(trace.query, context.hits)
        assert context.tokens == costs.fixed + sum(price or 0 for price in costs.passages)


def test_a_run_that_takes_its_first_ranking_from_another_equals_one_that_computed_all(
    evaluated: tuple[Path, str], world: World, again: Path, tmp_path: Path
) -> None:
    shared = run_of(evaluated[0], "again")
    assert (
        load_run(shared)
        .manifest["measured"]["ranking_from"]
        .endswith(run_of(evaluated[0], "once").parent.name + "/towns")
    )
    alone = tmp_path / "alone"
    ok("run", again, world.questions, "--artifacts", world.artifacts, "--out", alone, "--no-share")
    for file in (ANSWERS, TRACES):
        assert (shared / file).read_bytes() == (alone / file).read_bytes()


def test_traces_of_several_passes_survive_their_file(evaluated: tuple[Path, str]) -> None:
    for trace in traces(run_of(evaluated[0], "textual")):
        shown = [context.candidates for context in trace.contexts]
        assert shown[0] == () and len(trace.answers) == len(shown)
        if len(shown) == 2:
            assert shown[1] and len(set(shown[1])) == len(shown[1]) <= 5  # four samples and the answer
            kept = trace.contexts[1].hits  # with its candidates the window may hold a passage less
            assert len(kept) > 0 and kept == trace.contexts[0].hits[: len(kept)]


def test_the_report_says_what_the_second_pass_mended_and_undid_and_what_choosing_would_give(
    evaluated: tuple[Path, str],
) -> None:
    out, printed = evaluated
    found = {name: Evaluation.from_json(load_run(run_of(out, name)).scores()) for name in ("once", "again", "textual")}
    assert found["once"].re_passes == {} and found["once"].picks == {}
    for name in ("again", "textual"):
        pass_2 = found[name].re_passes[2]
        read = sum(len(trace.answers) > 1 for trace in traces(run_of(out, name)))
        assert pass_2.read == read > 0 and pass_2.mended + pass_2.undone <= read
    names = ["first pass", "most frequent sample", "best mean log-probability", "oracle over the samples", "last pass"]
    assert list(found["textual"].picks) == names
    rows = [line.split("  ")[0].strip() for line in printed.splitlines()]
    for row in ("read by pass 2", "mended by pass 2", "undone by pass 2", *names):
        assert row in rows


def test_ask_shows_each_pass_its_candidates_and_what_changed(world: World, again: Path, textual: Path) -> None:
    asked = questions()[0]["question"]
    shown = ok("ask", textual, asked, "--passes", "2", "-v", "--artifacts", world.artifacts).err
    assert "\npass 1\n" in shown and "\npass 2\n  decision: read again\n" in shown and "shown candidates: " in shown
    searched = ok("ask", again, asked, "-v", "--artifacts", world.artifacts).err
    assert "  decision: retrieve again\n  query: " in searched and ", new: " in searched
    once = ok("ask", again, asked, "--passes", "1", "-v", "--artifacts", world.artifacts).err
    assert "\npass 1\n" in once and "pass 2" not in once
    as_json = ok("ask", textual, asked, "--json", "--artifacts", world.artifacts).json["trace"]
    assert [answer["passes"] for answer in as_json["answers"]] == [1, 2] and "candidates" in as_json["contexts"][1]
    told = refused("ask", world.pipeline("bm25"), asked, "--passes", "2", "--artifacts", world.artifacts)
    assert "--passes 2 needs a recursion, and this recipe has none" in told
    told = refused("ask", again, asked, "--passes", "9", "--artifacts", world.artifacts)
    assert "recursion.passes is 9: Input should be less than or equal to 8." in told


@pytest.mark.parametrize(
    ("base", "recursion", "told"),
    [
        (
            "lm",
            {"kind": "textual", "candidates": 0},
            "recursion.candidates is 0: Input should be greater than or equal",
        ),
        ("lm", {"kind": "textual", "candidates": 33}, "recursion.candidates is 33: Input should be less than or equal"),
        ("lm", {"kind": "textual", "passes": 1}, "recursion.passes is 1: Input should be greater than or equal to 2"),
        ("lm", {"kind": "textual", "below": 1.5}, "recursion.below is 1.5"),
        ("lm", {"kind": "textual", "reader": {"promt": "x"}}, "promt is not a setting of lm"),
        ("lm", {"kind": "textual", "source": "reader", "seed": 1}, "seed is about samples"),
        ("lm", {"kind": "textual", "reader": {"kind": "api"}}, "base_url: Field required"),
        ("span", {"kind": "textual"}, "a span reader draws none. Set source: reader"),
        ("span", LISTED, "a span reader writes nothing. Name all settings of one that does, with kind: lm"),
        ("span", {"kind": "retrieval", "query": "{question}"}, "recursion.query is '{question}'"),
        ("span", {"kind": "retrieval", "fusion": "sum"}, "recursion.fusion is 'sum'"),
        ("span", {"kind": "neurol"}, "recursion.kind is 'neurol'"),
        ("closed", {"kind": "retrieval"}, "recursion of kind retrieval needs a retriever"),
    ],
)
def test_a_recursion_that_cannot_work_is_a_recipe_error(
    world: World, tmp_path: Path, base: str, recursion: dict[str, Any], told: str
) -> None:
    path = changed(world, tmp_path / "wrong.yaml", base, recursion=recursion)
    with pytest.raises(RecipeError) as error:
        load_recipe(path, "pipeline")
    assert told in str(error.value)


def test_recipes_without_a_recursion_say_nothing_of_it(world: World) -> None:
    recipe = load_recipe(world.pipeline("span"), "pipeline")
    assert isinstance(recipe.settings, PipelineRecipe) and recipe.settings.recursion is None
    assert "recursion" not in recipe.resolved


def test_a_span_readers_spans_are_read_again_by_a_generative_reader_and_closed_book_recursion_works(
    world: World, tmp_path: Path
) -> None:
    lm = {"kind": "lm", "model": str(world.lm), "max_new_tokens": 4, "device": "cpu", "dtype": "float32"}
    spans = changed(world, tmp_path / "spans.yaml", "bm25", recursion=LISTED | {"reader": lm})
    (trace,) = [jobs.load_pipeline(spans, places=Places(artifacts=world.artifacts)).ask(questions()[0]["question"])]
    assert len(trace.answers) == 2 and 1 <= len(trace.contexts[1].candidates) <= 4
    assert trace.contexts[1].hits == trace.contexts[0].hits
    closed = changed(world, tmp_path / "closed.yaml", "closed", recursion={"kind": "textual", "candidates": 2})
    trace = jobs.load_pipeline(closed, places=Places(artifacts=world.artifacts)).ask(questions()[0]["question"])
    assert len(trace.answers) == 2 and trace.contexts[1].hits == () and trace.contexts[1].candidates


def test_a_reader_that_says_what_is_missing_is_asked(world: World, tmp_path: Path) -> None:
    asking = {"kind": "retrieval", "asks": {"max_new_tokens": 3}}
    path = changed(world, tmp_path / "asks.yaml", "lm", recursion=asking)
    loaded = jobs.load_pipeline(path, places=Places(artifacts=world.artifacts))
    assert loaded.settings.second_reader is not None and loaded.settings.second_reader.prompt == "missing-passage"
    trace = loaded.ask(questions()[1]["question"])
    (step,) = [step for step in trace.steps if step.stage == "recurse"]
    assert step.notes["decision"] in ("retrieve again", "stop")
    recursion, reader = loaded.pipeline.recursion, loaded.pipeline.reader
    assert isinstance(recursion, RetrievalRecursion) and isinstance(recursion.asker, LmReader)
    assert isinstance(reader, LmReader) and recursion.asker.backbone is reader.backbone


# --- the threshold


def tune(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["tune_recursion.py", *map(str, arguments)])
    try:
        runpy.run_path(str(TUNE), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_threshold_is_chosen_on_tune_and_written_into_the_recipe(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(world, tmp_path / "again.yaml", "bm25", recursion=ELSEWHERE | {"below": 0.125})
    path.write_text(path.read_text().replace("below: 0.125", "below: 0.125  # ours"))
    options = (
        "--artifacts",
        world.artifacts,
        "--runs",
        tmp_path / "runs",
        "--out",
        tmp_path / "curve",
        "--write",
        path,
    )
    assert tune(path, world.questions, "--at-least", 0.25, *options, monkeypatch=monkeypatch) == 0
    result = json.loads((tmp_path / "curve.json").read_text())
    curve, chosen = result["curve"], result["chosen"]
    assert [curve[0]["share"], curve[0]["passes"]] == [0.0, 1.0]
    shares = [row["share"] for row in curve]
    assert shares == sorted(shares) and shares[-1] > 0.25
    best = max(row["mean"] for row in curve if row["share"] >= 0.25)
    assert chosen["mean"] == best and chosen["share"] >= 0.25
    assert load_recipe(path).settings.recursion.below == chosen["below"]  # type: ignore[attr-defined]
    assert "# ours" in path.read_text() and f"chosen below: {chosen['below']:.4g}" in capsys.readouterr().out
    # The curve's point is what the pipeline does with that threshold.
    ok("run", path, world.questions, "--artifacts", world.artifacts, "--out", tmp_path / "run")
    made = traces(tmp_path / "run")
    assert sum(len(trace.answers) for trace in made) / len(made) == pytest.approx(chosen["passes"], abs=1e-3)
    tokens = sum(context.tokens for trace in made for context in trace.contexts) / len(made)
    assert tokens == pytest.approx(chosen["tokens"], abs=0.01)


@pytest.mark.parametrize(
    ("change", "options", "told"),
    [
        ({}, ("--at-least", 1.0), "makes a second pass for"),
        ({}, ("--write", "nowhere.yaml"), "--write nowhere.yaml: no such file here"),
        ({"recursion": None}, (), "it has no recursion"),
    ],
)
def test_a_threshold_that_cannot_be_chosen_is_one_line(
    world: World,
    tmp_path: Path,
    change: dict[str, Any],
    options: tuple[object, ...],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = changed(world, tmp_path / "again.yaml", "bm25", **({"recursion": ELSEWHERE} | change))
    more = ("--artifacts", world.artifacts, "--runs", tmp_path / "runs", "--out", tmp_path / "curve", "--limit", 3)
    if "--at-least" in options:
        monkeypatch.setattr("odqa.recurse.Gate.stops", lambda self, passes: {"why": "never"})
    assert tune(path, world.questions, *options, *more, monkeypatch=monkeypatch) == 2
    assert told in capsys.readouterr().err.strip().splitlines()[-1]


# --- the second prompt


def test_a_second_prompt_is_trained_on_candidates_that_the_first_pass_sampled(
    world: World, textual: Path, tmp_path: Path
) -> None:
    rows = [
        {
            "id": f"t{number}",
            "source": "towns",
            "question": row["question"],
            "answers": row["answers"],
            "title": "",
            "passage": f"the answer is {row['answers'][0]}.",
            "negatives": [],
        }
        for number, row in enumerate(questions())
    ]
    recipe = {
        "kind": "train-lm-reader",
        "pipeline": str(textual),
        "second": True,
        "method": {"kind": "prompt-tuning", "length": 3},
        "train": str(write_jsonl(tmp_path / "train.jsonl", rows)),
        "contexts": {"questions": 4},
        "fit": {"steps": 2, "learning_rates": {"method": 0.01}, "evaluate_every": 0},
        "threads": 1,
    }
    path = write_yaml(tmp_path / "second.yaml", recipe)
    made = ok("train", path, "--artifacts", world.artifacts, "--out", tmp_path / "second")
    assert "12 examples" in made.err
    with_prompt = yaml.safe_load(textual.read_text())
    with_prompt["recursion"]["reader"] = {"method": str(tmp_path / "second")}
    loaded = jobs.load_pipeline(
        write_yaml(tmp_path / "both.yaml", with_prompt), places=Places(artifacts=world.artifacts)
    )
    first, second = loaded.pipeline.reader, loaded.pipeline.rereader
    assert isinstance(first, LmReader) and isinstance(second, LmReader)
    assert second.backbone is first.backbone and first.methods == ()
    (method,) = second.methods
    assert isinstance(method, PrefixTuning) and method.length == 3  # a prompt that stands in the cache
    assert len(loaded.ask(questions()[0]["question"]).answers) == 2
    adaptive = with_prompt["recursion"] | {"reader": {}, "below": 0.5}
    write_yaml(tmp_path / "both.yaml", with_prompt | {"recursion": adaptive})
    told = refused("train", path, "--set", f"pipeline={tmp_path / 'both.yaml'}", "--artifacts", world.artifacts)
    assert "a textual recursion that reads all questions again" in told
    assert odqa("check", path).code == 0
