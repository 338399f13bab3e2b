"""The kernels of power retention themselves, compiled for the CPU and run thread by thread, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from power_host import assert_right, late_error, plant, run

import vidrial
from vidrial.host.target import SCHEDULES, Schedule
from vidrial.kernels.power_retention import power_retention
from vidrial.kernels.power_retention.attend import Config as Attend
from vidrial.kernels.power_retention.op import RELATIVE_BOUND, Config, check, example, reference, sample
from vidrial.kernels.power_retention.scan import Config as Scan

# Both sides of a comparison of two results are rounded to 16 bits and made of bf16 products.
TWO_RESULTS = 2 * RELATIVE_BOUND

NARROW = Config(128, Scan(tokens=64, stages=3, warps=4, columns=32, segments=1), Attend(keys=32, m=2, warps=2, stages=2, blocks=2))
SEGMENTED = replace(NARROW, scan=replace(NARROW.scan, segments=3))
WIDE = Config(128, Scan(tokens=32, stages=4, warps=8, columns=64, segments=2), Attend(keys=64, m=2, warps=4, stages=3, blocks=2))
TALL = Config(256, Scan(tokens=128, stages=3, warps=4, columns=32, segments=1), Attend(keys=32, m=4, warps=4, stages=2, blocks=1))


CASES: dict[str, tuple[dict[str, Any], Config]] = {
    "one token": ({"t": 1, "h": 2, "d": 32}, replace(NARROW, chunk=0)),
    "attention form": ({"t": 193, "h": 2, "d": 64}, replace(NARROW, chunk=0)),
    "attention form, fp16, grouped": (
        {"t": 257, "h": 2, "hq": 6, "d": 64, "e": 32, "dtype": "float16"},
        replace(WIDE, chunk=0, scan=NARROW.scan),
    ),
    "degree 4": ({"t": 131, "h": 1, "hq": 2, "d": 64, "degree": 4}, replace(NARROW, chunk=0)),
    "degree 4, no sum, fp16": (
        {"t": 131, "h": 1, "d": 32, "degree": 4, "normalize": "none", "gated": False, "dtype": "float16"},
        replace(NARROW, chunk=0),
    ),
    "one token past a chunk": ({"t": 129, "h": 1, "d": 64}, NARROW),
    "D = 32": ({"t": 515, "b": 2, "h": 1, "hq": 2, "d": 32}, SEGMENTED),
    "D = 32, no gates": ({"t": 515, "h": 1, "d": 32, "gated": False}, SEGMENTED),
    "D = 32, no sum": ({"t": 515, "h": 1, "d": 32, "normalize": "none"}, SEGMENTED),
    "D = 64, grouped by 3": ({"t": 389, "h": 1, "hq": 3, "d": 64}, WIDE),
    "D = 64, fp16": ({"t": 389, "h": 1, "d": 64, "dtype": "float16"}, WIDE),
    "D = 128": ({"t": 263, "h": 1, "d": 128}, replace(WIDE, attend=replace(WIDE.attend, blocks=1, keys=32))),
    "E > D": ({"t": 300, "h": 1, "d": 32, "e": 128}, replace(NARROW, attend=Attend(keys=32, m=2, warps=4, stages=2, blocks=2))),
    "E < D": ({"t": 400, "h": 1, "hq": 2, "d": 64, "e": 32}, replace(SEGMENTED, attend=Attend(keys=32, m=4, warps=2, stages=2, blocks=2))),
    "E < D = 128, fp16": (
        {"t": 150, "h": 1, "d": 128, "e": 64, "dtype": "float16"},
        replace(NARROW, attend=Attend(keys=32, m=2, warps=4, stages=2, blocks=1)),
    ),
    "chunk 256": ({"t": 777, "h": 1, "d": 32}, TALL),
    "chunk 512": ({"t": 1025, "h": 1, "d": 32}, replace(TALL, chunk=512)),
}


@pytest.mark.parametrize("case", CASES)
def test_kernels(case: str) -> None:
    keywords, config = CASES[case]
    p = example(**keywords)
    inputs = sample(p, 1)
    results, _ = run(p, config, inputs)
    assert_right(p, config, inputs, results)


@pytest.mark.parametrize("gates", [0.0, 0.01, 20.0, 300.0, np.inf])
def test_gates(gates: float) -> None:
    p = example(t=515, h=1, d=32)
    inputs = sample(p, 2)
    with np.errstate(invalid="ignore"):
        inputs["log_g"] = (inputs["log_g"] * np.float32(gates)).astype(np.float32)
    results, _ = run(p, SEGMENTED, inputs)
    assert_right(p, SEGMENTED, inputs, results)


def test_rows_of_zeros() -> None:
    p = example(t=300, h=1, d=32)
    inputs = sample(p, 3)
    inputs["q"][:, [5, 130, 299]], inputs["k"][:, :9], inputs["k"][:, 128:170] = 0, 0, 0
    results, _ = run(p, NARROW, inputs)
    assert_right(p, NARROW, inputs, results)
    assert (results["y"][:, [5, 130, 299]] == 0).all() and (results["y"][:, :9] == 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_schedules_change_no_bit(schedule: Schedule) -> None:
    p = example(t=515, h=1, d=32)
    inputs = sample(p, 4)
    first, _ = run(p, SEGMENTED, inputs)
    again, _ = run(p, SEGMENTED, inputs, schedule)
    assert_right(p, SEGMENTED, inputs, again)
    assert (first["y"] == again["y"]).all()


def test_results_do_not_depend_on_the_chunk() -> None:
    p = example(t=1025, h=1, d=32)
    inputs = sample(p, 5)
    inputs["log_g"] *= np.float32(0.1)
    exact = reference(p, inputs)
    found = {}
    for config in (replace(NARROW, chunk=0), SEGMENTED, replace(SEGMENTED, chunk=256), replace(NARROW, chunk=512), TALL):
        results, _ = run(p, config, inputs)
        assert check(p, inputs, results, exact).ok
        found[config] = p.dtype.widen(results["y"])
    first = found[replace(NARROW, chunk=0)]
    for y in found.values():
        assert np.linalg.norm(y - first) <= TWO_RESULTS * np.linalg.norm(first)
    assert sum((y != first).any() for y in found.values()) == 4


def padded(x: np.ndarray, axes: tuple[int, ...], extra: int, fill: Any) -> np.ndarray:
    """The same values in the memory order `axes`, with `extra` more of everything around them, which hold `fill`."""
    whole = np.full([x.shape[a] + extra for a in axes], fill, x.dtype)
    view = whole[tuple(slice(0, x.shape[a]) for a in axes)].transpose(np.argsort(axes))
    view[...] = x
    return view


@pytest.mark.parametrize("target", ["argument", "use_target"])
def test_strided_inputs_through_the_public_function(target: str) -> None:
    p = example(t=263, b=2, h=2, hq=4, d=32, e=64, dtype="float16")
    inputs = sample(p, 6)
    nan = np.float16(np.nan)
    q, k = padded(inputs["q"], (0, 2, 1, 3), 8, nan), padded(inputs["k"], (1, 0, 2, 3), 16, nan)
    v = padded(inputs["v"], (0, 1, 2, 3), 8, nan)[:, ::-1][:, ::-1]
    log_g = padded(inputs["log_g"], (0, 2, 1), 3, np.float32(np.nan))
    if target == "argument":
        y = power_retention(q, k, v, log_g, chunk=128, target="host")
    else:
        with vidrial.use_target("host"):
            y = power_retention(q, k, v, log_g, chunk=128)
    assert y.dtype == np.float16 and y.shape == (2, 263, 4, 64)
    assert_right(p, NARROW, inputs, {"y": y})


def test_rows_that_must_be_copied() -> None:
    p = example(t=70, h=2, d=32, dtype="float16")
    inputs = sample(p, 7)
    y = power_retention(*(inputs[n] for n in ("q", "k", "v", "log_g")), chunk=0, target="host")
    whole = np.zeros((1, 70, 2, 36), np.float16)
    whole[..., 1:33] = inputs["q"]
    features_first = np.ascontiguousarray(inputs["k"].transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    again = power_retention(
        whole[..., 1:33], features_first, np.ascontiguousarray(inputs["v"][:, ::-1])[:, ::-1], inputs["log_g"], chunk=0, target="host"
    )
    assert (y == again).all()
    assert_right(p, replace(NARROW, chunk=0), inputs, {"y": y})


def test_bfloat16_with_padded_strides() -> None:
    contiguous = example(t=263, b=2, h=1, hq=2, d=32)
    inputs = sample(contiguous, 8)
    views = {name: padded(inputs[name], (0, 2, 1, 3), 8, np.uint16(0xFFFF)) for name in "qkv"} | {"log_g": inputs["log_g"]}
    strides = {f"{name}_stride": tuple(s // 2 for s in views[name].strides[:3]) for name in "qkv"}
    p = replace(contiguous, **strides)
    results, _ = run(p, NARROW, views)
    dense, _ = run(contiguous, NARROW, inputs)
    assert (results["y"] == dense["y"]).all()
    assert_right(p, NARROW, inputs, results)


def test_nothing_to_do() -> None:
    empty = np.zeros((2, 0, 3, 32), np.float16)
    assert power_retention(empty, empty, empty, target="host").shape == (2, 0, 3, 32)
    none = np.zeros((0, 7, 3, 32), np.float16)
    assert power_retention(none, none, none, target="host").shape == (0, 7, 3, 32)


@pytest.mark.parametrize(("sanitizer", "t"), [("address", 393), ("thread", 261)])
def test_sanitizers(sanitizer: str, t: int) -> None:
    p = example(t=t, h=1, hq=1, d=32)
    config = replace(NARROW, scan=replace(NARROW.scan, segments=2))
    inputs = sample(p, 9)
    results, _ = run(p, config, inputs, sanitizer=sanitizer)
    assert_right(p, config, inputs, results)


# One change of the device code each, which the measures must see: file, what stands there, what stands there instead.
WRONG = {
    "multiplicity": ("power_scan", "pair.x == pair.y ? 1.f : 2.f", "true ? 1.f : 2.f"),
    "diagonal counted twice": ("power_scan", "is_z || pair.x == pair.y ?", "is_z ?"),
    "state not discounted to the row": (
        "power_weights",
        "const state = Tiles::stateful && j == tile.forgotten ? tile.state_decay : 1.f;",
        "const state = 1.f;",
    ),
    "own token left out": (
        "collective/mask",
        "key <= row; }\n  CUTE_HOST_DEVICE int begin(int) const { return 0; }\n  CUTE_HOST_DEVICE int end(int row)",
        "key < row; }\n  CUTE_HOST_DEVICE int begin(int) const { return 0; }\n  CUTE_HOST_DEVICE int end(int row)",
    ),
    "one key too many": ("power_weights", "allows(row + QK::row_of(m, v), column", "allows(1 + row + QK::row_of(m, v), column"),
    "keys not discounted to the tile": ("power_weights", "kGated ? exp2_approx(diff_split(tile.r0, tile.a(j0 + kKeys - 1))) : 1.f", "1.f"),
    "state not discounted over a chunk": ("power_tokens", "return exp2_approx(total.x + total.y);", "return 1.f;"),
    "keys not discounted in the state": ("power_scan", "ki[m] = scale_bf16(ki[m], g.x, g.y);", ""),
    "no normaliser of the state": ("power_scan", "update_z(stage);", ""),
    "segments not joined over two": ("power_carry", "add[i] + decay * carry[i]", "add[i]"),
    "half the scale": ("power_weights", "fmaxf(l.x[m][h] * scale", "fmaxf(2 * l.x[m][h] * scale"),
    "half of the rows' sums": ("collective/rows", "x[m][h] = join(x[m][h], __shfl_xor_sync(~0u, x[m][h], 2));", ""),
    "rows beside each other exchanged": (
        "collective/store",
        "int const row = Mma::row_of(m, 2 * h);",
        "int const row = Mma::row_of(m, 2 - 2 * h);",
    ),
    "a stage handed out twice": ("pipeline/ring", "read = after(read);", "read = item % 5 ? after(read) : read;"),
}


@pytest.fixture
def patched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The sources of all plans with one wrong line in them."""
    plant(monkeypatch, tmp_path, *WRONG[request.param])


@pytest.mark.parametrize("patched", WRONG, indirect=True)
def test_a_wrong_kernel_is_found(patched: None) -> None:
    p = example(t=515, h=1, d=32)
    inputs = sample(p, 10)
    inputs["log_g"] *= np.float32(0.1)
    results, _ = run(p, SEGMENTED, inputs)
    exact = reference(p, inputs)
    assert not check(p, inputs, results, exact).ok
    assert not late_error(p, SEGMENTED, results, exact) <= RELATIVE_BOUND


def test_the_right_kernel_is_not() -> None:
    p = example(t=515, h=1, d=32)
    inputs = sample(p, 10)
    inputs["log_g"] *= np.float32(0.1)
    results, _ = run(p, SEGMENTED, inputs)
    assert_right(p, SEGMENTED, inputs, results)


def test_float16_scores_do_not_overflow() -> None:
    p = example(t=200, h=1, d=64, dtype="float16")
    inputs = sample(p, 12)
    inputs["q"] *= np.float16(50)
    inputs["k"] *= np.float16(50)
    results, _ = run(p, NARROW, inputs)
    assert (np.einsum("btd,bsd->bts", *(inputs[n][:, :, 0].astype(np.float64) for n in "qk")) ** 2).max() > 65504
    assert_right(p, NARROW, inputs, results)
