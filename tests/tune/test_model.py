from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
from fake_op import Config, example, op

from vidrial.device import Device
from vidrial.spec.cost import LAUNCH_SECONDS, Cost
from vidrial.tune.model import CALIBRATED, KNOWN_FROM, PRIOR, UNKNOWN, Model, Point, fit, terms, work

H200 = Device.of("h200")


def test_terms_step_at_sms_and_at_waves() -> None:
    def at(ctas: int) -> tuple[float, ...]:
        cost = Cost(flops=1e9 * ctas, bytes=0, ctas=ctas, ctas_per_sm=2, efficiency=0.5)
        predicted, *others = terms([cost], H200)
        assert predicted == pytest.approx(cost.seconds(H200) * 1e3)
        return tuple(others)

    each = 1e9 / (H200.tensor_tflops * 1e9 * 0.5)
    assert at(132) == pytest.approx((LAUNCH_SECONDS * 1e3, 132 * each, 132 * each, 264 * each))
    assert at(133) == pytest.approx((LAUNCH_SECONDS * 1e3, 133 * each, 264 * each, 264 * each))
    assert at(265) == pytest.approx((LAUNCH_SECONDS * 1e3, 265 * each, 396 * each, 528 * each))


def test_memory_does_not_step_and_launches_add() -> None:
    cost = Cost(flops=0, bytes=4.3e9, ctas=133)
    assert terms([cost, cost], H200) == pytest.approx((2e3 * cost.seconds(H200), 2e3 * LAUNCH_SECONDS, 2.0, 2.0, 2.0), rel=0.01)


def test_a_kernel_without_cost_counts_in_proportion() -> None:
    from dataclasses import replace

    from fake_op import FUNCTIONS, fake

    from vidrial.spec.op import Op

    bare = Op.of(replace(fake, cost=None), **FUNCTIONS)
    small, large = (work(bare, example(n=n), Config(), H200) for n in (1000, 3000))
    assert large[2] == pytest.approx(3 * small[2])


def test_fit_finds_the_coefficients_and_no_negative_one() -> None:
    rng = np.random.default_rng(0)
    rows = rng.uniform(0.1, 3.0, (40, 5))
    true = np.array([0.7, 0.0, 1.4, 0.2, 0.0])
    assert fit(rows.tolist(), (rows @ true).tolist(), PRIOR, 1e-9) == pytest.approx(true, abs=1e-3)
    noisy = fit(rows.tolist(), (rows @ true * rng.uniform(0.9, 1.1, 40)).tolist(), PRIOR, 1e-3)
    assert min(noisy) >= 0 and noisy == pytest.approx(true, abs=0.25)


X = (1.7, 0.003, 0.5, 0.6, 0.8)


def times(n: float) -> tuple[float, ...]:
    return tuple(n * x for x in X)


def test_one_measurement_scales_the_prediction() -> None:
    model = Model.fit({"c": [Point((1000,), X, 4.0)]})
    for n in (1, 2, 64):
        assert model.ms("c", (1000 * n,), times(n)) == pytest.approx(4.0 * n)


@pytest.mark.parametrize("lengths", range(1, CALIBRATED))
def test_few_lengths_do_not_put_their_time_into_the_launches(lengths: int) -> None:
    """All times alike, as of launches alone: a long problem is still predicted to take longer, by what its cost says."""
    points = [Point((1000 * n,), times(n), 4.0) for n in range(1, lengths + 1)]
    model = Model.fit({"c": points, "d": points[:1]})
    for config in "cd":
        assert model.ms(config, (64000,), times(64)) > 16 * model.ms(config, (4000,), times(4)) * 0.95


def test_beyond_the_reach_of_what_was_measured_the_prediction_counts() -> None:
    """Many lengths, which the constant alone explains: within reach it is believed, beyond it is not."""
    lengths = (1000, 1100, 1300, 1700, 2000, 2300)
    model = Model.fit({"c": [Point((t,), times(t / 1000), 4.0) for t in lengths]})
    assert model.ms("c", (1500,), times(1.5)) == pytest.approx(4.0, rel=0.1)
    assert model.ms("c", (64000,), times(64)) > 16 * 4.0


def test_the_nearest_measurement_says_most() -> None:
    model = Model.fit({"c": [Point((1000,), times(1), 2.0), Point((1900,), times(1.9), 1.9 * 4.0)]})
    assert model.ms("c", (1000,), times(1)) == pytest.approx(2.0, rel=0.05)
    assert model.ms("c", (1900,), times(1.9)) == pytest.approx(1.9 * 4.0, rel=0.05)


def test_what_an_unmeasured_config_takes_at_least() -> None:
    def least(factors: list[float]) -> float:
        measured = {f"c{i}": [Point((1000,), X, X[0] * f)] for i, f in enumerate(factors)}
        return Model.fit(measured).least_ms(X) / X[0]

    assert least([]) == least([1.5, 1.2]) == UNKNOWN
    assert least([0.5, 1.5]) == pytest.approx(0.5 * UNKNOWN), "a GPU that is faster than predicted may be so with every config"
    # Many that agree say what others will be; many that do not say how far off others may be.
    assert 0.8 < least([0.9 + 0.2 * i / KNOWN_FROM for i in range(KNOWN_FROM)]) < 0.9
    rng = random.Random(0)
    for _ in range(100):
        assert least([rng.uniform(0.6, 1.6) for _ in range(KNOWN_FROM * 2)]) < 0.63


@dataclass(frozen=True)
class Tile:
    """A config of a fake attention: a CTA makes `rows` rows of one of `heads` heads; small tiles are less efficient."""

    rows: int
    rate: float
    per_sm: int

    def cost(self, t: int, heads: int = 16) -> Cost:
        ctas = -(-t // self.rows) * heads
        # The author's guess of the efficiency is the same for all: the measurements must tell them apart.
        return Cost(flops=ctas * self.rows * t * 256.0, bytes=0, ctas=ctas, ctas_per_sm=self.per_sm)

    def true_ms(self, t: int, heads: int = 16) -> float:
        """The busiest SM's CTAs, each at the tile's own rate, with an overhead a CTA and a launch."""
        ctas = -(-t // self.rows) * heads
        per_cta = self.rows * t * 256.0 / (H200.tensor_tflops * 1e9 / H200.sms * self.rate) + 0.0004
        return 0.004 + -(-ctas // H200.sms) * per_cta


TILES = (Tile(64, 0.55, 2), Tile(128, 0.70, 1), Tile(192, 0.72, 1), Tile(256, 0.74, 1))


def test_the_model_picks_across_a_sawtooth_where_the_nearest_length_does_not() -> None:
    rng = random.Random(1)
    calibration = [t for octave in range(7, 15) for t in (2**octave + 1, round(1.37 * 2**octave))]
    model = Model.fit(
        {c: [Point((t,), terms([c.cost(t)], H200), c.true_ms(t) * rng.uniform(0.99, 1.01)) for t in calibration] for c in TILES}
    )
    by_model, by_nearest, changes = [], [], 0
    for _ in range(200):
        t = round(math.exp(rng.uniform(math.log(65), math.log(20000))))
        best = min(c.true_ms(t) for c in TILES)
        picked = min(TILES, key=lambda c: model.ms(c, (t,), terms([c.cost(t)], H200)))
        nearest = min(calibration, key=lambda x: abs(math.log(x / t)))
        neighbour = min(TILES, key=lambda c: c.true_ms(nearest))
        by_model.append(picked.true_ms(t) / best)
        by_nearest.append(neighbour.true_ms(t) / best)
        changes += picked != neighbour
    gain = np.exp(np.mean(np.log(by_model))), np.exp(np.mean(np.log(by_nearest)))
    assert changes > 30
    assert gain[0] < 1.02 and max(by_model) < 1.15, (gain, max(by_model))
    assert gain[1] > 1.03, "the sawtooth is too blunt to test anything"


def test_work_of_the_op_is_its_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    p = example(n=10007)
    assert work(op, p, Config(64), H200) == terms([op.kernels[0].cost(p, Config(64), H200)], H200)
