"""Every walk over the choices of a config: all configs, the order of declaration, one line of text, flat names."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from vidrial.errors import ConfigError
from vidrial.spec.fields import CHOICES, KIND, C


def configs(config: type) -> Iterator[Any]:
    """Every combination of a config's choices, the default first; parts contribute the combinations of their own choices."""
    axes = []
    for field in dataclasses.fields(config):
        if field.metadata.get(KIND) == "part":
            axes.append([(field.name, v) for v in configs(field.metadata[CHOICES])])
        elif CHOICES in field.metadata:
            axes.append([(field.name, v) for v in field.metadata[CHOICES]])
    for combination in itertools.product(*axes):
        yield config(**dict(combination))


def config_order(config: Any) -> tuple[int, ...]:
    """Position of a config in the order of declaration: the index of each of its choices, parts included."""
    order: tuple[int, ...] = ()
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), field.metadata.get(CHOICES, ())
        if field.metadata.get(KIND) == "part":
            order += config_order(value)
        else:
            order += (choices.index(value) if value in choices else len(choices),)
    return order


def check_choices(config: Any) -> None:
    """Refuse a config whose value is not among its field's choices.

    Raises:
        ConfigError: naming the field, what came and what is accepted.
    """
    for field in dataclasses.fields(config):
        value, accepted = getattr(config, field.name), field.metadata.get(CHOICES)
        if field.metadata.get(KIND) == "part":
            check_choices(value)
        elif accepted is not None and value not in accepted:
            raise ConfigError(f"{type(config).__name__}.{field.name}={value!r} is not a choice; accepted: {', '.join(map(repr, accepted))}")


def describe(config: C) -> str:
    """The choices of a config on one line, parts flattened: `chunk=1024 scan.tokens=64`."""
    words = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata.get(KIND) == "part":
            words += [f"{field.name}.{word}" for word in describe(value).split()]
        elif CHOICES in field.metadata:
            words.append(f"{field.name}={value}")
    return " ".join(words)


Axes = dict[str, tuple[Any, ...]]


def axes(config: type, prefix: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(dotted name, values) of every choice of a config, those of its parts included."""
    for field in dataclasses.fields(config):
        if field.metadata.get(KIND) == "part":
            yield from axes(field.metadata[CHOICES], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field.metadata[CHOICES]


def flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every choice that a config made."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        yield from flat(value, f"{prefix}{field.name}.") if field.metadata.get(KIND) == "part" else [(f"{prefix}{field.name}", value)]


def build(config: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """The config whose choices `flat` would give as `values`."""
    made = {}
    for field in dataclasses.fields(config):
        name = f"{prefix}{field.name}"
        made[field.name] = build(field.metadata[CHOICES], values, f"{name}.") if field.metadata.get(KIND) == "part" else values[name]
    return config(**made)
