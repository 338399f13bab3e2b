"""The example GEMM: any m, n and k by both instructions and by TMA, on the host target; what it costs; and that it compiles for what it claims."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from machine_code import disassemble, drains_in_loops, faults

from vidrial.build.cubins import build_many, cubin_of
from vidrial.build.nvrtc import Cubin
from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.errors import ArgumentError, LaunchError, LayoutError
from vidrial.host.plan import HostPlan, poison
from vidrial.host.target import SCHEDULES, HostStats, Schedule
from vidrial.layout.access import flops, tiled_objects
from vidrial.layout.barriers import Barriers, TmaRing
from vidrial.spec.registry import resolve
from vidrial.spec.source import Tiles

GEMM = Path(__file__).parents[2] / "examples/gemm/gemm.py"
H200 = Device.of("h200")
# What else a config says, by instruction.
SMALL = {
    "sync": {"rows": 64, "columns": 64, "depth": 32, "stages": 3},
    "wgmma": {"rows": 64, "columns": 64, "depth": 64, "stages": 3, "mma": "wgmma"},
    "tma": {"rows": 128, "columns": 64, "stages": 3, "mma": "tma"},
}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    op = resolve(f"{GEMM}:op")
    return sys.modules[op.problem.__module__]


def config_for(example: ModuleType, problem: Any, **choices: Any) -> Any:
    """A config with these choices, for rows that are aligned as this problem's are."""
    choices = {"load": example.aligned(problem.k), "store": example.aligned(problem.n), **choices}
    if choices.get("mma") == "tma":
        config = example.Paths(by="tma", tma=example.ByTma(**choices))
    else:
        config = example.Paths(threads=example.Config(**choices))
    assert example.op.reject(problem, config, H200) is None
    return config


def run(example: ModuleType, problem: Any, config: Any, schedule: Schedule = SCHEDULES[0]) -> tuple[Any, HostStats]:
    """The check of one launch, into rows that are NaN before, and what it did."""
    inputs = example.op.sample(problem, seed=problem.m)
    outputs = {"c": poison((problem.m, problem.n), problem.dtype)}
    (stats,) = HostPlan(example.op, problem, config).run({**inputs, **outputs}, schedule).values()
    return example.op.check(problem, inputs, outputs, example.op.reference(problem, inputs)), stats


# One element; less than a tile; tiles and tails in every direction; rows aligned to 16, 8, 4 and 2 bytes, of A and B and of C.
SIZES = [(1, 1, 1), (3, 8, 16), (70, 130, 72), (64, 64, 64), (131, 68, 100), (65, 129, 66), (67, 66, 131), (129, 72, 264)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mma", ["sync", "wgmma"])
def test_every_size(example: ModuleType, mma: str, size: tuple[int, int, int]) -> None:
    m, n, k = size
    for dtype, bias, gelu in (("bfloat16", True, True), ("float16", False, False)):
        problem = example.example(m=m, n=n, k=k, dtype=dtype, bias=bias, gelu=gelu)
        found, _ = run(example, problem, config_for(example, problem, **SMALL[mma]))
        assert found.ok, f"{problem}: {found}"


# Rows of k that TMA takes. One element; tails of 1, 7, 63, 65, 129 and 257; less than a step of k, one, some and a tail.
TMA_SIZES = [(1, 1, 8), (7, 65, 64), (63, 7, 72), (65, 63, 136), (129, 257, 264), (257, 129, 8), (64, 128, 128), (200, 96, 1000)]
TMA_TILES = [
    {"rows": 128, "columns": 256},
    {"rows": 256, "columns": 128, "stages": 3, "side": 4},
    {"rows": 192, "columns": 96, "warps": 12, "stages": 5},
    {"rows": 64, "columns": 160, "warps": 4, "stages": 3, "blocks": 2},
]


@pytest.mark.parametrize("size", TMA_SIZES, ids=str)
def test_every_size_by_tma(example: ModuleType, size: tuple[int, int, int]) -> None:
    m, n, k = size
    for dtype, bias, gelu in (("bfloat16", True, True), ("float16", False, False)):
        problem = example.example(m=m, n=n, k=k, dtype=dtype, bias=bias, gelu=gelu)
        for choices in (SMALL["tma"], TMA_TILES[m % 4]):
            found, _ = run(example, problem, config_for(example, problem, **{**choices, "mma": "tma"}))
            assert found.ok, f"{problem} {choices}: {found}"


@pytest.mark.parametrize("choices", TMA_TILES, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_tma_under_every_schedule(example: ModuleType, choices: dict[str, Any], schedule: Schedule) -> None:
    problem = example.example(m=259, n=140, k=328, gelu=True)
    found, _ = run(example, problem, config_for(example, problem, mma="tma", **choices), schedule)
    assert found.ok, found


def test_a_cta_takes_tile_after_tile(example: ModuleType) -> None:
    """More tiles than CTAs, in groups of columns of which the last is narrower: the ring runs on from tile to tile, parities and all."""
    problem = example.example(m=1030, n=1100, k=136)
    config = config_for(example, problem, rows=64, columns=64, warps=4, stages=3, side=4, mma="tma")
    assert (example.tma_grid(problem, config.tma)[0], example.grid(problem, config.tma)) == (132, (18, 17, 1))
    found, stats = run(example, problem, config)
    assert found.ok, found
    assert stats.bulk_copies == 2 * 17 * 18 * 3


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
    for m, n, k in ((131, 72, 264), (64, 136, 72), (65, 129, 136 if mma == "tma" else 131)):
        problem = example.example(m=m, n=n, k=k)
        config = config_for(example, problem, **SMALL[mma])
        outputs = {"c": poison((m, n), problem.dtype)}
        (stats,) = HostPlan(example.op, problem, config, "accesses").run({**example.op.sample(problem, 0), **outputs}).values()
        (stage,) = example.op.stages(problem, config)
        cost, objects = example.cost(problem, stage.config, H200), tiled_objects(stage.kernel.resolve(problem, stage.config).members)
        assert flops(objects["Mma"], stats.of("Mma")) == cost.flops > 0
        assert stats.read_bytes is not None and stats.written_bytes is not None
        # Whole sectors are counted, 32 bytes at each array's end at most.
        assert 0 <= stats.read_bytes + stats.written_bytes - cost.bytes <= 4 * 31
        assert stats.ldmatrix_conflicts == 0


def test_the_widest_copies_are_legal_alone(example: ModuleType) -> None:
    for k, load in ((64, 16), (100, 8), (66, 4), (131, 2)):
        problem = example.example(m=64, n=k, k=k)
        best = example.op.predicted(problem, H200, {"by": "threads"})
        assert best.threads.load == best.threads.store == load
        for other in {16, 8, 4, 2} - {load}:
            wrong = dataclasses.replace(best, threads=dataclasses.replace(best.threads, load=other))
            assert f"rows of k={k} elements are aligned to {load} bytes" in example.op.reject(problem, wrong, H200)


def test_rows_that_tma_cannot_take_are_the_other_path_s(example: ModuleType) -> None:
    for k in (4095, 4098, 4100, 7):
        problem, config = example.example(m=64, n=64, k=k), example.Paths(by="tma")
        assert f"load=16: rows of k={k} elements are aligned to" in example.op.reject(problem, config, H200)
        assert example.op.predicted(problem, H200).by == "threads"
        with pytest.raises(LayoutError, match="TMA takes positive multiples of 16"):
            example.tma_kernel.tensor_maps(problem, config.tma)
    for m, n, k in ((4096, 4096, 4096), (257, 4096, 4096), (4000, 4104, 4088)):
        problem = example.example(m=m, n=n, k=k)
        assert example.op.predicted(problem, H200).by == "tma" and example.op.predicted(problem, Device.of("a100")).by == "threads"


def test_rules_say_why(example: ModuleType) -> None:
    problem = example.example(m=64, n=64, k=64)
    for choices, reason in (
        ({"columns": 256}, "4 warps store 16 bytes each of 128 columns at most"),
        ({"rows": 256, "columns": 128}, "other registers per thread; there are 255"),
        ({"mma": "wgmma", "rows": 64, "warps": 8}, "each of 2 warpgroups makes multiples of 64"),
        ({"stages": 5, "blocks": 2}, "bytes of shared memory; an SM has"),
    ):
        assert reason in example.kernel.reject(problem, example.Config(**choices), H200)
    for choices, reason in (
        ({"rows": 64}, "each of 2 warpgroups makes multiples of 64"),
        ({"rows": 256}, "256 accumulators and 32 other registers per thread; there are 240"),
        ({"rows": 192, "warps": 12}, "128 accumulators of one instruction, 24 other registers; the launch gives 128"),
        ({"stages": 5}, "bytes of shared memory: a CTA has"),
        ({"columns": 128, "warps": 4, "blocks": 2}, "2 CTAs of at least 131072 bytes of shared memory: an SM has"),
    ):
        assert reason in example.tma_kernel.reject(problem, example.ByTma(**choices), H200)
    a100 = Device.of("a100")
    assert "wgmma is an instruction of sm_90a" in example.kernel.reject(problem, example.Config(mma="wgmma"), a100)
    assert "TMA and wgmma are instructions of sm_90a" in example.tma_kernel.reject(problem, example.ByTma(), a100)
    assert "float32 is not served" in example.op.reject(example.example(dtype="float32"), example.Paths(), H200)


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
        assert faults(cubin, wgmma=mma == "wgmma", tma=False) == [] and cubin.resources.registers <= 255


# What a call may pick, or was measured to be fastest: of each tile, with bias and GELU and without, rows of C aligned to 16 and to 2 bytes.
PICKED = [
    (256, 128, 4, 8),
    (128, 256, 4, 8),
    (256, 208, 3, 8),
    (128, 192, 4, 8),
    (192, 192, 4, 12),
    (128, 128, 6, 8),
    (64, 208, 5, 4),
    (64, 64, 3, 4),
]


def test_what_is_picked_of_tma_runs_on_as_it_is_written(example: ModuleType) -> None:
    sources = {}
    for rows, columns, stages, warps in PICKED:
        for dtype, full, n in (("bfloat16", False, 4096), ("float16", True, 4095)):
            problem = example.example(n=n, dtype=dtype, bias=full, gelu=full)
            config = example.ByTma(rows=rows, columns=columns, stages=stages, warps=warps, store=example.aligned(n))
            assert example.tma_kernel.reject(problem, config, H200) is None
            sources[config, dtype] = example.tma_kernel.source(problem, config), str(config)
    for what, cubin in build_many(sources, "sm_90a", jobs=2):
        assert isinstance(cubin, Cubin), cubin
        assert faults(cubin, wgmma=True, tma=True) == [], what
        assert drains_in_loops(disassemble(cubin.image)) == 0, what


# One change of the template each, which the check or the host target must see.
WRONG = {
    "no tail of k": ("int const left = args.k - step * Tiles::depth;", "int const left = Tiles::depth;"),
    "rows of A that do not exist": ("copy_a(stage * kA, args.m - row, left);", "copy_a(stage * kA, Tiles::rows, left);"),
    "the next step's A": ("copy_a.source += Tiles::depth;", "copy_a.source += Tiles::depth / 2;"),
    "the last step left out": (
        "; ++step) {\n    int const stage = ring.next(copy);",
        " - 1; ++step) {\n    int const stage = ring.next(copy);",
    ),
    "not waited for": ("  Mma::wait<0>();\n  c.fence();\n  finish", "  c.fence();\n  finish"),
    "a stage refilled while it is read": ("    Mma::wait<1>();                    //", "    //"),
    "columns that do not exist": ("args.n - column, [&]", "Tiles::columns, [&]"),
    "no bias": ("if (Tiles::biased) x +=", "if (Tiles::biased) 0.f +"),
    "another row's bias": ("(float x, int, int j)", "(float x, int j, int)"),
    "no GELU": ("vidrial::gelu(x) : x", "x : x"),
}


# The same of the path by TMA, and what is said of it: a deadlock names the barrier, a wrong result says how far it is off.
TMA_WRONG = {
    "a stage released before its product is done": (
        "      Mma::wait<1>();                // the product of the step before: its stage is free\n",
        "",
        "was overwritten before the wait",
    ),
    "a stage released at once": ("if (step > 0) ring.release();", "ring.release();", "was overwritten before the wait"),
    "stages never released": ("if (step > 0) ring.release();", "", "wait for barrier ring.empty[0]"),
    "the last stage never released": (
        "      ring.release();                  // the producer is on its way into the next tile\n",
        "",
        "wait for barrier ring.empty[0]",
    ),
    "not waited for": (
        "      Mma::wait<0>();\n      c.fence();\n      ring.release();",
        "      c.fence();\n      ring.release();",
        "was overwritten before the wait",
    ),
    "the next step's A": ("row, step * Tiles::depth);", "row, step * Tiles::depth / 2);", "relative="),
    "columns of B for rows of A": ("vidrial::kEvictNormal, row,", "vidrial::kEvictNormal, column,", "relative="),
    "only A is loaded": (
        "          Tiles::BoxB::load(args.b, full, sB + stage * kB, vidrial::kEvictNormal, column, step * Tiles::depth);\n",
        "",
        "wait for barrier ring.full[0]",
    ),
    "the same stage again": ("sB + stage * kB,", "sB,", "tma_load of b"),
    "one step too few": ("steps = (args.k + Tiles::depth - 1) / Tiles::depth, tiles", "steps = args.k / Tiles::depth, tiles", "relative="),
    "one tile for each CTA": ("tile = Bars::order::following(tile, tiles)", "tile = tiles", "relative="),
    "the first group's rows": ("row + group * (Tiles::rows", "row + 0 * (Tiles::rows", "relative="),
    "one staging tile for all groups": ("smem + Tiles::Smem::C + group * Tiles::C::kBytes", "smem + Tiles::Smem::C", "relative="),
    "stored before all have put": ("Tiles::Named::stored::sync(group);", "", "relative="),
    "barriers not initialised": ("    Bars::init(bars);\n", "", "no barrier was initialised"),
    "two producers": ("if (warp == 0) each_tile", "if (warp < 2) each_tile", "barrier ring.full[0]: an arrival more than"),
}


def planted_op(example: ModuleType, kernel: str, **changes: Any) -> Any:
    """The op, with another template or other maps of one kernel."""
    planted = dataclasses.replace(getattr(example, kernel), **changes)

    def stages(p: Any, c: Any) -> list[Any]:
        return [dataclasses.replace(s, kernel=planted if s.kernel.name == planted.name else s.kernel) for s in example.op.stages(p, c)]

    return dataclasses.replace(example.op, stages=stages)


def found_out(op: Any, problem: Any, config: Any, sanitizer: str | None = None) -> str:
    """What the host target or the check says of a launch, "" if nothing."""
    inputs = op.sample(problem, 1)
    outputs = {"c": poison((problem.m, problem.n), problem.dtype)}
    try:
        HostPlan(op, problem, config, sanitizer).run({**inputs, **outputs})
    except LaunchError as error:
        return str(error)
    found = op.check(problem, inputs, outputs, op.reference(problem, inputs))
    return "" if found.ok else str(found)


def altered(example: ModuleType, folder: Path, right: str, wrong: str) -> Path:
    """The template with one change."""
    text = example.kernel.template.read_text()
    assert text.count(right) == 1
    template = folder / "gemm.cu.j2"
    template.write_text(text.replace(right, wrong))
    return template


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_template_is_found(example: ModuleType, mistake: str, tmp_path: Path) -> None:
    op = planted_op(example, "kernel", template=altered(example, tmp_path, *WRONG[mistake]))
    problem = example.example(m=67, n=66, k=460, gelu=True)
    # What is read beyond an array's end, and then not stored, AddressSanitizer sees.
    sanitizer = "address" if mistake == "rows of A that do not exist" else None
    assert found_out(op, problem, config_for(example, problem, **SMALL["wgmma"]), sanitizer)


@pytest.fixture(scope="module")
def many_tiles(example: ModuleType) -> tuple[Any, Any]:
    """A problem of more tiles than CTAs, whose last step of k is a tail."""
    problem = example.example(m=1030, n=1990, k=200, gelu=True)
    return problem, config_for(example, problem, rows=128, columns=64, stages=3, mma="tma")


@pytest.mark.parametrize("mistake", TMA_WRONG)
def test_a_wrong_template_by_tma_is_found(example: ModuleType, many_tiles: tuple[Any, Any], mistake: str, tmp_path: Path) -> None:
    right, wrong, said = TMA_WRONG[mistake]
    op = planted_op(example, "tma_kernel", template=altered(example, tmp_path, right, wrong))
    assert said in found_out(op, *many_tiles)


def test_wrong_maps_and_bytes_are_found(example: ModuleType, many_tiles: tuple[Any, Any]) -> None:
    """Tails that are not zero: rows or columns said to exist that do not; and a ring that expects other bytes than come."""
    problem, config = many_tiles

    def maps(p: Any, c: Any, t: Any, **wrong: Any) -> Any:
        right = example.maps(p, c, t)
        return {name: dataclasses.replace(map, **wrong) if name == "a" else map for name, map in right.items()}

    def tiles(p: Any, c: Any) -> Any:
        right = example.tma_tiles(p, c)
        ring = TmaRing((right.BoxA, right.BoxB), right.Roles.consumer_warps, bulk_bytes=16)
        return Tiles(
            threads=right.threads, smem=right.smem, **{**right.members, "Bars": Barriers(ring=ring, order=right.Bars.members["order"])}
        )

    assert not found_out(planted_op(example, "tma_kernel", maps=maps), problem, config)
    for wrong in ({"shape": (problem.m, problem.k + 64)}, {"strides": (problem.k + 8,)}, {"shape": (problem.m - 1, problem.k)}):
        planted = planted_op(example, "tma_kernel", maps=functools.partial(maps, **wrong))
        assert found_out(planted, problem, config), wrong
    assert "ring.full" in found_out(planted_op(example, "tma_kernel", tiles=tiles), problem, config)


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
    with pytest.raises(ArgumentError, match="dtypes float16, float32; accepted: one for all"):
        example.linear(a, b.astype(np.float32))
    with pytest.raises(ArgumentError, match="m=3, n=5, k=0; accepted: at least one of each"):
        example.linear(a[:, :0], b[:, :0])
    assert example.example().dtype is DType.bfloat16
