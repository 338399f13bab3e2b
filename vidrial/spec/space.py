"""The legal configs of a problem, ranked by predicted time, and why the others are not legal. One statement of legality serves all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic

from vidrial.spec.fields import C


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

    @classmethod
    def of(cls, configs: Iterable[C], reject: Callable[[C], str | None], seconds: Callable[[C], float]) -> Space[C]:
        """Split `configs` by `reject` (None: legal) and rank the legal ones by `seconds`."""
        legal, rejected = [], []
        for config in configs:
            reason = reject(config)
            if reason is None:
                legal.append(Candidate(config, seconds(config)))
            else:
                rejected.append(Rejected(config, reason))
        return cls(tuple(sorted(legal, key=lambda c: c.seconds)), tuple(rejected))

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
