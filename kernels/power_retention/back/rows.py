"""Stage 2 of the backward pass: what a row of y weighs (`power_back_rows.cuh`); memory-bound."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vidrial import Arguments, Cost, Device, Kernel, Tiles, choice
from vidrial.kernels.power_retention.back.problem import ChunkedGradient
from vidrial.templates import TEMPLATES


@dataclass(frozen=True)
class Config:
    """`threads` a CTA; `block`: queries per block of power_back_keys, from whose start the decay is tabulated."""

    threads: int = choice(256, 128)
    block: int = 32

    def rows(self, e: int) -> int:
        """Rows of a CTA: 16 bytes of y a thread."""
        return self.threads * 8 // e


ARGS = Arguments(
    y="Elem const*",
    dy="Elem const*",
    norm="float const*",
    a="float2 const*",
    rows="float2*",
    from_start="float*",
    from_start_z="float*",
    from_block="float2*",
    y_stride="int64_t[3]",
    dy_stride="int64_t[3]",
    t="int",
    hq="int",
    group="int",
    chunk="int",
    padded="int",
    block="int",
    weight_scale="float",
)


def tiles(p: ChunkedGradient, c: Config) -> Tiles:
    return Tiles(threads=c.threads, Elem=p.dtype, lanes=p.e // 8, kRows=c.rows(p.e))


def grid(p: ChunkedGradient, c: Config) -> tuple[int, int, int]:
    return -(-p.padded // c.rows(p.e)), p.b * p.hq, 1


def cost(p: ChunkedGradient, c: Config, device: Device) -> Cost:
    read = p.t * (2 * p.e * p.dtype.bytes * p.normalized + 4 * p.normalized)
    tables = p.padded * (16 + (4 + 4 * p.keeps_z) * p.stateful)
    return Cost(
        flops=0, bytes=p.b * p.hq * (read + tables) + 8 * p.b * p.h * p.padded * p.gated, ctas=grid(p, c)[0] * p.b * p.hq, ctas_per_sm=8
    )


power_back_rows = Kernel(
    "power_back_rows",
    Path(TEMPLATES, "power_retention", "power_back_rows.cu.j2"),
    ChunkedGradient,
    Config,
    ARGS,
    tiles,
    grid,
    cost=cost,
    scalars=lambda p, c: {"block": c.block},
)
