"""CuTe's layouts as values: `Layout`, `Swizzle` and `ComposedLayout`, which evaluate and print as their C++ types. All integers are static."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeAlias, TypeVar, overload

import numpy as np
import pycute
from numpy.typing import NDArray

from vidrial.errors import LayoutError

IntTuple: TypeAlias = "int | tuple[IntTuple, ...]"
# Coordinates, or arrays of them.
Coordinates: TypeAlias = "int | NDArray[Any] | tuple[Coordinates, ...]"
Index = TypeVar("Index", int, NDArray[Any])


def flatten(t: IntTuple) -> tuple[int, ...]:
    """The integers of a nested tuple, left to right."""
    return tuple(i for part in t for i in flatten(part)) if isinstance(t, tuple) else (t,)


def product(t: IntTuple) -> int:
    """Product of the integers of a nested tuple."""
    return math.prod(flatten(t))


@dataclasses.dataclass(frozen=True)
class Layout:
    """A function from coordinates to integers: `Layout((128, 64), (64, 1))` takes (i, j) to 64 i + j.

    `stride` has the nesting of `shape`; without it the first mode is contiguous.

    Raises:
        LayoutError: an extent is not a positive integer, a stride is not an integer, or the two are nested differently.
    """

    shape: IntTuple
    stride: IntTuple = ()

    def __post_init__(self) -> None:
        _check_integers(self.shape, least=1, what="an extent of a shape")
        if self.stride == () and self.shape != ():
            object.__setattr__(self, "stride", pycute.prefix_product(self.shape))
        _check_integers(self.stride, least=0, what="a stride")
        if not _congruent(self.shape, self.stride):
            raise LayoutError(f"shape {self.shape} and stride {self.stride} are nested differently; give each extent its own stride")

    @overload
    def __call__(self, *coordinate: IntTuple) -> int: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, *coordinate: Coordinates) -> NDArray[Any]: ...

    def __call__(self, *coordinate: Any) -> Any:
        """The index of a coordinate: an integer, one per mode, or nested as the shape; NumPy arrays of them give an array."""
        return _index(coordinate[0] if len(coordinate) == 1 else coordinate, self.shape, self.stride)

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return product(self.shape)

    @property
    def cosize(self) -> int:
        """One more than the largest index."""
        return 1 + sum((s - 1) * d for s, d in zip(flatten(self.shape), flatten(self.stride), strict=True))

    @property
    def rank(self) -> int:
        """Number of modes."""
        return len(self.shape) if isinstance(self.shape, tuple) else 1

    def mode(self, i: int) -> Layout:
        """The i-th mode as a layout of its own."""
        if not isinstance(self.shape, tuple) or not isinstance(self.stride, tuple):
            return self
        return Layout(self.shape[i], self.stride[i])

    def indices(self) -> NDArray[Any]:
        """Index of each integer coordinate, an int64 array of `size` values."""
        return self(np.arange(self.size))

    @property
    def cpp(self) -> str:
        """The CuTe type."""
        return f"cute::Layout<{_cpp('Shape', self.shape)}, {_cpp('Stride', self.stride)}>"

    def __str__(self) -> str:
        return f"{self.shape}:{self.stride}".replace(" ", "")


@dataclasses.dataclass(frozen=True)
class Swizzle:
    """CuTe's `Swizzle<bits, base, shift>`: `bits` bits from `base + shift` on are XORed onto those from `base` on."""

    bits: int
    base: int
    shift: int

    def __post_init__(self) -> None:
        if self.bits < 0 or self.base < 0 or self.shift < self.bits:
            raise LayoutError(
                f"Swizzle({self.bits}, {self.base}, {self.shift}): accepted: bits and base of at least 0, shift of at least bits"
            )

    def __call__(self, index: Index) -> Index:
        """The swizzled index (an integer or an integer array)."""
        mask = ((1 << self.bits) - 1) << (self.base + self.shift)
        swizzled: Index = index ^ ((index & mask) >> self.shift)
        return swizzled

    @property
    def period(self) -> int:
        """An offset by a multiple of this many elements passes through the swizzle unchanged."""
        return 1 << (self.bits + self.base + self.shift) if self.bits else 1

    @property
    def cpp(self) -> str:
        """The CuTe type."""
        return f"cute::Swizzle<{self.bits},{self.base},{self.shift}>"


@dataclasses.dataclass(frozen=True)
class ComposedLayout:
    """`swizzle(offset + layout(coordinate))`."""

    swizzle: Swizzle
    offset: int
    layout: Layout

    @overload
    def __call__(self, *coordinate: IntTuple) -> int: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, *coordinate: Coordinates) -> NDArray[Any]: ...

    def __call__(self, *coordinate: Any) -> Any:
        """The index of a coordinate, as `Layout.__call__`."""
        return self.swizzle(self.offset + self.layout(*coordinate))

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return self.layout.size

    @property
    def shape(self) -> IntTuple:
        """The shape of the domain."""
        return self.layout.shape

    def indices(self) -> NDArray[Any]:
        """Index of each integer coordinate, an int64 array of `size` values."""
        return self(np.arange(self.size))

    @property
    def cpp(self) -> str:
        """The CuTe type."""
        return f"cute::ComposedLayout<{self.swizzle.cpp}, {_int(self.offset)}, {self.layout.cpp}>"

    def __str__(self) -> str:
        return f"Swizzle<{self.swizzle.bits},{self.swizzle.base},{self.swizzle.shift}> o {self.offset} o {self.layout}"


def _index(coordinate: Any, shape: IntTuple, stride: IntTuple) -> Any:
    if isinstance(shape, tuple) and isinstance(stride, tuple):
        if isinstance(coordinate, tuple):
            if len(coordinate) != len(shape):
                raise LayoutError(f"coordinate {coordinate} has {len(coordinate)} modes; accepted: {len(shape)}, as shape {shape} has")
            index = 0
            for c, s, d in zip(coordinate, shape, stride, strict=True):
                index = index + _index(c, s, d)
            return index
        index = 0
        for i, (s, d) in enumerate(zip(shape, stride, strict=True)):
            extent = product(s) if isinstance(s, tuple) else s
            index = index + _index(coordinate if i == len(shape) - 1 else coordinate % extent, s, d)
            coordinate = coordinate // extent
        return index
    if isinstance(coordinate, tuple):
        raise LayoutError(f"coordinate {coordinate} is nested deeper than the mode {shape}:{stride} that it addresses")
    return coordinate * stride


def _check_integers(t: object, least: int, what: str) -> None:
    if isinstance(t, tuple):
        for part in t:
            _check_integers(part, least, what)
    elif isinstance(t, bool) or not isinstance(t, int) or t < least:
        raise LayoutError(f"{t!r} is not {what}; accepted: integers of at least {least}, and tuples of them")


def _congruent(a: IntTuple, b: IntTuple) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_congruent, a, b))
    return not isinstance(a, tuple) and not isinstance(b, tuple)


def _int(i: int) -> str:
    return "cute::_0" if i == 0 else f"cute::Int<{i}>"


def _cpp(name: str, t: IntTuple) -> str:
    return f"cute::{name}<{','.join(_cpp(name, part) for part in t)}>" if isinstance(t, tuple) else f"cute::Int<{t}>"
