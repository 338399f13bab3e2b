"""Products of tiles by warps, mma.sync: each proves its addresses at construction and prints as its C++ type (`vidrial/tile/mma.cuh`).

k = SmemLayout(dtype, 64, 128, stages=2)
qk = TiledMma(MMA_16x8x16[dtype], warps=(4, 1), tile=(128, 64, 128), a=q, b=k)
pv = TiledMma(MMA_16x8x16[dtype], warps=(4, 1), tile=(128, 128, 64), a=qk.accumulator, b=v.transposed)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidrial.device import WARP
from vidrial.errors import LayoutError
from vidrial.layout.algebra import Layout
from vidrial.layout.atoms import CopyAtom, MmaAtom, ldmatrix
from vidrial.layout.copies import LoadMatrix, TiledCopy
from vidrial.layout.fragments import accumulator_feeds, fragment_matrices, thread_layouts
from vidrial.layout.smem import SmemLayout, Steps, Transposed, prove_access
from vidrial.layout.wgmma import WarpgroupMma


@dataclasses.dataclass(frozen=True)
class Operand:
    """One operand of a TiledMma in shared memory: x4 loads `next` (rows, columns) apart, `loads` of them a step of k, steps `k` apart."""

    load: LoadMatrix
    loads: int
    next: tuple[int, int]
    k: tuple[int, int]

    @property
    def cpp(self) -> str:
        """The C++ type."""
        return f"vidrial::Operand<{self.load.arguments}, {self.next[0]}, {self.next[1]}, {self.k[0]}, {self.k[1]}>"


@dataclasses.dataclass(frozen=True)
class Accumulator:
    """The accumulator of a TiledMma, as the A operand of another one."""

    mma: TiledMma


@dataclasses.dataclass(frozen=True)
class TiledMma:
    """`C (m x n) += A (m x k) B` by `warps` = (in m, in n) warps, each in atoms of `atom.shape`; `tile` = (m, n, k).

    `a`: a tile of m x k, the `.transposed` of a tile of k x m, the `.accumulator` of another TiledMma, or None (made in registers).
    `b`: a tile of n x k (B = tile^T), the `.transposed` of a tile of k x n (B = tile), or None.
    A tile may be a multiple of that: device code then says where the part begins, or counts its steps of k on into the next part.
    Warp w is (w % warps[0], w / warps[0]). Atoms are dealt to warps in turn; with `bands` each warp has a contiguous band of rows.

    Raises:
        LayoutError: the warps cannot share the tile, an operand has another shape or dtype, or an address cannot be proved.
    """

    atom: MmaAtom
    warps: tuple[int, int]
    tile: tuple[int, int, int]
    a: SmemLayout | Transposed | Accumulator | None = None
    b: SmemLayout | Transposed | None = None
    bands: bool = False

    def __post_init__(self) -> None:
        (m, n, k), (wm, wn) = self.tile, self.warps
        if min(m, n, k, wm, wn) < 1:
            raise LayoutError(f"a tile of {m} x {n} x {k} by {wm} x {wn} warps is empty; give positive extents")
        for name, extent, warps, atom in zip("mnk", self.tile, (wm, wn, 1), self.atom.shape, strict=True):
            if extent % (warps * atom):
                raise LayoutError(f"{warps} warps cannot share {name}={extent} in atoms of {atom}; it must be a multiple of {warps * atom}")
        _prove_accumulator(self.atom)
        if isinstance(self.a, Accumulator):
            self._check_accumulator(self.a.mma)
        # Reading them builds and proves them.
        _ = self.A, self.B

    @property
    def threads(self) -> int:
        """Threads that take part."""
        return WARP * self.warps[0] * self.warps[1]

    @property
    def m_atoms(self) -> int:
        """Atoms of a warp in m."""
        return self.tile[0] // (self.warps[0] * self.atom.shape[0])

    @property
    def n_atoms(self) -> int:
        """Atoms of a warp in n."""
        return self.tile[1] // (self.warps[1] * self.atom.shape[1])

    @property
    def k_steps(self) -> int:
        """Steps of k."""
        return self.tile[2] // self.atom.shape[2]

    @property
    def accumulator_registers(self) -> int:
        """float32 accumulators per thread."""
        return self.m_atoms * self.n_atoms * self.atom.c_layout.mode(1).size

    @property
    def accumulator(self) -> Accumulator:
        """The accumulator, to be the A operand of a second TiledMma."""
        return Accumulator(self)

    @property
    def step_m(self) -> int:
        """Rows from one atom of a warp to its next."""
        return self.atom.shape[0] * (1 if self.bands else self.warps[0])

    @property
    def step_n(self) -> int:
        """Columns from one atom of a warp to its next."""
        return self.atom.shape[1] * self.warps[1]

    def warp_origin(self, warp: int) -> tuple[int, int]:
        """(row, column) of a warp's first atom."""
        wn, wm = divmod(warp, self.warps[0])
        return wm * self.atom.shape[0] * (self.m_atoms if self.bands else 1), wn * self.atom.shape[1]

    @cached_property
    def row_column(self) -> tuple[Layout, Layout]:
        """thread -> row, thread -> column of its first accumulator."""
        origins = tuple(self.warp_origin(warp) for warp in range(self.threads // WARP))
        return _first_accumulators(self.atom.c_layout.mode(0), self.atom.shape[0], origins)

    def coordinates(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Rows and columns of all accumulators: int64 arrays of shape (threads, m_atoms, n_atoms, values)."""
        thread, i, j, v = np.ogrid[: self.threads, : self.m_atoms, : self.n_atoms, : self.atom.c_layout.mode(1).size]
        row = self.row_column[0](thread) + i * self.step_m + v // 2 * 8
        column = self.row_column[1](thread) + j * self.step_n + v % 2
        rows, columns = np.broadcast_arrays(row + 0 * column, column + 0 * row)
        return rows, columns

    @cached_property
    def A(self) -> Operand | None:
        """How A is loaded; None if it is made in registers."""
        return None if self.a is None or isinstance(self.a, Accumulator) else self._operand("A", self.a)

    @cached_property
    def B(self) -> Operand | None:
        """How B is loaded; None if it is made in registers."""
        return None if self.b is None else self._operand("B", self.b)

    @property
    def cpp(self) -> str:
        """The C++ type."""
        a, b = (operand.cpp if operand else "void" for operand in (self.A, self.B))
        row, column = self.row_column
        return (
            f"vidrial::TiledMma<{self.atom.cpp}, {self.m_atoms}, {self.n_atoms}, {self.k_steps}, {a}, {b}, "
            f"{row.cpp}, {column.cpp}, {self.step_m}, {self.step_n}>"
        )

    def _operand(self, name: str, source: SmemLayout | Transposed) -> Operand:
        """The loads of one operand, derived from the atom's thread-value layout. `i` is its outer index: m of A, n of B."""
        side = "AB".index(name)
        dtype = (self.atom.a, self.atom.b)[side]
        tile, transposed = (source.tile, True) if isinstance(source, Transposed) else (source, False)
        outer, depth = (tile.columns, tile.rows) if transposed else (tile.rows, tile.columns)
        if outer % self.tile[side] or depth % self.tile[2] or tile.dtype != dtype:
            rows, columns = (self.tile[2], self.tile[side]) if transposed else (self.tile[side], self.tile[2])
            raise LayoutError(
                f"{name} of a TiledMma of (m, n, k) = {self.tile} is {'the transposed of ' if transposed else ''}a tile of "
                f"{rows} x {columns} {dtype}, or a multiple of it; got {tile.rows} x {tile.columns} {tile.dtype}"
            )
        matrices = fragment_matrices((self.atom.a_layout, self.atom.b_layout)[side], self.atom.shape[side])
        atoms, step = ((self.m_atoms, self.step_m), (self.n_atoms, self.step_n))[side]
        copy = ldmatrix(4, transposed)
        per_load = copy.matrices // len(matrices)
        if atoms % per_load:
            raise LayoutError(
                f"{name}: {copy.name} fills {per_load} atoms, a warp has {atoms}; "
                f"{'mn'[side]} must be a multiple of {per_load * self.warps[side] * self.atom.shape[side]}"
            )

        def along(i: int, k: int) -> tuple[int, int]:
            return (k, i) if transposed else (i, k)

        loads = atoms // per_load
        after, k_step = along(per_load * step, 0), along(0, self.atom.shape[2])
        origins_of = tuple(self.warp_origin(warp)[side] for warp in range(self.threads // WARP))
        layouts = _load_layouts(matrices, origins_of, step, transposed)

        def steps(k_steps: int) -> Steps:
            return tuple((i * after[0] + k * k_step[0], i * after[1] + k * k_step[1]) for k in range(k_steps) for i in range(loads))

        def origins(first: int, last: int) -> Steps:
            return tuple(along(i, k) for k in range(first, last, self.tile[2]) for i in range(0, outer, self.tile[side]))

        prove_access(tile, *layouts, self.threads, steps(self.k_steps), origins(self.tile[2], depth))
        load = LoadMatrix(tile, copy, self.threads, layouts, steps(depth // self.atom.shape[2]), origins(0, self.tile[2]))
        return Operand(load, loads, after, k_step)

    def _check_accumulator(self, first: TiledMma) -> None:
        """Whether the accumulator of `first` is, register after register, the A operand of this one."""
        reason = None
        if first.warps != self.warps or first.bands != self.bands:
            reason = f"warps {first.warps}, bands={first.bands} of the first must be those of the second, {self.warps}, bands={self.bands}"
        elif self.warps[1] != 1:
            reason = f"{self.warps[1]} warps share its columns and each needs them all: take warps=({self.warps[0] * self.warps[1]}, 1)"
        elif (first.tile[0], first.tile[1]) != (self.tile[0], self.tile[2]):
            reason = f"it is {first.tile[0]} x {first.tile[1]}, A is {self.tile[0]} x {self.tile[2]} (m x k)"
        elif not accumulator_feeds(first.atom.c_layout, self.atom.a_layout, self.atom.shape[0]):
            reason = f"{first.atom.name} leaves its values elsewhere than {self.atom.name} reads them"
        if reason:
            raise LayoutError(f"the accumulator of the first TiledMma cannot be the A operand of the second: {reason}")


@cache
def _prove_accumulator(atom: MmaAtom) -> None:
    """`row_of` and `column_of` of the C++ TiledMma assume this place of the values in a 16 x 8 accumulator."""
    c, m = atom.c_layout, atom.shape[0]
    if any(c(t, v) != c(t, 0) + v // 2 * 8 + v % 2 * m for t in range(WARP) for v in range(c.mode(1).size)):
        raise LayoutError(f"{atom.name}: the accumulator layout {c} is not pairs of columns, 8 rows apart; TiledMma does not serve it")


@cache
def _first_accumulators(lanes: Layout, m: int, origins: tuple[tuple[int, int], ...]) -> tuple[Layout, Layout]:
    """thread -> row, thread -> column of the first accumulator of warps at `origins`; `lanes`: of one, row + m * column."""

    def first(thread: int) -> tuple[int, int]:
        row, column = origins[thread // WARP]
        j, i = divmod(lanes(thread % WARP), m)
        return row + i, column + j

    return thread_layouts(first, WARP * len(origins))


@cache
def _load_layouts(matrices: tuple[tuple[int, int], ...], origins: tuple[int, ...], step: int, transposed: bool) -> tuple[Layout, Layout]:
    """thread -> row, thread -> column of an x4 ldmatrix by warps at `origins`: of atoms `step` apart, each of `matrices` at (i, k)."""

    def address(thread: int) -> tuple[int, int]:
        warp, lane = divmod(thread, WARP)
        matrix, r = divmod(lane, 8)
        atom, register = divmod(matrix, len(matrices))
        i, k = matrices[register]
        i += origins[warp] + atom * step
        return (k + r, i) if transposed else (i + r, k)

    return thread_layouts(address, WARP * len(origins))


def atoms_of(member: object) -> Iterator[MmaAtom | CopyAtom]:
    """The instructions that an object is made of; none of a plain tile or number."""
    if isinstance(member, TiledMma):
        yield member.atom
        yield from (operand.load.atom for operand in (member.A, member.B) if operand is not None)
    elif isinstance(member, (LoadMatrix, TiledCopy, WarpgroupMma)):
        yield member.atom
