"""A pool of processes that compile: each keeps its precompiled headers, and one that crashes or hangs costs its job alone."""

from __future__ import annotations

import base64
import functools
import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from vidrial import errors
from vidrial.build.files import Closing
from vidrial.build.nvrtc import Cubin, Resources, compile_source
from vidrial.build.processes import Child, Ended, ready
from vidrial.errors import CompileError, CompileStopped, ToolchainError, VidrialError
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

    @property
    def request(self) -> dict[str, Any]:
        """The job as JSON, without its key."""
        return {name: value for name, value in self._asdict().items() if name != "key"}


def answer(request: Mapping[str, Any], pch: str | None = None) -> dict[str, Any]:
    """Compile a job's request: the cubin as JSON, or the error."""
    try:
        cubin = compile_source(**request, pch=pch)
    except VidrialError as error:
        return {"error": type(error).__name__, "text": str(error)}
    return asdict(cubin) | {"image": base64.b64encode(cubin.image).decode()}


def result(reply: Mapping[str, Any]) -> Cubin | CompileError:
    """What `answer` replied.

    Raises:
        ToolchainError: NVRTC or a header is missing there.
    """
    if "error" in reply:
        error: VidrialError = getattr(errors, reply["error"])(reply["text"])
        if isinstance(error, CompileError):
            return error
        raise error
    return Cubin(**{**reply, "image": base64.b64decode(reply["image"]), "resources": Resources(**reply["resources"])})


def server(_: Callable[[Any], None], folder: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What answers in a compiling process; the folder of its precompiled headers is its own."""
    return functools.partial(answer, pch=folder)


def worker_environment() -> dict[str, str]:
    """The environment of a process that compiles many; what GLIBC_TUNABLES says already counts more."""
    return os.environ | {"GLIBC_TUNABLES": ":".join(filter(None, (MALLOC, os.environ.get("GLIBC_TUNABLES"))))}


class CompilePool(Closing):
    """Compiles in `jobs` long-lived processes.

    Processes start when first needed and die with this one. A process that crashes or exceeds `timeout` seconds costs its
    job a `CompileStopped` and is replaced. A pool serves one `compile_many` at a time; use it as a context manager.
    """

    def __init__(self, jobs: int | None = None, timeout: float = TIMEOUT_SECONDS) -> None:
        self.jobs = jobs or Settings.read().jobs
        self.timeout = timeout
        self._idle: list[Child] = []

    def compile_many(self, jobs: Iterable[tuple[Hashable, str, str, str] | Job]) -> Iterator[tuple[Hashable, Cubin | CompileError]]:
        """Compile (key, source, name, arch[, config, includes]) and yield (key, Cubin or CompileError) as they finish, in any order.

        Raises:
            ToolchainError: NVRTC or a header is missing, or a process met an exception of its own.
        """
        pending, busy = deque(Job(*job) for job in jobs), dict[Child, Job]()
        try:
            while pending or busy:
                while pending and len(busy) < self.jobs:
                    child, job = self._take(), pending.popleft()
                    child.ask(job.request, self.timeout)
                    busy[child] = job
                for child in ready(busy):
                    job = busy.pop(child)
                    try:
                        reply = child.receive()
                    except Ended as error:
                        yield job.key, self._ended(job, error)
                        continue
                    self._idle.append(child)
                    yield job.key, result(reply)
        finally:
            for child in busy:
                child.stop()

    def close(self) -> None:
        """End the processes and remove what they left."""
        while self._idle:
            self._idle.pop().stop()

    def _take(self) -> Child:
        while self._idle:
            child = self._idle.pop()
            if child.alive:
                return child
            child.stop()
        return Child("vidrial.build.pool:server", environment=worker_environment(), folder=True)

    def _ended(self, job: Job, error: Ended) -> CompileError:
        if error.raised:
            failed = ToolchainError(f"a compiling process failed, whatever it was to compile: {error.how}")
            failed.add_note(f"there: {error.raised}")
            raise failed
        how = f"took more than {self.timeout:g} s and was stopped" if error.late else f"ended its compiler: {error.how}"
        about = f"\n  config: {job.config}" if job.config else ""
        return CompileStopped(f"{job.name} for {job.arch} {how}. Reject this config, or compile it alone to see more{about}")
