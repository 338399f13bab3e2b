"""The kernels of the backward pass, compiled for the CPU and run thread by thread, against gradients in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from back_host import FEW_KEYS, NARROW, USUAL, Adjoint, Arrays, Config, Gradient, Tokens, run, with_gates, wrong
from power_host import plant

from vidrial.host.target import SCHEDULES, Schedule
from vidrial.kernels.power_retention.back.op import example, forward_pass, reference, sample
from vidrial.testing import poison

SEGMENTED = replace(NARROW, scan=replace(NARROW.scan, segments=3))
SMALL = replace(
    SEGMENTED,
    adjoint=Adjoint(tokens=32, stages=2, warps=4, columns=32),
    query=Tokens(block=16, warps=2, stages=4, blocks=2),
    keys=Tokens(block=16, warps=2, stages=4, blocks=2),
)
WIDE = replace(
    NARROW,
    adjoint=Adjoint(tokens=64, stages=4, warps=8, columns=64),
    query=Tokens(block=64, warps=8, stages=3, blocks=1),
    keys=Tokens(block=64, warps=8, stages=3, blocks=1),
)
LARGE = replace(NARROW, keys=Tokens(block=16, warps=4, stages=3, blocks=1))


def whole(config: Config) -> Config:
    """The same as one chunk."""
    return replace(config, chunk=0, scan=replace(config.scan, segments=1))


CASES: dict[str, tuple[dict[str, Any], Config]] = {
    "attention form": ({"t": 193, "h": 2, "d": 64}, whole(NARROW)),
    "attention form, fp16, grouped by 3": ({"t": 257, "h": 2, "hq": 6, "d": 64, "e": 32, "dtype": "float16"}, whole(NARROW)),
    "attention form, wide": ({"t": 389, "h": 1, "hq": 2, "d": 64}, whole(WIDE)),
    "D = 32": ({"t": 515, "b": 2, "h": 1, "hq": 2, "d": 32}, SMALL),
    "D = 32, no gates": ({"t": 641, "h": 1, "d": 32, "gated": False}, SEGMENTED),
    "D = 32, no sum": ({"t": 515, "h": 1, "d": 32, "normalize": "none"}, SEGMENTED),
    "D = 64, no sum, no gates": ({"t": 450, "h": 1, "d": 64, "gated": False, "normalize": "none"}, SMALL),
    "D = 64, grouped by 12": ({"t": 261, "h": 1, "hq": 12, "d": 64}, NARROW),
    "D = 64, grouped by 3, wide": ({"t": 389, "h": 1, "hq": 3, "d": 64}, WIDE),
    "D = 64, fp16": ({"t": 389, "h": 1, "d": 64, "dtype": "float16"}, SMALL),
    "D = 128": ({"t": 263, "h": 1, "d": 128}, LARGE),
    "D = 128, fp16, no sum": ({"t": 200, "h": 1, "hq": 2, "d": 128, "dtype": "float16", "normalize": "none"}, LARGE),
    "E > D": ({"t": 300, "h": 1, "d": 32, "e": 128}, NARROW),
    "E < D": ({"t": 400, "h": 1, "hq": 2, "d": 64, "e": 32}, SEGMENTED),
    "E < D = 128, fp16": ({"t": 150, "h": 1, "d": 128, "e": 64, "dtype": "float16"}, NARROW),
    "chunk 256": ({"t": 777, "h": 1, "hq": 2, "d": 32}, replace(NARROW, chunk=256, keys=replace(NARROW.keys, block=64))),
    "chunk 512": ({"t": 1025, "h": 1, "d": 32}, replace(NARROW, chunk=512)),
}


@pytest.mark.parametrize("case", CASES)
def test_kernels(case: str) -> None:
    keywords, config = CASES[case]
    p = example(**keywords)
    inputs = sample(p, 2)
    assert not wrong(p, inputs, run(p, config, inputs))


@pytest.mark.parametrize("normalize", ["sum", "none"])
@pytest.mark.parametrize("degree", [2, 4])
def test_degrees(degree: int, normalize: str) -> None:
    p = example(t=257, h=1, hq=2, d=64, degree=degree, normalize=normalize)
    inputs = sample(p, 3)
    assert not wrong(p, inputs, run(p, whole(NARROW), inputs), bounds=FEW_KEYS if degree == 4 else USUAL)


@pytest.mark.parametrize("t", [1, 2, 63, 65, 127, 128, 129, 257, 641])
def test_odd_lengths(t: int) -> None:
    p = example(t=t, b=2, h=1, hq=2, d=32)
    inputs = sample(p, t)
    exact = reference(p, inputs)
    for config in (whole(NARROW), NARROW) if t > 128 else (whole(NARROW),):
        assert not wrong(p, inputs, run(p, config, inputs), exact, USUAL if t > 2 else FEW_KEYS)


@pytest.mark.parametrize("chunk", [0, 128])
@pytest.mark.parametrize("kind", ["open", "short", "mixed", "closed", "above"])
def test_gates(kind: str, chunk: int) -> None:
    p = example(t=515, h=1, hq=2, d=32)
    inputs = with_gates(p, 5, kind)
    results = run(p, SEGMENTED if chunk else whole(NARROW), inputs)
    assert not wrong(p, inputs, results, bounds=USUAL if kind in ("open", "short", "above") else FEW_KEYS)
    clamped = (inputs["log_g"] <= -60) | (inputs["log_g"] > 0)
    assert (results["dlog_g"][clamped] == 0).all() and clamped.any() == (kind in ("mixed", "closed", "above"))


@pytest.mark.parametrize("t", [2049, 8192])
def test_the_gates_gradient_does_not_grow_worse_with_length(t: int) -> None:
    p = example(t=t, h=1, d=32)
    inputs = with_gates(p, 6, "short")
    assert not wrong(p, inputs, run(p, NARROW, inputs))


def test_rows_of_zeros() -> None:
    p = example(t=300, h=1, d=32)
    inputs = sample(p, 3)
    inputs["q"][:, [5, 130, 299]], inputs["k"][:, :9], inputs["k"][:, 128:170] = 0, 0, 0
    inputs |= forward_pass(p, inputs)
    results = run(p, NARROW, inputs)
    assert not wrong(p, inputs, results)
    assert (results["dq"][:, [5, 130, 299]] == 0).all() and (results["dq"][:, :9] == 0).all() and (results["dk"][:, 128:170] == 0).all()
    assert (results["dk"][:, :9] == 0).all() and (results["dv"][:, :9] == 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_schedules_change_no_bit(schedule: Schedule) -> None:
    p = example(t=389, h=1, hq=2, d=32)
    inputs = sample(p, 4)
    first, again = run(p, SEGMENTED, inputs), run(p, SEGMENTED, inputs, schedule)
    assert all((first[name] == again[name]).all() for name in first)


@pytest.mark.parametrize(("sanitizer", "t"), [("address", 387), ("thread", 261)])
def test_sanitizers(sanitizer: str, t: int) -> None:
    p = example(t=t, h=1, hq=2, d=32)
    inputs = sample(p, 9)
    assert not wrong(p, inputs, run(p, replace(NARROW, scan=replace(NARROW.scan, segments=2)), inputs, sanitizer=sanitizer))


def test_nothing_that_is_not_finite_leaves_its_head() -> None:
    p = example(t=261, h=2, hq=4, d=32)
    inputs = sample(p, 10)
    clean = run(p, NARROW, inputs)
    for name in ("q", "k", "v", "dy", "log_g"):
        dirty = {key: x.copy() for key, x in inputs.items()}
        dirty[name][0, 100, 0] = np.nan if name == "log_g" else 0x7FC0
        dirty |= forward_pass(p, dirty)
        results = run(p, NARROW, dirty)
        # Query heads 0 and 1 belong to key head 0.
        assert all(
            (results[n][:, :, p.group if n == "dq" else 1 :] == x[:, :, p.group if n == "dq" else 1 :]).all() for n, x in clean.items()
        )
        assert np.isnan(p.dtype.widen(results["dk"])[0, :, 0]).any()


def test_strides_of_dy() -> None:
    p = example(t=150, b=2, h=1, hq=2, d=32)
    inputs = sample(p, 11)
    wide = poison((2, 2, 150, 40), p.dtype)
    view = wide[..., :32].transpose(0, 2, 1, 3)
    view[...] = inputs["dy"]
    strided = replace(p, dy_stride=tuple(s // 2 for s in view.strides[:3]))
    first, again = run(p, NARROW, inputs), run(strided, NARROW, inputs | {"dy": view})
    assert all((first[name] == again[name]).all() for name in first)


# One change of the device code each, which the bounds must see: file, what stands there, what stands there instead.
WRONG = {
    "multiplicity of the adjoint": ("power_back_scan", "is_z || pair.x == pair.y ? 1.f : 2.f", "1.f"),
    "diagonal of the adjoint twice": ("power_back_scan", "is_z || pair.x == pair.y ?", "is_z ?"),
    "a score's power without its 2": ("power_back_tile", "2.f * s : 4.f", "s : 4.f"),
    "sign of the normaliser's adjoint": ("power_back_rows", "= -delta * start", "= delta * start"),
    "sign of the normaliser": ("power_back_query", "-2.f * delta.x[m][h]", "2.f * delta.x[m][h]"),
    "half of the normaliser's adjoint": ("power_back_keys", "return 2.f; }", "return 1.f; }"),
    "no pairs across a chunk's end": ("power_back_gates", "? p.cross[int64_t(head) * p.chunks + chunk] : 0.f", "? 0.f : 0.f"),
    "pairs across a chunk's end twice": ("power_back_cross", "0.5f * twice", "twice"),
    "the state of another chunk": ("power_back_cross", "p.chunks + chunk + 1)", "p.chunks + chunk)"),
    "a token's own gate": ("power_back_gates", "float(prefix + x[i])", "float(prefix + (i ? x[i - 1] : 0.))"),
    "one head of the group in the adjoint": ("power_back_scan", " + q_head * p.q_stride[2];", ";"),
    "one head of the group in dk": ("power_back_keys", "q_head = kv_head * p.group + g;", "q_head = kv_head * p.group;"),
    "no adjoint before the last chunk": ("power_back_keys", "chunk + 1 < p.chunks", "chunk + 2 < p.chunks"),
    "state not discounted to the row": ("power_back_query", "kGated ? exp2_approx(r0.x + r0.y) : 1.f", "1.f"),
    "adjoint not discounted to the tile": ("power_back_keys", "kGated ? exp2_approx(diff_split(a(c0 + p.chunk - 1), e)) : 1.f", "1.f"),
    "adjoint not discounted over a chunk": ("power_back_scan", "acc.scale(exp2_approx(total.x + total.y));", ""),
    "queries not discounted in the adjoint": ("power_back_rows", "start *= exp2_approx(a.x + a.y);", ""),
    "keys not discounted to the row": ("power_back_query", "dq.scale_row(m, h, f);", ""),
    "rows of dv not discounted": ("power_back_keys", "dv.scale_row(m, h, f);", ""),
    "own token left out": (
        "collective/mask",
        "key <= row; }\n  CUTE_HOST_DEVICE int begin(int) const { return 0; }\n  CUTE_HOST_DEVICE int end(int row)",
        "key < row; }\n  CUTE_HOST_DEVICE int begin(int) const { return 0; }\n  CUTE_HOST_DEVICE int end(int row)",
    ),
    "state left out of the gates": ("power_back_state", "dot.x[m][h] += c.x", "if (false) dot.x[m][h] += c.x"),
    "mean of the values left out": ("power_back_keys", "(dp[n][v] * weight - shift)", "(dp[n][v] * weight)"),
    "a block of features added twice": ("power_back_state", "x[a] = 0.f;", ""),
    "half of a block of features": ("power_back_state", "+ __shfl_xor_sync(~0u, odd ? y[a] : y[a + 2], 1)", ""),
    "segments not joined over two": ("power_carry", "add[i] + decay * carry[i]", "add[i]"),
    "a stage handed out twice": ("pipeline/ring", "read = after(read);", "read = item % 5 ? after(read) : read;"),
}


@pytest.fixture
def patched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The sources of all plans with one wrong line in them."""
    plant(monkeypatch, tmp_path, *(WRONG | UNSEEN)[request.param])


# With a normaliser q . dq adds up to 0.
UNSEEN = {"one head of the group in the gates": ("power_back_gates", "g < p.group", "g < 1")}


def planted_case(normalize: str = "sum") -> tuple[Gradient, Arrays]:
    p = example(t=515, h=1, hq=2, d=32, normalize=normalize)
    inputs = sample(p, 12)
    inputs["log_g"] *= np.float32(0.3)
    return p, inputs | forward_pass(p, inputs)


@pytest.mark.parametrize("patched", WRONG, indirect=True)
def test_a_wrong_kernel_is_found(patched: None) -> None:
    p, inputs = planted_case()
    assert wrong(p, inputs, run(p, SEGMENTED, inputs), bounds=FEW_KEYS)


@pytest.mark.parametrize("patched", UNSEEN, indirect=True)
def test_a_wrong_kernel_is_found_without_a_normaliser(patched: None) -> None:
    p, inputs = planted_case("none")
    assert wrong(p, inputs, run(p, SEGMENTED, inputs), bounds=FEW_KEYS)


@pytest.mark.parametrize("normalize", ["sum", "none"])
def test_the_right_kernel_is_not(normalize: str) -> None:
    p, inputs = planted_case(normalize)
    assert not wrong(p, inputs, run(p, SEGMENTED, inputs))
