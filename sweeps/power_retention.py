"""Sweep power retention on this machine's GPU and write the ranking that comes with Vidrial for it.

    python -m vidrial.sweeps.power_retention --seconds 240

Writes results/<device key>/power_retention.json with every result. With $OUT, copies it there, and the trials' journals, compressed:
`gunzip` them, and `vidrial report` makes a page of them.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from vidrial import Device, VidrialError, describe
from vidrial.kernels.power_retention.op import Config, example, op
from vidrial.kernels.power_retention.problem import Problem
from vidrial.sweeps.common import RESULTS, Case, copy_journal, copy_out, facts, table, this_device, write_json
from vidrial.tune import Options, SweepResult, check_writable, publish, sweep_lengths

JOBS, TRIALS = 16, 48
# Problems of one head size share their static facts, and so their binaries. In a group the problems that the benchmarks name come first,
# the most expensive ones foremost: what is left when the time is over is the cheapest to do without.
GROUPS: dict[str, tuple[Case, ...]] = {
    "d=64": (
        {"t": 10007}, {"t": 65536, "h": 8}, {"t": 16384, "b": 2}, {"t": 33333}, {"t": 4096, "b": 8}, {"t": 5001}, {"t": 1000},
        {"t": 65536}, {"t": 2049}, {"t": 257}, {"t": 65}, {"t": 513}, {"t": 129}, {"t": 20001},
    ),
    "d=128": (
        {"t": 16384}, {"t": 65536}, {"t": 16384, "h": 2, "hq": 24}, {"t": 4099}, {"t": 1025}, {"t": 33333}, {"t": 10007}, {"t": 257},
        {"t": 65}, {"t": 4099, "h": 2, "hq": 24}, {"t": 1025, "h": 2, "hq": 24}, {"t": 33333, "h": 2, "hq": 24}, {"t": 2049}, {"t": 513},
    ),
}  # fmt: skip
# Share of the time for each group: with d = 128 more is compiled and everything takes longer.
SHARES = {"d=64": 0.45, "d=128": 1.0}
# Starting, checks of the last config and writing are not in a sweep's own budget.
RESERVE = 0.92


class Kept:
    """What was found so far: published, recorded and copied to $OUT with every result, so that an interruption costs none of it."""

    def __init__(self, device: Device, folder: Path) -> None:
        self.results: dict[Problem, SweepResult[Problem, Config]] = {}
        self.begun = time.monotonic()
        self._device, self._folder, self._facts = device, folder, facts(device, "vidrial.sweeps.power_retention")

    @property
    def notes(self) -> list[str]:
        """What the sweeps' notes say of the GPU."""
        return sorted({note for result in self.results.values() for note in result.notes if "tie for" not in note})

    def add(self, result: SweepResult[Problem, Config]) -> None:
        """Keep one more result, or a newer one of the same problem."""
        self.results[result.problem] = result
        p = result.problem
        print(
            f"  t={p.t} b={p.b} h={p.hq}/{p.h} d={p.d}: {result.winner.ms:.4f} ms, {len(result.ranked)} ranked, "
            f"{time.monotonic() - self.begun:.0f} s",
            flush=True,
        )
        paths = publish(op, [result.ranking], self._folder)
        record = self._facts | {
            "seconds": round(time.monotonic() - self.begun, 1), "problems": len(self.results),
            "trials": sum(len(r.trials) for r in self.results.values()), "notes": self.notes,
        }  # fmt: skip
        paths.append(write_json(self._folder / self._device.key / "power_retention_run.json", record))
        copy_out(paths, os.environ.get("OUT"))
        copy_journal(result.journal, self._device, os.environ.get("OUT"))


def sweep_groups(seconds: float, jobs: int, trials: int, kept: Kept) -> None:
    """Sweep both groups within so many seconds."""
    for name, cases in GROUPS.items():
        left = RESERVE * seconds - (time.monotonic() - kept.begun)
        problems = [example(d=int(name.partition("=")[2]), **case) for case in cases]
        options = Options(trials=trials, jobs=jobs, limit=20.0, progress=False)
        try:
            sweep_lengths(op, problems, options, within=SHARES[name] * left, done=kept.add)
        except VidrialError as error:
            print(f"{name} ended early: {error}", flush=True)
        print(f"{name}: {len(kept.results)} problems so far, {time.monotonic() - kept.begun:.0f} s", flush=True)


def winners(found: list[SweepResult[Problem, Config]]) -> str:
    """A line per problem: its winner, noise, how many configs tie with it, and how much slower the slowest one was."""
    rows: list[tuple[Any, ...]] = []
    for result in sorted(found, key=lambda r: (r.problem.d, r.problem.hq != r.problem.h, r.problem.t, r.problem.b)):
        p, winner, check = result.problem, result.winner, result.winner.check
        timing = result.ranked[0].timing
        tied = sum(r.tied and r.timing.ties(timing) for r in result.ranked) if result.tied else 1
        failed = ", ".join(f"{count} {status.name}" for status, count in result.failures.items()) or "-"
        rows.append((p.d, f"{p.b}x{p.hq}/{p.h}", p.t, f"{winner.ms:.4f}", f"{timing.iqr_ms / timing.median_ms:.1%}", tied,
                     f"{check.relative:.1e}" if check else "-", f"{result.worst_ms / winner.ms:.1f}", len(result.ranked), failed,
                     describe(winner.config)))  # fmt: skip
    text: str = table(("d", "BxHQ/H", "T", "ms", "IQR", "tied", "error", "worst/best", "ranked", "failed", "config"), rows)
    return text


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240.0, help="for everything, about")
    parser.add_argument("--jobs", type=int, default=JOBS, help="processes that compile")
    parser.add_argument("--trials", type=int, default=TRIALS, help="configs for each problem at most")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rankings")
    options = parser.parse_args()
    device = this_device()
    check_writable(options.results / device.key)
    kept = Kept(device, options.results)
    sweep_groups(options.seconds, options.jobs, options.trials, kept)
    if not kept.results:
        raise SystemExit("nothing was found; see above")
    found = list(kept.results.values())
    print(winners(found))
    print(*(f"note: {note}" for note in kept.notes), sep="\n")
    left_out, trials = sum(map(len, GROUPS.values())) - len(found), sum(len(r.trials) for r in found)
    print(f"{len(found)} problems, {left_out} left out for lack of time, {trials} trials in {time.monotonic() - kept.begun:.1f} s")
    print(options.results / device.key / f"{op.name}.json")


if __name__ == "__main__":
    main()
