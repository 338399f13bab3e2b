"""Which thread holds what: functions of the thread index as layouts, and MMA fragments as the 8 x 8 matrices that ldmatrix delivers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from vidrial.errors import LayoutError
from vidrial.layout.algebra import Layout

Table = Callable[[int], tuple[int, int]]


def thread_layouts(table: Table, threads: int) -> tuple[Layout, Layout]:
    """Two layouts, thread -> row and thread -> column, that reproduce `table` for each of `threads` threads.

    Raises:
        LayoutError: thread 0 is not at (0, 0), or no layout is that function.
    """
    if threads < 1:
        raise LayoutError(f"{threads} threads hold nothing; give at least 1")
    points = [table(thread) for thread in range(threads)]
    return _as_layout([p[0] for p in points], "row"), _as_layout([p[1] for p in points], "column")


def _as_layout(values: Sequence[int], what: str) -> Layout:
    """The one coalesced layout with these values: each mode is as long as the values stay on a line."""
    shape, stride = [], []
    rest = values
    while len(rest) > 1:
        step = rest[1] - rest[0]
        extent = next((i for i, value in enumerate(rest) if value != i * step), len(rest))
        if extent == 0 or step < 0 or len(rest) % extent:
            raise _not_a_layout(values, what)
        shape.append(extent)
        stride.append(step)
        rest = rest[::extent]
    layout = Layout(1, 0) if not shape else Layout(shape[0], stride[0]) if len(shape) == 1 else Layout(tuple(shape), tuple(stride))
    if list(layout.indices()) != list(values):
        raise _not_a_layout(values, what)
    return layout


def _not_a_layout(values: Sequence[int], what: str) -> LayoutError:
    return LayoutError(
        f"thread -> {what} of {len(values)} threads, {', '.join(map(str, values[:9]))}, ..., is not a layout; "
        "it must be 0 for thread 0 and a sum over the digits of the thread index"
    )


@cache
def fragment_matrices(layout: Layout, extent: int) -> tuple[tuple[int, int], ...]:
    """Origin (i, k) of the 8 x 8 matrix in each 32-bit register of a fragment of 16-bit elements.

    `layout` takes (thread, value) to i + extent * k. In matrix (i0, k0) thread t holds i0 + t / 4, k0 + 2 (t % 4) and the
    next k, which is what ldmatrix delivers, or ldmatrix.trans from a tile whose rows are k.

    Raises:
        LayoutError: a register of the fragment is not such a matrix.
    """
    threads, values = layout.mode(0).size, layout.mode(1).size
    origins = []
    for first in range(0, values, 2):
        k0, i0 = divmod(layout(0, first), extent)
        for thread in range(threads):
            for v in range(2):
                k, i = divmod(layout(thread, first + v), extent)
                if (i, k) != (i0 + thread // 4, k0 + 2 * (thread % 4) + v):
                    raise LayoutError(f"register {first // 2} of the fragment {layout} is not an 8 x 8 matrix as ldmatrix delivers it")
        origins.append((i0, k0))
    return tuple(origins)


@cache
def accumulator_feeds(c_layout: Layout, a_layout: Layout, extent: int) -> bool:
    """Whether neighbouring accumulator atoms (m x 8 each), value after value, are an A fragment (m x k) of the same threads."""
    per_atom = c_layout.mode(1).size
    threads, values = a_layout.mode(0).size, a_layout.mode(1).size
    atom = extent * 8
    return c_layout.mode(0).size == threads and all(
        c_layout(t, v % per_atom) + v // per_atom * atom == a_layout(t, v) for t in range(threads) for v in range(values)
    )
