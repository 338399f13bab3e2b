"""Why no config of a problem is legal: the reasons of those that broke the last of the rules, which is what to change first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from vidrial.device import Device

# A config that all rules allow and whose tiles are refused came further than any that broke a rule.
TILES = 1 << 20


def furthest(
    op: Any, problem: Any, device: Device, variants: Iterable[tuple[Any, Mapping[str, Sequence[Any]]]], limit: int = 3
) -> list[str]:
    """The reasons of the configs that came furthest, `limit` at most, and of those the most frequent first.

    Args:
        variants: combinations of the own choices of `op` (an Op), and with each of them, by part, the configs that vary that part. A part
            of which one is legal refuses nothing.
    """
    found: Counter[tuple[int, str]] = Counter()
    for shared, by_part in variants:
        own = list(_refusals(op, problem, device, "", [shared]))
        parts = [] if own else [list(_refusals(op, problem, device, part, configs)) for part, configs in by_part.items()]
        found.update(own)
        for refused, configs in zip(parts, by_part.values(), strict=False):
            if len(refused) == len(configs):
                found.update(refused)
    ranked = sorted(found.items(), key=lambda item: (-item[0][0], -item[1]))
    return [reason for (_, reason), _ in ranked][:limit]


def _refusals(op: Any, problem: Any, device: Device, part: str, configs: Iterable[Any]) -> Iterator[tuple[int, str]]:
    """How many rules held, and the reason, of each config that is refused."""
    for config in configs:
        reason = op.reject(problem, config, device, part)
        if reason is not None:
            yield _held(op, problem, config, device, part), reason


def _held(op: Any, problem: Any, config: Any, device: Device, part: str) -> int:
    rules = [op.rules(problem, config)]
    rules += [s.kernel.rules(s.problem, s.config, device) for s in op.stages(problem, config) if s.part == part]
    broken = (held for held, (holds, _) in enumerate(rule for several in rules for rule in several) if not holds)
    return next(broken, TILES)
