"""Mixers: what a layer computes between its projections, the size of its state, and the FLOPs of what is computed with the state."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar

from vidrial.errors import ArgumentError

if TYPE_CHECKING:
    from vidrial.flops.model import Model

# Keys and values of a cache are bfloat16; states that sum over the whole past are float32.
CACHE_BYTES, STATE_BYTES = 2, 4
# Far beyond what any memory holds, and within what a float can say.
MAX_DEGREE = 64


def rows(d: int, degree: int, tile: int = 1) -> int:
    """Rows of a power's state: the products of `degree` features out of `d` up to their order, by blocks of `tile` features.

    Raises:
        ArgumentError: a value is less than 1, the degree more than 64, or `tile` does not divide `d`.
    """
    require_positive(d=d, degree=degree, tile=tile)
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
    require_positive(t=t, window=1 if window is None else window)
    w = t if window is None else min(window, t)
    return Fraction(w * (w + 1) // 2 + (t - w) * w, t)


def require_positive(**numbers: object) -> None:
    """Refuse, by ArgumentError, what is no integer or less than 1."""
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ArgumentError(f"{name}={value!r}; accepted: an integer, 1 or more")


def _require_shared_heads(q_heads: int, heads: int) -> None:
    if q_heads % heads:
        raise ArgumentError(f"q_heads={q_heads} is no multiple of heads={heads}; each head serves as many queries")


def _value_width(d: int, e: int | None) -> int:
    """Values are as wide as keys unless it is said."""
    return d if e is None else e


@dataclass(frozen=True)
class Mixer:
    """What all mixers have. `element_bytes` is the size of a number of the state."""

    # Whether the FLOPs per token rise with the length: only such a mixer has a balanced length.
    grows: ClassVar[bool] = False
    element_bytes: ClassVar[int] = STATE_BYTES

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.type != "bool"}
        require_positive(**{name: value for name, value in values.items() if value is not None})

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
class _Cache(Mixer):
    """What grows with the length: one entry per token, which each of `q_heads` reads for every token behind it."""

    q_heads: int
    grows: ClassVar[bool] = True
    element_bytes: ClassVar[int] = CACHE_BYTES

    @property
    def _entry(self) -> int:
        """Numbers of one entry."""
        raise NotImplementedError

    @property
    def _products(self) -> int:
        """Multiply-adds of one query with one entry."""
        raise NotImplementedError

    def size(self, t: int) -> int:
        require_positive(t=t)
        return self._entry * t

    def flops(self, t: int) -> Fraction:
        return 2 * self.q_heads * self._products * mean_keys(t)

    def flops_at(self, t: int) -> int:
        require_positive(t=t)
        return 2 * self.q_heads * self._products * t


@dataclass(frozen=True)
class Attention(_Cache):
    """Causal attention of `q_heads` over `heads` of keys (d wide) and values (e, by default d): heads shared by queries shrink the cache alone."""

    heads: int
    d: int
    e: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_shared_heads(self.q_heads, self.heads)

    @classmethod
    def of(cls, model: Model, **more: Any) -> Attention:
        """That of a model's shape."""
        return cls(model.q_heads, model.heads, model.d, **more)

    @property
    def name(self) -> str:
        return "attention"

    @property
    def _entry(self) -> int:
        return self.heads * self._products

    @property
    def _products(self) -> int:
        return self.d + _value_width(self.d, self.e)


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
        return 2 * self.q_heads * self._products * mean_keys(t, self.window)

    def flops_at(self, t: int) -> int:
        return super().flops_at(min(t, self.window))

    @property
    def limit(self) -> int | None:
        return super().flops_at(self.window)


@dataclass(frozen=True)
class Latent(_Cache):
    """Latent attention (DeepSeek's): per token one latent of `rank` and one rotary key of `rope` for all heads.

    `absorbed` products read the latents themselves, as in decoding; expanded ones read the keys (d + rope) and values (e) made of them.
    """

    rank: int = 512
    rope: int = 64
    d: int = 128
    e: int | None = None
    absorbed: bool = True

    @classmethod
    def of(cls, model: Model, **more: Any) -> Latent:
        """That of a model's query heads, as wide as its heads."""
        return cls(model.q_heads, **{"d": model.d, **more})

    @property
    def name(self) -> str:
        return f"latent:{self.rank}" + ("" if self.rope == 64 else f",rope={self.rope}") + ("" if self.absorbed else ",absorbed=0")

    @property
    def _entry(self) -> int:
        return self.rank + self.rope

    @property
    def _products(self) -> int:
        keys, values = (self.rank, self.rank) if self.absorbed else (self.d, _value_width(self.d, self.e))
        return keys + self.rope + values


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
        _require_shared_heads(self.q_heads, self.heads)
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
        return rows(self.d, self.degree, self.tile) * (_value_width(self.d, self.e) + self.normalised)

    def size(self, t: int) -> int:
        require_positive(t=t)
        return self.heads * self._numbers

    def flops(self, t: int) -> Fraction:
        require_positive(t=t)
        if self.chunk is None:
            return Fraction(self.flops_at(t))
        c = min(self.chunk, t)
        last = t - (t - 1) // c * c
        read, folded = 2 * self.q_heads * self._numbers * (t - c), 2 * self.heads * self._numbers * (t - last)
        pairs = (t - last) // c * (c * (c + 1) // 2) + last * (last + 1) // 2
        within = 2 * self.q_heads * (self.d + _value_width(self.d, self.e)) * pairs
        return Fraction(read + folded + within, t)

    def flops_at(self, t: int) -> int:
        require_positive(t=t)
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
        require_positive(t=t)
        return self.n * self.vectors

    def flops(self, t: int) -> Fraction:
        return Fraction(self.flops_at(t))

    def flops_at(self, t: int) -> int:
        # f c, i g, their sum, and o tanh(c).
        require_positive(t=t)
        return 4 * self.n
