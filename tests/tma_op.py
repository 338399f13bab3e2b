"""y[b, t, h] = the sum of x[b, t, h, :], by TMA and roles: any t, any strides that TMA takes, and three ways to deal tiles out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import vidrial as vd
from vidrial.device import Device
from vidrial.layout import Barriers, Roles, Scheduler, SharedMemory, SmemLayout, TensorMap, TmaRing, TmaTile
from vidrial.spec.op import Stage


@dataclass(frozen=True)
class Problem:
    """x [b, t, h, d], rows `pad` elements longer than d, -> y [b, t, h] float32."""

    dtype: vd.DType = vd.static()
    d: int = vd.static()
    b: int = vd.dynamic()
    t: int = vd.dynamic()
    h: int = vd.dynamic()
    pad: int = vd.dynamic(keyed=False)


@dataclass(frozen=True)
class Config:
    rows: int = vd.choice(64, 128)
    stages: int = vd.choice(2, 1, 3)
    consumers: int = vd.choice(1, 2)
    kind: str = vd.choice("one", "static", "dynamic")


ARGS = vd.Arguments(y="float*", x="TensorMap", counter="int*", b="int", t="int", h="int", row_tiles="int", groups="int")


def schedule(c: Config, who: Roles) -> Scheduler:
    return Scheduler(c.kind, consumer_warps=who.consumer_warps)


def tiles(p: Problem, c: Config) -> vd.Tiles:
    who = Roles(1, c.consumers)
    x = SmemLayout(p.dtype, c.rows, p.d, stages=c.stages)
    box = TmaTile(x, ("head", "batch"), column_tail=p.d % x.block != 0)
    bars = Barriers(ring=TmaRing((box,), who.consumer_warps), order=schedule(c, who))
    return vd.Tiles(
        threads=who.threads,
        smem=SharedMemory(X=x, Bars=bars.bytes),
        rows=c.rows,
        columns=p.d,
        X=x,
        Box=box,
        Who=who,
        Bars=bars,
    )


def places(p: Problem, c: Config) -> tuple[int, int]:
    return -(-p.t // c.rows), p.h * p.b


def grid(p: Problem, c: Config) -> tuple[int, int, int]:
    rows, columns = places(p, c)
    return schedule(c, Roles(1, c.consumers)).ctas(rows * columns, 5), 1, 1


def scalars(p: Problem, c: Config) -> dict[str, int]:
    return {"row_tiles": places(p, c)[0], "groups": min(2, p.h * p.b)}


def maps(p: Problem, c: Config, tiles: vd.Tiles) -> dict[str, TensorMap]:
    row = p.d + p.pad
    return {"x": TensorMap(tiles.Box, "x", (p.t, p.d, p.h, p.b), (p.h * row, row, p.t * p.h * row))}


def rules(p: Problem, c: Config, device: Device) -> Iterator[tuple[bool, str]]:
    yield (p.d + p.pad) * p.dtype.bytes % 16 == 0, f"rows of {(p.d + p.pad) * p.dtype.bytes} bytes: TMA takes multiples of 16"


kernel = vd.Kernel(
    "row_sums", Path(__file__).with_name("tma_op.cu.j2"), Problem, Config, ARGS, tiles, grid, rules, scalars=scalars, maps=maps
)


def sample(p: Problem, seed: int) -> dict[str, Any]:
    x = np.random.default_rng(seed).standard_normal((p.b, p.t, p.h, p.d + p.pad)).astype(np.float32)
    return {"x": p.dtype.round(x)}


def reference(p: Problem, inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {"y": p.dtype.widen(inputs["x"])[..., : p.d].astype(np.float64).sum(-1)}


def check(p: Problem, inputs: Any, results: Mapping[str, Any], expected: Mapping[str, Any]) -> Any:
    from vidrial.spec.op import Check

    error = np.abs(results["y"] - expected["y"])
    return Check(float(np.linalg.norm(error) / np.linalg.norm(expected["y"])), float(error.max()), 1e-5, 1e-4)


def example(*, dtype: str = "bfloat16", d: int = 128, b: int = 2, t: int = 1021, h: int = 3, pad: int = 0) -> Problem:
    return Problem(vd.DType.of(dtype), d, b, t, h, pad)


op = vd.Op(
    name="row_sums",
    kernels=(kernel,),
    problem=Problem,
    config=Config,
    stages=lambda p, c: (Stage(kernel, p, c),),
    inputs=lambda p: {"x": vd.Buffer((p.b, p.t, p.h, p.d + p.pad), p.dtype)},
    outputs=lambda p: {"y": vd.Buffer((p.b, p.t, p.h), vd.DType.float32)},
    workspace=lambda p, c: {"counter": vd.Buffer((1,), vd.DType.int32, zeroed=True)} if c.kind == "dynamic" else {},
    sample=sample,
    reference=reference,
    check=check,
    small=lambda p: replace(p, t=min(p.t, 150)),
    example=example,
)
