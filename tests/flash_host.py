"""Flash attention on the host target: run it poisoned, and compare."""

from __future__ import annotations

import numpy as np

from vidrial.host.plan import HostPlan, poison
from vidrial.host.target import SCHEDULES, HostStats, Schedule
from vidrial.kernels.flash_attention.op import Config, check, op, reference, sample
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


def peaked(p: Problem, kind: str) -> dict[str, np.ndarray]:
    """Inputs by which the reference has to move: scores of some 50, or larger and larger ones towards the first key, which comes last."""
    inputs = {name: p.dtype.widen(x) for name, x in sample(p, 6).items()}
    inputs["q"] *= 6.0
    if kind == "growing":
        inputs["k"] *= np.linspace(30.0, 0.1, p.tk)[None, :, None, None]
    if kind == "all alike":
        inputs["k"][:] = inputs["k"][:, :1]
    return {name: p.dtype.round(x) for name, x in inputs.items()}
