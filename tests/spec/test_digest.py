"""The lexer behind a ranking's digest, and both digests: what changes them, what does not, and what they refuse."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from pathlib import Path
from typing import Any

import fake_op
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidrial.build.cubins import cubin_of
from vidrial.errors import TemplateError
from vidrial.spec.digest import Include, closure_digest, code_digest, code_of, includes_of, tiles_asked_for
from vidrial.templates import TEMPLATES

# Not the host target's: they shadow the library's own, by #include_next.
HEADERS = sorted(path for path in Path(TEMPLATES).rglob("*.cuh") if "host" not in path.parts)


def tokens(text: str, jinja: bool = False) -> list[str]:
    return [str(token) for token in code_of(text, "k.cuh", jinja)]


LEXED = {
    "comments": ("a /* b\n * c */ d // e\nf", ["a", "d", "f"]),
    "a comment is a space": ("int/**/a", ["int", "a"]),
    "no comment in a string": ('"a // b" "/* c */" \'"\' d', ['"a // b"', '"/* c */"', "'\"'", "d"]),
    "escapes": (r'"a\" // b" "\\" // c', [r'"a\" // b"', r'"\\"']),
    "no string in a comment": ("a // it's\n/* \" */ b", ["a", "b"]),
    "raw": ('R"(a " // b)" c // d', ['R"(a " // b)"', "c"]),
    "raw, delimited": ('u8R"x(a )" // )x" b', ['u8R"x(a )" // )x"', "b"]),
    "raw, two lines": ('LR"(a\n// b)"_s c', ['LR"(a\n// b)"_s', "c"]),
    "raw keeps a splice": ('R"(\\\na\\\n)" b\\\nc', ['R"(\\\na\\\n)"', "bc"]),
    "raw after splices": ('a\\\nb R"(c\\\nd)" e\\\nf g', ["ab", 'R"(c\\\nd)"', "ef", "g"]),
    "no raw": ('fooR"(a // b)" c', ["fooR", '"(a // b)"', "c"]),
    "prefixes": ("u8\"a\" L'b' U\"c\"s x\"d\"", ['u8"a"', "L'b'", 'U"c"s', "x", '"d"']),
    "digit separators": ("1'000'000 0x1F'u 1'0//'", ["1'000'000", "0x1F'u", "1'0"]),
    "numbers": ("1.5e+3f .5 0x1p-2 1..2 a1'b'", ["1.5e+3f", ".5", "0x1p-2", "1..2", "a1", "'b'"]),
    "splice in a comment": ("a // b \\\n c\nd", ["a", "d"]),
    "splice in a word": ("in\\\nt a", ["int", "a"]),
    "splice in a comment's sign": ("a /\\\n/ b\nc", ["a", "c"]),
    "splice in a string": ('"a\\\nb"', ['"ab"']),
    "splice, CRLF": ("in\\\r\nt a;\r\n", ["int", "a", ";"]),
    "longest signs": ("a<<=b>>c<<<d->*e::f...", ["a", "<<=", "b", ">>", "c", "<<<", "d", "->*", "e", "::", "f", "..."]),
    "signs apart": ("> > + +", [">", ">", "+", "+"]),
    "a directive ends": ("#define A 1 // x\nb", ["#", "define", "A", "1", "\n", "b"]),
    "a directive goes on": ("#define A 1 \\\n + 2 /* \n */ + 3\nb", ["#", "define", "A", "1", "+", "2", "+", "3", "\n", "b"]),
    "a macro's parameters": ("#define f(x) x\n#define g (x)\n", ["#", "define", "f(", "x", ")", "x", "\n", "#", "define", "g", "(", "x", ")", "\n"]),
    "an error's apostrophe": ("#error don't // x\na", ["#", "error", "don", "'", "t", "\n", "a"]),
    "pragma once": ("// x\n# pragma /**/ once\nint a;", ["int", "a", ";"]),
    "another pragma": ("#pragma unroll\na", ["#", "pragma", "unroll", "\n", "a"]),
    "has_include": ("#if __has_include(<a//b>)\n#endif", ["#", "if", "__has_include(<a//b>", ")", "\n", "#", "endif", "\n"]),
}  # fmt: skip


@pytest.mark.parametrize("case", LEXED)
def test_tokens(case: str) -> None:
    text, expected = LEXED[case]
    assert tokens(text) == expected


def test_includes() -> None:
    text = (
        '#include <a//b.h> // c\n  # /* d */ include /**/ "e f.cuh" /* g\n */ h\n/* i */ #inc\\\nlude <j>\n%:include <k>\n'
        '// #include "l"\n/*\n#include "m"\n*/ R"(\n#include "n"\n)"\nint a; // include "o"'
    )
    found = [Include("a//b.h", False), Include("e f.cuh", True), Include("j", False), Include("k", False)]
    assert list(includes_of(text, "k.cuh")) == found
    assert [item for item in code_of(text, "k.cuh") if isinstance(item, Include)] == found
    # Plain texts are not lexed: a comment's include counts there, and does no harm.
    assert includes_of('#pragma once\n#include "a"\n#\tinclude<b>\n', "k") == (Include("a", True), Include("b", False))


REFUSED = {
    "#include HEADER": ("int a;\n#include HEADER\n", 2, "this #include names no file by itself"),
    "#include f(x)": ("# /* \n\n */ include f(x)\n", 3, "this #include names no file"),
    "#include_next": ("\n#include_next <a>\n", 2, "this #include_next names no file"),
    "in a macro": ('#define A #include "b"\n', 1, "begins no line"),
    "no end of a comment": ("a\n b /* c\n", 2, "a comment begins and does not end"),
    "no end of a raw string": ('a\\\nb\nR"x(\n)y"', 3, "a raw string begins and does not end"),
    "NUL": ("a\nb\0", 2, "NUL"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_is_refused_with_file_and_line(case: str) -> None:
    text, line, reason = REFUSED[case]
    with pytest.raises(TemplateError, match=rf"dir/k\.cuh:{line}: .*{reason}"):
        code_of(text, "dir/k.cuh")


def test_jinja() -> None:
    text = (
        '{# a\n "\n#} int {{ x }}b; // c\n{% if p.d > 1 %} // {{ y }}\n#include "a.cuh"\n{% endif %}{% raw %} "{{" {% endraw %} "{{ z }}"'
    )
    found = [str(token) for token in code_of(text, "k.j2", jinja=True)]
    assert found == [
        "int", "{{ x }}", "b", ";", "{% if p.d > 1 %}", "// {{ y }}", str(Include("a.cuh", True)), "{% endif %}", "{% raw %}", '"{{"',
        "{% endraw %}", '"{{ z }}"',
    ]  # fmt: skip
    # A minus takes the line's end before it: what follows is in that comment.
    assert tokens("a // b\n{%- if x %} c\nd", jinja=True) == ["a", "// b{%- if x %} c", "d"]
    # In a header these are braces.
    assert tokens("{# a #} {{ x }}") == ["{", "#", "a", "#", "}", "{", "{", "x", "}", "}"]
    for wrong, line in (('\n{# a\n#}\n#include "{{ x }}.cuh"', 4), ("{{ x }}\n#include {{ x }}", 2), ("\n\n{{ x", 3)):
        with pytest.raises(TemplateError, match=rf"k\.j2:{line}: "):
            code_of(wrong, "k.j2", jinja=True)


CODE = [
    "int", "x1", "=", "1'000", "+", '"a // b"', "'\"'", 'R"d(/* " )" )d"', "->*", "<<<", ">", ">", "{", "}", ";", "0x1Fu", "u8'c'", "...", '"\\""',
    "1.e+5", "static_cast", "::", "/", "*", "&&",
]  # fmt: skip
GAP = st.sampled_from([" ", "\n", "\t \n", "/**/", "/* int \" ' \n*/", "// it's \"\n", "// a \\\n b\n", " \\\n ", "/* // */"])


@given(st.data(), st.lists(st.sampled_from(CODE), min_size=1, max_size=12))
def test_comments_and_space_between_tokens_change_nothing_and_any_token_does(data: st.DataObject, code: list[str]) -> None:
    gaps = data.draw(st.lists(st.lists(GAP, min_size=1, max_size=3).map("".join), min_size=len(code), max_size=len(code)))
    # A slash before a comment would begin another one.
    text = "".join(token + " " * (token == "/") + gap for token, gap in zip(code, gaps, strict=True))
    assert tokens(text) == tokens(" ".join(code)) == code
    place, other = data.draw(st.integers(0, len(code) - 1)), data.draw(st.sampled_from(CODE))
    changed = [*code[:place], other, *code[place + 1 :]]
    assert (tokens(" ".join(changed)) == tokens(text)) == (changed == code)
    assert tokens(" ".join([*code[:place], *code[place + 1 :]])) != tokens(text)


@given(st.text(st.sampled_from("ab1'\"/*\\\n R()#<>. "), max_size=40))
def test_any_text_is_lexed_or_refused_and_lexes_to_itself(text: str) -> None:
    try:
        found = tokens(text)
    except TemplateError as error:
        assert re.match(r"k\.cuh:\d+: ", str(error))
        return
    # Alone in a line a number sign begins a directive, and a backslash joins the next line.
    if not any(token.startswith(("#", "\\")) for token in found):
        assert tokens("\n".join(found)) == found


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: path.name)
def test_our_headers(path: Path) -> None:
    text = path.read_text()
    found = code_of(text, path.name)
    # A comment at each line's end and beginning, whatever the line; but a splice must stay at its end.
    lines = [line if line.endswith("\\") else f"{line} // it's /* \"" for line in text.split("\n")]
    assert code_of("\n".join(lines), path.name) == found
    assert code_of("\n".join(f"/* // ' */ {line}" for line in text.split("\n")), path.name) == found
    includes = set(re.findall(r'^#include [<"](.*)[>"]', text, re.M))
    assert {item.name for item in found if isinstance(item, Include)} == {item.name for item in includes_of(text, path.name)} == includes


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A template beside a header, and a library whose headers find one another."""
    files = {
        "op/k.cu.j2": '{# a #}\n#include <lib/a.cuh>\n#include "own.cuh"\n{{ tiles }}\nint k = Tiles::d;\n',
        "op/own.cuh": "#pragma once\nint own; // comment\n",
        "include/lib/a.cuh": '#pragma once\n#include <cuda.h>\n#include "deep/b.cuh"\nint a;\n',
        "include/lib/deep/b.cuh": '#pragma once\n#include "../a.cuh"\n#include "c.cuh" // beside it\nint b = Tiles::e + Tiles::template f<1>;\n',
        "include/lib/deep/c.cuh": "int c;\n",
    }
    for name, text in files.items():
        write(tmp_path / name, text)
    return tmp_path / "op", tmp_path / "include"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    # Edits of one length within a clock's tick must be seen, too.
    write.clock = getattr(write, "clock", 10**18) + 10**9  # type: ignore[attr-defined]
    os.utime(path, ns=(write.clock, write.clock))  # type: ignore[attr-defined]


def digests(folders: tuple[Path, Path]) -> tuple[str, str]:
    return code_digest(folders[0] / "k.cu.j2", folders), closure_digest('#include "k.cu.j2"', folders)


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    write(path, path.read_text().replace(old, new))


# What is edited, and whether the code is another. The files are: the binary's key always changes.
EDITS: dict[str, tuple[str, str, str, bool]] = {
    "a comment": ("op/own.cuh", "comment", "remark", False),
    "a comment of Jinja's": ("op/k.cu.j2", "{# a #}", "{# b\n #}", False),
    "indentation": ("op/own.cuh", "int own;", "  int\n\nown ;", False),
    "an include's spelling": ("op/k.cu.j2", "#include <lib/a.cuh>", '# include /* why */ "lib/a.cuh"', False),
    "a system header": ("include/lib/a.cuh", "<cuda.h>", "<cuda_fp16.h>", False),
    "pragma once": ("op/own.cuh", "#pragma once\n", "", False),
    "the template": ("op/k.cu.j2", "int k", "int l", True),
    "a block of Jinja's": ("op/k.cu.j2", "{{ tiles }}", "{{ args }}", True),
    "a header beside the template": ("op/own.cuh", "int own", "long own", True),
    "a header of the library": ("include/lib/a.cuh", "int a;", "int a ; ;", True),
    "a header beside a header": ("include/lib/deep/c.cuh", "int c", "int d", True),
    "an order": ("op/k.cu.j2", '#include <lib/a.cuh>\n#include "own.cuh"', '#include "own.cuh"\n#include <lib/a.cuh>', True),
}


@pytest.mark.parametrize("case", EDITS)
def test_an_edit(case: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    name, old, new, another = EDITS[case]
    before = digests(folders)
    text = (tmp_path / name).read_text()
    edit(tmp_path / name, old, new)
    after = digests(folders)
    assert (before[0] != after[0]) == another
    assert before[1] != after[1]
    write(tmp_path / name, text)
    assert digests(folders) == before


def test_a_header_that_moves_is_the_same_code_and_another_binary(folders: tuple[Path, Path], tmp_path: Path) -> None:
    before = digests(folders)
    (tmp_path / "op/own.cuh").rename(tmp_path / "include/lib/other.cuh")
    edit(tmp_path / "op/k.cu.j2", '"own.cuh"', "<lib/other.cuh>")
    after = digests(folders)
    assert before[0] == after[0] and before[1] != after[1]


def test_a_host_header_counts_for_neither(folders: tuple[Path, Path], tmp_path: Path) -> None:
    write(tmp_path / "include/vidrial/host/run.cuh", "int one;")
    edit(tmp_path / "op/own.cuh", "int own;", "#include <vidrial/host/run.cuh>\nint own;")
    before = digests(folders)
    write(tmp_path / "include/vidrial/host/run.cuh", "int two;")
    assert digests(folders) == before


@pytest.mark.parametrize("name", ["include/lib/deep/c.cuh", "op/k.cu.j2"])
def test_both_digests_refuse_a_macro_s_include(name: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    edit(tmp_path / name, "int", "#include HEADER\nint")
    line = (tmp_path / name).read_text().split("#include HEADER")[0].count("\n") + 1
    for digest in (lambda: code_digest(folders[0] / "k.cu.j2", folders), lambda: closure_digest('#include "k.cu.j2"', folders)):
        with pytest.raises(TemplateError, match=rf"{Path(name).name}:{line}: this #include names no file by itself"):
            digest()


def test_names_that_are_asked_of_tiles(folders: tuple[Path, Path], tmp_path: Path) -> None:
    def asked() -> Any:
        return tiles_asked_for(folders[0] / "k.cu.j2", folders)

    assert asked() == {"d", "e", "f"}
    edit(tmp_path / "include/lib/deep/c.cuh", "int c", "int c = Tiles :: g")
    assert asked() == {"d", "e", "f", "g"}
    (tmp_path / "op/own.cuh").unlink()
    write(tmp_path / "include/own.cuh", "int own = MyTiles::h + Tiles::i;")
    assert asked() == {"d", "e", "f", "g", "i"}


def test_a_text_that_comes_with_its_old_time_and_size_is_another(folders: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "op/own.cuh"
    before, old = digests(folders), path.stat()
    time.sleep(0.02)  # a clock's tick
    path.write_text(path.read_text().replace("int own", "int two"))
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    after = digests(folders)
    assert before[0] != after[0] and before[1] != after[1]


def test_a_path_is_followed_as_the_compiler_does_it(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """An absolute name; a `..` behind a link, which is the parent of what the link names; a folder that is not there."""
    write(tmp_path / "far/absolute.cuh", "int absolute;")
    write(tmp_path / "far/parent.cuh", "int parent;")
    write(tmp_path / "op/parent.cuh", "int not_this_one;")
    (tmp_path / "far/real").mkdir()
    (tmp_path / "op/link").symlink_to(tmp_path / "far/real")
    edit(tmp_path / "op/own.cuh", "int own;", f'#include "{tmp_path}/far/absolute.cuh"\n#include "link/../parent.cuh"\nint own;')
    before = digests(folders)
    for name in ("absolute", "parent"):
        edit(tmp_path / f"far/{name}.cuh", "int", "long")
        after = digests(folders)
        assert before[0] != after[0] and before[1] != after[1], name
        before = after
    write(tmp_path / "op/parent.cuh", "int nor_now;")
    assert digests(folders) == before
    write(tmp_path / "include/other.cuh", "int other;")
    write(tmp_path / "op/other.cuh", "int not_this_one;")
    edit(tmp_path / "op/own.cuh", "int own;", '#include "nowhere/../other.cuh"\nint own;')
    before = digests(folders)
    write(tmp_path / "op/other.cuh", "int nor_now;")
    assert digests(folders) == before


INCLUDING = {
    "plain": ('#include "sub/a.cuh"', '#include "b.cuh"'),
    "a macro defines it": ('#include "sub/a.cuh"', '#define TEXT VALUE\n#include "../sub/b.cuh"'),
    "comments": ('# /* as */ include /* it\n */ "sub/a.cuh" // is', '/* x */ #include/**/"b.cuh"'),
    "splices": ('#in\\\nclude "sub/a.cuh"', '#include \\\n "b.cuh"'),
    "alternative tokens": ('%:include "sub/a.cuh"', '%: include "b.cuh"'),
}


@pytest.mark.parametrize("case", INCLUDING)
def test_an_edited_header_makes_another_cubin(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the directive looks like, the value of the header that is there now is in the cubin and in both keys."""
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "cache"))
    # What lies where the process happens to run is nobody's header.
    write(tmp_path / "elsewhere/sub/a.cuh", "#define VALUE 1\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    first, second = INCLUDING[case]
    write(
        tmp_path / "op/k.cu.j2",
        f'{{{{ tiles }}}}\n{{{{ args }}}}\n{first}\nextern "C" __global__ void fake(Args args) {{ args.y[0] = VALUE; }}\n',
    )
    write(tmp_path / "op/sub/a.cuh", f"{second}\n")
    kernel = dataclasses.replace(fake_op.op.kernels[0], template=tmp_path / "op/k.cu.j2")
    seen = set()
    for value in (0x1A2B3C4D, 0x2B3C4D5E):
        write(tmp_path / "op/sub/b.cuh", f"#define VALUE {value}\n")
        image = cubin_of(kernel, fake_op.example(), fake_op.Config(), "sm_90a").image
        assert value.to_bytes(4, "little") in image
        seen.add((kernel.digest(), kernel.text_digest(), kernel.source(fake_op.example(), fake_op.Config()).text))
    assert len(seen) == 2 and all(a != b for a, b in zip(*seen, strict=True))
