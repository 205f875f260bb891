"""The bytes of a MediaWiki dump: unpacked, cut into pages, and cut into parts that several processes can read.

A part is a range of the file that can be unpacked by itself: some bz2 streams of a multistream dump, or some megabytes
of plain XML. A page may begin in one part and end in a later one. Where the streams begin is said by the dump's index
(`*-multistream-index.txt.bz2`) or found by reading: a stream begins with ten fixed bytes, right behind the 48 fixed
bits that end the stream before it. A bz2 file of one stream has no parts; it is unpacked by one process.

What this module does not know: XML beyond three tags, and what a page says.

The invariant: what is cut out depends on the bytes alone. Neither the size of chunks nor the parts change it.

Formats: https://meta.wikimedia.org/wiki/Data_dumps/Dump_format (multistream); bzip2 1.0.
"""

import bz2
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from odqa.errors import DataError

EXPECTED = "Expected a MediaWiki XML dump (*-pages-articles.xml or .xml.bz2)"
PART_BYTES = 2**19  # packed, of a part; our choice: about a quarter of a second of work
PLAIN_PART_BYTES = 2**22  # of plain XML: about the same work
LARGEST_PAGE = 64 * 2**20  # bytes; chosen: MediaWiki refuses texts over 2 MiB, so more is damage or a full history
_CHUNK = 2**18  # bytes read, or unpacked, at a time


@dataclass(frozen=True, slots=True)
class Loss:
    """What damage cost, in words; `{at}` stands for the byte `offset` of the XML, `{pages}` for the pages so far."""

    words: str
    offset: int = 0

    def say(self, *, start: int = 0, pages: int = 0) -> str:
        """The sentence, for XML whose byte 0 is the byte `start` of the dump's XML."""
        return self.words.replace("{at}", str(start + self.offset)).replace("{pages}", str(pages))


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes `start` to `end` of the file. `xml`: what they unpack to is known, from byte `skipped` of the XML on."""

    start: int
    end: int
    is_packed: bool
    xml: bytes | None = None
    skipped: int = 0

    def chunks(self, path: Path) -> Iterator[bytes | Loss]:
        """The XML of this part in chunks, and what was lost, in order."""
        if self.xml is not None:
            yield self.xml
            return
        with open_dump(path) as file:
            span = _Span(file, self.start, self.end)
            yield from _unpack(span) if self.is_packed else iter(lambda: span.read(_CHUNK), b"")


# ---------------------------------------------------------------- parts


def parts_of(path: Path, *, index: Path | None = None, start: int = 0, skip: int = 0) -> Iterator[Part | Loss]:
    """The parts of a dump from byte `start` of the file on, which must be where a part begins.

    `index` is the file that says where streams begin; without one they are looked for. Of a file of one stream, parts
    are unpacked here, from byte `skip` of the XML on (which `start` says nothing about), with losses between them.
    Raises DataError for a missing file, and for an index that is not this dump's.
    """
    with open_dump(path) as file:
        size = path.stat().st_size
        is_packed = file.peek(3)[:3] == b"BZh"
        if not is_packed:
            for at in range(start, size, PLAIN_PART_BYTES):
                yield Part(at, min(at + PLAIN_PART_BYTES, size), is_packed=False)
            return
        if index is None and next(_find_streams(file, 0, _ONE_STREAM), None) is None:
            yield from _unpacked_parts(file, size, skip)
            return
        streams = _find_streams(file, start) if index is None else _indexed_streams(index, file, path, start)
        for stream in streams:
            if stream - start >= PART_BYTES:
                yield Part(start, stream, is_packed=True)
                start = stream
        if start < size:
            yield Part(start, size, is_packed=True)


def index_beside(path: Path) -> Path | None:
    """The index file that lies beside a multistream dump under the name that Wikimedia gives it; None if none does."""
    if "-multistream" not in path.name:
        return None
    before, _, after = path.name.rpartition("-multistream")
    found = path.with_name(f"{before}-multistream-index{after.replace('.xml', '.txt', 1)}")
    return found if found.is_file() else None


def open_dump(path: Path) -> BufferedReader:
    """Open a dump to read bytes. Raises DataError for a missing file or a folder."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. {EXPECTED}.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). {EXPECTED}.") from None


_ONE_STREAM = 2**26  # bytes; chosen: a file whose first stream is longer counts as one stream


def _unpacked_parts(file: BufferedReader, size: int, skip: int) -> Iterator[Part | Loss]:
    """Unpack a file of one stream, and hand out its XML by the megabyte, from byte `skip` on."""
    waiting, at, start = bytearray(), 0, 0
    for item in _unpack(_Span(file, 0, size)):
        if isinstance(item, Loss):
            if at > skip or skip == 0:  # those before were met when the XML before was read
                if waiting:
                    yield Part(start, file.tell(), is_packed=True, xml=bytes(waiting), skipped=at - len(waiting))
                    waiting.clear()
                yield item
            continue
        waiting += item[max(0, skip - at) :]
        at += len(item)
        if len(waiting) >= PLAIN_PART_BYTES:
            yield Part(start, file.tell(), is_packed=True, xml=bytes(waiting), skipped=at - len(waiting))
            waiting.clear()
            start = file.tell()
    if waiting:
        yield Part(start, size, is_packed=True, xml=bytes(waiting), skipped=at - len(waiting))


# ---------------------------------------------------------------- where streams begin

_STREAM_START = re.compile(rb"BZh[1-9]1AY&SY")
_STREAM_END = 0x177245385090  # 48 bits, then 32 of a checksum, then zeros up to a whole byte
_END_BYTES = 11  # in which the end of a stream lies: 80 bits and up to 7


def _find_streams(file: BufferedReader, start: int, within: int | None = None) -> Iterator[int]:
    """Where streams begin behind byte `start`, each right behind the end of another (of those up to byte `within`)."""
    position, window = start, b""  # the place of the window in the file, the bytes looked at
    while within is None or position < within:
        file.seek(position + len(window))
        more = file.read(2**20)
        window += more
        for found in _STREAM_START.finditer(window):
            at = found.start()
            if at >= _END_BYTES and _ends_stream(window[at - _END_BYTES : at]):
                yield position + at
        if not more:
            return
        kept = min(len(window), _END_BYTES + 9)  # the start of a stream has ten bytes; nine of them may be here
        position += len(window) - kept
        window = window[len(window) - kept :]


def _ends_stream(before: bytes) -> bool:
    bits = int.from_bytes(before, "big")
    return any(
        (bits >> (32 + padding)) & 0xFFFFFFFFFFFF == _STREAM_END and bits & ((1 << padding) - 1) == 0
        for padding in range(8)
    )


_INDEX_LINE = re.compile(rb"(\d+):(\d+):.+")
_REMEDY = (
    "Take the index of the same dump and date; without one (move it away, or set passages.index to none) streams are"
    " looked for."
)


def _indexed_streams(index: Path, file: BufferedReader, path: Path, start: int) -> Iterator[int]:
    """Where streams begin behind byte `start`, by the index. Raises DataError where the dump has no stream there."""
    size, last = path.stat().st_size, 0
    for number, line in _index_lines(index):
        found = _INDEX_LINE.fullmatch(line.rstrip(b"\r\n"))
        if found is None:
            shown = line[:40].decode("utf-8", "replace").strip()
            raise DataError(f"{index}:{number}: expected BYTE:PAGE ID:TITLE, found {shown!r}. {_REMEDY}")
        stream = int(found[1])
        if stream == last:
            continue
        if stream < last:
            raise DataError(f"{index}:{number}: byte {stream} comes after byte {last}; offsets go up. {_REMEDY}")
        last = stream
        if stream <= start:
            continue
        if stream >= size:
            raise DataError(
                f"{index}:{number}: a stream begins at byte {stream}, but {path} ends at byte {size}: the dump is cut,"
                f" or the index is another dump's. {_REMEDY}"
            )
        file.seek(stream - _END_BYTES if stream >= _END_BYTES else 0)
        before = file.read(min(stream, _END_BYTES))
        if not _STREAM_START.match(file.read(10)):
            raise DataError(
                f"{index}:{number}: no bz2 stream begins at byte {stream} of {path}: the index is another dump's."
                f" {_REMEDY}"
            )
        if _ends_stream(before):  # not so behind a damaged stream, which then shares its part with the next
            yield stream
    if last == 0:
        raise DataError(f"{index}: the file is empty. {_REMEDY}")


def _index_lines(index: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with index.open("rb") as raw:
            is_packed = raw.peek(3)[:3] == b"BZh"
            with bz2.open(raw, "rb") if is_packed else raw as lines:
                yield from enumerate(lines, 1)
    except FileNotFoundError:
        raise DataError(f"{index}: no such file. {_REMEDY}") from None
    except (OSError, EOFError) as error:
        raise DataError(f"{index}: cannot be read ({error}). {_REMEDY}") from None


# ---------------------------------------------------------------- XML, cut into pages


@dataclass(frozen=True, slots=True)
class Piece:
    """The header (all before the first page) or one page of the dump, with the byte of the XML at which it starts."""

    source: bytes
    offset: int
    is_header: bool


OPEN, CLOSE, END = b"<page>", b"</page>", b"</mediawiki>"
_SNIFFED = 4096  # bytes; enough to tell what a file without pages is


class Cutter:
    """Cuts XML that comes in chunks into the header and the pages. Text cannot imitate the tags: it has "&lt;".

    `waiting` are the bytes that belong to no piece yet, `offset` is the place of the first of them in the XML.
    """

    def __init__(self, *, offset: int = 0, waiting: bytes = b"", in_header: bool = True) -> None:
        self.offset = offset
        self.in_header = in_header
        self._buffer = bytearray(waiting)
        self._searched = 0

    @property
    def waiting(self) -> bytes:
        return bytes(self._buffer)

    @property
    def end(self) -> int:
        """The byte of the XML up to which it was fed."""
        return self.offset + len(self._buffer)

    def move_to(self, offset: int) -> None:
        """Go on at a later byte: what lies between was cut by another one, and ends with a page."""
        assert not self._buffer
        self.offset, self._searched = offset, 0

    def feed(self, chunk: bytes) -> Iterator[Piece | Loss]:
        """Take a chunk in, give the pieces out that end in it."""
        self._buffer += chunk
        if self.in_header:
            first = self._buffer.find(OPEN, self._searched)
            if first < 0 and len(self._buffer) < LARGEST_PAGE:
                self._searched = max(0, len(self._buffer) - len(OPEN))
                return
            yield self._cut_header(first if first >= 0 else _SNIFFED)
        yield from self._cut_pages()

    def finish(self) -> Iterator[Piece | Loss]:
        """Say what the end of the dump leaves: the header of one without pages, and a loss if there is no end tag."""
        if self.in_header:
            end = self._buffer.rfind(END)
            yield self._cut_header(end if end >= 0 else len(self._buffer))
        if END not in self._buffer:
            inside = " and in the middle of one" if OPEN in self._buffer else ""
            yield Loss(
                f"the dump ends at byte {{at}}, after {{pages}} pages{inside}, without </mediawiki>: what followed is"
                " lost",
                self.end,
            )

    def _cut_header(self, length: int) -> Piece:
        header = Piece(bytes(self._buffer[:length]), 0, is_header=True)
        self._drop(length)
        self.in_header = False
        return header

    def _cut_pages(self) -> Iterator[Piece | Loss]:
        # What stands between `start` of the buffer and the last <page> before a </page> belongs to no page.
        buffer, start = self._buffer, 0
        while (end := buffer.find(CLOSE, self._searched)) >= 0:
            page = buffer.rfind(OPEN, start, end)
            yield from _gap(bytes(buffer[start : page if page >= 0 else end]), self.offset + start)
            self._searched = end + len(CLOSE)
            if page >= 0:
                if self._searched - page > LARGEST_PAGE:
                    yield _too_large(self._searched - page, self.offset + page)
                else:
                    yield Piece(bytes(buffer[page : self._searched]), self.offset + page, is_header=False)
            start = self._searched
        self._drop(start)
        if len(buffer) > LARGEST_PAGE:
            # A page may still begin at the last <page>, if there is one after the first byte.
            last = buffer.rfind(OPEN)
            left_out = last if last > 0 else len(buffer) - len(CLOSE)
            yield _too_large(left_out, self.offset)
            self._drop(left_out)
        self._searched = max(0, len(buffer) - len(CLOSE))

    def _drop(self, length: int) -> None:
        del self._buffer[:length]
        self.offset += length
        self._searched = 0


def _too_large(length: int, offset: int) -> Loss:
    return Loss(f"{length} bytes from byte {{at}} on were left out: there is no </page> among them in 64 MiB", offset)


def _gap(between: bytes, offset: int) -> Iterator[Loss]:
    if OPEN in between:
        yield Loss("the page at byte {at} was left out: it has no </page>", offset + between.find(OPEN))
    elif between.strip():
        yield Loss(f"{len(between)} bytes at byte {{at}} were left out: they belong to no page", offset)


@dataclass(slots=True)
class PartCut:
    """A part, cut apart from the others: `head` ends with the first </page>, `tail` follows the last one.

    `losses` were met in the head. Pages between are pieces whose offsets count from the beginning of the part.
    """

    head: bytes
    losses: list[Loss]
    pieces: Iterable[Piece | Loss]
    tail: bytes = b""
    size: int = 0


def cut_part(chunks: Iterator[bytes | Loss]) -> PartCut:
    """Cut a part whose neighbours are not known. `tail` and `size` are there once `pieces` were drawn to their end."""
    head, losses, rest = bytearray(), [], b""
    for item in chunks:
        if isinstance(item, Loss):
            losses.append(item)
            continue
        searched = max(0, len(head) - len(CLOSE))
        head += item
        if (end := head.find(CLOSE, searched)) >= 0:
            rest = bytes(head[end + len(CLOSE) :])
            del head[end + len(CLOSE) :]
            break
    cut = PartCut(bytes(head), losses, (), size=len(head))
    if head.endswith(CLOSE):
        cut.pieces = _cut_rest(cut, rest, chunks)
    return cut


def _cut_rest(cut: PartCut, rest: bytes, chunks: Iterator[bytes | Loss]) -> Iterator[Piece | Loss]:
    cutter = Cutter(offset=len(cut.head), in_header=False)
    yield from cutter.feed(rest)
    for item in chunks:
        if isinstance(item, Loss):
            yield item
        else:
            yield from cutter.feed(item)
    cut.tail, cut.size = cutter.waiting, cutter.end


# ---------------------------------------------------------------- bytes


class _Span:
    """The bytes `start` to `end` of a file, read from the first to the last."""

    def __init__(self, file: BufferedReader, start: int, end: int) -> None:
        self._file = file
        self.position, self.end = start, end
        self.is_end_of_file = end == file.seek(0, 2)
        file.seek(start)

    def read(self, count: int) -> bytes:
        chunk = self._file.read(min(count, self.end - self.position))
        self.position += len(chunk)
        return chunk


_LARGEST_BLOCK = 900_000  # bytes of a bz2 block, before packing


def _unpack(span: _Span) -> Iterator[bytes | Loss]:
    """Unpack bz2 of one or many streams; after damage, go on at the next stream."""
    unpacker, held = bz2.BZ2Decompressor(), _Holdback()
    packed = pending = span.read(_CHUNK)  # the packed bytes this unpacker got last, and those it has yet to get
    is_stream_start = True  # whether the stream starts with `packed`
    while packed:
        try:
            chunk = unpacker.decompress(pending, _CHUNK)
        except OSError:
            yield _damaged(span.position - len(packed), held)
            packed = pending = _find_stream(span, packed[4 if is_stream_start else 0 :])
            unpacker, held, is_stream_start = bz2.BZ2Decompressor(), _Holdback(), True
            continue
        pending = b""
        if chunk:  # an empty one would read as the end
            yield from held.swap(chunk)
        if unpacker.eof:
            yield from held.release()
            packed = unpacker.unused_data or span.read(_CHUNK)
            if not packed.startswith(b"BZh"[: len(packed)]):
                packed = _find_stream(span, packed)  # bytes behind a stream are no part of it; bzip2 ignores them too
            unpacker, pending, is_stream_start = bz2.BZ2Decompressor(), packed, True
        elif unpacker.needs_input:
            before = span.position - len(packed)
            packed = pending = span.read(_CHUNK)
            is_stream_start = False
            if packed:
                continue
            if span.is_end_of_file:
                yield Loss(f"the bz2 data ends at byte {span.position} of the file in the middle of a stream")
                yield from held.release()
            else:  # damage made it swallow its own end
                yield _damaged(before, held)


def _damaged(position: int, held: "_Holdback") -> Loss:
    unsure = f", with {held.size} bytes of text before it that cannot be checked" if held.size else ""
    return Loss(f"bz2 data after byte {position} of the file is damaged and was left out{unsure}")


class _Holdback:
    """The last unpacked bytes of a stream, a block's worth, not to be handed out yet.

    The checksum of a block follows its bytes, so only what a whole block follows is checked. A damaged block may well
    unpack to text that looks sound.
    """

    def __init__(self) -> None:
        self.size = 0
        self._chunks: deque[bytes] = deque()

    def swap(self, chunk: bytes) -> Iterator[bytes]:
        """Take a chunk in, give those out that are checked by now."""
        self._chunks.append(chunk)
        self.size += len(chunk)
        while self.size - len(self._chunks[0]) >= _LARGEST_BLOCK:
            self.size -= len(self._chunks[0])
            yield self._chunks.popleft()

    def release(self) -> Iterator[bytes]:
        """Give all out: the stream has ended, with its own checksum."""
        self.size = 0
        while self._chunks:
            yield self._chunks.popleft()


def _find_stream(span: _Span, packed: bytes) -> bytes:
    """Return the packed bytes from the next bz2 stream on, as far as they are read; b"" if none follows."""
    while True:
        if start := _STREAM_START.search(packed):
            return packed[start.start() :]
        more = span.read(_CHUNK)
        if not more:
            return b""
        packed = packed[-9:] + more
