"""Line charts as one HTML figure each: lines in SVG, letters in HTML.

The SVG is stretched to the width there is, with strokes that keep their thickness, and every label is HTML at a
position in per cent. So a chart fills a wide screen and stays legible on a telephone, without a script.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

from luthier.report.text import number, scientific

Point = tuple[float, float | None]
"""A step and a value; None breaks the line."""

Scale = Callable[[float], float]
"""From a step or a value to its place within the plot, 0 to 1."""

SIDE = 1000  # of the SVG's own square
MOST_POINTS = 800
LABEL_GAP = 15.0  # pixels between two labels at the lines' ends


@dataclass(frozen=True)
class Series:
    """One line: ``raw`` is thin and pale, ``line`` is strong, ``dots`` is a line with its points marked."""

    label: str
    points: Sequence[Point]
    style: Literal["raw", "line", "dots"] = "line"
    tone: Literal["first", "second"] = "first"


@dataclass(frozen=True)
class Chart:
    """A figure: series over steps, in one unit."""

    title: str
    unit: str
    series: Sequence[Series]
    height: int = 170
    """Pixels."""
    from_zero: bool = False
    """Whether the scale begins at zero; otherwise at the smallest value."""
    flaws: Sequence[float] = field(default=())
    """Steps to mark at the foot: those that were skipped."""
    best: tuple[float, float] | None = None
    """A point to ring."""
    span: tuple[float, float] | None = None
    """First and last step of the axis; otherwise those of the points."""


def draw(chart: Chart) -> str:
    """Return the figure as HTML; a chart without a single value says so."""
    head = f'<figcaption><h3>{escape(chart.title)}</h3><span class="unit">{escape(chart.unit)}</span>'
    series = [Series(one.label, thin(one.points), one.style, one.tone) for one in chart.series if _values(one.points)]
    if not series:
        empty = f'<div class="plot empty" style="height:{chart.height}px">nothing measured yet</div>'
        return f'<figure class="chart">{head}</figcaption>{empty}</figure>'
    low_x, high_x = _range_x(chart)
    low_y, high_y = _range_y(chart)

    def x(step: float) -> float:
        return (step - low_x) / (high_x - low_x)

    def y(value: float) -> float:
        return max(0.0, 1 - (value - low_y) / (high_y - low_y))  # what exceeds the scale runs along its edge

    ticks_x = [tick for tick in nice_ticks(low_x, high_x, 5) if float(tick).is_integer()]
    ticks_y = nice_ticks(low_y, high_y, 4 if chart.height < 200 else 5)
    shapes = [f'<path class="grid" d="M0 {_at(y(tick))}H{SIDE}"/>' for tick in ticks_y]
    shapes += [_path(one, x, y) for one in series]
    shapes += [f'<path class="flaw" d="M{_at(x(step))} {SIDE}V{SIDE * 0.94:g}"/>' for step in chart.flaws]
    if chart.best:
        place = f"M{_at(x(chart.best[0]))} {_at(y(chart.best[1]))}h0"
        shapes += [f'<path class="ring" d="{place}"/>', f'<path class="hole" d="{place}"/>']
    letters = [_letter("y", "top", y(tick), text) for tick, text in zip(ticks_y, tick_labels(ticks_y))]
    letters += [_letter("x", "left", x(tick), text) for tick, text in zip(ticks_x, tick_labels(ticks_x))]
    letters += _end_labels(series, y, chart.height)
    return (
        f'<figure class="chart">{head}{_key(series, chart, high_y)}<output class="readout"></output></figcaption>'
        f'<div class="plot" style="height:{chart.height}px">'
        f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" role="img" aria-label="{escape(_spoken(chart, series))}">'
        f"{''.join(shapes)}</svg>{''.join(letters)}<i class='cross'></i></div>"
        f'<script type="application/json">{_data(series, low_x, high_x)}</script></figure>'
    )


def smooth(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Return a curve through the noise: up to 400 group means, each replaced by a line fitted to its neighbourhood.

    The neighbourhood is a Gaussian of 2 % of the width. Fitting a line, instead of averaging, neither lags behind nor
    bends flat at the ends, where the first loss is highest (local linear regression, Cleveland 1979).
    """
    known = [(step, value) for step, value in points if value is not None]
    group = max(1, math.ceil(len(known) / 400))
    parts = [known[start : start + group] for start in range(0, len(known), group)]
    means = [(sum(step for step, _ in part) / len(part), sum(value for _, value in part) / len(part)) for part in parts]
    sigma = max(1.5, len(means) * 0.02)
    reach = math.ceil(3 * sigma)
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(reach + 1)]
    return [(step, _fitted([value for _, value in means], index, weights)) for index, (step, _) in enumerate(means)]


def _fitted(values: Sequence[float], index: int, weights: Sequence[float]) -> float:
    """Return the height at ``index`` of the line fitted to the values around it."""
    total = first = second = cross = height = 0.0
    for other in range(max(0, index - len(weights) + 1), min(len(values), index + len(weights))):
        offset = other - index
        weight = weights[abs(offset)]
        total += weight
        first += weight * offset
        second += weight * offset * offset
        height += weight * values[other]
        cross += weight * offset * values[other]
    spread = total * second - first * first
    return (second * height - first * cross) / spread if spread > 0 else height / total


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most about ``most`` points that draw the same line: the lowest and highest of every group."""
    if len(points) <= most:
        return list(points)
    kept: list[Point] = []
    group = math.ceil(len(points) / (most / 2))
    for start in range(0, len(points), group):
        part = points[start : start + group]
        values = [point for point in part if point[1] is not None]
        if not values:
            kept.append(part[0])
            continue
        extremes = {min(values, key=lambda point: point[1] or 0), max(values, key=lambda point: point[1] or 0)}
        kept += sorted(extremes)
    return kept


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Return round numbers within the range, roughly ``about`` of them."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Return the ticks as text with as many digits as tell them apart."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    if largest and largest < 1e-2:
        return [scientific(tick) for tick in ticks]
    if largest >= 10_000:
        return [f"{tick / 1e6:g}M" if largest >= 1e6 else f"{tick / 1e3:g}k" if tick else "0" for tick in ticks]
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=1.0)
    digits = next((count for count in range(7) if math.isclose(step, round(step, count), rel_tol=1e-6)), 7)
    return [f"{tick:,.{digits}f}" for tick in ticks]


def _values(points: Sequence[Point]) -> list[float]:
    return [value for _, value in points if value is not None]


def _range_x(chart: Chart) -> tuple[float, float]:
    steps = [*(chart.span or ()), *(step for one in chart.series for step, _ in one.points), *chart.flaws]
    low, high = min(steps), max(steps)
    return (low, high) if high > low else (low - 1, high + 1)


def _range_y(chart: Chart) -> tuple[float, float]:
    values = sorted(value for one in chart.series for value in _values(one.points))
    low, high = values[0], values[-1]
    usual = values[int(0.98 * (len(values) - 1))]
    if len(values) > 20 and high - low > 3 * (usual - low) > 0:  # a few spikes shall not flatten all the rest
        high = low + 1.6 * (usual - low)
    if chart.from_zero:
        low = min(0.0, low)
    if high == low:
        margin = abs(high) * 0.1 or 1.0
    else:
        margin = (high - low) * 0.06
    return (low if chart.from_zero and low == 0.0 else low - margin), high + margin


def _at(share: float) -> str:
    return f"{share * SIDE:.1f}"


def _path(one: Series, x: Scale, y: Scale) -> str:
    commands = []
    pen_down = False
    for step, value in one.points:
        if value is None:
            pen_down = False
            continue
        commands.append(f"{'L' if pen_down else 'M'}{_at(x(step))} {_at(y(value))}")
        pen_down = True
    line = f'<path class="{one.style} {one.tone}" d="{"".join(commands)}"/>'
    alone = len(commands) == 1
    if one.style == "dots" or alone:  # a stroke of no length with round ends is a dot that no stretching deforms
        dots = "".join(f"M{_at(x(step))} {_at(y(value))}h0" for step, value in one.points if value is not None)
        line += f'<path class="dot {one.tone}" d="{dots}"/>'
    return line


def _letter(kind: str, edge: str, share: float, text: str) -> str:
    return f'<span class="{kind}" style="{edge}:{share * 100:.2f}%">{escape(text)}</span>'


def _end_labels(series: Sequence[Series], y: Scale, height: int) -> list[str]:
    """Return each line's last value beside its end, moved apart where they would overlap."""
    ends = sorted(
        ((min(y(_values(one.points)[-1]), 1.0) * height, one) for one in series if one.style != "raw"),
        key=lambda end: end[0],
    )
    labels = []
    previous = -math.inf
    for top, one in ends:
        previous = max(top, previous + LABEL_GAP)
        text = number(float(f"{_values(one.points)[-1]:.3g}"))
        labels.append(f'<b class="{one.tone}" style="top:{previous:.1f}px">{escape(text)}</b>')
    return labels


def _key(series: Sequence[Series], chart: Chart, top: float) -> str:
    """Return what the lines are, where there is more than one, what the marks are, and what exceeds the scale."""
    entries = (
        [f'<li class="{one.style} {one.tone}">{escape(one.label)}</li>' for one in series] if len(series) > 1 else []
    )
    if chart.best:
        entries.append('<li class="ring">best</li>')
    if chart.flaws:
        entries.append(f'<li class="flaw">{len(chart.flaws)} skipped</li>')
    peak = max(value for one in chart.series for value in _values(one.points))
    if peak > top:
        entries.append(f'<li class="peak">peak {escape(number(float(f"{peak:.3g}")))}</li>')
    return f'<ul class="key">{"".join(entries)}</ul>' if entries else ""


def _spoken(chart: Chart, series: Sequence[Series]) -> str:
    said = []
    for one in series:
        known = [(step, value) for step, value in one.points if value is not None]
        said.append(
            f"{one.label} {number(known[0][1])} at step {number(known[0][0])}, {number(known[-1][1])} at step {number(known[-1][0])}"
        )
    return f"{chart.title}: {'; '.join(said)}"


def _data(series: Sequence[Series], low: float, high: float) -> str:
    """Return what the read-out under the pointer needs; ``<`` is written so that no text can end the script."""
    content = {
        "low": low,
        "high": high,
        "series": [
            {
                "label": one.label,
                "tone": one.tone,
                "points": [[step, float(f"{value:.4g}")] for step, value in one.points if value is not None],
            }
            for one in series
        ],
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
