from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from fake_op import Config, PartsConfig, Problem, example, op, parts_op
from hypothesis import given
from hypothesis import strategies as st

from vidrial.dtypes import DType
from vidrial.errors import SweepError
from vidrial.spec.op import Check
from vidrial.tune.codec import decode, encode
from vidrial.tune.journal import Journal
from vidrial.tune.timing import Timing
from vidrial.tune.trial import KernelResources, Status, Trial, latest, passing_failures

HEADER = {"digest": "0", "device": "d", "problem": encode(example())}


def trial(tile: int = 128, ms: float = 1.0, status: Status = Status.ok, **fields: Any) -> Trial:
    timing = Timing(ms, 0.01, 7) if status is Status.ok else None
    return Trial("fake", example(), Config(tile), status, timing=timing, **fields)


def test_a_trial_survives_json_field_by_field() -> None:
    config = PartsConfig(64, Config(32, 3), Config(96, 2))
    problem, check = Problem(DType.bfloat16, 17, 0.125), Check(math.inf, 2.0, 1e-3, 1e-3)
    full = Trial(
        "fake_parts",
        problem,
        config,
        Status.wrong,
        "final",
        Timing(1.25, 0.5, 9),
        check,
        "why",
        (KernelResources("fake", 255, 16, 1024),),
        0.07,
        "sm_90a",
        3,
        "vidrial 1",
        "2025-01-01T00:00:00+00:00",
    )
    text = json.dumps(encode(full), allow_nan=False)
    assert Trial.from_json(parts_op, json.loads(text)) == full
    assert json.loads(text)["problem"] == {"dtype": "bfloat16", "n": 17, "scale": 0.125}
    assert json.loads(text)["config"]["first"] == {"tile": 32, "width": 3}


def test_nan_errors_survive() -> None:
    back = Trial.from_json(
        op, json.loads(json.dumps(encode(trial(status=Status.wrong, check=Check(math.nan, 0.0, 1.0, 1.0))), allow_nan=False))
    )
    assert back.check is not None and math.isnan(back.check.relative)


class Mode(enum.Enum):
    up = 1
    down = 2


@dataclasses.dataclass(frozen=True)
class Everything:
    flag: bool
    count: int
    share: float
    word: str
    mode: Mode
    dtype: DType
    three: tuple[int, int, int]
    many: tuple[Mode, ...]
    perhaps: int | None


@given(st.builds(Everything, share=st.floats(allow_nan=False), count=st.integers(), many=st.lists(st.sampled_from(Mode)).map(tuple)))
def test_every_type_survives(value: Everything) -> None:
    assert decode(Everything, json.loads(json.dumps(encode(value), allow_nan=False))) == value


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (int, True),
        (bool, 1),
        (int, 1.5),
        (str, 3),
        (Mode, "left"),
        (Literal["one", "dynamic"], "static"),
        (Literal[1, 2], True),
        (Literal["one"], ["one"]),
        (tuple[int, int], [1]),
        (tuple[int, ...], 3),
        (Config, {"tile": 128, "width": 1, "more": 2}),
        (Config, {"tile": "128", "width": 1}),
        (Config, [128, 1]),
        (float, "abc"),
        (float, "1.5"),
        (float, True),
        (float, 10**400),
        (float, ["nan"]),
    ],
)
def test_what_is_not_of_the_type_is_refused(kind: Any, data: Any) -> None:
    with pytest.raises(SweepError):
        decode(kind, data)


def test_a_literal_is_one_of_its_values() -> None:
    assert [decode(Literal["one", "dynamic"], encode(value)) for value in ("one", "dynamic")] == ["one", "dynamic"]
    assert decode(Literal[1, True], True) is True


def test_only_plain_values_are_kept() -> None:
    with pytest.raises(SweepError, match="cannot be kept"):
        encode({"x": object()})


def test_latest_prefers_failures_then_the_last_timing() -> None:
    good, better = trial(128, 1.0), trial(128, 0.9, phase="confirm")
    rechecked = dataclasses.replace(trial(128), timing=None, phase="recheck")
    wrong, crashed = trial(64, status=Status.wrong), trial(32, status=Status.crash)
    found = latest([good, better, rechecked, trial(64), wrong, trial(64, 0.1), trial(32), crashed])
    assert found == {Config(128): better, Config(64): wrong, Config(32): crashed}
    # What failed by something that may pass counts until it is tried again.
    assert latest([crashed, trial(32, 0.7)]) == {Config(32): trial(32, 0.7)}
    assert passing_failures([crashed, trial(32, 0.7), wrong]) == {}
    assert passing_failures([crashed, trial(96), crashed, trial(64, status=Status.stopped)]) == {Config(32): 2, Config(64): 1}


def test_journal_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "j.jsonl"
    written = [trial(128), trial(64, status=Status.timeout, reason="hangs"), trial(32, 2.0)]
    with Journal(path, op, HEADER) as journal:
        for t in written:
            journal.append(t)
    with Journal(path, op, HEADER) as journal:
        assert journal.trials == written
    assert len(path.read_text().splitlines()) == 4


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_torn_last_line_is_dropped_and_written_over(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path, op, HEADER) as journal:
        journal.append(trial(128))
        journal.append(trial(64))
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(path, op, HEADER) as journal:
        assert journal.trials == [trial(128)]
        journal.append(trial(32))
    with Journal(path, op, HEADER) as journal:
        assert journal.trials == [trial(128), trial(32)]


def test_a_torn_header_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"kind": "vidrial jou')
    with Journal(path, op, HEADER) as journal:
        journal.append(trial())
    with Journal(path, op, HEADER) as journal:
        assert journal.trials == [trial()]


def changed(*path: Any, to: Any) -> str:
    """A good trial's line with one value in it changed."""
    data: Any = encode(trial(64, check=Check(1e-4, 0.0, 1e-3, 1e-3), resources=(KernelResources("fake", 32, 0, 0),)))
    place = data
    for step in path[:-1]:
        place = place[step]
    assert path[-1] in place or isinstance(place, list)
    place[path[-1]] = to
    return json.dumps(data)


BAD_VALUES = [
    *(changed("timing", "median_ms", to=value) for value in (0, -1.0, "nan", "inf", "abc", 10**400, None, True)),
    *(changed("timing", name, to=value) for name, value in (("iqr_ms", -1e-9), ("iqr_ms", "inf"), ("samples", 0), ("samples", 1.5))),
    *(changed("check", name, to=value) for name, value in (("relative", 1.0), ("relative", "nan"), ("max_error_bound", -1.0))),
    *(changed("reference_ms", to=value) for value in (-1.0, "nan", "-inf")),
    changed("resources", 0, "registers", to=-1),
    changed("status", to="fine"),
    changed("status", to=["ok"]),
    changed("problem", to=[]),
    changed("config", "tile", to=[64]),
]


@pytest.mark.parametrize("damage", ["{nonsense", '{"op": "fake"}', "[]", "\x00\x00", "[" * 200_000, *BAD_VALUES])
def test_damage_in_the_middle_is_named_and_nothing_is_lost(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path, op, HEADER) as journal:
        for tile in (128, 64, 32):
            journal.append(trial(tile))
    lines = path.read_text().splitlines()
    lines[2] = damage
    path.write_text("\n".join(lines) + "\n")
    before = path.read_bytes()
    with pytest.raises(SweepError, match=r"line 3 is damaged.*delete that line"):
        Journal(path, op, HEADER)
    assert path.read_bytes() == before
    path.write_text("\n".join(lines[:2] + lines[3:]) + "\n")
    with Journal(path, op, HEADER) as journal:
        assert [t.config.tile for t in journal.trials] == [128, 32]


@pytest.mark.parametrize(
    ("change", "said"), [({"device": "other"}, "device 'd'"), ({"digest": "1"}, "digest"), ({"schema": 99}, "schema 3, this sweep 99")]
)
def test_another_sweeps_journal_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "j.jsonl"
    Journal(path, op, HEADER).close()
    with pytest.raises(SweepError, match=said):
        Journal(path, op, HEADER | change)


def test_what_is_no_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_text('{"a": 1}\n')
    with pytest.raises(SweepError, match="not a journal"):
        Journal(path, op, HEADER)
    assert path.read_text() == '{"a": 1}\n'


USERS = {
    "a one-line JSON file": b'{"months": "of work"}',
    "notes without an end": b"line 1\nthe last line",
    "one word": b"x",
    "a NumPy file": b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}\n\x00\x00\x80?",
    "nested JSON": b"[" * 200_000,
    "nested JSON, a line": b"[" * 200_000 + b"\n",
    "another journal": b'{"kind": "another journal"}\n{"a": 1}\n{"torn',
    "another sweep's, torn": json.dumps({"kind": "vidrial journal", "schema": 3, "op": "other", **HEADER}).encode() + b'\n{"torn',
    "another schema's, torn": json.dumps({"kind": "vidrial journal", "schema": 2, "op": "fake", **HEADER}).encode() + b'\n{"torn',
}


@pytest.mark.parametrize("case", USERS)
def test_a_users_file_keeps_every_byte(case: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(USERS[case])
    with pytest.raises(SweepError, match=r"not a journal|has op 'other'|of schema 2"):
        Journal(path, op, HEADER)
    assert path.read_bytes() == USERS[case] and [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_what_is_no_file_is_no_journal(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        with pytest.raises(SweepError, match="not a journal"):
            Journal(path, op, HEADER)


def test_a_trial_of_another_problem_is_refused_and_of_an_outdated_choice_left_out(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path, op, HEADER) as journal:
        journal.append(trial(64))
        journal.append(dataclasses.replace(trial(64), config=Config(65)))
    with Journal(path, op, HEADER) as journal:
        assert journal.trials == [trial(64)] and journal.outdated == 1
        journal.append(dataclasses.replace(trial(32), problem=example(n=17)))
    before = path.read_bytes()
    with pytest.raises(SweepError, match="n=17"):
        Journal(path, op, HEADER)
    assert path.read_bytes() == before


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path, op, HEADER) as journal:
        journal.append(trial())
        with pytest.raises(SweepError, match="in use by another sweep"):
            Journal(path, op, HEADER)
        with pytest.raises(SweepError, match="in use by another sweep"):
            Journal(path, op, HEADER, fresh=True)
    with Journal(path, op, HEADER) as journal:
        assert len(journal.trials) == 1


def test_a_fresh_journal_sets_the_old_one_aside(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path, op, HEADER) as journal:
        journal.append(trial())
    with Journal(path, op, HEADER, fresh=True) as journal:
        assert journal.trials == []
    (aside,) = set(tmp_path.iterdir()) - {path}
    with Journal(aside, op, HEADER) as journal:
        assert journal.trials == [trial()]


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SweepError, match=r"cannot be written.*journal="):
        Journal(tmp_path / "file" / "j.jsonl", op, HEADER)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from fake_op import op
from test_trial import HEADER, trial
from vidrial.errors import SweepError
from vidrial.tune.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Journal(Path(sys.argv[1]), op, HEADER) as journal:
    journal.append(trial(128))
    size = Path(sys.argv[1]).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, size + 50))
    try:
        journal.append(trial(64))
    except SweepError as error:
        print(error)
"""


def test_a_full_disk_keeps_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    here = str(Path(__file__).parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([here, *sys.path])}
    ended = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], env=environment, capture_output=True, text=True, timeout=60)
    assert "its 1 trials are kept" in ended.stdout, ended.stderr
    with Journal(path, op, HEADER) as journal:
        assert journal.trials == [trial(128)]
