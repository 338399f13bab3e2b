"""An op whose bench computes its times instead of taking them: a sawtooth in the length, with planted failures.

`FAKE_OP_LOG` names a file that gets a line for every config measured; `FAKE_OP_SECONDS` is what one measurement takes, `FAKE_OP_LATER_SECONDS`
what one takes after the first eight;
`FAKE_OP_FAULTS` plants faults: `width=fault,...`; `FAKE_OP_LOST_GPU` is the index of a GPU that does not work.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.errors import LaunchError
from vidrial.spec.cost import Cost
from vidrial.spec.fields import choice, dynamic, part, static
from vidrial.spec.kernel import Kernel
from vidrial.spec.op import Buffer, Check, Op, Stage
from vidrial.spec.source import Arguments, Tiles
from vidrial.tune.measure import block_difference
from vidrial.tune.timing import Timing
from vidrial.tune.workers import CheckResult, Job

TEMPLATE = Path(__file__).parent / "fake_op.cu.j2"
H200 = Device.of("h200")
# Elements that are right whatever fault is planted: more than the small problem has.
LARGE = 5000
ARGS = Arguments(y="int*", n="int")


@dataclass(frozen=True)
class Problem:
    dtype: DType = static()
    n: int = dynamic()
    scale: float = dynamic(keyed=False)


@dataclass(frozen=True)
class Config:
    tile: int = choice(128, 64, 96, 32)
    width: int = choice(1, 2, 3, 4)


def rules(p: Problem, c: Config, device: Device) -> list[tuple[bool, str]]:
    return [(c.tile <= p.n, f"tile={c.tile} is longer than n={p.n}")]


def cost(p: Problem, c: Config, device: Device) -> Cost:
    ctas = -(-p.n // c.tile)
    # A bit more for a longer tile: no two tie.
    return Cost(flops=ctas * c.tile * (1e6 + c.tile), bytes=0, ctas=ctas)


def true_ms(n: int, tile: int, width: int) -> float:
    """What the fake GPU takes: whole waves of CTAs, larger tiles more efficient, `width` 3 best."""
    waves = -(-n // (tile * H200.sms))
    return 0.005 + waves * tile * 1e-4 * (1 + 8 / tile) * (1 + 0.1 * abs(width - 3))


fake = Kernel(
    "fake",
    TEMPLATE,
    Problem,
    Config,
    ARGS,
    lambda p, c: Tiles(threads=128, width=c.width),
    lambda p, c: (-(-p.n // c.tile), 1, 1),
    rules,
    cost,
)


def inputs(p: Problem) -> dict[str, Buffer]:
    return {"x": Buffer((p.n,), DType.float32)}


def outputs(p: Problem) -> dict[str, Buffer]:
    return {"y": Buffer((p.n,), DType.int32)}


def sample(p: Problem, seed: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal(p.n, np.float32)}


def reference(p: Problem, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"y": np.full(p.n, p.n)}


def check(p: Problem, inputs: Any, results: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> Check:
    return Check(float(np.abs(results["y"] - expected["y"]).max()), 0.0, 1e-3, 1e-3)


def example(*, n: int = 10007) -> Problem:
    return Problem(DType.float16, n, 1.0)


def small(p: Problem) -> Problem:
    return example(n=min(p.n, 300))


FUNCTIONS: dict[str, Any] = {
    "inputs": inputs,
    "outputs": outputs,
    "sample": sample,
    "reference": reference,
    "check": check,
    "small": small,
    "example": example,
}
op = Op.of(fake, **FUNCTIONS)


picky_op = Op.of(fake, **FUNCTIONS | {"small": lambda p: example(n=100)})


@dataclass(frozen=True)
class PartsConfig:
    """`chunk` 1024 and more is not legal at the small problem, so its parts are checked under another chunk."""

    chunk: int = choice(256, 64, 1024, 0)
    first: Config = part(Config)
    second: Config = part(Config)


def parts_stages(p: Problem, c: PartsConfig) -> list[Stage]:
    last = [Stage(fake, p, c.second, "second")]
    return [Stage(fake, p, c.first, "first"), *last] if c.chunk else last


parts_op = Op(
    name="fake_parts",
    kernels=(fake,),
    problem=Problem,
    config=PartsConfig,
    stages=parts_stages,
    rules=lambda p, c: iter([(c.chunk < p.n, f"chunk={c.chunk} holds all of n={p.n}")]),
    **FUNCTIONS,
)


def parts_ms(n: int, c: PartsConfig) -> float:
    """Two stages after one another; with chunks the second has less to do."""
    second = true_ms(n, c.second.tile, c.second.width)
    return true_ms(n, c.first.tile, c.first.width) + second * (0.2 + abs(c.chunk - 256) / 4096) if c.chunk else 3 * second


class FakeBench:
    """Times from `true_ms`, with a deterministic noise of 0.1 %."""

    needs_cubins = False

    def __init__(self, op: Op, index: int) -> None:
        self.op, self.index, self.measured = op, index, 0
        faults = (entry.split("=") for entry in os.environ.get("FAKE_OP_FAULTS", "").split(",") if entry)
        self.faults = {int(width): fault for width, fault in faults}

    def prepare(self, problem: Problem, small: Problem, seeds: Sequence[int]) -> None:
        if os.environ.get("FAKE_OP_LOST_GPU") == str(self.index):
            raise LaunchError("it fell off the bus")
        if self.faults.get(0) == "prepare":
            raise LaunchError("no such GPU")

    def check(self, problem: Problem, config: Any, seed: int) -> CheckResult:
        widths = [config.first.width, config.second.width] if isinstance(config, PartsConfig) else [config.width]
        fault = next((self.faults[w] for w in widths if w in self.faults), "")
        if fault == "crash":
            os.abort()
        if fault == "hang":
            time.sleep(1e6)
        if fault == "bug":
            raise ZeroDivisionError("in the op's own check")
        if fault in ("launch", "sticky"):
            raise LaunchError(f"{fault} error of {config}")
        wrong = fault == "wrong" or (fault == "wrong later" and seed == 1)
        return CheckResult(Check(1.0 if wrong else 1e-4, 0.0, 1e-3, 1e-3), "two runs differ" if fault == "unrepeatable" else "")

    def compare(self, problem: Problem, configs: Sequence[Any], seed: int) -> float:
        """Results of n elements; a config with the fault `wrong at size` loses one tile of what is beyond LARGE."""
        results = []
        for config in configs:
            y = np.random.default_rng(seed).standard_normal(problem.n, np.float32)
            widths = [config.first.width, config.second.width] if isinstance(config, PartsConfig) else [config.width]
            if any(self.faults.get(width) == "wrong at size" for width in widths):
                y[LARGE : LARGE + 96] = 0.0
            if any(self.faults.get(width) == "crash at size" for width in widths):
                raise LaunchError("out of memory")
            results.append(y * np.float32(1 + 1e-4 * widths[0]))
        return block_difference(np, *results, DType.float32)

    def measure(self, problem: Problem, configs: Sequence[Any], job: Job, begin: Callable[[int], None]) -> tuple[list[Timing], float]:
        timings = []
        for i, config in enumerate(configs):
            begin(i)
            if os.environ.get("FAKE_OP_LOG"):
                with open(os.environ["FAKE_OP_LOG"], "a") as log:
                    log.write(f"{job.task} {config}\n")
            self.measured += 1
            seconds = os.environ.get("FAKE_OP_SECONDS", "0")
            time.sleep(float(os.environ.get("FAKE_OP_LATER_SECONDS", seconds) if self.measured > 8 else seconds))
            if job.task == "time" and isinstance(config, Config) and self.faults.get(config.width) == "crash later":
                os.abort()
            ms = parts_ms(problem.n, config) if isinstance(config, PartsConfig) else true_ms(problem.n, config.tile, config.width)
            timings.append(Timing(ms, 1e-3 * ms, job.rounds))
        return timings, 0.05

    def usable(self) -> bool:
        return "sticky" not in self.faults.values()

    def slowdowns(self) -> list[str]:
        return []
