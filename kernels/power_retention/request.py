"""What a call of power retention asks for, and what is refused before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

import numpy as np

from vidrial import CPU, ArgumentError, ArgumentTypeError, ArraySpec, CachedPlan, DType, UnsupportedError, check_inputs
from vidrial.kernels.power_retention.op import CHUNKS, DEGREES, DIMS, MAX_ELEMENTS, MAX_HEADS, NORMALIZE, max_scale, op
from vidrial.kernels.power_retention.problem import Problem

NAMES = ("q", "k", "v", "log_g")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real)


def check_options(degree: Any, scale: Any, normalize: Any, chunk: Any) -> None:
    # The exact types come first: to ask the abstract ones takes a tenth of a launch each.
    if not (type(degree) is int or isinstance(degree, Integral)) or degree not in DEGREES:
        odd = isinstance(degree, Integral) and degree % 2 == 1 and normalize == "sum"
        why = "an odd power's weights change sign, so their sum is no normaliser" if odd else "no other degree has a kernel"
        raise UnsupportedError(f"degree={degree!r}: {why}; accepted: {', '.join(map(str, DEGREES))}")
    if not isinstance(normalize, str) or normalize not in NORMALIZE:
        raise ArgumentError(f"normalize={normalize!r} is not known; accepted: {', '.join(map(repr, NORMALIZE))}")
    if chunk is not None and (not (type(chunk) is int or isinstance(chunk, Integral)) or isinstance(chunk, bool) or chunk not in CHUNKS):
        raise ArgumentError(f"chunk={chunk!r} is not served; accepted: None, {', '.join(map(str, sorted(CHUNKS)))} (0: no chunks)")
    if chunk and degree != 2:
        raise UnsupportedError(f"chunk={chunk} with degree={degree}: only degree 2 has a state small enough; use chunk=None or 0")
    if scale is not None and not ((type(scale) is float or _is_number(scale)) and abs(scale) <= max_scale(int(degree))):
        raise ArgumentError(
            f"scale={scale!r} is not served; accepted: None, or a number of at most {max_scale(int(degree)):g} in magnitude"
        )


@dataclass(frozen=True, slots=True)
class Request:
    """What a call asks for: its problem and chunk, whose arrays, whether NumPy serves it, and whether the GPU does with these arrays as
    they lie, all rows copied 16 bytes at a time."""

    problem: Problem
    chunk: int | None
    fixed: tuple[tuple[str, int], ...]
    library: str
    on_cpu: bool
    ready: bool
    planned: CachedPlan


@lru_cache(maxsize=4096, typed=True)
def request_of(
    key: tuple[tuple[Any, ...], ...], degree: int, scale: float | None, normalize: str, chunk: int | None, target: str
) -> Request:
    """What arrays that were described ask for; refuses what is not served. This is the one look-up of the warm path."""
    check_options(degree, scale, normalize, chunk)
    facts = {name: ArraySpec.of(seen, name) for name, seen in zip(NAMES, key, strict=False)}
    shapes, strides = {name: f.shape for name, f in facts.items()}, {name: f.strides for name, f in facts.items()}
    _check_shapes(shapes)
    (b, t, hq, d), h, e = shapes["q"], shapes["k"][2], shapes["v"][3]
    if chunk is not None and chunk >= t:
        chunk = 0
    problem = Problem(
        facts["q"].dtype,
        d,
        e,
        int(degree),
        "log_g" in shapes,
        normalize == "sum",
        b,
        t,
        hq,
        h,
        float(d**-0.5 if scale is None else scale),
        _three(strides["q"]),
        _three(strides["k"]),
        _three(strides["v"]),
        (t * hq * e, hq * e, e),
        _three(strides.get("log_g", (0, 0, 0))),
    )
    device, fixed = facts["q"].device, () if chunk is None else (("chunk", chunk),)
    on_cpu = device == CPU and target == "cuda"
    ready = not on_cpu and target == "cuda" and all(facts[name].vectorised for name in "qkv")
    dtypes = (DType.bfloat16, DType.float16, DType.float32)[: 3 if on_cpu else 2]
    if problem.dtype not in dtypes:
        raise ArgumentTypeError(f"q is {problem.dtype}; accepted: {', '.join(map(str, dtypes))}")
    check_inputs(op, problem, facts, layout=ready)
    return Request(problem, chunk, fixed, facts["q"].library, on_cpu, ready, CachedPlan(op, problem, device, fixed))


def _three(strides: tuple[int, ...]) -> tuple[int, int, int]:
    """The strides of the first three axes."""
    b, t, h = strides[:3]
    return b, t, h


def _check_shapes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, axes in {"q": "[B, T, HQ, D]", "k": "[B, T, H, D]", "v": "[B, T, H, E]", "log_g": "[B, T, H]"}.items():
        if name in shapes and len(shapes[name]) != axes.count(",") + 1:
            raise ArgumentError(f"{name} has shape {list(shapes[name])}; accepted: {axes}")
    (b, _, hq, d), h = shapes["q"], shapes["k"][2]
    if h == 0 or hq % h:
        raise ArgumentError(f"q has {hq} heads and k has {h}; accepted: a multiple of k's heads")
    for name, size in (("D", d), ("E", shapes["v"][3])):
        if size not in DIMS:
            raise UnsupportedError(
                f"{name}={size} is not served; accepted: {', '.join(map(str, DIMS))}. Pad with zeros, which changes nothing but `scale`'s default"
            )
    for name, shape in shapes.items():
        if int(np.prod(shape, dtype=np.int64)) > MAX_ELEMENTS:
            raise UnsupportedError(
                f"{name} has {int(np.prod(shape, dtype=np.int64))} elements; accepted: at most 2^31. Split the batch or the heads"
            )
    if b * hq > MAX_HEADS:
        raise UnsupportedError(f"q has B x HQ = {b * hq} heads; accepted: at most {MAX_HEADS}. Split the batch")
