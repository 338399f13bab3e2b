"""Power retention inside JAX's transformations: jit, grad, vmap, shard_map over batch and heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from vidrial import ArraySpec
from vidrial.kernels.power_retention import gradient
from vidrial.kernels.power_retention.back.op import op as backward_op
from vidrial.kernels.power_retention.back.problem import Gradient
from vidrial.kernels.power_retention.gradient import Options, Result, saving_op
from vidrial.kernels.power_retention.op import op
from vidrial.kernels.power_retention.request import NAMES, Request, check_options, request_of
from vidrial.traced import Asked, Traceable, traced


def _request(specs: Mapping[str, ArraySpec], options: Mapping[str, Any]) -> Request:
    o, key = Options(**options), tuple(specs[name] for name in NAMES if name in specs)
    return request_of(key, o.degree, o.scale, o.normalize, o.chunk, o.target)


def _asks(specs: Mapping[str, ArraySpec], options: Mapping[str, Any]) -> Asked:
    asked = _request(specs, options)
    return Asked(asked.problem, asked.fixed)


def _asks_gradients(specs: Mapping[str, ArraySpec], options: Mapping[str, Any]) -> Asked:
    asked = _request(specs, options)
    b, t, h = specs["dy"].strides[:3]
    return Asked(Gradient(**vars(asked.problem), dy_stride=(b, t, h)), asked.fixed)


def _inputs(arrays: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(arrays[name] for name in NAMES if name in arrays)


def _run(arrays: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    made = gradient.forward(_inputs(arrays), Options(**options))
    # NOTE: where kernels made no normaliser the backward pass makes its own.
    b, t, hq, _ = made.y.shape
    return {"y": made.y, "norm": np.zeros((b, hq, t), np.float32) if made.norm is None else made.norm}


def _run_backward(arrays: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    o = Options(**options)
    norm = arrays.get("norm") if o.target == "host" else None
    return gradient.backward(_inputs(arrays), Result(arrays["y"], None, norm), arrays["dy"], o)._asdict()


HERE = __name__
BACKWARD = Traceable(backward_op, _asks_gradients, _run_backward, folds=True, reads=(*NAMES, "y", "norm", "dy"))
SAVING = Traceable(saving_op, _asks, _run, folds=True)
PLAIN = Traceable(op, _asks, _run, folds=True, backward=f"{HERE}:BACKWARD", saving=f"{HERE}:SAVING")


def power_retention_traced(inputs: tuple[Any, ...], o: Options) -> Any:
    """y of arrays that JAX traces.

    Raises:
        ArgumentError, ArgumentTypeError, UnsupportedError: naming the argument, while JAX traces. What goes wrong later is XLA's error.
    """
    check_options(o.degree, o.scale, o.normalize, o.chunk)
    scale, chunk = (None if o.scale is None else float(o.scale)), (None if o.chunk is None else int(o.chunk))
    options = asdict(Options(int(o.degree), scale, o.normalize, chunk, o.target))
    return traced(f"{HERE}:PLAIN", dict(zip(NAMES, inputs, strict=False)), **options)["y"]
