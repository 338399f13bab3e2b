"""Mixers and lengths as the command line spells them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from vidrial.errors import ArgumentError
from vidrial.flops.mixers import LSTM, Attention, Degree1, Latent, Mixer, Power, Window
from vidrial.flops.model import Model

# Digits of a number.
MAX_DIGITS = 12
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
