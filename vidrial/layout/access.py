"""What accesses to memory cost, known before anything runs: bank conflicts in shared memory, sectors of global memory.

A warp's access to shared memory is served in phases of at most 128 bytes: eight threads of 16 bytes (each matrix of ldmatrix),
sixteen of 8 bytes, or all 32. Within a phase, a bank that has to give several words takes as many turns. wgmma takes its operands by
itself, in the same 8 x 16 bytes.

What one instruction or one full tile costs follows from the object alone, and the host target counts it per object:
`counted == per_instruction(load) * counted.ldmatrix`, `counted == per_tile(copy) * tiles`, less where a tile has fewer rows.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vidrial.device import VECTOR_BYTES, WARP
from vidrial.errors import ArgumentError
from vidrial.events import Counts
from vidrial.layout.copies import LoadMatrix, LoadVector, TiledCopy
from vidrial.layout.epilogue import Epilogue
from vidrial.layout.mma import Operand, TiledMma
from vidrial.layout.tma import TmaTile
from vidrial.layout.wgmma import DEPTH, SWIZZLE_BYTES, Descriptor, WarpgroupMma

Described: TypeAlias = LoadMatrix | LoadVector | Operand | TiledMma | WarpgroupMma | Descriptor | TiledCopy | Epilogue
# What the host target counts apart.
Tiled: TypeAlias = LoadMatrix | LoadVector | TiledCopy | TmaTile | Operand | TiledMma | WarpgroupMma
BANKS, BANK_BYTES, PHASE_BYTES, SECTOR_BYTES = 32, 4, 128, 32


@dataclasses.dataclass(frozen=True)
class Access:
    """One access of a warp: the byte address of each thread, and how many bytes each moves.

    Raises:
        ArgumentError: no or more than 32 addresses, or a size other than 1, 2, 4, 8, 16, or an unaligned address.
    """

    addresses: tuple[int, ...]
    bytes: int

    def __post_init__(self) -> None:
        if not 1 <= len(self.addresses) <= WARP or self.bytes not in (1, 2, 4, 8, 16):
            raise ArgumentError(
                f"{len(self.addresses)} threads of {self.bytes} bytes are not an access of a warp; "
                "accepted: 1 to 32 threads of 1, 2, 4, 8 or 16 bytes"
            )
        if any(address % self.bytes for address in self.addresses):
            raise ArgumentError(f"an access of {self.bytes} bytes per thread has an address that is not a multiple of {self.bytes}")


def bank_conflicts(access: Access) -> int:
    """Turns of the worst phase in shared memory: 1 is free of conflicts. Threads that read one word share it."""
    return _ways(np.array(access.addresses)[None], access.bytes)


def sectors(access: Access) -> int:
    """Sectors of 32 bytes that the access touches in global memory."""
    return _sectors(np.array(access.addresses)[None])


@dataclasses.dataclass(frozen=True)
class Finding:
    """One kind of access of a kernel: `bytes` a thread (wgmma: of the operand of one instruction); the worst `ways` of a bank (shared),
    or `sectors` a warp and the fewest possible (global)."""

    name: str
    kind: str
    bytes: int
    ways: int | None = None
    sectors: int | None = None
    best_sectors: int | None = None

    def __str__(self) -> str:
        if self.ways is not None:
            return f"{self.name}: {self.kind}, {self.bytes} B, {'no bank conflict' if self.ways == 1 else f'{self.ways}-way bank conflict'}"
        return f"{self.name}: {self.kind}, {self.bytes} B, {self.sectors} sectors per request (at best {self.best_sectors})"


def analyse(described: Described, name: str = "", row_stride: int | None = None) -> list[Finding]:
    """The accesses of a load, a copy, an MMA with its operands, a descriptor or an epilogue.

    `row_stride`: bytes from row to row in global memory, by default those of a row of the tile.

    Raises:
        ArgumentError: the threads of a copy are not whole warps.
    """
    return list(_findings(described, name or type(described).__name__, row_stride))


def _findings(described: Described, name: str, row_stride: int | None) -> Iterator[Finding]:
    if isinstance(described, (TiledMma, WarpgroupMma)):
        for side, operand in (("A", described.A), ("B", described.B)):
            if operand is not None:
                yield from _findings(operand, f"{name}.{side}", row_stride)
    elif isinstance(described, Operand):
        yield _of_load(described.load, name)
    elif isinstance(described, Descriptor):
        yield _of_descriptor(described, name)
    elif isinstance(described, (LoadMatrix, LoadVector)):
        yield _of_load(described, name)
    elif isinstance(described, Epilogue):
        yield from _of_epilogue(described, name, row_stride)
    else:
        yield from _of_copy(described, name, row_stride)


def _of_descriptor(described: Descriptor, name: str) -> Finding:
    """What wgmma reads by itself: 8 rows of 16 bytes at once."""
    tile = described.tile
    row, chunk, r = np.ogrid[: tile.rows : 8, : tile.columns : VECTOR_BYTES // tile.dtype.bytes, :8]
    reached = (tile.offset(row + r, chunk) * tile.dtype.bytes).reshape(-1, 8)
    kind = f"wgmma descriptor, {SWIZZLE_BYTES[described.swizzle]}-byte swizzle"
    return Finding(name, kind, described.extent * DEPTH * tile.dtype.bytes, ways=_ways(reached, VECTOR_BYTES))


def _of_load(described: LoadMatrix | LoadVector, name: str) -> Finding:
    tile, thread = described.tile, np.arange(described.threads)
    # Only the first 8 threads per matrix give ldmatrix an address.
    kind, lanes = ("ldmatrix", 8 * described.atom.matrices) if isinstance(described, LoadMatrix) else ("shared load", WARP)
    base = tile.offset(described.row(thread), described.column(thread)) * tile.dtype.bytes
    reached = np.stack([tile.at(base, *step) for step in described.steps]).reshape(-1, WARP)[:, :lanes]
    return Finding(name, kind, VECTOR_BYTES, ways=_ways(reached, VECTOR_BYTES))


def _of_epilogue(described: Epilogue, name: str, row_stride: int | None) -> Iterator[Finding]:
    """Two columns each of a warp's threads at once, then 16 bytes of a row each; pieces of these, one after the other, to global memory."""
    copy, size = described.copy, described.tile.dtype.bytes
    pairs = described.addresses().transpose(1, 2, 3, 0).reshape(-1, WARP)
    yield Finding(f"{name}.put", "shared store", 2 * size, ways=_ways(pairs, 2 * size))
    yield Finding(f"{name}.take", "shared load", VECTOR_BYTES, ways=_ways(copy.addresses().reshape(-1, WARP), VECTOR_BYTES))
    yield _of_rows(copy, f"{name}.global", "global store", described.atom.bytes, row_stride)


def _of_copy(described: TiledCopy, name: str, row_stride: int | None) -> Iterator[Finding]:
    """In pieces, the first of each vector: the others lie beside it."""
    if described.threads % WARP:
        raise ArgumentError(f"{name}: {described.threads} threads are not whole warps; give a multiple of {WARP}")
    vector = described.atom.bytes
    yield Finding(f"{name}.shared", "cp.async store", vector, ways=_ways(described.addresses().reshape(-1, WARP), vector))
    yield _of_rows(described, f"{name}.global", "cp.async load", vector, row_stride)


def _of_rows(copy: TiledCopy, name: str, kind: str, vector: int, row_stride: int | None) -> Finding:
    """A warp's requests of `vector` bytes per thread to rows in global memory, `row_stride` bytes apart."""
    thread, size = np.arange(copy.threads), copy.tile.dtype.bytes
    stride = copy.tile.columns * size if row_stride is None else row_stride
    reached = (copy.row(thread) * stride + copy.column(thread) * size).reshape(-1, WARP)
    return Finding(name, kind, vector, sectors=_sectors(reached), best_sectors=WARP * vector // SECTOR_BYTES)


def _ways(addresses: NDArray[Any], size: int) -> int:
    """Worst turns of a bank over accesses (accesses, threads) of `size` bytes per thread."""
    return int(turns(addresses, size).max())


def turns(addresses: Any, size: int) -> Any:
    """Turns that the busiest bank takes in each phase of accesses (accesses, threads) of `size` bytes per thread: int64, (accesses, phases)."""
    phase = min(PHASE_BYTES // size, addresses.shape[1])
    first = addresses.reshape(-1, phase) // BANK_BYTES
    words = np.sort((first[:, :, None] + np.arange(max(size // BANK_BYTES, 1))).reshape(len(first), -1), axis=1)
    new = np.ones(words.shape, bool)
    new[:, 1:] = words[:, 1:] != words[:, :-1]
    busy = np.zeros((len(words), BANKS), int)
    np.add.at(busy, (np.nonzero(new)[0], words[new] % BANKS), 1)
    return busy.max(axis=1).reshape(len(addresses), -1)


def _sectors(addresses: NDArray[Any]) -> int:
    """Most sectors that one of the accesses (accesses, threads) touches; an aligned vector lies in one."""
    return max(len(np.unique(request // SECTOR_BYTES)) for request in addresses)


def tiled_objects(members: Mapping[str, Any]) -> dict[str, Tiled]:
    """The members of a `Tiles` that are counted apart, and the operands that a TiledMma loads, as `QK.B`."""
    found: dict[str, Tiled] = {}
    for name, member in members.items():
        if isinstance(member, (LoadMatrix, LoadVector, TiledCopy, TmaTile, TiledMma, WarpgroupMma)):
            found[name] = member
        if isinstance(member, TiledMma):
            found |= {f"{name}.{side}": operand for side, operand in (("A", member.A), ("B", member.B)) if operand is not None}
    return found


@cache
def per_instruction(tiled: LoadMatrix | LoadVector | Operand | TiledMma | WarpgroupMma) -> Counts:
    """One ldmatrix or shared load of a warp, one MMA. Conflicts are those of the worst warp, step and origin; where a layout treats all alike,
    as every tile with its own swizzle and every padded one does, each instruction has as many."""
    if isinstance(tiled, TiledMma):
        return Counts(mma=1)
    if isinstance(tiled, WarpgroupMma):
        return Counts(wgmma=1)
    conflicts = int(load_conflicts(tiled).max())
    if isinstance(tiled, LoadVector):
        return Counts(shared_loads=1, shared_load_conflicts=conflicts)
    return Counts(ldmatrix=1, ldmatrix_conflicts=conflicts)


def load_conflicts(tiled: LoadMatrix | LoadVector | Operand) -> Any:
    """Passes over the banks beyond one per matrix, or per eight threads, of each instruction that the object may issue: int64, by origin, step
    and warp."""
    load = tiled.load if isinstance(tiled, Operand) else tiled
    thread, tile = np.arange(load.threads), load.tile
    origins, lanes = (load.origins, 8 * load.atom.matrices) if isinstance(load, LoadMatrix) else (((0, 0),), WARP)
    bases = (tile.offset(row + load.row(thread), column + load.column(thread)) * tile.dtype.bytes for row, column in origins)
    # A step may leave the part of the tile that begins at another origin than the first: the address arithmetic is the same.
    reached = np.stack([tile.at(base, *step) for base in bases for step in load.steps]).reshape(-1, WARP)[:, :lanes]
    return (turns(reached, VECTOR_BYTES) - 1).sum(axis=1)


@cache
def per_tile(copy: TiledCopy | TmaTile, row_stride: int | None = None, rows: int | None = None, columns: int | None = None) -> Counts:
    """One TiledCopy or TmaTile of a tile of which `rows` rows and `columns` columns exist, by default all; plain loads of single elements are not counted.

    `row_stride`: bytes from row to row in global memory, by default those of a row of the tile; the first row is aligned to a sector.
    """
    if isinstance(copy, TmaTile):
        there = copy.tile.rows if rows is None else rows
        return Counts(bulk_copies=copy.boxes, bulk_bytes=there * copy.tile.columns * copy.tile.dtype.bytes)
    thread, size, piece = np.arange(copy.threads), copy.tile.dtype.bytes, copy.atom.bytes
    stride = copy.tile.columns * size if row_stride is None else row_stride
    there, width = copy.tile.rows if rows is None else rows, (copy.tile.columns if columns is None else columns) * size
    requests = sectors = read_bytes = 0
    parts = range(0, VECTOR_BYTES, piece) if copy.atom.kind == "cp.async" else ()
    for (step, block), part in itertools.product(copy.steps, parts):
        row, byte = step + copy.row(thread), (block + copy.column(thread)) * size + part
        sector, read = (row * stride + byte) // SECTOR_BYTES, np.where(row < there, np.clip(width - byte, 0, piece), 0)
        for first in range(0, copy.threads, WARP):
            found = sector[first : first + WARP][read[first : first + WARP] > 0]
            requests, sectors = requests + (len(found) > 0), sectors + len(np.unique(found))
        read_bytes += int(read.sum())
    return Counts(copy_calls=copy.threads, cp_async_requests=requests, cp_async_sectors=sectors, cp_async_bytes=read_bytes)


def flops(tiled: TiledMma | WarpgroupMma, counts: Counts) -> int:
    """Floating-point operations of the MMAs that were counted: 2 m n k each."""
    return 2 * math.prod(tiled.atom.shape) * (counts.mma + counts.wgmma)
