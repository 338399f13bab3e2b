"""Ops inside JAX's transformations on a GPU: the launches on XLA's stream."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")

from vidrial.kernels.flash_attention import flash_attention  # noqa: E402
from vidrial.kernels.power_retention import PowerState, power_retention, power_retention_vjp  # noqa: E402


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("JAX has no GPU")


def inputs(t: int, d: int = 64, b: int = 2) -> list[Any]:
    rng = np.random.default_rng(t)
    arrays = [jnp.asarray(rng.standard_normal((b, t, heads, d)), jnp.bfloat16) for heads in (4, 2, 2)]
    return [*arrays, jnp.asarray(-np.abs(rng.standard_normal((b, t, 2))) * 0.1, jnp.float32)]


def relative(found: Any, exact: Any) -> float:
    found, exact = (np.asarray(x, np.float64) for x in (found, exact))
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def test_jit_gives_the_bits_of_a_call() -> None:
    for t in (1, 65, 1000, 2048, 6007):
        given = inputs(t)
        assert jnp.array_equal(jax.jit(power_retention)(*given), power_retention(*given)), t
        q, k, v, _ = given
        assert jnp.array_equal(jax.jit(lambda *a: flash_attention(*a, causal=True))(q, k, v), flash_attention(q, k, v, causal=True)), t


def test_gradients_are_those_of_numpy() -> None:
    given = inputs(1000)
    found = jax.jit(jax.grad(lambda *a: (power_retention(*a).astype(jnp.float32) ** 2).sum(), (0, 1, 2, 3)))(*given)
    y, vjp = power_retention_vjp(*(np.asarray(x, np.float32) for x in given))
    for name, mine, exact, bound in zip("qkvg", found, vjp(2 * y), (8e-3, 8e-3, 8e-3, 1.5e-2), strict=False):
        assert 0 < relative(mine, exact) < bound, name


def test_vmap_folds_and_a_jit_of_several_calls_runs_in_order() -> None:
    q, k, v, log_g = inputs(257)
    several = jnp.stack([q, q[::-1], -q])
    found = jax.jit(jax.vmap(power_retention, (0, None, None, None)))(several, k, v, log_g)
    for one, x in zip(found, several, strict=True):
        assert relative(one, power_retention(x, k, v, log_g)) < 1e-2
    layered = jax.jit(lambda q: power_retention(power_retention(q * 2, k, v, log_g), k, v, log_g) + 1)
    once = power_retention(q * 2, k, v, log_g)
    for _ in range(20):  # XLA captures what ran a few times into a CUDA graph
        assert jnp.array_equal(layered(q), power_retention(once, k, v, log_g) + 1)


def test_states_under_jit_in_a_scan_and_their_gradients() -> None:
    given, first = inputs(300), power_retention(*inputs(65), output_final_state=True)[1]
    call = lambda state, *a: power_retention(*a, initial_state=state, output_final_state=True)  # noqa: E731
    y, last = call(first, *given)
    for mine, exact in zip(jax.tree.leaves(jax.jit(call)(first, *given)), (y, last.S, last.Z), strict=True):
        assert jnp.array_equal(mine, exact)

    def step(state: Any, x: Any) -> Any:
        y, state = call(state, *(a[:, None] for a in x))
        return state, y[:, 0]

    state, ys = jax.jit(lambda *a: jax.lax.scan(step, *a))(first, [jnp.moveaxis(x, 1, 0) for x in given])
    for mine, exact, bound in ((jnp.moveaxis(ys, 0, 1), y, 1e-2), (state.S, last.S, 7e-3), (state.Z, last.Z, 7e-3)):
        assert relative(mine, exact) < bound

    def loss(state: Any, *a: Any) -> Any:
        y, last = call(state, *a)
        return (y.astype(jnp.float32) ** 2).sum() + (last.S**2).sum() + (last.Z**2).sum()

    found = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4)))(first, *given)
    wide = [np.asarray(x, np.float32) for x in given]
    before = PowerState(np.asarray(first.S), np.asarray(first.Z))
    (y, last), vjp = power_retention_vjp(*wide, initial_state=before, output_final_state=True)
    *exact, d_first = vjp(2 * y, PowerState(2 * last.S, 2 * last.Z))
    for mine, right in zip(jax.tree.leaves(found), [d_first.S, d_first.Z, *exact], strict=True):
        assert 0 < relative(mine, right) < 1.5e-2


def test_an_exception_is_xlas_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from vidrial import traced

    given = inputs(129)
    called = jax.jit(power_retention)
    exact = called(*given)

    def broken(*_: object) -> None:
        raise ValueError("planted")

    monkeypatch.setattr(traced, "_plan", broken)
    with pytest.raises(Exception, match="ValueError: planted"):
        called(*given).block_until_ready()
    monkeypatch.undo()
    assert jnp.array_equal(called(*given), exact)


def test_a_calls_host_time(capsys: pytest.CaptureFixture[str]) -> None:
    """Beside jit(x + 1), in turns: 15 us more at most."""
    given, x = inputs(65, b=1), jnp.ones(4)
    took: dict[str, list[float]] = {"x + 1": [], "power_retention": []}
    add, call = jax.jit(lambda x: x + 1), jax.jit(power_retention)
    for _ in range(200):
        for name, run in (("x + 1", lambda: add(x)), ("power_retention", lambda: call(*given))):
            start = time.perf_counter()
            made = run()
            took[name].append(time.perf_counter() - start)
            made.block_until_ready()
    us = {name: float(np.median(each[20:])) * 1e6 for name, each in took.items()}
    with capsys.disabled():
        print({name: f"{t:.1f} us" for name, t in us.items()})
    assert us["power_retention"] < us["x + 1"] + 15
