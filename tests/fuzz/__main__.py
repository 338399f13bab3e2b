"""Fuzz every op's public call for some minutes; a case that fails is made small and printed as Python that shows it again.

python -m tests.fuzz --minutes 10 --seed 1       # both targets, in turn
python -m tests.fuzz --cases 40 --target host --family "flash: TMA, causal" --family softmax

OPENBLAS_NUM_THREADS=1 in the environment saves half of the processor's time: NumPy's threads wait for each other more than they multiply here.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time

from .campaign import check_all, shrink, snippet
from .cases import draw
from .families import FAMILIES

BATCH = 20


def main() -> int:
    """The command; 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long, about (default 1)")
    parser.add_argument("--cases", type=int, help="how many cases, however long they take, in place of --minutes")
    parser.add_argument("--seed", type=int, default=0, help="the first seed; a case has one of its own (default 0)")
    parser.add_argument(
        "--target", choices=("cuda", "host", "both"), default="both", help="cuda: what NumPy serves; host: the kernels on the CPU"
    )
    parser.add_argument("--family", choices=sorted(FAMILIES), action="append", help="of the host target: these alone, in turn")
    parser.add_argument("--stop", type=int, default=5, help="failures after which to end (default 5)")
    asked = parser.parse_args()
    if not 0 < asked.minutes < math.inf or asked.stop < 1 or asked.seed < 0 or (asked.cases is not None and asked.cases < 1):
        parser.error("--minutes, --cases and --stop must be positive, --seed not negative")
    targets = ("host",) if asked.family else {"both": ("cuda", "host")}.get(asked.target, (asked.target,))
    families = asked.family or [None]
    until, counts, failures = time.monotonic() + 60 * asked.minutes, dict.fromkeys(targets, 0), 0
    for first, target in zip(itertools.count(asked.seed, BATCH), itertools.cycle(targets), strict=False):
        left = BATCH if asked.cases is None else asked.cases - sum(counts.values())
        if failures >= asked.stop or left <= 0 or (asked.cases is None and time.monotonic() >= until):
            break
        seeds = range(first, first + min(left, BATCH))
        for case, verdict in check_all(draw(seed, target, families[seed % len(families)]) for seed in seeds).items():
            failures += 1
            print(f"\nFAILED {case!r}\n  {verdict}\nmaking it smaller ...", flush=True)
            print(snippet(*shrink(case, verdict)), flush=True)
        counts[target] += len(seeds)
        rest = f"{max(0.0, until - time.monotonic()) / 60:.1f} minutes left" if asked.cases is None else f"of {asked.cases}"
        print(f"\r{', '.join(f'{n} {name}' for name, n in counts.items())} cases, {failures} failed, {rest}  ", end="", file=sys.stderr)
    print(f"\n{sum(counts.values())} cases, {failures} failed", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
