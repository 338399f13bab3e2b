"""Find the fastest config of an op for one problem, or for several: compile, check, time, rank; every trial is kept, whatever happens.

result = sweep(op, problem, trials=64)
print(result.table())
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vidrial.errors import ArgumentError
from vidrial.spec.fields import C, P
from vidrial.spec.op import Op
from vidrial.tune.options import Options, check_problem, measuring
from vidrial.tune.ranking import top_configs
from vidrial.tune.result import SweepResult
from vidrial.tune.session import Session
from vidrial.tune.trial import latest

# Of several problems: share of the time for their own sweeps; how many shares the first one gets, which compiles for all; a share's least.
FIRST_PASS, COMPILING, LEAST_SECONDS = 0.7, 4, 0.5


def sweep(op: Op[P, C], problem: P, options: Options | None = None, **changes: object) -> SweepResult[P, C]:
    """Sweep one op for one problem and keep the ranking; `changes` are fields of `Options`.

    Ctrl-C and SIGTERM rank what has been measured, then go on to the caller; the same sweep with `resume=True` repeats the config
    that was being tried on each GPU, and no other.

    Raises:
        ArgumentError: a size that is not positive, a GPU that does not exist, an option's value.
        NoValidConfig: no config is legal, or all failed; the message counts the causes.
        SweepError: the journal cannot be used or written, or nothing can measure; what was measured is kept.
    """
    chosen = Options.of(options, changes)
    check_problem(op, problem)
    with _saying_what_is_kept() as sweeps, measuring(op, chosen) as (workers, device):
        sweeps.append(Session(op, problem, chosen, workers, device))
        return sweeps[0].run()


def sweep_lengths(
    op: Op[P, C],
    problems: Sequence[P],
    options: Options | None = None,
    within: float | None = None,
    done: Callable[[SweepResult[P, C]], None] | None = None,
    **changes: object,
) -> list[SweepResult[P, C]]:
    """Sweep several problems of the same static facts, then time the model's candidates on all of them: what it is calibrated with.

    `within`: seconds for all together, about; problems that no time is left for are left out, the last ones first. `done` is called with
    each result as soon as it is there, and again when the others' leaders were timed as well.

    Raises:
        as `sweep`. ArgumentError: one journal for several problems.
    """
    chosen = Options.of(options, changes)
    if len(problems) > 1 and (chosen.journal is not None or isinstance(chosen.resume, str | Path)):
        raise ArgumentError("a journal holds one problem's trials: sweep each on its own, or leave journal=... out and give resume=True")
    for problem in problems:
        check_problem(op, problem)
    begun, found, done = time.monotonic(), list[SweepResult[P, C]](), done or (lambda _: None)

    def share(left: int, until: float, parts: int = 1) -> Options | None:
        """Options with a fair share of the time that is left; None if it is too little to begin. The first problem is always swept."""
        if within is None:
            return chosen
        rest = max(until * within - (time.monotonic() - begun), 0.0 if found else LEAST_SECONDS)
        return dataclasses.replace(chosen, seconds=rest * parts / (left + parts - 1)) if rest >= LEAST_SECONDS else None

    with _saying_what_is_kept() as sweeps, measuring(op, chosen) as (workers, device):
        for i, problem in enumerate(problems):
            mine = share(len(problems) - i, FIRST_PASS, 1 if i else COMPILING)
            if mine is not None:
                sweeps.append(Session(op, problem, mine, workers, device))
                found.append(sweeps[-1].run())
                done(found[-1])
        candidates = top_configs(m for result in found for m in result.ranking.measured)
        for i, result in enumerate(found):
            have, mine = latest(result.trials), share(len(found) - i, 1.0)
            missing = [c for c in candidates if c not in have and op.reject(result.problem, c, device) is None]
            if missing and mine is not None:
                mine = dataclasses.replace(mine, configs=[result.ranked[0].config, *missing], resume=result.journal)
                sweeps.append(Session(op, result.problem, mine, workers, device))
                found[i] = sweeps[-1].run()
                done(found[i])
    return found


@contextlib.contextmanager
def _saying_what_is_kept() -> Iterator[list[Session]]:
    """A list for sweeps as they begin. Where Ctrl-C comes when the last one runs no more, while its processes end, say, it says how to go on, too."""
    begun = list[Session]()
    try:
        yield begun
    except (KeyboardInterrupt, SystemExit) as error:
        if begun and not getattr(error, "__notes__", None):
            begun[-1].say(error)
        raise
