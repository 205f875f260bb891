"""Pack the hand-written articles and questions of `collection/` into the embedded assets.

    python scripts/make_collection.py

Writes `odqa/assets/collection.xml.bz2`, a MediaWiki export as Wikipedia's own dumps are (schema 0.11), and
`odqa/assets/questions.jsonl`. The bytes depend on the sources alone, so a test can say whether the assets are fresh.
"""

import bz2
import json
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "collection"
ASSETS = ROOT / "odqa" / "assets"
TIMESTAMP = "2026-11-20T00:00:00Z"

NAMESPACES = {
    -2: "Media", -1: "Special", 0: "", 1: "Talk", 2: "User", 3: "User talk", 4: "Project", 6: "File",
    8: "MediaWiki", 10: "Template", 12: "Help", 14: "Category",
}  # fmt: skip

HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="en">
  <siteinfo>
    <sitename>odqa embedded collection</sitename>
    <dbname>odqawiki</dbname>
    <case>first-letter</case>
    <namespaces>
{namespaces}
    </namespaces>
  </siteinfo>
"""

PAGE = """  <page>
    <title>{title}</title>
    <ns>{ns}</ns>
    <id>{id}</id>{redirect}
    <revision>
      <id>{id}</id>
      <timestamp>{timestamp}</timestamp>
      <contributor><username>odqa</username><id>1</id></contributor>
      <model>wikitext</model>
      <format>text/x-wiki</format>
      <text bytes="{size}" xml:space="preserve">{text}</text>
    </revision>
  </page>
"""


def make_dump() -> bytes:
    """The export, compressed: articles and disambiguation pages in order of file names, redirects, other namespaces."""
    pages: list[tuple[int, str, str, str]] = []  # namespace, title, redirect target or "", wikitext
    for file in sorted(SOURCE.glob("articles-*/*.wiki")):
        first, _, text = file.read_text(encoding="utf-8").partition("\n")
        if not first.startswith("title: "):
            raise SystemExit(f"{file}: the first line must be 'title: The Page Title', found {first!r}")
        pages.append((0, first.removeprefix("title: ").strip(), "", text.strip()))
    for file in sorted(SOURCE.glob("redirects-*.tsv")):
        for line in file.read_text(encoding="utf-8").splitlines():
            alias, target = line.split("\t")
            pages.append((0, alias, target, f"#REDIRECT [[{target}]]"))
    pages.append((10, "Template:Infobox river", "", "{{Infobox|title={{{name}}}|label1=Length|data1={{{length}}}}}"))
    pages.append((14, "Category:Rivers of Europe", "", "Articles about rivers of [[Europe]]."))
    names = [title for _, title, _, _ in pages]
    if doubles := {name for name in names if names.count(name) > 1}:
        raise SystemExit(f"titles used twice: {sorted(doubles)}")
    namespaces = "\n".join(
        f'      <namespace key="{key}" case="first-letter"' + (f">{name}</namespace>" if name else " />")
        for key, name in NAMESPACES.items()
    )
    body = [
        PAGE.format(
            title=escape(title),
            ns=namespace,
            id=number,
            redirect=f'\n    <redirect title="{escape(target)}" />' if target else "",
            timestamp=TIMESTAMP,
            size=len(text.encode()),
            text=escape(text),
        )
        for number, (namespace, title, target, text) in enumerate(pages, 1)
    ]
    return bz2.compress((HEAD.format(namespaces=namespaces) + "".join(body) + "</mediawiki>\n").encode())


def make_questions() -> str:
    """All questions in order of files and lines: id, question, answers, and the article that answers it."""
    rows = [
        json.loads(line)
        for file in sorted(SOURCE.glob("questions-*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    ASSETS.mkdir(exist_ok=True)
    (ASSETS / "collection.xml.bz2").write_bytes(make_dump())
    (ASSETS / "questions.jsonl").write_text(make_questions(), encoding="utf-8")
