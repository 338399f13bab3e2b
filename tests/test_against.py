"""benchmarks/against.py without a GPU: sides that say made-up times over the same pipes."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import against, turns
from benchmarks.against import CASES, CONTROL, CUBLAS, NEW, OLD, Clock, Result, Side, difference, run, show, spread
from benchmarks.common import Case

# A process that serves turns.py's protocol, every call of it taking argv[1] ms, its result argv[2] everywhere.
FAKE = """
import sys
from benchmarks import turns
class Gpu:
    n = 0
    def prepare(self, case, config):
        print("a library that prints", file=sys.stderr)
        return (lambda: None), {"y": [float(sys.argv[2])] * 4, "first_call_s": 0.5, "config": config or f"t={case['t']} hq={case['hq']}"}
    def times(self, call, calls):
        self.n += 1
        return [float(sys.argv[1]) * (1 + self.n % 2)] * calls
turns.serve(Gpu(), sys.stdin, sys.stdout)
"""
CASE = Case("x", 1, 2, 1000, d=64, hq=4)


@pytest.fixture
def sides() -> Any:
    made = {
        name: Side(name, [sys.executable, "-c", FAKE, str(ms), str(y)], {"PYTHONPATH": str(against.ROOT)})
        for name, ms, y in ((NEW, 0.9, 1.01), (OLD, 1.0, 1.0), (CONTROL, 1.0, 1.0), (CUBLAS, 2.0, 0.0))
    }
    yield made
    for side in made.values():
        side.close()


def test_turns_are_compared_within_a_round(sides: dict[str, Side]) -> None:
    orders: list[list[str]] = []

    def order(names: list[str]) -> None:
        names.reverse() if len(orders) % 2 else None
        orders.append(list(names))

    found = run(CASE, sides, 4, False, order)
    # Times double in every second round, of all sides: the ratio does not see it, the spread of the times does.
    assert found.turns[OLD] == [1.0, 2.0, 1.0, 2.0] and found.ratio(NEW) == (pytest.approx(0.9), pytest.approx(0.0))
    assert found.ratio(CONTROL)[0] == 1.0 and spread(found.turns[OLD]) == 1.0
    assert orders[0] == orders[1][::-1] and found.difference == pytest.approx(0.01)
    assert found.configs == {NEW: "t=1000 hq=4", OLD: "t=1000 hq=4"}
    text = show([found, found])
    assert (
        "x B1 HQ4 H2 T1000 d64" in text and "0.9000 (0.0000)" in text and "geometric means: new / old 0.9000, control / old 1.0000" in text
    )
    assert found.to_json()["ratios"][NEW]["median"] == pytest.approx(0.9)


def test_same_config_goes_to_the_new_side_alone(sides: dict[str, Side]) -> None:
    seen = {name: [] for name in sides}  # type: dict[str, list[Any]]
    for name, side in sides.items():
        ask = side.ask
        side.ask = lambda name=name, ask=ask, **message: (seen[name].append(message), ask(**message))  # type: ignore[method-assign]
    run(CASE, sides, 1, True, lambda names: None)
    assert {name: messages[0]["config"] for name, messages in seen.items()} == {
        NEW: "t=1000 hq=4", OLD: None, CONTROL: None, CUBLAS: None,
    }  # fmt: skip


def test_a_side_that_ends_is_named() -> None:
    side = Side("old", [sys.executable, "-c", "raise SystemExit(3)"], {})
    with pytest.raises(SystemExit, match="old ended with exit code 3"):
        side.answer()
    side.close()


def test_serve() -> None:
    class Gpu:
        def prepare(self, case: Any, config: Any) -> tuple[Any, dict[str, Any]]:
            return (lambda: None), {"case": case}

        def times(self, call: Any, calls: int) -> list[float]:
            return [1.5] * calls

    answers = io.StringIO()
    asked = [{"prepare": {"t": 3}, "config": None}, {"calls": 2}]
    turns.serve(Gpu(), io.StringIO("".join(json.dumps(x) + "\n" for x in asked)), answers)
    assert [json.loads(line) for line in answers.getvalue().splitlines()] == [{"case": {"t": 3}}, {"ms": [1.5, 1.5]}]
    with pytest.raises(SystemExit, match="nothing was prepared"):
        turns.serve(Gpu(), io.StringIO('{"calls": 1}\n'), io.StringIO())


def test_cases_and_options(tmp_path: Path) -> None:
    assert [c.name for c in CASES if c.group in ("P6", "d128-1000")] == ["d128-1000 B1 H16 T1000 d128", "P6 B8 H16 T4096 d64"]
    assert len(CASES) == len({c.group for c in CASES}) == 13
    options = against.parse([str(tmp_path), "--cases", "P2", "--same-config"])
    assert (options.old, options.cases, options.same_config, options.rounds) == (tmp_path, "P2", True, 15)


def test_difference_and_clock() -> None:
    assert difference([3.0, 4.0], [3.0, 4.0]) == 0 and difference([0.0, 0.0], [3.0, 4.0]) == 1
    with pytest.raises(SystemExit, match="different sizes"):
        difference([1.0], [1.0, 2.0])
    clock = Clock()
    clock._read(io.StringIO("1980, 300.5\nnonsense\n1755, 700\n1745, 690\n"))
    assert clock.since(1) == (1750.0, 695.0) and clock.since(3) is None


def test_pinned_config_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vidrial.device import Device
    from vidrial.kernels.power_retention.op import example, op
    from vidrial.spec.choices import describe

    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(Device, "current", classmethod(lambda cls, index=0: Device.of("h200")))
    sizes = {"t": 10007, "b": 1, "h": 16, "hq": 16, "d": 64}
    other = next(c for c in op.ranked(example(**sizes), Device.of("h200")) if c.config.chunk == 256).config
    assert not turns.picked(sizes).startswith(describe(other))
    turns.pin(sizes, f"{describe(other)} (shipped)")
    assert turns.picked(sizes) == f"{describe(other)} (ranking)"


def test_result_has_every_turn() -> None:
    found = Result(CASE, {name: [1.0, 3.0] for name in against.SIDES}, {NEW: "a", OLD: ""}, {NEW: 1.0, OLD: 2.0}, 0.0, (1700.0, 650.0))
    assert json.loads(json.dumps(found.to_json()))["turns"][CUBLAS] == [1.0, 3.0]
    assert "1700 / 650" in show([found]) and "    old -" in show([found]) and "geometric" not in show([found])


def test_a_side_finds_its_own_tree_and_what_is_installed_beside_it(tmp_path: Path) -> None:
    assert against.path_of(tmp_path, os.pathsep.join(["/packages", str(against.ROOT), ""])) == os.pathsep.join([str(tmp_path), "/packages"])
