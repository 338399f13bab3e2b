"""Choices by name, as a command line gives them: `stages=3,mma=sync`, `tma.rows=128` where an op has parts; and the config that makes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vidrial.device import Device
from vidrial.errors import ArgumentError, ConfigError
from vidrial.spec.choices import Axes, axes, configs, flatten
from vidrial.spec.fields import C, P
from vidrial.spec.op import Op
from vidrial.spec.refusals import furthest
from vidrial.spec.space import Subset


def parse_choices(op: Op, text: str) -> dict[str, Any]:
    """`stages=3,mma=sync` -> name -> value, named as by `axes`; a part's choice may go without the part where no other has one of its name.

    Raises:
        ArgumentError: a name or a value that the op's config does not have, or a choice twice.
    """
    known, found = axes(op.config), dict[str, Any]()
    for word in text.split(","):
        asked, equals, value = (x.strip() for x in word.partition("="))
        if not equals:
            raise ArgumentError(f"--config {word!r}: accepted are choices with their values, as {_example(known)}")
        name = _name(op, asked, known)
        if name in found:
            raise ArgumentError(f"--config gives {name} twice; accepted: each choice once")
        matches = [accepted for accepted in known[name] if str(accepted).lower() == value.lower()]
        if not matches:
            raise ArgumentError(f"--config {name}={value}: not a value of it; accepted: {', '.join(map(str, known[name]))}")
        found[name] = matches[0]
    return found


def _example(known: Axes) -> str:
    return ",".join(f"{name}={values[0]}" for name, values in list(known.items())[:2]) or "nothing: the op has no choices"


def _name(op: Op, asked: str, known: Axes) -> str:
    if asked in known:
        return asked
    alike = [name for name in known if name.rpartition(".")[2] == asked]
    if len(alike) == 1:
        return alike[0]
    if alike:
        raise ArgumentError(f"--config {asked}: several parts of {op.name} have it; accepted: {', '.join(alike)}")
    raise ArgumentError(f"--config {asked}: {op.name} has no such choice; accepted: {', '.join(known) or 'none'}")


def config_with(op: Op[P, C], problem: P, device: Device, fixed: Mapping[str, Any]) -> C:
    """The legal config predicted fastest of those that make the choices `fixed`, named as by `axes`.

    Raises:
        ConfigError: there is none.
    """
    own = {name: value for name, value in fixed.items() if "." not in name}
    by_part: dict[str, dict[str, Any]] = {}
    for name, value in fixed.items():
        part, dot, rest = name.partition(".")
        if dot:
            by_part.setdefault(part, {})[rest] = value
    asked = f"{op.name}: no legal config with {', '.join(f'{name}={value}' for name, value in fixed.items())}"
    shared = tuple(s for s in op.shared(own) if all(op.launches(problem, s, part) for part in by_part))
    if not shared:
        raise ConfigError(f"{asked}: with these choices nothing of part {', '.join(by_part)} is launched for {problem}")
    made = {part: [c for c in configs(op.config_type(part)) if _makes(c, values)] for part, values in by_part.items()}
    variants: dict[Any, dict[str, list[Any]]] = {
        s: {part: [dataclasses.replace(s, **{part: c}) for c in made[part]] for part in by_part} for s in shared
    }
    found = next(op.ranked(problem, device, among=Subset(shared, variants)), None)
    if found is not None:
        return found.config
    every = ((s, {part: variants[s].get(part) or _all(op, problem, s, part) for part in op.parts}) for s in shared)
    raise ConfigError(f"{asked} for {problem} on {device.name}: {'; '.join(furthest(op, problem, device, every))}")


def _makes(config: Any, values: Mapping[str, Any]) -> bool:
    made = flatten(config)
    return all(made[name] == value for name, value in values.items())


def _all(op: Op, problem: Any, shared: Any, part: str) -> list[Any]:
    if not op.launches(problem, shared, part):
        return [shared]
    return [dataclasses.replace(shared, **{part: c}) for c in configs(op.config_type(part))]


def taken(op: Op, problem: Any, config: Any) -> dict[str, Any]:
    """Name -> value of the choices that a launch of this config takes: its own ones and those of parts that a stage has."""
    launched = {stage.part for stage in op.stages(problem, config)}
    return {name: value for name, value in flatten(config).items() if "." not in name or name.partition(".")[0] in launched}


def describe_taken(op: Op, problem: Any, config: Any) -> str:
    """`taken` on one line: `by=tma tma.rows=128`."""
    return " ".join(f"{name}={value}" for name, value in taken(op, problem, config).items())
