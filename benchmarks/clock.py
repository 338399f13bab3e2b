"""The stopwatch where kernels are compared that are close to each other: shuffled order, a cold L2, the host ahead of the GPU.

In a fixed order the kernel behind a light one gets a higher clock, by up to 8 %; where the host is not ahead its own time is counted.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from vidrial.tune.timing import Clock, Run, Timing

FLUSH_BYTES = 256 << 20
# 0.35 ms at the highest clock there is: what the GPU sleeps at least before a sample.
LEAD_CYCLES, CYCLES_PER_SECOND = 700_000, 2.0e9


class SleepClock:
    """CUDA events on torch's current stream, behind writes that flush the L2 and a sleep while which the host queues the run."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self._cycles = LEAD_CYCLES

    def sample(self, run: Run) -> Callable[[], float]:
        """Queue one run; the function returned gives its milliseconds after `wait`."""
        begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._scratch.zero_()
        self._torch.cuda._sleep(self._cycles)
        begin.record()
        run()
        end.record()
        return lambda: float(begin.elapsed_time(end))

    def wait(self) -> None:
        """Return when the GPU is done."""
        self._torch.cuda.synchronize()

    def lead(self, run: Run) -> None:
        """Sleep for at least twice as long as the host takes to queue `run`."""
        self.wait()
        begin = time.perf_counter()
        run()
        queued = time.perf_counter() - begin
        self.wait()
        self._cycles = max(self._cycles, int(2 * queued * CYCLES_PER_SECOND))


def shuffled(runs: Sequence[Run], clock: Clock, rounds: int, seed: int = 0) -> list[Timing]:
    """Time several runs, in another order in every round."""
    order, rng = list(range(len(runs))), random.Random(seed)
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        rng.shuffle(order)
        taken = [(i, clock.sample(runs[i])) for i in order]
        clock.wait()
        for i, elapsed in taken:
            times[i].append(elapsed())
    return [Timing.of(found) for found in times]


def repeated(run: Run, count: int) -> Run:
    """The run so many times, back to back."""

    def many() -> None:
        for _ in range(count):
            run()

    return many


def per_call(timing: Timing, calls: int) -> Timing:
    """The timing of one call out of that of so many."""
    return Timing(timing.median_ms / calls, timing.iqr_ms / calls, timing.samples)
