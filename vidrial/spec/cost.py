"""What a launch costs by its description, to rank configs before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass

from vidrial.device import Device

LAUNCH_SECONDS = 3e-6


@dataclass(frozen=True)
class Cost:
    """What a launch must do, to rank configs before anything is measured.

    Args:
        flops: floating-point operations, those thrown away included.
        bytes: bytes that must cross device memory.
        ctas: CTAs launched.
        ctas_per_sm: how many of them an SM holds at once.
        efficiency: share of the device's tensor rate that the inner loop reaches when every SM is full.
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
