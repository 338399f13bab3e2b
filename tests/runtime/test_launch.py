from __future__ import annotations

import ctypes
import struct
from typing import Any

import pytest

from vidrial.errors import ArgumentError, LaunchError
from vidrial.runtime.launch import Binary, pointer_to
from vidrial.spec.geometry import Geometry


class FakeDriver:
    """Records launches and reads the parameters back as the driver would: through the void**, at once."""

    class CUDADriverError(RuntimeError):
        pass

    def __init__(self, size: int) -> None:
        self.size = size
        self.launches: list[tuple[Any, ...]] = []
        self.asked: list[int] = []
        self.error: str | None = None

    def launchKernel(self, *values: int) -> None:  # noqa: N802
        if self.error:
            raise self.CUDADriverError(self.error)
        *geometry, stream, parameters, extra = values
        address = ctypes.c_void_p.from_address(parameters).value
        assert address is not None and extra == 0
        self.launches.append((*geometry, stream, ctypes.string_at(address, self.size)))

    def funcSetAttribute(self, function: int, attribute: int, value: int) -> None:  # noqa: N802
        assert (function, attribute) == (77, 8)
        self.asked.append(value)


class FakeRuntime:
    def getDevice(self) -> int:  # noqa: N802
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver(24)
    monkeypatch.setattr("cupy.cuda.driver", fake)
    monkeypatch.setattr("cupy.cuda.runtime", FakeRuntime())
    return fake


@pytest.fixture
def binary(driver: FakeDriver) -> Binary:
    return Binary(object(), 77, "tiny", 0, 232448)


def test_one_struct_by_value(driver: FakeDriver, binary: Binary) -> None:
    packed = bytearray(struct.pack("@qPif", -3, 0x7F00_1234_5678, 41, 0.5))
    binary.launch(Geometry((5, 3, 2), 128, 1024), packed, 99)
    assert driver.launches == [(77, 5, 3, 2, 128, 1, 1, 1024, 99, bytes(packed))]
    struct.pack_into("@P", packed, 8, 0x1000)
    binary.launch(Geometry((1, 1, 1), 32), packed, 0)
    assert struct.unpack("@qPif", driver.launches[1][-1]) == (-3, 0x1000, 41, 0.5)
    assert driver.asked == []


def test_pointer_keeps_the_struct_in_place() -> None:
    packed = bytearray(b"0123456789abcdef")
    parameters = pointer_to(packed)
    assert ctypes.string_at(parameters[0], 16) == bytes(packed)
    packed[3:5] = b"XY"
    assert ctypes.string_at(parameters[0], 16) == b"012XY56789abcdef"
    with pytest.raises(BufferError):
        packed.append(0)
    del parameters
    packed.append(0)


@pytest.mark.parametrize("size", [0, 4097])
def test_parameter_size(binary: Binary, size: int) -> None:
    with pytest.raises(ArgumentError, match=f"has {size} bytes.*1 to 4096"):
        binary.launch(Geometry((1, 1, 1), 32), bytearray(size), 0)


def test_large_shared_memory_is_asked_for_once(driver: FakeDriver, binary: Binary) -> None:
    for smem in (48 << 10, (48 << 10) + 1, 100_000, 60_000, 232448):
        binary.launch(Geometry((1, 1, 1), 32, smem), bytearray(24), 0)
    assert driver.asked == [(48 << 10) + 1, 100_000, 232448] and len(driver.launches) == 5
    with pytest.raises(LaunchError, match="tiny asks for 232449 bytes.*has 232448"):
        binary.launch(Geometry((1, 1, 1), 32, 232449), bytearray(24), 0)
    assert len(driver.launches) == 5


@pytest.mark.parametrize("grid", [(0, 1, 1), (1, 0, 1), (7, 3, 0)])
def test_an_empty_grid_launches_nothing(driver: FakeDriver, binary: Binary, grid: tuple[int, int, int]) -> None:
    binary.launch(Geometry(grid, 32), bytearray(24), 0)
    assert driver.launches == []


def test_a_refused_launch_names_kernel_and_geometry(driver: FakeDriver, binary: Binary) -> None:
    driver.error = "CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered"
    with pytest.raises(LaunchError, match=r"kernel tiny with Geometry\(grid=\(5, 1, 1\), block=64, smem=0\).*ILLEGAL_ADDRESS"):
        binary.launch(Geometry((5, 1, 1), 64), bytearray(24), 0)


@pytest.mark.parametrize("grid", [(2**31 - 1, 1, 1), (1, 65535, 1), (1, 1, 65535)])
def test_largest_grids(grid: tuple[int, int, int]) -> None:
    assert Geometry(grid, 1024, 0).grid == grid


@pytest.mark.parametrize(
    ("grid", "block", "smem", "named"),
    [
        ((2**31, 1, 1), 32, 0, "grid"),
        ((1, 65536, 1), 32, 0, "grid"),
        ((1, 1, 65536), 32, 0, "grid"),
        ((-1, 1, 1), 32, 0, "grid"),
        ((1, 1), 32, 0, "grid"),
        ((1, 1, 1), 0, 0, "block of 0"),
        ((1, 1, 1), 1025, 0, "block of 1025"),
        ((1, 1, 1), 32, -1, "shared memory of -1"),
    ],
)
def test_impossible_geometry(grid: Any, block: int, smem: int, named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        Geometry(grid, block, smem)
