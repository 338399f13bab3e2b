"""Power retention in torch's dispatcher, with its gradients (docs/torch.md): `torch.ops.vidrial.power_retention`, and `power_retention_states` for calls
that are given a state or asked for one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vidrial import ArgumentError, ArraySpec, Op, call_torch_op, current_target, run, signature_of, torch_op
from vidrial.kernels.power_retention import gradient, request
from vidrial.kernels.power_retention.back.op import op as backward_op
from vidrial.kernels.power_retention.back.problem import Gradient
from vidrial.kernels.power_retention.op import example, op
from vidrial.kernels.power_retention.problem import Problem
from vidrial.kernels.power_retention.state import PowerState, named


def _behind(asked: Problem, dy: ArraySpec) -> Gradient:
    """The backward op's problem of a forward one."""
    b, t, h = dy.strides[:3]
    return Gradient(**vars(asked), dy_stride=(b, t, h))


def _gradient_of(
    q: ArraySpec,
    k: ArraySpec,
    v: ArraySpec,
    dy: ArraySpec,
    log_g: ArraySpec | None = None,
    y: ArraySpec | None = None,
    norm: ArraySpec | None = None,
    *,
    degree: int = 2,
    scale: float | None = None,
    normalize: str = "sum",
    chunk: int | None = None,
) -> Gradient:
    """The backward op's problem."""
    asked = request.problem_of(q, k, v, log_g, degree=degree, scale=scale, normalize=normalize, chunk=chunk)
    return _behind(asked, dy)


def _states_of(
    q: ArraySpec,
    k: ArraySpec,
    v: ArraySpec,
    log_g: ArraySpec | None = None,
    initial_s: ArraySpec | None = None,
    initial_z: ArraySpec | None = None,
    *,
    degree: int = 2,
    scale: float | None = None,
    normalize: str = "sum",
    chunk: int | None = None,
    final: bool = False,
) -> Problem:
    """The problem of a call with states."""
    asked = request.problem_of(q, k, v, log_g, degree=degree, scale=scale, normalize=normalize, chunk=chunk)
    return request.with_states(asked, {"s": initial_s, "z": initial_z}, final)


def _states_gradient_of(
    q: ArraySpec,
    k: ArraySpec,
    v: ArraySpec,
    dy: ArraySpec,
    log_g: ArraySpec | None = None,
    y: ArraySpec | None = None,
    norm: ArraySpec | None = None,
    *,
    initial_s: ArraySpec | None = None,
    initial_z: ArraySpec | None = None,
    final_s: ArraySpec | None = None,
    final_z: ArraySpec | None = None,
    d_final_s: ArraySpec | None = None,
    d_final_z: ArraySpec | None = None,
    degree: int = 2,
    scale: float | None = None,
    normalize: str = "sum",
    chunk: int | None = None,
    final: bool = False,
) -> Gradient:
    """Its backward op's: the final state has a gradient where it was asked for."""
    asked = _states_of(q, k, v, log_g, initial_s, initial_z, degree=degree, scale=scale, normalize=normalize, chunk=chunk, final=final)
    return _behind(asked, dy)


def _both() -> Problem:
    """A problem with states in and out: what there is to name."""
    return replace(example(t=64), initial=True, final=True)


def _both_gradients() -> Gradient:
    return Gradient(**vars(_both()), dy_stride=(0, 0, 0))


_backward = replace(backward_op, problem_of=_gradient_of, batched=True)
_saving = replace(gradient.saving_op, name="power_retention_saving", problem_of=request.problem_of, batched=True)
_forward = replace(op, problem_of=request.problem_of, backward=_backward, saving=_saving, batched=True)
_states_backward = replace(_backward, name="power_retention_states_backward", problem_of=_states_gradient_of, example=_both_gradients)
_states_saving = replace(_saving, name="power_retention_states_saving", problem_of=_states_of, example=_both)
_states = replace(
    _forward, name="power_retention_states", problem_of=_states_of, backward=_states_backward, saving=_states_saving, example=_both
)


def _inputs(q: Any, k: Any, v: Any, log_g: Any) -> tuple[Any, ...]:
    return (q, k, v) if log_g is None else (q, k, v, log_g)


def _run(asked: Op[Any, Any], q: Any, k: Any, v: Any, *rest: Any) -> Mapping[str, Any]:
    if asked is _backward:
        dy, log_g, y, norm, *options, target = rest
        inputs = _inputs(q, k, v, log_g)
        return gradient.backward(inputs, gradient.Result(y, None, norm), dy, _options(options, target))._asdict()
    log_g, *options, target = rest
    inputs = _inputs(q, k, v, log_g)
    if asked is _saving:
        made = gradient.forward(inputs, _options(options, target))
        return {"y": made.y, "norm": made.norm}
    key, pointers = signature_of(inputs, request.NAMES)
    wanted = request.request_of(key, *options, current_target(target))
    if wanted.ready:
        return run(wanted.planned.plan(), pointers, q, wanted.library)
    return {"y": gradient.plain(inputs, _options(options, target))}


def _run_states(asked: Op[Any, Any], q: Any, k: Any, v: Any, *rest: Any) -> Mapping[str, Any]:
    if asked is _states_backward:
        dy, log_g, y, norm, s, z, final_s, final_z, d_s, d_z, *options, final, target = rest
        inputs = _inputs(q, k, v, log_g)
        made, initial = gradient.Result(y, _state("final", final_s, final_z), norm), _state("initial", s, z)
        found = gradient.backward(inputs, made, dy, _options(options, target), initial, _state("d_final", d_s, d_z))
        return found._asdict() | named("d_initial", found.initial_state)
    log_g, s, z, *options, final, target = rest
    inputs = _inputs(q, k, v, log_g)
    made = gradient.forward(inputs, _options(options, target), _state("initial", s, z), final, saves=asked is _states_saving)
    return {"y": made.y, "norm": made.norm} | named("final", made.state)


def _state(name: str, s: Any, z: Any) -> PowerState[Any] | None:
    if (s is None) != (z is None):
        raise ArgumentError(
            f"{name}_{'s' if s is None else 'z'} is None beside the other of {name}_s and {name}_z; accepted: both, or none"
        )
    return None if s is None else PowerState(s, z)


def _options(known: Sequence[Any], target: str | None) -> gradient.Options:
    degree, scale, normalize, chunk = known
    return gradient.Options(degree, scale, normalize, chunk, current_target(target))


_known, _known_states = torch_op(_forward, _run), torch_op(_states, _run_states)


def call(inputs: tuple[Any, ...], state: Any, output_final_state: Any, target: str | None, **options: Any) -> Any:
    """What `power_retention` returns, by way of torch's dispatcher."""
    tensors = dict(zip(request.NAMES, (*inputs, None), strict=False))
    if state is None and output_final_state is False:
        return call_torch_op(_known, tensors, target, options)["y"]
    gradient.check_kinds(state, output_final_state)
    tensors |= {} if state is None else named("initial", state)
    found = call_torch_op(_known_states, tensors, target, options | {"final": bool(output_final_state)})
    return (found["y"], PowerState(found["final_s"], found["final_z"])) if output_final_state else found["y"]
