"""Ranks nq-mini with BM25 of several makers, the same k1 and b: recall, how often the top 10 are the same as those of
engine bm25s, questions a second on one thread (in turn, text to top 100), and why they differ: what each maker is known
to do otherwise is put into a plain scorer, which must then rank as that maker does.

Run it where odqa[lucene,reference] is installed. PYTHON is the interpreter of an environment with pyterrier-pisa.
rank-bm25 is so slow that it is asked a sample.
"""

import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from benchmarks.common import RESULTS, save_result, sha256
from benchmarks.peers import Judge, as_rows, ask_peer, write_work

if TYPE_CHECKING:
    from odqa.corpus.store import PassageStore
    from odqa.retrieve.bm25 import Bm25Settings

_SETS = ("nq_dev", "squad_dev")
_DEPTH = 100
_RECALL = (1, 5, 20, 100)


@dataclass(slots=True)
class System:
    """One maker's BM25: int64 (questions, 100) of rows, the questions it was asked, seconds of each round."""

    name: str
    version: str
    rows: np.ndarray
    asked: list[int]
    index_seconds: float
    search_seconds: list[float]

    @property
    def questions_per_second(self) -> float:
        return len(self.asked) / float(np.median(self.search_seconds))


def bm25(
    data: Annotated[Path | None, typer.Option(help="The data folder, with nq-mini in it (or ODQA_DATA).")] = None,
    peers: Annotated[Path | None, typer.Option(help="Python interpreter of the environment that holds PISA.")] = None,
    sample: Annotated[int, typer.Option(min=1, help="Questions that rank-bm25 is asked.")] = 120,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; in each every system is asked all questions.")] = 3,
    passages: Annotated[int | None, typer.Option(min=20, help="Only the first of the collection, for a trial.")] = None,
    out: Annotated[Path, typer.Option(help="Where the result goes, with a table as .md.")] = RESULTS
    / "bm25-engines.json",
) -> None:
    """BM25 of bm25s, Lucene, rank-bm25 and PISA: recall, equal top 10s, speed, and why they differ."""
    from itertools import islice

    from odqa.artifacts import Draft
    from odqa.corpus.io import read_gold, read_passages, read_questions
    from odqa.corpus.store import PassageStore, save_store
    from odqa.recipes import Places
    from odqa.retrieve.bm25 import Bm25Settings, LuceneAnalyzer

    places = Places.from_environment(data)
    files = [places.file(f"data:nq-mini/{name}.jsonl") for name in _SETS]
    texts = [query.text for file in files for query in read_questions(file)]
    answers = [gold.answers for file in files for gold in read_gold(file)]
    sets = np.repeat(np.arange(len(files)), [len(read_questions(file)) for file in files])
    collection = places.file("data:nq-mini/psgs.tsv.gz")
    plain = Bm25Settings()
    engines = {
        "bm25s": plain,
        "Lucene, our terms": Bm25Settings(engine="lucene"),
        "Lucene, its terms, no stems": Bm25Settings(engine="lucene", lucene=LuceneAnalyzer(stemmer="none")),
        "Lucene, its terms, Porter": Bm25Settings(engine="lucene", lucene=LuceneAnalyzer()),
    }
    with tempfile.TemporaryDirectory() as folder:
        save_store(islice(read_passages(collection), passages), Draft(Path(folder)))
        store = PassageStore.open(Path(folder) / "passages")
        systems = _engines(store, engines, texts, Path(folder), rounds)
        systems.append(_rank_bm25(store, texts, sample))
        missing = {}
        if peers is not None:
            write_work(Path(folder) / "work", store, texts, plain, k=_DEPTH, rounds=rounds, timed=sample)
            for name, system in (("PISA, our terms", "pisa-terms"), ("PISA, its terms", "pisa-text")):
                found = ask_peer(peers, system, Path(folder) / "work")
                if isinstance(found, str):
                    missing[name] = found
                    continue
                rows = as_rows(found, len(texts), _DEPTH)
                systems.append(
                    System(name, found.package, rows, found.asked, found.index_seconds, found.search_seconds)
                )
        judge = Judge(answers, store)
        reference = systems[0].rows
        table = [_row(system, reference, judge, sets) for system in systems]
        reasons = _reasons(store, plain, texts, {system.name: system for system in systems})
        count = len(store)
    result: dict[str, object] = {
        "what": "k1 0.9, b 0.4; text to top 100 on one thread; our engines in turn, the machine busy with other work;"
        " equal: share of questions whose first 10 rows are those of bm25s, in the same order",
        "collection": {"name": collection.name, "sha256": sha256(collection), "passages": count},
        "questions": {file.name: sha256(file) for file in files},
        "systems": table,
        "missing": missing,
        "reasons": reasons,
    }
    save_result(out, result)
    out.with_suffix(".md").write_text(_markdown(result), encoding="utf-8")
    typer.echo(out.with_suffix(".md").read_text(encoding="utf-8"))


def _engines(
    store: "PassageStore", engines: "dict[str, Bm25Settings]", texts: list[str], folder: Path, rounds: int
) -> list[System]:
    """Build all of our engines, and let them take turns."""
    from odqa.artifacts import Draft
    from odqa.retrieve.bm25 import Bm25Searcher, build_bm25, load_bm25

    systems, searchers = [], []
    for number, (name, settings) in enumerate(engines.items()):
        started = time.perf_counter()
        build_bm25(store, settings, Draft(folder / str(number)))
        seconds = time.perf_counter() - started
        searcher: Any = load_bm25(folder / str(number) / "bm25", store)
        if settings.engine == "bm25s":
            searcher = Bm25Searcher(folder / str(number) / "bm25/postings", settings, len(store), compile=True)
        searcher.search(texts, _DEPTH)  # numba and the Java machine compile
        package = "pyserini" if settings.engine == "lucene" else "odqa"
        searchers.append(searcher)
        systems.append(System(name, f"{package} {version(package)}", np.empty(0), list(range(len(texts))), seconds, []))
        typer.echo(f"{name}: indexed in {seconds:.1f} s", err=True)
    for _ in range(rounds):
        for system, searcher in zip(systems, searchers, strict=True):
            started = time.perf_counter()
            found = searcher.search(texts, _DEPTH)
            system.search_seconds.append(time.perf_counter() - started)
            system.rows = found.rows
    return systems


def _rank_bm25(store: "PassageStore", texts: list[str], sample: int) -> System:
    from odqa.retrieve.bm25 import Bm25Settings, ReferenceSearcher

    searcher = ReferenceSearcher(store, Bm25Settings(engine="rank-bm25"))
    started = time.perf_counter()
    searcher.search(texts[:1], 1)  # indexes
    seconds = time.perf_counter() - started
    asked = sorted({int(number) for number in np.linspace(0, len(texts) - 1, min(sample, len(texts)))})
    started = time.perf_counter()
    found = searcher.search([texts[number] for number in asked], _DEPTH)
    spent = time.perf_counter() - started
    rows = np.full((len(texts), _DEPTH), -1, np.int64)
    rows[asked] = found.rows
    return System("rank-bm25", f"rank-bm25 {version('rank-bm25')}", rows, asked, seconds, [spent])


def _row(system: System, reference: np.ndarray, judge: Judge, sets: np.ndarray) -> dict[str, Any]:
    """A system's line in the table."""
    by_set = {
        name: {
            "n": len(asked := [number for number in system.asked if sets[number] == place]),
            **judge.recall(system.rows, asked, _RECALL),
            "equal_top_10": _equal(system.rows, reference, asked),
            "common_top_10": _common(system.rows, reference, asked),
        }
        for place, name in enumerate(_SETS)
    }
    return {
        "system": system.name,
        "version": system.version,
        **by_set,
        "questions_per_second": round(system.questions_per_second, 1),
        "index_seconds": round(system.index_seconds, 1),
    }


def _equal(rows: np.ndarray, reference: np.ndarray, asked: Sequence[int]) -> float:
    """Percent of questions whose first 10 rows are the same, order included."""
    return round(100 * float(np.mean([(rows[n, :10] == reference[n, :10]).all() for n in asked])), 1)


def _common(rows: np.ndarray, reference: np.ndarray, asked: Sequence[int]) -> float:
    """Mean percent of the first 10 rows that two rankings have in common."""
    tops = [(set(rows[n, :10].tolist()) - {-1}, set(reference[n, :10].tolist()) - {-1}) for n in asked]
    return round(100 * float(np.mean([len(one & other) / max(len(one | other), 1) for one, other in tops])), 1)


# ---------------------------------------------------------------------------------------------------- why they differ


@dataclass(frozen=True, slots=True)
class Counts:
    """Of our terms: (rows, counts) of each that is asked for, every passage's length, and in how many each stands."""

    postings: dict[str, tuple[np.ndarray, np.ndarray]]
    lengths: np.ndarray
    frequencies: Counter[str]

    @classmethod
    def of(cls, store: "PassageStore", settings: "Bm25Settings", asked: set[str]) -> "Counts":
        found: dict[str, list[tuple[int, int]]] = {term: [] for term in asked}
        lengths, frequencies = [], Counter[str]()
        for row, passage in enumerate(store):
            counts = Counter(settings.analyzer.terms(settings.text(passage)))
            lengths.append(counts.total())
            frequencies.update(counts.keys())
            for term in counts.keys() & asked:
                found[term].append((row, counts[term]))
        postings = {}
        for term, pairs in found.items():
            if pairs:
                rows, counts_of = np.array(pairs).T
                postings[term] = rows, counts_of
        return cls(postings, np.array(lengths), frequencies)


def _reasons(
    store: "PassageStore", settings: "Bm25Settings", texts: list[str], systems: dict[str, System]
) -> list[dict[str, Any]]:
    """For each maker that ranks our terms: how often a plain scorer with its peculiarities ranks as it does."""
    queries = [settings.analyzer.terms(text) for text in texts]
    counts = Counts.of(store, settings, {term for query in queries for term in query})
    passages = len(store)
    with_terms = int((counts.lengths > 0).sum())
    okapi = okapi_idf(counts.frequencies, passages)
    lucene_idf = _lucene_idf(counts.frequencies, with_terms)
    byte_lengths = np.array([byte_length(int(length)) for length in counts.lengths])
    exact_mean, lucene_mean = counts.lengths.mean(), counts.lengths.sum() / with_terms
    plain_idf = _lucene_idf(counts.frequencies, passages)
    peculiar = {
        "bm25s": ("none: the plain scorer", plain_idf, counts.lengths, exact_mean, False),
        "Lucene, our terms": ("lengths in one byte", lucene_idf, byte_lengths, lucene_mean, False),
        "rank-bm25": ("Okapi's idf, floored at a quarter of its mean", okapi, counts.lengths, exact_mean, False),
        "PISA, our terms": (
            "Robertson's idf, floored at 0.000001; a query's term counts once",
            lambda term: max(1e-6, _robertson_idf(counts.frequencies[term], passages)),
            counts.lengths,
            exact_mean,
            True,
        ),
    }
    rows: list[dict[str, Any]] = []
    for name, (what, idf, lengths, mean, once) in peculiar.items():
        if name not in systems:
            continue
        system = systems[name]
        mine = np.full((len(texts), _DEPTH), -1, np.int64)
        for number in system.asked:
            terms = list(dict.fromkeys(queries[number])) if once else queries[number]
            top = plain_top(terms, counts.postings, idf, lengths, mean, settings)
            mine[number, : len(top)] = top
        rows.append(
            {
                "system": name,
                "peculiarity": what,
                "plain_scorer_with_it": _equal(mine, system.rows, system.asked),
                "plain_scorer_without": _equal(systems["bm25s"].rows, system.rows, system.asked),
                "n": len(system.asked),
            }
        )
    return rows


def plain_top(
    terms: Sequence[str],
    postings: dict[str, tuple[np.ndarray, np.ndarray]],
    idf: Callable[[str], float],
    lengths: np.ndarray,
    mean: float,
    settings: "Bm25Settings",
) -> np.ndarray:
    """The first 10 rows by BM25, in float64 rounded to float32 at the end, as Lucene does."""
    from odqa.retrieve.bm25 import bm25_saturation

    totals = np.zeros(len(lengths))
    for term in terms:
        if term in postings:
            rows, counts = postings[term]
            totals[rows] += idf(term) * bm25_saturation(counts, lengths[rows], mean, settings.k1, settings.b)
    rows = np.flatnonzero(totals)
    found: np.ndarray = rows[np.lexsort((rows, -totals[rows].astype(np.float32)))[:10]]
    return found


def byte_length(length: int) -> int:
    """What is left of a length in one byte: SmallFloat.byte4ToInt(intToByte4(length)) of Lucene.

    Exact below 40; above, what is more than 24 keeps its first four bits.
    """
    if length < 24:
        return length
    rest = length - 24
    shift = max(0, rest.bit_length() - 4)
    return 24 + (rest >> shift << shift)


def _lucene_idf(frequencies: Counter[str], passages: int) -> Callable[[str], float]:
    from odqa.retrieve.bm25 import bm25_idf

    return lambda term: bm25_idf(passages, frequencies[term])


def _robertson_idf(frequency: int, passages: int) -> float:
    return math.log((passages - frequency + 0.5) / (frequency + 0.5))


def okapi_idf(frequencies: Counter[str], passages: int) -> Callable[[str], float]:
    """rank-bm25's: Robertson's, where that is negative a quarter of the mean over the vocabulary."""
    mean = sum(_robertson_idf(frequency, passages) for frequency in frequencies.values()) / max(len(frequencies), 1)

    def idf(term: str) -> float:
        value = _robertson_idf(frequencies[term], passages)
        return 0.25 * mean if value < 0 else value

    return idf


# ---------------------------------------------------------------------------------------------------- the table


def _markdown(result: dict[str, Any]) -> str:
    heads = ["system", *(f"{name} recall@1 / 5 / 20 / 100" for name in _SETS), "equal top 10 (NQ / SQuAD)"]
    heads += ["common top 10 (NQ / SQuAD)", "questions/s", "index, s", "n"]
    lines = [f"# BM25 of several makers on {result['collection']['passages']:,} passages", "", f"{result['what']}.", ""]
    lines += [_line(heads), _line(["---"] * len(heads))]
    for row in result["systems"]:
        recalls = [" / ".join(f"{row[name][f'recall@{k}']:.1f}" for k in _RECALL) for name in _SETS]
        shares = [" / ".join(f"{row[name][key]:.1f}" for name in _SETS) for key in ("equal_top_10", "common_top_10")]
        asked = " + ".join(str(row[name]["n"]) for name in _SETS)
        speed = [f"{row['questions_per_second']:,.1f}", f"{row['index_seconds']:.1f}", asked]
        lines.append(_line([f"{row['system']} ({row['version']})", *recalls, *shares, *speed]))
    for name, reason in result["missing"].items():
        lines.append(f"\n{name}: not there ({reason}).")
    heads = ["ranks as this system", "with", "percent of equal top 10s", "without it", "n"]
    lines += ["", "Why they differ: a plain scorer over our terms that has a maker's peculiarity", ""]
    lines += [_line(heads), _line(["---"] * len(heads))]
    for row in result["reasons"]:
        cells = [row["system"], row["peculiarity"], row["plain_scorer_with_it"], row["plain_scorer_without"], row["n"]]
        lines.append(_line([str(cell) for cell in cells]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
