"""wgmma: its fragments, its accumulators, and descriptors that find each element; what they cannot find is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidrial.dtypes import DType
from vidrial.errors import LayoutError
from vidrial.layout.algebra import Swizzle
from vidrial.layout.atoms import WGMMA_N, MMA_16x8x16, MmaAtom, wgmma
from vidrial.layout.fragments import accumulator_feeds, fragment_matrices
from vidrial.layout.mma import atoms_of
from vidrial.layout.smem import SmemLayout, Transposed
from vidrial.layout.wgmma import Descriptor, WarpgroupMma

BF16, HALF, FLOAT = DType.bfloat16, DType.float16, DType.float32
ATOMS = [wgmma(n, dtype) for n in WGMMA_N for dtype in (BF16, HALF)]


@pytest.mark.parametrize("atom", ATOMS, ids=lambda atom: atom.name)
def test_fragments_are_those_of_the_ptx_manual(atom: MmaAtom) -> None:
    m, n, k = atom.shape
    assert (m, k, atom.c_layout.mode(0).size, atom.arch, atom.kind) == (64, 16, 128, 90, "wgmma")
    thread, value = np.ogrid[:128, : n // 2]
    row, column = thread // 32 * 16 + thread % 32 // 4 + value // 2 % 2 * 8, thread % 4 * 2 + value % 2 + value // 4 * 8
    assert np.array_equal(atom.c_layout.indices().reshape(n // 2, 128).T, row + m * column)
    value = np.arange(8)
    a = thread // 32 * 16 + thread % 32 // 4 + value // 2 % 2 * 8 + m * (thread % 4 * 2 + value % 2 + value // 4 * 8)
    assert np.array_equal(atom.a_layout.indices().reshape(8, 128).T, a)
    assert sorted(atom.c_layout.indices()) == list(range(m * n)) and sorted(atom.a_layout.indices()) == list(range(m * k))
    # Every thread to all of B.
    assert all(np.array_equal([atom.b_layout(t, v) for v in range(n * k)], np.arange(n * k)) for t in (0, 127))


@pytest.mark.parametrize("n", WGMMA_N)
def test_accumulators_are_fragments_of_a(n: int) -> None:
    first, second = wgmma(n, BF16), wgmma(64, BF16, b_transposed=True)
    values = min(8, first.c_layout.mode(1).size)
    assert [first.c_layout(t, v) for t in range(128) for v in range(values)] == [
        second.a_layout(t, v) for t in range(128) for v in range(values)
    ]
    assert accumulator_feeds(wgmma(8, BF16).c_layout, second.a_layout, 64)
    assert not accumulator_feeds(MMA_16x8x16[BF16].c_layout, second.a_layout, 64)
    # A warp's 16 rows are what ldmatrix delivers, as for mma.sync.
    assert fragment_matrices(MMA_16x8x16[BF16].a_layout, 16) == ((0, 0), (8, 0), (0, 8), (8, 8))
    for warp in range(4):
        warps = [(second.a_layout(32 * warp + t, v) % 64 - 16 * warp, second.a_layout(t, v) // 64) for t in range(32) for v in range(8)]
        assert warps == [divmod(MMA_16x8x16[BF16].a_layout(t, v), 16)[::-1] for t in range(32) for v in range(8)]


def test_names() -> None:
    assert wgmma(64, BF16).cpp == "vidrial::Wgmma<64, cutlass::bfloat16_t, false, false>"
    both = wgmma(256, HALF, a_shared=True, b_transposed=True)
    assert both.cpp == "vidrial::Wgmma<256, cutlass::half_t, true, true>"
    assert (both.name, wgmma(8, BF16).name) == ("wgmma.m64n256k16.float16.ss.trans", "wgmma.m64n8k16.bfloat16")
    assert sorted(both.a_layout(5, v) for v in range(1024)) == list(range(1024))
    for n, dtype in ((0, BF16), (12, BF16), (20, BF16), (264, BF16), (64, FLOAT)):
        with pytest.raises(
            LayoutError, match=rf"wgmma of n={n} {dtype} is not served; accepted: n a multiple of 8 from 8 to 256, of bfloat"
        ):
            wgmma(n, dtype)


@pytest.mark.parametrize(("m", "n", "warpgroups"), [(64, 8, 1), (128, 96, 1), (128, 32, 2), (384, 64, 2), (192, 256, 3)])
def test_accumulators_cover_the_tile_once(m: int, n: int, warpgroups: int) -> None:
    mma = WarpgroupMma(BF16, warpgroups, (m, n, 32), SmemLayout(BF16, n, 32))
    rows, columns = mma.coordinates()
    assert rows.shape == columns.shape == (128 * warpgroups, mma.m_atoms, n // 8, 4) == (mma.threads, mma.m_atoms, mma.n_blocks, 4)
    assert (rows[0].size, mma.k_steps) == (mma.accumulator_registers, 2)
    assert np.array_equal(np.sort((rows * n + columns).ravel()), np.arange(m * n))
    for thread in range(mma.threads):
        assert (rows[thread] // (64 * mma.m_atoms) == thread // 128).all()
        atom = [mma.atom.c_layout(thread % 128, v) for v in range(n // 2)]
        first = thread // 128 * mma.m_atoms * 64
        assert np.array_equal((rows[thread, 0] - first + 64 * columns[thread, 0]).ravel(), atom)


@st.composite
def tiles(draw: Any, transposed: bool) -> tuple[SmemLayout, int]:
    """A tile that wgmma reads, and the extent of its parts, whole blocks of columns if rows run along k."""
    columns = draw(st.sampled_from((16, 32, 48, 64, 96, 128, 192, 256)))
    rows = draw(st.integers(1, 16)) * 16 if transposed else draw(st.integers(1, 32)) * 8
    tile = SmemLayout(draw(st.sampled_from((BF16, HALF))), rows, columns)
    outer, unit = (columns, tile.block) if transposed else (rows, 8)
    return tile, draw(st.sampled_from([extent for extent in range(unit, outer + 1, unit) if outer % extent == 0]))


@given(tiles(transposed=False))
def test_descriptors_where_rows_run_along_n(case: tuple[SmemLayout, int]) -> None:
    tile, extent = case
    d = Descriptor(tile, extent, False)
    width = {1: 128, 2: 64, 3: 32}[d.swizzle]
    assert (d.outer, d.steps, d.leading_bytes, d.stride_bytes) == (tile.rows, tile.columns // 16, 0, 8 * width)
    assert d.cpp == f"vidrial::Descriptor<{tile.cpp}, {d.swizzle}, 0, {8 * width}, 0, 16, 0>"


@given(tiles(transposed=True))
def test_descriptors_where_rows_run_along_k(case: tuple[SmemLayout, int]) -> None:
    tile, extent = case
    d = Descriptor(tile, extent, True)
    width = {1: 128, 2: 64, 3: 32}[d.swizzle]
    assert (d.outer, d.steps, d.leading_bytes, d.stride_bytes) == (tile.columns, tile.rows // 16, tile.rows * width, 8 * width)
    assert d.cpp == f"vidrial::Descriptor<{tile.cpp}, {d.swizzle}, {tile.rows * width}, {8 * width}, 16, 0, 0>"


WHOLE = "wgmma cannot read parts of {} x 16 from it; it takes whole parts of 16-bit tiles with swizzle='auto' and 16 columns or more"
ELSEWHERE = "a part of {} x 16 at {} does not lie where wgmma reads; its {} must be multiples of {}, its swizzle 'auto'"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("tile", "extent"),
    [
        (SmemLayout(BF16, 64, 64, None), 64),
        (SmemLayout(BF16, 64, 72), 8),
        (SmemLayout(BF16, 64, 8), 8),
        (SmemLayout(FLOAT, 64, 32), 32),
        (SmemLayout(BF16, 64, 64, Swizzle(3, 3, 4)), 64),
        (SmemLayout(BF16, 64, 64), 48),
        (SmemLayout(BF16, 1024, 128), 64),
        (SmemLayout(BF16, 64, 128, stages=16), 64),
    ],
)
def test_tiles_without_such_parts(tile: SmemLayout, extent: int, transposed: bool) -> None:
    with pytest.raises(LayoutError) as refused:
        Descriptor(tile, extent, transposed)
    assert str(refused.value) == f"{tile}: {WHOLE.format(extent)}, within 256 KB"


@pytest.mark.parametrize(
    ("tile", "extent", "transposed", "where"),
    [
        # Rows of another width than the swizzle's.
        (SmemLayout(BF16, 64, 64, Swizzle(2, 3, 3)), 64, False, ((0, 0), "rows", 8)),
        (SmemLayout(BF16, 64, 32, Swizzle(1, 3, 3)), 32, True, ((0, 0), "columns", 32)),
        # Parts, or blocks of columns, that begin inside of 8 rows.
        (SmemLayout(BF16, 24, 64), 12, False, ((12, 0), "rows", 8)),
        (SmemLayout(BF16, 12, 128), 12, False, ((0, 64), "rows", 8)),
        # Parts that end inside of a block of columns.
        (SmemLayout(BF16, 64, 192), 96, True, ((0, 96), "columns", 64)),
        (SmemLayout(HALF, 32, 96), 48, True, ((0, 48), "columns", 32)),
    ],
)
def test_parts_that_lie_elsewhere(tile: SmemLayout, extent: int, transposed: bool, where: tuple[Any, str, int]) -> None:
    with pytest.raises(LayoutError) as refused:
        Descriptor(tile, extent, transposed)
    assert str(refused.value) == f"{tile}: {ELSEWHERE.format(extent, *where)}"


# NOTE: rows that no other test has, since what is proved already is not proved again.
@pytest.mark.parametrize(("field", "rows"), [("stride_bytes", 272), ("leading_bytes", 288), ("swizzle", 304)])
def test_the_proof_finds_a_wrong_field(field: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(Descriptor, field)
    planted = {"stride_bytes": lambda d: right.fget(d) + 128, "leading_bytes": lambda d: right.fget(d) // 2, "swizzle": lambda d: 2}
    monkeypatch.setattr(Descriptor, field, property(planted[field]))
    with pytest.raises(LayoutError, match="does not lie where wgmma reads"):
        Descriptor(SmemLayout(BF16, rows, 256), 128, True)
    k_major = SmemLayout(BF16, rows, 128), rows, False
    if field == "leading_bytes":
        # Of no use there.
        Descriptor(*k_major)
    else:
        with pytest.raises(LayoutError, match="does not lie where wgmma reads"):
            Descriptor(*k_major)


def test_operands_of_an_mma() -> None:
    q, v = SmemLayout(BF16, 256, 128), SmemLayout(BF16, 64, 256, stages=3)
    mma = WarpgroupMma(BF16, 2, (256, 128, 64), v.transposed, q)
    a, b = Descriptor(q, 64, False, band=128), Descriptor(v, 128, True)
    assert [a, b] == [mma.A, mma.B]
    row, column = (layout.cpp for layout in mma.row_column)
    assert mma.cpp == f"vidrial::WarpgroupMma<{mma.atom.cpp}, 2, 16, 4, {a.cpp}, {b.cpp}, {row}, {column}>"
    assert list(atoms_of(mma)) == [mma.atom] and mma.atom == wgmma(128, BF16, a_shared=True, b_transposed=True)
    registers = WarpgroupMma(HALF, 1, (64, 64, 64), SmemLayout(HALF, 64, 64))
    assert registers.A is None and ", 1, 8, 4, void, vidrial::Descriptor<" in registers.cpp
    assert registers.atom == wgmma(64, HALF)


B = SmemLayout(BF16, 64, 64)


@pytest.mark.parametrize(
    ("dtype", "warpgroups", "tile", "b", "a", "reason"),
    [
        (
            BF16,
            2,
            (64, 64, 64),
            B,
            None,
            "2 warpgroups cannot share a tile of 64 x 64 x 64; m must be a multiple of 64 a warpgroup, k one of 16",
        ),
        (BF16, 2, (192, 64, 64), B, None, "2 warpgroups cannot share a tile of 192 x 64 x 64"),
        (BF16, 1, (32, 64, 64), B, None, "1 warpgroups cannot share a tile of 32 x 64 x 64"),
        (BF16, 0, (64, 64, 64), B, None, "0 warpgroups"),
        (BF16, 1, (64, 64, 24), B, None, "a tile of 64 x 64 x 24"),
        (BF16, 1, (64, 12, 64), B, None, "wgmma of n=12 bfloat16"),
        (BF16, 1, (64, 264, 64), SmemLayout(BF16, 264, 64), None, "wgmma of n=264 bfloat16"),
        (FLOAT, 1, (64, 64, 32), SmemLayout(FLOAT, 64, 32), None, "wgmma of n=64 float32"),
        (HALF, 1, (64, 64, 64), B, None, "B of .* is a tile of 64 x 64 float16, or a multiple of it; got 64 x 64 bfloat16"),
        (BF16, 1, (64, 96, 64), B, None, r"B of a WarpgroupMma of \(m, n, k\) = \(64, 96, 64\) is a tile of 96 x 64 bfloat16"),
        (BF16, 1, (64, 32, 128), B.transposed, None, "B of .* is a tile of 128 x 32 bfloat16, or a multiple of it; got 64 x 64 bfloat16"),
        (BF16, 1, (128, 64, 64), B, B, "A of .* is a tile of 128 x 64 bfloat16, or a multiple of it; got 64 x 64 bfloat16"),
        (BF16, 1, (64, 64, 64), B, SmemLayout(HALF, 64, 64), "A of .* got 64 x 64 float16"),
        (BF16, 1, (64, 64, 64), B, SmemLayout(BF16, 64, 64, None), "wgmma cannot read parts of 64 x 16"),
        (BF16, 1, (64, 96, 64), SmemLayout(BF16, 64, 192).transposed, None, "its columns must be multiples of 64"),
    ],
)
def test_mma_refusals(
    dtype: DType, warpgroups: int, tile: tuple[int, int, int], b: SmemLayout | Transposed, a: SmemLayout | None, reason: str
) -> None:
    with pytest.raises(LayoutError, match=reason):
        WarpgroupMma(dtype, warpgroups, tile, b, a)
