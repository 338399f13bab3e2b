"""One small kernel for each atom and intrinsic, with inputs and NumPy's answer: run on the CPU, and unchanged on a GPU."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
FOLDER = Path(__file__).parent
RNG_SEED = 20240607


@dataclasses.dataclass
class Case:
    """A launch of one CTA of `unit`, whose arguments are the arrays' addresses, then the integers.

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
    counts: dict[str, int] | None = None

    @property
    def packed(self) -> bytes:
        """The arguments, with null for each pointer."""
        return bytes(8 * len(self.arrays)) + struct.pack(f"{len(self.integers)}i0q", *self.integers)

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
    return Case(name, text("wgmma.cu", *definitions), 128, shared_bytes, arrays, (), {2: (expected.T, 0.0)}, "sm_90a", {"wgmma": 4})


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
