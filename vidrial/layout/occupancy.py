"""What limits how many CTAs an SM holds, and how a grid fills the device: occupancy and waves."""

from __future__ import annotations

import dataclasses

from vidrial.device import RESERVED_SMEM, WARP, Device
from vidrial.errors import ArgumentError
from vidrial.layout.access import PHASE_BYTES

# Resident CTAs per SM, by compute capability times ten; 32 elsewhere (CUDA C++ Programming Guide, technical specifications).
CTAS_PER_SM = {86: 16, 87: 16, 89: 24, 120: 24}
# In what units registers are given to the warps of an SM.
REGISTER_UNIT, WARP_UNIT = 8, 4


@dataclasses.dataclass(frozen=True)
class Occupancy:
    """How many CTAs an SM holds, and what limits them. `threads`, `smem` (bytes) per CTA, `registers` per thread; the rest is the SM's.

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
                f"a CTA of {self.threads} threads, {self.registers} registers per thread and {self.smem} bytes cannot be; "
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
        """CTAs per SM."""
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
        return f"{self.ctas} CTAs per SM ({self.fraction:.0%} of its threads), limited by {', '.join(self.limited_by)}"


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
