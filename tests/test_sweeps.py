"""The programs in sweeps/, end to end, on a bench that computes its times; and the rankings that they write are found."""

from __future__ import annotations

import functools
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_power import H200, Bench
from vidrial.kernels.power_retention.op import example, op
from vidrial.sweeps import power_retention, validate

from vidrial import ranking
from vidrial.device import Device
from vidrial.ranking import forget, pick
from vidrial.sweep import sweep, sweep_lengths

FAKE: dict[str, Any] = {"bench": "fake_power:Bench", "device": H200}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where both programs write, and shipped rankings are looked for."""
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    for module in (power_retention, validate):
        monkeypatch.setattr(module, "this_device", lambda: H200)
    monkeypatch.setattr(power_retention, "sweep_lengths", functools.partial(sweep_lengths, **FAKE))
    monkeypatch.setattr(validate, "sweep", functools.partial(sweep, **FAKE))
    monkeypatch.setattr(validate, "CudaBench", Bench)
    monkeypatch.setattr(validate, "build_many", lambda *_: iter(()))
    monkeypatch.setattr(ranking, "shipped_folder", lambda: tmp_path / "results")
    return tmp_path / "results"


def command(monkeypatch: pytest.MonkeyPatch, module: Any, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(module.__file__), *words])
    module.main()


def test_they_write_what_calls_find_in_an_empty_cache(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = {"d=64": ({"t": 10007}, {"t": 1000}, {"t": 257}), "d=128": ({"t": 4099, "h": 2, "hq": 24},)}
    monkeypatch.setattr(power_retention, "GROUPS", groups)
    command(monkeypatch, power_retention, "--seconds", "20", "--trials", "12", "--results", str(results))
    said = capsys.readouterr().out
    assert "4 problems, 0 left out" in said and "24/2" in said
    folder = results / H200.key
    assert json.loads((folder / "power_retention_run.json").read_text())["command"].startswith("python -m vidrial.sweeps.power_retention")
    out = tmp_path / "out" / H200.key
    assert (out / "power_retention.json").read_bytes() == (folder / "power_retention.json").read_bytes()
    journals = list(out.glob("*.jsonl.gz"))
    assert len(journals) == 4 and all(b'"status": "ok"' in gzip.decompress(path.read_bytes()) for path in journals)

    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "empty"))
    forget()
    assert pick(op, example(t=10007), H200).origin == "shipped"
    assert pick(op, example(t=777), H200).origin == "model"
    assert pick(op, example(t=10007), Device.of("h100")).origin == "predicted"

    monkeypatch.setattr(validate, "LENGTHS", 6)
    command(monkeypatch, validate, "--lengths", "--cold", "--results", str(results))
    found = json.loads((folder / "validation.json").read_text())
    assert found["lengths"]["shipped_problems"] == {"shipped": 3}
    assert len(found["lengths"]["lengths"]) == 6 and 1.0 <= found["lengths"]["geometric_mean"] <= found["lengths"]["worst"] < 1.2
    assert found["cold"]["configs"] == 48
    assert found["cold"]["run"]["command"].startswith("python -m vidrial.sweeps.validate --lengths --cold")


def test_the_search_is_compared_with_all_of_the_reduced_space(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "SEARCH_CASES", ({"t": 10007}, {"t": 1000}))
    command(monkeypatch, validate, "--search", "--results", str(results))
    found = json.loads((results / H200.key / "validation.json").read_text())["search"]
    assert all(case["budgeted_configs"] <= 48 and case["budgeted_configs"] < case["exhaustive_configs"] for case in found["cases"])
    assert 100 < found["cases"][0]["exhaustive_configs"] <= 400 and 1.0 <= found["worst"] <= 1.03


def test_time_runs_out_for_the_last_problems(results: Path) -> None:
    problems = [example(t=t) for t in (10007, 1000, 257)]
    assert [r.problem.t for r in sweep_lengths(op, problems, within=0.6, trials=4, **FAKE)] == [10007]


def test_the_committed_ranking_is_of_these_templates() -> None:
    device = Device.of("h200")
    for t in (1000, 10007, 65536):
        config, origin = pick(op, example(t=t), device)
        assert origin == "shipped", "the templates have changed since: sweep again on an H200"
        assert op.reject(example(t=t), config, device) is None
