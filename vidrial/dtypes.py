"""Element types: one table, used by rendering, layouts, arrays and the host."""

from __future__ import annotations

import enum

from vidrial.errors import ArgumentTypeError


class DType(enum.Enum):
    """An element type: `name` as NumPy and torch spell it, bits, and its C++ type on the device."""

    bfloat16 = ("bfloat16", 16, "cutlass::bfloat16_t")
    float16 = ("float16", 16, "cutlass::half_t")
    float32 = ("float32", 32, "float")
    int32 = ("int32", 32, "int32_t")
    uint8 = ("uint8", 8, "uint8_t")

    def __init__(self, label: str, bits: int, cpp: str) -> None:
        self.label = label
        self.bits = bits
        self.cpp = cpp

    @property
    def bytes(self) -> int:
        """Size of one element in bytes."""
        return self.bits // 8

    @classmethod
    def of(cls, dtype: object) -> DType:
        """The DType of a NumPy, CuPy, torch or JAX dtype, or of its name.

        Raises:
            ArgumentTypeError: the type is not in the table.
        """
        if isinstance(dtype, DType):
            return dtype
        label = str(getattr(dtype, "name", dtype)).removeprefix("torch.")
        try:
            return cls[label]
        except KeyError:
            raise ArgumentTypeError(f"dtype {label!r} is not known; accepted: {', '.join(cls.__members__)}") from None

    def __repr__(self) -> str:
        return f"DType.{self.name}"

    def __str__(self) -> str:
        return self.name
