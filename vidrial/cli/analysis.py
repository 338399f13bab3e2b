"""`vidrial analyse`: what each tiled object of a kernel does, as predicted from the object and as counted on the host target."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from vidrial.build.cubins import cubin_of
from vidrial.cli.tables import duration, facts, show_records, show_table, split_words
from vidrial.device import VECTOR_BYTES, WARP, Device
from vidrial.errors import ConfigError, ToolchainError, UnsupportedError
from vidrial.events import Counts
from vidrial.host.plan import HostPlan
from vidrial.host.target import HostStats, Schedule
from vidrial.layout.access import SECTOR_BYTES, Tiled, analyse, flops, per_instruction, per_tile, tiled_objects
from vidrial.layout.copies import LoadVector, TiledCopy
from vidrial.layout.mma import Operand, TiledMma
from vidrial.layout.occupancy import Waves
from vidrial.layout.tma import TmaTile
from vidrial.layout.wgmma import WarpgroupMma
from vidrial.spec.choices import describe
from vidrial.spec.chosen import describe_taken
from vidrial.spec.op import Op, Stage
from vidrial.tune.candidates import check_configs

SEED = 0
# A launch that takes the host target longer is not worth waiting for.
TIMEOUT_SECONDS = 600.0
OBJECT_COLUMNS = ("", "instruction", ">B each", ">passes each", ">sectors per tile", ">issued", ">passes", ">tiles", ">sectors", ">read")
COUNTED_COLUMNS = ("kernel", ">CTAs", ">MMA FLOP", ">by its cost", ">bytes read", ">written", ">by its cost")


@dataclass(frozen=True)
class Counted:
    """One launch on the host target, of a small problem."""

    stage: Stage
    stats: HostStats


def show_analysis(console: Console, op: Op, problem: Any, device: Device, config: Any) -> None:
    """Print what a config does. Of each tiled object: predicted from the object alone, and counted on the host target at
    the op's small problem; of each launch at the size asked for: its cost by the description, occupancy and waves.

    Raises:
        ToolchainError: the compiler, which tells the registers, is missing.
    """
    console.print(Text(f"{op.name} on {device.name} ({device.arch}): {facts(problem)}\n{describe_taken(op, problem, config)}"))
    stages = [s for s in op.stages(problem, config) if 0 not in s.kernel.grid(s.problem, s.config)]
    small = op.small(problem)
    asked, at_small = split_words([facts(problem), facts(small)])[1] if small != problem else ("the size asked for",) * 2
    counted, said = _count(op, small, problem, config, device)
    console.print(Text(f"\n`passes each` and `sectors per tile`, which is full and aligned, are predicted; {said.format(small=at_small)}"))
    for stage in stages:
        rows = list(_objects(stage, counted.get(_source(stage))))
        if rows:
            show_table(console, stage.kernel.name, OBJECT_COLUMNS, rows)
    if counted:
        show_table(console, f"counted at {at_small}", COUNTED_COLUMNS, [_counted_launch(one, device) for one in counted.values()])
    show_records(console, f"launches at {asked}, not counted", [_launch(stage, device) for stage in stages])


def _source(stage: Stage) -> str:
    return stage.kernel.source(stage.problem, stage.config).text


def _count(op: Op, small: Any, problem: Any, config: Any, device: Device) -> tuple[dict[str, Counted], str]:
    """The kernels that `config` launches, by their source, as they ran on the small problem; and what that was, to be named as {small}."""
    wanted = {_source(stage) for stage in op.stages(problem, config)}
    found: dict[str, Counted] = {}
    configs = check_configs(op, small, problem, config, device)
    if not configs:
        return {}, "nothing was counted: no config that is legal at {small} runs these kernels"
    try:
        for one in configs:
            plan = HostPlan(op, small, one, sanitizer="accesses")
            stats = plan.run({**op.sample(small, SEED), **plan.outputs()}, Schedule(timeout=TIMEOUT_SECONDS))
            for stage in op.stages(small, one):
                source = _source(stage)
                if source in wanted and stage.kernel.name in stats:
                    found.setdefault(source, Counted(stage, stats[stage.kernel.name]))
    except (ToolchainError, UnsupportedError) as error:
        return {}, f"nothing was counted: {str(error).replace('{', '{{').replace('}', '}}')}"
    others = split_words([describe(config), *map(describe, configs)])[1][1:] if configs != (config,) else ()
    return found, "what stands to their right was counted on the host target at {small}" + "".join(f", with {other}" for other in others)


def _objects(stage: Stage, counted: Counted | None) -> Iterator[tuple[Any, ...]]:
    """One row for the objects of each type, of those that were at work if they were counted; last what the kernel does by itself."""
    objects = tiled_objects(stage.kernel.resolve(stage.problem, stage.config).members)
    groups: Mapping[tuple[str, ...], Counts | None] = counted.stats.objects if counted else {(name,): None for name in objects}
    for names, n in groups.items():
        if names and n != Counts():
            yield (", ".join(names), *_predicted(objects[names[0]]), *_figures(objects[names[0]], n))
    own = groups.get(())
    if own is not None and own != Counts():
        copies = own.cp_async_requests, "", "", own.cp_async_sectors, _bytes(own.cp_async_bytes)
        yield ("by itself", "cp.async", VECTOR_BYTES, "", "", *copies)
    if own is not None and own.bulk_copies:
        yield "by itself", "cp.async.bulk", "", "", "", own.bulk_copies, "", "", "", _bytes(own.bulk_bytes)


def _predicted(tiled: Tiled) -> tuple[Any, ...]:
    """Instruction, bytes (a thread's, of wgmma those that one instruction reads), passes over the banks, sectors of a full tile."""
    if isinstance(tiled, TiledCopy):
        return tiled.atom.name, tiled.atom.bytes, "", per_tile(tiled).cp_async_sectors
    if isinstance(tiled, TmaTile):
        return f"cp.async.bulk.tensor.{len(tiled.box)}d", tiled.bytes // tiled.boxes, "", tiled.bytes // SECTOR_BYTES
    if isinstance(tiled, TiledMma):
        return tiled.atom.name, "", "", ""
    if isinstance(tiled, WarpgroupMma):
        findings = analyse(tiled)
        # Eight rows of 16 bytes at once, each phase as often as its worst bank takes.
        size = sum(finding.bytes for finding in findings)
        passes = sum(finding.bytes // (8 * VECTOR_BYTES) * (finding.ways or 1) for finding in findings)
        return tiled.atom.name, size, passes, ""
    one = per_instruction(tiled)
    if isinstance(tiled, LoadVector):
        return "shared load", VECTOR_BYTES, WARP // 8 + one.shared_load_conflicts, ""
    atom = (tiled.load if isinstance(tiled, Operand) else tiled).atom
    return atom.name, VECTOR_BYTES, atom.matrices + one.ldmatrix_conflicts, ""


def _figures(tiled: Tiled, n: Counts | None) -> tuple[Any, ...]:
    """Instructions issued, passes, tiles, sectors and bytes as counted."""
    if n is None:
        return "", "", "", "", ""
    if isinstance(tiled, TiledCopy):
        return n.cp_async_requests, "", n.copy_calls // tiled.threads, n.cp_async_sectors, _bytes(n.cp_async_bytes)
    if isinstance(tiled, TmaTile):
        return n.bulk_copies, "", n.bulk_copies // tiled.boxes, "", _bytes(n.bulk_bytes)
    if isinstance(tiled, (TiledMma, WarpgroupMma)):
        return n.mma + n.wgmma, "", "", "", ""
    if isinstance(tiled, LoadVector):
        return n.shared_loads, WARP // 8 * n.shared_loads + n.shared_load_conflicts, "", "", ""
    atom = (tiled.load if isinstance(tiled, Operand) else tiled).atom
    return n.ldmatrix, atom.matrices * n.ldmatrix + n.ldmatrix_conflicts, "", "", ""


def counted_flops(stage: Stage, stats: HostStats) -> int:
    """Floating-point operations of the MMAs that a launch issued, as the host target counted them."""
    objects = tiled_objects(stage.kernel.resolve(stage.problem, stage.config).members)
    mmas = ((objects[names[0]], n) for names, n in stats.objects.items() if names)
    return sum(flops(tiled, n) for tiled, n in mmas if isinstance(tiled, (TiledMma, WarpgroupMma)))


def _counted_launch(counted: Counted, device: Device) -> tuple[Any, ...]:
    stage, stats = counted.stage, counted.stats
    cost = stage.kernel.cost(stage.problem, stage.config, device) if stage.kernel.cost is not None else None
    issued = counted_flops(stage, stats)
    return (
        stage.kernel.name,
        math.prod(stage.kernel.grid(stage.problem, stage.config)),
        f"{issued:.4g}" if issued else "",
        f"{cost.flops:.4g}" if cost and issued else "",
        _bytes(stats.read_bytes or 0),
        _bytes(stats.written_bytes or 0),
        _bytes(int(cost.bytes)) if cost else "",
    )


def _launch(stage: Stage, device: Device) -> dict[str, Any]:
    kernel, tiles = stage.kernel, stage.kernel.resolve(stage.problem, stage.config)
    resources = cubin_of(kernel, stage.problem, stage.config, device.arch).resources
    occupancy = kernel.occupancy(stage.problem, stage.config, device, resources.registers)
    if occupancy.ctas < 1:
        raise ConfigError(f"{kernel.name}: no CTA fits an SM of {device.name}: {occupancy}; take another config")
    ctas = math.prod(kernel.grid(stage.problem, stage.config))
    waves = Waves(ctas, device.sms, occupancy.ctas)
    cost = kernel.cost(stage.problem, stage.config, device) if kernel.cost is not None else None
    return {
        "kernel": kernel.name,
        ">CTAs": ctas,
        ">threads": tiles.threads,
        ">registers": resources.registers,
        ">shared B": tiles.smem_bytes + resources.static_smem,
        ">CTAs per SM": occupancy.ctas,
        "limited by": ", ".join(occupancy.limited_by),
        ">waves": waves.waves,
        ">last wave": f"{waves.tail:.0%}",
        ">FLOP": f"{cost.flops:.2e}" if cost and cost.flops else "",
        ">memory": _bytes(int(cost.bytes)) if cost else "",
        ">predicted": duration(cost.seconds(device)) if cost else "",
    }


def _bytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB" if size else ""
