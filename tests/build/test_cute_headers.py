"""The names that stand in for CuTe's headers (vidrial/arch/cute.cuh) mean what CuTe means: the same instructions come of either."""

from __future__ import annotations

import dataclasses
import itertools
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from cute_names import EXTENDED, cute_wgmma
from machine_code import TABLE, Table, render

from benchmarks.compile import Unit, units
from vidrial.build.nvrtc import compile_source
from vidrial.build.toolchain import Toolchain
from vidrial.dtypes import DType
from vidrial.errors import CompileError
from vidrial.layout.atoms import CP_ASYNC, LDMATRIX, VECTOR, WGMMA_N, MMA_16x8x8, MMA_16x8x16, MmaAtom, wgmma

PICKED = [entry for entry in Table.read(TABLE).kernels if entry.picked]
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


WGMMA = [
    wgmma(n, dtype, a_shared=a_shared, b_transposed=b_transposed)
    for n, dtype, a_shared, b_transposed in itertools.product(WGMMA_N, (DType.bfloat16, DType.float16), (False, True), (False, True))
]


def assembly(text: str) -> str:
    """What the first asm statement of a text says, numbers of operands and white space aside, then its operands' kinds in their order."""
    statement = text[text.index("asm volatile(") : text.index(");\n", text.index("asm volatile("))]
    quoted = re.findall(r'"([^"]*)"\s*(\(?)', statement)
    instruction = "".join(text for text, operand in quoted if not operand).replace("\\n", "")
    return " ".join([re.sub(r"\s", "", instruction), *(kind for kind, operand in quoted if operand)])


def test_the_wgmma_of_every_n_is_cutes() -> None:
    """Text against text: all 256 that Vidrial renders, beside CuTe's headers."""
    (cutlass,) = (folder for folder in Toolchain.find().includes if (Path(folder) / "cute/arch/mma_sm90_gmma.hpp").is_file())
    headers = "".join((Path(cutlass) / f"cute/arch/mma_sm90_gmma{part}.hpp").read_text() for part in ("", "_ext"))
    structs = dict(re.findall(r"^struct (MMA_64x\w+)\n\{(.*?)^\};", headers, re.MULTILINE | re.DOTALL))
    for atom in WGMMA:
        theirs = structs[re.findall(r"MMA_\w+", cute_wgmma(atom))[0]]
        assert assembly(atom.definition) == assembly(theirs), atom.name
    assert len({assembly(atom.definition) for atom in WGMMA}) == len(WGMMA) // 2  # a transposed B is a constant among the operands


def wgmma_kernel(atom: MmaAtom, ours: bool) -> str:
    """Two instructions on one accumulator, the first one of which sets it."""
    n, shared = atom.shape[1], ".ss" in atom.name
    a = "a64" if shared else "a" if ours else "a[0], a[1], a[2], a[3]"
    c = "c" if ours else ", ".join(f"c[{v // 4}][{v % 4}]" for v in range(n // 2))
    call = f"{atom.cpp if ours else cute_wgmma(atom)}::fma("
    scale = ("0", "1") if ours else tuple(f"cute::SM90::GMMA::ScaleOut::{x}" for x in ("Zero", "One"))
    prefix = "vidrial::warpgroup_" if ours else "cute::warpgroup_"
    fmas = [call + (f"c, {a}, b, {s});" if ours else f"{a}, b, {c}, {s});") for s in scale]
    return f"""{atom.definition if ours else ""}
extern "C" __global__ void __launch_bounds__(128) k(float* x, uint32_t* y) {{
  uint32_t a[4]; float c[{n // 8}][4];
  for (int i = 0; i < 4; ++i) a[i] = y[128 * i + threadIdx.x];
  for (int i = 0; i < {n // 2}; ++i) c[i / 4][i % 4] = 0.f;
  uint64_t const b = 0x4000004000010000ull, a64 = 0x4000004000010010ull;
  {prefix}arrive();
  {fmas[0]}
  {fmas[1]}
  {prefix}{"commit" if ours else "commit_batch"}();
  {prefix}wait<0>();
  for (int i = 0; i < {n // 2}; ++i) x[128 * i + threadIdx.x] = c[i / 4][i % 4];
}}"""


SOME_WGMMA = [atom for i, atom in enumerate(WGMMA) if atom.shape[1] in (8, 80, 96, 256) and i % 3 == 0]


@pytest.mark.parametrize("atom", SOME_WGMMA, ids=lambda atom: atom.name)
def test_a_wgmma(atom: MmaAtom) -> None:
    ours = compile_source("#include <vidrial/prelude.cuh>\n#include <vidrial/tile/wgmma.cuh>\n" + wgmma_kernel(atom, True), "k", "sm_90a")
    head = f"{EXTENDED}#include <vidrial/prelude.cuh>\n#include <cute/arch/mma_sm90_gmma.hpp>\n"
    cute = compile_source(head + wgmma_kernel(atom, False), "k", "sm_90a")
    assert code(ours.image) == code(cute.image) and "wgmma" not in ours.log
    assert ours.resources.registers >= atom.shape[1] // 2


@pytest.fixture
def no_cutlass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A toolchain whose folder of CUTLASS is empty."""
    without = dataclasses.replace(Toolchain.find(), cutlass_include=tmp_path)
    monkeypatch.setattr(Toolchain, "find", lambda: without)


@pytest.mark.usefixtures("no_cutlass")
@pytest.mark.parametrize("kernel", sorted({entry.kernel for entry in PICKED}))
def test_a_kernel_needs_no_header_of_cutlass(kernel: str) -> None:
    """Under NVRTC; a kernel that asks for CuTe's own is another matter."""
    entry = next(entry for entry in PICKED if entry.kernel == kernel)
    source = render(entry.kernel, entry.problem, entry.choices)
    assert compile_source(source.text, kernel, "sm_90a", includes=source.includes).resources.registers > 0


@pytest.mark.usefixtures("no_cutlass")
def test_a_kernel_that_asks_for_cute_needs_it() -> None:
    with pytest.raises(CompileError, match=r"cute/layout\.hpp"):
        compile_source(CUTE + CALLS[next(iter(CALLS))], "k", "sm_90a")


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
