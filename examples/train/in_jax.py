"""The same GPT in plain jax.numpy, from the same weights: forward, gradient and Adam are one jitted function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import torch
from decoder import Shape
from in_torch import BETAS, CLIP, EPS, LOWEST_LOG_GATE, LOWEST_NORMALISER, gpt
from lab import Preset
from torch import Tensor

import vidrial as vd
from vidrial.kernels.flash_attention import flash_attention
from vidrial.kernels.power_retention import power_retention

Params: TypeAlias = Mapping[str, Any]
# (q, k, v [batch, t, heads, d], log gates [batch, t, heads] or None) -> [batch, t, heads, d]
Attend: TypeAlias = Callable[[Any, Any, Any, Any], Any]


def attention_form(q: Any, k: Any, v: Any, log_g: Any) -> Any:
    """Power retention by its definition, every weight of [t, t], float32."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    a = jnp.cumsum(jnp.clip(log_g, LOWEST_LOG_GATE, 0), 1).swapaxes(1, 2)
    seen = jnp.tri(q.shape[1], dtype=bool)
    decay = jnp.exp(jnp.where(seen, a[..., :, None] - a[..., None, :], -jnp.inf))
    weights = (jnp.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])) ** 2 * decay
    norm = jnp.maximum(weights.sum(-1), LOWEST_NORMALISER)
    return jnp.einsum("bhij,bjhd->bihd", weights / norm[..., None], v)


def softmax(q: Any, k: Any, v: Any) -> Any:
    """JAX's own; where it may by cuDNN, which keeps no [t, t] and takes no float32."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla" if q.dtype == jnp.float32 else "cudnn")


@jax.custom_vjp  # type: ignore[untyped-decorator]
def flash(q: Any, k: Any, v: Any) -> Any:
    """Forward by Vidrial's flash attention, which has no backward pass yet: JAX's own recomputes, and its backward runs."""
    return flash_attention(q, k, v, causal=True)


flash.defvjp(lambda q, k, v: (flash(q, k, v), (q, k, v)), lambda inputs, dy: jax.vjp(softmax, *inputs)[1](dy))

ATTENDS: dict[str, Attend] = {
    "power": power_retention,
    "attention-form": attention_form,
    "flash": lambda q, k, v, _: flash(q, k, v),
    "sdpa": lambda q, k, v, _: softmax(q, k, v),
}


def logits_of(params: Params, tokens: Any, shape: Shape, attend: Attend, dtype: Any) -> Any:
    """[batch, t, vocab] of tokens [batch, t]; products in `dtype`, sums along the layers float32, as torch's autocast has them."""

    def linear(x: Any, name: str) -> Any:
        y = x.astype(dtype) @ params[f"{name}.weight"].astype(dtype).T
        return y + params[f"{name}.bias"].astype(dtype) if f"{name}.bias" in params else y

    def norm(x: Any, name: str) -> Any:
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + shape.eps) * params[f"{name}.weight"]

    def rotate(x: Any) -> Any:
        first, second = jnp.split(x, 2, -1)
        return x * jnp.cos(angle) + jnp.concatenate((-second, first), -1) * jnp.sin(angle)

    frequency = shape.theta ** (-jnp.arange(0, shape.d, 2, dtype=jnp.float32) / shape.d)
    angle = jnp.arange(tokens.shape[1], dtype=jnp.float32)[:, None, None] * jnp.concatenate((frequency, frequency))
    x = params["model.embed_tokens.weight"][tokens]
    for layer in (f"model.layers.{i}" for i in range(len(shape.windows))):
        hidden, at = norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attn"
        q, k, v = (linear(hidden, f"{at}.{name}").reshape(*tokens.shape, -1, shape.d) for name in ("q_proj", "k_proj", "v_proj"))
        gated = f"{at}.g_proj.weight" in params
        log_g = jax.nn.log_sigmoid(linear(hidden, f"{at}.g_proj").astype(jnp.float32)) if gated else None
        y = attend(rotate(q).astype(dtype), rotate(k).astype(dtype), v, log_g)
        x = x + linear(y.reshape(*tokens.shape, -1), f"{at}.o_proj")
        inner = jax.nn.gelu(linear(norm(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp.c_fc"), approximate=True)
        x = x + linear(inner, f"{layer}.mlp.c_proj")
    return (norm(x, "model.norm").astype(dtype) @ params["model.embed_tokens.weight"].astype(dtype).T).astype(jnp.float32)


def loss_of(params: Params, tokens: Any, **how: Any) -> Any:
    """Mean of the nats per byte of windows [batch, t + 1]."""
    found = jax.nn.log_softmax(logits_of(params, tokens[:, :-1], **how))
    return -jnp.take_along_axis(found, tokens[:, 1:, None], -1).mean()


def step_of(state: Mapping[str, Params], tokens: Any, lr: Any, n: Any, **how: Any) -> tuple[Any, Any]:
    """The n-th step of Adam, counted from 1, along a gradient clipped as torch does: (the loss before, the state behind it)."""
    loss, gradient = jax.value_and_grad(partial(loss_of, **how))(state["params"], tokens)
    size = jnp.sqrt(sum((g * g).sum() for g in gradient.values()))
    gradient = {name: g * jnp.minimum(1, CLIP / (size + 1e-6)) for name, g in gradient.items()}
    first, second = BETAS
    m = {name: first * state["m"][name] + (1 - first) * g for name, g in gradient.items()}
    v = {name: second * state["v"][name] + (1 - second) * g * g for name, g in gradient.items()}
    params = {name: x - lr / (1 - first**n) * m[name] / (jnp.sqrt(v[name] / (1 - second**n)) + EPS) for name, x in state["params"].items()}
    return loss, {"params": params, "m": m, "v": v}


class JaxTrainer:
    """A model and Adam; bfloat16 products on a GPU, float32 on a CPU.

    Raises:
        vd.ToolchainError: JAX finds no GPU.
    """

    def __init__(self, preset: Preset, attention: str, seed: int = 0, nudge: int = 0) -> None:
        platform = "cpu" if preset.device == "cpu" else "cuda"
        try:
            self._device = jax.devices(platform)[0]
        except RuntimeError as error:
            raise vd.ToolchainError(f"--device {preset.device}: JAX finds no GPU; use --device cpu, or install jax[cuda12]") from error
        dtype = jnp.float32 if preset.device == "cpu" else jnp.bfloat16
        how = {"shape": Shape.of(preset.config), "attend": ATTENDS[attention], "dtype": dtype}
        params = {name: x.detach().numpy() for name, x in gpt(preset.config, attention, seed, nudge).named_parameters()}
        zeros = {name: np.zeros_like(x) for name, x in params.items()}
        self._state: Any = jax.device_put({"params": params, "m": zeros, "v": zeros}, self._device)
        self._logits, self._step = jax.jit(partial(logits_of, **how)), jax.jit(partial(step_of, **how), donate_argnums=0)
        self._compiled: Any = None
        self._steps = 0

    def step(self, tokens: Tensor, lr: float) -> float:
        """The loss of windows [batch, t + 1] in nats per byte, before the step along its gradient."""
        self._steps += 1
        given = (self._state, self._tokens(tokens), np.float32(lr), np.float32(self._steps))
        if self._compiled is None:
            self._compiled = self._step.lower(*given).compile()
        loss, self._state = self._compiled(*given)
        return float(loss)

    def logits(self, tokens: Tensor) -> Tensor:
        """[batch, t, 256] of tokens [batch, t]."""
        return torch.from_numpy(np.array(self._logits(self._state["params"], self._tokens(tokens))))

    def _tokens(self, tokens: Tensor) -> Any:
        return jax.device_put(tokens.numpy().astype(np.int32), self._device)

    def peak_bytes(self) -> int | None:
        """What XLA plans for a step: arguments, results and what lies between; None before the first step."""
        if self._compiled is None:
            return None
        plan = self._compiled.memory_analysis()
        held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
        return int(held + plan.temp_size_in_bytes)
