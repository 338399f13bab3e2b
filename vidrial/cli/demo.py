"""`make demo`: what Vidrial does with power retention, on this machine, in a few minutes."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from vidrial.cli.tables import compile_best, duration, progress_bar, show_built, show_space, show_table, show_winners
from vidrial.device import Device
from vidrial.errors import ToolchainError
from vidrial.host.plan import HostPlan, poison
from vidrial.spec.choices import describe
from vidrial.spec.op import Check, Op
from vidrial.spec.registry import KNOWN, find_op
from vidrial.tune.sweeper import sweep

OP, FACTS = "power_retention", {"b": 1, "h": 16, "d": 64}
LENGTHS = (1000, 5001, 10007, 33333)  # no tile divides the odd ones
SWEEP_SECONDS = 25.0  # for each length
EXPLAINED, COMPILED = 10007, 12
CPU_LENGTHS, HOST_LENGTHS = (63, 257, 1001), (65, 257, 515)


def run_demo(console: Console) -> None:
    """Sweep a handful of lengths if there is a GPU, else do everything that needs none."""
    op = find_op(OP)
    try:
        device = Device.current()
    except ToolchainError as error:
        console.print(Text(f"{error}\nSo nothing is timed here. What needs no GPU: the space, the compiler, and the numbers.\n", "yellow"))
        run_without_gpu(console, op)
    else:
        run_with_gpu(console, op, device)


def run_with_gpu(console: Console, op: Op, device: Device) -> None:
    """Sweep, and print the winner of every length."""
    results = []
    for t in LENGTHS:
        heading(console, f"sweeping {op.name} at t={t} on {device.name}, for about {SWEEP_SECONDS:g} s")
        results.append(sweep(op, op.example(t=t, **FACTS), seconds=SWEEP_SECONDS))
        console.print(str(results[-1].winner))
    show_winners(console, results)
    console.print(Text("\nThe rankings are in the cache: calls of such lengths take these configs from now on. All trials are in", "dim"))
    for result in results:
        console.print(Text(f"  {result.journal}", "dim"))
    console.print(Text("vidrial report FOLDER --out page.html makes a page of them.", "dim"))


def run_without_gpu(console: Console, op: Op) -> None:
    """Explain, compile for an H200, and check the numbers on the CPU."""
    device, begin = Device.of("h200"), time.perf_counter()
    heading(console, f"1. which configs are legal for t={EXPLAINED}, and what they should cost on an H200")
    show_space(console, op, op.example(t=EXPLAINED, **FACTS), device, 5)
    heading(console, "2. the ones predicted fastest, compiled for sm_90a: no GPU is needed for that")
    built = compile_best(console, op, op.example(t=EXPLAINED, **FACTS), device, COMPILED)
    show_built(console, built, f"{len(built)} kernels of {COMPILED} configs")
    heading(console, "3. the op on CPU arrays (NumPy, chunked), beside the recurrent form in float64")
    show_table(console, "", (">t", ">took", ">error (norm)"), _cpu_rows(console))
    heading(console, "4. the GPU kernels themselves, compiled for the CPU and run thread by thread, beside the attention form in float64")
    show_table(console, "", (">t", "config", ">took", ">error (norm)", ">worst", ""), _host_rows(console, op, device))
    lengths = ", ".join(map(str, LENGTHS))
    took = duration(time.perf_counter() - begin)
    console.print(Text(f"\nDone in {took}. On a machine with a GPU the same command sweeps t = {lengths}.", "bold"))


def heading(console: Console, text: str) -> None:
    """A line that says what comes."""
    console.print(Text(f"\n{text}", "bold cyan"))


def _cpu_rows(console: Console) -> Iterator[tuple[Any, ...]]:
    package = KNOWN[OP].rpartition(".")[0]
    power_retention, reference = importlib.import_module(package).power_retention, importlib.import_module(f"{package}.reference")
    rng = np.random.default_rng(0)
    for t in _steps(console, "on the CPU", CPU_LENGTHS):
        q, k, v = (rng.standard_normal((1, t, 2, 32), np.float32) for _ in range(3))
        log_g = -np.log1p(np.exp(-rng.standard_normal((1, t, 2)) - 4)).astype(np.float32)
        begin = time.perf_counter()
        y = power_retention(q, k, v, log_g)
        took = time.perf_counter() - begin
        exact = reference.recurrent_form(q, k, v, log_g)
        yield t, duration(took), f"{np.linalg.norm(y - exact) / np.linalg.norm(exact):.1e}"


def _host_rows(console: Console, op: Op, device: Device) -> Iterator[tuple[Any, ...]]:
    """The config predicted fastest of each length, and at the longest also the best one that carries a state."""
    tasks: list[tuple[int, dict[str, Any]]] = [(t, {}) for t in HOST_LENGTHS]
    tasks.append((HOST_LENGTHS[-1], {"chunk": 128}))
    for t, fixed in _steps(console, "on the host target", tasks):
        problem = op.example(t=t, **FACTS | {"h": 2})
        config = op.predicted(problem, device, fixed)
        begin = time.perf_counter()
        found = check_on_host(op, problem, config)
        yield t, describe(config), duration(time.perf_counter() - begin), f"{found.relative:.1e}", f"{found.max_error:.1e}", _verdict(found)


def check_on_host(op: Op, problem: Any, config: Any) -> Check:
    """The op's own check of a config on the host target, outputs poisoned before.

    Raises:
        ConfigError, CompileError, LaunchError, ToolchainError: it cannot be built or run.
    """
    inputs = op.sample(problem, 0)
    outputs = {name: poison(buffer.shape, buffer.dtype) for name, buffer in op.outputs(problem).items()}
    HostPlan(op, problem, config).run({**inputs, **outputs})
    return op.check(problem, inputs, outputs, op.reference(problem, inputs))


def _verdict(found: Check) -> Text:
    if found.ok:
        return Text("within bounds", "green")
    return Text(f"WRONG: bounds are {found.relative_bound:.0e} and {found.max_error_bound:.0e}", "bold red")


def _steps(console: Console, label: str, items: Any) -> Iterator[Any]:
    with progress_bar(console) as bar:
        yield from bar.track(items, description=label)
