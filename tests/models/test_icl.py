"""Loss against context: right values of lines and knees without and with noise, pairing, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vidrial.errors import ArgumentError, ArgumentTypeError
from vidrial.icl import Curve, Losses, by_context, by_position, excess, knee, load, losses, positions, slope

T = 512
POSITION = np.arange(1, T + 1)


def simulated(windows: int, seed: int, at: float = np.inf, noise: float = 1.9, content: float = 0.35, fall: float = 0.1) -> np.ndarray:
    """Losses that fall by `fall` per doubling up to `at` tokens; noise of each token, and of each window as a whole."""
    g = np.random.default_rng(seed)
    line = 2 - fall * np.minimum(np.log2(POSITION), np.log2(at))
    return line + noise * g.standard_normal((windows, T)) + content * g.standard_normal((windows, 1))


def test_lines_and_knees_without_noise() -> None:
    straight, bent = (by_position(simulated(3, 0, at, noise=0, content=0)) for at in (np.inf, 64))
    found = slope(straight, 8)
    assert found.value == pytest.approx(-0.1, abs=1e-4) and found.error < 1e-12
    assert knee(straight, 8) is None
    found = knee(bent, 8)
    step = 2 ** ((np.log2(384) - np.log2(12)) / 59)
    assert found is not None and 64 / step <= found.at <= 64 * step and found.low == found.high == found.at
    assert (found.before, found.after) == (pytest.approx(-0.1, abs=2e-3), pytest.approx(0, abs=2e-3))
    # What falls and then rises bends, too.
    valley = 2 + 0.05 * np.abs(np.log2(POSITION) - 6)[None].repeat(2, 0)
    found = knee(by_position(valley), 8)
    assert found is not None and found.before == pytest.approx(-0.05, abs=3e-3) and found.after == pytest.approx(0.05, abs=3e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lines_and_knees_in_noise(seed: int) -> None:
    straight, bent = (by_position(simulated(1600, seed, at)) for at in (np.inf, 64))
    found = slope(straight, 8)
    assert found.value == pytest.approx(-0.1, abs=0.0045) and 0.0011 < found.error < 0.0018
    found = knee(bent, 8)
    assert found is not None and 50 < found.at < 80 and found.low <= found.at <= found.high
    assert found.low > 40 and found.high < 100 and found.before < -0.07 and abs(found.after) < 0.02


def test_a_curve_without_a_knee_has_none() -> None:
    found = [knee(by_position(simulated(400, seed)), 8, samples=300) for seed in range(20)]
    assert sum(k is None for k in found) >= 19
    # And at a lower confidence it is found as often as that says: 20 % of 60, within three standard deviations.
    bends = sum(knee(by_position(simulated(50, 100 + seed)), 8, confidence=0.8, samples=200) is not None for seed in range(60))
    assert 2 <= bends <= 21


def test_errors_are_those_of_repetition() -> None:
    curves = [by_position(simulated(100, seed)) for seed in range(100)]
    slopes = [slope(c, 8) for c in curves]
    assert np.std([s.value for s in slopes]) == pytest.approx(np.mean([s.error for s in slopes]), rel=0.25)
    assert np.std([c.mean for c in curves], 0) == pytest.approx(np.mean([c.error for c in curves], 0), rel=0.35)
    # Weighed by its targets a line has half the error that it has with all bins alike.
    alike = [slope(dataclasses.replace(c, weight=np.ones_like(c.weight)), 8).value for c in curves]
    assert np.std(alike) > 1.4 * np.std([s.value for s in slopes])


def test_bins_of_positions() -> None:
    assert positions(512) == [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 513]
    assert positions(511)[-2:] == [384, 512] and positions(1) == [1, 2] and positions(11) == [1, 2, 4, 8, 12]
    curve = by_position(np.arange(1.0, 12)[None] * [[1], [3]])
    assert curve.context.tolist() == [1, 2, 4, 8] and curve.weight.tolist() == [1, 2, 4, 4]
    assert curve.values.tolist() == [[1, 2.5, 5.5, 9.5], [3, 7.5, 16.5, 28.5]] and curve.mean.tolist() == [2, 5, 11, 19]
    np.testing.assert_allclose(curve.error, [1, 2.5, 5.5, 9.5])
    np.testing.assert_allclose(curve.log2[:3], [0, np.log2([2, 3]).mean(), np.log2([4, 5, 6, 7]).mean()])
    assert by_position(np.ones((1, 9)), [2, 5]).values.shape == (1, 1)


STREAM = np.random.default_rng(0).integers(0, 50, 20_000)


def known(reach: float, seed: int = 3) -> Any:
    """A model whose loss is the token's own, less 0.1 per doubling of the tokens before it within `reach`."""
    own = np.random.default_rng(seed).normal(3, 1.9, 50)

    def predict(tokens: np.ndarray) -> np.ndarray:
        before = np.arange(1, tokens.shape[1])
        return own[tokens[:, 1:]] - 0.1 * np.log2(np.minimum(before, reach))

    return predict


def test_losses_are_of_disjoint_windows() -> None:
    # The token itself as its loss: what is predicted is seen.
    found = losses(lambda tokens: tokens[:, 1:] / 1.0, np.arange(1001), length=100, windows=10, batch=3)
    assert found.values.tolist() == (np.arange(1, 1001).reshape(10, 100)).tolist()
    spread = losses(lambda tokens: tokens[:, 1:] / 1.0, np.arange(2000), length=100, windows=7)
    assert spread.values[0, 0] == 1 and spread.values[-1, -1] == 1999 and (np.diff(spread.values[:, 0]) >= 100).all()
    # The digest is of what is predicted, whoever predicts it.
    assert found.targets != spread.targets == losses(lambda tokens: tokens[:, 1:] / 2.0, np.arange(2000), 100, 7).targets


def test_the_same_targets_under_growing_context() -> None:
    contexts = [1, 8, 16, 64, 256]
    seen: list[np.ndarray] = []

    def predict(tokens: np.ndarray) -> np.ndarray:
        seen.append(tokens)
        return tokens[:, 1:] / 1.0

    curve = by_context(predict, np.arange(3000), contexts, targets=10, windows=20, batch=20)
    assert [t.shape for t in seen] == [(20, c + 10) for c in contexts]
    assert all((t[:, -10:] == seen[0][:, -10:]).all() and (np.diff(t) == 1).all() for t in seen)
    assert (np.diff(seen[0][:, -1]) >= 10).all() and seen[-1][0, 0] == 0 and seen[0][-1, -1] == 2999
    assert (curve.values == curve.values[:, :1]).all() and curve.context.tolist() == contexts and curve.weight.tolist() == [10] * 5
    np.testing.assert_allclose(curve.log2[1], np.log2(np.arange(8, 18)).mean())


def test_content_cancels_under_growing_context() -> None:
    contexts = [4, 8, 16, 32, 64, 128, 256]
    straight = by_context(known(np.inf), STREAM, contexts, targets=8, windows=100)
    found = slope(straight)
    assert found.value == pytest.approx(-0.1, abs=1e-12) and found.error < 1e-12 < 0.05 < straight.error.min()
    assert knee(straight) is None
    bent = knee(by_context(known(32), STREAM, contexts, targets=8, windows=100))
    assert bent is not None and bent.at == pytest.approx(34, rel=0.1) and bent.after == pytest.approx(0, abs=2e-3)
    # By position the same model and as many predictions leave an error that hides it.
    assert slope(by_position(losses(known(np.inf), STREAM, 256, 50)), 4).error > 0.01


def test_excess_is_paired() -> None:
    one, other = (by_position(losses(known(reach), STREAM, 256, 50)) for reach in (np.inf, 16))
    found = excess(other, one)
    assert found.error.max() < 1e-12 < 0.01 < one.error.min()
    np.testing.assert_allclose(found.mean, 0.1 * np.maximum(found.log2 - 4, 0), atol=1e-12)
    assert not excess(one, one).values.any()
    assert slope(found, 16).value == pytest.approx(0.1, abs=1e-3)


def test_a_window_of_16_in_one_layer_sees_no_further() -> None:
    torch = pytest.importorskip("torch")
    from decoder import Decoder

    torch.manual_seed(0)
    config = {"model_type": "charlm", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = Decoder(config | {"num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-6})
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    model.model.layers[0].self_attn.window = 16

    def predict(tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens))[:, :-1]
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), torch.from_numpy(tokens[:, 1:]), reduction="none").numpy()

    curve = by_context(predict, STREAM, [4, 12, 15, 16, 24, 64], targets=4, windows=16)
    assert np.abs(curve.values[:, 3:] - curve.values[:, -1:]).max() < 1e-5
    assert (np.abs(curve.values[:, :3] - curve.values[:, -1:]).max(0) > 1e-3).all()


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    measured = losses(known(9), STREAM, 64, 5)
    measured.save(tmp_path / "losses")
    found = load(tmp_path / "losses")
    assert isinstance(found, Losses) and (found.values == measured.values).all() and found.targets == measured.targets != ""
    curve = by_context(known(9), STREAM, [1, 4, 9], 4, 5)
    curve.save(tmp_path / "curve.npz")
    found = load(tmp_path / "curve.npz")
    assert isinstance(found, Curve)
    for field in dataclasses.fields(Curve):
        assert np.array_equal(getattr(found, field.name), getattr(curve, field.name)), field.name
    np.savez(tmp_path / "plain.npz", losses=np.ones((2, 3), np.float32))
    assert load(tmp_path / "plain.npz").targets == ""
    with pytest.raises(ArgumentError, match="cannot be written: No such file"):
        curve.save(tmp_path / "none" / "curve.npz")


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"x": np.ones(3)}, r"holds x; accepted: losses \[windows, length\]"),
        ({"losses": np.ones(3)}, r"float64 \[3\]; accepted: floating point"),
        ({"losses": np.array([[1.0, np.nan]])}, "1 of 2 are not finite"),
        ({"losses": np.array([[1]], object)}, "cannot be read as an .npz"),
        ({"context": np.ones(2), "log2": np.ones(3), "weight": np.ones(3), "values": np.ones((2, 3))}, "accepted: losses"),
    ],
)
def test_what_holds_no_losses_is_refused(arrays: dict[str, Any], why: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises((ArgumentError, ArgumentTypeError), match=why):
        load(tmp_path / "x.npz")
    (tmp_path / "text.npz").write_text("text")
    np.save(tmp_path / "one.npy", np.ones((2, 3)))
    refused = [(tmp_path / name, r"is no \.npz; accepted: losses") for name in ("text.npz", "one.npy")]
    for path, reason in (*refused, (tmp_path / "none", "no such file"), (tmp_path, "cannot be read")):
        with pytest.raises(ArgumentError, match=reason):
            load(path)


CURVE = by_context(known(9), STREAM, [1, 2, 4, 8, 16], 4, 5)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (
            lambda: losses(known(1), STREAM, 100, 200),
            "the stream has 20000 tokens; 200 windows of 100 predicted tokens, without overlap, need 20001",
        ),
        (lambda: losses(known(1), STREAM / 2, 10, 2), r"tokens are float64 \[20000\]; accepted: integers"),
        (lambda: losses(known(1), STREAM, 0, 2), "length=0"),
        (lambda: losses(known(1), STREAM, 10, 2, batch=0), "batch=0"),
        (lambda: losses(lambda t: t / 1.0, STREAM, 10, 2), r"made losses \[2, 11\] of tokens \[2, 11\]; accepted: \[2, 10\]"),
        (lambda: losses(lambda t: t[:, 1:], STREAM, 10, 2), "int64"),
        (lambda: losses(lambda t: t[:, 1:] * np.inf, STREAM + 1, 10, 2), "20 of 20 are not finite"),
        (lambda: by_context(known(1), STREAM, [4, 4]), r"contexts=\[4, 4\]; accepted: numbers of tokens that rise"),
        (lambda: by_context(known(1), STREAM, [0, 4]), r"contexts\[0\]=0"),
        (lambda: by_context(known(1), STREAM, []), "that rise"),
        (
            lambda: by_context(known(1), STREAM, [4000], 32, 501),
            "501 windows of 32 targets behind 4000 tokens of context, without overlap, need 20032",
        ),
        (lambda: by_position(np.ones((2, 4)), [1, 6]), "from 1 to 5"),
        (lambda: by_position(np.ones(4)), "losses: float64"),
        (lambda: excess(CURVE, by_context(known(9), STREAM, [1, 2, 4, 8, 32], 4, 5)), "of the same windows and points"),
        (lambda: excess(CURVE, by_context(known(9), STREAM[1:], [1, 2, 4, 8, 16], 4, 5)), "predict different tokens"),
        (lambda: slope(CURVE, 16), r"1 points of the curve lie between 16 and inf tokens; its contexts: \[1, 2, 4, 8, 16\]"),
        (lambda: knee(CURVE, 4), "3 points of 5 windows"),
        (lambda: knee(dataclasses.replace(CURVE, values=CURVE.values[:1])), "5 points of 1 windows"),
        (lambda: knee(CURVE, confidence=1.0), "confidence=1.0"),
    ],
)
def test_bad_values_are_named(call, why: str) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match=why):
        call()
