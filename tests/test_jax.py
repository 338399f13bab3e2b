"""Ops inside JAX's transformations, on the CPU: the same custom call as on a GPU, whose handler runs NumPy or the host target."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import make_dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_op
import numpy as np
import pytest

import vidrial as vd
from examples.gemm import gemm
from vidrial import traced
from vidrial.device import Device
from vidrial.kernels.flash_attention import flash_attention
from vidrial.kernels.power_retention import PowerState, power_retention, power_retention_vjp
from vidrial.tune import choose_config

jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")

ROOT = Path(__file__).parents[1]


def inputs(t: int, b: int = 2, hq: int = 4, h: int = 2, d: int = 32, seed: int = 0) -> list[Any]:
    """q, k, v, log_g, float32."""
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal((b, t, heads, d)).astype(np.float32) for heads in (hq, h, h)]
    return [*arrays, -np.abs(rng.standard_normal((b, t, h))).astype(np.float32) * 0.1]


def as_jax(arrays: list[Any], dtype: str = "float32") -> list[Any]:
    return [jnp.asarray(x, dtype if x.ndim == 4 else "float32") for x in arrays]


def loss(*arrays: Any, **options: Any) -> Any:
    return (power_retention(*arrays, **options).astype(jnp.float32) ** 2).sum()


def same(found: Any, expected: Any) -> None:
    assert found.dtype == expected.dtype and np.array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("t", [1, 7, 65, 257])
def test_jit_gives_what_a_call_gives(t: int, dtype: str) -> None:
    given = as_jax(inputs(t), dtype)
    for count, options in ((4, {}), (3, {"degree": 4}), (4, {"normalize": "none", "chunk": 128, "scale": 0.1})):
        expected = power_retention(*given[:count], **options)
        same(jax.jit(lambda *a, o=options: power_retention(*a, **o))(*given[:count]), expected)
        assert float(jnp.abs(expected).max()) > 0.05


@pytest.mark.parametrize(("gated", "normalize"), [(True, "sum"), (False, "sum"), (True, "none")])
def test_gradients_are_those_of_the_vjp(gated: bool, normalize: str) -> None:
    arrays = inputs(129)[: 4 if gated else 3]
    found = jax.jit(jax.grad(partial(loss, normalize=normalize), tuple(range(len(arrays)))))(*as_jax(arrays))
    y, vjp = power_retention_vjp(*arrays, normalize=normalize)
    for mine, exact in zip(found, vjp(2 * y), strict=False):
        same(mine, exact)


def test_vmap_makes_one_larger_batch() -> None:
    q, k, v, log_g = as_jax(inputs(65))
    several = jnp.stack([q, 2 * q + 1, q[::-1]])
    mapped = jax.vmap(power_retention, (0, None, None, None))
    same(mapped(several, k, v, log_g), jnp.stack([power_retention(x, k, v, log_g) for x in several]))
    program = jax.jit(jax.vmap(mapped, (0, None, None, None))).lower(jnp.stack([several] * 2), k, v, log_g).as_text()
    assert program.count(f"@{traced.TARGET}(") == 1 and "tensor<12x65x4x32xf32>" in program
    # Of what is not mapped over the gradients add up.
    found = jax.grad(lambda k: mapped(several, k, v, log_g).sum())(k)
    expected = sum(jax.grad(lambda k, x=x: power_retention(x, k, v, log_g).sum())(k) for x in several)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def gemm_asks(specs: Any, options: Any) -> traced.Asked:
    (m, k), n = specs["a"].shape, specs["b"].shape[0]
    return traced.Asked(gemm.Problem(specs["a"].dtype, False, False, m, n, k))


def gemm_on_cpu(arrays: Any, options: Any) -> Any:
    a, b = (arrays[name].astype(np.float32) for name in "ab")
    return {"c": (a @ b.T).astype(arrays["a"].dtype)}


GEMM = traced.Traceable(gemm.op, gemm_asks, gemm_on_cpu)


def test_what_does_not_fold_is_mapped_one_by_one() -> None:
    """A batch of matrices is no larger matrix to a GEMM: its second matrix would become one of several times as many columns."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.integers(-2, 3, shape), jnp.float16) for shape in ((3, 16, 32), (24, 32)))
    product = lambda a, b: traced.traced(f"{__name__}:GEMM", {"a": a, "b": b})["c"]  # noqa: E731
    same(jax.jit(jax.vmap(product, (0, None)))(a, b), jnp.einsum("imk,nk->imn", a, b))
    same(jax.vmap(product, (None, 1), 1)(a[0], jnp.stack([b, -b], 1)), jnp.stack([a[0] @ b.T, -(a[0] @ b.T)], 1))


def test_a_users_op_runs_on_the_host_target() -> None:
    softmax = pytest.importorskip("examples.softmax.softmax").softmax
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 129)), jnp.float32)
    np.testing.assert_allclose(jax.jit(softmax)(x), jax.nn.softmax(x), rtol=1e-5)
    with pytest.raises(vd.UnsupportedError, match="^softmax: its gradient is not computed"):
        jax.grad(lambda x: softmax(x).sum())(x)


def scaled_of(x: vd.ArraySpec, factor: float = 3.0) -> fake_op.Problem:
    return fake_op.Problem(vd.DType.float32, x.shape[0], factor)


def gradient_of(x: vd.ArraySpec, dy: vd.ArraySpec, factor: float = 3.0) -> fake_op.Problem:
    return scaled_of(dy, factor)


def vectors(*names: str) -> Any:
    return lambda p: {name: vd.Buffer((p.n,), vd.DType.float32) for name in names}


SQUARED_BACKWARD = replace(fake_op.op, name="squared_backward", problem_of=gradient_of, inputs=vectors("x", "dy"), outputs=vectors("dx"))
SQUARED = replace(fake_op.op, name="squared", problem_of=scaled_of, inputs=vectors("x"), outputs=vectors("y"), backward=SQUARED_BACKWARD)


def test_a_users_op_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """y = factor x^2, by a stand-in for its kernels."""

    def computed(op: Any, problem: Any) -> Any:
        def run(arrays: dict[str, Any]) -> None:
            if op is SQUARED:
                arrays["y"][:] = problem.scale * arrays["x"] ** 2
            else:
                arrays["dx"][:] = 2 * problem.scale * arrays["x"] * arrays["dy"]

        return SimpleNamespace(run=run)

    monkeypatch.setattr(traced, "predicted_plan", computed)
    monkeypatch.setattr(traced, "reference_of", lambda op: f"{__name__}:{'SQUARED_BACKWARD' if op is SQUARED_BACKWARD else 'SQUARED'}")
    traced._traceable.cache_clear()
    x = jnp.asarray([1.0, -2.0, 3.0])
    function = lambda x: traced.traced(f"{__name__}:SQUARED", {"x": x}, factor=2.5)["y"]  # noqa: E731
    same(jax.jit(function)(x), 2.5 * x**2)
    same(jax.jit(jax.grad(lambda x: (function(x) * jnp.asarray([1.0, 10.0, 100.0])).sum()))(x), 5.0 * x * jnp.asarray([1.0, 10.0, 100.0]))
    same(jax.vmap(jax.grad(lambda x: function(x).sum()))(jnp.stack([x, -x])), jnp.stack([5.0 * x, -5.0 * x]))
    with pytest.raises(vd.UnsupportedError, match="^squared_backward: its gradient is not computed"):
        jax.grad(lambda x: jax.grad(lambda x: function(x).sum())(x).sum())(x)


def test_flash_attention() -> None:
    q, k, v, _ = as_jax(inputs(65), "float16")
    options = {"causal": True, "window": (20, None), "scale": 0.2}
    y, lse = jax.jit(lambda *a: flash_attention(*a, return_lse=True, **options))(q, k, v)
    for mine, exact in zip((y, lse), flash_attention(q, k, v, return_lse=True, **options), strict=True):
        same(mine, exact)
    same(jax.vmap(lambda q: flash_attention(q, k, v))(jnp.stack([q, -q]))[1], flash_attention(-q, k, v))
    with pytest.raises(vd.UnsupportedError, match="^flash_attention: its gradient is not computed"):
        jax.grad(lambda q: flash_attention(q, k, v).sum())(q)


def test_the_kernels_themselves_with_gradients() -> None:
    """target="host": the same kernels, outputs and saved normaliser as on a GPU."""
    given = as_jax(inputs(65, b=1, hq=2, h=1), "bfloat16")
    found = jax.grad(lambda *a: loss(*a, target="host"), (0, 1, 2, 3))(*given)
    exact = jax.grad(loss, (0, 1, 2, 3))(*(x.astype("float32") for x in given))
    for mine, right in zip(found, exact, strict=True):
        mine = np.asarray(mine, np.float32)
        assert 0 < np.linalg.norm(mine - right) / np.linalg.norm(right) < 1.5e-2


def behind(arrays: list[Any]) -> PowerState[Any]:
    """The state behind some tokens."""
    return power_retention(*arrays, output_final_state=True)[1]


def step(state: PowerState[Any], x: Any) -> tuple[PowerState[Any], Any]:
    """One token, as jax.lax.scan calls it."""
    y, state = power_retention(*(a[:, None] for a in x), initial_state=state, output_final_state=True)
    return state, y[:, 0]


def weighted(y: Any, state: PowerState[Any]) -> Any:
    """A loss that reads each of y, S and Z, and weighs each of its own."""
    return (y.astype(jnp.float32) ** 2).sum() + 2 * (state.S**2).sum() + 3 * (state.Z**2).sum()


def test_a_decoding_loop_is_one_scan() -> None:
    """Its tokens, its last state and its gradients are those of one call."""
    given, first = as_jax(inputs(7)), behind(as_jax(inputs(5, seed=1)))
    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in given)

    def loss_of_a_loop(tokens: Any, state: PowerState[Any]) -> Any:
        last, y = jax.lax.scan(step, state, tokens)
        return weighted(y, last), (jnp.moveaxis(y, 0, 1), last)

    gradients, found = jax.jit(jax.grad(loss_of_a_loop, (0, 1), has_aux=True))(tokens, first)
    (y, last), vjp = power_retention_vjp(*given, initial_state=first, output_final_state=True)
    assert isinstance(found[1], PowerState) and found[1].degree == 2
    for mine, exact in zip(jax.tree.leaves(found), (y, last.S, last.Z), strict=True):
        np.testing.assert_allclose(mine, exact, rtol=1e-4, atol=1e-4)
    *exact, d_first = vjp(2 * y, PowerState(4 * last.S, 6 * last.Z))
    for mine, right in zip(jax.tree.leaves(gradients), [*(jnp.moveaxis(x, 1, 0) for x in exact), d_first.S, d_first.Z], strict=True):
        assert np.linalg.norm(mine - right) <= 1e-5 * np.linalg.norm(right) > 0


@pytest.mark.parametrize("t", [0, 65])
def test_states_under_jit_are_those_of_a_call(t: int) -> None:
    given, first = as_jax(inputs(t)), behind(as_jax(inputs(5, seed=1)))
    for state, count, options in ((first, 4, {}), (None, 3, {"normalize": "none"}), (first, 3, {"chunk": 128, "scale": 0.1})):
        call = lambda state, *a, o=options: power_retention(*a, initial_state=state, output_final_state=True, **o)  # noqa: E731
        for mine, exact in zip(
            jax.tree.leaves(jax.jit(call)(state, *given[:count])), jax.tree.leaves(call(state, *given[:count])), strict=True
        ):
            same(mine, exact)
    same(jax.jit(lambda *a: power_retention(*a, initial_state=first))(*given), power_retention(*given, initial_state=first))


def test_vmap_over_states_makes_one_larger_batch() -> None:
    q, k, v, log_g = as_jax(inputs(9))
    first = behind(as_jax(inputs(5, seed=1)))
    several = jax.tree.map(lambda x: jnp.stack([x, -2 * x]), first)
    call = lambda q, state: power_retention(q, k, v, log_g, initial_state=state, output_final_state=True)  # noqa: E731
    mapped = jax.vmap(call, (None, 0))
    found, each = jax.jit(mapped)(q, several), [jax.tree.map(lambda x, i=i: x[i], several) for i in range(2)]
    for mine, *exact in zip(*map(jax.tree.leaves, (found, *(call(q, state) for state in each))), strict=True):
        same(mine, jnp.stack(exact))
    assert jax.jit(mapped).lower(q, several).as_text().count(f"@{traced.TARGET}(") == 1
    summed = jax.jit(jax.grad(lambda q: weighted(*mapped(q, several))))(q)
    right = 0
    for state in each:
        (y, last), vjp = power_retention_vjp(q, k, v, log_g, initial_state=state, output_final_state=True)
        right += vjp(2 * y, PowerState(4 * last.S, 6 * last.Z)).dq
    assert np.linalg.norm(summed - right) <= 1e-5 * np.linalg.norm(right) > 0


def test_the_kernels_states_with_gradients() -> None:
    """target="host", by the kernels that tests/power_retention/test_states_host.py has built: the bits of an eager call."""
    given, first = as_jax(inputs(300, b=1, hq=2, h=1), "float16"), behind(as_jax(inputs(5, b=1, hq=2, h=1, seed=1)))
    options = {"output_final_state": True, "chunk": 128, "target": "host"}
    found = jax.jit(jax.grad(lambda a, state: weighted(*power_retention(*a, initial_state=state, **options)), (0, 1)))(given, first)
    (y, last), vjp = power_retention_vjp(*given, initial_state=first, recompute=True, **options)
    *exact, d_first = vjp((2 * y.astype(jnp.float32)).astype(y.dtype), PowerState(4 * last.S, 6 * last.Z))
    assert isinstance(last.S, jax.Array)
    for mine, right in zip(jax.tree.leaves(found), [*exact, d_first.S, d_first.Z], strict=True):
        same(mine, right)


def test_no_tokens_no_call() -> None:
    given = as_jax(inputs(7))
    y = jax.jit(power_retention)(*(x[:, :0] for x in given))
    assert y.shape == (2, 0, 4, 32)
    assert jax.grad(loss)(*(x[:, :0] for x in given)).shape == (2, 0, 4, 32)


def test_a_row_without_keys_is_what_a_call_gives() -> None:
    q, k, v, _ = as_jax(inputs(7))
    options = {"return_lse": True}
    found = jax.jit(lambda *a: flash_attention(*a, **options))(q, k[:, :0], v[:, :0])
    for mine, exact in zip(found, flash_attention(q, k[:, :0], v[:, :0], **options), strict=True):
        same(mine, exact)
    assert np.all(np.asarray(found[1]) == -np.inf)


def test_a_map_over_none_has_the_shapes_of_one() -> None:
    none = [jnp.stack([x, x])[:0] for x in as_jax(inputs(7))]
    assert jax.vmap(power_retention)(*none).shape == (0, 2, 7, 4, 32)
    assert jax.jit(jax.vmap(jax.grad(loss, 3)))(*none).shape == (0, 2, 7, 2)


def test_recompute_concerns_what_torch_records() -> None:
    given = as_jax(inputs(7))
    same(jax.jit(lambda *a: power_retention(*a, recompute=False))(*given), power_retention(*given))


def test_a_tree_is_a_dataclass_and_may_be_defined_again() -> None:
    for n in range(2):
        made = vd.pytree("S")(make_dataclass("Twice", ["S", ("n", int, n)], frozen=True))
        doubled = jax.tree.map(lambda x: 2 * x, made(3))
        assert type(doubled) is made and (doubled.S, doubled.n) == (6, n)
    for cls, said in ((made, "is a dataclass with the fields S, n; accepted: a dataclass that has those fields"), (int, "is no dataclass")):
        with pytest.raises(vd.ArgumentError, match=rf"^pytree\('S', 'Q'\): .* {said}"):
            vd.pytree("S", "Q")(cls)


def test_refused_while_jax_traces() -> None:
    q, k, v, log_g = as_jax(inputs(7))
    with pytest.raises(vd.ArgumentError, match="^q has 3 heads and k has 2"):
        jax.jit(power_retention)(q[:, :, :3], k, v, log_g)
    with pytest.raises(vd.ArgumentTypeError, match="^k is float16"):
        jax.jit(power_retention)(q, k.astype("float16"), v, log_g)
    with pytest.raises(vd.ArgumentError, match="^chunk=3"):
        jax.jit(lambda *a: power_retention(*a, chunk=3))(q, k, v)
    with pytest.raises(vd.UnsupportedError, match="^power_retention(_backward)?: its gradient is not computed"):
        jax.grad(lambda q: jax.grad(loss)(q, k, v, log_g).sum())(q)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda q: power_retention(q, k, v), (q,), (q,))
    state = behind([q, k, v])
    for given, options, said in (
        (jax.tree.map(lambda x: x[:1], state), {}, r"^initial_state\.S has shape \[1, 2, 640, 32\]; accepted: \[2, 2, 640, 32\]"),
        (jax.tree.map(lambda x: x.astype("float16"), state), {}, "^initial_s is float16; accepted: float32"),
        ((state.S, state.Z), {}, "^initial_state is a tuple; accepted: a PowerState"),
        (jax.tree.map(lambda x: None, state), {}, r"^initial_state\.S is None; accepted: an array"),
        (state, {"degree": 4}, "^initial_state with degree=4: only degree 2"),
        (None, {"output_final_state": 1}, "^output_final_state=1 is not served"),
    ):
        with pytest.raises(vd.VidrialError, match=said):
            jax.jit(lambda state, o=options: power_retention(q, k, v, initial_state=state, **o))(given)
    with pytest.raises(vd.ArgumentTypeError, match="^q: dtype 'bool' is not known"):
        jax.jit(power_retention)(q.astype(bool), k, v)
    with pytest.raises(vd.ArgumentTypeError, match="^k: builtins.list is not an array"):
        jax.jit(lambda q: power_retention(q, k.tolist(), v))(q)


@pytest.mark.parametrize("error", [ValueError("planted"), vd.OutOfMemoryError("planted"), KeyboardInterrupt("planted")])
def test_an_exception_in_the_handler_is_xlas_error(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """ctypes prints and drops what leaves a callback, and the caller gets what the memory held before."""
    from vidrial.kernels.power_retention import gradient

    def broken(*_: object) -> None:
        raise error

    given = as_jax(inputs(9))
    called = jax.jit(power_retention)
    same(called(*given), power_retention(*given))
    monkeypatch.setattr(gradient, "forward", broken)
    with pytest.raises(Exception, match=f"{type(error).__name__}: planted"):
        called(*given).block_until_ready()
    monkeypatch.undo()
    same(called(*given), power_retention(*given))


def test_what_a_gpus_call_carries_is_what_its_handler_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    from vidrial.kernels.power_retention.traced import BACKWARD

    made: list[Any] = []
    monkeypatch.setattr(traced, "CudaPlan", lambda *told: made.append(told))
    given = inputs(257, d=64)
    arrays = {"q": given[0], "k": given[1], "v": given[2], "log_g": given[3], "y": given[0], "dy": given[0]}
    arrays["norm"] = np.zeros((2, 4, 257), np.float32)
    # A state before the first token, and the gradient of the one behind the last.
    states = {"initial": True, "final": True, "d_final": True}
    arrays |= {f"{name}_{x}": np.zeros((2, 2, *shape), np.float32) for name in states for x, shape in (("s", (2304, 64)), ("z", (64, 64)))}
    specs = tuple((n, vd.ArraySpec.of(vd.as_array(x, n).facts, n)._replace(dtype=vd.DType.bfloat16)) for n, x in arrays.items())
    specs = tuple(
        (n, s._replace(dtype=vd.DType.float32) if n.startswith(("log_g", "norm", "initial", "final", "d_final")) else s) for n, s in specs
    )
    options = (("degree", 2), ("scale", None), ("normalize", "sum"), ("chunk", 128), ("target", "cuda"), ("final", True))
    device = Device.of("h200")
    text, size = traced._on_gpu("vidrial.kernels.power_retention.traced:BACKWARD", specs, options, device)
    _, names = traced._plan(text.encode(), 3)
    op, problem, config, index = made[0]
    assert op is BACKWARD.op and index == 3 and problem == BACKWARD.asks(dict(specs), dict(options)).problem
    assert config == choose_config(op, problem, device, (("chunk", 128),)).config and config.chunk == 128
    assert problem.initial and problem.final and set(arrays) == set(op.inputs(problem))
    assert (
        names == (*arrays, *op.outputs(problem))
        and names[-2:] == ("d_initial_s", "d_initial_z")
        and size >= op.workspace_bytes(problem, config)
    )


ELSEWHERE = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax, numpy as np
from jax.sharding import PartitionSpec as P
import vidrial.traced

vidrial.traced.register()
arrays = [np.load(f"{sys.argv[1]}/{i}.npy") for i in range(4)]
read = lambda name: jax.export.deserialize(open(f"{sys.argv[1]}/{name}", "rb").read())
same = [np.array_equal(read("program").call(*arrays), np.load(f"{sys.argv[1]}/y.npy"))]

from vidrial.kernels.power_retention import PowerState, power_retention
_, state = power_retention(*(x[:, :9] for x in arrays), output_final_state=True)
y, last = read("states").call(state, *(x[:, 9:] for x in arrays))
exact, exact_last = power_retention(*(x[:, 9:] for x in arrays), initial_state=state, output_final_state=True)
same += [type(last) is PowerState, np.array_equal(y, exact), np.array_equal(last.S, exact_last.S), np.array_equal(last.Z, exact_last.Z)]
mesh = jax.make_mesh((2, 2), ("b", "h"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
cut, cut_gates = P("b", None, "h", None), P("b", None, "h")
sharded = jax.jit(jax.shard_map(power_retention, mesh=mesh, in_specs=(cut, cut, cut, cut_gates), out_specs=cut))
same += [np.array_equal(sharded(*arrays), power_retention(*arrays))]
call = lambda state, *a: power_retention(*a, initial_state=state, output_final_state=True)
of_states = jax.shard_map(call, mesh=mesh, in_specs=(P("b", "h"), cut, cut, cut, cut_gates), out_specs=(cut, P("b", "h")))
for mine, exact in zip(jax.tree.leaves(of_states(state, *arrays)), jax.tree.leaves(call(state, *arrays))):
    same += [np.array_equal(mine, exact)]
loss = lambda f: lambda *a: (f(*a) ** 2).sum()
for mine, exact in zip(*(jax.grad(loss(f), (0, 1, 2, 3))(*map(jax.numpy.asarray, arrays)) for f in (sharded, power_retention))):
    same += [np.allclose(mine, exact, rtol=1e-5, atol=1e-6) and float(abs(exact).max()) > 0]
# Replicated beside what is cut: the outputs differ where any input does, and gradients of the copies add up.
for cuts in ((None, "b", "b", "b"), ("b", None, None, None)):
    some = [jax.numpy.asarray(x if cut else x[:1]) for x, cut in zip(arrays, cuts)]
    mixed = jax.shard_map(power_retention, mesh=mesh, in_specs=tuple(P(cut) for cut in cuts), out_specs=P("b"))
    whole = lambda *a: power_retention(*(x if cut else jax.numpy.concatenate([x, x]) for x, cut in zip(a, cuts)))
    same += [np.array_equal(mixed(*some), whole(*some))]
    for mine, exact in zip(*(jax.grad(loss(f), (0, 1, 2, 3))(*some) for f in (mixed, whole))):
        same += [np.allclose(mine, exact, rtol=1e-5, atol=1e-5)]
try:
    jax.shard_map(lambda *a: power_retention(*a).sum(), mesh=mesh, in_specs=(P(), P(), P(), P("b")), out_specs=P())(*(x[:1] for x in arrays[:3]), arrays[3])
except ValueError as error:
    same += ["out_specs" in str(error)]
print(same)
"""


def test_an_export_runs_in_another_process_and_shard_map_over_batch_and_heads(tmp_path: Path) -> None:
    export = pytest.importorskip("jax.export")
    arrays = inputs(33)
    for i, x in enumerate(arrays):
        np.save(tmp_path / f"{i}.npy", x)
    checks = [export.DisabledSafetyCheck.custom_call(traced.TARGET)]
    program = export.export(jax.jit(power_retention), disabled_checks=checks)(*as_jax(arrays))
    (tmp_path / "program").write_bytes(program.serialize())
    states = jax.jit(lambda state, *a: power_retention(*a, initial_state=state, output_final_state=True))
    program = export.export(states, disabled_checks=checks)(behind(as_jax(arrays)), *as_jax([x[:, 9:] for x in arrays]))
    (tmp_path / "states").write_bytes(program.serialize())
    np.save(tmp_path / "y.npy", power_retention(*arrays))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", ELSEWHERE, tmp_path], capture_output=True, text=True, env=environment, check=False)
    assert ran.stdout == f"{[True] * 24}\n", ran.stderr[-3000:]


def test_a_program_names_no_object_of_this_process() -> None:
    text = jax.jit(power_retention).lower(*as_jax(inputs(7))).as_text()
    asked = json.loads(text.partition('asked = "')[2].partition('"}')[0].replace("\\22", '"').replace('\\"', '"'))
    assert asked["call"] == "vidrial.kernels.power_retention.traced:PLAIN" and asked["inputs"] == ["q", "k", "v", "log_g"]


@pytest.mark.parametrize(("scale", "said"), [(np.float32(2), None), ([2], "scale is a list"), (jnp.float32(2), "scale is a ArrayImpl")])
def test_an_option_is_what_a_program_can_hold(scale: Any, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        sys.modules[__name__], "GEMM", traced.Traceable(gemm.op, lambda s, o: seen.append(o) or gemm_asks(s, o), gemm_on_cpu)
    )
    traced._traceable.cache_clear()
    call = jax.jit(lambda a: traced.traced(f"{__name__}:GEMM", {"a": a, "b": a}, scale=scale)["c"])
    if said is None:
        same(call(jnp.ones((16, 32), jnp.float16)), jnp.full((16, 16), 32, jnp.float16))
        assert type(seen[0]["scale"]) is float
    else:
        with pytest.raises(vd.ArgumentTypeError, match=f"^{said}; accepted of an option"):
            call(jnp.ones((16, 32), jnp.float16))
    traced._traceable.cache_clear()
