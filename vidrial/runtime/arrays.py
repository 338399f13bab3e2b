"""Arrays of any library in and out: torch, CuPy, JAX and NumPy, where they lie, and the stream that their owner works on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast

from vidrial.device import VECTOR_BYTES
from vidrial.dtypes import DType
from vidrial.errors import ArgumentTypeError, OutOfMemoryError, ToolchainError, TracedError, UnsupportedError

if TYPE_CHECKING:
    from typing_extensions import TypeVar as TypeVarWithDefault

    A = TypeVarWithDefault("A", default=Any)
else:
    A = TypeVar("A")

CPU = -1
_NEGATIVE = "has its negative bit set, so that its memory holds the other sign; pass {name}.resolve_neg()"


class ArraySpec(NamedTuple):
    """What another array must agree in to be served by the same launches. `strides` in elements; `device` a CUDA index, or CPU."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: DType
    device: int
    library: str
    aligned: bool

    @classmethod
    def of(cls, key: tuple[Any, ...], name: str) -> ArraySpec:
        """The facts that a `signature_of` saw; `name` is the argument's name in errors.

        Raises:
            ArgumentTypeError: the dtype is not known, or the device not served. UnsupportedError: a torch tensor's negative bit is set.
        """
        seen, steps, dtype, device, library, aligned, *negative = key
        if any(negative):
            raise UnsupportedError(f"{name} {_NEGATIVE.format(name=name)}")
        shape = tuple(seen)
        strides = contiguous_strides(shape) if steps is None else tuple(steps)
        try:
            return cls(shape, strides, DType.of(dtype), _index_of(device), library, aligned)
        except ArgumentTypeError as error:
            raise ArgumentTypeError(f"{name}: {error}") from None

    @property
    def vectorised(self) -> bool:
        """Rows are contiguous and begin at multiples of 16 bytes, as 16-byte copies need."""
        return (
            self.aligned
            and (self.strides[-1] == 1 or self.shape[-1] <= 1)
            and all(s * self.dtype.bytes % VECTOR_BYTES == 0 for s, n in zip(self.strides[:-1], self.shape[:-1], strict=True) if n > 1)
        )


class Array(NamedTuple, Generic[A]):
    """What a launch needs of an array of some library, of type A. `strides` in elements; `device` a CUDA index, or CPU; `owner` keeps the memory alive."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: DType
    device: int
    library: str
    owner: A

    @property
    def facts(self) -> ArraySpec:
        """What decides which launches serve it."""
        return ArraySpec(*self[1:6], self.pointer % VECTOR_BYTES == 0)


def signature_of(arrays: Iterable[Any], names: Iterable[str]) -> tuple[tuple[tuple[Any, ...], ...], dict[str, int]]:
    """A key of what decides which launches serve these arrays, of which `ArraySpec.of` makes facts, and their addresses by name.

    It is the first step of every call, so of torch's tensors it takes shape, dtype and device as torch has them.

    Raises:
        ArgumentTypeError, UnsupportedError: those of `as_array`.
    """
    torch = sys.modules.get("torch")
    tensor = None
    watched = False  # by autograd, forward or backward
    if torch is not None:
        try:
            tensor, recorded, dual = torch.Tensor, torch.is_grad_enabled(), torch.autograd.forward_ad._current_level >= 0
        except AttributeError:
            tensor = recorded = dual = None  # another thread is importing it: nothing here is a tensor
        watched = recorded or dual
    key: list[tuple[Any, ...]] = []
    append, pointers = key.append, {}
    # NOTE: to name `strict` takes as long as another two attributes of a tensor.
    for name, x in zip(names, arrays):  # noqa: B905
        if type(x) is tensor:
            try:
                pointers[name] = pointer = x.data_ptr()
                # NOTE: whether it is contiguous torch says faster than its strides, and a shorter key is hashed faster.
                strides = None if x.is_contiguous() else x.stride()
                append((x.shape, strides, x.dtype, x.device, "torch", pointer % VECTOR_BYTES == 0, x.is_neg()))
            except RuntimeError:
                _refuse_tensor(x, name)
                raise
            if not pointer or (watched and (dual or x.requires_grad)):
                _refuse_tensor(x, name)
        else:
            array = x if type(x) is Array else as_array(x, name)
            pointers[name] = pointer = array.pointer
            append((*array[1:6], pointer % VECTOR_BYTES == 0))
    return tuple(key), pointers


def _refuse_tensor(x: Any, name: str) -> None:
    """Refuse a torch tensor whose values are not, or not alone, what lies at its address."""
    torch = sys.modules["torch"]
    dispatch = type(x).__torch_dispatch__
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        reason = "is a tensor of torch.func (grad, jvp, vmap), which ops do not support; call the op outside of it"
    elif x.is_nested:
        reason = "is a nested tensor; accepted: dense ones. Pass one sequence at a time, or x.to_padded_tensor(0)"
    elif x.layout is not torch.strided:
        reason = f"has layout {x.layout}; accepted: torch.strided. Pass {name}.to_dense()"
    elif dispatch is not torch.Tensor.__torch_dispatch__ and dispatch is not torch._C._disabled_torch_dispatch_impl:
        reason = f"is a {type(x).__module__}.{type(x).__name__}, which is more than its memory; accepted: plain tensors"
    elif x.is_neg():
        reason = _NEGATIVE.format(name=name)
    elif torch.is_grad_enabled() and x.requires_grad:
        reason = f"requires a gradient, which this call does not record; call it under torch.no_grad(), or pass {name}.detach()"
    elif torch.autograd.forward_ad._current_level >= 0 and torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
        reason = "carries a tangent of forward-mode AD, which no op computes; pass torch.autograd.forward_ad.unpack_dual(x).primal"
    elif (x.numel() or x.is_meta) and not _has_memory(x):
        reason = f"has no memory of its own (device {x.device}; batched by torch, perhaps); accepted: tensors that hold values"
    else:
        return
    raise UnsupportedError(f"{name} {reason}")


def _has_memory(x: Any) -> bool:
    """NOTE: torch has no question for it: what it batches (`is_grads_batched`) raises."""
    try:
        return bool(x.data_ptr())
    except RuntimeError:
        return False


def library_of(x: object) -> str:
    """`torch`, `cupy`, `jax` or `numpy`.

    Raises:
        ArgumentTypeError: x is none of their arrays.
    """
    return _library_of(type(x))


# The class of each library's arrays.
_CLASSES = {"torch": "Tensor", "cupy": "ndarray", "jax": "Array", "numpy": "ndarray"}


def _imported(library: str) -> Any:
    """A library's module; None where nobody has imported it, or another thread is about to."""
    module = sys.modules.get(library)
    return None if getattr(getattr(module, "__spec__", None), "_initializing", False) else module


def _library_of(kind: type) -> str:
    for library, name in _CLASSES.items():
        module = _imported(library)
        # NOTE: JAX's class is abstract, and what its transformations trace is an instance of it, too.
        if module is not None and (issubclass(kind, getattr(module, name)) or (library == "jax" and issubclass(kind, module.core.Tracer))):
            return library
    known = "torch.Tensor, cupy.ndarray, jax.Array, numpy.ndarray"
    raise ArgumentTypeError(f"{kind.__module__}.{kind.__name__} is not an array; accepted: {known}")


def as_array(x: A, name: str) -> Array[A]:
    """The Array that describes `x`; `name` is the argument's name in errors.

    NumPy arrays whose elements do not lie as C++ reads them (another byte order, packed records) are copied.

    Raises:
        ArgumentTypeError: x is no array, or its dtype or device is not known. UnsupportedError: its values are not, or not alone, what
            lies in its memory: it requires a gradient, carries a tangent, is traced, masked, sparse, nested, or spread over devices.
    """
    kind: type = type(x)
    try:
        return _reader(kind)(x, name)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{name}: {error}") from None


def _index_of(device: Any) -> int:
    """A CUDA index, or CPU, of that number itself or of a torch device."""
    if isinstance(device, int):
        return device
    if device.type not in ("cuda", "cpu"):
        raise ArgumentTypeError(f"device {device} is not served; accepted: cuda, cpu")
    return CPU if device.type == "cpu" else int(device.index)


def _read_torch(x: Any, name: str) -> Array:
    try:
        array = Array(x.data_ptr(), x.shape, x.stride(), DType.of(x.dtype), _index_of(x.device), "torch", x)
    except RuntimeError:
        _refuse_tensor(x, name)
        raise
    torch = sys.modules["torch"]
    dual = torch.autograd.forward_ad._current_level >= 0
    if type(x) is not torch.Tensor or not array.pointer or dual or x.is_neg() or x.requires_grad:
        _refuse_tensor(x, name)
    return array


def _read_numpy(x: Any, name: str) -> Array:
    import numpy as np

    if isinstance(x, np.ma.MaskedArray):
        raise UnsupportedError(f"{name} is a masked array; accepted: arrays of values alone. Pass {name}.filled(...)")
    dtype = DType.of(x.dtype)
    if not (x.dtype.isnative and x.flags.aligned) or any(s % dtype.bytes for s in x.strides):
        x = np.array(x, x.dtype.newbyteorder("="), order="C")
    return Array(x.ctypes.data, x.shape, tuple(s // dtype.bytes for s in x.strides), dtype, CPU, "numpy", x)


def _read_cupy(x: Any, name: str) -> Array:
    dtype = DType.of(x.dtype)
    if x.data.ptr % dtype.bytes or any(s % dtype.bytes for s in x.strides):
        raise UnsupportedError(f"{name} has elements that lie at no multiples of their {dtype.bytes} bytes; pass a contiguous copy")
    return Array(x.data.ptr, x.shape, tuple(s // dtype.bytes for s in x.strides), dtype, x.device.id, "cupy", x)


def _read_jax(x: Any, name: str) -> Array:
    if isinstance(x, sys.modules["jax"].core.Tracer):
        raise TracedError(
            f"{name} is traced by JAX (jit, grad, vmap), which this call does not serve; accepted there: vidrial.call_op, and an op's own function"
        )
    devices = x.devices()
    if len(devices) != 1:
        raise UnsupportedError(f"{name} is spread over {len(devices)} devices; accepted: arrays on one. Call the op on each shard")
    (device,) = devices
    if device.platform == "cpu":
        import numpy as np

        return _read_numpy(np.asarray(x), name)._replace(library="jax")
    # NOTE: JAX computes on streams of its own; what this array waits for must be done before another stream reads it.
    x.block_until_ready()
    shape = tuple(x.shape)
    return Array(x.unsafe_buffer_pointer(), shape, contiguous_strides(shape), DType.of(x.dtype), device.local_hardware_id, "jax", x)


@lru_cache(maxsize=4096)
def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous array, as every library has them: an axis of no element counts as one of one."""
    strides, count = [], 1
    for n in reversed(shape):
        strides.append(count)
        count *= max(n, 1)
    return tuple(reversed(strides))


_READERS: dict[str, Callable[[Any, str], Array]] = {"torch": _read_torch, "cupy": _read_cupy, "jax": _read_jax, "numpy": _read_numpy}


@lru_cache(maxsize=64)
def _reader(kind: type) -> Callable[[Any, str], Array]:
    return _READERS[_library_of(kind)]


def current_stream(library: str, device: int) -> int:
    """The CUDA stream (its handle) that the library works on now, on that device."""
    if library == "torch":
        # NOTE: torch.cuda.current_stream makes an object of its own each time, and takes as long as a launch.
        stream: int = sys.modules["torch"]._C._cuda_getCurrentRawStream(device)
        return stream
    import cupy

    with cupy.cuda.Device(device):
        pointer: int = cupy.cuda.get_current_stream().ptr
        return pointer


def capturing() -> bool:
    """Whether torch's or CuPy's current stream is being captured into a CUDA graph: nothing may be compiled or loaded then."""
    torch, cupy = _imported("torch"), _imported("cupy")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return True
    stream = cupy.cuda.get_current_stream() if cupy is not None else None
    # NOTE: the default stream cannot be captured, and to ask it while another thread captures is an error.
    return stream is not None and stream.ptr != 0 and bool(stream.is_capturing())


def empty(shape: tuple[int, ...], dtype: DType, like: Any, library: str, device: int) -> tuple[int, Any]:
    """A new contiguous array on a device, contents undefined: its address and the library's own object.

    `like`: an array of that library and device. For JAX memory comes from CuPy; see `to_library`.
    """
    if library == "torch":
        wanted = _torch_dtype(sys.modules["torch"], dtype)
        # NOTE: named strides and no dtype are what torch reads fastest; with both it takes half as long again.
        strides = contiguous_strides(shape)
        x = like.new_empty_strided(shape, strides) if like.dtype is wanted else like.new_empty_strided(shape, strides, dtype=wanted)
        return x.data_ptr(), x
    if device == CPU:
        import numpy as np

        x = np.empty(shape, _numpy_dtype(dtype))
        return x.ctypes.data, x
    import cupy

    with cupy.cuda.Device(device):
        bits = cupy.empty(shape, cupy.dtype(f"uint{dtype.bits}") if dtype is DType.bfloat16 else dtype.label)
        return bits.data.ptr, bits


def scratch(size: int, library: str, device: int, stream: int) -> tuple[int, Any]:
    """`size` bytes of the library's memory on the current device, contents undefined, for work on `stream`: the address, and what keeps them.

    To be returned by `release` when that work is queued.

    Raises:
        OutOfMemoryError: the GPU has not so many left.
    """
    if library == "torch":
        torch = sys.modules["torch"]
        try:
            # NOTE: a tensor takes four times as long.
            pointer: int = torch._C._cuda_cudaCachingAllocator_raw_alloc(size, stream)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"{size} bytes of workspace: {error}") from error
        return pointer, None
    import cupy

    try:
        return empty((size,), DType.uint8, None, library, device)
    except cupy.cuda.memory.OutOfMemoryError as error:
        raise OutOfMemoryError(f"{size} bytes of workspace: {error}") from error


def free_bytes(library: str, device: int) -> int:
    """Memory that the current GPU has left, and that torch keeps for its tensors and does not use: perhaps not in one piece."""
    import cupy

    free = int(cupy.cuda.runtime.memGetInfo()[0])
    if library == "torch":
        cuda = sys.modules["torch"].cuda
        free += cuda.memory_reserved(device) - cuda.memory_allocated(device)
    return free


def release(library: str, pointer: int) -> None:
    """Return what `scratch` took; later work on its stream may have it."""
    if library == "torch":
        sys.modules["torch"]._C._cuda_cudaCachingAllocator_raw_delete(pointer)


def to_library(x: Array[A]) -> A:
    """The array as its library's own object: what the caller gets."""
    return cast(A, wrap_output(x.owner, x.dtype, x.library, x.device))


def wrap_output(x: Any, dtype: DType, library: str, device: int) -> Any:
    """What `empty` made as the library's own array of that dtype."""
    if library == "jax":
        import jax

        if device == CPU:
            return jax.numpy.asarray(x)
        import cupy

        cupy.cuda.get_current_stream().synchronize()
        raw = jax.dlpack.from_dlpack(x)
        return jax.lax.bitcast_convert_type(raw, jax.numpy.bfloat16) if dtype is DType.bfloat16 else raw
    return x.view(_numpy_dtype(dtype)) if library == "cupy" and dtype is DType.bfloat16 else x


@lru_cache
def _torch_dtype(torch: Any, dtype: DType) -> Any:
    return getattr(torch, dtype.label)


def _numpy_dtype(dtype: DType) -> Any:
    import numpy as np

    if dtype is not DType.bfloat16:
        return np.dtype(dtype.label)
    try:
        import ml_dtypes
    except ModuleNotFoundError:
        raise ToolchainError("bfloat16 arrays of NumPy and CuPy need ml_dtypes: pip install ml_dtypes") from None
    return np.dtype(ml_dtypes.bfloat16)


def contiguous(x: Array[A]) -> Array[A]:
    """The array itself if it is contiguous and begins at a multiple of 16 bytes, else such a copy in the same library, on the current stream."""
    if (x.strides == contiguous_strides(tuple(x.shape)) and x.pointer % VECTOR_BYTES == 0) or x.library == "jax":
        return x
    owner: Any = x.owner
    if x.library == "torch":
        copy = owner.clone(memory_format=sys.modules["torch"].contiguous_format)
    else:
        copy = owner.copy(order="C")
    return _READERS[x.library](copy, "a copy")
