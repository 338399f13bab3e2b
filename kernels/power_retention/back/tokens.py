"""The two kernels of the backward pass that go over tiles of tokens: dq (`power_back_query.cuh`), dk and dv (`power_back_keys.cuh`).

A CTA owns `rows` = 16 warps tokens of one head. Through one ring of `stages` buffers it streams the state before its chunk, or the adjoint of
that behind it, and then the chunk's keys up to its own rows, or the queries from its own rows on, `block` at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vidrial import Arguments, Cost, Device, DType, Kernel, Tiles, choice
from vidrial.kernels.power_retention import pace
from vidrial.kernels.power_retention.back.problem import ChunkedGradient
from vidrial.layout import (
    LoadMatrix,
    LoadVector,
    MMA_16x8x16,
    Occupancy,
    Pipeline,
    SharedMemory,
    SmemLayout,
    TiledCopy,
    TiledMma,
    cp_async,
    gradient_tiles,
    ldmatrix,
)
from vidrial.templates import TEMPLATES

# Fragments, addresses and loop state, beside the accumulators, without values' gradients and with them; seen in ptxas's reports.
REGISTER_OVERHEAD = (72, 100)
# Rows of Z that pass through the ring at once.
Z_ROWS = 32


@dataclass(frozen=True)
class Config:
    """`block` tokens that come by at once; `warps` of 16 rows each; `stages` of the ring; `blocks`: CTAs per SM that registers must allow."""

    block: int = choice(32, 16, 64)
    warps: int = choice(4, 8, 2)
    stages: int = choice(3, 4)
    blocks: int = choice(2, 1, 3)

    @property
    def rows(self) -> int:
        return 16 * self.warps


def state_tiles(p: ChunkedGradient, block_bytes: int) -> int:
    """Pair tiles in a stage of the ring, which holds so many bytes of tokens."""
    return max((n for n in (2, 4) if p.pair_tiles % n == 0 and n * 128 * p.e <= block_bytes), default=1)


def tiles(p: ChunkedGradient, c: Config, values: bool) -> Tiles:
    threads, bf16 = 32 * c.warps, DType.bfloat16
    x, w = SmemLayout(p.dtype, c.rows, p.d), SmemLayout(p.dtype, c.rows, p.e)
    a, b = SmemLayout(p.dtype, c.block, p.d, stages=c.stages), SmemLayout(p.dtype, c.block, p.e, stages=c.stages)
    s, z = SmemLayout(bf16, 64, p.e), SmemLayout(bf16, Z_ROWS, p.d)
    s_tiles = state_tiles(p, a.bytes + b.bytes)
    stage_bytes = max(a.bytes + b.bytes, s_tiles * s.bytes, z.bytes)
    copy, share, features = cp_async(16, zero_fill=True), (c.warps, 1), range(0, p.d, 8)

    def row_of(thread: int) -> int:
        return thread // 32 * 16

    # NOTE: gradients of scores and weights are bf16 whatever the tokens are stored as: squared scores overflow float16.
    mma = MMA_16x8x16[bf16]
    values_of = {"PS": TiledMma(mma, share, (c.rows, p.e, 64), b=s.transposed, bands=True)} if values else {}
    dx = {"Dx": threads * p.d * 2} if p.stateful else {}
    return Tiles(
        threads=threads,
        min_blocks=c.blocks,
        smem=SharedMemory(X=x, W=w, Ring=c.stages * stage_bytes, Table=16 * c.block * c.stages, **dx),
        Elem=p.dtype,
        values=values,
        rows=c.rows,
        stage_bytes=stage_bytes,
        s_tiles=s_tiles,
        s_stages=p.pair_tiles // s_tiles,
        z_rows=Z_ROWS,
        z_stages=p.d // Z_ROWS if p.normalized else 0,
        **gradient_tiles(x, w, a, b, c.warps).members,
        Ring=Pipeline(c.stages),
        S=s,
        WS=TiledMma(mma, share, (c.rows, 64, p.e), b=s, bands=True),
        XZ=TiledMma(mma, share, (c.rows, Z_ROWS, p.d), b=z, bands=True),
        **values_of,
        CopyS=TiledCopy(copy, s, threads),
        CopyZ=TiledCopy(copy, z, threads),
        # Features of block I as the pairs of one row; those of block J as the accumulators have them.
        RowsI=LoadVector(x, threads, lambda t: (row_of(t) + t % 32 // 4, 0), tuple((8 * h, i) for h in range(2) for i in features)),
        RowsJ=LoadMatrix(x, ldmatrix(2), threads, lambda t: (row_of(t) + t % 16, 0), tuple((0, j) for j in features)),
    )


def accumulators(p: ChunkedGradient, c: Config, values: bool) -> int:
    """Accumulators per thread: of the gradients, of scores and of what they are multiplied by."""
    return (p.d + p.e * values + 2 * c.block) // 2


def rules(p: ChunkedGradient, c: Config, device: Device, values: bool) -> Iterator[tuple[bool, str]]:
    yield p.chunk % c.rows == 0, f"the {c.rows} rows of a CTA must divide chunk={p.chunk}"
    yield c.rows % c.block == 0, f"block={c.block} must divide the {c.rows} rows of a CTA"
    registers = min(255, device.registers_per_sm // (32 * c.warps * c.blocks) // 8 * 8)
    needed = accumulators(p, c, values)
    yield (
        needed + REGISTER_OVERHEAD[values] <= registers,
        f"{needed} accumulators and some {REGISTER_OVERHEAD[values]} other registers per thread: {c.blocks} CTAs of {c.warps} warps per SM leave {registers}",
    )


@dataclass(frozen=True)
class Work:
    """Of one head: `blocks` of a warp's rows x block that are multiplied; `stateful_rows` that read a state; `rows` of all CTAs, tails filled up."""

    blocks: int
    stateful_rows: int
    rows: int


def work(p: ChunkedGradient, c: Config) -> Work:
    """What all CTAs of a head multiply, of one head of the group."""
    across, blocks, rows = c.rows // c.block, 0, 0
    for n in range(p.chunks):
        tokens = min(p.chunk, p.t - n * p.chunk)
        ctas = -(-tokens // c.rows)
        last = -(-(tokens - (ctas - 1) * c.rows) // c.block)
        diagonal = [c.warps - j * c.block // 16 for j in range(across)]
        blocks += across * (ctas * (ctas - 1) // 2) * c.warps + (ctas - 1) * sum(diagonal) + sum(diagonal[:last])
        rows += ctas * c.rows
    first = -(-min(p.chunk, p.t) // c.rows) * c.rows
    stateful = rows - first if p.stateful else 0
    return Work(blocks, stateful, rows)


def ctas_per_sm(p: ChunkedGradient, c: Config, device: Device, values: bool) -> int:
    """CTAs that an SM holds at once, by an estimate of their registers and of their shared memory."""
    block_bytes = c.block * p.dtype.bytes * (p.d + p.e)
    ring = c.stages * (max(block_bytes, state_tiles(p, block_bytes) * 128 * p.e) + 16 * c.block)
    smem = c.rows * p.dtype.bytes * (p.d + p.e) + ring + 64 * c.warps * p.d * p.stateful
    registers = min(255, accumulators(p, c, values) + REGISTER_OVERHEAD[values])
    return max(1, Occupancy.of(device, threads=32 * c.warps, smem=smem, registers=registers).ctas)


def cost(p: ChunkedGradient, c: Config, device: Device, values: bool) -> Cost:
    done, heads, group = work(p, c), p.b * (p.h if values else p.hq), p.group if values else 1
    per_block = 2 * 16 * c.block * (2 * p.d + p.e + p.e * values)
    pairs = 64 * p.pair_tiles * p.e
    flops = heads * (group * done.blocks * per_block + 2 * done.stateful_rows * (pairs * (2 if values else 1) + p.d * p.d * p.normalized))
    ctas = done.rows // c.rows * heads
    tokens = p.t * p.dtype.bytes * (p.d + p.e)
    read = p.b * (tokens * (p.hq + p.h) + (p.chunks - 1) * p.h * p.snapshot * 2 + 8 * p.t * (p.h + 2 * p.hq))
    written = p.b * p.t * p.dtype.bytes * (p.h * (p.d + p.e) if values else p.hq * p.d)
    return Cost(
        flops=flops,
        bytes=read + written,
        ctas=ctas,
        ctas_per_sm=ctas_per_sm(p, c, device, values),
        efficiency=pace.efficiency("sync") * 0.5,
        uneven=True,
    )


def _kernel(name: str, args: Arguments, values: bool) -> Kernel[ChunkedGradient, Config]:
    def grid(p: ChunkedGradient, c: Config) -> tuple[int, int, int]:
        row_tiles = -(-p.t // c.rows)
        return (row_tiles, p.b * p.h, 1) if values else (row_tiles, p.group, p.b * p.h)

    return Kernel(
        name,
        Path(TEMPLATES, "power_retention", f"{name}.cu.j2"),
        ChunkedGradient,
        Config,
        args,
        lambda p, c: tiles(p, c, values),
        grid,
        lambda p, c, device: rules(p, c, device, values),
        lambda p, c, device: cost(p, c, device, values),
    )


_TOKENS = dict.fromkeys(("q", "k", "v", "dy"), "Elem const*")
_STRIDES = {f"{name}_stride": "int64_t[3]" for name in ("q", "k", "v", "dy")}
_SIZES = dict.fromkeys(("t", "h", "group", "chunk", "chunks", "padded"), "int")

power_back_query = _kernel(
    "power_back_query",
    Arguments(
        **_TOKENS,
        snapshots="cutlass::bfloat16_t const*",
        a="float2 const*",
        to_block="float const*",
        rows="float2 const*",
        dq="Elem*",
        dot_q="float*",
        **_STRIDES,
        dq_stride="int64_t[3]",
        **_SIZES,
    ),
    values=False,
)
power_back_keys = _kernel(
    "power_back_keys",
    Arguments(
        **_TOKENS,
        adjoint="cutlass::bfloat16_t const*",
        a="float2 const*",
        rows="float2 const*",
        from_block="float2 const*",
        dk="Elem*",
        dv="Elem*",
        dot_k="float*",
        **_STRIDES,
        dk_stride="int64_t[3]",
        dv_stride="int64_t[3]",
        **_SIZES,
    ),
    values=True,
)
