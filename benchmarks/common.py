"""What the benchmarks share: the formulas of a case, tables, and what is recorded of a run."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

RESULTS = Path(__file__).parent / "results"
# What the floor of a case stands on: the H200's cuBLAS in bf16 and a device copy, both measured.
FLOOR_TFLOPS, FLOOR_GBS = 790.0, 4300.0
CHUNK = 1024
PACKAGES = ("torch", "triton", "cupy-cuda13x", "numpy", "retention", "nvidia-cudnn-cu13", "flash-attn-4", "nvidia-cutlass-dsl")


@dataclass(frozen=True)
class Case:
    """A forward pass of degree 2, gated, bf16: q [b, t, hq, d], k [b, t, h, d], v [b, t, h, d], log_g [b, t, h].

    log_g = logsigmoid(normal + `gates`): 4 is a memory of some fifty tokens, 12 forgets nothing in 65536.
    `group`: what `--cases` selects it by. `chunk`: the nominal chunk that the formulas charge everybody for. `peer_chunks`: what the
    peer is tried with, 0 for its attention form; its fastest counts.
    """

    group: str
    b: int
    h: int
    t: int
    d: int = 64
    hq: int = 0
    gates: float = 4.0
    chunk: int = CHUNK
    peer_chunks: tuple[int, ...] = (CHUNK,)

    @property
    def name(self) -> str:
        """Group and shape."""
        heads = f"HQ{self.query_heads} H{self.h}" if self.hq else f"H{self.h}"
        return f"{self.group} B{self.b} {heads} T{self.t} d{self.d}"

    @property
    def query_heads(self) -> int:
        """Heads of q."""
        return self.hq or self.h

    @property
    def in_series(self) -> bool:
        """Whether it is a point of the plot over T."""
        return (self.b, self.query_heads, self.h, self.d, self.gates) == (1, 16, 16, 64, 4.0)

    @property
    def work(self) -> Work:
        """What the formulas charge."""
        return Work.of(self)


# The peer's tuning depends on d and HQ / H, and lasts for what comes after it: cases that share it stand together, long ones first.
CASES = (
    Case("P2", 1, 8, 65536),
    Case("S", 1, 16, 65536),
    Case("L", 1, 16, 65536, gates=12.0),
    Case("P3", 2, 16, 16384, peer_chunks=(512, 1024, 2048)),
    Case("P7", 1, 16, 33333),
    Case("P7", 1, 16, 10007),
    Case("P7", 1, 16, 5001),
    Case("P7", 1, 16, 1000),
    Case("S", 1, 16, 16384),
    Case("S", 1, 16, 4096),
    Case("P6", 8, 16, 4096, peer_chunks=(1024, 0)),
    Case("P4", 1, 16, 65536, d=128),
    Case("P5", 1, 16, 16384, d=128),
    Case("P8", 1, 2, 16384, d=128, hq=24),
)


@dataclass(frozen=True)
class Work:
    """FLOPs of a case with its nominal chunk (the exact state of d (d + 1) / 2 rows, so every tiling is charged alike), and its floor.

    intra = B HQ 2 (d + e) sum of C_i (C_i + 1) / 2; state = 2 Dx e (B H T_upd + B HQ T_qry); T_upd = T - C_last, T_qry = T - C_first.
    """

    intra: float
    state: float
    floor_ms: float

    @property
    def flops(self) -> float:
        """All of it."""
        return self.intra + self.state

    @classmethod
    def of(cls, case: Case) -> Work:
        """The floor is what 8 x 8 pair tiles need, chunked or not, whichever is less, at FLOOR_TFLOPS or FLOOR_GBS."""
        d, heads, q_heads = case.d, case.b * case.h, case.b * case.query_heads
        whole, rest = divmod(case.t, case.chunk)
        sizes = [case.chunk] * whole + [rest] * (rest > 0)
        tokens = case.t - sizes[-1], case.t - sizes[0]
        columns = heads * tokens[0] + q_heads * tokens[1]
        intra = q_heads * 4.0 * d * sum(c * (c + 1) // 2 for c in sizes)
        rows = d // 8 * (d // 8 + 1) // 2 * 64
        inputs = 2.0 * case.t * d * (2 * heads + 2 * q_heads) + 4.0 * heads * case.t
        snapshots = 2 * 2.0 * heads * (len(sizes) - 1) * rows * d
        chunked = max((intra + 2.0 * rows * d * columns) / (FLOOR_TFLOPS * 1e9), (inputs + snapshots) / (FLOOR_GBS * 1e6))
        quadratic = max(q_heads * 4.0 * d * (case.t * (case.t + 1) // 2) / (FLOOR_TFLOPS * 1e9), inputs / (FLOOR_GBS * 1e6))
        return cls(intra, 2.0 * (d * (d + 1) // 2) * d * columns, min(chunked, quadratic))


def read_results(path: Path, *names: str) -> dict[str, Any]:
    """A results file that has these entries.

    Raises:
        SystemExit: there is no such file, or it is another one.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read as a results file: {error}") from None
    if not isinstance(data, dict) or any(name not in data for name in names):
        raise SystemExit(f"{path} is no results file of this benchmark; it lacks {', '.join(n for n in names if n not in data) or 'all'}")
    return data


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive values, at least one."""
    return math.exp(sum(map(math.log, values)) / len(values))


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns aligned, the first one to the left."""
    widths = [max(len(row[i]) for row in (head, *lines)) for i in range(len(head))]
    return "\n".join(
        "  ".join(x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))) for row in (head, *lines)
    )


def command_line() -> str:
    """As it was typed, without folders."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def date() -> str:
    """Now, UTC, to the minute."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def short(error: BaseException | str, length: int = 100) -> str:
    """An exception as one short line."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    line = re.sub(r"\s+", " ", text).strip()
    return line if len(line) <= length else line[: length - 3] + "..."


def package_versions() -> dict[str, str]:
    """Of what is installed among PACKAGES."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def gpu_facts() -> dict[str, Any]:
    """Name, driver, clocks and power limit by nvidia-smi; empty where that does not run."""
    fields = ("name", "driver_version", "clocks.max.sm", "clocks.sm", "clocks.mem", "power.limit", "temperature.gpu")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        text = subprocess.run(query, capture_output=True, encoding="utf-8", timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (x.strip() for x in text.strip().split(",")), strict=False))


def slug(gpu: str) -> str:
    """A GPU's name as part of a file's: `NVIDIA H200` -> `h200`."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower().replace("nvidia", "")).strip("_") or "unknown"


class Grouped(Protocol):
    """A case of any benchmark."""

    @property
    def group(self) -> str:
        """What `--cases` selects it by."""


G = TypeVar("G", bound=Grouped)


def select(text: str, cases: Sequence[G]) -> list[G]:
    """The cases of some groups (`P2,P7`), or all.

    Raises:
        SystemExit: a group that does not exist.
    """
    groups = {case.group for case in cases}
    wanted = set(text.split(",")) if text else groups
    if wanted - groups:
        raise SystemExit(f"no case {', '.join(sorted(wanted - groups))}; there are {', '.join(sorted(groups))}")
    return [case for case in cases if case.group in wanted]


def run_facts(torch: Any) -> dict[str, Any]:
    """What is recorded of a run beside torch."""
    return {
        "command": command_line(),
        "date": date(),
        "gpu": gpu_facts(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "packages": {"torch": torch.__version__, **package_versions()},
    }


def bus_id() -> str:
    """The current GPU's, as nvidia-smi takes it."""
    from cupy.cuda import runtime

    return str(runtime.deviceGetPCIBusId(0))
