"""What the command line prints: tables of spaces, compiled kernels and the environment, with progress on long work."""

from __future__ import annotations

import importlib.metadata
import itertools
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from vidrial import __version__
from vidrial.build import build_many
from vidrial.compile import Cubin
from vidrial.device import Device
from vidrial.errors import CompileError, ToolchainError
from vidrial.op import Op, Stage
from vidrial.settings import Settings
from vidrial.space import Space, describe
from vidrial.store import Store
from vidrial.toolchain import HostCompiler, Toolchain, missing, nvrtc_version

WIDTH_WITHOUT_TERMINAL = 160
PACKAGES = ("numpy", "cupy-cuda13x", "nvidia-cutlass", "jinja2", "rich", "click", "torch", "jax", "matplotlib")


def make_console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; wide enough for a config where there is none."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else WIDTH_WITHOUT_TERMINAL, highlight=False)


def progress_bar(console: Console) -> Progress:
    """A bar that counts steps and time; nothing where the output is no terminal."""
    return Progress(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                    console=console, transient=True, disable=not console.is_terminal)


def duration(seconds: float) -> str:
    """Seconds as a person reads them: `12.3 us`, `4.56 ms`, `1.23 s`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def table(title: str, *columns: str, rows: Iterable[Iterable[Any]]) -> Table:
    """A plain table; columns whose name begins with `>` are aligned to the right."""
    made = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim", show_header=any(columns))
    for name in columns:
        made.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return made


def show_space(console: Console, op: Op, problem: Any, device: Device, limit: int) -> Space:
    """Print the legal configs, fastest-predicted first, and the rejected ones grouped by sentence."""
    space = op.space(problem, device, limit=max(limit, 1))
    total = f"the {len(space)} predicted fastest" if len(space) == limit else f"{len(space)} legal configs"
    console.print(Text(f"{op.name} on {device.name} ({device.arch}): {problem}"))
    console.print(table(f"{total}", ">", ">predicted", "config",
                        rows=((i, duration(c.seconds), describe(c.config)) for i, c in enumerate(space.legal, 1))))
    reasons = space.reasons()
    rows = [(len(configs), sentence, describe(configs[0])) for sentence, configs in itertools.islice(reasons.items(), limit)]
    if rows:
        console.print(table(f"{len(space.rejected)} rejected, for {len(reasons)} reasons", ">configs", "because", "for instance", rows=rows))
    return space


@dataclass(frozen=True)
class Built:
    """One kernel of some config, compiled: `result` is its cubin, or why there is none."""

    stage: Stage
    result: Cubin | CompileError
    smem: int
    predicted: float


def compile_best(console: Console, op: Op, problem: Any, device: Device, top: int, jobs: int | None = None) -> list[Built]:
    """Compile the kernels of the `top` configs predicted fastest, in parallel, each once; with progress.

    Raises:
        ToolchainError: NVRTC or a header is missing.
    """
    stages = {(s.kernel.name, s.config): s for config in op.space(problem, device, limit=top) for s in op.stages(problem, config)}
    sources = {key: (s.kernel.source(s.problem, s.config), describe(s.config)) for key, s in stages.items()}
    results = {}
    with progress_bar(console) as bar:
        task = bar.add_task(f"compiling for {device.arch}", total=len(sources))
        for key, result in build_many(sources, device.arch, jobs):
            results[key] = result
            bar.advance(task)
    return [Built(s, results[key], s.kernel.resolve(s.problem, s.config).smem_bytes, s.kernel.seconds(s.problem, s.config, device))
            for key, s in sorted(stages.items(), key=lambda item: [k.name for k in op.kernels].index(item[0][0]))]


def show_built(console: Console, built: Iterable[Built], title: str) -> None:
    """Print what each compiled kernel takes."""
    rows: list[tuple[Any, ...]] = []
    for b in built:
        name, config = b.stage.kernel.name, describe(b.stage.config)
        if isinstance(b.result, CompileError):
            rows.append((name, config, Text("does not compile", "red"), "", "", "", duration(b.predicted)))
            continue
        r = b.result.resources
        took = f"{b.result.seconds:.1f}" if b.result.seconds else "cached"
        rows.append((name, config, took, r.registers, r.spill_stores + r.spill_loads, b.smem + r.static_smem, duration(b.predicted)))
    console.print(table(title, "stage", "config", ">seconds", ">registers", ">spills B", ">shared B", ">predicted", rows=rows))
    for b in built:
        if isinstance(b.result, CompileError):
            console.print(Text(str(b.result), "red"))


def show_environment(console: Console) -> None:
    """Print versions, GPUs or what is missing and how to install it, the cache and the settings."""
    console.print(Text(f"vidrial {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"))
    console.print(table("packages", "", "", rows=[(name, _version(name)) for name in PACKAGES]))
    console.print(table("toolchain", "", "", rows=[("NVRTC", _ask(lambda: ".".join(map(str, nvrtc_version())))),
                                                     ("headers", _ask(lambda: Toolchain.find().version)),
                                                     ("host compiler", _ask(lambda: HostCompiler.find().version))]))
    for sentence in missing():
        console.print(Text(f"missing: {sentence}", "red"))
    console.print(table("GPUs", "", "", "", "", rows=_gpus()))
    store, settings = Store.shared(), Settings.read()
    count, size = store.usage()
    console.print(table("settings", "", "", rows=[
        ("cache", f"{store.root} ({count} binaries, {size / 2**20:.1f} of at most {store.max_bytes >> 20} MB)"),
        ("target", settings.target), ("compile jobs", settings.jobs)]))


def _gpus() -> list[tuple[str, ...]]:
    try:
        from cupy.cuda import runtime

        count = runtime.getDeviceCount()
    except (ImportError, RuntimeError):
        count = 0
    if count == 0:
        return [(_ask(lambda: Device.current().name), "", "", "")]
    devices = [Device.current(index) for index in range(count)]
    return [(f"{i}: {d.name}", d.arch, f"{d.sms} SMs", d.key) for i, d in enumerate(devices)]


def _ask(question: Any) -> str:
    try:
        return str(question())
    except ToolchainError as error:
        return str(error)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
