"""y = x + 1, and what can go wrong with it: a wrong element, an unwritten tail, a write outside, races, faults, hangs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vidrial.dtypes import DType
from vidrial.layout.smem import SharedMemory
from vidrial.spec.fields import choice, dynamic, static
from vidrial.spec.kernel import Kernel
from vidrial.spec.op import Buffer, Check, Op
from vidrial.spec.source import Arguments, Tiles

NONE, WRONG, TAIL, OUTSIDE, RANDOM, FAULT, HANG, SMEM = range(8)
ARGS = Arguments(x="int const*", y="int*", n="int")


@dataclass(frozen=True)
class Problem:
    dtype: DType = static()
    n: int = dynamic()


@dataclass(frozen=True)
class Config:
    fault: int = choice(NONE, WRONG, TAIL, OUTSIDE, RANDOM, FAULT, HANG, SMEM)
    threads: int = choice(128, 64)


def tiles(p: Any, c: Config) -> Tiles:
    return Tiles(threads=c.threads, smem=SharedMemory(Unused=227 << 10) if c.fault == SMEM else None)


bad = Kernel("bad", Path(__file__).parent / "bad_op.cu.j2", Problem, Config, ARGS, tiles, lambda p, c: (-(-p.n // c.threads), 1, 1))


def check(p: Problem, inputs: Any, results: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> Check:
    return Check(float((results["y"] != expected["y"]).mean()), 0.0, 0.0, 0.0)


def example(*, n: int) -> Problem:
    return Problem(DType.int32, n)


def sample(p: Problem, seed: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).integers(0, 1000, p.n, np.int32)}


op = Op.of(
    bad,
    inputs=lambda p: {"x": Buffer((p.n,), DType.int32)},
    outputs=lambda p: {"y": Buffer((p.n,), DType.int32)},
    sample=sample,
    reference=lambda p, inputs: {"y": inputs["x"] + 1},
    check=check,
    small=lambda p: example(n=min(p.n, 1009)),
    example=example,
)
