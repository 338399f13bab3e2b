"""`vidrial flops` and `vidrial icl`: what they print, write and refuse."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vidrial.cli import main as cli
from vidrial.cli.models import length_name, metric
from vidrial.flops import CONFIGS
from vidrial.icl import by_context, losses


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Runs the command line: exit code, standard output, standard error."""

    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


def rows_of(out: str, title: str) -> dict[str, list[str]]:
    """First word -> the other words, of each line of a table; of the first such line where several begin alike."""
    lines = out[out.index(title) :].split("\n\n")[0].splitlines()[2:]
    return {line.split()[0]: line.split()[1:] for line in reversed(lines)}


def test_flops_prints_ratios_flops_bytes_and_numbers(run) -> None:
    code, out, err = run(
        "flops", "gpt2", "--t", "1000", "--t", "64k..1M", "--mixer", "power:2", "--mixer", "window:1024", "--mixer", "latent:512"
    )
    assert (code, err) == (0, "") and out.startswith("gpt2: 12 layers of 7,077,888 weights, 170 MFLOP per token\n")
    lengths = ["1000", "64k", "256k", "1M"]
    assert rows_of(out, "weight FLOPs per state FLOP") == {
        "attention": ["9.21", "0.141", "0.0352", "0.00879", "9215"],
        "power:2": ["2.18"] * 4 + ["-"],
        "window:1024": ["9.21", "4.54", "4.51", "4.5", "never"],
        "latent:512": ["1.08", "0.0165", "0.00414", "0.00103", "1084"],
    }
    assert re.search(rf"^ +{' +'.join(lengths)} +balanced at$", out, re.MULTILINE)
    assert rows_of(out, "state FLOPs per token")["attention"][:2] == ["18.5", "M"]
    assert rows_of(out, "bytes of the state")["power:2"] == ["74.3", "MiB"] * 4
    assert rows_of(out, "numbers of the state")["attention"][:4] == ["18.4", "M", "1.21", "G"]
    code, out, _ = run("flops", "gpt2", "--t", "1k", "--head")
    assert "247 MFLOP per token with those of the head" in out and rows_of(out, "weight FLOPs")["attention"][-1] == "13404"
    assert list(reversed(rows_of(out, "weight FLOPs"))) == ["attention", "window:1024", "power:2", "degree1"]


def test_flops_writes_json_and_a_picture(run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen3-14b"]))
    code, out, err = run(
        "flops",
        tmp_path,
        "--t",
        "6..7",
        "--t",
        "1024",
        "--mixer",
        "window:4",
        "--mixer",
        "lstm",
        "--json",
        tmp_path / "f.json",
        "--png",
        tmp_path / "f.png",
    )
    assert (code, err) == (0, "") and out.endswith(f"{tmp_path / 'f.json'}\n{tmp_path / 'f.png'}\n")
    assert (tmp_path / "f.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    held = json.loads((tmp_path / "f.json").read_text())
    assert held["layer_weights"] == 330_301_440 and held["balanced"] == {"attention": 64511, "window:4": None, "lstm:5120": None}
    assert held["model"]["layers"] == 40
    by_mixer = {(row["mixer"], row["t"]): row for row in held["rows"]}
    assert len(by_mixer) == 9 and by_mixer["attention", 1024]["bytes"] == 40 * 2 * 8 * 256 * 1024
    # 1 + 2 + 3 + 4 + 4 + 4 keys in 6 tokens are 3 on the average; 22 in 7 are no integer.
    assert by_mixer["window:4", 6]["state_flops"] == 40 * 2 * 40 * 256 * 3
    assert by_mixer["window:4", 7]["state_flops"] == [40 * 2 * 40 * 256 * 22, 7]
    assert by_mixer["lstm:5120", 6]["weight_flops"] == 2 * 40 * (8 * 5120**2 + 3 * 5120 * 17408)
    assert by_mixer["attention", 6]["ratio"] == pytest.approx(330_301_440 / (40 * 256 * 3.5))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["flops", "nothing"], "nothing: No such file or directory; accepted: a config.json, its folder, or one of gpt2, "),
        (["flops", "gpt2", "--mixer", "mamba"], "mixer 'mamba'; accepted: attention, "),
        (["flops", "gpt2", "--mixer", "power:2,tile=5"], "tile=5 does not divide d=64"),
        (["flops", "gpt2", "--t", "1K"], "length '1K'; accepted: "),
        (["flops", "gpt2", "--json", "no/where.json"], "--json"),
        (["icl", "nothing.npz"], "nothing.npz: no such file"),
    ],
)
def test_mistakes_are_one_line(run, words: list[str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no").write_text("a file")
    code, _, err = run(*words)
    assert code == 2 and err.startswith("vidrial: ") and err.count("\n") == 1 and why in err


def test_a_picture_without_matplotlib_says_what_to_install(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    code, out, err = run("flops", "gpt2", "--t", "1k", "--png", tmp_path / "f.png")
    assert code == 2 and "pip install matplotlib" in err and "balanced at" in out


STREAM = np.random.default_rng(0).integers(0, 50, 20_000)


def known(reach: float) -> Any:
    """A model whose loss is the token's own, less 0.1 per doubling of the tokens before it within `reach`."""
    own = np.random.default_rng(3).normal(3, 1.9, 50)
    return lambda tokens: own[tokens[:, 1:]] - 0.1 * np.log2(np.minimum(np.arange(1, tokens.shape[1]), reach))


def test_icl_prints_and_draws_the_curve_and_the_excess(run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    contexts = [4, 8, 16, 32, 64, 128]
    for name, reach in (("full", np.inf), ("window", 32)):
        by_context(known(reach), STREAM, contexts, targets=1, windows=100).save(tmp_path / f"{name}.npz")
    code, out, err = run("icl", tmp_path / "window.npz", "--against", tmp_path / "full.npz", "--png", tmp_path / "c.png")
    assert (code, err) == (0, "") and out.endswith(f"{tmp_path / 'c.png'}\n")
    assert (tmp_path / "c.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    table = rows_of(out, "loss in nats, of 100 windows")
    assert {c: [words[0], *words[-2:]] for c, words in table.items()} == {
        **{str(c): ["100", "0.0000", "0.0000"] for c in (4, 8, 16, 32)},
        "64": ["100", "0.1000", "0.0000"],
        "128": ["100", "0.2000", "0.0000"],
    }
    lines = rows_of(out, "per doubling of the context")
    assert " ".join(lines["full"]) == "-0.1000 0.0000 none that the noise does not explain"
    at = re.fullmatch(
        r"-0\.\d+ 0\.0000 at (\d+) tokens \(\d+ to \d+\): -0\.(?:10|09)\d\d before, -?0\.00\d\d behind", " ".join(lines["window"])
    )
    assert at is not None and 30 <= int(at[1]) <= 34
    code, out, _ = run("icl", tmp_path / "full.npz", "--low", "32")
    assert code == 0 and rows_of(out, "loss in").keys() == {"32", "64", "128"} and "too few points to tell" in out


def test_icl_of_losses_by_position(run, tmp_path: Path) -> None:
    one = losses(known(np.inf), STREAM, 100, 20)
    one.save(tmp_path / "one.npz")
    code, out, _ = run("icl", tmp_path / "one.npz", "--low", "8")
    table = rows_of(out, "loss in nats, of 20 windows")
    assert code == 0 and [*reversed(table)] == ["8", "12", "16", "24", "32", "48", "64", "96"] and table["96"][0] == "100"
    assert float(table["8"][1]) == pytest.approx(one.values[:, 7:11].mean(), abs=1e-4)
    losses(known(np.inf), STREAM[1:], 100, 20).save(tmp_path / "other.npz")
    code, _, err = run("icl", tmp_path / "one.npz", "--against", tmp_path / "other.npz")
    assert code == 2 and "predict different tokens" in err


def test_numbers_and_lengths_as_they_are_read() -> None:
    assert [metric(x) for x in (0.5, 999, 1536, 26.424e9, 3e12, 5e15)] == ["0.5", "999", "1.54 k", "26.4 G", "3 T", "5e+03 T"]
    assert [length_name(t) for t in (1000, 1024, 102400, 2**20, 3 * 2**19)] == ["1000", "1k", "100k", "1M", "1536k"]


def test_a_picture_is_a_png_whatever_its_name(run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    held = tmp_path / "losses.npz"
    np.savez(held, losses=np.random.default_rng(0).random((4, 64)))
    for words in (("flops", "gpt2", "--t", "1k"), ("icl", held)):
        picture = tmp_path / "picture.txt"
        assert run(*words, "--png", picture)[0] == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.unlink()


def test_nan_is_no_amount(run) -> None:
    for words in (("icl", "losses.npz", "--low"), ("check", "power_retention", "--minutes"), ("sweep", "power_retention", "--seconds")):
        code, _, err = run(*words, "nan")
        assert code == 2 and "nan is no number" in err
