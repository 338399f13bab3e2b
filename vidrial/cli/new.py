"""`vidrial new NAME`: a kernel, its template, its test and its sweep, ready to run."""

from __future__ import annotations

import ast
import keyword
import re
import sys
from pathlib import Path

from vidrial.build.files import writing
from vidrial.errors import ArgumentError

TEMPLATES = Path(__file__).with_name("new_kernel")
# What is written, in the order in which one reads it; NAME stands for the kernel's name, in the files too.
FILES = ("NAME.py", "NAME.cu.j2", "test_NAME.py", "sweep_NAME.py")
# Modules that the files import, or that others look for by name.
TAKEN = ("cupy", "jax", "numpy", "pytest", "torch", "vidrial")
CPP_KEYWORDS = """alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t char16_t char32_t class compl concept const
    consteval constexpr constinit const_cast continue co_await co_return co_yield decltype default delete do double dynamic_cast else enum
    explicit export extern false float for friend goto if inline int long mutable namespace new noexcept not not_eq nullptr operator or
    or_eq private protected public register reinterpret_cast requires return short signed sizeof static static_assert static_cast struct
    switch template this thread_local throw true try typedef typeid typename union unsigned using virtual void volatile wchar_t while xor
    xor_eq main"""


def write_kernel(name: str, folder: Path) -> list[Path]:
    """Write the four files of a kernel named `name` into `folder`, which is made if need be, and return their paths.

    Raises:
        ArgumentError: the name cannot be a kernel's, a file is there already (then none is written), or the folder cannot be written.
    """
    check_name(name)
    texts = {folder / file.replace("NAME", name): _template(file).replace("NAME", name) for file in FILES}
    there = [str(path) for path in texts if path.exists() or path.is_symlink()]
    if there:
        raise ArgumentError(f"{', '.join(there)}: already there, and not overwritten; take another name or --folder")
    for path, text in texts.items():
        with writing(path, "--folder"), path.open("x", encoding="utf-8") as file:
            file.write(text)
    return list(texts)


def next_steps(name: str, folder: Path, program: str = "vidrial") -> list[str]:
    """The commands that come next, each with what it shows; `program` is how the command line is called here."""
    file = folder / f"{name}.py"
    commands = {
        f"{program} check {file}:op": "values, races and memory errors, on the CPU",
        f"python -m pytest {folder / f'test_{name}.py'}": "its own tests",
        f"{program} explain {file}:op --n 100000": "the legal configs, and why the others are not",
        f"{program} compile {file}:op --n 100000": "registers, spills, shared memory",
        f"python {folder / f'sweep_{name}.py'}": "which configs are fastest; needs a GPU",
    }
    width = max(map(len, commands))
    return [f"{command.ljust(width)}  # {what}" for command, what in commands.items()]


def check_name(name: str) -> None:
    """Refuse what cannot name a Python module, its function and a CUDA kernel at once.

    Raises:
        ArgumentError: why, and what is accepted.
    """
    accepted = "accepted: a name of ASCII letters, digits and underscores that is free in Python and C++, such as my_kernel"
    if not (name.isascii() and name.isidentifier()) or "__" in name or name.startswith("_"):
        raise ArgumentError(f"{name!r} does not name a kernel; {accepted}")
    if keyword.iskeyword(name) or keyword.issoftkeyword(name) or name in CPP_KEYWORDS.split():
        raise ArgumentError(f"{name!r} is a keyword of Python or C++; {accepted}")
    if name in TAKEN or name in sys.stdlib_module_names:
        raise ArgumentError(f"{name!r} is a module of Python's or of what the kernel imports, which {name}.py would hide; {accepted}")
    if name in _own_names():
        raise ArgumentError(f"{name!r} already means something in the files to be written; {accepted}")


def _template(file: str) -> str:
    return (TEMPLATES / (file if file.endswith(".j2") else f"{file}.j2")).read_text(encoding="utf-8")


def _own_names() -> set[str]:
    """Every name that the Python files use and every word of the CUDA template's code."""
    found = set(re.findall(r"\w+", re.sub(r"//.*", "", _template("NAME.cu.j2"))))
    for file in FILES:
        if file.endswith(".py"):
            for node in ast.walk(ast.parse(_template(file))):
                if isinstance(node, ast.Name):
                    found.add(node.id)
                elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                    found.add(node.name)
                elif isinstance(node, ast.arg | ast.keyword):
                    found.add(node.arg or "")
    return found - {"NAME"}
