"""benchmarks/lengths.py without a GPU: a system that is stopped keeps what it said; tables, plots and counters."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import lengths as bench
from benchmarks.lengths import Call, Found, System

torch = pytest.importorskip("torch")
SAID = [Call(1024, 2.0, 0.5, 4, 0), Call(333, 0.01, 0.1, 0, 0), Call(5000, 0.03, 0.9, 1, 12)]


def command(*lines: str, then: str = "") -> list[str]:
    """A process that says these lines, then does something."""
    return [sys.executable, "-c", "\n".join([f"print({line!r}, flush=True)" for line in lines] + [then])]


def said(calls: list[Call]) -> list[str]:
    return [json.dumps(asdict(call)) for call in calls]


def test_the_lengths_are_different_the_same_for_all_and_mostly_odd_shapes() -> None:
    found = bench.lengths(100)
    assert found == bench.lengths(100) and len(set(found)) == 100
    assert bench.SHORTEST <= min(found) < 200 and 10000 < max(found) <= bench.LONGEST
    assert sum(t % 64 != 0 for t in found) > 90


def test_a_system_that_is_stopped_keeps_what_it_finished() -> None:
    found = bench.measured("x", [333, 5000], 3.0, command(*said(SAID[:2]), '{"t": 5', then="import time; time.sleep(60)"))
    assert (found.warm, found.calls, found.note) == (SAID[0], SAID[1:2], "stopped after 3 s")


def test_a_system_that_fails_says_why() -> None:
    found = bench.measured("x", [333], 20.0, command(*said(SAID[:1]), then="import a_missing_peer"))
    assert found.calls == [] and "a_missing_peer" in found.note


def test_a_system_has_empty_caches_of_its_own() -> None:
    code = "import os; print([os.listdir(os.environ[v]) for v in ('VIDRIAL_CACHE_DIR', 'TRITON_CACHE_DIR')] != [[], []] and 1 / 0)"
    assert bench.measured("x", [], 20.0, [sys.executable, "-c", code]).note == ""


def test_every_call_is_timed_and_what_it_built_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = 0, list[int]()

    def call(x: dict[str, Any]) -> Any:
        def one() -> None:
            nonlocal made
            made += not calls or calls[-1] != x["q"].shape[1]
            calls.append(x["q"].shape[1])

        return one

    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda other: 0.25)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench, "inputs", lambda case: {"q": torch.empty(1, case.t, 1, case.d)})
    found: list[Call] = []
    bench.run(System(64, call, compiled=lambda: lambda: made), [5, 9], found.append)
    assert [(c.t, c.median_ms, c.compiled, c.tried) for c in found] == [(5, 0.25, 1, None), (9, 0.25, 1, None)]
    assert calls == [5] * (1 + bench.CALLS) + [9] * (1 + bench.CALLS)


def test_configs_that_triton_times_are_counted() -> None:
    tuner = pytest.importorskip("triton.runtime.autotuner").Autotuner
    before = tuner._bench
    try:
        tuner._bench = lambda self, *args, config: config
        count = bench._timed_by_triton()
        assert tuner._bench(None, config=3) == 3 and count() == 1
    finally:
        tuner._bench = before


def test_a_table_a_plot_and_the_way_through_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [Found("ours, flash", SAID[0], SAID[1:]), Found("retention", None, [], "stopped after 60 s"),
             Found("SDPA cuDNN", SAID[0], [Call(333, 0.5, 0.1, None, None)])]  # fmt: skip
    assert [Found.from_json(json.loads(json.dumps(asdict(one)))) for one in found] == found
    assert (found[0].worst, found[0].total, found[1].worst) == (0.03, 0.04, None)
    path = tmp_path / "lengths_h200.json"
    path.write_text(json.dumps({"gpu": "NVIDIA H200", "count": 2, "systems": [asdict(one) for one in found]}))
    monkeypatch.setattr(sys, "argv", ["lengths.py", "--show", str(path)])
    bench.main()
    lines = {line.split("  ")[0].strip(): line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["ours, flash"][2:] == ["2/2", "2.00", "1", "12", "0.0200", "0.030", "0.04", "0.500"]
    assert lines["retention"][1:] == ["0/2", *"-" * 7, "stopped", "after", "60", "s"]
    assert lines["SDPA cuDNN"][2:6] == ["1/2", "2.00", "-", "-"]
    pytest.importorskip("matplotlib")
    assert path.with_suffix(".png").stat().st_size > 5000


def test_an_unknown_system_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lengths.py", "--systems", "ours, flash; nobody"])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert stopped.value.code == 2 and "no system 'nobody'" in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "{", '{"a": 1}', "[]"])
@pytest.mark.parametrize("script", ["lengths", "flash_attention"])
def test_what_is_no_results_file_is_said(script: str, text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "other.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--show", str(path)])
    with pytest.raises(SystemExit, match="other.json (cannot be read as a|is no) results file"):
        importlib.import_module(f"benchmarks.{script}").main()
