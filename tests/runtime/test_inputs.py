"""What a call gives beside what its op declares: every mistake is a typed error that names the input, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vidrial as vd
from vidrial import call
from vidrial.runtime import arrays, inputs
from vidrial.runtime.arrays import ArraySpec, as_array, contiguous, signature_of
from vidrial.runtime.inputs import check_inputs

TEMPLATE = """
#include <vidrial/prelude.cuh>
#pragma nv_hdrstop
{{ tiles }}
{{ args }}
extern "C" __global__ void __launch_bounds__(Tiles::threads) axpy(__grid_constant__ Args const args) {
  int const i = blockIdx.x * Tiles::threads + threadIdx.x;
  if (i < args.n) args.out[i] = args.alpha * args.x[i * args.step] + (args.bias ? args.bias[i] : 0.f);
}
"""


@dataclass(frozen=True)
class Problem:
    dtype: vd.DType = vd.static()
    n: int = vd.dynamic()
    step: int = vd.dynamic(keyed=False)
    alpha: float = vd.dynamic(keyed=False)


@dataclass(frozen=True)
class Config:
    threads: int = vd.choice(32, 64)


def problem_of(x: ArraySpec, bias: ArraySpec | None = None, alpha: float = 2.0) -> Problem:
    if len(x.shape) != 1:
        raise vd.ArgumentError(f"x has shape {list(x.shape)}; accepted: a vector [n]")
    return Problem(x.dtype, x.shape[0], x.strides[0], alpha)


@pytest.fixture(scope="module")
def op(tmp_path_factory: pytest.TempPathFactory) -> vd.Op[Problem, Config]:
    """out = alpha x + bias: x with any stride, bias contiguous and left out at will."""
    path: Path = tmp_path_factory.mktemp("axpy") / "axpy.cu.j2"
    path.write_text(TEMPLATE)
    kernel: vd.Kernel[Problem, Config] = vd.Kernel(
        "axpy",
        path,
        Problem,
        Config,
        vd.Arguments(x="float const*", bias="float const*", out="float*", alpha="float", n="int", step="int"),
        lambda p, c: vd.Tiles(threads=c.threads),
        lambda p, c: (-(-p.n // c.threads), 1, 1),
    )
    return vd.Op.of(
        kernel,
        inputs=lambda p: {
            "x": vd.Buffer((p.n,), p.dtype, (p.step,), aligned=False),
            "bias": vd.Buffer((p.n,), p.dtype, optional=True),
        },
        outputs=lambda p: {"out": vd.Buffer((p.n,), p.dtype)},
        sample=lambda p, seed: {},
        reference=lambda p, x: {},
        check=lambda p, x, y, z: vd.Check(0.0, 0.0, 0.0, 0.0),
        small=lambda p: p,
        example=lambda *, n: Problem(vd.DType.float32, n, 1, 2.0),
        problem_of=problem_of,
    )


@pytest.fixture(autouse=True)
def _cache() -> Iterator[None]:
    yield
    call._request.cache_clear()
    call._request_of.cache_clear()


def vector(n: int, dtype: Any = np.float32, offset: int = 0) -> np.ndarray:
    """0, 1, ..., beginning `offset` elements beyond a multiple of 16 bytes."""
    whole = np.zeros(n + offset + 16, dtype)
    begin = (-whole.ctypes.data // whole.itemsize) % (16 // whole.itemsize) + offset
    view = whole[begin : begin + n]
    view[:] = np.arange(n)
    return view


X = vector(37)
ASKED = Problem(vd.DType.float32, 37, 1, 2.0)
# Inputs, the error, what it says: the input, what came, what is accepted.
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a misspelt name": ({"X": X}, vd.ArgumentError, r"axpy has no input named X; given: X; accepted: x, bias \(optional\)"),
    "one too many": ({"x": X, "y": X}, vd.ArgumentError, r"no input named y; given: x, y; accepted: x, bias"),
    "one missing": ({"bias": X}, vd.ArgumentError, r"axpy lacks its input x; given: bias; accepted: x, bias"),
    "none": ({}, vd.ArgumentError, r"axpy lacks its input x; given: none; accepted: x, bias"),
    "None where one is needed": ({"x": None, "bias": X}, vd.ArgumentError, r"lacks its input x"),
    "another dtype": ({"x": X, "bias": X.astype(np.float16)}, vd.ArgumentTypeError, r"bias is float16; accepted: float32"),
    "an unknown dtype": ({"x": X, "bias": X.astype(np.float64)}, vd.ArgumentTypeError, r"bias: dtype 'float64' is not known"),
    "too short": ({"x": X, "bias": X[:36]}, vd.ArgumentError, r"bias has shape \[36\]; accepted: \[37\]"),
    "too long": ({"x": vector(38)}, vd.ArgumentError, r"x has shape \[38\]; accepted: \[37\]"),
    "another rank": ({"x": X[None]}, vd.ArgumentError, r"x has shape \[1, 37\]; accepted: \[37\]"),
    "strided": (
        {"x": X, "bias": vector(74)[::2]},
        vd.ArgumentError,
        r"bias has strides \[2\] \(in elements\); accepted: \[1\].*contiguous",
    ),
    "strided unlike the problem": ({"x": vector(74)[::2]}, vd.ArgumentError, r"x has strides \[2\].*accepted: \[1\]"),
    "backwards": ({"x": X, "bias": X[::-1]}, vd.ArgumentError, r"bias has strides \[-1\].*accepted: \[1\]"),
    "not aligned": ({"x": X, "bias": vector(37, offset=1)}, vd.ArgumentError, r"bias does not begin at a multiple of 16 bytes"),
    "no array": ({"x": [1.0]}, vd.ArgumentTypeError, r"x: builtins\.list is not an array; accepted: torch\.Tensor"),
    "a NumPy scalar": ({"x": np.float32(1)}, vd.ArgumentTypeError, r"x: numpy\.float32 is not an array"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_input_is_refused_by_its_name(op: vd.Op[Problem, Config], case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(*_: Any) -> None:
        raise RuntimeError("it ran")

    given, error, message = BAD[case]
    monkeypatch.setattr(call, "run", ran)
    monkeypatch.setattr(call, "run_on_host", ran)
    with pytest.raises(error, match=message):
        vd.apply(op, ASKED, given)
    with pytest.raises(error, match=message):
        vd.apply(op, ASKED, {name: x if x is None else as_array(x, name) for name, x in given.items()})


def test_what_is_declared_is_taken(op: vd.Op[Problem, Config]) -> None:
    odd, bias = vector(37, offset=1), vector(37)
    for given in ({"x": odd}, {"x": odd, "bias": None}, {"x": as_array(odd, "x")}):
        assert (vd.apply(op, ASKED, given)["out"] == 2 * X).all()
    assert (vd.apply(op, ASKED, {"x": odd, "bias": bias})["out"] == 3 * X).all()
    assert (vd.apply(op, replace(ASKED, step=2), {"x": vector(74)[::2]})["out"] == 4 * X).all()
    assert (vd.apply(op, ASKED, {"x": X}, threads=64)["out"] == 2 * X).all()


def test_call_op_makes_the_problem_and_copies_what_lies_otherwise(op: vd.Op[Problem, Config]) -> None:
    assert (vd.call_op(op, {"x": vector(74)[::2]}, alpha=1.0)["out"] == 2 * X).all()
    for bias in (vector(74)[::2] / 2, vector(37, offset=3), X[::-1][::-1], X.astype(">f4")):
        out = vd.call_op(op, {"x": X[::-1], "bias": bias}, alpha=-1.0)["out"]
        assert (out == 2 * X - 36).all()
    with pytest.raises(vd.ArgumentError, match=r"bias has shape \[36\]; accepted: \[37\]"):
        vd.call_op(op, {"x": X, "bias": X[:36]})
    with pytest.raises(vd.ArgumentError, match=r"axpy: got an unexpected keyword argument 'beta'; accepted: x, bias, alpha"):
        vd.call_op(op, {"x": X}, beta=1)
    with pytest.raises(vd.ArgumentError, match=r"axpy: got an unexpected keyword argument 'y'"):
        vd.call_op(op, {"x": X, "y": X})
    with pytest.raises(vd.ArgumentError, match=r"axpy: missing a required argument: 'x'"):
        vd.call_op(op, {"bias": X})
    with pytest.raises(vd.ArgumentTypeError, match=r"axpy: alpha cannot be looked up"):
        vd.call_op(op, {"x": X}, alpha=np.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(vd.ArgumentError, match=r"does not say which problem its inputs ask.*problem_of.*vidrial\.apply"):
        vd.call_op(replace(op, problem_of=None), {"x": X})


@pytest.mark.parametrize("shape", [(0,), (1,)])
def test_no_stride_counts_where_nothing_is_stepped_over(op: vd.Op[Problem, Config], shape: tuple[int, ...]) -> None:
    strange = np.lib.stride_tricks.as_strided(vector(4) + 5, shape, (12,))
    assert (vd.apply(op, replace(ASKED, n=shape[0]), {"x": strange, "bias": strange})["out"] == 15).all()


def test_a_call_is_checked_once_per_signature(op: vd.Op[Problem, Config], monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []

    def counted(*given: Any, **options: Any) -> ArraySpec:
        checked.append(given)
        return check_inputs(*given, **options)

    monkeypatch.setattr(call, "check_inputs", counted)
    monkeypatch.setattr(call, "run_on_host", lambda *_: {})
    for _ in range(3):
        vd.apply(op, ASKED, {"x": vector(37)})
        vd.call_op(op, {"x": vector(37)})
    assert len(checked) == 2
    with pytest.raises(vd.ArgumentTypeError):
        vd.apply(op, ASKED, {"x": vector(37, np.float16)})
    vd.apply(op, ASKED, {"x": vector(37, offset=1)})
    assert len(checked) == 4


def test_all_inputs_are_of_one_library_and_device(op: vd.Op[Problem, Config]) -> None:
    spec = as_array(X, "x").facts
    for other, said in (
        (spec._replace(library="torch"), "a torch array on the CPU"),
        (spec._replace(device=1), "numpy array on CUDA device 1"),
    ):
        with pytest.raises(
            vd.ArgumentTypeError, match=rf"bias is .*{said}, x a numpy array on the CPU; accepted: one library and one device"
        ):
            check_inputs(op, ASKED, {"x": spec, "bias": other})


def test_the_host_target_takes_no_gpu_array(op: vd.Op[Problem, Config]) -> None:
    with pytest.raises(vd.ArgumentTypeError, match=r"on CUDA device 2; the host target takes NumPy arrays"):
        vd.apply(op, ASKED, {"x": as_array(X, "x")._replace(device=2)}, target="host")


def test_a_copy_is_made_only_where_it_has_to_be() -> None:
    array = as_array(X, "x")
    assert contiguous(array) is array
    for x in (vector(74)[::2], vector(37, offset=1)):
        copy = contiguous(as_array(x, "x"))
        assert copy.strides == (1,) and copy.pointer % 16 == 0 and copy.pointer != x.ctypes.data and (copy.owner == x).all()


def test_power_retention_stands_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from vidrial.kernels.power_retention import power_retention
    from vidrial.kernels.power_retention.op import example
    from vidrial.kernels.power_retention.op import op as power

    p = example(t=5, b=2, h=2, hq=4, d=32, e=64, dtype="float16")
    declared = power.inputs(p)
    drawn = {name: as_array(x, name) for name, x in power.sample(p, 0).items()}
    assert {n: (b.shape, b.dtype) for n, b in declared.items()} == {n: (a.shape, a.dtype) for n, a in drawn.items()}
    assert list(power.inputs(example(t=5, gated=False))) == ["q", "k", "v"]
    given = {name: a.facts for name, a in drawn.items()}
    check_inputs(power, p, given | {"log_g": given["log_g"]._replace(aligned=False)})
    for name, wrong in (
        ("q", given["q"]._replace(strides=(0, 128, 32, 2))),
        ("v", given["v"]._replace(aligned=False)),
        ("log_g", given["log_g"]._replace(strides=(10, 1, 5))),
    ):
        with pytest.raises(vd.ArgumentError, match=rf"^{name} "):
            check_inputs(power, p, given | {name: wrong})
    monkeypatch.setattr(inputs, "_check_names", lambda *_: (_ for _ in ()).throw(vd.ArgumentError("asked")))
    q, k, v = (np.zeros((1, 6, 1, 32), np.float16) for _ in range(3))
    for target in (None, "host"):
        with pytest.raises(vd.ArgumentError, match="asked"):
            power_retention(q, k, v, target=target)


@pytest.mark.parametrize("recorded", [False, True])
def test_gradients_are_refused_for_every_op(op: vd.Op[Problem, Config], recorded: bool) -> None:
    torch = pytest.importorskip("torch")
    x, plain = torch.arange(37.0, requires_grad=True), torch.ones(37)
    calls = (
        lambda: vd.apply(op, ASKED, {"x": plain, "bias": x})["out"],
        lambda: vd.call_op(op, {"x": plain, "bias": x})["out"],
        lambda: as_array(x, "bias"),
        lambda: signature_of((plain, x), ("x", "bias")),
        lambda: vd.apply(op, ASKED, {"x": plain, "bias": torch.nn.Parameter(plain)})["out"],
    )
    with torch.set_grad_enabled(recorded):
        if recorded:
            for one in calls:
                with pytest.raises(
                    vd.UnsupportedError, match=r"bias requires a gradient, which this call does not record.*no_grad.*bias\.detach\(\)"
                ):
                    one()
        else:
            assert torch.equal(calls[0](), plain * 2 + x) and torch.equal(calls[1](), plain * 2 + x)
            assert torch.equal(calls[4](), plain * 3)
    assert torch.equal(vd.apply(op, ASKED, {"x": plain, "bias": x.detach()})["out"], plain * 2 + x.detach())


def test_the_warm_path_looks_nothing_else_up(op: vd.Op[Problem, Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a torch tensor it reads address, sizes, dtype, device, the negative bit, and whether a gradient is asked for while one is recorded."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(arrays, "_refuse_tensor", lambda *_: (_ for _ in ()).throw(RuntimeError("slow")))
    with torch.no_grad():
        signature_of((torch.ones(3, requires_grad=True), torch.ones(3)[::2]), ("x", "y"))
    signature_of((torch.ones(3),), ("x",))
