"""Where NVRTC, the headers and the host compiler are, and the command that installs what is missing."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import cast

from vidrial.device import cupy_missing
from vidrial.errors import ToolchainError
from vidrial.settings import Settings, prepare_cupy
from vidrial.spec.headers import vidrial_include

INSTALL_CUDA = 'pip install "cuda-toolkit[nvrtc,cudart,cccl]==13.0.*"'
INSTALL_CUTLASS = "pip install --no-deps nvidia-cutlass==4.2.0.0"
INSTALL_CXX = "apt-get install g++, or set CXX to a C++17 compiler"
NVRTC, NVRTC_BUILTINS = "libnvrtc.so.13", re.compile(r"libnvrtc-builtins\.so\.(\d+)\.(\d+)(\.|$)")
# CUTLASS 4.2 does not compile under NVRTC with CCCL 13.2 (3.2) and later.
CUTLASS_BROKEN, CCCL_TOO_NEW = (4, 2), (3, 2)


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """Directories and versions that a compile depends on; found once a process and settings."""

    cutlass_include: Path
    cuda_include: Path
    vidrial_include: Path
    cutlass_version: str
    cccl_version: str

    @classmethod
    def find(cls, settings: Settings | None = None) -> Toolchain:
        """The headers of CUTLASS, CUDA and Vidrial itself.

        Raises:
            ToolchainError: one is missing, or CUTLASS and CCCL do not go together; the message holds the command that helps.
        """
        chosen = settings or Settings.read()
        return _find(chosen.cutlass_include, chosen.cuda_include)

    @property
    def includes(self) -> tuple[Path, ...]:
        """Include directories in the order of search."""
        return (self.vidrial_include, self.cutlass_include, self.cuda_include, self.cuda_include / "cccl")

    @property
    def version(self) -> str:
        """What a binary's key has to name besides the source: NVRTC, CUTLASS, CCCL.

        Raises:
            ToolchainError: NVRTC is missing.
        """
        major, minor = nvrtc_version()
        return f"nvrtc {major}.{minor}, cutlass {self.cutlass_version}, cccl {self.cccl_version}"


@dataclasses.dataclass(frozen=True)
class HostCompiler:
    """A C++17 compiler for the host target: the words that call it (`ccache g++`: two), and its version."""

    command: tuple[str, ...]
    version: str

    @classmethod
    def find(cls, settings: Settings | None = None) -> HostCompiler:
        """CXX if set (a program, or several words as for a shell), else g++, else clang++.

        Raises:
            ToolchainError: there is none, or the one that CXX names does not run.
        """
        chosen = settings or Settings.read()
        return _find_compiler(chosen.cxx)


def nvrtc() -> ModuleType:
    """CuPy's binding of NVRTC. It needs neither a driver nor a GPU.

    Raises:
        ToolchainError: CuPy or the library is missing.
    """
    prepare_cupy()
    try:
        from cupy.cuda import nvrtc as binding
    except (ImportError, OSError) as error:
        raise cupy_missing(error) from error
    try:
        binding.getVersion()
    except (RuntimeError, OSError) as error:
        raise ToolchainError(f"NVRTC cannot be loaded ({' '.join(str(error).split())}); install it: {INSTALL_CUDA}") from error
    return cast(ModuleType, binding)


def nvrtc_version() -> tuple[int, int]:
    """NVRTC's version, (13, 0) say: of the library if it is loaded, else as the files of its wheel are named.

    So a process that compiles nothing does not load its 100 MB. Where the loader finds another library than the wheel's, the answer
    changes as that is loaded: who compiles asks again then, see `vidrial.build.cubins.look_up`.

    Raises:
        ToolchainError: NVRTC is missing.
    """
    known = _loaded_nvrtc() or _wheel_nvrtc(_headers("nvrtc"))
    if known is None:
        major, minor = nvrtc().getVersion()
        known = int(major), int(minor)
    return known


def loaded_library() -> ctypes.CDLL:
    """The very library that CuPy compiles with.

    Raises:
        ToolchainError: NVRTC is missing.
    """
    nvrtc().getVersion()
    return ctypes.CDLL(NVRTC, mode=os.RTLD_NOLOAD)


def supported_archs() -> tuple[int, ...]:
    """The architectures that this NVRTC compiles for, without their suffixes: (75, 80, ...).

    Raises:
        ToolchainError: NVRTC is missing.
    """
    library, count = loaded_library(), ctypes.c_int()
    library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    library.nvrtcGetSupportedArchs(found)
    return tuple(found)


def _loaded_nvrtc() -> tuple[int, int] | None:
    """The version of the library that this process has loaded, whoever did so."""
    try:
        library = ctypes.CDLL(NVRTC, mode=os.RTLD_NOLOAD)
    except OSError:
        return None
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@lru_cache
def _wheel_nvrtc(include: Path | None) -> tuple[int, int] | None:
    """The version of the wheel whose headers lie in `include`: NVRTC opens its second library by a name that ends in its own version."""
    folder = include.parent / "lib" if include is not None else None
    if folder is None or not (folder / NVRTC).is_file():
        return None
    found = {(int(m[1]), int(m[2])) for file in folder.iterdir() if (m := NVRTC_BUILTINS.match(file.name))}
    return found.pop() if len(found) == 1 else None


def missing() -> list[str]:
    """One sentence for each thing that is missing or unusable, with the command that helps; empty if a kernel can be compiled."""
    problems = []
    for check in (Toolchain.find, nvrtc, HostCompiler.find):
        try:
            check()
        except ToolchainError as error:
            problems.append(str(error))
    return problems


@lru_cache
def _find(cutlass: Path | None, cuda: Path | None) -> Toolchain:
    cutlass_include, cuda_include = cutlass or _cutlass_include(), cuda or _cuda_include()
    for folder, header, variable, install in (
        (cutlass_include, "cute/layout.hpp", "VIDRIAL_CUTLASS_INCLUDE", INSTALL_CUTLASS),
        (cuda_include, "cuda_fp16.h", "VIDRIAL_CUDA_INCLUDE", INSTALL_CUDA),
        (cuda_include, "cccl/cuda/std/__cccl/version.h", "VIDRIAL_CUDA_INCLUDE", INSTALL_CUDA),
    ):
        if not (folder / header).is_file():
            raise ToolchainError(f"{folder} lacks {header}; correct {variable}, or unset it and {install}")
    cutlass_version = _macros(cutlass_include / "cutlass/version.h", "CUTLASS_MAJOR", "CUTLASS_MINOR", "CUTLASS_PATCH")
    number = _macros(cuda_include / "cccl/cuda/std/__cccl/version.h", "CCCL_VERSION")[0]
    cccl_version = (number // 1_000_000, number // 1000 % 1000, number % 1000)
    if cutlass_version[:2] <= CUTLASS_BROKEN and cccl_version[:2] >= CCCL_TOO_NEW:
        raise ToolchainError(
            f"CCCL {_dotted(cccl_version)} in {cuda_include} does not compile with CUTLASS {_dotted(cutlass_version)}; "
            f"install an older one: {INSTALL_CUDA}, or point VIDRIAL_CUDA_INCLUDE at a CUDA 13.0 toolkit"
        )
    return Toolchain(cutlass_include, cuda_include, vidrial_include(), _dotted(cutlass_version), _dotted(cccl_version))


def _cutlass_include() -> Path:
    # NOTE: find_spec runs nothing; importing cutlass_library would need scipy, networkx and more.
    spec = importlib.util.find_spec("cutlass_library")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / "source/include/cute/layout.hpp").is_file():
            return Path(folder) / "source/include"
    raise ToolchainError(f"CUTLASS's headers are not found; {INSTALL_CUTLASS}, or set VIDRIAL_CUTLASS_INCLUDE")


def _headers(library: str) -> Path | None:
    """The include folder of a library of CUDA, where CuPy finds that: in wheels, conda, CUDA_PATH or CUDA_HOME, or installed toolkits."""
    # Inside, since it takes a tenth of a second where CuPy has not loaded it.
    from cuda import pathfinder

    found = pathfinder.find_nvidia_header_directory(library)
    return Path(found) if found else None


def _cuda_include() -> Path:
    cccl = _headers("cccl")
    if cccl is None:
        raise ToolchainError(f"CUDA's headers are not found; {INSTALL_CUDA}, or set VIDRIAL_CUDA_INCLUDE or CUDA_HOME")
    return cccl.parent


@lru_cache
def _find_compiler(cxx: str | None) -> HostCompiler:
    for name in (cxx,) if cxx else ("g++", "clang++"):
        try:
            words = [name] if shutil.which(name) else shlex.split(name)
        except ValueError as error:
            raise ToolchainError(f"CXX={cxx!r} is no command ({error}); {INSTALL_CXX}") from None
        path = shutil.which(words[0]) if words else None
        if path is None:
            continue
        command = (path, *words[1:])
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            answer = subprocess.run(
                [*command, "--version"], capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=60
            )
            if answer.returncode == 0 and answer.stdout:
                return HostCompiler(command, answer.stdout.splitlines()[0])
    raise ToolchainError(f"no host compiler: {f'CXX={cxx!r} does not run' if cxx else 'neither g++ nor clang++ is on PATH'}; {INSTALL_CXX}")


def _macros(header: Path, *names: str) -> tuple[int, ...]:
    """Values of numeric macros that a header defines."""
    text = header.read_text(encoding="utf-8") if header.is_file() else ""
    values = {name: re.search(rf"^#\s*define\s+{name}\s+(\d+)", text, re.MULTILINE) for name in names}
    for name, found in values.items():
        if found is None:
            raise ToolchainError(f"{header} does not define {name}: headers of an unknown version; {INSTALL_CUDA}; {INSTALL_CUTLASS}")
    return tuple(int(found[1]) for found in values.values() if found)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
