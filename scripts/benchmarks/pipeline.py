"""Asks the same questions of odqa and of its peers, end to end up to the reader's prompt: the same passages, question
encoder, vectors, re-ranker weights and prompt, a process each, in turn at each question, one thread each (or --threads,
for wall seconds on an idle machine). Then profiles
all stages of our pipeline, the reader too, with a floor beside each. No text is generated: a peer cannot load our
readers, and one that all could load would be run by the same `transformers` in each.

PYTHON is the interpreter of an environment with peers: `pip install haystack-ai==3.4.1 sentence-transformers-haystack
faiss-haystack txtai==9.14.0 flashrag-dev`. CPU seconds stand beside wall seconds: the former are what an idle core
would take, and stand still when other processes want the machine; ratios are of CPU seconds. With --work and --minutes
it goes on where it stopped.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.common import RESULTS, ROOT, dtype_name, save_result
from benchmarks.pipeline_worker import CANDIDATES, KEPT

if TYPE_CHECKING:
    from odqa.jobs import Loaded
    from odqa.types import Gold, Query

_WORKER = Path(__file__).with_name("pipeline_worker.py")
_OURS = ("odqa", "odqa, float32", "odqa, the recipe as it is")
_PEERS = {"haystack-ai": "haystack", "txtai": "txtai", "flashrag-dev": "flashrag"}  # what they are imported as
_SETS = ("nq_dev", "squad_dev")
_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
_WARM_UP = "who wrote the origin of species"


def pipeline(
    peers: Annotated[list[Path] | None, typer.Option(help="Python interpreters of environments with peers.")] = None,
    data: Annotated[Path | None, typer.Option(help="The data folder, with nq-mini in it (or ODQA_DATA).")] = None,
    recipe: Annotated[str, typer.Option(help="Our pipeline recipe.")] = "pipelines/nq-mini.yaml",
    index: Annotated[Path, typer.Option(help="The built index of nq-mini.")] = Path("artifacts/nq-mini"),
    questions: Annotated[int, typer.Option(min=1, help="Questions of each of the two sets.")] = 30,
    profiled: Annotated[int, typer.Option(min=1, help="Questions of each set that the profile is over.")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each system.")] = 1,
    work: Annotated[Path | None, typer.Option(help="Folder to go on in; by default one that is deleted.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Ask these systems alone, keep it in --work, and report nothing yet.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop asking then, and report what there is.")] = None,
    out: Annotated[Path, typer.Option(help="Where the result goes; tables beside it.")] = RESULTS
    / "bench-pipeline.json",
) -> None:
    """End to end against haystack-ai, txtai and flashrag-dev; and where our own time goes, beside its floor."""
    end = None if minutes is None else time.monotonic() + 60 * minutes
    with contextlib.ExitStack() as stack:
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        asked, gold = prepare(folder, data, recipe, index, questions)
        systems = {name: Path(sys.executable) for name in _OURS} | _find_peers(peers or [])
        if only and work is None:
            raise typer.BadParameter("--only keeps what it measures in --work; give one.")
        ask_in_turn(folder, {name: systems[name] for name in only or systems}, asked, end, threads)
        if only:
            return
        measured = compare(folder, list(systems), gold)
    profile = profile_stages(recipe, index, data, asked, profiled)
    result = {
        "what": f"one question after the other, the first {CANDIDATES} re-ranked, {KEPT} kept",
        "threads": threads,
        "versions": _versions(list(dict.fromkeys([Path(sys.executable), *(peers or [])]))),
        **measured,
        "profile": profile,
    }
    save_result(out, result)
    table = tables(result)
    out.with_suffix(".md").write_text(table, encoding="utf-8")
    typer.echo(table)


# --- the comparison ---------------------------------------------------------------------------------------------------


def prepare(
    folder: Path, data: Path | None, recipe: str, index: Path, count: int
) -> "tuple[list[Query], dict[str, Gold]]":
    """Write what the workers read, unless an earlier call did; questions of the sets alternate."""
    from odqa.corpus.io import read_gold, read_questions
    from odqa.models import MINILM, embedded_folder
    from odqa.recipes import Places

    places = Places.from_environment(data)
    files = [places.file(f"data:nq-mini/{name}.jsonl") for name in _SETS]
    asked = [query for both in zip(*(read_questions(file)[:count] for file in files), strict=True) for query in both]
    gold = {one.query_id: one for file in files for one in read_gold(file)}
    folder.mkdir(parents=True, exist_ok=True)
    rows = "".join(json.dumps({"id": query.id, "question": query.text}) + "\n" for query in asked)
    (folder / "questions.jsonl").write_text(rows, encoding="utf-8")
    if not (folder / "passages.jsonl").is_file():
        # Apart, so that the re-ranker's libraries do not stay in memory while others are timed.
        subprocess.run(
            [sys.executable, "-c", _PREPARE, str(places.file("data:nq-mini/psgs.tsv.gz")), str(folder)],
            check=True,
            env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        )
    settings = {
        "folder": folder,
        "passages": folder / "passages.jsonl",
        "questions": folder / "questions.jsonl",
        "vectors": places.file("data:nq-mini/psgs_minilm_f16.npy"),
        "encoder": embedded_folder(MINILM),
        "reranker": folder / "reranker",
        "pipeline": recipe,
        "index": index.absolute(),
    }
    paths = {name: str(value) for name, value in settings.items()} | {"warm_up": _WARM_UP}
    (folder / "work.json").write_text(json.dumps(paths), encoding="utf-8")
    return asked, gold


_PREPARE = """
import json, sys
from pathlib import Path
from odqa.corpus.io import read_passages
from odqa.recipes import Places
from odqa.rerank.models import export_classifier
source, folder = Path(sys.argv[1]), Path(sys.argv[2])
(folder / "reranker").mkdir(exist_ok=True)
export_classifier(Places().file("embedded:reranker-2"), folder / "reranker")
with (folder / "partial.jsonl").open("w", encoding="utf-8") as out:
    for passage in read_passages(source):
        out.write(json.dumps({"id": passage.id, "title": passage.title, "text": passage.text}) + "\\n")
(folder / "partial.jsonl").rename(folder / "passages.jsonl")
"""


class Worker:
    """One system in a process of its own; see `pipeline_worker`."""

    def __init__(self, name: str, python: Path, folder: Path, threads: int) -> None:
        environment = {**os.environ, **_ENVIRONMENT, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        self.name, self._log = name, folder / f"{name.replace(' ', '-')}.log"
        self._process = subprocess.Popen(
            [str(python), str(_WORKER), name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w", encoding="utf-8"),
            text=True,
            env=environment,
        )

    def hear(self) -> dict[str, Any]:
        """The next reply. Raises typer.Exit with the worker's last words if there is none."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            typer.echo(f"{self.name} failed:\n{self._log.read_text(encoding='utf-8')[-2000:]}", err=True)
            raise typer.Exit(2)
        reply: dict[str, Any] = json.loads(line)
        return reply

    def ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self.hear()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def ask_in_turn(folder: Path, systems: dict[str, Path], asked: "list[Query]", end: float | None, threads: int) -> None:
    """Append a row a system and question to rows.jsonl until all are there or the time is up."""
    rows = folder / "rows.jsonl"
    done = {(row["system"], row.get("question")) for row in _load(rows)}
    missing = [name for name in systems if any((name, query.id) not in done for query in asked)]
    workers = [Worker(name, systems[name], folder, threads) for name in missing]
    try:
        for worker in workers:
            _append(rows, {"system": worker.name, **worker.hear()})
            typer.echo(f"{worker.name}: loaded", err=True)
        for number, query in enumerate(asked):
            for worker in workers:
                if (worker.name, query.id) not in done:
                    _append(rows, {"system": worker.name, "question": query.id, **worker.ask(str(number))})
            if end is not None and time.monotonic() > end:
                typer.echo("the time is up: run again with the same --work to go on", err=True)
                break
        for worker in workers:
            _append(rows, {"system": worker.name, **worker.ask("end")})
    finally:
        for worker in workers:
            worker.close()


def compare(folder: Path, systems: list[str], gold: "dict[str, Gold]") -> dict[str, Any]:
    """What the rows say of each system, on the questions that all have answered."""
    from odqa.text import has_answer

    rows = _load(folder / "rows.jsonl")
    texts = {row["id"]: row["text"] for row in _load(folder / "passages.jsonl")}
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in systems}
    for row in rows:
        if "question" in row and row["system"] in found:
            found[row["system"]][row["question"]] = row
    common = [question for question in found[systems[0]] if all(question in found[name] for name in systems)]
    if not common:
        typer.echo("no question was answered by all systems yet", err=True)
        raise typer.Exit(1)
    described = []
    for name in systems:
        own = [found[name][question] for question in common]
        ratios = [found[name][q]["cpu"] / found["odqa"][q]["cpu"] for q in common]
        right = [any(has_answer(texts[pid], gold[q].answers) for pid in found[name][q]["ids"][:KEPT]) for q in common]
        same = [set(found[name][q]["ids"]) == set(found["odqa"][q]["ids"]) for q in common]
        peaks = [row["peak_memory_bytes"] for row in rows if row["system"] == name and "peak_memory_bytes" in row]
        loads = [row["load_cpu"] for row in rows if row["system"] == name and "load_cpu" in row]
        described.append(
            {
                "system": name,
                "questions_a_cpu_second": round(len(own) / sum(row["cpu"] for row in own), 2),
                "questions_a_second": round(len(own) / sum(row["wall"] for row in own), 2),
                "cpu_milliseconds": _spread([row["cpu"] for row in own]),
                "wall_milliseconds": _spread([row["wall"] for row in own]),
                "cpu_over_odqa": round(statistics.median(ratios), 2),  # paired, question by question
                "recall@5": round(100 * statistics.mean(right), 1),
                "same_five_as_odqa": round(100 * statistics.mean(same), 1),
                "peak_memory_mib": round(max(peaks) / 2**20) if peaks else None,
                "load_cpu_seconds": round(min(loads), 1),
            }
        )
    best = max((row for row in described if row["system"] in _PEERS), key=_rate, default=None)
    rates = {str(row["system"]): _rate(row) for row in described}
    ratio = {name: round(rates[name] / _rate(best), 2) for name in rates if name in _OURS} if best else {}
    return {
        "questions": len(common),
        "best_peer": best and best["system"],
        "rate_over_the_best_peer": ratio,
        "systems": described,
    }


def _rate(row: dict[str, Any]) -> float:
    return float(row["questions_a_cpu_second"])


def _spread(seconds: Sequence[float]) -> dict[str, int]:
    """Milliseconds: median and 95th percentile."""
    ordered = sorted(1000 * second for second in seconds)
    return {"median": round(statistics.median(ordered)), "p95": round(ordered[int(0.95 * (len(ordered) - 1))])}


def _find_peers(interpreters: Sequence[Path]) -> dict[str, Path]:
    """Which peers which interpreter has; the first that has one runs it."""
    code = "import importlib.util, sys; print(*(n for n in sys.argv[1:] if importlib.util.find_spec(n)))"
    found: dict[str, Path] = {}
    for python in interpreters:
        done = subprocess.run([str(python), "-c", code, *_PEERS.values()], capture_output=True, text=True, check=True)
        for name, module in _PEERS.items():
            if module in done.stdout.split():
                found.setdefault(name, python)
    for name in _PEERS:
        if name not in found:
            typer.echo(f"{name} is not installed in any of the environments: left out", err=True)
    return found


def _versions(interpreters: Sequence[Path]) -> dict[str, str]:
    code = (
        "import json, sys\nfrom importlib.metadata import version, PackageNotFoundError\nfound = {}\n"
        "for name in sys.argv[1:]:\n    try: found[name] = version(name)\n    except PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    names = [*_PEERS, "faiss-haystack", "sentence-transformers-haystack"]
    names += ["sentence-transformers", "transformers", "torch", "faiss-cpu"]
    versions: dict[str, str] = {}
    for python in interpreters:
        done = subprocess.run([str(python), "-c", code, *names], capture_output=True, text=True, check=True)
        versions |= json.loads(done.stdout)
    return versions


def _load(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


# --- the profile ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Spent:
    """CPU seconds by stage, of one question at a time, and what was done for the floors."""

    seconds: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    scanned: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def on(self, stage: str) -> Iterator[None]:
        started = time.process_time()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.process_time() - started

    def timed(self, stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, with its seconds added to `stage`."""

        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            with self.on(stage):
                return work(*arguments, **keywords)

        return wrapped

    def add(self, kind: dict[str, float], stage: str, amount: float) -> None:
        kind[stage] = kind.get(stage, 0.0) + amount


class _Timed:
    """A stage whose calls are timed; everything else is the stage's own."""

    def __init__(self, stage: object, spent: Spent, **methods: str) -> None:
        self._stage, self._spent, self._methods = stage, spent, methods

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._stage, name)
        return self._spent.timed(self._methods[name], found) if name in self._methods else found


def profile_stages(recipe: str, index: Path, data: Path | None, asked: "list[Query]", count: int) -> dict[str, Any]:
    """CPU milliseconds a question of each stage of our pipeline, the reader too, on one core, beside the floor.

    Floors: multiplications and additions of the matrix products at the rate of one large product in the same number
    format; bytes of vectors and postings that must be read at the bandwidth of a long sum. Both are measured here.
    """
    import torch

    from odqa import jobs
    from odqa.recipes import Places

    torch.set_num_threads(1)
    changes = [f"index={json.dumps(str(index))}"]
    loaded = jobs.load_pipeline(recipe, places=Places.from_environment(data), changes=changes)
    loaded.ask(_WARM_UP)
    spent = Spent()
    stages: Any = loaded.pipeline
    timed = replace(
        stages,
        retriever=_Timed(stages.retriever, spent, retrieve="retrieve"),
        reranker=_Timed(stages.reranker, spent, rerank="rerank"),
        packer=_Timed(stages.packer, spent, pack="pack"),
        reader=_Timed(stages.reader, spent, read="read", costs="prices for the trace"),
    )
    chosen = asked[: 2 * count]
    for query in chosen:
        with spent.on("all"):
            trace = timed.answer([query])[0]
        _count_work(loaded, query, trace, spent)
    speed = {"float32": _flops_a_second(torch.float32), "fast": _flops_a_second(stages.reranker.model.dtype)}
    bandwidth = _bytes_a_second()
    return {
        "questions": len(chosen),
        "recipe": recipe,
        "dtype": dtype_name(stages.reranker.model.dtype),
        "gflops_a_second": {name: round(value / 1e9, 1) for name, value in speed.items()},
        "gigabytes_a_second": round(bandwidth / 1e9, 1),
        "stages": _described(spent, len(chosen), speed["fast"], bandwidth),
    }


def _count_work(loaded: "Loaded", query: "Query", trace: Any, spent: Spent) -> None:
    """What the floors of one question are made of; and the parts of retrieval, timed again by themselves."""
    assert loaded.index is not None and loaded.pipeline.reranker is not None
    index, stages = loaded.index, loaded.pipeline
    dense: Any = index.dense
    with spent.on("  encode the question"):
        vectors = dense.encoder.encode_questions([query.text])
    with spent.on("  scan the vectors"):
        dense.vectors.search(vectors, 100)
    bm25: Any = index.bm25
    with spent.on("  BM25"):
        bm25.search([query.text], 100)
    reranker: Any = stages.reranker
    tokenizer: Any = loaded.pipeline.reader.backbone.tokenizer  # type: ignore[attr-defined]  # the same MiniLM's
    spent.add(spent.flops, "  encode the question", bert_flops([len(tokenizer(query.text)["input_ids"])]))
    spent.add(spent.scanned, "  scan the vectors", dense.vectors._index.ntotal * dense.vectors._index.d * 4)
    postings = sum(int(bm25._indptr[term + 1] - bm25._indptr[term]) for term in bm25._term_ids(query.text))
    spent.add(spent.scanned, "  BM25", 8 * postings)  # a row number and a score each
    by_name = {step.stage: step for step in trace.steps}
    store, again = index.store, by_name["retrieve"].ids[: reranker.depth]
    rows, _ = reranker.model.encode([(query, store[store.row_of(pid)]) for pid in again])
    spent.add(spent.flops, "rerank", bert_flops([len(row["input_ids"]) for row in rows]))
    spent.add(spent.flops, "read", bert_flops(by_name["pack"].tokens))


def bert_flops(lengths: Sequence[int], *, layers: int = 6, width: int = 384, inner: int = 1536) -> float:
    """Multiplications and additions of the matrix products of a BERT over rows of these many tokens; MiniLM's sizes.

    A token and layer: 4 products with D x D, two with D x F, and attention's two with T x D.
    """
    return float(sum(layers * n * (2 * (4 * width**2 + 2 * width * inner) + 4 * n * width) for n in lengths))


def _flops_a_second(dtype: Any) -> float:
    """The best of several products of MiniLM's largest shape, (2048, 384) x (384, 1536), on one core."""
    import torch

    a, b = torch.randn(2048, 384).to(dtype), torch.randn(384, 1536).to(dtype)
    seconds = []
    for _ in range(12):
        started = time.process_time()
        for _ in range(4):
            a @ b
        seconds.append((time.process_time() - started) / 4)
    return 2 * 2048 * 384 * 1536 / min(seconds)


def _bytes_a_second() -> float:
    """The best of several sums over 128 MiB, more than any cache holds."""
    import numpy as np

    values = np.ones(2**25, np.float32)
    seconds = []
    for _ in range(6):
        started = time.process_time()
        values.sum()
        seconds.append(time.process_time() - started)
    return values.nbytes / min(seconds)


def _described(spent: Spent, count: int, speed: float, bandwidth: float) -> list[dict[str, Any]]:
    """A row a stage: milliseconds a question, the floor, and how many times the floor that is."""
    order = ["retrieve", "  encode the question", "  scan the vectors", "  BM25", "rerank", "pack"]
    order += ["prices for the trace", "read", "all"]
    rows = []
    for stage in order:
        took = 1000 * spent.seconds.get(stage, 0.0) / count
        floor = None
        if stage in spent.flops:
            floor = 1000 * spent.flops[stage] / count / speed
        elif stage in spent.scanned:
            floor = 1000 * spent.scanned[stage] / count / bandwidth
        rows.append(
            {
                "stage": stage,
                "cpu_milliseconds": round(took, 2),
                "floor_milliseconds": None if floor is None else round(floor, 2),
                "ratio": None if not floor else round(took / floor, 1),
                "gflop": round(spent.flops[stage] / count / 1e9, 2) if stage in spent.flops else None,
                "megabytes": round(spent.scanned[stage] / count / 1e6, 2) if stage in spent.scanned else None,
            }
        )
    return rows


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(result: dict[str, Any]) -> str:
    """The result as markdown."""
    profile = result["profile"]
    gflops = profile["gflops_a_second"]
    lines = [
        "# End to end, one question after the other",
        "",
        f"{result['questions']} questions of nq-mini (NQ dev and SQuAD dev in turn), {CANDIDATES} passages re-ranked, "
        f"{KEPT} kept; {result['threads']} thread(s), a process each, systems in turn at each question. CPU seconds "
        "are what an idle core takes; where the machine is not idle wall times are long.",
        "",
        "| system | questions a CPU second | a second | CPU ms, median | p95 | wall ms, p95 | CPU over odqa's | "
        "recall@5 | same five as odqa | peak MiB | CPU s to load |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["systems"]:
        lines.append(
            f"| {row['system']} | {row['questions_a_cpu_second']:.2f} | {row['questions_a_second']:.2f} | "
            f"{row['cpu_milliseconds']['median']} | "
            f"{row['cpu_milliseconds']['p95']} | {row['wall_milliseconds']['p95']} | {row['cpu_over_odqa']:.2f} | "
            f"{row['recall@5']:.1f} | {row['same_five_as_odqa']:.0f} % | {row['peak_memory_mib'] or '-'} | "
            f"{row['load_cpu_seconds']:.1f} |"
        )
    if result["best_peer"]:
        told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in result["rate_over_the_best_peer"].items())
        lines += ["", f"Questions a CPU second over those of the best peer, {result['best_peer']}: {told}."]
    lines += [
        "",
        "# Where our time goes",
        "",
        f"`{profile['recipe']}`, {profile['questions']} questions one after the other, one core, {profile['dtype']}; "
        f"the floors are at {gflops['fast']} GFLOP/s ({gflops['float32']} in float32) and "
        f"{profile['gigabytes_a_second']} GB/s, measured in the same process.",
        "",
        "| stage | CPU ms a question | floor | times the floor | GFLOP | MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in profile["stages"]:
        cells = [
            "-" if row[key] is None else str(row[key]) for key in ("floor_milliseconds", "ratio", "gflop", "megabytes")
        ]
        lines.append(f"| {row['stage'].replace('  ', '- ')} | {row['cpu_milliseconds']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
