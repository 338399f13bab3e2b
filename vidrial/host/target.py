"""The CPU target: a rendered source compiled by g++, unchanged, and run one CTA at a time in a process of its own.

    binary = compile_host(source, "gemm")
    stats = binary.launch((m // 128, n // 128, 1), 128, smem_bytes, packed, {0: a, 8: b, 16: c})

Whatever a kernel does wrong ends as a LaunchError that names its line and its threads: every launch is a fresh process with a
time limit, so a crash, a deadlock or an endless loop never reaches the caller.
"""

from __future__ import annotations

import bisect
import ctypes
import dataclasses
import functools
import itertools
import os
import shutil
import struct
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidrial.build.formats import Entry, binary_key
from vidrial.build.once import once
from vidrial.build.store import Store
from vidrial.device import CTA_THREADS, PARAMETER_BYTES
from vidrial.errors import ArgumentError, LaunchError, ToolchainError
from vidrial.events import FIELDS, Counts
from vidrial.host.compiler import COMPILE_SECONDS, TEXT, Build, execute, temporary
from vidrial.host.messages import crash, resolve

if TYPE_CHECKING:
    import numpy as np

    from vidrial.layout.smem import SharedMemory
# The process is killed this long after its own time limit, which tells where it was.
GRACE_SECONDS = 5.0
MAX_SHARED_BYTES, ARRAY_ALIGNMENT = 227 << 10, 256
PAYLOAD = "kernel.host"
ORDERS, SEEDS = ("up", "down"), 2**32 - 2


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the threads of a CTA take turns, and for how long.

    `lazy`: cp.async lands and wgmma is executed at the wait (NaN until then), else at once; TMA lands when no thread can go on, else at
    once. `order`: which runnable lane goes on, and which CTA comes next, `up`, `down` or a random seed. `timeout`: seconds per launch.
    `eager`: whoever waits at a barrier runs as soon as an arrival has completed its phase, before the thread that arrived, and TMA lands at
    once: a stage released too early is overwritten before a late wgmma has read it.

    Raises:
        ArgumentError: an order that is not known, or no time.
    """

    lazy: bool = True
    order: str | int = "up"
    timeout: float = 60.0
    eager: bool = False

    def __str__(self) -> str:
        """In a few words."""
        order = {"up": "rising", "down": "falling"}.get(str(self.order), f"shuffled ({self.order})")
        return f"copies {'at the wait' if self.lazy else 'at issue'}, threads {order}" + ", waiters first" * self.eager

    def __post_init__(self) -> None:
        if self.order not in ORDERS and not (isinstance(self.order, int) and 0 <= self.order < SEEDS):
            raise ArgumentError(f"order {self.order!r}: accepted are {', '.join(ORDERS)} and a seed from 0 to {SEEDS - 1}")
        if not 0 < self.timeout < 1e6:
            raise ArgumentError(f"timeout of {self.timeout} s: it must be positive, and less than 1e6")

    @property
    def code(self) -> int:
        """The order as the runtime takes it: 0 up, 1 down, else a seed."""
        return self.order + len(ORDERS) if isinstance(self.order, int) else ORDERS.index(self.order)


# A kernel that is right under one schedule may be wrong under another: tests run them all.
SCHEDULES = (Schedule(), Schedule(lazy=False, order="down"), Schedule(order=5, eager=True))


@dataclasses.dataclass(frozen=True)
class HostStats(Counts):
    """What a launch did, in all CTAs together: the counts, and the same by object.

    `objects`: names of tiled objects of one C++ type, which count together -> what they did; under () what none of them did.
    `read_bytes`, `written_bytes`: 32 times the sectors of the arrays that the launch read before it wrote them, and that it wrote; None
    unless the kernel was compiled with `accesses`. `switches`: from one thread to another. `shared_memory_high_water`: dynamic bytes up to
    the last one written. `seconds`: the processor's, which say nothing about a GPU.
    """

    switches: int = 0
    shared_memory_high_water: int = 0
    read_bytes: int | None = None
    written_bytes: int | None = None
    seconds: float = 0.0
    objects: Mapping[tuple[str, ...], Counts] = dataclasses.field(default_factory=dict)

    def of(self, name: str) -> Counts:
        """What the object of that name did, together with those of its type.

        Raises:
            ArgumentError: no object of the kernel has that name.
        """
        for names, found in self.objects.items():
            if name in names:
                return found
        known = ", ".join(itertools.chain.from_iterable(self.objects))
        raise ArgumentError(f"object {name!r} was not counted; accepted: {known or 'none, the kernel has no tiled objects'}")


STATS, REQUEST, LENGTH = struct.Struct("=4qd"), struct.Struct("=3I3IIId5Q"), struct.Struct("=q")
COUNTS = struct.Struct(f"={len(FIELDS)}q")


@dataclasses.dataclass(frozen=True)
class HostBinary:
    """A kernel compiled for the CPU: an executable, which lives as long as this process; `objects` are counted apart, `accesses` to
    memory too. `again` gets it anew where something has removed it."""

    name: str
    executable: Path
    objects: tuple[str, ...] = ()
    accesses: bool = False
    again: Callable[[], HostBinary] | None = dataclasses.field(default=None, repr=False, compare=False)

    def launch(
        self,
        grid: Sequence[int],
        block: int | Sequence[int],
        shared: int | SharedMemory,
        packed: bytes | bytearray,
        pointers: Mapping[int, np.ndarray[Any, Any]],
        schedule: Schedule = SCHEDULES[0],
    ) -> HostStats:
        """Run every CTA of `grid` and write what the kernel changed back into the arrays; what it prints goes to standard error.

        Args:
            grid: CTAs along x, y, z.
            block: threads of a CTA, or threads along x, y, z.
            shared: dynamic shared memory of a CTA, in bytes or by its regions: nothing may touch what lies between them.
            packed: the parameters' bytes, laid out as a struct of them; pointers are filled in.
            pointers: offset in `packed` -> the array whose address goes there. Any strides; the address modulo 256 is that of the
                array's first element in the array that owns the memory, as if that had come from the GPU's allocator; arrays may overlap.
            schedule: turns of the threads, landing of cp.async, time limit.

        Raises:
            ArgumentError: a size that CUDA does not allow, a pointer outside of `packed`.
            LaunchError: the kernel crashed, deadlocked, ran out of time, left its memory or wrote to a read-only array.
        """
        threads = _three("block", block)
        blocks = _three("grid", grid)
        if not 1 <= threads[0] * threads[1] * threads[2] <= CTA_THREADS:
            raise ArgumentError(f"block {threads} has {threads[0] * threads[1] * threads[2]} threads; accepted are 1 to {CTA_THREADS}")
        shared_bytes, gaps = (shared, ()) if isinstance(shared, int) else (shared.bytes, shared.gaps())
        used = shared_bytes - sum(size for _, size in gaps)
        if not 0 <= used <= MAX_SHARED_BYTES:
            raise ArgumentError(f"{used} bytes of shared memory; accepted are 0 to {MAX_SHARED_BYTES}")
        if len(packed) > PARAMETER_BYTES:
            raise ArgumentError(f"{len(packed)} bytes of arguments; accepted are up to {PARAMETER_BYTES}")
        memory = Memory(pointers, len(packed))
        sizes = (shared_bytes, len(packed), len(memory.views), len(pointers), len(gaps))
        head = REQUEST.pack(*blocks, *threads, schedule.lazy | schedule.eager << 1, schedule.code, schedule.timeout, *sizes)
        places = b"".join(struct.pack("=2Q", *gap) for gap in gaps)
        return self._run(b"".join((head, packed, memory.tables, places, *memory.views)), memory, schedule.timeout)

    def _run(self, request: bytes, memory: Memory, timeout: float) -> HostStats:
        if self.again is not None and not self.executable.exists():
            return dataclasses.replace(self.again(), again=None)._run(request, memory, timeout)
        try:
            ended = execute([str(self.executable)], request, timeout + GRACE_SECONDS)
            # ThreadSanitizer of GCC 13 and older cannot live with as random addresses as newer kernels give.
            if b"unexpected memory mapping" in ended.stderr and (setarch := shutil.which("setarch")):
                ended = execute([setarch, "-R", str(self.executable)], request, timeout + GRACE_SECONDS)
        except OSError as error:
            raise LaunchError(
                f"kernel {self.name}: {self.executable} cannot be run ({error}); set TMPDIR to a folder that allows it"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise LaunchError(
                f"kernel {self.name} did not end within {timeout:g} s and had to be killed: look for an endless loop; "
                "or give it a longer Schedule.timeout"
            ) from error
        reply, errors = ended.stdout, ended.stderr.decode(errors="replace")
        start = STATS.size + LENGTH.size
        length = LENGTH.unpack_from(reply, STATS.size)[0] if len(reply) >= start else 0
        # NOTE: where it was the runtime that ended the launch, the exit status is ThreadSanitizer's, which may have counted what it did not tell.
        if (ended.returncode and not length) or len(reply) < start + length:
            raise LaunchError(f"kernel {self.name}: {crash(self.executable, ended.returncode, errors)}")
        # What the kernel printed.
        sys.stderr.write(errors)
        if length:
            raise LaunchError(f"kernel {self.name}: {resolve(self.executable, reply[start : start + length].decode(errors='replace'))}")
        objects = self._objects(reply, start)
        memory.write_back(self.name, memoryview(reply)[start + COUNTS.size + len(self.objects) * (LENGTH.size + COUNTS.size) :])
        names = ("switches", "shared_memory_high_water", "read_bytes", "written_bytes", "seconds")
        launch = dict(zip(names, STATS.unpack_from(reply), strict=True)) | (
            {} if self.accesses else {"read_bytes": None, "written_bytes": None}
        )
        return HostStats(**dataclasses.asdict(sum(objects.values(), Counts())), **launch, objects=objects)

    def _objects(self, reply: bytes, start: int) -> dict[tuple[str, ...], Counts]:
        """Names of one type, together, and their counts; first what no object caused."""
        names: dict[int, tuple[str, ...]] = {}
        counts: dict[int, Counts] = {0: Counts(*COUNTS.unpack_from(reply, start))}
        at = start + COUNTS.size
        for name in self.objects:
            (kind,) = LENGTH.unpack_from(reply, at)
            names[kind] = (*names.get(kind, ()), name)
            counts[kind] = Counts(*COUNTS.unpack_from(reply, at + LENGTH.size))
            at += LENGTH.size + COUNTS.size
        return {names.get(kind, ()): found for kind, found in counts.items()}


class Memory:
    """The arrays of one launch: what the process allocates, and where their addresses go. Arrays whose bytes overlap, as views of one
    projection do, lie in one block, as in the memory that they come from."""

    def __init__(self, pointers: Mapping[int, np.ndarray[Any, Any]], packed_bytes: int) -> None:
        self.views: list[memoryview] = []
        self._starts: list[int] = []
        self._arrays = tuple(pointers.values())
        entries, places = b"", b""
        for low, high, owner in _blocks(self._arrays):
            self._starts.append(low)
            self.views.append(_bytes_at(low, high - low))
            entries += struct.pack("=2Q", high - low, (low - owner.ctypes.data) % ARRAY_ALIGNMENT)
        for offset, array in pointers.items():
            if not 0 <= offset <= packed_bytes - 8:
                raise ArgumentError(f"pointer at offset {offset}: the arguments have {packed_bytes} bytes")
            block = bisect.bisect_right(self._starts, _extent(array)[0]) - 1
            places += struct.pack("=3Q", offset, block, array.ctypes.data - self._starts[block])
        self.tables = entries + places

    def write_back(self, kernel: str, changed: memoryview) -> None:
        """Copy the blocks that the kernel changed, each after its index, into the caller's arrays.

        Raises:
            LaunchError: it changed one that is read-only.
        """
        while changed:
            (index,) = LENGTH.unpack_from(changed)
            start, view = self._starts[index], self.views[index]
            new = changed[LENGTH.size : LENGTH.size + len(view)]
            for at, array in enumerate(self._arrays):
                if not array.flags.writeable and start <= _extent(array)[0] < start + len(view) and _differs(array, new, start):
                    raise LaunchError(
                        f"kernel {kernel} wrote to array {at}, {array.dtype}{list(array.shape)}, which is read-only; pass one that may be written"
                    )
            view[:] = new
            changed = changed[LENGTH.size + len(view) :]


def _blocks(arrays: Iterable[np.ndarray[Any, Any]]) -> list[tuple[int, int, np.ndarray[Any, Any]]]:
    """Ranges of bytes, in order, that hold all arrays, none overlapping another; and what owns the memory of the first array in each."""
    found: list[tuple[int, int, np.ndarray[Any, Any]]] = []
    for low, high, array in sorted(((*_extent(array), array) for array in arrays), key=lambda entry: entry[:2]):
        if found and (low < found[-1][1] or low == found[-1][0]):
            begin, end, owner = found[-1]
            found[-1] = begin, max(end, high), owner
        else:
            found.append((low, high, _owner(array)))
    return found


def _differs(array: np.ndarray[Any, Any], new: memoryview, start: int) -> bool:
    """Whether any bit of the array is another one in `new`, which holds memory from address `start` on."""
    import numpy as np

    other = np.ndarray(array.shape, array.dtype, new, array.ctypes.data - start, array.strides)
    return array.tobytes() != other.tobytes()


def compile_host(
    source: str,
    name: str,
    *,
    objects: Sequence[str] = (),
    sanitizer: str | None = None,
    optimise: str = "-O1",
    pch: bool = True,
    include_dirs: Sequence[Path | str] = (),
    store: Store | None = None,
) -> HostBinary:
    """Compile kernel `name` of a rendered source for the CPU.

    Args:
        objects: members of the source's `struct Tiles` to count apart, as `QK` or `QK.B`.
        sanitizer: None, `address` (memory), `thread` (races between the threads of a CTA), `undefined` (alignment, shifts, ...), or
            `accesses`, which finds nothing and counts the bytes of global memory that a launch touches.
        optimise: -O1 compiles and runs fastest altogether.
        pch: precompile what all kernels include, once a set of flags (5 s), in the store's folder.
        include_dirs: folders of the template's own headers, searched after Vidrial's.
        store: keeps the executable; by default the one of this process.

    Raises:
        CompileError: g++ rejects the source; names the template's line.
        ToolchainError: there is no host compiler, it is too old, or headers are missing.
        ArgumentError: the sanitizer is not known.
    """
    store = store or Store.shared()
    build = Build.find(sanitizer, optimise, tuple(str(folder) for folder in include_dirs), store.root / "host")
    entry_point = ", ".join((f"&{name}", *(f"Tiles::{one.replace('.', '::')}" for one in objects)))
    text = TEXT.format(source=source, name=name, entry=entry_point)
    key = binary_key(text, "host", (*build.flags, *build.include_dirs), build.version)

    def make() -> Entry:
        return store.put(key, build.executable(text, name, pch), text, {"kernel": name, "sanitizer": sanitizer}, PAYLOAD)

    executable = temporary() / key[:32]
    try:
        entry = store.get(key, PAYLOAD) or once(key, make, 4 * COMPILE_SECONDS)
        if not executable.exists():
            _write_executable(executable, entry.image)
    except OSError as error:
        raise ToolchainError(
            f"kernel {name} cannot be compiled or written in {executable.parent} ({error}); make room, or set TMPDIR"
        ) from None
    named: dict[str, Any] = {"objects": objects, "sanitizer": sanitizer, "optimise": optimise, "pch": pch, "include_dirs": include_dirs}
    again = functools.partial(compile_host, source, name, store=store, **named)
    return HostBinary(name, executable, tuple(objects), sanitizer == "accesses", again)


def _write_executable(path: Path, image: bytes) -> None:
    staged = path.with_suffix(f".{uuid.uuid4().hex}")
    staged.write_bytes(image)
    staged.chmod(0o700)
    os.replace(staged, path)


def _three(what: str, sizes: int | Sequence[int]) -> tuple[int, int, int]:
    given = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    if not 1 <= len(given) <= 3 or any(n < 1 for n in given):
        raise ArgumentError(f"{what} {sizes}: accepted are one to three sizes of at least 1")
    x, y, z = (*given, 1, 1)[:3]
    return x, y, z


def _extent(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    import numpy as np

    low, high = np.lib.array_utils.byte_bounds(array)
    return low, high


def _owner(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The array that owns the memory of a view."""
    import numpy as np

    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _bytes_at(address: int, count: int) -> memoryview:
    return memoryview((ctypes.c_char * count).from_address(address)).cast("B")
