"""A small GPT learns Python's standard library, its attention power retention or softmax: loss curves, and tokens per second by context.

python examples/train/train.py                                                # about a minute on two cores
python examples/train/train.py --attention power attention-form --steps 100   # the op, and its definition by plain torch: one curve
python examples/train/train.py --framework jax
python examples/train/train.py --device cuda --attention power flash sdpa --bench 1k,4k,16k,64k
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

import vidrial as vd

sys.path.append(str(Path(__file__).parents[1] / "charlm"))

from in_torch import GATED, MIXERS, TorchTrainer
from lab import PRESETS, Preset, Text

# Of a step: on a CPU that is 2 windows of 512 bytes.
TOKENS = {"cpu": 1024, "cuda": 65536}
# A cell of the bench: steps before its clock starts, and how long it runs at most.
WARM_STEPS, CELL_STEPS, CELL_SECONDS = 2, 20, 3.0
WARMUP, SMOOTH = 20, 20


class Trainer(Protocol):
    """What a framework trains: see in_torch.py."""

    def step(self, tokens: torch.Tensor, lr: float) -> float: ...
    def logits(self, tokens: torch.Tensor) -> torch.Tensor: ...
    def peak_bytes(self) -> int | None: ...


# Of a preset, an attention, a seed and a nudge.
Make = Callable[[Preset, str, int, int], Trainer]


def say(*words: object) -> None:
    print(*words, flush=True)


def preset_of(o: argparse.Namespace, context: int) -> Preset:
    """Charlm's preset of the device with this context; on a CPU a smaller model: 2 layers, 2 heads of 32."""
    base = PRESETS["cpu" if o.device == "cpu" else "h200"]
    small = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = base.config | (small if o.device == "cpu" else {})
    return dataclasses.replace(base, config=config, t=context, batch=o.batch or max(1, TOKENS[o.device] // context), evaluate=16)


def text_of(o: argparse.Namespace, preset: Preset, like: Text | None = None) -> Text:
    """The corpus where the framework takes it from (JAX copies each batch to its device); `like` was read before, for another context."""
    preset = preset if o.framework == "torch" else dataclasses.replace(preset, device="cpu")
    text = copy.copy(like) if like else Text(preset)
    text.preset = preset
    if min(len(text.train), len(text.held)) < preset.t + 2:
        raise vd.ArgumentError(f"context {preset.t}: the text has {len(text.held)} held-out bytes; choose a shorter one")
    return text


def maker(o: argparse.Namespace) -> Make:
    """The trainers of the framework, on the device.

    Raises:
        vd.ToolchainError: no GPU, or no JAX.
    """
    if o.framework == "torch":
        if o.device == "cuda" and not torch.cuda.is_available():
            raise vd.ToolchainError("--device cuda: torch finds no GPU; use --device cpu")
        return TorchTrainer
    try:
        from in_jax import JaxTrainer
    except ImportError as error:
        raise vd.ToolchainError(f"--framework jax: {error}; pip install jax, or use --framework torch") from error
    return JaxTrainer


def learning_rate(preset: Preset, step: int, steps: int) -> float:
    """A cosine to a tenth behind a warm-up."""
    return preset.lr * min(1.0, (step + 1) / WARMUP) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


def learn(trainer: Trainer, text: Text, steps: int, seed: int, seconds: float = math.inf) -> dict[str, Any]:
    """Train for `steps` steps, or `seconds` if they are over before: the loss of every step, and of held-out text behind the last."""
    losses: list[float] = []
    began, batches, p = time.monotonic(), text.batches(seed), text.preset
    for step in range(steps):
        losses.append(trainer.step(next(batches), learning_rate(p, step, steps)))
        if step % max(1, steps // 10) == 0 or step == steps - 1:
            say(f"  step {step:5}   {losses[-1]:.4f} nats per byte   {time.monotonic() - began:6.1f} s")
        if time.monotonic() - began > seconds:
            break
    took = time.monotonic() - began
    logits: Any = trainer.logits
    return {
        "losses": [round(x, 6) for x in losses],
        "held_out": round(text.loss(logits), 5),
        "steps": len(losses),
        "seconds": round(took, 1),
        "tokens_per_second": round(len(losses) * p.batch * p.t / took),
        "ended_early": len(losses) < steps,
    }


def cell(trainer: Trainer, text: Text, seconds: float) -> dict[str, Any]:
    """Tokens per second of whole training steps: forward, backward, Adam. The first steps, which compile, do not count."""
    batches, p, steps = text.batches(0), text.preset, 0
    for _ in range(WARM_STEPS):
        trainer.step(next(batches), p.lr)
    began = time.monotonic()
    while steps < CELL_STEPS and (steps == 0 or time.monotonic() - began < seconds):
        trainer.step(next(batches), p.lr)
        steps += 1
    took = time.monotonic() - began
    return {"tokens_per_second": round(steps * p.batch * p.t / took), "steps": steps, "batch": p.batch, "peak_bytes": trainer.peak_bytes()}


def bench(o: argparse.Namespace, attention: str, text: Text, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Context -> what was measured at it; what memory or time did not suffice for, or a framework refused, is said, not left out in silence.

    `keep` is given what there is after each context.
    """
    found: dict[str, Any] = {}
    began, make = time.monotonic(), maker(o)
    for context in o.bench:
        if time.monotonic() - began > o.seconds:
            found[str(context)] = {"left_out": "no time"}
            say(f"  {context:7}   left out: --seconds {o.seconds:g} are over")
            continue
        preset = preset_of(o, context)
        try:
            one = cell(make(preset, attention, o.seed, o.nudge), text_of(o, preset, text), CELL_SECONDS)
        except (RuntimeError, vd.OutOfMemoryError) as error:
            # RuntimeError: of torch and of XLA.
            if not isinstance(error, vd.OutOfMemoryError) and "out of memory" not in str(error).lower():
                raise
            found[str(context)] = {"left_out": "out of memory"}
            say(f"  {context:7}   out of memory")
            keep(found)
            continue
        found[str(context)] = one
        memory = "" if one["peak_bytes"] is None else f"   {one['peak_bytes'] / 2**30:6.2f} GiB at most"
        say(f"  {context:7}   {one['tokens_per_second']:9} tokens/s{memory}")
        keep(found)
    return found


def crossing(power: dict[str, Any], other: dict[str, Any]) -> float | None:
    """The context from which on power retention is faster, on straight lines between measured contexts (logarithms of both axes).

    The shortest context if it is faster at all of them, None if it is slower at the longest.
    """
    contexts = [c for c in power if "tokens_per_second" in power[c] and "tokens_per_second" in other.get(c, {})]
    lead = [math.log(power[c]["tokens_per_second"] / other[c]["tokens_per_second"]) for c in contexts]
    behind = [i for i, x in enumerate(lead) if x <= 0]
    if not behind:
        return float(contexts[0]) if contexts else None
    last = behind[-1]
    if last == len(lead) - 1:
        return None
    low, high = math.log(int(contexts[last])), math.log(int(contexts[last + 1]))
    return math.exp(low + (high - low) * -lead[last] / (lead[last + 1] - lead[last]))


def smooth(losses: Sequence[float]) -> list[float]:
    """The mean of each loss and those before it, SMOOTH at most."""
    return [sum(part) / len(part) for i in range(len(losses)) if (part := losses[max(0, i + 1 - SMOOTH) : i + 1])]


def draw(held: dict[str, Any], out: Path) -> bool:
    """The picture beside the JSON; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7.5, 4.5), dpi=140, layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    # Curves that lie on each other are seen by their dashes.
    dashes = ("-", (0, (5, 4)), (0, (2, 3)), (0, (1, 5)))
    for (name, run), style in zip(held["runs"].items(), dashes, strict=False):
        if "losses" in run:
            axes.plot(smooth(run["losses"]), label=f"{name}, held out {run['held_out']:.3f}", linestyle=style)
            axes.set(xlabel=f"steps of {held['batch']} x {held['context']} bytes", ylabel=f"nats per byte, mean of {SMOOTH} steps")
        else:
            there = {int(c): one["tokens_per_second"] for c, one in run.items() if "tokens_per_second" in one}
            axes.plot(list(there), list(there.values()), marker="o", markersize=4, label=name, linestyle=style)
            axes.set(xlabel="context, bytes", ylabel="training, tokens per second", xscale="log", yscale="log")
    axes.set_title(f"{held['framework']}, {held['device']}", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(out)
    return True


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else f"{platform.machine()} {device.upper()}"


def main(o: argparse.Namespace) -> dict[str, Any]:
    """Train or measure each attention in turn; write the JSON after each, and each context, the picture at the end."""
    make, preset = maker(o), preset_of(o, o.bench[-1] if o.bench else o.context)
    held: dict[str, Any] = {
        "framework": f"{o.framework} {importlib.metadata.version(o.framework)}",
        "device": device_name(o.device),
        "command": shlex.join(["python", "examples/train/train.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "vidrial": vd.__version__},
        "config": preset.config,
        "seed": o.seed,
        "nudge": o.nudge,
        "runs": {},
    }
    if not o.bench:
        held |= {"context": o.context, "batch": preset.batch, "lr": preset.lr}
    folder = Path(o.out)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{'bench' if o.bench else 'losses'}_{o.framework}_{o.device}.json"
    text = text_of(o, preset)

    def keep(attention: str, run: dict[str, Any]) -> None:
        held["runs"][attention] = run
        file.write_text(json.dumps(held) + "\n", encoding="utf-8")

    for attention in o.attention:
        say(f"{attention}, {held['framework']}, {held['device']}")
        if o.bench:
            held["runs"][attention] = bench(o, attention, text, partial(keep, attention))
        else:
            run = learn(make(preset, attention, o.seed, o.nudge), text, o.steps, o.seed, o.seconds)
            say(f"  {run['held_out']:.4f} nats per held-out byte after {run['steps']} steps, {run['tokens_per_second']} tokens/s")
            held["runs"][attention] = run
        if o.bench and "power" in held["runs"]:
            others = (name for name in held["runs"] if name not in GATED)
            held["crossing"] = {name: crossing(held["runs"]["power"], held["runs"][name]) for name in others}
        file.write_text(json.dumps(held) + "\n", encoding="utf-8")
    for name, at in held.get("crossing", {}).items():
        say(f"power retention is faster than {name} {'at none of these contexts' if at is None else f'from {at:.0f} bytes of context on'}")
    drawn = draw(held, file.with_suffix(".png"))
    say(file, f"and {file.with_suffix('.png').name}" if drawn else "(no picture: matplotlib is not installed)")
    return held


def number(least: int) -> Callable[[str], int]:
    """Reads a number of at least `least`, or `4k` for 4096."""

    def read(text: str) -> int:
        digits, unit = (text[:-1], 1024) if text.endswith("k") else (text, 1)
        if not digits.isdecimal() or int(digits) * unit < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no number of at least {least}; accepted: 256, 4k")
        return int(digits) * unit

    return read


def seconds(text: str) -> float:
    """Reads seconds above 0."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not found > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return found


def contexts(text: str) -> list[int]:
    """Reads `1k,4k,16k`, as rising numbers."""
    return sorted({number(2)(one) for one in text.split(",")})


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--attention", choices=sorted(MIXERS), nargs="+", default=["power"], help="one curve each; default: power")
    top.add_argument("--framework", choices=["torch", "jax"], default="torch")
    top.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    top.add_argument("--steps", type=number(1), default=300, metavar="N", help="default: 300")
    top.add_argument("--context", type=number(2), default=512, metavar="T", help="bytes of a window; default: 512")
    top.add_argument("--batch", type=number(1), metavar="B", help="windows per step; default: as many as make 1024 bytes, on a GPU 64k")
    top.add_argument("--seconds", type=seconds, default=math.inf, metavar="S", help="per attention: ends a training, leaves out contexts")
    top.add_argument("--bench", type=contexts, metavar="1k,4k,16k", help="tokens per second at these contexts in place of loss curves")
    top.add_argument("--seed", type=int, default=0, help="of the weights and the batches; default: 0")
    top.add_argument("--nudge", type=int, default=0, metavar="N", help="begin with weights a bit or two of float32 beside; default: 0, not")
    top.add_argument("--out", default="build/train", metavar="FOLDER", help="of the JSON and the picture; default: build/train")
    return top


if __name__ == "__main__":
    try:
        main(parser().parse_args())
    except vd.VidrialError as error:
        sys.exit(f"{type(error).__name__}: {error}")
