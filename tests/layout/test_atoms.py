"""The instruction tables against the PTX manual's fragments and CuTe's names."""

from __future__ import annotations

import pytest

from vidrial.dtypes import DType
from vidrial.errors import LayoutError
from vidrial.layout.atoms import CP_ASYNC, LDMATRIX, VECTOR, MMA_16x8x8, MMA_16x8x16, MmaAtom, cp_async, ldmatrix

ATOMS = [*MMA_16x8x16.values(), *MMA_16x8x8.values()]


@pytest.mark.parametrize("atom", ATOMS, ids=lambda atom: atom.name)
def test_fragments_are_those_of_the_ptx_manual(atom: MmaAtom) -> None:
    m, n, k = atom.shape
    for lane in range(32):
        group, pair = lane // 4, lane % 4
        a = [divmod(atom.a_layout(lane, i), m)[::-1] for i in range(m * k // 32)]
        # mma.m16n8k16: row = group for a0, a1, a4, a5, else group + 8; column = 2 pair + (i & 1), 8 more for i >= 4.
        assert a == [(group + 8 * (i // 2 % 2), 2 * pair + i % 2 + 8 * (i // 4)) for i in range(m * k // 32)]
        b = [divmod(atom.b_layout(lane, i), n)[::-1] for i in range(n * k // 32)]
        assert b == [(group, 2 * pair + i % 2 + 8 * (i // 2)) for i in range(n * k // 32)]
        c = [divmod(atom.c_layout(lane, i), m)[::-1] for i in range(4)]
        assert c == [(group + 8 * (i // 2), 2 * pair + i % 2) for i in range(4)]


@pytest.mark.parametrize("atom", ATOMS, ids=lambda atom: atom.name)
def test_fragments_cover_their_matrices_once(atom: MmaAtom) -> None:
    m, n, k = atom.shape
    for layout, size in ((atom.a_layout, m * k), (atom.b_layout, n * k), (atom.c_layout, m * n)):
        assert sorted(layout.indices()) == list(range(size))


def test_names() -> None:
    assert MMA_16x8x16[DType.bfloat16].cpp == "cute::SM80_16x8x16_F32BF16BF16F32_TN"
    assert MMA_16x8x8[DType.float16].cpp == "cute::SM80_16x8x8_F32F16F16F32_TN"
    assert [LDMATRIX[c, False].cpp for c in (1, 2, 4)] == [f"cute::SM75_U32x{c}_LDSM_N" for c in (1, 2, 4)]
    assert [LDMATRIX[c, True].cpp for c in (1, 2, 4)] == [f"cute::SM75_U16x{c}_LDSM_T" for c in (2, 4, 8)]
    assert cp_async().cpp == "cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>"
    assert CP_ASYNC[8, False].cpp == "cute::SM80_CP_ASYNC_CACHEALWAYS<uint64_t>"
    assert CP_ASYNC[4, True].cpp == "cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<uint32_t>"
    assert VECTOR[8].cpp == "cute::UniversalCopy<uint64_t>"


def test_facts() -> None:
    assert {atom.arch for atom in ATOMS} == {80} and {a.arch for a in LDMATRIX.values()} == {75}
    assert ldmatrix(2, True).bytes == 8 and ldmatrix(4).matrices == 4 and ldmatrix(1, True).transposed
    assert (cp_async(4, False).zero_fill, cp_async(4, False).bytes) == (False, 4)
    for wrong in (0, 3, 8):
        with pytest.raises(LayoutError, match=f"ldmatrix of {wrong} matrices"):
            ldmatrix(wrong)
    with pytest.raises(LayoutError, match="cp.async of 12 bytes"):
        cp_async(12)
