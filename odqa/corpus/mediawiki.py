"""A MediaWiki XML dump, plain or .bz2, read as a stream of articles with clean text.

The dump is cut at `<page>` and `</page>` (`odqa.corpus.streams`) and every page is parsed as a document of its own.
Three things follow. Memory holds one page, whatever the size of the dump. Damage costs the page it hits: the next
`<page>` starts afresh. And no DTD ever reaches the XML parser, so that entity bombs and external entities have no way
in.

What this module does not know: wikitext beyond redirects and disambiguation pages (see `odqa.corpus.wikitext`),
passages, other processes (`odqa.corpus.dump`), and older revisions (of a page with several, the last one counts).

Format: https://www.mediawiki.org/wiki/Help:Export, versions 0.3 to 0.11.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from odqa.corpus.streams import EXPECTED, Cutter, Loss, Part, Piece, parts_of
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
    options = PageOptions(skip_disambiguation=skip_disambiguation, keep_headings=keep_headings)
    reading = Reading(path, report, options=options, is_strict=strict, on_redirect=on_redirect)
    for part in parts_of(path):
        for found in reading.read(part):
            if found.fate == "article":
                yield Article(found.id, found.title, found.text)
    for found in reading.finish():
        if found.fate == "article":
            yield Article(found.id, found.title, found.text)


# ---------------------------------------------------------------- what becomes of a page


@dataclass(frozen=True, slots=True)
class PageOptions:
    """Which pages are articles, and what of them is text (`odqa.corpus.wikitext.clean`)."""

    skip_disambiguation: bool = True
    keep_headings: bool = False
    keep_infoboxes: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """A page, and what became of it. `text`: of an article its clean text, of a redirect the title it leads to.

    `passages`: what an article was cut into, where another process has done so (`text` is empty then).
    """

    namespace: int
    fate: Literal["article", "redirect", "disambiguation", "empty", "other"]
    id: str
    title: str
    text: str = ""
    passages: tuple[str, ...] = ()


def find_page(piece: Piece, site: "Site", options: PageOptions) -> Found | Loss:
    """Parse one `<page>` and decide what becomes of it; a Loss if it is damaged."""
    page = _parse_page(piece, site)
    if isinstance(page, Loss):
        return page
    if page.redirect is not None:
        return Found(page.namespace, "redirect", page.id, page.title, page.redirect)
    if page.namespace != 0:
        return Found(page.namespace, "other", page.id, page.title)
    if options.skip_disambiguation and is_disambiguation(page.title, page.wikitext):
        return Found(0, "disambiguation", page.id, page.title)
    text = clean(
        page.wikitext,
        namespaces=site.links,
        keep_headings=options.keep_headings,
        keep_infoboxes=options.keep_infoboxes,
    )
    return Found(0, "article" if text else "empty", page.id, page.title, text)


class Reading:
    """A dump that is being read part by part: what was met, what was lost, and what waits for the next part.

    Parts come in order, each through `read`, or through `join` when another process has cut and parsed it.
    """

    def __init__(
        self,
        path: Path,
        report: DumpReport,
        *,
        options: PageOptions,
        is_strict: bool = False,
        on_redirect: Callable[[Redirect], object] | None = None,
    ) -> None:
        self.path = path
        self.report = report
        self.options = options
        self.site: Site | None = None  # known once the header was read
        self._cutter = Cutter()
        self._damage = _Damage(path, report, is_strict=is_strict)
        self._on_redirect = on_redirect

    def read(self, part: Part | Loss) -> Iterator[Found]:
        """The pages that end in this part."""
        for item in [part] if isinstance(part, Loss) else part.chunks(self.path):
            if isinstance(item, Loss):
                self._damage.add(item)
            else:
                self.report.bytes_read += len(item)
                yield from self._find(self._cutter.feed(item))

    def join(
        self, head: bytes, losses: list[Loss], found: list[Found | Loss], tail: bytes, size: int
    ) -> Iterator[Found]:
        """The pages that end in a part which was cut elsewhere: `head`, what was found behind it, `tail`."""
        start = self._cutter.end
        for loss in losses:
            self._damage.add(loss, start)
        yield from self._find(self._cutter.feed(head))
        for item in found:
            if isinstance(item, Loss):
                self._damage.add(item, start)
            else:
                self._count(item)
                yield item
        if size > len(head):
            self._cutter.move_to(start + size - len(tail))
            yield from self._find(self._cutter.feed(tail))
        self.report.bytes_read += size

    def finish(self) -> Iterator[Found]:
        """Say what the end leaves. Raises DataError if there was no page."""
        yield from self._find(self._cutter.finish())
        if self.report.pages == 0:
            raise DataError(
                f"{self.path}: no page could be read from this MediaWiki dump. {self._damage.summary('It holds none.')}"
            )

    def mark(self) -> dict[str, Any]:
        """Where the reading stands between two parts, as JSON values."""
        return {
            "offset": self._cutter.offset,
            "waiting": self._cutter.waiting.decode("latin-1"),
            "losses": list(self._damage.losses),
            "lost": self._damage.count,
            "report": {each.name: copy(getattr(self.report, each.name)) for each in fields(self.report)},
        }

    def go_to(self, mark: Mapping[str, Any]) -> None:
        """Go on where another reading of this dump stood; `site` must be known."""
        self._cutter = Cutter(offset=mark["offset"], waiting=mark["waiting"].encode("latin-1"), in_header=False)
        self._damage.losses, self._damage.count = list(mark["losses"]), mark["lost"]
        for name, value in mark["report"].items():
            is_counter = name == "namespaces"
            setattr(self.report, name, Counter({int(key): n for key, n in value.items()}) if is_counter else value)

    def _find(self, pieces: Iterator[Piece | Loss]) -> Iterator[Found]:
        for piece in pieces:
            if isinstance(piece, Piece) and piece.is_header:
                _check_is_dump(piece.source, self._damage)
                self.site = _parse_siteinfo(piece, self._damage)
                continue
            assert self.site is not None
            found = piece if isinstance(piece, Loss) else find_page(piece, self.site, self.options)
            if isinstance(found, Loss):
                self._damage.add(found)
            else:
                self._count(found)
                yield found

    def _count(self, found: Found) -> None:
        report = self.report
        report.pages += 1
        report.namespaces[found.namespace] += 1
        match found.fate:
            case "article":
                report.articles += 1
            case "disambiguation":
                report.disambiguations += 1
            case "empty":
                report.empty += 1
            case "redirect":
                report.redirects += 1
                if found.namespace == 0:
                    report.aliases += 1
                    if self._on_redirect is not None:
                        self._on_redirect(Redirect(alias=found.title, target=found.text))


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
        self.losses: list[str] = []
        self.count = 0

    def add(self, loss: Loss, start: int = 0) -> None:
        """Note a loss in XML whose byte 0 is the byte `start` of the dump's."""
        words = loss.say(start=start, pages=self.report.pages)
        if self._is_strict:
            raise DataError(f"{self.path}: {words}. Without strict reading, what is sound would be kept.")
        self.count += 1
        if self.count <= self._IN_WORDS:
            self.losses.append(words)
        self.report.lost = self.summary()

    def summary(self, nothing: str = "") -> str:
        """Say all losses in one sentence; `nothing` if there is none."""
        if not self.losses:
            return nothing
        more = f"; and {self.count - self._IN_WORDS} more losses" if self.count > self._IN_WORDS else ""
        sentence = "; ".join(self.losses) + more
        return f"{sentence[0].upper()}{sentence[1:]}."


# ---------------------------------------------------------------- pages


@dataclass(frozen=True, slots=True)
class Site:
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


def _parse_siteinfo(header: Piece, damage: _Damage) -> Site:
    siteinfo = _SITEINFO.search(header.source)
    if siteinfo is None:
        return Site()  # a hand-made dump: MediaWiki accepts it too
    try:
        element = ElementTree.fromstring(siteinfo[0])
    except ElementTree.ParseError as error:
        words = f"the <siteinfo> of the dump is not well-formed XML ({error}), so English namespace names were used"
        damage.add(Loss(words))
        return Site()
    names = {(each.text or "").strip().lower(): int(each.get("key", "0")) for each in element.iter("namespace")}
    silent = [name for name, number in names.items() if number in _SILENT_NAMESPACES]
    return Site(Namespaces.of(silent=silent, known=names), names)


_REDIRECT = re.compile(r"\s*#[^\s\[:]+\s*:?\s*\[\[\s*:?([^\[\]|#]+)")  # "#REDIRECT [[Target]]", in any language


def _parse_page(piece: Piece, site: Site) -> _Page | Loss:
    try:
        element = ElementTree.fromstring(piece.source)
    except ElementTree.ParseError as error:
        return Loss(f"the page at byte {{at}} was left out: not well-formed XML ({error})", piece.offset)
    title, page_id = element.findtext("title"), element.findtext("id")
    if not title or not page_id:
        return Loss("the page at byte {at} was left out: it has no <title> or no <id>", piece.offset)
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


# ---------------------------------------------------------------- what the file is

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
        raise DataError(f"{damage.path}: {damage.summary('the file is empty.')} {EXPECTED}.")
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
    raise DataError(f"{damage.path}: not a MediaWiki dump but {found}. {EXPECTED}.")
