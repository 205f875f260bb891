"""Measures retrieval over the passages of one or several built indexes, in one run. What has a floor takes turns with
it in one process: BM25 batches with raw bm25s (numba), encoding with sentence-transformers' default `encode` on a
sample, FAISS search with raw FAISS. Then each whole system in a process of its own: ours, Lucene, PISA, haystack-ai and
txtai; all get ready passage vectors and one thread. The indexes need vectors of one encoder in a Flat FAISS index.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from benchmarks.common import RESULTS, save_result, sha256
from benchmarks.peers import Judge, as_rows, ask_peer, write_work

if TYPE_CHECKING:
    from odqa.types import Passage

_SETS = ("nq_dev", "squad_dev")
_DEPTH = 100
_RECALL = (5, 20)
_OURS = ("odqa-bm25", "odqa-dense", "odqa-hybrid", "odqa-lucene")
_PEERS = ("pisa-terms", *(f"{peer}-{what}" for peer in ("haystack", "txtai") for what in ("bm25", "dense", "hybrid")))
_BARS = {"bm25": 0.95, "encode": 2.5, "faiss": 0.95}


def retrieval(
    indexes: Annotated[list[Path], typer.Argument(help="Index folders; their passages are searched together.")],
    data: Annotated[Path | None, typer.Option(help="The data folder, with nq-mini in it (or ODQA_DATA).")] = None,
    peers: Annotated[Path | None, typer.Option(help="Python interpreter of the environment of the peers.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; in each every system does all.")] = 5,
    sample: Annotated[int, typer.Option(min=8, help="Passages that are encoded in each round.")] = 256,
    timed: Annotated[int, typer.Option(min=1, help="Questions that haystack-ai is asked.")] = 24,
    encoder: Annotated[str, typer.Option(help="The encoder that made the vectors.")] = "embedded:all-MiniLM-L6-v2",
    out: Annotated[Path, typer.Option(help="Where the result goes, with a table as .md.")] = RESULTS
    / "bench-retrieval.json",
) -> None:
    """BM25, encoding and FAISS against their floors; whole systems beside ours."""
    from odqa.corpus.io import read_gold, read_questions
    from odqa.models import embedded_folder
    from odqa.recipes import Places
    from odqa.retrieve.bm25 import Bm25Settings
    from odqa.retrieve.index import load_index

    places = Places.from_environment(data)
    files = [places.file(f"data:nq-mini/{name}.jsonl") for name in _SETS]
    texts = [query.text for file in files for query in read_questions(file)]
    answers = [gold.answers for file in files for gold in read_gold(file)]
    folder_of_model = embedded_folder(encoder) or Path(encoder)
    opened = [load_index(path) for path in indexes]
    vectors = np.concatenate([_stored_vectors(path) for path in indexes])
    passages = list(chain.from_iterable(index.store for index in opened))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        settings = Bm25Settings()
        told = {"k": _DEPTH, "rounds": rounds, "timed": timed, "encoder": str(folder_of_model)}
        write_work(work, passages, texts, settings, vectors, **told)
        ratios = {
            "bm25": _bm25_ratio(passages, texts, rounds, Path(folder)),
            "faiss": _faiss_ratio(vectors, texts, folder_of_model, rounds, Path(folder)),
            "encode": _encode_ratio(passages[:: max(1, len(passages) // sample)][:sample], folder_of_model, rounds),
        }
        judge = Judge(answers, passages)
        systems, missing = [], {}
        asked = [(Path(sys.executable), name) for name in _OURS]
        asked += [(peers, name) for name in _PEERS] if peers is not None else []
        for python, name in asked:
            found = ask_peer(python, name, work)
            if isinstance(found, str):
                missing[name] = found
                continue
            rows = as_rows(found, len(texts), _DEPTH)
            systems.append(
                {
                    "system": name,
                    "package": found.package,
                    "index_seconds": round(found.index_seconds, 1),
                    "questions_per_second": round(len(found.asked) / statistics.median(found.search_seconds), 2),
                    "n": len(found.asked),
                    **judge.recall(rows, found.asked, _RECALL),
                    "peak_mib": found.peak_bytes >> 20,
                }
            )
    result: dict[str, object] = {
        "what": "one thread, text to top 100; ratios: rounds in turn in one process, ours against the floor; systems: "
        "a process each, one after the other, ready passage vectors for all; recall by has_answer over both dev sets "
        "together, on the questions that were asked. The machine did other work too.",
        "passages": len(passages),
        "indexes": [index.artifact.hash for index in opened],
        "questions": {file.name: sha256(file) for file in files},
        "ratios": ratios,
        "systems": systems,
        "missing": missing,
    }
    save_result(out, result)
    out.with_suffix(".md").write_text(_markdown(result), encoding="utf-8")
    typer.echo(out.with_suffix(".md").read_text(encoding="utf-8"))


def _stored_vectors(path: Path) -> np.ndarray:
    """float32 (N, D): what a Flat FAISS index holds."""
    import faiss

    index = faiss.read_index(str(path / "dense/search/index.faiss"))
    found: np.ndarray = index.reconstruct_n(0, index.ntotal)
    return found


# ---------------------------------------------------------------------------------------------------- floors


def _in_turn(ours: Callable[[], object], floor: Callable[[], object], rounds: int, count: int) -> dict[str, object]:
    """Items a second of both after a warm-up, and how many times the floor's speed ours has, round by round."""
    seconds: dict[str, list[float]] = {"ours": [], "floor": []}
    runs = {"ours": ours, "floor": floor}
    for run in runs.values():
        run()
    for number in range(rounds):
        for name in sorted(runs, reverse=bool(number % 2)):
            started = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - started)
    ratios = [floor / mine for floor, mine in zip(seconds["floor"], seconds["ours"], strict=True)]
    spread = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return {
        "ours_per_second": round(count / statistics.median(seconds["ours"]), 1),
        "floor_per_second": round(count / statistics.median(seconds["floor"]), 1),
        "ratio": {name: round(value, 3) for name, value in spread.items()},
        "rounds": rounds,
        "n": count,
    }


def _bm25_ratio(passages: "Sequence[Passage]", texts: list[str], rounds: int, folder: Path) -> dict[str, object]:
    """Batches of all questions, from text to top 100, against bm25s with its numba backend; both compiled."""
    import bm25s

    from odqa.artifacts import Draft
    from odqa.corpus.store import PassageStore, save_store
    from odqa.retrieve.bm25 import Bm25Searcher, Bm25Settings, build_bm25

    settings = Bm25Settings()
    draft = Draft(folder / "ours")
    save_store(_numbered(passages), draft)
    store = PassageStore.open(draft.path / "passages")
    build_bm25(store, settings, draft)
    ours = Bm25Searcher(draft.path / "bm25/postings", settings, len(store), compile=True)
    raw = bm25s.BM25(k1=settings.k1, b=settings.b, method="lucene", backend="numba")
    tokens = bm25s.tokenize([settings.text(passage) for passage in passages], stopwords="en", show_progress=False)
    raw.index(tokens, show_progress=False)

    def floor() -> object:
        asked = bm25s.tokenize(texts, stopwords="en", show_progress=False)
        return raw.retrieve(asked, k=_DEPTH, n_threads=1, show_progress=False)

    return _in_turn(lambda: ours.search(texts, _DEPTH), floor, rounds, len(texts))


def _numbered(passages: "Sequence[Passage]") -> "list[Passage]":
    from odqa.types import Passage

    return [Passage(str(number), passage.text, passage.title) for number, passage in enumerate(passages, 1)]


def _faiss_ratio(vectors: np.ndarray, texts: list[str], model: Path, rounds: int, folder: Path) -> dict[str, object]:
    """Our search of encoded questions, against the call of FAISS in it."""
    import faiss

    from odqa.retrieve.dense import Encoder, EncoderSettings
    from odqa.retrieve.vectors import FaissVectors

    asked = Encoder(EncoderSettings(str(model)), device="cpu").encode_questions(texts)
    raw = faiss.IndexFlatIP(vectors.shape[1])
    raw.add(vectors)
    faiss.write_index(raw, str(folder / "flat.faiss"))
    ours = FaissVectors(folder / "flat.faiss", search={})
    return _in_turn(lambda: ours.search(asked, _DEPTH), lambda: raw.search(asked, _DEPTH), rounds, len(texts))


def _encode_ratio(passages: "Sequence[Passage]", model: Path, rounds: int) -> dict[str, object]:
    """Our encoding of a sample of passages, against sentence-transformers with its defaults."""
    from sentence_transformers import SentenceTransformer

    from odqa.retrieve.dense import Encoder, EncoderSettings
    from odqa.runtime import has_fast_bf16

    settings = EncoderSettings(str(model))
    ours = Encoder(settings, device="cpu")
    theirs = SentenceTransformer(str(model), device="cpu")
    texts = [str(settings.passage_text(passage)) for passage in passages]
    measured = _in_turn(
        lambda: ours.encode_passages(passages),
        lambda: theirs.encode(texts, show_progress_bar=False),
        rounds,
        len(passages),
    )
    return {**measured, "fast_bfloat16": has_fast_bf16(), "threads": os.environ.get("OMP_NUM_THREADS", "all")}


# ---------------------------------------------------------------------------------------------------- the table


def _markdown(result: dict[str, Any]) -> str:
    what = {"bm25": "BM25 batch / raw bm25s (numba)", "encode": "encoding / sentence-transformers' default encode"}
    what["faiss"] = "FAISS Flat search / raw FAISS"
    lines = [f"# Retrieval over {result['passages']:,} passages", "", result["what"], ""]
    lines += [
        "| against its floor | ours, a second | floor, a second | ratio (min, max) | bar | n |",
        "|" + " --- |" * 6,
    ]
    for name, row in result["ratios"].items():
        ratio = row["ratio"]
        lines.append(
            f"| {what[name]} | {row['ours_per_second']:,} | {row['floor_per_second']:,} | {ratio['median']} "
            f"({ratio['min']}, {ratio['max']}) | {_BARS[name]} | {row['n']} x {row['rounds']} |"
        )
    heads = ["system", "index, s", "questions/s", *(f"recall@{k}" for k in _RECALL), "peak, MiB", "n"]
    lines += ["", f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for row in result["systems"]:
        cells = [f"{row['system']} ({row['package']})", row["index_seconds"], row["questions_per_second"]]
        cells += [*(row[f"recall@{k}"] for k in _RECALL), row["peak_mib"], row["n"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [f"\n{name}: not there ({reason})." for name, reason in result["missing"].items()]
    return "\n".join(lines) + "\n"
