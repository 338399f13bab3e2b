"""Power retention in torch's dispatcher: `torch.ops.vidrial.power_retention`, with its gradients (docs/torch.md)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vidrial import ArraySpec, Op, UnsupportedError, call_torch_op, current_target, run, signature_of, torch_op
from vidrial.kernels.power_retention import gradient, request
from vidrial.kernels.power_retention.back.op import op as backward_op
from vidrial.kernels.power_retention.back.problem import Gradient
from vidrial.kernels.power_retention.op import op


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
    b, t, h = dy.strides[:3]
    return Gradient(**vars(asked), dy_stride=(b, t, h))


_backward = replace(backward_op, problem_of=_gradient_of, batched=True)
_saving = replace(gradient.saving_op, name="power_retention_saving", problem_of=request.problem_of, batched=True)
_forward = replace(op, problem_of=request.problem_of, backward=_backward, saving=_saving, batched=True)


def _run(asked: Op[Any, Any], q: Any, k: Any, v: Any, *rest: Any) -> Mapping[str, Any]:
    if asked is _backward:
        dy, log_g, y, norm, *options = rest
        inputs = (q, k, v) if log_g is None else (q, k, v, log_g)
        found = gradient.backward(inputs, gradient.Result(y, None, norm), dy, _options(*options))
        return {"dq": found.dq, "dk": found.dk, "dv": found.dv, "dlog_g": found.dlog_g}
    log_g, *options = rest
    inputs = (q, k, v) if log_g is None else (q, k, v, log_g)
    if asked is _saving:
        made = gradient.forward(inputs, _options(*options))
        return {"y": made.y, "norm": made.norm}
    *known, target = options
    key, pointers = signature_of(inputs, request.NAMES)
    wanted = request.request_of(key, *known, current_target(target))
    if wanted.ready:
        return run(wanted.planned.plan(), pointers, q, wanted.library)
    return {"y": gradient.plain(inputs, _options(*options))}


def _options(degree: int, scale: float | None, normalize: str, chunk: int | None, target: str | None) -> gradient.Options:
    return gradient.Options(degree, scale, normalize, chunk, current_target(target))


_known = torch_op(_forward, _run)


def call(inputs: tuple[Any, ...], target: str | None, **options: Any) -> Any:
    """y, by way of torch's dispatcher."""
    return call_torch_op(_known, dict(zip(request.NAMES, (*inputs, None), strict=False)), target, options)["y"]


def refuse_states() -> None:
    """Refuse a state where Dynamo traces; it leaves the graph then, unless it must not."""
    if sys.modules["torch"].compiler.is_dynamo_compiling():
        raise UnsupportedError(
            "power_retention: initial_state and output_final_state are not compiled yet; call it outside of torch.compile"
        )
