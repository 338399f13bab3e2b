"""The backward pass by wgmma: the same kernels as on a Hopper GPU, on the host target, against gradients in float64."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from back_host import FEW_KEYS, NARROW, USUAL, Arrays, Config, Gradient, run, with_gates, wrong
from planting import planted
from power_host import PARTS

from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.errors import LaunchError
from vidrial.host import plan as plans
from vidrial.host.plan import HostPlan, poison
from vidrial.host.target import SCHEDULES, Schedule
from vidrial.kernels.power_retention.back.op import example, forward_pass, op, sample
from vidrial.kernels.power_retention.back.scan_wgmma import Config as AdjointWgmma
from vidrial.kernels.power_retention.back.tokens_wgmma import Config as TokensWgmma
from vidrial.spec.op import Buffer
from vidrial.tune.pick import choose_config

H200 = Device.of("h200")
KEPT = TokensWgmma(block=32, warps=4, stages=4, blocks=2, dx="registers")
SHARED = TokensWgmma(block=32, warps=4, stages=2, blocks=3)
TWO = replace(SHARED, warps=8, stages=3, blocks=1)
SCAN = AdjointWgmma(tokens=64, stages=4, warps=4, columns=64, segments=1, tiles=5)
# Features kept in registers, and over dy in shared memory.
BOTH = replace(NARROW, mma="wgmma", adjoint_wgmma=SCAN, query_wgmma=KEPT, keys_wgmma=SHARED)
WHOLE = replace(BOTH, chunk=0, query_wgmma=SHARED)
APART = replace(BOTH, query_wgmma=replace(SHARED, blocks=1), keys_wgmma=replace(SHARED, blocks=1))

CASES: dict[str, tuple[dict[str, Any], Config]] = {
    "attention form, grouped by 3, E > D": ({"t": 193, "h": 1, "hq": 3, "d": 32, "e": 64}, WHOLE),
    "attention form, degree 4": ({"t": 129, "h": 1, "d": 32, "degree": 4}, replace(WHOLE, keys_wgmma=replace(SHARED, blocks=2))),
    "grouped by 2": ({"t": 389, "h": 1, "hq": 2, "d": 32}, BOTH),
    "two warpgroups, no gates, no sum": (
        {"t": 200, "h": 1, "d": 64, "gated": False, "normalize": "none"},
        replace(BOTH, query_wgmma=TWO, keys_wgmma=TWO),
    ),
    "fp16, E > D": ({"t": 261, "h": 1, "hq": 2, "d": 32, "e": 64, "dtype": "float16"}, APART),
    "D = 64": ({"t": 261, "h": 1, "d": 64}, BOTH),
}


@pytest.mark.parametrize("case", CASES)
def test_kernels(case: str) -> None:
    keywords, config = CASES[case]
    p = example(**keywords)
    inputs = sample(p, 2)
    assert not wrong(p, inputs, run(p, config, inputs), bounds=FEW_KEYS if p.degree == 4 else USUAL)


@pytest.mark.parametrize("t", [1, 2, 63, 65, 127, 129, 257, 641])
def test_odd_lengths(t: int) -> None:
    p = example(t=t, h=1, hq=2, d=32)
    inputs = sample(p, t)
    assert not wrong(p, inputs, run(p, BOTH if t > 128 else WHOLE, inputs), bounds=USUAL if t > 2 else FEW_KEYS)


@pytest.mark.parametrize("kind", ["open", "short", "mixed", "closed"])
def test_gates(kind: str) -> None:
    p = example(t=389, h=1, hq=2, d=32)
    inputs = with_gates(p, 5, kind)
    assert not wrong(p, inputs, run(p, BOTH, inputs), bounds=USUAL if kind in ("open", "short") else FEW_KEYS)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_schedules_change_no_bit(schedule: Schedule) -> None:
    p = example(t=389, h=1, hq=2, d=32)
    inputs = sample(p, 4)
    first, again = run(p, BOTH, inputs), run(p, BOTH, inputs, schedule)
    assert all((first[name] == again[name]).all() for name in first)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers(sanitizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kernels by wgmma alone: test_back_host has the others."""
    compile_host = plans.compile_host

    def compile_watched(text: str, entry: str, *, sanitizer: str | None, **options: Any) -> Any:
        return compile_host(text, entry, sanitizer=sanitizer if entry in (QUERY, KEYS) else None, **options)

    monkeypatch.setattr(plans, "compile_host", compile_watched)
    p = example(t=261, h=1, d=32)
    inputs = sample(p, 9)
    assert not wrong(p, inputs, run(p, BOTH, inputs, sanitizer=sanitizer))


def test_calls_take_what_was_measured() -> None:
    """Until a ranking says otherwise; sweeps and whoever names it reach wgmma."""
    p = example(t=65536, d=64)
    assert choose_config(op, p, H200).config.mma == op.predicted(p, H200).mma == "sync"
    assert choose_config(op, p, H200, (("mma", "wgmma"),)).config.mma == "wgmma"
    assert next(op.ranked(p, H200)).config.mma == "wgmma"


# The adjoint alone: the scan, and what it takes of the stages before it.


def adjoint(p: Gradient, config: Config, inputs: Arrays, schedule: Schedule = SCHEDULES[0]) -> np.ndarray:
    """[heads, chunks, snapshot] in float32; that behind the last chunk, which nobody writes, 0."""
    buffer = op.workspace(p, config)["adjoint"]
    scanned = dataclasses.replace(
        op,
        stages=lambda p, c: [s for s in op.stages(p, c) if "adjoint" in s.part or s.kernel.name in ("power_gates", "power_back_rows")],
        outputs=lambda p: {"adjoint": Buffer(buffer.shape, buffer.dtype)},
        workspace=lambda p, c: {name: b for name, b in op.workspace(p, c).items() if name != "adjoint"},
    )
    found = poison(buffer.shape, buffer.dtype)
    HostPlan(scanned, p, config).run({**inputs, "adjoint": found}, schedule)
    found[:, -1] = 0
    return DType.bfloat16.widen(found)


def scan_case(normalize: str = "sum") -> tuple[Gradient, Arrays]:
    p = example(t=701, h=1, hq=2, d=64, e=32, normalize=normalize)
    inputs = sample(p, 6)
    inputs["log_g"] *= np.float32(0.3)
    return p, inputs | forward_pass(p, inputs)


NARROW_SCAN = replace(BOTH, adjoint_wgmma=replace(SCAN, columns=32, tiles=3))
SEGMENTED = replace(NARROW_SCAN, adjoint_wgmma=replace(NARROW_SCAN.adjoint_wgmma, segments=3))


@cache
def by_sync(normalize: str) -> np.ndarray:
    return adjoint(scan_case(normalize)[0], NARROW, scan_case(normalize)[1])


def off(found: np.ndarray, normalize: str = "sum") -> float:
    """The worst relative error of a chunk's L, or of its M, over mma.sync's."""
    p, exact = scan_case(normalize)[0], by_sync(normalize)
    parts = [slice(p.d * p.d), slice(p.d * p.d, None)] if p.normalized else [slice(None)]
    norm = lambda x: np.linalg.norm(x, axis=-1)  # noqa: E731
    return float(max((norm(found[:, :-1, s] - exact[:, :-1, s]) / norm(exact[:, :-1, s])).max() for s in parts))


# Both round a query's weight, its products and the snapshot to bf16, in other orders.
ADJOINT_BOUND = 6e-3


@pytest.mark.parametrize(
    ("config", "normalize"),
    [
        (NARROW_SCAN, "sum"),
        (SEGMENTED, "sum"),
        (replace(NARROW_SCAN, adjoint_wgmma=replace(SEGMENTED.adjoint_wgmma, segments=5, warps=8, tiles=2)), "none"),
    ],
)
def test_the_adjoint_is_that_of_mma_sync(config: Config, normalize: str) -> None:
    p, inputs = scan_case(normalize)
    assert off(adjoint(p, config, inputs), normalize) <= ADJOINT_BOUND


# One change of the device code each, which the bounds or the host target must see: header, what stands there, what stands there instead, and the
# kernel that is compiled with it.
QUERY, KEYS, SCANNED, CARRY = (f"power_back_{name}" for name in ("query_wgmma", "keys_wgmma", "scan_wgmma", "carry"))
WRONG = {
    "a diagonal tile once": ("power_back_wgmma", "d0 += 2.f * low;", "d0 += low;", QUERY),
    "the tile that runs": ("power_back_wgmma", "two[(after - 1) % 2]", "two[after % 2]", QUERY),
    "a block of features left out": ("power_back_wgmma", "c.x[0][i][2 * h] += sum.x;", "", QUERY),
    "the same stage": ("power_back_wgmma", "if (after % kTiles == 0) place", "if (after % kTiles == 1) place", QUERY),
    "phi written while it is read": ("power_back_wgmma", "wait<1>();                        // phi", "wait<2>();  // phi", KEYS),
    "dy not restored": ("power_back_wgmma", "if constexpr (Tiles::dx_over_w) restore(fw);", "", KEYS),
    "a stage refilled while it is read": (
        "power_back_wgmma",
        "wait<0>();                            // the stage",
        "wait<1>();  // the stage",
        KEYS,
    ),
    "bands of a warp": ("power_back_tile", "Mma::kAsync ? __shfl_sync(~0u, thread / 128, 0) : thread / 32", "thread / 32", KEYS),
}
WRONG_SCAN = {
    "M weighed as L": ("power_back_scan_wgmma", "? p.from_start : p.from_start_z", "? p.from_start : p.from_start", SCANNED),
    "one head of the group": ("power_back_scan_wgmma", "% p.h * p.group + head, batch", "% p.h * p.group, batch", SCANNED),
    "the decay of another chunk": ("power_back_scan_wgmma", "chunks + chunks - n)", "chunks + n + 1)", SCANNED),
    "chunks from the first one on": (
        "power_back_scan_wgmma",
        "chunk(segment.chunks - 1 - segment.first)",
        "chunk(segment.chunks - 1)",
        SCANNED,
    ),
    "segments not joined over two": ("power_join", "add[i] + decay * carry[i]", "add[i]", CARRY),
    "a segment's decay from the first chunk on": ("power_back_carry", "chunks + chunks - n)", "chunks + n + 1)", CARRY),
}


@pytest.fixture
def patched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One kernel of all plans with one wrong line in it."""
    name, right, instead, kernel = (WRONG | WRONG_SCAN)[request.param]
    includes, compile_host = planted(tmp_path, name, right, instead, PARTS, "power_retention"), plans.compile_host

    def compile_wrong(text: str, entry: str, *, include_dirs: tuple[str, ...], **options: Any) -> Any:
        folders = (*includes, *include_dirs) if entry == kernel else include_dirs
        return compile_host(f"{text}\n// {request.param}" if entry == kernel else text, entry, include_dirs=folders, **options)

    monkeypatch.setattr(plans, "compile_host", compile_wrong)


def planted_case() -> tuple[Gradient, Arrays]:
    p = example(t=389, h=1, hq=2, d=32)
    inputs = sample(p, 12)
    inputs["log_g"] *= np.float32(0.3)
    return p, inputs | forward_pass(p, inputs)


PLANTED = replace(BOTH, query_wgmma=replace(KEPT, stages=3), keys_wgmma=replace(SHARED, blocks=2))


@pytest.mark.parametrize("patched", WRONG, indirect=True)
def test_a_wrong_kernel_is_found(patched: None) -> None:
    p, inputs = planted_case()
    try:
        found = wrong(p, inputs, run(p, PLANTED, inputs), bounds=FEW_KEYS)
    except LaunchError:
        return
    assert found


@pytest.mark.parametrize("patched", WRONG_SCAN, indirect=True)
def test_a_wrong_scan_is_found(patched: None) -> None:
    p, inputs = scan_case()
    assert off(adjoint(p, SEGMENTED, inputs)) > 2 * ADJOINT_BOUND


def test_the_right_kernels_are_not() -> None:
    p, inputs = planted_case()
    assert not wrong(p, inputs, run(p, PLANTED, inputs), bounds=USUAL)
