"""Stage 2: the state before every chunk (`power_scan.cuh`), a state-stationary scan; and stage 3, which joins its segments.

A warp owns 64 rows x `columns` columns of the state in registers over all chunks: 36 pair tiles of phi and one block of Z for
D = 64, 136 and 2 for D = 128. Few heads do not fill a GPU with such warps, so the sequence may be cut into `segments` that are
scanned side by side from zero; `power_carry` then adds to each later segment what the earlier ones leave behind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from vidrial import Arguments, Cost, Device, DType, Kernel, Tiles, choice
from vidrial.kernels.power_retention.problem import Chunked
from vidrial.layout import LoadMatrix, MMA_16x8x16, Pipeline, SharedMemory, SmemLayout, TiledCopy, TiledMma, cp_async, ldmatrix
from vidrial.layout.counts import Counts, copies, loads, products, vectors
from vidrial.templates import TEMPLATES


@dataclass(frozen=True)
class Config:
    """`tokens` a stage of the pipeline; `tiles` of 64 rows x `columns` of the state a warp, or a warpgroup by wgmma; `segments` of the
    sequence scanned side by side; `mma`: by which instruction."""

    tokens: int = choice(64, 32, 128)
    stages: int = choice(3, 4, 5)
    warps: int = choice(4, 8)
    columns: int = choice(64, 32, 128)
    segments: int = choice(1, 2, 3, 4, 6, 8)
    tiles: int = choice(1, 2, 3, 5)
    mma: str = choice("sync", "wgmma")


ARGS = Arguments(
    k="Elem const*",
    v="Elem const*",
    a="float2 const*",
    to_end="float const*",
    snapshots="cutlass::bfloat16_t*",
    ends="float*",
    k_stride="int64_t[3]",
    v_stride="int64_t[3]",
    t="int",
    h="int",
    chunk="int",
)


def units(p: Chunked, c: Config, z_rows: int | None = None) -> int:
    """Warps of work a head: the pair tiles', and those of Z in bands of `z_rows`."""
    z = p.d // (z_rows or band_of_z(p, c)) * (p.d // c.columns) if p.normalized else 0
    return p.pair_tiles * (p.e // c.columns) + z


def band_of_z(p: Chunked, c: Config) -> int:
    """Rows of Z a warp: 16, so that four warps share what is left for the last CTA, unless that takes another CTA."""
    wide = min(64, p.d)
    return 16 if -(-units(p, c, 16) // c.warps) == -(-units(p, c, wide) // c.warps) else wide


def tiles(p: Chunked, c: Config) -> Tiles:
    threads, bf16 = 32 * c.warps, DType.bfloat16
    Pipeline(c.stages)
    k, v = SmemLayout(p.dtype, c.tokens, p.d, stages=c.stages), SmemLayout(p.dtype, c.tokens, p.e, stages=c.stages)
    # Values reach the state as bf16, whatever they are stored as: converted in registers.
    k16, v16 = replace(k, dtype=bf16), replace(v, dtype=bf16)
    # k^T of one warp, [8 features][tokens], rows padded so that a broadcast ldmatrix meets no bank twice.
    products = SmemLayout(bf16, 8, c.tokens + 8, swizzle=None, stages=2)
    trans, plain = ldmatrix(4, transposed=True), ldmatrix(4)
    blocks = tuple((0, 8 * i) for i in range(p.d // 8))
    splats = tuple((2 * m, t) for m in range(4) for t in range(0, c.tokens, 16))
    z_rows, atom = band_of_z(p, c), MMA_16x8x16[bf16]
    state = TiledMma(atom, warps=(1, 1), tile=(64, c.columns, c.tokens), b=v16.transposed)
    z = TiledMma(atom, warps=(1, 1), tile=(z_rows, c.columns, c.tokens), a=k16.transposed, b=k16.transposed)
    copy = cp_async(16, zero_fill=True)
    smem = SharedMemory(K=k, V=v, Decay=4 * c.tokens * c.stages, Products=2 * c.warps * products.bytes)
    return Tiles(
        threads=threads,
        min_blocks=8 // c.warps,
        smem=smem,
        Elem=p.dtype,
        z_rows=z_rows,
        K=k,
        V=v,
        Products=products,
        products_bytes=2 * products.bytes,
        State=state,
        Z=z,
        CopyK=TiledCopy(copy, k, threads),
        CopyV=TiledCopy(copy, v, threads),
        Tokens=LoadMatrix(k, trans, 32, lambda lane: (lane, 0), tuple((t, 0) for t in range(0, c.tokens, 32)), blocks),
        Broadcast=LoadMatrix(products, plain, 32, lambda lane: (lane // 8 % 2, lane // 16 * 8), splats),
    )


def grid(p: Chunked, c: Config) -> tuple[int, int, int]:
    return -(-units(p, c) // c.warps), c.segments, p.b * p.h


def rules(p: Chunked, c: Config, device: Device) -> Iterator[tuple[bool, str]]:
    yield c.tiles == 1, f"tiles={c.tiles}: by mma.sync a warp owns one"
    yield c.columns <= 64, f"columns={c.columns}: a warp has registers for 64"
    yield p.d % c.columns == 0 and p.e % c.columns == 0, f"columns={c.columns} must divide d={p.d} and e={p.e}"
    yield c.stages >= 3, f"stages={c.stages}: a block, the next one's factors and a fetch need 3"
    yield from common_rules(p, c)


def common_rules(p: Chunked, c: Config) -> Iterator[tuple[bool, str]]:
    """What holds by either instruction."""
    yield p.chunk % c.tokens == 0, f"tokens={c.tokens} must divide chunk={p.chunk}"
    yield c.segments == 1 or c.segments < p.chunks, f"segments={c.segments} must be fewer than the {p.chunks} chunks"


def longest_segment(p: Chunked, c: Config) -> int:
    """Tokens that the longest segment scans: all others wait for it."""
    return min(-(-p.chunks // c.segments), p.chunks - 1) * p.chunk


def traffic_bytes(p: Chunked) -> int:
    """Bytes that cross device memory: keys and values once, every snapshot."""
    scanned, size = (p.chunks - 1) * p.chunk, p.snapshot
    return 2 * p.b * p.h * (scanned * (p.d + p.e) + (p.chunks - 1) * size)


def cost(p: Chunked, c: Config, device: Device) -> Cost:
    size = p.snapshot
    ctas = -(-units(p, c) // c.warps) * p.b * p.h * c.segments
    # Measured on an H200, which holds two CTAs of 4 such warps per SM; narrow slices make phi twice as often.
    efficiency = (0.42 if c.columns == 64 else 0.37) * (1.0 if c.tokens == 64 else 0.95) * (1.0 if c.warps == 4 else 0.9)
    return Cost(
        flops=2 * p.b * p.h * longest_segment(p, c) * c.segments * size,
        bytes=traffic_bytes(p),
        ctas=ctas,
        ctas_per_sm=8 // c.warps,
        efficiency=efficiency,
    )


def schedule(p: Chunked, c: Config) -> tuple[int, range, int]:
    """Heads; the chunks that segments begin with; blocks of tokens that each unit of work goes through, over all heads."""
    heads, per_segment = p.b * p.h, -(-p.chunks // c.segments)
    starts = range(0, p.chunks, per_segment)
    return heads, starts, sum(min(s + per_segment, p.chunks - 1) - s for s in starts) * (p.chunk // c.tokens) * heads


def traffic(p: Chunked, c: Config, tiles: Tiles) -> dict[str, Counts]:
    heads, starts, blocks = schedule(p, c)
    copied = grid(p, c)[0] * blocks
    pairs = p.pair_tiles * (p.e // c.columns)
    # The factors of a segment's first block are loaded before its loop, those of the block after the last one in vain.
    factors = pairs * (blocks + len(starts) * heads)
    return {
        "CopyK": copies(tiles.CopyK, c.tokens, p.k_stride[1] * p.dtype.bytes) * copied,
        "CopyV": copies(tiles.CopyV, c.tokens, p.v_stride[1] * p.dtype.bytes) * copied,
        "Decay": vectors(c.tokens // 4) * (copied * p.gated),
        "Tokens": loads(tiles.Tokens, 2 * c.tokens // 32) * factors,
        "Broadcast": loads(tiles.Broadcast, 4 * c.tokens // 16) * (pairs * blocks),
        "State": products(tiles.State) * (pairs * blocks),
        "Z": products(tiles.Z) * ((units(p, c) - pairs) * blocks),
    }


power_scan = Kernel(
    "power_scan", Path(TEMPLATES, "power_retention", "power_scan.cu.j2"), Chunked, Config, ARGS, tiles, grid, rules, cost, traffic=traffic
)


@dataclass(frozen=True)
class CarryConfig:
    """`threads` a CTA, 8 elements each; `segments`: how many the scan left to be joined."""

    threads: int = choice(128, 256)
    segments: int = 2


CARRY_ARGS = Arguments(a="float2 const*", ends="float const*", snapshots="cutlass::bfloat16_t*", t="int", chunk="int", segments="int")


def carry_tiles(p: Chunked, c: CarryConfig) -> Tiles:
    return Tiles(threads=c.threads)


def carry_grid(p: Chunked, c: CarryConfig) -> tuple[int, int, int]:
    return -(-p.snapshot // (8 * c.threads)), c.segments - 1, p.b * p.h


def carry_cost(p: Chunked, c: CarryConfig, device: Device) -> Cost:
    joined = p.chunks * (c.segments - 1) / c.segments
    return Cost(flops=0, bytes=4 * joined * p.b * p.h * p.snapshot, ctas=math.prod(carry_grid(p, c)), ctas_per_sm=8)


power_carry = Kernel(
    "power_carry",
    Path(TEMPLATES, "power_retention", "power_carry.cu.j2"),
    Chunked,
    CarryConfig,
    CARRY_ARGS,
    carry_tiles,
    carry_grid,
    cost=carry_cost,
    scalars=lambda p, c: {"segments": c.segments},
)
