"""What NVRTC takes for every template of this project, and for the same tiles in CuTe's style. Needs no GPU.

    python benchmarks/compile.py            # a few minutes; writes results/compile.json
    python benchmarks/compile.py --quick    # under a minute: one architecture, d = 64, one compile each

Each source is compiled in a fresh process, set up as a worker of `CompilePool`: first without precompiled headers, then with (the first
such compile makes the header and is reported apart). Seconds are medians; `cpu` is the processor time of the process, which a busy machine
does not stretch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, command_line, date, table
from benchmarks.styles import pairs
from vidrial.build.nvrtc import compile_source
from vidrial.build.pool import worker_environment
from vidrial.build.toolchain import Toolchain
from vidrial.device import Device
from vidrial.spec.choices import describe
from vidrial.spec.kernel import Kernel
from vidrial.spec.registry import find_op
from vidrial.spec.source import Source
from vidrial.templates import TEMPLATES

ROOT = Path(__file__).parent.parent
DEVICES = {"sm_90a": "h200", "sm_80": "a100"}
# Seconds a config, of processor time; see design rule "static resolution": without and with a precompiled header.
BUDGET, BUDGET_PCH = 2.0, 0.8
LENGTH = 16384
WARM_UP = 'extern "C" __global__ void nothing() {}\n'


@dataclass(frozen=True)
class Unit:
    """One source to compile; `smem`: bytes of dynamic shared memory; `style`: ours, or cute."""

    name: str
    style: str
    arch: str
    config: str
    source: Source
    smem: int


@dataclass(frozen=True)
class Row:
    """What one source took. Seconds: medians without and with precompiled headers, and of the compile that made them."""

    name: str
    style: str
    arch: str
    config: str
    seconds: float
    cpu: float
    seconds_pch: float | None
    cpu_pch: float | None
    seconds_making_pch: float | None
    registers: int
    spills: int
    stack: int
    smem: int
    sass: int | None

    @property
    def in_budget(self) -> bool:
        """Whether a config of ours compiles as fast as it shall."""
        return self.cpu <= BUDGET and (self.cpu_pch is None or self.cpu_pch <= BUDGET_PCH)


def op_units(op: Any, problem: Any, arch: str, label: str, config: Any) -> Iterator[Unit]:
    """Every launch of an op's config."""
    for stage in op.stages(problem, config):
        yield kernel_unit(stage.kernel, stage.problem, stage.config, arch, label)


def by_instruction(op: Any, problem: Any, device: Device) -> Iterator[Any]:
    """The config predicted best with chunks of 1024, by mma.sync and, where there is one, by wgmma."""
    shared = replace(op.config(), chunk=1024)
    ranked = op.ranked_parts(problem, shared, device)
    for mma in ("sync", "wgmma"):
        best = {name: next((c.config for c in part if c.config.mma == mma), None) for name, part in ranked.items()}
        if all(best.values()):
            yield replace(shared, **best)


def kernel_unit(kernel: Kernel, problem: Any, config: Any, arch: str, label: str) -> Unit:
    """One kernel as a Unit."""
    tiles = kernel.resolve(problem, config)
    return Unit(f"{kernel.name} {label}".strip(), "ours", arch, describe(config), kernel.source(problem, config), tiles.smem_bytes)


def units(archs: tuple[str, ...], dims: tuple[int, ...], cute: bool) -> list[Unit]:
    """Every template in its default configs, softmax, and the tiles in both styles; equal texts once an architecture."""
    op, softmax = find_op("power_retention"), find_op(f"{ROOT / 'examples/softmax/softmax.py'}:op")
    found: list[Unit] = []
    for arch in archs:
        device = Device.of(DEVICES[arch])
        for d in dims:
            problem = op.example(t=LENGTH, d=d)
            for config in by_instruction(op, problem, device):
                joined = replace(config, scan=replace(config.scan, segments=2))
                found += op_units(op, problem, arch, f"d={d}", joined)
            found += op_units(op, problem, arch, f"d={d} one chunk", op.predicted(problem, device, {"chunk": 0}))
        found += op_units(softmax, softmax.example(n=1000), arch, "", softmax.config())
        for pair in pairs():
            found.append(Unit(pair.name, "ours", arch, "", pair.ours, pair.smem))
            if cute:
                found.append(Unit(pair.name, "cute", arch, "", pair.cute, pair.smem))
    return list({(unit.source.text, unit.arch): unit for unit in reversed(found)}.values())[::-1]


def missing_templates(done: list[Unit]) -> list[str]:
    """Templates of this project that no unit covers."""
    covered = {unit.source.template for unit in done}
    return sorted(path.name for path in Path(TEMPLATES).glob("*.cu.j2") if path.name not in covered)


def measure(unit: Unit, repeats: int) -> Row:
    """Compile a unit in a process of its own."""
    job = {
        "text": unit.source.text,
        "entry": unit.source.entry,
        "arch": unit.arch,
        "includes": unit.source.include_dirs,
        "repeats": repeats if unit.style == "ours" else 1,
        "pch": unit.style == "ours",
    }
    done = subprocess.run(
        [sys.executable, __file__, "--worker"],
        input=json.dumps(job),
        capture_output=True,
        encoding="utf-8",
        check=False,
        cwd=ROOT,
        env=worker_environment() | {"PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        raise SystemExit(f"{unit.name} ({unit.style}, {unit.arch}) failed:\n{done.stderr[-2000:]}")
    return Row(unit.name, unit.style, unit.arch, unit.config, smem=unit.smem, **json.loads(done.stdout))


def work() -> None:
    """A measuring process: one job on stdin, its figures on stdout."""
    job = json.load(sys.stdin)

    def compile_once(pch: str | None) -> tuple[float, float, Any]:
        wall, cpu = time.perf_counter(), time.process_time()
        cubin = compile_source(job["text"], job["entry"], job["arch"], pch=pch, includes=tuple(job["includes"]))
        return time.perf_counter() - wall, time.process_time() - cpu, cubin

    # Loads NVRTC, which no compile shall pay for.
    compile_source(WARM_UP, "nothing", job["arch"])
    plain = [compile_once(None) for _ in range(job["repeats"])]
    first, fast = None, []
    if job["pch"]:
        with tempfile.TemporaryDirectory(prefix="vidrial-bench-") as folder:
            first = compile_once(folder)
            fast = [compile_once(folder) for _ in range(job["repeats"])]
    cubin = plain[0][2]
    taken = cubin.resources
    json.dump(
        {
            "seconds": statistics.median(x[0] for x in plain),
            "cpu": statistics.median(x[1] for x in plain),
            "seconds_pch": statistics.median(x[0] for x in fast) if fast else None,
            "cpu_pch": statistics.median(x[1] for x in fast) if fast else None,
            "seconds_making_pch": first[0] if first else None,
            "registers": taken.registers,
            "spills": taken.spill_stores + taken.spill_loads,
            "stack": taken.stack,
            "sass": instructions(cubin.image),
        },
        sys.stdout,
    )


def instructions(image: bytes) -> int | None:
    """SASS instructions in a cubin, by cuobjdump; None where there is none."""
    tool = disassembler()
    if tool is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, encoding="utf-8", check=False).stdout
    return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP)\S", text, re.MULTILINE)) or None


def disassembler() -> str | None:
    """cuobjdump: on PATH, or where its wheel puts it."""
    wheels = (Path(folder, "nvidia/cu13/bin") for folder in sys.path)
    return shutil.which("cuobjdump", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, wheels)]))


def verdicts(rows: list[Row], missing: list[str]) -> list[str]:
    """The statements that the figures are checked against, each with its outcome."""
    ours = [row for row in rows if row.style == "ours"]
    said = []
    for row in rows:
        twin = next((r for r in ours if row.style == "cute" and (r.name, r.arch) == (row.name, row.arch)), None)
        if twin:
            result = "ok  " if twin.registers <= row.registers else "MISS"
            times = f"{twin.cpu:.2f} s, CuTe {row.cpu:.1f} s ({row.cpu / twin.cpu:.0f} times)"
            said.append(f"{result} {row.name} {row.arch}: {twin.registers} registers, CuTe {row.registers}; {times}")
    slow, spilled = [r for r in ours if not r.in_budget], [r for r in ours if r.spills]
    said.append(
        f"{'MISS' if slow else 'ok  '} at most {BUDGET:g} s a config, {BUDGET_PCH:g} s with precompiled headers (processor time)"
        + "".join(f"; {r.name} {r.arch} {r.cpu:.2f} / {r.cpu_pch or 0:.2f}" for r in slow)
    )
    said.append(f"{'MISS' if spilled else 'ok  '} no spills" + "".join(f"; {r.name} {r.arch} {r.spills} bytes" for r in spilled))
    said.append(f"{'MISS' if missing else 'ok  '} every template is covered" + "".join(f"; not {name}" for name in missing))
    return said


def show(rows: list[Row]) -> str:
    """The table."""

    def number(x: float | None) -> str:
        return "-" if x is None else f"{x:.2f}"

    lines = [
        (
            r.name,
            r.style,
            r.arch,
            number(r.seconds),
            number(r.cpu),
            number(r.seconds_pch),
            number(r.cpu_pch),
            number(r.seconds_making_pch),
            str(r.registers),
            str(r.spills),
            str(r.smem),
            str(r.sass or "-"),
        )
        for r in rows
    ]
    return table(
        ("kernel", "style", "arch", "s", "cpu s", "s pch", "cpu s pch", "s making pch", "regs", "spill B", "smem B", "sass"), lines
    )


def document(rows: list[Row], said: list[str], repeats: int) -> dict[str, Any]:
    """What compile.json holds."""
    toolchain = Toolchain.find()
    return {
        "schema": 1,
        "command": command_line(),
        "date": date(),
        "toolchain": str(toolchain.version),
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "note": "other work may have shared the cores; cpu is what counts",
        "repeats": {"ours": repeats, "cute": 1},
        "budget": {"seconds": BUDGET, "seconds_pch": BUDGET_PCH},
        "checked": said,
        "rows": [asdict(row) for row in rows],
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="sm_90a, d = 64, one compile each, without CuTe's style; writes nothing")
    parser.add_argument("--repeats", type=int, default=3, help="compiles of ours, of which the median counts")
    parser.add_argument("--out", type=Path, default=RESULTS / "compile.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return
    repeats = 1 if options.quick else options.repeats
    todo = units(("sm_90a",), (64,), False) if options.quick else units(tuple(DEVICES), (64, 128), True)
    print(f"{len(todo)} sources on {os.cpu_count()} cores, one at a time; load {os.getloadavg()[0]:.1f}", flush=True)
    rows = []
    for unit in todo:
        rows.append(measure(unit, repeats))
        print(f"  {unit.name} {unit.style} {unit.arch}: {rows[-1].cpu:.2f} s", flush=True)
    said = verdicts(rows, missing_templates(todo))
    print(show(rows), *said, sep="\n")
    if not options.quick:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document(rows, said, repeats), indent=1) + "\n", encoding="utf-8")
        print(f"written to {options.out}")


if __name__ == "__main__":
    main()
