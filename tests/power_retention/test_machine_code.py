"""The kernels that calls may pick have the machine code of the table; and what is another is found."""

from __future__ import annotations

import dataclasses
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import machine_code
import pytest
from machine_code import (
    TABLE,
    Difference,
    Entry,
    Rendered,
    Table,
    check,
    chosen,
    differences,
    drains_in_loops,
    faults,
    instructions,
    measure,
    render,
    report,
    section,
)

from vidrial.build.nvrtc import Cubin, compile_source

# Compiles fastest.
SMALLEST = "power_gates"
NOP, EXIT = struct.pack("<QQ", 0x7918, 0x000FC00000000000), struct.pack("<QQ", 0x794D, 0x000FEA0003800000)


@pytest.fixture(scope="module")
def table() -> Table:
    return Table.read(TABLE)


@pytest.fixture(scope="module")
def smallest(table: Table) -> Entry:
    return next(entry for entry in table.kernels if entry.kernel == SMALLEST)


def compiled(monkeypatch: pytest.MonkeyPatch, entry: Entry, edited: Rendered) -> list[Difference]:
    """What differs when an entry renders like that."""
    monkeypatch.setattr(machine_code, "render", lambda *_: edited)
    return differences([entry], measure([entry], 1))


# ptxas adds a wait to these (C7517): behind their loops, where the accumulators are stored on a path that may have waited already or not.
WITH_ADDED_WAIT = {"power_scan_wgmma"}
# Bytes that a kernel may spill, stored and loaded: attend at d = 128 by 64 keys in 3 stages does, and is 7 % faster than in the order that does not.
SPILLED = 8


def test_kernels_that_calls_may_pick_have_the_machine_code_of_the_table(table: Table) -> None:
    """And it holds what it should: wgmma where the config says so, no trap, next to no spill, and no word of ptxas on its wgmma but that of the scans."""
    entries, wrong = chosen(table, False), list[str]()

    def seen(index: int, cubin: Cubin) -> None:
        entry = entries[index]
        mine = faults(cubin, wgmma="mma=wgmma" in entry.config, tma=False, added_wait=entry.kernel in WITH_ADDED_WAIT, spilled=SPILLED)
        wrong.extend(f"{entry.kernel} {entry.facts} {entry.config}: {fault}" for fault in mine)

    found = check(table, every=False, jobs=None, seen=seen)
    assert not found, f"{len(found)} kernels are not as {TABLE.name} says:\n{report(found, table)}"
    assert not wrong, "\n".join(wrong)
    assert any("mma=wgmma" in entry.config for entry in entries)


LOOP = """extern "C" __global__ void k(float* x, int n) {
  for (int i = 0; i < n; ++i) x[i] *= x[n - i];
  /* HERE */
}"""


def test_faults_of_machine_code_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = compile_source(LOOP, "k", "sm_90a")
    assert faults(plain, wgmma=False, tma=False) == []
    assert faults(plain, wgmma=True, tma=True) == ["0 HGMMA", "0 UTMALDG"]
    trap = compile_source(LOOP.replace("/* HERE */", "if (x[0] > 1.f) __trap();"), "k", "sm_90a")
    assert faults(trap, wgmma=False, tma=False) == ["a trap"]
    spilled = dataclasses.replace(plain, resources=dataclasses.replace(plain.resources, spill_stores=4, spill_loads=8))
    assert faults(spilled, wgmma=False, tma=False) == faults(spilled, wgmma=False, tma=False, spilled=11) == ["12 bytes spilled"]
    assert faults(spilled, wgmma=False, tma=False, spilled=12) == []
    said = dataclasses.replace(plain, log="ptxas info : (C7517) warpgroup.wait is injected\nptxas info : (C7602) Insufficient registers")
    assert faults(said, wgmma=False, tma=False) == ["ptxas says C7517, C7602"]
    assert faults(said, wgmma=False, tma=False, added_wait=True) == ["ptxas says C7602"]
    product, drain, kept = (
        "HGMMA.64x64x16.F32.BF16 R24, R112, gdesc[UR16]",
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
        "WARPGROUP.DEPBAR.LE gsb0, 0x1",
    )
    inner = [(0x20, kept), (0x30, product), (0x40, "@!P0 BRA 0x20")]
    outer = [(0x00, "NOP"), (0x10, drain), *inner, (0x50, "@P1 BRA 0x10"), (0x60, drain), (0x70, "EXIT"), (0x80, "BRA 0x80")]
    assert drains_in_loops(outer) == 0
    assert drains_in_loops([(a, drain if a == 0x20 else text) for a, text in outer]) == 1
    monkeypatch.setattr(machine_code, "disassemble", lambda _: [*inner, (0x38, drain)])
    assert faults(plain, wgmma=True, tma=False, added_wait=True) == ["1 waits for all products in loops that multiply"]


def test_table_is_as_it_would_be_written_and_names_every_kernel_once(table: Table, tmp_path: Path) -> None:
    table.write(tmp_path / "table.json")
    assert (tmp_path / "table.json").read_text() == TABLE.read_text()
    assert all(entry.code for entry in table.kernels) and any(entry.picked for entry in table.kernels)
    assert len({(entry.kernel, entry.facts, entry.config) for entry in table.kernels}) == len(table.kernels)


@pytest.mark.parametrize("name", ["registers", "spills", "smem", "instructions", "code"])
def test_an_altered_figure_is_found(table: Table, smallest: Entry, name: str) -> None:
    assert smallest.code is not None
    old = getattr(smallest.code, name)
    other: dict[str, Any] = {name: "0" * 16 if name == "code" else old + 1}
    altered = dataclasses.replace(smallest.code, **other)
    (found,) = differences([dataclasses.replace(smallest, code=altered)], [smallest])
    text = report([found], table)
    assert SMALLEST in text and smallest.config in text
    assert ("other code" if name == "code" else f"{old + 1} -> {old}") in text
    assert ("same code" in text) == (name != "code")


def test_an_edited_template_is_found(monkeypatch: pytest.MonkeyPatch, table: Table, smallest: Entry) -> None:
    source = render(smallest.kernel, smallest.problem, smallest.choices)
    text, count = re.subn(r"(__global__ [^{]*\{)", r"\1 if (blockIdx.y == 12345u) return;", source.text)
    assert count == 1
    found = compiled(monkeypatch, smallest, source._replace(text=text))
    assert "other code" in report(found, table)


def test_an_edited_header_is_found(monkeypatch: pytest.MonkeyPatch, table: Table, smallest: Entry, tmp_path: Path) -> None:
    source, folders, count = render(smallest.kernel, smallest.problem, smallest.choices), [], 0
    for i, folder in enumerate(source.includes):
        folders.append(str(shutil.copytree(folder, tmp_path / str(i))))
    for header in tmp_path.rglob("*.cuh"):
        text, edits = re.subn(r"-60\.0?f", "-61.0f", header.read_text())
        header.write_text(text)
        count += edits
    assert count
    found = compiled(monkeypatch, smallest, source._replace(includes=tuple(folders)))
    assert "other code" in report(found, table)


def test_names_comments_and_lines_are_no_machine_code(monkeypatch: pytest.MonkeyPatch, smallest: Entry) -> None:
    source = render(smallest.kernel, smallest.problem, smallest.choices)
    text = re.sub(r'#line (\d+) "[^"]+"', r'#line 7\1 "elsewhere/other.cu"', source.text)
    text = re.sub(rf"\b{source.entry}\((?=__grid_constant__)", "other_name(", text) + "// another comment\n"
    assert "other_name" in text and "elsewhere" in text
    assert not compiled(monkeypatch, smallest, source._replace(text=text, entry="other_name"))


def test_a_name_that_is_gone_is_reported_not_raised(table: Table, smallest: Entry) -> None:
    gone = [
        dataclasses.replace(smallest, kernel="power_nothing"),
        dataclasses.replace(smallest, choices={"chunks": 0}),
        dataclasses.replace(smallest, problem={"tokens": 1}),
    ]
    found = differences(gone, measure(gone, 1))
    text = report(found, table)
    assert len(found) == 3 and all(isinstance(difference.now, str) for difference in found)
    assert "no launch is of power_nothing" in text and "the table chunks" in text and "tokens" in text


def test_a_source_that_does_not_compile_is_reported(monkeypatch: pytest.MonkeyPatch, table: Table, smallest: Entry) -> None:
    source = render(smallest.kernel, smallest.problem, smallest.choices)
    found = compiled(monkeypatch, smallest, source._replace(text=source.text + "\nint broken = ;\n"))
    assert "does not compile" in report(found, table)


def test_another_toolchain_is_named_first(table: Table, smallest: Entry) -> None:
    other = dataclasses.replace(table, toolchain="nvrtc 12.0")
    assert report([Difference(smallest, "gone")], other).startswith("the table is of another toolchain: nvrtc 12.0;")


@pytest.mark.parametrize(("text", "count"), [(b"", 0), (NOP, 0), (EXIT, 1), (NOP + EXIT + 3 * NOP, 2)])
def test_nops_at_the_end_do_not_count(text: bytes, count: int) -> None:
    assert instructions(text) == count


def test_a_section_is_found_by_its_whole_name() -> None:
    names = b"\0.text.f\0.text\0"
    head = b"\x7fELF".ljust(0x28, b"\0") + struct.pack("<Q", 0x60) + bytes(10) + struct.pack("<HHH", 64, 3, 2)
    image = head.ljust(0x40, b"\0") + names.ljust(16, b"\0") + b"codecode".ljust(16, b"\0")
    for name, offset, size in ((1, 0x50, 4), (9, 0x54, 4), (0, 0x40, 16)):
        image += struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, offset, size, 0, 0, 0, 0)
    assert section(image, ".text.f") == section(image, ".text") == b"code"
    with pytest.raises(LookupError, match=r"\.text\.g"):
        section(image, ".text.g")
