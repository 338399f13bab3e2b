"""`vidrial flops` and `vidrial icl`: what a model's weights and state do per token, and what context is worth to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from vidrial.build.files import writing
from vidrial.cli.tables import byte_size, show_table
from vidrial.flops import Mixer, Model, Row, parse_lengths, table
from vidrial.icl import Curve, Losses, by_position, excess, knee, load, slope

# A knee is looked for where a curve has as many points; two is what a line needs.
KNEE_POINTS = 4


def metric(value: float) -> str:
    """A large number as a person reads it: `1.54 M`, `26.4 G`."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def length_name(t: int) -> str:
    """`1000`, `8k`, `1M`: k is 1024."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if t % size == 0:
            return f"{t // size}{unit}"
    return str(t)


def show_balance(console: Console, model: Model, mixers: Sequence[Mixer], lengths: Sequence[int], head: bool) -> list[Row]:
    """Print weight FLOPs per state FLOP, state FLOPs, bytes and numbers of each mixer at each length; returns the rows."""
    rows = table(model, mixers, lengths, head)
    by_mixer = [rows[i : i + len(lengths)] for i in range(0, len(rows), len(lengths))]
    weights = f"{model.layers} layers of {model.layer_weights:,} weights, {metric(model.weight_flops(head))}FLOP per token"
    console.print(Text(f"{model.name}: {weights}{' with those of the head' if head else ''}"))
    columns = ("", *(f">{length_name(t)}" for t in lengths))
    ratios = ((of[0].mixer.name, *(f"{float(r.ratio):.3g}" for r in of), _balanced(model, of[0].mixer, head)) for of in by_mixer)
    show_table(console, "weight FLOPs per state FLOP, in a sequence of", (*columns, ">balanced at"), ratios)
    flops = ((of[0].mixer.name, *(metric(float(r.state_flops)) for r in of)) for of in by_mixer)
    show_table(console, "state FLOPs per token, all layers", columns, flops)
    size = ((of[0].mixer.name, *(byte_size(r.bytes) for r in of)) for of in by_mixer)
    show_table(console, "bytes of the state, all layers: caches in bfloat16, other states in float32", columns, size)
    numbers = ((of[0].mixer.name, *(metric(r.size) for r in of)) for of in by_mixer)
    show_table(console, "numbers of the state, all layers", columns, numbers)
    return rows


def _balanced(model: Model, mixer: Mixer, head: bool) -> str:
    length = model.balanced(mixer, head)
    return str(length) if length is not None else "never" if mixer.grows else "-"


def write_balance(model: Model, rows: Sequence[Row], head: bool, out: Path) -> Path:
    """Write what `show_balance` printed as JSON, and return its path; FLOPs that are no integers are a numerator and a denominator.

    Raises:
        ArgumentError: the file cannot be written.
    """
    mixers = dict.fromkeys(row.mixer for row in rows)
    held = {
        "model": vars(model),
        "layer_weights": model.layer_weights,
        "balanced": {mixer.name: model.balanced(mixer, head) for mixer in mixers},
        "rows": [
            {
                "mixer": row.mixer.name,
                "t": row.t,
                "size": row.size,
                "bytes": row.bytes,
                "state_flops": _exact(row.state_flops),
                "weight_flops": row.weight_flops,
                "ratio": float(row.ratio),
            }
            for row in rows
        ],
    }
    with writing(out, "--json"):
        out.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    return out


def _exact(value: Fraction) -> Any:
    return value.numerator if value.denominator == 1 else [value.numerator, value.denominator]


def read_curve(path: Path) -> Curve:
    """The curve in a file; losses of whole windows are cut by position.

    Raises:
        ArgumentError: it holds neither.
    """
    found = load(path)
    return by_position(found) if isinstance(found, Losses) else found


def show_curve(console: Console, path: Path, against: Path | None, low: float | None, high: float | None) -> dict[str, Curve]:
    """Print the loss at each amount of context, its slope and its knee, and the excess over another model's; returns the curves by name.

    Raises:
        ArgumentError: a file cannot be read, the curves are of different tokens, or fewer than two points lie between `low` and `high`.
    """
    curves = {path.stem: read_curve(path)}
    if against is not None:
        name = against.stem if against.stem != path.stem else str(against)
        curves[name] = read_curve(against)
        curves[f"{path.stem} - {name}"] = excess(curves[path.stem], curves[name])
    first = curves[path.stem].between(low, high)
    columns = (">context", ">targets", *(column for name in curves for column in (f">{name}", ">+-")))
    parts = [curve.between(low, high) for curve in curves.values()]
    rows = (
        (first.context[i], first.weight[i] * len(first.values), *(f"{x:.4f}" for p in parts for x in (p.mean[i], p.error[i])))
        for i in range(len(first.context))
    )
    show_table(console, f"loss in nats, of {len(first.values)} windows", columns, rows)
    show_table(
        console, "per doubling of the context", ("", ">nats", ">+-", "knee"), ((n, *_line(c.between(low, high))) for n, c in curves.items())
    )
    return curves


def _line(curve: Curve) -> tuple[str, str, str]:
    found, bend = slope(curve), None
    if len(curve.context) < KNEE_POINTS or len(curve.values) < 2:
        return f"{found.value:.4f}", f"{found.error:.4f}", "too few points to tell"
    bend = knee(curve)
    if bend is None:
        return f"{found.value:.4f}", f"{found.error:.4f}", "none that the noise does not explain"
    where = f"at {bend.at:.0f} tokens ({bend.low:.0f} to {bend.high:.0f}): {bend.before:.4f} before, {bend.after:.4f} behind"
    return f"{found.value:.4f}", f"{found.error:.4f}", where


def lengths_of(texts: Sequence[str]) -> list[int]:
    """The lengths of all `--t`, in order, each once.

    Raises:
        ArgumentError: one is no length.
    """
    return sorted({t for text in texts for t in parse_lengths(text)})
