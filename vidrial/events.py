"""What is counted of a launch: the host target counts it, `vidrial.layout.access` predicts it per instruction and per tile."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a launch does, or a part of one, in all CTAs together.

    `mma`, `ldmatrix`, `shared_loads` (16 bytes by each thread): instructions of a warp; `wgmma`: of a warpgroup. `ldmatrix_conflicts`,
    `shared_load_conflicts`: passes over the banks beyond one per matrix, or per eight threads. `copy_calls`: times that a thread
    began its part of a TiledCopy's tile. `cp_async_requests`: instructions of a warp of which some thread reads; `cp_async_sectors`
    of 32 bytes and `cp_async_bytes` are what they read. `bulk_copies`: boxes by TMA and bulk copies, to and from shared memory;
    `bulk_bytes`: what they move, without the zeros beyond a tensor's ends.
    """

    mma: int = 0
    wgmma: int = 0
    ldmatrix: int = 0
    ldmatrix_conflicts: int = 0
    shared_loads: int = 0
    shared_load_conflicts: int = 0
    copy_calls: int = 0
    cp_async_requests: int = 0
    cp_async_sectors: int = 0
    cp_async_bytes: int = 0
    bulk_copies: int = 0
    bulk_bytes: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) + getattr(other, name) for name in FIELDS))

    def __mul__(self, times: int) -> Counts:
        return Counts(*(getattr(self, name) * times for name in FIELDS))

    def at_most(self, bound: Counts) -> bool:
        """Whether no count is beyond that of `bound`."""
        return all(getattr(self, name) <= getattr(bound, name) for name in FIELDS)


FIELDS = tuple(field.name for field in dataclasses.fields(Counts))
