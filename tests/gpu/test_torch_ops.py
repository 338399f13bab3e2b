"""Ops in torch's dispatcher on a GPU: compiled with CUDA graphs, captured forward and backward, and what a call of them takes on the host."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from power_states import behind, flat

from vidrial.call import prepare
from vidrial.kernels.flash_attention import flash_attention
from vidrial.kernels.power_retention import PowerState, power_retention
from vidrial.kernels.power_retention.back.op import example as back_example
from vidrial.kernels.power_retention.back.op import op as back_op
from vidrial.kernels.power_retention.op import example, op
from vidrial.runtime import plan
from vidrial.tune.pick import freeze
from vidrial.tune.ranking import forget

torch: Any = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def _nothing_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "cache"))
    plan._binary.cache_clear()
    forget()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    freeze(False)


def draw(t: int, grad: bool = False, seed: int = 0, b: int = 1) -> list[Any]:
    generator = torch.Generator("cuda").manual_seed(seed + t)
    q, k, v = (torch.randn(b, t, h, 32, device="cuda", generator=generator).bfloat16() for h in (4, 2, 2))
    g = torch.nn.functional.logsigmoid(torch.randn(b, t, 2, device="cuda", generator=generator) + 4)
    return [x.requires_grad_(grad) for x in (q, k, v, g)]


@pytest.mark.parametrize("t", [0, 1, 300])
def test_opcheck(t: int) -> None:
    found = torch.library.opcheck(torch.ops.vidrial.power_retention.default, tuple(draw(t, True)))
    assert len(found) == 4 and set(found.values()) == {"SUCCESS"}
    found = torch.library.opcheck(torch.ops.vidrial.flash_attention.default, tuple(draw(t)[:3]), {"causal": True})
    assert len(found) == 4 and set(found.values()) == {"SUCCESS"}


def test_one_graph_serves_every_length_and_its_gradients() -> None:
    function = torch.compile(power_retention, fullgraph=True, dynamic=True)
    for t in (7, 64, 100, 333, 1025, 2000):
        x = draw(t, True)
        y, plain = function(*x), power_retention(*x)
        dy = torch.randn_like(y)
        assert torch.equal(y, plain), t
        found, exact = (torch.autograd.grad(made, x, dy) for made in (y, plain))
        assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True)), t
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_states_in_one_graph_of_every_length_and_their_gradients() -> None:
    """As in eager mode, bit for bit: `recompute` says there what a graph does."""
    call = lambda x, state: power_retention(*x, initial_state=state, output_final_state=True, recompute=True)  # noqa: E731
    function = torch.compile(call, fullgraph=True, dynamic=True)
    for t in (7, 300, 1025, 2000):
        x, state = draw(t, True), behind(draw(65), True)
        made, plain = function(x, state), call(x, state)
        assert all(torch.equal(a, b) for a, b in zip(flat(made), flat(plain), strict=True)), t
        found, exact = (
            torch.autograd.grad(sum((i + 1) * a.float().square().sum() for i, a in enumerate(flat(each))), [*x, *flat(state)])
            for each in (made, plain)
        )
        assert all(torch.equal(a, b) and b.float().norm() > 0 for a, b in zip(found, exact, strict=True)), t
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    found = torch.library.opcheck(torch.ops.vidrial.power_retention_states.default, (*x, *flat(state)), {"final": True})
    assert len(found) == 4 and set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_decoding_compiles_once(mode: str) -> None:
    """The state of one step is the next one's; a captured step is given copies, since each replay writes its results anew."""
    x, whole = draw(120), power_retention(*draw(120))
    _, state = power_retention(*(a[:, :80] for a in x), output_final_state=True)
    step = torch.compile(lambda x, state: power_retention(*x, initial_state=state, output_final_state=True), fullgraph=True, mode=mode)
    with torch.no_grad():
        for t in range(80, 120):
            torch.compiler.cudagraph_mark_step_begin()
            y, state = step([a[:, t : t + 1].clone() for a in x], PowerState(state.S.clone(), state.Z.clone()))
            assert (y - whole[:, t : t + 1]).float().norm() <= 1e-2 * whole[:, t].float().norm(), t
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("grad", [False, True])
def test_reduce_overhead_captures_and_replays(grad: bool) -> None:
    function = torch.compile(lambda *x: power_retention(*x).float().square(), fullgraph=True, mode="reduce-overhead")
    for seed in range(5):  # the first calls warm up and capture, the later ones replay, with other values
        torch.compiler.cudagraph_mark_step_begin()
        x = draw(777, grad, seed)
        plain = power_retention(*x).float().square()
        if grad:
            exact = [a.clone() for a in torch.autograd.grad(plain.sum(), x)]
        y = function(*x)
        assert torch.equal(y, plain)
        if grad:
            found = torch.autograd.grad(y.sum(), x)
            assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("dispatched", [False, True])
def test_forward_and_backward_are_captured_after_prepare(dispatched: bool) -> None:
    prepare(op, example(t=901, h=2, hq=4, d=32))
    prepare(back_op, back_example(t=901, h=2, hq=4, d=32))
    call = torch.ops.vidrial.power_retention if dispatched else power_retention
    x = draw(901, True)
    dy = torch.randn(1, 901, 4, 32, device="cuda", dtype=torch.bfloat16)
    # cuBLAS and autograd's own threads begin outside of the capture; power retention's first call is the captured one.
    (x[0].float() @ x[0].float().transpose(-1, -2)).sum().backward()
    x[0].grad = None
    freeze()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(*x)
        found = torch.autograd.grad(y, x, dy)
    for seed in (1, 2):
        for a, b in zip(x, draw(901, seed=seed), strict=True):
            a.data.copy_(b)
        graph.replay()
        torch.cuda.synchronize()
        plain = power_retention(*x)
        exact = torch.autograd.grad(plain, x, dy)
        assert torch.equal(y, plain) and all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))


def test_autocast_and_vmap() -> None:
    q, k, v, g = (x.float() for x in draw(300, b=2))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = power_retention(q, k.half(), v, g.bfloat16())
        assert flash_attention(q, k, v, causal=True).dtype == torch.bfloat16
    assert torch.equal(y, power_retention(q.bfloat16(), k.half().bfloat16(), v.bfloat16(), g.bfloat16().float()))
    x = [torch.stack([a, -a if a.dim() == 4 else a]) for a in draw(300, b=2)]
    each = torch.stack([power_retention(*(a[i] for a in x)) for i in range(2)])
    # A folded batch may be served by another config, so that results differ by rounding.
    assert (torch.vmap(power_retention)(*x).float() - each.float()).norm() <= 5e-3 * each.float().norm()


def test_host_time_of_the_dispatcher() -> None:
    x, call = draw(64), torch.ops.vidrial.power_retention.default

    def least(function: Any) -> float:
        for _ in range(20):
            function(*x)
        best = 1e9
        for _ in range(30):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(20):
                function(*x)
            best = min(best, (time.perf_counter() - begin) / 20 * 1e6)
        return best

    with torch.no_grad():
        eager, dispatched = least(power_retention), least(call)
    print(f"host time a call: {eager:.1f} us, by way of the dispatcher {dispatched:.1f} us")
    assert dispatched <= eager + 3
