"""The package as its users' type checker sees it: `mypy --strict` on a script of theirs, in the source tree and from an installed wheel."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_packaging import install

ROOT = Path(__file__).parent.parent
NAMESPACES = ("vidrial", "vidrial.layout", "vidrial.tune", "vidrial.testing", "vidrial.kernels.power_retention")
PROGRAM = """
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import vidrial as vd
import vidrial.layout, vidrial.tune, vidrial.testing, vidrial.kernels.power_retention


@dataclass(frozen=True)
class Problem:
    dtype: vd.DType = vd.static()
    n: int = vd.dynamic(keyed=False)


@dataclass(frozen=True)
class Inner:
    warps: int = vd.choice(4, 8)


@dataclass(frozen=True)
class Config:
    rows: int = vd.choice(1, 2)
    name: str = vd.choice("sync", "wgmma")
    inner: Inner = vd.part(Inner)
    fixed: str = vd.specialize("n")


def tiles(p: Problem, c: Config) -> vd.Tiles:
    return vd.Tiles(threads=32 * c.inner.warps, Elem=p.dtype, rows=c.rows)


def grid(p: Problem, c: Config) -> tuple[int, int, int]:
    return p.n // c.rows, 1, 1


kernel = vd.Kernel("k", Path("k.cu.j2"), Problem, Config, vd.Arguments(n="int"), tiles, grid)
problem, x, device = Problem(vd.DType.float32, 3), np.zeros((1, 8, 2, 32), np.float32), vd.Device.default()


def op(op: vd.Op[Problem, Config]) -> None:
    reveal_type(op.predicted(problem, device).inner.warps)  # is int
    reveal_type(vd.prepare(op, problem))  # is script.Config
    reveal_type(op.example(n=3))  # is script.Problem
    reveal_type(op.space(problem).legal[0].config.rows)  # is int
    reveal_type(vd.tune.sweep(op, problem, seconds=1.0).winner.config)  # is script.Config
    reveal_type(vd.tune.choose_config(op, problem, device).config)  # is script.Config
    reveal_type(vd.testing.check(op).outcomes[0].problem)  # is script.Problem
    reveal_type(vd.apply(op, problem, {"x": vd.as_array(x, "x")})["y"])  # is numpy.ndarray
    reveal_type(vd.call_op(op, {"x": x})["y"])  # is numpy.ndarray
    reveal_type(vidrial.kernels.power_retention.power_retention(x, x, x))  # is numpy.ndarray
    vd.prepare(op, Config())  # refused: misc


def wrong_tiles(p: Problem, c: Config) -> vd.Tiles:
    return vd.Tiles(threads=p.m, rows=c.row)  # refused: attr-defined attr-defined


vd.Kernell  # refused: attr-defined
vd.layout.SmemLayuot  # refused: attr-defined
vd.tune.sweeep  # refused: attr-defined
vd.Kernel("k", Path("k.cu.j2"), Problem, Inner, vd.Arguments(), tiles, grid)  # refused: arg-type arg-type
vd.Stage(kernel, problem, Inner())  # refused: misc
count: str = vd.choice(1, 2)  # refused: assignment
reveal_type(vd.layout.Layout((4, 2), (2, 1))(3))  # is int
reveal_type(kernel.tiles)  # is def (script.Problem, script.Config) -> vidrial.spec.source.Tiles
"""


# What stands for the type parameters of a generic class.
PARAMETERS = {"P": "Problem", "C": "Config", "A": "float"}


def questions() -> Iterator[str]:
    """Lines of a script that ask for the type of every public name, and of every public attribute of its classes."""
    for namespace in NAMESPACES:
        module = importlib.import_module(namespace)
        for name in module.__all__:
            value = getattr(module, name)
            yield f"reveal_type({namespace}.{name})"
            if inspect.isclass(value) and value.__module__.startswith("vidrial.") and not issubclass(value, Exception):
                ours = [vars(kind) for kind in value.__mro__ if kind.__module__.startswith("vidrial.")]
                attributes = {attribute for kind in ours for attribute in {**kind, **kind.get("__annotations__", {})}}
                given = ", ".join(PARAMETERS[parameter.__name__] for parameter in getattr(value, "__parameters__", ()))
                yield f"def of_{namespace.replace('.', '_')}_{name}(x: {namespace}.{name}{f'[{given}]' if given else ''}) -> None:"
                yield "    pass"
                yield from (f"    reveal_type(x.{attribute})" for attribute in sorted(attributes) if not attribute.startswith("_"))


def bare(revealed: str) -> bool:
    """Whether a type, a parameter or a return is Any itself. NDArray[Any], and tuples and lists of Any, are not; `Callable[..., X]` is not."""
    revealed = revealed.replace("(*Any, **Any)", "()").replace("= Any]", "]").replace("= Any,", ",")
    while (less := re.sub(r"\[[^\[\]]*\]", "", revealed)) != revealed:
        revealed = less
    return re.search(r"\bAny\b", revealed) is not None


@pytest.mark.parametrize(
    ("revealed", "found"),
    [
        ("Any", True),
        ("def (x: Any) -> builtins.int", True),
        ("def (x: builtins.int) -> Any", True),
        ("Overload(def () -> builtins.int, def (x: builtins.int) -> Any)", True),
        ("def [T] () -> T`-1", False),
        ("def (x: numpy.ndarray[builtins.tuple[Any, ...], numpy.dtype[Any]]) -> builtins.int", False),
        ("def (*Any, **Any) -> P`1", False),
    ],
)
def test_bare_any_is_seen(revealed: str, found: bool) -> None:
    assert bare(revealed) is found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both runs' cache, whichever processes of tests they are in: the second one need not read NumPy again."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "mypy"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module", params=["source tree", "wheel"])
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to import Vidrial from."""
    return ROOT if request.param == "source tree" else install(tmp_path_factory.mktemp("installed"))


def test_a_users_script(package: Path, cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    asked = list(questions())
    lines = [*PROGRAM.splitlines(), *asked]
    (tmp_path / "script.py").write_text("\n".join(lines) + "\n")
    # What lies on the interpreter's path, and says py.typed, is to mypy what is installed.
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={cache}", "--no-error-summary", "script.py"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(package)}, capture_output=True, text=True, check=False, timeout=280
    )
    said: dict[int, list[str]] = {}
    for line in ended.stdout.splitlines():
        match = re.fullmatch(r"script\.py:(\d+): (error|note): (.*)", line)
        assert match, f"mypy says something that is not about the script: {line}{ended.stderr}"
        if match[2] == "error" or match[3].startswith("Revealed type is "):
            said.setdefault(int(match[1]), []).append(match[3])
    wrong = []
    for number, line in enumerate(lines, 1):
        _, refused, codes = line.partition("# refused: ")
        wanted, found = codes.split() if refused else [], said.get(number, [])
        errors = [text for text in found if not text.startswith("Revealed type is ")]
        if [re.findall(r"\[([a-z-]+)\]$", text) for text in errors] != [[code] for code in wanted]:
            wrong.append(f"{line}: {found}")
        elif "reveal_type" in line:
            revealed = found[0].removeprefix('Revealed type is "').removesuffix('"')
            _, wants, kind = line.partition("# is ")
            if not revealed.startswith(kind) if wants else bare(revealed):
                wrong.append(f"{line}: {revealed}")
    assert not wrong, "\n".join(wrong)
    assert sum("reveal_type" in line for line in asked) > 300, "the names are there"
