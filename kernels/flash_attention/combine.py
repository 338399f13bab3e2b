"""The parts of a split become one: y = sum_s exp(lse_s - lse) y_s, lse = log sum_s exp(lse_s) (`flash_combine.cuh`). A warp owns a row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vidrial import Arguments, Buffer, Cost, Device, DType, Kernel, Tiles
from vidrial.kernels.flash_attention.problem import Problem
from vidrial.templates import TEMPLATES

WARPS = 4


@dataclass(frozen=True)
class Config:
    """`splits`: parts that there are, at most 32, since a lane holds one's lse; no choice of this kernel's own."""

    splits: int


ARGS = Arguments(
    parts="float const*",
    part_lse="float const*",
    y="Elem*",
    lse="float*",
    y_stride="int64_t[3]",
    all_rows="int",
    hq="int",
    tq="int",
    splits="int",
)


def workspace(p: Problem, splits: int) -> dict[str, Buffer]:
    """What a split's parts are written to; nothing where there is one."""
    if splits == 1:
        return {}
    shape = (splits, p.b, p.hq, p.tq)
    return {"parts": Buffer((*shape, p.e), DType.float32), "part_lse": Buffer(shape, DType.float32)}


def tiles(p: Problem, c: Config) -> Tiles:
    return Tiles(threads=32 * WARPS, Elem=p.dtype)


def all_rows(p: Problem) -> int:
    return p.b * p.hq * p.tq


def scalars(p: Problem, c: Config) -> dict[str, object]:
    return {"all_rows": all_rows(p), "splits": c.splits}


def grid(p: Problem, c: Config) -> tuple[int, int, int]:
    return -(-all_rows(p) // WARPS), 1, 1


def cost(p: Problem, c: Config, device: Device) -> Cost:
    return Cost(flops=0, bytes=all_rows(p) * (4 * (p.e + 1) * c.splits + p.e * p.dtype.bytes + 4), ctas=grid(p, c)[0], ctas_per_sm=16)


flash_combine = Kernel(
    "flash_combine",
    Path(TEMPLATES, "flash_attention", "flash_combine.cu.j2"),
    Problem,
    Config,
    ARGS,
    tiles,
    grid,
    cost=cost,
    scalars=scalars,
)
