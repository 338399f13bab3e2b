"""Power retention on the CPU: chunked, float32, NumPy's matrix products. What NumPy arrays and CPU tensors run."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vidrial.kernels.power_retention.reference import LOWEST_LOG_GATE, LOWEST_NORMALISER, causal_product

Float32 = NDArray[np.float32]

CHUNK = 256


def _phi_indices(d: int) -> tuple[NDArray[np.intp], NDArray[np.intp], Float32]:
    """Pairs (i <= j) of features, and how often each counts in (q . k)^2."""
    i, j = np.triu_indices(d)
    return i, j, np.where(i == j, 1.0, 2.0).astype(np.float32)


def power_retention_cpu(
    q: Float32, k: Float32, v: Float32, log_g: Float32 | None, *, degree: int, scale: float, normalize: str, chunk: int | None
) -> Float32:
    """q [B, T, HQ, D], k [B, T, H, D], v [B, T, H, E], log_g [B, T, H] or None, all float32 -> y [B, T, HQ, E] float32.

    Degree 2 carries a state of D (D + 1) / 2 x E from chunk to chunk (linear in T); other degrees take every earlier key (quadratic).
    """
    (b, t, hq, d), (h, e) = q.shape, v.shape[2:]
    group, size = hq // h, chunk or CHUNK
    # [B, H, G, T, .]: the queries of a group share keys, values and state.
    qs = np.ascontiguousarray(q.reshape(b, t, h, group, d).transpose(0, 2, 3, 1, 4))
    ks, vs = (np.ascontiguousarray(x.transpose(0, 2, 1, 3))[:, :, None] for x in (k, v))
    gates = np.zeros((b, h, t)) if log_g is None else np.clip(log_g, LOWEST_LOG_GATE, 0).transpose(0, 2, 1).astype(np.float64)
    y = np.empty((b, h, group, t, e), np.float32)
    i, j, multiplicity = _phi_indices(d)
    stateful = degree == 2 and t > size
    state = np.zeros((b, h, 1, len(i) if stateful else 0, e + 1), np.float32)  # the last column is the normaliser's
    for begin in range(0, t, size):
        rows = slice(begin, min(begin + size, t))
        keys = rows if degree == 2 else slice(0, rows.stop)
        a = np.cumsum(gates[..., keys], -1)[:, :, None]
        tail = a[..., keys.stop - keys.start - (rows.stop - rows.start) :]
        gap = tail[..., :, None] - a[..., None, :]
        causal = np.arange(rows.start, rows.stop)[:, None] >= np.arange(keys.start, keys.stop)
        weight = (qs[..., rows, :] @ ks[..., keys, :].swapaxes(-1, -2)) ** degree
        weight = np.where(causal, weight * np.exp(np.where(causal, gap, -np.inf)).astype(np.float32), np.float32(0))
        num, norm = causal_product(weight, vs[..., keys, :], causal), weight.sum(-1)
        if stateful and begin:
            qc = qs[..., rows, :]
            from_state = (qc[..., i] * qc[..., j] * multiplicity) @ state * np.exp(a)[..., None].astype(np.float32)
            num, norm = num + from_state[..., :e], norm + from_state[..., e]
        if stateful and rows.stop < t:
            kc = ks[..., rows, :]
            values = np.concatenate([vs[..., rows, :], np.ones((b, h, 1, rows.stop - rows.start, 1), np.float32)], -1)
            values *= np.exp(a[..., -1:] - a)[..., None].astype(np.float32)
            state = state * np.exp(a[..., -1])[..., None, None].astype(np.float32) + (kc[..., i] * kc[..., j]).swapaxes(-1, -2) @ values
        factor = np.float32(scale**degree)
        y[..., rows, :] = (
            num * (factor / np.maximum(norm * factor, np.float32(LOWEST_NORMALISER)))[..., None] if normalize == "sum" else num * factor
        )
    return np.ascontiguousarray(y.transpose(0, 3, 1, 2, 4)).reshape(b, t, hq, e)
