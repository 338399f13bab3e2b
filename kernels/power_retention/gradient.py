"""What a call computes, forward and backward, on arrays of any library; and its autograd function in torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from vidrial import (
    CPU,
    ArgumentError,
    ArgumentTypeError,
    Array,
    Buffer,
    Device,
    DType,
    UnsupportedError,
    apply,
    as_array,
    contiguous,
    signature_of,
)
from vidrial.kernels.power_retention.back.op import op as backward_op
from vidrial.kernels.power_retention.back.problem import Gradient
from vidrial.kernels.power_retention.cpu import power_retention_cpu, power_retention_cpu_gradients
from vidrial.kernels.power_retention.op import kept_chunk, op, outputs
from vidrial.kernels.power_retention.problem import Problem
from vidrial.kernels.power_retention.request import NAMES, Request, check_degree, check_state_shape, request_of
from vidrial.kernels.power_retention.state import PowerState

A = TypeVar("A")  # an array of torch, CuPy, JAX or NumPy


def _saved(p: Problem) -> dict[str, Buffer]:
    normaliser = {"norm": Buffer((p.b, p.hq, p.t), DType.float32)} if p.normalized else {}
    return outputs(p) | normaliser


# The same op, which also gives what the backward pass needs.
saving_op = replace(op, outputs=_saved)


@dataclass(frozen=True)
class Options:
    """Of a call; `target` is what `current_target` made of it."""

    degree: int
    scale: float | None
    normalize: str
    chunk: int | None
    target: str
    recompute: bool | None = True

    def request(self, inputs: tuple[Any, ...]) -> Request:
        """What arrays ask for with these options."""
        return request_of(signature_of(inputs, NAMES)[0], self.degree, self.scale, self.normalize, self.chunk, self.target)


class Gradients(NamedTuple, Generic[A]):
    """Of q, k, v, log_g and the initial state, in their shapes, dtypes and library; None of what was not given."""

    dq: A
    dk: A
    dv: A
    dlog_g: A | None
    initial_state: PowerState[A] | None


class Result(NamedTuple):
    """y, the final state if it was asked for, normalised, the normaliser [B, HQ, T] float32, and the states before the chunks if they were kept."""

    y: Any
    state: PowerState[Any] | None
    norm: Any
    snapshots: Any = None


def forward(
    inputs: tuple[Any, ...], o: Options, state: PowerState[Any] | None = None, output_final_state: bool = False, saves: bool = True
) -> Result:
    """y, and if it `saves` what its gradient needs; `inputs`: q, k, v and log_g, if there is one.

    Raises:
        ArgumentError, ArgumentTypeError, UnsupportedError: naming the argument.
    """
    asked = o.request(inputs)
    check_states(o, state, output_final_state)
    if state is not None:
        _check_state("initial_state", state, asked.problem, inputs[0])
    if asked.on_cpu:
        q, k, v, log_g = _on_cpu(inputs)
        given = None if state is None else PowerState(_float32(state.S), _float32(state.Z))
        p, chunk = asked.problem, asked.chunk
        made, final, norm = power_retention_cpu(
            q,
            k,
            v,
            log_g,
            degree=p.degree,
            scale=p.scale,
            normalize=o.normalize,
            chunk=chunk,
            initial_state=given,
            output_final_state=output_final_state,
        )
        final = None if final is None else PowerState(_like(final.S, inputs[0], False), _like(final.Z, inputs[0], False))
        return Result(_like(made, inputs[0]), final, _like(norm, inputs[0], False) if p.normalized else None)
    arrays, asked = _vectorised(inputs, o)
    problem = replace(asked.problem, initial=state is not None, final=bool(output_final_state))
    arrays |= {} if state is None else _of_state("initial", state)
    kept = kept_chunk(problem, asked.chunk, o.recompute, _memory(arrays["q"].device)) if saves else 0
    problem, fixed = (replace(problem, kept=kept), {"chunk": kept}) if kept else (problem, dict(asked.fixed))
    found = apply(saving_op if saves else op, problem, arrays, o.target, **fixed)
    final = PowerState(found["final_s"], found["final_z"]) if output_final_state else None
    return Result(found["y"], final, found.get("norm"), found.get("snapshots"))


def plain(inputs: tuple[Any, ...], o: Options) -> Any:
    """y alone."""
    if o.request(inputs).on_cpu:
        return forward(inputs, o).y
    arrays, asked = _vectorised(inputs, o)
    return apply(op, asked.problem, arrays, o.target, **dict(asked.fixed))["y"]


def backward(
    inputs: tuple[Any, ...],
    made: Result,
    dy: Any,
    o: Options,
    state: PowerState[Any] | None = None,
    d_final: PowerState[Any] | None = None,
) -> Gradients[Any]:
    """Gradients of the sum of y * dy, and of the final state times `d_final`, for what `forward` was given and made.

    Raises:
        ArgumentError, ArgumentTypeError: dy is not of y's shape, dtype, library or device; d_final not of the state's.
    """
    asked = o.request(inputs)
    _check_dy(dy, dy if made.y is None else made.y)
    if d_final is not None:
        _check_state("d_state", d_final, asked.problem, inputs[0])
    if asked.on_cpu:
        q, k, v, log_g = _on_cpu(inputs)
        p, chunk = asked.problem, asked.chunk
        found = power_retention_cpu_gradients(
            q,
            k,
            v,
            log_g,
            _float32(dy),
            degree=p.degree,
            scale=p.scale,
            normalize=o.normalize,
            chunk=chunk,
            initial_state=None if state is None else PowerState(_float32(state.S), _float32(state.Z)),
            d_final=None if d_final is None else PowerState(_float32(d_final.S), _float32(d_final.Z)),
        )
        back = [_like(x, owner) for x, owner in zip((found.dq, found.dk, found.dv), inputs, strict=False)]
        dlog_g, d_state = found.dlog_g, found.initial_state
        initial = None if d_state is None else PowerState(_like(d_state.S, inputs[0], False), _like(d_state.Z, inputs[0], False))
        return Gradients(back[0], back[1], back[2], None if dlog_g is None else _like(dlog_g, inputs[3]), initial)
    arrays, asked = _vectorised(inputs, o)
    gradient = as_array(dy, "dy")
    arrays["dy"] = gradient if gradient.facts.vectorised else contiguous(gradient)
    if made.norm is not None:
        arrays |= {"y": as_array(made.y, "y"), "norm": as_array(made.norm, "norm")}
    b, t, h = arrays["dy"].strides[:3]
    fixed = dict(asked.fixed)
    facts = vars(asked.problem) | {"initial": state is not None, "final": d_final is not None}
    arrays |= {} if state is None else _of_state("initial", state)
    if d_final is not None:
        arrays |= _of_state("d_final", d_final) | (_of_state("final", made.state) if "log_g" in arrays else {})
    if made.snapshots is not None:
        arrays["snapshots"] = as_array(made.snapshots, "snapshots")
        p = replace(asked.problem, initial=state is not None, final=made.state is not None)
        fixed["chunk"] = facts["kept"] = kept_chunk(p, asked.chunk, o.recompute, _memory(arrays["q"].device))
    problem = Gradient(**facts, dy_stride=(b, t, h))
    results = apply(backward_op, problem, arrays, o.target, **fixed)
    initial = PowerState(results["d_initial_s"], results["d_initial_z"]) if state is not None else None
    return Gradients(results["dq"], results["dk"], results["dv"], results.get("dlog_g"), initial)


def _of_state(name: str, state: Any) -> dict[str, Array[Any]]:
    """A state's tensors as the op's arrays."""
    return {f"{name}_{field.lower()}": contiguous(as_array(getattr(state, field), f"{name}.{field}")) for field in ("S", "Z")}


def _memory(device: int) -> int:
    """Bytes of all of a GPU's memory; 0, which is not known, where the kernels run on the CPU."""
    return 0 if device == CPU else Device.current(device).memory_bytes


def _vectorised(inputs: tuple[Any, ...], o: Options) -> tuple[dict[str, Array[Any]], Request]:
    """The inputs, rows that cannot be copied 16 bytes at a time copied before, and what they ask for then."""
    arrays = {name: as_array(x, name) for name, x in zip(NAMES, inputs, strict=False)}
    arrays = {name: a if name == "log_g" or a.facts.vectorised else contiguous(a) for name, a in arrays.items()}
    return arrays, o.request(tuple(arrays.values()))


def _float32(x: Any) -> NDArray[np.float32]:
    """A CPU array of any library in NumPy."""
    # NOTE: while another thread imports torch it has no tensors yet.
    tensor: Any = getattr(sys.modules.get("torch"), "Tensor", ())
    if isinstance(x, tensor):
        found: NDArray[np.float32] = x.detach().float().numpy()
        return found
    return np.asarray(x).astype(np.float32)


def _on_cpu(inputs: tuple[Any, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32] | None]:
    q, k, v, *log_g = (_float32(x) for x in inputs)
    return q, k, v, log_g[0] if log_g else None


def _like(x: NDArray[np.float32], owner: Any, rounded: bool = True) -> Any:
    """x as an array of the owner's library, and of its dtype if it shall be rounded."""
    array = as_array(owner, "q")
    if array.library == "torch":
        tensor = sys.modules["torch"].from_numpy(np.ascontiguousarray(x))
        return tensor.to(owner.dtype) if rounded else tensor
    if array.library == "jax":
        import jax.numpy

        return jax.numpy.asarray(x, dtype=owner.dtype if rounded else None)
    # NOTE: results are in this machine's byte order, whatever the arguments are in.
    return x.astype(owner.dtype.newbyteorder("=") if rounded else x.dtype, order="C")


def _check_dy(dy: Any, y: Any) -> None:
    got, made = as_array(dy, "dy"), as_array(y, "y")
    if got.library != made.library or got.device != made.device or got.dtype != made.dtype:
        raise ArgumentTypeError(
            f"dy is {got.dtype} of {got.library} on {_place(got.device)}; accepted: what y is, {made.dtype} of {made.library} on {_place(made.device)}"
        )
    if tuple(got.shape) != tuple(made.shape):
        raise ArgumentError(f"dy has shape {list(got.shape)}; accepted: that of y, {list(made.shape)}")


def check_states(o: Options, state: Any, output_final_state: Any) -> None:
    """Whether a call may be given such a state, and asked for one.

    Raises:
        ArgumentError, ArgumentTypeError, UnsupportedError: it may not.
    """
    check_kinds(state, output_final_state)
    check_recompute(o.recompute)
    check_degree(o.degree, state is not None, output_final_state)


def check_kinds(state: Any, output_final_state: Any) -> None:
    """Refuse what is no state, and what is no answer to whether there shall be one.

    Raises:
        ArgumentError, ArgumentTypeError: it is not.
    """
    if not isinstance(output_final_state, bool | np.bool_):
        raise ArgumentError(f"output_final_state={output_final_state!r} is not served; accepted: True, False")
    if state is not None:
        _check_kind("initial_state", state)


def check_recompute(value: Any) -> None:
    """Refuse what is neither None nor a bool.

    Raises:
        ArgumentError: it is not.
    """
    if value is not None and not isinstance(value, bool | np.bool_):
        raise ArgumentError(f"recompute={value!r} is not served; accepted: None, True, False")


def _check_kind(name: str, state: Any) -> None:
    if not isinstance(state, PowerState):
        raise ArgumentTypeError(f"{name} is a {type(state).__name__}; accepted: a PowerState")
    # As a tree of arrays it may come from a map that gave none: to the op in a graph that is no state.
    for field in ("S", "Z"):
        if getattr(state, field) is None:
            raise ArgumentTypeError(f"{name}.{field} is None; accepted: an array")


def _place(device: int) -> str:
    return "the CPU" if device == CPU else f"CUDA device {device}"


def _check_state(name: str, state: Any, p: Problem, q: Any) -> None:
    """Whether a state belongs to such a call.

    Raises:
        ArgumentError, ArgumentTypeError, UnsupportedError: it does not.
    """
    _check_kind(name, state)
    like = as_array(q, "q")
    for field in ("S", "Z"):
        found = as_array(getattr(state, field), f"{name}.{field}")
        check_state_shape(f"{name}.{field}", found.shape, p.state_shapes[field.lower()])
        if found.dtype is not DType.float32 or found.library != like.library or found.device != like.device:
            raise ArgumentTypeError(
                f"{name}.{field} is {found.dtype} of {found.library} on {_place(found.device)}; accepted: float32 of {like.library} on {_place(like.device)}"
            )


def records(*arrays: Any) -> bool:
    """Whether torch's autograd shall record a call with these arrays. What functorch wraps is refused elsewhere, by name."""
    torch = sys.modules.get("torch")
    # NOTE: arrays first: where none is a tensor, another thread may just be importing torch.
    if torch is None or not any(getattr(x, "requires_grad", False) for x in arrays) or not torch.is_grad_enabled():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return not any(isinstance(x, torch.Tensor) and wrapped(x) for x in arrays)


def recorded(
    inputs: tuple[Any, ...], o: Options, state: PowerState[Any] | None, output_final_state: bool
) -> tuple[Any, PowerState[Any] | None]:
    """`forward` for torch tensors of which some require a gradient: y, and the final state, with their place in the graph."""
    q, k, v, *log_g = inputs
    s, z = (None, None) if state is None else (state.S, state.Z)
    found = _function().apply(o, output_final_state, q, k, v, log_g[0] if log_g else None, s, z)
    return (found[0], PowerState(found[1], found[2])) if output_final_state else (found, None)


@cache
def _function() -> Any:
    """The autograd function; made when it is first needed, since importing this loads no torch."""
    import torch

    class PowerRetention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, o: Options, output_final_state: bool, *tensors: Any) -> Any:
            q, k, v, log_g, s, z = tensors
            inputs = (q, k, v) if log_g is None else (q, k, v, log_g)
            made = forward(inputs, o, None if s is None else PowerState(s, z), output_final_state)
            ctx.options = o, output_final_state
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*tensors, made.y, made.norm, made.snapshots, *((made.state.S, made.state.Z) if made.state else ()))
            return made.y if made.state is None else (made.y, made.state.S, made.state.Z)

        @staticmethod
        def backward(ctx: Any, dy: Any, *d_state: Any) -> Any:
            if torch.is_grad_enabled():
                raise UnsupportedError(
                    "power_retention: a gradient of its gradient is not computed; call backward or grad without create_graph=True"
                )
            o, output_final_state = ctx.options
            q, k, v, log_g, s, z, y, norm, snapshots, *final = ctx.saved_tensors
            inputs = (q, k, v) if log_g is None else (q, k, v, log_g)
            d_final = None
            if any(x is not None for x in d_state):
                d_s, d_z = (torch.zeros_like(x) if d is None else d.resolve_neg().contiguous() for x, d in zip(final, d_state, strict=True))
                d_final = PowerState(d_s, d_z)
            state = None if s is None else PowerState(s, z)
            made = Result(y, PowerState(*final) if output_final_state else None, norm, snapshots)
            found = backward(inputs, made, torch.zeros_like(y) if dy is None else dy.resolve_neg(), o, state, d_final)
            initial = (None, None) if found.initial_state is None else (found.initial_state.S, found.initial_state.Z)
            gradients = (*found[:4], *initial)
            return (None, None, *(x if wanted else None for x, wanted in zip(gradients, ctx.needs_input_grad[2:], strict=True)))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise UnsupportedError(
                "power_retention: forward-mode gradients are not computed; pass torch.autograd.forward_ad.unpack_dual(x).primal, or use reverse mode"
            )

    return PowerRetention
