"""The stopwatch's arithmetic and its order of samples; the events themselves need a GPU (tests/gpu/test_sweep.py)."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from vidrial.tune.timing import Timing, drift, drifts, measure, slowdowns


class Machine:
    """A clock of a machine that slows down by 1 % with every sample."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.waits = 0
        self.samples = 0

    def work(self, name: str) -> Callable[[], None]:
        return lambda: self.order.append(name)

    def sample(self, run: Callable[[], None]) -> Callable[[], float]:
        run()
        self.samples += 1
        ms = (2.0 if self.order[-1] == "b" else 1.0) * (1 + 0.01 * self.samples)
        return lambda: ms

    def wait(self) -> None:
        self.waits += 1


def test_timing_is_median_and_interquartile_range() -> None:
    timing = Timing.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (timing.median_ms, timing.iqr_ms, timing.samples) == (3.0, 2.0, 5)
    assert Timing.of([7.0]) == Timing(7.0, 0.0, 1)


@pytest.mark.parametrize(("other", "tie"), [(1.004, True), (1.02, False), (0.996, True), (0.98, False)])
def test_ties_by_least_noise(other: float, tie: bool) -> None:
    assert Timing(1.0, 0.0, 100).ties(Timing(other, 0.0, 100)) is tie


def test_ties_widen_with_the_spread_and_narrow_with_samples() -> None:
    assert Timing(1.0, 0.1, 9).ties(Timing(1.1, 0.1, 9))  # 2 x 1.57 x 0.1 / 3 = 0.105
    assert not Timing(1.0, 0.1, 100).ties(Timing(1.1, 0.1, 100))  # 0.031


def test_candidates_are_timed_in_turn_and_drift_meets_all_alike() -> None:
    machine = Machine()
    a, b, c = measure([machine.work(name) for name in "abc"], machine, rounds=4, warmup=1)
    assert "".join(machine.order) == "abc" + "abccbaabccba"
    assert machine.waits == 4 and a.samples == 4
    assert a.median_ms == pytest.approx(c.median_ms, rel=0.01) and b.median_ms / a.median_ms == pytest.approx(2.0, rel=0.01)


def test_drift_is_said() -> None:
    assert drift([1.0, 1.01, 1.02]) is None and drift([1.0]) is None
    reason = drift([1.0, 1.0, 1.2, 1.2])
    assert reason is not None and "1.0000 to 1.2000 ms" in reason and "throttled or busy" in reason
    # One disturbed sample in many is no drift.
    assert drift([1.0] * 40 + [1.5]) is None


def test_slowdowns_are_read_from_nvidia_smi(tmp_path, monkeypatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 0x0000000000000024, 1400, 1980\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert slowdowns("0000:01:00.0") == ["power cap", "thermal (software)", "its SMs run at 1400 MHz of at most 1980"]
    tool.write_text("#!/bin/sh\nsleep 0.2\necho 0x0000000000000000, 1900, 1980\n")
    worked = []
    assert slowdowns("0000:01:00.0", lambda: worked.append(time.sleep(0.01))) == []
    assert len(worked) > 3, "the GPU has work until the answer is there"
    tool.write_text("#!/bin/sh\necho '[N/A], [N/A], [N/A]'\n")
    assert slowdowns("0000:01:00.0") == []
    tool.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slowdowns("0000:01:00.0") == []


def test_gpus_that_are_not_equally_fast_are_said() -> None:
    assert drifts({"0": [1.0] * 9, "1": [1.01] * 9}) == [] == drifts({})
    (slower,) = drifts({"0": [1.0] * 9, "1": [1.1] * 9})
    assert slower.startswith("GPU 1 takes 10% longer than GPU 0")
    changed = [1.0] * 5 + [1.2] * 5
    assert drifts({"0": changed}) == [drift(changed)]
    assert drifts({"0": changed, "1": [1.0] * 9})[0].startswith("GPU 0: the reference kernel took from 1.0000 to 1.2000 ms")
