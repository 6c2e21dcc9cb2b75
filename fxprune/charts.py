"""Charts as inline SVG for the report page: text that scales, colours from the page's style sheet, nothing loaded from anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 40


@dataclass(frozen=True)
class Series:
    """Points of one kind. ``style``: number of its colour and dash in the style sheet. ``labels``: what hovering a point shows."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0
    line: bool = True
    dots: bool = True
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def chart(series: Sequence[Series], *, x_label: str, y_label: str, title: str) -> str:
    """Lines and dots over two labelled axes, as an SVG element with a title for readers that do not see it."""
    xs = [x for one in series for x in one.x]
    ys = [y for one in series for y in one.y]
    if not xs:
        return '<p class="empty">Nothing was recorded for this chart.</p>'
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    across = _Scale(min(x_ticks[0], *xs), max(x_ticks[-1], *xs), LEFT, WIDTH - RIGHT)
    up = _Scale(min(y_ticks[0], *ys), max(y_ticks[-1], *ys), HEIGHT - BOTTOM, TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>']
    for tick in y_ticks:
        y = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        parts.append(f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="axis" transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    for one in series:
        parts += _drawn(one, across, up)
    return "".join([*parts, "</svg>", _legend(series)])


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that span ``low`` to ``high``, about ``count`` of them."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _drawn(one: Series, across: _Scale, up: _Scale) -> list[str]:
    places = [(across(x), up(y)) for x, y in zip(one.x, one.y, strict=True)]
    parts = []
    if one.line and len(places) > 1:
        parts.append(f'<polyline class="line s{one.style}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
    if one.dots:
        labels = one.labels or [f"{one.name}: {x:g}, {y:.4g}" for x, y in zip(one.x, one.y, strict=True)]
        for (x, y), label in zip(places, labels, strict=True):
            parts.append(f'<circle class="dot s{one.style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{escape(label)}</title></circle>')
    return parts


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    keys = "".join(f'<li><span class="key s{one.style}"></span>{escape(one.name)}</li>' for one in series)
    return f'<ul class="legend">{keys}</ul>'
