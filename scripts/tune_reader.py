"""Choose how the embedded reader joins passages, on the tune questions of nq-mini (never on dev).

    python scripts/tune_reader.py --data DIR [--readers FOLDER ...] [--limit 300] [--budget 512]

Ranks and packs once with pipelines/nq-mini.yaml, reads each passage once with each reader, and prints EM under every
setting on nq_tune and on the first --limit questions of squad_tune, and the mean of the two.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from odqa import jobs
from odqa.corpus.io import read_gold, read_questions
from odqa.pack import GreedyPacker
from odqa.read.span import SpanReader, load_span_reader
from odqa.recipes import Places
from odqa.runtime import Recent
from odqa.text import exact_match

FILES = {"nq_tune": "nq-mini/nq_tune.jsonl", "squad_tune": "nq-mini/squad_tune.jsonl"}
RANK_PRIORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
SCORE_PRIORS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--readers", nargs="+", default=["odqa/assets/span-reader-1", "odqa/assets/span-reader-3"])
    parser.add_argument("--limit", type=int, default=300, help="questions of squad_tune")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("eval/results/reader-on-tune"), help="OUT.json is written")
    arguments = parser.parse_args()
    ranker = jobs.load_ranker("pipelines/nq-mini.yaml", places=Places.from_environment(arguments.data))
    sets = {}
    for name, file in FILES.items():
        limit = arguments.limit if name == "squad_tune" else None
        queries, gold = read_questions(arguments.data / file)[:limit], read_gold(arguments.data / file)[:limit]
        sets[name] = (queries, ranker.rank(queries), gold)
    rows = []
    for folder in arguments.readers:
        model = load_span_reader(Path(folder))
        packer = GreedyPacker(SpanReader(model), arguments.budget)
        contexts = {name: packer.pack(queries, hits) for name, (queries, hits, _) in sets.items()}
        memory: Recent[Any, Any] = Recent(1_000_000)
        priors = [(p, 0.0) for p in RANK_PRIORS] + [(0.0, p) for p in SCORE_PRIORS[1:]] + [(0.5, 0.2), (0.5, 0.35)]
        for combine, (rank_prior, score_prior) in itertools.product(("sum", "max"), priors):
            reader = SpanReader(model, combine=combine, rank_prior=rank_prior, score_prior=score_prior, memory=memory)
            row: dict[str, object] = {"reader": Path(folder).name, "budget": arguments.budget, "combine": combine}
            row |= {"rank_prior": rank_prior, "score_prior": score_prior}
            means = []
            for name, (_, _, gold) in sets.items():
                answers = reader.read(contexts[name])
                right = [exact_match(a.text, g.answers) for a, g in zip(answers, gold, strict=True)]
                means.append(100 * sum(right) / len(right))
                row[name] = round(means[-1], 1)
            row["mean"] = round(sum(means) / len(means), 2)
            rows.append(row)
            print(json.dumps(row), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows, indent=1) + "\n"
    arguments.out.with_name(arguments.out.name + ".json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
