"""Power retention of this source tree against that of another one, on one GPU, interleaved. Needs a GPU and torch.

    python benchmarks/against.py ../old                         # every case: new, old, and old again as the control
    python benchmarks/against.py ../old --cases P2,d64-1000 --rounds 30 --out against.json
    python benchmarks/against.py ../old --same-config           # this tree takes the other's config: kernels alone are compared

Each side is a process of its own with its own cache (turns.py); beside them cuBLAS 8192^3. In every round each takes its turn, in
another order, and times some calls behind a flushed L2 with the host ahead. A ratio is the median over the rounds of one turn over the
other of the same round, so that a card that grows warm or slow meets both. What `control` differs by from 1 is what the protocol cannot
tell.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.common import Case, command_line, date, geometric_mean, gpu_facts, select, table

ROOT = Path(__file__).parent.parent
NEW, OLD, CONTROL, CUBLAS = "new", "old", "control", "cuBLAS"
SIDES = (NEW, OLD, CONTROL, CUBLAS)
TURN_MS, LEAST_CALLS, MOST_CALLS = 25.0, 3, 40
LENGTHS = (1000, 5001, 10007, 33333, 65536)
CASES = (
    *(Case(f"d{d}-{t}", 1, 16, t, d=d) for d in (64, 128) for t in LENGTHS),
    Case("P2", 1, 8, 65536),
    Case("P6", 8, 16, 4096),
    Case("P8", 1, 2, 16384, d=128, hq=24),
)


def path_of(tree: Path, inherited: str) -> str:
    """PYTHONPATH of a side: its tree, then packages that are not this tree."""
    return os.pathsep.join([str(tree), *(folder for folder in inherited.split(os.pathsep) if folder and Path(folder).resolve() != ROOT)])


class Side:
    """A process that takes turns."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env={**os.environ, **environment}
        )

    def ask(self, **message: Any) -> None:
        """Send one message."""
        _pipe(self._process.stdin).write(json.dumps(message) + "\n")
        _pipe(self._process.stdin).flush()

    def answer(self) -> dict[str, Any]:
        """What comes back.

        Raises:
            SystemExit: the process ended; its errors have been printed.
        """
        line = _pipe(self._process.stdout).readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def turn(self, calls: int) -> list[float]:
        """Milliseconds of so many calls."""
        self.ask(calls=calls)
        times: list[float] = self.answer()["ms"]
        return times

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            _pipe(self._process.stdin).close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise SystemExit("a side without a pipe")
    return pipe


def start(old: Path, caches: Path) -> dict[str, Side]:
    """The four processes."""
    trees = {NEW: ROOT, OLD: old, CONTROL: old, CUBLAS: ROOT}
    script = str(Path(__file__).with_name("turns.py"))
    return {
        name: Side(
            name,
            [sys.executable, "-P", script, "cublas" if name == CUBLAS else "op"],
            {"PYTHONPATH": path_of(tree, os.environ.get("PYTHONPATH", "")), "VIDRIAL_CACHE_DIR": str(caches / name)},
        )
        for name, tree in trees.items()
    }


@dataclass
class Clock:
    """The SM clock and the power of GPU 0 as nvidia-smi says them all along; nothing where it does not run."""

    seen: list[tuple[float, float]] = field(default_factory=list)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Watch during the block."""
        query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "--id=0", "-lms", "100"]
        try:
            process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8")
        except OSError:
            yield
            return
        reader = threading.Thread(target=self._read, args=(_pipe(process.stdout),), daemon=True)
        reader.start()
        try:
            yield
        finally:
            process.terminate()
            process.wait()
            reader.join(5)

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            with contextlib.suppress(ValueError):
                mhz, watts = (float(x) for x in line.split(","))
                self.seen.append((mhz, watts))

    def since(self, start: int) -> tuple[float, float] | None:
        """Median MHz and W of what was seen from number `start` on."""
        part = self.seen[start:]
        return (statistics.median(x for x, _ in part), statistics.median(x for _, x in part)) if part else None


@dataclass(frozen=True)
class Result:
    """A case: every turn's median of each side, in order of the rounds."""

    case: Case
    turns: dict[str, list[float]]
    configs: dict[str, str]
    first_call_s: dict[str, float]
    difference: float
    clock: tuple[float, float] | None = None

    def ratio(self, side: str) -> tuple[float, float]:
        """Median and IQR over the rounds of a side over the old tree."""
        found = [a / b for a, b in zip(self.turns[side], self.turns[OLD], strict=True)]
        return statistics.median(found), spread(found)

    def to_json(self) -> dict[str, Any]:
        """As a document."""
        ratios = {side: dict(zip(("median", "iqr"), self.ratio(side), strict=True)) for side in (NEW, CONTROL)}
        return {**asdict(self), "case": self.case.name, "ratios": ratios}


def spread(values: Sequence[float]) -> float:
    """The distance of the quartiles."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (0.0, 0.0, 0.0)
    return high - low


def difference(a: Sequence[float], b: Sequence[float]) -> float:
    """Norm of the difference of two results over that of the second one."""
    if len(a) != len(b):
        raise SystemExit(f"the two trees give results of different sizes: {len(a)} and {len(b)} samples")
    return float((sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / max(sum(y * y for y in b), 1e-30)) ** 0.5)


def run(case: Case, sides: Mapping[str, Side], rounds: int, same: bool, order: Callable[[list[str]], None]) -> Result:
    """Prepare a case everywhere, then take turns."""
    asked = {name: getattr(case, name) for name in ("b", "t", "h", "d", "gates")} | {"hq": case.query_heads}
    sides[OLD].ask(prepare=asked, config=None)
    ready = {OLD: sides[OLD].answer()}
    config = ready[OLD]["config"] or None if same else None
    if same and config is None:
        raise SystemExit("the other tree does not say which config it takes: --same-config needs a later one")
    others = [name for name in sides if name != OLD]
    for name in others:
        sides[name].ask(prepare=asked, config=config if name == NEW else None)
    ready |= {name: sides[name].answer() for name in others}
    # One turn of each, to know how many calls make one.
    calls = {name: max(LEAST_CALLS, min(MOST_CALLS, int(TURN_MS / statistics.median(side.turn(3))))) for name, side in sides.items()}
    turns: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        names = list(sides)
        order(names)
        for name in names:
            turns[name].append(statistics.median(sides[name].turn(calls[name])))
    return Result(
        case,
        turns,
        {name: ready[name].get("config", "") for name in (NEW, OLD)},
        {name: ready[name]["first_call_s"] for name in (NEW, OLD)},
        difference(ready[NEW]["y"], ready[OLD]["y"]),
    )


def show(results: Sequence[Result]) -> str:
    """The table, and the geometric means."""
    lines = []
    for r in results:
        times = [f"{statistics.median(r.turns[name]):.4f} ({spread(r.turns[name]):.4f})" for name in SIDES]
        ratios = [f"{middle:.4f} ({iqr:.4f})" for middle, iqr in (r.ratio(NEW), r.ratio(CONTROL))]
        clock = f"{r.clock[0]:.0f} / {r.clock[1]:.0f}" if r.clock else "-"
        lines.append((r.case.name, *times, *ratios, clock, f"{r.difference:.1e}"))
    head = ("case: median ms (IQR)", *SIDES, "new / old", "control / old", "MHz / W", "|new - old| / |old|")
    text = table(head, lines)
    if len(results) > 1:
        means = (geometric_mean([r.ratio(side)[0] for r in results]) for side in (NEW, CONTROL))
        text += "\ngeometric means: new / old {:.4f}, control / old {:.4f}".format(*means)
    configs = [f"{r.case.name}\n    new {r.configs[NEW] or '-'}\n    old {r.configs[OLD] or '-'}" for r in results]
    return "\n".join([text, "", *configs])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="the other source tree")
    parser.add_argument("--cases", default="", help="comma-separated: " + ", ".join(case.group for case in CASES))
    parser.add_argument("--rounds", type=int, default=15, help="turns of each side per case")
    parser.add_argument("--same-config", action="store_true", help="this tree takes the config that the other one takes")
    parser.add_argument("--out", type=Path, help="a JSON file with every turn")
    return parser.parse_args(arguments)


def main() -> None:
    """The command."""
    options = parse()
    cases, old = select(options.cases, CASES), options.old.resolve()
    if not (old / "vidrial").is_dir():
        raise SystemExit(f"{options.old} has no folder `vidrial`: name a source tree")
    facts = {"command": command_line(), "date": date(), "gpu": gpu_facts()}
    clock, results, rng = Clock(), list[Result](), random.Random(0)
    with tempfile.TemporaryDirectory(prefix="against-") as caches, clock.watched():
        sides = start(old, Path(caches))
        try:
            for number, case in enumerate(cases, 1):
                seen = len(clock.seen)
                found = run(case, sides, options.rounds, options.same_config, rng.shuffle)
                results.append(Result(**{**vars(found), "clock": clock.since(seen)}))
                (new, _), (control, _) = found.ratio(NEW), found.ratio(CONTROL)
                print(f"[{number}/{len(cases)}] {case.name}: new / old {new:.4f}, control / old {control:.4f}", flush=True)
                if options.out:
                    options.out.write_text(
                        json.dumps({**facts, "results": [r.to_json() for r in results]}, indent=1) + "\n", encoding="utf-8"
                    )
        finally:
            for side in sides.values():
                side.close()
    print(show(results))


if __name__ == "__main__":
    main()
