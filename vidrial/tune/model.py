"""The calibrated tile-cost model: from the lengths that were measured to those that were not.

A config's time is a sum of five terms that its `Cost` gives for any problem:

    predicted     what its cost predicts
    launches      one constant a stage
    smooth        the work, spread evenly over the device
    by SM         the work of the busiest SM, when the SM's CTAs share its throughput: a step every `sms` CTAs
    by wave       the work of all waves, when a CTA takes as long alone as in company: a step every `sms * ctas_per_sm` CTAs

Before anything is measured the prediction counts alone; the others are what it may miss. So the time is a sawtooth in the length, as it is
on the GPU, and two configs change places where their teeth do.

Few lengths do not tell the terms apart: all that they measured of a small one may be launches, and a fit would have it that a long one takes
no longer. Until `CALIBRATED` problems were measured each config has a factor of its prediction and no more, and so it has beyond `REACH`
times what was measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from vidrial.device import Device
from vidrial.spec.cost import LAUNCH_SECONDS, Cost
from vidrial.spec.fields import keyed_fields
from vidrial.spec.op import Op

PRIOR = (1.0, 0.0, 0.0, 0.0, 0.0)
# Weight of the prior against one measurement, both relative: a few lengths outweigh it, one length only scales it.
POOLED_WEIGHT, OWN_WEIGHT = 1e-3, 1e-2
# From so many measured problems on the terms are told apart, of all configs together and of one.
CALIBRATED = 5
# Times the size of a measured problem: up to there its terms count.
REACH = 4.0
# Added to the distance of a measurement from where it is asked for: nearer ones are all the same.
NEAR = 0.1
# A config that was never measured may take this share of its prediction, as far as is known; and so many configs say which it really is.
UNKNOWN, KNOWN_FROM = 0.6, 16


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


class Point(NamedTuple):
    """One measurement: the `sizes` of its problem, its terms and its milliseconds."""

    sizes: tuple[int, ...]
    terms: tuple[float, ...]
    ms: float


@dataclass(frozen=True)
class Model:
    """`points`: what was measured of each config. `coefficients`: of its terms; `scale`: its times over their predictions, on average."""

    points: Mapping[Any, Sequence[Point]]
    coefficients: Mapping[Any, tuple[float, ...]]
    scale: Mapping[Any, float] = field(default_factory=dict)

    @classmethod
    def fit(cls, measured: Mapping[Any, Sequence[Point]]) -> Model:
        """The model of `measured`: config -> its measurements."""
        scale = {config: _mean([p.ms / _predicted(p.terms) for p in points]) for config, points in measured.items()}
        every = [(p.terms, p.ms / scale[config]) for config, points in measured.items() for p in points]
        shape: tuple[float, ...] = PRIOR
        if len({p.sizes for points in measured.values() for p in points}) >= CALIBRATED:
            shape = fit([x for x, _ in every], [ms for _, ms in every], PRIOR, POOLED_WEIGHT)
        own = {}
        for config, points in measured.items():
            factor = _mean([p.ms / _sum(shape, p.terms) for p in points])
            own[config] = tuple(factor * b for b in shape)
            if len({p.sizes for p in points}) >= CALIBRATED:
                own[config] = fit([p.terms for p in points], [p.ms for p in points], own[config], OWN_WEIGHT)
        return cls(measured, own, scale)

    def ms(self, config: Any, sizes: tuple[int, ...], x: Sequence[float]) -> float:
        """Milliseconds of a measured config whose terms are `x`: what its coefficients give, or beyond `REACH` its prediction, by the factor
        that its measurements are off, the nearest ones foremost."""
        points = self.points[config]
        distances = [distance(p.sizes, sizes) for p in points]
        b = self.coefficients[config] if min(distances) <= math.log(REACH) else PRIOR
        weights = [(d + NEAR) ** -2 for d in distances]
        off = sum(w * math.log(p.ms / _sum(b, p.terms)) for w, p in zip(weights, points, strict=True)) / sum(weights)
        return _sum(b, x) * math.exp(off)

    def least_ms(self, x: Sequence[float]) -> float:
        """What a config that was never measured takes at least, as far as is known, if its terms are `x`.

        From `KNOWN_FROM` measured configs on it is as far off its prediction as they are, and a bit more; else by `UNKNOWN`.
        """
        ratios = sorted(self.scale.values())
        if len(ratios) < KNOWN_FROM:
            return _predicted(x) * UNKNOWN * min([1.0, *ratios])
        return _predicted(x) * ratios[0] * math.pow(ratios[0] / ratios[-1], 6 / len(ratios))


def distance(a: Sequence[int], b: Sequence[int]) -> float:
    """How far sizes are apart: the sum of the logarithms of their ratios."""
    return sum(abs(math.log(max(1, x) / max(1, y))) for x, y in zip(a, b, strict=True))


def _predicted(x: Sequence[float]) -> float:
    return x[0]


def _sum(b: Sequence[float], x: Sequence[float]) -> float:
    return sum(factor * term for factor, term in zip(b, x, strict=True))


def _mean(ratios: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(statistics.fmean(map(math.log, ratios)))
