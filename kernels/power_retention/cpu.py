"""Power retention on the CPU: chunked, float32, NumPy's matrix products. What NumPy arrays and CPU tensors run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vidrial.kernels.masked import masked_product
from vidrial.kernels.power_retention.reference import LOWEST_LOG_GATE, LOWEST_NORMALISER, pair_rows
from vidrial.kernels.power_retention.state import PowerState

Float32 = NDArray[np.float32]

CHUNK = 256


def _phi_indices(d: int) -> tuple[NDArray[np.intp], NDArray[np.intp], Float32]:
    """Pairs (i <= j) of features, and how often each counts in (q . k)^2."""
    i, j = np.triu_indices(d)
    return i, j, np.where(i == j, 1.0, 2.0).astype(np.float32)


def _power(x: Float32, n: int) -> Float32:
    """x^n by products: NumPy's own takes a hundred times as long from the third power on."""
    if n < 2:
        return x if n else np.ones_like(x)
    half = _power(x, n // 2)
    return half * half * x if n % 2 else half * half


class CpuGradients(NamedTuple):
    """Of q, k, v, log_g and the initial state, float32."""

    dq: Float32
    dk: Float32
    dv: Float32
    dlog_g: Float32 | None
    initial_state: PowerState[Float32] | None


@dataclass(frozen=True)
class _State:
    """How this module keeps a state: [B, H, 1, P, E + 1], a row for each pair of features i <= j; the last column is the normaliser's."""

    d: int

    def pairs(self) -> tuple[NDArray[np.intp], NDArray[np.intp], Float32]:
        """Of each row of PowerState.S its pair, of each element of Z its pair, and how many rows of S a pair has."""
        i, j = np.triu_indices(self.d)
        number = np.empty((self.d, self.d), np.intp)
        number[i, j] = number[j, i] = np.arange(len(i))
        first, second, _ = pair_rows(self.d)
        rows = number[first, second]
        return rows, number, np.bincount(rows, minlength=len(i)).astype(np.float32)

    def gather(self, s: Float32, z: Float32, mean: bool) -> Float32:
        """From S and Z: the sum of a pair's rows, or their mean, which are as many as its elements of Z but where blocks differ."""
        rows, number, count = self.pairs()
        i, j, twice = _phi_indices(self.d)
        x = np.zeros((len(i), s.shape[-1] + 1, *s.shape[:2]), np.float32)  # pairs first, by which it is added up
        np.add.at(x[:, :-1], rows, s.transpose(2, 3, 0, 1))
        np.add.at(x[:, -1], number, z.transpose(2, 3, 0, 1))
        x = np.ascontiguousarray(x.transpose(2, 3, 0, 1))[:, :, None]
        if mean:
            x[..., :-1] /= count[:, None]
            x[..., -1] /= twice
        return x

    def scatter(self, x: Float32, mean: bool) -> PowerState[Float32]:
        """To S and Z: to each row its pair's value, or its share of it."""
        rows, number, count = self.pairs()
        _, _, twice = _phi_indices(self.d)
        s, z = x[:, :, 0, :, :-1], x[:, :, 0, :, -1]
        if mean:
            s, z = s / count[:, None], z / twice
        return PowerState(np.ascontiguousarray(s[:, :, rows]), np.ascontiguousarray(z[:, :, number]))

    def skew(self, s: Float32) -> Float32:
        """The part of S that no token makes or reads: by which rows of one pair differ."""
        _, _, multiplicity = pair_rows(self.d)
        found, two = np.zeros_like(s), np.flatnonzero(multiplicity == 1)  # rows of k_a k_b and k_b k_a
        turned = two.reshape(-1, 8, 8).swapaxes(1, 2).ravel()
        found[:, :, two] = (s[:, :, two] - s[:, :, turned]) / 2
        return found


class _Tokens:
    """The arrays of a call with heads first, [B, H, G, T, .], gates clamped, and their chunks."""

    def __init__(self, q: Float32, k: Float32, v: Float32, log_g: Float32 | None, degree: int, chunk: int | None) -> None:
        (self.b, self.t, hq, self.d), (self.h, self.e) = q.shape, v.shape[2:]
        self.group, self.degree, self.size = hq // self.h, degree, chunk or CHUNK
        # The queries of a group share keys, values and state.
        self.q = self.of_queries(q)
        self.k, self.v = (np.ascontiguousarray(x.transpose(0, 2, 1, 3))[:, :, None] for x in (k, v))
        self.gates = (
            np.zeros((self.b, self.h, self.t))
            if log_g is None
            else np.clip(log_g, LOWEST_LOG_GATE, 0).transpose(0, 2, 1).astype(np.float64)
        )
        self.i, self.j, self.multiplicity = _phi_indices(self.d)

    def of_queries(self, x: Float32) -> Float32:
        """[B, T, HQ, .] with heads first."""
        return np.ascontiguousarray(x.reshape(self.b, self.t, self.h, self.group, x.shape[-1]).transpose(0, 2, 3, 1, 4))

    def to_queries(self, x: Float32) -> Float32:
        """And back."""
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2, 4)).reshape(self.b, self.t, self.h * self.group, x.shape[-1])

    def phi(self, x: Float32) -> Float32:
        """Products of pairs of features."""
        return x[..., self.i] * x[..., self.j]

    def phi_gradient(self, x: Float32, dphi: Float32) -> Float32:
        """What the gradient of the products is worth to x."""
        gradient, first = np.zeros_like(x), 0
        for i in range(self.d):
            row = dphi[..., first : first + self.d - i]  # of the products of feature i with those from i on
            gradient[..., i] += (row * x[..., i:]).sum(-1)
            gradient[..., i:] += row * x[..., i, None]
            first += self.d - i
        return gradient

    def with_one(self, values: Float32) -> Float32:
        """Values with a further column of ones, the normaliser's."""
        return np.concatenate([values, np.ones((*values.shape[:-1], 1), np.float32)], -1)

    def chunks(self) -> Iterator[_Chunk]:
        """In their order. Degrees without a state take all earlier keys, too."""
        for begin in range(0, self.t, self.size):
            rows = slice(begin, min(begin + self.size, self.t))
            keys = rows if self.degree == 2 else slice(0, rows.stop)
            yield _Chunk(self, rows, keys)

    def left(self) -> Float32:
        """What the gates leave of the state before the first token, [B, H, 1, 1]."""
        found: Float32 = np.exp(self.gates.sum(-1))[..., None, None].astype(np.float32)
        return found

    def empty_state(self) -> Float32:
        """That of no token."""
        return np.zeros((self.b, self.h, 1, len(self.i), self.e + 1), np.float32)


class _Chunk:
    """Some queries and the keys that they see beside the state: a, the sum of the gates from the first key on, scores, and what weighs them."""

    def __init__(self, tokens: _Tokens, rows: slice, keys: slice) -> None:
        self.tokens, self.rows, self.keys = tokens, rows, keys
        self.a = np.cumsum(tokens.gates[..., keys], -1)[:, :, None]
        tail = self.a[..., keys.stop - keys.start - (rows.stop - rows.start) :]
        gap = tail[..., :, None] - self.a[..., None, :]
        self.causal = np.arange(rows.start, rows.stop)[:, None] >= np.arange(keys.start, keys.stop)
        self.decay = np.exp(np.where(self.causal, gap, -np.inf)).astype(np.float32)
        self.q, self.k, self.v = tokens.q[..., rows, :], tokens.k[..., keys, :], tokens.v[..., keys, :]
        self.score = self.q @ self.k.swapaxes(-1, -2)
        # Decays from the chunk's start, to its end, and over all of it; of use with a state, where rows are keys.
        self.from_start = np.exp(self.a)[..., None].astype(np.float32)
        self.to_end = np.exp(self.a[..., -1:] - self.a)[..., None].astype(np.float32)
        self.total = np.exp(self.a[..., -1])[..., None, None].astype(np.float32)

    def weigh(self, x: Float32) -> Float32:
        """Times the decay; 0 above the diagonal, whatever stands there."""
        return np.where(self.causal, x * self.decay, np.float32(0))

    def sums(self, state: Float32 | None) -> tuple[Float32, Float32]:
        """Numerator and normaliser of its rows, but for the scale."""
        weight = self.weigh(_power(self.score, self.tokens.degree))
        num, norm = masked_product(weight, self.v, self.causal), weight.sum(-1)
        if state is not None:
            from_state: Float32 = np.matmul(self.tokens.phi(self.q) * self.tokens.multiplicity, state) * self.from_start
            num, norm = num + from_state[..., :-1], norm + from_state[..., -1]
        return num, norm

    def after(self, state: Float32) -> Float32:
        """The state behind it."""
        values = self.tokens.with_one(self.v) * self.to_end
        return state * self.total + self.tokens.phi(self.k).swapaxes(-1, -2) @ values

    def through_state_before(self, state: Float32, dnum: Float32) -> tuple[Float32, NDArray[Any]]:
        """Gradients of its queries and of its rows' sums of gates [B, H, rows] by what it read from the state."""
        products = self.tokens.phi(self.q)
        dphi: Float32 = np.matmul(dnum, state.swapaxes(-1, -2)) * self.from_start * self.tokens.multiplicity
        return self.tokens.phi_gradient(self.q, dphi), (dphi * products).sum(-1, dtype=np.float64).sum(2)

    def through_state_behind(self, adjoint: Float32) -> tuple[Float32, NDArray[Any], NDArray[Any]]:
        """Gradients of its keys and values, and of its keys' sums of gates [B, H, keys] turned round, by what it added to the state."""
        products = self.tokens.phi(self.k)
        dphi: Float32 = np.matmul(self.tokens.with_one(self.v) * self.to_end, adjoint.swapaxes(-1, -2))
        dv = (products * self.to_end) @ adjoint[..., :-1]
        return self.tokens.phi_gradient(self.k, dphi), dv, (dphi * products).sum(-1, dtype=np.float64)[:, :, 0]

    def adjoint_before(self, adjoint: Float32 | None, dnum: Float32) -> Float32:
        """The gradient of the state before it, by that of the one behind it and what its rows read."""
        queries = self.tokens.phi(self.q) * self.tokens.multiplicity * self.from_start
        read: Float32 = (queries.swapaxes(-1, -2) @ dnum).sum(2, keepdims=True)
        return read if adjoint is None else adjoint * self.total + read


def power_retention_cpu(
    q: Float32,
    k: Float32,
    v: Float32,
    log_g: Float32 | None,
    *,
    degree: int,
    scale: float,
    normalize: str,
    chunk: int | None,
    initial_state: PowerState[Float32] | None = None,
    output_final_state: bool = False,
) -> tuple[Float32, PowerState[Float32] | None, Float32]:
    """q [B, T, HQ, D], k [B, T, H, D], v [B, T, H, E], log_g [B, T, H] or None, all float32 -> y [B, T, HQ, E] float32, the state, if asked for,
    and the sum of the weights [B, HQ, T].

    Degree 2 carries a state of D (D + 1) / 2 x E from chunk to chunk (linear in T); other degrees take every earlier key (quadratic).
    """
    tokens = _Tokens(q, k, v, log_g, degree, chunk)
    y, norms = np.empty((*tokens.q.shape[:-1], tokens.e), np.float32), np.empty(tokens.q.shape[:-1], np.float32)
    state = None if initial_state is None else _State(tokens.d).gather(initial_state.S, initial_state.Z, mean=True)
    factor = np.float32(scale**degree)
    for part in tokens.chunks():
        num, norm = part.sums(state)
        norms[..., part.rows] = norm * factor
        y[..., part.rows, :] = (
            num * (factor / np.maximum(norm * factor, np.float32(LOWEST_NORMALISER)))[..., None] if normalize == "sum" else num * factor
        )
        if degree == 2 and (output_final_state or part.rows.stop < tokens.t):
            state = part.after(tokens.empty_state() if state is None else state)
    final = None
    if output_final_state:
        final = _State(tokens.d).scatter(tokens.empty_state() if state is None else state, mean=False)
        if initial_state is not None:
            final = PowerState(final.S + tokens.left() * _State(tokens.d).skew(initial_state.S), final.Z)
    return tokens.to_queries(y), final, norms.reshape(tokens.b, tokens.h * tokens.group, tokens.t)


def power_retention_cpu_gradients(
    q: Float32,
    k: Float32,
    v: Float32,
    log_g: Float32 | None,
    dy: Float32,
    *,
    degree: int,
    scale: float,
    normalize: str,
    chunk: int | None,
    initial_state: PowerState[Float32] | None = None,
    d_final: PowerState[Float32] | None = None,
) -> CpuGradients:
    """Gradients of the sum of y * dy, and of the final state times its gradient `d_final`; the states are made again, chunk by chunk.

    A row whose normaliser is at its floor has the gradient 0, and so has a log gate outside of (-60, 0].
    """
    tokens = _Tokens(q, k, v, log_g, degree, chunk)
    factor, dys = np.float32(scale**degree), tokens.of_queries(dy)
    dq, dk, dv = (np.zeros_like(x) for x in (tokens.q, tokens.k, tokens.v))
    da = np.zeros((tokens.b, tokens.h, tokens.t))
    parts = list(tokens.chunks())
    # states[n]: before chunk n; the last one behind all of them. None where there is none.
    states = [None if initial_state is None else _State(tokens.d).gather(initial_state.S, initial_state.Z, mean=True)]
    for part in parts:
        wanted = degree == 2 and (d_final is not None or part.rows.stop < tokens.t)
        states.append(part.after(tokens.empty_state() if states[-1] is None else states[-1]) if wanted else None)
    adjoint: Float32 | None = None if d_final is None else _State(tokens.d).gather(d_final.S, d_final.Z, mean=False)
    passed, worth = None, None  # from the first state to the last, by no token; and what each gate on its way is worth to it
    if initial_state is not None and d_final is not None:
        passed = tokens.left() * _State(tokens.d).skew(d_final.S)
        worth = (passed * initial_state.S).sum((-1, -2))
    for n, part in reversed(list(enumerate(parts))):
        before, rows, keys = states[n], part.rows, part.keys
        dnum = _through_normaliser(*part.sums(before), dys[..., rows, :], factor, normalize)
        dweight = dnum @ tokens.with_one(part.v).swapaxes(-1, -2)
        weight, slope = part.weigh(_power(part.score, degree)), part.weigh(_power(part.score, degree - 1))
        dscore = degree * slope * dweight
        dq[..., rows, :] += dscore @ part.k
        dk[..., keys, :] += (dscore.swapaxes(-1, -2) @ part.q).sum(2, keepdims=True)
        dv[..., keys, :] += (weight.swapaxes(-1, -2) @ dnum[..., :-1]).sum(2, keepdims=True)
        moved = weight * dweight
        da[..., rows] += moved.sum(-1, dtype=np.float64).sum(2)
        da[..., keys] -= moved.sum(-2, dtype=np.float64).sum(2)
        behind = states[n + 1]
        if adjoint is not None and behind is not None:
            from_keys, from_values, from_gates = part.through_state_behind(adjoint)
            dk[..., keys, :] += from_keys
            dv[..., keys, :] += from_values
            da[..., keys] -= from_gates
            # What the gates of the whole chunk are worth to all that lies behind it: pairs of tokens on either side of its end.
            da[..., rows.stop - 1] += (adjoint * behind).sum((-1, -2), dtype=np.float64)[:, :, 0]
        if worth is not None:
            da[..., rows.stop - 1] += worth
        if before is not None:
            from_queries, from_gates = part.through_state_before(before, dnum)
            dq[..., rows, :] += from_queries
            da[..., rows] += from_gates
        if degree == 2 and (n > 0 or initial_state is not None):
            adjoint = part.adjoint_before(adjoint, dnum)
    dlog_g = None
    if log_g is not None:
        inside = (log_g > LOWEST_LOG_GATE) & (log_g <= 0) | np.isnan(log_g)
        dlog_g = np.where(inside, _within_chunks(da, tokens).transpose(0, 2, 1), 0).astype(np.float32)
    d_initial = None
    if initial_state is not None:
        d_initial = _State(tokens.d).scatter(adjoint if adjoint is not None else tokens.empty_state(), mean=True)
        d_initial = d_initial if passed is None else PowerState(d_initial.S + passed, d_initial.Z)
    dk, dv = (np.ascontiguousarray(x[:, :, 0].transpose(0, 2, 1, 3)) for x in (dk, dv))
    return CpuGradients(tokens.to_queries(dq), dk, dv, dlog_g, d_initial)


def _through_normaliser(num: Float32, norm: Float32, dy: Float32, factor: np.float32, normalize: str) -> Float32:
    """The gradient of a chunk's sums by that of y: of its numerators, and as a further column of its normalisers."""
    if normalize == "sum":
        seen = norm * factor > LOWEST_NORMALISER
        times = np.where(seen, 1 / np.where(seen, norm, 1), 0).astype(np.float32)
        to_norm = (dy * num).sum(-1) * times
    else:
        times, to_norm = np.full_like(norm, factor), np.zeros_like(norm)
    return np.concatenate([dy, -to_norm[..., None]], -1) * times[..., None]


def _within_chunks(da: NDArray[np.float64], tokens: _Tokens) -> NDArray[np.float64]:
    """Reverse cumulative sums within each chunk; over all tokens where no state breaks them."""
    size = tokens.size if tokens.degree == 2 else max(tokens.t, 1)
    sums = np.empty_like(da)
    for begin in range(0, tokens.t, size):
        sums[..., begin : begin + size] = np.flip(np.cumsum(np.flip(da[..., begin : begin + size], -1), -1), -1)
    return sums
