"""Flash attention in float64 NumPy, clear rather than fast: what the kernels are compared with.

    score(i, j) = scale q_i . k_j,  or softcap tanh(scale q_i . k_j / softcap)
    y_i = sum_j exp(score(i, j) - lse_i) v_j,    lse_i = log sum_j exp(score(i, j)),    over the keys j that row i sees

Row i stands at key i + Tk - Tq: causal, it sees keys up to its own; of a window, from `left` keys before to `right` after its own.
Shapes: q [B, Tq, HQ, D], k [B, Tk, H, D], v [B, Tk, H, E]; query head h reads key head h // (HQ / H).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vidrial.kernels.masked import masked_product

Float64 = NDArray[np.float64]

ROWS = 256  # query rows at a time: memory stays O(T)


class Reference(NamedTuple):
    """y [B, Tq, HQ, E]; lse [B, HQ, Tq]; spread [B, Tq, HQ, E]: sum_j weight |v_j|, what weights' rounding can change of y; reach
    [B, HQ, Tq]: the largest scale |q_i| |k_j|, what rounding can change of the scores."""

    y: Float64
    lse: Float64
    spread: Float64
    reach: Float64


def visible(rows: NDArray[np.intp], keys: NDArray[np.intp], offset: int, causal: bool, window: tuple[int, int]) -> NDArray[np.bool_]:
    """Which rows see which keys, [rows, keys]; `offset` = Tk - Tq; a side of the window below 0 has no limit."""
    distance = keys[None, :] - rows[:, None] - offset
    seen = np.ones(distance.shape, bool)
    if causal:
        seen &= distance <= 0
    if window[0] >= 0:
        seen &= distance >= -window[0]
    if window[1] >= 0:
        seen &= distance <= window[1]
    return seen


def attention(
    q: Float64,
    k: Float64,
    v: Float64,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float | None = None,
) -> Reference:
    """Attention in float64; a side of the window below 0 has no limit, rows that see no key give 0 and lse -inf."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (b, tq, hq, d), (tk, h, e) = q.shape, v.shape[1:]
    scale = d**-0.5 if scale is None else scale
    y, spread, lse, reach = np.zeros((b, tq, hq, e)), np.zeros((b, tq, hq, e)), np.full((b, hq, tq), -np.inf), np.zeros((b, hq, tq))
    for batch, head in np.ndindex(b, hq):
        keys, values = k[batch, :, head // (hq // h)], v[batch, :, head // (hq // h)]
        for first in range(0, tq, ROWS):
            rows = np.arange(first, min(first + ROWS, tq))
            scores = scale * q[batch, rows, head] @ keys.T
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            seen = visible(rows, np.arange(tk), tk - tq, causal, window)
            scores = np.where(seen, scores, -np.inf)
            largest = scores.max(1, initial=-np.inf)
            weights = np.exp(scores - np.where(largest == -np.inf, 0.0, largest)[:, None])
            total = weights.sum(1)
            weights /= np.where(total == 0.0, 1.0, total)[:, None]
            y[batch, rows, head] = masked_product(weights, values, seen)
            spread[batch, rows, head] = masked_product(weights, np.abs(values), seen)
            with np.errstate(divide="ignore"):
                lse[batch, head, rows] = largest + np.log(total)
            reach[batch, head, rows] = scale * np.linalg.norm(q[batch, rows, head], axis=1) * np.linalg.norm(keys, axis=1).max(initial=0.0)
    return Reference(y, lse, spread, reach)
