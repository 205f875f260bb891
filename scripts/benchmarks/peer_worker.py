"""Retrieval by another library, in a process and an environment of its own: python peer_worker.py SYSTEM FOLDER OUT.

FOLDER holds what every system gets; only the systems called odqa need odqa:

    passages.jsonl     {"text", "toks": {term: count}} in row order; the title stands before the text
    questions.jsonl    {"text", "toks"}; a line may lack toks where only texts are asked
    settings.json      {"k1", "b", "k", "rounds", "encoder": FOLDER, "timed": questions that slow systems are asked}
    vectors.npy        float32 (passages, D), the passages' vectors; dense and hybrid systems

OUT becomes JSON: seconds to index, seconds of each round over all questions, how many were asked, the rows found for
each question, peak memory in bytes, and the packages' versions.
"""

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Search = Callable[[list[dict[str, Any]]], list[list[int]]]


@dataclass(frozen=True)
class Work:
    """What is to be indexed and asked."""

    folder: Path
    started: list[float]

    def start(self) -> None:
        """Now the library is loaded and the indexing begins."""
        self.started.append(time.perf_counter())

    @cached_property
    def settings(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "settings.json").read_text(encoding="utf-8")))

    @cached_property
    def questions(self) -> list[dict[str, Any]]:
        return list(self._lines("questions.jsonl"))

    @cached_property
    def vectors(self) -> np.ndarray:
        found: np.ndarray = np.load(self.folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
        return found

    def passages(self) -> Iterator[dict[str, Any]]:
        return self._lines("passages.jsonl")

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        with (self.folder / name).open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def _pisa(work: Work, *, terms: bool) -> Search:
    """PISA over our terms, or over texts with its own tokenizer, Lucene's stop words and no stemmer."""
    import pandas as pd
    from pyterrier_pisa import PisaIndex

    work.start()
    place = Path(tempfile.mkdtemp()) / "pisa"
    if terms:
        index = PisaIndex(str(place), text_field="toks", stemmer="none", stops="none")
        index.toks_indexer("toks", scale=1.0).index(
            {"docno": str(row), "toks": passage["toks"]} for row, passage in enumerate(work.passages())
        )
    else:
        index = PisaIndex(str(place), text_field="text", stemmer="none", stops="lucene")
        index.index({"docno": str(row), "text": passage["text"]} for row, passage in enumerate(work.passages()))
    settings = work.settings
    scaled = {"toks_scale": 1.0} if terms else {}
    engine = index.bm25(k1=settings["k1"], b=settings["b"], num_results=settings["k"], threads=1, **scaled)

    def search(questions: list[dict[str, Any]]) -> list[list[int]]:
        frame = pd.DataFrame({"qid": [str(number) for number in range(len(questions))]})
        frame["query_toks" if terms else "query"] = [each["toks" if terms else "text"] for each in questions]
        found: list[list[int]] = [[] for _ in questions]
        for qid, docno in engine.transform(frame)[["qid", "docno"]].itertuples(index=False):
            found[int(qid)].append(int(docno))
        return found

    return search


def _haystack(work: Work, *, sparse: bool, dense: bool) -> Search:
    """haystack-ai's in-memory store with its default BM25, ready vectors, or both joined by reciprocal rank."""
    from haystack import Document
    from haystack.components.joiners import DocumentJoiner
    from haystack.components.retrievers.in_memory import InMemoryBM25Retriever, InMemoryEmbeddingRetriever
    from haystack.document_stores.in_memory import InMemoryDocumentStore

    if dense:
        from haystack_integrations.components.embedders.sentence_transformers import SentenceTransformersTextEmbedder

        embedder = SentenceTransformersTextEmbedder(
            model=work.settings["encoder"], progress_bar=False, normalize_embeddings=True
        )
        embedder.warm_up()
    work.start()
    store = InMemoryDocumentStore(
        bm25_parameters={"k1": work.settings["k1"], "b": work.settings["b"]},
        embedding_similarity_function="dot_product",
    )
    vectors = work.vectors if dense else None
    store.write_documents(
        [
            Document(
                id=str(row),
                content=passage["text"],
                embedding=None if vectors is None else vectors[row].tolist(),
            )
            for row, passage in enumerate(work.passages())
        ]
    )
    k = work.settings["k"]
    by_terms, by_vector = InMemoryBM25Retriever(store, top_k=k), InMemoryEmbeddingRetriever(store, top_k=k)
    joiner = DocumentJoiner(join_mode="reciprocal_rank_fusion", top_k=k)

    def one(text: str) -> list[int]:
        lists = []
        if sparse:
            lists.append(by_terms.run(query=text)["documents"])
        if dense:
            lists.append(by_vector.run(query_embedding=embedder.run(text=text)["embedding"])["documents"])
        documents = lists[0] if len(lists) == 1 else joiner.run(documents=lists)["documents"]
        return [int(document.id) for document in documents]

    return lambda questions: [one(question["text"]) for question in questions]


def _txtai(work: Work, *, sparse: bool, dense: bool) -> Search:
    """txtai's Embeddings: its BM25, its FAISS over ready vectors, or its hybrid of both."""
    from txtai import Embeddings

    if dense:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(work.settings["encoder"], device="cpu")
    work.start()
    passages = [passage["text"] for passage in work.passages()]
    ready = dict(zip(passages, range(len(passages)), strict=False)) if dense else {}

    def encode(texts: list[str]) -> np.ndarray:
        if all(text in ready for text in texts):
            return np.asarray(work.vectors[[ready[text] for text in texts]], np.float32)
        found: np.ndarray = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
        return found

    config: dict[str, Any] = {"content": False}
    if sparse:
        config["keyword"] = not dense  # else a default encoder is looked for
        config["scoring"] = {"method": "bm25", "terms": True, "k1": work.settings["k1"], "b": work.settings["b"]}
    if dense:
        config |= {"method": "external", "transform": encode}
    if sparse and dense:
        config["scoring"]["normalize"] = True  # as hybrid=True sets it
    embeddings = Embeddings(config)
    embeddings.index((row, text, None) for row, text in enumerate(passages))
    k = work.settings["k"]

    def search(questions: list[dict[str, Any]]) -> list[list[int]]:
        hits = embeddings.batchsearch([question["text"] for question in questions], k)
        return [[int(row) for row, _ in found] for found in hits]

    return search


def _odqa(work: Work, *, engine: str | None, dense: bool) -> Search:
    """Our stores and searchers: BM25, FAISS over ready vectors, or both with the default weights of a recipe."""
    from odqa.artifacts import Draft
    from odqa.corpus.store import PassageStore, save_store
    from odqa.retrieve.bm25 import Bm25Settings, build_bm25, load_bm25
    from odqa.retrieve.dense import Encoder, EncoderSettings
    from odqa.retrieve.fuse import weighted_fusion
    from odqa.retrieve.index import DenseSearcher
    from odqa.retrieve.vectors import VectorSettings, build_vectors, load_vectors
    from odqa.types import Passage

    encoder = Encoder(EncoderSettings(work.settings["encoder"]), device="cpu")
    if dense:
        encoder.encode_questions(["which model is loaded"])
    work.start()
    draft = Draft(Path(tempfile.mkdtemp()))
    save_store((Passage(str(row), passage["text"]) for row, passage in enumerate(work.passages(), 1)), draft)
    store = PassageStore.open(draft.path / "passages")
    searchers: list[Any] = []
    if engine is not None:
        build_bm25(store, Bm25Settings(work.settings["k1"], work.settings["b"], engine=engine), draft)  # type: ignore[arg-type]
        searchers.append(load_bm25(draft.path / "bm25", store))
    if dense:
        vectors = work.vectors
        draft.part("vectors/part-00000.npy", lambda path: _save(path, vectors))
        build_vectors(draft.path / "vectors", VectorSettings(faiss="Flat"), draft)
        searchers.append(DenseSearcher(encoder, load_vectors(draft.path / "search", draft.path / "vectors")))
    k = work.settings["k"]

    def search(questions: list[dict[str, Any]]) -> list[list[int]]:
        runs = [searcher.search([question["text"] for question in questions], k) for searcher in searchers]
        found = runs[0] if len(runs) == 1 else weighted_fusion(runs, weights=(0.0325, 0.9675), k=k, normalise="none")
        return [[row for row in rows if row >= 0] for rows in found.rows.tolist()]

    return search


def _save(path: Path, vectors: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, np.asarray(vectors, np.float16), allow_pickle=False)


SYSTEMS: dict[str, tuple[str, Callable[[Work], Search]]] = {
    "odqa-bm25": ("odqa", lambda work: _odqa(work, engine="bm25s", dense=False)),
    "odqa-lucene": ("odqa", lambda work: _odqa(work, engine="lucene", dense=False)),
    "odqa-dense": ("odqa", lambda work: _odqa(work, engine=None, dense=True)),
    "odqa-hybrid": ("odqa", lambda work: _odqa(work, engine="bm25s", dense=True)),
    "pisa-terms": ("pyterrier-pisa", lambda work: _pisa(work, terms=True)),
    "pisa-text": ("pyterrier-pisa", lambda work: _pisa(work, terms=False)),
    "haystack-bm25": ("haystack-ai", lambda work: _haystack(work, sparse=True, dense=False)),
    "haystack-dense": ("haystack-ai", lambda work: _haystack(work, sparse=False, dense=True)),
    "haystack-hybrid": ("haystack-ai", lambda work: _haystack(work, sparse=True, dense=True)),
    "txtai-bm25": ("txtai", lambda work: _txtai(work, sparse=True, dense=False)),
    "txtai-dense": ("txtai", lambda work: _txtai(work, sparse=False, dense=True)),
    "txtai-hybrid": ("txtai", lambda work: _txtai(work, sparse=True, dense=True)),
}
_SLOW = ("haystack-bm25", "haystack-dense", "haystack-hybrid")  # a third of a second and more a question


def main() -> None:
    name, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    package, build = SYSTEMS[name]
    work = Work(folder, [])
    search = build(work)
    built = time.perf_counter() - work.started[0]
    is_slow = name in _SLOW
    questions = work.questions[:: max(1, len(work.questions) // work.settings["timed"])] if is_slow else work.questions
    search(questions[:1])
    seconds = []
    for _ in range(1 if is_slow else work.settings["rounds"]):
        started = time.perf_counter()
        rows = search(questions)
        seconds.append(time.perf_counter() - started)
    asked = [work.questions.index(question) for question in questions] if is_slow else list(range(len(questions)))
    result = {
        "package": f"{package} {_version(package)}",
        "index_seconds": built,
        "search_seconds": seconds,
        "asked": asked,
        "rows": rows,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    out.write_text(json.dumps(result), encoding="utf-8")
    os._exit(0)  # some of these libraries leave threads behind


def _version(package: str) -> str:
    if package == "odqa":  # also where it runs from its folder
        import odqa

        return odqa.__version__
    return version(package)


if __name__ == "__main__":
    main()
