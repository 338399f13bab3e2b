"""Plant every mistake of the table, each in a copy of its example, run the default `check` on it, and print what was found.

PYTHONPATH=. python tests/mutations/run.py          # all of them: `make mutations`
PYTHONPATH=. python tests/mutations/run.py --kind stage --op gemm --out found.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from plant import Finding, finding, planted
from table import MUTATIONS, Mutation

from vidrial.host.check import check
from vidrial.host.cover import cases
from vidrial.progress import Lines


def found_by_check(mutation: Mutation, lines: bool, minutes: float | None) -> Finding:
    """What the default `check` finds; it ends with the first problem and config that is not right."""
    with tempfile.TemporaryDirectory(prefix="vidrial-mutation-") as folder:
        op = planted(Path(folder), mutation)
        progress = Lines() if lines else None
        return finding(check(op, cases(op), progress=progress, minutes=minutes, pairs=minutes is None, first_failure=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="", help="only classes with this in their name")
    parser.add_argument("--op", default="", help="only this example")
    parser.add_argument("--numbers", default="", help="only these rows, from 1 on, with commas")
    parser.add_argument("--minutes", type=float, help="that each check may take, on a machine that is busy with more")
    parser.add_argument("--lines", action="store_true", help="say every run")
    parser.add_argument("--out", type=Path, help="also write the table here, as Markdown")
    arguments = parser.parse_args()
    numbers = {int(n) for n in arguments.numbers.split(",") if n}
    rows = ["| | class | mistake | file | found | by | at | seconds |", "|---|---|---|---|---|---|---|---|"]
    print("\n".join(rows), flush=True)
    asked = found = lines = 0
    for number, mutation in enumerate(MUTATIONS, 1):
        if arguments.kind not in mutation.kind or arguments.op not in mutation.op or (numbers and number not in numbers):
            continue
        begin = time.monotonic()
        result = found_by_check(mutation, arguments.lines, arguments.minutes)
        asked, found, lines = asked + 1, found + bool(result.by), lines + result.located
        said = ("yes" if result.by else "NO", result.by, f"`{result.place}`" if result.place else "", f"{time.monotonic() - begin:.0f}")
        rows.append(f"| {number} | {mutation.kind} | {mutation.what} | {mutation.op}/{mutation.file} | {' | '.join(said)} |")
        print(rows[-1], flush=True)
    rows.append(
        f"\n{found} of {asked} found, {lines} of them with a line, the others with the output and index of the first wrong element."
    )
    print(rows[-1])
    if arguments.out is not None:
        arguments.out.write_text("\n".join(rows) + "\n")
    sys.exit(found < asked - 1)


if __name__ == "__main__":
    main()
