"""Arrays of any library in and out: torch, CuPy, JAX and NumPy, where they lie, and the stream that their owner works on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vidrial.dtypes import DType
from vidrial.errors import ArgumentTypeError, ToolchainError

CPU = -1
VECTOR_BYTES = 16


@dataclass(frozen=True, slots=True)
class Array:
    """What a launch needs of an array. `strides` in elements; `device` a CUDA index, or CPU; `owner` keeps the memory alive."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: DType
    device: int
    library: str
    owner: Any

    @property
    def vectorised(self) -> bool:
        """Rows are contiguous and begin at multiples of 16 bytes, as 16-byte copies need."""
        size = self.dtype.bytes
        return (self.strides[-1] == 1 or self.shape[-1] <= 1) and self.pointer % VECTOR_BYTES == 0 and all(
            s * size % VECTOR_BYTES == 0 for s, n in zip(self.strides[:-1], self.shape[:-1], strict=True) if n > 1)


def library_of(x: Any) -> str:
    """`torch`, `cupy`, `jax` or `numpy`.

    Raises:
        ArgumentTypeError: x is none of their arrays.
    """
    root = type(x).__module__.partition(".")[0]
    name = {"jaxlib": "jax"}.get(root, root)
    if name not in _READERS and "torch" in sys.modules and isinstance(x, sys.modules["torch"].Tensor):
        name = "torch"
    if name not in _READERS:
        raise ArgumentTypeError(f"{type(x).__module__}.{type(x).__name__} is not an array; accepted: torch.Tensor, cupy.ndarray, jax.Array, numpy.ndarray")
    return name


def as_array(x: Any, name: str) -> Array:
    """The Array that describes `x`; `name` is the argument's name in errors.

    Raises:
        ArgumentTypeError: x is no array, or its dtype is not known.
    """
    try:
        return _READERS[library_of(x)](x)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{name}: {error}") from None


def _read_torch(x: Any) -> Array:
    device = x.device
    if device.type not in ("cuda", "cpu"):
        raise ArgumentTypeError(f"device {device} is not served; accepted: cuda, cpu")
    index = device.index if device.type == "cuda" else CPU
    return Array(x.data_ptr(), tuple(x.shape), x.stride(), DType.of(x.dtype), index, "torch", x)


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
    shape, strides, count = tuple(x.shape), [], 1
    for n in reversed(shape):
        strides.append(count)
        count *= n
    return Array(x.unsafe_buffer_pointer(), shape, tuple(reversed(strides)), DType.of(x.dtype), device.local_hardware_id, "jax", x)


_READERS: dict[str, Callable[[Any], Array]] = {"torch": _read_torch, "cupy": _read_cupy, "jax": _read_jax, "numpy": _read_numpy}


def current_stream(like: Array) -> int:
    """The CUDA stream (its handle) that the array's library works on now, on the array's device."""
    if like.library == "torch":
        stream: int = sys.modules["torch"].cuda.current_stream(like.device).cuda_stream
        return stream
    import cupy

    with cupy.cuda.Device(like.device):
        pointer: int = cupy.cuda.get_current_stream().ptr
        return pointer


def empty(shape: tuple[int, ...], dtype: DType, like: Array) -> Array:
    """A new array of `like`'s library and device, contents undefined. For JAX memory comes from CuPy; see `give_back`."""
    if like.library == "torch":
        torch = sys.modules["torch"]
        return _read_torch(torch.empty(shape, dtype=getattr(torch, dtype.label), device=like.owner.device))
    if like.device == CPU:
        import numpy as np

        x = np.empty(shape, _numpy_dtype(dtype))
        return _read_numpy(x)
    import cupy

    with cupy.cuda.Device(like.device):
        bits = cupy.empty(shape, cupy.dtype(f"uint{dtype.bits}") if dtype is DType.bfloat16 else dtype.label)
        return Array(bits.data.ptr, shape, tuple(s // dtype.bytes for s in bits.strides), dtype, like.device, like.library, bits)


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
