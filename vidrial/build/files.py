"""Files in a directory that other processes change meanwhile: what is gone is no error, what is not ours is not read."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import tempfile
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from vidrial.errors import ArgumentError, StoreError


class Closing:
    """What the end of a `with` block closes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of what it holds."""
        raise NotImplementedError


# A holder of a lock is waited for as long as this.
LOCK_SECONDS = 10.0


def usable(root: Path) -> Path:
    """`root`, made if need be, if it is a directory of this user that nobody else can write to.

    Raises:
        StoreError: it is not; says why, and what to do.
    """
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = root.lstat()
    except OSError as error:
        raise StoreError(f"cache directory {root} cannot be made ({error}); set VIDRIAL_CACHE_DIR to one that can") from error
    if not stat.S_ISDIR(found.st_mode):
        raise StoreError(f"cache directory {root} is a symbolic link; set VIDRIAL_CACHE_DIR to the directory itself")
    if found.st_uid != os.geteuid():
        raise StoreError(f"cache directory {root} belongs to user {found.st_uid}, not to {os.geteuid()}; set VIDRIAL_CACHE_DIR to your own")
    if found.st_mode & 0o022:
        raise StoreError(f"cache directory {root} can be written by others (mode {stat.S_IMODE(found.st_mode):o}); chmod go-w it")
    return root


class TemporaryFolder:
    """A folder that ends with this object and this process, not with a child that was forked from it.

    `path` makes it anew where it was removed meanwhile, as cleaners of temporary folders do it under a long process.
    """

    def __init__(self, prefix: str) -> None:
        self._path = Path(tempfile.mkdtemp(prefix=prefix))
        weakref.finalize(self, _remove_own, self._path, os.getpid())

    @property
    def path(self) -> Path:
        """The folder.

        Raises:
            StoreError: it is gone and cannot be made, or another user has made it.
        """
        return usable(self._path)


def _remove_own(path: Path, maker: int) -> None:
    if os.getpid() == maker:
        shutil.rmtree(path, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Refuse a folder for rankings that cannot be written: said before anything is measured.

    Raises:
        StoreError: it cannot be made, or no file in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StoreError(f"rankings cannot be written to {folder} ({error}); name another folder") from None


@contextlib.contextmanager
def locked(path: Path, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """One process at a time: whoever has locked the file `path` (made if need be) or the directory `path`.

    All go on as they are where there can be no such file (read only) or lock (some network disks), and after `seconds`, with a warning:
    who holds it hangs.
    """
    until = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            while (descriptor := _lock(path)) is None:
                if time.monotonic() > until:
                    warnings.warn(
                        f"vidrial: {path} has been locked for {seconds:g} s: it is left so, and not waited for", RuntimeWarning, 4
                    )
                    break
                time.sleep(0.01)
            else:
                stack.callback(os.close, descriptor)
        yield


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock; None if another one holds it, or if it was removed while it was taken."""
    make_folder(path.parent)
    descriptor = os.open(path, os.O_CLOEXEC | (os.O_DIRECTORY if path.is_dir() else os.O_RDWR | os.O_CREAT), 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def read_file(path: Path | str, limit: int, folder: int | None = None) -> bytes:
    """The bytes of a regular file of this user, not reached through a link; `folder` is an open directory that `path` is relative to."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_size > limit:
            raise ValueError(f"{path} is not a regular file of this user of at most {limit} bytes")
        return file.read()


def parse_json(data: bytes | str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is no JSON, or nested too deeply to be anything of ours.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_file(path: Path, data: bytes) -> None:
    """A new file that only this user can read, on the disk before this returns."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def writing(path: Path, option: str) -> Iterator[None]:
    """To write `path` in the block, its folder made if need be; `option` is what names another place.

    Raises:
        ArgumentError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ArgumentError(f"{path} cannot be written ({error}); give {option} a place that can") from None


def sync_folder(folder: Path) -> None:
    """Bring a directory's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def touch(path: Path, seconds: float) -> None:
    """Renew a path's time of last change, at most once in `seconds`; one in the future at once."""
    age = time.time() - modified(path)
    if not 0 <= age <= seconds:
        with contextlib.suppress(OSError):  # gone, or read only: it keeps its age
            os.utime(path)


def children(folder: Path) -> list[Path]:
    """What lies in a directory; nothing if it is gone."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def size_and_time(path: Path) -> tuple[int, float]:
    """Bytes and time of last change; no bytes, and now, of what is gone or cannot be looked at: nobody takes that for old."""
    try:
        found = path.lstat()
    except OSError:
        return 0, time.time()
    return found.st_size, found.st_mtime


def modified(path: Path) -> float:
    """Time of last change in seconds since 1970; now, if it is gone."""
    return size_and_time(path)[1]


def remove(path: Path) -> None:
    """Remove a file, a link or a whole directory, as far as it can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def make_folder(folder: Path) -> None:
    """Make a directory and its parents, for this user alone.

    Raises:
        FileNotFoundError: another process removed it at the same moment; begin again.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError as error:
        if os.path.lexists(folder):
            raise NotADirectoryError(error.errno, "not a directory", str(folder)) from error
        raise FileNotFoundError(error.errno, "removed meanwhile", str(folder)) from error
