"""Prefix sums of every row of a matrix, any length, in three launches: sums of blocks, the sums before each block, and both together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

import vidrial as vd

A = TypeVar("A")
Arrays = Mapping[str, NDArray[Any]]
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Problem:
    """x [b, t] -> y [b, t], y[i, j] = x[i, 0] + ... + x[i, j]; both contiguous, float32."""

    b: int = vd.dynamic()
    t: int = vd.dynamic()


@dataclass(frozen=True)
class Blocked(Problem):
    """What each launch is asked: the op's problem, and what the op's config decides for all three."""

    block: int = vd.static()

    @property
    def blocks(self) -> int:
        """Blocks per row."""
        return -(-self.t // self.block)


@dataclass(frozen=True)
class Threads:
    """The config of one launch: `threads` per CTA."""

    threads: int = vd.choice(128, 64, 256, 512)


@dataclass(frozen=True)
class Config:
    """`block` elements of a row per CTA, a choice of the op's own; and a part per launch."""

    block: int = vd.choice(1024, 512, 2048, 4096)
    sums: Threads = vd.part(Threads)
    offsets: Threads = vd.part(Threads)
    add: Threads = vd.part(Threads)


def tiles(p: Blocked, c: Threads) -> vd.Tiles:
    return vd.Tiles(threads=c.threads)


def per_block(p: Blocked, c: Threads) -> tuple[int, int, int]:
    return p.blocks, p.b, 1


def per_row(p: Blocked, c: Threads) -> tuple[int, int, int]:
    return p.b, 1, 1


def cost(p: Blocked, c: Threads, elements: int, ctas: int) -> vd.Cost:
    """Of a launch that reads and writes so many float32."""
    # 32 is the most CTAs that an SM holds; 0.06 about what the CUDA cores reach of the tensor cores' rate.
    return vd.Cost(flops=p.b * p.t, bytes=4 * elements, ctas=ctas, ctas_per_sm=min(32, 2048 // c.threads), efficiency=0.06)


sums = vd.Kernel(
    name="scan_sums",
    template=HERE / "scan_sums.cu.j2",
    problem=Blocked,
    config=Threads,
    args=vd.Arguments(x="float const*", sums="float*", t="int", blocks="int"),
    tiles=tiles,
    grid=per_block,
    cost=lambda p, c, device: cost(p, c, p.b * (p.t + p.blocks), p.b * p.blocks),
)
offsets = vd.Kernel(
    name="scan_offsets",
    template=HERE / "scan_offsets.cu.j2",
    problem=Blocked,
    config=Threads,
    args=vd.Arguments(sums="float const*", offsets="float*", blocks="int"),
    tiles=tiles,
    grid=per_row,
    cost=lambda p, c, device: cost(p, c, 2 * p.b * p.blocks, p.b),
)
add = vd.Kernel(
    name="scan_add",
    template=HERE / "scan_add.cu.j2",
    problem=Blocked,
    config=Threads,
    args=vd.Arguments(x="float const*", offsets="float const*", y="float*", t="int", blocks="int"),
    tiles=tiles,
    grid=per_block,
    cost=lambda p, c, device: cost(p, c, p.b * (2 * p.t + p.blocks), p.b * p.blocks),
)


def stages(p: Problem, c: Config) -> Sequence[vd.Stage]:
    blocked = Blocked(p.b, p.t, c.block)
    return (
        vd.Stage(sums, blocked, c.sums, part="sums"),
        vd.Stage(offsets, blocked, c.offsets, part="offsets"),
        vd.Stage(add, blocked, c.add, part="add"),
    )


def workspace(p: Problem, c: Config) -> dict[str, vd.Buffer]:
    """The arrays between the launches: an op's kernels find them by the names of their pointers, like inputs and outputs."""
    per_block = vd.Buffer((p.b, -(-p.t // c.block)), vd.DType.float32)
    return {"sums": per_block, "offsets": per_block}


def example(*, t: int, b: int = 16) -> Problem:
    return Problem(b, t)


def sample(p: Problem, seed: int) -> dict[str, NDArray[Any]]:
    return {"x": np.random.default_rng(seed).standard_normal((p.b, p.t), np.float32)}


def reference(p: Problem, inputs: Arrays) -> dict[str, NDArray[Any]]:
    return {"y": np.cumsum(inputs["x"], axis=1, dtype=np.float64)}


def check(p: Problem, inputs: Arrays, outputs: Arrays, expected: Arrays) -> vd.Check:
    """Errors relative to the norm of sum |x|, and of the worst element relative to its own sum |x|."""
    error = np.abs(outputs["y"] - expected["y"])
    terms = np.cumsum(np.abs(inputs["x"]), axis=1, dtype=np.float64) + np.finfo(np.float32).tiny
    # Each addition in float32 costs at most 2^-24 of sum |x|. On the longest path to an element lie those of a thread (64 of its block, twice),
    # of a warp and of the warps (5 + 16, three times), and of the rounds over the blocks (512 elements of 64 threads).
    bound = 2.0**-24 * (2 * 64 + 3 * 21 + 1 + p.t / (512 * 64))
    return vd.Check(float(np.linalg.norm(error) / np.linalg.norm(terms)), float((error / terms).max()), bound, bound)


op = vd.Op(
    name="scan",
    kernels=(sums, offsets, add),
    problem=Problem,
    config=Config,
    stages=stages,
    workspace=workspace,
    inputs=lambda p: {"x": vd.Buffer((p.b, p.t), vd.DType.float32)},
    outputs=lambda p: {"y": vd.Buffer((p.b, p.t), vd.DType.float32)},
    example=example,
    sample=sample,
    reference=reference,
    check=check,
    # Of the shortest blocks there are more than `offsets` has threads, so that its loop is entered again; and extents differ, so that a wrong
    # stride shows.
    small=lambda p: replace(p, b=min(p.b, 2), t=min(p.t, 70_001)),
)


def scan(x: A) -> A:
    """Prefix sums along the rows of `x` [b, t], float32, for torch, CuPy, JAX and NumPy arrays.

    Raises:
        vd.ArgumentError: x is no matrix. vd.ArgumentTypeError: it is not an array, or not float32.
    """
    array = vd.as_array(x, "x")
    if len(array.shape) != 2:
        raise vd.ArgumentError(f"x has shape {list(array.shape)}; accepted: a matrix [b, t]")
    if array.dtype is not vd.DType.float32:
        raise vd.ArgumentTypeError(f"x is {array.dtype}; accepted: float32")
    b, t = array.shape
    if 0 in (b, t):
        return vd.to_library(array)
    return vd.apply(op, Problem(b, t), {"x": vd.contiguous(array)})["y"]
