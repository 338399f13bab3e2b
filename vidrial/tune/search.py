"""Which configs a sweep tries next, given the times of those it has tried. It keeps no state: a resumed sweep goes on where it was.

An op without parts: the best-predicted configs, then the neighbours of the fastest. An op with parts, whose stages run one after
another so that their times add: one probe for every shared choice; for the leading ones each part varied on its own; the best of
each part together; then neighbours.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from vidrial.device import Device
from vidrial.spec.choices import neighbours
from vidrial.spec.op import Op
from vidrial.spec.space import Candidate, Stream

# Shared choices whose probe is further behind the best one are left alone; of the others, so many are looked into.
BEHIND, SHARED_LEADERS = 1.6, 3
# Share of the trials that goes into what the prediction names, before neighbours of what was measured.
PREDICTED_SHARE = 0.7
# Values of each part that are combined, combinations of a shared choice tried, neighbours tried at a time.
BEST_OF_PART, COMBINATIONS, NEIGHBOURS = 3, 4, 8
# How many bases of a shared choice may fail before it is given up.
BASES = 4
# What a sweep may be told: `rounds` is this module's, `optuna` that of vidrial.tune.optuna_search.
STRATEGIES = ("rounds", "optuna")
Times = Mapping[Any, float]
Parts = Mapping[str, Stream[Candidate]]


class Search:
    """The strategy for one problem.

    Args:
        trials: how many configs will be tried in all, at most.
        exhaustive: try every legal config; of an op with parts, every value of each part for every shared choice.
    """

    def __init__(self, op: Op, problem: Any, device: Device, trials: int, exhaustive: bool = False) -> None:
        self._op, self._problem, self._device = op, problem, device
        self._trials, self._exhaustive = trials, exhaustive
        self._shared: list[tuple[Any, Parts]] = []
        if op.parts:
            legal = ((s, op.ranked_parts(problem, s, device)) for s in op.shared() if op.reject(problem, s, device, part="") is None)
            self._shared = [(shared, parts) for shared, parts in legal if all(part.get(0) for part in parts.values())]
            self._rounds = [self._probes, self._vary, self._combine] + ([] if exhaustive else [self._neighbours])
        else:
            self._ranked = Stream(op.ranked(problem, device))
            self._rounds = [self._predicted] + ([] if exhaustive else [self._neighbours])

    def propose(self, seen: Times) -> list[Any]:
        """Configs to try next, the most promising first; none if the search is over. `seen`: config -> ms, infinite for a failure."""
        known = {self._launches(config) for config in seen}
        for candidates in self._rounds:
            new: dict[Any, Any] = {}
            for config in candidates(seen):
                launches = self._launches(config)
                if launches not in known and launches not in new and self._op.reject(self._problem, config, self._device) is None:
                    new[launches] = config
            if new:
                return list(new.values())[: NEIGHBOURS if candidates == self._neighbours else None]
        return []

    def _launches(self, config: Any) -> Any:
        """What a config runs: two configs that differ in an unused part alone are the same."""
        return tuple((s.kernel.name, s.problem, s.config) for s in self._op.stages(self._problem, config))

    def _predicted(self, seen: Times) -> Iterator[Any]:
        share = None if self._exhaustive else max(1, round(PREDICTED_SHARE * self._trials))
        return (candidate.config for candidate in itertools.islice(self._ranked, share))

    def _probes(self, seen: Times) -> Iterator[Any]:
        return (self._base(shared, parts, seen) for shared, parts in self._shared)

    def _base(self, shared: Any, parts: Parts, seen: Times) -> Any:
        """The best-predicted parts together; the next best ones if that failed."""
        for i in range(BASES):
            # The last one of a part that has fewer.
            best = {name: list(itertools.islice(part, i + 1))[-1].config for name, part in parts.items()}
            base = dataclasses.replace(shared, **best)
            if math.isfinite(seen.get(base, 0.0)):
                break
        return base

    def _leading(self, seen: Times) -> list[tuple[Any, Parts]]:
        times = {shared: seen.get(self._base(shared, parts, seen), math.inf) for shared, parts in self._shared}
        near = [entry for entry in self._shared if times[entry[0]] <= BEHIND * min(times.values()) and math.isfinite(times[entry[0]])]
        return near if self._exhaustive else sorted(near, key=lambda entry: times[entry[0]])[:SHARED_LEADERS]

    def _vary(self, seen: Times) -> Iterator[Any]:
        leading = self._shared if self._exhaustive else self._leading(seen)
        axes = len(leading) * len(self._op.parts)
        depth = sys.maxsize if self._exhaustive else max(2, round((PREDICTED_SHARE * self._trials - len(self._shared)) / max(1, axes)))
        columns = []
        for shared, parts in leading:
            base = self._base(shared, parts, seen)
            for name, part in parts.items():
                columns.append([dataclasses.replace(base, **{name: value.config}) for value in itertools.islice(part, depth)])
        for row in itertools.zip_longest(*columns):
            yield from (config for config in row if config is not None)

    def _combine(self, seen: Times) -> Iterator[Any]:
        for shared, parts in self._leading(seen):
            base = self._base(shared, parts, seen)
            options = []
            for name in parts:
                # What was tried of this part alone; the part itself has thousands of configs, most of them never asked for.
                timed = [(t, getattr(c, name)) for c, t in seen.items() if dataclasses.replace(c, **{name: getattr(base, name)}) == base]
                options.append([(t, name, v) for t, v in sorted(timed, key=lambda x: x[0]) if math.isfinite(t)][:BEST_OF_PART])
            together = sorted(itertools.product(*options), key=lambda values: sum(t for t, _, _ in values))
            yield from (dataclasses.replace(base, **{name: value for _, name, value in values}) for values in together[:COMBINATIONS])

    def _neighbours(self, seen: Times) -> Iterator[Any]:
        timed = sorted((c for c in seen if math.isfinite(seen[c])), key=lambda c: seen[c])
        found = [c for best in timed[:2] for c in neighbours(best) if self._op.reject(self._problem, c, self._device) is None]
        return iter(sorted(found, key=lambda c: self._op.seconds(self._problem, c, self._device)))
