"""One wrong line in a piece of the library, which its unit must see: by a wrong result, or by what the host target refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from planting import including, planted
from units import Case, pieces

from vidrial.errors import LaunchError
from vidrial.host.target import SCHEDULES, compile_host

PARTS = ("collective", "pipeline", "tile")
CASES = {case.name: case for case in pieces.cases()}
COPY, EIGHT, HALVES = "tiled_copy-16-bfloat16-72-29-51-32", "tiled_copy-8-bfloat16-52-30-50-32", "tiled_copy-2-bfloat16-63-31-63-32"
SYNC, WGMMA = "gemm-sync-97x51x148-8-8-bfloat16-64", "gemm-wgmma-97x51x148-8-8-bfloat16-64"
ATTENTION = "attention-wgmma-Serial-causal-bfloat16-64-2"

# Header, what stands there, what stands there instead, the unit that sees it.
WRONG = {
    "columns of the tail are read": ("tile/copy", "left < 0 ? 0 : left < kVector ? left : kVector;", "left < 0 ? 0 : kVector;", COPY),
    "vectors beyond the columns are read": ("tile/copy", "bytes = left < 0 ? 0 :", "bytes = left < 0 ? kVector :", COPY),
    "rows of the tail are read": (
        "tile/copy",
        "c * ColumnStep, row + i * RowStep < rows ? bytes : 0);",
        "c * ColumnStep, row + i * RowStep <= rows ? bytes : 0);",
        COPY,
    ),
    "rows of pieces are read": (
        "tile/copy",
        "from + c * ColumnStep, exists ? kVector : 0);",
        "from + c * ColumnStep, kVector);",
        "tiled_copy-4-bfloat16-66-17-64-32",
    ),
    "the second piece as large as the first": ("tile/copy", "int const left = bytes - at;", "int const left = bytes;", EIGHT),
    "the same piece twice": ("tile/copy", "from + at / int(sizeof(T))", "from", EIGHT),
    "pieces at each other's place": (
        "tile/copy",
        "copy_async<kPiece>(place + at,",
        "copy_async<kPiece>(place + (at ^ kPiece),",
        EIGHT,
    ),
    "halves exchanged": ("tile/copy", "words[w] = low | high << 16;", "words[w] = high | low << 16;", HALVES),
    "the last half is read": ("tile/copy", "4 * w + 2 < bytes ? half[1] : 0", "4 * w < bytes ? half[1] : 0", HALVES),
    "no wait for a stage": (
        "pipeline/ring",
        "cute::cp_async_wait<kFirst - 1 - Ahead>();",
        "cute::cp_async_wait<kFirst>();",
        "ring-2-1-0-7",
    ),
    "no wait for the stage behind": (
        "pipeline/ring",
        "cute::cp_async_wait<kFirst - 1 - Ahead>();",
        "cute::cp_async_wait<kFirst - 1>();",
        "ring-3-1-1-5",
    ),
    "no wait for the first stage": ("pipeline/ring", "cute::cp_async_wait<kFirst - 1>();", "", "ring-3-1-1-5"),
    "no barrier": ("pipeline/ring", "if constexpr (Async) fence_async_proxy();\n    __syncthreads();", "", "ring-2-1-0-7"),
    "a stage refilled that is read": ("pipeline/ring", "write = kFirst;", "write = kFirst - 1;", "ring-4-2-0-9"),
    "stages that do not come around": ("pipeline/ring", "stage + 1 == Stages ? 0", "stage + 1 == Stages ? 1", "ring-5-2-1-11"),
    "a step over the lanes left out": (
        "collective/reduce",
        "int bits = Lanes / 2; bits > 0;",
        "int bits = Lanes / 2; bits > 1;",
        "reduce-32",
    ),
    "another row's part": ("collective/reduce", "first = warp / kWarps * kWarps;", "first = warp / kWarps;", "reduce-64"),
    "a warp counted twice": ("collective/reduce", "for (int w = 1; w < kWarps; ++w)", "for (int w = 0; w < kWarps; ++w)", "reduce-128"),
    "overwritten before it was read": (
        "collective/reduce",
        "__syncthreads();                                   // an earlier",
        "//",
        "reduce-128",
    ),
    "read before it was written": ("collective/reduce", "scratch[warp] = x;\n    __syncthreads();", "scratch[warp] = x;", "reduce-128"),
    "a key too many in the window": ("collective/mask", "row - key < keys; }", "row - key <= keys; }", "mask-128-100"),
    "a key beyond the tail": ("collective/mask", "return key < keys; }", "return key <= keys; }", "mask-128-100"),
    "one rule of two": ("collective/mask", "a.allows(row, key) && b.allows(row, key)", "a.allows(row, key)", "mask-128-100"),
    "the last block left out": (
        "collective/mask",
        "to = (rule.end(last) + Keys - 1) / Keys;",
        "to = rule.end(last) / Keys;",
        "mask-128-100",
    ),
    "a block too many taken as whole": (
        "collective/mask",
        "whole_to = rule.end(first) / Keys;",
        "whole_to = rule.end(last) / Keys;",
        "mask-128-100",
    ),
    "the whole blocks begin too early": (
        "collective/mask",
        "whole_from = (rule.begin(last) + Keys - 1) / Keys;",
        "whole_from = rule.begin(last) / Keys;",
        "mask-128-100",
    ),
    "half of a row's largest": ("collective/rows", "x[m][h] = join(x[m][h], __shfl_xor_sync(~0u, x[m][h], 1));", "", ATTENTION),
    "the second rows by the first one's factor": ("tile/fragment", "x[m][n][2 * h + 1] *= f;", "x[m][n][2 * h] *= f;", ATTENTION),
    "weights packed in another order": ("tile/fragment", "x[2 * k + r / 2][2 * (r % 2)],", "x[2 * k + r % 2][2 * (r / 2)],", ATTENTION),
    "never rescaled": (
        "collective/attention",
        "if constexpr (Weights::kRescales) rescale(o, weights, m);\n          pack",
        "pack",
        ATTENTION,
    ),
    "no wait before O is rescaled": (
        "collective/attention",
        "    PV::template wait<0>();\n    o.fence();\n    weights.rescale(o, m);",
        "    weights.rescale(o, m);",
        "attention-wgmma-Overlapped-causal-bfloat16-64-1",
    ),
    "rows stored that do not exist": ("collective/store", "if (row < rows) {", "if (row <= rows) {", ATTENTION),
    "rows of C that do not exist": ("collective/epilogue", "if (row + i * RowStep < rows) {", "if (row + i * RowStep <= rows) {", SYNC),
    "columns of C that do not exist": (
        "collective/epilogue",
        "if (left >= kElements) whole(to, x);\n        else part(to, x, left);",
        "whole(to, x);",
        SYNC,
    ),
    "the last column of C left out": ("collective/epilogue", "if (e < elements) {", "if (e + 1 < elements) {", SYNC),
    "stored before it was put": ("collective/epilogue", "put(c, f, part);\n      meet();", "put(c, f, part);", SYNC),
    "put where tiles are still read": (
        "collective/epilogue",
        "      meet();                                          // nobody reads what lay there\n",
        "",
        "gemm-sync-97x51x212-8-8-bfloat16-64-shared",
    ),
    "the bias of the neighbour": ("collective/epilogue", "row + r, column + j + 1)", "row + r, column + j)", SYNC),
    "another row's place": ("collective/epilogue", "int const r = Mma::row_of(m, 2 * h)", "int const r = Mma::row_of(m, 2 - 2 * h)", WGMMA),
    "a small GELU": ("collective/epilogue", "0.044715f", "0.04f", "gemm-sync-128x50x66-4-4-float32-64"),
    "the first stage of A": ("tile/wgmma", "Atom::fma(c[m], a(a_stage, k, m * 64), at);", "Atom::fma(c[m], a(0, k, m * 64), at);", WGMMA),
    "the first rows of A": ("tile/wgmma", "Atom::fma(c[m], a(a_stage, k, m * 64), at);", "Atom::fma(c[m], a(a_stage, k, 0), at);", WGMMA),
    "the first stage of B": ("tile/wgmma", "uint64_t const at = b(b_stage, k);", "uint64_t const at = b(0, k);", WGMMA),
    "C overwritten": (
        "tile/wgmma",
        "Atom::fma(c[m], a(a_stage, k, m * 64), at);",
        "Atom::fma(c[m], a(a_stage, k, m * 64), at, k > 0);",
        WGMMA,
    ),
}


def found(case: Case, source: str, includes: tuple[str, ...]) -> str:
    """How the unit fails, under the first schedule under which it does; nothing if it does not."""
    binary = compile_host(source, "unit", include_dirs=includes)
    fresh = [array.copy() for array in case.arrays]
    try:
        for schedule in SCHEDULES:
            for array, original in zip(case.arrays, fresh, strict=True):
                array[...] = original
            try:
                binary.launch((1,), case.block, case.shared_bytes, case.packed, {8 * i: a for i, a in enumerate(case.arrays)}, schedule)
                case.check()
            except (LaunchError, AssertionError) as error:
                return str(error)
    finally:
        for array, original in zip(case.arrays, fresh, strict=True):
            array[...] = original
    return ""


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_line_is_found(mistake: str, tmp_path: Path) -> None:
    *change, name = WRONG[mistake]
    case = CASES[name]
    includes = planted(tmp_path, *change, PARTS)
    assert found(case, including(case.source, PARTS), includes), f"{name} passes"


def test_right_lines_pass(tmp_path: Path) -> None:
    includes = planted(tmp_path, "collective/mask", "return key < keys; }", "return key < keys;  }", PARTS)
    for name in sorted({name for *_, name in WRONG.values()}):
        assert not found(CASES[name], including(CASES[name].source, PARTS), includes), name
