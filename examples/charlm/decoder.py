"""A decoder of the shapes of Llama, Qwen3 and StarCoder2: their config.json and parameter names, so that their folders are read and written.

Needs torch and safetensors, not transformers. What an attention does with its queries, keys and values is one function, its `mixer`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import vidrial as vd

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Family:
    """What a `model_type` does that its config.json does not say: `gated` MLP, LayerNorm, norms of queries and keys;
    and, unless it says so, biases and an embedding that is the head too."""

    act: str
    gated: bool
    layer_norm: bool = False
    qk_norm: bool = False
    bias: bool = False
    tied: bool = False


# charlm is the toy of this folder: what is left of a decoder that needs neither gates nor biases.
FAMILIES = {
    "llama": Family("silu", gated=True),
    "qwen3": Family("silu", gated=True, qk_norm=True),
    "starcoder2": Family("gelu_pytorch_tanh", gated=False, layer_norm=True, bias=True, tied=True),
    "charlm": Family("gelu_pytorch_tanh", gated=False, tied=True),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class Shape:
    """What the decoder needs of a config.json.

    `windows` holds one entry per layer: how many tokens attention reaches back, itself included, or None. `head_bias` is the bias of the
    attention's projections, `mlp_bias` that of the MLP's.
    """

    family: Family
    vocab: int
    hidden: int
    inner: int
    q_heads: int
    heads: int
    d: int
    eps: float
    theta: float
    tied: bool
    head_bias: bool
    mlp_bias: bool
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """Read a config.json.

        Raises:
            vd.ArgumentError: a key is missing or has a value that cannot be. vd.UnsupportedError: a family, rotation, activation or dropout
                that this decoder lacks.
        """
        kind = _need(config, "model_type")
        if kind not in FAMILIES:
            raise vd.UnsupportedError(f"model_type {kind!r} is no decoder of this file; accepted: {', '.join(FAMILIES)}")
        family = FAMILIES[kind]
        act = config.get("hidden_act", family.act)
        if act != family.act:
            raise vd.UnsupportedError(f"hidden_act {act!r} of a {kind}; accepted: {family.act}")
        for key in ("attention_dropout", "residual_dropout", "embedding_dropout"):
            if config.get(key):
                raise vd.UnsupportedError(f"{key} is {config[key]}: this decoder drops nothing; set it to 0 in config.json")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rotation = rope.get("rope_type", rope.get("type", "default"))
        if rotation != "default" or rope.get("partial_rotary_factor", 1) != 1:
            raise vd.UnsupportedError(f"the rotation of positions is {rope}; accepted: rope_type 'default' of whole heads")
        layers, hidden, q_heads = (_need(config, key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
        heads = _need(config, "num_key_value_heads")
        if q_heads % heads:
            raise vd.ArgumentError(f"num_attention_heads={q_heads} must be a multiple of num_key_value_heads={heads}")
        return cls(
            family,
            _need(config, "vocab_size"),
            hidden,
            _need(config, "intermediate_size"),
            q_heads,
            heads,
            (_need(config, "head_dim") if kind == "qwen3" else config.get("head_dim")) or hidden // q_heads,
            _need(config, "norm_epsilon" if family.layer_norm else "rms_norm_eps"),
            rope.get("rope_theta", config.get("rope_theta", 10000.0)),
            config.get("tie_word_embeddings", family.tied),
            config.get("use_bias" if family.bias else "attention_bias", family.bias),
            config.get("use_bias" if family.bias else "mlp_bias", family.bias),
            _windows(config, kind, layers),
        )

    def norm(self) -> nn.Module:
        """A norm of hidden states."""
        return nn.LayerNorm(self.hidden, self.eps) if self.family.layer_norm else nn.RMSNorm(self.hidden, self.eps)


def _need(config: dict[str, Any], key: str) -> Any:
    if key not in config:
        raise vd.ArgumentError(f"config.json has no {key}; a {config.get('model_type', 'decoder')} needs it")
    return config[key]


def _windows(config: dict[str, Any], kind: str, layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    if kind != "qwen3":
        return (window if kind == "starcoder2" else None,) * layers
    first = config.get("max_window_layers", 28) if config.get("use_sliding_window") else layers
    kinds = config.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return tuple(window if one == "sliding_attention" else None for one in kinds)


def softmax_attention(attention: Attention, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, within the attention's window if it has one; [batch, t, heads, d] like all mixers."""
    t, mask = q.shape[1], None
    if attention.window is not None and attention.window < t:
        i = torch.arange(t, device=q.device)
        mask = (i[:, None] >= i) & (i[:, None] - i < attention.window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


class Attention(nn.Module):
    """Projections, rotated positions, and between them the `mixer`.

    Called as `mixer(self, hidden, q, k, v)` with hidden [batch, t, hidden], q [batch, t, q_heads, d], k and v [batch, t, heads, d], it
    returns [batch, t, q_heads, d]. Replace it to replace the attention; whatever parameters it needs belong to this module.
    """

    def __init__(self, shape: Shape, window: int | None) -> None:
        super().__init__()
        self.head_dim, self.window, self.mixer = shape.d, window, softmax_attention
        self.q_proj = nn.Linear(shape.hidden, shape.q_heads * shape.d, shape.head_bias)
        self.k_proj = nn.Linear(shape.hidden, shape.heads * shape.d, shape.head_bias)
        self.v_proj = nn.Linear(shape.hidden, shape.heads * shape.d, shape.head_bias)
        self.o_proj = nn.Linear(shape.q_heads * shape.d, shape.hidden, shape.head_bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(shape.d, shape.eps) if shape.family.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (project(hidden).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _rotate(self.q_norm(q), rotation), _rotate(self.k_norm(k), rotation)
        out: Tensor = self.o_proj(self.mixer(self, hidden, q, k, v).flatten(-2))
        return out


def _rotation(start: int, t: int, d: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions from `start` on, [t, 1, d], in the dtype of `like`."""
    frequency = theta ** (-torch.arange(0, d, 2, device=like.device).float() / d)
    angle = torch.arange(start, start + t, device=like.device).float()[:, None, None] * torch.cat((frequency, frequency))
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * rotation[0] + torch.cat((-second, first), -1) * rotation[1]


class MLP(nn.Module):
    """Up, act, down."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.act = ACTIVATIONS[shape.family.act]
        self.c_fc = nn.Linear(shape.hidden, shape.inner, shape.mlp_bias)
        self.c_proj = nn.Linear(shape.inner, shape.hidden, shape.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c_proj(self.act(self.c_fc(x)))
        return y


class GatedMLP(nn.Module):
    """Gate and up, their product behind the gate's act, down."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.act = ACTIVATIONS[shape.family.act]
        self.gate_proj = nn.Linear(shape.hidden, shape.inner, shape.mlp_bias)
        self.up_proj = nn.Linear(shape.hidden, shape.inner, shape.mlp_bias)
        self.down_proj = nn.Linear(shape.inner, shape.hidden, shape.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return y


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: Shape, window: int | None) -> None:
        super().__init__()
        self.self_attn = Attention(shape, window)
        self.mlp = GatedMLP(shape) if shape.family.gated else MLP(shape)
        self.input_layernorm, self.post_attention_layernorm = shape.norm(), shape.norm()

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


class Body(nn.Module):
    """Tokens [batch, t] -> hidden states [batch, t, hidden] behind the last norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, window) for window in shape.windows)
        self.norm = shape.norm()

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        x: Tensor = self.embed_tokens(tokens)
        rotation = _rotation(start, tokens.shape[1], self.shape.d, self.shape.theta, x)
        for layer in self.layers:
            x = layer(x, rotation)
        y: Tensor = self.norm(x)
        return y


class Decoder(nn.Module):
    """The model of a config.json, as a dict; parameters are torch's defaults until `read` or training."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        shape = Shape.of(config)
        self.config, self.model = config, Body(shape)
        self.lm_head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        if shape.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Logits [batch, t, vocab] of tokens [batch, t], the first of which stands at position `start`."""
        logits: Tensor = self.lm_head(self.model(tokens, start))
        return logits

    @classmethod
    def read(cls, folder: str | Path) -> Decoder:
        """The decoder in a folder with a config.json and one or more .safetensors, in the dtype of its embedding.

        Raises:
            vd.ArgumentError: a file, key or parameter is missing, or there are more parameters than the decoder has, as where an attention
                was replaced: such a model is never taken for what it was before.
        """
        path = Path(folder)
        files = sorted(path.glob("*.safetensors"))
        if not (path / "config.json").is_file() or not files:
            raise vd.ArgumentError(f"{path} is no model's folder; it holds config.json and *.safetensors")
        config, weights = json.loads((path / "config.json").read_text()), {}
        for file in files:
            weights.update(load_file(file))
        decoder = cls(config)
        wanted = dict(decoder.named_parameters())
        missing, more = wanted.keys() - weights.keys(), weights.keys() - wanted.keys() - {"lm_head.weight"}
        if missing or more:
            found = ", ".join([*(f"no {name}" for name in sorted(missing)), *(f"{name}, which it lacks" for name in sorted(more))])
            raise vd.ArgumentError(f"{path} is not the {config['model_type']} of its config.json; it has {found}")
        wrong = [n for n, p in wanted.items() if p.shape != weights[n].shape]
        if wrong:
            raise vd.ArgumentError(
                f"{path}: {wrong[0]} is {list(weights[wrong[0]].shape)}; its config.json says {list(wanted[wrong[0]].shape)}"
            )
        decoder.to(weights["model.embed_tokens.weight"].dtype).load_state_dict(weights, strict=False)
        return decoder

    def write(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, as transformers does, into `folder`, which is made if need be."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n")
        # Parameters that are one tensor (tied) come once.
        save_file({n: p.detach().contiguous() for n, p in self.named_parameters()}, path / WEIGHTS, {"format": "pt"})


Mixer: TypeAlias = Callable[[Attention, Tensor, Tensor, Tensor, Tensor], Tensor]
