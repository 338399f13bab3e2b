"""What is predicted of a launch (MMAs, ldmatrix, bank conflicts, cp.async) is what the host target counts: to the last one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from vidrial.dtypes import DType
from vidrial.errors import ArgumentError
from vidrial.host.plan import HostPlan, poison
from vidrial.host.target import HostStats
from vidrial.kernels.power_retention import attend, scan
from vidrial.kernels.power_retention.op import Config, example
from vidrial.kernels.power_retention.op import op as power_retention
from vidrial.layout import counts
from vidrial.layout.atoms import cp_async, ldmatrix
from vidrial.layout.copies import LoadMatrix, TiledCopy
from vidrial.layout.counts import Counts
from vidrial.layout.smem import SmemLayout
from vidrial.spec.kernel import Kernel
from vidrial.spec.op import Op
from vidrial.spec.registry import find_op

NARROW = Config(128, scan.Config(64, 3, 4, 32, 3), attend.Config(keys=32, m=2, warps=2, stages=2, blocks=2))
WIDE = Config(128, scan.Config(32, 4, 8, 64, 1), attend.Config(keys=64, m=2, warps=4, stages=3, blocks=2))
TALL = Config(256, scan.Config(128, 3, 4, 32, 1), attend.Config(keys=32, m=4, warps=2, stages=3, blocks=1))
ONE_CHUNK = Config(0, scan.Config(), attend.Config(keys=64, m=2, warps=8, stages=2, blocks=1))
CASES: dict[str, tuple[dict[str, Any], Config]] = {
    "four chunks in three segments": ({"t": 389, "h": 2, "d": 32}, NARROW),
    "wide, grouped, E < D": ({"t": 263, "h": 1, "hq": 3, "d": 64, "e": 64}, WIDE),
    "tall, two batches": ({"t": 515, "b": 2, "h": 1, "d": 32}, TALL),
    "no gates, no sum, fp16": (
        {"t": 301, "h": 1, "d": 64, "e": 32, "gated": False, "normalize": "none", "dtype": "float16"},
        dataclasses.replace(NARROW, scan=dataclasses.replace(NARROW.scan, segments=1)),
    ),
    "one chunk": ({"t": 257, "h": 2, "d": 64}, ONE_CHUNK),
    "one token": ({"t": 1, "h": 1, "d": 64}, ONE_CHUNK),
    "degree 4": ({"t": 131, "h": 1, "d": 64, "degree": 4}, dataclasses.replace(ONE_CHUNK, attend=NARROW.attend)),
}


def run(op: Op, problem: Any, config: Any) -> Mapping[str, HostStats]:
    outputs = {name: poison(buffer.shape, buffer.dtype) for name, buffer in op.outputs(problem).items()}
    return HostPlan(op, problem, config).run({**op.sample(problem, 0), **outputs})


def counted(stats: HostStats) -> Counts:
    return Counts(*(getattr(stats, field.name) for field in dataclasses.fields(Counts)))


def assert_predicted(op: Op, problem: Any, config: Any) -> dict[str, Counts]:
    stats = run(op, problem, config)
    predicted = {s.kernel.name: sum(s.kernel.counts(s.problem, s.config).values(), Counts()) for s in op.stages(problem, config)}
    assert predicted == {name: counted(one) for name, one in stats.items()}
    return predicted


@pytest.mark.parametrize("case", CASES)
def test_power_retention(case: str) -> None:
    keywords, config = CASES[case]
    problem = example(**keywords)
    predicted = assert_predicted(power_retention, problem, config)
    assert predicted["power_attend"].mma > 0 and predicted["power_attend"].cp_async_bytes > 0
    if config.chunk:
        assert predicted["power_scan"].ldmatrix > 0 and predicted["power_scan"].cp_async_sectors > 0
    assert all(n.ldmatrix_conflicts == 0 for n in predicted.values())


def test_power_retention_by_wgmma() -> None:
    attended = attend.Config(keys=32, m=2, warps=8, stages=3, blocks=1, mma="wgmma")
    config = Config(256, scan.Config(tokens=64, stages=4, warps=4, columns=64, segments=2, tiles=2, mma="wgmma"), attended)
    predicted = assert_predicted(power_retention, example(t=773, h=1, hq=2, d=64), config)
    assert predicted["power_scan_wgmma"].wgmma > 0 and predicted["power_attend"].wgmma > 0
    assert all(n.mma == n.ldmatrix_conflicts == 0 for n in predicted.values())


@pytest.mark.parametrize("config", [NARROW, ONE_CHUNK], ids=["chunks", "one chunk"])
def test_bank_conflicts_too(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernel with tiles that have no swizzle: it computes the same, and meets banks again and again."""
    monkeypatch.setattr(attend, "SmemLayout", lambda *sizes, stages=1: SmemLayout(*sizes, swizzle=None, stages=stages))
    plain = dataclasses.replace(attend.power_attend)
    problem = example(t=263, h=1, d=64)

    def stages(p: Any, c: Any) -> list[Any]:
        return [dataclasses.replace(s, kernel=plain if s.kernel.name == plain.name else s.kernel) for s in power_retention.stages(p, c)]

    config = dataclasses.replace(config, scan=dataclasses.replace(config.scan, segments=1), attend=NARROW.attend)
    found = assert_predicted(dataclasses.replace(power_retention, stages=stages), problem, config)["power_attend"]
    # Eight rows of 128 bytes begin in one bank: 7 passes more for each of the 4 matrices of an ldmatrix.
    assert found.ldmatrix_conflicts == 28 * found.ldmatrix > 0


def test_softmax_moves_nothing_that_is_counted() -> None:
    op = find_op(f"{Path(__file__).parents[2] / 'examples/softmax/softmax.py'}:op")
    for values in ((32, 2, 1, 0), (128, 1, 1, 4)):
        assert assert_predicted(op, op.example(m=5, n=63), op.config(*values)) == {"softmax": Counts()}


def test_rows_that_do_not_exist_and_odd_strides() -> None:
    copy = TiledCopy(cp_async(16), SmemLayout(DType.bfloat16, 64, 64), 128)
    # A warp copies 4 rows of 128 bytes.
    assert counts.copies(copy, 64, 128) == Counts(0, 0, 0, 16, 256, 64 * 128)
    assert counts.copies(copy, 5, 128) == Counts(0, 0, 0, 2, 20, 5 * 128)
    assert counts.copies(copy, 0, 128) == Counts()
    # Every other row begins in the middle of a sector, and touches one more.
    assert counts.copies(copy, 64, 144).cp_async_sectors == 64 * 4 + 32
    assert counts.vectors(33) == Counts(0, 0, 0, 2, 17, 33 * 16)


@pytest.mark.parametrize(("columns", "swizzle", "conflicts"), [(64, "auto", 0), (64, None, 28), (32, None, 12), (24, None, 0)])
def test_conflicts_of_one_load(columns: int, swizzle: Literal["auto"] | None, conflicts: int) -> None:
    tile = SmemLayout(DType.bfloat16, 32, columns, swizzle=swizzle)
    load = LoadMatrix(tile, ldmatrix(4), 32, lambda lane: (lane, 0))
    assert counts.loads(load, 3) == Counts(ldmatrix=3, ldmatrix_conflicts=3 * conflicts)


def test_what_the_gates_have_forgotten_is_not_counted_on() -> None:
    problem = example(t=389, h=1, d=32)

    def sample(p: Any, seed: int) -> dict[str, Any]:
        inputs = power_retention.sample(p, seed)
        return inputs | {"log_g": inputs["log_g"] - np.float32(3)}

    stats = run(dataclasses.replace(power_retention, sample=sample), problem, NARROW)["power_attend"]
    stage = next(s for s in power_retention.stages(problem, NARROW) if s.kernel.name == "power_attend")
    bound = sum(stage.kernel.counts(stage.problem, stage.config).values(), Counts())
    assert 0 < stats.mma < 0.7 * bound.mma and 0 < stats.cp_async_bytes < 0.7 * bound.cp_async_bytes


def test_a_kernel_that_does_not_say_is_asked_to() -> None:
    silent: Kernel = dataclasses.replace(scan.power_scan, traffic=None)
    stage = next(s for s in power_retention.stages(example(t=389, h=1, d=32), NARROW) if s.kernel is scan.power_scan)
    with pytest.raises(ArgumentError, match="kernel power_scan: nothing says how often .*CopyK"):
        silent.counts(stage.problem, stage.config)
