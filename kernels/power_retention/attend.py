"""Stage 4: y = (phi(q) S + causal power attention inside the chunk) / normaliser, in one kernel (`power_attend.cuh`).

A CTA owns `rows` = 16 m warps queries of one head. Through one ring of `stages` buffers it streams the state before its chunk and
then the chunk's keys and values, `keys` at a time, up to its own rows. The products are mma.sync, or wgmma on Hopper.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from vidrial import Arguments, Cost, Device, DType, Kernel, Tiles, choice
from vidrial.kernels.power_retention.problem import Chunked
from vidrial.layout import (
    Accumulator,
    LoadMatrix,
    LoadVector,
    MMA_16x8x16,
    Pipeline,
    SharedMemory,
    SmemLayout,
    TiledCopy,
    TiledMma,
    Transposed,
    WarpgroupMma,
    cp_async,
    ldmatrix,
)
from vidrial.layout.counts import Counts, copies, loads, products, vectors
from vidrial.templates import TEMPLATES

# Fragments, addresses and loop state, beside the accumulators, before and from sm_90 on; seen in ptxas's reports.
REGISTER_OVERHEAD, REGISTER_OVERHEAD_WGMMA = (80, 64), 60


@dataclass(frozen=True)
class Config:
    """`keys` a block; `m` times 16 rows per warp; `stages` of the ring; `blocks`: CTAs per SM that registers must allow; `mma`: by which
    instruction."""

    keys: int = choice(64, 32, 128)
    m: int = choice(2, 4)
    warps: int = choice(4, 8, 2)
    stages: int = choice(3, 2, 4)
    blocks: int = choice(2, 1, 3)
    mma: str = choice("sync", "wgmma")

    @property
    def rows(self) -> int:
        return 16 * self.m * self.warps


ARGS = Arguments(
    q="Elem const*",
    k="Elem const*",
    v="Elem const*",
    snapshots="cutlass::bfloat16_t const*",
    a="float2 const*",
    to_block="float const*",
    y="Elem*",
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
    Pipeline(c.stages)
    q = SmemLayout(p.dtype, c.rows, p.d)
    k, v = SmemLayout(p.dtype, c.keys, p.d, stages=c.stages), SmemLayout(p.dtype, c.keys, p.e, stages=c.stages)
    # A stage of the ring holds a block of keys and values, or a few pair tiles of S, or rows of Z.
    kv_bytes, pairs = k.bytes + v.bytes, p.pair_tiles
    s_tiles = max((n for n in (2, 4) if pairs % n == 0 and n * 128 * p.e <= kv_bytes), default=1)
    s = SmemLayout(bf16, 64 * s_tiles, p.e)
    z = SmemLayout(bf16, max((n for n in (32, 64) if p.d % n == 0 and 2 * n * p.d <= max(kv_bytes, s.bytes)), default=16), p.d)
    stage_bytes = max(kv_bytes, s.bytes, z.bytes)
    copy, shared = cp_async(16, zero_fill=True), (q, k, replace(v, dtype=bf16), s, z)
    qk, pv, ps, qz = _by_wgmma(p, c, *shared) if c.mma == "wgmma" else _by_mma_sync(p, c, *shared)
    # Warps whose rows are multiplied together, and how many rows these are; 16 rows of each atom are a warp's.
    warps_per_band = 4 if c.mma == "wgmma" else 1
    rows_per_band, step = 16 * c.m * warps_per_band, 16 * warps_per_band

    def row_of(thread: int) -> int:
        warp = thread // 32
        return warp // warps_per_band * rows_per_band + warp % warps_per_band * 16

    blocks = range(0, p.d, 8)
    return Tiles(
        threads=threads,
        min_blocks=c.blocks,
        smem=SharedMemory(Q=q, Ring=c.stages * stage_bytes, Decay=8 * c.keys * c.stages),
        Elem=p.dtype,
        stage_bytes=stage_bytes,
        s_tiles=s_tiles,
        s_stages=pairs // s_tiles,
        z_rows=z.rows,
        z_stages=p.d // z.rows if p.normalized else 0,
        rows_per_band=rows_per_band,
        warps_per_band=warps_per_band,
        Q=q,
        K=k,
        V=v,
        S=s,
        QK=qk,
        PV=pv,
        PS=ps,
        QZ=qz,
        CopyQ=TiledCopy(copy, q, threads),
        CopyK=TiledCopy(copy, k, threads),
        CopyV=TiledCopy(copy, v, threads),
        CopyS=TiledCopy(copy, s, threads),
        CopyZ=TiledCopy(copy, z, threads),
        # q beside q Z, as the accumulator holds its columns: two atoms' at once.
        RowsZ=LoadMatrix(
            q,
            ldmatrix(4),
            threads,
            lambda t: (row_of(t) + t % 16, t % 32 // 16 * 8),
            tuple((step * m, j) for m in range(c.m) for j in range(0, p.d, 16)),
        ),
        # For phi(q): features of block J as fragments, features of block I as the pairs of one row.
        RowsJ=LoadMatrix(
            q,
            ldmatrix(4),
            threads,
            lambda t: (row_of(t) + t % 16 + t % 32 // 16 * step, 0),
            tuple((step * m, j) for m in range(0, c.m, 2) for j in blocks),
        ),
        RowsI=LoadVector(
            q,
            threads,
            lambda t: (row_of(t) + t % 32 // 4, 0),
            tuple((step * m + 8 * h, i) for m in range(c.m) for h in range(2) for i in blocks),
        ),
    )


# Scores, weights times V, phi(q) S and q Z. The second product is in bf16 whatever V is stored as: squared scores overflow float16.
Products = tuple[TiledMma, TiledMma, TiledMma, TiledMma] | tuple[WarpgroupMma, WarpgroupMma, WarpgroupMma, WarpgroupMma]


def _by_mma_sync(p: Chunked, c: Config, *tiles: SmemLayout) -> Products:
    q, k, v, s, z = tiles

    def product(dtype: DType, n: int, depth: int, b: SmemLayout | Transposed, a: SmemLayout | Accumulator | None = None) -> TiledMma:
        return TiledMma(MMA_16x8x16[dtype], (c.warps, 1), (c.rows, n, depth), a=a, b=b, bands=True)

    qk = product(p.dtype, c.keys, p.d, k, q)
    weights = TiledMma(MMA_16x8x16[DType.bfloat16], (c.warps, 1), (c.rows, c.keys, p.d), bands=True).accumulator
    bf16 = DType.bfloat16
    return (
        qk,
        product(bf16, p.e, c.keys, v.transposed, weights),
        product(bf16, p.e, s.rows, s.transposed),
        product(bf16, 32, z.rows, z.transposed),
    )


def _by_wgmma(p: Chunked, c: Config, *tiles: SmemLayout) -> Products:
    q, k, v, s, z = tiles

    def product(n: int, depth: int, b: SmemLayout | Transposed, a: SmemLayout | None = None) -> WarpgroupMma:
        return WarpgroupMma(p.dtype, c.warps // 4, (c.rows, n, depth), b, a)

    return (
        product(c.keys, p.d, k, q),
        product(p.e, c.keys, v.transposed),
        product(p.e, s.rows, s.transposed),
        # NOTE: d=128 takes fewer columns at once: 0.03 s less to compile, for 1 % more time.
        product(min(z.block, 4096 // p.d), z.rows, z.transposed, q),
    )


def grid(p: Chunked, c: Config) -> tuple[int, int, int]:
    """Row blocks, query heads of a key head, key heads."""
    return -(-p.t // c.rows), p.hq // p.h, p.b * p.h


def rules(p: Chunked, c: Config, device: Device) -> Iterator[tuple[bool, str]]:
    if c.mma == "wgmma":
        yield device.arch == "sm_90a", f"wgmma is an instruction of sm_90a; {device.name} is {device.arch}"
        yield p.dtype == DType.bfloat16, f"wgmma takes V as it is stored, and weights need the range of bfloat16; got {p.dtype}"
        yield c.warps % 4 == 0, f"wgmma takes warpgroups of 4 warps; got warps={c.warps}"
        yield c.stages >= 3, f"stages={c.stages}: wgmma reads one stage while another is refilled and a third waited for"
    yield p.chunk % c.rows == 0, f"the {c.rows} rows of a CTA must divide chunk={p.chunk}"
    yield c.rows % c.keys == 0, f"keys={c.keys} must divide the {c.rows} rows of a CTA"
    registers = min(255, device.registers_per_sm // (32 * c.warps * c.blocks) // 8 * 8)
    # wgmma has one buffer of 64 rows of scores, and all weights in bf16.
    accumulators = (c.m * (2 * p.e + c.keys) + 2 * c.keys) // 4 if c.mma == "wgmma" else c.m * (p.e + c.keys) // 2
    beside = REGISTER_OVERHEAD_WGMMA if c.mma == "wgmma" else REGISTER_OVERHEAD[device.capability >= 90]
    yield (
        accumulators + beside <= registers,
        (
            f"{accumulators} accumulators and some {beside} other registers per thread: {c.blocks} CTAs of {c.warps} warps per SM leave {registers}"
        ),
    )


def cost(p: Chunked, c: Config, device: Device) -> Cost:
    size, chunk_rows = p.snapshot, min(p.chunk, p.t)
    # Causal: on average a CTA sees half its chunk and half of its own square.
    keys = (chunk_rows + c.rows) / 2
    with_state = p.t - chunk_rows if p.stateful else 0
    intra, state = 2 * p.b * p.hq * p.t * keys * (p.d + p.e), 2 * p.b * p.hq * with_state * size
    # Measured on an H200: the state wants warps to hide behind, the keys' blocks fewer barriers; wgmma wants long instructions.
    if c.mma == "wgmma":
        full = (0.55, 0.68) if p.e <= 64 else (0.72, 0.92)
        alone = 0.73 if p.e > 64 and c.blocks * c.warps < 8 else 1.0  # no room for a second warpgroup on the SM
        busy = full[0] * alone * (1.0 if c.keys >= 64 else 0.8), full[1] * alone * (1.0 if c.stages == 4 else 0.97)
    else:
        busy = (
            0.42 * (1.0 if c.keys == 64 else 0.94),
            0.55 * (1.0 if c.blocks * c.warps >= 12 else 0.94 if c.blocks * c.warps >= 8 else 0.8),
        )
    efficiency = (intra + state) / (intra / busy[0] + state / busy[1]) if intra else 1.0
    read = p.b * (p.t * 2 * (p.hq + p.h) * (p.d + p.e) + (p.chunks - 1) * p.h * size * 2)
    ctas = grid(p, c)[0] * p.b * p.hq
    # Of one chunk, the first rows have few keys and the last ones all.
    return Cost(flops=intra + state, bytes=read, ctas=ctas, ctas_per_sm=c.blocks, efficiency=efficiency, uneven=p.chunks == 1)


def traffic(p: Chunked, c: Config, tiles: Tiles) -> dict[str, Counts]:
    """At most: a state and blocks of keys that the gates have forgotten altogether are left out."""
    q_stride, k_stride, v_stride = (stride[1] * p.dtype.bytes for stride in (p.q_stride, p.k_stride, p.v_stride))
    names = "CopyQ", "CopyK", "CopyV", "Decay", "QK", "PV"
    total = dict.fromkeys(names, Counts())
    stateful = 0  # CTAs that read a state
    for m0 in range(0, p.t, c.rows):
        c0 = m0 // p.chunk * p.chunk
        stateful += p.stateful and c0 > 0
        total["CopyQ"] += copies(tiles.CopyQ, min(c.rows, p.t - m0), q_stride)
        for j0 in range(c0, min(m0 + c.rows, p.t), c.keys):
            rows = min(c.keys, p.t - j0)
            # What multiplies together, a warp or a warpgroup, skips a block that begins above its last row.
            bands = sum(j0 < last for last in range(m0 + tiles.band, m0 + c.rows + 1, tiles.band))
            work = (
                copies(tiles.CopyK, rows, k_stride),
                copies(tiles.CopyV, rows, v_stride),
                vectors(c.keys // (2 if j0 >= m0 else 4)) * p.gated,
                products(tiles.QK) * bands,
                products(tiles.PV) * bands,
            )
            total.update((name, total[name] + one) for name, one in zip(names[1:], work, strict=True))
    bands, z_blocks, pairs = stateful * c.rows // tiles.band, tiles.z_stages * (p.d // tiles.QZ.tile[1]), tiles.s_stages * tiles.s_tiles
    # mma.sync loads q beside Z, wgmma reads both.
    q = Counts() if c.mma == "wgmma" else loads(tiles.QK.A.load, tiles.QK.A.loads * tiles.QZ.k_steps)
    total |= {
        "CopyZ": copies(tiles.CopyZ, tiles.z_rows, 2 * p.d) * (stateful * tiles.z_stages),
        "RowsZ": loads(tiles.RowsZ, c.m * p.d // 16 * tiles.z_stages) * (stateful * c.warps),
        "CopyS": copies(tiles.CopyS, 64 * tiles.s_tiles, 2 * p.e) * (stateful * tiles.s_stages),
        "QZ": (products(tiles.QZ) + q) * (z_blocks * bands),
        "RowsJ": loads(tiles.RowsJ, c.m // 2 * pairs) * (stateful * c.warps),
        "PS": products(tiles.PS, 4 * pairs) * bands,
    }
    return {name: counts * (p.b * p.hq) for name, counts in total.items()}


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
    traffic=traffic,
)
