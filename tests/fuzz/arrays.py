"""The arguments of a case: their values, and arrays of every kind that hold them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vidrial.dtypes import DType

from .cases import Case

# Elements before and behind what an argument may read: NaN.
MARGIN = 64
# Where a value is planted among a token's features.
COLUMN = 3
WORDS = {DType.bfloat16: np.dtype(np.uint16), DType.float16: np.dtype(np.float16), DType.float32: np.dtype(np.float32)}
ORDERS = {"transposed": (0, 2, 1, 3), "last axis first": (0, 3, 1, 2)}


class Subclass(np.ndarray):
    """A NumPy array by another name."""


@dataclass
class Made:
    """`values`: what each argument holds, exact, float64. `arrays`: what is passed. `memory`: the bytes behind them, and as they were."""

    values: dict[str, np.ndarray] = field(default_factory=dict)
    arrays: dict[str, Any] = field(default_factory=dict)
    memory: list[tuple[np.ndarray, bytes]] = field(default_factory=list)

    def altered(self) -> bool:
        """Whether anything that was passed, or lies beside it, is another one now."""
        return any(now.tobytes() != before for now, before in self.memory)


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Of the arguments, and of dy."""
    hq = case.h * case.group
    if case.op == "power_retention":
        return {
            "q": (case.b, case.t, hq, case.d),
            "k": (case.b, case.t, case.h, case.d),
            "v": (case.b, case.t, case.h, case.e),
            "log_g": (case.b, case.t, case.h),
            "dy": (case.b, case.t, hq, case.e),
        }
    if case.op == "flash_attention":
        return {"q": (case.b, case.tq, hq, case.d), "k": (case.b, case.t, case.h, case.d), "v": (case.b, case.t, case.h, case.e)}
    if case.op == "gemm":
        return {"a": (case.t, case.d), "b": (case.tq, case.d), "bias": (case.tq,)}
    return {"x": (case.tq, case.t)}


def make(case: Case) -> Made:
    """The arguments, dy among them if a gradient is asked for; of an initial state the tokens before it belong to the values alone."""
    rng, made, found = np.random.default_rng(case.seed), Made(), shapes(case)
    names = (*case.names, "dy") if case.gradient else case.names
    # What has one axis alone is not expanded.
    lie = {name: layout for name, layout in case.layouts if layout != "expanded" or len(found[name]) > 1}
    for name in names:
        dtype = DType.float32 if name == "log_g" else DType.of(case.dtype)
        x = gates(case, rng, found[name]) if name == "log_g" else _drawn(case.values, rng, found[name], name)
        for argument, b, token, head, value in case.planted:
            if argument == name:
                x[(b, token, head, COLUMN) if x.ndim == 4 else (token % x.shape[0], head % x.shape[1])] = value
        if lie.get(name) == "expanded":
            x[:] = x[:1]
        made.values[name] = dtype.widen(dtype.round(x.astype(np.float32)))
    fused = [name for name in names if lie.get(name) == "fused"]
    if len(fused) == 3 and len({found[name][:2] for name in fused}) == 1:
        _fuse(made, case, fused)
    for name in names:
        if name not in made.arrays:
            dtype = DType.float32 if name == "log_g" else DType.of(case.dtype)
            _lay(made, name, dtype, lie.get(name, "contiguous"), case.library)
    if case.split:
        made.arrays = {name: x[:, case.split :] for name, x in made.arrays.items()}
    return made


def _drawn(kind: str, rng: np.random.Generator, shape: tuple[int, ...], name: str) -> np.ndarray:
    x = rng.standard_normal(shape)
    if kind == "integers" and name != "dy":
        return np.round(x * 2)
    if kind == "large" and name in ("q", "x"):
        return 6 * x
    if kind == "zeros" and name in ("q", "k") and len(shape) > 1:
        x[:, rng.random(shape[1]) < 0.3] = 0
    return x


def gates(case: Case, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """log_g of every kind."""
    shift = 0.0 if case.gates == "short" else 4.0
    log_g = -np.log1p(np.exp(-rng.standard_normal(shape) - shift))
    some = rng.random(shape) < 0.02
    values = {
        "closed": (-60.0, -100.0),
        "minus infinity": (-np.inf,),
        "positive": (0.5, np.inf),
        "mixed": (-60.0, 0.0, -np.inf, 1e-30, -59.9),
    }
    if case.gates == "zero":
        return np.zeros(shape)
    for value in values.get(case.gates, ()):
        log_g[some & (rng.random(shape) < 0.6)] = value
    if case.gates == "nan" and log_g.size:
        log_g[int(rng.integers(shape[0])), int(rng.integers(shape[1])), int(rng.integers(shape[2]))] = np.nan
    return log_g


def _fuse(made: Made, case: Case, names: list[str]) -> None:
    """One array [B, T, all features], of which the arguments are views."""
    dtype = DType.of(case.dtype)
    b, t = made.values[names[0]].shape[:2]
    widths = [int(np.prod(made.values[name].shape[2:])) for name in names]
    whole = np.concatenate([made.values[name].reshape(b, t, width) for name, width in zip(names, widths, strict=True)], -1)
    memory = np.ascontiguousarray(dtype.round(whole.astype(np.float32)))
    made.memory.append((memory, memory.tobytes()))
    owner = _as_library(memory, dtype, case.library)
    first = 0
    for name, width in zip(names, widths, strict=True):
        made.arrays[name] = owner[:, :, first : first + width].reshape(made.values[name].shape)
        first += width


def _lay(made: Made, name: str, dtype: DType, layout: str, library: str) -> None:
    """An argument as its layout says."""
    words = dtype.round(made.values[name].astype(np.float32))
    kind = WORDS[dtype]
    if layout in ("swapped", "packed", "subclass"):
        if layout == "packed":
            records = np.zeros(words.shape, np.dtype([("before", "u1"), ("x", kind)]))
            records["x"] = words
            memory, x = records, records["x"]
        else:
            memory = words.astype(kind.newbyteorder("S")) if layout == "swapped" else words.copy()
            x = memory if layout == "swapped" else memory.view(Subclass)
        made.arrays[name] = x
        made.memory.append((memory, memory.tobytes()))
        return
    size, offset, strides = _strides(layout, words.shape)
    memory = np.full(size + 2 * MARGIN, np.uint64(2**64 - 1).astype(f"u{kind.itemsize}"), f"u{kind.itemsize}").view(kind)
    view = np.ndarray(words.shape, kind, memory, (offset + MARGIN) * kind.itemsize, [s * kind.itemsize for s in strides])
    if layout == "expanded":
        view[:1] = words[:1]
    else:
        view[...] = words
    made.memory.append((memory, memory.tobytes()))
    if library == "torch":
        made.arrays[name] = _as_library(memory, dtype, library).as_strided(words.shape, strides, offset + MARGIN)
        return
    if layout == "read-only":
        view.flags.writeable = False
    made.arrays[name] = view


def _as_library(memory: np.ndarray, dtype: DType, library: str) -> Any:
    if library == "numpy":
        return memory
    import torch

    return torch.from_numpy(memory.view(np.uint16)).view(torch.bfloat16) if dtype is DType.bfloat16 else torch.from_numpy(memory)


def _strides(layout: str, shape: tuple[int, ...]) -> tuple[int, int, list[int]]:
    """Elements that an array takes, the first one's place, and its strides in elements."""
    room, order = list(shape), list(range(len(shape)))
    if layout in ("padded", "aligned rows"):
        room[-1] += 3 if layout == "padded" else 8
    if layout == "strided":
        room[min(1, len(room) - 1)] *= 2
    if layout in ORDERS:
        order = [axis for axis in ORDERS[layout] if axis < len(shape)]
        order = order[::-1] if len(shape) == 2 else order
    strides, count = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = count
        count *= max(room[axis], 1)
    if layout == "strided":
        strides[min(1, len(room) - 1)] *= 2
        count *= 2
    if layout == "expanded":
        strides[0] = 0
    offset = 1 if layout == "offset" else 0
    if layout == "negative" and shape[0]:
        axis = min(1, len(shape) - 1)
        offset, strides[axis] = max(shape[axis] - 1, 0) * strides[axis], -strides[axis]
    return count + 1, offset, strides
