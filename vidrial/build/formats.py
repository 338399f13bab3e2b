"""What the store holds, as bytes: a binary's entry, and a JSON document. Each carries the checksum of its whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidrial.build.files import parse_json, read_file
from vidrial.errors import ArgumentError

# Of the folder and its documents; of its binaries (2: the note is part of the checksum).
SCHEMA, BINARY_SCHEMA = 1, 2
LARGEST_BINARY, LARGEST_DOCUMENT = 256 << 20, 16 << 20
# Names of files that the store makes or reads.
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=,@-]{0,199}")


@dataclass(frozen=True)
class Entry:
    """A stored binary: its bytes (decompressed), its source and what was noted about it."""

    image: bytes
    source: str
    meta: dict[str, Any]


def binary_key(source: str, arch: str, options: tuple[str, ...], version: str) -> str:
    """The key of a binary: sha256 of its source, architecture, options, the toolchain's version and the store's schema."""
    named = {"schema": BINARY_SCHEMA, "source": source, "arch": arch, "options": list(options), "version": version}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def seal(key: str, image: bytes, source: str, meta: Mapping[str, Any], payload: str) -> tuple[Entry, dict[str, bytes]]:
    """The entry of a binary, with what the store notes about it, and the files that hold it.

    Raises:
        ArgumentError: `meta` is not JSON.
    """
    note = dict(meta) | {"schema": BINARY_SCHEMA, "key": key, "payload": payload, "bytes": len(image)}
    note = json.loads(to_json(note))
    note["sha256"] = _checksum(note, source, image)
    files = {f"{payload}.z": zlib.compress(image, 1), "kernel.cu": source.encode(), "meta.json": to_json(note)}
    return Entry(image, source, note), files


def read_entry(folder: Path, key: str, payload: str | None) -> Entry:
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
    note = parse_json(read_file("meta.json", LARGEST_DOCUMENT, folder))
    name = note["payload"]
    if (note["schema"], note["key"]) != (BINARY_SCHEMA, key) or not PLAIN_NAME.fullmatch(name) or payload not in (None, name):
        raise ValueError(f"it is of schema {note['schema']}, for another key or another target")
    unpack = zlib.decompressobj()
    image = unpack.decompress(read_file(f"{name}.z", LARGEST_BINARY, folder), LARGEST_BINARY)
    source = read_file("kernel.cu", LARGEST_BINARY, folder).decode()
    if not unpack.eof or _checksum(note, source, image) != note["sha256"]:
        raise ValueError("its checksum does not match")
    return Entry(image, source, note)


def _checksum(note: Mapping[str, Any], source: str, image: bytes) -> str:
    """sha256 of a whole entry: of the note but for this, the source and the binary."""
    parts = _sha({name: value for name, value in note.items() if name != "sha256"}), *map(_digest, (source.encode(), image))
    return _digest("".join(parts).encode())


def document(value: Any) -> bytes:
    """The bytes of a document."""
    return to_json({"schema": SCHEMA, "sha256": _sha(value), "value": value})


def read_document(path: Path) -> Any:
    """The value of the document at `path`, checked against its checksum. FileNotFoundError: there is none. Any other error: it is damaged."""
    found = parse_json(read_file(path, LARGEST_DOCUMENT))
    value = found["value"]
    if found["schema"] != SCHEMA:
        raise ValueError(f"it is of schema {found['schema']}, not {SCHEMA}")
    if found.get("sha256", _sha(value)) != _sha(value):
        raise ValueError("its checksum does not match")
    return value


def _sha(value: Any) -> str:
    """sha256 of a document, however it is written."""
    return _digest(json.dumps(value, sort_keys=True).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def to_json(value: Any) -> bytes:
    """JSON in one form for equal values.

    Raises:
        ArgumentError: `value` is not JSON.
    """
    try:
        return json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"what is to be stored is not JSON ({error}); store numbers, strings, lists and dictionaries") from None
