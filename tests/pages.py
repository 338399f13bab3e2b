"""The blocks of README.md and docs/*.md, as tests/docs and tests/gpu run them.

A page's Python blocks share one namespace and run in order. A comment on the line above a block says what it needs:

    <!-- test: gpu -->                 a GPU: the page runs to its end in tests/gpu alone
    <!-- test: begins FILE -->         the page's namespace begins with that of FILE, as if the blocks were written in it
    <!-- test: prints -->              what the Python block above printed is this block's text (white space apart)

A `$ vidrial ...` line, fenced or indented, is a command, and what follows it its output: the words of both agree, but for numbers that
are measured (seconds, ms) and where the page says `...`. A comment above it may say what it needs, too:

    <!-- test: gpu -->                 a GPU
    <!-- test: shown -->               takes minutes, or needs files that are not here: the command line alone is checked, by its --help
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import sys
import types
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"<!-- test: (\w+) ?(.*?) -->")
FENCE = re.compile(r"(```+)(\w*)\s*$")


@dataclass(frozen=True)
class Block:
    """Text of a page: fenced (`language`, which may be "") or indented (`language` None), from `line` on, under a mark or ""."""

    page: Path
    line: int
    language: str | None
    text: str
    mark: str = ""
    argument: str = ""

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """`$ vidrial WORDS`, and the lines that the page shows below it; without `$` it is only named, not run."""

    block: Block
    line: int
    words: tuple[str, ...]
    shown: str
    prompted: bool = True

    @property
    def runs(self) -> bool:
        return self.prompted and not self.block.mark

    @property
    def where(self) -> str:
        return f"{self.block.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    found: list[Block] = []
    lines = page.read_text().splitlines()
    mark, argument, i = "", "", 0
    while i < len(lines):
        line = lines[i]
        begin = i + 1
        if match := MARK.fullmatch(line.strip()):
            mark, argument = match[1], match[2]
            i += 1
            continue
        if fence := FENCE.match(line):
            end = next(j for j in range(begin, len(lines)) if lines[j].startswith(fence[1]))
            found.append(Block(page, begin + 1, fence[2], "\n".join(lines[begin:end]), mark, argument))
            i = end + 1
        elif line.startswith("    ") and (i == 0 or not lines[i - 1].strip() or MARK.fullmatch(lines[i - 1].strip())):
            end = begin
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            found.append(Block(page, begin, None, "\n".join(x[4:] for x in lines[i:end]).rstrip(), mark, argument))
            i = end
        else:
            if line.strip():
                mark, argument = "", ""
            i += 1
            continue
        mark, argument = "", ""
    return found


def python_blocks(page: Path) -> list[Block]:
    """The blocks that are Python, and those that say what one of them printed."""
    return [b for b in blocks(page) if b.language == "python" or b.mark == "prints"]


def commands(page: Path) -> list[Command]:
    """The `vidrial` lines of a page, with and without a prompt."""
    found = []
    for block in blocks(page):
        if block.language not in (None, "", "console"):
            continue
        lines = block.text.split("\n")
        starts = [i for i, line in enumerate(lines) if line.startswith(("$ vidrial ", "vidrial "))]
        for start, end in zip(starts, [*starts, len(lines)][1:], strict=True):
            words = shlex.split(lines[start].removeprefix("$ "), comments=True)
            found.append(Command(block, block.line + start, tuple(words), "\n".join(lines[start + 1 : end]), lines[start].startswith("$ ")))
    return found


def needs_gpu(page: Path) -> bool:
    """Whether a Python block of it does."""
    return any(block.mark == "gpu" for block in python_blocks(page))


def run_page(page: Path, gpu: bool) -> int:
    """Run a page's Python blocks, those that need a GPU only with `gpu`; how many were run."""
    name = f"page_{page.stem}"
    module = sys.modules[name] = types.ModuleType(name)
    printed, ran = "", 0
    for block in python_blocks(page):
        if block.mark == "prints":
            assert words(printed) == words(block.text), f"{block.where} shows\n{block.text}\nbut what is printed is\n{printed}"
            continue
        if block.mark == "begins":
            _load(module, ROOT / block.argument)
        if block.mark == "gpu" and not gpu:
            continue
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, module.__dict__)
        printed, ran = out.getvalue(), ran + 1
    return ran


def _load(module: types.ModuleType, file: Path) -> None:
    spec = importlib.util.spec_from_file_location(module.__name__, file)
    assert spec is not None and spec.loader is not None
    module.__spec__, module.__file__ = spec, str(file)
    spec.loader.exec_module(module)


def words(text: str) -> list[str]:
    """What is said, without its layout."""
    return text.split()


def disagreement(shown: str, out: str) -> str:
    """Where a command's output leaves what a page shows of it, "" if it does not.

    `...` in the page stands for anything; a number with a fraction, or followed by s or ms, for any other number.
    """
    pieces = [[_loose(w) for w in words(piece)] for piece in shown.split("...")]
    heard = [_loose(w) for w in words(out)]
    at = 0
    for number, piece in enumerate(pieces):
        starts = [0] if number == 0 else range(at, len(heard) - len(piece) + 1)
        found = next((s for s in starts if heard[s : s + len(piece)] == piece), None)
        if found is None:
            if number == 0:
                wrong = next((i for i, w in enumerate(piece) if i >= len(heard) or heard[i] != w), 0)
                return f"... {' '.join(piece[max(0, wrong - 5) : wrong + 6])} ... but printed is ... {' '.join(heard[max(0, wrong - 5) : wrong + 6])} ..."
            return f"{' '.join(piece)} is not printed behind the `...`"
        at = found + len(piece)
    return ""


def _loose(word: str) -> str:
    """A word, a measured number in it as N."""
    return "N" if re.fullmatch(r"\d+\.\d+(e[-+]\d+)?|\d(\.\d)?e[-+]\d+", word) else word
