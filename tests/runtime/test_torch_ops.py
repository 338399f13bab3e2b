"""Ops in torch's dispatcher: compiled, exported, mapped, cast, without values; what is refused names op and argument (docs/torch.md)."""

from __future__ import annotations

import io
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import fake_op
import numpy as np
import pytest
from power_states import behind, flat

import vidrial as vd
from vidrial.build import nvrtc
from vidrial.kernels import power_retention as package
from vidrial.kernels.flash_attention import flash_attention
from vidrial.kernels.power_retention import PowerState, gradient, in_torch, power_retention, power_retention_vjp, request
from vidrial.kernels.power_retention.reference import attention_form
from vidrial.runtime import torch_ops

torch: Any = pytest.importorskip("torch")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")


def draw(t: int, b: int = 1, grad: bool = False, hq: int = 4, dtype: Any = torch.float32) -> list[Any]:
    """q, k, v and log_g; the heads differ from every other size, so that torch does not take a length for one."""
    generator = torch.Generator().manual_seed(t)
    shapes = ((b, t, hq, 32), (b, t, 1, 32), (b, t, 1, 64), (b, t, 1))
    q, k, v, g = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.requires_grad_(grad) for x in (q.to(dtype), k.to(dtype), v.to(dtype), torch.nn.functional.logsigmoid(g + 3))]


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Forgets all graphs before."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made: Callable[..., Any] = torch.compile(function, fullgraph=True, **({"backend": "aot_eager"} | options))
    return made


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


# ------------------------------------------------------------------------------------------------------------- opcheck


def saved(*x: Any, **options: Any) -> Any:
    return torch.ops.vidrial.power_retention_saving(*x, **options)


@pytest.mark.parametrize("t", [0, 1, 5])
def test_opcheck_of_power_retention(t: int) -> None:
    ops, x = torch.ops.vidrial, draw(t, b=2, grad=True)
    y, norm = saved(*draw(t, b=2))
    calls = [(ops.power_retention.default, tuple(x), {}), (ops.power_retention_saving.default, tuple(draw(t, b=2)), {})]
    calls.append((ops.power_retention_backward.default, (*draw(t, b=2)[:3], torch.ones_like(y), draw(t, b=2)[3], y, norm), {}))
    if t == 5:
        calls.append((ops.power_retention.default, tuple(x[:3]), {"normalize": "none", "scale": 0.2}))
    for op, args, options in calls:
        found = torch.library.opcheck(op, args, options)
        assert len(found) == 4 and set(found.values()) == {"SUCCESS"}, (op, found)


@pytest.mark.parametrize("t", [0, 1, 6])
def test_opcheck_of_flash_attention(t: int) -> None:
    found = torch.library.opcheck(torch.ops.vidrial.flash_attention.default, tuple(draw(t, b=2)[:3]), {"causal": True, "left": 3})
    assert len(found) == 4 and set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("t", [0, 1, 9])
def test_results_are_contiguous_and_share_no_memory_with_an_input(t: int) -> None:
    q, k, v, g = (x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x for x in draw(t, b=2))
    y, lse = torch.ops.vidrial.flash_attention(q, k, v)
    made = [torch.ops.vidrial.power_retention(q, k, v, g), *saved(q, k, v, g), y, lse]
    for x in made:
        assert x.stride() == torch.empty(x.shape).stride()
        assert t == 0 or not {x.data_ptr()} & {a.data_ptr() for a in (q, k, v, g)}
    assert saved(q, k, v, g, normalize="none")[1].numel() == 0


def weighted(found: Any) -> Any:
    """A loss that reads each of y, S and Z, and weighs each of its own."""
    return sum((i + 1) * x.float().square().sum() for i, x in enumerate(flat(found)))


def test_opcheck_with_states() -> None:
    ops, state, grads = torch.ops.vidrial, behind(draw(3, b=2)), behind(draw(3, b=2), grad=True)
    x = draw(5, b=2)
    y, *final, norm = ops.power_retention_states_saving(*x, state.S, state.Z, final=True)
    for made in (y, *final, norm):
        assert made.stride() == torch.empty(made.shape).stride()
        assert made.numel() == 0 or not {made.data_ptr()} & {a.data_ptr() for a in (*x, state.S, state.Z)}
    backward = (*x[:3], torch.ones_like(y), x[3], y, norm, state.S, state.Z, *final, *final)
    calls = [
        (ops.power_retention_states, (*draw(5, b=2, grad=True), grads.S, grads.Z), {"final": True}),
        (ops.power_retention_states_backward, backward, {"final": True}),
    ]
    calls.append((ops.power_retention_states_saving, tuple(a[:, :0] for a in x[:3]), {"normalize": "none", "final": True}))
    for op, args, options in calls:
        found = torch.library.opcheck(op.default, args, options)
        assert len(found) == 4 and set(found.values()) == {"SUCCESS"}, (op, found)


def test_a_checkpoint_holds_a_state() -> None:
    """And loads as torch loads by default, which takes no class that it does not know."""
    file, state = io.BytesIO(), behind(draw(3))
    torch.save({"state": state}, file)
    found = torch.load(io.BytesIO(file.getvalue()))["state"]
    assert type(found) is PowerState and all(torch.equal(a, b) for a, b in zip(flat(found), flat(state), strict=True))


def test_the_saved_normaliser_is_the_sum_of_the_weights() -> None:
    x = draw(300, hq=2)
    exact = attention_form(*(a.numpy() for a in x)).norm.transpose(0, 2, 1)
    assert np.allclose(saved(*x)[1].numpy(), exact, rtol=1e-4, atol=1e-6) and exact.max() > 1


# ------------------------------------------------------------------------------------------------------------- compile


def test_one_graph_serves_every_length_and_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "compile_source", None)  # nothing is compiled for a GPU
    function = compiled(lambda *x: power_retention(*x) * 2, dynamic=True)
    for t in range(2, 22):
        x = draw(t, grad=True)
        y, plain = function(*x), power_retention(*x) * 2
        assert torch.equal(y, plain), t
        found, exact = (torch.autograd.grad(made.square().sum(), x) for made in (y, plain))
        assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True)), t
    assert graphs() == 1
    with torch.no_grad():
        for t in range(2, 22):
            assert torch.equal(function(*draw(t)), power_retention(*draw(t)) * 2)
    assert graphs() == 2
    assert function(*draw(1)).shape == (1, 1, 4, 64) and function(*draw(0)).shape == (1, 0, 4, 64)


def test_a_state_goes_from_one_call_to_the_next_in_one_graph_of_every_length() -> None:
    """Forward and backward as in eager mode, bit for bit; and both halves together as the whole."""

    def halves(first: list[Any], second: list[Any], state: PowerState[Any]) -> Any:
        y, state = power_retention(*first, initial_state=state, output_final_state=True)
        z, state = power_retention(*second, initial_state=state, output_final_state=True)
        return torch.cat((y, z), 1), state

    function = compiled(halves, dynamic=True)
    for t in (9, 2, 130):
        x, state = (
            [[a.detach()[:, begin:end].requires_grad_() for a in draw(2 * t + 1)] for begin, end in ((0, t), (t, None))],
            behind(draw(3), True),
        )
        given = [*x[0], *x[1], state.S, state.Z]
        made, plain, whole = (
            function(*x, state),
            halves(*x, state),
            power_retention(*(torch.cat(a, 1) for a in zip(*x, strict=True)), initial_state=state, output_final_state=True),
        )
        assert all(torch.equal(a, b) for a, b in zip(flat(made), flat(plain), strict=True)), t
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(flat(made), flat(whole), strict=True)), t
        found, exact, of_whole = (torch.autograd.grad(weighted(each), given) for each in (made, plain, whole))
        assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True)), t
        assert all((a - b).norm() <= 1e-4 * b.norm() and b.norm() > 0 for a, b in zip(found, of_whole, strict=True)), t
    assert graphs() == 1


def test_decoding_compiles_once() -> None:
    x, state, step = draw(40), None, compiled(lambda x, state: power_retention(*x, initial_state=state, output_final_state=True))
    whole, last = power_retention(*x, output_final_state=True)
    for t in range(40):
        y, state = step([a[:, t : t + 1] for a in x], state)
        assert torch.allclose(y, whole[:, t : t + 1], atol=1e-5), t
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-4) for a, b in zip(flat(state), flat(last), strict=True))
    assert graphs() == 2  # the first token's, which has no state, and one for all others


def test_the_kernels_states_in_a_graph() -> None:
    """target="host": the same kernels, and what they save and read, as on a GPU; those that tests/power_retention/test_states_host.py has built."""
    options = {"output_final_state": True, "chunk": 128, "target": "host"}
    call = lambda x, state: power_retention(*x, initial_state=state, **options)  # noqa: E731
    q, k, v, g = draw(300, hq=2, grad=True)
    x, state = (
        [*(a.detach()[..., :32].half().requires_grad_() for a in (q, k, v)), g],
        behind([*draw(9)[:2], draw(9)[2][..., :32]], grad=True),
    )
    made, plain = compiled(call)(x, state), call(x, state)
    assert all(torch.equal(a, b) for a, b in zip(flat(made), flat(plain), strict=True))
    found, exact = (torch.autograd.grad(weighted(each), [*x, *flat(state)]) for each in (made, plain))
    assert all(torch.equal(a, b) and b.float().norm() > 0 for a, b in zip(found, exact, strict=True))


def test_one_graph_of_flash_attention() -> None:
    function = compiled(
        lambda q, k, v: flash_attention(q, k, v, causal=True, window=(7, None), return_lse=True), dynamic=True, backend="eager"
    )
    for t in range(2, 22):
        found, plain = function(*draw(t)[:3]), flash_attention(*draw(t)[:3], causal=True, window=(7, None), return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True)), t
    assert graphs() == 1


def test_inductor_and_the_target_that_is_named() -> None:
    function = compiled(lambda *x: power_retention(*x, target="cuda", chunk=128, normalize="none", degree=2, scale=0.5), backend="inductor")
    x = draw(150, b=2, grad=True)
    y, plain = function(*x), power_retention(*x, chunk=128, normalize="none", scale=0.5)
    assert torch.equal(y, plain)
    found, exact = (torch.autograd.grad(made.sum(), x) for made in (y, plain))
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))


WRITES = """
import torch
from vidrial.kernels.power_retention import power_retention
x = [torch.ones(1, 9, h, 32) for h in (4, 1, 1)]
program = torch.compile(lambda *x: power_retention(*x), fullgraph=True, dynamic=True, backend="eager")
assert torch.equal(program(*x), torch.ones(1, 9, 4, 32)), "the first call is the compiled one"
class Model(torch.nn.Module):
    def forward(self, q, k, v, state):
        y, behind = power_retention(q, k, v, scale=0.25, initial_state=state, output_final_state=True)
        return power_retention(q, k, v, scale=0.25) + y, behind
length = torch.export.Dim("length", min=2)
_, state = power_retention(*x, output_final_state=True)
torch.export.save(torch.export.export(Model(), (*x, state), dynamic_shapes=(*({1: length},) * 3, [None, None])), sys.argv[1])
"""
READS = """
from vidrial.kernels.power_retention import power_retention
assert "torch" not in sys.modules
import torch
program = torch.export.load(sys.argv[1]).module()
assert any("vidrial.power_retention" in str(node.target) for node in program.graph.nodes)
x = [torch.arange(1 * 13 * h * 32.).sin().reshape(1, 13, h, 32) for h in (4, 1, 1)]
compiled = torch.compile(lambda *x: power_retention(*x, scale=0.25), fullgraph=True, backend="eager")(*x)
assert torch.equal(power_retention(*x, scale=0.25), compiled)
_, state = power_retention(*x, output_final_state=True)
y, behind = program(*x, state)
exact, exact_behind = power_retention(*x, scale=0.25, initial_state=state, output_final_state=True)
assert torch.equal(y, compiled + exact) and torch.equal(behind.S, exact_behind.S) and torch.equal(behind.Z, exact_behind.Z)
"""


def run_program(text: str, *arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", f"import sys\n{text}", *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert ended.returncode == 0, ended.stderr


def test_a_first_call_that_is_compiled_and_an_export_that_a_fresh_process_loads(tmp_path: Path) -> None:
    run_program(WRITES, str(tmp_path / "program.pt2"))  # torch is imported before vidrial
    run_program(READS, str(tmp_path / "program.pt2"))  # and after it


# ------------------------------------------------------------------------------------- no values, autocast, vmap


def test_meta_and_fake_tensors_have_shapes() -> None:
    from torch._subclasses import FakeTensorMode

    for t in (0, 7):
        y, lse = flash_attention(*(x.to("meta") for x in draw(t, b=2, dtype=torch.bfloat16)[:3]), return_lse=True)
        assert (y.shape, y.dtype, y.device.type, lse.shape, lse.dtype) == ((2, t, 4, 64), torch.bfloat16, "meta", (2, 4, t), torch.float32)
        assert power_retention(*(x.to("meta") for x in draw(t))).shape == (1, t, 4, 64)
        state = torch.utils._pytree.tree_map(lambda x: x.to("meta"), behind(draw(3, b=2)))
        found = power_retention(*(x.to("meta") for x in draw(t, b=2)), initial_state=state, output_final_state=True)
        assert [x.shape for x in flat(found)] == [(2, t, 4, 64), (2, 1, 640, 64), (2, 1, 32, 32)]
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(x) for x in draw(7, b=2)]
    with mode:
        assert power_retention(*fakes).shape == (2, 7, 4, 64)
    assert type(power_retention(*fakes)) is type(fakes[0])


def test_autocast_makes_q_k_and_v_meet() -> None:
    q, k, v, g = draw(40, grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = power_retention(q, k.bfloat16(), v.half(), g.bfloat16())
        mapped = compiled(power_retention)(q, k.bfloat16(), v.half(), g.bfloat16())
        found = torch.autograd.grad(power_retention(q, k, v, g).float().sum(), (q, k, v, g))
    exact = power_retention(q.bfloat16(), k.bfloat16(), v.half().bfloat16(), g.bfloat16().float())
    assert y.dtype == torch.bfloat16 and torch.equal(y, exact) and torch.equal(mapped, exact)
    plain = torch.autograd.grad(power_retention(q.bfloat16(), k.bfloat16(), v.bfloat16(), g).float().sum(), (q, k, v, g))
    assert [x.dtype for x in found] == [torch.float32] * 4 and all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flash_attention(q.detach(), k.detach().half(), v.detach()).dtype == torch.bfloat16
        assert power_retention(*(x.detach().numpy() for x in (q, k, v, g))).dtype == np.float32  # NumPy's arrays are not torch's affair
        state = behind(draw(3))
        met = power_retention(q, k.half(), v, g, initial_state=PowerState(state.S.bfloat16(), state.Z), output_final_state=True)
    x, state = [q.bfloat16(), k.half().bfloat16(), v.bfloat16(), g], PowerState(state.S.bfloat16().float(), state.Z)
    plain = power_retention(*x, initial_state=state, output_final_state=True)
    assert [a.dtype for a in flat(met)] == [torch.bfloat16, torch.float32, torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(flat(met), flat(plain), strict=True))


def test_vmap_joins_the_batch() -> None:
    x = draw(30, b=2, grad=True)
    both = [torch.stack([a, a * 2], dim=1 if a.dim() == 4 else 0) for a in x]
    calls: list[Any] = []

    def counted(inputs: Any, o: Any) -> Any:
        calls.append(tuple(inputs[0].shape))
        return plain(inputs, o)

    plain = gradient.plain
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient, "plain", counted)
        with torch.no_grad():
            y = torch.vmap(power_retention, in_dims=(1, 1, 1, 0))(*both)
    assert calls == [(4, 30, 4, 32)]
    each = torch.stack([power_retention(*x), power_retention(*(a * 2 for a in x))])
    assert torch.allclose(y, each, atol=1e-6)
    over_q = torch.vmap(flash_attention, in_dims=(1, None, None))(*(a.detach() for a in (both[0], x[1], x[2])))
    assert torch.allclose(over_q[1], flash_attention((2 * x[0]).detach(), x[1].detach(), x[2].detach()), atol=1e-6)
    found = torch.autograd.grad(torch.vmap(power_retention, in_dims=(1, 1, 1, 0))(*both).square().sum(), x)
    exact = torch.autograd.grad(each.square().sum(), x)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, exact, strict=True))


def test_vmap_over_states_joins_the_batch() -> None:
    x, state = draw(7, b=2, grad=True), behind(draw(3, b=2), grad=True)
    call = lambda x, state: power_retention(*x, initial_state=state, output_final_state=True)  # noqa: E731
    several = torch.utils._pytree.tree_map(lambda a: torch.stack([a, 2 * a, -a]), state)
    found = torch.vmap(call, in_dims=(None, 0))(x, several)
    assert isinstance(found[1], PowerState) and found[1].S.shape == (3, 2, 1, 640, 64)
    each = [call(x, torch.utils._pytree.tree_map(lambda a, i=i: a[i], several)) for i in range(3)]
    exact = [torch.stack(a) for a in zip(*map(flat, each), strict=True)]
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(flat(found), exact, strict=True))
    gradients = (torch.autograd.grad(weighted(made), [*x, *flat(state)], retain_graph=True) for made in (found, exact))
    assert all((a - b).norm() <= 1e-5 * b.norm() and b.norm() > 0 for a, b in zip(*gradients, strict=True))


def test_a_map_over_none_has_the_shapes_of_one() -> None:
    none = [torch.stack([x, x])[:0].requires_grad_() for x in draw(5)]
    y = torch.vmap(power_retention)(*none)
    assert y.shape == (0, 1, 5, 4, 64) and y.requires_grad
    assert [g.shape for g in torch.autograd.grad(y.sum(), none)] == [x.shape for x in none]


def test_a_trace_of_torch_jit_holds_the_call_and_not_its_result() -> None:
    for call, count in ((power_retention, 4), (flash_attention, 3)):
        program = torch.jit.trace(lambda *x, call=call: call(*x), tuple(draw(5)[:count]), check_trace=False)
        other = draw(9)[:count]
        assert torch.equal(program(*other), call(*other))
    traced = torch.jit.trace(lambda *x: power_retention(*x), tuple(draw(5, grad=True)), check_trace=False)
    x = draw(7, grad=True)
    found, exact = (torch.autograd.grad(made(*x).square().sum(), x) for made in (traced, power_retention))
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))


# ------------------------------------------------------------------------------------------------------------ refused


def test_what_is_not_served_is_refused_by_name() -> None:
    x, plain = draw(5, grad=True), draw(5)
    only_q = lambda q: power_retention(q, *plain[1:]).sum()  # noqa: E731
    state, states = behind(draw(3)), torch.ops.vidrial.power_retention_states
    refused: list[tuple[Callable[[], Any], str]] = [
        (
            lambda: torch.func.grad(lambda s: power_retention(*plain, initial_state=PowerState(s, state.Z)).sum())(state.S),
            "initial_state.S is a",
        ),
        (lambda: torch.autograd.grad(states(*x, *flat(state))[0].sum(), x[0], create_graph=True), "a gradient of its gradient"),
        (lambda: torch.func.grad(only_q)(plain[0]), "q is a tensor of torch.func"),
        (lambda: torch.func.grad(lambda q: torch.vmap(only_q)(q).sum())(plain[0][None]), "power_retention: q is a tensor of torch.func"),
        (lambda: torch.func.jvp(only_q, (plain[0],), (plain[0],)), "q is a tensor of torch.func"),
        (lambda: torch.autograd.grad(torch.ops.vidrial.power_retention(*x).sum(), x[0], create_graph=True), "a gradient of its gradient"),
        (lambda: flash_attention(*x[:3]), "q requires a gradient, which flash_attention does not compute"),
        (lambda: torch.ops.vidrial.flash_attention(*x[:3]), "q requires a gradient, which flash_attention does not compute"),
        (lambda: power_retention(plain[0].to("meta"), *plain[1:]), "q has no memory of its own"),
        (lambda: power_retention_vjp(*(a.to("meta") for a in plain)), "q has no memory of its own"),
    ]
    for call, said in refused:
        with pytest.raises(vd.UnsupportedError, match=said):
            call()
    with pytest.raises(vd.ArgumentError, match="^initial_z is None beside the other of initial_s and initial_z; accepted: both, or none"):
        states(*plain, state.S)
    with torch.autograd.forward_ad.dual_level():
        for q in (plain[0], x[0]):
            with pytest.raises(vd.UnsupportedError, match="forward-mode"):
                torch.ops.vidrial.power_retention(torch.autograd.forward_ad.make_dual(q, plain[0]), *plain[1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(vd.ArgumentTypeError, match=r"^k is a numpy\.ndarray among torch's tensors"):
            power_retention(plain[0], plain[1].numpy(), *plain[2:])
        with pytest.raises(vd.ArgumentTypeError, match=r"^k is None; accepted: torch\.Tensor"):
            power_retention(plain[0], None, *plain[2:])
        with pytest.raises(vd.ArgumentTypeError, match=r"^k is on device meta, q on cpu; accepted: one device for all"):
            power_retention(plain[0], plain[1].to("meta"), *plain[2:])
        with pytest.raises(vd.ArgumentTypeError, match=r"^initial_state\.S is None; accepted: an array"):
            power_retention(*plain, initial_state=torch.utils._pytree.tree_map(lambda x: None, state))
        with pytest.raises(vd.ArgumentError, match=r"^recompute='no' is not served"):
            power_retention(*plain, recompute="no")
        with pytest.raises(vd.ArgumentTypeError, match=r"^power_retention: q: dtype 'float64' is not known; accepted: bfloat16"):
            power_retention(plain[0].double(), *plain[1:])
        with pytest.raises(vd.ArgumentTypeError, match="^q: dtype int32 is not served; accepted: bfloat16, float16, float32"):
            power_retention(plain[0].int(), *plain[1:])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda q, k, v, g: power_retention(q, k[:, 1:], v, g),
            r"vidrial\.power_retention.*k has shape \[1, 4, 1, 32\]; accepted: \[1, 5, 1, 32\]",
        ),
        (
            lambda q, k, v, g: power_retention(q, k.half(), v, g),
            r"k is float16; accepted: float32, as the other inputs of power_retention ask",
        ),
        (lambda q, k, v, g: power_retention(q, k, v, g, degree=3), r"degree=3: an odd power"),
        (lambda q, k, v, g: flash_attention(q.requires_grad_(), k, v), r"q requires a gradient, which flash_attention does not compute"),
        (
            lambda q, k, v, g: power_retention(q, k, v, g, degree=4, output_final_state=True)[0],
            r"output_final_state with degree=4: only degree 2",
        ),
        (lambda q, k, v, g: power_retention(q, k, v, g, output_final_state=3)[0], r"output_final_state=3 is not served"),
        (lambda q, k, v, g: power_retention(q, k, v, g, initial_state=(q, k)), r"initial_state is a tuple; accepted: a PowerState"),
        (
            lambda q, k, v, g: power_retention(q, k, v, g, initial_state=PowerState(q.new_ones(1, 1, 640, 32), q.new_ones(1, 1, 32, 32))),
            r"initial_state\.S has shape \[1, 1, 640, 32\]; accepted: \[1, 1, 640, 64\]",
        ),
        (lambda q, k, v, g: power_retention(q, k, v, g, scale=np.float32(0.5)), r"scale is no constant under torch\.compile"),
        (lambda q, k, v, g: power_retention(q, k, v, g, recompute="no"), r"recompute='no' is not served"),
    ],
    ids=[
        "shape",
        "dtype",
        "degree",
        "no backward",
        "state",
        "no answer",
        "no state",
        "a state of another shape",
        "an option of NumPy",
        "recompute",
    ],
)
def test_what_a_graph_cannot_hold_is_refused_while_it_is_made(call: Callable[..., Any], said: str) -> None:
    with pytest.raises(Exception, match=f"(?s){said}") as raised:
        compiled(call)(*draw(5))
    assert type(raised.value).__module__.startswith("torch._dynamo")


# -------------------------------------------------------------------------------------------------------- users' ops


def tripled_of(x: vd.ArraySpec, factor: float = 3.0) -> fake_op.Problem:
    if len(x.shape) != 1:
        raise vd.ArgumentError(f"x has shape {list(x.shape)}; accepted: a vector")
    return fake_op.Problem(vd.DType.float32, x.shape[0], factor)


def gradient_of(dy: vd.ArraySpec, factor: float = 3.0) -> fake_op.Problem:
    return tripled_of(dy, factor)


def own_op(name: str, **fields: Any) -> vd.Op[Any, Any]:
    """Of one input and one output, that no kernel has: `run` computes it."""
    vector = lambda name: lambda p: {name: vd.Buffer((p.n,), vd.DType.float32)}  # noqa: E731
    return replace(fake_op.op, name=name, inputs=vector("x"), outputs=vector("y"), **fields)


def run_tripled(op: vd.Op[Any, Any], x: Any, factor: float, target: str | None) -> dict[str, Any]:
    return {("dx" if op.name.endswith("backward") else "y"): x * factor}


def test_an_op_of_a_user() -> None:
    backward = own_op("tripled_backward", problem_of=gradient_of)
    vector = lambda name: lambda p: {name: vd.Buffer((p.n,), vd.DType.float32)}  # noqa: E731
    backward = replace(backward, inputs=vector("dy"), outputs=vector("dx"))
    op = own_op("tripled", problem_of=tripled_of, backward=backward)
    known = vd.torch_op(op, run_tripled)
    assert known == "tripled y|x factor" and vd.torch_op(op) == known
    x = torch.randn(7, requires_grad=True)
    function = lambda x: vd.call_op(op, {"x": x}, factor=2.5)["y"]  # noqa: E731
    for call in (function, compiled(function, dynamic=True)):
        for n in (7, 8, 9):
            x = torch.randn(n, requires_grad=True)
            y = call(x)
            assert torch.equal(y, x * 2.5) and torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((n,), 2.5))
    assert graphs() == 1
    assert set(torch.library.opcheck(torch.ops.vidrial.tripled.default, (x,), {"factor": 2.0}).values()) == {"SUCCESS"}
    # It has no batch: what is mapped over is called one after another.
    assert torch.equal(torch.vmap(function)(torch.ones(3, 4)), torch.full((3, 4), 2.5))
    # What the backward op gives no gradient of is refused, not left as it is.
    other = replace(backward, name="elsewhere_backward", outputs=vector("gx"))
    with pytest.raises(vd.UnsupportedError, match=r"^x requires a gradient, which elsewhere_backward does not compute \(it gives gx\)"):
        vd.call_op(own_op("elsewhere", problem_of=tripled_of, backward=other), {"x": x}, factor=2.5)
    # Another op of this name has a name of its own.
    assert vd.torch_op(own_op("tripled", problem_of=tripled_of), run_tripled) == "tripled_2 y|x factor"


def of_shape(x: vd.ArraySpec, shape: tuple[int, ...]) -> fake_op.Problem:
    return tripled_of(x)


def of_many(*x: vd.ArraySpec) -> fake_op.Problem:
    return tripled_of(*x)


def not_annotated(x) -> fake_op.Problem:  # type: ignore[no-untyped-def]
    return tripled_of(x)


@pytest.mark.parametrize(
    ("problem_of", "said"),
    [
        (None, r"odd does not say which problem its inputs ask.*Op\(problem_of=\.\.\.\)"),
        (of_shape, r"odd: shape of problem_of is of tuple.*accepted: ArraySpec, int, float, bool, str"),
        (of_many, r"odd: x of problem_of is of ArraySpec"),
        (not_annotated, r"odd: x of problem_of is not annotated"),
    ],
    ids=["none", "an option's type", "not one by one", "not annotated"],
)
def test_a_problem_that_cannot_be_made_of_tensors(problem_of: Any, said: str) -> None:
    with pytest.raises(vd.ArgumentError, match=said):
        vd.torch_op(own_op("odd", problem_of=problem_of))


def of_factor(default: Any) -> Callable[..., fake_op.Problem]:
    def problem_of(x: vd.ArraySpec, factor: float = default) -> fake_op.Problem:
        return fake_op.Problem(vd.DType.float32, x.shape[0], factor)

    return problem_of


def of_mode(x: vd.ArraySpec, mode: str = 'a"b') -> fake_op.Problem:
    return fake_op.Problem(vd.DType.float32, x.shape[0], 1.0)


def of_target(x: vd.ArraySpec, target: int = 3) -> fake_op.Problem:
    return fake_op.Problem(vd.DType.float32, x.shape[0], 1.0)


@pytest.mark.parametrize(
    ("problem_of", "said"),
    [
        (of_factor(float("inf")), r"infinite: factor=inf of problem_of is a default that torch's schemas cannot hold"),
        (of_mode, r"infinite: mode='a\"b' of problem_of is a default"),
        (of_target, r"infinite: target of problem_of is what a call says where it runs with"),
    ],
    ids=["infinite", "a quote", "target"],
)
def test_what_torchs_schemas_cannot_hold(problem_of: Any, said: str) -> None:
    for _ in range(2):
        with pytest.raises(vd.ArgumentError, match=said):
            vd.torch_op(own_op("infinite", problem_of=problem_of))
        # With its gradients or not at all: what was refused is not half known at the next call.
        with pytest.raises(vd.ArgumentError, match=said):
            vd.torch_op(own_op("outer", problem_of=tripled_of, backward=own_op("infinite", problem_of=problem_of)))


@pytest.mark.parametrize("name", ["class", "1st", "name", "__init__", "p\u00e9"])
def test_a_name_that_torchs_schemas_do_not_have(name: str) -> None:
    known = vd.torch_op(own_op(name, problem_of=of_factor(np.float32(0.5))), run_tripled)
    call = lambda **options: vd.call_torch_op(known, {"x": torch.ones(3)}, None, options)["y"]  # noqa: E731
    assert torch.equal(call(), torch.full((3,), 0.5)) and torch.equal(call(factor=2.0), torch.full((3,), 2.0))
    with pytest.raises(vd.ArgumentError, match="nope is no input or option of it; accepted: x, factor"):
        call(nope=1)


# ------------------------------------------------------------------------------------------------------ host time


def least(call: Callable[[], Any]) -> float:
    """Microseconds a call: the least of many short rounds."""
    best = 1e9
    for _ in range(60):
        begin = time.perf_counter()
        for _ in range(50):
            call()
        best = min(best, (time.perf_counter() - begin) / 50 * 1e6)
    return best


def test_host_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for arrays that the GPU reads as they lie; the launches and what they need are left out of both."""
    x, y = draw(8), torch.empty(1, 8, 4, 64)
    real = request.request_of(vd.signature_of(x, request.NAMES)[0], 2, None, "sum", None, "cuda")
    asked = replace(real, ready=True, on_cpu=False, planned=type("Planned", (), {"plan": lambda self: None})())  # type: ignore[arg-type]
    found, launched = lru_cache(lambda *_: asked), lambda *_: {"y": y.new_empty_strided(y.shape, y.stride())}
    for module in (package, in_torch):
        monkeypatch.setattr(module, "run", launched)
    monkeypatch.setattr(package, "request_of", found)
    monkeypatch.setattr(request, "request_of", found)
    monkeypatch.setattr(torch_ops, "_contiguous", lambda x: x)  # which is asked of CPU tensors alone
    op = torch.ops.vidrial.power_retention.default
    with torch.no_grad():
        eager, dispatched, asking = least(lambda: power_retention(*x)), least(lambda: op(*x)), least(lambda: vd.dispatching(x[0]))
    print(f"host time a call: {eager:.1f} us, by way of the dispatcher {dispatched:.1f} us; asking whether to go there {asking:.2f} us")
    # 3 us are what it may take; a machine that does other things takes longer for both.
    assert dispatched < 2 * eager and asking < eager / 10


# ------------------------------------------------------------------------------------------------- several processes


def test_two_processes_train_a_layer_by_ddp_and_fsdp(tmp_path: Path) -> None:
    script = Path(__file__).with_name("distributed.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path)], env=environment) for rank in (0, 1)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    namespace = runpy.run_path(str(script))
    exact = namespace["gradients"](namespace["layer"](), namespace["batch"]())  # of both sequences at once: the mean of the two processes'
    for rank in (0, 1):
        found = np.load(tmp_path / f"{rank}.npz")
        assert len(found.files) == 2 * len(exact) == 12
        for name, gradient_of_all in exact.items():
            for kind in ("ddp", "fsdp"):
                assert np.allclose(found[f"{kind} {name}"], gradient_of_all, rtol=1e-3, atol=1e-6), (rank, kind, name)
    assert np.abs(exact["gate.weight"]).max() > 1e-5
