"""(static facts, config) -> text. A rendered source holds types, constants and one entry point, and names its template's lines.

Only ints, bools, enums and objects that print themselves as C++ (`.cpp`) reach a source: a string never does.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from vidrial.errors import ArgumentError, TemplateError, ToolchainError
from vidrial.layout.atoms import MmaAtom
from vidrial.layout.barriers import Barriers, NamedBarriers
from vidrial.layout.mma import atoms_of
from vidrial.layout.smem import SharedMemory

FORMATS = {"int": "i", "int32_t": "i", "uint32_t": "I", "int64_t": "q", "float": "f"}
TENSOR_MAP, TENSOR_MAP_BYTES, TENSOR_MAP_ALIGNMENT = "TensorMap", 128, 64
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
HOST_HEADERS = "vidrial/host/"
# Template lines after which the rendered text may have more or fewer lines than the template.
RESYNC = re.compile(r"^\s*\{\{\s*\w+\s*\}\}\s*$|\{%-?\s*end(for|if)")


def cpp(value: Any) -> str:
    """The C++ spelling of a value that may appear in a source.

    Raises:
        TemplateError: the value is of any other type.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    spelling = getattr(value, "cpp", None)
    if isinstance(spelling, str):
        return spelling
    raise TemplateError(
        f"{value!r} ({type(value).__name__}) may not reach a source: only ints, bools, enums and objects with a .cpp render"
    )


class Arguments:
    """The kernel's one parameter, a struct passed by value: field name -> C++ type, declared once for both sides.

    Types: `int`, `int32_t`, `uint32_t`, `int64_t`, `float`, any pointer (`Elem const*`), or an array of the former (`int64_t[3]`); and
    `TensorMap`, 128 bytes aligned to 64, which the launch fills in by what `Kernel.maps` says (`maps` has their offsets).
    """

    def __init__(self, **types: str) -> None:
        self.types = types
        self.pointers: dict[str, int] = {}
        self.maps: dict[str, int] = {}
        self._scalars: dict[str, tuple[int, str]] = {}
        end, self.alignment = 0, 8
        for name, kind in types.items():
            element, count = (m[1].strip(), int(m[2])) if (m := re.fullmatch(r"(.+)\[(\d+)\]", kind)) else (kind, 1)
            if kind == TENSOR_MAP:
                self.maps[name] = end = -(-end // TENSOR_MAP_ALIGNMENT) * TENSOR_MAP_ALIGNMENT
                end, self.alignment = end + TENSOR_MAP_BYTES, TENSOR_MAP_ALIGNMENT
                continue
            code = "P" if element.endswith("*") else FORMATS.get(element)
            if code is None:
                raise ArgumentError(
                    f"argument {name}: type {kind!r} is not known; accepted: a pointer, {', '.join(FORMATS)}, or an array of these; {TENSOR_MAP}"
                )
            size = struct.calcsize(code)
            offset = -(-end // size) * size
            if code == "P":
                self.pointers[name] = offset
            else:
                self._scalars[name] = (offset, f"@{count}{code}")
            end = offset + size * count
        self.bytes = -(-end // self.alignment) * self.alignment

    @property
    def cpp(self) -> str:
        """`struct Args {...};`, laid out as `pack` packs it."""
        members = (
            f"  {m[1]} {name}[{m[2]}];"
            if (m := re.fullmatch(r"(.+)\[(\d+)\]", kind))
            else f"  {'vidrial::' * (kind == TENSOR_MAP)}{kind} {name};"
            for name, kind in self.types.items()
        )
        return f"struct alignas({self.alignment}) Args {{\n" + "\n".join(members) + "\n};"

    def pack(self, values: Mapping[str, Any]) -> bytearray:
        """The struct's bytes with every scalar filled in and every pointer null (`pointers` has their offsets).

        Raises:
            ArgumentError: a value is missing or does not fit its type.
        """
        buffer = bytearray(self.bytes)
        for name, (offset, code) in self._scalars.items():
            if name not in values:
                raise ArgumentError(f"argument {name} ({self.types[name]}) has no value; give it in the problem or in scalars()")
            value = values[name]
            try:
                struct.pack_into(code, buffer, offset, *(value if isinstance(value, tuple) else (value,)))
            except struct.error as error:
                raise ArgumentError(f"argument {name}: {value!r} does not fit {self.types[name]}: {error}") from None
        return buffer


class Tiles:
    """Everything that is known before the launch; prints as `struct Tiles`.

    Args:
        threads: threads per CTA.
        smem: the regions of dynamic shared memory, or None.
        min_blocks: CTAs per SM that the register allocation must allow (the second launch bound).
        members: name -> int, bool, DType, or an object that prints as a C++ type, or as a struct of them. Read back as attributes.
    """

    def __init__(self, *, threads: int, smem: SharedMemory | None = None, min_blocks: int = 1, **members: Any) -> None:
        self.threads = threads
        self.smem = smem
        self.min_blocks = min_blocks
        self.members = members

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["members"][name]
        except KeyError:
            raise AttributeError(name) from None

    def guarded(self, guard: int) -> Tiles:
        """The same with `guard` unused bytes between the regions of shared memory: an overflow from one meets them, not the next."""
        if self.smem is None or not guard:
            return self
        return Tiles(threads=self.threads, smem=self.smem.guarded(guard), min_blocks=self.min_blocks, **self.members)

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a CTA, in bytes."""
        return self.smem.bytes if self.smem is not None else 0

    @property
    def cpp(self) -> str:
        """`struct Tiles {...};`, behind the definitions of the atoms that it names."""
        lines = [f"  static constexpr int threads = {self.threads}, min_blocks = {self.min_blocks};"]
        for name, value in self.members.items():
            if isinstance(value, bool):
                lines.append(f"  static constexpr bool {name} = {cpp(value)};")
            elif isinstance(value, int):
                lines.append(f"  static constexpr int {name} = {value};")
            elif isinstance(value, (Barriers, NamedBarriers)):
                lines.append(value.declare(name))
            else:
                lines.append(f"  using {name} = {cpp(value)};")
        if self.smem is not None:
            lines.append("  struct Smem { static constexpr int " + ", ".join(f"{k} = {v}" for k, v in self.smem.members().items()) + "; };")
        atoms = (atom for member in self.members.values() for atom in atoms_of(member) if isinstance(atom, MmaAtom))
        definitions = dict.fromkeys(atom.definition for atom in atoms if atom.definition)
        return "\n".join((*definitions, "struct Tiles {", *lines, "};"))


@dataclass(frozen=True)
class Source:
    """A rendered translation unit: its text, entry point, and the folders its own includes are found in."""

    text: str
    entry: str
    template: str
    include_dirs: tuple[str, ...]

    def __str__(self) -> str:
        return self.text


@functools.lru_cache(maxsize=256)
def _includes_of(path: str, _mtime: int, _size: int) -> tuple[bytes, tuple[str, ...]]:
    data = Path(path).read_bytes()
    return data, tuple(INCLUDE.findall(data.decode()))


def _included(name: str, folders: Iterable[Path]) -> tuple[bytes, tuple[str, ...]] | None:
    """Content and includes of the file that an include finds in `folders`; None for a system header."""
    for folder in folders:
        path = f"{folder}/{name}"
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found = os.stat(path)
            if stat.S_ISREG(found.st_mode):
                return _includes_of(path, found.st_mtime_ns, found.st_size)
    return None


def closure_digest(text: str, folders: tuple[Path, ...]) -> str:
    """sha256 over name and content of every file that `text` includes from `folders`, and they in turn.

    System headers are not ours, and those of the host target no part of what a GPU runs.
    """
    found: dict[str, bytes] = {}
    waiting, seen = list(INCLUDE.findall(text)), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or name.startswith(HOST_HEADERS):
            continue
        seen.add(name)
        included = _included(name, folders)
        if included is not None:
            found[name], inner = included
            waiting += inner
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(f"{name}\0{len(found[name])}\0".encode() + found[name])
    return digest.hexdigest()


def render(template: Path, entry: str, names: Mapping[str, Any]) -> Source:
    """Render a template; `names` are what it may mention. The first line is the digest of the include closure.

    Raises:
        TemplateError: an undefined name, a value that may not render, or a syntax error, with the template's line.
    """
    lines = template.read_text().splitlines()
    marked: list[str] = []
    for number, line in enumerate(lines, 1):
        marked.append(line)
        if RESYNC.search(line):
            marked.append(f'#line {number + 1} "{template.name}"')
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, finalize=cpp, keep_trailing_newline=True, autoescape=False)
    try:
        body = environment.from_string("\n".join(marked) + "\n").render(**names)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"{template.name}:{error.lineno}: {error.message}") from None
    except jinja2.UndefinedError as error:
        raise TemplateError(f"{template.name}: {error.message}; known names: {', '.join(sorted(names))}") from None
    folders = (template.parent, vidrial_include())
    text = f'// includes sha256:{closure_digest(body, folders)}\n#line 1 "{template.name}"\n{body}'
    return Source(text, entry, template.name, tuple(str(f) for f in folders))


def vidrial_include() -> Path:
    """The directory that holds Vidrial's own headers, installed or in the source tree.

    Raises:
        ToolchainError: the installation lacks its templates.
    """
    spec = importlib.util.find_spec("vidrial.templates")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / "include" / "vidrial" / "prelude.cuh").is_file():
            return Path(folder) / "include"
    raise ToolchainError(
        "the package vidrial.templates lacks include/vidrial/prelude.cuh: the installation is incomplete; reinstall vidrial"
    )
