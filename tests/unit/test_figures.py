"""Figures: what is drawn, that it is the same each time, and that a missing matplotlib costs no result."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from odqa import config, jobs
from odqa.errors import DataError, RecipeError
from odqa.evaluate import Evaluation, QuestionResult, Score
from odqa.figures import COLOURS, Measured, lines, risk_coverage, save_figure, training_curve
from odqa.recipes import Recipe

pytest.importorskip("matplotlib", reason="figures need the extra plots")


def evaluation(em: float, name: str = "nq") -> Evaluation:
    score = Score("em", em, em - 5, em + 5, 10, name, "dev", "SQuAD normalisation")
    ranks: dict[str, int | None] = {"retrieve_rank": 1, "rerank_rank": None, "final_rank": 1}
    question = QuestionResult(
        "q", ("x",), "x", "correct", em=True, f1=1.0, **ranks, in_context=True, tokens=150, passes=1
    )
    return Evaluation(name, "dev", "string", (score,), (question,) * 10, 160, 0, 2000)


SYSTEMS = [
    Measured("whole-160", 160, evaluation(40.0)),
    Measured("whole-256", 256, evaluation(45.0)),
    Measured("sentences-160", 160, evaluation(42.0)),
    Measured("sentences-256", 256, evaluation(46.0)),
    Measured("reverse", 160, evaluation(41.0)),
]


def texts(svg: Path) -> list[str]:
    """The texts of a figure: matplotlib draws letters as shapes, and leaves each text beside them as a comment."""
    return re.findall(r"<!-- (.*?) -->", svg.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "x", "line"),
    [("whole-160", 160, "whole"), ("whole 1.5", 1.5, "whole"), ("whole-1600", 160, "whole-1600"), ("160", 160, "160")],
)
def test_the_line_of_a_system_is_its_name_without_its_number(name: str, x: float, line: str) -> None:
    assert Measured(name, x, evaluation(1.0)).line == line


def test_lines_share_a_legend_over_panels_that_each_have_an_axis(tmp_path: Path) -> None:
    path = tmp_path / "users.svg"
    panels = {"ratio": {"mini": ([1, 20], [1.0, 1.1])}, "bytes": {"mini": ([1, 20], [1e3, 2e4]), "all": ([1], [5e6])}}
    lines(path, panels, x_label="users", x_scale="log", logarithmic=["bytes"])
    shown = texts(path)
    assert {"ratio", "bytes", "users", "20"} <= set(shown)
    assert shown.count("mini") == shown.count("all") == 1
    before = path.read_bytes()
    lines(path, panels, x_label="users", x_scale="log", logarithmic=["bytes"])
    assert path.read_bytes() == before


def test_draws_a_line_a_group_with_labels_and_units(tmp_path: Path) -> None:
    path = tmp_path / "new" / "packing.svg"
    save_figure(path, SYSTEMS, metrics=["em"], x_label="budget, tokens", x_scale="log")
    shown = texts(path)
    assert {"whole", "sentences", "reverse", "budget, tokens", "em, %", "160", "256"} <= set(shown)
    assert {"nq dev (n = 10)", "bands: 95% intervals"} <= set(shown)
    drawn = path.read_text(encoding="utf-8").lower()
    assert all(colour.lower() in drawn for colour in COLOURS[:3])
    assert COLOURS[3].lower() not in drawn


def test_has_a_column_for_each_question_set_and_a_row_for_each_metric(tmp_path: Path) -> None:
    both = [*SYSTEMS, Measured("whole-160", 160, evaluation(30.0, "squad"))]
    save_figure(tmp_path / "a.svg", both, metrics=["em", "em"], x_label="budget")
    shown = texts(tmp_path / "a.svg")
    assert shown.count("budget") == 2 and shown.count("em, %") >= 2
    assert len([text for text in shown if text.startswith(("nq dev", "squad dev"))]) == 2


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_same_numbers_give_the_same_bytes(tmp_path: Path, ending: str) -> None:
    for name in ("a", "b"):
        save_figure(tmp_path / f"{name}.{ending}", SYSTEMS, metrics=["em"], x_label="budget")
    assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()


def test_a_metric_that_was_not_measured_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="recall@5 was not measured on nq dev"):
        save_figure(tmp_path / "a.svg", SYSTEMS, metrics=["recall@5"], x_label="budget")


def test_draws_risk_against_coverage_in_percent(tmp_path: Path) -> None:
    path = tmp_path / "risk.svg"
    curves = {"first edition": ([0.5, 1.0], [0.1, 0.3]), "second edition": ([0.2, 1.0], [0.0, 0.25])}
    risk_coverage(path, curves, title="squad dev", points={"second edition": (0.2, 0.0)})
    shown = texts(path)
    assert {"first edition", "second edition", "squad dev", "coverage, % of questions answered"} <= set(shown)
    assert "100" in shown  # coverage 1.0 is 100%


def test_refuses_a_curve_of_two_lengths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="curve a: 2 coverages and 1 risks"):
        risk_coverage(tmp_path / "a.svg", {"a": ([0.5, 1.0], [0.1])})


def test_importing_figures_loads_no_matplotlib() -> None:
    code = "import sys, odqa.figures; print('matplotlib' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


# --- beside the result files of an evaluation -------------------------------------------------------------------------


@pytest.fixture
def result() -> jobs.EvaluationResult:
    """An evaluation of two systems whose recipe asks for a figure of EM against the budget."""
    question_set = config.QuestionSet(name="nq", file="questions.jsonl", split="dev")
    figure = config.FigureSettings(x="packer.budget", x_label="tokens", y=("em",))
    recipe = config.EvalRecipe(
        kind="eval",
        pipelines=(
            config.Variant(recipe="a.yaml", name="whole-160"),
            config.Variant(recipe="a.yaml", name="whole-256"),
        ),
        questions=(question_set,),
        figure=figure,
    )
    run = SimpleNamespace(manifest={"inputs": {}})
    systems = [
        jobs.System(Recipe(Path(f"whole-{budget}.yaml"), pipeline(budget)), evaluation(em), run)  # type: ignore[arg-type]
        for budget, em in ((160, 40.0), (256, 45.0))
    ]
    return jobs.EvaluationResult(Recipe(Path("packing.yaml"), recipe), systems)


def pipeline(budget: int) -> config.PipelineRecipe:
    reader = config.SpanReaderSettings(kind="span", model="m")
    return config.PipelineRecipe(kind="pipeline", packer=config.PackerSettings(budget=budget), reader=reader)


def test_an_evaluation_leaves_its_figure_beside_its_numbers(result: jobs.EvaluationResult, tmp_path: Path) -> None:
    result.save(tmp_path / "packing")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packing.json", "packing.md", "packing.svg"]
    assert {"whole", "tokens", "em, %", "160", "256"} <= set(texts(tmp_path / "packing.svg"))


def test_without_matplotlib_the_numbers_are_saved_with_a_warning(
    result: jobs.EvaluationResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # import matplotlib now fails
    lines: list[str] = []
    result.save(tmp_path / "packing", lines.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packing.json", "packing.md"]
    (line,) = lines
    assert line.startswith("warning: the figure is missing.") and "odqa[plots]" in line


@pytest.mark.parametrize(
    ("path", "found"),
    [("packer.bugdet", "None"), ("packer.order", "'score'"), ("reader.guard", "None"), ("k.x", "None")],
)
def test_what_stands_on_the_x_axis_must_be_a_number_of_the_recipe(path: str, found: str) -> None:
    recipe = Recipe(Path("whole.yaml"), pipeline(160))
    assert jobs.number_at(recipe, "packer.budget") == 160
    with pytest.raises(RecipeError, match=f"figure.x: {path} of whole is {found}"):
        jobs.number_at(recipe, path)


def test_draws_the_curve_of_a_training(tmp_path: Path) -> None:
    curve: list[dict[str, float]] = [{"step": 20, "loss": 3.0}, {"step": 40, "loss": 2.0, "tune_em": 10.0}]
    path = tmp_path / "curve.svg"
    training_curve(path, {"prompt, rate 0.3": curve, "lora": curve[:1]}, scores=["tune_em"])
    assert {"prompt, rate 0.3", "lora", "loss, nats", "steps", "tune em"} <= set(texts(path))
    with pytest.raises(DataError, match="cannot show f1"):
        training_curve(path, {"lora": curve}, scores=["f1"])
