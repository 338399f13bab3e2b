"""The host target on a kernel in the style of rendered ones, and its own promises: arrays, arguments, errors, counters, the cache."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from units import bf16_bits, bf16_values, text

from vidrial.build.store import Store
from vidrial.errors import ArgumentError, CompileError, LaunchError, ToolchainError
from vidrial.host import compiler
from vidrial.host.target import SCHEDULES, HostBinary, HostStats, Schedule, _write_executable, compile_host

SCALE = """struct Args { float const* x; float* y; int rows, stride; float factor; };
extern "C" __global__ void __launch_bounds__(32) scale(__grid_constant__ Args const args) {
  int const row = blockIdx.x, column = threadIdx.x;
  args.y[row * 32 + column] = args.factor * args.x[row * args.stride + column];
}
"""
GEMM_SMEM = 4 * 64 * 64 * 2


def gemm(m: int, n: int, k: int, schedule: Schedule = SCHEDULES[0], sanitizer: str | None = None) -> HostStats:
    """Run the GEMM unit and compare: bf16 products are exact in float32, sums of k of them are not."""
    rng = np.random.default_rng(m)
    a, b = (bf16_bits(rng.standard_normal((rows, k))) for rows in (m, n))
    c = np.full((m, n), np.nan, np.float32)
    packed = bytes(24) + struct.pack("3i4x", m, n, k)
    stats = compile_host(text("gemm.cu"), "gemm", sanitizer=sanitizer).launch(
        (-(-m // 64), -(-n // 64)), 128, GEMM_SMEM, packed, {0: a, 8: b, 16: c}, schedule
    )
    expected = bf16_values(a).astype(np.float64) @ bf16_values(b).T.astype(np.float64)
    magnitude = np.abs(bf16_values(a)).astype(np.float64) @ np.abs(bf16_values(b)).T
    assert (np.abs(c - expected) <= k * 2.0**-24 * magnitude).all()
    return stats


@pytest.mark.parametrize("shape", [(1, 1, 64), (65, 63, 128), (100, 129, 192), (64, 64, 320)])
def test_gemm(shape: tuple[int, int, int]) -> None:
    for schedule in SCHEDULES:
        gemm(*shape, schedule)


def test_gemm_is_clean_under_the_sanitizers() -> None:
    for sanitizer in ("address", "thread"):
        for schedule in SCHEDULES[:2]:
            gemm(65, 63, 128, schedule, sanitizer)


def test_counters() -> None:
    stats = gemm(64, 64, 128)
    # 4 warps, 2 x 4 atoms, 4 steps of k in a tile, 2 tiles; ldmatrix x4: 2 for A and 2 for B a step.
    assert (stats.mma, stats.ldmatrix, stats.ldmatrix_conflicts) == (4 * 2 * 4 * 4 * 2, 4 * 4 * 4 * 2, 0)
    # A tile is 64 rows of 128 bytes; a warp's request covers 4 rows.
    assert (stats.cp_async_bytes, stats.cp_async_sectors, stats.cp_async_requests) == (2 * 2 * 64 * 128, 2 * 2 * 64 * 4, 2 * 2 * 16)
    assert stats.shared_memory_high_water == GEMM_SMEM
    assert stats.switches > 128
    assert gemm(33, 64, 64).cp_async_bytes == (33 + 64) * 128


def test_bank_conflicts_are_counted() -> None:
    source = text("ldmatrix.cu", "using Atom = cute::SM75_U32x4_LDSM_N;").replace("8 * lane", "64 * lane")
    elements = np.arange(256, dtype=np.uint16)
    stats = compile_host(source, "unit").launch((1,), 32, 4096, bytes(16), {0: elements, 8: np.zeros_like(elements)})
    assert stats.ldmatrix_conflicts == 4 * 7


def test_arrays_keep_their_strides_and_the_rest_of_their_memory() -> None:
    whole = np.arange(5 * 50, dtype=np.float32).reshape(5, 50)
    x, y = whole[::2, 3:35], np.full((4, 32), -1, np.float32)
    packed = bytes(16) + struct.pack("2if4x", 3, 100, 2.0)
    compile_host(SCALE, "scale").launch((3,), 32, 0, packed, {0: x, 8: y[:3]})
    assert (y[:3] == 2 * x).all() and (y[3] == -1).all() and (whole == np.arange(250).reshape(5, 50)).all()
    back = np.arange(3 * 32, dtype=np.float32).reshape(3, 32)
    compile_host(SCALE, "scale").launch((3,), 32, 0, bytes(16) + struct.pack("2if4x", 3, -32, 1.0), {0: back[::-1], 8: y[:3]})
    assert (y[:3] == back[::-1]).all()


def test_an_array_may_be_passed_twice_and_overlap() -> None:
    x = np.arange(64, dtype=np.float32).reshape(2, 32)
    packed = bytes(16) + struct.pack("2if4x", 2, 32, 3.0)
    compile_host(SCALE, "scale").launch((2,), 32, 0, packed, {0: x, 8: x})
    assert (x == 3 * np.arange(64).reshape(2, 32)).all()
    # Row r of y is row r + 1 of what x views: a launch of the last row alone reads what nobody wrote.
    y = np.arange(96, dtype=np.float32).reshape(3, 32)
    compile_host(SCALE, "scale").launch((1,), 32, 0, packed, {0: y[1:], 8: y[:2]})
    assert (y[0] == 3 * np.arange(32, 64)).all() and (y[1:].ravel() == np.arange(32, 96)).all()


def test_views_of_one_array_lie_as_they_do_in_it() -> None:
    """Interleaved columns: what is read, and what is written between them; what lies between stays as it is."""
    whole = np.arange(3 * 96, dtype=np.float32).reshape(3, 96)
    x, y, between = whole[:, :32], whole[:, 32:64], whole[:, 64:]
    x.flags.writeable = False
    kept = [x.copy(), between.copy()]
    narrow = SCALE.replace("row * 32 + column", "row * 96 + column")
    compile_host(narrow, "scale").launch((3,), 32, 0, bytes(16) + struct.pack("2if4x", 3, 96, 2.0), {0: x, 8: y})
    assert (y == 2 * x).all() and (x == kept[0]).all() and (between == kept[1]).all()
    y.flags.writeable = False
    with pytest.raises(LaunchError, match=r"wrote to array 1, float32\[3, 32\], which is read-only"):
        compile_host(narrow, "scale").launch((3,), 32, 0, bytes(16) + struct.pack("2if4x", 3, 96, 5.0), {0: x, 8: y})
    assert (y == 2 * x).all()


def test_addresses_are_aligned_as_on_a_gpu() -> None:
    source = """struct Args { char const* x; long* y; };
extern "C" __global__ void where(__grid_constant__ Args const args) { args.y[0] = long(args.x) % 256; }"""
    owner, y = np.zeros(1000, np.uint8), np.full(1, -1)
    for offset in (0, 2, 300):
        compile_host(source, "where").launch((1,), 1, 0, bytes(16), {0: owner[offset:], 8: y})
        assert y[0] == offset % 256


def test_several_parameters_and_dimensions() -> None:
    source = """extern "C" __global__ void __launch_bounds__(12) fill(char tag, double* x, short n, float2 pair) {
  int const thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  int const block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  if (thread < n) x[block * n + thread] = tag + 100 * thread + 10000 * block + pair.y;
}"""
    x = np.zeros((12, 11))
    packed = struct.pack("b7xqh6x2f", 7, 0, 11, 1.0, 0.5)
    compile_host(source, "fill").launch((2, 3, 2), (3, 2, 2), 0, packed, {8: x})
    assert (x == 7.5 + 100 * np.arange(11) + 10000 * np.arange(12)[:, None]).all()
    with pytest.raises(LaunchError, match="takes 32 bytes of arguments, the launch gives 16"):
        compile_host(source, "fill").launch((1,), 1, 0, bytes(16), {8: x})


def test_writing_a_read_only_array() -> None:
    x, y = np.zeros((1, 32), np.float32), np.ones((1, 32), np.float32)
    y.flags.writeable = False
    with pytest.raises(LaunchError, match=r"float32\[1, 32\], which is read-only"):
        compile_host(SCALE, "scale").launch((1,), 32, 0, bytes(16) + struct.pack("2if4x", 1, 32, 1.0), {0: x, 8: y})


def test_empty_arrays_and_prints() -> None:
    source = """struct Args { float* x; };
extern "C" __global__ void say(__grid_constant__ Args const args) { printf("hello %d\\n", int(threadIdx.x)); }"""
    assert compile_host(source, "say").launch((1,), 3, 0, bytes(8), {0: np.zeros(0, np.float32)}).mma == 0


@pytest.mark.parametrize(
    ("grid", "block", "shared_bytes", "pointers", "message"),
    [
        ((0,), 32, 0, {}, "grid"),
        ((1,), 1025, 0, {}, "1025 threads"),
        ((1, 1, 1, 1), 32, 0, {}, "grid"),
        ((1,), 32, 228 << 10, {}, "shared memory"),
        ((1,), 32, 0, {28: np.zeros(1)}, "offset 28"),
    ],
)
def test_launches_that_cuda_would_refuse(grid, block, shared_bytes, pointers, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ArgumentError, match=message):
        compile_host(SCALE, "scale").launch(grid, block, shared_bytes, bytes(32), pointers)


@pytest.mark.parametrize("wrong", ["order", "sanitizer"])
def test_unknown_options(wrong: str) -> None:
    with pytest.raises(ArgumentError, match="sideways"):
        if wrong == "order":
            compile_host(SCALE, "scale").launch((1,), 1, 0, bytes(32), {}, Schedule(order="sideways"))
        else:
            compile_host(SCALE, "scale", sanitizer="sideways")


def test_compile_errors_name_the_template() -> None:
    source = f'#line 41 "scale.cu.j2"\n{SCALE}'.replace("args.factor", "args.faktor")
    with pytest.raises(CompileError, match=r"scale does not compile for the host: .*faktor.*\n  at scale\.cu\.j2:44\n"):
        compile_host(source, "scale")
    with pytest.raises(CompileError, match="'other' was not declared"):
        compile_host(SCALE, "other")
    with pytest.raises(CompileError, match=r"twice\n  at shapes\.cuh:1\n  used at scale\.cu\.j2:2\n"):
        compile_host(
            '#line 1 "shapes.cuh"\ntemplate <int N> struct Even { static_assert(N % 2 == 0, "twice"); };\n#line 1 "scale.cu.j2"\n'
            'struct Args {};\nextern "C" __global__ void scale(Args const) { Even<3> e; }',
            "scale",
        )


def test_no_compiler_or_an_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ToolchainError, match="apt-get install g"):
        compile_host(SCALE, "scale")
    old = tmp_path / "old-g++"
    old.write_text('#!/bin/sh\ncase "$1" in --version) echo "g++ 9.4.0";; *) echo 9.4.0;; esac\n')
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    with pytest.raises(ToolchainError, match=r"is g\+\+ 9.4.0; the host target needs g\+\+ 12 or later: apt-get install g"):
        compile_host(SCALE, "scale")


def test_the_store_keeps_executables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "cache")
    compile_host(SCALE, "scale", store=store, pch=False)
    assert store.stats.writes == 1
    monkeypatch.setattr("vidrial.host.compiler.Build.executable", None)
    again = compile_host(SCALE, "scale", store=Store(tmp_path / "cache"), pch=False)
    y = np.zeros((1, 32), np.float32)
    again.launch((1,), 32, 0, bytes(16) + struct.pack("2if4x", 1, 32, 4.0), {0: np.ones((1, 32), np.float32), 8: y})
    assert (y == 4).all()


def test_compiling_and_launching_is_quick() -> None:
    compile_host(text("gemm.cu"), "gemm")
    start = time.perf_counter()
    compile_host(text("gemm.cu") + f"// {start}\n", "gemm")
    seconds = time.perf_counter() - start
    # 0.3 s on a quiet machine.
    assert seconds < 3, f"compiling a kernel took {seconds:.1f} s: is the precompiled header used?"
    start = time.perf_counter()
    gemm(64, 64, 64)
    assert time.perf_counter() - start < 2


def test_importing_it_touches_nothing() -> None:
    code = "import sys, vidrial.host.target; print([m for m in ('numpy', 'cupy', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


CONSTANT = 'extern "C" __global__ void k(int* p) { p[0] = %d; }'


def value(binary: HostBinary) -> int:
    out = np.zeros(1, np.int32)
    binary.launch(1, 1, 0, bytearray(8), {0: out})
    return int(out[0])


def test_a_folder_that_a_cleaner_removed_is_made_anew(own_tempdir: Path) -> None:
    compiler._folders.clear()
    first = compile_host(CONSTANT % 7, "k", pch=False)
    assert value(first) == 7
    shutil.rmtree(own_tempdir)
    own_tempdir.mkdir()
    assert value(first) == 7 and value(compile_host(CONSTANT % 8, "k", pch=False)) == 8
    assert value(first) == 7 and first.executable.exists()
    compiler._folders.clear()
    assert not list(own_tempdir.iterdir())


FORK = """
import os, sys, threading
import numpy as np
from vidrial.build.formats import binary_key
from vidrial.build.store import Store
from vidrial.host.compiler import temporary
from vidrial.host.target import compile_host
def value(binary):
    out = np.zeros(1, np.int32)
    binary.launch(1, 1, 0, bytearray(8), {0: out})
    return int(out[0])
binary, key = compile_host(sys.argv[1], "k", pch=False), binary_key("a", "sm_90a", (), "v")
store = Store.shared()
store.put(key, b"x", "source", {})
store.write_json("ranking", "r", {"a": 1})
mine = temporary()
if os.fork() == 0:
    # It works, in a folder of its own, and ends as any Python does, finalizers and all.
    assert value(binary) == 7 and temporary() != mine and value(compile_host(sys.argv[1].replace("7", "8"), "k", pch=False)) == 8
    print("child", flush=True)
    sys.exit()
os.wait()
assert value(binary) == 7 and store.get(key).image == b"x" and store.read_json("ranking", "r") == {"a": 1}
print("parent", store.root.parent)
"""


def test_a_forked_child_removes_nothing_of_its_parents(own_tempdir: Path) -> None:
    """The cache too, where it is a temporary one."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HOME": "/proc", "XDG_CACHE_HOME": "/proc"}
    del environment["VIDRIAL_CACHE_DIR"]
    command = [sys.executable, "-W", "ignore", "-c", FORK, CONSTANT % 7]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.stdout.split() == ["child", "parent", str(own_tempdir)], ended.stderr
    assert not list(own_tempdir.iterdir())


def test_threads_write_and_run_programs_at_once(own_tempdir: Path) -> None:
    """A child that another thread forks meanwhile has the new program open for writing: "Text file busy"."""
    image = compile_host(CONSTANT % 7, "k", pch=False).executable.read_bytes()

    def work(i: int) -> list[int]:
        found = []
        for j in range(40):
            _write_executable(own_tempdir / f"{i}-{j}", image)
            found.append(value(HostBinary("k", own_tempdir / f"{i}-{j}")))
        return found

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(work, range(8))) == [[7] * 40] * 8


LAUNCHER = """#!{python}
import os, sys
words = " ".join(sys.argv)
with open({log!r}, "a") as log:
    log.write(words + "\\n")
if any(full in words for full in {full!r}.split()):
    sys.exit("fatal error: error writing to it: No space left on device")
os.execvp("g++", ["g++", *sys.argv[1:]])
"""


def full_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *full: str) -> Path:
    """A compiler that has no room where its command names one of `full`; its log."""
    launcher, log = tmp_path / "compiler.py", tmp_path / "log"
    launcher.write_text(LAUNCHER.format(python=sys.executable, log=str(log), full=" ".join(full)))
    launcher.chmod(0o755)
    monkeypatch.setenv("CXX", str(launcher))
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "cache"))
    compiler._folders.clear()
    return log


def test_a_header_goes_where_there_is_room(tmp_path: Path, own_tempdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = full_disks(tmp_path, monkeypatch, f"{tmp_path}/cache")
    assert value(compile_host(CONSTANT % 7, "k")) == 7
    assert "pch.h.gch" in log.read_text() and list(own_tempdir.rglob("*.gch"))
    # Nowhere: without it.
    log = full_disks(tmp_path, monkeypatch, "pch.h.gch")
    assert value(compile_host(CONSTANT % 8, "k")) == 8
    # Nowhere for what no kernel runs without, and none for the kernel itself.
    for full in ("runtime.o", "host-"):
        full_disks(tmp_path, monkeypatch, full)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        with pytest.raises(ToolchainError, match="room"):
            compile_host(CONSTANT % 9, "k")


def test_threads_that_ask_at_once_have_one_temporary_folder(own_tempdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler._folders.clear()
    make = compiler.TemporaryFolder
    monkeypatch.setattr(compiler, "TemporaryFolder", lambda prefix: time.sleep(0.05) or make(prefix))
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: compiler.temporary(), range(8)))
    assert len(set(found)) == 1 and list(own_tempdir.iterdir()) == found[:1]


def test_many_threads_first_calls_compile_once(tmp_path: Path, own_tempdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = full_disks(tmp_path, monkeypatch, "nothing-is")
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda _: value(compile_host(CONSTANT % 7, "k", pch=False)), range(8))) == [7] * 8
    compiles = [line for line in log.read_text().splitlines() if " -o " in line]
    assert len(compiles) == 2, "the runtime and the kernel"


def test_the_precompiled_header_is_made_again_when_any_of_its_headers_changes(tmp_path: Path) -> None:
    """All of Vidrial's headers that it includes are among those whose digest names it: a stale one would be compiled in without a word."""
    build = compiler.Build.find(None, "-O1", (), tmp_path)
    include = compiler.Toolchain.find().vidrial_include
    header = include / "vidrial" / "host" / "pch.h"
    command = [*build.compiler.command, *build.flags, *compiler._include_flags(), "-x", "c++", "-M", str(header)]
    seen = subprocess.run(command, capture_output=True, text=True, check=True).stdout.replace("\\\n", " ").split()[1:]
    ours = {path.resolve().relative_to(include.resolve()) for path in map(Path, seen) if path.resolve().is_relative_to(include.resolve())}
    assert Path("vidrial/tile/mma.cuh") in ours
    assert not [path for path in ours if not any(path.is_relative_to(part) for part in compiler.PRECOMPILED)]
