"""46 mistakes of kernels' authors, by class: what stands in a file of an example, and what stands there instead."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """`new` in place of `old`, which stands once in `file` of examples/`op`; a file of the device library is `pipeline/...`."""

    kind: str
    what: str
    op: str
    file: str
    old: str
    new: str


BARRIER, WAIT, FENCE, STAGE = "missing barrier", "missing or early wait", "missing proxy fence", "wrong stage or ring depth"
PREDICATE, STRIDE, SIZE = "predicates of rows, columns, stores", "strides", "swizzle and shared-memory sizes"
RETURN, FRAGMENT, VECTOR = "early return or divergence", "fragment or multiplicity", "vector path"
# How many there are of each.
COUNTS = {BARRIER: 6, WAIT: 6, FENCE: 2, STAGE: 5, PREDICATE: 8, STRIDE: 4, SIZE: 5, RETURN: 3, FRAGMENT: 5, VECTOR: 2}

SOFTMAX, GEMM, PY, RING = "softmax.cu.j2", "gemm.cu.j2", "gemm.py", "pipeline/ring.cuh"
FREE = "        Mma::wait<1>();                // the product of the step before: its stage is free\n"
RELEASE = "        if (step > 0) ring.release();\n"
LOOP = "    int const stage = ring.next(copy);\n    Mma::gemm(c.x, a, stage * kA, b, stage * kB);\n"

MUTATIONS = (
    Mutation(BARRIER, "before the parts of other warps are read", "softmax", SOFTMAX, "    __syncthreads();\n", ""),
    Mutation(
        BARRIER,
        "before the sums of other warps are read",
        "scan",
        "scan.cuh",
        "shared[warp] = x;\n  __syncthreads();\n",
        "shared[warp] = x;\n",
    ),
    Mutation(
        BARRIER,
        "before the sums are written again",
        "scan",
        "scan.cuh",
        "writes `shared` again.\n  __syncthreads();\n",
        "writes `shared` again.\n",
    ),
    Mutation(
        BARRIER, "after barriers are initialised", "gemm", GEMM, "  __syncthreads();\n  auto const each_tile", "  auto const each_tile"
    ),
    Mutation(BARRIER, "before the staged tile is stored", "gemm", GEMM, "Tiles::Named::stored::sync(group);", ""),
    Mutation(BARRIER, "the first warpgroup's for all", "gemm", GEMM, "stored::sync(group)", "stored::sync(0)"),
    Mutation(
        WAIT,
        "for the last product",
        "gemm",
        GEMM,
        "  Mma::wait<0>();\n  c.fence();\n  finish(args, c, smem, thread",
        "  c.fence();\n  finish(args, c, smem, thread",
    ),
    Mutation(WAIT, "for the product whose stage is refilled", "gemm", GEMM, "    Mma::wait<1>();                    // the", "    // the"),
    Mutation(WAIT, "for the product whose stage is released, by TMA", "gemm", GEMM, FREE, ""),
    Mutation(
        WAIT,
        "for the last product, by TMA",
        "gemm",
        GEMM,
        "      Mma::wait<0>();\n      c.fence();\n      ring",
        "      c.fence();\n      ring",
    ),
    Mutation(WAIT, "after the release, by TMA", "gemm", GEMM, FREE + RELEASE, RELEASE + FREE),
    Mutation(WAIT, "a stage released a product early", "gemm", GEMM, "if (step > 0) ring.release();", "ring.release();"),
    Mutation(FENCE, "of all stages", "gemm", RING, "    if constexpr (Async) fence_async_proxy();\n", ""),
    Mutation(
        FENCE,
        "of the stages after the first round",
        "gemm",
        RING,
        "if constexpr (Async) fence_async_proxy();",
        "if (Async && item < Stages) fence_async_proxy();",
    ),
    Mutation(STAGE, "B always at the first, by TMA", "gemm", GEMM, "sB + stage * kB,", "sB,"),
    Mutation(STAGE, "A is read in the next one", "gemm", GEMM, LOOP, LOOP.replace("a, stage * kA", "a, (stage + 1) % Tiles::stages * kA")),
    Mutation(STAGE, "one that wgmma still reads is refilled", "gemm", PY, 'read=2 if c.mma == "wgmma" else 1', "read=1"),
    Mutation(STAGE, "fewer bytes expected than come", "gemm", PY, "TmaRing((box_a, box_b),", "TmaRing((box_a,),"),
    Mutation(STAGE, "all copies of A into the first", "gemm", GEMM, "copy_a(stage * kA, args.m", "copy_a(0 * stage, args.m"),
    Mutation(
        PREDICATE,
        "of stores, row read twice",
        "softmax",
        SOFTMAX,
        "i < vectors; i += Tiles::row_threads) y",
        "i <= vectors; i += Tiles::row_threads) y",
    ),
    Mutation(PREDICATE, "of rows", "softmax", SOFTMAX, "row < args.m ?", "row <= args.m ?"),
    Mutation(PREDICATE, "of stores, row kept", "softmax", SOFTMAX, "i < vectors) y[i] = scaled(kept", "i <= vectors) y[i] = scaled(kept"),
    Mutation(PREDICATE, "of stores", "scan", "scan_add.cu.j2", "if (t < args.t) args.y", "if (t <= args.t) args.y"),
    Mutation(PREDICATE, "of loads", "scan", "scan_sums.cu.j2", "begin + i < args.t", "begin + i <= args.t"),
    Mutation(PREDICATE, "of rows of A", "gemm", GEMM, "args.m - row, left)", "Tiles::rows, left)"),
    Mutation(PREDICATE, "of the tail of k", "gemm", GEMM, "left = args.k - step * Tiles::depth;", "left = Tiles::depth;"),
    Mutation(PREDICATE, "of columns that are stored", "gemm", GEMM, "args.n - column, [&]", "Tiles::columns, [&]"),
    Mutation(STRIDE, "of the rows of x", "softmax", SOFTMAX, "args.x + row * args.n", "args.x + row * args.m"),
    Mutation(
        STRIDE, "of the rows of offsets", "scan", "scan_add.cu.j2", "int64_t(blockIdx.y) * args.blocks", "int64_t(blockIdx.y) * gridDim.y"
    ),
    Mutation(STRIDE, "of the rows of C", "gemm", GEMM, "column, args.n, args.m - row", "column, args.k, args.m - row"),
    Mutation(STRIDE, "of a tensor map", "gemm", PY, "(p.n, p.k), (p.k,))}", "(p.n, p.k), (p.k + 8,))}"),
    Mutation(SIZE, "of an array of a helper", "softmax", SOFTMAX, "parts[Tiles::threads / 32]", "parts[Tiles::threads / 32 - 1]"),
    Mutation(SIZE, "of an array of a kernel", "scan", "scan_add.cu.j2", "shared[Tiles::threads / 32]", "shared[Tiles::threads / 64]"),
    Mutation(SIZE, "of the stages of B", "gemm", PY, "smem = SharedMemory(A=a, B=b)\n", "smem = SharedMemory(A=a, B=a)\n"),
    Mutation(SIZE, "of the staged tile", "gemm", PY, "SharedMemory(A=a, B=b, C=out,", "SharedMemory(A=a, B=b, C=out.bytes // 2,"),
    Mutation(SIZE, "a copy without the swizzle", "gemm", PY, "CopyB=TiledCopy(copy, b,", "CopyB=TiledCopy(copy, replace(b, swizzle=None),"),
    Mutation(
        RETURN,
        "rows beyond the last return",
        "softmax",
        SOFTMAX,
        "  Part part;\n  if constexpr",
        "  if (row >= args.m) return;\n  Part part;\n  if constexpr",
    ),
    Mutation(
        RETURN,
        "blocks beyond the last leave the loop",
        "scan",
        "scan_offsets.cu.j2",
        "    float const x = i",
        "    if (i >= args.blocks) break;\n    float const x = i",
    ),
    Mutation(RETURN, "two warps copy", "gemm", GEMM, "if (warp == 0) each_tile", "if (warp < 2) each_tile"),
    Mutation(FRAGMENT, "the first warpgroup's rows for all", "gemm", GEMM, "row + group * (Tiles::rows", "row + 0 * (Tiles::rows"),
    Mutation(FRAGMENT, "one staged tile for all warpgroups", "gemm", GEMM, "Smem::C + group * Tiles::C::kBytes", "Smem::C"),
    Mutation(
        FRAGMENT,
        "an element counted twice",
        "scan",
        "scan_offsets.cu.j2",
        "args.blocks) args.offsets[row + i + 1] = carry + sum",
        "args.blocks) args.offsets[row + i + 1] = carry + sum + x",
    ),
    Mutation(FRAGMENT, "blocks of the first round left out of the second", "scan", "scan_offsets.cu.j2", "    carry += total;\n", ""),
    Mutation(
        FRAGMENT,
        "what lies before a block left out",
        "scan",
        "scan_add.cu.j2",
        "args.offsets[int64_t(blockIdx.y) * args.blocks + blockIdx.x]",
        "0",
    ),
    Mutation(
        VECTOR,
        "the sum of its first element",
        "softmax",
        SOFTMAX,
        "for (int i = 0; i < Tiles::vector; ++i) part.sum",
        "for (int i = 0; i < 1; ++i) part.sum",
    ),
    Mutation(VECTOR, "its first element for all", "softmax", SOFTMAX, "Elem(exponential(float(v.x[i])", "Elem(exponential(float(v.x[0])"),
)
