"""What a sweep of some lengths does to the choice at others, and what a choice costs the host at a length that was never met."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import power_cost
import pytest
from pace import slowness

from vidrial.device import TABLE, Device
from vidrial.kernels.flash_attention.op import example as flash_example
from vidrial.kernels.flash_attention.op import op as flash_op
from vidrial.kernels.power_retention.op import Config, example, op
from vidrial.kernels.power_retention.problem import Problem
from vidrial.spec.choices import configs, count, describe
from vidrial.spec.kernel import Kernel
from vidrial.tune import pick
from vidrial.tune import ranking as ranking_module
from vidrial.tune import shortlist as shortlist_module
from vidrial.tune.pick import choose_config
from vidrial.tune.ranking import KEPT, ProblemTimings, Ranking, forget, publish, rank
from vidrial.tune.shortlist import find_shortlist, predicted
from vidrial.tune.timing import Timing
from vidrial.tune.trial import Status, Trial

H200 = power_cost.H200
SHIPPED_FOLDER = ranking_module.shipped_folder
# "Never slower than without the sweep", and what may be between them.
SLACK = 1.05
Times = Mapping[Config, float]


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(ranking_module, "shipped_folder", lambda: tmp_path / "shipped")
    forget()
    yield
    forget()


def put(folder: Path, device: Device, swept: Mapping[Problem, Times], own: Mapping[Problem, Config]) -> None:
    """The rankings of such a sweep, in place of all others."""
    for file in folder.rglob("*.json"):
        file.unlink()
    rankings = []
    for problem, times in swept.items():
        configs = rank([(c, Timing(ms, 1e-3 * ms, 20)) for c, ms in times.items()])
        kept = tuple(c for i, c in enumerate(configs) if i < KEPT or c.config == own[problem])
        rankings.append(Ranking(op.name, op.digest(), device.key, device.name, "", (ProblemTimings(problem, kept),)))
    publish(op, rankings, folder)


def test_a_ranking_keeps_the_cost_models_own_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is faster than that is known, and what is not."""
    problem = example(t=5001)
    own = predicted(op, problem, H200)
    faster = [c.config for c in itertools.islice(op.ranked(problem, H200), 2 * KEPT) if c.config != own]
    trials = [Trial(op.name, problem, c, Status.ok, timing=Timing(1.0 + i, 0, 3)) for i, c in enumerate([*faster, own])]
    found = Ranking.from_trials(op, H200, trials)
    assert found is not None
    assert [c.config for c in found.measured[0].configs] == [*faster[:KEPT], own]


def test_on_the_h200_a_sweep_slows_no_other_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the sweep's own trials: both choices are among what was measured at the other length."""
    times = power_cost.measured()
    own = {p: next(c.config for c in op.ranked(p, H200) if c.config in of_problem) for p, of_problem in times.items()}
    ordered = pick._ordered
    monkeypatch.setattr(pick, "predicted", lambda op, problem, *_: own[problem])
    monkeypatch.setattr(pick, "_ordered", lambda *asked: (c for c in ordered(*asked) if c.config in times[asked[2]]))
    rng, ratios, changed = random.Random(14), list[float](), 0
    for d in (64, 128):
        group = [p for p in times if p.d == d]
        assert len(group) == 14
        for swept in (rng.sample(group, n) for n in [1] * 8 + [2] * 8 + [3] * 4 + [5] * 3 + [9] * 2 + [13] * 4):
            put(tmp_path / "shipped", H200, {p: times[p] for p in swept}, own)
            for p in (p for p in group if p not in swept):
                found = choose_config(op, p, H200)
                changed += found.config != own[p]
                ratios.append(times[p][found.config] / times[p][own[p]])
    assert max(ratios) <= SLACK and len(ratios) > 500 and changed > 5
    # The model was fitted to these very trials, and its favourites are within half a per cent of the best: on average a sweep of other lengths
    # changes nothing, and loses nothing.
    assert abs(sum(map(math.log, ratios)) / len(ratios)) < 0.001


def factor(config: Config, seed: int) -> float:
    """How much longer than predicted a config takes on an imagined GPU: 0.6 to 1.6 times."""
    digest = hashlib.sha256(f"{seed} {describe(config)}".encode()).digest()
    return 0.6 + int.from_bytes(digest[:4], "little") / 2**32


def tried(problem: Problem, device: Device, trials: int) -> dict[Config, float]:
    """Predicted ms of what a sweep tries: the best configs, and one with each chunk."""
    found: dict[Config, float] = {}
    chunks: set[int] = set()
    for candidate in itertools.islice(op.ranked(problem, device), 300):
        if len(found) < trials or candidate.config.chunk not in chunks:
            found[candidate.config] = 1e3 * candidate.seconds
            chunks.add(candidate.config.chunk)
    return found


LENGTHS = (100, 1000, 4099, 16384, 65536, 200_001)
# Each device, dtype, d and normaliser; head counts, batches and numbers of trials in turn.
IMAGINED = [
    (name, dtype, d, normalize)
    for name, (dtype, d, normalize) in zip(
        [device.name for device in TABLE],
        itertools.cycle(itertools.islice(itertools.product(("float16", "bfloat16"), (64, 32, 128), ("sum", "none")), 0, None, 5)),
        strict=False,
    )
]


@pytest.mark.parametrize("case", range(len(IMAGINED)), ids=["-".join(map(str, case)) for case in IMAGINED])
def test_on_any_gpu_a_sweep_slows_no_other_length(case: int, tmp_path: Path) -> None:
    name, dtype, d, normalize = IMAGINED[case]
    device, trials, h, b = (
        dataclasses.replace(Device.of(name), name="imagined"),
        (48, 8, 24)[case % 3],
        (16, 2, 8)[case % 3],
        (1, 4)[case % 2],
    )
    problems = [example(t=t, b=b, h=h, d=d, dtype=dtype, normalize=normalize, gated=case % 4 > 0) for t in LENGTHS]
    tries = {p: tried(p, device, trials) for p in problems[:4]}
    own = {p: predicted(op, p, device) for p in problems}
    ratios = []
    for seed in range(3):
        for n in (1, 1, 3):
            swept = random.Random(f"{case} {seed} {n}").sample(problems[:4], n)
            put(tmp_path / "shipped", device, {p: {c: ms * factor(c, seed) for c, ms in tries[p].items()} for p in swept}, own)
            for p in (p for p in problems if p not in swept):
                times = [op.seconds(p, c, device) * factor(c, seed) for c in (choose_config(op, p, device).config, own[p])]
                ratios.append(times[0] / times[1])
    assert max(ratios) <= SLACK, ratios
    assert min(ratios) < 0.95, "nothing is gained by a sweep"


def test_after_a_short_sweep_long_calls_are_not_quadratic(tmp_path: Path) -> None:
    """The H200's own times of 1000 tokens, on a GPU that nothing ships for."""
    other = dataclasses.replace(H200, name="another", memory_clock_khz=2_900_000)
    short = next(p for p in power_cost.measured() if (p.t, p.d) == (1000, 64))
    times = power_cost.measured()[short]
    assert any(c.chunk == 0 for c in times)
    put(tmp_path / "shipped", other, {short: times}, {short: predicted(op, short, other)})
    for t in (16384, 33333, 65536, 262_144, 1_000_000):
        p = example(t=t)
        found = choose_config(op, p, other)
        assert found.config.chunk > 0 and op.seconds(p, found.config, other) <= SLACK * op.seconds(p, op.predicted(p, other), other)
    assert choose_config(op, example(t=1000), other).origin == "shipped"


class Asked:
    """Counts what is asked of the kernels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rules = self.costs = 0
        broken_rule, seconds = Kernel.broken_rule, Kernel.seconds

        def rules(kernel: Kernel, *asked: Any) -> str | None:
            self.rules += 1
            return broken_rule(kernel, *asked)

        def costs(kernel: Kernel, *asked: Any) -> float:
            self.costs += 1
            return seconds(kernel, *asked)

        monkeypatch.setattr(Kernel, "broken_rule", rules)
        monkeypatch.setattr(Kernel, "seconds", costs)


# Where no ranking ships: another GPU, float16, no gates, another normaliser, d = 32, values of another size, another op.
NEW = {
    "h100": ("h100", op, lambda t: example(t=t)),
    "a100, d = 32": ("a100", op, lambda t: example(t=t, d=32)),
    "float16": ("h200", op, lambda t: example(t=t, d=128, dtype="float16")),
    "ungated": ("rtx4090", op, lambda t: example(t=t, gated=False)),
    "e != d, none": ("h200", op, lambda t: example(t=t, e=128, normalize="none")),
    "degree 4": ("b200", op, lambda t: example(t=t, degree=4)),
    "flash": ("h200", flash_op, lambda t: flash_example(t=t)),
    "flash, causal": ("a100", flash_op, lambda t: flash_example(t=t, d=64, causal=True)),
}


@pytest.mark.parametrize("case", NEW)
def test_a_new_length_asks_little(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first of its static facts hundreds of configs are asked, and not all thousands; from then on some dozens.

    The times are what that takes on a machine that does nothing else, several times over; of a slower one, as many times as it is slower.
    """
    name, of, problem = NEW[case]
    device = dataclasses.replace(Device.of(name), name=f"another {case}")
    choose_config(of, problem(64), dataclasses.replace(device, sms=device.sms - 1))  # digests, imports
    asked, begin = Asked(monkeypatch), time.process_time()
    choose_config(of, problem(4097), device)
    assert asked.rules < 3500 and (time.process_time() - begin) / slowness() < 0.4
    lengths, spent = [97, 1000, 5003, 16384, 65537, 150_001, 777, 12_345], []
    for t in lengths:
        asked.rules = asked.costs = 0
        begin = time.process_time()
        choose_config(of, problem(t), device)
        spent.append((time.process_time() - begin) / slowness())
        assert asked.rules < 200 and asked.costs < 150, (t, asked.rules, asked.costs)
    assert sorted(spent)[len(spent) // 2] < 0.010, spent


def random_problem(rng: random.Random, case: str) -> Any:
    t, (_, of, problem) = round(math.exp(rng.uniform(math.log(40), math.log(200_000)))), NEW[case]
    h = rng.choice((1, 2, 8, 16))
    return dataclasses.replace(problem(t), b=rng.choice((1, 1, 2, 8)), h=h, **({"hq": h * rng.choice((1, 4))} if of is op else {}))


@pytest.mark.parametrize("case", NEW)
def test_the_shortlist_is_as_good_as_all_configs(case: str) -> None:
    """Almost: beside the best of thousands, whichever problem came first. No config may be left out for good."""
    name, of, problem = NEW[case]
    device, rng = Device.of(name), random.Random(case)
    problems = [random_problem(rng, case) for _ in range(12)]
    fastest = [next(of.ranked(p, device)).seconds for p in problems]
    for first in (problem(5), problem(60_000)):
        found = find_shortlist(of, first, device)
        assert found is not None
        ratios = [of.seconds(p, found.best(of, p, device), device) / best for p, best in zip(problems, fastest, strict=True)]
        assert max(ratios) < 1.2 and math.exp(sum(map(math.log, ratios)) / len(ratios)) < 1.03, ratios


@pytest.mark.parametrize(
    ("of", "problem", "most"),
    [
        (flash_op, lambda t: flash_example(t=t, d=128, causal=True), 10),
        (flash_op, lambda t: flash_example(t=t, d=64), 10),
        (op, lambda t: example(t=t, d=64), 13),
    ],
    ids=["flash, causal", "flash, D = 64", "power"],
)
def test_a_hundred_lengths_need_few_binaries(of: Any, problem: Any, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rankings that come along: each one more is a compile in somebody's first call at a new length."""
    monkeypatch.setattr(ranking_module, "shipped_folder", SHIPPED_FOLDER)
    forget()
    rng, needed = random.Random(1), set()
    for _ in range(100):
        p = problem(int(math.exp(rng.uniform(math.log(100), math.log(40_000)))))
        needed |= {stage.binary for stage in of.stages(p, choose_config(of, p, H200).config)}
    assert 3 < len(needed) <= most


def test_a_part_that_launches_nothing_stays_as_it_is_by_default() -> None:
    p, device = example(t=300), Device.of("a100")
    assert predicted(op, p, device).chunk == 0 and predicted(op, p, device).scan == Config().scan


def test_a_planted_bad_shortlist_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measure of the test above: a shortlist of what is best at one length alone."""
    device = Device.of("h100")
    monkeypatch.setattr(shortlist_module, "_problems", lambda *_: iter(()))
    monkeypatch.setattr(shortlist_module, "neighbours", lambda config: iter(()))
    found = find_shortlist(op, example(t=90), device)
    assert found is not None
    problem = example(t=60_000)
    config = found.best(op, problem, device)
    assert config is None or op.seconds(problem, config, device) > 1.2 * next(op.ranked(problem, device)).seconds


def test_what_fixed_choices_leave_is_chosen_from() -> None:
    for chunk in (128, 1024):
        assert predicted(op, example(t=20_000), Device.of("h100"), (("chunk", chunk),)).chunk == chunk


def test_how_many_configs_there_are() -> None:
    from vidrial.kernels.power_retention import attend, scan

    for kind in (attend.Config, scan.Config):
        assert count(kind) == len(configs(kind))
