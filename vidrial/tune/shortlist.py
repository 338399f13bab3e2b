"""The cost model's choice at a size that was never met, in little time.

Of the thousands of configs of a part a handful are ever predicted fastest; which of them is depends on the sizes. They are found once for each
set of static facts, at problems from far smaller to far larger than the first one. At a new size these alone are asked, by their rules and
costs at that very size, and what differs in one choice from the best of them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vidrial.device import Device
from vidrial.spec.choices import axes, count, flatten, neighbours, unflatten
from vidrial.spec.fields import fields, keyed_fields, least_values
from vidrial.spec.op import Op
from vidrial.spec.space import Subset

# Spaces of no more configs than this are looked through at every size.
SMALL_SPACE = 64
# Values of the longest size, and of those like it, with the others as they are, at their least, and TIMES as large; of another size.
LENGTHS, ALONE, LARGER, TIMES, OTHER = (65537, 8193, 1025, 193, 65, 524289), (65537, 8193, 1025, 65, 524289), (8193, 1025), 8, (65537, 8193)
# Another size is set as well, for SIZES in all, where the longest one is below LONG and may not be the one that matters.
SIZES, LONG = 2, 64
# At the first of them so many configs of a part are asked, evenly spread over all; the fastest ones, and the fastest one with each value of
# each choice, are where the search at all of them begins. It changes one choice at a time, so many times.
SAMPLE, FASTEST, STEPS = 320, 3, 2
# By how much a config may be predicted slower than another for being on the list already: a size that was never met compiles nothing new then.
KEPT = 0.02
# Combinations of the op's own choices that are looked into at a new size.
LOOKED_INTO = 4


def predicted(op: Op, problem: Any, device: Device, fixed: tuple[tuple[str, object], ...] = ()) -> Any:
    """What `Op.predicted` chooses, or what is nearly as fast by the cost model, in little time at a new size.

    Raises:
        ConfigError: no config is legal.
    """
    shortlist = _shortlist_of(op, problem, device, fixed)
    found = shortlist.best(op, problem, device) if shortlist is not None else None
    return found if found is not None else op.predicted(problem, device, dict(fixed))


def _shortlist_of(op: Op, problem: Any, device: Device, fixed: tuple[tuple[str, object], ...]) -> Shortlist | None:
    """That of a problem's static facts, made of the first problem of them; None: all configs are few enough."""
    kept = _kept(op, tuple(fields(problem, "static").items()), dataclasses.replace(device, memory_bytes=0), fixed)
    if not kept:
        kept.append(find_shortlist(op, problem, device, dict(fixed)))
    return kept[0]


@functools.lru_cache(maxsize=256)
def _kept(op: Op, static: tuple[tuple[str, Any], ...], device: Device, fixed: tuple[tuple[str, object], ...]) -> list[Shortlist | None]:
    """Where a shortlist is kept: the sizes of the first problem are no part of the key."""
    return []


@dataclass(frozen=True)
class Shortlist:
    """`leaders`: by part the configs that lead somewhere (by "" those of an op without parts), with any of `shared`, the op's own choices."""

    shared: tuple[Any, ...]
    leaders: Mapping[str, tuple[Any, ...]]

    @functools.cached_property
    def variants(self) -> Mapping[Any, Mapping[str, tuple[Any, ...]]]:
        """The leaders of each part with every combination of own choices."""
        return {s: {part: tuple(_with(s, part, c) for c in found) for part, found in self.leaders.items() if part} for s in self.shared}

    def best(self, op: Op, problem: Any, device: Device) -> Any:
        """The fastest-predicted legal config of these, and of what differs in one choice from it; None if none of these is legal."""
        if not op.parts:
            groups: Sequence[Sequence[Any]] = (self.leaders[""],)
        else:
            promising = self._promising(op, problem, device)
            groups = (promising[:LOOKED_INTO], promising[LOOKED_INTO:])
        among = (Subset(tuple(group), self.variants) for group in groups)
        found = next((first for subset in among if (first := next(op.ranked(problem, device, among=subset), None)) is not None), None)
        if found is None:
            return None
        config = found.config
        for part in op.parts or ("",):
            seconds = op.estimate(problem, config, device, part)
            # 0: nothing of it is launched.
            if seconds:
                leader = next(self._about_as_fast(op, problem, device, config, part, seconds), config)
                config = _moved(op, problem, device, leader, part, seconds)
        return config

    def _about_as_fast(self, op: Op, problem: Any, device: Device, config: Any, part: str, seconds: float) -> Iterator[Any]:
        """The config with other leaders of a part, in their order: what led at more sizes is more likely to be compiled already."""
        for leader in self.leaders[part]:
            other = _with(config, part, leader)
            estimate = op.estimate(problem, other, device, part)
            fast = estimate is not None and estimate * (1 - KEPT) <= seconds
            if fast and op.reject(problem, other, device, part or None) is None:
                yield other

    def _promising(self, op: Op, problem: Any, device: Device) -> list[Any]:
        """The combinations of own choices, by the time of the first leaders that no rule forbids with them."""
        times: dict[Any, float] = {}
        for shared in self.shared:
            total = op.estimate(problem, shared, device, "")
            for found in self.variants[shared].items():
                if total is not None and found[1]:
                    first = _first_seconds(op, problem, device, *found)
                    total = None if first is None else total + first
            if total is not None:
                times[shared] = total
        return sorted(times, key=times.__getitem__)


def _first_seconds(op: Op, problem: Any, device: Device, part: str, variants: Iterable[Any]) -> float | None:
    """Predicted time of a part of the first config that breaks no rule."""
    every = (op.estimate(problem, variant, device, part) for variant in variants)
    return next((seconds for seconds in every if seconds is not None), None)


def _with(shared: Any, part: str, config: Any) -> Any:
    return dataclasses.replace(shared, **{part: config}) if part else config


def _moved(op: Op, problem: Any, device: Device, config: Any, part: str, seconds: float) -> Any:
    """A config, or the best legal one of those that differ from it in one choice of a part, if it is faster by more than `KEPT`."""
    moves = [_with(config, part, move) for move in neighbours(getattr(config, part) if part else config)]
    faster = (c.config for c in op.estimates(problem, config, device, part, moves) if c.seconds < seconds * (1 - KEPT))
    return next((c for c in faster if op.reject(problem, c, device, part or None) is None), config)


def find_shortlist(op: Op, problem: Any, device: Device, fixed: Mapping[str, object] | None = None) -> Shortlist | None:
    """The shortlist of a problem's static facts; None: all configs are few enough to be asked at every size."""
    shared = op.measured(fixed)
    if len(shared) * max(1, sum(count(op.config_type(part)) for part in op.parts)) <= SMALL_SPACE:
        return None
    problems = [*_problems(op, problem, device, shared)] or [[problem]]
    return Shortlist(shared, {part: _leaders(op, problems, device, shared, part) for part in op.parts or ("",)})


def _problems(op: Op, problem: Any, device: Device, shared: Sequence[Any]) -> Iterator[list[Any]]:
    """Shorter and longer problems than this one, of one and of many rows, by the size that is set; not all need be legal."""
    # What may be negative is a limit, and no size.
    least = {name: max(1, n) for name, n in least_values(problem).items() if n >= 0}
    sizes = {name: n for name, n in keyed_fields(problem).items() if name in least}
    found = 0
    for value in sorted(set(sizes.values()), reverse=True):
        # Sizes that are alike, as those of queries and keys, stay alike.
        long = [name for name, n in sizes.items() if n == value]
        others = {name: n for name, n in sizes.items() if name not in long}
        alone, many = {name: least[name] for name in others}, {name: TIMES * n for name, n in others.items()}
        if found < SIZES and _usable(op, dataclasses.replace(problem, **alone, **dict.fromkeys(long, LENGTHS[0])), device, shared):
            # Each begins with a sample of its own: where rows are few other configs are legal.
            for lengths, beside in tuple(((n,), alone) for n in OTHER) if found else ((ALONE, alone), (LENGTHS, others), (LARGER, many)):
                yield [dataclasses.replace(problem, **beside, **dict.fromkeys(long, n)) for n in lengths]
            if not found:
                yield [problem]
            found += 1
        if found and value >= LONG:
            return


def _usable(op: Op, problem: Any, device: Device, shared: Sequence[Any], part: str = "") -> list[Any]:
    """The combinations of own choices that are legal at a problem, and launch a part."""
    legal = [s for s in shared if op.estimate(problem, s, device, "") is not None]
    return [s for s in legal if op.launches(problem, s, part)] if part else legal


def _leaders(op: Op, problems: Sequence[Sequence[Any]], device: Device, shared: Sequence[Any], part: str) -> tuple[Any, ...]:
    """The configs of a part that lead at one of the problems, with one combination of own choices each, in turn."""
    known: dict[Any, None] = {}
    leaders: dict[Any, None] = {}
    for group in problems:
        begun = False
        for turn, problem in enumerate(group):
            usable = _usable(op, problem, device, shared, part)
            if usable:
                chosen = usable[turn % len(usable)]
                known |= {} if begun else _starts(op, problem, device, chosen, part)
                begun = True
                found = next(_legal(op, problem, device, chosen, part, times := _search(op, problem, device, chosen, part, known)), None)
                if found is not None:
                    known[found] = None
                    near = {c: times[c] for c in leaders if times.get(c, math.inf) * (1 - KEPT) <= times[found]}
                    if next(_legal(op, problem, device, chosen, part, near), None) is None:
                        leaders[found] = None
    return tuple(leaders)


def _starts(op: Op, problem: Any, device: Device, shared: Any, part: str) -> dict[Any, None]:
    """Of a sample of a part's configs the fastest ones, and the fastest one with each value of each choice."""
    kind = op.config_type(part)
    # A step without a factor in common with the number of values of any choice: it meets them all.
    step = next(n for n in itertools.count(-(-count(kind) // SAMPLE)) if math.gcd(n, count(kind)) == 1)
    every = itertools.islice(itertools.product(*axes(kind).values()), None, None, step)
    sample = [_with(shared, part, unflatten(kind, dict(zip(axes(kind), values, strict=True)))) for values in every]
    ranked = [getattr(c.config, part) if part else c.config for c in op.estimates(problem, shared, device, part, sample)]
    seen, starts = set[tuple[str, Any]](), dict[Any, None].fromkeys(ranked[:FASTEST])
    for config in ranked:
        values = set(flatten(config).items())
        if values - seen:
            seen |= values
            starts[config] = None
    return starts


def _search(op: Op, problem: Any, device: Device, shared: Any, part: str, starts: Iterable[Any]) -> dict[Any, float]:
    """Predicted times of `starts`, and of what is reached from the fastest one of them by changing one choice at a time."""
    times: dict[Any, float] = {}
    asked, waiting = set[Any](), list(starts)
    for _ in range(STEPS + 1):
        new = [c for c in waiting if c not in asked]
        asked.update(new)
        for c in new:
            seconds = op.estimate(problem, _with(shared, part, c), device, part)
            if seconds is not None:
                times[c] = seconds
        if not new or not times:
            break
        waiting = list(neighbours(min(times, key=times.__getitem__)))
    return times


def _legal(op: Op, problem: Any, device: Device, shared: Any, part: str, times: Mapping[Any, float]) -> Iterator[Any]:
    """Those of a part's configs that no rule forbids, fastest-predicted first."""
    return (c for c in sorted(times, key=times.__getitem__) if op.reject(problem, _with(shared, part, c), device, part or None) is None)
