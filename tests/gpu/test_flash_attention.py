"""Flash attention on a GPU: both paths over their space, every layout, stream and input that a caller may come with, against float64."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vidrial.build.cubins import build_many
from vidrial.build.nvrtc import Cubin
from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.errors import ArgumentTypeError, UnsupportedError
from vidrial.kernels.flash_attention import flash_attention
from vidrial.kernels.flash_attention.op import Config, check, example, op, reference, sample
from vidrial.kernels.flash_attention.problem import Problem
from vidrial.runtime.plan import CudaPlan
from vidrial.spec.choices import describe

Arrays = dict[str, np.ndarray]
GUARD = 4096  # bytes before and behind every array: all bits set, so NaN to whoever reads them
PATHS = ("sm80", "sm90")

GRID: dict[str, dict[str, Any]] = {
    "d = 64": {"t": 1021, "h": 2, "d": 64},
    "d = 128, causal": {"t": 777, "h": 2, "d": 128, "causal": True},
    "d = 64, causal, grouped by 3, fp16": {"t": 601, "h": 1, "hq": 3, "d": 64, "causal": True, "dtype": "float16"},
    "d = 128, grouped by 4, more keys": {"t": 1025, "tq": 257, "h": 1, "hq": 4, "d": 128, "causal": True},
    "d = 96, window": {"t": 901, "h": 1, "d": 96, "left": 200, "right": 31},
    "d = 192, e = 128, causal": {"t": 515, "h": 2, "d": 192, "e": 128, "causal": True},
    "d = 256": {"t": 389, "h": 1, "d": 256},
    "d = 32, cap, causal, window": {"t": 611, "h": 1, "hq": 2, "d": 32, "causal": True, "left": 100, "softcap": 10.0},
    "one query": {"t": 2049, "tq": 1, "h": 2, "hq": 16, "d": 128},
    "rows without keys": {"t": 100, "tq": 401, "h": 1, "d": 64, "causal": True},
}


def path_or_skip(path: str) -> str:
    if path == "sm90" and Device.current().arch != "sm_90a":
        pytest.skip("TMA and wgmma are instructions of sm_90a")
    return path


def run_guarded(p: Problem, config: Config, inputs: Arrays) -> tuple[Arrays, bool]:
    """The outputs of one config, and whether every guard and input is as it was; outputs and workspace start as NaN."""
    import cupy

    plan = CudaPlan(op, p, config, 0)
    outputs = op.outputs(p)
    sizes = {name: array.nbytes for name, array in inputs.items()} | {
        name: int(np.prod(buffer.shape)) * buffer.dtype.bytes for name, buffer in outputs.items()
    }
    sizes["workspace"] = plan.workspace.bytes
    whole = {name: cupy.full(size + 2 * GUARD, 0xFF, cupy.uint8) for name, size in sizes.items()}
    inner = {name: whole[name][GUARD : GUARD + size] for name, size in sizes.items()}
    for name, array in inputs.items():
        inner[name].set(np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8))
    pointers = {name: array.data.ptr for name, array in inner.items() if name != "workspace"}
    plan.run(pointers, inner["workspace"].data.ptr, cupy.cuda.get_current_stream().ptr)
    cupy.cuda.get_current_stream().synchronize()
    intact = all((whole[n][:GUARD].get() == 0xFF).all() and (whole[n][GUARD + size :].get() == 0xFF).all() for n, size in sizes.items())
    intact &= all(inner[name].get().tobytes() == np.ascontiguousarray(array).tobytes() for name, array in inputs.items())
    kinds = {DType.bfloat16: np.uint16, DType.float16: np.float16, DType.float32: np.float32}
    return {name: inner[name].get().view(kinds[buffer.dtype]).reshape(buffer.shape) for name, buffer in outputs.items()}, intact


def compile_all(asked: list[tuple[Problem, Config]]) -> None:
    """All kernels at once, on all cores."""
    sources = {}
    for p, config in asked:
        for stage in op.stages(p, config):
            source = stage.kernel.source(stage.problem, stage.config)
            sources[source.text] = source, describe(stage.config)
    for _, cubin in build_many(sources, Device.current().arch, jobs=os.cpu_count()):
        assert isinstance(cubin, Cubin), str(cubin)


@pytest.mark.parametrize("path", PATHS)
def test_configs_over_the_whole_space(path: str) -> None:
    device, fixed = Device.current(), {"path": path_or_skip(path)}
    asked = {}
    for name, keywords in GRID.items():
        p = example(**keywords)
        legal = [candidate.config for candidate in op.space(p, device, fixed=fixed).legal]
        asked[name] = p, [*legal[:3], *legal[3 :: max(1, len(legal) // 6)]]
    compile_all([(p, config) for p, configs in asked.values() for config in configs])
    wrong = []
    for name, (p, configs) in asked.items():
        inputs = sample(p, 1)
        exact = reference(p, inputs)
        for config in configs:
            results, intact = run_guarded(p, config, inputs)
            found = check(p, inputs, results, exact)
            if not found.ok or not intact:
                wrong.append(f"{name}: {describe(config)}: {found}, guards {'intact' if intact else 'touched'}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("t", [1, 2, 7, 63, 64, 65, 127, 129, 255, 257, 383, 513])
def test_odd_lengths(t: int, causal: bool, path: str) -> None:
    device, fixed = Device.current(), {"path": path_or_skip(path)}
    # The same kernels for all lengths.
    config = op.predicted(example(t=1000, h=2, d=64, causal=causal), device, fixed)
    for tq in {t, 1, 70}:
        p = example(t=t, tq=tq, b=2, h=2, d=64, causal=causal)
        inputs = sample(p, t)
        if op.reject(p, config, device) is None:
            results, intact = run_guarded(p, config, inputs)
            found = check(p, inputs, results, reference(p, inputs))
            assert intact and found.ok, f"tq={tq}: {found}"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["peaked", "growing", "heavy tails", "all alike", "values far from 0"])
def test_inputs_of_every_kind(kind: str, path: str) -> None:
    p, fixed = example(t=1021, h=2, d=128, causal=True), {"path": path_or_skip(path)}
    inputs = {name: p.dtype.widen(x) for name, x in sample(p, 2).items()}
    if kind in ("peaked", "growing"):
        inputs["q"] *= 6.0
    if kind == "growing":
        inputs["k"] *= np.linspace(30.0, 0.1, p.tk)[None, :, None, None]
    if kind == "heavy tails":
        inputs = {name: x * np.exp(np.random.default_rng(3).standard_normal(x.shape)) for name, x in inputs.items()}
    if kind == "all alike":
        inputs["k"][:] = inputs["k"][:, :1]
    if kind == "values far from 0":
        inputs["v"] += 1000.0
    rounded = {name: p.dtype.round(x) for name, x in inputs.items()}
    results, intact = run_guarded(p, op.predicted(p, Device.current(), fixed), rounded)
    found = check(p, rounded, results, reference(p, rounded))
    assert intact and found.ok, found


@pytest.mark.parametrize("path", PATHS)
def test_nan_stays_in_its_row_and_its_head(path: str) -> None:
    p, fixed = example(t=333, h=2, hq=4, d=64, causal=True), {"path": path_or_skip(path)}
    inputs = sample(p, 8)
    exact = reference(p, sample(p, 8))
    inputs["q"][0, 13, 1], inputs["k"][0, 40, 1] = 0x7FFF, 0x7FFF
    results, _ = run_guarded(p, op.predicted(p, Device.current(), fixed), inputs)
    wrong = np.zeros((333, 4), bool)
    wrong[13, 1], wrong[40:, 2:] = True, True
    y = p.dtype.widen(results["y"])[0]
    assert np.array_equal(np.isnan(y).all(-1), wrong) and np.array_equal(np.isnan(y).any(-1), wrong)
    assert np.array_equal(np.isnan(results["lse"][0]), wrong.T)
    held = {
        "y": np.where(wrong[None, ..., None], p.dtype.round(exact["y"]), results["y"]),
        "lse": np.where(wrong.T[None], exact["lse"].astype(np.float32), results["lse"]),
    }
    assert check(p, inputs, held, exact).ok


def to_torch(x: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(x.view(np.int16)).cuda().view(torch.bfloat16) if x.dtype == np.uint16 else torch.from_numpy(x).cuda()


def from_torch(y: Any, lse: Any) -> Arrays:
    import torch

    bits = y.contiguous().view(torch.int16).cpu().numpy()
    return {"y": bits.view(np.uint16 if y.dtype == torch.bfloat16 else np.float16), "lse": lse.cpu().numpy()}


def torch_inputs(p: Problem, seed: int = 5) -> tuple[Arrays, list[Any]]:
    inputs = sample(p, seed)
    return inputs, [to_torch(inputs[name]) for name in "qkv"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window": (100, 7)}, {"softcap": 5.0}, {"scale": 0.5, "causal": True}],
    ids=str,
)
def test_torch(options: dict[str, Any], dtype: str) -> None:
    torch = pytest.importorskip("torch")
    left, right = options.get("window", (None, None))
    facts = {name: value for name, value in options.items() if name != "window"}
    p = example(t=1001, b=2, h=2, hq=4, d=64, dtype=dtype, left=left, right=right, **facts)
    inputs, tensors = torch_inputs(p)
    y, lse = flash_attention(*tensors, return_lse=True, **options)
    assert isinstance(y, torch.Tensor) and y.dtype == tensors[0].dtype and y.device == tensors[0].device and lse.dtype == torch.float32
    found = check(p, inputs, from_torch(y, lse), reference(p, inputs))
    assert found.ok, found
    assert torch.equal(flash_attention(*tensors, **options), y)


def test_cupy() -> None:
    import cupy

    p = example(t=1001, h=2, d=64, dtype="float16", causal=True)
    inputs = sample(p, 6)
    arrays = [cupy.asarray(inputs[name]) for name in "qkv"]
    y, lse = flash_attention(*arrays, causal=True, return_lse=True)
    assert isinstance(y, cupy.ndarray) and y.dtype == np.float16
    assert check(p, inputs, {"y": y.get(), "lse": lse.get()}, reference(p, inputs)).ok
    with cupy.cuda.Stream(non_blocking=True) as stream:
        again = flash_attention(*arrays, causal=True)
        stream.synchronize()
    assert (again == y).all()


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "time first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "padded rows": lambda x: _inside(x, (0, 0, 0, 8), 0),
    "padded heads and time": lambda x: _inside(x, (0, 13, 3, 0), 0),
    "rows that are not aligned": lambda x: _inside(x, (0, 0, 0, 1), 0),
    "misaligned": lambda x: _inside(x, (1, 0, 0, 0), 1),
    "features first": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
}


def _inside(x: Any, extra: tuple[int, ...], offset: int) -> Any:
    """x in the middle of NaN: `extra` more along each axis, `offset` elements later."""
    import torch

    shape = [n + m for n, m in zip(x.shape, extra, strict=True)]
    whole = torch.full((int(np.prod(shape)) + offset,), float("nan"), dtype=x.dtype, device=x.device)[offset:].view(shape)
    view = whole[tuple(slice(0, n) for n in x.shape)]
    view.copy_(x)
    return view


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_no_bit(layout: str) -> None:
    torch = pytest.importorskip("torch")
    p = example(t=517, b=2, h=2, hq=4, d=64, causal=True)
    inputs, tensors = torch_inputs(p)
    y, lse = flash_attention(*tensors, causal=True, return_lse=True)
    moved = [LAYOUTS[layout](x) for x in tensors]
    assert any(a.stride() != b.stride() or a.data_ptr() % 16 for a, b in zip(moved, tensors, strict=True))
    assert torch.equal(flash_attention(*moved, causal=True), y)
    assert check(p, inputs, from_torch(y, lse), reference(p, inputs)).ok


def test_nothing_to_do() -> None:
    torch = pytest.importorskip("torch")
    for shape in ((2, 0, 3, 32), (0, 7, 3, 32)):
        x = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        y, lse = flash_attention(x, x, x, return_lse=True)
        assert y.shape == shape and y.is_cuda and lse.shape == (shape[0], shape[2], shape[1])
    q, k = torch.ones((2, 5, 3, 32), dtype=torch.bfloat16, device="cuda"), torch.empty((2, 0, 3, 32), dtype=torch.bfloat16, device="cuda")
    y, lse = flash_attention(q, k, k, return_lse=True)
    assert bool((y == 0).all()) and bool((lse == float("-inf")).all())


def test_many_heads() -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.randn((70000, 3, 1, 32), dtype=torch.bfloat16, device="cuda") for _ in range(3))
    y = flash_attention(q, k, v, causal=True)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x[[0, 40000, 69999]].double().transpose(1, 2) for x in (q, k, v)), is_causal=True
    )
    assert float((y[[0, 40000, 69999]].double() - wanted.transpose(1, 2)).abs().max()) < 0.03


def test_the_callers_stream() -> None:
    torch = pytest.importorskip("torch")
    _, tensors = torch_inputs(example(t=1001, h=2, d=64))
    expected = flash_attention(*tensors)
    late = [torch.full_like(x, float("nan")) for x in tensors]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(500_000_000)
        for x, source in zip(late, tensors, strict=True):
            x.copy_(source)
        y = flash_attention(*late)
        assert not side.query(), "the call waited for its inputs"
        for x in late:
            x.fill_(float("nan"))
    side.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("facts", [{"t": 1021, "h": 4, "d": 64}, {"t": 4099, "tq": 3, "h": 2, "hq": 8, "d": 128}], ids=["tiles", "split"])
def test_ten_thousand_calls_on_two_streams_repeat_to_the_bit(facts: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    jobs = [torch_inputs(example(**facts), seed)[1] for seed in (1, 2)]
    expected = [flash_attention(*job) for job in jobs]
    torch.cuda.synchronize()
    streams, wrong = [torch.cuda.Stream(), torch.cuda.Stream()], torch.zeros(2, dtype=torch.int64, device="cuda")
    for i in range(5000):
        for s, (stream, job) in enumerate(zip(streams, jobs, strict=True)):
            with torch.cuda.stream(stream):
                y = flash_attention(*job)
                if i % 50 == 0:
                    wrong[s] += (y != expected[s]).sum()
    torch.cuda.synchronize()
    assert wrong.tolist() == [0, 0]


def test_cuda_graph() -> None:
    torch = pytest.importorskip("torch")
    p = example(t=1001, h=2, d=64)
    (_, tensors), (_, others) = torch_inputs(p, 1), torch_inputs(p, 2)
    expected = [flash_attention(*x) for x in (tensors, others)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = flash_attention(*tensors)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected[0])
    for x, other in zip(tensors, others, strict=True):
        x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected[1])


def test_refusals() -> None:
    pytest.importorskip("torch")
    _, (q, k, v) = torch_inputs(example(t=9, h=1, d=32))
    with pytest.raises(ArgumentTypeError, match=r"k is a torch array on the CPU, q a torch array on CUDA device 0"):
        flash_attention(q, k.cpu(), v)
    with pytest.raises(ArgumentTypeError, match=r"q is float32; accepted: bfloat16, float16"):
        flash_attention(q.float(), k, v)
    with pytest.raises(UnsupportedError, match=r"q requires a gradient"):
        flash_attention(q.requires_grad_(), k, v)
