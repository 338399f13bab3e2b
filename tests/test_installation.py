"""The wheel and the sdist as others get them: their metadata, and an installation that nobody may write to, used from there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_packaging import built

import vidrial

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints; the source tree is not on its path."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=inherited | environment, timeout=280)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, with its size and time."""
    return {str(p.relative_to(folder)): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The wheel, installed by pip into a prefix of its own, and the softmax example beside it; nothing in it may be written."""
    folder = tmp_path_factory.mktemp("installed") / "prefix"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq", "install", "--no-deps", "--no-index", "--prefix", folder]
    run(*pip, built("wheel"), cwd=folder.parent)
    shutil.copytree(ROOT / "examples/softmax", folder / "softmax", ignore=shutil.ignore_patterns("__pycache__"))
    everything = [folder, *folder.rglob("*")]
    modes = {path: path.stat().st_mode for path in everything}
    for path in everything:
        path.chmod(modes[path] & ~0o222)
    yield folder
    for path in everything:
        path.chmod(modes[path])


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_twine_check(kind: str, tmp_path: Path) -> None:
    said = run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", built(kind), cwd=tmp_path)
    assert f"{built(kind).name}: PASSED" in said.replace("\n", "")


def test_twine_finds_a_broken_one(tmp_path: Path) -> None:
    broken = tmp_path / built("wheel").name
    broken.write_bytes(built("wheel").read_bytes()[:1000])
    ended = subprocess.run([sys.executable, "-m", "twine", "check", broken], capture_output=True, text=True, check=False)
    assert ended.returncode != 0


def test_a_read_only_installation_does_its_work(prefix: Path, tmp_path: Path) -> None:
    """Render, compile for Hopper and run on the host target; all that is written is the cache."""
    (site,) = prefix.glob("lib/python*/site-packages")
    program, before = prefix / "bin/vidrial", contents(prefix)
    place = {"PYTHONPATH": str(site), "VIDRIAL_CACHE_DIR": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    softmax = f"{prefix / 'softmax/softmax.py'}:op"
    work = tmp_path / "work"
    work.mkdir()
    assert run(program, "--version", cwd=work, **place).strip() == f"vidrial, version {vidrial.__version__}"
    where = run(sys.executable, "-c", "import vidrial; print(vidrial.__file__)", cwd=work, **place)
    assert Path(where.strip()).is_relative_to(prefix)
    assert 'extern "C" __global__ void' in run(program, "source", softmax, "--n", "1000", "--arch", "sm_90a", cwd=work, **place)
    compiled = run(program, "compile", softmax, "--n", "1000", "--arch", "sm_90a", "--top", "1", "--jobs", "1", cwd=work, **place)
    assert "for sm_90a" in compiled and "row_threads=128" in compiled
    compiled = run(program, "compile", "power_retention", "--t", "1000", "--arch", "sm_90a", "--top", "1", "--jobs", "1", cwd=work, **place)
    assert "power_attend" in compiled
    assert "all 1 right" in run(program, "check", softmax, "--n", "129", "--quick", "--configs", "1", cwd=work, **place)
    run(program, "new", "mine", cwd=work, **place)
    assert sorted(p.name for p in work.iterdir()) == ["mine.cu.j2", "mine.py", "sweep_mine.py", "test_mine.py"]
    assert contents(prefix) == before
    assert list((tmp_path / "cache").rglob("kernel.cu"))


def test_shipped_rankings_come_along(prefix: Path, tmp_path: Path) -> None:
    (site,) = prefix.glob("lib/python*/site-packages")
    shipped = [path.relative_to(ROOT / "sweeps") for path in (ROOT / "sweeps/results").rglob("power_retention.json")]
    assert shipped
    for path in shipped:
        assert (site / "vidrial/sweeps" / path).read_bytes() == (ROOT / "sweeps" / path).read_bytes()
