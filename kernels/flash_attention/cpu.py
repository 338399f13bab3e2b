"""Flash attention on the CPU: blocks of rows and keys, float32, NumPy's matrix products. What NumPy arrays and CPU tensors run."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vidrial.kernels.flash_attention.problem import Problem
from vidrial.kernels.flash_attention.reference import visible
from vidrial.kernels.masked import masked_product

Float32 = NDArray[np.float32]

ROWS, KEYS = 128, 512


def flash_attention_cpu(p: Problem, q: Float32, k: Float32, v: Float32) -> tuple[Float32, Float32]:
    """q [B, Tq, HQ, D], k [B, Tk, H, D], v [B, Tk, H, E], all float32 -> y [B, Tq, HQ, E], lse [B, HQ, Tq], float32."""
    # [B, H, G, T, .]: the queries of a group share keys and values.
    qs = np.ascontiguousarray(q.reshape(p.b, p.tq, p.h, p.group, p.d).transpose(0, 2, 3, 1, 4)) * np.float32(p.scale)
    ks, vs = (np.ascontiguousarray(x.transpose(0, 2, 1, 3))[:, :, None] for x in (k, v))
    y, lse = np.empty((p.b, p.h, p.group, p.tq, p.e), np.float32), np.empty((p.b, p.h, p.group, p.tq), np.float32)
    for first in range(0, p.tq, ROWS):
        rows = slice(first, min(first + ROWS, p.tq))
        y[..., rows, :], lse[..., rows] = _rows(p, qs[..., rows, :], ks, vs, rows)
    # NOTE: a transpose that moves nothing but axes of one element is reshaped without a copy, and keeps strange strides.
    heads_last = np.ascontiguousarray(y.transpose(0, 3, 1, 2, 4))
    return heads_last.reshape(p.b, p.tq, p.hq, p.e), lse.reshape(p.b, p.hq, p.tq)


def _rows(p: Problem, q: Float32, k: Float32, v: Float32, rows: slice) -> tuple[Float32, Float32]:
    """Outputs and lse of some rows: block after block of the keys that one of them sees."""
    offset, index = p.tk - p.tq, np.arange(rows.start, rows.stop)
    begin = max(rows.start + offset - p.left, 0) if p.left >= 0 else 0
    right = 0 if p.causal else p.right
    end = min(rows.stop + offset + right, p.tk) if right >= 0 else p.tk
    y: Float32 = np.zeros((*q.shape[:-1], p.e), np.float32)
    total: Float32 = np.zeros(q.shape[:-1], np.float32)
    largest: Float32 = np.full(q.shape[:-1], -np.inf, np.float32)
    for first in range(begin, end, KEYS):
        keys = slice(first, min(first + KEYS, end))
        scores = q @ k[..., keys, :].swapaxes(-1, -2)
        if p.capped:
            scores = np.float32(p.softcap) * np.tanh(scores / np.float32(p.softcap))
        seen = visible(index, np.arange(first, keys.stop), offset, p.causal, (p.left, p.right))
        scores = np.where(seen, scores, np.float32(-np.inf))
        before, largest = largest, np.maximum(largest, scores.max(-1))
        reference = np.where(largest == -np.inf, np.float32(0), largest)
        weights, kept = np.exp(scores - reference[..., None]), np.exp(before - reference)
        y, total = y * kept[..., None] + masked_product(weights, v[..., keys, :], seen), total * kept + weights.sum(-1)
    with np.errstate(divide="ignore"):
        lse: Float32 = largest + np.log(total)
    y /= np.where(total == 0, np.float32(1), total)[..., None]
    return y, lse
