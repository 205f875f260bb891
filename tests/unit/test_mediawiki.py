"""Dumps: which pages become articles, what damage costs, and what is refused."""

import bz2
import re
import tracemalloc
from pathlib import Path

import pytest

from odqa.corpus import streams
from odqa.corpus.mediawiki import Article, DumpReport, Redirect, is_disambiguation, read_articles
from odqa.errors import DataError

HEADER = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" version="0.10" xml:lang="ltg">
  <siteinfo>
    <sitename>Vikipedeja</sitename>
    <namespaces>
      <namespace key="-2" case="first-letter">Medeja</namespace>
      <namespace key="0" case="first-letter" />
      <namespace key="6" case="first-letter">Fails</namespace>
      <namespace key="10" case="first-letter">Taiss</namespace>
      <namespace key="14" case="first-letter">Kategoreja</namespace>
    </namespaces>
  </siteinfo>
"""
END = "</mediawiki>\n"


def page(
    number: int, title: str, text: str, *, ns: str = "<ns>0</ns>", extra: str = "", model: str = "wikitext"
) -> str:
    return (
        f"  <page>\n    <title>{title}</title>\n    {ns}\n    <id>{number}</id>\n{extra}    <revision>\n"
        f'      <id>9</id>\n      <model>{model}</model>\n      <text xml:space="preserve">{text}</text>\n'
        "    </revision>\n  </page>\n"
    )


def plain_pages(count: int, first: int = 1) -> str:
    return "".join(page(number, f"T{number}", f"Text {number}.") for number in range(first, first + count))


def write(folder: Path, text: str | bytes, name: str = "dump.xml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def ids(path: Path, report: DumpReport | None = None) -> list[str]:
    return [article.id for article in read_articles(path, report=report)]


# ---------------------------------------------------------------- sound dumps


def test_articles_come_in_the_order_of_the_dump_with_clean_text(tmp_path: Path) -> None:
    text = "'''Reiga''' [[Fails:R.jpg|thumb|x]]ir &lt;ref&gt;n&lt;/ref&gt;[[Latveja|Latvejis]] mīsts.[[Kategoreja:M]]"
    path = write(tmp_path, HEADER + page(7, "Reiga", text) + page(3, "A &amp; B", "Text.") + END)
    assert list(read_articles(path)) == [
        Article(id="7", title="Reiga", text="Reiga ir Latvejis mīsts."),
        Article(id="3", title="A & B", text="Text."),
    ]


def test_every_page_is_counted_under_what_became_of_it(tmp_path: Path) -> None:
    dump = HEADER + "".join(
        [
            page(1, "A", "Text."),
            page(2, "B", "#REDIRECT [[A]]", extra='    <redirect title="A" />\n'),
            page(3, "Taiss:C", "#REDIRECT [[Taiss:D]]", ns="<ns>10</ns>", extra='    <redirect title="Taiss:D" />\n'),
            page(4, "E", "* [[A]]\n{{Disambig}}"),
            page(5, "F", "{{stub}}"),
            page(6, "Taiss:D", "x", ns="<ns>10</ns>"),
            page(7, "G", "return 1", model="Scribunto"),
        ]
    )
    report, redirects = DumpReport(), list[Redirect]()
    path = write(tmp_path, dump + END)
    assert [article.id for article in read_articles(path, report=report, on_redirect=redirects.append)] == ["1"]
    assert redirects == [Redirect(alias="B", target="A")]
    assert (report.pages, report.articles, report.redirects, report.aliases) == (7, 1, 2, 1)
    assert (report.disambiguations, report.empty, report.other_namespaces) == (1, 2, {10: 2})
    assert report.bytes_read == len((dump + END).encode())
    assert report.lost is None


def test_disambiguation_pages_are_kept_on_request(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER + page(4, "E", "* [[A]]\n{{Disambig}}") + page(1, "A", "Text.") + END)
    assert [article.id for article in read_articles(path, skip_disambiguation=False)] == ["4", "1"]


@pytest.mark.parametrize(
    ("title", "wikitext"),
    [
        ("Alien", "* [[x]]\n{{disambiguation|geo}}"),
        ("Alien", "{{ Hndis\n|name=x}}"),
        ("Alien", "{{Begriffsklärung}}"),
        ("Alien", "{{Неоднозначность}}"),
        ("Alien", "__DISAMBIG__"),
        ("Alien", "{{Place_name_disambiguation}}"),
        ("Austin (disambiguation)", "* [[x]]"),
    ],
)
def test_disambiguation_pages_are_told_by_magic_word_template_or_title(title: str, wikitext: str) -> None:
    assert is_disambiguation(title, wikitext)


@pytest.mark.parametrize(
    "wikitext",
    [
        "{{other uses|A (disambiguation)}}",
        "[[T-4]]{{disambiguation needed|date=x}}",
        "word sense disambiguation",
        "{{dablink|x}}",
    ],
)
def test_articles_that_mention_disambiguation_are_articles(wikitext: str) -> None:
    assert not is_disambiguation("Ambiguity", wikitext)


def test_the_last_of_several_revisions_counts(tmp_path: Path) -> None:
    two = page(1, "A", "New.").replace("<revision>", "<revision><id>8</id><text>Old.</text></revision><revision>", 1)
    assert [article.text for article in read_articles(write(tmp_path, HEADER + two + END))] == ["New."]


def test_old_formats_tell_namespace_and_redirect_in_title_and_text(tmp_path: Path) -> None:
    dump = (
        HEADER
        + page(1, "Taiss:A", "x", ns="")
        + page(2, "B", "#redirect [[C d|x]]", ns="")
        + page(3, "C", "Text.", ns="")
        + END
    )
    redirects: list[Redirect] = []
    articles = list(read_articles(write(tmp_path, dump), on_redirect=redirects.append))
    assert [article.id for article in articles] == ["3"]
    assert redirects == [Redirect("B", "C d")]


@pytest.mark.parametrize("chunk", [7, 64, 2**18])
def test_the_size_of_the_chunks_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(streams, "_CHUNK", chunk)
    dump = (HEADER + plain_pages(20) + END).encode()
    expected = [str(number) for number in range(1, 21)]
    assert ids(write(tmp_path, dump)) == expected
    assert ids(write(tmp_path, bz2.compress(dump))) == expected


def test_multistream_bz2_is_read_whatever_the_file_is_called(tmp_path: Path) -> None:
    streams = [HEADER, plain_pages(5), plain_pages(5, first=6), END]
    path = write(tmp_path, b"".join(bz2.compress(stream.encode()) for stream in streams), "dump.data")
    report = DumpReport()
    assert ids(path, report) == [str(number) for number in range(1, 11)]
    assert report.lost is None


@pytest.mark.parametrize("behind", [b"\0" * 512, b"other bytes"])
def test_bytes_behind_the_last_bz2_stream_are_ignored(tmp_path: Path, behind: bytes) -> None:
    report = DumpReport()
    path = write(tmp_path, bz2.compress((HEADER + plain_pages(3) + END).encode()) + behind)
    assert ids(path, report) == ["1", "2", "3"]
    assert report.lost is None


# ---------------------------------------------------------------- damaged dumps


def test_a_truncated_dump_keeps_what_was_read_and_says_where_it_ends(tmp_path: Path) -> None:
    whole = (HEADER + plain_pages(3) + END).encode()
    cut = whole[: whole.rindex(b"Text 3")]
    report = DumpReport()
    assert ids(write(tmp_path, cut), report) == ["1", "2"]
    assert report.lost == (
        f"The dump ends at byte {len(cut)}, after 2 pages and in the middle of one, without </mediawiki>: "
        "what followed is lost."
    )


def test_a_truncated_bz2_keeps_the_whole_blocks(tmp_path: Path) -> None:
    streams = [bz2.compress((HEADER + plain_pages(4)).encode()), bz2.compress(plain_pages(4, first=5).encode())]
    report = DumpReport()
    assert ids(write(tmp_path, streams[0] + streams[1][:-20]), report) == ["1", "2", "3", "4"]
    assert report.lost is not None
    assert "ends at byte" in report.lost
    assert "in the middle of a stream" in report.lost


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (page(2, "B", "a <b> c"), "not well-formed XML"),  # a tag that nobody closes
        (page(2, "B", "a &bogus; c"), "undefined entity"),
        (page(2, "B", "a").replace("</page>", ""), "it has no </page>"),
        (page(2, "B", "a").replace("<id>2</id>", ""), "it has no <title> or no <id>"),
        ("  some bytes\n", "they belong to no page"),
    ],
)
def test_a_damaged_page_costs_itself_only(tmp_path: Path, broken: str, message: str) -> None:
    path = write(tmp_path, HEADER + plain_pages(1) + broken + plain_pages(2, first=3) + END)
    report = DumpReport()
    assert ids(path, report) == ["1", "3", "4"]
    assert report.lost is not None
    assert message in report.lost
    assert re.search(r"at byte \d+", report.lost)
    with pytest.raises(DataError, match=re.escape(message)):
        list(read_articles(path, strict=True))


def test_invalid_utf8_costs_its_page_only(tmp_path: Path) -> None:
    dump = (HEADER + plain_pages(3) + END).encode().replace(b"Text 2", b"Text \xff\xfe")
    report = DumpReport()
    assert ids(write(tmp_path, dump), report) == ["1", "3"]
    assert "not well-formed" in (report.lost or "")


def test_many_losses_are_counted_rather_than_listed(tmp_path: Path) -> None:
    report = DumpReport()
    ids(write(tmp_path, HEADER + page(1, "A", "&bogus;") * 10 + plain_pages(1) + END), report)
    assert (report.lost or "").endswith("; and 7 more losses.")


def test_a_damaged_bz2_stream_costs_itself_and_reading_goes_on_at_the_next(tmp_path: Path) -> None:
    streams = [
        bytearray(bz2.compress(part.encode())) for part in (HEADER, *map(plain_pages, [9] * 3, [1, 10, 19]), END)
    ]
    middle = len(streams[2]) // 2
    streams[2][middle : middle + 8] = b"\0" * 8
    report = DumpReport()
    assert ids(write(tmp_path, b"".join(streams)), report) == [str(n) for n in (*range(1, 10), *range(19, 28))]
    assert report.lost is not None
    assert re.match(r"Bz2 data after byte \d+ of the file is damaged", report.lost)


def test_text_whose_checksum_fails_is_not_handed_out(tmp_path: Path) -> None:
    # Flipping the stored checksum of the block (bytes 10 to 13) leaves text that looks sound.
    packed = bytearray(bz2.compress((HEADER + plain_pages(9)).encode()))
    packed[11] ^= 0xFF
    path = write(tmp_path, bytes(packed))
    with pytest.raises(DataError, match=r"Bz2 data after byte 0 of the file is damaged"):
        ids(path)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", "the file is empty"),
        (bz2.compress(b""), "the file is empty"),
        ("<!DOCTYPE html>\n<html></html>", "an HTML page"),
        ('{"title": "x"}', "JSON"),
        ('<?xml version="1.0"?>\n<!-- c --><rss version="2.0"></rss>', "XML whose root is <rss>"),
        (bz2.compress(b"plain words"), "no XML"),
        ("id\ttext\ttitle\n", "no XML"),
        (b"\x1f\x8b\x08\0rest", "gzip data"),
        (HEADER + END, "It holds none"),
        (b"BZh9 is not what follows", "damaged"),
    ],
)
def test_what_is_no_dump_is_refused_in_one_line(tmp_path: Path, content: str | bytes, found: str) -> None:
    with pytest.raises(DataError, match=re.escape(found)) as caught:
        list(read_articles(write(tmp_path, content)))
    message = str(caught.value)
    assert "\n" not in message
    assert "dump.xml" in message


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.xml: no such file\. Expected a MediaWiki XML dump"):
        list(read_articles(tmp_path / "missing.xml"))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_articles(tmp_path))


BOMB = '<!DOCTYPE m [<!ENTITY a "ha"><!ENTITY b "&a;&a;"><!ENTITY c SYSTEM "file:///etc/passwd">]>\n'


def test_a_dump_with_a_dtd_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="XML with a DTD"):
        ids(write(tmp_path, BOMB + HEADER + page(1, "A", "&b;&c;") + END))


def test_a_dtd_further_in_never_reaches_the_parser(tmp_path: Path) -> None:
    report = DumpReport()
    path = write(tmp_path, HEADER + BOMB + page(1, "A", "&b;&c;") + plain_pages(1, first=2) + END)
    assert ids(path, report) == ["2"]
    assert "undefined entity" in (report.lost or "")


def test_memory_holds_chunks_and_one_page_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_CHUNK", 2**14)
    path = write(tmp_path, HEADER + plain_pages(5_000) + END)
    assert path.stat().st_size > 1_000_000
    tracemalloc.start()
    count = sum(1 for _ in read_articles(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 5_000
    assert peak < 200_000  # a few chunks of 16 KiB, the parser, compiled patterns
