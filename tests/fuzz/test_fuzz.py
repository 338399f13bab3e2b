"""The fuzzer's fixed seeds; that it finds mistakes of every kind; and that what it prints shows them again."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fuzz import campaign, judge
from fuzz.cases import Case, draw, smaller
from fuzz.families import FAMILIES
from fuzz.spoiled import WRONG
from vidrial import call
from vidrial.errors import UnsupportedError, VidrialError
from vidrial.kernels import flash_attention as flash_package
from vidrial.kernels import power_retention as power_package
from vidrial.kernels.flash_attention import cpu as flash_cpu
from vidrial.kernels.power_retention import cpu as power_cpu
from vidrial.kernels.power_retention import gradient as power_gradient
from vidrial.kernels.power_retention.request import request_of

ROOT = Path(__file__).parents[2]
# 500 problems that NumPy serves, and 210 of the host target, of which each family has 14.
NUMPY, HOST = 125, 42
THREES = [sorted(FAMILIES)[i : i + 3] for i in range(0, len(FAMILIES), 3)]


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, NumPy on one thread: on more it burns twice the processor's time here."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.fuzz", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False)


@pytest.mark.parametrize("seed", [0, 1000, 2000, 3000])
def test_numpy(seed: int) -> None:
    found = fuzz("--cases", str(NUMPY), "--seed", str(seed), "--target", "cuda")
    assert found.returncode == 0 and f"{NUMPY} cases, 0 failed" in found.stdout, found.stdout + found.stderr


@pytest.mark.parametrize("families", THREES, ids=", ".join)
def test_host(families: list[str]) -> None:
    found = fuzz("--cases", str(HOST), *(word for name in families for word in ("--family", name)))
    assert found.returncode == 0 and f"{HOST} cases, 0 failed" in found.stdout, found.stdout + found.stderr


def test_what_is_drawn_has_everything_in_it() -> None:
    """Of the seeds above: every kind of memory, gates, values, options and refusals, and the same case for the same seed."""
    cases = [draw(seed + i) for seed in (0, 1000, 2000, 3000) for i in range(NUMPY)]
    assert cases == [draw(case.seed) for case in cases] and len(set(cases)) == len(cases)
    assert {lie for case in cases for _, lie in case.layouts} >= {
        *("strided", "padded", "aligned rows", "offset", "transposed", "last axis first", "expanded", "fused"),
        *("negative", "swapped", "read-only", "packed", "subclass"),
    }
    assert {case.gates for case in cases} == {"", "memory", "short", "zero", "closed", "minus infinity", "positive", "nan", "mixed"}
    assert {0, 1, 2, 7, 64, 65, 129, 600, 1025} <= {case.t for case in cases} and {0, 1, 2, 3} == {case.b for case in cases}
    assert {case.gradient for case in cases} == {"", "vjp", "autograd"} and {case.split for case in cases} >= {0, 1, 64, 130}
    assert {name for case in cases for name, _ in case.options} == {
        *("degree", "normalize", "scale", "chunk", "causal", "window", "softcap", "return_lse"),
    }
    planted = {name for case in cases for name, *_ in case.planted}
    assert planted == {"q", "k", "v"} and sum(bool(case.planted) for case in cases) > 50
    assert len({case.wrong for case in cases} - {""}) > 30 and {case.library for case in cases} == {"numpy", "torch"}
    sizes = [replace(case, t=case.t // 2) for case in cases[:20] if case.t > 2 and not case.planted and not case.split]
    assert all(small.t < case.t for case in sizes for small in smaller(case) if small.t != case.t)


# --- mistakes, and how soon each is found ---

Patch = Callable[[pytest.MonkeyPatch], None]


def _around(module: Any, name: str, change: Callable[..., Any]) -> Patch:
    """The function of that name gets `change(it, *arguments, **keywords)` in its place."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, name, functools.partial(change, getattr(module, name)))

    return plant


def _wrong_scale(f: Any, *x: Any, scale: float, **options: Any) -> Any:
    return f(*x, scale=1.01 * scale, **options)


def _no_gates(f: Any, q: Any, k: Any, v: Any, log_g: Any, **options: Any) -> Any:
    return f(q, k, v, None, **options)


def _later_key(f: Any, rows: Any, keys: Any, offset: int, causal: bool, window: Any) -> Any:
    return f(rows, keys, offset + 1 if causal else offset, causal, window)


def _heads_in_turn(f: Any, tokens: Any, x: Any) -> Any:
    shape = (tokens.b, tokens.t, tokens.group, tokens.h, x.shape[-1])
    return np.ascontiguousarray(x.reshape(shape).transpose(0, 3, 2, 1, 4))


def _heads_in_turn_back(f: Any, tokens: Any, x: Any) -> Any:
    return np.ascontiguousarray(x.transpose(0, 3, 2, 1, 4)).reshape(tokens.b, tokens.t, tokens.h * tokens.group, x.shape[-1])


def _heads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, change in (("of_queries", _heads_in_turn), ("to_queries", _heads_in_turn_back)):
        right = getattr(power_cpu._Tokens, name)
        monkeypatch.setattr(power_cpu._Tokens, name, functools.partialmethod(lambda self, x, f, g: g(f, self, x), f=right, g=change))


def _written_to(f: Any, q: Any, k: Any, v: Any, **options: Any) -> Any:
    y = f(q, k, v, **options)
    with contextlib.suppress(ValueError):  # read-only
        v[..., -1:] = 7
    return y


def _untyped(f: Any, *x: Any) -> None:
    try:
        f(*x)
    except VidrialError as error:
        raise ValueError(str(error)) from None


def _of_base_two(f: Any, *x: Any) -> Any:
    y, lse = f(*x)
    return y, lse / np.float32(np.log(2))


def _nan_hidden(f: Any, q: Any, k: Any, v: Any, log_g: Any, **options: Any) -> Any:
    return f(q, k, v, log_g if log_g is None else np.nan_to_num(log_g, nan=0.0), **options)


def _nan_spread(f: Any, weights: Any, values: Any, seen: Any) -> Any:
    return weights @ values


def _gates_a_token_late(f: Any, *x: Any, **options: Any) -> Any:
    found = f(*x, **options)
    return found if found.dlog_g is None else found._replace(dlog_g=np.roll(found.dlog_g, 1, axis=1))


def _half_of_dk(f: Any, *x: Any, **options: Any) -> Any:
    found = f(*x, **options)
    return found._replace(dk=found.dk * np.float32(1.001))


def _one_token_refused(f: Any, q: Any, *x: Any, **options: Any) -> Any:
    if q.shape[1] == 33:
        raise UnsupportedError("33 tokens are not served")
    return f(q, *x, **options)


def _input_returned(f: Any, q: Any, k: Any, v: Any, **options: Any) -> Any:
    y = f(q, k, v, **options)
    return q if isinstance(y, np.ndarray) and q.shape == y.shape and q.dtype == y.dtype else y


def _strange_strides(f: Any, *x: Any) -> Any:
    y, lse = f(*x)
    return np.asfortranarray(y), lse


def _state_forgets_less(f: Any, q: Any, k: Any, v: Any, log_g: Any, **options: Any) -> Any:
    y, state, norm = f(q, k, v, log_g, **options)
    return y, state if state is None else type(state)(state.S * np.float32(1.001), state.Z), norm


POWER, FLASH = "power_retention", "flash_attention"
MISTAKES: dict[str, tuple[str, Patch, str]] = {
    "a wrong scale": (POWER, _around(power_gradient, "power_retention_cpu", _wrong_scale), "wrong"),
    "a dropped gate": (POWER, _around(power_gradient, "power_retention_cpu", _no_gates), "wrong"),
    "a later key is seen": (FLASH, _around(flash_cpu, "visible", _later_key), "wrong"),
    "heads of a group in turn": (POWER, _heads, "wrong"),
    "an input is written to": (FLASH, _around(flash_package, "flash_attention", _written_to), "altered"),
    "an untyped error": (FLASH, _around(flash_package, "_check_options", _untyped), "untyped: ValueError: "),
    "lse of base 2": (FLASH, _around(flash_package, "flash_attention_cpu", _of_base_two), "wrong"),
    "a NaN gate is hidden": (POWER, _around(power_gradient, "power_retention_cpu", _nan_hidden), "y is finite"),
    "NaN reaches earlier rows": (POWER, _around(power_cpu, "masked_product", _nan_spread), "y is not finite"),
    "NaN reaches rows that do not see it": (FLASH, _around(flash_cpu, "masked_product", _nan_spread), "y is not finite"),
    "gates' gradients are a token late": (POWER, _around(power_gradient, "power_retention_cpu_gradients", _gates_a_token_late), "wrong"),
    "a thousandth of dk": (POWER, _around(power_gradient, "power_retention_cpu_gradients", _half_of_dk), "wrong"),
    "one length is refused": (POWER, _around(power_package, "power_retention", _one_token_refused), "refused"),
    "an input is returned": (FLASH, _around(flash_package, "flash_attention", _input_returned), "y lies in the memory"),
    "results are not contiguous": (FLASH, _around(flash_package, "flash_attention_cpu", _strange_strides), "y is ndarray"),
    "a state that forgets too little": (POWER, _around(power_gradient, "power_retention_cpu", _state_forgets_less), "wrong: S"),
}
# Cases of the op within which each is found; drawn small, so that it is soon.
WITHIN = 150


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    """What a call with a mistake in it has learned of its arguments is forgotten."""
    yield
    flash_package._request.cache_clear()
    request_of.cache_clear()


def small_cases(op: str) -> list[Case]:
    cases = (draw(seed) for seed in range(4000, 5200))
    return [case for case in cases if case.op == op and case.b * case.t * max(case.tq, 1) * case.h * case.group <= 40_000][:WITHIN]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, plant, said = MISTAKES[mistake]
    plant(monkeypatch)
    verdicts = (judge.judge(case) for case in small_cases(op))
    found = next((verdict for verdict in verdicts if verdict), "nothing was found")
    assert found.startswith(said), found


@pytest.mark.parametrize("op", [POWER, FLASH])
def test_where_no_mistake_is_nothing_is_found(op: str) -> None:
    assert [judge.judge(case) for case in small_cases(op)[:15]] == [""] * 15


def test_a_mistake_on_the_host_target_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of the host target, made without a compiler: right ones, a last row that is another one, and one that nobody wrote."""
    case = Case("softmax", 3, "host", "softmax", t=33, tq=7)
    last: list[Any] = []

    def run(op: Any, problem: Any, inputs: Any, plan: Any) -> dict[str, Any]:
        x = inputs["x"].owner
        y = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
        y[-1:] = last[0](y) if last else y[-1:]
        return {"y": y}

    monkeypatch.setattr(call, "predicted_plan", lambda *_: None)
    monkeypatch.setattr(call, "run_on_host", run)
    assert judge.judge(case) == ""
    last[:] = [lambda y: y[0]]
    assert judge.judge(case).startswith("wrong: y at (6,")
    last[:] = [lambda y: np.nan]
    assert judge.judge(case).startswith("y is not finite at (6, 0) and 33 elements")


def test_a_refusal_must_be_due_and_name_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(POWER, 1, wrong="scale is NaN")
    assert judge.judge(case) == ""
    monkeypatch.setitem(WRONG, "scale is NaN", replace(WRONG["scale is NaN"], word="degree"))
    assert judge.judge(case).startswith("the refusal does not say 'degree'")
    monkeypatch.setitem(WRONG, "scale is NaN", replace(WRONG["scale is NaN"], change=lambda arrays, options: None))
    assert judge.judge(case) == "accepted: scale is NaN"


def test_threads_that_share_memory_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [Case(FLASH, seed, t=7, tq=7) for seed in range(campaign.THREADS)]
    assert campaign.together(cases) == [""] * campaign.THREADS
    right, kept = flash_package.flash_attention_cpu, np.empty((1, 7, 1, 32), np.float32)

    def shared(*x: Any) -> Any:
        y, lse = right(*x)
        kept[...] = y
        time.sleep(0.02)
        return kept, lse

    monkeypatch.setattr(flash_package, "flash_attention_cpu", shared)
    assert judge.judge(cases[0]) == ""
    assert any(said.startswith("wrong: y") for said in campaign.together(cases))


def test_a_forked_child_says_its_verdict_or_how_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(FLASH, 1, t=7, tq=7)
    assert campaign.in_child(case) == ""
    monkeypatch.setattr(campaign, "judge", lambda case: "wrong: y")
    assert campaign.in_child(case) == "wrong: y"
    monkeypatch.setattr(campaign, "judge", lambda case: os._exit(3))
    assert campaign.in_child(case) == "a forked child said nothing; it ended with status 768"


def test_a_failing_case_becomes_small_and_is_shown_again(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(FLASH, 7, b=2, t=65, tq=31, h=2, group=3, options=(("causal", True), ("softcap", 20.0)), layouts=(("k", "negative"),))
    assert judge.judge(case) == ""
    monkeypatch.setattr(flash_cpu, "visible", functools.partial(_later_key, flash_cpu.visible))
    small, verdict = campaign.shrink(case, judge.judge(case))
    assert small.options == (("causal", True),) and not small.layouts and (small.b, small.h, small.group) == (1, 1, 1)
    assert small.t * small.tq <= 4 and verdict.startswith("wrong: y")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(campaign.snippet(small, verdict).replace("tests.fuzz", "fuzz"), {})
    assert printed.getvalue().strip() == verdict
