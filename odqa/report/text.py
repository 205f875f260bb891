"""Evaluations, traces and evidence as text: aligned for a terminal, or markdown. It measures nothing itself.

Whatever came from a collection or a model is stripped of control characters, so that a passage cannot drive a terminal.
"""

import json
import math
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from odqa.evaluate import (
    OUTCOMES,
    Check,
    Comparison,
    Difference,
    Evaluation,
    Gain,
    Interval,
    QuestionResult,
    Score,
    Selective,
    TextOf,
    judge,
)
from odqa.text import Matcher, answer_spans, has_answer
from odqa.types import Answer, Gold, Hit, PackedContext, Step, Trace

Style = Literal["text", "markdown"]
Named = Sequence[tuple[str, Evaluation]]  # the name of a system, and its evaluation on one question set

_WIDTH = 100  # characters a line of running text
_SIDE_BY_SIDE = 6  # our choice: more systems than this stand one below the other, their metrics side by side
_OPEN, _CLOSE = "\ue000", "\ue001"  # private use: mark an answer until lines are wrapped


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Table:
    """Cells of text under a title; the first column is flush left, the others flush right unless named in `left`."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def turned(self) -> "Table":
        """Rows as columns."""
        names, *cells = zip(self.columns, *self.rows, strict=True)
        return Table(self.title, names, tuple(cells), notes=self.notes)

    def text(self) -> str:
        widths = [max(len(row[i]) for row in (self.columns, *self.rows)) for i in range(len(self.columns))]
        lines = [self.title, self._row(self.columns, widths), "  ".join("-" * width for width in widths)]
        lines += [self._row(row, widths) for row in self.rows]
        return "\n".join([*lines, *self.notes])

    def markdown(self) -> str:
        rules = ["---" if self._is_left(i) else "---:" for i in range(len(self.columns))]
        rows = [[cell.replace("|", "\\|") for cell in row] for row in (self.columns, rules, *self.rows)]
        lines = [f"**{self.title}**", "", *(f"| {' | '.join(row)} |" for row in rows)]
        return "\n".join([*lines, *([""] if self.notes else []), *self.notes])

    def _row(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        aligned = [
            cell.ljust(width) if self._is_left(i) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()

    def _is_left(self, column: int) -> bool:
        return column == 0 or self.columns[column] in self.left


@dataclass(frozen=True, slots=True)
class Published:
    """A figure of the literature: of which system, and where it stands."""

    name: str
    metric: str
    value: float
    source: str


def render(
    evaluations: Named,
    checks: Sequence[tuple[str, Check]] = (),
    *,
    gains: Sequence[Gain] = (),
    published: Sequence[Published] = (),
    style: Style = "text",
) -> str:
    """The whole report: per question set scores, gains, funnel, times; then the expectations of all; then others'."""
    tables: list[Table] = []
    for (question_set, split), group in _by_question_set(evaluations).items():
        title = f"{question_set} {split}".strip()
        here = [gain for gain in gains if (gain.question_set, gain.split) == (question_set, split)]
        known = [(name, found) for name, item in group if (found := item.selective) is not None]
        scores, funnel = score_table(title, group), funnel_table(title, group)
        confidence = [confidence_table(title, known)] if known else []
        if len(group) > _SIDE_BY_SIDE:
            scores, funnel, confidence = scores.turned(), funnel.turned(), [table.turned() for table in confidence]
        sampled = [(name, item.picks) for name, item in group if item.picks]
        tables += [scores, *([gain_table(title, here)] if here else []), funnel, *confidence]
        tables += [picks_table(title, sampled)] if sampled else []
        tables += [stage_table(title, group)] if any(item.measured.get("stages") for _, item in group) else []
    tables += [check_table(checks)] if checks else []
    tables += [published_table(published)] if published else []
    return join(tables, style=style)


def join(tables: Iterable[Table], *, style: Style = "text") -> str:
    """Tables one below the other."""
    return "\n\n".join(table.text() if style == "text" else table.markdown() for table in tables) + "\n"


def score_table(title: str, evaluations: Named) -> Table:
    """One row a metric, one column a system; the token budget stands right below the exact match that it bought.

    With a re-ranker among the systems final_recall stands for rerank_recall, which it equals there; without one it
    equals recall, and is left out.
    """
    repeated = "rerank_recall@" if any(item.is_reranked for _, item in evaluations) else "final_recall@"
    names = list(dict.fromkeys(score.name for _, item in evaluations for score in item.scores))
    names = [name for name in names if not name.startswith(repeated)]
    found = [{score.name: score for score in item.scores} for _, item in evaluations]
    rows = []
    for name in names:
        scores = [scores.get(name) for scores in found]
        any_score = next(score for score in scores if score is not None)
        cells = [_interval(score) if score else "" for score in scores]
        rows.append((name, *cells, any_score.unit, str(any_score.n), any_score.matcher))
        if name == "em":
            rows.append(("budget", *(_budget(item) for _, item in evaluations), "tokens/pass", "", ""))
    first = evaluations[0][1]
    notes = [f"[95% interval: bootstrap over questions, {first.resamples} resamples, seed {first.seed}]"]
    notes += dict.fromkeys(f"{name}: {note}" for name, item in evaluations for note in item.notes)
    columns = ("metric", *(name for name, _ in evaluations), "unit", "n", "matcher")
    return Table(title, columns, tuple(rows), frozenset({"unit", "matcher"}), tuple(notes))


def confidence_table(title: str, systems: Sequence[tuple[str, Selective]]) -> Table:
    """How well the calibrated confidence tells right answers from wrong ones; see `odqa.evaluate.Selective`."""

    def cell(value: Interval | float | None) -> str:
        if isinstance(value, Interval):
            return f"{value.value:.1f} [{value.low:.1f}, {value.high:.1f}]"
        return "-" if value is None else f"{value:.1f}"

    rows = [
        ("AUROC, right against wrong answers", *(cell(found.auroc_right) for _, found in systems)),
        ("AUROC, answerable against unanswerable", *(cell(found.auroc_answerable) for _, found in systems)),
        ("area under the risk-coverage curve", *(cell(found.aurc) for _, found in systems)),
        ("expected calibration error", *(cell(found.calibration_error) for _, found in systems)),
    ]
    return Table(f"{title}: is the confidence right?", ("%", *(name for name, _ in systems)), tuple(rows))


def funnel_table(title: str, evaluations: Named) -> Table:
    """Where the answer was lost: questions per outcome and their share; below, what later passes changed."""
    funnels = [item.funnel for _, item in evaluations]
    totals = [sum(funnel.values()) for funnel in funnels]
    rows = [
        (outcome, *(_share(funnel[outcome], n) for funnel, n in zip(funnels, totals, strict=True)))
        for outcome in OUTCOMES
    ]
    total = ("all", *(_share(n, n) for n in totals))
    return Table(
        f"{title}: where was the answer lost?",
        ("outcome", *(name for name, _ in evaluations)),
        (*rows, total, *_re_passes([item for _, item in evaluations], totals)),
    )


def picks_table(title: str, systems: Sequence[tuple[str, Mapping[str, float]]]) -> Table:
    """What choosing among the samples would have given beside reading them again: exact match; see `Evaluation`."""
    names = list(dict.fromkeys(name for _, found in systems for name in found))
    rows = [(name, *(f"{found[name]:.1f}" if name in found else "-" for _, found in systems)) for name in names]
    return Table(f"{title}: candidates", ("em, %", *(name for name, _ in systems)), tuple(rows))


def _re_passes(evaluations: Sequence[Evaluation], totals: Sequence[int]) -> list[tuple[str, ...]]:
    """Rows for each pass after the first: how many questions it read, mended and undid."""
    rows = []
    found = [item.re_passes for item in evaluations]
    for number in sorted({number for again in found for number in again}):
        known = list(zip([again.get(number) for again in found], totals, strict=True))
        for what, field in ((f"read by pass {number}", "read"), ("mended", "mended"), ("undone", "undone")):
            name = what if field == "read" else f"{what} by pass {number}"
            rows.append((name, *("-" if one is None else _share(getattr(one, field), n) for one, n in known)))
    return rows


def stage_table(title: str, evaluations: Named) -> Table:
    """Wall seconds and questions a second of each stage, and the peak memory of the process that ran them.

    A stage whose result was taken from another run is "shared": it has no time here, and what was done for other
    questions is counted over those alone.
    """
    rows, notes = [], []
    for name, item in evaluations:
        for stage, time in item.measured.get("stages", {}).items():
            shared = int(time.get("shared", 0))
            seconds, questions = float(time["seconds"]), int(time["questions"]) - shared
            rate = f"{questions / seconds:,.1f}" if seconds > 0 else "-"
            if questions > 0:
                rows.append((name, stage, f"{seconds:,.2f}", str(questions), rate))
            if shared > 0:
                rows.append((name, stage, "shared", str(shared), "-"))
        for what in ("retrieval", "ranking"):
            source = item.measured.get(f"{what}_from")
            notes += [f"{name}: {what} taken from the run {source}"] if source else []
        spent = item.measured.get("reader")
        notes += [f"{name}: the reader's server: {_counted(spent)}"] if spent else []
        peak = item.measured.get("peak_memory_bytes")
        device = f", device {item.measured['device']}" if "device" in item.measured else ""
        notes += [f"{name}: peak memory {peak / 2**20:,.0f} MiB{device}"] if peak else []
    if len(evaluations) > 1:
        notes.append("systems share pair scores and row readings: of a later one only what was new took time")
    columns = ("system", "stage", "seconds", "questions", "questions/s")
    return Table(f"{title}: time", columns, tuple(rows), frozenset({"stage"}), tuple(notes))


def check_table(checks: Sequence[tuple[str, Check]]) -> Table:
    """Expected numbers beside the found ones; a missed one says NO."""
    rows = [
        (
            name,
            f"{check.found.question_set} {check.found.split}".strip(),
            check.expected.name,
            f"{'at least ' if check.expected.is_lower_bound else ''}{check.expected.value:.1f}",
            "-" if check.expected.is_lower_bound else f"{check.expected.tolerance:.1f}",
            _interval(check.found) if check.expected.must_be_clear else f"{check.found.value:.1f}",
            "yes" if check.ok else "NO",
        )
        for name, check in checks
    ]
    columns = ("system", "questions", "metric", "expected", "tolerance", "found", "ok")
    return Table("expectations", columns, tuple(rows), frozenset({"questions", "metric", "ok"}))


def gain_table(title: str, gains: Sequence[Gain]) -> Table:
    """One row a pair of systems, one column a metric: the paired difference; * where its interval leaves 0 out."""
    metrics = list(dict.fromkeys(item.name for gain in gains for item in gain.differences))
    rows = []
    for gain in gains:
        found = {item.name: item for item in gain.differences}
        cells = [_difference(found[name]) if name in found else "" for name in metrics]
        counts = dict.fromkeys(str(item.n) for item in gain.differences)
        rows.append((gain.first, gain.second, *cells, "/".join(counts)))
    notes = ("[95% interval: paired bootstrap over questions; * leaves 0 out]",)
    return Table(f"{title}: gains", ("from", "to", *metrics, "n"), tuple(rows), frozenset({"to"}), notes)


def published_table(figures: Sequence[Published]) -> Table:
    """What others report; nothing of it was measured here."""
    rows = tuple((item.name, item.metric, f"{item.value:.1f}", item.source) for item in figures)
    columns = ("system", "metric", "value", "source")
    return Table("published, not run", columns, rows, frozenset({"metric", "source"}))


def comparison_table(first: str, second: str, comparison: Comparison) -> Table:
    """Metrics of two runs side by side with the paired difference."""
    rows = [
        (
            item.name,
            f"{item.first:.1f}",
            f"{item.second:.1f}",
            _delta(item),
            str(item.n),
            "yes" if item.is_clear else "no",
        )
        for item in comparison.differences
    ]
    columns = ("metric", first, second, "difference", "n", "leaves 0 out")
    won, lost, moved = (len(pairs) for pairs in (comparison.won, comparison.lost, comparison.moved))
    changed = (
        f"{won + lost + moved} questions changed: {won} became right, {lost} became wrong, {moved} ended elsewhere"
    )
    notes = ("[95% interval: paired bootstrap over questions]", changed)
    return Table(f"{second} against {first}", columns, tuple(rows), frozenset({"leaves 0 out"}), notes)


def changed_tables(
    first: str, second: str, comparison: Comparison, texts: Mapping[str, str] | None = None
) -> list[Table]:
    """The questions that are not the same in two runs, both ways: became right, became wrong, ended elsewhere.

    `texts` are the questions by id; a kind of change without questions has no table.
    """
    kinds = (
        ("became right", comparison.won),
        ("became wrong", comparison.lost),
        ("are as right or wrong as before, for another reason", comparison.moved),
    )
    columns = ("id", *(("question",) if texts is not None else ()), "gold", first, second)
    tables = []
    for what, pairs in kinds:
        rows = tuple(
            (
                a.id,
                *((_shortened(texts.get(a.id, "")),) if texts is not None else ()),
                _shortened(", ".join(a.answers)),
                _verdict(a),
                _verdict(b),
            )
            for a, b in pairs
        )
        if rows:
            tables.append(Table(f"{len(rows)} questions {what}", columns, rows, frozenset(columns)))
    return tables


def _by_question_set(evaluations: Named) -> dict[tuple[str, str], list[tuple[str, Evaluation]]]:
    groups: dict[tuple[str, str], list[tuple[str, Evaluation]]] = {}
    for name, item in evaluations:
        groups.setdefault((item.question_set, item.split), []).append((name, item))
    return groups


def _counted(spent: Mapping[str, int]) -> str:
    """What a reader behind a server cost: 120 requests, 4 from cache, 3 retries, ..."""
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in spent.items())


def _interval(score: Score) -> str:
    return f"{score.value:.1f} [{score.low:.1f}, {score.high:.1f}]"


def _delta(item: Difference) -> str:
    return f"{item.delta.value:+.1f} [{item.delta.low:+.1f}, {item.delta.high:+.1f}]"


def _difference(item: Difference) -> str:
    return f"{_delta(item)} {'*' if item.is_clear else ' '}"


def _budget(evaluation: Evaluation) -> str:
    return str(evaluation.budget) if evaluation.budget else "-"


def _share(count: int, n: int) -> str:
    return f"{count} ({100 * count / n:.1f}%)"


def _verdict(question: QuestionResult) -> str:
    return f"{_clean(question.prediction) or '(abstained)'}: {question.outcome}"


# --- one question -----------------------------------------------------------------------------------------------------


def evidence(trace: Trace, *, terminal: bool = False, verbose: bool = False) -> str:
    """What `odqa ask` shows below an answer: confidence, the packed passages with the answer marked, the stage table.

    The answer is in bold on a terminal, else in [[brackets]]. `verbose` adds what each pass said and why there was
    another, with its candidates and new passages.
    """
    answer = trace.answer
    blocks = [f"{_clean(answer.text) or '(abstained)'}  ({confidence(answer)})"]
    blocks += ["\n".join(_passes(trace))] if verbose else []
    if trace.contexts:
        blocks.append(_context(trace, trace.contexts[-1], answer, terminal=terminal))
    blocks.append(_times(trace.steps).text())
    return "\n\n".join(blocks) + "\n"


def _passes(trace: Trace) -> list[str]:
    """Pass by pass: why it was made, what it was given that was new, what it answered, and whether that changed."""
    lines: list[str] = []
    decided = {step.pass_no: step.notes for step in trace.steps if step.stage == "recurse"}
    for number, answer in enumerate(trace.answers, start=1):
        lines.append(f"pass {number}")
        if number in decided:
            lines += _reason(decided[number])
        if number <= len(trace.contexts):
            context = trace.contexts[number - 1]
            before = {hit.passage.id for earlier in trace.contexts[: number - 1] for hit in earlier.hits}
            new = [hit.passage.id for hit in context.hits if hit.passage.id not in before]
            told = f", new: {', '.join(new) or 'none'}" if number > 1 else ""
            lines.append(f"  packed {len(context.hits)} passages{told}; {context.tokens} tokens")
            lines += [f"  shown candidates: {_clean('; '.join(context.candidates))}"] if context.candidates else []
        changed = ""
        if number > 1:
            same = answer.text == trace.answers[number - 2].text
            changed = ", unchanged" if same else f", was {_clean(trace.answers[number - 2].text) or '(abstained)'}"
        lines += _dismissed(trace, number)
        lines.append(f"  answer: {_clean(answer.text) or '(abstained)'}  ({confidence(answer)}{changed})")
    stopped = decided.get(len(trace.answers) + 1)
    return [*lines, "no further pass", *_reason(stopped)] if stopped is not None else lines


def _dismissed(trace: Trace, number: int) -> list[str]:
    """What a pass answered that does not stand, because the pass before was surer."""
    found = [step.notes["not kept"] for step in trace.steps if step.pass_no == number and "not kept" in step.notes]
    return [f"  not kept: {_clean(one['text']) or '(abstained)'}" for one in found if isinstance(one, Mapping)]


def _reason(notes: Mapping[str, object]) -> list[str]:
    """What a recursion decided, and what it said about it."""
    lines = [f"  decision: {notes.get('decision')}"]
    for key in ("why", "query", "confidence", "below"):
        if key in notes:
            value = notes[key]
            lines.append(f"  {key}: {value:.3g}" if isinstance(value, float) else f"  {key}: {_clean(str(value))}")
    candidates = notes.get("candidates")
    for one in candidates if isinstance(candidates, list) else []:
        lines.append(f"    {one['logprob']:10.4f}  x{one['count']}  {_clean(one['text'])}")
    return lines


def explain_question(
    trace: Trace,
    gold: Gold | None = None,
    *,
    result: QuestionResult | None = None,
    text_of: TextOf | None = None,
    matcher: Matcher = "string",
    depth: int = 10,
) -> str:
    """One question's whole trace, stage by stage; with gold answers, where they were lost.

    The first `depth` passages of each stage are listed. With gold, `*` marks passages that hold an answer. `result` is
    the question's row of an evaluation; it brings gold and outcome along. Without it and without `text_of` only packed
    passages can be judged: a loss before the reader is then not told apart by stage.
    """
    if result is not None:
        gold = Gold(result.id, result.answers)
    texts = {hit.passage.id: hit.passage.text for context in trace.contexts for hit in context.hits}
    lines = [f"question {trace.query.id}: {_clean(trace.query.text)}"]
    marked: set[str] = set()
    if gold is not None:
        look_up = text_of or (lambda passage_id: texts.get(passage_id, ""))
        lines += [f"gold: {_clean(' | '.join(gold.answers)) or '(none: abstaining is right)'}"]
        is_complete = result is not None or text_of is not None
        result = result or judge(trace, gold, look_up, matcher=matcher)
        lines += [f"outcome: {_outcome(result, is_complete=is_complete)}"]
        shown = dict.fromkeys(passage_id for step in trace.steps for passage_id in step.ids[:depth])
        marked = {passage_id for passage_id in shown if has_answer(look_up(passage_id), gold.answers, matcher)}
    titles = {hit.passage.id: hit.passage.title for context in trace.contexts for hit in context.hits}
    pending = list(trace.answers)
    for number in sorted({step.pass_no for step in trace.steps}):
        lines += ["", f"pass {number}"]
        for step in (step for step in trace.steps if step.pass_no == number):
            lines += _step(step, titles, marked, depth)
            if step.stage in ("read", "read latent") and pending:
                lines += _answer(pending.pop(0))
    for number, context in enumerate(trace.contexts, start=1):
        lines += ["", f"context {number}", _context(trace, context, trace.answer, terminal=False)]
    return "\n".join(lines) + "\n"


def confidence(answer: Answer) -> str:
    """The calibrated confidence; else the score, as a probability where it is one (a log-probability in nats)."""
    if answer.confidence is not None:
        return f"confidence {answer.confidence:.2f}"
    if math.isnan(answer.score):
        return "confidence unknown"
    if math.isfinite(answer.score) and answer.score <= 0:
        return f"confidence {math.exp(answer.score):.2f}, uncalibrated"
    return f"score {answer.score:.4g}"


def mark(text: str, spans: Iterable[tuple[int, int]], opening: str = "[[", closing: str = "]]") -> str:
    """Put marks around the spans of a text; spans that touch or overlap become one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    for start, end in reversed(merged):
        text = f"{text[:start]}{opening}{text[start:end]}{closing}{text[end:]}"
    return text


def _outcome(result: QuestionResult, *, is_complete: bool) -> str:
    lost_early = ("not retrieved", "reranked away", "not packed")
    if not is_complete and result.outcome in lost_early:
        return f"{', '.join(lost_early[:2])} or {lost_early[2]} (the index is needed to tell which)"
    return result.outcome


def _context(trace: Trace, context: PackedContext, answer: Answer, *, terminal: bool) -> str:
    prices = _prices(trace, context)
    windows = len(context.by_window())
    where = f" in {windows} windows" if windows > 1 else ""
    blocks = [f"packed {len(context.hits)} passages{where}, {context.tokens} of {context.budget} tokens"]
    for rank, hit in enumerate(context.hits, start=1):
        price = f", {prices[hit.passage.id]} tokens" if hit.passage.id in prices else ""
        title = _clean(hit.passage.title) or "(no title)"
        window = f", window {context.windows[rank - 1]}" if windows > 1 else ""
        head = f"{rank}. {title}  [{hit.passage.id}, {hit.source} {hit.score:.4g}{price}{window}]"
        blocks.append(f"{head}\n{_passage_text(hit, answer, terminal=terminal)}")
    if context.dropped:
        reasons = ", ".join(f"{item.passage_id} ({item.reason}, {item.tokens} tokens)" for item in context.dropped[:5])
        more = f" and {len(context.dropped) - 5} more" if len(context.dropped) > 5 else ""
        blocks.append(textwrap.fill(f"dropped: {reasons}{more}", _WIDTH))
    return "\n\n".join(blocks)


def _prices(trace: Trace, context: PackedContext) -> dict[str, int]:
    """Tokens of each packed passage, from the pack step that packed these very passages."""
    ids = tuple(hit.passage.id for hit in context.hits)
    for step in trace.steps:
        if step.stage == "pack" and step.ids == ids and len(step.tokens) == len(ids):
            return dict(zip(ids, step.tokens, strict=True))
    return {}


def _passage_text(hit: Hit, answer: Answer, *, terminal: bool) -> str:
    spans = answer_spans(hit.passage.text, [answer.text]) if answer.text else []
    spans += [
        (candidate.start, candidate.end)
        for candidate in answer.candidates
        if candidate.passage_id == hit.passage.id and candidate.text == answer.text
        if candidate.start is not None and candidate.end is not None
    ]
    text = mark(_clean(hit.passage.text), spans, _OPEN, _CLOSE)  # cleaning keeps the length
    wrapped = textwrap.fill(text, _WIDTH, initial_indent="   ", subsequent_indent="   ", break_on_hyphens=False)
    opening, closing = ("\x1b[1m", "\x1b[0m") if terminal else ("[[", "]]")
    return wrapped.replace(_OPEN, opening).replace(_CLOSE, closing)


def _times(steps: Sequence[Step]) -> Table:
    rows = [
        (step.stage, str(step.pass_no), str(len(step.ids) or "-"), _seconds(step.seconds), str(step.batch or "-"))
        for step in steps
    ]
    total = sum(step.seconds for step in steps)
    return Table(
        "stages", ("stage", "pass", "passages", "seconds", "batch"), (*rows, ("all", "", "", _seconds(total), ""))
    )


def _step(step: Step, titles: Mapping[str, str], marked: set[str], depth: int) -> list[str]:
    counts = f", {len(step.ids)} passages" if step.ids else ""
    tokens = f", {sum(step.tokens)} tokens" if step.tokens else ""
    lines = [f"  {step.stage}: {_seconds(step.seconds)} s{counts}{tokens}"]
    for place, passage_id in enumerate(step.ids[:depth]):
        score = f"{step.scores[place]:10.4f}" if place < len(step.scores) else " " * 10
        price = f"{step.tokens[place]:5d} tokens" if place < len(step.tokens) else ""
        star, title = "*" if passage_id in marked else " ", _clean(titles.get(passage_id, ""))
        row = f"    {place + 1:3d} {star} {score}  {passage_id} {price} {title}"
        lines.append(row.rstrip())
    lines += [f"        and {len(step.ids) - depth} more"] if len(step.ids) > depth else []
    return lines + [f"    {key}: {_clean(json.dumps(value, ensure_ascii=False))}" for key, value in step.notes.items()]


def _answer(answer: Answer) -> list[str]:
    lines = [f"    answer: {_clean(answer.text) or '(abstained)'}  ({confidence(answer)})"]
    for candidate in answer.candidates[:5]:
        where = f"  [{candidate.passage_id}]" if candidate.passage_id else ""
        lines.append(f"      {candidate.logprob:10.4f}  {_clean(candidate.text)}{where}")
    return lines


def _seconds(seconds: float) -> str:
    return f"{seconds:.4f}" if math.isfinite(seconds) else "-"


def _shortened(text: str) -> str:
    """At most 60 characters, for a cell of a table."""
    return textwrap.shorten(_clean(text), 60, placeholder=" ...")


def _clean(text: str) -> str:
    """Control and private characters as blanks, so that the length stays."""
    return "".join(" " if unicodedata.category(character) in ("Cc", "Co", "Cs") else character for character in text)
