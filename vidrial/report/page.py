"""The looks of the sweep's page: its template, and charts as SVG, without a script, a font or an image from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

import jinja2
from markupsafe import Markup

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 960, 420, 64, 20, 16, 44
HUES = 6  # of lines
Point = tuple[float, float, str]


@dataclass(frozen=True)
class Table:
    """A table of plain text; columns whose name begins with `#` are numbers. With a `summary` it is folded under that."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    summary: str = ""


@dataclass(frozen=True)
class Section:
    """A heading, and below it sentences, a chart and tables."""

    title: str
    notes: Sequence[str] = ()
    chart: Markup | None = None
    tables: Sequence[Table] = ()


def page(title: str, summary: Sequence[str], sections: Sequence[Section]) -> str:
    """A whole HTML document."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(files("vidrial.report").joinpath("page.html.j2").read_text(encoding="utf-8"))
    return template.render(title=title, summary=summary, sections=sections)


def chart(
    axis: str,
    groups: Sequence[Sequence[Point]],
    unit: str = "ms",
    paths: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    series: Sequence[str] | None = None,
) -> Markup | None:
    """An SVG of milliseconds over lengths, both logarithmic: every (length, ms, hover text) a dot, the first of each group on the line of its series.

    `unit`: what the heights are instead. `paths`: hover text -> the points of a thin line. `series`: of each group; by default all are one.

    None if nothing was timed.
    """
    points = [p for g in groups for p in g if p[1] > 0]
    if not points:
        return None
    x_scale, y_scale = _Scale([p[0] for p in points], LEFT, WIDTH - RIGHT), _Scale([p[1] for p in points], HEIGHT - BOTTOM, TOP)
    parts = []
    for value in y_scale.ticks():
        y = y_scale(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_label(LEFT - 8, y + 4, "end", f"{value:g}"))
    for value in _labelled(sorted({p[0] for p in points}), x_scale):
        parts.append(_label(x_scale(value), HEIGHT - BOTTOM + 18, "middle", f"{value:g}"))
    parts += [_label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "middle", axis), _label(6, 12, "start", unit)]
    for number, (hint, line) in enumerate((paths or {}).items()):
        parts.append(_path([(x_scale(x), y_scale(y)) for x, y in line], f"path hue{number % HUES}", hint))
    for g in groups:
        parts += [_circle(x_scale(x), y_scale(ms), 4, "dot", hint) for x, ms, hint in g[1:] if ms > 0]
    best = [g[0] for g in groups if g and g[0][1] > 0]
    lines: dict[str, list[tuple[float, float]]] = {}
    for g, name in zip(groups, series or [""] * len(groups), strict=True):
        lines.setdefault(name, []).extend((x_scale(x), y_scale(ms)) for x, ms, _ in g[:1] if ms > 0)
    parts += [_path(line, "line", f"the fastest, {name}" if name else "the fastest") for name, line in lines.items()]
    parts += [_circle(x_scale(x), y_scale(ms), 5, "best", hint) for x, ms, hint in best]
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(unit)} by {escape(axis)}">{"".join(parts)}</svg>')


def _label(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _path(points: Sequence[tuple[float, float]], kind: str, hint: str) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{places}"><title>{escape(hint)}</title></polyline>'


def _circle(x: float, y: float, radius: int, kind: str, hint: str) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(hint)}</title></circle>'


class _Scale:
    """Positive values on a logarithmic scale from pixel `first` to pixel `last`, with some room at both ends."""

    def __init__(self, values: Sequence[float], first: float, last: float) -> None:
        low, high = math.log(min(values)), math.log(max(values))
        room = max(0.06 * (high - low), 0.1)
        self.low, self.high, self.first, self.last = low - room, high + room, first, last

    def __call__(self, value: float) -> float:
        return self.first + (math.log(value) - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self) -> list[float]:
        """Round values on the scale: 1, 2, 5 times powers of ten, or what lies between if they are fewer than three."""
        decades = range(math.floor(self.low / math.log(10)), math.ceil(self.high / math.log(10)) + 1)
        for digits in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), tuple(1 + n / 20 for n in range(180))):
            found = [float(f"{d * 10.0**decade:.6g}") for decade in decades for d in digits]
            inside = [v for v in found if self.low <= math.log(v) <= self.high]
            if len(inside) >= 3:
                return inside if len(inside) <= 12 else inside[:: -(-len(inside) // 12)]
        return inside


def _labelled(values: Sequence[float], scale: _Scale) -> list[float]:
    """As many values as have room for their label."""
    kept: list[float] = []
    for value in values:
        if not kept or scale(value) - scale(kept[-1]) >= 44:
            kept.append(value)
    return kept
