"""An op: named arrays in, named arrays out, by one or more kernels in sequence. It is what is called, swept and ranked."""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeAlias

from numpy.typing import NDArray

from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.errors import ArgumentError, ConfigError, LayoutError
from vidrial.spec.choices import check_choices, combinations, configs, count, describe, own_axes, parts
from vidrial.spec.fields import C, P, check_record
from vidrial.spec.kernel import Kernel
from vidrial.spec.space import Candidate, Rejected, Space, Stream, Subset

ALIGNMENT = 256  # bytes; of every workspace buffer
GIB = 1 << 30
Arrays: TypeAlias = Mapping[str, NDArray[Any]]  # by name; bfloat16 as uint16 bits


def _no_buffers(problem: object, config: object) -> Mapping[str, Buffer]:
    return {}


def _no_rules(problem: object, config: object) -> Iterable[tuple[bool, str]]:
    return ()


@dataclass(frozen=True)
class Buffer:
    """An array of an op: an input, an output, or workspace between its stages. `zeroed` is of workspace, what follows it of inputs.

    `zeroed`: it is 0 before each launch which has it as an argument, a counter say. `strides`: in elements, by axis, as the kernels will
    step; None: contiguous. Axes of one element may have any. `aligned`: it begins at a multiple of 16 bytes. `optional`: it may be left
    out, or be None; the kernels' pointer is null then.
    """

    shape: tuple[int, ...]
    dtype: DType
    strides: tuple[int, ...] | None = None
    aligned: bool = True
    optional: bool = False
    zeroed: bool = False

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.bytes

    @property
    def bytes(self) -> int:
        """Size in bytes, padded to the alignment of device allocations."""
        return -(-self.nbytes // ALIGNMENT) * ALIGNMENT


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

    # Hidden from type checkers: to them a field that is not declared is a mistake.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            new = {"worst": "max_error", "worst_bound": "max_error_bound"}.get(name)
            raise AttributeError(f"Check has no {name}" + (f", a name of version 1; instead: {new}" if new else ""))


class _Walk:
    """How far the configs of one combination of own choices were looked through, in `Op.ranked`."""

    def __init__(self, shared: Candidate, among: Subset | None) -> None:
        self.shared, self.among, self.least = shared, among, shared.seconds
        self.estimates: dict[str, list[Candidate]] = {}
        self.stream: Iterator[Candidate] | None = None
        self.found: Candidate | None = None
        self.following: Candidate | None = None


@dataclass(frozen=True, eq=False)
class Op(Generic[P, C]):
    """An op's description, of its author's own problem P and config C.

    Args:
        name: in rankings and on the command line.
        kernels: all that its stages may launch.
        problem: a frozen dataclass of static and dynamic fields.
        config: a frozen dataclass of choices; it may have parts, one per stage.
        stages: (problem, config) -> the launches, in order.
        inputs: problem -> name -> Buffer: what a call must give, checked once per call signature.
        outputs: problem -> name -> Buffer.
        workspace: (problem, config) -> name -> Buffer.
        sample: (problem, seed) -> name -> NumPy array: fresh random inputs.
        reference: (problem, inputs) -> name -> float64 NumPy array.
        check: (problem, inputs, outputs, reference) -> Check.
        small: problem -> a problem of the same static fields, at an odd length, small enough to check quickly.
        rules: (problem, config) -> (holds, reason) about the config's own choices, beyond what the stages demand.
        problem_of: (each input's ArraySpec and options, by name) -> the problem of a call (`vidrial.call_op`).
        example: keywords (`t=10007, d=64`) -> a problem, with defaults for the rest: what the command line's options become.
        unmeasured: values of the config's own choices, by name, that no GPU has measured yet: sweeps, checks and configs that name them reach them,
            but a call takes one only where a ranking says so, never by the cost model.
    """

    name: str
    kernels: tuple[Kernel, ...]
    problem: type[P]
    config: type[C]
    stages: Callable[[P, C], Sequence[Stage]]
    inputs: Callable[[P], Mapping[str, Buffer]]
    outputs: Callable[[P], Mapping[str, Buffer]]
    sample: Callable[[P, int], dict[str, NDArray[Any]]]
    reference: Callable[[P, Arrays], dict[str, NDArray[Any]]]
    check: Callable[[P, Arrays, Arrays, Arrays], Check]
    small: Callable[[P], P]
    example: Callable[..., P]
    workspace: Callable[[P, C], Mapping[str, Buffer]] = _no_buffers
    rules: Callable[[P, C], Iterable[tuple[bool, str]]] = _no_rules
    problem_of: Callable[..., P] | None = None
    unmeasured: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        kernel: Kernel[P, C],
        *,
        inputs: Callable[[P], Mapping[str, Buffer]],
        outputs: Callable[[P], Mapping[str, Buffer]],
        sample: Callable[[P, int], dict[str, NDArray[Any]]],
        reference: Callable[[P, Arrays], dict[str, NDArray[Any]]],
        check: Callable[[P, Arrays, Arrays, Arrays], Check],
        small: Callable[[P], P],
        example: Callable[..., P],
        problem_of: Callable[..., P] | None = None,
    ) -> Op[P, C]:
        """The op that is one launch of one kernel, with its name, problem and config."""
        return cls(
            name=kernel.name,
            kernels=(kernel,),
            problem=kernel.problem,
            config=kernel.config,
            stages=lambda problem, config: (Stage(kernel, problem, config),),
            inputs=inputs,
            outputs=outputs,
            sample=sample,
            reference=reference,
            check=check,
            small=small,
            example=example,
            problem_of=problem_of,
        )

    def _stages_of(self, problem: P, config: C, part: str | None) -> Sequence[Stage]:
        """The stages of a part, or of no part (""), or all (None)."""
        return [stage for stage in self.stages(problem, config) if part is None or stage.part == part]

    def reject(self, problem: P, config: C, device: Device, part: str | None = None) -> str | None:
        """The reason of the first rule that the config breaks, or None: the op's own rules first, then the stages'.

        With `part`, only the stages of that part are asked.
        """
        for holds, reason in self.rules(problem, config):
            if not holds:
                return reason
        for stage in self._stages_of(problem, config, part):
            broken = stage.kernel.reject(stage.problem, stage.config, device)
            if broken is not None:
                return broken if stage.kernel.name == self.name else f"{stage.kernel.name}: {broken}"
        return self._too_large(problem, config, device)

    def workspace_bytes(self, problem: P, config: C) -> int:
        """Size of the workspace that a call takes beside its inputs and outputs."""
        return sum(buffer.bytes for buffer in self.workspace(problem, config).values())

    def array_bytes(self, problem: P) -> int:
        """Size of a call's inputs and outputs."""
        return sum(buffer.bytes for buffer in (*self.inputs(problem).values(), *self.outputs(problem).values()))

    def _too_large(self, problem: P, config: C, device: Device) -> str | None:
        """Why a call does not fit into the device's memory, were it empty; None where that is not known."""
        if not device.memory_bytes:
            return None
        arrays, workspace = self.array_bytes(problem), self.workspace_bytes(problem, config)
        if workspace == 0 or arrays + workspace <= device.memory_bytes:
            return None
        return (
            f"{workspace / GIB:.1f} GiB of workspace beside {arrays / GIB:.1f} GiB of inputs and outputs: "
            f"{device.name} has {device.memory_bytes / GIB:.1f} GiB"
        )

    def estimate(self, problem: P, config: C, device: Device, part: str | None = None) -> float | None:
        """`seconds` of a config that breaks no rule, else None. It may still be illegal: no tiles are made, only `reject` asks them.

        With a `part`, that of its stages, by their rules alone.
        """
        # NOTE: loops, not generators: thousands of configs are asked. The op's own rules were asked before a part varies.
        if not part:
            for holds, _ in self.rules(problem, config):
                if not holds:
                    return None
        asked = self._stages_of(problem, config, part)
        for stage in asked:
            if stage.kernel.broken_rule(stage.problem, stage.config, device) is not None:
                return None
        seconds = 0.0
        try:
            for stage in asked:
                seconds += stage.kernel.seconds(stage.problem, stage.config, device)
        except (LayoutError, ConfigError):
            return None  # a cost that looks at the tiles meets their refusal
        return seconds

    def check_config(self, problem: P, config: C, device: Device) -> None:
        """Refuse an illegal config.

        Raises:
            ConfigError: with the rule's reason. ArgumentError: a stage is not what the op declares.
        """
        check_choices(config)
        self._check_stages(problem, config)
        reason = self.reject(problem, config, device)
        if reason is not None:
            raise ConfigError(f"{self.name}: {describe(config)} is not legal for {problem}: {reason}")

    def check_problem(self, problem: P, device: Device) -> None:
        """Refuse a problem that the op's own rules refuse whatever its choices.

        Raises:
            ConfigError: with the first rule's reason.
        """
        reasons = (self.reject(problem, shared, device, "") for shared in self.shared())
        first = next(reasons, None)
        if first is not None and all(reason is not None for reason in reasons):
            raise ConfigError(f"{self.name}: no legal config for {problem} on {device.name}: {first}")

    def _check_stages(self, problem: P, config: C) -> None:
        """Refuse stages whose kernels or parts the op does not declare: its rankings and its search would leave them out unnoticed."""
        kernels, declared = [kernel.name for kernel in self.kernels], parts(self.config)
        for stage in self.stages(problem, config):
            where = f"op {self.name}: the stage of {stage.kernel.name}"
            if stage.kernel.name not in kernels:
                raise ArgumentError(
                    f"{where} launches a kernel that is not among the op's ({', '.join(kernels)}); name it in Op(kernels=...)"
                )
            if stage.part and stage.part not in declared:
                raise ArgumentError(
                    f"{where} has part={stage.part!r}; parts of {self.config.__qualname__}: {', '.join(declared) or 'none'}; declare it as "
                    f"`{stage.part}: ... = part(...)`, or leave it out of Stage"
                )
            owners = [name for name in declared if getattr(config, name) is stage.config]
            if owners and stage.part not in owners:
                raise ArgumentError(f"{where} takes its config from part {owners[0]} and has part={stage.part!r}; give part={owners[0]!r}")

    def __post_init__(self) -> None:
        check_record(f"op {self.name}: problem", self.problem)
        check_record(f"op {self.name}: config", self.config)

    def seconds(self, problem: P, config: C, device: Device) -> float:
        """Predicted time: the sum over the stages."""
        return sum(s.kernel.seconds(s.problem, s.config, device) for s in self.stages(problem, config))

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the config's parts, one per stage or a few."""
        return tuple(parts(self.config))

    def config_type(self, part: str) -> type:
        """Type of the config of a part; "": of the op's own."""
        return parts(self.config)[part] if part else self.config

    def shared(self, fixed: Mapping[str, object] | None = None) -> Iterator[C]:
        """Every combination of the config's own choices, its parts at their defaults; `fixed` choices take one value only."""
        return combinations(self.config, {**own_axes(self.config), **{name: (value,) for name, value in (fixed or {}).items()}})

    def measured(self, fixed: Mapping[str, object] | None = None) -> tuple[C, ...]:
        """As `shared`, without what is unmeasured, unless it is asked for."""
        left_out = {name: values for name, values in self.unmeasured.items() if name not in (fixed or {})}
        return tuple(c for c in self.shared(fixed) if all(getattr(c, name) not in values for name, values in left_out.items()))

    def launches(self, problem: P, config: C, part: str) -> bool:
        """Whether a part of a config launches anything for a problem."""
        return any(stage.part == part for stage in self.stages(problem, config))

    def _part_variants(self, problem: P, shared: Any, part: str) -> Iterator[Any]:
        """`shared` with every config of a part; itself alone where the part launches nothing."""
        if not self.launches(problem, shared, part):
            return iter((shared,))
        return (dataclasses.replace(shared, **{part: config}) for config in configs(parts(self.config)[part]))

    def estimates(self, problem: P, shared: C, device: Device, part: str, variants: Iterable[C] | None = None) -> list[Candidate[C]]:
        """What the rules leave of `shared` with the part's configs (or of `variants`, which are such), by the part's own predicted time."""
        every = variants if variants is not None and self.launches(problem, shared, part) else self._part_variants(problem, shared, part)
        found = ((v, self.estimate(problem, v, device, part)) for v in every)
        return sorted((Candidate(v, seconds) for v, seconds in found if seconds is not None), key=lambda c: c.seconds)

    def _legal(self, problem: Any, device: Device, part: str, estimates: Iterable[Candidate]) -> Stream[Candidate]:
        """Of `estimates`, with the part's config alone, what its tiles allow: they take milliseconds, and are asked as they are read."""
        legal = (c for c in estimates if self.reject(problem, c.config, device, part) is None)
        return Stream(Candidate(getattr(c.config, part), c.seconds) for c in legal)

    def ranked_parts(self, problem: P, shared: C, device: Device) -> dict[str, Stream[Candidate[Any]]]:
        """For one combination of own choices: each part's legal configs, fastest-predicted first, with the part's own time.

        Stages run one after another, so parts rank on their own.
        """
        return {part: self._legal(problem, device, part, self.estimates(problem, shared, device, part)) for part in self.parts}

    def ranked(
        self, problem: P, device: Device, fixed: Mapping[str, object] | None = None, among: Subset[C] | None = None
    ) -> Iterator[Candidate[C]]:
        """The legal configs, fastest-predicted first, ties in order of declaration; tiles are asked of those that come first alone.

        `fixed` holds choices of the op's own (not of its parts) at one value: name -> value. `among`: those that are looked at, in place of all.
        """
        # One entry per combination of own choices, by what none of its configs can be below: the parts that were estimated so far, then the
        # time of its next config. A part of many configs is estimated last, and not at all where others are faster without it.
        heap: list[tuple[float, int, _Walk]] = []
        for order, shared in enumerate(self.shared(fixed) if among is None else among.shared):
            base = self.estimate(problem, shared, device, "")
            if base is not None:
                heap.append((base, order, _Walk(Candidate(shared, base), among)))
        heapq.heapify(heap)
        while heap:
            _, order, walk = heap[0]
            least = self._advance(problem, device, walk)
            if walk.found is not None:
                yield walk.found
            if least is None:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (least, order, walk))

    def _advance(self, problem: Any, device: Device, walk: _Walk) -> float | None:
        """One step of a walk, and what it cannot be below from then on; None: it is over. `found` is what the step passed, if anything."""
        walk.found, waiting = walk.following, [part for part in self.parts if part not in walk.estimates]
        if waiting:
            shared = walk.shared.config
            known = {} if walk.among is None else walk.among.variants.get(shared, {})
            sizes = {part: len(known[part]) if part in known else count(parts(self.config)[part]) for part in waiting}
            part = min(waiting, key=lambda p: sizes[p])
            walk.estimates[part] = self.estimates(problem, shared, device, part, known.get(part))
            walk.least += walk.estimates[part][0].seconds if walk.estimates[part] else 0.0
            return walk.least if walk.estimates[part] else None
        if walk.stream is None:
            estimates = {part: walk.estimates[part] for part in self.parts}
            walk.stream = self._combined(problem, device, walk.shared, estimates)
        walk.following = next(walk.stream, None)
        return None if walk.following is None else walk.following.seconds

    def _combined(
        self, problem: Any, device: Device, shared: Candidate, estimates: Mapping[str, Sequence[Candidate]]
    ) -> Iterator[Candidate]:
        """All combinations of the parts' legal configs with own choices, fastest-predicted first."""
        if self.reject(problem, shared.config, device, "") is not None:
            return
        streams = {part: self._legal(problem, device, part, candidates) for part, candidates in estimates.items()}

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

    def space(self, problem: P, device: Device | None = None, limit: int = 256, fixed: Mapping[str, object] | None = None) -> Space[C]:
        """The first `limit` of `ranked`; and every rejection once, of a config or of a part of one."""
        device = device or Device.default()
        rejected: dict[Any, Rejected] = {}
        for shared in self.shared(fixed):
            reason = self.reject(problem, shared, device, "")
            if reason is not None:
                rejected[shared] = Rejected(shared, reason)
                continue
            for part, variant in ((name, v) for name in self.parts for v in self._part_variants(problem, shared, name)):
                reason = self.reject(problem, variant, device, part)
                if reason is not None:
                    config = getattr(variant, part)
                    rejected[shared, config] = Rejected(config, reason)
        return Space(tuple(itertools.islice(self.ranked(problem, device, fixed), limit)), tuple(rejected.values()))

    def predicted(self, problem: P, device: Device, fixed: Mapping[str, object] | None = None) -> C:
        """The cost model's choice, the first of `ranked`: what a call takes that nothing was measured for.

        Raises:
            ConfigError: no config is legal.
        """
        first = next(self.ranked(problem, device, fixed, Subset(self.measured(fixed), {})), None)
        if first is None:
            reasons = "; ".join(itertools.islice(self.space(problem, device, 0, fixed).reasons(), 3))
            raise ConfigError(f"{self.name}: no legal config for {problem} on {device.name}: {reasons}")
        return first.config

    def digest(self) -> str:
        """Digest of all templates' code: a ranking holds for this code only, whatever its comments, and the names of its files.

        Raises:
            TemplateError: an include that cannot be followed, with file and line.
        """
        return hashlib.sha256("".join(kernel.digest() for kernel in self.kernels).encode()).hexdigest()

    def text_digest(self) -> str:
        """Digest of all templates as they are: while it stays, so does `digest`, which takes longer."""
        return hashlib.sha256("".join(kernel.text_digest() for kernel in self.kernels).encode()).hexdigest()
