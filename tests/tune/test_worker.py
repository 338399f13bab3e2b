from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_op import Config, example, fake, op, true_ms

from vidrial.errors import ArgumentError, SweepError
from vidrial.spec.op import Op
from vidrial.spec.registry import reference_of, resolve
from vidrial.tune.trial import Status
from vidrial.tune.workers import Job, Reply, Workers

BENCH = "fake_op:FakeBench"
PREPARE = Job("prepare", example(), example(n=300))


def trial(width: int) -> Job:
    config = Config(64, width)
    return Job("trial", example(), example(n=300), (config,), (config,), 0, 7)


def run(jobs: list[Job], indices: tuple[int, ...] = (0,), limit: float = 1.0) -> dict[int, Reply]:
    with Workers("fake_op:op", BENCH, indices, PREPARE, limit) as workers:
        return {job.configs[0].width: reply for job, reply in workers.run(jobs)}


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield lambda text: monkeypatch.setenv("FAKE_OP_FAULTS", text)


def test_trial_and_time_reply_with_figures() -> None:
    together = Job("time", example(), configs=(Config(64, 3), Config(32, 1)), rounds=20)
    with Workers("fake_op:op", BENCH, (0,), PREPARE, 5.0) as workers:
        (_, first), (_, both) = workers.run([trial(3), together])
    assert first.status is Status.ok and first.timings[0].median_ms == true_ms(10007, 64, 3) and first.timings[0].samples == 7
    assert first.check is not None and first.check.relative == 1e-4 and first.reference_ms == 0.05
    assert [t.median_ms for t in both.timings] == [true_ms(10007, 64, 3), true_ms(10007, 32, 1)]


@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [
        ("crash", Status.crash, "signal SIGABRT"),
        ("bug", Status.crash, "ZeroDivisionError: in the op's own check"),
        ("sticky", Status.crash, "sticky error"),
        ("hang", Status.timeout, "no answer within 1 s"),
        ("launch", Status.launch, "launch error"),
        ("wrong", Status.wrong, "relative error 1.00e+00 (bound 1e-03)"),
        ("unrepeatable", Status.wrong, "two runs differ"),
    ],
)
def test_a_bad_config_costs_itself_alone(faults: Any, fault: str, status: Status, reason: str) -> None:
    faults(f"2={fault}")
    replies = run([trial(1), trial(2), trial(3)])
    assert replies[2].status is status and reason in replies[2].reason
    assert replies[1].status is replies[3].status is Status.ok


def test_only_the_dead_are_replaced(faults: Any) -> None:
    faults("2=crash,4=wrong")
    with Workers("fake_op:op", BENCH, (0,), PREPARE, 5.0) as workers:
        assert len(list(workers.run([trial(n) for n in (1, 2, 3, 4)]))) == 4
        assert workers.replaced == 1


def test_a_crash_while_several_are_timed_names_the_config(faults: Any) -> None:
    faults("2=crash later")
    job = Job("time", example(), configs=(Config(64, 1), Config(64, 2), Config(64, 3)), rounds=3)
    with Workers("fake_op:op", BENCH, (0,), PREPARE, 5.0) as workers:
        ((_, reply),) = workers.run([job])
    assert (reply.status, reply.at) == (Status.crash, 1)


def test_two_workers_share_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_OP_SECONDS", "0.4")
    with Workers("fake_op:op", BENCH, (0, 1), PREPARE, 5.0) as workers:
        list(workers.run([trial(1), trial(2)]))  # both processes are up
        begin = time.monotonic()
        assert len(list(workers.run([trial(n) for n in (1, 2, 3, 4)]))) == 4
        assert time.monotonic() - begin < 1.4


def test_a_worker_that_cannot_begin_ends_the_sweep(faults: Any) -> None:
    faults("0=prepare")
    with pytest.raises(SweepError, match=r"GPU 0 cannot begin: no such GPU"):
        run([trial(1)])
    missing = Workers("fake_op:op", "fake_op:Missing", (0,), PREPARE, 5.0)
    with missing as workers, pytest.raises(SweepError, match="cannot begin.*names nothing"):
        list(workers.run([trial(1)]))


def test_workers_die_with_their_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import os, sys, test_worker as t\n"
        "w = t.Workers('fake_op:op', t.BENCH, (0,), t.PREPARE, 60.0)\n"
        "list(w.run([t.trial(1)]))\n"
        "print(w._idle[0]._child.process.pid, flush=True)\n"
        "list(w.run([t.trial(2)]))\n"
    )
    monkeypatch.setenv("FAKE_OP_FAULTS", "2=hang")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    until = time.monotonic() + 5
    while Path(f"/proc/{child}").exists() and time.monotonic() < until and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        time.sleep(0.05)
    assert time.monotonic() < until


def test_ops_are_found_by_name() -> None:
    assert reference_of(op) == "fake_op:op" and resolve("fake_op:op") is op
    hidden = Op.of(fake, **{name: getattr(op, name) for name in ("inputs", "outputs", "sample", "reference", "check", "small", "example")})
    with pytest.raises(ArgumentError, match="top level"):
        reference_of(hidden)


def test_ops_are_found_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from fake_op import fake, FUNCTIONS, Problem\nimport dataclasses\nfrom vidrial.spec.op import Op\n"
        "class Mine(Problem): pass\nkernel = dataclasses.replace(fake, problem=Mine)\nmine = Op.of(kernel, **FUNCTIONS)\n"
    )
    found = resolve(f"{file}:mine")
    assert found.name == "fake" and reference_of(found) == f"{file}:mine"


@pytest.mark.parametrize("name", ["nonsense", "no_such_module:op", "fake_op:no_such_op", "/no/such/file.py:op", ":op"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match="module:attribute"):
        resolve(name)
