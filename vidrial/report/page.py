"""The looks of the sweep's page: HTML and SVG from strings and numbers, without a script, a font or an image from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 960, 420, 64, 20, 16, 44
HUES = 6  # of lines
Point = tuple[float, float, str]
STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --quiet: #667281; --line: #d9dee4; --back: #fff; --dot: #9aa5b1; --best: #1f6feb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e8ee; --quiet: #98a4b3; --line: #333b45; --back: #14181d; --dot: #667281; --best: #6ea8fe; }
}
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; }
body { background: var(--back); color: var(--ink); }
h1 { font-size: 1.5rem; margin-bottom: .25rem; }
h2 { font-size: 1.1rem; margin-top: 2.25rem; }
p { color: var(--quiet); margin: .25rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin-top: .5rem; }
th { text-align: left; color: var(--quiet); font-weight: 500; }
td { font-variant-numeric: tabular-nums; }
td, th { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { vertical-align: bottom; }
.number { text-align: right; }
td.number, td:first-child { white-space: nowrap; }
details { margin: .4rem 0; }
summary { cursor: pointer; }
svg { width: 100%; min-width: 40rem; height: auto; }
svg text { fill: var(--quiet); font-size: 12px; }
svg .grid { stroke: var(--line); }
svg .dot { fill: var(--dot); fill-opacity: .55; }
svg .best { fill: var(--best); }
svg .line { stroke: var(--best); stroke-width: 2; fill: none; }
svg .path { fill: none; stroke-width: 1.5; stroke-opacity: .8; }
svg .hue0 { stroke: #d9822b; } svg .hue1 { stroke: #2b9d6a; } svg .hue2 { stroke: #a45fc4; } svg .hue3 { stroke: #c94f5d; }
svg .hue4 { stroke: #3a9bb5; } svg .hue5 { stroke: #9a8a2c; }
svg .path:hover { stroke-width: 4; }
svg circle:hover { stroke: var(--ink); stroke-width: 2; }
"""


@dataclass(frozen=True)
class Section:
    """A heading and the HTML below it."""

    title: str
    body: str


def page(title: str, summary: Sequence[str], sections: Sequence[Section]) -> str:
    """A whole HTML document."""
    lines = "".join(f"<p>{escape(line)}</p>" for line in summary)
    body = "\n".join(f"<section><h2>{escape(s.title)}</h2>{s.body}</section>" for s in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>{lines}\n{body}\n</body></html>\n"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text; columns whose name begins with `#` are numbers, aligned to the right."""
    kinds = [' class="number"' if name.startswith("#") else "" for name in columns]
    # A long name may break after a dot.
    names = [escape(name.removeprefix("#")).replace(".", ".<wbr>") for name in columns]
    head = "".join(f"<th{kind}>{name}</th>" for name, kind in zip(names, kinds, strict=True))
    lines = ("".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) for row in rows)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def text_of(x: float) -> str:
    """A number to three digits."""
    return f"{x:.3g}"


def chart(
    axis: str,
    groups: Sequence[Sequence[Point]],
    unit: str = "ms",
    paths: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    series: Sequence[str] | None = None,
) -> str:
    """An SVG of milliseconds over lengths, both logarithmic: every (length, ms, hover text) a dot, the first of each group on the line of its series.

    `unit`: what the heights are instead. `paths`: hover text -> the points of a thin line. `series`: of each group; by default all are one.
    """
    points = [p for g in groups for p in g if p[1] > 0]
    if not points:
        return "<p>No config was timed.</p>"
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
    note = "<p>Blue: the fastest; grey: every other config that passed its check. Both axes are logarithmic; hover for the config.</p>"
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(unit)} by {escape(axis)}">{"".join(parts)}</svg>'
    return (note if paths is None else "") + f'<div class="wide">{svg}</div>'


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
