"""Stage 4: y = (phi(q) S + causal power attention inside the chunk) / normaliser, in one kernel (`power_attend.cuh`).

A CTA owns `rows` = 16 m warps queries of one head. Through one ring of `stages` buffers it streams the state before its chunk and
then the chunk's keys and values, `keys` at a time, up to its own rows. The products are mma.sync, or wgmma on Hopper.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vidrial import Arguments, Cost, Device, DType, Kernel, Tiles, choice
from vidrial.kernels.power_retention import pace
from vidrial.kernels.power_retention.problem import Chunked
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
    WarpgroupMma,
    attention_tiles,
    cp_async,
    ldmatrix,
)
from vidrial.templates import TEMPLATES

# Fragments, addresses and loop state, beside the accumulators, before and from sm_90 on; by wgmma in the overlapped and in the serial order,
# and where a thread has more than two parts of 64 rows: what ptxas makes do with, and spills no more than 8 bytes.
REGISTER_OVERHEAD, REGISTER_OVERHEAD_OVERLAPPED, REGISTER_OVERHEAD_SERIAL, REGISTER_OVERHEAD_TALL = (80, 64), 60, 40, 100
# And what it takes where it is free to, by m=2.
TAKEN_OVERLAPPED, TAKEN_SERIAL = 84, 70


@dataclass(frozen=True)
class Config:
    """`keys` a block; `m` times 16 rows per warp; `stages` of the ring; `blocks`: CTAs per SM that registers must allow; `mma`: by which
    instruction; `order` of its products, where registers allow either."""

    keys: int = choice(64, 32, 128)
    m: int = choice(2, 4)
    warps: int = choice(4, 8, 2)
    stages: int = choice(3, 2, 4)
    blocks: int = choice(2, 1, 3)
    mma: str = choice("sync", "wgmma")
    order: str = choice("overlapped", "serial")

    @property
    def rows(self) -> int:
        return 16 * self.m * self.warps

    @property
    def warps_per_band(self) -> int:
        """Warps whose rows are multiplied together: 16 rows of each atom are a warp's."""
        return 4 if self.mma == "wgmma" else 1

    @property
    def rows_per_band(self) -> int:
        return 16 * self.m * self.warps_per_band


ARGS = Arguments(
    q="Elem const*",
    k="Elem const*",
    v="Elem const*",
    snapshots="cutlass::bfloat16_t const*",
    a="float2 const*",
    to_block="float const*",
    y="Elem*",
    norm="float*",
    q_stride="int64_t[3]",
    k_stride="int64_t[3]",
    v_stride="int64_t[3]",
    y_stride="int64_t[3]",
    t="int",
    h="int",
    chunk="int",
    chunks="int",
    weight_scale="float",
)


def tiles(p: Chunked, c: Config) -> Tiles:
    threads, bf16 = 32 * c.warps, DType.bfloat16
    q = SmemLayout(p.dtype, c.rows, p.d)
    k, v = SmemLayout(p.dtype, c.keys, p.d, stages=c.stages), SmemLayout(p.dtype, c.keys, p.e, stages=c.stages)
    # A stage of the ring holds a block of keys and values, or a few pair tiles of S, or rows of Z.
    kv_bytes, pairs = k.bytes + v.bytes, p.pair_tiles
    s_tiles = state_tiles(p, kv_bytes)
    s = SmemLayout(bf16, 64 * s_tiles, p.e)
    z = SmemLayout(bf16, max((n for n in (32, 64) if p.d % n == 0 and 2 * n * p.d <= max(kv_bytes, s.bytes)), default=16), p.d)
    stage_bytes = max(kv_bytes, s.bytes, z.bytes)
    # The weights are bf16 whatever V is stored as: squared scores overflow float16.
    attention = attention_tiles(q, k, v, c.warps, mma=c.mma, weights=bf16)
    copy, (ps, qz) = cp_async(16, zero_fill=True), state_products(p, c, q, s, z)
    return Tiles(
        threads=threads,
        min_blocks=c.blocks,
        smem=SharedMemory(Q=q, Ring=c.stages * stage_bytes, Decay=8 * c.keys * c.stages),
        Elem=p.dtype,
        stage_bytes=stage_bytes,
        overlapped=overlapped(p, c),
        halves=halves(p, c),
        s_tiles=s_tiles,
        s_stages=pairs // s_tiles,
        z_rows=z.rows,
        z_stages=p.d // z.rows if p.normalized else 0,
        **attention.members,
        # Wgmma reads one stage while the next is waited for, so that one is refilled a step later.
        Ring=Pipeline(c.stages, read=2 if c.mma == "wgmma" else 1),
        PS=ps,
        QZ=qz,
        CopyS=TiledCopy(copy, s, threads),
        CopyZ=TiledCopy(copy, z, threads),
        **query_loads(p, c, q),
    )


def state_products(
    p: Chunked, c: Config, q: SmemLayout, s: SmemLayout, z: SmemLayout
) -> tuple[TiledMma | WarpgroupMma, TiledMma | WarpgroupMma]:
    """phi(q) S and q Z, of a stage of the ring each."""
    if c.mma == "wgmma":
        # NOTE: d=128 takes fewer columns at once: 0.03 s less to compile, for 1 % more time.
        columns = min(z.block, 4096 // p.d)
        return (
            WarpgroupMma(p.dtype, c.warps // 4, (c.rows, p.e, s.rows), s.transposed),
            WarpgroupMma(p.dtype, c.warps // 4, (c.rows, columns, z.rows), z.transposed, q),
        )
    atom, warps = MMA_16x8x16[DType.bfloat16], (c.warps, 1)
    return (
        TiledMma(atom, warps, (c.rows, p.e, s.rows), b=s.transposed, bands=True),
        TiledMma(atom, warps, (c.rows, 32, z.rows), b=z.transposed, bands=True),
    )


def query_loads(p: Chunked, c: Config, q: SmemLayout) -> dict[str, LoadMatrix | LoadVector]:
    """How the rows of q are read for the state: `RowsZ` beside q Z, `RowsJ` and `RowsI` for the products of features, phi(q)."""
    threads, step, blocks = 32 * c.warps, 16 * c.warps_per_band, range(0, p.d, 8)

    def row_of(thread: int) -> int:
        """A warp's first row."""
        band, within = divmod(thread // 32, c.warps_per_band)
        return band * c.rows_per_band + within * 16

    return {
        # As the accumulator of q Z holds its columns: two atoms' at once.
        "RowsZ": LoadMatrix(
            q,
            ldmatrix(4),
            threads,
            lambda t: (row_of(t) + t % 16, t % 32 // 16 * 8),
            tuple((step * m, j) for m in range(c.m) for j in range(0, p.d, 16)),
        ),
        # Features of block J as fragments, features of block I as the pairs of one row.
        "RowsJ": LoadMatrix(
            q,
            ldmatrix(4),
            threads,
            lambda t: (row_of(t) + t % 16 + t % 32 // 16 * step, 0),
            tuple((step * m, j) for m in range(0, c.m, 2) for j in blocks),
        ),
        "RowsI": LoadVector(
            q,
            threads,
            lambda t: (row_of(t) + t % 32 // 4, 0),
            tuple((step * m + 8 * half, i) for m in range(c.m) for half in range(2) for i in blocks),
        ),
    }


def state_tiles(p: Chunked, key_bytes: int) -> int:
    """Pair tiles of S in a stage of the ring, which holds so many bytes of keys and values."""
    return max((n for n in (2, 4) if p.pair_tiles % n == 0 and n * 128 * p.e <= key_bytes), default=1)


def overlapped(p: Chunked, c: Config) -> bool:
    """Whether the scores of a block are issued before the last product of the one before it."""
    return c.order == "overlapped" and may_overlap(p, c)


def may_overlap(p: Chunked, c: Config) -> bool:
    """By wgmma, where ptxas has registers for the weights that then outlive their block. Those of 128 keys it does not have (C7512); in 168
    registers, three CTAs per SM, it has those of 32 keys. With m=4, and at d = 128 with 64 keys, either in 3 stages filled by 4 warps or
    without gates, it spills 12 to 52 bytes."""
    spills = c.keys * p.e >= 64 * 128 and (not p.gated or (c.warps == 4 and c.stages == 3))
    return c.mma == "wgmma" and c.m == 2 and c.keys < 128 and (c.blocks < 3 or c.keys == 32) and not spills


def halves(p: Chunked, c: Config) -> bool:
    """Whether the blocks on the diagonal are overlapped, too, and the last ones of a band, of which the upper half of its rows sees nothing,
    multiplied by the lower half alone. NOTE: at d = 128 with 64 keys, and in 168 registers, that spills 8 to 24 bytes; there the diagonal
    keeps to the serial order."""
    return overlapped(p, c) and c.blocks < 3 and c.rows_per_band // 2 % c.keys == 0 and c.keys * p.e < 64 * 128


def grid(p: Chunked, c: Config) -> tuple[int, int, int]:
    """Row blocks, query heads of a key head, key heads."""
    return -(-p.t // c.rows), p.hq // p.h, p.b * p.h


def accumulators(p: Chunked, c: Config) -> int:
    """Accumulators per thread; wgmma has one buffer of 64 rows of scores, and all weights in bf16."""
    return (c.m * (2 * p.e + c.keys) + 2 * c.keys) // 4 if c.mma == "wgmma" else c.m * (p.e + c.keys) // 2


def register_limit(c: Config, device: Device) -> int:
    """Registers per thread that ptxas may take."""
    return min(255, device.registers_per_sm // (32 * c.warps * c.blocks) // 8 * 8)


def register_overhead(p: Chunked, c: Config, sm_90: bool) -> int:
    """Registers per thread beside the accumulators, at least."""
    if c.mma == "sync":
        return REGISTER_OVERHEAD[sm_90]
    if c.m > 2:
        return REGISTER_OVERHEAD_TALL
    return REGISTER_OVERHEAD_OVERLAPPED if overlapped(p, c) else REGISTER_OVERHEAD_SERIAL


def rules(p: Chunked, c: Config, device: Device) -> Iterator[tuple[bool, str]]:
    if c.mma == "wgmma":
        yield device.arch == "sm_90a", f"wgmma is an instruction of sm_90a; {device.name} is {device.arch}"
        yield p.dtype == DType.bfloat16, f"wgmma takes V as it is stored, and weights need the range of bfloat16; got {p.dtype}"
        yield c.warps % 4 == 0, f"wgmma takes warpgroups of 4 warps; got warps={c.warps}"
        yield c.stages >= 3, f"stages={c.stages}: wgmma reads one stage while another is refilled and a third waited for"
    yield from device.smem_rules(least_smem(p, c), c.blocks)
    yield p.chunk % c.rows == 0, f"the {c.rows} rows of a CTA must divide chunk={p.chunk}"
    yield c.rows % c.keys == 0, f"keys={c.keys} must divide the {c.rows} rows of a CTA"
    yield c.order == "overlapped" or may_overlap(p, c), "the order is the serial one already"
    registers = register_limit(c, device)
    beside = register_overhead(p, c, device.capability >= 90)
    yield (
        accumulators(p, c) + beside <= registers,
        (
            f"{accumulators(p, c)} accumulators and some {beside} other registers per thread: {c.blocks} CTAs of {c.warps} warps per SM leave {registers}"
        ),
    )


@dataclass(frozen=True)
class Work:
    """Of one query head: `blocks` of a band's rows x keys that are multiplied, some by half; `waited`: blocks that bands multiply or wait for, those above a
    band's diagonal that other bands of its CTA have to multiply; `stateful_rows` that read a state; `rows` of all CTAs, tails filled up;
    `rows_before`: those that a later CTA of the chunk reads as keys before its own."""

    blocks: float
    waited: int
    stateful_rows: int
    rows: int
    rows_before: int


def _work(p: Chunked, c: Config) -> Work:
    bands, across, half = c.rows // c.rows_per_band, c.rows // c.keys, c.rows_per_band // 2
    whole, rest = divmod(p.t, p.chunk)
    # Of a block on the diagonal: the bands that multiply it, one of them perhaps the lower half of its rows.
    starts = range(0, c.rows, c.keys)
    diagonal = [bands - j // c.rows_per_band - 0.5 * (halves(p, c) and j % c.rows_per_band >= half) for j in starts]
    blocks, waited, rows, before = 0.0, 0, 0, 0
    for tokens, chunks in ((p.chunk, whole), (rest, 1 if rest else 0)):
        # Causal: a CTA sees the rows of its chunk before its own, and of those a band what does not lie above its diagonal.
        ctas = -(-tokens // c.rows)
        last = -(-(tokens - (ctas - 1) * c.rows) // c.keys)
        earlier = across * (ctas * (ctas - 1) // 2)
        blocks += chunks * (earlier * bands + (ctas - 1) * sum(diagonal) + sum(diagonal[:last]))
        waited += chunks * bands * (earlier + (ctas - 1) * across + last)
        rows += chunks * ctas * c.rows
        before += chunks * (ctas - 1) * c.rows
    first = -(-min(p.chunk, p.t) // c.rows) * c.rows
    return Work(blocks, waited, rows - first * (not p.enters) if p.stateful else 0, rows, before)


def least_smem(p: Chunked, c: Config) -> int:
    """Bytes of shared memory, but for a larger Z."""
    key_bytes = c.keys * p.dtype.bytes * (p.d + p.e)
    return c.rows * p.dtype.bytes * p.d + c.stages * (max(key_bytes, state_tiles(p, key_bytes) * 128 * p.e) + 8 * c.keys)


def ctas_per_sm(p: Chunked, c: Config, device: Device) -> int:
    """CTAs that an SM holds at once, by an estimate of their registers and by their shared memory."""
    smem = least_smem(p, c)
    if c.mma == "wgmma" and c.m == 2:
        beside = TAKEN_OVERLAPPED if overlapped(p, c) else TAKEN_SERIAL
    else:
        beside = register_overhead(p, c, False)
    registers = min(register_limit(c, device), accumulators(p, c) + beside)
    return max(1, Occupancy.of(device, threads=32 * c.warps, smem=smem, registers=registers).ctas)


def cost(p: Chunked, c: Config, device: Device) -> Cost:
    work, (row_blocks, _, _), warpgroups, units = _work(p, c), grid(p, c), c.warps / 4, c.rows / 128
    heads, scores, bands = 2 * p.b * p.hq, c.rows_per_band * c.keys * (p.d + p.e), c.rows // c.rows_per_band
    flops = heads * (work.blocks * scores + work.stateful_rows * p.snapshot)
    once = p.t * p.dtype.bytes * (p.hq + p.h) * (p.d + p.e) + (p.chunks - (not p.enters)) * p.h * p.snapshot * 2 * p.stateful
    read = p.b * (once + (8 * work.rows + 4 * work.rows_before) * p.h * p.gated)
    # What a CTA takes for a block of keys, and for the state; it steps through so many blocks on average, and such a part has a state.
    multiply = partial(pace.products, warpgroups=warpgroups, mma=c.mma, device=device)
    waits = pace.FETCH if c.stages < 3 or (c.stages < 4 and overlapped(p, c)) else 0.0
    block = multiply(2 * bands * scores, alone=pace.KEYS_PRODUCTS) * work.blocks / max(1, work.waited) + waits
    block += (pace.WEIGHT * c.rows / warpgroups * c.keys + pace.KEYS_STEP * units) * (pace.OVERLAPPED if overlapped(p, c) else 1.0)
    key_bytes, state_bytes = c.keys * p.dtype.bytes * (p.d + p.e), 2 * p.snapshot
    steps = state_bytes / (state_tiles(p, key_bytes) * 128 * p.e)
    state = multiply(2 * c.rows * p.snapshot, alone=pace.STATE_PRODUCTS) + pace.STATE_STEP * steps * units
    ctas = max(1, row_blocks)
    blocks, states = work.waited / bands / ctas, work.stateful_rows / c.rows / ctas
    alone = pace.OUTPUT * units + blocks * block + states * state
    # The last rows of a chunk read all its keys: of the first one, which has no state, of a later one and of the rest.
    whole, rest = divmod(p.t, p.chunk)
    longest = max(
        -(-min(p.chunk, p.t) // c.keys) * block + (whole > 1 or p.enters) * state, (-(-rest // c.keys) * block + state) * p.stateful
    )
    return Cost(
        flops=flops,
        bytes=read,
        ctas=row_blocks * p.b * p.hq,
        ctas_per_sm=ctas_per_sm(p, c, device),
        efficiency=pace.efficiency(c.mma),
        alone=alone,
        longest=(pace.OUTPUT * units + longest) / alone,
        uneven=True,
        l2_bytes=row_blocks * p.b * p.hq * (blocks * key_bytes + states * state_bytes),
    )


power_attend = Kernel(
    "power_attend",
    Path(TEMPLATES, "power_retention", "power_attend.cu.j2"),
    Chunked,
    Config,
    ARGS,
    tiles,
    grid,
    rules,
    cost,
)
