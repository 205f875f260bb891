"""The plain scorer of scripts/benchmarks/bm25.py, which says why BM25s differ, ranks as those that it stands for."""

from pathlib import Path

import pytest

from odqa.artifacts import Draft
from odqa.corpus.store import PassageStore, save_store
from odqa.retrieve.bm25 import Bm25Settings, build_bm25, load_bm25
from tests.unit.test_bm25 import random_passages

QUERIES = ["w1 w2 w3", "w5 w9", "w150", "t3 w1", "w2 w77 t1 t2 t3"]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PassageStore:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    save_store(random_passages(300), Draft(tmp_path))
    return PassageStore.open(tmp_path / "passages")


@pytest.mark.parametrize("engine", ["bm25s", "rank-bm25"])
def test_a_plain_scorer_ranks_as_the_engine(tmp_path: Path, store: PassageStore, engine: str) -> None:
    if engine == "rank-bm25":
        pytest.importorskip("rank_bm25", reason="the peer needs the extra reference")
    from benchmarks.bm25 import Counts, _lucene_idf, okapi_idf, plain_top

    settings = Bm25Settings(engine=engine)  # type: ignore[arg-type]
    build_bm25(store, settings, Draft(tmp_path))
    queries = [settings.analyzer.terms(text) for text in QUERIES]
    counts = Counts.of(store, settings, {term for query in queries for term in query})
    idf = (okapi_idf if engine == "rank-bm25" else _lucene_idf)(counts.frequencies, len(store))
    expected = load_bm25(tmp_path / "bm25", store).search(QUERIES, 10).rows
    for query, rows in zip(queries, expected, strict=True):
        found = plain_top(query, counts.postings, idf, counts.lengths, counts.lengths.mean(), settings)
        assert found.tolist() == [row for row in rows.tolist() if row >= 0]


@pytest.mark.parametrize(
    ("length", "kept"),
    # Up to 39 exact; then 24 and the first four bits of the rest: 76 = 0b1001100 -> 72, 41 - 24 = 0b10001 -> 16.
    [(0, 0), (23, 23), (39, 39), (40, 40), (41, 40), (100, 96)],
)
def test_a_length_in_one_byte(store: PassageStore, length: int, kept: int) -> None:
    from benchmarks.bm25 import byte_length

    assert byte_length(length) == kept
