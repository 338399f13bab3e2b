"""One sweep on all GPUs of a machine: both measure, one journal, one ranking; and a process lost on one leaves the other going."""

from __future__ import annotations

import json
from pathlib import Path

import bad_op
import pytest
from bad_op import Config, example
from killed_worker import Killer

from vidrial.build.cubins import build
from vidrial.device import Device, gpu_count
from vidrial.kernels.power_retention.op import example as power_example
from vidrial.kernels.power_retention.op import op as power_op
from vidrial.spec.fields import fields
from vidrial.tune.pick import choose_config
from vidrial.tune.ranking import local
from vidrial.tune.sweeper import sweep
from vidrial.tune.trial import Status

pytestmark = pytest.mark.skipif(gpu_count() < 2, reason="fewer than two GPUs")


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "cache"))


def test_one_sweep_on_all_gpus() -> None:
    problem = power_example(t=10007, h=4)
    result = sweep(power_op, problem, trials=24, gpus="all", limit=60.0)
    print(result.table())
    header, *lines = (json.loads(line) for line in result.journal.read_text().splitlines())
    screened = [line for line in lines if line["phase"] == "screen"]
    measured = [line for line in screened if line["status"] == "ok"]
    assert header["device"] == Device.current(0).key and len(lines) == len(result.trials)
    # The first config goes to the first GPU, the second to the second.
    assert {"0", "1"} <= {line["gpu"] for line in measured} <= {str(index) for index in range(gpu_count())}
    assert len({json.dumps(line["config"]) for line in screened}) == len(screened) == 24, "none is measured twice, none is left out"
    assert Status.crash not in result.failures and Status.timeout not in result.failures
    (ranking,) = local(power_op, fields(problem, "static"), Device.current(0))
    assert [m.problem for m in ranking.measured] == [problem]
    winner = result.winner
    assert winner.check is not None and winner.check.ok and winner.phase in ("confirm", "final")
    assert any(t.phase == "recheck" and t.config == winner.config and t.status is Status.ok for t in result.trials)
    for index in range(2):
        assert choose_config(power_op, problem, Device.current(index)) == (winner.config, "ranking")


def test_a_config_that_hangs_on_one_gpu_leaves_the_other_going() -> None:
    bad = [Config(bad_op.HANG, 128), Config(bad_op.FAULT, 128), Config(bad_op.NONE, 64), Config(bad_op.WRONG, 64), Config(bad_op.NONE, 128)]
    problem = example(n=10007)
    # Compiled before, they are measured in this order: while the first GPU hangs, the second one does all others.
    for config in bad:
        build(bad_op.bad.source(problem, config), Device.current(0).arch)
    result = sweep(bad_op.op, problem, configs=bad, gpus=2, limit=15.0)
    found = {t.config: t for t in result.trials if t.phase == "screen"}
    assert [found[c].status for c in bad] == [Status.timeout, Status.crash, Status.ok, Status.wrong, Status.ok]
    assert [found[c].gpu for c in bad] == ["0", "1", "1", "1", "1"]
    assert any("replaced 2 times" in note for note in result.notes)
    assert result.winner.config.error == bad_op.NONE


def test_a_killed_process_costs_one_trial() -> None:
    killer = Killer(1)
    result = sweep(power_op, power_example(t=2053, h=4), trials=16, gpus=2, limit=60.0, progress=killer)
    assert len(killer.killed) == 1
    assert result.failures.get(Status.crash, 0) <= 1 and result.winner.ok
    assert len({t.config for t in result.trials}) == 16
    # Left out, if it had not even begun.
    assert any("replaced 1 times" in note or "GPU 1 was left out" in note for note in result.notes)
