"""One making of a thing for all threads that ask for it at the same time, and a limit to how long they wait."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
# By process as well: the thread that makes it does not live on in a forked child.
_making: dict[tuple[int, Hashable], Future[Any]] = {}


def begin(key: Hashable, make: Callable[[], T]) -> Future[T]:
    """What `make` will return or raise, from whichever thread asked for `key` first.

    It runs in a thread of its own, so that what hangs in a compiler does not take its caller along.
    """
    mine: Future[T] = Future()
    found: Future[T] = _making.setdefault((os.getpid(), key), mine)
    if found is mine:

        def fail(_: object, error: BaseException | None, __: object) -> bool:
            # Whatever it is, it goes to those who wait.
            if error is not None:
                mine.set_exception(error)
            return True

        def run() -> None:
            with contextlib.ExitStack() as stack:
                stack.callback(_making.pop, (os.getpid(), key))
                stack.push(fail)
                mine.set_result(make())

        threading.Thread(target=run, daemon=True).start()
    return found


def once(key: Hashable, make: Callable[[], T], seconds: float) -> T:
    """The result of `begin`.

    Raises:
        TimeoutError: there is nothing after `seconds`.
    """
    return begin(key, make).result(seconds)
