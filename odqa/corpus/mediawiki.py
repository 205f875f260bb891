"""A MediaWiki XML dump, plain or .bz2, read as a stream of articles with clean text.

The dump is cut at `<page>` and `</page>` and every page is parsed as a document of its own. Three things follow.
Memory holds one page, whatever the size of the dump. Damage costs the page it hits: the next `<page>` starts afresh.
And no DTD ever reaches the XML parser, so that entity bombs and external entities have no way in.

What this module does not know: wikitext beyond redirects and disambiguation pages (see `odqa.corpus.wikitext`),
passages, and older revisions (of a page with several, the last one counts).

Format: https://www.mediawiki.org/wiki/Help:Export, versions 0.3 to 0.11.
"""

import bz2
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from xml.etree import ElementTree

from odqa.corpus.wikitext import ENGLISH, Namespaces, clean
from odqa.errors import DataError


@dataclass(frozen=True, slots=True)
class Article:
    """One article: the page id of the dump, its title, and its clean text (one paragraph or list item a line)."""

    id: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Redirect:
    """Another name of an article; `target` is a title, perhaps of a page that the dump lacks."""

    alias: str
    target: str


@dataclass(slots=True)
class DumpReport:
    """What `read_articles` met so far. Every page of the main namespace is counted under exactly one of
    `articles`, `aliases`, `disambiguations` and `empty`.
    """

    pages: int = 0
    #: Pages handed out.
    articles: int = 0
    #: Redirect pages of all namespaces, and those of the main one.
    redirects: int = 0
    aliases: int = 0
    disambiguations: int = 0
    #: Pages of the main namespace of which no text remains, or that are no wikitext.
    empty: int = 0
    #: Pages (redirects with them) by namespace number; the main one is 0.
    namespaces: Counter[int] = field(default_factory=Counter)
    #: Bytes of XML, after decompression.
    bytes_read: int = 0
    #: One sentence on each thing that was lost to damage; None for a sound dump.
    lost: str | None = None

    @property
    def main_pages(self) -> int:
        """All pages of the main namespace, redirects and disambiguation pages among them."""
        return self.namespaces[0]

    @property
    def other_namespaces(self) -> dict[int, int]:
        """The pages outside the main namespace, which are never articles."""
        return {number: count for number, count in sorted(self.namespaces.items()) if number != 0}


def read_articles(
    path: str | Path,
    *,
    skip_disambiguation: bool = True,
    strict: bool = False,
    report: DumpReport | None = None,
    on_redirect: Callable[[Redirect], object] | None = None,
    keep_headings: bool = False,
) -> Iterator[Article]:
    """Yield the articles of a dump in its order: main namespace, no redirects, no empty ones.

    `report` is filled while reading. `on_redirect` receives each alias of the main namespace; nothing is kept here,
    since a full English dump has ten million of them (`aliases.append`, or a file's writer, will do).

    A damaged or truncated dump gives what can be read, and `report.lost` says what could not; with `strict` it raises
    DataError at that point. Raises DataError, at the first step of the iteration, if `path` is missing, empty, no dump,
    or a dump of which no page can be read.
    """
    path = Path(path)
    report = DumpReport() if report is None else report
    damage = _Damage(path, report, is_strict=strict)
    site = _Site()
    for piece in _cut(_read(path, damage), damage):
        if piece.is_header:
            site = _parse_siteinfo(piece, damage)
            continue
        page = _parse_page(piece, site, damage)
        if page is None:
            continue
        report.pages += 1
        report.namespaces[page.namespace] += 1
        if page.redirect is not None:
            report.redirects += 1
            if page.namespace == 0:
                report.aliases += 1
                if on_redirect is not None:
                    on_redirect(Redirect(alias=page.title, target=page.redirect))
        elif page.namespace == 0:
            if skip_disambiguation and is_disambiguation(page.title, page.wikitext):
                report.disambiguations += 1
            elif text := clean(page.wikitext, namespaces=site.links, keep_headings=keep_headings):
                report.articles += 1
                yield Article(id=page.id, title=page.title, text=text)
            else:
                report.empty += 1
    if report.pages == 0:
        raise DataError(f"{path}: no page could be read from this MediaWiki dump. {damage.summary('It holds none.')}")


# ---------------------------------------------------------------- disambiguation pages

# The template of a disambiguation page in some thirty Wikipedias (en, de, fr, es, it, pt, nl, pl, ru, uk, cs, sv, no,
# fi, hu, tr, ja, zh, ko, ar, fa, he, ro, eo, eu, lv, ltg, ...). Names with "disambig" in them need no place here.
_DISAMBIGUATION_TEMPLATES = frozenset(
    name.strip()
    for name in """
    dab, hndis, geodis, numberdis, roaddis, schooldis, mathdab, hospitaldis, airport dab, wp disambig
    begriffsklärung, homonymie, paronymie, desambiguación, desambiguacion, desambiguació, desambiguação, desambigua
    dp, dpintro, doorverwijspagina, ujednoznacznienie, неоднозначность, неоднозначність, вишезначна, значения
    rozcestník, förgrening, grensida, pekerside, flertydig, täsmennyssivu, täsmennys, egyért, anlam ayrımı, aimai
    曖昧さ回避, 消歧义, 消歧義, 동음이의, توضيح, ابهام‌زدایی, פירושונים, dezambiguizare, argipen, apartigilo
    razločitev, razdvojba, nuorodinis, nozīmju atdalīšana, zeimeibu škiršona
    """.replace("\n", ",").split(",")
    if name.strip()
)
_TEMPLATE_NAME = re.compile(r"\{\{\s*([^{}|\n<>]+)")
_DISAMBIGUATION_TITLE = re.compile(
    r"\((?:disambiguation|begriffsklärung|homonymie|desambiguaci[oó]n?|desambiguação|disambigua|doorverwijspagina|значения"
    r"|значення|ujednoznacznienie|rozcestník|olika betydelser|andre betydninger|täsmennyssivu|egyértelműsítő lap"
    r"|anlam ayrımı|曖昧さ回避|消歧义|消歧義|동음이의|توضيح|ابهام‌زدایی|dezambiguizare|zeimeibu škiršona)\)\Z",
    re.IGNORECASE,
)


def is_disambiguation(title: str, wikitext: str) -> bool:
    """Tell whether a page only lists the meanings of its title: by the magic word, its template, or its title's suffix.

    The magic word is the same in every language; templates and suffixes are those of some thirty Wikipedias.
    """
    if "__DISAMBIG__" in wikitext or _DISAMBIGUATION_TITLE.search(title):
        return True
    names = {name.strip().lower().replace("_", " ") for name in _TEMPLATE_NAME.findall(wikitext)}
    if not names.isdisjoint(_DISAMBIGUATION_TEMPLATES):
        return True
    # {{disambiguation needed}} marks a link inside an ordinary article.
    return any("disambig" in name and "needed" not in name and "link" not in name for name in names)


# ---------------------------------------------------------------- damage


class _Damage:
    """Collects what was lost: the first few losses in words, the others as a number. Strict reading raises instead."""

    _IN_WORDS = 3  # chosen: enough to see the pattern, short enough for one line

    def __init__(self, path: Path, report: DumpReport, *, is_strict: bool) -> None:
        self.path = path
        self.report = report
        self._is_strict = is_strict
        self._losses: list[str] = []
        self._count = 0

    def add(self, loss: str) -> None:
        if self._is_strict:
            raise DataError(f"{self.path}: {loss}. Without strict reading, what is sound would be kept.")
        self._count += 1
        if self._count <= self._IN_WORDS:
            self._losses.append(loss)
        self.report.lost = self.summary()

    def summary(self, nothing: str = "") -> str:
        """Say all losses in one sentence; `nothing` if there is none."""
        if not self._losses:
            return nothing
        more = f"; and {self._count - self._IN_WORDS} more losses" if self._count > self._IN_WORDS else ""
        sentence = "; ".join(self._losses) + more
        return f"{sentence[0].upper()}{sentence[1:]}."


# ---------------------------------------------------------------- pages


@dataclass(frozen=True, slots=True)
class _Piece:
    """The header (all before the first page) or one page of the dump, with the byte of the XML at which it starts."""

    source: bytes
    offset: int
    is_header: bool


@dataclass(frozen=True, slots=True)
class _Site:
    """What the dump says about its wiki: which links are silent, and the number of each namespace by its name."""

    links: Namespaces = ENGLISH
    numbers: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Page:
    id: str
    title: str
    namespace: int
    redirect: str | None
    wikitext: str


_SITEINFO = re.compile(rb"<siteinfo>.*?</siteinfo>", re.DOTALL)
_SILENT_NAMESPACES = (-2, 6, 14)  # Media, File, Category


def _parse_siteinfo(header: _Piece, damage: _Damage) -> _Site:
    siteinfo = _SITEINFO.search(header.source)
    if siteinfo is None:
        return _Site()  # a hand-made dump: MediaWiki accepts it too
    try:
        element = ElementTree.fromstring(siteinfo[0])
    except ElementTree.ParseError as error:
        damage.add(f"the <siteinfo> of the dump is not well-formed XML ({error}), so English namespace names were used")
        return _Site()
    names = {(each.text or "").strip().lower(): int(each.get("key", "0")) for each in element.iter("namespace")}
    silent = [name for name, number in names.items() if number in _SILENT_NAMESPACES]
    return _Site(Namespaces.of(silent=silent, known=names), names)


_REDIRECT = re.compile(r"\s*#[^\s\[:]+\s*:?\s*\[\[\s*:?([^\[\]|#]+)")  # "#REDIRECT [[Target]]", in any language


def _parse_page(piece: _Piece, site: _Site, damage: _Damage) -> _Page | None:
    """Parse one `<page>`; None (and a loss) if it is damaged."""
    try:
        element = ElementTree.fromstring(piece.source)
    except ElementTree.ParseError as error:
        damage.add(f"the page at byte {piece.offset} was left out: not well-formed XML ({error})")
        return None
    title, page_id = element.findtext("title"), element.findtext("id")
    if not title or not page_id:
        damage.add(f"the page at byte {piece.offset} was left out: it has no <title> or no <id>")
        return None
    # 1. The namespace: dumps before format 0.6 tell it by the prefix of the title only.
    number = element.findtext("ns", "").strip()
    namespace = int(number) if number.lstrip("-").isdigit() else site.numbers.get(title.partition(":")[0].lower(), 0)
    # 2. The text of the last revision, if it is wikitext (and not a script or a data page).
    revision = element.findall("revision")[-1:]
    is_wikitext = bool(revision) and revision[0].findtext("model", "wikitext") == "wikitext"
    wikitext = revision[0].findtext("text") or "" if is_wikitext else ""
    return _Page(page_id.strip(), title, namespace, _redirect_target(element, wikitext), wikitext)


def _redirect_target(page: ElementTree.Element, wikitext: str) -> str | None:
    """Return the title a page redirects to, None if it is no redirect.

    Dumps before format 0.6 tell the target in the text only, and those before 0.4 the redirect itself as well.
    """
    mark = page.find("redirect")
    if mark is not None and (title := mark.get("title")):
        return title
    if mark is None and not wikitext[:64].lstrip().upper().startswith("#REDIRECT"):
        return None
    in_text = _REDIRECT.match(wikitext)
    return in_text[1].strip() if in_text else None if mark is None else ""


# ---------------------------------------------------------------- the stream, cut into pages

_LARGEST_PAGE = 64 * 2**20  # bytes; chosen: MediaWiki refuses texts over 2 MiB, so more is damage or a full history
_OPEN, _CLOSE, _END = b"<page>", b"</page>", b"</mediawiki>"


def _cut(chunks: Iterator[bytes], damage: _Damage) -> Iterator[_Piece]:
    """Cut the XML into its header and its pages. Text cannot imitate the tags: it has "&lt;" for every "<"."""
    # 1. The header: all before the first page.
    buffer = bytearray()
    while len(buffer) < _SNIFFED and (chunk := next(chunks, b"")):
        buffer += chunk
    _check_is_dump(bytes(buffer[:_SNIFFED]), damage)
    while (first := buffer.find(_OPEN)) < 0 and len(buffer) < _LARGEST_PAGE and (chunk := next(chunks, b"")):
        buffer += chunk
    if first < 0:
        first = max(0, buffer.rfind(_END))  # a dump without pages
    yield _Piece(bytes(buffer[:first]), 0, is_header=True)
    # 2. The pages. What stands between `start` of the buffer and the last <page> before a </page> belongs to no page.
    start, searched, offset = first, first, 0  # `offset` is the buffer's place in the XML, the others count within it
    while True:
        while (end := buffer.find(_CLOSE, searched)) >= 0:
            page = buffer.rfind(_OPEN, start, end)
            _note_gap(bytes(buffer[start : page if page >= 0 else end]), offset + start, damage)
            searched = end + len(_CLOSE)
            if page >= 0:
                yield _Piece(bytes(buffer[page:searched]), offset + page, is_header=False)
            start = searched
        del buffer[:start]
        offset += start
        start, searched = 0, max(0, len(buffer) - len(_CLOSE))
        if len(buffer) > _LARGEST_PAGE:
            damage.add(f"{len(buffer)} bytes from byte {offset} on were left out: there is no </page> among them")
            start = searched
        if not (chunk := next(chunks, b"")):
            break
        buffer += chunk
    # 3. The end.
    if _END not in buffer:
        where = f"byte {offset + len(buffer)}, after {damage.report.pages} pages"
        inside = " and in the middle of one" if _OPEN in buffer else ""
        damage.add(f"the dump ends at {where}{inside}, without </mediawiki>: what followed is lost")


def _note_gap(between: bytes, offset: int, damage: _Damage) -> None:
    if _OPEN in between:
        damage.add(f"the page at byte {offset + between.find(_OPEN)} was left out: it has no </page>")
    elif between.strip():
        damage.add(f"{len(between)} bytes at byte {offset} were left out: they belong to no page")


# ---------------------------------------------------------------- what the file is

_SNIFFED = 4096  # bytes of the XML that are looked at to tell what it is
_EXPECTED = "Expected a MediaWiki XML dump (*-pages-articles.xml or .xml.bz2)"
_ROOT = re.compile(rb"<([A-Za-z][\w:.-]*)")
_PROLOG = re.compile(rb"<\?.*?\?>|<!--.*?-->", re.DOTALL)
_OTHER_PACKERS = {
    b"\x1f\x8b": "gzip",
    b"7z\xbc\xaf": "7-Zip",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"\xfd7zXZ": "xz",
    b"PK": "zip",
}


def _check_is_dump(head: bytes, damage: _Damage) -> None:
    """Raise DataError, saying what the file is instead, unless its XML begins as a dump does."""
    start = _PROLOG.sub(b"", head.removeprefix(b"\xef\xbb\xbf")).lstrip()
    if not head:
        raise DataError(f"{damage.path}: {damage.summary('the file is empty.')} {_EXPECTED}.")
    root = _ROOT.search(start)
    lower = start[:64].lower()
    if lower.startswith((b"<!doctype html", b"<html")):
        found = "an HTML page"
    elif lower.startswith(b"<!doctype"):
        found = "XML with a DTD, which dumps never have (and which is not read, for safety)"
    elif lower.startswith((b"{", b"[")):
        found = "JSON"
    elif lower.startswith(b"<") and root is not None:
        if root[1] == b"mediawiki":
            return
        found = f"XML whose root is <{root[1].decode('ascii', 'replace')}> instead of <mediawiki>"
    else:
        packer = next((name for magic, name in _OTHER_PACKERS.items() if head.startswith(magic)), None)
        found = f"{packer} data; unpack it or pack it as .bz2" if packer else f"no XML (it begins with {head[:16]!r})"
    raise DataError(f"{damage.path}: not a MediaWiki dump but {found}. {_EXPECTED}.")


# ---------------------------------------------------------------- bytes

_CHUNK = 2**18  # bytes read, or unpacked, at a time


def _read(path: Path, damage: _Damage) -> Iterator[bytes]:
    """Yield the bytes of the XML, unpacking bz2 by its first bytes rather than by the file's name."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. {_EXPECTED}.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). {_EXPECTED}.") from None
    with file:
        is_packed = file.peek(3)[:3] == b"BZh"
        for chunk in _unpack(file, damage) if is_packed else iter(lambda: file.read(_CHUNK), b""):
            damage.report.bytes_read += len(chunk)
            yield chunk


_STREAM_START = re.compile(rb"BZh[1-9]1AY&SY")
_LARGEST_BLOCK = 900_000  # bytes of a bz2 block, before packing


def _unpack(file: BufferedReader, damage: _Damage) -> Iterator[bytes]:
    """Unpack bz2 of one or many streams; after damage, go on at the next stream."""
    unpacker, held = bz2.BZ2Decompressor(), _Holdback()
    packed = pending = file.read(_CHUNK)  # the packed bytes this unpacker got last, and those it has yet to get
    is_stream_start = True  # whether the stream starts with `packed`
    while packed:
        try:
            chunk = unpacker.decompress(pending, _CHUNK)
        except OSError:
            position = file.tell() - len(packed)
            unsure = f", with {held.size} bytes of text before it that cannot be checked" if held.size else ""
            damage.add(f"bz2 data after byte {position} of the file is damaged and was left out{unsure}")
            packed = pending = _find_stream(file, packed[4 if is_stream_start else 0 :])
            unpacker, held, is_stream_start = bz2.BZ2Decompressor(), _Holdback(), True
            continue
        pending = b""
        if chunk:  # an empty one would read as the end
            yield from held.swap(chunk)
        if unpacker.eof:
            yield from held.release()
            packed = unpacker.unused_data or file.read(_CHUNK)
            if not packed.startswith(b"BZh"[: len(packed)]):
                packed = _find_stream(file, packed)  # bytes behind a stream are no part of it; bzip2 ignores them too
            unpacker, pending, is_stream_start = bz2.BZ2Decompressor(), packed, True
        elif unpacker.needs_input:
            packed = pending = file.read(_CHUNK)
            is_stream_start = False
            if not packed:
                damage.add(f"the bz2 data ends at byte {file.tell()} of the file in the middle of a stream")
                yield from held.release()


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


def _find_stream(file: BufferedReader, packed: bytes) -> bytes:
    """Return the packed bytes from the next bz2 stream on, as far as they are read; b"" if none follows."""
    while True:
        if start := _STREAM_START.search(packed):
            return packed[start.start() :]
        more = file.read(_CHUNK)
        if not more:
            return b""
        packed = packed[-9:] + more
