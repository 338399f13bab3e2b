"""Sums of values under a mask, in NumPy: what a row does not see changes nothing of it, not even a NaN."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Float = TypeVar("Float", NDArray[np.float64], NDArray[np.float32])


def masked_product(weights: Float, values: Float, seen: NDArray[np.bool_]) -> Float:
    """weights [..., rows, keys] @ values [..., keys, e], where weights are 0 but for `seen` [rows, keys]: a value that is not finite
    reaches only the rows that see it, though 0 times NaN is NaN."""
    finite = np.isfinite(values)
    if finite.all():
        return weights @ values
    hidden = ~seen.all(0)  # keys that some row does not see
    keys = np.flatnonzero(hidden & ~finite.all(-1).reshape(-1, weights.shape[-1]).all(0))
    kept = values.copy()
    kept[..., keys, :] = np.where(finite[..., keys, :], values[..., keys, :], 0)
    product: Float = weights @ kept
    for key in keys:
        rows, value = seen[:, key], values[..., key, None, :]
        product[..., rows, :] += np.where(np.isfinite(value), 0, weights[..., rows, key, None] * value)
    return product
