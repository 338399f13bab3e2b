"""The CPU target: a rendered source compiled by g++, unchanged, and run one CTA at a time in a process of its own.

    binary = compile_host(source, "gemm")
    stats = binary.launch((m // 128, n // 128, 1), 128, smem_bytes, packed, {0: a, 8: b, 16: c})

Whatever a kernel does wrong ends as a LaunchError that names its line and its threads: every launch is a fresh process with a
time limit, so a crash, a deadlock or an endless loop never reaches the caller.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidrial.errors import ArgumentError, CompileError, LaunchError, ToolchainError
from vidrial.host_report import crash, resolve
from vidrial.store import Store, binary_key
from vidrial.toolchain import HostCompiler, Toolchain

if TYPE_CHECKING:
    import numpy as np

# Uninitialised registers get a pattern instead of whatever was there: GCC and Clang have that since these versions.
OLDEST = {"g++": 12, "clang++": 16}
FLAGS = ("-std=c++17", "-g1", "-fPIE", "-pie", "-fno-strict-aliasing", "-ftrivial-auto-var-init=pattern", "-w")
SANITIZERS: dict[str | None, tuple[str, ...]] = {
    None: (),
    "address": ("-fsanitize=address", "-fno-omit-frame-pointer"),
    "thread": ("-fsanitize=thread",),
    "undefined": ("-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero", "-fno-sanitize-recover=all"),
}
COMPILE_SECONDS = 600
# The process is killed this long after its own time limit, which tells where it was.
GRACE_SECONDS = 5.0
MAX_THREADS, MAX_SHARED_BYTES, MAX_PACKED_BYTES, ARRAY_ALIGNMENT = 1024, 227 << 10, 4096, 256
PCH_KEPT = 6
PAYLOAD = "kernel.host"

_ERROR = re.compile(r"^(?P<place>[^\s:][^:\n]*:\d+)(?::\d+)?: (?:fatal )?error: (?P<text>.*)$", re.MULTILINE)
_REQUIRED = re.compile(r"^([^\s:][^:\n]*:\d+)(?::\d+)?:\s+required from here$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the threads of a CTA take turns, and for how long.

    `lazy`: cp.async lands at the wait (NaN until then), else at once. `order`: which runnable lane goes on, `up`, `down` or a
    random seed. `timeout`: seconds a launch.
    """

    lazy: bool = True
    order: str | int = "up"
    timeout: float = 60.0

    @property
    def code(self) -> int:
        """The order as the runtime takes it: 0 up, 1 down, else a seed.

        Raises:
            ArgumentError: the order is not known.
        """
        if isinstance(self.order, int) and 0 <= self.order < 2**32 - 2:
            return self.order + 2
        if self.order in ("up", "down"):
            return ("up", "down").index(self.order)
        raise ArgumentError(f'order {self.order!r}: accepted are "up", "down" and a seed of at least 0')


# A kernel that is right under one schedule may be wrong under another: tests run them all.
SCHEDULES = (Schedule(), Schedule(lazy=False, order="down"), Schedule(order=5))


@dataclasses.dataclass(frozen=True)
class HostStats:
    """What a launch did, in all CTAs together; `seconds` are the CPU's and say nothing about a GPU.

    `ldmatrix_conflicts`: passes over the banks beyond one a matrix. `cp_async_sectors`: 32-byte sectors read by `cp_async_requests`
    warp-wide cp.async. `cp_async_bytes`: read from global memory. `shared_memory_high_water`: dynamic bytes up to the last one written.
    """

    switches: int
    mma: int
    ldmatrix: int
    ldmatrix_conflicts: int
    cp_async_requests: int
    cp_async_sectors: int
    cp_async_bytes: int
    shared_memory_high_water: int
    seconds: float


STATS, REQUEST, LENGTH = struct.Struct("=8qd"), struct.Struct("=3I3IIId4Q"), struct.Struct("=q")


@dataclasses.dataclass(frozen=True)
class HostBinary:
    """A kernel compiled for the CPU: an executable, which lives as long as this process."""

    name: str
    executable: Path

    def launch(self, grid: Sequence[int], block: int | Sequence[int], shared_bytes: int, packed: bytes | bytearray,
               pointers: Mapping[int, np.ndarray[Any, Any]], schedule: Schedule = SCHEDULES[0]) -> HostStats:
        """Run every CTA of `grid` and write what the kernel changed back into the arrays.

        Args:
            grid: CTAs along x, y, z.
            block: threads of a CTA, or threads along x, y, z.
            shared_bytes: dynamic shared memory of a CTA.
            packed: the parameters' bytes, laid out as a struct of them; pointers are filled in.
            pointers: offset in `packed` -> the array whose address goes there. Any strides; the address modulo 256 is that of the
                array's first element in the array that owns the memory, as if that had come from the GPU's allocator.
            schedule: turns of the threads, landing of cp.async, time limit.

        Raises:
            ArgumentError: a size that CUDA does not allow, a pointer outside of `packed`, arrays that overlap in part.
            LaunchError: the kernel crashed, deadlocked, ran out of time, left its memory or wrote to a read-only array.
        """
        threads = _three("block", block)
        blocks = _three("grid", grid)
        if not 1 <= threads[0] * threads[1] * threads[2] <= MAX_THREADS:
            raise ArgumentError(f"block {threads} has {threads[0] * threads[1] * threads[2]} threads; accepted are 1 to {MAX_THREADS}")
        if not 0 <= shared_bytes <= MAX_SHARED_BYTES:
            raise ArgumentError(f"{shared_bytes} bytes of shared memory; accepted are 0 to {MAX_SHARED_BYTES}")
        if len(packed) > MAX_PACKED_BYTES:
            raise ArgumentError(f"{len(packed)} bytes of arguments; accepted are up to {MAX_PACKED_BYTES}")
        memory = Memory(pointers, len(packed))
        head = REQUEST.pack(*blocks, *threads, schedule.lazy, schedule.code, schedule.timeout,
                            shared_bytes, len(packed), len(memory.views), len(pointers))
        return self._run(b"".join((head, packed, memory.tables, *memory.views)), memory, schedule.timeout)

    def _run(self, request: bytes, memory: Memory, timeout: float) -> HostStats:
        try:
            ended = _execute([str(self.executable)], request, timeout + GRACE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise LaunchError(f"kernel {self.name} did not end within {timeout:g} s and had to be killed: look for an endless loop; "
                              "or give it a longer Schedule.timeout") from error
        reply, errors = ended.stdout, ended.stderr.decode(errors="replace")
        if ended.returncode or len(reply) < STATS.size + LENGTH.size:
            raise LaunchError(f"kernel {self.name}: {crash(self.executable, ended.returncode, errors)}")
        length, = LENGTH.unpack_from(reply, STATS.size)
        start = STATS.size + LENGTH.size
        if length:
            raise LaunchError(f"kernel {self.name}: {resolve(self.executable, reply[start:start + length].decode(errors='replace'))}")
        memory.write_back(self.name, memoryview(reply)[start:])
        return HostStats(*STATS.unpack_from(reply))


class Memory:
    """The arrays of one launch: what the process allocates, and where their addresses go."""

    def __init__(self, pointers: Mapping[int, np.ndarray[Any, Any]], packed_bytes: int) -> None:
        import numpy as np

        self.views: list[memoryview] = []
        self._arrays: list[np.ndarray[Any, Any]] = []
        entries, places = b"", b""
        for offset, array in pointers.items():
            if not 0 <= offset <= packed_bytes - 8:
                raise ArgumentError(f"pointer at offset {offset}: the arguments have {packed_bytes} bytes")
            low, high = np.lib.array_utils.byte_bounds(array)
            known = next((i for i, other in enumerate(self._arrays) if _extent(other) == (low, high)), None)
            if known is None:
                clash = next((other for other in self._arrays if np.may_share_memory(array, other)), None)
                if clash is not None:
                    raise ArgumentError(f"the array at offset {offset} overlaps another one in part; pass the same array twice, or copies")
                known = len(self._arrays)
                self._arrays.append(array)
                self.views.append(_bytes_at(low, high - low))
                entries += struct.pack("=2Q", high - low, (low - _owner(array).ctypes.data) % ARRAY_ALIGNMENT)
            places += struct.pack("=3Q", offset, known, array.ctypes.data - low)
        self.tables = entries + places

    def write_back(self, kernel: str, changed: memoryview) -> None:
        """Copy the arrays that the kernel changed, each after its index, into the caller's.

        Raises:
            LaunchError: one of them is read-only.
        """
        while changed:
            index, = LENGTH.unpack_from(changed)
            view, array = self.views[index], self._arrays[index]
            if not array.flags.writeable:
                raise LaunchError(f"kernel {kernel} wrote to array {index}, {array.dtype}{list(array.shape)}, which is read-only")
            view[:] = changed[LENGTH.size:LENGTH.size + len(view)]
            changed = changed[LENGTH.size + len(view):]


def compile_host(source: str, name: str, *, sanitizer: str | None = None, optimise: str = "-O1", pch: bool = True,
                 include_dirs: Sequence[Path | str] = (), store: Store | None = None) -> HostBinary:
    """Compile kernel `name` of a rendered source for the CPU.

    Args:
        sanitizer: None, `address` (memory), `thread` (races between the threads of a CTA) or `undefined` (alignment, shifts, ...).
        optimise: -O1 compiles and runs fastest altogether.
        pch: precompile what all kernels include, once a set of flags (5 s), in the store's folder.
        include_dirs: folders of the template's own headers, searched after Vidrial's.
        store: keeps the executable; by default the one of this process.

    Raises:
        CompileError: g++ rejects the source; names the template's line.
        ToolchainError: there is no host compiler, it is too old, or headers are missing.
        ArgumentError: the sanitizer is not known.
    """
    if sanitizer not in SANITIZERS:
        raise ArgumentError(f"sanitizer {sanitizer!r}: accepted are {', '.join(map(repr, SANITIZERS))}")
    store = store or Store.shared()
    compiler = _compiler(HostCompiler.find())
    flags = (optimise, *FLAGS, *SANITIZERS[sanitizer], *_shared_section(compiler, sanitizer))
    text = f'#include <vidrial/host/pch.h>\n#line 1 "{name}.cu"\n{source}\n#line 1 "/vidrial/host/entry.cu"\nint main() {{ return vidrial::host::serve(&{name}); }}\n'
    folders = [*_include_flags(), *(f"-I{folder}" for folder in include_dirs)]
    key = binary_key(text, "host", (*flags, *folders), f"{compiler.version}, {_headers_digest()}")
    found = store.get(key, PAYLOAD)
    image = found.image if found else _build(compiler, text, name, [*_precompiled(compiler, flags, store, pch), *flags, *folders])
    if not found:
        store.put(key, image, text, {"kernel": name, "sanitizer": sanitizer}, PAYLOAD)
    executable = _folder() / key[:32]
    if not executable.exists():
        _write_executable(executable, image)
    return HostBinary(name, executable)


def _build(compiler: HostCompiler, text: str, name: str, flags: list[str]) -> bytes:
    """The executable's bytes.

    Raises:
        CompileError: the compiler rejects the source.
    """
    with tempfile.TemporaryDirectory(prefix="vidrial-host-") as folder:
        # Places are then relative, whatever folder this is.
        command = [compiler.path, *flags, f"-fdebug-prefix-map={folder}=.", "-fdiagnostics-color=never", "-x", "c++", "-", "-o", "kernel"]
        ended = _execute(command, text.encode(), COMPILE_SECONDS, cwd=folder)
        log = ended.stderr.decode(errors="replace")
        if ended.returncode:
            raise CompileError(_explain(log, name))
        return Path(folder, "kernel").read_bytes()


def _explain(log: str, name: str) -> str:
    """The first error of a log, and where the template caused it."""
    found = _ERROR.search(log)
    if found is None:
        return f"{name} does not compile for the host:\n{log}"
    lines = [f"{name} does not compile for the host: {found['text']}", f"at {found['place']}"]
    users = _REQUIRED.findall(log, 0, found.start())
    if users:
        lines.append(f"used at {users[-1]}")
    return "\n  ".join(lines) + f"\nwhole log:\n{log}"


def _precompiled(compiler: HostCompiler, flags: tuple[str, ...], store: Store, wanted: bool) -> list[str]:
    """The include flag under which the compiler finds the precompiled header, which is made if it is not there.

    Clang would need another mechanism, and a folder that cannot be written no mistake: both go without.
    """
    if not wanted or "clang" in compiler.version:
        return []
    key = hashlib.sha256("\0".join((*flags, *_include_flags(), compiler.version, _headers_digest())).encode()).hexdigest()[:32]
    shelf = store.root / "pch"
    folder = shelf / key
    if not folder.is_dir():
        staged = shelf / f".{uuid.uuid4().hex}"
        header = staged / "vidrial/host/pch.h.gch"
        try:
            header.parent.mkdir(parents=True, mode=0o700)
            # NOTE: with a TemporaryDirectory of another file system the rename would fail.
            _execute([compiler.path, *flags, *_include_flags(), "-x", "c++-header", "-", "-o", str(header)], b"#include <vidrial/host/pch.h>\n", COMPILE_SECONDS)
            os.rename(staged, folder)
        except OSError:
            shutil.rmtree(staged, ignore_errors=True)
        for old in sorted(shelf.glob("[0-9a-f]*"), key=lambda path: path.stat().st_mtime)[:-PCH_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    return [f"-I{folder}"]


def _include_flags() -> list[str]:
    toolchain = Toolchain.find()
    host = toolchain.vidrial_include / "vidrial/host"
    return [f"-I{host}/shadow", f"-I{host}/stubs", f"-I{toolchain.vidrial_include}",
            *(flag for folder in toolchain.includes[1:] for flag in ("-isystem", str(folder)))]


@lru_cache
def _headers_digest() -> str:
    """Digest of the runtime's own headers and the versions of the others."""
    toolchain = Toolchain.find()
    digest = hashlib.sha256(f"{toolchain.cutlass_version} {toolchain.cccl_version}".encode())
    include = toolchain.vidrial_include
    for path in sorted(include.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(include)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@lru_cache
def _compiler(compiler: HostCompiler) -> HostCompiler:
    """`compiler`, if it is new enough.

    Raises:
        ToolchainError: it is not.
    """
    kind = "clang++" if "clang" in compiler.version else "g++"
    answer = subprocess.run([compiler.path, "-dumpversion"], capture_output=True, text=True, check=False, timeout=60).stdout.strip()
    if not answer.partition(".")[0].isdecimal() or int(answer.partition(".")[0]) < OLDEST[kind]:
        raise ToolchainError(f"{compiler.path} is {kind} {answer or 'of an unknown version'}; the host target needs {kind} {OLDEST[kind]} or later: "
                             f"apt-get install g++ (or g++-{OLDEST['g++']}, and set CXX)")
    return compiler


def _shared_section(compiler: HostCompiler, sanitizer: str | None) -> tuple[str, ...]:
    """GCC surrounds arrays of a named section, here static shared memory, by red zones only if told to."""
    return ("-fsanitize-sections=vidrial_shared",) if sanitizer == "address" and "clang" not in compiler.version else ()


def _execute(command: list[str], request: bytes, timeout: float, cwd: str | None = None) -> subprocess.CompletedProcess[bytes]:
    environment = {"LC_ALL": "C", **{name: os.environ[name] for name in ("PATH", "TMPDIR", "HOME") if name in os.environ}}
    return subprocess.run(command, input=request, capture_output=True, timeout=timeout, check=False, cwd=cwd, env=environment)


@lru_cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="vidrial-host-", ignore_cleanup_errors=True)


def _folder() -> Path:
    return Path(_temporary().name)


def _write_executable(path: Path, image: bytes) -> None:
    staged = path.with_suffix(f".{uuid.uuid4().hex}")
    staged.write_bytes(image)
    staged.chmod(0o700)
    os.replace(staged, path)


def _three(what: str, sizes: int | Sequence[int]) -> tuple[int, int, int]:
    given = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    if not 1 <= len(given) <= 3 or any(n < 1 for n in given):
        raise ArgumentError(f"{what} {sizes}: accepted are one to three sizes of at least 1")
    x, y, z = (*given, 1, 1)[:3]
    return x, y, z


def _extent(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    import numpy as np

    low, high = np.lib.array_utils.byte_bounds(array)
    return low, high


def _owner(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The array that owns the memory of a view."""
    import numpy as np

    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _bytes_at(address: int, count: int) -> memoryview:
    return memoryview((ctypes.c_char * count).from_address(address)).cast("B")
