"""Vidrial: GPU kernels as two dataclasses and one template, tuned by measurement.

Public names are resolved on first use: importing Vidrial touches no GPU, no file and no other package.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

__version__ = "1.0.0"

PUBLIC = {
    "apply": "call",
    "ArgumentError": "errors",
    "Arguments": "render",
    "as_array": "arrays",
    "Binary": "launch",
    "Buffer": "op",
    "Check": "op",
    "choice": "problem",
    "contiguous": "arrays",
    "Cost": "space",
    "Device": "device",
    "DType": "dtypes",
    "dynamic": "problem",
    "freeze": "ranking",
    "Geometry": "launch",
    "give_back": "arrays",
    "Kernel": "kernel",
    "Op": "op",
    "part": "problem",
    "prepare": "call",
    "Settings": "settings",
    "specialize": "problem",
    "Stage": "op",
    "static": "problem",
    "Store": "store",
    "Tiles": "render",
    "Toolchain": "toolchain",
    "use_target": "call",
    "VidrialError": "errors",
}

# In a source tree `vidrial.kernels` and `vidrial.templates` are the folders beside `vidrial/`; an installed package has them inside.
_ROOT = Path(__file__).parent.parent
if (_ROOT / "pyproject.toml").is_file():
    __path__.append(str(_ROOT))


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'vidrial' has no attribute {name!r}; it has {', '.join(sorted(PUBLIC))}")
    return getattr(importlib.import_module(f"vidrial.{PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*PUBLIC, "__version__"])
