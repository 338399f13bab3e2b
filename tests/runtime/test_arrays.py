"""Arrays that are more, or lie otherwise, than what is at their address: right, or refused by name, on every path and for every op."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vidrial as vd
from vidrial.kernels.power_retention import power_retention
from vidrial.runtime import arrays
from vidrial.runtime.arrays import ArraySpec, as_array, signature_of
from vidrial.spec.registry import resolve

torch: Any = pytest.importorskip("torch")
SOFTMAX = Path(__file__).parents[2] / "examples/softmax/softmax.py"
RNG = np.random.default_rng(0)
Q, K, V = (RNG.standard_normal((1, 70, 2, 32)).astype(np.float16) for _ in range(3))
G = (-RNG.random((1, 70, 2))).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def softmax() -> Callable[[Any], Any]:
    op = resolve(f"{SOFTMAX}:op")
    found: Callable[[Any], Any] = sys.modules[op.problem.__module__].softmax  # type: ignore[attr-defined]
    return found


def dual(x: Any) -> Any:
    return torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))


def masked(x: Any) -> Any:
    return torch.masked.masked_tensor(x, torch.ones_like(x, dtype=torch.bool))


def negative(x: Any) -> Any:
    return torch.complex(torch.zeros_like(x), -x).conj().imag


# What makes another tensor of a dense float32 one, and what is said of it.
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "negative bit": (negative, r"x has its negative bit set.*x\.resolve_neg\(\)"),
    "negative view": (torch._neg_view, r"x has its negative bit set"),
    "tangent": (dual, r"x carries a tangent of forward-mode AD"),
    "gradient": (lambda x: x.clone().requires_grad_(), r"x requires a gradient.*x\.detach\(\)"),
    "parameter": (torch.nn.Parameter, r"x requires a gradient"),
    "sparse COO": (lambda x: x.to_sparse(), r"x has layout torch\.sparse_coo; accepted: torch\.strided"),
    "sparse CSR": (lambda x: x.to_sparse_csr(), r"x has layout torch\.sparse_csr"),
    "nested": (lambda x: torch.nested.nested_tensor([x, x[:2]]), r"x is a nested tensor; accepted: dense"),
    "jagged": (lambda x: torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged), r"x is a nested tensor; accepted: dense"),
    "masked": (masked, r"x is a .*MaskedTensor, which is more than its memory"),
    "meta": (lambda x: x.to("meta"), r"x(:| has no memory).*device meta"),
    "fake": (lambda x: torch._subclasses.FakeTensorMode().from_tensor(x), r"x is a .*FakeTensor, which is more than its memory"),
    "conjugate": (lambda x: torch.complex(x, x).conj(), r"x: dtype 'complex64' is not known"),
    "quantised": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), r"x: dtype 'qint8' is not known"),
    "NumPy's masked": (lambda x: np.ma.masked_array(x.numpy(), x.numpy() > 0), r"x is a masked array.*x\.filled"),
    "records": (lambda x: np.zeros((5, 9), [("a", "f4")]), r"x: dtype .* is not known"),
    "objects": (lambda x: x.numpy().astype(object), r"x: dtype 'object' is not known"),
    "a shape": (lambda x: x.shape, r"x: torch\.Size is not an array"),
    "a dtype": (lambda x: x.dtype, r"x: torch\.dtype is not an array"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_more_than_its_memory_is_refused_by_name(kind: str, softmax: Callable[[Any], Any]) -> None:
    make, said = REFUSED[kind]
    with torch.autograd.forward_ad.dual_level():
        x = make(torch.from_numpy(RNG.standard_normal((5, 9)).astype(np.float32)))
        # Of meta and fake tensors a call has shapes (test_torch_ops.py).
        calls = [lambda: as_array(x, "x"), lambda: ArraySpec.of(signature_of((x,), ("x",))[0][0], "x")]
        for call in calls if kind in ("meta", "fake") else [*calls, lambda: softmax(x)]:
            with pytest.raises((vd.UnsupportedError, vd.ArgumentTypeError), match=f"^{said}"):
                call()
        # Power retention has gradients.
        if kind in ("conjugate", "quantised", "records", "objects", "a shape", "a dtype", "gradient", "parameter"):
            return
        plain = torch.from_numpy(RNG.standard_normal((5, 32)).astype(np.float32))
        odd = make(plain)
        if kind not in ("nested", "jagged", "NumPy's masked") and "sparse" not in kind:
            odd = make(plain.reshape(1, 5, 1, 32).clone())
        q, v = (torch.zeros(1, 5, 1, 32) for _ in range(2))
        for target in (None, "host"):
            with pytest.raises((vd.UnsupportedError, vd.ArgumentTypeError), match=f"^{said.replace('x', 'k', 1).split('.*')[0]}"):
                power_retention(q, odd, v, target=target)


@pytest.mark.parametrize("name", ["grad", "jvp"])
def test_transformations_of_torch_func_are_refused_by_name(name: str, softmax: Callable[[Any], Any]) -> None:
    x = torch.randn(3, 4)
    calls = {
        "grad": lambda: torch.func.grad(lambda x: softmax(x).sum())(x),
        "jvp": lambda: torch.func.jvp(softmax, (x,), (torch.ones_like(x),)),
    }
    with pytest.raises(vd.UnsupportedError, match=r"^x is a tensor of torch\.func \(grad, jvp, vmap\)"):
        calls[name]()


def test_a_tensor_without_a_tangent_passes_within_a_dual_level(softmax: Callable[[Any], Any]) -> None:
    x = torch.randn(3, 5)
    with torch.autograd.forward_ad.dual_level():
        inside = softmax(x)
    assert torch.equal(inside, softmax(x)) and torch.allclose(inside, torch.softmax(x, 1), atol=1e-6)
    subclass = x.as_subclass(type("Named", (torch.Tensor,), {}))
    assert torch.equal(softmax(subclass), inside) and torch.equal(softmax(torch.nn.Parameter(x, requires_grad=False)), inside)


def record(x: np.ndarray, *fields: tuple[str, str]) -> np.ndarray:
    """The same values as one field of packed records."""
    whole = np.zeros(x.shape, np.dtype([*fields, ("x", x.dtype)]))
    whole["x"] = x
    return whole["x"]


def shifted(x: np.ndarray) -> np.ndarray:
    """The same values one byte beyond an aligned address."""
    whole = np.zeros(x.nbytes + 1, np.uint8)[1:]
    whole[:] = x.reshape(-1).view(np.uint8)
    return whole.view(x.dtype).reshape(x.shape)


ODD: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "records of one byte more": lambda x: record(x, ("pad", "u1")),
    "records of twice the size": lambda x: record(x, ("a", x.dtype.str)),
    "records, big-endian": lambda x: record(x.astype(x.dtype.newbyteorder(">")), ("pad", "u1")),
    "not aligned to an element": shifted,
    "reversed": lambda x: np.ascontiguousarray(x[:, ::-1])[:, ::-1],
    "every second": lambda x: np.repeat(x, 2, 1)[:, ::2],
    "in Fortran's order": np.asfortranarray,
    "read-only": lambda x: np.lib.stride_tricks.as_strided(x, writeable=False),
    "a matrix's class": lambda x: x.view(type("Sub", (np.ndarray,), {})),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("target", [None, "host"])
def test_numpy_arrays_that_lie_otherwise_are_read_right(kind: str, target: str | None, softmax: Callable[[Any], Any]) -> None:
    make = ODD[kind]
    plain = power_retention(Q, K, V, G, target=target, chunk=0)
    for odd in ((Q, K, V, make(G)), (make(Q), make(K), make(V), G)):
        y = power_retention(*odd, target=target, chunk=0)
        assert (y == plain).all() and y.dtype == np.float16 and y.dtype.isnative and y.flags.c_contiguous
    x = RNG.standard_normal((5, 9)).astype(np.float32)
    assert (np.asarray(softmax(make(x))) == softmax(x)).all()


@pytest.mark.parametrize("target", [None, "host"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("layout", ["heads after one another", "heads first", "interleaved", "one for all", "k is v"])
def test_views_of_one_projection(layout: str, library: str, target: str | None) -> None:
    heads = {"q": slice(0, 4), "k": slice(4, 6), "v": slice(6, 8)}
    if layout == "interleaved":
        heads = {"q": slice(0, 8, 2), "k": slice(1, 5, 2), "v": slice(5, 8, 2)}
    elif layout == "one for all":
        heads = dict.fromkeys("qkv", slice(0, 4))
    elif layout == "k is v":
        heads |= {"v": slice(4, 6)}
    x = RNG.standard_normal((2, 41, 8, 32)).astype(np.float16)
    if layout == "heads first":
        x = np.ascontiguousarray(x.transpose(2, 0, 1, 3)).transpose(1, 2, 0, 3)
    whole = x if library == "numpy" else torch.from_numpy(x)
    views = [whole[:, :, heads[n]] for n in "qkv"]
    plain = power_retention(*(np.ascontiguousarray(x[:, :, heads[n]]) for n in "qkv"), target=target, chunk=0)
    before = x.copy()
    y = power_retention(*views, target=target, chunk=0)
    assert (np.asarray(y) == plain).all() and (x == before).all()
    assert np.linalg.norm(plain) > 1


@pytest.mark.parametrize("t", [0, 1, 300])
@pytest.mark.parametrize("chunk", [None, 0, 128])
def test_outputs_on_the_cpu_are_contiguous_and_alias_nothing(t: int, chunk: int | None, softmax: Callable[[Any], Any]) -> None:
    q, k, v = (RNG.standard_normal((2, t, h, 32)).astype(np.float32) for h in (4, 2, 2))
    y = power_retention(q, k, v, chunk=chunk)
    assert y.flags.c_contiguous and not np.may_share_memory(y, q) and y.shape == (2, t, 4, 32)
    half = power_retention(np.asfortranarray(q.astype(np.float16)), k.astype(np.float16), v.astype(np.float16), chunk=chunk)
    assert half.flags.c_contiguous
    tensor = power_retention(*(torch.from_numpy(x).bfloat16() for x in (q, k, v)), chunk=chunk)
    assert tensor.is_contiguous() and tensor.stride() == (max(t, 1) * 128, 128, 32, 1)
    x = np.zeros((t, 7), np.float32)
    out = softmax(x)
    assert out.flags.c_contiguous and out is not x and not np.may_share_memory(out, x) and out.shape == (t, 7)
    assert softmax(np.zeros((3, 0), np.float32)).shape == (3, 0)


def test_jax_arrays_that_are_traced_or_sharded_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX is no part of the tests: a stand-in with as much of it as is asked."""

    class Array:
        def __init__(self, *devices: str) -> None:
            self._devices = set(devices)

        def devices(self) -> set[str]:
            return self._devices

    class Tracer:
        pass

    stand_in = types.ModuleType("jax")
    vars(stand_in).update(Array=Array, core=types.SimpleNamespace(Tracer=Tracer))
    monkeypatch.setitem(sys.modules, "jax", stand_in)
    with pytest.raises(vd.UnsupportedError, match=r"^x is traced by JAX \(jit, grad, vmap\)"):
        as_array(Tracer(), "x")
    with pytest.raises(vd.UnsupportedError, match=r"^x is spread over 2 devices; accepted: arrays on one"):
        as_array(Array("cuda:0", "cuda:1"), "x")


def test_cupy_arrays_of_odd_strides_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ndarray:
        def __init__(self, address: int, strides: tuple[int, ...]) -> None:
            self.data, self.strides, self.shape, self.dtype = types.SimpleNamespace(ptr=address), strides, (3,), np.dtype(np.float32)
            self.device = types.SimpleNamespace(id=0)

    stand_in = types.ModuleType("cupy")
    vars(stand_in).update(ndarray=Ndarray)
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    assert as_array(Ndarray(4096, (8,)), "x").strides == (2,)
    for odd in (Ndarray(4096, (5,)), Ndarray(4098, (4,))):
        with pytest.raises(vd.UnsupportedError, match="^x has elements that lie at no multiples of their 4 bytes"):
            as_array(odd, "x")


def test_while_another_thread_imports_torch_no_array_is_its(monkeypatch: pytest.MonkeyPatch) -> None:
    """sys.modules has a module before it has anything in it."""
    from vidrial.kernels.flash_attention import flash_attention
    from vidrial.kernels.power_retention import power_retention, power_retention_vjp

    x = np.ones((1, 3, 1, 32), np.float32)
    partial = types.ModuleType("torch")
    partial.__spec__ = importlib.machinery.ModuleSpec("torch", None)
    partial.__spec__._initializing = True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", partial)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)  # which another test may have loaded, and which asks for a driver
    arrays._reader.cache_clear()
    assert as_array(x, "x").library == "numpy" and not arrays.capturing()
    y, vjp = power_retention_vjp(x, x, x)
    assert (y == 1).all() and (power_retention(x, x, x) == 1).all() and (flash_attention(x, x, x) == 1).all() and vjp(x).dv.shape == x.shape
