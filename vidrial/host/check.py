"""An op's kernels on the host target: odd lengths, unlike configs, every order of threads and landing of cp.async, sanitizers.

check(op).ok
assert_op_correct(op)      # in a test
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeAlias

import numpy as np

from vidrial.device import DEFAULT_GPU, Device
from vidrial.dtypes import DType
from vidrial.errors import ArgumentError, ArgumentTypeError, CheckError, CompileError, LaunchError, UnsupportedError
from vidrial.host.plan import HostPlan
from vidrial.host.target import SCHEDULES, Schedule
from vidrial.progress import Progress, Silent
from vidrial.spec.choices import describe
from vidrial.spec.fields import C, P, fields
from vidrial.spec.op import Check, Op
from vidrial.spec.registry import make_problem
from vidrial.spec.space import Candidate

# One element, one past a power of two, one past its double: no tile divides them, and a state is carried over two chunks of 128.
LENGTHS = (1, 129, 257)
SANITIZERS = (None, "address", "thread")
# Between regions of shared memory; more than any one vector or row reaches over.
GUARD_BYTES = 1024
SEED = 0
Arrays: TypeAlias = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Outcome(Generic[P, C]):
    """A problem and config under one sanitizer (or none) and `schedules` schedules: the check of the first, and what was wrong, or ''."""

    problem: P
    config: C
    sanitizer: str | None
    schedules: int
    check: Check | None
    failure: str
    seconds: float

    @property
    def summary(self) -> str:
        """What was wrong, without a sanitizer's whole report."""
        return self.failure.partition("\nwhole ")[0]

    def __str__(self) -> str:
        result = f"FAILED: {self.summary}" if self.failure else f"ok: {self.check}"
        return f"{self.problem} with {describe(self.config)}, {self.sanitizer or 'plain'}, {self.schedules} schedules: {result}"


@dataclass(frozen=True)
class Report(Generic[P, C]):
    """What `check` found."""

    op: str
    outcomes: tuple[Outcome[P, C], ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Outcome[P, C], ...]:
        """The outcomes that are not right."""
        return tuple(outcome for outcome in self.outcomes if outcome.failure)

    def __str__(self) -> str:
        return "\n".join((f"{self.op}: {len(self.failures)} of {len(self.outcomes)} runs failed", *map(str, self.failures)))


def check(
    op: Op[P, C],
    problems: Sequence[P] | None = None,
    configs: int = 2,
    sanitizers: Sequence[str | None] = SANITIZERS,
    progress: Progress | None = None,
) -> Report[P, C]:
    """Run an op's kernels on the host target and compare with its reference; no GPU is needed.

    Outputs and workspace are NaN before, inputs read-only, regions of shared memory apart. Schedules must agree to the bit.

    Args:
        problems: what is asked; by default `odd_problems(op)`.
        configs: the config predicted best for the last problem and the best ones unlike it. Each problem is run with those that are
            legal for it, or, if none is, with its own best.
        sanitizers: None (values only), `address`, `thread` (races), `undefined`.

    Raises:
        ArgumentError: no problem or no config is asked for. ArgumentTypeError: a sample is of a dtype that no call takes.
        ConfigError: no config is legal. ToolchainError: there is no compiler.
    """
    chosen = list(problems) if problems is not None else odd_problems(op)
    if not chosen or configs < 1:
        raise ArgumentError(f"{op.name}: {len(chosen)} problems and {configs} configs check nothing; give at least 1 of each")
    runs = list(_runs(op, chosen, configs, sanitizers))
    progress = progress or Silent()
    progress.begin("check", len(runs))
    outcomes, inputs = [], {problem: _inputs(op, problem) for problem in chosen}
    expected = {problem: op.reference(problem, inputs[problem]) for problem in chosen}
    for problem, config, sanitizer in runs:
        outcomes.append(_outcome(op, problem, config, sanitizer, (inputs[problem], expected[problem])))
        progress.advance(f"{describe(config)} {sanitizer or 'plain'}")
    return Report(op.name, tuple(outcomes))


def assert_op_correct(
    op: Op[P, C], problems: Sequence[P] | None = None, configs: int = 2, sanitizers: Sequence[str | None] = SANITIZERS
) -> None:
    """A test of an op in one line: `check` with the same arguments.

    Raises:
        CheckError: something is not right.
    """
    report = check(op, problems, configs, sanitizers)
    if not report.ok:
        raise CheckError(str(report))


def odd_problems(op: Op[P, C], keywords: Mapping[str, Any] | None = None) -> list[P]:
    """Problems of the op's `example` that are quick to check, odd in every length that the keywords leave open.

    Raises:
        ArgumentError: `example` requires a keyword that is no length. ConfigError: the op serves no such problem.
    """
    given = dict(keywords or {})
    parameters = inspect.signature(op.example, eval_str=True).parameters.values()
    lengths = [p.name for p in parameters if p.default is p.empty and p.annotation is int and p.name not in given]
    problems = [make_problem(op, given | dict.fromkeys(lengths, n)) for n in (LENGTHS if lengths else LENGTHS[:1])]
    for problem in problems:
        # What is cut to a small one may be another problem.
        op.check_problem(problem, Device.of(DEFAULT_GPU))
    return list(dict.fromkeys(map(op.small, problems)))


def diverse_configs(op: Op[P, C], problem: P, count: int) -> list[C]:
    """The config predicted best, then, `count` in all, the best ones that launch other kernels, with other tiles, by other choices."""
    candidates = sorted(_candidates(op, problem), key=lambda candidate: candidate.seconds)
    chosen = [candidates[0].config if candidates else op.predicted(problem, Device.of(DEFAULT_GPU))]
    while len(chosen) < count:
        kernels, tiles, values = (set().union(*(traits[i] for traits in (_traits(op, problem, c) for c in chosen))) for i in range(3))

        def news(candidate: Candidate, seen: Sequence[set[Any]] = (kernels, tiles, values)) -> tuple[int, ...]:
            traits = _traits(op, problem, candidate.config)
            return tuple(len(mine - known) for mine, known in zip(traits, seen, strict=True))

        best = max(candidates, key=news)
        if not any(news(best)[1:]):
            break
        chosen.append(best.config)
    return chosen


def _candidates(op: Op, problem: Any) -> Iterator[Candidate]:
    device = Device.of(DEFAULT_GPU)
    for shared in op.shared():
        if op.reject(problem, shared, device, part="") is not None:
            continue
        parts = {name: list(part) for name, part in op.ranked_parts(problem, shared, device).items()}
        if all(parts.values()):
            # Every part's best, then each part in turn at each of its others.
            best = replace(shared, **{name: part[0].config for name, part in parts.items()})
            configs = [best, *(replace(best, **{name: c.config}) for name, part in parts.items() for c in part[1:])]
            yield from (Candidate(config, op.seconds(problem, config, device)) for config in configs)


def _traits(op: Op, problem: Any, config: Any) -> tuple[set[Any], set[Any], set[Any]]:
    """The kernels that a config launches, their tiles, and the choices it makes for those."""
    stages = op.stages(problem, config)
    return (
        {s.kernel.name for s in stages},
        {s.kernel.resolve(s.problem, s.config) for s in stages},
        {(s.kernel.name, *item) for s in stages for item in fields(s.config, "choice").items()},
    )


def _runs(op: Op, problems: Sequence[Any], count: int, sanitizers: Sequence[str | None]) -> Iterator[tuple[Any, Any, str | None]]:
    device, chosen = Device.of(DEFAULT_GPU), diverse_configs(op, problems[-1], count)
    for problem in problems:
        legal = [config for config in chosen if op.reject(problem, config, device) is None]
        for config in legal or [op.predicted(problem, device)]:
            for sanitizer in sanitizers:
                yield problem, config, sanitizer


def _inputs(op: Op, problem: Any) -> dict[str, np.ndarray]:
    inputs: dict[str, np.ndarray] = op.sample(problem, SEED)
    accepted = [dtype.label for dtype in DType if dtype is not DType.bfloat16] + ["uint16 (bfloat16)"]
    for name, array in inputs.items():
        if array.dtype != np.uint16 and array.dtype.name not in accepted:
            raise ArgumentTypeError(
                f"{op.name}: its sample gives {name} as {array.dtype}, which no call takes; accepted: {', '.join(accepted)}; "
                "DType.round makes them of floats"
            )
    return inputs


def _outcome(op: Op, problem: Any, config: Any, sanitizer: str | None, known: tuple[Arrays, Arrays]) -> Outcome:
    inputs, expected = known
    for array in inputs.values():
        array.flags.writeable = False
    # Races do not depend on the order of lanes, but on when copies land; and ThreadSanitizer is slow.
    schedules = SCHEDULES[:2] if sanitizer == "thread" else SCHEDULES
    begin, found, failure = time.perf_counter(), None, ""
    try:
        plan = HostPlan(op, problem, config, sanitizer, GUARD_BYTES)
        results = [_results(plan, inputs, schedule) for schedule in schedules]
        found = op.check(problem, inputs, results[0], expected)
        failure = _wrong(found, results, schedules)
    except (CompileError, LaunchError, UnsupportedError) as error:
        failure = str(error)
    return Outcome(problem, config, sanitizer, len(schedules), found, failure, time.perf_counter() - begin)


def _results(plan: HostPlan, inputs: Arrays, schedule: Schedule) -> dict[str, np.ndarray]:
    try:
        return plan.results(inputs, schedule)
    except LaunchError as error:
        raise LaunchError(f"{schedule}: {error}") from error


def _wrong(found: Check, results: Sequence[Mapping[str, np.ndarray]], schedules: Sequence[Schedule]) -> str:
    if not found.ok:
        return (
            f"wrong values: {found.relative:.1e} relative to the norm (at most {found.relative_bound:.1e}), "
            f"{found.max_error:.1e} in the worst element (at most {found.max_error_bound:.1e})"
        )
    for other, schedule in zip(results, schedules, strict=True):
        for name, array in other.items():
            if not np.array_equal(array.view(np.uint8), results[0][name].view(np.uint8)):
                return f"{name} depends on the order of threads: {schedule} and {schedules[0]} give different bits; look for a race"
    return ""
