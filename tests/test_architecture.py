"""docs/architecture.md holds: its table names every package, each imports only what stands above it, and importing costs nothing."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VIDRIAL = ROOT / "vidrial"
# Rows of the table, lowest first, each with the packages and modules that share it.
TABLE = [
    re.findall(r"`(\w+)`", row) for row in re.findall(r"^\| ((?:`\w+`,? ?)+)\|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
]
# Links to folders beside vidrial/, and what belongs to no layer.
LINKED, BESIDE = ("kernels", "sweeps", "templates"), ("__init__", "__main__")
MODULES = sorted(
    p for p in VIDRIAL.rglob("*.py") if p.relative_to(VIDRIAL).parts[0] not in LINKED and p.parent != VIDRIAL or p.parent == VIDRIAL
)
# Needed at import by modules that are nothing without them; CuPy, torch and JAX never are.
HEAVY = ("cupy", "torch", "jax", "matplotlib")


def name_of(path: Path) -> str:
    """`layout.smem`, or `layout` for its __init__."""
    return ".".join(part for part in path.relative_to(VIDRIAL).with_suffix("").parts if part != "__init__")


def place(module: str) -> tuple[int, int]:
    """Row of the table that a module belongs to, and where in the row its package stands."""
    first = module.partition(".")[0]
    return next((i, row.index(first)) for i, row in enumerate(TABLE) if first in row)


def may_import(mine: str, other: str) -> bool:
    """Packages of one row know nothing of each other; the single modules of the first row know those before them."""
    (row, column), (its_row, its_column) = place(mine), place(other)
    return mine.partition(".")[0] == other.partition(".")[0] or its_row < row or (its_row == row == 0 and its_column < column)


def imported(path: Path, at_import: bool = False) -> Iterator[str]:
    """Every module that a file imports from Vidrial: `layout.mma`, `kernels.power_retention`; inside functions too, or `at_import` alone."""
    tree = ast.parse(path.read_text())
    inside = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)} if at_import else set()
    typing = {n for f in ast.walk(tree) if isinstance(f, ast.If) and "TYPE_CHECKING" in ast.unparse(f.test) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if node in inside or node in typing:
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            names = [
                f"{node.module}.{alias.name}" for alias in node.names if (VIDRIAL.parent / (node.module or "").replace(".", "/")).is_dir()
            ]
            names = [n for n in names if n != "vidrial.__version__"] or [node.module or ""]
        yield from (name.removeprefix("vidrial.") for name in names if name.startswith("vidrial."))


def test_the_table_names_every_package_once() -> None:
    there = {p.name for p in VIDRIAL.iterdir() if (p / "__init__.py").is_file()} | {p.stem for p in VIDRIAL.glob("*.py")}
    assert sorted(name for row in TABLE for name in row) == sorted(there - set(LINKED) - set(BESIDE))


@pytest.mark.parametrize("path", [p for p in MODULES if p.stem not in BESIDE or p.parent != VIDRIAL], ids=name_of)
def test_imports_only_what_stands_above_or_beside(path: Path) -> None:
    mine = name_of(path)
    for name in imported(path):
        first = name.partition(".")[0]
        assert first not in LINKED or first == "templates", f"{mine} names {name}: the framework names no kernel"
        assert first == "templates" or may_import(mine, name), f"{mine} imports {name}, which stands below or beside it"


def test_no_package_imports_itself_in_a_cycle() -> None:
    edges = {name_of(p): set(imported(p, at_import=True)) for p in MODULES}
    edges = {m: {n if n in edges else n.rpartition(".")[0] for n in found} for m, found in edges.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in edges.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def test_the_package_itself_imports_nothing_of_its_own() -> None:
    assert not list(imported(VIDRIAL / "__init__.py"))


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_import_what_exists(path: Path) -> None:
    for name in imported(path):
        target = VIDRIAL / name.replace(".", "/")
        assert any(p.is_dir() or p.with_suffix(".py").is_file() for p in (target, target.parent)), name


PUBLIC_PACKAGES = (
    "vidrial",
    "vidrial.flops",
    "vidrial.icl",
    "vidrial.layout",
    "vidrial.tune",
    "vidrial.testing",
    "vidrial.traced",
    "vidrial.templates",
    "vidrial.kernels",
    "vidrial.sweeps",
)
OURS = sorted(path for folder in ("kernels", "sweeps", "examples") for path in (ROOT / folder).rglob("*.py"))


def deep_imports(path: Path) -> Iterator[str]:
    """What a file imports from Vidrial that is no public name: `vidrial.spec.op.Op`, say, for `vidrial.Op`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("vidrial.") and not a.name.startswith(PUBLIC_PACKAGES[1:]))
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.module.partition(".")[0] == "vidrial":
            if node.module.startswith(("vidrial.kernels", "vidrial.sweeps", "vidrial.templates")):
                continue
            public = getattr(importlib.import_module(node.module), "__all__", ()) if node.module in PUBLIC_PACKAGES else ()
            yield from (f"{node.module}.{a.name}" for a in node.names if a.name not in public)


# What measures Vidrial itself, and by its own means: each name here is one that is yet to be public, or to be done without.
EXEMPT = {
    "sweeps/validate.py": {
        "vidrial.build.cubins.build_many",
        "vidrial.build.nvrtc.Cubin",
        "vidrial.spec.fields.fields",
        "vidrial.spec.registry.reference_of",
        "vidrial.tune.search.Search",
        "vidrial.tune.workers.CUDA_BENCH",
        "vidrial.tune.workers.Job",
        "vidrial.tune.workers.Workers",
    },
}


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_our_kernels_sweeps_and_examples_use_what_users_get(path: Path) -> None:
    assert set(deep_imports(path)) == EXEMPT.get(str(path.relative_to(ROOT)), set())


def test_a_deep_import_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(
        "import vidrial.spec.op\nfrom vidrial import Op, nonsense\nfrom vidrial.layout import smem\nfrom vidrial.tune.sweeper import sweep\n"
    )
    assert list(deep_imports(path)) == ["vidrial.spec.op", "vidrial.nonsense", "vidrial.layout.smem", "vidrial.tune.sweeper.sweep"]


@pytest.mark.parametrize("package", ["build", "host", "report", "runtime", "spec", "tune"])
def test_a_package_names_modules_that_exist(package: str) -> None:
    text = ast.get_docstring(ast.parse((VIDRIAL / package / "__init__.py").read_text())) or ""
    named = set(re.findall(r"`([a-z]\w*)`", text))
    assert named and named <= {path.stem for path in (VIDRIAL / package).glob("*.py")}


def test_the_framework_names_no_kernel() -> None:
    ops = [path.name for path in (ROOT / "kernels").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert "power_retention" in ops
    for path in (p for p in VIDRIAL.rglob("*") if p.suffix in (".py", ".j2", ".html") and p.relative_to(VIDRIAL).parts[0] not in LINKED):
        assert not [op for op in ops if op in path.read_text()], f"{path} names a kernel"


def loaded(program: str) -> set[str]:
    program += "; import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    return set(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split())


def test_importing_vidrial_loads_nothing_else() -> None:
    # A bare interpreter may have loaded other packages already, through .pth files.
    assert loaded("import vidrial") - loaded("pass") - set(sys.stdlib_module_names) == {"vidrial"}


@pytest.mark.parametrize("name", ["cli.main", "kernels.power_retention", "tune.sweeper", "host.target", "build.pool"])
def test_importing_a_module_loads_no_gpu_library(name: str) -> None:
    assert not (loaded(f"import vidrial.{name}") - loaded("pass")) & set(HEAVY)


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
