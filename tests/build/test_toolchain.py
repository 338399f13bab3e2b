from __future__ import annotations

import builtins
import importlib.util
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda import pathfinder

from vidrial.build import toolchain
from vidrial.build.toolchain import HostCompiler, Toolchain, nvrtc_version
from vidrial.errors import ToolchainError
from vidrial.host.target import compile_host
from vidrial.settings import Settings


def headers(root: Path, cccl: int = 3_000_001, cutlass: str = "4 2 0") -> Settings:
    """A made-up set of headers, and the settings that point to it."""
    major, minor, patch = cutlass.split()
    files = {
        "cutlass/cute/layout.hpp": "",
        "cutlass/cutlass/version.h": f"#define CUTLASS_MAJOR {major}\n#define CUTLASS_MINOR {minor}\n#define CUTLASS_PATCH {patch} \n",
        "cuda/cuda_fp16.h": "",
        "cuda/cccl/cuda/std/__cccl/version.h": f"#  define CCCL_VERSION_H\n#define CCCL_VERSION {cccl}\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return Settings.read({"VIDRIAL_CUTLASS_INCLUDE": str(root / "cutlass"), "VIDRIAL_CUDA_INCLUDE": str(root / "cuda")})


def test_find() -> None:
    found = Toolchain.find()
    assert [(folder / header).is_file() for folder, header in zip(found.includes, HEADERS, strict=True)] == [True] * 4
    assert found.cutlass_version == "4.2.0"
    assert found.version == f"nvrtc {'.'.join(map(str, nvrtc_version()))}, cutlass 4.2.0, cccl {found.cccl_version}"
    assert toolchain.missing() == []


HEADERS = ("vidrial/prelude.cuh", "cute/layout.hpp", "cuda_fp16.h", "cuda/std/utility")


CUDA_INCLUDE = Toolchain.find().cuda_include


def test_settings_come_first(tmp_path: Path) -> None:
    found = Toolchain.find(headers(tmp_path))
    assert (found.cutlass_include, found.cuda_include, found.cccl_version) == (tmp_path / "cutlass", tmp_path / "cuda", "3.0.1")


def wheel(root: Path, *versions: str) -> Path:
    """The include folder of a wheel of NVRTC, whose second library is of these versions."""
    folder = root / "nvidia/cu13/lib"
    folder.mkdir(parents=True)
    for name in (toolchain.NVRTC, "libnvrtc-builtins.alt.so.13.0", *(f"libnvrtc-builtins.so.{version}" for version in versions)):
        (folder / name).write_text("")
    return folder.parent / "include"


def test_a_wheel_tells_its_version_without_being_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = wheel(tmp_path / "first", "13.7"), wheel(tmp_path / "second", "13.8.1")
    assert toolchain._wheel_nvrtc(first) == (13, 7) and toolchain._wheel_nvrtc(second) == (13, 8)
    assert toolchain._wheel_nvrtc(wheel(tmp_path / "both", "13.7", "13.8")) is None
    assert toolchain._wheel_nvrtc(wheel(tmp_path / "neither")) is toolchain._wheel_nvrtc(tmp_path) is toolchain._wheel_nvrtc(None) is None
    assert toolchain._wheel_nvrtc(toolchain._headers("nvrtc")) == toolchain.nvrtc().getVersion()
    monkeypatch.setattr(toolchain, "_headers", lambda library: first)
    monkeypatch.setattr(toolchain, "_loaded_nvrtc", lambda: None)
    toolchain._find.cache_clear()
    monkeypatch.setenv("VIDRIAL_CUDA_INCLUDE", str(CUDA_INCLUDE))
    assert nvrtc_version() == (13, 7) and "nvrtc 13.7, cutlass" in Toolchain.find().version
    monkeypatch.setattr(toolchain, "_loaded_nvrtc", lambda: (13, 9))
    assert nvrtc_version() == (13, 9), "what is loaded counts, and compiles"
    monkeypatch.undo()
    monkeypatch.setattr(toolchain, "_wheel_nvrtc", lambda path: None)
    binding = toolchain.nvrtc()
    assert nvrtc_version() == binding.getVersion() == toolchain._loaded_nvrtc()


def test_cccl_that_breaks_cutlass(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match=r"CCCL 3\.2\.0 .* CUTLASS 4\.2\.0.*cuda-toolkit\[nvrtc,cudart,cccl\]==13\.0"):
        Toolchain.find(headers(tmp_path / "a", cccl=3_002_000))
    assert Toolchain.find(headers(tmp_path / "b", cccl=3_001_009)).cccl_version == "3.1.9"
    assert Toolchain.find(headers(tmp_path / "c", cccl=3_002_000, cutlass="4 4 0")).cutlass_version == "4.4.0"


@pytest.mark.parametrize(
    ("lost", "hint"),
    [
        ("cutlass/cute/layout.hpp", "VIDRIAL_CUTLASS_INCLUDE.*nvidia-cutlass"),
        ("cutlass/cutlass/version.h", "CUTLASS_MAJOR"),
        ("cuda/cuda_fp16.h", "VIDRIAL_CUDA_INCLUDE.*cuda-toolkit"),
        ("cuda/cccl/cuda/std/__cccl/version.h", "VIDRIAL_CUDA_INCLUDE.*cuda-toolkit"),
    ],
)
def test_a_lost_header_is_named(tmp_path: Path, lost: str, hint: str) -> None:
    settings = headers(tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(ToolchainError, match=hint):
        Toolchain.find(settings)


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything missing at once: each is reported with the command that installs it."""
    real_import, real_spec = builtins.__import__, importlib.util.find_spec

    def no_cupy(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("cupy"):
            raise ImportError(f"No module named {name!r}")
        return real_import(name, *args, **kwargs)

    toolchain._find.cache_clear()
    toolchain._find_compiler.cache_clear()
    monkeypatch.setattr(builtins, "__import__", no_cupy)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "cutlass_library" else real_spec(name, *a))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("VIDRIAL_CUTLASS_INCLUDE", raising=False)
    headers_line, nvrtc_line, compiler_line = toolchain.missing()
    assert "pip install --no-deps nvidia-cutlass==4.2.0.0" in headers_line
    assert "pip install cupy-cuda13x==14.2.0" in nvrtc_line
    assert "g++" in compiler_line and "CXX" in compiler_line
    toolchain._find_compiler.cache_clear()


def test_a_cupy_cache_that_is_asked_for_and_cannot_be() -> None:
    """CuPy makes its cache folder when it is imported. In place of a home that nobody may write to: tests/test_settings.py."""
    program = "from vidrial.device import Device, gpu_count; from vidrial.build import toolchain; print(gpu_count())\n"
    program += "for ask in (toolchain.nvrtc, Device.current):\n  try: ask()\n  except Exception as e: print(type(e).__name__, e)\n"
    environment = os.environ | {"CUPY_CACHE_DIR": "/proc/nothing"}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    count, *said = ended.stdout.splitlines()
    assert count == "0" and len(said) == 2
    for line in said:
        assert (
            line.startswith("ToolchainError CuPy cannot be imported (") and "; set CUPY_CACHE_DIR to a folder that can be written" in line
        )


def test_cuda_headers_from_a_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    headers(tmp_path)
    os.rename(tmp_path / "cuda", tmp_path / "include")
    (tmp_path / "include/cccl/cuda/std/version").write_text("")
    find = pathfinder.locate_nvidia_header_directory.cache_clear
    for name in ("getsitepackages", "getusersitepackages"):
        monkeypatch.setattr(site, name, list)
    for name in ("CUDA_PATH", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    find()
    pathfinder.get_cuda_path_or_home.cache_clear()
    assert toolchain._cuda_include() == tmp_path / "include"
    monkeypatch.setattr(toolchain, "_headers", lambda library: None)
    with pytest.raises(ToolchainError, match="CUDA's headers are not found.*CUDA_HOME"):
        toolchain._cuda_include()
    find()
    pathfinder.get_cuda_path_or_home.cache_clear()


def test_host_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\necho 'cxx 99.1'\n")
    compiler.chmod(0o755)
    assert HostCompiler.find(Settings.read({"CXX": str(compiler)})) == HostCompiler((str(compiler),), "cxx 99.1")
    assert "g++" in HostCompiler.find(Settings.read({})).command[0]
    with pytest.raises(ToolchainError, match="CXX='no-such-compiler' does not run"):
        HostCompiler.find(Settings.read({"CXX": "no-such-compiler"}))


def test_a_compiler_of_several_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ccache g++`, a launcher with a quoted argument, a program whose path has a space; and that a kernel compiles through it."""
    launcher, log = tmp_path / "my launcher", tmp_path / "log"
    launcher.write_text(f'#!/bin/sh\necho "$1" >> {log}\nshift\nexec "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{launcher}' 'a word' g++")
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "cache"))
    found = HostCompiler.find()
    assert found.command == (str(launcher), "a word", "g++") and "g++" in found.version
    binary = compile_host('extern "C" __global__ void k(int* p) { p[0] = 41 + 1; }', "k", pch=False)
    out = np.zeros(1, np.int32)
    binary.launch(1, 1, 0, bytearray(8), {0: out})
    assert out[0] == 42 and set(log.read_text().splitlines()) == {"a word"} and len(log.read_text().splitlines()) >= 4
    (tmp_path / "a compiler").symlink_to(shutil.which("g++") or "")
    assert HostCompiler.find(Settings.read({"CXX": str(tmp_path / "a compiler")})).command == (str(tmp_path / "a compiler"),)
    for bad in ("'g++", "nothing-such g++", "   ", f"{launcher} g++"):
        with pytest.raises(ToolchainError, match=r"CXX="):
            HostCompiler.find(Settings.read({"CXX": bad}))
