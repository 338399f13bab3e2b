"""A TensorMap as the host target has it: a struct of its own in the 128 bytes, with names for messages."""

from __future__ import annotations

import struct

from vidrial.layout.tma import RANK_LIMIT, TensorMap

# NOTE: as vidrial::host::TensorMap in host/runtime.h: base, offset, strides, extents, box, rank, bytes of an element, swizzle, mark, name.
LAYOUT, MARK, NAME_BYTES = struct.Struct("=QqQQQQ5I5I4B28s8x"), 0xA7, 28


def pack(tensor: TensorMap, name: str) -> bytes:
    """The 128 bytes of argument `name`; the array's address goes to their first eight."""
    tile, size = tensor.tile, tensor.tile.tile.dtype.bytes

    def filled(values: tuple[int, ...], count: int) -> tuple[int, ...]:
        return (*values, *(1 for _ in range(count - len(values))))

    return LAYOUT.pack(
        0,
        tensor.offset * size,
        *filled(tensor.byte_strides, RANK_LIMIT - 1),
        *filled(tensor.dims, RANK_LIMIT),
        *filled(tile.box, RANK_LIMIT),
        len(tensor.dims),
        size,
        tile.swizzle_bits,
        MARK,
        name.encode()[: NAME_BYTES - 1],
    )
