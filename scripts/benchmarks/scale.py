"""Measures how an index grows: split, text store, BM25, FAISS, opening and searching, at several numbers of passages.

Each stage of each size is a process of its own, run one after the other; a stage that was measured is not run again
(`--work` keeps the results), so that a run may be cut anywhere. Seconds are those of the processor (user and system)
beside those of the clock. Memory is what a process took for itself at most (anonymous memory, every 10 ms) beside its
largest resident size, which counts the pages of mapped files too. Passages are the real ones, then copies of them in
which words are replaced by new ones at the rate that Heaps' law, fitted to the real ones, foretells. Vectors are drawn
at random: they serve for time and memory only. What the numbers of the sizes grow like is fitted (a line), and
21,015,324 passages are projected; files of that size, whose postings and codes are holes, are opened as they are.
"""

import json
import math
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.common import RESULTS, ROOT, save_result

WIKIPEDIA = 21_015_324  # passages of psgs_w100
WIDTH = 384
_SEED = 20201004
_TYPES = {
    "ivf-pq": "IVF{lists},PQ96",
    "sq": "IVF{lists},SQ4",
    "rabitq": "IVF{lists},RaBitQ3",
    "hnsw": "HNSW32,SQ8",
}
_STAGES = ("passages", "split", "store", "bm25", "vectors", *_TYPES, "open", "search")
_PROJECTED = ("cpu_seconds", "bytes")


def scale(
    sizes: Annotated[list[int], typer.Argument(help="Numbers of passages, such as 500000 1000000.")],
    data: Annotated[Path | None, typer.Option(help="The data folder, with nq-mini in it (or ODQA_DATA).")] = None,
    work: Annotated[Path, typer.Option(help="Where indexes and measured stages lie.")] = Path("runs/scale"),
    stages: Annotated[str, typer.Option(help="Stages to run, by name and comma.")] = ",".join(_STAGES),
    memory_budget: Annotated[int, typer.Option(help="Bytes, as in an index recipe.")] = 4_000_000_000,
    lists: Annotated[int, typer.Option(help="Lists of the IVF indexes.")] = 1024,
    questions: Annotated[int, typer.Option(help="Questions a search.")] = 200,
    out: Annotated[Path, typer.Option(help="Where the result goes (.json; a table beside it).")] = RESULTS
    / "bench-scale.json",
) -> None:
    """Time, memory and bytes of every stage of an index, by the number of passages."""
    from odqa.recipes import Places

    corpus = Places.from_environment(data).file("data:nq-mini/psgs.tsv.gz").parent
    options = {"corpus": str(corpus), "budget": memory_budget, "lists": lists, "questions": questions}
    heaps = _kept(work / "heaps.json", lambda: _run_stage("heaps", work, {**options, "size": 0}))
    for size in sizes:
        for stage in _STAGES:
            if stage in stages.split(","):
                folder = work / str(size)
                measured = _kept(
                    folder / f"{stage}.json",
                    lambda stage=stage, size=size, folder=folder: _run_stage(  # type: ignore[misc]
                        stage, folder, {**options, "size": size, "heaps": heaps["heaps"]}
                    ),
                )
                typer.echo(f"{size:>10,} {stage:<9} {json.dumps(measured)}")
    at_wikipedia = _kept(work / "holes.json", lambda: _run_stage("holes", work, {**options, "size": WIKIPEDIA}))
    result = _result(work, heaps, at_wikipedia, options)
    save_result(out, result)
    out.with_suffix(".md").write_text(_table(result), encoding="utf-8")
    typer.echo(_table(result))


def _kept(file: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result in a file; measured and put there if there is none."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(measure(), indent=1), encoding="utf-8")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _run_stage(stage: str, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Run a stage in a process of its own. Raises typer.Exit with its last words if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"}
    command = [sys.executable, "-m", "benchmarks.scale", stage, str(folder), json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        typer.echo(f"stage {stage} of {options['size']:,} passages failed:\n{done.stderr[-2000:]}", err=True)
        raise typer.Exit(2)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


# --- stages, each in its own process ----------------------------------------------------------------------------------


def _measured(work: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """What a piece of work took of the clock, the processor and memory, and what it reports."""
    peak = _AnonymousPeak()
    before, started = time.process_time(), time.perf_counter()
    with peak:
        told = work() or {}
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - before, 2),
        "peak_anonymous_bytes": peak.bytes,
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **told,
    }


class _AnonymousPeak:
    """Watches the anonymous memory of this process (RssAnon) from a thread, every 10 ms."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._ends.wait(0.01):
            self.bytes = max(self.bytes, _anonymous())

    def __enter__(self) -> "_AnonymousPeak":
        self.bytes = _anonymous()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def _heaps(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Fit V = K n^beta to the real passages in file order (which is shuffled): n tokens, V distinct ones."""
    from odqa.retrieve.bm25 import Analyzer

    analyzer, seen, tokens = Analyzer(), set[str](), 0
    curve = []
    for number, passage in enumerate(_real(options), 1):
        found = analyzer.tokens(f"{passage.title} {passage.text}")
        tokens += len(found)
        seen.update(found)
        if number % 2_000 == 0:
            curve.append((tokens, len(seen)))
    n, v = np.log(np.array(curve, np.float64)).T
    beta, constant = np.polyfit(n, v, 1)
    fitted = np.exp(constant + beta * n)
    worst = float(np.abs(fitted / np.exp(v) - 1).max())
    law = {"K": float(np.exp(constant)), "beta": float(beta), "tokens": tokens, "terms": len(seen), "passages": number}
    return {"heaps": law, "worst_error": round(worst, 4), "curve": curve[:: max(len(curve) // 12, 1)]}


def _real(options: dict[str, Any]) -> Iterator[Any]:
    from odqa.corpus.io import read_passages

    for name in ("psgs.tsv.gz", "psgs_extra.tsv.gz"):
        yield from read_passages(Path(options["corpus"]) / name)


def _varied(options: dict[str, Any]) -> Iterator[Any]:
    """The real passages, then copies in which a share of the words is outside of the real vocabulary.

    A word that follows n0 tokens is new with probability K beta n0^(beta - 1), Heaps' law's slope: that share of every
    copy's words is replaced. Of these, the share slope(n) / slope(n0) is never seen before; the others repeat one of
    the replacements so far, each as often as it came (Simon 1955), which gives new words the frequencies of real ones.
    """
    from odqa.types import Passage

    law = options["heaps"]
    power, n = law["beta"] - 1, float(law["tokens"])
    outside = law["K"] * law["beta"] * n**power
    rng = np.random.default_rng(_SEED)
    real = list(_real(options))
    mean_tokens = law["tokens"] / len(real)
    used: list[int] = []  # numbers of new words, one for each time that one came
    fresh = 0
    for row in range(options["size"]):
        passage = real[row % len(real)]
        text = passage.text
        if row >= len(real):
            words = text.split(" ")
            for place in np.flatnonzero(rng.random(len(words)) < outside).tolist():
                if not used or rng.random() < (n / law["tokens"]) ** power:
                    number = fresh = fresh + 1
                else:
                    number = used[int(rng.integers(len(used)))]
                used.append(number)
                words[place] = _new_word(number)
            text = " ".join(words)
            n += mean_tokens
        yield Passage(str(row + 1), text, passage.title)


def _new_word(number: int) -> str:
    """A word of letters that no text has: q, and a number in the base of 26 letters."""
    letters = ""
    while number:
        number, letter = divmod(number, 26)
        letters += chr(97 + letter)
    return f"qz{letters}"


def _passages(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Write the varied passages once, so that other stages read them as they would a collection."""
    from odqa.corpus.io import save_passages

    file = folder / "psgs.tsv"
    count = save_passages(file, _varied(options), "dpr")
    return {"passages": count, "bytes": file.stat().st_size}


def _split(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Join ten passages into an article's text, and cut it again as a dump's articles are cut; nothing is kept."""
    from itertools import islice

    from odqa.corpus.io import read_passages
    from odqa.corpus.split import split_article

    source, count = read_passages(folder / "psgs.tsv"), 0
    while group := list(islice(source, 10)):
        count += sum(1 for _ in split_article(" ".join(passage.text for passage in group), words=100))
    return {"passages": count}


def _store(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    from odqa.artifacts import Draft
    from odqa.corpus.io import read_passages
    from odqa.corpus.store import save_store

    save_store(read_passages(folder / "psgs.tsv"), Draft(folder), memory=options["budget"] * 3 // 4)
    return {"bytes": _size(folder / "passages")}


def _bm25(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    from odqa.artifacts import Draft
    from odqa.corpus.store import PassageStore
    from odqa.retrieve.bm25 import Bm25Settings, build_bm25

    store = PassageStore.open(folder / "passages")
    build_bm25(store, Bm25Settings(), Draft(folder), memory=options["budget"] * 3 // 4)
    indptr = np.load(folder / "bm25/postings/indptr.csc.index.npy", mmap_mode="r")
    law = options["heaps"]
    tokens = law["tokens"] * options["size"] / law["passages"]
    return {
        "bytes": _size(folder / "bm25"),
        "working_bytes": _size(folder / "bm25.parts"),
        "parts": len(list((folder / "bm25.parts").iterdir())),
        "terms": len(indptr) - 1,
        "terms_by_heaps": round(law["K"] * tokens ** law["beta"]),
        "postings": int(indptr[-1]),
    }


def _vectors(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Random vectors of unit length around 1,000 random centres, float16, as an encoder's parts lie."""
    target = folder / "vectors"
    target.mkdir(exist_ok=True)
    rng = np.random.default_rng(_SEED)
    centres = rng.standard_normal((1000, WIDTH), np.float32)
    for part, start in enumerate(range(0, options["size"], 65_536)):
        count = min(65_536, options["size"] - start)
        drawn = rng.standard_normal((count, WIDTH), np.float32) + centres[rng.integers(1000, size=count)]
        drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        np.save(target / f"part-{part:05d}.npy", drawn.astype(np.float16), allow_pickle=False)
    return {"bytes": _size(target)}


def _faiss(name: str) -> Callable[[Path, dict[str, Any]], dict[str, Any]]:
    def build(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
        import faiss

        from odqa.artifacts import Draft
        from odqa.retrieve.faiss_build import build_memory
        from odqa.retrieve.vectors import VectorSettings, build_vectors

        faiss.omp_set_num_threads(1)
        factory = _TYPES[name].format(lists=options["lists"])
        rows = 40 * options["lists"]
        settings = VectorSettings(faiss=factory, train_rows=rows)
        build_vectors(folder / "vectors", settings, Draft(folder), name, memory=options["budget"] * 3 // 4)
        needs = build_memory(factory, WIDTH, train_rows=min(rows, options["size"]))
        size = (folder / name / "index.faiss").stat().st_size
        shards = len(list((folder / name / "index.faiss.shards").iterdir())) - 1
        return {
            "factory": factory,
            "bytes": size,
            "bytes_a_vector": round(size / options["size"], 1),
            "shards": max(shards, 1),
            "foretold_bytes": needs.training if needs.in_shards else needs.whole(options["size"]),
        }

    return build


def _open(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds until a store, a BM25 index with its first term, and each FAISS index are open, one after the other."""
    seconds = {}
    for name, opened in _openers(folder, options["size"]):
        started = time.perf_counter()
        opened()
        seconds[name] = round(time.perf_counter() - started, 3)
    return {"opening": seconds}


def _openers(folder: Path, size: int) -> Iterator[tuple[str, Callable[[], object]]]:
    import faiss  # noqa: F401  the time of an import is not that of an index

    from odqa.corpus.store import PassageStore
    from odqa.retrieve.bm25 import load_bm25
    from odqa.retrieve.parts import VectorParts
    from odqa.retrieve.vectors import load_vectors

    store = PassageStore.open(folder / "passages")
    if (folder / "passages").is_dir():
        yield "store", lambda: PassageStore.open(folder / "passages")[size - 1]
    if (folder / "bm25").is_dir():
        yield "bm25", lambda: load_bm25(folder / "bm25", store)._term_id("river")  # type: ignore[union-attr]
    if (folder / "vectors").is_dir():
        yield "vectors", lambda: VectorParts(folder / "vectors")
    for name in _TYPES:
        if (folder / name).is_dir():
            yield name, lambda name=name: load_vectors(folder / name, folder / "vectors")  # type: ignore[misc]


def _search(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Questions a second on one thread, batches of all questions: real questions for BM25, random vectors for FAISS."""
    import faiss

    from odqa.corpus.io import read_questions
    from odqa.corpus.store import PassageStore
    from odqa.retrieve.bm25 import load_bm25
    from odqa.retrieve.vectors import load_vectors

    faiss.omp_set_num_threads(1)
    texts = [query.text for query in read_questions(Path(options["corpus"]) / "squad_tune.jsonl")]
    texts = texts[: options["questions"]]
    rates = {}

    def timed(name: str, run: Callable[[], object]) -> None:
        run()
        started = time.process_time()
        run()
        rates[name] = round(len(texts) / (time.process_time() - started), 1)

    if (folder / "bm25").is_dir():
        searcher = load_bm25(folder / "bm25", PassageStore.open(folder / "passages"))
        timed("bm25", lambda: searcher.search(texts, 100))
    vectors = np.random.default_rng(1).standard_normal((len(texts), WIDTH)).astype(np.float32)
    for name in _TYPES:
        if (folder / name).is_dir():
            knobs = {"efSearch": 64} if name == "hnsw" else {"nprobe": 32}
            found = load_vectors(folder / name, folder / "vectors", search=knobs)
            timed(name, lambda found=found: found.search(vectors, 100))  # type: ignore[misc]
    return {"questions_a_cpu_second": rates}


def _holes(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Make an index of Wikipedia's size whose large arrays are holes in sparse files, and open it."""
    from odqa.retrieve.bm25 import Bm25Settings, _TermWriter

    law = json.loads((folder / "heaps.json").read_text(encoding="utf-8"))["heaps"]
    rows = options["size"]
    terms = round(law["K"] * (law["tokens"] * rows / law["passages"]) ** law["beta"])
    target = folder / "holes"
    _hollow_store(target / "passages", rows)
    _hollow_bm25(target / "bm25", rows, terms, _TermWriter, Bm25Settings())
    _hollow_vectors(target, rows)
    opening = _open(target, options)["opening"]
    return {"passages": rows, "terms": terms, "bytes": _size(target), "opening": opening}


def _hollow_store(path: Path, rows: int) -> None:
    import pyarrow as pa

    from odqa.corpus.store import _SCHEMA, PART_ROWS

    path.mkdir(parents=True, exist_ok=True)
    counts = [min(PART_ROWS, rows - start) for start in range(0, rows, PART_ROWS)]
    for part, count in enumerate(counts):
        with pa.OSFile(str(path / f"part-{part:05d}.arrow"), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
            writer.write_batch(pa.record_batch([pa.array([""] * count, pa.large_string())] * 3, schema=_SCHEMA))
    (path / "store.json").write_text(json.dumps({"parts": counts, "ids": "row + 1"}), encoding="utf-8")


def _hollow_bm25(path: Path, rows: int, terms: int, writer: Any, settings: Any) -> None:
    from dataclasses import asdict

    import pyarrow as pa

    postings = path / "postings"
    postings.mkdir(parents=True, exist_ok=True)
    with writer(postings / "vocab.arrow") as file:
        for start in range(0, terms, 100_000):
            count = min(100_000, terms - start)
            file.append(pa.array([f"term{number:012d}" for number in range(start, start + count)], pa.large_string()))
    total = 60 * rows  # ours: distinct terms of a passage
    _hole(postings / "data.csc.index.npy", np.float32, (total,))
    _hole(postings / "indices.csc.index.npy", np.int32, (total,))
    _hole(postings / "indptr.csc.index.npy", np.int64, (terms + 1,))
    (postings / "params.index.json").write_text(json.dumps({"num_docs": rows}), encoding="utf-8")
    (path / "settings.json").write_text(json.dumps(asdict(settings)), encoding="utf-8")


def _hollow_vectors(target: Path, rows: int) -> None:
    """Parts of an encoder, and an IVF index of 16,384 lists whose codes are holes."""
    import struct

    import faiss

    from odqa.retrieve.dense import PART_ROWS

    (target / "vectors").mkdir(parents=True, exist_ok=True)
    for part, start in enumerate(range(0, rows, PART_ROWS)):
        _hole(target / f"vectors/part-{part:05d}.npy", np.float16, (min(PART_ROWS, rows - start), WIDTH))
    (target / "ivf-pq").mkdir(exist_ok=True)
    lists = 16_384
    index: Any = faiss.index_factory(WIDTH, f"IVF{lists},PQ96", faiss.METRIC_INNER_PRODUCT)
    index.quantizer.add(np.random.default_rng(0).standard_normal((lists, WIDTH)).astype(np.float32))
    index.pq.centroids.resize(WIDTH * 256)
    index.is_trained = True
    index.ntotal = rows
    empty = b"sprs" + struct.pack("<Q", 0)
    head = faiss.serialize_index(index).tobytes().removesuffix(empty)
    sizes = np.full(lists, rows // lists, np.uint64)
    sizes[-1] += np.uint64(rows % lists)
    with (target / "ivf-pq/index.faiss").open("wb") as file:
        file.write(head + b"full" + struct.pack("<Q", lists) + sizes.tobytes())
        file.truncate(file.tell() + rows * (96 + 8))
    meta = {"rows": rows, "width": WIDTH, "faiss": f"IVF{lists},PQ96", "search": {"nprobe": 32}}
    (target / "ivf-pq/search.json").write_text(json.dumps(meta), encoding="utf-8")


def _hole(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    np.lib.format.open_memmap(path, "w+", dtype, shape)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


_RUN: dict[str, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {
    "heaps": _heaps,
    "passages": _passages,
    "split": _split,
    "store": _store,
    "bm25": _bm25,
    "vectors": _vectors,
    **{name: _faiss(name) for name in _TYPES},
    "open": _open,
    "search": _search,
    "holes": _holes,
}


# --- the report -------------------------------------------------------------------------------------------------------


def _result(
    work: Path, heaps: dict[str, Any], at_wikipedia: dict[str, Any], options: dict[str, Any]
) -> dict[str, object]:
    """All that was measured in the work folder, in this run and earlier ones, with what it grows like."""
    sizes = sorted(int(folder.name) for folder in work.iterdir() if folder.name.isdecimal())
    measured: dict[str, dict[str, Any]] = {}
    for stage in _STAGES:
        files = {size: work / str(size) / f"{stage}.json" for size in sizes}
        measured[stage] = {
            str(size): json.loads(file.read_text(encoding="utf-8")) for size, file in files.items() if file.is_file()
        }
    return {
        "what": "stages of an index by number of passages, a process each, on one thread; a line projects",
        "options": {key: value for key, value in options.items() if key != "corpus"},
        "heaps": heaps,
        "stages": measured,
        "projected": {
            stage: _projected(found)
            for stage, found in measured.items()
            if stage not in ("open", "search") and _projected(found)
        },
        "at_wikipedia": at_wikipedia,
    }


def _projected(found: dict[str, Any]) -> dict[str, Any]:
    """A straight line through the sizes (two at least) and its value at Wikipedia's, for what is no constant.

    Processes have costs that do not grow (imports, training on a sample), so that a power of N would start too flat.
    `power` is that of the two largest sizes. Memory is not projected: the budget bounds it.
    """
    projected = {}
    for key in _PROJECTED:
        points = sorted((int(size), float(entry[key])) for size, entry in found.items() if entry.get(key))
        if len(points) > 1:
            slope, constant = np.polyfit([size for size, _ in points], [value for _, value in points], 1)
            (n, low), (m, high) = points[-2:]
            projected[key] = {
                "power": round(math.log(high / low) / math.log(m / n), 3),
                "at_wikipedia": round(float(constant + slope * WIKIPEDIA)),
            }
    return projected


def _table(result: dict[str, Any]) -> str:
    law = result["heaps"]["heaps"]
    lines = [
        "# Growth of an index",
        "",
        f"Heaps' law on {law['passages']:,} real passages: V = {law['K']:.2f} n^{law['beta']:.3f} (largest error "
        f"{100 * result['heaps']['worst_error']:.1f} % of V). Memory is a process's anonymous memory.",
        "Projected: by a line through the sizes; `power` is that of the two largest.",
        "",
        "| stage | passages | processor, s | clock, s | memory, GB | bytes, GB | more |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for stage, sizes in result["stages"].items():
        for size, found in sizes.items():
            more = {key: found[key] for key in found if key in _MORE}
            lines.append(
                f"| {stage} | {int(size):,} | {found['cpu_seconds']:,.1f} | {found['seconds']:,.1f} | "
                f"{found['peak_anonymous_bytes'] / 1e9:.2f} | {found.get('bytes', 0) / 1e9:.2f} | "
                f"{', '.join(f'{key} {value}' for key, value in more.items())} |"
            )
        grows = result["projected"].get(stage)
        if grows:
            seconds, size_of = (grows.get(key, {"at_wikipedia": 0}) for key in _PROJECTED)
            lines.append(
                f"| {stage} | {WIKIPEDIA:,}, projected | {seconds['at_wikipedia']:,} | | | "
                f"{size_of['at_wikipedia'] / 1e9:.2f} | {grows} |"
            )
    opening = result["at_wikipedia"]["opening"]
    lines += [
        "",
        f"Opening an index of {WIKIPEDIA:,} passages and {result['at_wikipedia']['terms']:,} terms (files of that "
        "size, postings and codes are holes): "
        + ", ".join(f"{name} {value} s" for name, value in opening.items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


_MORE = {
    "parts",
    "terms",
    "terms_by_heaps",
    "factory",
    "bytes_a_vector",
    "shards",
    "foretold_bytes",
    "opening",
    "questions_a_cpu_second",
}

if __name__ == "__main__":
    name, place, given = sys.argv[1:]
    loaded = json.loads(given)
    print(json.dumps(_measured(lambda: _RUN[name](Path(place), loaded))))
