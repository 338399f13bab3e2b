"""What the driver is asked to encode, how often, and what reaches the launch; through a driver that records."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cupy
import pytest
from tma_op import Config, example, op

from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.errors import LaunchError
from vidrial.layout.algebra import Swizzle
from vidrial.layout.smem import SmemLayout
from vidrial.layout.tma import TensorMap, TmaTile
from vidrial.runtime import plan
from vidrial.runtime.launch import Binary
from vidrial.runtime.tensor_map import encode
from vidrial.tune.ranking import forget

binding = pytest.importorskip("cuda.bindings.driver")
X, Y, WORK = 0x7F0000001000, 0x7F0000900000, 0x7F0000A00000


class Encoder:
    """In place of cuTensorMapEncodeTiled: the bytes name the address."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.error = binding.CUresult.CUDA_SUCCESS
        self._kept: list[ctypes.Array[ctypes.c_char]] = []

    def __call__(self, *arguments: Any) -> tuple[Any, Any]:
        self.calls.append(arguments)
        self._kept.append(ctypes.create_string_buffer(struct.pack("Q", arguments[2]) * 16, 128))
        return self.error, SimpleNamespace(getPtr=lambda kept=self._kept[-1]: ctypes.addressof(kept))


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Encoder:
    fake = Encoder()
    monkeypatch.setattr(binding, "cuTensorMapEncodeTiled", fake)
    return fake


def test_what_the_driver_is_asked(encoder: Encoder) -> None:
    b, t, h, d = 2, 1021, 3, 128
    tensor = TensorMap(TmaTile(SmemLayout(DType.bfloat16, 64, d), ("head", "batch")), "k", (t, d, h, b), (h * d, d, t * h * d), 8)
    assert encode(tensor, X) == struct.pack("Q", X + 16) * 16
    kind, rank, address, dims, strides, box, steps, interleave, swizzle, promotion, fill = encoder.calls[0]
    assert (kind.name, rank, address) == ("CU_TENSOR_MAP_DATA_TYPE_BFLOAT16", 5, X + 16)
    assert [int(n) for n in dims] == [64, t, 2, h, b] and [int(n) for n in strides] == [h * d * 2, 128, d * 2, t * h * d * 2]
    assert [int(n) for n in box] == [64, 64, 2, 1, 1] and [int(n) for n in steps] == [1] * 5
    assert [x.name.rpartition("_")[2] for x in (interleave, swizzle, promotion, fill)] == ["NONE", "128B", "128B", "NONE"]


@pytest.mark.parametrize(
    ("row", "offset", "promotion"),
    [(384, 0, "256B"), (192, 0, "256B"), (384, 64, "256B"), (384, 8, "128B"), (200, 0, "128B"), (4088, 0, "128B")],
)
def test_two_lines_of_the_l2_come_at_once_unless_rows_begin_inside_of_one(encoder: Encoder, row: int, offset: int, promotion: str) -> None:
    encode(TensorMap(TmaTile(SmemLayout(DType.bfloat16, 64, 64)), "k", (99, 64), (row,), offset), X)
    assert encoder.calls[0][9].name.endswith(f"L2_{promotion}")


@pytest.mark.parametrize(
    ("tile", "kind", "swizzle"),
    [
        (SmemLayout(DType.float16, 8, 32), "FLOAT16", "64B"),
        (SmemLayout(DType.bfloat16, 8, 16), "BFLOAT16", "32B"),
        (SmemLayout(DType.bfloat16, 8, 24, swizzle=None), "BFLOAT16", "NONE"),
        (SmemLayout(DType.float32, 8, 32, swizzle=Swizzle(3, 2, 3)), "FLOAT32", "128B"),
    ],
    ids=str,
)
def test_kinds_and_swizzles(encoder: Encoder, tile: SmemLayout, kind: str, swizzle: str) -> None:
    encode(TensorMap(TmaTile(tile), "k", (99, tile.columns), (tile.columns,)), X)
    assert encoder.calls[0][0].name.endswith(f"TYPE_{kind}") and encoder.calls[0][8].name.endswith(f"SWIZZLE_{swizzle}")


def test_refused_in_words(encoder: Encoder) -> None:
    tensor = TensorMap(TmaTile(SmemLayout(DType.bfloat16, 64, 64)), "k", (99, 64), (64,))
    with pytest.raises(LaunchError, match="tensor map of k: the array lies at 0x7f0000001008; TMA takes multiples of 16: copy the array"):
        encode(tensor, X + 8)
    assert not encoder.calls
    encoder.error = binding.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(
        LaunchError, match=r"refuses the tensor map of k \(CUDA_ERROR_INVALID_VALUE\): extents \(64, 99\), strides \(128,\) bytes, box"
    ):
        encode(tensor, X)


class Driver:
    class CUDADriverError(RuntimeError):
        pass

    def __init__(self, size: int) -> None:
        self.size, self.launches = size, []  # type: ignore[var-annotated]

    def launchKernel(self, *values: int) -> None:  # noqa: N802
        self.launches.append(ctypes.string_at(ctypes.c_void_p.from_address(values[-2]).value or 0, self.size))

    def funcSetAttribute(self, *_: int) -> None:  # noqa: N802
        """Any size will do."""


class Runtime:
    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self, log: list[Any]) -> None:
        self.log, self.fails = log, False

    def getDevice(self) -> int:  # noqa: N802
        return 0

    def memsetAsync(self, *values: int) -> None:  # noqa: N802
        if self.fails:
            raise self.CUDARuntimeError("cudaErrorIllegalAddress")
        self.log.append(values)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A GPU whose binaries are compiled but not loaded."""
    fake = Driver(op.kernels[0].args.bytes)
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cupy.cuda, "driver", fake)
    monkeypatch.setattr(cupy.cuda, "runtime", Runtime(fake.launches))
    monkeypatch.setattr(Device, "current", classmethod(lambda cls, index=None: Device.of("h200")))
    monkeypatch.setattr(Binary, "load", classmethod(lambda cls, cubin, entry, index: Binary(cubin, 1, entry, index, 232448)))
    monkeypatch.setattr(plan, "capturing", lambda: False)
    plan._binary.cache_clear()
    forget()
    return fake


def test_a_map_is_encoded_once_per_address(driver: Driver, encoder: Encoder) -> None:
    made = plan.CudaPlan(op, example(), Config(), 0)
    for x in (X, X, X + 256, X):
        made.run({"x": x, "y": Y}, 0, 7)
    assert [call[2] for call in encoder.calls] == [X, X + 256]
    args = op.kernels[0].args
    assert [launch[args.maps["x"] :][:128] for launch in driver.launches] == [struct.pack("Q", x) * 16 for x in (X, X, X + 256, X)]
    assert all(struct.unpack_from("Q", launch, args.pointers["y"]) == (Y,) for launch in driver.launches)
    assert all(struct.unpack_from("Q", launch, args.pointers["counter"]) == (0,) for launch in driver.launches)
    # Not without end.
    for i in range(300):
        made.run({"x": X + 256 * i, "y": Y}, 0, 7)
    (kept,) = made._launches[0].maps
    assert len(kept._encoded) <= plan.MAPS_KEPT


def test_a_counter_is_zero_before_each_launch(driver: Driver, encoder: Encoder) -> None:
    made = plan.CudaPlan(op, example(), Config(kind="dynamic"), 0)
    made.run({"x": X, "y": Y}, WORK, 7)
    made.run({"x": X, "y": Y}, WORK + 512, 8)
    counter = op.kernels[0].args.pointers["counter"]
    zeroed, launch, again, second = driver.launches
    assert (zeroed, again) == ((WORK, 0, 256, 7), (WORK + 512, 0, 256, 8))
    assert [struct.unpack_from("Q", packed, counter)[0] for packed in (launch, second)] == [WORK, WORK + 512]
    cupy.cuda.runtime.fails = True
    with pytest.raises(LaunchError, match="kernel row_sums: 256 bytes of its workspace cannot be set to 0: cudaErrorIllegalAddress"):
        plan.CudaPlan(op, example(), Config(kind="dynamic"), 0).run({"x": X, "y": Y}, WORK, 7)


def test_one_launch_without_a_counter_sets_nothing(driver: Driver, encoder: Encoder) -> None:
    plan.CudaPlan(op, example(), Config(kind="static"), 0).run({"x": X, "y": Y}, 0, 7)
    assert len(driver.launches) == 1 and isinstance(driver.launches[0], bytes)
