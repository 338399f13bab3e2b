"""The units of the host target on a GPU: what g++ and NVRTC make of the same source must agree with NumPy."""

from __future__ import annotations

import struct

import pytest
from units import Case, cases, pieces

from vidrial.build.nvrtc import compile_source
from vidrial.device import Device
from vidrial.runtime.launch import Binary
from vidrial.runtime.tensor_map import encode
from vidrial.spec.geometry import Geometry
from vidrial.spec.source import TENSOR_MAP_BYTES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", [*cases(), *pieces.cases()], ids=lambda case: case.name)
def test_unit(case: Case) -> None:
    import cupy

    arch = Device.current().arch
    if case.arch not in (None, arch):
        pytest.skip(f"only {case.arch} has this instruction, the GPU is {arch}")
    binary = Binary.load(compile_source(case.source, case.name, arch), "unit")
    arrays = [cupy.asarray(array) for array in case.arrays]
    packed = bytearray(case.packed)
    first = TENSOR_MAP_BYTES * len(case.maps)
    for i, map in enumerate(case.maps):
        packed[TENSOR_MAP_BYTES * i : TENSOR_MAP_BYTES * (i + 1)] = encode(map, arrays[int(map.array)].data.ptr)
    for i, array in enumerate(arrays):
        struct.pack_into("P", packed, first + 8 * i, array.data.ptr)
    binary.launch(Geometry((case.ctas, 1, 1), case.block, case.shared_bytes), packed, cupy.cuda.get_current_stream().ptr)
    for host, array in zip(case.arrays, arrays, strict=True):
        host[...] = array.get()
    case.check()
