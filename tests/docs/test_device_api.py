"""docs/device_api.md names the functions of CUDA that the host target has, all that threads use together, and none that it lacks."""

from __future__ import annotations

import re

import pytest
from pages import ROOT

from vidrial.build.nvrtc import compile_source
from vidrial.errors import CompileError
from vidrial.host.target import compile_host

SECTION = (ROOT / "docs/device_api.md").read_text().partition("## CUDA C++\n")[2].partition("\n## ")[0]
NAMED = set(re.findall(r"`((?:__|atomic)\w+)`", SECTION))
HEADERS = "".join((ROOT / f"templates/include/vidrial/host/{name}.h").read_text() for name in ("cuda_functions", "cuda_shim"))


def declared(text: str) -> set[str]:
    return set(re.findall(r"(?:VIDRIAL_INLINE|inline) [\w ]*?\b((?:__|atomic)\w+)\(", text))


def test_every_function_that_is_named_is_there() -> None:
    assert len(NAMED) > 30
    assert not NAMED - declared(HEADERS)


def test_every_function_that_threads_use_together_is_named() -> None:
    together = {name for name in declared(HEADERS) if re.match("atomic[A-Z]", name) or "sync" in name}
    assert len(together) >= 14
    assert not together - NAMED


KERNEL = """#include <vidrial/prelude.cuh>
#pragma nv_hdrstop
#include <vidrial/arch/ptx.cuh>
struct alignas(8) Args {{ float* y; }};
CUTE_DEVICE float twice(float x) {{ return 2 * x; }}
__shared__ float sums[2];
extern "C" __global__ void __launch_bounds__(64) example(__grid_constant__ Args const args) {{
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) sums[i] = twice(rsqrtf(float(cutlass::half_t(4.f))));
  assert(threadIdx.x < blockDim.x);
  args.y[0] = {};
}}
"""


@pytest.mark.parametrize(
    "expression", ["vidrial::bits_as_float(0x7f800000)", "fmaf(expf(1.f), __fdividef(1.f, 2.f), sums[0])", "float(warpSize + gridDim.x)"]
)
def test_both_targets_take_it(expression: str) -> None:
    compile_host(KERNEL.format(expression), "example")
    compile_source(KERNEL.format(expression), "example", "sm_80")


def test_nvrtc_has_no_infinity() -> None:
    with pytest.raises(CompileError, match="INFINITY"):
        compile_source(KERNEL.format("INFINITY"), "example", "sm_80")


def test_another_function_is_not_declared_on_the_host() -> None:
    with pytest.raises(CompileError, match="'__reduce_add_sync' was not declared"):
        compile_host(KERNEL.format("__reduce_add_sync(~0u, 1)"), "example")
