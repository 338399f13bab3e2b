"""The one child process: it answers requests one at a time, within their time, and dies with its parent. What travels is JSON.

child = Child("module:server")                  # there: server(send) -> what answers a request
child.ask(request, seconds=120.0)
for child in ready([child]):
    reply = child.receive()                     # or Ended, which says how
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Mapping
from typing import Any

# NOTE: not multiprocessing.Process: it would run the user's main script again in each child.
PROGRAM = (
    "import json, sys; told = json.loads(sys.argv[1]); sys.path[:] = told.pop('path'); "
    "from vidrial.build.processes import serve; serve(**told)"
)
# How often a child looks whether its parent is still there.
FOLLOW_SECONDS = 0.2


class Ended(Exception):
    """A process gave no answer: `late`, and was stopped for that; else `how` it ended, with its last words."""

    def __init__(self, late: bool, how: str) -> None:
        super().__init__(how)
        self.late, self.how = late, how


class Child:
    """A process of its own session, so that Ctrl-C reaches this one alone, which then ends its children.

    Args:
        target: `module:function`, called there as function(send, *arguments); it returns what makes a request its reply. `send` sends a
            message before that.
        environment: by default this process's.
        folder: whether the last argument is the path of a folder, the child's own and gone with it.
    """

    def __init__(self, target: str, *arguments: str, environment: Mapping[str, str] | None = None, folder: bool = False) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        # Without a name: nothing is left where this process and the child are killed together, as Ray does it.
        self._last_words = tempfile.TemporaryFile()  # noqa: SIM115
        self._folders = [tempfile.mkdtemp(prefix="vidrial-child-")] if folder else []
        self.deadline = 0.0
        told = {"descriptor": theirs.fileno(), "parent": os.getpid(), "target": target, "arguments": arguments, "folders": self._folders}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps({**told, "path": sys.path})],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stderr=self._last_words,
            env=environment,
            start_new_session=True,
        )
        theirs.close()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def ask(self, request: Any, seconds: float) -> None:
        """Send a request that is to be answered within `seconds`."""
        self.deadline = time.monotonic() + seconds
        with contextlib.suppress(OSError):  # it is gone: receive() says how it ended
            self._connection.send_bytes(json.dumps(request).encode())

    def receive(self) -> Any:
        """Its next message, once `ready` has named it.

        Raises:
            Ended: there is none; the process is stopped.
        """
        late = not self._connection.poll() and self.alive
        if not late:
            try:
                return json.loads(self._connection.recv_bytes())
            except (EOFError, ConnectionResetError):
                pass
        else:
            self.process.kill()
        code = self.process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._last_words.seek(0)
        lines = self._last_words.read().decode(errors="replace").strip().splitlines()
        self.stop()
        raise Ended(late, ": ".join([how, *lines[-1:]]))

    def stop(self) -> None:
        """End the process, whatever it is doing, and remove its folder."""
        self.process.kill()
        self.process.wait()
        self._connection.close()
        self._last_words.close()
        _remove(self._folders)


def ready(children: Collection[Child]) -> list[Child]:
    """Those that have a message, have ended or are out of time; waits until there is one."""
    soonest = min(child.deadline for child in children)
    found = multiprocessing.connection.wait([child._connection for child in children], max(0.0, soonest - time.monotonic()))
    now = time.monotonic()
    return [child for child in children if child._connection in found or child.deadline <= now]


def serve(descriptor: int, parent: int, target: str, arguments: list[str], folders: list[str]) -> None:
    """A child's whole life: requests that arrive, until the connection closes or the parent is gone."""
    threading.Thread(target=_follow_parent, args=(parent, folders), daemon=True).start()
    connection = multiprocessing.connection.Connection(descriptor)

    def send(message: Any) -> None:
        connection.send_bytes(json.dumps(message).encode())

    module, _, function = target.partition(":")
    answer = getattr(importlib.import_module(module), function)(send, *arguments, *folders)
    try:
        while True:
            send(answer(json.loads(connection.recv_bytes())))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        _remove(folders)


def _follow_parent(parent: int, folders: list[str]) -> None:
    while os.getppid() == parent:
        time.sleep(FOLLOW_SECONDS)
    _remove(folders)
    os._exit(1)


def _remove(folders: list[str]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
