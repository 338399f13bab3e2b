"""States into and out of the kernels, and gradients through them, on the host target, against float64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from back_host import NARROW as BACK
from back_host import run as run_back
from back_host import wrong
from power_host import plant, run
from power_states import Arrays, draw_state, recurrent, relative

from vidrial.device import Device
from vidrial.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from vidrial.kernels.power_retention import PowerState, power_retention, power_retention_vjp
from vidrial.kernels.power_retention.attend import Config as Attend
from vidrial.kernels.power_retention.back.op import example as back_example
from vidrial.kernels.power_retention.back.op import op as back_op
from vidrial.kernels.power_retention.back.problem import Gradient
from vidrial.kernels.power_retention.op import Config, example, kept_chunk, op, sample
from vidrial.kernels.power_retention.problem import Problem
from vidrial.kernels.power_retention.reference import gradients
from vidrial.kernels.power_retention.scan import Config as Scan

# Of y and of a state as the op's own bounds: a state is summed of bf16 products. Of the gradient of the first state as of dv, which is made alike.
Y, STATE, D_STATE = 5e-3, 3.5e-3, 3.5e-3
NARROW = Config(128, Scan(tokens=64, stages=3, warps=4, columns=32, segments=1), Attend(keys=64, m=2, warps=4, stages=3, blocks=1))
HOPPER = Config(128, Scan(tokens=64, stages=4, warps=4, columns=64, tiles=2, segments=2, mma="wgmma"), Attend(blocks=1, mma="wgmma"))


def chunked(config: Any, t: int, segments: int = 2) -> Any:
    """A config for so many tokens: one chunk where they fit into one."""
    whole = t <= config.chunk
    return replace(config, chunk=0 if whole else config.chunk, scan=replace(config.scan, segments=segments if t > 2 * config.chunk else 1))


@cache
def case(t: int, gated: bool, initial: bool, normalize: str, d: int = 32) -> tuple[Problem, Arrays, Arrays]:
    """A problem that gives its state out, its inputs, and what is exact; Z and its gradient are not symmetric."""
    p = replace(example(t=t, h=1, hq=2, d=d, gated=gated, normalize=normalize), initial=initial, final=True)
    x = sample(p, t)
    wide = {name: p.dtype.widen(a).astype(np.float64) if a.dtype == np.uint16 else a for name, a in x.items()}
    s, z = draw_state(5, wide, tokens=40)
    s, z = (s, z + np.triu(z, 1) - np.tril(z, -1)) if initial else (0 * s, 0 * z)
    (d_s, d_z), skew = draw_state(6, wide, tokens=40), np.random.default_rng(7).standard_normal(z.shape)
    d_z = d_z + 20 * (skew - skew.swapaxes(-1, -2))
    given = {"initial_s": s, "initial_z": z, "d_final_s": d_s, "d_final_z": d_z}
    x |= {name: np.ascontiguousarray(a, np.float32) for name, a in given.items() if initial or "final" in name}
    y, final_s, final_z, norm = recurrent(wide, s, z, p.scale, normalize)
    dy = p.dtype.round(np.random.default_rng(8).standard_normal(y.shape).astype(np.float32))
    x |= {"dy": dy, "y": p.dtype.round(y.astype(np.float32)), "norm": np.ascontiguousarray(norm, np.float32)}
    x |= {"final_s": final_s.astype(np.float32), "final_z": final_z.astype(np.float32)}
    exact = gradients(
        wide["q"],
        wide["k"],
        wide["v"],
        x.get("log_g"),
        p.dtype.widen(dy),
        scale=p.scale,
        normalize=normalize,
        initial=(s, z) if initial else None,
        d_final=(d_s, d_z),
    )
    return p, x, {"y": y, "s": final_s, "z": (final_z + final_z.swapaxes(-1, -2)) / 2} | exact._asdict()


def forward_faults(p: Problem, config: Config, x: Arrays, exact: Arrays) -> list[str]:
    """What of y and of the final state is beyond its bound."""
    names = ("q", "k", "v", "log_g", "initial_s", "initial_z")
    found, _ = run(p, config, {name: x[name] for name in names if name in x})
    errors = {"y": relative(p.dtype.widen(found["y"]), exact["y"]) / Y}
    errors |= {name: relative(found[f"final_{name}"], exact[name]) / STATE for name in "sz"}
    return [f"{name}: {error:.2f} of its bound" for name, error in errors.items() if not error <= 1]


def backward_faults(p: Problem, config: Any, x: Arrays, exact: Arrays) -> list[str]:
    """What of the gradients is beyond its bound."""
    asked = Gradient(**vars(p), dy_stride=back_example(t=p.t, h=1, hq=2, d=p.d).dy_stride)
    names = ("q", "k", "v", "log_g", "initial_s", "initial_z", "dy", "d_final_s", "d_final_z")
    names += ("y", "norm") * p.normalized + ("final_s", "final_z") * p.gated
    found = run_back(asked, config, {name: x[name] for name in names if name in x})
    faults = [f"{name}: {error}" for name, error in wrong(asked, x, found, exact).items()]
    if p.initial:
        symmetric = (exact["d_z"] + exact["d_z"].swapaxes(-1, -2)) / 2
        errors = {"s": relative(found["d_initial_s"], exact["d_s"]), "z": relative(found["d_initial_z"], symmetric)}
        faults += [f"d_initial_{name}: {error}" for name, error in errors.items() if not error <= D_STATE]
    return faults


@pytest.mark.parametrize("t", [70, 300])
@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize(("gated", "normalize"), [(True, "sum"), (False, "none")])
def test_gates_states_and_lengths(t: int, initial: bool, gated: bool, normalize: str) -> None:
    """All eight; below the chunk and beyond it, there in segments."""
    p, x, exact = case(t, gated, initial, normalize)
    assert not forward_faults(p, chunked(NARROW, t), x, exact)
    assert not backward_faults(p, chunked(BACK, t), x, exact)


@pytest.mark.parametrize("segments", [1, 2])
def test_states_by_wgmma(segments: int) -> None:
    p, x, exact = case(389, True, True, "sum", d=64)
    assert not forward_faults(p, chunked(HOPPER, 389, segments), x, exact)


@pytest.mark.parametrize("cut", [1, 127, 128, 200, 299])
def test_a_sequence_may_be_split_at_any_token(cut: int) -> None:
    p, x, exact = case(300, True, False, "sum")
    ys, state = [], {}
    for begin, end in ((0, cut), (cut, 300)):
        part = {name: np.ascontiguousarray(x[name][:, begin:end]) for name in ("q", "k", "v", "log_g")}
        asked = replace(example(t=end - begin, h=1, hq=2, d=32), initial=bool(state), final=True)
        found, _ = run(asked, chunked(NARROW, end - begin), part | state)
        ys.append(p.dtype.widen(found["y"]))
        state = {f"initial_{name}": found[f"final_{name}"] for name in "sz"}
    assert relative(np.concatenate(ys, 1), exact["y"]) <= Y
    assert relative(state["initial_s"], exact["s"]) <= STATE and relative(state["initial_z"], exact["z"]) <= STATE


def test_the_ops_own_check_knows_states() -> None:
    """Its reference is what a token at a time gives; what is wrong in a state, or does not come from one, is beyond its bounds."""
    for initial, t, gated, normalize in (
        (True, 20, True, "sum"),
        (True, 9, False, "none"),
        (False, 20, True, "sum"),
        (True, 0, True, "sum"),
    ):
        p = example(t=t, h=1, hq=2, d=32, gated=gated, normalize=normalize, initial=initial, final=True)
        x = op.sample(p, 1)
        wide = {name: p.dtype.widen(a).astype(np.float64) if a.dtype == np.uint16 else a.astype(np.float64) for name, a in x.items()}
        s, z = (wide["initial_s"], wide["initial_z"]) if initial else draw_state(0, wide, tokens=0)
        y, final_s, final_z, _ = recurrent(wide, s, z, p.scale, normalize)
        exact = op.reference(p, x)
        for name, found in {"y": y, "final_s": final_s, "final_z": final_z}.items():
            np.testing.assert_allclose(exact[name], found, rtol=1e-9, atol=1e-9)
        right = {"y": p.dtype.round(y.astype(np.float32)), "final_s": final_s.astype(np.float32), "final_z": final_z.astype(np.float32)}
        assert op.check(p, x, right, exact).ok
        if t:
            for name in ("final_s", "final_z"):
                assert not op.check(p, x, right | {name: right[name] * np.float32(1.01)}, exact).ok
        if initial and t:
            without = recurrent(wide, 0 * s, 0 * z, p.scale, normalize)[0]
            assert not op.check(p, x, right | {"y": p.dtype.round(without.astype(np.float32))}, exact).ok


def test_the_backward_ops_own_check_knows_states() -> None:
    p = back_example(t=20, h=1, hq=2, d=32, initial=True, final=True)
    assert (p.initial, p.final) == (True, True) and back_op.small(p).final and op.small(p.forward).initial
    x = back_op.sample(p, 1)
    exact = back_op.reference(p, x)
    assert (exact["d_initial_z"] == exact["d_initial_z"].swapaxes(-1, -2)).all()
    right = {name: b.dtype.round(exact[name].astype(np.float32)) for name, b in back_op.outputs(p).items()}
    assert back_op.check(p, x, right, exact).ok
    for name in ("d_initial_s", "d_initial_z", "dv"):
        assert not back_op.check(
            p, x, right | {name: p.dtype.round(1.01 * exact[name].astype(np.float32)) if name == "dv" else 1.01 * right[name]}, exact
        ).ok


# One change of the device code each, which the bounds must see: file, what stands there, what stands there instead.
FORWARD = {
    "no state before the first chunk": ("power_tile", "(Tiles::enters || chunk > 0)", "chunk > 0"),
    "the state is not discounted": ("power_join", "decay *= decay_of(n + i);", "decay *= 1.f;"),
    "multiplicity of the first state": ("power_states", "count * p.initial_s[", "p.initial_s["),
    "multiplicity of the last state": ("power_states", "carry[i] / count", "carry[i]"),
    "the last segment alone": ("power_states", "end[i] + decay * carry[i]", "end[i]"),
    "Z of another row": ("power_states", "0.5f * (p.initial_z[in_z + element + i]", "0.5f * (p.initial_z[in_z + element]"),
    "tokens behind the end": ("power_tokens", "copy_k(stage * Tiles::K::kBytes, rows);", "copy_k(stage * Tiles::K::kBytes, kTokens);"),
}
BACKWARD = {
    "the first chunk left out of the state's gradient": ("power_back_scan", "n > (Tiles::enters ? -1 : 0)", "n > 0"),
    "no gradient of the last state": ("power_back_scan", "acc.x[m][n][2 * h + i] = x / count;", ""),
    "multiplicity of the last state's gradient": ("power_back_scan", "= x / count;", "= x;"),
    "a gradient of Z that is not symmetric": ("power_back_scan", "x = 0.5f * (x + p.d_final_z[", "x = 0.5f * (x + 0.f * p.d_final_z["),
    "multiplicity of the first state's gradient": (
        "power_back_scan",
        "store_row(row, acc.x[m], h, count,",
        "store_row(row, acc.x[m], h, 1.f,",
    ),
    "no state in dq of the first chunk": ("power_back_query", "(Tiles::enters || chunk > 0)", "chunk > 0"),
    "no gradient of the state in the last chunk": ("power_back_keys", "p.chunks + (Tiles::leaves ? 1 : 0)", "p.chunks"),
    "no <dS, S> in the gates": ("power_back_cross", "dot(p.final_s, p.d_final_s, Tiles::snapshot - kZ) +", ""),
    "no <dZ, Z> in the gates": ("power_back_cross", "+ dot(p.final_z, p.d_final_z, kZ)", ""),
    "no pairs behind the last chunk": ("power_back_gates", "(Tiles::leaves || chunk + 1 < p.chunks)", "chunk + 1 < p.chunks"),
}


@pytest.fixture
def patched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The sources of all plans with one wrong line in them."""
    plant(monkeypatch, tmp_path, *(FORWARD | BACKWARD)[request.param])


@pytest.mark.parametrize("patched", FORWARD, indirect=True)
def test_a_wrong_kernel_is_found(patched: None) -> None:
    p, x, exact = case(300, True, True, "sum")
    assert forward_faults(p, chunked(NARROW, 300), x, exact)


@pytest.mark.parametrize("patched", BACKWARD, indirect=True)
def test_a_wrong_gradient_is_found(patched: None) -> None:
    p, x, exact = case(300, True, True, "sum")
    assert backward_faults(p, chunked(BACK, 300), x, exact)


# ------------------------------------------------------------------------------------------------------ the public functions


def halves(t: int, d: int = 32, gated: bool = True) -> list[np.ndarray]:
    """float16 q, k, v and log_g of a public call on the host target."""
    rng = np.random.default_rng(t)
    q, k, v = (rng.standard_normal((1, t, heads, d)).astype(np.float16) for heads in (2, 1, 1))
    return [q, k, v, *([-np.abs(rng.standard_normal((1, t, 1))).astype(np.float32) / 20] if gated else [])]


def state_of(seed: int, d: int = 32) -> PowerState[Any]:
    s, z = draw_state(seed, {"k": np.zeros((1, 9, 1, d)), "v": np.zeros((1, 9, 1, d))}, tokens=40)
    return PowerState(s.astype(np.float32), z.astype(np.float32))


def test_no_token_returns_the_state_and_its_gradient() -> None:
    none, state, d_state = [x[:, :0] for x in halves(5)], state_of(1), state_of(2)
    (y, same), vjp = power_retention_vjp(*none, initial_state=state, output_final_state=True, target="host")
    assert y.shape == (1, 0, 2, 32) and same.S is not state.S and not np.shares_memory(same.S, state.S)
    assert (same.S == state.S).all() and (same.Z == state.Z).all()
    found = vjp(y, d_state).initial_state
    assert found is not None and (found.S == d_state.S).all() and (found.Z == d_state.Z).all()
    empty = power_retention(*none, output_final_state=True, target="host")[1]
    assert not empty.S.any() and not empty.Z.any()
    assert all(x.size == 0 for x in power_retention_vjp(*none, target="host")[1](y)[:4] if x is not None)


def test_states_that_are_kept_or_strided() -> None:
    inputs, state, d_state = halves(300), state_of(1), state_of(2)
    strided = PowerState(np.asfortranarray(state.S), state.Z.transpose(0, 1, 3, 2))
    results = []
    for recompute, given in ((True, state), (False, state), (False, strided)):
        options: dict[str, Any] = {"initial_state": given, "output_final_state": True, "chunk": 128, "target": "host"}
        (y, final), vjp = power_retention_vjp(*inputs, recompute=recompute, **options)
        found = vjp(np.ones_like(y), d_state)
        results.append([y, final.S, final.Z, *found[:4], found.initial_state.S, found.initial_state.Z])
    scanned, kept, copied = results
    assert all((a == b).all() for a, b in zip(kept, copied, strict=True))
    # Scanned again, the states may be rounded elsewhere.
    assert all((a == b).all() for a, b in zip(scanned[:3], kept[:3], strict=True))
    assert all(relative(a, b.astype(np.float64)) <= 2e-3 for a, b in zip(scanned, kept, strict=True))


def test_what_is_kept_depends_on_no_pick_and_on_nothing_free() -> None:
    long = example(t=65536, h=16, d=64)
    assert kept_chunk(long, None, None, 139 << 30) == kept_chunk(long, None, None, 0) == 1024
    # Too much beside q, k, v and y; beside the GPU's memory; too few chunks; asked not to.
    assert kept_chunk(example(t=65536, h=16, d=128), None, None, 139 << 30) == 0 == kept_chunk(long, None, None, 16 << 30)
    assert kept_chunk(example(t=8191, h=16, d=64), None, None, 0) == 0 == kept_chunk(long, None, True, 0)
    # Whoever asks for it has it, with the chunk that was named; what is one chunk, or has no state, has none to keep.
    assert kept_chunk(example(t=8191, d=128), None, False, 0) == 2048 and kept_chunk(example(t=300), 128, False, 0) == 128
    assert kept_chunk(example(t=300), None, False, 0) == 0 == kept_chunk(example(t=3000, degree=4), None, False, 0)
    assert kept_chunk(example(t=3000), 0, False, 0) == 0
    p = replace(example(t=3000, h=2), kept=1024)
    assert op.outputs(p)["snapshots"].shape == (2, 3, p.snapshot) and "snapshots" not in op.workspace(p, Config(1024))
    assert op.reject(p, Config(512), Device.of("h200")) == "chunk=512: the states that are kept are of chunk=1024"


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "heads": (
        {"initial_state": PowerState(state_of(1).S.repeat(2, 1), state_of(1).Z.repeat(2, 1))},
        ArgumentError,
        r"initial_state\.S has shape",
    ),
    "D": (
        {"initial_state": state_of(1, d=64)},
        ArgumentError,
        r"initial_state\.S has shape \[1, 1, 2304, 64\]; accepted: \[1, 1, 640, 32\]",
    ),
    "dtype": (
        {"initial_state": PowerState(state_of(1).S.astype(np.float16), state_of(1).Z)},
        ArgumentTypeError,
        r"initial_state\.S is float16",
    ),
    "degree": ({"output_final_state": True, "degree": 4}, UnsupportedError, r"output_final_state with degree=4"),
    "recompute": ({"recompute": 1}, ArgumentError, r"recompute=1 is not served; accepted: None, True, False"),
    "degree 4 in chunks": ({"degree": 4, "chunk": 128, "recompute": False}, UnsupportedError, r"chunk=128 with degree=4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_before_anything_runs(name: str) -> None:
    options, error, message = REFUSED[name]
    for function in (power_retention, power_retention_vjp):
        with pytest.raises(error, match=message):
            function(*halves(9), target="host", **options)


def test_rows_beyond_2_to_the_31_elements_are_refused() -> None:
    q, k, v = (np.broadcast_to(x[:, :1], (1, 2**26, *x.shape[2:])) for x in halves(9, gated=False))
    with pytest.raises(UnsupportedError, match=r"q has 4294967296 elements; accepted: at most 2\^31"):
        power_retention(q, k, v, output_final_state=True, target="host")
