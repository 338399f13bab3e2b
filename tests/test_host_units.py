"""Every emulated atom and intrinsic against CuTe's traits and NumPy, under every schedule."""

from __future__ import annotations

import pytest
from units import Case, cases

from vidrial.host import SCHEDULES, compile_host


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.name)
def test_unit(case: Case) -> None:
    binary = compile_host(case.source, "unit")
    fresh = [array.copy() for array in case.arrays]
    for schedule in SCHEDULES:
        for array, original in zip(case.arrays, fresh, strict=True):
            array[...] = original
        pointers = {8 * i: array for i, array in enumerate(case.arrays)}
        stats = binary.launch((1,), case.block, case.shared_bytes, case.packed, pointers, schedule)
        case.check()
        assert stats.mma == ('"mma.cu"' in case.source)
        assert stats.wgmma == 4 * ('"wgmma.cu"' in case.source)
        assert stats.ldmatrix == ("ldmatrix.cu" in case.source)
