"""TMA, roles and schedules on a GPU: the op of tests/tma_op.py beside its reference, on two streams at once, and what its maps cost the host."""

from __future__ import annotations

import time

import pytest
from tma_op import Config, example, op

from vidrial.device import HOPPER, Device
from vidrial.runtime.plan import CudaPlan
from vidrial.runtime.tensor_map import encode

CONFIGS = [
    Config(rows, stages, consumers, kind)
    for rows, consumers in ((64, 1), (128, 2))
    for stages, kind in ((2, "one"), (1, "static"), (3, "dynamic"))
]


@pytest.fixture(autouse=True)
def hopper() -> None:
    if Device.current().arch != HOPPER:
        pytest.skip(f"TMA and roles are of {HOPPER}")


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_right_at_odd_lengths(config: Config) -> None:
    import cupy

    for t, facts in ((1, {}), (129, {"pad": 8}), (1021, {"d": 80, "h": 1}), (4099, {"dtype": "float16", "d": 64, "b": 1})):
        problem = example(t=t, **facts)
        inputs = op.sample(problem, 0)
        plan, x = CudaPlan(op, problem, config, 0), cupy.asarray(inputs["x"])
        workspace = cupy.full(max(plan.workspace.bytes, 1), 255, cupy.uint8)
        expected = op.reference(problem, inputs)
        for _ in range(3):
            y = cupy.full((problem.b, t, problem.h), cupy.nan, cupy.float32)
            plan.run({"x": x.data.ptr, "y": y.data.ptr}, workspace.data.ptr, 0)
            assert op.check(problem, inputs, {"y": y.get()}, expected).ok, problem


def test_dynamic_schedules_on_two_streams() -> None:
    """One plan, launches on both streams at once: each has a counter of its own."""
    import cupy

    problem = example(t=20011, h=8)
    inputs = op.sample(problem, 0)
    plan, x, expected = CudaPlan(op, problem, Config(kind="dynamic"), 0), cupy.asarray(inputs["x"]), op.reference(problem, inputs)
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    outputs = [cupy.full((2, 20011, 8), cupy.nan, cupy.float32) for _ in range(16)]
    counters = [cupy.zeros(plan.workspace.bytes, cupy.uint8) for _ in outputs]
    cupy.cuda.Device().synchronize()
    for i, (y, counter) in enumerate(zip(outputs, counters, strict=True)):
        plan.run({"x": x.data.ptr, "y": y.data.ptr}, counter.data.ptr, streams[i % 2].ptr)
    cupy.cuda.Device().synchronize()
    assert all(op.check(problem, inputs, {"y": y.get()}, expected).ok for y in outputs)


def test_what_a_map_costs_the_host() -> None:
    """Printed, with a bound that only a map encoded at each launch would miss."""
    import cupy

    problem = example(t=64)
    plan = CudaPlan(op, problem, Config(), 0)
    x, y = cupy.asarray(op.sample(problem, 0)["x"]), cupy.empty((2, 64, 3), cupy.float32)
    tensor = plan._launches[0].maps[0].map
    start = time.perf_counter()
    for _ in range(1000):
        encode(tensor, x.data.ptr)
    encoding = (time.perf_counter() - start) * 1e3
    pointers, count = {"x": x.data.ptr, "y": y.data.ptr}, 2000
    cupy.cuda.Device().synchronize()
    start = time.perf_counter()
    for _ in range(count):
        plan.run(pointers, 0, 0)
    launching = (time.perf_counter() - start) / count * 1e6
    print(f"a map takes {encoding:.2f} us to encode; a launch with one known takes {launching:.2f} us of the host")
    assert len(plan._launches[0].maps[0]._encoded) == 1 and launching < 100
