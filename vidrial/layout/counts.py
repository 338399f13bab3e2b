"""How often a launch does what the host target counts: MMAs, ldmatrix and their bank conflicts, cp.async.

A kernel's `traffic(problem, config)` says how often each of its tiled objects is at work; what one time costs is derived here from the
object itself. The host target counts the same while it runs: the two must be equal.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np

from vidrial.device import VECTOR_BYTES, WARP
from vidrial.layout.copies import LoadMatrix, TiledCopy
from vidrial.layout.mma import TiledMma
from vidrial.layout.wgmma import WarpgroupMma

BANKS_16_BYTES, SECTOR_BYTES = 8, 32


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a launch does, or a part of one, in all CTAs together; the fields are those of `vidrial.host.target.HostStats`.

    `mma`, `ldmatrix`: instructions of a warp; `wgmma`: of a warpgroup. `ldmatrix_conflicts`: passes over the banks beyond one per matrix. `cp_async_requests`:
    instructions of a warp of which some thread reads; `cp_async_sectors` of 32 bytes and `cp_async_bytes` are what they read.
    """

    mma: int = 0
    ldmatrix: int = 0
    ldmatrix_conflicts: int = 0
    cp_async_requests: int = 0
    cp_async_sectors: int = 0
    cp_async_bytes: int = 0
    wgmma: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, times: int) -> Counts:
        return Counts(*(n * times for n in dataclasses.astuple(self)))


def products(mma: TiledMma | WarpgroupMma, k_steps: int | None = None) -> Counts:
    """What each warp of a TiledMma, or warpgroup of a WarpgroupMma, does in `k_steps` steps of k, by default all: its MMAs, and
    ldmatrix of the operands that it loads."""
    steps = mma.k_steps if k_steps is None else k_steps
    if isinstance(mma, WarpgroupMma):
        return Counts(wgmma=mma.m_atoms * steps)
    total = Counts(mma=mma.m_atoms * mma.n_atoms * steps)
    for operand in (mma.A, mma.B):
        if operand is not None:
            total += loads(operand.load, operand.loads * steps)
    return total


def loads(load: LoadMatrix, instructions: int) -> Counts:
    """That many ldmatrix of a warp."""
    return Counts(ldmatrix=instructions, ldmatrix_conflicts=instructions * _conflicts(load))


@cache
def _conflicts(load: LoadMatrix) -> int:
    """Passes beyond one per matrix, of all matrices of an instruction together: rows of 16 bytes in the same banks, at other addresses.

    Those of the first warp at its first step: elsewhere the rows are others, but their distances, which decide, are the same.
    """
    thread = np.arange(8 * load.atom.matrices)
    vector = load.tile.offset(load.row(thread), load.column(thread)) * load.tile.dtype.bytes // VECTOR_BYTES
    return sum(_extra(matrix) for matrix in vector.reshape(-1, 8))


def _extra(rows: Any) -> int:
    return int(np.bincount(np.unique(rows) % BANKS_16_BYTES).max()) - 1


@cache
def copies(copy: TiledCopy, rows: int, row_stride: int) -> Counts:
    """One TiledCopy of a tile of which `rows` rows exist (0 to all), `row_stride` bytes apart from a start that is aligned to a sector."""
    thread, vector = np.arange(copy.threads), copy.atom.bytes
    total = Counts()
    for step, _ in copy.steps:
        row = step + copy.row(thread)
        sector = (row * row_stride + copy.column(thread) * copy.tile.dtype.bytes) // SECTOR_BYTES
        for first in range(0, copy.threads, WARP):
            read = sector[first : first + WARP][row[first : first + WARP] < rows]
            total += Counts(0, 0, 0, int(len(read) > 0), len(np.unique(read)), len(read) * vector)
    return total


def vectors(threads: int) -> Counts:
    """cp.async of 16 neighbouring bytes by each of the first `threads` threads, from a start that is aligned to a sector."""
    size = threads * VECTOR_BYTES
    whole, rest = divmod(threads, WARP)
    per_warp = WARP * VECTOR_BYTES // SECTOR_BYTES
    return Counts(0, 0, 0, whole + (rest > 0), whole * per_warp + -(-rest * VECTOR_BYTES // SECTOR_BYTES), size)
