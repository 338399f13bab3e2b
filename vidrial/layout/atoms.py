"""The instruction tables: matrix multiplications and copies, with shape, types, thread-value layouts and smallest architecture.

Thread-value layouts are those of CuTe's `MMA_Traits`: (thread, value) -> index in the operand, first coordinate contiguous
(m of A and C, n of B).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Literal

from vidrial.dtypes import DType
from vidrial.errors import LayoutError
from vidrial.layout.algebra import Layout


@dataclasses.dataclass(frozen=True)
class MmaAtom:
    """One matrix instruction: `C (m x n) += A (m x k) B (n x k)^T`.

    `a_layout`, `b_layout` and `c_layout` take (thread, value) to m + M k, n + N k and m + M n (an operand in shared memory: every
    thread to all of it); `arch` is the smallest architecture (80 for sm_80); `kind` is the path that issues it. `definition`: C++ that
    stands in a source before what uses the atom, empty where Vidrial's headers have it.
    """

    name: str
    cpp: str
    shape: tuple[int, int, int]
    a: DType
    b: DType
    c: DType
    a_layout: Layout
    b_layout: Layout
    c_layout: Layout
    arch: int = 80
    kind: Literal["mma.sync", "wgmma"] = "mma.sync"
    definition: str = ""


@dataclasses.dataclass(frozen=True)
class CopyAtom:
    """One copy instruction; `bytes` is what a thread receives or moves.

    `matrices` (8 x 8 elements of 16 bits) and `transposed` belong to ldmatrix, `zero_fill` to cp.async (bytes that a false
    predicate turns into zeros, without reading); `arch` is the smallest architecture.
    """

    name: str
    cpp: str
    kind: Literal["ldmatrix", "cp.async", "vector"]
    bytes: int
    arch: int
    matrices: int = 0
    transposed: bool = False
    zero_fill: bool = False


_CPP_FRAGMENT = {DType.bfloat16: "BF16", DType.float16: "F16"}
_ROW_16x8 = Layout(((4, 8), (2, 2)), ((32, 1), (16, 8)))


def _mma_sync(k: int, dtype: DType, a_layout: Layout, b_layout: Layout) -> MmaAtom:
    types = f"F32{_CPP_FRAGMENT[dtype] * 2}F32"
    return MmaAtom(
        name=f"mma.sync.m16n8k{k}.{dtype}",
        cpp=f"cute::SM80_16x8x{k}_{types}_TN",
        shape=(16, 8, k),
        a=dtype,
        b=dtype,
        c=DType.float32,
        a_layout=a_layout,
        b_layout=b_layout,
        c_layout=_ROW_16x8,
    )


# mma.sync, float32 accumulators, by the element type of A and B.
MMA_16x8x16: Mapping[DType, MmaAtom] = {
    dtype: _mma_sync(16, dtype, Layout(((4, 8), (2, 2, 2)), ((32, 1), (16, 8, 128))), Layout(((4, 8), (2, 2)), ((16, 1), (8, 64))))
    for dtype in _CPP_FRAGMENT
}
MMA_16x8x8: Mapping[DType, MmaAtom] = {dtype: _mma_sync(8, dtype, _ROW_16x8, Layout(((4, 8), 2), ((16, 1), 8))) for dtype in _CPP_FRAGMENT}
# n of a wgmma: the accumulator has n / 2 registers per thread.
WGMMA_N = tuple(range(8, 257, 8))
_WGMMA_TYPE = {DType.bfloat16: "bf16", DType.float16: "f16"}


@cache
def wgmma(n: int, dtype: DType, *, a_shared: bool = False, b_transposed: bool = False) -> MmaAtom:
    """wgmma.m64 x n x k16, float32 accumulators, by a warpgroup: A in registers, or in shared memory (rows of k); B in shared memory.

    `b_transposed`: rows of B in shared memory run along n, not k.

    Raises:
        LayoutError: another n or element type is asked for.
    """
    if n not in WGMMA_N or dtype not in _WGMMA_TYPE:
        raise LayoutError(
            f"wgmma of n={n} {dtype} is not served; accepted: n a multiple of 8 from 8 to 256, of {', '.join(map(str, _WGMMA_TYPE))}"
        )
    warpgroup, value = ((4, 8, 4), (128, 1, 16)), (64, 8, 512)
    name = f"wgmma.m64n{n}k16.{dtype}{'.ss' if a_shared else ''}{'.trans' if b_transposed else ''}"
    cpp = f"vidrial::Wgmma<{n}, {dtype.cpp}, {str(a_shared).lower()}, {str(b_transposed).lower()}>"
    return MmaAtom(
        name=name,
        cpp=cpp,
        shape=(64, n, 16),
        a=dtype,
        b=dtype,
        c=DType.float32,
        a_layout=Layout((128, (64, 16)), (0, (1, 64))) if a_shared else Layout((warpgroup[0], (2, 2, 2)), (warpgroup[1], value)),
        b_layout=Layout((128, (n, 16)), (0, (1, n))),
        c_layout=Layout((warpgroup[0], (2, 2, n // 8)), (warpgroup[1], value)),
        arch=90,
        kind="wgmma",
        definition=_wgmma_definition(name, cpp, n, _WGMMA_TYPE[dtype], a_shared, b_transposed),
    )


def _wgmma_definition(name: str, cpp: str, n: int, element: str, a_shared: bool, b_transposed: bool) -> str:
    """The specialisation of `vidrial::Wgmma` for NVRTC; the host target has one for all.

    The instruction takes each accumulator as an operand of its own, so its text depends on n: it is written out for the n in use.
    """
    registers = n // 2

    def operands(first: int, count: int) -> str:
        return ", ".join(f"%{first + i}" for i in range(count))

    sources = 1 if a_shared else 4
    a, parameter = ('"l"(a)', "uint64_t a") if a_shared else (", ".join(f'"r"(a[{i}])' for i in range(4)), "uint32_t const (&a)[4]")
    a_operand = f"%{registers}" if a_shared else f"{{{operands(registers, 4)}}}"
    b, scale = registers + sources, registers + sources + 1
    # Signs of A and B, then whether A (in shared memory) and B are transposed.
    constants = ["1", "1", *(["0"] if a_shared else []), str(int(b_transposed))]
    text = (
        f"{{.reg .pred p; setp.ne.b32 p, %{scale}, 0; wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{element}.{element} "
        f"{{{operands(0, registers)}}}, {a_operand}, %{b}, p, {operands(scale + 1, len(constants))};}}"
    )
    accumulators = ", ".join(f'"+f"(c[{v // 4}][{v % 4}])' for v in range(registers))
    return f"""#ifdef __CUDACC_RTC__
// {name}
template <> struct {cpp} {{
  CUTE_DEVICE static void fma(float (&c)[{n // 8}][4], {parameter}, uint64_t b, int accumulate = 1) {{
    asm volatile("{text}"
                 : {accumulators}
                 : {a}, "l"(b), "r"(accumulate), {", ".join(f'"n"({value})' for value in constants)});
  }}
}};
#endif"""


_VECTOR_CPP = {2: "uint16_t", 4: "uint32_t", 8: "uint64_t", 16: "cute::uint128_t"}
# By (matrices, transposed).
LDMATRIX: Mapping[tuple[int, bool], CopyAtom] = {
    (count, transposed): CopyAtom(
        name=f"ldmatrix.x{count}{'.trans' if transposed else ''}",
        cpp=f"cute::SM75_U16x{2 * count}_LDSM_T" if transposed else f"cute::SM75_U32x{count}_LDSM_N",
        kind="ldmatrix",
        bytes=4 * count,
        arch=75,
        matrices=count,
        transposed=transposed,
    )
    for count in (1, 2, 4)
    for transposed in (False, True)
}
# By (bytes, zero fill). Only 16 bytes may bypass L1.
CP_ASYNC: Mapping[tuple[int, bool], CopyAtom] = {
    (size, zero_fill): CopyAtom(
        name=f"cp.async.{'cg' if size == 16 else 'ca'}.{size}{'.zfill' if zero_fill else ''}",
        cpp=f"cute::SM80_CP_ASYNC_CACHE{'GLOBAL' if size == 16 else 'ALWAYS'}{'_ZFILL' if zero_fill else ''}<{_VECTOR_CPP[size]}>",
        kind="cp.async",
        bytes=size,
        arch=80,
        zero_fill=zero_fill,
    )
    for size in (4, 8, 16)
    for zero_fill in (False, True)
}
# Plain loads and stores, by bytes.
VECTOR: Mapping[int, CopyAtom] = {
    size: CopyAtom(name=f"vector.{size}", cpp=f"cute::UniversalCopy<{cpp}>", kind="vector", bytes=size, arch=70)
    for size, cpp in _VECTOR_CPP.items()
}


def ldmatrix(matrices: int = 4, transposed: bool = False) -> CopyAtom:
    """The ldmatrix that fills `matrices` registers per thread.

    Raises:
        LayoutError: `matrices` is not 1, 2 or 4.
    """
    if (matrices, transposed) not in LDMATRIX:
        raise LayoutError(f"ldmatrix of {matrices} matrices does not exist; accepted: 1, 2, 4")
    return LDMATRIX[matrices, transposed]


def cp_async(bytes: int = 16, zero_fill: bool = True) -> CopyAtom:
    """The cp.async of `bytes` bytes per thread.

    Raises:
        LayoutError: `bytes` is not 4, 8 or 16.
    """
    if (bytes, zero_fill) not in CP_ASYNC:
        raise LayoutError(f"cp.async of {bytes} bytes does not exist; accepted: 4, 8, 16")
    return CP_ASYNC[bytes, zero_fill]
