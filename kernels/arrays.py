"""Arrays of an op's example and of its sample, which the kernels' ops share: strides of contiguous ones, normal values."""

from __future__ import annotations

import math

import numpy as np

from vidrial import DType

# Elements of an array that are drawn: to draw a gigabyte takes longer than to sweep it.
DRAWN = 2**24


def strides(t: int, h: int, d: int) -> tuple[int, int, int]:
    """Strides in elements of a contiguous [b, t, h, d] array, all but the last axis."""
    return t * h * d, h * d, d


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> np.ndarray:
    """Standard normal values, rounded to `dtype`; beyond DRAWN elements they repeat."""
    return np.resize(dtype.round(rng.standard_normal(min(DRAWN, math.prod(shape)), np.float32)), shape)
