"""The shape of a launch: how many CTAs, of how many threads, with how much shared memory."""

from __future__ import annotations

import dataclasses

from vidrial.device import CTA_THREADS
from vidrial.errors import ArgumentError

GRID_LIMITS = (2**31 - 1, 65535, 65535)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """CTAs along x, y, z; threads of a CTA; bytes of dynamic shared memory.

    Raises:
        ArgumentError: CUDA could not launch it on any GPU.
    """

    grid: tuple[int, int, int]
    block: int
    smem: int = 0

    def __post_init__(self) -> None:
        if (
            not isinstance(self.grid, tuple)
            or len(self.grid) != 3
            or any(not 0 <= n <= limit for n, limit in zip(self.grid, GRID_LIMITS, strict=True))
        ):
            raise ArgumentError(
                f"grid {self.grid} is not three counts of CTAs from 0 to {GRID_LIMITS}; let a CTA do more, or split the launch"
            )
        if not 1 <= self.block <= CTA_THREADS:
            raise ArgumentError(f"block of {self.block} threads: accepted are 1 to {CTA_THREADS}")
        if self.smem < 0:
            raise ArgumentError(f"dynamic shared memory of {self.smem} bytes; accepted: 0 or more")

    @property
    def empty(self) -> bool:
        """Whether there is nothing to launch (CUDA itself refuses an empty grid)."""
        return 0 in self.grid
