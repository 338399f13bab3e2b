"""Power retention in float64 NumPy, clear rather than fast: what the kernels are compared with.

    weight(i, j) = (scale q_i . k_j)^degree exp(a_i - a_j),  j <= i,   a = inclusive cumsum(log_g)
    y_i = sum_j weight(i, j) v_j / sum_j weight(i, j)        ("sum"; the plain sum for "none")

Shapes: q [B, T, HQ, D], k [B, T, H, D], v [B, T, H, E], log_g [B, T, H] or None; query head h reads key head h // (HQ / H).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Float = TypeVar("Float", Float64, NDArray[np.float32])

LOWEST_LOG_GATE = -60.0  # exp(-60): gates below are clamped, as those above 0 are
LOWEST_NORMALISER = 1e-20
ROWS = 256  # query rows at a time: memory stays O(T)


class Reference(NamedTuple):
    """y [B, T, HQ, E]; conditioning [B, T, HQ], by which an element's error is multiplied.

    The state form sums terms of size bound_ij = (scale |q_i| |k_j|)^degree decay_ij. With a normaliser they cancel down to norm_i, so the
    error of y_i that rounding explains is u * sum_j bound_ij / norm_i: the conditioning is norm_i / sum_j bound_ij. Without one, y_i itself
    is the sum, of terms whose rounding errors are independent: u * (sum_j bound_ij^2)^(1/2), of which the conditioning is the inverse. (The
    plain sum grows with the number of tokens, y_i with its root: beyond a few hundred tokens any y_i at all would pass.)
    """

    y: Float64
    conditioning: Float64


def _heads(q: Float64, k: Float64, v: Float64, log_g: Float64 | None) -> Iterator[tuple[int, int, Float64, Float64, Float64, Float64]]:
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            gates = np.zeros(k.shape[1]) if log_g is None else np.clip(log_g[b, :, h // group].astype(np.float64), LOWEST_LOG_GATE, 0.0)
            yield b, h, q[b, :, h], k[b, :, h // group], v[b, :, h // group], gates


def causal_product(weights: Float, values: Float, causal: NDArray[np.bool_]) -> Float:
    """weights [..., rows, keys] @ values [..., keys, e], where weights are 0 but for `causal` [rows, keys]: a value that is not finite
    reaches only the rows that see it, though 0 times NaN is NaN."""
    finite = np.isfinite(values)
    if finite.all():
        return weights @ values
    hidden = ~causal.all(0)  # keys that some row does not see
    keys = np.flatnonzero(hidden & ~finite.all(-1).reshape(-1, weights.shape[-1]).all(0))
    seen = values.copy()
    seen[..., keys, :] = np.where(finite[..., keys, :], values[..., keys, :], 0)
    product: Float = weights @ seen
    for key in keys:
        rows, value = causal[:, key], values[..., key, None, :]
        product[..., rows, :] += np.where(np.isfinite(value), 0, weights[..., rows, key, None] * value)
    return product


def attention_form(
    q: Float64, k: Float64, v: Float64, log_g: Float64 | None = None, *, degree: int = 2, scale: float | None = None, normalize: str = "sum"
) -> Reference:
    """The O(T^2) form, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    length = q.shape[1]
    y, conditioning = np.zeros((*q.shape[:3], v.shape[-1])), np.ones(q.shape[:3])
    for b, h, qh, kh, vh, gates in _heads(q, k, v, log_g):
        a, key_norms = np.cumsum(gates), np.linalg.norm(kh, axis=1)
        for m in range(0, length, ROWS):
            rows, keys = slice(m, min(m + ROWS, length)), slice(0, min(m + ROWS, length))
            gap = a[rows, None] - a[None, keys]
            causal = np.arange(length)[rows, None] >= np.arange(length)[None, keys]
            decay = np.exp(np.where(causal, gap, -np.inf))
            weight = np.where(causal, (scale * qh[rows] @ kh[keys].T) ** degree * decay, 0.0)
            bound = np.where(causal, (np.abs(scale) * np.linalg.norm(qh[rows], axis=1)[:, None] * key_norms[keys]) ** degree * decay, 0.0)
            norm = weight.sum(1)
            y[b, rows, h] = causal_product(weight, vh[keys], causal) / (
                np.maximum(norm, LOWEST_NORMALISER)[:, None] if normalize == "sum" else 1.0
            )
            size = np.linalg.norm(bound, axis=1) if normalize == "none" else bound.sum(1)
            conditioning[b, rows, h] = (norm if normalize == "sum" else 1.0) / np.maximum(size, 1e-300)
    return Reference(y, conditioning)


def recurrent_form(
    q: Float64, k: Float64, v: Float64, log_g: Float64 | None = None, *, scale: float | None = None, normalize: str = "sum"
) -> Float64:
    """Degree 2, one token at a time: S <- g S + (k k^T) v^T, in float64. A second, independent evaluation."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    y = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, h, qh, kh, vh, gates in _heads(q, k, v, log_g):
        state, norm = np.zeros((qh.shape[1], qh.shape[1], vh.shape[1])), np.zeros((qh.shape[1], qh.shape[1]))
        for t, gate in enumerate(np.exp(gates)):
            outer = np.outer(kh[t], kh[t])
            state, norm = gate * state + outer[..., None] * vh[t], gate * norm + outer
            weights = scale**2 * np.outer(qh[t], qh[t])
            total = max((weights * norm).sum(), LOWEST_NORMALISER) if normalize == "sum" else 1.0
            y[b, t, h] = np.tensordot(weights, state, 2) / total
    return y
