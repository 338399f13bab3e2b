"""The order of tiles: in Python, on the device (through the host target), and what it is worth."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidrial.host.target import compile_host
from vidrial.layout.schedule import Scheduler, equal_groups

SHAPES = [(1, 1, 1), (5, 7, 1), (5, 7, 3), (4, 8, 4), (3, 32, 5), (9, 2, 2)]
KERNEL = """#include <vidrial/prelude.cuh>
#include <vidrial/pipeline/scheduler.cuh>
struct Args { int* out; int rows, columns, groups; };
extern "C" __global__ void k(__grid_constant__ Args const args) {
  using Order = ORDER;
  int const tiles = args.rows * args.columns;
  for (int tile = Order::first(); tile < tiles; tile = Order::following(tile, tiles)) {
    vidrial::TilePlace const place = Order::place(tile, args.rows, args.columns, args.groups);
    args.out[3 * tile] = place.row, args.out[3 * tile + 1] = place.column, args.out[3 * tile + 2] = blockIdx.x;
  }
}"""


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_every_tile_once(rows: int, columns: int, groups: int, heavy: bool) -> None:
    order = list(Scheduler(heavy=heavy).order(rows, columns, min(groups, columns)))
    assert sorted(order) == [(row, column) for row in range(rows) for column in range(columns)]
    # The heaviest row of each group comes first, and sizes differ by one at most.
    assert order[0][0] == (rows - 1 if heavy else 0)
    sizes = {sum(1 for _, c in order if c in group) // rows for group in np.array_split(np.arange(columns), min(groups, columns))}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("kind", ["one", "static"])
@pytest.mark.parametrize("heavy", [False, True])
def test_the_device_has_the_same_order(kind: str, heavy: bool) -> None:
    schedule = Scheduler(kind, heavy)  # type: ignore[arg-type]
    binary = compile_host(KERNEL.replace("ORDER", schedule.placed(0, "order")[0]), "k")
    for rows, columns, groups in SHAPES:
        out, ctas = np.full((rows * columns, 3), -1, np.int32), schedule.ctas(rows * columns, 4)
        binary.launch((ctas,), 1, 0, struct.pack("=Q3i4x", 0, rows, columns, groups), {0: out})
        assert list(map(tuple, out[:, :2].tolist())) == list(schedule.order(rows, columns, groups))
        assert out[:, 2].tolist() == [tile % ctas for tile in range(rows * columns)]


def test_groups_fit_the_cache() -> None:
    assert [equal_groups(32, 3 << 20, 32 << 20), equal_groups(32, 1, 1 << 20), equal_groups(3, 1 << 30, 1), equal_groups(10, 0, 0)] == [
        4,
        1,
        3,
        10,
    ]


def test_equal_groups_end_earlier_than_a_short_last_one() -> None:
    """32 heads, causal: groups of 10, 10, 10 and 2 bring the heaviest tiles of two heads last, where nothing is left to fill the SMs with.

    On an H200 at T = 6007 equal groups took 11 % less time; whole tiles are what the model knows.
    """
    rows, heads, sms = -(-6007 // 192), 32, 132

    def work(row: int, column: int) -> float:
        return row + 1.0

    equal = Scheduler("dynamic", consumer_warps=12).makespan(rows, heads, 4, sms, work)
    least = sum(work(row, 0) for row in range(rows)) * heads / sms
    short = list(Scheduler().order(rows, 30, 3)) + [(row, 30 + c) for row, c in Scheduler().order(rows, 2, 1)]
    free = [0.0] * sms
    for place in short:
        free[int(np.argmin(free))] += work(*place)
    assert least <= equal < 0.97 * max(free)
    # Those that take turns do not even out.
    assert Scheduler("static").makespan(rows, heads, 4, sms, work) > equal
    # One kind of work, a whole number of waves: nothing to gain.
    assert Scheduler("one").makespan(11, 12, 1, 132, lambda row, column: 2.0) == 2.0


def test_heavy_tiles_first_end_earlier() -> None:
    def ends(heavy: bool) -> float:
        return Scheduler("one", heavy).makespan(16, 24, 1, 100, lambda row, column: row + 1.0)

    assert ends(True) < ends(False)
