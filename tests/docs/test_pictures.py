"""docs/pictures holds what docs/drawings.py and docs/tiles.py write, and docs/device_api.md names all that a template may use."""

from __future__ import annotations

import importlib
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest
from pages import ROOT

from vidrial.spec.registry import resolve

PICTURES = ROOT / "docs/pictures"
INCLUDE = ROOT / "templates/include/vidrial"


def script(name: str, attribute: str = "write") -> ModuleType:
    return sys.modules[resolve(f"{ROOT / 'docs' / name}.py:{attribute}").__module__]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    script("drawings").write(folder)
    script("tiles").write(folder)
    return folder


def test_pictures_are_what_their_scripts_write(written: Path) -> None:
    assert sorted(p.name for p in written.iterdir()) == sorted(p.name for p in PICTURES.glob("*.svg"))
    for path in written.iterdir():
        assert path.read_text() == (PICTURES / path.name).read_text(), f"{path.name}: run python docs/drawings.py, python docs/tiles.py"


def test_every_picture_is_shown() -> None:
    pages = "".join(p.read_text() for p in (ROOT / "docs").glob("*.md"))
    for path in PICTURES.glob("*.svg"):
        assert f"(pictures/{path.name})" in pages


def test_text_that_does_not_fit_is_refused() -> None:
    drawing = script("drawings").Drawing(100, 100)
    with pytest.raises(ValueError, match="needs 138 pixels; its box has 80"):
        drawing.box(0, 0, 100, "made", "Title", "x" * 20)


@pytest.mark.parametrize("name", ["op", "call", "sweep"])
def test_boxes_stay_inside_and_apart(name: str) -> None:
    drawing = script("drawings").DRAWINGS[name]()
    tree = ET.fromstring(drawing.svg())
    rects = [r for r in tree.iter("{http://www.w3.org/2000/svg}rect") if r.get("class") != "ground"]
    boxes = [tuple(float(r.get(k, "0")) for k in ("x", "y", "width", "height")) for r in rects]
    assert len(boxes) >= 9
    for x, y, w, h in boxes:
        assert min(x, y) >= 0 and x + w <= drawing.width and y + h <= drawing.height
    for i, (x, y, w, h) in enumerate(boxes):
        for u, v, s, t in boxes[:i]:
            assert x + w <= u or u + s <= x or y + h <= v or v + t <= y, f"boxes at ({x}, {y}) and ({u}, {v}) overlap"


def test_both_grounds_are_there() -> None:
    for name in ("op", "call", "sweep"):
        text = (PICTURES / f"{name}.svg").read_text()
        assert "@media(prefers-color-scheme:dark)" in text and 'class="ground"' in text


def test_api_page_names_every_public_name_with_its_docstring() -> None:
    api = script("api", "page")
    assert (ROOT / "docs/api.md").read_text() == api.page(), "run python docs/api.py"
    for namespace in api.NAMESPACES:
        for name, value in api.public(importlib.import_module(namespace)).items():
            assert api.summary(value), f"{namespace}.{name} has no docstring"


# Structs, and functions of namespace vidrial or public members, of the device library that templates see.
DECLARED = re.compile(
    r"^(?:template <[^;{]*?>\s*)?struct (\w+)|CUTE_(?:HOST_)?DEVICE (?:static )?(?:constexpr )?[\w:<>]+[&*]? (\w+)\(", re.MULTILINE
)


def declared(header: Path) -> set[str]:
    text = re.sub(r"(?s) private:.*?\n\};", "};", header.read_text())
    text = re.sub(r"//.*", "", text)
    return {a or b for a, b in DECLARED.findall(text)} - {"operator", "size"}


@pytest.mark.parametrize("header", [*sorted(INCLUDE.glob("tile/*.cuh")), INCLUDE / "arch/ptx.cuh"], ids=lambda p: p.name)
def test_device_api_names_everything(header: Path) -> None:
    said = set(re.findall(r"\w+", " ".join(re.findall(r"`+([^`]+)`+", (ROOT / "docs/device_api.md").read_text()))))
    names = declared(header)
    assert names, header
    assert names <= said, f"{header.name}: docs/device_api.md does not name {', '.join(sorted(names - said))}"


@pytest.mark.parametrize("header", sorted(p for folder in ("pipeline", "collective") for p in INCLUDE.glob(f"{folder}/*.cuh")), ids=str)
def test_device_api_names_the_pieces(header: Path) -> None:
    assert f"vidrial/{header.relative_to(INCLUDE)}" in (ROOT / "docs/device_api.md").read_text()
