"""Planted bugs around wgmma: each ends as a LaunchError that names the kernel's line. What it computes: tests/units/wgmma.cu."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from test_host_bugs import build, launch

from vidrial.errors import LaunchError
from vidrial.host.target import SCHEDULES, HostBinary, Schedule

INCLUDES = "#include <vidrial/arch/ptx.cuh>\n#include <cute/arch/mma_sm90_gmma.hpp>\n"
# B has 8 rows of 16 ones in two halves of 128 bytes; a second one lies behind it. Every product is 16.
KERNEL = """
VIDRIAL_SHARED_MEMORY(raw)
uint16_t* const b = reinterpret_cast<uint16_t*>(raw);
b[t] = b[t + 128] = 0x3f80;
vidrial::fence_async_proxy();
__syncthreads(); // STORED
uint32_t const a = 0x3f803f80;
uint64_t matrix = 8ull << 16 | 8ull << 32;
using Atom = cute::SM90::GMMA::MMA_64x8x16_F32BF16BF16_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>;
float d[4] = {}, e[4] = {};
cute::warpgroup_arrive();
// ISSUE
Atom::fma(a, a, a, a, matrix, d[0], d[1], d[2], d[3]);
cute::warpgroup_commit_batch();
// ISSUED
Atom::fma(a, a, a, a, matrix + 16, e[0], e[1], e[2], e[3]);
cute::warpgroup_commit_batch();
cute::warpgroup_wait<1>();
x[t] = d[0];
cute::warpgroup_wait<0>();
x[t] += e[3];
"""
ISSUE, ISSUED, READ = "// ISSUE\n", "// ISSUED", "x[t] = d[0];"
FIRST, SECOND, WAIT = "Atom::fma(a, a, a, a, matrix, d", "Atom::fma(a, a, a, a, matrix + 16", "cute::warpgroup_wait<1>"
FENCE, FENCE_MESSAGE = (
    "vidrial::fence_async_proxy();",
    "its B at the shared address 0x.+ was written, and no thread has called fence_async_proxy since",
)
LATE, BOTH = SCHEDULES[:1], SCHEDULES[:2]


@dataclasses.dataclass(frozen=True)
class Bug:
    """`wrong` in place of `right`, found under each of `schedules` by a message that names a line which begins as `culprit` does."""

    right: str
    wrong: str
    message: str
    culprit: str | tuple[str, ...] = FIRST
    schedules: tuple[Schedule, ...] = SCHEDULES
    sanitizer: str | None = None


BUGS = {
    "missing wait": Bug("cute::warpgroup_wait<0>();", "", "thread 0 ended with 1 wgmma that it never waited for", SECOND),
    "missing commit": Bug(
        "cute::warpgroup_commit_batch();\ncute::warpgroup_wait<1>();",
        "cute::warpgroup_wait<0>();",
        "1 wgmma that it never committed",
        SECOND,
    ),
    "stage overwritten before the wait": Bug(
        READ, "__syncthreads(); b[t + 128] = 0;", "its B at the shared address 0x1.0 was overwritten before the wait", SECOND, LATE
    ),
    "stage overwritten without a barrier": Bug(READ, "\nb[t ^ 64] = 0;", "data race", "b[t ^ 64] = 0;", BOTH, "thread"),
    "stage read without a barrier": Bug("__syncthreads(); // STORED", "", "data race", "b[t] = b[t + 128]", BOTH, "thread"),
    "accumulators written on their way": Bug(ISSUED, "d[2] = 1;", "its accumulator 2 was written before the wait", FIRST, LATE),
    **{
        f"accumulators changed by {change}": Bug(ISSUED, f"d[1] {change};", "its accumulator 1 was written before the wait", FIRST, LATE)
        for change in ("+= 1", "*= 2", "-= x[t]", "/= 3", "= -d[1]", "= fmaxf(d[1], 0.f)")
    },
    "accumulators out of scope": Bug(
        ISSUE,
        "struct F { __attribute__((noinline)) static void f(uint32_t a, uint64_t matrix) { float f[4] = {};\n"
        "Atom::fma(a, a, a, a, matrix, f[0], f[1], f[2], f[3]); } }; F::f(a, matrix);\n",
        "its accumulators went out of scope before the wait",
        "Atom::fma(a, a, a, a, matrix, f",
        LATE,
    ),
    "three warps": Bug(ISSUE, "if (t >= 96) return;\n", r"threads 0-95: wait in w(?s:.)*threads 96-127: have returned", (WAIT, FIRST)),
    "three warps issue": Bug(ISSUE, "if (t < 96)\n", "thread 96 waits for 0 wgmma, thread 95 for 1", WAIT, LATE),
    "three warps wait": Bug(
        "cute::warpgroup_wait<1>();",
        "if (t < 96) cute::warpgroup_wait<1>();\n__syncthreads();",
        "threads 0-95: wait in warpgroup_wait",
        "if (t < 96) cute",
    ),
    "one warp with another B": Bug(ISSUED, "if (t / 32 == 1) matrix -= 16;", "threads 0 and 32 issued different wgmma", SECOND),
    "misaligned descriptor": Bug(
        ISSUE,
        "matrix += (1ull << 62) + 16;\n",
        "B is misaligned: the 128-byte swizzle repeats every 1024 bytes, and the start address 0x100 is 256 bytes past",
    ),
    "base offset": Bug(ISSUE, "matrix |= 1ull << 49;\n", "of B has base offset 1; here it must be 0"),
    "address that was not shifted": Bug(ISSUE, "matrix |= 0x8000;\n", "bits 0000000000008000, which mean nothing"),
    "past the end": Bug(ISSUE, "matrix += 32;\n", "its B reaches the shared address 0x2.0, which is not in dynamic shared memory"),
    "past the end, checked": Bug(ISSUE, "matrix += 32;\n", "use-after-poison", FIRST, LATE, "address"),
    "missing arrive": Bug("cute::warpgroup_arrive();", "", "no warpgroup_arrive came before it"),
    "missing fence": Bug(FENCE, "", FENCE_MESSAGE),
    "missing fence, second time": Bug(READ, f"b[t] = 0; __syncthreads();\n{FIRST}[0], d[1], d[2], d[3]);", FENCE_MESSAGE),
}


@functools.cache
def compiled(body: str, sanitizer: str | None = None) -> HostBinary:
    return build(body, sanitizer, INCLUDES)


@pytest.mark.parametrize("name", BUGS)
def test_caught_with_its_line(name: str) -> None:
    bug = BUGS[name]
    assert KERNEL.count(bug.right) == 1
    body = KERNEL.replace(bug.right, bug.wrong)
    lines = [2 + i for i, text in enumerate(body.splitlines()) if text.startswith(bug.culprit)]
    for schedule in bug.schedules:
        with pytest.raises(LaunchError, match=bug.message) as caught:
            launch(compiled(body, bug.sanitizer), np.zeros(128, np.float32), schedule)
        summary = str(caught.value).partition("whole report")[0]
        assert any(f"bug.cu:{line}" in summary for line in lines), summary


@pytest.mark.parametrize("sanitizer", [None, "address", "thread"])
def test_a_late_wait_shows_when_results_land_late(sanitizer: str | None) -> None:
    late = KERNEL.replace("x[t] += e[3];", "").replace(READ, "x[t] = d[0] + e[3];")
    for schedule in SCHEDULES:
        x = np.zeros(128, np.float32)
        launch(compiled(KERNEL, sanitizer), x, schedule)
        assert (x == 32).all()
        launch(compiled(late, sanitizer), x, schedule)
        assert np.isnan(x).all() if schedule.lazy else (x == 32).all()


def test_accumulates_without_a_wait_between() -> None:
    """Two on the same accumulators: the first wait retires one, the second the other."""
    body = KERNEL.replace("e[0], e[1], e[2], e[3]", "d[0], d[1], d[2], d[3]").replace("e[3];", "d[3];").replace(READ, "x[t] = 0;")
    for schedule in SCHEDULES:
        x = np.zeros(128, np.float32)
        launch(compiled(body), x, schedule)
        assert (x == 32).all()


def test_accumulators_may_be_anywhere() -> None:
    """Not in one array, nor in its order; without a0 and a2, rows 0 to 7 stay as they are."""
    second = "Atom::fma(0, a, 0, a, matrix + 16, e[3], v, e[2], e[0]);\n"
    body = KERNEL.replace("Atom::fma(a, a, a, a, matrix + 16, e[0], e[1], e[2], e[3]);", f"float v = 1;\n{second}{second}")
    for schedule in SCHEDULES:
        x = np.zeros(128, np.float32)
        launch(compiled(body.replace("e[3];", "1000 * e[0] + 100 * e[1] + 10 * v + e[3];")), x, schedule)
        assert (x == 16 + 32000 + 10).all()


@pytest.mark.parametrize(("threads", "message"), [(127, "warps 0 to 3, the CTA has only 127"), (224, "warps 4 to 7, the CTA has only 224")])
def test_needs_whole_warpgroups(threads: int, message: str) -> None:
    body = KERNEL.replace("t +", "t % 128 +").replace("x[t]", "x[t % 128]").replace("b[t]", "b[t % 128]")
    with pytest.raises(LaunchError, match=f"it takes the 128 threads of {message}"):
        compiled(body).launch((1,), threads, 512, bytes(16), {0: np.zeros(128, np.float32)})


def test_two_warpgroups() -> None:
    body = KERNEL.replace("t +", "t % 128 +").replace("b[t]", "b[t % 128]").replace("Atom::fma(a, a", "Atom::fma(t < 128 ? 0 : a, a")
    for schedule in SCHEDULES:
        x = np.zeros(256, np.float32)
        stats = compiled(body).launch((1,), 256, 512, bytes(16), {0: x}, schedule)
        # Without a0, the first warpgroup's rows 0 to 7 have half of their products; e[3] is of rows 8 to 15.
        assert (x == np.repeat([24.0, 32.0], 128)).all()
        assert stats.wgmma == 4
