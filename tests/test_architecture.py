"""docs/architecture.md holds: its table names every module, each imports only what stands above it, and importing costs nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLE = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
MODULES = sorted(path.stem for path in (ROOT / "vidrial").glob("*.py") if path.stem != "__init__")
# Needed at import by modules that are nothing without them; CuPy, torch and JAX never are.
HEAVY = ("cupy", "torch", "jax", "matplotlib")


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports from Vidrial, inside functions too: `tiled`, `kernels.power_retention`."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            inner = node.module == "vidrial"
            names = [f"vidrial.{alias.name}" for alias in node.names] if inner else [node.module or ""]
        yield from (name.removeprefix("vidrial.") for name in names if name.startswith("vidrial."))


def test_the_table_names_every_module_once() -> None:
    assert sorted(TABLE) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_what_stands_above(module: str) -> None:
    above = set(TABLE[: TABLE.index(module)]) | {"__version__"}
    assert set(imported(ROOT / "vidrial" / f"{module}.py")) <= above


def test_the_package_itself_imports_nothing_of_its_own() -> None:
    assert not list(imported(ROOT / "vidrial/__init__.py"))


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_import_what_exists(path: Path) -> None:
    for name in imported(path):
        place = ROOT / "kernels" / Path(*name.split(".")[1:]) if name.startswith("kernels") else ROOT / "vidrial" / name
        assert name == "templates" or place.is_dir() or place.with_suffix(".py").is_file(), name


def loaded(program: str) -> set[str]:
    program += "; import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    return set(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split())


def test_importing_vidrial_loads_nothing_else() -> None:
    # A bare interpreter may have loaded other packages already, through .pth files.
    assert loaded("import vidrial") - loaded("pass") - set(sys.stdlib_module_names) == {"vidrial"}


@pytest.mark.parametrize("name", ["cli", "kernels.power_retention", "sweep", "host", "compile"])
def test_importing_a_module_loads_no_gpu_library(name: str) -> None:
    assert not loaded(f"import vidrial.{name}") - loaded("pass") & set(HEAVY)


def test_importing_starts_nothing_and_writes_nothing() -> None:
    program = """
import sys

EVENTS = ("subprocess.Popen", "os.mkdir", "socket.connect", "os.exec")
seen = []

def writes(event, arguments):
    return event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+") and ".pyc" not in str(arguments[0])

sys.addaudithook(lambda event, arguments: seen.append((event, str(arguments[0]))) if event in EVENTS or writes(event, arguments) else None)
sys.dont_write_bytecode = True
import vidrial.cli.main, vidrial.tune.sweeper, vidrial.kernels.power_retention
print(seen)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ended.stdout == "[]\n"
