"""A TensorMap as the GPU's driver encodes it: 128 bytes that a kernel takes by value."""

from __future__ import annotations

import ctypes

from vidrial.dtypes import DType
from vidrial.errors import LaunchError
from vidrial.layout.tma import TensorMap
from vidrial.spec.source import TENSOR_MAP_BYTES

POINTER_ALIGNMENT, LINE_BYTES = 16, 128


def encode(tensor: TensorMap, pointer: int) -> bytes:
    """The bytes for an array at `pointer`. Needs a driver, no GPU's attention: the same map and pointer always give the same bytes.

    Raises:
        LaunchError: the driver refuses the map, or the array is not aligned to 16 bytes.
    """
    from cuda.bindings import driver

    tile = tensor.tile
    if pointer % POINTER_ALIGNMENT:
        raise LaunchError(
            f"tensor map of {tensor.array}: the array lies at {pointer:#x}; TMA takes multiples of {POINTER_ALIGNMENT}: copy the array"
        )
    kinds, swizzles = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle
    kind = {
        DType.bfloat16: kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        DType.float16: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        DType.float32: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    }[tile.tile.dtype]
    swizzle = (
        swizzles.CU_TENSOR_MAP_SWIZZLE_NONE,
        swizzles.CU_TENSOR_MAP_SWIZZLE_32B,
        swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
        swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
    )[tile.swizzle_bits]
    # Two lines of the L2 at once; not where rows begin inside of one, for then every line would be read twice (0.79 -> 0.83 of cuBLAS).
    promotions, at = driver.CUtensorMapL2promotion, (pointer + tensor.offset * tile.tile.dtype.bytes, *tensor.byte_strides)
    whole = all(place % LINE_BYTES == 0 for place in at)
    promotion = promotions.CU_TENSOR_MAP_L2_PROMOTION_L2_256B if whole else promotions.CU_TENSOR_MAP_L2_PROMOTION_L2_128B
    error, encoded = driver.cuTensorMapEncodeTiled(
        kind,
        len(tensor.dims),
        pointer + tensor.offset * tile.tile.dtype.bytes,
        [driver.cuuint64_t(extent) for extent in tensor.dims],
        [driver.cuuint64_t(stride) for stride in tensor.byte_strides],
        [driver.cuuint32_t(extent) for extent in tile.box],
        [driver.cuuint32_t(1)] * len(tensor.dims),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle,
        promotion,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if int(error):
        raise LaunchError(
            f"the driver refuses the tensor map of {tensor.array} ({error.name}): extents {tensor.dims}, strides {tensor.byte_strides} bytes, box {tile.box}"
        )
    return ctypes.string_at(int(encoded.getPtr()), TENSOR_MAP_BYTES)
