"""What flash attention is asked: the one Problem, and what follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from vidrial import ArgumentError, ArgumentTypeError, DType, UnsupportedError, VidrialError, dynamic, static

# A window without a limit on that side.
UNLIMITED = -1
DTYPES = (DType.bfloat16, DType.float16)
DIMS = (32, 64, 96, 128, 192, 256)
MAX_GROUP = 1024  # query heads of a key head
MAX_ELEMENTS = 2**31  # of q, of k, of v
# Of scale and softcap: a score's logarithms to base 2 stay float32, and largest scores are largest logarithms.
MIN_SCALE, MAX_SCALE = 1e-9, 1e9
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Problem:
    """q [b, tq, hq, d], k [b, tk, h, d], v [b, tk, h, e] -> y [b, tq, hq, e], lse [b, hq, tq]; strides in elements, of all but the last axis.

    Row i stands at key `i + tk - tq`. `causal`: it sees no later key; `windowed`: at most `left` keys before and `right` keys after its own
    (UNLIMITED: all of them). `group` = hq / h query heads share a key head.
    """

    dtype: DType = static()
    d: int = static()
    e: int = static()
    causal: bool = static()
    windowed: bool = static()
    capped: bool = static()
    group: int = static()
    b: int = dynamic()
    tq: int = dynamic()
    tk: int = dynamic(least=0)
    h: int = dynamic()
    left: int = dynamic(least=UNLIMITED)
    right: int = dynamic(least=UNLIMITED)
    scale: float = dynamic(keyed=False)
    softcap: float = dynamic(keyed=False)
    q_stride: tuple[int, int, int] = dynamic(keyed=False)
    k_stride: tuple[int, int, int] = dynamic(keyed=False)
    v_stride: tuple[int, int, int] = dynamic(keyed=False)
    y_stride: tuple[int, int, int] = dynamic(keyed=False)

    @property
    def hq(self) -> int:
        """Query heads."""
        return self.h * self.group

    @property
    def rows(self) -> int:
        """Rows of one key head's queries: the heads of a group lie side by side, row r is query r // group of head r % group."""
        return self.tq * self.group


def scale_refusal(scale: Any) -> ArgumentError | None:
    """Why scores are not scaled so, or None."""
    if _is_number(scale) and MIN_SCALE <= scale <= MAX_SCALE:
        return None
    return ArgumentError(
        f"scale={scale!r} is not served; accepted: None, or a number from {MIN_SCALE:g} to {MAX_SCALE:g}. Negate q for a negative one"
    )


def softcap_refusal(softcap: Any) -> ArgumentError | None:
    """Why scores are not capped so, or None."""
    if _is_number(softcap) and MIN_SCALE <= softcap <= MAX_SCALE:
        return None
    return ArgumentError(f"softcap={softcap!r} is not served; accepted: None (no cap), or a number from {MIN_SCALE:g} to {MAX_SCALE:g}")


def heads_refusal(hq: int, h: int) -> VidrialError | None:
    """Why so many heads of queries and of keys do not go together, or None."""
    if h < 1 or hq < 1 or hq % h:
        return ArgumentError(f"q has {hq} heads and k has {h}; accepted: a multiple of k's heads")
    if hq // h > MAX_GROUP:
        return UnsupportedError(f"q has {hq // h} heads for each of k's; accepted: at most {MAX_GROUP}. Repeat k and v, or split the heads")
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def shape_refusal(dtype: DType, d: int, e: int, hq: int, h: int, dtypes: tuple[DType, ...] = DTYPES) -> VidrialError | None:
    """Why no kernel serves such elements, head sizes and heads, or None."""
    if dtype not in dtypes:
        return ArgumentTypeError(f"q: dtype {dtype} is not served; accepted: {', '.join(map(str, dtypes))}")
    if (refused := heads_refusal(hq, h)) is not None:
        return refused
    for name, size in (("D", d), ("E", e)):
        if size not in DIMS:
            return UnsupportedError(
                f"{name}={size} is not served; accepted: {', '.join(map(str, DIMS))}. Pad with zeros, which changes nothing but `scale`'s default"
            )
    return None


def refusal(p: Problem, dtypes: tuple[DType, ...] = DTYPES) -> VidrialError | None:
    """Why no kernel serves a problem, or None: what calls raise, and the first rule."""
    if (refused := shape_refusal(p.dtype, p.d, p.e, p.hq, p.h, dtypes)) is not None:
        return refused
    for name, elements in (("q", p.tq * p.hq * p.d), ("k", p.tk * p.h * p.d), ("v", p.tk * p.h * p.e)):
        if p.b * elements > MAX_ELEMENTS:
            return UnsupportedError(f"{name} has {p.b * elements} elements; accepted: at most 2^31. Split the batch or the heads")
    return scale_refusal(p.scale) or (softcap_refusal(p.softcap) if p.capped else None)


def score_scalars(p: Problem) -> dict[str, float]:
    """What every path's kernel is told of scores: the window in keys, and the factors to base-2 logarithms and into the cap."""
    unlimited = p.tq + p.tk
    return {
        "left": unlimited if p.left < 0 else min(p.left, unlimited),
        "right": 0 if p.causal else unlimited if p.right < 0 else min(p.right, unlimited),
        "to_log2": (p.softcap if p.capped else p.scale) * LOG2_E,
        "to_cap": p.scale / p.softcap if p.capped else 0.0,
    }


# What the last CTAs of unlike ones add, of a CTA's time, where the heaviest come first.
LAST = 0.25


def heaviest_first(longest: float, shares: float) -> float:
    """`Cost.longest` of CTAs that come heaviest first: they end together, unless one alone takes longer.

    Args:
        longest: the heaviest one's time, over the mean.
        shares: CTAs over those that run at once.
    """
    return max(longest, shares + LAST) / max(1.0, shares)
