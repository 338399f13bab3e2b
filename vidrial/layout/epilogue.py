"""How a tile of results leaves: from accumulators through a swizzled tile in shared memory to rows in global memory."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidrial.errors import LayoutError
from vidrial.layout.atoms import VECTOR, CopyAtom, cp_async
from vidrial.layout.copies import TiledCopy
from vidrial.layout.mma import TiledMma
from vidrial.layout.smem import SmemLayout
from vidrial.layout.wgmma import WarpgroupMma


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """The accumulators of `mma`, m x n, as a tile of m x n of 16 or 32-bit elements, stored in pieces as large as `atom`'s.

    Of a `WarpgroupMma` the tile may be m x a part of n, whole blocks of 8 columns: it is then filled and stored part after part.

    Each thread writes its accumulators, two neighbouring columns at once, to `tile` in shared memory (which may be memory of tiles that are
    done with), and stores 16 bytes of a row a step from there: all at once, or in pieces of `VECTOR[8]`, `[4]` or `[2]`, by how the rows in
    global memory are aligned. Rows and columns beyond the end are not written. That each element of the tile is written once, where the
    layout wants it, and stored once, is proved.

    Raises:
        LayoutError: the tile is not m x n or a part of it, its elements or the atom are others, or an address cannot be proved.
    """

    mma: TiledMma | WarpgroupMma
    tile: SmemLayout
    atom: CopyAtom = VECTOR[16]

    def __post_init__(self) -> None:
        tile, (m, n, _) = self.tile, self.mma.tile
        whole = tile.columns == n or (isinstance(self.mma, WarpgroupMma) and n % tile.columns == 0 and tile.columns % 8 == 0)
        if tile.rows != m or not whole or tile.dtype.bytes not in (2, 4):
            raise LayoutError(
                f"the tile of this epilogue is {m} x {n} of 16 or 32-bit elements; got {tile.rows} x {tile.columns} {tile.dtype}; by wgmma it may "
                "have a part of the columns, whole blocks of 8"
            )
        if self.atom not in VECTOR.values() or self.atom.bytes < tile.dtype.bytes:
            raise LayoutError(
                f"an epilogue stores by {', '.join(a.name for a in VECTOR.values())}, of whole elements; got {self.atom.name}"
            )
        # Building it proves the way out, in steps of whole rows.
        if len(self.copy.columns) > 1:
            raise LayoutError(
                f"{tile}: {self.threads} threads do not store whole rows of it in steps of whole swizzles; take fewer columns, or more threads"
            )
        rows, columns = self.pairs()
        offsets = tile.offset(rows, columns)
        wanted, reached = offsets * tile.dtype.bytes, self.addresses()
        if (reached != wanted).any() or (tile.offset(rows, columns + 1) != offsets + 1).any():
            where = tuple(int(i) for i in np.argwhere(reached != wanted)[0]) if (reached != wanted).any() else (0, 0, 0, 0)
            raise LayoutError(
                f"{tile}: thread {where[0]} does not reach its accumulator {where[1:]} by an added address; take swizzle='auto'"
            )
        if not np.array_equal(np.sort(wanted, axis=None), np.arange(0, tile.bytes, 2 * tile.dtype.bytes)):
            raise LayoutError(f"the accumulators of {self.mma.threads} threads are not each element of {tile} once")

    @property
    def threads(self) -> int:
        """Threads that take part: those of the MMA."""
        return self.mma.threads

    @cached_property
    def copy(self) -> TiledCopy:
        """Who stores which 16 bytes of the tile, step by step."""
        return TiledCopy(cp_async(16, zero_fill=True), self.tile, self.threads)

    @property
    def parts(self) -> int:
        """How often the tile is filled and stored."""
        return self.mma.tile[1] // self.tile.columns

    def pairs(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Rows and columns of the first of each pair of accumulators, those of the first part: int64, (threads, m, n, 2)."""
        rows, columns = self.mma.coordinates()
        first = slice(0, rows.shape[2] // self.parts)
        return rows[:, :, first, ::2], columns[:, :, first, ::2]

    def addresses(self) -> NDArray[Any]:
        """Byte address in the tile of each pair of accumulators, as device code computes it: int64, (threads, m, n, 2)."""
        rows, columns = self.pairs()
        # The thread's own place, then what is known when compiling.
        row, column = rows[:, :1, :1, :1], columns[:, :1, :1, :1]
        return self.tile.at(self.tile.offset(row, column) * self.tile.dtype.bytes, rows - row, columns - column)

    @property
    def cpp(self) -> str:
        """The C++ type."""
        c, parts = self.copy, f", {self.parts}" if self.parts > 1 else ""
        return (
            f"vidrial::Epilogue<{self.atom.cpp}, {self.mma.cpp}, {self.tile.cpp}, {c.row.cpp}, {c.column.cpp}, {c.row_step}, "
            f"{len(c.steps)}{parts}>"
        )
