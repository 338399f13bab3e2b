"""Headers with one wrong line in them: the library's, or an op's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vidrial.templates import TEMPLATES

LIBRARY, HEAD = Path(TEMPLATES, "include", "vidrial"), "#pragma nv_hdrstop"


def planted(folder: Path, name: str, right: str, wrong: str, parts: Sequence[str], op: str = "") -> tuple[str, ...]:
    """Folders of headers in which `wrong` stands in `name` where `right` stands: the op's, to be searched first, and the library's `parts`.

    `name`: a header of the op (`power_attend`), or one of these parts (`collective/attention`). The copies include one another, and so must
    the source: `including` makes one that does.
    """
    copies = {folder / "planted" / part: LIBRARY / part for part in parts}
    if op:
        copies = {folder / "op": Path(TEMPLATES, op)} | copies
    wanted = (LIBRARY if "/" in name else Path(TEMPLATES, op)) / f"{name}.cuh"
    assert wanted.parent in copies.values(), f"{name} is not of {', '.join(parts)}"
    for copy, original in copies.items():
        copy.mkdir(parents=True)
        for header in original.glob("*.cuh"):
            text = header.read_text()
            if header == wanted:
                assert text.count(right) == 1, f"{text.count(right)} times in {name}: {right}"
                text = text.replace(right, wrong)
            (copy / header.name).write_text(including(text, parts))
    return (str(folder / "op"), str(folder)) if op else (str(folder),)


def including(text: str, parts: Sequence[str]) -> str:
    """A source that includes the planted copies of the library's parts.

    The prelude brings the right ones of `tile`: copies of those are in a namespace of their own, which stands before the library's.
    """
    for part in parts:
        text = text.replace(f"#include <vidrial/{part}/", f"#include <planted/{part}/")
    if "tile" in parts:
        text = text.replace("vidrial::", "vidrial::planted::").replace("vidrial::planted::host", "vidrial::host")
        text = text.replace("using namespace vidrial;", "using namespace vidrial::planted;")
        text = text.replace(HEAD, f"{HEAD}\n#include <planted/tile/mma.cuh>\n#include <planted/tile/wgmma.cuh>")
        text = text.replace("namespace vidrial {", "namespace vidrial::planted {\nusing namespace vidrial;", 1)
    return text


def reaches(text: str, name: str, op: str = "") -> bool:
    """Whether a source includes a header of an op or of the library, itself or by way of others."""
    seen, waiting = set[str](), [text]
    while waiting:
        for header in re.findall(r'#include ["<](?:vidrial/)?([\w/]+\.cuh)[">]', waiting.pop()):
            path = (LIBRARY if "/" in header else Path(TEMPLATES, op)) / header
            if header not in seen and path.is_file():
                seen.add(header)
                waiting.append(path.read_text())
    return f"{name}.cuh" in seen
