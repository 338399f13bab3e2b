"""The last stages of the backward pass: pairs of tokens on either side of a chunk's end (`power_back_cross.cuh`), and the gates' gradient
(`power_back_gates.cuh`). Both memory-bound."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vidrial import Arguments, Cost, Device, Kernel, Tiles, choice
from vidrial.kernels.power_retention.back.problem import ChunkedGradient
from vidrial.templates import TEMPLATES


@dataclass(frozen=True)
class Config:
    """`threads` a CTA."""

    threads: int = choice(256, 128, 512)


def tiles(p: ChunkedGradient, c: Config) -> Tiles:
    return Tiles(threads=c.threads)


def cross_cost(p: ChunkedGradient, c: Config, device: Device) -> Cost:
    ctas = p.adjoints * p.b * p.h
    return Cost(flops=0, bytes=4 * p.b * p.h * (p.adjoints + p.leaves) * p.snapshot, ctas=ctas, ctas_per_sm=4)


power_back_cross = Kernel(
    "power_back_cross",
    Path(TEMPLATES, "power_retention", "power_back_cross.cu.j2"),
    ChunkedGradient,
    Config,
    Arguments(
        snapshots="cutlass::bfloat16_t const*",
        adjoint="cutlass::bfloat16_t const*",
        **dict.fromkeys(("final_s", "final_z", "d_final_s", "d_final_z"), "float const*"),
        cross="float*",
        chunks="int",
    ),
    tiles,
    lambda p, c: (p.adjoints, p.b * p.h, 1),
    cost=cross_cost,
)


def gates_cost(p: ChunkedGradient, c: Config, device: Device) -> Cost:
    sectors = -(-p.t // 8)  # of a head's dots
    return Cost(flops=0, bytes=p.b * p.h * (32 * sectors * (1 + p.group) + 8 * p.t), ctas=p.chunks * p.b * p.h, ctas_per_sm=4)


power_back_gates = Kernel(
    "power_back_gates",
    Path(TEMPLATES, "power_retention", "power_back_gates.cu.j2"),
    ChunkedGradient,
    Config,
    Arguments(
        log_g="float const*",
        dot_q="float const*",
        dot_k="float const*",
        cross="float const*",
        dlog_g="float*",
        log_g_stride="int64_t[3]",
        t="int",
        h="int",
        group="int",
        chunk="int",
        chunks="int",
    ),
    tiles,
    lambda p, c: (p.chunks, p.b * p.h, 1),
    cost=gates_cost,
)
