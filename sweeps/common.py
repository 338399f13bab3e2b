"""What the programs here share: the cases, a sweep of groups of problems, and what is recorded of a run."""

from __future__ import annotations

import argparse
import datetime
import gzip
import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Required, TypedDict, TypeVar

from vidrial import Device, Op, ToolchainError, VidrialError, describe
from vidrial.tune import Options, SweepResult, check_writable, publish, sweep_lengths

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

P = TypeVar("P", bound="DataclassInstance")
C = TypeVar("C", bound="DataclassInstance")

RESULTS = Path(__file__).parent / "results"
DISTRIBUTION = "vidrial-dsl"
PACKAGES = ("cupy-cuda13x", "nvidia-cuda-nvrtc", "nvidia-cutlass", "numpy")
JOBS, TRIALS = 16, 48
# Starting, checks of the last config and writing are not in a sweep's own budget.
RESERVE = 0.92


class Case(TypedDict, total=False):
    """Keywords of a problem of power retention: those of `vidrial.kernels.power_retention.op.example` that vary here."""

    t: Required[int]
    b: int
    h: int
    hq: int


def this_device() -> Device:
    """The GPU that is measured.

    Raises:
        SystemExit: there is none.
    """
    try:
        return Device.current(0)
    except ToolchainError as error:
        raise SystemExit(f"this needs a GPU: {error}") from None


def facts(device: Device, module: str) -> dict[str, Any]:
    """What is recorded of a run: GPU, driver, versions, command, date."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(query, capture_output=True, encoding="utf-8", errors="replace", timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    versions = {}
    for name in (DISTRIBUTION, *PACKAGES):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "source tree" if name == DISTRIBUTION else "not installed"
    return {
        "gpu": device.name,
        "device": device.key,
        "driver": driver,
        "versions": versions,
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned columns, the last one to the left."""
    lines = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join([*(c.rjust(w) for c, w in zip(line[:-1], widths, strict=False)), line[-1]]) for line in lines)


def write_json(path: Path, data: Any) -> Path:
    """Write a JSON file, its folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def copy_journal(journal: Path, device: Device, out: str | None) -> None:
    """Copy a sweep's journal, compressed, to the folder `out`, by device; nothing if that is None."""
    if out:
        folder = Path(out, device.key)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{journal.name}.gz").write_bytes(gzip.compress(journal.read_bytes()))


def copy_out(paths: Sequence[Path], out: str | None) -> None:
    """Copy files to the folder `out`, by device; nothing if that is None."""
    for path in paths if out else ():
        folder = Path(str(out), path.parent.name)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)


@dataclass(frozen=True)
class Program(Generic[P, C]):
    """An op and its problems by group, which share their static facts, and so their binaries; the group and the problem that matter most
    first. `weights`: how the time is divided. `facts`: what tells problems apart, by name."""

    op: Op[P, C]
    module: str
    groups: Mapping[str, Sequence[P]]
    weights: Mapping[str, float]
    facts: Callable[[P], Mapping[str, object]]

    def main(self, doc: str | None, seconds: float, trials: int = TRIALS) -> None:
        """The command: sweep everything, within `seconds` if nothing else is asked, and print the winners.

        Raises:
            SystemExit: there is no GPU, or nothing was found.
        """
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--seconds", type=float, default=seconds, help="for everything, about")
        parser.add_argument("--jobs", type=int, default=JOBS, help="processes that compile")
        parser.add_argument("--trials", type=int, default=trials, help="configs for each problem at most")
        parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rankings")
        parser.add_argument("--only", default="", help=f"groups, separated by semicolons, of: {'; '.join(self.groups)}")
        parser.add_argument("--resume", action="store_true", help="go on with the trials that an earlier run left in the cache's journals")
        options = parser.parse_args()
        names = [name.strip() for name in options.only.split(";") if name.strip()] or list(self.groups)
        if unknown := [name for name in names if name not in self.groups]:
            parser.error(f"no group {unknown[0]!r}; there are: {'; '.join(self.groups)}")
        replace(self, groups={name: self.groups[name] for name in names})._run(options)

    def _run(self, options: argparse.Namespace) -> None:
        device = this_device()
        check_writable(options.results / device.key)
        kept = Kept(self, device, options.results)
        how = Options(trials=options.trials, jobs=options.jobs, limit=20.0, progress=False, resume=options.resume or None)
        self._sweep(options.seconds, how, kept)
        if not kept.results:
            raise SystemExit("nothing was found; see above")
        found = list(kept.results.values())
        print(self.winners(found))
        print(*(f"note: {note}" for note in kept.notes), sep="\n")
        left_out, tried = sum(map(len, self.groups.values())) - len(found), sum(len(r.trials) for r in found)
        print(f"{len(found)} problems, {left_out} left out for lack of time, {tried} trials in {time.monotonic() - kept.begun:.1f} s")
        print(options.results / device.key / f"{self.op.name}.json")

    def _sweep(self, seconds: float, options: Options, kept: Kept[P, C]) -> None:
        """Every group within its share of the time that is left when it begins."""
        names = list(self.groups)
        for i, name in enumerate(names):
            left = RESERVE * seconds - (time.monotonic() - kept.begun)
            share = self.weights[name] / sum(self.weights[n] for n in names[i:])
            try:
                sweep_lengths(self.op, self.groups[name], options, within=share * left, done=kept.add)
            except VidrialError as error:
                print(f"{name} ended early: {error}", flush=True)
            print(f"{name}: {len(kept.results)} problems so far, {time.monotonic() - kept.begun:.0f} s", flush=True)

    def winners(self, found: Sequence[SweepResult[P, C]]) -> str:
        """A line per problem: its winner, noise, how many configs tie with it, and how much slower the slowest one was."""
        rows: list[tuple[Any, ...]] = []
        for result in found:
            winner, check = result.winner, result.winner.check
            timing = result.ranked[0].timing
            tied = sum(r.tied and r.timing.ties(timing) for r in result.ranked) if result.tied else 1
            failed = ", ".join(f"{count} {status.name}" for status, count in result.failures.items()) or "-"
            rows.append((*self.facts(result.problem).values(), f"{winner.ms:.4f}", f"{timing.iqr_ms / timing.median_ms:.1%}", tied,
                         f"{check.relative:.1e}" if check else "-", f"{result.worst_ms / winner.ms:.1f}", len(result.ranked), failed,
                         describe(winner.config)))  # fmt: skip
        return table((*self.facts(found[0].problem), "ms", "IQR", "tied", "error", "worst/best", "ranked", "failed", "config"), rows)


class Kept(Generic[P, C]):
    """What was found so far: published, recorded and copied to $OUT with every result, so that an interruption costs none of it."""

    def __init__(self, program: Program[P, C], device: Device, folder: Path) -> None:
        self.results: dict[P, SweepResult[P, C]] = {}
        self.begun = time.monotonic()
        self._program, self._device, self._folder, self._facts = program, device, folder, facts(device, program.module)

    @property
    def notes(self) -> list[str]:
        """What the sweeps' notes say of the GPU."""
        return sorted({note for result in self.results.values() for note in result.notes if "tie for" not in note})

    def add(self, result: SweepResult[P, C]) -> None:
        """Keep one more result, or a newer one of the same problem."""
        self.results[result.problem] = result
        named = " ".join(f"{name}={value}" for name, value in self._program.facts(result.problem).items())
        print(f"  {named}: {result.winner.ms:.4f} ms, {len(result.ranked)} ranked, {time.monotonic() - self.begun:.0f} s", flush=True)
        op = self._program.op
        paths = publish(op, [result.ranking], self._folder)
        record = self._facts | {
            "seconds": round(time.monotonic() - self.begun, 1), "problems": len(self.results),
            "trials": sum(len(r.trials) for r in self.results.values()), "notes": self.notes,
        }  # fmt: skip
        paths.append(write_json(self._folder / self._device.key / f"{op.name}_run.json", record))
        copy_out(paths, os.environ.get("OUT"))
        copy_journal(result.journal, self._device, os.environ.get("OUT"))
