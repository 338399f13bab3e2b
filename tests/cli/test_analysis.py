"""`vidrial analyse`: what it prints is what the host target counts, and it says at which size."""

from __future__ import annotations

import dataclasses
import io
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

import vidrial as vd
from vidrial.cli import main as cli
from vidrial.cli.analysis import show_analysis
from vidrial.host.plan import HostPlan, poison
from vidrial.layout.wgmma import WarpgroupMma
from vidrial.spec.op import Op
from vidrial.spec.registry import find_op

H200 = vd.Device.of("h200")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line: exit code, standard output, standard error."""

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(words))
        return int(ended.value.code or 0), *capsys.readouterr()

    return call


def rows_of(out: str, title: str) -> dict[str, list[str]]:
    """The rows of one table that `analyse` printed, by their first column."""
    lines = iter(out.splitlines())
    next(line for line in lines if line.startswith(title))
    table = itertools.takewhile(bool, lines)
    columns = [re.split(r"\s{2,}", line.rstrip()) for line in table]
    return {row[0]: row[1:] for row in columns}


def analysis(op: Op, problem: Any) -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    show_analysis(console, op, problem, H200, op.predicted(problem, H200))
    return console.export_text()


def test_it_prints_what_was_counted(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run("analyse", "power_retention", "--t", "257", "--h", "2", "--d", "64", "--arch", "sm_80")
    op = find_op("power_retention")
    problem = op.example(t=257, h=2)
    config = op.predicted(problem, vd.Device.of("a100"))
    y = poison((1, 257, 2, 64), problem.dtype)
    stats = HostPlan(op, problem, config, "accesses").run({**op.sample(problem, 0), "y": y})["power_attend"]
    rows = rows_of(out, "power_attend")
    assert code == 0 and rows["QK"] == ["mma.sync.m16n8k16.bfloat16", str(stats.of("QK").mma)]
    loads = stats.of("QK.B").ldmatrix
    assert rows["QK.B"] == ["ldmatrix.x4", "16", "4", str(loads), str(4 * loads)]
    (names, copied), *_ = ((k, n) for k, n in stats.objects.items() if "CopyQ" in k)
    tiles = copied.copy_calls // (32 * config.attend.warps)
    assert rows[", ".join(names)][2:6] == [
        str(config.attend.rows * 64 * 2 // 32),
        *map(str, (copied.cp_async_requests, tiles, copied.cp_async_sectors)),
    ]
    # What is asked for is small enough to be counted as it is.
    counted = rows_of(out, "counted at")["power_attend"]
    assert stats.read_bytes is not None and counted[1] == counted[2] and counted[3] == f"{stats.read_bytes / 1e6:.3g} MB"
    assert "CTAs per SM" in out


def test_it_says_what_was_counted_and_at_which_size(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run("analyse", "power_retention", "--t", "5001", "--h", "16", "--d", "64", "--arch", "h200")
    op = find_op("power_retention")
    problem = op.example(t=5001, h=16)
    assert code == 0 and "counted on the host target at t=2309 hq=2 h=2" in out and "launches at t=5001 hq=16 h=16, not counted" in out
    by_wgmma = 0
    for stage in op.stages(problem, op.predicted(problem, H200)):
        members = stage.kernel.resolve(stage.problem, stage.config).members
        for name, mma in ((n, m) for n, m in members.items() if isinstance(m, WarpgroupMma)):
            row = rows_of(out, stage.kernel.name)[name]
            (m, n, k), by_wgmma = mma.atom.shape, by_wgmma + 1
            # B, and A if it is there, 8 rows of 16 bytes at once.
            size = 2 * k * (n + (m if mma.a else 0))
            assert row[:3] == [mma.atom.name, str(size), str(size // 128)] and int(row[3]) > 0
        launch, cost = rows_of(out, "launches at")[stage.kernel.name], stage.kernel.cost(stage.problem, stage.config, H200)
        assert not cost.flops or f"{cost.flops:.2e}" in launch
    assert by_wgmma


def test_a_config_that_is_legal_at_the_small_size_stands_in() -> None:
    """Of chunks of 1024 tokens: 300 tokens are one, so shorter ones stand in, with the same scan and the same attention."""
    op = find_op("power_retention")
    asked, small = op.example(t=5001, h=16), op.example(t=300, h=1)
    assert op.reject(small, op.predicted(asked, H200), H200) is not None
    out = analysis(dataclasses.replace(op, small=lambda p: small), asked)
    assert re.search(r"counted on the host target at t=300 .*with chunk=\d+", out, re.DOTALL)
    assert int(rows_of(out, "power_attend")["PS"][-1]) > 0 and int(rows_of(out, "power_scan_wgmma")["State"][-1]) > 0


@pytest.mark.parametrize("missing", ["size", "compiler"])
def test_it_says_that_nothing_was_counted(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = find_op("power_retention")
    if missing == "compiler":
        monkeypatch.setenv("CXX", "/no/such/compiler")
        out, why = analysis(op, op.example(t=5001, h=16)), "no host compiler: CXX='/no/such/compiler' does not run"
    else:
        one_token = dataclasses.replace(op, small=lambda p: op.example(t=1, h=1))
        out, why = analysis(one_token, op.example(t=5001, h=16)), "no config that is legal at t=1 hq=1 h=1 runs these kernels"
    assert f"nothing was counted: {why}" in " ".join(out.split()) and "counted at" not in out
    # What is predicted is there all the same.
    assert rows_of(out, "power_attend")["RowsI"] == ["shared load", "16", "4"]
