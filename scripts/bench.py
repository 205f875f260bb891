"""Speed against peers, side by side in one run: prints a line per system and writes eval/results/bench-*.json.

    python scripts/bench.py dump DUMP... --wikiextractor PYTHON
    python scripts/bench.py latency PIPELINE QUESTIONS [--index INDEX_FOLDER]
    python scripts/bench.py rerank --data DIR [--reranker FOLDER]

`dump` measures CPU seconds (user and system, children included) of dump -> clean text on disk, one process each. PYTHON
is the interpreter of an environment of its own that holds the peer: `pip install wikiextractor==3.1.0`, which runs
unpatched on Python 3.11 (3.0.6 does not: its regexes have inline flags that are not at their start).

`latency` measures wall seconds from the shell to the answer with a built index, of `odqa --help`, and milliseconds a
question in one process; with --index also what the index's manifest says of its building.

`rerank` measures milliseconds a question with 100 candidates, on the same weights, cores and pairs: the re-ranking
stage against `sentence_transformers.CrossEncoder.predict` with its defaults, question by question in turn. On more
questions it compares the ranking in the fast number format with that in float32: the top 20, and recall.
"""

import hashlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from odqa.rerank.cross import CrossEncoderReranker
    from odqa.rerank.models import Row
    from odqa.types import Hit, Query

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

_ROOT = Path(__file__).resolve().parent.parent
_RESULTS = _ROOT / "eval" / "results"
_RERANKER = "embedded:reranker-1"
_FLAGS = {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8"}  # those that decide the speed


@dataclass(frozen=True, slots=True)
class Timing:
    """CPU seconds of one system, a run each."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_json(self) -> dict[str, object]:
        """Say it as the result file does."""
        rounded = [round(value, 3) for value in self.seconds]
        return {"median": round(self.median, 3), "min": min(rounded), "max": max(rounded), "runs": rounded}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two systems on the same input."""

    name: str
    ours: Timing
    theirs: Timing

    @property
    def speed_ratio(self) -> float:
        """How many times faster odqa is: the peer's median over ours."""
        return self.theirs.median / self.ours.median

    def as_json(self) -> dict[str, object]:
        """Say it as the result file does."""
        ratio = round(self.speed_ratio, 2)
        return {"input": self.name, "odqa": self.ours.as_json(), "peer": self.theirs.as_json(), "speed_ratio": ratio}


# What our side runs: the same job as wikiextractor's --json, a line of JSON for each article, in a file.
_OURS = """
import json, sys
from odqa.corpus.mediawiki import read_articles
with open(sys.argv[2], "w", encoding="utf-8") as out:
    for article in read_articles(sys.argv[1]):
        fields = {"id": article.id, "title": article.title, "text": article.text}
        out.write(json.dumps(fields, ensure_ascii=False) + "\\n")
"""


@app.command()
def dump(
    dumps: Annotated[list[Path], typer.Argument(help="MediaWiki dumps (.xml or .xml.bz2).", exists=True)],
    wikiextractor: Annotated[
        Path, typer.Option(help="Python interpreter of the environment that holds wikiextractor.")
    ],
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each system on each dump; the two alternate.")] = 5,
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = _RESULTS / "bench-dump.json",
) -> None:
    """Dump to clean text: odqa against wikiextractor, CPU seconds on the same files."""
    ours: dict[Path, list[float]] = {path: [] for path in dumps}
    theirs: dict[Path, list[float]] = {path: [] for path in dumps}
    for _ in range(repeats):
        for path in dumps:
            with tempfile.TemporaryDirectory() as folder:
                ours[path].append(cpu_seconds([sys.executable, "-c", _OURS, str(path), f"{folder}/articles.jsonl"]))
                peer = [str(wikiextractor), "-m", "wikiextractor.WikiExtractor", "--no-templates", "--processes", "1"]
                theirs[path].append(cpu_seconds([*peer, "--json", "-q", "-o", f"{folder}/peer", str(path)]))
    comparisons = [Comparison(path.name, Timing(ours[path]), Timing(theirs[path])) for path in dumps]
    total = Comparison(
        "all",
        Timing([sum(run) for run in zip(*ours.values(), strict=True)]),
        Timing([sum(run) for run in zip(*theirs.values(), strict=True)]),
    )
    for each in (*comparisons, total):
        typer.echo(
            f"{each.name}: odqa {each.ours.median:.2f} s, wikiextractor {each.theirs.median:.2f} s, "
            f"{each.speed_ratio:.2f} times its speed"
        )
    save_result(
        out,
        {
            "what": "CPU seconds (user + system, children included), dump to a JSON line per article, one process",
            "repeats": repeats,
            "wikiextractor": _version_of("wikiextractor", wikiextractor),
            "inputs": {path.name: _sha256(path) for path in dumps},
            "comparisons": [each.as_json() for each in (*comparisons, total)],
        },
    )


# ---------------------------------------------------------------- shared by all subcommands


@app.command()
def latency(
    pipeline: Annotated[str, typer.Argument(help="A pipeline recipe whose index is built.")],
    questions: Annotated[Path, typer.Argument(help="A question file; the first 60 questions are asked.")],
    index: Annotated[Path | None, typer.Option(help="An index folder, to report how long it took to build.")] = None,
    repeats: int = 5,
    out: Path = _RESULTS / "bench-latency.json",
) -> None:
    """How long a person waits: from the shell to the answer, and a question in one process."""
    from odqa import jobs
    from odqa.artifacts import load_artifact
    from odqa.corpus.io import read_questions

    asked = read_questions(questions)[:60]
    odqa = [sys.executable, "-m", "odqa.cli"]
    result: dict[str, object] = {
        "pipeline": pipeline,
        "questions": {"name": questions.name, "sha256": _sha256(questions), "n": len(asked)},
        "processor": _processor(),
        "shell_to_answer_seconds": _wall([*odqa, "ask", pipeline, asked[0].text, "--quiet"], repeats),
        "help_seconds": _wall([*odqa, "--help"], repeats),
    }
    loaded = jobs.load_pipeline(pipeline)
    loaded.ask(asked[0].text)
    milliseconds = []
    for query in asked:
        started = time.perf_counter()
        loaded.ask(query.text)
        milliseconds.append(1000 * (time.perf_counter() - started))
    milliseconds.sort()
    result["question_milliseconds"] = {
        "median": round(statistics.median(milliseconds), 1),
        "p95": round(milliseconds[int(0.95 * len(milliseconds))], 1),
    }
    if index is not None:
        artifact = load_artifact(index, "index")
        result["index"] = {"counts": artifact.manifest["counts"], "measured": artifact.manifest["measured"]}
    save_result(out, result)
    print(json.dumps(result, indent=1))


@dataclass(frozen=True, slots=True)
class Candidates:
    """Questions of one file with the passages to re-rank, and the answers."""

    name: str
    queries: list["Query"]
    answers: list[tuple[str, ...]]
    hits: list[list["Hit"]]


@app.command()
def rerank(
    data: Annotated[Path | None, typer.Option(help="The data folder, with nq-mini in it (or ODQA_DATA).")] = None,
    reranker: Annotated[str, typer.Option(help="A trained re-ranker: embedded:NAME or its folder.")] = _RERANKER,
    index: Annotated[Path, typer.Option(help="The built index of nq-mini.")] = Path("artifacts/nq-mini"),
    timed: Annotated[int, typer.Option(min=1, help="Questions of each set that are timed.")] = 10,
    compared: Annotated[int, typer.Option(min=1, help="Questions of each set whose rankings are compared.")] = 400,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; in each every system does every timed question.")] = 5,
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = _RESULTS / "bench-rerank.json",
) -> None:
    """Re-ranking 100 candidates a question: odqa against sentence-transformers, and its fast format against float32."""
    import torch
    from sentence_transformers import CrossEncoder

    from odqa.recipes import Places
    from odqa.rerank.cross import CrossEncoderReranker
    from odqa.rerank.models import export_classifier
    from odqa.runtime import processor_flags

    places = Places.from_environment(data)
    artifact = places.file(reranker)
    sets = [_candidates(places.file(f"data:nq-mini/{name}.jsonl"), index, compared) for name in ("nq_dev", "squad_dev")]
    with tempfile.TemporaryDirectory() as exported:
        export_classifier(artifact, Path(exported))
        peer = CrossEncoder(exported, device="cpu")
        stage = {
            "odqa": CrossEncoderReranker(str(artifact), device="cpu"),
            "odqa, same folder as the peer": _same_rows(exported, "auto"),
            "odqa, same folder, float32": _same_rows(exported, "float32"),
        }
    asked = [(query, hits) for each in sets for query, hits in zip(each.queries[:timed], each.hits, strict=False)]
    pairs = [[(query.text, _second_text(hit)) for hit in hits] for query, hits in asked]
    systems: dict[str, Callable[[int], object]] = {"sentence-transformers": lambda number: peer.predict(pairs[number])}
    for name, reranking in stage.items():
        systems[name] = lambda number, reranking=reranking: reranking.rerank([asked[number][0]], [asked[number][1]])  # type: ignore[misc]
    seconds = _interleaved(systems, len(asked), repeats)
    tokens = [len(row["input_ids"]) for q, hits in asked for row in _rows(stage["odqa"], q, hits)]
    theirs = [sum(each) for each in seconds["sentence-transformers"]]
    results = []
    for name, rounds in seconds.items():
        totals = [sum(each) for each in rounds]
        ratios = [them / us for them, us in zip(theirs, totals, strict=True)]
        results.append(
            {
                "system": name,
                "dtype": str(peer.dtype if name not in stage else stage[name].model.dtype).removeprefix("torch."),
                "pairs_per_second": round(len(tokens) / statistics.median(totals), 1),
                "tokens_per_second": round(sum(tokens) / statistics.median(totals)),
                "milliseconds_a_question": round(
                    1000 * statistics.median(second for each in rounds for second in each)
                ),
                "speed_ratio": {
                    "median": round(statistics.median(ratios), 2),
                    "min": round(min(ratios), 2),
                    "max": round(max(ratios), 2),
                },
            }
        )
        typer.echo(json.dumps(results[-1]))
    peer_scores = peer.predict(pairs[0], activation_fn=torch.nn.Identity()).tolist()
    exact = _same_rows_scores(stage["odqa, same folder, float32"], *asked[0])
    comparisons = [_compare_formats(each, str(artifact), stage["odqa"]) for each in sets]
    for comparison in comparisons:
        typer.echo(json.dumps(comparison))
    save_result(
        out,
        {
            "what": "re-ranking of hybrid candidates, wall seconds, one question after the other, systems in turn",
            "reranker": {"name": reranker, "method_sha256": _sha256(artifact / "method.safetensors")},
            "sentence_transformers": version("sentence-transformers"),
            "torch": version("torch"),
            "threads": torch.get_num_threads(),
            "flags": sorted(
                processor_flags() & {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8"}
            ),
            "timed": {"questions": len(asked), "pairs": len(tokens), "mean_tokens": round(statistics.mean(tokens), 1)},
            "repeats": repeats,
            "systems": results,
            "largest_difference_to_the_peer_in_float32": max(
                abs(one - other) for one, other in zip(peer_scores, exact, strict=True)
            ),
            "fast_format_against_float32": comparisons,
        },
    )


def _candidates(path: Path, index: Path, limit: int) -> Candidates:
    """The first `limit` questions of a file with their hybrid top 100."""
    from odqa.corpus.io import read_gold, read_questions
    from odqa.retrieve.index import HybridRetriever, load_index

    queries = read_questions(path)[:limit]
    answers = [gold.answers for gold in read_gold(path)[:limit]]
    return Candidates(path.stem, queries, answers, HybridRetriever(load_index(index)).retrieve(queries, 100))


def _second_text(hit: "Hit") -> str:
    """What the peer reads as the second text, so that its row is the one of training."""
    return f"{hit.passage.title} [SEP] {hit.passage.text}"


def _same_rows(folder: str, dtype: str) -> "CrossEncoderReranker":
    from odqa.rerank.cross import CrossEncoderReranker

    return CrossEncoderReranker(folder, title_separator=" [SEP] ", device="cpu", dtype=dtype)


def _same_rows_scores(reranker: "CrossEncoderReranker", query: "Query", hits: "list[Hit]") -> list[float]:
    """Scores in the order of the hits."""
    score_of = {hit.passage.id: hit.score for hit in reranker.rerank([query], [hits])[0]}
    return [score_of[hit.passage.id] for hit in hits]


def _rows(reranker: "CrossEncoderReranker", query: "Query", hits: "list[Hit]") -> "list[Row]":
    return reranker.model.encode([(query, hit.passage) for hit in hits])[0]


def _interleaved(
    systems: "dict[str, Callable[[int], object]]", questions: int, repeats: int
) -> dict[str, list[list[float]]]:
    """Wall seconds by system, round and question; the systems take turns at each question. The first is a warm-up."""
    for run in systems.values():
        run(0)
    seconds: dict[str, list[list[float]]] = {name: [] for name in systems}
    for _ in range(repeats):
        for each in seconds.values():
            each.append([])
        for number in range(questions):
            for name, run in systems.items():
                started = time.perf_counter()
                run(number)
                seconds[name][-1].append(time.perf_counter() - started)
    return seconds


def _compare_formats(candidates: Candidates, artifact: str, fast: "CrossEncoderReranker") -> dict[str, object]:
    """Overlap of the top 20 with that of float32, and recall (0 to 100) with both."""
    from odqa.rerank.cross import CrossEncoderReranker
    from odqa.text import has_answer

    exact = CrossEncoderReranker(artifact, device="cpu", dtype="float32")
    rankings = {
        "float32": exact.rerank(candidates.queries, candidates.hits),
        "fast": fast.rerank(candidates.queries, candidates.hits),
    }
    tops = {name: [{hit.passage.id for hit in hits[:20]} for hits in found] for name, found in rankings.items()}
    overlaps = [len(one & other) / 20 for one, other in zip(tops["float32"], tops["fast"], strict=True)]
    recall = {
        name: {
            f"recall@{k}": round(
                100
                * statistics.mean(
                    any(has_answer(hit.passage.text, answers) for hit in hits[:k])
                    for hits, answers in zip(found, candidates.answers, strict=True)
                ),
                2,
            )
            for k in (1, 3, 10)
        }
        for name, found in rankings.items()
    }
    return {
        "questions": candidates.name,
        "n": len(candidates.queries),
        "fast_dtype": str(fast.model.dtype).removeprefix("torch."),
        "top_20_overlap": round(statistics.mean(overlaps), 4),
        **recall,
    }


def _wall(command: list[str], repeats: int) -> dict[str, float]:
    """Wall seconds of a command after one warm-up: median, minimum and maximum."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    counted = seconds[1:]
    return {
        "median": round(statistics.median(counted), 2),
        "min": round(min(counted), 2),
        "max": round(max(counted), 2),
    }


def cpu_seconds(command: list[str]) -> float:
    """Run a command to its end and return the CPU seconds it took, user and system, with its own children's.

    Raises typer.Exit with the command's last words if it fails.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        typer.echo(f"{Path(command[0]).name} {' '.join(command[1:3])[:60]} failed:\n{done.stderr[-2000:]}", err=True)
        raise typer.Exit(2)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def save_result(path: Path, result: dict[str, object]) -> None:
    """Write a result with the machine it was measured on; file names only, no paths."""
    machine = {"python": platform.python_version(), "processor": _processor(), "cores": os.cpu_count()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, "machine": machine}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _version_of(package: str, python: Path) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    app()
