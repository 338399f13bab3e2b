"""The same two tiles in two styles: CuTe's partitions (`cute_style/`) and types that Python resolved (`resolved_style/`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidrial.dtypes import DType
from vidrial.layout.atoms import MMA_16x8x16, cp_async
from vidrial.layout.copies import TiledCopy
from vidrial.layout.mma import TiledMma
from vidrial.layout.smem import SharedMemory, SmemLayout
from vidrial.spec.source import Arguments, Source, Tiles, render

HERE = Path(__file__).parent
BF16 = DType.bfloat16


@dataclass(frozen=True)
class Pair:
    """One tile in both styles; `smem`: bytes of dynamic shared memory, the same for both."""

    name: str
    cute: Source
    ours: Source
    smem: int


def gemm(m: int = 128, n: int = 128, k: int = 64, stages: int = 3) -> Pair:
    """C [m, n] += A [m, k] B [n, k]^T by 2 x 2 warps, `stages` tiles in flight."""
    a, b = SmemLayout(BF16, m, k, stages=stages), SmemLayout(BF16, n, k, stages=stages)
    mma = TiledMma(MMA_16x8x16[BF16], warps=(2, 2), tile=(m, n, k), a=a, b=b)
    copies: dict[str, Any] = {
        "CopyA": TiledCopy(cp_async(16, zero_fill=True), a, mma.threads),
        "CopyB": TiledCopy(cp_async(16, zero_fill=True), b, mma.threads),
    }
    smem = SharedMemory(A=stages * a.bytes, B=stages * b.bytes)
    tiles = Tiles(threads=mma.threads, smem=smem, Elem=BF16, m=m, n=n, k=k, stages=stages, A=a, B=b, Mma=mma, **copies)
    args = Arguments(a="Elem const*", b="Elem const*", c="Elem*", m="int", n="int", k="int")
    ours = render(HERE / "resolved_style" / "gemm_sm80.cu.j2", "gemm", {"tiles": tiles, "args": args})
    cute = render(HERE / "cute_style" / "gemm_sm80.cu", "gemm", {"m": m, "n": n, "k": k, "stages": stages})
    return Pair(f"gemm {m}x{n}x{k}", cute, ours, smem.bytes)


def attention(d: int, rows: int = 64, keys: int = 64, warps: int = 4) -> Pair:
    """softmax(q k^T) v for `rows` queries, `keys` keys at a time, each warp a band of rows."""
    q, k = SmemLayout(BF16, rows, d), SmemLayout(BF16, keys, d)
    qk = TiledMma(MMA_16x8x16[BF16], (warps, 1), (rows, keys, d), a=q, b=k)
    pv = TiledMma(MMA_16x8x16[BF16], (warps, 1), (rows, d, keys), a=qk.accumulator, b=k.transposed)
    copies: dict[str, Any] = {
        "CopyQ": TiledCopy(cp_async(16, zero_fill=True), q, qk.threads),
        "CopyK": TiledCopy(cp_async(16, zero_fill=True), k, qk.threads),
    }
    smem = SharedMemory(Q=q, K=k, V=k)
    tiles = Tiles(threads=qk.threads, smem=smem, Elem=BF16, d=d, rows=rows, keys=keys, QK=qk, PV=pv, **copies)
    args = Arguments(q="Elem const*", k="Elem const*", v="Elem const*", o="Elem*", t="int", scale_log2="float")
    ours = render(HERE / "resolved_style" / "attention_sm80.cu.j2", "attention", {"tiles": tiles, "args": args})
    cute = render(HERE / "cute_style" / "attention_sm80.cu", "attention", {"d": d, "rows": rows, "keys": keys, "warps": warps})
    return Pair(f"attention d={d} {rows}x{keys}", cute, ours, smem.bytes)


def pairs() -> list[Pair]:
    """Every tile that stands in both styles."""
    return [gemm(), attention(128)]
