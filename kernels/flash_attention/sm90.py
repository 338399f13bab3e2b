"""Flash attention on Hopper: a producer warp (TMA), warpgroups that compute (wgmma), one kernel (`flash_sm90.cuh`).

A CTA owns 64 `groups` rows of one head, of all heads of a group where these divide the rows, and streams keys and values past them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from vidrial import Arguments, Buffer, Cost, Device, DType, Kernel, Tiles, choice
from vidrial.kernels.flash_attention.problem import Problem, heaviest_first, score_scalars
from vidrial.layout import (
    Barrier,
    Barriers,
    Meeting,
    NamedBarriers,
    Roles,
    Scheduler,
    SharedMemory,
    SmemLayout,
    TensorMap,
    TmaRing,
    TmaTile,
    WarpgroupMma,
    equal_groups,
)
from vidrial.templates import TEMPLATES

# Beside the accumulators and the weights: softmax, addresses, the loop; seen in ptxas's reports.
REGISTER_OVERHEAD = 32
# Of L2, what keys and values of a group of heads may take.
CACHE_SHARE = 0.6
# SMs of the largest Hopper GPU: CTAs of a persistent grid. On one with fewer SMs the last CTAs find nothing left to draw.
RESIDENT_SMS = 132
# Bytes that TMA's strides are multiples of.
VECTOR_BYTES = 16
# Until a CTA's first tiles have come it has no work; of that, what is left to a persistent one, which fetches them while it still works. These
# and the shares of the tensor rate in `cost` were fitted to the trials of the shipped rankings.
START_SECONDS, AHEAD = 2.2e-6, 0.67


@dataclass(frozen=True)
class Config:
    """`groups` warpgroups of 64 rows that compute; `keys` of a block; `stages` of K's ring and of V's; `overlap`: the scores of the next
    block are issued before the product of this one; `turns`: warpgroups issue in turn, or leave out what their rows do not see; `schedule`:
    how tiles come to CTAs."""

    groups: int = choice(3, 2, 4, 1)
    keys: int = choice(64, 80, 96, 128)
    stages: int = choice(4, 3, 2)
    overlap: int = choice(1, 0)
    turns: str = choice("skip", "ping_pong")
    schedule: Literal["dynamic", "one"] = choice("dynamic", "one")

    @property
    def rows(self) -> int:
        return 64 * self.groups

    @property
    def ctas(self) -> int:
        """CTAs per SM that registers must allow."""
        return 2 if self.groups == 1 else 1


ARGS = Arguments(
    q="TensorMap",
    k="TensorMap",
    v="TensorMap",
    y="Elem*",
    lse="float*",
    counter="int*",
    y_stride="int64_t[3]",
    tq="int",
    tk="int",
    heads="int",
    columns="int",
    row_blocks="int",
    tiles="int",
    column_groups="int",
    left="int",
    right="int",
    to_log2="float",
    to_cap="float",
)


def pack(p: Problem, c: Config) -> int:
    """Heads of a group that lie side by side as rows: all of them, or one."""
    return p.group if c.rows % p.group == 0 else 1


def roles(c: Config) -> Roles:
    return Roles(producer=1, consumers=c.groups, ctas=c.ctas)


def order(p: Problem, c: Config) -> Scheduler:
    return Scheduler(c.schedule, heavy=p.causal, consumer_warps=roles(c).consumer_warps)


def tiles(p: Problem, c: Config) -> Tiles:
    who, packed = roles(c), pack(p, c)
    q = SmemLayout(p.dtype, c.rows, p.d)
    k, v = SmemLayout(p.dtype, c.keys, p.d, stages=c.stages), SmemLayout(p.dtype, c.keys, p.e, stages=c.stages)
    box_q = TmaTile(q, ("head", "batch"), packed=packed, column_tail=packed > 1)
    box_k, box_v = TmaTile(k, ("head", "batch")), TmaTile(v, ("head", "batch"))
    warps = who.consumer_warps
    bars = Barriers(k=TmaRing((box_k,), warps), v=TmaRing((box_v,), warps), q_full=Barrier(1), q_empty=Barrier(warps), order=order(p, c))
    return Tiles(
        threads=who.threads,
        min_blocks=c.ctas,
        smem=SharedMemory(Q=q, K=k, V=v, Bars=bars.bytes),
        Elem=p.dtype,
        rows=c.rows,
        pack=packed,
        heads_per_key=p.group // packed,
        ping_pong=c.turns == "ping_pong",
        Q=q,
        K=k,
        V=v,
        BoxQ=box_q,
        BoxK=box_k,
        BoxV=box_v,
        QK=WarpgroupMma(p.dtype, c.groups, (c.rows, c.keys, p.d), k, q),
        PV=WarpgroupMma(p.dtype, c.groups, (c.rows, p.e, c.keys), v.transposed),
        Roles=who,
        Bars=bars,
        Turns=NamedBarriers(turn=Meeting(256, count=c.groups)),
    )


def maps(p: Problem, c: Config, t: Tiles) -> dict[str, TensorMap]:
    (q_batch, q_row, q_head), packed = p.q_stride, t.pack
    k, v = (
        TensorMap(box, name, (p.tk, columns, p.h, p.b), (row, head, batch))
        for name, box, columns, (batch, row, head) in (("k", t.BoxK, p.d, p.k_stride), ("v", t.BoxV, p.e, p.v_stride))
    )
    if packed == 1:
        q = TensorMap(t.BoxQ, "q", (p.tq, p.d, p.hq, p.b), (q_row, q_head, q_batch))
    else:
        q = TensorMap(t.BoxQ, "q", (p.tq, p.d, packed, p.h, p.b), (q_row, q_head, q_head * packed, q_batch))
    return {"q": q, "k": k, "v": v}


def row_blocks(p: Problem, c: Config) -> int:
    """CTAs of one column: of the rows of a head, or of a group of heads."""
    return -(-p.tq * pack(p, c) // c.rows)


def columns(p: Problem, c: Config) -> int:
    return p.b * p.hq // pack(p, c)


def scalars(p: Problem, c: Config) -> dict[str, float]:
    packed, many = pack(p, c), columns(p, c)
    column_bytes = p.tk * (p.d + p.e) * p.dtype.bytes * packed // p.group
    cache = int(CACHE_SHARE * Device.of("h200").l2_bytes)
    return {
        "heads": p.hq // packed,
        "columns": many,
        "row_blocks": row_blocks(p, c),
        "tiles": row_blocks(p, c) * many,
        "column_groups": equal_groups(many, column_bytes, cache) if p.causal else many,
        **score_scalars(p),
    }


def grid(p: Problem, c: Config) -> tuple[int, int, int]:
    return order(p, c).ctas(row_blocks(p, c) * columns(p, c), RESIDENT_SMS * c.ctas), 1, 1


def workspace(p: Problem, c: Config) -> dict[str, Buffer]:
    """The counter that CTAs draw their tiles from."""
    return {"counter": Buffer((1,), DType.int32, zeroed=True)} if c.schedule == "dynamic" else {}


def live_registers(p: Problem, c: Config) -> int:
    """Accumulators and weights per thread: weights take their scores' place where nothing overlaps."""
    return p.e // 2 + c.keys // 2 + (c.keys // 4 if c.overlap else 0)


def rules(p: Problem, c: Config, device: Device) -> Iterator[tuple[bool, str]]:
    yield device.arch == "sm_90a", f"TMA and wgmma are instructions of sm_90a; {device.name} is {device.arch}"
    who = roles(c)
    registers, live = who.reallocated[1], live_registers(p, c)
    yield min(p.tq, p.tk) > 0, "TMA takes no empty array"
    for name, extents, steps in (
        ("q", (p.b, p.tq, p.hq), p.q_stride),
        ("k", (p.b, p.tk, p.h), p.k_stride),
        ("v", (p.b, p.tk, p.h), p.v_stride),
    ):
        bad = [
            step for extent, step in zip(extents, steps, strict=True) if extent > 1 and (step <= 0 or step * p.dtype.bytes % VECTOR_BYTES)
        ]
        yield not bad, f"{name} has a stride of {bad[:1]} elements: TMA takes positive multiples of {VECTOR_BYTES} bytes"
    yield c.turns == "skip" or (c.overlap == 1 and c.groups in (2, 3)), "warpgroups take turns where two or three of them overlap"
    overlapped = live_registers(p, replace(c, overlap=1)) + REGISTER_OVERHEAD
    yield c.overlap == 1 or overlapped > registers, "the overlapped order fits in the registers: it was nowhere slower"
    yield p.e % 32 == 0, f"rows are stored 32 columns at a time; got e={p.e}"
    yield (
        live + REGISTER_OVERHEAD <= registers,
        f"{live} accumulators and weights and some {REGISTER_OVERHEAD} other registers per thread: {c.groups} warpgroups leave {registers}",
    )
    # One wgmma's accumulators, beside what ptxas needs for itself (C7602).
    widest = max(p.e, c.keys) // 2
    yield (
        widest + 24 <= who.launched,
        f"{widest} accumulators of one instruction and 24 other registers per thread; the launch gives {who.launched}",
    )


def key_blocks(p: Problem, c: Config, rows: int) -> int:
    """Blocks of keys that parts of `rows` rows of one column see, all parts together: as `KeyBlocks` of the device code."""
    packed = pack(p, c)
    left, right = p.left if p.windowed else -1, 0 if p.causal else p.right if p.windowed else -1
    if p.windowed:
        unlimited = p.tq + p.tk
        left, right = (unlimited if side < 0 else side for side in (left, right))
    return _key_blocks(p.tq, p.tk, packed, (left, right), row_blocks(p, c) * c.rows, rows, c.keys)


@lru_cache(maxsize=4096)
def _key_blocks(tq: int, tk: int, packed: int, window: tuple[int, int], all_rows: int, rows: int, keys: int) -> int:
    """`window`: keys to the left and right, below 0 for no limit."""
    left, right = window
    starts, offset = np.arange(0, all_rows, rows), tk - tq
    first, last = starts // packed, np.minimum((starts + rows - 1) // packed, tq - 1)
    end = np.minimum(tk, last + offset + 1 + right) if right >= 0 else np.full_like(last, tk)
    begin = np.maximum(first + offset - left, 0) if left >= 0 else np.zeros_like(first)
    blocks = np.where(first > last, 0, -(-np.maximum(end, 0) // keys))
    return int((blocks - np.minimum(begin // keys, blocks)).sum())


def cost(p: Problem, c: Config, device: Device) -> Cost:
    many, skips = columns(p, c), c.turns == "skip"
    blocks = key_blocks(p, c, 64) if skips else c.groups * key_blocks(p, c, c.rows)
    once = p.b * p.dtype.bytes * (p.tq * p.hq * (p.d + p.e) + p.tk * p.h * (p.d + p.e)) + 4 * p.b * p.hq * p.tq
    # Warpgroups that multiply make the weights, too; wide products, and more warpgroups, hide more of that.
    busy = (0.97 if p.e > 64 else 0.727) * (0.0, 0.771, 0.941, 1.0, 1.0)[c.groups] * (1.0 if c.keys > 64 or c.groups > 2 else 0.963)
    busy *= 1.0 if c.overlap else 0.983
    launch = Cost(
        flops=2 * 64 * c.keys * (p.d + p.e) * blocks * many,
        bytes=once,
        ctas=row_blocks(p, c) * many,
        ctas_per_sm=c.ctas,
        efficiency=busy,
        uneven=p.causal,
        cleared=len(workspace(p, c)),
    )
    shares = launch.ctas / (device.sms * min(c.ctas, -(-launch.ctas // device.sms)))
    idle = START_SECONDS * (1.0 if c.schedule == "one" or shares <= 1 else AHEAD)
    longest = -(-p.tk // c.keys) * row_blocks(p, c) / max(1, key_blocks(p, c, c.rows)) if p.causal else 1.0
    return replace(
        launch,
        alone=launch.arithmetic(device) * (1.12 if c.groups == 1 else 1.0) + idle,
        longest=heaviest_first(longest, shares) if p.causal else 1.0,
    )


flash_sm90 = Kernel(
    "flash_sm90",
    Path(TEMPLATES, "flash_attention", "flash_sm90.cu.j2"),
    Problem,
    Config,
    ARGS,
    tiles,
    grid,
    rules,
    cost,
    scalars,
    maps,
)
