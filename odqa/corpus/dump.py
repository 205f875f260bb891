"""From a dump to numbered passages, by one process or by several, and again from where a killed build stood.

Other processes unpack, parse, clean and cut parts of the dump (`odqa.corpus.streams`). This one hands the parts out,
puts the pages together that lie across two parts, counts, and numbers the passages. What comes out, order and ids, is
the same whatever the number of processes. Memory holds two parts a process, and no part of more than 64 MiB of XML: a
larger one is read here, page by page.

A mark says where the reading stood at the beginning of a part, with all that came before in a few counts. Resuming
reads that part again and drops the passages that are known; only a bz2 file of one stream is unpacked from its start.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from odqa.corpus.mediawiki import DumpReport, Found, PageOptions, Reading, Site, find_page
from odqa.corpus.split import Cut
from odqa.corpus.streams import LARGEST_PAGE, Loss, Part, cut_part, index_beside, parts_of
from odqa.corpus.wikitext import Namespaces
from odqa.types import Passage


@dataclass(frozen=True, slots=True)
class DumpSettings:
    """How a dump becomes passages. `index`: where streams begin (None: the file beside the dump, if there is one)."""

    pages: PageOptions = field(default_factory=PageOptions)
    cut: Cut = field(default_factory=Cut)
    is_strict: bool = False
    index: Path | None = None
    #: Look for an index beside the dump.
    finds_index: bool = True


class DumpPassages:
    """An iterator over the passages of a dump; ids count from 1.

    `processes`: how many read, None for one a core; a dump of one part needs no second. `watch` is called after each
    part. Raises DataError while iterating, as `odqa.corpus.mediawiki.read_articles` does.
    """

    def __init__(
        self,
        path: Path,
        settings: DumpSettings | None = None,
        *,
        processes: int | None = None,
        report: DumpReport | None = None,
        watch: "Callable[[DumpPassages], object] | None" = None,
    ) -> None:
        self.path = path
        self.settings = settings or DumpSettings()
        self.report = report or DumpReport()
        self.processes = processes or _cores()
        self.watch = watch
        #: Passages given out so far, those of an earlier try with them.
        self.passages = 0
        #: Bytes of the file that were read to the end of a part, and bytes of XML that an earlier try read.
        self.position = 0
        self.earlier_bytes = 0
        self._mark: dict[str, Any] | None = None
        self._resumed: Mapping[str, Any] | None = None
        self._source: Iterator[Passage] | None = None

    def __iter__(self) -> Iterator[Passage]:
        return self

    def __next__(self) -> Passage:
        if self._source is None:
            self._source = self._passages()
        return next(self._source)

    def mark(self) -> dict[str, Any] | None:
        """Where to go on for all passages that were not given out yet; None: from the start."""
        return self._mark

    def go_to(self, mark: Mapping[str, Any] | None, passages: int) -> None:
        """Go on with the passage after the first `passages`, by a mark that was taken there."""
        assert self._source is None
        self._resumed = mark
        self._source = self._passages()
        while self.passages < passages and next(self._source, None) is not None:
            pass

    def _passages(self) -> Iterator[Passage]:
        settings = self.settings
        reading = Reading(self.path, self.report, options=settings.pages, is_strict=settings.is_strict)
        parts = self._parts(0, 0)
        if self._resumed is not None:
            while reading.site is None:
                for _ in reading.read(next(parts)):
                    pass
            reading.go_to(self._resumed["reading"])
            self.earlier_bytes = self.report.bytes_read
            self.passages = self._resumed["passages"]
            parts = self._parts(self._resumed["start"], self._resumed["skip"])
        # 1. The first parts here, until the header is known, which says what the others need.
        for part in parts:
            yield from self._read_here(reading, part)
            if reading.site is not None and self.processes > 1:
                break
        # 2. The others in other processes, if there are any.
        yield from self._read_elsewhere(reading, parts)
        yield from self._number(reading.finish())

    def _parts(self, start: int, skip: int) -> Iterator[Part | Loss]:
        index = self.settings.index
        if index is None and self.settings.finds_index:
            index = index_beside(self.path)
        return parts_of(self.path, index=index, start=start, skip=skip)

    def _read_here(self, reading: Reading, part: Part | Loss) -> Iterator[Passage]:
        self._set_mark(reading, part)
        yield from self._number(reading.read(part))
        self._pass(part)

    def _read_elsewhere(self, reading: Reading, parts: Iterator[Part | Loss]) -> Iterator[Passage]:
        first = next(parts, None)
        if first is None:
            return
        from odqa.corpus import workers

        assert reading.site is not None
        setup = {
            "path": str(self.path),
            "silent": sorted(reading.site.links.silent),
            "known": sorted(reading.site.links.known),
            "numbers": reading.site.numbers,
            "pages": asdict(self.settings.pages),
            "cut": asdict(self.settings.cut),
        }
        read = workers.in_order("odqa.corpus.dump:reader", setup, _tasks(first, parts), processes=self.processes)
        for part, result in read:
            if result is None:
                yield from self._read_here(reading, part)
                continue
            self._set_mark(reading, part)
            head, tail = (result[name].encode("latin-1") for name in ("head", "tail"))
            losses, found = ([_from_json(row) for row in result[name]] for name in ("losses", "found"))
            yield from self._number(reading.join(head, losses, found, tail, result["size"]))
            self._pass(part)

    def _number(self, pages: Iterator[Found]) -> Iterator[Passage]:
        for page in pages:
            if page.fate == "article":
                for text in page.passages or self.settings.cut(page.text):
                    self.passages += 1
                    yield Passage(str(self.passages), text, page.title)

    def _set_mark(self, reading: Reading, part: Part | Loss) -> None:
        if isinstance(part, Part) and reading.site is not None:
            place = {"start": 0, "skip": part.skipped} if part.xml is not None else {"start": part.start, "skip": 0}
            self._mark = {"reading": reading.mark(), "passages": self.passages, **place}

    def _pass(self, part: Part | Loss) -> None:
        if isinstance(part, Part):
            self.position = part.end
        if self.watch is not None:
            self.watch(self)


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tasks(first: Part | Loss, parts: Iterator[Part | Loss]) -> Iterator[tuple[Part | Loss, Any, bytes]]:
    """What the workers get: a place in the file, or XML; nothing for a loss, which has its place among the parts."""
    part: Part | Loss | None = first
    while part is not None:
        if isinstance(part, Loss):
            yield part, None, b""
        else:
            yield part, [part.start, part.end, part.is_packed, part.xml is not None], part.xml or b""
        part = next(parts, None)


# ---------------------------------------------------------------- in the other processes


def reader(setup: Mapping[str, Any]) -> Callable[[Any, bytes], Any]:
    """What a worker calls for each part, see `odqa.corpus.workers`."""
    path, cut, options = Path(setup["path"]), Cut(**setup["cut"]), PageOptions(**setup["pages"])
    site = Site(Namespaces(frozenset(setup["silent"]), frozenset(setup["known"])), setup["numbers"])

    def read(task: Any, xml: bytes) -> Any:
        """The part as JSON; None for one that is too large to be held, or no part."""
        if task is None:
            return None
        start, end, is_packed, is_unpacked = task
        part = Part(start, end, is_packed, xml if is_unpacked else None)
        limited = _Limited(part.chunks(path))
        apart = cut_part(iter(limited))
        found = [
            _to_json(piece if isinstance(piece, Loss) else find_page(piece, site, options), cut)
            for piece in apart.pieces
        ]
        if limited.is_over:
            return None
        return {
            "head": apart.head.decode("latin-1"),
            "losses": [_to_json(loss, cut) for loss in apart.losses],
            "found": found,
            "tail": apart.tail.decode("latin-1"),
            "size": apart.size,
        }

    return read


class _Limited:
    """Chunks up to 64 MiB."""

    def __init__(self, chunks: Iterator[bytes | Loss]) -> None:
        self._chunks = chunks
        self.is_over = False

    def __iter__(self) -> Iterator[bytes | Loss]:
        size = 0
        for item in self._chunks:
            size += 0 if isinstance(item, Loss) else len(item)
            if size > LARGEST_PAGE:
                self.is_over = True
                return
            yield item


def _to_json(found: Found | Loss, cut: Cut) -> list[Any]:
    if isinstance(found, Loss):
        return [found.words, found.offset]
    passages = cut(found.text) if found.fate == "article" else []
    text = found.text if found.fate == "redirect" else ""
    return [found.namespace, found.fate, found.id, found.title, text, passages]


def _from_json(row: list[Any]) -> Any:
    """A Found, or a Loss (the shorter rows)."""
    if len(row) == 2:
        return Loss(*row)
    namespace, fate, page_id, title, text, passages = row
    return Found(namespace, fate, page_id, title, text, tuple(passages))
