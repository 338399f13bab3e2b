"""The tiled objects: what ldmatrix would deliver, what copies write, where regions lie, and that wrong ones are refused."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from vidrial.dtypes import DType
from vidrial.errors import LayoutError
from vidrial.layout.algebra import Layout, Swizzle
from vidrial.layout.atoms import MMA_16x8x8, MMA_16x8x16, cp_async, ldmatrix
from vidrial.layout.copies import LoadMatrix, LoadVector, TiledCopy
from vidrial.layout.fragments import fragment_matrices, thread_layouts
from vidrial.layout.mma import Operand, TiledMma
from vidrial.layout.smem import Pipeline, SharedMemory, SmemLayout, Transposed, prove_access

BF16 = DType.bfloat16
ATOM = MMA_16x8x16[BF16]


def fragments(operand: Operand, k_step: int, stage: int = 0, origin: tuple[int, int] = (0, 0)) -> np.ndarray:
    """What `Operand.load` delivers: (threads, registers, 2, 2), the (row, column) in the tile of each element, by ldmatrix's definition."""
    load, tile = operand.load, operand.load.tile
    memory = np.full((tile.stages * tile.bytes // 2, 2), -1)
    row, column = (x.ravel() for x in np.mgrid[: tile.rows, : tile.columns])
    memory[stage * tile.bytes // 2 + tile.offset(row, column)] = np.stack([row, column], 1)
    thread = np.arange(load.threads)
    base = tile.offset(origin[0] + load.row(thread), origin[1] + load.column(thread)) * 2
    lane, half = np.arange(32)[:, None], np.arange(2)
    registers = []
    for i in range(operand.loads):
        step = [i * n + k_step * k for n, k in zip(operand.next, operand.k, strict=True)]
        address = tile.at(base + stage * tile.bytes, *step).reshape(-1, 4, 8)
        matrices = memory[address[..., None] // 2 + np.arange(8)]
        if load.atom.transposed:
            matrices = matrices.swapaxes(2, 3)
        registers += [matrices[:, matrix, lane // 4, 2 * (lane % 4) + half] for matrix in range(4)]
    return np.stack(registers, 2).reshape(load.threads, len(registers), 2, 2)


def expected(mma: TiledMma, side: int, transposed: bool, k_step: int) -> np.ndarray:
    """The same from the instruction's own thread-value layout and the warps' places."""
    layout, extent = (mma.atom.a_layout, mma.atom.b_layout)[side], mma.atom.shape[side]
    atoms, warps = (mma.m_atoms, mma.n_atoms)[side], mma.warps[side]
    values = []
    for thread in range(mma.threads):
        warp = (thread // 32 % mma.warps[0], thread // 32 // mma.warps[0])[side]
        for atom in range(atoms):
            first = (warp * atoms + atom if mma.bands and side == 0 else warp + atom * warps) * extent
            for v in range(layout.mode(1).size):
                k, i = divmod(layout(thread % 32, v), extent)
                place = (first + i, k_step * mma.atom.shape[2] + k)
                values.append(place[::-1] if transposed else place)
    return np.array(values).reshape(mma.threads, -1, 2, 2)


def source(extent: int, k: int, transposed: bool) -> SmemLayout | Transposed:
    """A tile of three stages whose rows are k if `transposed`."""
    return SmemLayout(BF16, k, extent, stages=3).transposed if transposed else SmemLayout(BF16, extent, k, stages=3)


@pytest.mark.parametrize(
    "warps, tile, bands, transposed",
    [
        ((2, 2), (128, 128, 64), False, (False, False)),
        ((4, 1), (128, 64, 128), False, (False, True)),
        ((8, 1), (256, 48, 32), True, (False, True)),
        ((1, 3), (32, 96, 96), False, (False, False)),
        ((3, 1), (96, 16, 80), True, (False, False)),
        ((2, 4), (64, 128, 16), False, (True, True)),
        ((2, 1), (64, 32, 48), True, (True, False)),
    ],
)
@pytest.mark.parametrize("depth", [8, 16])
def test_loads_deliver_the_fragments(
    warps: tuple[int, int], tile: tuple[int, int, int], bands: bool, transposed: tuple[bool, bool], depth: int
) -> None:
    atom = (MMA_16x8x8 if depth == 8 else MMA_16x8x16)[BF16]
    (m, n, k), (wm, wn) = tile, warps
    a, b = source(m, k, transposed[0]), source(n, k, transposed[1])
    if depth == 8 and (n % (32 * wn) or m % (32 * wm)):
        with pytest.raises(LayoutError, match="fills [24] atoms"):
            TiledMma(atom, warps, tile, a, b, bands)
        return
    mma = TiledMma(atom, warps, tile, a, b, bands)
    assert mma.A is not None and mma.B is not None
    assert (mma.threads, mma.k_steps) == (32 * wm * wn, k // depth)
    for side, operand in enumerate((mma.A, mma.B)):
        for k_step in range(mma.k_steps):
            assert np.array_equal(fragments(operand, k_step, stage=k_step % 3), expected(mma, side, transposed[side], k_step))


@pytest.mark.parametrize("origin", [(0, 0), (64, 0), (0, 64), (64, 64)])
def test_a_part_of_a_larger_tile(origin: tuple[int, int]) -> None:
    mma = TiledMma(ATOM, (2, 2), (64, 64, 64), SmemLayout(BF16, 128, 128), SmemLayout(BF16, 128, 128).transposed)
    assert mma.A is not None and mma.B is not None and mma.k_steps == 4
    for side, operand in enumerate((mma.A, mma.B)):
        whole = expected(mma, side, side == 1, 3) + np.array(origin)
        assert np.array_equal(fragments(operand, 3, origin=origin), whole)
    # Steps of k may also be counted on.
    assert np.array_equal(fragments(mma.A, 7), expected(mma, 0, False, 7))
    assert np.array_equal(fragments(mma.B, 7), expected(mma, 1, True, 7))


@pytest.mark.parametrize(
    "warps, tile, bands", [((2, 2), (128, 128, 16), False), ((4, 1), (192, 24, 16), True), ((3, 2), (48, 16, 16), False)]
)
def test_accumulators_cover_the_tile_once(warps: tuple[int, int], tile: tuple[int, int, int], bands: bool) -> None:
    mma = TiledMma(ATOM, warps, tile, bands=bands)
    rows, columns = mma.coordinates()
    assert rows.shape == (mma.threads, mma.m_atoms, mma.n_atoms, 4)
    assert rows[0].size == mma.accumulator_registers
    assert np.array_equal(np.sort((rows * tile[1] + columns).ravel()), np.arange(tile[0] * tile[1]))
    if bands:
        band = tile[0] // warps[0]
        assert all((rows[thread] // band == thread // 32).all() for thread in range(mma.threads))


def test_accumulator_as_operand() -> None:
    first = TiledMma(ATOM, (4, 1), (128, 64, 128), bands=True)
    second = TiledMma(ATOM, (4, 1), (128, 96, 64), a=first.accumulator, bands=True)
    assert second.A is None and ", void, void, " in second.cpp
    rows, columns = first.coordinates()
    # Registers 2 s + r / 2 of the first are fragment s of A: (m, k) of each thread and value.
    wanted = np.concatenate([expected(second, 0, False, s).reshape(128, 2, 8, 2) for s in range(4)], 2)
    assert np.array_equal(np.stack([rows, columns], -1).reshape(128, 2, 32, 2), wanted)
    assert TiledMma(MMA_16x8x8[BF16], (4, 1), (128, 96, 64), a=first.accumulator, bands=True).k_steps == 8


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"bands": False}, "bands=True of the first must be those of the second"),
        ({"warps": (2, 1)}, r"warps \(4, 1\), bands=True of the first"),
        ({"tile": (128, 96, 32)}, "it is 128 x 64, A is 128 x 32"),
        ({"tile": (64, 96, 64)}, "it is 128 x 64, A is 64 x 64"),
    ],
)
def test_accumulator_that_does_not_fit(change: dict[str, object], reason: str) -> None:
    first = TiledMma(ATOM, (4, 1), (128, 64, 128), bands=True)
    second = TiledMma(ATOM, (4, 1), (128, 96, 64), bands=True)
    with pytest.raises(LayoutError, match=reason):
        dataclasses.replace(second, a=first.accumulator, **change)


def test_accumulator_shared_by_columns() -> None:
    first = TiledMma(ATOM, (2, 2), (64, 64, 16))
    with pytest.raises(LayoutError, match=r"each needs them all: take warps=\(4, 1\)"):
        TiledMma(ATOM, (2, 2), (64, 64, 64), a=first.accumulator)


def test_mma_refusals() -> None:
    with pytest.raises(LayoutError, match="8 warps cannot share m=64 in atoms of 16; it must be a multiple of 128"):
        TiledMma(ATOM, (8, 1), (64, 64, 16))
    with pytest.raises(LayoutError, match="k=24"):
        TiledMma(ATOM, (1, 1), (64, 64, 24))
    with pytest.raises(LayoutError, match="A of a TiledMma .* is a tile of 64 x 32 bfloat16, or a multiple of it; got 64 x 48 bfloat16"):
        TiledMma(ATOM, (1, 1), (64, 64, 32), a=SmemLayout(BF16, 64, 48))
    with pytest.raises(LayoutError, match="got 64 x 32 float16"):
        TiledMma(ATOM, (1, 1), (64, 64, 32), b=SmemLayout(DType.float16, 64, 32))
    with pytest.raises(LayoutError, match="fills 2 atoms, a warp has 3; n must be a multiple of 16"):
        TiledMma(ATOM, (1, 1), (16, 24, 16), b=SmemLayout(BF16, 24, 16))
    with pytest.raises(LayoutError, match="empty"):
        TiledMma(ATOM, (0, 1), (16, 24, 16))
    # Interleaved by three, columns 48 apart carry within a block of 64.
    with pytest.raises(LayoutError, match="is not the element's"):
        TiledMma(ATOM, (1, 3), (16, 192, 64), b=SmemLayout(BF16, 64, 192).transposed)


@pytest.mark.parametrize(
    "dtype, columns, swizzle, block",
    [
        (BF16, 64, Swizzle(3, 3, 3), 64),
        (BF16, 32, Swizzle(2, 3, 3), 32),
        (BF16, 16, Swizzle(1, 3, 3), 16),
        (BF16, 96, Swizzle(2, 3, 3), 32),
        (BF16, 128, Swizzle(3, 3, 3), 64),
        (DType.float32, 64, Swizzle(3, 2, 3), 32),
        (BF16, 72, None, 72),
        (BF16, 20, None, 20),
    ],
)
def test_smem_layouts(dtype: DType, columns: int, swizzle: Swizzle | None, block: int) -> None:
    tile = SmemLayout(dtype, 24, columns)
    assert tile.swizzle == swizzle and tile.bytes == 24 * columns * dtype.bytes
    row, column = np.mgrid[:24, :columns]
    offsets = tile.offset(row, column)
    assert np.array_equal(np.sort(offsets.ravel()), np.arange(24 * columns))
    plain = row * block + column % block + column // block * 24 * block
    assert np.array_equal(offsets, swizzle(plain) if swizzle else plain)
    assert tile == SmemLayout(dtype, 24, columns, swizzle)
    assert repr(tile) == f"SmemLayout(dtype={dtype!r}, rows=24, columns={columns}, swizzle={swizzle!r}, stages=1)"
    for r, c in ((0, 0), (23, columns - 1), (7, 5)):
        assert tile.offset(r, c) == offsets[r, c]


def test_smem_cpp() -> None:
    assert SmemLayout(BF16, 128, 128).cpp == (
        "vidrial::SmemTile<cutlass::bfloat16_t, cute::ComposedLayout<cute::Swizzle<3,3,3>, cute::_0, cute::Layout<"
        "cute::Shape<cute::Int<128>,cute::Shape<cute::Int<64>,cute::Int<2>>>, "
        "cute::Stride<cute::Int<64>,cute::Stride<cute::Int<1>,cute::Int<8192>>>>>>"
    )
    assert SmemLayout(DType.float32, 8, 4, None).cpp == (
        "vidrial::SmemTile<float, cute::Layout<cute::Shape<cute::Int<8>,cute::Int<4>>, cute::Stride<cute::Int<4>,cute::Int<1>>>>"
    )


def test_smem_refusals() -> None:
    with pytest.raises(LayoutError, match="empty"):
        SmemLayout(BF16, 0, 64)
    with pytest.raises(LayoutError, match="leads out of a tile"):
        SmemLayout(BF16, 3, 8, Swizzle(1, 3, 1))
    with pytest.raises(LayoutError, match="2560 bytes apart, .* period of 1024"):
        SmemLayout(BF16, 20, 64, stages=2)


def ldmatrix_a(tile: SmemLayout) -> LoadMatrix:
    steps = tuple((16 * i, 16 * k) for i in range(4) for k in range(4))
    return LoadMatrix(tile, ldmatrix(), 32, lambda lane: (lane % 16, lane // 16 * 8), steps)


def test_proof_accepts_and_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = SmemLayout(BF16, 64, 64, stages=2)
    load = ldmatrix_a(tile)
    assert load.row == Layout((16, 2), (1, 0)) and load.column == Layout((16, 2), (0, 8))
    # Steps of 8 columns carry: the upper half of the warp already stands there.
    with pytest.raises(LayoutError, match=r"thread 16 at \(0, 8\), step \(0, 8\): its address in stage 0"):
        dataclasses.replace(load, steps=((0, 8),))
    with pytest.raises(LayoutError, match="outside the tile"):
        dataclasses.replace(load, steps=((0, 0), (56, 0)))
    with pytest.raises(LayoutError, match="is not the element's"):
        dataclasses.replace(load, steps=((4, 0),))
    # Swizzles that shuffle the 16 bytes of a row or tear them from their alignment, and one that reads bits that the columns change.
    with pytest.raises(LayoutError, match="not contiguous"):
        ldmatrix_a(SmemLayout(BF16, 64, 64, Swizzle(1, 0, 1)))
    with pytest.raises(LayoutError, match="not aligned to 16"):
        ldmatrix_a(SmemLayout(BF16, 64, 64, Swizzle(3, 2, 4)))
    with pytest.raises(LayoutError, match="is not the element's"):
        ldmatrix_a(SmemLayout(BF16, 64, 64, Swizzle(2, 3, 2)))
    with pytest.raises(LayoutError, match="not aligned to 16"):
        ldmatrix_a(SmemLayout(BF16, 64, 68, None))
    with pytest.raises(LayoutError, match="got ldmatrix.x4 and a tile of float32"):
        ldmatrix_a(SmemLayout(DType.float32, 64, 64))
    # Stages padded by 8 elements: the period of the swizzle is broken in the second one.
    monkeypatch.setattr(SmemLayout, "bytes", property(lambda self: self.plain.cosize * 2 + 16))
    with pytest.raises(LayoutError, match="in stage 1 plus the step"):
        prove_access(tile, load.row, load.column, 32, load.steps[::-1])
    with pytest.raises(LayoutError, match="8208 bytes apart"):
        dataclasses.replace(tile, stages=3)


def test_plain_rows_padded_by_8_are_fine() -> None:
    assert ldmatrix_a(SmemLayout(BF16, 64, 72, None, stages=3)).tile.offset(1, 0) == 72


def test_load_vector() -> None:
    load = LoadVector(SmemLayout(BF16, 16, 64), 128, lambda thread: (thread // 8, thread % 8 * 8))
    assert load.cpp.startswith("vidrial::LoadVector<vidrial::SmemTile<") and load.row == Layout((8, 16), (0, 1))
    with pytest.raises(LayoutError, match="not aligned"):
        LoadVector(SmemLayout(BF16, 16, 64), 16, lambda thread: (thread, thread % 2 * 4))


def test_thread_layouts() -> None:
    rows, columns = thread_layouts(lambda t: (t // 4 % 8 + t // 32 * 16, t % 4 * 2), 37 * 32)
    assert rows == Layout((4, 8, 37), (0, 1, 16)) and columns == Layout((4, 296), (2, 0))
    rows, columns = thread_layouts(lambda t: (t // 12, t % 12 * 8), 192)
    assert [int(columns(t)) for t in range(192)] == [t % 12 * 8 for t in range(192)] and rows == Layout((12, 16), (0, 1))
    assert thread_layouts(lambda t: (0, 0), 1) == (Layout(1, 0), Layout(1, 0))
    for table in (lambda t: (t ^ t >> 1, 0), lambda t: (t + 1, 0), lambda t: (t % 7, 0), lambda t: (t * t, 0), lambda t: (-t, 0)):
        with pytest.raises(LayoutError, match="thread -> row of 32 threads, .* is not a layout"):
            thread_layouts(table, 32)


def test_fragment_matrices() -> None:
    assert fragment_matrices(ATOM.a_layout, 16) == ((0, 0), (8, 0), (0, 8), (8, 8))
    assert fragment_matrices(ATOM.b_layout, 8) == ((0, 0), (0, 8))
    with pytest.raises(LayoutError, match="register 0"):
        fragment_matrices(Layout((32, 2), (2, 1)), 8)


@pytest.mark.parametrize(
    "tile, threads",
    [
        (SmemLayout(BF16, 128, 64), 128),
        (SmemLayout(BF16, 48, 128), 128),
        (SmemLayout(BF16, 32, 96), 192),
        (SmemLayout(BF16, 32, 96), 128),
        (SmemLayout(BF16, 64, 192), 256),
        (SmemLayout(BF16, 64, 256), 128),
        (SmemLayout(BF16, 64, 32), 64),
        (SmemLayout(BF16, 33, 72, None), 99),
        (SmemLayout(DType.float32, 16, 32), 64),
    ],
)
def test_copy_writes_each_element_once(tile: SmemLayout, threads: int) -> None:
    copy = TiledCopy(cp_async(), tile, threads)
    vector = 16 // tile.dtype.bytes
    written = np.full(tile.rows * tile.columns, -1)
    for step, addresses in enumerate(copy.addresses()):
        for thread, address in enumerate(addresses):
            row, block = divmod(step, len(copy.columns))
            row = thread // copy.row_vectors + row * copy.row_step
            column = thread % copy.row_vectors * vector + block * copy.row_vectors * vector
            target = address // tile.dtype.bytes + np.arange(vector)
            assert (written[target] == -1).all()
            written[target] = row * tile.columns + column + np.arange(vector)
    row, column = np.mgrid[: tile.rows, : tile.columns]
    assert np.array_equal(written[tile.offset(row, column)], row * tile.columns + column)
    blocks = f", {copy.row_vectors * vector}, {len(copy.columns)}" if len(copy.columns) > 1 else ""
    assert copy.cpp.endswith(f", {copy.row_step}, {tile.rows // copy.row_step}{blocks}>")


@pytest.mark.parametrize(
    "tile, threads, reason",
    [
        (SmemLayout(BF16, 32, 32), 256, r"256 threads cannot copy 32 x 32 bfloat16 \(128 vectors of 16 bytes\) evenly"),
        (SmemLayout(BF16, 31, 96), 128, "rows of 4 vectors"),
        (SmemLayout(BF16, 30, 64), 128, "cannot copy 30 x 64"),
        (SmemLayout(BF16, 32, 20), 128, "cannot copy 32 x 20"),
        (SmemLayout(BF16, 32, 4), 128, "cannot copy 32 x 4"),
        (SmemLayout(BF16, 64, 64), 32, "is not the element's"),
        (SmemLayout(BF16, 64, 256), 32, "is not the element's"),
    ],
)
def test_copy_refusals(tile: SmemLayout, threads: int, reason: str) -> None:
    with pytest.raises(LayoutError, match=reason):
        TiledCopy(cp_async(), tile, threads)


def test_copy_atom() -> None:
    with pytest.raises(LayoutError, match="got cp.async.ca.8"):
        TiledCopy(cp_async(8, False), SmemLayout(BF16, 64, 64), 128)


def test_shared_memory() -> None:
    tile = SmemLayout(BF16, 24, 64)
    small = SmemLayout(BF16, 8, 32)
    memory = SharedMemory(sums=12, q=tile, k=(tile, 3), small=small, rest=200, ring=2048)
    assert memory.members() == {"sums": 0, "q": 1024, "k": 4096, "small": 13312, "rest": 13824, "ring": 14336}
    assert (memory.bytes, memory.alignment, memory.offset("k"), memory.size("k")) == (16384, 1024, 4096, 9216)
    guarded = SharedMemory(guard=64, a=128, b=128)
    assert guarded.members() == {"a": 0, "b": 256} and guarded.bytes == 384
    assert SharedMemory(k=SmemLayout(BF16, 8, 64, stages=3)).bytes == 3072
    assert SharedMemory().bytes == 0
    for wrong in (0, -1, 1.5, True, (tile, 0), (128, 2)):
        with pytest.raises(LayoutError, match="region x"):
            SharedMemory(x=wrong)  # type: ignore[arg-type]


def test_pipeline() -> None:
    assert Pipeline(2).stages == 2
    with pytest.raises(LayoutError, match="a pipeline of 1 stages"):
        Pipeline(1)


def test_a_space_of_300_configs_builds_in_seconds() -> None:
    started, built = time.perf_counter(), 0
    for m in (64, 128, 192, 256):
        for n in (32, 64, 128):
            for d in (64, 96, 128):
                for stages in (1, 2, 3):
                    for warps in ((4, 1), (2, 2), (2, 1)):
                        a, b = SmemLayout(BF16, m, d), SmemLayout(BF16, n, d, stages=stages)
                        mma = TiledMma(ATOM, warps, (m, n, d), a, b)
                        TiledMma(ATOM, warps, (m, d, n), b=b.transposed)
                        built += bool(mma.cpp)
    assert built == 324 and time.perf_counter() - started < 10
