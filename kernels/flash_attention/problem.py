"""What flash attention is asked: the one Problem, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass

from vidrial import DType, dynamic, static

# A window without a limit on that side.
UNLIMITED = -1


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
