"""Which line of a template an error names: Jinja's own, and that of what it renders to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from vidrial.build.cubins import cubin_of
from vidrial.dtypes import DType
from vidrial.errors import CompileError, TemplateError
from vidrial.spec.fields import choice, dynamic, static
from vidrial.spec.kernel import Kernel
from vidrial.spec.source import Arguments, Tiles, render


@dataclass(frozen=True)
class Problem:
    dtype: DType = static()
    n: int = dynamic()


@dataclass(frozen=True)
class Config:
    tile: int = choice(128)


HEAD = "{{ tiles }}\n{{ args }}\n"
BEGIN = 'extern "C" __global__ void k(Args args) {\n'


def kernel(folder: Path, body: str) -> Kernel:
    template = folder / "k.cu.j2"
    template.write_text(HEAD + body)
    arguments = Arguments(y="int*", n="int")
    return Kernel("k", template, Problem, Config, arguments, lambda p, c: Tiles(threads=128), lambda p, c: (1, 1, 1))


# Body, the line that is wrong (the first of the body is the third of the file), and what is said.
WRONG = {
    "undefined": (BEGIN + "  args.y[0] = {{ nope }};\n}\n", 4, "'nope' is undefined; known names: args, c, p, tiles"),
    "undefined in a loop": (BEGIN + "{% for i in range(3) %}\n  x;\n  {{ nope }};\n{% endfor %}\n}\n", 6, "'nope' is undefined"),
    "a string": (BEGIN + "  args.y[0] = {{ 'a;b' }};\n}\n", 4, "'a;b' (str) may not reach a source"),
    "syntax": (BEGIN + "  args.y[0] = {{ c.tile ;\n}\n", 4, "unexpected '}'"),
    "syntax after a comment": ("{# a\n b #}\n" + BEGIN + "  {% if %}\n{% endif %}\n}\n", 6, "Expected an expression"),
    "a block that does not end": (BEGIN + "{% if c.tile %}\n}\n", 4, "Unexpected end of template"),
    "division by zero": (BEGIN + "  {# two\n lines #}\n  args.y[0] = {{ 1 // 0 }};\n}\n", 6, "ZeroDivisionError"),
    "a call of a number": (BEGIN + "  args.y[0] = {{ c.tile() }};\n}\n", 4, "TypeError: 'int' object is not callable"),
    "a template's include": (BEGIN + "  {% include 'x' %}\n}\n", 4, "no loader"),
    "no such fact": (BEGIN + "  int x = {{ c.nope }};\n}\n", 4, "nope"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_templates_own_mistake_is_named_with_its_line(case: str, tmp_path: Path) -> None:
    body, line, text = WRONG[case]
    with pytest.raises(TemplateError, match=rf"k\.cu\.j2:{line}: .*{re.escape(text)}"):
        kernel(tmp_path, body).source(Problem(DType.float32, 1), Config())


def test_a_dynamic_field_is_refused_with_the_line_that_reads_it(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match=r"k\.cu\.j2:4: Problem\.n is not known before the launch"):
        kernel(tmp_path, BEGIN + "  args.y[0] = {{ p.n }};\n}\n").source(Problem(DType.float32, 1), Config())


SHIFTED = {
    "nothing": "",
    "a comment of three lines": "  {# a\n b\n c #}\n",
    "an expression of two lines": "  int z = {{\n  c.tile }};\n",
    "a block of two lines": "{% if c.tile and\n  c.tile > 1 %}\n  int z;\n{% endif %}\n",
    "line breaks taken away behind": "{% if c.tile -%}\n\n  int z;\n{% endif %}\n",
    "line breaks taken away before": "  int z;\n\n{%- if c.tile %} int u; {% endif %}\n",
    "a branch that is left out": "{% if c.tile == 0 %}\n  int z;\n  int u;\n{% else %}\n  int w;\n{% endif %}\n",
    "a loop": "{% for i in range(3) %}\n  args.y[0] = {{ i }};\n{% endfor %}\n",
    "raw text": "{% raw %}\n  // {{ no }}\n{% endraw %}\n",
    "a macro of two lines": "#define TWO(x) \\\n  (x + {{ c.tile }})\n",
}


@pytest.mark.parametrize("case", SHIFTED)
def test_the_compilers_error_names_the_templates_line(case: str, tmp_path: Path) -> None:
    before = HEAD + BEGIN + SHIFTED[case]
    with pytest.raises(CompileError, match=rf"at k\.cu\.j2:{before.count(chr(10)) + 1}\b"):
        cubin_of(kernel(tmp_path, BEGIN + SHIFTED[case] + "  nope;\n}\n"), Problem(DType.float32, 1), Config(), "sm_90a")


def test_a_comment_does_not_change_what_is_compiled(tmp_path: Path) -> None:
    """But for the lines that say where one is."""
    bodies = [BEGIN + comment + "  args.y[0] = 1;\n}\n" for comment in ("", "  {# a\n b #}\n")]
    texts = [render(kernel(tmp_path, body).template, "k", {"tiles": 1, "args": 2}).text.splitlines() for body in bodies]
    assert [[line for line in text if line.strip() and not line.startswith(("#line", "//"))] for text in texts][0] == [
        line for line in texts[1] if line.strip() and not line.startswith(("#line", "//"))
    ]
