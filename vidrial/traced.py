"""Ops inside JAX's transformations (jit, vmap, shard_map; grad where an op says how): one XLA custom call, whose handler is Python.

The call carries the op by name, its problem and its config as text, so that a program exported, or kept in JAX's cache, stays valid in
another process. On a CPU it runs what the op runs there; on a GPU the launches of a `CudaPlan`, on XLA's stream.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from vidrial.host.plan import poison, predicted_plan
from vidrial.runtime import xla
from vidrial.runtime.arrays import CPU, ArraySpec, contiguous_strides, library_of
from vidrial.runtime.inputs import check_inputs
from vidrial.runtime.plan import CudaPlan, Workspace
from vidrial.spec.op import ALIGNMENT, Buffer, Op, gradient_name
from vidrial.spec.registry import reference_of, resolve
from vidrial.tune.codec import decode, encode
from vidrial.tune.pick import choose_config

__all__ = ["Asked", "Traceable", "is_traced", "register", "traced"]

TARGET = "vidrial"  # the custom call's name in XLA's programs
Options: TypeAlias = tuple[tuple[str, Any], ...]  # (name, value), of numbers, bools, strings, None, and tuples of these
Arrays: TypeAlias = Mapping[str, Any]


class Asked(NamedTuple):
    """What traced arrays ask for: an op's problem, and choices of the op's own that the call makes."""

    problem: Any
    fixed: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class Traceable:
    """A function of arrays that JAX may trace, kept at the top level of a module.

    Args:
        op: what runs on a GPU.
        asks: (each input's ArraySpec by name, options by name) -> Asked; refuses what is not served.
        on_cpu: (NumPy arrays by name, options by name) -> NumPy arrays by the names of the op's outputs.
        folds: every input and output has the batch as its first axis, so that vmap may make one larger batch of it. Else vmap calls once
            for each of what it maps over.
        backward: `module:name` of what makes the gradients: it reads inputs and outputs of this one by their names, and `dy`, the gradient of
            the output y; its output `dx` is the gradient of the input x (or `d_y`, `d_x`). "": there are none.
        saving: `module:name` of the same with further outputs that `backward` reads; it runs in place of this one where gradients are wanted.
        reads: what may be given as inputs, by name.
    """

    op: Op
    asks: Callable[[Mapping[str, ArraySpec], Mapping[str, Any]], Asked]
    on_cpu: Callable[[dict[str, Any], dict[str, Any]], Mapping[str, Any]]
    folds: bool = False
    backward: str = ""
    saving: str = ""
    reads: tuple[str, ...] = ()

    @staticmethod
    def of(op: Op) -> Traceable:
        """Of an op with a `problem_of`: on a CPU its kernels run, on the host target.

        Raises:
            ArgumentError: it does not say which problem its inputs ask.
        """
        problem_of = op.problem_of
        if problem_of is None:
            raise ArgumentError(f"{op.name} does not say which problem its inputs ask; give Op(problem_of=...) to call it under JAX's jit")

        def asks(specs: Mapping[str, ArraySpec], options: Mapping[str, Any]) -> Asked:
            problem = problem_of(**specs, **options)
            check_inputs(op, problem, specs)
            return Asked(problem)

        def on_cpu(arrays: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
            specs = {name: _spec(x.shape, DType.of(x.dtype)) for name, x in arrays.items()}
            problem = problem_of(**specs, **options)
            made = {name: poison(b.shape, b.dtype) for name, b in op.outputs(problem).items()}
            bits = {name: x.view(np.uint16) if specs[name].dtype is DType.bfloat16 else x for name, x in arrays.items()}
            predicted_plan(op, problem).run(bits | made)
            return made

        backward, saving = (reference_of(other) if other is not None else "" for other in (op.backward, op.saving))
        return Traceable(op, asks, on_cpu, op.batched, backward, saving, tuple(inspect.signature(problem_of).parameters))


def _spec(shape: tuple[int, ...], dtype: DType) -> ArraySpec:
    """Of an array of XLA's: contiguous, and aligned."""
    return ArraySpec(shape, contiguous_strides(shape), dtype, CPU, "jax", True)


def traced(path: str, arrays: Arrays, **options: Any) -> dict[str, Any]:
    """A traced call: outputs by name.

    Args:
        path: `module:name` of a Traceable, or of an op.
        arrays: JAX's arrays and tracers, by the names of the op's inputs.
        options: numbers, bools, strings, None, and tuples of these, for the Traceable's functions or the op's `problem_of`.

    Raises:
        ArgumentError, ArgumentTypeError, UnsupportedError: the op does not serve such arrays, or an option is none of these.
    """
    asked, given = tuple((name, _plain(name, value)) for name, value in options.items()), _alike(arrays)
    outputs = _outputs(path, _specs(given), asked)
    found = _mappable(path, tuple(given), asked)(*given.values())
    return dict(zip(outputs, found, strict=True))


def _alike(arrays: Arrays) -> dict[str, Any]:
    """The arrays, inside shard_map varying over every axis of the mesh over which one of them does, as their results do.

    A function with a gradient of its own takes them so: JAX then adds up what the copies of a replicated array get.

    Raises:
        ArgumentTypeError: one is no array of JAX or NumPy.
    """
    for name, x in arrays.items():
        if (library := _library(name, x)) not in ("jax", "numpy"):
            raise ArgumentTypeError(f"{name} is a {library} array among those that JAX traces; accepted: arrays of JAX and NumPy")
    wanted = {axis: None for x in arrays.values() for axis in _axes(x)}
    return {name: _varying(x, tuple(axis for axis in wanted if axis not in _axes(x))) for name, x in arrays.items()}


def _library(name: str, x: Any) -> str:
    try:
        return library_of(x)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{name}: {error}") from None


def _plain(name: str, value: Any) -> Any:
    """An option as a program's text holds it."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, tuple):
        return tuple(_plain(name, x) for x in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind = "traced by JAX" if is_traced([value]) else f"a {type(value).__name__}"
    raise ArgumentTypeError(f"{name} is {kind}; accepted of an option under JAX's jit: a number, bool, string, None, or a tuple of these")


def is_traced(arrays: Iterable[object]) -> bool:
    """Whether JAX traces one of these."""
    jax = sys.modules.get("jax")
    return jax is not None and any(isinstance(x, jax.core.Tracer) for x in arrays)


def _specs(arrays: Arrays) -> tuple[tuple[str, ArraySpec], ...]:
    found = []
    for name, x in arrays.items():
        try:
            found.append((name, _spec(tuple(x.shape), DType.of(x.dtype))))
        except ArgumentTypeError as error:
            raise ArgumentTypeError(f"{name}: {error}") from None
        if not all(isinstance(n, int) for n in x.shape):
            raise UnsupportedError(
                f"{name} has shape [{', '.join(map(str, x.shape))}]; accepted under JAX's export: sizes that are numbers"
            )
    return tuple(found)


@lru_cache(maxsize=4096)
def _asked(path: str, specs: tuple[tuple[str, ArraySpec], ...], options: Options) -> Asked:
    return _traceable(path).asks(dict(specs), dict(options))


def _outputs(path: str, specs: tuple[tuple[str, ArraySpec], ...], options: Options) -> Mapping[str, Buffer]:
    return _traceable(path).op.outputs(_asked(path, specs, options).problem)


@cache
def _traceable(path: str) -> Traceable:
    found = resolve(path)
    return found if isinstance(found, Traceable) else Traceable.of(found)


@lru_cache(maxsize=1024)
def _mappable(path: str, names: tuple[str, ...], options: Options) -> Any:
    """The call as a function of its arrays that vmap maps."""
    import jax
    import jax.numpy as jnp
    from jax.custom_batching import custom_vmap

    asked = _traceable(path)

    def forward(*arrays: Any) -> tuple[tuple[Any, ...], Any]:
        given = dict(zip(names, arrays, strict=True))
        if not asked.backward:
            raise UnsupportedError(
                f"{asked.op.name}: its gradient is not computed; wrap the call in a jax.custom_vjp, or in jax.lax.stop_gradient"
            )
        found = traced(asked.saving or path, given, **dict(options))
        return tuple(found[name] for name in _outputs(path, _specs(given), options)), (given, found)

    def backward(saved: Any, gradients: tuple[Any, ...]) -> tuple[Any, ...]:
        # NOTE: JAX gives dicts back in the order of their keys.
        given, found = {name: saved[0][name] for name in names}, saved[1]
        behind = _traceable(asked.backward)
        outputs = _outputs(path, _specs(given), options)
        dy = {gradient_name(name, behind.reads): gradient for name, gradient in zip(outputs, gradients, strict=True)}
        there = {name: x for name, x in {**found, **given, **dy}.items() if name in behind.reads}
        declared = behind.op.inputs(_asked(asked.backward, _specs(there), options).problem)
        made = traced(asked.backward, {name: x for name, x in there.items() if name in declared}, **dict(options))
        return tuple(made[d] if (d := gradient_name(name, made)) in made else jnp.zeros_like(x) for name, x in given.items())

    def one(*arrays: Any) -> tuple[Any, ...]:
        return _call(path, dict(zip(names, arrays, strict=True)), options)

    def several(size: int, mapped: list[bool], *arrays: Any) -> tuple[tuple[Any, ...], tuple[bool, ...]]:
        if not asked.folds:
            one_by_one = [x for x, is_mapped in zip(arrays, mapped, strict=True) if is_mapped]

            def once(slices: list[Any]) -> Any:
                left = iter(slices)
                return call(*(next(left) if is_mapped else x for x, is_mapped in zip(arrays, mapped, strict=True)))

            found = jax.lax.map(once, one_by_one)
            return found, (True,) * len(found)
        whole = [x if is_mapped else jnp.broadcast_to(x, (size, *x.shape)) for x, is_mapped in zip(arrays, mapped, strict=True)]
        found = call(*(x.reshape(size * x.shape[1], *x.shape[2:]) for x in whole))
        once_asked = _outputs(
            path, _specs({name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in zip(names, whole, strict=True)}), options
        )
        return tuple(y.reshape(size, *b.shape) for y, b in zip(found, once_asked.values(), strict=True)), (True,) * len(found)

    call = custom_vmap(one)
    call.def_vmap(several)
    found = jax.custom_vjp(call)
    found.defvjp(forward, backward)
    return found


def _call(path: str, arrays: dict[str, Any], options: Options) -> tuple[Any, ...]:
    """The custom call. Where the process has a GPU JAX lowers both forms, and takes that of the platform which the program is for."""
    import jax
    import jax.numpy as jnp

    specs = _specs(arrays)
    outputs = _outputs(path, specs, options)
    shapes = [jax.ShapeDtypeStruct(b.shape, getattr(jnp, b.dtype.label)) for b in outputs.values()]
    if all(0 in s.shape for s in shapes):
        return tuple(_varying(jnp.zeros(s.shape, s.dtype), _axes(next(iter(arrays.values())))) for s in shapes)
    register()

    def on_cpu(*given: Any) -> tuple[Any, ...]:
        asked = json.dumps({"call": path, "inputs": list(arrays), "outputs": list(outputs), "options": dict(options)})
        return tuple(jax.ffi.ffi_call(TARGET, shapes)(*given, asked=asked))

    def on_gpu(*given: Any) -> tuple[Any, ...]:
        asked, size = _on_gpu(path, specs, options, Device.current(_gpus()[0]))
        return tuple(jax.ffi.ffi_call(TARGET, [*shapes, jax.ShapeDtypeStruct((size,), jnp.uint8)])(*given, asked=asked)[:-1])

    given = tuple(arrays.values())
    found: tuple[Any, ...] = jax.lax.platform_dependent(*given, cpu=on_cpu, cuda=on_gpu) if _gpus() else on_cpu(*given)
    # JAX takes the results for the same everywhere.
    return tuple(_varying(y, _axes(given[0])) for y in found)


def _on_gpu(path: str, specs: tuple[tuple[str, ArraySpec], ...], options: Options, device: Device) -> tuple[str, int]:
    """What a call carries on that GPU, and the bytes of its workspace, with what aligns it."""
    op, (problem, fixed) = _traceable(path).op, _asked(path, specs, options)
    config = choose_config(op, problem, device, fixed).config
    names = [*dict(specs), *op.outputs(problem)]
    asked = {"op": reference_of(op), "problem": encode(problem), "config": encode(config), "names": names}
    return json.dumps(asked, sort_keys=True), Workspace(op, problem, config).bytes + ALIGNMENT


def _axes(x: Any) -> tuple[str, ...]:
    """Inside shard_map: the axes of the mesh over which an array differs."""
    import jax

    # NOTE: later versions of JAX call it by other names.
    seen: Any = jax.typeof(x) if hasattr(jax, "typeof") else None
    return tuple(seen.manual_axis_type.varying if hasattr(seen, "manual_axis_type") else getattr(seen, "vma", ()))


def _varying(x: Any, axes: tuple[str, ...]) -> Any:
    """The array, differing over these axes, too."""
    import jax

    if not axes:
        return x
    return jax.lax.pcast(x, axes, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(x, axes)


@cache
def _gpus() -> list[int]:
    """CUDA indices of JAX's GPUs."""
    import jax

    try:
        return [device.local_hardware_id for device in jax.local_devices(backend="cuda")]
    except RuntimeError:
        return []


@cache
def register() -> None:
    """Make the custom call known to JAX in this process: what a program needs that another process exported. Ops that are traced do it."""
    xla.register(TARGET, "cpu", _run_on_cpu)
    xla.register(TARGET, "CUDA", _run_on_gpu, _load)


@lru_cache(maxsize=4096)
def _read(asked: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(asked)
    return found


def _run_on_cpu(call: xla.Call) -> None:
    asked = _read(call.attribute)
    views = dict(zip([*asked["inputs"], *asked["outputs"]], map(_view, call.operands()), strict=True))
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in asked["options"].items()}
    made = _traceable(asked["call"]).on_cpu({name: views[name] for name in asked["inputs"]}, options)
    for name in asked["outputs"]:
        views[name].reshape(-1).view(np.uint8)[...] = np.ascontiguousarray(made[name]).reshape(-1).view(np.uint8)


def _view(x: xla.Operand) -> Any:
    """The array in NumPy, where it lies."""
    from jax.numpy import dtype  # NOTE: of ml_dtypes, too, which NumPy's own names lack

    size = math.prod(x.shape) * x.dtype.bytes
    if not size:  # XLA gives it no address
        return np.empty(x.shape, dtype(x.dtype.label))
    memory = memoryview((ctypes.c_char * size).from_address(x.pointer))
    return np.frombuffer(memory, dtype(x.dtype.label)).reshape(x.shape)


@lru_cache(maxsize=4096)
def _plan(asked: bytes, device: int) -> tuple[CudaPlan, tuple[str, ...]]:
    told = _read(asked)
    op: Op = resolve(told["op"])
    return CudaPlan(op, decode(op.problem, told["problem"]), decode(op.config, told["config"]), device), tuple(told["names"])


def _place(call: xla.Call) -> int:
    if (device := call.device) is not None:
        return device
    if len(_gpus()) != 1:
        raise UnsupportedError(
            "this version of JAX does not say which GPU a call is for; accepted: one GPU (CUDA_VISIBLE_DEVICES), or a later version"
        )
    return _gpus()[0]


def _load(call: xla.Call) -> None:
    _plan(call.attribute, _place(call))


def _run_on_gpu(call: xla.Call) -> None:
    plan, names = _plan(call.attribute, _place(call))
    *pointers, space = call.pointers()
    plan.run(dict(zip(names, pointers, strict=True)), -(-space // ALIGNMENT) * ALIGNMENT, call.stream)
