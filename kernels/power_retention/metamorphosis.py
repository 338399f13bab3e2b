"""Metamorphosis: the softmax attention of a trained model becomes power retention, which keeps its projections and learns a gate.

from vidrial.kernels.power_retention.metamorphosis import distill_layers, metamorphose
teacher = copy.deepcopy(model)
metamorphose(model)
distill_layers(model, teacher, batches, steps=40, lr=3e-3)

Importing this loads no torch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from numbers import Integral, Real
from typing import Any, TypeVar

from vidrial import ArgumentError, UnsupportedError
from vidrial.kernels.power_retention import PowerState
from vidrial.kernels.power_retention.op import DIMS
from vidrial.kernels.power_retention.request import check_options
from vidrial.kernels.power_retention.swapped import PROJECTIONS, Metamorphosis, hidden_states_of, read_config, swapped_class

__all__ = ["metamorphose", "set_interpolate", "distill_layers", "carry_states"]

M = TypeVar("M")  # a torch module


def metamorphose(
    model: M,
    layers: Iterable[int] | None = None,
    degree: int = 2,
    gates: tuple[float, float] = (12, 128),
    interpolate: float = 0.0,
    normalize: str = "sum",
) -> M:
    """Swap a model's softmax attention for power retention, in place; new parameters are `self_attn.g_proj.{weight, bias}` alone.

    Args:
        model: a torch module with a `config` (an object or a dict) and layers that hold a `self_attn` with q_proj, k_proj, v_proj, o_proj, and
            q_norm and k_norm on the head, if any. It is called with hidden states [B, T, hidden] and a pair of cosines and sines, [T, 1, D]
            or [B, T, D], second or as `position_embeddings`. What it becomes is written into the config as `vidrial`.
        layers: which ones, counted from 0; None: all. Layers of a sliding window have to be named: their window goes.
        degree: of the power: 2, or 4 (quadratic in T).
        gates: the shortest and the longest memory in tokens, at which the gates of a layer's first and last head begin; those between are
            geometric. gate = sigmoid(g_proj(hidden states)), weight 0, bias log(memory - 1).
        interpolate: the share of softmax attention in the output, 0 to 1; at 1 logits are those of the model before, to the bit.
        normalize: "sum" or "none", see `power_retention`. An odd degree has no sum.

    Returns:
        The model.

    Raises:
        ArgumentError, UnsupportedError: before anything is changed, naming what is not served.
    """
    import torch

    check_options(degree, None, normalize, None)
    share, memories = _share(interpolate), _memories(gates)
    there = _attentions(model)
    if any(hasattr(attention, "metamorphosis") for attention in there):
        raise ArgumentError("model: its attention is power retention already; metamorphose a model once, with all its layers")
    config = getattr(model, "config", None)
    chosen = _chosen(layers, len(there), _windows(config, there))
    _check_config(config)
    heads = {index: _head(config, there[index], index) for index in chosen}
    for index, (d, h) in heads.items():
        attention = there[index]
        weight = attention.q_proj.weight
        attention.g_proj = torch.nn.Linear(attention.q_proj.in_features, h, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            attention.g_proj.weight.zero_()
            attention.g_proj.bias.copy_(torch.tensor([math.log(m - 1) for m in memories(h)]))
        pair = "attention_mask" in signature(attention.forward).parameters
        attention.metamorphosis = Metamorphosis(index, d, int(degree), normalize, share, pair)
        kind: type = type(attention)
        attention.__class__ = swapped_class(kind)
    _record(model, {"layers": chosen, "degree": int(degree), "gates": [float(m) for m in gates], "normalize": normalize})
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        from vidrial.kernels.power_retention.hf import adopt

        adopt(model)
    return model


def set_interpolate(model: Any, interpolate: float) -> None:
    """The share of softmax attention in a metamorphosed model's layers, 0 to 1.

    Raises:
        ArgumentError: it is no such number, the model has no swapped layer, or states are carried, which know nothing of softmax attention.
    """
    share = _share(interpolate)
    for attention in _metamorphosed(model):
        if share > 0 and attention.metamorphosis.states is not None:
            raise ArgumentError(f"interpolate={interpolate!r}: states are carried, and softmax attention has none; accepted: 0")
        attention.metamorphosis.interpolate = share


def distill_layers(model: Any, teacher: Any, batches: Iterable[Any], steps: int, lr: float) -> list[float]:
    """Teach each swapped layer the output of the layer that it replaced, on the inputs which that layer has in the original model.

    One forward pass of the teacher a step; a layer's gradient is made and its graph freed before the next one's. AdamW without weight decay;
    the learning rate warms up for 5 steps and falls to a tenth along a cosine.

    Args:
        model: metamorphosed, at interpolate 0. Parameters of its swapped attentions that require a gradient are trained, no others.
        teacher: the model before; it stays as it is.
        batches: tokens [B, T], as the teacher is called with; as many as steps, or more.
        steps: at least 1.
        lr: the highest learning rate. What the original was trained with at its highest is a good one.

    Returns:
        For each step the mean over the layers of |power - softmax|^2 / |softmax|^2.

    Raises:
        ArgumentError: models that do not fit each other, or too few batches.
    """
    import torch

    swapped, optimizer = _check_distill(model, teacher, steps, lr)
    errors: list[Any] = []

    def learn(attention: Any) -> Callable[..., None]:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            wanted = hidden_states_of(output).float()
            with torch.enable_grad():
                made = hidden_states_of(attention(*args, **kwargs)).float()
                error = (made - wanted).square().sum() / wanted.square().sum()
                error.backward()
            errors.append(error.detach())

        return hook

    before = _attentions(teacher)
    hooks = [before[a.metamorphosis.index].register_forward_hook(learn(a), with_kwargs=True) for a in swapped]
    ready = iter(batches)
    try:
        for step in range(steps):
            tokens = next(ready, None)
            if tokens is None:
                raise ArgumentError(f"batches ended after {step} of {steps} steps; give as many batches as steps")
            optimizer.zero_grad()
            with torch.no_grad():
                teacher(tokens)
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(lr, step, steps)
            optimizer.step()
    finally:
        for one in hooks:
            one.remove()
        optimizer.zero_grad()
    return [float(x) for x in torch.stack(errors).view(steps, -1).mean(1)]


@contextmanager
def carry_states(model: Any) -> Iterator[list[PowerState[Any] | None]]:
    """Calls of a metamorphosed model within it go on where the last one ended: a prompt, then a token at a time, at a constant size.

    with carry_states(model) as states:
        logits = model(prompt)
        logits = model(token, start=prompt.shape[1])

    The list holds each layer's PowerState, None before the first call. Positions are the model's own affair.

    Raises:
        ArgumentError: interpolate is above 0, or states are carried already. UnsupportedError: a layer is softmax attention still, or its
            degree has no state.
    """
    swapped = _metamorphosed(model)
    whole = _attentions(model)
    if len(swapped) < len(whole):
        rest = [i for i, attention in enumerate(whole) if not hasattr(attention, "metamorphosis")]
        raise UnsupportedError(
            f"layers {rest} are softmax attention, which has no state; recompute from the first token, or swap all layers"
        )
    for attention in swapped:
        one: Metamorphosis = attention.metamorphosis
        if one.interpolate > 0:
            raise ArgumentError(f"interpolate={one.interpolate:g}: softmax attention has no state; call set_interpolate(model, 0) before")
        if one.degree != 2:
            raise UnsupportedError(f"degree={one.degree}: only degree 2 has a state small enough; recompute from the first token")
        if one.states is not None:
            raise ArgumentError("model: its states are carried already; leave the outer carry_states first")
    states: list[PowerState[Any] | None] = [None] * len(whole)
    for attention in swapped:
        attention.metamorphosis.states = states
    try:
        yield states
    finally:
        for attention in swapped:
            attention.metamorphosis.states = None


def _attentions(model: Any) -> list[Any]:
    """Every `self_attn`, in the order of the model's layers."""
    found = [module.self_attn for module in model.modules() if hasattr(module, "self_attn")] if hasattr(model, "modules") else []
    if not found:
        raise ArgumentError(
            f"model: a {type(model).__name__} has no layer with a self_attn; accepted: one with {', '.join(PROJECTIONS)} in it"
        )
    return found


def _metamorphosed(model: Any) -> list[Any]:
    found = [attention for attention in _attentions(model) if hasattr(attention, "metamorphosis")]
    if not found:
        raise ArgumentError("model: none of its layers is power retention; call metamorphose(model) before")
    return found


def _share(interpolate: Any) -> float:
    if not isinstance(interpolate, Real) or not 0 <= float(interpolate) <= 1:
        raise ArgumentError(f"interpolate={interpolate!r}; accepted: a number from 0, power retention alone, to 1, softmax attention alone")
    return float(interpolate)


def _memories(gates: Any) -> Callable[[int], list[float]]:
    """The memories of a layer's heads: one head has the geometric mean."""
    ok = isinstance(gates, tuple | list) and len(gates) == 2 and all(isinstance(m, Real) and 1 < float(m) < math.inf for m in gates)
    if not ok or gates[0] > gates[1]:
        raise ArgumentError(f"gates={gates!r}; accepted: the shortest and the longest memory in tokens, both above 1")
    first, last = (float(m) for m in gates)
    return lambda h: [first * (last / first) ** (i / (h - 1) if h > 1 else 0.5) for i in range(h)]


def _chosen(layers: Any, count: int, windows: list[int]) -> list[int]:
    if layers is None:
        if windows:
            raise UnsupportedError(
                f"layers {windows} attend within a sliding window, which power retention has not; name the layers to swap, those included or not"
            )
        return list(range(count))
    chosen = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
    wrong = [i for i in chosen if not isinstance(i, Integral) or isinstance(i, bool) or not 0 <= int(i) < count]
    if wrong or not chosen or len(set(chosen)) < len(chosen):
        raise ArgumentError(f"layers={layers!r}; accepted: unlike numbers of layers, 0 to {count - 1}, or None for all")
    return sorted(int(i) for i in chosen)


def _windows(config: Any, there: list[Any]) -> list[int]:
    """Layers of a sliding window: by the attention's own word, else by the config's."""
    kinds = read_config(config, "layer_types")
    window = read_config(config, "sliding_window") if read_config(config, "use_sliding_window", True) else None
    found = []
    for i, attention in enumerate(there):
        own = [getattr(attention, name) for name in ("sliding_window", "window") if hasattr(attention, name)]
        by_config = window and (not kinds or (i < len(kinds) and kinds[i] == "sliding_attention"))
        found += [i] if any(own) or (not own and by_config) else []
    return found


def _check_config(config: Any) -> None:
    """Refuse what softmax attention does besides, and power retention would not."""
    if config is None:
        raise ArgumentError("model: it has no config; accepted: one whose config has num_attention_heads")
    for key in ("attn_logit_softcapping", "attention_dropout", "attn_pdrop"):
        if read_config(config, key):
            what = "drops nothing" if "drop" in key else "has no logits to cap"
            raise UnsupportedError(f"{key}={read_config(config, key)}: power retention {what}; accepted: 0 or None in the model's config")
    if read_config(config, "alibi") or read_config(config, "position_embedding_type") == "alibi":
        raise UnsupportedError("alibi: power retention adds nothing to scores; accepted: rotary position embeddings")


def _head(config: Any, attention: Any, index: int) -> tuple[int, int]:
    """D, and the number of key heads."""
    lacking = [name for name in PROJECTIONS if not hasattr(attention, name)]
    if lacking:
        raise ArgumentError(
            f"layer {index}: its self_attn, a {type(attention).__name__}, has no {', '.join(lacking)}; accepted: {', '.join(PROJECTIONS)}"
        )
    count = read_config(config, "num_attention_heads")
    d = read_config(config, "head_dim") or (attention.q_proj.out_features // count if count else None)
    if not d:
        raise ArgumentError("model: its config has neither num_attention_heads nor head_dim, of which one is needed")
    if d not in DIMS:
        raise UnsupportedError(f"layer {index}: its heads have {d} features; accepted: {', '.join(map(str, DIMS))}")
    norm = getattr(getattr(attention, "q_norm", None), "weight", None)
    if norm is not None and norm.numel() != d:
        raise UnsupportedError(f"layer {index}: q_norm is of {norm.numel()} features; accepted: one of a head's {d}")
    return d, attention.k_proj.out_features // d


def _record(model: Any, what: dict[str, Any]) -> None:
    """Write into the config what the model has become."""
    if isinstance(model.config, Mapping):
        model.config = {**model.config, "vidrial": what}
    else:
        model.config.vidrial = what


def _learning_rate(highest: float, step: int, steps: int) -> float:
    """Up in 5 steps, then down to a tenth along a cosine."""
    return highest * min(1.0, (step + 1) / 5) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


def _check_distill(model: Any, teacher: Any, steps: Any, lr: Any) -> tuple[list[Any], Any]:
    """The swapped attentions and the optimizer of their parameters."""
    import torch

    swapped, before = _metamorphosed(model), _attentions(teacher)
    if teacher is model or any(hasattr(attention, "metamorphosis") for attention in before):
        raise ArgumentError("teacher: it is metamorphosed itself; give a copy that was made before, as by copy.deepcopy(model)")
    if len(before) != len(_attentions(model)):
        raise ArgumentError(f"teacher has {len(before)} layers and model {len(_attentions(model))}; give a copy of the model before")
    if not isinstance(steps, Integral) or int(steps) < 1:
        raise ArgumentError(f"steps={steps!r}; accepted: a number of at least 1")
    if not isinstance(lr, Real) or not 0 < float(lr) < math.inf:
        raise ArgumentError(f"lr={lr!r}; accepted: a number above 0")
    if any(attention.metamorphosis.interpolate > 0 for attention in swapped):
        raise ArgumentError("model: interpolate is above 0, so layers would copy what they hold; call set_interpolate(model, 0) before")
    parameters = [p for attention in swapped for p in attention.parameters() if p.requires_grad]
    if not parameters:
        raise ArgumentError("model: no parameter of its swapped attentions requires a gradient")
    return swapped, torch.optim.AdamW(parameters, lr=float(lr), betas=(0.9, 0.95), weight_decay=0.0)
