"""What is known of all configs by asking few: an outcome depends on the choices that were read for it, and on no other.

Rules, tiles and costs are an author's functions of a config. Each is called with a config that notes what is read of it; wherever the same
choices have the same values again it would read the same ones and return the same. So a space of many thousand configs is asked about a few
hundred times.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Generic, TypeAlias, TypeVar

from vidrial.spec.choices import Axes, parts

T = TypeVar("T")
# By axis the index of a value, or None for all of them; (): all configs.
Cell: TypeAlias = tuple[int | None, ...]
# Of a config that notes what is read: the config itself, what it is told, and the prefix of its names. No author's field is called so.
OF, NOTE, PREFIX = "vidrial config", "vidrial note", "vidrial prefix"
Note: TypeAlias = Callable[[str, Any], None]


def noting(config: Any, note: Note, prefix: str = "") -> Any:
    """`config` as an object of its own kind that calls `note` with the name and value of each field when it is first read, a part's by
    dotted name."""
    kind: type = type(config)
    made: Any = object.__new__(_noting_type(kind))
    # A space asks thousands of times: the object's own dictionary is filled at once, frozen as it is.
    made.__dict__.update({OF: config, NOTE: note, PREFIX: prefix})
    return made


class _Read:
    """A field of a config that notes what is read of it. Once read it lies in the object's own dictionary, and is found there."""

    def __init__(self, name: str, is_part: bool) -> None:
        self.name, self.is_part = name, is_part

    def __get__(self, made: Any, owner: type | None = None) -> Any:
        if made is None:
            raise AttributeError(self.name)
        known = made.__dict__
        value = getattr(known[OF], self.name)
        if self.is_part:
            value = noting(value, known[NOTE], f"{known[PREFIX]}{self.name}.")
        else:
            known[NOTE](known[PREFIX] + self.name, value)
        known[self.name] = value
        return value


@functools.cache
def _noting_type(kind: type) -> type:
    """A subclass of a dataclass of choices whose objects equal its own, and note what is read of them."""
    names = [f.name for f in dataclasses.fields(kind)]

    def values(config: Any) -> tuple[Any, ...]:
        return tuple(getattr(config, name) for name in names)

    members: dict[str, Any] = {name: _Read(name, name in parts(kind)) for name in names}
    members["__eq__"] = lambda self, other: values(self) == values(other) if isinstance(other, kind) else NotImplemented
    members["__hash__"] = lambda self: hash(values(self))
    return type(kind.__name__, (kind,), {**members, "__module__": kind.__module__, "__qualname__": kind.__qualname__})


class _Node:
    """The next choice that is read: of the part that varies (its axis) or of the config around it, and what follows by its value."""

    __slots__ = ("axis", "name", "next", "of")

    def __init__(self, name: str, axis: int | None, of: Callable[[Any], Any]) -> None:
        self.name, self.axis, self.of = name, axis, of
        self.next: dict[Any, _Node | _Leaf] = {}


class _Leaf:
    __slots__ = ("result",)

    def __init__(self, result: Any) -> None:
        self.result = result


class Outcomes(Generic[T]):
    """A function of a config, for those that differ from one another in a part, or ("") in own choices alone: in those of `axes`.

    `made` counts the calls of the function.
    """

    def __init__(self, function: Callable[[Any], T], part: str, axes: Axes) -> None:
        self._function, self._part = function, part
        self._prefix = f"{part}." if part else ""
        self._axes, self._values = axes, tuple(axes.values())
        self._places: dict[str, tuple[int | None, Callable[[Any], Any]]] = {}
        sizes = [len(values) for values in self._axes.values()]
        self._strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
        self._root: _Node | _Leaf | None = None
        self.made = 0

    def of(self, shared: Any, config: Any) -> T:
        """The outcome of `shared` with `config` as its part; `shared` is the config itself where the function is asked about no more."""
        node = self._root
        while isinstance(node, _Node):
            node = node.next.get(node.of(shared if node.axis is None else config))
        return self._ask(shared, config) if node is None else node.result

    def alone(self, config: Any) -> T:
        """The outcome of a config itself, of which nothing is noted: what no other one shares is asked faster so."""
        self.made += 1
        return self._function(config)

    def cells(self, shared: Any, configs: Sequence[Any], within: Cell = ()) -> list[tuple[T, Cell]]:
        """Each outcome of `shared` with `configs`, all that the axes span, and the cell of those that have it; one may come several times."""
        first = sum(i * stride for i, stride in zip(within, self._strides, strict=False) if i)
        if self._root is None:
            self._ask(shared, configs[first])
        found = list[tuple[T, Cell]]()
        self._collect(found, self._root, (shared, configs), list(within or [None] * len(self._axes)), first)
        return found

    def _collect(
        self, found: list[tuple[T, Cell]], node: _Node | _Leaf | None, every: tuple[Any, Sequence[Any]], known: list[int | None], first: int
    ) -> None:
        """The outcomes from a node on, of the cell `known`, whose first config is the one of index `first`."""
        if isinstance(node, _Leaf):
            found.append((node.result, tuple(known)))
            return
        shared, configs = every
        if node is None:
            # Read in another order than before: this is no function of what it reads alone, and each is asked.
            for i in self.indices(known):
                cell = tuple(i // stride % len(v) for stride, v in zip(self._strides, self._values, strict=True))
                found.append((self.of(shared, configs[i]), cell))
            return
        axis, following = node.axis, node.next
        if axis is None or (at := known[axis]) is not None:
            value = node.of(shared) if axis is None else self._values[axis][at or 0]
            if value not in following:
                self._ask(shared, configs[first])
            self._collect(found, following.get(value), every, known, first)
            return
        stride = self._strides[axis]
        for i, value in enumerate(self._values[axis]):
            known[axis] = i
            if value not in following:
                self._ask(shared, configs[first + i * stride])
            self._collect(found, following.get(value), every, known, first + i * stride)
        known[axis] = None

    def indices(self, cell: Sequence[int | None]) -> list[int]:
        """Of the configs whose choices are those of a cell, in order of declaration."""
        found = [sum(i * stride for i, stride in zip(cell, self._strides, strict=False) if i)]
        if None in cell or not cell:
            for i, stride, values in zip(cell or [None] * len(self._axes), self._strides, self._values, strict=True):
                if i is None:
                    found = [index + step for index in found for step in range(0, stride * len(values), stride)]
        return found

    def _ask(self, shared: Any, config: Any) -> T:
        reads: dict[str, Any] = {}
        note = reads.__setitem__
        if self._part:
            asked = noting(shared, note)
            asked.__dict__[self._part] = noting(config, note, self._prefix)
        else:
            asked = noting(config, note)
        result = self._function(asked)
        self.made += 1
        self._keep(reads, result)
        return result

    def _place(self, name: str) -> tuple[int | None, Callable[[Any], Any]]:
        """The axis of a choice and how it is read of a part's config; or None and how it is read of the config around it."""
        if name not in self._places:
            short = name.removeprefix(self._prefix)
            own = name.startswith(self._prefix) and short in self._axes
            self._places[name] = (tuple(self._axes).index(short), attrgetter(short)) if own else (None, attrgetter(name))
        return self._places[name]

    def _keep(self, reads: Mapping[str, Any], result: T) -> None:
        last: _Node | None = None
        node, value = self._root, None
        for name, read in reads.items():
            if node is None:
                node = self._put(last, value, _Node(name, *self._place(name)))
            if not isinstance(node, _Node) or node.name != name:
                return
            last, value = node, read
            node = node.next.get(value)
        if node is None:
            self._put(last, value, _Leaf(result))

    def _put(self, last: _Node | None, value: Any, node: _Node | _Leaf) -> _Node | _Leaf:
        if last is None:
            self._root = node
        else:
            last.next[value] = node
        return node
