"""Encodes the passages of an index recipe and the questions in float32 and in bfloat16, searches exactly, and
compares the two: mean overlap of the top 20, and recall@1, @5, @20 and @100. float32 takes long: nq-mini's 48,852
passages about 36 minutes on one thread. With `--passages N` only N are encoded, evenly drawn; recall is then that of a
smaller collection, which lacks answers, and is to be compared between the two formats alone.
"""

import json
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.common import RESULTS, save_result

if TYPE_CHECKING:
    from odqa.corpus.store import PassageStore
    from odqa.retrieve.rankings import Rankings
    from odqa.types import Passage

_PRECISIONS = ("float32", "bfloat16")


def precision(
    recipe: Annotated[str, typer.Argument(help="An index recipe with an encoder.")],
    questions: Annotated[list[Path], typer.Argument(help="Question files with answers.")],
    data: Annotated[Path | None, typer.Option(help="The data folder.")] = None,
    passages: Annotated[int | None, typer.Option(min=1, help="Encode only so many, evenly drawn.")] = None,
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = RESULTS / "bench-precision.json",
) -> None:
    """Dense retrieval in bfloat16 against float32: overlap of the top 20, and recall."""
    from odqa.errors import OdqaError

    try:
        encoded, sets = _compare_precisions(recipe, questions, data, passages)
    except OdqaError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(2) from None
    for row in sets:
        typer.echo(json.dumps(row))
    what = "one encoder in two number formats, exact search; overlap of the top 20, recall by has_answer in percent"
    save_result(out, {"what": what, "recipe": recipe, "passages": encoded, "sets": sets})


def _compare_precisions(
    recipe: str, questions: list[Path], data: Path | None, passages: int | None
) -> tuple[int, list[dict[str, object]]]:
    """How many passages were encoded, and what the result says of each question file."""
    from odqa import config, jobs
    from odqa.corpus.io import read_gold, read_questions
    from odqa.errors import RecipeError
    from odqa.recipes import Places, load_recipe, read_source

    texts = [[query.text for query in read_questions(path)] for path in questions]
    answers = [[gold.answers for gold in read_gold(path)] for path in questions]
    settings = load_recipe(recipe, "index").settings
    if not isinstance(settings, config.IndexRecipe) or settings.dense is None:
        raise RecipeError(f"{recipe}: no encoder under dense; there is nothing to compare.")
    places = Places.from_environment(data)
    found: dict[str, list[Rankings]] = {}  # by number format, one for each question file
    with tempfile.TemporaryDirectory() as folder:
        changes: dict[str, object] = {"bm25": None, "dense.vectors": {}}
        if passages is not None:
            sample = Path(folder) / "passages.jsonl"
            _save_sample(
                read_source(settings.passages, places.file(settings.passages.file), places=places), passages, sample
            )
            changes["passages"] = {"kind": "passages", "file": str(sample)}
        for dtype in _PRECISIONS:
            variant = load_recipe(recipe, "index", settings={**changes, "dense.dtype": dtype})
            index = jobs.build_index(variant, places=places, out=Path(folder) / dtype)
            found[dtype] = [index.dense.search(asked, 100) for asked in texts]
        store = index.store  # the passages are the same in both
        one, other = (found[dtype] for dtype in _PRECISIONS)
        sets: list[dict[str, object]] = [
            {
                "questions": path.stem,
                "n": len(texts[number]),
                "top_20_overlap": round(top_overlap(one[number], other[number], 20), 4),
                **{dtype: _recall_of_rows(found[dtype][number], answers[number], store) for dtype in _PRECISIONS},
            }
            for number, path in enumerate(questions)
        ]
        return len(store), sets


def _save_sample(passages: "Iterable[Passage]", count: int, path: Path) -> None:
    """Write `count` passages from the first to the last, or all if there are no more."""
    listed = list(passages)
    step = max(1.0, len(listed) / count)
    chosen = [listed[int(number * step)] for number in range(min(count, len(listed)))]
    rows = [json.dumps({"id": p.id, "title": p.title, "text": p.text}, ensure_ascii=False) + "\n" for p in chosen]
    path.write_text("".join(rows), encoding="utf-8")


def top_overlap(one: "Rankings", other: "Rankings", k: int) -> float:
    """Mean over queries of the share of the first k rows that two rankings have in common; 1 without queries."""
    shares = []
    for first, second in zip(one.rows[:, :k].tolist(), other.rows[:, :k].tolist(), strict=True):
        tops = {row for row in first if row >= 0}, {row for row in second if row >= 0}
        shares.append(len(tops[0] & tops[1]) / max(len(tops[0]), len(tops[1]), 1))
    return statistics.mean(shares) if shares else 1.0


def _recall_of_rows(found: "Rankings", answers: list[tuple[str, ...]], store: "PassageStore") -> dict[str, float]:
    """Share (0 to 100) of questions with an answer in the first k passages."""
    from odqa.text import has_answer

    holds = [
        [row >= 0 and has_answer(store[row].text, right) for row in rows]
        for rows, right in zip(found.rows.tolist(), answers, strict=True)
    ]
    return {f"recall@{k}": round(100 * statistics.mean(any(row[:k]) for row in holds), 2) for k in (1, 5, 20, 100)}
