"""Who waits for whom in a warp-specialised kernel: barriers in shared memory, named barriers, roles and their registers.

roles = Roles(producer=1, consumers=3)
bars = Barriers(k=TmaRing((k,), consumer_warps=roles.consumer_warps), q=Barrier(1))
smem = SharedMemory(K=k, Bars=bars.bytes)
Tiles(threads=roles.threads, smem=smem, Roles=roles, Bars=bars)                     # Tiles::Bars::k, Tiles::Bars::init
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, TypeAlias

from vidrial.device import CTA_THREADS, HOPPER, VECTOR_BYTES, WARP
from vidrial.errors import LayoutError
from vidrial.layout.schedule import Scheduler
from vidrial.layout.tma import TmaTile

WARPGROUP = 128
BARRIER_BYTES, ARRIVALS_LIMIT, BYTES_LIMIT, NAMED_IDS = 8, 1 << 20, 1 << 20, 15
REGISTERS, REGISTER_UNIT, MOST_REGISTERS, SM_THREADS = 65536, 8, 256, 2048
# setmaxnreg's least; and what a consumer can use at most, or a producer, which issues copies and little else.
LEAST_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS = 24, 240, 56


@dataclasses.dataclass(frozen=True)
class TmaRing:
    """Stages that a producer warp fills with `tiles`, one of each, by TMA, and that `consumer_warps` warps read.

    `bulk_bytes`: what bulk copies bring to a stage besides.

    Raises:
        LayoutError: the tiles have different numbers of stages; no warp reads; or a stage is more than a barrier can count.
    """

    tiles: tuple[TmaTile, ...]
    consumer_warps: int
    bulk_bytes: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiles", tuple(self.tiles))
        stages = sorted({t.tile.stages for t in self.tiles})
        if len(stages) != 1:
            raise LayoutError(f"a ring of tiles of {stages} stages; give tiles that all have the same number, at least one tile")
        if not 1 <= self.consumer_warps < ARRIVALS_LIMIT:
            raise LayoutError(f"a ring that {self.consumer_warps} warps read; give 1 or more")
        if self.bulk_bytes < 0 or self.bulk_bytes % VECTOR_BYTES:
            raise LayoutError(f"{self.bulk_bytes} bytes by bulk copies; these bring multiples of {VECTOR_BYTES}")
        if self.bytes >= BYTES_LIMIT:
            raise LayoutError(f"a stage of {self.bytes} bytes: a barrier counts up to {BYTES_LIMIT - 1}; take smaller tiles")

    @property
    def stages(self) -> int:
        """Stages of the ring."""
        return self.tiles[0].tile.stages

    @property
    def bytes(self) -> int:
        """Bytes of a stage."""
        return sum(t.bytes for t in self.tiles) + self.bulk_bytes

    @property
    def size(self) -> int:
        """Bytes of its barriers."""
        return 2 * BARRIER_BYTES * self.stages

    def placed(self, at: int, name: str) -> tuple[str, str]:
        """The C++ type with its barriers from byte `at` on, and the arguments of its `init` after the region's address."""
        full, empty = at, at + BARRIER_BYTES * self.stages
        return f"vidrial::TmaRing<{self.stages}, {self.bytes}, {self.consumer_warps}, {full}, {empty}>", f'"{name}.full", "{name}.empty"'


@dataclasses.dataclass(frozen=True)
class Barrier:
    """`count` barriers, each of whose phases ends after `arrivals` arrivals, and all bytes that these announce.

    Raises:
        LayoutError: a number is not positive.
    """

    arrivals: int
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.arrivals < ARRIVALS_LIMIT or self.count < 1:
            raise LayoutError(
                f"{self.count} barriers of {self.arrivals} arrivals; give at least one, of 1 to {ARRIVALS_LIMIT - 1} arrivals"
            )

    @property
    def size(self) -> int:
        """Bytes in shared memory."""
        return BARRIER_BYTES * self.count

    def placed(self, at: int, name: str) -> tuple[str, str]:
        """As `TmaRing.placed`."""
        return f"vidrial::Barrier<{self.count}, {self.arrivals}, {at}>", f'"{name}"'


Placeable: TypeAlias = TmaRing | Barrier | Scheduler


def never_completed(name: str, member: object, threads: int) -> str | None:
    """Why a CTA of so many threads waits for ever at one of the (named) barriers of a member of `Tiles`, or None.

    A ring's producer is a warp of its own, as is the one that draws tiles: it does not release what it fills.
    """
    if isinstance(member, NamedBarriers):
        for meeting, what in member.meetings.items():
            if what.threads > threads:
                return f"{name}.{meeting}: {what.threads} threads meet at a named barrier; the CTA has {threads}, which would wait for ever"
    for barrier, one in member.members.items() if isinstance(member, Barriers) else ():
        readers = 0 if isinstance(one, Barrier) else one.consumer_warps
        if readers > threads // WARP - 1:
            return (
                f"{name}.{barrier}: {readers} consumer warps release what a producer warp fills; the CTA has {threads // WARP} warps with it, "
                "and it would wait for ever"
            )
        if isinstance(one, Barrier) and one.arrivals > threads:
            return f"{name}.{barrier}: a phase of {one.arrivals} arrivals; the CTA has {threads} threads, which would wait for ever"
    return None


class Barriers:
    """A region of shared memory that holds nothing but barriers, by name: `Barriers(k=TmaRing(...), q=Barrier(1))`.

    One thread calls the struct's `init` with the region's address, then `barrier_init_fence`, then all meet in `__syncthreads`.

    Raises:
        LayoutError: a member is something else.
    """

    def __init__(self, **members: Placeable) -> None:
        self.members = members
        self.offsets: dict[str, int] = {}
        end = 0
        for name, member in members.items():
            if not isinstance(member, (TmaRing, Barrier, Scheduler)):
                raise LayoutError(f"barriers {name}: {member!r}; accepted: a TmaRing, a Barrier, a Scheduler")
            self.offsets[name] = end
            end += member.size
        self.bytes = max(end, BARRIER_BYTES)

    def declare(self, name: str) -> str:
        """`struct name {...};`: a type for each member, and what initialises them all."""
        placed = {member: what.placed(self.offsets[member], member) for member, what in self.members.items()}
        lines = [f"    using {member} = {cpp};" for member, (cpp, _) in placed.items()]
        calls = " ".join(f"{member}::init(region, {arguments});" for member, (_, arguments) in placed.items())
        return "\n".join([f"  struct {name} {{", *lines, f"    CUTE_DEVICE static void init(uint32_t region) {{ {calls} }}", "  };"])

    def __repr__(self) -> str:
        return f"Barriers({', '.join(f'{name}={member}' for name, member in self.members.items())})"


@dataclasses.dataclass(frozen=True)
class Meeting:
    """`count` named barriers, at each of which `threads` threads meet, whole warps.

    Raises:
        LayoutError: not whole warps, or no barrier.
    """

    threads: int
    count: int = 1

    def __post_init__(self) -> None:
        if self.threads < WARP or self.threads % WARP or self.threads > CTA_THREADS or self.count < 1:
            raise LayoutError(
                f"{self.count} named barriers of {self.threads} threads; give at least one, of whole warps, up to {CTA_THREADS} threads"
            )


class NamedBarriers:
    """Named barriers with ids of their own, from 1 on: `NamedBarriers(turn=Meeting(256, count=2), vote=Meeting(128, count=3))`.

    Raises:
        LayoutError: there are not so many ids.
    """

    def __init__(self, **meetings: Meeting) -> None:
        self.meetings = meetings
        self.ids: dict[str, int] = {}
        following = 1
        for name, meeting in meetings.items():
            self.ids[name] = following
            following += meeting.count
        if following - 1 > NAMED_IDS:
            raise LayoutError(f"{following - 1} named barriers: a CTA has {NAMED_IDS}, besides that of __syncthreads; share some")

    def declare(self, name: str) -> str:
        """`struct name {...};`: a type for each."""
        types = (f"    using {n} = vidrial::NamedBarrier<{self.ids[n]}, {m.count}, {m.threads}>;" for n, m in self.meetings.items())
        return "\n".join([f"  struct {name} {{", *types, "  };"])

    def __repr__(self) -> str:
        return f"NamedBarriers({', '.join(f'{name}={meeting}' for name, meeting in self.meetings.items())})"


@dataclasses.dataclass(frozen=True)
class Roles:
    """`producer` warpgroups that issue copies, then `consumers` warpgroups that compute, and the registers per thread of each.

    What the launch takes for all threads is a pool: producers give theirs back, consumers take them. `registers` = (of producers, of
    consumers), by default as many as consumers can have; (launched, launched) reallocates none. `ctas`: CTAs that an SM holds at once,
    the `min_blocks` of the kernel's Tiles.

    Raises:
        LayoutError: too many threads, registers that setmaxnreg does not take, or more than the pool has.
    """

    ARCH: ClassVar[str] = HOPPER
    producer: int = 1
    consumers: int = 2
    registers: tuple[int, int] | None = None
    ctas: int = 1

    def __post_init__(self) -> None:
        if min(self.producer, self.consumers, self.ctas) < 1 or self.threads * self.ctas > SM_THREADS or self.threads > CTA_THREADS:
            raise LayoutError(
                f"{self.producer} producing and {self.consumers} consuming warpgroups, {self.ctas} such CTAs; "
                f"accepted: 1 or more of each, at most {CTA_THREADS // WARPGROUP} warpgroups in a CTA and {SM_THREADS // WARPGROUP} on an SM"
            )
        producer, consumer = self.reallocated
        for what, registers in (("producer", producer), ("consumer", consumer)):
            if not LEAST_REGISTERS <= registers <= MOST_REGISTERS or registers % REGISTER_UNIT:
                raise LayoutError(
                    f"{registers} registers per {what} thread; accepted are multiples of {REGISTER_UNIT} "
                    f"from {LEAST_REGISTERS} to {MOST_REGISTERS}"
                )
        if producer > self.launched or consumer < self.launched:
            raise LayoutError(
                f"registers ({producer}, {consumer}): the launch gives {self.launched} per thread; producers may keep at most so many, "
                "consumers take at least so many"
            )
        wanted = WARPGROUP * (self.producer * producer + self.consumers * consumer)
        if wanted > self.pool:
            raise LayoutError(
                f"registers ({producer}, {consumer}): {self.producer} x {producer} and {self.consumers} x {consumer} per thread of a "
                f"warpgroup are {wanted}; the launch takes {self.launched} x {self.threads} = {self.pool}, and the last warpgroup would wait "
                "for ever"
            )

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return WARPGROUP * (self.producer + self.consumers)

    @property
    def consumer_warps(self) -> int:
        """Warps that consume."""
        return 4 * self.consumers

    @property
    def launched(self) -> int:
        """Registers per thread that the launch takes: all that an SM can give so many threads."""
        return min(REGISTERS // (self.threads * self.ctas) // REGISTER_UNIT * REGISTER_UNIT, MOST_REGISTERS)

    @property
    def pool(self) -> int:
        """Registers that the launch takes for a CTA."""
        return self.launched * self.threads

    @property
    def reallocated(self) -> tuple[int, int]:
        """Registers per thread of producers and of consumers."""
        if self.registers is not None:
            return self.registers
        if self.launched >= CONSUMER_REGISTERS:
            return self.launched, self.launched
        groups = self.pool // WARPGROUP
        consumer = min((groups - LEAST_REGISTERS * self.producer) // self.consumers // REGISTER_UNIT * REGISTER_UNIT, CONSUMER_REGISTERS)
        left = (groups - consumer * self.consumers) // self.producer // REGISTER_UNIT * REGISTER_UNIT
        return min(left, PRODUCER_REGISTERS, self.launched), consumer

    @property
    def cpp(self) -> str:
        """The C++ type."""
        producer, consumer = (0 if registers == self.launched else registers for registers in self.reallocated)
        return f"vidrial::Roles<{self.producer}, {self.consumers}, {producer}, {consumer}, {self.ctas}>"
