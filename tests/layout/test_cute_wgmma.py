"""wgmma's descriptors and accumulators against CuTe itself: one generated C++ file, compiled by the host compiler, compares every one."""

from __future__ import annotations

from pathlib import Path

from cute_names import cute_wgmma
from test_cute_agreement import build_and_run

from vidrial.dtypes import DType
from vidrial.layout.smem import SmemLayout, Transposed
from vidrial.layout.wgmma import Descriptor, WarpgroupMma

BF16, HALF = DType.bfloat16, DType.float16

CHECKS = r"""
#include <cstddef>
#include <cstdio>
// Shared memory is the address space itself; the lanes of a warp agree.
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
inline size_t __cvta_generic_to_shared(void const* pointer) { return reinterpret_cast<size_t>(pointer); }
inline int __shfl_sync(unsigned, int value, int) { return value; }
#include <cute/tensor.hpp>
#include <vidrial/tile/wgmma.cuh>
using namespace cute;
static uint32_t const kBase = 1 << 14;
static long checked = 0, wrong = 0;
static void same(uint64_t ours, uint64_t theirs) { ++checked; wrong += ours != theirs; }

// What CuTe calls canonical, our tile's rows along its second mode if they run along k.
template <class T, bool Transposed, int Bits, int Rows, int Columns> auto canonical() {
  constexpr auto kMajor = Transposed ? SM90::GMMA::Major::MN : SM90::GMMA::Major::K;
  using Atom = conditional_t<Bits == 3, SM90::GMMA::Layout_SW128_Atom<T, kMajor>,
                             conditional_t<Bits == 2, SM90::GMMA::Layout_SW64_Atom<T, kMajor>, SM90::GMMA::Layout_SW32_Atom<T, kMajor>>>;
  if constexpr (Transposed) return tile_to_shape(Atom{}, Shape<Int<Columns>, Int<Rows>>{}, Step<_2, _1>{});
  else return tile_to_shape(Atom{}, Shape<Int<Rows>, Int<Columns>>{});
}

// Every descriptor that a thread makes in a stage: of each part of the tile, 64 rows (A), step of k. `Leading`: it is of use.
template <class Ours, class Tile, bool Transposed, int Bits, int Rows, int Columns, int Extent, bool Leading>
void descriptors(int threads, int parts, int m_atoms, int band) {
  using T = typename Tile::T;
  constexpr auto kMajor = Transposed ? SM90::GMMA::Major::MN : SM90::GMMA::Major::K;
  uint64_t const mask = Leading ? ~0ull : ~(0x3fffull << 16);
  T* const memory = reinterpret_cast<T*>(size_t(kBase + Tile::kBytes));
  auto tile = make_tensor(make_smem_ptr(memory), canonical<T, Transposed, Bits, Rows, Columns>());
  for (int row = 0; row < Rows; ++row) for (int column = 0; column < Columns; ++column) {
    same(Tile::offset(row, column), (&tile(Transposed ? column : row, Transposed ? row : column) - memory) * sizeof(T));
  }
  auto blocks = flat_divide(tile, Shape<Int<Extent>, _16>{});
  int const steps = size<3>(blocks);
  for (int part = 0; part < parts; ++part) for (int m = 0; m < m_atoms; ++m) for (int k = 0; k < steps; ++k) {
    for (int t = 0; t < threads; ++t) {
      Ours const ours(kBase, t, Transposed ? 0 : part * Extent, Transposed ? part * Extent : 0);
      auto const theirs = SM90::GMMA::make_gmma_desc<kMajor>(blocks(_, _, part + m + t / 128 * band / 64, k));
      same(ours(Tile::kBytes, k, 64 * m) & mask, uint64_t(theirs) & mask);
    }
  }
}

template <class Ours, class Mma> void accumulator(Mma mma, int m, int n, int threads) {
  auto coordinates = make_identity_tensor(make_shape(m, n));
  for (int t = 0; t < threads; ++t) {
    auto part = mma.get_slice(t).partition_C(coordinates);
    same(size<0>(part) * 1000 + size<1>(part), Ours::N * 4000 + Ours::M);
    for (int i = 0; i < Ours::M; ++i) for (int j = 0; j < Ours::N; ++j) for (int v = 0; v < 4; ++v) {
      same(Ours::row(t) + Ours::row_of(i, v), get<0>(part(4 * j + v, i, 0)));
      same(Ours::column(t) + Ours::column_of(j, v), get<1>(part(4 * j + v, i, 0)));
    }
  }
}
template <class F> void report(char const* name, F f) { checked = wrong = 0; f(); std::printf("%s %ld %ld\n", name, checked, wrong); }
"""


def mma_cases() -> dict[str, WarpgroupMma]:
    """Rows of 128, 64 and 32 bytes, 1 to 4 blocks of columns, both majors, whole tiles and parts, A in registers and in shared memory."""

    def mma(m: int, n: int, k: int, b: SmemLayout | Transposed, a: SmemLayout | None = None, warpgroups: int = 1) -> WarpgroupMma:
        return WarpgroupMma(b.tile.dtype if isinstance(b, Transposed) else b.dtype, warpgroups, (m, n, k), b, a)

    return {
        "k128": mma(64, 64, 64, SmemLayout(BF16, 64, 64)),
        "k128_2_blocks": mma(128, 16, 128, SmemLayout(BF16, 16, 128)),
        "k128_4_blocks_2_parts": mma(64, 64, 64, SmemLayout(BF16, 128, 256)),
        "k64": mma(128, 32, 32, SmemLayout(HALF, 32, 32), warpgroups=2),
        "k64_3_blocks": mma(64, 256, 96, SmemLayout(BF16, 256, 96)),
        "k32": mma(64, 96, 16, SmemLayout(BF16, 96, 16)),
        "k32_3_blocks": mma(64, 16, 48, SmemLayout(BF16, 16, 48)),
        "mn128": mma(256, 64, 64, SmemLayout(BF16, 64, 64).transposed, warpgroups=2),
        "mn128_2_blocks": mma(64, 128, 32, SmemLayout(HALF, 32, 128).transposed),
        "mn128_4_blocks": mma(64, 256, 16, SmemLayout(BF16, 16, 256).transposed),
        "mn128_4_blocks_2_parts": mma(64, 128, 32, SmemLayout(BF16, 64, 256).transposed),
        "mn64": mma(64, 32, 48, SmemLayout(BF16, 48, 32).transposed),
        "mn64_3_blocks": mma(64, 96, 16, SmemLayout(BF16, 16, 96).transposed),
        "mn32": mma(64, 16, 32, SmemLayout(BF16, 32, 16).transposed),
        "a128": mma(256, 32, 64, SmemLayout(BF16, 32, 64), SmemLayout(BF16, 256, 128), 2),
        "a32": mma(128, 16, 16, SmemLayout(BF16, 16, 16).transposed, SmemLayout(BF16, 128, 16)),
    }


def accumulator(name: str, mma: WarpgroupMma) -> str:
    """The statement that compares the accumulator of a WarpgroupMma with CuTe's."""
    (m, n, _), groups = mma.tile, mma.warpgroups
    rows = f"Layout<Shape<_64, Int<{groups}>, Int<{mma.m_atoms}>>, Stride<_1, Int<{64 * mma.m_atoms}>, _64>>"
    theirs = (
        f"make_tiled_mma(MMA_Atom<{cute_wgmma(mma.atom)}>{{}}, Layout<Shape<Int<{groups}>, _1, _1>>{{}}, Tile<{rows}, Int<{n}>, _16>{{}})"
    )
    return f'report("{name}", [] {{ accumulator<{mma.cpp}>({theirs}, {m}, {n}, {mma.threads}); }});'


def descriptors(name: str, mma: WarpgroupMma, stride: int = 0) -> str:
    """The statement that compares its descriptors; `stride` is added to theirs."""
    lines = []
    for d, parts, rows in reads(mma):
        ours = d.cpp.replace(f", {d.leading_bytes}, {d.stride_bytes}, ", f", {d.leading_bytes}, {d.stride_bytes + stride}, ")
        flags = str(d.transposed).lower(), d.tile.swizzle.bits, d.tile.rows, d.tile.columns, d.extent  # type: ignore[union-attr]
        # NOTE: CuTe writes 1 in its place where rows run along k, which the hardware ignores.
        leading = str(d.transposed and d.extent > d.tile.block).lower()
        arguments = ", ".join(map(str, (ours, d.tile.cpp, *flags, leading)))
        lines.append(f"descriptors<{arguments}>({mma.threads}, {parts}, {rows}, {d.band});")
    return f'report("{name}", [] {{ {" ".join(lines)} }});'


def reads(mma: WarpgroupMma) -> list[tuple[Descriptor, int, int]]:
    """(descriptor, parts of its tile that begin anew, atoms in m) of its operands in shared memory."""
    b = (mma.B, mma.B.outer // mma.tile[1], 1)
    return [b] if mma.A is None else [(mma.A, 1, mma.m_atoms), b]


def test_accumulators_agree_with_cute(tmp_path: Path) -> None:
    b = SmemLayout(BF16, 16, 64)
    cases = {f"{m}x{groups}": WarpgroupMma(BF16, groups, (64 * m * groups, 16, 64), b) for m in (1, 2) for groups in (1, 2)}
    cases |= {"ss": WarpgroupMma(HALF, 2, (256, 64, 16), SmemLayout(HALF, 16, 64).transposed, SmemLayout(HALF, 256, 16))}
    found = counted(build_and_run(tmp_path, [accumulator(name, mma) for name, mma in cases.items()], CHECKS))
    assert found == {name: (mma.threads * (1 + 2 * mma.accumulator_registers), 0) for name, mma in cases.items()}


def test_descriptors_agree_with_cute(tmp_path: Path) -> None:
    cases = mma_cases()
    # The same with rows of 8 further apart than they are: no descriptor is CuTe's.
    planted = {name: cases[name] for name in ("k64", "mn128_2_blocks")}
    body = [descriptors(name, mma) for name, mma in cases.items()] + [
        descriptors(f"wrong_{name}", mma, 16) for name, mma in planted.items()
    ]
    found = counted(build_and_run(tmp_path, body, CHECKS))
    made = {name: sum(mma.threads * parts * rows * d.steps for d, parts, rows in reads(mma)) for name, mma in cases.items()}
    elements = {name: sum(d.tile.rows * d.tile.columns for d, _, _ in reads(mma)) for name, mma in cases.items()}
    expected = {name: (made[name] + elements[name], 0) for name in cases}
    assert found == expected | {f"wrong_{name}": (made[name] + elements[name], made[name]) for name in planted}


def counted(lines: list[str]) -> dict[str, tuple[int, int]]:
    """Name -> what was compared, and what of it was not the same."""
    return {name: (int(checked), int(wrong)) for name, checked, wrong in map(str.split, lines)}
