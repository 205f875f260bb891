"""Choose how many hits the embedded re-ranker scores and what the retriever's score still weighs, on tune questions.

    python scripts/tune_reranker.py --data DIR [--limit 400] [--depth 50]

Retrieves with pipelines/nq-mini-hybrid.yaml, scores the first --depth hits once, and prints recall@1, @3, @5 on nq_tune
and on the first --limit questions of squad_tune for every pair of depth and weight. Never looks at dev.
"""

import argparse
import json
from pathlib import Path

from odqa import jobs
from odqa.corpus.io import read_gold, read_questions
from odqa.recipes import Places
from odqa.rerank.cross import CrossEncoderReranker
from odqa.text import has_answer

FILES = {"nq_tune": "nq-mini/nq_tune.jsonl", "squad_tune": "nq-mini/squad_tune.jsonl"}
WEIGHTS = (0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 13.0, 16.0, 20.0, 30.0)
DEPTHS = (0, 5, 10, 20, 30, 50, 100)
CUTS = (1, 3, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="odqa/assets/reranker-2")
    parser.add_argument("--limit", type=int, default=400, help="questions of squad_tune")
    parser.add_argument("--depth", type=int, default=50, help="hits scored a question")
    parser.add_argument("--out", type=Path, default=Path("eval/results/reranker-on-tune"), help="OUT.json is written")
    arguments = parser.parse_args()
    ranker = jobs.load_ranker("pipelines/nq-mini-hybrid.yaml", places=Places.from_environment(arguments.data))
    reranker = CrossEncoderReranker(arguments.model, depth=arguments.depth)
    sets = {}
    for name, file in FILES.items():
        limit = arguments.limit if name == "squad_tune" else None
        queries, gold = read_questions(arguments.data / file)[:limit], read_gold(arguments.data / file)[:limit]
        hits = ranker.rank(queries)
        scored = [{h.passage.id: h.score for h in found} for found in reranker.rerank(queries, hits)]
        holds = [
            {h.passage.id: has_answer(h.passage.text, g.answers) for h in found}
            for found, g in zip(hits, gold, strict=True)
        ]
        sets[name] = (hits, scored, holds)
    rows = []
    for depth in (d for d in DEPTHS if d <= arguments.depth):
        for weight in WEIGHTS if depth else WEIGHTS[:1]:
            row: dict[str, float | int] = {"depth": depth, "retriever_weight": weight}
            for name, (hits, scored, holds) in sets.items():
                ranks = []
                for found, cross, right in zip(hits, scored, holds, strict=True):
                    head = sorted(found[:depth], key=lambda h: -(cross[h.passage.id] + weight * h.score))
                    order = [h.passage.id for h in [*head, *found[depth:]]]
                    ranks.append(next((r for r, pid in enumerate(order, 1) if right[pid]), None))
                for k in CUTS:
                    row[f"{name}.recall@{k}"] = round(
                        100 * sum(r is not None and r <= k for r in ranks) / len(ranks), 1
                    )
                row[f"{name}.n"] = len(ranks)
            row["mean"] = round(sum(float(row[f"{name}.recall@{k}"]) for name in FILES for k in CUTS) / 6, 2)
            rows.append(row)
            print(json.dumps(row), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"model": arguments.model, "settings": rows}, indent=1) + "\n"
    arguments.out.with_name(arguments.out.name + ".json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
