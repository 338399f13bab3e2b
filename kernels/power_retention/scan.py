"""Stage 2: the state before every chunk (`power_scan.cuh`), a state-stationary scan; and stage 3, which joins its segments, or
brings a state in and takes one out (`power_states.cuh`).

A warp owns 64 rows x `columns` columns of the state in registers over all chunks: 36 pair tiles of phi and one block of Z for
D = 64, 136 and 2 for D = 128. Few heads do not fill a GPU with such warps, so the sequence may be cut into `segments` that are
scanned side by side from zero; `power_carry` then adds to each later segment what the earlier ones leave behind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from vidrial import Arguments, Cost, Device, DType, Kernel, Tiles, choice
from vidrial.kernels.power_retention import pace
from vidrial.kernels.power_retention.problem import Chunked
from vidrial.layout import LoadMatrix, MMA_16x8x16, Pipeline, SharedMemory, SmemLayout, TiledCopy, TiledMma, cp_async, ldmatrix
from vidrial.templates import TEMPLATES


@dataclass(frozen=True)
class Config:
    """`tokens` a stage of the pipeline; `tiles` of 64 rows x `columns` of the state a warp, or a warpgroup by wgmma; `segments` of the
    sequence scanned side by side; `mma`: by which instruction."""

    tokens: int = choice(64, 32, 128)
    stages: int = choice(3, 4, 5)
    warps: int = choice(4, 8)
    columns: int = choice(64, 32, 128)
    segments: int = choice(1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13)
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
    z = p.d // (z_rows or band_of_z(p, c)) * (p.d // c.columns) if p.keeps_z else 0
    return p.pair_tiles * (p.e // c.columns) + z


def band_of_z(p: Chunked, c: Config) -> int:
    """Rows of Z a warp: 16, so that four warps share what is left for the last CTA, unless that takes another CTA."""
    wide = min(64, p.d)
    return 16 if -(-units(p, c, 16) // c.warps) == -(-units(p, c, wide) // c.warps) else wide


def tiles(p: Chunked, c: Config) -> Tiles:
    threads, bf16 = 32 * c.warps, DType.bfloat16
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
        # A block and the one after it, whose factors are loaded meanwhile, have landed.
        Ring=Pipeline(c.stages, ahead=1),
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
    yield from device.smem_rules(ring_bytes(p, c), 8 // c.warps)
    yield from common_rules(p, c)


def ring_bytes(p: Chunked, c: Config) -> int:
    """Bytes of shared memory of the keys, the values and their decay, which is nearly all."""
    return c.stages * c.tokens * (p.dtype.bytes * (p.d + p.e) + 4)


def common_rules(p: Chunked, c: Config) -> Iterator[tuple[bool, str]]:
    """What holds by either instruction."""
    yield p.chunk % c.tokens == 0, f"tokens={c.tokens} must divide chunk={p.chunk}"
    yield c.segments == 1 or c.segments < p.chunks, f"segments={c.segments} must be fewer than the {p.chunks} chunks"


def longest_segment(p: Chunked, c: Config) -> int:
    """Tokens that the longest segment scans: all others wait for it."""
    return min(-(-p.chunks // c.segments) * p.chunk, scanned_tokens(p, c.tokens))


def scanned_tokens(p: Chunked, block: int = 1) -> int:
    """Tokens of a head that reach a state, in whole blocks: all but the last chunk's, unless the state behind it is asked for."""
    before = (p.chunks - 1) * p.chunk
    return before + -(-(p.t - before) // block) * block * p.leaves


def joined(p: Chunked, segments: int) -> tuple[int, int]:
    """Chunks of a segment; how many segments have any."""
    chunks = -(-p.chunks // segments)
    return chunks, -(-p.chunks // chunks)


def device_bytes(p: Chunked, c: Config) -> int:
    """Bytes that cross device memory: keys, values and their decay once, the snapshots but for the first one of each segment, whose
    end is written as float instead."""
    _, segments = joined(p, c.segments)
    tokens = scanned_tokens(p) * (p.dtype.bytes * (p.d + p.e) + 4 * p.gated)
    return p.b * p.h * (tokens + p.snapshot * (2 * (p.chunks - segments) + 4 * (segments - 1 + p.leaves)))


def timed(p: Chunked, c: Config, device: Device, flops: float, ctas: int, ctas_per_sm: int, pair_tiles: int = 4) -> Cost:
    """The cost of a scan by either instruction, of so many CTAs whose warpgroups scan all tokens of a segment into `pair_tiles`."""
    wgmma, warpgroups = c.mma == "wgmma", c.warps / 4
    # NOTE: by mma.sync 4 warps and blocks of 64 tokens alone were measured: that more save nothing is prudence.
    tokens = c.tokens if wgmma else min(c.tokens, 64)
    factors = pace.FEATURE * 64 * pair_tiles
    # By wgmma, products run on while the next ones' factors are made. NOTE: by mma.sync, that the longer of both counts is prudence as well.
    multiply = partial(pace.products, 2 * 64 * pair_tiles * c.columns * warpgroups, warpgroups, c.mma, device=device)
    update = factors + multiply(alone=0.0) if wgmma else max(factors, multiply(alone=1.0))
    # All that an SM holds write their snapshots at once.
    written = min(ctas_per_sm, -(-ctas // device.sms)) * warpgroups * pair_tiles * c.columns / 64
    token = update + pace.TOKENS_STEP * warpgroups / tokens + pace.SNAPSHOT * written / p.chunk
    mean = scanned_tokens(p, c.tokens) / c.segments
    return Cost(
        flops=flops,
        bytes=device_bytes(p, c),
        ctas=ctas,
        ctas_per_sm=ctas_per_sm,
        efficiency=pace.efficiency(c.mma),
        alone=mean * token,
        longest=longest_segment(p, c) / mean,
        l2_bytes=ctas * mean * p.dtype.bytes * (p.d + p.e) * (1 if wgmma else warpgroups),
    )


def cost(p: Chunked, c: Config, device: Device) -> Cost:
    return timed(p, c, device, 2 * p.b * p.h * scanned_tokens(p, c.tokens) * p.snapshot, math.prod(grid(p, c)), 8 // c.warps)


power_scan = Kernel("power_scan", Path(TEMPLATES, "power_retention", "power_scan.cu.j2"), Chunked, Config, ARGS, tiles, grid, rules, cost)


@dataclass(frozen=True)
class CarryConfig:
    """`threads` a CTA, 8 elements each; `segments`: how many the scan left to be joined."""

    threads: int = choice(128, 256)
    segments: int = 2


CARRY_ARGS = Arguments(a="float2 const*", ends="float const*", snapshots="cutlass::bfloat16_t*", t="int", chunk="int", segments="int")


def carry_tiles(p: Chunked, c: CarryConfig) -> Tiles:
    return Tiles(threads=c.threads)


def carry_grid(p: Chunked, c: CarryConfig) -> tuple[int, int, int]:
    return -(-p.snapshot // (8 * c.threads)), 1, p.b * p.h


def carry_cost(p: Chunked, c: CarryConfig, device: Device) -> Cost:
    first, segments = joined(p, c.segments)
    # Ends are read as float; the snapshots of all segments but the first are read and written, each segment's own first one only written.
    read = 4 * (segments - 1) + 2 * (p.chunks - first - (segments - 1))
    size = p.b * p.h * p.snapshot
    return Cost(flops=0, bytes=size * (read + 2 * (p.chunks - first)), ctas=math.prod(carry_grid(p, c)), ctas_per_sm=8)


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


STATES_ARGS = Arguments(
    a="float2 const*",
    ends="float const*",
    snapshots="cutlass::bfloat16_t*",
    initial_s="float const*",
    initial_z="float const*",
    final_s="float*",
    final_z="float*",
    t="int",
    chunk="int",
    segments="int",
)


def states_cost(p: Chunked, c: CarryConfig, device: Device) -> Cost:
    first, segments = joined(p, c.segments) if p.chunks else (0, 0)
    # NOTE: as if the gates forgot nothing. Of the first segment there is something to add only where a state enters; first snapshots are only written.
    snapshots = p.chunks if p.enters else p.chunks - first
    read = 4 * (segments - 1 + p.leaves) + 2 * (snapshots - segments + (not p.enters)) + 4 * p.enters
    size = p.b * p.h * p.snapshot
    return Cost(flops=0, bytes=size * (read + 2 * snapshots + 4 * p.leaves), ctas=math.prod(carry_grid(p, c)), ctas_per_sm=8)


power_states = Kernel(
    "power_states",
    Path(TEMPLATES, "power_retention", "power_states.cu.j2"),
    Chunked,
    CarryConfig,
    STATES_ARGS,
    carry_tiles,
    carry_grid,
    cost=states_cost,
    scalars=lambda p, c: {"segments": c.segments},
)
