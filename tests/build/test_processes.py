"""The child process: how it answers, how it ends, and what it leaves."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from vidrial.build.processes import Child, Ended, ready

PROGRAM = """
import os, sys, time
def server(send, name, folder=None):
    def answer(request):
        if request == "die":
            print("no such luck", file=sys.stderr)
            os._exit(3)
        if request == "sleep":
            time.sleep(60)
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
