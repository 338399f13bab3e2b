"""One measured config as a value."""

from __future__ import annotations

import enum
import math
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeAlias

from vidrial.errors import SweepError
from vidrial.spec.choices import describe
from vidrial.spec.fields import KIND, C, P
from vidrial.spec.op import Check, Op
from vidrial.tune.codec import ADDED, decode
from vidrial.tune.timing import Timing


class Status(enum.Enum):
    """How a trial ended. `ok` alone counts in a ranking."""

    ok = "checked and timed"
    rejected = "a rule forbids it"
    compile = "does not compile"
    stopped = "its compiler crashed, or took too long and was stopped"
    launch = "the driver refuses the launch"
    wrong = "the result is wrong, or differs from run to run"
    timeout = "took longer than the limit; the measuring process was killed"
    crash = "ended the measuring process, or left its CUDA context unusable"


# What may have had another cause than the config, as a GPU that another program fills: `--resume` gives it a second chance.
PASSING, CHANCES = (Status.stopped, Status.launch, Status.timeout, Status.crash), 2


@dataclass(frozen=True)
class KernelResources:
    """What one of an op's kernels takes: registers per thread, bytes spilled per thread, bytes of shared memory per CTA; and the codes of
    ptxas's warnings."""

    kernel: str
    registers: int
    spill_bytes: int
    smem_bytes: int
    ptxas: str = field(default="", metadata={KIND: ADDED})


@dataclass(frozen=True)
class Trial(Generic[P, C]):
    """One config tried on one problem.

    `phase`: `screen` for a few samples, `confirm` and `final` where leaders were timed in turn, `recheck` for a winner's second check,
    `compare` for the one at the problem itself.
    `device`: `Device.key`. `gpu`: which one measured, its CUDA index (`host:index` on a Ray cluster). `reason`: why, if the status is
    not ok. `versions`, `time`: of what, and when (UTC).
    """

    op: str
    problem: P
    config: C
    status: Status
    phase: str = "screen"
    timing: Timing | None = None
    check: Check | None = None
    reason: str = ""
    resources: tuple[KernelResources, ...] = ()
    reference_ms: float = 0.0
    device: str = ""
    seed: int = 0
    versions: str = ""
    time: str = ""
    gpu: str = ""

    @property
    def ok(self) -> bool:
        """Checked and timed."""
        return self.status is Status.ok and self.timing is not None

    @property
    def ms(self) -> float:
        """Median time in milliseconds; infinite if the trial failed."""
        return self.timing.median_ms if self.timing is not None and self.status is Status.ok else math.inf

    @classmethod
    def from_json(cls, op: Op[P, C], data: object) -> Trial[P, C]:
        """The trial that `encode` wrote.

        Raises:
            SweepError: a field is missing, unknown or of another type, or its value is none that a sweep writes.
        """
        trial = typing.cast(Trial[P, C], decode(cls, data, {"problem": op.problem, "config": op.config}))
        trial._check()
        return trial

    @classmethod
    def from_plain_json(cls, data: object) -> PlainTrial:
        """The trial that `encode` wrote, without its op: the problem is its facts by name, the config the line of text that `describe` makes.

        Raises:
            SweepError: a field is missing, unknown or of another type, or its value is none that a sweep writes.
        """
        trial: Trial[Any, Any] = decode(cls, data)
        if not isinstance(trial.problem, dict) or not isinstance(trial.config, dict):
            raise SweepError(f"problem {trial.problem!r} and config {trial.config!r} are not fields by name")
        for name, value in trial.problem.items():
            if isinstance(value, dict) or (type(value) in (int, float) and not abs(value) < 2**63):
                raise SweepError(f"{name}={value!r} is no fact of a problem")
        trial._check()
        return replace(trial, config=" ".join(_words(trial.config)))

    def _check(self) -> None:
        if self.timing is not None:
            self.timing.check()
        figures = [self.reference_ms, *(figure for r in self.resources for figure in (r.registers, r.spill_bytes, r.smem_bytes))]
        if not all(0 <= figure < 2**63 for figure in figures):
            raise SweepError(f"figures that nothing takes: {figures}")
        if self.status is Status.ok and self.check is not None and not self.check.ok:
            raise SweepError(f"status ok, but {self.check} is beyond its bounds")

    def __str__(self) -> str:
        return f"{describe(self.config)}: {self.timing if self.ok else f'{self.status.name}: {self.reason}'}"


# Of an op that need not be there: no dataclasses, but a dict and a line of text.
PlainTrial: TypeAlias = Trial[Any, Any]


def latest(trials: Iterable[Trial[P, C]]) -> dict[C, Trial[P, C]]:
    """Config -> the trial that counts: a failure that stays always does, else the last one that failed or was timed."""
    found: dict[C, Trial[P, C]] = {}
    for trial in trials:
        before = found.get(trial.config)
        stays = before is not None and before.status is not Status.ok and before.status not in PASSING
        if before is None or (not stays and (trial.timing is not None or trial.status is not Status.ok)):
            found[trial.config] = trial
    return found


def passing_failures(trials: Iterable[Trial[P, C]]) -> dict[C, int]:
    """Config -> how often it failed, of those that failed last by what may pass. From `CHANCES` times on it is blocked."""
    trials = list(trials)
    counts = Counter(t.config for t in trials if t.status in PASSING)
    return {config: counts[config] for config, trial in latest(trials).items() if trial.status in PASSING}


def _words(config: Mapping[str, Any]) -> Iterator[str]:
    """What `describe` says of a config, from its JSON."""
    for name, value in config.items():
        yield from (f"{name}.{word}" for word in _words(value)) if isinstance(value, dict) else [f"{name}={value}"]
