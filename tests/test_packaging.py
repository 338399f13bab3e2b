from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import vidrial

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Folders of the source tree that an installation has inside the package.
INSIDE = ("kernels", "sweeps", "templates")
DATA = (".cuh", ".j2", ".h", ".hpp", ".json")


def packages() -> dict[str, Path]:
    """Import name and folder of every package in the tree."""
    roots = {"vidrial": ROOT / "vidrial"} | {f"vidrial.{name}": ROOT / name for name in INSIDE}
    found = {}
    for name, root in roots.items():
        for init in root.rglob("__init__.py"):
            inner = init.parent.relative_to(root).parts
            found[".".join((name, *inner))] = init.parent
    return found


def shipped() -> set[str]:
    """Every file that an installation needs, by its path in the wheel."""
    files = set()
    for tree, target in (("vidrial", "vidrial"), *((name, f"vidrial/{name}") for name in INSIDE)):
        for path in (ROOT / tree).rglob("*"):
            if path.suffix in (".py", *DATA) or path.name == "py.typed":
                files.add(f"{target}/{path.relative_to(ROOT / tree).as_posix()}")
    return files


def run(program: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=os.environ | environment, cwd="/"
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that nothing is written into the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    names = ["pyproject.toml", "README.md", "LICENSE", "NOTICE", "vidrial", *INSIDE]
    copy.mkdir()
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in names if (ROOT / name).exists()), str(copy)], check=True)
    (copy / "README.md").touch()
    program = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    built = subprocess.run([sys.executable, "-c", program, str(folder)], cwd=copy, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder / built.stdout.splitlines()[-1]


def test_package_list_is_the_folders() -> None:
    assert sorted(packages()) == PROJECT["tool"]["setuptools"]["packages"]


def test_wheel_holds_code_and_data(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("vidrial/")}
    assert held == shipped()
    assert "vidrial/templates/include/vidrial/prelude.cuh" in held and "vidrial/py.typed" in held


def test_installed_wheel_finds_its_headers(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = "import vidrial, vidrial.kernels; from vidrial.spec.headers import vidrial_include as f; print(vidrial.__file__, f())"
    assert run(program, PYTHONPATH=str(tmp_path)).split() == [
        str(tmp_path / "vidrial/__init__.py"),
        str(tmp_path / "vidrial/templates/include"),
    ]


def test_source_tree_needs_no_installation() -> None:
    program = "import vidrial.kernels, vidrial.templates; print(vidrial.kernels.__file__, vidrial.templates.__file__)"
    assert run(program, PYTHONPATH=str(ROOT)).split() == [str(ROOT / "kernels/__init__.py"), str(ROOT / "templates/__init__.py")]


def test_public_names_resolve() -> None:
    for name, module in vidrial.PUBLIC.items():
        assert (ROOT / "vidrial" / f"{module}.py").is_file(), f"{name} is promised from vidrial.{module}"
        assert getattr(vidrial, name) is not None
    assert set(vidrial.PUBLIC) < set(dir(vidrial))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        vidrial.nonsense  # noqa: B018


def test_locks_pin_what_the_project_asks_for() -> None:
    pins = {}
    for lock in sorted((ROOT / "requirements").glob("*.txt")):
        for line in lock.read_text().splitlines():
            if line and not line.startswith("#"):
                name, version = line.split("==")
                assert name not in pins, f"{name} is pinned in two locks"
                pins[name] = version
    extras = [asked for group in PROJECT["project"]["optional-dependencies"].values() for asked in group]
    from packaging.requirements import Requirement

    for asked in map(Requirement, PROJECT["project"]["dependencies"] + extras):
        assert pins[asked.name] in asked.specifier, f"{asked.name}: {pins[asked.name]} is not {asked.specifier}"
