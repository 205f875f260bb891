"""Measures what compressed vectors cost: bytes a vector, overlap of the first 10 with the exact search, and recall of
passages with an answer, for FAISS types on the vectors of a built index (a flat one: its vectors are the exact ones).
Each type is searched as it is, and refined from disk with codes of a byte a dimension and with the vectors themselves.
Choose a type by its overlap on the tune questions; recall on the dev questions is beside it, as gained or lost points.
"""

import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from benchmarks.common import RESULTS, save_result

if TYPE_CHECKING:
    from odqa.retrieve.index import Index

_WIKIPEDIA = 21_015_324  # passages of psgs_w100
_WIKIPEDIA_LISTS = 65_536  # ours: lists of an IVF index of that size, whose centroids are counted with the codes
_REFINED = (None, "int8", "vectors")


def quantised(
    factories: Annotated[list[str], typer.Argument(help="FAISS index-factory strings, such as IVF64,PQ192x7.")],
    data: Annotated[Path | None, typer.Option(help="The data folder, with nq-mini in it (or ODQA_DATA).")] = None,
    index: Annotated[Path, typer.Option(help="A built index with exact vectors or a Flat one.")] = Path(
        "artifacts/nq-mini"
    ),
    nprobe: Annotated[int, typer.Option(min=1, help="Lists that are searched.")] = 32,
    train_rows: Annotated[int, typer.Option(min=1, help="Vectors to train on.")] = 12_000,
    limit: Annotated[int, typer.Option(min=1, help="Questions of each set, at most.")] = 1200,
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = RESULTS / "bench-quantised.json",
) -> None:
    """Compressed vectors against the exact search: bytes, overlap, recall."""
    from odqa.corpus.io import read_gold, read_questions
    from odqa.recipes import Places
    from odqa.retrieve.index import load_index

    places = Places.from_environment(data)
    opened = load_index(index, device="auto")
    files = {
        name: places.file(f"data:nq-mini/{name}.jsonl") for name in ("nq_tune", "squad_tune", "nq_dev", "squad_dev")
    }
    asked = {
        name: opened.dense.encoder.encode_questions([query.text for query in read_questions(file)[:limit]])
        for name, file in files.items()
    }
    answers = {name: [gold.answers for gold in read_gold(file)[:limit]] for name, file in files.items()}
    with tempfile.TemporaryDirectory() as folder:
        _save_vectors(opened, Path(folder) / "vectors")
        exact = {
            name: rows for name, (rows, _) in _searched(Path(folder), None, asked, nprobe, train_rows, None).items()
        }
        systems = []
        for factory in factories:
            for refine in _REFINED:
                found = _searched(Path(folder), factory, asked, nprobe, train_rows, refine)
                systems.append(
                    {
                        "factory": factory,
                        "nprobe": nprobe,
                        "refine": refine,
                        "bytes_a_vector_at_wikipedia": _bytes(factory, opened.dense.encoder.width),
                        **{name: _compare(opened, exact[name], found[name], answers[name]) for name in asked},
                    }
                )
                typer.echo(json.dumps(systems[-1]))
    save_result(
        out,
        {
            "what": "FAISS types on the vectors of an index: overlap of the top 10 with the exact search, recall",
            "passages": len(opened.store),
            "train_rows": train_rows,
            "n": {name: len(vectors) for name, vectors in asked.items()},
            "systems": systems,
        },
    )


def _save_vectors(index: "Index", path: Path) -> None:
    """The exact vectors of an index as one part."""
    import faiss

    path.mkdir()
    opened = faiss.read_index(str(index.path / "dense/search/index.faiss"))  # kept: what is cast does not own it
    flat: Any = faiss.downcast_index(opened)
    vectors = flat.reconstruct_n(0, flat.ntotal)
    np.save(path / "part-00000.npy", vectors.astype(np.float16), allow_pickle=False)


def _searched(
    folder: Path, factory: str | None, asked: dict[str, np.ndarray], nprobe: int, train_rows: int, refine: Any
) -> dict[str, tuple[np.ndarray, float]]:
    """Rows of the first 10 (Q, 10) of each set, and seconds of the processor for a question."""
    from odqa.artifacts import Draft
    from odqa.retrieve.vectors import VectorSettings, build_vectors, load_vectors

    name = f"{factory}".replace(",", "-")
    search = {} if factory is None or "IVF" not in factory else {"nprobe": nprobe}
    plain = VectorSettings(faiss=factory, search=search, train_rows=train_rows)
    if refine is None:
        build_vectors(folder / "vectors", plain, Draft(folder), name)
    else:  # on the FAISS index that the plain one has made
        draft = Draft(folder)
        (folder / name / "search.json").unlink()
        build_vectors(folder / "vectors", replace(plain, refine=refine), draft, name)
    searcher = load_vectors(folder / name, folder / "vectors")
    found = {}
    for of, vectors in asked.items():
        started = time.process_time()
        rows = searcher.search(vectors, 10).rows
        found[of] = rows, (time.process_time() - started) / len(vectors)
    return found


def _compare(
    index: "Index", exact: np.ndarray, found: tuple[np.ndarray, float], answers: list[tuple[str, ...]]
) -> dict[str, float]:
    rows, seconds = found
    overlaps = [len({*one} & {*other}) / 10 for one, other in zip(rows.tolist(), exact.tolist(), strict=True)]
    ours, theirs = _recall(index, rows, answers), _recall(index, exact, answers)
    return {
        "overlap@10": round(statistics.mean(overlaps), 4),
        "cpu_milliseconds": round(1000 * seconds, 2),
        **{key: round(ours[key], 2) for key in ours},
        **{f"{key} change": round(ours[key] - theirs[key], 2) for key in ours},
    }


def _recall(index: "Index", rows: np.ndarray, answers: list[tuple[str, ...]]) -> dict[str, float]:
    """Share (0 to 100) of questions with an answer in the first k passages."""
    from odqa.text import has_answer

    hits = {1: 0, 5: 0}
    for found, right in zip(rows.tolist(), answers, strict=True):
        holds = [row >= 0 and has_answer(index.store[row].text, right) for row in found[:5]]
        for k in hits:
            hits[k] += any(holds[:k])
    return {f"recall@{k}": 100 * count / len(answers) for k, count in hits.items()}


def _bytes(factory: str, width: int) -> float:
    """Code, id and a share of the centroids, for 21 million vectors."""
    from odqa.retrieve.faiss_build import build_memory

    centroids = 4 * width * _WIKIPEDIA_LISTS / _WIKIPEDIA if "IVF" in factory else 0
    return round(build_memory(factory, width, train_rows=1).vector + centroids, 1)
