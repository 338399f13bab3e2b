"""The journal of a sweep's trials: append-only JSON lines that no interruption damages."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from vidrial.build.files import Closing, parse_json
from vidrial.errors import ConfigError, SweepError
from vidrial.spec.choices import check_choices
from vidrial.spec.op import Op
from vidrial.tune.codec import UNREADABLE, encode
from vidrial.tune.trial import Trial

T = TypeVar("T")
# 3: `reason` and `max_error` were `sentence` and `worst`.
SCHEMA = 3
KIND = "vidrial journal"
# What a journal begins with, if anything was written before a crash.
BEGINNING = f'{{"kind": "{KIND}"'.encode()
# How a journal is named that was set aside.
SET_ASIDE = re.compile(r"\.\d{8}T\d{6}-[0-9a-f]{4}\.jsonl$")


class Journal(Closing):
    """A file of trials: a header that says of what, then one trial a line, on disk before the next one begins.

    It is locked while open, by one process at a time; a process that dies lets go of it. A torn last line is dropped.

    Args:
        path: the file; it is made if it does not exist, its folder too.
        op: whose trials they are.
        header: facts that must agree for trials to be comparable (problem, device, ...), as JSON.
        fresh: begin a new file; one that is there is renamed, not lost.

    Raises:
        SweepError: the file cannot be written, is in use, is no journal, is damaged before its last line, or is of another sweep or schema.
            Its bytes are then what they were.
    """

    def __init__(self, path: Path, op: Op, header: Mapping[str, Any], fresh: bool = False) -> None:
        self.path = path
        self.trials: list[Trial] = []
        # Trials in the file whose configs make choices that are none any more: they stay there, and do not count.
        self.outdated = 0
        self._header = {"kind": KIND, "schema": SCHEMA, "op": op.name, **header}
        with contextlib.ExitStack() as undo:
            self._file = undo.enter_context(self._open())
            if fresh and self._file.seek(0, os.SEEK_END):
                os.replace(path, path.with_suffix(f".{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:4]}{path.suffix}"))
                self._file = undo.enter_context(self._open())
            self._read(op)
            undo.pop_all()

    def append(self, trial: Trial) -> None:
        """Write one trial and wait until the disk has it.

        Raises:
            SweepError: the disk is full, say; everything before this trial is kept.
        """
        self._write(encode(trial))
        self.trials.append(trial)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _open(self) -> BinaryIO:
        """The file, locked."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not self.path.is_file():
                raise _no_journal(self.path)
            file = open(self.path, "a+b")  # noqa: SIM115
        except OSError as error:
            raise SweepError(
                f"journal {self.path} cannot be written ({error}); name another with journal=..., or another cache with VIDRIAL_CACHE_DIR"
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held the lock may have renamed the file meanwhile.
            if os.fstat(file.fileno()).st_ino == os.stat(self.path).st_ino:
                return file
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError as error:
            file.close()
            raise SweepError(f"journal {self.path} cannot be locked ({error}); put it on a local disk with journal=...") from None
        file.close()
        raise SweepError(f"journal {self.path} is in use by another sweep of the same thing: wait for it, or name another with journal=...")

    def _write(self, value: Any) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(json.dumps(value, allow_nan=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._abandon(end)
            raise SweepError(
                f"journal {self.path} cannot be written ({error}); its {len(self.trials)} trials are kept: "
                "make room, then sweep again with --resume (resume=True)"
            ) from None

    def _abandon(self, end: int) -> None:
        """Drop what a failed write left, and the file with it: its buffer would try again at every close."""
        descriptor = os.dup(self._file.fileno())
        with contextlib.suppress(OSError):  # the disk is still full
            self._file.close()
        os.ftruncate(descriptor, end)
        os.close(descriptor)

    def _read(self, op: Op) -> None:
        self._file.seek(0)
        text = self._file.read()
        whole = text.rfind(b"\n") + 1
        if whole:
            header, trials = read_journal(self.path, text, functools.partial(Trial.from_json, op))
            for name, expected in self._header.items():
                if header.get(name) != expected:
                    raise SweepError(
                        f"journal {self.path} has {name} {header.get(name)!r}, this sweep {expected!r}: "
                        "their trials do not compare; name another file with journal=..., or move this one away"
                    )
            for trial in trials:
                if trial.op != op.name or encode(trial.problem) != header.get("problem", encode(trial.problem)):
                    raise SweepError(f"journal {self.path} holds a trial of {trial.op} for {trial.problem}: move it away and sweep again")
            self.trials = [trial for trial in trials if _is_choice(trial.config)]
            self.outdated = len(trials) - len(self.trials)
        elif not BEGINNING.startswith(text[: len(BEGINNING)]):
            raise _no_journal(self.path)
        # Ours, whatever its last line was to be.
        if whole < len(text):
            self._cut(whole)
        if not whole:
            self._write(self._header)

    def _cut(self, end: int) -> None:
        try:
            os.ftruncate(self._file.fileno(), end)
        except OSError as error:
            raise SweepError(f"journal {self.path} cannot be written ({error}); name another file with journal=...") from None


def _is_choice(config: Any) -> bool:
    try:
        check_choices(config)
    except ConfigError:
        return False
    return True


def _no_journal(path: Path) -> SweepError:
    return SweepError(f"{path} is not a journal: its first line is no header; name a file that a sweep wrote, or a new one")


def read_journal(path: Path, data: bytes, read: Callable[[object], T]) -> tuple[Mapping[str, Any], list[T]]:
    """The header and the trials of a journal's whole lines, each as `read` makes it of its JSON.

    Raises:
        SweepError: it is no journal, of another schema, or damaged before its last line.
    """
    *lines, _ = data.split(b"\n")
    try:
        header = parse_json(lines[0]) if lines else None
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("kind") != KIND:
        raise _no_journal(path)
    if header.get("schema") != SCHEMA:
        raise SweepError(
            f"journal {path} is of schema {header.get('schema')}, this version's is {SCHEMA}: "
            "report it with the version that wrote it, or move it away and sweep again"
        )
    trials = []
    for number, line in enumerate(lines[1:], 2):
        try:
            trials.append(read(parse_json(line)))
        except UNREADABLE as error:
            raise SweepError(
                f"journal {path}, line {number} is damaged ({error}); "
                "delete that line to keep the others, or move the file away to begin anew"
            ) from None
    return header, trials
