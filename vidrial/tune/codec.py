"""Values as JSON and back: dataclasses by field, enums by name."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import math
import types
import typing
from collections.abc import Mapping, Set
from typing import Any

from vidrial.errors import SweepError, VidrialError
from vidrial.spec.fields import KIND

# The kind of a field that older files lack.
ADDED = "added"
# How JSON spells the floats that it has no number for.
NOT_FINITE = ("nan", "inf", "-inf")
# What ends the reading of a value that is damaged, whatever an author's own dataclass makes of it.
UNREADABLE = (VidrialError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


def encode(value: Any) -> Any:
    """A value as JSON: dataclasses by field, enums by name, tuples as lists, NaN and infinities as strings.

    Raises:
        SweepError: a value of any other type.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, tuple | list):
        return [encode(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): encode(v) for k, v in value.items()}
    raise SweepError(
        f"{value!r} ({type(value).__name__}) cannot be kept; accepted in problems and configs: "
        "numbers, bools, strings, enums, dataclasses, tuples of these"
    )


def decode(kind: Any, data: Any, fields: Mapping[str, Any] | None = None) -> Any:
    """The value of type `kind` that `encode` wrote as `data`; `fields` gives the types of fields that are annotated `Any`, or by a type parameter.

    A config may have gained choices and parts since, a problem fields with a default: they take their defaults.

    Raises:
        SweepError: `data` is not such a value.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if data is None else decode(next(a for a in arguments if a is not type(None)), data)
    if origin is tuple and isinstance(data, list):
        each = arguments[:1] * len(data) if arguments[1:] == (...,) else arguments
        if len(each) == len(data):
            return tuple(decode(k, v) for k, v in zip(each, data, strict=True))
    elif origin is typing.Literal and any(type(data) is type(value) and data == value for value in arguments):
        return data
    elif dataclasses.is_dataclass(kind) and isinstance(data, dict):
        hints, optional = _hints(typing.cast(type, kind))
        if data.keys() <= hints.keys() <= data.keys() | optional:
            known = {**hints, **fields} if fields else hints
            return typing.cast(type, kind)(**{name: decode(known[name], value) for name, value in data.items()})
        differing = ", ".join(sorted(set(hints).symmetric_difference(map(str, data))))
        raise SweepError(f"fields of {getattr(kind, '__name__', kind)} that are missing or unknown: {differing}")
    elif isinstance(kind, type) and issubclass(kind, enum.Enum):
        if data in kind.__members__:
            return kind[data]
    elif kind is float and (type(data) in (int, float) or data in NOT_FINITE):
        with contextlib.suppress(OverflowError):
            return float(data)
    elif kind is Any or isinstance(kind, typing.TypeVar) or (kind in (bool, int, str) and type(data) is kind):
        return data
    raise SweepError(f"{data!r} is not of type {getattr(kind, '__name__', kind)}")


@functools.lru_cache(maxsize=256)
def _hints(kind: type) -> tuple[Mapping[str, Any], Set[str]]:
    """The types of a dataclass's fields, and the fields that may be missing: a config's choices and parts, a problem's fields with a default, and
    what was added."""
    every, fields = typing.get_type_hints(kind), dataclasses.fields(kind)
    optional = {field.name for field in fields if field.metadata.get(KIND) in ("choice", "part", ADDED) or _has_default(field)}
    return {field.name: every[field.name] for field in fields}, optional


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.metadata.get(KIND) == "dynamic" and field.default is not dataclasses.MISSING
