"""The cache directory: compiled binaries and JSON documents, in the bytes of `formats`. No other module writes there.

    <root>/v1/bin/ab/<key>/{kernel.cubin.z, kernel.cu, meta.json}     published by renaming a staged directory
    <root>/v1/<kind>/<key>.json                                       published by renaming a staged file
    <root>/v1/failed/<digest>/{kernel.cu, log.txt}                    sources that did not compile
    <root>/v1/quarantine/<name>-<number>                              what was damaged, of another schema or not ours

Readers see an entry whole or not at all, whatever other processes do; there are no locks but the one of `update_json`. What is damaged
counts as a miss and is set aside, what cannot be read just now as a miss alone. What cannot be written is kept in memory for this process.
Not promised: that an entry survives a crash of the machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vidrial.build.files import (
    TemporaryFolder,
    children,
    locked,
    make_folder,
    modified,
    remove,
    size_and_time,
    sync_folder,
    touch,
    usable,
    write_file,
)
from vidrial.build.formats import LARGEST_BINARY, PLAIN_NAME, SCHEMA, Entry, document, read_document, read_entry, seal, to_json
from vidrial.errors import ArgumentError, StoreError
from vidrial.settings import Settings

CUBIN = "kernel.cubin"
# A hit renews an entry's time at most this often; a staged file older than STALE was left by a process that died.
TOUCH_SECONDS, STALE_SECONDS = 60.0, 86400.0
# A writer begins again this often when the cache is cleared under its hands.
PRUNE_EVERY, FAILURES_KEPT, ATTEMPTS = 64, 100, 20
# How damage shows among the system's errors: a link or a file where a folder belongs. Every other one may have passed a moment later.
DAMAGE = (errno.ELOOP, errno.ENOTDIR)
# What will not pass while this process runs.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_KEY = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass
class Stats:
    """What one Store did in this process."""

    hits: int = 0
    misses: int = 0
    writes: int = 0
    corrupt: int = 0
    unread: int = 0
    unwritten: int = 0


class Store:
    """The cache at `root`, or at the first usable one of `Settings.cache_dirs`, or, with a warning, in a temporary folder of this process.

    Raises:
        StoreError: `root` was given and is not a directory of this user that others cannot write to.
    """

    def __init__(self, root: Path | str | None = None, max_bytes: int | None = None) -> None:
        settings = Settings.read()
        self.max_bytes = settings.cache_max_bytes if max_bytes is None else max_bytes
        self.stats = Stats()
        self._warned: set[str] = set()
        self._memory: dict[str, Entry] = {}
        self._documents: dict[tuple[str, str], Any] = {}
        self._temporary: TemporaryFolder | None = None
        # Why the cache is a temporary one, "" if it is not.
        self.refused = ""
        self._writable = True
        self.root = usable(Path(root)) if root is not None else self._choose(settings.cache_dirs)

    @staticmethod
    def shared() -> Store:
        """The store of this process for the settings in force now."""
        settings = Settings.read()
        asked = settings.cache_dirs, settings.cache_max_bytes
        # One for all threads that ask at once, as lru_cache would not have it.
        return _stores.get(asked) or _stores.setdefault(asked, Store(max_bytes=settings.cache_max_bytes))

    @staticmethod
    def lasting() -> Store:
        """`shared`, if it is no temporary one.

        Raises:
            StoreError: it is; says why no cache folder could be used.
        """
        store = Store.shared()
        if store.refused:
            raise StoreError(store.refused)
        return store

    def get(self, key: str, payload: str = CUBIN) -> Entry | None:
        """The binary of `key`, or None.

        Raises:
            ArgumentError: `key` is not a sha256 in hexadecimal.
        """
        folder = self._entry(key)
        entry = self._memory.get(key) or self._guarded(folder, lambda path: read_entry(path, key, payload))
        if entry is None:
            self.stats.misses += 1
            return None
        self.stats.hits += 1
        touch(folder, TOUCH_SECONDS)
        return entry

    def put(self, key: str, image: bytes, source: str, meta: Mapping[str, Any], payload: str = CUBIN) -> Entry:
        """Keep a binary and return its entry. The first of several writers of one key wins; their bytes are equal by construction.

        Raises:
            ArgumentError: `key` is not a sha256 in hexadecimal, or `meta` is not JSON.
        """
        folder = self._entry(key)
        entry, files = seal(key, image, source, meta, payload)
        if not self._write(lambda: self._publish_folder(folder, files)):
            self._memory[key] = entry
            while sum(len(e.image) for e in self._memory.values()) > LARGEST_BINARY and len(self._memory) > 1:
                del self._memory[next(iter(self._memory))]
        elif self.stats.writes % PRUNE_EVERY == 1:
            self.prune()
        return entry

    def read_json(self, kind: str, key: str) -> Any | None:
        """The document `key` of `kind`, or None.

        Raises:
            ArgumentError: `kind` or `key` is not a plain file name.
        """
        if (kind, key) in self._documents:
            return self._documents[kind, key]
        path = self._document(kind, key)
        return self._guarded(path, read_document)

    def write_json(self, kind: str, key: str, value: Any) -> None:
        """Replace the document `key` of `kind`; readers see the old one or the new one.

        Raises:
            ArgumentError: `kind` or `key` is not a plain file name, or `value` is not JSON.
        """
        path, value = self._document(kind, key), json.loads(to_json(value))
        if self._write(lambda: self._publish_file(path, document(value))):
            self._documents.pop((kind, key), None)
        else:
            self._documents[kind, key] = value

    def update_json(self, kind: str, key: str, change: Callable[[Any | None], Any]) -> None:
        """Replace the document `key` of `kind` by what `change` makes of it (None: there is none), one process at a time.

        One that cannot be read just now is left as it is: the new one is kept in memory, for this process only.

        Raises:
            ArgumentError: `kind` or `key` is not a plain file name, or the new document is not JSON.
        """
        with locked(self.root / f"{kind}s.lock"):
            unread = self.stats.unread
            value = change(self.read_json(kind, key))
            if self.stats.unread == unread:
                self.write_json(kind, key, value)
            else:
                self._documents[kind, key] = json.loads(to_json(value))

    def keys(self, kind: str) -> list[str]:
        """Keys of the documents of one kind."""
        stored = {path.stem for path in children(self._document(kind, "any").parent) if path.suffix == ".json"}
        return sorted(stored | {key for k, key in self._documents if k == kind})

    def save_failure(self, source: str, log: str) -> Path | None:
        """Keep a source that did not compile with the compiler's log; the log's path, or None if nothing can be written."""
        folder = self._version / "failed" / hashlib.sha256(f"{source}\0{log}".encode()).hexdigest()[:16]
        written = self._write(lambda: self._publish_folder(folder, {"kernel.cu": source.encode(), "log.txt": log.encode()}))
        return folder / "log.txt" if written else None

    def verify(self) -> list[str]:
        """Read every binary; the keys of the damaged ones, which are set aside."""
        damaged = []
        for folder, _, _ in self._entries():
            before = self.stats.corrupt
            self._guarded(folder, lambda path, key=folder.name: read_entry(path, key, None))  # type: ignore[misc]
            damaged += [folder.name] if self.stats.corrupt > before else []
        return damaged

    def usage(self) -> tuple[int, int]:
        """Number of binaries on disk, and the bytes that they take there."""
        sizes = [size for _, size, _ in self._entries()]
        return len(sizes), sum(sizes)

    def prune(self, max_bytes: int | None = None) -> int:
        """Remove the least recently used binaries until at most `max_bytes` are left, and what dead processes left; the number removed."""
        limit, now = self.max_bytes if max_bytes is None else max_bytes, time.time()
        # A time to come is that of a clock which was wrong: nobody has used it since, or its time would be right.
        entries = sorted(self._entries(), key=lambda e: e[2] if e[2] <= now + TOUCH_SECONDS else 0.0)
        total, removed = sum(size for _, size, _ in entries), 0
        for folder, size, _ in entries:
            if total <= limit:
                break
            self._discard(folder)
            total, removed = total - size, removed + 1
        # Binaries can be made anew; documents that were set aside stay.
        for kept in ([f for f in children(self._version / "quarantine") if f.is_dir()], children(self._version / "failed")):
            for folder in sorted(kept, key=modified)[:-FAILURES_KEPT]:
                self._discard(folder)
        for left in children(self.root / "tmp"):
            if abs(now - modified(left)) > STALE_SECONDS:
                remove(left)
        return removed

    def clear(self) -> None:
        """Remove everything; processes that are using the cache go on."""
        self._memory.clear()
        self._documents.clear()
        self._discard(self._version)

    @property
    def _version(self) -> Path:
        return self.root / f"v{SCHEMA}"

    def _entry(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ArgumentError(f"key {key!r} is not a sha256 in hexadecimal; make it with binary_key()")
        return self._version / "bin" / key[:2] / key

    def _document(self, kind: str, key: str) -> Path:
        for name in (kind, key):
            if not PLAIN_NAME.fullmatch(name):
                raise ArgumentError(f"{name!r} cannot name a document; accepted: up to 200 letters, digits and _.+=,@- (not . or - first)")
        return self._version / kind / f"{key}.json"

    def _entries(self) -> Iterator[tuple[Path, int, float]]:
        """Folder, bytes and time of last use of each binary."""
        for shard in children(self._version / "bin"):
            for folder in children(shard):
                yield folder, sum(size_and_time(file)[0] for file in children(folder)), modified(folder)

    def _choose(self, candidates: tuple[Path, ...]) -> Path:
        reasons = []
        for root in candidates:
            try:
                return usable(root)
            except StoreError as error:
                reasons.append(str(error))
        self._temporary = TemporaryFolder("vidrial-")
        self.refused = why = "; ".join(reasons) or "there is no home directory"
        self._warn("root", f"the cache lives in {self._temporary.path} and ends with this process: {why}")
        return self._temporary.path

    def _guarded(self, path: Path, read: Callable[[Path], Any]) -> Any:
        """What `read` makes of `path`; None if it is not there, cannot be read just now, or is damaged: then it is set aside."""
        try:
            return read(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno not in DAMAGE:
                self.stats.unread += 1
                self._warn("read", f"{path} cannot be read just now ({error}); it is left as it is")
                return None
            reason: Exception = error
        except (ValueError, KeyError, TypeError, zlib.error) as error:
            reason = error
        return self._set_aside(path, read, reason)

    def _set_aside(self, path: Path, read: Callable[[Path], Any], reason: Exception) -> Any:
        """Quarantine `path`. What another process has put in its place meanwhile goes back, and is returned."""
        aside = self._version / "quarantine" / f"{path.name}-{uuid.uuid4().hex[:8]}"
        try:
            make_folder(aside.parent)
            os.rename(path, aside)
        except OSError:
            aside = path  # gone already, or the cache is read only
        else:
            with contextlib.suppress(ValueError, KeyError, TypeError, zlib.error, OSError):
                found = read(aside)
                if aside.is_dir():
                    os.rename(aside, path)
                else:
                    os.link(aside, path)
                    aside.unlink()
                return found
        self.stats.corrupt += 1
        self._warn("corrupt", f"{path} is damaged and is made anew ({type(reason).__name__}: {reason}); it lies in {aside}")
        return None

    def _write(self, publish: Callable[[], None]) -> bool:
        """Whether `publish` succeeded. A failure that stays (disk full, read only, ...) turns writing off for this process."""
        for _ in range(ATTEMPTS):
            if not self._writable:
                break
            try:
                publish()
                self.stats.writes += 1
                return True
            except FileNotFoundError:
                # The cache was cleared meanwhile: begin again.
                with contextlib.suppress(StoreError):
                    usable(self.root)
            except OSError as error:
                self._writable = error.errno not in UNWRITABLE
                self._warn("write", f"{self.root} cannot be written ({error}); what is compiled is kept in memory, for this process only")
                break
        self.stats.unwritten += 1
        return False

    def _publish_folder(self, folder: Path, files: Mapping[str, bytes]) -> None:
        staged = self._stage()
        try:
            staged.mkdir(mode=0o700)
            for name, data in files.items():
                write_file(staged / name, data)
            make_folder(folder.parent)
            os.rename(staged, folder)
        except OSError as error:
            remove(staged)
            # Another process published the same key first.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        else:
            sync_folder(folder.parent)

    def _publish_file(self, path: Path, data: bytes) -> None:
        staged = self._stage()
        try:
            write_file(staged, data)
            make_folder(path.parent)
            os.replace(staged, path)
        except OSError:
            remove(staged)
            raise
        sync_folder(path.parent)

    def _stage(self) -> Path:
        folder = self.root / "tmp"
        make_folder(folder)
        return folder / f"{os.getpid()}-{uuid.uuid4().hex}"

    def _discard(self, path: Path) -> None:
        """Take `path` away at once by renaming it, then delete it at leisure."""
        try:
            doomed = self._stage()
            os.rename(path, doomed)
        except OSError:
            return  # gone already, or the cache is read only
        remove(doomed)

    def _warn(self, subject: str, text: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            warnings.warn(f"vidrial: {text}", RuntimeWarning, stacklevel=4)


_stores: dict[tuple[tuple[Path, ...], int], Store] = {}  # by where a cache may lie, and how large it may be
