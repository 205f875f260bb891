"""Make a multistream dump with its index, as Wikimedia packs them, from the pages of other dumps.

    python scripts/make_multistream.py OUT DUMP... [--megabytes 200] [--pages 100]

The first stream is the header of the first dump, then come streams of PAGES pages each, then one with the end tag. The
pages of the dumps are repeated, with new ids and with the number of the round behind the title, until there are
MEGABYTES of XML; nothing else of them changes. Writes OUT.xml.bz2 and OUT-index.txt.bz2 (byte of the stream, page id,
title), the same bytes each time. Give OUT a name that ends in "-multistream", and `odqa index` finds the index.
"""

import bz2
import itertools
import re
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from odqa.corpus.streams import Cutter, Loss, Piece, parts_of

_TITLE = re.compile(rb"<title>(.*?)</title>", re.DOTALL)
_ID = re.compile(rb"<id>(\d+)</id>")


def main(
    out: Annotated[Path, typer.Argument(help="The dump to be, without .xml.bz2.")],
    dumps: Annotated[list[Path], typer.Argument(help="MediaWiki dumps (.xml or .xml.bz2).", exists=True)],
    megabytes: Annotated[int, typer.Option(min=1, help="Millions of bytes of XML, at least.")] = 200,
    pages: Annotated[int, typer.Option(min=1, help="Pages a stream; Wikimedia has 100.")] = 100,
) -> None:
    """Write OUT.xml.bz2 and OUT-index.txt.bz2."""
    header, *_ = pieces(dumps[0])
    size, count = 0, 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        out.with_name(f"{out.name}.xml.bz2").open("wb") as file,
        bz2.open(out.with_name(f"{out.name}-index.txt.bz2"), "wb") as index,
    ):
        size += write_stream(file, header.source)
        source = repeated(dumps)
        while size < megabytes * 1_000_000:
            block = list(itertools.islice(source, pages))
            count += len(block)
            for page_id, title, _ in block:
                index.write(b"%d:%d:%s\n" % (file.tell(), page_id, unescape(title.decode()).encode()))
            size += write_stream(file, b"".join(b"  " + page + b"\n" for _, _, page in block))
        size += write_stream(file, b"</mediawiki>\n")
        packed = file.tell()
    sys.stderr.write(f"{out}.xml.bz2: {count:,} pages, {size / 1e6:.1f} MB of XML, {packed / 1e6:.1f} MB packed\n")


def write_stream(file: BinaryIO, xml: bytes) -> int:
    """Write one bz2 stream; how many bytes of XML it holds."""
    file.write(bz2.compress(xml))
    return len(xml)


def repeated(dumps: list[Path]) -> Iterator[tuple[int, bytes, bytes]]:
    """Id, title and XML of each page, again and again."""
    page_id = 0
    for number in itertools.count(1):
        for dump in dumps:
            for piece in pieces(dump):
                if not piece.is_header:
                    page_id += 1
                    yield page_id, *renamed(piece.source, page_id, number)


def renamed(page: bytes, page_id: int, number: int) -> tuple[bytes, bytes]:
    """Title and XML of a page with another id; from the second round on, with the round behind its title."""
    found = _TITLE.search(page)
    assert found is not None
    title = found[1] if number == 1 else b"%s (%d)" % (found[1], number)
    page = page[: found.start(1)] + title + page[found.end(1) :]
    return title, _ID.sub(b"<id>%d</id>" % page_id, page, count=1)


def pieces(dump: Path) -> Iterator[Piece]:
    """The header of a dump and its pages."""
    cutter = Cutter()
    for part in parts_of(dump):
        for chunk in [part] if isinstance(part, Loss) else part.chunks(dump):
            if not isinstance(chunk, Loss):
                yield from (piece for piece in cutter.feed(chunk) if isinstance(piece, Piece))


if __name__ == "__main__":
    typer.run(main)
