"""Which line of a template an error names: Jinja's own, and that of what it renders to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import jinja2
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
    "undefined in the second line of a tag": (BEGIN + "  int z = {{ c.tile +\n  nope }};\n}\n", 5, "'nope' is undefined"),
    "the same with a carriage return": (BEGIN + "  int z = {{ c.tile +\r\n  nope }};\n}\n", 5, "'nope' is undefined"),
    "undefined behind a tag of three lines": (BEGIN + "  int z = {{\n  c.tile\n }};\n  {{ nope }};\n}\n", 7, "'nope' is undefined"),
    "undefined behind a string of three lines": (BEGIN + "{% set x = 'a\nb\nc' %}\n{{ nope }}\n}\n", 7, "'nope' is undefined"),
    "undefined beside a string of three lines": (BEGIN + "{{ 'a\nb\nc' ~\n nope }}\n}\n", 7, "'nope' is undefined"),
    "undefined behind a comment of three lines": (BEGIN + "{# a\nb\n #} {{ nope }}\n}\n", 6, "'nope' is undefined"),
    "undefined behind raw text": (BEGIN + "{% raw -%}\n\n {{ x }}\n{%- endraw -%}\n\n {{ nope }}\n}\n", 9, "'nope' is undefined"),
    "undefined in a raw string of C++": (BEGIN + '  auto s = R"x(\n {{ nope }}\n)x";\n}\n', 5, "'nope' is undefined"),
    "undefined behind a raw string of C++": (
        BEGIN + '  auto s = R"x(\n a {% if c.tile %}\n{% endif %}\n)x";\n {{ nope }}\n}\n',
        8,
        "'nope'",
    ),
    "undefined in a comment of C++": (BEGIN + "  /* a\n {{ nope }} */\n}\n", 5, "'nope' is undefined"),
    "undefined in a macro of Jinja's": (
        BEGIN + "{% macro m(x) %}\n  {{ nope }}\n{% endmacro %}\n\n{{ m(1) }}\n}\n",
        5,
        "'nope' is undefined",
    ),
    "undefined behind what ends no line": (BEGIN + "  x; \x0b \x0c \x1c \x85 \u2028\n {{ nope }}\n}\n", 5, "'nope' is undefined"),
    "a string": (BEGIN + "  args.y[0] = {{ 'a;b' }};\n}\n", 4, "'a;b' (str) may not reach a source"),
    "a string of three lines": (BEGIN + "  x;\n  args.y[0] = {{ 'a\nb\nc' }};\n}\n", 5, "(str) may not reach a source"),
    "syntax": (BEGIN + "  args.y[0] = {{ c.tile ;\n}\n", 4, "unexpected '}'"),
    "syntax after a comment": ("{# a\n b #}\n" + BEGIN + "  {% if %}\n{% endif %}\n}\n", 6, "Expected an expression"),
    "syntax in the third line of a tag": (BEGIN + "{{ c.tile +\n c.tile +\n  ) }}\n}\n", 6, "unexpected ')'"),
    "a string that does not end, in the second line of a tag": (BEGIN + "{{ c.tile +\n 'a }}\n}\n", 5, 'unexpected char "\'"'),
    "a block that does not end": (BEGIN + "{% if c.tile %}\n}\n", 4, "Unexpected end of template"),
    "a block that does not end, of two lines": (
        BEGIN + "{% if c.tile and\n c.tile %}\n {{ c.tile }}\n}\n",
        4,
        "Unexpected end of template",
    ),
    "a block that another ends": (BEGIN + "{% if c.tile %}\n{% for i in range(3) %}\n{{ i }}\n{% endif %}\n}\n", 5, "'for'"),
    "an end of nothing": (BEGIN + "  x;\n{% endif %}\n}\n", 5, "unknown tag 'endif'"),
    "a value that does not end": (BEGIN + "{% set x %}\n 1\n {% set y = 2 %}\n}\n", 4, "Unexpected end of template"),
    "raw text that does not end": (BEGIN + "{% raw %}\n {{ x }}\n}\n", 4, "Missing end of raw"),
    "a comment that does not end": (BEGIN + "{# a\n {{ x }}\n}\n", 4, "Missing end of comment"),
    "a comment of C++ that does not end": (BEGIN + "  /* a\n b;\n}\n", 4, "a comment begins and does not end"),
    "a raw string of C++ that does not end": (
        BEGIN + '  x;\n  auto s = R"x(\n  {{ c.tile }}\n)y";\n}\n',
        5,
        "a raw string begins and does not end",
    ),
    "a filter that is none": (BEGIN + "  x;\n{{ c.tile |\n nope }}\n}\n", 6, "No filter named 'nope'"),
    "a test that is none": (BEGIN + "  x;\n{% if c.tile is nope %}\n{% endif %}\n}\n", 5, "No test named 'nope'"),
    "division by zero": (BEGIN + "  {# two\n lines #}\n  args.y[0] = {{ 1 // 0 }};\n}\n", 6, "ZeroDivisionError"),
    "a call of a number": (BEGIN + "  args.y[0] = {{ c.tile() }};\n}\n", 4, "TypeError: 'int' object is not callable"),
    "a macro that calls itself": (BEGIN + "{% macro m(x) %}\n{{ m(x) }}\n{% endmacro %}\n{{ m(1) }}\n}\n", 5, "RecursionError"),
    "more than there is memory for": (BEGIN + "  x;\n{{ [0] * 10**15 }}\n}\n", 5, "MemoryError"),
    "a template's include": (
        BEGIN + "  {% include 'x' %}\n}\n",
        4,
        "include finds no other template; what several share is a header: #include it",
    ),
    "an include of two lines": (BEGIN + "  x;\n  {% include\n 'x' %}\n}\n", 5, "include finds no other template"),
    "a template that extends another": (BEGIN + "{% extends 'x' %}\n}\n", 4, "extends finds no other template"),
    "no such fact": (BEGIN + "  int x = {{ c.nope }};\n}\n", 4, "nope"),
    "no such fact, in the third line of a tag": (BEGIN + "  int x = {{ c.tile +\n c.tile\n + c.nope }};\n}\n", 6, "nope"),
    "braces of C++ around a number": (
        BEGIN + "  S x = {{1}};\n}\n",
        4,
        "{{1}} is Jinja's and prints 1; if it is C++, part the braces: { {1} }",
    ),
    "braces of C++ around a name": (BEGIN + "  S x = {{a}};\n}\n", 4, "'a' is undefined"),
    "braces of C++ around nothing": (BEGIN + "  S x{{}};\n}\n", 4, "Expected an expression"),
    "braces of C++ in two lines": (BEGIN + "  int x[2][2] = {{1, 2},\n {3, 4}};\n}\n", 4, "unexpected '}'"),
    "a remainder of C++ in braces": (BEGIN + "  int x{%3};\n  y;\n}\n", 4, "unexpected '}'"),
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
    "a comment of C++ with a branch": "/* {% if c.tile == 0 %}\n a\n b\n{% else %}\n c\n{% endif %}\n*/\n",
    "a raw string of C++ with a branch": '  auto s = R"({% if c.tile == 0 %}\n a\n b\n{% else %}\n c\n{% endif %}\n)";\n',
    "a value with a tag in it": "{% set x = 'a\n{% endif %}\n' %}\n",
    "a macro of two lines": "#define TWO(x) \\\n  (x + {{ c.tile }})\n",
}


@pytest.mark.parametrize("case", SHIFTED)
def test_the_compilers_error_names_the_templates_line(case: str, tmp_path: Path) -> None:
    before = HEAD + BEGIN + SHIFTED[case]
    with pytest.raises(CompileError, match=rf"at k\.cu\.j2:{before.count(chr(10)) + 1}\b"):
        cubin_of(kernel(tmp_path, BEGIN + SHIFTED[case] + "  nope;\n}\n"), Problem(DType.float32, 1), Config(), "sm_90a")


# Where no line may come between two: of a C++ directive and comment that go on, and before a tag that takes line breaks away.
JOINED = {
    "a directive that goes on behind a division of Jinja's": "#define TWO {% if c.tile %}{{ c.tile // 64 }}{% endif %} \\\n  + 0\nx;\n",
    "a directive that goes on behind an address in a comment": "{# at a://b #}#define TWO {% if c.tile %}2{% endif %} \\\n  + 0\nx;\n",
    "a comment that goes on": "// {% if c.tile %}a{% endif %} \\\n b;\nx;\n",
    "an expression that takes line breaks away": "int z = {% if c.tile %}1{% endif %}\n\n  {{- c.tile }};\nx;\n",
    "a block that takes line breaks away": "int z{% if c.tile %}1{% endif %}\n{%- if c.tile -%}\n2\n{%- endif %};\nx;\n",
    "a comment that takes line breaks away": "{{ tiles }}\n{#- a -#}\n2;\nx;\n",
}


@pytest.mark.parametrize("case", JOINED)
def test_no_line_comes_between_what_is_one(case: str, tmp_path: Path) -> None:
    names = {"c": Config(), "tiles": 1}
    kernel(tmp_path, "").template.write_text(JOINED[case])
    _, _, text = render(tmp_path / "k.cu.j2", "k", names).text.split("\n", 2)
    assert re.sub(r'(?m)^#line \d+ "k\.cu\.j2"\n', "", text) == jinja2.Environment(keep_trailing_newline=True).from_string(
        JOINED[case]
    ).render(names)
    assert "\\\n#line" not in text


def test_a_comment_does_not_change_what_is_compiled(tmp_path: Path) -> None:
    """But for the lines that say where one is."""
    bodies = [BEGIN + comment + "  args.y[0] = 1;\n}\n" for comment in ("", "  {# a\n b #}\n")]
    texts = [render(kernel(tmp_path, body).template, "k", {"tiles": 1, "args": 2}).text.splitlines() for body in bodies]
    assert [[line for line in text if line.strip() and not line.startswith(("#line", "//"))] for text in texts][0] == [
        line for line in texts[1] if line.strip() and not line.startswith(("#line", "//"))
    ]


def test_an_error_in_what_a_template_includes_names_that_file_and_its_line(tmp_path: Path) -> None:
    (tmp_path / "piece.cuh").write_text('inline auto text = R"(\n {{ no }}\n)";\n  nope;\n')
    with pytest.raises(CompileError, match=r"at \S*piece\.cuh:4\b"):
        cubin_of(kernel(tmp_path, '{# a\n b #}\n#include "piece.cuh"\n' + BEGIN + "}\n"), Problem(DType.float32, 1), Config(), "sm_90a")
    (tmp_path / "piece.cuh").write_text("int x;\n#define NAME <x>\n/* a\n b */ #include NAME\n")
    with pytest.raises(TemplateError, match=r"piece\.cuh:4: this #include names no file by itself"):
        kernel(tmp_path, '#include "piece.cuh"\n' + BEGIN + "}\n").source(Problem(DType.float32, 1), Config())
