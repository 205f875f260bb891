"""The text store: random access by row and by id, parts, duplicates, resuming."""

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
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


# --- bounded memory


class Alive:
    """Counts the passages that are drawn from a source and still held."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def draw(self, texts: list[str]) -> Iterator[Passage]:
        for number, text in enumerate(texts):
            passage = Counted(f"p{number}", text, "")
            weakref.finalize(passage, self.leave)
            self.now += 1
            self.most = max(self.most, self.now)
            yield passage
            del passage

    def leave(self) -> None:
        self.now -= 1


class Counted(Passage):
    """A passage that can be watched."""

    __slots__ = ("__weakref__",)


def test_a_part_ends_where_its_text_would_take_too_much_memory(tmp_path: Path) -> None:
    # 12 bytes a character and 400 a passage: passages of 300 characters and an id of 2 cost 4024 bytes, so 2 in 10,000.
    alive = Alive()
    save_store(alive.draw(["x" * 300] * 9), Draft(tmp_path), memory=10_000)
    store = PassageStore.open(tmp_path / "passages")
    assert store.part_rows == (2, 2, 2, 2, 1)
    assert alive.most <= 4, "two of a part, the one that did not fit, and the one that the source still holds"


def test_a_million_characters_are_a_part_of_their_own(tmp_path: Path) -> None:
    texts = ["a", "b" * 1_000_000, "c" * 1_000_000, "", "d"]
    save_store((Passage(f"p{number}", text) for number, text in enumerate(texts)), Draft(tmp_path), memory=1_000_000)
    store = PassageStore.open(tmp_path / "passages")
    assert store.part_rows == (1, 1, 1, 2)
    assert [passage.text for passage in store] == texts
    assert store.row_of("p2") == 2


def test_memory_does_not_change_what_is_stored(tmp_path: Path) -> None:
    source = passages([f"id-{number}" for number in range(500)])
    save_store(source, Draft(tmp_path / "much"))
    save_store(source, Draft(tmp_path / "little"), memory=6_000)  # 93 ids are sorted at once
    little, much = PassageStore.open(tmp_path / "little/passages"), PassageStore.open(tmp_path / "much/passages")
    assert len(little.part_rows) > 20 and len(much.part_rows) == 1
    assert list(little) == list(much) == source
    for file in ("ids.hash.npy", "ids.row.npy"):
        assert sha256_file(little.path / file) == sha256_file(much.path / file)
    assert [little.row_of(passage.id) for passage in source] == list(range(500))
    assert not [*(tmp_path / "little").glob(".*")], "working files are gone"


def test_ids_that_are_sorted_in_shares_may_not_stand_twice_either(tmp_path: Path) -> None:
    source = passages([*(f"id-{number}" for number in range(200)), "id-7"])
    with pytest.raises(DataError, match=r"'id-7' stands twice in the collection: passages 8 and 201"):
        save_store(source, Draft(tmp_path), memory=6_000)


def test_a_build_goes_on_with_another_memory(tmp_path: Path) -> None:
    def killed() -> Iterator[Passage]:
        yield from NAMED[:7]
        raise KeyboardInterrupt

    draft = Draft(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        save_store(killed(), draft, memory=2_000)
    save_store(NAMED, draft)
    store = PassageStore.open(tmp_path / "passages")
    assert list(store) == NAMED
    assert store.part_rows[0] < store.part_rows[-1], "finished parts stay as they are"


def test_the_id_files_are_what_numpy_writes(tmp_path: Path) -> None:
    store = save(tmp_path, NAMED)
    for file in ("ids.hash.npy", "ids.row.npy"):
        np.save(tmp_path / file, np.load(store.path / file), allow_pickle=False)
        assert sha256_file(tmp_path / file) == sha256_file(store.path / file)


@pytest.mark.parametrize("part_rows", [1, 3, 100])
@pytest.mark.parametrize(("rows", "size"), [(1, 10**9), (4, 10**9), (100, 1), (100, 60), (3, 70)])
def test_ranges_hold_at_most_so_many_passages_and_so_much_text(
    tmp_path: Path, part_rows: int, rows: int, size: int
) -> None:
    store = save(tmp_path, NAMED, part_rows)
    found = list(store.ranges(rows=rows, size=size))
    lengths = [len((passage.title + passage.text).encode()) for passage in NAMED]
    assert [row for each in found for row in each] == list(range(10))
    for each, following in zip(found, [*found[1:], None], strict=True):
        taken = sum(lengths[row] for row in each)
        assert len(each) == 1 or (len(each) <= rows and taken <= size)
        if following is not None:
            assert len(each) == rows or taken + lengths[following.start] > size, "not smaller than it need be"


def test_a_store_of_many_parts_opens_few_files_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = save(tmp_path, NAMED, 1)
    monkeypatch.setattr(store._tables, "limit", 3)
    assert [store[row] for row in (9, 0, 5, 1, 2, 3, 9)] == [NAMED[row] for row in (9, 0, 5, 1, 2, 3, 9)]
    assert len(store._tables) == 3


class Marked:
    """A source that can go on in the middle, and notes where it was sent."""

    def __init__(self, passages: list[Passage], dies_at: int | None = None) -> None:
        self._passages, self._next, self._dies_at = passages, 0, dies_at
        self.sent_to: list[int] = []

    def __iter__(self) -> Iterator[Passage]:
        return self

    def __next__(self) -> Passage:
        if self._next == self._dies_at:
            raise KeyboardInterrupt
        if self._next == len(self._passages):
            raise StopIteration
        self._next += 1
        return self._passages[self._next - 1]

    def mark(self) -> dict[str, int]:
        return {"next": self._next}

    def go_to(self, mark: Mapping[str, Any] | None, passages: int) -> None:
        assert mark is not None and mark["next"] == passages, "a mark behind its parts would lose a passage"
        self._next = mark["next"]
        self.sent_to.append(passages)


@pytest.mark.parametrize("memory", [2_000, 10**9])
@pytest.mark.parametrize("killed_at", [3, 7, 9])
def test_a_source_that_can_be_sent_on_loses_no_passage_where_memory_ends_a_part(
    tmp_path: Path, memory: int, killed_at: int
) -> None:
    draft = Draft(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        save_store(Marked(NAMED, killed_at), draft, part_rows=3, memory=memory)
    again = Marked(NAMED)
    save_store(again, draft, part_rows=3, memory=memory)
    assert list(PassageStore.open(tmp_path / "passages")) == NAMED
    assert bool(again.sent_to) is (memory == 10**9), "by memory each part ends with a passage in hand: no mark"
