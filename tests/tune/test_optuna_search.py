"""The optional optuna strategy: legal, never twice, the same by seed, and better than chance on a space that has structure."""

from __future__ import annotations

import math
import random
import sys
from typing import Any

import pytest
from fake_op import H200, Config, PartsConfig, example, op, parts_ms, parts_op

from vidrial.errors import ArgumentError, ToolchainError
from vidrial.spec.choices import axes, configs, flatten, unflatten
from vidrial.tune.options import Options
from vidrial.tune.optuna_search import OptunaSearch
from vidrial.tune.sweeper import sweep

N = 10007
FAKE = Options(device=H200, bench="fake_op:FakeBench", limit=1.0, strategy="optuna")


def found_by(seed: int, trials: int) -> dict[Any, float]:
    search, seen = OptunaSearch(parts_op, example(), H200, seed), dict[Any, float]()
    while len(seen) < trials and (batch := search.propose(seen)):
        assert not set(batch) & set(seen) and len(set(batch)) == len(batch) <= 8
        assert all(parts_op.reject(example(), c, H200) is None for c in batch)
        seen |= {c: math.inf if c.first.width == 1 else parts_ms(N, c) for c in batch[: trials - len(seen)]}
    return seen


def test_configs_survive_being_flattened() -> None:
    assert list(axes(PartsConfig).items())[:2] == [("chunk", (256, 64, 1024, 0)), ("first.tile", (128, 64, 96, 32))]
    for config in (PartsConfig(), PartsConfig(64, Config(96, 2), Config(32, 4))):
        assert unflatten(PartsConfig, flatten(config)) == config


def test_the_same_seed_names_the_same_configs() -> None:
    pytest.importorskip("optuna")
    first, second, other = found_by(3, 40), found_by(3, 40), found_by(4, 40)
    assert list(first) == list(second) and list(first) != list(other)
    # The order in which trials were done does not matter.
    search = OptunaSearch(parts_op, example(), H200, 3)
    assert search.propose(first) == search.propose(dict(reversed(first.items())))


def test_it_beats_chance() -> None:
    pytest.importorskip("optuna")
    times = sorted(parts_ms(N, c) for c in configs(PartsConfig) if c.first.width != 1)
    rank = sum(times.index(min(found_by(seed, 64).values())) / len(times) for seed in range(3)) / 3
    draws = random.Random(0)
    chance = sum(times.index(min(draws.sample(times, 64))) / len(times) for _ in range(200)) / 200
    assert rank < chance


def test_a_sweep_with_it_keeps_its_budget_and_resumes() -> None:
    pytest.importorskip("optuna")
    result = sweep(parts_op, example(), FAKE, trials=24)
    assert len({t.config for t in result.trials}) == 24 and result.winner.ok
    again = sweep(parts_op, example(), FAKE, trials=32, resume=True)
    assert len({t.config for t in again.trials}) == 32 and again.trials[: len(result.trials)] == result.trials
    whole = sweep(op, example(), FAKE)
    assert len({t.config for t in whole.trials}) == 16, "a space that is exhausted ends the search"


def test_without_optuna_and_with_options_that_contradict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ToolchainError, match=r"pip install vidrial-dsl\[optuna\]"):
        OptunaSearch(op, example(), H200)
    with pytest.raises(ArgumentError, match="give one of them"):
        sweep(op, example(), FAKE, exhaustive=True)
    with pytest.raises(ArgumentError, match="strategy='genetic'.*accepted: rounds, optuna"):
        sweep(op, example(), strategy="genetic")
