"""Ops by name: what another process finds them by (`module:attribute` or `file.py:attribute`)."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from vidrial.errors import ArgumentError
from vidrial.op import Op


def reference_of(op: Op) -> str:
    """The name under which another process finds an op.

    Raises:
        ArgumentError: it is not an attribute of the module that its functions or dataclasses are from.
    """
    homes = (op.problem, op.stages, op.sample, op.reference, op.config, op.rules)
    for module in (sys.modules.get(getattr(home, "__module__", "")) for home in homes):
        for name, value in vars(module).items() if module else ():
            if value is op:
                return f"{_importable(module)}:{name}"
    raise ArgumentError(f"op {op.name} cannot be found by another process: keep it at the top level of the module of its dataclasses")


def resolve(reference: str) -> Any:
    """What `module:attribute` or `file.py:attribute` names.

    Raises:
        ArgumentError: there is no such module, file or attribute.
    """
    home, _, name = reference.rpartition(":")
    try:
        return getattr(_load_file(str(Path(home).resolve())) if home.endswith(".py") else importlib.import_module(home), name)
    except (ImportError, AttributeError, ValueError, OSError) as error:
        raise ArgumentError(f"{reference!r} names nothing ({error}); accepted: module:attribute or file.py:attribute") from None


@functools.lru_cache
def _load_file(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"vidrial_user_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Annotations are resolved through sys.modules.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _importable(module: Any) -> str:
    if module.__name__ != "__main__":
        file = str(module.__file__ or "")
        return file if module.__name__.startswith("vidrial_user_") else str(module.__name__)
    spec = getattr(module, "__spec__", None)
    return str(spec.name) if spec is not None else str(Path(module.__file__).resolve())
