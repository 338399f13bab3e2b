"""All configs of an op for one problem: which are legal, in which order they are predicted, and why the others are not."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vidrial.device import Device
from vidrial.errors import ConfigError, LayoutError
from vidrial.spec.choices import Axes, axes, combinations, configs, count
from vidrial.spec.kernel import Kernel
from vidrial.spec.outcomes import Cell, Outcomes
from vidrial.spec.space import Candidate, Rejected, Stream, Subset

if TYPE_CHECKING:
    from vidrial.spec.op import Op


def seconds_of(kernel: Kernel, problem: Any, config: Any, device: Device) -> float | None:
    """Predicted time of a launch; None where a cost that looks at the tiles meets their refusal."""
    try:
        return kernel.seconds(problem, config, device)
    except (LayoutError, ConfigError):
        return None


class _Walk:
    """How far the configs of one combination of own choices were looked through, in `Survey.ranked`."""

    def __init__(self, shared: Candidate, among: Subset | None) -> None:
        self.shared, self.among, self.least = shared, among, shared.seconds
        self.estimates: dict[str, list[Candidate]] = {}
        self.stream: Iterator[Candidate] | None = None
        self.found: Candidate | None = None
        self.following: Candidate | None = None


@dataclass(frozen=True)
class _Launch:
    """A launch of a config, as far as its part's choices do not decide it: why it is not legal, its seconds (None: not predicted); or the kernel
    and problem that are to be asked about the part."""

    reason: str | None = None
    seconds: float | None = None
    asked: tuple[Kernel, Any] | None = None


class Survey:
    """All configs of an op for one problem, asked together: what depends on few of their choices is asked once for all that agree in those.

    `exact`: legality includes what the tiles demand, which take milliseconds; else the rules alone are asked.
    """

    def __init__(self, op: Op, problem: Any, device: Device, fixed: Mapping[str, object] | None = None, *, exact: bool = False) -> None:
        self.op, self.problem, self.device, self.exact = op, problem, device, exact
        self._own = op.own_axes(fixed)
        self._launches: dict[str, Outcomes[tuple[_Launch, ...]]] = {}
        self._kernels: dict[tuple[Kernel, Any, str], tuple[Outcomes[str | None], Outcomes[float | None]]] = {}

    @functools.cached_property
    def shared(self) -> tuple[Any, ...]:
        """Every combination of the op's own choices."""
        return tuple(combinations(self.op.config, self._own))

    def asked(self) -> int:
        """How often an author's function was called with a config."""
        kernels = (outcomes for pair in self._kernels.values() for outcomes in pair)
        return sum(outcomes.made for outcomes in (*self._launches.values(), *kernels))

    def _axes(self, part: str) -> Axes:
        return axes(self.op.config_type(part)) if part else self._own

    def _launched(self, config: Any, part: str) -> Iterator[_Launch]:
        """The launches of a part, in order, until one is not legal."""
        op, problem = self.op, self.problem
        broken = next((reason for holds, reason in op.rules(problem, config) if not holds), None)
        if broken is not None:
            yield _Launch(broken)
            return
        own = getattr(config, part) if part else config
        for stage in op.stages_of(problem, config, part):
            if stage.config is own:
                yield _Launch(asked=(stage.kernel, stage.problem))
                continue
            reason = self._refusal(stage.kernel, stage.problem, stage.config)
            yield _Launch(reason, None if reason else seconds_of(stage.kernel, stage.problem, stage.config, self.device))
            if reason is not None:
                return
        if self.exact:
            yield _Launch(op.too_large(problem, config, self.device), 0.0)

    def _refusal(self, kernel: Kernel, problem: Any, config: Any) -> str | None:
        reason = (kernel.reject if self.exact else kernel.broken_rule)(problem, config, self.device)
        return reason if reason is None or kernel.name == self.op.name else f"{kernel.name}: {reason}"

    def _kernel(self, kernel: Kernel, problem: Any, part: str) -> tuple[Outcomes[str | None], Outcomes[float | None]]:
        """Why a kernel's own config is not legal, and its seconds."""
        key = kernel, problem, part
        if key not in self._kernels:

            def seconds(config: Any) -> float | None:
                return seconds_of(kernel, problem, config, self.device)

            refusals = Outcomes(lambda config: self._refusal(kernel, problem, config), "", self._axes(part))
            self._kernels[key] = refusals, Outcomes(seconds, "", self._axes(part))
        return self._kernels[key]

    def _cells(self, part: str, shared: Any, varied: Sequence[Any]) -> Iterator[tuple[str | None, tuple[_Launch, ...], list[int]]]:
        """Of `varied`, all configs of a part or ("") all own choices: why they are not legal, their launches, and their indices."""
        if part not in self._launches:
            self._launches[part] = Outcomes(lambda config: tuple(self._launched(config, part)), part, self._axes(part))
        outcomes = self._launches[part]

        def ask(launches: tuple[_Launch, ...], i: int, cell: Cell) -> Iterator[tuple[str | None, tuple[_Launch, ...], list[int]]]:
            asked = launches[i].asked if i < len(launches) else None
            while asked is None:
                if i == len(launches) or launches[i].reason is not None:
                    yield launches[i].reason if i < len(launches) else None, launches, outcomes.indices(cell)
                    return
                i += 1
                asked = launches[i].asked if i < len(launches) else None
            for reason, narrower in self._kernel(*asked, part)[0].cells(varied[0], varied, cell):
                if reason is None:
                    yield from ask(launches, i + 1, narrower)
                else:
                    yield reason, launches, outcomes.indices(narrower)

        for launches, cell in outcomes.cells(shared, varied):
            yield from ask(launches, 0, cell)

    def _ranks(self, part: str, shared: Any, varied: Sequence[Any]) -> Iterator[tuple[int, float]]:
        """Index and predicted seconds of what is legal, in any order."""
        last, known, costs = None, 0.0, list[Outcomes[float | None]]()
        for reason, launches, indices in self._cells(part, shared, varied):
            if reason is not None or any(launch.asked is None and launch.seconds is None for launch in launches):
                continue
            if launches is not last:
                last, known = launches, sum(launch.seconds or 0.0 for launch in launches)
                costs = [self._kernel(*launch.asked, part)[1] for launch in launches if launch.asked is not None]
            single = len(indices) == 1
            for i in indices:
                # Where legality depends on every choice so does the time, and to note what it reads takes longer than to ask.
                seconds = [s for cost in costs if (s := cost.alone(varied[i]) if single else cost.of(varied[0], varied[i])) is not None]
                if len(seconds) == len(costs):
                    yield i, math.fsum([known, *seconds])

    def bases(self) -> Iterator[tuple[int, Candidate]]:
        """Index, combination of own choices and seconds of what its stages of no part take, of those that are legal."""
        return ((i, Candidate(self.shared[i], seconds)) for i, seconds in self._ranks("", self.shared[0], self.shared))

    def bases_of(self, shared: Iterable[Any]) -> Iterator[Candidate | None]:
        """The same of some combinations alone; None: a rule forbids it."""
        every = ((s, self.op.estimate(self.problem, s, self.device, "")) for s in shared)
        return (None if seconds is None else Candidate(s, seconds) for s, seconds in every)

    def estimates(self, shared: Any, part: str, variants: Sequence[Any] | None = None) -> list[Candidate]:
        """A part's configs that are legal with `shared`, by its own predicted time, ties in order of declaration."""
        op, problem, device = self.op, self.problem, self.device
        if variants is not None or not op.launches(problem, shared, part):
            found = op.estimates(problem, shared, device, part, variants or ())
            return [Candidate(getattr(c.config, part), c.seconds) for c in found]
        every = configs(op.config_type(part))
        return [Candidate(every[i], seconds) for seconds, i in sorted((s, i) for i, s in self._ranks(part, shared, every))]

    def rejected(self) -> Iterator[Rejected]:
        """Every rejection once, of a combination of own choices or of a part's config with one."""
        own = self._rejected("", self.shared[0], self.shared)
        for i, shared in enumerate(self.shared):
            if i in own:
                yield Rejected(shared, own[i])
                continue
            for part in self.op.parts:
                if self.op.launches(self.problem, shared, part):
                    every = configs(self.op.config_type(part))
                    yield from (Rejected(every[j], reason) for j, reason in sorted(self._rejected(part, shared, every).items()))

    def _rejected(self, part: str, shared: Any, varied: Sequence[Any]) -> dict[int, str]:
        return {i: reason for reason, _, indices in self._cells(part, shared, varied) if reason is not None for i in indices}

    def ranked(self, among: Subset | None = None) -> Iterator[Candidate]:
        """The legal configs, fastest-predicted first, ties in order of declaration; `among`: those that are looked at, in place of all."""
        # One entry per combination of own choices, by what none of its configs can be below: the parts that were estimated so far, then the
        # time of its next config. A part of many configs is estimated last, and not at all where others are faster without it.
        heap: list[tuple[float, int, _Walk]] = []
        for order, base in self.bases() if among is None else enumerate(self.bases_of(among.shared)):
            if base is not None:
                heap.append((base.seconds, order, _Walk(base, among)))
        heapq.heapify(heap)
        while heap:
            _, order, walk = heap[0]
            least = self._advance(walk)
            if walk.found is not None:
                yield walk.found
            if least is None:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (least, order, walk))

    def _advance(self, walk: _Walk) -> float | None:
        """One step of a walk, and what it cannot be below from then on; None: it is over. `found` is what the step passed, if anything."""
        walk.found, waiting = walk.following, [part for part in self.op.parts if part not in walk.estimates]
        if waiting:
            shared = walk.shared.config
            known = {} if walk.among is None else walk.among.variants.get(shared, {})
            sizes = {part: len(known[part]) if part in known else count(self.op.config_type(part)) for part in waiting}
            part = min(waiting, key=lambda p: sizes[p])
            walk.estimates[part] = self.estimates(shared, part, known.get(part))
            walk.least += walk.estimates[part][0].seconds if walk.estimates[part] else 0.0
            return walk.least if walk.estimates[part] else None
        if walk.stream is None:
            walk.stream = self._combined(walk.shared, {part: walk.estimates[part] for part in self.op.parts})
        walk.following = next(walk.stream, None)
        return None if walk.following is None else walk.following.seconds

    def _combined(self, shared: Candidate, estimates: Mapping[str, Sequence[Candidate]]) -> Iterator[Candidate]:
        """All combinations of the parts' legal configs with own choices, fastest-predicted first."""
        if self.op.reject(self.problem, shared.config, self.device, "") is not None:
            return
        streams = {part: self.legal(shared.config, part, candidates) for part, candidates in estimates.items()}

        def entry(index: tuple[int, ...]) -> list[tuple[float, tuple[int, ...], Candidate]]:
            chosen = {part: candidate for (part, s), i in zip(streams.items(), index, strict=True) if (candidate := s.get(i)) is not None}
            if len(chosen) < len(streams):
                return []
            seconds = sum((c.seconds for c in chosen.values()), shared.seconds)
            config = dataclasses.replace(shared.config, **{part: c.config for part, c in chosen.items()})
            return [(seconds, index, Candidate(config, seconds))]

        heap = entry((0,) * len(streams))
        seen = {(0,) * len(streams)}
        while heap:
            _, index, candidate = heapq.heappop(heap)
            yield candidate
            for axis in range(len(index)):
                after = (*index[:axis], index[axis] + 1, *index[axis + 1 :])
                if after not in seen:
                    seen.add(after)
                    for following in entry(after):
                        heapq.heappush(heap, following)

    def legal(self, shared: Any, part: str, estimates: Iterable[Candidate]) -> Stream[Candidate]:
        """Of a part's configs what its tiles allow with `shared`: they take milliseconds, and are asked as they are read."""
        op, problem, device = self.op, self.problem, self.device
        return Stream(c for c in estimates if op.reject(problem, dataclasses.replace(shared, **{part: c.config}), device, part) is None)
