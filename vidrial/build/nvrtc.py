"""Source text to cubin by NVRTC, which needs neither a GPU nor a driver; what ptxas says of it, and what is refused for that."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import time
from functools import lru_cache
from pathlib import Path

from vidrial.build.formats import binary_key
from vidrial.build.store import Store
from vidrial.build.toolchain import Toolchain, loaded_library, nvrtc, nvrtc_version, supported_archs
from vidrial.device import arch_name
from vidrial.errors import CompileError, ToolchainError

# NOTE: without --no-cache NVRTC has a cache of its own beside the driver's, and what comes out of that says nothing of registers and spills.
OPTIONS = ("-std=c++17", "-default-device", "--ptxas-options=-v", "--no-cache")
# NOTE: quoted includes are looked for beside the source first: a bare name would be that of a file in the current folder.
SOURCE_NAME = "/dev/null/kernel.cu"
# The default heap of 256 MB is too small where a kernel includes much of CuTe: then nothing is precompiled and the source compiles twice.
PCH_HEAP_BYTES = 1 << 29
# Suppressed: the remark that nothing after a #line can be precompiled.
PCH_OPTIONS = ("--pch", "--pch-messages=false", "-diag-suppress=20283")
HEADER_STOP = "#pragma nv_hdrstop\n"
_ERROR = re.compile(r"^(?P<file>[^\s(][^(\n]*)\((?P<line>\d+)\): (?:catastrophic )?error(?: #[\w-]+)?: (?P<text>.*)$", re.MULTILINE)
# What ptxas says of wgmma that it cannot let run on: it serialises all of them, several times slower, adds instructions of its own, or gives
# up. NOTE: not C7517, one wait that it adds where accumulators are read: scans that were measured fastest have it, behind their loops
# (a test of their machine code holds them to that).
_WGMMA_NOTE = re.compile(r"\((?P<code>C75(?!17)\d\d|C7602)\) (?P<text>.*)")
_CODE = re.compile(r"\((C7\d\d\d)\)")
# Bytes per thread, stored and loaded, that a kernel may spill: of the measured configs none spills more than 8, and none of those that won any.
SPILL_LIMIT = 64
_UNKNOWN_ARCH = "invalid value for --gpu-architecture"
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
    """A compiled kernel: the ELF image, what it takes, NVRTC's log, and the seconds that it took to compile; `notes`: codes of ptxas's warnings."""

    image: bytes
    arch: str
    resources: Resources
    log: str
    seconds: float
    notes: str = ""


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
        CompileError: the source does not compile, or `refusal` says why it is not taken; names the template's line, and where the whole log is.
        ToolchainError: NVRTC or a header is missing, or this NVRTC does not know the architecture.
    """
    binding, toolchain, arch = nvrtc(), Toolchain.find(), arch_name(arch)
    options = [f"--gpu-architecture={arch}", *(f"-I{folder}" for folder in (*includes, *toolchain.includes)), *OPTIONS]
    if pch is not None:
        _reserve_pch_heap()
        folder = Path(pch, arch)
        folder.mkdir(parents=True, exist_ok=True)
        options += [*PCH_OPTIONS, f"--pch-dir={folder}"]
    start = time.perf_counter()
    program = binding.createProgram(source if pch is None else _headers_first(source), SOURCE_NAME, [], [])
    try:
        binding.compileProgram(program, options)
        # NOTE: CuPy drops the image's last byte.
        image = binding.getCUBIN(program) + b"\0"
        log = binding.getProgramLog(program).rstrip("\0\n")
    except binding.NVRTCError as error:
        log = binding.getProgramLog(program).rstrip("\0\n") or str(error)
        if _UNKNOWN_ARCH in log:
            raise _unknown_arch(arch) from None
        raise CompileError(_explain(log, f"{name} for {arch}", source, config)) from None
    finally:
        binding.destroyProgram(program)
    resources = Resources.parse(log)
    if fault := refusal(resources, log):
        raise CompileError(_explain(log, f"{name} for {arch}", source, config, fault))
    return Cubin(image, arch, resources, log, time.perf_counter() - start, notes(log))


def notes(log: str) -> str:
    """What ptxas warns of, by its codes: `C7517`; `performance loss` where it says so without one. "" if of nothing."""
    lines = [line for line in log.splitlines() if _CODE.search(line) or "performance loss" in line.lower()]
    return ", ".join(dict.fromkeys(found[1] if (found := _CODE.search(line)) else "performance loss" for line in lines))


def _unknown_arch(arch: str) -> ToolchainError:
    """What to do where this NVRTC compiles for no such GPU."""
    version = ".".join(map(str, nvrtc_version()))
    known = ", ".join(f"sm_{number}" for number in supported_archs())
    return ToolchainError(
        f"NVRTC {version} does not compile for {arch}; it knows {known}. A newer one: pip install --upgrade nvidia-cuda-nvrtc"
    )


def refusal(resources: Resources, log: str) -> str | None:
    """Why a kernel that compiles is not taken all the same, or None: what ptxas says of its wgmma, or registers that it spills."""
    if found := _WGMMA_NOTE.search(log):
        does = "serialises its wgmma" if "serialized" in found["text"] else "adds to its wgmma"
        return (
            f"ptxas {does}: ({found['code']}) {found['text']}\n"
            "  see docs/device_api.md, how wgmma may be used; or take a config with fewer registers"
        )
    spilled = resources.spill_stores + resources.spill_loads
    if spilled > SPILL_LIMIT:
        return (
            f"it spills {spilled} bytes per thread, stored and loaded; accepted are up to {SPILL_LIMIT}\n"
            "  take a config with smaller tiles, more threads or fewer CTAs per SM"
        )
    return None


def _explain(log: str, title: str, source: str, config: str, fault: str = "") -> str:
    """The first error of a log, or `fault`, where its cause stands in the template, the config, and where the whole log is."""
    found = _ERROR.search(log)
    if fault:
        lines = [f"{title}: {fault}"]
    elif (note := _WGMMA_NOTE.search(log)) and not found:
        lines = [f"{title} does not compile: ({note['code']}) {note['text']}"]
    elif found:
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


@lru_cache
def _reserve_pch_heap() -> None:
    """Enlarge the heap of precompiled headers before it is first compiled."""
    loaded_library().nvrtcSetPCHHeapSize(ctypes.c_size_t(PCH_HEAP_BYTES))
