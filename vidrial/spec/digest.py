"""What decides two keys: the files that a source includes as they are, and their code alone.

    closure_digest(text, folders)     # names, comments and all: part of a binary's key, since cubins carry line numbers
    code_digest(template, folders)    # tokens alone: a ranking outlives an edited comment, a moved header, another indentation

Both follow every include that the preprocessor would, and refuse one that they cannot follow.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import os
import posixpath
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2

from vidrial.errors import TemplateError

LEXER = 1  # counts the changes of what `code_digest` makes of one text
HOST_HEADERS = "vidrial/host/"
# The preprocessor's tokens (C++20 [lex.pptoken], and CUDA's launch brackets). A space in a token's pattern is none: re.VERBOSE.
TOKEN = re.compile(
    r"""
    (?P<space>    [^\S\n]+ | (?s: /\*.*?\*/ ) )
  | (?P<newline>  \n )
  | (?P<comment>  // [^\n]* )
  | (?P<broken>   /\* )
  | (?P<include>  (?:\#|%:) BLANK* include BLANK* (?: <[^>\n]+> | "[^"\n]+" ) )
  | (?P<raw>      (?:u8|[uUL])? R" (?P<delimiter> [^\s()\\"]{0,16} ) \( )
  | (?P<literal>  (?:u8|[uUL])? (?: "(?:[^"\\\n]|\\.)*" | '(?:[^'\\\n]|\\.)*' ) \w*
              |   __has_include BLANK* \( BLANK* <[^>\n]*> )
  | (?P<word>     [^\W\d][\w$]* )
  | (?P<number>   \.?\d (?: [eEpP][+-] | '\w | [\w.] )* )
  | (?P<sign>     <<< | >>> | %:%: | <=> | <<= | >>= | ->\* | \.\.\. | :: | -> | \.\* | \+\+ | -- | << | >> | <= | >= | == | != | && | \|\|
              |   [-+*/%&|^]= | \#\# | <: | :> | <% | %> | %: | . )
    """.replace("BLANK", r"(?:[^\S\n]|/\*(?:[^*]|\*(?!/))*\*/)"),
    re.VERBOSE,
)
ASKED_FOR = re.compile(r"\bTiles\s*::\s*(?:template\s+)?(\w+)")
SPLICE = re.compile(r"\\[^\S\n]*\n")
INCLUDES = ("include", "include_next", "import")
DELIMITER = re.compile(r"\{[{%#]|[}%#]\}")
# Stands for a block of Jinja's in the text that is lexed as C++: no source file holds it.
BLOCK = "\0"
# A directive in its plain form, and what may be one in another: only a text that has others is lexed to find its includes.
PLAIN = re.compile(r'^[^\S\n]*#[^\S\n]*include[^\S\n]*(?:<([^>\n]+)>|"([^"\n]+)")', re.MULTILINE)
POSSIBLE = re.compile(r"include|[\w#%:]\\\s*\n|\bimport\b")


class Include(NamedTuple):
    """`#include "name"` (quoted) or `<name>`."""

    name: str
    quoted: bool


def code_of(text: str, where: str, jinja: bool = False) -> tuple[str | Include, ...]:
    """The preprocessor's tokens of a text and its includes, in order; a directive ends with the token of a line's end.

    Comments, whitespace and `#pragma once` are no tokens. A comment that holds a block of Jinja's is: the block may end it.

    Args:
        where: the file's name, for errors.
        jinja: the text is a template; its comments are left out, each of its blocks is a token as it stands.

    Raises:
        TemplateError: an include that names no file by itself, a comment or raw string without end, a NUL byte; with file and line.
    """
    code = _Code(text, where, jinja)
    found: list[str | Include] = []
    line: list[str | Include] | None = None  # tokens of the directive that is read
    fresh, previous = True, ""  # whether nothing but blocks came in this line; the token that ends where this one begins
    for match in code.matches():
        kind, start = match.lastgroup, match.start()
        token: str | Include = match.group()
        if kind in ("space", "comment") and BLOCK not in match.group():
            previous = ""
            continue
        if kind == "newline":
            _end_directive(line, found)
            line, fresh, previous = None, True, ""
            continue
        if kind == "broken":
            raise TemplateError(f"{where}:{code.line(start)}: a comment begins and does not end")
        if kind == "raw":
            token = code.raw_string(match)[0]
        elif kind == "include":
            if not fresh:
                raise TemplateError(f"{where}:{code.line(start)}: an include that begins no line cannot be followed")
            line, token = [], _include(code, match.group(), start)
        elif fresh and token in ("#", "%:"):
            line = []
        elif line is not None and len(line) == 1 and token in INCLUDES:
            raise TemplateError(
                f"{where}:{code.line(start)}: this #{token} names no file by itself, so what it includes cannot be known before it is "
                'compiled; accepted: #include "name" or <name>'
            )
        fresh = fresh and token == BLOCK
        target = found if line is None else line
        if token == "(" and previous and line is not None and len(line) == 3 and line[1] == "define":
            # `#define f(x)` and `#define f (x)` are two things.
            target[-1] = f"{previous}("
        else:
            target.append(token)
        previous = token if isinstance(token, str) else ""
    _end_directive(line, found)
    return tuple(code.with_blocks(found)) if code.blocks else tuple(found)


def _end_directive(line: list[str | Include] | None, found: list[str | Include]) -> None:
    if line is None or line == ["#", "pragma", "once"]:
        return
    found += line
    if not isinstance(line[0], Include) or len(line) > 1:
        found.append("\n")


def _include(code: _Code, text: str, start: int) -> Include:
    name = re.search(r'<([^>]+)>$|"([^"]+)"$', text)
    if name is None or BLOCK in name.group():
        raise TemplateError(
            f"{code.where}:{code.line(start)}: a file's name that Jinja makes cannot be followed; write it out, under an if"
        )
    return Include(name[1] or name[2], name[2] is not None)


class _Code:
    """The text of one file as C++ reads it: Jinja's comments and line splices taken out, Jinja's blocks put aside."""

    def __init__(self, text: str, where: str, jinja: bool) -> None:
        if BLOCK in text:
            raise TemplateError(f"{where}:{text[: text.index(BLOCK)].count(chr(10)) + 1}: a NUL byte is no part of a source")
        self.where = where
        self.blocks: list[str] = []
        # Where pieces of `whole` begin, and in which line of the file.
        self._starts, self._lines = [0], [1]
        self.whole = self._without_jinja(text) if jinja else text.replace("\r\n", "\n")
        # Where splices end in `text`, and how much they are longer than nothing, all before them included.
        self._ends, self._gaps = [0], [0]
        pieces, last = [], 0
        for splice in SPLICE.finditer(self.whole):
            pieces.append(self.whole[last : splice.start()])
            self._gaps.append(self._gaps[-1] + splice.end() - splice.start())
            self._ends.append(splice.end() - self._gaps[-1])
            last = splice.end()
        self.text = "".join((*pieces, self.whole[last:]))

    def _without_jinja(self, text: str) -> str:
        lexed: list[tuple[int, str, str]] = []
        try:
            lexed.extend(jinja2.Environment(keep_trailing_newline=True).lex(text))
        except jinja2.TemplateSyntaxError as error:
            # What the lexer stumbles over lies lines behind a tag that was left open, unless that one ends after all.
            tags = [(line, kind) for line, kind, _ in lexed if kind.endswith(("_begin", "_end"))]
            rest = "\n".join(text.replace("\r\n", "\n").split("\n")[error.lineno - 1 :])
            ends = (found := DELIMITER.search(rest)) is not None and found.group() in ("}}", "%}")
            line = tags[-1][0] if tags and tags[-1][1].endswith("_begin") and not ends else error.lineno
            raise TemplateError(f"{self.where}:{line}: {error.message}") from None
        pieces: list[str] = []
        inside: list[str] = []
        length = begin = 0
        for line, kind, value in lexed:
            if kind == "data":
                self._starts.append(length)
                self._lines.append(line)
                pieces.append(value)
                length += len(value)
            elif kind.startswith("comment"):
                continue
            else:
                begin = begin if inside else line
                inside.append(value)
                if kind == "raw_begin" or kind.endswith("_end"):
                    self.blocks.append("".join(inside))
                    inside = []
                    pieces.append(BLOCK)
                    length += 1
        if inside:
            raise TemplateError(f"{self.where}:{begin}: a block of Jinja's begins and does not end")
        return "".join(pieces)

    def origin(self, position: int) -> int:
        """Where a position in `text` lies in `whole`."""
        return position + self._gaps[bisect.bisect_right(self._ends, position) - 1]

    def position(self, origin: int) -> int:
        """Where what lies in `whole`, outside splices, is in `text`."""
        ends = [end + gap for end, gap in zip(self._ends, self._gaps, strict=True)]
        return origin - self._gaps[bisect.bisect_right(ends, origin) - 1]

    def line(self, position: int) -> int:
        """The file's line of a position in `text`."""
        origin = self.origin(position)
        piece = bisect.bisect_right(self._starts, origin) - 1
        return self._lines[piece] + self.whole.count("\n", self._starts[piece], origin)

    def matches(self) -> Iterator[re.Match[str]]:
        """A match of TOKEN per token of `text`, of raw strings that of their beginning."""
        position: int | None = 0
        while position is not None:
            begin, position = position, None
            for match in TOKEN.finditer(self.text, begin):
                yield match
                if match.lastgroup == "raw":
                    position = self.raw_string(match)[1]
                    break

    def raw_string(self, match: re.Match[str]) -> tuple[str, int]:
        """A raw string whole, splices within it included, and where in `text` it ends."""
        begin, closing = self.origin(match.end() - 1) + 1, f'){match["delimiter"]}"'
        end = self.whole.find(closing, begin)
        if end < 0:
            raise TemplateError(f"{self.where}:{self.line(match.start())}: a raw string begins and does not end")
        end += len(closing)
        position = self.position(end)
        suffix = re.match(r"\w*", self.text[position : position + 64])
        after = suffix.group() if suffix else ""
        return match.group() + self.whole[begin:end] + after, position + len(after)

    def with_blocks(self, tokens: Sequence[str | Include]) -> Iterator[str | Include]:
        """The tokens with Jinja's blocks put back."""
        blocks = iter(self.blocks)
        for token in tokens:
            if isinstance(token, str) and BLOCK in token:
                first, *others = token.split(BLOCK)
                yield first + "".join(next(blocks) + other for other in others)
            else:
                yield token


def includes_of(text: str, where: str) -> tuple[Include, ...]:
    """The includes of a text that is no template any more, or of a header.

    Raises:
        TemplateError: see `code_of`.
    """
    if not POSSIBLE.search(PLAIN.sub("", text)):
        return tuple(Include(m[1] or m[2], m[2] is not None) for m in PLAIN.finditer(text))
    return tuple(item for item in code_of(text, where) if isinstance(item, Include))


def state_of(found: os.stat_result) -> tuple[int, int, int]:
    """What changes with a file's text; a copied or unpacked file may bring its old time of modification along, not the other one."""
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size


class _File(NamedTuple):
    """A file of ours: the folder that it was looked for in, its name there, and `state_of`, which tells its present text from others."""

    folder: str
    name: str
    state: tuple[int, int, int]

    @property
    def path(self) -> str:
        return posixpath.join(self.folder, self.name)


@functools.lru_cache(maxsize=512)
def _bytes(file: _File) -> bytes:
    return Path(file.path).read_bytes()


@functools.lru_cache(maxsize=512)
def _includes(file: _File) -> tuple[Include, ...]:
    text = _text(file)
    if file.name.endswith(".j2"):
        return tuple(item for item in code_of(text, file.path, jinja=True) if isinstance(item, Include))
    return includes_of(text, file.path)


@functools.lru_cache(maxsize=512)
def _code(file: _File) -> tuple[str | Include, ...]:
    """Runs of tokens as one string each, and the includes between them."""
    pieces: list[str | Include] = []
    run: list[str] = []
    for item in code_of(_text(file), file.path, jinja=file.name.endswith(".j2")):
        if isinstance(item, str):
            run.append(f"{item}\0")
        else:
            pieces += ["".join(run), item]
            run = []
    return (*pieces, "".join(run))


def _text(file: _File) -> str:
    try:
        return _bytes(file).decode()
    except UnicodeDecodeError as error:
        raise TemplateError(f"{file.path}: not UTF-8: {error}") from None


def _find(include: Include, folders: Sequence[Path], home: _File | None) -> _File | None:
    """The file that an include of `home` finds: beside it if it is quoted, else in `folders`; None for a system header."""
    beside = [(home.folder, posixpath.join(posixpath.dirname(home.name), include.name))] if include.quoted and home is not None else []
    for folder, name in (*beside, *((str(folder), include.name) for folder in folders)):
        path = posixpath.join(folder, name)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found = os.stat(path)
            if stat.S_ISREG(found.st_mode):
                if "./" in name or "//" in name:
                    # One name for each file. Links are followed before a `..`, as the compiler does it.
                    home_of, last = posixpath.split(path)
                    name = posixpath.relpath(posixpath.join(os.path.realpath(home_of), last), os.path.realpath(folder))
                return None if name.startswith(HOST_HEADERS) else _File(folder, name, state_of(found))
    return None


def _closure(includes: Sequence[Include], folders: Sequence[Path]) -> Iterator[_File]:
    """Every file that these find, and they in turn, once."""
    files, looked_for = set[str](), set[tuple[Include, str]]()
    waiting: list[tuple[Include, _File | None]] = [(include, None) for include in includes]
    while waiting:
        include, home = waiting.pop()
        # What is not quoted is the same file wherever it is included.
        place = include, posixpath.dirname(home.path) if include.quoted and home is not None else ""
        if place in looked_for:
            continue
        looked_for.add(place)
        file = _find(include, folders, home)
        if file is not None and file.path not in files:
            files.add(file.path)
            waiting += ((inner, file) for inner in _includes(file))
            yield file


_closures: dict[tuple[Path, tuple[Path, ...]], tuple[tuple[_File, ...], frozenset[str]]] = {}


def tiles_asked_for(template: Path, folders: tuple[Path, ...]) -> frozenset[str]:
    """The names that a template and what it includes ask of `struct Tiles`, as `Tiles::name`."""
    files, names = _closures.get((template, folders), ((), frozenset[str]()))
    # To look at the files that were found takes a tenth of finding them.
    if not files or not all(map(_unchanged, files)):
        files = tuple(_closure([Include(template.name, True)], folders))
        names = frozenset().union(*map(_asked_for, files))
        _closures[template, folders] = files, names
    return names


def _unchanged(file: _File) -> bool:
    try:
        found = os.stat(file.path)
    except OSError:
        return False
    return state_of(found) == file.state


@functools.lru_cache(maxsize=512)
def _asked_for(file: _File) -> frozenset[str]:
    return frozenset(ASKED_FOR.findall(_text(file)))


def closure_digest(text: str, folders: Sequence[Path], where: str = "source") -> str:
    """sha256 over name and content of every file that `text` includes from `folders`, and they in turn.

    System headers are not ours, and those of the host target no part of what a GPU runs.

    Raises:
        TemplateError: an include that cannot be followed, with file and line.
    """
    files = _closure(includes_of(text, where), folders)
    digest = hashlib.sha256()
    for name, data in sorted((file.name, _bytes(file)) for file in files):
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def code_digest(template: Path, folders: Sequence[Path]) -> str:
    """sha256 over the code of a template: its tokens, and in place of an include those of the file, where it is met first.

    Raises:
        TemplateError: an include that cannot be followed, or a text that cannot be lexed, with file and line.
    """
    digest, seen = hashlib.sha256(), set[str]()

    def add(include: Include, home: _File | None) -> None:
        file = _find(include, folders, home)
        if file is None or file.path in seen:
            return
        seen.add(file.path)
        for piece in _code(file):
            if isinstance(piece, Include):
                add(piece, file)
            else:
                digest.update(piece.encode())

    add(Include(template.name, True), None)
    return digest.hexdigest()
