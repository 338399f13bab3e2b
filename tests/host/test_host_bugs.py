"""Planted bugs: each ends as a LaunchError that names the kernel's line, and never harms this process."""

from __future__ import annotations

import time

import numpy as np
import pytest

from vidrial.errors import LaunchError
from vidrial.host.target import SCHEDULES, HostBinary, Schedule, compile_host

HEAD = """#include <vidrial/prelude.cuh>
#pragma nv_hdrstop
#include <vidrial/arch/shared_memory.cuh>
#define SHARED(s) VIDRIAL_SHARED_MEMORY(raw) float* const s = reinterpret_cast<float*>(raw);
struct Args { float* x; int n; };
#line 1 "bug.cu"
extern "C" __global__ void __launch_bounds__(128) bug(__grid_constant__ Args const args) {
  int const t = threadIdx.x, n = args.n; float* const x = args.x;"""

# name -> (sanitizer, what the message says, body); the line marked BUG must be named.
BUGS: dict[str, tuple[str | None, str, str]] = {
    "missing barrier": (
        "thread",
        "data race",
        """
SHARED(s)
s[t] = x[t]; // BUG
x[t] = s[127 - t];
""",
    ),
    "missing warp barrier": (
        "thread",
        "data race",
        """
__shared__ float s[128];
s[t] = x[t]; // BUG
x[t] = s[t ^ 1];
""",
    ),
    "cp.async overwrites what others read": (
        "thread",
        "data race",
        """
SHARED(s)
s[t] = x[t];
__syncthreads();
float const y = s[127 - t];
cute::SM80_CP_ASYNC_CACHEALWAYS<float>::copy(x[t], s[t]); // BUG
cute::cp_async_wait<0>();
__syncthreads();
x[t] = y + s[t];
""",
    ),
    "mask off by one": (
        "address",
        "heap-buffer-overflow",
        """
if (t <= n)
  x[t] += 1; // BUG
""",
    ),
    "masked copy off by one": (
        "address",
        "heap-buffer-overflow",
        """
SHARED(s)
cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<float>::copy(x[t], s[t], t <= n); // BUG
cute::cp_async_wait<0>();
if (t < n) x[t] = s[t];
""",
    ),
    "shared memory too small, checked": (
        "address",
        "use-after-poison",
        """
VIDRIAL_SHARED_MEMORY(raw)
reinterpret_cast<float*>(raw)[t + 1] = 0; // BUG
""",
    ),
    "static array too small": (
        "address",
        "use-after-poison",
        """
__shared__ float s[100];
s[t] = x[0]; // BUG
__syncthreads(); if (t < n) x[t] = s[t];
""",
    ),
    "static array of a helper too small": (
        "address",
        "use-after-poison",
        """
struct F { static float f(float v) { __shared__ float parts[100]; __shared__ float other[128];
other[threadIdx.x] = v;
float* const p = parts;
p[threadIdx.x] = v; // BUG
__syncthreads(); return p[0] + other[0]; } };
x[0] = F::f(x[0]);
""",
    ),
    "static array of a template too small": (
        "address",
        "use-after-poison",
        """
auto const f = [](auto v) { __shared__ decltype(v) parts[100], last;
last = v;
parts[threadIdx.x] = v; // BUG
__syncthreads(); return parts[0] + last; };
x[0] = f(x[0]);
""",
    ),
    "registers too few": (
        "address",
        "stack-buffer-overflow",
        """
float r[4];
for (int i = 0; i <= n / 25; ++i) r[i] = x[0]; // BUG
x[0] = r[n & 3];
""",
    ),
    "divergent barrier": (
        None,
        "barrier divergence: threads 0-95 wait",
        """
if (t < 96)
  __syncthreads();
else
  __syncthreads(); // BUG
""",
    ),
    "early return": (
        None,
        "threads 100-127: have returned",
        """
if (t >= n) return;
__syncthreads(); // BUG
""",
    ),
    "half a warp shuffles": (
        None,
        "threads 0-15: wait in a shuffle",
        """
float v = t;
if (t < 16) v = __shfl_xor_sync(0xffffffffu, v, 1); // BUG
x[0] = v;
""",
    ),
    "other collectives": (
        None,
        "warp divergence",
        """
if (t % 32 < 16)
  x[t] = __shfl_xor_sync(0xffffffffu, x[t], 1);
else
  x[t] = __any_sync(0xffffffffu, t > 3); // BUG
""",
    ),
    "misaligned ldmatrix": (
        None,
        "is not a multiple of 16",
        """
VIDRIAL_SHARED_MEMORY(raw)
uint32_t r;
cute::SM75_U32x1_LDSM_N::copy(*(cute::uint128_t*)(raw + 8), r); // BUG
x[t] = r;
""",
    ),
    "ldmatrix past the end": (
        None,
        "not in shared memory",
        """
VIDRIAL_SHARED_MEMORY(raw)
uint32_t r;
cute::SM75_U32x1_LDSM_N::copy(*(cute::uint128_t*)(raw + 512), r); // BUG
x[t] = r;
""",
    ),
    "misaligned cp.async": (
        None,
        "the global address .* is not a multiple of its 8 bytes",
        """
VIDRIAL_SHARED_MEMORY(raw)
cute::SM80_CP_ASYNC_CACHEALWAYS<double>::copy(*(double*)(x + t), *(double*)(raw + 8 * (t % 64))); // BUG
""",
    ),
    "atom without emulation": (
        None,
        "not emulated on the host: .*movmatrix",
        """
uint32_t d;
cute::SM75_U32x1_MOVM_T::copy(t, d); // BUG
x[t] = d;
""",
    ),
    "null pointer": (
        None,
        "Segmentation fault",
        """
float* p = nullptr;
if (n == 100) p[t] = 1; // BUG
""",
    ),
    "wild shared address": (
        None,
        "Segmentation fault",
        """
VIDRIAL_SHARED_MEMORY(raw)
raw[0x7fffffffu & (n * 100000u)] = 1; // BUG
""",
    ),
    "endless loop": (
        None,
        "ran out of time",
        """
volatile int go = 1;
while (go) {} // BUG
""",
    ),
    "endless recursion": (
        None,
        "Segmentation fault",
        """
struct F { static float f(float volatile v) { return v + f(v + 1) * v; } }; // BUG
x[0] = F::f(x[1]);
""",
    ),
    "misaligned vector": (
        "undefined",
        "misaligned address",
        """
VIDRIAL_SHARED_MEMORY(raw)
float4 v = *reinterpret_cast<float4*>(raw + 4); // BUG
x[t] = v.x;
""",
    ),
}


def build(body: str, sanitizer: str | None = None, includes: str = "") -> HostBinary:
    return compile_host(
        HEAD.replace("struct Args", includes + "struct Args", 1) + body + "\n}\n", "bug", sanitizer=sanitizer, pch=sanitizer != "undefined"
    )


def launch(binary: HostBinary, x: np.ndarray, schedule: Schedule = SCHEDULES[0], shared_bytes: int = 512) -> None:
    packed = bytes(8) + np.array([100, 0], np.int32).tobytes()
    binary.launch((1,), 128, shared_bytes, packed, {0: x}, schedule)


@pytest.mark.parametrize("bug", BUGS)
def test_caught_with_its_line(bug: str) -> None:
    sanitizer, message, body = BUGS[bug]
    line = 2 + next(i for i, text in enumerate(body.splitlines()) if "// BUG" in text)
    x = np.ones(100 if sanitizer == "address" else 128, np.float32)
    with pytest.raises(LaunchError, match=message) as caught:
        launch(build(body, sanitizer), x, Schedule(timeout=0.5 if bug == "endless loop" else 60.0))
    summary = str(caught.value).partition("whole report")[0]
    assert f"bug.cu:{line}" in summary, summary


COPY = """
SHARED(s)
cute::SM80_CP_ASYNC_CACHEALWAYS<float>::copy(x[t], s[127 - t]);
cute::cp_async_fence();
{wait}
{barrier}
x[t] = s[t];
"""


def test_a_missing_wait_shows_when_copies_land_late() -> None:
    x = np.arange(128, dtype=np.float32)
    launch(build(COPY.format(wait="cute::cp_async_wait<0>();", barrier="__syncthreads();")), x)
    assert (x == np.arange(127, -1, -1)).all()
    launch(build(COPY.format(wait="cute::cp_async_wait<1>();", barrier="__syncthreads();")), x)
    assert np.isnan(x).all()


def test_a_missing_barrier_shows_in_the_values() -> None:
    binary = build(COPY.format(wait="cute::cp_async_wait<0>();", barrier=""))
    for schedule in SCHEDULES:
        x = np.arange(128, dtype=np.float32)
        launch(binary, x, schedule)
        assert np.isnan(x).any()


def test_shared_memory_overflow_without_a_sanitizer() -> None:
    binary = build("\nVIDRIAL_SHARED_MEMORY(raw)\nreinterpret_cast<float*>(raw)[t] = 1;")
    launch(binary, np.zeros(128, np.float32))
    with pytest.raises(LaunchError, match=r"written right behind its end \(the launch asked for 508 bytes\)"):
        launch(binary, np.zeros(128, np.float32), shared_bytes=508)


def test_global_overflow_without_a_sanitizer() -> None:
    with pytest.raises(LaunchError, match="offset 0 of the arguments was written right behind its end"):
        launch(build("\nx[t] = 1;"), np.zeros(127, np.float32))


def test_unwritten_shared_memory_is_nan_for_each_cta() -> None:
    binary = build(
        "\nSHARED(s) __shared__ float fixed[128];\nfloat const y = s[t] + fixed[t];\ns[t] = fixed[t] = 1;\nif (blockIdx.x == 1) x[t] = y;"
    )
    x = np.zeros(128, np.float32)
    binary.launch((2,), 128, 512, bytes(16), {0: x})
    assert np.isnan(x).all()


STATIC = """#include <vidrial/prelude.cuh>
#pragma nv_hdrstop
struct Args { float* x; int n; };
CUTE_DEVICE float first_of(float v, int n) {
  __shared__ float4 parts[25];
  reinterpret_cast<float*>(parts)[n] = v;
  __syncthreads();
  return parts[0].x;
}
template <int N> CUTE_DEVICE float last_of(float v, int n) {
  __shared__ float parts[N];
  parts[n] = v;
  __syncthreads();
  return parts[N - 1];
}
__shared__ double of_all[3];
extern "C" __global__ void __launch_bounds__(128) bug(__grid_constant__ Args const args) {
  __shared__ float own[128]; __shared__ char c;
  int const t = threadIdx.x;
  own[t] = args.x[t];
  if (t == 0) c = 1, of_all[2] = 2;
  float const first = first_of(own[t], min(t, args.n)), last = last_of<100>(own[t], min(t, args.n)) + last_of<128>(own[t], t);
  __syncthreads();
  args.x[t] = first + last + c + of_all[2] + own[127 - t];
}
"""


@pytest.mark.parametrize("sanitizer", [None, "address", "undefined"])
def test_static_arrays_of_a_kernel_and_of_its_helpers(sanitizer: str | None) -> None:
    """In one source, each with a value of its own; a byte too far in any of them is found, without a sanitizer once the CTA has ended."""
    binary = compile_host(STATIC, "bug", sanitizer=sanitizer, pch=sanitizer != "undefined")
    x = np.arange(128, dtype=np.float32)
    binary.launch((1,), 128, 0, bytes(8) + np.array([99, 0], np.int32).tobytes(), {0: x})
    # Threads from 99 on write the same place: the last one of the order wins.
    assert (x == 0 + 127 + 127 + 1 + 2 + np.arange(127, -1, -1)).all()
    said = {
        None: r"static array (first_of|last_of<100>)\(float, int\)::parts was written right behind its end \(it has 400 bytes\)",
        "address": "use-after-poison",
    }
    if sanitizer in said:
        with pytest.raises(LaunchError, match=said[sanitizer]):
            binary.launch((1,), 128, 0, bytes(8) + np.array([100, 0], np.int32).tobytes(), {0: x})


def test_what_a_kernel_prints_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    binary = build('\nif (t == 3) printf("thread %d of %g\\n", t, x[t]);\nif (n == 7 && t == 9) __shfl_xor_sync(1u << 31, t, 1);')
    launch(binary, np.full(128, 2.5, np.float32))
    assert capfd.readouterr() == ("", "thread 3 of 2.5\n")
    with pytest.raises(LaunchError, match="is not in its own mask"):
        binary.launch((1,), 128, 0, bytes(8) + np.array([7, 0], np.int32).tobytes(), {0: np.full(128, 2.5, np.float32)})
    assert "thread 3 of 2.5" in capfd.readouterr().err


def test_a_clean_kernel_passes_every_sanitizer() -> None:
    body = COPY.format(wait="cute::cp_async_wait<0>();", barrier="__syncthreads();") + "__syncwarp(); atomicAdd(x + t / 2, 1.0f);"
    for sanitizer in (None, "address", "thread"):
        binary = build(body.replace("x[t] = s[t];", "float y = s[t];\n__syncthreads();\nx[t] = y;\n__syncthreads();"), sanitizer)
        for schedule in SCHEDULES:
            x = np.arange(128, dtype=np.float32)
            launch(binary, x, schedule)
            assert (x == np.arange(127, -1, -1) + 2.0 * (np.arange(128) < 64)).all()


def test_the_time_limit_is_kept() -> None:
    start = time.monotonic()
    with pytest.raises(LaunchError, match=r"block \(0, 0, 0\), thread \(0, 0, 0\): the launch ran out of time"):
        launch(build("\nvolatile int go = 1;\nwhile (go) {} // BUG"), np.zeros(128, np.float32), Schedule(timeout=0.3))
    assert time.monotonic() - start < 10
