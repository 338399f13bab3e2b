"""The adjoint of the state behind every chunk, by wgmma: the forward scan's own kernel over queries, from the last chunk down
(`power_back_scan_wgmma.cuh`); and what joins its segments (`power_back_carry.cuh`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from vidrial import Arguments, Cost, Device, DType, Kernel, choice
from vidrial.kernels.power_retention import scan, scan_wgmma
from vidrial.kernels.power_retention.back.problem import ChunkedGradient, Gradient
from vidrial.templates import TEMPLATES


@dataclass(frozen=True)
class Config(scan.Config):
    """As the forward scan's, by wgmma."""

    stages: int = choice(4, 5)
    mma: str = choice("wgmma")


ARGS = Arguments(
    q="Elem const*",
    dy="Elem const*",
    a="float2 const*",
    from_start="float const*",
    from_start_z="float const*",
    adjoint="cutlass::bfloat16_t*",
    ends="float*",
    q_stride="int64_t[3]",
    dy_stride="int64_t[3]",
    t="int",
    h="int",
    group="int",
    chunk="int",
    chunks="int",
    padded="int",
)


def serves(p: Gradient) -> bool:
    """Whether wgmma scans a problem's adjoint: it takes dy as it is stored, and a warpgroup owns 64 rows of M. Where not, mma.sync does."""
    return p.dtype == DType.bfloat16 and p.d % 64 == 0


def rules(p: ChunkedGradient, c: Config, device: Device) -> Iterator[tuple[bool, str]]:
    yield from scan_wgmma.rules(p, c, device)
    yield c.tiles * c.columns < 384 or c.warps == 4, f"tiles={c.tiles} of columns={c.columns} with 8 warps spill 8 to 16 bytes"
    units = scan_wgmma.state_units(p, c)
    yield (
        units % (c.warps // 4) == 0,
        f"warps={c.warps}: the {units} warpgroups with pair tiles must fill CTAs, those of M read other weights",
    )


def cost(p: ChunkedGradient, c: Config, device: Device) -> Cost:
    """The forward's, of all heads of a group. NOTE: the last chunk's tokens are filled up to a whole one."""
    one, (_, segments) = scan_wgmma.cost(p, c, device), scan.joined(p, c.segments)
    tokens, tables = (p.t - p.chunk) * p.group, scan.scanned_tokens(p) * p.group * (8 if p.normalized else 4)
    written = p.snapshot * (2 * (p.chunks - segments) + 4 * (segments - 1))
    read = tokens * p.dtype.bytes * (p.d + p.e) + tables + 32 * (p.chunks - 1) * p.gated
    return replace(
        one, flops=one.flops * p.group, bytes=p.b * p.h * (read + written), alone=one.alone * p.group, l2_bytes=one.l2_bytes * p.group
    )


power_back_scan_wgmma = Kernel(
    "power_back_scan_wgmma",
    Path(TEMPLATES, "power_retention", "power_back_scan_wgmma.cu.j2"),
    ChunkedGradient,
    Config,
    ARGS,
    scan_wgmma.tiles,
    scan_wgmma.grid,
    rules,
    cost,
)

power_back_carry = Kernel(
    "power_back_carry",
    Path(TEMPLATES, "power_retention", "power_back_carry.cu.j2"),
    ChunkedGradient,
    scan.CarryConfig,
    Arguments(a="float2 const*", ends="float const*", adjoint="cutlass::bfloat16_t*", chunk="int", chunks="int", segments="int"),
    scan.carry_tiles,
    scan.carry_grid,
    cost=scan.carry_cost,
    scalars=lambda p, c: {"segments": c.segments},
)
