"""What a launch costs by its description, to rank configs before anything is measured.

The constants were fitted to the trials of the shipped rankings, together with those of the kernels: docs/sweeping.md says how well they
hold, and how they are held to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from vidrial.device import Device

LAUNCH_SECONDS = 3.39e-6
# Setting a workspace buffer to 0 before a launch is an operation of its own on the stream.
CLEAR_SECONDS = 1.7e-6
# Of its arithmetic, what a CTA adds to the time of others that share its SM: they wait while it works.
CROWD = 0.308
# Of the time that memory takes, what arithmetic does not hide.
EXPOSED = 0.503
# Bytes per second of L2, over those of device memory.
L2_SPEED = 2.09
# What the last CTAs of unlike ones add to an even share of all work, in times of the longest.
TAIL = 0.673


@dataclass(frozen=True)
class Cost:
    """What a launch must do, to rank configs before anything is measured.

    Args:
        flops: floating-point operations, those thrown away included: 2 m n k of every MMA that the launch issues, as the host target counts
            them. Of a kernel without MMAs, those of its inner loop.
        bytes: bytes that must cross device memory: those of the 32-byte sectors that the launch reads before it writes them, and of those
            that it writes, each once, as the host target counts them (`accesses`). A kernel that reads again what L2 has lost adds that.
        ctas: CTAs launched; where some are shorter and leave room for others, as many of the longest as take the same time.
        ctas_per_sm: how many of them an SM holds at once.
        efficiency: share of the device's tensor rate that the inner loop reaches when every SM is full.
        alone: seconds that a CTA takes on average with an SM to itself, waiting included. 0: its arithmetic alone, at that rate.
        longest: the longest CTA's time, over the mean.
        uneven: CTAs take unlike times, so that no wave ends at once.
        l2_bytes: bytes that all CTAs together read through L2, where it is many times `bytes`.
        cleared: workspace buffers that are set to 0 before the launch (`Buffer(zeroed=True)`).
    """

    flops: float
    bytes: float
    ctas: int
    ctas_per_sm: int = 1
    efficiency: float = 0.5
    alone: float = 0.0
    longest: float = 1.0
    uneven: bool = False
    l2_bytes: float = 0.0
    cleared: int = 0

    def arithmetic(self, device: Device) -> float:
        """Seconds of one CTA's arithmetic at its share of the tensor rate of an SM."""
        return self.flops / max(1, self.ctas) * device.sms / (device.tensor_tflops * 1e12 * self.efficiency)

    def seconds(self, device: Device) -> float:
        """Predicted time: the launch, and the CTAs' waves with what they do not hide of memory, or all arithmetic or traffic if that is more."""
        ctas, per_sm, sms, bandwidth = max(1, self.ctas), max(1, self.ctas_per_sm), device.sms, device.bandwidth_gbs * 1e9
        own, memory, l2 = self.arithmetic(device), self.bytes / bandwidth, self.l2_bytes / (L2_SPEED * bandwidth)

        def wave(resident: int) -> float:
            return (self.alone or own) + CROWD * (resident - 1) * own + EXPOSED * resident * l2 * sms / ctas

        if self.uneven:
            resident = min(per_sm, -(-ctas // sms))
            shares = ctas / (sms * resident)
            span = wave(resident) * min(max(1.0, shares) * self.longest, shares + TAIL * self.longest)
        else:
            full, rest = divmod(ctas, sms * per_sm)
            span = full * wave(per_sm) + (self.longest * wave(-(-rest // sms)) if rest else 0.0)
        return LAUNCH_SECONDS + CLEAR_SECONDS * self.cleared + max(memory + l2, ctas * own / sms, span + EXPOSED * memory)
