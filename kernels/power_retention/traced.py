"""Power retention inside JAX's transformations: jit, grad, vmap, shard_map over batch and heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from vidrial import ArraySpec, check_inputs
from vidrial.kernels.power_retention import gradient
from vidrial.kernels.power_retention.back.op import op as backward_op
from vidrial.kernels.power_retention.back.problem import Gradient
from vidrial.kernels.power_retention.gradient import Options, Result, saving_op
from vidrial.kernels.power_retention.op import op
from vidrial.kernels.power_retention.request import NAMES, check_options, request_of, with_states
from vidrial.kernels.power_retention.state import PowerState, named
from vidrial.traced import Asked, Traceable, traced


def _read(options: Mapping[str, Any]) -> tuple[Options, bool]:
    """What a program carries: the call's options, and whether the final state is asked for, which earlier versions did not say."""
    return Options(**{name: value for name, value in options.items() if name != "final"}), options.get("final", False)


def _asks(specs: Mapping[str, ArraySpec], options: Mapping[str, Any]) -> Asked:
    o, final = _read(options)
    key = tuple(specs[name] for name in NAMES if name in specs)
    asked = request_of(key, o.degree, o.scale, o.normalize, o.chunk, o.target)
    problem = with_states(asked.problem, {name: specs.get(f"initial_{name}") for name in "sz"}, final)
    declared = op.inputs(problem)
    check_inputs(op, problem, {name: spec for name, spec in specs.items() if name in declared}, layout=False)
    return Asked(problem, asked.fixed)


def _asks_gradients(specs: Mapping[str, ArraySpec], options: Mapping[str, Any]) -> Asked:
    asked = _asks(specs, options)
    b, t, h = specs["dy"].strides[:3]
    return Asked(Gradient(**vars(asked.problem), dy_stride=(b, t, h)), asked.fixed)


def _inputs(arrays: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(arrays[name] for name in NAMES if name in arrays)


def _state(name: str, arrays: Mapping[str, Any]) -> PowerState[Any] | None:
    return PowerState(arrays[f"{name}_s"], arrays[f"{name}_z"]) if f"{name}_s" in arrays else None


def _run(arrays: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    o, final = _read(options)
    made = gradient.forward(_inputs(arrays), o, _state("initial", arrays), final)
    # NOTE: where kernels made no normaliser the backward pass makes its own.
    b, t, hq, _ = made.y.shape
    return {"y": made.y, "norm": np.zeros((b, hq, t), np.float32) if made.norm is None else made.norm} | named("final", made.state)


def _run_backward(arrays: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    o, _ = _read(options)
    norm = arrays.get("norm") if o.target == "host" else None
    made = Result(arrays.get("y"), _state("final", arrays), norm)
    found = gradient.backward(_inputs(arrays), made, arrays["dy"], o, _state("initial", arrays), _state("d_final", arrays))
    return found._asdict() | named("d_initial", found.initial_state)


HERE = __name__
STATES = tuple(f"{name}_{field}" for name in ("initial", "final", "d_final") for field in "sz")
BACKWARD = Traceable(backward_op, _asks_gradients, _run_backward, folds=True, reads=(*NAMES, *STATES, "y", "norm", "dy"))
SAVING = Traceable(saving_op, _asks, _run, folds=True)
PLAIN = Traceable(op, _asks, _run, folds=True, backward=f"{HERE}:BACKWARD", saving=f"{HERE}:SAVING")


def power_retention_traced(
    inputs: tuple[Any, ...], o: Options, state: PowerState[Any] | None = None, output_final_state: bool = False
) -> Any:
    """y of arrays that JAX traces, or (y, the final state).

    Raises:
        ArgumentError, ArgumentTypeError, UnsupportedError: naming the argument, while JAX traces. What goes wrong later is XLA's error.
    """
    check_options(o.degree, o.scale, o.normalize, o.chunk)
    scale, chunk = (None if o.scale is None else float(o.scale)), (None if o.chunk is None else int(o.chunk))
    options = asdict(Options(int(o.degree), scale, o.normalize, chunk, o.target))
    arrays = dict(zip(NAMES, inputs, strict=False)) | named("initial", state)
    found = traced(f"{HERE}:PLAIN", arrays, **options, final=output_final_state)
    return (found["y"], PowerState(found["final_s"], found["final_z"])) if output_final_state else found["y"]
