"""What a collection can answer of whole question sets, beside what a pipeline answered of their first questions.

    python scripts/question_sets.py --data DIR

For each eval recipe: the ceiling over all its questions (`odqa.evaluate.ceiling`; its `limit` does not count here),
and, if `odqa eval RECIPE --save eval/results/RECIPE` has been run, the scores of its sample. Writes
eval/results/questions.md and .json.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from odqa import config, jobs
from odqa.artifacts import save_file
from odqa.evaluate import bootstrap_interval
from odqa.recipes import Places, Recipe, index_folder, load_recipe, load_variants
from odqa.report import Table
from odqa.retrieve.index import Index, load_index

RESULTS = Path(__file__).resolve().parent.parent / "eval/results"
SETS = ("nq-open", "triviaqa", "webquestions", "curatedtrec", "efficientqa")
METRICS = ("ceiling", "recall@20", "recall@100", "recall_in_context", "em")


def main(
    recipes: Annotated[list[str] | None, typer.Argument(help="Eval recipes with one question set each.")] = None,
    data: Annotated[Path | None, typer.Option(help="The data folder [env: ODQA_DATA].")] = None,
    out: Annotated[Path, typer.Option(help="The result; a table, .md, beside it.")] = RESULTS / "questions.json",
) -> None:
    """Write the table of all question sets."""
    places = Places.from_environment(data)
    loaded = [load_recipe(name, "eval") for name in recipes or [f"eval/questions-{name}.yaml" for name in SETS]]
    indexes = {_index_name(recipe) for recipe in loaded}
    if len(indexes) != 1:
        raise typer.BadParameter(f"the recipes ask {len(indexes)} collections; a table is about one")
    index = load_index(index_folder(indexes.pop(), places)[0])
    record = {"passages": len(index.store), "sets": measure(loaded, index, places)}
    save_file(out, json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    save_file(out.with_suffix(".md"), table(record).markdown() + "\n")
    typer.echo(table(record).text())


def measure(recipes: list[Recipe], index: Index, places: Places) -> list[dict[str, Any]]:
    """The ceilings of whole sets, in one pass over the collection, and the scores of samples where there are any."""
    sets = [_question_set(recipe).model_copy(update={"limit": None}) for recipe in recipes]
    asked = [(jobs.load_questions(found, places)[2], found.matcher) for found in sets]
    held = jobs.questions_in_collection(index, asked, places=places)
    rows = []
    for recipe, found, (gold, matcher), ids in zip(recipes, sets, asked, held, strict=True):
        assert ids is not None
        mean = bootstrap_interval([100.0 * (item.query_id in ids) for item in gold if item.answers])
        whole = {"n": len(gold), "value": mean.value, "low": mean.low, "high": mean.high}
        rows.append(
            {
                "set": found.name,
                "split": found.split,
                "matcher": matcher,
                "ceiling": {name: round(value, 4) for name, value in whole.items()},
                "sample": _sample(recipe.name),
            }
        )
    return rows


def table(record: dict[str, Any]) -> Table:
    """One row a question set."""
    rows = []
    for item in record["sets"]:
        whole, sample = item["ceiling"], item["sample"]
        cells = [_cell(sample["scores"].get(name)) for name in METRICS] if sample else ["not run"] + [""] * 4
        n = str(sample["n"]) if sample else ""
        rows.append((f"{item['set']} {item['split']}", item["matcher"], f"{whole['n']:,}", _cell(whole), n, *cells))
    columns = ("questions", "matcher", "n", "ceiling of all", "sample", *METRICS)
    notes = (
        "ceiling: share of questions, in percent, that any passage of the collection answers (has_answer).",
        "The sample is the first questions of the set; [low, high] are 95% bootstrap intervals.",
    )
    title = f"Question sets over {record['passages']:,} passages"
    return Table(title, columns, tuple(rows), frozenset({"matcher"}), notes)


def _cell(score: dict[str, float] | None) -> str:
    return "" if score is None else f"{score['value']:.1f} [{score['low']:.1f}, {score['high']:.1f}]"


def _sample(name: str) -> dict[str, Any] | None:
    """What a saved evaluation says of its one system; None if there is none."""
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        return None
    (system,) = json.loads(file.read_text(encoding="utf-8"))["systems"]
    scores = {score["name"]: {key: score[key] for key in ("value", "low", "high")} for score in system["scores"]}
    return {"pipeline": system["pipeline_name"], "n": system["n"], "budget": system["budget"], "scores": scores}


def _question_set(recipe: Recipe) -> config.QuestionSet:
    assert isinstance(recipe.settings, config.EvalRecipe)
    (found,) = recipe.settings.questions
    return found


def _index_name(recipe: Recipe) -> str:
    (variant,) = load_variants(recipe)
    assert isinstance(variant.settings, config.PipelineRecipe)
    if variant.settings.index is None:
        raise typer.BadParameter(f"{recipe.path}: a closed-book pipeline has no collection")
    return variant.settings.index


if __name__ == "__main__":
    typer.run(main)
