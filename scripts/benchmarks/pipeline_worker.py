"""One system of `scripts/bench.py pipeline` in a process of its own; runs in the environment of the peers as well.

    PYTHON pipeline_worker.py SYSTEM FOLDER

FOLDER holds work.json (paths), passages.jsonl and questions.jsonl. The worker loads its system, prints a line of JSON,
then answers each line with a question's number by a line of JSON: wall and CPU seconds, the ids of the first five
passages. "end" brings the peak memory. Standard output is the protocol's; whatever a library prints goes to stderr.

Every system does the same: encode the question with the same frozen encoder, search the same vectors exactly, re-rank
the first 20 with the weights of the same cross-encoder, keep five, word a prompt for a reader. This file imports odqa
for odqa alone, and each peer for that peer alone.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CANDIDATES, KEPT = 20, 5  # our choices: what is re-ranked, and what the reader would see
INSTRUCTION = "Answer the question in a few words taken from the passages."

Passage = dict[str, str]
Answer = Callable[[str], tuple[list[str], str]]
"""From a question to the ids of the passages kept, best first, and the prompt."""


def load_jsonl(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def pair_text(passage: Passage) -> str:
    """A passage as the re-ranker was trained to see it behind the question."""
    return f"{passage['title']} [SEP] {passage['text']}"


def prompt(question: str, passages: list[Passage]) -> str:
    shown = "".join(f"Title: {passage['title']}\n{passage['text']}\n\n" for passage in passages)
    return f"{INSTRUCTION}\n\n{shown}Question: {question}\nAnswer:"


# --- odqa -------------------------------------------------------------------------------------------------------------


def odqa(work: dict[str, Any], changes: list[str]) -> Answer:
    """A pipeline recipe's stages up to the re-ranker, and the prompt of its generative reader."""
    from odqa import jobs
    from odqa.read.prompts import TEMPLATES, Prompt
    from odqa.types import Query

    ranker = jobs.load_ranker(work["pipeline"], changes=[*changes, f"index={json.dumps(work['index'])}"])
    worded = Prompt(TEMPLATES["open-book"])

    def answer(question: str) -> tuple[list[str], str]:
        (hits,) = ranker.rank([Query("q", question)])
        kept = [hit.passage for hit in hits[:KEPT]]
        return [passage.id for passage in kept], worded.text(question, kept)

    return answer


SAME = ["retriever={kind: dense}", f"k={CANDIDATES}", f"reranker.depth={CANDIDATES}", "reranker.retriever_weight=0"]


# --- peers ------------------------------------------------------------------------------------------------------------


def haystack(work: dict[str, Any]) -> Answer:
    """Its Pipeline: SentenceTransformersTextEmbedder, FAISSEmbeddingRetriever, SentenceTransformersSimilarityRanker."""
    import numpy as np
    from haystack import Document, Pipeline
    from haystack.components.builders import PromptBuilder
    from haystack_integrations.components.embedders.sentence_transformers import SentenceTransformersTextEmbedder
    from haystack_integrations.components.rankers.sentence_transformers import SentenceTransformersSimilarityRanker
    from haystack_integrations.components.retrievers.faiss import FAISSEmbeddingRetriever
    from haystack_integrations.document_stores.faiss import FAISSDocumentStore

    vectors = np.load(work["vectors"]).astype(np.float32)
    store = FAISSDocumentStore(index_string="Flat", embedding_dim=vectors.shape[1])  # normalised: L2 ranks as IP does
    documents = [
        Document(id=p["id"], content=p["text"], meta={"title": p["title"]}, embedding=vector.tolist())
        for p, vector in zip(load_jsonl(Path(work["passages"])), vectors, strict=True)
    ]
    store.write_documents(documents)
    template = INSTRUCTION + (
        "\n\n{% for document in documents %}Title: {{ document.meta.title }}\n{{ document.content }}\n\n{% endfor %}"
        "Question: {{ question }}\nAnswer:"
    )
    pipeline = Pipeline()
    pipeline.add_component("embed", SentenceTransformersTextEmbedder(model=work["encoder"], progress_bar=False))
    pipeline.add_component("retrieve", FAISSEmbeddingRetriever(document_store=store, top_k=CANDIDATES))
    pipeline.add_component(
        "rank",
        SentenceTransformersSimilarityRanker(
            model=work["reranker"], top_k=KEPT, meta_fields_to_embed=["title"], embedding_separator=" [SEP] "
        ),
    )
    pipeline.add_component("prompt", PromptBuilder(template=template, required_variables=["documents", "question"]))
    pipeline.connect("embed.embedding", "retrieve.query_embedding")
    pipeline.connect("retrieve.documents", "rank.documents")
    pipeline.connect("rank.documents", "prompt.documents")

    def answer(question: str) -> tuple[list[str], str]:
        inputs = {"embed": {"text": question}, "rank": {"query": question}, "prompt": {"question": question}}
        found = pipeline.run(inputs, include_outputs_from={"rank"})
        return [document.id for document in found["rank"]["documents"]], found["prompt"]["prompt"]

    return answer


def txtai(work: dict[str, Any]) -> Answer:
    """Its Embeddings with the vectors given, and its Similarity as a cross-encoder, as its Reranker calls them."""
    import numpy as np
    from sentence_transformers import SentenceTransformer
    from txtai import Embeddings
    from txtai.pipeline import Similarity

    encoder = SentenceTransformer(work["encoder"], device="cpu")

    def encode(texts: list[str]) -> Any:
        return encoder.encode(list(texts), show_progress_bar=False, normalize_embeddings=True)

    vectors = np.load(work["vectors"]).astype(np.float32)
    passages = load_jsonl(Path(work["passages"]))
    embeddings = Embeddings(
        {"method": "external", "transform": encode, "backend": "faiss", "faiss": {"components": "IDMap,Flat"}}
    )
    embeddings.index((p["id"], vector, None) for p, vector in zip(passages, vectors, strict=True))
    by_id = {passage["id"]: passage for passage in passages}
    similarity = Similarity(work["reranker"], crossencode=True, gpu=False)

    def answer(question: str) -> tuple[list[str], str]:
        found = [by_id[pid] for pid, _ in embeddings.search(question, CANDIDATES)]
        ranked = similarity(question, [pair_text(passage) for passage in found])
        kept = [found[place] for place, _ in ranked[:KEPT]]
        return [passage["id"] for passage in kept], prompt(question, kept)

    return answer


def flashrag(work: dict[str, Any]) -> Answer:
    """Its DenseRetriever over a FAISS file, with its CrossReranker inside, as its pipelines call them."""
    import faiss
    import numpy as np
    from flashrag.config import Config
    from flashrag.retriever import DenseRetriever

    folder = Path(work["folder"])
    index = faiss.IndexFlatIP(384)
    index.add(np.load(work["vectors"]).astype(np.float32))
    faiss.write_index(index, str(folder / "flat.faiss"))
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as out:
        for passage in load_jsonl(Path(work["passages"])):
            out.write(json.dumps({"id": passage["id"], "contents": pair_text(passage), **passage}) + "\n")
    settings = {
        "retrieval_method": "minilm",
        "retrieval_model_path": work["encoder"],
        "retrieval_pooling_method": "mean",
        "retrieval_use_fp16": False,
        "retrieval_topk": CANDIDATES,
        "instruction": "",
        "index_path": str(folder / "flat.faiss"),
        "corpus_path": str(folder / "corpus.jsonl"),
        "use_reranker": True,
        "rerank_model_name": "reranker",
        "rerank_model_path": work["reranker"],
        "rerank_topk": KEPT,
        "rerank_use_fp16": False,
        "generator_model": "none",
        "generator_model_path": work["encoder"],
        "save_dir": str(folder / "flashrag"),
        "save_note": "bench",
        "disable_save": True,
        "gpu_id": "",
        "silent_retrieval": True,
    }
    retriever = DenseRetriever(Config(config_dict=settings))

    def answer(question: str) -> tuple[list[str], str]:
        kept = retriever.search(question)
        return [passage["id"] for passage in kept], prompt(question, kept)

    return answer


SYSTEMS: dict[str, Callable[[dict[str, Any]], Answer]] = {
    "odqa": lambda work: odqa(work, SAME),
    "odqa, float32": lambda work: odqa(work, [*SAME, "reranker.dtype=float32"]),
    "odqa, the recipe as it is": lambda work: odqa(work, []),
    "haystack-ai": haystack,
    "txtai": txtai,
    "flashrag-dev": flashrag,
}


# --- the protocol -----------------------------------------------------------------------------------------------------


def peak_memory() -> int:
    """Bytes. Not ru_maxrss, which of a child also counts what its parent had before."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def replies(system: str, work: dict[str, Any], asked: Iterator[str]) -> Iterator[dict[str, Any]]:
    """One reply when the system is loaded, one a line that comes in."""
    started = time.perf_counter(), time.process_time()
    answer = SYSTEMS[system](work)
    answer(work["warm_up"])
    yield {"load_wall": time.perf_counter() - started[0], "load_cpu": time.process_time() - started[1]}
    questions = load_jsonl(Path(work["questions"]))
    for line in asked:
        if line.strip() == "end":
            yield {"peak_memory_bytes": peak_memory()}
            return
        before = time.perf_counter(), time.process_time()
        ids, worded = answer(questions[int(line)]["question"])
        wall, cpu = time.perf_counter() - before[0], time.process_time() - before[1]
        yield {"wall": wall, "cpu": cpu, "ids": ids, "prompt_characters": len(worded)}


def main(system: str, folder: str) -> None:
    protocol = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    work = json.loads((Path(folder) / "work.json").read_text(encoding="utf-8"))
    for reply in replies(system, work, iter(sys.stdin.readline, "")):
        protocol.write(json.dumps(reply) + "\n")
        protocol.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
