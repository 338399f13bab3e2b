"""Captures, prepare and freeze on a real GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vidrial.call import prepare
from vidrial.errors import FrozenError
from vidrial.kernels.power_retention import power_retention
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
    yield
    freeze(False)


def inputs(t: int) -> tuple[Any, ...]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, t, 2, 32, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    return q, k, v, torch.nn.functional.logsigmoid(torch.randn(1, t, 2, device="cuda") + 4)


def test_a_first_call_in_a_capture_is_refused_and_prepare_makes_it_possible() -> None:
    x, refused, graph = inputs(777), torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with pytest.raises(FrozenError, match="prepare"), torch.cuda.graph(refused):
        power_retention(*x)
    prepare(op, example(t=777, h=2, d=32))
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = power_retention(*x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, power_retention(*x))


def test_frozen_calls_compile_nothing() -> None:
    freeze()
    with pytest.raises(FrozenError, match="compiled"):
        power_retention(*inputs(777))
    freeze(False)
    expected = power_retention(*inputs(777))
    freeze()
    assert torch.equal(power_retention(*inputs(777)), expected)
    assert power_retention(*inputs(701)).shape == (1, 701, 2, 32)
