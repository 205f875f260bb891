"""Speed against peers, side by side in one run: prints a line per system and writes eval/results/bench-*.json.

    python scripts/bench.py dump DUMP... --wikiextractor PYTHON
    python scripts/bench.py latency PIPELINE QUESTIONS [--index INDEX_FOLDER]
    python scripts/bench.py rerank --data DIR [--reranker FOLDER]
    python scripts/bench.py prompt --data DIR [--model MODEL]
    python scripts/bench.py precision INDEX_RECIPE QUESTIONS... [--data DIR]

`dump` measures CPU seconds (user and system, children included) of dump -> clean text on disk, one process each. PYTHON
is the interpreter of an environment of its own that holds the peer: `pip install wikiextractor==3.1.0`, which runs
unpatched on Python 3.11 (3.0.6 does not: its regexes have inline flags that are not at their start).

`latency` measures wall seconds from the shell to the answer with a built index, of `odqa --help`, and milliseconds a
question in one process; with --index also what the index's manifest says of its building.

`rerank` measures milliseconds a question with 100 candidates, on the same weights, cores and pairs: the re-ranking
stage against `sentence_transformers.CrossEncoder.predict` with its defaults, question by question in turn. On more
questions it compares the ranking in the fast number format with that in float32: the top 20, and recall.

`prompt` measures what a soft prompt costs: seconds to generate answers of equal length from contexts of equal length,
by the frozen model as it is and with a prompt, in turn; a causal model also with the prompt's keys and values kept.

`precision` encodes the passages of an index recipe and the questions in float32 and in bfloat16, searches exactly, and
compares the two: mean overlap of the top 20, and recall@1, @5, @20 and @100. For nq-mini that takes minutes.
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
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from odqa.corpus.store import PassageStore
    from odqa.frozen.backbone import Backbone
    from odqa.frozen.method import Method
    from odqa.rerank.cross import CrossEncoderReranker
    from odqa.retrieve.rankings import Rankings
    from odqa.types import Hit, Query

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

_ROOT = Path(__file__).resolve().parent.parent
_RESULTS = _ROOT / "eval" / "results"
_RERANKER = "embedded:reranker-2"
_PEER = "sentence-transformers"
_PRECISIONS = ("float32", "bfloat16")
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
    asked = [one for each in sets for one in list(zip(each.queries, each.hits, strict=True))[:timed]]
    with tempfile.TemporaryDirectory() as folder:
        export_classifier(artifact, Path(folder))
        peer = CrossEncoder(folder, device="cpu")
        stages = {
            "odqa": CrossEncoderReranker(str(artifact), device="cpu"),
            "odqa, folder of the peer": _same_rows(folder, "auto"),
            "odqa, folder of the peer, float32": _same_rows(folder, "float32"),
        }
    pairs = [[(query.text, f"{hit.passage.title} [SEP] {hit.passage.text}") for hit in hits] for query, hits in asked]

    # 1. Speed: every system does every question, in turn.
    systems: dict[str, Callable[[int], object]] = {_PEER: lambda number: peer.predict(pairs[number])}
    for name, stage in stages.items():
        systems[name] = lambda number, stage=stage: stage.rerank([asked[number][0]], [asked[number][1]])  # type: ignore[misc]
    seconds = _interleaved(systems, len(asked), repeats)
    lengths = [_lengths(stages["odqa"], query, hits) for query, hits in asked]
    tokens = [length for each in lengths for length in each]
    speeds = []
    for name, rounds in seconds.items():
        dtype = stages[name].model.dtype if name in stages else peer.dtype
        speeds.append({"system": name, "dtype": _name(dtype), **_speed(rounds, seconds[_PEER], tokens)})
        typer.echo(json.dumps(speeds[-1]))

    # 2. The peer computes the same scores: in float32, before its activation.
    theirs = peer.predict(pairs[0], activation_fn=torch.nn.Identity()).tolist()
    ours = {hit.passage.id: hit.score for hit in stages["odqa, folder of the peer, float32"].rerank(*_one(asked[0]))[0]}
    difference = max(abs(ours[hit.passage.id] - score) for hit, score in zip(asked[0][1], theirs, strict=True))

    # 3. The fast number format ranks as float32 does.
    exact = CrossEncoderReranker(str(artifact), device="cpu", dtype="float32")
    agreements = [_agreement(each, exact, stages["odqa"]) for each in sets]
    for agreement in agreements:
        typer.echo(json.dumps(agreement))

    save_result(
        out,
        {
            "what": "re-ranking the hybrid top 100, wall seconds, one question after the other, systems in turn",
            "reranker": {"name": reranker, "method_sha256": _sha256(artifact / "method.safetensors")},
            "versions": {name: version(name) for name in ("sentence-transformers", "transformers", "torch")},
            "threads": torch.get_num_threads(),
            "flags": sorted(processor_flags() & _FLAGS),
            "timed": {
                "questions": len(asked),
                "pairs": len(tokens),
                "tokens_a_pair": round(statistics.mean(tokens), 1),
            },
            "repeats": repeats,
            "systems": speeds,
            "largest_difference_to_the_peer": difference,
            "fast_format_against_float32": agreements,
        },
    )


@app.command()
def prompt(
    data: Annotated[Path | None, typer.Option(help="The data folder, with nq-mini in it (or ODQA_DATA).")] = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", help="Generative LMs; by default the embedded.")
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Vectors of the soft prompt.")] = 50,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of a context, question and all.")] = 512,
    written: Annotated[int, typer.Option(min=1, help="Tokens that are generated from each.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Contexts that are read at once.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; in each every system does every batch.")] = 9,
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = _RESULTS / "bench-prompt.json",
) -> None:
    """What a soft prompt makes generation cost, beside the same frozen model without one."""
    import torch

    from odqa.corpus.io import read_passages
    from odqa.frozen.method import create_method
    from odqa.frozen.prefix import prefix_of_prompt
    from odqa.frozen.prompt_tuning import PromptTuning
    from odqa.read.lm import load_lm
    from odqa.recipes import Places

    file = Places.from_environment(data).file("data:nq-mini/psgs.tsv.gz")
    texts = [passage.text for passage, _ in zip(read_passages(file), range(12 * batch), strict=False)]
    found = []
    for model in models or ["embedded:odqa-mini-1", "embedded:odqa-mini-d1"]:
        backbone = load_lm(model, device="cpu")
        ids = backbone.tokenizer(" ".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
        sources = [ids[start : start + tokens] for start in range(0, tokens * batch, tokens)]
        soft = create_method("prompt-tuning", backbone, length=length)
        assert isinstance(soft, PromptTuning)
        methods: dict[str, Method | None] = {"frozen": None, "soft prompt": soft}
        if backbone.architecture == "causal":
            methods["soft prompt, keys and values kept"] = prefix_of_prompt(backbone, soft)

        systems: dict[str, Callable[[int], object]] = {
            name: partial(_generate, backbone, sources, written, method) for name, method in methods.items()
        }
        seconds = {name: [sum(each) for each in rounds] for name, rounds in _interleaved(systems, 1, repeats).items()}
        for name, ours in seconds.items():
            ratios = [one / plain for one, plain in zip(ours, seconds["frozen"], strict=True)]
            spread = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
            found.append(
                {
                    "model": model,
                    "system": name,
                    "dtype": _name(backbone.model.dtype),
                    "seconds_a_batch": round(statistics.median(ours), 3),
                    "cost_ratio": {at: round(ratio, 3) for at, ratio in spread.items()},
                }
            )
            typer.echo(json.dumps(found[-1]))
    save_result(
        out,
        {
            "what": "generation, wall seconds, systems in turn",
            "prompt_vectors": length,
            "context_tokens": tokens,
            "generated_tokens": written,
            "batch": batch,
            "repeats": repeats,
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("transformers", "torch")},
            "systems": found,
        },
    )


@app.command()
def precision(
    recipe: Annotated[str, typer.Argument(help="An index recipe with an encoder.")],
    questions: Annotated[list[Path], typer.Argument(help="Question files with answers.")],
    data: Annotated[Path | None, typer.Option(help="The data folder.")] = None,
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = _RESULTS / "bench-precision.json",
) -> None:
    """Dense retrieval in bfloat16 against float32: overlap of the top 20, and recall."""
    from odqa.errors import OdqaError

    try:
        passages, sets = _compare_precisions(recipe, questions, data)
    except OdqaError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(2) from None
    for row in sets:
        typer.echo(json.dumps(row))
    what = "one encoder in two number formats, exact search; overlap of the top 20, recall by has_answer in percent"
    save_result(out, {"what": what, "recipe": recipe, "passages": passages, "sets": sets})


def _compare_precisions(recipe: str, questions: list[Path], data: Path | None) -> tuple[int, list[dict[str, object]]]:
    """How many passages there are, and what the result says of each question file."""
    from odqa import config, jobs
    from odqa.corpus.io import read_gold, read_questions
    from odqa.errors import RecipeError
    from odqa.recipes import Places, load_recipe

    texts = [[query.text for query in read_questions(path)] for path in questions]
    answers = [[gold.answers for gold in read_gold(path)] for path in questions]
    settings = load_recipe(recipe, "index").settings
    if not isinstance(settings, config.IndexRecipe) or settings.dense is None:
        raise RecipeError(f"{recipe}: no encoder under dense; there is nothing to compare.")
    found: dict[str, list[Rankings]] = {}  # by number format, one for each question file
    with tempfile.TemporaryDirectory() as folder:
        for dtype in _PRECISIONS:
            only_dense: dict[str, object] = {"bm25": None, "dense.dtype": dtype, "dense.vectors": {}}
            variant = load_recipe(recipe, "index", settings=only_dense)
            index = jobs.build_index(variant, places=Places.from_environment(data), out=Path(folder) / dtype)
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


def _generate(
    backbone: "Backbone", sources: list[list[int]], tokens: int, method: "Method | None", _batch: int
) -> None:
    """Exactly so many tokens behind each source, with the method attached meanwhile."""
    if method is not None:
        method.attach(backbone)
    backbone.generate(sources, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    if method is not None:
        method.detach()


def _candidates(path: Path, index: Path, limit: int) -> Candidates:
    """The first `limit` questions of a file with their hybrid top 100."""
    from odqa.corpus.io import read_gold, read_questions
    from odqa.retrieve.index import HybridRetriever, load_index

    queries = read_questions(path)[:limit]
    answers = [gold.answers for gold in read_gold(path)[:limit]]
    return Candidates(path.stem, queries, answers, HybridRetriever(load_index(index)).retrieve(queries, 100))


def _same_rows(folder: str, dtype: str) -> "CrossEncoderReranker":
    """The stage on the folder that the peer reads, with the peer's rows."""
    from odqa.rerank.cross import CrossEncoderReranker

    return CrossEncoderReranker(folder, title_separator=" [SEP] ", device="cpu", dtype=dtype)


def _one(asked: "tuple[Query, list[Hit]]") -> "tuple[list[Query], list[list[Hit]]]":
    """One question as a batch."""
    return [asked[0]], [asked[1]]


def _lengths(stage: "CrossEncoderReranker", query: "Query", hits: "list[Hit]") -> list[int]:
    """Tokens of each pair."""
    rows, _ = stage.model.encode([(query, hit.passage) for hit in hits])
    return [len(row["input_ids"]) for row in rows]


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _speed(rounds: list[list[float]], of_peer: list[list[float]], tokens: list[int]) -> dict[str, object]:
    """Rates and the ratio to the peer, from wall seconds by round and question; the ratio is taken round by round."""
    totals = [sum(each) for each in rounds]
    ratios = [sum(theirs) / ours for theirs, ours in zip(of_peer, totals, strict=True)]
    return {
        "pairs_per_second": round(len(tokens) / statistics.median(totals), 1),
        "tokens_per_second": round(sum(tokens) / statistics.median(totals)),
        "milliseconds_a_question": round(1000 * statistics.median([second for each in rounds for second in each])),
        "speed_ratio": {
            "median": round(statistics.median(ratios), 2),
            "min": round(min(ratios), 2),
            "max": round(max(ratios), 2),
        },
    }


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


def _agreement(
    candidates: Candidates, exact: "CrossEncoderReranker", fast: "CrossEncoderReranker"
) -> dict[str, object]:
    """Mean overlap of the top 20 of two number formats, and recall (0 to 100) with each."""
    rankings = {
        name: stage.rerank(candidates.queries, candidates.hits) for name, stage in (("float32", exact), ("fast", fast))
    }
    tops = [[{hit.passage.id for hit in hits[:20]} for hits in found] for found in rankings.values()]
    overlaps = [len(one & other) / len(one) for one, other in zip(*tops, strict=True)]
    return {
        "questions": candidates.name,
        "n": len(candidates.queries),
        "dtype": _name(fast.model.dtype),
        "top_20_overlap": round(statistics.mean(overlaps), 4),
        **{name: _recall(found, candidates.answers) for name, found in rankings.items()},
    }


def _recall(rankings: "list[list[Hit]]", answers: list[tuple[str, ...]]) -> dict[str, float]:
    """Share (0 to 100) of questions with an answer in the first k passages."""
    from odqa.text import has_answer

    found = {1: 0, 3: 0, 10: 0}
    for hits, right in zip(rankings, answers, strict=True):
        holds = [has_answer(hit.passage.text, right) for hit in hits[:10]]
        for k in found:
            found[k] += any(holds[:k])
    return {f"recall@{k}": round(100 * count / len(rankings), 2) for k, count in found.items()}


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
