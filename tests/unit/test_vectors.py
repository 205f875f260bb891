"""Exact and FAISS search over vectors in parts."""

import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from odqa.artifacts import Draft, sha256_file
from odqa.errors import ArtifactError, ArtifactMismatch, DataError
from odqa.retrieve import faiss_build
from odqa.retrieve import vectors as module
from odqa.retrieve.faiss_build import build_memory, check_build
from odqa.retrieve.parts import VectorParts
from odqa.retrieve.vectors import (
    DeviceVectors,
    ExactVectors,
    VectorSearcher,
    VectorSettings,
    build_vectors,
    load_vectors,
)

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


def build(path: Path, vectors: np.ndarray, settings: VectorSettings, dtype: str = "float32") -> VectorSearcher:
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


# --- bounded memory


TYPES = ["IVF8,PQ4x4", "OPQ4_8,IVF8,PQ4x4", "PCA8,IVF8,SQ8", "RR,IVF8,RaBitQ3", "IVF8,Flat", "IVF300,SQ4"]


@pytest.mark.parametrize("factory", TYPES)
def test_an_index_that_is_merged_from_shards_is_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str
) -> None:
    vectors, settings = unit_vectors(700), VectorSettings(faiss=factory, train_rows=400, search={"nprobe": 3})
    whole = build(tmp_path / "whole", vectors, settings)
    save_parts(tmp_path / "little/vectors", vectors)
    needs = build_memory(factory, WIDTH, train_rows=400)
    monkeypatch.setattr(faiss_build, "check_build", lambda *_, **__: None)  # 400 rows are more than so little memory
    # Parts of 37 rows are blocks: three of them in a shard of at most 120 rows, 19 parts make 7 shards.
    memory = int(120 * needs.vector * 2)
    build_vectors(tmp_path / "little/vectors", settings, Draft(tmp_path / "little"), memory=memory)
    shards = sorted(file.name for file in (tmp_path / "little/search/index.faiss.shards").iterdir())
    assert shards[:3] == ["0000000000-0000000111", "0000000111-0000000222", "0000000222-0000000333"]
    assert len(shards) == 7 + 1, "and the trained index"
    digests = {sha256_file(tmp_path / name / "search/index.faiss") for name in ("whole", "little")}
    assert len(digests) == 1
    found = load_vectors(tmp_path / "little/search", tmp_path / "little/vectors").search(unit_vectors(9, seed=1), 20)
    expected = whole.search(unit_vectors(9, seed=1), 20)
    assert (found.rows == expected.rows).all() and (found.scores == expected.scores).all()


def test_a_merge_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_parts(tmp_path / "vectors", unit_vectors(300))
    settings = VectorSettings(faiss="IVF4,SQ8", train_rows=100)
    monkeypatch.setattr(faiss_build, "check_build", lambda *_, **__: None)
    fill, filled = faiss_build._fill, []

    def killed(parts: VectorParts, trained: Path, rows: range, path: Path) -> None:
        if len(filled) == 2:
            raise KeyboardInterrupt
        filled.append(rows)
        fill(parts, trained, rows, path)

    monkeypatch.setattr(faiss_build, "_fill", killed)
    memory = 2 * 80 * 24  # 16 bytes of code and 8 of id, twice: 80 rows a shard
    with pytest.raises(KeyboardInterrupt):
        build_vectors(tmp_path / "vectors", settings, Draft(tmp_path), memory=memory)
    monkeypatch.setattr(
        faiss_build, "_fill", lambda parts, trained, rows, path: filled.append(rows) or fill(parts, trained, rows, path)
    )
    build_vectors(tmp_path / "vectors", settings, Draft(tmp_path), memory=memory)
    assert filled == [range(74), range(74, 148), range(148, 222), range(222, 300)]
    build_vectors(tmp_path / "vectors", settings, Draft(tmp_path / "whole"))
    assert sha256_file(tmp_path / "search/index.faiss") == sha256_file(tmp_path / "whole/search/index.faiss")


@pytest.mark.parametrize("factory", ["HNSW32", "HNSW32,SQ8", "Flat", "PQ4", "IVF8,PQ4x4fs"])
def test_a_type_that_is_built_in_one_piece_says_what_it_needs_before_it_starts(tmp_path: Path, factory: str) -> None:
    save_parts(tmp_path / "vectors", unit_vectors(600))
    with pytest.raises(DataError, match=r"is built in one piece: 600 vectors of width 16 need up to 0\.\d MB") as error:
        build_vectors(tmp_path / "vectors", VectorSettings(faiss=factory, train_rows=1), Draft(tmp_path), memory=4000)
    assert "\n" not in str(error.value) and "memory_budget: 1 GB" in str(error.value)
    assert not (tmp_path / "search").exists(), "nothing was started"


def test_hnsw_over_wikipedia_needs_what_it_is_told_to(tmp_path: Path) -> None:
    # 768 float32 values, 64 links of 4 bytes: 21,015,324 x (3072 + 256 + some) = 70 GB, twice while it grows.
    with pytest.raises(DataError, match=r"'HNSW32' .* 21,015,324 vectors of width 768 need up to 14\d\.\d GB"):
        check_build("HNSW32", 768, rows=21_015_324, train_rows=1000, memory=3_000_000_000)
    check_build("IVF16384,PQ192", 768, rows=21_015_324, train_rows=655_360, memory=3_000_000_000)
    check_build("IVF65536,PQ96", 384, rows=10**12, train_rows=1_500_000, memory=3_000_000_000)


def test_a_training_sample_that_does_not_fit_says_which_does() -> None:
    with pytest.raises(
        DataError, match=r"training 'OPQ64,IVF64,PQ64' on 1,000,000 vectors .* Set train_rows: 424\d\d\d "
    ) as error:
        check_build("OPQ64,IVF64,PQ64", 768, rows=10**8, train_rows=1_000_000, memory=3_000_000_000)
    fits = int(str(error.value).split("train_rows: ")[1].split()[0])
    check_build("OPQ64,IVF64,PQ64", 768, rows=10**8, train_rows=fits, memory=3_000_000_000)


def test_a_sample_of_many_rows_does_not_list_them_all(tmp_path: Path) -> None:
    path = tmp_path / "vectors"
    path.mkdir()
    np.lib.format.open_memmap(path / "part-00000.npy", "w+", np.float16, (40_000_000, 1))  # a hole of 80 MB
    parts = VectorParts(path)
    tracemalloc.start()
    assert parts.sample(1000).shape == (1000, 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000, "an array of the rows would be 320 MB"


def test_many_parts_keep_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit_vectors(300)
    parts = VectorParts(save_parts(tmp_path / "vectors", vectors, rows=1))
    monkeypatch.setattr(parts._mapped, "limit", 5)
    rows = np.random.default_rng(0).permutation(300)
    assert (parts.rows(rows) == vectors[rows]).all()
    assert len(parts._mapped) == 5
    with pytest.raises(IndexError, match="300 vectors"):
        parts.rows(np.array([0, 300]))


# --- refinement


@pytest.mark.parametrize("refine", ["vectors", "int8"])
def test_refinement_brings_back_the_exact_ranking(tmp_path: Path, refine: str) -> None:
    vectors, queries = unit_vectors(600), unit_vectors(40, seed=1)
    exact = build(tmp_path / "exact", vectors, VectorSettings()).search(queries, 10)
    rough = build(tmp_path / "rough", vectors, VectorSettings(faiss="PQ4x4", train_rows=600)).search(queries, 10)
    settings = VectorSettings(faiss="PQ4x4", train_rows=600, refine=refine, refine_factor=60)  # type: ignore[arg-type]
    fine = build(tmp_path / "fine", vectors, settings).search(queries, 10)
    assert _overlap(rough.rows, exact.rows) < 0.7
    if refine == "vectors":  # all 600 are candidates
        assert (fine.rows == exact.rows).all() and (fine.scores == exact.scores).all()
    else:
        assert _overlap(fine.rows, exact.rows) > 0.97
        assert fine.scores == pytest.approx(
            exact.scores, abs=0.01
        )  # 16 roundings of at most 1/254 of the largest value


def _overlap(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.mean([len({*one} & {*other}) / len(other) for one, other in zip(found, exact, strict=True)]))


def test_a_refined_search_bounds_its_hits_by_k_and_the_collection(tmp_path: Path) -> None:
    settings = VectorSettings(faiss="Flat", refine="int8")
    searcher = build(tmp_path, unit_vectors(5), settings)
    assert searcher.search(unit_vectors(3, seed=1), 2).rows.shape == (3, 2)
    found = searcher.search(unit_vectors(3, seed=1), 50)
    assert found.rows.shape == (3, 5) and (np.sort(found.rows) == range(5)).all()
    with pytest.raises(ValueError, match="k is 0"):
        searcher.search(unit_vectors(1), 0)


def test_a_vector_of_zeros_has_a_code(tmp_path: Path) -> None:
    vectors = np.vstack([np.zeros((1, WIDTH), np.float32), unit_vectors(3)])
    found = build(tmp_path, vectors, VectorSettings(faiss="Flat", refine="int8")).search(unit_vectors(1, seed=1), 4)
    assert found.scores[0][found.rows[0] == 0] == 0 and np.isfinite(found.scores).all()


def test_refinement_with_other_vectors_than_the_indexs_is_refused(tmp_path: Path) -> None:
    build(tmp_path, unit_vectors(100), VectorSettings(faiss="Flat", refine="vectors"))
    (tmp_path / "vectors/part-00002.npy").unlink()
    with pytest.raises(ArtifactError, match=r"74 vectors of width 16; the index was made with 100 of width 16"):
        load_vectors(tmp_path / "search", tmp_path / "vectors")


def test_refinement_of_the_exact_search_is_refused() -> None:
    with pytest.raises(DataError, match="nothing to refine"):
        VectorSettings(refine="int8")
    with pytest.raises(DataError, match="refine_factor is 0"):
        VectorSettings(faiss="Flat", refine="int8", refine_factor=0)


# --- other devices


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30], ids=["sent", "kept"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_torchs_exact_search_has_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, keep_bytes: int
) -> None:
    monkeypatch.setattr(module, "_DEVICE_BYTES", 1)  # blocks of 1024 rows
    vectors = np.vstack([unit_vectors(900), unit_vectors(300)])  # rows 900 to 1199 tie with rows 0 to 299
    exact = build(tmp_path, vectors, VectorSettings(), dtype=dtype)
    assert isinstance(exact, ExactVectors)
    other = DeviceVectors(exact.parts, "cpu", keep_bytes=keep_bytes)
    for queries, k in ((unit_vectors(9, seed=1), 50), (unit_vectors(1, seed=2), 1300), (unit_vectors(0), 5)):
        found, expected = other.search(queries, k), exact.search(queries, k)
        assert (found.rows == expected.rows).all() and (found.scores == expected.scores).all()


def test_a_device_that_is_not_here_is_a_data_error(tmp_path: Path) -> None:
    build(tmp_path, unit_vectors(30), VectorSettings())
    with pytest.raises(DataError, match="is not here"):
        load_vectors(tmp_path / "search", tmp_path / "vectors", device="cuda:7")


def test_faiss_without_a_gpu_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss
    import torch

    monkeypatch.setattr(module, "choose_device", lambda _: torch.device("cuda", 0))
    monkeypatch.delattr(faiss, "StandardGpuResources", raising=False)
    build(tmp_path, unit_vectors(30), VectorSettings(faiss="Flat"))
    with pytest.raises(DataError, match=r"on the processor only\. Install faiss-gpu in the place of faiss-cpu"):
        load_vectors(tmp_path / "search", tmp_path / "vectors", device="cuda")


# --- an index and vectors that do not belong together


@pytest.mark.parametrize("factory", [None, "Flat", "IVF4,SQ8"])
def test_another_number_of_vectors_than_of_passages_is_refused(tmp_path: Path, factory: str | None) -> None:
    build(tmp_path, unit_vectors(50), VectorSettings(faiss=factory))
    paths = tmp_path / "search", tmp_path / "vectors"
    assert load_vectors(*paths, passages=50).search(unit_vectors(1), 1).rows.shape == (1, 1)
    with pytest.raises(ArtifactMismatch, match="50 vectors for 51 passages"):
        load_vectors(*paths, passages=51)


def test_a_faiss_index_of_another_collection_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "a", unit_vectors(50), VectorSettings(faiss="Flat"))
    build(tmp_path / "b", unit_vectors(49), VectorSettings(faiss="Flat"))
    shutil.copy(tmp_path / "b/search/index.faiss", tmp_path / "a/search/index.faiss")
    with pytest.raises(ArtifactError, match="49 vectors instead of 50"):
        load_vectors(tmp_path / "a/search", tmp_path / "a/vectors")


def test_parts_that_are_no_arrays_or_of_other_widths_are_refused(tmp_path: Path) -> None:
    save_parts(tmp_path / "vectors", unit_vectors(50))
    np.save(tmp_path / "vectors/part-00009.npy", np.zeros((3, 5), np.float32))
    with pytest.raises(ArtifactError, match="parts of different shapes"):
        VectorParts(tmp_path / "vectors")
    (tmp_path / "vectors/part-00009.npy").write_bytes(b"no array")
    with pytest.raises(ArtifactError, match="not an npy file"):
        VectorParts(tmp_path / "vectors")
