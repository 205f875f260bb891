"""Systems with equal leading stages compute them once: with tiny models, a shared run equals one that computed all."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from odqa.artifacts import sha256_file
from odqa.runs import ANSWERS, TRACES, load_run
from tests.command_line import Outcome, odqa, ok, refused
from tests.small_world import World, questions, write_yaml
from tests.tiny_models import tiny_cross_encoder

BUDGETS = (160, 400)


@pytest.fixture(scope="module")
def cross(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = tiny_cross_encoder(tmp_path_factory.mktemp("cross") / "model", window=256)
    return {"kind": "cross-encoder", "model": str(model), "device": "cpu", "dtype": "float32", "depth": 12}


@pytest.fixture(scope="module")
def recipe(world: World, cross: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """{without, with the re-ranker} x two budgets. A batch of 5: the 12 questions make three blocks."""
    pipelines = [
        {
            "recipe": str(world.pipeline("span")),
            "name": f"{name}-{budget}",
            "set": {"reranker": reranker, "packer.budget": budget, "packer.trim": trim, "batch": 5},
        }
        for name, reranker, trim in (("plain", None, None), ("reranked", cross, {"sentences": 1, "by": "reranker"}))
        for budget in BUDGETS
    ]
    gains = [{"from": f"plain-{budget}", "to": f"reranked-{budget}"} for budget in BUDGETS]
    published = [{"name": "others", "metric": "em", "value": 48.7, "source": "a paper"}]
    values = yaml.safe_load(world.eval.read_text()) | {"pipelines": pipelines, "gains": gains, "published": published}
    return write_yaml(tmp_path_factory.mktemp("eval") / "table.yaml", values)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def evaluated(world: World, recipe: Path, out: Path) -> Outcome:
    return ok("eval", recipe, "--artifacts", world.artifacts, "--out", out, "--save", out / "report")


def run_of(out: Path, name: str) -> Path:
    (folder,) = out.glob(f"table/{name}-*/towns")
    return folder


@pytest.mark.parametrize("name", ["plain", "reranked"])
def test_the_second_budget_takes_the_ranking_of_the_first(evaluated: Outcome, out: Path, name: str) -> None:
    first, second = (run_of(out, f"{name}-{budget}") for budget in BUDGETS)
    assert f"{second}: the ranking is taken from {first}" in evaluated.err
    assert evaluated.err.count("the ranking is taken from") == 2
    assert evaluated.err.count("the retrieval is taken from") == 1  # by the first that re-ranks
    manifests = [load_run(path).manifest for path in (first, second)]
    assert manifests[0]["inputs"]["ranking"] == manifests[1]["inputs"]["ranking"]
    assert "ranking_from" not in manifests[0]["measured"]
    assert (second / manifests[1]["measured"]["ranking_from"]).resolve() == first.resolve()
    assert manifests[1]["measured"]["stages"]["retrieve"]["shared"] == 12


def test_a_run_that_re_ranks_takes_the_retrieval_of_one_that_does_not(evaluated: Outcome, out: Path) -> None:
    first, second = run_of(out, f"plain-{BUDGETS[0]}"), run_of(out, f"reranked-{BUDGETS[0]}")
    assert f"{second}: the retrieval is taken from {first}" in evaluated.err
    manifests = [load_run(path).manifest for path in (first, second)]
    assert manifests[0]["inputs"]["retrieval"] == manifests[1]["inputs"]["retrieval"]
    stages = manifests[1]["measured"]["stages"]
    assert stages["retrieve"]["shared"] == 12 and "shared" not in stages["rerank"] and stages["rerank"]["seconds"] > 0
    assert (second / manifests[1]["measured"]["retrieval_from"]).resolve() == first.resolve()


@pytest.fixture(scope="module")
def unshared(world: World, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """The same evaluation, each system by itself."""
    folder = tmp_path_factory.mktemp("unshared")
    return ok("eval", recipe, "--artifacts", world.artifacts, "--out", folder, "--no-share"), folder


@pytest.mark.parametrize("name", [f"{name}-{budget}" for name in ("plain", "reranked") for budget in BUDGETS])
def test_a_shared_run_has_the_bytes_of_one_that_computed_all(
    evaluated: Outcome, unshared: tuple[Outcome, Path], out: Path, name: str
) -> None:
    outcome, folder = unshared
    assert "is taken from" not in outcome.err
    shared, computed = run_of(out, name), run_of(folder, name)
    stages = load_run(computed).manifest["measured"]["stages"]
    assert not any("shared" in stage for stage in stages.values())
    for file in (ANSWERS, TRACES):
        assert sha256_file(shared / file) == sha256_file(computed / file)


def test_the_report_has_gains_and_published_figures_and_no_time_for_what_was_shared(
    evaluated: Outcome, out: Path
) -> None:
    lines = [" ".join(line.split()) for line in evaluated.out.splitlines()]
    assert "reranked-400 rerank shared 12 -" in lines and "plain-400 retrieve shared 12 -" in lines
    computed = next(line.split() for line in lines if line.startswith("reranked-160 rerank "))
    assert float(computed[2]) > 0 and computed[3] == "12"
    assert any(line.startswith("reranked-400: ranking taken from the run ../../reranked-160-") for line in lines)
    at = lines.index("towns dev: gains")
    assert lines[at + 1] == "from to final_recall@1 final_recall@20 recall_in_context em f1 n"
    assert lines[at + 3].startswith("plain-160 reranked-160 ") and lines[at + 4].endswith(" 12")
    assert lines[lines.index("published, not run") + 3] == "others em 48.7 a paper"
    saved = json.loads((out / "report.json").read_text())
    assert [gain["to"] for gain in saved["gains"]] == ["reranked-160", "reranked-400"]
    assert saved["published"] == [{"name": "others", "metric": "em", "value": 48.7, "source": "a paper"}]
    assert [system["pipeline_name"] for system in saved["systems"]][2:] == ["reranked-160", "reranked-400"]
    # BM25 finds each town at once, a random re-ranker cannot: the gain is a clear loss.
    recall = saved["gains"][0]["differences"][0]
    assert recall["name"] == "final_recall@1" and recall["from"] == 100.0 and recall["high"] < 0
    assert "**published, not run**" in (out / "report.md").read_text()


def test_a_bound_on_a_gain_that_is_missed_exits_with_1(
    world: World, recipe: Path, evaluated: Outcome, out: Path
) -> None:
    expected = "gains.0.expected={towns: {final_recall@1: {at_least: 4}}}"
    outcome = odqa("eval", recipe, "--artifacts", world.artifacts, "--out", out, "--set", expected)
    assert outcome.code == 1 and outcome.err.count("answered already") == 4
    row = next(line for line in outcome.out.splitlines() if line.startswith("plain-160 -> reranked-160"))
    assert "at least 4.0" in row and row.split()[-1] == "NO"


def test_a_killed_run_goes_on_with_the_ranking_of_another(
    world: World, recipe: Path, evaluated: Outcome, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranked itself for the first block, was killed, found a ranking when it ran again: the same bytes."""
    from odqa import jobs
    from odqa.recipes import Places, load_recipe, load_variants
    from odqa.types import Query

    variant = load_variants(load_recipe(recipe, "eval"))[3]
    loaded = jobs.load_pipeline(variant, places=Places(artifacts=world.artifacts))
    queries = [Query(row["id"], row["question"]) for row in questions()]
    finished = run_of(out, variant.name)
    source = load_run(finished).manifest["inputs"]["questions"]
    with monkeypatch.context() as patch:
        answer, calls = loaded.pipeline.answer, []

        def die_later(block: Any) -> Any:
            calls.append(block)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return answer(block)

        patch.setattr(type(loaded.pipeline), "answer", lambda _self, block: die_later(block))
        with pytest.raises(KeyboardInterrupt):
            jobs.run_queries(loaded, queries, tmp_path / "run", source=source)
    made = jobs.run_queries(loaded, queries, tmp_path / "run", source=source, share=out)
    assert made.manifest["measured"]["stages"]["rerank"]["shared"] == 7  # of 12; a block of 5 was there
    for file in (ANSWERS, TRACES):
        assert sha256_file(made.path / file) == sha256_file(finished / file)


@pytest.mark.parametrize(
    ("change", "shared"),
    [
        ("packer.budget=200", "ranking"),
        ("reader.candidates=2", "ranking"),
        ("reranker.depth=11", "retrieval"),
        ("retriever.weights=[1.0, 0.4]", None),
        ("k=19", None),
        ("batch=6", None),
    ],
)
def test_a_stage_is_shared_if_and_only_if_all_that_decides_it_is_equal(
    world: World, recipe: Path, evaluated: Outcome, out: Path, change: str, shared: str | None
) -> None:
    """`odqa run` beside the folder of an evaluation."""
    variant = yaml.safe_load(recipe.read_text())["pipelines"][2]
    changes = [f"{key}={json.dumps(value)}" for key, value in variant["set"].items()] + [change]
    common = ("run", variant["recipe"], world.questions, "--artifacts", world.artifacts)
    arguments = [argument for change in changes for argument in ("--set", change)]
    outcome = ok(*common, *arguments, "--out", out / f"run-{change.partition('=')[0]}")
    taken = [what for what in ("retrieval", "ranking") if f"the {what} is taken from" in outcome.err]
    assert taken == ([] if shared is None else [shared])


def test_other_weights_of_the_reranker_are_another_ranking_and_another_run(
    world: World, cross: dict[str, Any], tmp_path: Path
) -> None:
    changed = cross | {"model": str(tmp_path / "model")}
    variant = {"recipe": str(world.pipeline("bm25")), "name": "one", "set": {"reranker": changed}}
    common = ("--artifacts", world.artifacts, "--out", tmp_path / "runs")
    run = ("run", variant["recipe"], world.questions, "--set", f"reranker={json.dumps(changed)}", *common[:2], "--out")
    for seed in (0, 1):
        tiny_cross_encoder(tmp_path / "model", window=256, seed=seed)
        ok("eval", world.eval, "--set", f"pipelines=[{json.dumps(variant)}]", *common)
        outcome = ok(*run, tmp_path / f"runs/beside-{seed}")
        assert f"the ranking is taken from {tmp_path}/runs/eval-towns/one-" in outcome.err
    versions = list(tmp_path.glob("runs/eval-towns/one-*"))
    assert len(versions) == 2
    orders = {tuple(load_run(version / "towns").trace("q0").steps[1].ids) for version in versions}
    assert len(orders) == 2  # other weights, another order
    line = refused(*run, tmp_path / "runs/beside-0")
    assert line.startswith("ArtifactMismatch") and "differs from this one in inputs.reranker." in line


# --- re-rankers that wrap others --------------------------------------------------------------------------------------


def trec_file(path: Path, ids: list[str]) -> Path:
    """Each town's own passage last, the others by number."""
    lines = [f"{query} Q0 {number} 0 {-number} outside" for query in ids for number in range(1, 61)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_scores_of_a_trec_file_rank(world: World, tmp_path: Path) -> None:
    run = trec_file(tmp_path / "outside.txt", [row["id"] for row in questions()])
    common = ("run", world.pipeline("bm25"), world.questions, "--artifacts", world.artifacts)
    ok(*common, "--set", f"reranker={{kind: scores, run: {run}}}", "--out", tmp_path / "r")
    steps = load_run(tmp_path / "r").trace("q3").steps
    assert [step.stage for step in steps] == ["retrieve", "rerank", "pack", "read"]
    assert list(steps[1].ids) == sorted(steps[0].ids, key=int) and set(steps[1].sources) == {"outside"}


def test_scores_of_other_questions_are_refused_before_anything_runs(world: World, tmp_path: Path) -> None:
    run = trec_file(tmp_path / "outside.txt", ["q0", "q2", "q7"])
    common = ("run", world.pipeline("bm25"), world.questions, "--artifacts", world.artifacts)
    line = refused(*common, "--set", f"reranker={{kind: scores, run: {run}}}", "--out", tmp_path / "r")
    assert line == (
        "DataError: outside: no scores for 9 of 12 queries (first: 'q1'). Give a run of the same questions, with the "
        "same ids."
    )
    assert not list(tmp_path.glob("*r*/traces.jsonl"))


def test_the_order_of_a_run_of_odqa_ranks_for_another_reader(
    world: World, evaluated: Outcome, out: Path, tmp_path: Path
) -> None:
    run = run_of(out, "reranked-160")
    common = ("run", world.pipeline("span"), world.questions, "--artifacts", world.artifacts, "--out", tmp_path / "r")
    ok(*common, "--set", f"reranker={{kind: scores, run: {run}}}")
    given, made = load_run(run).trace("q5").steps[1], load_run(tmp_path / "r").trace("q5").steps[1]
    assert made.ids == given.ids and set(made.sources) == {"towns"}
    line = refused(*common, "--set", f"reranker={{kind: scores, run: {run}, tag: x}}")
    assert line.endswith("is a run folder, which has no tags. Remove tag.")
    line = refused(*common, "--set", f"reranker={{kind: scores, run: {run_of(out, 'plain-160')}}}")
    assert "this run has no re-ranker (question 'q0' has no rerank step)." in line


def test_a_cascade_is_built_from_a_recipe(world: World, cross: dict[str, Any], tmp_path: Path) -> None:
    run = trec_file(tmp_path / "outside.txt", [row["id"] for row in questions()])
    stages = [{"kind": "scores", "run": str(run), "depth": 15}, cross | {"depth": 3}]
    change = f"reranker={json.dumps({'kind': 'cascade', 'stages': stages})}"
    common = ("run", world.pipeline("bm25"), world.questions, "--artifacts", world.artifacts)
    ok(*common, "--set", change, "--out", tmp_path / "r")
    made = load_run(tmp_path / "r")
    step = made.trace("q4").steps[1]
    assert step.sources == ("cross",) * 3 + ("outside",) * 12 + ("bm25",) * (len(step.ids) - 15)
    assert len(made.manifest["inputs"]["reranker"]) == 2


def test_the_first_questions_alone_do_not_lend_their_ranking_to_all(world: World, recipe: Path, tmp_path: Path) -> None:
    common = ("--artifacts", world.artifacts, "--out", tmp_path, "--set", "gains=[]")
    settings = yaml.safe_load(recipe.read_text())["pipelines"]
    first, second = (f"pipelines=[{json.dumps(item)}]" for item in settings[2:])
    few = ok("eval", recipe, *common, "--set", first, "--set", "questions.0.limit=5", "--json").json
    assert [system["n"] for system in few["systems"]] == [5]
    again = ok("eval", recipe, *common, "--set", second, "--set", "questions.0.limit=5")
    assert "the ranking is taken from" in again.err
    line = refused("eval", recipe, *common, "--set", first)
    assert line.startswith("ArtifactMismatch: ") and "questions" in line
    shutil.rmtree(run_of(tmp_path, "reranked-400"))
    whole = ok("eval", recipe, *common, "--set", second, "--json")
    assert "the ranking is taken from" not in whole.err and [s["n"] for s in whole.json["systems"]] == [12]
