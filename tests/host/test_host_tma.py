"""Planted bugs around TMA, barriers and roles: each ends as a LaunchError that names what is wrong, by barrier and role, with its line."""

from __future__ import annotations

import dataclasses
import functools
import struct

import numpy as np
import pytest

from vidrial.dtypes import DType
from vidrial.errors import LaunchError
from vidrial.host.target import SCHEDULES, HostBinary, HostStats, Schedule, compile_host
from vidrial.host.tensor_map import pack
from vidrial.layout.smem import SmemLayout
from vidrial.layout.tma import TensorMap, TmaTile

# A producer warp fills two stages with tiles of 64 x 64, two consumer warpgroups add up their halves of each.
KERNEL = """#include <vidrial/prelude.cuh>
#pragma nv_hdrstop
#include <vidrial/arch/shared_memory.cuh>
#include <vidrial/arch/tma.cuh>
#include <vidrial/tile/smem.cuh>
struct Args { vidrial::TensorMap map; float* x; int n; };
using namespace vidrial;
#line 1 "bug.cu"
extern "C" __global__ void __launch_bounds__(384) bug(__grid_constant__ Args const args) {
int const t = threadIdx.x, lane = t % 32, warp = t / 32, n = args.n;
VIDRIAL_SHARED_MEMORY(raw)
uint32_t const smem = shared_address(raw), full = smem + 16384, empty = full + 16;
if (t == 0) {
for (int i = 0; i < 2; ++i) {
barrier_init(full + 8 * i, 1, "ring.full", i);
barrier_init(empty + 8 * i, 8, "ring.empty", i);
}
barrier_init_fence();
}
__syncthreads();
if (warp < 4) {
name_role("producer");
registers_decrease<24>();
if (warp == 0)
for (int i = 0; i < n; ++i) {
int const stage = i % 2;
barrier_wait_free(empty + 8 * stage, (i / 2 & 1) ^ 1);
__syncwarp();
if (lane == 0) {
barrier_expect(full + 8 * stage, 8192);
tma_load(args.map, full + 8 * stage, smem + stage * 8192, kEvictNormal, 0, i * 64);
}
}
return;
}
name_role("consumer");
registers_increase<240>();
float sum = 0;
for (int i = 0; i < n; ++i) {
int const stage = i % 2;
barrier_wait(full + 8 * stage, i / 2 & 1);
// WAITED
for (int r = 0; r < 16; ++r) {
uint32_t const at = (t - 128) / 64 * 2048 + r * 128 + t % 64 * 2;
sum += __uint_as_float(uint32_t(*static_cast<uint16_t*>(shared_pointer(smem + stage * 8192 + (at ^ (at >> 7 & 7) << 4)))) << 16);
}
if (!named_any(warp / 4, 128, true)) sum = 0;
__syncwarp();
if (lane == 0) barrier_arrive(empty + 8 * stage);
}
named_sync(3, 256);
args.x[t - 128] = sum;
}
"""
TILES = 5
FULL, EMPTY = "barrier_wait(full + 8 * stage, i / 2 & 1);", "barrier_wait_free(empty + 8 * stage, (i / 2 & 1) ^ 1);"
RELEASE, EXPECT, LOAD = "if (lane == 0) barrier_arrive(empty", "barrier_expect(full + 8 * stage, 8192);", "tma_load(args.map"
VOTE, INIT = "if (!named_any(warp / 4, 128, true)) sum = 0;", 'barrier_init(full + 8 * i, 1, "ring.full", i);'
READ = "sum += __uint_as_float"
LATE, BOTH = SCHEDULES[:1], SCHEDULES[:2]
# The threads of a role wait together, and each barrier's state is told.
PRODUCER = r"threads 0-31 \(producer\): wait for barrier ring\.empty\[{}\], parity {} at bug.cu"
CONSUMERS = r"threads 128-383 \(consumer\): wait for barrier ring\.full\[{}\], parity {} at bug.cu"


@dataclasses.dataclass(frozen=True)
class Bug:
    """`wrong` in place of `right`, found under each of `schedules` by a message that names a line which begins as `culprit` does.

    `also`: what the message says besides.
    """

    right: str
    wrong: str
    message: str
    culprit: str | tuple[str, ...]
    also: tuple[str, ...] = ()
    schedules: tuple[Schedule, ...] = SCHEDULES
    sanitizer: str | None = None


BUGS = {
    "missing empty wait": Bug(EMPTY, "", "the wait for an empty stage is missing", (LOAD, "barrier_expect")),
    "stage released too early": Bug("// WAITED", f"__syncwarp();\n{RELEASE} + 8 * stage);", "data race", LOAD, (), BOTH, "thread"),
    "read before the wait": Bug(FULL, "", "data race", READ, (), BOTH, "thread"),
    "missing full wait": Bug(
        FULL, "", "the wait for an empty stage is missing, or a stage was released that nobody waited for", "barrier_expect", (), LATE
    ),
    "too many bytes": Bug(
        EXPECT,
        EXPECT.replace("8192", "8208"),
        CONSUMERS.format(0, 0),
        FULL,
        ("barrier ring.full[0]: 0 phases completed, 1 of 1 arrivals of the next, 16 bytes announced that did not come",),
    ),
    "too few bytes": Bug(
        EXPECT,
        EXPECT.replace("8192", "8176"),
        r"barrier ring\.full\[0\]: 16 bytes more came than were announced; the last copy was issued at bug.cu:",
        LOAD,
    ),
    "no bytes": Bug(EXPECT, "", CONSUMERS.format(0, 0), FULL, ("8192 bytes that nobody announced",)),
    "phase that never changes": Bug(
        FULL, FULL.replace("i / 2 & 1", "0"), "this thread has passed its phase of parity 0 before", "barrier_wait("
    ),
    "first phase of a full stage": Bug(
        FULL, FULL.replace("i / 2 & 1", "(i / 2 & 1) ^ 1"), r"a wait for parity 1 passes at once|" + CONSUMERS.format(0, 1), "barrier_wait("
    ),
    "first phase of an empty stage": Bug(
        EMPTY,
        EMPTY.replace(" ^ 1", ""),
        PRODUCER.format(0, 0),
        "barrier_wait_free",
        ("barrier ring.empty[0]: 0 phases completed, 0 of 8 arrivals",),
    ),
    "double init": Bug(
        INIT,
        INIT + "\n" + INIT.replace("ring.full", "ring.again"),
        r"ring\.again\[0\] at 0x4000 is initialised already, as ring\.full\[0\]",
        "barrier_init(",
    ),
    "no init": Bug(INIT, "", "no barrier was initialised at the shared address 0x40", "barrier_"),
    "init of no arrivals": Bug(INIT, INIT.replace("i, 1", "i, 0"), r"barrier_init: ring\.full\[0\] of 0 arrivals", "barrier_init("),
    "init out of shared memory": Bug(
        INIT, INIT.replace("full + 8", "full + 64 + 8"), "which is not in dynamic shared memory", "barrier_init("
    ),
    "misaligned init": Bug(INIT, INIT.replace("full + 8", "full + 4 + 8"), "which is not a multiple of 8", "barrier_init("),
    "overwritten barrier": Bug(
        "__syncthreads();\n",
        "__syncthreads();\nif (t == 0) raw[16389] = 1;\n__syncthreads();\n",
        r"barrier ring\.full\[0\] at the shared address 0x4000 was overwritten",
        "barrier_",
    ),
    "missing release": Bug(
        RELEASE,
        RELEASE.replace("lane == 0", "lane == 0 && warp != 7"),
        PRODUCER.format(0, 0),
        "barrier_wait_free",
        (
            "threads 128-383 (consumer): wait for barrier ring.full[0], parity 1",
            "barrier ring.empty[1]: 0 phases completed, 7 of 8 arrivals of the next",
        ),
    ),
    "release by every thread": Bug(RELEASE, "barrier_arrive(empty", "barrier ring.empty", "barrier_", (), SCHEDULES[:1]),
    "vote by part of a warpgroup": Bug(
        VOTE,
        "if (warp % 4 < 2)\n" + VOTE,
        r"\(consumer\): wait in a vote of named barrier 1 at bug.cu",
        VOTE,
        ("named barrier 1: 64 of 128 threads came",),
    ),
    "named barrier of other threads": Bug(
        VOTE,
        VOTE.replace("128", "128 + warp % 4 * 32"),
        "named barrier [12]: .* threads came to one of .* threads, this thread to one of",
        "if (!named_any(",
    ),
    "named barrier of no whole warps": Bug(
        VOTE, VOTE.replace("128", "100"), "named barrier [12] of 100 threads: it takes whole warps", "if (!named_any("
    ),
    "named barrier 16": Bug(VOTE, VOTE.replace("warp / 4", "15 + warp / 4"), "ids are 1 to 15", "if (!named_any("),
    "pool too large": Bug(
        "registers_increase<240>",
        "registers_increase<248>",
        r"\(consumer\): wait for 248 registers per thread",
        "registers_increase",
        ("per thread, which are 10240 more; the CTA has 8192 left of 64512",),
    ),
    "registers of part of a warpgroup": Bug(
        "registers_increase<240>",
        "if (warp != 6)\nregisters_increase<240>",
        "warpgroup divergence|wait in registers_increase",
        "registers_increase",
    ),
    "registers in the wrong direction": Bug(
        "registers_increase<240>",
        "registers_increase<160>",
        "registers_increase: to 160 registers per thread, the warpgroup has 168",
        "registers_increase",
    ),
    "registers of no unit": Bug(
        "registers_increase<240>", "registers_increase<236>", "accepted are multiples of 8 from 24 to 256", "registers_increase"
    ),
    "target misaligned": Bug(
        "smem + stage * 8192,",
        "smem + 128 + stage * 8192,",
        "the shared address 0x80 is not a multiple of 1024, after which its swizzle repeats",
        LOAD,
    ),
    "target over the end": Bug(
        "smem + stage * 8192,", "smem + 9216 + stage * 8192,", "its 8192 bytes at the shared address 0x.* reach out of their region", LOAD
    ),
    "coordinates of another rank": Bug("0, i * 64);", "0, i * 64, 0);", "tma_load of k: 3 coordinates for a tensor of rank 2", LOAD),
    "map of nothing": Bug("tma_load(args.map,", "TensorMap none{};\ntma_load(none,", "what it is given is no tensor map", "tma_load(none"),
}


@functools.cache
def compiled(source: str, sanitizer: str | None = None) -> HostBinary:
    return compile_host(source, "bug", sanitizer=sanitizer)


def tensor(rows: int) -> TensorMap:
    return TensorMap(TmaTile(SmemLayout(DType.bfloat16, 64, 64, stages=2)), "k", (rows, 64), (64,))


def launch(
    binary: HostBinary, schedule: Schedule, rows: int = TILES * 64 - 3, there: int | None = None
) -> tuple[np.ndarray, np.ndarray, HostStats]:
    """What the kernel makes of a tensor of so many rows, of which `there` exist, and what it should."""
    values = np.random.default_rng(rows).integers(-8, 9, (rows, 64)).astype(np.float32)
    stored, x = (values[:there].view(np.uint32) >> 16).astype(np.uint16), np.full(256, np.nan, np.float32)
    tail = struct.pack("=Qi", 0, TILES)
    packed = pack(tensor(rows), "k") + tail + bytes(64 - len(tail))
    stats = binary.launch((1,), 384, 16384 + 32, packed, {0: stored, 128: x}, schedule)
    padded = np.concatenate([values, np.zeros((TILES * 64 - rows, 64), np.float32)])
    return x, padded.reshape(TILES, 4, 16, 64).sum((0, 2)).reshape(256), stats


@pytest.mark.parametrize("sanitizer", [None, "address", "thread"])
def test_the_kernel_is_right(sanitizer: str | None) -> None:
    for schedule in SCHEDULES:
        x, expected, _ = launch(compiled(KERNEL, sanitizer), schedule)
        assert (x == expected).all()


@pytest.mark.parametrize("name", BUGS)
def test_caught_with_its_line(name: str) -> None:
    bug = BUGS[name]
    assert KERNEL.count(bug.right) == 1, KERNEL.count(bug.right)
    source = KERNEL.replace(bug.right, bug.wrong)
    body = source.partition('#line 1 "bug.cu"\n')[2]
    lines = [1 + i for i, text in enumerate(body.splitlines()) if text.startswith(bug.culprit)]
    for schedule in bug.schedules:
        with pytest.raises(LaunchError, match=bug.message) as caught:
            launch(compiled(source, bug.sanitizer), schedule)
        summary = str(caught.value).partition("whole report")[0]
        assert any(f"bug.cu:{line}" in summary for line in lines), summary
        assert all(text in summary for text in bug.also), summary


def test_a_tensor_longer_than_its_array() -> None:
    """True lengths that are not: the box that reaches over the array's end is found."""
    for schedule in SCHEDULES:
        with pytest.raises(
            LaunchError, match="tma_load of k: it reads 128 bytes at .*, which are in no array of the launch: its box reaches over the end"
        ):
            launch(compiled(KERNEL), schedule, there=TILES * 64 - 4)


def test_a_stage_that_is_released_too_early_shows_when_copies_land_late() -> None:
    early = KERNEL.replace("// WAITED", f"__syncwarp();\n{RELEASE} + 8 * stage);").replace(
        f"__syncwarp();\n{RELEASE} + 8 * stage);\n}}\nnamed", "}\nnamed"
    )
    assert early.count(RELEASE) == 1
    wrong = []
    for schedule in (*SCHEDULES, *(Schedule(order=seed) for seed in range(8, 12))):
        x, expected, _ = launch(compiled(early), schedule)
        wrong.append(not (x == expected).all())
    assert any(wrong)
