"""Source text to cubin by NVRTC, which needs neither a GPU nor a driver; and a pool of processes that compiles many."""

from __future__ import annotations

import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from vidrial.device import arch_name
from vidrial.errors import CompileError, VidrialError
from vidrial.settings import Settings
from vidrial.store import Store, binary_key
from vidrial.toolchain import Toolchain, nvrtc

# NOTE: without --no-cache NVRTC has a cache of its own beside the driver's, and what comes out of that says nothing of registers and spills.
OPTIONS = ("-std=c++17", "-default-device", "--ptxas-options=-v", "--no-cache")
# The default heap of 256 MB is too small where a kernel includes much of CuTe: then nothing is precompiled and the source compiles twice.
PCH_HEAP_BYTES = 1 << 29
# Suppressed: the remark that nothing after a #line can be precompiled.
PCH_OPTIONS = ("--pch", "--pch-messages=false", "-diag-suppress=20283")
HEADER_STOP = "#pragma nv_hdrstop\n"
# A compile asks for the same memory as the one before: kept by malloc, in large pages, it costs 4 % less time. Other C libraries ignore this.
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.top_pad=16777216:glibc.malloc.trim_threshold=4294967296"
TIMEOUT_SECONDS = 120.0

_ERROR = re.compile(r"^(?P<file>[^\s(][^(\n]*)\((?P<line>\d+)\): (?:catastrophic )?error(?: #[\w-]+)?: (?P<text>.*)$", re.MULTILINE)
_INSTANTIATED = re.compile(r'at line (\d+) of "?([^"\n]+?)"?$', re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Resources:
    """What ptxas says that one thread, or one CTA, of a kernel takes: registers, and bytes."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    static_smem: int

    @classmethod
    def parse(cls, log: str) -> Resources:
        """The largest of each figure in a log of `--ptxas-options=-v`; a source has one kernel as a rule."""

        def largest(pattern: str) -> int:
            return max((int(n) for n in re.findall(pattern, log)), default=0)

        return cls(
            registers=largest(r"Used (\d+) registers"),
            stack=largest(r"(\d+) bytes stack frame"),
            spill_stores=largest(r"(\d+) bytes spill stores"),
            spill_loads=largest(r"(\d+) bytes spill loads"),
            static_smem=largest(r"(\d+) bytes smem"),
        )


@dataclasses.dataclass(frozen=True)
class Cubin:
    """A compiled kernel: the ELF image, what it takes, NVRTC's log, and the seconds that it took to compile."""

    image: bytes
    arch: str
    resources: Resources
    log: str
    seconds: float


class Job(NamedTuple):
    """One source for `CompilePool`; `config` is only shown in errors."""

    key: Hashable
    source: str
    name: str
    arch: str
    config: str = ""
    includes: tuple[str, ...] = ()


def cubin_key(source: str, arch: str) -> str:
    """The key under which a Store keeps the cubin of `source`.

    Raises:
        ToolchainError: NVRTC or a header is missing.
    """
    return binary_key(source, arch_name(arch), OPTIONS, Toolchain.find().version)


def compile_source(source: str, name: str, arch: str, *, pch: str | None = None, config: str = "", includes: tuple[str, ...] = ()) -> Cubin:
    """Compile one source for `arch` (`sm_80`, `sm_90a`; `sm_90` means `sm_90a`).

    `name` and `config` appear in errors. `pch` is a folder of this process alone for precompiled headers: what is included before
    `#pragma nv_hdrstop` is then parsed once. `includes` are folders to search before the toolchain's.

    Raises:
        CompileError: the source does not compile; names the template's line, and where the whole log is.
        ToolchainError: NVRTC or a header is missing.
    """
    binding, toolchain, arch = nvrtc(), Toolchain.find(), arch_name(arch)
    options = [f"--gpu-architecture={arch}", *(f"-I{folder}" for folder in (*includes, *toolchain.includes)), *OPTIONS]
    if pch is not None:
        _reserve_pch_heap()
        folder = Path(pch, arch)
        folder.mkdir(parents=True, exist_ok=True)
        options += [*PCH_OPTIONS, f"--pch-dir={folder}"]
    start = time.perf_counter()
    program = binding.createProgram(source if pch is None else _headers_first(source), "kernel.cu", [], [])
    try:
        binding.compileProgram(program, options)
        # NOTE: CuPy drops the image's last byte.
        image = binding.getCUBIN(program) + b"\0"
        log = binding.getProgramLog(program).rstrip("\0\n")
    except binding.NVRTCError as error:
        log = binding.getProgramLog(program).rstrip("\0\n") or str(error)
        raise CompileError(_explain(log, f"{name} for {arch}", source, config)) from None
    finally:
        binding.destroyProgram(program)
    return Cubin(image, arch, Resources.parse(log), log, time.perf_counter() - start)


def _explain(log: str, title: str, source: str, config: str) -> str:
    """The first error of a log, where its cause stands in the template, the config, and where the whole log is."""
    found = _ERROR.search(log)
    if found:
        place, following = f"{found['file']}:{found['line']}", _ERROR.search(log, found.end())
        users = _INSTANTIATED.findall(log, found.end(), following.start() if following else len(log))
        lines = [f"{title} does not compile: {found['text']}", f"at {place}"]
        if users:
            lines.append(f"used at {users[-1][1]}:{users[-1][0]}")
    else:
        first = next((line for line in log.splitlines() if "error" in line.lower()), log.partition("\n")[0])
        lines = [f"{title} does not compile: {first}"]
    if config:
        lines.append(f"config: {config}")
    saved = Store.shared().save_failure(source, log)
    lines.append(f"whole log and source: {saved}" if saved else f"whole log:\n{log}")
    return "\n  ".join(lines)


def _headers_first(source: str) -> str:
    """The source with a copy of the includes before `#pragma nv_hdrstop` at its top: a #line above them forbids precompiling them."""
    head, stop, body = source.partition(HEADER_STOP)
    if not stop:
        return source
    includes = [line for line in head.splitlines() if line.startswith("#include")]
    return "\n".join(includes) + f'\n{HEADER_STOP}#line 1 "kernel.cu"\n{head}\n{body}'


def worker_environment() -> dict[str, str]:
    """The environment of a process that compiles many; what GLIBC_TUNABLES says already counts more."""
    return os.environ | {"GLIBC_TUNABLES": ":".join(filter(None, (MALLOC, os.environ.get("GLIBC_TUNABLES"))))}


@lru_cache
def _reserve_pch_heap() -> None:
    """Enlarge the heap of precompiled headers, in the very library that CuPy loaded, before it first compiles."""
    import ctypes

    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split()[-1]
        if re.search(r"/libnvrtc\.so[.\d]*$", path):
            ctypes.CDLL(path).nvrtcSetPCHHeapSize(ctypes.c_size_t(PCH_HEAP_BYTES))
            return


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
    PROGRAM = "import sys; sys.path[:] = sys.argv[4:]; from vidrial.compile import serve; serve(*sys.argv[1:4])"

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
