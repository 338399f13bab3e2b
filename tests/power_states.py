"""States of power retention in tests: drawn ones, and what a token at a time makes of them in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from vidrial.kernels.power_retention import PowerState, power_retention
from vidrial.kernels.power_retention.reference import pair_rows

Arrays = dict[str, np.ndarray]


def draw_state(seed: int, x: Arrays, tokens: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """S and Z of some keys and values, for a call's arrays."""
    (b, _, h, d), e = x["k"].shape, x["v"].shape[-1]
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((b, tokens, h, d)), rng.standard_normal((b, tokens, h, e))
    i, j, _ = pair_rows(d)
    return np.einsum("bthp,bthe->bhpe", k[..., i] * k[..., j], v), np.einsum("bthi,bthj->bhij", k, k)


def recurrent(
    x: Arrays, s: np.ndarray, z: np.ndarray, scale: float, normalize: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Degree 2, a token at a time in float64, from a state: y, the state after it, and the sums of the weights [B, HQ, T]."""
    (b, t, hq, d), h = x["q"].shape, x["k"].shape[2]
    i, j, count = pair_rows(d)
    y, norms = np.zeros((b, t, hq, x["v"].shape[-1])), np.zeros((b, hq, t))
    s, z = s.copy(), z.copy()
    for n in range(t):
        g = np.exp(x["log_g"][:, n].astype(np.float64))[..., None, None] if "log_g" in x else 1.0
        k, v = x["k"][:, n], x["v"][:, n]
        s, z = g * s + (k[..., i] * k[..., j])[..., None] * v[..., None, :], g * z + k[..., None] * k[..., None, :]
        for m in range(hq):
            q, at = x["q"][:, n, m], m // (hq // h)
            num = scale**2 * np.einsum("bp,bpe->be", count * q[:, i] * q[:, j], s[:, at])
            norms[:, m, n] = scale**2 * np.einsum("bi,bij,bj->b", q, z[:, at], q)
            y[:, n, m] = num / norms[:, m, n][:, None] if normalize == "sum" else num
    return y, s, z, norms


def relative(found: object, exact: np.ndarray) -> float:
    """The norm of the error over that of the exact array."""
    return float(np.linalg.norm(np.asarray(found, np.float64) - exact) / max(np.linalg.norm(exact), 1e-30))


def behind(x: list[Any], grad: bool = False) -> PowerState[Any]:
    """The state behind some tokens of torch's."""
    _, state = power_retention(*(a.detach() for a in x), output_final_state=True)
    return PowerState(state.S.requires_grad_(grad), state.Z.requires_grad_(grad))


def flat(found: Any) -> list[Any]:
    """y, S and Z, or torch's tensors in whatever structure, in order."""
    import torch

    return list(torch.utils._pytree.tree_leaves(found))
