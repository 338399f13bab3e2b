from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from rich.console import Console

from vidrial.cli import demo
from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.errors import ToolchainError
from vidrial.kernels.power_retention import power_retention
from vidrial.kernels.power_retention.op import op
from vidrial.spec.registry import find_op


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=200, quiet=False)


def test_without_a_gpu_it_explains_compiles_and_checks(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(index: int | None = None) -> Device:
        raise ToolchainError("no usable CUDA GPU")

    monkeypatch.setattr(Device, "current", none)
    monkeypatch.setattr(demo, "CPU_LENGTHS", (65, 131))
    monkeypatch.setattr(demo, "HOST_LENGTHS", (33, 129))
    monkeypatch.setattr(demo, "COMPILED", 1)
    monkeypatch.setattr(demo, "FACTS", {"b": 1, "h": 2, "d": 32})
    demo.run_demo(console, "power_retention")
    text = console.export_text()
    assert "no usable CUDA GPU" in text
    assert "So nothing is timed here" in text
    space, compiled, on_cpu, on_host = re.split(r"\n[1-4]\. ", text)[1:]
    best = op.predicted(op.example(t=demo.EXPLAINED, **demo.FACTS), Device.of("h200"))
    assert f"chunk={best.chunk}" in space
    assert re.search(r"\d+ rejected, for \d+ reasons", space)
    registers = [int(n) for n in re.findall(r"power_\w+ .* (\d+) +\d+ +\d+ +[\d.]+ us", compiled)]
    assert len(registers) >= 2
    assert all(16 <= n <= 255 for n in registers)
    errors = re.findall(r"^ *(\d+) +\S+ [um]?s +(\S+e-\d\d)", on_cpu, re.MULTILINE)
    assert [int(t) for t, _ in errors] == [65, 131]
    assert all(float(e) < 1e-5 for _, e in errors)
    assert on_cpu.count("within bounds") == 2
    assert on_host.count("within bounds") == 3
    assert "WRONG" not in on_host
    assert "chunk=128" in on_host


def test_it_finds_what_another_op_is_asked_and_its_function() -> None:
    softmax = find_op(f"{Path(__file__).parents[2] / 'examples/softmax/softmax.py'}:op")
    problem = demo.problem_of(softmax, 1001, dtype="float32")
    assert (problem.n, problem.dtype) == (1001, DType.float32)
    function = demo.function_of(softmax)
    assert function is not None and function.__name__ == "softmax"
    assert demo.function_of(op) is power_retention
    assert demo.function_of(dataclasses.replace(op, name="nothing_of_this_name")) is None


def test_a_wrong_result_is_said(console: Console) -> None:
    problem = op.example(t=65, h=1, d=32)
    config = op.predicted(problem, Device.of("h200"))
    assert demo.check_on_host(op, problem, config).ok
    inputs = op.sample(problem, 0)
    expected = op.reference(problem, inputs)
    y = (expected["y"] * 1.1).astype("f4")
    wrong = op.check(problem, inputs, {"y": problem.dtype.round(y)}, expected)
    console.print(demo._verdict(wrong))
    assert "WRONG: bounds are 5e-03 and 2e-03" in console.export_text()


def test_with_a_gpu_it_sweeps_every_length(console: Console, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from vidrial.spec.op import Check
    from vidrial.tune.ranking import Ranking
    from vidrial.tune.result import SweepResult
    from vidrial.tune.timing import Timing
    from vidrial.tune.trial import Status, Trial

    device, asked = Device.of("h200"), []

    def sweep(found: object, problem: object, **options: object) -> SweepResult:
        asked.append((problem.t, options))  # type: ignore[attr-defined]
        configs = [c.config for c in op.space(problem, device, limit=2).legal]
        trials = tuple(
            Trial(op.name, problem, c, Status.ok, timing=Timing(ms, ms / 200, 20), check=Check(2.5e-3, 1e-4, 5e-3, 2e-3))
            for c, ms in zip(configs, (0.5, 0.8), strict=True)
        )
        ranking = Ranking.from_trials(op, device, trials)
        assert ranking is not None
        return SweepResult(op.name, problem, device, trials, ranking, ("a note",), Path("journal.jsonl"), 3.0)

    monkeypatch.setattr(Device, "current", lambda index=None: device)
    monkeypatch.setattr(demo, "sweep", sweep)
    demo.run_demo(console, "power_retention")
    text = console.export_text()
    assert asked == [(t, {"seconds": demo.SWEEP_SECONDS}) for t in demo.LENGTHS]
    for t in demo.LENGTHS:
        line = next(line for line in text.splitlines() if line.startswith(f"t={t} "))
        assert line.split()[-8:] == ["0.5000", "0.5%", "2.5e-03", "1.0e-04", "1.60", "2", "3", "s"], line
    assert text.count("a note") == 1
