"""Vidrial: GPU kernels as two dataclasses and one template, tuned by measurement.

Public names are those of `__all__`, here and in `vidrial.layout`, `vidrial.tune`, `vidrial.traced` and `vidrial.testing`; the ops that come along lie in
`vidrial.kernels`. Names are resolved on first use: importing Vidrial touches no GPU, no file and no other package.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vidrial import layout, testing, traced, tune
    from vidrial.call import CachedPlan, apply, call_op, current_target, prepare, prepare_many, run, torch_op, use_target
    from vidrial.device import Device
    from vidrial.dtypes import DType
    from vidrial.errors import (
        ArgumentError,
        ArgumentTypeError,
        CheckError,
        CompileError,
        ConfigError,
        FrozenError,
        LaunchError,
        LayoutError,
        NoValidConfig,
        OutOfMemoryError,
        StoreError,
        SweepError,
        TemplateError,
        ToolchainError,
        UnsupportedError,
        VidrialError,
    )
    from vidrial.runtime.arrays import CPU, Array, ArraySpec, as_array, contiguous, library_of, signature_of, to_library
    from vidrial.runtime.imported import pytree
    from vidrial.runtime.inputs import check_inputs
    from vidrial.runtime.torch_ops import call_torch_op, dispatched, dispatching
    from vidrial.spec.choices import describe
    from vidrial.spec.cost import Cost
    from vidrial.spec.fields import choice, dynamic, part, specialize, static
    from vidrial.spec.kernel import Kernel
    from vidrial.spec.op import Buffer, Check, Op, Stage
    from vidrial.spec.source import Arguments, Tiles
    from vidrial.tune.pick import freeze

__version__ = "2.0.0"
__all__ = [
    "CPU",
    "ArgumentError",
    "ArgumentTypeError",
    "Arguments",
    "Array",
    "ArraySpec",
    "Buffer",
    "CachedPlan",
    "Check",
    "CheckError",
    "CompileError",
    "ConfigError",
    "Cost",
    "DType",
    "Device",
    "FrozenError",
    "Kernel",
    "LaunchError",
    "LayoutError",
    "NoValidConfig",
    "Op",
    "OutOfMemoryError",
    "Stage",
    "StoreError",
    "SweepError",
    "TemplateError",
    "Tiles",
    "ToolchainError",
    "UnsupportedError",
    "VidrialError",
    "apply",
    "as_array",
    "call_op",
    "call_torch_op",
    "check_inputs",
    "choice",
    "contiguous",
    "current_target",
    "describe",
    "dispatched",
    "dispatching",
    "dynamic",
    "freeze",
    "layout",
    "library_of",
    "part",
    "prepare",
    "prepare_many",
    "pytree",
    "run",
    "signature_of",
    "specialize",
    "static",
    "testing",
    "to_library",
    "torch_op",
    "traced",
    "tune",
    "use_target",
]

# Module -> the public names that it has.
_HOMES = {
    "call": "CachedPlan apply call_op current_target prepare prepare_many run torch_op use_target",
    "device": "Device",
    "dtypes": "DType",
    "errors": "ArgumentError ArgumentTypeError CheckError CompileError ConfigError FrozenError LaunchError LayoutError NoValidConfig OutOfMemoryError "
    "StoreError SweepError TemplateError ToolchainError UnsupportedError VidrialError",
    "runtime.arrays": "CPU Array ArraySpec as_array contiguous library_of signature_of to_library",
    "runtime.imported": "pytree",
    "runtime.inputs": "check_inputs",
    "runtime.torch_ops": "call_torch_op dispatched dispatching",
    "spec.choices": "describe",
    "spec.cost": "Cost",
    "spec.fields": "choice dynamic part specialize static",
    "spec.kernel": "Kernel",
    "spec.op": "Buffer Check Op Stage",
    "spec.source": "Arguments Tiles",
    "tune.pick": "freeze",
}
# Names and modules of version 1 -> what stands for them now.
_MOVED = {
    "Binary": "nothing: a launch is Vidrial's own affair; vidrial.apply and vidrial.run launch an op",
    "Geometry": "nothing: an op's launches are its vidrial.Stage; Kernel.geometry(problem, config) has grid, threads and shared memory",
    "Settings": "nothing: set the environment variables; `vidrial env` shows what is in force",
    "Store": "nothing: set VIDRIAL_CACHE_DIR; `vidrial cache` shows and cleans the cache",
    "Toolchain": "nothing: `vidrial env` shows what was found",
    "analysis": "`vidrial analyse`",
    "arrays": "vidrial.as_array, contiguous, signature_of, ArraySpec and to_library",
    "atoms": "vidrial.layout",
    "counts": "vidrial.layout",
    "check": "vidrial.testing.check, assert_op_correct and diverse_configs",
    "draw": "vidrial.layout.draw",
    "give_back": "vidrial.to_library",
    "kernel": "vidrial.Kernel",
    "loads": "vidrial.layout",
    "model": "nothing: vidrial.tune.choose_config asks it",
    "op": "vidrial.Op, Buffer, Check and Stage",
    "plan": "vidrial.testing.HostPlan and vidrial.testing.poison; on a GPU vidrial.CachedPlan",
    "problem": "vidrial.static, dynamic, choice, part and specialize",
    "ranking": "vidrial.tune.choose_config, Choice, top_configs, ProblemTimings, RankedConfig, Ranking and publish",
    "render": "vidrial.Arguments and vidrial.Tiles",
    "smem": "vidrial.layout",
    "space": "vidrial.Cost; Kernel.space and Op.space list configs",
    "sweep": "vidrial.tune.sweep and vidrial.tune.sweep_lengths",
    "sweep_options": "vidrial.tune.Options",
    "sweep_result": "vidrial.tune.SweepResult",
    "tiled": "vidrial.layout",
    "trial": "vidrial.tune.Trial and vidrial.tune.Status",
    "wgmma": "vidrial.layout",
}


def _moved(name: str) -> str:
    return f"vidrial.{name} was a name of version 1; instead: {_MOVED[name]}"


# Hidden from type checkers: to them a name that is not in __all__ is a mistake.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        home = next((module for module, names in _HOMES.items() if name in names.split()), None)
        if home is not None:
            found = getattr(importlib.import_module(f"vidrial.{home}"), name)
        elif name in __all__:
            return importlib.import_module(f"vidrial.{name}")
        elif name in _MOVED:
            raise AttributeError(_moved(name))
        else:
            raise AttributeError(f"module 'vidrial' has no attribute {name!r}; it has {', '.join(__all__)}")
        globals()[name] = found
        return found

    class _Hints:
        """Python's last finder, asked when a module of Vidrial is not found: it says what "No module named" does not."""

        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            package, _, inner = name.partition(".")
            if package == "vidrial":
                if inner in _MOVED:
                    raise ModuleNotFoundError(_moved(inner), name=name)
                importlib.import_module("vidrial.installation").refuse_lost_link(inner.partition(".")[0])

    sys.meta_path.append(_Hints)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
