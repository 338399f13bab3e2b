"""The two kernels of the backward pass that go over tiles of tokens: dq (`power_back_query.cuh`), dk and dv (`power_back_keys.cuh`).

A CTA owns `rows` = 16 warps tokens of one head. Through one ring of `stages` buffers it streams the state before its chunk, or the adjoint of
that behind it, and then the chunk's keys up to its own rows, or the queries from its own rows on, `block` at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
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

# Fragments, addresses and loop state, beside the accumulators, without values' gradients and with them; and what the fourth power adds to these.
# Seen in ptxas's reports.
REGISTER_OVERHEAD, FOURTH_POWER = (76, 100), 28
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
    share = (c.warps, 1)
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
        z_stages=p.d // Z_ROWS if (p.keeps_z if values else p.normalized) else 0,
        **gradient_tiles(x, w, a, b, c.warps).members,
        Ring=Pipeline(c.stages),
        WS=TiledMma(mma, share, (c.rows, 64, p.e), b=s, bands=True),
        XZ=TiledMma(mma, share, (c.rows, Z_ROWS, p.d), b=z, bands=True),
        **values_of,
        **state_members(x, s, z, threads),
    )


def state_members(x: SmemLayout, s: SmemLayout, z: SmemLayout, threads: int) -> dict[str, object]:
    """Of the tiles: copies of the state, and how features of a warp's 16 rows are read: of block I as the pairs of one row, of block J as the
    accumulators have them."""
    copy, features = cp_async(16, zero_fill=True), range(0, x.columns, 8)
    return {
        "S": s,
        "CopyS": TiledCopy(copy, s, threads),
        "CopyZ": TiledCopy(copy, z, threads),
        "RowsI": LoadVector(x, threads, lambda t: (t // 32 * 16 + t % 32 // 4, 0), tuple((8 * h, i) for h in range(2) for i in features)),
        "RowsJ": LoadMatrix(x, ldmatrix(2), threads, lambda t: (t // 32 * 16 + t % 16, 0), tuple((0, j) for j in features)),
    }


def accumulators(p: ChunkedGradient, c: Config, values: bool) -> int:
    """Accumulators per thread: of the gradients, of scores and of what they are multiplied by."""
    return (p.d + p.e * values + 2 * c.block) // 2


def overhead(p: ChunkedGradient, values: bool) -> int:
    """Registers beside the accumulators."""
    return REGISTER_OVERHEAD[values] + FOURTH_POWER * (values and p.degree == 4)


def rules(p: ChunkedGradient, c: Config, device: Device, values: bool) -> Iterator[tuple[bool, str]]:
    yield p.chunk % c.rows == 0, f"the {c.rows} rows of a CTA must divide chunk={p.chunk}"
    yield c.rows % c.block == 0, f"block={c.block} must divide the {c.rows} rows of a CTA"
    registers = min(255, device.registers_per_sm // (32 * c.warps * c.blocks) // 8 * 8)
    needed = accumulators(p, c, values)
    yield (
        needed + overhead(p, values) <= registers,
        f"{needed} accumulators and some {overhead(p, values)} other registers per thread: {c.blocks} CTAs of {c.warps} warps per SM leave {registers}",
    )


@dataclass(frozen=True)
class Work:
    """Of one head: `blocks` of a warp's rows x block that are multiplied, with one head of the group; `stateful_rows` that read a state; `rows` of
    all CTAs, tails filled up; `tabulated` tokens that come by outside of a CTA's own rows."""

    blocks: int
    stateful_rows: int
    rows: int
    tabulated: int


def work(p: ChunkedGradient, c: Config, values: bool, band: int = 1) -> Work:
    """What all CTAs of a head multiply and read: blocks up to their rows, or with `values` from their rows on; `band` warps multiply together."""
    blocks = stateful = rows = tabulated = 0
    whole, rest = divmod(p.t, p.chunk)
    for tokens, chunks in ((p.chunk, whole), (rest, 1 if rest else 0)):
        ctas = -(-tokens // c.rows)
        for i in range(ctas):
            own = min(c.rows, tokens - i * c.rows)
            outside = -(-(tokens - i * c.rows - own) // c.block) if values else i * (c.rows // c.block)
            blocks += chunks * c.warps * outside
            for j in range(-(-own // c.block)):
                seen = band * -(-(j + 1) * c.block // (16 * band)) if values else c.warps - band * (j * c.block // (16 * band))
                blocks += chunks * max(0, min(c.warps, seen))
        rows += chunks * ctas * c.rows
        tabulated += chunks * max(0, tokens - c.rows if values else (ctas - 1) * c.rows)
    if p.stateful:
        last = -(-(p.t - (p.chunks - 1) * p.chunk) // c.rows) * c.rows
        stateful = rows - (last * (not p.leaves) if values else min(rows, p.chunk) * (not p.enters))
    return Work(blocks, stateful, rows, tabulated)


def ctas_per_sm(p: ChunkedGradient, c: Config, device: Device, values: bool) -> int:
    """CTAs that an SM holds at once, by an estimate of their registers and of their shared memory."""
    ring = c.stages * (max(block_bytes(p, c), state_tiles(p, block_bytes(p, c)) * 128 * p.e) + 16 * c.block)
    smem = c.rows * p.dtype.bytes * (p.d + p.e) + ring + 64 * c.warps * p.d * p.stateful
    registers = min(255, accumulators(p, c, values) + overhead(p, values))
    return max(1, Occupancy.of(device, threads=32 * c.warps, smem=smem, registers=registers).ctas)


def block_bytes(p: ChunkedGradient, c: Config) -> int:
    """Bytes of a block of tokens that come by."""
    return c.block * p.dtype.bytes * (p.d + p.e)


def block_flops(p: ChunkedGradient, c: Config, values: bool) -> int:
    """Operations of 16 rows with a block of tokens."""
    return 2 * 16 * c.block * (2 * p.d + p.e + p.e * values)


def state_flops(p: ChunkedGradient, values: bool) -> int:
    """Operations of a row with a state."""
    z = p.keeps_z if values else p.normalized
    return 2 * (64 * p.pair_tiles * p.e * (2 if values else 1) + p.d * p.d * z)


def moved(p: ChunkedGradient, done: Work, values: bool) -> int:
    """Bytes that cross device memory."""
    states = (p.adjoints if values else p.chunks - (not p.enters)) * p.stateful
    tokens = p.t * p.dtype.bytes * (p.d + p.e) * (p.hq + p.h) + states * p.h * p.snapshot * 2
    tables = 8 * p.hq * (done.rows + done.tabulated * values) + (8 * p.t + 4 * done.tabulated * (not values)) * p.h * p.gated
    written = p.t * ((p.dtype.bytes * (p.d + p.e) + 4) * p.h if values else (p.dtype.bytes * p.d + 4) * p.hq)
    return p.b * (tokens + tables + written)


def cost(p: ChunkedGradient, c: Config, device: Device, values: bool) -> Cost:
    done, heads, group = work(p, c, values), p.b * (p.h if values else p.hq), p.group if values else 1
    per_block = block_flops(p, c, values)
    flops = heads * (group * done.blocks * per_block + done.stateful_rows * state_flops(p, values))
    ctas = done.rows // c.rows * heads
    # NOTE: by the forward kernels' paces; none of the backward pass's own has been fitted yet.
    units, warpgroups = c.rows / 128, c.warps / 4
    multiply = partial(pace.products, warpgroups=warpgroups, mma="sync", alone=pace.KEYS_PRODUCTS, device=device)
    steps = p.snapshot / (state_tiles(p, block_bytes(p, c)) * 64 * p.e)
    block = multiply(c.warps * per_block) + 2 * pace.WEIGHT * c.rows / warpgroups * c.block + pace.KEYS_STEP * units
    state = multiply(2 * c.rows * p.snapshot * (2 if values else 1)) + pace.STATE_STEP * steps * units
    state += pace.FEATURE * c.rows / warpgroups * 64 * p.pair_tiles
    waited, states = group * done.blocks / c.warps / (done.rows / c.rows), done.stateful_rows / done.rows
    longest = min(p.chunk, p.t) / c.block * group * block + p.stateful * state
    alone = pace.OUTPUT * units + waited * block + states * state
    return Cost(
        flops=flops,
        bytes=moved(p, done, values),
        ctas=ctas,
        ctas_per_sm=ctas_per_sm(p, c, device, values),
        efficiency=pace.efficiency("sync"),
        alone=alone,
        longest=(pace.OUTPUT * units + longest) / alone,
        uneven=True,
        l2_bytes=ctas * (waited * block_bytes(p, c) + states * 2 * p.snapshot),
    )


def grid(p: ChunkedGradient, c: Config, values: bool) -> tuple[int, int, int]:
    row_tiles = -(-p.t // c.rows)
    return (row_tiles, p.b * p.h, 1) if values else (row_tiles, p.group, p.b * p.h)


def _kernel(name: str, args: Arguments, values: bool) -> Kernel[ChunkedGradient, Config]:
    return Kernel(
        name,
        Path(TEMPLATES, "power_retention", f"{name}.cu.j2"),
        ChunkedGradient,
        Config,
        args,
        lambda p, c: tiles(p, c, values),
        lambda p, c: grid(p, c, values),
        lambda p, c, device: rules(p, c, device, values),
        lambda p, c, device: cost(p, c, device, values),
    )


_TOKENS = dict.fromkeys(("q", "k", "v", "dy"), "Elem const*")
_STRIDES = {f"{name}_stride": "int64_t[3]" for name in ("q", "k", "v", "dy")}
_SIZES = dict.fromkeys(("t", "h", "group", "chunk", "chunks", "padded"), "int")

QUERY_ARGS = Arguments(
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
)
KEYS_ARGS = Arguments(
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
)

power_back_query = _kernel("power_back_query", QUERY_ARGS, values=False)
power_back_keys = _kernel("power_back_keys", KEYS_ARGS, values=True)
