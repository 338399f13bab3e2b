from __future__ import annotations

import struct
import time
from typing import Any

import pytest

from vidrial.build.nvrtc import Cubin, compile_source
from vidrial.device import Device
from vidrial.errors import LaunchError
from vidrial.runtime.launch import Binary
from vidrial.spec.geometry import Geometry

SOURCE = """
struct Args { float* out; long long n; float scale; int bias; };
extern "C" __global__ void axpb(__grid_constant__ Args const args) {
  extern __shared__ float row[];
  long long const i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  row[threadIdx.x] = args.scale * float(i);
  __syncthreads();
  if (i < args.n) args.out[i] = row[threadIdx.x] + float(args.bias);
}
"""


def pack(out: Any, scale: float = 0.5, bias: int = 3) -> bytearray:
    return bytearray(struct.pack("@Pqfi", out.data.ptr, out.size, scale, bias))


@pytest.fixture(scope="module")
def cubin() -> Cubin:
    return compile_source(SOURCE, "axpb", Device.current().arch)


@pytest.mark.parametrize("smem", [512, 48 << 10, 64 << 10, 99 << 10])
@pytest.mark.parametrize("n", [1, 37, 1023, 100_003])
def test_launch(cubin: Cubin, n: int, smem: int) -> None:
    import cupy

    out = cupy.full(n + 8, cupy.nan, dtype=cupy.float32)
    Binary.load(cubin, "axpb").launch(Geometry((-(-n // 128), 1, 1), 128, smem), pack(out[:n]), 0)
    expected = cupy.arange(n, dtype=cupy.float32) * 0.5 + 3
    assert bool((out[:n] == expected).all()) and bool(cupy.isnan(out[n:]).all())


def test_launch_is_ordered_on_its_stream(cubin: Cubin) -> None:
    import cupy

    binary, stream = Binary.load(cubin, "axpb"), cupy.cuda.Stream(non_blocking=True)
    with stream:
        out = cupy.zeros(100_003, dtype=cupy.float32)
        for bias in range(200):
            binary.launch(Geometry((782, 1, 1), 128, 512), pack(out, bias=bias), stream.ptr)
        copy = out.copy()
    stream.synchronize()
    assert bool((copy == cupy.arange(100_003, dtype=cupy.float32) * 0.5 + 199).all())


def test_errors(cubin: Cubin) -> None:
    import cupy

    device, out = Device.current(), cupy.zeros(4, dtype=cupy.float32)
    binary = Binary.load(cubin, "axpb")
    assert binary.smem_limit == device.smem_per_block
    with pytest.raises(LaunchError, match="dynamic shared memory"):
        binary.launch(Geometry((1, 1, 1), 128, device.smem_per_block + 1), pack(out), 0)
    with pytest.raises(LaunchError, match="no_such_entry"):
        Binary.load(cubin, "no_such_entry")
    other = compile_source(SOURCE, "axpb", "sm_120" if device.capability < 120 else "sm_80")
    with pytest.raises(LaunchError, match="does not load.*architecture"):
        Binary.load(other, "axpb")


def test_host_time_of_a_launch(cubin: Cubin) -> None:
    import cupy

    binary, out = Binary.load(cubin, "axpb"), cupy.zeros(4, dtype=cupy.float32)
    geometry, packed = Geometry((1, 1, 1), 128, 512), pack(out)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(50):
            binary.launch(geometry, packed, 0)
        seconds.append((time.perf_counter() - start) / 50)
        cupy.cuda.Device().synchronize()
    assert min(seconds) < 20e-6


def test_current_device_has_facts() -> None:
    device = Device.current()
    assert device.sms > 0 and device.l2_bytes > 1 << 20 and device.bandwidth_gbs > 100 and device.tensor_tflops > 10
    assert 0 < device.smem_per_sm - device.smem_per_block <= 1024
    assert Device.default() == device and device.key.startswith(device.arch)
