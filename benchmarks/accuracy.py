"""The distance of a result from float64, on a few heads and rows, computed where the tensors lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

ROWS_AT_ONCE, SPREAD = 64, 64
LOWEST_NORMALISER = 1e-20


class Distance(NamedTuple):
    """`relative`: norm of the difference over that of the result. `max_error`: largest difference of an element times its conditioning, over
    the largest |v|: the measure that the op's own check uses."""

    relative: float
    max_error: float


class Exact:
    """Rows of the attention form in float64: weight(i, j) = (scale q_i . k_j)^2 exp(a_i - a_j), j <= i, over their sum.

    Args:
        x: q [b, t, hq, d], k [b, t, h, d], v [b, t, h, e], log_g [b, t, h] as torch tensors.
        chunk: rows on both sides of its multiples are among those that are looked at.
    """

    def __init__(self, x: Mapping[str, Any], chunk: int = 1024) -> None:
        self._v_max = float(x["v"].abs().max())
        self._parts = [(b, h, rows, *_attention(x, b, h, rows)) for b, h in _heads(x["q"].shape) for rows in _rows(x["q"].shape[1], chunk)]

    def distance(self, y: Any) -> Distance:
        """Of a result y [b, t, hq, e]. NaN stays NaN."""
        import torch

        difference = norm = 0.0
        worst = torch.zeros((), dtype=torch.float64, device=y.device)
        for b, h, rows, exact, conditioning in self._parts:
            error = (y[b, rows, h].double() - exact).abs()
            difference += float((error**2).sum())
            norm += float((exact**2).sum())
            worst = torch.maximum(worst, (error * conditioning[:, None]).max())
        return Distance((difference / norm) ** 0.5, float(worst) / self._v_max)


def _heads(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """(batch, query head): first, middle, last."""
    b, _, h, _ = shape
    return sorted({(0, 0), (b // 2, h // 2), (b - 1, h - 1)})


def _rows(t: int, chunk: int) -> Iterator[list[int]]:
    """Rows spread over the sequence, its ends, and both sides of the first and the last chunk's borders."""
    borders = {edge + side for edge in (chunk, (t - 1) // chunk * chunk) for side in (-1, 0, 1)}
    wanted = {0, 1, 2, t - 2, t - 1, *borders, *(i * t // SPREAD for i in range(SPREAD))}
    rows = sorted(row for row in wanted if 0 <= row < t)
    for first in range(0, len(rows), ROWS_AT_ONCE):
        yield rows[first : first + ROWS_AT_ONCE]


def _attention(x: Mapping[str, Any], b: int, h: int, rows: list[int]) -> tuple[Any, Any]:
    """Result [rows, e] and conditioning [rows] of one head."""
    import torch

    group = x["q"].shape[2] // x["k"].shape[2]
    scale = x["q"].shape[3] ** -0.5
    q, k, v = x["q"][b, rows, h].double(), x["k"][b, :, h // group].double(), x["v"][b, :, h // group].double()
    a = x["log_g"][b, :, h // group].double().cumsum(0)
    index = torch.tensor(rows, device=q.device)
    later = torch.arange(k.shape[0], device=q.device)[None, :] > index[:, None]
    decay = torch.exp((a[index][:, None] - a[None, :]).masked_fill(later, -torch.inf))
    weight = (scale * q @ k.T) ** 2 * decay
    norm = weight.sum(1)
    bound = (scale * q.norm(dim=1)) ** 2 * (decay @ (k**2).sum(1))
    return weight @ v / norm.clamp_min(LOWEST_NORMALISER)[:, None], norm / bound.clamp_min(1e-300)
