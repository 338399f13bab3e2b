"""Power retention: linear attention with the state of a symmetric power of the keys, gated, any length.

from vidrial.kernels.power_retention import power_retention
y = power_retention(q, k, v, log_g)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, overload

from vidrial import ArgumentError, UnsupportedError, current_target, dispatched, dispatching, run, signature_of
from vidrial.kernels.power_retention import gradient, in_torch
from vidrial.kernels.power_retention.gradient import Gradients
from vidrial.kernels.power_retention.op import DTYPES
from vidrial.kernels.power_retention.request import NAMES, check_options, request_of
from vidrial.kernels.power_retention.state import PowerState
from vidrial.kernels.power_retention.traced import power_retention_traced
from vidrial.traced import is_traced

__all__ = ["power_retention", "power_retention_vjp", "PowerState", "Gradients", "DTYPES"]

A = TypeVar("A")  # an array of torch, CuPy, JAX or NumPy


@overload
def power_retention(
    q: A,
    k: A,
    v: A,
    log_g: A | None = ...,
    *,
    degree: int = ...,
    scale: float | None = ...,
    normalize: str = ...,
    initial_state: PowerState[A] | None = ...,
    output_final_state: Literal[False] = ...,
    recompute: bool | None = ...,
    chunk: int | None = ...,
    target: str | None = ...,
) -> A: ...


@overload
def power_retention(
    q: A,
    k: A,
    v: A,
    log_g: A | None = ...,
    *,
    degree: int = ...,
    scale: float | None = ...,
    normalize: str = ...,
    initial_state: PowerState[A] | None = ...,
    output_final_state: Literal[True],
    recompute: bool | None = ...,
    chunk: int | None = ...,
    target: str | None = ...,
) -> tuple[A, PowerState[A]]: ...


def power_retention(
    q: A,
    k: A,
    v: A,
    log_g: A | None = None,
    *,
    degree: int = 2,
    scale: float | None = None,
    normalize: str = "sum",
    initial_state: PowerState[A] | None = None,
    output_final_state: bool = False,
    recompute: bool | None = None,
    chunk: int | None = None,
    target: str | None = None,
) -> Any:
    """Gated power retention, causal: y_i = sum_j w_ij v_j / sum_j w_ij, w_ij = (scale q_i . k_j)^degree exp(sum of log_g in (j, i]), j <= i.

    Args:
        q: [B, T, HQ, D] bfloat16 or float16, D in 32, 64, 128. torch, CuPy or JAX arrays run on their GPU, on its current stream;
            NumPy arrays and CPU tensors run in NumPy (float32 inside) and may be float32, too.
        k: [B, T, H, D], HQ a multiple of H: query head h reads key head h // (HQ / H).
        v: [B, T, H, E], E in 32, 64, 128.
        log_g: [B, T, H] float32, at most 0; values below -60 count as -60, values above 0 as 0. None: no decay.
        degree: 2, or 4 (quadratic in T).
        scale: multiplies q . k; 1 / sqrt(D) by default.
        normalize: "sum" divides by the sum of the weights (at least 1e-20), "none" does not.
        initial_state: what lies before the first token; degree 2. Gradients go through it, and through the last one, wherever they go through y:
            under torch.compile and JAX's transformations, too (docs/torch.md, docs/jax.md).
        output_final_state: whether to return the state behind the last token, too; degree 2.
        recompute: of a call that torch records, whether its backward pass scans the states again (True) or the call keeps them (False), which
            fixes the chunk of both. None: kept where there are many chunks and they take no more memory than q, k, v and y
            (docs/power_retention.md). The results differ by rounding only; NumPy, a graph of torch.compile and JAX always compute them again.
        chunk: tokens that share a state (0: none, the attention form). By default what was measured fastest, else what is predicted so;
            results differ by rounding only.
        target: "cuda", or "host" for the GPU kernels themselves on the CPU; see vidrial.use_target.

    Returns:
        y [B, T, HQ, E], of q's library, dtype and device; with output_final_state (y, PowerState), the state float32. Rows that are not
        contiguous or not aligned to 16 bytes are copied first. torch's autograd records the call where a tensor requires a gradient.

    Raises:
        ArgumentError, ArgumentTypeError, UnsupportedError: before anything runs, naming the argument.
        CompileError, LaunchError, ToolchainError: the kernel could not be built or launched.
    """
    inputs = (q, k, v) if log_g is None else (q, k, v, log_g)
    if recompute is not None:
        gradient.check_recompute(recompute)
    if dispatching(q):
        options = {"degree": degree, "scale": scale, "normalize": normalize, "chunk": chunk}
        return in_torch.call(inputs, initial_state, output_final_state, target, **options)
    place = current_target(target)
    if initial_state is not None or output_final_state is not False or (recompute is not None and gradient.records(*inputs)):
        return _with_state(inputs, gradient.Options(degree, scale, normalize, chunk, place, recompute), initial_state, output_final_state)
    try:
        key, pointers = signature_of(inputs, NAMES)
    except UnsupportedError:
        # It refuses what autograd shall record, so that other calls need not ask.
        if gradient.records(*inputs):
            return _with_state(inputs, gradient.Options(degree, scale, normalize, chunk, place, recompute), None, False)
        if dispatched(inputs):
            return in_torch.call(inputs, None, False, target, degree=degree, scale=scale, normalize=normalize, chunk=chunk)
        if not is_traced(inputs):
            raise
        return power_retention_traced(inputs, gradient.Options(degree, scale, normalize, chunk, place))
    try:
        asked = request_of(key, degree, scale, normalize, chunk, place)
    except TypeError:
        # Something that cannot be looked up: it is refused by its name.
        check_options(degree, scale, normalize, chunk)
        raise
    if asked.ready:
        return run(asked.planned.plan(), pointers, q, asked.library)["y"]
    return gradient.plain(inputs, gradient.Options(degree, scale, normalize, chunk, place))


def _with_state(inputs: tuple[Any, ...], o: gradient.Options, state: PowerState[Any] | None, output_final_state: bool) -> Any:
    check_options(o.degree, o.scale, o.normalize, o.chunk)
    gradient.check_states(o, state, output_final_state)
    arrays = inputs if state is None else (*inputs, state.S, state.Z)
    if is_traced(arrays):
        return power_retention_traced(inputs, o, state, bool(output_final_state))
    try:
        if gradient.records(*arrays):
            y, final = gradient.recorded(inputs, o, state, output_final_state)
        else:
            y, final, _ = gradient.forward(inputs, o, state, output_final_state, saves=False)[:3]
    except UnsupportedError:
        if not dispatched(arrays):
            raise
        options = {"degree": o.degree, "scale": o.scale, "normalize": o.normalize, "chunk": o.chunk}
        return in_torch.call(inputs, state, output_final_state, o.target, **options)
    return (y, final) if output_final_state else y


def power_retention_vjp(
    q: A,
    k: A,
    v: A,
    log_g: A | None = None,
    *,
    degree: int = 2,
    scale: float | None = None,
    normalize: str = "sum",
    initial_state: PowerState[A] | None = None,
    output_final_state: bool = False,
    recompute: bool | None = None,
    chunk: int | None = None,
    target: str | None = None,
) -> tuple[Any, Callable[..., Gradients[A]]]:
    """`power_retention`, and the function that turns gradients of what it returns into gradients of its arguments.

    y, vjp = power_retention_vjp(q, k, v, log_g)
    dq, dk, dv, dlog_g, _ = vjp(dy)

    Args:
        Those of `power_retention`, of NumPy, CuPy, JAX (not traced), or torch without autograd (tensors that do not require a gradient).

    Returns:
        What `power_retention` returns, and vjp(dy, d_state=None) -> Gradients: `dy` of y's shape, dtype, library and device, any strides;
        `d_state`, a PowerState, of the final state if that was asked for. Gradients have the shapes, dtypes and library of the arguments.
        A row whose normaliser is at its floor has the gradient 0, and so has a log gate outside of (-60, 0]. It reads the arguments again:
        do not write to them before.

    Raises:
        Those of `power_retention`; vjp: ArgumentError, ArgumentTypeError, naming dy or d_state.
    """
    check_options(degree, scale, normalize, chunk)
    o, inputs = (
        gradient.Options(degree, scale, normalize, chunk, current_target(target), recompute),
        (q, k, v) if log_g is None else (q, k, v, log_g),
    )
    made = gradient.forward(inputs, o, initial_state, output_final_state)

    def vjp(dy: A, d_state: PowerState[A] | None = None) -> Gradients[A]:
        if d_state is not None and made.state is None:
            raise ArgumentError("d_state: the final state was not asked for; give power_retention_vjp output_final_state=True")
        return gradient.backward(inputs, made, dy, o, initial_state, d_state)

    return ((made.y, made.state) if output_final_state else made.y), vjp
