"""The child process: how it answers, how it ends, and what it leaves."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from vidrial.build import processes
from vidrial.build.processes import Child, Ended, ready

PROGRAM = """
import json, os, subprocess, sys, time
descriptor = json.loads(sys.argv[1])["descriptor"]
def server(send, name, folder=None):
    def answer(request):
        if request == "die":
            print("no such luck", file=sys.stderr)
            os._exit(3)
        if request == "sleep":
            time.sleep(60)
        if request == "half":
            os.write(int(descriptor), b'{"half": "of a mess')
            time.sleep(60)
        if request == "raise":
            raise OSError(5, "a disk's own error")
        if request == "hang up":
            os.close(int(descriptor))
            time.sleep(60)
        if request == "grandchild":
            return subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL).pid
        send({"before": name})
        return [request, folder]
    return answer
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "answers.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(str(tmp_path))
    child = Child("answers:server", "mine", environment=os.environ | {"HOME": "/nowhere"}, folder=True)
    yield child
    child.stop()


def test_without_a_folder_nothing_is_left_of_one_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "answers.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for folder in (False, True):
        child = Child("answers:server", "mine", folder=folder)
        child.process.kill()
        child.process.wait()
        assert len(list((tmp_path / "temporary").iterdir())) == int(folder)
        child.stop()
        assert not list((tmp_path / "temporary").iterdir())


def test_it_answers_one_request_after_another(child: Child) -> None:
    for request in ("a", {"b": [1, None]}):
        child.ask(request, 30.0)
        told = []
        while len(told) < 2:
            told += [c.receive() for c in ready([child])]
        assert told[0] == {"before": "mine"} and told[1][0] == request
    folder = Path(told[1][1])
    assert folder.is_dir() and child.alive and os.getsid(child.process.pid) == child.process.pid
    child.stop()
    assert not folder.exists() and not child.alive


def test_its_end_is_told_with_its_last_words(child: Child) -> None:
    child.ask("die", 30.0)
    assert ready([child]) == [child]
    with pytest.raises(Ended, match="^exit code 3: no such luck$") as ended:
        child.receive()
    assert not ended.value.late


def answer(child: Child, request: Any) -> Any:
    child.ask(request, 30.0)
    told = []
    while len(told) < 2:
        told += [c.receive() for c in ready([child])]
    return told[1]


def test_half_a_message_is_waited_for_no_longer_than_a_whole_one(child: Child) -> None:
    answer(child, "a")
    begin = time.monotonic()
    child.ask("half", 0.5)
    assert ready([child]) == [child] and 0.4 < time.monotonic() - begin < 5
    with pytest.raises(Ended, match="signal SIGKILL") as ended:
        child.receive()
    assert ended.value.late and not child.alive


def test_a_request_that_is_not_read_is_given_up(child: Child) -> None:
    """Stopped in the middle of a request of more bytes than the connection holds."""
    answer(child, "a")
    os.kill(child.process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    child.ask("x" * 50_000_000, 0.5)
    assert ready([child]) == [child] and time.monotonic() - begin < 10
    with pytest.raises(Ended) as ended:
        child.receive()
    assert ended.value.late and not child.alive


def test_one_that_hangs_up_and_stays_is_ended(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "END_SECONDS", 0.3)
    answer(child, "a")
    child.ask("hang up", 30.0)
    begin = time.monotonic()
    assert ready([child]) == [child]
    with pytest.raises(Ended):
        child.receive()
    assert time.monotonic() - begin < 10 and not child.alive


def test_its_own_exception_comes_with_its_traceback(child: Child) -> None:
    child.ask("raise", 30.0)
    assert ready([child]) == [child]
    with pytest.raises(Ended, match=r"^exit code 1: OSError: \[Errno 5\] a disk's own error$") as ended:
        child.receive()
    assert "answers.py" in ended.value.raised and "in answer" in ended.value.raised and not ended.value.late


def test_what_it_has_begun_ends_with_it(child: Child) -> None:
    pid, _ = answer(child, "a"), child.ask("grandchild", 30.0)
    assert ready([child])
    pid = child.receive()
    child.stop()
    until = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" and time.monotonic() < until:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}/stat").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


def test_a_forked_child_lets_go_of_it_alone(child: Child) -> None:
    folder = answer(child, "a")[1]
    if (pid := os.fork()) == 0:
        child.stop()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert child.alive and Path(folder).is_dir() and answer(child, "b")[0] == "b"


def test_a_request_to_one_that_is_gone_ends_at_once(child: Child) -> None:
    child.process.kill()
    child.process.wait()
    child.ask("a", 30.0)
    assert ready([child]) == [child]
    with pytest.raises(Ended, match="signal SIGKILL") as ended:
        child.receive()
    assert not ended.value.late


def test_one_that_is_late_is_stopped(child: Child) -> None:
    child.ask("a", 30.0)
    for _ in range(2):
        assert ready([child]) and child.receive()
    begin = time.monotonic()
    child.ask("sleep", 0.2)
    assert ready([child]) == [child] and 0.1 < time.monotonic() - begin < 5
    with pytest.raises(Ended, match="signal SIGKILL") as ended:
        child.receive()
    assert ended.value.late and not child.alive
