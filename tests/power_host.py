"""Power retention on the host target: run, compare, and plant a mistake in the device code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vidrial.host import plan as plans
from vidrial.host.plan import HostPlan, poison
from vidrial.host.target import SCHEDULES, HostStats, Schedule
from vidrial.kernels.power_retention.op import RELATIVE_BOUND, Config, check, chunked, op, reference
from vidrial.kernels.power_retention.problem import Problem
from vidrial.templates import TEMPLATES

Arrays = dict[str, np.ndarray]


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


def planted(folder: Path, name: str, right: str, wrong: str) -> tuple[str, ...]:
    """Folders of headers in which `wrong` stands in `name` where `right` stands, to be searched before the templates' own.

    `name`: a header of the op (`power_attend`), or one of the library's collectives or rings (`collective/attention`), which those include.
    """
    op, library = Path(TEMPLATES, "power_retention"), Path(TEMPLATES, "include", "vidrial")
    copies = {folder / "op": op, **{folder / "planted" / part: library / part for part in ("collective", "pipeline")}}
    for copy, original in copies.items():
        copy.mkdir(parents=True)
        for header in original.glob("*.cuh"):
            text = header.read_text()
            if header == (library if "/" in name else op) / f"{name}.cuh":
                assert text.count(right) == 1, f"{text.count(right)} times in {name}: {right}"
                text = text.replace(right, wrong)
            for part in ("collective", "pipeline"):
                text = text.replace(f"#include <vidrial/{part}/", f"#include <planted/{part}/")
            (copy / header.name).write_text(text)
    return str(folder / "op"), str(folder)


def plant(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, right: str, wrong: str) -> None:
    """From here on, in every plan, `wrong` stands in a header where `right` stands (`planted`)."""
    includes, compile_host = planted(folder, name, right, wrong), plans.compile_host

    def compile_wrong(text: str, *arguments: Any, include_dirs: tuple[str, ...], **options: Any) -> Any:
        # The store knows sources by their text.
        return compile_host(f"{text}\n// {name}: {wrong!r} for {right!r}", *arguments, include_dirs=(*includes, *include_dirs), **options)

    monkeypatch.setattr(plans, "compile_host", compile_wrong)
