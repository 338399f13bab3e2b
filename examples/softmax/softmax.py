"""Row softmax of an m x n matrix, any m and n: a whole Vidrial kernel in one file and one template (docs/writing_a_kernel.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

import vidrial as vd

A = TypeVar("A")  # an array of torch, CuPy, JAX or NumPy
Arrays: TypeAlias = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Problem:
    """x [m, n] -> y [m, n], both contiguous."""

    dtype: vd.DType = vd.static()
    m: int = vd.dynamic()
    n: int = vd.dynamic()


@dataclass(frozen=True)
class Config:
    """`row_threads` share a row; `rows` a CTA; `vector` elements per load; `keep`: vectors a thread holds, 0 to read the row twice."""

    row_threads: int = vd.choice(128, 32, 8, 256, 512)
    rows: int = vd.choice(1, 2, 4, 8, 16)
    vector: int = vd.choice(1, 2, 4, 8)
    keep: int = vd.choice(0, 1, 2, 4, 8)


ARGS = vd.Arguments(x="Elem const*", y="Elem*", m="int", n="int")


def tiles(p: Problem, c: Config) -> vd.Tiles:
    return vd.Tiles(threads=c.row_threads * c.rows, Elem=p.dtype)


def grid(p: Problem, c: Config) -> tuple[int, int, int]:
    return -(-p.m // c.rows), 1, 1


def rules(p: Problem, c: Config, device: vd.Device) -> Iterator[tuple[bool, str]]:
    yield p.dtype in (vd.DType.float32, vd.DType.bfloat16), f"dtype {p.dtype} is not served; accepted: float32, bfloat16"
    yield c.vector * p.dtype.bytes <= 16, f"vector={c.vector} of {p.dtype}: a thread loads at most 16 bytes at once"
    yield p.n % c.vector == 0, f"vector={c.vector} must divide n={p.n}, or the second row is not aligned to it"
    yield c.keep == 0 or c.row_threads * c.vector * c.keep >= p.n, f"row_threads * vector * keep must be 0 or hold a row of n={p.n}"


def cost(p: Problem, c: Config, device: vd.Device) -> vd.Cost:
    steps = -(-p.n // (c.row_threads * c.vector))  # loads a thread, those beyond the row's end included
    instructions = 12 * c.vector + (20 if c.keep else 28)  # a step
    ctas = -(-p.m // c.rows)
    return vd.Cost(
        flops=ctas * c.rows * c.row_threads * steps * instructions,
        bytes=p.m * p.n * p.dtype.bytes * (2 if c.keep else 2.5),
        ctas=ctas,
        ctas_per_sm=2048 // (c.row_threads * c.rows),
        efficiency=0.06,
    )


kernel = vd.Kernel("softmax", Path(__file__).with_name("softmax.cu.j2"), Problem, Config, ARGS, tiles, grid, rules, cost)


def example(*, n: int, m: int = 4096, dtype: str = "float32") -> Problem:
    return Problem(vd.DType.of(dtype), m, n)


def sample(p: Problem, seed: int) -> dict[str, NDArray[Any]]:
    return {"x": p.dtype.round(np.random.default_rng(seed).standard_normal((p.m, p.n)) * 4)}


def reference(p: Problem, inputs: Arrays) -> dict[str, NDArray[Any]]:
    x = p.dtype.widen(inputs["x"])
    e = np.exp(x - x.max(-1, keepdims=True))
    return {"y": e / e.sum(-1, keepdims=True)}


def check(p: Problem, inputs: Arrays, outputs: Arrays, expected: Arrays) -> vd.Check:
    """Errors relative to the norm and to each element: rounding alone costs 2^-8 in bfloat16. What nobody wrote is NaN, and fails."""
    exact = expected["y"]
    error = np.abs(p.dtype.widen(outputs["y"]) - exact)
    bound = (2**-8 if p.dtype is vd.DType.bfloat16 else 0.0) + 1e-5
    return vd.Check(float(np.linalg.norm(error) / np.linalg.norm(exact)), float((error / exact).max()), bound, bound)


def problem_of(x: vd.ArraySpec) -> Problem:
    if len(x.shape) != 2:
        raise vd.ArgumentError(f"x has shape {list(x.shape)}; accepted: a matrix [m, n]")
    return Problem(x.dtype, *x.shape)


op = vd.Op.of(
    kernel,
    example=example,
    problem_of=problem_of,
    sample=sample,
    reference=reference,
    check=check,
    inputs=lambda p: {"x": vd.Buffer((p.m, p.n), p.dtype)},
    outputs=lambda p: {"y": vd.Buffer((p.m, p.n), p.dtype)},
    small=lambda p: replace(p, m=min(p.m, 37)),
    batched=True,  # rows know nothing of each other
)


def softmax(x: A) -> A:
    """The softmax of each row of `x` [m, n], float32 or bfloat16, torch's, CuPy's or JAX's; on the CPU it runs on the host target."""
    return vd.call_op(op, {"x": x})["y"]
