"""In which order tiles are worked on: the same on the device (`vidrial/pipeline/scheduler.cuh`) and here, for costs and tests."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Iterator
from typing import Literal

from vidrial.errors import LayoutError


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """Rows x columns of tiles, dealt to CTAs.

    `kind`: "one" (a CTA per tile), "static" (the CTAs that fit take turns), "dynamic" (they draw from a counter, a zeroed workspace buffer; one
    warp draws for the `consumer_warps` that read, by barriers of its own). It is a member of the kernel's `Barriers`. `heavy`: rows come from
    the last, the one with most work, to the first. Columns (of heads, say) come in groups of equal size, so that what a group reads stays in
    L2: a short last group would bring its heavy tiles last.

    Raises:
        LayoutError: another kind, or a dynamic one that no warp reads.
    """

    kind: Literal["one", "static", "dynamic"] = "one"
    heavy: bool = True
    consumer_warps: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("one", "static", "dynamic"):
            raise LayoutError(f"a schedule of kind {self.kind!r}; accepted: 'one', 'static', 'dynamic'")
        if self.kind == "dynamic" and self.consumer_warps < 1:
            raise LayoutError("a dynamic schedule is read by warps; give consumer_warps, as Roles has them")

    def order(self, rows: int, columns: int, groups: int) -> Iterator[tuple[int, int]]:
        """(row, column) of tile 0, 1, ...

        Raises:
            LayoutError: no tiles, or more groups than columns.
        """
        if min(rows, columns) < 1 or not 1 <= groups <= columns:
            raise LayoutError(f"{rows} x {columns} tiles in {groups} groups; give at least one tile, and 1 to {columns} groups")
        size, larger = divmod(columns, groups)
        first = 0
        for group in range(groups):
            width = size + (group < larger)
            for row in range(rows):
                for column in range(first, first + width):
                    yield (rows - 1 - row if self.heavy else row), column
            first += width

    def ctas(self, tiles: int, resident: int) -> int:
        """CTAs of the grid, if `resident` of them run at once."""
        return tiles if self.kind == "one" else min(tiles, resident)

    def makespan(self, rows: int, columns: int, groups: int, resident: int, work: Callable[[int, int], float]) -> float:
        """When the last tile is done, if `resident` CTAs run at once and tile (row, column) takes `work(row, column)`."""
        order = list(self.order(rows, columns, groups))
        ctas = min(resident, len(order))
        if self.kind == "static":
            return max(sum(work(*order[i]) for i in range(first, len(order), ctas)) for first in range(ctas))
        # One after another, each to whichever is free first: CTAs start so, and draw so.
        free = [0.0] * ctas
        for place in order:
            heapq.heapreplace(free, free[0] + work(*place))
        return max(free)

    @property
    def size(self) -> int:
        """Bytes in the region of barriers: of a dynamic schedule two full and two empty barriers, and two tiles."""
        return 40 if self.kind == "dynamic" else 0

    def placed(self, at: int, name: str) -> tuple[str, str]:
        """As `TmaRing.placed`."""
        kind, heavy = self.kind.capitalize(), str(self.heavy).lower()
        cpp = f"vidrial::Scheduler<vidrial::Schedule::{kind}, {heavy}, {self.consumer_warps}, {at}>"
        return cpp, f'"{name}.full", "{name}.empty"'


def equal_groups(columns: int, column_bytes: int, cache_bytes: int) -> int:
    """The fewest groups of columns such that what one reads, `column_bytes` per column, fits in `cache_bytes`."""
    fit = max(1, cache_bytes // max(column_bytes, 1))
    return -(-columns // fit)
