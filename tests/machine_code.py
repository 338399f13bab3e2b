"""The machine code of our kernels, held still while the sources are reorganised: what compiles now, beside a committed table.

    python tests/machine_code.py check          # the kernels that calls may pick; --all: those of every kind of problem, too
    python tests/machine_code.py write --all    # measure again, show what differs, and write the table

`machine_code.json` lists kernels, each with an op's problem and config that launch it, and what came out of the compiler: registers, bytes
spilled, static shared memory, instructions, and a digest of the very instructions. Names of files and of kernels, comments and line
numbers are no part of these. After a renaming, edit the names in the table (`kernel`, `facts`, `config`, `problem`, `choices`): the figures
must stay. Needs no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, get_type_hints

from vidrial.build.nvrtc import Cubin
from vidrial.build.pool import CompilePool, Job
from vidrial.build.toolchain import Toolchain
from vidrial.errors import VidrialError
from vidrial.spec.choices import describe
from vidrial.spec.fields import fields
from vidrial.spec.registry import find_op

TABLE = Path(__file__).with_suffix(".json")
OP, ARCH = "power_retention", "sm_90a"
# Of an instruction of 128 bits the lowest 12 say which one it is.
INSTRUCTION_BYTES, OPCODE, NOP = 16, 0xFFF, 0x918
NOBITS = 8  # a section without bytes


class Rendered(NamedTuple):
    """A kernel's source, and its static facts and config as the table spells them."""

    text: str
    entry: str
    includes: tuple[str, ...]
    facts: str
    config: str


# What knows the API of Vidrial is here: the imports above and these three functions.


def render(kernel: str, problem: Mapping[str, Any], choices: Mapping[str, Any]) -> Rendered:
    """The source of one kernel among those that the op launches for a problem and a config.

    Raises:
        VidrialError, LookupError, TypeError: a name is not known, or the config is refused.
    """
    op = find_op(OP)
    asked, config = op.example(**problem), record(op.config, choices)
    stages = {stage.kernel.name: stage for stage in op.stages(asked, config)}
    if kernel not in stages:
        raise LookupError(f"no launch is of {kernel}, only of {', '.join(stages)}")
    stage = stages[kernel]
    source = stage.kernel.source(stage.problem, stage.config)
    facts = {**fields(asked, "static"), "state": config.chunk > 0}
    spelled = " ".join(f"{name}={value}" for name, value in facts.items())
    return Rendered(source.text, source.entry, source.include_dirs, spelled, describe(stage.config))


def compile_all(sources: Sequence[Rendered], jobs: int | None, seen: Seen | None = None) -> Iterator[tuple[int, Code | str]]:
    """(index, what its machine code is, or why there is none), in the order in which they are done; `seen` gets each one's cubin."""
    with CompilePool(jobs) as pool:
        todo = [Job(i, s.text, s.entry, ARCH, s.config, s.includes) for i, s in enumerate(sources)]
        for key, result in pool.compile_many(todo):
            index = int(str(key))
            if not isinstance(result, Cubin):
                yield index, str(result)
                continue
            if seen is not None:
                seen(index, result)
            used, text = result.resources, section(result.image, f".text.{sources[index].entry}")
            spills = used.spill_stores + used.spill_loads
            yield index, Code(used.registers, spills, used.static_smem, instructions(text), hashlib.sha256(text).hexdigest()[:16])


Seen: TypeAlias = Callable[[int, Cubin], None]


def toolchain() -> str:
    """The versions that the machine code depends on."""
    return str(Toolchain.find().version)


@dataclasses.dataclass(frozen=True)
class Code:
    """What the compiler made of a kernel; `code` is the sha256 of its instructions, the first 16 digits."""

    registers: int
    spills: int
    smem: int
    instructions: int
    code: str


@dataclasses.dataclass(frozen=True)
class Entry:
    """A kernel of the table: what it is, in words; its figures, None before they are known; and an op's problem and config that launch it."""

    kernel: str
    facts: str
    config: str
    picked: bool
    code: Code | None
    problem: dict[str, Any]
    choices: dict[str, Any]

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Entry:
        """An entry from its JSON."""
        names = [field.name for field in dataclasses.fields(Code)]
        code = Code(**{name: data[name] for name in names}) if names[0] in data else None
        return cls(code=code, **{name: value for name, value in data.items() if name not in names})

    def json(self) -> dict[str, Any]:
        """The entry as JSON: what a reader looks for comes first."""
        figures = dataclasses.asdict(self.code) if self.code else {}
        words = {"kernel": self.kernel, "facts": self.facts, "config": self.config, "picked": self.picked}
        return {**words, **figures, "problem": self.problem, "choices": self.choices}


@dataclasses.dataclass(frozen=True)
class Table:
    """The committed table: which toolchain compiled its kernels, and the kernels."""

    toolchain: str
    arch: str
    kernels: tuple[Entry, ...]

    @classmethod
    def read(cls, path: Path) -> Table:
        """The table in a file."""
        data = json.loads(path.read_text())
        return cls(data["toolchain"], data["arch"], tuple(Entry.of(entry) for entry in data["kernels"]))

    def write(self, path: Path) -> None:
        """One line per entry, so that a difference is a line."""
        head = f' "toolchain": {json.dumps(self.toolchain)},\n "arch": {json.dumps(self.arch)},\n "kernels": [\n'
        lines = ",\n".join(f"  {json.dumps(entry.json())}" for entry in self.kernels)
        path.write_text(f"{{\n{head}{lines}\n ]\n}}\n")


@dataclasses.dataclass(frozen=True)
class Difference:
    """An entry, and what it is now: the words and figures, or why there are none."""

    entry: Entry
    now: Entry | str

    def cells(self) -> tuple[str, ...]:
        """Its line in the report."""
        if isinstance(self.now, str):
            return (self.entry.kernel, self.entry.facts, self.entry.config, "no code", *[""] * 4, self.now.replace("\n", " "))
        old, new = self.entry, self.now
        figures = ["-" if e.code is None else [e.code.registers, e.code.spills, e.code.smem, e.code.instructions] for e in (old, new)]
        pairs = itertools.zip_longest(*figures, fillvalue="-")
        same = "same code" if old.code and new.code and old.code.code == new.code.code else "other code"
        words = (arrow(old.kernel, new.kernel), arrow(old.facts, new.facts), arrow(old.config, new.config))
        return (*words, same, *(arrow(*pair) for pair in pairs), "")


def measure(entries: Sequence[Entry], jobs: int | None, progress: bool = False, seen: Seen | None = None) -> list[Entry | str]:
    """Each entry as it is now, or why it has no machine code. `seen`: told the index and the cubin of each that compiles."""
    found: list[Entry | str] = ["not compiled"] * len(entries)
    rendered: dict[int, Rendered] = {}
    for i, entry in enumerate(entries):
        try:
            rendered[i] = render(entry.kernel, entry.problem, entry.choices)
        except (VidrialError, LookupError, TypeError) as error:
            found[i] = f"{type(error).__name__}: {error}"
    places, start = list(rendered), time.monotonic()
    told = (lambda index, cubin: seen(places[index], cubin)) if seen is not None else None
    for done, (index, code) in enumerate(compile_all(list(rendered.values()), jobs, told), 1):
        i = places[index]
        words = rendered[i]
        found[i] = code if isinstance(code, str) else dataclasses.replace(entries[i], facts=words.facts, config=words.config, code=code)
        if progress and (sys.stderr.isatty() or done % 20 == 0 or done == len(places)):
            print(f"\r{done}/{len(places)} kernels, {time.monotonic() - start:.0f} s ", end="", file=sys.stderr, flush=True)
    if progress and places:
        print(file=sys.stderr)
    return found


def differences(entries: Sequence[Entry], now: Sequence[Entry | str]) -> list[Difference]:
    """The entries that are another than the table says, in its order."""
    return [Difference(old, new) for old, new in zip(entries, now, strict=True) if old != new]


def check(table: Table, every: bool, jobs: int | None, progress: bool = False, seen: Seen | None = None) -> list[Difference]:
    """What differs from a table, of the kernels that calls may pick or of every one. `seen`: as of `measure`."""
    entries = chosen(table, every)
    return differences(entries, measure(entries, jobs, progress, seen))


def chosen(table: Table, every: bool) -> list[Entry]:
    """All entries, or those that calls may pick: of configs that rankings keep."""
    return [entry for entry in table.kernels if every or entry.picked]


def report(found: Sequence[Difference], table: Table) -> str:
    """The differences, a line each; another toolchain comes first, because it explains them."""
    if not found:
        return ""
    versions = toolchain()
    head = ("kernel", "static facts", "config", "machine code", "registers", "spilled B", "smem B", "instructions", "")
    lines = [head, *(difference.cells() for difference in found)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))).rstrip() for line in lines]
    if versions != table.toolchain:
        text.insert(0, f"the table is of another toolchain: {table.toolchain}; this is {versions}")
    return "\n".join(text)


def arrow(old: object, new: object) -> str:
    """`old -> new`, or the value that both are."""
    return str(old) if old == new else f"{old} -> {new}"


def record(kind: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass from its fields' values by name, those of the dataclasses within it likewise.

    Raises:
        LookupError: the names are others than the fields.
    """
    types, names = get_type_hints(kind), [field.name for field in dataclasses.fields(kind)]
    if set(names) != set(values):
        raise LookupError(f"{kind.__module__}.{kind.__qualname__} has {', '.join(names)}, the table {', '.join(values)}")
    return kind(**{name: record(types[name], value) if isinstance(value, Mapping) else value for name, value in values.items()})


def section(image: bytes, name: str) -> bytes:
    """A section of an ELF image of 64 bits.

    Raises:
        LookupError: there is none of this name.
    """
    found = sections(image)
    if name not in found:
        raise LookupError(f"the cubin has no section {name}")
    return found[name]


def sections(image: bytes) -> dict[str, bytes]:
    """The bytes of all sections of an ELF image of 64 bits; of one without bytes of its own the size, as text."""
    (table,) = struct.unpack_from("<Q", image, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", image, 0x3A)
    # Name, type, flags, address, offset, bytes, and four more that do not matter here.
    headers = [struct.unpack_from("<IIQQQQIIQQ", image, table + size * i) for i in range(count)]
    names, found = headers[names_index][4], dict[str, bytes]()
    for at, kind, _, _, offset, length, *_ in headers:
        name = image[names + at : image.index(b"\0", names + at)].decode()
        found[name] = str(length).encode() if kind == NOBITS else image[offset : offset + length]
    return found


def disassemble(image: bytes) -> list[tuple[int, str]]:
    """(address, instruction) of a cubin, by cuobjdump.

    Raises:
        LookupError: there is no cuobjdump.
    """
    import nvidia

    tool = next((t for folder in nvidia.__path__ for t in Path(folder).glob("cu*/bin/cuobjdump")), None)
    if tool is None:
        raise LookupError("no cuobjdump; install requirements/test.txt")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return [(int(address, 16), line.strip()) for address, line in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", text, re.MULTILINE)]


def faults(cubin: Cubin, *, wgmma: bool, tma: bool, added_wait: bool = False, spilled: int = 0) -> list[str]:
    """What a kernel's machine code has that it should not have, or lacks: instructions of wgmma and TMA exactly where it claims them, no trap,
    no more than `spilled` bytes spilled, nothing that ptxas says of its wgmma. `added_wait`: ptxas may add one wait (C7517), in no loop that
    multiplies."""
    code, used = disassemble(cubin.image), cubin.resources
    said = [note for note in re.findall(r"\((C7[56]\d\d)\)", cubin.log) if not (added_wait and note == "C7517")]
    found = [f"ptxas says {', '.join(said)}"] if said else []
    for opcode, claimed in (("HGMMA", wgmma), ("UTMALDG", tma)):
        count = sum(opcode in text for _, text in code)
        if (count > 0) != claimed:
            found.append(f"{count} {opcode}")
    if any("BPT" in text for _, text in code):
        found.append("a trap")
    if used.spill_stores + used.spill_loads > spilled:
        found.append(f"{used.spill_stores + used.spill_loads} bytes spilled")
    if added_wait and (drains := drains_in_loops(code)):
        found.append(f"{drains} waits for all products in loops that multiply")
    return found


def drains_in_loops(code: Sequence[tuple[int, str]]) -> int:
    """Waits for every product under way, in the innermost loops that have products."""
    loops = []
    for address, text in code:
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)$", text)
        if target is not None and int(target[1], 16) < address:
            body = [line for at, line in code if int(target[1], 16) <= at <= address]
            if any("HGMMA" in line for line in body):
                loops.append((int(target[1], 16), address, body))
    # NOTE: what waits for a barrier in vain goes on behind the kernel's end, and comes back from there: no loop around what lies between.
    inner = [body for first, last, body in loops if not any(first <= end < last for _, end, _ in loops)]
    return sum("WARPGROUP.DEPBAR.LE gsb0, 0x0" in line for body in inner for line in body)


def instructions(text: bytes) -> int:
    """Instructions in a kernel's code, without the NOPs that pad its end."""
    count = len(text) // INSTRUCTION_BYTES
    while count and struct.unpack_from("<Q", text, INSTRUCTION_BYTES * (count - 1))[0] & OPCODE == NOP:
        count -= 1
    return count


def main() -> int:
    """The command; 1 if something differs, or, when the table is written, if a kernel has no machine code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("check", "write"), help="compare with the table, or write it anew")
    parser.add_argument("--all", action="store_true", help="every kernel of the table, not only those that calls may pick")
    parser.add_argument("--jobs", type=int, help="processes that compile; by default VIDRIAL_JOBS, or as many as there are cores")
    parser.add_argument("--table", type=Path, default=TABLE, help="by default the one beside this file")
    options = parser.parse_args()
    table, start = Table.read(options.table), time.monotonic()
    entries = chosen(table, options.all)
    now = measure(entries, options.jobs, progress=True)
    found = differences(entries, now)
    if found:
        print(report(found, table))
    print(f"{len(found)} of {len(entries)} kernels differ, {time.monotonic() - start:.0f} s")
    if options.action == "check":
        return bool(found)
    failed = sum(isinstance(entry, str) for entry in now)
    if failed or (toolchain() != table.toolchain and not options.all):
        why = f"{failed} have no machine code" if failed else "with another toolchain, all must be: --all"
        print(f"nothing is written: {why}")
        return 1
    renewed = {id(old): new for old, new in zip(entries, now, strict=True) if isinstance(new, Entry)}
    Table(toolchain(), ARCH, tuple(renewed.get(id(entry), entry) for entry in table.kernels)).write(options.table)
    print(options.table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
