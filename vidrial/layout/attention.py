"""The tiles of attention: both products and the copies of queries, keys and values, by mma.sync or wgmma."""

from __future__ import annotations

import dataclasses
from typing import Any

from vidrial.dtypes import DType
from vidrial.errors import LayoutError
from vidrial.layout.atoms import MMA_16x8x16, cp_async
from vidrial.layout.copies import TiledCopy
from vidrial.layout.mma import TiledMma
from vidrial.layout.smem import SmemLayout
from vidrial.layout.wgmma import WarpgroupMma


@dataclasses.dataclass(frozen=True)
class AttentionTiles:
    """What `vidrial::Attention` takes of a `struct Tiles`: QK (scores = Q K^T) and PV (weights times V), whose A operand is QK's accumulator.

    `warps_per_band` warps multiply `rows_per_band` neighbouring rows together.
    """

    Q: SmemLayout
    K: SmemLayout
    V: SmemLayout
    QK: TiledMma | WarpgroupMma
    PV: TiledMma | WarpgroupMma
    CopyQ: TiledCopy
    CopyK: TiledCopy
    CopyV: TiledCopy
    rows_per_band: int
    warps_per_band: int

    @property
    def members(self) -> dict[str, Any]:
        """Name -> member, for `Tiles(**members)`; a kernel adds `stage_bytes`, the bytes of a stage of its ring."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def attention_tiles(
    q: SmemLayout, k: SmemLayout, v: SmemLayout, warps: int, *, mma: str = "sync", weights: DType = DType.bfloat16
) -> AttentionTiles:
    """The products and copies of a CTA of `warps` warps: `q` rows x d, `k` keys x d, `v` keys x e.

    Args:
        mma: by which instruction: "sync", a band of rows a warp, or "wgmma", a band a warpgroup.
        weights: the type in which weights meet values: by mma.sync values are converted to it in registers, by wgmma they are of it.

    Raises:
        LayoutError: the tiles do not fit each other, or the warps cannot share them.
    """
    if k.columns != q.columns or v.rows != k.rows or not q.dtype == k.dtype == v.dtype:
        raise LayoutError(
            f"attention takes q of rows x d, k of keys x d, v of keys x e, of one dtype; got {q.rows} x {q.columns} {q.dtype}, "
            f"{k.rows} x {k.columns} {k.dtype}, {v.rows} x {v.columns} {v.dtype}"
        )
    threads, per_band = 32 * warps, {"sync": 1, "wgmma": 4}.get(mma)
    if per_band is None or warps % per_band:
        raise LayoutError(f"{warps} warps with mma={mma!r}; accepted: 'sync', or 'wgmma' of multiples of 4 warps")
    qk: TiledMma | WarpgroupMma
    pv: TiledMma | WarpgroupMma
    if mma == "wgmma":
        if v.dtype != weights:
            raise LayoutError(f"wgmma takes values as they are stored, {v.dtype}, and weights of the same type; got {weights}")
        qk = WarpgroupMma(q.dtype, warps // 4, (q.rows, k.rows, q.columns), k, q)
        pv = WarpgroupMma(weights, warps // 4, (q.rows, v.columns, k.rows), v.transposed)
    else:
        scores = TiledMma(MMA_16x8x16[weights], (warps, 1), (q.rows, k.rows, q.columns), bands=True)
        stored = dataclasses.replace(v, dtype=weights)
        qk = TiledMma(MMA_16x8x16[q.dtype], (warps, 1), (q.rows, k.rows, q.columns), a=q, b=k, bands=True)
        pv = TiledMma(MMA_16x8x16[weights], (warps, 1), (q.rows, v.columns, k.rows), a=scores.accumulator, b=stored.transposed, bands=True)
    copy = cp_async(16, zero_fill=True)
    copy_q, copy_k, copy_v = (TiledCopy(copy, tile, threads) for tile in (q, k, v))
    return AttentionTiles(q, k, v, qk, pv, copy_q, copy_k, copy_v, q.rows // warps * per_band, per_band)
