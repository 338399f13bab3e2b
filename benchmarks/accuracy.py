"""The distance of a result from float64, on a few heads and rows, computed where the tensors lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

ROWS_AT_ONCE, SPREAD = 64, 64
LOWEST_NORMALISER = 1e-20


class Distance(NamedTuple):
    """`relative`: norm of the difference over that of the result. `max_error`: largest difference of an element, by the measure that the op's
    own check uses: of power retention times its conditioning, over the largest |v|; of softmax attention over sum_j weight |v_j|."""

    relative: float
    max_error: float


# (x, batch, query head, rows) -> result [rows, e] in float64, and what the error of each element is multiplied by, [rows, e] or [rows, 1].
Rows = Callable[[Mapping[str, Any], int, int, list[int]], tuple[Any, Any]]


class Exact:
    """Some rows of a result in float64.

    Args:
        x: q [b, t, hq, d], k [b, t, h, d], v [b, t, h, e], for power retention log_g [b, t, h], as torch tensors.
        chunk: rows on both sides of its multiples are among those that are looked at.
        rows: the function; power retention if none is named.
    """

    def __init__(self, x: Mapping[str, Any], chunk: int = 1024, rows: Rows | None = None) -> None:
        function = rows or power
        self._parts = [(b, h, some, *function(x, b, h, some)) for b, h in _heads(x["q"].shape) for some in _rows(x["q"].shape[1], chunk)]

    def distance(self, y: Any) -> Distance:
        """Of a result y [b, t, hq, e]. NaN stays NaN."""
        import torch

        difference = norm = 0.0
        worst = torch.zeros((), dtype=torch.float64, device=y.device)
        for b, h, rows, exact, factor in self._parts:
            error = (y[b, rows, h].double() - exact).abs()
            difference += float((error**2).sum())
            norm += float((exact**2).sum())
            worst = torch.maximum(worst, (error * factor).max())
        return Distance((difference / norm) ** 0.5, float(worst))


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


def power(x: Mapping[str, Any], b: int, h: int, rows: list[int]) -> tuple[Any, Any]:
    """The attention form: weight(i, j) = (scale q_i . k_j)^2 exp(a_i - a_j), j <= i, over their sum."""
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
    conditioning = norm / bound.clamp_min(1e-300)
    return weight @ v / norm.clamp_min(LOWEST_NORMALISER)[:, None], conditioning[:, None] / x["v"].abs().max().double()


def softmax(causal: bool) -> Rows:
    """Softmax attention: weight(i, j) = exp(q_i . k_j / sqrt(d)) over their sum, of a causal one over j <= i."""

    def attention(x: Mapping[str, Any], b: int, h: int, rows: list[int]) -> tuple[Any, Any]:
        import torch

        group = x["q"].shape[2] // x["k"].shape[2]
        q, k, v = x["q"][b, rows, h].double(), x["k"][b, :, h // group].double(), x["v"][b, :, h // group].double()
        scores = q.shape[1] ** -0.5 * q @ k.T
        if causal:
            index = torch.tensor(rows, device=q.device)
            scores = scores.masked_fill(torch.arange(k.shape[0], device=q.device)[None, :] > index[:, None], -torch.inf)
        weight = scores.softmax(1)
        return weight @ v, 1.0 / (weight @ v.abs())

    return attention
