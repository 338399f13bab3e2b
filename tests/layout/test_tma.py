"""TMA's boxes against the manual's swizzle tables; what TMA cannot take is refused by name; barriers, roles and their registers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from vidrial.dtypes import DType
from vidrial.errors import LayoutError
from vidrial.layout.algebra import Swizzle
from vidrial.layout.barriers import Barrier, Barriers, Meeting, NamedBarriers, Roles, TmaRing
from vidrial.layout.schedule import Scheduler
from vidrial.layout.smem import SharedMemory, SmemLayout
from vidrial.layout.tma import TensorMap, TmaTile

BF16, FLOAT = DType.bfloat16, DType.float32
# Of the 16-byte columns of a row, by bytes of the swizzle: in row r, column c lies at c ^ (this of r).
MANUAL = {128: lambda r: r % 8, 64: lambda r: r // 2 % 4, 32: lambda r: r // 4 % 2}


def landed(box: TmaTile, stored: Any) -> Any:
    """Shared memory, element by element, after every box of a tile [row, column] has come."""
    tile, size = box.tile, box.tile.dtype.bytes
    memory = np.full(tile.bytes // size, -1)
    vector = 16 // size
    span = {3: 128, 2: 64, 1: 32, 0: 0}[box.swizzle_bits]
    for block in range(box.blocks):
        part = stored[:, block * box.block : (block + 1) * box.block]
        for row, chunk in itertools.product(range(tile.rows), range(box.block // vector)):
            to = chunk ^ MANUAL[span](row) if span else chunk
            at = (block * tile.rows + row) * box.block + to * vector
            memory[at : at + vector] = part[row, chunk * vector : (chunk + 1) * vector]
    return memory


TILES = [
    *(SmemLayout(BF16, rows, columns) for rows in (8, 24, 64, 256) for columns in (16, 32, 48, 64, 80, 96, 128, 192, 256)),
    *(SmemLayout(BF16, rows, columns, swizzle=None) for rows, columns in ((8, 8), (16, 40), (24, 256))),
    SmemLayout(FLOAT, 32, 32, swizzle=Swizzle(3, 2, 3)),
    SmemLayout(FLOAT, 16, 64),
]


@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t.rows}x{t.columns}-{t.dtype}")
@pytest.mark.parametrize("column_tail", [False, True])
def test_a_box_lies_as_the_tile_does(tile: SmemLayout, column_tail: bool) -> None:
    box = TmaTile(tile, column_tail=column_tail)
    stored = np.arange(tile.rows * tile.columns).reshape(tile.rows, tile.columns)
    row, column = np.ogrid[: tile.rows, : tile.columns]
    assert np.array_equal(landed(box, stored)[tile.offset(row, column)], stored)
    assert box.bytes == tile.rows * tile.columns * tile.dtype.bytes == box.boxes * np.prod(box.box) * tile.dtype.bytes


REFUSED: dict[str, tuple[Any, str]] = {
    "another swizzle": (
        lambda: TmaTile(SmemLayout(BF16, 64, 64, swizzle=Swizzle(2, 3, 3))),
        "TMA lays a box out otherwise; it takes swizzle='auto'",
    ),
    "a shifted swizzle": (lambda: TmaTile(SmemLayout(BF16, 64, 64, swizzle=Swizzle(3, 3, 4))), "TMA lays a box out otherwise"),
    "rows over the box": (lambda: TmaTile(SmemLayout(BF16, 264, 64)), r"a box of \(64, 264\); TMA takes at most 256"),
    "columns over the box": (lambda: TmaTile(SmemLayout(BF16, 8, 264, swizzle=None)), "TMA takes at most 256"),
    "rank 6": (lambda: TmaTile(SmemLayout(BF16, 64, 128), ("a", "b", "c")), "a box of rank 6; TMA has at most 5"),
    "rows of 8 bytes": (lambda: TmaTile(SmemLayout(BF16, 64, 4)), "a row of the box is 8 bytes; TMA takes multiples of 16"),
    "a box off the period": (lambda: TmaTile(SmemLayout(BF16, 4, 128), column_tail=True), "take a multiple of 8 rows|take 8 n rows"),
    "another number of dimensions": (lambda: tensor((64, 64, 3), (64,)), "it has row, column; got shape"),
    "no rows": (lambda: tensor((0, 64), (64,)), "tensor map of k: 0 along row; TMA takes 1 to"),
    "an odd stride": (
        lambda: tensor((65, 64), (65,)),
        "tensor map of k: 130 bytes from row to row; TMA takes positive multiples of 16 below 2",
    ),
    "a negative stride": (lambda: tensor((65, 64), (-64,)), "-128 bytes from row to row"),
    "an expanded row": (lambda: tensor((65, 64), (0,)), "0 bytes from row to row"),
    "a huge stride": (lambda: tensor((65, 64), (1 << 40,)), "bytes from row to row; TMA takes positive multiples of 16 below 2"),
    "an odd offset": (lambda: tensor((65, 64), (64,), offset=3), "it begins 6 bytes into the array; TMA takes multiples of 16"),
    "columns in part of a block": (
        lambda: TensorMap(TmaTile(SmemLayout(BF16, 64, 128)), "k", (65, 120), (128,)),
        "120 columns are not whole blocks of 64; give the TmaTile column_tail=True",
    ),
    "a ragged map without an end": (lambda: TensorMap.ragged(box(1), "k", (65, 64), (64,), 40), "a last dimension for a sequence's end"),
    "no tile": (lambda: TmaRing((), 4), "a ring of tiles of .* stages; give tiles that all have the same number"),
    "other stages": (lambda: TmaRing((box(2), box(3)), 4), r"a ring of tiles of \[2, 3\] stages"),
    "no reader": (lambda: TmaRing((box(2),), 0), "a ring that 0 warps read"),
    "bulk bytes": (lambda: TmaRing((box(2),), 4, bulk_bytes=8), "8 bytes by bulk copies; these bring multiples of 16"),
    "a barrier of none": (lambda: Barrier(0), "1 barriers of 0 arrivals"),
    "no barrier": (lambda: Barriers(k=3), "barriers k: 3; accepted: a TmaRing, a Barrier, a Scheduler"),  # type: ignore[arg-type]
    "part of a warp": (lambda: Meeting(100), "1 named barriers of 100 threads; give at least one, of whole warps"),
    "16 names": (lambda: NamedBarriers(a=Meeting(128, 8), b=Meeting(64, 8)), "16 named barriers: a CTA has 15"),
    "four consumers with 120": (
        lambda: Roles(1, 4, (24, 120)),
        r"registers \(24, 120\): 1 x 24 and 4 x 120 per thread of a warpgroup are 64512; the launch takes 96 x 640 = 61440",
    ),
    "registers of no unit": (
        lambda: Roles(1, 2, (24, 236)),
        "236 registers per consumer thread; accepted are multiples of 8 from 24 to 256",
    ),
    "too few for a producer": (lambda: Roles(1, 2, (16, 240)), "16 registers per producer thread"),
    "a producer that takes": (lambda: Roles(1, 2, (176, 176)), "the launch gives 168 per thread; producers may keep at most so many"),
    "nine warpgroups": (
        lambda: Roles(1, 8),
        "1 producing and 8 consuming warpgroups, 1 such CTAs; accepted: 1 or more of each, at most 8 warpgroups in a CTA",
    ),
    "another schedule": (lambda: Scheduler("guided"), "a schedule of kind 'guided'; accepted: 'one', 'static', 'dynamic'"),  # type: ignore[arg-type]
    "a dynamic one without readers": (lambda: Scheduler("dynamic"), "give consumer_warps"),
    "no tiles": (lambda: list(Scheduler().order(0, 3, 1)), "0 x 3 tiles in 1 groups"),
    "too many groups": (lambda: list(Scheduler().order(2, 3, 4)), "1 to 3 groups"),
}


def box(stages: int) -> TmaTile:
    return TmaTile(SmemLayout(BF16, 64, 64, stages=stages))


def tensor(shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> TensorMap:
    return TensorMap(box(1), "k", shape, strides, offset)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(LayoutError, match=message):
        make()


def test_a_map_has_true_lengths_and_strides() -> None:
    """[b, t, h, d], t odd, as a model stores it, k the second of three packed ones; an extent of 1 may have any stride."""
    b, t, h, d = 2, 1021, 3, 128
    made = TensorMap(TmaTile(SmemLayout(BF16, 64, d), ("head", "batch")), "qkv", (t, d, h, b), (3 * h * d, d, t * 3 * h * d), h * d)
    assert made.dims == (64, t, 2, h, b) and made.byte_strides == (3 * h * d * 2, 128, d * 2, t * 3 * h * d * 2)
    one = TensorMap(TmaTile(SmemLayout(BF16, 64, d), ("head", "batch")), "q", (t, d, 1, 1), (d, 7, 0))
    assert one.byte_strides == (2 * d, 128, 16, 16)
    tail = TensorMap(TmaTile(SmemLayout(BF16, 64, d), column_tail=True), "k", (t, 100), (104,))
    assert tail.dims == (100, t) and tail.byte_strides == (208,) and tail.tile.box == (64, 64)


@pytest.mark.parametrize(
    ("roles", "launched", "reallocated"),
    [
        (Roles(1, 1), 256, (256, 256)),
        (Roles(1, 2), 168, (24, 240)),
        (Roles(1, 3), 128, (32, 160)),
        (Roles(1, 4), 96, (32, 112)),
        (Roles(1, 1, ctas=2), 128, (24, 232)),
        (Roles(1, 2, (40, 232)), 168, (40, 232)),
    ],
    ids=str,
)
def test_registers_by_role(roles: Roles, launched: int, reallocated: tuple[int, int]) -> None:
    """What the pool gives, to the last register that is a multiple of 8; those of 2 to 4 consumers ran on an H200."""
    assert (roles.launched, roles.reallocated) == (launched, reallocated)
    producer, consumer = reallocated
    assert 128 * (roles.producer * producer + roles.consumers * consumer) <= roles.pool == launched * roles.threads <= 65536
    assert (
        roles.cpp
        == f"vidrial::Roles<1, {roles.consumers}, {0 if producer == launched else producer}, {0 if consumer == launched else consumer}, {roles.ctas}>"
    )


def test_barriers_lie_one_behind_the_other() -> None:
    made = Barriers(
        k=TmaRing((box(3), box(3)), 8), q=Barrier(1, count=2), order=Scheduler("dynamic", consumer_warps=8), static=Scheduler("static")
    )
    assert made.offsets == {"k": 0, "q": 48, "order": 64, "static": 104} and made.bytes == 104
    assert SharedMemory(x=box(3).tile, bars=made.bytes).offset("bars") % 8 == 0
    text = made.declare("Bars")
    for line in (
        "using k = vidrial::TmaRing<3, 16384, 8, 0, 24>;",
        "using q = vidrial::Barrier<2, 1, 48>;",
        "using order = vidrial::Scheduler<vidrial::Schedule::Dynamic, true, 8, 64>;",
        'k::init(region, "k.full", "k.empty"); q::init(region, "q"); order::init(region, "order.full", "order.empty");',
    ):
        assert line in text
    named = NamedBarriers(turn=Meeting(256, count=2), vote=Meeting(128, count=3))
    assert named.ids == {"turn": 1, "vote": 3}
    assert "using vote = vidrial::NamedBarrier<3, 3, 128>;" in named.declare("Named")
