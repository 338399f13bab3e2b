"""Vidrial: GPU kernels as two dataclasses and one template, tuned by measurement.

Public names are resolved on first use: importing Vidrial touches no GPU, no file and no other package.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "1.0.0"

PUBLIC = {
    "apply": "call",
    "ArgumentError": "errors",
    "Arguments": "spec.source",
    "as_array": "runtime.arrays",
    "Binary": "runtime.launch",
    "Buffer": "spec.op",
    "Check": "spec.op",
    "choice": "spec.fields",
    "contiguous": "runtime.arrays",
    "Cost": "spec.cost",
    "Device": "device",
    "DType": "dtypes",
    "dynamic": "spec.fields",
    "freeze": "tune.pick",
    "Geometry": "spec.kernel",
    "to_library": "runtime.arrays",
    "Kernel": "spec.kernel",
    "Op": "spec.op",
    "part": "spec.fields",
    "prepare": "call",
    "Settings": "settings",
    "specialize": "spec.fields",
    "Stage": "spec.op",
    "static": "spec.fields",
    "Store": "build.store",
    "Tiles": "spec.source",
    "Toolchain": "build.toolchain",
    "use_target": "call",
    "VidrialError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'vidrial' has no attribute {name!r}; it has {', '.join(sorted(PUBLIC))}")
    return getattr(importlib.import_module(f"vidrial.{PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*PUBLIC, "__version__"])
