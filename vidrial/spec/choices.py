"""The one walk over the choices of a config, parts included: `axes` has the names and values, `flatten` and `unflatten` go to and fro."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from operator import attrgetter
from types import MappingProxyType
from typing import Any, cast, overload

from vidrial.errors import ConfigError, DescriptionError
from vidrial.spec.fields import CHOICES, KIND

Axes = Mapping[str, tuple[Any, ...]]


@functools.cache
def parts(config_type: type) -> Mapping[str, type]:
    """Name -> type of each part of a config."""
    return MappingProxyType({f.name: f.metadata[CHOICES] for f in dataclasses.fields(config_type) if f.metadata.get(KIND) == "part"})


def axes(config_type: type) -> Axes:
    """Name -> values of every choice of a config, in order of declaration; those of its parts by dotted name, `scan.tokens`."""
    # mypy: a type is hashable.
    return _axes(cast(Hashable, config_type))


@functools.cache
def _axes(config_type: type) -> Axes:
    found: dict[str, tuple[Any, ...]] = {}
    for field in dataclasses.fields(config_type):
        if field.metadata.get(KIND) == "part":
            found |= {f"{field.name}.{name}": values for name, values in axes(field.metadata[CHOICES]).items()}
        elif CHOICES in field.metadata:
            found[field.name] = field.metadata[CHOICES]
    return MappingProxyType(found)


def own_axes(config_type: type) -> Axes:
    """The choices of a config that are not those of a part."""
    return {name: values for name, values in axes(config_type).items() if "." not in name}


def axes_of(config: Any) -> Axes:
    """The `axes` of a config's type."""
    kind: type = type(config)
    return axes(kind)


def flatten(config: Any) -> dict[str, Any]:
    """Name -> value of every choice that a config made, named as by `axes`."""
    return {name: attrgetter(name)(config) for name in axes_of(config)}


def unflatten(config_type: type, values: Mapping[str, Any]) -> Any:
    """The config that makes the choices `values`, named as by `axes`; one that is left out is made by default."""
    if not parts(config_type):
        return config_type(**values)
    own, inner = dict[str, Any](), dict[str, dict[str, Any]]()
    for name, value in values.items():
        first, dot, rest = name.partition(".")
        if dot:
            inner.setdefault(first, {})[rest] = value
        else:
            own[first] = value
    return config_type(**own, **{name: unflatten(parts(config_type)[name], given) for name, given in inner.items()})


def combinations(config_type: type, choices: Axes) -> Iterator[Any]:
    """The config of every combination of some choices, the first values first; the other choices are made by default."""
    return (unflatten(config_type, dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values()))


def count(config_type: type) -> int:
    """How many configs of a type there are, legal or not."""
    return math.prod(map(len, axes(config_type).values()))


class Configs(Sequence[Any]):
    """Every config of a type, the default first: each is made when it is asked for, and kept."""

    def __init__(self, config_type: type) -> None:
        self._type, self._axes, self._kept = config_type, axes(config_type), dict[int, Any]()

    def __len__(self) -> int:
        return count(self._type)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index not in self._kept:
            if not 0 <= index < len(self):
                raise IndexError(index)
            rest, values = index, dict[str, Any]()
            for name, choices in reversed(tuple(self._axes.items())):
                rest, i = divmod(rest, len(choices))
                values[name] = choices[i]
            self._kept[index] = unflatten(self._type, values)
        return self._kept[index]


@functools.cache
def configs(config_type: type) -> Configs:
    """Every config of a type: an op asks for those of a part once per combination of its own choices."""
    return Configs(config_type)


def neighbours(config: Any) -> Iterator[Any]:
    """The configs that differ in one choice, legal or not."""
    made = flatten(config)
    for name, values in axes_of(config).items():
        yield from (unflatten(type(config), made | {name: value}) for value in values if value != made[name])


def config_order(config: Any) -> tuple[int, ...]:
    """Position of a config in the order of declaration: the index of each of its choices."""
    known = axes_of(config)
    return tuple(known[name].index(value) if value in known[name] else len(known[name]) for name, value in flatten(config).items())


def check_choices(config: Any) -> None:
    """Refuse a config whose value is not among its field's choices.

    Raises:
        ConfigError: naming the field, what came and what is accepted.
    """
    for name, value in flatten(config).items():
        accepted = axes_of(config)[name]
        if value not in accepted:
            raise ConfigError(f"{type(config).__name__}.{name}={value!r} is not a choice; accepted: {', '.join(map(repr, accepted))}")


def check_config_fields(owner: str, config_type: type) -> None:
    """Refuse a config whose fields are no choices.

    Raises:
        DescriptionError: a choice has values of several types, or one twice.
    """
    for name, values in axes(config_type).items():
        kinds = {type(value).__name__ for value in values if value is not None}
        if len(kinds) > 1 or len(set(values)) < len(values):
            why = f"of several types, {' and '.join(sorted(kinds))}" if len(kinds) > 1 else "twice"
            raise DescriptionError(
                f"{owner}: {config_type.__qualname__}.{name} has a value {why}: {', '.join(map(repr, values))}; give unlike ones of one type"
            )


def describe(config: object) -> str:
    """The choices of a config on one line: `chunk=1024 scan.tokens=64`."""
    return " ".join(f"{name}={value}" for name, value in flatten(config).items())
