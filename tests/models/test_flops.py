"""Weights, states and their FLOPs: by enumeration, by torch's counter, and the values that are known."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from vidrial.errors import ArgumentError, UnsupportedError
from vidrial.flops import (
    CONFIGS,
    LSTM,
    Attention,
    Degree1,
    Latent,
    Mixer,
    Model,
    Power,
    Window,
    mean_keys,
    parse_lengths,
    parse_mixer,
    rows,
    table,
)

GPT2, STARCODER, QWEN = (Model.of(name) for name in ("gpt2", "starcoder2-3b", "qwen3-14b"))
LENGTHS = (1, 2, 7, 64, 100, 1000)


@pytest.mark.parametrize(("d", "degree", "tile"), list(itertools.product((4, 8), (1, 2, 3, 4), (1, 2, 4))))
def test_rows_of_a_power_by_enumeration(d: int, degree: int, tile: int) -> None:
    blocks = itertools.combinations_with_replacement(range(d // tile), degree)
    assert rows(d, degree, tile) == sum(tile**degree for _ in blocks)


def test_rows_of_the_widths_in_use() -> None:
    assert [rows(d, 2) for d in (32, 64, 128)] == [528, 2080, 8256]
    assert rows(128, 2, 16) == 36 * 256 and rows(64, 3) == 45760 and rows(64, 4) == 766480


@pytest.mark.parametrize(("t", "window"), list(itertools.product(LENGTHS, (None, 1, 8, 64, 1000))))
def test_mean_keys_by_a_loop(t: int, window: int | None) -> None:
    assert mean_keys(t, window) == Fraction(sum(min(i + 1, window or t) for i in range(t)), t)


MIXERS = [
    Attention(6, 2, 8, 4),
    Window(6, 2, 8, 4, window=5),
    Latent(6, 12, 4, 8, 6),
    Latent(6, 12, 4, 8, 6, absorbed=False),
    Power(6, 2, 8, 4),
    Degree1(6, 2, 8, 4),
    LSTM(8),
]


def loop_at(mixer: Mixer, i: int) -> tuple[int, int]:
    """State numbers behind `i` tokens and FLOPs of the `i`-th: one multiply-add for each element of each product."""
    if isinstance(mixer, LSTM):
        return 2 * mixer.n, 4 * mixer.n
    if isinstance(mixer, Latent):
        scores, values = (mixer.rank + mixer.rope, mixer.rank) if mixer.absorbed else (mixer.d + mixer.rope, mixer.e)
        return i * (mixer.rank + mixer.rope), sum(2 * scores + 2 * values for _ in range(mixer.q_heads * i))
    if isinstance(mixer, Power):
        state = sum(5 for _ in itertools.combinations_with_replacement(range(8), mixer.degree))  # 4 columns, and the normaliser's
        return 2 * state, 2 * 2 * state + 6 * 2 * state
    keys = min(i, mixer.window) if isinstance(mixer, Window) else i
    return 2 * keys * (8 + 4), sum(2 * 8 + 2 * 4 for _ in range(6 * keys))


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda mixer: mixer.name)
def test_sizes_and_flops_by_a_loop(mixer: Mixer) -> None:
    for i in (1, 4, 5, 6, 40):
        assert (mixer.size(i), mixer.flops_at(i)) == loop_at(mixer, i)
    for t in (1, 5, 6, 23):
        assert mixer.flops(t) == Fraction(sum(loop_at(mixer, i + 1)[1] for i in range(t)), t)


@pytest.mark.parametrize(("t", "chunk"), list(itertools.product((1, 2, 9, 16, 17, 30), (1, 4, 8, 16, 100))))
def test_chunked_power_by_a_loop(t: int, chunk: int) -> None:
    q_heads, heads, d, e = 6, 2, 4, 3
    flops = 0
    for begin in range(0, t, chunk):
        tokens = range(begin, min(begin + chunk, t))
        flops += sum(2 * (d + e) * q_heads * (i - begin + 1) for i in tokens)
        flops += sum(2 * q_heads * 10 * (e + 1) for _ in tokens if begin > 0)
        flops += sum(2 * heads * 10 * (e + 1) for _ in tokens if begin + chunk < t)
    assert Power(q_heads, heads, d, e, chunk=chunk).flops(t) == Fraction(flops, t)


def test_a_chunk_as_long_as_the_sequence_is_attention() -> None:
    for t in (1, 100, 1024):
        assert Power(12, 12, 64, chunk=1024).flops(t) == Attention(12, 12, 64).flops(t)
    assert Power(12, 4, 64, chunk=1024).flops(1025) > Attention(12, 4, 64).flops(1024)


def test_heads_and_latents_shrink_bytes_alone() -> None:
    full, grouped = Attention(24, 24, 128), Attention(24, 2, 128)
    assert grouped.bytes(1000) * 12 == full.bytes(1000) and grouped.flops(1000) == full.flops(1000)
    latent = Latent(24, absorbed=True)
    assert latent.bytes(1000) < full.bytes(1000) / 10 and latent.flops(1000) / full.flops(1000) == Fraction(17, 4)


def test_a_transformers_state_beside_an_lstms() -> None:
    state = Attention(1, 1, 64).size
    assert state(1000) == 2000 * LSTM(64, vectors=1).size(1000) == 1000 * LSTM(64).size(1000)
    assert state(100_000) == 200_000 * LSTM(64, vectors=1).size(1) == 100_000 * LSTM(64).size(1)
    assert LSTM(64).weight_flops == 256 * LSTM(64).flops(1)


def test_weights_of_a_layer() -> None:
    assert [m.layer_weights for m in (GPT2, STARCODER, QWEN)] == [7_077_888, 95_944_704, 330_301_440]
    giga = [round(m.weight_flops(head) / 1e9, 3) for m in (GPT2, STARCODER, QWEN) for head in (False, True)]
    assert giga == [0.170, 0.247, 5.757, 6.059, 26.424, 27.980]


# What their publishers say, in billions: gpt2's and StarCoder2's head is the embedding, and gpt2 has 1024 positions.
PUBLISHED = {
    "gpt2": (0.124, 1, 1024),
    "gpt2-xl": (1.558, 1, 1024),
    "llama-3-8b": (8.03, 2, 0),
    "llama-3-70b": (70.6, 2, 0),
    "qwen3-8b": (8.19, 2, 0),
}
PUBLISHED |= {"qwen3-14b": (14.8, 2, 0), "starcoder2-3b": (3.03, 1, 0), "starcoder2-7b": (7.17, 1, 0), "powercoder-3b": (3.03, 1, 0)}


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_have_the_published_number_of_parameters(name: str) -> None:
    model, (billions, embeddings, positions) = Model.of(name), PUBLISHED[name]
    count = model.layers * model.layer_weights + (embeddings * model.vocab + positions) * model.hidden
    assert count / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize(("model", "length"), [(GPT2, 9215), (STARCODER, 31231), (QWEN, 64511)], ids=lambda x: getattr(x, "name", x))
def test_balanced_length_of_attention(model: Model, length: int) -> None:
    attention = Attention.of(model)
    assert model.balanced(attention) == length
    assert model.ratio(attention, length) <= 1 < model.ratio(attention, length - 1)


def test_balanced_length_of_others() -> None:
    assert [GPT2.balanced(Latent(12, absorbed=absorbed)) for absorbed in (False, True)] == [3686, 1084]
    for mixer in (Window.of(GPT2), Power.of(GPT2), Power.of(GPT2, degree=4), Degree1.of(GPT2), LSTM.of(GPT2), Power.of(GPT2, chunk=64)):
        assert GPT2.balanced(mixer) is None
    # A window just as wide as the balance: approached, never reached; one token more, and it is, late.
    narrow, wide = (Window.of(GPT2, window=w) for w in (4608, 4609))
    assert GPT2.balanced(narrow) is None
    late = GPT2.balanced(wide)
    assert late is not None and GPT2.ratio(wide, late) <= 1 < GPT2.ratio(wide, late - 1) and late > 10**6
    # The head's weights are more to balance.
    assert GPT2.balanced(Attention.of(GPT2), head=True) == 13404
    tiny = dataclasses.replace(GPT2, hidden=1, inner=1)
    assert tiny.balanced(Latent(1000)) == 1 and tiny.balanced(Attention.of(tiny)) == 4


@pytest.mark.parametrize("t", [1, 1000, 65536, 10**6])
def test_ratios_of_constant_states_hold_at_every_length(t: int) -> None:
    ratios = [float(m.ratio(Power.of(m), t)) for m in (GPT2, STARCODER, QWEN)]
    assert [round(r, 2) for r in ratios] == [2.18, 3.46, 6.46]
    assert [round(float(m.ratio(Power.of(m, tile=16), t)), 2) for m in (STARCODER, QWEN)] == [3.10, 5.79]
    assert [round(float(m.ratio(Degree1.of(m), t)), 1) for m in (GPT2, STARCODER, QWEN)] == [70.9, 223.5, 416.7]
    assert [round(float(m.ratio(Power.of(m, degree=3), t)), 3) for m in (GPT2, STARCODER, QWEN)] == [0.099, 0.080, 0.149]


def test_ratios_that_fall_with_the_length() -> None:
    lengths = (1000, 8192, 65536, 131072, 10**6)
    found = {m.name: [float(f"{float(m.ratio(Attention.of(m), t)):.3g}") for t in lengths] for m in (GPT2, STARCODER, QWEN)}
    assert found == {
        "gpt2": [9.21, 1.12, 0.141, 0.0703, 0.00922],
        "starcoder2-3b": [31.2, 3.81, 0.477, 0.238, 0.0312],
        "qwen3-14b": [64.4, 7.87, 0.984, 0.492, 0.0645],
    }
    assert [float(f"{float(GPT2.ratio(Window.of(GPT2), t)):.3g}") for t in lengths] == [9.21, 4.8, 4.54, 4.52, 4.5]
    chunked = Power.of(STARCODER, chunk=1024)
    assert [float(f"{float(STARCODER.ratio(chunked, t)):.3g}") for t in lengths] == [31.2, 3.5, 3.16, 3.13, 3.11]


def test_states_in_bytes_and_where_powers_overtake_caches() -> None:
    for model, cache, state in ((GPT2, 4.83e9, 78e6), (STARCODER, 4.03e9, 256e6), (QWEN, 21.5e9, 1.36e9)):
        by_mixer = {r.mixer.name: r.bytes for r in table(model, [Attention.of(model), Power.of(model)], [131072])}
        assert by_mixer["attention"] == pytest.approx(cache, rel=3e-3) and by_mixer["power:2"] == pytest.approx(state, rel=6e-3)
    for d, length in ((64, 1056), (128, 4160)):
        for heads in (1, 8):
            power, attention = Power(8, heads, d), Attention(8, heads, d)
            assert attention.size(length - 1) < power.size(1) <= attention.size(length + 5)
    assert Power.of(QWEN).size(1) == Power.of(QWEN).size(10**6) == 8_520_192 * 8 * 129 // (8 * 129)


def test_an_lstm_stands_in_the_place_of_the_projections() -> None:
    lstm = LSTM.of(GPT2)
    assert GPT2.weight_flops(mixer=lstm) == 2 * 12 * (8 * 768**2 + 2 * 768 * 3072)
    assert GPT2.ratio(lstm, 5) == Fraction(GPT2.weight_flops(mixer=lstm), 12 * 4 * 768)


# A table of a known notebook (retention's perf/wsfr.ipynb) counts otherwise. Each difference, as a factor between its count and ours.


def test_known_difference_projections_count_half_there() -> None:
    for model in (GPT2, STARCODER, QWEN):
        projections = 2 * model.hidden * model.d * (model.q_heads + model.heads)
        theirs = projections + (3 if model.gated else 2) * 2 * model.hidden * model.inner
        assert 2 * model.layer_weights - theirs == projections
    xl = Model.of("gpt2-xl")
    assert Fraction(2 * xl.layer_weights, 2 * xl.layer_weights - 4 * 1600 * 1600) == Fraction(6, 5)


def test_known_difference_one_product_is_not_halved_there() -> None:
    for t in (1000, 65536):
        theirs = 2 * 12 * 64 * mean_keys(t) + 2 * 12 * 64 * t
        assert theirs / Attention(12, 12, 64).flops(t) == Fraction(1, 2) + Fraction(t, t + 1)


def test_known_difference_a_window_is_charged_for_itself_there() -> None:
    t, window = 8192, 1024
    theirs = Attention(12, 12, 64).flops(window)
    assert Window(12, 12, 64, window=window).flops(t) / theirs == Fraction(2 * t - window + 1, t) * Fraction(window, window + 1)


def test_known_difference_the_rest_of_the_last_chunk_is_dropped_there() -> None:
    power = Power(12, 12, 64, chunk=1024)
    theirs = [(t // 1024) * 1024 * power.flops(1024) for t in (2047, 1023)]
    assert theirs[0] == 1024 * power.flops(1024) < 2047 * power.flops(2047) / 6
    assert theirs[1] == 0 < power.flops(1023)


def test_known_difference_an_lstms_weights_are_nothing_there() -> None:
    assert LSTM(768).weight_flops == 16 * 768**2
    # Per token: no batch in one column and not in the other; and no convolution that multiplies the state.
    assert Degree1(8, 8, 64).size(1) == 8 * 64 * 65 and Degree1(8, 8, 64).flops(1) == 2 * 16 * 64 * 65


def test_weight_flops_are_torchs(tiny: Path) -> None:
    torch = pytest.importorskip("torch")
    counter = pytest.importorskip("torch.utils.flop_counter")
    from decoder import Decoder

    for folder in sorted(p for p in tiny.iterdir() if p.is_dir()):
        decoder, model, tokens = Decoder.read(folder), Model.of(folder), torch.zeros(2, 48, dtype=torch.long)
        assert model.name == folder.name
        with counter.FlopCounterMode(display=False) as counted, torch.no_grad():
            decoder(tokens)
        # Attention on the CPU counts nothing, or, under a mask, the products of whole matrices.
        products = sum(n for op, n in counted.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))
        assert products == model.weight_flops(head=True) * tokens.numel()


@pytest.fixture
def tiny() -> Path:
    return Path(__file__).with_name("tiny")


# Where the shape comes from.


def test_of_dict_file_folder_and_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen3-14b"]))
    (tmp_path / "other.json").write_text(json.dumps(CONFIGS["gpt2"] | {"n_inner": 100}))
    found = [Model.of(x) for x in (CONFIGS["qwen3-14b"], tmp_path, str(tmp_path / "config.json"), "Qwen3-14B")]
    assert {dataclasses.replace(m, name="") for m in found} == {dataclasses.replace(QWEN, name="")}
    assert [m.name for m in found] == ["qwen3", tmp_path.name, tmp_path.name, "qwen3-14b"]
    assert Model.of(tmp_path / "other.json").inner == 100 and Model.of(tmp_path / "other.json").name == "other"


@pytest.mark.parametrize("name", ["gpt2", "starcoder2-3b", "qwen3-14b", "llama-3-8b"])
def test_missing_keys_are_named(name: str) -> None:
    config = CONFIGS[name]
    for key in config.keys() - {"n_inner", "model_type"} - ({"head_dim"} if name != "qwen3-14b" else set()):
        with pytest.raises(ArgumentError, match=f"the config has no {key}, which a {config['model_type']} needs"):
            Model.of({k: v for k, v in config.items() if k != key})
    with pytest.raises(ArgumentError, match=r"vocab_size is '7'; accepted: an integer, 1 or more"):
        Model.of(config | {"vocab_size": "7"})


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="model_type is 'mixtral'; accepted: llama, qwen3, starcoder2, powercoder, gpt2"):
        Model.of(CONFIGS["gpt2"] | {"model_type": "mixtral"})
    with pytest.raises(UnsupportedError, match="model_type is None"):
        Model.of({})
    with pytest.raises(ArgumentError, match="nothing: No such file.*accepted: a config.json, its folder, or one of gpt2, "):
        Model.of("nothing")
    for text, why in (("{", "is no JSON"), ("[]", "holds a list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ArgumentError, match=why):
            Model.of(tmp_path)
    with pytest.raises(ArgumentError, match="n_embd=770 is no multiple of n_head=12"):
        Model.of(CONFIGS["gpt2"] | {"n_embd": 770})


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Attention(3, 2, 64), "q_heads=3 is no multiple of heads=2"),
        (lambda: Power(3, 2, 64), "q_heads=3 is no multiple of heads=2"),
        (lambda: Attention(2, 2, 0), "d=0; accepted: an integer, 1 or more"),
        (lambda: Window(2, 2, 8, window=2.5), "window=2.5"),
        (lambda: Power(2, 2, 64, tile=3), "tile=3 does not divide d=64"),
        (lambda: Power(2, 2, 64, degree=65), "degree=65; accepted: 1 to 64"),
        (lambda: Power(2, 2, 64, chunk=0), "chunk=0"),
        (lambda: Degree1(2, 2, 64, degree=2), "take Power"),
        (lambda: LSTM(True), "n=True"),
        (lambda: Attention(2, 2, 8).flops(0), "t=0"),
        (lambda: Power(2, 2, 8).size(-1), "t=-1"),
        (lambda: dataclasses.replace(GPT2, layers=0), "layers=0"),
    ],
)
def test_bad_values_are_named(make, why: str) -> None:
    with pytest.raises(ArgumentError, match=why):
        make()


@pytest.mark.parametrize(
    ("text", "mixer"),
    [
        ("attention", Attention(40, 8, 128)),
        ("window:4096", Window(40, 8, 128, window=4096)),
        ("latent:256,rope=32,absorbed=0", Latent(40, 256, 32, 128, absorbed=False)),
        ("power:4", Power(40, 8, 128, degree=4)),
        ("power:2,tile=16,chunk=1024", Power(40, 8, 128, tile=16, chunk=1024)),
        ("degree1,chunk=64", Degree1(40, 8, 128, chunk=64)),
        ("lstm", LSTM(5120)),
        ("lstm:64,vectors=1", LSTM(64, 1)),
    ],
)
def test_mixers_are_spelled_as_they_are_named(text: str, mixer: Mixer) -> None:
    assert parse_mixer(text, QWEN) == mixer == parse_mixer(mixer.name, QWEN)


@pytest.mark.parametrize(
    "text", ["", "mamba", "attention:2", "degree1:2", "power:", "power:-2", "power:2,size=3", "power:2,chunk", "power:2,chunk=1,chunk=2"]
)
def test_what_is_no_mixer_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="accepted: attention, window:1024, "):
        parse_mixer(text, QWEN)


def test_lengths() -> None:
    assert parse_lengths("1000") == [1000] and parse_lengths("8k") == [8192] and parse_lengths("2M") == [2**21]
    assert parse_lengths("1k..1M") == [4**i * 1024 for i in range(6)]
    assert parse_lengths("1k..100k") == [1024, 4096, 16384, 65536, 102400] and parse_lengths("7..7") == [7]
    for text in ("", "k", "0", "-1", "1.5k", "8K", "1k..", "2k..1k", "1..2..3", "9" * 5000):
        with pytest.raises(ArgumentError, match="accepted: 1000, 8k, 1M, or a range"):
            parse_lengths(text)


def test_neither_numpy_nor_torch_is_needed() -> None:
    program = (
        "import sys, vidrial.flops as f; print(f.Model.of('gpt2').balanced(f.Attention(12, 12, 64)), {'numpy', 'torch'} & set(sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert ended.stdout.strip() == "9215 set()"
