"""Every environment variable that Vidrial reads, in one place. They are read when asked for, never at import."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from vidrial.errors import ArgumentError

TARGETS = ("cuda", "host")
DIGITS = 9


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the environment asks for; `None` where it leaves the choice to Vidrial."""

    target: str
    """VIDRIAL_TARGET: `cuda`, or `host` to run kernels on the CPU."""
    jobs: int
    """VIDRIAL_JOBS: processes that compile at once; by default the processors this process may use."""
    cache_dirs: tuple[Path, ...]
    """Where the cache may lie: VIDRIAL_CACHE_DIR alone if it is set; else, best first, $XDG_CACHE_HOME/vidrial, ~/.cache/vidrial."""
    cache_max_bytes: int
    """VIDRIAL_CACHE_MAX_MB (2048): compiled kernels beyond this are dropped, least recently used first."""
    cutlass_include: Path | None
    """VIDRIAL_CUTLASS_INCLUDE: directory that holds `cute/` and `cutlass/`."""
    cuda_include: Path | None
    """VIDRIAL_CUDA_INCLUDE: directory that holds `cuda_fp16.h` and `cccl/`."""
    cxx: str | None
    """CXX: host compiler of the `host` target."""

    @staticmethod
    def read_target(environment: Mapping[str, str] | None = None) -> str:
        """The target alone, which every call asks for.

        Raises:
            ArgumentError: it is not accepted.
        """
        target = (os.environ if environment is None else environment).get("VIDRIAL_TARGET") or TARGETS[0]
        if target not in TARGETS:
            raise ArgumentError(f"VIDRIAL_TARGET={target!r} is not a target; accepted: {', '.join(TARGETS)}. Correct or unset it")
        return target

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """The settings of `environment`, by default that of the process.

        Raises:
            ArgumentError: a variable has a value that is not accepted.
        """
        env = os.environ if environment is None else environment
        return cls(
            target=cls.read_target(env),
            jobs=_positive(env, "VIDRIAL_JOBS", len(os.sched_getaffinity(0))),
            cache_dirs=_cache_dirs(env),
            cache_max_bytes=_positive(env, "VIDRIAL_CACHE_MAX_MB", 2048) << 20,
            cutlass_include=_folder(env, "VIDRIAL_CUTLASS_INCLUDE"),
            cuda_include=_folder(env, "VIDRIAL_CUDA_INCLUDE"),
            cxx=env.get("CXX") or None,
        )


def _positive(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name) or str(default)
    if not text.isdecimal() or len(text) > DIGITS or int(text) < 1:
        raise ArgumentError(
            f"{name}={text!r} is not a positive whole number of at most {DIGITS} digits; set one, or unset it for {default}"
        )
    return int(text)


def _cache_dirs(env: Mapping[str, str]) -> tuple[Path, ...]:
    asked, xdg = env.get("VIDRIAL_CACHE_DIR"), env.get("XDG_CACHE_HOME")
    if asked:
        try:
            return (Path(os.path.abspath(os.path.expanduser(asked))),)
        except FileNotFoundError:
            raise ArgumentError(f"VIDRIAL_CACHE_DIR={asked!r} is relative, and the current folder is gone; give a whole path") from None
    # NOTE: expanduser leaves the ~ in place where there is no home directory.
    choices = (xdg and f"{xdg}/vidrial", os.path.expanduser("~/.cache/vidrial"))
    return tuple(Path(path) for path in choices if path and os.path.isabs(path))


def prepare_cupy() -> None:
    """To be called before CuPy is imported, which makes its cache's folder then, and is lost where it cannot.

    Where the home directory takes none, and CUPY_CACHE_DIR is not set, it lies in our cache, or in a folder that ends with this process.
    """
    if "cupy" in sys.modules or os.environ.get("CUPY_CACHE_DIR"):
        return
    usual, own = os.path.expanduser("~/.cupy/kernel_cache"), [str(folder / "cupy") for folder in Settings.read().cache_dirs]
    for folder in filter(os.path.isabs, (usual, *own)):
        with contextlib.suppress(OSError):
            os.makedirs(folder, mode=0o700, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                break
    else:
        folder = tempfile.mkdtemp(prefix="vidrial-cupy-")
        atexit.register(_remove, folder, os.getpid())
    if folder != usual:
        os.environ["CUPY_CACHE_DIR"] = folder


def _remove(folder: str, maker: int) -> None:
    # A forked child removes nothing of its parent's.
    if os.getpid() == maker:
        shutil.rmtree(folder, ignore_errors=True)


def _folder(env: Mapping[str, str], name: str) -> Path | None:
    text = env.get(name)
    if not text:
        return None
    path = Path(text).expanduser().absolute()
    if not path.is_dir():
        raise ArgumentError(f"{name}={text!r} is not a directory; give the include directory itself, or unset it")
    return path
