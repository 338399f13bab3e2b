"""Find the fastest config of an op for one problem: compile, check, time, rank; every trial is kept, whatever happens.

    result = sweep(op, problem, trials=64)
    print(result.table())
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from vidrial import __version__
from vidrial.build import build_many
from vidrial.compile import Cubin
from vidrial.device import Device
from vidrial.errors import ArgumentError, ArgumentTypeError, NoValidConfig, TemplateError, ToolchainError
from vidrial.op import Op, Stage
from vidrial.problem import StaticView, keyed_fields
from vidrial.progress import Progress, reporting
from vidrial.ranking import Ranking
from vidrial.render import Source
from vidrial.search import Search
from vidrial.space import describe
from vidrial.store import Store
from vidrial.sweep_result import SweepResult, no_valid_config
from vidrial.timing import drift
from vidrial.toolchain import Toolchain
from vidrial.trial import Journal, KernelResources, Status, Trial, encode, latest
from vidrial.worker import CUDA_BENCH, Job, Reply, Workers, reference_of, resolve

TRIALS = 64
# Samples of a first look; a config that is this many times behind the best gets the fewest.
SCREEN_ROUNDS, GIVE_UP = 7, 3.0
# (phase, how far behind the best a leader may be, how many leaders, samples of each): timed in turn.
CONFIRM = (("confirm", 1.15, 8, 20), ("final", 1.04, 4, 60))
# Share of a time budget after which nothing new is tried.
SEARCH_SHARE = 0.8


@dataclass(frozen=True)
class Options:
    """How to sweep.

    Args:
        device: the GPU's facts; by default asked of the driver.
        gpus: how many GPUs of this machine measure, or their CUDA indices.
        trials: configs to try at most; 64 unless `seconds` or `exhaustive` is given.
        seconds: time to take, about.
        exhaustive: try every legal config.
        configs: try these alone.
        journal: file of the trials; by default one in the cache for this op, problem and device.
        resume: True to go on with the journal; or the journal to go on with. Else a journal that is there is set aside.
        jobs: processes that compile; by default `Settings.jobs`.
        limit: seconds that one config may take to be checked and timed.
        seed: of the inputs.
        progress: True for a bar on stderr, None for one if that is a terminal; or what is told instead.
        bench: what checks and times, as `module:class`.
    """

    device: Device | None = None
    gpus: int | Sequence[int] = 1
    trials: int | None = None
    seconds: float | None = None
    exhaustive: bool = False
    configs: Sequence[Any] | None = None
    journal: Path | str | None = None
    resume: bool | Path | str | None = None
    jobs: int | None = None
    limit: float = 30.0
    seed: int = 0
    progress: bool | Progress | None = None
    bench: str = CUDA_BENCH


def sweep(op: Op, problem: Any, options: Options | None = None, **changes: Any) -> SweepResult:
    """Sweep one op for one problem and keep the ranking; `changes` are fields of `Options`.

    Ctrl-C and SIGTERM rank what has been measured, then go on to the caller; the same sweep with `resume=True` repeats the config
    that was being tried, and no other.

    Raises:
        ArgumentError: a size that is not positive, a GPU that does not exist, an option's value.
        NoValidConfig: no config is legal, or all failed; the message counts the causes.
        SweepError: the journal cannot be used or written, or the measuring process cannot begin; what was measured is kept.
    """
    try:
        chosen = dataclasses.replace(options or Options(), **changes)
    except TypeError as error:
        raise ArgumentTypeError(f"sweep: {error}; accepted: {', '.join(f.name for f in dataclasses.fields(Options))}") from None
    return _Sweep(op, problem, chosen).run()


def sweep_lengths(op: Op, problems: Sequence[Any], options: Options | None = None, **changes: Any) -> list[SweepResult]:
    """Sweep several problems of the same static facts, then time the leaders of each on all of them: what the model is calibrated with.

    Raises:
        as `sweep`.
    """
    chosen = dataclasses.replace(options or Options(), **changes)
    found = [sweep(op, problem, chosen) for problem in problems]
    leaders = dict.fromkeys(r.config for result in found for r in result.ranked[:2])
    for i, result in enumerate(found):
        have = latest(result.trials)
        missing = [c for c in leaders if c not in have and op.reject(result.problem, c, result.device) is None]
        if missing:
            found[i] = sweep(op, result.problem, chosen, configs=[r.config for r in result.ranked[:1]] + missing, resume=result.journal)
    return found


class _Sweep:
    """One sweep while it runs."""

    def __init__(self, op: Op, problem: Any, options: Options) -> None:
        _check_problem(op, problem)
        self.op, self.problem, self.options = op, problem, options
        self.needs_cubins = bool(resolve(options.bench).needs_cubins)
        self.indices = _indices(options.gpus)
        self.device = options.device or _device(self.indices)
        if options.trials is not None and options.trials < 1:
            raise ArgumentError(f"trials={options.trials}: at least 1")
        unlimited = options.exhaustive or options.configs is not None or options.seconds is not None
        self.trials = options.trials or (sys.maxsize if unlimited else TRIALS)
        self.begun = time.monotonic()
        self.small = op.small(problem)
        self.notes: list[str] = []
        self.resources: dict[Hashable, KernelResources | str] = {}
        self.versions = _versions()
        self.progress: Progress

    def run(self) -> SweepResult:
        prepare = Job("prepare", self.problem, self.small, seed=self.options.seed)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_terminable())
            self.journal = stack.enter_context(self._open_journal())
            self.progress = stack.enter_context(reporting(self.options.progress))
            workers = Workers(reference_of(self.op), self.options.bench, self.indices, prepare, self.options.limit)
            self.workers = stack.enter_context(workers)
            try:
                self._state()
                self._search()
                self._confirm()
                self._state()
            except BaseException as error:
                self._keep(error)
                raise
            return self._result()

    @property
    def latest(self) -> dict[Any, Trial]:
        return latest(self.journal.trials)

    def _open_journal(self) -> Journal:
        resume = self.options.resume
        named = resume if isinstance(resume, str | Path) else self.options.journal
        facts = {"digest": self.op.digest(), "device": self.device.key, "problem": encode(self.problem)}
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        path = Path(named) if named else Store.shared().root / "journals" / f"{self.op.name}-{self.device.key}-{name}.jsonl"
        return Journal(path, self.op, facts, fresh=resume is None or resume is False)

    def _keep(self, error: BaseException) -> None:
        """What was measured, ranked; and how to go on."""
        ranking = Ranking.from_trials(self.op, self.device, self.journal.trials)
        if ranking is not None:
            ranking.save(self.op)
        note = f"{len(self.journal.trials)} trials are kept in {self.journal.path}; the same sweep with resume=True goes on from there"
        error.add_note(note)
        if isinstance(error, KeyboardInterrupt | SystemExit):
            print(f"\nvidrial: {note}", file=sys.stderr)

    def _over(self, share: float = 1.0) -> bool:
        return self.options.seconds is not None and time.monotonic() - self.begun > share * self.options.seconds

    def _state(self) -> None:
        for _, reply in self.workers.run([Job("state")] * len(self.indices)):
            self.notes += [f"the driver slows the GPU down: {note}" for note in reply.notes]

    def _search(self) -> None:
        asked = self.options.configs
        if asked is not None:
            for config in asked:
                self.op.check_config(self.problem, config, self.device)
            self._try([c for c in asked if c not in self.latest])
            return
        search = Search(self.op, self.problem, self.device, self.trials, self.options.exhaustive)
        while not self._over(SEARCH_SHARE):
            seen = {config: trial.ms for config, trial in self.latest.items()}
            batch = search.propose(seen)[:max(0, self.trials - len(seen))]
            if not batch:
                return
            self._try(batch)

    def _try(self, configs: Sequence[Any]) -> None:
        """Compile, check and time configs; each ends as a trial in the journal."""
        ready = self._compile(configs) if self.needs_cubins else list(configs)
        self.progress.begin("measure", len(ready))
        for job, reply in self.workers.run(self._jobs(ready)):
            config = job.configs[0]
            timing = reply.timings[0] if reply.timings else None
            self._add(config, reply.status, reply, timing=timing)
            self.progress.advance(str(self.journal.trials[-1]))

    def _proxies(self, config: Any) -> tuple[Any, ...]:
        return proxies(self.op, self.small, self.problem, config, self.device)

    def _jobs(self, configs: Sequence[Any]) -> Iterator[Job]:
        for config in configs:
            if self._over(SEARCH_SHARE):
                return
            checked = self._proxies(config)
            if not checked:
                self._add(config, Status.rejected, Reply(Status.rejected, f"it is not legal at {self.small}, so it cannot be checked"))
                continue
            best = min((t.ms for t in self.latest.values()), default=math.inf)
            yield Job("trial", self.problem, self.small, (config,), checked, self.options.seed, SCREEN_ROUNDS, GIVE_UP * best)

    def _compile(self, configs: Sequence[Any]) -> list[Any]:
        """Those of `configs` that compile; the others end as trials."""
        stages = {config: self.op.stages(self.problem, config) for config in configs}
        # What stands in for a config when it is checked may need binaries of its own.
        wanted = [(c, s) for c in configs for s in stages[c]]
        wanted += [(c, s) for c in configs for proxy in self._proxies(c) for s in self.op.stages(self.small, proxy)]
        sources: dict[Hashable, tuple[Source, str]] = {}
        for config, stage in wanted:
            key = _binary(stage)
            if key not in self.resources and key not in sources:
                try:
                    sources[key] = stage.kernel.source(stage.problem, stage.config), describe(config)
                except TemplateError as error:
                    self.resources[key] = str(error)
        smem: dict[Hashable, int] = {_binary(s): s.kernel.resolve(s.problem, s.config).smem_bytes for _, s in wanted}
        self.progress.begin("compile", len(sources))
        for name, built in build_many(sources, self.device.arch, self.options.jobs):
            self.resources[name] = _resources(sources[name][0].entry, built, smem[name]) if isinstance(built, Cubin) else str(built)
            self.progress.advance("")
        ready = []
        for config, launches in stages.items():
            broken = [r for r in (self.resources[_binary(s)] for s in launches) if isinstance(r, str)]
            if broken:
                self._add(config, Status.compile, Reply(Status.compile, broken[0]))
            else:
                ready.append(config)
        return ready

    def _add(self, config: Any, status: Status, reply: Reply, **fields: Any) -> None:
        found = (self.resources.get(_binary(s)) for s in self.op.stages(self.problem, config))
        self.journal.append(Trial(
            self.op.name, self.problem, config, status, check=reply.check, sentence=reply.sentence, reference_ms=reply.reference_ms,
            resources=tuple(r for r in found if isinstance(r, KernelResources)), device=self.device.key, seed=self.options.seed,
            versions=self.versions, time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **fields))

    def _confirm(self) -> None:
        """Time the leaders in turn, longer and longer; check the winner on other inputs."""
        phases = ["screen", *(phase for phase, *_ in CONFIRM)]
        for phase, behind, count, rounds in CONFIRM:
            while (leaders := self._leaders(behind, count)) and not self._over():
                if all(phases.index(t.phase) >= phases.index(phase) for t in leaders):
                    break
                self._time([t.config for t in leaders], phase, rounds)
        while (leaders := self._leaders(1.0, 1)) and not self._recheck(leaders[0].config):
            self.notes.append(f"{describe(leaders[0].config)} was fastest, but did not pass on other inputs")

    def _leaders(self, behind: float, count: int) -> list[Trial]:
        good = sorted((t for t in self.latest.values() if t.ok), key=lambda t: t.ms)
        return [t for t in good if t.ms <= behind * good[0].ms][:count]

    def _time(self, configs: Sequence[Any], phase: str, rounds: int) -> None:
        self.progress.begin(phase, len(configs))
        for job, reply in self.workers.run([Job("time", self.problem, self.small, tuple(configs), (), self.options.seed, rounds)]):
            if reply.status is Status.ok:
                for config, timing in zip(job.configs, reply.timings, strict=True):
                    before = self.latest[config]
                    self._add(config, Status.ok, dataclasses.replace(reply, check=before.check), timing=timing, phase=phase)
                    self.progress.advance(str(self.journal.trials[-1]))
            elif reply.at is not None or len(configs) == 1:
                self._add(configs[reply.at or 0], reply.status, reply, phase=phase)
            else:
                # Whose fault it is shows when each runs on its own.
                for config in configs:
                    self._time([config], phase, rounds)

    def _recheck(self, config: Any) -> bool:
        if any(t.phase == "recheck" and t.config == config for t in self.journal.trials):
            return True
        checked = self._proxies(config)
        for _, reply in self.workers.run([Job("check", self.problem, self.small, (config,), checked, self.options.seed + 1)]):
            self._add(config, reply.status, reply, phase="recheck")
        return self.latest[config].ok

    def _result(self) -> SweepResult:
        trials = tuple(self.journal.trials)
        ranking = Ranking.from_trials(self.op, self.device, trials)
        if ranking is None:
            raise NoValidConfig(no_valid_config(self.op, self.problem, self.device, trials))
        ranking.save(self.op)
        drifted = drift([t.reference_ms for t in trials if t.reference_ms])
        notes = [*dict.fromkeys(self.notes), *([drifted] if drifted else [])]
        if self.workers.replaced:
            notes.append(f"the measuring process was replaced {self.workers.replaced} times")
        ranked = ranking.measured[0].configs
        if ranked[0].tied:
            tied = sum(r.tied and r.timing.ties(ranked[0].timing) for r in ranked)
            notes.append(f"{tied} configs tie for the first place: the first of them in order of declaration is named the winner")
        seconds = time.monotonic() - self.begun
        return SweepResult(self.op.name, self.problem, self.device, trials, ranking, tuple(notes), self.journal.path, seconds)


def proxies(op: Op, small: Any, problem: Any, config: Any, device: Device) -> tuple[Any, ...]:
    """Configs that are legal at `small` and together run every binary that `config` runs on `problem`; none if there are no such.

    A config that is legal there stands for itself. Else its parts are checked under other shared choices, together or one by one.
    """
    wanted = {_binary(stage) for stage in op.stages(problem, config)}
    parts = {name: getattr(config, name) for name in op.parts}
    variants = [parts, *({name: value} for name, value in parts.items())]
    found: list[Any] = []
    candidates = (dataclasses.replace(shared, **kept) for kept in variants for shared in op.shared())
    for candidate in (config, *candidates):
        if op.reject(small, candidate, device) is None:
            covered = wanted & {_binary(stage) for stage in op.stages(small, candidate)}
            if covered:
                found.append(candidate)
                wanted -= covered
        if not wanted:
            return tuple(found)
    return ()


def _binary(stage: Stage) -> tuple[Any, ...]:
    """What decides a stage's source."""
    return stage.kernel.name, StaticView(stage.problem), stage.config


def _resources(kernel: str, cubin: Cubin, smem: int) -> KernelResources:
    r = cubin.resources
    return KernelResources(kernel, r.registers, r.spill_stores + r.spill_loads, smem + r.static_smem)


def _check_problem(op: Op, problem: Any) -> None:
    if not isinstance(problem, op.problem):
        raise ArgumentTypeError(f"{op.name} sweeps a {op.problem.__name__}, not {type(problem).__name__}; make one with op.example(...)")
    for name, size in keyed_fields(problem).items():
        if size < 1:
            raise ArgumentError(f"{name}={size}: a sweep needs at least 1")


def _indices(gpus: int | Sequence[int]) -> tuple[int, ...]:
    indices = tuple(range(gpus)) if isinstance(gpus, int) else tuple(gpus)
    if not indices or min(indices) < 0 or len(set(indices)) < len(indices):
        raise ArgumentError(f"gpus={gpus!r}: accepted are a count from 1 up, or different CUDA indices")
    return indices


def _device(indices: Sequence[int]) -> Device:
    """The one kind of GPU that all indices are of."""
    try:
        devices = [Device.current(index) for index in indices]
    except ToolchainError as error:
        raise ArgumentError(f"gpus={tuple(indices)}: {error}") from None
    if len({device.key for device in devices}) > 1:
        kinds = ", ".join(f"{index} {device.name}" for index, device in zip(indices, devices, strict=True))
        raise ArgumentError(f"gpus={tuple(indices)} are unlike ({kinds}): their times do not compare; sweep each kind on its own")
    return devices[0]


def _versions() -> str:
    try:
        return f"vidrial {__version__}, {Toolchain.find().version}"
    except ToolchainError:
        return f"vidrial {__version__}"


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends this thread as Ctrl-C does, so that what was measured is kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
