"""Choose where a pipeline reads again on tune questions: the confidence below which its recursion makes another pass.

    python scripts/tune_recursion.py PIPELINE QUESTIONS... [--data DIR] [--write PIPELINE] [--out STEM]

The pipeline answers every question with all its passes (recursion.below: null), into run folders that later calls find
again. For each threshold it is then known what would have been answered, and for how many passes, tokens and seconds:
the accuracy-cost curve. Chosen is the threshold with the best exact match, the mean over question files, among those
that read at least `--at-least` of the questions again; of equally good ones the lowest. `--write` puts it into a
recipe, where nothing else changes. Left in `--out` are STEM.json and, where matplotlib is there, STEM.svg. Never give
it dev questions.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from odqa import __version__, config, jobs
from odqa.corpus.io import read_gold, read_questions
from odqa.errors import DataError, OdqaError, RecipeError
from odqa.recipes import Places, Recipe, describe_file, load_recipe, save_setting
from odqa.recurse import confidence_of
from odqa.runs import Run
from odqa.text import exact_match
from odqa.types import Gold, Trace

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
_ROOT = Path(__file__).resolve().parent.parent
_POINTS = 41  # our choice: thresholds at every 2.5 % of the questions


def main() -> None:
    """Run the command; bad input is one line and exit code 2."""
    try:
        app()
    except OdqaError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        raise SystemExit(2) from None


@app.command()
def tune(
    pipeline: Annotated[str, typer.Argument(help="A pipeline recipe with a recursion.")],
    questions: Annotated[list[Path], typer.Argument(help="Files of tune questions with answers.")],
    at_least: Annotated[float, typer.Option(min=0, max=1, help="Share of questions to be read again at least.")] = 0.15,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions of each file.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="As for odqa.")] = None,
    data: Annotated[Path | None, typer.Option(help="The data folder.")] = None,
    artifacts: Annotated[Path | None, typer.Option(help="Where built indexes lie.")] = None,
    runs: Annotated[Path, typer.Option(help="Where the runs lie.")] = Path("runs/tune-recursion"),
    write: Annotated[Path | None, typer.Option(help="Recipe file to write recursion.below into.")] = None,
    out: Annotated[Path | None, typer.Option(help="Stem of the results; default: eval/results/recursion-NAME.")] = None,
) -> None:
    """Choose recursion.below of a pipeline on tune questions."""
    # 1. Everything that can be wrong is found before the first question.
    recipe = _always(pipeline, changes or [])
    if write is not None:
        _check_written(write)
    places = Places.from_environment(data, artifacts)
    loaded = jobs.load_pipeline(recipe, places=places, log=_log)
    # 2. All passes for all questions, then every threshold.
    judged = [_answered(loaded, path, runs, limit) for path in questions]
    thresholds = grid([path.confidences[0] for one in judged for path in one.questions])
    rows = [curve_point(threshold, judged) for threshold in thresholds]
    chosen = choose(rows, at_least)
    # 3. Say it, leave it, write it.
    typer.echo(
        "\t".join(("below", "read again", *(f"{one.name}.em" for one in judged), "mean EM", "passes", "tokens", "s"))
    )
    for row in rows:
        cells = [f"{row['below']:.4f}", f"{100 * row['share']:.1f} %", *(f"{em:.2f}" for em in row["em"])]
        cells += [f"{row['mean']:.2f}", f"{row['passes']:.3f}", f"{row['tokens']:.0f}", f"{row['seconds']:.3f}"]
        typer.echo("\t".join(cells))
    stem = out or _ROOT / "eval" / "results" / f"recursion-{recipe.name}"
    _save(stem, recipe, judged, rows, chosen, at_least)
    mean = f"mean EM {chosen['mean']:.2f}, {rows[0]['mean']:.2f} without a second pass"
    typer.echo(f"chosen below: {chosen['below']:.4g} ({100 * chosen['share']:.1f} % read again; {mean})")
    if write is not None:
        save_setting(write, "recursion.below", float(f"{chosen['below']:.4g}"))
        typer.echo(f"{write}: recursion.below is {chosen['below']:.4g} now", err=True)


@dataclass(frozen=True, slots=True)
class Way:
    """One question with all its passes: of each how sure its answer is, whether it is right, and what it took."""

    confidences: tuple[float, ...]
    right: tuple[bool, ...]
    tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    def passes(self, below: float) -> int:
        """How many passes there are where one that is less sure than `below` is followed by the next."""
        made = 1
        while made < len(self.right) and not self.confidences[made - 1] >= below:
            made += 1
        return made


@dataclass(frozen=True, slots=True)
class Judged:
    """A question file, answered."""

    name: str
    source: dict[str, str]
    questions: tuple[Way, ...]


def way_of(trace: Trace, gold: Gold) -> Way:
    """What a trace of all passes tells."""
    passes = range(1, len(trace.answers) + 1)
    return Way(
        tuple(confidence_of(answer) for answer in trace.answers),
        tuple(exact_match(answer.text, gold.answers) for answer in trace.answers),
        tuple(context.tokens for context in trace.contexts),
        tuple(float(np.nansum([s.seconds for s in trace.steps if s.pass_no == n])) for n in passes),
    )


def grid(confidences: Sequence[float]) -> list[float]:
    """Thresholds from "nobody" to "everybody" in equal steps of questions."""
    cuts = np.quantile(np.asarray(confidences), np.linspace(0, 1, _POINTS), method="higher").tolist()
    return [0.0, *dict.fromkeys(float(f"{cut:.4g}") for cut in cuts[1:-1]), 1.0]


def curve_point(below: float, judged: Sequence[Judged]) -> dict[str, Any]:
    """Exact match of each file (percent), and the mean cost of a question, at one threshold."""
    made = [[(way, way.passes(below)) for way in one.questions] for one in judged]
    every = [pair for one in made for pair in one]
    em = [round(100 * float(np.mean([way.right[n - 1] for way, n in one])), 4) for one in made]
    return {
        "below": below,
        "share": round(float(np.mean([n > 1 for _, n in every])), 6),
        "em": em,
        "mean": round(float(np.mean(em)), 4),
        "passes": round(float(np.mean([n for _, n in every])), 4),
        "tokens": round(float(np.mean([sum(way.tokens[:n]) for way, n in every])), 2),
        "seconds": round(float(np.mean([sum(way.seconds[:n]) for way, n in every])), 4),
    }


def choose(rows: Sequence[dict[str, Any]], at_least: float) -> dict[str, Any]:
    """The best mean among thresholds that read enough questions again; of equal ones the lowest."""
    allowed = [row for row in rows if row["share"] >= at_least]
    if not allowed:
        most = 100 * max(row["share"] for row in rows)
        raise DataError(
            f"--at-least {at_least:g}: the recursion makes a second pass for {most:.1f} % of the questions at most. "
            "Ask for less."
        )
    return max(allowed, key=lambda row: (row["mean"], -row["below"]))


def _always(pipeline: str, changes: Sequence[str]) -> Recipe:
    """The recipe without its threshold."""
    recipe = load_recipe(pipeline, "pipeline", changes=changes)
    assert isinstance(recipe.settings, config.PipelineRecipe)
    if recipe.settings.recursion is None:
        raise RecipeError(f"{recipe.path}: it has no recursion, so nothing to choose. Add one.")
    return load_recipe(pipeline, "pipeline", changes=[*changes, "recursion.below=null"])


def _check_written(write: Path) -> None:
    if not write.is_file():
        raise RecipeError(f"--write {write}: no such file here. Copy a recipe there first.")
    settings = load_recipe(write, "pipeline").settings
    assert isinstance(settings, config.PipelineRecipe)
    if settings.recursion is None or settings.recursion.below is None:
        raise RecipeError(f"--write {write}: recursion.below is not written there as a number. Write one first.")


def _answered(loaded: jobs.Loaded, path: Path, runs: Path, limit: int | None) -> Judged:
    """The question file answered with all passes, or found answered in its run folder."""
    queries, gold = read_questions(path), read_gold(path)
    source = describe_file(path.name, path) | ({} if limit is None else {"first": str(limit)})
    folder = runs / f"{loaded.recipe.name}-{loaded.recipe.hash[:8]}" / path.name.split(".")[0]
    run: Run = jobs.run_queries(loaded, queries[:limit], folder, source=source, share=runs, log=_log)
    ways = tuple(way_of(trace, one) for trace, one in zip(run.traces(), gold[:limit], strict=True))
    return Judged(path.name.split(".")[0], source, ways)


def _save(
    stem: Path, recipe: Recipe, judged: Sequence[Judged], rows: Sequence[dict[str, Any]], chosen: Any, at_least: float
) -> None:
    result = {
        "what": "exact match in percent on tune questions, and passes, tokens and seconds a question, by threshold",
        "odqa": __version__,
        "commit": _commit(),
        "recipe": recipe.resolved,
        "recipe_hash": recipe.hash,
        "questions": {one.name: {**one.source, "n": len(one.questions)} for one in judged},
        "at_least": at_least,
        "curve": rows,
        "chosen": chosen,
    }
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_name(stem.name + ".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    try:
        _draw(stem.with_name(stem.name + ".svg"), judged, rows, chosen)
    except ImportError:
        typer.echo("warning: the figure is missing. Install odqa[plots].", err=True)


def _draw(path: Path, judged: Sequence[Judged], rows: Sequence[dict[str, Any]], chosen: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "odqa"
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    shares = [100 * row["share"] for row in rows]
    for number, one in enumerate(judged):
        axes.plot(shares, [row["em"][number] for row in rows], label=one.name)
    axes.axvline(100 * chosen["share"], color="grey", linestyle=":", label=f"chosen: below {chosen['below']:.3g}")
    axes.set_xlabel("questions read again (%)")
    axes.set_ylabel("exact match (%)")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _commit() -> str | None:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False).stdout.strip() or None


def _log(line: str) -> None:
    typer.echo(line, err=True)


if __name__ == "__main__":
    main()
