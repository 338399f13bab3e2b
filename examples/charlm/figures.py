"""The three figures, from results/*.json: python examples/charlm/figures.py. The third is arithmetic alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vidrial as vd
import vidrial.flops as fl

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
LABELS = {
    "original": "softmax, trained on",
    "layer-wise": "power, degree 2: layer by layer, then end to end",
    "degree 4": "power, degree 4: layer by layer, then end to end",
    "degree 1": "degree 1, end to end",
    "gates": "power, degree 2: end to end",
    "open gates": "power, degree 2, open gates: end to end",
    "scratch": "power, degree 2, from nothing",
}
# Lengths that are marked on the trails of the third figure.
LENGTHS = {1024: "1k", 8192: "8k", 65536: "64k", 1048576: "1M"}
MODELS = {"gpt2": "C0", "powercoder-3b": "C1", "qwen3-14b": "C2"}
MIXERS = {"attention": "o", "window:1024": "s", "power:2": "D", "power:3": "^", "degree1": "v"}


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=140, layout="constrained")


def _panel(figure: Figure, rows: int = 1, ratios: tuple[float, ...] = (1.0,)) -> list[Axes]:
    found = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    for axes in found:
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    return list(found)


def recovery(found: dict[str, Any], out: Path) -> None:
    """The held-out loss over steps after the swap, and that of the model before."""
    figure = _figure(7.5, 4.5)
    (axes,) = _panel(figure)
    base, steps = found["base"]["loss"]["held_out"], 1
    for name, run in found["recovery"].items():
        losses = {int(step): loss for step, loss in run["losses"].items()}
        steps = max(steps, *losses)
        axes.plot(list(losses.keys()), list(losses.values()), marker="o", markersize=3, label=LABELS[name])
    axes.axhline(base, color="black", linewidth=0.7, linestyle=":", label=f"the original, {base:.3f}")
    axes.set_xscale("symlog", linthresh=10)
    ticks = [n for n in (0, 5, 10, 20, 40, 80, 160, 320) if n <= steps]
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    preset = found["preset"]
    axes.set(xlabel=f"steps of {preset['batch']} x {preset['t']} bytes", ylabel="nats per held-out byte")
    axes.set_title(f"after the swap ({found['device']})", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(out)


def context(found: dict[str, Any], out: Path) -> None:
    """The loss of the same bytes under growing context; below, how much more than the softmax model's."""
    figure = _figure(7.5, 6)
    above, below = _panel(figure, 2, (3, 2))
    for name, curve in found["curves"].items():
        above.errorbar(curve["context"], curve["mean"], curve["error"], marker="o", markersize=3, capsize=2, label=LABELS.get(name, name))
        below.errorbar(curve["context"], curve["excess"], curve["excess_error"], marker="o", markersize=3, capsize=2)
    below.set_xscale("log", base=2)
    ticks = found["preset"]["contexts"]
    below.set_xticks(ticks, [str(n) for n in ticks])
    below.set(xlabel=f"bytes of context before {found['preset']['targets']} predicted ones", ylabel="more than softmax")
    above.set(ylabel="nats per byte")
    above.set_title(f"the same held-out bytes, {found['preset']['windows']} windows; bars are one standard error", fontsize=9)
    above.legend(frameon=False, fontsize=8)
    figure.savefig(out)


def balance(out: Path) -> None:
    """Weight FLOPs against state FLOPs per token, of published shapes, at lengths from 1k to 1M."""
    figure = _figure(7.5, 5.5)
    (axes,) = _panel(figure)
    for name, color in MODELS.items():
        model = fl.Model.of(name)
        weights = model.weight_flops()
        for mixer, marker in MIXERS.items():
            one = fl.parse_mixer(mixer, model)
            state = {t: float(model.layers * one.flops(t)) for t in LENGTHS}
            axes.plot(
                list(state.values()), [weights] * len(state), color=color, marker=marker, markersize=5, linewidth=1, markerfacecolor="none"
            )
            if mixer == "attention":
                for t, x in state.items():
                    axes.annotate(LENGTHS[t], (x, weights), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=7)
        axes.annotate(name, (2e6, weights), color=color, textcoords="offset points", xytext=(0, 6), fontsize=8)
    low, high = 1e6, 3e12
    for ratio in (1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100, 1000):
        axes.plot(
            [low, high],
            [low * ratio, high * ratio],
            color="black",
            linewidth=1.2 if ratio == 1 else 0.4,
            linestyle="-" if ratio == 1 else ":",
        )
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(3e7, 3e11))
    axes.set(xlabel="state FLOPs per token, all layers", ylabel="weight FLOPs per token, all layers")
    for mixer, marker in MIXERS.items():
        axes.plot([], [], color="black", marker=marker, markerfacecolor="none", linestyle="none", label=mixer)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.set_title("balance is the solid diagonal; dotted ones are factors of ten; attention at 1k, 8k, 64k and 1M tokens", fontsize=9)
    figure.savefig(out)


def main() -> None:
    """Draw what there are results of."""
    files = sorted(RESULTS.glob("*.json"))
    if not files:
        raise vd.ArgumentError(f"{RESULTS} holds no results; run charlm.py results before")
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        recovery(found, RESULTS / f"recovery_{file.stem}.png")
        context(found, RESULTS / f"context_{file.stem}.png")
    balance(RESULTS / "flops.png")


if __name__ == "__main__":
    try:
        main()
    except vd.VidrialError as error:
        sys.exit(f"{type(error).__name__}: {error}")
