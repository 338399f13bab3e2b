from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from vidrial.device import Device
from vidrial.spec.registry import resolve

SOFTMAX = Path(__file__).parent.parent.parent / "examples/softmax/softmax.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return sys.modules[resolve(f"{SOFTMAX}:op").problem.__module__]


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (1000, 63), (33, 1000), (129, 4097), (3, 100003)])
def test_against_float64(example: ModuleType, shape: tuple[int, int]) -> None:
    cupy = pytest.importorskip("cupy")
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32) * 4
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    y = example.softmax(cupy.asarray(x))
    np.testing.assert_allclose(y.get(), e / e.sum(-1, keepdims=True), rtol=2e-5)


@pytest.mark.parametrize("n", [63, 1000, 4097])
def test_every_tenth_legal_config(example: ModuleType, n: int) -> None:
    cupy = pytest.importorskip("cupy")
    from vidrial.runtime.plan import CudaPlan

    for dtype in ("float32", "bfloat16"):
        problem = example.example(m=37, n=n, dtype=dtype)
        inputs = example.op.sample(problem, 3)
        expected, x = example.op.reference(problem, inputs), cupy.asarray(inputs["x"])
        for config in list(example.op.space(problem, Device.current()))[::10]:
            y = cupy.full(x.shape, 0xFFFF, cupy.uint16) if dtype == "bfloat16" else cupy.full(x.shape, cupy.nan, cupy.float32)
            CudaPlan(example.op, problem, config, 0).run({"x": x.data.ptr, "y": y.data.ptr}, 0, 0)
            found = example.op.check(problem, inputs, {"y": y.get()}, expected)
            assert found.ok, f"{config}: {found}"


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_beside_torch(example: ModuleType, name: str) -> None:
    torch = pytest.importorskip("torch")
    x = torch.randn(257, 1001, device="cuda").to(getattr(torch, name))
    y = example.softmax(x)
    assert y.dtype is x.dtype
    assert y.device == x.device
    torch.testing.assert_close(y.double(), torch.softmax(x.double(), -1), rtol=2e-5 if name == "float32" else 2**-8 + 1e-5, atol=0)
