"""The sweep on a real GPU: checks that catch what they should, times that agree with arithmetic, a sweep end to end."""

from __future__ import annotations

import math
from pathlib import Path

import bad_op
import cupy
import pytest
from bad_op import Config, example

from vidrial.device import Device
from vidrial.kernels.power_retention.op import example as power_example
from vidrial.kernels.power_retention.op import op as power_op
from vidrial.tune.measure import CudaBench
from vidrial.tune.pick import choose_config
from vidrial.tune.sweeper import sweep
from vidrial.tune.timing import CudaClock, measure
from vidrial.tune.trial import Status


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "cache"))


def test_a_copys_time_is_its_bytes() -> None:
    device, stream = Device.current(), cupy.cuda.Stream(non_blocking=True)
    x, y = cupy.zeros(1 << 29, cupy.uint8), cupy.zeros(1 << 29, cupy.uint8)
    clock = CudaClock(device.l2_bytes, stream)

    def copy(part: int) -> None:
        y.data.copy_from_device_async(x.data, x.nbytes // part, stream)

    whole, half = measure([lambda: copy(1), lambda: copy(2)], clock, rounds=15)
    assert whole.median_ms / half.median_ms == pytest.approx(2.0, rel=0.1)
    gbs = 2 * x.nbytes / whole.median_ms / 1e6
    assert 0.5 * device.bandwidth_gbs < gbs < 1.2 * device.bandwidth_gbs
    assert not whole.ties(half)


def test_an_empty_run_takes_microseconds_though_the_host_is_slow() -> None:
    stream = cupy.cuda.Stream(non_blocking=True)
    clock = CudaClock(Device.current().l2_bytes, stream)
    x = cupy.zeros(256, cupy.uint8)

    def many() -> None:
        for _ in range(20):
            x.data.memset_async(0, 256, stream)

    clock.lead(many)
    (timing,) = measure([many], clock, rounds=15)
    assert timing.median_ms < 0.15


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (bad_op.NONE, Status.ok),
        (bad_op.WRONG, Status.wrong),
        (bad_op.TAIL, Status.wrong),
        (bad_op.OUTSIDE, Status.wrong),
        (bad_op.RANDOM, Status.wrong),
        (bad_op.FAULT, Status.crash),
        (bad_op.HANG, Status.timeout),
        (bad_op.SMEM, Status.launch),
    ],
)
def test_bad_kernels_are_caught_and_cost_themselves_alone(fault: int, status: Status) -> None:
    result = sweep(bad_op.op, example(n=10007), configs=[Config(fault, 128), Config(bad_op.NONE, 64)], limit=10.0)
    found = {t.config: t for t in result.trials if t.phase == "screen"}
    assert found[Config(fault, 128)].status is status, found[Config(fault, 128)].reason
    assert found[Config(bad_op.NONE, 64)].ok
    # The caller's own context goes on.
    assert not cupy.zeros(1000, cupy.uint8).get().any()


def test_power_retention_is_swept_and_picked() -> None:
    problem = power_example(t=4099, h=4)
    result = sweep(power_op, problem, trials=16, limit=60.0)
    print(result.table())
    assert Status.crash not in result.failures and result.winner.check is not None and result.winner.check.ok
    assert result.winner.ms <= min(t.ms for t in result.trials if t.ok) * 1.05
    assert choose_config(power_op, problem, Device.current()) == (result.winner.config, "ranking")


def test_the_same_sweep_names_a_winner_as_fast() -> None:
    problem = power_example(t=2053, h=4)
    first = sweep(power_op, problem, trials=12, limit=60.0)
    second = sweep(power_op, problem, trials=12, limit=60.0)
    assert first.winner.ms == pytest.approx(second.winner.ms, rel=0.05)
    assert math.isfinite(first.worst_ms)


def test_the_bench_repeats_itself() -> None:
    problem = power_example(t=1031, h=2)
    bench = CudaBench(power_op, 0)
    bench.prepare(problem, power_op.small(problem), (0, 1))
    config = power_op.predicted(problem, Device.current())
    verdicts = [bench.check(power_op.small(problem), config, seed) for seed in (0, 1, 0)]
    assert all(not v.reason for v in verdicts)
    assert verdicts[0] == verdicts[2] != verdicts[1]
