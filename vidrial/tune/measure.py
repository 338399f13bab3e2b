"""What checks and times configs inside a measuring process: on a GPU, or (checks only) on the host target."""

from __future__ import annotations

import contextlib
import functools
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.errors import LaunchError, UnsupportedError
from vidrial.host.plan import HostPlan
from vidrial.host.target import SCHEDULES
from vidrial.runtime.plan import CudaPlan
from vidrial.settings import prepare_cupy
from vidrial.spec.op import Arrays, Buffer, Op
from vidrial.tune.timing import Clock, CudaClock, Timing, measure, slowdowns
from vidrial.tune.workers import CheckResult, Job

WARM_SECONDS = 0.2
PULSE_STEPS = 16384
PULSE = """extern "C" __global__ void pulse(float* out) {
  float x = threadIdx.x;
  for (int i = 0; i < %d; ++i) x = fmaf(x, 0.9999f, 1.0f);
  if (x < 0.0f) *out = x;
}
"""
# Bytes before and after every array that a kernel writes to, which must stay as they are.
GUARD = 4096
POISON = 0xFF
# A job takes about this long, so a slow config gets fewer samples, but never fewer than LEAST_ROUNDS.
JOB_MS, LEAST_ROUNDS = 1000.0, 3
# Elements of a block whose results are compared by their norms, and of what is compared at a time. Against FLOOR times the mean size of all
# blocks the smallest ones count no more.
BLOCK, AT_ONCE, FLOOR = 1024, 1 << 24, 1e-2


class Reference:
    """A fixed piece of work, arithmetic and copying, whose time says whether the GPU is throttled or shared.

    Raises (when made):
        CompileError, LaunchError: its kernel does not compile or load.
    """

    def __init__(self, arch: str, index: int, sms: int, stream: Any) -> None:
        import cupy

        from vidrial.build.nvrtc import compile_source
        from vidrial.runtime.launch import Binary
        from vidrial.spec.geometry import Geometry

        self._binary = Binary.load(compile_source(PULSE % PULSE_STEPS, "pulse", arch), "pulse", index)
        self._geometry = Geometry((2 * sms, 1, 1), 512)
        self._source, self._target = cupy.zeros(1 << 26, cupy.uint8), cupy.zeros(1 << 26, cupy.uint8)
        self._packed = bytearray(struct.pack("P", self._target.data.ptr))
        self._stream = stream

    def run(self) -> None:
        """Queue the work."""
        self._binary.launch(self._geometry, self._packed, self._stream.ptr)
        self._target.data.copy_from_device_async(self._source.data, self._source.nbytes, self._stream)

    def warm(self, clock: Clock) -> None:
        """Bring the GPU to its working clock."""
        until = time.perf_counter() + WARM_SECONDS
        while time.perf_counter() < until:
            self.run()
            clock.wait()


def block_difference(xp: Any, a: Any, b: Any, dtype: DType) -> float:
    """How far two results are apart: of blocks of neighbouring elements the most that one's difference has of its own norm.

    A tile that is wrong among millions shows so. Elements that are no number are infinitely far apart.

    Args:
        xp: numpy or cupy. a, b: arrays of any shape; bfloat16 as its bits.
    """
    a, b, found = a.reshape(-1), b.reshape(-1), []
    for at in range(0, a.size, AT_ONCE):
        x, y = (_widened(xp, part[at : at + AT_ONCE], dtype) for part in (a, b))
        difference = xp.where(x == y, 0.0, x - y)
        size = xp.where(xp.isfinite(x), x, 0.0)
        rows = -(-x.size // BLOCK)
        padded = [xp.zeros(rows * BLOCK, xp.float64) for _ in range(2)]
        for target, values in zip(padded, (difference, size), strict=True):
            target[: x.size] = values
        found.append([xp.sqrt(xp.square(values.reshape(rows, BLOCK)).sum(1)) for values in padded])
    if not found:
        return 0.0
    differences, sizes = (xp.concatenate(parts) for parts in zip(*found, strict=True))
    least = FLOOR * float(xp.sqrt(xp.square(sizes).mean()))
    ratios = differences / xp.maximum(sizes, max(least, np.finfo(np.float64).tiny))
    return float(xp.where(xp.isnan(ratios), xp.inf, ratios).max())


def _widened(xp: Any, x: Any, dtype: DType) -> Any:
    """As float64; bfloat16 is the upper half of a float32."""
    if dtype is DType.bfloat16:
        x = (x.astype(xp.uint32) << 16).view(xp.float32)
    return x.astype(xp.float64)


class Expected:
    """Inputs of a problem and what the reference makes of them, kept for as long as the same one is asked for."""

    def __init__(self, op: Op) -> None:
        self._op = op
        self._kept: dict[tuple[Any, int], tuple[Arrays, Arrays]] = {}

    def of(self, problem: Any, seed: int) -> tuple[Arrays, Arrays]:
        """Inputs and reference of a problem."""
        if (problem, seed) not in self._kept:
            inputs = self._op.sample(problem, seed)
            self._kept[problem, seed] = inputs, self._op.reference(problem, inputs)
        return self._kept[problem, seed]

    def compare(self, problem: Any, seed: int, results: Sequence[Arrays], outside: bool) -> CheckResult:
        """Two runs' results beside the reference; `outside`: something was written beyond an array."""
        inputs, expected = self.of(problem, seed)
        check = self._op.check(problem, inputs, results[0], expected)
        same = all(np.array_equal(results[0][n].view(np.uint8), results[1][n].view(np.uint8)) for n in results[0])
        error = "it writes outside of its arrays" if outside else "" if same or not check.ok else "two runs on the same inputs differ"
        return CheckResult(check, error)


class CudaBench:
    """One GPU, through CuPy."""

    needs_cubins = True

    def __init__(self, op: Op, index: int) -> None:
        prepare_cupy()
        import cupy

        self._op, self._index, self._cupy = op, index, cupy
        with _cuda_errors():
            cupy.cuda.Device(index).use()
            device = Device.current(index)
            self._stream = cupy.cuda.Stream(non_blocking=True)
            self._clock = CudaClock(device.l2_bytes, self._stream)
            self._reference = Reference(device.arch, index, device.sms, self._stream)
        self._expected = Expected(op)
        self._inputs: tuple[Any, dict[str, Any]] = (None, {})

    def prepare(self, problem: Any, small: Any, seeds: Sequence[int]) -> None:
        """Inputs of both, the reference of the small one, and a warm GPU."""
        for seed in seeds:
            self._expected.of(small, seed)
        with _cuda_errors():
            self._upload(problem, self._op.sample(problem, seeds[0]))
            self._reference.warm(self._clock)

    def check(self, problem: Any, config: Any, seed: int) -> CheckResult:
        """Twice on NaN, guards around every output and the workspace."""
        inputs, _ = self._expected.of(problem, seed)
        plan = CudaPlan(self._op, problem, config, self._index)
        with _cuda_errors():
            arrays = {name: self._cupy.asarray(x) for name, x in inputs.items()}
            runs = [self._run_guarded(plan, problem, arrays) for _ in range(2)]
        return self._expected.compare(problem, seed, [results for results, _ in runs], any(outside for _, outside in runs))

    def compare(self, problem: Any, configs: Sequence[Any], seed: int) -> float:
        """On the GPU, and on memory that held NaN before each run."""
        plans = [CudaPlan(self._op, problem, config, self._index) for config in configs]
        buffers = self._op.outputs(problem)
        with _cuda_errors():
            if self._inputs[0] != problem:
                self._upload(problem, self._op.sample(problem, seed))
            results = []
            for plan in plans:
                outputs = {name: self._poisoned(buffer.nbytes) for name, buffer in buffers.items()}
                scratch = self._poisoned(max(1, plan.workspace.bytes))
                self._cupy.cuda.runtime.deviceSynchronize()
                pointers = {name: x.data.ptr for name, x in (self._inputs[1] | outputs).items()}
                plan.run(pointers, scratch.data.ptr, self._stream.ptr)
                self._stream.synchronize()
                results.append({name: _typed(x, buffers[name]) for name, x in outputs.items()})
            return max(block_difference(self._cupy, results[0][name], results[1][name], buffer.dtype) for name, buffer in buffers.items())

    def measure(self, problem: Any, configs: Sequence[Any], job: Job, begin: Callable[[int], None]) -> tuple[list[Timing], float]:
        """Configs in turn with the reference kernel, on the inputs of `prepare`."""
        plans = [CudaPlan(self._op, problem, config, self._index) for config in configs]
        with _cuda_errors():
            if self._inputs[0] != problem:
                self._upload(problem, self._op.sample(problem, job.seed))
            outputs = {name: self._cupy.empty(buffer.bytes, self._cupy.uint8) for name, buffer in self._op.outputs(problem).items()}
            scratch = self._cupy.empty(max(1, *(plan.workspace.bytes for plan in plans)), self._cupy.uint8)
            pointers = {name: array.data.ptr for name, array in (self._inputs[1] | outputs).items()}
            runs = [functools.partial(plan.run, pointers, scratch.data.ptr, self._stream.ptr) for plan in plans]
            self._stream.synchronize()
            first = []
            for i, run in enumerate(runs):
                begin(i)
                run()
                self._clock.lead(run)
                first.append(measure([run], self._clock, rounds=1, warmup=0)[0].median_ms)
            fitting = LEAST_ROUNDS if min(first) > job.give_up_ms else int(JOB_MS / max(sum(first), 1e-3))
            timings = measure([self._reference.run, *runs], self._clock, max(LEAST_ROUNDS, min(job.rounds, fitting)), warmup=1)
        return timings[1:], timings[0].median_ms

    def usable(self) -> bool:
        """Whether the CUDA context still works."""
        try:
            self._cupy.cuda.runtime.deviceSynchronize()
        except self._cupy.cuda.runtime.CUDARuntimeError:
            return False
        return True

    def slowdowns(self) -> list[str]:
        """The driver's reasons, asked while the GPU works."""
        with _cuda_errors():
            self._reference.warm(self._clock)
            return slowdowns(self._cupy.cuda.runtime.deviceGetPCIBusId(self._index), self._work)

    def _work(self) -> None:
        self._reference.run()
        self._clock.wait()

    def _upload(self, problem: Any, inputs: Arrays) -> None:
        self._inputs = (None, {})
        self._inputs = (problem, {name: self._cupy.asarray(x) for name, x in inputs.items()})
        self._cupy.cuda.runtime.deviceSynchronize()

    def _run_guarded(self, plan: CudaPlan, problem: Any, inputs: Mapping[str, Any]) -> tuple[Arrays, bool]:
        buffers = self._op.outputs(problem)
        outputs = {name: self._guarded(buffer.nbytes) for name, buffer in buffers.items()}
        scratch = self._guarded(plan.workspace.bytes)
        self._cupy.cuda.runtime.deviceSynchronize()
        pointers = {name: x.data.ptr for name, x in inputs.items()} | {name: x.data.ptr + GUARD for name, x in outputs.items()}
        plan.run(pointers, scratch.data.ptr + GUARD, self._stream.ptr)
        self._stream.synchronize()
        guards = [part.get() for x in (*outputs.values(), scratch) for part in (x[:GUARD], x[-GUARD:])]
        outside = any(bool((guard != POISON).any()) for guard in guards)
        return {name: _typed(x[GUARD:-GUARD].get(), buffers[name]) for name, x in outputs.items()}, outside

    def _guarded(self, size: int) -> Any:
        return self._poisoned(size + 2 * GUARD)

    def _poisoned(self, size: int) -> Any:
        x = self._cupy.empty(size, self._cupy.uint8)
        x.data.memset(POISON, x.nbytes)
        return x


class HostBench:
    """The host target: checks configs without a GPU, and times none."""

    needs_cubins = False

    def __init__(self, op: Op, index: int) -> None:
        self._op = op
        self._expected = Expected(op)

    def prepare(self, problem: Any, small: Any, seeds: Sequence[int]) -> None:
        """The reference of the small problem."""
        for seed in seeds:
            self._expected.of(small, seed)

    def check(self, problem: Any, config: Any, seed: int) -> CheckResult:
        """Under two schedules of a CTA's threads, which must agree to the bit."""
        inputs, _ = self._expected.of(problem, seed)
        plan = HostPlan(self._op, problem, config)
        results = [plan.results(inputs, schedule) for schedule in SCHEDULES[:2]]
        return self._expected.compare(problem, seed, results, outside=False)

    def compare(self, problem: Any, configs: Sequence[Any], seed: int) -> float:
        """Both on the CPU."""
        inputs, buffers = self._op.sample(problem, seed), self._op.outputs(problem)
        a, b = (HostPlan(self._op, problem, config).results(inputs) for config in configs)
        return max(block_difference(np, a[name], b[name], buffer.dtype) for name, buffer in buffers.items())

    def measure(self, problem: Any, configs: Sequence[Any], job: Job, begin: Callable[[int], None]) -> tuple[list[Timing], float]:
        """Not served.

        Raises:
            UnsupportedError: always; a CPU's time says nothing about a GPU.
        """
        raise UnsupportedError("the host target checks results and times nothing; sweep on a GPU")

    def usable(self) -> bool:
        """Always: every launch is a process of its own."""
        return True

    def slowdowns(self) -> list[str]:
        """None that count."""
        return []


def _typed(data: Any, buffer: Buffer) -> Any:
    """Bytes as an array of the buffer's shape and dtype, bfloat16 as uint16 bits."""
    return data.view("uint16" if buffer.dtype is DType.bfloat16 else buffer.dtype.label).reshape(buffer.shape)


@contextlib.contextmanager
def _cuda_errors() -> Iterator[None]:
    """CuPy's errors as LaunchError."""
    from cupy.cuda import driver, memory, runtime

    try:
        yield
    except (runtime.CUDARuntimeError, driver.CUDADriverError, memory.OutOfMemoryError) as error:
        raise LaunchError(f"{type(error).__name__}: {error}") from error
