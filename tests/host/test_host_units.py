"""Every emulated atom and intrinsic against CuTe's traits and NumPy, under every schedule."""

from __future__ import annotations

import re

import pytest
from machine_code import disassemble
from units import Case, cases, pieces

from vidrial.build.nvrtc import compile_source
from vidrial.host.target import SCHEDULES, compile_host
from vidrial.layout.barriers import Roles


@pytest.mark.parametrize("case", [*cases(), *pieces.cases()], ids=lambda case: case.name)
def test_unit(case: Case) -> None:
    binary = compile_host(case.source, "unit")
    fresh = [array.copy() for array in case.arrays]
    for schedule in SCHEDULES:
        for array, original in zip(case.arrays, fresh, strict=True):
            array[...] = original
        stats = binary.launch((case.ctas,), case.block, case.shared_bytes, case.packed, case.pointers, schedule)
        case.check()
        for name, count in (case.counts or {}).items():
            assert getattr(stats, name) == count, name


def test_wgmma_is_compiled_to_itself() -> None:
    """CuTe's own traits say the same of who holds what, and the GPU's code holds the instruction, not a trap in its place."""
    for case in [case for case in cases() if '"wgmma.cu"' in case.source][::7]:
        cubin = compile_source("#define CHECK_TRAITS\n" + case.source, case.name, "sm_90a")
        code = sass(cubin.image)
        assert code.count(" HGMMA.64x") == 4 and "BPT" not in code, case.name
        assert "wgmma" not in cubin.log and cubin.resources.spill_stores == 0, cubin.log


def sass(image: bytes) -> str:
    return "".join(f" {text}\n" for _, text in disassemble(image))


@pytest.mark.parametrize("case", [case for case in cases() if case.maps][::4], ids=lambda case: case.name)
def test_tma_is_compiled_to_itself(case: Case) -> None:
    cubin = compile_source(case.source, case.name, "sm_90a")
    code = sass(cubin.image)
    assert "UTMALDG" in code and "SYNCS" in code and "BPT" not in code
    assert ("HGMMA.64x" in code) == (case.name.startswith("own-"))
    assert "wgmma" not in cubin.log and cubin.resources.spill_stores == 0, cubin.log


def test_registers_are_reallocated() -> None:
    (case,) = (case for case in cases() if case.name == "roles")
    cubin = compile_source(case.source, case.name, "sm_90a")
    assert cubin.resources.registers == Roles(1, 2).launched == 168 and cubin.resources.spill_stores == 0
    assert {"UTMALDG", "UBLKCP", "USETMAXREG"} <= set(re.findall(r"\b[A-Z]+\b", sass(cubin.image)))
