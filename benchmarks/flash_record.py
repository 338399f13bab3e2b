"""Cases and rows of the benchmark of flash attention: their table, their JSON, their plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import geometric_mean, table
from benchmarks.record import CUBLAS, CUBLAS_FLOPS, OURS, Entry

CUDNN, FA2, FA4 = "SDPA cuDNN", "SDPA flash", "FlashAttention-4"
PEERS = (CUDNN, FA2, FA4)
SHORT = {CUDNN: "cuDNN", FA2: "FA2", FA4: "FA4"}
# Of FA2's error, what ours may be.
ERROR_RATIO = 1.25
LENGTHS = (4096, 2048, 1021, 16384, 8191, 6007, 4093, 10007)
SHORT_LENGTHS, SMALL_LENGTHS = (1000, 257, 513, 1025, 1537, 2049, 3001, 4097, 8193), (197, 50, 77, 257, 511)


@dataclass(frozen=True)
class Case:
    """A forward pass: q [b, t, hq, d], k [b, t, h, d], v [b, t, h, e], normal.

    `group`: what `--cases` selects it by. `graph`: timed as CUDA graphs of several calls. `sustained`: timed back to back as well.
    """

    group: str
    b: int
    h: int
    t: int
    d: int = 128
    causal: bool = True
    hq: int = 0
    e: int = 0
    dtype: str = "bfloat16"
    graph: bool = False
    sustained: bool = False

    @property
    def name(self) -> str:
        """Group and shape."""
        heads = f"HQ{self.query_heads} H{self.h}" if self.hq else f"H{self.h}"
        width = f"d{self.d}/{self.e}" if self.e else f"d{self.d}"
        other = f" {self.dtype}" if self.dtype != "bfloat16" else ""
        return f"{self.group} B{self.b} {heads} T{self.t} {width} {'causal' if self.causal else 'full'}{other}"

    @property
    def query_heads(self) -> int:
        """Heads of q."""
        return self.hq or self.h

    @property
    def values(self) -> int:
        """Head size of v."""
        return self.e or self.d

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, of one head."""
        return self.t * (self.t + 1) // 2 if self.causal else self.t**2

    @property
    def flops(self) -> float:
        """2 (d + e) per pair: 4 d where the head sizes are equal."""
        return 2.0 * self.b * self.query_heads * (self.d + self.values) * self.pairs

    @property
    def in_series(self) -> bool:
        """Whether it is a point of the plot over T."""
        return (self.b, self.h, self.hq, self.e, self.dtype) == (2, 16, 0, 0, "bfloat16") and self.d in (64, 128)


# What matters most first: what there is no time for is left out at the end.
CASES = (
    Case("F1", 2, 16, 8192, sustained=True),
    Case("F2", 2, 16, 8192, causal=False, sustained=True),
    Case("T", 2, 16, 8192, d=64, sustained=True),
    Case("T", 2, 16, 8192, d=64, causal=False, sustained=True),
    *(Case("T", 2, 16, t, d=d, causal=causal) for t in LENGTHS for d in (128, 64) for causal in (True, False)),
    Case("F9", 1, 8, 16411, hq=32),
    Case("F4", 2, 8, 8192, d=256),
    Case("F3", 2, 32, 8192, d=64),
    *(Case("F8", 32, 12, t, d=64, causal=False, graph=True) for t in SMALL_LENGTHS),
    *(Case("F7", 1, 16, t) for t in SHORT_LENGTHS),
    Case("W", 2, 16, 8192, d=96),
    Case("W", 2, 16, 8192, d=192, e=128),
    Case("W", 2, 16, 8192, dtype="float16"),
    Case("W", 1, 4, 8192, hq=32),
)


@dataclass(frozen=True)
class Row:
    """A case, the config that a call without a config takes, and every implementation by name: of single calls with a cold L2, and back to
    back. `run` counts in the file's `runs`."""

    case: Case
    config: str
    origin: str
    entries: dict[str, Entry] = field(default_factory=dict)
    sustained: dict[str, Entry] = field(default_factory=dict)
    run: int = 0

    def tflops(self, name: str, sustained: bool = False) -> float | None:
        """Of one implementation, by the formula of the case; of cuBLAS by its own."""
        ms = self._ms(name, sustained)
        return (CUBLAS_FLOPS if name == CUBLAS else self.case.flops) / ms / 1e9 if ms else None

    def ratio(self, name: str, sustained: bool = False) -> float | None:
        """How many times faster than a peer."""
        ours, theirs = self._ms(OURS, sustained), self._ms(name, sustained)
        return theirs / ours if ours and theirs else None

    def best(self, sustained: bool = False) -> float | None:
        """How many times faster than the fastest peer that serves the case."""
        return min((r for r in (self.ratio(name, sustained) for name in PEERS) if r), default=None)

    @property
    def share_of_cublas(self) -> float | None:
        """Our TFLOP/s over those of cuBLAS in the same rounds."""
        ours, other = self.tflops(OURS), self.tflops(CUBLAS)
        return ours / other if ours and other else None

    @property
    def error_ratio(self) -> float | None:
        """Our relative error over FA2's; NaN stays NaN."""
        ours, theirs = self.error(OURS), self.error(FA2)
        return None if ours is None or not theirs else ours / theirs

    def error(self, name: str) -> float | None:
        """Relative to the norm, on some heads and rows."""
        return self.entries.get(name, Entry()).relative

    def _ms(self, name: str, sustained: bool) -> float | None:
        return (self.sustained if sustained else self.entries).get(name, Entry()).ms

    def to_json(self) -> dict[str, Any]:
        """The row, and what follows from it."""
        derived = {
            "flops": self.case.flops,
            "share_of_cublas": self.share_of_cublas,
            "tflops": {name: self.tflops(name) for name in self.entries},
            "sustained_tflops": {name: self.tflops(name, True) for name in self.sustained},
            "ratio": {name: self.ratio(name) for name in PEERS if name in self.entries},
            "sustained_ratio": {name: self.ratio(name, True) for name in PEERS if name in self.sustained},
        }
        return {"name": self.case.name, **asdict(self), **derived}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Row:
        """The row that `to_json` wrote."""
        entries, sustained = ({name: Entry(**entry) for name, entry in data[key].items()} for key in ("entries", "sustained"))
        return cls(Case(**data["case"]), data["config"], data["origin"], entries, sustained, data["run"])


def _plain(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _beside(row: Row, name: str, sustained: bool = False) -> str:
    """A peer's TFLOP/s, and how many times faster ours is."""
    return f"{_plain(row.tflops(name, sustained), '.0f')} ({_plain(row.ratio(name, sustained), '.2f')})"


def line(row: Row) -> str:
    """What a row says, in short."""
    peers = ", ".join(f"{SHORT[name]} {_beside(row, name)}" for name in PEERS if row.tflops(name))
    held = f"; sustained {_plain(row.tflops(OURS, True), '.0f')}" if row.sustained else ""
    return f"{_plain(row.tflops(OURS), '.0f')} TFLOP/s{', ' if peers else ''}{peers}{held}; error {_plain(row.error(OURS), '.1e')}"


def show(rows: Sequence[Row]) -> str:
    """The tables, then configs, then why some cells are empty, then the summary."""
    heads = [f"{SHORT[name]} (ours/it)" for name in PEERS]
    errors = " / ".join(("ours", *SHORT.values()))
    burst = table(
        ("case", "ours ms (IQR)", "TFLOP/s", "% cuBLAS", *heads, f"error {errors}"),
        [
            (
                row.case.name,
                f"{_plain(row.entries[OURS].ms, '.4f')} ({row.entries[OURS].iqr:.4f})",
                _plain(row.tflops(OURS), ".0f"),
                _plain(row.share_of_cublas and 100 * row.share_of_cublas, ".0f"),
                *(_beside(row, name) for name in PEERS),
                " / ".join(_plain(row.error(name), ".1e") for name in (OURS, *PEERS)),
            )
            for row in rows
        ],
    )
    held = [row for row in rows if row.sustained]
    sustained = table(
        ("sustained", "ours ms", "TFLOP/s", "cuBLAS", *heads),
        [
            (
                row.case.name,
                _plain(row.sustained.get(OURS, Entry()).ms, ".4f"),
                _plain(row.tflops(OURS, True), ".0f"),
                _plain(row.tflops(CUBLAS, True), ".0f"),
                *(_beside(row, name, True) for name in PEERS),
            )
            for row in held
        ],
    )
    configs = [f"{row.case.name}: {row.config} ({row.origin})" for row in rows]
    notes = [f"{row.case.name}: {name}: {entry.note}" for row in rows for name, entry in row.entries.items() if entry.note]
    return "\n".join([burst, "", *([sustained, ""] if held else []), *configs, *notes, *summary(rows)])


def summary(rows: Sequence[Row]) -> list[str]:
    """Geometric mean and worst of the ratios, by group and peer; and where our error is larger than it may be."""
    groups = dict.fromkeys(row.case.group for row in rows)
    said = [text for name in PEERS for text in _ratios(f"all, {SHORT[name]}", rows, lambda row, name=name: row.ratio(name))]
    said += [text for g in groups for text in _ratios(f"{g}, the best peer", [r for r in rows if r.case.group == g], Row.best)]
    said += _ratios("sustained, the best peer", rows, lambda row: row.best(True))
    # NOTE: a NaN is beyond any bound.
    wrong = [row.case.name for row in rows if row.error_ratio is not None and not row.error_ratio <= ERROR_RATIO]
    return said + ([f"ERRORS beyond {ERROR_RATIO} times FA2's: {', '.join(wrong)}"] if wrong else [])


def _ratios(title: str, rows: Sequence[Row], ratio: Any) -> Iterator[str]:
    found = {row.case.name: r for row in rows if (r := ratio(row))}
    if found:
        worst = min(found, key=lambda name: found[name])
        mean = geometric_mean(list(found.values()))
        yield f"{title}: {mean:.2f} times as fast (geometric mean of {len(found)}), worst {found[worst]:.2f} at {worst}"


def plot(rows: Sequence[Row], gpu: str, path: Path) -> bool:
    """TFLOP/s over T for B = 2, H = 16, a panel per head size and mask, as PNG; whether there was anything to plot."""
    from matplotlib.figure import Figure

    series = sorted((row for row in rows if row.case.in_series and row.tflops(OURS)), key=lambda row: row.case.t)
    if not series:
        return False
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for i, d in enumerate((128, 64)):
        for j, causal in enumerate((True, False)):
            axes, chosen = panels[i][j], [row for row in series if (row.case.d, row.case.causal) == (d, causal)]
            for name in (OURS, *PEERS):
                points = [(row.case.t, tflops) for row in chosen if (tflops := row.tflops(name))]
                if points:
                    label = "vidrial" if name == OURS else SHORT[name]
                    axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
            axes.set(xscale="log", title=f"d={d}, {'causal' if causal else 'full'}", xlabel="T (tokens)", ylabel="TFLOP/s", ylim=(0, None))
            axes.grid(True, which="both", alpha=0.25)
            if chosen:
                axes.legend()
    figure.suptitle(f"Flash attention, forward, B=2 H=16 bf16, cold L2: {gpu}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True
