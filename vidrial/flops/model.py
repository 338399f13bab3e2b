"""The shape of a decoder: what its weights are, read from a config.json or by name; and the weights beside the states of mixers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from vidrial.errors import ArgumentError, UnsupportedError
from vidrial.flops.mixers import LSTM, Mixer, require_positive


@dataclass(frozen=True)
class Model:
    """The shape of a decoder: what its weights are, whatever its mixer is.

    Norms, biases, gates of a retention and the embedding of tokens, which is no product, are left out of its weights.
    """

    name: str
    layers: int
    hidden: int
    q_heads: int
    heads: int
    d: int
    inner: int
    gated: bool
    vocab: int

    def __post_init__(self) -> None:
        require_positive(**{name: value for name, value in vars(self).items() if name not in ("name", "gated")})

    @classmethod
    def of(cls, config: Mapping[str, Any] | str | Path) -> Model:
        """The model of a config.json: as a dict, its path, its folder, or one of the names of `CONFIGS`.

        Raises:
            ArgumentError: there is no such file, it is no JSON object, or a key is missing. UnsupportedError: a family that is not known.
        """
        if isinstance(config, Mapping):
            return _read(config, str(config.get("_name_or_path") or config.get("model_type")))
        if str(config).lower() in CONFIGS:
            return _read(CONFIGS[str(config).lower()], str(config).lower())
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            names = ", ".join(CONFIGS)
            raise ArgumentError(f"{config}: {error.strerror}; accepted: a config.json, its folder, or one of {names}") from None
        except ValueError as error:
            raise ArgumentError(f"{path} is no JSON ({error}); accepted: an object with the keys of a config.json") from None
        if not isinstance(found, dict):
            raise ArgumentError(f"{path} holds a {type(found).__name__}; accepted: an object with the keys of a config.json")
        return _read(found, path.resolve().parent.name if path.name == "config.json" else path.stem)

    @property
    def layer_weights(self) -> int:
        """Weights of one layer: projections and MLP."""
        return self.hidden * self.d * (2 * self.q_heads + 2 * self.heads) + self._mlp

    @property
    def _mlp(self) -> int:
        return (3 if self.gated else 2) * self.hidden * self.inner

    def weight_flops(self, head: bool = False, mixer: Mixer | None = None) -> int:
        """Weight FLOPs per token of all layers, and with `head` of the logits; an LSTM brings weights in the place of the projections."""
        layer = self._mlp + mixer.weights if isinstance(mixer, LSTM) else self.layer_weights
        return 2 * (self.layers * layer + (self.vocab * self.hidden if head else 0))

    def ratio(self, mixer: Mixer, t: int, head: bool = False) -> Fraction:
        """Weight FLOPs per state FLOP, in a sequence of `t`."""
        return Fraction(self.weight_flops(head, mixer)) / (self.layers * mixer.flops(t))

    def balanced(self, mixer: Mixer, head: bool = False) -> int | None:
        """The first length at which state FLOPs reach weight FLOPs; None if none does, or if length does not decide it."""
        each = Fraction(self.weight_flops(head, mixer), self.layers)
        if not mixer.grows or (mixer.limit is not None and each >= mixer.limit):
            return None
        low, high = 0, 1
        while mixer.flops(high) < each:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if mixer.flops(middle) >= each else (middle, high)
        return high


@dataclass(frozen=True)
class _Family:
    """Where a config.json keeps the shape; `inner` may be absent where it is 4 hidden, `d` where it is hidden / heads."""

    gated: bool
    layers: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    q_heads: str = "num_attention_heads"
    heads: str = "num_key_value_heads"
    inner: str = "intermediate_size"
    d: str | None = None


_FAMILIES = {
    "llama": _Family(True),
    "qwen3": _Family(True, d="head_dim"),
    "starcoder2": _Family(False),
    "powercoder": _Family(False),
    "gpt2": _Family(False, "n_layer", "n_embd", "n_head", "n_head", "n_inner"),
}


def _read(config: Mapping[str, Any], name: str) -> Model:
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        raise UnsupportedError(f"{name}: model_type is {kind!r}; accepted: {', '.join(_FAMILIES)}")
    family = _FAMILIES[kind]

    def need(key: str) -> int:
        value = config.get(key)
        if value is None:
            raise ArgumentError(f"{name}: the config has no {key}, which a {kind} needs")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ArgumentError(f"{name}: {key} is {value!r}; accepted: an integer, 1 or more")
        return value

    hidden, q_heads = need(family.hidden), need(family.q_heads)
    # GPT-2 writes null where its MLP is four times as wide.
    inner = 4 * hidden if kind == "gpt2" and config.get(family.inner) is None else need(family.inner)
    if family.d is None and config.get("head_dim") is None and hidden % q_heads:
        raise ArgumentError(f"{name}: {family.hidden}={hidden} is no multiple of {family.q_heads}={q_heads}")
    d = need("head_dim") if family.d or config.get("head_dim") is not None else hidden // q_heads
    return Model(name, need(family.layers), hidden, q_heads, need(family.heads), d, inner, family.gated, need("vocab_size"))


def _config(model_type: str, *shape: int) -> dict[str, Any]:
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size")
    return {"model_type": model_type, **dict(zip(keys, shape, strict=True))}


def _gpt2(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_layer": layers, "n_embd": hidden, "n_head": heads, "n_inner": None, "vocab_size": 50257}


# Published configs, by the names that `Model.of` takes.
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "llama-3-8b": _config("llama", 32, 4096, 32, 8, 128, 14336, 128256),
    "llama-3-70b": _config("llama", 80, 8192, 64, 8, 128, 28672, 128256),
    "powercoder-3b": _config("powercoder", 30, 3072, 24, 2, 128, 12288, 49152),
    "qwen3-8b": _config("qwen3", 36, 4096, 32, 8, 128, 12288, 151936),
    "qwen3-14b": _config("qwen3", 40, 5120, 40, 8, 128, 17408, 151936),
    "starcoder2-3b": _config("starcoder2", 30, 3072, 24, 2, 128, 12288, 49152),
    "starcoder2-7b": _config("starcoder2", 32, 4608, 36, 4, 128, 18432, 49152),
}


@dataclass(frozen=True)
class Row:
    """One mixer at one length: state of all layers, FLOPs per token of all layers."""

    mixer: Mixer
    t: int
    size: int
    bytes: int
    state_flops: Fraction
    weight_flops: int

    @property
    def ratio(self) -> Fraction:
        """Weight FLOPs per state FLOP."""
        return self.weight_flops / self.state_flops


def table(model: Model, mixers: Sequence[Mixer], lengths: Sequence[int], head: bool = False) -> list[Row]:
    """A row for each mixer and length, in their order."""
    n = model.layers
    return [
        Row(mixer, t, n * mixer.size(t), n * mixer.bytes(t), n * mixer.flops(t), model.weight_flops(head, mixer))
        for mixer in mixers
        for t in lengths
    ]
