"""The legal configs of a problem, ranked by predicted time, and why the others are not legal. One statement of legality serves all."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from vidrial.device import Device
from vidrial.errors import ConfigError
from vidrial.problem import CHOICES, KIND

LAUNCH_SECONDS = 3e-6


@dataclass(frozen=True)
class Cost:
    """What a launch must do, to rank configs before anything is measured.

    Args:
        flops: floating-point operations, those thrown away included.
        bytes: bytes that must cross device memory.
        ctas: CTAs launched.
        ctas_per_sm: how many of them an SM holds at once.
        efficiency: share of the device's tensor rate that the inner loop reaches when every SM is full.
        uneven: CTAs take unlike times, so that no wave ends at once: half of one is lost, however many there are.
    """

    flops: float
    bytes: float
    ctas: int
    ctas_per_sm: int = 1
    efficiency: float = 0.5
    uneven: bool = False

    def seconds(self, device: Device) -> float:
        """Predicted time: the slower of arithmetic and memory, stretched by the idle slots of the last wave, plus the launch."""
        slots = device.sms * max(1, self.ctas_per_sm)
        ctas = max(1, self.ctas)
        filled = ctas / (ctas + slots / 2 if self.uneven and ctas > slots else -(-ctas // slots) * slots)
        arithmetic = self.flops / (device.tensor_tflops * 1e12 * self.efficiency * filled)
        return max(arithmetic, self.bytes / (device.bandwidth_gbs * 1e9)) + LAUNCH_SECONDS


@dataclass(frozen=True)
class Rejected:
    """A config that a rule forbids, and the rule's sentence."""

    config: Any
    sentence: str


@dataclass(frozen=True)
class Candidate:
    """A legal config and its predicted time in seconds."""

    config: Any
    seconds: float


@dataclass(frozen=True)
class Space:
    """All configs of a problem: legal ones fastest-predicted first (ties in order of declaration), and the rejected ones."""

    legal: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...]

    @classmethod
    def of(cls, configs: Iterable[Any], reject: Callable[[Any], str | None], seconds: Callable[[Any], float]) -> Space:
        """Split `configs` by `reject` (None: legal) and rank the legal ones by `seconds`."""
        legal, rejected = [], []
        for config in configs:
            sentence = reject(config)
            if sentence is None:
                legal.append(Candidate(config, seconds(config)))
            else:
                rejected.append(Rejected(config, sentence))
        return cls(tuple(sorted(legal, key=lambda c: c.seconds)), tuple(rejected))

    def reasons(self) -> dict[str, list[Any]]:
        """Sentence -> the configs it rejects, most frequent sentence first."""
        groups: dict[str, list[Any]] = {}
        for r in self.rejected:
            groups.setdefault(r.sentence, []).append(r.config)
        return dict(sorted(groups.items(), key=lambda item: -len(item[1])))

    def __len__(self) -> int:
        return len(self.legal)

    def __iter__(self) -> Iterator[Any]:
        return (c.config for c in self.legal)


def configs(config: type) -> Iterator[Any]:
    """Every combination of a config's choices, the default first; parts contribute the combinations of their own choices."""
    axes = []
    for field in dataclasses.fields(config):
        if field.metadata.get(KIND) == "part":
            axes.append([(field.name, v) for v in configs(field.metadata[CHOICES])])
        elif CHOICES in field.metadata:
            axes.append([(field.name, v) for v in field.metadata[CHOICES]])
    for combination in itertools.product(*axes):
        yield config(**dict(combination))


def config_order(config: Any) -> tuple[int, ...]:
    """Position of a config in the order of declaration: the index of each of its choices, parts included."""
    order: tuple[int, ...] = ()
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), field.metadata.get(CHOICES, ())
        if field.metadata.get(KIND) == "part":
            order += config_order(value)
        else:
            order += (choices.index(value) if value in choices else len(choices),)
    return order


def check_choices(config: Any) -> None:
    """Refuse a config whose value is not among its field's choices.

    Raises:
        ConfigError: naming the field, what came and what is accepted.
    """
    for field in dataclasses.fields(config):
        value, accepted = getattr(config, field.name), field.metadata.get(CHOICES)
        if field.metadata.get(KIND) == "part":
            check_choices(value)
        elif accepted is not None and value not in accepted:
            raise ConfigError(f"{type(config).__name__}.{field.name}={value!r} is not a choice; accepted: {', '.join(map(repr, accepted))}")


def describe(config: Any) -> str:
    """A config on one line, parts flattened: `chunk=1024 scan.tokens=64`."""
    words = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata.get(KIND) == "part":
            words += [f"{field.name}.{word}" for word in describe(value).split()]
        else:
            words.append(f"{field.name}={value}")
    return " ".join(words)
