"""The measuring process: one per GPU, with a CUDA context of its own, replaced when a config hangs, crashes or spoils it.

What travels between the processes: ops by name (`module:attribute` or `file.py:attribute`), problems and configs by field.
"""

from __future__ import annotations

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from vidrial.build.cubins import Compiler
from vidrial.build.files import Closing
from vidrial.build.processes import Child, Ended, ready
from vidrial.errors import CompileError, CompileStopped, ConfigError, SweepError, VidrialError
from vidrial.spec.choices import describe
from vidrial.spec.op import Check, Op
from vidrial.spec.registry import resolve
from vidrial.tune.codec import decode, encode
from vidrial.tune.timing import Timing
from vidrial.tune.trial import Status

CUDA_BENCH, HOST_BENCH = "vidrial.tune.measure:CudaBench", "vidrial.tune.measure:HostBench"
# Starting CUDA and evaluating the reference take as long as they take; a config may not.
PREPARE_SECONDS = 900.0


@dataclass(frozen=True)
class CheckResult:
    """A result beside the reference; `error`: what else is wrong with it, "" for nothing."""

    check: Check
    error: str = ""

    @property
    def reason(self) -> str:
        """Why the result does not pass, "" if it does."""
        c = self.check
        if self.error or c.ok:
            return self.error
        return f"relative error {c.relative:.2e} (bound {c.relative_bound:.0e}), worst {c.max_error:.2e} (bound {c.max_error_bound:.0e})"


class Pool(Protocol):
    """What measures for a sweep: `count` at once; `replaced` were lost. `compiler`: what compiles, None: processes here."""

    count: int
    replaced: int
    compiler: Compiler | None
    notes: tuple[str, ...]

    def set_problem(self, prepare: Job) -> None:
        """From now on jobs are of this problem."""

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Reply]]:
        """Each job with its reply, as they are done."""


class Bench(Protocol):
    """What checks and times the configs of one op, made in the measuring process as `Bench(op, index)`."""

    needs_cubins: bool

    def prepare(self, problem: Any, small: Any, seeds: Sequence[int]) -> None:
        """Make the inputs of the problem (first seed) and of the small one (all seeds), and the reference of the latter."""

    def check(self, problem: Any, config: Any, seed: int) -> CheckResult:
        """Run twice on poisoned memory and compare with the reference."""

    def compare(self, problem: Any, configs: Sequence[Any], seed: int) -> float:
        """How far two configs' results at the problem itself are apart: the most of any output, as `block_difference` says."""

    def measure(self, problem: Any, configs: Sequence[Any], job: Job, begin: Callable[[int], None]) -> tuple[list[Timing], float]:
        """The timings of configs in turn, and the reference kernel's ms; `begin(i)` goes before the first run of config i."""

    def usable(self) -> bool:
        """Whether work can go on after an error."""

    def slowdowns(self) -> list[str]:
        """Why the device is slowed down now."""


@dataclass(frozen=True)
class Job:
    """What a measuring process is asked.

    `task`: `prepare`; `check` (`check_configs` at `small`); `compare` (two configs' results at `problem`: `bound` or less apart); `time` (configs
    in turn); `trial` (`check`, then `time`); `state`.
    """

    task: str
    problem: Any = None
    small: Any = None
    configs: tuple[Any, ...] = ()
    check_configs: tuple[Any, ...] = ()
    seed: int = 0
    rounds: int = 0
    give_up_ms: float = math.inf
    bound: float = 0.0


def job_fields(op: Op) -> dict[str, Any]:
    """The types of a job's fields that depend on the op, for `decode`."""
    problem, configs = op.problem | None, tuple[op.config, ...]  # type: ignore[name-defined]
    return {"problem": problem, "small": problem, "configs": configs, "check_configs": configs}


@dataclass(frozen=True)
class Reply:
    """How a job ended, on which `gpu`. `at`: the config (its index in the job) that a failure belongs to, None where that is not known."""

    status: Status
    reason: str = ""
    check: Check | None = None
    timings: tuple[Timing, ...] = ()
    reference_ms: float = 0.0
    notes: tuple[str, ...] = ()
    at: int | None = None
    gpu: str = ""


class Workers(Closing):
    """One measuring process for each CUDA index; use it as a context manager.

    Args:
        op: name of the op, from `reference_of`.
        bench: name of the class that measures.
        indices: CUDA indices.
        prepare: what every process does first, a new one too; None: `set_problem` says it.
        limit: seconds for a job.
    """

    compiler: Compiler | None = None
    notes: tuple[str, ...] = ()

    def __init__(self, op: str, bench: str, indices: Sequence[int], prepare: Job | None, limit: float) -> None:
        self._make = functools.partial(_Worker, op, bench)
        self._prepare, self._limit = prepare or Job("prepare"), limit
        self.count = len(indices)
        self._idle = deque(self._make(index) for index in indices)
        self._busy: dict[Child, _Worker] = {}
        self.replaced = 0

    def set_problem(self, prepare: Job) -> None:
        """From now on jobs are of this problem: every process gets ready for it, while the caller goes on."""
        self._prepare = prepare
        for worker in self._idle:
            worker.begin(prepare)

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Reply]]:
        """Run jobs on whichever process is idle; each comes back with its reply when it is done.

        A GPU whose process cannot begin (any more) is left out, with a note; its job runs on another.

        Raises:
            SweepError: no process can even prepare.
        """
        waiting, again, busy = iter(jobs), deque[Job](), self._busy
        job = next(waiting, None)
        try:
            while job is not None or busy:
                while job is not None and self._idle:
                    worker = self._idle.popleft()
                    busy[worker.start(job, self._prepare, self._limit)] = worker
                    job = again.popleft() if again else next(waiting, None)
                for child in ready(busy):
                    worker = busy[child]
                    try:
                        reply = worker.receive()
                    except SweepError as error:
                        if self.count == 1:
                            raise
                        del busy[child]
                        self._leave_out(worker, error)
                        again.append(worker.job)
                        job = job or again.popleft()
                        continue
                    if reply is None:
                        continue
                    del busy[child]
                    if reply.status in (Status.crash, Status.timeout):
                        worker.stop()
                        self.replaced += 1
                    self._idle.append(worker)
                    yield worker.job, replace(reply, gpu=str(worker.index))
        finally:
            while busy:
                _, worker = busy.popitem()
                worker.stop()
                self._idle.append(worker)

    def _leave_out(self, worker: _Worker, error: SweepError) -> None:
        worker.stop()
        self.count -= 1
        self.notes += (f"GPU {worker.index} was left out: {error}",)

    def close(self) -> None:
        """End the processes."""
        for worker in (*self._idle, *self._busy.values()):
            worker.stop()


class _Worker:
    """What measures on one GPU: a process that is started when it has something to do, anew after it was stopped."""

    def __init__(self, op: str, bench: str, index: int) -> None:
        self.index = index
        self._arguments = (op, bench, str(index))
        # A process is told to prepare, and a job at the earliest when it has answered that.
        self._child: Child | None = None
        self._prepared = False
        # What it is at, the seconds that this may take, and the config of it that runs, if it has said so.
        self.job, self._limit = Job("prepare"), PREPARE_SECONDS
        self._at: int | None = None

    def begin(self, prepare: Job) -> Child:
        """Send what has to come before the first job, and do not wait for it."""
        if not self._prepared:
            self.stop()
        self._child = child = self._child or Child("vidrial.tune.workers:server", *self._arguments)
        self._prepared = False
        child.ask(encode(prepare), PREPARE_SECONDS)
        return child

    def start(self, job: Job, prepare: Job, limit: float) -> Child:
        """Send a job, after what has to come before the first one; the process that is then busy with it."""
        self.job, self._limit, self._at = job, limit, None
        child = self._child or self.begin(prepare)
        if self._prepared:
            child.ask(encode(job), limit)
        return child

    def receive(self) -> Reply | None:
        """The job's reply, None while there is none yet."""
        child = self._child
        if child is None:
            raise SweepError(f"measuring process for GPU {self.index} was not started")
        try:
            message = child.receive()
        except Ended as error:
            reply = Reply(Status.crash, f"the measuring process ended by {error.how}\n{error.raised}".strip(), at=self._at)
            if error.late:
                reply = Reply(Status.timeout, f"no answer within {self._limit:g} s: it hangs, or is far too slow", at=self._at)
        else:
            if "at" in message and "status" not in message:
                self._at, child.deadline = message["at"], time.monotonic() + self._limit
                return None
            reply = decode(Reply, message)
        if self._prepared:
            return reply
        if reply.status is not Status.ok:
            raise SweepError(f"measuring process for GPU {self.index} cannot begin: {reply.reason}")
        self._prepared = True
        child.ask(encode(self.job), self._limit)
        return None

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        if self._child is not None:
            self._child.stop()
        self._child, self._prepared = None, False


def server(send: Callable[[Any], None], op: str, bench: str, index: str) -> Callable[[Any], Any]:
    """What answers in a measuring process."""
    jobs = _Server(resolve(op), resolve(bench), int(index), send)
    return lambda message: encode(jobs.answer(message))


class _Server:
    """Jobs to replies, in the measuring process."""

    def __init__(self, op: Op, bench: Callable[[Op, int], Bench], index: int, send: Callable[[Any], None]) -> None:
        self._op, self._make, self._index, self._send = op, bench, index, send
        self._bench: Bench | None = None
        self._checked: dict[tuple[Any, Any, int], CheckResult] = {}
        self._tasks = {
            "prepare": self._prepare,
            "check": self._check,
            "compare": self._compare,
            "trial": self._trial,
            "time": self._time,
            "state": self._state,
        }
        self._fields = job_fields(op)

    def answer(self, message: Any) -> Reply:
        job: Job = decode(Job, message, self._fields)
        try:
            if self._bench is None:
                self._bench = self._make(self._op, self._index)
            return self._tasks[job.task](self._bench, job)
        except ConfigError as error:
            return Reply(Status.rejected, str(error))
        except CompileError as error:
            return Reply(Status.stopped if isinstance(error, CompileStopped) else Status.compile, str(error))
        except VidrialError as error:
            usable = self._bench is not None and self._bench.usable()
            return Reply(Status.launch if usable else Status.crash, str(error), at=0 if len(job.configs) == 1 else None)

    def _prepare(self, bench: Bench, job: Job) -> Reply:
        bench.prepare(job.problem, job.small, (job.seed, job.seed + 1))
        return Reply(Status.ok)

    def _check(self, bench: Bench, job: Job) -> Reply:
        worst = None
        for config in job.check_configs:
            key = (job.small, config, job.seed)
            if key not in self._checked:
                self._checked[key] = bench.check(job.small, config, job.seed)
            result = self._checked[key]
            worst = result.check if worst is None or not result.check.relative <= worst.relative else worst
            if result.reason:
                return Reply(Status.wrong, result.reason, result.check)
        return Reply(Status.ok, "", worst)

    def _compare(self, bench: Bench, job: Job) -> Reply:
        found = bench.compare(job.problem, job.configs, job.seed)
        if found <= job.bound:
            return Reply(Status.ok)
        return Reply(
            Status.wrong, f"at the problem itself it differs from {describe(job.configs[1])} by {found:.2e} (bound {job.bound:.0e})"
        )

    def _trial(self, bench: Bench, job: Job) -> Reply:
        checked = self._check(bench, job)
        return replace(self._time(bench, job), check=checked.check) if checked.status is Status.ok else checked

    def _time(self, bench: Bench, job: Job) -> Reply:
        timings, reference = bench.measure(job.problem, job.configs, job, lambda i: self._send({"at": i}))
        return Reply(Status.ok, "", None, tuple(timings), reference)

    def _state(self, bench: Bench, job: Job) -> Reply:
        return Reply(Status.ok, notes=tuple(bench.slowdowns()))
