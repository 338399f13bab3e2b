"""Bank conflicts, sectors, occupancy and waves against numbers worked out by hand or by NVIDIA's calculator."""

from __future__ import annotations

import pytest

from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.errors import ArgumentError
from vidrial.layout.access import Access, analyse, bank_conflicts, sectors
from vidrial.layout.algebra import Swizzle
from vidrial.layout.atoms import MMA_16x8x16, cp_async, ldmatrix
from vidrial.layout.copies import LoadMatrix, LoadVector, TiledCopy
from vidrial.layout.mma import TiledMma
from vidrial.layout.occupancy import Occupancy, Waves
from vidrial.layout.smem import SmemLayout
from vidrial.layout.wgmma import WarpgroupMma

BF16 = DType.bfloat16


@pytest.mark.parametrize(
    "stride, size, ways",
    [
        (4, 4, 1),
        (8, 4, 2),
        (128, 4, 32),
        (132, 4, 1),
        (0, 4, 1),
        (12, 4, 1),
        (8, 8, 1),
        (16, 8, 2),
        (16, 16, 1),
        (32, 16, 2),
        (128, 16, 8),
        (144, 16, 1),
        (0, 16, 1),
        (2, 2, 1),
        (128, 2, 32),
        (1, 1, 1),
    ],
)
def test_bank_conflicts_of_strides(stride: int, size: int, ways: int) -> None:
    assert bank_conflicts(Access(tuple(stride * lane for lane in range(32)), size)) == ways


def test_conflicts_only_within_a_phase() -> None:
    # Threads 0 and 8 hit one bank, but in different quarters of the warp.
    addresses = [16 * lane for lane in range(8)] + [128 * 9 + 16 * lane for lane in range(24)]
    assert bank_conflicts(Access(tuple(addresses), 16)) == 1
    addresses[1] = 1024
    assert bank_conflicts(Access(tuple(addresses), 16)) == 2
    assert bank_conflicts(Access((0, 256, 512), 4)) == 3


@pytest.mark.parametrize("stride, size, count", [(4, 4, 4), (16, 16, 16), (128, 16, 32), (128, 4, 32), (0, 4, 1), (12, 4, 12), (2, 2, 2)])
def test_sectors_of_strides(stride: int, size: int, count: int) -> None:
    assert sectors(Access(tuple(stride * lane for lane in range(32)), size)) == count


def test_bad_accesses() -> None:
    for addresses, size in (((), 4), (tuple(range(33)), 1), ((0,), 3), ((2,), 4)):
        with pytest.raises(ArgumentError):
            Access(addresses, size)


@pytest.mark.parametrize(
    "columns, swizzle, ways",
    [
        (64, None, 8),
        (64, Swizzle(3, 3, 3), 1),
        (64, Swizzle(2, 3, 3), 2),
        (64, Swizzle(1, 3, 3), 4),
        (32, None, 4),
        (32, Swizzle(2, 3, 3), 1),
        (16, "auto", 1),
        (96, "auto", 1),
        (128, "auto", 1),
        (128, None, 8),
        (72, None, 1),
    ],
)
def test_ldmatrix_on_tiles(columns: int, swizzle: Swizzle | None, ways: int) -> None:
    tile = SmemLayout(BF16, 64, columns, swizzle)
    load = LoadMatrix(tile, ldmatrix(), 32, lambda lane: (lane % 16, lane // 16 * 8), tuple((16 * i, 0) for i in range(4)))
    (finding,) = analyse(load, "q")
    assert (finding.name, finding.kind, finding.bytes, finding.ways, finding.sectors) == ("q", "ldmatrix", 16, ways, None)
    assert ("no bank conflict" in str(finding)) == (ways == 1)


def test_mma_and_copy() -> None:
    mma = TiledMma(MMA_16x8x16[BF16], (2, 2), (128, 96, 64), SmemLayout(BF16, 128, 64), SmemLayout(BF16, 64, 96).transposed)
    assert [(f.name, f.ways) for f in analyse(mma, "qk")] == [("qk.A", 1), ("qk.B", 1)]
    assert analyse(TiledMma(MMA_16x8x16[BF16], (2, 2), (128, 96, 64))) == []
    for columns, per_row in ((64, 4), (32, 2), (128, 8)):
        copy = TiledCopy(cp_async(), SmemLayout(BF16, 64, columns), 128)
        shared, wide = analyse(copy, "k", row_stride=8192)
        assert (shared.name, shared.ways) == ("k.shared", 1)
        assert (wide.name, wide.bytes, wide.sectors, wide.best_sectors) == ("k.global", 16, 32 // (columns // 8) * per_row, 16)
    # Rows that begin in the middle of a sector touch one more each.
    assert analyse(TiledCopy(cp_async(), SmemLayout(BF16, 64, 64), 128), row_stride=144)[1].sectors == 18
    (vector,) = analyse(LoadVector(SmemLayout(BF16, 32, 64, None), 32, lambda lane: (lane, 0)))
    assert (vector.kind, vector.ways) == ("shared load", 8)


@pytest.mark.parametrize(("columns", "width"), [(16, 32), (32, 64), (64, 128), (96, 64), (256, 128)])
def test_wgmma_reads_without_conflicts(columns: int, width: int) -> None:
    a, b = SmemLayout(BF16, 128, columns), SmemLayout(BF16, 64, columns)
    mma = WarpgroupMma(BF16, 2, (128, 64, columns), b, a)
    assert [(f.name, f.kind, f.bytes, f.ways) for f in analyse(mma, "qk")] == [
        (f"qk.{side}", f"wgmma descriptor, {width}-byte swizzle", 64 * 16 * 2, 1) for side in "AB"
    ]
    (found,) = analyse(WarpgroupMma(BF16, 1, (64, columns, 64), b.transposed), "pv")
    assert str(found) == f"pv.B: wgmma descriptor, {width}-byte swizzle, {columns * 32} B, no bank conflict"


def test_copy_of_part_of_a_warp() -> None:
    with pytest.raises(ArgumentError, match="72 threads are not whole warps"):
        analyse(TiledCopy(cp_async(), SmemLayout(BF16, 32, 72, None), 72))


@pytest.mark.parametrize(
    "threads, smem, registers, ctas, limited_by",
    [
        (128, 0, 128, 4, ("registers",)),
        (256, 0, 32, 8, ("registers", "threads")),
        (128, 48 * 1024, 64, 4, ("shared memory",)),
        (128, 227 * 1024, 255, 1, ("shared memory",)),
        (128, 0, 168, 3, ("registers",)),
        (32, 0, 16, 32, ("CTAs",)),
        (128, 0, 255, 2, ("registers",)),
        (1024, 0, 65, 0, ("registers",)),
        (128, 228 * 1024, 32, 0, ("shared memory",)),
    ],
)
def test_occupancy_on_h200(threads: int, smem: int, registers: int, ctas: int, limited_by: tuple[str, ...]) -> None:
    occupancy = Occupancy.of(Device.of("h200"), threads=threads, smem=smem, registers=registers)
    assert (occupancy.ctas, occupancy.limited_by) == (ctas, limited_by)
    assert occupancy.fraction == ctas * threads / 2048


def test_occupancy_elsewhere() -> None:
    assert Occupancy.of(Device.of("rtx4090"), threads=32, smem=0, registers=16).limits["CTAs"] == 24
    assert Occupancy(256, 0, 32, smem_per_sm=100 * 1024, threads_per_sm=1536).ctas == 6
    assert "limited by" in str(Occupancy(256, 0, 32, smem_per_sm=100 * 1024))
    with pytest.raises(ArgumentError, match="0 threads"):
        Occupancy(0, 0, 32, 1024)


def test_waves() -> None:
    waves = Waves(ctas=300, sms=132, ctas_per_sm=2)
    assert (waves.waves, waves.tail) == (2, 36 / 264)
    assert (Waves(264, 132, 2).waves, Waves(264, 132, 2).tail, Waves(1, 132, 1).tail) == (1, 1.0, 1 / 132)
    with pytest.raises(ArgumentError, match="0 SMs"):
        Waves(1, 0, 1)
