"""Code lines by package, without docstrings, comments and blank lines, beside what tests/budgets.json allows.

python tests/code_lines.py                 # each package: its lines and its budget
python tests/code_lines.py --write [WHY]   # take today's lines as the budgets; a row that grows needs the reason
python tests/code_lines.py FOLDER          # count another tree
"""

from __future__ import annotations

import ast
import io
import json
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUDGETS = Path(__file__).parent / "budgets.json"
# Beside vidrial/ itself, whose links to kernels, sweeps and templates are not followed.
BESIDE = ("kernels", "sweeps", "benchmarks")
LINKED = ("kernels", "sweeps", "templates")
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}


def code_lines(text: str) -> int:
    """Lines of a Python source that hold code: neither blank, nor comment, nor docstring."""
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node) is not None:
            documentation |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SILENT:
            found |= set(range(token.start[0], token.end[0] + 1))
    return len(found - documentation)


def package_of(path: Path) -> str:
    """`vidrial/tune`, or `vidrial` for a module that stands in no package."""
    parts = path.parent.parts
    return "/".join(parts[:2] if parts[0] in ("vidrial", "kernels") else parts[:1])


def count(root: Path = ROOT) -> dict[str, int]:
    """Package -> its code lines."""
    files = [f for f in (root / "vidrial").rglob("*.py") if f.relative_to(root / "vidrial").parts[0] not in LINKED]
    files += [f for folder in BESIDE for f in (root / folder).rglob("*.py")]
    found: dict[str, int] = {}
    for file in files:
        package = package_of(file.relative_to(root))
        found[package] = found.get(package, 0) + code_lines(file.read_text())
    return dict(sorted(found.items()))


def budgets() -> dict[str, dict[str, object]]:
    """Package -> `lines`, and `reason` where a commit raised them."""
    return json.loads(BUDGETS.read_text()) if BUDGETS.is_file() else {}


def exceeded(found: dict[str, int], allowed: dict[str, dict[str, object]]) -> dict[str, int]:
    """Package -> how many lines it is beyond its row; a package without a row is beyond it altogether."""
    over = {package: lines - int(str(allowed.get(package, {}).get("lines", 0))) for package, lines in found.items()}
    return {package: lines for package, lines in over.items() if lines > 0}


def rewritten(found: dict[str, int], before: dict[str, dict[str, object]], why: str) -> dict[str, dict[str, object]]:
    """The rows of `found`: one that shrinks or stays keeps its reason, one that grows takes `why`.

    Raises:
        SystemExit: a row grows, and nothing says why.
    """
    grown = exceeded(found, before)
    if before and grown and not why:
        raise SystemExit(f"{', '.join(f'{package} grows by {lines}' for package, lines in grown.items())}: say why")
    rows: dict[str, dict[str, object]] = {}
    for package, lines in found.items():
        reason = why if package in grown else before.get(package, {}).get("reason", "")
        rows[package] = {"lines": lines, "reason": reason} if reason else {"lines": lines}
    return rows


def main(arguments: list[str]) -> None:
    write = arguments[:1] == ["--write"]
    found, known = count(ROOT if write or not arguments else Path(arguments[0])), budgets()
    for package in sorted(found.keys() | known.keys()):
        lines, allowed = found.get(package, 0), known.get(package, {}).get("lines", "-")
        print(f"{package:32} {lines:6} {allowed:>6}")
    print(f"{'vidrial/ in all':32} {sum(n for p, n in found.items() if p.startswith('vidrial')):6}")
    print(f"{'in all':32} {sum(found.values()):6}")
    if write:
        BUDGETS.write_text(json.dumps(rewritten(found, known, " ".join(arguments[1:])), indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
