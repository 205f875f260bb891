"""Three real dump slices, all of their pages: counts, left-over markup, and the words of text-carrying templates.

Needs the data folder: set ODQA_DATA to it.
"""

import bz2
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import pytest

from odqa.corpus.dump import DumpPassages
from odqa.corpus.mediawiki import Article, DumpReport, Redirect, read_articles
from odqa.corpus.split import count_words, split_article
from odqa.errors import DataError

_DATA = os.environ.get("ODQA_DATA")
pytestmark = pytest.mark.skipif(not _DATA, reason="ODQA_DATA is not set: it names the folder that holds dumps/")

ENWIKI_2016 = "enwiki-20160501-slice-206p.xml.bz2"
ENWIKI_2014 = "enwiki-20141107-slice-361p-truncated.xml.bz2"
LTGWIKI = "ltgwiki-20170901-2004p.xml.bz2"
SLICES = (ENWIKI_2016, ENWIKI_2014, LTGWIKI)


@dataclass(frozen=True, slots=True)
class Read:
    """One dump read to its end."""

    articles: list[Article]
    redirects: list[Redirect]
    report: DumpReport


_read: dict[str, Read] = {}


def path_of(name: str) -> Path:
    return Path(_DATA or "") / "dumps" / name


def read(name: str) -> Read:
    """Read a slice once for all tests."""
    if name not in _read:
        report, redirects = DumpReport(), list[Redirect]()
        articles = list(read_articles(path_of(name), report=report, on_redirect=redirects.append))
        _read[name] = Read(articles, redirects, report)
    return _read[name]


@pytest.mark.parametrize(
    ("name", "pages", "redirects", "main_pages"),
    [
        # The counts of the data folder's README, made independently of odqa; "articles" there are pages of namespace 0.
        (ENWIKI_2016, 206, 100, None),
        (ENWIKI_2014, 361, 146, None),
        (LTGWIKI, 2004, 195, 1050),
    ],
)
def test_pages_and_redirects_are_those_of_the_data_readme(
    name: str, pages: int, redirects: int, main_pages: int | None
) -> None:
    report = read(name).report
    assert (report.pages, report.redirects) == (pages, redirects)
    assert main_pages in (None, report.main_pages)


@pytest.mark.parametrize("name", SLICES)
def test_every_page_of_the_main_namespace_is_accounted_for(name: str) -> None:
    result = read(name)
    report = result.report
    assert report.main_pages == report.articles + report.aliases + report.disambiguations + report.empty
    assert report.pages == report.main_pages + sum(report.other_namespaces.values())
    assert (report.articles, report.aliases) == (len(result.articles), len(result.redirects))


def test_only_the_truncated_slice_reports_a_loss() -> None:
    assert read(ENWIKI_2016).report.lost is None
    assert read(LTGWIKI).report.lost is None
    # 10,509,828 bytes: `bzcat | wc -c`.
    assert read(ENWIKI_2014).report.lost == (
        "The dump ends at byte 10509828, after 361 pages, without </mediawiki>: what followed is lost."
    )


def test_strict_reading_refuses_the_truncated_slice_at_its_end() -> None:
    with pytest.raises(DataError, match=r"without </mediawiki>"):
        list(read_articles(path_of(ENWIKI_2014), strict=True))


def test_pages_named_as_disambiguations_are_left_out_unless_asked_for() -> None:
    titles = {article.title for article in read(ENWIKI_2016).articles}
    assert "Alabama" in titles
    assert titles.isdisjoint(
        {"Alien", "Austin (disambiguation)", "Asia Minor (disambiguation)", "Aberdeen (disambiguation)"}
    )
    everything = DumpReport()
    list(read_articles(path_of(ENWIKI_2016), skip_disambiguation=False, report=everything))
    assert everything.articles == len(titles) + read(ENWIKI_2016).report.disambiguations


def test_the_older_state_of_the_slice_holds_the_same_redirects() -> None:
    newer = {redirect.alias for redirect in read(ENWIKI_2016).redirects}
    older = {redirect.alias for redirect in read(ENWIKI_2014).redirects}
    assert newer <= older


# ---------------------------------------------------------------- clean text

_MARKUP = ("[[", "]]", "{{", "}}", "{|", "|}", "|-", "''", "<ref", "&lt;", "&nbsp;", "style=", "File:", "Category:")


@pytest.mark.parametrize("name", SLICES)
def test_at_most_a_fifth_of_a_piece_of_markup_is_left_in_ten_thousand_words(name: str) -> None:
    articles = read(name).articles
    left = Counter({mark: sum(article.text.count(mark) for article in articles) for mark in _MARKUP})
    words = sum(len(article.text.split()) for article in articles)
    assert left.total() / words * 10_000 <= 0.2, +left


def test_most_words_of_the_english_slice_are_kept() -> None:
    # 410,000 is about what wikiextractor 3.1.0 writes for it (411,556 with its <doc> lines and titles).
    assert sum(len(article.text.split()) for article in read(ENWIKI_2016).articles) >= 410_000


_HOLES = re.compile(r"\(\s*[,;)]|[,;]\s*\)|\s,|,\s*,|  |^[*#:|!]", re.MULTILINE)


@pytest.mark.parametrize("name", SLICES)
def test_dropped_markup_leaves_no_holes(name: str) -> None:
    # One in 100,000 words: "(,)" also occurs where an article writes about punctuation.
    articles = read(name).articles
    holes = [hole[0] for article in articles for hole in _HOLES.finditer(article.text)]
    assert len(holes) / sum(len(article.text.split()) for article in articles) <= 1e-5, holes


@pytest.mark.parametrize("name", SLICES)
def test_passages_of_every_article_join_back_to_its_text(name: str) -> None:
    for article in read(name).articles:
        passages = split_article(article.text)
        assert " ".join(passages).split() == article.text.split()
        assert all(1 <= count_words(passage) <= 100 for passage in passages)


# ---------------------------------------------------------------- arguments of templates
#
# An independent, slow reading of the raw wikitext: which text-carrying templates stand in the running text (not in a
# reference, comment, table, or another template), and are the words of their main arguments in the clean text?

_CARRIERS = re.compile(
    r"(convert|cvt|lang|lang-[\w-]+|(?:block|b|c)?quote|quotation|ipa|ipac?-[\w-]+)\Z", re.IGNORECASE
)
_WORDS = ("to", "and", "by", "or", "x", "to(-)")  # between the two numbers of a range in {{convert}}
_UNSEEN = re.compile(
    r"<!--.*?-->|<ref\b[^<>]*/>|<ref\b[^<>]*>.*?</ref\s*>|<(gallery|math|nowiki|pre|source)\b.*?</\1\s*>",
    re.DOTALL | re.IGNORECASE,
)
_TABLE = re.compile(r"^[ \t:*]*\{\|(?:(?!^[ \t:*]*\{\|).)*?^[ \t]*\|\}", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", (ENWIKI_2016, ENWIKI_2014))
def test_95_percent_of_the_arguments_of_convert_lang_quote_and_ipa_are_kept(name: str) -> None:
    texts = {article.title: squeeze(article.text) for article in read(name).articles}
    found, lost = Counter[str](), list[tuple[str, str, str]]()
    for title, wikitext in raw_pages(name):
        if title not in texts:
            continue
        for body in outermost_templates(wikitext):
            template, arguments = body.split("|", 1)[0].strip().lower(), split_arguments(body)
            if not _CARRIERS.match(template):
                continue
            for needle in needles(template, arguments):
                found[template] += 1
                if needle not in texts[title]:
                    lost.append((title, template, needle))
    assert found.total() > 500  # so that a blind search does not pass
    assert len(lost) / found.total() <= 0.05, lost[:20]


def raw_pages(name: str) -> Iterator[tuple[str, str]]:
    xml = bz2.decompress(path_of(name).read_bytes()).decode()
    for page in re.findall(r"<page>.*?</page>", xml, re.DOTALL):
        element = ElementTree.fromstring(page)
        yield element.findtext("title", ""), element.findtext("revision/text") or ""


def outermost_templates(wikitext: str) -> Iterator[str]:
    """Yield what stands between the braces of each template that is in no table and no other template."""
    wikitext, count = _UNSEEN.sub("", wikitext), 1
    while count:
        wikitext, count = _TABLE.subn("", wikitext)
    depth, start = 0, 0
    for match in re.finditer(r"\{\{|\}\}", wikitext):
        if match[0] == "{{":
            if depth == 0:
                start = match.end()
            depth += 1
        elif depth > 0:
            depth -= 1
            if depth == 0:
                yield wikitext[start : match.start()]


def split_arguments(body: str) -> list[tuple[str, str]]:
    """Split at pipes outside links and templates; positional arguments are named by their number."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(r"\[\[|\]\]|\{\{|\}\}|\|", body):
        if match[0] == "|":
            if depth == 0:
                parts.append(body[start : match.start()])
                start = match.end()
        else:
            depth += 1 if match[0] in ("[[", "{{") else -1
    parts.append(body[start:])
    arguments, position = [], 0
    for part in parts[1:]:
        named = re.match(r"\s*([\w -]+?)\s*=(.*)\Z", part, re.DOTALL)
        if named:
            arguments.append((named[1].lower(), named[2]))
        else:
            position += 1
            arguments.append((str(position), part))
    return arguments


def needles(template: str, arguments: list[tuple[str, str]]) -> Iterator[str]:
    """Yield the strings that the clean text must hold: the plain pieces of the template's main arguments."""
    values = dict(arguments)
    positional = [value.strip() for name, value in arguments if name.isdigit()]
    if template in ("convert", "cvt"):
        # The number and its unit side by side; of a range, the last number.
        at = [index for index, value in enumerate(positional) if re.match(r"[^\W\d]", value) and value not in _WORDS]
        yield squeeze(positional[at[0] - 1] + re.sub(r"^e6", "million", positional[at[0]]) if at else positional[0])
        return
    if template.startswith("ipac"):
        yield squeeze(
            "".join(
                value for value in positional if value not in ("lang", "pron", "us", "uk", "icon", "local", "audio")
            )
        )
        return
    main = (
        values.get("text") or values.get("quote") or (positional[1:2] if template == "lang" else positional[:1] or [""])
    )
    for piece in re.split(r"\{\{.*\}\}", main if isinstance(main, str) else "".join(main), flags=re.DOTALL):
        if plain := squeeze(plain_text(piece)):
            yield plain


def plain_text(wikitext: str) -> str:
    wikitext = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1", wikitext)
    wikitext = re.sub(r"\[https?:\S+ ?([^\]]*)\]", r"\1", wikitext)
    return unescape(re.sub(r"<[^<>]*>|'{2,}|^[*:#]+", "", wikitext, flags=re.MULTILINE))


def squeeze(text: str) -> str:
    """Keep letters and digits only, so that blanks and punctuation do not decide."""
    return "".join(character for character in text.casefold() if character.isalnum())


# ---------------------------------------------------------------- other languages, other processes


def test_the_latgalian_names_of_namespaces_are_silent_and_its_counts_are_the_wikis() -> None:
    result = read(LTGWIKI)
    report = result.report
    # The counts of the data folder's README: 2,004 pages in six namespaces, 1,050 of them in the main one.
    assert (report.pages, report.main_pages, report.redirects) == (2004, 1050, 195)
    assert len(report.namespaces) == 6
    assert report.namespaces.total() == 2004
    titles = {article.title for article in result.articles}
    assert {"Reiga", "Latgola"} <= titles
    names = re.compile(r"(Fails|Kategoreja|Attēls|Veidne|Taiss):\S")
    assert [(a.title, found[0]) for a in result.articles if (found := names.search(a.text))] == []
    assert not [title for title in titles if title.startswith(("Kategoreja:", "Fails:", "Taiss:", "Vikipedeja:"))]


@pytest.mark.parametrize("name", (ENWIKI_2016, LTGWIKI))
def test_two_processes_give_the_passages_of_one(name: str) -> None:
    expected_report, report = DumpReport(), DumpReport()
    expected = list(DumpPassages(path_of(name), processes=1, report=expected_report))
    assert list(DumpPassages(path_of(name), processes=2, report=report)) == expected
    assert report == expected_report
    assert [passage.text for passage in expected] == [
        text for article in read(name).articles for text in split_article(article.text)
    ]
