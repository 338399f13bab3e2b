"""Stage 2 on Hopper: the same scan by wgmma (`power_scan_wgmma.cuh`); a warpgroup owns `tiles` pair tiles x `columns` columns.

Tile m of a warpgroup joins block I of features with block I + d, d = first + m, modulo the number n of blocks: with d from 0 to n / 2, and
d = n / 2 for half of the I only, each pair is met once, and the tiles of a warpgroup share block I.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from vidrial import Cost, Device, DType, Kernel, Tiles
from vidrial.kernels.power_retention import scan
from vidrial.kernels.power_retention.problem import Chunked
from vidrial.kernels.power_retention.scan import ARGS, Config
from vidrial.layout import LoadMatrix, Pipeline, SharedMemory, SmemLayout, TiledCopy, WarpgroupMma, cp_async, ldmatrix
from vidrial.templates import TEMPLATES

# Fragments, addresses and loop state, beside the accumulators; seen in ptxas's reports.
REGISTER_OVERHEAD = 62
WARPGROUP = 128


def state_units(p: Chunked, c: Config) -> int:
    """Warpgroups of a head that own pair tiles: full groups of d for each block I, and the last d alone for half of them."""
    n: int = p.d // 8
    groups, last = -(-n // 2 // c.tiles), n // 2 % c.tiles == 0
    units: int = (groups * n + last * n // 2) * (p.e // c.columns)
    return units


class Multiplied(NamedTuple):
    """Tiles of one head: all that are multiplied, those without a pair included; of the warpgroup of each CTA that has most, the most and the
    sum over CTAs. A part of Z is one."""

    units: int
    most: int
    ctas: int


def multiplied(p: Chunked, c: Config) -> Multiplied:
    """What the warpgroups of a head multiply."""
    return _multiplied(state_units(p, c), p.d // 8, p.e // c.columns, z_units(p, c), (c.tiles, c.warps // 4, drops_last(p, c)))


@lru_cache(maxsize=1024)
def _multiplied(units: int, n: int, parts: int, z: int, config: tuple[int, int, bool]) -> Multiplied:
    """Of `units` with pair tiles, in `parts` of the columns, and `z` with a part of Z; `config`: its tiles, warpgroups, and whether it drops the last."""
    tiles, warpgroups, drops = config
    last = ((i // n * tiles + tiles - 1, i % n) for i in range(units // parts))
    full = (not drops or d < n // 2 or (d == n // 2 and i < n // 2) for d, i in last)
    each = [tiles - (not whole) for whole in full for _ in range(parts)]
    whole = each + [1] * z
    most = [max(whole[i : i + warpgroups]) for i in range(0, len(whole), warpgroups)]
    return Multiplied(sum(each), max(most), sum(most))


def z_columns(p: Chunked, c: Config) -> int:
    """Columns of Z that a warpgroup owns, of 64 rows."""
    columns: int = min(p.d, c.columns)
    return columns


def z_units(p: Chunked, c: Config) -> int:
    """Warpgroups of a head that own a part of Z."""
    return p.d // 64 * (p.d // z_columns(p, c)) if p.keeps_z else 0


def drops_last(p: Chunked, c: Config) -> bool:
    """Whether warpgroups without a last pair run a loop of one tile fewer, in code of their own. NOTE: where ptxas has few registers left that
    spills 44 to 60 bytes: with 192 accumulators, but for 8 warps, d = e and gates; and without gates in blocks of 128 tokens with 160."""
    accumulators = c.tiles * c.columns // 2
    if accumulators >= 192:
        return c.warps == 8 and p.d == p.e and p.gated
    return c.tiles > 1 and (p.gated or c.tokens < 128 or accumulators < 160)


def tiles(p: Chunked, c: Config) -> Tiles:
    threads, warpgroups = 32 * c.warps, c.warps // 4
    k, v = SmemLayout(p.dtype, c.tokens, p.d, stages=c.stages), SmemLayout(p.dtype, c.tokens, p.e, stages=c.stages)
    # k_I^T of a warpgroup, [8 features][tokens], rows padded so that a broadcast ldmatrix meets no bank twice.
    products = SmemLayout(p.dtype, 8, c.tokens + 8, swizzle=None, stages=2)
    trans, plain, copy = ldmatrix(4, transposed=True), ldmatrix(4), cp_async(16, zero_fill=True)
    blocks, steps = tuple((0, i) for i in range(0, p.d, 8)), tuple((t, 0) for t in range(0, c.tokens, 16))
    return Tiles(
        threads=threads,
        min_blocks=2 // warpgroups,
        smem=SharedMemory(K=k, V=v, Decay=4 * c.tokens * c.stages, Products=2 * warpgroups * products.bytes),
        Elem=p.dtype,
        state_units=state_units(p, c),
        z_units=z_units(p, c),
        drops_last=drops_last(p, c),
        K=k,
        V=v,
        Products=products,
        products_bytes=2 * products.bytes,
        State=WarpgroupMma(p.dtype, 1, (64 * c.tiles, c.columns, c.tokens), v.transposed),
        Z=WarpgroupMma(p.dtype, 1, (64, z_columns(p, c), c.tokens), k.transposed),
        # Wgmma may still read the block before the one handed out; of the one after it products are made.
        Ring=Pipeline(c.stages, read=2, ahead=1),
        CopyK=TiledCopy(copy, k, threads),
        CopyV=TiledCopy(copy, v, threads),
        # Lane t gives token t of 32, of one block of features; tokens 0 to 15 of two blocks; 16 features of 16 tokens.
        Tokens=LoadMatrix(k, trans, 32, lambda lane: (lane, 0), origins=tuple((t, i) for t in range(0, c.tokens, 32) for _, i in blocks)),
        Pairs=LoadMatrix(k, trans, 32, lambda lane: (lane % 16, 0), steps, blocks),
        Single=LoadMatrix(k, ldmatrix(2, transposed=True), 32, lambda lane: (lane % 16, 0), steps, blocks),
        Rows=LoadMatrix(
            k,
            trans,
            WARPGROUP,
            lambda t: (t % 8 + t // 16 % 2 * 8, t // 32 * 16 + t // 8 % 2 * 8),
            steps,
            tuple((0, i) for i in range(0, p.d, 64)),
        ),
        Broadcast=LoadMatrix(
            products, plain, WARPGROUP, lambda t: (t // 32 * 2 + t // 8 % 2, t // 16 % 2 * 8), tuple((0, t) for t in range(0, c.tokens, 16))
        ),
    )


def grid(p: Chunked, c: Config) -> tuple[int, int, int]:
    return -(-(state_units(p, c) + z_units(p, c)) // (c.warps // 4)), c.segments, p.b * p.h


def rules(p: Chunked, c: Config, device: Device) -> Iterator[tuple[bool, str]]:
    yield device.arch == "sm_90a", f"wgmma is an instruction of sm_90a; {device.name} is {device.arch}"
    yield p.dtype == DType.bfloat16, f"wgmma takes V as it is stored, and the state is bfloat16; got {p.dtype}"
    yield p.d % 64 == 0, f"a warpgroup owns 64 rows of Z; got d={p.d}"
    yield p.e % c.columns == 0 and p.d % z_columns(p, c) == 0, f"columns={c.columns} must divide d={p.d} and e={p.e}"
    yield c.tokens >= 64, f"tokens={c.tokens}: a block's products run on into the next one, which takes 64"
    yield c.stages >= 4, f"stages={c.stages}: a block that is read, the ones before and after it, and a fetch need 4"
    yield c.tiles <= p.d // 16 + 1, f"tiles={c.tiles}: a block of features meets {p.d // 16 + 1} at most"
    accumulators, allowed = c.tiles * c.columns // 2, 255 - REGISTER_OVERHEAD
    yield accumulators <= allowed, f"{accumulators} accumulators per thread: {REGISTER_OVERHEAD} other registers leave {allowed}"
    yield from device.smem_rules(scan.ring_bytes(p, c), 8 // c.warps)
    roomy = accumulators < 192 or c.tokens < 128 or p.d == p.e
    yield roomy, f"tokens={c.tokens} with {accumulators} accumulators per thread and d={p.d}, e={p.e} spills 24 bytes"
    yield not p.leaves or accumulators < 192, f"{accumulators} accumulators per thread, with the last chunk's tail to scan, spill 20 bytes"
    yield from scan.common_rules(p, c)


def ctas_per_sm(p: Chunked, c: Config, device: Device) -> int:
    """CTAs that an SM holds at once, by an estimate of their registers and of their ring, which is most of their shared memory."""
    registers = 32 * c.warps * -(-(c.tiles * c.columns // 2 + 92) // 8) * 8
    ring = scan.ring_bytes(p, c) + 4096
    resident: int = max(1, min(device.registers_per_sm // registers, device.smem_per_sm // ring))
    return resident


def cost(p: Chunked, c: Config, device: Device) -> Cost:
    found = multiplied(p, c)
    rows = found.units * c.columns + z_units(p, c) * z_columns(p, c)
    flops = 2 * p.b * p.h * scan.scanned_tokens(p, c.tokens) * 64 * rows
    # A shorter CTA gives its place to the next one: so many of the longest take as long as all.
    ctas = math.ceil(found.ctas / found.most * c.segments * p.b * p.h)
    return scan.timed(p, c, device, flops, ctas, ctas_per_sm(p, c, device), found.most)


power_scan_wgmma = Kernel(
    "power_scan_wgmma",
    Path(TEMPLATES, "power_retention", "power_scan_wgmma.cu.j2"),
    Chunked,
    Config,
    ARGS,
    tiles,
    grid,
    rules,
    cost,
)
