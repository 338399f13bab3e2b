"""Every emulated atom and intrinsic against CuTe's traits and NumPy, under every schedule."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from units import Case, cases, pieces

from vidrial.build.nvrtc import compile_source
from vidrial.host.target import SCHEDULES, compile_host


@pytest.mark.parametrize("case", [*cases(), *pieces.cases()], ids=lambda case: case.name)
def test_unit(case: Case) -> None:
    binary = compile_host(case.source, "unit")
    fresh = [array.copy() for array in case.arrays]
    for schedule in SCHEDULES:
        for array, original in zip(case.arrays, fresh, strict=True):
            array[...] = original
        pointers = {8 * i: array for i, array in enumerate(case.arrays)}
        stats = binary.launch((1,), case.block, case.shared_bytes, case.packed, pointers, schedule)
        case.check()
        for name, count in (case.counts or {}).items():
            assert getattr(stats, name) == count, name


def test_wgmma_is_compiled_to_itself(tmp_path: Path) -> None:
    """CuTe's own traits say the same of who holds what, and the GPU's code holds the instruction, not a trap in its place."""
    nvidia = pytest.importorskip("nvidia")
    tool = next((t for folder in nvidia.__path__ for t in Path(folder).glob("cu*/bin/cuobjdump")), None)
    if tool is None:
        pytest.skip("no cuobjdump")
    for case in [case for case in cases() if case.arch == "sm_90a"][::7]:
        cubin = compile_source("#define CHECK_TRAITS\n" + case.source, case.name, "sm_90a")
        path = tmp_path / "unit.cubin"
        path.write_bytes(cubin.image)
        code = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
        assert code.count(" HGMMA.64x") == 4 and "BPT" not in code, case.name
        assert "wgmma" not in cubin.log and cubin.resources.spill_stores == 0, cubin.log
