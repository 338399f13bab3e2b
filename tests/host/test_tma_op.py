"""An op whose kernel takes a tensor map: right on the host target under every schedule and sanitizer, and compiled for the GPU."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import pytest
from tma_op import Config, example, kernel, op

import vidrial as vd
from vidrial.build.cubins import cubin_of
from vidrial.build.nvrtc import compile_source
from vidrial.device import Device
from vidrial.errors import ArgumentError, ConfigError, DescriptionError, LaunchError, LayoutError
from vidrial.events import Counts
from vidrial.host import plan as plans
from vidrial.host.plan import RESIDENT_CTAS, HostPlan
from vidrial.host.target import compile_host
from vidrial.layout.access import per_tile
from vidrial.layout.barriers import Barrier, Barriers, Meeting, NamedBarriers, TmaRing
from vidrial.spec.source import Arguments
from vidrial.testing import SCHEDULES, assert_op_correct, poison

KINDS = ((2, "one"), (1, "static"), (3, "dynamic"))
CONFIGS = [Config(rows, stages, consumers, kind) for rows, consumers in ((64, 1), (128, 2)) for stages, kind in KINDS]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_right_at_odd_lengths(config: Config) -> None:
    for t, facts in ((1, {}), (129, {"pad": 8}), (257, {"d": 80, "h": 1}), (300, {"dtype": "float16", "d": 64, "b": 1})):
        problem = example(t=t, **facts)
        plan, inputs = HostPlan(op, problem, config), op.sample(problem, 0)
        expected = op.reference(problem, inputs)
        for schedule in SCHEDULES:
            y = poison((problem.b, t, problem.h), op.outputs(problem)["y"].dtype)
            plan.run({**inputs, "y": y}, schedule)
            assert op.check(problem, inputs, {"y": y}, expected).ok, (problem, schedule)


def test_right_under_every_sanitizer() -> None:
    assert_op_correct(op, [example(t=130)], configs=4)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_boxes_and_bytes_are_counted(config: Config) -> None:
    """By the object; rows beyond the last are asked for and not read. What the kernel touches of memory is x, y and the counter, once each."""
    for d in (128, 72):
        problem = example(t=257, d=d)
        y = poison((problem.b, problem.t, problem.h), vd.DType.float32)
        (stats,) = HostPlan(op, problem, config, "accesses").run({**op.sample(problem, 0), "y": y}).values()
        tiles = -(-problem.t // config.rows) * problem.h * problem.b
        one = per_tile(kernel.resolve(problem, config).Box)
        assert one == Counts(bulk_copies=1, bulk_bytes=config.rows * kernel.resolve(problem, config).X.columns * 2)
        read = problem.b * problem.t * problem.h * d * 2
        assert stats.of("Box") == Counts(bulk_copies=tiles, bulk_bytes=read)
        assert read <= (stats.read_bytes or 0) <= read + 32 * (config.kind == "dynamic")


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_compiled_for_the_gpu(config: Config) -> None:
    cubin = cubin_of(kernel, example(), config, "sm_90a")
    who = kernel.resolve(example(), config).Who
    assert cubin.resources.spill_stores == 0 and cubin.resources.registers <= who.launched


DYNAMIC = Config(64, 3, 1, "dynamic")
EACH = "tile = next(tile, tiles)) {\n"


def planted(monkeypatch: pytest.MonkeyPatch, *edits: tuple[str, str]) -> None:
    compile_host = plans.compile_host

    def compile_wrong(text: str, *arguments: Any, **options: Any) -> Any:
        for right, wrong in edits:
            assert text.count(right) == 1, right
            text = text.replace(right, wrong)
        return compile_host(text, *arguments, **options)

    monkeypatch.setattr(plans, "compile_host", compile_wrong)


def test_tiles_come_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, to few CTAs, more than one to each; what a CTA draws rises, and other orders deal otherwise."""
    planted(monkeypatch, ("= sum;", "= blockIdx.x;"))
    problem, dealt = example(t=500, h=1, b=2), []
    plan, inputs = HostPlan(op, problem, DYNAMIC), op.sample(problem, 0)
    for schedule in (*SCHEDULES, *(dataclasses.replace(SCHEDULES[2], order=seed) for seed in range(6))):
        owners = plan.results(inputs, schedule)["y"].reshape(2, 500)[:, ::64].ravel()
        assert set(owners) <= set(range(RESIDENT_CTAS)) and owners.size == 16
        dealt.append(tuple(owners))
    # In rising order the first CTA draws all that are left.
    assert dealt[0].count(0) == 14
    assert len(set(dealt)) >= 7 and any(min(owners.count(cta) for cta in range(RESIDENT_CTAS)) > 2 for owners in dealt)


def test_a_kernel_that_relies_on_the_order_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the tile after a drawn one for the next draw: right where a CTA draws them all, as on no GPU."""
    guess = "tile = next(tile, tiles)) {\n if (tile > int(gridDim.x)) { if (expected != tile) work(0, 0, 0); }\n expected = tile + 1;\n"
    guess = guess.replace("work(0, 0, 0)", "tile = expected")
    planted(monkeypatch, (EACH, guess), ("  for (int tile = Order::first()", "  int expected = 0;\n  for (int tile = Order::first()"))
    problem = example(t=500)
    inputs = op.sample(problem, 0)
    expected, plan = op.reference(problem, inputs), HostPlan(op, problem, DYNAMIC)
    right = [op.check(problem, inputs, plan.results(inputs, schedule), expected).ok for schedule in SCHEDULES]
    assert right == [True, False, False]


def test_a_counter_that_is_not_zero_is_found() -> None:
    unset = dataclasses.replace(op, workspace=lambda p, c: {"counter": vd.Buffer((1,), vd.DType.int32)})
    problem = example(t=500)
    with pytest.raises(LaunchError, match="the counter of a dynamic schedule is -1 at the first draw; it must be 0 before each launch"):
        HostPlan(unset, problem, DYNAMIC).results(op.sample(problem, 0))


WAITED_FOR = {
    "a ring of more warps than there are": (
        lambda tiles: {"Bars": Barriers(ring=TmaRing((tiles.Box,), 8))},
        "Bars.ring: 8 consumer warps release what a producer warp fills; the CTA has 8 warps with it, and it would wait for ever",
    ),
    "a schedule of more warps than there are": (
        lambda tiles: {"Bars": Barriers(order=vd.layout.Scheduler("dynamic", consumer_warps=8))},
        "Bars.order: 8 consumer warps release",
    ),
    "more arrivals than threads": (
        lambda tiles: {"Bars": Barriers(q=Barrier(257))},
        "Bars.q: a phase of 257 arrivals; the CTA has 256 threads, which would wait for ever",
    ),
    "a meeting of more threads": (
        lambda tiles: {"Turns": NamedBarriers(turn=Meeting(288))},
        "Turns.turn: 288 threads meet at a named barrier; the CTA has 256, which would wait for ever",
    ),
}


@pytest.mark.parametrize("case", WAITED_FOR)
def test_a_barrier_that_nobody_completes_is_refused(case: str) -> None:
    members, said = WAITED_FOR[case]

    def tiles(p: Any, c: Config) -> vd.Tiles:
        right = kernel.tiles(p, c)
        return vd.Tiles(threads=right.threads, smem=right.smem, **{**right.members, **members(right)})

    problem, device = example(), Device.of("h200")
    assert kernel.reject(problem, DYNAMIC, device) is None
    assert str(dataclasses.replace(kernel, tiles=tiles).reject(problem, DYNAMIC, device)).startswith(said)


def test_another_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="Box is a TmaTile, which sm_90a alone has; a100 is sm_80"):
        kernel.check(example(), Config(), Device.of("sm_80"))


def test_strides_that_tma_does_not_take_are_refused() -> None:
    with pytest.raises(ConfigError, match="rows of 258 bytes: TMA takes multiples of 16"):
        kernel.check(example(pad=1), Config(), Device.of("h200"))
    with pytest.raises(LayoutError, match="tensor map of x: 774 bytes from row to row; TMA takes positive multiples of 16 below 2"):
        kernel.tensor_maps(example(pad=1), Config())


def test_maps_and_arguments_must_agree() -> None:
    for maps, said in (
        ({}, "kernel row_sums: maps gives none; its arguments of type TensorMap are x"),
        ({"z": None}, r"kernel row_sums: maps\(\) gives \{'z': None\}, where z is no TensorMap; give name -> TensorMap"),
        (
            {"z": next(iter(kernel.tensor_maps(example(), Config()).values()))[1]},
            "kernel row_sums: maps gives z; its arguments of type TensorMap are x",
        ),
    ):
        other = dataclasses.replace(kernel, maps=lambda p, c, t, maps=maps: maps)  # type: ignore[misc]
        with pytest.raises((ArgumentError, DescriptionError), match=said):
            other.tensor_maps(example(), Config())


def test_the_struct_of_arguments_is_laid_out_as_the_compiler_does() -> None:
    args = Arguments(a="float", k="TensorMap", b="int64_t", c="int[3]", v="TensorMap", p="Elem*")
    assert (args.maps, args.pointers, args.bytes, args.alignment) == ({"k": 64, "v": 256}, {"p": 384}, 448, 64)
    packed = args.pack({"a": 1.5, "b": -1, "c": (1, 2, 3)})
    assert struct.unpack_from("f", packed, 0) == (1.5,) and struct.unpack_from("=q3i", packed, 192) == (-1, 1, 2, 3)
    offsets = {**args.maps, **args.pointers, "b": 192, "c": 200}
    asserts = "".join(f"static_assert(__builtin_offsetof(Args, {name}) == {at});" for name, at in offsets.items())
    source = f"#include <vidrial/prelude.cuh>\n#include <vidrial/arch/tma.cuh>\nusing Elem = float;\n{args.cpp}\n"
    source += f"static_assert(sizeof(Args) == {args.bytes} && alignof(Args) == 64);"
    kernel = 'extern "C" __global__ void k(__grid_constant__ Args const args) {}'
    compile_source(source + kernel, "k", "sm_90a")
    compile_host(source + asserts + kernel, "k")
