"""Power retention on a GPU: every library, stream and layout a caller may come with, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from power_gpu import Arrays, compile_all, errors, run_guarded

from vidrial.device import Device
from vidrial.errors import ArgumentTypeError
from vidrial.kernels.power_retention import power_retention
from vidrial.kernels.power_retention.op import RELATIVE_BOUND, chunked, example, op, reference, sample
from vidrial.kernels.power_retention.problem import Problem
from vidrial.spec.choices import describe

TWO_RESULTS = 2 * RELATIVE_BOUND

GRID = {
    "D = 64": example(t=1537, h=2, d=64),
    "D = 64, E = 32, grouped, fp16": example(t=1201, h=1, hq=3, d=64, e=32, dtype="float16"),
    "D = 128, no gates": example(t=901, h=1, d=128, gated=False),
    "D = 32, E = 64, no sum": example(t=1111, b=2, h=1, d=32, e=64, normalize="none"),
    "degree 4": example(t=611, h=1, hq=2, d=64, degree=4),
}


def test_configs_over_the_whole_space() -> None:
    configs = {}
    for name, p in GRID.items():
        device = Device.current()
        chunks = [c.chunk for c in op.shared() if op.reject(p, c, device, part="") is None]
        # The best of every chunk, and a few from everywhere.
        configs[name] = [c for chunk in chunks for c in list(op.space(p, device, fixed={"chunk": chunk}))[::100]]
    compile_all(GRID, configs)
    wrong = []
    for name, p in GRID.items():
        inputs = sample(p, 1)
        exact = reference(p, inputs)
        for config in configs[name]:
            y, intact = run_guarded(p, config, inputs)
            found = errors(p, inputs, y, chunked(p, config.chunk).chunk, exact) + ([] if intact else ["guards"])
            wrong += [f"{name}: {describe(config)}: {e}" for e in found]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("t", [1, 2, 7, 63, 64, 65, 127, 129, 255, 257, 383, 385, 513])
def test_odd_lengths(t: int) -> None:
    p = example(t=t, b=2, h=1, hq=2, d=32)
    inputs = sample(p, t)
    for chunk in (c for c in (0, 128, 256) if c < t):
        # The same kernels for all lengths.
        best = op.predicted(example(t=1000, d=32), Device.current(), {"chunk": chunk})
        config = replace(best, scan=replace(best.scan, segments=1))
        y, intact = run_guarded(p, config, inputs)
        assert intact and not errors(p, inputs, y, chunked(p, config.chunk).chunk), describe(config)


@pytest.mark.parametrize(("chunk", "t"), [(0, 4321), (128, 4321), (256, 4321), (512, 4321), (1024, 4321), (2048, 4321), (4096, 4321)])
def test_every_chunk(chunk: int, t: int) -> None:
    p = example(t=t, h=1, d=32)
    inputs = sample(p, 2)
    inputs["log_g"] *= np.float32(0.05)
    config = op.predicted(p, Device.current(), {"chunk": chunk})
    assert config.chunk == chunk
    y, intact = run_guarded(p, config, inputs)
    assert intact and not errors(p, inputs, y, chunked(p, config.chunk).chunk)


@pytest.mark.parametrize("gates", [0.0, 0.001, 20.0, 300.0, np.inf])
def test_gates_and_rows_of_zeros(gates: float) -> None:
    p = example(t=777, h=2, d=64)
    inputs = sample(p, 3)
    with np.errstate(invalid="ignore"):
        inputs["log_g"] = (inputs["log_g"] * np.float32(gates)).astype(np.float32)
    inputs["q"][:, [5, 400, 776]], inputs["k"][:, :9], inputs["k"][:, 260:300] = 0, 0, 0
    for chunk in (0, 256):
        config = op.predicted(p, Device.current(), {"chunk": chunk})
        y, intact = run_guarded(p, config, inputs)
        assert intact and not errors(p, inputs, y, chunked(p, config.chunk).chunk)
        assert (y[:, [5, 400, 776]] == 0).all() and (y[:, :9] == 0).all()


def test_segments_of_the_scan() -> None:
    p = example(t=2309, h=1, d=64)
    inputs = sample(p, 4)
    inputs["log_g"] *= np.float32(0.05)
    base = op.predicted(p, Device.current(), {"chunk": 128})
    configs = [replace(base, scan=replace(base.scan, segments=n)) for n in (1, 2, 3, 4, 6, 8)]
    compile_all({"p": p}, {"p": configs})
    for config in configs:
        y, intact = run_guarded(p, config, inputs)
        assert intact and not errors(p, inputs, y, 128), describe(config)


def to_torch(x: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(x.view(np.int16)).cuda().view(torch.bfloat16) if x.dtype == np.uint16 else torch.from_numpy(x).cuda()


def from_torch(y: Any) -> np.ndarray:
    import torch

    array: np.ndarray = y.contiguous().view(torch.int16).cpu().numpy().view(np.uint16) if y.dtype == torch.bfloat16 else y.cpu().numpy()
    return array


def torch_inputs(p: Problem, seed: int = 5) -> tuple[Arrays, list[Any]]:
    inputs = sample(p, seed)
    return inputs, [to_torch(inputs[name]) for name in ("q", "k", "v", "log_g")[: 3 + p.gated]]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_torch(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    p = example(t=1001, b=2, h=2, hq=4, d=64, dtype=dtype)
    inputs, tensors = torch_inputs(p)
    for chunk in (None, 256):
        y = power_retention(*tensors, chunk=chunk)
        assert isinstance(y, torch.Tensor) and y.dtype == tensors[0].dtype and y.device == tensors[0].device
        assert not errors(p, inputs, from_torch(y), chunk or 0)


@pytest.mark.parametrize(
    "options", [{"degree": 4}, {"normalize": "none"}, {"scale": 0.5}, {"scale": -2.0, "degree": 4, "normalize": "none"}], ids=str
)
def test_torch_options(options: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    p = example(t=333, h=1, hq=2, d=64, **options)
    inputs, tensors = torch_inputs(p)
    assert not errors(p, inputs, from_torch(power_retention(*tensors, **options)), 0)


def test_cupy() -> None:
    import cupy

    p = example(t=1001, h=2, d=64, dtype="float16")
    inputs = sample(p, 6)
    arrays = [cupy.asarray(inputs[name]) for name in ("q", "k", "v", "log_g")]
    y = power_retention(*arrays)
    assert isinstance(y, cupy.ndarray) and y.dtype == np.float16
    assert not errors(p, inputs, y.get(), 0)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        again = power_retention(*arrays)
        stream.synchronize()
    assert (again == y).all()
    strided = cupy.full((1, 2, 1001, 72), cupy.nan, cupy.float16)[..., :64].transpose(0, 2, 1, 3)
    strided[...] = arrays[0]
    assert (power_retention(strided, *arrays[1:]) == y).all()
    assert (power_retention(strided[:, ::-1][:, ::-1], *arrays[1:]) == y).all()


def test_cupy_bfloat16() -> None:
    import cupy

    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    p = example(t=301, h=2, d=64)
    inputs = sample(p, 7)
    arrays = [cupy.asarray(inputs[name]).view(bfloat16) for name in "qkv"]
    y = power_retention(*arrays, cupy.asarray(inputs["log_g"]))
    assert isinstance(y, cupy.ndarray) and y.dtype == bfloat16
    assert not errors(p, inputs, y.view(np.uint16).get(), 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_jax(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("JAX has no GPU")
    p = example(t=1001, h=2, d=64, dtype=dtype)
    inputs = sample(p, 8)
    arrays = [jax.lax.bitcast_convert_type(jax.numpy.asarray(inputs[name].view(np.uint16)), getattr(jax.numpy, dtype)) for name in "qkv"]
    log_g = jax.numpy.asarray(inputs["log_g"])
    y = power_retention(*arrays, log_g)
    assert isinstance(y, jax.Array) and y.dtype == arrays[0].dtype and y.devices() == arrays[0].devices()
    bits = np.asarray(jax.lax.bitcast_convert_type(y, jax.numpy.uint16))
    assert not errors(p, inputs, bits if dtype == "bfloat16" else bits.view(np.float16), 0)
    # A producer that has not run yet.
    later = power_retention(jax.jit(lambda x: x * 1)(arrays[0]), *arrays[1:], log_g)
    assert (np.asarray(jax.lax.bitcast_convert_type(later, jax.numpy.uint16)) == bits).all()


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
    p = example(t=517, b=2, h=2, hq=4, d=64)
    inputs, tensors = torch_inputs(p)
    y = power_retention(*tensors, chunk=256)
    moved = [LAYOUTS[layout](x) for x in tensors[:3]] + [tensors[3].transpose(1, 2).contiguous().transpose(1, 2)]
    assert any(a.stride() != b.stride() or a.data_ptr() % 16 for a, b in zip(moved, tensors, strict=True))
    assert torch.equal(power_retention(*moved, chunk=256), y)
    assert not errors(p, inputs, from_torch(y), 256)


def test_a_batch_that_is_one_row() -> None:
    torch = pytest.importorskip("torch")
    p = example(t=300, h=2, d=32)
    inputs, tensors = torch_inputs(p)
    y = power_retention(*tensors)
    assert torch.equal(power_retention(*(x.expand(3, *x.shape[1:]) for x in tensors)), y.expand(3, *y.shape[1:]))
    assert not errors(p, inputs, from_torch(y), 0)


def test_nothing_to_do() -> None:
    torch = pytest.importorskip("torch")
    for shape in ((2, 0, 3, 32), (0, 7, 3, 32)):
        x = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        y = power_retention(x, x, x, torch.empty(shape[:3], device="cuda"))
        assert y.shape == shape and y.dtype == x.dtype and y.is_cuda


def test_many_heads() -> None:
    pytest.importorskip("torch")
    for keywords, chunk in (({"t": 5, "h": 65535}, 0), ({"t": 3, "b": 65535, "h": 1}, 0), ({"t": 200, "b": 20, "h": 80}, 128)):
        p = example(**{"d": 32} | keywords)
        inputs, tensors = torch_inputs(p)
        y = from_torch(power_retention(*tensors, chunk=chunk))
        batches, heads = [0, p.b // 2, p.b - 1], [0, p.h // 2, p.h - 1]
        few = {name: np.ascontiguousarray(array[batches][:, :, heads]) for name, array in inputs.items()}
        assert not errors(replace(p, b=3, h=3, hq=3), few, np.ascontiguousarray(y[batches][:, :, heads]), chunk)


def test_long_sequences_do_not_depend_on_the_chunk() -> None:
    pytest.importorskip("torch")
    p = example(t=20_001, h=2, d=64)
    _, tensors = torch_inputs(p)
    tensors[3] *= 0.01
    whole = power_retention(*tensors, chunk=0).float()
    for chunk in (128, 512, 1024, 4096):
        y = power_retention(*tensors, chunk=chunk).float()
        assert float((y - whole).norm() / whole.norm()) <= TWO_RESULTS
        assert float((y - whole)[:, -500:].norm() / whole[:, -500:].norm()) <= TWO_RESULTS


def test_the_callers_stream() -> None:
    torch = pytest.importorskip("torch")
    p = example(t=1001, h=2, d=64)
    _, tensors = torch_inputs(p)
    expected = power_retention(*tensors, chunk=256)
    late = [torch.full_like(x, float("nan")) for x in tensors]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(500_000_000)
        for x, source in zip(late, tensors, strict=True):
            x.copy_(source)
        y = power_retention(*late, chunk=256)
        assert not side.query(), "the call waited for its inputs"
        for x in late:
            x.fill_(float("nan"))
    side.synchronize()
    assert torch.equal(y, expected)


def test_two_streams_at_once() -> None:
    torch = pytest.importorskip("torch")
    p = example(t=2001, h=4, d=64)
    jobs = [torch_inputs(p, seed)[1] for seed in (1, 2)]
    expected = [power_retention(*job, chunk=256) for job in jobs]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream(), torch.cuda.Stream()], ([], [])
    for _ in range(10):
        for stream, job, found in zip(streams, jobs, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(power_retention(*job, chunk=256))
    torch.cuda.synchronize()
    assert all(torch.equal(y, wanted) for found, wanted in zip(results, expected, strict=True) for y in found)


def test_threads() -> None:
    torch = pytest.importorskip("torch")
    p = example(t=501, h=2, d=64)
    jobs = [torch_inputs(p, seed)[1] for seed in range(4)]
    expected = [power_retention(*job, chunk=128) for job in jobs]
    torch.cuda.synchronize()

    def work(i: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [power_retention(*jobs[i], chunk=128) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        return all(torch.equal(y, expected[i]) for y in results)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.parametrize("chunk", [0, 128, 512])
def test_bitwise_repeatable(chunk: int) -> None:
    torch = pytest.importorskip("torch")
    p = example(t=3001, h=2, hq=4, d=64)
    _, tensors = torch_inputs(p)
    first = power_retention(*tensors, chunk=chunk)
    for _ in range(5):
        assert torch.equal(power_retention(*tensors, chunk=chunk), first)


def test_cuda_graph() -> None:
    torch = pytest.importorskip("torch")
    p = example(t=1001, h=2, d=64)
    (_, tensors), (_, others) = torch_inputs(p, 1), torch_inputs(p, 2)
    expected = [power_retention(*x, chunk=256) for x in (tensors, others)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = power_retention(*tensors, chunk=256)
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
    _, (q, k, v, log_g) = torch_inputs(example(t=9, h=1, d=32))
    with pytest.raises(ArgumentTypeError, match=r"k is a torch array on the CPU, q a torch array on CUDA device 0"):
        power_retention(q, k.cpu(), v, log_g)
    with pytest.raises(ArgumentTypeError, match=r"q is float32; accepted: bfloat16, float16"):
        power_retention(q.float(), k, v, log_g)
    with pytest.raises(ArgumentTypeError, match=r"the inputs are on CUDA device 0; the host target takes NumPy arrays and CPU tensors"):
        power_retention(q, k, v, log_g, target="host")


def test_autograd_on_a_gpu_agrees_with_numpy() -> None:
    torch = pytest.importorskip("torch")
    from vidrial.kernels.power_retention import power_retention_vjp

    _, tensors = torch_inputs(example(t=641, h=2, hq=4, d=64))
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = power_retention(*leaves)
    dy = torch.randn_like(y)
    y.backward(dy)
    _, vjp = power_retention_vjp(*(x.detach().float().cpu().numpy() for x in tensors))
    for leaf, expected in zip(leaves, vjp(dy.float().cpu().numpy())[:4], strict=True):
        found = leaf.grad.float().cpu().numpy()
        assert np.linalg.norm(found - expected) <= 1.5e-2 * np.linalg.norm(expected)
