"""Choose the constants of hybrid retrieval on tune questions, never on dev or test.

    python scripts/tune_fusion.py alpha PIPELINE QUESTIONS... [--data DIR] [--write PIPELINE] [--out FILE]
    python scripts/tune_fusion.py constants INDEX DATA [--depths 100,200]

`alpha` chooses what BM25 weighs in a pipeline whose retriever is of kind alpha-hybrid: it searches once as deep as the
pipeline says, fuses with every alpha of `--alphas`, and takes the one with the best recall (DPR has_answer), the mean
over question files and the cutoffs of `--at`; of equally good ones the smallest. It prints all of them, leaves them in
`--out`, and with `--write` puts the chosen number into the recipe, where nothing else changes. `--index` is the folder
of the index if it does not lie where the recipe builds it.

`constants` compares ways to fuse on nq_tune and squad_tune of DATA/nq-mini: how kind hybrid got its defaults.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from odqa import __version__, config
from odqa.corpus.io import read_gold, read_questions
from odqa.errors import ArtifactError, DataError, OdqaError, RecipeError
from odqa.recipes import Places, Recipe, index_folder, load_recipe, save_setting
from odqa.retrieve.fuse import Normalise, alpha_fusion, reciprocal_rank_fusion, weighted_fusion
from odqa.retrieve.index import Index, load_index
from odqa.retrieve.rankings import Rankings
from odqa.text import has_answer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Fusion = Callable[[list[Rankings], int], Rankings]
SETS = ("nq_tune", "squad_tune")
CUTOFFS = (1, 5)
_ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Run a command; bad input is one line and exit code 2."""
    try:
        app()
    except OdqaError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        raise SystemExit(2) from None


# --- alpha


@app.command()
def alpha(
    pipeline: Annotated[str, typer.Argument(help="A pipeline recipe with a retriever of kind alpha-hybrid.")],
    questions: Annotated[list[Path], typer.Argument(help="Files of tune questions with answers.")],
    alphas: Annotated[str, typer.Option(help="FROM:TO:STEP, both ends included.")] = "0:2:0.1",
    at: Annotated[list[int] | None, typer.Option(min=1, help="Cutoffs of recall; 20 and 100 if none is named.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions of each file.")] = None,
    index: Annotated[Path | None, typer.Option(help="The folder of the index.")] = None,
    data: Annotated[Path | None, typer.Option(help="The data folder.")] = None,
    artifacts: Annotated[Path | None, typer.Option(help="Where built indexes lie.")] = None,
    write: Annotated[Path | None, typer.Option(help="Recipe file to write the chosen alpha into.")] = None,
    out: Annotated[Path | None, typer.Option(help="Result file; default: eval/results/alpha-NAME.json.")] = None,
) -> None:
    """Choose alpha of a pipeline on tune questions."""
    # 1. Everything that can be wrong is found before the search.
    recipe = load_recipe(pipeline, "pipeline")
    retriever = _alpha_hybrid(recipe)
    grid, cutoffs = parse_grid(alphas), sorted(set(at or (20, 100)))
    if write is not None:
        if not write.is_file():
            raise RecipeError(f"--write {write}: no such file here. Copy a recipe there first.")
        _alpha_hybrid(load_recipe(write, "pipeline"))
    opened = _open(recipe, index, Places.from_environment(data, artifacts))
    # 2. Search once, fuse with every alpha.
    depth = max(retriever.depth, *cutoffs)
    judged = [_Judged(opened, path, depth, limit=limit) for path in questions]
    names = [f"{path.stem}.recall@{k}" for path in questions for k in cutoffs]
    typer.echo("\t".join(("alpha", *names, "mean")))
    rows = []
    for number in grid:
        fuse = partial(_alpha, number, retriever.normalise)
        recalls = [recall for one in judged for recall in one.recalls(fuse, depth, cutoffs)]
        row = {"alpha": number, **dict(zip(names, recalls, strict=True)), "mean": float(np.mean(recalls))}
        typer.echo("\t".join((f"{number:g}", *(f"{recall:.1f}" for recall in recalls), f"{row['mean']:.2f}")))
        rows.append({name: round(value, 4) for name, value in row.items()})
    # 3. Say it, leave it, write it.
    best = max(rows, key=lambda row: (row["mean"], -row["alpha"]))
    result = {
        "what": "recall in percent (DPR has_answer) of dense + alpha * BM25 on tune questions",
        "odqa": __version__,
        "commit": _commit(),
        "recipe": pipeline,
        "recipe_hash": recipe.hash,
        "index": {"name": opened.path.name, "hash": opened.artifact.hash},
        "questions": {
            path.name: {"sha256": _sha256(path), "n": one.n} for path, one in zip(questions, judged, strict=True)
        },
        "depth": depth,
        "normalise": retriever.normalise,
        "alphas": rows,
        "chosen": best["alpha"],
    }
    file = out or _ROOT / "eval" / "results" / f"alpha-{recipe.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    typer.echo(f"chosen alpha: {best['alpha']:g} (mean {best['mean']:.2f}; the recipe has {retriever.alpha:g})")
    if len(grid) > 1 and best["alpha"] in (grid[0], grid[-1]):
        typer.echo(f"warning: {best['alpha']:g} is at the end of {alphas}. Look further with --alphas.", err=True)
    if write is not None:
        save_setting(write, "retriever.alpha", best["alpha"])
        typer.echo(f"{write}: alpha is {best['alpha']:g} now", err=True)


def parse_grid(text: str) -> list[float]:
    """The numbers of FROM:TO:STEP, both ends included; of a single number that one. Raises DataError for others."""
    parts = text.split(":")
    try:
        first, last, step = map(float, parts if len(parts) != 1 else (*parts, *parts, "1"))
    except ValueError:
        raise DataError(f"--alphas {text}: expected FROM:TO:STEP, such as 0:2:0.1, or one number.") from None
    if not (0 <= first <= last < float("inf") and 0 < step < float("inf")):
        raise DataError(f"--alphas {text}: expected 0 <= FROM <= TO and a STEP above 0.")
    return [round(first + number * step, 6) for number in range(int((last - first) / step + 1e-9) + 1)]


def _alpha_hybrid(recipe: Recipe) -> config.AlphaHybridRetriever:
    assert isinstance(recipe.settings, config.PipelineRecipe)
    retriever = recipe.settings.retriever
    if not isinstance(retriever, config.AlphaHybridRetriever):
        found = "none" if retriever is None else retriever.kind
        raise RecipeError(f"{recipe.path}: its retriever is {found}; only alpha-hybrid has an alpha to choose.")
    return retriever


def _open(recipe: Recipe, folder: Path | None, places: Places) -> Index:
    assert isinstance(recipe.settings, config.PipelineRecipe) and recipe.settings.index is not None
    where = folder or index_folder(recipe.settings.index, places)[0]
    if not where.is_dir():
        raise ArtifactError(f"{where}: the index is not built yet. Build it with: odqa index {recipe.settings.index}")
    return load_index(where)


def _alpha(number: float, normalise: bool, runs: list[Rankings], k: int) -> Rankings:
    sparse, dense = runs
    return alpha_fusion(sparse, dense, k, alpha=number, normalise=normalise)


def _commit() -> str | None:
    """The commit of this checkout, None outside of one."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=_ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- constants


@app.command()
def constants(
    index: Annotated[Path, typer.Argument(help="An index of DATA/nq-mini/psgs.tsv.gz with BM25 and vectors.")],
    data: Annotated[Path, typer.Argument(help="The data folder.")],
    depths: Annotated[str, typer.Option(help="Depths of the lists.")] = "100,200",
) -> None:
    """Recall@1 and @5 of every way to fuse; the best mean of the four is the last line."""
    tried = [int(depth) for depth in depths.split(",")]
    opened = load_index(index)
    judged = [_Judged(opened, data / "nq-mini" / f"{name}.jsonl", max(tried)) for name in SETS]
    typer.echo("\t".join(("candidate", *(f"{name}@{k}" for name in SETS for k in CUTOFFS), "mean")))
    best = (0.0, "")
    for depth in tried:
        for name, fuse in candidates():
            recalls = [recall for questions in judged for recall in questions.recalls(fuse, depth, CUTOFFS)]
            mean = float(np.mean(recalls))
            typer.echo("\t".join((f"depth {depth} {name}", *(f"{recall:.1f}" for recall in recalls), f"{mean:.2f}")))
            best = max(best, (mean, f"depth {depth} {name}"))
    typer.echo(f"best: {best[1]} (mean {best[0]:.2f})")


def candidates() -> Iterator[tuple[str, Fusion]]:
    """The grid: what is tried. Weights are (BM25, dense) and sum to 1."""
    for c in (1, 10, 60):
        yield f"rrf c={c}", partial(reciprocal_rank_fusion, c=c)
    normalisations: tuple[Normalise, ...] = ("none", "min-max", "z-score")
    for normalise in normalisations:
        for bm25 in np.arange(0.0, 1.01, 0.05):
            # raw BM25 scores are some 30 times cosines: look closely where the two weigh alike
            weight = bm25 * 0.05 if normalise == "none" else bm25
            weights = (round(float(weight), 4), round(1 - float(weight), 4))
            yield f"{normalise} weights={weights}", partial(_weighted, weights, normalise)


def _weighted(weights: tuple[float, float], normalise: Normalise, runs: list[Rankings], k: int) -> Rankings:
    return weighted_fusion(runs, weights, k, normalise=normalise)


# --- both


class _Judged:
    """The runs of one question set, and which of their passages hold an answer (looked up once)."""

    def __init__(self, index: Index, path: Path, depth: int, *, limit: int | None = None) -> None:
        texts = [query.text for query in read_questions(path)][:limit]
        if not texts:
            raise DataError(f"{path}: no questions here; alpha cannot be chosen without any.")
        self.n = len(texts)
        self.runs = [searcher.search(texts, depth) for searcher in (index.bm25, index.dense)]
        self._answers = [gold.answers for gold in read_gold(path)][:limit]
        self._store = index.store
        self._known: dict[tuple[int, int], bool] = {}

    def recalls(self, fuse: Fusion, depth: int, cutoffs: Sequence[int]) -> list[float]:
        """Recall in percent at each cutoff."""
        fused = fuse([run.cut(depth) for run in self.runs], max(cutoffs))
        ranked = enumerate(fused.rows.tolist())
        found = np.array([[self._has_answer(query, row) for row in rows] for query, rows in ranked])
        return [100 * float(found[:, :k].any(axis=1).mean()) for k in cutoffs]

    def _has_answer(self, query: int, row: int) -> bool:
        if row >= 0 and (query, row) not in self._known:
            self._known[query, row] = has_answer(self._store[row].text, self._answers[query])
        return row >= 0 and self._known[query, row]


if __name__ == "__main__":
    main()
