"""(static facts, config) -> text. A rendered source holds types, constants and one entry point, and names its template's lines.

Only ints, bools, enums and objects that print themselves as C++ (`.cpp`) reach a source: a string never does.
"""

from __future__ import annotations

import re
import struct
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from vidrial.errors import ArgumentError, TemplateError, VidrialError
from vidrial.layout.atoms import MmaAtom
from vidrial.layout.barriers import Barriers, NamedBarriers
from vidrial.layout.mma import atoms_of
from vidrial.layout.smem import SharedMemory
from vidrial.spec.digest import closure_digest
from vidrial.spec.headers import vidrial_include

FORMATS = {"int": "i", "int32_t": "i", "uint32_t": "I", "int64_t": "q", "float": "f"}
TENSOR_MAP, TENSOR_MAP_BYTES, TENSOR_MAP_ALIGNMENT = "TensorMap", 128, 64
# The kernels that a rendered template defines.
ENTRY = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\(')
# Template lines after which the rendered text may have more or fewer lines than the template.
RESYNC = re.compile(r"^\s*\{\{\s*\w+\s*\}\}\s*$|\{%-?\s*(?:end(?:for|if)|else|elif)\b")
# What is one across lines. Of C++: comments, strings, raw ones among them, and a line that goes on; of Jinja: tags, of which none of these
# begins (// divides), and line breaks that the tag behind them takes away.
WHOLE = re.compile(
    r"""\{\{.*?\}\}|\{%.*?%\}|\{\#.*?\#\}|\n\s*(?=\{[{%\#]-)|"""
    r"""/\*.*?\*/|//(?:\\\n|[^\n])*|R"([^\s()\\"]{0,16})\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|\\\n(?:[^\n]*\\\n)*""",
    re.DOTALL,
)
# Jinja's blocks that another one ends, and those that want another template.
OPENING = frozenset({"for", "if", "block", "macro", "call", "filter", "with", "autoescape"})
LOADING = frozenset({"include", "import", "from", "extends"})
# What an error is about: a name, an attribute.
NAMED = re.compile(r"'(\w+)' is undefined|has no (?:attribute|element) '?(\w+)|\w\.(\w+) is not known before|named '(\w+)'")


def cpp(value: object) -> str:
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
    def scalars(self) -> tuple[str, ...]:
        """Names of what is no pointer."""
        return tuple(self._scalars)

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

    def pack(self, values: Mapping[str, object]) -> bytearray:
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
        members: name -> int, bool, DType, or an object that prints as a C++ type, or as a struct of them. Read back as attributes. Static
            facts and choices need not be named: those that the template asks for, as `Tiles::name`, become members by themselves
            (`Kernel.source`).
    """

    def __init__(self, *, threads: int, smem: SharedMemory | None = None, min_blocks: int = 1, **members: object) -> None:
        if not isinstance(threads, int) or not isinstance(smem, SharedMemory | None):
            raise ArgumentError(
                f"Tiles(threads={threads!r}, smem={smem!r}); accepted: a number of threads, and SharedMemory(A=..., ...) or None"
            )
        self.threads = threads
        self.smem = smem
        self.min_blocks = min_blocks
        self.members = members

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["members"][name]
        except KeyError:
            raise AttributeError(name) from None

    def with_facts(self, facts: Mapping[str, Any]) -> Tiles:
        """The same with further members, before its own."""
        return Tiles(threads=self.threads, smem=self.smem, min_blocks=self.min_blocks, **{**facts, **self.members})

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


def render(template: Path, entry: str, names: Mapping[str, object]) -> Source:
    """Render a template; `names` are what it may mention. The first line is the digest of the include closure.

    Raises:
        TemplateError: an undefined name, a value that may not render, or a syntax error, with the template's line.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, finalize=cpp, keep_trailing_newline=True, autoescape=False)
    # As the compiler counts: what else Unicode ends lines with ends none.
    text = template.read_text(encoding="utf-8")
    tags = _checked(environment, text, template.name)
    marked, lines = _marked(text, tags, template.name)
    try:
        body = environment.from_string(marked).render(**names)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"{template.name}:{_named_line(tags, lines[error.lineno - 1], str(error.message))}: {error.message}") from None
    except Exception as error:  # an author's objects may raise anything
        at = _line(error)
        if at is None or (isinstance(error, VidrialError) and not isinstance(error, TemplateError)):
            raise
        known = f"; known names: {', '.join(sorted(names))}" if isinstance(error, jinja2.UndefinedError) else ""
        what = "" if isinstance(error, jinja2.TemplateError | TemplateError) else f"{type(error).__name__}: "
        line = _named_line(tags, lines[at - 1], str(error))
        raise TemplateError(f"{template.name}:{line}: {what}{error}{known}") from None
    entries = ENTRY.findall(body)
    if entries and entry not in entries:
        raise TemplateError(f"{template.name}: its kernel is {', '.join(entries)}; the Kernel's name is {entry}: they must be the same")
    folders = include_folders(template)
    text = f'// includes sha256:{closure_digest(body, folders, template.name)}\n#line 1 "{template.name}"\n{body}'
    return Source(text, entry, template.name, tuple(str(f) for f in folders))


@dataclass(frozen=True)
class _Tag:
    """One of Jinja's in a template: from which line to which, whether it takes line breaks around it away, and its tokens with their lines."""

    kind: str
    begin: int
    end: int
    stripped: bool
    tokens: tuple[tuple[int, str], ...]

    @property
    def name(self) -> str:
        """Of a block its first word."""
        return self.tokens[0][1] if self.kind == "block" and self.tokens else ""

    @property
    def opens(self) -> bool:
        """Whether it begins what another one ends; `set` does so without a value."""
        return self.name in OPENING or (self.name == "set" and all(token != "=" for _, token in self.tokens))


def _tags(environment: jinja2.Environment, text: str) -> list[_Tag]:
    """The tags and comments of a template in order; of raw text both ends.

    Raises:
        jinja2.TemplateSyntaxError: the text is no series of tags.
    """
    found, begun, stripped, tokens = list[_Tag](), 0, False, list[tuple[int, str]]()
    for line, kind, value in environment.lex(text):
        if kind.endswith("_begin"):
            begun, stripped, tokens = line, "-" in value, []
            # Of raw text the whole opening tag is one token.
            if kind == "raw_begin":
                found.append(_Tag("raw", line, line + value.count("\n"), value.rstrip().endswith("-%}"), ()))
        elif kind.endswith("_end"):
            found.append(_Tag(kind.removesuffix("_end"), begun, line + value.count("\n"), stripped or "-" in value, tuple(tokens)))
        elif kind not in ("data", "whitespace"):
            tokens.append((line, value))
    return found


def _checked(environment: jinja2.Environment, text: str, name: str) -> list[_Tag]:
    """The tags of a template that is one.

    Raises:
        TemplateError: its syntax is wrong, with the line where what is wrong begins.
    """
    try:
        tags = _tags(environment, text)
        environment.parse(text)
    except jinja2.TemplateSyntaxError as error:
        message = error.message or ""
        line = error.lineno if "end of template" not in message and "nesting mistake" not in message else _left_open(tags) or error.lineno
        raise TemplateError(f"{name}:{line}: {message}") from None
    for tag in tags:
        if tag.name in LOADING:
            raise TemplateError(f"{name}:{tag.begin}: {tag.name} finds no other template; what several share is a header: #include it")
        if tag.kind == "variable" and len(tag.tokens) == 1 and tag.tokens[0][1].isdecimal():
            number = tag.tokens[0][1]
            raise TemplateError(
                f"{name}:{tag.begin}: {{{{{number}}}}} is Jinja's and prints {number}; if it is C++, part the braces: {{ {{{number}}} }}"
            )
    return tags


def _left_open(tags: Sequence[_Tag]) -> int | None:
    """The line of the innermost tag that no other one ends, where the nesting goes wrong."""
    open_ = list[_Tag]()
    for tag in tags:
        if tag.opens:
            open_.append(tag)
        elif tag.name.startswith("end") and open_:
            if open_[-1].name != tag.name.removeprefix("end"):
                break
            open_.pop()
    return open_[-1].begin if open_ else None


def _named_line(tags: Sequence[_Tag], line: int, message: str) -> int:
    """The line on which a tag of several has what an error names; `line`, Jinja's, where it names nothing."""
    named = NAMED.search(message)
    name = named and next(filter(None, named.groups()))
    for tag in tags:
        if tag.begin <= line <= tag.end and tag.begin < tag.end:
            return next((at for at, token in tag.tokens if token == name), line)
    return line


def _marked(text: str, tags: Sequence[_Tag], name: str) -> tuple[str, list[int]]:
    """A template that says again which line is which where the rendered text may have more or fewer; and for each of its lines the template's."""
    lines = text.removesuffix("\n").split("\n")
    resync = {number for number, line in enumerate(lines, 1) if RESYNC.search(line)} | {
        t.end for t in tags if t.end > t.begin or t.stripped
    }
    # A tag, a comment, a string or a directive of several lines is whole: what follows it is said behind it.
    spans = [(t.begin, t.end) for t in tags]
    spans += [(line_at(text, m.start()), line_at(text, m.end())) for m in WHOLE.finditer(text) if "\n" in m.group()]
    for begin, end in sorted(set(spans)):
        if inside := {number for number in resync if begin <= number < end}:
            resync = (resync - inside) | {end}
    marked, numbers = list[str](), list[int]()
    for number, line in enumerate(lines, 1):
        marked.append(line)
        numbers.append(number)
        if number in resync:
            marked.append(f'#line {number + 1} "{name}"')
            numbers.append(number)
    return "\n".join(marked) + "\n", numbers


def line_at(text: str, position: int) -> int:
    """The line of a position in a text, from 1."""
    return text.count("\n", 0, position) + 1


def _line(error: BaseException) -> int | None:
    """The line of a rendered template that an exception passed last, as Jinja notes it; None if it passed none."""
    frames = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
    return frames[-1] if frames else None


def include_folders(template: Path) -> tuple[Path, Path]:
    """Where a template's includes are looked for: beside it, then among Vidrial's own headers."""
    return template.parent, vidrial_include()
