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
import multiprocessing.connection
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

# NOTE: not multiprocessing.Process: it would run the user's main script again in each child.
PROGRAM = (
    "import json, sys; told = json.loads(sys.argv[1]); sys.path[:] = told.pop('path'); "
    "from vidrial.build.processes import serve; serve(**told)"
)
# How often a child looks whether its parent is still there; how long one that has hung up, or was killed, may take to be gone.
FOLLOW_SECONDS, END_SECONDS = 0.2, 5.0
PIECE = 1 << 20


class Ended(Exception):
    """A process gave no answer: `late`, and was stopped for that; else `how` it ended, with its last words.

    `raised`: the traceback of an exception of its own, "" if something else ended it.
    """

    def __init__(self, late: bool, how: str, raised: str = "") -> None:
        super().__init__(how)
        self.late, self.how, self.raised = late, how, raised


class Child:
    """A process of its own session, so that Ctrl-C reaches this one alone, which then ends its children.

    Messages are lines of JSON. Nothing here waits for a line's end, or for the process to read one, beyond the time it has.

    Args:
        target: `module:function`, called there as function(send, *arguments); it returns what makes a request its reply. `send` sends a
            message before that.
        environment: by default this process's.
        folder: whether the last argument is the path of a folder, the child's own and gone with it.
    """

    def __init__(self, target: str, *arguments: str, environment: Mapping[str, str] | None = None, folder: bool = False) -> None:
        self._socket, theirs = socket.socketpair()
        # Without a name: nothing is left where this process and the child are killed together, as Ray does it.
        self._last_words = tempfile.TemporaryFile()  # noqa: SIM115
        self._folders = [tempfile.mkdtemp(prefix="vidrial-child-")] if folder else []
        self._received, self._closed = bytearray(), False
        self._parent = os.getpid()
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

    @property
    def done(self) -> bool:
        """Whether `receive` has something to say: a message, an end, or that it is late."""
        return b"\n" in self._received or self._closed or time.monotonic() >= self.deadline

    def fileno(self) -> int:
        """What becomes readable when the process says something or ends."""
        return self._socket.fileno()

    def ask(self, request: Any, seconds: float) -> None:
        """Send a request that is to be answered within `seconds`."""
        self.deadline = time.monotonic() + seconds
        self._socket.settimeout(seconds)
        with contextlib.suppress(OSError):  # it is gone, or does not read: receive() says so
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        self._socket.setblocking(False)

    def read(self) -> None:
        """Take what has arrived, without waiting."""
        try:
            piece = self._socket.recv(PIECE)
        except BlockingIOError:
            return
        except ConnectionResetError:
            piece = b""
        self._received += piece
        self._closed = not piece

    def receive(self) -> Any:
        """Its next message, once `ready` has named it.

        Raises:
            Ended: there is none; the process is stopped.
        """
        self.read()
        line, end, rest = self._received.partition(b"\n")
        message = json.loads(line) if end else {}
        if end and not (isinstance(message, dict) and "raised" in message):
            self._received = rest
            return message
        late = not end and not self._closed and self.alive
        if not late:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_SECONDS)
        self._kill()
        how = _ending(self.process.returncode)
        self._last_words.seek(0)
        lines = self._last_words.read().decode(errors="replace").strip().splitlines()
        self.stop()
        raised = message.get("raised", "")
        raise Ended(late, ": ".join([how, *(raised.strip() or "\n".join(lines)).splitlines()[-1:]]), raised)

    def stop(self) -> None:
        """End the process, whatever it is doing, and remove its folder; in a forked child of this process, let go of it alone."""
        self._socket.close()
        self._last_words.close()
        if os.getpid() == self._parent:
            self._kill()
            _remove(self._folders)

    def _kill(self) -> None:
        """End the process with all that it has begun, and wait for that, but not for one that hangs in the kernel."""
        if self.alive:
            os.killpg(self.process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_SECONDS)


def _ending(code: int | None) -> str:
    """How a process ended, by its return code."""
    if code is None:
        return "nothing that could be waited for"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def ready(children: Collection[Child]) -> list[Child]:
    """Those that have a message, have ended or are out of time; waits until there is one."""
    while not (found := [child for child in children if child.done]):
        soonest = min(child.deadline for child in children)
        by_socket = {child.fileno(): child for child in children}
        for descriptor in multiprocessing.connection.wait(list(by_socket), max(0.0, soonest - time.monotonic())):
            if isinstance(descriptor, int):
                by_socket[descriptor].read()
    return found


def serve(descriptor: int, parent: int, target: str, arguments: list[str], folders: list[str]) -> None:
    """A child's whole life: requests that arrive, until the connection closes or the parent is gone."""
    threading.Thread(target=_follow_parent, args=(parent, folders), daemon=True).start()
    connection = socket.socket(fileno=descriptor)
    requests = connection.makefile("rb")

    def send(message: Any) -> None:
        connection.sendall(json.dumps(message).encode() + b"\n")

    module, _, function = target.partition(":")
    with contextlib.suppress(BrokenPipeError, ConnectionResetError), _told(send):
        answer = getattr(importlib.import_module(module), function)(send, *arguments, *folders)
        while (line := requests.readline()).endswith(b"\n"):
            send(answer(json.loads(line)))
    _remove(folders)


@contextlib.contextmanager
def _told(send: Callable[[Any], None]) -> Iterator[None]:
    """An exception, which ends this process, is told to the parent."""
    with contextlib.ExitStack() as stack:
        stack.push(lambda kind, error, _: send({"raised": "".join(traceback.format_exception(error))}) if error is not None else None)
        yield


def _follow_parent(parent: int, folders: list[str]) -> None:
    while os.getppid() == parent:
        time.sleep(FOLLOW_SECONDS)
    _remove(folders)
    os._exit(1)


def _remove(folders: list[str]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
