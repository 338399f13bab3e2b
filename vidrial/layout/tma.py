"""TMA: the hardware that moves a box of a tensor in global memory into a tile of shared memory.

tile = TmaTile(SmemLayout(dtype, 128, 64, stages=4), outer=("head", "batch"))
map = TensorMap(tile, "k", shape=(t, d, h, b), strides=(h * d, d, t * h * d))      # what one launch reads: true lengths, elements
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import ClassVar

import numpy as np

from vidrial.device import HOPPER, VECTOR_BYTES
from vidrial.errors import LayoutError
from vidrial.layout.smem import SmemLayout

BOX_LIMIT, RANK_LIMIT, EXTENT_LIMIT, STRIDE_LIMIT, ALIGNMENT = 256, 5, 1 << 32, 1 << 40, 128


@dataclasses.dataclass(frozen=True)
class TmaTile:
    """How TMA fills `tile` from a tensor [row, column, *outer], one row of columns contiguous; the box is 1 deep in each of `outer`.

    The tile's blocks of columns (`tile.block`, at most 128 bytes) are a dimension of the tensor of their own, so that one box holds the whole
    tile; then the tensor has whole blocks. With `column_tail` any number of columns is served, and each block is a box. That the box, as the
    hardware lays it out and swizzles it, is the tile, is proved by brute force.
    `packed`: the tensor has [row, column, member, *outer], and the tile's rows are `packed` members of one row, then of the next.

    Raises:
        LayoutError: the tile's swizzle is none of TMA's, the box is too large or has too many dimensions, or an element would lie elsewhere.
    """

    ARCH: ClassVar[str] = HOPPER
    tile: SmemLayout
    outer: tuple[str, ...] = ()
    column_tail: bool = False
    packed: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "outer", tuple(self.outer))
        rank, tile = len(self.box), self.tile
        if self.packed < 1 or tile.rows % self.packed:
            raise LayoutError(f"{tile}: its rows are no multiple of packed={self.packed}; take a tile of whole rows of the tensor")
        if rank > RANK_LIMIT:
            raise LayoutError(
                f"{tile}: a box of rank {rank}; TMA has at most {RANK_LIMIT}: give fewer of outer={self.outer}, or column_tail=True"
            )
        if max(self.box) > BOX_LIMIT:
            raise LayoutError(f"{tile}: a box of {self.box}; TMA takes at most {BOX_LIMIT} along a dimension: take fewer rows")
        if self.box[0] * tile.dtype.bytes % VECTOR_BYTES:
            raise LayoutError(f"{tile}: a row of the box is {self.box[0] * tile.dtype.bytes} bytes; TMA takes multiples of {VECTOR_BYTES}")
        _prove_box(self)

    @property
    def split(self) -> bool:
        """Whether blocks of columns are a dimension of the tensor."""
        return self.blocks > 1 and not self.column_tail

    @property
    def block(self) -> int:
        """Columns that lie side by side in the tile: the innermost extent of the box."""
        return self.tile.columns if self.tile.swizzle is None else self.tile.block

    @property
    def blocks(self) -> int:
        """Blocks of columns in the tile."""
        return self.tile.columns // self.block

    @property
    def boxes(self) -> int:
        """Instructions that fill the tile."""
        return 1 if self.split else self.blocks

    @property
    def box(self) -> tuple[int, ...]:
        """Extents of the box, innermost first: (block, rows[, blocks], 1, ...)."""
        rows = (self.tile.rows,) if self.packed == 1 else (self.packed, self.tile.rows // self.packed)
        return (self.block, *rows, *((self.blocks,) if self.split else ()), *(1 for _ in self.outer))

    @property
    def swizzle_bits(self) -> int:
        """Address bits that the hardware's swizzle changes: 3 for 128 bytes, 2 for 64, 1 for 32, 0 for none."""
        return 0 if self.tile.swizzle is None else self.tile.swizzle.bits  # type: ignore[union-attr]

    @property
    def bytes(self) -> int:
        """Bytes that a barrier has to expect, also where some are zeros."""
        return self.tile.bytes

    @property
    def cpp(self) -> str:
        """The C++ type."""
        return f"vidrial::TmaTile<{self.tile.cpp}, {self.block}, {self.blocks}, {str(self.split).lower()}, {self.packed}>"


@cache
def _prove_box(t: TmaTile) -> None:
    """Each element where the layout has it: boxes lie one behind the other, the innermost extent fastest, addresses swizzled."""
    tile, size, bits = t.tile, t.tile.dtype.bytes, t.swizzle_bits
    block, row, column = np.ogrid[: t.blocks, : tile.rows, : t.block]
    linear = ((block * tile.rows + row) * t.block + column) * size
    reached = linear ^ ((linear >> 7) & ((1 << bits) - 1)) << 4
    span = {0: None, 1: 32, 2: 64, 3: 128}.get(bits, 0)
    if (span is not None and t.block * size != span) or not np.array_equal(reached, tile.offset(row, block * t.block + column) * size):
        raise LayoutError(
            f"{tile}: TMA lays a box out otherwise; it takes swizzle='auto' on 16 to 64 columns of 16 bits (32, 64, 128 bytes), or None"
        )
    if tile.bytes % (t.boxes * ALIGNMENT) or (tile.stages > 1 and tile.bytes % max(ALIGNMENT, tile.period_bytes)):
        raise LayoutError(
            f"{tile}: a box of {tile.bytes // t.boxes} bytes; boxes and stages begin at multiples of {max(ALIGNMENT, tile.period_bytes)} bytes: "
            "take a multiple of 8 rows"
        )
    if t.boxes > 1 and tile.bytes // t.boxes % tile.period_bytes:
        raise LayoutError(
            f"{tile}: boxes of {tile.bytes // t.boxes} bytes are no multiple of the swizzle's period of {tile.period_bytes}; take 8 n rows"
        )


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """What `tile` is taken from in one launch: the op's array of this name, its true extents and its strides.

    `shape`: rows, columns, members if rows are packed, then those of `tile.outer`. `strides`, in elements, in the same order but without the
    columns', which are contiguous. `offset`: elements from the array's first. A box that reaches beyond an extent gets zeros there.

    Raises:
        LayoutError: TMA cannot take such a tensor; names the extent or stride, what came and what is accepted.
    """

    tile: TmaTile
    array: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    def __post_init__(self) -> None:
        names, size = ("row", "column", *(("member",) if self.tile.packed > 1 else ()), *self.tile.outer), self.tile.tile.dtype.bytes
        if len(self.shape) != len(names) or len(self.strides) != len(names) - 1:
            raise LayoutError(
                f"tensor map of {self.array}: it has {', '.join(names)}; got shape {self.shape} and strides {self.strides} (without the column's)"
            )
        for name, extent in zip(names, self.shape, strict=True):
            if not 1 <= extent < EXTENT_LIMIT:
                raise LayoutError(f"tensor map of {self.array}: {extent} along {name}; TMA takes 1 to 2^32 - 1")
        if self.tile.split and self.shape[1] % self.tile.block:
            raise LayoutError(
                f"tensor map of {self.array}: {self.shape[1]} columns are not whole blocks of {self.tile.block}; give the TmaTile column_tail=True"
            )
        for name, extent, stride in zip((names[0], *names[2:]), (self.shape[0], *self.shape[2:]), self.strides, strict=True):
            if extent > 1 and (stride < 1 or stride * size % VECTOR_BYTES or stride * size >= STRIDE_LIMIT):
                raise LayoutError(
                    f"tensor map of {self.array}: {stride * size} bytes from {name} to {name}; TMA takes positive multiples of {VECTOR_BYTES} below 2^40: "
                    "pad the array, or take a config that copies by cp.async"
                )
        if self.offset * size % VECTOR_BYTES:
            raise LayoutError(
                f"tensor map of {self.array}: it begins {self.offset * size} bytes into the array; TMA takes multiples of {VECTOR_BYTES}"
            )

    @classmethod
    def ragged(cls, tile: TmaTile, array: str, shape: tuple[int, ...], strides: tuple[int, ...], longest: int) -> TensorMap:
        """Of sequences packed one behind the other: `shape` and `strides` are those of all rows, the last of `tile.outer` says where one ends.

        Device code gives `TmaTile::load_ragged` the row, and the row at which its sequence ends: what lies beyond that becomes zero, by the
        hardware, though another sequence is there. `longest`: rows of the longest sequence, or more.

        Raises:
            LayoutError: TMA cannot take such a tensor, or `tile.outer` has nothing for the end.
        """
        # NOTE: the same memory along two dimensions: row `longest - n` of the view that begins `longest` rows before `end` is row `end - n`.
        if not tile.outer or longest < 1:
            raise LayoutError(
                f"tensor map of {array}: {longest} rows of the longest sequence, dimensions {('row', 'column', *tile.outer)}; "
                "give at least 1 row, and a last dimension for a sequence's end"
            )
        rows, columns, *outer = shape
        ends = (longest, columns, *outer, rows + 1)
        return cls(tile, array, ends, (*strides, strides[0]), -longest * strides[0])

    @property
    def dims(self) -> tuple[int, ...]:
        """Extents, innermost first, as the box has them."""
        rows, columns, *outer = self.shape
        inner = [rows] if self.tile.packed == 1 else [outer.pop(0), rows]
        return (self.tile.block, *inner, columns // self.tile.block, *outer) if self.tile.split else (columns, *inner, *outer)

    @property
    def byte_strides(self) -> tuple[int, ...]:
        """Bytes along each of `dims` but the innermost. Along an extent of 1 nothing is read at a stride: it gets one that TMA accepts."""
        size = self.tile.tile.dtype.bytes
        rows, *outer = (
            stride * size if extent > 1 else VECTOR_BYTES
            for stride, extent in zip(self.strides, (self.shape[0], *self.shape[2:]), strict=True)
        )
        inner = [rows] if self.tile.packed == 1 else [outer.pop(0), rows]
        return (*inner, *((self.tile.block * size,) if self.tile.split else ()), *outer)
