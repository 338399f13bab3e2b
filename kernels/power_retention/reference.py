"""Power retention in float64 NumPy, clear rather than fast: what the kernels are compared with.

    weight(i, j) = (scale q_i . k_j)^degree exp(a_i - a_j),  j <= i,   a = inclusive cumsum(log_g)
    y_i = sum_j weight(i, j) v_j / sum_j weight(i, j)        ("sum"; the plain sum for "none")

Shapes: q [B, T, HQ, D], k [B, T, H, D], v [B, T, H, E], log_g [B, T, H] or None; query head h reads key head h // (HQ / H).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vidrial.kernels.masked import masked_product

Float64 = NDArray[np.float64]

LOWEST_LOG_GATE = -60.0  # exp(-60): gates below are clamped, as those above 0 are
LOWEST_NORMALISER = 1e-20
ROWS = 256  # query rows at a time: memory stays O(T)


class Reference(NamedTuple):
    """y [B, T, HQ, E]; conditioning [B, T, HQ], by which an element's error is multiplied; norm [B, T, HQ], the sum of the weights.

    The state form sums terms of size bound_ij = (scale |q_i| |k_j|)^degree decay_ij. With a normaliser they cancel down to norm_i, so the
    error of y_i that rounding explains is u * sum_j bound_ij / norm_i: the conditioning is norm_i / sum_j bound_ij. Without one, y_i itself
    is the sum, of terms whose rounding errors are independent: u * (sum_j bound_ij^2)^(1/2), of which the conditioning is the inverse. (The
    plain sum grows with the number of tokens, y_i with its root: beyond a few hundred tokens any y_i at all would pass.)
    """

    y: Float64
    conditioning: Float64
    norm: Float64


def _heads(q: Float64, k: Float64, v: Float64, log_g: Float64 | None) -> Iterator[tuple[int, int, Float64, Float64, Float64, Float64]]:
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            gates = np.zeros(k.shape[1]) if log_g is None else np.clip(log_g[b, :, h // group].astype(np.float64), LOWEST_LOG_GATE, 0.0)
            yield b, h, q[b, :, h], k[b, :, h // group], v[b, :, h // group], gates


def _row_blocks(length: int) -> Iterator[tuple[slice, slice, NDArray[np.bool_]]]:
    """Query rows, ROWS at a time; the keys up to the last of them; and which of these each row sees, [rows, keys]."""
    positions = np.arange(length)
    for first in range(0, length, ROWS):
        rows, keys = slice(first, min(first + ROWS, length)), slice(0, min(first + ROWS, length))
        yield rows, keys, positions[rows, None] >= positions[None, keys]


def attention_form(
    q: Float64,
    k: Float64,
    v: Float64,
    log_g: Float64 | None = None,
    *,
    degree: int = 2,
    scale: float | None = None,
    normalize: str = "sum",
    initial: tuple[Float64, Float64] | None = None,
) -> Reference:
    """The O(T^2) form, in float64; `initial`: the state (S, Z) before the first token (degree 2), as `gradients` has it."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (ia, ib, count), group = pair_rows(q.shape[-1]), q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    y, conditioning, norms = np.zeros((*q.shape[:3], v.shape[-1])), np.ones(q.shape[:3]), np.zeros(q.shape[:3])
    for b, h, qh, kh, vh, gates in _heads(q, k, v, log_g):
        a, key_norms = np.cumsum(gates), np.linalg.norm(kh, axis=1)
        for rows, keys, causal in _row_blocks(q.shape[1]):
            decay = np.exp(np.where(causal, a[rows, None] - a[None, keys], -np.inf))
            weight = np.where(causal, (scale * qh[rows] @ kh[keys].T) ** degree * decay, 0.0)
            bound = np.where(causal, (np.abs(scale) * np.linalg.norm(qh[rows], axis=1)[:, None] * key_norms[keys]) ** degree * decay, 0.0)
            norm, product = weight.sum(1), masked_product(weight, vh[keys], causal)
            if initial is not None:
                s, z, x, from_start = initial[0][b, h // group], initial[1][b, h // group], qh[rows], scale**2 * np.exp(a[rows])
                product = product + from_start[:, None] * ((count * x[:, ia] * x[:, ib]) @ s)
                norm = norm + from_start * np.einsum("ta,ab,tb->t", x, z, x)
                # The keys that made Z have so much of the norm squared: they count as one term.
                bound = np.concatenate([bound, (from_start * (x**2).sum(1) * np.trace(z))[:, None]], 1)
            norms[b, rows, h] = norm
            y[b, rows, h] = product / (np.maximum(norm, LOWEST_NORMALISER)[:, None] if normalize == "sum" else 1.0)
            size = np.linalg.norm(bound, axis=1) if normalize == "none" else bound.sum(1)
            conditioning[b, rows, h] = (norm if normalize == "sum" else 1.0) / np.maximum(size, 1e-300)
    return Reference(y, conditioning, norms)


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


class Gradients(NamedTuple):
    """Of the sum of y * dy, plus that of the final state times its gradient: the shapes of q, k, v, log_g, S and Z; None where there is none.

    A score's gradient is a difference of dy . v and dy . y, which may cancel, as of a token that sees itself alone. So that errors can be judged
    there are the sizes of what is subtracted, with independent signs: of a row of dq [B, T, HQ], of dk and of a token's gates [B, T, H].
    """

    dq: Float64
    dk: Float64
    dv: Float64
    dlog_g: Float64 | None
    q_terms: Float64
    k_terms: Float64
    g_terms: Float64
    d_s: Float64 | None = None
    d_z: Float64 | None = None


def pair_rows(d: int) -> tuple[NDArray[np.intp], NDArray[np.intp], Float64]:
    """Of each row of the state's S the two features that it is the product of, and how often it counts in (q . k)^2: blocks I <= J of 8
    features, lexicographic, within a pair of them row-major; 1 where I = J, else 2."""
    blocks = [(i, j) for i in range(d // 8) for j in range(i, d // 8)]
    first, second = (np.array([[8 * pair[side] + n for n in range(8)] for pair in blocks], np.intp).reshape(-1, 8) for side in (0, 1))
    multiplicity = np.repeat([1.0 if i == j else 2.0 for i, j in blocks], 64)
    return first.repeat(8, 1).ravel(), np.tile(second, 8).ravel(), multiplicity


def _through_normaliser(num: Float64, norm: Float64, dy: Float64, normalize: str) -> tuple[Float64, Float64]:
    """Gradients of rows' numerators [R, E] and normalisers [R] by that of y [R, E]; 0 where the normaliser is at its floor."""
    if normalize != "sum":
        return dy, np.zeros_like(norm)
    floored = np.maximum(norm, LOWEST_NORMALISER)
    dnum = np.where(norm > LOWEST_NORMALISER, 1 / floored, 0.0)[:, None] * dy
    return dnum, -(dnum * num).sum(1) / floored


def final_state(
    k: Float64, v: Float64, log_g: Float64 | None = None, initial: tuple[Float64, Float64] | None = None
) -> tuple[Float64, Float64]:
    """The state (S, Z) behind the last token, in float64, as `gradients` has it; `initial`: the one before the first token, or 0."""
    (batch, length, heads, d), (ia, ib, _) = k.shape, pair_rows(k.shape[-1])
    s, z = np.zeros((batch, heads, len(ia), v.shape[-1])), np.zeros((batch, heads, d, d))
    for b, h, _, keys, values, gates in _heads(k, k, v, log_g):
        a = np.concatenate([[0.0], np.cumsum(gates)])
        for m in range(0, length, ROWS):
            x = keys[m : m + ROWS]
            left = np.exp(a[-1] - a[m + 1 : m + 1 + len(x)])[:, None] * x
            s[b, h] += (left[:, ia] * x[:, ib]).T @ values[m : m + ROWS]
            z[b, h] += left.T @ x
        if initial is not None:
            s[b, h] += np.exp(a[-1]) * initial[0][b, h]
            z[b, h] += np.exp(a[-1]) * initial[1][b, h]
    return s, z


def _through_features(x: Float64, dphi: Float64) -> Float64:
    """Gradient of x [T, D] by that of its products of two, [T, P] in the order of `pair_rows`."""
    first, second, _ = pair_rows(x.shape[-1])
    dx = np.zeros_like(x)
    np.add.at(dx.T, first, (dphi * x[:, second]).T)
    np.add.at(dx.T, second, (dphi * x[:, first]).T)
    return dx


class _StateRead:
    """Rows x [R, D] of a head, whose gates add up to a [R], that read the state (S [P, E], Z [D, D]) before the first token."""

    def __init__(self, x: Float64, a: Float64, state: tuple[Float64, Float64], scale: float) -> None:
        first, second, self.count = pair_rows(x.shape[-1])
        self.x, (self.s, self.z) = x, state
        self.decay = scale**2 * np.exp(a)
        self.phi = self.count * x[:, first] * x[:, second]

    def sums(self) -> tuple[Float64, Float64]:
        """What it adds to the rows' numerators [R, E] and normalisers [R]."""
        return self.decay[:, None] * (self.phi @ self.s), self.decay * np.einsum("ta,ab,tb->t", self.x, self.z, self.x)

    def gradients(self, dnum: Float64, dnorm: Float64) -> tuple[Float64, Float64, Float64]:
        """Of x, S and Z, by those of the sums."""
        dx = self.decay[:, None] * dnorm[:, None] * (self.x @ (self.z + self.z.T))
        dx += _through_features(self.x, self.decay[:, None] * self.count * (dnum @ self.s.T))
        ds = (self.decay[:, None] * self.phi).T @ dnum
        return dx, ds, (self.x * (self.decay * dnorm)[:, None]).T @ self.x


def _through_final_state(keys: Float64, values: Float64, a: Float64, ds: Float64, dz: Float64) -> tuple[Float64, Float64, Float64]:
    """Gradients of a head's keys [T, D], values [T, E] and sums of gates a [T], T > 0, by that of the state after the last token."""
    first, second, _ = pair_rows(keys.shape[-1])
    to_end = np.exp(a[-1] - a)[:, None]
    dk = to_end * (keys @ (dz + dz.T)) + _through_features(keys, to_end * (values @ ds.T))
    da = -(dk * keys).sum(1) / 2
    da[-1] -= da.sum()
    return dk, to_end * ((keys[:, first] * keys[:, second]) @ ds), da


def gradients(
    q: Float64,
    k: Float64,
    v: Float64,
    log_g: Float64 | None,
    dy: Float64,
    *,
    degree: int = 2,
    scale: float | None = None,
    normalize: str = "sum",
    initial: tuple[Float64, Float64] | None = None,
    d_final: tuple[Float64, Float64] | None = None,
) -> Gradients:
    """Gradients of sum(y * dy) + sum(S_T * dS_T) + sum(Z_T * dZ_T) by the O(T^2) form, in float64, a head at a time.

    `initial`: the state (S, Z) before the first token, `d_final` the gradient of the one after the last (degree 2): S [B, H, P, E] of raw
    monomials in the order of `pair_rows`, Z [B, H, D, D]. A row whose normaliser is at its floor has the gradient 0; so has a log gate
    outside of (-60, 0].
    """
    q, k, v, dy = (np.asarray(x, np.float64) for x in (q, k, v, dy))
    scale, group = q.shape[-1] ** -0.5 if scale is None else scale, q.shape[2] // k.shape[2]
    dq, dk, dv, da = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros(k.shape[:3])
    q_terms, k_terms, g_terms = np.zeros(q.shape[:3]), np.zeros(k.shape[:3]), np.zeros(k.shape[:3])
    d_s = d_z = None
    if initial is not None or d_final is not None:
        (batch, _, heads, d), e = k.shape, v.shape[-1]
        d_s, d_z = np.zeros((batch, heads, d * (d + 8) // 2, e)), np.zeros((batch, heads, d, d))
    for b, hq, x, keys, values, gates in _heads(q, k, v, log_g):
        h, a = hq // group, np.cumsum(gates)
        for rows, seen, causal in _row_blocks(len(x)):
            decay = np.exp(np.where(causal, a[rows, None] - a[None, seen], -np.inf))
            score = x[rows] @ keys[seen].T
            weight = scale**degree * score**degree * decay
            num, norm = weight @ values[seen], weight.sum(1)
            read = None if initial is None else _StateRead(x[rows], a[rows], (initial[0][b, h], initial[1][b, h]), scale)
            if read is not None:
                from_state = read.sums()
                num, norm = num + from_state[0], norm + from_state[1]
            dnum, dnorm = _through_normaliser(num, norm, dy[b, rows, hq], normalize)
            from_values, slope = dnum @ values[seen].T, degree * scale**degree * score ** (degree - 1) * decay
            dweight = from_values + dnorm[:, None]
            dscore, terms = slope * dweight, slope**2 * (from_values**2 + dnorm[:, None] ** 2)
            q_terms[b, rows, hq] = np.sqrt(terms @ (keys[seen] ** 2).sum(1))
            k_terms[b, seen, h] += terms.T @ (x[rows] ** 2).sum(1)
            g_terms[b, rows, h] += (terms * score**2).sum(1)
            g_terms[b, seen, h] += (terms * score**2).sum(0)
            dq[b, rows, hq] += dscore @ keys[seen]
            dk[b, seen, h] += dscore.T @ x[rows]
            dv[b, seen, h] += weight.T @ dnum
            da[b, rows, h] += (weight * dweight).sum(1)
            da[b, seen, h] -= (weight * dweight).sum(0)
            if read is not None and d_s is not None and d_z is not None:
                dx, ds, dz = read.gradients(dnum, dnorm)
                dq[b, rows, hq] += dx
                da[b, rows, h] += (dx * x[rows]).sum(1) / 2
                d_s[b, h] += ds
                d_z[b, h] += dz
        # The state behind the last token is a key head's: it counts once for all queries of a group.
        if d_final is None or hq % group or d_s is None or d_z is None:
            continue
        ds, dz, left = d_final[0][b, h], d_final[1][b, h], np.exp(a[-1]) if len(x) else 1.0
        d_s[b, h] += left * ds
        d_z[b, h] += left * dz
        if len(x):
            from_keys, from_values, from_gates = _through_final_state(keys, values, a, ds, dz)
            dk[b, :, h] += from_keys
            dv[b, :, h] += from_values
            da[b, :, h] += from_gates
            if initial is not None:
                da[b, -1, h] += left * ((initial[0][b, h] * ds).sum() + (initial[1][b, h] * dz).sum())
    dlog_g = None if log_g is None else np.flip(np.cumsum(np.flip(da, 1), 1), 1) * ((log_g > LOWEST_LOG_GATE) & (log_g <= 0))
    return Gradients(dq, dk, dv, dlog_g, q_terms, np.sqrt(k_terms), np.sqrt(g_terms) / degree, d_s, d_z)
