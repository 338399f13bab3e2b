"""The legal configs of a problem, ranked by predicted time, and why the others are not legal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from vidrial.spec.fields import C

T = TypeVar("T")


@dataclass(frozen=True)
class Rejected(Generic[C]):
    """A config that a rule forbids, and the rule's reason."""

    config: C
    reason: str


@dataclass(frozen=True)
class Candidate(Generic[C]):
    """A legal config and its predicted time in seconds."""

    config: C
    seconds: float


@dataclass(frozen=True)
class Space(Generic[C]):
    """All configs of a problem: legal ones fastest-predicted first (ties in order of declaration), and the rejected ones."""

    legal: tuple[Candidate[C], ...]
    rejected: tuple[Rejected[C], ...]

    def reasons(self) -> dict[str, list[C]]:
        """Reason -> the configs it rejects, most frequent reason first."""
        groups: dict[str, list[C]] = {}
        for r in self.rejected:
            groups.setdefault(r.reason, []).append(r.config)
        return dict(sorted(groups.items(), key=lambda item: -len(item[1])))

    def __len__(self) -> int:
        return len(self.legal)

    def __iter__(self) -> Iterator[C]:
        return (c.config for c in self.legal)


@dataclass(frozen=True)
class Subset(Generic[C]):
    """Configs to look at in place of all: combinations of an op's own choices, and with each of them, by part, the configs that vary it.

    A part that is not named varies over all of its configs.
    """

    shared: tuple[C, ...]
    variants: Mapping[C, Mapping[str, Sequence[C]]]


class Stream(Generic[T]):
    """An iterator that may be read again from the beginning; what it is made from is read once, as far as it is asked for."""

    def __init__(self, source: Iterator[T]) -> None:
        self._source, self._read = source, list[T]()

    def get(self, index: int) -> T | None:
        """Its item of that index; None past the end."""
        self._read += itertools.islice(self._source, max(0, index + 1 - len(self._read)))
        return self._read[index] if index < len(self._read) else None

    def __iter__(self) -> Iterator[T]:
        for index in itertools.count():
            item = self.get(index)
            if item is None:
                return
            yield item
