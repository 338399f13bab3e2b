"""Flash attention: its reference term by term, the CPU implementation against it, and every refusal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidrial.errors import ArgumentError, ArgumentTypeError, UnsupportedError, VidrialError
from vidrial.kernels.flash_attention import flash_attention
from vidrial.kernels.flash_attention.op import Y_BOUNDS, check, example, op, reference, sample, small
from vidrial.kernels.flash_attention.reference import attention

LENGTHS = (0, 1, 7, 63, 65, 129, 257, 1000)
# float32 inside: scores of some 10, off by a few 2^-24 of it.
RELATIVE = 2e-6

Inputs = tuple[np.ndarray, np.ndarray, np.ndarray]


def draw(seed: int, tq: int, tk: int, *, b: int = 2, hq: int = 2, h: int = 2, d: int = 32, e: int = 32) -> Inputs:
    """Normal float32 q, k, v."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal(shape, np.float32) for shape in ((b, tq, hq, d), (b, tk, h, d), (b, tk, h, e)))
    return q, k, v


def assert_close(found: tuple[np.ndarray, np.ndarray], inputs: Inputs, **options: Any) -> None:
    window = tuple(-1 if side is None else side for side in options.pop("window", None) or (None, None))
    exact = attention(*inputs, window=window, **options)
    y, lse = found
    assert y.shape == exact.y.shape and lse.shape == exact.lse.shape and lse.dtype == np.float32
    empty = exact.lse == -np.inf
    assert (lse[empty] == -np.inf).all() and (y.transpose(0, 2, 1, 3)[empty] == 0).all()
    assert (np.abs(y - exact.y) <= 16 * RELATIVE * (exact.spread + 1e-30) * (1 + exact.reach).transpose(0, 2, 1)[..., None]).all()
    assert np.linalg.norm(y - exact.y) <= RELATIVE * np.linalg.norm(exact.y)
    assert (np.abs(lse[~empty] - exact.lse[~empty]) <= RELATIVE * (1 + exact.reach[~empty])).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window": (3, 2)},
        {"window": (-1, 1)},
        {"window": (2, -1)},
        {"causal": True, "window": (2, 5)},
        {"softcap": 0.7},
        {"scale": 2.5},
    ],
    ids=str,
)
@pytest.mark.parametrize(("tq", "tk"), [(6, 6), (3, 8), (9, 4)])
def test_the_definition_term_by_term(options: dict[str, Any], tq: int, tk: int) -> None:
    q, k, v = draw(3, tq, tk, hq=4, h=2, d=6, e=3)
    exact = attention(q, k, v, **options)
    left, right = options.get("window", (-1, -1))
    seen_by_nobody = 0
    for b, i, h in np.ndindex(*q.shape[:3]):
        place, total, sum_of_weights = i + tk - tq, np.zeros(3), 0.0
        for j in range(tk):
            if (options.get("causal") and j > place) or (left >= 0 and j < place - left) or (right >= 0 and j > place + right):
                continue
            score = options.get("scale", 6**-0.5) * float(q[b, i, h].astype(np.float64) @ k[b, j, h // 2])
            if "softcap" in options:
                score = options["softcap"] * np.tanh(score / options["softcap"])
            total, sum_of_weights = total + np.exp(score) * v[b, j, h // 2], sum_of_weights + np.exp(score)
        if sum_of_weights == 0:
            seen_by_nobody += 1
            assert (exact.y[b, i, h] == 0).all() and exact.lse[b, h, i] == -np.inf
        else:
            assert np.allclose(exact.y[b, i, h], total / sum_of_weights, rtol=1e-12, atol=1e-14)
            assert abs(exact.lse[b, h, i] - np.log(sum_of_weights)) < 1e-12
    assert (seen_by_nobody > 0) == (tq > tk and (options.get("causal", False) or right == 1 or right == 2))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("t", LENGTHS)
def test_cpu(t: int, causal: bool) -> None:
    inputs = draw(t, t, t, b=1, hq=4, h=2, e=64)
    assert_close(flash_attention(*inputs, causal=causal, return_lse=True), inputs, causal=causal)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.01},
        {"scale": 7},
        {"softcap": 2.0},
        {"window": (100, 0)},
        {"window": (0, 0)},
        {"window": (30, None)},
        {"window": (None, 30)},
        {"window": (None, None)},
        {"window": (10**9, 10**9)},
        {"causal": True, "window": (64, 64)},
        {"causal": True, "softcap": 30.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(("tq", "tk"), [(65, 65), (200, 700), (301, 5), (1, 900), (4, 0)])
def test_cpu_options(tq: int, tk: int, options: dict[str, Any]) -> None:
    inputs = draw(tq, tq, tk, hq=3, h=1)
    assert_close(flash_attention(*inputs, return_lse=True, **options), inputs, **options)


@settings(max_examples=25, deadline=None)
@given(
    b=st.integers(0, 3),
    tq=st.integers(0, 150),
    tk=st.integers(0, 150),
    group=st.integers(1, 3),
    h=st.integers(1, 3),
    d=st.sampled_from([32, 96]),
    e=st.sampled_from([32, 64]),
    causal=st.booleans(),
    window=st.sampled_from([None, (0, 0), (7, 3), (None, 20), (40, None)]),
)
def test_cpu_any_shape(b: int, tq: int, tk: int, group: int, h: int, d: int, e: int, causal: bool, window: Any) -> None:
    inputs = draw(tq, tq, tk, b=b, hq=group * h, h=h, d=d, e=e)
    assert_close(flash_attention(*inputs, causal=causal, window=window, return_lse=True), inputs, causal=causal, window=window)


def test_cpu_keeps_what_is_not_finite_in_its_row_and_head() -> None:
    q, k, v = draw(5, 70, 70, b=1, hq=4, h=2)
    clean = flash_attention(q, k, v, causal=True)
    q[0, 13, 1] = np.nan
    k[0, 40, 1], v[0, 69, 1] = np.nan, np.nan
    y, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    wrong = np.isnan(y).any(-1)
    assert np.array_equal(np.argwhere(wrong[0, :, 1])[:, 0], [13]) and not wrong[0, :, 0].any()
    assert wrong[0, 40:, 2:].all() and np.isnan(lse[0, 2:, 40:]).all()
    assert (y[~wrong] == clean[~wrong]).all()


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_torch_on_the_cpu(name: str) -> None:
    torch = pytest.importorskip("torch")
    inputs = tuple(torch.from_numpy(x).to(getattr(torch, name)) for x in draw(10, 129, 129))
    y, lse = flash_attention(*inputs, causal=True, return_lse=True)
    assert isinstance(y, torch.Tensor) and y.dtype == inputs[0].dtype and lse.dtype == torch.float32
    exact = attention(*(x.double().numpy() for x in inputs), causal=True)
    ulp = {"float32": 1e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}[name]
    assert np.linalg.norm(y.double().numpy() - exact.y) <= ulp * np.linalg.norm(exact.y)
    assert np.abs(lse.numpy() - exact.lse).max() <= RELATIVE * (1 + exact.reach.max())
    of_sdpa = torch.nn.functional.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in inputs), is_causal=True)
    assert np.allclose(of_sdpa.transpose(1, 2).numpy(), exact.y, rtol=1e-10)


def test_torch_refuses_gradients() -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.ones(1, 3, 1, 32, requires_grad=name == "v") for name in "qkv")
    with pytest.raises(UnsupportedError, match=r"v requires a gradient.*torch\.no_grad\(\).*v\.detach\(\)"):
        flash_attention(q, k, v)
    with torch.no_grad():
        assert flash_attention(q, k, v).shape == (1, 3, 1, 32)


def zeros(*shape: int, dtype: Any = np.float16) -> np.ndarray:
    """Of any size: all elements share one."""
    return np.broadcast_to(np.zeros((), dtype), shape)


Q, KV = zeros(2, 5, 4, 32), zeros(2, 6, 2, 32)
LONG = 2**26 + 1
# Arguments, the error, and what its message must name: the argument, what came, what is accepted.
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[VidrialError], str]] = {
    "q of rank 3": ((zeros(2, 5, 32), KV, KV), {}, ArgumentError, r"q has shape \[2, 5, 32\]; accepted: \[B, Tq, HQ, D\]"),
    "k of rank 5": ((Q, zeros(2, 6, 2, 32, 1), KV), {}, ArgumentError, r"k has shape \[2, 6, 2, 32, 1\]; accepted: \[B, Tk, H, D\]"),
    "v of rank 0": ((Q, KV, zeros()), {}, ArgumentError, r"v has shape \[\]; accepted: \[B, Tk, H, E\]"),
    "q is a list": (([1.0], KV, KV), {}, ArgumentTypeError, r"q: .*list is not an array; accepted: torch.Tensor"),
    "q of integers": ((zeros(2, 5, 4, 32, dtype=np.int32), KV, KV), {}, ArgumentTypeError, r"q.*int32.*accepted"),
    "q of float64": ((zeros(2, 5, 4, 32, dtype=np.float64), KV, KV), {}, ArgumentTypeError, r"q.*float64.*accepted"),
    "k of another dtype": ((Q, KV.astype(np.float32), KV), {}, ArgumentTypeError, r"k is float32 and q is float16; accepted: one dtype"),
    "v of another dtype": ((Q, KV, KV.astype(np.float32)), {}, ArgumentTypeError, r"v is float32 and q is float16; accepted: one dtype"),
    "float32 on the host target": (
        (Q.astype(np.float32), KV.astype(np.float32), KV.astype(np.float32)),
        {"target": "host"},
        ArgumentTypeError,
        r"dtype float32 is not served; accepted: bfloat16, float16",
    ),
    "v of another length": ((Q, KV, zeros(2, 7, 2, 32)), {}, ArgumentError, r"v has shape \[2, 7, 2, 32\].*accepted: \[2, 6, 2, 32\]"),
    "k of another batch": ((Q, zeros(1, 6, 2, 32), KV), {}, ArgumentError, r"k has shape \[1, 6, 2, 32\].*accepted: \[2, 6, 2, 32\]"),
    "k of another D": ((Q, zeros(2, 6, 2, 64), KV), {}, ArgumentError, r"k has shape \[2, 6, 2, 64\].*accepted: \[2, 6, 2, 32\]"),
    "v of other heads": ((Q, KV, zeros(2, 6, 4, 32)), {}, ArgumentError, r"v has shape \[2, 6, 4, 32\].*accepted: \[2, 6, 2, 32\]"),
    "heads do not divide": ((zeros(2, 5, 3, 32), KV, KV), {}, ArgumentError, r"q has 3 heads and k has 2; accepted: a multiple"),
    "no heads": ((zeros(2, 5, 3, 32), zeros(2, 6, 0, 32), zeros(2, 6, 0, 32)), {}, ArgumentError, r"q has 3 heads and k has 0"),
    "no heads at all": ((zeros(2, 5, 0, 32), KV, KV), {}, ArgumentError, r"q has 0 heads and k has 2"),
    "a large group": (
        (zeros(1, 1, 2000, 32), zeros(1, 6, 1, 32), zeros(1, 6, 1, 32)),
        {},
        UnsupportedError,
        r"q has 2000 heads for each of k's; accepted: at most 1024",
    ),
    "D": (
        (zeros(1, 5, 1, 48), zeros(1, 5, 1, 48), zeros(1, 5, 1, 32)),
        {},
        UnsupportedError,
        r"D=48 is not served; accepted: 32, 64, 96, 128, 192, 256",
    ),
    "E": ((zeros(1, 5, 1, 32), zeros(1, 5, 1, 32), zeros(1, 5, 1, 512)), {}, UnsupportedError, r"E=512 is not served; accepted: 32, 64"),
    "too many elements": ((zeros(1, LONG, 1, 32),) * 3, {}, UnsupportedError, rf"q has {LONG * 32} elements; accepted: at most 2\^31"),
    "causal is a word": ((Q, KV, KV), {"causal": "yes"}, ArgumentError, r"causal='yes' is not served; accepted: True, False"),
    "causal is a number": ((Q, KV, KV), {"causal": 1}, ArgumentError, r"causal=1 is not served"),
    "return_lse is None": ((Q, KV, KV), {"return_lse": None}, ArgumentError, r"return_lse=None is not served"),
    "window below 0": ((Q, KV, KV), {"window": (-1, 0)}, ArgumentError, r"window=\(-1, 0\) is not served; accepted: None, or a tuple"),
    "window of one": ((Q, KV, KV), {"window": (3,)}, ArgumentError, r"window=\(3,\) is not served"),
    "window is a number": ((Q, KV, KV), {"window": 3}, ArgumentError, r"window=3 is not served"),
    "window is a list": ((Q, KV, KV), {"window": [3, 3]}, ArgumentError, r"window=\[3, 3\] is not served"),
    "window of a half": ((Q, KV, KV), {"window": (0.5, 1)}, ArgumentError, r"window=\(0.5, 1\) is not served"),
    "window of NaN": ((Q, KV, KV), {"window": (float("nan"), 1)}, ArgumentError, r"window=\(nan, 1\) is not served"),
    "window of infinity": ((Q, KV, KV), {"window": (float("inf"), 1)}, ArgumentError, r"window=\(inf, 1\) is not served"),
    "scale is NaN": ((Q, KV, KV), {"scale": float("nan")}, ArgumentError, r"scale=nan is not served; accepted: None, or a number"),
    "scale is negative": ((Q, KV, KV), {"scale": -0.1}, ArgumentError, r"scale=-0.1 is not served.*Negate q"),
    "scale is no float": ((Q, KV, KV), {"scale": 10**400}, ArgumentError, r"scale=10+ is not served"),
    "scale is an array": ((Q, KV, KV), {"scale": np.ones(3)}, ArgumentError, r"scale=array.* is not served"),
    "softcap is 0": ((Q, KV, KV), {"softcap": 0.0}, ArgumentError, r"softcap=0.0 is not served; accepted: None \(no cap\), or a number"),
    "softcap is infinite": ((Q, KV, KV), {"softcap": float("inf")}, ArgumentError, r"softcap=inf is not served"),
    "target": ((Q, KV, KV), {"target": "tpu"}, ArgumentError, r"target 'tpu' is not known; accepted: cuda, host"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_before_anything_runs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(*_: Any, **__: Any) -> None:
        raise RuntimeError("it ran")

    arguments, options, error, message = BAD[case]
    for runner in ("flash_attention_cpu", "apply", "run", "CachedPlan.plan"):
        monkeypatch.setattr(f"vidrial.kernels.flash_attention.{runner}", ran)
    with pytest.raises(error, match=message):
        flash_attention(*arguments, **options)


def test_what_was_asked_before_is_no_licence() -> None:
    assert flash_attention(Q, KV, KV, causal=True).shape == Q.shape
    with pytest.raises(ArgumentError, match="causal=1 is not served"):
        flash_attention(Q, KV, KV, causal=1)
    assert flash_attention(Q, KV, KV, window=(2, 1)).shape == Q.shape
    assert flash_attention(Q, KV, KV, window=(2.0, np.int64(1))).shape == Q.shape


def test_mixed_libraries() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(
        ArgumentTypeError, match=r"k is a torch array on the CPU, q a numpy array on the CPU; accepted: one library and one device"
    ):
        flash_attention(Q, torch.zeros(2, 6, 2, 32, dtype=torch.float16), KV)


def test_the_largest_sizes_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidrial.kernels.flash_attention._on_cpu", lambda arrays, _: {"y": arrays["q"].shape})
    assert flash_attention(*(zeros(1, LONG - 1, 1, 32),) * 3) == (1, 2**26, 1, 32)
    assert flash_attention(*(zeros(70000, 1, 1, 32),) * 3, scale=np.float32(0.5), softcap=30) == (70000, 1, 1, 32)


CHECKED = {"full": example(t=65, h=2, d=32), "causal, fp16": example(t=65, tq=80, h=1, hq=3, d=32, causal=True, dtype="float16")}


@pytest.mark.parametrize("case", CHECKED)
def test_the_check_finds_what_is_wrong(case: str) -> None:
    p = CHECKED[case]
    inputs = sample(p, 1)
    exact = reference(p, inputs)
    right = {"y": p.dtype.round(exact["y"]), "lse": exact["lse"].astype(np.float32)}
    assert check(p, inputs, right, exact).ok

    def wrong(name: str, change: Any) -> bool:
        results = {key: x.copy() for key, x in right.items()}
        change(results[name])
        return not check(p, inputs, results, exact).ok

    one, bits = (0, 40, 0, 3), np.uint16
    assert wrong("y", lambda y: y.view(bits).__setitem__(one, y.view(bits)[one] ^ 0x8000))  # a sign
    assert wrong("y", lambda y: y.view(bits).__setitem__(one, 0x7FFF))  # NaN
    assert wrong("y", lambda y: y.view(bits).__setitem__(slice(None), y.view(bits) + 1))  # all of them, by an ulp
    assert wrong("lse", lambda lse: lse.__setitem__((0, 0, 40), np.nan))
    assert wrong("lse", lambda lse: lse.__setitem__((0, 0, 40), lse[0, 0, 40] + 1e-3))
    assert wrong("lse", lambda lse: lse.__imul__(np.float32(1.0000051)))  # base 2, or a sum that lacks a little
    if p.tq > p.tk:
        assert (exact["lse"][..., : p.tq - p.tk] == -np.inf).all()
        assert wrong("lse", lambda lse: lse.__setitem__((0, 0, 3), 0.0))
        assert wrong("y", lambda y: y.__setitem__((0, 3, 0, 0), 1e-3))


def test_bounds_come_from_rounding() -> None:
    for dtype, (relative, worst) in Y_BOUNDS.items():
        x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
        error = np.abs(dtype.widen(dtype.round(x)) - x)
        assert 0.4 < np.sqrt(2) * np.linalg.norm(error) / np.linalg.norm(x) / relative < 1.0
        assert 0.4 < 2 * (error / np.abs(x)).max() / worst <= 1.0


def test_small_problems_are_of_the_same_kind() -> None:
    for p in (
        example(t=100_000, d=64),
        example(t=5000, tq=1, h=8, hq=64, d=128, causal=True),
        example(t=9000, d=96, left=4096, softcap=30.0, dtype="float16"),
        example(t=9000, d=192, e=128, left=4096, right=0),
    ):
        less = small(p)
        static = ("dtype", "d", "e", "causal", "windowed", "capped", "group")
        assert all(getattr(less, name) == getattr(p, name) for name in static)
        assert less.tk <= 1021 and less.tk % 2 == 1 and (less.tq == less.tk) == (p.tq == p.tk)
        assert (less.left >= 0) == (p.left >= 0) and less.softcap == p.softcap and less.scale == p.scale
        assert {name: buffer.shape for name, buffer in op.outputs(less).items()} == {
            "y": (1, less.tq, less.hq, less.e),
            "lse": (1, less.hq, less.tq),
        }


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_reaches_no_row_that_does_not_see_it(value: float) -> None:
    """Neither earlier rows, masked, nor later ones, beyond the window; in NumPy and in the reference; and only its own column."""
    q, k, v = draw(5, 70, 70, b=1, hq=4, h=2)
    options: dict[str, Any] = {"causal": True, "window": (20, 0)}
    clean = flash_attention(q, k, v, **options)
    v[0, 30, 1, 3] = value
    forms = {"numpy": flash_attention(q, k, v, **options), "reference": attention(q, k, v, causal=True, window=(20, 0)).y}
    wanted = np.zeros(clean.shape, bool)
    wanted[0, 30:51, 2:, 3] = True
    for name, y in forms.items():
        assert np.array_equal(~np.isfinite(y), wanted), name
        np.testing.assert_allclose(y[~wanted], clean[~wanted], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("h", "hq"), [(1, 1), (1, 3), (2, 2), (2, 6)])
def test_cpu_results_are_contiguous(h: int, hq: int) -> None:
    inputs = draw(0, 65, 65, b=1, hq=hq, h=h)
    for dtype in (np.float32, np.float16):
        y, lse = flash_attention(*(x.astype(dtype) for x in inputs), return_lse=True)
        assert y.flags.c_contiguous and lse.flags.c_contiguous and y.dtype == dtype
