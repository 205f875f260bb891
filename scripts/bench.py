"""Speed against peers, side by side in one run: prints a line per system and writes eval/results/bench-*.json.

    python scripts/bench.py dump DUMP... --wikiextractor PYTHON
    python scripts/bench.py multistream DUMP [--processes 2]
    python scripts/bench.py latency PIPELINE QUESTIONS [--index INDEX_FOLDER]
    python scripts/bench.py rerank --data DIR [--reranker FOLDER]
    python scripts/bench.py prompt --data DIR [--model MODEL]
    python scripts/bench.py bank [--users 1 ... --users 200]
    python scripts/bench.py calm
    python scripts/bench.py precision INDEX_RECIPE QUESTIONS... [--data DIR]
    python scripts/bench.py sharing [EVAL_RECIPE] [--limit N]
    python scripts/bench.py pipeline --peers PYTHON [--data DIR] [--work FOLDER --minutes N]
    python scripts/bench.py serve [--model MODEL] [--clients 64 --seconds 120]
    python scripts/bench.py remote [--model MODEL] [--calls 400]
    python scripts/bench.py quantised FACTORY... [--data DIR] [--index INDEX_FOLDER]
    python scripts/bench.py scale PASSAGES... [--data DIR] [--stages NAMES]
    python scripts/bench.py bm25 --data DIR [--peers PYTHON]
    python scripts/bench.py retrieval INDEX_FOLDER... --data DIR [--peers PYTHON]

Each measures what `scripts/bench.py NAME --help` says and lives in `scripts/benchmarks/NAME.py`.
"""

import sys
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where this file is run by its path from a test

from benchmarks import (
    bank,
    bm25,
    calm,
    dump,
    latency,
    multistream,
    pipeline,
    precision,
    prompt,
    quantised,
    remote,
    rerank,
    retrieval,
    scale,
    serve,
    sharing,
)

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for module in (
    *(dump, multistream, bm25, retrieval, quantised, scale, precision),
    *(rerank, prompt, bank, calm, latency, sharing, pipeline, serve, remote),
):
    name = module.__name__.rpartition(".")[2]
    app.command(name, help=module.__doc__)(getattr(module, name))

if __name__ == "__main__":
    app()
