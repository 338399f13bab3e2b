"""The sweep on a local Ray cluster of two CPUs and two GPUs that are not there: the bench computes its times. Compiling is real."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_op
import pytest
from fake_op import H200, Config, example, op, true_ms

from vidrial.device import Device
from vidrial.errors import ArgumentError, SweepError
from vidrial.spec.choices import configs
from vidrial.tune.options import Options
from vidrial.tune.ray import RayWorkers
from vidrial.tune.sweeper import sweep
from vidrial.tune.trial import Status
from vidrial.tune.workers import Job

ray: Any = pytest.importorskip("ray")
FAKE = Options(device=H200, bench="fake_op:FakeBench", limit=5.0, ray="auto")


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cluster whose nodes have a cache of their own; what the bench is told comes from files, since its environment is fixed."""
    folder = tmp_path_factory.mktemp("node")
    before = {name: os.environ.get(name) for name in ("VIDRIAL_CACHE_DIR", "FAKE_OP_FAULTS", "FAKE_OP_SECONDS", "PYTHONPATH")}
    os.environ |= {
        "VIDRIAL_CACHE_DIR": str(folder / "cache"),
        "FAKE_OP_FAULTS": "2=crash",
        "FAKE_OP_SECONDS": "0.05",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield folder
    ray.shutdown()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "cache"))


def test_a_sweep_on_two_gpus_compiles_checks_and_ranks(monkeypatch: pytest.MonkeyPatch, cluster: Path) -> None:
    monkeypatch.setattr(fake_op.FakeBench, "needs_cubins", True)
    result = sweep(op, example(), FAKE, configs=[Config(64, 3), Config(96, 3), Config(32, 3), Config(32, 2)])
    assert result.failures == {Status.compile: 1, Status.crash: 1}
    (failed,) = (t for t in result.trials if t.status is Status.compile)
    assert failed.config == Config(96, 3) and "a tile of 96 does not compile" in failed.reason
    assert result.winner.ms == min(true_ms(10007, tile, 3) for tile in (64, 32)) and result.winner.resources[0].registers > 0
    # A trial says on which node's GPU it ran.
    assert {t.gpu for t in result.trials if t.status is not Status.compile} <= {f"{socket.gethostname()}:{i}" for i in (0, 1)}
    # Cubins were published here and travelled to the nodes.
    assert len(list((cluster / "cache").rglob("kernel.cubin.z"))) == 3
    again = sweep(op, example(), FAKE, configs=[Config(64, 3), Config(32, 3)], resume=True)
    assert again.trials == result.trials


def test_a_lost_node_costs_no_trial() -> None:
    jobs = [Job("trial", example(), op.small(example()), (c,), (c,), 0, 7) for c in configs(Config) if c.width != 2]
    with RayWorkers("auto", "fake_op:op", "fake_op:FakeBench", 5.0, None, H200) as workers:
        assert workers.count == 2
        workers.set_problem(Job("prepare", example(), op.small(example())))
        found = {}
        for n, (job, reply) in enumerate(workers.run(jobs)):
            found[job.configs[0]] = reply
            if n == 2:
                ray.kill(next(iter(set(workers._sent) - set(workers._idle))))
        assert workers.replaced == 1
        expected = {c: true_ms(10007, c.tile, c.width) for c in configs(Config) if c.width != 2}
        assert {c: r.timings[0].median_ms for c, r in found.items()} == expected
        ray.kill(workers._idle[0])
        with pytest.raises(SweepError, match="every measuring node of the Ray cluster is lost"):
            list(workers.run(jobs))


def test_unlike_gpus_are_never_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = iter([H200, Device.of("h100")])
    monkeypatch.setattr(RayWorkers, "_described", lambda self, answer: next(kinds))
    with RayWorkers("auto", "fake_op:op", "fake_op:FakeBench", 5.0, None, H200) as workers:
        assert workers.count == 1 and workers.device == H200
        assert workers.notes == ("1 GPUs of another kind than h200 were left out: their times do not compare",)
    monkeypatch.setattr(RayWorkers, "_described", lambda self, answer: Device.of("a100"))
    with pytest.raises(SweepError, match="no free h200.*it has sm_80-"):
        RayWorkers("auto", "fake_op:op", "fake_op:FakeBench", 5.0, None, H200)
    monkeypatch.setattr(RayWorkers, "_described", lambda self, answer: None)
    with pytest.raises(SweepError, match="no node of the Ray cluster has a usable CUDA GPU"):
        sweep(op, example(), FAKE, device=None)


def test_gpus_is_a_count() -> None:
    for gpus in (0, (0, 1)):
        with pytest.raises(ArgumentError, match="a count from 1 up"):
            sweep(op, example(), FAKE, gpus=gpus)
    with RayWorkers("auto", "fake_op:op", "fake_op:FakeBench", 5.0, 1, H200) as workers:
        assert workers.count == 1


def test_an_address_that_does_not_answer_is_said_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = sweep(op, example(), FAKE, configs=[Config(64, 3)])
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    begin = time.monotonic()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(SweepError, match=f"Ray cluster at {address} does not answer.*kept, and --resume"):
            sweep(op, example(), FAKE, ray=address, resume=True)
    with pytest.raises(ArgumentError, match="host:port, ray://host:port and auto"):
        sweep(op, example(), FAKE, ray="somewhere")
    # A port where something else listens, and says nothing.
    monkeypatch.setattr("vidrial.tune.ray.CLUSTER_SECONDS", 3.0)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        threading.Thread(target=lambda: mute.accept(), daemon=True).start()
        with pytest.raises(SweepError, match=r"does not answer \(no answer within 3 s\)"):
            sweep(op, example(), FAKE, ray=f"127.0.0.1:{mute.getsockname()[1]}")
    assert time.monotonic() - begin < 15
    assert len(kept.journal.read_text().splitlines()) == 1 + len(kept.trials)
