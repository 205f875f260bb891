"""Evaluations, traces and evidence for people to look at: tables and evidence as text (`odqa.report.text`).

It measures nothing itself. Whatever came from a collection or a model is data: it can drive neither a terminal nor a
browser.
"""

from odqa.report.text import (
    Named,
    Published,
    Style,
    Table,
    changed_table,
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
    "changed_table",
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
