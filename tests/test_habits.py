"""The habits of the project: what CI runs, the linters' versions, the list of slow tests, temp folders."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import durations
import pytest
import yaml

ROOT = Path(__file__).parent.parent
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def parsed(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def pin(name: str) -> str:
    pins = dict(line.split("==") for line in (ROOT / "requirements/lint.txt").read_text().splitlines() if "==" in line)
    return pins[name]


def test_the_workflow_runs_what_a_change_has_to_pass() -> None:
    jobs = parsed(".github/workflows/ci.yml")["jobs"]
    commands = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    assert ".ci/run" in commands and "make docs" in commands
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    assert re.search(r"^make .*\blint test$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert asked == f">={jobs['run']['strategy']['matrix']['python'][0]}"


def test_pre_commit_has_the_linters_ruff() -> None:
    (repository,) = parsed(".pre-commit-config.yaml")["repos"]
    assert repository["rev"] == f"v{pin('ruff')}"
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff-check", "ruff-format"]


def test_make_names_every_target_in_its_help() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: help (.*)$", makefile, re.MULTILINE)
    assert targets is not None
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in targets[1].split():
        assert re.search(rf"^make {target}\s", shown, re.MULTILINE), target


def functions(path: Path) -> set[str]:
    """The test functions of a file, with their classes."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{f.name}" for f in node.body if isinstance(f, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
    return {name for name in found if name.rpartition("::")[2].startswith("test")}


def test_slow_tests_exist() -> None:
    for name in durations.read_slow():
        file, _, function = name.partition("::")
        assert function in functions(ROOT / file), f"tests/slow.txt: {name} does not exist"


def test_no_file_and_no_package_is_slow_as_a_whole() -> None:
    """`make quick` touches nearly every file: what is left out of a file has fast neighbours, or is listed here."""
    slow = durations.read_slow()
    whole = {
        str(p.relative_to(ROOT))
        for p in TESTS
        if "gpu" not in p.parts
        and functions(p)
        and functions(p) <= {n.partition("::")[2] for n in slow if n.startswith(f"{p.relative_to(ROOT)}::")}
    }
    assert len(whole) <= len(TESTS) // 4, sorted(whole)


def test_slow_functions_are_sums_over_cases() -> None:
    took = {"tests/a.py::test_x[1]": 0.5, "tests/a.py::test_x[2]": 0.5, "tests/a.py::test_y": 0.6, "tests/a.py::test_z[a[b]]": 0.7}
    assert durations.slow_functions(took) == {"tests/a.py::test_x": 1.0, "tests/a.py::test_z": 0.7}


def test_the_plugin_counts_processor_seconds_of_children(pytester_free: Path) -> None:
    (pytester_free / "test_it.py").write_text(
        "import subprocess, sys, time\n"
        "def test_sleeps(): time.sleep(1)\n"
        "def test_works(): subprocess.run([sys.executable, '-c', 'import time\\nwhile time.process_time() < 1.1: pass'])\n"
    )
    to = pytester_free / "took.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "durations", "--durations-to", to, "-p", "no:cacheprovider", "test_it.py"]
    ended = subprocess.run(command, cwd=pytester_free, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT / "tests"), "PATH": ""})
    assert ended.returncode == 0, ended.stdout + ended.stderr
    took = json.loads(to.read_text())
    assert took["test_it.py::test_works"] >= 1 > 0.5 > took["test_it.py::test_sleeps"]


@pytest.fixture
def pytester_free(tmp_path: Path) -> Path:
    """A folder whose pytest has no configuration of ours."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


@pytest.mark.parametrize("path", TESTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_tests_look_at_no_global_temp_folder(path: Path) -> None:
    """Two runs on one machine must not see each other: `tempfile.gettempdir()` is looked at under a TMPDIR of the test's own alone."""
    text = path.read_text()
    if path.name != Path(__file__).name and "gettempdir" in text:
        assert "own_tempdir" in text, f"{path.relative_to(ROOT)} looks at the global temp folder; use the fixture own_tempdir"
    assert not re.search(r"[\"']/tmp[/\"']", text) or path.name == Path(__file__).name


READERS = ("read_text", "write_text", "open", "run", "Popen", "check_output", "fdopen", "TextIOWrapper")
SOURCES = sorted(p for folder in ("vidrial", "kernels", "sweeps", "benchmarks") for p in (ROOT / folder).rglob("*.py"))


def text_without_encoding(source: str) -> list[int]:
    """Lines of a source that read or write text as the locale says: an ASCII one breaks at the first other character."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function, named = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        name, mode = function.rpartition(".")[2], next((ast.unparse(a) for a in node.args[1:2]), named.get("mode", "'r'"))
        if "encoding" in named or name not in READERS or function == "os.open":
            continue
        plain = ("." in function and name in ("read_text", "write_text")) or (
            name in ("open", "fdopen") and "b" not in mode and "os.open" not in ast.unparse(node)
        )
        found += [node.lineno] if plain or named.get("text") == "True" or named.get("universal_newlines") == "True" else []
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_text_has_an_encoding(path: Path) -> None:
    assert not text_without_encoding(path.read_text()), f"{path.relative_to(ROOT)}: name encoding='utf-8'"


def test_text_without_an_encoding_is_found() -> None:
    for line in ("p.read_text()", "p.write_text(x)", "open(p)", "open(p, 'w')", "run(c, text=True)", "p.open()"):
        assert text_without_encoding(line) == [1], line
    for line in ("p.read_text(encoding='utf-8')", "open(p, 'rb')", "run(c, encoding='utf-8')", "os.open(p, os.O_RDONLY)", "run(c)"):
        assert not text_without_encoding(line), line
