"""`make demo`: what Vidrial does with an op, on this machine, in a few minutes."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

from rich.console import Console
from rich.text import Text

from vidrial.cli.tables import compile_best, duration, show_built, show_space, show_table, show_winners
from vidrial.device import DEFAULT_GPU, Device
from vidrial.errors import ToolchainError
from vidrial.host.cover import diverse_configs
from vidrial.host.plan import HostPlan
from vidrial.progress import reporting
from vidrial.spec.choices import describe
from vidrial.spec.op import Check, Op
from vidrial.spec.registry import find_op, make_problem
from vidrial.tune.sweeper import sweep

T = TypeVar("T")
FACTS: dict[str, Any] = {}  # keywords of the op's `example` beside its lengths
LENGTHS = (1000, 5001, 10007, 33333)  # no tile divides the odd ones
SWEEP_SECONDS = 25.0  # for each length
EXPLAINED, COMPILED = 10007, 12
CPU_LENGTHS, HOST_LENGTHS = (63, 257, 1001), (65, 257, 515)


def run_demo(console: Console, reference: str) -> None:
    """Sweep a handful of lengths of an op if there is a GPU, else do everything that needs none.

    Raises:
        ArgumentError: `reference` names no op, or its `example` asks for more than lengths.
    """
    op = find_op(reference)
    try:
        device = Device.current()
    except ToolchainError as error:
        console.print(Text(f"{error}\nSo nothing is timed here. What needs no GPU: the space, the compiler, and the numbers.\n", "yellow"))
        run_without_gpu(console, op)
    else:
        run_with_gpu(console, op, device)


def problem_of(op: Op, length: int, **facts: Any) -> Any:
    """The op's problem with every length that its `example` asks for at `length`."""
    parameters = inspect.signature(op.example).parameters.values()
    lengths = dict.fromkeys((p.name for p in parameters if p.default is p.empty), length)
    return make_problem(op, lengths | FACTS | facts)


def run_with_gpu(console: Console, op: Op, device: Device) -> None:
    """Sweep, and print the winner of every length."""
    results = []
    for length in LENGTHS:
        heading(console, f"sweeping {op.name} at length {length} on {device.name}, for about {SWEEP_SECONDS:g} s")
        results.append(sweep(op, problem_of(op, length), seconds=SWEEP_SECONDS))
        console.print(str(results[-1].winner))
    show_winners(console, results)
    console.print(Text("\nThe rankings are in the cache: calls of such lengths take these configs from now on. All trials are in", "dim"))
    for result in results:
        console.print(Text(f"  {result.journal}", "dim"))
    console.print(Text("vidrial report FOLDER --out page.html makes a page of them.", "dim"))


def run_without_gpu(console: Console, op: Op) -> None:
    """Explain, compile for an H200, and check the numbers on the CPU."""
    device, begin = Device.of(DEFAULT_GPU), time.perf_counter()
    heading(console, f"1. which configs are legal for length {EXPLAINED}, and what they should cost on an H200")
    show_space(console, op, problem_of(op, EXPLAINED), device, 5)
    heading(console, "2. the ones predicted fastest, compiled for sm_90a: no GPU is needed for that")
    built = compile_best(op, problem_of(op, EXPLAINED), device, COMPILED)
    show_built(console, built, f"{len(built)} kernels of {COMPILED} configs")
    heading(console, "3. the op's function on NumPy arrays, beside the reference in float64")
    function = function_of(op)
    if function is None:
        console.print(f"nothing named {op.name} beside it takes NumPy arrays of float32")
    else:
        show_table(console, "", (">length", ">took", ">error (norm)", ""), _cpu_rows(op, function))
    heading(console, "4. the GPU kernels themselves, compiled for the CPU and run thread by thread, beside the reference in float64")
    show_table(console, "", (">length", "config", ">took", ">error (norm)", ">worst", ""), _host_rows(op, device))
    lengths = ", ".join(map(str, LENGTHS))
    took = duration(time.perf_counter() - begin)
    console.print(Text(f"\nDone in {took}. On a machine with a GPU the same command sweeps the lengths {lengths}.", "bold"))


def heading(console: Console, text: str) -> None:
    """A line that says what comes."""
    console.print(Text(f"\n{text}", "bold cyan"))


def function_of(op: Op) -> Callable[..., Any] | None:
    """What users call: the function of the op's name in the module that defines the op, or in its package.

    None where there is none, or where problems cannot be asked for in float32, which NumPy has.
    """
    if "dtype" not in inspect.signature(op.example).parameters:
        return None
    home = op.example.__module__
    for module in (home, home.rpartition(".")[0]):
        function = getattr(sys.modules.get(module), op.name, None)
        if callable(function):
            return cast(Callable[..., Any], function)
    return None


def _cpu_rows(op: Op, function: Callable[..., Any]) -> Iterator[tuple[Any, ...]]:
    for length in _steps("on the CPU", CPU_LENGTHS):
        problem = op.small(problem_of(op, length, dtype="float32"))
        inputs = op.sample(problem, 0)
        begin = time.perf_counter()
        y = function(**inputs)
        took = time.perf_counter() - begin
        name = next(iter(op.outputs(problem)))
        found = op.check(problem, inputs, {name: y}, op.reference(problem, inputs))
        yield length, duration(took), f"{found.relative:.1e}", _verdict(found)


def _host_rows(op: Op, device: Device) -> Iterator[tuple[Any, ...]]:
    """The config predicted fastest of each length, and at the longest also the best one that is unlike it."""
    tasks: list[tuple[int, Any, Any]] = []
    for length in HOST_LENGTHS:
        problem = op.small(problem_of(op, length))
        tasks.append((length, problem, op.predicted(problem, device)))
    tasks += [(length, problem, config) for config in diverse_configs(op, problem, 2)[1:]]
    for length, problem, config in _steps("on the host target", tasks):
        begin = time.perf_counter()
        found = check_on_host(op, problem, config)
        took = duration(time.perf_counter() - begin)
        yield length, describe(config), took, f"{found.relative:.1e}", f"{found.max_error:.1e}", _verdict(found)


def check_on_host(op: Op, problem: Any, config: Any) -> Check:
    """The op's own check of a config on the host target, outputs poisoned before.

    Raises:
        ConfigError, CompileError, LaunchError, ToolchainError: it cannot be built or run.
    """
    inputs = op.sample(problem, 0)
    return op.check(problem, inputs, HostPlan(op, problem, config).results(inputs), op.reference(problem, inputs))


def _verdict(found: Check) -> Text:
    if found.ok:
        return Text("within bounds", "green")
    return Text(f"WRONG: bounds are {found.relative_bound:.0e} and {found.max_error_bound:.0e}", "bold red")


def _steps(label: str, items: Sequence[T]) -> Iterator[T]:
    with reporting(None) as progress:
        progress.begin(label, len(items))
        for item in items:
            yield item
            progress.advance("")
