"""The example GEMM: any m, n and k by both instructions, on the host target; what it costs; and that it compiles for what it claims."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from vidrial.build.cubins import cubin_of
from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.errors import ArgumentError, LaunchError
from vidrial.host.plan import HostPlan, poison
from vidrial.host.target import SCHEDULES, HostStats, Schedule
from vidrial.layout.access import flops, tiled_objects
from vidrial.spec.registry import resolve

GEMM = Path(__file__).parents[2] / "examples/gemm/gemm.py"
H200 = Device.of("h200")
# What else a config says, by instruction.
SMALL = {
    "sync": {"rows": 64, "columns": 64, "depth": 32, "stages": 3},
    "wgmma": {"rows": 64, "columns": 64, "depth": 64, "stages": 3, "mma": "wgmma"},
}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    op = resolve(f"{GEMM}:op")
    return sys.modules[op.problem.__module__]


def config_for(example: ModuleType, problem: Any, **choices: Any) -> Any:
    """A config with these choices, for rows that are aligned as this problem's are."""
    config = example.Config(load=example.aligned(problem.k), store=example.aligned(problem.n), **choices)
    assert example.op.reject(problem, config, H200) is None
    return config


def run(example: ModuleType, problem: Any, config: Any, schedule: Schedule = SCHEDULES[0]) -> tuple[Any, HostStats]:
    """The check of one launch, into rows that are NaN before, and what it did."""
    inputs = example.op.sample(problem, seed=problem.m)
    outputs = {"c": poison((problem.m, problem.n), problem.dtype)}
    stats = HostPlan(example.op, problem, config).run({**inputs, **outputs}, schedule)
    return example.op.check(problem, inputs, outputs, example.op.reference(problem, inputs)), stats["gemm"]


# One element; less than a tile; tiles and tails in every direction; rows aligned to 16, 8, 4 and 2 bytes, of A and B and of C.
SIZES = [(1, 1, 1), (3, 8, 16), (70, 130, 72), (64, 64, 64), (131, 68, 100), (65, 129, 66), (67, 66, 131), (129, 72, 264)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mma", SMALL)
def test_every_size(example: ModuleType, mma: str, size: tuple[int, int, int]) -> None:
    m, n, k = size
    for dtype, bias, gelu in (("bfloat16", True, True), ("float16", False, False)):
        problem = example.example(m=m, n=n, k=k, dtype=dtype, bias=bias, gelu=gelu)
        found, _ = run(example, problem, config_for(example, problem, **SMALL[mma]))
        assert found.ok, f"{problem}: {found}"


@pytest.mark.parametrize(
    "choices",
    [
        {"rows": 128, "columns": 128, "warps": 8, "depth": 64, "stages": 4},
        {"rows": 256, "columns": 64, "warps": 8, "depth": 32, "stages": 5},
        {"rows": 128, "columns": 128, "mma": "wgmma"},
        {"rows": 128, "columns": 256, "warps": 8, "depth": 32, "stages": 5, "mma": "wgmma"},
        {"rows": 256, "columns": 64, "depth": 32, "stages": 4, "mma": "wgmma"},
    ],
    ids=str,
)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_larger_tiles_under_every_schedule(example: ModuleType, choices: dict[str, Any], schedule: Schedule) -> None:
    problem = example.example(m=259, n=140, k=332, gelu=True)
    found, _ = run(example, problem, config_for(example, problem, **choices), schedule)
    assert found.ok, found


@pytest.mark.parametrize("mma", SMALL)
def test_cost_is_what_is_counted(example: ModuleType, mma: str) -> None:
    for m, n, k in ((131, 72, 264), (64, 136, 72), (65, 129, 131)):
        problem = example.example(m=m, n=n, k=k)
        config = config_for(example, problem, **SMALL[mma])
        outputs = {"c": poison((m, n), problem.dtype)}
        stats = HostPlan(example.op, problem, config, "accesses").run({**example.op.sample(problem, 0), **outputs})["gemm"]
        cost, objects = example.cost(problem, config, H200), tiled_objects(example.tiles(problem, config).members)
        assert flops(objects["Mma"], stats.of("Mma")) == cost.flops > 0
        assert stats.read_bytes is not None and stats.written_bytes is not None
        # Whole sectors are counted, 32 bytes at each array's end at most.
        assert 0 <= stats.read_bytes + stats.written_bytes - cost.bytes <= 4 * 31
        assert stats.ldmatrix_conflicts == 0


def test_the_widest_copies_are_legal_alone(example: ModuleType) -> None:
    for k, load in ((64, 16), (100, 8), (66, 4), (131, 2)):
        problem = example.example(m=64, n=k, k=k)
        assert example.op.predicted(problem, H200).load == example.op.predicted(problem, H200).store == load
        for other in {16, 8, 4, 2} - {load}:
            wrong = dataclasses.replace(example.op.predicted(problem, H200), load=other)
            assert f"rows of k={k} elements are aligned to {load} bytes" in example.op.reject(problem, wrong, H200)


def test_rules_say_why(example: ModuleType) -> None:
    problem = example.example(m=64, n=64, k=64)
    for choices, reason in (
        ({"columns": 256}, "4 warps store 16 bytes each of 128 columns at most"),
        ({"rows": 256, "columns": 128}, "other registers per thread; there are 255"),
        ({"mma": "wgmma", "rows": 64, "warps": 8}, "each of 2 warpgroups makes multiples of 64"),
        ({"stages": 5, "blocks": 2}, "bytes of shared memory; an SM has"),
    ):
        assert reason in example.op.reject(problem, example.Config(**choices), H200)
    assert "wgmma is an instruction of sm_90a" in example.op.reject(problem, example.Config(mma="wgmma"), Device.of("a100"))
    assert "float32 is not served" in example.op.reject(example.example(dtype="float32"), example.Config(), H200)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_compiles_without_spills(example: ModuleType, arch: str) -> None:
    for load, mma, warps, gelu in (
        (16, "sync", 4, False),
        (4, "sync", 8, True),
        *[(16, "wgmma", 4, True), (2, "wgmma", 8, True)] * (arch == "sm_90a"),
    ):
        problem = example.example(n=4096 + load // 2, k=4096 + load // 2, gelu=gelu)
        config = example.Config(load=load, store=load, mma=mma, warps=warps)
        cubin = cubin_of(example.kernel, problem, config, arch)
        assert (cubin.resources.spill_stores, cubin.resources.spill_loads) == (0, 0) and "serialized" not in cubin.log
        assert cubin.resources.registers <= 255


# One change of the template each, which the check or the host target must see.
WRONG = {
    "no tail of k": ("int const left = args.k - step * Tiles::depth;", "int const left = Tiles::depth;"),
    "rows of A that do not exist": ("copy_a(stage * kA, args.m - row, left);", "copy_a(stage * kA, Tiles::rows, left);"),
    "the next step's A": ("copy_a.source += Tiles::depth;", "copy_a.source += Tiles::depth / 2;"),
    "the last step left out": ("step < steps; ++step", "step < steps - 1; ++step"),
    "not waited for": ("  Mma::wait<0>();\n", ""),
    "a stage refilled while it is read": ("    Mma::wait<1>(); ", "    "),
    "columns that do not exist": ("args.n - column, [&]", "Tiles::columns, [&]"),
    "no bias": ("if (Tiles::biased) x +=", "if (Tiles::biased) 0.f +"),
    "another row's bias": ("(float x, int, int j)", "(float x, int j, int)"),
    "no GELU": ("vidrial::gelu(x) : x", "x : x"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_template_is_found(example: ModuleType, mistake: str, tmp_path: Path) -> None:
    right, wrong = WRONG[mistake]
    text = example.kernel.template.read_text()
    assert text.count(right) == 1
    template = tmp_path / "gemm.cu.j2"
    template.write_text(text.replace(right, wrong))
    planted = dataclasses.replace(example.kernel, template=template)
    op = dataclasses.replace(example.op, stages=lambda p, c: [dataclasses.replace(s, kernel=planted) for s in example.op.stages(p, c)])
    problem = example.example(m=67, n=66, k=460, gelu=True)
    config, inputs = config_for(example, problem, **SMALL["wgmma"]), example.op.sample(problem, 1)
    outputs = {"c": poison((problem.m, problem.n), problem.dtype)}
    # What is read beyond an array's end, and then not stored, AddressSanitizer sees.
    plan = HostPlan(op, problem, config, "address" if mistake == "rows of A that do not exist" else None)
    try:
        plan.run({**inputs, **outputs})
    except LaunchError:
        return
    assert not example.op.check(problem, inputs, outputs, example.op.reference(problem, inputs)).ok


def test_check_refuses_a_wrong_element(example: ModuleType) -> None:
    problem = example.example(m=5, n=9, k=33, dtype="float16")
    inputs = example.op.sample(problem, 0)
    expected = example.op.reference(problem, inputs)
    exact = expected["c"].astype(np.float16)
    assert example.op.check(problem, inputs, {"c": exact}, expected).ok
    for wrong in (np.nan, exact[4, 8] + 2.0**-8):
        c = exact.copy()
        c[4, 8] = wrong
        assert not example.op.check(problem, inputs, {"c": c}, expected).ok


@pytest.mark.parametrize("shape", [(5, 7, 9), (1, 1, 1), (33, 24, 40)])
def test_public_function(example: ModuleType, shape: tuple[int, int, int]) -> None:
    (m, n, k), rng = shape, np.random.default_rng(3)
    a, b, bias = (rng.standard_normal(s).astype(np.float16) for s in ((m, k), (n, k), (n,)))
    x = a.astype(float) @ b.astype(float).T
    np.testing.assert_allclose(example.linear(a, b), x, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(example.linear(np.asfortranarray(a), b, bias), x + bias, rtol=1e-3, atol=1e-2)
    x = x + bias
    gelu = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(example.linear(a, b, bias, gelu=True), gelu, rtol=1e-3, atol=1e-2)


def test_public_function_refuses(example: ModuleType) -> None:
    a, b = np.zeros((3, 8), np.float16), np.zeros((5, 8), np.float16)
    for wrong in ((a, b[:, :7]), (a, b[0]), (a, b, np.zeros(4, np.float16)), (a, b, np.zeros((5, 1), np.float16))):
        with pytest.raises(ArgumentError, match=r"accepted: a \[m, k\], b \[n, k\] and, if given, bias \[n\]"):
            example.linear(*wrong)
    with pytest.raises(ArgumentError, match="dtypes float16, float32; accepted: bfloat16 or float16, the same for all"):
        example.linear(a, b.astype(np.float32))
    with pytest.raises(ArgumentError, match="m=3, n=5, k=0; accepted: at least one of each"):
        example.linear(a[:, :0], b[:, :0])
    assert example.example().dtype is DType.bfloat16
