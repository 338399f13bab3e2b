"""Flash attention: softmax attention without its matrix of scores, any length, grouped heads, causal, windowed, capped.

from vidrial.kernels.flash_attention import flash_attention
y = flash_attention(q, k, v, causal=True)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Real
from typing import Any, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from vidrial import (
    CPU,
    ArgumentError,
    ArgumentTypeError,
    Array,
    ArraySpec,
    CachedPlan,
    DType,
    Op,
    UnsupportedError,
    apply,
    as_array,
    call_torch_op,
    contiguous,
    current_target,
    dispatched,
    dispatching,
    run,
    signature_of,
    torch_op,
)
from vidrial.kernels.flash_attention.cpu import flash_attention_cpu
from vidrial.kernels.flash_attention.op import op
from vidrial.kernels.flash_attention.problem import DTYPES, UNLIMITED, Problem, refusal, scale_refusal, shape_refusal, softcap_refusal
from vidrial.traced import Asked, Traceable, is_traced, traced

__all__ = ["flash_attention"]

NAMES = ("q", "k", "v")
A = TypeVar("A")  # an array of torch, CuPy, JAX or NumPy
Window = tuple[int | None, int | None]


@overload
def flash_attention(
    q: A,
    k: A,
    v: A,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: Literal[False] = False,
    target: str | None = None,
) -> A: ...


@overload
def flash_attention(
    q: A,
    k: A,
    v: A,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: Literal[True],
    target: str | None = None,
) -> tuple[A, A]: ...


def flash_attention(
    q: A,
    k: A,
    v: A,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    target: str | None = None,
) -> A | tuple[A, A]:
    """Attention: y_i = sum_j w_ij v_j, w_ij = exp(s_ij - lse_i), lse_i = log sum_j exp(s_ij), s_ij = scale q_i . k_j, over the keys j that row i sees.

    Row i stands at key i + Tk - Tq: the last row at the last key. A row that sees no key gives 0 and lse -inf.

    Args:
        q: [B, Tq, HQ, D] bfloat16 or float16, D in 32, 64, 96, 128, 192, 256. torch, CuPy or JAX arrays run on their GPU, on its current
            stream; NumPy arrays and CPU tensors run in NumPy (float32 inside) and may be float32, too.
        k: [B, Tk, H, D], HQ a multiple of H: query head h reads key head h // (HQ / H).
        v: [B, Tk, H, E], E of the same choices as D.
        causal: a row sees no key after its own.
        window: (left, right): a row sees at most `left` keys before its own and `right` after; None on a side is no limit.
        scale: multiplies q . k; 1 / sqrt(D) by default.
        softcap: s becomes softcap tanh(s / softcap); None: it stays.
        return_lse: return (y, lse).
        target: "cuda", or "host" for the GPU kernels themselves on the CPU; see vidrial.use_target.

    Returns:
        y [B, Tq, HQ, E], of q's library, dtype and device; with `return_lse` also lse [B, HQ, Tq], float32, natural logarithm. Rows that are
        not contiguous or not aligned to 16 bytes are copied first.

    Raises:
        ArgumentError, ArgumentTypeError, UnsupportedError: before anything runs, naming the argument.
        CompileError, LaunchError, ToolchainError: the kernel could not be built or launched.
    """
    inputs = (q, k, v)
    if dispatching(q):
        found = _in_torch(inputs, causal, window, scale, softcap, target)
        return (found["y"], found["lse"]) if return_lse else found["y"]
    place = current_target(target)
    try:
        key, pointers = signature_of(inputs, NAMES)
    except UnsupportedError:
        _refuse_gradients(inputs)
        if dispatched(inputs):
            found = _in_torch(inputs, causal, window, scale, softcap, target)
            return (found["y"], found["lse"]) if return_lse else found["y"]
        if not is_traced(inputs):
            raise
        _check_options(causal, window, scale, softcap, return_lse)
        sides = None if window is None else tuple(None if side is None else int(side) for side in window)
        factors = {name: None if x is None else float(x) for name, x in (("scale", scale), ("softcap", softcap))}
        options = {"causal": bool(causal), "window": sides, **factors, "target": place}
        outputs = traced(f"{__name__}:TRACEABLE", dict(zip(NAMES, inputs, strict=True)), **options)
        return (outputs["y"], outputs["lse"]) if return_lse else outputs["y"]
    try:
        asked = _request(key, causal, window, scale, softcap, return_lse, place)
    except TypeError:
        # Something that cannot be looked up: it is refused by its name.
        _check_options(causal, window, scale, softcap, return_lse)
        raise
    if asked.ready:
        outputs = run(asked.planned.plan(), pointers, q, asked.library)
    else:
        outputs = _otherwise(inputs, asked, (causal, window, scale, softcap, return_lse, place))
    return (outputs["y"], outputs["lse"]) if return_lse else outputs["y"]


def _otherwise(inputs: tuple[Any, ...], asked: Request, options: tuple[Any, ...]) -> dict[str, Any]:
    """On the CPU, or from copies that are read 16 bytes at a time."""
    arrays = {name: as_array(x, name) for name, x in zip(NAMES, inputs, strict=True)}
    if asked.on_cpu:
        return _on_cpu(arrays, asked.problem)
    arrays = {name: a if a.facts.vectorised else contiguous(a) for name, a in arrays.items()}
    asked = _request(tuple(a.facts for a in arrays.values()), *options)
    return apply(op, asked.problem, arrays, options[-1])


def _refuse_gradients(inputs: tuple[Any, ...]) -> None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.is_grad_enabled():
        return
    for name, x in zip(NAMES, inputs, strict=True):
        if type(x) is torch.Tensor and x.requires_grad and not torch._C._functorch.is_functorch_wrapped_tensor(x):
            raise UnsupportedError(
                f"{name} requires a gradient, which flash_attention does not compute yet; call it under torch.no_grad(), or pass {name}.detach()"
            )


def _whole(value: Any) -> bool:
    return bool(value >= 0 and value == value // 1)


def _check_options(causal: Any, window: Any, scale: Any, softcap: Any, return_lse: Any) -> None:
    for name, flag in (("causal", causal), ("return_lse", return_lse)):
        if not isinstance(flag, (bool, np.bool_)):
            raise ArgumentError(f"{name}={flag!r} is not served; accepted: True, False")
    if window is not None:
        sides = window if isinstance(window, tuple) and len(window) == 2 else (-1, -1)
        # NOTE: 2.0 is the same window as 2 to the look-up, so that it is one here, too.
        if not all(side is None or (isinstance(side, Real) and _whole(side)) for side in sides):
            raise ArgumentError(
                f"window={window!r} is not served; accepted: None, or a tuple (left, right) of keys, each at least 0 or None for no limit"
            )
    refused = (None if scale is None else scale_refusal(scale)) or (None if softcap is None else softcap_refusal(softcap))
    if refused is not None:
        raise refused


@dataclass(frozen=True, slots=True)
class Request:
    """What a call asks for: its problem, whose arrays, whether NumPy serves it, and whether the GPU does with these arrays as they lie,
    all rows copied 16 bytes at a time."""

    problem: Problem
    library: str
    on_cpu: bool
    ready: bool
    planned: CachedPlan


@lru_cache(maxsize=4096, typed=True)
def _request(
    key: tuple[tuple[Any, ...], ...],
    causal: bool,
    window: Window | None,
    scale: float | None,
    softcap: float | None,
    return_lse: bool,
    target: str,
) -> Request:
    """What arrays that were described ask for; refuses what is not served. This is the one look-up of the warm path."""
    _check_options(causal, window, scale, softcap, return_lse)
    facts = {name: ArraySpec.of(seen, name) for name, seen in zip(NAMES, key, strict=True)}
    device, library = facts["q"].device, facts["q"].library
    on_cpu = device == CPU and target == "cuda"
    left, right = window or (None, None)
    problem = _problem(facts, _served(on_cpu), causal, left, right, scale, softcap)
    _check_places(facts)
    if (refused := refusal(problem, _served(on_cpu))) is not None:
        raise refused
    # Beyond all keys there is no limit.
    left, right = (UNLIMITED if side >= problem.tq + problem.tk else side for side in (problem.left, problem.right))
    problem = replace(problem, left=left, right=right, windowed=max(left, right) >= 0)
    ready = device != CPU and target == "cuda" and all(f.vectorised for f in facts.values())
    return Request(problem, library, on_cpu, ready, CachedPlan(op, problem, device))


def _served(on_cpu: bool) -> tuple[DType, ...]:
    return (*DTYPES, DType.float32) if on_cpu else DTYPES


def _problem_of(
    q: ArraySpec,
    k: ArraySpec,
    v: ArraySpec,
    *,
    causal: bool = False,
    left: int | None = None,
    right: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Problem:
    """The problem of such arrays; sizes may be torch's symbols, of which no more is asked than has to be.

    Raises:
        ArgumentError, ArgumentTypeError, UnsupportedError: naming the argument.
    """
    _check_options(causal, (left, right), scale, softcap, False)
    return _problem({"q": q, "k": k, "v": v}, _served(q.device == CPU), causal, left, right, scale, softcap)


def _problem(
    facts: Mapping[str, ArraySpec],
    dtypes: tuple[DType, ...],
    causal: bool,
    left: int | None,
    right: int | None,
    scale: float | None,
    softcap: float | None,
) -> Problem:
    _check_shapes({name: f.shape for name, f in facts.items()})
    q, k, v = (facts[name] for name in NAMES)
    (b, tq, hq, d), (tk, h, e) = q.shape, v.shape[1:]
    if (refused := shape_refusal(q.dtype, d, e, hq, h, dtypes)) is not None:
        raise refused
    before, after = (UNLIMITED if side is None else int(side) for side in (left, right))
    # A side of 0 keys to the right is the causal mask.
    causal = bool(causal) or after == 0
    after = UNLIMITED if causal else after
    return Problem(
        dtype=q.dtype,
        d=d,
        e=e,
        causal=causal,
        windowed=max(before, after) >= 0,
        capped=softcap is not None,
        group=hq // h,
        b=b,
        tq=tq,
        tk=tk,
        h=h,
        left=before,
        right=after,
        scale=float(int(d) ** -0.5 if scale is None else scale),
        softcap=float(softcap or 0.0),
        q_stride=_three(q.strides),
        k_stride=_three(k.strides),
        v_stride=_three(v.strides),
        y_stride=(tq * hq * e, hq * e, e),
    )


def _run(asked: Op[Any, Any], q: Any, k: Any, v: Any, *given: Any) -> Mapping[str, Any]:
    """The op on tensors that hold values, for torch's dispatcher."""
    causal, left, right, scale, softcap, target = given
    inputs, options = (q, k, v), (causal, (left, right), scale, softcap, True, current_target(target))
    key, pointers = signature_of(inputs, NAMES)
    request = _request(key, *options)
    return run(request.planned.plan(), pointers, q, request.library) if request.ready else _otherwise(inputs, request, options)


_known = torch_op(replace(op, problem_of=_problem_of, batched=True), _run)


def _in_torch(
    inputs: tuple[Any, ...], causal: bool, window: Window | None, scale: float | None, softcap: float | None, target: str | None
) -> dict[str, Any]:
    """By way of torch's dispatcher."""
    left, right = (None, None) if window is None else window
    options = {"causal": causal, "left": left, "right": right, "scale": scale, "softcap": softcap}
    return call_torch_op(_known, dict(zip(NAMES, inputs, strict=True)), target, options)


def _three(strides: tuple[int, ...]) -> tuple[int, int, int]:
    """The strides of the first three axes."""
    b, t, h = strides[:3]
    return b, t, h


def _check_shapes(shapes: dict[str, tuple[int, ...]]) -> None:
    for name, axes in {"q": "[B, Tq, HQ, D]", "k": "[B, Tk, H, D]", "v": "[B, Tk, H, E]"}.items():
        if len(shapes[name]) != 4:
            raise ArgumentError(f"{name} has shape {list(shapes[name])}; accepted: {axes}")
    (b, *_, d), (tk, h) = shapes["q"], shapes["k"][1:3]
    for name, wanted in {"k": (b, tk, h, d), "v": (b, tk, h, shapes["v"][3])}.items():
        if shapes[name] != wanted:
            raise ArgumentError(
                f"{name} has shape {list(shapes[name])}, which does not go with q {list(shapes['q'])} and k {list(shapes['k'])}; accepted: {list(wanted)}"
            )


def _check_places(facts: dict[str, ArraySpec]) -> None:
    _, _, dtype, device, library, _ = facts["q"]
    for name, (_, _, other, place, owner, _) in facts.items():
        if (place, owner) != (device, library):
            raise ArgumentTypeError(
                f"{name} is a {owner} array on {_place(place)}, q a {library} array on {_place(device)}; "
                "accepted: one library and one device for all"
            )
        if other is not dtype:
            raise ArgumentTypeError(f"{name} is {other} and q is {dtype}; accepted: one dtype for q, k and v")


def _place(device: int) -> str:
    return "the CPU" if device == CPU else f"CUDA device {device}"


def _on_cpu(arrays: dict[str, Array[Any]], problem: Problem) -> dict[str, Any]:
    def float32(a: Array[Any]) -> NDArray[np.float32]:
        x: NDArray[np.float32] = a.owner.detach().float().numpy() if a.library == "torch" else a.owner.astype(np.float32)
        return x

    y, lse = flash_attention_cpu(problem, *(float32(arrays[n]) for n in NAMES))
    source = arrays["q"]
    if source.library == "torch":
        torch = sys.modules["torch"]
        return {"y": torch.from_numpy(y).to(source.owner.dtype), "lse": torch.from_numpy(lse)}
    if source.library == "jax":
        import jax.numpy

        return {"y": jax.numpy.asarray(y, dtype=source.owner.dtype), "lse": jax.numpy.asarray(lse)}
    return {"y": y.astype(source.owner.dtype), "lse": lse}


def _asks(specs: Mapping[str, ArraySpec], options: Mapping[str, Any]) -> Asked:
    o = dict(options)
    target = o.pop("target")
    return Asked(_request(tuple(specs[name] for name in NAMES), **o, return_lse=True, target=target).problem)


def _run_traced(arrays: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    y, lse = flash_attention(*(arrays[name] for name in NAMES), **options, return_lse=True)
    return {"y": y, "lse": lse}


TRACEABLE = Traceable(op, _asks, _run_traced, folds=True)
