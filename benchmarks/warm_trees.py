"""Host time of a warm call of power_retention in several trees, without a GPU: all that a call does but the launches and its scratch memory.

python benchmarks/warm_trees.py before=/tmp/old now=.     # folders with a checkout each; two minutes

One process per tree; they are timed in turn, in another order each round, so that what disturbs one disturbs the others. torch's CPU tensors
are said to lie on GPU 0, and a plan launches nothing. Processor time of the calling thread: what else runs costs it little.
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
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CALLS, ROUNDS = 2000, 200
MODES = ("no_grad", "grad mode")
HERE = Path(__file__).resolve().parents[1]


def serve() -> None:
    """A child: the tree is the first on its path. Every line of input asks for one round in a mode; answers are microseconds a call."""
    import torch

    from vidrial import call
    from vidrial.kernels.power_retention import power_retention
    from vidrial.runtime import arrays

    class Plan:
        """Of one problem, with nothing to launch."""

        def __init__(self, op: Any, problem: Any, index: int, fixed: Any) -> None:
            self.index = index
            self.outputs, self.workspace, self.smaller = op.outputs(problem), SimpleNamespace(bytes=0), None
            self._nothing = contextlib.nullcontext()

        def on_device(self) -> Any:
            return self._nothing

        def enqueue(self, pointers: Any, workspace: int, stream: int) -> None:
            """Nothing."""

    arrays._index_of = lambda device: 0
    torch._C._cuda_getCurrentRawStream = lambda index: 7
    call.cuda_plan = lambda *asked: Plan(*asked)
    q, k, v = (torch.zeros(1, 2000, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    log_g = torch.zeros(1, 2000, 2)
    modes = {"no_grad": torch.no_grad, "grad mode": torch.enable_grad}
    for line in sys.stdin:
        with modes[line.strip()]():
            power_retention(q, k, v, log_g)
            begin = time.thread_time_ns()
            for _ in range(CALLS):
                power_retention(q, k, v, log_g)
            taken = time.thread_time_ns() - begin
        print(taken / CALLS / 1e3, flush=True)


def measure(trees: dict[str, Path], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Mode -> tree -> microseconds of each round."""
    children = {}
    for name, tree in trees.items():
        environment = os.environ | {"PYTHONPATH": str(tree.resolve())}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        children[name] = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", cwd="/"
        )
    found: dict[str, dict[str, list[float]]] = {mode: {name: [] for name in trees} for mode in MODES}
    try:
        for _ in range(rounds):
            for mode in MODES:
                for name in random.sample(list(children), len(children)):
                    child = children[name]
                    if child.stdin is None or child.stdout is None:
                        raise SystemExit(f"{name}: no pipe")
                    child.stdin.write(f"{mode}\n")
                    child.stdin.flush()
                    found[mode][name].append(float(child.stdout.readline()))
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    return found


def summary(found: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Per mode and tree the median and the quartiles; and, of the last tree less each other one, those of the rounds' differences."""

    def spread(values: Sequence[float]) -> dict[str, float]:
        low, median, high = statistics.quantiles(values, n=4)
        return {"median_us": round(median, 3), "quartiles_us": [round(low, 3), round(high, 3)]}  # type: ignore[dict-item]

    result: dict[str, Any] = {}
    for mode, trees in found.items():
        *others, last = trees
        result[mode] = {name: spread(values) for name, values in trees.items()}
        for other in others:
            result[mode][f"{last} less {other}"] = spread([a - b for a, b in zip(trees[last], trees[other], strict=True)])
    return result


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", metavar="NAME=FOLDER", help="what is compared; the last one with each of the others")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, help="a file for the figures")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve()
        return
    trees = {name: Path(folder) for name, _, folder in (text.partition("=") for text in asked.trees)}
    if len(trees) < 2 or asked.rounds < 2 or not all((folder / "vidrial").is_dir() for folder in trees.values()):
        parser.error("give at least two NAME=FOLDER, each a checkout, and two rounds")
    found = summary(measure(trees, asked.rounds))
    for mode, rows in found.items():
        for name, row in rows.items():
            print(f"{mode:>9}  {name:30} {row['median_us']:7.3f} us  ({row['quartiles_us'][0]:.3f} to {row['quartiles_us'][1]:.3f})")
    if asked.out is not None:
        sys.path.insert(0, str(HERE))
        from benchmarks.common import command_line, date, package_versions

        facts = {"schema": 1, "command": command_line(), "date": date(), "python": sys.version.split()[0], "packages": package_versions()}
        asked.out.write_text(
            json.dumps({**facts, "calls": CALLS, "rounds": asked.rounds, "found": found}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
