"""g++ for the host target: flags, what all kernels have in common, and a kernel's executable."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
import uuid
from functools import lru_cache
from pathlib import Path

from vidrial.build.files import TemporaryFolder
from vidrial.build.once import once
from vidrial.build.toolchain import HostCompiler, Toolchain
from vidrial.errors import ArgumentError, CompileError, ToolchainError

# Uninitialised registers get a pattern instead of whatever was there: GCC and Clang have that since these versions.
OLDEST = {"g++": 12, "clang++": 16}
# NOTE: binutils 2.40 mistakes files in GCC's DWARF 5; -gdwarf-4 alone would mean -g2.
FLAGS = ("-std=c++17", "-gdwarf-4", "-g1", "-fPIE", "-fno-strict-aliasing", "-ftrivial-auto-var-init=pattern", "-w")
SANITIZERS: dict[str | None, tuple[str, ...]] = {
    None: (),
    "address": ("-fsanitize=address", "-fno-omit-frame-pointer"),
    "thread": ("-fsanitize=thread",),
    "undefined": ("-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero", "-fno-sanitize-recover=all"),
    # No sanitizer: the runtime's own functions are called before each access to memory, and count it.
    "accesses": ("-fsanitize=kernel-address",),
}
# What each compiler takes for calls alone, without the red zones that AddressSanitizer would check.
ACCESS_OPTIONS = ("asan-instrumentation-with-call-threshold=0", "asan-stack=0", "asan-globals=0")
COMPILE_SECONDS, BUSY_SECONDS = 600, 10
# What the compiler says, in the C locale, of a disk without room.
FULL = (b"No space left on device", b"Disk quota exceeded")
# A precompiled header takes 100 MB.
PRODUCTS_KEPT = 12
# What Vidrial's precompiled header, and the runtime, are made of, below the folder of headers.
PRECOMPILED = ("vidrial/host", "vidrial/prelude.cuh", "vidrial/arch", "vidrial/tile")
TEXT = """#include <vidrial/host/pch.h>
#line 1 "{name}.cu"
{source}
#line 1 "/vidrial/host/main.cu"
int main() {{ return vidrial::host::serve<{entry}>(); }}
"""
SHORT = {"ASAN": "address", "TSAN": "thread", "ACCESSES": "accesses"}
_ERROR = re.compile(r"^(?P<place>[^\s:][^:\n]*:\d+)(?::\d+)?: (?:fatal )?error: (?P<text>.*)$", re.MULTILINE)
_REQUIRED = re.compile(r"^([^\s:][^:\n]*:\d+)(?::\d+)?:\s+required from here$", re.MULTILINE)


class NoRoom(ToolchainError):
    """No folder can take what the compiler makes."""


@dataclasses.dataclass(frozen=True)
class Build:
    """One way to compile: compiler and flags; what all kernels have in common is compiled once and kept in `artifact_dir`."""

    compiler: HostCompiler
    sanitizer: str | None
    optimise: str
    include_dirs: tuple[str, ...]
    artifact_dir: Path

    @classmethod
    def find(cls, sanitizer: str | None, optimise: str, include_dirs: tuple[str, ...], artifact_dir: Path) -> Build:
        """With the host compiler that the settings ask for.

        Raises:
            ToolchainError: there is none, or it is too old.
            ArgumentError: the sanitizer is not known.
        """
        if sanitizer not in SANITIZERS:
            raise ArgumentError(f"sanitizer {sanitizer!r}: accepted are {', '.join(map(repr, SANITIZERS))}")
        return cls(_new_enough(HostCompiler.find()), sanitizer, optimise, include_dirs, artifact_dir)

    @property
    def flags(self) -> tuple[str, ...]:
        """The compiler's flags for a kernel, without its include folders."""
        calls = [flag for option in ACCESS_OPTIONS for flag in (("-mllvm", f"-{option}") if self.clang else ("--param", option))]
        return (self.optimise, *FLAGS, *SANITIZERS[self.sanitizer], *(calls if self.sanitizer == "accesses" else ()))

    @property
    def version(self) -> str:
        """What an executable depends on besides its source and flags: the compiler and every header."""
        return f"{self.compiler.version}, {_digest('vidrial')}"

    @property
    def clang(self) -> bool:
        """Whether the compiler is Clang."""
        return "clang" in self.compiler.version

    def executable(self, text: str, name: str, pch: bool) -> bytes:
        """Compile and link one kernel.

        Raises:
            CompileError: the compiler rejects the source. ToolchainError: there is no room to compile it.
        """
        runtime = self.build_artifact("runtime.o", [*self.runtime_flags(), "-c", "-x", "c++"], "launch.h")
        first: list[str] = []
        if pch and not self.clang:
            # It takes 100 MB, and saves time alone.
            with contextlib.suppress(NoRoom):
                header = self.build_artifact("vidrial/host/pch.h.gch", [*self.flags, *_include_flags(), "-x", "c++-header"], "pch.h")
                first = [f"-I{header.parents[2]}"]
        with tempfile.TemporaryDirectory(prefix="compile-", dir=temporary()) as folder:
            includes = [*first, *self.flags, *_include_flags(), *(f"-I{d}" for d in self.include_dirs)]
            # Places are then relative, whatever folder this is.
            says = [f"-fdebug-prefix-map={folder}=.", "-fdiagnostics-color=never"]
            link = ["-pie", "-o", "kernel", "-x", "c++", "-", "-x", "none", str(runtime)]
            try:
                ended = execute([*self.compiler.command, *includes, *says, *link], text.encode(), COMPILE_SECONDS, cwd=folder)
            except subprocess.TimeoutExpired:
                raise CompileError(f"{name} did not compile for the host within {COMPILE_SECONDS} s; make it smaller") from None
            if ended.returncode:
                if any(full in ended.stderr for full in FULL):
                    raise NoRoom(f"there is no room to compile {name} in {folder}; set TMPDIR to a folder that has some")
                raise CompileError(_explain(ended.stderr.decode(errors="replace"), name))
            return Path(folder, "kernel").read_bytes()

    def runtime_flags(self) -> list[str]:
        """The runtime is not under test: it calls memcpy and memset, which sanitizers watch, wherever it touches the kernel's memory."""
        macros = [f"-DVIDRIAL_{short}={int(self.sanitizer == long)}" for short, long in SHORT.items()]
        calls = ["-fno-builtin"] if self.clang else ["-fno-builtin-memcpy", "-fno-builtin-memset", "-fno-tree-loop-distribute-patterns"]
        return ["-O2", *FLAGS, *calls, *macros, *_include_flags()]

    def build_artifact(self, product: str, flags: list[str], header: str) -> Path:
        """What the compiler makes of one of the runtime's headers, from `artifact_dir` or new; in a temporary folder if that cannot be written.

        Raises:
            ToolchainError: the compiler rejects it. NoRoom: no folder can take it.
        """
        original = Toolchain.find().vidrial_include / "vidrial/host" / header
        named = "\0".join((*flags, self.compiler.version, _digest(*PRECOMPILED)))
        key = hashlib.sha256(named.encode()).hexdigest()[:32]
        make = functools.partial(self._make_artifact, key, product, flags, original)
        return once(("artifact", self.artifact_dir, key), make, 3 * COMPILE_SECONDS)

    def _make_artifact(self, key: str, product: str, flags: list[str], original: Path) -> Path:
        for folder in (self.artifact_dir, temporary() / "artifact_dir"):
            made = folder / key / product
            if made.is_file():
                with contextlib.suppress(OSError):
                    os.utime(folder / key)
                return made
            staged = folder / f".{uuid.uuid4().hex}"
            try:
                (staged / product).parent.mkdir(parents=True, mode=0o700)
                ended = execute([*self.compiler.command, *flags, str(original), "-o", str(staged / product)], b"", COMPILE_SECONDS)
                if ended.returncode:
                    if any(full in ended.stderr for full in FULL):
                        continue
                    raise ToolchainError(f"{self.compiler.version} does not compile {original}:\n{ended.stderr.decode(errors='replace')}")
                os.rename(staged, folder / key)
            except OSError:
                # Another process was first, or the folder cannot be written.
                if made.is_file():
                    return made
                continue
            finally:
                shutil.rmtree(staged, ignore_errors=True)
            _prune(folder)
            return made
        raise NoRoom(
            f"neither {self.artifact_dir} nor the temporary folder can be written, or they have no room: "
            "set VIDRIAL_CACHE_DIR or TMPDIR to one that has"
        )


def _prune(folder: Path) -> None:
    """Remove all but the newest products: each is of one set of flags, and of one state of the headers."""
    # Another process may be at it, too.
    with contextlib.suppress(OSError):
        for old in sorted(folder.glob("[0-9a-f]*"), key=lambda path: path.stat().st_mtime)[:-PRODUCTS_KEPT]:
            shutil.rmtree(old)


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


def _include_flags() -> list[str]:
    toolchain = Toolchain.find()
    host = toolchain.vidrial_include / "vidrial/host"
    return [
        f"-I{host}/shadow",
        f"-I{host}/stubs",
        f"-I{toolchain.vidrial_include}",
        *(flag for folder in toolchain.includes[1:] for flag in ("-isystem", str(folder))),
    ]


@lru_cache
def _digest(*parts: str) -> str:
    """Digest of Vidrial's own headers, files or whole folders, and of the versions of the others."""
    toolchain = Toolchain.find()
    digest = hashlib.sha256(f"{toolchain.cutlass_version} {toolchain.cccl_version}".encode())
    include = toolchain.vidrial_include
    for part in parts:
        for path in sorted((include / part).rglob("*")) or [include / part]:
            if path.is_file():
                digest.update(f"{path.relative_to(include)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@lru_cache
def _new_enough(compiler: HostCompiler) -> HostCompiler:
    """`compiler`, if it is new enough.

    Raises:
        ToolchainError: it is not.
    """
    kind = "clang++" if "clang" in compiler.version else "g++"
    answer = execute([*compiler.command, "-dumpversion"], b"", 60).stdout.decode(errors="replace").strip()
    major = answer.partition(".")[0]
    if not major.isdecimal() or int(major) < OLDEST[kind]:
        raise ToolchainError(
            f"{' '.join(compiler.command)} is {kind} {answer or 'of an unknown version'}; the host target needs {kind} {OLDEST[kind]} "
            f"or later: apt-get install g++ (or g++-{OLDEST['g++']}, and set CXX)"
        )
    return compiler


def execute(command: list[str], request: bytes, timeout: float, cwd: str | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run a program on `request`, in an environment that does not depend on the caller's options."""
    environment = {"LC_ALL": "C", **{name: os.environ[name] for name in ("PATH", "TMPDIR", "HOME") if name in os.environ}}
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return subprocess.run(command, input=request, capture_output=True, timeout=timeout, check=False, cwd=cwd, env=environment)
        except OSError as error:
            # Another thread forked while the program was written: that child has it open for writing until it runs its own.
            if error.errno != errno.ETXTBSY or time.monotonic() > until:
                raise
            time.sleep(0.005)


_folders: dict[int, TemporaryFolder] = {}  # by process


def temporary() -> Path:
    """A folder that ends with this process, a forked one's own.

    Raises:
        ToolchainError: it cannot be made.
    """
    process = os.getpid()
    try:
        # NOTE: not lru_cache, which hands each of several threads that ask at once a folder of its own, and keeps one: the others would end in use.
        folder = _folders.get(process) or _folders.setdefault(process, TemporaryFolder("vidrial-host-"))
        return folder.path
    except OSError as error:
        raise ToolchainError(f"no temporary folder can be made ({error}); make room, or set TMPDIR") from None
