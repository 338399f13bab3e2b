"""NVIDIA's compute-sanitizer over the kernels; and proof that it would have seen a mistake."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Every array is an allocation of its own, so that a byte beyond it is beyond everything.
RETENTION = """
import cupy
import numpy as np

cupy.cuda.set_allocator(None)
from dataclasses import replace
from vidrial.device import Device
from vidrial.kernels.power_retention.op import check, example, op, reference, sample
from vidrial.runtime.plan import CudaPlan

CASES = (
    ({"t": 389, "h": 1, "d": 32}, 128, 2),
    ({"t": 129, "h": 1, "hq": 2, "d": 64, "e": 32, "dtype": "float16"}, 0, 1),
    ({"t": 261, "h": 1, "d": 64}, 128, 1),
)
for keywords, chunk, segments in CASES:
    p = example(**keywords)
    config = op.predicted(p, Device.current(), {"chunk": chunk})
    config = replace(config, scan=replace(config.scan, segments=segments))
    plan, inputs = CudaPlan(op, p, config, 0), sample(p, 0)
    arrays = {name: cupy.asarray(array) for name, array in inputs.items()}
    arrays["y"] = cupy.zeros((p.b, p.t, p.hq, p.e), inputs["q"].dtype)
    workspace = cupy.empty(max(plan.workspace.bytes, 1), cupy.uint8)
    plan.run({name: array.data.ptr for name, array in arrays.items()}, workspace.data.ptr, cupy.cuda.get_current_stream().ptr)
    assert check(p, inputs, {"y": arrays["y"].get()}, reference(p, inputs)).ok
print("all checked")
"""
# Both paths at odd shapes: tails of rows and keys, one query, a group, a window, rows without keys, an odd head size.
FLASH = """
import cupy
import numpy as np

cupy.cuda.set_allocator(None)
from vidrial.device import Device
from vidrial.kernels.flash_attention.op import check, example, op, reference, sample
from vidrial.runtime.plan import CudaPlan

CASES = (
    {"t": 1, "h": 1, "d": 32},
    {"t": 129, "h": 2, "d": 64},
    {"t": 257, "h": 1, "hq": 3, "d": 128, "causal": True},
    {"t": 331, "tq": 67, "h": 1, "hq": 2, "d": 96, "left": 100, "right": 7},
    {"t": 65, "tq": 193, "h": 1, "d": 64, "causal": True, "dtype": "float16"},
    {"t": 601, "tq": 1, "h": 2, "hq": 8, "d": 128},
    {"t": 131, "h": 1, "d": 192, "e": 128, "causal": True},
    {"t": 77, "h": 1, "d": 256},
)
device, done = Device.current(), 0
for facts in CASES:
    p = example(**facts)
    for path in ("sm80", "sm90") if device.arch == "sm_90a" else ("sm80",):
        plan, inputs = CudaPlan(op, p, op.predicted(p, device, {"path": path}), 0), sample(p, 0)
        arrays = {name: cupy.asarray(array) for name, array in inputs.items()}
        arrays["y"], arrays["lse"] = cupy.zeros((p.b, p.tq, p.hq, p.e), inputs["q"].dtype), cupy.zeros((p.b, p.hq, p.tq), np.float32)
        workspace = cupy.empty(max(plan.workspace.bytes, 1), cupy.uint8)
        plan.run({name: array.data.ptr for name, array in arrays.items()}, workspace.data.ptr, cupy.cuda.get_current_stream().ptr)
        assert check(p, inputs, {n: arrays[n].get() for n in ("y", "lse")}, reference(p, inputs)).ok, (facts, path)
        done += 1
assert done == len(CASES) * (2 if device.arch == "sm_90a" else 1)
print("all checked")
"""
# Tails of m, n and k by TMA, and more tiles than CTAs, so that the producer runs ahead from tile to tile; odd rows by all threads.
GEMM = """
import sys
import cupy

cupy.cuda.set_allocator(None)
from vidrial.device import Device
from vidrial.runtime.plan import CudaPlan
from vidrial.spec.registry import resolve

op = resolve(GEMM_OP)
Paths, ByTma = op.config, type(op.config().tma)
device = Device.current()
CASES = [({"m": 67, "n": 66, "k": 131}, op.predicted(op.example(m=67, n=66, k=131), device, {"by": "threads"}))]
if device.arch == "sm_90a":
    CASES += [
        ({"m": 257, "n": 129, "k": 136}, Paths(by="tma", tma=ByTma(rows=128, columns=64, stages=3, store=2))),
        ({"m": 1030, "n": 1100, "k": 200, "dtype": "float16"}, Paths(by="tma", tma=ByTma(rows=64, columns=64, warps=4, stages=3, store=8))),
    ]
for facts, config in CASES:
    p = op.example(gelu=True, **facts)
    plan, inputs = CudaPlan(op, p, config, 0), op.sample(p, 0)
    arrays = {name: cupy.asarray(array) for name, array in inputs.items()}
    arrays["c"] = cupy.zeros((p.m, p.n), inputs["a"].dtype)
    plan.run({name: array.data.ptr for name, array in arrays.items()}, 0, cupy.cuda.get_current_stream().ptr)
    assert op.check(p, inputs, {"c": arrays["c"].get()}, op.reference(p, inputs)).ok, (facts, config)
print("all checked")
"""
PLANTED = """
import struct
import cupy

cupy.cuda.set_allocator(None)
from vidrial.build.nvrtc import compile_source
from vidrial.device import Device
from vidrial.runtime.launch import Binary
from vidrial.spec.geometry import Geometry

SOURCE = '''struct Args { float* x; };
extern "C" __global__ void planted(__grid_constant__ Args const args) {
  __shared__ float s[64];
  s[threadIdx.x] = float(threadIdx.x);
  BODY
}'''
x = cupy.zeros(64, cupy.float32)
source = SOURCE.replace("BODY", BODY)
binary = Binary.load(compile_source(source, "planted", Device.current().arch), "planted")
binary.launch(Geometry((1, 1, 1), 64, 0), bytearray(struct.pack("P", x.data.ptr)), 0)
cupy.cuda.runtime.deviceSynchronize()
print("all checked")
"""
BODIES = {
    "memcheck": "args.x[threadIdx.x + 1] = s[threadIdx.x];",
    "racecheck": "args.x[threadIdx.x] = s[63 - threadIdx.x];",
    "right": "__syncthreads(); args.x[threadIdx.x] = s[63 - threadIdx.x];",
}
CLEAN = {"memcheck": "ERROR SUMMARY: 0 errors", "racecheck": "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"}
SEEN = {"memcheck": "Invalid __global__ write of size 4 bytes", "racecheck": "Race reported between"}


@lru_cache
def tool() -> str:
    """compute-sanitizer: on the path, of a CUDA toolkit, or of a Python package."""
    places = [
        os.environ.get("CUDA_HOME", "/usr/local/cuda"),
        "/usr/local/cuda",
        *map(str, sorted(Path("/usr/local").glob("cuda-*"), reverse=True)),
    ]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *(f"{place}/bin" for place in places)]))
    packaged = (
        str(path)
        for folder in sys.path
        for path in Path(folder, "nvidia").glob("**/compute-sanitizer")
        if os.access(path, os.X_OK) and path.is_file()
    )
    found = found or next(packaged, None)
    if found is None:
        pytest.skip("compute-sanitizer is not installed")
    return found


def sanitize(check: str, program: str, folder: Path) -> str:
    script = folder / "script.py"
    script.write_text(program)
    # NOTE: CUDA's Python bindings ask the driver for functions that it may lack, which is no mistake of a kernel's.
    options = ["--report-api-errors", "no"] if check == "memcheck" else []
    ended = subprocess.run(
        [tool(), "--tool", check, *options, sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
        cwd=folder,
    )
    output = ended.stdout + ended.stderr
    assert "COMPUTE-SANITIZER" in output, output[-4000:]
    return output


@pytest.mark.parametrize("check", CLEAN)
def test_power_retention_is_clean(check: str, tmp_path: Path) -> None:
    output = sanitize(check, RETENTION, tmp_path)
    assert "all checked" in output and CLEAN[check] in output, output[-4000:]


def test_flash_attention_is_clean_on_both_paths(tmp_path: Path) -> None:
    output = sanitize("memcheck", FLASH, tmp_path)
    assert "all checked" in output and CLEAN["memcheck"] in output, output[-4000:]


def test_gemm_is_clean_on_both_paths(tmp_path: Path) -> None:
    output = sanitize("memcheck", f"GEMM_OP = {str(ROOT / 'examples/gemm/gemm.py') + ':op'!r}\n{GEMM}", tmp_path)
    assert "all checked" in output and CLEAN["memcheck"] in output, output[-4000:]


@pytest.mark.parametrize("check", CLEAN)
def test_a_planted_mistake_is_reported(check: str, tmp_path: Path) -> None:
    output = sanitize(check, f"BODY = {BODIES[check]!r}\n{PLANTED}", tmp_path)
    assert SEEN[check] in output and CLEAN[check] not in output, output[-4000:]
    output = sanitize(check, f"BODY = {BODIES['right']!r}\n{PLANTED}", tmp_path)
    assert "all checked" in output and CLEAN[check] in output, output[-4000:]
