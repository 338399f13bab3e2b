"""Drawings parse as XML, have a cell for each thing, and say the right thing in it."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from vidrial.dtypes import DType
from vidrial.errors import ArgumentError
from vidrial.layout.algebra import ComposedLayout, Layout, Swizzle
from vidrial.layout.atoms import MMA_16x8x16, cp_async
from vidrial.layout.copies import TiledCopy
from vidrial.layout.drawing import HEIGHT, MARGIN, WIDTH, draw
from vidrial.layout.epilogue import Epilogue
from vidrial.layout.mma import TiledMma
from vidrial.layout.smem import Pipeline, SmemLayout
from vidrial.layout.wgmma import WarpgroupMma

SVG = "{http://www.w3.org/2000/svg}"
BF16 = DType.bfloat16


def cells(svg: str) -> dict[tuple[int, int], tuple[str, str]]:
    """(row, column) -> (text, colour) of each cell, found by its place."""
    elements = list(ElementTree.fromstring(svg))
    found = {}
    for box, text in zip(elements, elements[1:], strict=False):
        if box.get("class") == "cell":
            assert text.tag == f"{SVG}text" and text.text
            place = (int(box.attrib["y"]) - 2 * MARGIN) // HEIGHT, (int(box.attrib["x"]) - MARGIN) // WIDTH
            assert place not in found
            found[place] = text.text, box.attrib["fill"]
    return found


def test_layouts() -> None:
    found = cells(draw(Layout((3, (2, 2)), (4, (1, 20)))))
    assert len(found) == 12 and [found[2, c][0] for c in range(4)] == ["8", "9", "28", "29"]
    assert [text for text, _ in cells(draw(Layout(5, 3))).values()] == ["0", "3", "6", "9", "12"]
    composed = ComposedLayout(Swizzle(1, 0, 1), 0, Layout((2, 2), (2, 1)))
    assert {place: text for place, (text, _) in cells(draw(composed)).items()} == {(0, 0): "0", (0, 1): "1", (1, 0): "3", (1, 1): "2"}
    with pytest.raises(ArgumentError, match="3 modes"):
        draw(Layout((2, 2, 2)))


def test_tile_shows_its_banks() -> None:
    found = cells(draw(SmemLayout(BF16, 16, 64)))
    assert len(found) == 16 * 8 and [found[1, c][0] for c in range(4)] == ["9", "8", "11", "10"]
    # Swizzled, the eight rows of a column lie in eight groups of banks; plain, in one.
    assert len({found[r, 3][1] for r in range(8)}) == 8
    plain = cells(draw(SmemLayout(BF16, 16, 64, None)))
    assert len({plain[r, 3][1] for r in range(8)}) == 1 and plain[2, 1][0] == "17"


def test_copy() -> None:
    found = cells(draw(TiledCopy(cp_async(), SmemLayout(BF16, 32, 64), 128)))
    assert len(found) == 256 and (found[0, 0][0], found[15, 7][0], found[16, 1][0]) == ("0.0", "127.0", "1.1")


def test_mma_parts() -> None:
    mma = TiledMma(MMA_16x8x16[BF16], (2, 2), (64, 32, 32))
    c, a, b = (cells(draw(mma, part)) for part in ("C", "A", "B"))  # type: ignore[arg-type]
    assert (len(c), len(a), len(b)) == (64 * 32, 64 * 32, 32 * 32)
    assert (c[0, 0][0], c[0, 3][0], c[9, 0][0], c[16, 0][0], c[0, 8][0], c[32, 17][0]) == ("0.0", "1.1", "4.2", "32.0", "64.0", "0.1")
    assert (a[0, 0][0], a[8, 1][0], a[1, 10][0], a[16, 0][0], a[32, 16][0]) == ("0.0", "0.3", "5.4", "32.0", "0.0")
    assert (b[0, 0][0], b[0, 8][0], b[8, 0][0], b[17, 3][0]) == ("0.0", "0.2", "64.0", "5.1")
    assert c[0, 0][1] == c[8, 1][1] != c[16, 0][1]


def test_wgmma_parts() -> None:
    q, k, v = SmemLayout(BF16, 256, 64), SmemLayout(BF16, 64, 64), SmemLayout(BF16, 32, 128)
    mma = WarpgroupMma(BF16, 2, (256, 32, 64), k, q)
    c, a, b = (cells(draw(mma, part)) for part in ("C", "A", "B"))  # type: ignore[arg-type]
    # The second warpgroup begins at row 128; columns 8 and 9 are values 4 and 5, or 6 and 7 eight rows further down.
    assert (len(c), c[0, 0][0], c[9, 1][0], c[64, 15][0], c[128, 4][0], c[255, 15][0]) == (
        256 * 16,
        "0.0",
        "5.2",
        "3.12",
        "128.4",
        "255.14",
    )
    assert len({colour for _, colour in c.values()}) == 8 and c[0, 0][1] == c[64, 0][1] != c[16, 0][1]
    # 16 bytes per cell: two a step of k; parts of 64 rows of A, 32 of B.
    assert (len(a), a[0, 0][0], a[63, 7][0], a[64, 2][0], a[255, 5][0]) == (256 * 8, "0.0", "0.3", "1.1", "3.2")
    assert (len(b), b[31, 1][0], b[32, 2][0]) == (64 * 8, "0.0", "1.1") and len({b[r, 2][1] for r in range(8)}) == 8
    # A in registers, one step of k; rows of B along k: a step is 16 of them, a part is 64 columns.
    mma = WarpgroupMma(BF16, 1, (128, 64, 32), v.transposed)
    a, b = (cells(draw(mma, part)) for part in ("A", "B"))  # type: ignore[arg-type]
    assert (len(a), a[0, 0][0], a[72, 1][0], a[127, 15][0]) == (128 * 16, "0.0", "0.3", "127.7")
    assert (len(b), b[15, 7][0], b[16, 8][0]) == (32 * 16, "0.0", "1.1")


def test_copy_in_pieces() -> None:
    title = ElementTree.fromstring(draw(TiledCopy(cp_async(4), SmemLayout(BF16, 32, 64), 128))).find(f"{SVG}text")
    assert title is not None and title.text == "128 threads copy 32 x 64 bfloat16 in pieces of 4 bytes: thread.step"


def test_epilogue() -> None:
    mma = TiledMma(MMA_16x8x16[BF16], (2, 2), (64, 64, 32))
    found = cells(draw(Epilogue(mma, SmemLayout(BF16, 64, 64))))
    # 8 cells of 16 bytes per row, 16 rows a step; the warps that computed 16 rows x 8 columns in turn lie 2 x 2.
    assert (len(found), found[0, 0][0], found[15, 7][0], found[16, 0][0]) == (64 * 8, "0.0", "127.0", "0.1")
    assert len({colour for _, colour in found.values()}) == 4
    assert found[0, 0][1] == found[15, 2][1] != found[16, 0][1] and found[0, 0][1] != found[0, 1][1]


def test_ring() -> None:
    found = cells(draw(Pipeline(4, read=2, ahead=1)))
    # Two are filled before the first step; each step hands one out, the next has landed, and one begins to be filled.
    assert {place: text for place, (text, _) in found.items() if place[0] == 0} == {(0, 0): "0 read", (0, 1): "1 here", (0, 2): "2 <-"}
    assert {place: text for place, (text, _) in found.items() if place[0] == 5} == {
        (5, 0): "4 read",
        (5, 1): "5 read",
        (5, 2): "6 here",
        (5, 3): "7 <-",
    }


def test_titles_fit() -> None:
    svg = ElementTree.fromstring(draw(WarpgroupMma(BF16, 1, (64, 16, 16), SmemLayout(BF16, 16, 16)), "B"))
    title = next(text for text in svg.iter(f"{SVG}text")).text or ""
    assert title == "B of 1 warpgroup, wgmma.m64n16k16.bfloat16: part.step of k, colour = banks"
    assert float(svg.attrib["width"]) > MARGIN + 6.6 * len(title) > MARGIN + 2 * WIDTH


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(ArgumentError, match="a int cannot be drawn"):
        draw(3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="no part 'D'"):
        draw(TiledMma(MMA_16x8x16[BF16], (1, 1), (16, 8, 16)), "D")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="a WarpgroupMma has no part 'D'; accepted: 'A', 'B', 'C'"):
        draw(WarpgroupMma(BF16, 1, (64, 16, 16), SmemLayout(BF16, 16, 16)), "D")  # type: ignore[arg-type]
    assert "&lt;3,3,3&gt;" in draw(SmemLayout(BF16, 8, 64).layout)
