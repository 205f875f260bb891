"""Figures: metrics against a setting, risk against coverage, and curves of a training, as SVG or PNG.

It draws what it is given and measures nothing. matplotlib (the extra `plots`) is loaded when a figure is drawn. Colours
are those of Okabe & Ito (2008), which colour-blind readers can tell apart; lines also differ in their marks and dashes,
so that a grey print can be read.

The invariant: the same numbers and the same matplotlib give the same bytes; no date, no random id.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from odqa.errors import DataError, MissingExtra
from odqa.evaluate import Evaluation, Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Scale = Literal["linear", "log"]

# Okabe & Ito 2008, without the yellow, which is too light for a line on white; black last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKS = "os^Dvx*"
_DASHES = ("-", "--", "-.", ":")
_PANEL = (4.6, 3.4)  # inches
_MOST_TICKS = 16  # our choice: more labels would lie on one another
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "odqa",  # ids inside of an SVG follow from its content
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True)
class Measured:
    """A system on one question set: its name, its place on the x axis, its scores."""

    name: str
    x: float
    evaluation: Evaluation

    @property
    def line(self) -> str:
        """The name without the number that places it: "whole" for "whole-160" at 160, else the whole name."""
        return re.sub(rf"[\W_]*{re.escape(f'{self.x:g}')}$", "", self.name) or self.name


def save_figure(
    path: Path, systems: Sequence[Measured], *, metrics: Sequence[str], x_label: str, x_scale: Scale = "linear"
) -> None:
    """Draw metrics against x: a column of panels for each question set, a row for each metric, a line for each group.

    Systems with the same `Measured.line` are joined; bands are the scores' 95% intervals. The ending of `path` is the
    format. Raises DataError for a metric that was not measured, MissingExtra without matplotlib.
    """
    sets: dict[str, list[Measured]] = {}
    for system in systems:
        sets.setdefault(f"{system.evaluation.question_set} {system.evaluation.split}".strip(), []).append(system)
    styles = {name: number for number, name in enumerate(dict.fromkeys(system.line for system in systems))}

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(len(metrics), len(sets), squeeze=False, sharex=True, sharey="row")
        for column, (title, group) in enumerate(sets.items()):
            for row, metric in enumerate(metrics):
                axes = panels[row, column]
                _draw_metric(axes, group, metric, styles)
                _scale_x(axes, sorted({system.x for system in systems}), x_scale)
                if row == 0:
                    axes.set_title(f"{title} (n = {len(group[0].evaluation.questions)})")
                if row == len(metrics) - 1:
                    axes.set_xlabel(x_label)
        _legend(figure, panels[0, 0], "bands: 95% intervals")

    _save(path, (_PANEL[0] * len(sets), _PANEL[1] * len(metrics) + 0.5), draw)


def risk_coverage(
    path: Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str = "",
    points: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Draw risk-coverage curves: by label, the coverages and the risk at each, both as shares from 0 to 1.

    Coverage is the share of questions that are answered, risk the share of wrong ones among them; both are shown in
    percent. A curve is a staircase: between two coverages the risk of the larger one holds. `points` marks a place on a
    curve of the same label, such as the chosen threshold. Source: El-Yaniv & Wiener 2010. Raises ValueError if the two
    sequences of a curve differ in length, MissingExtra without matplotlib.
    """
    for label, (coverage, risk) in curves.items():
        if len(coverage) != len(risk):
            raise ValueError(f"curve {label}: {len(coverage)} coverages and {len(risk)} risks; one of each is needed")

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for number, (label, (coverage, risk)) in enumerate(curves.items()):
            style = _style(number)
            percent = [100.0 * value for value in coverage], [100.0 * value for value in risk]
            axes.plot(*percent, label=label, drawstyle="steps-pre", color=style["color"], linestyle=style["linestyle"])
            if points is not None and label in points:
                x, y = points[label]
                axes.plot([100.0 * x], [100.0 * y], color=style["color"], marker=style["marker"])
        axes.set(xlim=(0, 100), xlabel="coverage, % of questions answered", ylabel="risk, % wrong among the answered")
        axes.set_ylim(bottom=0)
        axes.set_title(title)
        _legend(figure, axes)

    _save(path, (_PANEL[0], _PANEL[1] + 0.5), draw)


def training_curve(
    path: Path, curves: Mapping[str, Sequence[Mapping[str, float]]], *, scores: Sequence[str] = ()
) -> None:
    """Draw trainings by label: loss against steps, and below it a panel for each of `scores` (tune EM, ...).

    A curve is what `odqa.frozen.fit` gives and `curve.json` holds: entries with "step", "loss" in nats, and scores
    where there was an evaluation. Raises DataError for a score that no entry has, MissingExtra without matplotlib.
    """
    for name in scores:
        if not any(name in entry for curve in curves.values() for entry in curve):
            raise DataError(f"a training curve cannot show {name}: it was not evaluated.")

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(1 + len(scores), 1, squeeze=False, sharex=True)[:, 0]
        for number, (label, curve) in enumerate(curves.items()):
            for axes, name in zip(panels, ("loss", *scores), strict=True):
                known = [(entry["step"], entry[name]) for entry in curve if name in entry]
                style = _style(number) | ({"marker": ""} if name == "loss" else {})
                axes.plot(
                    [step for step, _ in known], [value for _, value in known], label=label, markersize=4, **style
                )
        panels[0].set_ylabel("loss, nats")
        for axes, name in zip(panels[1:], scores, strict=True):
            axes.set_ylabel(name.replace("_", " "))
        panels[-1].set_xlabel("steps")
        _legend(figure, panels[0])

    _save(path, (_PANEL[0], _PANEL[1] * (1 + len(scores)) + 0.5), draw)


def lines(
    path: Path,
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    *,
    x_label: str,
    x_scale: Scale = "linear",
    logarithmic: Sequence[str] = (),
) -> None:
    """Draw a panel for each label of a y axis, and in it lines by label: their xs and ys.

    The axes in `logarithmic` are so; the others begin at 0. Raises MissingExtra without matplotlib.
    """
    labels = list(dict.fromkeys(label for panel in panels.values() for label in panel))

    def draw(figure: "Figure") -> None:
        columns = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (y_label, panel) in zip(columns, panels.items(), strict=True):
            for label, (xs, ys) in panel.items():
                axes.plot(xs, ys, label=label, markersize=4, **_style(labels.index(label)))
            axes.set(xlabel=x_label, ylabel=y_label)
            _scale_x(axes, sorted({x for xs, _ in panel.values() for x in xs}), x_scale)
            if y_label in logarithmic:
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
        shown = {label: line for axes in columns for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(
            shown.values(), shown.keys(), loc="outside lower center", ncols=min(4 if len(panels) > 1 else 3, len(shown))
        )

    _save(path, (_PANEL[0] * len(panels), _PANEL[1] + 0.5), draw)


def _draw_metric(axes: "Axes", group: Sequence[Measured], metric: str, styles: Mapping[str, int]) -> None:
    lines: dict[str, list[tuple[float, Score]]] = {}
    for system in group:
        lines.setdefault(system.line, []).append((system.x, system.evaluation.score(metric)))
    for name, found in lines.items():
        points = sorted(found, key=lambda point: point[0])
        xs, scores = [x for x, _ in points], [score for _, score in points]
        style = _style(styles[name])
        axes.plot(xs, [score.value for score in scores], label=name, markersize=4, **style)
        band = [score.low for score in scores], [score.high for score in scores]
        if len(points) > 1:
            axes.fill_between(xs, *band, color=style["color"], alpha=0.12, linewidth=0)
        else:
            axes.vlines(xs, *band, color=style["color"], alpha=0.5)
    unit = next(iter(lines.values()))[0][1].unit
    axes.set_ylabel(f"{metric.replace('_', ' ')}, {unit}")


def _scale_x(axes: "Axes", places: Sequence[float], scale: Scale) -> None:
    """Ticks stand where something was measured, unless that is at very many places."""
    if scale == "log":
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    if len(places) <= _MOST_TICKS:
        axes.set_xticks(places, [f"{place:g}" for place in places], rotation=45)


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": _MARKS[number % len(_MARKS)],
        "linestyle": _DASHES[number % len(_DASHES)],
    }


def _legend(figure: "Figure", axes: "Axes", title: str | None = None) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = min(4, max(1, len(labels)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, title=title)


def _save(path: Path, inches: tuple[float, float], draw: Callable[["Figure"], None]) -> None:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("a figure", "matplotlib", "plots") from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without these, a file holds the time it was made and the version it was made with.
        metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, metadata=metadata, dpi=150)
