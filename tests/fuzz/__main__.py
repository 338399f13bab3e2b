"""Fuzz every op's public call for some minutes; a case that fails is made small and printed as Python that shows it again.

python -m tests.fuzz --minutes 10 --seed 1       # both targets, in turn
python -m tests.fuzz --target host --family "flash: TMA, causal"
"""

from __future__ import annotations

import argparse
import itertools
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
    parser.add_argument("--seed", type=int, default=0, help="the first seed; a case has one of its own (default 0)")
    parser.add_argument("--target", choices=("cuda", "host", "both"), default="both", help="cuda: what NumPy serves; host: the kernels on the CPU")
    parser.add_argument("--family", choices=sorted(FAMILIES), help="of the host target: this one alone")
    parser.add_argument("--stop", type=int, default=5, help="failures after which to end (default 5)")
    asked = parser.parse_args()
    if asked.minutes <= 0 or asked.stop < 1:
        parser.error("--minutes and --stop must be positive")
    targets = ("host",) if asked.family else {"both": ("cuda", "host")}.get(asked.target, (asked.target,))
    until, counts, failures = time.monotonic() + 60 * asked.minutes, dict.fromkeys(targets, 0), 0
    for first, target in zip(itertools.count(asked.seed, BATCH), itertools.cycle(targets), strict=False):
        if time.monotonic() >= until or failures >= asked.stop:
            break
        for case, verdict in check_all(draw(seed, target, asked.family) for seed in range(first, first + BATCH)).items():
            failures += 1
            print(f"\nFAILED {case!r}\n  {verdict}\nmaking it smaller ...", flush=True)
            print(snippet(*shrink(case, verdict)), flush=True)
        counts[target] += BATCH
        left = max(0.0, until - time.monotonic())
        print(f"\r{', '.join(f'{n} {name}' for name, n in counts.items())} cases, {failures} failed, {left / 60:.1f} minutes left  ", end="", file=sys.stderr)
    print(f"\n{sum(counts.values())} cases, {failures} failed", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
