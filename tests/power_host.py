"""Power retention on the host target: run, compare, and plant a mistake in the device code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planting import planted, reaches

from vidrial.host import plan as plans
from vidrial.host.plan import HostPlan, poison
from vidrial.host.target import SCHEDULES, HostStats, Schedule
from vidrial.kernels.power_retention.op import RELATIVE_BOUND, Config, check, chunked, op, reference
from vidrial.kernels.power_retention.problem import Problem

Arrays = dict[str, np.ndarray]
# Of the library, what the kernels are made of.
PARTS = ("collective", "pipeline")


def run(
    p: Problem, config: Config, inputs: Arrays, schedule: Schedule = SCHEDULES[0], sanitizer: str | None = None
) -> tuple[Arrays, dict[str, HostStats]]:
    """Outputs, poisoned before (as is the workspace), and what the kernels did."""
    results = {name: poison(buffer.shape, buffer.dtype) for name, buffer in op.outputs(p).items()}
    stats = HostPlan(op, p, config, sanitizer).run({**inputs, **results}, schedule)
    return results, stats


def late_error(p: Problem, config: Config, results: Arrays, exact: Arrays) -> float:
    """Relative to the norm, over the rows that read a state: an error in it does not hide behind the first chunk."""
    rows = slice(chunked(p, config.chunk).chunk, None)
    y, wanted = p.dtype.widen(results["y"])[:, rows], exact["y"][:, rows]
    return float(np.linalg.norm(y - wanted) / max(np.linalg.norm(wanted), 1e-30))


def assert_right(p: Problem, config: Config, inputs: Arrays, results: Arrays) -> None:
    exact = reference(p, inputs)
    found = check(p, inputs, results, exact)
    assert found.ok, found
    assert late_error(p, config, results, exact) <= RELATIVE_BOUND


def plant(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, right: str, wrong: str) -> None:
    """From here on, in every plan, `wrong` stands in a header where `right` stands (`planted`)."""
    includes, compile_host = planted(folder, name, right, wrong, PARTS, "power_retention"), plans.compile_host

    def compile_wrong(text: str, *arguments: Any, include_dirs: tuple[str, ...], **options: Any) -> Any:
        if not reaches(text, name, "power_retention"):
            return compile_host(text, *arguments, include_dirs=include_dirs, **options)
        # The store knows sources by their text.
        return compile_host(f"{text}\n// {name}: {wrong!r} for {right!r}", *arguments, include_dirs=(*includes, *include_dirs), **options)

    monkeypatch.setattr(plans, "compile_host", compile_wrong)
