"""The calibrated tile-cost model: from the lengths that were measured to those that were not.

A config's time is a sum of five terms that its `Cost` gives for any problem, with coefficients fitted to its own measurements:

    predicted     what its cost predicts
    launches      one constant a stage
    smooth        the work, spread evenly over the device
    by SM         the work of the busiest SM, when the SM's CTAs share its throughput: a step every `sms` CTAs
    by wave       the work of all waves, when a CTA takes as long alone as in company: a step every `sms * ctas_per_sm` CTAs

Before anything is measured the prediction counts alone; the others are what it may miss. So the time is a sawtooth in the length, as it is
on the GPU, and two configs change places where their teeth do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vidrial.device import Device
from vidrial.spec.cost import LAUNCH_SECONDS, Cost
from vidrial.spec.fields import keyed_fields
from vidrial.spec.op import Op

PRIOR = (1.0, 0.0, 0.0, 0.0, 0.0)
# Weight of the prior against one measurement, both relative: a few lengths outweigh it, one length only scales it.
POOLED_WEIGHT, OWN_WEIGHT = 1e-3, 1e-2


def terms(costs: Sequence[Cost], device: Device) -> tuple[float, ...]:
    """The five terms in milliseconds, summed over the launches."""
    predicted = smooth = by_sm = by_wave = 0.0
    for cost in costs:
        ctas, slots = max(1, cost.ctas), device.sms * max(1, cost.ctas_per_sm)
        arithmetic, memory = ctas * cost.arithmetic(device) / device.sms * 1e3, cost.bytes / (device.bandwidth_gbs * 1e6)
        predicted += cost.seconds(device) * 1e3
        smooth += max(arithmetic, memory)
        by_sm += max(arithmetic * -(-ctas // device.sms) * device.sms / ctas, memory)
        by_wave += max(arithmetic * -(-ctas // slots) * slots / ctas, memory)
    return predicted, len(costs) * LAUNCH_SECONDS * 1e3, smooth, by_sm, by_wave


def work(op: Op, problem: Any, config: Any, device: Device) -> tuple[float, ...]:
    """The terms of a config on a problem. A kernel without a cost model counts as work in proportion to the problem's sizes."""
    costs = []
    for stage in op.stages(problem, config):
        if stage.kernel.cost is not None:
            costs.append(stage.kernel.cost(stage.problem, stage.config, device))
        else:
            size = float(np.prod([max(1, n) for n in keyed_fields(stage.problem).values()], dtype=np.float64))
            costs.append(Cost(flops=0, bytes=size, ctas=device.sms))
    return terms(costs, device)


def fit(rows: Sequence[Sequence[float]], times: Sequence[float], prior: Sequence[float], weight: float) -> tuple[float, ...]:
    """Coefficients, none negative, of least relative error: minimise |X b / t - 1|^2 + weight |(b - prior) x / t|^2.

    Args:
        rows: [n, 5] terms of each measurement, in milliseconds.
        times: [n] measured milliseconds.
        prior: [5] where the measurements leave the choice.
        weight: of the prior against one measurement.
    """
    relative = np.asarray(rows, np.float64) / np.asarray(times, np.float64)[:, None]
    scale = np.sqrt(weight * np.square(relative).mean(0))
    before = np.asarray(prior, np.float64)
    active = np.ones(len(before), bool)
    found = np.zeros(len(before))
    while active.any():
        left = np.vstack([relative[:, active], np.diag(scale[active])])
        right = np.concatenate([np.ones(len(times)), scale[active] * before[active]])
        solution = np.linalg.lstsq(left, right, rcond=None)[0]
        found[:] = 0.0
        found[active] = solution
        if (solution >= 0).all():
            break
        active &= found >= 0
    return tuple(float(b) for b in np.maximum(found, 0.0))


@dataclass(frozen=True)
class Model:
    """Coefficients of every measured config, and of all together for the terms that one config's measurements do not tell apart."""

    coefficients: Mapping[Any, tuple[float, ...]]
    pooled: tuple[float, ...]

    @classmethod
    def fit(cls, measured: Mapping[Any, Sequence[tuple[Sequence[float], float]]]) -> Model:
        """The model of `measured`: config -> (terms, milliseconds) of each problem that it was timed on."""
        every = [point for points in measured.values() for point in points]
        if not every:
            return cls({}, PRIOR)
        pooled = fit([x for x, _ in every], [t for _, t in every], PRIOR, POOLED_WEIGHT)
        own = {}
        for config, points in measured.items():
            own[config] = fit([x for x, _ in points], [t for _, t in points], pooled, OWN_WEIGHT)
        return cls(own, pooled)

    def ms(self, config: Any, x: Sequence[float]) -> float:
        """Predicted milliseconds of a config whose terms are `x`."""
        return sum(b * term for b, term in zip(self.coefficients.get(config, self.pooled), x, strict=True))
