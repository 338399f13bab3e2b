"""Flash attention on every card: cp.async and mma.sync, one kernel (`flash_sm80.cuh`).

A CTA owns `rows` = 16 m warps rows of a key head, the heads of its group side by side, and streams blocks of `keys` keys and values past them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vidrial import Arguments, Cost, Device, Kernel, Tiles, choice
from vidrial.kernels.flash_attention.problem import Problem, heaviest_first, score_scalars
from vidrial.layout import (
    MMA_16x8x16,
    Pipeline,
    SharedMemory,
    SmemLayout,
    TiledCopy,
    TiledMma,
    cp_async,
    equal_groups,
)
from vidrial.templates import TEMPLATES

# Fragments, addresses and softmax, beside the accumulators: per thread, and per 16 rows of a warp; seen in ptxas's reports.
REGISTER_OVERHEAD, ROW_REGISTERS = 56, 8
# Tiles of rows per SM beyond which their keys need no split.
FEW_TILES = 2
# Until a CTA has its first tiles, and behind its last one, in which it does not multiply; fitted to the trials of the shipped rankings.
START_SECONDS = 4.5e-6
# What keys and values of the heads that are worked on at once may take of L2: half of an A100's.
CACHE_BYTES = 20 << 20


@dataclass(frozen=True)
class Config:
    """`keys` of a block; `m` times 16 rows per warp; `stages` of the ring of keys and values; `blocks`: CTAs per SM that registers must
    allow; `queries`: read from shared memory for every block, or kept in registers; `splits`: CTAs that share the keys of one tile of rows."""

    keys: int = choice(64, 32, 128)
    m: int = choice(1, 2)
    warps: int = choice(4, 8, 2)
    stages: int = choice(2, 3)
    blocks: int = choice(2, 1, 3)
    queries: str = choice("shared", "registers")
    splits: int = choice(1, 2, 4, 8, 16, 32)

    @property
    def rows(self) -> int:
        return 16 * self.m * self.warps


ARGS = Arguments(
    q="Elem const*",
    k="Elem const*",
    v="Elem const*",
    y="Elem*",
    lse="float*",
    parts="float*",
    part_lse="float*",
    q_stride="int64_t[3]",
    k_stride="int64_t[3]",
    v_stride="int64_t[3]",
    y_stride="int64_t[3]",
    tq="int",
    tk="int",
    h="int",
    row_blocks="int",
    columns="int",
    column_groups="int",
    splits="int",
    left="int",
    right="int",
    to_log2="float",
    to_cap="float",
)


def tiles(p: Problem, c: Config) -> Tiles:
    threads = 32 * c.warps
    Pipeline(c.stages)
    q = SmemLayout(p.dtype, c.rows, p.d)
    k, v = SmemLayout(p.dtype, c.keys, p.d, stages=c.stages), SmemLayout(p.dtype, c.keys, p.e, stages=c.stages)
    qk = TiledMma(MMA_16x8x16[p.dtype], (c.warps, 1), (c.rows, c.keys, p.d), a=q, b=k, bands=True)
    copy = cp_async(16, zero_fill=True)
    return Tiles(
        threads=threads,
        min_blocks=c.blocks,
        smem=SharedMemory(Q=q, K=k, V=v),
        Elem=p.dtype,
        rows=c.rows,
        pack=p.group,
        split=c.splits > 1,
        keep_queries=c.queries == "registers",
        Q=q,
        K=k,
        V=v,
        CopyQ=TiledCopy(copy, q, threads),
        CopyK=TiledCopy(copy, k, threads),
        CopyV=TiledCopy(copy, v, threads),
        QK=qk,
        PV=TiledMma(MMA_16x8x16[p.dtype], (c.warps, 1), (c.rows, p.e, c.keys), a=qk.accumulator, b=v.transposed, bands=True),
    )


def row_blocks(p: Problem, c: Config) -> int:
    """CTAs of one key head."""
    return -(-p.rows // c.rows)


def scalars(p: Problem, c: Config) -> Mapping[str, object]:
    columns = p.b * p.h
    return {
        "row_blocks": row_blocks(p, c),
        "columns": columns,
        "column_groups": equal_groups(columns, p.tk * (p.d + p.e) * p.dtype.bytes, CACHE_BYTES),
        "splits": c.splits,
        **score_scalars(p),
    }


def grid(p: Problem, c: Config) -> tuple[int, int, int]:
    return row_blocks(p, c) * p.b * p.h * c.splits, 1, 1


def rules(p: Problem, c: Config, device: Device) -> Iterator[tuple[bool, str]]:
    yield c.splits == 1 or c.splits * c.keys <= p.tk, f"splits={c.splits}: {p.tk} keys are fewer blocks of {c.keys}"
    rows = row_blocks(p, c) * p.b * p.h
    yield c.splits == 1 or rows <= FEW_TILES * device.sms, f"splits={c.splits}: {rows} tiles of rows fill the {device.sms} SMs"
    registers = min(255, device.registers_per_sm // (32 * c.warps * c.blocks) // 8 * 8)
    accumulators = c.m * (p.e + c.keys) // 2
    queries = c.m * p.d // 4 if c.queries == "registers" else 0
    beside = REGISTER_OVERHEAD + ROW_REGISTERS * c.m
    yield (
        accumulators + queries + beside <= registers,
        f"{accumulators} accumulators, {queries} of queries and some {beside} other registers per thread: "
        f"{c.blocks} CTAs of {c.warps} warps per SM leave {registers}",
    )


@dataclass(frozen=True)
class Work:
    """Of one key head: `multiplied`, blocks of keys times bands of 16 m rows; `waited`, those and the blocks that a band waits for while others
    of its CTA multiply them; `rows` that are read, those of CTAs that see a key; `keys` that somebody sees."""

    multiplied: int
    waited: int
    rows: int
    keys: int


@lru_cache(maxsize=1024)
def work(tq: int, tk: int, group: int, limits: tuple[int, int], shape: tuple[int, int, int]) -> Work:
    """`limits`: of the window, below 0 for none; `shape`: rows of a CTA, rows of a band, keys of a block."""
    (left, right), (rows, band, keys), offset = limits, shape, tk - tq

    def seen(first: Any, last: Any) -> tuple[Any, Any, Any, Any]:
        """Blocks [begin, end) that some of the rows see, [low, high) that all see in full."""
        first, last = first // group, np.minimum(last // group, tq - 1)
        end = np.clip(last + offset + 1 + right, 0, tk) if right >= 0 else np.full_like(last, tk)
        whole = np.clip(first + offset + 1 + right, 0, tk) if right >= 0 else np.full_like(last, tk)
        begin = np.maximum(first + offset - left, 0) if left >= 0 else np.zeros_like(last)
        full = np.maximum(last + offset - left, 0) if left >= 0 else np.zeros_like(last)
        end = np.where(first > last, 0, -(-end // keys))
        return np.minimum(begin // keys, end), end, -(-full // keys), whole // keys

    starts = np.arange(0, max(tq * group, 1), rows)
    begin, end, low, high = (x[:, None] for x in seen(starts, starts + rows - 1))
    bands = starts[:, None] + np.arange(0, rows, band)
    own_begin, own_end, _, _ = seen(bands, bands + band - 1)
    # Blocks that all rows of the CTA see are multiplied by all bands, by those beyond the last row, too.
    unmasked = np.maximum(np.minimum(high, end) - np.maximum(low, begin), 0)
    own = np.maximum(np.minimum(own_end, end) - np.maximum(own_begin, begin), 0)
    there, several = np.minimum(tq * group - starts, rows)[:, None], int((end - begin).sum())
    span = np.where(end > begin, end, 0).max(initial=0) * keys, np.where(end > begin, begin, tk).min(initial=tk) * keys
    seen_keys = max(min(int(span[0]), tk) - int(span[1]), 0)
    return Work(int(np.maximum(own, unmasked).sum()), several * (rows // band), int(there[end > begin].sum()), seen_keys)


def work_of(p: Problem, c: Config) -> Work:
    return work(p.tq, p.tk, p.group, (p.left, 0 if p.causal else p.right), (c.rows, 16 * c.m, c.keys))


def cost(p: Problem, c: Config, device: Device) -> Cost:
    heads, found = p.b * p.h, work_of(p, c)
    per_block = 2 * 16 * c.m * c.keys * (p.d + p.e) * heads
    read = found.rows * p.d + found.keys * (p.d + p.e)
    written = p.rows * (p.e * p.dtype.bytes if c.splits == 1 else c.splits * p.e * 4)
    once = heads * (p.dtype.bytes * read + written + 4 * p.rows * c.splits)
    busy = 0.5 * (1.0 if c.m == 2 else 0.85) * (1.0 if c.blocks * c.warps >= 8 else 0.8) * (1.0 if c.keys >= 64 else 0.9)
    launch = Cost(
        flops=per_block * found.multiplied,
        bytes=once,
        ctas=grid(p, c)[0],
        ctas_per_sm=c.blocks,
        efficiency=busy * found.multiplied / found.waited if found.waited else 1.0,
        uneven=p.causal,
    )
    shares = launch.ctas / (device.sms * min(c.blocks, -(-launch.ctas // device.sms)))
    bands = row_blocks(p, c) * c.rows // (16 * c.m)
    longest = -(-p.tk // c.keys) * bands / max(1, found.waited) if p.causal else 1.0
    return replace(
        launch,
        alone=launch.arithmetic(device) + START_SECONDS,
        longest=heaviest_first(longest, shares) if p.causal else 1.0,
    )


flash_sm80 = Kernel(
    "flash_sm80",
    Path(TEMPLATES, "flash_attention", "flash_sm80.cu.j2"),
    Problem,
    Config,
    ARGS,
    tiles,
    grid,
    rules,
    cost,
    scalars,
)
