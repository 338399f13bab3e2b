"""The first call of a process whose kernels are in the cache: what it must not do, whatever the machine's speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parents[1]


def first_call() -> dict[str, Any]:
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, str(HERE / "first_call.py")], capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path}
    )
    assert ended.returncode == 0, ended.stderr
    told: dict[str, Any] = json.loads(ended.stdout)
    return told


def test_a_first_call_with_a_warm_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path))
    cold, warm = first_call(), first_call()
    print(f"first call up to the launches: {cold['ms']:.0f} ms with an empty cache, {warm['ms']:.0f} ms with a warm one")
    assert cold["nvrtc"] and len(cold["compiled"]) == cold["launches"] >= 1
    assert warm["launches"] == cold["launches"]
    assert warm["compiled"] == [] and not warm["nvrtc"], "NVRTC, 100 MB, is not loaded to learn its version"
    # But a codec, which Jinja's lexer asks for at the first string in a template.
    assert set(warm["imported"]) <= {"encodings.unicode_escape"}, "what a call imports, importing power_retention has imported"
    # Nothing was measured for D = 32: the cost model chooses among thousands of configs, and makes the tiles of few: of
    # the launches, and of those that lead at some size.
    assert warm["tiles"] <= warm["launches"] + 8
    # The op's templates and headers once each, for the digest. Beside them the digest itself by name and by descriptor, 2 rankings, 2
    # headers with the toolchain's versions, the codec and, if rankings are outdated, the project's file for the op's name in the command
    # to measure; a launch: its template once more, the entry's folder, and 3 files in it by name and by descriptor.
    sources = {path for path in warm["opened"] if f"{os.sep}templates{os.sep}" in path}
    assert len(warm["opened"]) <= len(sources) + 8 + 8 * warm["launches"]
    assert len(sources) < 50, "one op's sources, not every template that is installed"
