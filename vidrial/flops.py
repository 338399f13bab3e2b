"""Weights and state of a language model: parameters, state sizes, and the FLOPs of both per token, exact.

FLOPs are those of a forward pass, of one layer and one token unless said otherwise, a multiply-add counting 2; a backward pass takes twice
as many of both kinds, so that ratios hold in training, too. Numbers are integers and Fractions. A mixer is what stands between the
projections of a layer: it has a state, of which `size` tells the numbers, `bytes` the bytes, and `flops` what is computed with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from vidrial.errors import ArgumentError, UnsupportedError

__all__ = [
    "CONFIGS",
    "LSTM",
    "Attention",
    "Degree1",
    "Latent",
    "Mixer",
    "Model",
    "Power",
    "Row",
    "Window",
    "mean_keys",
    "rows",
    "table",
]

# Keys and values of a cache are bfloat16; states that sum over the whole past are float32.
CACHE_BYTES, STATE_BYTES = 2, 4
# Far beyond what any memory holds, and within what a float can say.
MAX_DEGREE = 64
# Digits of a number on the command line.
MAX_DIGITS = 12


def rows(d: int, degree: int, tile: int = 1) -> int:
    """Rows of a power's state: the products of `degree` features out of `d` up to their order, by blocks of `tile` features.

    Raises:
        ArgumentError: a value is less than 1, the degree more than 64, or `tile` does not divide `d`.
    """
    _positive(d=d, degree=degree, tile=tile)
    if degree > MAX_DEGREE:
        raise ArgumentError(f"degree={degree}; accepted: 1 to {MAX_DEGREE}")
    if d % tile:
        raise ArgumentError(f"tile={tile} does not divide d={d}; accepted: divisors of d")
    return int(math.comb(d // tile + degree - 1, degree) * tile**degree)


def mean_keys(t: int, window: int | None = None) -> Fraction:
    """Keys that a token of a causal sequence of `t` reads on the average, itself included; at most `window`.

    Raises:
        ArgumentError: a length is less than 1.
    """
    _positive(t=t, window=1 if window is None else window)
    w = t if window is None else min(window, t)
    return Fraction(w * (w + 1) // 2 + (t - w) * w, t)


def _positive(**numbers: object) -> None:
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ArgumentError(f"{name}={value!r}; accepted: an integer, 1 or more")


@dataclass(frozen=True)
class Mixer:
    """What all mixers have. `element_bytes` is the size of a number of the state."""

    # Whether the FLOPs per token rise with the length: only such a mixer has a balanced length.
    grows: ClassVar[bool] = False
    element_bytes: ClassVar[int] = STATE_BYTES

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.type != "bool"}
        _positive(**{name: value for name, value in values.items() if value is not None})

    @property
    def name(self) -> str:
        """As the command line spells it."""
        raise NotImplementedError

    def size(self, t: int) -> int:
        """Numbers that the state holds behind `t` tokens."""
        raise NotImplementedError

    def bytes(self, t: int) -> int:
        """Bytes that the state takes behind `t` tokens: a cache in bfloat16, other states in float32."""
        return self.size(t) * self.element_bytes

    def flops(self, t: int) -> Fraction:
        """State FLOPs per token, the mean over a sequence of `t`."""
        raise NotImplementedError

    def flops_at(self, t: int) -> int:
        """State FLOPs of the `t`-th token alone, as in decoding."""
        raise NotImplementedError

    @property
    def limit(self) -> int | None:
        """State FLOPs per token that no length reaches; None where they grow without bound."""
        return None


@dataclass(frozen=True)
class Attention(Mixer):
    """Causal attention of `q_heads` over `heads` of keys (d wide) and values (e, by default d): heads shared by queries shrink the cache alone."""

    q_heads: int
    heads: int
    d: int
    e: int | None = None
    grows: ClassVar[bool] = True
    element_bytes: ClassVar[int] = CACHE_BYTES

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.q_heads % self.heads:
            raise ArgumentError(f"q_heads={self.q_heads} is no multiple of heads={self.heads}; each head serves as many queries")

    @classmethod
    def of(cls, model: Model, **more: Any) -> Attention:
        """That of a model's shape."""
        return cls(model.q_heads, model.heads, model.d, **more)

    @property
    def name(self) -> str:
        return "attention"

    @property
    def _widths(self) -> int:
        return self.d + (self.d if self.e is None else self.e)

    def size(self, t: int) -> int:
        _positive(t=t)
        return self.heads * self._widths * t

    def flops(self, t: int) -> Fraction:
        return 2 * self.q_heads * self._widths * mean_keys(t)

    def flops_at(self, t: int) -> int:
        _positive(t=t)
        return 2 * self.q_heads * self._widths * t


@dataclass(frozen=True)
class Window(Attention):
    """Attention that reaches `window` tokens back, the token itself included."""

    window: int = 1024

    @property
    def name(self) -> str:
        return f"window:{self.window}"

    def size(self, t: int) -> int:
        return super().size(min(t, self.window))

    def flops(self, t: int) -> Fraction:
        return 2 * self.q_heads * self._widths * mean_keys(t, self.window)

    def flops_at(self, t: int) -> int:
        return super().flops_at(min(t, self.window))

    @property
    def limit(self) -> int | None:
        return super().flops_at(self.window)


@dataclass(frozen=True)
class Latent(Mixer):
    """Latent attention (DeepSeek's): per token one latent of `rank` and one rotary key of `rope` for all heads.

    `absorbed` products read the latents themselves, as in decoding; expanded ones read the keys (d + rope) and values (e) made of them.
    """

    q_heads: int
    rank: int = 512
    rope: int = 64
    d: int = 128
    e: int | None = None
    absorbed: bool = True
    grows: ClassVar[bool] = True
    element_bytes: ClassVar[int] = CACHE_BYTES

    @classmethod
    def of(cls, model: Model, **more: Any) -> Latent:
        """That of a model's query heads, as wide as its heads."""
        return cls(model.q_heads, **{"d": model.d, **more})

    @property
    def name(self) -> str:
        return f"latent:{self.rank}" + ("" if self.rope == 64 else f",rope={self.rope}") + ("" if self.absorbed else ",absorbed=0")

    @property
    def _widths(self) -> int:
        return 2 * self.rank + self.rope if self.absorbed else self.d + self.rope + (self.d if self.e is None else self.e)

    def size(self, t: int) -> int:
        _positive(t=t)
        return (self.rank + self.rope) * t

    def flops(self, t: int) -> Fraction:
        return 2 * self.q_heads * self._widths * mean_keys(t)

    def flops_at(self, t: int) -> int:
        _positive(t=t)
        return 2 * self.q_heads * self._widths * t


@dataclass(frozen=True)
class Power(Mixer):
    """Power retention: per head a state of `rows(d, degree, tile)` rows and e columns (by default d), and one of the normaliser.

    Without a `chunk` every token is folded into the state and reads it. With one, a sequence is cut into chunks, the last of which may be
    shorter: tokens read the state of the chunks before theirs and attend within their own; the last chunk is not folded.
    """

    q_heads: int
    heads: int
    d: int
    e: int | None = None
    degree: int = 2
    tile: int = 1
    chunk: int | None = None
    normalised: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.q_heads % self.heads:
            raise ArgumentError(f"q_heads={self.q_heads} is no multiple of heads={self.heads}; each head serves as many queries")
        rows(self.d, self.degree, self.tile)

    @classmethod
    def of(cls, model: Model, **more: Any) -> Power:
        """That of a model's shape."""
        return cls(model.q_heads, model.heads, model.d, **more)

    @property
    def name(self) -> str:
        return f"power:{self.degree}" + self._options

    @property
    def _options(self) -> str:
        return ("" if self.tile == 1 else f",tile={self.tile}") + ("" if self.chunk is None else f",chunk={self.chunk}")

    @property
    def _numbers(self) -> int:
        """Of one head's state."""
        return rows(self.d, self.degree, self.tile) * ((self.d if self.e is None else self.e) + self.normalised)

    def size(self, t: int) -> int:
        _positive(t=t)
        return self.heads * self._numbers

    def flops(self, t: int) -> Fraction:
        _positive(t=t)
        if self.chunk is None:
            return Fraction(self.flops_at(t))
        c = min(self.chunk, t)
        last = t - (t - 1) // c * c
        read, folded = 2 * self.q_heads * self._numbers * (t - c), 2 * self.heads * self._numbers * (t - last)
        pairs = (t - last) // c * (c * (c + 1) // 2) + last * (last + 1) // 2
        within = 2 * self.q_heads * (self.d + (self.d if self.e is None else self.e)) * pairs
        return Fraction(read + folded + within, t)

    def flops_at(self, t: int) -> int:
        _positive(t=t)
        return 2 * (self.heads + self.q_heads) * self._numbers


@dataclass(frozen=True)
class Degree1(Power):
    """Linear attention, RetNet, GLA, Mamba-2's SSD: a state of d rows, which is a power of degree 1."""

    degree: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.degree != 1 or self.tile != 1:
            raise ArgumentError(f"degree={self.degree}, tile={self.tile} of a Degree1; take Power")

    @property
    def name(self) -> str:
        return "degree1" + self._options


@dataclass(frozen=True)
class LSTM(Mixer):
    """An LSTM of `n`: `vectors` is 2 for its c and h, 1 where the output is not counted as state. What it multiplies h with counts as weight."""

    n: int
    vectors: int = 2

    @classmethod
    def of(cls, model: Model, **more: Any) -> LSTM:
        """One as wide as the model, in the place of its attention and the attention's projections."""
        return cls(**{"n": model.hidden, **more})

    @property
    def name(self) -> str:
        return f"lstm:{self.n}" + ("" if self.vectors == 2 else f",vectors={self.vectors}")

    @property
    def weights(self) -> int:
        """Four gates, each of x and h."""
        return 4 * self.n * 2 * self.n

    @property
    def weight_flops(self) -> int:
        """Per token."""
        return 2 * self.weights

    def size(self, t: int) -> int:
        _positive(t=t)
        return self.n * self.vectors

    def flops(self, t: int) -> Fraction:
        return Fraction(self.flops_at(t))

    def flops_at(self, t: int) -> int:
        # f c, i g, their sum, and o tanh(c).
        _positive(t=t)
        return 4 * self.n


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
        _positive(**{name: value for name, value in vars(self).items() if name not in ("name", "gated")})

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
            raise ArgumentError(f"{path} is no JSON: {error}") from None
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


# Name -> what makes it, the field that the number behind the colon sets, and the fields that `,key=value` may set.
_Maker: TypeAlias = Callable[..., Mixer]
_MIXERS: dict[str, tuple[_Maker, str | None, tuple[str, ...]]] = {
    "attention": (Attention.of, None, ()),
    "window": (Window.of, "window", ()),
    "latent": (Latent.of, "rank", ("rope", "absorbed")),
    "power": (Power.of, "degree", ("tile", "chunk")),
    "degree1": (Degree1.of, None, ("chunk",)),
    "lstm": (LSTM.of, "n", ("vectors",)),
}
MIXER_FORMS = (
    "attention, window:1024, latent:512[,rope=64,absorbed=0], power:2[,tile=16,chunk=1024], degree1[,chunk=1024], lstm[:768,vectors=1]"
)


def parse_mixer(text: str, model: Model) -> Mixer:
    """The mixer that `text` names, of the model's shape: `power:2`, `window:1024`, `power:2,tile=16,chunk=1024`, ...

    Raises:
        ArgumentError: it names none, or a value cannot be.
    """
    head, *pairs = text.split(",")
    name, colon, number = head.partition(":")
    if name not in _MIXERS or (colon and _MIXERS[name][1] is None):
        raise ArgumentError(f"mixer {text!r}; accepted: {MIXER_FORMS}")
    make, first, keys = _MIXERS[name]
    given = {first: number} if first is not None and colon else {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in keys or key in given:
            raise ArgumentError(f"mixer {text!r}: {pair!r} is no option of {name}; accepted: {MIXER_FORMS}")
        given[key] = value
    if not all(value.isdecimal() and len(value) <= MAX_DIGITS for value in given.values()):
        raise ArgumentError(f"mixer {text!r}: values are integers; accepted: {MIXER_FORMS}")
    values: dict[str, Any] = {key: int(value) for key, value in given.items()}
    if "absorbed" in values:
        values["absorbed"] = bool(values["absorbed"])
    return make(model, **values)


def parse_lengths(text: str) -> list[int]:
    """`8k` is 8192; `1k..1M` are 1k, 4k, 16k, ... and 1M, by powers of four; k is 1024 and M is 1024 k.

    Raises:
        ArgumentError: it is no length, or a range that falls.
    """
    ends = [_length(word, text) for word in text.split("..")]
    if len(ends) > 2 or ends[0] > ends[-1]:
        raise ArgumentError(f"length {text!r}; accepted: 1000, 8k, 1M, or a range 1k..1M that rises")
    found = [ends[0]]
    while len(ends) == 2 and found[-1] * 4 < ends[1]:
        found.append(found[-1] * 4)
    return found if ends[-1] == found[-1] else [*found, ends[-1]]


def _length(word: str, text: str) -> int:
    number = word.rstrip("kM")
    unit = {"": 1, "k": 1024, "M": 1024**2}.get(word[len(number) :])
    if not number.isdecimal() or len(number) > MAX_DIGITS or unit is None or int(number) < 1:
        raise ArgumentError(f"length {text!r}; accepted: 1000, 8k, 1M, or a range 1k..1M that rises")
    return int(number) * unit
