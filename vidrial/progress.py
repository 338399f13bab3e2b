"""How far a sweep has come: a bar on a terminal, silence elsewhere, or whatever the caller listens with."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, Protocol


class Progress(Protocol):
    """What a sweep tells: phases (`measure`, `confirm`, `final`), and each thing done in them."""

    def begin(self, phase: str, total: int) -> None:
        """A phase of `total` things begins."""

    def advance(self, text: str) -> None:
        """One is done; `text` says what came of it."""


class Silent:
    """Says nothing."""

    def begin(self, phase: str, total: int) -> None:
        """Nothing."""

    def advance(self, text: str) -> None:
        """Nothing."""


class Lines:
    """A line per thing done, on standard error: for where there is no terminal, and long silence would look like a hang."""

    def __init__(self) -> None:
        self._phase, self._total, self._done = "", 0, 0

    def begin(self, phase: str, total: int) -> None:
        """Counted anew."""
        self._phase, self._total, self._done = phase, total, 0

    def advance(self, text: str) -> None:
        """One line."""
        self._done += 1
        print(f"{self._phase} {self._done}{f' of {self._total}' if self._total else ''}: {text}", file=sys.stderr, flush=True)


class Bar:
    """A rich progress bar, and the last thing done beside it."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._task: Any = None

    def begin(self, phase: str, total: int) -> None:
        """The bar of the last phase gives way to this one's."""
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(phase, total=total or None, text="")

    def advance(self, text: str) -> None:
        """One further."""
        self._bars.update(self._task, advance=1, text=text)


@contextlib.contextmanager
def reporting(wanted: bool | Progress | None, elsewhere: type[Silent] | type[Lines] = Silent) -> Iterator[Progress]:
    """`wanted` itself; or a bar (True, or None on a terminal); or what `elsewhere` is."""
    if wanted is not None and not isinstance(wanted, bool):
        yield wanted
        return
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield elsewhere()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    phase, last = TextColumn("{task.description:>8}"), TextColumn("{task.fields[text]}")
    with Bars(phase, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), last, console=Console(stderr=True), transient=True) as bars:
        yield Bar(bars)
