"""What is measured, kept and ranked, and which config a call takes from it.

A sweep: `sweeper`, told by `options`, runs each problem as a `session`; `search` or `optuna_search` names configs, `candidates` makes their
binaries, `workers` or `ray` measure them in processes by `measure` and `timing`. What is kept: each `trial` in a `journal`, as `codec` writes
it; the `result`; a `ranking`. A call: `pick` takes its config, from rankings by the `model`, or the `shortlist` of the cost model.

Public names are those of `__all__`, resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vidrial.build.files import check_writable
    from vidrial.tune.options import Options
    from vidrial.tune.pick import Choice, choose_config
    from vidrial.tune.ranking import ProblemTimings, RankedConfig, Ranking, forget, publish, shipped, top_configs
    from vidrial.tune.result import SweepResult
    from vidrial.tune.sweeper import sweep, sweep_lengths
    from vidrial.tune.timing import Timing
    from vidrial.tune.trial import Status, Trial, latest

__all__ = [
    "Choice",
    "Options",
    "ProblemTimings",
    "RankedConfig",
    "Ranking",
    "Status",
    "SweepResult",
    "Timing",
    "Trial",
    "check_writable",
    "choose_config",
    "forget",
    "latest",
    "publish",
    "shipped",
    "sweep",
    "sweep_lengths",
    "top_configs",
]

# Module -> the public names that it has.
_HOMES = {
    "build.files": "check_writable",
    "tune.options": "Options",
    "tune.pick": "Choice choose_config",
    "tune.ranking": "ProblemTimings RankedConfig Ranking forget publish shipped top_configs",
    "tune.result": "SweepResult",
    "tune.sweeper": "sweep sweep_lengths",
    "tune.timing": "Timing",
    "tune.trial": "Status Trial latest",
}

# Hidden from type checkers: to them a name that is not in __all__ is a mistake.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        home = next((module for module, names in _HOMES.items() if name in names.split()), None)
        if home is None:
            raise AttributeError(f"module 'vidrial.tune' has no attribute {name!r}; it has {', '.join(__all__)}")
        found = globals()[name] = getattr(importlib.import_module(f"vidrial.{home}"), name)
        return found


def __dir__() -> list[str]:
    return list(__all__)
