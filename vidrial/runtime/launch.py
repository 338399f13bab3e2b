"""A cubin as a callable on the caller's stream: load once, then launch with one struct passed by value."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

from vidrial.build.nvrtc import Cubin
from vidrial.device import PARAMETER_BYTES
from vidrial.errors import ArgumentError, LaunchError
from vidrial.settings import prepare_cupy
from vidrial.spec.geometry import Geometry

# Beyond this a kernel has to ask for its dynamic shared memory.
SMEM_UNASKED = 48 << 10
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute


class Binary:
    """A kernel loaded on one device. It unloads itself when nothing refers to it any more."""

    def __init__(self, module: Any, function: int, name: str, device: int, smem_limit: int) -> None:
        from cupy.cuda import driver, runtime

        self.name = name
        self.device = device
        self.smem_limit = smem_limit
        self._module = module  # owns the code: its end unloads it
        self.function = function
        self.driver = driver
        self._smem_asked = SMEM_UNASKED
        self._runtime = runtime

    @classmethod
    def load(cls, cubin: Cubin, entry: str, device: int | None = None) -> Binary:
        """Load `entry` of a cubin on CUDA device `device`, by default the current one.

        Raises:
            LaunchError: the driver refuses the image (another architecture, an older driver), or has no such entry.
        """
        prepare_cupy()
        from cupy.cuda import Device, driver, function, runtime

        try:
            chosen = runtime.getDevice() if device is None else device
            with Device(chosen):
                module = function.Module()
                module.load(cubin.image)
                pointer = int(module.get_function(entry).ptr)
                smem_of_cta = int(runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, chosen))
        except (driver.CUDADriverError, runtime.CUDARuntimeError) as error:
            raise LaunchError(
                f"kernel {entry} for {cubin.arch} does not load: {error}; compile for this GPU's architecture, see Device.current()"
            ) from error
        return cls(module, pointer, entry, chosen, smem_of_cta - cubin.resources.static_smem)

    def launch(self, geometry: Geometry, packed: bytearray, stream: int) -> None:
        """Launch on `stream` (a cudaStream_t as an int; 0 is the default stream) with `packed` as the kernel's one parameter.

        The bytes are copied before this returns: `packed` may be rewritten at once. An empty grid launches nothing.

        Raises:
            LaunchError: the driver refuses the launch, or an earlier error of this context comes to light.
            ArgumentError: the parameter struct is empty or too large.
        """
        with self.on_device():
            Launch(self, geometry, packed).run(stream)

    def on_device(self) -> contextlib.AbstractContextManager[object]:
        """This kernel's device as the current one, until the end of the block."""
        if self._runtime.getDevice() == self.device:
            return _HERE
        from cupy.cuda import Device

        device: contextlib.AbstractContextManager[object] = Device(self.device)
        return device

    def allow(self, smem: int) -> None:
        """Ask for so many bytes of dynamic shared memory a CTA, if need be.

        Raises:
            LaunchError: there is not so much.
        """
        if smem <= self._smem_asked:
            return
        if smem > self.smem_limit:
            raise LaunchError(
                f"kernel {self.name} asks for {smem} bytes of dynamic shared memory; "
                f"device {self.device} has {self.smem_limit} a CTA: choose a smaller tile or fewer stages"
            )
        try:
            self.driver.funcSetAttribute(self.function, MAX_DYNAMIC_SHARED_SIZE_BYTES, smem)
        except self.driver.CUDADriverError as error:
            raise LaunchError(f"kernel {self.name} cannot have {smem} bytes of dynamic shared memory: {error}") from error
        self._smem_asked = smem

    def zero(self, pointer: int, size: int, stream: int) -> None:
        """Set `size` bytes at `pointer` to 0, on `stream`.

        Raises:
            LaunchError: the driver refuses, or an earlier error of this context comes to light.
        """
        try:
            self._runtime.memsetAsync(pointer, 0, size, stream)
        except self._runtime.CUDARuntimeError as error:
            raise LaunchError(f"kernel {self.name}: {size} bytes of its workspace cannot be set to 0: {error}") from error

    def refused(self, geometry: Geometry, error: Exception) -> LaunchError:
        """A driver's error in words."""
        return LaunchError(
            f"kernel {self.name} with {geometry} failed to launch: {error}; an illegal access of an earlier kernel "
            "also shows here: run under compute-sanitizer, or with VIDRIAL_TARGET=host"
        )


_HERE: contextlib.AbstractContextManager[object] = contextlib.nullcontext()


class Launch:
    """A kernel with its geometry and its parameter struct: all that is left to give is the stream, and pointers in `packed`.

    `packed` stays where it is for as long as this lives; its bytes are read while `run` lasts. The kernel's device must be current.

    Raises (when made):
        ArgumentError: the parameter struct is empty or too large. LaunchError: the device has not so much shared memory.
    """

    def __init__(self, binary: Binary, geometry: Geometry, packed: bytearray) -> None:
        self.binary, self.geometry = binary, geometry
        self._parameters = pointer_to(packed)  # kept: the driver is given its address
        self._empty, self._error = geometry.empty, binary.driver.CUDADriverError
        if not self._empty:
            binary.allow(geometry.smem)
        self._launch = binary.driver.launchKernel
        self._arguments = (binary.function, *geometry.grid, geometry.block, 1, 1, geometry.smem)
        self._address = ctypes.addressof(self._parameters)

    def run(self, stream: int) -> None:
        """Enqueue on `stream`; an empty grid launches nothing.

        Raises:
            LaunchError: the driver refuses the launch, or an earlier error of this context comes to light.
        """
        if self._empty:
            return
        try:
            self._launch(*self._arguments, stream, self._address, 0)
        except self._error as error:
            raise self.binary.refused(self.geometry, error) from error


def pointer_to(packed: bytearray) -> ctypes.Array[ctypes.c_void_p]:
    """The `void*[1]` that cuLaunchKernel takes; it keeps `packed` where it is for as long as it lives.

    Raises:
        ArgumentError: the parameter struct is empty or too large.
    """
    if not 0 < len(packed) <= PARAMETER_BYTES:
        raise ArgumentError(f"the parameter struct has {len(packed)} bytes; accepted are 1 to {PARAMETER_BYTES}: pass a pointer to more")
    struct = (ctypes.c_char * len(packed)).from_buffer(packed)
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(struct))
    parameters.struct = struct  # type: ignore[attr-defined]
    return parameters
