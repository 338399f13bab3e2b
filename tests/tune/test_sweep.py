from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_op
import numpy as np
import pytest
from fake_op import H200, Config, PartsConfig, example, op, parts_ms, parts_op, picky_op, true_ms
from killed_worker import Killer

from vidrial.build.pool import CompilePool
from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.errors import ArgumentError, ArgumentTypeError, ConfigError, NoValidConfig, SweepError
from vidrial.spec.choices import configs, neighbours
from vidrial.tune import options as sweep_options
from vidrial.tune.candidates import check_configs
from vidrial.tune.measure import block_difference
from vidrial.tune.options import Options
from vidrial.tune.pick import choose_config
from vidrial.tune.ranking import Ranking, local
from vidrial.tune.search import Search
from vidrial.tune.sweeper import sweep, sweep_lengths
from vidrial.tune.trial import Status
from vidrial.tune.workers import Workers

FAKE = Options(device=H200, bench="fake_op:FakeBench", limit=1.0)
N = 10007
BEST = min(true_ms(N, c.tile, c.width) for c in configs(Config))


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "cache"))
    yield


def test_a_sweep_finds_the_fastest_and_the_call_takes_it() -> None:
    result = sweep(op, example(), FAKE)
    assert result.winner.ms == BEST and len(result.ranked) == 16 and not result.failures
    assert [r.timing.median_ms for r in result.ranked][0] == BEST
    assert result.worst_ms == max(true_ms(N, c.tile, c.width) for c in configs(Config))
    assert choose_config(op, example(), H200) == (result.winner.config, "ranking")
    assert {t.phase for t in result.trials} >= {"screen", "confirm", "final", "recheck"}
    assert all(t.device == H200.key and t.versions.startswith("vidrial ") and t.time.endswith("+00:00") for t in result.trials)


def test_the_table_shows_winners_errors_and_the_worst() -> None:
    result = sweep(op, example(), FAKE)
    lines = result.table(rows=3).splitlines()
    assert len([line for line in lines if "tile=" in line]) == 3
    assert f"{BEST:.4f}" in lines[1] and "1.00" in lines[1] and "1.0e-04" in lines[1]
    assert f"takes {result.worst_ms / BEST:.1f} times as long" in result.table()


def test_faults_are_recorded_by_cause_and_the_sweep_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_OP_FAULTS", "1=wrong,2=crash,4=launch")
    result = sweep(op, example(), FAKE)
    assert result.failures == {Status.wrong: 4, Status.crash: 4, Status.launch: 4}
    assert result.winner.ms == BEST and result.winner.config.width == 3
    assert any("replaced 4 times" in note for note in result.notes)


def test_a_hang_is_stopped_and_blocked_after_a_second_chance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAKE_OP_FAULTS", "2=hang")
    monkeypatch.setenv("FAKE_OP_LOG", str(tmp_path / "log"))
    only = [Config(64, 1), Config(64, 2), Config(64, 3)]
    first = sweep(op, example(), FAKE, configs=only)
    assert first.failures == {Status.timeout: 1} and first.winner.config == Config(64, 3)
    assert not first.blocked and any("1 configs ended" in note and "--resume" in note for note in first.notes)
    counts = []
    for changes in ({"resume": True}, {"resume": True}, {"retry": True}):
        again = sweep(op, example(), FAKE, configs=only, **changes)
        counts.append(sum(t.status is Status.timeout for t in again.trials))
        assert again.failures == {Status.timeout: 1} and list(again.blocked) == [Config(64, 2)]
        assert again.blocked[Config(64, 2)].startswith("timeout: no answer within 1 s")
        assert any("blocked until --retry" in note and "tile=64 width=2: timeout: no answer" in note for note in again.notes)
    # Once by itself, once by --resume, never again but by --retry.
    assert counts == [2, 2, 3]


@pytest.mark.parametrize("fault", ["launch", "hang", "crash", "sticky"])
def test_what_passes_costs_a_config_nothing(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    three = [Config(64, 1), Config(64, 2), Config(64, 3)]
    monkeypatch.setenv("FAKE_OP_FAULTS", f"3={fault}")
    first = sweep(op, example(), FAKE, configs=three)
    assert first.winner.config == Config(64, 2) and len(first.failures) == 1
    monkeypatch.setenv("FAKE_OP_FAULTS", "")
    again = sweep(op, example(), FAKE, configs=three, resume=True)
    assert again.winner.config == Config(64, 3) and not again.failures and not again.blocked
    assert choose_config(op, example(), H200).config == Config(64, 3)
    # The whole search gives it too, and a config that is right again is checked on other inputs before it wins.
    assert [t.phase for t in again.trials if t.config == Config(64, 3)][-2:] == ["recheck", "compare"]


def test_what_stays_wrong_gets_no_second_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_OP_FAULTS", "3=wrong")
    sweep(op, example(), FAKE)
    monkeypatch.setenv("FAKE_OP_FAULTS", "")
    again = sweep(op, example(), FAKE, retry=True)
    assert again.failures == {Status.wrong: 4} and again.winner.config.width != 3


def test_a_search_that_goes_on_gives_second_chances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_OP_FAULTS", "3=crash")
    assert sweep(op, example(), FAKE).winner.config.width != 3
    monkeypatch.setenv("FAKE_OP_FAULTS", "")
    again = sweep(op, example(), FAKE, resume=True)
    assert again.winner.ms == BEST and not again.failures


def test_a_compiler_that_was_stopped_is_no_config_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool's limit is too short once, as on a busy machine; the bench is one that needs cubins."""
    monkeypatch.setattr(fake_op.FakeBench, "needs_cubins", True)
    two = [Config(64, 1), Config(64, 3)]
    with monkeypatch.context() as patch:
        patch.setattr(CompilePool.__init__, "__defaults__", (None, 0.01))
        with pytest.raises(NoValidConfig, match="2 stopped"):
            sweep(op, example(n=10009), FAKE, configs=two)
    again = sweep(op, example(n=10009), FAKE, configs=two, resume=True)
    assert again.winner.config == Config(64, 3) and not again.failures


def test_all_failed_counts_the_causes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_OP_FAULTS", "1=wrong,2=wrong,3=launch,4=wrong")
    with pytest.raises(NoValidConfig, match=r"all 16 configs failed.*12 wrong, 4 launch.*Most often \(12\): relative error 1.00e\+00"):
        sweep(op, example(), FAKE)
    with pytest.raises(NoValidConfig, match=r"no config is legal.*tile="):
        sweep(op, example(n=31), FAKE)


def test_a_winner_that_fails_on_other_inputs_does_not_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_OP_FAULTS", "3=wrong later")
    result = sweep(op, example(), FAKE)
    assert result.winner.config.width in (2, 4) and Status.wrong in result.failures
    assert any("did not pass on other inputs" in note for note in result.notes)


def test_a_config_that_is_wrong_at_size_alone_does_not_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the small problem it is right, and it is the fastest."""
    monkeypatch.setenv("FAKE_OP_FAULTS", "3=wrong at size")
    result = sweep(op, example(), FAKE)
    assert result.winner.config.width in (2, 4) and Status.wrong in result.failures
    assert any("is wrong at the problem itself" in note for note in result.notes)
    compared = [t for t in result.trials if t.phase == "compare"]
    assert [t.config for t in compared if t.status is Status.ok] == [result.winner.config]
    assert all(t.config.width == 3 for t in compared if t.status is Status.wrong) and len(compared) > 1
    assert "at the problem itself it differs from tile=" in next(t.reason for t in compared if t.status is Status.wrong)
    assert choose_config(op, example(), H200).config == result.winner.config
    # Below that size nothing is wrong with it.
    assert sweep(op, example(n=1009), FAKE).winner.config.width == 3


def test_the_witness_that_is_wrong_at_size_is_found_out_by_a_third(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_OP_FAULTS", "1=wrong at size")
    three = [Config(96, 3), Config(64, 1), Config(96, 2)]
    result = sweep(op, example(), FAKE, configs=three)
    assert result.winner.config == Config(96, 3) and result.failures == {Status.wrong: 1}
    assert {t.config: t.status for t in result.trials if t.phase == "compare"} == {Config(96, 3): Status.ok, Config(64, 1): Status.wrong}
    assert not any("was fastest" in note for note in result.notes)
    again = sweep(op, example(), FAKE, configs=three, resume=True)
    assert [t for t in again.trials if t.phase == "compare"] == [t for t in result.trials if t.phase == "compare"], "compared once"


@pytest.mark.parametrize(("fault", "right"), [("3=wrong at size", False), ("1=wrong at size", True)])
def test_a_sweep_of_one_config_compares_it_with_others_that_cannot_win(fault: str, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_OP_FAULTS", fault)
    if right:
        result = sweep(op, example(), FAKE, configs=[Config(64, 3)])
        assert {t.config for t in result.trials if t.timing} == {Config(64, 3)} == {r.config for r in result.ranked}
    else:
        with pytest.raises(NoValidConfig, match="differs from tile="):
            sweep(op, example(), FAKE, configs=[Config(64, 3)])


def test_of_two_that_differ_neither_wins_where_nobody_else_can_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_OP_FAULTS", "1=wrong,2=wrong,3=wrong at size")
    two = dataclasses.replace(FAKE, configs=[Config(32, 3), Config(32, 4)])
    monkeypatch.setattr("vidrial.tune.session.WITNESSES", 0)
    with pytest.raises(NoValidConfig, match="2 wrong"):
        sweep(op, example(), two)


def test_what_cannot_be_compared_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_OP_FAULTS", "3=crash at size")
    result = sweep(op, example(), FAKE)
    assert result.winner.config.width == 3
    assert any("was not compared at the problem itself: out of memory" in note for note in result.notes)
    monkeypatch.setenv("FAKE_OP_FAULTS", "")
    monkeypatch.setattr("vidrial.tune.session.WITNESSES", 0)
    alone = sweep(op, example(), FAKE, configs=[Config(64, 3)])
    assert any("no other config is there to compare it with" in note for note in alone.notes)


def test_blocks_that_differ() -> None:
    rng = np.random.default_rng(0)
    right = rng.standard_normal(3_000_001).astype(np.float32)
    near = right * (1 + 1e-3 * rng.standard_normal(right.size).astype(np.float32))
    assert 5e-4 < block_difference(np, right, near, DType.float32) < 2e-3
    assert block_difference(np, right, right, DType.float32) == 0.0 == block_difference(np, right[:0], right[:0], DType.float32)

    def spoiled(at: slice, value: float) -> float:
        wrong = near.copy()
        wrong[at] = value
        return block_difference(np, right, wrong, DType.float32)

    # A row of 64, the last one too; one element that is no number.
    assert spoiled(slice(1_000_000, 1_000_064), 0.0) > 0.15 and spoiled(slice(right.size - 64, None), 5.0) > 0.15
    assert spoiled(slice(77, 78), np.nan) == math.inf and spoiled(slice(77, 78), np.inf) == math.inf
    both = right.copy()
    both[5:9] = -np.inf
    assert block_difference(np, both, both, DType.float32) == 0.0, "as the lse of a row without keys"
    both[5] = np.nan
    assert block_difference(np, both, both, DType.float32) == math.inf, "nobody has written it"
    # A block that is nearly nothing beside the others is compared with what they are.
    small = right.copy()
    small[:1024] *= 1e-6
    assert block_difference(np, small, np.where(np.arange(small.size) < 1024, 0.0, small).astype(np.float32), DType.float32) < 1e-3
    bits = (right.view(np.uint32) >> 16).astype(np.uint16)
    assert block_difference(np, bits, bits, DType.bfloat16) == 0.0
    assert (
        0.1
        < block_difference(
            np, bits, (bits.astype(np.uint32) * np.where(np.arange(bits.size) // 64 == 9, 0, 1)).astype(np.uint16), DType.bfloat16
        )
        < 0.4
    )
    whole = np.arange(5000, dtype=np.int32)
    assert block_difference(np, whole, whole + (whole == 4999), DType.int32) > 0.0


def test_ties_are_said() -> None:
    result = sweep(op, example(), FAKE, configs=[Config(64, 4), Config(64, 2)])
    assert result.tied and result.winner.config == Config(64, 2)
    assert any("2 configs tie for the first place" in note for note in result.notes)


def test_parts_are_varied_one_at_a_time() -> None:
    every = [PartsConfig(c, a, b) for c in (256, 64, 1024, 0) for a in configs(Config) for b in configs(Config)]
    best = min(parts_ms(N, c) for c in every)
    result = sweep(parts_op, example(), FAKE, trials=48)
    assert len({t.config for t in result.trials}) <= 48
    assert result.winner.ms <= 1.03 * best
    # With no chunks the first part is not used: its variants are one config.
    assert sum(c.chunk == 0 for c in {t.config for t in result.trials}) <= 16
    thorough = sweep(parts_op, example(), FAKE, exhaustive=True)
    assert thorough.winner.ms == best and len({t.config for t in thorough.trials}) < len(every) / 4


def test_budgets_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({t.config for t in sweep(op, example(), FAKE, trials=5).trials}) == 5
    monkeypatch.setenv("FAKE_OP_SECONDS", "0.2")
    begin = time.monotonic()
    result = sweep(op, example(), FAKE, seconds=1.5)
    assert time.monotonic() - begin < 4.5 and 1 <= len({t.config for t in result.trials}) < 12


def test_an_exhaustive_sweep_says_what_it_left_out() -> None:
    assert (
        "the budget ended before every config was tried: at least 11 are left"
        in sweep(op, example(), FAKE, exhaustive=True, trials=5).notes
    )
    assert not any("are left" in note for note in sweep(op, example(), FAKE, exhaustive=True).notes)


def test_neighbours_differ_in_one_choice() -> None:
    found = list(neighbours(PartsConfig()))
    assert len(found) == len(set(found)) == 3 + 2 * (3 + 3)
    assert PartsConfig(256, Config(64), Config()) in found and PartsConfig() not in found


def test_the_search_leaves_failures_behind() -> None:
    search = Search(parts_op, example(), H200, 40)
    seen: dict[Any, float] = {}
    while batch := search.propose(seen)[: 40 - len(seen)]:
        seen |= {c: float("inf") if c.first.width == 1 and c.chunk else parts_ms(N, c) for c in batch}
    assert min(seen.values()) < 1.1 * min(parts_ms(N, c) for c in configs(PartsConfig) if c.first.width != 1)


def test_proxies_cover_the_binaries_of_a_config_too_large_for_the_small_problem() -> None:
    small = parts_op.small(example())
    config = PartsConfig(1024, Config(64, 3), Config(32, 2))
    legal = dataclasses.replace(config, chunk=64)
    assert check_configs(parts_op, small, example(), legal, H200) == (legal,)
    found = check_configs(parts_op, small, example(), config, H200)
    assert found == (dataclasses.replace(config, chunk=256),)
    assert check_configs(op, example(n=40), example(), Config(64), H200) == ()


def test_what_cannot_be_checked_is_not_timed() -> None:
    result = sweep(picky_op, example(), FAKE)
    assert result.failures == {Status.rejected: 4} and result.winner.config.tile != 128


# A shell that runs a command in the background leaves it deaf to SIGINT, and so are its children.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from fake_op import *
from vidrial.tune.options import Options
from vidrial.tune.sweeper import sweep
result = sweep(op, example(), Options(device=H200, bench="fake_op:FakeBench", journal=sys.argv[1], resume=sys.argv[2] == "resume"))
print(result.winner.ms)
"""


def spawn(journal: Path, how: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    arguments = [sys.executable, "-c", PROGRAM, str(journal), how]
    return subprocess.Popen(arguments, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_stopped_at_any_moment_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    log, journal = tmp_path / "log", tmp_path / "j.jsonl"
    monkeypatch.setenv("FAKE_OP_LOG", str(log))
    monkeypatch.setenv("FAKE_OP_SECONDS", "0.1")
    # The sweep must not have ended when the signal comes, however late this process sees that it has begun.
    monkeypatch.setenv("FAKE_OP_LATER_SECONDS", "10")
    with spawn(journal, "fresh") as stopped:
        until = time.monotonic() + 30
        while time.monotonic() < until and (not journal.exists() or journal.read_bytes().count(b"\n") < 6):
            time.sleep(0.01)
        stopped.send_signal(number)
        _, errors = stopped.communicate(timeout=20)
    monkeypatch.delenv("FAKE_OP_LATER_SECONDS")
    assert stopped.returncode != 0
    if number != signal.SIGKILL:
        assert "resume=True" in errors and str(journal) in errors
        assert local(op, {"dtype": example().dtype}, H200), "what was measured is ranked"
    kept = journal.read_bytes().count(b"\n")
    time.sleep(0.5)  # the measuring process ends by itself
    with spawn(journal, "resume") as resumed:
        output, errors = resumed.communicate(timeout=40)
    assert resumed.returncode == 0, errors
    assert float(output) == BEST and kept >= 6
    measured = collections.Counter(line for line in log.read_text().splitlines() if line.startswith("trial"))
    assert len(measured) == 16 and sum(measured.values()) <= 17, measured


@pytest.mark.parametrize("where", ["ranking", "processes", "lengths"])
def test_ctrl_c_when_all_is_measured_keeps_it_and_says_how_to_go_on(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While the ranking is written, or the measuring processes end."""
    interrupted = list[str]()

    def interrupt(right: Callable[..., Any], *arguments: Any) -> Any:
        if not interrupted:
            interrupted.append(where)
            raise KeyboardInterrupt
        return right(*arguments)

    owner, name = (Ranking, "save") if where == "ranking" else (Workers, "close")
    right = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments: interrupt(right, *arguments))
    with pytest.raises(KeyboardInterrupt) as stopped:
        if where == "lengths":
            sweep_lengths(op, [example()], FAKE)
        else:
            sweep(op, example(), FAKE)
    note = "trials are kept in"
    assert interrupted and [note in said for said in stopped.value.__notes__] == [True] and capsys.readouterr().err.count(note) == 1
    (mine,) = local(op, {"dtype": example().dtype}, H200)
    assert mine.measured[0].configs[0].timing.median_ms == BEST
    assert sweep(op, example(), FAKE, resume=True).winner.ms == BEST


def test_two_sweeps_of_the_same_thing_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_OP_SECONDS", "0.2")
    journal = tmp_path / "j.jsonl"
    with spawn(journal, "fresh") as first:
        until = time.monotonic() + 30
        while time.monotonic() < until and not (journal.exists() and journal.stat().st_size):
            time.sleep(0.01)
        with pytest.raises(SweepError, match="in use by another sweep"):
            sweep(op, example(), FAKE, journal=journal)
        monkeypatch.setenv("FAKE_OP_SECONDS", "0")
        assert sweep(op, example(n=5003), FAKE, journal=tmp_path / "other.jsonl").winner.ok
        first.kill()
        first.communicate()


def test_resuming_a_finished_sweep_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sweep(op, example(), FAKE)
    log = tmp_path / "log"
    monkeypatch.setenv("FAKE_OP_LOG", str(log))
    again = sweep(op, example(), FAKE, resume=True)
    assert again.trials == first.trials and again.ranked == first.ranked and not log.exists()
    fresh = sweep(op, example(), FAKE)
    assert fresh.journal == first.journal and log.exists()
    assert len(list(first.journal.parent.glob("fake-*.jsonl"))) == 2, "the first journal is set aside, not lost"


def test_a_journal_with_damage_in_the_middle_is_refused() -> None:
    result = sweep(op, example(), FAKE)
    lines = result.journal.read_text().splitlines()
    lines[3] = lines[3][:40]
    result.journal.write_text("\n".join(lines) + "\n")
    with pytest.raises(SweepError, match="line 4 is damaged"):
        sweep(op, example(), FAKE, resume=True)
    assert result.journal.read_text().splitlines() == lines


def test_lengths_share_their_leaders() -> None:
    lengths = (4001, 16001, 40001)
    found = sweep_lengths(op, [example(n=n) for n in lengths], FAKE, trials=5)
    leaders = {r.config for result in found for r in result.ranked[:2]}
    for result in found:
        assert leaders <= {r.config for r in result.ranked}
    assert choose_config(op, example(n=9999), H200).origin == "model"
    assert choose_config(op, example(n=16001), H200).origin == "ranking"


def test_it_compiles_what_it_needs_and_records_what_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_op.FakeBench, "needs_cubins", True)
    result = sweep(op, example(), FAKE, configs=[Config(64, 3), Config(96, 3), Config(32, 3)], jobs=1)
    assert result.failures == {Status.compile: 1}
    (failed,) = (t for t in result.trials if t.status is Status.compile)
    assert failed.config == Config(96, 3) and "a tile of 96 does not compile" in failed.reason and "fake_op.cu.j2" in failed.reason
    (resources,) = result.winner.resources
    assert resources.kernel == "fake" and 0 < resources.registers <= 32 and resources.spill_bytes == 0


def test_several_gpus_share_one_sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("FAKE_OP_LOG", str(log))
    monkeypatch.setenv("FAKE_OP_FAULTS", "2=crash")
    monkeypatch.setenv("FAKE_OP_SECONDS", "0.1")
    result = sweep(op, example(), FAKE, gpus=3)
    assert result.winner.ms == BEST and result.failures == {Status.crash: 4}
    measured = [line for line in log.read_text().splitlines() if line.startswith("trial")]
    assert len(measured) == len(set(measured)) == 12, "none is measured twice, none is left out"
    assert len(result.journal.read_text().splitlines()) == 1 + len(result.trials)


def test_all_gpus_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_options, "gpu_count", lambda: 2)
    monkeypatch.setenv("FAKE_OP_SECONDS", "0.1")
    result = sweep(op, example(), FAKE, gpus="all")
    assert {t.gpu for t in result.trials} == {"0", "1"} and result.winner.ms == BEST
    # The leaders are timed in turn, so on one GPU.
    assert len({t.gpu for t in result.trials if t.phase == "final"}) == 1


def test_unlike_gpus_are_never_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_options, "gpu_count", lambda: 2)
    kinds = [Device.of("h200"), Device.of("h100")]
    monkeypatch.setattr(Device, "current", classmethod(lambda cls, index=None: kinds[index]))
    with pytest.raises(ArgumentError, match=r"are unlike \(0 h200, 1 h100\): their times do not compare"):
        sweep(op, example(), bench="fake_op:FakeBench", gpus="all")


def test_a_gpu_that_cannot_begin_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_OP_LOST_GPU", "1")
    result = sweep(op, example(), FAKE, gpus=2)
    assert result.winner.ms == BEST and {t.gpu for t in result.trials} == {"0"}
    assert any("GPU 1 was left out: measuring process for GPU 1 cannot begin: it fell off the bus" in note for note in result.notes)
    assert len({t.config for t in result.trials}) == 16, "its jobs ran on the other"
    with pytest.raises(SweepError, match="GPU 1 cannot begin: it fell off the bus"):
        sweep(op, example(), FAKE, gpus=(1,))


def test_resuming_nothing_is_said() -> None:
    assert "there was no journal to go on with: begun anew" in sweep(op, example(), FAKE, resume=True).notes


def test_one_journal_for_several_problems_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="one problem's trials"):
        sweep_lengths(op, [example(n=4001), example(n=9001)], FAKE, journal=tmp_path / "j.jsonl")


def test_each_result_is_handed_over_as_soon_as_it_is_there() -> None:
    told: list[tuple[int, int]] = []
    found = sweep_lengths(
        op, [example(n=n) for n in (4001, 16001)], FAKE, trials=5, done=lambda r: told.append((r.problem.n, len(r.ranked)))
    )
    assert [n for n, _ in told[:2]] == [4001, 16001] and dict(told) == {r.problem.n: len(r.ranked) for r in found}


def test_trials_are_not_put_where_they_end_with_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", "/dev/null/cache")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    monkeypatch.setenv("HOME", "/dev/null")
    with pytest.warns(RuntimeWarning, match="ends with this process"), pytest.raises(SweepError, match="trials would be lost"):
        sweep(op, example(), FAKE)
    assert sweep(op, example(), FAKE, journal=tmp_path / "j.jsonl").winner.ok


def test_progress_is_told() -> None:
    class Listener:
        def __init__(self) -> None:
            self.phases: dict[str, int] = {}
            self.lines: list[str] = []

        def begin(self, phase: str, total: int) -> None:
            self.phases[phase] = total

        def advance(self, text: str) -> None:
            self.lines.append(text)

    listener = Listener()
    sweep(op, example(), FAKE, progress=listener)
    assert listener.phases["measure"] == 16 and {"confirm", "final"} <= listener.phases.keys()
    assert any(line.startswith("tile=64 width=3: 0.0") and line.endswith("ms +- 0.0000") for line in listener.lines)


@pytest.mark.parametrize(
    ("problem", "changes", "error", "said"),
    [
        (example(n=0), {}, ArgumentError, "n=0"),
        (example(n=-5), {}, ArgumentError, "n=-5"),
        ("10007", {}, ArgumentTypeError, "Problem, not str"),
        (example(), {"gpus": 0}, ArgumentError, "gpus=0"),
        (example(), {"gpus": (1, 1)}, ArgumentError, "different CUDA indices"),
        (example(), {"gpus": "both"}, ArgumentError, "gpus='both'.*'all', or different CUDA indices"),
        (example(), {"trials": 0}, ArgumentError, "trials=0"),
        (example(), {"seconds": -1.0}, ArgumentError, "seconds=-1.0; accepted: more than 0"),
        (example(), {"limit": math.nan}, ArgumentError, "limit=nan"),
        (example(), {"trails": 3}, ArgumentTypeError, "trails.*accepted: device, gpus, ray, trials"),
        (example(), {"bench": "fake_op:Nothing"}, ArgumentError, "names nothing"),
        (example(n=100), {"configs": [Config(128)]}, ConfigError, "longer than n=100"),
        (example(), {"journal": "/dev/null/j.jsonl"}, SweepError, "cannot be written"),
    ],
)
def test_bad_input(problem: Any, changes: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        sweep(op, problem, FAKE, **changes)


def test_a_gpu_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="no usable CUDA GPU 77|there is no GPU 77: this process sees CUDA ind"):
        sweep(op, example(), bench="fake_op:FakeBench", gpus=(77,))
    monkeypatch.setattr(sweep_options, "gpu_count", lambda: 2)
    with pytest.raises(ArgumentError, match="there is no GPU 2: this process sees CUDA indices 0 to 1; see nvidia-smi"):
        sweep(op, example(), bench="fake_op:FakeBench", gpus=3)


def test_a_read_only_folder_is_said_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FAKE_OP_LOG", str(tmp_path / "log"))
    with pytest.raises(SweepError, match=r"journal=\.\.\."):
        sweep(op, example(), FAKE, journal=tmp_path / "file" / "j.jsonl")
    assert not (tmp_path / "log").exists()


def test_trials_are_readable_json() -> None:
    result = sweep(op, example(), FAKE, configs=[Config(64, 3)])
    header, first, *_ = (json.loads(line) for line in result.journal.read_text().splitlines())
    assert header["op"] == "fake" and header["device"] == H200.key and header["schema"] == 3
    assert first["config"] == {"tile": 64, "width": 3} and first["status"] == "ok" and first["timing"]["median_ms"] == true_ms(N, 64, 3)


def test_a_config_that_hangs_on_one_gpu_leaves_the_other_going(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_OP_FAULTS", "2=hang,1=crash")
    tried = [Config(64, 2), Config(64, 1), Config(64, 3), Config(32, 3), Config(128, 3)]
    result = sweep(op, example(), FAKE, configs=tried, gpus=2, limit=3.0)
    found = {t.config: t for t in result.trials if t.phase == "screen"}
    assert [found[c].status for c in tried] == [Status.timeout, Status.crash, Status.ok, Status.ok, Status.ok]
    assert [found[c].gpu for c in tried] == ["0", "1", "1", "1", "1"]
    assert any("replaced 2 times" in note for note in result.notes)


def test_a_killed_process_costs_one_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_OP_SECONDS", "0.1")
    killer = Killer(1)
    result = sweep(op, example(), FAKE, gpus=2, progress=killer)
    assert len(killer.killed) == 1 and len({t.config for t in result.trials}) == 16
    assert result.failures.get(Status.crash, 0) <= 1 and result.winner.ok
    # Left out, if it had not even begun.
    assert any("replaced 1 times" in note or "GPU 1 was left out" in note for note in result.notes)
