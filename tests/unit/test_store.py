"""The text store: random access by row and by id, parts, duplicates, resuming."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from odqa.artifacts import Draft, sha256_file
from odqa.corpus.store import PassageStore, save_store
from odqa.errors import ArtifactError, DataError
from odqa.types import Passage


def passages(ids: list[str]) -> list[Passage]:
    return [Passage(passage_id, f"text of {passage_id}\nÆøß 漢字", f"title {passage_id}") for passage_id in ids]


DENSE = passages([str(number) for number in range(1, 11)])
NAMED = passages(["b", "a", "wiki:12", "é", "1", "01", "zz", "漢", "x y", "q"])


def save(tmp_path: Path, source: list[Passage], part_rows: int = 3) -> PassageStore:
    save_store(source, Draft(tmp_path), part_rows=part_rows)
    return PassageStore.open(tmp_path / "passages")


@pytest.mark.parametrize("source", [DENSE, NAMED], ids=["dense ids", "named ids"])
@pytest.mark.parametrize("part_rows", [1, 3, 10, 100])
def test_gives_back_what_was_stored_by_row_and_by_id(tmp_path: Path, source: list[Passage], part_rows: int) -> None:
    store = save(tmp_path, source, part_rows)
    assert len(store) == 10
    assert [store[row] for row in range(10)] == source
    assert list(store) == source
    assert [store.row_of(passage.id) for passage in source] == list(range(10))
    assert store.rows([7, 0, 7]) == [source[7], source[0], source[7]]


@pytest.mark.parametrize("bounds", [(0, 10), (2, 4), (3, 6), (5, 5), (8, 99)])
def test_slice_crosses_parts(tmp_path: Path, bounds: tuple[int, int]) -> None:
    store = save(tmp_path, NAMED)
    assert store.slice(*bounds) == NAMED[slice(*bounds)]


@pytest.mark.parametrize("source", [DENSE, NAMED], ids=["dense ids", "named ids"])
@pytest.mark.parametrize("unknown", ["0", "11", "007", "", "nobody", "٣", "9" * 5000])
def test_an_unknown_id_is_a_data_error_that_names_it(tmp_path: Path, source: list[Passage], unknown: str) -> None:
    store = save(tmp_path, source)
    assert unknown not in store
    with pytest.raises(DataError, match="no passage with the id"):
        store.row_of(unknown)


@pytest.mark.parametrize("row", [-1, 10])
def test_a_row_outside_is_an_index_error(tmp_path: Path, row: int) -> None:
    with pytest.raises(IndexError):
        save(tmp_path, DENSE)[row]


def test_dense_ids_need_no_id_files(tmp_path: Path) -> None:
    save(tmp_path, DENSE)
    assert sorted(file.name for file in (tmp_path / "passages").glob("*.npy")) == []


@pytest.mark.parametrize("part_rows", [2, 100])
def test_an_id_that_stands_twice_is_named_with_both_places(tmp_path: Path, part_rows: int) -> None:
    with pytest.raises(DataError, match=r"'a' stands twice in the collection: passages 2 and 5"):
        save(tmp_path, passages(["b", "a", "c", "d", "a"]), part_rows)


def test_different_ids_with_one_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("odqa.corpus.store._hash", lambda passage_id: len(passage_id))
    store = save(tmp_path, NAMED)
    assert [store.row_of(passage.id) for passage in NAMED] == list(range(10))
    assert "c" not in store


def test_no_passages_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no passages"):
        save(tmp_path, [])


def test_half_a_surrogate_pair_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="surrogate"):
        save(tmp_path, [Passage("1", "\ud800")])


@pytest.mark.parametrize("killed_at", [0, 2, 3, 5, 8, 9])
def test_after_a_kill_the_files_are_the_same(tmp_path: Path, killed_at: int) -> None:
    def killed() -> Iterator[Passage]:
        yield from NAMED[:killed_at]
        raise KeyboardInterrupt

    draft = Draft(tmp_path / "resumed")
    with pytest.raises(KeyboardInterrupt):
        save_store(killed(), draft, part_rows=3)
    finished = {file.name: file.stat().st_mtime_ns for file in draft.path.rglob("part-*")}
    save_store(NAMED, draft, part_rows=3)
    save(tmp_path / "whole", NAMED)
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "whole")
    assert len(finished) == killed_at // 3
    assert all((draft.path / "passages" / name).stat().st_mtime_ns == time for name, time in finished.items())


def test_a_finished_store_is_not_read_again(tmp_path: Path) -> None:
    save(tmp_path, DENSE)
    save_store(iter([]), Draft(tmp_path))
    assert len(PassageStore.open(tmp_path / "passages")) == 10


def test_a_folder_that_is_no_store_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a passage store"):
        PassageStore.open(tmp_path)


def hashes(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): sha256_file(file) for file in folder.rglob("*") if file.is_file()}
