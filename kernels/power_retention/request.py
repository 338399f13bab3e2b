"""What a call of power retention asks for, and what is refused before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

import numpy as np

from vidrial import CPU, ArgumentError, ArgumentTypeError, ArraySpec, CachedPlan, DType, UnsupportedError, check_inputs
from vidrial.kernels.power_retention.op import CHUNKS, DEGREES, DIMS, MAX_ELEMENTS, MAX_HEADS, MAX_SCALE, NORMALIZE, op
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
    if scale is not None and not ((type(scale) is float or _is_number(scale)) and abs(scale) <= MAX_SCALE):
        raise ArgumentError(f"scale={scale!r} is not served; accepted: None, or a number of at most {MAX_SCALE:g} in magnitude")


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
    facts = {name: ArraySpec.of(seen, name) for name, seen in zip(NAMES, key, strict=False)}
    problem = problem_of(**facts, degree=degree, scale=scale, normalize=normalize, chunk=chunk)
    _check_sizes({name: f.shape for name, f in facts.items()})
    if chunk is not None and chunk >= problem.t:
        chunk = 0
    device, fixed = facts["q"].device, () if chunk is None else (("chunk", chunk),)
    on_cpu = device == CPU and target == "cuda"
    ready = not on_cpu and target == "cuda" and all(facts[name].vectorised for name in "qkv")
    _check_dtype(problem.dtype, on_cpu)
    check_inputs(op, problem, facts, layout=ready)
    return Request(problem, chunk, fixed, facts["q"].library, on_cpu, ready, CachedPlan(op, problem, device, fixed))


def problem_of(
    q: ArraySpec,
    k: ArraySpec,
    v: ArraySpec,
    log_g: ArraySpec | None = None,
    *,
    degree: int = 2,
    scale: float | None = None,
    normalize: str = "sum",
    chunk: int | None = None,
) -> Problem:
    """The problem of such arrays; sizes may be torch's symbols, of which no more is asked than has to be.

    Raises:
        ArgumentError, ArgumentTypeError, UnsupportedError: naming the argument.
    """
    check_options(degree, scale, normalize, chunk)
    _check_shapes({name: f.shape for name, f in zip(NAMES, (q, k, v, log_g), strict=True) if f is not None})
    _check_dtype(q.dtype, q.device == CPU)
    (b, t, hq, d), h, e = q.shape, k.shape[2], v.shape[3]
    return Problem(
        dtype=q.dtype,
        d=d,
        e=e,
        degree=int(degree),
        gated=log_g is not None,
        normalized=normalize == "sum",
        b=b,
        t=t,
        hq=hq,
        h=h,
        scale=float(int(d) ** -0.5 if scale is None else scale),
        q_stride=_three(q.strides),
        k_stride=_three(k.strides),
        v_stride=_three(v.strides),
        y_stride=(t * hq * e, hq * e, e),
        log_g_stride=(0, 0, 0) if log_g is None else _three(log_g.strides),
    )


def _check_dtype(dtype: DType, on_cpu: bool) -> None:
    accepted = (DType.bfloat16, DType.float16, DType.float32)[: 3 if on_cpu else 2]
    if dtype not in accepted:
        raise ArgumentTypeError(f"q is {dtype}; accepted: {', '.join(map(str, accepted))}")


def _three(strides: tuple[int, ...]) -> tuple[int, int, int]:
    """The strides of the first three axes."""
    b, t, h = strides[:3]
    return b, t, h


def _check_shapes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, axes in {"q": "[B, T, HQ, D]", "k": "[B, T, H, D]", "v": "[B, T, H, E]", "log_g": "[B, T, H]"}.items():
        if name in shapes and len(shapes[name]) != axes.count(",") + 1:
            raise ArgumentError(f"{name} has shape {list(shapes[name])}; accepted: {axes}")
    (_, _, hq, d), h = shapes["q"], shapes["k"][2]
    if h == 0 or hq % h:
        raise ArgumentError(f"q has {hq} heads and k has {h}; accepted: a multiple of k's heads")
    for name, size in (("D", d), ("E", shapes["v"][3])):
        if size not in DIMS:
            raise UnsupportedError(
                f"{name}={size} is not served; accepted: {', '.join(map(str, DIMS))}. Pad with zeros, which changes nothing but `scale`'s default"
            )


def _check_sizes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    (b, _, hq, _) = shapes["q"]
    for name, shape in shapes.items():
        if int(np.prod(shape, dtype=np.int64)) > MAX_ELEMENTS:
            raise UnsupportedError(
                f"{name} has {int(np.prod(shape, dtype=np.int64))} elements; accepted: at most 2^31. Split the batch or the heads"
            )
    if b * hq > MAX_HEADS:
        raise UnsupportedError(f"q has B x HQ = {b * hq} heads; accepted: at most {MAX_HEADS}. Split the batch")
