"""Element types: one table, used by rendering, layouts, arrays and the host."""

from __future__ import annotations

import enum
import functools
from typing import TYPE_CHECKING, Any

from vidrial.errors import ArgumentTypeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray


class DType(enum.Enum):
    """An element type: `label` as NumPy and torch spell it, bits and bytes of an element, and `cpp`, its type in device code."""

    bfloat16 = ("bfloat16", 16, "cutlass::bfloat16_t")
    float16 = ("float16", 16, "cutlass::half_t")
    float32 = ("float32", 32, "float")
    int32 = ("int32", 32, "int32_t")
    uint8 = ("uint8", 8, "uint8_t")

    def __init__(self, label: str, bits: int, cpp: str) -> None:
        # Plain attributes: proofs of addresses read them many thousand times.
        self.label = label
        self.bits = bits
        self.bytes = bits // 8
        self.cpp = cpp

    # Enum's own hash is Python code, and every call looks several types up.
    __hash__ = object.__hash__

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def of(dtype: object) -> DType:
        """The DType of a NumPy, CuPy, torch or JAX dtype, or of its name.

        Raises:
            ArgumentTypeError: the type is not in the table.
        """
        if isinstance(dtype, DType):
            return dtype
        spelled = str(getattr(dtype, "name", dtype)).removeprefix("torch.")
        try:
            return DType[spelled]
        except KeyError:
            raise ArgumentTypeError(f"dtype {spelled!r} is not known; accepted: {', '.join(DType.__members__)}") from None

    def round(self, x: ArrayLike) -> NDArray[Any]:
        """A NumPy array of floats in this type, nearest even; bfloat16, which NumPy lacks, as the uint16 of its bits."""
        import numpy as np

        if self is not DType.bfloat16:
            return np.asarray(x).astype(self.label)
        words = np.ascontiguousarray(x, np.float32).view(np.uint32)
        return ((words + 0x7FFF + (words >> 16 & 1)) >> 16).astype(np.uint16)

    def widen(self, x: NDArray[Any]) -> NDArray[np.float64]:
        """The float64 values of a NumPy array of this type (bfloat16 as uint16), exact."""
        import numpy as np

        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64) if self is DType.bfloat16 else x.astype(np.float64)

    def __repr__(self) -> str:
        return f"DType.{self.name}"

    def __str__(self) -> str:
        return self.name
