"""How threads read a tile of shared memory: ldmatrix, and plain vectors; each object proves its addresses."""

from __future__ import annotations

import dataclasses

from vidrial.atoms import CopyAtom
from vidrial.errors import LayoutError
from vidrial.layout import Layout
from vidrial.smem import SmemLayout, Steps, prove_access
from vidrial.thread_map import Table, thread_layouts


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
