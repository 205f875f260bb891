"""Retrieval on nq-mini against the figures of its README: recall of passages with an answer (DPR has_answer).

Needs ODQA_DATA. The dense part encodes the whole collection (minutes): marker `slow`. Run as
`ODQA_DATA=... pytest tests/integration/test_nq_mini_retrieval.py -m "slow or not slow"`.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from odqa.artifacts import sha256_file
from odqa.corpus.io import read_gold, read_passages, read_questions
from odqa.retrieve.bm25 import Bm25Settings
from odqa.retrieve.dense import EncoderSettings
from odqa.retrieve.index import Bm25Retriever, DenseRetriever, HybridRetriever, Index, build_index
from odqa.text import has_answer

pytestmark = pytest.mark.skipif("ODQA_DATA" not in os.environ, reason="ODQA_DATA is not set")
CUTOFFS = (1, 5, 20, 100)
TOLERANCE = 0.5  # points: two questions of nq_dev, four of squad_dev


@pytest.fixture(scope="module")
def data() -> Path:
    return Path(os.environ["ODQA_DATA"]) / "nq-mini"


@pytest.fixture(scope="module")
def bm25_index(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return _build(data, tmp_path_factory.mktemp("bm25") / "index", bm25=Bm25Settings())


@pytest.fixture(scope="module")
def dense_index(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    encoder = EncoderSettings("embedded:all-MiniLM-L6-v2")
    return _build(data, tmp_path_factory.mktemp("dense") / "index", bm25=Bm25Settings(), encoder=encoder)


@pytest.mark.parametrize(
    ("questions", "expected"), [("nq_dev", (60.6, 84.0, 92.0, 97.9)), ("squad_dev", (61.3, 79.9, 86.5, 92.2))]
)
def test_bm25_finds_what_bm25s_finds(bm25_index: Index, data: Path, questions: str, expected: Sequence[float]) -> None:
    found = recalls(Bm25Retriever(bm25_index), data / f"{questions}.jsonl")
    assert found == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("questions", "expected"), [("nq_dev", (80.3, 97.1, 99.5, 99.7)), ("squad_dev", (50.6, 72.9, 85.3, 94.4))]
)
def test_minilm_finds_what_it_should(dense_index: Index, data: Path, questions: str, expected: Sequence[float]) -> None:
    found = recalls(DenseRetriever(dense_index), data / f"{questions}.jsonl")
    assert found == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("questions", "at_least"), [("nq_dev", (80.0, 95.0)), ("squad_dev", (66.0, 84.0))])
def test_the_default_hybrid_is_better_than_either(
    dense_index: Index, data: Path, questions: str, at_least: Sequence[float]
) -> None:
    """One recipe for both sets; its constants come from the tune questions (scripts/tune_fusion.py)."""
    found = recalls(HybridRetriever(dense_index), data / f"{questions}.jsonl")
    assert found[0] >= at_least[0]
    assert found[1] >= at_least[1]


@pytest.mark.slow
def test_our_vectors_are_the_ready_made_ones(dense_index: Index, data: Path) -> None:
    ready = np.load(data / "psgs_minilm_f16.npy", mmap_mode="r", allow_pickle=False)
    files = sorted((dense_index.path / "dense/vectors").iterdir())
    ours = np.concatenate([np.load(file, allow_pickle=False) for file in files]).astype(np.float32)
    cosines = (ours * ready.astype(np.float32)).sum(axis=1)
    assert cosines.min() >= 0.999


def recalls(retriever: Bm25Retriever | DenseRetriever | HybridRetriever, path: Path) -> list[float]:
    """Recall in percent at each cutoff."""
    ranked = retriever.rank([query.text for query in read_questions(path)], max(CUTOFFS))
    store = retriever.index.store
    first = []  # the rank of the first passage with an answer, from 1
    for rows, gold in zip(ranked.rows.tolist(), read_gold(path), strict=True):
        ranks = (rank for rank, row in enumerate(rows, 1) if row >= 0 and has_answer(store[row].text, gold.answers))
        first.append(next(ranks, max(CUTOFFS) + 1))
    return [100 * float(np.mean(np.array(first) <= k)) for k in CUTOFFS]


def _build(data: Path, path: Path, *, bm25: Bm25Settings, encoder: EncoderSettings | None = None) -> Index:
    file = data / "psgs.tsv.gz"
    source = {"name": file.name, "sha256": sha256_file(file)}
    return build_index(path, read_passages(file), source=source, bm25=bm25, encoder=encoder)
