"""What one implementation took, and the results file, of any benchmark; rows of that of power retention: their table, JSON, plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import Case, geometric_mean, table

SCHEMA = 1
OURS, PEER, CUBLAS = "ours", "retention", "cuBLAS 8192^3"
SDPA = ("SDPA flash", "SDPA cuDNN")
CUBLAS_FLOPS = 2.0 * 8192**3


@dataclass(frozen=True)
class Entry:
    """What one implementation took and how far it was off; `note` says why there is no time.

    `ms`, `iqr`: GPU time, median and interquartile range over `samples`. `call_ms`: a call back to back with others, the host included.
    `relative`: of the norm; `worst`: of the worst element, by the op's own measure; both on some heads and rows.
    """

    ms: float | None = None
    iqr: float = 0.0
    samples: int = 0
    call_ms: float | None = None
    relative: float | None = None
    worst: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A case, the config that a call without a config takes, and every implementation by name; `run` counts in the file's `runs`."""

    case: Case
    config: str
    origin: str
    entries: dict[str, Entry] = field(default_factory=dict)
    run: int = 0

    @property
    def ours(self) -> Entry:
        """Our entry."""
        return self.entries.get(OURS, Entry(note="not run"))

    @property
    def peer(self) -> Entry:
        """The peer's fastest entry, or the one that says why there is none."""
        found = [entry for name, entry in self.entries.items() if name.startswith(PEER)]
        return min(found, key=lambda e: e.ms if e.ms is not None else float("inf"), default=Entry(note="not run"))

    @property
    def ratio(self) -> float | None:
        """How many times faster than the peer."""
        return self.peer.ms / self.ours.ms if self.peer.ms and self.ours.ms else None

    @property
    def tflops(self) -> float | None:
        """Of ours, by the formula of the case."""
        return self.case.work.flops / self.ours.ms / 1e9 if self.ours.ms else None

    @property
    def share_of_cublas(self) -> float | None:
        """Our TFLOP/s over those of cuBLAS in the same rounds."""
        other = self.entries.get(CUBLAS, Entry()).ms
        return self.tflops / (CUBLAS_FLOPS / other / 1e9) if other and self.tflops else None

    @property
    def share_of_floor(self) -> float | None:
        """Floor over ours."""
        return self.case.work.floor_ms / self.ours.ms if self.ours.ms else None

    def to_json(self) -> dict[str, Any]:
        """The row, and what follows from it."""
        derived = {
            "flops": self.case.work.flops,
            "floor_ms": self.case.work.floor_ms,
            "ratio": self.ratio,
            "tflops": self.tflops,
            "share_of_cublas": self.share_of_cublas,
            "share_of_floor": self.share_of_floor,
        }
        return {"name": self.case.name, **asdict(self), **derived}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Row:
        """The row that `to_json` wrote."""
        case = Case(**{**data["case"], "peer_chunks": tuple(data["case"]["peer_chunks"])})
        return cls(case, data["config"], data["origin"], {name: Entry(**entry) for name, entry in data["entries"].items()}, data["run"])


@dataclass(frozen=True)
class Book:
    """What a results file holds: the runs it was made by (GPU, driver, versions, command, date), and one row per case, a benchmark's own:
    with its `case.name`, and `to_json`."""

    gpu: str
    runs: tuple[dict[str, Any], ...] = ()
    rows: tuple[Any, ...] = ()

    @classmethod
    def load(cls, path: Path, gpu: str, row: Callable[[dict[str, Any]], Any]) -> Book:
        """The file's, if it is there and of this GPU and schema, each row made by `row`; else an empty one."""
        data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if data.get("schema") != SCHEMA or data.get("gpu") != gpu:
            return cls(gpu)
        return cls(gpu, tuple(data["runs"]), tuple(row(found) for found in data["rows"]))

    def with_row(self, row: Any) -> Book:
        """The same with a row put in the place of an older one of its case."""
        return Book(self.gpu, self.runs, (*(r for r in self.rows if r.case.name != row.case.name), row))

    def save(self, path: Path) -> None:
        """Write the file; runs that no row is left of are kept as empty places."""
        data = {"schema": SCHEMA, "gpu": self.gpu, "runs": self.runs, "rows": [row.to_json() for row in self.rows]}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _ms(entry: Entry | None, spread: bool = True) -> str:
    if entry is None or entry.ms is None:
        return "-"
    return f"{entry.ms:.4f} ({entry.iqr:.4f})" if spread else f"{entry.ms:.3f}"


def _plain(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _errors(ours: float | None, peer: float | None) -> str:
    return f"{_plain(ours, '.1e')} / {_plain(peer, '.1e')}"


def show(rows: Sequence[Row]) -> str:
    """The table, then why some cells are empty, then the summary."""
    head = (
        "case",
        "chunk",
        "ours ms (IQR)",
        "retention ms (IQR)",
        "ratio",
        "TFLOP/s",
        "% cuBLAS",
        "floor ms",
        "% floor",
        "error ours / peer",
        "worst ours / peer",
        "call ms ours / peer",
        *(f"{name} ms" for name in SDPA),
    )
    lines = []
    for row in rows:
        share, floor = row.share_of_cublas, row.share_of_floor
        chunk = dict(part.split("=") for part in row.config.split()).get("chunk", "-")
        lines.append(
            (
                row.case.name,
                chunk,
                _ms(row.ours),
                _ms(row.peer),
                _plain(row.ratio),
                _plain(row.tflops, ".0f"),
                _plain(share and 100 * share, ".0f"),
                f"{row.case.work.floor_ms:.3f}",
                _plain(floor and 100 * floor, ".0f"),
                _errors(row.ours.relative, row.peer.relative),
                _errors(row.ours.worst, row.peer.worst),
                f"{_plain(row.ours.call_ms, '.3f')} / {_plain(row.peer.call_ms, '.3f')}",
                *(_ms(row.entries.get(name), False) for name in SDPA),
            )
        )
    notes = [f"{row.case.name}: {name}: {entry.note}" for row in rows for name, entry in row.entries.items() if entry.note]
    configs = [f"{row.case.name}: {row.config} ({row.origin})" for row in rows]
    return "\n".join([table(head, lines), "", *configs, *notes, *summary(rows)])


def summary(rows: Sequence[Row]) -> list[str]:
    """Geometric mean and worst of the ratios, of all and of the odd lengths."""
    said = []
    for title, group in (("all cases", None), ("odd lengths (P7)", "P7")):
        ratios = {row.case.name: row.ratio for row in rows if row.ratio and group in (None, row.case.group)}
        if ratios:
            worst = min(ratios, key=lambda name: ratios[name])
            said.append(
                f"{title}: {geometric_mean(list(ratios.values())):.2f} times as fast as retention (geometric mean of {len(ratios)}), "
                f"worst {ratios[worst]:.2f} at {worst}"
            )
    return said


def plot(rows: Sequence[Row], gpu: str, path: Path) -> bool:
    """Milliseconds over T for B = 1, H = 16, d = 64, both axes logarithmic, as PNG; whether there was anything to plot."""
    from matplotlib.figure import Figure

    series = sorted((row for row in rows if row.case.in_series), key=lambda row: row.case.t)
    curves: dict[str, list[tuple[int, float]]] = {OURS: [], PEER: [], **{name: [] for name in SDPA}}
    for row in series:
        for name, points in curves.items():
            entry = row.peer if name == PEER else row.entries.get(name, Entry())
            if entry.ms is not None:
                points.append((row.case.t, entry.ms))
    if not any(curves.values()):
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    labels = {OURS: "vidrial", PEER: "retention 1.0.7 (Triton)"}
    for name, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=labels.get(name, f"{name} (softmax, causal)"))
    axes.plot([row.case.t for row in series], [row.case.work.floor_ms for row in series], color="gray", linestyle=":", label="floor")
    axes.set(
        xscale="log", yscale="log", xlabel="T (tokens)", ylabel="ms", title=f"Power retention, forward, B=1 H=16 d=64 bf16, gated: {gpu}"
    )
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True
