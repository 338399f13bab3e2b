"""The backward pass of power retention on the host target: run and compare."""

from __future__ import annotations

import numpy as np

from vidrial.host.plan import HostPlan, poison
from vidrial.host.target import SCHEDULES, Schedule
from vidrial.kernels.power_retention.back.op import WORST_ROW, Config, errors, forward_pass, op, outputs, reference, row_errors, sample
from vidrial.kernels.power_retention.back.problem import Gradient
from vidrial.kernels.power_retention.back.scan import Config as Adjoint
from vidrial.kernels.power_retention.back.tokens import Config as Tokens
from vidrial.kernels.power_retention.scan import Config as Scan

Arrays = dict[str, np.ndarray]
# Of each head; with closed gates, or degree 4, rows see one or two keys that count.
USUAL = {"dq": 3.5e-3, "dk": 3.5e-3, "dv": 3.5e-3, "dlog_g": 1.5e-2}
FEW_KEYS = {"dq": 8e-3, "dk": 8e-3, "dv": 8e-3, "dlog_g": 1.5e-2}

NARROW = Config(
    128,
    "sync",
    Scan(tokens=64, stages=3, warps=4, columns=32, segments=1),
    Adjoint(tokens=64, stages=3, warps=4, columns=32),
    Tokens(block=32, warps=4, stages=3, blocks=1),
    Tokens(block=32, warps=4, stages=3, blocks=1),
)


def run(p: Gradient, config: Config, inputs: Arrays, schedule: Schedule = SCHEDULES[0], sanitizer: str | None = None) -> Arrays:
    """The gradients, poisoned before, as is the workspace."""
    results = {name: poison(buffer.shape, buffer.dtype) for name, buffer in outputs(p).items()}
    HostPlan(op, p, config, sanitizer).run({**inputs, **results}, schedule)
    return results


def wrong(
    p: Gradient, inputs: Arrays, results: Arrays, exact: Arrays | None = None, bounds: dict[str, float] = USUAL
) -> dict[str, np.ndarray]:
    """The gradients that are beyond their bounds, with the error of each head; and rows that are."""
    exact = reference(p, inputs) if exact is None else exact
    found = {name: error for name, error in errors(p, results, exact).items() if not (error <= bounds[name]).all()}
    return found | {f"rows of {name}": error for name, error in row_errors(p, results, exact).items() if not (error <= WORST_ROW).all()}


def with_gates(p: Gradient, seed: int, kind: str) -> Arrays:
    """A sample with other gates: open, short, some closed, some beyond the clamp, all closed."""
    inputs, rng = sample(p, seed), np.random.default_rng(seed)
    g = inputs["log_g"]
    if kind == "open":
        g[...] = 0
    elif kind == "short":
        g[...] = -np.log1p(np.exp(-rng.standard_normal(g.shape) - 1))
    elif kind == "mixed":
        g[...] = -np.exp(4 * rng.standard_normal(g.shape) - 4)
        g[rng.random(g.shape) < 0.02], g[rng.random(g.shape) < 0.01] = -100, -np.inf
    elif kind == "closed":
        g[...] = -np.inf
    elif kind == "above":
        g[rng.random(g.shape) < 0.3] = 0.5
    return inputs | forward_pass(p, inputs)
