"""The Python objects against CuTe itself: one generated C++ file, compiled by the host compiler, compares every thread and atom."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from vidrial.build.toolchain import Toolchain
from vidrial.dtypes import DType
from vidrial.layout.algebra import ComposedLayout, Layout, Swizzle
from vidrial.layout.atoms import MMA_16x8x8, MMA_16x8x16, cp_async
from vidrial.layout.copies import TiledCopy
from vidrial.layout.mma import TiledMma
from vidrial.layout.smem import SmemLayout, Transposed

BF16 = DType.bfloat16

# In place of vidrial's own: shared memory is the address space itself.
INTRINSICS = """#pragma once
#include <cstdint>
namespace vidrial {
inline void* shared_pointer(uint32_t address) { return reinterpret_cast<void*>(uintptr_t(address)); }
template <int Size> void copy_async(uint32_t, void const*, int);
}
"""

CHECKS = r"""
#include <cute/tensor.hpp>
#include <cstdio>
#include <vector>
#include <vidrial/tile/mma.cuh>
using namespace cute;
static uint32_t const kBase = 1 << 20;
static long checked = 0, wrong = 0;
static void same(long ours, long theirs) { ++checked; wrong += ours != theirs; }

// An ldmatrix that tells which of its registers was filled from which address.
struct Recorder {
  using DRegisters = uint32_t[4];
  static void copy(uint128_t const& s, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
    uint32_t const p = uint32_t(reinterpret_cast<uintptr_t>(&s)) * 4;
    a = p; b = p + 1; c = p + 2; d = p + 3;
  }
};
// A cp.async that remembers.
struct Request { uintptr_t source, target; bool valid; };
static std::vector<Request> requests;
struct CopyRecorder {
  using SRegisters = uint128_t[1];
  static void copy(uint128_t const& s, uint128_t& d, bool valid) {
    requests.push_back({reinterpret_cast<uintptr_t>(&s), reinterpret_cast<uintptr_t>(&d), valid});
  }
};

template <class Operand, int Atoms, int R, class Copy, class View>
void operand(Copy copy, View view, int threads, int steps) {
  auto tile = make_tensor(make_smem_ptr(reinterpret_cast<cutlass::bfloat16_t*>(uintptr_t(kBase))), view);
  for (int t = 0; t < threads; ++t) {
    Operand load(kBase, t);
    auto part = copy.get_slice(t).partition_S(tile);
    for (int k = 0; k < steps; ++k) {
      uint32_t f[Atoms][R];
      load.load(0, k, f);
      for (int i = 0; i < Atoms; ++i) for (int r = 0; r < R; ++r) {
        // A permuted tile has several vectors of 8 in the first mode.
        int const filled = i * R + r, inner = size<0>(part) / 8, vector = filled / 4;
        same(f[i][r], uint32_t(reinterpret_cast<uintptr_t>(&part(vector % inner * 8, vector / inner, k))) * 4 + filled % 4);
      }
    }
  }
}
template <class Tile, int Rows, int Columns, bool Transposed> auto view() {
  if constexpr (Transposed) return composition(typename Tile::Layout{}, make_layout(Shape<Int<Columns>, Int<Rows>>{}, GenRowMajor{}));
  else return typename Tile::Layout{};
}
template <class Ours, class Mma> void accumulator(Mma mma, int m, int n, int threads) {
  auto coordinates = make_identity_tensor(make_shape(m, n));
  for (int t = 0; t < threads; ++t) {
    auto part = mma.get_slice(t).partition_C(coordinates);
    same(long(size<1>(part)) * 1000 + long(size<2>(part)), Ours::M * 1000 + Ours::N);
    for (int i = 0; i < Ours::M; ++i) for (int j = 0; j < Ours::N; ++j) for (int v = 0; v < 4; ++v) {
      same(Ours::row(t) + Ours::row_of(i, v), int(get<0>(part(v, i, j))));
      same(Ours::column(t) + Ours::column_of(j, v), int(get<1>(part(v, i, j))));
    }
  }
}
template <class Ours, class Tile, int Rows, int Columns, int RowStep, int Vectors> void tiled_copy(int threads) {
  using T = typename Tile::T;
  constexpr int kVector = 16 / sizeof(T);
  using Threads = Layout<Shape<Int<RowStep>, Int<Vectors>>, Stride<Int<Vectors>, _1>>;
  auto copy = make_tiled_copy(Copy_Atom<UniversalCopy<uint128_t>, T>{}, Threads{}, Layout<Shape<_1, Int<kVector>>>{});
  auto tile = make_tensor(make_smem_ptr(reinterpret_cast<T*>(uintptr_t(kBase))), typename Tile::Layout{});
  auto coordinates = make_identity_tensor(Shape<Int<Rows>, Int<Columns>>{});
  int const stride = 5 * Columns, valid = Rows - 3;
  for (int t = 0; t < threads; ++t) {
    requests.clear();
    Ours{reinterpret_cast<T const*>(uintptr_t(1 << 24)), stride, kBase, t}(Tile::kBytes, valid);
    auto target = copy.get_slice(t).partition_D(tile);
    auto source = copy.get_slice(t).partition_S(coordinates);
    same(requests.size(), size<1>(target) * size<2>(target));
    for (int i = 0; i < int(requests.size()); ++i) {
      int const row = get<0>(source(0, i, 0)), column = get<1>(source(0, i, 0));
      same(requests[i].target, reinterpret_cast<uintptr_t>(&target(0, i, 0)) + Tile::kBytes);
      same(requests[i].source, (1 << 24) + (long(row) * stride + column) * sizeof(T));
      same(requests[i].valid, row < valid);
    }
  }
}
template <class L> void print(L const& layout, int n) { for (int i = 0; i < n; ++i) std::printf("%d ", int(layout(i))); std::printf("\n"); }
template <class F> void report(char const* name, F f) { checked = wrong = 0; f(); std::printf("%s %ld %ld\n", name, checked, wrong); }
"""


def build_and_run(folder: Path, body: list[str], checks: str = CHECKS, optimise: str = "-O0") -> list[str]:
    """Lines printed by a main of these statements, `checks` before it."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    (folder / "vidrial/arch").mkdir(parents=True)
    (folder / "vidrial/arch/ptx.cuh").write_text(INTRINSICS)
    source = folder / "agreement.cpp"
    functions = [f"void f{i}() {{ {line} }}" for i, line in enumerate(body)]
    source.write_text(checks + "\n".join(functions) + "\nint main() {" + "".join(f"f{i}();" for i in range(len(body))) + "}\n")
    toolchain = Toolchain.find()
    stubs = toolchain.vidrial_include / "vidrial/host/stubs"
    includes = [f"-I{path}" for path in (folder, stubs, *toolchain.includes)]
    command = [compiler, "-std=c++17", optimise, "-w", *includes, str(source), "-o", str(folder / "agreement")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[:4000]
    return subprocess.run([str(folder / "agreement")], capture_output=True, text=True, check=True).stdout.splitlines()


def random_layout(rng: random.Random, extents: tuple[int, ...]) -> Layout:
    """Compact, padded, broadcast or permuted modes, one of them nested."""
    shape = [rng.choice(extents) for _ in range(rng.randint(1, 3))]
    order = rng.sample(range(len(shape)), len(shape))
    stride, step = [0] * len(shape), rng.choice((1, 1, 2))
    for i in order:
        stride[i] = step if rng.random() < 0.9 else 0
        step *= shape[i] * rng.choice((1, 1, 2))
    if len(shape) == 3:
        return Layout((shape[0], (shape[1], shape[2])), (stride[0], (stride[1], stride[2])))
    return Layout(tuple(shape), tuple(stride))


def layout_cases() -> list[tuple[str, list[int]]]:
    """(C++ expression, values) for evaluation and swizzling."""
    rng = random.Random(7)
    cases: list[tuple[str, list[int]]] = []
    for _ in range(30):
        a = random_layout(rng, (1, 2, 3, 4, 5, 8, 12))
        cases.append((f"{a.cpp}{{}}", list(a.indices())))
        s = Swizzle(rng.randint(1, 3), rng.randint(0, 3), 3)
        composed = ComposedLayout(s, 0, a)
        cases.append((f"{composed.cpp}{{}}", list(composed.indices())))
    return cases


def mma_cases() -> dict[str, TiledMma]:
    """Interleaved and banded warps, both operands both ways, tiles of 32, 64 and 128 columns, both depths of atom."""
    atom = MMA_16x8x16[BF16]

    def mma(warps: tuple[int, int], m: int, n: int, k: int, **options: bool) -> TiledMma:
        a = SmemLayout(BF16, k, m).transposed if options.get("a_transposed") else SmemLayout(BF16, m, k)
        b = SmemLayout(BF16, k, n).transposed if options.get("b_transposed") else SmemLayout(BF16, n, k)
        return TiledMma(atom, warps, (m, n, k), a, b, bands=options.get("bands", False))

    return {
        "2x2": mma((2, 2), 128, 128, 64),
        "4x1_k128": mma((4, 1), 128, 64, 128, b_transposed=True),
        "8x1_bands": mma((8, 1), 256, 32, 64, bands=True, b_transposed=True),
        "2x4_transposed": mma((2, 4), 64, 128, 32, a_transposed=True, b_transposed=True),
        "2x2_m16n8k8": TiledMma(MMA_16x8x8[BF16], (2, 2), (64, 64, 32), SmemLayout(BF16, 64, 32), SmemLayout(BF16, 32, 64).transposed),
    }


def mma_check(name: str, mma: TiledMma) -> str:
    """The statement that compares one TiledMma with CuTe's."""
    (m, n, _), (wm, wn), (am, an, ak) = mma.tile, mma.warps, mma.atom.shape
    per_load = {"A": 4 // (mma.atom.a_layout.mode(1).size // 2), "B": 4 // (mma.atom.b_layout.mode(1).size // 2)}
    rows = f"Int<{wm * am * per_load['A']}>"
    if mma.bands:
        rows = f"Layout<Shape<Int<{am}>, Int<{wm}>, Int<{mma.m_atoms}>>, Stride<_1, Int<{am * mma.m_atoms}>, Int<{am}>>>"
    lines = [
        f"auto mma = make_tiled_mma(MMA_Atom<{mma.atom.cpp}>{{}}, Layout<Shape<Int<{wm}>, Int<{wn}>, _1>>{{}}, "
        f"Tile<{rows}, Int<{wn * an * per_load['B']}>, Int<{ak}>>{{}});",
        f"using Ours = {mma.cpp}; accumulator<Ours>(mma, {m}, {n}, {mma.threads});",
    ]
    for side, source, operand, atoms in (("A", mma.a, mma.A, mma.m_atoms), ("B", mma.b, mma.B, mma.n_atoms)):
        assert operand is not None
        tile = operand.load.tile
        ours = operand.cpp.replace(operand.load.atom.cpp, "Recorder", 1)
        flag = str(isinstance(source, Transposed)).lower()
        lines.append(
            f"operand<{ours}, {atoms}, {4 // per_load[side]}>("
            f"make_tiled_copy_{side}(Copy_Atom<{operand.load.atom.cpp}, cutlass::bfloat16_t>{{}}, mma), "
            f"view<{tile.cpp}, {tile.rows}, {tile.columns}, {flag}>(), {mma.threads}, {mma.k_steps});"
        )
    return f'report("{name}", [] {{ {" ".join(lines)} }});'


def copy_cases() -> dict[str, TiledCopy]:
    """16-bit and 32-bit elements, one block and several, with and without a swizzle."""
    atom = cp_async()
    return {
        "copy_128x64": TiledCopy(atom, SmemLayout(BF16, 128, 64), 128),
        "copy_64x128": TiledCopy(atom, SmemLayout(BF16, 64, 128), 256),
        "copy_plain": TiledCopy(atom, SmemLayout(BF16, 32, 72, swizzle=None), 72),
        "copy_float": TiledCopy(atom, SmemLayout(DType.float32, 32, 64), 128),
    }


def copy_check(name: str, copy: TiledCopy) -> str:
    """The statement that compares one TiledCopy with CuTe's."""
    ours, tile = copy.cpp.replace(copy.atom.cpp, "CopyRecorder"), copy.tile
    return (
        f'report("{name}", [] {{ tiled_copy<{ours}, {tile.cpp}, {tile.rows}, {tile.columns}, {copy.row_step}, {copy.row_vectors}>'
        f"({copy.threads}); }});"
    )


def test_objects_agree_with_cute(tmp_path: Path) -> None:
    layouts, mmas, copies = layout_cases(), mma_cases(), copy_cases()
    body = [f"print({expression}, {len(values)});" for expression, values in layouts]
    body += [mma_check(name, mma) for name, mma in mmas.items()] + [copy_check(name, copy) for name, copy in copies.items()]
    # It compiles faster so: most of what -O0 would write are CuTe's small functions.
    lines = build_and_run(tmp_path, body, optimise="-O1")
    assert len(lines) == len(body)
    for (expression, values), line in zip(layouts, lines, strict=False):
        assert [int(x) for x in line.split()] == values, expression
    reports = {name: (int(checked), int(wrong)) for name, checked, wrong in map(str.split, lines[len(layouts) :])}
    for name, mma in mmas.items():
        assert mma.A is not None and mma.B is not None
        registers = 4 * mma.k_steps * (mma.A.loads + mma.B.loads)
        assert reports[name] == (mma.threads * (1 + 2 * mma.accumulator_registers + registers), 0), name
    for name, copy in copies.items():
        assert reports[name] == (copy.threads * (1 + 3 * len(copy.steps)), 0), name
