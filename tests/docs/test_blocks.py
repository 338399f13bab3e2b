"""What README.md and docs/*.md say is run: Python blocks, commands, links. (What needs a GPU: tests/gpu/test_pages.py.)"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from pages import MARK, PAGES, ROOT, Block, Command, blocks, commands, disagreement, needs_gpu, python_blocks, run_page

from vidrial.cli import main as cli

WITH_PYTHON = [page for page in PAGES if python_blocks(page)]
COMMANDS = [command for page in PAGES for command in commands(page)]


def name_of(what: Path | Command) -> str:
    return what.where if isinstance(what, Command) else str(what.relative_to(ROOT))


def run_command(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    assert words[0] == "vidrial"
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words[1:]))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out + err


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ran = run_page(page, gpu=False)
    assert ran > 0 or needs_gpu(page)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.runs], ids=name_of)
def test_commands_print_what_is_shown(
    command: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    if command.words[1] in ("compile", "explain"):
        # An empty cache: no test before this one has compiled what is shown.
        monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path))
    # The width of the terminal that the pages were written at.
    monkeypatch.setenv("COLUMNS", "160")
    code, out = run_command(command.words, capsys)
    assert code == 0, out
    wrong = disagreement(command.shown, out)
    assert not wrong, f"{command.where}: {wrong}\n\n{out}"


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.runs], ids=name_of)
def test_commands_that_are_not_run_exist(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.block.mark in ("", "gpu", "shown")
    code, out = run_command((*command.words[:2], "--help"), capsys)
    assert code == 0
    for option in re.findall(r"--[a-z-]+", " ".join(command.words)):
        assert option in out or option.removeprefix("--") in ("t", "n", "d", "h"), f"{command.where}: {command.words[1]} has no {option}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "examples").glob("*/README.md"))], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_every_mark_stands_above_a_block_and_is_known() -> None:
    for page in PAGES:
        marks = MARK.findall(page.read_text())
        assert len(marks) == sum(b.mark != "" for b in blocks(page)), page
        assert {mark for mark, _ in marks} <= {"gpu", "begins", "prints", "shown"}, page


def test_there_is_something_to_run() -> None:
    assert len(WITH_PYTHON) >= 5
    assert sum(len(python_blocks(page)) for page in PAGES) >= 15
    assert sum(c.runs for c in COMMANDS) >= 5


# The checks themselves find mistakes.


def test_a_wrong_block_is_found_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pages.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\n```\n\n```python\nprint(x + 1)\n```\n<!-- test: prints -->\n```\n3\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:12 shows\n3\nbut what is printed is\n2"):
        run_page(page, gpu=False)
    page.write_text(page.read_text().replace("\n3\n", "\n 2 \n"))
    assert run_page(page, gpu=False) == 2
    page.write_text("```python\nok = 1\nwrong()\n```\n")
    with pytest.raises(NameError) as raised:
        run_page(page, gpu=False)
    assert raised.traceback[-1].lineno == 2  # counted from 0: line 3 of the page
    page.write_text("<!-- test: gpu -->\n```python\nwrong()\n```\n")
    assert needs_gpu(page) and run_page(page, gpu=False) == 0
    with pytest.raises(NameError):
        run_page(page, gpu=True)


@pytest.mark.parametrize(
    ("shown", "out", "wrong"),
    [
        ("a b 1.5 s", "a  b\n2.25 s more", ""),
        ("a ... d", "a b c d e", ""),
        ("", "anything", ""),
        ("15059 rejected", "15060 rejected", "15059 rejected ... but printed is ... 15060 rejected"),
        ("a ... x", "a b c", "x is not printed"),
        ("a b c", "a b", "c"),
    ],
)
def test_disagreement(shown: str, out: str, wrong: str) -> None:
    assert (wrong in disagreement(shown, out)) if wrong else disagreement(shown, out) == ""


def test_blocks_of_all_kinds(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "text\n\n    $ vidrial env   # shown\n    first\n\n    second\n\n"
        "<!-- test: shown -->\n```\n$ vidrial new x\n$ vidrial demo\n```\n* item\n    not a block\n"
    )
    found = blocks(page)
    assert [(b.line, b.language, b.mark) for b in found] == [(3, None, ""), (10, "", "shown")]
    assert [(c.line, c.words, c.shown) for c in commands(page)] == [
        (3, ("vidrial", "env"), "first\n\nsecond"),
        (10, ("vidrial", "new", "x"), ""),
        (11, ("vidrial", "demo"), ""),
    ]
    assert isinstance(found[0], Block)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "examples").glob("*/README.md"))], ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(
        r"(?<![\w/])((?:tests|vidrial|templates|kernels|sweeps|docs|benchmarks|examples|requirements)/[\w/.-]+\.\w+)", page.read_text()
    )
    for path in named:
        assert (ROOT / path).exists() or (ROOT / "templates/include" / path).exists(), f"{page.relative_to(ROOT)} names {path}"


def test_names_of_modules_and_values_that_are_named_exist() -> None:
    """`vidrial.events`, `vidrial.testing.check(...)`: what a page says in code is there to be imported."""
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for path in re.findall(r"`(vidrial(?:\.\w+)+)", page.read_text()):
            if path != "vidrial.ops":  # a group of entry points
                found: object = importlib.import_module("vidrial")
                parts = path.split(".")[1:]
                for i, part in enumerate(parts):
                    if not hasattr(found, part):
                        importlib.import_module(".".join(["vidrial", *parts[: i + 1]]))
                    found = getattr(found, part)
