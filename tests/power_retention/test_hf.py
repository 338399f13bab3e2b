"""Metamorphosed models of transformers: generation with states, padding, hybrids, and folders that never load as softmax attention."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers", reason="transformers (the extra hf) is not installed")
torch = pytest.importorskip("torch")

from vidrial.errors import ArgumentError, UnsupportedError  # noqa: E402
from vidrial.kernels.power_retention import hf  # noqa: E402
from vidrial.kernels.power_retention.metamorphosis import metamorphose, set_interpolate  # noqa: E402

ROOT = Path(__file__).parents[2]
SHAPE = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
SHAPE |= {"bos_token_id": None, "eos_token_id": None}
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 32}),
    "starcoder2": (transformers.Starcoder2Config, transformers.Starcoder2ForCausalLM, {}),
}
COUNT = 8
GREEDY: dict[str, Any] = {"max_new_tokens": COUNT, "do_sample": False, "pad_token_id": 0}


def model_of(name: str, layers: int = 2, **more: Any) -> Any:
    config, kind, own = FAMILIES[name]
    torch.manual_seed(0)
    model = kind(config(**SHAPE, num_hidden_layers=layers, **own, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def tokens_of(t: int, seed: int = 0) -> Any:
    return torch.randint(1, 64, (2, t), generator=torch.Generator().manual_seed(seed))


def recomputed(model: Any, tokens: Any, count: int) -> Any:
    for _ in range(count):
        tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(-1)), 1)
    return tokens


def padded(tokens: Any, by: tuple[int, int]) -> tuple[Any, Any]:
    """Both sequences behind so many tokens of padding, the shorter one cut; and the mask."""
    t = tokens.shape[1] + min(by)
    rows = [torch.cat((torch.zeros(n, dtype=torch.long), row[: t - n])) for n, row in zip(by, tokens, strict=True)]
    return torch.stack(rows), torch.stack([(torch.arange(t) >= n).long() for n in by])


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_generate_with_states_is_recomputation(name: str) -> None:
    model, tokens = metamorphose(model_of(name)), tokens_of(24)
    wanted = recomputed(model, tokens, COUNT)
    assert torch.equal(model.generate(tokens, attention_mask=torch.ones_like(tokens), **GREEDY), wanted)
    assert torch.equal(model.generate(tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **GREEDY), wanted)
    # Left padding, another one for each sequence: each continues as it does alone.
    rows, mask = padded(tokens, (3, 11))
    made = model.generate(rows, attention_mask=mask, **GREEDY)
    for i, n in enumerate((3, 11)):
        assert torch.equal(made[i : i + 1, n:], recomputed(model, rows[i : i + 1, n:], COUNT))


@torch.no_grad()
def test_a_longer_text() -> None:
    model, tokens = metamorphose(model_of("llama")), tokens_of(40)
    made = model.generate(tokens, attention_mask=torch.ones_like(tokens), **GREEDY | {"max_new_tokens": 20})
    assert torch.equal(made, recomputed(model, tokens, 20))


@torch.no_grad()
def test_beams_are_those_of_recomputation() -> None:
    model, tokens = metamorphose(model_of("llama")), tokens_of(12)
    options = GREEDY | {"num_beams": 3, "max_new_tokens": 20, "attention_mask": torch.ones_like(tokens)}
    made, wanted = (model.generate(tokens, use_cache=kept, **options) for kept in (True, False))
    assert torch.equal(made, wanted) and not torch.equal(made, recomputed(model, tokens, 20))


@pytest.mark.parametrize("layers", [(0, 2), (1,)])
@torch.no_grad()
def test_hybrids(layers: tuple[int, ...]) -> None:
    model, tokens = metamorphose(model_of("llama", 3), layers=layers), tokens_of(20)
    wanted = recomputed(model, tokens, COUNT)
    assert torch.equal(model.generate(tokens, attention_mask=torch.ones_like(tokens), **GREEDY), wanted)
    rows, mask = padded(tokens, (5, 0))
    made = model.generate(rows, attention_mask=mask, **GREEDY)
    assert torch.equal(made[0:1, 5:], recomputed(model, rows[0:1, 5:], COUNT)) and torch.equal(made[1:], recomputed(model, rows[1:], COUNT))


@torch.no_grad()
def test_windows_that_stay_and_a_window_that_goes() -> None:
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    for layers in ((0,), (1,)):
        model, tokens = metamorphose(model_of("qwen3", 2, **window), layers=layers), tokens_of(20)
        rows, mask = padded(tokens, (12, 0))
        made = model.generate(rows, attention_mask=mask, **GREEDY)
        assert torch.equal(made[0:1, 12:], recomputed(model, rows[0:1, 12:], COUNT)) and torch.equal(
            made[1:], recomputed(model, rows[1:], COUNT)
        )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_step_by_step_and_in_pieces(attention: str) -> None:
    model, tokens = metamorphose(model_of("qwen3", attn_implementation=attention)), tokens_of(33)
    full, cache, made = model(tokens).logits, hf.power_cache(model), []
    for begin, end in ((0, 20), (20, 29), *((i, i + 1) for i in range(29, 33))):
        made.append(model(tokens[:, begin:end], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(made, 1), full, rtol=0, atol=1e-5 * float(full.abs().max()))
    assert cache.get_seq_length() == 33
    # A state forgets as a cache does.
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(tokens[:, :20], past_key_values=cache).logits, made[0], rtol=0, atol=0)


@torch.no_grad()
def test_the_state_is_as_large_as_it_was() -> None:
    model, sizes = metamorphose(model_of("llama")), []
    for t in (1, 7, 200):
        cache = hf.power_cache(model)
        model(tokens_of(t), past_key_values=cache)
        sizes.append(sum(x.numel() * x.element_size() for layer in cache.layers for x in layer.recurrent_states.values()))
    # Of two sequences and layers, one head each: D (D + 8) / 2 rows of E, and Z.
    assert sizes == [2 * 2 * (32 * 40 // 2 * 32 + 32 * 32) * 4] * 3


@torch.no_grad()
def test_padding_within_the_forward_pass_and_masks_that_are_refused() -> None:
    model, tokens = metamorphose(model_of("llama")), tokens_of(20)
    full = model(tokens).logits
    rows, mask = padded(tokens, (6, 6))
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    made = model(rows, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(made[:, 6:], full, rtol=0, atol=1e-5 * float(full.abs().max()))
    assert made.isfinite().all()
    # A mask of keys alone, as flash attention takes it, of more keys than tokens; and one that is added to scores.
    hidden, attention = torch.randn(2, 5, 64), model.model.layers[0].self_attn
    rotation = model.model.rotary_emb(hidden, torch.arange(5)[None].repeat(2, 1))
    alive = torch.tensor([[1, 1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    seen = torch.ones(5, 7).tril(2).bool() & alive[:, None, None].bool()
    found = [attention(hidden, rotation, m)[0] for m in (alive, seen, torch.zeros(seen.shape).masked_fill(~seen, -1e9))]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(found[0][1], attention(hidden, rotation)[0][1]) and not torch.allclose(
        found[0][0], attention(hidden, rotation)[0][0]
    )
    # Padding between tokens decays nothing: they stand as next to each other.
    keep = torch.tensor([0, 1, 4])
    hole = torch.zeros(2, 5, dtype=torch.long).index_fill(1, keep, 1)
    apart = attention(hidden, rotation, hole)[0][:, keep]
    torch.testing.assert_close(apart, attention(hidden[:, keep], tuple(x[:, keep] for x in rotation))[0], rtol=1e-5, atol=1e-6)
    # Two sequences in one row: positions begin again, and tokens do not see all before them.
    packed = torch.cat((torch.arange(8), torch.arange(12)))[None].repeat(2, 1)
    with pytest.raises(UnsupportedError, match="attention_mask: tokens do not see all before them"):
        model(tokens, position_ids=packed)
    whole = torch.ones(2, 1, 20, 20, dtype=torch.bool)
    with pytest.raises(UnsupportedError, match="accepted: a causal mask, and padding"):
        model(tokens, attention_mask=whole)
    with pytest.raises(UnsupportedError, match="attention_mask: 3 dimensions"):
        model.model.layers[0].self_attn(torch.zeros(2, 20, 64), model.model.rotary_emb(full, positions[:, :20]), whole[:, 0])


def test_gradients_reach_the_gates_and_checkpointing_leaves_them() -> None:
    model, tokens = metamorphose(model_of("llama")).train(), tokens_of(24)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    gates = [g for n, g in found[0].items() if "g_proj" in n]
    assert len(gates) == 4 and all(g.abs().max() > 0 for g in gates)
    for n, g in found[0].items():
        torch.testing.assert_close(found[1][n], g, rtol=1e-6, atol=1e-6, msg=n)


def test_padding_leaves_gradients_finite() -> None:
    model = metamorphose(model_of("llama")).train()
    rows, mask = padded(tokens_of(20), (9, 2))
    model(rows, attention_mask=mask, labels=rows.masked_fill(mask == 0, -100)).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_folder_is_the_model_that_was_saved(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, tokens = model_of(name, 3), tokens_of(16)
    model = metamorphose(copy.deepcopy(original), layers=(0, 2), gates=(4, 64))
    for layer in (0, 2):
        torch.nn.init.normal_(model.model.layers[layer].self_attn.g_proj.weight)
    model.save_pretrained(tmp_path)
    full = model(tokens).logits
    assert not torch.allclose(full, original(tokens).logits)
    for load in (hf.from_pretrained, transformers.AutoModelForCausalLM.from_pretrained):
        again = load(tmp_path).eval()
        assert torch.equal(again(tokens).logits, full)
        assert torch.equal(again.generate(tokens, attention_mask=torch.ones_like(tokens), **GREEDY), recomputed(model, tokens, COUNT))
    # Again a folder of the same bytes; and a copy is a model of its own.
    again.save_pretrained(tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()
    assert torch.equal(copy.deepcopy(again)(tokens).logits, full)
    assert json.loads((tmp_path / "config.json").read_text())["vidrial"] == {
        "layers": [0, 2],
        "degree": 2,
        "gates": [4.0, 64.0],
        "normalize": "sum",
    }


@torch.no_grad()
def test_a_model_without_a_head_leaves_its_family_as_it_is(tmp_path: Path) -> None:
    model, tokens = model_of("llama"), tokens_of(6)
    body = metamorphose(copy.deepcopy(model.model))
    assert not torch.allclose(body(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
    metamorphose(model).save_pretrained(tmp_path)
    assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()(tokens).logits, model(tokens).logits)


def test_a_folder_is_never_loaded_as_softmax_attention_in_silence(tmp_path: Path) -> None:
    metamorphose(model_of("llama")).save_pretrained(tmp_path)
    # Where nobody has imported Vidrial transformers does not know the type.
    program = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode != 0 and "vidrial_power_llama" in ended.stderr
    # And the class of before, by its own name, warns in words.
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    finally:
        logger.removeHandler(handler)
    assert any("`vidrial_power_llama` to instantiate a model of type `llama`" in text for text in said)


@torch.no_grad()
def test_caches_that_hold_no_states_are_refused(tmp_path: Path) -> None:
    plain, tokens = model_of("llama"), tokens_of(5)
    with pytest.raises(ArgumentError, match="none of its layers is power retention"):
        hf.power_cache(plain)
    plain.save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match="a llama as it was published"):
        hf.from_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match="no such file"):
        hf.from_pretrained(tmp_path / "none")
    hybrid, model = metamorphose(copy.deepcopy(plain), layers=(1,)), metamorphose(copy.deepcopy(plain))
    with pytest.raises(UnsupportedError, match="this cache keeps keys; pass power_cache"):
        model(tokens, past_key_values=transformers.DynamicCache())
    with pytest.raises(UnsupportedError, match="make the cache by power_cache"):
        hybrid(tokens, past_key_values=hf.power_cache(model))
    quartic = metamorphose(copy.deepcopy(plain), degree=4)
    with pytest.raises(UnsupportedError, match="degree=4: only degree 2 has a state"):
        quartic.generate(tokens, attention_mask=torch.ones_like(tokens), **GREEDY)
    assert torch.equal(
        quartic.generate(tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **GREEDY), recomputed(quartic, tokens, COUNT)
    )
    set_interpolate(model, 0.5)
    with pytest.raises(ArgumentError, match="interpolate=0.5: softmax attention has no state"):
        hf.power_cache(model)


@torch.no_grad()
def test_all_of_softmax_attention_is_the_model_before() -> None:
    for name in FAMILIES:
        model, tokens = model_of(name), tokens_of(20)
        before = model(tokens).logits
        names = {n for n, _ in model.named_parameters()}
        assert torch.equal(metamorphose(model, interpolate=1.0)(tokens).logits, before)
        assert {n.partition("self_attn.")[2] for n, _ in model.named_parameters() if n not in names} == {"g_proj.weight", "g_proj.bias"}
