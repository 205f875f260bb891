"""Dumps in parts: the same passages whatever the parts, processes, kills and damage; and bad index files."""

import bz2
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odqa import jobs
from odqa.artifacts import Draft
from odqa.corpus import dump, streams, workers
from odqa.corpus.dump import DumpPassages, DumpSettings
from odqa.corpus.mediawiki import DumpReport, PageOptions, read_articles
from odqa.corpus.split import Cut
from odqa.corpus.store import PassageStore, save_store
from odqa.corpus.streams import Loss, Part, index_beside, parts_of
from odqa.errors import DataError
from odqa.types import Passage
from tests.unit.test_mediawiki import END, HEADER, page, plain_pages

WORDS = Cut(words=20)


def stream_file(path: Path, xmls: Iterable[str]) -> tuple[Path, list[int]]:
    """A bz2 file of one stream for each text, and where each begins."""
    packed = [bz2.compress(xml.encode()) for xml in xmls]
    path.write_bytes(b"".join(packed))
    return path, [sum(map(len, packed[:number])) for number in range(len(packed))]


def multistream(folder: Path, count: int = 12, a_stream: int = 2) -> tuple[Path, list[int]]:
    """A dump of `count` articles as Wikimedia packs it."""
    pages = [plain_pages(a_stream, first) for first in range(1, count + 1, a_stream)]
    return stream_file(folder / "wiki-multistream.xml.bz2", [HEADER, *pages, END])


def write_index(folder: Path, lines: Iterable[str], name: str = "wiki-multistream-index.txt.bz2") -> Path:
    path = folder / name
    path.write_bytes(bz2.compress("".join(f"{line}\n" for line in lines).encode()))
    return path


def one_process_for_all(
    target: str, setup: Any, tasks: Iterable[tuple[Any, Any, bytes]], *, processes: int
) -> Iterator[tuple[Any, Any]]:
    """What `workers.in_order` does, with the same JSON, in this process."""
    assert (target, processes) == ("odqa.corpus.dump:reader", 2)
    call = dump.reader(json.loads(json.dumps(setup)))
    for label, task, payload in tasks:
        yield label, json.loads(json.dumps(call(json.loads(json.dumps(task)), payload)))


def read(path: Path, processes: int, cut: Cut = WORDS) -> tuple[list[Passage], DumpReport]:
    report = DumpReport()
    passages = list(DumpPassages(path, DumpSettings(cut=cut), processes=processes, report=report))
    return passages, report


# ---------------------------------------------------------------- parts


def test_streams_are_found_where_they_begin_with_and_without_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "PART_BYTES", 1)
    path, begins = multistream(tmp_path)
    found = [part.start for part in parts_of(path) if isinstance(part, Part)]
    assert found == begins
    index = write_index(tmp_path, (f"{begin}:{number}:T{number}" for number, begin in enumerate(begins[1:-1], 1)))
    # The index does not list the last stream, which holds the end tag only: it belongs to the part before it.
    assert [part.start for part in parts_of(path, index=index) if isinstance(part, Part)] == begins[:-1]
    assert index_beside(path) == index


def test_ten_fixed_bytes_inside_of_a_stream_begin_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A stream that is not right behind the end of another: bytes that look like one, inside of foreign bytes.
    monkeypatch.setattr(streams, "PART_BYTES", 1)
    packed = bz2.compress((HEADER + plain_pages(2)).encode())
    path = tmp_path / "dump.bz2"
    path.write_bytes(packed + b"foreign" + bz2.compress(plain_pages(2, first=3).encode()) + bz2.compress(END.encode()))
    assert [part.start for part in parts_of(path) if isinstance(part, Part)][1:] == [
        path.stat().st_size - len(bz2.compress(END.encode()))
    ]
    assert [passage.title for passage in read(path, 1)[0]] == ["T1", "T2", "T3", "T4"]


def test_streams_are_found_across_the_blocks_that_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Streams of random text, together more than the megabyte that is read at a time.
    monkeypatch.setattr(streams, "PART_BYTES", 1)
    chance = random.Random(1)
    texts = [page(n, f"T{n}", chance.randbytes(chance.randrange(30_000)).hex()) for n in range(1, 81)]
    path, begins = stream_file(tmp_path / "d.bz2", [HEADER, *texts, END])
    assert path.stat().st_size > 1_200_000
    assert [part.start for part in parts_of(path) if isinstance(part, Part)] == begins


# ---------------------------------------------------------------- the same passages, however they are read


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_parts_and_processes_do_not_change_passages_report_or_losses(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Pages and damage of all kinds, streams that end anywhere, parts of any size: all as in one chunk."""
    folder = tmp_path_factory.mktemp("dump")
    kinds = {
        "article": lambda n: page(n, f"T{n}", f"Text {n} " * 30),
        "redirect": lambda n: page(n, f"T{n}", "x", extra='<redirect title="T1" />'),
        "other": lambda n: page(n, f"Taiss:T{n}", "x", ns="<ns>10</ns>"),
        "unclosed": lambda n: page(n, f"T{n}", "x").replace("</page>", ""),
        "not XML": lambda n: page(n, f"T{n}", "a &bogus; b"),
        "between": lambda n: "some bytes",
        "a stray end": lambda n: "</page>",
    }
    chosen = data.draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=12))
    xml = HEADER + page(1, "T1", "First.") + "".join(kinds[kind](n) for n, kind in enumerate(chosen, 2))
    xml += data.draw(st.sampled_from([END, "", "<page><ti"]))
    whole = folder / "whole.xml"
    whole.write_text(xml)
    expected = read(whole, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "in_order", one_process_for_all)
        patch.setattr(streams, "PLAIN_PART_BYTES", data.draw(st.integers(3, 400)))
        patch.setattr(streams, "PART_BYTES", data.draw(st.integers(1, 400)))
        patch.setattr(streams, "_CHUNK", data.draw(st.sampled_from([5, 64, 2**18])))
        assert read(whole, 2) == read(whole, 1) == expected
        at = sorted(data.draw(st.lists(st.integers(0, len(xml)), max_size=6)))
        texts = [xml[start:end] for start, end in zip([0, *at], [*at, len(xml)], strict=True)]
        packed, _ = stream_file(folder / "packed.xml.bz2", texts)
        assert read(packed, 2) == read(packed, 1) == expected
        # A damaged stream costs what it costs, the same to all.
        broken = bytearray(packed.read_bytes())
        for place in data.draw(st.lists(st.integers(0, len(broken) - 1), min_size=1, max_size=3)):
            broken[place] ^= 0xFF
        packed.write_bytes(broken)
        assert outcome(packed, 2) == outcome(packed, 1)


def outcome(path: Path, processes: int) -> object:
    try:
        return read(path, processes)
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("cut", [Cut(), Cut(sentences=6, stride=3)])
def test_two_real_processes_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: Cut) -> None:
    monkeypatch.setattr(streams, "PART_BYTES", 200)
    path, _ = multistream(tmp_path, count=30)
    passages, report = read(path, 1, cut)
    assert [passage.id for passage in passages] == [str(number) for number in range(1, 31)]
    assert read(path, 2, cut) == (passages, report)


def test_strict_reading_stops_at_the_damage_after_what_came_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "PART_BYTES", 200)
    xmls = [HEADER, *(plain_pages(1, n) for n in range(1, 6)), page(6, "B", "&bogus;"), plain_pages(2, 7), END]
    path, _ = stream_file(tmp_path / "d.xml.bz2", xmls)
    for processes in (1, 2):
        titles = []
        with pytest.raises(DataError, match=r"the page at byte \d+ was left out: not well-formed") as caught:
            for passage in DumpPassages(path, DumpSettings(is_strict=True), processes=processes):
                titles.append(passage.title)
        assert titles == ["T1", "T2", "T3", "T4", "T5"]
        at = int(str(caught.value).split("at byte ")[1].split()[0])
        assert "".join(xmls)[at:].startswith("<page>\n    <title>B<")


def test_a_part_larger_than_the_limit_is_read_page_by_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "in_order", one_process_for_all)
    monkeypatch.setattr(streams, "PART_BYTES", 200)
    path, _ = multistream(tmp_path, count=30, a_stream=10)
    expected = read(path, 1)
    monkeypatch.setattr(dump, "LARGEST_PAGE", 1000)  # a stream of ten pages has more
    assert read(path, 2) == expected


def test_a_page_of_more_than_64_mib_is_left_out_whatever_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "LARGEST_PAGE", 900)
    path = tmp_path / "d.xml"
    path.write_text(HEADER + plain_pages(2) + page(3, "Large", "x" * 900) + plain_pages(2, 4) + END)
    for chunk in (7, 100, 2**18):
        monkeypatch.setattr(streams, "_CHUNK", chunk)
        report = DumpReport()
        assert [article.id for article in read_articles(path, report=report)] == ["1", "2", "4", "5"]
        assert "there is no </page> among them" in (report.lost or "")


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize("is_packed", ["streams", "one stream", "plain"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_reading_goes_on_in_the_middle_and_gives_the_same_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_packed: str, processes: int
) -> None:
    monkeypatch.setattr(workers, "in_order", one_process_for_all)
    monkeypatch.setattr(streams, "PART_BYTES", 300)
    monkeypatch.setattr(streams, "PLAIN_PART_BYTES", 700)
    monkeypatch.setattr(streams, "_CHUNK", 256)
    broken = page(40, "B", "&bogus;")
    xmls = [HEADER, *(plain_pages(2, first) for first in range(1, 31, 2)), broken, plain_pages(4, 50), END]
    if is_packed == "streams":
        path, _ = stream_file(tmp_path / "d.xml.bz2", xmls)
    else:
        whole = "".join(xmls).encode()
        path = tmp_path / "d.xml"
        path.write_bytes(whole if is_packed == "plain" else bz2.compress(whole))
    expected = DumpReport()
    save_store(DumpPassages(path, processes=1, report=expected), Draft(tmp_path / "whole"), part_rows=7)
    for kill_after in (3, 8, 20, 33):
        draft = Draft(tmp_path / f"killed-{kill_after}")
        dying = DumpPassages(path, processes=3 - processes)  # it goes on with another number of processes
        with pytest.raises(KeyboardInterrupt):
            save_store(_Dying(dying, kill_after), draft, part_rows=7)
        report = DumpReport()
        again = DumpPassages(path, processes=processes, report=report)
        save_store(again, draft, part_rows=7)
        assert report == expected
        for file in (tmp_path / "whole/passages").iterdir():
            assert (draft.path / "passages" / file.name).read_bytes() == file.read_bytes()
        assert len(PassageStore.open(draft.path / "passages")) == 34
        if kill_after > 20:
            assert again.earlier_bytes > 2000  # it did not read what three finished parts of the store hold


class _Dying:
    """Passages, and their marks, until a kill."""

    def __init__(self, passages: DumpPassages, count: int) -> None:
        self._passages, self._left = passages, count

    def __iter__(self) -> "_Dying":
        return self

    def __next__(self) -> Passage:
        if self._left == 0:
            raise KeyboardInterrupt
        self._left -= 1
        return next(self._passages)

    def mark(self) -> Any:
        return self._passages.mark()

    def go_to(self, mark: Any, passages: int) -> None:
        self._passages.go_to(mark, passages)


# ---------------------------------------------------------------- progress


class _Bar:
    """What a progress line was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.total = 0
        self.is_closed = False

    def note(self, words: str) -> None:
        self.notes.append(words)

    def advance(self, count: int = 1) -> None:
        self.total += count

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("processes", [1, 2])
def test_the_progress_line_tells_articles_passages_speed_and_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setattr(workers, "in_order", one_process_for_all)
    monkeypatch.setattr(streams, "PART_BYTES", 200)
    path, begins = multistream(tmp_path, count=12)
    bar = _Bar()
    passages = DumpPassages(path, processes=processes, watch=jobs._show(bar))  # type: ignore[arg-type]
    seen = [(passage.id, bar.total) for passage in passages]
    assert seen[-1][1] in begins  # bytes of the file, by whole parts: they give the share done and the time left
    assert bar.total == path.stat().st_size
    assert bar.is_closed
    assert len(bar.notes) > 3
    assert re.fullmatch(r"12 articles, 12 passages, \d+\.\d MB/s of XML", bar.notes[-1])


# ---------------------------------------------------------------- bad index files


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["99999:1:T1"], r"a stream begins at byte 99999, but .* ends at byte \d+: the dump is cut"),
        (["17:1:T1"], r"no bz2 stream begins at byte 17 of .*: the index is another dump's"),
        (["title"], r"1: expected BYTE:PAGE ID:TITLE, found 'title'"),
        (["FIRST:1:T1", "3:2:T2"], r"2: byte 3 comes after byte \d+; offsets go up"),
        ([], "the file is empty"),
    ],
)
def test_an_index_that_is_not_the_dumps_is_refused_in_one_line(tmp_path: Path, lines: list[str], message: str) -> None:
    path, begins = multistream(tmp_path)
    index = write_index(tmp_path, (line.replace("FIRST", str(begins[1])) for line in lines))
    with pytest.raises(DataError, match=message) as caught:
        read(path, 1)
    assert str(caught.value).startswith(str(index))
    assert "\n" not in str(caught.value)
    assert "set passages.index to none" in str(caught.value)
    without = DumpPassages(path, DumpSettings(finds_index=False), processes=1)
    assert len(list(without)) == 12


def test_a_missing_or_truncated_index_is_refused(tmp_path: Path) -> None:
    path, begins = multistream(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        list(parts_of(path, index=tmp_path / "missing.txt"))
    index = write_index(tmp_path, [f"{begins[1]}:1:T1"])
    index.write_bytes(index.read_bytes()[:-8])
    with pytest.raises(DataError, match="cannot be read"):
        list(parts_of(path, index=index))


# ---------------------------------------------------------------- workers


def test_results_come_in_the_order_of_the_tasks() -> None:
    tasks = [(number, {"n": number}, b"x" * number) for number in range(20)]
    results = list(workers.in_order("tests.echo_worker:echo", "setup", iter(tasks), processes=2))
    assert results == [(number, ["setup", {"n": number}, "x" * number]) for number in range(20)]


@pytest.mark.parametrize(("task", "message"), [("bad data", "^one line$"), ("die", "killed by signal 9")])
def test_what_goes_wrong_in_a_worker_is_one_line_here(task: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        list(workers.in_order("tests.echo_worker:echo", 0, [(0, "good", b""), (1, task, b"")], processes=1))
    assert "\n" not in str(caught.value)


def test_losses_say_where_and_after_how_many_pages() -> None:
    assert Loss("at {at}, after {pages}", 5).say(start=10, pages=3) == "at 15, after 3"


def test_page_options_reach_the_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "in_order", one_process_for_all)
    monkeypatch.setattr(streams, "PART_BYTES", 1)
    text = "{{Infobox town|founded=1201}}\n== History ==\nText."
    path, _ = stream_file(tmp_path / "d.bz2", [HEADER, plain_pages(1), page(2, "T2", text), END])
    options = PageOptions(keep_headings=True, keep_infoboxes=True)
    for processes in (1, 2):
        passages = list(DumpPassages(path, DumpSettings(pages=options), processes=processes))
        assert passages[1].text == "Founded: 1201. History. Text."
