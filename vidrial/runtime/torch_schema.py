"""How torch's schemas write an op: its tensors and options from `problem_of`, the names of its results from an example."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import numpy as np

from vidrial.errors import ArgumentError, VidrialError
from vidrial.runtime.arrays import ArraySpec
from vidrial.spec.op import Op

TYPES = {ArraySpec: "Tensor", int: "int", float: "float", bool: "bool", str: "str"}
REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Parameter:
    """One of an op's `problem_of`: a tensor or an option, as torch's schemas write it."""

    name: str
    type: str
    default: Any

    @property
    def tensor(self) -> bool:
        """Whether it is one of the tensors."""
        return self.type.startswith("Tensor")

    @property
    def text(self) -> str:
        """As a schema has it."""
        default = f'"{self.default}"' if isinstance(self.default, str) else repr(self.default)
        return f"{self.type} {self.name}" + ("" if self.default is REQUIRED else f"={default}")


def parameters_of(op: Op) -> list[Parameter]:
    """Tensors first, then options; `target` behind them."""
    if op.problem_of is None:
        raise ArgumentError(
            f"{op.name} does not say which problem its inputs ask, so that torch cannot compile, map or trace it; give Op(problem_of=...)"
        )
    try:
        found = inspect.signature(op.problem_of, eval_str=True).parameters.values()
    except NameError as error:
        raise ArgumentError(f"{op.name}: an annotation of problem_of cannot be read: {error}; import what it names at run time") from error
    read = [Parameter(p.name, _type_of(op, p), _default_of(op, p)) for p in found]
    if any(p.name == "target" for p in read):
        raise ArgumentError(f"{op.name}: target of problem_of is what a call says where it runs with; give the option another name")
    ordered = [p for p in read if p.tensor] + [p for p in read if not p.tensor]
    if any(p.default is REQUIRED for p in ordered if not p.tensor):
        ordered = [Parameter(p.name, p.type, REQUIRED) for p in ordered]
    # A default behind one that is missing cannot be left out.
    firm = max((i for i, p in enumerate(ordered) if p.default is REQUIRED), default=-1)
    ordered = [Parameter(p.name, p.type, REQUIRED if i < firm else p.default) for i, p in enumerate(ordered)]
    return [*ordered, Parameter("target", "str?", None)]


def _type_of(op: Op, p: inspect.Parameter) -> str:
    optional, wanted = "", p.annotation
    if get_origin(wanted) in (Union, UnionType):
        several = [kind for kind in get_args(wanted) if kind is not NoneType]
        if len(several) < len(get_args(wanted)) and len(several) == 1:
            optional, wanted = "?", several[0]
    if wanted not in TYPES or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL, p.POSITIONAL_ONLY):
        shown = "not annotated" if p.annotation is REQUIRED else f"of {getattr(p.annotation, '__name__', p.annotation)}"
        raise ArgumentError(
            f"{op.name}: {p.name} of problem_of is {shown}, which torch's dispatcher does not know; accepted: ArraySpec, int, float, bool, str, "
            "each perhaps | None, named one by one"
        )
    return TYPES[wanted] + optional


def _default_of(op: Op, p: inspect.Parameter) -> Any:
    """As torch's schemas can hold it."""
    value = p.default.item() if isinstance(p.default, np.generic) else p.default
    if isinstance(value, float):
        served = math.isfinite(value)
    elif isinstance(value, str):
        served = value.isprintable() and '"' not in value
    else:
        served = not isinstance(value, int) or abs(value) < 2**63
    if not served:
        raise ArgumentError(
            f"{op.name}: {p.name}={value!r} of problem_of is a default that torch's schemas cannot hold; accepted: finite numbers, integers of "
            "64 bits, printable text without quotes. Make it None, which problem_of then reads so"
        )
    return value


def outputs_of(op: Op) -> list[str]:
    """Names of its outputs, as an example has them, where what an example must be told is how long it is."""
    needed = [p.name for p in inspect.signature(op.example).parameters.values() if p.default is REQUIRED and p.kind is not p.VAR_KEYWORD]
    try:
        return list(op.outputs(op.example(**dict.fromkeys(needed, 64))))
    except (VidrialError, TypeError) as error:
        given = ", ".join(f"{name}=64" for name in needed)
        raise ArgumentError(f"{op.name}: what its outputs are named cannot be told: example({given}) fails: {error}") from error
