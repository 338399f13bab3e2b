"""Host time of a call of power_retention, beside bare CuPy launches; of a launch with three tensor maps; and a second process's first call
with a warm disk cache.

python benchmarks/warm_path.py        # needs a GPU, torch and CuPy; about a minute
python benchmarks/warm_path.py --maps # the launch with tensor maps alone, on Hopper; seconds, and nothing is written
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, Case, command_line, date, gpu_facts, package_versions, slug
from benchmarks.peers import inputs

ROOT = Path(__file__).parent.parent
# Short, so that the GPU keeps up with the host; 20 calls fit into the launch queue.
CASE = Case("warm", 1, 2, 2000)
CALLS, ROUNDS, PROCESSES = 20, 50, 5
TARGET_LAUNCH_US, TARGET_FIRST_MS = 15.0, 100.0
# Of one launch that has three maps among its arguments: at most, and aimed at.
TARGET_MAPS_US, AIM_MAPS_US = 12.0, 9.0


def host_us(call: Callable[[], Any], synchronize: Callable[[], None]) -> float:
    """Median microseconds that the host takes to queue one call."""
    taken = []
    for _ in range(ROUNDS):
        synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        taken.append((time.perf_counter() - begin) / CALLS * 1e6)
    synchronize()
    return statistics.median(taken)


def bare_launches(arguments: list[int]) -> Callable[[], None]:
    """As many launches of an empty CuPy RawKernel as there are numbers, each with that many arguments, on torch's stream."""
    import cupy
    import torch

    kernels = []
    for count in arguments:
        text = ", ".join(f"int a{i}" for i in range(count))
        kernel = cupy.RawKernel(f'extern "C" __global__ void empty({text}) {{}}', "empty")
        kernels.append((kernel, tuple(cupy.int32(i) for i in range(count))))
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)

    def launch() -> None:
        with stream:
            for kernel, values in kernels:
                kernel((1,), (128,), values)

    return launch


def calls() -> dict[str, Any]:
    """Host time per call and per launch, ours and bare; GPU time of a call, which must be the shorter one."""
    import torch

    from vidrial.call import cuda_plan
    from vidrial.kernels.power_retention import power_retention
    from vidrial.kernels.power_retention.op import example, op
    from vidrial.spec.choices import describe

    x = inputs(CASE)
    problem = example(t=CASE.t, b=CASE.b, h=CASE.h, d=CASE.d)
    config = cuda_plan(op, problem, 0).config
    arguments = [len(stage.kernel.args.types) for stage in op.stages(problem, config)]

    def call() -> Any:
        return power_retention(x["q"], x["k"], x["v"], x["log_g"])

    with torch.no_grad():
        call()
        ours = host_us(call, torch.cuda.synchronize)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(CALLS):
            call()
        end.record()
        torch.cuda.synchronize()
    bare = bare_launches(arguments)
    bare()
    theirs = host_us(bare, torch.cuda.synchronize)
    return {
        "config": describe(config),
        "launches": len(arguments),
        "arguments": arguments,
        "call_us": ours,
        "us_a_launch": ours / len(arguments),
        "bare_call_us": theirs,
        "bare_us_a_launch": theirs / len(arguments),
        "us_between_calls_on_gpu": begin.elapsed_time(end) * 1e3 / CALLS,
    }


def maps() -> dict[str, Any] | None:
    """Host time of a launch of flash attention on Hopper, which has three tensor maps, with two sets of arrays in turn; of a whole call; and
    of encoding a map for an address that is new. None on another GPU."""
    import torch

    from vidrial.device import HOPPER, Device
    from vidrial.kernels.flash_attention import flash_attention
    from vidrial.kernels.flash_attention.op import Config, example, op
    from vidrial.kernels.flash_attention.sm90 import Config as Sm90
    from vidrial.runtime.plan import CudaPlan
    from vidrial.runtime.tensor_map import encode

    if Device.current(0).arch != HOPPER:
        return None
    problem = example(t=CASE.t, b=CASE.b, h=CASE.h, d=CASE.d)
    # A CTA per tile: no counter to set to 0 before the launch.
    plan = CudaPlan(op, problem, Config(path="sm90", sm90=Sm90(schedule="one")), 0)
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    buffers = {**op.inputs(problem), **op.outputs(problem)}
    sets = [{name: torch.zeros(b.shape, dtype=dtypes[b.dtype.label], device="cuda") for name, b in buffers.items()} for _ in range(2)]
    pointers = [{name: x.data_ptr() for name, x in arrays.items()} for arrays in sets]
    stream, turn = torch.cuda.current_stream().cuda_stream, itertools.cycle(pointers)
    launch = plan._launches[0]
    tensor, address = launch.maps[0].map, pointers[0]["q"]

    def call() -> Any:
        return flash_attention(sets[0]["q"], sets[0]["k"], sets[0]["v"])

    with torch.no_grad():
        call()
        plan.run(pointers[0], 0, stream)
        return {
            "maps": len(launch.maps),
            "launch_us": host_us(lambda: plan.run(next(turn), 0, stream), torch.cuda.synchronize),
            "call_us": host_us(call, torch.cuda.synchronize),
            "encode_us": host_us(lambda: encode(tensor, address), torch.cuda.synchronize),
        }


def first_call(modules: list[str]) -> None:
    """A process: import, start CUDA, call twice; figures on stdout. `modules`: what such a call imports, imported beforehand."""
    import importlib

    begin = time.perf_counter()
    import cupy
    import torch

    from vidrial.kernels.power_retention import power_retention

    for name in modules:
        # Some are made by others as they are imported, and cannot be imported by name.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    imported = time.perf_counter()
    x = inputs(CASE)
    cupy.cuda.runtime.free(0)
    torch.cuda.synchronize()
    started, known = time.perf_counter(), set(sys.modules)
    taken = []
    with torch.no_grad():
        for _ in range(2):
            moment = time.perf_counter()
            power_retention(x["q"], x["k"], x["v"], x["log_g"])
            torch.cuda.synchronize()
            taken.append((time.perf_counter() - moment) * 1e3)
    new = [name for name in sys.modules if name not in known]
    json.dump(
        {
            "imports_ms": (imported - begin) * 1e3,
            "cuda_ms": (started - imported) * 1e3,
            "first_ms": taken[0],
            "second_ms": taken[1],
            "modules": new,
        },
        sys.stdout,
    )


def processes() -> dict[str, Any]:
    """First calls: with an empty cache, then in new processes with that cache warm, their imports before the call and in it."""
    with tempfile.TemporaryDirectory(prefix="vidrial-warm-") as cache:

        def run(modules: list[str]) -> dict[str, Any]:
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                "VIDRIAL_CACHE_DIR": cache,
            }
            done = subprocess.run(
                [sys.executable, __file__, "--first-call", json.dumps(modules)],
                capture_output=True,
                encoding="utf-8",
                check=False,
                env=environment,
            )
            if done.returncode:
                raise SystemExit(f"the first call in a new process failed:\n{done.stderr[-2000:]}")
            found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return found

        cold = run([])
        with_imports = [run([]) for _ in range(PROCESSES)]
        modules = [name for name in with_imports[0]["modules"] if not name.startswith("__")]
        beyond_imports = [run(modules) for _ in range(PROCESSES)]

    def median(runs: list[dict[str, Any]], key: str) -> float:
        return float(statistics.median(r[key] for r in runs))

    return {
        "cold_first_ms": cold["first_ms"],
        "imports_ms": median(beyond_imports, "imports_ms"),
        "cuda_ms": median(beyond_imports, "cuda_ms"),
        "first_ms": median(beyond_imports, "first_ms"),
        "second_ms": median(beyond_imports, "second_ms"),
        "first_with_its_imports_ms": median(with_imports, "first_ms"),
        "imported_in_the_call": modules,
    }


def report(found: dict[str, Any]) -> list[str]:
    """The figures as reasons, the two with a target marked."""
    call, first = found["calls"], found["processes"]
    launch, gpu = call["us_a_launch"], call["us_between_calls_on_gpu"]
    return [
        f"{_mark(launch, TARGET_LAUNCH_US)} {launch:.1f} us of host time per launch (at most {TARGET_LAUNCH_US:g}); "
        f"{call['call_us']:.1f} us per call of {call['launches']} launches",
        f"     bare CuPy launches with as many arguments: {call['bare_us_a_launch']:.1f} us each",
        f"     on the GPU calls began {gpu:.1f} us apart: it {'kept' if gpu <= 1.2 * call['call_us'] else 'did NOT keep'} up with the host",
        f"{_mark(first['first_ms'], TARGET_FIRST_MS)} {first['first_ms']:.0f} ms for the first call of a second process "
        f"(at most {TARGET_FIRST_MS:g}), beyond imports ({first['imports_ms']:.0f}) and CUDA start-up ({first['cuda_ms']:.0f})",
        f"     {first['first_with_its_imports_ms']:.0f} ms with what it imports itself; second call {first['second_ms']:.2f} ms; "
        f"with an empty cache {first['cold_first_ms']:.0f} ms",
        *maps_report(found["maps"]),
    ]


def maps_report(found: dict[str, Any] | None) -> list[str]:
    """The launch with tensor maps; nothing where there are none."""
    if found is None:
        return []
    return [
        f"{_mark(found['launch_us'], TARGET_MAPS_US)} {found['launch_us']:.1f} us of host time per launch with {found['maps']} tensor maps "
        f"(at most {TARGET_MAPS_US:g}, aim {AIM_MAPS_US:g}); a call of flash attention {found['call_us']:.1f} us; "
        f"{found['encode_us']:.1f} us to encode a map for a new address"
    ]


def _mark(value: float, target: float) -> str:
    return "ok  " if value <= target else "MISS"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--first-call", type=json.loads, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--maps", action="store_true", help="measure the launch with tensor maps alone, and write nothing")
    options = parser.parse_args()
    if options.maps:
        print(*(maps_report(maps()) or ["no GPU of Hopper's here"]), sep="\n")
        return
    if options.first_call is not None:
        first_call(options.first_call)
        return
    import torch

    gpu = torch.cuda.get_device_name(0)
    found = {
        "schema": 1,
        "gpu": gpu,
        "command": command_line(),
        "date": date(),
        "driver": gpu_facts(),
        "packages": {"torch": torch.__version__, **package_versions()},
        "calls": calls(),
        "maps": maps(),
        "processes": processes(),
    }
    print(*report(found), sep="\n")
    path = options.out / f"warm_path_{slug(gpu)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
