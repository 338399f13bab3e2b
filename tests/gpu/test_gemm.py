"""The example GEMM on a GPU: tails and alignments of every kind, both instructions, TMA, the public function."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from vidrial.device import HOPPER, Device
from vidrial.spec.registry import resolve

GEMM = Path(__file__).parent.parent.parent / "examples/gemm/gemm.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return sys.modules[resolve(f"{GEMM}:op").problem.__module__]


@pytest.mark.parametrize(
    "size",
    [
        (1, 1, 1),
        (70, 130, 72),
        (257, 2050, 136),
        (515, 260, 1004),
        (300, 2050, 770),
        (129, 131, 4097),
        (1024, 1024, 1024),
        (2049, 4100, 64),
    ],
    ids=str,
)
def test_every_sixteenth_legal_config(example: ModuleType, size: tuple[int, int, int]) -> None:
    cupy = pytest.importorskip("cupy")
    from vidrial.runtime.plan import CudaPlan

    m, n, k = size
    for dtype, gelu in (("bfloat16", True), ("float16", False)):
        problem = example.example(m=m, n=n, k=k, dtype=dtype, gelu=gelu)
        inputs = example.op.sample(problem, 0)
        exact = example.op.reference(problem, inputs)
        arrays = {name: cupy.asarray(x) for name, x in inputs.items()}
        pointers = {name: x.data.ptr for name, x in arrays.items()}
        configs = [c for by in ("threads", "tma") for c in list(example.op.space(problem, Device.current(), fixed={"by": by}))[::16]]
        assert len({c.by for c in configs}) == 1 + (k % 8 == 0 and Device.current().arch == HOPPER)
        for config in configs:
            c = cupy.full((m, n), 0xFFFF, cupy.uint16) if dtype == "bfloat16" else cupy.full((m, n), cupy.nan, cupy.float16)
            CudaPlan(example.op, problem, config, 0).run({**pointers, "c": c.data.ptr}, 0, 0)
            found = example.op.check(problem, inputs, {"c": c.get()}, exact)
            assert found.ok, f"{config}: {found}"


def test_torch_agrees(example: ModuleType) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    generator = torch.Generator("cuda").manual_seed(0)
    for m, n, k in ((64, 3000, 512), (1001, 77, 333)):
        a, b = (torch.randn(s, device="cuda", dtype=torch.bfloat16, generator=generator) for s in ((m, k), (n, k)))
        bias = torch.randn(n, device="cuda", dtype=torch.bfloat16, generator=generator)
        y = example.linear(a, b, bias, gelu=True)
        exact = torch.nn.functional.gelu(a.double() @ b.double().T + bias.double(), approximate="tanh")
        assert type(y) is torch.Tensor and y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=2e-2)
