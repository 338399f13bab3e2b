"""A byte model of 0.8 M parameters whose softmax attention becomes power retention: trained, swapped, measured, on a CPU or an H200.

python examples/charlm/charlm.py demo                     # 50 processor seconds: the model that comes along, swapped, with three context curves
python examples/charlm/charlm.py train --out build/mine   # a model from nothing
python examples/charlm/charlm.py metamorphose build/mine --out build/power
python examples/charlm/charlm.py curves build/mine build/power
python examples/charlm/charlm.py generate build/power --prompt "def main"
python examples/charlm/charlm.py flops
python examples/charlm/charlm.py results --preset h200    # everything that the figures show, in one command
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decoder import Decoder
from lab import HERE, PRESETS, Preset, Run, Text, fresh, predictor, read, toy, train, with_mixer

import vidrial as vd
import vidrial.flops as fl
import vidrial.icl as icl
from vidrial.kernels.power_retention.metamorphosis import carry_states, distill_layers, metamorphose

RESULTS = HERE / "results"
# Memory of gates that forget nothing within a window, in tokens.
OPEN = 1000.0


def say(*words: object) -> None:
    """Print at once."""
    print(*words, flush=True)


def recover(model: Decoder, teacher: Decoder | None, text: Text, layerwise: int, steps: int, lr: float | None = None) -> Run:
    """The recipe: `layerwise` steps at the base's highest rate, then `steps` end to end at a third of it. Losses are by steps in all."""
    p = text.preset
    losses, seconds, tokens = {0: text.loss(model)}, 0.0, 0
    if teacher is not None and layerwise:
        began = time.monotonic()
        with p.autocast():
            batches = (window[:, :-1] for window in text.batches(seed=8))
            distill_layers(model, teacher, batches, layerwise, p.lr)
        seconds, tokens = time.monotonic() - began, layerwise * p.batch * p.t
        losses[layerwise] = text.loss(model)
    look = [n - layerwise for n in (10, 20, 40, 80, 160) if layerwise < n < layerwise + steps]
    run = train(model, text, steps, p.lr / 3 if lr is None else lr, 10, look=look)
    losses |= {layerwise + step: loss for step, loss in run.losses.items()}
    return Run(losses, layerwise + run.steps, tokens + run.tokens, seconds + run.seconds, run.ended_early)


def power(base: Decoder, **how: Any) -> Decoder:
    """A swapped copy of a model."""
    return metamorphose(copy.deepcopy(base), **how)


# What happens to the base, for as many steps each: a model that is to learn, its teacher if layers are distilled, the learning rate if another.
Ways = dict[str, Callable[[Decoder, Preset], tuple[Decoder, bool, float | None]]]
WAYS: Ways = {
    "original": lambda base, p: (copy.deepcopy(base), False, None),
    "layer-wise": lambda base, p: (power(base), True, None),
    "degree 4": lambda base, p: (power(base, degree=4), True, None),
    "degree 1": lambda base, p: (with_mixer(copy.deepcopy(base), "degree1"), False, None),
    "gates": lambda base, p: (power(base), False, None),
    "open gates": lambda base, p: (power(base, gates=(OPEN, OPEN)), False, None),
    "scratch": lambda base, p: (metamorphose(fresh(p.config)), False, p.lr),
}
# The context from which slopes are fitted.
LOW = {"cpu": 64, "h200": 256}
# Ways whose curves say nothing that the others' do not.
NO_CURVE = ("base", "gates", "open gates", "scratch")
# What a preset runs: ways from its base, and mixers from nothing; what its curves are of.
RUNS = {
    "cpu": (list(WAYS), []),
    "h200": (["original", "layer-wise", "scratch"], ["window", "power:2", "degree1"]),
}


def curve_of(model: Decoder, text: Text) -> icl.Curve:
    """Loss of the same held-out bytes from more and more context."""
    p = text.preset
    return icl.by_context(predictor(model, p), text.held.cpu().numpy().astype("int64"), p.contexts, p.targets, p.windows)


def told(curve: icl.Curve, base: icl.Curve, low: int) -> dict[str, Any]:
    """A curve as the results keep it, with its slope beyond `low` tokens and what it loses more than the base."""
    slope, more = icl.slope(curve, low), icl.excess(curve, base)
    return {
        "context": curve.context.tolist(),
        "mean": curve.mean.round(5).tolist(),
        "error": curve.error.round(5).tolist(),
        "slope": [round(slope.value, 5), round(slope.error, 5)],
        "excess": more.mean.round(5).tolist(),
        "excess_error": more.error.round(5).tolist(),
    }


def line(name: str, found: dict[str, Any]) -> str:
    """A curve as it is printed."""
    means = " ".join(f"{x:.3f}" for x in found["mean"])
    return f"{name:12} {means}   slope {found['slope'][0]:+.4f} +- {found['slope'][1]:.4f}"


class Results:
    """A file that is written after every run, so that a stopped one keeps what it has."""

    def __init__(self, path: Path, preset: Preset) -> None:
        self.path = path
        self.held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        device = torch.cuda.get_device_name() if preset.device != "cpu" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        shown = {k: v for k, v in dataclasses.asdict(preset).items() if k != "seconds"}
        self.held |= {"preset": shown, "device": device, "torch": torch.__version__, "python": platform.python_version()}

    def put(self, part: str, name: str, what: dict[str, Any]) -> None:
        self.held.setdefault(part, {})[name] = what
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.held, indent=1) + "\n", encoding="utf-8")


def results(o: argparse.Namespace) -> None:
    """All that the figures show. Models are kept in the work folder, and runs that it holds already are not repeated."""
    preset, work = PRESETS[o.preset], Path(o.work) / o.preset
    text, kept = Text(preset), Results(RESULTS / f"{o.preset}.json", preset)
    ways, mixers = RUNS[o.preset]

    def run(name: str, part: str, make: Callable[[], tuple[Decoder, Run]]) -> None:
        if (work / name / "config.json").is_file():
            return
        began = time.process_time()
        model, done = make()
        rate = {"tokens_per_second": round(done.tokens / done.seconds) if done.seconds else None}
        kept.put(part, name, dataclasses.asdict(done) | rate | {"processor_seconds": round(time.process_time() - began, 1)})
        model.cpu().write(work / name)
        say(f"{name:12} {' '.join(f'{step}: {loss:.3f}' for step, loss in done.losses.items())}   {done.seconds:.0f} s")

    def from_nothing(mixer: str) -> tuple[Decoder, Run]:
        model = with_mixer(fresh(preset.config), f"window:{preset.window}" if mixer == "window" else mixer).to(preset.device)
        return model, train(model, text, preset.base, preset.lr, preset.warmup, seed=1)

    def along(way: str, base: Decoder) -> tuple[Decoder, Run]:
        model, taught, lr = WAYS[way](base, preset)
        layerwise = preset.layerwise if taught else 0
        model.to(preset.device)
        return model, recover(model, base, text, layerwise, preset.layerwise + preset.tune - layerwise, lr)

    if o.preset == "cpu":
        base = toy()
    else:
        run("base", "scratch", lambda: from_nothing("softmax"))
        base = read(work / "base")
    base.to(preset.device)
    kept.put("base", "loss", {"held_out": text.loss(base)})
    for mixer in mixers:
        run(f"{mixer} from nothing", "scratch", partial(from_nothing, mixer))
    for way in ways:
        run(way, "recovery", partial(along, way, base))
    found = curve_of(base, text)
    low = LOW[o.preset]
    kept.put("curves", "softmax", told(found, found, low))
    window = with_mixer(copy.deepcopy(base), f"window:{preset.window}").to(preset.device)
    kept.put("curves", f"window {preset.window}", told(curve_of(window, text), found, low))
    for folder in sorted(path.parent for path in work.glob("*/config.json")):
        if folder.name not in (*NO_CURVE, *kept.held["curves"]):
            kept.put("curves", folder.name, told(curve_of(read(folder).to(preset.device), text), found, low))
    for name, what in kept.held["curves"].items():
        say(line(name, what))


def demo(o: argparse.Namespace) -> None:
    """The model that comes along, swapped, taught layer by layer, trained on; and what context is worth to it before and after."""
    began = time.monotonic()

    def tell(*words: object) -> None:
        say(f"{time.monotonic() - began:5.1f} s ", *words)

    preset = PRESETS["cpu"]
    preset = dataclasses.replace(preset, evaluate=min(preset.evaluate, 16), windows=min(preset.windows, 64))
    text, base = Text(preset), toy()
    tell(f"softmax attention, {sum(p.numel() for p in base.parameters()):,} parameters: {text.loss(base):.3f} nats per held-out byte")
    model = power(base)
    tell(f"power retention in its place: {text.loss(model):.3f}")
    distill_layers(model, base, (window[:, :-1] for window in text.batches(seed=8)), o.layerwise, preset.lr)
    tell(f"{o.layerwise} steps, layer by layer: {text.loss(model):.3f}")
    run = train(model, text, o.steps, preset.lr / 3, 5)
    tell(f"{o.steps} steps end to end: {run.losses[run.steps]:.3f}")
    before = curve_of(base, text)
    say(f"        nats per byte from {', '.join(map(str, preset.contexts))} bytes of context on, the same bytes:")
    for name, one in (("softmax", base), ("window 16", with_mixer(copy.deepcopy(base), "window:16")), ("power", model)):
        tell(line(name, told(before if one is base else curve_of(one, text), before, 64)))
    say(f"{time.process_time():5.1f} processor seconds")


def train_one(o: argparse.Namespace) -> None:
    """A model from nothing."""
    preset = PRESETS[o.preset]
    text, model = Text(preset), with_mixer(fresh(preset.config), o.mixer).to(preset.device)
    run = train(model, text, o.steps or preset.base, preset.lr, preset.warmup, seed=1)
    say(f"{run.losses[run.steps]:.4f} nats per held-out byte after {run.steps} steps, {run.tokens / run.seconds:.0f} tokens/s")
    model.cpu().write(o.out)


def metamorphose_one(o: argparse.Namespace) -> None:
    """Swap, distil, train on."""
    preset = PRESETS[o.preset]
    text, base = Text(preset), read(o.model).to(preset.device)
    model = power(base, degree=o.degree, gates=tuple(o.gates))
    run = recover(model, base, text, preset.layerwise if o.layerwise is None else o.layerwise, preset.tune if o.steps is None else o.steps)
    say(f"softmax {text.loss(base):.4f}; {', '.join(f'step {step}: {loss:.4f}' for step, loss in run.losses.items())}")
    model.cpu().write(o.out)


def curves(o: argparse.Namespace) -> None:
    """Loss by context of models, each beside the first."""
    preset = PRESETS[o.preset]
    text, first = Text(preset), None
    say(f"{'':12} {' '.join(f'{c:5}' for c in preset.contexts)} tokens of context")
    for folder in o.models:
        found = curve_of(read(folder).to(preset.device), text)
        first = first or found
        say(line(Path(folder).name, told(found, first, o.low)))


def shape(config: dict[str, Any]) -> fl.Model:
    """A model of this folder, whose MLP is that of StarCoder2."""
    return fl.Model.of({**config, "model_type": "starcoder2"})


def flops_of(o: argparse.Namespace) -> None:
    """Weight FLOPs per state FLOP of the preset's shape."""
    preset = PRESETS[o.preset]
    model = shape(preset.config)
    mixers = [fl.parse_mixer(text, model) for text in ("attention", f"window:{preset.window}", "degree1", "power:2", "power:4")]
    lengths = [2**n for n in range(8, 19, 2)]
    say(f"{'weights / state':16} {' '.join(f'{t:>9}' for t in lengths)}   tokens")
    for mixer in mixers:
        say(f"{mixer.name:16} {' '.join(f'{float(model.ratio(mixer, t)):9.3f}' for t in lengths)}")


def generate(o: argparse.Namespace) -> None:
    """The likeliest bytes after a prompt: from the states, at a constant size, or recomputed where attention is softmax."""
    model = read(o.model) if o.model else toy()
    text = torch.tensor([list(o.prompt.encode())], dtype=torch.int64)
    if not text.numel():
        raise vd.ArgumentError("--prompt is empty; accepted: at least one byte, from which the model goes on")
    began, states = time.monotonic(), 0
    with torch.no_grad():
        if "vidrial" in model.config:
            with carry_states(model) as carried:
                logits = model(text)
                for _ in range(o.tokens):
                    text = torch.cat((text, logits[:, -1:].argmax(-1)), 1)
                    logits = model(text[:, -1:], start=text.shape[1] - 1)
                states = sum(x.numel() for one in carried if one is not None for x in (one.S, one.Z))
        else:
            for _ in range(o.tokens):
                text = torch.cat((text, model(text)[:, -1:].argmax(-1)), 1)
    say(bytes(text[0].tolist()).decode(errors="replace"))
    kept = f"{4 * states:,} bytes of state, however long the text" if states else "recomputed for every byte"
    print(f"({o.tokens / (time.monotonic() - began):.0f} bytes/s; {kept})", file=sys.stderr)


def count(text: str) -> int:
    """An argument that counts something.

    Raises:
        ValueError: it is none.
    """
    if (found := int(text)) < 1:
        raise ValueError(f"{found} is not at least 1")
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=(run.__doc__ or "").partition("\n")[0])
        one.set_defaults(run=run)
        one.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
        return one

    one = command("demo", demo)
    one.add_argument("--layerwise", type=int, default=40, help="steps layer by layer")
    one.add_argument("--steps", type=count, default=30, help="steps end to end")
    one = command("train", train_one)
    one.add_argument("--mixer", default="softmax", help="softmax, window:16, degree1, power:2, power:4")
    one.add_argument("--steps", type=count)
    one.add_argument("--out", required=True, help="folder of the model")
    one = command("metamorphose", metamorphose_one)
    one.add_argument("model", help="folder of a softmax model")
    one.add_argument("--degree", type=int, default=2)
    one.add_argument("--gates", type=float, nargs=2, default=[12.0, 128.0], metavar="TOKENS", help="shortest and longest memory of heads")
    one.add_argument("--layerwise", type=int, help="steps layer by layer")
    one.add_argument("--steps", type=count, help="steps end to end")
    one.add_argument("--out", required=True, help="folder of the model")
    one = command("curves", curves)
    one.add_argument("models", nargs="+", help="folders")
    one.add_argument("--low", type=int, default=64, help="context from which slopes are fitted")
    command("flops", flops_of)
    one = command("generate", generate)
    one.add_argument("model", nargs="?", help="folder; the softmax model that comes along if none is given")
    one.add_argument("--prompt", default="def main(")
    one.add_argument("--tokens", type=count, default=100)
    one = command("results", results)
    one.add_argument("--work", default="build/charlm", help="folder of the models")
    return top


if __name__ == "__main__":
    given = parser().parse_args()
    try:
        if PRESETS[given.preset].device != "cpu" and not torch.cuda.is_available():
            raise vd.ToolchainError(f"--preset {given.preset} needs a GPU, and torch finds none; accepted: cpu")
        given.run(given)
    except vd.VidrialError as error:
        sys.exit(f"{type(error).__name__}: {error}")
