"""The example kernel: any m and n, every shape of config, on the host target; and that it compiles for what it claims."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from vidrial.build.cubins import cubin_of
from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.errors import ArgumentError, ArgumentTypeError, ConfigError
from vidrial.host.plan import HostPlan, poison
from vidrial.spec.registry import resolve

SOFTMAX = Path(__file__).parents[2] / "examples/softmax/softmax.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    op = resolve(f"{SOFTMAX}:op")
    return sys.modules[op.problem.__module__]


def run(example: ModuleType, problem: object, config: object, x: np.ndarray) -> np.ndarray:
    outputs = {"y": poison((problem.m, problem.n), problem.dtype)}  # type: ignore[attr-defined]
    HostPlan(example.op, problem, config).run({"x": x, **outputs})
    return outputs["y"]


# row_threads, rows, vector, keep: part of a warp, a warp, several warps; row read twice, or kept.
CONFIGS = [(dtype, values) for dtype in ("float32", "bfloat16") for values in ((8, 4, 1, 0), (32, 2, 2, 8), (128, 1, 4, 0), (256, 2, 1, 0))]


@pytest.mark.parametrize(("dtype", "values"), [*CONFIGS, ("bfloat16", (128, 2, 8, 8))], ids=str)
def test_every_size_that_is_legal(example: ModuleType, dtype: str, values: tuple[int, ...]) -> None:
    config, checked = example.Config(*values), 0
    for m, n in ((1, 1), (5, 7), (37, 63), (9, 96), (2, 500), (3, 1000), (2, 4097)):
        problem = example.example(m=m, n=n, dtype=dtype)
        if example.op.reject(problem, config, Device.of("h200")) is not None:
            continue
        inputs = example.op.sample(problem, seed=n)
        y = run(example, problem, config, inputs["x"])
        found = example.op.check(problem, inputs, {"y": y}, example.op.reference(problem, inputs))
        assert found.ok, f"m={m} n={n}: {found}"
        checked += 1
    assert checked >= (7 if values[2:] == (1, 0) else 2)


def test_the_predicted_config_takes_any_n(example: ModuleType) -> None:
    for n in range(1, 20):
        problem = example.example(m=3, n=n)
        assert example.op.predicted(problem, Device.of("h200")).vector in {v for v in (1, 2, 4) if n % v == 0}


def test_check_refuses_what_nobody_wrote_and_a_wrong_element(example: ModuleType) -> None:
    problem = example.example(m=4, n=63)
    inputs = example.op.sample(problem, 0)
    expected = example.op.reference(problem, inputs)
    exact = expected["y"].astype(np.float32)
    assert example.op.check(problem, inputs, {"y": exact}, expected).ok
    for wrong in (np.nan, exact[3, 62] * 1.001):
        y = exact.copy()
        y[3, 62] = wrong
        assert not example.op.check(problem, inputs, {"y": y}, expected).ok


def test_extremes(example: ModuleType) -> None:
    rows = [[3e38, -3e38, 0.0, 3e38], [-np.inf, 1.0, 1.0, -np.inf], [-np.inf] * 4, [np.nan, 0.0, 0.0, 0.0], [-1e30, -1e30, -1e30, -1e30]]
    y = run(example, example.example(m=5, n=4), example.Config(32, 1, 2, 1), np.array(rows, np.float32))
    np.testing.assert_allclose(y[[0, 1, 4]], [[0.5, 0, 0, 0.5], [0, 0.5, 0.5, 0], [0.25] * 4], rtol=1e-6)
    assert np.isnan(y[2:4]).all()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_compiles_without_spills(example: ModuleType, arch: str) -> None:
    for dtype, config in (("float32", example.Config(128, 2, 4, 8)), ("bfloat16", example.Config(512, 1, 1, 0))):
        cubin = cubin_of(example.kernel, example.example(n=1000, dtype=dtype), config, arch)
        assert (cubin.resources.spill_stores, cubin.resources.spill_loads) == (0, 0)
        assert 8 <= cubin.resources.registers <= 128


def test_rules_say_why(example: ModuleType) -> None:
    device, n1000 = Device.of("h200"), example.example(n=1000)
    assert "at most 16 bytes" in example.op.reject(n1000, example.Config(128, 1, 8, 0), device)
    assert "must divide n=1001" in example.op.reject(example.example(n=1001), example.Config(128, 1, 2, 0), device)
    assert "hold a row of n=1000" in example.op.reject(n1000, example.Config(128, 1, 1, 4), device)
    assert "multiple of 32" in example.op.reject(n1000, example.Config(8, 1, 1, 0), device)
    with pytest.raises(ConfigError, match="float16 is not served"):
        example.op.check_config(example.example(n=8, dtype="float16"), example.Config(), device)


@pytest.mark.parametrize("shape", [(3, 63), (7, 8), (1, 1)])
def test_public_function(example: ModuleType, shape: tuple[int, int]) -> None:
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    expected = np.exp(x.astype(float)) / np.exp(x.astype(float)).sum(-1, keepdims=True)
    np.testing.assert_allclose(example.softmax(x), expected, rtol=1e-5)
    np.testing.assert_allclose(example.softmax(np.asfortranarray(x)), expected, rtol=1e-5)
    padded = np.zeros((shape[0], shape[1] + 1), np.float32)
    padded[:, 1:] = x
    np.testing.assert_allclose(example.softmax(padded[:, 1:]), expected, rtol=1e-5)


def test_public_function_refuses(example: ModuleType) -> None:
    assert example.softmax(np.zeros((0, 5), np.float32)).shape == (0, 5)
    assert example.softmax(np.zeros((5, 0), np.float32)).shape == (5, 0)
    with pytest.raises(ArgumentError, match=r"x has shape \[2, 3, 4\]"):
        example.softmax(np.zeros((2, 3, 4), np.float32))
    with pytest.raises(ArgumentTypeError, match="float64"):
        example.softmax(np.zeros((2, 3)))
    with pytest.raises(ArgumentTypeError, match="list is not an array"):
        example.softmax([[1.0]])


def test_torch_tensors_on_the_cpu(example: ModuleType) -> None:
    torch = pytest.importorskip("torch")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-8)):
        x = torch.randn(5, 77, dtype=torch.float32).to(dtype)
        y = example.softmax(x)
        assert y.dtype is dtype
        torch.testing.assert_close(y.double(), torch.softmax(x.double(), -1), rtol=tolerance + 1e-5, atol=0)


def test_bits_of_bfloat16_round_as_numpy_rounds_float16() -> None:
    # Halfway cases go to even, in both: the same rule on other bits.
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -0.0, np.inf], np.float32)
    assert list(DType.bfloat16.widen(DType.bfloat16.round(x))) == [1.0, 1 + 2**-6, 1 + 2**-7, 0.0, np.inf]
