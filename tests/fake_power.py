"""A bench for power retention that takes the cost model's word for every time: the sweeps' programs run without a GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from vidrial.device import Device
from vidrial.spec.op import Check, Op
from vidrial.tune.timing import Timing
from vidrial.tune.workers import CheckResult, Job

H200 = Device.of("h200")


class Bench:
    """Times are predictions, and pairs of choices that the model takes for equal differ by their names' lengths."""

    needs_cubins = False

    def __init__(self, op: Op, index: int) -> None:
        self._op = op

    def prepare(self, problem: Any, small: Any, seeds: Sequence[int]) -> None:
        """Nothing to prepare."""

    def check(self, problem: Any, config: Any, seed: int) -> CheckResult:
        """Everything passes."""
        return CheckResult(Check(1e-3, 1e-4, 5e-3, 2e-3))

    def measure(self, problem: Any, configs: Sequence[Any], job: Job, begin: Callable[[int], None]) -> tuple[list[Timing], float]:
        """The prediction, in milliseconds."""
        time.sleep(float(os.environ.get("FAKE_POWER_SECONDS", "0")))
        times = [1e3 * self._op.seconds(problem, config, H200) for config in configs]
        return [Timing(ms, 1e-4 * ms, job.rounds) for ms in times], 0.05

    def usable(self) -> bool:
        """Always."""
        return True

    def slowdowns(self) -> list[str]:
        """None."""
        return []
