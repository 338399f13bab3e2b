"""What another NVRTC makes of the kernels that calls may pick, beside the one that is installed. Needs no GPU.

    python -m pip download --no-deps -d /tmp/wheel "nvidia-cuda-nvrtc==13.5.*" && unzip /tmp/wheel/*.whl -d /tmp/nvrtc
    python benchmarks/nvrtc_versions.py --other /tmp/nvrtc/nvidia/cu13/lib      # a few minutes; writes results/nvrtc_versions.json

Kernels: of power retention those of the table of machine code (tests/machine_code.json) that rankings keep, of flash attention and of the
GEMM what the cost model picks for some problems. Registers, bytes spilled, ptxas' notes on wgmma, instructions, and seconds of one compile,
one process for each version, one after the other.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, command_line, date, table
from vidrial.build.nvrtc import compile_source
from vidrial.build.toolchain import NVRTC, nvrtc, nvrtc_version
from vidrial.device import Device
from vidrial.errors import CompileError
from vidrial.spec.choices import describe
from vidrial.spec.registry import find_op, resolve

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import machine_code  # noqa: E402  # the table's own words for a kernel

ARCH, HOPPER = "sm_90a", "h200"
FLASH: tuple[Mapping[str, Any], ...] = tuple(
    {"t": t, "d": d, "causal": causal} for d in (64, 128) for t in (1021, 8192) for causal in (False, True)
)
GEMM: tuple[Mapping[str, Any], ...] = (
    {"m": 4096, "n": 4096, "k": 4096},
    {"m": 8192, "n": 8192, "k": 8192, "dtype": "float16"},
    {"m": 4000, "n": 4104, "k": 4088, "gelu": True},
    {"m": 257, "n": 4096, "k": 4096},
    {"m": 4099, "n": 4098, "k": 4094},
)
NOTHING = 'extern "C" __global__ void nothing() {}\n'


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel, by one NVRTC. `refused`: why it is not taken; then there are no figures."""

    registers: int = 0
    spills: int = 0
    instructions: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    refused: str = ""


def kernels() -> Iterator[tuple[str, machine_code.Rendered]]:
    """(what it is, its source), each binary once."""
    for entry in machine_code.chosen(machine_code.Table.read(machine_code.TABLE), every=False):
        source = machine_code.render(entry.kernel, entry.problem, entry.choices)
        yield f"{entry.kernel} {source.facts} {source.config}", source
    for op, asked in ((find_op("flash_attention"), FLASH), (resolve(f"{ROOT}/examples/gemm/gemm.py:op"), GEMM)):
        for keywords in asked:
            problem = op.example(**keywords)
            for stage in op.stages(problem, op.predicted(problem, Device.of(HOPPER))):
                source = stage.kernel.source(stage.problem, stage.config)
                facts = " ".join(f"{name}={value}" for name, value in keywords.items())
                words = describe(stage.config)
                yield (
                    f"{stage.kernel.name} {facts} {words}",
                    machine_code.Rendered(source.text, source.entry, source.include_dirs, facts, words),
                )


def work(other: str) -> None:
    """A measuring process: sources on stdin, their rows on stdout, by the NVRTC of the folder `other`, or the installed one."""
    if other:
        ctypes.CDLL(str(Path(other, NVRTC)), mode=ctypes.RTLD_GLOBAL)
    nvrtc()
    rows = []
    # Loads NVRTC, which no kernel's time shall hold.
    compile_source(NOTHING, "nothing", ARCH)
    for text, entry, includes in json.load(sys.stdin):
        try:
            cubin = compile_source(text, entry, ARCH, includes=tuple(includes))
        except CompileError as error:
            rows.append(Row(refused=str(error).partition("\n")[0]))
            continue
        used, notes = cubin.resources, sorted(set(re.findall(r"\((C7[56]\d\d)\)", cubin.log)))
        code = machine_code.section(cubin.image, f".text.{entry}")
        rows.append(Row(used.registers, used.spill_stores + used.spill_loads, machine_code.instructions(code), cubin.seconds, tuple(notes)))
    json.dump({"version": ".".join(map(str, nvrtc().getVersion())), "rows": [dataclasses.asdict(row) for row in rows]}, sys.stdout)


def measure(sources: Sequence[machine_code.Rendered], other: str) -> tuple[str, list[Row]]:
    """The version of NVRTC, and what it makes of each source, in a process of its own."""
    command = [sys.executable, __file__, "--work", other]
    jobs = json.dumps([(source.text, source.entry, source.includes) for source in sources])
    done = subprocess.run(command, input=jobs, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    return found["version"], [Row(**{**row, "notes": tuple(row["notes"])}) for row in found["rows"]]


def summary(rows: Sequence[Row]) -> str:
    """All kernels of one version in a line."""
    taken = [row for row in rows if not row.refused]
    noted = sum(bool(row.notes) for row in taken)
    return (
        f"{len(taken)} of {len(rows)} kernels; {sum(row.registers for row in taken) / max(1, len(taken)):.1f} registers on average, "
        f"{sum(row.spills > 0 for row in taken)} spill, {noted} with notes; {sum(row.instructions for row in taken)} instructions, "
        f"{sum(row.seconds for row in taken):.1f} s"
    )


def shown(names: Sequence[str], versions: Sequence[str], columns: Sequence[Sequence[Row]]) -> str:
    """A line for each kernel, its figures by each version side by side."""
    head = [f"{what} {version}" for what in ("registers", "spills B", "instructions", "seconds", "notes") for version in versions]
    lines = []
    for name, *rows in zip(names, *columns, strict=True):
        figures = (
            [str(row.registers) for row in rows],
            [str(row.spills) for row in rows],
            [str(row.instructions) for row in rows],
            [f"{row.seconds:.2f}" for row in rows],
            [row.refused[:60] or ",".join(row.notes) or "-" for row in rows],
        )
        lines.append([name, *(cell for figure in figures for cell in figure)])
    return table(["kernel", *head], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, help=f"folder of another {NVRTC}")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "nvrtc_versions.json")
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.work)
        return
    if arguments.other is None or not (arguments.other / NVRTC).is_file():
        raise SystemExit(f"--other {arguments.other}: give the folder of another {NVRTC}")
    once = {source.text: (name, source) for name, source in kernels()}
    names, sources = [name for name, _ in once.values()], [source for _, source in once.values()]
    versions, columns = zip(*(measure(sources, other) for other in ("", str(arguments.other.resolve()))), strict=True)
    installed = ".".join(map(str, nvrtc_version()))
    if versions[0] != installed or versions[1] == installed:
        raise SystemExit(f"the processes had NVRTC {', '.join(versions)}; installed is {installed}")
    print(shown(names, versions, columns))
    said = {version: summary(rows) for version, rows in zip(versions, columns, strict=True)}
    print("\n".join(f"NVRTC {version}: {line}" for version, line in said.items()))
    kept = [
        {"kernel": name} | {version: dataclasses.asdict(row) for version, row in zip(versions, rows, strict=True)}
        for name, *rows in zip(names, *columns, strict=True)
    ]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in kept)
    head = json.dumps({"command": command_line().replace(str(arguments.other), "FOLDER"), "date": date(), "summary": said}, indent=1)[:-2]
    arguments.out.write_text(f'{head},\n "kernels": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    print(arguments.out)


if __name__ == "__main__":
    main()
