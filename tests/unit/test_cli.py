"""The command line without models: what it prints where, and its exit codes. The commands' work: tests/integration."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import odqa as package
from odqa import cli, jobs
from odqa.config import RECIPES
from odqa.evaluate import Check, Expectation, Score
from odqa.recipes import load_recipe
from odqa.runs import recording
from odqa.types import Answer, Query, Step, Trace
from tests.command_line import Outcome, odqa, ok, refused

ROOT = Path(__file__).parents[2]
COMMANDS = ["check", "index", "ask", "run", "eval", "train", "explain", "diff", "report", "doctor", "demo"]


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_help_lists_every_command() -> None:
    out = ok("--help").out
    assert all(re.search(rf"^ +{command} ", out, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_in_a_sentence(command: str) -> None:
    help_text = ok(command, "--help").out
    assert help_text.startswith(f"Usage: odqa {command} ")
    assert re.search(r"\n\n  [A-Z].+?\.", help_text, re.DOTALL)


@pytest.mark.parametrize(
    "arguments", [("fly",), ("check",), ("check", "--fly", "x"), ("run", "pipelines/embedded.yaml")]
)
def test_a_command_line_that_means_nothing_exits_with_2(arguments: tuple[str, ...]) -> None:
    outcome = odqa(*arguments)
    assert outcome.code == 2 and outcome.out == "" and "Error" in outcome.err


def test_the_entry_point_is_installed_and_says_the_same() -> None:
    """Once through the real thing: the script, its exit codes, its streams."""
    script = Path(sys.executable).with_name("odqa")
    command = [str(script)] if script.is_file() else [sys.executable, "-m", "odqa.cli"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    good = subprocess.run(
        [*command, "check", "pipelines/nq-mini.yaml"], env=environment, capture_output=True, text=True
    )
    assert (good.returncode, good.stderr) == (0, "") and good.stdout == ok("check", "pipelines/nq-mini.yaml").out
    bad = subprocess.run([*command, "check", "nowhere.yaml"], env=environment, capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("RecipeError: nowhere.yaml: no such recipe") and bad.stderr.count("\n") == 1


# --- check ------------------------------------------------------------------------------------------------------------


def test_check_prints_a_recipe_that_is_the_same_recipe(tmp_path: Path) -> None:
    out = ok("check", "pipelines/nq-mini.yaml").out
    (tmp_path / "again.yaml").write_text(out, encoding="utf-8")
    recipe = load_recipe("pipelines/nq-mini.yaml")
    assert load_recipe(tmp_path / "again.yaml").hash == recipe.hash
    assert out.endswith(f"# hash: {recipe.hash}\n")


def test_check_as_json_has_the_recipe_and_its_hash() -> None:
    recipe = load_recipe("eval/nq-mini.yaml")
    assert ok("check", "eval/nq-mini.yaml", "--json").json == {"recipe": recipe.resolved, "hash": recipe.hash}


def test_set_changes_what_is_checked() -> None:
    out = ok("check", "pipelines/nq-mini.yaml", "--set", "packer.budget=99", "--set", "k=7").out
    found = yaml.safe_load(out)
    assert (found["packer"]["budget"], found["k"]) == (99, 7)


def test_several_mistakes_are_a_line_each(tmp_path: Path) -> None:
    outcome = odqa("check", "pipelines/nq-mini.yaml", "--set", "k=0", "--set", "retriever.dpth=1")
    assert outcome.code == 2 and outcome.out == ""
    assert outcome.err.splitlines() == [
        "RecipeError: pipelines/nq-mini.yaml: retriever.dpth is not a setting of hybrid "
        "(kind, depth, fusion, weights, normalise, c). Did you mean depth?",
        "pipelines/nq-mini.yaml: k is 0: Input should be greater than or equal to 1.",
    ]


def test_every_kind_of_recipe_has_a_shipped_example_that_check_accepts() -> None:
    shipped = [
        *ROOT.glob("indexes/*.yaml"),
        *ROOT.glob("pipelines/*.yaml"),
        *ROOT.glob("eval/*.yaml"),
        *ROOT.glob("odqa/assets/*.yaml"),
    ]
    assert {ok("check", path, "--json").json["recipe"]["kind"] for path in shipped} == set(RECIPES)


# --- errors and interruptions -----------------------------------------------------------------------------------------


def test_a_defect_of_odqa_is_not_hidden_as_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("odqa.recipes.load_recipe", broken)
    with pytest.raises(ZeroDivisionError):
        odqa("check", "pipelines/nq-mini.yaml")


def test_an_interruption_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    assert odqa("index") == Outcome(130, "", "interrupted; run the same command again to continue\n")


@pytest.mark.parametrize("question", ["", "  ", "\n\t"])
def test_an_empty_question_is_refused_before_anything_is_loaded(question: str) -> None:
    assert refused("ask", "pipelines/embedded.yaml", question) == "DataError: the question is empty. Ask something."


# --- eval's exit code -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("expected", "code"), [(40.0, 0), (45.0, 0), (45.1, 1), (34.9, 1)])
def test_eval_exits_with_1_when_a_number_leaves_its_tolerance(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, expected: float, code: int
) -> None:
    found = Score("em", 40.0, 30.0, 50.0, 12, "towns", "dev", "SQuAD normalisation")
    check = Check(Expectation("em", expected, 5.0), found)
    result = jobs.EvaluationResult(load_recipe("eval/embedded.yaml"), checks=[("span", check)])
    monkeypatch.setattr(jobs, "run_evaluation", lambda *_, **__: result)
    outcome = odqa("eval", "eval/embedded.yaml", "--save", tmp_path / "reports/x")
    assert outcome.code == code
    assert outcome.out.splitlines()[-1].split()[-2:] == ["40.0", "NO" if code else "yes"]
    saved = json.loads((tmp_path / "reports/x.json").read_text())
    assert (saved["ok"], saved["recipe_hash"]) == (code == 0, result.recipe.hash)
    assert "expectations" in (tmp_path / "reports/x.md").read_text()
    as_json = odqa("eval", "eval/embedded.yaml", "--json")
    assert (as_json.code, as_json.json["ok"]) == (code, code == 0)


# --- runs without scores ----------------------------------------------------------------------------------------------


@pytest.fixture
def unscored(tmp_path: Path) -> Path:
    recipe, inputs = {"kind": "pipeline"}, {"questions": {"name": "q", "sha256": "0"}, "index": None}
    with recording(tmp_path / "run", ["q1"], recipe=recipe, inputs=inputs) as writer:
        steps = (Step("retrieve", 1, 0.5, 1, ("p1",), (2.0,)), Step("read", 1, 0.25, 1))
        writer.add([Trace(Query("q1", "where?"), steps, (Answer("q1", "here", -0.5),))])
    return tmp_path / "run"


def test_explain_of_an_unscored_run_shows_the_times_and_how_to_score(unscored: Path) -> None:
    out = ok("explain", unscored).out
    assert re.search(r"^run +retrieve +0\.50 +1 +2\.0$", out, re.MULTILINE)
    assert "1 questions, 0 of them abstained on. Not scored" in out and "odqa eval RECIPE" in out
    found = ok("explain", unscored, "--json").json
    assert found["scores"] is None and found["counts"]["questions"] == 1
    assert found["measured"]["stages"]["read"]["seconds"] == 0.25


def test_explain_of_one_question_needs_no_scores(unscored: Path) -> None:
    assert "question q1: where?" in ok("explain", unscored, "--id", "q1").out
    assert ok("explain", unscored, "--id", "q1", "--json").json["id"] == "q1"
    assert "no question 'q2' in this run (it has 1)" in refused("explain", unscored, "--id", "q2")


def test_diff_of_an_unscored_run_says_how_to_score_it(unscored: Path) -> None:
    assert "this run has not been scored (scores.json is missing). Score it with: odqa eval" in refused(
        "diff", unscored, unscored
    )


def test_the_version_is_that_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{package.__version__}"\n' in text
