"""The programs in sweeps/, end to end, on a bench that computes its times; and the rankings that they write are found."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_power import H200

from vidrial.build.nvrtc import Cubin, Resources
from vidrial.device import Device
from vidrial.errors import ArgumentError
from vidrial.kernels.flash_attention.op import op as flash_op
from vidrial.kernels.power_retention.op import example, op
from vidrial.spec.fields import fields
from vidrial.sweeps import common, flash_attention, power_retention, validate
from vidrial.tune import ranking
from vidrial.tune.pick import choose_config
from vidrial.tune.ranking import forget
from vidrial.tune.sweeper import sweep, sweep_lengths

CUBIN = Cubin(b"", "sm_90a", Resources(0, 0, 0, 0, 0), "", 0.0)
FAKE: dict[str, Any] = {"bench": "fake_power:Bench", "device": H200}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the programs write, and shipped rankings are looked for."""
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    for module in (common, validate):
        monkeypatch.setattr(module, "this_device", lambda: H200)
    monkeypatch.setattr(common, "sweep_lengths", functools.partial(sweep_lengths, **FAKE))
    monkeypatch.setattr(validate, "sweep", functools.partial(sweep, **FAKE))
    monkeypatch.setattr(validate, "BENCH", "fake_power:Bench")
    monkeypatch.setattr(validate, "build_many", lambda sources, *_: ((key, CUBIN) for key in sources))
    monkeypatch.setattr(ranking, "shipped_folder", lambda: tmp_path / "results")
    return tmp_path / "results"


def command(monkeypatch: pytest.MonkeyPatch, module: Any, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(module.__file__), *words])
    if module is validate:
        module.main()
    else:
        module.program().main(module.__doc__, module.SECONDS)


def test_they_write_what_calls_find_in_an_empty_cache(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = {"d=64": ({"t": 10007}, {"t": 1000}, {"t": 257}), "d=128": ({"t": 4099, "h": 2, "hq": 24},)}
    monkeypatch.setattr(power_retention, "GROUPS", groups)
    command(monkeypatch, power_retention, "--seconds", "20", "--trials", "12", "--results", str(results))
    said = capsys.readouterr().out
    assert "4 problems, 0 left out" in said and "24/2" in said
    assert "  t=1000 b=1 h=16/16 d=64: " in said, "each result is told as it comes"
    folder = results / H200.key
    assert json.loads((folder / "power_retention_run.json").read_text())["command"].startswith("python -m vidrial.sweeps.power_retention")
    out = tmp_path / "out" / H200.key
    assert (out / "power_retention.json").read_bytes() == (folder / "power_retention.json").read_bytes()
    journals = list(out.glob("*.jsonl.gz"))
    assert len(journals) == 4 and all(b'"status": "ok"' in gzip.decompress(path.read_bytes()) for path in journals)

    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "empty"))
    forget()
    assert choose_config(op, example(t=10007), H200).origin == "shipped"
    assert choose_config(op, example(t=777), H200).origin == "model"
    assert choose_config(op, example(t=10007), Device.of("h100")).origin == "predicted"

    monkeypatch.setattr(validate, "LENGTHS", 6)
    command(monkeypatch, validate, "--lengths", "--cold", "--results", str(results))
    found = json.loads((folder / "validation.json").read_text())
    assert found["lengths"]["shipped_problems"] == {"shipped": 3}
    assert len(found["lengths"]["lengths"]) == 6 and 1.0 <= found["lengths"]["geometric_mean"] <= found["lengths"]["worst"] < 1.2
    assert found["cold"]["configs"] == 48 and found["cold"]["complete"] and found["lengths"]["complete"]
    assert found["cold"]["run"]["command"].startswith("python -m vidrial.sweeps.validate --lengths --cold")
    assert (out / "validation.json").read_bytes() == (folder / "validation.json").read_bytes()
    last = capsys.readouterr().out.splitlines()[-4:]
    assert last[0].split()[0] == "question" and last[1].lstrip().startswith("cold sweep of 48 configs")
    assert " yes " in last[2] and "6 lengths, worst 1." in last[2]


def test_flash_attention_is_swept_the_first_groups_first(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at = flash_attention.at
    groups = {
        "d=128 causal": (at((1021, 257), d=128, causal=True), 2.0),
        "4 queries": (at((515,), b=1, h=2, hq=8, d=128, causal=True), 1.0),
        "d=192 e=128": (at((257,), d=192, e=128), 1.0),
    }
    monkeypatch.setattr(flash_attention, "GROUPS", groups)
    command(monkeypatch, flash_attention, "--seconds", "20", "--trials", "8", "--results", str(results))
    said = capsys.readouterr().out
    assert "4 problems, 0 left out" in said
    lines = [
        "  t=1021 b=2 h=16/16 d=128 mask=causal: ",
        "  t=515 b=1 h=8/2 d=128 mask=causal: ",
        "  t=257 b=2 h=16/16 d=192/128 mask=full: ",
    ]
    assert (places := [said.index(line) for line in lines]) == sorted(places)
    folder, out = results / H200.key, tmp_path / "out" / H200.key
    assert (out / "flash_attention.json").read_bytes() == (folder / "flash_attention.json").read_bytes()
    assert json.loads((folder / "flash_attention_run.json").read_text())["command"].startswith(
        "python -m vidrial.sweeps.flash_attention --s"
    )
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "empty"))
    forget()
    config, origin = choose_config(flash_op, groups["4 queries"][0][0], H200)
    assert origin == "shipped" and config.path == "sm90"
    # Of forty random shapes those of families that were swept are answered for; the others' candidates are what is picked.
    monkeypatch.setattr(validate, "LENGTHS", 8)
    command(monkeypatch, validate, "--shapes", "--results", str(results))
    found = json.loads((folder / "validation.json").read_text())["shapes"]
    assert found["complete"] and len(found["lengths"]) == 8 and found["shipped_problems"] == {"shipped": 2}
    assert {(row["d"], row["mask"]) for row in found["lengths"]} == {(d, mask) for d in (64, 128) for mask in ("causal", "full")}
    assert [row["candidates"] for row in found["lengths"] if row["d"] == 64] == [1] * 4
    assert any(row["candidates"] > 1 for row in found["lengths"] if (row["d"], row["mask"]) == (128, "causal"))
    assert "8 shapes, worst " in capsys.readouterr().out
    # A window of -1 keys is none; of -2 there is none, here as in a ranking.
    first = groups["4 queries"][0][0]
    with pytest.raises(ArgumentError, match="left=-2: a sweep needs at least -1"):
        sweep(flash_op, dataclasses.replace(first, left=-2), **FAKE)
    path = results / H200.key / "flash_attention.json"
    path.write_text(path.read_text().replace('"left": -1', '"left": -2'))
    forget()
    assert choose_config(flash_op, first, H200).origin == "predicted"


def test_what_is_swept_of_flash_attention_has_groups_of_one_family_each() -> None:
    program = flash_attention.program()
    static = [{tuple(fields(p, "static").items()) for p in problems} for problems in program.groups.values()]
    assert all(len(facts) == 1 for facts in static) and len(set.union(*static)) == 9 and len(static) == 11
    assert [p.tk for p in program.groups["d=64 causal"]] == [8192, 4096, 2048, 1021, 16384, 257]
    assert program.groups.keys() == program.weights.keys()
    first = program.groups["d=128 causal"][0]
    assert (first.tk, first.b, first.hq, first.causal) == (8192, 2, 16, True) and list(program.groups)[0] == "d=128 causal"
    assert {(p.d, p.e, p.group) for problems in program.groups.values() for p in problems} == {
        (64, 64, 1), (96, 96, 1), (128, 128, 1), (128, 128, 4), (128, 128, 8), (192, 128, 1), (256, 256, 1)}  # fmt: skip


def test_time_is_divided_by_weight(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    monkeypatch.setattr(common, "sweep_lengths", lambda *_, within, **__: given.append(within))
    with pytest.raises(SystemExit, match="nothing was found"):
        command(monkeypatch, flash_attention, "--seconds", "100", "--results", str(results))
    # What no group takes is the later ones'.
    left, weights = 92.0, list(flash_attention.program().weights.values())
    assert given == pytest.approx([left * w / sum(weights[i:]) for i, w in enumerate(weights)], rel=0.02)


@pytest.mark.parametrize("module", ["flash_attention", "power_retention"])
def test_help(module: str) -> None:
    ended = subprocess.run([sys.executable, "-m", f"vidrial.sweeps.{module}", "--help"], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0 and "--seconds" in ended.stdout and f"results/<device key>/{module}.json" in ended.stdout, ended.stderr


def test_the_search_is_compared_with_all_of_the_reduced_space(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "SEARCH_CASES", ({"t": 10007}, {"t": 1000}))
    command(monkeypatch, validate, "--search", "--results", str(results))
    found = json.loads((results / H200.key / "validation.json").read_text())["search"]
    assert all(case["budgeted_configs"] <= 48 and case["budgeted_configs"] < case["exhaustive_configs"] for case in found["cases"])
    assert all(case["exhaustive_complete"] and case["exhaustive_configs"] < case["combinations"] for case in found["cases"])
    assert 100 < found["cases"][0]["exhaustive_configs"] <= 400 and 1.0 <= found["worst"] <= 1.03


def test_what_was_measured_is_published_whatever_comes_after(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power_retention, "GROUPS", {"d=64": ({"t": 1000}, {"t": 257})})
    publish, published = common.publish, list[Path]()

    def once(*arguments: Any) -> list[Path]:
        if published:
            raise KeyboardInterrupt
        published.extend(publish(*arguments))
        return published

    monkeypatch.setattr(common, "publish", once)
    with pytest.raises(KeyboardInterrupt):
        command(monkeypatch, power_retention, "--seconds", "20", "--trials", "6", "--results", str(results))
    out = tmp_path / "out" / H200.key
    for path in (results / H200.key / "power_retention.json", out / "power_retention.json"):
        assert [m["problem"]["t"] for r in json.loads(path.read_text())["rankings"] for m in r["measured"]] == [1000]
    assert json.loads((out / "power_retention_run.json").read_text())["problems"] == 1
    assert len(list(out.glob("*.jsonl.gz"))) == 1


def test_what_time_is_left_for_is_told_honestly_and_kept(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(validate, "REMATCH_SECONDS", 0.1)
    monkeypatch.setattr(validate, "SEARCH_CASES", ({"t": 10007}, {"t": 1000}))
    monkeypatch.setenv("FAKE_POWER_SECONDS", "0.1")
    begin = time.monotonic()
    command(monkeypatch, validate, "--search", "--lengths", "--seconds", "6", "--results", str(results))
    assert time.monotonic() - begin < 20
    found = json.loads((results / H200.key / "validation.json").read_text())
    first = found["search"]["cases"][0]
    assert not first["exhaustive_complete"] and first["exhaustive_left"] > 0 and not found["search"]["complete"]
    said = capsys.readouterr().out
    assert "more were left for lack of time" in said and "so far" in said
    # Nothing is shipped: that part says so, and does not cost the other one.
    assert "no ranking of these templates is shipped" in found["lengths"]["error"] and "ended early: no ranking" in said


def test_every_case_is_written_before_the_next_one(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def part(seconds: float, device: Device) -> Iterator[dict[str, Any]]:
        yield {"cases": [1]}
        assert json.loads((results / H200.key / "validation.json").read_text())["search"]["cases"] == [1]
        raise KeyboardInterrupt

    monkeypatch.setattr(validate, "PARTS", {"search": (part, 1.0)})
    with pytest.raises(KeyboardInterrupt):
        validate.run("search", 1.0, results, H200)
    assert json.loads((results / H200.key / "validation.json").read_text())["search"]["cases"] == [1]


def test_time_runs_out_for_the_last_problems(results: Path) -> None:
    problems = [example(t=t) for t in (10007, 1000, 257)]
    assert [r.problem.t for r in sweep_lengths(op, problems, within=0.6, trials=4, **FAKE)] == [10007]


def test_what_was_measured_is_found_by_calls_and_legal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The committed rankings as if they were of the present templates, whether or not they are."""
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "cache"))
    folder = ranking.shipped_folder()
    assert folder is not None
    committed = json.loads((folder / H200.key / "power_retention.json").read_text())
    for entry in committed["rankings"]:
        entry["digest"] = op.digest()
    (tmp_path / "shipped" / H200.key).mkdir(parents=True)
    (tmp_path / "shipped" / H200.key / "power_retention.json").write_text(json.dumps(committed))
    monkeypatch.setattr(ranking, "shipped_folder", lambda: tmp_path / "shipped")
    forget()
    assert len(ranking.shipped(op, H200.key)) == len(committed["rankings"]) > 20
    for t in (1000, 10007, 65536):
        config, origin = choose_config(op, example(t=t), H200)
        assert origin == "shipped"
        assert op.reject(example(t=t), config, H200) is None
    monkeypatch.undo()
    forget()


def test_some_groups_alone(results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(power_retention, "GROUPS", {"d=64": ({"t": 1000},), "d=128": ({"t": 257},)})
    command(monkeypatch, power_retention, "--only", " d=128 ;", "--seconds", "20", "--trials", "4", "--results", str(results))
    said = capsys.readouterr().out
    assert "1 problems, 0 left out" in said and "t=257" in said and "t=1000" not in said
    with pytest.raises(SystemExit) as refused:
        command(monkeypatch, power_retention, "--only", "d=64; d=96", "--results", str(results))
    assert refused.value.code == 2 and "no group 'd=96'; there are: d=64; d=128" in capsys.readouterr().err
