"""An op: named arrays in, named arrays out, by one or more kernels in sequence. It is what is called, swept and ranked."""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, cast

from numpy.typing import NDArray

from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.errors import ConfigError, LayoutError
from vidrial.spec.choices import check_choices, configs, describe
from vidrial.spec.fields import CHOICES, KIND, C, P
from vidrial.spec.kernel import Kernel
from vidrial.spec.space import Candidate, Rejected, Space

ALIGNMENT = 256  # bytes; of every workspace buffer
Arrays: TypeAlias = Mapping[str, NDArray[Any]]  # by name; bfloat16 as uint16 bits


def _no_buffers(problem: object, config: object) -> Mapping[str, Buffer]:
    return {}


def _no_rules(problem: object, config: object) -> Iterable[tuple[bool, str]]:
    return ()


@dataclass(frozen=True)
class Buffer:
    """Shape and dtype of an array that an op makes: an output, or workspace between its stages."""

    shape: tuple[int, ...]
    dtype: DType

    @property
    def bytes(self) -> int:
        """Size in bytes, padded to the alignment of device allocations."""
        size = self.dtype.bytes
        for n in self.shape:
            size *= n
        return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Stage(Generic[P, C]):
    """One launch of an op: a kernel, the problem, and the kernel's own config. Its pointers take the op's arrays of the same names; null where there is none.

    `part` names the part of the op's config that `config` comes from, "" for none: legality and time then depend on that part
    and the op's own choices alone.
    """

    kernel: Kernel[P, C]
    problem: P
    config: C
    part: str = ""

    @property
    def binary(self) -> Hashable:
        """What decides its binary: stages that agree in it share one."""
        return self.kernel.binary(self.problem, self.config)


@dataclass(frozen=True)
class Check:
    """The distance of a result from the reference: norm-relative, and of the worst element (as the op defines it), with their bounds."""

    relative: float
    max_error: float
    relative_bound: float
    max_error_bound: float

    @property
    def ok(self) -> bool:
        """Both within their bounds; NaN never is."""
        return self.relative <= self.relative_bound and self.max_error <= self.max_error_bound


@dataclass(frozen=True)
class _Outline:
    """For one combination of an op's own choices: the time of the stages of no part, and what the rules leave of each part's configs."""

    shared: Any
    base: float
    parts: Mapping[str, list[Candidate]]

    @property
    def possible(self) -> bool:
        return all(self.parts.values())

    @property
    def least(self) -> float:
        """No legal config of it is predicted to be faster."""
        return sum((candidates[0].seconds for candidates in self.parts.values()), self.base)


@dataclass(frozen=True, eq=False)
class Op(Generic[P, C]):
    """An op's description, of its author's own problem P and config C.

    Args:
        name: in rankings and on the command line.
        kernels: all that its stages may launch.
        problem, config: frozen dataclasses; the config may have parts, one per stage.
        stages: (problem, config) -> the launches, in order.
        outputs: problem -> name -> Buffer.
        workspace: (problem, config) -> name -> Buffer.
        sample: (problem, seed) -> name -> NumPy array: fresh random inputs.
        reference: (problem, inputs) -> name -> float64 NumPy array.
        check: (problem, inputs, outputs, reference) -> Check.
        small: problem -> a problem of the same static fields, at an odd length, small enough to check quickly.
        rules: (problem, config) -> (holds, reason) about the config's own choices, beyond what the stages demand.
        example: keywords (`t=10007, d=64`) -> a problem, with defaults for the rest: what the command line's options become.
    """

    name: str
    kernels: tuple[Kernel, ...]
    problem: type[P]
    config: type[C]
    stages: Callable[[P, C], Sequence[Stage]]
    outputs: Callable[[P], Mapping[str, Buffer]]
    sample: Callable[[P, int], dict[str, NDArray[Any]]]
    reference: Callable[[P, Arrays], dict[str, NDArray[Any]]]
    check: Callable[[P, Arrays, Arrays, Arrays], Check]
    small: Callable[[P], P]
    example: Callable[..., P]
    workspace: Callable[[P, C], Mapping[str, Buffer]] = _no_buffers
    rules: Callable[[P, C], Iterable[tuple[bool, str]]] = _no_rules

    @classmethod
    def of(
        cls,
        kernel: Kernel[P, C],
        *,
        outputs: Callable[[P], Mapping[str, Buffer]],
        sample: Callable[[P, int], dict[str, NDArray[Any]]],
        reference: Callable[[P, Arrays], dict[str, NDArray[Any]]],
        check: Callable[[P, Arrays, Arrays, Arrays], Check],
        small: Callable[[P], P],
        example: Callable[..., P],
    ) -> Op[P, C]:
        """The op that is one launch of one kernel, with its name, problem and config."""
        return cls(
            name=kernel.name,
            kernels=(kernel,),
            problem=kernel.problem,
            config=kernel.config,
            stages=lambda problem, config: (Stage(kernel, problem, config),),
            outputs=outputs,
            sample=sample,
            reference=reference,
            check=check,
            small=small,
            example=example,
        )

    def reject(self, problem: P, config: C, device: Device, part: str | None = None) -> str | None:
        """The reason of the first rule that the config breaks, or None: the op's own rules first, then the stages'.

        With `part`, only the stages of that part are asked.
        """
        for holds, reason in self.rules(problem, config):
            if not holds:
                return reason
        for stage in self.stages(problem, config):
            if part is None or stage.part == part:
                broken = stage.kernel.reject(stage.problem, stage.config, device)
                if broken is not None:
                    return broken if stage.kernel.name == self.name else f"{stage.kernel.name}: {broken}"
        return None

    def estimate(self, problem: P, config: C, device: Device, part: str | None = None) -> float | None:
        """`seconds` of a config that breaks no rule, else None. It may still be illegal: no tiles are made, only `reject` asks them."""
        if not all(holds for holds, _ in self.rules(problem, config)):
            return None
        asked = [stage for stage in self.stages(problem, config) if part is None or stage.part == part]
        if any(stage.kernel.broken_rule(stage.problem, stage.config, device) is not None for stage in asked):
            return None
        try:
            return sum(stage.kernel.seconds(stage.problem, stage.config, device) for stage in asked)
        except (LayoutError, ConfigError):
            return None  # a cost that looks at the tiles meets their refusal

    def check_config(self, problem: P, config: C, device: Device) -> None:
        """Refuse an illegal config.

        Raises:
            ConfigError: with the rule's reason.
        """
        check_choices(config)
        reason = self.reject(problem, config, device)
        if reason is not None:
            raise ConfigError(f"{self.name}: {describe(config)} is not legal for {problem}: {reason}")

    def seconds(self, problem: P, config: C, device: Device, part: str | None = None) -> float:
        """Predicted time: the sum over the stages (of `part`, if given)."""
        return sum(s.kernel.seconds(s.problem, s.config, device) for s in self.stages(problem, config) if part is None or s.part == part)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the config's parts, one per stage or a few."""
        return tuple(f.name for f in dataclasses.fields(self.config) if f.metadata.get(KIND) == "part")

    def shared(self, fixed: Mapping[str, object] | None = None) -> Iterator[C]:
        """Every combination of the config's own choices, its parts at their defaults; `fixed` choices take one value only."""
        fixed = fixed or {}
        fields = [f for f in dataclasses.fields(self.config) if f.metadata.get(KIND) != "part"]
        for values in itertools.product(*((fixed[f.name],) if f.name in fixed else f.metadata[CHOICES] for f in fields)):
            yield self.config(**dict(zip((f.name for f in fields), values, strict=True)))

    def part_spaces(self, problem: P, shared: C, device: Device) -> dict[str, Space[Any]]:
        """For one combination of shared choices: each part's own space. Stages run one after another, so parts rank on their own."""
        spaces = {}
        for name in self.parts:

            def put(value: Any, name: str = name) -> Any:
                return dataclasses.replace(shared, **{name: value})

            def reject(value: Any, put: Any = put, name: str = name) -> str | None:
                return self.reject(problem, put(value), device, name)

            def seconds(value: Any, put: Any = put, name: str = name) -> float:
                return self.seconds(problem, put(value), device, name)

            spaces[name] = Space.of(self._part_configs(problem, shared, name), reject, seconds)
        return spaces

    def _part_configs(self, problem: Any, shared: Any, name: str) -> Iterator[Any]:
        """A part's configs; of a part that launches nothing with these choices, the one that `shared` has."""
        if all(stage.part != name for stage in self.stages(problem, shared)):
            return iter((getattr(shared, name),))
        return configs(next(f.metadata[CHOICES] for f in dataclasses.fields(self.config) if f.name == name))

    def space(self, problem: P, device: Device | None = None, limit: int = 256, fixed: Mapping[str, object] | None = None) -> Space[C]:
        """The legal configs, fastest-predicted first, at most `limit`; and every rejection once, of a config or of a part of one.

        `fixed` holds choices of the op's own (not of its parts) at one value: name -> value.
        """
        device = device or Device.default()
        streams: list[Iterator[Candidate]] = []
        rejected: dict[Any, Rejected] = {}
        for shared in self.shared(fixed):
            reason = self.reject(problem, shared, device, part="")
            if reason is not None:
                rejected[shared] = Rejected(shared, reason)
                continue
            spaces = self.part_spaces(problem, shared, device)
            for space in spaces.values():
                rejected.update({(shared, r.config): r for r in space.rejected})
            if all(spaces.values()):
                base = self.seconds(problem, shared, device, part="")
                streams.append(_combinations(shared, base, spaces))
        legal = itertools.islice(heapq.merge(*streams, key=lambda c: c.seconds), limit)
        return Space(tuple(legal), tuple(rejected.values()))

    def predicted(self, problem: P, device: Device, fixed: Mapping[str, object] | None = None) -> C:
        """The cost model's choice: what a call takes that nothing was measured for.

        Raises:
            ConfigError: no config is legal.
        """
        # The first of `space`, but tiles, which take milliseconds each, are asked of the configs that come first alone.
        outlines = [o for o in self._outlines(problem, device, fixed) if o.possible]
        found: list[tuple[float, int, Any]] = []
        for order, outline in sorted(enumerate(outlines), key=lambda o: o[1].least):
            if found and outline.least > min(found)[0]:
                break
            candidate = self._fastest(problem, device, outline)
            found += [(candidate.seconds, order, candidate.config)] if candidate is not None else []
        if not found:
            reasons = "; ".join(itertools.islice(self.space(problem, device, 1, fixed).reasons(), 3))
            raise ConfigError(f"{self.name}: no legal config for {problem} on {device.name}: {reasons}")
        return cast(C, min(found)[2])

    def _outlines(self, problem: Any, device: Device, fixed: Mapping[str, Any] | None) -> Iterator[_Outline]:
        for shared in self.shared(fixed):
            base = self.estimate(problem, shared, device, "")
            if base is not None:
                yield _Outline(shared, base, {name: self._estimates(problem, shared, device, name) for name in self.parts})

    def _estimates(self, problem: Any, shared: Any, device: Device, part: str) -> list[Candidate]:
        """What the rules leave of a part's configs, fastest-predicted first, with the part's own time."""
        found = []
        for value in self._part_configs(problem, shared, part):
            seconds = self.estimate(problem, dataclasses.replace(shared, **{part: value}), device, part)
            if seconds is not None:
                found.append(Candidate(value, seconds))
        return sorted(found, key=lambda c: c.seconds)

    def _fastest(self, problem: Any, device: Device, outline: _Outline) -> Candidate | None:
        """The fastest-predicted legal config of an outline: each part's first that its tiles allow."""
        if self.reject(problem, outline.shared, device, "") is not None:
            return None
        chosen = {}
        for name, candidates in outline.parts.items():
            legal = (
                c for c in candidates if self.reject(problem, dataclasses.replace(outline.shared, **{name: c.config}), device, name) is None
            )
            first = next(legal, None)
            if first is None:
                return None
            chosen[name] = first
        config = dataclasses.replace(outline.shared, **{name: c.config for name, c in chosen.items()})
        return Candidate(config, sum((c.seconds for c in chosen.values()), outline.base))

    def digest(self) -> str:
        """Digest of all templates' code: a ranking holds for this code only, whatever its comments, and the names of its files.

        Raises:
            TemplateError: an include that cannot be followed, with file and line.
        """
        return hashlib.sha256("".join(kernel.digest() for kernel in self.kernels).encode()).hexdigest()

    def text_digest(self) -> str:
        """Digest of all templates as they are: while it stays, so does `digest`, which takes longer."""
        return hashlib.sha256("".join(kernel.text_digest() for kernel in self.kernels).encode()).hexdigest()


def _combinations(shared: Any, base: float, spaces: Mapping[str, Space]) -> Iterator[Candidate]:
    """All combinations of the parts' legal configs, best sum first."""
    names, lists = list(spaces), [space.legal for space in spaces.values()]
    start = (0,) * len(lists)
    heap, seen = [(sum((x[0].seconds for x in lists), base), start)], {start}
    while heap:
        seconds, index = heapq.heappop(heap)
        yield Candidate(dataclasses.replace(shared, **{n: x[i].config for n, x, i in zip(names, lists, index, strict=True)}), seconds)
        for axis, x in enumerate(lists):
            after = (*index[:axis], index[axis] + 1, *index[axis + 1 :])
            if after[axis] < len(x) and after not in seen:
                seen.add(after)
                heapq.heappush(heap, (seconds - x[index[axis]].seconds + x[after[axis]].seconds, after))
