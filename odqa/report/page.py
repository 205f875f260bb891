"""A report as one HTML file: no network, no library, readable on a phone and by keyboard, dark or light by system.

The invariant: what came from outside (passages, questions, answers, names) is text. `odqa.report.markup` escapes it,
and the page's policy (Content-Security-Policy) lets nothing run but the one script whose hash it names, and nothing
load at all. Without scripts everything is there to read; the script only filters the questions.
"""

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources

import odqa
from odqa.evaluate import OUTCOMES, Evaluation, Group, Outcome, QuestionResult
from odqa.report import charts
from odqa.report.content import Section, Shown, SystemPart, pieces
from odqa.report.markup import Child, Html, el, inside
from odqa.report.text import Table, comparison_table, confidence, confidence_table, score_table
from odqa.text import Matcher
from odqa.types import Hit, Passage

_CLASS: dict[Outcome, str] = {outcome: f"o{number}" for number, outcome in enumerate(OUTCOMES)}
_PASSAGES = 8  # our choice: packed passages that are shown of one question


def render_page(sections: Sequence[Section], *, title: str) -> str:
    """The whole file as text."""
    style, script = (Html(_asset(name)) for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", style),
    )
    links = [el("a", section.title, href=f"#s{number}") for number, section in enumerate(sections)]
    body = el(
        "body",
        el("a", "Skip to the questions", class_="skip", href="#q0"),
        el("header", el("h1", title), el("nav", links, aria_label="Question sets") if len(links) > 1 else None),
        el("main", [_section(section, number) for number, section in enumerate(sections)]),
        el("footer", f"odqa {odqa.__version__}. Rates in percent; [low, high] are 95% bootstrap intervals."),
        el("script", script),
    )
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _asset(name: str) -> str:
    return resources.files("odqa.report").joinpath(name).read_text(encoding="utf-8")


def _section(section: Section, number: int) -> Html:
    named = [(system.name, system.evaluation) for system in section.systems]
    parts: list[Child] = [
        el("h2", section.title, " ", el("small", f"{section.n:,} questions, matcher {section.matcher}")),
        _tiles(section),
        _block("Where was the answer lost?", _funnel(section), "Each question counts once."),
        _block("Scores", _table(score_table("", named))),
    ]
    for first, second, comparison in section.comparisons:
        parts.append(_block(f"{second} against {first}", _table(comparison_table(first, second, comparison))))
    parts += [_curves(section), _kinds(section), _confidence(named), _stages(section)]
    parts += [_questions(section, number), _made_of(section)]
    return el("section", parts, id=f"s{number}", class_="set")


def _block(heading: str, content: Child, note: str = "") -> Html:
    return el("div", el("h3", heading), el("p", note, class_="note") if note else None, content, class_="block")


# --- numbers ----------------------------------------------------------------------------------------------------------


def _tiles(section: Section) -> Html:
    """The few numbers that one looks for first, of the last system."""
    system = section.systems[-1]
    scores = {score.name: score for score in system.evaluation.scores}
    recalls = [name for name in scores if name.startswith("final_recall@")]
    tiles = []
    for name in ("em", "f1", *recalls[:1], *recalls[-1:][: len(recalls) - 1], "recall_in_context", "ceiling"):
        if name in scores:
            score = scores[name]
            value = el("b", f"{score.value:.1f}")
            told = el("span", f"[{score.low:.1f}, {score.high:.1f}]", class_="range")
            tiles.append(el("li", value, told, el("span", name.replace("_", " "), class_="what")))
    note = el("p", f"Of {system.name}:", class_="note") if len(section.systems) > 1 else None
    return inside(note, el("ul", tiles, class_="tiles"))


def _funnel(section: Section) -> Html:
    bars = []
    for system in section.systems:
        funnel, n = system.evaluation.funnel, max(1, section.n)
        shares = [(_CLASS[outcome], 100 * funnel[outcome] / n) for outcome in OUTCOMES]
        told = ", ".join(f"{outcome} {funnel[outcome]}" for outcome in OUTCOMES if funnel[outcome])
        bar = charts.stacked_bar(shares, label=f"{system.name}: {told}")
        bars.append(el("figure", el("figcaption", system.name) if len(section.systems) > 1 else None, bar))
    rows = []
    for outcome in OUTCOMES:
        counts = [system.evaluation.funnel[outcome] for system in section.systems]
        if any(counts):
            cells = [el("td", f"{count:,}", " ", el("small", f"{100 * count / section.n:.1f}%")) for count in counts]
            swatch = el("span", class_=f"swatch b-{_CLASS[outcome]}", aria_hidden="true")
            rows.append(el("tr", el("th", swatch, " ", outcome, scope="row"), cells))
    names = [el("th", system.name, scope="col") for system in section.systems]
    header = el("tr", el("th", "outcome", scope="col"), names)
    return inside(bars, _scrolling("Outcomes", el("table", el("thead", header), el("tbody", rows))))


def _curves(section: Section) -> Html:
    recall = [
        charts.Line(
            _curve_name(system, name, len(section.systems)),
            tuple((k, at.value) for k, at in points),
            tuple((at.low, at.high) for _, at in points) if len(section.systems) == 1 else (),
        )
        for system in section.systems
        for name, points in (system.recall if len(section.systems) == 1 else system.recall[-1:])
    ]
    reach = [charts.Line(system.name, system.reach) for system in section.systems if system.reach]
    figures = []
    if recall:
        told = "Bands are 95% intervals." if len(section.systems) == 1 else "In the ranking that is packed from."
        figures.append(_figure("Recall at k", recall, "k, passages", "questions, %", "log", told))
    if reach:
        told = "Answer within the first tokens of what the reader was given, best passage first."
        figures.append(_figure("What the budget buys", reach, "tokens", "questions, %", "linear", told))
    budget = _budget_lines(section)
    if budget:
        told = "Systems whose names differ in the budget alone."
        figures.append(_figure("Against the token budget", budget, "budget, tokens a pass", "%", "log", told))
    return el("div", figures, class_="figures") if figures else Html("")


def _curve_name(system: SystemPart, name: str, systems: int) -> str:
    return name if systems == 1 else system.name


def _budget_lines(section: Section) -> list[charts.Line]:
    """Two lines for each family of systems, such as whole-256 and whole-512, that were given several budgets."""
    families: dict[str, dict[float, Evaluation]] = {}
    for system in section.systems:
        budget = system.evaluation.budget
        family = system.name.removesuffix(f"{budget}").rstrip("-_ ") if budget else system.name
        families.setdefault(family, {})[float(budget)] = system.evaluation
    lines = []
    for family, found in families.items():
        for metric in ("recall_in_context", "em") if len(found) > 1 else ():
            known = [(budget, s) for budget, item in sorted(found.items()) for s in item.scores if s.name == metric]
            points = tuple((budget, score.value) for budget, score in known)
            band = tuple((score.low, score.high) for _, score in known)
            name = f"{family}: {metric.replace('_', ' ')}"
            lines += [charts.Line(name, points, band if len(families) == 1 else ())] if points else []
    return lines


def _figure(
    title: str, lines: Sequence[charts.Line], x_label: str, y_label: str, scale: charts.Scale, note: str
) -> Html:
    label = f"{title}: {', '.join(line.name for line in lines)}"
    chart = charts.line_chart(lines, label=label, x_label=x_label, y_label=y_label, x_scale=scale)
    xs = sorted({x for line in lines for x, _ in line.points})
    rows = []
    for x in xs:
        values = [dict(line.points).get(x) for line in lines]
        rows.append((f"{x:,g}", *("" if value is None else f"{value:.1f}" for value in values)))
    numbers = Table("", (x_label, *(line.name for line in lines)), tuple(rows))
    return el(
        "figure",
        el("h3", title),
        el("p", note, class_="note"),
        chart,
        charts.legend([line.name for line in lines]),
        el("details", el("summary", "Numbers"), _table(numbers)),
        class_="block",
    )


def _kinds(section: Section) -> Html:
    blocks = []
    for heading, of, note in (
        ("By question word", "by_word", "The first question word of the question; by rule."),
        ("By answer type", "by_type", "What the first gold answer looks like; by rule."),
        ("By whether the collection has an answer", "by_ceiling", "Some passage, found or not."),
    ):
        parts = [(system, getattr(system, of)) for system in section.systems if getattr(system, of)]
        if parts:
            tables = [_group_table(system, groups, len(parts) > 1) for system, groups in parts]
            blocks.append(_block(f"Exact match {heading[0].lower()}{heading[1:]}", tables, note))
    return el("div", blocks, class_="figures")


def _group_table(system: SystemPart, groups: Sequence[Group], is_named: bool) -> Html:
    rows = []
    for group in groups:
        em = group.scores["em"]
        told = f"{em.value:.1f} [{em.low:.1f}, {em.high:.1f}]"
        bar = charts.interval_bar(em.value, em.low, em.high, label=f"{group.name}: exact match {told}")
        context = group.scores.get("recall_in_context")
        cells = [el("td", f"{group.n:,}"), el("td", bar, class_="wide"), el("td", told)]
        cells.append(el("td", "" if context is None else f"{context.value:.1f}"))
        rows.append(el("tr", el("th", group.name, scope="row"), cells))
    names = ("kind", "n", "", "exact match", "recall in context")
    header = el("tr", [el("th", name, scope="col") for name in names])
    caption = el("caption", system.name) if is_named else None
    return _scrolling(f"{system.name} by kind", el("table", caption, el("thead", header), el("tbody", rows)))


def _confidence(named: Sequence[tuple[str, Evaluation]]) -> Html:
    known = [(name, found) for name, item in named if (found := item.selective) is not None]
    return _block("Is the confidence right?", _table(confidence_table("", known))) if known else Html("")


def _stages(section: Section) -> Html:
    blocks = []
    for system in section.systems:
        whole = sum(stage.total for stage in system.stages)
        rows = []
        for stage in system.stages:
            share = 100 * stage.total / whole if whole else 0.0
            bar = charts.interval_bar(share, share, share, label=f"{share:.0f} percent of the time")
            numbers = (f"{stage.total:,.2f}", f"{1000 * stage.median:,.1f}", f"{1000 * stage.slow:,.1f}")
            shared = f"{stage.shared:,} taken from another run" if stage.shared else ""
            cells = [el("td", bar, class_="wide"), [el("td", number) for number in numbers], el("td", shared)]
            rows.append(el("tr", el("th", stage.stage, scope="row"), cells))
        names = ("stage", "share", "seconds", "median, ms", "95th percentile, ms", "")
        header = el("tr", [el("th", name, scope="col") for name in names])
        caption = el("caption", system.name) if len(section.systems) > 1 else None
        table = el("table", caption, el("thead", header), el("tbody", rows))
        slow = [
            el("li", f"{1000 * seconds:,.0f} ms ", el("q", section.texts.get(query_id, query_id)))
            for query_id, seconds in system.slowest
            if seconds > 0
        ]
        blocks.append(_scrolling(f"Times of {system.name}", table))
        if slow:
            blocks.append(el("details", el("summary", "The slowest questions"), el("ol", slow)))
    note = "Wall seconds of a question are its share of its batch's; the slowest stage first."
    return _block("Where the time goes", blocks, note)


def _made_of(section: Section) -> Html:
    rows = [
        el("tr", el("th", system.name, scope="row"), el("th", name, scope="row"), el("td", value, class_="words"))
        for system in section.systems
        for name, value in system.facts.items()
    ]
    table = el("table", el("tbody", rows))
    return el("details", el("summary", "What the runs were made of"), _scrolling("Provenance", table), class_="block")


def _table(table: Table) -> Html:
    header = el("tr", [el("th", name, scope="col") for name in table.columns])
    rows = [el("tr", el("th", row[0], scope="row"), [el("td", cell) for cell in row[1:]]) for row in table.rows]
    notes = [el("p", note, class_="note") for note in table.notes]
    shown = el("table", el("thead", header), el("tbody", rows))
    return inside(_scrolling(table.title or "Numbers", shown), notes)


def _scrolling(label: str, table: Html) -> Html:
    """A table that is wider than the screen scrolls by itself, by keyboard too."""
    return el("div", table, class_="scroll", tabindex=0, role="region", aria_label=label)


# --- questions --------------------------------------------------------------------------------------------------------


def _questions(section: Section, number: int) -> Html:
    several = len(section.systems) > 1
    cards = [_card(section, query_id) for query_id in section.sample]
    outcomes = [outcome for outcome in OUTCOMES if any(_last(section, q).outcome == outcome for q in section.sample)]
    options = [el("option", "every outcome", value="")]
    options += [el("option", outcome, value=outcome) for outcome in outcomes]
    controls: list[Child] = [el("label", "Outcome ", el("select", options, class_="pick"))]
    if several:
        controls.append(el("label", el("input", type="checkbox", class_="changed"), " only where systems differ"))
    controls.append(el("label", "Words ", el("input", type="search", class_="find")))
    controls.append(el("output", f"{len(cards)} shown", class_="count", aria_live="polite"))
    told = f"{len(cards)} of {section.n:,}, some of every outcome"
    told += "; up to half of them where systems differ." if several else "."
    key = el(
        "p",
        el("mark", "gold answer", class_="gold"),
        " ",
        el("mark", "what the reader said", class_="said"),
        " ",
        el("mark", "both", class_="gold said"),
        class_="note",
    )
    return el(
        "div",
        el("h3", "Questions"),
        el("p", told, class_="note"),
        key,
        el("form", controls, class_="filter", hidden=True),
        el("div", cards, class_="cards"),
        class_="block questions",
        id=f"q{number}",
    )


def _last(section: Section, query_id: str) -> QuestionResult:
    return section.systems[-1].shown[query_id].result


def _card(section: Section, query_id: str) -> Html:
    shown = [(system, system.shown[query_id]) for system in section.systems]
    last = shown[-1][1].result
    badges = [
        el("span", found.result.outcome, class_=f"badge b-{_CLASS[found.result.outcome]}", title=system.name)
        for system, found in shown
    ]
    summary = el("summary", badges, " ", el("span", section.texts[query_id], class_="question"))
    gold = " | ".join(last.answers) or "(none: saying nothing is right)"
    facts = el("p", el("b", "Gold "), gold, " ", el("small", query_id))
    differs = str(len({found.result.outcome for _, found in shown}) > 1).lower()
    parts = [_seen(system, found, section.matcher, len(shown) > 1) for system, found in shown]
    return el("details", summary, facts, parts, class_="card", data_outcome=last.outcome, data_differs=differs)


def _seen(system: SystemPart, shown: Shown, matcher: Matcher, is_named: bool) -> Html:
    """One question under one system: what it said, where the answer was lost, what it read."""
    result, trace = shown.result, shown.trace
    said = result.prediction or "(said nothing)"
    head = el("p", el("b", "Said "), said, " ", el("small", confidence(trace.answer)))
    hits: Sequence[Hit] = trace.contexts[-1].hits if trace.contexts else ()
    passages = [
        _passage(rank, hit.passage, f"{hit.source} {hit.score:.4g}", shown, matcher)
        for rank, hit in enumerate(hits[:_PASSAGES], start=1)
    ]
    more = el("p", f"and {len(hits) - _PASSAGES} more", class_="note") if len(hits) > _PASSAGES else None
    missed = None
    if shown.missed is not None:
        rank, passage = shown.missed
        missed = inside(
            el("p", f"Not read, though at rank {rank}:", class_="note"),
            el("ol", _passage(rank, passage, "not packed", shown, matcher), class_="passages missed"),
        )
    title = el("h4", system.name) if is_named else None
    return el(
        "div", title, head, el("p", shown.where), el("ol", passages, class_="passages"), more, missed, class_="seen"
    )


def _passage(rank: int, passage: Passage, note: str, shown: Shown, matcher: Matcher) -> Html:
    result = shown.result
    text = []
    for piece in pieces(passage.text, result.answers, result.prediction, matcher):
        kinds = [name for name, holds in (("gold", piece.is_gold), ("said", piece.is_said)) if holds]
        text.append(el("mark", piece.text, class_=" ".join(kinds)) if kinds else piece.text)
    head = el("span", el("b", passage.title or "(no title)"), " ", el("small", f"{passage.id}, {note}"))
    return el("li", head, el("p", text), value=rank)
