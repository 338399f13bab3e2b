"""examples/charlm/decoder.py: the same logits as transformers', the same bytes written, and refusals by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from decoder import FAMILIES, Decoder, Shape, _rotation, softmax_attention  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from vidrial.errors import ArgumentError, UnsupportedError  # noqa: E402

TINY = Path(__file__).with_name("tiny")
NAMES = ("llama", "qwen3", "starcoder2")
TOY = {
    "model_type": "charlm",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TOY |= {"num_key_value_heads": 1, "rms_norm_eps": 1e-6}


def config_of(name: str) -> dict[str, Any]:
    return json.loads((TINY / name / "config.json").read_text())


def difference(decoder: Decoder, name: str) -> float:
    made = np.load(TINY / name / "logits.npz")
    with torch.no_grad():
        return float(np.abs(decoder(torch.from_numpy(made["tokens"])).numpy() - made["logits"]).max())


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name: str) -> None:
    assert difference(Decoder.read(TINY / name), name) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_is_written_with_the_same_bytes(name: str, tmp_path: Path) -> None:
    Decoder.read(TINY / name).write(tmp_path / "new" / "folder")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "new" / "folder" / file).read_bytes() == (TINY / name / file).read_bytes()


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
        ("llama", "rms_norm_eps", 1e-2),
        ("qwen3", "layer_types", ["full_attention", "full_attention"]),
        ("qwen3", "layer_types", ["sliding_attention", "full_attention"]),
        ("qwen3", "sliding_window", 6),
        ("starcoder2", "sliding_window", 10),
        ("starcoder2", "sliding_window", None),
        ("starcoder2", "norm_epsilon", 1e-3),
        ("starcoder2", "rope_parameters", None),
    ],
)
def test_each_key_shows_in_the_logits(name: str, key: str, value: object, tmp_path: Path) -> None:
    shutil.copytree(TINY / name, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(config_of(name) | {key: value}))
    assert difference(Decoder.read(tmp_path), name) > 1e-3


def test_windows_without_layer_types() -> None:
    config = {k: v for k, v in config_of("qwen3").items() if k != "layer_types"}
    assert Shape.of(config).windows == (None, 7)
    assert Shape.of(config | {"use_sliding_window": False}).windows == (None, None)


def test_positions_may_begin_anywhere() -> None:
    like = torch.zeros(())
    for early, late in zip(_rotation(0, 9, 8, 1e4, like), _rotation(4, 5, 8, 1e4, like), strict=True):
        torch.testing.assert_close(early[4:], late, rtol=0, atol=0)
    decoder, tokens = Decoder(TOY), torch.arange(10)[None] % 16
    with torch.no_grad():
        # Attention depends on distances alone.
        torch.testing.assert_close(decoder(tokens, 1000), decoder(tokens), rtol=0, atol=1e-4)


def test_a_mixer_stands_in_the_place_of_the_attention() -> None:
    torch.manual_seed(0)
    decoder, tokens = Decoder(TOY), torch.randint(0, 16, (3, 7))
    attention = decoder.model.layers[1].self_attn
    seen = []

    def mixer(module: object, hidden: Any, q: Any, k: Any, v: Any) -> Any:
        seen.append((module, *(tuple(x.shape) for x in (hidden, q, k, v))))
        return softmax_attention(attention, hidden, q, k, v)

    with torch.no_grad():
        before = decoder(tokens)
        attention.mixer = mixer
        assert torch.equal(decoder(tokens), before)
        assert seen == [(attention, (3, 7, 8), (3, 7, 2, 4), (3, 7, 1, 4), (3, 7, 1, 4))]
        attention.mixer = lambda module, hidden, q, k, v: torch.zeros_like(q)
        assert not torch.equal(decoder(tokens), before)


def test_parameters_of_the_toy() -> None:
    decoder = Decoder(TOY)
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight
    layer = {"input_layernorm", "post_attention_layernorm", "mlp.c_fc", "mlp.c_proj", *(f"self_attn.{x}_proj" for x in "qkvo")}
    names = {f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in layer}
    assert dict(decoder.named_parameters()).keys() == names | {"model.embed_tokens.weight", "model.norm.weight"}


def test_a_folder_in_bfloat16_and_in_several_files(tmp_path: Path) -> None:
    weights = {n: w.bfloat16() for n, w in load_file(TINY / "llama" / "model.safetensors").items()}
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama")))
    half = dict(list(weights.items())[: len(weights) // 2])
    save_file(half, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ArgumentError, match=r"it has no model\.layers"):
        Decoder.read(tmp_path)
    save_file({n: w for n, w in weights.items() if n not in half}, tmp_path / "model-00002-of-00002.safetensors")
    decoder = Decoder.read(tmp_path)
    assert all(torch.equal(p, weights[n]) and p.dtype == torch.bfloat16 for n, p in decoder.named_parameters())
    assert 1e-3 < difference(decoder.float(), "llama") < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_missing_keys_are_named(name: str) -> None:
    config, needed = config_of(name), {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
    needed |= {"num_attention_heads", "num_key_value_heads", "norm_epsilon" if name == "starcoder2" else "rms_norm_eps"}
    for key in needed | ({"head_dim"} if name == "qwen3" else set()):
        with pytest.raises(ArgumentError, match=f"config.json has no {key}; "):
            Decoder({k: v for k, v in config.items() if k != key})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model_type": "gemma"}, f"'gemma' is no decoder of this file; accepted: {', '.join(FAMILIES)}"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' of a llama; accepted: silu"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"residual_dropout": 0.1}, "residual_dropout is 0.1"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_what_it_lacks_is_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        Decoder(config_of("llama") | change)
    with pytest.raises(ArgumentError, match="num_attention_heads=4 must be a multiple of num_key_value_heads=3"):
        Decoder(config_of("llama") | {"num_key_value_heads": 3})


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="is no model's folder"):
        Decoder.read(tmp_path)
    weights = load_file(TINY / "llama" / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama")))
    gate = "model.layers.1.self_attn.g_proj.weight"
    for change, why in (
        ({gate: torch.zeros(2, 32)}, f"it has {gate}, which it lacks"),
        ({"model.norm.weight": torch.zeros(31)}, r"model.norm.weight is \[31\]; its config.json says \[32\]"),
    ):
        save_file(weights | change, tmp_path / "model.safetensors")
        with pytest.raises(ArgumentError, match=why):
            Decoder.read(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_what_is_written(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers (the extra hf) is not installed")
    decoder = Decoder.read(TINY / name)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1.5)
        decoder.write(tmp_path)
        tokens = torch.from_numpy(np.load(TINY / name / "logits.npz")["tokens"])
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()(tokens).logits
        torch.testing.assert_close(theirs, decoder(tokens), rtol=0, atol=2e-5)
        # And it writes what this reads.
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        theirs.save_pretrained(tmp_path / "theirs")
        torch.testing.assert_close(Decoder.read(tmp_path / "theirs")(tokens), decoder(tokens), rtol=0, atol=0)
