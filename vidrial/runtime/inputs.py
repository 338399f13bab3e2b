"""What a call gives, held against what its op declares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vidrial.device import VECTOR_BYTES
from vidrial.errors import ArgumentError, ArgumentTypeError
from vidrial.runtime.arrays import CPU, ArraySpec, contiguous_strides
from vidrial.spec.fields import C, P
from vidrial.spec.op import Buffer, Op


def check_inputs(op: Op[P, C], problem: P, given: Mapping[str, ArraySpec], layout: bool = True) -> ArraySpec:
    """Refuse inputs that are not those of `op.inputs(problem)`; all are of one library and device.

    `layout`: strides and alignment count, too; False where what lies otherwise will be copied.

    Returns:
        The first one's facts: they tell where the call runs, and whose its outputs are.

    Raises:
        ArgumentError: one is missing or not known, or has another shape, strides or alignment. ArgumentTypeError: another dtype, library or
            device.
    """
    declared = op.inputs(problem)
    _check_names(op.name, declared, given)
    first_name, first = next(iter(given.items()))
    for name, spec in given.items():
        if (spec.library, spec.device) != (first.library, first.device):
            raise ArgumentTypeError(
                f"{name} is a {spec.library} array on {_place(spec.device)}, {first_name} a {first.library} array on "
                f"{_place(first.device)}; accepted: one library and one device for all"
            )
        wanted = declared[name]
        if spec.dtype is not wanted.dtype:
            raise ArgumentTypeError(f"{name} is {spec.dtype}; accepted: {wanted.dtype}, as the other inputs of {op.name} ask")
        if tuple(spec.shape) != wanted.shape:
            raise ArgumentError(
                f"{name} has shape {list(spec.shape)}; accepted: {list(wanted.shape)}, as the other inputs of {op.name} ask"
            )
        if layout and (fault := layout_fault(spec, wanted)):
            raise ArgumentError(f"{name} {fault}; vidrial.contiguous makes a contiguous, aligned copy")
    return first


def _check_names(op: str, declared: Mapping[str, Buffer], given: Mapping[str, Any]) -> None:
    required = [name for name, buffer in declared.items() if not buffer.optional]
    missing, unknown = [n for n in required if n not in given], [n for n in given if n not in declared]
    if unknown:
        fault = f"has no input named {', '.join(unknown)}"
    elif missing:
        fault = f"lacks its input {', '.join(missing)}"
    elif not given:
        fault = "got no input"
    else:
        return
    accepted = ", ".join(f"{n} (optional)" if buffer.optional else n for n, buffer in declared.items())
    raise ArgumentError(f"{op} {fault}; given: {', '.join(given) or 'none'}; accepted: {accepted or 'none'}")


def layout_fault(spec: ArraySpec, wanted: Buffer) -> str:
    """How an array of the right shape does not lie as its op declares it, or ""."""
    if 0 in wanted.shape:
        return ""
    strides = contiguous_strides(wanted.shape) if wanted.strides is None else wanted.strides
    if any(n > 1 and had != step for n, had, step in zip(wanted.shape, spec.strides, strides, strict=True)):
        return f"has strides {list(spec.strides)} (in elements); accepted: {list(strides)}"
    if wanted.aligned and not spec.aligned:
        return f"does not begin at a multiple of {VECTOR_BYTES} bytes; accepted: an address that is one"
    return ""


def _place(device: int) -> str:
    return "the CPU" if device == CPU else f"CUDA device {device}"
