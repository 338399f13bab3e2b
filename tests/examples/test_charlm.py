"""The example of a byte model: its mixers, its files, its commands on a tiny preset, its results; and, slow, that the recipe does what the pages say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import charlm
import figures
import lab
import numpy as np
import pytest
import torch
from decoder import Decoder

import vidrial.icl as icl
from vidrial.errors import ArgumentError, UnsupportedError
from vidrial.kernels.power_retention.metamorphosis import distill_layers, metamorphose

ROOT = Path(__file__).parents[2]
CPU = lab.PRESETS["cpu"]
TINY = dataclasses.replace(
    CPU,
    config=CPU.config
    | {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1},
    t=24,
    batch=2,
    base=3,
    layerwise=2,
    tune=2,
    contexts=(2, 4, 64, 80),
    targets=4,
    windows=8,
    evaluate=4,
    window=4,
)


@pytest.fixture
def one_thread() -> Any:
    """What a test takes is the same on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A preset and a corpus that take no time, and an empty place for results and models."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(32, 127, (2, 2000), generator=generator, dtype=torch.uint8)
    monkeypatch.setattr(lab, "corpus", lambda with_tests=False: (text[0], text[1]))
    monkeypatch.setitem(lab.PRESETS, "cpu", TINY)
    monkeypatch.setattr(charlm, "toy", lambda: lab.fresh(TINY.config))
    monkeypatch.setattr(charlm, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(figures, "RESULTS", tmp_path / "results")
    return tmp_path


def run(*words: object) -> None:
    given = charlm.parser().parse_args([str(word) for word in words])
    given.run(given)


def test_files_are_held_out_by_their_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for i in range(64):
        (tmp_path / f"m{i}.py").write_bytes(bytes([i]) * 600)
    for name, size in (("short.py", 599), ("test/a.py", 700), ("site-packages/a.py", 700), ("a.txt", 700)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\xff" * size)
    monkeypatch.setattr(lab.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    train, held = lab.corpus()
    assert set(train.tolist()) | set(held.tolist()) == set(range(64)) and not set(train.tolist()) & set(held.tolist())
    assert 0 < len(held) < 64 * 600 // 4
    assert sum(map(len, lab.corpus(with_tests=True))) == 64 * 600 + 700


def test_degree_one_is_its_formula_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lab.with_mixer(lab.fresh(TINY.config | {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 64}), "degree1")
    attention = model.model.layers[0].self_attn
    torch.nn.init.normal_(attention.g_proj.weight)
    x, (q, k, v) = torch.randn(1, 37, 64), torch.randn(3, 1, 37, 2, 32)
    with torch.no_grad():
        made = [attention.mixer(attention, x, q, k, v)]
        monkeypatch.setattr(lab, "CHUNK", 8)
        made.append(attention.mixer(attention, x, q, k, v))
        log_g = -np.log1p(np.exp(-attention.g_proj(x).double().numpy()))
    a, wanted = log_g[0].cumsum(0), np.zeros((37, 2, 32))
    for h in range(2):
        q_, k_, v_ = (y[0, :, h].double().numpy() for y in (q, k, v))
        y = np.tril(q_ @ k_.T * np.exp(np.minimum(a[:, None, h] - a[None, :, h], 0))) @ v_
        wanted[:, h] = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)
    for y in made:
        assert np.abs(y[0].numpy() - wanted).max() < 1e-4


def test_context_beyond_a_window_changes_nothing() -> None:
    model = lab.with_mixer(lab.fresh(TINY.config), "window:4")
    text = np.random.default_rng(0).integers(32, 127, 1000)
    curve = icl.by_context(lab.predictor(model, TINY), text, (1, 4, 16, 64), targets=4, windows=8)
    np.testing.assert_allclose(curve.values[:, 2:], curve.values[:, 1:2].repeat(2, 1), atol=1e-5)
    assert np.abs(curve.values[:, 0] - curve.values[:, 1]).max() > 1e-4


@pytest.mark.parametrize("mixer", ["softmax", "window:4", "degree1", "power:2", "power:4"])
def test_models_are_written_and_read_for_what_they_are(mixer: str, tmp_path: Path) -> None:
    model, tokens = lab.with_mixer(lab.fresh(TINY.config), mixer), torch.arange(40)[None]
    model.write(tmp_path)
    assert torch.equal(lab.read(tmp_path)(tokens), model(tokens))
    if mixer in ("degree1", "power:2"):
        with pytest.raises(ArgumentError, match=r"g_proj.weight, which it lacks"):
            Decoder.read(tmp_path)  # never for softmax attention in silence
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(
            json.dumps(config | {"num_hidden_layers": 2} | ({"vidrial": config["vidrial"]} if "vidrial" in config else {}))
        )
        with pytest.raises(ArgumentError, match="is not the model of its config.json; it differs in"):
            lab.read(tmp_path)


def test_bad_mixers_are_refused_by_name() -> None:
    for mixer in ("windows:4", "window", "window:x", "degree1:2"):
        with pytest.raises(ArgumentError, match=f"mixer '{mixer}' is not known; accepted: softmax, window:16"):
            lab.with_mixer(lab.fresh(TINY.config), mixer)
    with pytest.raises(UnsupportedError, match="degree=3: an odd power's weights change sign"):
        lab.with_mixer(lab.fresh(TINY.config), "power:3")
    with pytest.raises(ArgumentError, match="no model's folder"):
        lab.read(ROOT / "docs")


def test_every_command_runs(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("demo", "--layerwise", 1, "--steps", 1)
    out = capsys.readouterr().out
    assert "1 steps, layer by layer: " in out and [w for w in ("softmax ", "window 16", "power ") if w not in out] == []
    run("train", "--steps", 3, "--out", tiny / "softmax")
    run("metamorphose", tiny / "softmax", "--out", tiny / "power", "--gates", 2, 8)
    out = capsys.readouterr().out
    assert "nats per held-out byte after 3 steps" in out and "step 0: " in out and "step 2: " in out and "step 4: " in out
    assert json.loads((tiny / "power/config.json").read_text())["vidrial"]["gates"] == [2, 8]
    run("curves", tiny / "softmax", tiny / "power")
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == ["2", "softmax", "power"]
    run("generate", tiny / "power", "--prompt", "ab", "--tokens", 5)
    stepped = capsys.readouterr()
    assert f"{4 * (32 * 20 * 32 + 32 * 32):,} bytes of state, however long the text" in stepped.err
    model, text = lab.read(tiny / "power"), torch.tensor([[97, 98]])
    for _ in range(5):
        text = torch.cat((text, model(text)[:, -1:].argmax(-1)), 1)
    assert stepped.out == bytes(text[0].tolist()).decode(errors="replace") + "\n"
    run("generate", tiny / "softmax", "--tokens", 2)
    assert "recomputed for every byte" in capsys.readouterr().err
    run("flops")
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert set(rows) == {"weights", "attention", "window:4", "degree1", "power:2", "power:4"}
    # 2 (4 32 32 + 2 32 32) weight FLOPs; 2 (1 + 1) 528 (32 + 1) state FLOPs.
    assert rows["power:2"] == [f"{12 * 32 * 32 / (4 * 528 * 33):.3f}"] * 6


def test_results_are_kept_and_not_made_twice(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("results", "--work", tiny / "work")
    first = json.loads((tiny / "results/cpu.json").read_text())
    assert list(first["recovery"]) == charlm.RUNS["cpu"][0]
    for name, way in first["recovery"].items():
        assert way["steps"] == 4 and way["tokens"] == 4 * 2 * 24 and not way["ended_early"]
        assert set(way["losses"]) == ({"0", "2", "4"} if name in ("layer-wise", "degree 4") else {"0", "4"})
    assert set(first["curves"]) == {"softmax", "window 4", "original", "layer-wise", "degree 4", "degree 1"}
    assert first["curves"]["softmax"]["excess"] == [0, 0, 0, 0]
    run("results", "--work", tiny / "work")
    assert json.loads((tiny / "results/cpu.json").read_text()) == first
    pytest.importorskip("matplotlib")
    figures.main()
    for name in ("recovery_cpu", "context_cpu", "flops"):
        assert (tiny / f"results/{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_the_h200s_results_go_the_same_way(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, with the tiny model: a base and mixers from nothing, then the ways from that base."""
    monkeypatch.setitem(lab.PRESETS, "h200", TINY)
    monkeypatch.setitem(charlm.LOW, "h200", 64)
    run("results", "--preset", "h200", "--work", tiny / "work")
    held = json.loads((tiny / "results/h200.json").read_text())
    assert list(held["scratch"]) == ["base", "window from nothing", "power:2 from nothing", "degree1 from nothing"]
    assert list(held["recovery"]) == ["original", "layer-wise", "scratch"]
    assert held["base"]["loss"]["held_out"] == pytest.approx(held["scratch"]["base"]["losses"]["3"], abs=1e-6)
    assert len(held["curves"]) == 2 + 3 + 2
    pytest.importorskip("matplotlib")
    figures.main()
    assert (tiny / "results/context_h200.png").is_file()


def test_a_training_ends_when_its_time_is_over(tiny: Path) -> None:
    text = lab.Text(dataclasses.replace(TINY, seconds=0.0))
    done = lab.train(lab.fresh(TINY.config), text, 100, 1e-3, 1)
    assert done.ended_early and done.steps == 1 and set(done.losses) == {1}


def test_figures_without_results_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    with pytest.raises(ArgumentError, match="holds no results; run charlm.py results before"):
        figures.main()


def test_the_h200s_preset_has_models_that_the_kernels_take() -> None:
    preset = lab.PRESETS["h200"]
    with torch.device("meta"):
        model = metamorphose(Decoder(preset.config))
    assert model.model.layers[7].self_attn.metamorphosis.d == 64 and len(model.model.layers) == 8
    assert preset.contexts[-1] + preset.targets == preset.t
    ways, mixers = charlm.RUNS["h200"]
    # The base, what is trained from nothing, the ways: under ten minutes, with the curves.
    assert (1 + len(mixers) + len(ways)) * preset.seconds < 540


def test_committed_results_are_of_the_preset_and_drawn() -> None:
    held = json.loads((ROOT / "examples/charlm/results/cpu.json").read_text())
    preset = json.loads(json.dumps({k: v for k, v in dataclasses.asdict(CPU).items() if k != "seconds"}))
    assert held["preset"] == preset
    assert set(held["recovery"]) == set(charlm.RUNS["cpu"][0])
    for way in held["recovery"].values():
        assert way["steps"] == CPU.layerwise + CPU.tune and way["tokens"] == way["steps"] * CPU.batch * CPU.t
    assert set(held["curves"]) == {"softmax", "window 16", *charlm.WAYS} - set(charlm.NO_CURVE)
    for name in ("recovery_cpu", "context_cpu", "flops"):
        assert (ROOT / f"examples/charlm/results/{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_the_page_says_what_the_results_say() -> None:
    held, page = json.loads((ROOT / "examples/charlm/results/cpu.json").read_text()), (ROOT / "docs/models.md").read_text()
    for name, way in held["recovery"].items():
        losses = " | ".join(f"{way['losses'][step]:.3f}" for step in ("0", "40", "80"))
        assert f"| {name} | {losses} |" in page
    for name, curve in held["curves"].items():
        means, (value, error) = " | ".join(f"{x:.3f}" for x in curve["mean"]), curve["slope"]
        assert f"| {name} | {means} | {value:+.4f} +- {error:.4f} |" in page


def test_the_recipe_does_what_the_pages_say(one_thread: None) -> None:
    """On the toy that comes along, in nats per held-out byte. Beside each bound is what was measured, with two orders of the batches; sources of
    other Pythons are other texts, hence the room."""
    text = lab.Text(dataclasses.replace(CPU, evaluate=16))
    base, lr = lab.toy(), CPU.lr
    before = text.loss(base)
    assert before < 1.6  # 1.41

    def taught(**how: Any) -> Any:
        model = charlm.power(base, **how)
        distill_layers(model, base, (window[:, :-1] for window in text.batches(seed=8)), 16, lr)
        return model

    assert text.loss(charlm.power(base)) > before + 0.8  # +1.22
    model = taught()
    layered = text.loss(model)
    assert layered < before + 0.8  # +0.55
    assert lab.train(model, text, 10, lr / 3, 4, seed=9).losses[10] < before + 0.5  # +0.32
    assert text.loss(taught(gates=(1000, 1000))) > layered + 0.25  # +0.56
    nothing = metamorphose(lab.fresh(CPU.config))
    assert lab.train(nothing, text, 26, lr, 10, seed=9).losses[26] > before + 0.8


def test_what_no_command_can_do(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ArgumentError, match="--prompt is empty"):
        run("generate", "--prompt", "")
    for words in (("train", "--out", tiny / "model", "--steps", "-1"), ("generate", "--tokens", "0")):
        with pytest.raises(SystemExit):
            run(*words)
        assert "invalid count value" in capsys.readouterr().err
    assert not (tiny / "model").exists()
    for mixer in ("window:0", "power:two", "softmax:3"):
        with pytest.raises(ArgumentError, match=f"^mixer '{mixer}' is not known"):
            run("train", "--out", tiny / "model", "--mixer", mixer)
