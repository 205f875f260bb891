"""Charts as inline SVG: lines with bands, stacked shares, a value with its interval. No library, no script, no date.

Colours are names of the page's style sheet (`--c0` ... `--c6`), so that they follow a dark or light system; lines also
differ in their dashes, so that a grey print can be read. Each chart is an image with a spoken label; the page puts the
numbers beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from odqa.report.markup import Html, el

Scale = Literal["linear", "log"]

_WIDTH, _HEIGHT = 460, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 12, 44  # margins for the labels of the axes
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
COLOURS = 7


@dataclass(frozen=True, slots=True)
class Line:
    """Points (x, percent) under a name; `band` holds the ends of each point's interval."""

    name: str
    points: tuple[tuple[float, float], ...]
    band: tuple[tuple[float, float], ...] = ()


def line_chart(lines: Sequence[Line], *, label: str, x_label: str, y_label: str, x_scale: Scale = "linear") -> Html:
    """Lines over one x axis; y in percent, from the nearest multiple of 20 below the data to 100.

    Raises ValueError without points.
    """
    xs = sorted({x for line in lines for x, _ in line.points})
    if not xs:
        raise ValueError("a chart needs at least one point")
    lowest = min([y for line in lines for _, y in line.points] + [low for line in lines for low, _ in line.band])
    frame = _Frame(xs[0], xs[-1], max(0.0, 20 * math.floor((lowest - 2) / 20)), x_scale)
    shapes = [*_axes(frame, xs, x_label, y_label)]
    for number, line in enumerate(lines):
        shapes += _draw(frame, line, number)
    return el("svg", shapes, class_="chart", viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=label)


@dataclass(frozen=True, slots=True)
class _Frame:
    """From data to pixels."""

    first: float
    last: float
    bottom: float  # percent at the foot of the y axis; 100 is its top
    scale: Scale

    def x(self, value: float) -> float:
        first, last, at = (math.log(v) if self.scale == "log" else v for v in (self.first, self.last, value))
        share = (at - first) / (last - first) if last > first else 0.5
        return round(_LEFT + 8 + share * (_WIDTH - _LEFT - _RIGHT - 16), 1)

    def y(self, percent: float) -> float:
        share = (percent - self.bottom) / (100 - self.bottom)
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)


def _axes(frame: _Frame, xs: Sequence[float], x_label: str, y_label: str) -> list[Html]:
    shapes = []
    step = 20 if frame.bottom < 60 else 10
    for percent in range(int(frame.bottom), 101, step):
        y = frame.y(percent)
        shapes.append(el("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        shapes.append(el("text", str(percent), x=_LEFT - 8, y=y + 4, class_="tick", text_anchor="end"))
    taken = -math.inf
    for x in xs:
        if frame.x(x) - taken >= 36:  # room for a label
            taken = frame.x(x)
            shapes.append(el("text", f"{x:,g}", x=taken, y=_HEIGHT - _BOTTOM + 18, class_="tick", text_anchor="middle"))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    shapes.append(el("text", x_label, x=middle, y=_HEIGHT - 6, class_="axis", text_anchor="middle"))
    turn = f"rotate(-90 12 {(_HEIGHT - _BOTTOM) / 2})"
    height = (_HEIGHT - _BOTTOM) / 2
    return [*shapes, el("text", y_label, x=12, y=height, transform=turn, class_="axis", text_anchor="middle")]


def _draw(frame: _Frame, line: Line, number: int) -> list[Html]:
    colour = f"var(--c{number % COLOURS})"
    places = [(frame.x(x), frame.y(y)) for x, y in line.points]
    shapes = []
    if line.band and len(places) > 1:
        upper = [(x, frame.y(high)) for (x, _), (_, high) in zip(places, line.band, strict=True)]
        lower = [(x, frame.y(low)) for (x, _), (low, _) in zip(places, line.band, strict=True)]
        shapes.append(el("polygon", points=_path([*upper, *reversed(lower)]), fill=colour, class_="band"))
    elif line.band:
        (x, _), (low, high) = places[0], line.band[0]
        shapes.append(el("line", x1=x, x2=x, y1=frame.y(low), y2=frame.y(high), stroke=colour, class_="line"))
    dashes = _DASHES[number % len(_DASHES)] or None
    shapes.append(el("polyline", points=_path(places), stroke=colour, stroke_dasharray=dashes, class_="line"))
    for (x, y), (value, percent) in zip(places, line.points, strict=True):
        told = el("title", f"{line.name}: {percent:.1f} % at {value:,g}")
        shapes.append(el("circle", told, cx=x, cy=y, r=3, fill=colour))
    return shapes


def _path(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in places)


def interval_bar(value: float, low: float, high: float, *, label: str) -> Html:
    """A bar from 0 to `value` percent with a whisker for its interval."""
    shapes = [
        el("rect", x=0, y=3, width=100, height=10, class_="track"),
        el("rect", x=0, y=3, width=round(value, 2), height=10, class_="fill"),
        el("line", x1=round(low, 2), x2=round(high, 2), y1=8, y2=8, class_="whisker"),
    ]
    box = {"viewBox": "0 0 100 16", "preserveAspectRatio": "none"}
    return el("svg", shapes, class_="bar", role="img", aria_label=label, **box)


def stacked_bar(shares: Sequence[tuple[str, float]], *, label: str) -> Html:
    """Shares in percent side by side; each is (the class of its colour, percent)."""
    shapes, at = [], 0.0
    for name, percent in shares:
        if percent > 0:
            shapes.append(el("rect", x=round(at, 3), y=0, width=round(percent, 3), height=20, class_=name))
        at += percent
    box = {"viewBox": "0 0 100 20", "preserveAspectRatio": "none"}
    return el("svg", shapes, class_="stack", role="img", aria_label=label, **box)


def legend(names: Sequence[str]) -> Html:
    """Names beside a piece of their line, in the order of the lines."""
    items = []
    for number, name in enumerate(names):
        dashes = _DASHES[number % len(_DASHES)] or None
        stroke = {"stroke": f"var(--c{number % COLOURS})", "stroke_dasharray": dashes}
        sample = el("line", x1=0, x2=28, y1=6, y2=6, class_="line", **stroke)
        items.append(el("li", el("svg", sample, viewBox="0 0 28 12", class_="key", aria_hidden="true"), " ", name))
    return el("ul", items, class_="legend")
