"""The cache directory: compiled binaries and JSON documents. No other module touches it.

    <root>/v1/bin/ab/<key>/{kernel.cubin.z, kernel.cu, meta.json}     published by renaming a staged directory
    <root>/v1/<kind>/<key>.json                                       published by renaming a staged file
    <root>/v1/failed/<digest>/{kernel.cu, log.txt}                    sources that did not compile

Readers see an entry whole or not at all, whatever other processes do; there are no locks. What is damaged, of another schema or
not ours counts as a miss and is removed. What cannot be written is kept in memory for this process. Not promised: that an entry
survives a crash of the machine.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import tempfile
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from vidrial.build.files import children, make_folder, modified, read_file, remove, size_and_time, sync_folder, touch, usable, write_file
from vidrial.errors import ArgumentError, StoreError
from vidrial.settings import Settings

SCHEMA = 1
CUBIN = "kernel.cubin"
LARGEST_BINARY, LARGEST_DOCUMENT = 256 << 20, 16 << 20
# A hit renews an entry's time at most this often; a staged file older than STALE was left by a process that died.
TOUCH_SECONDS, STALE_SECONDS = 60.0, 86400.0
# A writer begins again this often when the cache is cleared under its hands.
PRUNE_EVERY, FAILURES_KEPT, ATTEMPTS = 64, 100, 20
_KEY = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=,@-]{0,199}")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A stored binary: its bytes (decompressed), its source and what was noted about it."""

    image: bytes
    source: str
    meta: dict[str, Any]


@dataclasses.dataclass
class Stats:
    """What one Store did in this process."""

    hits: int = 0
    misses: int = 0
    writes: int = 0
    corrupt: int = 0
    unwritten: int = 0


def binary_key(source: str, arch: str, options: tuple[str, ...], version: str) -> str:
    """The key of a binary: sha256 of its source, architecture, options, the toolchain's version and the store's schema."""
    named = {"schema": SCHEMA, "source": source, "arch": arch, "options": list(options), "version": version}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


class Store:
    """The cache at `root`, or at the first usable one of `Settings.cache_dirs`, or in a temporary folder of this process.

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
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._writable = True
        self.root = usable(Path(root)) if root is not None else self._choose(settings.cache_dirs)

    @staticmethod
    def shared() -> Store:
        """The store of this process for the settings in force now."""
        settings = Settings.read()
        return _shared(settings.cache_dirs, settings.cache_max_bytes)

    def get(self, key: str, payload: str = CUBIN) -> Entry | None:
        """The binary of `key`, or None.

        Raises:
            ArgumentError: `key` is not a sha256 in hexadecimal.
        """
        folder = self._entry(key)
        entry = self._memory.get(key) or self._guarded(folder, lambda: _read_entry(folder, key, payload))
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
        folder, sha = self._entry(key), hashlib.sha256(image).hexdigest()
        note = dict(meta) | {"schema": SCHEMA, "key": key, "payload": payload, "sha256": sha, "bytes": len(image)}
        entry = Entry(image, source, note)
        files = {f"{payload}.z": zlib.compress(image, 1), "kernel.cu": source.encode(), "meta.json": _json(note)}
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
        return self._guarded(path, lambda: _read_document(path))

    def write_json(self, kind: str, key: str, value: Any) -> None:
        """Replace the document `key` of `kind`; readers see the old one or the new one.

        Raises:
            ArgumentError: `kind` or `key` is not a plain file name, or `value` is not JSON.
        """
        path, data = self._document(kind, key), _json({"schema": SCHEMA, "value": value})
        if self._write(lambda: self._publish_file(path, data)):
            self._documents.pop((kind, key), None)
        else:
            self._documents[kind, key] = json.loads(data)["value"]

    def keys(self, kind: str) -> list[str]:
        """Keys of the documents of one kind."""
        stored = {path.stem for path in self._document(kind, "any").parent.glob("*.json")}
        return sorted(stored | {key for k, key in self._documents if k == kind})

    def save_failure(self, source: str, log: str) -> Path | None:
        """Keep a source that did not compile with the compiler's log; the log's path, or None if nothing can be written."""
        folder = self._version / "failed" / hashlib.sha256(f"{source}\0{log}".encode()).hexdigest()[:16]
        written = self._write(lambda: self._publish_folder(folder, {"kernel.cu": source.encode(), "log.txt": log.encode()}))
        return folder / "log.txt" if written else None

    def verify(self) -> list[str]:
        """Read every binary; the keys of the damaged ones, which are removed."""
        damaged = []
        for folder, _, _ in self._entries():
            before = self.stats.corrupt
            self._guarded(folder, lambda folder=folder: _read_entry(folder, folder.name, None))  # type: ignore[misc]
            damaged += [folder.name] if self.stats.corrupt > before else []
        return damaged

    def usage(self) -> tuple[int, int]:
        """Number of binaries on disk, and the bytes that they take there."""
        sizes = [size for _, size, _ in self._entries()]
        return len(sizes), sum(sizes)

    def prune(self, max_bytes: int | None = None) -> int:
        """Remove the least recently used binaries until at most `max_bytes` are left, and what dead processes left; the number removed."""
        limit = self.max_bytes if max_bytes is None else max_bytes
        entries = sorted(self._entries(), key=lambda e: e[2])
        total, removed = sum(size for _, size, _ in entries), 0
        for folder, size, _ in entries:
            if total <= limit:
                break
            self._discard(folder)
            total, removed = total - size, removed + 1
        for folder in sorted(children(self._version / "failed"), key=modified)[:-FAILURES_KEPT]:
            self._discard(folder)
        for left in children(self.root / "tmp"):
            if time.time() - modified(left) > STALE_SECONDS:
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
            if not _NAME.fullmatch(name):
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
        self._temporary = tempfile.TemporaryDirectory(prefix="vidrial-", ignore_cleanup_errors=True)
        why = "; ".join(reasons) or "there is no home directory"
        self._warn("root", f"the cache lives in {self._temporary.name} and ends with this process: {why}")
        return Path(self._temporary.name)

    def _guarded(self, path: Path, read: Callable[[], Any]) -> Any:
        """What `read` returns; None, and `path` removed, if it is damaged."""
        try:
            return read()
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, zlib.error, OSError) as error:
            self.stats.corrupt += 1
            self._warn("corrupt", f"{path} is damaged and is made anew ({type(error).__name__}: {error})")
            self._discard(path)
            return None

    def _write(self, publish: Callable[[], None]) -> bool:
        """Whether `publish` succeeded. The first failure (disk full, read only, ...) turns writing off for this process."""
        for _ in range(ATTEMPTS):
            if not self._writable:
                break
            try:
                publish()
                self.stats.writes += 1
                return True
            except FileNotFoundError:
                continue  # the cache was cleared meanwhile: begin again
            except OSError as error:
                self._writable = False
                self._warn("write", f"{self.root} cannot be written ({error}); what is compiled is kept in memory, for this process only")
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


@lru_cache
def _shared(roots: tuple[Path, ...], max_bytes: int) -> Store:
    return Store(max_bytes=max_bytes)


def _read_entry(folder: Path, key: str, payload: str | None) -> Entry:
    """The entry in `folder`, checked against its own note. FileNotFoundError: there is none. Any other error: it is damaged or foreign."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return _read_opened(opened, key, payload)
    except FileNotFoundError as error:
        # Removed while it was read: a plain miss. Still in its place: it was never whole.
        if os.fstat(opened).st_ino == folder.lstat().st_ino:
            raise ValueError(f"it lacks {error.filename}") from None
        raise
    finally:
        os.close(opened)


def _read_opened(folder: int, key: str, payload: str | None) -> Entry:
    note = json.loads(read_file("meta.json", LARGEST_DOCUMENT, folder))
    name = note["payload"]
    if (note["schema"], note["key"]) != (SCHEMA, key) or not _NAME.fullmatch(name) or payload not in (None, name):
        raise ValueError(f"it is of schema {note['schema']}, for another key or another target")
    unpack = zlib.decompressobj()
    image = unpack.decompress(read_file(f"{name}.z", LARGEST_BINARY, folder), LARGEST_BINARY)
    if not unpack.eof or hashlib.sha256(image).hexdigest() != note["sha256"]:
        raise ValueError("its checksum does not match")
    return Entry(image, read_file("kernel.cu", LARGEST_BINARY, folder).decode(), note)


def _read_document(path: Path) -> Any:
    document = json.loads(read_file(path, LARGEST_DOCUMENT))
    if document["schema"] != SCHEMA:
        raise ValueError(f"it is of schema {document['schema']}, not {SCHEMA}")
    return document["value"]


def _json(value: Any) -> bytes:
    try:
        return json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"what is to be stored is not JSON ({error}); store numbers, strings, lists and dictionaries") from None
