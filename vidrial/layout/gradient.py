"""The tiles of attention's backward pass: the four products of a block and the copies of its operands, by mma.sync."""

from __future__ import annotations

import dataclasses
from typing import Any

from vidrial.dtypes import DType
from vidrial.errors import LayoutError
from vidrial.layout.atoms import MMA_16x8x16, cp_async
from vidrial.layout.copies import TiledCopy
from vidrial.layout.mma import TiledMma
from vidrial.layout.smem import SmemLayout


@dataclasses.dataclass(frozen=True)
class GradientTiles:
    """What `vidrial::BlockGradient` takes of a `struct Tiles`: XA (scores = X A^T), WB (their gradients' part W B^T), DX (dX += gradients A) and
    DW (dW += weights B), whose A operands are XA's accumulators.
    """

    X: SmemLayout
    W: SmemLayout
    A: SmemLayout
    B: SmemLayout
    XA: TiledMma
    WB: TiledMma
    DX: TiledMma
    DW: TiledMma
    CopyX: TiledCopy
    CopyW: TiledCopy
    CopyA: TiledCopy
    CopyB: TiledCopy

    @property
    def members(self) -> dict[str, Any]:
        """Name -> member, for `Tiles(**members)`; a kernel adds `stage_bytes`, the bytes of a stage of its ring, and `values`, whether it wants dW."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def gradient_tiles(
    x: SmemLayout, w: SmemLayout, a: SmemLayout, b: SmemLayout, warps: int, *, weights: DType = DType.bfloat16
) -> GradientTiles:
    """The products and copies of a CTA of `warps` warps, each with a band of rows: tokens that stay, `x` rows x d and `w` rows x e, and those that
    come by, `a` block x d and `b` block x e.

    Args:
        weights: the type in which weights, and gradients of scores, meet `a` and `b`, which are converted to it in registers.

    Raises:
        LayoutError: the tiles do not fit each other, or the warps cannot share them.
    """
    if (
        w.rows != x.rows
        or b.rows != a.rows
        or a.columns != x.columns
        or b.columns != w.columns
        or len({x.dtype, w.dtype, a.dtype, b.dtype}) > 1
    ):
        raise LayoutError(
            f"a gradient takes x of rows x d, w of rows x e, a of block x d, b of block x e, of one dtype; got {x.rows} x {x.columns} {x.dtype}, "
            f"{w.rows} x {w.columns} {w.dtype}, {a.rows} x {a.columns} {a.dtype}, {b.rows} x {b.columns} {b.dtype}"
        )
    inner, outer, share, threads = MMA_16x8x16[x.dtype], MMA_16x8x16[weights], (warps, 1), 32 * warps
    scores = TiledMma(outer, share, (x.rows, a.rows, x.columns), bands=True).accumulator
    a_weights, b_weights = (dataclasses.replace(tile, dtype=weights).transposed for tile in (a, b))
    copy = cp_async(16, zero_fill=True)
    return GradientTiles(
        x,
        w,
        a,
        b,
        TiledMma(inner, share, (x.rows, a.rows, x.columns), a=x, b=a, bands=True),
        TiledMma(inner, share, (x.rows, b.rows, w.columns), a=w, b=b, bands=True),
        TiledMma(outer, share, (x.rows, x.columns, a.rows), a=scores, b=a_weights, bands=True),
        TiledMma(outer, share, (x.rows, w.columns, b.rows), a=scores, b=b_weights, bands=True),
        *(TiledCopy(copy, tile, threads) for tile in (x, w, a, b)),
    )
