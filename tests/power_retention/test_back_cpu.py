"""Gradients of power retention: the float64 ones against finite differences, those in NumPy and torch's autograd against them; states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from power_states import Arrays, draw_state, recurrent, relative

from vidrial.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from vidrial.kernels.power_retention import PowerState, power_retention, power_retention_vjp
from vidrial.kernels.power_retention.reference import attention_form, gradients

# float32 inside: of the norm of each gradient.
CPU = 2e-5


def draw(seed: int, t: int, *, b: int = 1, hq: int = 2, h: int = 1, d: int = 32, e: int = 32, gates: float | None = 1.0) -> Arrays:
    rng = np.random.default_rng(seed)
    shapes = {"q": (b, t, hq, d), "k": (b, t, h, d), "v": (b, t, h, e), "dy": (b, t, hq, e)}
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    if gates is not None:
        arrays["log_g"] = (-gates * np.log1p(np.exp(-rng.standard_normal((b, t, h)) - 3))).astype(np.float32)
    return arrays


@pytest.mark.parametrize("normalize", ["sum", "none"])
@pytest.mark.parametrize(
    ("t", "hq", "h", "d", "e", "degree"), [(1, 2, 1, 8, 3, 2), (7, 3, 1, 8, 5, 2), (19, 4, 2, 16, 4, 2), (9, 2, 1, 8, 3, 4)]
)
def test_float64_gradients_are_finite_differences(t: int, hq: int, h: int, d: int, e: int, degree: int, normalize: str) -> None:
    x = {name: array.astype(np.float64) for name, array in draw(t, t, hq=hq, h=h, d=d, e=e).items()}
    scale, rng = 0.3, np.random.default_rng(t)

    def loss() -> float:
        y = attention_form(x["q"], x["k"], x["v"], x["log_g"], degree=degree, scale=scale, normalize=normalize).y
        return float((y * x["dy"]).sum())

    found = gradients(x["q"], x["k"], x["v"], x["log_g"], x["dy"], degree=degree, scale=scale, normalize=normalize)
    agree(x, loss, {"q": found.dq, "k": found.dk, "v": found.dv, "log_g": found.dlog_g}, rng)


@pytest.mark.parametrize("normalize", ["sum", "none"])
@pytest.mark.parametrize("t", [0, 1, 13])
def test_float64_gradients_through_states_are_finite_differences(t: int, normalize: str) -> None:
    x = {name: array.astype(np.float64) for name, array in draw(t, t, hq=4, h=2, d=16, e=3).items()}
    x["s"], x["z"] = draw_state(1, x)
    d_final, scale, rng = draw_state(2, x), 0.3, np.random.default_rng(t)

    def loss() -> float:
        y, s, z, _ = recurrent(x, x["s"], x["z"], scale, normalize)
        return float((y * x["dy"]).sum() + (s * d_final[0]).sum() + (z * d_final[1]).sum())

    found = gradients(
        x["q"], x["k"], x["v"], x["log_g"], x["dy"], scale=scale, normalize=normalize, initial=(x["s"], x["z"]), d_final=d_final
    )
    wanted = {"q": found.dq, "k": found.dk, "v": found.dv, "log_g": found.dlog_g, "s": found.d_s, "z": found.d_z}
    agree(x, loss, {name: g for name, g in wanted.items() if x[name].size}, rng)


def agree(x: Arrays, loss: Any, found: dict[str, Any], rng: np.random.Generator) -> None:
    """Central differences at some elements of each array."""
    for name, gradient in found.items():
        for _ in range(10):
            at = tuple(int(rng.integers(n)) for n in x[name].shape)
            kept, step = x[name][at], 1e-5
            x[name][at] = kept + step
            high = loss()
            x[name][at] = kept - step
            low = loss()
            x[name][at] = kept
            assert abs((high - low) / (2 * step) - gradient[at]) <= 1e-6 * max(1.0, float(np.abs(gradient).max())), name


def assert_gradients(x: Arrays, chunk: int | None, bound: float = CPU, **options: Any) -> None:
    inputs = [x[n] for n in ("q", "k", "v", "log_g") if n in x]
    _, vjp = power_retention_vjp(*inputs, chunk=chunk, **options)
    found = vjp(x["dy"])
    exact = gradients(x["q"], x["k"], x["v"], x.get("log_g"), x["dy"], **options)
    terms = float(np.linalg.norm(exact.q_terms))
    assert np.linalg.norm(found.dq - exact.dq) <= bound * max(np.linalg.norm(exact.dq), terms)
    assert np.linalg.norm(found.dk - exact.dk) <= bound * max(np.linalg.norm(exact.dk), float(np.linalg.norm(exact.k_terms)))
    assert relative(found.dv, exact.dv) <= bound
    if exact.dlog_g is None:
        assert found.dlog_g is None
    else:
        assert np.linalg.norm(found.dlog_g - exact.dlog_g) <= 5 * bound * max(np.linalg.norm(exact.dlog_g), np.linalg.norm(exact.g_terms))


@pytest.mark.parametrize("normalize", ["sum", "none"])
@pytest.mark.parametrize("t", [1, 2, 63, 65, 127, 128, 129, 257, 641])
def test_cpu_gradients(t: int, normalize: str) -> None:
    x = draw(t, t, hq=3, e=64)
    for chunk in (0, 128):
        assert_gradients(x, chunk, normalize=normalize)


@pytest.mark.parametrize("degree", [2, 4])
def test_cpu_gradients_without_gates_or_of_degree_4(degree: int) -> None:
    assert_gradients(draw(1, 300, b=2, hq=4, h=2, d=64, gates=None), None, degree=degree, scale=0.2)
    assert_gradients(draw(2, 300, hq=4, h=2, d=64), None, degree=degree)


@pytest.mark.parametrize("kind", ["closed", "mixed", "short", "above", "below"])
def test_cpu_gradients_at_the_gates_ends(kind: str) -> None:
    x, rng = draw(3, 300), np.random.default_rng(3)
    g = x["log_g"]
    chosen = rng.random(g.shape) < 0.1
    if kind == "short":
        g *= 20
    else:
        g[... if kind == "closed" else chosen] = {"closed": -np.inf, "mixed": -np.inf, "above": 0.25, "below": -70.0}[kind]
    assert_gradients(x, 128, bound=1e-4)
    _, vjp = power_retention_vjp(x["q"], x["k"], x["v"], g, chunk=128)
    found = vjp(x["dy"])
    assert all(np.isfinite(a).all() for a in found[:4])
    assert (found.dlog_g[(g <= -60) | (g > 0)] == 0).all()


def test_cpu_gradients_of_rows_of_zeros() -> None:
    x = draw(4, 300)
    x["q"][:, [5, 290]], x["k"][:, :4], x["k"][:, 130:140] = 0, 0, 0
    assert_gradients(x, 128)
    found = power_retention_vjp(x["q"], x["k"], x["v"], x["log_g"], chunk=128)[1](x["dy"])
    assert (found.dq[:, [5, 290]] == 0).all() and (found.dk[:, 130:140] == 0).all() and (found.dq[:, :4] == 0).all()


# ---------------------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("normalize", ["sum", "none"])
@pytest.mark.parametrize("gates", [None, 1.0])
@pytest.mark.parametrize("t", [1, 65, 300])
def test_states_in_and_out(t: int, gates: float | None, normalize: str) -> None:
    x = draw(t, t, hq=4, h=2, gates=gates)
    (s, z), (d_s, d_z), rng = draw_state(5, x, tokens=40), draw_state(6, x), np.random.default_rng(t)
    # As no token makes it: rows of one pair of features differ.
    s, d_s = (a + rng.standard_normal(a.shape) for a in (s, d_s))
    initial = PowerState(s.astype(np.float32), z.astype(np.float32))
    d_s, d_z = (a.astype(np.float32) for a in (d_s, d_z))
    log_g = x.get("log_g")
    (y, final), vjp = power_retention_vjp(
        x["q"], x["k"], x["v"], log_g, normalize=normalize, initial_state=initial, output_final_state=True, chunk=128
    )
    wide = {name: a.astype(np.float64) for name, a in x.items()}
    exact_y, exact_s, exact_z, _ = recurrent(wide, initial.S.astype(np.float64), initial.Z.astype(np.float64), 32**-0.5, normalize)
    assert relative(y, exact_y) <= 1e-4 and relative(final.S, exact_s) <= CPU and relative(final.Z, exact_z) <= CPU
    found = vjp(x["dy"], PowerState(d_s, d_z))
    exact = gradients(x["q"], x["k"], x["v"], log_g, x["dy"], normalize=normalize, initial=(initial.S, initial.Z), d_final=(d_s, d_z))
    for name in ("dq", "dk", "dv", "dlog_g"):
        if getattr(exact, name) is not None:
            assert relative(getattr(found, name), getattr(exact, name)) <= 2e-4, name
    assert exact.d_s is not None and exact.d_z is not None and found.initial_state is not None
    assert relative(found.initial_state.S, exact.d_s) <= 2e-4
    # Of Z the symmetric part counts.
    assert relative(found.initial_state.Z, (exact.d_z + exact.d_z.swapaxes(-1, -2)) / 2) <= 2e-4


@pytest.mark.parametrize("cut", [0, 1, 5, 127, 128, 200, 300])
def test_a_sequence_may_be_split_anywhere(cut: int) -> None:
    x = draw(7, 300, hq=4, h=2)
    q, k, v, g = x["q"], x["k"], x["v"], x["log_g"]
    whole, end = power_retention(q, k, v, g, chunk=128, output_final_state=True)
    first, state = power_retention(q[:, :cut], k[:, :cut], v[:, :cut], g[:, :cut], chunk=128, output_final_state=True)
    second, last = power_retention(q[:, cut:], k[:, cut:], v[:, cut:], g[:, cut:], chunk=128, initial_state=state, output_final_state=True)
    assert relative(np.concatenate([first, second], 1), whole.astype(np.float64)) <= 1e-4
    assert relative(last.S, end.S.astype(np.float64)) <= CPU and relative(last.Z, end.Z.astype(np.float64)) <= CPU


def test_no_token_returns_the_state() -> None:
    x = draw(8, 5)
    state = power_retention(x["q"], x["k"], x["v"], x["log_g"], output_final_state=True)[1]
    none = [x[n][:, :0] for n in ("q", "k", "v", "log_g")]
    y, same = power_retention(*none, initial_state=state, output_final_state=True)
    assert y.shape == (1, 0, 2, 32) and np.allclose(same.S, state.S, rtol=1e-6) and np.allclose(same.Z, state.Z, rtol=1e-6)
    _, vjp = power_retention_vjp(*none, initial_state=state, output_final_state=True)
    found = vjp(x["dy"][:, :0], same)
    assert found.initial_state is not None and np.allclose(found.initial_state.S, state.S, rtol=1e-6)
    assert not power_retention(*none, output_final_state=True)[1].S.any()


S, Z = np.zeros((1, 1, 640, 32), np.float32), np.zeros((1, 1, 32, 32), np.float32)
BAD_STATES: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no state": ((S, Z), {}, ArgumentTypeError, r"initial_state is a tuple; accepted: a PowerState"),
    "other heads": (
        PowerState(S.repeat(2, 1), Z.repeat(2, 1)),
        {},
        ArgumentError,
        r"initial_state\.S has shape \[1, 2, 640, 32\]; accepted: \[1, 1, 640, 32\]",
    ),
    "float64": (PowerState(S.astype(np.float64), Z), {}, ArgumentTypeError, r"initial_state\.S: dtype 'float64' is not known"),
    "degree 4": (PowerState(S, Z), {"degree": 4}, UnsupportedError, r"initial_state with degree=4"),
    "float16": (PowerState(S.astype(np.float16), Z), {}, ArgumentTypeError, r"initial_state\.S is float16.*accepted: float32"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_states_that_are_refused(case: str) -> None:
    state, options, error, message = BAD_STATES[case]
    x = {name: a.astype(np.float16) for name, a in draw(9, 5, hq=1, gates=None).items()}
    with pytest.raises(error, match=message):
        power_retention(x["q"], x["k"], x["v"], initial_state=state, **options)


def test_a_state_whose_shapes_do_not_belong_together() -> None:
    with pytest.raises(ArgumentError, match=r"S has shape \[1, 1, 640, 32\] and Z \[1, 1, 64, 64\]"):
        PowerState(S, np.zeros((1, 1, 64, 64), np.float32))
    with pytest.raises(ArgumentError, match=r"degree 4"):
        PowerState(S, Z, degree=4)


@pytest.mark.parametrize(("dy", "error", "message"), [
    (np.zeros((1, 5, 1, 64), np.float16), ArgumentError, r"dy has shape \[1, 5, 1, 64\]; accepted: that of y, \[1, 5, 1, 32\]"),
    (np.zeros((1, 5, 1, 32), np.float32), ArgumentTypeError, r"dy is float32 of numpy.*accepted: what y is, float16"),
])  # fmt: skip
@pytest.mark.parametrize("target", ["cuda", "host"])
def test_gradients_of_y_that_are_refused(dy: np.ndarray, error: type[Exception], message: str, target: str) -> None:
    x = {name: a.astype(np.float16) for name, a in draw(10, 5, hq=1, gates=None).items()}
    _, vjp = power_retention_vjp(x["q"], x["k"], x["v"], target=target)
    with pytest.raises(error, match=message):
        vjp(dy)


# ----------------------------------------------------------------------------------------------------------------- torch


def tensors(x: Arrays, dtype: str = "float32") -> Any:
    torch = pytest.importorskip("torch")
    kinds = {name: torch.float32 if name == "log_g" else getattr(torch, dtype) for name in x}
    return torch, {name: torch.from_numpy(a).to(kinds[name]).requires_grad_(name != "dy") for name, a in x.items()}


@pytest.mark.parametrize(("target", "dtype", "bound"), [("cuda", "float32", 1e-4), ("host", "bfloat16", 1.5e-2)])
def test_autograd(target: str, dtype: str, bound: float) -> None:
    torch, x = tensors(draw(11, 150, hq=2), dtype)
    y = power_retention(x["q"], x["k"], x["v"], x["log_g"], target=target, chunk=128)
    assert y.requires_grad and y.dtype == x["q"].dtype
    y.backward(x["dy"])
    exact = gradients(*(x[n].detach().float().numpy() for n in ("q", "k", "v", "log_g", "dy")))
    for name in ("q", "k", "v", "log_g"):
        grad = x[name].grad
        assert grad.dtype == x[name].dtype and relative(grad.float().numpy(), getattr(exact, f"d{name}")) <= bound, name
    # A second backward pass adds to the first one's.
    first = x["k"].grad.clone()
    power_retention(x["q"], x["k"], x["v"], x["log_g"], target=target, chunk=128).backward(x["dy"])
    assert torch.equal(x["k"].grad, 2 * first)


def test_autograd_of_some_arguments_and_odd_gradients_of_y() -> None:
    torch, x = tensors(draw(12, 70, hq=2))
    q, k, v = x["q"].detach(), x["k"], x["v"].detach()
    y = power_retention(q, k, v)
    (expanded,) = torch.autograd.grad(y.sum(), k, retain_graph=True)
    (dense,) = torch.autograd.grad(y, k, torch.ones_like(y), retain_graph=True)
    (strided,) = torch.autograd.grad(y, k, torch.ones(1, 2, 70, 32).transpose(1, 2))
    assert torch.equal(expanded, dense) and torch.equal(strided, dense) and dense.abs().sum() > 0
    assert not power_retention(q, k.detach(), v).requires_grad
    with torch.no_grad():
        assert not power_retention(q, k, v).requires_grad


@pytest.mark.parametrize(("target", "dtype"), [("cuda", "float32"), ("host", "bfloat16")])
def test_autograd_under_checkpointing_through_states_and_added_up(target: str, dtype: str) -> None:
    torch, x = tensors(draw(13, 140, hq=2), dtype)
    from torch.utils.checkpoint import checkpoint

    (s, z), (d_s, d_z) = ([torch.from_numpy(a.astype(np.float32)) for a in draw_state(seed, draw(13, 140), tokens=40)] for seed in (5, 6))
    inputs = [*(x[n] for n in ("q", "k", "v", "log_g")), s.requires_grad_(), z.requires_grad_()]

    def call(q: Any, k: Any, v: Any, log_g: Any, s: Any, z: Any) -> tuple[Any, ...]:
        y, final = power_retention(q, k, v, log_g, initial_state=PowerState(s, z), output_final_state=True, chunk=128, target=target)
        return y, final.S, final.Z

    # dy comes as a view that is not contiguous, and of a constant expanded; S's gradient transposed in memory.
    d_y = x["dy"].transpose(1, 2).contiguous().transpose(1, 2)
    d_s = d_s.transpose(2, 3).contiguous().transpose(2, 3)
    plain = torch.autograd.grad(call(*inputs), inputs, (d_y, d_s, d_z))
    exact = gradients(
        *(a.detach().double().numpy() for a in (*inputs[:4], d_y)),
        initial=(s.detach().double().numpy(), z.detach().double().numpy()),
        d_final=(d_s.double().numpy(), d_z.double().numpy()),
    )
    for found, right in zip(plain, (exact.dq, exact.dk, exact.dv, exact.dlog_g, exact.d_s, exact.d_z), strict=True):
        assert found.dtype is not None and relative(found.float().numpy(), right) <= (2e-4 if target == "cuda" else 8e-3)
    for reentrant in (False, True):
        for a in inputs:
            a.grad = None
        # Twice: gradients add up.
        for _ in range(2):
            torch.autograd.backward(checkpoint(call, *inputs, use_reentrant=reentrant), (d_y, d_s, d_z))
        assert all(torch.equal(a.grad, b + b) for a, b in zip(inputs, plain, strict=True))
    # Of one result alone: the others count nothing.
    (of_state,) = torch.autograd.grad(call(*inputs)[1], inputs[2], d_s, retain_graph=True)
    (with_zeros,) = torch.autograd.grad(call(*inputs), inputs[2], (torch.zeros_like(d_y), d_s, torch.zeros_like(d_z)))
    (expanded,) = torch.autograd.grad(call(*inputs)[0].sum(), inputs[2])
    (dense,) = torch.autograd.grad(call(*inputs)[0], inputs[2], torch.ones_like(d_y))
    assert torch.equal(of_state, with_zeros) and of_state.abs().sum() > 0
    assert torch.equal(expanded, dense) and dense.abs().sum() > 0


def test_autograd_of_a_sequence_that_is_split() -> None:
    torch, x = tensors(draw(13, 90, hq=2))
    inputs = [x[n] for n in ("q", "k", "v", "log_g")]
    plain = torch.autograd.grad(power_retention(*inputs), inputs, x["dy"])
    # Cut in two, the state passed on: the same gradients.
    first, state = power_retention(*(a[:, :33] for a in inputs), output_final_state=True)
    second = power_retention(*(a[:, 33:] for a in inputs), initial_state=state)
    split = torch.autograd.grad(torch.cat([first, second], 1), inputs, x["dy"])
    assert all(relative(a.numpy(), b.double().numpy()) <= 1e-4 for a, b in zip(split, plain, strict=True))


def test_gradients_of_gradients_and_of_forward_mode_are_refused() -> None:
    torch, x = tensors(draw(14, 20, hq=1, gates=None))
    y = power_retention(x["q"], x["k"], x["v"])
    with pytest.raises(UnsupportedError, match=r"power_retention: a gradient of its gradient"):
        torch.autograd.grad(y.sum(), x["q"], create_graph=True)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x["q"].detach(), torch.ones_like(x["q"]))
        with pytest.raises(UnsupportedError, match="forward-mode"):
            power_retention(dual, x["k"], x["v"])
        with pytest.raises(UnsupportedError, match="forward-mode"):
            power_retention(dual, x["k"].detach(), x["v"].detach())
    with pytest.raises(UnsupportedError, match=r"torch\.func"):
        torch.func.grad(lambda q: power_retention(q, x["k"].detach(), x["v"].detach()).sum())(x["q"].detach())


def _small() -> tuple[Any, ...]:
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn((1, 70, h, d), generator=generator) for h, d in ((2, 32), (1, 32), (1, 64)))
    return q, k, v, torch.nn.functional.logsigmoid(torch.randn((1, 70, 1), generator=generator))


def test_a_states_tangent_is_refused_by_name() -> None:
    torch = pytest.importorskip("torch")
    inputs = _small()
    _, state = power_retention(*inputs, output_final_state=True)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(UnsupportedError, match=r"initial_state\.S carries a tangent"):
        dual = torch.autograd.forward_ad.make_dual(state.S, torch.ones_like(state.S))
        power_retention(*inputs, initial_state=PowerState(dual, state.Z))


def test_batched_gradients_are_refused_by_name() -> None:
    torch = pytest.importorskip("torch")
    q, *others = _small()
    y = power_retention(q.requires_grad_(), *others)
    with pytest.raises(UnsupportedError, match=r"dy has no memory of its own"):
        torch.autograd.grad(y, q, torch.stack([torch.ones_like(y)] * 2), is_grads_batched=True)


@pytest.mark.parametrize("recorded", [False, True])
def test_states_that_no_call_takes_are_refused_alike(recorded: bool) -> None:
    torch = pytest.importorskip("torch")
    q, *others = _small()
    inputs = (q.requires_grad_(recorded), *others)
    state = torch.zeros(1, 1, 640, 64), torch.zeros(1, 1, 32, 32)
    with pytest.raises(ArgumentTypeError, match=r"initial_state is a tuple; accepted: a PowerState"):
        power_retention(*inputs, initial_state=state)
    with pytest.raises(UnsupportedError, match=r"initial_state with degree=4"):
        power_retention(*inputs, degree=4, initial_state=PowerState(*state))
    with pytest.raises(UnsupportedError, match=r"output_final_state with degree=4"):
        power_retention(*inputs, degree=4, output_final_state=True)
    for flag in ("no", np.array([1, 1]), 1, None):
        with pytest.raises(ArgumentError, match=r"output_final_state=.* is not served; accepted: True, False"):
            power_retention(*inputs, output_final_state=flag)


def test_what_a_vjp_is_not_asked_for_is_refused() -> None:
    torch = pytest.importorskip("torch")
    inputs = _small()
    state = PowerState(torch.zeros(1, 1, 640, 64), torch.zeros(1, 1, 32, 32))
    y, vjp = power_retention_vjp(*inputs)
    with pytest.raises(ArgumentError, match=r"d_state: the final state was not asked for"):
        vjp(torch.ones_like(y), state)
    with pytest.raises(UnsupportedError, match=r"initial_state\.S requires a gradient"):
        power_retention_vjp(*inputs, initial_state=PowerState(state.S.requires_grad_(), state.Z))
    with pytest.raises(ArgumentTypeError, match=r"dy is .* of numpy on the CPU; accepted: what y is, float32 of torch on the CPU"):
        vjp(np.ones(y.shape, np.float32))


def test_a_states_gradient_may_have_its_negative_bit_set() -> None:
    torch = pytest.importorskip("torch")
    q, k, v, log_g = _small()
    _, state = power_retention(q, k.requires_grad_(), v, log_g, output_final_state=True)
    (found,) = torch.autograd.grad(state.S, k, torch._neg_view(torch.ones_like(state.S)), retain_graph=True)
    (expected,) = torch.autograd.grad(state.S, k, -torch.ones_like(state.S))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_gradients_are_contiguous(library: str) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 9, 2, 32), np.float32) for _ in range(3))
    # As they lie where a model keeps heads before tokens.
    log_g = -rng.random((2, 2, 9), np.float32).transpose(0, 2, 1)
    inputs: Any = (q, k, v, log_g)
    if library == "torch":
        inputs = tuple(map(pytest.importorskip("torch").from_numpy, inputs))
    y, vjp = power_retention_vjp(*inputs)
    found = [y, *(x for x in vjp(y) if x is not None)]
    assert len(found) == 5 and all(x.flags.c_contiguous if library == "numpy" else x.is_contiguous() for x in found)
