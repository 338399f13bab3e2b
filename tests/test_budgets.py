"""No package grows beyond its row of budgets.json without a reason beside it."""

from __future__ import annotations

import code_lines
import pytest

SOURCE = '''"""A module."""

# A comment.
import math  # one


class Two:
    """A class,

    on several lines."""

    x = 1  # three

    def four(self) -> str:
        """Free."""
        return """
five, and six and seven:
not a docstring"""
'''


def test_code_lines_are_neither_docstrings_nor_comments_nor_blank() -> None:
    assert code_lines.code_lines(SOURCE) == 7
    assert code_lines.code_lines("") == code_lines.code_lines('"""Only words."""\n') == 0


def test_every_package_keeps_to_its_budget() -> None:
    over = code_lines.exceeded(code_lines.count(), code_lines.budgets())
    assert not over, f"code lines beyond tests/budgets.json: {over}; cut, or run python tests/code_lines.py --write WHY"


def test_a_package_that_grows_is_found_and_needs_a_reason() -> None:
    rows: dict[str, dict[str, object]] = {"vidrial/a": {"lines": 10}, "vidrial/b": {"lines": 5, "reason": "it was so"}}
    found = {"vidrial/a": 11, "vidrial/b": 4, "vidrial/new": 2}
    assert code_lines.exceeded(found, rows) == {"vidrial/a": 1, "vidrial/new": 2}
    with pytest.raises(SystemExit, match="vidrial/a grows by 1, vidrial/new grows by 2: say why"):
        code_lines.rewritten(found, rows, "")
    assert code_lines.rewritten(found, rows, "x") == {
        "vidrial/a": {"lines": 11, "reason": "x"},
        "vidrial/b": {"lines": 4, "reason": "it was so"},
        "vidrial/new": {"lines": 2, "reason": "x"},
    }
