"""The example of several launches: any length, every shape of config, on the host target; and that it compiles for what it claims."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from vidrial.build.cubins import cubin_of
from vidrial.device import Device
from vidrial.errors import ArgumentError, ArgumentTypeError
from vidrial.host.check import assert_op_correct
from vidrial.host.plan import HostPlan, poison
from vidrial.spec.registry import resolve

SCAN = Path(__file__).parents[2] / "examples/scan/scan.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    op = resolve(f"{SCAN}:op")
    return sys.modules[op.problem.__module__]


def run(example: ModuleType, problem: object, config: object, x: np.ndarray) -> np.ndarray:
    outputs = {"y": poison(x.shape, example.vd.DType.float32)}
    HostPlan(example.op, problem, config).run({"x": x, **outputs})
    return outputs["y"]


@pytest.mark.parametrize("block", [512, 4096])
@pytest.mark.parametrize("threads", [64, 512])
def test_values(example: ModuleType, block: int, threads: int) -> None:
    """Around the ends of blocks; the last one has more blocks of 512 than 64 threads, so that their sums are carried."""
    part = example.Threads(threads)
    config = example.Config(block, part, part, part)
    for t in (1, 31, 511, 512, 513, 4097, 33_333):
        problem = example.example(b=2, t=t)
        inputs = example.op.sample(problem, seed=t)
        y = run(example, problem, config, inputs["x"])
        found = example.op.check(problem, inputs, {"y": y}, example.op.reference(problem, inputs))
        assert found.ok, f"t={t}: {found}"


def test_sums_of_integers_are_exact(example: ModuleType) -> None:
    x = np.random.default_rng(0).integers(-8, 9, (3, 5003)).astype(np.float32)
    np.testing.assert_array_equal(run(example, example.example(b=3, t=5003), example.Config(), x), np.cumsum(x, axis=1))


def test_neither_races_nor_memory_errors(example: ModuleType) -> None:
    assert_op_correct(example.op, [example.example(b=2, t=1025)], configs=1)


def test_check_refuses_what_nobody_wrote_and_a_block_that_lacks_its_offset(example: ModuleType) -> None:
    problem = example.example(b=2, t=2049)
    inputs = example.op.sample(problem, 0)
    expected = example.op.reference(problem, inputs)
    exact = expected["y"].astype(np.float32)
    assert example.op.check(problem, inputs, {"y": exact}, expected).ok
    unwritten, without = exact.copy(), exact.copy()
    unwritten[1, 2048] = np.nan
    without[1, 1024:] -= exact[1, 1023]
    for wrong in (unwritten, without):
        assert not example.op.check(problem, inputs, {"y": wrong}, expected).ok


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_compiles_without_spills(example: ModuleType, arch: str) -> None:
    for stage in example.op.stages(example.example(t=100_000), example.Config()):
        resources = cubin_of(stage.kernel, stage.problem, stage.config, arch).resources
        assert (resources.spill_stores, resources.spill_loads) == (0, 0), stage.kernel.name
        assert 8 <= resources.registers <= 40, stage.kernel.name


def test_lengths_compile_nothing(example: ModuleType) -> None:
    config = example.Config()
    binaries = [[s.binary for s in example.op.stages(example.example(t=t), config)] for t in (1, 100_000)]
    assert binaries[0] == binaries[1]


def test_counted_bytes_are_those_of_the_cost(example: ModuleType) -> None:
    problem, config = example.example(b=3, t=4096), example.Config()
    arrays = {**example.op.sample(problem, 0), "y": poison((3, 4096), example.vd.DType.float32)}
    stats = HostPlan(example.op, problem, config, "accesses").run(arrays)
    for stage in example.op.stages(problem, config):
        counted = stats[stage.kernel.name].read_bytes + stats[stage.kernel.name].written_bytes
        assert counted == pytest.approx(stage.kernel.cost(stage.problem, stage.config, Device.of("h200")).bytes, abs=64), stage.kernel.name


def test_the_function_takes_numpy_and_refuses_the_rest(example: ModuleType) -> None:
    x = np.random.default_rng(0).integers(-8, 9, (3, 257)).astype(np.float32)
    np.testing.assert_array_equal(example.scan(x), np.cumsum(x, axis=1))
    np.testing.assert_array_equal(example.scan(x[:, ::2]), np.cumsum(x[:, ::2], axis=1))
    assert example.scan(x[:, :0]).shape == (3, 0)
    with pytest.raises(ArgumentError, match=r"x has shape \[3\]; accepted: a matrix"):
        example.scan(x[:, 0])
    with pytest.raises(ArgumentTypeError, match="x is float16; accepted: float32"):
        example.scan(x.astype(np.float16))


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_what_is_not_finite_reaches_no_earlier_element(example: ModuleType, value: float) -> None:
    x = np.ones((2, 1200), np.float32)
    x[1, 700] = value
    part = example.Threads(64)
    y = run(example, example.example(b=2, t=1200), example.Config(512, part, part, part), x)
    np.testing.assert_array_equal(y[0], np.arange(1, 1201))
    np.testing.assert_array_equal(y[1, :700], np.arange(1, 701))
    assert not np.isfinite(y[1, 700:]).any()


def test_rows_that_are_not_aligned_are_copied(example: ModuleType) -> None:
    x = np.arange(130, dtype=np.float32)[1:].reshape(1, 129)
    np.testing.assert_array_equal(example.scan(x), np.cumsum(x, axis=1))
