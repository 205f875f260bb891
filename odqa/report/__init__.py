"""Evaluations, traces and evidence for people to look at.

`text` has tables and evidence for a terminal; `content` gathers what a report says, `page` shows it as HTML (`markup`,
`charts`), `paper` as markdown. Nothing here retrieves or reads. Whatever came from a collection or a model is data: it
can drive neither a terminal nor a browser.
"""

from odqa.report.text import (
    Named,
    Published,
    Style,
    Table,
    changed_tables,
    check_table,
    comparison_table,
    confidence,
    confidence_table,
    evidence,
    explain_question,
    funnel_table,
    gain_table,
    join,
    mark,
    published_table,
    render,
    score_table,
    stage_table,
)

__all__ = [
    "Named",
    "Published",
    "Style",
    "Table",
    "changed_tables",
    "check_table",
    "comparison_table",
    "confidence",
    "confidence_table",
    "evidence",
    "explain_question",
    "funnel_table",
    "gain_table",
    "join",
    "mark",
    "published_table",
    "render",
    "score_table",
    "stage_table",
]
