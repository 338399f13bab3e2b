"""A pool of processes that compile, because NVRTC serialises the compiles of one process."""

from __future__ import annotations

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
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from typing import NamedTuple

from vidrial.build.nvrtc import (
    Cubin,
    compile_source,
)
from vidrial.errors import CompileError, VidrialError
from vidrial.settings import Settings

# A compile asks for the same memory as the one before: kept by malloc, in large pages, it costs 4 % less time. Other C libraries ignore this.
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.top_pad=16777216:glibc.malloc.trim_threshold=4294967296"
TIMEOUT_SECONDS = 120.0


class Job(NamedTuple):
    """One source for `CompilePool`; `config` is only shown in errors."""

    key: Hashable
    source: str
    name: str
    arch: str
    config: str = ""
    includes: tuple[str, ...] = ()


def worker_environment() -> dict[str, str]:
    """The environment of a process that compiles many; what GLIBC_TUNABLES says already counts more."""
    return os.environ | {"GLIBC_TUNABLES": ":".join(filter(None, (MALLOC, os.environ.get("GLIBC_TUNABLES"))))}


class CompilePool:
    """Compiles in `jobs` long-lived processes, because NVRTC serialises the compiles of one process.

    Processes start when first needed and die with this one. A process that crashes or exceeds `timeout` seconds costs its
    job a `CompileError` and is replaced. A pool serves one `compile_many` at a time; use it as a context manager.
    """

    def __init__(self, jobs: int | None = None, timeout: float = TIMEOUT_SECONDS) -> None:
        self.jobs = jobs or Settings.read().jobs
        self.timeout = timeout
        self._idle: list[_Worker] = []

    def compile_many(self, jobs: Iterable[tuple[Hashable, str, str, str] | Job]) -> Iterator[tuple[Hashable, Cubin | CompileError]]:
        """Compile (key, source, name, arch[, config, includes]) and yield (key, Cubin or CompileError) as they finish, in any order.

        Raises:
            ToolchainError: NVRTC or a header is missing.
        """
        pending = deque(Job(*job) for job in jobs)
        busy: dict[multiprocessing.connection.Connection, _Worker] = {}
        try:
            while pending or busy:
                while pending and len(busy) < self.jobs:
                    worker = self._take()
                    worker.start(pending.popleft())
                    busy[worker.connection] = worker
                soonest = min(worker.started for worker in busy.values()) + self.timeout
                ready = multiprocessing.connection.wait(busy, max(0.0, soonest - time.monotonic()))
                finished = [busy[c] for c in busy if c in ready]
                finished = finished or [w for w in busy.values() if time.monotonic() - w.started >= self.timeout]
                for worker in finished:
                    del busy[worker.connection]
                    job, result = worker.job, worker.result(self.timeout)
                    if worker.alive:
                        self._idle.append(worker)
                    if not isinstance(result, Cubin | CompileError):
                        raise result
                    yield job.key, result
        finally:
            for worker in busy.values():
                worker.stop()

    def close(self) -> None:
        """End the processes and remove what they left."""
        while self._idle:
            self._idle.pop().stop()

    def __enter__(self) -> CompilePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self) -> _Worker:
        while self._idle:
            worker = self._idle.pop()
            if worker.process.poll() is None:
                return worker
            worker.stop()
        return _Worker()


class _Worker:
    """A process that compiles one job at a time; the folder of its precompiled headers is its own."""

    # NOTE: not multiprocessing.Process: it would run the user's main script again in each child.
    PROGRAM = "import sys; sys.path[:] = sys.argv[4:]; from vidrial.build.pool import serve; serve(*sys.argv[1:4])"

    def __init__(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        self.folder = tempfile.mkdtemp(prefix="vidrial-pch-")
        arguments = [str(theirs.fileno()), str(os.getpid()), self.folder]
        # A session of its own: Ctrl-C reaches this process only, which then ends its workers.
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM, *arguments, *sys.path],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=worker_environment(),
            start_new_session=True,
        )
        theirs.close()
        self.alive = True
        self.started = 0.0
        self.job = Job("", "", "", "")

    def start(self, job: Job) -> None:
        self.job, self.started = job, time.monotonic()
        try:
            self.connection.send(tuple(job[1:]))
        except OSError:
            self.process.kill()  # result() then reports how it ended

    def result(self, timeout: float) -> VidrialError | Cubin:
        """The job's outcome, once the connection is readable or the time is over."""
        late = not self.connection.poll()
        if not late:
            try:
                answer: VidrialError | Cubin = self.connection.recv()
                return answer
            except (EOFError, ConnectionResetError):
                pass
        else:
            self.process.kill()
        code = self.process.wait()
        self.stop()
        how = f"took more than {timeout:g} s and was stopped" if late else f"ended its compiler: {_ending(code)}"
        about = f"\n  config: {self.job.config}" if self.job.config else ""
        return CompileError(f"{self.job.name} for {self.job.arch} {how}. Reject this config, or compile it alone to see more{about}")

    def stop(self) -> None:
        self.alive = False
        self.process.kill()
        self.process.wait()
        self.connection.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def serve(descriptor: str, parent: str, folder: str) -> None:
    """A worker's whole life: compile what arrives, until the connection closes or the parent is gone."""
    threading.Thread(target=_follow_parent, args=(int(parent), folder), daemon=True).start()
    connection = multiprocessing.connection.Connection(int(descriptor))
    try:
        while True:
            source, name, arch, config, includes = connection.recv()
            try:
                connection.send(compile_source(source, name, arch, pch=folder, config=config, includes=includes))
            except VidrialError as error:
                connection.send(error)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        shutil.rmtree(folder, ignore_errors=True)


def _follow_parent(parent: int, folder: str) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
