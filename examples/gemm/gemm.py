"""C = A B^T + bias, then GELU if asked for: bfloat16 and float16, any m, n, k, by mma.sync, wgmma, or wgmma and TMA (docs/writing_a_gemm.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

import vidrial as vd
from vidrial.layout import (
    VECTOR,
    Barriers,
    Epilogue,
    Meeting,
    MMA_16x8x16,
    NamedBarriers,
    Pipeline,
    Roles,
    Scheduler,
    SharedMemory,
    SmemLayout,
    TensorMap,
    TiledCopy,
    TiledMma,
    TmaRing,
    TmaTile,
    WarpgroupMma,
    cp_async,
)

SMS = 132  # of the largest Hopper GPU: on one with fewer some CTAs wait for others
A = TypeVar("A")  # an array of torch, CuPy, JAX or NumPy
Arrays: TypeAlias = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Problem:
    """a [m, k], b [n, k], bias [n] if `biased` -> c [m, n], all contiguous and of one dtype."""

    dtype: vd.DType = vd.static()
    biased: bool = vd.static()
    gelu: bool = vd.static()
    m: int = vd.dynamic()
    n: int = vd.dynamic()
    k: int = vd.dynamic()


@dataclass(frozen=True)
class Config:
    """All threads copy, then multiply. A CTA of `warps` makes `rows` x `columns` of C, `depth` of k at a time through `stages`; `blocks`: CTAs
    per SM that registers must allow; `load`, `store`: bytes that rows of A and B, and of C, are aligned to; `mma`: by which instruction."""

    rows: int = vd.choice(128, 64, 256)
    columns: int = vd.choice(128, 64, 256)
    depth: int = vd.choice(64, 32)
    stages: int = vd.choice(4, 3, 5)
    warps: int = vd.choice(4, 8)
    blocks: int = vd.choice(1, 2)
    load: int = vd.choice(16, 8, 4, 2)
    store: int = vd.choice(16, 8, 4, 2)
    mma: str = vd.choice("sync", "wgmma")


@dataclass(frozen=True)
class ByTma(Config):
    """One more warp copies by TMA, `warps` multiply by wgmma and store. As many CTAs as run at once take tile after tile, `side` of them side
    by side, then the rows below, so that what they read stays in L2."""

    rows: int = vd.choice(128, 256, 192, 64)
    columns: int = vd.choice(256, 128, 192, 64, 96, 160, 208)
    depth: int = vd.choice(64)
    stages: int = vd.choice(4, 3, 5, 6, 7)
    warps: int = vd.choice(8, 4, 12)
    load: int = vd.choice(16)
    mma: str = vd.choice("tma")
    side: int = vd.choice(8, 4, 16)


@dataclass(frozen=True)
class Paths:
    """Who copies: all `threads`, or `tma`."""

    by: str = vd.choice("threads", "tma")
    threads: Config = vd.part(Config)
    tma: ByTma = vd.part(ByTma)


ARGS = vd.Arguments(a="Elem const*", b="Elem const*", bias="Elem const*", c="Elem*", m="int", n="int", k="int")
MAPPED = vd.Arguments(
    a="TensorMap", b="TensorMap", bias="Elem const*", c="Elem*", m="int", n="int", k="int", down="int", across="int", groups="int"
)


def tma_tiles(p: Problem, c: ByTma) -> vd.Tiles:
    a, b = SmemLayout(p.dtype, c.rows, c.depth, stages=c.stages), SmemLayout(p.dtype, c.columns, c.depth, stages=c.stages)
    who, own = roles(c), c.rows // (c.warps // 4)
    mma = WarpgroupMma(p.dtype, 1, (own, c.columns, c.depth), b, a)  # of each warpgroup, whose rows are its own
    out = SmemLayout(p.dtype, own, SmemLayout(p.dtype, own, c.columns).block, stages=c.warps // 4)
    box_a, box_b = TmaTile(a), TmaTile(b)
    bars = Barriers(ring=TmaRing((box_a, box_b), who.consumer_warps), order=Scheduler("static", heavy=False))
    return vd.Tiles(
        threads=who.threads,
        min_blocks=c.blocks,
        smem=SharedMemory(A=a, B=b, C=out, Bars=bars.bytes),
        Elem=p.dtype,
        A=a,
        B=b,
        C=out,
        BoxA=box_a,
        BoxB=box_b,
        Mma=mma,
        Epilogue=Epilogue(mma, out, VECTOR[c.store]),
        Roles=who,
        Bars=bars,
        Named=NamedBarriers(stored=Meeting(128, count=c.warps // 4)),
    )


def roles(c: Config) -> Roles:
    return Roles(producer=1, consumers=c.warps // 4, ctas=c.blocks)


def maps(p: Problem, c: ByTma, t: vd.Tiles) -> dict[str, TensorMap]:
    return {"a": TensorMap(t.BoxA, "a", (p.m, p.k), (p.k,)), "b": TensorMap(t.BoxB, "b", (p.n, p.k), (p.k,))}


def scalars(p: Problem, c: ByTma) -> dict[str, int]:
    across, down, _ = grid(p, c)
    return {"across": across, "down": down, "groups": -(-across // c.side)}


def tiles(p: Problem, c: Config) -> vd.Tiles:
    threads, shape = 32 * c.warps, (c.rows, c.columns, c.depth)
    a, b = SmemLayout(p.dtype, c.rows, c.depth, stages=c.stages), SmemLayout(p.dtype, c.columns, c.depth, stages=c.stages)
    mma: TiledMma | WarpgroupMma
    if c.mma == "wgmma":
        mma = WarpgroupMma(p.dtype, c.warps // 4, shape, b, a)
    else:
        mma = TiledMma(MMA_16x8x16[p.dtype], (c.warps // 2, 2), shape, a, b)
    copy, out = VECTOR[2] if c.load == 2 else cp_async(c.load, zero_fill=True), SmemLayout(p.dtype, c.rows, c.columns)
    smem = SharedMemory(A=a, B=b)
    return vd.Tiles(
        threads=threads,
        # C goes where the stages were: over all of A and a part of B, if it is larger than A.
        smem=smem.join("B") if out.bytes > c.stages * a.bytes else smem,
        Elem=p.dtype,
        A=a,
        B=b,
        Mma=mma,
        CopyA=TiledCopy(copy, a, threads),
        CopyB=TiledCopy(copy, b, threads),
        Ring=Pipeline(c.stages, read=2 if c.mma == "wgmma" else 1),
        Epilogue=Epilogue(mma, out, VECTOR[c.store]),
    )


def grid(p: Problem, c: Config) -> tuple[int, int, int]:
    return -(-p.n // c.columns), -(-p.m // c.rows), 1


def tma_grid(p: Problem, c: ByTma) -> tuple[int, int, int]:
    across, down, _ = grid(p, c)
    return Scheduler("static").ctas(across * down, SMS * c.blocks), 1, 1


def aligned(elements: int) -> int:
    """Bytes, 16 at most, that rows of so many 16-bit elements are aligned to, if the first one is."""
    return min(16, 2 * (elements & -elements))


def rules(p: Problem, c: Config, device: vd.Device) -> Iterator[tuple[bool, str]]:
    yield p.dtype in MMA_16x8x16 and p.dtype.bytes == 2, f"dtype {p.dtype} is not served; accepted: bfloat16, float16"
    yield c.load == aligned(p.k), f"load={c.load}: rows of k={p.k} elements are aligned to {aligned(p.k)} bytes"
    yield c.store == aligned(p.n), f"store={c.store}: rows of n={p.n} elements are aligned to {aligned(p.n)} bytes"
    if c.mma == "tma":
        yield from tma_rules(p, c, device)
        return
    yield c.columns <= 32 * c.warps, f"columns={c.columns}: {c.warps} warps store 16 bytes each of {32 * c.warps} columns at most"
    yield c.rows * c.columns <= c.stages * c.depth * (c.rows + c.columns), "C is larger than the stages, where it goes"
    accumulators, registers = c.rows * c.columns // (32 * c.warps), min(255, device.registers_per_sm // (32 * c.warps * c.blocks) // 8 * 8)
    beside = 60 if c.mma == "wgmma" else 90
    yield accumulators + beside <= registers, f"{accumulators} accumulators and {beside} other registers per thread; there are {registers}"
    smem = c.blocks * (c.stages * c.depth * (c.rows + c.columns) * p.dtype.bytes + 1024)
    yield (
        c.blocks == 1 or smem <= device.smem_per_sm,
        f"blocks={c.blocks} take {smem} bytes of shared memory; an SM has {device.smem_per_sm}",
    )
    if c.mma == "wgmma":
        yield device.arch == "sm_90a", f"wgmma is an instruction of sm_90a; {device.name} is {device.arch}"
        yield c.rows % (16 * c.warps) == 0, f"rows={c.rows}: each of {c.warps // 4} warpgroups makes multiples of 64"


def tma_rules(p: Problem, c: Config, device: vd.Device) -> Iterator[tuple[bool, str]]:
    yield device.arch == "sm_90a", f"TMA and wgmma are instructions of sm_90a; {device.name} is {device.arch}"
    yield c.rows % (16 * c.warps) == 0, f"rows={c.rows}: each of {c.warps // 4} warpgroups makes multiples of 64"
    # Beside the accumulators: addresses and the loop; and what ptxas needs for itself beside those of one instruction (C7602).
    accumulators, registers, launched = c.rows * c.columns // (32 * c.warps), roles(c).reallocated[1], roles(c).launched
    yield accumulators + 32 <= registers, f"{accumulators} accumulators and 32 other registers per thread; there are {registers}"
    yield from device.smem_rules(c.stages * c.depth * (c.rows + c.columns) * p.dtype.bytes, c.blocks)
    yield (
        c.columns // 2 + 24 <= launched,
        f"{c.columns // 2} accumulators of one instruction, 24 other registers; the launch gives {launched}",
    )


def cost(p: Problem, c: Config, device: vd.Device) -> vd.Cost:
    x, y, _ = grid(p, c)
    depth = -(-p.k // c.depth) * c.depth
    flops, read = 2 * c.rows * c.columns * depth, p.dtype.bytes * (c.rows + c.columns) * depth  # of one CTA's tile
    reused = c.rows * c.columns / (c.rows + c.columns)  # products per element that is loaded
    if c.mma == "tma":
        # Measured on an H200: all of the tensor rate, or what comes out of L2, whose lines of 128 bytes are read twice by rows that begin elsewhere.
        speed = 12e12 if p.k * p.dtype.bytes % 128 == 0 else 5.4e12
        waves = -(-x * y // device.sms) if c.blocks == 1 else max(1.0, x * y / device.sms)
        efficiency = min(1.0, flops * device.sms / (device.tensor_tflops * 1e12) * speed * waves / (read * x * y))
        efficiency *= (0.98 if c.stages < 4 else 1.0) * (0.95 if c.blocks > 1 else 1.0) * min(1.0, reused / 85) ** 0.1
    else:
        efficiency = (0.65 if c.mma == "wgmma" else 0.4) * min(1.0, reused / 64) ** 0.5 * (1.0 if c.load == 16 else 0.6)
    return vd.Cost(
        flops=x * y * flops,
        bytes=p.dtype.bytes * (p.m * p.k + p.n * p.k + p.m * p.n + p.biased * p.n),
        ctas=x * y,
        ctas_per_sm=c.blocks,
        efficiency=efficiency,
    )


TEMPLATE = Path(__file__).with_name("gemm.cu.j2")
kernel = vd.Kernel("gemm", TEMPLATE, Problem, Config, ARGS, tiles, grid, rules, cost)
tma_kernel = vd.Kernel("gemm_tma", TEMPLATE, Problem, ByTma, MAPPED, tma_tiles, tma_grid, rules, cost, scalars, maps)


def stages(p: Problem, c: Paths) -> list[vd.Stage]:
    return [vd.Stage(tma_kernel, p, c.tma, "tma") if c.by == "tma" else vd.Stage(kernel, p, c.threads, "threads")]


def example(*, m: int = 4096, n: int = 4096, k: int = 4096, dtype: str = "bfloat16", bias: bool = True, gelu: bool = False) -> Problem:
    return Problem(vd.DType.of(dtype), bias, gelu, m, n, k)


def inputs(p: Problem) -> dict[str, vd.Buffer]:
    arrays = {"a": vd.Buffer((p.m, p.k), p.dtype), "b": vd.Buffer((p.n, p.k), p.dtype)}
    return arrays | ({"bias": vd.Buffer((p.n,), p.dtype)} if p.biased else {})


def sample(p: Problem, seed: int) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    inputs = {"a": rng.standard_normal((p.m, p.k)), "b": rng.standard_normal((p.n, p.k)) / max(p.k, 1) ** 0.5}
    if p.biased:
        inputs["bias"] = rng.standard_normal(p.n)
    return {name: p.dtype.round(x) for name, x in inputs.items()}


def reference(p: Problem, inputs: Arrays) -> dict[str, NDArray[Any]]:
    a, b = p.dtype.widen(inputs["a"]).astype(np.float64), p.dtype.widen(inputs["b"]).astype(np.float64)
    x = a @ b.T + (p.dtype.widen(inputs["bias"]) if p.biased else 0.0)
    return {"c": x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) if p.gelu else x}


def check(p: Problem, inputs: Arrays, outputs: Arrays, expected: Arrays) -> vd.Check:
    """Errors relative to the norm, and of each element to 1 + its size: rounding alone costs 2^-9 in bfloat16, 2^-12 in float16."""
    exact = expected["c"]
    error = np.abs(p.dtype.widen(outputs["c"]) - exact)
    bound = 1.01 * (2.0**-8 if p.dtype is vd.DType.bfloat16 else 2.0**-11) + 1e-5
    return vd.Check(float(np.linalg.norm(error) / np.linalg.norm(exact)), float((error / (1 + np.abs(exact))).max()), bound, bound)


def problem_of(a: vd.ArraySpec, b: vd.ArraySpec, bias: vd.ArraySpec | None = None, *, gelu: bool = False) -> Problem:
    arrays = [x for x in (a, b, bias) if x is not None]
    shapes = [list(x.shape) for x in arrays]
    if [len(s) for s in shapes] != [2, 2, 1][: len(shapes)] or shapes[0][1] != shapes[1][1] or shapes[2:] not in ([], [shapes[1][:1]]):
        raise vd.ArgumentError(f"shapes {', '.join(map(str, shapes))}; accepted: a [m, k], b [n, k] and, if given, bias [n]")
    dtypes = {x.dtype for x in arrays}
    if len(dtypes) > 1:
        raise vd.ArgumentError(f"dtypes {', '.join(str(x.dtype) for x in arrays)}; accepted: one for all")
    (m, k), n = a.shape, b.shape[0]
    if 0 in (m, n, k):
        raise vd.ArgumentError(f"m={m}, n={n}, k={k}; accepted: at least one of each")
    return Problem(a.dtype, bias is not None, gelu, m, n, k)


op = vd.Op(
    name="gemm",
    kernels=(kernel, tma_kernel),
    problem=Problem,
    config=Paths,
    stages=stages,
    example=example,
    sample=sample,
    reference=reference,
    check=check,
    inputs=inputs,
    outputs=lambda p: {"c": vd.Buffer((p.m, p.n), p.dtype)},
    # Rows as aligned as those asked for; more steps of k than any ring has stages, and tiles in both directions.
    small=lambda p: replace(p, m=min(p.m, 197), n=min(p.n, 136 + p.n % 8), k=min(p.k, 456 + p.k % 8)),
    problem_of=problem_of,
)


def linear(a: A, b: A, bias: A | None = None, *, gelu: bool = False) -> A:
    """a [m, k], b [n, k], bias [n] -> a b^T + bias [m, n], bfloat16 or float16, of torch, CuPy, JAX or NumPy; then GELU, by tanh, if asked for.

    Raises:
        ArgumentError: shapes or dtypes do not fit each other. ConfigError: the dtype is not served.
    """
    return vd.call_op(op, {"a": a, "b": b, "bias": bias}, gelu=gelu)["c"]
