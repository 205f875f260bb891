"""A report as markdown: the same content as the page, for a repository or a mail.

What came from outside is escaped for markdown and for the HTML inside of it, so that a passage is text there, too.
"""

import re
from collections.abc import Sequence

from odqa.evaluate import Group
from odqa.report.content import Section, Shown, SystemPart, pieces
from odqa.report.markup import visible
from odqa.report.text import (
    Table,
    changed_tables,
    comparison_table,
    confidence,
    confidence_table,
    funnel_table,
    join,
    score_table,
)
from odqa.text import Matcher
from odqa.types import Passage

_SPECIAL = re.compile(r"([\\`*_\[\]#~])")  # a table escapes its | itself
_PASSAGES = 4  # our choice: packed passages that are shown of one question


def render_paper(sections: Sequence[Section], *, title: str) -> str:
    """The whole file as text."""
    parts = [f"# {escaped(title)}\n"]
    for section in sections:
        parts += [f"## {escaped(section.title)}: {section.n:,} questions\n", join(_tables(section), style="markdown")]
        parts.append(
            f"### Questions\n\n{len(section.sample)} of {section.n:,}; **gold answers** and _what was said_.\n"
        )
        parts += [_question(section, query_id) for query_id in section.sample]
    return "\n".join(parts)


def escaped(text: str) -> str:
    """Text that markdown and HTML show as it is; on one line."""
    plain = " ".join(visible(text).split())
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", plain)


def _tables(section: Section) -> list[Table]:
    named = [(escaped(system.name), system.evaluation) for system in section.systems]
    tables = [funnel_table(escaped(section.title), named), score_table("scores", named)]
    for first, second, comparison in section.comparisons:
        names = escaped(first), escaped(second)
        tables.append(comparison_table(*names, comparison))
        tables += [_escaped_cells(table) for table in changed_tables(*names, comparison, section.texts)]
    known = [(name, found) for name, item in named if (found := item.selective) is not None]
    for system in section.systems:
        tables += _curves(system)
        for what, groups in (
            ("by question word", system.by_word),
            ("by answer type", system.by_type),
            ("by whether the collection has an answer", system.by_ceiling),
        ):
            tables += [_groups(f"{escaped(system.name)}: exact match {what}", groups)] if groups else []
        tables.append(_stages(system))
    return [*tables, *([confidence_table("confidence", known)] if known else [])]


def _escaped_cells(table: Table) -> Table:
    rows = tuple(tuple(escaped(cell) for cell in row) for row in table.rows)
    return Table(table.title, table.columns, rows, table.left, table.notes)


def _curves(system: SystemPart) -> list[Table]:
    tables = []
    for name, points in system.recall:
        cells = tuple(f"{at.value:.1f} [{at.low:.1f}, {at.high:.1f}]" for _, at in points)
        columns = ("k", *(str(k) for k, _ in points))
        tables.append(Table(f"{escaped(system.name)}: recall at k, {name}", columns, (("recall", *cells),)))
    if system.reach:
        columns = ("tokens", *(f"{tokens:,}" for tokens, _ in system.reach))
        cells = tuple(f"{share:.1f}" for _, share in system.reach)
        tables.append(Table(f"{escaped(system.name)}: answer within the first tokens", columns, (("%", *cells),)))
    return tables


def _groups(title: str, groups: Sequence[Group]) -> Table:
    rows = []
    for group in groups:
        em, context = group.scores["em"], group.scores.get("recall_in_context")
        told = f"{em.value:.1f} [{em.low:.1f}, {em.high:.1f}]"
        rows.append((group.name, str(group.n), told, "" if context is None else f"{context.value:.1f}"))
    return Table(title, ("kind", "n", "em", "recall in context"), tuple(rows))


def _stages(system: SystemPart) -> Table:
    rows = [
        (
            stage.stage,
            f"{stage.total:,.2f}",
            *(f"{1000 * seconds:,.1f}" for seconds in (stage.median, stage.slow)),
            str(stage.shared),
        )
        for stage in system.stages
    ]
    columns = ("stage", "seconds", "median, ms", "95th percentile, ms", "from another run")
    return Table(f"{escaped(system.name)}: time, the slowest stage first", columns, tuple(rows))


def _question(section: Section, query_id: str) -> str:
    lines = [f"#### {escaped(section.texts[query_id])}", ""]
    shown = [(system, system.shown[query_id]) for system in section.systems]
    gold = " | ".join(shown[-1][1].result.answers) or "(none: saying nothing is right)"
    lines.append(f"- gold: {escaped(gold)} ({escaped(query_id)})")
    for system, found in shown:
        name = f"{escaped(system.name)}: " if len(shown) > 1 else ""
        said = found.result.prediction or "(said nothing)"
        lines.append(f"- {name}{found.result.outcome}; said {escaped(said)} ({confidence(found.trace.answer)})")
        lines.append(f"  - {escaped(found.where)}")
        hits = found.trace.contexts[-1].hits if found.trace.contexts else ()
        lines += [f"  - {_passage(hit.passage, found, section.matcher)}" for hit in hits[:_PASSAGES]]
        if found.missed is not None:
            rank, passage = found.missed
            lines.append(f"  - not read, though at rank {rank}: {_passage(passage, found, section.matcher)}")
    return "\n".join(lines) + "\n"


def _passage(passage: Passage, shown: Shown, matcher: Matcher) -> str:
    text = ""
    for piece in pieces(passage.text, shown.result.answers, shown.result.prediction, matcher):
        words, sign = escaped(piece.text), ("**" if piece.is_gold else "") + ("_" if piece.is_said else "")
        before = " " if piece.text[:1].isspace() else ""
        after = " " if words and piece.text[-1:].isspace() else ""
        text += f"{before}{sign}{words}{sign[::-1]}{after}" if words else before
    return f"{escaped(passage.title) or '(no title)'} [{escaped(passage.id)}]: {text}"
