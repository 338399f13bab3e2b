"""Kills one measuring process of this process in the middle of a sweep."""

from __future__ import annotations

import json
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
        """The process's one argument says whose child it is, and what it serves: the op, the bench and the GPU."""
        if self.killed:
            return
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if len(words) < 4 or b"vidrial.build.processes" not in words[2]:
                continue
            told = json.loads(words[3])
            mine = told["parent"] == os.getpid() and told["target"] == "vidrial.tune.workers:server"
            if mine and told["arguments"][2] == str(self.index):
                os.kill(int(folder.name), signal.SIGKILL)
                self.killed.append(int(folder.name))
