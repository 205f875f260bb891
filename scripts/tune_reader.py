"""Choose how the embedded reader joins passages, on the tune questions of nq-mini (never on dev).

    python scripts/tune_reader.py --data DIR [--out eval/results/reader-on-tune]

Retrieves and packs once with pipelines/nq-mini.yaml, reads under every setting, and prints EM on nq_tune and squad_tune
and their mean.
"""

import argparse
import json
from pathlib import Path

from odqa import jobs
from odqa.corpus.io import read_gold, read_questions
from odqa.read.span import SpanReader
from odqa.recipes import Places
from odqa.text import exact_match

FILES = {"nq_tune": "nq-mini/nq_tune.jsonl", "squad_tune": "nq-mini/squad_tune.jsonl"}
PRIORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("eval/results/reader-on-tune"), help="OUT.json is written")
    parser.add_argument("--budgets", type=int, nargs="+", default=[512])
    arguments = parser.parse_args()
    rows = []
    for budget in arguments.budgets:
        loaded = jobs.load_pipeline(
            "pipelines/nq-mini.yaml",
            places=Places.from_environment(arguments.data),
            changes=[f"packer.budget={budget}"],
            build=True,
        )
        reader = loaded.pipeline.reader
        assert isinstance(reader, SpanReader) and loaded.pipeline.retriever is not None
        sets = {}
        for name, file in FILES.items():
            queries = read_questions(arguments.data / file)
            hits = loaded.pipeline.retriever.retrieve(queries, loaded.pipeline.k)
            sets[name] = (loaded.pipeline.packer.pack(queries, hits), read_gold(arguments.data / file))
        for combine in ("sum", "max"):
            for prior in PRIORS:
                other = SpanReader(reader.model, candidates=5, combine=combine, rank_prior=prior)
                row: dict[str, object] = {"budget": budget, "combine": combine, "rank_prior": prior}
                means = []
                for name, (contexts, gold) in sets.items():
                    answers = other.read(contexts)
                    right = [exact_match(a.text, g.answers) for a, g in zip(answers, gold, strict=True)]
                    means.append(100 * sum(right) / len(right))
                    row[name] = round(means[-1], 1)
                row["mean"] = round(sum(means) / len(means), 2)
                rows.append(row)
                print(json.dumps(row), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_name(arguments.out.name + ".json").write_text(
        json.dumps(rows, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
