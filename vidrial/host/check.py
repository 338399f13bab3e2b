"""An op's kernels on the host target: aligned and odd sizes, every choice of its config, every order of threads and landing of copies, sanitizers.

check(op).ok
assert_op_correct(op)      # in a test
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias

import numpy as np

from vidrial.device import DEFAULT_GPU, Device
from vidrial.dtypes import DType
from vidrial.errors import ArgumentError, ArgumentTypeError, CheckError, CompileError, ConfigError, LaunchError, UnsupportedError
from vidrial.host.compiler import temporary
from vidrial.host.cover import Case, Feature, cases, covering, features
from vidrial.host.plan import HostPlan
from vidrial.host.target import SCHEDULES, Schedule
from vidrial.installation import named_ops
from vidrial.progress import Progress, Silent
from vidrial.settings import Settings
from vidrial.spec.choices import axes, describe
from vidrial.spec.chosen import describe_taken
from vidrial.spec.fields import C, P
from vidrial.spec.op import Check, Op
from vidrial.spec.registry import reference_of

SANITIZERS = (None, "address", "thread")
# Between regions of shared memory; more than any one vector or row reaches over.
GUARD_BYTES = 1024
SEED = 0
# By default runs begin for choices that nothing has made yet within the first of these, for pairs of them within the second.
VALUES_SECONDS, PAIRS_SECONDS = 180.0, 45.0
# Choices are tried at the longest problems that take the config of a call at most so long under one schedule, two of them in turn.
QUICK_SECONDS, IN_TURN = 0.25, 2
# Runs that are begun or wait for a core, for each core.
AHEAD = 2
# A launch takes so many times as long under ThreadSanitizer, about; one that does not end was found without it.
THREAD_FACTOR, THREAD_TIMEOUT = 15, 600.0
SCHEDULE = re.compile(rf"(?:{'|'.join(re.escape(str(schedule)) for schedule in sorted(SCHEDULES, key=lambda s: -len(str(s))))})(?:: )?")
# Runs that a failure names, and values of a choice that were not run.
SHOWN = 4
Arrays: TypeAlias = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Outcome(Generic[P, C]):
    """A problem and config under one sanitizer (or none) and `schedules` schedules: the check of the first, and what was wrong, or ''.

    `launch_seconds`: the processor's under one schedule, the longest. `choices`: those of the config that its launches take, on one line.
    """

    problem: P
    config: C
    sanitizer: str | None
    schedules: int
    check: Check | None
    failure: str
    seconds: float
    launch_seconds: float = 0.0
    choices: str = ""

    @property
    def summary(self) -> str:
        """What was wrong, without a sanitizer's whole report."""
        return self.failure.partition("\nwhole ")[0]

    @property
    def where(self) -> str:
        """Problem, config and sanitizer on one line."""
        return f"{self.problem} with {self.choices or describe(self.config)}, {self.sanitizer or 'plain'}, {self.schedules} schedules"

    def __str__(self) -> str:
        return f"{self.where}: " + (f"FAILED: {self.summary}" if self.failure else f"ok: {self.check}")


@dataclass(frozen=True)
class Report(Generic[P, C]):
    """What `check` found. `not_run`: choices, kernels and runs that it left out; `notes`: what else it did not do as asked."""

    op: str
    outcomes: tuple[Outcome[P, C], ...]
    not_run: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Outcome[P, C], ...]:
        """The outcomes that are not right."""
        return tuple(outcome for outcome in self.outcomes if outcome.failure)

    def groups(self) -> list[tuple[Outcome[P, C], ...]]:
        """The failures, those together that say the same but for their numbers, lines of sources apart."""
        found: dict[str, list[Outcome[P, C]]] = {}
        for outcome in self.failures:
            found.setdefault(_alike(outcome.summary), []).append(outcome)
        return [tuple(group) for group in found.values()]

    def __str__(self) -> str:
        lines = [f"{self.op}: {len(self.failures)} of {len(self.outcomes)} runs failed"]
        for first, *others in self.groups():
            lines += [str(first), *(f"  the same: {other.where}" for other in others[:SHOWN])]
            lines += [f"  the same in {len(others) - SHOWN} more"] if len(others) > SHOWN else []
        return "\n".join((*lines, *self.notes, *(["not run: " + "; ".join(self.not_run)] if self.not_run else [])))


def _alike(summary: str) -> str:
    """A failure without the schedule that it came under, threads, numbers and sizes; lines of sources stay."""
    text = SCHEDULE.sub("", summary)
    return re.sub(r"(?<![\w.:/])-?(?:0x[0-9a-f]+|\d[\d.,e+-]*|nan\b|inf\b)", "#", text)


@dataclass(frozen=True)
class _Run:
    """One thing to run. `row`: which problem and config of all; `case`: what was asked."""

    row: int
    problem: Any
    config: Any
    sanitizer: str | None


def check(
    op: Op[P, C],
    problems: Sequence[P] | Sequence[Case[P]] | None = None,
    configs: int | None = None,
    sanitizers: Sequence[str | None] = SANITIZERS,
    progress: Progress | None = None,
    *,
    minutes: float | None = None,
    config: Callable[[P], C] | C | None = None,
    only: bool = False,
    device: Device | None = None,
    pairs: bool = True,
    first_failure: bool = False,
) -> Report[P, C]:
    """Run an op's kernels on the host target and compare with its reference; no GPU is needed.

    Each problem is run with the config that a call would take for it as it was asked; then come configs that make every choice of the op and
    its parts, each value at least once where one is legal; then pairs of values. Outputs and workspace are NaN before, inputs read-only,
    regions of shared memory apart. Schedules must agree to the bit. As many run at once as VIDRIAL_JOBS says, by default one per core.

    Args:
        problems: what is asked; by default `cases(op)`, sizes cut by the op's `small`. A `Case` says what was cut.
        configs: how many beside those that calls would take are tried, less one, however long it takes; by default as many as make every choice.
        sanitizers: None (values only), `address`, `thread` (races), `undefined`.
        minutes: nothing new begins after so many; by default 3, and 0.75 for pairs of choices. What was left out is in `not_run`.
        config: the one that a call takes for a problem, or a function of the problem; by default the one predicted best.
        only: run nothing but `config`.
        pairs: go on, while there is time, with pairs of choices that no run has made together.
        device: the GPU whose rules count; by default the H200's.
        first_failure: end with the first problem and config that is not right.

    Raises:
        ArgumentError: no problem or no config is asked for; the reference lacks an output. ArgumentTypeError: a sample is of a dtype that
        no call takes. ConfigError: no config is legal, or the one to run alone is legal for no problem. ToolchainError: there is no compiler.
    """
    device = device or Device.of(DEFAULT_GPU)
    asked: list[Case[P]] = [
        p if isinstance(p, Case) else Case(p, p) for p in (problems if problems is not None else cases(op, None, device))
    ]
    if not asked or (configs is not None and configs < 1):
        raise ArgumentError(f"{op.name}: problems={len(asked)}, configs={configs} check nothing; give at least 1 of each")
    until = math.inf if configs is not None else VALUES_SECONDS if minutes is None else 60 * minutes
    session = _Session(op, device, sanitizers, progress or Silent(), first_failure, until)
    first = config if callable(config) else (lambda _: config) if config is not None else (lambda p: op.predicted(p, device))
    session.run_rows("check", session.first_rows(asked, first, only), math.inf)
    session.chosen = only
    if not only:
        session.cover([case.run for case in asked if case.spare], configs)
    if pairs and not only and configs is None:
        session.run_rows("pairs", session.pairs(), PAIRS_SECONDS if minutes is None else until)
    return session.report()


def assert_op_correct(
    op: Op[P, C],
    problems: Sequence[P] | Sequence[Case[P]] | None = None,
    configs: int | None = None,
    sanitizers: Sequence[str | None] = SANITIZERS,
    *,
    minutes: float | None = None,
) -> None:
    """A test of an op in one line: `check` with the same arguments, without pairs of choices unless `minutes` says how long.

    Raises:
        CheckError: something is not right.
    """
    report = check(op, problems, configs, sanitizers, minutes=minutes, pairs=minutes is not None)
    if not report.ok:
        raise CheckError(str(report))


class _Session:
    """One `check`: what was run so far, and what is left out."""

    def __init__(
        self, op: Op, device: Device, sanitizers: Sequence[str | None], progress: Progress, first_failure: bool, until: float
    ) -> None:
        self.op, self.device, self.sanitizers, self.progress, self.first_failure = op, device, sanitizers, progress, first_failure
        self.begin, self.until, self.failed_row = time.monotonic(), until, -1
        # Threads that compile find it made.
        temporary()
        self.rows: dict[tuple[Any, Any], int] = {}
        self.seen: set[Feature] = set()
        self.outcomes: list[Outcome] = []
        self.places: dict[int, tuple[int, int]] = {}
        self.notes: list[str] = []
        self.late: list[_Run] = []
        self.chosen = False
        self.known: dict[Any, tuple[Arrays, Arrays]] = {}

    @property
    def elapsed(self) -> float:
        """Seconds since the check began."""
        return time.monotonic() - self.begin

    def first_rows(self, asked: Sequence[Case], config: Callable[[Any], Any], only: bool) -> list[tuple[Any, Any]]:
        """Each problem with the config that it takes as it was asked; where that is not legal once it is cut, with its own best."""
        found, reasons = [], []
        for case in asked:
            if case.spare:
                continue
            first = config(case.asked)
            reason = self.op.reject(case.run, first, self.device)
            if reason is not None:
                reasons.append(
                    f"{describe_taken(self.op, case.asked, first)}, for {_facts(case.asked)}, is not legal for {_facts(case.run)}: {reason}"
                )
                if only:
                    continue
                first = self.op.predicted(case.run, self.device)
            found.append((case.run, first))
        if not found:
            raise ConfigError(f"{self.op.name}: {reasons[0]}")
        self.notes += [f"{reason}, so not run" for reason in reasons]
        return found

    def cover(self, spare: Sequence[Any], configs: int | None) -> None:
        """Configs that make what is not made yet: at two long and quick problems in turn, then at the others, then at the spare ones."""
        launched = {o.problem: o.launch_seconds for o in self.outcomes if o.sanitizer is None}
        known = list(dict.fromkeys(problem for problem, _ in self.rows))[::-1]
        quick = [p for p in known if launched.get(p, 0.0) <= QUICK_SECONDS][:IN_TURN] or known[-1:]
        others = sorted((p for p in known if p not in quick), key=lambda p: launched.get(p, 0.0))
        groups = [quick, *([p] for p in (*others, *spare))]
        rows = itertools.chain.from_iterable(covering(self.op, group, self.seen, self.device) for group in groups)
        left = None if configs is None else max(0, configs - len({config for _, config in self.rows}))
        self.run_rows("choices", list(itertools.islice(rows, left)), self.until)

    def pairs(self) -> Iterator[tuple[Any, Any]]:
        """Configs that make pairs of choices together that no run has yet, at the problems where choices were tried."""
        seen = set().union(*(features(self.op, o.problem, o.config, pairs=True) for o in self.outcomes if o.sanitizer is None))
        tried = list(dict.fromkeys(o.problem for o in self.outcomes if o.launch_seconds <= QUICK_SECONDS))[::-1][:IN_TURN]
        return covering(self.op, tried, seen, self.device, pairs=True)

    def run_rows(self, phase: str, rows: Iterable[tuple[Any, Any]], until: float) -> None:
        """Each row under each sanitizer, as many at once as there are jobs; none begins after `until` seconds, of an endless stream of rows
        none is left out by then."""
        jobs, counted = Settings.read().jobs, isinstance(rows, Sequence)
        self.progress.begin(phase, len(rows) * len(self.sanitizers) if isinstance(rows, Sequence) else 0)
        stream, waiting = self._runs(rows), dict[Future[Outcome | None], _Run]()
        with ThreadPoolExecutor(jobs) as pool:
            while True:
                while len(waiting) < AHEAD * jobs and (counted or self.elapsed < until) and (run := next(stream, None)) is not None:
                    self._prepare(run.problem)
                    waiting[pool.submit(self._outcome, run, until)] = run
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    self._done(waiting.pop(future), future.result(), counted)

    def _runs(self, rows: Iterable[tuple[Any, Any]]) -> Iterator[_Run]:
        for problem, config in rows:
            if (problem, config) in self.rows:
                continue
            self.seen |= features(self.op, problem, config)
            row = self.rows[problem, config] = len(self.rows)
            yield from (_Run(row, problem, config, sanitizer) for sanitizer in self.sanitizers)

    def _prepare(self, problem: Any) -> None:
        if problem not in self.known:
            inputs = _inputs(self.op, problem)
            for array in inputs.values():
                array.flags.writeable = False
            self.known[problem] = inputs, self.op.reference(problem, inputs)

    def _done(self, run: _Run, outcome: Outcome | None, counted: bool) -> None:
        if outcome is None:
            if self.failed_row < 0 and counted:
                self.late.append(run)
            return
        self.outcomes.append(outcome)
        self.places[id(outcome)] = run.row, self.sanitizers.index(run.sanitizer)
        if outcome.failure and self.first_failure and self.failed_row < 0:
            self.failed_row = run.row
        verdict = "FAILED" if outcome.failure else "right"
        self.progress.advance(f"{verdict}, {outcome.seconds:.1f} s: {_facts(run.problem)} {outcome.choices}, {run.sanitizer or 'plain'}")

    def _outcome(self, run: _Run, until: float) -> Outcome | None:
        if self.failed_row not in (-1, run.row):
            return None
        launches = [o.launch_seconds for o in self.outcomes if o.problem == run.problem and o.sanitizer is None]
        expected = THREAD_FACTOR * max(launches, default=0.0) if run.sanitizer == "thread" else 0.0
        # What a call takes is run under ThreadSanitizer, however late it is, unless that alone takes too long.
        late = expected > self.until / 3 if until == math.inf else self.elapsed + expected > until
        if late:
            return None
        return _outcome(self.op, run, self.known[run.problem], self.device)

    def report(self) -> Report:
        """What was found, and what was not run."""
        outcomes = sorted(self.outcomes, key=lambda outcome: self.places[id(outcome)])
        return Report(self.op.name, tuple(outcomes), (*self._not_run(), *_gradient(self.op)), tuple(self.notes))

    def _not_run(self) -> Iterator[str]:
        by_sanitizer = {s: sum(run.sanitizer == s for run in self.late) for s in self.sanitizers}
        if any(by_sanitizer.values()):
            told = ", ".join(f"{count} {sanitizer or 'plain'}" for sanitizer, count in by_sanitizer.items() if count)
            yield f"{told} for lack of time (--minutes)"
        if self.chosen:
            return
        ran = {(o.problem, o.config) for o in self.outcomes}
        made: set[Feature] = set().union(*(features(self.op, *row) for row in ran))
        for name, values in axes(self.op.config).items():
            missing = [str(value) for value in values if (name, value) not in made]
            if missing:
                yield f"{name}={', '.join(missing)}"
        stages = [stage for row in ran for stage in self.op.stages(*row)]
        kernels = {kernel.name for kernel in self.op.kernels}
        yield from (f"kernel {name}" for name in sorted(kernels - {stage.kernel.name for stage in stages}))
        many = {s.kernel.name for s in stages if math.prod(s.kernel.grid(s.problem, s.config)) > 1}
        yield from (f"more than one block of {name}" for name in sorted({stage.kernel.name for stage in stages} - many))


def _gradient(op: Op) -> Iterator[str]:
    """That the op which makes the gradients was not run, and what runs it: the op's own, or the known one that is called after it."""
    name = f"{op.name}_backward"
    if op.backward is None and name in named_ops():
        yield f"its gradients (vidrial check {name})"
    elif op.backward is not None:
        name = op.backward.name
        try:
            reference = reference_of(op.backward)
        except ArgumentError as error:
            yield f"its gradients, by {name} ({error})"
        else:
            known = next((known for known, place in named_ops().items() if place == reference), reference)
            yield f"its gradients (vidrial check {known})"


def _facts(problem: Any) -> str:
    """A problem's sizes on one line, and what it is beside what it is where nothing is named."""
    if not dataclasses.is_dataclass(problem):
        return str(problem)
    values = ((f, getattr(problem, f.name)) for f in dataclasses.fields(problem))
    plain = dataclasses.MISSING
    told = ((f.name, x) for f, x in values if isinstance(x, int) and (not isinstance(x, bool) if f.default is plain else x != f.default))
    sizes = [f"{name}={x}" for name, x in told]
    return " ".join(sizes) or str(problem)


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


def _outcome(op: Op, run: _Run, known: tuple[Arrays, Arrays], device: Device) -> Outcome:
    inputs, expected = known
    # Races do not depend on the order of lanes, but on when copies land; and ThreadSanitizer is slow.
    schedules = [dataclasses.replace(s, timeout=THREAD_TIMEOUT) for s in SCHEDULES[:2]] if run.sanitizer == "thread" else SCHEDULES
    begin, found, failure = time.perf_counter(), None, ""
    results, launches = list[dict[str, np.ndarray]](), list[float]()
    try:
        plan = HostPlan(op, run.problem, run.config, run.sanitizer, GUARD_BYTES, device=device)
        for schedule in schedules:
            outputs, seconds = _results(plan, inputs, schedule)
            results.append(outputs)
            launches.append(seconds)
        found = op.check(run.problem, inputs, results[0], expected)
        failure = _wrong(op, run.problem, found, results, expected)
    except (CompileError, LaunchError, UnsupportedError) as error:
        failure = str(error)
    took, choices = time.perf_counter() - begin, describe_taken(op, run.problem, run.config)
    return Outcome(run.problem, run.config, run.sanitizer, len(schedules), found, failure, took, max(launches, default=0.0), choices)


def _results(plan: HostPlan, inputs: Arrays, schedule: Schedule) -> tuple[dict[str, np.ndarray], float]:
    """The outputs, and the processor's seconds that the launches took."""
    outputs = plan.outputs()
    try:
        stats = plan.run({**inputs, **outputs}, schedule)
    except LaunchError as error:
        raise LaunchError(f"{schedule}: {error}") from error
    return outputs, sum(launch.seconds for launch in stats.values())


def _wrong(op: Op, problem: Any, found: Check, results: Sequence[Mapping[str, np.ndarray]], expected: Arrays) -> str:
    if not found.ok:
        elements = [text for name in results[0] if (text := _elements(op, problem, name, found, results[0][name], expected[name]))]
        return (
            f"wrong values: {'; '.join(elements) or 'of no element alone'}; {found.relative:.1e} relative to the norm (at most "
            f"{found.relative_bound:.1e}), {found.max_error:.1e} in the worst element (at most {found.max_error_bound:.1e})"
        )
    for other, schedule in zip(results, SCHEDULES, strict=False):
        for name, array in other.items():
            if not np.array_equal(array.view(np.uint8), results[0][name].view(np.uint8)):
                differs = np.argwhere(array.view(f"u{array.itemsize}") != results[0][name].view(f"u{array.itemsize}"))
                return (
                    f"{name} depends on the order of threads: {schedule} gives other bits than {SCHEDULES[0]}, in {len(differs)} of "
                    f"{array.size} elements, the first at {name}{differs[0].tolist()}; look for a race"
                )
    return ""


def _elements(op: Op, problem: Any, name: str, found: Check, got: np.ndarray, exact: np.ndarray) -> str:
    """How many elements of an output are further off than the op's bounds allow of their size and that of all, and the first of them."""
    values = np.asarray(op.outputs(problem)[name].dtype.widen(got), np.float64)
    if values.shape != np.shape(exact):
        return f"{name} has shape {list(values.shape)}, the reference {list(np.shape(exact))}"
    error, finite = np.abs(values - exact), np.isfinite(exact)
    typical = float(np.sqrt(np.mean(np.square(exact[finite])))) if finite.any() else 0.0
    bound = max(found.relative_bound, found.max_error_bound)
    wrong = ~(error <= bound * (np.abs(exact) + typical))
    if not wrong.any():
        return ""
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    return (
        f"{name}: {int(wrong.sum())} of {wrong.size} elements, the first {name}{list(at)}: expected {exact[at]:.6g}, got {values[at]:.6g}"
        + (f" ({int(np.isnan(values).sum())} are NaN, as nobody wrote them)" if np.isnan(values).any() else "")
    )
