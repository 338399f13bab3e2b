"""Power retention on a GPU: run between guards, compare, compile many configs at once."""

from __future__ import annotations

import os

import numpy as np

from vidrial.build.cubins import build_many
from vidrial.build.nvrtc import Cubin
from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.kernels.power_retention.op import RELATIVE_BOUND, Config, Problem, check, op, reference
from vidrial.runtime.plan import CudaPlan
from vidrial.spec.choices import describe

Arrays = dict[str, np.ndarray]
GUARD = 4096  # bytes before and behind every array: all bits set, so NaN to whoever reads them


def errors(p: Problem, inputs: Arrays, y: np.ndarray, chunk: int, exact: Arrays | None = None) -> list[str]:
    """What is wrong with y (bits): the op's own two measures, and the norm over the rows that read a state."""
    exact = exact or reference(p, inputs)
    found = check(p, inputs, {"y": y}, exact)
    got, wanted = p.dtype.widen(y)[:, chunk:], exact["y"][:, chunk:]
    late = float(np.linalg.norm(got - wanted) / max(np.linalg.norm(wanted), 1e-30))
    return [] if found.ok and late <= RELATIVE_BOUND else [f"{found}, behind the first chunk {late:.2e}"]


def run_guarded(p: Problem, config: Config, inputs: Arrays) -> tuple[np.ndarray, bool]:
    """y (bits) of one config, and whether every guard and input is as it was; outputs and workspace start as NaN."""
    import cupy

    plan = CudaPlan(op, p, config, 0)
    sizes = {name: array.nbytes for name, array in inputs.items()} | {"y": 2 * p.b * p.t * p.hq * p.e, "workspace": plan.workspace.bytes}
    whole = {name: cupy.full(size + 2 * GUARD, 0xFF, cupy.uint8) for name, size in sizes.items()}
    inner = {name: whole[name][GUARD : GUARD + size] for name, size in sizes.items()}
    for name, array in inputs.items():
        inner[name].set(np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8))
    pointers = {name: array.data.ptr for name, array in inner.items() if name != "workspace"}
    plan.run(pointers, inner["workspace"].data.ptr, cupy.cuda.get_current_stream().ptr)
    cupy.cuda.get_current_stream().synchronize()
    intact = all((whole[n][:GUARD].get() == 0xFF).all() and (whole[n][GUARD + size :].get() == 0xFF).all() for n, size in sizes.items())
    intact &= all(inner[name].get().tobytes() == np.ascontiguousarray(array).tobytes() for name, array in inputs.items())
    y = inner["y"].get().view(np.uint16 if p.dtype is DType.bfloat16 else np.float16)
    return y.reshape(p.b, p.t, p.hq, p.e), intact


def compile_all(problems: dict[str, Problem], configs: dict[str, list[Config]]) -> None:
    """All kernels at once, on all cores."""
    sources = {}
    for name, p in problems.items():
        for config in configs[name]:
            for stage in op.stages(p, config):
                source = stage.kernel.source(stage.problem, stage.config)
                sources[source.text] = source, describe(stage.config)
    for _, cubin in build_many(sources, Device.current().arch, jobs=os.cpu_count()):
        assert isinstance(cubin, Cubin), str(cubin)
