"""What a kernel is asked (`Problem`) and how it may answer (`Config`): two frozen dataclasses whose fields say what they are.

@dataclass(frozen=True)
class Problem:
    dtype: DType = static()      # baked into the source
    t: int = dynamic()           # a kernel argument: another value compiles nothing

@dataclass(frozen=True)
class Config:
    m: int = choice(128, 64)     # the first value is the default
"""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from vidrial.errors import TemplateError

KIND, CHOICES, KEYED, SPECIALIZE = "vidrial.kind", "vidrial.choices", "vidrial.keyed", "vidrial.specialize"


def static() -> Any:
    """A field that is known before the launch: it is baked into the source, so another value is another binary."""
    return dataclasses.field(metadata={KIND: "static"})


def dynamic(*, keyed: bool = True) -> Any:
    """A field that reaches the kernel as an argument; `keyed=False` (strides, say) keeps it out of the ranking's size class."""
    return dataclasses.field(metadata={KIND: "dynamic", KEYED: keyed})


def choice(default: Any, *others: Any) -> Any:
    """A field of a config that the sweep may choose: `default` first, which must be legal, then the other values."""
    return dataclasses.field(default=default, metadata={KIND: "choice", CHOICES: (default, *others)})


def part(config: type) -> Any:
    """A field of an op's config that is the config of one of its stages."""
    return dataclasses.field(default_factory=config, metadata={KIND: "part", CHOICES: config})


def specialize(*names: str) -> Any:
    """A choice between "" and one of the problem's dynamic fields: that one is then known before the launch, like a static field.

    Its value is baked into the source, so every other value is another binary: such a config is taken for the very sizes that it was
    measured at, never for others.
    """
    return dataclasses.field(default="", metadata={KIND: "choice", CHOICES: ("", *names), SPECIALIZE: True})


def baked(config: Any) -> tuple[str, ...]:
    """Names of the dynamic fields that a kernel's config bakes in."""
    return tuple(getattr(config, f.name) for f in dataclasses.fields(config) if SPECIALIZE in f.metadata and getattr(config, f.name))


def specialized(config: Any) -> bool:
    """Whether a config, or a part of it, bakes a dynamic field in."""
    return bool(baked(config)) or any(specialized(part) for part in fields(config, "part").values())


def fields(record: Any, kind: str) -> dict[str, Any]:
    """Name and value of the fields of one kind (`static`, `dynamic`, `choice`, `part`), in order of declaration."""
    return {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.metadata.get(KIND) == kind}


def keyed_fields(problem: Any) -> dict[str, int]:
    """The dynamic fields that make up a problem's size class."""
    return {
        f.name: getattr(problem, f.name)
        for f in dataclasses.fields(problem)
        if f.metadata.get(KIND) == "dynamic" and f.metadata.get(KEYED, True)
    }


def size_class(problem: Any) -> tuple[tuple[str, int, int], ...]:
    """Per keyed dynamic field: its power-of-two class (bits of n - 1) and its alignment class (largest power of two up to 64 that divides n).

    Problems of one size class share a ranking; the lengths 1025 and 1026 differ in alignment, 1025 and 2047 share everything.
    """
    return tuple((name, max(n - 1, 0).bit_length(), min(n & -n, 64) if n else 64) for name, n in keyed_fields(problem).items())


def types(record: type) -> dict[str, Any]:
    """The resolved annotations of a dataclass, also under `from __future__ import annotations`."""
    return get_type_hints(record)


class StaticView:
    """A problem seen before the launch: to read a dynamic field that `config` does not bake in is the author's mistake, and it says so."""

    def __init__(self, problem: Any, config: Any = None) -> None:
        self._static = fields(problem, "static")
        if config is not None:
            self._static |= {name: getattr(problem, name) for name in baked(config)}
        self._problem = type(problem)

    def __getattr__(self, name: str) -> Any:
        if name in self._static:
            return self._static[name]
        if name.startswith("__"):
            raise AttributeError(name)
        attribute = getattr(self._problem, name, None)
        if isinstance(attribute, property) and attribute.fget is not None:
            return attribute.fget(self)
        raise TemplateError(
            f"{self._problem.__name__}.{name} is not known before the launch, so tiles() may not depend on it; "
            f"known: {', '.join(self._static) or 'nothing'}. Declare it static(), pass it as an argument, "
            f"or let the config bake it in: specialize({name!r})"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StaticView) and (self._problem, self._static) == (other._problem, other._static)

    def __hash__(self) -> int:
        return hash((self._problem, tuple(self._static.values())))

    def __repr__(self) -> str:
        return f"{self._problem.__name__}({', '.join(f'{k}={v!r}' for k, v in self._static.items())})"
