"""Twelve of the mistakes, at one problem, config and sanitizer each, through what `check` runs; the right examples pass the same runs.

All 46 by the default `check`: `make mutations`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from plant import Finding, finding, planted
from table import COUNTS, MUTATIONS

from vidrial.device import Device
from vidrial.host.check import Report, check
from vidrial.spec.chosen import config_with, parse_choices
from vidrial.spec.op import Op


@dataclass(frozen=True)
class Short:
    """What finds a mistake soonest: a problem, choices of the config, a sanitizer; and what is found, `place` a part of a line in the op's own
    file, or the first wrong element."""

    what: str
    by: str
    place: str
    config: str
    sanitizer: str | None = None
    problem: dict[str, Any] = field(default_factory=dict)


KEPT, TWICE = "row_threads=128,rows=2,vector=1,keep=4", "row_threads=128,rows=2,vector=1,keep=0"
TMA = "by=tma,tma.rows=128,tma.columns=64,tma.stages=3,tma.warps=8"
WGMMA = "by=threads,threads.rows=64,threads.columns=64,threads.depth=64,threads.stages=3,threads.mma=wgmma"
SHORT_SOFTMAX, ODD_GEMM, TMA_GEMM = {"m": 3, "n": 129}, {"m": 67, "n": 66, "k": 260}, {"m": 200, "n": 72, "k": 264}
FOUND = (
    Short("before the parts of other warps are read", "ThreadSanitizer", "parts[", TWICE, "thread", SHORT_SOFTMAX),
    Short("the first warpgroup's for all", "wrong values", "c[8, 0]", TMA, None, TMA_GEMM),
    Short("for the last product", "wgmma", "Mma::gemm(c.x", WGMMA, None, ODD_GEMM),
    Short("of all stages", "wgmma", "Mma::gemm(c.x", WGMMA, None, ODD_GEMM),
    Short("fewer bytes expected than come", "wgmma", "BoxB::load", TMA, None, TMA_GEMM),
    Short("of stores, row kept", "AddressSanitizer", "i <= vectors", KEPT, "address", SHORT_SOFTMAX),
    Short("of the rows of x", "AddressSanitizer", "part_of(", KEPT, "address", {"m": 130, "n": 129}),
    Short("of an array of a helper", "AddressSanitizer", "parts[warp] =", TWICE, "address", SHORT_SOFTMAX),
    Short("rows beyond the last return", "deadlock", "__syncthreads", TWICE, None, SHORT_SOFTMAX),
    Short("the first warpgroup's rows for all", "wrong values", "c[0, 0]", TMA, None, TMA_GEMM),
    Short(
        "blocks of the first round left out of the second",
        "wrong values",
        "y[0, 33280]",
        "block=512,offsets.threads=64",
        None,
        {"b": 1, "t": 33_501},
    ),
    Short("its first element for all", "wrong values", "y[0, 1]", "row_threads=32,rows=1,vector=2,keep=4", None, {"m": 1, "n": 130}),
)


def run(op: Op, short: Short) -> Report:
    problem = op.example(**short.problem)
    config = config_with(op, problem, Device.of("h200"), parse_choices(op, short.config))
    return check(op, [problem], None, (short.sanitizer,), config=config, only=True)


def test_the_table_has_every_class() -> None:
    assert Counter(mutation.kind for mutation in MUTATIONS) == COUNTS and len(MUTATIONS) == 46
    assert len({(mutation.op, mutation.file, mutation.old, mutation.new) for mutation in MUTATIONS}) == 46
    chosen = {mutation.kind for mutation in MUTATIONS if mutation.what in {short.what for short in FOUND}}
    assert chosen == set(COUNTS)


def test_every_mistake_can_be_planted(tmp_path: Path) -> None:
    for number, mutation in enumerate(MUTATIONS):
        assert mutation.what != "" and planted(tmp_path / str(number), mutation).name in ("softmax", "gemm", "scan")


@pytest.mark.parametrize("short", FOUND, ids=lambda short: short.what)
def test_a_mistake_is_found(short: Short, tmp_path: Path) -> None:
    (mutation,) = (m for m in MUTATIONS if m.what == short.what)
    op = planted(tmp_path, mutation)
    found = finding(run(op, short))
    assert found.by == short.by, found
    if not found.located:
        assert found.place == short.place
        return
    file, _, line = found.place.rpartition(":")
    assert short.place in (tmp_path / mutation.op / file).read_text().splitlines()[int(line) - 1], found


@pytest.mark.parametrize("example", ["softmax", "gemm", "scan"])
def test_what_is_right_passes_the_same(example: str, tmp_path: Path) -> None:
    op = planted(tmp_path, example)
    shorts = [s for s in FOUND if any(m.what == s.what and m.op == example for m in MUTATIONS)]
    assert shorts
    for short in {(s.config, s.sanitizer): s for s in shorts}.values():
        report = run(op, short)
        assert report.ok, report
        assert finding(report) == Finding("", "")
