"""What a call of power retention asks for, and what is refused before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Integral
from typing import Any

from vidrial import CPU, ArgumentError, ArraySpec, CachedPlan, DType, UnsupportedError, check_inputs
from vidrial.kernels.power_retention.op import CHUNKS, DTYPES, degree_refusal, normalize_refusal, op, refusal, scale_refusal, shape_refusal
from vidrial.kernels.power_retention.problem import Problem

NAMES = ("q", "k", "v", "log_g")


def check_options(degree: Any, scale: Any, normalize: Any, chunk: Any) -> None:
    refused = degree_refusal(degree, normalize) or normalize_refusal(normalize)
    if refused is not None:
        raise refused
    if chunk is not None and (not (type(chunk) is int or isinstance(chunk, Integral)) or isinstance(chunk, bool) or chunk not in CHUNKS):
        raise ArgumentError(f"chunk={chunk!r} is not served; accepted: None, {', '.join(map(str, sorted(CHUNKS)))} (0: no chunks)")
    if chunk and degree != 2:
        raise UnsupportedError(f"chunk={chunk} with degree={degree}: only degree 2 has a state small enough; use chunk=None or 0")
    if scale is not None and (refused := scale_refusal(scale, int(degree))) is not None:
        raise refused


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
    on_cpu = facts["q"].device == CPU and target == "cuda"
    check_options(degree, scale, normalize, chunk)
    problem = _problem(facts, served(on_cpu), degree, scale, normalize)
    if chunk is not None and chunk >= problem.t:
        chunk = 0
    device, fixed = facts["q"].device, () if chunk is None else (("chunk", chunk),)
    ready = not on_cpu and target == "cuda" and all(facts[name].vectorised for name in "qkv")
    if (refused := refusal(problem, served(on_cpu))) is not None:
        raise refused
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
    facts = {name: f for name, f in zip(NAMES, (q, k, v, log_g), strict=True) if f is not None}
    return _problem(facts, served(q.device == CPU), degree, scale, normalize)


def check_degree(degree: int, initial: bool, final: bool) -> None:
    """Refuse states of weights that have none.

    Raises:
        UnsupportedError: the degree is not 2.
    """
    for name, asked in (("initial_state", initial), ("output_final_state", final)):
        if asked and degree != 2:
            raise UnsupportedError(f"{name} with degree={degree}: only degree 2 has a state small enough")


def check_state_shape(name: str, shape: tuple[int, ...], accepted: tuple[int, ...]) -> None:
    """Refuse another shape of a state's S or Z than the call's arrays ask.

    Raises:
        ArgumentError: it is another one.
    """
    if tuple(shape) != accepted:
        raise ArgumentError(f"{name} has shape {list(shape)}; accepted: {list(accepted)}, for q, k and v as they are")


def with_states(p: Problem, initial: Mapping[str, ArraySpec | None], final: bool) -> Problem:
    """The problem with states: of the first one S and Z by `state_shapes`' names, None where there is none, and whether the last one is asked for.

    Raises:
        ArgumentError, UnsupportedError: there is no such state.
    """
    given = {name: spec for name, spec in initial.items() if spec is not None}
    check_degree(p.degree, bool(given), final)
    for name, spec in given.items():
        check_state_shape(f"initial_state.{name.upper()}", spec.shape, p.state_shapes[name])
    return replace(p, initial=bool(given), final=final)


def _problem(facts: Mapping[str, ArraySpec], dtypes: tuple[DType, ...], degree: int, scale: float | None, normalize: str) -> Problem:
    _check_shapes({name: f.shape for name, f in facts.items()})
    q, k, v, log_g = facts["q"], facts["k"], facts["v"], facts.get("log_g")
    (b, t, hq, d), h, e = q.shape, k.shape[2], v.shape[3]
    if (refused := shape_refusal(q.dtype, d, e, hq, h, dtypes)) is not None:
        raise refused
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


def served(on_cpu: bool) -> tuple[DType, ...]:
    """Element types of q, k and v."""
    return (*DTYPES, DType.float32) if on_cpu else DTYPES


def _three(strides: tuple[int, ...]) -> tuple[int, int, int]:
    """The strides of the first three axes."""
    b, t, h = strides[:3]
    return b, t, h


def _check_shapes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, axes in {"q": "[B, T, HQ, D]", "k": "[B, T, H, D]", "v": "[B, T, H, E]", "log_g": "[B, T, H]"}.items():
        if name in shapes and len(shapes[name]) != axes.count(",") + 1:
            raise ArgumentError(f"{name} has shape {list(shapes[name])}; accepted: {axes}")
