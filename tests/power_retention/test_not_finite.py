"""NaN, infinities and gates above 0: what they reach and what they do not, in NumPy, in the reference and in the kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from power_host import run

from vidrial.kernels.power_retention import power_retention
from vidrial.kernels.power_retention.attend import Config as Attend
from vidrial.kernels.power_retention.op import Config, check, example, reference, sample
from vidrial.kernels.power_retention.reference import attention_form, recurrent_form
from vidrial.kernels.power_retention.scan import Config as Scan

Arrays = dict[str, np.ndarray]
SYNC = Config(128, Scan(tokens=64, stages=3, warps=4, columns=32, segments=1), Attend(keys=32, m=2, warps=2, stages=2, blocks=2))
SEGMENTED = replace(SYNC, scan=replace(SYNC.scan, segments=3))
WGMMA = Config(
    128, Scan(tokens=64, stages=3, warps=4, columns=32, segments=2), Attend(keys=64, m=2, warps=4, stages=3, blocks=1, mma="wgmma")
)
CONFIGS = {"sync": SYNC, "segments": SEGMENTED, "attention form": replace(SYNC, chunk=0), "wgmma": WGMMA}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
T, HEADS = 390, 2


def drawn(dtype: str = "bfloat16", **options: Any) -> tuple[Any, Arrays]:
    p = example(t=T, b=1, h=HEADS, d=32, dtype=dtype, **options)
    return p, sample(p, 3)


def y_of(p: Any, config: Config, x: Arrays) -> np.ndarray:
    y: np.ndarray = p.dtype.widen(run(p, config, x)[0]["y"])
    return y


def float32(p: Any, x: Arrays) -> Arrays:
    return {name: p.dtype.widen(array).astype(np.float32) if name in "qkv" else array for name, array in x.items()}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_nan_gate_is_nan_from_its_row_on(config: str) -> None:
    """Anywhere in a thread's four tokens, in a chunk, at its ends; in its own head alone; and the rows before stay, bit for bit."""
    p, x = drawn()
    clean = y_of(p, CONFIGS[config], x)
    for at in (0, 1, 6, 127, 128, 131, 255, 258, T - 1):
        log_g = x["log_g"].copy()
        log_g[0, at, 1] = np.nan
        kernels = y_of(p, CONFIGS[config], x | {"log_g": log_g})
        numpy = power_retention(*(float32(p, x)[n] for n in "qkv"), log_g)
        for y in (kernels, numpy):
            assert np.isnan(y[0, at:, 1]).all() and np.isfinite(y[0, :at]).all() and np.isfinite(y[:, :, 0]).all(), at
        assert (kernels[0, :at] == clean[0, :at]).all() and (kernels[:, :, 0] == clean[:, :, 0]).all()
        assert np.isnan(reference(p, x | {"log_g": log_g})["y"]).all(-1)[0, :, 1].nonzero()[0].tolist() == list(range(at, T))


@pytest.mark.parametrize("form", ["chunk 128", "chunk 256", "degree 4", "no sum", "reference", "recurrent"])
@pytest.mark.parametrize(("which", "value"), [("k", np.nan), ("k", np.inf), ("k", 1e25), ("v", np.nan), ("v", -np.inf)])
def test_later_tokens_reach_no_earlier_row_in_numpy(form: str, which: str, value: float) -> None:
    p, x = drawn()
    at, inputs = 200, float32(p, x)
    forms: dict[str, Any] = {
        "chunk 128": lambda *x: power_retention(*x, chunk=128),
        "chunk 256": lambda *x: power_retention(*x),
        "degree 4": lambda *x: power_retention(*x, degree=4),
        "no sum": lambda *x: power_retention(*x, normalize="none"),
        "reference": lambda *x: np.concatenate([(r := attention_form(*x)).y, r.conditioning[..., None]], -1),
        "recurrent": recurrent_form,
    }
    names = ("q", "k", "v", "log_g")
    clean = forms[form](*(inputs[n] for n in names))
    inputs[which] = inputs[which].copy()
    inputs[which][0, at:, 1, 5] = value
    dirty = forms[form](*(inputs[n] for n in names))
    assert (dirty[0, :at] == clean[0, :at]).all() and (dirty[:, :, 0] == clean[:, :, 0]).all()
    # And the token's own row, and all behind it, see it: in its column of V, in all columns where it is a key's (1e25 squared is no float32).
    seen = dirty[0, at:, 1, 5] if which == "v" else dirty[0, at:, 1, :32]
    if not (value == 1e25 and form in ("reference", "recurrent")):
        assert not np.isfinite(seen).any()
    if which == "v":
        assert (np.delete(dirty, 5, -1) == np.delete(clean, 5, -1)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_weighed_as_written(value: float) -> None:
    """The right value of every element: the sum term by term, in NumPy and in the reference."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 40, 1, 32)).astype(np.float32) for _ in range(3))
    v[0, 7, 0, 3], v[0, 20, 0, 3], q[0, 30, 0] = value, 1.0, 0.0
    weights = np.tril((q[0, :, 0].astype(np.float64) @ k[0, :, 0].T.astype(np.float64) * 32**-0.5) ** 2)
    wanted = np.array([sum(weights[i, j] * v[0, j, 0] for j in range(i + 1)) for i in range(40)])
    assert np.isnan(wanted[30, 3]) and np.isfinite(wanted[30, 4])
    for y in (power_retention(q, k, v, normalize="none"), attention_form(q, k, v, normalize="none").y):
        np.testing.assert_allclose(y[0, :, 0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("which", "value"), [("k", np.nan), ("k", np.inf), ("k", 1e25), ("v", np.nan), ("v", np.inf)])
def test_what_later_tokens_reach_in_the_kernels(config: str, which: str, value: float) -> None:
    """k: no earlier row. v: those that its block of keys shares a band of rows with, fewer than the longer of the two; its own column alone."""
    p, x = drawn()
    chosen = CONFIGS[config]
    band = chosen.attend.m * (64 if chosen.attend.mma == "wgmma" else 16)
    clean = y_of(p, chosen, x)
    for at in (1, 63, 200, 383):
        changed = x[which].copy()
        changed[0, at:, 1, 5] = p.dtype.round(value)
        dirty = y_of(p, chosen, x | {which: changed})
        assert (dirty[:, :, 0] == clean[:, :, 0]).all() and not np.isfinite(dirty[0, at:, 1, 5]).any()
        first = at if which == "k" else at // chosen.attend.keys * chosen.attend.keys // band * band
        assert at - first < max(chosen.attend.keys, band)
        assert (dirty[0, :first] == clean[0, :first]).all()
        if which == "v":
            assert (np.delete(dirty, 5, -1) == np.delete(clean, 5, -1)).all()


@pytest.mark.parametrize("where", ["numpy", "reference", "kernels"])
def test_gates_above_0_count_as_0(where: str) -> None:
    p, x = drawn()
    x["log_g"] = x["log_g"].copy()
    x["log_g"][0, ::3], x["log_g"][0, 5], x["log_g"][0, 100] = 0.5, np.inf, -np.inf
    clamped = np.clip(x["log_g"], -60, 0)

    def y(log_g: np.ndarray) -> np.ndarray:
        if where == "kernels":
            return y_of(p, SEGMENTED, x | {"log_g": log_g})
        inputs = [float32(p, x)[n] for n in "qkv"]
        return power_retention(*inputs, log_g) if where == "numpy" else attention_form(*inputs, log_g).y

    assert np.isfinite(y(x["log_g"])).all() and (y(x["log_g"]) == y(clamped)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("t", [515, 2309])
def test_the_check_sees_a_wrong_element_without_a_normaliser(dtype: str, t: int) -> None:
    """Without one the sum of the terms' sizes grows with T, and y with its root: that measure let any element pass."""
    p = example(t=t, h=1, d=32, dtype=dtype, gated=False, normalize="none")
    x = sample(p, 0)
    exact = reference(p, x)
    y = p.dtype.round(exact["y"])
    assert check(p, x, {"y": y}, exact).ok
    for row in (0, t // 2, t - 1):
        element = int(np.abs(exact["y"][0, row, 0]).argmax())
        for wrong in (0.0, 2.0):
            changed = y.copy()
            changed[0, row, 0, element] = p.dtype.round([wrong * exact["y"][0, row, 0, element]])[0]
            assert check(p, x, {"y": changed}, exact).relative < 0.2
            assert not check(p, x, {"y": changed}, exact).max_error <= check(p, x, {"y": changed}, exact).max_error_bound, (row, wrong)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_check_passes_what_the_dtype_cannot_hold(dtype: str) -> None:
    """Where no term has a size (q or k of zeros, a tiny scale), the smallest number of the dtype is what rounding may be off by."""
    p = example(t=70, h=1, d=32, dtype=dtype, gated=False, normalize="none", scale=1e-4 if dtype == "float16" else 1e-20)
    x = sample(p, 0)
    x["q"][:, 20:] = 0
    exact = reference(p, x)
    y = p.dtype.round(exact["y"])
    assert (exact["y"][:, 20:] == 0).all() and check(p, x, {"y": y}, exact).max_error <= 2e-3
    changed = y.copy()
    changed[0, 30, 0, 0] = p.dtype.round([1e-3])[0]
    assert not check(p, x, {"y": changed}, exact).ok
