"""Many cases: one after another, by threads at once, in forked children; and a failing one made small."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from .cases import Case, smaller
from .judge import judge

THREADS = 8
# A forked child that takes longer has hung.
CHILD_SECONDS = 60


def together(cases: Sequence[Case]) -> list[str]:
    """The verdicts of cases that as many threads begin at the same moment."""
    verdicts, barrier = ["no verdict"] * len(cases), threading.Barrier(len(cases))

    def work(i: int) -> None:
        barrier.wait()
        verdicts[i] = judge(cases[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return verdicts


def in_child(case: Case) -> str:
    """The verdict of a forked child of this process."""
    end, begin = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(CHILD_SECONDS)
        try:
            os.write(begin, ("said " + judge(case)).encode()[:4000])
        finally:
            os._exit(0)
    os.close(begin)
    said = b""
    while piece := os.read(end, 4096):
        said += piece
    os.close(end)
    _, status = os.waitpid(child, 0)
    return said.decode()[5:] if said else f"a forked child said nothing; it ended with status {status}"


def check_all(cases: Iterable[Case]) -> dict[Case, str]:
    """Of these cases those that are wrong, with what is; of every 20 the last 8 by threads at once, and one before them in a forked child."""
    batch, failed = [], dict[Case, str]()
    for case in cases:
        batch.append(case)
        if len(batch) == 20:
            failed |= _batch(batch)
            batch = []
    return failed | _batch(batch)


def _batch(cases: Sequence[Case]) -> dict[Case, str]:
    alone, others = cases[:-THREADS], cases[-THREADS:]
    # NOTE: what OpenMP's threads did before a fork they do not do after it, so that torch hangs there: children get NumPy's arrays.
    child = next((i for i in reversed(range(len(alone))) if alone[i].library == "numpy"), None)
    verdicts = [in_child(case) if i == child else judge(case) for i, case in enumerate(alone)]
    verdicts += together(others) if others else []
    return {case: said for case, said in zip(cases, verdicts, strict=True) if said}


def shrink(case: Case, verdict: str, seconds: float = 20.0, judged: Callable[[Case], str] = judge) -> tuple[Case, str]:
    """A smaller case that is wrong in the same way (the verdict's first word), as far as one is found within the time."""
    until, kind = time.monotonic() + seconds, verdict.split()[0]
    found = True
    while found and time.monotonic() < until:
        found = False
        for candidate in smaller(case):
            said = judged(candidate)
            if said.split()[:1] == [kind]:
                case, verdict, found = candidate, said, True
                break
    return case, verdict


def snippet(case: Case, verdict: str) -> str:
    """Python that shows a failing case again."""
    return f"""# {verdict}
from numpy import inf, nan, float32
import numpy as np
from tests.fuzz.cases import Case
from tests.fuzz.judge import judge

print(judge({case!r}) or "right")"""
