"""SVG of layouts, shared-memory tiles, copies and MMAs: who holds what, and in which bank."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from vidrial.analysis import BANKS
from vidrial.errors import ArgumentError
from vidrial.layout import ComposedLayout, Layout, product
from vidrial.smem import VECTOR_BYTES
from vidrial.tiled import SmemLayout, TiledCopy, TiledMma

WIDTH, HEIGHT, MARGIN = 44, 20, 26


@dataclasses.dataclass(frozen=True)
class Cell:
    """One rectangle of a drawing: its place, what is written in it, and a hue in [0, 1)."""

    row: int
    column: int
    text: str
    hue: float


def draw(described: Layout | ComposedLayout | SmemLayout | TiledCopy | TiledMma) -> str:
    """An SVG document.

    Layout: a cell an element, its index; SmemLayout: a cell 16 bytes, its number, the banks' group in colour; TiledCopy: a cell
    16 bytes, `thread.step`; TiledMma: the accumulator, a cell an element, `thread.value`, the warp in colour.

    Raises:
        ArgumentError: the object is of another type, or a layout has other than one or two modes.
    """
    if isinstance(described, (Layout, ComposedLayout)):
        return _svg(str(described), list(_layout_cells(described)))
    if isinstance(described, SmemLayout):
        return _svg(f"{described.rows} x {described.columns} {described.dtype}: 16 bytes a cell, colour = banks", list(_tile_cells(described)))
    if isinstance(described, TiledCopy):
        return _svg(f"{described.threads} threads copy {described.tile.rows} x {described.tile.columns} {described.tile.dtype}: thread.step",
                    list(_copy_cells(described)))
    if isinstance(described, TiledMma):
        m, n, _ = described.tile
        return _svg(f"accumulator {m} x {n} of {described.warps[0]} x {described.warps[1]} warps, {described.atom.name}: thread.value",
                    list(_mma_cells(described)))
    raise ArgumentError(f"a {type(described).__name__} cannot be drawn; accepted: Layout, ComposedLayout, SmemLayout, TiledCopy, TiledMma")


def _layout_cells(layout: Layout | ComposedLayout) -> Iterator[Cell]:
    shape = layout.shape if isinstance(layout.shape, tuple) else (1, layout.shape)
    if len(shape) > 2:
        raise ArgumentError(f"{layout} has {len(shape)} modes; only one or two can be drawn, group them first")
    rows, columns = (1, product(shape[0])) if len(shape) == 1 else map(product, shape)
    for row in range(rows):
        for column in range(columns):
            index = layout(row + rows * column)
            yield Cell(row, column, str(index), index % BANKS / BANKS)


def _tile_cells(tile: SmemLayout) -> Iterator[Cell]:
    vector = VECTOR_BYTES // tile.dtype.bytes
    groups = BANKS * 4 // VECTOR_BYTES
    for row in range(tile.rows):
        for column in range(tile.columns // vector):
            chunk = tile.offset(row, column * vector) // vector
            yield Cell(row, column, str(chunk), chunk % groups / groups)


def _copy_cells(copy: TiledCopy) -> Iterator[Cell]:
    for thread in range(copy.threads):
        for i, (row, _) in enumerate(copy.steps):
            yield Cell(copy.row(thread) + row, copy.column(thread) // copy.vector, f"{thread}.{i}", thread % 32 / 32)


def _mma_cells(mma: TiledMma) -> Iterator[Cell]:
    rows, columns = mma.coordinates()
    values = rows[0].size
    warps = mma.warps[0] * mma.warps[1]
    for thread in range(mma.threads):
        for value, (row, column) in enumerate(zip(rows[thread].flat, columns[thread].flat, strict=True)):
            # Lighter and darker atoms tell neighbours of one warp apart.
            yield Cell(int(row), int(column), f"{thread}.{value}", (thread // 32 + 0.35 * value / values) / warps)


def _svg(title: str, cells: list[Cell]) -> str:
    rows, columns = 1 + max(c.row for c in cells), 1 + max(c.column for c in cells)
    width, height = MARGIN + columns * WIDTH, 2 * MARGIN + rows * HEIGHT
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
             'font-family="ui-monospace, monospace" font-size="10" text-anchor="middle">',
             f'<title>{_escape(title)}</title>',
             f'<rect width="{width}" height="{height}" fill="#fff"/>',
             f'<text x="{MARGIN}" y="14" text-anchor="start" font-size="11" fill="#333">{_escape(title)}</text>']
    lines += [f'<text x="{MARGIN + (c + 0.5) * WIDTH:g}" y="{2 * MARGIN - 5}" fill="#999">{c}</text>' for c in range(columns)]
    lines += [f'<text x="{MARGIN / 2:g}" y="{2 * MARGIN + (r + 0.7) * HEIGHT:g}" fill="#999">{r}</text>' for r in range(rows)]
    for cell in cells:
        x, y = MARGIN + cell.column * WIDTH, 2 * MARGIN + cell.row * HEIGHT
        lines.append(f'<rect class="cell" x="{x}" y="{y}" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="2" '
                     f'fill="hsl({360 * cell.hue:.0f}, 62%, 83%)"/>'
                     f'<text x="{x + WIDTH / 2:g}" y="{y + 0.7 * HEIGHT:g}" fill="#222">{_escape(cell.text)}</text>')
    return "\n".join([*lines, "</svg>"])


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
