"""The adjoint of the state behind every chunk (`power_back_scan.cuh`): the forward scan in reverse, over the queries of a group."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from vidrial import Arguments, Cost, Device, DType, Kernel, Tiles, choice
from vidrial.kernels.power_retention import pace
from vidrial.kernels.power_retention.back.problem import ChunkedGradient
from vidrial.layout import LoadMatrix, MMA_16x8x16, Pipeline, SharedMemory, SmemLayout, TiledCopy, TiledMma, cp_async, ldmatrix
from vidrial.templates import TEMPLATES


@dataclass(frozen=True)
class Config:
    """`tokens` a stage of the ring; `columns` of the adjoint a warp, of 64 rows."""

    tokens: int = choice(64, 32)
    stages: int = choice(3, 2, 4)
    warps: int = choice(4, 8)
    columns: int = choice(64, 32)


ARGS = Arguments(
    q="Elem const*",
    dy="Elem const*",
    a="float2 const*",
    from_start="float const*",
    from_start_z="float const*",
    adjoint="cutlass::bfloat16_t*",
    d_final_s="float const*",
    d_final_z="float const*",
    d_initial_s="float*",
    d_initial_z="float*",
    q_stride="int64_t[3]",
    dy_stride="int64_t[3]",
    t="int",
    h="int",
    group="int",
    chunk="int",
    chunks="int",
    padded="int",
)


def z_rows(p: ChunkedGradient) -> int:
    """Rows of M a warp."""
    return min(64, p.d)


def units(p: ChunkedGradient, c: Config) -> int:
    """Warps of work a head."""
    return p.pair_tiles * (p.e // c.columns) + (p.d // z_rows(p) * (p.d // c.columns) if p.keeps_z else 0)


def tiles(p: ChunkedGradient, c: Config) -> Tiles:
    threads, bf16 = 32 * c.warps, DType.bfloat16
    q, g = SmemLayout(p.dtype, c.tokens, p.d, stages=c.stages), SmemLayout(p.dtype, c.tokens, p.e, stages=c.stages)
    # Queries and dy reach the adjoint as bf16, whatever they are stored as: converted in registers.
    q16, g16 = replace(q, dtype=bf16), replace(g, dtype=bf16)
    # q^T of one warp, [8 features][tokens], rows padded so that a broadcast ldmatrix meets no bank twice.
    products = SmemLayout(bf16, 8, c.tokens + 8, swizzle=None)
    atom, copy = MMA_16x8x16[bf16], cp_async(16, zero_fill=True)
    return Tiles(
        threads=threads,
        min_blocks=8 // c.warps,
        smem=SharedMemory(Q=q, G=g, Weights=8 * c.tokens * c.stages, Products=c.warps * products.bytes),
        Elem=p.dtype,
        z_rows=z_rows(p),
        Q=q,
        G=g,
        Products=products,
        products_bytes=products.bytes,
        State=TiledMma(atom, warps=(1, 1), tile=(64, c.columns, c.tokens), b=g16.transposed),
        Z=TiledMma(atom, warps=(1, 1), tile=(z_rows(p), c.columns, c.tokens), a=q16.transposed, b=q16.transposed),
        Ring=Pipeline(c.stages),
        CopyQ=TiledCopy(copy, q, threads),
        CopyG=TiledCopy(copy, g, threads),
        Tokens=LoadMatrix(
            q,
            ldmatrix(4, transposed=True),
            32,
            lambda lane: (lane, 0),
            tuple((t, 0) for t in range(0, c.tokens, 32)),
            tuple((0, 8 * i) for i in range(p.d // 8)),
        ),
        Broadcast=LoadMatrix(
            products,
            ldmatrix(4),
            32,
            lambda lane: (lane // 8 % 2, lane // 16 * 8),
            tuple((2 * m, t) for m in range(4) for t in range(0, c.tokens, 16)),
        ),
    )


def grid(p: ChunkedGradient, c: Config) -> tuple[int, int, int]:
    return -(-units(p, c) // c.warps), p.b * p.h, 1


def rules(p: ChunkedGradient, c: Config, device: Device) -> Iterator[tuple[bool, str]]:
    yield p.d % c.columns == 0 and p.e % c.columns == 0, f"columns={c.columns} must divide d={p.d} and e={p.e}"
    yield p.chunk % c.tokens == 0, f"tokens={c.tokens} must divide chunk={p.chunk}"
    roomy = c.columns < 64 or p.dtype == DType.bfloat16 or not p.leaves or p.enters
    yield roomy, f"columns={c.columns} of {p.dtype}, with a gradient of the last state to begin with, spill 8 bytes"


def cost(p: ChunkedGradient, c: Config, device: Device) -> Cost:
    # All chunks but the first one; that one, too, where a state lies before it.
    first = 0 if p.enters else p.chunk
    last = p.t - (p.chunks - 1) * p.chunk
    tokens = max(0, p.t - first) * p.group
    blocks = ((p.chunks - 1) * p.chunk - first + -(-last // c.tokens) * c.tokens) * p.group if tokens else 0
    tables = blocks * (8 if p.keeps_z else 4) + 32 * p.chunks * p.gated
    states = 2 * p.adjoints + 4 * (p.leaves + p.enters)
    return Cost(
        flops=2 * p.b * p.h * blocks * p.snapshot,
        bytes=p.b * p.h * (tokens * p.dtype.bytes * (p.d + p.e) + tables + states * p.snapshot),
        ctas=math.prod(grid(p, c)),
        ctas_per_sm=8 // c.warps,
        efficiency=pace.efficiency("sync"),
        l2_bytes=math.prod(grid(p, c)) * tokens * p.dtype.bytes * (p.d + p.e),
    )


power_back_scan = Kernel(
    "power_back_scan",
    Path(TEMPLATES, "power_retention", "power_back_scan.cu.j2"),
    ChunkedGradient,
    Config,
    ARGS,
    tiles,
    grid,
    rules,
    cost,
)
