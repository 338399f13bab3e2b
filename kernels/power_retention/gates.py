"""Stage 1: log gates -> decays (`power_gates.cuh`). One CTA a chunk of one head; memory-bound, microseconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vidrial import Arguments, Cost, Device, Kernel, Tiles, choice
from vidrial.kernels.power_retention import pace
from vidrial.kernels.power_retention.problem import Chunked
from vidrial.templates import TEMPLATES

# Tokens of a thread in one pass (`power_gates.cuh`).
TOKENS = 4


@dataclass(frozen=True)
class Config:
    """`threads` a CTA; `block`: keys per block of power_attend, whose decay to the block's end is tabulated."""

    threads: int = choice(256, 128, 512)
    block: int = 64


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


def tiles(p: Chunked, c: Config) -> Tiles:
    return Tiles(threads=c.threads)


def grid(p: Chunked, c: Config) -> tuple[int, int, int]:
    return p.chunks, p.b * p.h, 1


def cost(p: Chunked, c: Config, device: Device) -> Cost:
    # Tables go on to the end of the last chunk; without a state nobody asks for `to_end`.
    tables = (16 if p.stateful else 12) * p.chunks * p.chunk
    passes = -(-p.chunk // (TOKENS * c.threads))
    return Cost(flops=0, bytes=p.b * p.h * (4 * p.t + tables), ctas=p.chunks * p.b * p.h, ctas_per_sm=4, alone=pace.GATES_PASS * passes)


power_gates = Kernel(
    "power_gates",
    Path(TEMPLATES, "power_retention", "power_gates.cu.j2"),
    Chunked,
    Config,
    ARGS,
    tiles,
    grid,
    cost=cost,
    scalars=lambda p, c: {"block": c.block},
)
