"""The only stopwatch: CUDA events around runs of a warm GPU with a cold L2, candidates in turn.

A sample is queued behind writes that flush the L2 and last longer than the host takes to queue the launches: what is measured is
the GPU, from the first launch's start to the last one's end, not Python.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from vidrial.errors import SweepError

Run = Callable[[], None]
# Half the width of the 95 % interval of a median, in IQRs times sqrt(samples): McGill, Tukey & Larsen 1978.
NOTCH = 1.57
# What two runs of one binary differ by from one process to the next; and of the reference kernel, before it is said.
LEAST_NOISE, DRIFT = 0.0025, 0.05
CSV = "--format=csv,noheader,nounits"
# Seconds that nvidia-smi may take; a clock below this share of the highest one is said.
ASK_SECONDS, SLOW_CLOCK = 10.0, 0.8
SLOWDOWNS = {0x4: "power cap", 0x8: "hardware slowdown", 0x20: "thermal (software)", 0x40: "thermal (hardware)", 0x80: "power brake"}


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median and interquartile range in milliseconds, over so many samples."""

    median_ms: float
    iqr_ms: float
    samples: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Timing:
        """The timing of samples in milliseconds, at least one."""
        low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else (times[0],) * 3
        return cls(statistics.median(times), high - low, len(times))

    def check(self) -> None:
        """Refuse what no GPU takes.

        Raises:
            SweepError: a time or its range is negative, nothing or not finite, or there is no sample.
        """
        if not (0 < self.median_ms < math.inf and 0 <= self.iqr_ms < math.inf and self.samples >= 1):
            raise SweepError(f"no timing: median_ms={self.median_ms}, iqr_ms={self.iqr_ms}, samples={self.samples}")

    @property
    def noise_ms(self) -> float:
        """How far the median may be off."""
        return max(NOTCH * self.iqr_ms / math.sqrt(self.samples), LEAST_NOISE * self.median_ms)

    def ties(self, other: Timing) -> bool:
        """Whether the two cannot be told apart: their medians' intervals meet."""
        return abs(self.median_ms - other.median_ms) <= self.noise_ms + other.noise_ms

    def __str__(self) -> str:
        return f"{self.median_ms:.4f} ms +- {self.iqr_ms:.4f}"


class Clock(Protocol):
    """What times one run."""

    def sample(self, run: Run) -> Callable[[], float]:
        """Queue one run; the function returned gives its milliseconds after `wait`."""

    def wait(self) -> None:
        """Return when everything queued is done."""


def measure(runs: Sequence[Run], clock: Clock, rounds: int = 20, warmup: int = 2) -> list[Timing]:
    """Time several runs in turn, A B C, C B A, ..., so that drifting clocks meet all alike.

    Args:
        runs: each queues its work.
        clock: the stopwatch, a `CudaClock`.
        rounds: samples of each.
        warmup: runs of each before the first sample.
    """
    for run in runs:
        for _ in range(warmup):
            run()
        clock.wait()
    samples: list[list[Callable[[], float]]] = [[] for _ in runs]
    for n in range(rounds):
        for i in range(len(runs))[:: -1 if n % 2 else 1]:
            samples[i].append(clock.sample(runs[i]))
    clock.wait()
    return [Timing.of([elapsed() for elapsed in taken]) for taken in samples]


class CudaClock:
    """CUDA events on a stream of one GPU, the L2 flushed before every sample. Needs CuPy."""

    def __init__(self, l2_bytes: int, stream: Any) -> None:
        import cupy

        self._cupy, self.stream = cupy, stream
        self._scratch = cupy.empty(2 * l2_bytes, cupy.uint8)
        self._passes = 1
        self._flush_seconds = self._time_flush()

    def flush(self) -> None:
        """Overwrite twice the L2, as often as it takes to keep the GPU busy while the host queues a run."""
        for _ in range(self._passes):
            self._scratch.data.memset_async(0, self._scratch.nbytes, self.stream)

    def sample(self, run: Run) -> Callable[[], float]:
        """Queue the flush, then one run between two events."""
        begin, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        self.flush()
        begin.record(self.stream)
        run()
        end.record(self.stream)
        return lambda: float(self._cupy.cuda.get_elapsed_time(begin, end))

    def wait(self) -> None:
        """Return when the stream is done."""
        self.stream.synchronize()

    def lead(self, run: Run) -> None:
        """Flush for at least twice as long as the host takes to queue `run`."""
        self.wait()
        begin = time.perf_counter()
        run()
        queued = time.perf_counter() - begin
        self.wait()
        self._passes = max(self._passes, 1 + math.ceil(2 * queued / self._flush_seconds))

    def _time_flush(self) -> float:
        self.flush()
        self.wait()
        elapsed = self.sample(self.flush)
        self.wait()
        return max(elapsed() / 1e3, 1e-6)


def slowdowns(pci_bus_id: str, work: Run | None = None) -> list[str]:
    """Why the driver slows the GPU down now, and how far its clock is down, by `nvidia-smi`; nothing where that does not run.

    `work` keeps the GPU busy until `nvidia-smi` has answered: of an idle one it says only that it is idle.
    """
    query = ["nvidia-smi", f"--id={pci_bus_id}", "--query-gpu=clocks_throttle_reasons.active,clocks.sm,clocks.max.sm", CSV]
    try:
        with subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8", errors="replace") as asked:
            until = time.monotonic() + ASK_SECONDS
            while asked.poll() is None and time.monotonic() < until:
                work() if work is not None else time.sleep(0.01)
            if asked.poll() is None:
                asked.kill()
            active, *clocks = asked.communicate()[0].strip().split(",")
        found = [name for bit, name in SLOWDOWNS.items() if int(active, 16) & bit]
        now, most = (float(clock) for clock in clocks)
    except (OSError, ValueError):
        return []
    return found + ([f"its SMs run at {now:g} MHz of at most {most:g}"] if now < SLOW_CLOCK * most else [])


def drifts(reference_ms: Mapping[str, Sequence[float]]) -> list[str]:
    """What the reference kernel's times, by GPU, say against the figures: a GPU's that changed, and GPUs that are not equally fast."""
    said = {gpu: drift(times) for gpu, times in reference_ms.items()}
    notes = [f"GPU {gpu}: {reason}" if len(said) > 1 else reason for gpu, reason in said.items() if reason]
    medians = {gpu: statistics.median(times) for gpu, times in reference_ms.items() if times}
    if medians and max(medians.values()) > (1 + DRIFT) * min(medians.values()):
        slow, fast = max(medians, key=medians.__getitem__), min(medians, key=medians.__getitem__)
        notes.append(
            f"GPU {slow} takes {medians[slow] / medians[fast] - 1:.0%} longer than GPU {fast} for the reference kernel: first looks on the "
            "one and the other do not compare; the leaders were timed in turn on one of them"
        )
    return notes


def drift(reference_ms: Sequence[float]) -> str | None:
    """A reason if the reference kernel did not take the same time throughout, else None."""
    if len(reference_ms) < 2:
        return None
    # One disturbed sample says nothing: the tenth of each end is left out.
    ordered, out = sorted(reference_ms), len(reference_ms) // 10
    low, high = ordered[out], ordered[-1 - out]
    if high <= low * (1 + DRIFT):
        return None
    return (
        f"the reference kernel took from {low:.4f} to {high:.4f} ms: the GPU was throttled or busy; "
        "sweep again on an idle GPU before trusting differences of that size"
    )
