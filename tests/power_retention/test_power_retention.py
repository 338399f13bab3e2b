"""Power retention: its two float64 forms against each other, the CPU implementation against them, and every refusal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidrial.dtypes import DType
from vidrial.errors import ArgumentError, ArgumentTypeError, UnsupportedError, VidrialError
from vidrial.kernels.power_retention import power_retention
from vidrial.kernels.power_retention.reference import attention_form, recurrent_form

ROOT = Path(__file__).parents[2]
LENGTHS = (0, 1, 7, 63, 65, 129, 257, 1000)
# Scores are sums of float32 products, off by about 2^-22 |q||k|, which the weighted error divides out: a few 2^-24 are left.
WEIGHTED = 2e-7
# Relative to the norm nothing is divided out: rows whose few weights nearly cancel lose up to their conditioning, ~1e-4 at worst here.
RELATIVE = 1e-5

Inputs = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]


def sample(
    seed: int, t: int, *, b: int = 2, hq: int = 2, h: int = 2, d: int = 32, e: int | None = None, gates: float | None = 1.0
) -> Inputs:
    """Normal float32 q, k, v; log_g = gates * logsigmoid(normal + 4), or None."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((b, t, *heads), np.float32) for heads in ((hq, d), (h, d), (h, e or d)))
    log_g = None if gates is None else (-gates * np.log1p(np.exp(-rng.standard_normal((b, t, h)) - 4))).astype(np.float32)
    return q, k, v, log_g


def assert_close(y: np.ndarray, inputs: Inputs, **options: Any) -> None:
    exact = attention_form(*inputs, **options)
    error = np.abs(y - exact.y)
    assert np.linalg.norm(error) <= RELATIVE * np.linalg.norm(exact.y)
    assert (error * exact.conditioning[..., None]).max(initial=0.0) <= WEIGHTED * np.abs(inputs[2]).max(initial=0.0)


@pytest.mark.parametrize("normalize", ["sum", "none"])
@pytest.mark.parametrize(("t", "gates"), [(1, 1.0), (2, None), (77, 1.0), (77, None), (129, 0.01), (129, 300.0)])
def test_the_two_float64_forms_agree(t: int, gates: float | None, normalize: str) -> None:
    inputs = sample(t, t, b=1, hq=3, h=1, d=8, e=5, gates=gates)
    exact = attention_form(*inputs, normalize=normalize)
    difference = np.abs(recurrent_form(*inputs, normalize=normalize) - exact.y) * exact.conditioning[..., None]
    assert difference.max() < 1e-14 * t
    assert np.linalg.norm(exact.y) > 0.1


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("normalize", ["sum", "none"])
def test_the_definition_term_by_term(degree: int, normalize: str) -> None:
    q, k, v, log_g = sample(3, 11, hq=4, h=2, d=6, e=3)
    assert log_g is not None
    log_g[0, 3, 0], log_g[1, 5, 1] = -np.inf, -100.0
    y = attention_form(q, k, v, log_g, degree=degree, scale=0.3, normalize=normalize).y
    for b, i, h in np.ndindex(*q.shape[:3]):
        total, norm = np.zeros(3), 0.0
        for j in range(i + 1):
            decay = np.exp(sum(max(float(log_g[b, m, h // 2]), -60.0) for m in range(j + 1, i + 1)))
            weight = (0.3 * float(q[b, i, h].astype(np.float64) @ k[b, j, h // 2])) ** degree * decay
            total, norm = total + weight * v[b, j, h // 2], norm + weight
        assert np.allclose(y[b, i, h], total / norm if normalize == "sum" else total, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("gates", [None, 1.0, 0.001, 20.0, 300.0])
@pytest.mark.parametrize("t", LENGTHS)
def test_cpu(t: int, gates: float | None) -> None:
    inputs = sample(t, t, b=1, hq=4, h=2, e=64, gates=gates)
    y = power_retention(*inputs)
    assert y.shape == (1, t, 4, 64) and y.dtype == np.float32
    assert_close(y, inputs)


@pytest.mark.parametrize(
    "options",
    [{"degree": 4}, {"normalize": "none"}, {"degree": 4, "normalize": "none"}, {"scale": 0.01}, {"scale": -3.0}, {"scale": 7}],
    ids=str,
)
@pytest.mark.parametrize("t", [65, 301])
def test_cpu_options(t: int, options: dict[str, Any]) -> None:
    inputs = sample(t, t, hq=3, h=1)
    assert_close(power_retention(*inputs, **options), inputs, **options)


@pytest.mark.parametrize(("d", "e"), [(32, 128), (64, 32), (128, 64)])
def test_cpu_dimensions(d: int, e: int) -> None:
    inputs = sample(d, 130, b=1, hq=2, h=1, d=d, e=e)
    assert_close(power_retention(*inputs, chunk=128), inputs)


@pytest.mark.parametrize("chunk", [0, 128, 256, 512, 1024, 2048, 4096])
def test_cpu_does_not_depend_on_the_chunk(chunk: int) -> None:
    inputs = sample(5, 513, b=1, hq=2, h=1)
    assert_close(power_retention(*inputs, chunk=chunk), inputs)


def test_cpu_forgets_at_a_closed_gate() -> None:
    q, k, v, log_g = sample(6, 300, b=1, h=1, hq=1)
    assert log_g is not None
    log_g[0, 200] = -np.inf
    y = power_retention(q, k, v, log_g)
    assert_close(y, (q, k, v, log_g))
    assert np.allclose(y[:, 200], v[:, 200], rtol=1e-5)
    assert np.allclose(y[:, 200:], power_retention(q[:, 200:], k[:, 200:], v[:, 200:], log_g[:, 200:]), rtol=1e-3, atol=1e-5)


def test_cpu_rows_of_zeros() -> None:
    q, k, v, log_g = sample(7, 300, b=1)
    q[:, 5], q[:, 290], k[:, :4], k[:, 100:140] = 0, 0, 0, 0
    y = power_retention(q, k, v, log_g)
    assert_close(y, (q, k, v, log_g))
    assert (y[:, 5] == 0).all() and (y[:, 290] == 0).all() and (y[:, :4] == 0).all()


def test_cpu_strides() -> None:
    q, k, v, log_g = sample(8, 65, b=2, hq=4, h=2)
    assert log_g is not None
    wide = np.full((2, 4, 70, 40), np.nan, np.float32)
    view = wide[:, :, 3:68, 5:37].transpose(0, 2, 1, 3)
    view[...] = q
    reversed_k = np.ascontiguousarray(k[:, ::-1])[:, ::-1]
    columns = np.asfortranarray(v)
    y = power_retention(view, reversed_k, columns, np.asfortranarray(log_g))
    assert (y == power_retention(q, k, v, log_g)).all()


def test_cpu_half_precision_is_rounded_once() -> None:
    inputs = sample(9, 100)
    q, k, v = (x.astype(np.float16) for x in inputs[:3])
    y = power_retention(q, k, v, inputs[3])
    exact = attention_form(q, k, v, inputs[3])
    assert y.dtype == np.float16
    assert np.linalg.norm(y - exact.y) <= 4e-4 * np.linalg.norm(exact.y)  # half an ulp of float16 is 2^-11 = 4.9e-4


@settings(max_examples=25, deadline=None)
@given(
    b=st.integers(0, 3),
    t=st.integers(0, 150),
    group=st.integers(1, 3),
    h=st.integers(1, 3),
    d=st.sampled_from([32, 64]),
    e=st.sampled_from([32, 64]),
    gates=st.sampled_from([None, 1.0, 50.0]),
    degree=st.sampled_from([2, 4]),
    normalize=st.sampled_from(["sum", "none"]),
)
def test_cpu_any_shape(b: int, t: int, group: int, h: int, d: int, e: int, gates: float | None, degree: int, normalize: str) -> None:
    inputs = sample(t, t, b=b, hq=group * h, h=h, d=d, e=e, gates=gates)
    y = power_retention(*inputs, degree=degree, normalize=normalize, chunk=128 if degree == 2 else None)
    assert y.shape == (b, t, group * h, e)
    assert_close(y, inputs, degree=degree, normalize=normalize)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_torch_on_the_cpu(name: str) -> None:
    torch = pytest.importorskip("torch")
    inputs = sample(10, 129)
    q, k, v = (torch.from_numpy(x).to(getattr(torch, name)) for x in inputs[:3])
    y = power_retention(q, k, v, torch.from_numpy(inputs[3]))
    assert isinstance(y, torch.Tensor) and y.dtype == q.dtype and y.device == q.device
    exact = attention_form(*(x.float().numpy() for x in (q, k, v)), inputs[3])
    ulp = {"float32": 1e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}[name]
    assert np.linalg.norm(y.float().numpy() - exact.y) <= ulp * np.linalg.norm(exact.y)
    transposed = power_retention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, torch.from_numpy(inputs[3]))
    assert torch.equal(transposed, y)


def zeros(*shape: int, dtype: Any = np.float16) -> np.ndarray:
    """Of any size: all elements share one."""
    return np.broadcast_to(np.zeros((), dtype), shape)


Q, KV, G = zeros(2, 5, 4, 32), zeros(2, 5, 2, 32), zeros(2, 5, 2, dtype=np.float32)
LONG = 2**26 + 1
# Arguments, the error, and what its message must name: the argument, what came, what is accepted.
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[VidrialError], str]] = {
    "q of rank 3": ((zeros(2, 5, 32), KV, KV), {}, ArgumentError, r"q has shape \[2, 5, 32\]; accepted: \[B, T, HQ, D\]"),
    "k of rank 5": ((Q, zeros(2, 5, 2, 32, 1), KV), {}, ArgumentError, r"k has shape \[2, 5, 2, 32, 1\]; accepted: \[B, T, H, D\]"),
    "v of rank 0": ((Q, KV, zeros()), {}, ArgumentError, r"v has shape \[\]; accepted: \[B, T, H, E\]"),
    "log_g of rank 4": (
        (Q, KV, KV, zeros(2, 5, 2, 1, dtype=np.float32)),
        {},
        ArgumentError,
        r"log_g has shape \[2, 5, 2, 1\]; accepted: \[B, T, H\]",
    ),
    "q is a list": (([1.0], KV, KV), {}, ArgumentTypeError, r"q: .*list is not an array; accepted: torch.Tensor"),
    "log_g is a number": ((Q, KV, KV, 0.5), {}, ArgumentTypeError, r"log_g: .*float is not an array"),
    "q of integers": ((zeros(2, 5, 4, 32, dtype=np.int32), KV, KV), {}, ArgumentTypeError, r"q.*int32.*accepted"),
    "q of float64": ((zeros(2, 5, 4, 32, dtype=np.float64), KV, KV), {}, ArgumentTypeError, r"q.*float64.*accepted"),
    "k of another dtype": ((Q, KV.astype(np.float32), KV), {}, ArgumentTypeError, r"k is float32; accepted: float16"),
    "v of another dtype": ((Q, KV, KV.astype(np.float32)), {}, ArgumentTypeError, r"v is float32; accepted: float16"),
    "log_g of float16": ((Q, KV, KV, G.astype(np.float16)), {}, ArgumentTypeError, r"log_g is float16; accepted: float32"),
    "float32 on the host target": (
        (Q.astype(np.float32), KV, KV),
        {"target": "host"},
        ArgumentTypeError,
        r"dtype float32 is not served; accepted: bfloat16, float16",
    ),
    "k of another length": ((Q, zeros(2, 6, 2, 32), KV), {}, ArgumentError, r"k has shape \[2, 6, 2, 32\].*accepted: \[2, 5, 2, 32\]"),
    "k of another batch": ((Q, zeros(1, 5, 2, 32), KV), {}, ArgumentError, r"k has shape \[1, 5, 2, 32\].*accepted: \[2, 5, 2, 32\]"),
    "k of another D": ((Q, zeros(2, 5, 2, 64), KV), {}, ArgumentError, r"k has shape \[2, 5, 2, 64\].*accepted: \[2, 5, 2, 32\]"),
    "v of other heads": ((Q, KV, zeros(2, 5, 4, 32)), {}, ArgumentError, r"v has shape \[2, 5, 4, 32\].*accepted: \[2, 5, 2, 32\]"),
    "log_g of q's heads": (
        (Q, KV, KV, zeros(2, 5, 4, dtype=np.float32)),
        {},
        ArgumentError,
        r"log_g has shape \[2, 5, 4\].*accepted: \[2, 5, 2\]",
    ),
    "heads do not divide": ((zeros(2, 5, 3, 32), KV, KV), {}, ArgumentError, r"q has 3 heads and k has 2; accepted: a multiple"),
    "no heads": ((zeros(2, 5, 3, 32), zeros(2, 5, 0, 32), zeros(2, 5, 0, 32)), {}, ArgumentError, r"q has 3 heads and k has 0"),
    "D": ((zeros(1, 5, 1, 48), zeros(1, 5, 1, 48), zeros(1, 5, 1, 32)), {}, UnsupportedError, r"D=48 is not served; accepted: 32, 64, 128"),
    "E": (
        (zeros(1, 5, 1, 32), zeros(1, 5, 1, 32), zeros(1, 5, 1, 256)),
        {},
        UnsupportedError,
        r"E=256 is not served; accepted: 32, 64, 128",
    ),
    "too many elements": ((zeros(1, LONG, 1, 32),) * 3, {}, UnsupportedError, rf"q has {LONG * 32} elements; accepted: at most 2\^31"),
    "too many heads": ((zeros(300, 1, 300, 32),) * 3, {}, UnsupportedError, r"q has B x HQ = 90000 heads; accepted: at most 65535"),
    "odd degree": ((Q, KV, KV), {"degree": 3}, UnsupportedError, r"degree=3: an odd power's weights change sign.*accepted: 2, 4"),
    "degree 6": ((Q, KV, KV), {"degree": 6}, UnsupportedError, r"degree=6: no other degree has a kernel; accepted: 2, 4"),
    "degree 2.0": ((Q, KV, KV), {"degree": 2.0}, UnsupportedError, r"degree=2.0: .*accepted: 2, 4"),
    "normalize": ((Q, KV, KV), {"normalize": "layer"}, ArgumentError, r"normalize='layer' is not known; accepted: 'sum', 'none'"),
    "normalize is a list": ((Q, KV, KV), {"normalize": ["sum"]}, ArgumentError, r"normalize=\['sum'\] is not known"),
    "chunk": ((Q, KV, KV), {"chunk": 100}, ArgumentError, r"chunk=100 is not served; accepted: None, 0, 128, 256, 512, 1024, 2048, 4096"),
    "chunk is a word": ((Q, KV, KV), {"chunk": "128"}, ArgumentError, r"chunk='128' is not served"),
    "chunk with degree 4": ((Q, KV, KV), {"chunk": 128, "degree": 4}, UnsupportedError, r"chunk=128 with degree=4: .*use chunk=None or 0"),
    "scale is NaN": ((Q, KV, KV), {"scale": float("nan")}, ArgumentError, r"scale=nan is not served; accepted: None, or a number"),
    "scale is huge": ((Q, KV, KV), {"scale": 1e200}, ArgumentError, r"scale=1e\+200 is not served"),
    "scale is no float": ((Q, KV, KV), {"scale": 10**400}, ArgumentError, r"scale=10+ is not served"),
    "scale is an array": ((Q, KV, KV), {"scale": np.ones(3)}, ArgumentError, r"scale=array.* is not served"),
    "target": ((Q, KV, KV), {"target": "tpu"}, ArgumentError, r"target 'tpu' is not known; accepted: cuda, host"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_before_anything_runs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(*_: Any, **__: Any) -> None:
        raise RuntimeError("it ran")

    arguments, options, error, message = BAD[case]
    for runner in ("gradient.power_retention_cpu", "gradient.apply", "run", "request.CachedPlan.plan"):
        monkeypatch.setattr(f"vidrial.kernels.power_retention.{runner}", ran)
    with pytest.raises(error, match=message):
        power_retention(*arguments, **options)


def test_mixed_libraries() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(
        ArgumentTypeError, match=r"k is a torch array on the CPU, q a numpy array on the CPU; accepted: one library and one device"
    ):
        power_retention(Q, torch.zeros(2, 5, 2, 32, dtype=torch.float16), KV)


def test_the_largest_sizes_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidrial.kernels.power_retention.gradient.plain", lambda inputs, _: inputs[0].shape)
    assert power_retention(*(zeros(1, LONG - 1, 1, 32),) * 3) == (1, 2**26, 1, 32)
    assert power_retention(*(zeros(65535, 1, 1, 32),) * 3, scale=np.float32(0.5), degree=np.int64(2)) == (65535, 1, 1, 32)


@pytest.mark.parametrize("dtype", [DType.bfloat16, DType.float16])
def test_rounding_to_16_bits(dtype: DType) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):  # signalling NaN
        values = dtype.widen(bits if dtype is DType.bfloat16 else bits.view(np.float16))
    finite = np.isfinite(values)
    again = dtype.round(values[finite].astype(np.float32)).view(np.uint16)
    assert (again == bits[finite]).all()
    ordered = np.sort(values[finite & (values > 0)])
    middle = (ordered[:-1] + ordered[1:]) / 2
    below = dtype.widen(dtype.round(np.nextafter(middle.astype(np.float32), np.float32(0))))
    exact = middle.astype(np.float32) == middle
    assert (below[exact] == ordered[:-1][exact]).all() and exact.sum() > 30_000


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


def isolated(program: str, *blocked: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(blocked=set(blocked)) + program], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_without_cupy_nvrtc_headers_and_gpu() -> None:
    program = """
import vidrial
from vidrial.kernels.power_retention import power_retention
import numpy as np
x = np.ones((1, 3, 1, 32), np.float32)
print(power_retention(x, x, x).sum())
try:
    vidrial.Device.current()
except vidrial.VidrialError as error:
    print(type(error).__name__, "pip install cupy" in str(error))
"""
    assert isolated(program, "cupy", "cupy_backends", "cuda", "nvidia", "torch", "jax").splitlines() == ["96.0", "ToolchainError True"]


def test_import_alone_needs_nothing() -> None:
    program = "import vidrial; print(vidrial.__version__, vidrial.choice(3, 4).default)"
    assert isolated(program, "cupy", "numpy", "jinja2", "pycute", "rich", "click").split()[1:] == ["3"]


@pytest.mark.parametrize(("degree", "largest"), [(2, 1e9), (4, 10**4.5)])
def test_the_largest_scale(degree: int, largest: float) -> None:
    """What a sum of weights times scale^degree must stay within: beyond it the normaliser was infinite, and y silently 0."""
    q, k, v, _ = sample(0, 65, b=1)
    options: dict[str, Any] = {"degree": degree, "scale": largest}
    assert_close(power_retention(q, k, v, **options), (q, k, v, None), **options)
    with pytest.raises(ArgumentError, match=r"scale=.*accepted: None, or a number of at most (1e\+09|31622\.8) in magnitude"):
        power_retention(q, k, v, degree=degree, scale=1.001 * largest)
