"""wgmma: the matrix instruction of a warpgroup, four warps, which reads B, and A if it is there, from shared memory by a descriptor.

s = WarpgroupMma(dtype, 2, tile=(128, 128, 64), b=v.transposed)      # A in registers
"""

from __future__ import annotations

import dataclasses
from functools import cache, cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vidrial.device import HOPPER
from vidrial.dtypes import DType
from vidrial.errors import LayoutError
from vidrial.layout.algebra import Layout
from vidrial.layout.atoms import MmaAtom, wgmma
from vidrial.layout.fragments import thread_layouts
from vidrial.layout.smem import SmemLayout, Transposed

WARPGROUP, ROWS, DEPTH = 128, 64, 16
# The descriptor's number of a swizzle of that many bits, and the bytes of a row under it.
SWIZZLES = {3: 1, 2: 2, 1: 3}
SWIZZLE_BYTES = {1: 128, 2: 64, 3: 32}


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """Where wgmma finds an operand of `extent` (n of B, 64 rows of A) x `depth` in a tile; `transposed`: the tile's rows run along k.

    Rows of 8 lie `stride_bytes` apart, blocks of columns `leading_bytes`. That the hardware then reads the right element, for each of
    the tile's parts, is proved by brute force. `band`: rows from one warpgroup's part of A to the next one's.

    Raises:
        LayoutError: the tile is not made of whole parts, has no swizzle that wgmma knows, or an element would be read elsewhere.
    """

    tile: SmemLayout
    extent: int
    transposed: bool
    band: int = 0

    def __post_init__(self) -> None:
        _prove_descriptor(self)

    @property
    def outer(self) -> int:
        """Rows of A or columns of B in the whole tile."""
        return self.tile.columns if self.transposed else self.tile.rows

    @property
    def steps(self) -> int:
        """Steps of k in the whole tile."""
        return (self.tile.rows if self.transposed else self.tile.columns) // DEPTH

    @property
    def swizzle(self) -> int:
        """The descriptor's number of the tile's swizzle, 0 if it is none of them."""
        swizzle = self.tile.swizzle
        known = swizzle is not None and (swizzle.base, swizzle.shift) == (3, 3) and self.tile.dtype.bytes == 2  # type: ignore[union-attr]
        return SWIZZLES.get(swizzle.bits, 0) if known else 0  # type: ignore[union-attr]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of one block of columns."""
        return self.tile.block * self.tile.dtype.bytes

    @property
    def leading_bytes(self) -> int:
        """From one block of columns to the next, where n runs along them."""
        return self.tile.rows * self.row_bytes if self.transposed else 0

    @property
    def stride_bytes(self) -> int:
        """From 8 rows to the next 8."""
        return 8 * self.row_bytes

    @property
    def cpp(self) -> str:
        """The C++ type."""
        rows, columns = (DEPTH, 0) if self.transposed else (0, DEPTH)
        return (
            f"vidrial::Descriptor<{self.tile.cpp}, {self.swizzle}, {self.leading_bytes}, {self.stride_bytes}, "
            f"{rows}, {columns}, {self.band}>"
        )


@cache
def _prove_descriptor(d: Descriptor) -> None:
    tile, size = d.tile, d.tile.dtype.bytes
    deep = tile.rows if d.transposed else tile.columns
    if d.swizzle == 0 or d.outer % d.extent or deep % DEPTH or d.leading_bytes >= 1 << 18 or tile.bytes * tile.stages >= 1 << 18:
        raise LayoutError(
            f"{tile}: wgmma cannot read parts of {d.extent} x {DEPTH} from it; it takes whole parts of 16-bit tiles with swizzle='auto' "
            "and 16 columns or more, within 256 KB"
        )
    # What the hardware knows: the swizzle tells it how wide a row is, and the address how the row is swizzled.
    width = SWIZZLE_BYTES[d.swizzle]
    chunks, across = width // 16 - 1, width // size
    i, k = np.ogrid[: d.extent, :DEPTH]
    for origin in range(0, d.outer, d.extent):
        for first in range(0, deep, DEPTH):
            row, column = (first, origin) if d.transposed else (origin, first)
            start = tile.plain(row, column) * size
            if d.transposed:
                at = start + i // across * d.leading_bytes + i % across * size + k // 8 * d.stride_bytes + k % 8 * width
            else:
                at = start + i // 8 * d.stride_bytes + i % 8 * width + k * size
            read = at ^ (at >> 7 & chunks) << 4
            wanted = tile.offset(*((first + k, origin + i) if d.transposed else (origin + i, first + k))) * size
            # A start inside of 8 rows would need the descriptor's base offset, which is 0.
            if start >> 7 & chunks or not np.array_equal(read, wanted):
                raise LayoutError(
                    f"{tile}: a part of {d.extent} x {DEPTH} at ({row}, {column}) does not lie where wgmma reads; "
                    f"its {'columns' if d.transposed else 'rows'} must be multiples of {tile.block if d.transposed else 8}, its swizzle 'auto'"
                )


@dataclasses.dataclass(frozen=True)
class WarpgroupMma:
    """`C (m x n) += A (m x k) B` by `warpgroups`, each with a contiguous band of rows, in instructions of 64 x n x 16.

    `b`: a tile of n x k (B = tile^T), or the `.transposed` of a tile of k x n (B = tile). A tile may be a multiple of that.
    `a`: a tile of m x k, or None: in registers, where the accumulator of another WarpgroupMma has its values already.
    The instructions run on by themselves: device code says when their results, and the registers and shared memory that they read,
    are wanted back (`vidrial/tile/wgmma.cuh`).

    Raises:
        LayoutError: the warpgroups cannot share the tile, an operand has another shape or dtype, or wgmma cannot read it.
    """

    ARCH: ClassVar[str] = HOPPER
    dtype: DType
    warpgroups: int
    tile: tuple[int, int, int]
    b: SmemLayout | Transposed
    a: SmemLayout | None = None

    def __post_init__(self) -> None:
        m, n, k = self.tile
        if min(m, n, k, self.warpgroups) < 1 or m % (ROWS * self.warpgroups) or k % DEPTH:
            raise LayoutError(
                f"{self.warpgroups} warpgroups cannot share a tile of {m} x {n} x {k}; m must be a multiple of {ROWS} a warpgroup, "
                f"k one of {DEPTH}"
            )
        # Reading them builds and proves them.
        _ = self.atom, self.A, self.B

    @property
    def atom(self) -> MmaAtom:
        """The instruction."""
        return wgmma(self.tile[1], self.dtype, a_shared=self.a is not None, b_transposed=isinstance(self.b, Transposed))

    @property
    def threads(self) -> int:
        """Threads that take part."""
        return WARPGROUP * self.warpgroups

    @property
    def m_atoms(self) -> int:
        """Instructions of a warpgroup in m."""
        return self.tile[0] // (ROWS * self.warpgroups)

    @property
    def n_blocks(self) -> int:
        """Blocks of 8 columns in an accumulator: 4 registers each."""
        return self.tile[1] // 8

    @property
    def k_steps(self) -> int:
        """Steps of k."""
        return self.tile[2] // DEPTH

    @property
    def accumulator_registers(self) -> int:
        """float32 accumulators per thread."""
        return self.m_atoms * self.n_blocks * 4

    @cached_property
    def row_column(self) -> tuple[Layout, Layout]:
        """thread -> row, thread -> column of its first accumulator."""
        return _first_accumulators(self.atom.c_layout.mode(0), self.warpgroups, ROWS * self.m_atoms)

    def coordinates(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Rows and columns of all accumulators: int64 arrays of shape (threads, m_atoms, n_blocks, values)."""
        thread, i, j, v = np.ogrid[: self.threads, : self.m_atoms, : self.n_blocks, :4]
        row, column = self.row_column
        rows, columns = np.broadcast_arrays(row(thread) + i * ROWS + v // 2 * 8, column(thread) + j * 8 + v % 2)
        return rows, columns

    @cached_property
    def A(self) -> Descriptor | None:
        """Where A is read; None if it is in registers."""
        if self.a is None:
            return None
        self._check("A", self.a, self.tile[0], self.tile[2])
        return Descriptor(self.a, ROWS, False, ROWS * self.m_atoms)

    @cached_property
    def B(self) -> Descriptor:
        """Where B is read."""
        transposed = isinstance(self.b, Transposed)
        tile = self.b.tile if isinstance(self.b, Transposed) else self.b
        self._check("B", tile, *((self.tile[2], self.tile[1]) if transposed else self.tile[1:]))
        return Descriptor(tile, self.tile[1], transposed)

    def _check(self, name: str, tile: SmemLayout, rows: int, columns: int) -> None:
        if tile.dtype != self.dtype or tile.rows % rows or tile.columns % columns:
            raise LayoutError(
                f"{name} of a WarpgroupMma of (m, n, k) = {self.tile} is a tile of {rows} x {columns} {self.dtype}, or a multiple of it; "
                f"got {tile.rows} x {tile.columns} {tile.dtype}"
            )

    @property
    def cpp(self) -> str:
        """The C++ type."""
        row, column = self.row_column
        return (
            f"vidrial::WarpgroupMma<{self.atom.cpp}, {self.m_atoms}, {self.n_blocks}, {self.k_steps}, "
            f"{self.A.cpp if self.A else 'void'}, {self.B.cpp}, {row.cpp}, {column.cpp}>"
        )


@cache
def _first_accumulators(lanes: Layout, warpgroups: int, rows: int) -> tuple[Layout, Layout]:
    """thread -> row, thread -> column of the first accumulator of warpgroups that own so many rows each; `lanes`: of one, m + 64 n."""

    def first(thread: int) -> tuple[int, int]:
        warpgroup, lane = divmod(thread, WARPGROUP)
        n, m = divmod(lanes(lane), ROWS)
        return warpgroup * rows + m, n

    return thread_layouts(first, WARPGROUP * warpgroups)
