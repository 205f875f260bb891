"""Exact and FAISS search over vectors in parts."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from odqa.artifacts import Draft, sha256_file
from odqa.errors import ArtifactError, DataError
from odqa.retrieve import vectors as module
from odqa.retrieve.vectors import ExactVectors, FaissVectors, VectorParts, VectorSettings, build_vectors, load_vectors

WIDTH = 16


def unit_vectors(count: int, seed: int = 0) -> np.ndarray:
    """float32 (count, WIDTH), of unit length."""
    drawn = np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def save_parts(path: Path, vectors: np.ndarray, rows: int = 37, dtype: str = "float32") -> Path:
    path.mkdir(parents=True)
    for part, start in enumerate(range(0, len(vectors), rows)):
        np.save(path / f"part-{part:05d}.npy", vectors[start : start + rows].astype(dtype), allow_pickle=False)
    return path


def build(
    path: Path, vectors: np.ndarray, settings: VectorSettings, dtype: str = "float32"
) -> ExactVectors | FaissVectors:
    save_parts(path / "vectors", vectors, dtype=dtype)
    build_vectors(path / "vectors", settings, Draft(path))
    return load_vectors(path / "search", path / "vectors")


def brute_force(vectors: np.ndarray, query: np.ndarray, k: int) -> list[int]:
    scores = vectors.astype(np.float64) @ query.astype(np.float64)
    return sorted(range(len(vectors)), key=lambda row: (-scores[row], row))[:k]


@pytest.fixture(params=[None, "Flat", "HNSW16"], ids=["exact", "Flat", "HNSW16"])
def settings(request: pytest.FixtureRequest) -> VectorSettings:
    return VectorSettings(faiss=request.param, search={"efSearch": 400} if request.param == "HNSW16" else {})


@pytest.mark.parametrize("k", [1, 10, 100, 300])
def test_finds_the_largest_inner_products(tmp_path: Path, settings: VectorSettings, k: int) -> None:
    vectors, queries = unit_vectors(300), unit_vectors(20, seed=1)
    found = build(tmp_path, vectors, settings).search(queries, k)
    assert found.rows.tolist() == [brute_force(vectors, query, k) for query in queries]
    expected = np.take_along_axis(queries @ vectors.T, found.rows, axis=1)
    assert found.scores == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kept_bytes", [0, 1 << 28])
@pytest.mark.parametrize("block_bytes", [1, 4096, 1 << 25])
def test_blocks_do_not_change_the_ranking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, kept_bytes: int
) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(module, "_KEPT_BYTES", kept_bytes)
    vectors, queries = unit_vectors(5000), unit_vectors(7, seed=1)
    found = build(tmp_path, vectors, VectorSettings()).search(queries, 50)
    assert found.rows.tolist() == [brute_force(vectors, query, 50) for query in queries]


def test_equal_scores_are_in_row_order_across_blocks_and_at_the_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 1)
    # Whole numbers: every inner product is exact. 6000 rows in blocks of 1600, scores 0 to 3 in turn, 1500 rows each.
    vectors = np.zeros((6000, WIDTH), np.float32)
    vectors[:, 0] = np.arange(6000) % 4
    query = np.eye(1, WIDTH, dtype=np.float32)
    found = build(tmp_path, vectors, VectorSettings()).search(query, 1600)
    assert found.rows[0].tolist() == [*range(3, 6000, 4), *range(2, 400, 4)]


def test_equal_vectors_tie_and_a_query_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    vectors, queries = unit_vectors(100).repeat(3, axis=0), unit_vectors(9, seed=1)
    searcher = build(tmp_path, vectors, VectorSettings())
    together = searcher.search(queries, 30)
    # Each vector stands three times in a row: three neighbours with one score, in row order.
    assert (together.rows.reshape(9, 10, 3) % 3 == [0, 1, 2]).all()
    assert (together.scores.reshape(9, 10, 3) == together.scores.reshape(9, 10, 3)[:, :, :1]).all()
    for number in range(9):
        alone = searcher.search(queries[number : number + 1], 30)
        assert (alone.rows[0] == together.rows[number]).all()
        assert (alone.scores[0] == together.scores[number]).all()


def test_fewer_passages_than_k_give_fewer_hits(tmp_path: Path, settings: VectorSettings) -> None:
    found = build(tmp_path, unit_vectors(3), settings).search(unit_vectors(2, seed=1), 10)
    assert found.rows.shape == (2, 3)
    assert (np.sort(found.rows) == [0, 1, 2]).all()


def test_no_queries_give_no_lists(tmp_path: Path, settings: VectorSettings) -> None:
    assert len(build(tmp_path, unit_vectors(30), settings).search(np.zeros((0, WIDTH), np.float32), 10)) == 0


def test_float16_parts_are_searched_in_float32(tmp_path: Path) -> None:
    vectors, queries = unit_vectors(300), unit_vectors(5, seed=1)
    found = build(tmp_path, vectors, VectorSettings(), dtype="float16").search(queries, 10)
    rounded = vectors.astype(np.float16).astype(np.float32)
    assert found.rows.tolist() == [brute_force(rounded, query, 10) for query in queries]


def test_wrong_queries_are_one_clear_error(tmp_path: Path, settings: VectorSettings) -> None:
    searcher = build(tmp_path, unit_vectors(30), settings)
    with pytest.raises(ValueError, match="k is 0"):
        searcher.search(unit_vectors(1), 0)
    with pytest.raises(DataError, match=r"shape \(2, 5\); this index needs \(queries, 16\)"):
        searcher.search(np.zeros((2, 5), np.float32), 3)
    nan = unit_vectors(2)
    nan[1, 3] = np.nan
    with pytest.raises(DataError, match="query vectors: vector 1 of them holds NaN"):
        searcher.search(nan, 3)


def test_nan_among_the_passages_is_refused_when_building(tmp_path: Path, settings: VectorSettings) -> None:
    vectors = unit_vectors(100)
    vectors[41, 0] = np.inf
    with pytest.raises(DataError, match="holds NaN or infinity"):
        build(tmp_path, vectors, settings)


@pytest.mark.parametrize(
    ("factory", "message"),
    [("IVF4,PQ5", "cannot (make|train) 'IVF4,PQ5'"), ("Flatt", "cannot make 'Flatt' for vectors of width 16")],
)
def test_a_factory_string_that_cannot_work_is_a_data_error(tmp_path: Path, factory: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        build(tmp_path, unit_vectors(300), VectorSettings(faiss=factory))
    assert "\n" not in str(error.value)


def test_too_few_vectors_to_train_on_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot train 'IVF64,Flat' on 10 vectors"):
        build(tmp_path, unit_vectors(10), VectorSettings(faiss="IVF64,Flat"))


def test_search_knobs_are_applied_and_unknown_ones_refused(tmp_path: Path) -> None:
    vectors, queries = unit_vectors(600), unit_vectors(30, seed=1)
    build(tmp_path, vectors, VectorSettings(faiss="IVF16,Flat", search={"nprobe": 1}))
    paths = tmp_path / "search", tmp_path / "vectors"
    exact = [brute_force(vectors, query, 10) for query in queries]
    assert load_vectors(*paths).search(queries, 10).rows.tolist() != exact
    assert load_vectors(*paths, search={"nprobe": 16}).search(queries, 10).rows.tolist() == exact
    with pytest.raises(DataError, match="'efSearch'"):
        load_vectors(*paths, search={"efSearch": 16})


@pytest.mark.parametrize("factory", ["IVF8,PQ4x4", "HNSW8", "OPQ4_8,IVF8,PQ4x4"])
def test_a_faiss_index_is_the_same_bytes_each_time(tmp_path: Path, factory: str) -> None:
    settings = VectorSettings(faiss=factory, train_rows=400)
    digests = set()
    for name in "ab":
        build(tmp_path / name, unit_vectors(600), settings)
        digests.add(sha256_file(tmp_path / name / "search/index.faiss"))
    assert len(digests) == 1


def test_the_training_sample_spans_all_parts_in_row_order(tmp_path: Path) -> None:
    vectors = np.arange(200, dtype=np.float32)[:, None].repeat(WIDTH, axis=1)
    parts = VectorParts(save_parts(tmp_path / "vectors", vectors))
    sample = parts.sample(50)[:, 0]
    assert len(set(sample)) == 50 and (np.diff(sample) > 0).all()
    assert sample[0] < 37 and sample[-1] > 185
    assert (parts.sample(1000) == vectors).all()


def test_a_folder_without_vectors_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no vectors here"):
        VectorParts(tmp_path)
    with pytest.raises(ArtifactError, match="no vector index here"):
        load_vectors(tmp_path, tmp_path)


def test_a_damaged_faiss_index_is_an_artifact_error(tmp_path: Path) -> None:
    build(tmp_path, unit_vectors(30), VectorSettings(faiss="Flat"))
    (tmp_path / "search/index.faiss").write_bytes(b"not an index")
    with pytest.raises(ArtifactError, match="FAISS cannot read it") as error:
        load_vectors(tmp_path / "search", tmp_path / "vectors")
    assert "\n" not in str(error.value)


def test_memory_holds_one_block_of_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    blocks = VectorParts.blocks

    def watched(self: VectorParts, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        for first, block in blocks(self, rows):
            seen.append(len(block))
            yield first, block

    monkeypatch.setattr(module, "_KEPT_BYTES", 6000 * WIDTH * 4 - 1)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 1)
    searcher = build(tmp_path, unit_vectors(6000), VectorSettings())
    monkeypatch.setattr(VectorParts, "blocks", watched)
    searcher.search(unit_vectors(3), 5)
    assert max(seen) <= 1024 and sum(seen) == 6000
