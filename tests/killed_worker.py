"""Kills one measuring process of this process in the middle of a sweep."""

from __future__ import annotations

import os
import signal
from pathlib import Path


class Killer:
    """What a sweep tells its progress to: after the first trial it kills the measuring process of GPU `index`."""

    def __init__(self, index: int) -> None:
        self.index, self.killed = index, list[int]()

    def begin(self, phase: str, total: int) -> None:
        """Nothing to do."""

    def advance(self, text: str) -> None:
        """The process's arguments end with its descriptor, our pid, the op, the bench and the GPU, then the paths."""
        if self.killed:
            return
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if (
                len(words) > 8
                and b"vidrial.tune.workers" in words[2]
                and words[4] == b"%d" % os.getpid()
                and words[7] == b"%d" % self.index
            ):
                os.kill(int(folder.name), signal.SIGKILL)
                self.killed.append(int(folder.name))
