"""Tiles in shared memory, and the proof that device code's address arithmetic on them is right."""

from __future__ import annotations

import dataclasses
from functools import cache, cached_property
from typing import Any, Literal, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from vidrial.device import VECTOR_BYTES
from vidrial.dtypes import DType
from vidrial.errors import LayoutError
from vidrial.layout.algebra import ComposedLayout, Layout, Swizzle

# (rows, columns) that device code adds to a thread's own place.
Steps: TypeAlias = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class SmemLayout:
    """A tile of `rows` x `columns` elements in shared memory, columns contiguous in blocks of at most 128 bytes.

    `swizzle="auto"` takes the swizzle of the block's width, with which eight rows of 16 bytes hit all banks; `None` is plain
    row-major. `stages` copies of the tile lie one behind the other.

    Raises:
        LayoutError: an extent or the number of stages is not positive, or the swizzle leads out of the tile.
    """

    dtype: DType
    rows: int
    columns: int
    swizzle: Swizzle | None | Literal["auto"] = "auto"
    stages: int = 1

    def __post_init__(self) -> None:
        if min(self.rows, self.columns, self.stages) < 1:
            raise LayoutError(f"a tile of {self.rows} x {self.columns}, {self.stages} stages, is empty; give positive numbers")
        if self.swizzle == "auto":
            bits = (self.block * self.dtype.bytes // VECTOR_BYTES).bit_length() - 1
            base = (VECTOR_BYTES // self.dtype.bytes).bit_length() - 1
            object.__setattr__(self, "swizzle", Swizzle(bits, base, 3) if bits > 0 else None)
        _prove_bijection(self)
        if self.stages > 1 and self.bytes % self.period_bytes:
            raise LayoutError(
                f"stages of {self.rows} x {self.columns} {self.dtype} are {self.bytes} bytes apart, which is no multiple of "
                f"the swizzle's period of {self.period_bytes} bytes; take a multiple of 8 rows"
            )

    @property
    def block(self) -> int:
        """Columns that lie side by side: the largest power of two that divides the row, at most 128 bytes."""
        return min(self.columns & -self.columns, 128 // self.dtype.bytes)

    @cached_property
    def layout(self) -> Layout | ComposedLayout:
        """(row, column) -> element offset."""
        return self.plain if self.swizzle is None else ComposedLayout(self._swizzle, 0, self.plain)

    @cached_property
    def plain(self) -> Layout:
        """(row, column) -> element offset before the swizzle."""
        block = self.columns if self.swizzle is None else self.block
        if block == self.columns:
            return Layout((self.rows, block), (block, 1))
        return Layout((self.rows, (block, self.columns // block)), (block, (1, self.rows * block)))

    @property
    def _swizzle(self) -> Swizzle:
        return self.swizzle if isinstance(self.swizzle, Swizzle) else Swizzle(0, 0, 0)

    @property
    def bytes(self) -> int:
        """Bytes of one stage."""
        return self.plain.cosize * self.dtype.bytes

    @property
    def period_bytes(self) -> int:
        """The base of the tile, and the distance of stages, must be a multiple of this."""
        return max(self._swizzle.period * self.dtype.bytes, VECTOR_BYTES)

    @property
    def transposed(self) -> Transposed:
        """The tile, read by an MMA with its rows along k."""
        return Transposed(self)

    @overload
    def offset(self, row: int, column: int) -> int: ...  # type: ignore[overload-overlap]

    @overload
    def offset(self, row: int | NDArray[Any], column: int | NDArray[Any]) -> NDArray[Any]: ...

    def offset(self, row: Any, column: Any) -> Any:
        """Element offset of (row, column); integers or NumPy arrays."""
        return self.layout((row, column))

    @overload
    def at(self, address: int, row: int, column: int) -> int: ...  # type: ignore[overload-overlap]

    @overload
    def at(self, address: int | NDArray[Any], row: int | NDArray[Any], column: int | NDArray[Any]) -> NDArray[Any]: ...

    def at(self, address: Any, row: Any, column: Any) -> Any:
        """Byte address of (r + row, c + column), given that of (r, c): `SmemTile::at` of the device code.

        Right only where `prove_access` has proved it.
        """
        y = self.plain((row, column))
        low = (1 << (self._swizzle.base + self._swizzle.shift)) - 1 if self.swizzle else 0
        return (address ^ ((y & low) * self.dtype.bytes)) + (y & ~low) * self.dtype.bytes

    @property
    def cpp(self) -> str:
        """The C++ type (of one stage)."""
        return f"vidrial::SmemTile<{self.dtype.cpp}, {self.layout.cpp}>"

    def __str__(self) -> str:
        return f"{self.rows} x {self.columns} {self.dtype} tile ({self.layout})"


@dataclasses.dataclass(frozen=True)
class Transposed:
    """A tile whose rows run along k, as an MMA operand: ldmatrix.trans reads it."""

    tile: SmemLayout


@cache
def _prove_bijection(tile: SmemLayout) -> None:
    """The swizzle permutes the tile's elements among themselves."""
    if not np.array_equal(np.sort(tile.layout.indices()), np.arange(tile.rows * tile.columns)):
        raise LayoutError(f"{tile.swizzle} leads out of a tile of {tile.rows} x {tile.columns} {tile.dtype}; take swizzle='auto'")


def prove_access(
    tile: SmemLayout,
    row: Layout,
    column: Layout,
    threads: int,
    steps: Steps,
    origins: Steps = ((0, 0),),
    *,
    vector: int = VECTOR_BYTES,
) -> None:
    """Proves that each thread, from its own `vector` bytes at origin + (row, column), reaches those of each step, in each stage, by `at`.

    Raises:
        LayoutError: naming the first thread and step that would read another address, or leave the tile.
    """
    for origin in origins:
        _prove_access(tile, row, column, threads, steps, origin, vector)


@cache
def _prove_access(tile: SmemLayout, row: Layout, column: Layout, threads: int, steps: Steps, origin: tuple[int, int], bytes: int) -> None:
    size, vector, stage_bytes = tile.dtype.bytes, bytes // tile.dtype.bytes, tile.bytes
    thread = np.arange(threads)
    r0, c0 = origin[0] + row(thread), origin[1] + column(thread)
    dr, dc = np.array(steps, np.int64).reshape(-1, 2).T[:, :, None]
    r, c = r0 + dr, c0 + dc

    def refuse(wrong: NDArray[Any], why: str) -> None:
        if wrong.any():
            s, t = np.argwhere(wrong)[0]
            raise LayoutError(f"{tile}: thread {t} at ({r0[t]}, {c0[t]}), step {steps[s]}: {why}")

    refuse((r >= tile.rows) | (c + vector > tile.columns), f"the {bytes} bytes at ({r.max()}, {c.max()}) are outside the tile")
    first = tile.offset(r, c)
    refuse(first % vector != 0, f"its {bytes} bytes are not aligned to {bytes}")
    for v in range(1, vector):
        refuse(tile.offset(r, c + v) != first + v, f"its {bytes} bytes are not contiguous; the swizzle's base is too small")
    base = tile.offset(r0, c0) * size
    for stage in range(tile.stages):
        reached = tile.at(base + stage * stage_bytes, dr, dc)
        refuse(
            reached != first * size + stage * stage_bytes,
            f"its address in stage {stage} plus the step is not the element's: the step "
            "changes bits that the swizzle reads, or carries into them; take steps of whole swizzle periods (8 rows)",
        )


class SharedMemory:
    """Where each region of a CTA's shared memory lies: `SharedMemory(q=q, k=(k, 3), sums=512)`.

    A region is a number of bytes, a tile (with its own stages), or (tile, stages). Regions begin at multiples of 128 bytes and
    of the period of their swizzle; regions given in bytes, from 1024 bytes on, at multiples of 1024, so that tiles may lie in
    them. `guard` unused bytes are left between them. The base itself must be aligned to `alignment`.

    Raises:
        LayoutError: a region is neither, or is empty.
    """

    def __init__(self, *, guard: int = 0, **regions: int | SmemLayout | tuple[SmemLayout, int]) -> None:
        self._declared, self._joined = regions, frozenset[str]()
        self._place(guard)

    def _place(self, guard: int) -> None:
        self.guard = guard
        self.alignment = 128
        self.bytes = 0
        self._regions: dict[str, tuple[int, int]] = {}
        for name, region in self._declared.items():
            size, alignment = _region(name, region)
            start = -(-(self.bytes + (guard if self._regions and name not in self._joined else 0)) // alignment) * alignment
            self._regions[name] = start, size
            self.alignment = max(self.alignment, alignment)
            self.bytes = start + size

    def offset(self, name: str) -> int:
        """Byte offset of a region."""
        return self._regions[name][0]

    def size(self, name: str) -> int:
        """Bytes of a region, all stages."""
        return self._regions[name][1]

    def guarded(self, guard: int) -> SharedMemory:
        """The same regions, `guard` unused bytes or more between them."""
        made = SharedMemory(guard=0, **self._declared)
        made._joined = self._joined
        made._place(guard)
        return made

    def join(self, *names: str) -> SharedMemory:
        """The same, without a guard in front of these: later something else lies across each and the one before it."""
        made = SharedMemory(guard=0, **self._declared)
        made._joined = frozenset(names)
        made._place(self.guard)
        return made

    def gaps(self) -> tuple[tuple[int, int], ...]:
        """(offset, bytes) of what lies unused between the regions."""
        places = sorted(self._regions.values())
        return tuple(
            (start + size, after - start - size)
            for (start, size), (after, _) in zip(places, places[1:], strict=False)
            if after > start + size
        )

    def members(self) -> dict[str, int]:
        """Name -> byte offset: the constants that device code sees."""
        return {name: start for name, (start, _) in self._regions.items()}

    def __repr__(self) -> str:
        return f"SharedMemory({', '.join(f'{name}={start}+{size}' for name, (start, size) in self._regions.items())})"


def _region(name: str, region: int | SmemLayout | tuple[SmemLayout, int]) -> tuple[int, int]:
    """(bytes, alignment) of a region."""
    tile, stages = region if isinstance(region, tuple) else (region, None)
    if isinstance(tile, SmemLayout):
        count = tile.stages if stages is None else stages
        if count < 1:
            raise LayoutError(f"region {name} has {count} stages; give at least 1")
        return count * tile.bytes, max(128, tile.period_bytes)
    if isinstance(tile, bool) or not isinstance(tile, int) or tile < 1 or stages is not None:
        raise LayoutError(f"region {name} is {region!r}; accepted: a positive number of bytes, a SmemLayout, (SmemLayout, stages)")
    return tile, 1024 if tile >= 1024 else 128


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A ring of `stages` buffers between global and shared memory, filled by cp.async: `vidrial::Ring` of the device code.

    Each step hands out the oldest buffer and refills another. `read`: buffers that may still be read when the next one is handed out, 1, or
    2 where wgmma reads on by itself. `ahead`: buffers behind the one handed out that must have landed, too. That no buffer is refilled while
    it may be read, and that each item has been waited for when it is handed out, is proved step by step.

    Raises:
        LayoutError: fewer than 2 stages, or too few stages for `read` and `ahead`.
    """

    stages: int
    read: int = 1
    ahead: int = 0

    def __post_init__(self) -> None:
        if self.stages < 2:
            raise LayoutError(f"a pipeline of {self.stages} stages overlaps nothing; take at least 2, or no pipeline")
        if self.read not in (1, 2) or self.ahead < 0 or self.first <= self.ahead:
            raise LayoutError(
                f"a pipeline of {self.stages} stages, of which read={self.read} are read and ahead={self.ahead} have landed behind them; "
                f"accepted: read of 1 or 2, and more than read + ahead stages"
            )
        for step in self.steps(3 * self.stages):
            # Buffers of the items that are read, or have landed and wait for it.
            kept = [item % self.stages for item in range(max(step.item - self.read + 1, 0), step.item + self.ahead + 1)]
            if step.refilled in kept or step.handed_out != step.item % self.stages or step.landed < step.item + self.ahead:
                raise LayoutError(f"{self}: step {step.item} refills buffer {step.refilled} while buffers {kept} are wanted")

    @property
    def first(self) -> int:
        """Buffers that are filled before the first step."""
        return self.stages - self.read

    @property
    def pending(self) -> int:
        """Buffers that may still be on their way when one is handed out: the groups that the wait leaves."""
        return self.first - 1 - self.ahead

    def steps(self, count: int) -> list[RingStep]:
        """The first steps, as the device code takes them."""
        found, read, write, item = [], 0, self.first, self.first
        for step in range(count):
            found.append(RingStep(step, read, write, item - 1 - self.pending, item))
            read, write, item = (read + 1) % self.stages, (write + 1) % self.stages, item + 1
        return found

    @property
    def cpp(self) -> str:
        """The C++ type."""
        return f"vidrial::Ring<{self.stages}, {self.read}, {self.ahead}>"


@dataclasses.dataclass(frozen=True)
class RingStep:
    """A step of a Pipeline: buffer `handed_out` holds work item `item`, all items up to `landed` have landed; then buffer `refilled` begins to
    be filled with item `fetched`."""

    item: int
    handed_out: int
    refilled: int
    landed: int
    fetched: int
