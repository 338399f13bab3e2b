"""The GPT in torch: what its attention may be, and a step of its training."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from decoder import Attention, Decoder, Mixer, softmax_attention
from lab import Preset, fresh, loss_of
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from vidrial.kernels.flash_attention import flash_attention
from vidrial.kernels.power_retention import power_retention

# Adam's, in both frameworks.
BETAS, EPS, CLIP = (0.9, 0.95), 1e-8, 1.0
# Tokens that the first and the last head of a layer remember when training begins; those between are geometric.
MEMORIES = (12, 128)
# power_retention's own bounds.
LOWEST_LOG_GATE, LOWEST_NORMALISER = -60.0, 1e-20


def log_gates(attention: Attention, hidden: Tensor) -> Tensor:
    """[batch, t, heads], float32."""
    gates: Any = attention.g_proj
    return functional.logsigmoid(gates(hidden).float())


def power(attention: Attention, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Power retention by Vidrial's op and its own gradients."""
    return power_retention(q.to(v.dtype), k.to(v.dtype), v, log_gates(attention, hidden))


def attention_form(attention: Attention, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by its definition, every weight of [t, t], float32: torch's operations, autograd through them."""
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
        a = log_gates(attention, hidden).clamp(LOWEST_LOG_GATE, 0).cumsum(1).transpose(1, 2)
        later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
        decay = (a[..., :, None] - a[..., None, :]).masked_fill(later, -math.inf).exp()
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])) ** 2 * decay
        return (weights @ v / weights.sum(-1, keepdim=True).clamp_min(LOWEST_NORMALISER)).transpose(1, 2)


class Flash(torch.autograd.Function):
    """Forward by Vidrial's flash attention. It has no backward pass yet, so torch's SDPA recomputes, and its backward runs."""

    @staticmethod
    def forward(ctx: Any, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.attention = attention
        ctx.save_for_backward(q, k, v)
        return flash_attention(q, k, v, causal=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            y = softmax_attention(ctx.attention, dy, *inputs)
        return (None, *torch.autograd.grad(y, inputs, dy))


def flash(attention: Attention, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, forward by Vidrial's op."""
    apply: Callable[..., Tensor] = Flash.apply
    return apply(attention, q.to(v.dtype), k.to(v.dtype), v)


MIXERS: dict[str, Mixer] = {"power": power, "attention-form": attention_form, "flash": flash, "sdpa": softmax_attention}
GATED = ("power", "attention-form")


def gpt(config: dict[str, Any], attention: str, seed: int = 0, nudge: int = 0) -> Decoder:
    """A decoder with nothing learnt; of one seed all begin with the same weights, and gates read nothing yet.

    A `nudge` other than 0 seeds relative changes of 1e-7, a bit or two of float32, in all weights: what rounding makes of a training.
    """
    model = fresh(config, seed)
    layers: Any = model.model.layers
    for one in (layer.self_attn for layer in layers):
        one.mixer = MIXERS[attention]
        if attention in GATED:
            heads = one.k_proj.out_features // one.head_dim
            one.g_proj = nn.Linear(one.k_proj.in_features, heads)
            with torch.no_grad():
                one.g_proj.weight.zero_()
                one.g_proj.bias.copy_(torch.from_numpy(np.log(np.geomspace(*MEMORIES, heads) - 1)))
    if nudge:
        generator = torch.Generator().manual_seed(nudge)
        with torch.no_grad():
            for x in model.parameters():
                x.mul_(1 + 1e-7 * torch.randn(x.shape, generator=generator))
    return model


class TorchTrainer:
    """A model and Adam; bfloat16 products on a GPU, float32 on a CPU."""

    def __init__(self, preset: Preset, attention: str, seed: int = 0, nudge: int = 0) -> None:
        self.preset, self.model = preset, gpt(preset.config, attention, seed, nudge).to(preset.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), betas=BETAS, eps=EPS)
        if preset.device != "cpu":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def step(self, tokens: Tensor, lr: float) -> float:
        """The loss of windows [batch, t + 1] in nats per byte, before the step along its gradient."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad()
        with self.preset.autocast():
            loss: Any = loss_of(self.model, tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return float(loss.detach())

    def logits(self, tokens: Tensor) -> Tensor:
        """[batch, t, 256] of tokens [batch, t]."""
        found: Tensor = self.model(tokens)
        return found

    def peak_bytes(self) -> int | None:
        """The most memory that was allocated at once since the model was made, on a GPU."""
        return None if self.preset.device == "cpu" else torch.cuda.max_memory_allocated()
