"""A scatter plot as inline SVG whose colours follow the page's theme. Pure functions of numbers.

Not a command. `scatter([Series("clip", [Point(6.7, 0.0074, "tag")])], "MB", "nats", log_y=True)` returns the markup.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 330
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 44


@dataclass(frozen=True)
class Point:
    """``low`` and ``high``: an error bar, when given. ``title`` is shown under the pointer."""

    x: float
    y: float
    title: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    name: str
    points: Sequence[Point]
    line: bool = False


def nice_ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers from low to high: steps of 1, 2 or 5 on a linear axis; 1, 2 and 5 of each decade on a logarithmic one."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    else:
        rough = (high - low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        ticks = [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


@dataclass(frozen=True)
class Axis:
    """Maps values low..high to pixels start..end."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def at(self, value: float) -> float:
        """The pixel of a value; one beyond the ends is drawn at the end."""
        low, high, v = (math.log(max(x, 1e-300)) if self.log else x for x in (self.low, self.high, value))
        share = min(1.0, max(0.0, (v - low) / (high - low)))
        return self.start + share * (self.end - self.start)


def spread(values: Sequence[float], log: bool, room: float = 0.08) -> tuple[float, float]:
    """Ends of an axis that shows all values with some room."""
    low, high = min(values), max(values)
    if log:
        factor = (high / low) ** room if high > low else 2.0
        return low / factor, high * factor
    return low - room * (high - low or 1.0), high + room * (high - low or 1.0)


def frame(x: Axis, y: Axis, x_label: str, y_label: str) -> list[str]:
    parts = []
    for tick in nice_ticks(y.low, y.high, y.log):
        at = y.at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in nice_ticks(x.low, x.high, x.log):
        parts.append(f'<text x="{x.at(tick):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{tick:g}</text>')
    floor = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 7}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (TOP + floor) / 2
    parts.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    return parts


def mark(point: Point, x: Axis, y: Axis, color: str, shift: float) -> str:
    """A dot with its error bar; a value below the axis is a triangle at its foot."""
    px, py, title = x.at(point.x) + shift, y.at(point.y), f"<title>{escape(point.title)}</title>"
    if point.y < y.low:
        base = y.start - 2
        return f'<path d="M{px - 5:.1f} {base - 9:.1f}h10l-5 9z" fill="{color}">{title}</path>'
    bar = ""
    if point.low is not None and point.high is not None:
        ends = f'y1="{y.at(point.low):.1f}" y2="{y.at(point.high):.1f}"'
        bar = f'<line x1="{px:.1f}" x2="{px:.1f}" {ends} stroke="{color}" stroke-width="1.5" opacity="0.6"/>'
    return f'{bar}<circle cx="{px:.1f}" cy="{py:.1f}" r="4.5" fill="{color}">{title}</circle>'


def scatter(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    floor: float | None = None,
) -> str:
    """SVG and legend. Series are set apart by a few pixels where they have error bars. ``floor``: foot of the y axis."""
    points = [point for one in series for point in one.points]
    x = Axis(*spread([point.x for point in points], log_x), LEFT, WIDTH - RIGHT, log_x)
    heights = [v for p in points for v in (p.y, p.low, p.high) if v is not None and (floor is None or v >= floor)]
    low, high = spread(heights or [floor or 0.0, 1.0], log_y, 0.06)
    y = Axis(low if floor is None else floor, high, HEIGHT - BOTTOM, TOP, log_y)
    parts = frame(x, y, x_label, y_label)
    for index, one in enumerate(series):
        color = f"var(--c{index % 10})"
        barred = any(point.low is not None for point in one.points)
        shift = 6.0 * (index - (len(series) - 1) / 2) if barred else 0.0
        own = sorted(one.points, key=lambda point: point.x)
        if one.line and len(own) > 1:
            way = " ".join(f"{x.at(p.x) + shift:.1f},{y.at(p.y):.1f}" for p in own)
            parts.append(f'<polyline points="{way}" fill="none" stroke="{color}" stroke-width="1.5" opacity="0.55"/>')
        parts += [mark(point, x, y, color, shift) for point in own]
    legend = "".join(
        f'<span><i style="background: var(--c{i % 10})"></i>{escape(one.name)}</span>' for i, one in enumerate(series)
    )
    label = escape(f"{y_label} against {x_label}", quote=True)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f'{svg}<div class="legend">{legend}</div>'
