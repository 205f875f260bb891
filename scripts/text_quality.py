"""Clean text of a dump, odqa beside wikiextractor: what each keeps of the articles that both have, counted.

    python scripts/text_quality.py DUMP... --wikiextractor PYTHON [--out eval/results/text-quality.md]

PYTHON is the interpreter of an environment of its own: `pip install wikiextractor==3.1.0`, run as its README says, with
--no-templates: a slice has no template pages to expand. What
is looked for in the raw wikitext is read by plain patterns of this script, not by either system. Both texts are
compared by their letters and digits. What no pattern counts was read by hand: docs/LOG.md tells it, with the titles.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent))

from make_multistream import pieces

from odqa.corpus.mediawiki import read_articles

RESULTS = Path(__file__).resolve().parents[1] / "eval" / "results"
_UNSEEN = re.compile(r"<!--.*?-->|<ref\b[^<>]*/>|<ref\b[^<>]*>.*?</ref\s*>|\{\|.*?\n\|\}", re.DOTALL | re.IGNORECASE)
_ITEM = re.compile(r"^[*#]+\s*([^{}|<>\[\]\n=]{20,})$", re.MULTILINE)  # items without markup, of 20 characters or more
_HEADING = re.compile(r"^==+\s*([^=\n{}<>]+?)\s*==+\s*$", re.MULTILINE)
_CONVERT = re.compile(
    r"\{\{\s*(?:convert|cvt)\s*\|\s*([\d.,]+)\s*\|\s*(?:km2?|mi|sqmi|ft|m|kg|lb|acre|ha)\s*[|}]", re.IGNORECASE
)
_LANG = re.compile(r"\{\{\s*lang(?:-\w+)?\s*\|(?:\s*[a-z-]{2,8}\s*\|)?\s*([^{}|\n=]{3,})\}\}", re.IGNORECASE)
_IPA = re.compile(r"\{\{\s*IPA(?:-\w+)?\s*\|\s*([^{}|\n=]{3,})[|}]", re.IGNORECASE)
_QUOTE = re.compile(r"\{\{\s*(?:block|c)?quote\s*\|\s*([^{}|\[\]<>=]{30,})[|}]", re.IGNORECASE)
_MARKUP = re.compile(
    r"\[\[|\]\]|\{\{|\}\}|\{\||\|\}|'''?|<ref|style=|&(?:[lg]t|amp|nbsp|quot);|<[a-z]+[^<>]*>", re.IGNORECASE
)
_HOLES = re.compile(r"\(\s*[,;:]|[,;:]\s*\)|\(\s*\)|\s,|,\s*,|\b(?:of|from|at|about) (?:,|\.|\))|\bat and the\b")
_PLACEHOLDER = re.compile(r"\bformula_\d+|\bcodice_\d+")
Rows = list[tuple[str, ...]]  # what, odqa, wikiextractor


def main(
    dumps: Annotated[list[Path], typer.Argument(help="MediaWiki dumps (.xml or .xml.bz2).", exists=True)],
    wikiextractor: Annotated[Path, typer.Option(help="Python of the environment that holds wikiextractor.")],
    out: Annotated[Path, typer.Option(help="Where the table goes.")] = RESULTS / "text-quality.md",
) -> None:
    """Count what each system keeps, and write a table a dump."""
    parts = []
    for dump in dumps:
        ours = {article.title: article.text for article in read_articles(dump)}
        theirs = run_wikiextractor(dump, wikiextractor)
        both = [title for title in ours if theirs.get(title, "").strip()]
        raw = {title: text for title, text in raw_pages(dump) if title in both}
        with_titles = {article.title: article.text for article in read_articles(dump, keep_headings=True)}
        rows = articles(ours, theirs) + counted(both, ours, theirs) + kept(raw, ours, theirs, with_titles)
        lines = [f"### {dump.name}", "", "| | odqa | wikiextractor 3.1.0 |", "| --- | --- | --- |"]
        parts.append("\n".join(lines + [f"| {name} | {one} | {two} |" for name, one, two in rows]) + "\n")
        typer.echo(parts[-1])
    intro = f"<!-- Made by scripts/text_quality.py. -->\n{' '.join((__doc__ or '').split(chr(10) * 2)[2].split())}\n"
    out.write_text("\n".join([intro, *parts]), encoding="utf-8")


def run_wikiextractor(dump: Path, python: Path) -> dict[str, str]:
    """Title -> text of what wikiextractor writes."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--no-templates", "--processes", "1", "--json", "-q", "-o", folder]
        subprocess.run([str(python), "-m", "wikiextractor.WikiExtractor", *options, str(dump)], check=True)
        records = (
            json.loads(line) for file in sorted(Path(folder).rglob("wiki_*")) for line in file.open(encoding="utf-8")
        )
        return {record["title"]: record["text"] for record in records}


def raw_pages(dump: Path) -> Iterator[tuple[str, str]]:
    """Title and wikitext of each page, less references, comments and tables."""
    for piece in pieces(dump):
        xml = piece.source.decode("utf-8", "replace")
        title, text = re.search(r"<title>(.*?)</title>", xml), re.search(r"<text[^>]*>(.*?)</text>", xml, re.DOTALL)
        if not piece.is_header and title and text:
            yield unescape(title[1]), _UNSEEN.sub("", unescape(text[1]))


def articles(ours: dict[str, str], theirs: dict[str, str]) -> Rows:
    """How many articles, and of how many words."""
    full = {title: text for title, text in theirs.items() if text.strip()}
    missing = sum(not theirs.get(title, "").strip() for title in ours)
    only = sum(title not in ours for title in full)
    return [
        ("articles with text", f"{len(ours)}", f"{len(full)}"),
        ("of them only here (odqa leaves disambiguation pages out)", f"{missing}", f"{only}"),
    ]


def counted(both: list[str], ours: dict[str, str], theirs: dict[str, str]) -> Rows:
    """What stands in the texts of the articles that both have."""
    rows: Rows = [
        (f"words, in the {len(both)} articles of both", *(f"{words(both, texts):,}" for texts in (ours, theirs)))
    ]
    for name, pattern in (
        ("left-over markup and entities", _MARKUP),
        ("holes where something was dropped: `(;`, `()`, ` ,`, `at and the`", _HOLES),
        ("placeholders such as formula_12", _PLACEHOLDER),
    ):
        numbers = (sum(len(pattern.findall(texts[title])) for title in both) for texts in (ours, theirs))
        rows.append((name, *map("{:,}".format, numbers)))
    return rows


def words(titles: list[str], texts: dict[str, str]) -> int:
    """Words by blanks."""
    return sum(len(texts[title].split()) for title in titles)


def kept(raw: dict[str, str], ours: dict[str, str], theirs: dict[str, str], with_titles: dict[str, str]) -> Rows:
    """Which share of what the wikitext has is in the texts."""
    titles = [(title, match[1]) for title, text in raw.items() for match in _HEADING.finditer(text)]
    shares = [f"{100 * share(titles, texts):.1f} %" for texts in (with_titles, theirs)]
    rows: Rows = [(f"section titles kept (odqa: by default none, here with `headings`), of {len(titles):,}", *shares)]
    for name, pattern in (
        ("list items kept", _ITEM),
        ("numbers of {{convert}} kept", _CONVERT),
        ("words of {{lang}} kept", _LANG),
        ("sounds of {{IPA}} kept", _IPA),
        ("quotations of {{quote}} kept", _QUOTE),
    ):
        found = [(title, match[1]) for title, text in raw.items() for match in pattern.finditer(text)]
        if found:
            shares = [f"{100 * share(found, texts):.1f} %" for texts in (ours, theirs)]
            rows.append((f"{name}, of {len(found):,}", *shares))
    return rows


def share(found: list[tuple[str, str]], texts: dict[str, str]) -> float:
    """Which share of the pieces stands in the text of its article."""
    squeezed = {title: squeeze(text) for title, text in texts.items()}
    count = Counter(squeeze(re.sub(r"'{2,}", "", piece)) in squeezed[title] for title, piece in found)
    return count[True] / count.total()


def squeeze(text: str) -> str:
    """Letters and digits."""
    return "".join(character for character in unescape(text).casefold() if character.isalnum())


if __name__ == "__main__":
    typer.run(main)
