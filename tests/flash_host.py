"""Flash attention on the host target: run it poisoned, and compare."""

from __future__ import annotations

import numpy as np

from vidrial.host.plan import HostPlan, poison
from vidrial.host.target import SCHEDULES, HostStats, Schedule
from vidrial.kernels.flash_attention.op import Config, check, op, reference
from vidrial.kernels.flash_attention.problem import Problem

Arrays = dict[str, np.ndarray]


def run(
    p: Problem, config: Config, inputs: Arrays, schedule: Schedule = SCHEDULES[0], sanitizer: str | None = None
) -> tuple[Arrays, dict[str, HostStats]]:
    """Outputs, poisoned before, and what the kernels did."""
    results = {name: poison(buffer.shape, buffer.dtype) for name, buffer in op.outputs(p).items()}
    stats = HostPlan(op, p, config, sanitizer).run({**inputs, **results}, schedule)
    return results, stats


def assert_right(p: Problem, inputs: Arrays, results: Arrays) -> None:
    found = check(p, inputs, results, reference(p, inputs))
    assert found.ok, found
