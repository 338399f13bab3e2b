"""One small kernel for each atom and intrinsic, with inputs and NumPy's answer: run on the CPU, and unchanged on a GPU."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vidrial.dtypes import DType
from vidrial.host.tensor_map import pack
from vidrial.layout.algebra import Swizzle
from vidrial.layout.atoms import wgmma as wgmma_atom
from vidrial.layout.barriers import Barrier, Barriers, Meeting, NamedBarriers, Roles, TmaRing
from vidrial.layout.schedule import Scheduler
from vidrial.layout.smem import SharedMemory, SmemLayout
from vidrial.layout.tma import TensorMap, TmaTile
from vidrial.layout.wgmma import WarpgroupMma
from vidrial.spec.source import TENSOR_MAP_BYTES

Array = np.ndarray[Any, Any]
FOLDER = Path(__file__).parent
RNG_SEED = 20240607


@dataclasses.dataclass
class Case:
    """A launch of `ctas` CTAs of `unit`, whose arguments are the tensor maps, the arrays' addresses, then the integers.

    A map's array is named by its index.

    `expected`: index of an array -> (what it must hold afterwards, absolute tolerance). `arch`: the only architecture that has the
    instruction, if not all of them do. `counts`: what the host target must have counted, where that is certain.
    """

    name: str
    source: str
    block: int
    shared_bytes: int
    arrays: list[Array]
    integers: tuple[int, ...]
    expected: dict[int, tuple[Array, float | Array]]
    arch: str | None = None
    maps: tuple[TensorMap, ...] = ()
    ctas: int = 1
    counts: dict[str, int] | None = None

    @property
    def packed(self) -> bytes:
        """The arguments as the host target has them, with null for each pointer."""
        maps = b"".join(pack(map, f"map {i}") for i, map in enumerate(self.maps))
        rest = bytes(8 * len(self.arrays)) + struct.pack(f"{len(self.integers)}i0q", *self.integers)
        return maps + rest + bytes(-len(rest) % 64 if maps else 0)

    @property
    def pointers(self) -> dict[int, Array]:
        """Offset of each pointer, and the base of each map, -> its array."""
        first = TENSOR_MAP_BYTES * len(self.maps)
        bases = {TENSOR_MAP_BYTES * i: self.arrays[int(map.array)] for i, map in enumerate(self.maps)}
        return bases | {first + 8 * i: array for i, array in enumerate(self.arrays)}

    def check(self) -> None:
        """Compare the arrays with the answer; NaN equals nothing."""
        for index, (expected, tolerance) in self.expected.items():
            got = self.arrays[index]
            wrong = ~(np.abs(got.astype(np.float64) - expected) <= tolerance)
            where = np.argwhere(wrong)[:4].tolist()
            assert not wrong.any(), f"{self.name}, array {index} at {where}: {got[wrong][:4]}, not {expected[wrong][:4]}"


def text(file: str, *definitions: str) -> str:
    """A unit's source: the prelude, the definitions that make it one case, and the file, whose lines errors name.

    A unit that asks CuTe's traits gets CuTe's own headers, before the prelude.
    """
    unit = (FOLDER / file).read_text()
    cute = ["#include <cute/layout.hpp>"] if "#include <cute/" in unit else []
    head = [*cute, "#include <vidrial/prelude.cuh>", "#pragma nv_hdrstop", "#include <vidrial/arch/shared_memory.cuh>"]
    return "\n".join([*head, *definitions, f'#line 1 "{file}"', unit])


def bf16_bits(x: Array) -> Array:
    """float32 -> uint16, rounded to nearest even."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)


def bf16_values(bits: Array) -> Array:
    """uint16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def mma(atom: str, k: int, element: str) -> Case:
    """C += A B of small integers: exact in any order of summation."""
    rng = np.random.default_rng(RNG_SEED)
    a, b, c = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((16, k), (8, k), (16, 8)))
    half = element == "half_t"
    encoded = [np.ascontiguousarray(x.T.astype(np.float16) if half else bf16_bits(x.T)) for x in (a, b)]
    source = text("mma.cu", f"using T = cutlass::{element};", f"using Atom = cute::{atom};")
    return Case(
        atom,
        source,
        32,
        0,
        [*encoded, np.ascontiguousarray(c.T)],
        (),
        {2: ((a @ b.T + c).T, 0.0)},
        counts={"mma": 1, "wgmma": 0, "ldmatrix": 0},
    )


def wgmma(element: str, n: int, major: str, width: int, *, shared_a: str = "", negate: bool = False, fresh: bool = False) -> Case:
    """C += A B^T of small integers; `shared_a`: how A lies in shared memory, if not in registers. `width`: 16-byte units of a swizzle."""
    rng = np.random.default_rng(RNG_SEED)
    a, b, c = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((64, 64), (n, 64), (64, n)))
    half = element == "half_t"
    encoded = [np.ascontiguousarray(x.T.astype(np.float16) if half else bf16_bits(x.T)) for x in (a, b)]
    types, kind = "F32F16F16" if half else "F32BF16BF16", "SS" if shared_a else "RS"
    scale = ", GMMA::ScaleIn::Neg" if negate else ""
    definitions = [
        f"constexpr int N = {n};",
        f"#define WIDTH {width}",
        f"#define SHARED_A {int(bool(shared_a))}",
        f"#define FRESH {int(fresh)}",
        f"#define MAJOR_A GMMA::Major::{shared_a or 'K'}",
        f"#define MAJOR_B GMMA::Major::{major}",
        f"#define Instruction GMMA::MMA_64x{n}x16_{types}_{kind}<MAJOR_A, MAJOR_B{scale}>",
        f"using T = cutlass::{element};",
    ]
    lines = 8 * width
    rows = [max(r, lines) if m == "MN" else r for r, m in ((n, major), (64, shared_a or "K"))]
    expected = (0 if fresh else c) + (-1 if negate else 1) * (a @ b.T)
    name = f"wgmma-{element}-{kind}-{n}-{shared_a}{major}-{16 * width}" + "-negated" * negate + "-fresh" * fresh
    shared_bytes = 128 * (rows[0] + rows[1] * bool(shared_a))
    arrays = [*encoded, np.ascontiguousarray(c.T)]
    return Case(
        name, text("wgmma.cu", *definitions), 128, shared_bytes, arrays, (), {2: (expected.T, 0.0)}, "sm_90a", counts={"wgmma": 4, "mma": 0}
    )


def ldmatrix(atom: str, matrices: int) -> Case:
    """Source and target agree element by element."""
    elements = np.random.default_rng(RNG_SEED).permutation(2**16)[: 64 * matrices].astype(np.uint16)
    source = text("ldmatrix.cu", f"using Atom = cute::{atom};")
    return Case(atom, source, 32, 512, [elements, np.zeros_like(elements)], (), {1: (elements, 0.0)}, counts={"ldmatrix": 1, "mma": 0})


def copy_async(atom: str, vector: str, size: int, zero_fill: bool) -> Case:
    """Two groups of 96 vectors, each stored back to front."""
    source = np.random.default_rng(RNG_SEED).integers(1, 255, (2, 96, size)).astype(np.uint8)
    expected = source.copy()
    if zero_fill:
        expected[0, 1::3] = expected[1, 2::3] = 0
    definitions = f"using Vector = {vector};", f"using Atom = cute::{atom}<Vector>;", f"#define ZERO_FILL {int(zero_fill)}"
    rendered = text("copy_async.cu", *definitions)
    return Case(f"{atom}-{size}", rendered, 96, 192 * size, [source, np.zeros_like(source)], (), {1: (expected[:, ::-1], 0.0)})


def warp() -> Case:
    """Shuffles, votes and atomics: the rows of warp.cu in their order."""
    x = np.random.default_rng(RNG_SEED).integers(1, 1200, 64).astype(np.int32)
    lane, base = np.arange(64) % 32, np.arange(64) // 32 * 32

    def taken(source: Array, width: int = 32) -> Array:
        inside = (source >= lane // width * width) & (source < lane // width * width + width)
        return x[base + np.where(inside, source, lane)]

    def by_warp(value: Any) -> Array:
        return np.repeat([value(x[:32]), value(x[32:])], 32)

    ballot = by_warp(lambda w: np.packbits((w & 1).astype(np.uint8), bitorder="little").view(np.int32)[0])
    bits = [int(v) for v in x]
    numbers = [v.bit_count() + 100 * (32 - v.bit_length()) + 10000 * ((v & -v).bit_length()) for v in bits]
    permuted = [((v >> 16 & 0xFF) | 0xCD << 8 | (v >> 8 & 0xFF) << 16 | 0x89 << 24) - 2**32 for v in bits]
    rows = [
        taken(np.full(64, 5)),
        taken(lane // 8 * 8 + (lane + 3) % 8),
        taken(lane ^ 17),
        taken(lane ^ 3, 8),
        taken(lane + 2),
        taken(lane + 3, 16),
        taken(lane - 1),
        taken(lane - 5, 8),
        taken(lane ^ 8),
        ballot,
        by_warp(lambda w: (w == 7).any()),
        by_warp(lambda w: (w < 1000).all()),
        np.array(numbers),
        np.array(permuted),
        taken(np.where(lane % 2, lane ^ 2, lane ^ 4)),
    ]
    last = np.zeros(64)
    last[:3] = x.max(), x[:32].sum(), x[32:].sum()
    expected = np.stack([*rows, last]).astype(np.int32)
    return Case(
        "warp",
        text("warp.cu"),
        64,
        0,
        [x, np.zeros_like(expected), np.zeros(1, np.float32)],
        (),
        {1: (expected, 0.0), 2: (np.array([0.5 * x.sum()]), 0.0)},
    )


def intrinsics() -> Case:
    """Conversions bit by bit, 2^x to two units in the last place, 1/x to one."""
    rng = np.random.default_rng(RNG_SEED)
    low = np.concatenate([rng.uniform(-8, 8, 61), [-127.5, 1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8]]).astype(np.float32)
    high = np.concatenate([rng.uniform(-300, 300, 61), [0.0, -0.0, 65504.0]]).astype(np.float32)
    b, h = [bf16_bits(x).astype(np.uint32) for x in (low, high)], [x.astype(np.float16) for x in (low, high)]
    values = [bf16_values(x) for x in b]
    product = [bf16_bits(value * values[0]).astype(np.uint32) for value in values]
    quads = 4 * (np.arange(64) % 16)
    bits = np.stack(
        [
            b[0] | b[1] << 16,
            h[0].view(np.uint16) | h[1].view(np.uint16).astype(np.uint32) << 16,
            product[0] | product[1] << 16,
            b[1] * 0x10001,
            quads + 100 * (quads + 1) + 10000 * (quads + 2) + 1000000 * (quads + 3),
        ]
    ).astype(np.uint32)
    power = np.exp2(low.astype(np.float64))
    power[low < -126] = 0.0
    inverse = 1 / (high + np.float32(0.5)).astype(np.float64)
    floats = np.stack([h[0].astype(np.float64), h[1].astype(np.float64), power, values[0].astype(np.float64), inverse])
    tolerance = np.zeros_like(floats)
    tolerance[2] = power * 2.0**-22
    tolerance[4] = np.abs(inverse) * 2.0**-23
    arrays = [low, high, np.zeros_like(bits), np.full(floats.shape, np.nan, np.float32)]
    return Case("intrinsics", text("intrinsics.cu"), 64, 0, arrays, (64,), {2: (bits, 0.0), 3: (floats, tolerance)})


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> tuple[Array, Array]:
    """Small integers, as they are stored and as float32."""
    values = rng.integers(-8, 9, shape).astype(np.float32)
    return (bf16_bits(values) if dtype is DType.bfloat16 else values.astype(dtype.label)), values


def tma(
    name: str, tile: SmemLayout, shape: tuple[int, ...], at: tuple[int, ...], *, column_tail: bool = False, pad: int = 8, offset: int = 0
) -> Case:
    """The tile at `at` of a tensor whose rows are `pad` elements longer than they are; zeros beyond its true lengths."""
    rng = np.random.default_rng(RNG_SEED)
    outer = ("head", "batch")[: len(shape) - 2]
    box = TmaTile(tile, outer, column_tail)
    # Stored as [batch, row, head, column + pad], as a model has it.
    rows, columns, *others = shape
    stored, _ = numbers(rng, (*others[1:], rows, *others[:1], columns + pad), tile.dtype)
    if tile.dtype is DType.float32:
        stored = rng.standard_normal(stored.shape).astype(np.float32)
    strides = [s // stored.itemsize for s in stored.strides]
    order = {0: (0,), 1: (0, 1), 2: (1, 2, 0)}[len(others)]
    tensor = TensorMap(box, "0", (rows, columns, *others), tuple(strides[d] for d in order), offset)
    expected = np.zeros((tile.rows, tile.columns), stored.dtype)
    source = np.moveaxis(stored, 0, -2) if len(others) == 2 else stored  # [row, head, batch, column]
    place = source[(slice(None), *at[2:])][..., offset : offset + columns] if others else source[:, offset : offset + columns]
    part = (
        place[at[0] : at[0] + tile.rows, at[1] : at[1] + tile.columns]
        if at[0] >= 0
        else place[: tile.rows + at[0], at[1] : at[1] + tile.columns]
    )
    first = max(-at[0], 0)
    expected[first : first + part.shape[0], : part.shape[1]] = part
    bars = Barriers(full=Barrier(1))
    smem = SharedMemory(tile=tile, bars=bars.bytes)
    definitions = [
        "#include <vidrial/pipeline/tma_ring.cuh>",
        "#include <vidrial/tile/tma.cuh>",
        f"using T = {tile.dtype.cpp if tile.dtype is DType.float32 else 'uint16_t'};",
        f"constexpr int kRows = {tile.rows}, kColumns = {tile.columns}, kBarriers = {smem.offset('bars')};",
        f"#define OUTER {len(outer)}",
        f"using Tile = {tile.cpp};",
        f"using Box = {box.cpp};",
        bars.declare("Bars"),
    ]
    case = Case(
        f"tma-{name}",
        text("tma.cu", *definitions),
        128,
        smem.bytes,
        [stored, np.zeros_like(expected)],
        (*at, *(0 for _ in range(4 - len(at)))),
        {},
        "sm_90a",
    )
    case.maps, case.expected = (tensor,), {1: (expected, 0.0)}
    if tile.dtype is not DType.float32:
        case.arrays = [stored.view(np.uint16), np.zeros(expected.shape, np.uint16)]
        case.expected = {1: (expected.view(np.uint16).astype(np.float64), 0.0)}
    return case


def ragged(row: int, end: int) -> Case:
    """Rows of one of three sequences packed one behind the other: [row, head, column], zeros from the sequence's end on."""
    case = tma(f"ragged-{row}-{end}", SmemLayout(DType.bfloat16, 64, 128), (77, 128, 3, 2), (0, 0, 1, 1))
    stored, _ = numbers(np.random.default_rng(RNG_SEED), (150, 3, 128), DType.bfloat16)
    expected = np.zeros((64, 128), np.uint16)
    expected[: end - row] = stored.view(np.uint16)[row : min(end, row + 64), 1]
    box = TmaTile(SmemLayout(DType.bfloat16, 64, 128), ("head", "end"))
    case.maps = (TensorMap.ragged(box, "0", (150, 128, 3), (3 * 128, 128), 90),)
    case.source = case.source.replace("#define OUTER", "#define RAGGED 90\n#define OUTER")
    case.arrays, case.integers = [stored.view(np.uint16), np.zeros((64, 128), np.uint16)], (row, 0, 1, end)
    case.expected = {1: (expected.astype(np.float64), 0.0)}
    return case


def roles() -> Case:
    """A producer and two consumers: ring, bulk copies, votes, named barriers, registers, a dynamic schedule of 11 tiles."""
    rng, count = np.random.default_rng(RNG_SEED), 11
    who = Roles(producer=1, consumers=2)
    tile = SmemLayout(DType.bfloat16, 64, 64, stages=3)
    box = TmaTile(tile)
    # The last tile has 29 rows.
    stored, values = numbers(rng, (64 * count - 35, 64), DType.bfloat16)
    factors = rng.integers(1, 5, (count, 64)).astype(np.float32)
    padded = np.zeros((64 * count, 64), np.float32)
    padded[: len(values)] = values
    weighted = padded.reshape(count, 64, 64) * factors[:, :, None]
    parts = weighted.reshape(count, 2, 2, 16, 64).sum(3)  # tile, group, half, column
    counted = parts * (parts < 0).any((2, 3), keepdims=True)
    out = counted.sum((0, 1)).reshape(128)
    # The factors of a stage come to the same barrier.
    bars = Barriers(ring=TmaRing((box,), who.consumer_warps, bulk_bytes=256), draw=Scheduler("dynamic", consumer_warps=who.consumer_warps))
    named = NamedBarriers(vote=Meeting(128, count=2), turn=Meeting(256), own=Meeting(128))
    smem = SharedMemory(tile=tile, factors=3 * 256, sums=512, bars=bars.bytes)
    definitions = [
        "#include <vidrial/pipeline/scheduler.cuh>",
        "#include <vidrial/pipeline/tma_ring.cuh>",
        "#include <vidrial/tile/tma.cuh>",
        "using T = cutlass::bfloat16_t;",
        f"constexpr int kFactors = {smem.offset('factors')}, kSums = {smem.offset('sums')}, kBarriers = {smem.offset('bars')};",
        f"using Tile = {tile.cpp};",
        f"using Box = {box.cpp};",
        f"using Roles = {who.cpp};",
        bars.declare("Bars"),
        named.declare("Named"),
    ]
    arrays = [stored, factors, np.zeros(128, np.float32), np.full(count, -1, np.int32), np.zeros(1, np.int32)]
    expected: dict[int, tuple[Array, float]] = {2: (out, 0.0), 3: (np.arange(count), 0.0), 4: (np.full(1, count), 0.0)}
    case = Case("roles", text("roles.cu", *definitions), who.threads, smem.bytes, arrays, (count,), expected, "sm_90a")
    case.maps = (TensorMap(box, "0", values.shape, (64,)),)
    return case


def wgmma_own(dtype: DType, n: int, *, a_shared: bool, transposed: bool) -> Case:
    """C = A B^T by one of our own atoms, operands by TMA."""
    rng = np.random.default_rng(RNG_SEED)
    a, a_values = numbers(rng, (64, 128), dtype)
    b, b_values = numbers(rng, (128, n) if transposed else (n, 128), dtype)
    a_tile, b_tile = SmemLayout(dtype, *a.shape), SmemLayout(dtype, *b.shape)
    mma = WarpgroupMma(dtype, 1, (64, n, 128), b_tile.transposed if transposed else b_tile, a_tile if a_shared else None)
    boxes = TmaTile(a_tile), TmaTile(b_tile)
    bars = Barriers(full=Barrier(1))
    smem = SharedMemory(a=a_tile, b=b_tile, bars=bars.bytes)
    assert smem.offset("b") == a_tile.bytes and mma.atom == wgmma_atom(n, dtype, a_shared=a_shared, b_transposed=transposed)
    definitions = [
        "#include <vidrial/pipeline/tma_ring.cuh>",
        "#include <vidrial/tile/tma.cuh>",
        "#include <vidrial/tile/wgmma.cuh>",
        mma.atom.definition,
        f"using T = {dtype.cpp};",
        f"constexpr int kBarriers = {smem.offset('bars')};",
        f"#define SHARED_A {int(a_shared)}",
        f"using BoxA = {boxes[0].cpp};",
        f"using BoxB = {boxes[1].cpp};",
        f"using Mma = {mma.cpp};",
        bars.declare("Bars"),
    ]
    expected = a_values @ (b_values if transposed else b_values.T)
    case = Case(
        f"own-{mma.atom.name}",
        text("wgmma_atom.cu", *definitions),
        128,
        smem.bytes,
        [a, b, np.zeros((64, n), np.float32)],
        (),
        {2: (expected, 0.0)},
        "sm_90a",
        counts={"wgmma": 8, "mma": 0},
    )
    case.maps = tuple(TensorMap(box, str(i), x.shape, x.shape[1:]) for i, (box, x) in enumerate(zip(boxes, (a, b), strict=True)))
    return case


def hopper() -> Iterator[Case]:
    """TMA, barriers and roles, and our own wgmma atoms."""
    bf16, half, single = DType.bfloat16, DType.float16, DType.float32
    yield tma("128B", SmemLayout(bf16, 64, 64), (200, 64), (64, 0))
    yield tma("64B", SmemLayout(half, 32, 32), (100, 32), (32, 0))
    yield tma("32B", SmemLayout(bf16, 16, 16), (100, 16), (16, 0))
    yield tma("no-swizzle", SmemLayout(bf16, 24, 40, swizzle=None), (100, 40), (24, 0))
    yield tma("two-blocks", SmemLayout(bf16, 48, 128), (100, 128), (24, 0))
    yield tma("tail-of-rows", SmemLayout(half, 64, 128), (101, 128), (64, 0))
    yield tma("before-the-first", SmemLayout(bf16, 64, 64), (101, 64), (-5, 0))
    yield tma("beyond-the-last", SmemLayout(bf16, 64, 64), (64, 64), (64, 0))
    yield tma("tail-of-columns", SmemLayout(bf16, 64, 128), (100, 181), (64, 64), column_tail=True, pad=3)
    yield tma("heads", SmemLayout(bf16, 64, 128), (77, 128, 3), (64, 0, 2))
    yield tma("rank-5", SmemLayout(half, 64, 128), (77, 128, 3, 2), (40, 0, 1, 1))
    yield tma("rank-4-tail-of-columns", SmemLayout(bf16, 64, 128), (77, 120, 3, 2), (40, 0, 1, 1), column_tail=True)
    yield tma("float32", SmemLayout(single, 32, 32, swizzle=Swizzle(3, 2, 3)), (77, 32), (64, 0))
    yield tma("offset", SmemLayout(bf16, 64, 64), (70, 64), (32, 0), offset=8)
    for row, end in ((0, 64), (0, 41), (64, 131), (131, 150), (86, 150), (120, 131)):
        yield ragged(row, end)
    yield roles()
    for i, n in enumerate((8, 24, 40, 80, 104, 176, 200, 256)):
        yield wgmma_own((bf16, half)[i % 2], n, a_shared=i % 4 < 2, transposed=False)
    for i, n in enumerate((16, 48, 80, 96, 176, 192, 256)):
        yield wgmma_own((half, bf16)[i % 2], n, a_shared=i % 4 > 1, transposed=True)


def cases() -> Iterator[Case]:
    """Every atom that the host target emulates, and what kernels use besides."""
    for element, spelled in (("bfloat16_t", "F32BF16BF16F32"), ("half_t", "F32F16F16F32")):
        for k in (8, 16):
            yield mma(f"SM80_16x8x{k}_{spelled}_TN", k, element)
    for major in ("K", "MN"):
        for width in (8, 4):
            for n in (32, 64, 128, 256):
                yield wgmma("bfloat16_t", n, major, width)
            yield wgmma("half_t", 32 * width, major, width, fresh=True)
        yield wgmma("half_t", 16 if major == "K" else 96, major, 2)
        yield wgmma("bfloat16_t", 96 if major == "K" else 16, major, 1)
        for width in (8, 4, 2, 1):
            yield wgmma("bfloat16_t", 64, major, width, shared_a="MN" if width in (8, 1) else "K", negate=width == 8)
        yield wgmma("half_t", 64, major, 8, shared_a="K")
    for matrices in (1, 2, 4):
        yield ldmatrix(f"SM75_U32x{matrices}_LDSM_N", matrices)
        yield ldmatrix(f"SM75_U16x{2 * matrices}_LDSM_T", matrices)
    for zero_fill, ending in ((False, ""), (True, "_ZFILL")):
        for vector, size in (("uint32_t", 4), ("uint64_t", 8), ("cute::uint128_t", 16)):
            yield copy_async(f"SM80_CP_ASYNC_CACHEALWAYS{ending}", vector, size, zero_fill)
        yield copy_async(f"SM80_CP_ASYNC_CACHEGLOBAL{ending}", "cute::uint128_t", 16, zero_fill)
    yield warp()
    yield intrinsics()
    yield from hopper()
