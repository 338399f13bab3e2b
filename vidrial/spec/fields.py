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
import functools
import types as types_of
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from vidrial.errors import ArgumentTypeError, TemplateError

if TYPE_CHECKING:
    # Of the standard library's and the checker's own stubs, which no interpreter has. `Op` alone means Op[Any, Any]: an op of some author.
    from _typeshed import DataclassInstance
    from typing_extensions import TypeVar as TypeVarWithDefault

    P = TypeVarWithDefault("P", bound=DataclassInstance, default=Any)
    C = TypeVarWithDefault("C", bound=DataclassInstance, default=Any)
else:
    P, C = TypeVar("P"), TypeVar("C")
T = TypeVar("T")

KIND, CHOICES, KEYED, SPECIALIZE, LEAST = "vidrial.kind", "vidrial.choices", "vidrial.keyed", "vidrial.specialize", "vidrial.least"
# Results that a kernel remembers for each set of fields that were read.
REMEMBERED = 8192


def static() -> T:  # type: ignore[type-var]  # T is what the field is declared as
    """A field that is known before the launch: it is baked into the source, so another value is another binary."""
    return cast(T, dataclasses.field(metadata={KIND: "static"}))


def dynamic(*, keyed: bool = True, least: int = 1, default: object = dataclasses.MISSING) -> T:  # type: ignore[type-var]
    """A field that reaches the kernel as an argument; `keyed=False` (strides, say) keeps it out of the ranking's size class.

    `least`: what a keyed one is at least; the command line refuses less. `default`: its value where it is not named; such a field is
    given by keyword alone, and a ranking from before there was one still counts.
    """
    metadata = {KIND: "dynamic", KEYED: keyed, LEAST: least}
    if default is dataclasses.MISSING:
        return cast(T, dataclasses.field(metadata=metadata))
    return cast(T, dataclasses.field(default=default, kw_only=True, metadata=metadata))


def choice(default: T, *others: T) -> T:
    """A field of a config that the sweep may choose: `default` first, which must be legal, then the other values."""
    return dataclasses.field(default=default, metadata={KIND: "choice", CHOICES: (default, *others)})


def part(config: type[T]) -> T:
    """A field of an op's config that is the config of one of its stages."""
    return dataclasses.field(default_factory=config, metadata={KIND: "part", CHOICES: config})


def specialize(*names: str) -> str:
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


def check_record(what: str, kind: type) -> None:
    """Refuse what can be no key: problems and configs are.

    Raises:
        ArgumentTypeError: `kind` is not a frozen dataclass.
    """
    if not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise ArgumentTypeError(
            f"{what} {getattr(kind, '__qualname__', kind)!r} is no frozen dataclass; write @dataclass(frozen=True) above it"
        )


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


def least_values(problem: Any) -> dict[str, int]:
    """What each keyed dynamic field of a problem is at least."""
    return {f.name: f.metadata.get(LEAST, 1) for f in dataclasses.fields(problem) if f.name in keyed_fields(problem)}


Read = tuple[str, str]  # "problem" or "config", and the name of a field that was read


class StaticView:
    """A problem or a config as it is before the launch: the `known` fields, each by `read` and noted by it, and what follows from them.

    To read a dynamic field of a problem that its config does not bake in is the author's mistake, and it says so.
    """

    def __init__(self, record: type, known: Sequence[str], read: Callable[[str], Any]) -> None:
        self._record, self._known, self._read = record, known, read

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self._known:
            return self._read(name)
        attribute = getattr(self._record, name, None)
        if isinstance(attribute, property) and attribute.fget is not None:
            return attribute.fget(self)
        if isinstance(attribute, types_of.FunctionType):
            return types_of.MethodType(attribute, self)
        raise TemplateError(
            f"{self._record.__name__}.{name} is not known before the launch, so tiles() may not depend on it; "
            f"known: {', '.join(self._known) or 'nothing'}. Declare it static(), pass it as an argument, "
            f"or let the config bake it in: specialize({name!r})"
        )

    def _all(self) -> tuple[Any, ...]:
        return self._record, tuple((name, self._read(name)) for name in self._known)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StaticView) and self._all() == other._all()

    def __hash__(self) -> int:
        return hash(self._all())

    def __repr__(self) -> str:
        record, known = self._all()
        return f"{record.__name__}({', '.join(f'{k}={v!r}' for k, v in known)})"


class Static:
    """What is known of a problem and a config before the launch: a view of each, and in `reads` what has been read of them."""

    def __init__(self, problem: Any, config: Any) -> None:
        self._problem, self._config = problem, config
        self.reads: dict[Read, Any] = {}

    @functools.cached_property
    def problem(self) -> StaticView:
        """The static fields of the problem, and those that the config bakes in."""
        lengths = baked(self._config)
        known = fields(self._problem, "static") | {name: getattr(self._problem, name) for name in lengths}

        def read(name: str) -> Any:
            self.reads["problem", name] = known[name]
            # That a length may be read is a choice, too.
            for field in dataclasses.fields(self._config) if name in lengths else ():
                if SPECIALIZE in field.metadata:
                    self.reads["config", field.name] = getattr(self._config, field.name)
            return known[name]

        return StaticView(type(self._problem), tuple(known), read)

    @functools.cached_property
    def config(self) -> StaticView:
        """All of the config."""

        def read(name: str) -> Any:
            value = self.reads["config", name] = getattr(self._config, name)
            return value

        return StaticView(type(self._config), tuple(f.name for f in dataclasses.fields(self._config)), read)

    def values(self, names: Sequence[Read]) -> tuple[Any, ...]:
        """The values of fields by name, which counts as no read."""
        return tuple(getattr(self._problem if owner == "problem" else self._config, name) for owner, name in names)

    def anew(self) -> Static:
        """The same with nothing read."""
        return Static(self._problem, self._config)


class ByReads(Generic[T]):
    """A function of what is static, remembered by what it read.

    Where the fields that a call read have the same values again, it would read the same ones and return the same: whatever else a
    problem and a config hold, they share one result. `made` counts the calls.
    """

    def __init__(self, function: Callable[[Static], T]) -> None:
        self._function = function
        self.clear()

    def clear(self) -> None:
        """Remember nothing."""
        self._known: tuple[Hashable, dict[tuple[Read, ...], dict[tuple[Any, ...], tuple[T]]]] = None, {}
        self.made = 0

    def __call__(self, static: Static, version: Hashable = None) -> T:
        """The result, whose reads `static` notes as its own; `version`: whatever else decides it, nothing of another one is kept."""
        # NOTE: no lock, so threads that call at once may make one thing twice; what one looks through, another may add to or replace.
        if version != self._known[0]:
            self._known = version, {}
        known = self._known[1]
        for names, results in tuple(known.items()):
            values = static.values(names)
            if (found := results.get(values)) is not None:
                static.reads.update(zip(names, values, strict=True))
                return found[0]
        own = static.anew()
        made = self._function(own)
        self.made += 1
        results = known.setdefault(tuple(own.reads), {})
        if len(results) >= REMEMBERED:
            results.clear()
        results[tuple(own.reads.values())] = (made,)
        static.reads.update(own.reads)
        return made
