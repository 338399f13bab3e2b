"""What `vidrial check` and `vidrial analyse` print."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from vidrial.analysis import Waves, analyse
from vidrial.check import Outcome, Report
from vidrial.counts import Counts
from vidrial.device import Device
from vidrial.errors import ConfigError
from vidrial.op import Op, Stage
from vidrial.show import duration, facts, show_table, split_words
from vidrial.smem import VECTOR_BYTES
from vidrial.space import describe
from vidrial.tiled import LoadMatrix, LoadVector, TiledCopy, TiledMma, WarpgroupMma, atoms_of

ACCESS_COLUMNS = (
    "",
    "instruction",
    ">B each",
    ">MMA",
    ">ldmatrix",
    ">bank ways",
    ">extra passes",
    ">cp.async",
    ">sectors each",
    ">read",
)
LAUNCH_COLUMNS = (
    "kernel",
    ">CTAs",
    ">threads",
    ">registers",
    ">shared B",
    ">CTAs an SM",
    "limited by",
    ">waves",
    ">last wave",
    ">MMA FLOP",
    ">cp.async",
    ">memory",
    ">predicted",
)


def show_report(console: Console, report: Report) -> None:
    """Print one row a problem, config and sanitizer, then what is wrong."""
    outcomes = report.outcomes
    common, problems = split_words([facts(outcome.problem) for outcome in outcomes])
    alike, configs = split_words([describe(outcome.config) for outcome in outcomes])
    rows = [
        (problem, config, o.sanitizer or "plain", o.schedules, *_errors(o), _verdict(o), duration(o.seconds))
        for o, problem, config in zip(outcomes, problems, configs, strict=True)
    ]
    title = " ".join(word for word in (f"{report.op} on the host target;", common, alike) if word)
    show_table(
        console, title, ("problem" if any(problems) else "", "config", "sanitizer", ">schedules", ">error", ">worst", "", ">took"), rows
    )
    for o in report.failures:
        console.print(Text(f"\n{facts(o.problem)}\n{describe(o.config)}, {o.sanitizer or 'plain'}\n{o.summary}", "red"))
    console.print(
        Text(
            f"\n{len(report.failures)} of {len(outcomes)} failed" if report.failures else f"\nall {len(outcomes)} right",
            "bold red" if report.failures else "green",
        )
    )


def _errors(outcome: Outcome) -> tuple[str, str]:
    found = outcome.check
    return (f"{found.relative:.1e}", f"{found.worst:.1e}") if found is not None else ("", "")


def _verdict(outcome: Outcome) -> Text:
    return Text("FAILED", "bold red") if outcome.failure else Text("right", "green")


def show_analysis(console: Console, op: Op, problem: Any, device: Device) -> None:
    """Print what is known of the config predicted fastest before it runs: each access, arithmetic, occupancy and waves of every kernel.

    Raises:
        ConfigError: no config is legal. ToolchainError: the compiler, which tells the registers, is missing.
    """
    config = op.predicted(problem, device)
    console.print(Text(f"{op.name} on {device.name} ({device.arch}): {facts(problem)}\n{describe(config)}"))
    stages = [s for s in op.stages(problem, config) if 0 not in s.kernel.grid(s.problem, s.config)]
    for stage in stages:
        rows = list(_accesses(stage))
        if rows:
            show_table(console, stage.kernel.name, ACCESS_COLUMNS, rows)
    show_table(console, "launches", LAUNCH_COLUMNS, [_launch(stage, device) for stage in stages])


def _accesses(stage: Stage) -> Iterator[tuple[Any, ...]]:
    """One row for each tiled object that is at work, and for what else the kernel's traffic names."""
    members = stage.kernel.resolve(stage.problem, stage.config).members
    counts = stage.kernel.counts(stage.problem, stage.config)
    tiled = (LoadMatrix, LoadVector, TiledCopy, TiledMma, WarpgroupMma)
    for name in dict.fromkeys((*counts, *(n for n, member in members.items() if isinstance(member, LoadVector)))):
        member, n = members.get(name), counts.get(name, Counts())
        findings = analyse(member, name) if isinstance(member, tiled) else []
        ways = max((f.ways for f in findings if f.ways is not None), default=None)
        # A thread moves so many bytes; an instruction of wgmma reads so many, both operands together.
        sizes = [f.bytes for f in findings]
        size = sum(sizes) if isinstance(member, WarpgroupMma) else max(sizes, default=VECTOR_BYTES)
        if n == Counts() and not isinstance(member, LoadVector):
            continue
        instructions = ", ".join(dict.fromkeys(atom.name for atom in atoms_of(member))) or ("shared load" if member else "cp.async")
        each = f"{n.cp_async_sectors / n.cp_async_requests:.1f}" if n.cp_async_requests else ""
        passes = n.ldmatrix_conflicts if n.ldmatrix else ""
        yield (
            name,
            instructions,
            size,
            n.mma or n.wgmma or "",
            n.ldmatrix or "",
            ways or "",
            passes,
            n.cp_async_requests or "",
            each,
            _bytes(n.cp_async_bytes),
        )


def _launch(stage: Stage, device: Device) -> tuple[Any, ...]:
    kernel, tiles = stage.kernel, stage.kernel.resolve(stage.problem, stage.config)
    resources = kernel.cubin(stage.problem, stage.config, device.arch).resources
    shared = tiles.smem_bytes + resources.static_smem
    occupancy = kernel.occupancy(stage.problem, stage.config, device, resources.registers)
    if occupancy.ctas < 1:
        raise ConfigError(f"{kernel.name}: no CTA fits an SM of {device.name}: {occupancy}; take another config")
    ctas = math.prod(kernel.grid(stage.problem, stage.config))
    waves = Waves(ctas, device.sms, occupancy.ctas)
    cost = kernel.cost(stage.problem, stage.config, device) if kernel.cost is not None else None
    counts = kernel.counts(stage.problem, stage.config)
    flops = sum(
        2 * math.prod(member.atom.shape) * (n.mma + n.wgmma)
        for name, n in counts.items()
        if isinstance(member := tiles.members.get(name), (TiledMma, WarpgroupMma))
    )
    return (
        kernel.name,
        ctas,
        tiles.threads,
        resources.registers,
        shared,
        occupancy.ctas,
        ", ".join(occupancy.limited_by),
        waves.waves,
        f"{waves.tail:.0%}",
        f"{flops:.2e}" if flops else "",
        _bytes(sum(n.cp_async_bytes for n in counts.values())),
        _bytes(int(cost.bytes)) if cost else "",
        duration(cost.seconds(device)) if cost else "",
    )


def _bytes(size: int) -> str:
    return f"{size / 1e6:.3g} MB" if size else ""
