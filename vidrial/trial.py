"""One measured config as a value, and the journal of them: append-only JSON lines that no interruption damages."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import fcntl
import functools
import json
import math
import os
import time
import types
import typing
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vidrial import problem as problem_facts
from vidrial.errors import SweepError
from vidrial.op import Check, Op
from vidrial.space import describe
from vidrial.timing import Timing

SCHEMA = 2
KIND = "vidrial journal"


class Status(enum.Enum):
    """How a trial ended. `ok` alone counts in a ranking."""

    ok = "checked and timed"
    rejected = "a rule forbids it"
    compile = "does not compile"
    launch = "the driver refuses the launch"
    wrong = "the result is wrong, or differs from run to run"
    timeout = "took longer than the limit; the measuring process was killed"
    crash = "ended the measuring process, or left its CUDA context unusable"


@dataclass(frozen=True)
class KernelResources:
    """What one of an op's kernels takes: registers a thread, bytes spilled a thread, bytes of shared memory a CTA."""

    kernel: str
    registers: int
    spill_bytes: int
    smem_bytes: int


@dataclass(frozen=True)
class Trial:
    """One config tried on one problem.

    `phase`: `screen` for a few samples, `confirm` and `final` where leaders were timed in turn, `recheck` for a winner's second check.
    `device`: `Device.key`. `gpu`: which one measured, its CUDA index (`host:index` on a Ray cluster). `sentence`: why, if the status is
    not ok. `versions`, `time`: of what, and when (UTC).
    """

    op: str
    problem: Any
    config: Any
    status: Status
    phase: str = "screen"
    timing: Timing | None = None
    check: Check | None = None
    sentence: str = ""
    resources: tuple[KernelResources, ...] = ()
    reference_ms: float = 0.0
    device: str = ""
    seed: int = 0
    versions: str = ""
    time: str = ""
    gpu: str = ""

    @property
    def ok(self) -> bool:
        """Checked and timed."""
        return self.status is Status.ok and self.timing is not None

    @property
    def ms(self) -> float:
        """Median time in milliseconds; infinite if the trial failed."""
        return self.timing.median_ms if self.timing is not None and self.status is Status.ok else math.inf

    @classmethod
    def from_json(cls, op: Op, data: Any) -> Trial:
        """The trial that `encode` wrote.

        Raises:
            SweepError: a field is missing, unknown or of another type.
        """
        return typing.cast(Trial, decode(cls, data, {"problem": op.problem, "config": op.config}))

    def __str__(self) -> str:
        return f"{describe(self.config)}: {self.timing if self.ok else f'{self.status.name}: {self.sentence}'}"


def encode(value: Any) -> Any:
    """A value as JSON: dataclasses by field, enums by name, tuples as lists, NaN and infinities as strings.

    Raises:
        SweepError: a value of any other type.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, tuple | list):
        return [encode(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): encode(v) for k, v in value.items()}
    raise SweepError(
        f"{value!r} ({type(value).__name__}) cannot be kept; accepted in problems and configs: "
        "numbers, bools, strings, enums, dataclasses, tuples of these"
    )


def decode(kind: Any, data: Any, fields: Mapping[str, Any] | None = None) -> Any:
    """The value of type `kind` that `encode` wrote as `data`; `fields` gives the types of fields that are annotated `Any`.

    Raises:
        SweepError: `data` is not such a value.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if data is None else decode(next(a for a in arguments if a is not type(None)), data)
    if origin is tuple and isinstance(data, list):
        each = arguments[:1] * len(data) if arguments[1:] == (...,) else arguments
        if len(each) == len(data):
            return tuple(decode(k, v) for k, v in zip(each, data, strict=True))
    elif dataclasses.is_dataclass(kind) and isinstance(data, dict):
        hints = _hints(typing.cast(type, kind))
        if hints.keys() == data.keys():
            known = {**hints, **fields} if fields else hints
            return typing.cast(type, kind)(**{name: decode(known[name], value) for name, value in data.items()})
        differing = ", ".join(sorted(set(hints).symmetric_difference(map(str, data))))
        raise SweepError(f"fields of {getattr(kind, '__name__', kind)} that are missing or unknown: {differing}")
    elif isinstance(kind, type) and issubclass(kind, enum.Enum):
        if data in kind.__members__:
            return kind[data]
    elif kind is float and isinstance(data, int | float | str):
        return float(data)
    elif kind is Any or (kind in (bool, int, str) and type(data) is kind):
        return data
    raise SweepError(f"{data!r} is not of type {getattr(kind, '__name__', kind)}")


@functools.lru_cache(maxsize=256)
def _hints(kind: type) -> Mapping[str, Any]:
    """The types of a dataclass's fields."""
    every = problem_facts.types(kind)
    return {field.name: every[field.name] for field in dataclasses.fields(kind)}


def latest(trials: Iterable[Trial]) -> dict[Any, Trial]:
    """Config -> the trial that counts: a failure always does, else the last one timed."""
    found: dict[Any, Trial] = {}
    for trial in trials:
        before = found.get(trial.config)
        if before is None or (before.status is Status.ok and (trial.timing is not None or trial.status is not Status.ok)):
            found[trial.config] = trial
    return found


class Journal:
    """A file of trials: a header that says of what, then one trial a line, on disk before the next one begins.

    It is locked while open, by one process at a time; a process that dies lets go of it. A torn last line is dropped.

    Args:
        path: the file; it is made if it does not exist, its folder too.
        op: whose trials they are.
        header: facts that must agree for trials to be comparable (problem, device, ...), as JSON.
        fresh: begin a new file; one that is there is renamed, not lost.

    Raises:
        SweepError: the file cannot be written, is in use, is damaged before its last line, or is of another sweep or schema.
    """

    def __init__(self, path: Path, op: Op, header: Mapping[str, Any], fresh: bool = False) -> None:
        self.path = path
        self.trials: list[Trial] = []
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

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> BinaryIO:
        """The file, locked."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
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
        if whole < len(text):
            os.ftruncate(self._file.fileno(), whole)
        lines = text[:whole].splitlines()
        if not lines:
            self._write(self._header)
            return
        self._check_header(self._parse(lines[0], 1))
        for number, line in enumerate(lines[1:], 2):
            data = self._parse(line, number)
            try:
                self.trials.append(Trial.from_json(op, data))
            except SweepError as error:
                raise self._damaged(number, str(error)) from None

    def _parse(self, line: bytes, number: int) -> Any:
        try:
            return json.loads(line)
        except ValueError as error:
            raise self._damaged(number, str(error)) from None

    def _damaged(self, number: int, why: str) -> SweepError:
        return SweepError(
            f"journal {self.path}, line {number} is damaged ({why}); "
            "delete that line to keep the others, or move the file away to begin anew"
        )

    def _check_header(self, found: Any) -> None:
        if not isinstance(found, dict) or found.get("kind") != KIND:
            raise SweepError(f"{self.path} is not a journal: its first line is no header; name another file with journal=...")
        for name, expected in self._header.items():
            if found.get(name) != expected:
                raise SweepError(
                    f"journal {self.path} has {name} {found.get(name)!r}, this sweep {expected!r}: "
                    "their trials do not compare; name another file with journal=..., or move this one away"
                )
