from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vidrial.errors import ArgumentError
from vidrial.settings import Settings


def test_defaults() -> None:
    settings = Settings.read({"HOME": "/nowhere"})
    assert settings.target == "cuda"
    assert settings.jobs == len(os.sched_getaffinity(0))
    assert settings.cache_max_bytes == 2048 * 1024 * 1024
    assert (settings.cutlass_include, settings.cuda_include, settings.cxx) == (None, None, None)


def test_every_variable(tmp_path: Path) -> None:
    settings = Settings.read(
        {
            "VIDRIAL_TARGET": "host",
            "VIDRIAL_JOBS": "3",
            "VIDRIAL_CACHE_DIR": str(tmp_path / "a"),
            "XDG_CACHE_HOME": str(tmp_path / "b"),
            "VIDRIAL_CACHE_MAX_MB": "7",
            "VIDRIAL_CUTLASS_INCLUDE": str(tmp_path),
            "VIDRIAL_CUDA_INCLUDE": str(tmp_path),
            "CXX": "clang++",
        }
    )
    assert (settings.target, settings.jobs, settings.cache_max_bytes) == ("host", 3, 7 << 20)
    assert settings.cache_dirs[:2] == (tmp_path / "a", tmp_path / "b" / "vidrial")
    assert settings.cache_dirs[2].parts[-2:] == (".cache", "vidrial")
    assert (settings.cutlass_include, settings.cuda_include) == (tmp_path, tmp_path)
    assert settings.cxx == "clang++"


def test_relative_cache_directory_is_of_the_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings.read({"VIDRIAL_CACHE_DIR": "here"}).cache_dirs[0] == tmp_path / "here"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VIDRIAL_TARGET", "cpu"),
        ("VIDRIAL_JOBS", "0"),
        ("VIDRIAL_JOBS", "-1"),
        ("VIDRIAL_JOBS", "two"),
        ("VIDRIAL_JOBS", "1.5"),
        ("VIDRIAL_CACHE_MAX_MB", "0"),
        ("VIDRIAL_CACHE_MAX_MB", "1e3"),
        ("VIDRIAL_CUTLASS_INCLUDE", "/no/such/folder"),
        ("VIDRIAL_CUDA_INCLUDE", "/no/such/folder"),
    ],
)
def test_a_bad_value_names_its_variable(name: str, value: str) -> None:
    with pytest.raises(ArgumentError, match=name) as caught:
        Settings.read({name: value})
    assert repr(value) in str(caught.value)


def test_nothing_is_read_at_import() -> None:
    program = (
        "import sys, vidrial, vidrial.build.nvrtc, vidrial.runtime.launch, vidrial.build.store\n"
        "assert not {'cupy', 'torch', 'numpy', 'jinja2'} & set(sys.modules), sys.modules.keys()"
    )
    environment = os.environ | {"VIDRIAL_JOBS": "nonsense", "PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 0
