"""The library's pieces, each in one small kernel: copies with tails, rings, reductions, masks, the loop of attention, an epilogue."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np

from units import RNG_SEED, Array, Case, bf16_bits, bf16_values, text
from vidrial.dtypes import DType
from vidrial.layout.atoms import VECTOR, CopyAtom, MMA_16x8x16, cp_async
from vidrial.layout.attention import attention_tiles
from vidrial.layout.copies import TiledCopy
from vidrial.layout.epilogue import Epilogue
from vidrial.layout.mma import TiledMma
from vidrial.layout.smem import Pipeline, SharedMemory, SmemLayout
from vidrial.layout.wgmma import WarpgroupMma
from vidrial.spec.source import Tiles

BF16, FLOAT = DType.bfloat16, DType.float32
NAN_BITS, UNTOUCHED = 0xFFFF, 0x1234


def tiled_copy(atom: CopyAtom, dtype: DType, stride: int, rows: int, columns: int, tile_rows: int = 32) -> Case:
    """What does not exist is zero in shared memory: NaN, or nothing, lies there in global memory."""
    tile = SmemLayout(dtype, tile_rows, 64, stages=2)
    copy = TiledCopy(atom, tile, 128)
    rng, kind = np.random.default_rng(RNG_SEED), np.uint16 if dtype.bytes == 2 else np.uint32
    source = np.full((rows, stride), -1 if dtype.bytes == 4 else NAN_BITS).astype(kind)
    source[:, :columns] = rng.integers(1, 60000, (rows, columns))
    # The last row ends where its last element does.
    source = source.ravel()[: max((rows - 1) * stride + columns, 1)]
    expected = np.zeros((tile.rows, 64), kind)
    for row in range(rows):
        expected[row, :columns] = source[row * stride : row * stride + columns]
    definitions = (
        f"using Tile = {tile.cpp};",
        f"using Copy = {copy.cpp};",
        "#define THREADS 128",
        f"#define ROWS {tile.rows}",
        "#define COLUMNS 64",
    )
    name = f"tiled_copy-{atom.bytes}-{dtype}-{stride}-{rows}-{columns}-{tile.rows}"
    arrays = [source, np.full_like(expected, 7)]
    return Case(name, text("tiled_copy.cu", *definitions), 128, 2 * tile.bytes, arrays, (stride, rows, columns), {1: (expected, 0.0)})


def ring(pipeline: Pipeline, items: int, unroll: bool = False) -> Case:
    """Each item once, in its turn; with what has landed behind it, and what may still be read before it."""
    source = np.random.default_rng(RNG_SEED).integers(1, 1000, (items, 64)).astype(np.int32)
    turned, zero = source[:, ::-1], np.zeros((1, 64), np.int32)
    expected = turned.copy()
    expected[0] += turned[0]
    if pipeline.ahead:
        expected += 3 * np.concatenate([turned[1:], zero])
    if pipeline.read > 1:
        expected += 5 * np.concatenate([zero, turned[:-1]])
    facts = {"STAGES": pipeline.stages, "READ": pipeline.read, "AHEAD": pipeline.ahead, "UNROLL": int(unroll)}
    name = f"ring-{pipeline.stages}-{pipeline.read}-{pipeline.ahead}-{items}"
    source_text = text("ring.cu", *(f"#define {key} {value}" for key, value in facts.items()))
    return Case(name, source_text, 64, 256 * pipeline.stages, [source, np.zeros_like(source)], (items,), {1: (expected, 0.0)})


def reduce(threads: int) -> Case:
    """Small integers: exact in any order."""
    x = np.random.default_rng(RNG_SEED).integers(-9, 10, 128).astype(np.float32)
    groups = x.reshape(-1, threads)
    sums, largest = groups.sum(1), groups.max(1)
    times = (groups == largest[:, None]).sum(1)
    spread = lambda values: np.repeat(values, threads)  # noqa: E731
    expected = {1: (np.stack([spread(sums), spread(2 * sums)]), 0.0), 2: (spread(largest), 0.0), 3: (spread(times), 0.0)}
    arrays = [x, np.zeros((2, 128), np.float32), np.zeros(128, np.float32), np.zeros(128, np.float32)]
    return Case(f"reduce-{threads}", text("reduce.cu", f"#define THREADS {threads}"), 128, 0, arrays, (), expected)


def masks(rows: int = 128, keys: int = 100, block: int = 16, band: int = 16) -> Case:
    """The blocks are those that single keys ask for."""
    row, key = np.ogrid[:rows, :keys]
    seen = np.stack(
        [(key <= row), (key <= row) & (row - key < 37), (key < keys - 5) & (row > -1), (key <= row) & (row - key < 20) & (key < keys - 21)]
    )
    blocks = np.zeros((4, rows // band, 4), int)
    for rule, first in np.ndindex(4, rows // band):
        part = seen[rule, first * band : (first + 1) * band]
        padded = np.zeros((band, -(-max(keys, rows) // block) * block), bool)
        padded[:, :keys] = part
        # Rules of rows speak of keys that do not exist, too, unless Tail is one of them.
        if rule < 2:
            r, k = first * band + np.arange(band)[:, None], np.arange(padded.shape[1])
            padded = (k <= r) & ((r - k < 37) | (rule == 0))
        tiles = padded.reshape(band, -1, block)
        some, every = tiles.any((0, 2)), tiles.all((0, 2))
        if some.any():
            begin, end = int(some.argmax()), int(len(some) - some[::-1].argmax())
        else:
            begin = end = -1
        blocks[rule, first] = begin, *((int(every.argmax()), int(len(every) - every[::-1].argmax())) if every.any() else (-1, -1)), end
    case = Case(
        f"mask-{rows}-{keys}",
        text("mask.cu", f"#define KEYS {block}", f"#define ROWS {band}"),
        32,
        0,
        [np.full((4, rows, keys), 9, np.int32), np.full(blocks.shape, -9, np.int32)],
        (rows, keys),
        {0: (seen.astype(np.int32), 0.0)},
    )
    return BlocksCase(**vars(case), blocks=blocks)


class BlocksCase(Case):
    """Blocks that nobody sees may be any empty range, and so may those that no row sees as a whole."""

    def __init__(self, blocks: Array, **case: Any) -> None:
        super().__init__(**case)
        self.blocks = blocks

    def check(self) -> None:
        super().check()
        for index in np.ndindex(*self.blocks.shape[:-1]):
            begin, whole_begin, whole_end, end = (int(x) for x in self.blocks[index])
            got = tuple(int(x) for x in self.arrays[1][index])
            assert got[0] <= got[1] <= got[2] <= got[3], (index, got)
            assert (got[0], got[3]) == (begin, end) if end >= 0 else got[0] == got[3], (index, got, self.blocks[index])
            assert (got[1], got[2]) == (whole_begin, whole_end) if whole_end >= 0 else got[1] == got[2], (index, got, self.blocks[index])


RULES = {
    "causal": ("Causal{}", lambda row, key, keys: key <= row),
    "window": ("Both<Window, Tail>{Window{90}, Tail{args.keys}}", lambda row, key, keys: (key <= row) & (row - key < 90)),
    "tail": ("Tail{args.keys}", lambda row, key, keys: (key < keys) & (row > -1)),
}


def attention(mma: str, order: str, rule: str, *, dtype: DType = BF16, keys: int = 64, stages: int = 3, m: int = 2, d: int = 64) -> Case:
    """Softmax(q k^T / 8) v of 253 rows and keys, or 16 more keys where all are seen, within bfloat16's rounding."""
    warps, total = 8, 253 if rule != "tail" else 269
    rows = 16 * m * warps
    rng = np.random.default_rng(RNG_SEED)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((min(253, rows), d), (total, d), (total, d)))
    tiles_q = SmemLayout(dtype, rows, d)
    tiles_k, tiles_v = SmemLayout(dtype, keys, d, stages=stages), SmemLayout(dtype, keys, d, stages=stages)
    parts = attention_tiles(tiles_q, tiles_k, tiles_v, warps, mma=mma, weights=dtype)
    stage_bytes = tiles_k.bytes + tiles_v.bytes
    tiles = Tiles(
        threads=32 * warps,
        smem=SharedMemory(Q=tiles_q, Ring=stages * stage_bytes),
        Elem=dtype,
        d=d,
        e=d,
        rows=rows,
        keys=keys,
        stages=stages,
        stage_bytes=stage_bytes,
        **parts.members,
    )
    spelled, seen = RULES[rule]
    encode = bf16_bits if dtype == BF16 else lambda x: x.astype(np.float16).view(np.uint16)
    decode = bf16_values if dtype == BF16 else lambda x: x.view(np.float16).astype(np.float32)
    arrays = [np.ascontiguousarray(encode(x)) for x in (q, k, v)]
    q, k, v = (decode(x).astype(np.float64) for x in arrays)

    @cache
    def expected() -> Array:
        scores = np.where(seen(np.arange(len(q))[:, None], np.arange(total), total), q @ k.T / 8, -np.inf)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        return weights / weights.sum(1, keepdims=True) @ v

    definitions = [tiles.cpp, f"#define ORDER vidrial::{order}", f"#define RULE {spelled}"]
    if mma == "wgmma":
        definitions.insert(0, "#include <vidrial/tile/wgmma.cuh>")
    name = f"attention-{mma}-{order}-{rule}-{dtype}-{keys}-{m}"
    output = np.full(q.shape, NAN_BITS, np.uint16)
    source = text("attention.cu", "#include <vidrial/tile/mma.cuh>", *definitions)
    case = Case(name, source, 32 * warps, tiles.smem_bytes, [*arrays, output], (len(q), total), {}, "sm_90a" if mma == "wgmma" else None)
    return RoundedCase(**vars(case), index=3, exact=expected, decode=decode, tolerance=2e-2)


class RoundedCase(Case):
    """One array holds 16-bit floats, to be compared with `exact()` within `tolerance` of its largest value; NaN is never right."""

    def __init__(self, index: int, exact: Callable[[], Array], decode: Any, tolerance: float, **case: Any) -> None:
        super().__init__(**case)
        self.index, self.exact, self.decode, self.tolerance = index, exact, decode, tolerance

    def check(self) -> None:
        exact = self.exact()
        got = self.decode(self.arrays[self.index]).astype(np.float64).reshape(exact.shape)
        wrong = ~(np.abs(got - exact) <= self.tolerance * np.abs(exact).max())
        where = np.argwhere(wrong)[:4].tolist()
        assert not wrong.any(), f"{self.name} at {where}: {got[wrong][:4]}, not {exact[wrong][:4]}"


def gemm(
    mma: str,
    sizes: tuple[int, int, int],
    strides: tuple[int, int, int],
    atoms: tuple[CopyAtom, CopyAtom],
    *,
    out: DType = BF16,
    tile: tuple[int, int, int] = (128, 64, 64),
    stages: int = 3,
    ahead: int = 0,
    stepwise: bool = False,
    shared: bool = False,
) -> Case:
    """gelu(A B^T + bias) of any rows, columns, depth (`sizes`); beyond them lies NaN, and C keeps what it held."""
    (rows, columns, depth), (m, n, k) = sizes, tile
    rng = np.random.default_rng(RNG_SEED)
    a, b = (np.full((count, stride), NAN_BITS, np.uint16) for count, stride in ((rows, strides[0]), (columns, strides[1])))
    a[:, :depth], b[:, :depth] = (bf16_bits(rng.standard_normal((count, depth))) for count in (rows, columns))
    bias = rng.standard_normal(columns).astype(np.float32)
    x = bf16_values(a[:, :depth]).astype(np.float64) @ bf16_values(b[:, :depth]).T + bias
    exact = x / 2 * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3)))
    ta, tb, tc = SmemLayout(BF16, m, k, stages=stages), SmemLayout(BF16, n, k, stages=stages), SmemLayout(out, m, n)
    product: TiledMma | WarpgroupMma
    if mma == "wgmma":
        product = WarpgroupMma(BF16, 1, tile, tb, ta)
    else:
        product = TiledMma(MMA_16x8x16[BF16], (2, 2), tile, ta, tb)
    tiles = Tiles(
        threads=product.threads,
        # Where C lies among A's stages, it is put there behind a barrier.
        smem=SharedMemory(A=ta, B=tb) if shared else SharedMemory(A=ta, B=tb, Out=tc),
        Elem=BF16,
        depth=k,
        A=ta,
        B=tb,
        Out=tc,
        Mma=product,
        CopyA=TiledCopy(atoms[0], ta, product.threads),
        CopyB=TiledCopy(atoms[0], tb, product.threads),
        Ring=Pipeline(stages, read=2 if mma == "wgmma" else 1, ahead=ahead),
        Epilogue=Epilogue(product, tc, atoms[1]),
    )
    includes = ["vidrial/collective/epilogue.cuh", "vidrial/pipeline/ring.cuh", *["vidrial/tile/wgmma.cuh"] * (mma == "wgmma")]
    definitions = [
        *(f"#include <{name}>" for name in includes),
        f"#define STEPWISE {int(stepwise)}",
        f"#define OUT {'A' if shared else 'Out'}",
        tiles.cpp,
    ]
    if out == FLOAT:
        c: Array = np.full((rows, strides[2]), math.pi, np.float32)
    else:
        c = np.full((rows, strides[2]), UNTOUCHED, np.uint16)
    name = f"gemm-{mma}-{rows}x{columns}x{depth}-{atoms[0].bytes}-{atoms[1].bytes}-{out}-{n}" + "-stepwise" * stepwise + "-shared" * shared
    source, threads = text("gemm_pieces.cu", *definitions), product.threads
    case = Case(name, source, threads, tiles.smem_bytes, [a, b, bias, c], (*sizes, *strides), {}, "sm_90a" if mma == "wgmma" else None)
    return GemmCase(**vars(case), exact=exact, columns=columns, out=out)


class GemmCase(Case):
    """C within its rounding, and untouched beyond its columns."""

    def __init__(self, exact: Array, columns: int, out: DType, **case: Any) -> None:
        super().__init__(**case)
        self.exact, self.columns, self.out = exact, columns, out

    def check(self) -> None:
        c = self.arrays[3]
        beyond = c[:, self.columns :]
        assert (beyond == (np.float32(math.pi) if self.out == FLOAT else UNTOUCHED)).all(), self.name
        got = c[:, : self.columns] if self.out == FLOAT else bf16_values(np.ascontiguousarray(c[:, : self.columns]))
        tolerance = (1e-5 if self.out == FLOAT else 2.0**-8) * np.abs(self.exact) + 1e-4
        wrong = ~(np.abs(got.astype(np.float64) - self.exact) <= tolerance)
        assert not wrong.any(), f"{self.name} at {np.argwhere(wrong)[:4].tolist()}: {got[wrong][:4]}, not {self.exact[wrong][:4]}"


def copies() -> Iterator[Case]:
    """Each piece's size, with every kind of tail; a tile with more steps than are unrolled."""
    wide, eight, four = (cp_async(size) for size in (16, 8, 4))
    yield tiled_copy(wide, BF16, 64, 32, 64)
    yield tiled_copy(wide, BF16, 72, 29, 51)
    yield tiled_copy(wide, BF16, 64, 1, 3)
    yield tiled_copy(eight, BF16, 52, 30, 50)
    yield tiled_copy(eight, BF16, 68, 32, 64)
    yield tiled_copy(four, BF16, 50, 31, 49)
    yield tiled_copy(four, BF16, 66, 17, 64)
    yield tiled_copy(VECTOR[2], BF16, 63, 31, 63)
    yield tiled_copy(VECTOR[2], BF16, 65, 32, 64)
    yield tiled_copy(wide, FLOAT, 64, 15, 61)
    yield tiled_copy(four, FLOAT, 59, 16, 59)
    yield tiled_copy(eight, BF16, 60, 131, 57, 160)


def cases() -> Iterator[Case]:
    """Every piece."""
    yield from copies()
    for stages, read, ahead, items in ((2, 1, 0, 7), (3, 1, 1, 5), (4, 2, 0, 9), (5, 2, 1, 11), (5, 2, 2, 2), (3, 2, 0, 1)):
        yield ring(Pipeline(stages, read=read, ahead=ahead), items, unroll=stages == 5)
    for threads in (4, 32, 64, 128):
        yield reduce(threads)
    yield masks()
    for mma in ("sync", "wgmma"):
        for order in ("Serial", "Overlapped"):
            for rule in RULES:
                yield attention(mma, order, rule)
    yield attention("sync", "Serial", "causal", dtype=DType.float16, keys=32, stages=2)
    # One part of 64 rows, and four: of one alone the product before it still reads the weights.
    yield attention("wgmma", "Overlapped", "causal", m=1)
    yield attention("wgmma", "Overlapped", "window", m=1, keys=32)
    yield attention("wgmma", "Serial", "window", m=1, keys=128)
    wide, eight, four = (cp_async(size) for size in (16, 8, 4))
    for mma in ("sync", "wgmma"):
        yield gemm(mma, (128, 64, 320), (320, 320, 64), (wide, VECTOR[16]))
        yield gemm(mma, (97, 51, 148), (148, 148, 52), (eight, VECTOR[8]))
        yield gemm(mma, (128, 50, 66), (66, 66, 50), (four, VECTOR[4]), out=FLOAT)
        yield gemm(mma, (97, 51, 212), (212, 212, 52), (eight, VECTOR[8]), shared=True)
        yield gemm(mma, (3, 63, 129), (129, 129, 63), (VECTOR[2], VECTOR[2]))
        yield gemm(mma, (128, 128, 200), (200, 208, 136), (wide, VECTOR[16]), tile=(128, 128, 64), stages=4, ahead=1, stepwise=True)
