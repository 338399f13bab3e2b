"""This copy of Vidrial: its distribution, its links, and the ops that installed packages name."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import tomllib
from collections.abc import Mapping
from pathlib import Path

from vidrial.errors import ToolchainError

HERE = Path(__file__).parent
DISTRIBUTION = "vidrial-dsl"
# The group of entry points by which a package names its ops: `name = "module:attribute"`.
ENTRY_POINTS = "vidrial.ops"
# In the source tree these are links to the folders beside the package; a wheel has them inside.
LINKS = ("kernels", "sweeps", "templates")


def refuse_lost_link(name: str) -> None:
    """Refuse a copy that lacks the package `vidrial.<name>` of LINKS: not every archive and checkout keeps a link.

    Raises:
        ToolchainError: naming the path, what is there instead, and what to do.
    """
    path = HERE / name
    if name in LINKS and not (path / "__init__.py").is_file():
        there = "a text file that names the link's target" if path.is_file() else "an empty folder" if path.is_dir() else "not there"
        raise ToolchainError(
            f"{path} is {there}: this copy of Vidrial has lost its links. Install it with pip from a wheel, a .tar.gz or a clone, not from "
            f"a .zip archive; in a clone run git config core.symlinks true and git checkout -- vidrial, or ln -s ../{name} {path}"
        )


def other_distribution() -> str | None:
    """What to do if another distribution has files in this package's folder, or would be imported in its place; None if none has.

    The name `vidrial` on PyPI is another project's; version 1 of this one was installed under it, too.
    """
    for other in importlib.metadata.distributions(name="vidrial"):
        place = Path(str(other.locate_file("vidrial"))).resolve()
        if place == HERE.resolve():
            return (
                f"another distribution, vidrial {other.version}, has its files in {HERE}, mixed with these; this one is {DISTRIBUTION}: "
                f"pip uninstall vidrial, then pip install --force-reinstall --no-deps {DISTRIBUTION}"
            )
        return f"another distribution, vidrial {other.version}, is installed too, in {place}; this one is {DISTRIBUTION}: pip uninstall vidrial"
    return None


@functools.cache
def own_ops() -> Mapping[str, str]:
    """Name -> `module:attribute` of the ops that come along: by the pyproject.toml beside the package, else as installed."""
    # The package may be linked to from elsewhere, or lie in another project's folder.
    file = HERE.resolve().parent / "pyproject.toml"
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, tomllib.TOMLDecodeError):
        project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == DISTRIBUTION:
            entries: Mapping[str, str] = project.get("entry-points", {}).get(ENTRY_POINTS, {})
            return entries
    try:
        installed = importlib.metadata.distribution(DISTRIBUTION).entry_points
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {entry.name: entry.value for entry in installed.select(group=ENTRY_POINTS)}


@functools.cache
def named_ops() -> Mapping[str, str]:
    """Name -> `module:attribute` of every op that an installed package names in its entry points, our own first; none is imported."""
    others = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return {**own_ops(), **{entry.name: entry.value for entry in sorted(others, key=lambda e: e.name) if entry.name not in own_ops()}}
