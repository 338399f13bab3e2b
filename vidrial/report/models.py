"""What a model's weights, state and context are worth, as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vidrial.build.files import writing
from vidrial.flops import Model, Row
from vidrial.icl import Curve
from vidrial.report.plot import new_figure


def write_balance_png(model: Model, rows: Sequence[Row], out: Path) -> Path:
    """Draw state FLOPs per token and bytes of the state against the length, a line for each mixer, and the weights' FLOPs; return the path.

    Raises:
        ToolchainError: matplotlib is missing. ArgumentError: the file cannot be written.
    """
    figure = new_figure(9, 4.2)
    flops, size = figure.subplots(1, 2)
    weights: dict[int, str] = {}
    for mixer in dict.fromkeys(row.mixer for row in rows):
        mine = [row for row in rows if row.mixer == mixer]
        lengths = [row.t for row in mine]
        (line,) = flops.plot(lengths, [float(row.state_flops) for row in mine], marker="o", markersize=3, label=mixer.name)
        size.plot(lengths, [row.bytes for row in mine], marker="o", markersize=3, label=mixer.name)
        weights.setdefault(mine[0].weight_flops, line.get_color() if weights else "black")
    for value, color in weights.items():
        flops.axhline(value, color=color, linewidth=1, linestyle="--", label="weights")
    flops.set(ylabel="FLOPs per token, all layers")
    size.set(ylabel="bytes of the state, all layers")
    for axes in (flops, size):
        axes.set(xscale="log", yscale="log", xlabel="length of the sequence")
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    flops.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{model.name}: {model.layers} layers of {model.layer_weights / 1e6:.1f} M weights", fontsize=9)
    with writing(out, "--png"):
        figure.savefig(out, format="png")
    return out


def write_curves_png(curves: Mapping[str, Curve], out: Path) -> Path:
    """Draw the curves against their context, with bars of one standard error; what is a difference (`a - b`) below; return the path.

    Raises:
        ToolchainError: matplotlib is missing. ArgumentError: the file cannot be written.
    """
    figure = new_figure(7, 6 if any(" - " in name for name in curves) else 4)
    panels = np.atleast_1d(figure.subplots(2 if any(" - " in name for name in curves) else 1, 1, sharex=True))
    for name, curve in curves.items():
        axes = panels[int(" - " in name)]
        axes.errorbar(2**curve.log2, curve.mean, curve.error, marker="o", markersize=3, linewidth=1, capsize=2, label=name)
        if " - " in name:
            axes.axhline(0, color="black", linewidth=0.5)
    for axes, label in zip(panels, ("loss, nats", "excess, nats"), strict=False):
        axes.set(xscale="log", ylabel=label)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    panels[-1].set(xlabel="tokens of context")
    with writing(out, "--png"):
        figure.savefig(out, format="png")
    return out
