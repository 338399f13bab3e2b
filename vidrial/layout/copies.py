"""How threads move tiles: cp.async from global to shared memory, ldmatrix and plain vectors into registers; each object proves its addresses."""

from __future__ import annotations

import dataclasses
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidrial.device import VECTOR_BYTES
from vidrial.errors import LayoutError
from vidrial.layout.algebra import Layout
from vidrial.layout.atoms import VECTOR, CopyAtom, cp_async
from vidrial.layout.fragments import Table, thread_layouts
from vidrial.layout.smem import SmemLayout, Steps, prove_access


class Placed:
    """Threads and the 16 bytes that each begins at: `table` as the two layouts thread -> row and thread -> first column."""

    table: Table | tuple[Layout, Layout]

    @property
    def row(self) -> Layout:
        """thread -> row of its 16 bytes."""
        return self.table[0]  # type: ignore[index]

    @property
    def column(self) -> Layout:
        """thread -> first column of its 16 bytes."""
        return self.table[1]  # type: ignore[index]


@dataclasses.dataclass(frozen=True)
class LoadMatrix(Placed):
    """ldmatrix by `threads` threads: each supplies the address of the 16 bytes at origin + `table` + step of the tile.

    `table` is thread -> (row, column), as a function or as the two layouts that it becomes; `steps` are the (rows, columns)
    that device code adds; `origins` where the part of the tile that is read may begin. For each thread, origin, step and stage it
    is proved by brute force that the added address is the right one.

    Raises:
        LayoutError: the table is not a layout, a step leaves the tile, or address arithmetic does not reach it.
    """

    tile: SmemLayout
    atom: CopyAtom
    threads: int
    table: Table | tuple[Layout, Layout]
    steps: Steps = ((0, 0),)
    origins: Steps = ((0, 0),)

    def __post_init__(self) -> None:
        if self.atom.kind != "ldmatrix" or self.tile.dtype.bits != 16:
            raise LayoutError(f"LoadMatrix takes ldmatrix and elements of 16 bits; got {self.atom.name} and a tile of {self.tile.dtype}")
        if not isinstance(self.table, tuple):
            object.__setattr__(self, "table", thread_layouts(self.table, self.threads))
        object.__setattr__(self, "steps", tuple(self.steps))
        object.__setattr__(self, "origins", tuple(self.origins))
        prove_access(self.tile, self.row, self.column, self.threads, self.steps, self.origins)

    @property
    def arguments(self) -> str:
        """The C++ template arguments."""
        return f"{self.atom.cpp}, {self.tile.cpp}, {self.row.cpp}, {self.column.cpp}"

    @property
    def cpp(self) -> str:
        """The C++ type."""
        return f"vidrial::LoadMatrix<{self.arguments}>"


@dataclasses.dataclass(frozen=True)
class LoadVector(Placed):
    """16 bytes of a row into four registers: each thread those at `table` + step of the tile; proved like LoadMatrix.

    Raises:
        LayoutError: the table is not a layout, a step leaves the tile, or address arithmetic does not reach it.
    """

    tile: SmemLayout
    threads: int
    table: Table | tuple[Layout, Layout]
    steps: Steps = ((0, 0),)

    def __post_init__(self) -> None:
        if not isinstance(self.table, tuple):
            object.__setattr__(self, "table", thread_layouts(self.table, self.threads))
        object.__setattr__(self, "steps", tuple(self.steps))
        prove_access(self.tile, self.row, self.column, self.threads, self.steps)

    @property
    def cpp(self) -> str:
        """The C++ type."""
        return f"vidrial::LoadVector<{self.tile.cpp}, {self.row.cpp}, {self.column.cpp}>"


@dataclasses.dataclass(frozen=True)
class TiledCopy:
    """A whole tile from global to shared memory by `threads` threads, 16 bytes each a step; rows and columns beyond the end become zero.

    Neighbouring threads copy neighbouring vectors of a row, or of a block of the tile's columns where the threads do not fill whole rows
    evenly; a step is `row_step` rows, or the next block. That each element is written once, where the layout wants it, is proved.
    `atom` says in which pieces the 16 bytes are copied, by how the rows in global memory are aligned: cp.async of 16, 8 or 4 bytes, or
    `VECTOR[2]`, plain loads of single elements.

    Raises:
        LayoutError: the threads do not divide the tile evenly, the atom is another one, or a step breaks the swizzle.
    """

    atom: CopyAtom
    tile: SmemLayout
    threads: int

    def __post_init__(self) -> None:
        tile, atoms = self.tile, [cp_async(size, zero_fill=True) for size in (16, 8, 4)]
        if tile.dtype.bytes == VECTOR[2].bytes:
            atoms.append(VECTOR[2])
        if self.atom not in atoms or self.atom.bytes < tile.dtype.bytes:
            raise LayoutError(f"TiledCopy of {tile.dtype} is made of {', '.join(atom.name for atom in atoms)}; got {self.atom.name}")
        vectors = tile.rows * tile.columns // self.vector
        if tile.columns % self.vector or self.threads < 1 or self.threads % self.row_vectors or tile.rows % max(self.row_step, 1):
            raise LayoutError(
                f"{self.threads} threads cannot copy {tile.rows} x {tile.columns} {tile.dtype} ({vectors} vectors of "
                f"{VECTOR_BYTES} bytes) evenly; they must fill n rows of {self.row_vectors} vectors, n of {tile.rows}"
            )
        prove_access(tile, self.row, self.column, self.threads, self.steps)
        reached = self.addresses() // VECTOR_BYTES
        if not np.array_equal(np.sort(reached, axis=None), np.arange(vectors)):
            raise LayoutError(f"{self.threads} threads do not copy each vector of {tile} once")

    @property
    def vector(self) -> int:
        """Elements in the 16 bytes of a thread."""
        return VECTOR_BYTES // self.tile.dtype.bytes

    @property
    def row_vectors(self) -> int:
        """Vectors of a row that neighbouring threads copy at once: all of them, or those of a block of columns."""
        tile, vector = self.tile, self.vector
        whole, block = max(tile.columns // vector, 1), max(tile.block // vector, 1)
        step = self.threads // whole
        # Steps of whole swizzle periods, or one.
        even = self.threads % whole == 0 and (
            step == tile.rows or (step > 0 and step * tile.block * tile.dtype.bytes % tile.period_bytes == 0)
        )
        return whole if even or tile.swizzle is None or tile.columns % (block * vector) else block

    @property
    def columns(self) -> range:
        """First columns of the blocks of a row, one vector per thread each."""
        return range(0, max(self.tile.columns, 1), self.row_vectors * self.vector)

    @property
    def row_step(self) -> int:
        """Rows that all threads together copy at once."""
        return self.threads // self.row_vectors

    @property
    def steps(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) that a thread adds, step by step."""
        return tuple((row, column) for row in range(0, self.tile.rows, self.row_step) for column in self.columns)

    @cached_property
    def row_column(self) -> tuple[Layout, Layout]:
        """thread -> row, thread -> column of its first vector."""
        return _vectors_in_rows(self.row_vectors, self.vector, self.threads)

    @property
    def row(self) -> Layout:
        """thread -> row of its first vector."""
        return self.row_column[0]

    @property
    def column(self) -> Layout:
        """thread -> column of its first vector."""
        return self.row_column[1]

    def addresses(self) -> NDArray[Any]:
        """Byte address in the tile of each vector, as device code computes it: int64, (steps, threads)."""
        thread = np.arange(self.threads)
        base = self.tile.offset(self.row(thread), self.column(thread)) * self.tile.dtype.bytes
        return np.stack([self.tile.at(base, *step) for step in self.steps])

    @property
    def cpp(self) -> str:
        """The C++ type."""
        blocks = f", {self.columns.step}, {len(self.columns)}" if len(self.columns) > 1 else ""
        return (
            f"vidrial::TiledCopy<{self.atom.cpp}, {self.tile.cpp}, {self.row.cpp}, {self.column.cpp}, {self.row_step}, "
            f"{self.tile.rows // self.row_step}{blocks}>"
        )


@cache
def _vectors_in_rows(row_vectors: int, vector: int, threads: int) -> tuple[Layout, Layout]:
    """thread -> row, thread -> column of neighbouring vectors, `row_vectors` a row."""
    return thread_layouts(lambda thread: (thread // row_vectors, thread % row_vectors * vector), threads)
