"""Metamorphosis: exact at the softmax end, the formula at the other, gradients, states, distillation; and what is refused by name."""

from __future__ import annotations

import copy
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from decoder import Decoder, _rotation
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vidrial.errors import ArgumentError, UnsupportedError
from vidrial.kernels.power_retention import power_retention, swapped
from vidrial.kernels.power_retention.metamorphosis import carry_states, distill_layers, metamorphose, set_interpolate
from vidrial.kernels.power_retention.reference import attention_form

ROOT = Path(__file__).parents[2]
COMMON = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "norm_epsilon": 1e-5,
}
FAMILIES = {
    "charlm": {"model_type": "charlm", "num_key_value_heads": 2},
    "llama": {"model_type": "llama", "num_key_value_heads": 1},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2},
    "starcoder2": {"model_type": "starcoder2", "num_key_value_heads": 1, "sliding_window": None},
}


def model_of(family: str = "llama", **more: Any) -> Any:
    """A tiny model with weights of a size at which softmax attention is far from uniform."""
    torch.manual_seed(1)
    model = Decoder(COMMON | FAMILIES[family] | more)
    for name, p in model.named_parameters():
        if "self_attn" in name and p.ndim == 2:
            nn.init.normal_(p, std=0.3)
    return model


def tokens(b: int = 2, t: int = 37) -> torch.Tensor:
    return torch.randint(50, (b, t), generator=torch.Generator().manual_seed(b * t))


@pytest.mark.parametrize("family", FAMILIES)
def test_at_one_it_is_the_model_before_and_only_gates_are_new(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(family)
    names, before = set(dict(model.named_parameters())), model(tokens())
    assert metamorphose(model, interpolate=1.0) is model
    with monkeypatch.context() as patch:
        patch.setattr(swapped, "power_retention", None)  # not even computed
        assert torch.equal(model(tokens()), before)
    new = set(dict(model.named_parameters())) - names
    assert new == {f"model.layers.{i}.self_attn.g_proj.{what}" for i in range(2) for what in ("weight", "bias")}
    set_interpolate(model, 0)
    power = model(tokens())
    assert (power - before).abs().max() > 0.1
    assert model.config["vidrial"] == {"layers": [0, 1], "degree": 2, "gates": [12, 128], "normalize": "sum"}


@pytest.mark.parametrize(("family", "degree", "normalize"), [("qwen3", 2, "sum"), ("starcoder2", 4, "sum"), ("llama", 2, "none")])
def test_a_swapped_layer_computes_the_formula(family: str, degree: int, normalize: str) -> None:
    """Against the float64 reference form, with positions turned as complex numbers."""
    model = metamorphose(model_of(family), degree=degree, normalize=normalize)
    attention, x = model.model.layers[0].self_attn, torch.randn(2, 37, 64)
    nn.init.normal_(attention.g_proj.weight, std=0.5)
    angle = np.arange(37)[:, None, None] * 10000.0 ** (-np.arange(0, 32, 2) / 32)
    full = torch.tensor(np.concatenate([angle, angle], -1), dtype=torch.float32)
    with torch.no_grad():
        found = attention(x, (full.cos(), full.sin()))
        q, k, v = (p(x).unflatten(-1, (-1, 32)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k, v = (f.double().numpy() for f in (attention.q_norm(q), attention.k_norm(k), v))
        log_g = np.log(1 / (1 + np.exp(-attention.g_proj(x).double().numpy())))
    turned = []
    for f in (q, k):
        z = (f[..., :16] + 1j * f[..., 16:]) * np.exp(1j * angle)
        turned.append(np.concatenate([z.real, z.imag], -1))
    y = attention_form(*turned, v, log_g, degree=degree, normalize=normalize).y.reshape(2, 37, 64)
    wanted = y @ attention.o_proj.weight.detach().double().numpy().T
    wanted += 0 if attention.o_proj.bias is None else attention.o_proj.bias.detach().double().numpy()
    assert np.abs(found.numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_between_the_ends_outputs_are_mixed() -> None:
    model = metamorphose(model_of())
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 9, 64)
    rotation = (torch.ones(9, 1, 32), torch.zeros(9, 1, 32))
    made = []
    for share in (1, 0, 0.25):
        set_interpolate(model, share)
        made.append(attention(x, rotation).detach())
    softmax, power, mixed = made
    torch.testing.assert_close(mixed, 0.25 * softmax + 0.75 * power, rtol=1e-5, atol=1e-6)


def test_gates_begin_at_memories_that_are_geometric() -> None:
    model = metamorphose(model_of("charlm", num_attention_heads=4, num_key_value_heads=4), gates=(12, 128))
    gate = torch.sigmoid(model.model.layers[1].self_attn.g_proj(torch.randn(3, 64)))
    np.testing.assert_allclose((1 / (1 - gate)).detach().numpy(), np.tile([12, 26.415, 58.146, 128], (3, 1)), rtol=1e-3)
    model = metamorphose(model_of("llama"), gates=(4, 16))  # one key head
    np.testing.assert_allclose(1 / (1 - torch.sigmoid(model.model.layers[0].self_attn.g_proj.bias.detach()).numpy()), [8], rtol=1e-5)


def test_layers_that_are_not_named_stay() -> None:
    model = model_of("starcoder2", sliding_window=8)
    metamorphose(model, layers=[1])
    assert [hasattr(layer.self_attn, "g_proj") for layer in model.model.layers] == [False, True]
    with pytest.raises(UnsupportedError, match=r"layers \[0\] are softmax attention, which has no state"), carry_states(model):
        pass


def test_gradients_reach_the_gates_and_checkpointing_changes_none() -> None:
    model = metamorphose(model_of())

    def gradients(through: Any) -> list[torch.Tensor]:
        model.zero_grad()
        x, rotation = model.model.embed_tokens(tokens()), (torch.ones(37, 1, 32), torch.zeros(37, 1, 32))
        for layer in model.model.layers:
            x = through(layer, x, rotation)
        functional.cross_entropy(model.lm_head(x).flatten(0, 1), tokens().flatten()).backward()
        return [p.grad.clone() for n, p in model.named_parameters() if "norm.weight" not in n or "layers" in n]

    plain = gradients(lambda layer, *inputs: layer(*inputs))
    again = gradients(lambda layer, *inputs: checkpoint(layer, *inputs, use_reentrant=False))
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    for layer in model.model.layers:
        assert layer.self_attn.g_proj.weight.grad.abs().max() > 1e-5 and layer.self_attn.g_proj.bias.grad.abs().max() > 1e-5


@pytest.mark.parametrize(("family", "normalize"), [("charlm", "sum"), ("llama", "none")])
def test_step_by_step_is_recomputation_token_for_token(family: str, normalize: str) -> None:
    model = metamorphose(model_of(family), normalize=normalize)
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.g_proj.weight, std=0.3)
    prompt, sizes = tokens(2, 20), set()
    with torch.no_grad(), carry_states(model) as states:
        logits, text = [model(prompt)[:, -1:]], prompt
        for _ in range(20):
            text = torch.cat((text, logits[-1].argmax(-1)), 1)
            logits.append(model(text[:, -1:], start=text.shape[1] - 1))
            sizes.add(sum(x.numel() for state in states if state is not None for x in (state.S, state.Z)))
        assert sizes == {2 * model.config.get("num_key_value_heads", 2) * 2 * (32 * 20 * 32 + 32 * 32)}
    with torch.no_grad():
        whole = model(text)[:, 19:]
    assert (torch.cat(logits, 1) - whole).abs().max() < 1e-5 * whole.abs().max()
    assert torch.equal(whole.argmax(-1)[:, :-1], text[:, 20:])
    assert torch.equal(model(prompt), model(prompt))  # nothing is carried any more


class Transformers(nn.Module):
    """An attention with the interface of transformers': keywords, [B, T, D] positions, a pair as result."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = inner.q_proj, inner.k_proj, inner.v_proj, inner.o_proj
        self.d = inner.head_dim

    def forward(self, hidden_states: Any, position_embeddings: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        q, k, v = (p(hidden_states).unflatten(-1, (-1, self.d)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(-2)), None


def test_what_is_no_module_is_refused() -> None:
    for call in (lambda: metamorphose(3), lambda: distill_layers(metamorphose(model_of()), None, [], 1, 1e-3)):
        with pytest.raises(ArgumentError, match=r"model: a \w+ has no layer with a self_attn"):
            call()


def test_an_empty_prompt_leaves_an_empty_state() -> None:
    model = metamorphose(model_of())
    with torch.no_grad(), carry_states(model) as states:
        model(tokens(t=0))
        assert all(one is not None and not one.S.any() and not one.Z.any() for one in states)
        y = model(tokens(), start=0)
    with torch.no_grad():
        assert torch.allclose(y, model(tokens()), atol=1e-5)


def test_an_attention_called_as_transformers_do() -> None:
    ours = model_of()
    theirs = copy.deepcopy(ours)
    theirs.config = SimpleNamespace(**theirs.config)
    for layer in theirs.model.layers:
        layer.self_attn = Transformers(layer.self_attn)
    metamorphose(ours), metamorphose(theirs)
    assert theirs.config.vidrial["layers"] == [0, 1]
    x, angle = torch.randn(2, 9, 64), torch.rand(9, 1, 16).repeat(1, 1, 2)
    wanted = ours.model.layers[0].self_attn(x, (angle.cos(), angle.sin()))
    attention, positions = theirs.model.layers[0].self_attn, tuple(f(angle)[None, :, 0].expand(2, 9, 32) for f in (torch.cos, torch.sin))
    found = attention(hidden_states=x, position_embeddings=positions, attention_mask=None, past_key_values=None, use_cache=False)
    assert found[1] is None and torch.equal(found[0], wanted)
    for share in (1, 0.5):
        set_interpolate(theirs, share)
        assert attention(hidden_states=x, position_embeddings=positions)[1] is None
    set_interpolate(theirs, 0)
    masked = attention(hidden_states=x, position_embeddings=positions, attention_mask=torch.ones(2, 9))
    assert torch.equal(masked[0], wanted)
    with pytest.raises(UnsupportedError, match="attention_mask: 3 dimensions"):
        attention(hidden_states=x, position_embeddings=positions, attention_mask=torch.ones(2, 9, 9))
    with pytest.raises(UnsupportedError, match=r"past_key_values: this cache keeps keys; pass power_cache\(model\)"):
        attention(hidden_states=x, position_embeddings=positions, past_key_values=object())
    with pytest.raises(ArgumentError, match="position_embeddings: power retention is called as softmax attention was"):
        attention(hidden_states=x)


def test_layers_learn_what_they_replaced_and_nothing_else_moves() -> None:
    model = model_of()
    teacher = copy.deepcopy(model)
    metamorphose(model, layers=[1])
    before, kept = copy.deepcopy(model), copy.deepcopy(teacher)
    with torch.no_grad():
        rotation = _rotation(0, 37, 32, 10000.0, torch.zeros(1))
        x = teacher.model.layers[0](teacher.model.embed_tokens(tokens()), rotation)
        x = teacher.model.layers[1].input_layernorm(x)
        softmax, power = (m.model.layers[1].self_attn(x, rotation) for m in (teacher, model))
    errors = distill_layers(model, teacher, [tokens()] * 12, steps=12, lr=1e-2)
    assert errors[0] == pytest.approx(float((power - softmax).square().sum() / softmax.square().sum()), rel=1e-5)
    assert errors[-1] < 0.8 * errors[0]
    # The same steps by hand.
    byhand, wanted = copy.deepcopy(before).model.layers[1].self_attn, []
    optimizer = torch.optim.AdamW(byhand.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(12):
        error = (byhand(x, rotation) - softmax).square().sum() / softmax.square().sum()
        wanted.append(float(error.detach()))
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 5) * (0.55 + 0.45 * np.cos(np.pi * step / 12))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    np.testing.assert_allclose(errors, wanted, rtol=1e-4)
    for one, other in zip(model.model.layers[1].self_attn.parameters(), byhand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    moved = {n for (n, p), (_, o) in zip(model.named_parameters(), before.named_parameters(), strict=True) if not torch.equal(p, o)}
    assert moved == {f"model.layers.1.self_attn.{n}" for n, _ in model.model.layers[1].self_attn.named_parameters()}
    for one, other in zip(teacher.parameters(), kept.parameters(), strict=True):
        assert torch.equal(one, other) and one.grad is None
    assert all(p.grad is None for p in model.parameters())
    assert not any(layer.self_attn._forward_hooks for layer in teacher.model.layers)


def test_a_copy_lives_on_its_own() -> None:
    model = metamorphose(model_of())
    other = copy.deepcopy(model)
    before = model(tokens())
    assert torch.equal(other(tokens()), before)
    set_interpolate(other, 1)
    nn.init.zeros_(other.model.layers[0].self_attn.q_proj.weight)
    assert torch.equal(model(tokens()), before)
    fresh = metamorphose(model_of())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(tokens()), before)


def test_autocast_gives_the_op_the_dtype_that_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = metamorphose(model_of()), set()
    wanted = model(tokens())

    def watched(q: Any, k: Any, v: Any, log_g: Any, **options: Any) -> Any:
        seen.update((q.dtype, k.dtype, v.dtype)), seen.add(f"gates {log_g.dtype}")
        return power_retention(q, k, v, log_g, **options)

    monkeypatch.setattr(swapped, "power_retention", watched)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(tokens())
    assert seen == {torch.bfloat16, "gates torch.float32"}
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.skipif(importlib.util.find_spec("vidrial.runtime.torch_ops") is None, reason="ops are not in torch's dispatcher")
def test_a_compiled_model_is_one_graph() -> None:
    model = metamorphose(model_of())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(tokens()), model(tokens()))
    compiled(tokens()).square().mean().backward()
    assert all(layer.self_attn.g_proj.weight.grad.abs().max() > 0 for layer in model.model.layers)


def edit(model: Any, **keys: Any) -> Any:
    model.config = {**model.config, **keys}
    return model


def without(model: Any, *keys: str) -> Any:
    model.config = {key: value for key, value in model.config.items() if key not in keys}
    return model


def lacking(model: Any, name: str) -> Any:
    delattr(model.model.layers[1].self_attn, name)
    return model


def norm_of_all_heads(model: Any) -> Any:
    model.model.layers[0].self_attn.q_norm = nn.RMSNorm(64)
    return model


# What is asked, of which model -> what is said.
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "odd degree": (None, {"degree": 3}, "degree=3: an odd power's weights change sign, so their sum is no normaliser"),
    "degree": (None, {"degree": 6}, "degree=6: no other degree has a kernel"),
    "normalize": (None, {"normalize": "mean"}, "normalize='mean' is not known"),
    "layers": (None, {"layers": [0, 2]}, r"layers=\[0, 2\]; accepted: unlike numbers of layers, 0 to 1"),
    "negative layer": (None, {"layers": [-1]}, r"layers=\[-1\]; accepted"),
    "a layer twice": (None, {"layers": [1, 1]}, r"layers=\[1, 1\]; accepted"),
    "no layers": (None, {"layers": []}, r"layers=\[\]; accepted"),
    "gates": (None, {"gates": (128, 12)}, r"gates=\(128, 12\); accepted: the shortest and the longest memory"),
    "a gate": (None, {"gates": (1, 12)}, r"gates=\(1, 12\); accepted"),
    "interpolate": (None, {"interpolate": 1.5}, "interpolate=1.5; accepted: a number from 0"),
    "NaN": (None, {"interpolate": float("nan")}, "interpolate=nan; accepted"),
    "no q": (
        lambda m: lacking(m, "q_proj"),
        {},
        "layer 1: its self_attn, a Attention, has no q_proj; accepted: q_proj, k_proj, v_proj, o_proj",
    ),
    "no o": (lambda m: lacking(m, "o_proj"), {}, "layer 1: its self_attn, a Attention, has no o_proj"),
    "no attention": (lambda m: m.lm_head, {}, "model: a Linear has no layer with a self_attn"),
    "softcapping": (
        lambda m: edit(m, attn_logit_softcapping=50.0),
        {},
        "attn_logit_softcapping=50.0: power retention has no logits to cap",
    ),
    "dropout": (lambda m: edit(m, attention_dropout=0.1), {}, "attention_dropout=0.1: power retention drops nothing"),
    "alibi": (lambda m: edit(m, alibi=True), {}, "alibi: power retention adds nothing to scores"),
    "twice": (metamorphose, {}, "model: its attention is power retention already"),
    "twice, other layers": (lambda m: metamorphose(m, layers=[0]), {"layers": [1]}, "model: its attention is power retention already"),
    "no config": (lambda m: m.model, {}, "model: it has no config"),
    "keys": (lambda m: without(m, "num_attention_heads", "head_dim"), {}, "its config has neither num_attention_heads nor head_dim"),
    "head": (lambda m: edit(m, head_dim=16), {}, "layer 0: its heads have 16 features; accepted: 32, 64, 128"),
    "wide norm": (norm_of_all_heads, {}, "layer 0: q_norm is of 64 features; accepted: one of a head's 32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_before_anything_changes(case: str) -> None:
    prepare, asked, message = REFUSED[case]
    model = model_of()
    model = prepare(model) if prepare else model
    names, config = set(dict(model.named_parameters())), getattr(model, "config", None)
    with pytest.raises((ArgumentError, UnsupportedError), match=message):
        metamorphose(model, **asked)
    assert set(dict(model.named_parameters())) == names and getattr(model, "config", None) == config


def test_sliding_windows_have_to_be_named() -> None:
    message = r"layers \[1\] attend within a sliding window, which power retention has not; name the layers"
    kinds = ["full_attention", "sliding_attention"]
    model = model_of("qwen3", sliding_window=8, use_sliding_window=True, layer_types=kinds)
    with pytest.raises(UnsupportedError, match=message):
        metamorphose(model)
    for layer in model.model.layers:  # attention that does not say it itself
        del layer.self_attn.window
    with pytest.raises(UnsupportedError, match=message):
        metamorphose(model)
    metamorphose(model, layers=[0, 1])
    unused = model_of("qwen3", sliding_window=8, use_sliding_window=False)
    metamorphose(unused)


def test_states_and_softmax_do_not_meet() -> None:
    model = metamorphose(model_of(), interpolate=0.5)
    with pytest.raises(ArgumentError, match="interpolate=0.5: softmax attention has no state"), carry_states(model):
        pass
    set_interpolate(model, 0)
    with carry_states(model):
        with pytest.raises(ArgumentError, match="interpolate=0.1: states are carried"):
            set_interpolate(model, 0.1)
        with pytest.raises(ArgumentError, match="its states are carried already"), carry_states(model):
            pass
    set_interpolate(model, 0.1)
    with pytest.raises(ArgumentError, match="interpolate=-1; accepted"):
        set_interpolate(model, -1)
    with pytest.raises(ArgumentError, match=re.escape("none of its layers is power retention; call metamorphose(model)")):
        set_interpolate(model_of(), 1)
    with (
        pytest.raises(UnsupportedError, match="degree=4: only degree 2 has a state"),
        carry_states(metamorphose(model_of(), degree=4)),
    ):
        pass


def test_distillation_refuses_what_does_not_fit() -> None:
    teacher = model_of()
    model = metamorphose(copy.deepcopy(teacher))
    ready = [tokens()]
    with pytest.raises(ArgumentError, match="batches ended after 1 of 2 steps"):
        distill_layers(model, teacher, ready, 2, 1e-3)
    assert not teacher.model.layers[0].self_attn._forward_hooks
    with pytest.raises(ArgumentError, match="teacher: it is metamorphosed itself"):
        distill_layers(model, model, ready, 1, 1e-3)
    with pytest.raises(ArgumentError, match="teacher has 1 layers and model 2"):
        distill_layers(model, model_of(num_hidden_layers=1), ready, 1, 1e-3)
    with pytest.raises(ArgumentError, match="steps=0; accepted"):
        distill_layers(model, teacher, ready, 0, 1e-3)
    with pytest.raises(ArgumentError, match="lr=0; accepted"):
        distill_layers(model, teacher, ready, 1, 0)
    set_interpolate(model, 0.5)
    with pytest.raises(ArgumentError, match="interpolate is above 0, so layers would copy what they hold"):
        distill_layers(model, teacher, ready, 1, 1e-3)
    set_interpolate(model, 0)
    for layer in model.model.layers:
        layer.self_attn.requires_grad_(False)
    with pytest.raises(ArgumentError, match="no parameter of its swapped attentions requires a gradient"):
        distill_layers(model, teacher, ready, 1, 1e-3)


def test_importing_it_loads_no_torch() -> None:
    program = "import vidrial.kernels.power_retention.metamorphosis, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
