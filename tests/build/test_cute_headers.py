"""The names that stand in for CuTe's headers (vidrial/arch/cute.cuh) mean what CuTe means: the same instructions come of either."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from benchmarks.compile import Unit, units
from vidrial.build.nvrtc import compile_source
from vidrial.layout.atoms import CP_ASYNC, LDMATRIX, VECTOR, MMA_16x8x8, MMA_16x8x16

# Before the prelude: it then takes CuTe's own headers.
CUTE = "#include <cute/layout.hpp>\n"


def code(image: bytes) -> dict[str, bytes]:
    """The instructions of each kernel in a cubin: its sections `.text.NAME`."""
    (table,) = struct.unpack_from("<Q", image, 40)
    size, count, names = struct.unpack_from("<3H", image, 58)
    sections = [struct.unpack_from("<2I4Q", image, table + size * i) for i in range(count)]

    def name(section: tuple[Any, ...]) -> str:
        start = sections[names][4] + section[0]
        return image[start : image.index(b"\0", start)].decode()

    return {name(section): image[section[4] : section[4] + section[5]] for section in sections if name(section).startswith(".text.")}


@pytest.mark.parametrize("unit", units(("sm_90a",), (64, 128), False), ids=lambda unit: f"{unit.name} {unit.config}")
def test_a_kernel(unit: Unit) -> None:
    text, name, folders = unit.source.text, unit.source.entry, unit.source.include_dirs
    ours, cute = (compile_source(head + text, name, unit.arch, includes=folders) for head in ("", CUTE))
    assert list(code(ours.image)) == [f".text.{name}"]
    assert code(ours.image) == code(cute.image)
    assert ours.resources.registers == cute.resources.registers
    # What else CuTe's headers leave in a binary: the constants that they define.
    assert len(ours.image) < len(cute.image)


def call(atom: str, outputs: str, inputs: str) -> str:
    return f"""#include <vidrial/prelude.cuh>
extern "C" __global__ void k(uint32_t* x) {{
  __shared__ uint4 tile[32];
  uint32_t r[16]; float f[8];
  for (int i = 0; i < 16; ++i) r[i] = x[32 * i + threadIdx.x];
  for (int i = 0; i < 8; ++i) f[i] = __uint_as_float(x[32 * (16 + i) + threadIdx.x]);
  cute::uint128_t& row = reinterpret_cast<cute::uint128_t&>(tile[threadIdx.x]);
  tile[threadIdx.x] = reinterpret_cast<uint4*>(x)[threadIdx.x];
  __syncthreads();
  {atom}({outputs}{inputs});
  cute::cp_async_fence(); cute::cp_async_wait<1>(); cute::cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 16; ++i) x[32 * i + threadIdx.x] = r[i] + __float_as_uint(f[i % 8]);
  reinterpret_cast<uint4*>(x)[threadIdx.x] = tile[threadIdx.x ^ 1];
}}"""


def registers(name: str, first: int, count: int) -> str:
    return ", ".join(f"{name}[{first + i}]" for i in range(count))


CALLS = {
    **{
        atom.name: call(f"{atom.cpp}::fma", registers("f", 0, 4), f", {registers('r', 0, atom.shape[2] * 3 // 8)}, {registers('f', 4, 4)}")
        for atom in (*MMA_16x8x16.values(), *MMA_16x8x8.values())
    },
    **{atom.name: call(f"{atom.cpp}::copy", "row, ", registers("r", 0, atom.matrices)) for atom in LDMATRIX.values()},
    **{
        atom.name: call(
            f"{atom.cpp}::copy",
            f"*reinterpret_cast<{(vector := atom.cpp[atom.cpp.index('<') + 1 : -1])}*>(x + 4 * r[0]), *reinterpret_cast<{vector}*>(&row)",
            ", r[1] > 7" * atom.zero_fill,
        )
        for atom in (*CP_ASYNC.values(), *VECTOR.values())
    },
}


@pytest.mark.parametrize("name", CALLS)
def test_an_atom(name: str) -> None:
    ours, cute = (code(compile_source(head + CALLS[name], name, "sm_80").image) for head in ("", CUTE))
    assert ours == cute and len(ours[".text.k"]) > 16 * 60


def test_the_comparison_sees_a_difference() -> None:
    kernel = 'extern "C" __global__ void k(float* x) {{ x[threadIdx.x] {} 2.f; }}'
    assert code(compile_source(kernel.format("*="), "k", "sm_80").image) != code(compile_source(kernel.format("+="), "k", "sm_80").image)


def test_a_kernel_may_take_all_of_cute() -> None:
    source = """#include <cute/tensor.hpp>
#include <vidrial/prelude.cuh>
#pragma nv_hdrstop
using Layout = cute::Layout<cute::Shape<cute::Int<8>, cute::Int<4>>, cute::Stride<cute::Int<4>, cute::Int<1>>>;
extern "C" __global__ void k(int* x) {
  static_assert(vidrial::Plane<Layout>::at(3, 2) == Layout{}(3, 2));
  x[threadIdx.x] = cute::make_tensor(cute::make_gmem_ptr(x), Layout{})(threadIdx.x % 8, 0);
}"""
    assert code(compile_source(source, "k", "sm_90a").image)
