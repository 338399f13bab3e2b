"""Calling an op on arrays: which target, which config, and the launches on the caller's stream."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple, TypeAlias, cast, overload

import numpy as np

from vidrial.build.cubins import build_many
from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.errors import ArgumentError, ArgumentTypeError, CompileError, ConfigError, OutOfMemoryError, TracedError, UnsupportedError
from vidrial.host.plan import HostPlan, predicted_plan
from vidrial.runtime.arrays import (
    CPU,
    A,
    Array,
    ArraySpec,
    as_array,
    contiguous,
    current_stream,
    empty,
    free_bytes,
    release,
    scratch,
    signature_of,
    wrap_output,
)
from vidrial.runtime.inputs import check_inputs, layout_fault
from vidrial.runtime.plan import CudaPlan
from vidrial.runtime.torch_ops import Run, bind, call_torch_op, called_when_traced, declare, dispatched, dispatching
from vidrial.settings import TARGETS, Settings
from vidrial.spec.choices import describe, own_axes
from vidrial.spec.fields import C, P
from vidrial.spec.op import Op, op_of
from vidrial.spec.registry import reference_of
from vidrial.traced import traced
from vidrial.tune.pick import choose_config
from vidrial.tune.ranking import generation, log

_target: list[str] = []


class use_target:
    """From now on ops run on `target`: `cuda`, or `host` (the kernels themselves on the CPU, slowly, for correctness).

    As a context manager, until the end of the block.

    Raises:
        ArgumentError: the target is not known.
    """

    def __init__(self, target: str) -> None:
        self._before = list(_target)
        _target[:] = [_checked(target)]

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        _target[:] = self._before


def current_target(target: str | None = None) -> str:
    """The target of a call: its argument, else that of `use_target`, else VIDRIAL_TARGET as the process began with it, else `cuda`."""
    if target is not None:
        return _checked(target)
    return _target[0] if _target else _environment_target()


@cache
def _environment_target() -> str:
    # Once: to look a variable up takes a tenth of a launch.
    return Settings.read_target()


def _checked(target: str) -> str:
    if target not in TARGETS:
        raise ArgumentError(f"target {target!r} is not known; accepted: {', '.join(TARGETS)}")
    return target


def cuda_plan(op: Op[P, C], problem: P, index: int, fixed: tuple[tuple[str, object], ...] = ()) -> CudaPlan:
    """The plan of the config that a call without a config takes, on CUDA device `index`; `fixed` (name, value) choices are kept.

    It is remembered until the rankings change or compiling is frozen; binaries stay loaded.

    Raises:
        FrozenError: it needs a binary that may not be compiled (`freeze`) or loaded (in a CUDA-graph capture) now.
    """
    return _cuda_plan(op, cast(Hashable, problem), index, fixed, generation())


@lru_cache(maxsize=4096)
def _cuda_plan(op: Op, problem: Any, index: int, fixed: tuple[tuple[str, object], ...], generation: int) -> CudaPlan:
    return _plan(op, problem, index, fixed, Device.current(index))


def _plan(op: Op, problem: Any, index: int, fixed: tuple[tuple[str, object], ...], device: Device) -> CudaPlan:
    plan = CudaPlan(op, problem, choose_config(op, problem, device, fixed).config, index)
    plan.smaller = partial(_smaller, op, problem, index, fixed, plan.config)
    return plan


def _smaller(op: Op, problem: Any, index: int, fixed: tuple[tuple[str, object], ...], config: object, limit: int) -> CudaPlan:
    """The plan that is chosen on a GPU with room for `limit` bytes of workspace beside inputs and outputs.

    Raises:
        OutOfMemoryError: there is none.
    """
    try:
        found = _plan(op, problem, index, fixed, replace(Device.current(index), memory_bytes=op.array_bytes(problem) + limit))
    except ConfigError as error:
        raise OutOfMemoryError(f"{op.name}: GPU {index} has {limit} bytes left for the workspace: {error}") from error
    log.warning(
        "%s: %s in place of %s, whose %.1f GiB of workspace GPU %d has not left",
        op.name,
        describe(found.config),
        describe(config),
        op.workspace_bytes(problem, config) / 2**30,
        index,
    )
    return found


class CachedPlan:
    """`cuda_plan` for an op's wrapper that keeps one of these for each problem it meets: to find the plan hashes no problem then."""

    def __init__(self, op: Op[P, C], problem: P, index: int, fixed: tuple[tuple[str, object], ...] = ()) -> None:
        self._asked = op, problem, index, fixed
        self._known: tuple[int, CudaPlan] | None = None

    def plan(self) -> CudaPlan:
        """The plan as it stands now.

        Raises:
            FrozenError: that of `cuda_plan`.
        """
        now, known = generation(), self._known
        if known is None or known[0] != now:
            self._known = known = now, cuda_plan(*self._asked)
        return known[1]


def prepare(op: Op[P, C], problem: P, index: int | None = None, **fixed: object) -> C:
    """Compile and load now what calls of this problem on CUDA device `index` (by default the current one) will run.

    A call of it, also inside a CUDA-graph capture or after `freeze`, then compiles and loads nothing. `fixed`: choices of the op's own
    that the calls will name (`chunk=512`).

    Returns:
        The config that such calls take.

    Raises:
        ArgumentError: a name in `fixed` is no choice of the op's. ToolchainError, CompileError, LaunchError: there is no GPU, or it cannot be
            built.
    """
    _check_own(op, fixed)
    if index is None:
        Device.current()  # without a GPU, a sentence that says what to do, not CUDA's error
        from cupy.cuda import runtime

        index = int(runtime.getDevice())
    return cast(C, cuda_plan(op, problem, index, tuple(fixed.items())).config)


def prepare_many(op: Op[P, C], problems: Iterable[P], index: int | None = None, **fixed: object) -> list[C]:
    """`prepare` for several problems, the lengths that a service will meet, say: what they need compiles side by side, in processes.

    Returns:
        The config of each.

    Raises:
        Those of `prepare`. ArgumentTypeError: `problems` is one problem.
    """
    _check_own(op, fixed)
    if not isinstance(problems, Iterable):
        raise ArgumentTypeError(f"problems is a {type(problems).__name__}; accepted: several of them, as [problem]")
    asked, device, choices = list(problems), Device.current(index), tuple(fixed.items())
    sources = {}
    for problem in asked:
        for stage in op.stages(problem, choose_config(op, problem, device, choices).config):
            sources[stage.binary] = stage.kernel.source(stage.problem, stage.config), describe(stage.config)
    for _, built in build_many(sources, device.arch):
        if isinstance(built, CompileError):
            raise built
    return [prepare(op, problem, index, **fixed) for problem in asked]


def _check_own(op: Op[P, C], fixed: Mapping[str, object]) -> None:
    """Refuse what is no choice of the op's own."""
    own = own_axes(op.config)
    unknown = [name for name in fixed if name not in own]
    if unknown:
        raise ArgumentError(f"{op.name} has no choice of its own named {', '.join(unknown)}; accepted: {', '.join(own) or 'none'}")


def run(plan: CudaPlan, pointers: dict[str, int], like: A, library: str) -> dict[str, A]:
    """Run an op on its library's current stream; its outputs, newly made, as the library's own arrays.

    Args:
        pointers: addresses of the inputs on the plan's GPU, by name; those of the outputs are added.
        like: one of the inputs. library: whose it is.

    Where memory does not suffice for the workspace, another config is taken that needs less, and the log says so.

    Raises:
        OutOfMemoryError: no config needs so little. LaunchError: the driver refuses a launch.
    """
    device = plan.index
    # NOTE: annotated, not made as dict[str, Any](): that makes a new type at every call.
    outputs: dict[str, Any] = {}
    for name, buffer in plan.outputs.items():
        pointers[name], outputs[name] = empty(buffer.shape, buffer.dtype, like, library, device)
    stream, size = current_stream(library, device), plan.workspace.bytes
    with plan.on_device():
        try:
            workspace, _kept = scratch(size, library, device, stream) if size else (0, None)
        except OutOfMemoryError:
            if plan.smaller is None:
                raise
            outputs.clear()
            return run(plan.smaller(min(size - 1, free_bytes(library, device))), pointers, like, library)
        try:
            plan.enqueue(pointers, workspace, stream)
        finally:
            if size:
                release(library, workspace)
    return (
        outputs if library == "torch" else {name: wrap_output(x, plan.outputs[name].dtype, library, device) for name, x in outputs.items()}
    )


def run_on_host(op: Op[P, C], problem: P, inputs: Mapping[str, Array[A]], plan: HostPlan[P, C]) -> dict[str, A]:
    """Run an op's kernels on CPU arrays; its outputs, newly made."""
    like, outputs = next(iter(inputs.values())), op.outputs(problem)
    made = {name: empty(buffer.shape, buffer.dtype, like.owner, like.library, CPU)[1] for name, buffer in outputs.items()}
    shared = {name: bits(array.owner, array.dtype, array.library) for name, array in inputs.items()}
    plan.run(shared | {name: bits(x, outputs[name].dtype, like.library) for name, x in made.items()})
    return {name: wrap_output(x, outputs[name].dtype, like.library, CPU) for name, x in made.items()}


def bits(owner: Any, dtype: DType, library: str) -> np.ndarray:
    """A CPU array as NumPy's own, sharing its memory; bfloat16 as uint16."""
    half = dtype is DType.bfloat16
    if library == "torch":
        import torch

        tensor = owner.detach()
        shared: np.ndarray = tensor.view(torch.uint16).numpy() if half else tensor.numpy()
    else:
        shared = owner.view(np.uint16) if half else owner
    return shared


@overload
def apply(op: Op[P, C], problem: P, inputs: Mapping[str, Array[A]], target: str | None = None, **fixed: object) -> dict[str, A]: ...


@overload
def apply(op: Op[P, C], problem: P, inputs: Mapping[str, A | None], target: str | None = None, **fixed: object) -> dict[str, A]: ...


def apply(op: Op[P, C], problem: P, inputs: Mapping[str, Any], target: str | None = None, **fixed: object) -> dict[str, Any]:
    """Run an op where its inputs lie, with the config that a call without a config takes: on their GPU, or, CPU arrays, its kernels on the CPU.

    `inputs`: by name, as the op declares them for this problem: arrays of one library, or what `as_array` made of them; nothing is copied.
    `fixed`: choices of the op's own that the config shall make (`chunk=512`).

    Returns:
        The outputs by name, arrays of the inputs' library.

    Raises:
        ArgumentError: a name in `fixed` is no choice of the op's; an input is missing, not known, or of another shape, strides or
            alignment. ArgumentTypeError: its dtype, library or device is another, or target `host` and it is on a GPU.
        UnsupportedError: it requires a gradient, or is otherwise more than its memory (see `as_array`).
        CompileError, LaunchError, ToolchainError: it could not be built or run.
    """
    if fixed:
        _check_own(op, fixed)
    given = _without_none(inputs)
    key, pointers = signature_of(given.values(), given)
    asked = _request(op, cast(Hashable, problem), tuple(given), key, current_target(target), tuple(fixed.items()))
    return _run(op, given, pointers, asked)


def call_op(op: Op[P, C], inputs: Mapping[str, A | None], target: str | None = None, **options: Hashable) -> dict[str, A]:
    """`apply` for the problem that `op.problem_of` makes of the inputs' facts and `options`; inputs that lie otherwise are copied first.

    A wrapper in one line, `call_op(op, {"x": x})["y"]`: what a call asks is worked out once per call signature. In torch it may be compiled,
    exported, mapped and cast by autocast, and has gradients where the op has a `backward` (docs/torch.md).

    Returns, raises: as `apply`.
    """
    given = _without_none(inputs)
    if given and (dispatching(next(iter(given.values()))) or (op.backward is not None and _records(given))):
        return call_torch_op(_in_torch(op.key), given, target, options)
    try:
        return _call_op(op, given, target, **options)
    except TracedError:
        return traced(reference_of(op), given, **options)
    except UnsupportedError:
        if not dispatched(given.values()):
            raise
    return call_torch_op(_in_torch(op.key), given, target, options)


def _records(given: Mapping[str, Any]) -> bool:
    """Whether torch's autograd shall record a call with these arrays."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in given.values())


@called_when_traced
def _in_torch(key: str) -> str:
    return declare(op_of(key), _compute)


def torch_op(op: Op[P, C], run: Run | None = None) -> str:
    """Tell torch of an op, now or as soon as it is imported: `torch.ops.vidrial.<name>`. Exported programs that call it load from then on.

    `call_op` tells it at the first call that needs it.

    Args:
        run: (op, tensors as `problem_of` orders them, options likewise, target) -> outputs by name, on tensors that hold values, for the op, its
            `backward` and its `saving`; by default what `call_op` does.

    Returns:
        What `call_torch_op` knows it by.

    Raises:
        ArgumentError: the op does not say how its problem is made of tensors (`problem_of`), or an option is of a type that torch has none for.
    """
    return declare(op, run or _compute)


def _compute(op: Op, *args: Any) -> dict[str, Any]:
    inputs, options = bind(op, args)
    return _call_op(op, inputs, **options)


def _call_op(op: Op[P, C], given: dict[str, Any], target: str | None = None, **options: Hashable) -> dict[str, Any]:
    key, pointers = signature_of(given.values(), given)
    place, asked_options = current_target(target), tuple(options.items())
    try:
        asked = _request_of(op, tuple(given), key, place, asked_options)
    except TypeError as error:
        unhashable = [name for name, value in asked_options if not isinstance(value, Hashable)]
        if not unhashable:
            raise
        raise ArgumentTypeError(f"{op.name}: {', '.join(unhashable)} cannot be looked up; accepted: values that can be hashed") from error
    if asked.copied:
        # The problem may name the strides: it is made anew.
        given |= {name: contiguous(as_array(given[name], name)) for name in asked.copied}
        key, pointers = signature_of(given.values(), given)
        asked = _request(op, _problem_of(op, tuple(given), key, asked_options), tuple(given), key, place, ())
    return _run(op, given, pointers, asked)


def _without_none(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in inputs.items() if x is not None}


class _Request(NamedTuple):
    """What a call of such inputs runs: its problem, whose arrays they are, its plan (None on the host target), and which are to be copied."""

    problem: Any
    fixed: tuple[tuple[str, object], ...]
    library: str
    planned: CachedPlan | None
    copied: tuple[str, ...] = ()


def _run(op: Op, given: dict[str, Any], pointers: dict[str, int], asked: _Request) -> dict[str, Any]:
    if asked.planned is None:
        arrays = {name: x if type(x) is Array else as_array(x, name) for name, x in given.items()}
        return run_on_host(op, asked.problem, arrays, predicted_plan(op, asked.problem, asked.fixed))
    like = next(iter(given.values()))
    return run(asked.planned.plan(), pointers, like.owner if type(like) is Array else like, asked.library)


Key: TypeAlias = tuple[tuple[Any, ...], ...]  # of `signature_of`


@lru_cache(maxsize=4096)
def _request(op: Op, problem: Any, names: tuple[str, ...], key: Key, target: str, fixed: tuple[tuple[str, object], ...]) -> _Request:
    """What a call for this problem runs; refuses what the op does not declare. This is the one look-up of the warm path."""
    return _planned(op, problem, check_inputs(op, problem, _specs(names, key)), target, fixed)


@lru_cache(maxsize=4096)
def _request_of(op: Op, names: tuple[str, ...], key: Key, target: str, options: tuple[tuple[str, Hashable], ...]) -> _Request:
    """The same where the problem follows from the inputs."""
    problem, specs = _problem_of(op, names, key, options), _specs(names, key)
    asked = _planned(op, problem, check_inputs(op, problem, specs, layout=False), target, ())
    declared = op.inputs(problem)
    return asked._replace(copied=tuple(name for name, spec in specs.items() if layout_fault(spec, declared[name])))


def _problem_of(op: Op, names: tuple[str, ...], key: Key, options: tuple[tuple[str, Hashable], ...]) -> Any:
    if op.problem_of is None:
        raise ArgumentError(f"{op.name} does not say which problem its inputs ask; give Op(problem_of=...), or call vidrial.apply")
    specs, accepted = _specs(names, key), inspect.signature(op.problem_of)
    try:
        accepted.bind(**specs, **dict(options))
    except TypeError as error:
        raise ArgumentError(f"{op.name}: {error}; accepted: {', '.join(accepted.parameters)}") from None
    return op.problem_of(**specs, **dict(options))


def _specs(names: tuple[str, ...], key: Key) -> dict[str, ArraySpec]:
    return {name: ArraySpec.of(seen, name) for name, seen in zip(names, key, strict=True)}


def _planned(op: Op, problem: Any, first: ArraySpec, target: str, fixed: tuple[tuple[str, object], ...]) -> _Request:
    if first.device == CPU:
        return _Request(problem, fixed, first.library, None)
    if target == "host":
        raise ArgumentTypeError(
            f"the inputs are on CUDA device {first.device}; the host target takes NumPy arrays and CPU tensors: move them with .cpu()"
        )
    return _Request(problem, fixed, first.library, CachedPlan(op, problem, first.device, fixed))
