"""An op whose kernel takes a tensor map: right on the host target under every schedule and sanitizer, and compiled for the GPU."""

from __future__ import annotations

import dataclasses
import struct

import pytest
from tma_op import Config, example, kernel, op

import vidrial as vd
from vidrial.build.cubins import cubin_of
from vidrial.build.nvrtc import compile_source
from vidrial.device import Device
from vidrial.errors import ArgumentError, ConfigError, LayoutError
from vidrial.events import Counts
from vidrial.host.plan import HostPlan
from vidrial.host.target import compile_host
from vidrial.layout.access import per_tile
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


def test_another_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="Box is a TmaTile, which sm_90a alone has; a100 is sm_80"):
        kernel.check(example(), Config(), Device.of("sm_80"))


def test_strides_that_tma_does_not_take_are_refused() -> None:
    with pytest.raises(ConfigError, match="rows of 258 bytes: TMA takes multiples of 16"):
        kernel.check(example(pad=1), Config(), Device.of("h200"))
    with pytest.raises(LayoutError, match="tensor map of x: 774 bytes from row to row; TMA takes positive multiples of 16 below 2"):
        kernel.tensor_maps(example(pad=1), Config())


def test_maps_and_arguments_must_agree() -> None:
    for maps, said in (({}, "none"), ({"z": None}, "z")):
        other = dataclasses.replace(kernel, maps=lambda p, c, t, maps=maps: maps)  # type: ignore[misc]
        with pytest.raises(ArgumentError, match=f"kernel row_sums: maps gives {said}; its arguments of type TensorMap are x"):
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
