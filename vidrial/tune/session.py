"""One sweep while it runs: search, confirm the leaders, compare the winner, rank; every trial is in the journal before the next begins."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from vidrial import __version__
from vidrial.build.cubins import build_many
from vidrial.build.store import Store
from vidrial.build.toolchain import Toolchain
from vidrial.device import Device
from vidrial.errors import CompileStopped, NoValidConfig, SweepError, ToolchainError
from vidrial.progress import Progress, reporting
from vidrial.spec.choices import describe, flatten
from vidrial.spec.op import Op
from vidrial.spec.registry import resolve
from vidrial.tune.candidates import Builds
from vidrial.tune.codec import encode
from vidrial.tune.journal import Journal
from vidrial.tune.options import Options
from vidrial.tune.ranking import Ranking
from vidrial.tune.result import SweepResult, chances, no_valid_config
from vidrial.tune.search import Search
from vidrial.tune.timing import drifts
from vidrial.tune.trial import CHANCES, Status, Trial, latest, passing_failures
from vidrial.tune.workers import Job, Pool, Reply

TRIALS = 64
# Samples of a first look; a config that is this many times behind the best gets the fewest.
SCREEN_ROUNDS, GIVE_UP = 7, 3.0
# (phase, how far behind the best a leader may be, how many leaders, samples of each): timed in turn.
CONFIRM = (("confirm", 1.15, 8, 20), ("final", 1.04, 4, 60))
# The winner and another config may differ by so many times the bound of a result beside the reference, and by the least of all. A block of
# results is smaller than all of them, and its error larger; what is wrong differs by its own size.
DIFFERENCE, LEAST_DIFFERENCE = 16.0, 0.01
# Configs that were not tried, to look for some that the winner may be compared with.
WITNESSES = 64
# Share of a time budget after which nothing new is tried.
SEARCH_SHARE = 0.8


class Strategy(Protocol):
    """What names the configs to try."""

    def propose(self, seen: dict[Any, float]) -> list[Any]:
        """Configs to try next, given config -> ms (infinite for a failure) of those tried; none if the search is over."""


class Session:
    """One sweep while it runs: what `op` is measured with for `problem` on `workers`' GPUs, kept in a journal as it comes."""

    def __init__(self, op: Op, problem: Any, options: Options, workers: Pool, device: Device) -> None:
        self.op, self.problem, self.options, self.workers, self.device = op, problem, options, workers, device
        self.needs_cubins = bool(resolve(options.bench).needs_cubins)
        unlimited = options.exhaustive or options.configs is not None or options.seconds is not None
        self.trials = options.trials or (sys.maxsize if unlimited else TRIALS)
        self.begun = time.monotonic()
        self.small = op.small(problem)
        self.builds = Builds(
            op, problem, self.small, device, functools.partial(build_many, arch=device.arch, jobs=options.jobs, compiler=workers.compiler)
        )
        self.notes: list[str] = []
        self.replaced = workers.replaced
        # What all trials of a sweep have in common.
        self.of_all: dict[str, Any] = {"device": device.key, "seed": options.seed, "versions": _versions()}
        self.progress: Progress

    def run(self) -> SweepResult:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_terminable())
            self.journal = stack.enter_context(self._open_journal())
            self.progress = stack.enter_context(reporting(self.options.progress))
            try:
                # What measures begins while this process compiles.
                self.workers.set_problem(Job("prepare", self.problem, self.small, seed=self.options.seed))
                self._search()
                self._state()
                self._confirm()
                self._state()
            except BaseException as error:
                self._keep(error)
                raise
            try:
                return self._result()
            except (KeyboardInterrupt, SystemExit) as error:
                self._keep(error)
                raise

    @property
    def latest(self) -> dict[Any, Trial]:
        return latest(self.journal.trials)

    def _open_journal(self) -> Journal:
        resume = self.options.resume or self.options.retry
        named = resume if isinstance(resume, str | Path) else self.options.journal
        facts = {"digest": self.op.digest(), "device": self.device.key, "problem": encode(self.problem)}
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        path = Path(named) if named else _journals() / f"{self.op.name}-{self.device.key}-{name}.jsonl"
        journal = Journal(path, self.op, facts, fresh=not resume)
        if resume and not journal.trials:
            self.notes.append("there was no journal to go on with: begun anew")
        if journal.outdated:
            self.notes.append(f"{journal.outdated} trials of the journal do not count: their configs make choices that are none any more")
        return journal

    def _keep(self, error: BaseException) -> None:
        """What was measured, ranked; and how to go on."""
        ranking = Ranking.from_trials(self.op, self.device, self.journal.trials)
        if ranking is not None:
            ranking.save(self.op)
        self.say(error)

    def say(self, error: BaseException) -> None:
        """How to go on; once it has a journal."""
        if "journal" not in vars(self):
            return
        note = f"{len(self.journal.trials)} trials are kept in {self.journal.path}; the same sweep with --resume (resume=True) goes on from there"
        error.add_note(note)
        if isinstance(error, KeyboardInterrupt | SystemExit):
            print(f"\nvidrial: {note}", file=sys.stderr)

    def _over(self, share: float = 1.0) -> bool:
        return self.options.seconds is not None and time.monotonic() - self.begun > share * self.options.seconds

    def _state(self) -> None:
        for _, reply in self.workers.run([Job("state")] * self.workers.count):
            which = f"GPU {reply.gpu}" if self.workers.count > 1 else "the GPU"
            self.notes += [f"the driver slows {which} down: {note}" for note in reply.notes]

    def _search(self) -> None:
        asked = self.options.configs
        if asked is not None:
            for config in asked:
                self.op.check_config(self.problem, config, self.device)
            again = self._again()
            self._try([c for c in asked if c not in self.latest or c in again])
            return
        self._try(self._again())
        search = self._strategy()
        while True:
            seen = {config: trial.ms for config, trial in self.latest.items()}
            proposed = search.propose(seen)
            batch = proposed[: max(0, self.trials - len(seen))]
            over = self._over(SEARCH_SHARE) and any(trial.ok for trial in self.latest.values())
            if over or not batch:
                if proposed and self.options.exhaustive:
                    self.notes.append(f"the budget ended before every config was tried: at least {len(proposed)} are left")
                return
            self._try(batch)

    def _again(self) -> list[Any]:
        """Configs of the journal that get another chance."""
        return [config for config, times in passing_failures(self.journal.trials).items() if times < CHANCES or self.options.retry]

    def _strategy(self) -> Strategy:
        if self.options.strategy == "optuna":
            from vidrial.tune.optuna_search import OptunaSearch

            return OptunaSearch(self.op, self.problem, self.device, self.options.seed)
        return Search(self.op, self.problem, self.device, self.trials, self.options.exhaustive)

    def _try(self, configs: Sequence[Any]) -> None:
        """Compile, check and time configs; each ends as a trial in the journal."""
        self.progress.begin("measure", len(configs))
        for job, reply in self.workers.run(self._jobs(configs)):
            timing = reply.timings[0] if reply.timings else None
            self._add(job.configs[0], reply, timing=timing)
            self.progress.advance(str(self.journal.trials[-1]))

    def _jobs(self, configs: Sequence[Any]) -> Iterator[Job]:
        """A job for each config that can be measured, as soon as it is compiled; the others end as trials."""
        ready = self.builds.ready(configs) if self.needs_cubins else ((config, None) for config in configs)
        for config, error in ready:
            best = min((t.ms for t in self.latest.values()), default=math.inf)
            # Whatever the time is, one config at least is measured.
            if self._over(SEARCH_SHARE) and best < math.inf:
                return
            checked = self.builds.check_configs(config)
            if error:
                status = Status.stopped if isinstance(error, CompileStopped) else Status.compile
                self._add(config, Reply(status, str(error)))
            elif not checked:
                self._add(config, Reply(Status.rejected, f"it is not legal at {self.small}, so it cannot be checked"))
            else:
                yield Job("trial", self.problem, self.small, (config,), checked, self.options.seed, SCREEN_ROUNDS, GIVE_UP * best)

    def _add(self, config: Any, reply: Reply, **fields: Any) -> None:
        said = {name: getattr(reply, name) for name in ("status", "check", "reason", "reference_ms", "gpu")}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        resources = self.builds.resources(config)
        self.journal.append(Trial(self.op.name, self.problem, config, resources=resources, time=now, **self.of_all, **said, **fields))

    def _confirm(self) -> None:
        """Time the leaders in turn, longer and longer; check the winner on other inputs, and at the problem itself."""
        phases = ["screen", *(phase for phase, *_ in CONFIRM)]
        for phase, behind, count, rounds in CONFIRM:
            while (leaders := self._leaders(behind, count)) and not self._over():
                if all(phases.index(t.phase) >= phases.index(phase) for t in leaders):
                    break
                self._time([t.config for t in leaders], phase, rounds)
        while (winner := self._winner()) is not None:
            if not self._recheck(winner):
                self.notes.append(f"{describe(winner)} was fastest, but did not pass on other inputs")
            elif not self._compared(winner):
                self.notes.append(f"{describe(winner)} was fastest, but is wrong at the problem itself")
            else:
                return

    def _winner(self) -> Any:
        """What the ranking would name first now."""
        ranking = Ranking.from_trials(self.op, self.device, self.journal.trials)
        return ranking.measured[0].configs[0].config if ranking is not None else None

    def _leaders(self, behind: float, count: int) -> list[Trial]:
        good = sorted((t for t in self.latest.values() if t.ok), key=lambda t: t.ms)
        return [t for t in good if t.ms <= behind * good[0].ms][:count]

    def _time(self, configs: Sequence[Any], phase: str, rounds: int) -> None:
        self.progress.begin(phase, len(configs))
        for job, reply in self.workers.run([Job("time", self.problem, self.small, tuple(configs), (), self.options.seed, rounds)]):
            if reply.status is Status.ok:
                for config, timing in zip(job.configs, reply.timings, strict=True):
                    before = self.latest[config]
                    self._add(config, dataclasses.replace(reply, check=before.check), timing=timing, phase=phase)
                    self.progress.advance(str(self.journal.trials[-1]))
            elif reply.at is not None or len(configs) == 1:
                self._add(configs[reply.at or 0], reply, phase=phase)
            else:
                # Whose fault it is shows when each runs on its own.
                for config in configs:
                    self._time([config], phase, rounds)

    def _recheck(self, config: Any) -> bool:
        if any(t.phase == "recheck" and t.config == config and t.status is Status.ok for t in self.journal.trials):
            return True
        checked = self.builds.check_configs(config)
        for _, reply in self.workers.run([Job("check", self.problem, self.small, (config,), checked, self.options.seed + 1)]):
            self._add(config, reply, phase="recheck")
        return self.latest[config].ok

    def _compared(self, config: Any) -> bool:
        """Whether a config that passed at the small problem makes of the very one that is swept what another config makes of it.

        Where two differ a third one says which of them is wrong. Nothing is said of what can be compared with no other.
        """
        if any(t.phase == "compare" and t.config == config and t.status is Status.ok for t in self.journal.trials):
            return True
        check = self.latest[config].check
        bound = max(LEAST_DIFFERENCE, DIFFERENCE * check.relative_bound) if check is not None else LEAST_DIFFERENCE
        # The first one that differs, and what was found of the two.
        doubted: tuple[Any, Reply] | None = None
        for other in self._witnesses(config):
            job = Job("compare", self.problem, self.small, (config, other), seed=self.options.seed, bound=bound)
            reply = next(reply for _, reply in self.workers.run([job]))
            if reply.status is Status.ok:
                self._add(config, reply, phase="compare")
                if doubted is not None:
                    self._add_difference(doubted[0], config, doubted[1], ", which others confirm")
                return True
            if reply.status is not Status.wrong:
                self.notes.append(f"{describe(config)} was not compared at the problem itself: {reply.reason}")
                return True
            if doubted is not None:
                self._add(config, reply, phase="compare")
                return False
            doubted = other, reply
        if doubted is None:
            self.notes.append(f"{describe(config)} was checked at {self.small} alone: no other config is there to compare it with")
            return True
        # Nobody says which one is wrong: neither wins.
        other, reply = doubted
        self._add_difference(config, other, reply)
        self._add_difference(other, config, reply)
        return False

    def _add_difference(self, config: Any, other: Any, reply: Reply, more: str = "") -> None:
        reason = f"at the problem itself it differs from {describe(other)}{more}"
        self._add(config, dataclasses.replace(reply, reason=reason), phase="compare")

    def _witnesses(self, config: Any) -> Iterator[Any]:
        """Configs to compare one with: of those that passed the most unlike ones first; then others that pass, which nobody has tried."""
        made = flatten(config)
        passed = [t for t in self.latest.values() if t.ok and t.config != config]
        unlike = sorted(passed, key=lambda t: (-sum(v != made[name] for name, v in flatten(t.config).items()), t.ms))
        yield from (t.config for t in unlike)
        # What is tried here alone is no part of the sweep: it may not win.
        tried = set(self.latest)
        every = (c.config for c in itertools.islice(self.op.ranked(self.problem, self.device), WITNESSES))
        yield from (other for other in every if other not in tried and self._passes(other))

    def _passes(self, config: Any) -> bool:
        """Whether a config that was not tried compiles and is right at the small problem."""
        if self.needs_cubins and any(error for _, error in self.builds.ready([config])):
            return False
        checked = self.builds.check_configs(config)
        job = Job("check", self.problem, self.small, (config,), checked, self.options.seed)
        return bool(checked) and all(reply.status is Status.ok for _, reply in self.workers.run([job]))

    def _result(self) -> SweepResult:
        trials = tuple(self.journal.trials)
        ranking = Ranking.from_trials(self.op, self.device, trials)
        if ranking is None:
            error = NoValidConfig(no_valid_config(self.op, self.problem, self.device, trials))
            error.add_note(f"{len(trials)} trials, with the causes, are in {self.journal.path}")
            raise error
        ranking.save(self.op)
        references: dict[str, list[float]] = {}
        for trial in trials:
            if trial.reference_ms:
                references.setdefault(trial.gpu, []).append(trial.reference_ms)
        notes = [*dict.fromkeys([*self.workers.notes, *self.notes]), *drifts(references)]
        notes += chances(trials)
        replaced = self.workers.replaced - self.replaced
        if replaced:
            notes.append(f"the measuring process was replaced {replaced} times")
        ranked = ranking.measured[0].configs
        if ranked[0].tied:
            tied = sum(r.tied and r.timing.ties(ranked[0].timing) for r in ranked)
            notes.append(f"{tied} configs tie for the first place: the first of them in order of declaration is named the winner")
        seconds = time.monotonic() - self.begun
        return SweepResult(self.op.name, self.problem, self.device, trials, ranking, tuple(notes), self.journal.path, seconds)


def _journals() -> Path:
    """Where journals lie that nobody named a place for.

    Raises:
        SweepError: the cache is a temporary one, so that they would end with this process.
    """
    store = Store.shared()
    if store.refused:
        raise SweepError(
            f"trials would be lost: {store.refused}; name a cache directory with VIDRIAL_CACHE_DIR, or a file with journal=..."
        )
    return store.root / "journals"


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
