"""What a new length costs: random lengths, one after another, through ours and the peers. Needs a GPU, torch, CuPy.

    python benchmarks/lengths.py                              # 100 lengths, every system that is installed, at most 60 s each
    python benchmarks/lengths.py --systems "ours, flash; ours, power" --count 20
    python benchmarks/lengths.py --show benchmarks/results/lengths_h200.json    # its table and plot; needs no GPU

Each system has a process and empty caches of its own. It is warmed at one length, its first call ever, which is reported apart; then come the same
random lengths for all. "Prepared" is told of 97 lengths over the range before that first call, by `vidrial.prepare_many`, which compiles what serves
them side by side. Reported are the first call at each (wall time, until the result is there), what was compiled and which configs were timed
meanwhile, and the median of a few calls after it (GPU time by CUDA events). Softmax attention: B 1, H 16, d 128, causal; power retention and
its kin: B 1, H 16, d 64, gated. Writes results/lengths_<gpu>.json and a plot.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import CHUNK, RESULTS, Case, read_results, run_facts, short, slug, table
from benchmarks.peers import ROOT, flash_attention_4, inputs, retention, sdpa

SEED, COUNT, SECONDS, WARM_LENGTH, CALLS = 7, 100, 60.0, 1024, 7
SHORTEST, LONGEST = 100, 16384
# Lengths that ours is told beforehand: what serves them serves nearly all between.
PREPARED = [round(SHORTEST * (LONGEST / SHORTEST) ** (i / 96)) for i in range(97)]

Tensors = Mapping[str, Any]
Count = Callable[[], int]


@dataclass(frozen=True)
class Call:
    """One new length. `first_s`: wall seconds of the first call; `median_ms`: GPU time of the calls after it; `compiled` binaries and `tried`
    configs (timed to choose one) during the first call, None where that cannot be seen."""

    t: int
    first_s: float
    median_ms: float
    compiled: int | None
    tried: int | None


@dataclass(frozen=True)
class Found:
    """A system's run: its first call ever, the lengths that it finished, and why it finished no more."""

    name: str
    warm: Call | None = None
    calls: list[Call] = field(default_factory=list)
    note: str = ""

    @property
    def worst(self) -> float | None:
        """Seconds of the slowest first call."""
        return max((call.first_s for call in self.calls), default=None)

    @property
    def total(self) -> float:
        """Seconds of all first calls."""
        return sum(call.first_s for call in self.calls)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Found:
        """What `asdict` gave."""
        warm = Call(**data["warm"]) if data["warm"] else None
        return cls(data["name"], warm, [Call(**call) for call in data["calls"]], data["note"])


@dataclass(frozen=True)
class System:
    """`d`: head size; `call` makes what is called of q, k, v and log_g; `compiled`, `tried` make counters of what a call has built and timed so
    far, when the process starts. `prepare`: what a service would do before its first call, which counts as part of that."""

    d: int
    call: Callable[[Tensors], Callable[[], Any]]
    compiled: Callable[[], Count] | None = None
    tried: Callable[[], Count] | None = None
    prepare: Callable[[], None] | None = None


def _files(variable: str, pattern: str) -> Callable[[], Count]:
    """Counts files of a pattern below the folder that an environment variable names."""
    return lambda: lambda: sum(1 for _ in Path(os.environ[variable]).rglob(pattern))


def _timed_by_triton() -> Count:
    """Counts configs that Triton's autotuners time."""
    from triton.runtime.autotuner import Autotuner

    timed, bench = 0, Autotuner._bench

    def counted(self: Any, *args: Any, **keywords: Any) -> Any:
        nonlocal timed
        timed += 1
        return bench(self, *args, **keywords)

    Autotuner._bench = counted
    return lambda: timed


def _compiled_by_cute() -> Count:
    """Counts compilations of the CuTe DSL."""
    import cutlass.cute as cute

    made, compile_kernel = 0, cute.compile

    class Counted:
        def __call__(self, *args: Any, **keywords: Any) -> Any:
            nonlocal made
            made += 1
            return compile_kernel(*args, **keywords)

        def __getattr__(self, name: str) -> Any:
            return getattr(compile_kernel, name)

        def __getitem__(self, options: Any) -> Any:
            nonlocal made
            made += 1
            return compile_kernel[options]

    cute.compile = Counted()
    return lambda: made


def _nothing() -> Count:
    return lambda: 0


def _ours_flash(x: Tensors) -> Callable[[], Any]:
    from vidrial.kernels.flash_attention import flash_attention

    return lambda: flash_attention(x["q"], x["k"], x["v"], causal=True)


def _ours_power(x: Tensors) -> Callable[[], Any]:
    from vidrial.kernels.power_retention import power_retention

    return lambda: power_retention(x["q"], x["k"], x["v"], x["log_g"])


def _forgetting(x: Tensors) -> Callable[[], Any]:
    from fla.ops.forgetting_attn import parallel_forgetting_attn

    return lambda: parallel_forgetting_attn(x["q"], x["k"], x["v"], x["log_g"])


def _simple_gla(x: Tensors) -> Callable[[], Any]:
    from fla.ops.simple_gla import chunk_simple_gla

    return lambda: chunk_simple_gla(x["q"], x["k"], x["v"], x["log_g"])


def _prepare_flash() -> None:
    import vidrial
    from vidrial.kernels.flash_attention.op import op

    vidrial.prepare_many(op, [op.example(b=1, hq=16, h=16, t=t, d=128, causal=True) for t in PREPARED])


def _prepare_power() -> None:
    import vidrial
    from vidrial.kernels.power_retention.op import op

    vidrial.prepare_many(op, [op.example(b=1, h=16, t=t, d=64) for t in PREPARED])


OURS_COMPILED, TRITON_COMPILED = _files("VIDRIAL_CACHE_DIR", "kernel.cubin*"), _files("TRITON_CACHE_DIR", "*.cubin")
# No call of ours times configs: there is nothing to count. Of cuDNN nothing can be seen.
SYSTEMS = {
    "ours, flash": System(128, _ours_flash, OURS_COMPILED, _nothing),
    "ours, flash, prepared": System(128, _ours_flash, OURS_COMPILED, _nothing, _prepare_flash),
    "FlashAttention-4": System(128, lambda x: flash_attention_4(x, causal=True), _compiled_by_cute),
    "SDPA cuDNN": System(128, lambda x: sdpa(x, "SDPA cuDNN")),
    "fla, forgetting attention": System(128, _forgetting, TRITON_COMPILED, _timed_by_triton),
    "ours, power": System(64, _ours_power, OURS_COMPILED, _nothing),
    "ours, power, prepared": System(64, _ours_power, OURS_COMPILED, _nothing, _prepare_power),
    "fla, simple GLA": System(64, _simple_gla, TRITON_COMPILED, _timed_by_triton),
    "retention": System(64, lambda x: retention(x, CHUNK), TRITON_COMPILED, _timed_by_triton),
}


def lengths(count: int) -> list[int]:
    """Different lengths, evenly over their logarithm, in random order."""
    rng, found = random.Random(SEED), dict[int, None]()
    while len(found) < count:
        found[round(math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST))))] = None
    return list(found)


def run(system: System, ts: Sequence[int], say: Callable[[Call], None]) -> None:
    """This process's system at each length; `say` is told of each as soon as it is done."""
    import torch

    compiled, tried = system.compiled() if system.compiled else None, system.tried() if system.tried else None
    with torch.no_grad():
        for t in ts:
            call = system.call(inputs(Case("", 1, 16, t, d=system.d)))
            torch.cuda.synchronize()
            before = [count() if count else 0 for count in (compiled, tried)]
            begin = time.perf_counter()
            if t == ts[0] and system.prepare:
                system.prepare()
            call()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
            built, timed = (count() - old if count else None for count, old in zip((compiled, tried), before, strict=True))
            say(Call(t, seconds, statistics.median(_milliseconds(torch, call) for _ in range(CALLS)), built, timed))


def _milliseconds(torch: Any, call: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def measured(name: str, ts: Sequence[int], seconds: float, command: Sequence[str] | None = None) -> Found:
    """A system in a process with empty caches, stopped after so many seconds; what it said until then. `command`: that process."""
    command = command or [sys.executable, __file__, "--one", name, "--lengths", ",".join(map(str, [WARM_LENGTH, *ts]))]
    with tempfile.TemporaryDirectory() as caches:
        variables = ("VIDRIAL_CACHE_DIR", "TRITON_CACHE_DIR", "CUPY_CACHE_DIR", "FLA_CACHE_DIR")
        environment = os.environ | {v: str(Path(caches, v.lower())) for v in variables} | {"PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        for variable in variables:
            Path(environment[variable]).mkdir()
        try:
            done = subprocess.run(command, capture_output=True, env=environment, encoding="utf-8", errors="replace", timeout=seconds)
            output, errors, code = done.stdout, done.stderr, done.returncode
            note = "" if code == 0 else short(errors.strip().splitlines()[-1] if errors.strip() else f"exit code {code}")
        except subprocess.TimeoutExpired as stopped:
            kept: Any = stopped.stdout or b""
            output, note = kept if isinstance(kept, str) else kept.decode("utf-8", "replace"), f"stopped after {seconds:g} s"
    said = [Call(**json.loads(line)) for line in output.splitlines() if line.startswith('{"t"') and line.endswith("}")]
    return Found(name, said[0] if said else None, said[1:], note)


def show(found: Sequence[Found], count: int) -> str:
    """A line per system."""
    head = ("system", "lengths", "first ever s", "compiled", "configs timed", "first call s: median", "worst", "all", "call ms: median", "")
    lines = []
    for one in found:
        seen = [call.first_s for call in one.calls]
        lines.append((
            one.name, f"{len(seen)}/{count}", f"{one.warm.first_s:.2f}" if one.warm else "-",
            _sum([call.compiled for call in one.calls]), _sum([call.tried for call in one.calls]),
            f"{statistics.median(seen):.4f}" if seen else "-", f"{one.worst:.3f}" if one.worst else "-", f"{one.total:.2f}" if seen else "-",
            f"{statistics.median(call.median_ms for call in one.calls):.3f}" if seen else "-", one.note,
        ))  # fmt: skip
    return table(head, lines)


def _sum(counts: Sequence[int | None]) -> str:
    return str(sum(c for c in counts if c is not None)) if counts and None not in counts else "-"


def plot(found: Sequence[Found], gpu: str, path: Path) -> None:
    """Seconds spent in first calls over new lengths seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for one in found:
        if not one.calls:
            continue
        spent = [sum(call.first_s for call in one.calls[: i + 1]) for i in range(len(one.calls))]
        ours = one.name.startswith("ours")
        axes.plot(range(1, len(spent) + 1), spent, label=one.name, linewidth=2.5 if ours else 1.5, linestyle="-" if ours else "--")
        if one.note:
            axes.plot(len(spent), spent[-1], "x", color=axes.lines[-1].get_color())
    axes.set(yscale="log", xlabel="new lengths", ylabel="seconds spent in their first calls", title=f"What a new length costs, {gpu}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default="", help=f"separated by semicolons, of: {'; '.join(SYSTEMS)}")
    parser.add_argument("--count", type=int, default=COUNT, help="lengths")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that a system has for all of them")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--show", type=Path, help="a results file, of which to print the table and draw the plot; measures nothing")
    parser.add_argument("--one", choices=list(SYSTEMS), help=argparse.SUPPRESS)
    parser.add_argument("--lengths", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = [name for name in chosen(options.systems) if name not in SYSTEMS]
    if unknown or options.count < 1:
        parser.error(
            f"no system {unknown[0]!r}; there are: {'; '.join(SYSTEMS)}" if unknown else f"--count {options.count}; give 1 or more"
        )
    return options


def chosen(systems: str) -> list[str]:
    """Names that were asked for, by default all."""
    return [name.strip() for name in systems.split(";") if name.strip()] or list(SYSTEMS)


def main() -> None:
    """The command."""
    options = parse()
    if options.one:
        run(SYSTEMS[options.one], [int(t) for t in options.lengths.split(",")], lambda call: print(json.dumps(asdict(call)), flush=True))
        return
    if options.show:
        data = read_results(options.show, "systems", "gpu", "count")
        found, gpu, count, path = [Found.from_json(one) for one in data["systems"]], data["gpu"], data["count"], options.show
    else:
        import torch

        gpu, count, found = torch.cuda.get_device_name(0), options.count, []
        path, facts = options.out / f"lengths_{slug(gpu)}.json", run_facts(torch)
        path.parent.mkdir(parents=True, exist_ok=True)
        for name in chosen(options.systems):
            found.append(measured(name, lengths(count), options.seconds))
            print(f"{name}: {len(found[-1].calls)} of {count} lengths{', ' if found[-1].note else ''}{found[-1].note}", flush=True)
            data = {"gpu": gpu, "run": facts, "count": count, "seconds": options.seconds, "systems": [asdict(one) for one in found]}
            path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(show(found, count))
    try:
        plot(found, gpu, path.with_suffix(".png"))
    except ImportError as error:
        print(f"no plot: {error}; where matplotlib is, --show {path.name} draws it")


if __name__ == "__main__":
    main()
