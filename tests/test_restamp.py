"""What outlives an edit of templates: rankings whose every kernel is proved to be the same machine code, and no other."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import restamp

from vidrial.build.nvrtc import compile_source

BASE = """struct Tiles { static constexpr int kRows = 64; };
__device__ int table[4] = {1, 2, 3, 4};
extern "C" __global__ void f(float* x, int i) { x[i] = 3.f * x[i] + Tiles::kRows; }
"""
READS = BASE.replace("+ Tiles::kRows", "+ table[i]")


def code(source: str) -> str:
    return restamp.code_of(compile_source(source, "f", "sm_90a"))


def test_code_is_what_a_launch_reads() -> None:
    same = BASE.replace("kRows = 64;", "kRows = 64; static constexpr bool enters = false;") + "__device__ int more = 7;  // unread\n"
    assert code(BASE) == code(same) == code(BASE.replace("float* x, int i", "float* x, int i, float* unused"))
    assert code(BASE) != code(BASE.replace("3.f", "4.f"))
    assert code(READS) != code(BASE) and code(READS) != code(READS.replace("4}", "5}"))


OLD = {"problem 0, config 0": ["scan 12", "attend 34"], "problem 0, config 1": ["attend 56"]}


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (OLD, []),
        (OLD | {"problem 0, config 1": ["attend 57"]}, ["attend 56 is now attend 57: problem 0, config 1"]),
        (
            OLD | {"problem 0, config 0": ["attend 34"]},
            ["2 launches, now 1: problem 0, config 0", "scan 12 is now attend 34: problem 0, config 0"],
        ),
        ({"problem 0, config 0": OLD["problem 0, config 0"]}, ["of its 2 configs 2 were read and 1 are"]),
    ],
)
def test_differences(new: dict[str, list[str]], said: list[str]) -> None:
    assert restamp.differences(OLD, new, 2) == said
    assert restamp.differences(OLD, OLD, 3) == ["of its 3 configs 2 were read and 2 are"]


@pytest.mark.parametrize("check", [False, True])
def test_only_what_is_proved_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, check: bool) -> None:
    """Of four rankings one is proved, one is another, one of neither tree, one the present one's already."""
    path = tmp_path / "results.json"
    entries = [{"digest": digest, "measured": [{"configs": [{}, {}]}]} for digest in ("old", "old", "older", "new")]
    path.write_text(json.dumps({"rankings": entries}))
    other = OLD | {"problem 0, config 1": ["attend 57"]}
    found: dict[str, Any] = {"old": {"digest": "old", "rankings": [OLD] * 4}, "new": {"digest": "new", "rankings": [OLD, other, OLD, OLD]}}
    monkeypatch.setattr(restamp, "asked", lambda tree, options, path: found["old" if tree == tmp_path else "new"])
    assert restamp.restamp(argparse.Namespace(old=tmp_path, check=check), path) == 2
    assert [entry["digest"] for entry in json.loads(path.read_text())["rankings"]] == (
        ["old", "old", "older", "new"] if check else ["new", "old", "older", "new"]
    )
