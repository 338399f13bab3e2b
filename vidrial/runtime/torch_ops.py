"""Ops in torch's dispatcher, as `torch.ops.vidrial.<op>`: what torch.compile, export, vmap, autocast and meta tensors meet.

Made from what an op declares: the schema from `problem_of`, the shapes of its results from `outputs`, its gradients from `backward`. Plain tensors
in eager mode never come here.
"""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

from vidrial.dtypes import DType
from vidrial.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from vidrial.runtime.arrays import CPU, ArraySpec, contiguous_strides
from vidrial.runtime.imported import when_imported
from vidrial.runtime.inputs import check_inputs
from vidrial.runtime.torch_schema import outputs_of, parameters_of
from vidrial.spec.op import Op, gradient_name

F = TypeVar("F", bound=Callable[..., Any])
# (op, tensors in the order of `problem_of`, options in theirs, target) -> outputs by name: what computes it.
Run = Callable[..., Mapping[str, Any]]

_ENTRIES: dict[str, Entry] = {}  # by Op.key
_WAITING: list[Entry] = []  # for torch to be imported
_LIBRARY: list[Any] = []


def called_when_traced(function: F) -> F:
    """Have Dynamo call the function, not trace it, and take what it returns for a constant: what `torch.compiler.assume_constant_result` does."""
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010
    return function


def dispatching(x: object) -> bool:
    """Whether a call of these tensors must go through the dispatcher: Dynamo or torch.jit traces it, autocast is on, or a mode of torch watches."""
    torch: Any = sys.modules.get("torch")
    # NOTE: while another thread imports torch, it has no compiler yet, and no array is its.
    if not hasattr(torch, "compiler") or not (
        torch.compiler.is_dynamo_compiling()
        or torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    return isinstance(x, torch.Tensor)


def dispatched(arrays: Iterable[object]) -> bool:
    """Whether arrays that hold no values of their own are such that the dispatcher serves: of vmap, or all of them meta or fake tensors."""
    torch: Any = sys.modules.get("torch")
    given: list[Any] = list(arrays)
    if torch is None or not all(isinstance(x, torch.Tensor) for x in given):
        return False
    if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in given):
        return any(torch._C._functorch.is_batchedtensor(x) for x in given)
    fake = getattr(sys.modules.get("torch._subclasses"), "FakeTensor", ())
    return all(isinstance(x, fake) for x in given) or all(type(x) is torch.Tensor and x.is_meta for x in given)


def call_torch_op(known: str, inputs: Mapping[str, Any], target: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs by name of an op that `torch_op` calls `known`, by way of torch's dispatcher. Dynamo traces this.

    Raises:
        ArgumentError: an input or an option is not known. ArgumentTypeError: an input is no tensor. Or whatever the op refuses. Under
            torch.compile as the cause of torch's own error.
    """
    made, _, accepted = ready(known).partition("|")
    name, *outputs = made.split()
    for key in (*inputs, *options):
        if key not in accepted.split():
            raise ArgumentError(f"{name}: {key} is no input or option of it; accepted: {', '.join(accepted.split())}")
    torch = sys.modules["torch"]
    for key, x in inputs.items():
        if x is not None and not isinstance(x, torch.Tensor):
            raise ArgumentTypeError(f"{key} is a {type(x).__module__}.{type(x).__name__} among torch's tensors; accepted: torch.Tensor")
    if torch.compiler.is_dynamo_compiling():
        for key, value in options.items():
            if value is not None and not isinstance(value, bool | int | float | str):
                raise ArgumentTypeError(f"{key} is no constant under torch.compile; accepted: Python's int, float, bool, str")
    found = getattr(torch.ops.vidrial, name).default(**inputs, **options, target=target)
    return {output: found[i] for i, output in enumerate(outputs)} if len(outputs) > 1 else {outputs[0]: found}


@called_when_traced
def ready(known: str) -> str:
    """Tell torch of all that waits for it."""
    while _WAITING:
        _WAITING.pop(0).define()
    return known


def declare(op: Op, run: Run) -> str:
    """Tell torch of an op, with those of its gradients, now or as soon as it is imported; what `call_torch_op` knows it by.

    `run` computes it, and its `backward` and `saving`, on tensors that hold values.

    Raises:
        ArgumentError: the op does not say how its problem is made of tensors, or an option is of a type that torch has none for.
    """
    if op.key not in _ENTRIES:
        _declare(op, run, inner=False)
    when_imported("torch", partial(ready, ""))
    return _ENTRIES[op.key].known


def bind(op: Op, args: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors, but for those that are None, and options by name, of what a `Run` is given."""
    return _ENTRIES[op.key].bind(args)


def _declare(op: Op, run: Run, inner: bool) -> Entry:
    plain = re.sub(r"[^0-9A-Za-z_]", "_", op.name)
    # Words of torch's schemas, and attributes of torch.ops.vidrial itself.
    if keyword.iskeyword(plain) or plain[:1].isdigit() or plain.startswith("_") or plain in ("name", "NoneType"):
        plain = f"op_{plain}"
    taken, name, number = {entry.name for entry in _ENTRIES.values()}, plain, 1
    while name in taken:
        number += 1
        name = f"{plain}_{number}"
    entry = Entry(op, run, name, inner)
    if op.saving is not None and parameters_of(op.saving) != entry.parameters:
        raise ArgumentError(f"{op.name}: problem_of of its saving op has other parameters; accepted: the same ones")
    # What is refused is refused again at the next call: an op is known with its gradients, or not at all.
    if op.backward is not None:
        parameters_of(op.backward)
        outputs_of(op.backward)
    _ENTRIES[op.key] = entry
    _WAITING.append(entry)
    if op.backward is not None:
        entry.backward = _declare(op.backward, run, inner=True)
        entry.saving = entry if op.saving is None else _declare(op.saving, run, inner=True)
    return entry


class Entry:
    """One op as torch's dispatcher knows it."""

    def __init__(self, op: Op, run: Run, name: str, inner: bool) -> None:
        self.op, self.run, self.name, self.inner = op, run, name, inner
        self.parameters, self.outputs = parameters_of(op), outputs_of(op)
        self.tensors = [p.name for p in self.parameters if p.tensor]
        self.options = [p.name for p in self.parameters if not p.tensor]
        # NOTE: torch leaves trailing arguments out that equal their defaults.
        self.defaults = tuple(p.default for p in self.parameters)
        self.backward: Entry | None = None
        self.saving: Entry = self
        # What `call_torch_op` takes apart.
        self.known = f"{' '.join((name, *self.outputs))}|{' '.join(p.name for p in self.parameters[:-1])}"

    @property
    def schema(self) -> str:
        """As `torch.library` takes it."""
        made = ", ".join(["Tensor"] * len(self.outputs))
        return f"{self.name}({', '.join(p.text for p in self.parameters)}) -> {made if len(self.outputs) == 1 else f'({made})'}"

    @cached_property
    def overload(self) -> Any:
        """torch's own object."""
        return getattr(sys.modules["torch"].ops.vidrial, self.name).default

    def define(self) -> None:
        """Tell torch of it."""
        import torch

        if not _LIBRARY:
            _LIBRARY.append(_untyped(torch.library.Library)("vidrial", "FRAGMENT"))
        library, full = _LIBRARY[0], f"vidrial::{self.name}"
        library.define(self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        direct, record = _recorders(self)
        for device in ("CPU", "CUDA"):
            library.impl(self.name, self.compute, device)
            # NOTE: torch.library.register_autograd's own takes two microseconds longer a call, recorded or not.
            library.impl(self.name, direct, f"Autograd{device}")
            if not self.inner:
                library.impl(self.name, partial(self.cast, device.lower()), f"Autocast{device}")
        library.impl(self.name, record, "Autograd")
        torch.library.register_fake(full, self.fake, lib=library)
        torch.library.register_vmap(full, self.fold, lib=library)

    def bind(self, args: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tensors and options by name.

        Raises:
            ArgumentTypeError: a tensor that the op cannot do without is None.
        """
        args = (*args, *self.defaults[len(args) :])
        for p, x in zip(self.parameters, args, strict=True):
            if x is None and p.type == "Tensor":
                raise ArgumentTypeError(f"{p.name} is None; accepted: torch.Tensor")
        tensors = {name: x for name, x in zip(self.tensors, args, strict=False) if x is not None}
        return tensors, dict(zip(self.options, args[len(self.tensors) :], strict=True))

    def compute(self, *args: Any) -> Any:
        """On tensors that hold values; contiguous."""
        found = self.run(self.op, *args, *self.defaults[len(args) :])
        if len(self.outputs) == 1:
            x = found[self.outputs[0]]
            return _contiguous(x) if x.is_cpu else x
        # No element where this problem has no such output.
        made, like = (found.get(name) for name in self.outputs), next(x for x in args if x is not None)
        return tuple(like.new_empty(0) if x is None else _contiguous(x) if x.is_cpu else x for x in made)

    def asked(self, specs: Mapping[str, ArraySpec], options: Mapping[str, Any]) -> Any:
        """The problem; sizes may be torch's symbols, so nothing is looked up."""
        known = {name: value for name, value in options.items() if name != "target"}
        return self.op.problem_of(**specs, **known) if self.op.problem_of is not None else None

    def fake(self, *args: Any) -> Any:
        """Tensors like the results, on the inputs' device, of undefined values."""
        inputs, options = self.bind(args)
        specs = _specs(self.op, inputs)
        problem = self.asked(specs, options)
        check_inputs(self.op, problem, specs, layout=False)
        first, like = next(iter(inputs.items()))
        for name, x in inputs.items():
            # NOTE: torch asks this of tensors of which one alone is meta, too, and would return memory as it lies.
            if x.device.type != like.device.type:
                raise ArgumentTypeError(f"{name} is on device {x.device}, {first} on {like.device}; accepted: one device for all")
        declared = self.op.outputs(problem)
        made = [
            like.new_empty(declared[n].shape, dtype=_dtype(declared[n].dtype)) if n in declared else like.new_empty(0) for n in self.outputs
        ]
        return made[0] if len(made) == 1 else tuple(made)

    def cast(self, device: str, *args: Any) -> Any:
        """Under autocast: tensors of float32, bfloat16 and float16 become what the op declares where its problem is asked in autocast's dtype."""
        torch = sys.modules["torch"]
        inputs, options = self.bind(args)
        wanted = torch.get_autocast_dtype(device)
        met = [name for name, x in inputs.items() if x.dtype in (torch.float32, torch.bfloat16, torch.float16)]
        specs = _specs(self.op, inputs)
        specs |= {name: specs[name]._replace(dtype=DType.of(wanted)) for name in met}
        declared = self.op.inputs(self.asked(specs, options))
        inputs |= {name: inputs[name].to(_dtype(declared[name].dtype)) for name in met if name in declared}
        with torch._C._ExcludeDispatchKeyGuard(_autocast_keys(torch)):
            return self.overload(*(inputs.get(n) for n in self.tensors), *options.values())

    def fold(self, info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        """Under vmap: the mapped axis joins the batch; where there is no batch, one call after another."""
        inputs, options = self.bind(args)
        n, dims = info.batch_size, dict(zip(self.tensors, in_dims, strict=False))
        rows = {name: x.expand(n, *x.shape) if dims[name] is None else x.movedim(dims[name], 0) for name, x in inputs.items()}
        if n == 0:
            # Of one more, which keeps the results in autograd's graph.
            one = {name: sys.modules["torch"].cat((x, x.new_zeros(1, *x.shape[1:])))[0] for name, x in rows.items()}
            made = tuple(x[None][:0] for x in self._found(one, options))
        elif self.op.batched:
            found = self._found({name: x.flatten(0, 1) for name, x in rows.items()}, options)
            made = tuple(x.unflatten(0, (n, x.shape[0] // n)) for x in found)
        else:
            each = [self._found({name: x[i] for name, x in rows.items()}, options) for i in range(n)]
            made = tuple(sys.modules["torch"].stack(x) for x in zip(*each, strict=True))
        return (made[0], 0) if len(made) == 1 else (made, (0,) * len(made))

    def _found(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Any, ...]:
        found = self.overload(*(inputs.get(name) for name in self.tensors), *options.values())
        return (found,) if len(self.outputs) == 1 else tuple(found)

    def refuse_recording(self, names: Sequence[str]) -> None:
        """Refuse inputs that require a gradient where there is none, rather than train them by nothing."""
        if self.inner:
            raise UnsupportedError(
                f"{self.name}: a gradient of its gradient is not computed; call backward or grad without create_graph=True ({names[0]} "
                "requires a gradient here)"
            )
        if self.backward is None:
            raise UnsupportedError(
                f"{names[0]} requires a gradient, which {self.name} does not compute; call it under torch.no_grad(), or pass "
                f"{names[0]}.detach()"
            )
        for name in names:
            if gradient_name(name, self.backward.outputs) not in self.backward.outputs:
                raise UnsupportedError(
                    f"{name} requires a gradient, which {self.backward.op.name} does not compute (it gives {', '.join(self.backward.outputs)}); pass "
                    f"{name}.detach(), or give it an output d{name}"
                )

    def read(
        self, inputs: Mapping[str, Any], options: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """The tensors that the backward op reads, but for the gradients; and of which outputs it reads these, by what it calls them."""
        if self.backward is None:
            return {}, {}
        known = self.backward.tensors
        there = {name: x for name, x in {**outputs, **inputs}.items() if name in known}
        gradients = {name: gradient_name(name, known) for name in outputs}
        specs = _specs(self.op, there | {gradients[name]: x for name, x in outputs.items() if gradients[name] in known})
        read = self.backward.op.inputs(self.backward.asked(specs, options))
        return {name: x for name, x in there.items() if name in read}, {name: d for name, d in gradients.items() if d in read}


def _contiguous(x: Any) -> Any:
    # NOTE: of an axis of one element NumPy may have any stride, torch's fake tensors have one.
    return x if x.stride() == contiguous_strides(x.shape) else x.new_empty(x.shape).copy_(x)


def _dtype(dtype: DType) -> Any:
    return getattr(sys.modules["torch"], dtype.label)


def _specs(op: Op, tensors: Mapping[str, Any]) -> dict[str, ArraySpec]:
    found = {}
    for name, x in tensors.items():
        try:
            dtype = DType.of(x.dtype)
        except ArgumentTypeError as error:
            raise ArgumentTypeError(f"{op.name}: {name}: {error}") from None
        device = x.device.index or 0 if x.device.type == "cuda" else CPU
        found[name] = ArraySpec(tuple(x.shape), tuple(x.stride()), dtype, device, "torch", True)
    return found


def _untyped(function: Any) -> Any:
    """What torch has no types for, on whichever machine."""
    return function


def _autocast_keys(torch: Any) -> Any:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    return keys | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)


def _recorders(entry: Entry) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What autograd's dispatch keys run: record the call where a gradient is wanted, else pass it on; and the same where tensors may hold no values."""
    import torch

    grad_enabled, below, modes = torch.is_grad_enabled, torch._C._AutoDispatchBelowAutograd, torch._C._len_torch_dispatch_stack
    plain, tensors = torch.Tensor, len(entry.tensors)

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            run = entry.saving
            with below():
                found = run.overload(*args)
            made = dict(zip(run.outputs, (found,) if len(run.outputs) == 1 else found, strict=True))
            inputs, options = entry.bind(args)
            saved, ctx.gradients = entry.read(inputs, options, made)
            ctx.names, ctx.options = list(saved), options
            ctx.save_for_backward(*saved.values())
            ctx.set_materialize_grads(False)
            ctx.made = [(name, made[name].shape, made[name].dtype) for name in entry.outputs]
            ctx.mark_non_differentiable(*(made[name] for name in entry.outputs if name not in ctx.gradients))
            return tuple(made[name] for name in entry.outputs) if len(entry.outputs) > 1 else made[entry.outputs[0]]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            back = entry.backward
            tensors = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
            like = next(g for g in grads if g is not None)
            for (name, shape, dtype), grad in zip(ctx.made, grads, strict=True):
                if name in ctx.gradients:
                    tensors[ctx.gradients[name]] = like.new_zeros(shape, dtype=dtype) if grad is None else grad
            found = dict(zip(back.outputs, back._found(tensors, ctx.options), strict=True)) if back is not None else {}
            wanted = zip(entry.parameters, ctx.needs_input_grad, strict=False)
            return tuple(found.get(gradient_name(p.name, found)) if p.tensor and needed else None for p, needed in wanted)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise UnsupportedError(f"{entry.name}: forward-mode gradients are not computed; use reverse mode")

    wrapped = torch._C._functorch.is_functorch_wrapped_tensor

    def recorded(args: tuple[Any, ...]) -> Any:
        entry.refuse_recording([n for n, x in zip(entry.tensors, args, strict=False) if x is not None and x.requires_grad])
        for name, x in zip(entry.tensors, args, strict=False):
            if x is not None and wrapped(x):
                raise UnsupportedError(
                    f"{entry.name}: {name} is a tensor of torch.func (grad, vjp, jacrev), which it does not support; use torch.autograd.grad"
                )
        return _untyped(Recorded.apply)(*args)

    def record(*args: Any) -> Any:
        if grad_enabled() and any(x is not None and x.requires_grad for x in args[:tensors]):
            return recorded(args)
        with below():
            return entry.overload(*args)

    def direct(*args: Any) -> Any:
        # NOTE: a loop, not generators: every call of a compiled graph comes here. What holds plain values goes on without the dispatcher.
        recording, through = grad_enabled(), modes() > 0
        for x in args[:tensors]:
            if x is None:
                continue
            if recording and x.requires_grad:
                return recorded(args)
            if type(x) is not plain:
                through = True
        if not through:
            return entry.compute(*args)
        with below():
            return entry.overload(*args)

    return direct, record
