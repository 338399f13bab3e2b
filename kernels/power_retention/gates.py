"""Stage 1: log gates -> decays (`power_gates.cuh`). One CTA a chunk of one head; memory-bound, microseconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vidrial.device import Device
from vidrial.spec.cost import Cost
from vidrial.spec.fields import choice, dynamic
from vidrial.spec.kernel import Kernel
from vidrial.spec.source import Arguments, Tiles
from vidrial.templates import TEMPLATES


@dataclass(frozen=True)
class Problem:
    """`block`: keys per block of power_attend, whose decay to the block's end is tabulated."""

    b: int = dynamic()
    t: int = dynamic()
    h: int = dynamic()
    chunk: int = dynamic()
    block: int = dynamic()
    log_g_stride: tuple[int, int, int] = dynamic(keyed=False)


@dataclass(frozen=True)
class Config:
    """`threads` a CTA."""

    threads: int = choice(256, 128, 512)


ARGS = Arguments(
    log_g="float const*",
    a="float2*",
    to_end="float*",
    to_block="float*",
    log_g_stride="int64_t[3]",
    t="int",
    h="int",
    chunk="int",
    block="int",
)


def tiles(p: Problem, c: Config) -> Tiles:
    return Tiles(threads=c.threads)


def grid(p: Problem, c: Config) -> tuple[int, int, int]:
    return -(-p.t // p.chunk), p.b * p.h, 1


def cost(p: Problem, c: Config, device: Device) -> Cost:
    return Cost(flops=0, bytes=20 * p.b * p.h * p.t, ctas=-(-p.t // p.chunk) * p.b * p.h, ctas_per_sm=4)


power_gates = Kernel("power_gates", Path(TEMPLATES, "power_retention", "power_gates.cu.j2"), Problem, Config, ARGS, tiles, grid, cost=cost)
