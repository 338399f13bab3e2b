"""An op: named arrays in, named arrays out, by one or more kernels in sequence. It is what is called, swept and ranked."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import weakref
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.errors import ArgumentError, ConfigError, DescriptionError
from vidrial.spec.authored import guarded, guarded_rules, mapping_fault, of_type, sequence_fault
from vidrial.spec.choices import Axes, check_choices, check_config_fields, combinations, configs, describe, own_axes, parts
from vidrial.spec.fields import C, P, check_record
from vidrial.spec.kernel import Kernel
from vidrial.spec.refusals import furthest
from vidrial.spec.space import Candidate, Space, Stream, Subset
from vidrial.spec.survey import Survey, seconds_of

ALIGNMENT = 256  # bytes; of every workspace buffer
GIB = 1 << 30
Arrays: TypeAlias = Mapping[str, NDArray[Any]]  # by name; bfloat16 as uint16 bits


_NUMBERS = itertools.count(1)
_OPS: weakref.WeakValueDictionary[str, Op] = weakref.WeakValueDictionary()


def op_of(key: str) -> Op:
    """The op of that `Op.key`: of several of one name in a process each has its own."""
    return _OPS[key]


def gradient_name(name: str, known: Container[str]) -> str:
    """What a backward op calls the gradient of x: `d_x` where it knows that name, else `dx`."""
    return f"d_{name}" if f"d_{name}" in known else f"d{name}"


def _no_buffers(problem: object, config: object) -> Mapping[str, Buffer]:
    return {}


def _no_rules(problem: object, config: object) -> Iterable[tuple[bool, str]]:
    return ()


DECLARED = "__vidrial_declared__"


def _declared(function: Callable[..., Any], fault: Callable[[Any, Any], str | None]) -> Callable[..., Any]:
    """An op's `sample` or `reference`, which gives what the op's buffers declare."""

    @functools.wraps(function)
    def call(problem: Any, *arguments: Any, **keywords: Any) -> Any:
        found = function(problem, *arguments, **keywords)
        if (said := fault(problem, found)) is not None:
            raise DescriptionError(said)
        return found

    setattr(call, DECLARED, True)
    return call


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

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, DType):
            raise DescriptionError(
                f"Buffer of dtype {self.dtype!r}; give a DType: {', '.join(f'DType.{name}' for name in DType.__members__)}"
            )
        # The exact type comes first: to ask the protocol takes microseconds, and a space asks for thousands of buffers.
        if not isinstance(self.shape, tuple) or not all(type(n) is int or isinstance(n, SupportsIndex) for n in self.shape):
            raise DescriptionError(f"Buffer of shape {self.shape!r}; give a tuple of integers, (n,) for one axis")

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
        problem_of: (each input's ArraySpec and options, by name) -> the problem of a call (`vidrial.call_op`). Its annotations tell torch's
            dispatcher which are arrays and of what types the options are (docs/torch.md).
        backward: the op that makes the gradients: of its inputs `x` is one of this op's inputs or outputs, `dy` the gradient of the output
            y; its output `dx` is the gradient of the input x (or `d_y`, `d_x`). Its `problem_of` takes the same options. None: no gradients.
        saving: this op with further outputs that `backward` reads; it runs in place of this one where gradients are wanted.
        batched: axis 0 of every input and output is a batch, whose entries know nothing of each other: what is mapped over joins it.
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
    backward: Op | None = None
    saving: Op | None = None
    batched: bool = False
    unmeasured: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    key: str = field(init=False, default="")

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
        backward: Op | None = None,
        batched: bool = False,
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
            backward=backward,
            batched=batched,
        )

    def stages_of(self, problem: P, config: C, part: str | None) -> Sequence[Stage]:
        """The stages of a part, or of no part (""), or all (None)."""
        return [stage for stage in self.stages(problem, config) if part is None or stage.part == part]

    def reject(self, problem: P, config: C, device: Device, part: str | None = None) -> str | None:
        """The reason of the first rule that the config breaks, or None: the op's own rules first, then the stages'.

        With `part`, only the stages of that part are asked.
        """
        for holds, reason in self.rules(problem, config):
            if not holds:
                return reason
        for stage in self.stages_of(problem, config, part):
            broken = stage.kernel.reject(stage.problem, stage.config, device)
            if broken is not None:
                return broken if stage.kernel.name == self.name else f"{stage.kernel.name}: {broken}"
        return self.too_large(problem, config, device)

    def workspace_bytes(self, problem: P, config: C) -> int:
        """Size of the workspace that a call takes beside its inputs and outputs."""
        return sum(buffer.bytes for buffer in self.workspace(problem, config).values())

    def array_bytes(self, problem: P) -> int:
        """Size of a call's inputs and outputs."""
        return sum(buffer.bytes for buffer in (*self.inputs(problem).values(), *self.outputs(problem).values()))

    def too_large(self, problem: P, config: C, device: Device) -> str | None:
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
        asked = self._permitted(problem, config, device, part)
        return None if asked is None else self.predict_stages(asked, device)

    def _permitted(self, problem: P, config: C, device: Device, part: str | None) -> Sequence[Stage] | None:
        """The stages of a part, or None if a rule of theirs is broken."""
        # NOTE: loops, not generators: thousands of configs are asked. The op's own rules were asked before a part varies.
        if not part:
            for holds, _ in self.rules(problem, config):
                if not holds:
                    return None
        asked = self.stages_of(problem, config, part)
        for stage in asked:
            if stage.kernel.broken_rule(stage.problem, stage.config, device) is not None:
                return None
        return asked

    def predict_stages(self, stages: Iterable[Stage], device: Device) -> float | None:
        seconds = 0.0
        for stage in stages:
            one = seconds_of(stage.kernel, stage.problem, stage.config, device)
            if one is None:
                return None
            seconds += one
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
        """Refuse a problem that the op's own rules refuse whatever its choices, or whose sizes no kernel's arguments hold.

        Raises:
            ConfigError: with the rules' reason. ArgumentError: with the argument and its type.
        """
        reasons = (self.reject(problem, shared, device, "") for shared in self.shared())
        refused = list(itertools.takewhile(lambda reason: reason is not None, reasons))
        if len(refused) == math.prod(map(len, self.own_axes().values())):
            raise self._none_legal(problem, device, refused)
        config = next(shared for shared in self.shared() if self.reject(problem, shared, device, "") is None)
        self._check_stages(problem, config)
        self._check_arrays(problem, config)
        for stage in self.stages(problem, config):
            stage.kernel.grid(stage.problem, stage.config)
            stage.kernel.pack(stage.problem, stage.config)

    def _check_arrays(self, problem: P, config: C) -> None:
        """Refuse arrays that two declare, and outputs that no launch writes."""
        groups = {"inputs": self.inputs(problem), "outputs": self.outputs(problem), "workspace": self.workspace(problem, config)}
        for (first, one), (second, other) in itertools.combinations(groups.items(), 2):
            if both := sorted(one.keys() & other.keys()):
                raise DescriptionError(f"op {self.name}: {', '.join(both)} is among its {first} and its {second}; give each array one name")
        stages = self.stages(problem, config)
        taken = {name for stage in stages for name in (*stage.kernel.args.pointers, *stage.kernel.args.maps)}
        if stages and (lost := sorted(groups["outputs"].keys() - taken)):
            raise DescriptionError(
                f"op {self.name}: outputs gives {', '.join(lost)}, which no kernel takes: their pointers are {', '.join(sorted(taken))}; "
                "an array and its pointer have one name"
            )

    def _none_legal(self, problem: P, device: Device, reasons: Iterable[str | None]) -> ConfigError:
        """What is wrong with a problem that no config serves: the reason, if it is one."""
        named = {kernel.name for kernel in self.kernels}
        said = dict.fromkeys(
            rest if (split := str(reason).partition(": "))[0] in named and (rest := split[2]) else str(reason) for reason in reasons
        )
        if len(said) == 1:
            return ConfigError(next(iter(said)))
        return ConfigError(f"{self.name}: no legal config for {problem} on {device.name}: {'; '.join(itertools.islice(said, 3))}")

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
        owner = f"op {self.name}"
        check_record(f"{owner}: problem", self.problem)
        check_record(f"{owner}: config", self.config)
        check_config_fields(owner, self.config)
        if not isinstance(self.kernels, tuple) or not all(isinstance(kernel, Kernel) for kernel in self.kernels) or not self.kernels:
            raise DescriptionError(f"{owner}: kernels is {self.kernels!r}; give a tuple of Kernels, (kernel,) if it is one")
        names = [kernel.name for kernel in self.kernels]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DescriptionError(f"{owner}: two kernels are named {', '.join(twice)}; give each a name of its own")
        buffers, arrays = mapping_fault("Buffer", Buffer), mapping_fault("NumPy array", np.ndarray)
        faults = {
            "stages": sequence_fault(Stage),
            "inputs": buffers,
            "outputs": buffers,
            "workspace": buffers,
            "sample": arrays,
            "reference": arrays,
            "check": of_type(Check, call="Check(relative, max_error, relative_bound, max_error_bound)"),
            "small": of_type(self.problem),
            "example": of_type(self.problem),
        }
        for name, fault in faults.items():
            object.__setattr__(self, name, guarded(getattr(self, name), owner, name, fault))
        object.__setattr__(self, "rules", guarded_rules(self.rules, owner, "rules"))
        object.__setattr__(self, "key", f"{self.name}#{next(_NUMBERS)}")
        _OPS[self.key] = self
        if not getattr(self.sample, DECLARED, False):
            object.__setattr__(self, "sample", _declared(self.sample, self._sample_fault))
        if not getattr(self.reference, DECLARED, False):
            object.__setattr__(self, "reference", _declared(self.reference, self._reference_fault))

    def _sample_fault(self, problem: P, found: Mapping[str, NDArray[Any]]) -> str | None:
        declared = self.inputs(problem)
        unlike = sorted({name for name, buffer in declared.items() if not buffer.optional} - found.keys()) + sorted(found.keys() - declared)
        if unlike:
            return f"op {self.name}: sample() gives {', '.join(found) or 'nothing'}; inputs declares {', '.join(declared) or 'nothing'}"
        for name, array in found.items():
            buffer = declared[name]
            label = "uint16" if buffer.dtype is DType.bfloat16 else buffer.dtype.label
            # What no call takes at all is refused by whoever runs it.
            if array.dtype.name != label and array.dtype.name in (*DType.__members__, "uint16"):
                return f"op {self.name}: sample() gives {name} as {array.dtype}; inputs declares {buffer.dtype}, so give {label}: DType.round makes it"
            if array.shape != buffer.shape:
                return f"op {self.name}: sample() gives {name} of shape {list(array.shape)}; inputs declares {list(buffer.shape)}"
        return None

    def _reference_fault(self, problem: P, found: Mapping[str, NDArray[Any]]) -> str | None:
        missing = sorted(self.outputs(problem).keys() - found.keys())
        return (
            f"op {self.name}: reference() gives {', '.join(found) or 'nothing'}; its outputs have {', '.join(missing)}" if missing else None
        )

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
        return combinations(self.config, self.own_axes(fixed))

    def own_axes(self, fixed: Mapping[str, object] | None = None) -> Axes:
        """The values of the config's own choices; `fixed` choices have one alone."""
        return {**own_axes(self.config), **{name: (value,) for name, value in (fixed or {}).items()}}

    def measured(self, fixed: Mapping[str, object] | None = None) -> tuple[C, ...]:
        """As `shared`, without what is unmeasured, unless it is asked for."""
        left_out = {name: values for name, values in self.unmeasured.items() if name not in (fixed or {})}
        return tuple(c for c in self.shared(fixed) if all(getattr(c, name) not in values for name, values in left_out.items()))

    def ranked_for_calls(self, problem: P, device: Device, fixed: Mapping[str, object] | None = None) -> Iterator[Candidate[C]]:
        """`ranked`, without what is unmeasured, unless it is asked for."""
        return self.ranked(problem, device, fixed, Subset(self.measured(fixed), {}) if self.unmeasured else None)

    def launches(self, problem: P, config: C, part: str) -> bool:
        """Whether a part of a config launches anything for a problem."""
        return any(stage.part == part for stage in self.stages(problem, config))

    def _variants(self, fixed: Mapping[str, object] | None) -> Iterator[tuple[C, dict[str, list[C]]]]:
        """Every combination of own choices, and with it, by part, that combination with each of the part's configs."""
        for shared in self.shared(fixed):
            by_part = {part: configs(self.config_type(part)) for part in self.parts}
            yield shared, {part: [dataclasses.replace(shared, **{part: one}) for one in every] for part, every in by_part.items()}

    def estimates(self, problem: P, shared: C, device: Device, part: str, variants: Iterable[C] | None = None) -> list[Candidate[C]]:
        """What the rules leave of `variants`, which are `shared` with other configs of a part (by default with each), by the part's own
        predicted time."""
        if variants is None:
            found_ones = Survey(self, problem, device).estimates(shared, part)
            return [Candidate(dataclasses.replace(shared, **{part: c.config}), c.seconds) for c in found_ones]
        every = variants if self.launches(problem, shared, part) else (shared,)
        found = ((v, self.estimate(problem, v, device, part)) for v in every)
        return sorted((Candidate(v, seconds) for v, seconds in found if seconds is not None), key=lambda c: c.seconds)

    def ranked_parts(self, problem: P, shared: C, device: Device) -> dict[str, Stream[Candidate[Any]]]:
        """For one combination of own choices: each part's legal configs, fastest-predicted first, with the part's own time.

        Stages run one after another, so parts rank on their own.
        """
        survey = Survey(self, problem, device)
        return {part: survey.legal(shared, part, survey.estimates(shared, part)) for part in self.parts}

    def ranked(
        self, problem: P, device: Device, fixed: Mapping[str, object] | None = None, among: Subset[C] | None = None
    ) -> Iterator[Candidate[C]]:
        """The legal configs, fastest-predicted first, ties in order of declaration; tiles are asked of those that come first alone.

        `fixed` holds choices of the op's own (not of its parts) at one value: name -> value. `among`: those that are looked at, in place of all.
        """
        return Survey(self, problem, device, fixed).ranked(among)

    def space(self, problem: P, device: Device | None = None, limit: int = 256, fixed: Mapping[str, object] | None = None) -> Space[C]:
        """The first `limit` of `ranked`; and every rejection once, of a config or of a part of one."""
        survey = Survey(self, problem, device or Device.default(), fixed, exact=True)
        rejected = tuple(survey.rejected())
        return Space(tuple(itertools.islice(survey.ranked(), limit)), rejected)

    def predicted(self, problem: P, device: Device, fixed: Mapping[str, object] | None = None) -> C:
        """The cost model's choice, the first of `ranked_for_calls`: what a call takes that nothing was measured for.

        Raises:
            ConfigError: no config is legal.
        """
        first = next(self.ranked_for_calls(problem, device, fixed), None)
        if first is None:
            reasons = list(self.space(problem, device, 0, fixed).reasons())
            if len(reasons) > 1:
                reasons = furthest(self, problem, device, self._variants(fixed))
            raise self._none_legal(problem, device, reasons)
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
