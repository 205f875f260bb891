"""Choose the constants of hybrid retrieval on the tune questions of nq-mini, never on dev.

    python scripts/tune_fusion.py INDEX DATA [--depths 100,200]

INDEX is an index of DATA/nq-mini/psgs.tsv.gz with BM25 and vectors. Prints recall@1 and @5 (DPR has_answer) of every
candidate on nq_tune and squad_tune, and the candidate with the best mean of the four as the last line.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from odqa.corpus.io import read_gold, read_questions
from odqa.retrieve.fuse import Normalise, reciprocal_rank_fusion, weighted_fusion
from odqa.retrieve.index import Index, load_index
from odqa.retrieve.rankings import Rankings
from odqa.text import has_answer

Fusion = Callable[[list[Rankings], int], Rankings]
SETS = ("nq_tune", "squad_tune")
CUTOFFS = (1, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("index", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--depths", default="100,200")
    arguments = parser.parse_args()
    depths = [int(depth) for depth in arguments.depths.split(",")]
    index = load_index(arguments.index)
    judged = [_Judged(index, arguments.data / "nq-mini" / f"{name}.jsonl", max(depths)) for name in SETS]
    print("candidate", *(f"{name}@{k}" for name in SETS for k in CUTOFFS), "mean", sep="\t")
    best = (0.0, "")
    for depth in depths:
        for name, fuse in candidates():
            recalls = [recall for questions in judged for recall in questions.recalls(fuse, depth)]
            mean = float(np.mean(recalls))
            print(f"depth {depth} {name}", *(f"{recall:.1f}" for recall in recalls), f"{mean:.2f}", sep="\t")
            best = max(best, (mean, f"depth {depth} {name}"))
    print(f"best: {best[1]} (mean {best[0]:.2f})")


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


class _Judged:
    """The runs of one question set, and which of their passages hold an answer (looked up once)."""

    def __init__(self, index: Index, path: Path, depth: int) -> None:
        texts = [query.text for query in read_questions(path)]
        self.runs = [searcher.search(texts, depth) for searcher in (index.bm25, index.dense)]
        self._answers = [gold.answers for gold in read_gold(path)]
        self._store = index.store
        self._known: dict[tuple[int, int], bool] = {}

    def recalls(self, fuse: Fusion, depth: int) -> list[float]:
        """Recall in percent at each cutoff."""
        fused = fuse([run.cut(depth) for run in self.runs], max(CUTOFFS))
        ranked = enumerate(fused.rows.tolist())
        found = np.array([[self._has_answer(query, row) for row in rows] for query, rows in ranked])
        return [100 * float(found[:, :k].any(axis=1).mean()) for k in CUTOFFS]

    def _has_answer(self, query: int, row: int) -> bool:
        if row >= 0 and (query, row) not in self._known:
            self._known[query, row] = has_answer(self._store[row].text, self._answers[query])
        return row >= 0 and self._known[query, row]


if __name__ == "__main__":
    main()
