"""What is predicted of each tiled object (passes per instruction, sectors per full tile) and of each launch (`Cost`) is what the host target counts."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from power_states import draw_state

from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.errors import ArgumentError
from vidrial.events import Counts
from vidrial.host.plan import HostPlan, poison
from vidrial.host.target import HostStats, compile_host
from vidrial.kernels.power_retention import attend, scan
from vidrial.kernels.power_retention.op import Config, example
from vidrial.kernels.power_retention.op import op as power_retention
from vidrial.layout.access import Tiled, flops, load_conflicts, per_instruction, per_tile, tiled_objects
from vidrial.layout.atoms import VECTOR, cp_async, ldmatrix
from vidrial.layout.copies import LoadMatrix, LoadVector, TiledCopy
from vidrial.layout.mma import Operand, TiledMma
from vidrial.layout.smem import SmemLayout
from vidrial.layout.wgmma import WarpgroupMma
from vidrial.spec.cost import Cost
from vidrial.spec.op import Op, Stage
from vidrial.spec.registry import find_op
from vidrial.spec.source import Tiles
from vidrial.tune.ranking import Ranking

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(ROOT.glob("sweeps/results/*/power_retention.json"))
H200 = Device.of("h200")
Scan, Attend = scan.Config, attend.Config
NARROW = Config(128, Scan(64, 3, 4, 32, 3), Attend(keys=32, m=2, warps=2, stages=2, blocks=2))
WIDE = Config(128, Scan(32, 4, 8, 64, 1), Attend(keys=64, m=2, warps=4, stages=3, blocks=2))
TALL = Config(256, Scan(128, 3, 4, 32, 1), Attend(keys=32, m=4, warps=2, stages=3, blocks=1))
ONE_CHUNK = Config(0, Scan(), Attend(keys=64, m=2, warps=8, stages=2, blocks=1))
BY_WGMMA = Config(128, Scan(64, 4, 4, 64, 2, 2, "wgmma"), Attend(keys=32, m=2, warps=4, stages=3, blocks=1, mma="wgmma"))
TILES_3 = Config(256, Scan(64, 4, 8, 32, 1, 3, "wgmma"), Attend(keys=64, m=2, warps=8, stages=3, blocks=1, mma="wgmma"))


def run(op: Op, problem: Any, config: Any, sanitizer: str | None = None) -> Mapping[str, HostStats]:
    outputs = {name: poison(buffer.shape, buffer.dtype) for name, buffer in op.outputs(problem).items()}
    return HostPlan(op, problem, config, sanitizer).run({**op.sample(problem, 0), **outputs})


def objects_of(stage: Stage) -> dict[str, Tiled]:
    return tiled_objects(stage.kernel.resolve(stage.problem, stage.config).members)


# Each object by itself: a kernel that issues every instruction that it may issue, once.

KERNEL = """#include <vidrial/prelude.cuh>
{tiles}
struct Args {{ char const* data; int64_t stride; int rows, columns; }};
extern "C" __global__ void each(__grid_constant__ Args const args) {{
  VIDRIAL_SHARED_MEMORY(raw);
  int const thread = threadIdx.x;
  uint32_t const smem = vidrial::shared_address(raw);
  uint32_t r[4] = {{}};
{body}
}}
"""


def issue(name: str, tiled: Tiled) -> Iterator[str]:
    """C++ that loads from each origin at each step, or copies one tile: `rows` and `columns` of it, or all where they are negative."""
    if isinstance(tiled, TiledCopy):
        construct = f"Tiles::{name} copy(reinterpret_cast<Tiles::{name}::T const*>(args.data), args.stride, smem, thread);"
        copies = "if (args.columns >= 0) copy(0, args.rows, args.columns); else if (args.rows < 0) copy.full(0); else copy(0, args.rows);"
        yield f"  if (thread < {tiled.threads}) {{ {construct} {copies} cute::cp_async_wait<0>(); }}"
        return
    load = placed(tiled)
    steps = ", ".join(f"{{{row}, {column}}}" for row, column in load.steps)
    registers = ", ".join(f"r[{i}]" for i in range(load.atom.matrices)) if isinstance(load, LoadMatrix) else "r"
    into = f"step[0], step[1], {registers}" if isinstance(load, LoadVector) else f"0, step[0], step[1], {registers}"
    for row, column in getattr(load, "origins", ((0, 0),)):
        construct = f"Tiles::{name} load(smem, thread, {row}, {column}); static constexpr int steps[][2] = {{{steps}}};"
        yield f"  if (thread < {load.threads}) {{ {construct} for (auto const& step : steps) load({into}); }}"


def placed(tiled: Tiled) -> LoadMatrix | LoadVector | TiledCopy:
    found = tiled.load if isinstance(tiled, Operand) else tiled
    assert isinstance(found, (LoadMatrix, LoadVector, TiledCopy))
    return found


def issue_each(objects: Sequence[Tiled], arguments: Sequence[tuple[int, ...]] = ((0, -1),)) -> Iterator[Mapping[tuple[str, ...], Counts]]:
    """Counts of a kernel that issues what each of the objects may issue, by names "Object0", ...; for each (row stride in elements, rows) or (.., columns)."""
    named = {f"Object{i}": one for i, one in enumerate(objects)}
    body = "\n".join(line for name, one in named.items() for line in issue(name, one))
    threads = max(placed(one).threads for one in objects)
    shared = max(placed(one).tile.bytes * placed(one).tile.stages for one in objects)
    binary = compile_host(KERNEL.format(tiles=Tiles(threads=threads, **named).cpp, body=body), "each", objects=tuple(named))
    memory = np.zeros(1 << 22, np.uint8)
    for stride, rows, *columns in arguments:
        yield binary.launch((1,), threads, shared, struct.pack("=Qqii", 0, stride, rows, *columns or [-1]), {0: memory}).objects


@functools.cache
def shipped() -> tuple[Tiled, ...]:
    """Every object that loads or copies of every config of the rankings that come with Vidrial."""
    found: dict[Tiled, None] = {}
    for path in SHIPPED:
        for data in json.loads(path.read_text())["rankings"]:
            for measured in Ranking.from_json(power_retention, data).measured:
                for ranked in measured.configs:
                    for stage in power_retention.stages(measured.problem, ranked.config):
                        found |= dict.fromkeys(o for o in objects_of(stage).values() if not isinstance(o, (TiledMma, WarpgroupMma)))
    return tuple(found)


def shipped_loads() -> list[LoadMatrix | LoadVector | Operand]:
    return [o for o in shipped() if isinstance(o, (LoadMatrix, LoadVector, Operand))]


def without_swizzle(tiled: LoadMatrix | LoadVector | Operand) -> LoadMatrix | LoadVector | Operand:
    load = placed(tiled)
    flat = dataclasses.replace(
        load, tile=SmemLayout(load.tile.dtype, load.tile.rows, load.tile.columns, swizzle=None, stages=load.tile.stages)
    )
    return dataclasses.replace(tiled, load=flat) if isinstance(tiled, Operand) else flat  # type: ignore[return-value]


def loads_as_predicted(objects: Sequence[LoadMatrix | LoadVector | Operand]) -> None:
    """Each instruction, at every place, takes the passes that are predicted of its object."""
    (counted,) = issue_each(objects)
    for names, n in counted.items():
        instructions = [per_instruction(objects[int(name[6:])]) * load_conflicts(objects[int(name[6:])]).size for name in names]
        assert n == sum(instructions, Counts()), names
    assert sum(len(names) for names in counted) == len(objects)


def test_every_load_of_every_shipped_config() -> None:
    objects = shipped_loads()
    assert len(objects) > 50 and {type(o) for o in objects} == {LoadMatrix, LoadVector, Operand}
    loads_as_predicted(objects)
    assert all(per_instruction(o).ldmatrix_conflicts == per_instruction(o).shared_load_conflicts == 0 for o in objects)


def test_every_load_of_every_shipped_config_without_its_swizzle() -> None:
    objects = [without_swizzle(o) for o in shipped_loads() if placed(o).tile.swizzle is not None]
    loads_as_predicted(objects)
    # Eight rows of a multiple of 128 bytes begin in one bank: 7 passes more for each matrix of an ldmatrix.
    matrices = [o for o in objects if not isinstance(o, LoadVector)]
    assert all(per_instruction(o).ldmatrix_conflicts == 7 * placed(o).atom.matrices for o in matrices)  # type: ignore[union-attr]
    assert {placed(o).atom.matrices for o in matrices} == {2, 4}  # type: ignore[union-attr]
    assert {per_instruction(o).shared_load_conflicts for o in objects if isinstance(o, LoadVector)} == {4}


def test_every_copy_of_every_shipped_config() -> None:
    copies = [o for o in shipped() if isinstance(o, TiledCopy)]
    assert len(copies) > 10
    # Whole tiles and tails; rows that begin in the middle of a sector, every other one.
    arguments = [(128, -1), (4096, -1), (136, -1), (128, 1000), (128, 31), (136, 5), (128, 0)]
    for (stride, rows), counted in zip(arguments, issue_each(copies, arguments), strict=True):
        for names, n in counted.items():
            found = [copies[int(name[6:])] for name in names]
            assert n == sum((per_tile(c, 2 * stride, rows if rows >= 0 else None) for c in found), Counts())
            assert n.at_most(sum((per_tile(c, 2 * stride) for c in found), Counts()))


@pytest.mark.parametrize("size", [16, 8, 4])
def test_copies_in_pieces_with_tails(size: int) -> None:
    """Rows that are aligned to a piece only; of the columns some, of the rows some."""
    copy = TiledCopy(cp_async(size), SmemLayout(DType.bfloat16, 32, 64), 128)
    arguments = [(64, -1, -1), (72, -1, -1), (72, 29, -1), (72, 29, 51), (80, 32, 3), (72, 0, 51), (72, 32, 0)]
    for (stride, rows, columns), counted in zip(arguments, issue_each([copy], arguments), strict=True):
        asked = (rows if rows >= 0 else None, columns if columns >= 0 else None)
        assert counted["Object0",] == per_tile(copy, 2 * stride, *asked)
    # Each piece of a vector is a request of its own, which touches every sector of the rows again.
    assert per_tile(copy).cp_async_requests == 8 * (16 // size) and per_tile(copy).cp_async_bytes == 32 * 128
    assert per_tile(copy).cp_async_sectors == {16: 32 * 4, 8: 2 * 32 * 4, 4: 4 * 32 * 4}[size]


def test_plain_loads_of_elements_are_not_counted() -> None:
    copy = TiledCopy(VECTOR[2], SmemLayout(DType.bfloat16, 32, 64), 128)
    (counted,) = issue_each([copy], [(63, 31, 63)])
    assert counted["Object0",] == per_tile(copy, 126, 31, 63) == Counts(copy_calls=128)


def test_rows_that_do_not_exist_and_odd_strides() -> None:
    copy = TiledCopy(cp_async(16), SmemLayout(DType.bfloat16, 64, 64), 128)
    # A warp copies 4 rows of 128 bytes.
    assert per_tile(copy) == Counts(copy_calls=128, cp_async_requests=16, cp_async_sectors=256, cp_async_bytes=64 * 128)
    assert per_tile(copy, 128, 5) == Counts(copy_calls=128, cp_async_requests=2, cp_async_sectors=20, cp_async_bytes=5 * 128)
    assert per_tile(copy, 128, 0) == Counts(copy_calls=128)
    # Every other row begins in the middle of a sector, and touches one more.
    assert per_tile(copy, 144).cp_async_sectors == 64 * 4 + 32


@pytest.mark.parametrize(("columns", "swizzle", "conflicts"), [(64, "auto", 0), (64, None, 28), (32, None, 12), (24, None, 0)])
def test_conflicts_of_one_load(columns: int, swizzle: Literal["auto"] | None, conflicts: int) -> None:
    tile = SmemLayout(DType.bfloat16, 32, columns, swizzle=swizzle)
    load = LoadMatrix(tile, ldmatrix(4), 32, lambda lane: (lane, 0))
    assert per_instruction(load) == Counts(ldmatrix=1, ldmatrix_conflicts=conflicts)
    loads_as_predicted([load])


# Whole launches

FULL: dict[str, tuple[dict[str, Any], Config]] = {
    "four chunks in three segments": ({"t": 512, "h": 2, "d": 32}, NARROW),
    "wide, grouped": ({"t": 256, "h": 1, "hq": 3, "d": 64}, WIDE),
    "tall, two batches": ({"t": 512, "b": 2, "h": 1, "d": 32}, TALL),
    "no gates, no sum, fp16, E < D": (
        {"t": 256, "h": 1, "d": 64, "e": 32, "gated": False, "normalize": "none", "dtype": "float16"},
        dataclasses.replace(NARROW, scan=dataclasses.replace(NARROW.scan, segments=1)),
    ),
    "one chunk": ({"t": 512, "h": 2, "d": 64}, ONE_CHUNK),
    "degree 4": ({"t": 128, "h": 1, "d": 64, "degree": 4}, dataclasses.replace(ONE_CHUNK, attend=NARROW.attend)),
    "wgmma": ({"t": 512, "h": 1, "hq": 2, "d": 64}, BY_WGMMA),
}


def assert_predicted(stage: Stage, stats: HostStats, full: bool) -> None:
    """Of each object: passes of its instructions, and sectors of its tiles, or at most these."""
    objects = objects_of(stage)
    assert {name for names in stats.objects for name in names} == set(objects)
    assert sum(stats.objects.values(), Counts()) == Counts(*(getattr(stats, f.name) for f in dataclasses.fields(Counts)))
    for names, n in stats.objects.items():
        if not names:
            continue
        one = objects[names[0]]
        assert all(objects[name].cpp == one.cpp for name in names)
        if isinstance(one, TiledCopy):
            tiles, rest = divmod(n.copy_calls, one.threads)
            assert rest == 0 and n.at_most(per_tile(one) * tiles)
            assert not full or n == per_tile(one) * tiles
        else:
            issued = n.mma + n.wgmma + n.ldmatrix + n.shared_loads
            assert n == per_instruction(one) * issued


@pytest.mark.parametrize("case", FULL)
def test_power_retention(case: str) -> None:
    keywords, config = FULL[case]
    for t, full in ((keywords["t"], True), (keywords["t"] + 5, False)):
        problem = example(**{**keywords, "t": t})
        stats = run(power_retention, problem, config)
        for stage in power_retention.stages(problem, config):
            assert_predicted(stage, stats[stage.kernel.name], full)
        by_wgmma = config.attend.mma == "wgmma"
        attended = stats["power_attend"]
        assert (attended.wgmma > 0, attended.mma > 0) == (by_wgmma, not by_wgmma)
        assert attended.of("CopyQ").cp_async_bytes > 0 and attended.of("QK") != attended.of("PS")
        assert all(n.ldmatrix_conflicts == n.shared_load_conflicts == 0 for n in stats.values())


def test_a_kernels_own_copies_count_as_no_objects() -> None:
    """The decay: 16 bytes of `to_end` by each of 64 / 4 threads, for each block of 64 tokens and CTA of the scan."""
    problem = example(t=512, h=1, d=32)
    stage = next(s for s in power_retention.stages(problem, NARROW) if s.kernel is scan.power_scan)
    blocks = 3 * 2 * stage.kernel.grid(stage.problem, stage.config)[0]
    own = run(power_retention, problem, NARROW)["power_scan"].objects[()]
    assert own == Counts(cp_async_requests=blocks, cp_async_sectors=8 * blocks, cp_async_bytes=256 * blocks)


def test_objects_of_one_type_count_together() -> None:
    stats = run(power_retention, example(t=257, h=1, d=64), WIDE)["power_scan"]
    assert ("CopyK", "CopyV") in stats.objects and stats.of("CopyK") is stats.of("CopyV")
    with pytest.raises(ArgumentError, match=r"object 'CopyX' was not counted; accepted: .*CopyK, CopyV"):
        stats.of("CopyX")


def test_no_swizzle_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernel with tiles that have no swizzle: it computes the same, and meets banks again and again."""
    monkeypatch.setattr(attend, "SmemLayout", lambda *sizes, stages=1: SmemLayout(*sizes, swizzle=None, stages=stages))
    flat = dataclasses.replace(attend.power_attend)
    problem = example(t=263, h=1, d=64)

    def stages(p: Any, c: Any) -> list[Any]:
        return [dataclasses.replace(s, kernel=flat if s.kernel.name == flat.name else s.kernel) for s in power_retention.stages(p, c)]

    op = dataclasses.replace(power_retention, stages=stages)
    config = dataclasses.replace(NARROW, scan=dataclasses.replace(NARROW.scan, segments=1))
    found = run(op, problem, config)["power_attend"]
    assert_predicted(stages(problem, config)[-1], found, full=False)
    assert found.ldmatrix_conflicts == 28 * found.ldmatrix > 0
    assert found.of("RowsI").shared_load_conflicts == 4 * found.of("RowsI").shared_loads > 0


def test_softmax_moves_nothing_that_is_counted() -> None:
    op = find_op(f"{ROOT / 'examples/softmax/softmax.py'}:op")
    problem = op.example(m=5, n=64)
    for values in ((32, 2, 1, 0), (128, 1, 1, 4)):
        config = op.config(*values)
        stats = run(op, problem, config, "accesses")["softmax"]
        assert stats.objects == {(): Counts()}
        # x is read once and y written, each once, however often the kernel goes over a row.
        assert (stats.read_bytes, stats.written_bytes) == (5 * 64 * 4, 5 * 64 * 4)
    assert (run(op, problem, config)["softmax"].read_bytes, run(op, problem, config)["softmax"].written_bytes) == (None, None)


BYTES = """#include <vidrial/prelude.cuh>
struct Args { float const* x; float* y; float* z; };
extern "C" __global__ void bytes(__grid_constant__ Args const args) {
  int const t = threadIdx.x;
  args.y[t] = args.x[8 * t] + args.x[8 * t];
  __syncthreads();
  if (t == 0) args.y[31] += args.y[0];
  if (t < 8) args.z[t] = args.z[t] + (t == 5);
}
"""


def test_bytes_are_those_of_distinct_sectors() -> None:
    x, y, z = np.ones(512, np.float32), np.zeros(32, np.float32), np.zeros(16, np.float32)
    stats = compile_host(BYTES, "bytes", sanitizer="accesses").launch((1,), 32, 0, bytes(24), {0: x, 8: y, 16: z})
    # 32 sectors of x; z's first one, before it is written. What of y is read has been written before.
    assert (stats.read_bytes, stats.written_bytes) == (32 * 32 + 32, 32 * 4 + 32)
    assert y[31] == 4 and z[5] == 1


# What ranks configs

# Cost against counts: relative; what is beyond are a sector of the gates' table per chunk, and the outputs' padding.
BYTES_TOLERANCE = 0.005
SIZES = (
    {"t": 129, "h": 2, "d": 64},
    {"t": 263, "h": 1, "hq": 2, "d": 32},
    {"t": 389, "h": 2, "d": 32, "e": 64},
    {"t": 515, "h": 1, "d": 64, "e": 32},
    {"t": 701, "h": 1, "hq": 3, "d": 64},
)
COSTED = {
    "narrow": NARROW,
    "narrow, one segment": dataclasses.replace(NARROW, scan=dataclasses.replace(NARROW.scan, segments=1)),
    "wide": WIDE,
    "tall": TALL,
    "one chunk": ONE_CHUNK,
    "wgmma": BY_WGMMA,
    "wgmma, three tiles": TILES_3,
    "attend by wgmma": dataclasses.replace(BY_WGMMA, scan=NARROW.scan),
}


def issued_flops(stage: Stage, stats: HostStats) -> int:
    objects = objects_of(stage)
    mmas = ((objects[names[0]], n) for names, n in stats.objects.items() if names)
    return sum(flops(one, n) for one, n in mmas if isinstance(one, (TiledMma, WarpgroupMma)))


def disagreements(stage: Stage, stats: HostStats, cost: Cost) -> list[str]:
    """Where a cost is not what was counted."""
    assert stats.read_bytes is not None and stats.written_bytes is not None
    found = []
    if cost.flops != issued_flops(stage, stats):
        found.append(f"{stage.kernel.name}: {cost.flops} FLOP, {issued_flops(stage, stats)} counted")
    touched = stats.read_bytes + stats.written_bytes
    if abs(cost.bytes - touched) > BYTES_TOLERANCE * touched:
        found.append(f"{stage.kernel.name}: {cost.bytes} bytes, {touched} counted")
    return found


def cost_of(stage: Stage) -> Cost:
    assert stage.kernel.cost is not None
    return stage.kernel.cost(stage.problem, stage.config, H200)


@pytest.mark.parametrize(
    ("sizes", "gated"),
    [*((sizes, False) for sizes in SIZES), *((sizes, True) for sizes in SIZES[2::2])],
    ids=lambda x: f"t={x['t']}" if isinstance(x, dict) else "gated" if x else "ungated",
)
def test_costs_are_what_is_counted(sizes: dict[str, int], gated: bool) -> None:
    """Of every kernel, under all configs that are legal; gates forget nothing altogether within such lengths."""
    problem, launched = example(**sizes, gated=gated), []
    for config in COSTED.values():
        if power_retention.reject(problem, config, H200) is None:
            stats = run(power_retention, problem, config, "accesses")
            for stage in power_retention.stages(problem, config):
                assert disagreements(stage, stats[stage.kernel.name], cost_of(stage)) == []
                launched.append(stage.kernel.name)
    assert launched.count("power_attend") >= 2


def test_every_kernel_has_had_its_cost_counted() -> None:
    """All that the op launches, each at several sizes: what `test_costs_are_what_is_counted` goes through is not empty."""
    plain = [example(**sizes) for sizes in SIZES]
    with_states = [with_state(problem) for problem in plain[:3]]  # of test_costs_with_states_are_what_is_counted
    cases = [*itertools.product(plain, COSTED.values()), *itertools.product(with_states, (NARROW, WIDE))]
    names = [
        {s.kernel.name for s in power_retention.stages(problem, config)}
        for problem, config in cases
        if power_retention.reject(problem, config, H200) is None
    ]
    for kernel in power_retention.kernels:
        assert sum(kernel.name in launched for launched in names) >= 2, kernel.name


def with_state(problem: Any) -> Any:
    """A state comes before the first token, and the one behind the last is asked for."""
    return dataclasses.replace(problem, initial=True, final=True)


@pytest.mark.parametrize("gated", [False, True])
def test_costs_with_states_are_what_is_counted(gated: bool) -> None:
    """Of power_states, too."""
    launched = []
    for sizes in SIZES[:3]:
        plain = example(**sizes, gated=gated)
        problem, arrays = with_state(plain), power_retention.sample(plain, 0)
        arrays |= {f"initial_{name}": x.astype(np.float32) for name, x in zip("sz", draw_state(1, arrays), strict=True)}
        op = dataclasses.replace(power_retention, sample=lambda p, seed, arrays=arrays: arrays)
        for config in (NARROW, WIDE):
            if op.reject(problem, config, H200) is None:
                stats = run(op, problem, config, "accesses")
                for stage in op.stages(problem, config):
                    assert disagreements(stage, stats[stage.kernel.name], cost_of(stage)) == []
                    launched.append(stage.kernel.name)
    assert launched.count("power_states") >= 2


def wrong_attends() -> dict[str, Callable[[Stage, Cost], Cost]]:
    def triangle(stage: Stage, cost: Cost) -> Cost:
        p, c = stage.problem, stage.config
        thrown_away = 2 * p.b * p.hq * (c.rows_per_band * c.rows_per_band / 2) * (p.d + p.e) * (p.t // c.rows_per_band)
        return dataclasses.replace(cost, flops=cost.flops - thrown_away)

    def twice(name: str) -> Callable[[Stage, Cost], Cost]:
        return lambda s, cost: dataclasses.replace(
            cost, bytes=cost.bytes + s.problem.b * s.problem.t * s.problem.h * 2 * getattr(s.problem, name)
        )

    return {"half of the diagonal": triangle, "k twice": twice("d"), "v twice": twice("e")}


@pytest.mark.parametrize("wrong", wrong_attends())
def test_a_wrong_cost_is_found(wrong: str) -> None:
    problem = example(t=389, h=1, d=64, gated=False)
    stats = run(power_retention, problem, WIDE, "accesses")["power_attend"]
    stage = power_retention.stages(problem, WIDE)[-1]
    right = cost_of(stage)
    assert disagreements(stage, stats, right) == []
    assert len(disagreements(stage, stats, wrong_attends()[wrong](stage, right))) == 1


def test_what_the_gates_have_forgotten_is_not_counted_on() -> None:
    problem = example(t=389, h=1, d=32)

    def sample(p: Any, seed: int) -> dict[str, Any]:
        inputs = power_retention.sample(p, seed)
        return inputs | {"log_g": inputs["log_g"] - np.float32(3)}

    forgetful = run(dataclasses.replace(power_retention, sample=sample), problem, NARROW)["power_attend"]
    mindful = run(power_retention, problem, NARROW)["power_attend"]
    stage = power_retention.stages(problem, NARROW)[-1]
    assert 0 < issued_flops(stage, forgetful) < 0.7 * cost_of(stage).flops == 0.7 * issued_flops(stage, mindful)
    assert 0 < forgetful.cp_async_bytes < 0.7 * mindful.cp_async_bytes
