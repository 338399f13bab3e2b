"""The report's chart as a picture, for where a page cannot go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vidrial.build.files import writing
from vidrial.errors import SweepError, ToolchainError
from vidrial.report.rows import Group, group, title
from vidrial.tune.trial import PlainTrial


def new_figure(width: float, height: float) -> Any:
    """A matplotlib Figure of so many inches, bound to no display.

    Raises:
        ToolchainError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ToolchainError(f"matplotlib cannot be imported ({error}); install it: pip install matplotlib") from None
    return Figure(figsize=(width, height), dpi=160, layout="constrained")


def write_png(trials: Sequence[PlainTrial], out: Path) -> Path:
    """Draw the time of every config by length as a PNG, and return its path.

    Raises:
        ToolchainError: matplotlib is missing. SweepError: nothing was timed. ArgumentError: the file cannot be written.
    """
    figure = new_figure(8, 4.5)
    from matplotlib.ticker import LogLocator

    axis, groups = group(trials)
    timed = [g for g in groups if g.timed]
    if not timed:
        raise SweepError("no config was timed; give the journals of sweeps that timed one")
    axes = figure.subplots()
    for g in timed:
        axes.scatter([g.length] * len(g.timed), [t.ms for t in g.timed], s=10, color="#9aa5b1", linewidths=0, zorder=2)
    series: dict[str, list[Group]] = {}
    for g in timed:
        series.setdefault(g.series, []).append(g)
    for name, line in series.items():
        color = "#1f6feb" if len(series) == 1 else None  # else matplotlib's cycle
        label = f"fastest, {name}" if name else "fastest"
        axes.plot([g.length for g in line], [g.timed[0].ms for g in line], color=color, marker="o", markersize=4, zorder=3, label=label)
    axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="milliseconds")
    axes.set_title(title(trials), fontsize=9)
    # A label an eighth of an octave from the last one would lie on it.
    labelled = [g.length for n, g in enumerate(timed) if n == 0 or g.length > 1.5 * timed[n - 1].length]
    axes.set_xticks(labelled, [f"{x:g}" for x in labelled], rotation=45 if len(labelled) > 8 else 0)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    with writing(out, "--png"):
        figure.savefig(out, format="png")
    return out
