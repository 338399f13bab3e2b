from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vidrial.build import cubins as build_module
from vidrial.build import once as once_module
from vidrial.build import toolchain
from vidrial.build.nvrtc import SPILL_LIMIT, Cubin, Resources, compile_source, cubin_key, refusal
from vidrial.build.pool import MALLOC, CompilePool, Job, worker_environment
from vidrial.build.processes import Child
from vidrial.build.store import Store
from vidrial.dtypes import DType
from vidrial.errors import CompileError, CompileStopped, ToolchainError
from vidrial.layout.smem import SmemLayout
from vidrial.layout.wgmma import WarpgroupMma
from vidrial.spec.source import Source

SOURCE = """// includes sha256:0
#line 1 "tiny.cu.j2"
#include <vidrial/prelude.cuh>
#pragma nv_hdrstop
#include <vidrial/tile/smem.cuh>
struct Args { float* out; int64_t n; };
using Tile = vidrial::SmemTile<cutlass::half_t, cute::ComposedLayout<cute::Swizzle<3, 3, 3>, cute::_0,
                               cute::Layout<cute::Shape<cute::Int<64>, cute::Int<64>>, cute::Stride<cute::Int<64>, cute::Int<1>>>>>;
extern "C" __global__ void __launch_bounds__(128) tiny(__grid_constant__ Args const args) {
  __shared__ float row[128];
  int const t = threadIdx.x;
  row[t ^ 1] = float(Tile::offset(t % 64, VALUE));
  __syncthreads();
  if (t < args.n) args.out[t] += row[t];
}
"""


def source(value: object) -> str:
    return SOURCE.replace("VALUE", str(value))


@pytest.fixture(scope="module")
def pool() -> Iterator[CompilePool]:
    with CompilePool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def plain() -> Cubin:
    return compile_source(source(8), "tiny", "sm_90a")


def machine(image: bytes) -> int:
    """The architecture that a cubin's ELF header names: 80, 90, ..."""
    flags = int.from_bytes(image[0x30:0x34], "little")
    return flags >> 8 & 0xFF


def test_a_library_of_another_version_than_its_files_say_is_keyed_by_its_own(
    plain: Cubin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path))
    rendered, said, loaded = Source(source(8), "tiny", "tiny", ()), (13, 99), list[tuple[int, int]]()
    monkeypatch.setattr(build_module, "compile_source", lambda *_, **__: plain)
    monkeypatch.setattr(toolchain, "_loaded_nvrtc", lambda: loaded[0] if loaded else None)
    monkeypatch.setattr(toolchain, "_wheel_nvrtc", lambda path: said)
    monkeypatch.setattr(build_module, "nvrtc", lambda: loaded.append((13, 0)))
    guessed = cubin_key(rendered.text, "sm_90a")
    assert build_module.build(rendered, "sm_90a") is plain
    certain = cubin_key(rendered.text, "sm_90a")
    assert certain != guessed and Store.shared().get(guessed) is None and Store.shared().get(certain) is not None
    loaded.clear()
    assert build_module.look_up(rendered, "sm_90a") == (certain, dataclasses.replace(plain, log="", seconds=0.0))


def test_cubin(plain: Cubin) -> None:
    assert plain.image[:4] == b"\x7fELF" and plain.arch == "sm_90a"
    sections, size, count = (int.from_bytes(plain.image[a:b], "little") for a, b in ((0x28, 0x30), (0x3A, 0x3C), (0x3C, 0x3E)))
    segments, each, number = (int.from_bytes(plain.image[a:b], "little") for a, b in ((0x20, 0x28), (0x36, 0x38), (0x38, 0x3A)))
    assert max(sections + size * count, segments + each * number) == len(plain.image)
    assert plain.resources.static_smem == 128 * 4
    assert (plain.resources.spill_stores, plain.resources.spill_loads, plain.resources.stack) == (0, 0, 0)
    assert 8 <= plain.resources.registers <= 32 and plain.seconds > 0


def test_sm_90_means_sm_90a(plain: Cubin) -> None:
    cubin = compile_source(source(8), "tiny", "sm_90")
    assert cubin.arch == "sm_90a" and cubin.image == plain.image
    assert cubin_key(source(8), "sm_90") == cubin_key(source(8), "sm_90a")
    assert len({cubin_key(source(8), "sm_80"), cubin_key(source(8), "sm_90a"), cubin_key(source(9), "sm_90a")}) == 3


def test_architectures_differ(plain: Cubin) -> None:
    assert machine(plain.image) == 90
    assert machine(compile_source(source(8), "tiny", "sm_80").image) == 80


def test_precompiled_headers_change_the_time_only(plain: Cubin, tmp_path: Path) -> None:
    first = compile_source(source(8), "tiny", "sm_90a", pch=str(tmp_path))
    again = [compile_source(source(8).replace("sha256:0", f"sha256:{n}"), f"other{n}", "sm_90a", pch=str(tmp_path)) for n in range(2)]
    assert {len(cubin.image) for cubin in (plain, first, *again)} == {len(plain.image)}
    assert {cubin.resources for cubin in (plain, first, *again)} == {plain.resources}
    assert len(list((tmp_path / "sm_90a").iterdir())) == 1
    assert min(cubin.seconds for cubin in again) < 0.6 * first.seconds


def test_resources_of_a_log() -> None:
    log = """ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
ptxas         .     72 bytes stack frame, 52 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 72 bytes cumulative stack size, 4096 bytes smem, 360 bytes cmem[0]"""
    assert Resources.parse(log) == Resources(registers=255, stack=72, spill_stores=52, spill_loads=36, static_smem=4096)


@pytest.mark.parametrize("folder", [False, True])
def test_an_error_names_the_template_and_the_config(tmp_path: Path, folder: bool) -> None:
    broken = source("undeclared")
    with pytest.raises(CompileError) as caught:
        compile_source(broken, "tiny", "sm_80", config="Config(m=128)", pch=str(tmp_path) if folder else None)
    first, place, config, saved = str(caught.value).splitlines()
    line = SOURCE.splitlines().index("  row[t ^ 1] = float(Tile::offset(t % 64, VALUE));") - 1
    assert first == 'tiny for sm_80 does not compile: identifier "undeclared" is undefined'
    assert place == f"  at tiny.cu.j2:{line}" and config == "  config: Config(m=128)"
    log = Path(saved.partition(": ")[2])
    assert 'identifier "undeclared" is undefined' in log.read_text() and (log.parent / "kernel.cu").read_text() == broken


def test_an_error_in_a_header_names_who_used_it(tmp_path: Path) -> None:
    (tmp_path / "mine.cuh").write_text('template <int N> struct Odd { static_assert(N % 2, "N must be odd"); };\n')
    text = source(8).replace("#include <vidrial/tile/smem.cuh>", "#include <vidrial/tile/smem.cuh>\n#include <mine.cuh>\nOdd<4> even;")
    with pytest.raises(CompileError) as caught:
        compile_source(text, "tiny", "sm_80", includes=(str(tmp_path),))
    first, place, used, _ = str(caught.value).splitlines()
    assert "N must be odd" in first and place.endswith("mine.cuh:1") and used == "  used at tiny.cu.j2:5"


def test_an_error_without_a_place() -> None:
    text = 'extern "C" __global__ void tiny() { asm("nonsense;"); }'
    with pytest.raises(CompileError, match="tiny for sm_80 does not compile: .*nonsense"):
        compile_source(text, "tiny", "sm_80")


def test_nvrtc_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidrial.build.nvrtc.nvrtc", lambda: (_ for _ in ()).throw(ToolchainError("NVRTC cannot be loaded")))
    with pytest.raises(ToolchainError, match="NVRTC"):
        compile_source(source(8), "tiny", "sm_80")


def test_pool_equals_serial(pool: CompilePool) -> None:
    jobs = [(n, source("undeclared" if n == 3 else n), "tiny", "sm_80" if n % 2 else "sm_90a") for n in range(5)]
    found = dict(pool.compile_many(jobs))
    assert sorted(map(int, map(str, found))) == [0, 1, 2, 3, 4]
    assert isinstance(found[3], CompileError) and "tiny.cu.j2" in str(found[3])
    for n in (1, 2):
        cubin, alone = found[n], compile_source(source(n), "tiny", jobs[n][3])
        assert isinstance(cubin, Cubin)
        assert (len(cubin.image), cubin.arch, cubin.resources) == (len(alone.image), alone.arch, alone.resources)


def test_pool_passes_everything_on(pool: CompilePool, tmp_path: Path) -> None:
    (tmp_path / "mine.cuh").write_text("#define EIGHT 8\n")
    text = source("EIGHT").replace("#include <vidrial/tile/smem.cuh>", "#include <vidrial/tile/smem.cuh>\n#include <mine.cuh>")
    good, bad = Job("good", text, "tiny", "sm_80", "C(1)", (str(tmp_path),)), Job("bad", text, "tiny", "sm_80", "C(2)")
    found = dict(pool.compile_many([good, bad]))
    assert isinstance(found["good"], Cubin) and isinstance(found["bad"], CompileError)
    assert "config: C(2)" in str(found["bad"])


def test_a_killed_worker_costs_its_job_and_no_other(pool: CompilePool) -> None:
    results = pool.compile_many([(n, source(n), "tiny", "sm_80") for n in range(4)])
    outcome = dict([next(results)])
    victim = next(worker for worker in pool_workers() if worker != os.getpid())
    os.kill(victim, signal.SIGKILL)
    outcome |= dict(results)
    failed = [result for result in outcome.values() if isinstance(result, CompileError)]
    assert len(outcome) == 4 and len(failed) <= 1
    assert all("SIGKILL" in str(error) for error in failed)
    assert all(isinstance(result, Cubin) for _, result in pool.compile_many([(n, source(n), "tiny", "sm_80") for n in range(2)]))


def pool_workers() -> list[int]:
    """Processes of this one that run the pool's program."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in children if b"vidrial.build.pool" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_crash_is_named() -> None:
    with CompilePool(1) as pool:
        results = pool.compile_many([("crash", source(1), "tiny", "sm_80", "Config(m=1)"), ("fine", source(2), "tiny", "sm_80")])
        worker = pool._take
        pool._take = lambda: _dying(worker())  # type: ignore[method-assign]
        key, error = next(results)
        pool._take = worker  # type: ignore[method-assign]
        assert key == "crash" and isinstance(error, CompileError)
        assert "SIGABRT" in str(error) and "Config(m=1)" in str(error)
        assert isinstance(next(results)[1], Cubin)


def test_a_workers_own_exception_is_no_configs_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def server(send, folder):\n    return lambda request: [][1]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = CompilePool(1)
    monkeypatch.setattr(pool, "_take", lambda: Child("broken:server", folder=True))
    with pool, pytest.raises(ToolchainError, match="IndexError: list index out of range") as raised:
        list(pool.compile_many([Job("k", source(1), "tiny", "sm_80", "Config(m=1)")]))
    assert "Config(m=1)" not in str(raised.value) and "broken.py" in "".join(raised.value.__notes__)


def test_many_threads_first_calls_compile_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path))
    compiled, real = list[str](), build_module.compile_source

    def slow(text: str, *args: Any, **named: Any) -> Cubin:
        compiled.append(text)
        time.sleep(0.2)
        return real(text, *args, **named)

    monkeypatch.setattr(build_module, "compile_source", slow)
    sources = [Source(source(n), "tiny", "tiny.cu.j2", ()) for n in (1, 2)]
    bad = Source(source("nothing"), "tiny", "tiny.cu.j2", ())
    with ThreadPoolExecutor(16) as threads:
        images = list(threads.map(lambda n: build_module.build(sources[n % 2], "sm_80").image, range(16)))
        refused = [threads.submit(build_module.build, bad, "sm_80") for _ in range(8)]
        assert all(isinstance(one.exception(), CompileError) for one in refused)
    assert len(set(images)) == 2 and images[0::2] == images[:1] * 8
    assert compiled.count(sources[0].text) == compiled.count(sources[1].text) == 1 and compiled.count(bad.text) <= 8
    assert not once_module._making


def test_a_compile_in_this_process_has_a_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path))
    hangs, go_on = Source(source(3), "tiny", "tiny.cu.j2", ()), threading.Event()
    monkeypatch.setattr(build_module, "compile_source", lambda *args, **named: go_on.wait(60))
    monkeypatch.setattr(build_module, "TIMEOUT_SECONDS", 0.3)
    begin = time.monotonic()
    with pytest.raises(CompileStopped, match=r"tiny for sm_80 did not compile within 0.3 s: Config\(m=2\)"):
        build_module.build(hangs, "sm_80", "Config(m=2)")
    assert time.monotonic() - begin < 10
    # A child that is forked meanwhile does not wait for a thread that it does not have.
    if (pid := os.fork()) == 0:
        monkeypatch.undo()
        os._exit(
            0
            if once_module.once("another", lambda: 7, 20.0) == once_module.once(cubin_key(hangs.text, "sm_80"), lambda: 7, 20.0) == 7
            else 1
        )
    assert os.waitpid(pid, 0)[1] == 0
    go_on.set()


def _dying(worker: object) -> object:
    os.kill(worker.process.pid, signal.SIGABRT)  # type: ignore[attr-defined]
    return worker


def test_a_compile_that_takes_too_long_is_stopped() -> None:
    with CompilePool(1, timeout=0.05) as pool:
        ((key, error),) = pool.compile_many([("slow", source(8), "tiny", "sm_80")])
    assert key == "slow" and isinstance(error, CompileError) and "took more than 0.05 s" in str(error)


def test_toolchain_errors_are_not_compile_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIDRIAL_CUTLASS_INCLUDE", str(tmp_path))
    with CompilePool(1) as pool, pytest.raises(ToolchainError, match="cute/layout.hpp"):
        list(pool.compile_many([(0, source(8), "tiny", "sm_80")]))


def test_nothing_is_left(own_tempdir: Path) -> None:
    with CompilePool(2) as own:
        results = own.compile_many([(n, source(n), "tiny", "sm_80") for n in range(3)])
        next(results)
        assert any(name.startswith("vidrial-child-") for name in os.listdir(own_tempdir))
        results.close()  # type: ignore[attr-defined]
    assert not [name for name in os.listdir(own_tempdir) if name.startswith("vidrial-child-")]


# No `if __name__ == "__main__"`: a user's script need not have one.
SCRIPT = """
import sys
from vidrial.build.pool import CompilePool
with CompilePool(1) as pool:
    for key, cubin in pool.compile_many([(n, sys.argv[1], "tiny", "sm_80") for n in range(1000)]):
        print(key, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_die_with_their_parent(number: int) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", SCRIPT, source(8)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout and process.stdout.readline() == "0\n"
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    folder = re.search(r"[^\"]*vidrial-child-\w+", Path(f"/proc/{workers[0]}/cmdline").read_text())
    assert len(workers) == 1 and folder is not None
    os.kill(process.pid, number)
    process.communicate(timeout=30)
    assert process.returncode == -number
    deadline = time.monotonic() + 10
    while (Path(f"/proc/{workers[0]}").exists() or Path(folder[0]).exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{workers[0]}").exists() and not Path(folder[0]).exists()


def test_a_worker_keeps_its_memory_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert worker_environment()["GLIBC_TUNABLES"] == MALLOC
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=4")
    assert worker_environment()["GLIBC_TUNABLES"] == f"{MALLOC}:glibc.malloc.arena_max=4"
    with CompilePool(1) as pool:
        ((_, cubin),) = pool.compile_many([Job("k", source(1), "tiny", "sm_90a")])
        assert isinstance(cubin, Cubin)
        environment = Path(f"/proc/{pool._idle[0].process.pid}/environ").read_bytes()
    # glibc may have put zeros where the colons were.
    assert f"\0GLIBC_TUNABLES={MALLOC.partition(':')[0]}".encode() in b"\0" + environment


def test_serialised_wgmma_are_refused() -> None:
    """Accumulators that are touched while a product works on them."""
    tile = SmemLayout(DType.bfloat16, 64, 64)
    mma = WarpgroupMma(DType.bfloat16, 1, (64, 64, 64), tile)
    source = f"""#include <vidrial/prelude.cuh>
#include <vidrial/tile/wgmma.cuh>
{mma.atom.definition}
using Mma = {mma.cpp};
extern "C" __global__ void __launch_bounds__(128) k(float* x, uint32_t* y, uint32_t n) {{
  float c[Mma::N][4] = {{}}, d[Mma::N][4] = {{}};
  uint32_t a[Mma::K][4];
  for (int k = 0; k < Mma::K; ++k)
    for (int r = 0; r < 4; ++r) a[k][r] = y[(4 * k + r) * 128 + threadIdx.x];
  typename Mma::B b(n, threadIdx.x);
  for (uint32_t i = 0; i < n; ++i) {{
    Mma::gemm(c, a, b, 0);
    // TOUCH
    Mma::wait<0>();
  }}
  for (int i = 0; i < 4 * Mma::N; ++i) x[i * 128 + threadIdx.x] = c[i / 4][i % 4] + d[i / 4][i % 4];
}}"""
    assert compile_source(source, "k", "sm_90a").resources.registers > 32
    wrong = source.replace("// TOUCH", "for (int k = 0; k < 4 * Mma::N; ++k) c[k / 4][k % 4] *= x[k];")
    message = r"k for sm_90a: ptxas serialises its wgmma: \(C751[0-4]\) .*serialized.*\n  see docs/device_api"
    with pytest.raises(CompileError, match=message) as caught:
        compile_source(wrong, "k", "sm_90a", config="m=64")
    assert "config: m=64" in str(caught.value) and "whole log" in str(caught.value)


NOTE = "ptxas info    : ({}) {} in function 'k'"
SERIALIZED = "Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient register resources"
INJECTED = "warpgroup.{} is injected in around line 12 by compiler to allow use of registers defined by GMMA"


def test_what_is_refused_of_a_kernel_that_compiles() -> None:
    fine = Resources(128, 0, 0, 0, 0)
    for code in range(7510, 7520):
        log = NOTE.format(f"C{code}", INJECTED.format("wait") if code == 7517 else SERIALIZED)
        assert (refusal(fine, log) is None) == (code == 7517), log
        both = f"{NOTE.format('C7517', INJECTED.format('wait'))}\n{log}"
        assert (refusal(fine, both) is None) == (code == 7517), both
    assert f"ptxas serialises its wgmma: (C7511) {SERIALIZED}" in str(refusal(fine, NOTE.format("C7511", SERIALIZED)))
    assert "ptxas adds to its wgmma: (C7519) warpgroup.arrive is injected" in str(
        refusal(fine, NOTE.format("C7519", INJECTED.format("arrive")))
    )
    for stores, loads in ((0, 0), (SPILL_LIMIT, 0), (SPILL_LIMIT // 2, SPILL_LIMIT // 2)):
        assert refusal(Resources(128, 0, stores, loads, 0), "") is None
    said = str(refusal(Resources(128, 0, SPILL_LIMIT // 2, SPILL_LIMIT // 2 + 4, 0), ""))
    assert said.startswith(f"it spills {SPILL_LIMIT + 4} bytes per thread, stored and loaded; accepted are up to {SPILL_LIMIT}\n")


def test_spills_are_refused() -> None:
    """As many floats as the registers of a CTA of 1024 threads, alive at once."""
    source = """extern "C" __global__ void __launch_bounds__(1024) k(float* x) {
  float v[COUNT];
  for (int i = 0; i < COUNT; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < COUNT; ++i) x[i * 1024 + threadIdx.x] = v[COUNT - 1 - i] * v[(i * 7) % COUNT];
}"""
    few = compile_source(source.replace("COUNT", "32"), "k", "sm_90a").resources
    assert few.spill_stores + few.spill_loads <= SPILL_LIMIT and few.registers <= 64
    with pytest.raises(
        CompileError, match=r"k for sm_90a: it spills \d+ bytes per thread, .*\n  take a config .*\n  config: m=64\n  whole log"
    ):
        compile_source(source.replace("COUNT", "120"), "k", "sm_90a", config="m=64")


def test_too_many_accumulators_for_the_launch_are_refused_with_ptxas_own_words() -> None:
    tile = SmemLayout(DType.bfloat16, 256, 64)
    mma = WarpgroupMma(DType.bfloat16, 1, (64, 256, 64), tile, SmemLayout(DType.bfloat16, 64, 64))
    source = f"""#include <vidrial/prelude.cuh>
#include <vidrial/tile/wgmma.cuh>
{mma.atom.definition}
using Mma = {mma.cpp};
extern "C" __global__ void __launch_bounds__(512) k(float* x) {{
  float c[1][Mma::N][4] = {{}};
  Mma::gemm(c, Mma::A(0, threadIdx.x), 0, Mma::B(32768, threadIdx.x), 0);
  Mma::wait<0>();
  for (int i = 0; i < 4 * Mma::N; ++i) x[i * 512 + threadIdx.x] = c[0][i / 4][i % 4];
}}"""
    compile_source(source.replace("512", "256"), "k", "sm_90a")
    with pytest.raises(
        CompileError, match=r"k for sm_90a does not compile: \(C7602\) Insufficient registers \(128\) to compile instruction"
    ):
        compile_source(source, "k", "sm_90a")
