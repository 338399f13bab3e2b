"""The example of a GPT that learns: its attentions against each other and in both frameworks, its commands on tiny sizes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import in_torch
import lab
import numpy as np
import pytest
import torch
import train
from in_torch import MIXERS, TorchTrainer

from vidrial.errors import ArgumentError, ToolchainError

# Of a loss: six units in the last place of float32.
ROUNDING = 3e-6
EVERY = sorted(MIXERS)
EXAMPLE = Path(train.__file__).parent


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What a test takes is the same on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def library() -> lab.Text:
    """Two windows of 320 bytes of the standard library: more than the 256 that share a state."""
    return lab.Text(preset(320))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> lab.Text:
    """A text that takes no time to read."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(32, 127, (2, 2000), generator=generator, dtype=torch.uint8)
    monkeypatch.setattr(lab, "corpus", lambda with_tests=False: (text[0], text[1]))
    return lab.Text(preset(24))


def preset(context: int) -> lab.Preset:
    return train.preset_of(train.parser().parse_args(["--batch", "2"]), context)


def curve(trainer: Any, text: lab.Text, steps: int, of: int) -> Any:
    """The first `steps` losses of a training of `of`."""
    batches = text.batches(0)
    return np.array([trainer.step(next(batches), train.learning_rate(text.preset, i, of)) for i in range(steps)])


def test_power_retention_learns_as_its_attention_form(library: lab.Text, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured: 4.8e-7, a bit of float32, over 20 steps, then 1.3e-4 at most, as the attention form and itself with eight nudged beginnings
    (2.4e-6 to 1.4e-4); with other weights at the beginning 3.1e-2 on average.
    Mistakes in the attention form, within 10 steps: 7.7e-3 without gates, 2.0e-4 where gates do not learn, 2.3e-5 where they are a token late."""
    steps, p = 40, library.preset
    mine, exact = (curve(TorchTrainer(p, name), library, steps, steps) for name in ("power", "attention-form"))
    error, noise = np.abs(mine - exact), np.abs(curve(TorchTrainer(p, "attention-form", 1), library, steps, steps) - exact).mean()
    assert error[:10].max() < ROUNDING
    assert error.max() < noise / 10
    assert mine[0] > 5.0 and mine[-10:].mean() < 3.9  # 5.24 and 3.46
    gates = in_torch.log_gates
    mistakes: list[Callable[[Any], Any]] = [torch.zeros_like, torch.Tensor.detach, lambda x: x.roll(1, 1)]
    for mistake in mistakes:
        monkeypatch.setattr(in_torch, "log_gates", lambda *given, mistake=mistake: mistake(gates(*given)))
        wrong = np.abs(curve(TorchTrainer(p, "attention-form"), library, 10, steps) - mine[:10]).max()
        assert wrong > 3 * ROUNDING


def test_flash_learns_as_sdpa(tiny: lab.Text) -> None:
    mine, exact, power = (curve(TorchTrainer(tiny.preset, name), tiny, 5, 40) for name in ("flash", "sdpa", "power"))
    assert np.abs(mine - exact).max() < ROUNDING and np.abs(power - exact).max() > 1e-4


def test_gradients_of_flash_are_those_of_sdpa() -> None:
    attention = in_torch.gpt(preset(24).config, "flash").model.layers[0].self_attn
    given = torch.randn(3, 2, 24, 2, 32).unbind()
    found = []
    for mixer in (in_torch.flash, MIXERS["sdpa"]):
        inputs = [x.clone().requires_grad_() for x in given]
        y = mixer(attention, given[0], *inputs)
        found.append([y, *torch.autograd.grad((y * torch.arange(32)).sum(), inputs)])
    for mine, exact in zip(*found, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", EVERY)
def test_the_gpus_dtypes(attention: str, tiny: lab.Text) -> None:
    """Under autocast, as on a GPU: products in bfloat16, their results near float32's; gradients of float32 weights."""
    torch.manual_seed(1)
    model = in_torch.gpt(tiny.preset.config, attention)
    with torch.no_grad():
        for x in model.parameters():
            if x.ndim == 2:
                x.normal_(std=0.2)
    tokens = next(tiny.batches(0))
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = lab.loss_of(model, tokens)
        model.zero_grad()
        loss.backward()
        gradient = model.model.layers[0].self_attn.k_proj.weight.grad
        found.append((loss.item(), gradient / gradient.norm()))
    assert found[0][0] != found[1][0] and found[1][0] == pytest.approx(found[0][0], rel=0.02)
    assert (found[0][1] * found[1][1]).sum() > 0.99


def test_jax_learns_as_torch(library: lab.Text) -> None:
    """Power retention, the same weights and batches; measured: at most 4.8e-7, a bit of float32, over 10 steps."""
    in_jax = pytest.importorskip("in_jax")
    mine, theirs = (curve(make(library.preset, "power"), library, 10, 40) for make in (in_jax.JaxTrainer, TorchTrainer))
    assert np.abs(mine - theirs).max() < ROUNDING


@pytest.mark.parametrize("attention", ["attention-form", "flash", "sdpa"])
def test_jaxs_other_attentions_learn_as_torchs(attention: str, tiny: lab.Text, monkeypatch: pytest.MonkeyPatch) -> None:
    in_jax = pytest.importorskip("in_jax")
    # Of gradients between 2.7 and 2.94 some are clipped.
    for module in (in_torch, in_jax):
        monkeypatch.setattr(module, "CLIP", 2.75)
    made = in_jax.JaxTrainer(tiny.preset, attention), TorchTrainer(tiny.preset, attention)
    mine, theirs = (curve(one, tiny, 4, 40) for one in made)
    assert np.abs(mine - theirs).max() < ROUNDING
    tokens = next(tiny.batches(1))
    torch.testing.assert_close(made[0].logits(tokens), made[1].logits(tokens), rtol=1e-4, atol=1e-4)
    # A value and Adam's two moments for each parameter, and not ten times as much beside.
    size = 12 * sum(x.numel() for x in made[1].model.parameters())
    assert size < made[0].peak_bytes() < 10 * size


@pytest.mark.parametrize("attention", ["power", "flash", "attention-form"])
def test_jaxs_gpu_dtypes(attention: str, tiny: lab.Text) -> None:
    in_jax = pytest.importorskip("in_jax")
    model = in_torch.gpt(tiny.preset.config, attention)
    params = {name: x.detach().numpy() * (10 if x.ndim == 2 else 1) for name, x in model.named_parameters()}
    how = {"shape": model.model.shape, "attend": in_jax.ATTENDS[attention]}
    tokens = next(tiny.batches(0)).numpy()
    mine, exact = (np.asarray(in_jax.logits_of(params, tokens, dtype=in_jax.jnp.dtype(x), **how)) for x in ("bfloat16", "float32"))
    assert mine.dtype == np.float32 and 0 < np.abs(mine - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_curves_are_written(framework: str, tiny: lab.Text, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(framework)
    words = f"--framework {framework} --steps 3 --context 24 --batch 2 --out {tmp_path} --attention power"
    held = train.main(train.parser().parse_args(words.split()))
    assert held == json.loads((tmp_path / f"losses_{framework}_cpu.json").read_text())
    run = held["runs"]["power"]
    assert run["steps"] == 3 and not run["ended_early"] and run["held_out"] < run["losses"][0] < 6
    exact = curve(TorchTrainer(tiny.preset, "power"), tiny, 3, 3)
    assert np.abs(np.array(run["losses"]) - exact).max() < 1e-5
    assert "step     2" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert (tmp_path / f"losses_{framework}_cpu.png").read_bytes()[:4] == b"\x89PNG"


def test_a_bench_says_what_it_leaves_out(tiny: lab.Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    now = [0.0]

    class Fake:
        """A step takes 16 seconds with power, with softmax a second for each token of context."""

        def __init__(self, preset: lab.Preset, attention: str, *_: int) -> None:
            self.softmax, self.t = attention == "sdpa", preset.t

        def step(self, tokens: torch.Tensor, lr: float) -> float:
            assert tokens.shape == (max(1, 32 // self.t), self.t + 1)
            if self.softmax and self.t == 32:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            now[0] += self.t if self.softmax else 16
            return 0.0

        def peak_bytes(self) -> int:
            return 3 * 2**30

    monkeypatch.setattr(train, "maker", lambda o: Fake)
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    monkeypatch.setitem(train.TOKENS, "cpu", 32)
    words = f"--bench 8,32,64,128 --seconds 100 --attention power sdpa --out {tmp_path}"
    held = train.main(train.parser().parse_args(words.split()))
    assert held == json.loads((tmp_path / "bench_torch_cpu.json").read_text())
    power, softmax = held["runs"]["power"], held["runs"]["sdpa"]
    assert power["8"] == {"tokens_per_second": 2, "steps": 1, "batch": 4, "peak_bytes": 3 * 2**30}
    assert [one.get("tokens_per_second") for one in power.values()] == [2, 2, 4, None]
    assert [one.get("left_out") for one in power.values()] == [None, None, None, "no time"]
    assert [one.get("tokens_per_second") for one in softmax.values()] == [4, None, 1, None]
    assert [one.get("left_out") for one in softmax.values()] == [None, "out of memory", None, "no time"]
    # Twice as slow at 8, four times as fast at 64.
    assert held["crossing"] == {"sdpa": pytest.approx(16)}
    out = capsys.readouterr().out
    assert "32   out of memory" in out and "128   left out: --seconds 100 are over" in out and "3.00 GiB at most" in out
    assert "power retention is faster than sdpa from 16 bytes of context on" in out
    pytest.importorskip("matplotlib")
    assert (tmp_path / "bench_torch_cpu.png").read_bytes()[:4] == b"\x89PNG"


def test_other_errors_end_a_bench_and_what_was_measured_is_kept(tiny: lab.Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cell(trainer: Any, text: lab.Text, seconds: float) -> dict[str, Any]:
        if text.preset.t == 16:
            raise RuntimeError("an illegal memory access")
        return {"tokens_per_second": 1, "peak_bytes": None}

    monkeypatch.setattr(train, "maker", lambda o: lambda *_: None)
    monkeypatch.setattr(train, "cell", cell)
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        train.main(train.parser().parse_args(f"--bench 8,16 --out {tmp_path}".split()))
    held = json.loads((tmp_path / "bench_torch_cpu.json").read_text())
    assert held["runs"] == {"power": {"8": {"tokens_per_second": 1, "peak_bytes": None}}}
    assert held["command"].startswith("python examples/train/train.py") and held["versions"]["torch"] == torch.__version__


def rates(*found: float | None) -> dict[str, Any]:
    return {str(4**i): {"left_out": "out of memory"} if x is None else {"tokens_per_second": x} for i, x in enumerate(found)}


def test_crossing() -> None:
    power = rates(8, 8, 8, 8)
    assert train.crossing(power, rates(32, 16, 4, 2)) == pytest.approx(8)  # between 4 and 16, half way
    assert train.crossing(power, rates(4, 16, 4, 2)) == pytest.approx(8)  # from which on: the last one counts
    assert train.crossing(power, rates(4, 4, 4, 4)) == 1 and train.crossing(power, rates(4, 4, 4, 9)) is None
    assert train.crossing(power, rates(32, 16, 4, None)) == pytest.approx(8) and train.crossing(power, rates(*[None] * 4)) is None


def test_smooth() -> None:
    assert train.smooth([3.0, 1.0, 2.0]) == [3, 2, 2] and train.smooth([9.0, *[1.0] * train.SMOOTH])[-1] == 1


def test_a_training_ends_when_its_time_is_over(tiny: lab.Text) -> None:
    done = train.learn(TorchTrainer(tiny.preset, "sdpa"), tiny, 100, 0, seconds=1e-9)
    assert done["ended_early"] and done["steps"] == len(done["losses"]) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--steps 0", "'0' is no number of at least 1"),
        ("--context 1", "'1' is no number of at least 2"),
        ("--bench 1k,x", "'x' is no number of at least 2; accepted: 256, 4k"),
        ("--seconds nan", "'nan' is no number of seconds above 0"),
        ("--attention softmax", "invalid choice: 'softmax'"),
    ],
)
def test_bad_words_are_refused(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.parser().parse_args(words.split())
    assert said in capsys.readouterr().err


def test_contexts_are_read_in_order() -> None:
    assert train.parser().parse_args(["--bench", "4k,1k,64k"]).bench == [1024, 4096, 65536]


def test_what_is_not_there_is_named(tiny: lab.Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(words: str) -> dict[str, Any]:
        return train.main(train.parser().parse_args([*words.split(), "--out", str(tmp_path)]))

    with pytest.raises(ArgumentError, match="context 4096: the text has 2000 held-out bytes"):
        run("--context 4k --attention sdpa")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ToolchainError, match="--device cuda: torch finds no GPU; use --device cpu"):
        run("--device cuda")
    monkeypatch.setitem(sys.modules, "in_jax", None)
    with pytest.raises(ToolchainError, match="--framework jax: .*; pip install jax"):
        run("--framework jax")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run("--steps 1 --context 8 --attention sdpa")
    assert [path.name for path in tmp_path.iterdir()] == ["losses_torch_cpu.json"]


def test_a_gpus_model_is_one_that_the_kernels_take() -> None:
    o = train.parser().parse_args(["--device", "cuda", "--bench", "1k,64k"])
    short, long = (train.preset_of(o, context) for context in o.bench)
    assert short.config == long.config == lab.PRESETS["h200"].config and (short.batch, long.batch) == (64, 1)
    with torch.device("meta"):
        assert in_torch.Decoder(short.config).model.layers[0].self_attn.head_dim == 64


def test_the_page_says_what_the_results_say() -> None:
    page = (EXAMPLE / "README.md").read_text()
    for framework in ("torch", "jax"):
        held = json.loads((EXAMPLE / f"results/losses_{framework}_cpu.json").read_text())
        assert held["config"] == preset(512).config and held["context"] == 512
        runs = held["runs"]
        for name, run in runs.items():
            assert f"| {framework} | {name} | {np.mean(run['losses'][-20:]):.4f} | {run['held_out']:.4f} |" in page
        error = np.abs(np.subtract(runs["power"]["losses"], runs["attention-form"]["losses"]))
        assert error[:20].max() < ROUNDING
        # What rounding alone makes of the held-out loss: a standard deviation of 0.008.
        assert abs(runs["power"]["held_out"] - runs["attention-form"]["held_out"]) < 0.024
        assert (EXAMPLE / f"results/losses_{framework}_cpu.png").read_bytes()[:4] == b"\x89PNG"


def test_the_pages_command_is_accepted() -> None:
    lines = [line.strip() for line in (EXAMPLE / "README.md").read_text().splitlines()]
    commands = [
        line.partition("train.py")[2].partition(";")[0].rstrip("\\ ").split()
        for line in lines
        if line.startswith("python examples/train/train.py")
    ]
    benches = [o for o in map(train.parser().parse_args, commands) if o.bench]
    assert len(commands) > 4 and [o.framework for o in benches] == ["torch", "jax"]
    for o in benches:
        assert o.device == "cuda" and o.bench == [1024, 4096, 16384, 65536] and o.attention == ["power", "flash", "sdpa"]
    # Both under ten minutes, though what is left of a context comes on top.
    assert sum(len(o.attention) * o.seconds for o in benches) <= 420
