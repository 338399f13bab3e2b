"""The backward pass of power retention on a GPU, between guards, against gradients in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vidrial.build.cubins import build_many
from vidrial.build.nvrtc import Cubin
from vidrial.device import HOPPER, Device
from vidrial.dtypes import DType
from vidrial.kernels.power_retention.back.op import Config, check, errors, example, forward_pass, op, outputs, reference, sample
from vidrial.kernels.power_retention.back.problem import Gradient
from vidrial.runtime.plan import CudaPlan
from vidrial.spec.choices import describe

Arrays = dict[str, np.ndarray]
GUARD = 4096  # bytes before and behind every array: all bits set, so NaN to whoever reads them

# wgmma is no choice of calls before a sweep has ranked it (`Op.unmeasured`); here it is named.
MMA = ("sync", "wgmma")


def skip_without(mma: str) -> Device:
    device = Device.current()
    if mma == "wgmma" and device.arch != HOPPER:
        pytest.skip("wgmma is an instruction of Hopper")
    return device


GRID = {
    "D = 64": example(t=1537, h=2, d=64),
    "D = 64, E = 32, grouped, fp16": example(t=1201, h=1, hq=3, d=64, e=32, dtype="float16"),
    "D = 128, no gates": example(t=901, h=1, d=128, gated=False),
    "D = 128, grouped": example(t=1025, h=1, hq=2, d=128),
    "D = 32, E = 64, no sum": example(t=1111, b=2, h=1, d=32, e=64, normalize="none"),
    "E > D": example(t=700, h=1, d=32, e=128),
    "degree 4": example(t=611, h=1, hq=2, d=64, degree=4),
}


def run_guarded(p: Gradient, config: Config, inputs: Arrays) -> tuple[Arrays, bool]:
    """The gradients, and whether every guard and input is as it was; outputs and workspace start as NaN."""
    import cupy

    plan = CudaPlan(op, p, config, 0)
    made = outputs(p)
    sizes = {n: x.nbytes for n, x in inputs.items()} | {n: b.nbytes for n, b in made.items()} | {"workspace": plan.workspace.bytes}
    whole = {name: cupy.full(size + 2 * GUARD, 0xFF, cupy.uint8) for name, size in sizes.items()}
    inner = {name: whole[name][GUARD : GUARD + size] for name, size in sizes.items()}
    for name, array in inputs.items():
        inner[name].set(np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8))
    pointers = {name: array.data.ptr for name, array in inner.items() if name != "workspace"}
    plan.run(pointers, inner["workspace"].data.ptr, cupy.cuda.get_current_stream().ptr)
    cupy.cuda.get_current_stream().synchronize()
    intact = all((whole[n][:GUARD].get() == 0xFF).all() and (whole[n][GUARD + size :].get() == 0xFF).all() for n, size in sizes.items())
    intact &= all(inner[name].get().tobytes() == np.ascontiguousarray(array).tobytes() for name, array in inputs.items())
    bits = np.float16 if p.dtype is DType.float16 else np.uint16
    gradients = {n: inner[n].get().view(np.float32 if n == "dlog_g" else bits).reshape(b.shape) for n, b in made.items()}
    return gradients, intact


def faults(p: Gradient, config: Config, inputs: Arrays, exact: Arrays | None = None) -> list[str]:
    exact = reference(p, inputs) if exact is None else exact
    results, intact = run_guarded(p, config, inputs)
    found = check(p, inputs, results, exact)
    return ([] if found.ok else [f"{describe(config)}: {found} {errors(p, results, exact)}"]) + (
        [] if intact else [f"{describe(config)}: guards"]
    )


@pytest.mark.parametrize("mma", MMA)
@pytest.mark.parametrize("name", GRID)
def test_configs_over_the_whole_space(name: str, mma: str) -> None:
    p, device = GRID[name], skip_without(mma)
    chunks = [c.chunk for c in op.shared({"mma": mma}) if op.reject(p, c, device, part="") is None]
    configs = [c for chunk in chunks for c in list(op.space(p, device, fixed={"chunk": chunk, "mma": mma}))[::64]]
    assert configs or (mma == "wgmma" and p.dtype is DType.float16), "float16 has no attention form by wgmma"
    sources = {}
    for config in configs:
        for stage in op.stages(p, config):
            source = stage.kernel.source(stage.problem, stage.config)
            sources[source.text] = source, describe(stage.config)
    spilled = []
    for _, cubin in build_many(sources, device.arch):
        assert isinstance(cubin, Cubin), str(cubin)
        spilled += [cubin] if cubin.resources.spill_stores else []
    assert not spilled
    inputs = sample(p, 1)
    exact = reference(p, inputs)
    wrong = [fault for config in configs for fault in faults(p, config, inputs, exact)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("mma", MMA)
@pytest.mark.parametrize("t", [1, 2, 7, 63, 65, 127, 128, 129, 257, 383, 385, 513])
def test_odd_lengths(t: int, mma: str) -> None:
    p, device = example(t=t, b=2, h=1, hq=2, d=64 if mma == "wgmma" else 32), skip_without(mma)
    inputs = sample(p, t)
    for chunk in (c for c in (0, 128, 256) if c < t):
        best = op.predicted(example(t=1000, d=p.d), device, {"chunk": chunk, "mma": mma})
        one = replace(best, scan=replace(best.scan, segments=1), adjoint_wgmma=replace(best.adjoint_wgmma, segments=1))
        assert not faults(p, one, inputs)


@pytest.mark.parametrize("mma", MMA)
@pytest.mark.parametrize("gates", [0.0, 0.001, 20.0, 300.0, np.inf])
def test_gates_and_rows_of_zeros(gates: float, mma: str) -> None:
    device = skip_without(mma)
    p = example(t=777, h=2, d=64)
    inputs = sample(p, 3)
    with np.errstate(invalid="ignore"):
        inputs["log_g"] = (inputs["log_g"] * np.float32(gates)).astype(np.float32)
    inputs["q"][:, [5, 400, 776]], inputs["k"][:, :9], inputs["k"][:, 260:300] = 0, 0, 0
    inputs |= forward_pass(p, inputs)
    for chunk in (0, 256):
        config = op.predicted(p, device, {"chunk": chunk, "mma": mma})
        results, intact = run_guarded(p, config, inputs)
        found = errors(p, results, reference(p, inputs))
        assert intact and all((x <= (1.5e-2 if n == "dlog_g" else 8e-3)).all() for n, x in found.items()), found
        assert (results["dq"][:, [5, 400, 776]] == 0).all() and (results["dk"][:, 260:300] == 0).all()


@pytest.mark.parametrize("mma", MMA)
def test_long_memory_and_many_chunks(mma: str) -> None:
    p, device = example(t=8192, h=1, d=64 if mma == "wgmma" else 32), skip_without(mma)
    inputs = sample(p, 4)
    inputs["log_g"] = -np.log1p(np.exp(-np.random.default_rng(4).standard_normal(inputs["log_g"].shape) - 1)).astype(np.float32)
    inputs |= forward_pass(p, inputs)
    exact = reference(p, inputs)
    for chunk in (128, 1024, 4096):
        assert not faults(p, op.predicted(p, device, {"chunk": chunk, "mma": mma}), inputs, exact)


@pytest.mark.parametrize("segments", [1, 2, 5, 8])
def test_segments_of_the_adjoint(segments: int) -> None:
    p, device = example(t=2309, h=2, hq=4, d=64), skip_without("wgmma")
    best = op.predicted(p, device, {"chunk": 256, "mma": "wgmma"})
    assert not faults(p, replace(best, adjoint_wgmma=replace(best.adjoint_wgmma, segments=segments)), sample(p, 6))


@pytest.mark.parametrize("mma", MMA)
def test_thirty_runs_give_the_same_bits(mma: str) -> None:
    device = skip_without(mma)
    p = example(t=2309, h=2, hq=4, d=64)
    inputs = sample(p, 5)
    config = op.predicted(p, device, {"chunk": 256, "mma": mma})
    first, _ = run_guarded(p, config, inputs)
    for _ in range(30):
        again, _ = run_guarded(p, config, inputs)
        assert all((again[name] == x).all() for name, x in first.items())
