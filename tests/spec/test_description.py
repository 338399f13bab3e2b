"""Mistakes in the description of a kernel or an op are said where they are made: by the example of several launches, each altered in one place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.errors import ArgumentError, ArgumentTypeError, DescriptionError, VidrialError
from vidrial.host.check import check
from vidrial.host.plan import HostPlan, poison
from vidrial.spec.geometry import Geometry
from vidrial.spec.op import Op
from vidrial.spec.registry import resolve

SCAN = Path(__file__).parents[2] / "examples/scan/scan.py"
H200 = Device.of("h200")


@pytest.fixture(scope="module")
def scan() -> ModuleType:
    op = resolve(f"{SCAN}:op")
    return sys.modules[op.problem.__module__]


def with_first_stage(op: Op, **changes: Any) -> Op:
    def stages(p: object, c: object) -> tuple[Any, ...]:
        first, *others = op.stages(p, c)
        return replace(first, **changes), *others

    return replace(op, stages=stages)


MISTAKES: dict[str, tuple[Callable[[Op], Op], str]] = {
    "a kernel that is not declared": (
        lambda op: replace(op, kernels=op.kernels[1:]),
        r"op scan: the stage of scan_sums launches a kernel that is not among the op's \(scan_offsets, scan_add\); name it",
    ),
    "a part that there is not": (
        lambda op: with_first_stage(op, part="sum"),
        r"the stage of scan_sums has part='sum'; parts of Config: sums, offsets, add; declare it",
    ),
    "a part's config without the part": (
        lambda op: with_first_stage(op, part=""),
        r"the stage of scan_sums takes its config from part sums and has part=''; give part='sums'",
    ),
    "another part's config": (
        lambda op: with_first_stage(op, part="add"),
        r"the stage of scan_sums takes its config from part sums and has part='add'; give part='sums'",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_stages_are_those_that_the_op_declares(scan: ModuleType, mistake: str) -> None:
    alter, said = MISTAKES[mistake]
    config = scan.Config(sums=scan.Threads(64), offsets=scan.Threads(128), add=scan.Threads(256))
    scan.op.check_config(scan.example(t=300), config, H200)
    with pytest.raises(ArgumentError, match=said):
        alter(scan.op).check_config(scan.example(t=300), config, H200)


def test_parts_that_share_a_config_keep_their_own_names(scan: ModuleType) -> None:
    one = scan.Threads(64)
    scan.op.check_config(scan.example(t=300), scan.Config(sums=one, offsets=one, add=one), H200)


@dataclass
class Thawed:
    t: int = 1


@pytest.mark.parametrize("field", ["problem", "config"])
@pytest.mark.parametrize("kind", [Thawed, dict])
def test_problems_and_configs_are_frozen_dataclasses(scan: ModuleType, field: str, kind: type) -> None:
    said = rf"{field} '{kind.__name__}' is no frozen dataclass; write @dataclass\(frozen=True\)"
    with pytest.raises(ArgumentTypeError, match=f"op scan: {said}"):
        replace(scan.op, **{field: kind})
    kernel = scan.sums
    arguments = {name: getattr(kernel, name) for name in ("name", "template", "problem", "config", "args", "tiles", "grid")}
    with pytest.raises(ArgumentTypeError, match=f"kernel scan_sums: {said}"):
        type(kernel)(**{**arguments, field: kind})


@pytest.mark.parametrize("grid", [5, (5, 1), [5, 1, 1], None])
def test_a_grid_is_three_counts(grid: object) -> None:
    with pytest.raises(ArgumentError, match="is not three counts of CTAs"):
        Geometry(grid, 32)  # type: ignore[arg-type]


def test_the_host_target_refuses_a_grid_that_is_none(scan: ModuleType) -> None:
    op = with_first_stage(scan.op, kernel=replace(scan.sums, grid=lambda p, c: p.b))
    with pytest.raises(DescriptionError, match=r"kernel scan_sums: grid\(\) gives 2, which is not three counts of CTAs"):
        run(op, scan)


def run(op: Op, scan: ModuleType) -> None:
    problem = scan.example(t=300, b=2)
    HostPlan(op, problem, scan.Config()).run({**op.sample(problem, 0), "y": poison((2, 300), DType.float32)})


def test_a_pointer_without_an_array_is_named(scan: ModuleType) -> None:
    op = replace(scan.op, workspace=lambda p, c: {"sums": scan.workspace(p, c)["sums"], "offset": scan.workspace(p, c)["offsets"]})
    with pytest.raises(VidrialError, match=r"scan_offsets.*Segmentation(.|\n)*null pointers, for which the op has no .*name: offsets"):
        run(op, scan)


def test_an_array_that_is_too_small_is_named(scan: ModuleType) -> None:
    op = replace(scan.op, workspace=lambda p, c: {**scan.workspace(p, c), "sums": example_buffer(scan)})
    with pytest.raises(
        VidrialError, match=r"scan_sums: array sums was written right behind its end \(it has 4 bytes; AddressSanitizer has the line\)"
    ) as raised:
        run(op, scan)
    assert "null pointers" not in str(raised.value)


def example_buffer(scan: ModuleType) -> Any:
    return scan.vd.Buffer((1,), DType.float32)


@pytest.mark.parametrize("dtype", ["float64", "int64"])
def test_a_sample_that_no_call_takes_is_refused_before_it_runs(scan: ModuleType, dtype: str) -> None:
    op = replace(scan.op, sample=lambda p, seed: {"x": np.ones((p.b, p.t), dtype)})
    with pytest.raises(ArgumentTypeError, match=f"scan: its sample gives x as {dtype}, which no call takes; accepted: float16, float32"):
        check(op, [scan.example(t=5, b=1)], 1, (None,))
