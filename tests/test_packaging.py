from __future__ import annotations

import ast
import atexit
import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import vidrial

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Folders of the source tree that are links inside the package.
INSIDE = ("kernels", "sweeps", "templates")
DATA = (".cuh", ".j2", ".h", ".hpp", ".json")


def shipped() -> set[str]:
    """Every file that an installation needs, by its path in the wheel."""
    files = set()
    for tree, target in (("vidrial", "vidrial"), *((name, f"vidrial/{name}") for name in INSIDE)):
        for path in (ROOT / tree).rglob("*"):
            if path.suffix in (".py", *DATA) or path.name == "py.typed":
                files.add(f"{target}/{path.relative_to(ROOT / tree).as_posix()}")
    return files


def run(*command: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env=os.environ | environment, cwd="/", timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def copy_source(folder: Path) -> Path:
    """The source tree with its links, so that nothing is written into the tree itself."""
    folder.mkdir()
    names = ["pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE", "NOTICE", "vidrial", *INSIDE]
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in names), str(folder)], check=True)
    return folder


@functools.cache
def built(kind: str) -> Path:
    """The `wheel` or `sdist` of the tree, built once a process."""
    folder = Path(tempfile.mkdtemp(prefix="vidrial-built-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program = f"import sys; from setuptools.build_meta import build_{kind} as build; print(build(sys.argv[1]))"
    source = copy_source(folder / "source")
    ended = subprocess.run([sys.executable, "-c", program, str(folder)], cwd=source, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return folder / ended.stdout.splitlines()[-1]


def install(folder: Path) -> Path:
    """The wheel, installed into a folder; for pip that is to unpack it."""
    zipfile.ZipFile(built("wheel")).extractall(folder)
    return folder


def test_wheel_holds_code_and_data() -> None:
    held = set(zipfile.ZipFile(built("wheel")).namelist())
    assert {name for name in held if name.startswith("vidrial/")} == shipped()
    assert "vidrial/templates/include/vidrial/prelude.cuh" in held and "vidrial/py.typed" in held
    assert {name.partition("/")[0] for name in held} == {"vidrial", f"vidrial_dsl-{vidrial.__version__}.dist-info"}


def test_sdist_holds_the_wheels_files_without_links() -> None:
    with tarfile.open(built("sdist")) as archive:
        top = f"vidrial_dsl-{vidrial.__version__}/"
        held = {member.name.removeprefix(top): member for member in archive.getmembers() if not member.isdir()}
    assert {name for name in held if name.startswith("vidrial/")} == shipped()
    assert {"pyproject.toml", "README.md", "LICENSE", "NOTICE", "CHANGELOG.md"} <= held.keys()
    assert not [name for name, member in held.items() if member.issym()]


def test_wheel_from_the_sdist_is_the_wheel(tmp_path: Path) -> None:
    with tarfile.open(built("sdist")) as archive:
        # NOTE: Python 3.11.3 and before know no filters.
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (source,) = tmp_path.iterdir()
    program = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=source, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    held = [sorted(zipfile.ZipFile(path).namelist()) for path in (built("wheel"), tmp_path / built("wheel").name)]
    assert held[0] == held[1]


def test_installed_wheel_finds_its_headers_and_its_op(tmp_path: Path) -> None:
    place = str(install(tmp_path))
    program = "import vidrial, vidrial.kernels; from vidrial.spec.headers import vidrial_include as f; print(vidrial.__file__, f())"
    assert run("-c", program, PYTHONPATH=place).split() == [f"{place}/vidrial/__init__.py", f"{place}/vidrial/templates/include"]
    source = run("-m", "vidrial", "source", "power_retention", "--t", "100", "--arch", "h200", PYTHONPATH=place)
    assert "struct Tiles" in source


def test_source_tree_needs_no_installation() -> None:
    program = "import vidrial.kernels, vidrial.templates; print(vidrial.kernels.__file__, vidrial.templates.__file__)"
    inside = [f"{ROOT}/vidrial/{name}/__init__.py" for name in ("kernels", "templates")]
    assert run("-c", program, PYTHONPATH=str(ROOT)).split() == inside
    assert [Path(path).resolve() for path in inside] == [ROOT / "kernels/__init__.py", ROOT / "templates/__init__.py"]


def test_a_package_that_is_linked_to_knows_its_ops(tmp_path: Path) -> None:
    (tmp_path / "vidrial").symlink_to(ROOT / "vidrial")
    assert "struct Tiles" in run("-m", "vidrial", "source", "power_retention", "--t", "100", "--arch", "h200", PYTHONPATH=str(tmp_path))


@pytest.mark.parametrize("project", ['[project]\nname = "theirs"\n', "[project\n"], ids=["another's", "damaged"])
def test_another_projects_file_beside_the_package_is_not_its_own(tmp_path: Path, project: str) -> None:
    """As `pip install --target .` leaves it."""
    place = install(tmp_path)
    (place / "pyproject.toml").write_text(project)
    program = "from vidrial.installation import own_ops; print(*own_ops())"
    assert run("-c", program, PYTHONPATH=str(place)).split() == ["flash_attention", "power_retention", "power_retention_backward"]


def refused(*command: str, **environment: str) -> str:
    ended = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env=os.environ | environment, cwd="/", timeout=120
    )
    assert ended.returncode != 0, ended.stdout
    return ended.stderr


@pytest.mark.parametrize(("name", "how"), [("kernels", "text"), ("kernels", "empty"), ("templates", "missing"), ("templates", "empty")])
def test_lost_links_are_refused_by_name(tmp_path: Path, name: str, how: str) -> None:
    source = copy_source(tmp_path / "source")
    link = source / "vidrial" / name
    link.unlink()
    if how == "text":
        link.write_text(f"../{name}")
    elif how == "empty":
        link.mkdir()
    said = refused("-m", "vidrial", "source", "power_retention", "--t", "100", "--arch", "h200", PYTHONPATH=str(source))
    assert said.startswith("vidrial: ") and said.count("\n") == 1
    assert str(link) in said and "lost its links" in said and f"ln -s ../{name} {link}" in said
    said = refused("-c", f"from vidrial.{name}.power_retention import op", PYTHONPATH=str(source))
    assert "lost its links" in said.splitlines()[-1] and str(link) in said
    # What needs neither goes on.
    assert "Usage" in run("-m", "vidrial", "--help", PYTHONPATH=str(source))
    if name == "kernels":
        env = run("-m", "vidrial", "env", PYTHONPATH=str(source), VIDRIAL_CACHE_DIR=str(tmp_path / "cache"))
        assert "lost its links" in " ".join(env.split())


def distribution(folder: Path, name: str, files: str = "", entry_points: str = "") -> None:
    """The metadata of a distribution that lies in a folder."""
    info = folder / f"{name}-0.2.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.2.1\n")
    (info / "RECORD").write_text(files)
    (info / "entry_points.txt").write_text(entry_points)


def environment_of(*places: Path, cache: Path) -> str:
    """What `vidrial env` prints with these folders to import from, its lines joined."""
    return " ".join(run("-m", "vidrial", "env", PYTHONPATH=os.pathsep.join(map(str, places)), VIDRIAL_CACHE_DIR=str(cache)).split())


def test_env_says_that_another_distribution_has_the_name(tmp_path: Path) -> None:
    assert "another distribution" not in environment_of(ROOT, cache=tmp_path)
    mixed, apart = install(tmp_path / "mixed"), tmp_path / "apart"
    distribution(mixed, "vidrial", "vidrial/__init__.py,,\n")
    said = environment_of(mixed, cache=tmp_path)
    assert f"another distribution, vidrial 0.2.1, has its files in {mixed / 'vidrial'}, mixed with these" in said
    assert "pip uninstall vidrial, then pip install --force-reinstall --no-deps vidrial-dsl" in said
    distribution(apart, "vidrial")
    said = environment_of(ROOT, apart, cache=tmp_path)
    assert f"another distribution, vidrial 0.2.1, is installed too, in {apart / 'vidrial'}" in said
    assert "force-reinstall" not in said


def test_ops_of_other_packages_are_found_and_a_broken_one_is_named(tmp_path: Path) -> None:
    other = tmp_path / "other"
    points = "[vidrial.ops]\nrow_softmax = their_softmax:op\nbroken = their_broken:op\nlacking = their_softmax:nothing\nnumber = math:pi\n"
    points += "leaving = their_leaving:op\ninner = their_softmax:Ops.inner [extra]\nlayout = their_layout:op\n"
    distribution(other, "theirs", entry_points=points)
    shutil.copy(ROOT / "examples/softmax/softmax.py", other / "their_softmax.py")
    shutil.copy(ROOT / "examples/softmax/softmax.cu.j2", other)
    with (other / "their_softmax.py").open("a") as file:
        file.write("\n\nclass Ops:\n    inner = op\n")
    (other / "their_broken.py").write_text("raise RuntimeError('no such\\nmachine')\n")
    (other / "their_leaving.py").write_text("import sys\n\nsys.exit('no GPU')\n")
    (other / "their_layout.py").write_text("import vidrial as vd\n\nvd.layout.Layout((2, 2), (1,))\n")
    path = os.pathsep.join((str(ROOT), str(other)))
    said = environment_of(ROOT, other, cache=tmp_path / "cache")
    assert "op broken: its entry point their_broken:op cannot be imported: RuntimeError: no such machine" in said
    assert "op lacking: its entry point their_softmax:nothing cannot be imported: AttributeError" in said
    assert "op leaving: its entry point their_leaving:op cannot be imported: SystemExit: no GPU" in said
    assert "op layout: its entry point their_layout:op cannot be imported: LayoutError: " in said
    assert "inner their_softmax:Ops.inner [extra]" in said and "op inner" not in said
    assert "'number' names a float, not an Op" in said
    assert "row_softmax their_softmax:op" in said and "row_softmax, " not in said.partition(" rankings ")[0]
    assert "predicted fastest" in run("-m", "vidrial", "explain", "row_softmax", "--n", "1000", "--arch", "h200", PYTHONPATH=path)
    assert "predicted fastest" in run("-m", "vidrial", "explain", "power_retention", "--t", "100", "--arch", "h200", PYTHONPATH=path)
    assert "Usage" in run("-m", "vidrial", "--help", PYTHONPATH=path)
    said = refused("-m", "vidrial", "explain", "broken", "--t", "100", PYTHONPATH=path)
    assert said == "vidrial: op broken: its entry point their_broken:op cannot be imported: RuntimeError: no such machine\n"
    said = refused("-m", "vidrial", "explain", "nonsense", PYTHONPATH=path)
    assert (
        "accepted: flash_attention, power_retention, power_retention_backward, broken, inner, lacking, layout, leaving, number, row_softmax, module:attribute"
        in said
    )


def test_public_names_resolve_and_are_said_once() -> None:
    for module in (vidrial, vidrial.tune):
        homes = {name: home for home, names in module._HOMES.items() for name in names.split()}
        tree = ast.parse(Path(module.__file__ or "").read_text())
        typed = {
            alias.name: node.module
            for block in tree.body
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
            for node in block.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        spaces = {name for name in module.__all__ if name not in homes}
        assert typed == {n: f"vidrial.{home}" for n, home in homes.items()} | dict.fromkeys(spaces, module.__name__)
        assert sum(len(names.split()) for names in module._HOMES.values()) == len(homes)
        assert set(homes) | spaces == set(module.__all__) <= set(dir(module))
    for module in (vidrial, vidrial.layout, vidrial.tune, vidrial.testing):
        for name in module.__all__:
            assert getattr(module, name) is not None
        with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
            module.nonsense  # noqa: B018


def test_names_of_version_1_say_what_stands_for_them() -> None:
    """Version 1's `PUBLIC`, and the modules that its documents named."""
    names = (
        "apply ArgumentError Arguments as_array Binary Buffer Check choice contiguous Cost Device DType dynamic freeze Geometry give_back "
        "Kernel Op part prepare Settings specialize Stage static Store Tiles Toolchain use_target VidrialError sweep check plan counts model"
    )
    for name in names.split():
        if name not in vidrial.__all__:
            with pytest.raises(AttributeError, match=f"^vidrial.{name} was a name of version 1; instead: "):
                getattr(vidrial, name)
    with pytest.raises(ModuleNotFoundError, match=r"^vidrial.sweep was a name of version 1; instead: vidrial.tune.sweep and"):
        importlib.import_module("vidrial.sweep")
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'vidrial.nonsense'"):
        importlib.import_module("vidrial.nonsense")
    # Every new name that a sentence gives is there.
    for sentence in vidrial._MOVED.values():
        for path in re.findall(r"vidrial\.([\w.]+\w)", sentence):
            found: object = vidrial
            for part in path.split("."):
                found = getattr(found, part)


def changelog_rows() -> list[tuple[list[str], list[str]]]:
    """Of the changelog's table: names of version 1, and those of version 2."""
    rows = re.findall(r"^\| (`.+) \| (.+) \|$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    return [(re.findall(r"`([\w.]+)`", old), re.findall(r"`([\w.]+)`", new)) for old, new in rows]


@pytest.mark.parametrize(("old", "new"), changelog_rows(), ids=str)
def test_what_the_changelog_says_has_moved_says_so_itself(old: list[str], new: list[str]) -> None:
    space = ""
    for name in old:
        space, _, last = name.rpartition(".") if "." in name else (space, "", name)
        if space == "Check":
            with pytest.raises(
                AttributeError, match=f"Check has no {last}, a name of version 1; instead: {new[old.index(name)].split('.')[-1]}$"
            ):
                getattr(vidrial.Check(0.0, 0.0, 0.0, 0.0), last)
            continue
        first = f"{space}.{last}".removeprefix("vidrial.").partition(".")[0]
        if name in ("vidrial.layout", "vidrial.call.Planned"):  # modules that are still there
            continue
        with pytest.raises(AttributeError, match=f"^vidrial.{first} was a name of version 1; instead: ") as raised:
            getattr(vidrial, first)
        sentence = str(raised.value)
        assert "instead: nothing" in sentence or new[old.index(name) if len(new) == len(old) else 0].split(".")[-1] in sentence


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
