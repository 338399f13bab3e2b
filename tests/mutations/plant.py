"""An example with one mistake in it, in a folder of its own; and what `check` says of it."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidrial.host.check import Report
from vidrial.spec.op import Op
from vidrial.spec.registry import find_op
from vidrial.templates import TEMPLATES

LIBRARY = Path(TEMPLATES, "include", "vidrial")
EXAMPLES = Path(__file__).parents[2] / "examples"
# A line of the op's own files, or of the library's.
PLACE = re.compile(r"(?:[\w/]*/)?[\w.]+\.(?:cu\.j2|cuh):\d+")
ELEMENT = re.compile(r"first (\w+\[[^\]]*\])")


@dataclass(frozen=True)
class Finding:
    """`by`: what said so. `place`: a line of a source, or the output and index of the first wrong element; "" if nothing was found."""

    by: str
    place: str

    @property
    def located(self) -> bool:
        """Whether it is a line."""
        return PLACE.fullmatch(self.place) is not None


def planted(folder: Path, mutation: Any) -> Op:
    """The op of a copy of an example in `folder`, with the mistake of a `Mutation`; without one, given its name."""
    name = mutation if isinstance(mutation, str) else mutation.op
    copy = folder / name
    shutil.copytree(EXAMPLES / name, copy, ignore=shutil.ignore_patterns("__pycache__"))
    if not isinstance(mutation, str):
        file = copy / mutation.file
        if "/" in mutation.file:
            # A header of the library, which the template then includes from beside it.
            part = mutation.file.partition("/")[0]
            file = copy / "planted" / mutation.file
            file.parent.mkdir(parents=True)
            shutil.copy(LIBRARY / mutation.file, file)
            for template in copy.glob("*.cu.j2"):
                header = f"<vidrial/{mutation.file}>"
                template.write_text(template.read_text().replace(header, f"<planted/{mutation.file}>"))
            assert part in ("pipeline",), "its other headers would be included twice"
        text = file.read_text()
        assert text.count(mutation.old) == 1, f"{text.count(mutation.old)} times in {mutation.file}: {mutation.old}"
        file.write_text(text.replace(mutation.old, mutation.new))
    return find_op(f"{copy / name}.py:op")


def finding(report: Report) -> Finding:
    """What a report found: of its groups the first that names a line, the op's own before the library's; else the first wrong element."""
    said = [group[0].summary for group in report.groups()]
    for own in (True, False):
        for text in said:
            for found in PLACE.finditer(text):
                if own == (not found[0].startswith("vidrial/")):
                    return Finding(_headline(text), Path(found[0]).name if own else found[0])
    for text in said:
        if element := ELEMENT.search(text):
            return Finding("wrong values", element[1])
    return Finding(_headline(said[0]), said[0].splitlines()[0]) if said else Finding("", "")


def _headline(text: str) -> str:
    """Who found it, or what the host target calls it."""
    for word in (
        "ThreadSanitizer",
        "AddressSanitizer",
        "deadlock",
        "does not compile",
        "wgmma",
        "tma_load",
        "barrier",
        "cp.async",
        "wrong values",
    ):
        if word in text:
            return word
    return "host target"
