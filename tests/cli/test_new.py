"""`vidrial new`: what it writes is right, compiles, and passes its own tests; what it refuses, and that it overwrites nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vidrial.build.cubins import cubin_of
from vidrial.cli.new import FILES, check_name, next_steps, write_kernel
from vidrial.errors import ArgumentError
from vidrial.spec.registry import find_op

ROOT = Path(__file__).parents[2]


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=cwd, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


def test_the_whole_thing(tmp_path: Path) -> None:
    made = run("vidrial", "new", "my_axpy", "--folder", "kernels/mine", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "python -m vidrial check kernels/mine/my_axpy.py:op" in made.stdout  # as it was called itself
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")} == {
        f"kernels/mine/{file}" for file in ("my_axpy.py", "my_axpy.cu.j2", "test_my_axpy.py", "sweep_my_axpy.py")
    }
    checked = run("vidrial", "check", "kernels/mine/my_axpy.py:op", "--quick", "--configs", "2", cwd=tmp_path)
    assert checked.returncode == 0 and "all 5 right" in checked.stdout and "n=4097: cut from n=1000003" in checked.stdout, (
        checked.stdout + checked.stderr
    )
    compiled = run("vidrial", "compile", "kernels/mine/my_axpy.py:op", "--n", "100000", "--arch", "sm_90a", "--top", "1", cwd=tmp_path)
    assert compiled.returncode == 0 and "threads=256 vector=4 unroll=2" in compiled.stdout, compiled.stdout + compiled.stderr
    tested = run("pytest", "-q", "-p", "no:cacheprovider", "kernels/mine/test_my_axpy.py", cwd=tmp_path)
    assert tested.returncode == 0 and "20 passed" in tested.stdout, tested.stdout
    swept = run("compileall", "-q", "kernels/mine", cwd=tmp_path)
    assert swept.returncode == 0, swept.stdout


def test_what_comes_next_names_the_files(tmp_path: Path) -> None:
    paths = write_kernel("one", tmp_path)
    steps = "\n".join(next_steps("one", tmp_path))
    for path in paths:
        assert str(path) in steps or path.suffix == ".j2"
    assert "  vidrial" not in steps and steps.startswith("vidrial check ")
    assert [line.startswith("python ") for line in next_steps("one", tmp_path, "python -m vidrial")] == [True] * 5


def test_no_hole_is_left_and_nothing_spills(tmp_path: Path) -> None:
    assert all("NAME" not in path.read_text() + path.name for path in write_kernel("filled", tmp_path))
    op = find_op(f"{tmp_path / 'filled.py'}:op")
    for arch in ("sm_80", "sm_90a"):
        for dtype, config in (("float32", op.config(256, 4, 4)), ("bfloat16", op.config(512, 8, 4)), ("float16", op.config(128, 1, 1))):
            cubin = cubin_of(op.kernels[0], op.example(n=1000, dtype=dtype), config, arch)
            assert (cubin.resources.spill_stores, cubin.resources.spill_loads) == (0, 0)


@pytest.mark.parametrize("file", FILES)
def test_nothing_is_overwritten_and_then_nothing_is_written(tmp_path: Path, file: str) -> None:
    there = tmp_path / file.replace("NAME", "mine")
    there.write_text("precious")
    with pytest.raises(ArgumentError, match=f"{there.name}: already there, and not overwritten"):
        write_kernel("mine", tmp_path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["precious"]


def test_a_link_that_leads_nowhere_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").symlink_to(tmp_path / "elsewhere.py")
    with pytest.raises(ArgumentError, match="already there"):
        write_kernel("mine", tmp_path)
    assert not (tmp_path / "elsewhere.py").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, "does not name a kernel") for name in ("", "a-b", "1st", "a b", "a.b", "../a", "_private", "__a", "a__b", "größe")),
        *((name, "is a keyword") for name in ("class", "match", "float", "template")),
        *((name, "would hide") for name in ("numpy", "vidrial", "math", "torch")),
        *((name, "already means something") for name in ("op", "Problem", "threads", "Vector", "args", "print", "element")),
    ],
)
def test_names_that_cannot_be(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason):
        write_kernel(name, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_names_that_can_be() -> None:
    for name in ("axpy", "my_kernel", "K2", "rms_norm", "scale_rows", "NAME2"):
        check_name(name)


def test_a_mistake_is_one_line_and_code_2(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for words, reason in ((["a-b"], "'a-b' does not name a kernel"), (["mine", "--folder", "file/inside"], "cannot be written")):
        ended = run("vidrial", "new", *words, cwd=tmp_path)
        assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), ended.stderr
        assert reason in ended.stderr
