"""What flash attention is asked: the one Problem, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass

from vidrial import DType, dynamic, static

# A window without a limit on that side.
UNLIMITED = -1
DTYPES = (DType.bfloat16, DType.float16)
DIMS = (32, 64, 96, 128, 192, 256)
MAX_GROUP = 1024  # query heads of a key head
# Of scale and softcap: a score's logarithms to base 2 stay float32, and largest scores are largest logarithms.
MIN_SCALE, MAX_SCALE = 1e-9, 1e9


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


def refusal(p: Problem) -> str | None:
    """Why no kernel serves the problem, or None."""
    if p.dtype not in DTYPES:
        return f"dtype {p.dtype} is not served; accepted: {', '.join(map(str, DTYPES))}"
    if p.d not in DIMS or p.e not in DIMS:
        return f"d={p.d} and e={p.e} are not served; accepted: {', '.join(map(str, DIMS))}"
    if not 1 <= p.group <= MAX_GROUP:
        return f"{p.group} query heads of a key head are not served; accepted: 1 to {MAX_GROUP}"
    if not MIN_SCALE <= p.scale <= MAX_SCALE or (p.capped and not MIN_SCALE <= p.softcap <= MAX_SCALE):
        return f"scale={p.scale:g} and softcap={p.softcap:g} are not served; accepted: {MIN_SCALE:g} to {MAX_SCALE:g}"
    return None


# What the last CTAs of unlike ones add, of a CTA's time, where the heaviest come first.
LAST = 0.25


def heaviest_first(longest: float, shares: float) -> float:
    """`Cost.longest` of CTAs that come heaviest first: they end together, unless one alone takes longer.

    Args:
        longest: the heaviest one's time, over the mean.
        shares: CTAs over those that run at once.
    """
    return max(longest, shares + LAST) / max(1.0, shares)
