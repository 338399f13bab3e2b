"""How well the cost model of power retention predicts the trials of the sweep that is shipped: needs no GPU.

    python tests/power_cost.py                # a line for each problem, and all together
    python tests/power_cost.py --fit          # the constants of pace.py that fit best, beside those of a launch
    python tests/power_cost.py --leave-out    # each problem by constants fitted to all others

The first looks of a sweep and its confirmations are minutes of load apart, and the clocks fall by up to 15 %: times are compared at the
clock at which the reference kernel takes its median time, and a later phase by how much slower it found the configs of the first one.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from vidrial.device import Device
from vidrial.kernels.power_retention import pace
from vidrial.kernels.power_retention.op import Config, op
from vidrial.kernels.power_retention.problem import Problem
from vidrial.spec import cost
from vidrial.spec.choices import config_order
from vidrial.spec.op import Stage
from vidrial.sweeps.common import RESULTS
from vidrial.tune.journal import read_journal
from vidrial.tune.trial import Trial

H200 = Device.of("h200")
ARCHIVE = RESULTS / H200.key / "power_retention_trials.tgz"
PHASES = ("screen", "confirm", "final")
Times = dict[Problem, dict[Config, float]]


def constants(module: ModuleType) -> list[str]:
    """Names of the constants of the model that a module holds."""
    return [name for name, value in vars(module).items() if name.isupper() and isinstance(value, float)]


# All but the time of a zeroed buffer: flash attention alone has one.
CONSTANTS: dict[str, ModuleType] = {name: module for module in (cost, pace) for name in constants(module) if name != "CLEAR_SECONDS"}


def values() -> dict[str, float]:
    """The constants by name."""
    return {name: getattr(module, name) for name, module in CONSTANTS.items()}


def put(changed: Mapping[str, float]) -> None:
    """Let the model have these constants."""
    for name, value in changed.items():
        setattr(CONSTANTS[name], name, value)


def trials(every: bool = False) -> dict[Problem, list[Trial[Problem, Config]]]:
    """Every trial of the archive that was checked and timed, by problem; with `every`, all the others, too: checks and failures."""
    found: dict[Problem, list[Trial[Problem, Config]]] = {}
    with tarfile.open(ARCHIVE) as archive:
        for member in archive.getmembers():
            file = archive.extractfile(member)
            if file is not None:
                _, read = read_journal(ARCHIVE / member.name, file.read(), functools.partial(Trial.from_json, op))
                found[read[0].problem] = [t for t in read if every or (t.ok and t.phase in PHASES)]
    return dict(sorted(found.items(), key=lambda item: (item[0].d, item[0].hq // item[0].h, item[0].t * item[0].b * item[0].h)))


def measured() -> Times:
    """Problem -> config -> milliseconds, all at one clock."""
    every = trials()
    usual = statistics.median(t.reference_ms for of_problem in every.values() for t in of_problem)
    found: Times = {}
    for problem, of_problem in every.items():
        times = {phase: {t.config: t.ms * usual / t.reference_ms for t in of_problem if t.phase == phase} for phase in PHASES}
        first = times["screen"]
        found[problem] = dict(first)
        for phase in PHASES[1:]:
            if times[phase]:
                slower = statistics.median(ms / first[c] for c, ms in times[phase].items())
                found[problem] |= {c: ms / slower for c, ms in times[phase].items()}
    return found


@functools.cache
def _stages(problem: Problem, config: Config) -> Sequence[Stage]:
    return op.stages(problem, config)


def predict(problem: Problem, config: Config) -> float:
    """Predicted milliseconds: `op.seconds`, with the stages remembered."""
    return 1e3 * sum(s.kernel.seconds(s.problem, s.config, H200) for s in _stages(problem, config))


def ranks(x: Sequence[float]) -> NDArray[np.float64]:
    """Ranks from 0; equal values share the mean of theirs."""
    _, place, count = np.unique(np.asarray(x), return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(count) - (count + 1) / 2)[place], np.float64)


@dataclass(frozen=True)
class Figures:
    """Of one problem: the predicted favourite's time over the best one's, Spearman's rank correlation of predicted and measured times,
    predicted over measured time of every config."""

    favourite: float
    correlation: float
    ratios: tuple[float, ...]

    @classmethod
    def of(cls, problem: Problem, times: Mapping[Config, float]) -> Figures:
        predicted = {c: predict(problem, c) for c in times}
        favourite = min(times, key=lambda c: (float(f"{predicted[c]:.9g}"), config_order(c)))
        rank = [ranks([source[c] for c in times]) for source in (predicted, times)]
        correlation = float(np.corrcoef(rank[0], rank[1])[0, 1])
        return cls(times[favourite] / min(times.values()), correlation, tuple(predicted[c] / times[c] for c in times))

    def __str__(self) -> str:
        error = math.sqrt(statistics.fmean(math.log(r) ** 2 for r in self.ratios))
        return f"{self.favourite:9.3f} {self.correlation:12.2f} {min(self.ratios):9.2f} {max(self.ratios):5.2f} {error:8.1%}"


@dataclass(frozen=True)
class Summary:
    """Of all problems: favourite over best, median and worst; median rank correlation; extremes of predicted over measured; its typical
    (root mean square) error."""

    favourite: float
    worst: float
    correlation: float
    least: float
    most: float
    error: float

    @classmethod
    def of(cls, figures: Iterable[Figures]) -> Summary:
        every = list(figures)
        ratios = [r for f in every for r in f.ratios]
        favourites = [f.favourite for f in every]
        return cls(
            statistics.median(favourites),
            max(favourites),
            statistics.median(f.correlation for f in every),
            min(ratios),
            max(ratios),
            math.sqrt(statistics.fmean(math.log(r) ** 2 for r in ratios)),
        )

    def __str__(self) -> str:
        return (
            f"favourite over best: median {self.favourite:.4f}, worst {self.worst:.3f}; rank correlation: median {self.correlation:.2f}; "
            f"predicted over measured: {self.least:.2f} to {self.most:.2f}, typical error {self.error:.2%}"
        )


def summary(times: Times) -> Summary:
    return Summary.of(Figures.of(p, of_problem) for p, of_problem in times.items())


def fit(times: Times, names: Sequence[str] = tuple(CONSTANTS), steps: int = 25) -> dict[str, float]:
    """Those constants of least squared error in the logarithm of the time: Levenberg-Marquardt in the constants' logarithms.

    Errors beyond 10 % count for more, and so do configs near the best: three times what slow ones do.
    """
    points = [(p, c, ms) for p, of_problem in times.items() for c, ms in of_problem.items()]
    weight = np.sqrt([1 + 2 * math.exp(-(ms / min(times[p].values()) - 1) / 0.05) for p, _, ms in points])

    def errors(x: NDArray[np.float64]) -> NDArray[np.float64]:
        put(dict(zip(names, np.exp(x).tolist(), strict=True)))
        log = np.log([predict(p, c) / ms for p, c, ms in points])
        return np.asarray(weight * log * np.sqrt(1 + (log / 0.1) ** 2))

    before = values()
    try:
        x = np.log([before[n] for n in names])
        now, damping = errors(x), 1e-2
        for _ in range(steps):
            slopes = np.stack([(errors(x + 1e-3 * axis) - now) / 1e-3 for axis in np.eye(len(x))], axis=1)
            square = slopes.T @ slopes
            for _ in range(8):
                step = np.clip(-np.linalg.solve(square + damping * np.diag(np.diag(square) + 1e-9), slopes.T @ now), -0.5, 0.5)
                new = errors(x + step)
                if new @ new < now @ now:
                    break
                damping *= 4
            gained = 1 - (new @ new) / (now @ now)
            if gained > 0:
                x, now, damping = x + step, new, damping / 4
            if gained < 1e-4:
                break
        return dict(zip(names, np.exp(x).tolist(), strict=True))
    finally:
        put(before)


def leave_out(times: Times) -> dict[Problem, Figures]:
    """Each problem's figures by constants that were fitted to all other problems, from 1.5 times or 1 / 1.5 of today's on."""
    before, found = values(), {}
    away = {name: value * (1.5 if i % 2 else 1 / 1.5) for i, (name, value) in enumerate(before.items())}
    try:
        for problem, of_problem in times.items():
            put(away)
            put(fit({p: t for p, t in times.items() if p != problem}))
            found[problem] = Figures.of(problem, of_problem)
    finally:
        put(before)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit the constants of pace.py")
    parser.add_argument("--leave-out", action="store_true", help="predict each problem by the others")
    options, times = parser.parse_args(), measured()
    if options.fit:
        # Those of a launch are flash attention's, too, whose constants were fitted beside them: they stay.
        for name, value in fit(times, constants(pace)).items():
            print(f"{name:16s} {value:.3g}, today {values()[name]:.3g}")
        return
    figures = leave_out(times) if options.leave_out else {p: Figures.of(p, t) for p, t in times.items()}
    print("   d  BxHQ/H       T  configs  favourite  correlation   predicted/measured   error")
    for p, f in figures.items():
        print(f"{p.d:4d} {f'{p.b}x{p.hq}/{p.h}':>7s} {p.t:7d} {len(times[p]):8d}  {f}")
    print(Summary.of(figures.values()))


if __name__ == "__main__":
    sys.exit(main())
