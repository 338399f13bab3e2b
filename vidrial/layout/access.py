"""What is known before anything runs: bank conflicts, sectors, occupancy, waves.

A warp's access to shared memory is served in phases of at most 128 bytes: eight threads of 16 bytes (each matrix of ldmatrix),
sixteen of 8 bytes, or all 32. Within a phase, a bank that has to give several words takes as many turns. wgmma takes its operands by
itself, in the same 8 x 16 bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

from vidrial.errors import ArgumentError
from vidrial.layout.copies import LoadMatrix, LoadVector, TiledCopy
from vidrial.layout.epilogue import Epilogue
from vidrial.layout.mma import Operand, TiledMma
from vidrial.layout.smem import VECTOR_BYTES
from vidrial.layout.wgmma import DEPTH, SWIZZLE_BYTES, Descriptor, WarpgroupMma

Described: TypeAlias = LoadMatrix | LoadVector | Operand | TiledMma | WarpgroupMma | Descriptor | TiledCopy | Epilogue
WARP, BANKS, BANK_BYTES, PHASE_BYTES, SECTOR_BYTES = 32, 32, 4, 128, 32


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
    """The accesses of an object of `vidrial.layout.mma`.

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
        yield from _findings(described.load, name, row_stride)
    elif isinstance(described, Descriptor):
        tile = described.tile
        row, chunk, r = np.ogrid[: tile.rows : 8, : tile.columns : VECTOR_BYTES // tile.dtype.bytes, :8]
        reached = (tile.offset(row + r, chunk) * tile.dtype.bytes).reshape(-1, 8)
        kind = f"wgmma descriptor, {SWIZZLE_BYTES[described.swizzle]}-byte swizzle"
        yield Finding(name, kind, described.extent * DEPTH * tile.dtype.bytes, ways=_ways(reached, VECTOR_BYTES))
    elif isinstance(described, (LoadMatrix, LoadVector)):
        tile, thread = described.tile, np.arange(described.threads)
        # Only the first 8 threads per matrix give ldmatrix an address.
        lanes = 8 * described.atom.matrices if isinstance(described, LoadMatrix) else WARP
        base = tile.offset(described.row(thread), described.column(thread)) * tile.dtype.bytes
        reached = np.stack([tile.at(base, *step) for step in described.steps]).reshape(-1, WARP)[:, :lanes]
        yield Finding(name, "ldmatrix" if isinstance(described, LoadMatrix) else "shared load", 16, ways=_ways(reached, 16))
    elif isinstance(described, Epilogue):
        # Two columns each of a warp's threads at once, then 16 bytes of a row each; pieces of these, one after the other, to global memory.
        copy, size = described.copy, described.tile.dtype.bytes
        pairs = described.addresses().transpose(1, 2, 3, 0).reshape(-1, WARP)
        yield Finding(f"{name}.put", "shared store", 2 * size, ways=_ways(pairs, 2 * size))
        yield Finding(f"{name}.take", "shared load", VECTOR_BYTES, ways=_ways(copy.addresses().reshape(-1, WARP), VECTOR_BYTES))
        thread, stride = np.arange(described.threads), row_stride if row_stride is not None else described.tile.columns * size
        target = (copy.row(thread) * stride + copy.column(thread) * size).reshape(-1, WARP)
        best = WARP * described.atom.bytes // SECTOR_BYTES
        yield Finding(f"{name}.global", "global store", described.atom.bytes, sectors=_sectors(target), best_sectors=best)
    else:
        # In pieces, the first of each vector: the others lie beside it.
        tile, thread, vector = described.tile, np.arange(described.threads), described.atom.bytes
        if described.threads % WARP:
            raise ArgumentError(f"{name}: {described.threads} threads are not whole warps; give a multiple of {WARP}")
        stride = row_stride if row_stride is not None else tile.columns * tile.dtype.bytes
        source = (described.row(thread) * stride + described.column(thread) * tile.dtype.bytes).reshape(-1, WARP)
        yield Finding(f"{name}.shared", "cp.async store", vector, ways=_ways(described.addresses().reshape(-1, WARP), vector))
        best = WARP * vector // SECTOR_BYTES
        yield Finding(f"{name}.global", "cp.async load", vector, sectors=_sectors(source), best_sectors=best)


def _ways(addresses: Any, size: int) -> int:
    """Worst turns of a bank over accesses (accesses, threads) of `size` bytes per thread."""
    phase = min(PHASE_BYTES // size, addresses.shape[1])
    first = addresses.reshape(-1, phase) // BANK_BYTES
    words = np.sort((first[:, :, None] + np.arange(max(size // BANK_BYTES, 1))).reshape(len(first), -1), axis=1)
    new = np.ones(words.shape, bool)
    new[:, 1:] = words[:, 1:] != words[:, :-1]
    turns = np.zeros((len(words), BANKS), int)
    np.add.at(turns, (np.nonzero(new)[0], words[new] % BANKS), 1)
    return int(turns.max())


def _sectors(addresses: Any) -> int:
    """Most sectors that one of the accesses (accesses, threads) touches; an aligned vector lies in one."""
    return max(len(np.unique(request // SECTOR_BYTES)) for request in addresses)
