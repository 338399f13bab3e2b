"""A softmax attention that has become power retention: what it is, and what it computes with its projections and its gate.

Importing this loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from vidrial import ArgumentError, UnsupportedError
from vidrial.kernels.power_retention import PowerState, power_retention

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass
class Metamorphosis:
    """What a swapped attention is: `states` is the list that its calls begin from and leave their states in, while one is carried."""

    index: int
    d: int
    degree: int
    normalize: str
    interpolate: float
    pair: bool  # it returns (y, None), as the attention of transformers does
    states: list[PowerState[Any] | None] | None = None


@cache
def swapped_class(kind: type) -> type:
    """The class of an attention whose class was `kind`, and whose parameters are that one's."""
    softmax: Callable[..., Any] = kind.forward  # type: ignore[attr-defined]

    def forward(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        one: Metamorphosis = self.metamorphosis
        if one.interpolate == 1:
            return softmax(self, hidden_states, *args, **kwargs)
        y = _attend(self, one, hidden_states, *args, **kwargs)
        if one.interpolate > 0:
            y = one.interpolate * hidden_states_of(softmax(self, hidden_states, *args, **kwargs)) + (1 - one.interpolate) * y
        return (y, None) if one.pair else y

    return type(f"Power{kind.__name__}", (kind,), {"forward": forward})


def _attend(
    attention: Any,
    one: Metamorphosis,
    hidden: Any,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    **_: Any,
) -> Any:
    """What the attention returns with power retention for softmax."""
    import torch

    if not isinstance(position_embeddings, tuple | list) or len(position_embeddings) != 2:
        raise ArgumentError("position_embeddings: power retention is called as softmax attention was, with a pair of cosines and sines")
    q, k, v = (getattr(attention, name)(hidden).unflatten(-1, (-1, one.d)) for name in PROJECTIONS[:3])
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    # NOTE: of no tokens torch cannot tell how many batches there are.
    cos, sin = (x.reshape(-1 if x.numel() else 1, q.shape[1], 1, one.d) for x in position_embeddings)
    q, k = (x * cos + torch.cat((-x[..., one.d // 2 :], x[..., : one.d // 2]), -1) * sin for x in (q, k))
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    log_g = torch.nn.functional.logsigmoid(attention.g_proj(hidden).float())
    if attention_mask is not None:
        # Padding weighs nothing and decays nothing.
        padding = ~_alive(attention, attention_mask, hidden.shape[1])
        k, v = (x.masked_fill(padding[..., None, None], 0.0) for x in (k, v))
        log_g = log_g.masked_fill(padding[..., None], 0.0)
    if past_key_values is not None:
        layer = _cache_layer(past_key_values, one)
        y, state = power_retention(q, k, v, log_g, normalize=one.normalize, initial_state=layer.power_state, output_final_state=True)
        layer.keep(state, q.shape[1])
    elif one.states is None:
        y = power_retention(q, k, v, log_g, degree=one.degree, normalize=one.normalize)
    else:
        y, one.states[one.index] = power_retention(
            q, k, v, log_g, normalize=one.normalize, initial_state=one.states[one.index], output_final_state=True
        )
    return attention.o_proj(y.flatten(-2))


def _alive(attention: Any, mask: Any, t: int) -> Any:
    """Which of the last `t` tokens are no padding, [B, t], by a mask [B, keys], or [B, 1, t, keys], boolean or added to scores."""
    import torch

    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 4):
        what = f"{mask.ndim} dimensions" if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
        raise UnsupportedError(f"attention_mask: {what}; accepted: [B, keys], or [B, 1, T, keys] as eager attention and SDPA take it")
    if mask.ndim == 2:
        return mask[:, -t:].bool()
    seen = (mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0)[..., -t:]
    # A token sees itself unless it is padding.
    alive = seen.diagonal(dim1=-2, dim2=-1)
    i = torch.arange(t, device=mask.device)
    causal = i[:, None] >= i
    window = attention.sliding_window if hasattr(attention, "sliding_window") else read_config(attention.config, "sliding_window")
    if window:
        causal &= i[:, None] - i < window
    if bool(((seen != causal & alive[:, None]) & alive[..., None]).any()):
        raise UnsupportedError("attention_mask: tokens do not see all before them; accepted: a causal mask, and padding")
    return alive


def _cache_layer(cache: Any, one: Metamorphosis) -> Any:
    """The layer of a cache that holds this attention's state."""
    layers = getattr(cache, "layers", ())
    layer = layers[one.index] if one.index < len(layers) else None
    if not hasattr(layer, "power_state"):
        raise UnsupportedError(
            "past_key_values: this cache keeps keys; pass power_cache(model), or use_cache=False, or call within carry_states"
        )
    return layer


def hidden_states_of(output: Any) -> Any:
    """The hidden states of what an attention returns."""
    return output[0] if isinstance(output, tuple) else output


def read_config(config: Any, key: str, default: Any = None) -> Any:
    """A key of a config, an object or a dict."""
    return config.get(key, default) if isinstance(config, Mapping) else getattr(config, key, default)
