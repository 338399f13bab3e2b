"""Arrays of any library in and out: torch, CuPy, JAX and NumPy, where they lie, and the stream that their owner works on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from vidrial.dtypes import DType
from vidrial.errors import ArgumentTypeError, ToolchainError

CPU = -1
VECTOR_BYTES = 16


class Array(NamedTuple):
    """What a launch needs of an array. `strides` in elements; `device` a CUDA index, or CPU; `owner` keeps the memory alive."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: DType
    device: int
    library: str
    owner: Any

    @property
    def facts(self) -> tuple[Any, ...]:
        """What another array must agree in to be served by the same launches: (shape, strides, dtype, device, library, aligned)."""
        return *self[1:6], self.pointer % VECTOR_BYTES == 0

    @property
    def vectorised(self) -> bool:
        """Rows are contiguous and begin at multiples of 16 bytes, as 16-byte copies need."""
        return vectorised(*self.facts)


def vectorised(shape: tuple[int, ...], strides: tuple[int, ...], dtype: DType, device: int, library: str, aligned: bool) -> bool:
    """`Array.vectorised`, of an array's facts."""
    return (
        aligned
        and (strides[-1] == 1 or shape[-1] <= 1)
        and all(s * dtype.bytes % VECTOR_BYTES == 0 for s, n in zip(strides[:-1], shape[:-1], strict=True) if n > 1)
    )


def library_of(x: Any) -> str:
    """`torch`, `cupy`, `jax` or `numpy`.

    Raises:
        ArgumentTypeError: x is none of their arrays.
    """
    return _library_of(type(x))


def _library_of(kind: type) -> str:
    root = kind.__module__.partition(".")[0]
    name = {"jaxlib": "jax"}.get(root, root)
    if name not in _READERS and "torch" in sys.modules and issubclass(kind, sys.modules["torch"].Tensor):
        name = "torch"
    if name not in _READERS:
        known = "torch.Tensor, cupy.ndarray, jax.Array, numpy.ndarray"
        raise ArgumentTypeError(f"{kind.__module__}.{kind.__name__} is not an array; accepted: {known}")
    return name


def as_array(x: Any, name: str) -> Array:
    """The Array that describes `x`; `name` is the argument's name in errors.

    Raises:
        ArgumentTypeError: x is no array, or its dtype is not known.
    """
    kind: type = type(x)
    try:
        return _reader(kind)(x)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{name}: {error}") from None


def _read_torch(x: Any) -> Array:
    if x.is_cuda:
        device = x.get_device()
    elif x.device.type == "cpu":
        device = CPU
    else:
        raise ArgumentTypeError(f"device {x.device} is not served; accepted: cuda, cpu")
    return Array(x.data_ptr(), x.shape, x.stride(), _dtype_of(x.dtype), device, "torch", x)


def _read_numpy(x: Any) -> Array:
    dtype = DType.of(x.dtype)
    return Array(x.ctypes.data, x.shape, tuple(s // dtype.bytes for s in x.strides), dtype, CPU, "numpy", x)


def _read_cupy(x: Any) -> Array:
    dtype = DType.of(x.dtype)
    return Array(x.data.ptr, x.shape, tuple(s // dtype.bytes for s in x.strides), dtype, x.device.id, "cupy", x)


def _read_jax(x: Any) -> Array:
    device = next(iter(x.devices()))
    if device.platform == "cpu":
        import numpy as np

        array = _read_numpy(np.asarray(x))
        return Array(array.pointer, array.shape, array.strides, array.dtype, CPU, "jax", array.owner)
    # NOTE: JAX computes on streams of its own; what this array waits for must be done before another stream reads it.
    x.block_until_ready()
    shape = tuple(x.shape)
    return Array(x.unsafe_buffer_pointer(), shape, contiguous_strides(shape), DType.of(x.dtype), device.local_hardware_id, "jax", x)


@lru_cache(maxsize=4096)
def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous array."""
    strides, count = [], 1
    for n in reversed(shape):
        strides.append(count)
        count *= n
    return tuple(reversed(strides))


# Without the class method around it, which takes as long as the look-up.
_dtype_of = lru_cache(maxsize=256)(DType.of)
_READERS: dict[str, Callable[[Any], Array]] = {"torch": _read_torch, "cupy": _read_cupy, "jax": _read_jax, "numpy": _read_numpy}


@lru_cache(maxsize=64)
def _reader(kind: type) -> Callable[[Any], Array]:
    return _READERS[_library_of(kind)]


def current_stream(like: Array) -> int:
    """The CUDA stream (its handle) that the array's library works on now, on the array's device."""
    if like.library == "torch":
        # NOTE: torch.cuda.current_stream makes an object of its own each time, and takes as long as a launch.
        stream: int = sys.modules["torch"]._C._cuda_getCurrentRawStream(like.device)
        return stream
    import cupy

    with cupy.cuda.Device(like.device):
        pointer: int = cupy.cuda.get_current_stream().ptr
        return pointer


def capturing() -> bool:
    """Whether torch's or CuPy's current stream is being captured into a CUDA graph: nothing may be compiled or loaded then."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return True
    cupy = sys.modules.get("cupy")
    stream = cupy.cuda.get_current_stream() if cupy is not None else None
    # NOTE: the default stream cannot be captured, and to ask it while another thread captures is an error.
    return stream is not None and stream.ptr != 0 and bool(stream.is_capturing())


def empty(shape: tuple[int, ...], dtype: DType, like: Array) -> Array:
    """A new array of `like`'s library and device, contents undefined. For JAX memory comes from CuPy; see `give_back`."""
    if like.library == "torch":
        x = like.owner.new_empty(shape, dtype=_torch_dtype(sys.modules["torch"], dtype))
        # Its strides are known; asking for them again takes as long as a launch does.
        return Array(x.data_ptr(), shape, contiguous_strides(shape), dtype, like.device, "torch", x)
    if like.device == CPU:
        import numpy as np

        x = np.empty(shape, _numpy_dtype(dtype))
        return _read_numpy(x)
    import cupy

    with cupy.cuda.Device(like.device):
        bits = cupy.empty(shape, cupy.dtype(f"uint{dtype.bits}") if dtype is DType.bfloat16 else dtype.label)
        return Array(bits.data.ptr, shape, tuple(s // dtype.bytes for s in bits.strides), dtype, like.device, like.library, bits)


def scratch(size: int, like: Array) -> tuple[int, Any]:
    """`size` bytes on `like`'s device, contents undefined: the address, and what keeps them."""
    if like.library == "torch":
        x = like.owner.new_empty(size, dtype=sys.modules["torch"].uint8)
        return x.data_ptr(), x
    made = empty((size,), DType.uint8, like)
    return made.pointer, made


def give_back(x: Array) -> Any:
    """The array as its library's own object: what the caller gets."""
    if x.library == "jax" and x.device != CPU:
        import cupy
        import jax

        cupy.cuda.get_current_stream().synchronize()
        raw = jax.dlpack.from_dlpack(x.owner)
        return jax.lax.bitcast_convert_type(raw, jax.numpy.bfloat16) if x.dtype is DType.bfloat16 else raw
    if x.library == "cupy" and x.dtype is DType.bfloat16:
        return x.owner.view(_numpy_dtype(x.dtype))
    return x.owner


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


def contiguous(x: Array) -> Array:
    """A contiguous copy in the same library, on the current stream."""
    if x.library == "torch":
        return _read_torch(x.owner.contiguous() if not x.owner.is_contiguous() else x.owner.clone())
    if x.library == "jax":
        return x
    return _READERS[x.library](x.owner.copy(order="C"))
