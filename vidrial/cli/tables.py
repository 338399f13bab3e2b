"""What the command line prints: tables of spaces, compiled kernels and the environment, with progress on long work."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import itertools
import platform
import sys
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vidrial import __version__
from vidrial.build.cubins import build_many, look_up
from vidrial.build.nvrtc import Cubin
from vidrial.build.store import Store
from vidrial.build.toolchain import HostCompiler, Toolchain, missing, nvrtc_version
from vidrial.device import TABLE, Device, gpu_count
from vidrial.errors import ArgumentError, CompileError, TemplateError, ToolchainError
from vidrial.host.check import SHOWN, Outcome, Report
from vidrial.host.cover import Case
from vidrial.installation import named_ops, other_distribution
from vidrial.progress import reporting
from vidrial.settings import Settings
from vidrial.spec.choices import describe
from vidrial.spec.chosen import describe_taken
from vidrial.spec.op import Check, Op, Stage
from vidrial.spec.registry import find_op
from vidrial.spec.source import Source
from vidrial.spec.space import Space
from vidrial.tune.ranking import Standing, shipped_devices, sweep_command, until_swept
from vidrial.tune.result import SweepResult

WIDTH_WITHOUT_TERMINAL = 160
PACKAGES = ("numpy", "cupy-cuda13x", "nvidia-cutlass", "jinja2", "rich", "click", "torch", "jax", "matplotlib")


def make_console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; wide enough for a config where there is none."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else WIDTH_WITHOUT_TERMINAL, highlight=False)


def duration(seconds: float) -> str:
    """Seconds as a person reads them: `12.3 us`, `4.56 ms`, `1.23 s`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def byte_size(count: int) -> str:
    """Bytes as a person reads them: `800 B`, `1.5 KiB`, `34 GiB`."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def show_table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print a plain table under its title; columns whose name begins with `>` are aligned to the right."""
    made = Table(box=None, pad_edge=False, header_style="dim", show_header=any(columns))
    for name in columns:
        made.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    if title:
        console.print(Text(f"\n{title}", "bold"))
    console.print(made)


def show_records(console: Console, title: str, records: Sequence[Mapping[str, Any]]) -> None:
    """`show_table` of rows that name their columns themselves; all have the same ones."""
    show_table(console, title, list(records[0]) if records else (), [record.values() for record in records])


def split_words(texts: Sequence[str]) -> tuple[str, list[str]]:
    """The words that all texts share, and what is left of each; nothing is shared by fewer than two texts."""
    words = [text.split() for text in texts]
    common = set(words[0]).intersection(*words[1:]) if len(words) > 1 else set()
    return " ".join(w for w in (words[0] if words else ()) if w in common), [" ".join(w for w in own if w not in common) for own in words]


def facts(problem: Any) -> str:
    """A problem on one line, strides and other tuples left out, and what has the value that it has where it is not named."""
    values = ((f, getattr(problem, f.name)) for f in dataclasses.fields(problem))
    return " ".join(f"{f.name}={value}" for f, value in values if not isinstance(value, tuple) and value != f.default)


def show_space(console: Console, op: Op, problem: Any, device: Device, limit: int) -> Space:
    """Print the legal configs, fastest-predicted first, and the rejected ones grouped by reason."""
    space = op.space(problem, device, limit=max(limit, 1))
    total = f"the {len(space)} predicted fastest" if len(space) == limit else f"{len(space)} legal configs"
    common, own = split_words([describe_taken(op, problem, c.config) for c in space.legal])
    console.print(Text(f"{op.name} on {device.name} ({device.arch}): {facts(problem)}"))
    sizes = [op.workspace_bytes(problem, c.config) for c in space.legal]
    beside = (">workspace",) if any(sizes) else ()
    ranked = enumerate(zip(space.legal, sizes, own, strict=True), 1)
    title = total + (f"; all have {common}" if common else "")
    warned = [_warned(op, problem, c.config, device) for c in space.legal]
    noted = ("ptxas",) if any(warned) else ()
    shown = ((i, duration(c.seconds), *(byte_size(n) for _ in beside), *(warned[i - 1] for _ in noted), text) for i, (c, n, text) in ranked)
    if space.legal:
        show_table(console, title, (">", ">predicted", *beside, *noted, "config"), shown)
    reasons = space.reasons()
    rows = [(len(configs), reason, describe(configs[0])) for reason, configs in itertools.islice(reasons.items(), limit)]
    if rows:
        show_table(
            console,
            f"{len(space.rejected)} rejected, for {len(reasons)} {'reason' if len(reasons) == 1 else 'reasons'}",
            (">configs", "because", "for instance"),
            rows,
        )
    return space


def _warned(op: Op, problem: Any, config: Any, device: Device) -> str:
    """The codes of what ptxas warned of when it compiled a config's kernels, of those that are in the cache."""
    try:
        found = [look_up(s.kernel.source(s.problem, s.config), device.arch)[1] for s in op.stages(problem, config)]
    except (ToolchainError, TemplateError):
        return ""
    return ", ".join(dict.fromkeys(cubin.notes for cubin in found if cubin is not None and cubin.notes))


@dataclass(frozen=True)
class Built:
    """One kernel of some config, compiled: `result` is its cubin, or why there is none."""

    stage: Stage
    result: Cubin | CompileError
    smem: int
    predicted: float


def compile_best(op: Op, problem: Any, device: Device, top: int, jobs: int | None = None, config: Any = None) -> list[Built]:
    """Compile the kernels of the `top` configs predicted fastest, or of `config` alone, in parallel, each once; with progress.

    Raises:
        ToolchainError: NVRTC or a header is missing.
    """
    best = [config] if config is not None else [c.config for c in itertools.islice(op.ranked(problem, device), top)]
    stages = {s.binary: s for one in best for s in op.stages(problem, one)}
    sources: Mapping[Hashable, tuple[Source, str]] = {
        key: (s.kernel.source(s.problem, s.config), describe(s.config)) for key, s in stages.items()
    }
    results: dict[Hashable, Cubin | CompileError] = {}
    with reporting(None) as progress:
        progress.begin(f"compiling for {device.arch}", len(sources))
        for key, result in build_many(sources, device.arch, jobs):
            results[key] = result
            progress.advance(sources[key][1])
    return [
        Built(s, results[key], s.kernel.resolve(s.problem, s.config).smem_bytes, s.kernel.seconds(s.problem, s.config, device))
        for key, s in sorted(stages.items(), key=lambda item: op.kernels.index(item[1].kernel))
    ]


def show_built(console: Console, built: Iterable[Built], title: str) -> None:
    """Print what each compiled kernel takes."""
    rows: list[tuple[Any, ...]] = []
    for b in built:
        name, config = b.stage.kernel.name, describe(b.stage.config)
        if isinstance(b.result, CompileError):
            rows.append((name, config, Text("does not compile", "red"), "", "", "", "", duration(b.predicted)))
            continue
        r = b.result.resources
        took = f"{b.result.seconds:.1f}" if b.result.seconds else "cached"
        rows.append(
            (
                name,
                config,
                took,
                r.registers,
                r.spill_stores + r.spill_loads,
                b.smem + r.static_smem,
                b.result.notes,
                duration(b.predicted),
            )
        )
    show_table(console, title, ("stage", "config", ">seconds", ">registers", ">spills B", ">shared B", "ptxas", ">predicted"), rows)
    for b in built:
        if isinstance(b.result, CompileError):
            console.print(Text(str(b.result), "red"))


def show_environment(console: Console) -> None:
    """Print versions, GPUs or what is missing and how to install it, the cache, the rankings in force and the settings."""
    console.print(Text(f"vidrial {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"))
    show_table(console, "packages", ("", ""), [(name, _version(name)) for name in PACKAGES])
    toolchain = {
        "NVRTC": lambda: ".".join(map(str, nvrtc_version())),
        "headers": lambda: Toolchain.find().version,
        "host compiler": lambda: HostCompiler.find().version,
    }
    show_table(console, "toolchain", ("", ""), [(name, _ask(question)) for name, question in toolchain.items()])
    for reason in missing():
        console.print(Text(f"missing: {reason}", "red"))
    other = other_distribution()
    if other is not None:
        console.print(Text(other, "red"))
    show_table(console, "GPUs", ("", "", "", ""), _gpus())
    show_table(console, "ops", ("", ""), _ops())
    show_table(console, "rankings", ("", ""), _rankings())
    store, settings = Store.shared(), Settings.read()
    count, size = store.usage()
    cache = f"{store.root} ({count} binaries, {size / 2**20:.1f} of at most {store.max_bytes >> 20} MB)"
    show_table(console, "settings", ("", ""), [("cache", cache), ("target", settings.target), ("compile jobs", settings.jobs)])


def _rankings() -> Iterator[tuple[str, str]]:
    """For every known op and every kind of GPU here: what was measured for it, and what a call's config then comes from."""
    count = gpu_count()
    devices = {d.key: d for d in (Device.current(index) for index in range(count))} if count else {"": Device.default()}
    for op, device in itertools.product(_importable_ops(), devices.values()):
        here = device.name if count else f"no GPU here: as on an {device.name}"
        yield f"{op.name}, {here}", _applies(op, device)


def _importable_ops() -> Iterator[Op]:
    """The known ops, but those that cannot be imported: `_ops` says why."""
    for name in named_ops():
        with contextlib.suppress(ArgumentError, ToolchainError):
            yield find_op(name)


def _ops() -> Iterator[tuple[str, str | Text]]:
    """Every known op: where it lies, or why it cannot be imported."""
    for name, reference in named_ops().items():
        try:
            find_op(name)
        except (ArgumentError, ToolchainError) as error:
            yield name, Text(str(error), "red")
        else:
            yield name, reference


def _applies(op: Op, device: Device) -> str:
    """Which config a call takes on `device`, as a reason; and what there is that does not count."""
    standing = Standing.of(op, device)
    counted = [(standing.local, "from this machine"), (standing.shipped, "shipped")]
    if any(count for count, _ in counted):
        measured = " and ".join(f"{count} rankings {where}" for count, where in counted if count)
        said = f"{measured}: measured sizes take their winner, others the calibrated model's choice; other static facts the cost model's"
        said += f"; measure more: {sweep_command(op)}"
    else:
        said = f"nothing that counts was measured on this kind of GPU ({device.key}): {until_swept(op)}"
    names = {known.key: f"{known.name} ({known.key})" for known in TABLE}
    others = [names.get(key, key) for key in shipped_devices() if key != device.key]
    if others and not standing.shipped:
        said += f"; rankings shipped for {', '.join(others)} are of another kind and do not count"
    return said + (f"; {standing.outdated}" if standing.outdated else "")


def _gpus() -> list[tuple[str, ...]]:
    count = gpu_count()
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


def show_winners(console: Console, results: Sequence[SweepResult]) -> None:
    """Print the winner of each sweep: its time and noise, errors, and how much slower the slowest legal config was."""
    rows = []
    for result, sizes in zip(results, split_words([facts(r.problem) for r in results])[1], strict=True):
        winner = result.winner
        noise = f"{winner.timing.iqr_ms / winner.timing.median_ms:.1%}" if winner.timing is not None else ""
        figures = (f"{winner.ms:.4f}", noise, *errors(winner.check), f"{result.worst_ms / winner.ms:.2f}")
        rows.append((sizes, describe(winner.config), *figures, len(result.trials), duration(result.seconds)))
    columns = ("problem", "fastest config", ">ms", ">IQR", ">error", ">worst", ">slowest/fastest", ">trials", ">took")
    show_table(console, f"{results[0].op} on {results[0].device.name}", columns, rows)
    for note in dict.fromkeys(note for result in results for note in result.notes):
        console.print(Text(note, "yellow"))


def show_report(console: Console, report: Report, cut: Sequence[Case] = ()) -> None:
    """Print one row a problem, config and sanitizer, then what is wrong, what was not run, and from which problems the ones that ran were `cut`."""
    outcomes = report.outcomes
    common, problems = split_words([facts(outcome.problem) for outcome in outcomes])
    alike, configs = split_words([o.choices for o in outcomes])
    rows = [
        (problem, config, o.sanitizer or "plain", o.schedules, *errors(o.check), _verdict(o), duration(o.seconds))
        for o, problem, config in zip(outcomes, problems, configs, strict=True)
    ]
    title = "; ".join(part for part in (f"{report.op} on the host target", " ".join(word for word in (common, alike) if word)) if part)
    columns = ("problem" if any(problems) else "", "config", "sanitizer", ">schedules", ">error", ">worst", "", ">took")
    show_table(console, title, columns, rows)
    ran = {outcome.problem for outcome in outcomes}
    words = [split_words([facts(case.asked), facts(case.run)])[1] for case in cut if case.run in ran]
    for asked, run in dict.fromkeys((asked, run) for asked, run in words):
        console.print(Text(f"{run}: cut from {asked}", "dim"))
    for first, *others in report.groups():
        console.print(Text(f"\n{facts(first.problem)}\n{first.choices}, {first.sanitizer or 'plain'}\n{first.summary}", "red"))
        for o in others[:SHOWN]:
            console.print(Text(f"the same: {facts(o.problem)} {o.choices}, {o.sanitizer or 'plain'}", "red"))
        if len(others) > SHOWN:
            console.print(Text(f"the same in {len(others) - SHOWN} more", "red"))
    console.print()
    for note in report.notes:
        console.print(Text(note))
    if report.not_run:
        console.print(Text(f"not run: {'; '.join(report.not_run)}"))
    if report.failures:
        console.print(Text(f"{len(report.failures)} of {len(outcomes)} failed", "bold red"))
    else:
        console.print(Text(f"all {len(outcomes)} right", "green"))


def errors(check: Check | None) -> tuple[str, str]:
    """A check's two distances, relative to the norm and of the worst element, as a table has them."""
    return (f"{check.relative:.1e}", f"{check.max_error:.1e}") if check is not None else ("", "")


def _verdict(outcome: Outcome) -> Text:
    return Text("FAILED", "bold red") if outcome.failure else Text("right", "green")
