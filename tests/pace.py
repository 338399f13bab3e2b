"""How slow a machine is just now, so that a busy one breaks no limit of time."""

from __future__ import annotations

import time

# Processor seconds of the loop on the machine, then quiet, that the limits were written on.
LOOP_SECONDS = 1.5e-3


def slowness() -> float:
    """How many times as long a loop takes as it took there, at least 1: what a measured time is divided by."""
    begin = time.process_time()
    sum(i * i for i in range(40_000))
    return max(1.0, (time.process_time() - begin) / LOOP_SECONDS)
