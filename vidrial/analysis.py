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

from vidrial.device import Device
from vidrial.errors import ArgumentError
from vidrial.smem import VECTOR_BYTES
from vidrial.tiled import LoadMatrix, LoadVector, Operand, TiledCopy, TiledMma, WarpgroupMma
from vidrial.wgmma import DEPTH, SWIZZLE_BYTES, Descriptor

Described: TypeAlias = LoadMatrix | LoadVector | Operand | TiledMma | WarpgroupMma | Descriptor | TiledCopy

WARP, BANKS, BANK_BYTES, PHASE_BYTES, SECTOR_BYTES = 32, 32, 4, 128, 32

# Resident CTAs an SM, by compute capability times ten; 32 elsewhere (CUDA C++ Programming Guide, technical specifications).
CTAS_PER_SM = {86: 16, 87: 16, 89: 24, 120: 24}
# What the system reserves in shared memory for each CTA, and in what units registers are given to the warps of an SM.
RESERVED_SMEM, REGISTER_UNIT, WARP_UNIT = 1024, 8, 4


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
            raise ArgumentError(f"an access of {self.bytes} bytes a thread has an address that is not a multiple of {self.bytes}")


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
        return f"{self.name}: {self.kind}, {self.bytes} B, {self.sectors} sectors a request (at best {self.best_sectors})"


def analyse(described: Described, name: str = "", row_stride: int | None = None) -> list[Finding]:
    """The accesses of an object of `vidrial.tiled`.

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
        # Only the first 8 threads a matrix give ldmatrix an address.
        lanes = 8 * described.atom.matrices if isinstance(described, LoadMatrix) else WARP
        base = tile.offset(described.row(thread), described.column(thread)) * tile.dtype.bytes
        reached = np.stack([tile.at(base, *step) for step in described.steps]).reshape(-1, WARP)[:, :lanes]
        yield Finding(name, "ldmatrix" if isinstance(described, LoadMatrix) else "shared load", 16, ways=_ways(reached, 16))
    else:
        tile, thread, vector = described.tile, np.arange(described.threads), described.atom.bytes
        if described.threads % WARP:
            raise ArgumentError(f"{name}: {described.threads} threads are not whole warps; give a multiple of {WARP}")
        stride = row_stride if row_stride is not None else tile.columns * tile.dtype.bytes
        source = (described.row(thread) * stride + described.column(thread) * tile.dtype.bytes).reshape(-1, WARP)
        yield Finding(f"{name}.shared", "cp.async store", vector, ways=_ways(described.addresses().reshape(-1, WARP), vector))
        best = WARP * vector // SECTOR_BYTES
        yield Finding(f"{name}.global", "cp.async load", vector, sectors=_sectors(source), best_sectors=best)


def _ways(addresses: Any, size: int) -> int:
    """Worst turns of a bank over accesses (accesses, threads) of `size` bytes a thread."""
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


@dataclasses.dataclass(frozen=True)
class Occupancy:
    """How many CTAs an SM holds, and what limits them. `threads`, `smem` (bytes) a CTA, `registers` a thread; the rest is the SM's.

    Raises:
        ArgumentError: a CTA has no threads or registers.
    """

    threads: int
    smem: int
    registers: int
    smem_per_sm: int
    threads_per_sm: int = 2048
    registers_per_sm: int = 65536
    ctas_per_sm: int = 32

    def __post_init__(self) -> None:
        if self.threads < 1 or self.registers < 1 or self.smem < 0:
            raise ArgumentError(
                f"a CTA of {self.threads} threads, {self.registers} registers a thread and {self.smem} bytes cannot be; "
                "give positive numbers"
            )

    @classmethod
    def of(cls, device: Device, *, threads: int, smem: int, registers: int) -> Occupancy:
        """The occupancy on a device."""
        return cls(
            threads,
            smem,
            registers,
            device.smem_per_sm,
            device.threads_per_sm,
            device.registers_per_sm,
            CTAS_PER_SM.get(device.capability, 32),
        )

    @property
    def limits(self) -> dict[str, int]:
        """CTAs that each resource allows."""
        warps = -(-self.threads // WARP)
        warp_registers = -(-self.registers // REGISTER_UNIT) * REGISTER_UNIT * WARP
        resident_warps = self.registers_per_sm // warp_registers // WARP_UNIT * WARP_UNIT
        return {
            "registers": resident_warps // warps,
            "shared memory": self.smem_per_sm // (-(-self.smem // PHASE_BYTES) * PHASE_BYTES + RESERVED_SMEM),
            "threads": self.threads_per_sm // (warps * WARP),
            "CTAs": self.ctas_per_sm,
        }

    @property
    def ctas(self) -> int:
        """CTAs an SM."""
        return min(self.limits.values())

    @property
    def limited_by(self) -> tuple[str, ...]:
        """The resources that allow no more."""
        return tuple(name for name, ctas in self.limits.items() if ctas == self.ctas)

    @property
    def fraction(self) -> float:
        """Resident threads, as a part of those that the SM could hold."""
        return self.ctas * self.threads / self.threads_per_sm

    def __str__(self) -> str:
        return f"{self.ctas} CTAs an SM ({self.fraction:.0%} of its threads), limited by {', '.join(self.limited_by)}"


@dataclasses.dataclass(frozen=True)
class Waves:
    """A grid of `ctas` CTAs on `sms` SMs that hold `ctas_per_sm` each.

    Raises:
        ArgumentError: one of them is not positive.
    """

    ctas: int
    sms: int
    ctas_per_sm: int

    def __post_init__(self) -> None:
        if min(self.ctas, self.sms, self.ctas_per_sm) < 1:
            raise ArgumentError(f"{self.ctas} CTAs on {self.sms} SMs of {self.ctas_per_sm} make no wave; give positive numbers")

    @property
    def waves(self) -> int:
        """Rounds in which the CTAs run, the last one perhaps partly filled."""
        return -(-self.ctas // (self.sms * self.ctas_per_sm))

    @property
    def tail(self) -> float:
        """Part of the last wave that is filled."""
        slots = self.sms * self.ctas_per_sm
        return (self.ctas - (self.waves - 1) * slots) / slots

    @property
    def utilisation(self) -> float:
        """Part of all waves' slots that is filled."""
        return self.ctas / (self.waves * self.sms * self.ctas_per_sm)
