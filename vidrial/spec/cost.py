"""What a launch costs by its description, to rank configs before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass

from vidrial.device import Device

LAUNCH_SECONDS = 3e-6


@dataclass(frozen=True)
class Cost:
    """What a launch must do, to rank configs before anything is measured.

    Args:
        flops: floating-point operations, those thrown away included: 2 m n k of every MMA that the launch issues, as the host target counts
            them. Of a kernel without MMAs, those of its inner loop.
        bytes: bytes that must cross device memory: those of the 32-byte sectors that the launch reads before it writes them, and of those
            that it writes, each once, as the host target counts them (`accesses`). A kernel that reads again what L2 has lost adds that.
        ctas: CTAs launched.
        ctas_per_sm: how many of them an SM holds at once.
        efficiency: share of the device's tensor rate that the inner loop reaches when every SM is full, less what waits for others.
        uneven: CTAs take unlike times, so that no wave ends at once: half of one is lost, however many there are.
    """

    flops: float
    bytes: float
    ctas: int
    ctas_per_sm: int = 1
    efficiency: float = 0.5
    uneven: bool = False

    def seconds(self, device: Device) -> float:
        """Predicted time: the slower of arithmetic and memory, stretched by the idle slots of the last wave, plus the launch."""
        slots = device.sms * max(1, self.ctas_per_sm)
        ctas = max(1, self.ctas)
        filled = ctas / (ctas + slots / 2 if self.uneven and ctas > slots else -(-ctas // slots) * slots)
        arithmetic = self.flops / (device.tensor_tflops * 1e12 * self.efficiency * filled)
        return max(arithmetic, self.bytes / (device.bandwidth_gbs * 1e9)) + LAUNCH_SECONDS
