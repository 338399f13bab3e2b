"""A pytest plugin that says what each test takes, and the list of slow ones that it makes.

    python -m pytest -p durations --durations-to /tmp/took.json tests/host     # measure; several runs add up in one file
    python tests/durations.py /tmp/took.json                                   # rewrite tests/slow.txt from it

It counts processor seconds of the process and of the children that it waited for, so that a busy machine measures the same. What a
fixture takes counts for the test that asked for it first.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SLOW = Path(__file__).with_name("slow.txt")
ROOT = SLOW.parents[1]
# Of one test function, all its cases together: `make quick` leaves out what takes longer.
SLOW_SECONDS = 0.7
HEAD = f"# Test functions that take {SLOW_SECONDS} processor seconds or more, with their seconds: python tests/durations.py. `make quick` leaves them out.\n"


def processor_seconds() -> float:
    """Of this process and the children that it waited for."""
    return sum(os.times()[:4])


def function_of(nodeid: str) -> str:
    """`tests/a.py::test_b[c]` -> `tests/a.py::test_b`."""
    return nodeid.partition("[")[0]


def read_slow() -> dict[str, float]:
    """Test function -> its seconds, of the committed list."""
    lines = (line.split() for line in SLOW.read_text().splitlines() if line and not line.startswith("#"))
    return {name: float(seconds) for name, seconds in lines}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--durations-to", metavar="FILE", help="add what each test takes to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--durations-to"):
        config.pluginmanager.register(Recorder(Path(config.getoption("--durations-to"))), "vidrial-durations")


class Recorder:
    """Adds the seconds of each test to a file when the run ends."""

    def __init__(self, path: Path) -> None:
        self.path, self.seconds = path, dict[str, float]()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        begin = processor_seconds()
        result = yield
        self.seconds[item.nodeid] = processor_seconds() - begin
        return result

    def pytest_sessionfinish(self) -> None:
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.path.write_text(json.dumps(known | self.seconds, indent=1))


def slow_functions(took: dict[str, float]) -> dict[str, float]:
    """Test function -> seconds of all its cases, of those that are slow."""
    sums: dict[str, float] = {}
    for nodeid, seconds in took.items():
        sums[function_of(nodeid)] = sums.get(function_of(nodeid), 0.0) + seconds
    return {name: seconds for name, seconds in sums.items() if seconds >= SLOW_SECONDS}


def main(path: str) -> None:
    took = json.loads(Path(path).read_text())
    measured = {function_of(nodeid) for nodeid in took}
    kept = {name: s for name, s in read_slow().items() if name not in measured} if SLOW.exists() else {}
    slow = kept | slow_functions(took)
    SLOW.write_text(HEAD + "".join(f"{name} {seconds:.1f}\n" for name, seconds in sorted(slow.items())))
    fast = sum(took.values()) - sum(s for name, s in slow.items() if name in measured)
    print(f"{len(slow)} slow test functions; the others of {len(took)} cases take {fast:.0f} processor seconds")


if __name__ == "__main__":
    main(sys.argv[1])
