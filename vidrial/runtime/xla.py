"""XLA's custom calls in Python: handlers of its foreign function interface, by ctypes.

The structs are those of XLA's C API, xla/ffi/api/c_api.h, which comes with jaxlib: since version 0.1 fields are only added behind.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from typing import Any, NamedTuple

from vidrial.dtypes import DType
from vidrial.errors import ArgumentError, ArgumentTypeError, OutOfMemoryError, UnsupportedError

METADATA = 1  # the extension by which XLA asks what a handler is
VERSION = (0, 1)  # of the interface; XLA refuses another major number
COMMAND_BUFFER_COMPATIBLE = 1  # the handler queues the same launches at each call, so that XLA may capture them into a CUDA graph
# XLA's numbers of our element types, and of its error codes.
DTYPES = {6: DType.uint8, 4: DType.int32, 10: DType.float16, 11: DType.float32, 16: DType.bfloat16}
CANCELLED, INVALID_ARGUMENT, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL = 1, 3, 8, 12, 13
CODES = (
    (ArgumentError, INVALID_ARGUMENT),
    (ArgumentTypeError, INVALID_ARGUMENT),
    (UnsupportedError, UNIMPLEMENTED),
    (OutOfMemoryError, RESOURCE_EXHAUSTED),
    (KeyboardInterrupt, CANCELLED),
)


class _Extension(ctypes.Structure):
    pass


_Extension._fields_ = [("struct_size", c_size_t), ("type", c_int), ("next", POINTER(_Extension))]


def _struct(name: str, *fields: tuple[str, Any]) -> Any:
    """One of XLA's structs: each begins with its size and its extensions."""
    return type(name, (ctypes.Structure,), {"_fields_": [("struct_size", c_size_t), ("extension", POINTER(_Extension)), *fields]})


_Version = _struct("_Version", ("major", c_int), ("minor", c_int))
_Buffer = _struct("_Buffer", ("dtype", c_int), ("data", c_void_p), ("rank", c_int64), ("dims", POINTER(c_int64)))
_Buffers = _struct("_Buffers", ("size", c_int64), ("types", POINTER(c_int)), ("all", POINTER(POINTER(_Buffer))))
_ErrorArguments = _struct("_ErrorArguments", ("message", c_char_p), ("code", c_int))
_StreamArguments = _struct("_StreamArguments", ("context", c_void_p), ("stream", c_void_p))
_OrdinalArguments = _struct("_OrdinalArguments", ("context", c_void_p), ("ordinal", c_int32))


class _Span(ctypes.Structure):
    _fields_ = [("pointer", c_void_p), ("length", c_size_t)]


_Attributes = _struct("_Attributes", ("size", c_int64), ("types", POINTER(c_int)), ("names", c_void_p), ("all", POINTER(POINTER(_Span))))
_create_error = ctypes.CFUNCTYPE(c_void_p, POINTER(_ErrorArguments))
_get_stream = ctypes.CFUNCTYPE(c_void_p, POINTER(_StreamArguments))
_get_ordinal = ctypes.CFUNCTYPE(c_void_p, POINTER(_OrdinalArguments))
_Api = _struct(
    "_Api",
    ("version", _Version),
    ("internal", c_void_p),
    ("create_error", _create_error),
    ("between", c_void_p * 3),  # the error's message, its end; registration
    ("get_stream", _get_stream),
    ("behind", c_void_p * 12),  # types, the context, states, device memory, the thread pool, futures, the run's number
    ("get_ordinal", _get_ordinal),
)
_Frame = _struct(
    "_Frame",
    ("api", POINTER(_Api)),
    ("context", c_void_p),
    ("stage", c_int),
    ("inputs", _Buffers),
    ("outputs", _Buffers),
    ("attributes", _Attributes),
)


class _Metadata(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("version", _Version), ("traits", c_uint32), ("state", c_int64)]


class _MetadataExtension(ctypes.Structure):
    _fields_ = [("base", _Extension), ("metadata", POINTER(_Metadata))]


_Handler = ctypes.CFUNCTYPE(c_void_p, POINTER(_Frame))


class Operand(NamedTuple):
    """An array of a call, contiguous: its address, dtype and shape."""

    pointer: int
    dtype: DType
    shape: tuple[int, ...]


class Call:
    """One call of a handler, good until the handler returns."""

    def __init__(self, frame: Any) -> None:
        self._frame = frame

    @property
    def attribute(self) -> bytes:
        """The one attribute that the call was written with, a string."""
        span = self._frame.attributes.all[0].contents
        return ctypes.string_at(span.pointer, span.length)

    def pointers(self) -> list[int]:
        """Addresses of the inputs, then of the outputs."""
        inputs, outputs = self._frame.inputs, self._frame.outputs
        return [one.all[i].contents.data or 0 for one in (inputs, outputs) for i in range(one.size)]

    def operands(self) -> list[Operand]:
        """The inputs, then the outputs.

        Raises:
            ArgumentTypeError: a dtype is none of ours.
        """
        found = []
        for one in (self._frame.inputs, self._frame.outputs):
            for i in range(one.size):
                buffer = one.all[i].contents
                if buffer.dtype not in DTYPES:
                    raise ArgumentTypeError(
                        f"XLA's element type {buffer.dtype} is not known; accepted: {', '.join(map(str, DTYPES.values()))}"
                    )
                found.append(Operand(buffer.data or 0, DTYPES[buffer.dtype], tuple(buffer.dims[axis] for axis in range(buffer.rank))))
        return found

    @property
    def stream(self) -> int:
        """The CUDA stream (its handle) that the call is to be queued on.

        Raises:
            UnsupportedError: XLA has none for it.
        """
        asked = _StreamArguments(ctypes.sizeof(_StreamArguments), None, self._frame.context, None)
        if self._frame.api.contents.get_stream(asked):
            raise UnsupportedError("XLA has no CUDA stream for this call")
        return asked.stream or 0

    @property
    def device(self) -> int | None:
        """The CUDA index that the call runs on; None where this version of XLA does not say."""
        api = self._frame.api.contents
        if api.struct_size < ctypes.sizeof(_Api):
            return None
        asked = _OrdinalArguments(ctypes.sizeof(_OrdinalArguments), None, self._frame.context, -1)
        return None if api.get_ordinal(asked) or asked.ordinal < 0 else int(asked.ordinal)


def _handler(serve: Callable[[Call], None], traits: int) -> Any:
    """NOTE: ctypes prints and drops an exception that leaves a callback, and XLA takes the call for done: every one becomes XLA's error."""

    def handle(pointer: Any) -> int | None:
        frame = pointer.contents
        if frame.extension and frame.extension.contents.type == METADATA:
            metadata = ctypes.cast(frame.extension, POINTER(_MetadataExtension)).contents.metadata.contents
            metadata.version.major, metadata.version.minor = VERSION
            metadata.traits = traits
            return None
        try:
            serve(Call(frame))
        except BaseException as error:  # noqa: BLE001
            code = next((code for kind, code in CODES if isinstance(error, kind)), INTERNAL)
            message = f"{type(error).__name__}: {error}".encode(errors="replace")
            return int(frame.api.contents.create_error(_ErrorArguments(ctypes.sizeof(_ErrorArguments), None, message, code)))
        return None

    return _Handler(handle)


# Callbacks live as long as the process: XLA keeps their addresses.
_kept: list[Any] = []


def register(name: str, platform: str, execute: Callable[[Call], None], initialize: Callable[[Call], None] | None = None) -> None:
    """Make `name` a custom call of JAX's on a platform: "cpu", or "CUDA", where it may be captured into a CUDA graph.

    `initialize` runs before a program's first call, never in a capture: where binaries are to be loaded.
    """
    import jax.ffi

    stages = {"execute": execute} | ({} if initialize is None else {"initialize": initialize})
    handlers = {stage: _handler(serve, COMMAND_BUFFER_COMPATIBLE if platform == "CUDA" else 0) for stage, serve in stages.items()}
    _kept.extend(handlers.values())
    jax.ffi.register_ffi_target(
        name, {stage: jax.ffi.pycapsule(ctypes.cast(one, c_void_p).value) for stage, one in handlers.items()}, platform=platform
    )
