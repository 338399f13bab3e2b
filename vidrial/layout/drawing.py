"""SVG of layouts, shared-memory tiles, copies and MMAs: who holds what, and in which bank."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal, TypeAlias

import numpy as np

from vidrial.device import VECTOR_BYTES, WARP
from vidrial.errors import ArgumentError
from vidrial.layout.access import BANK_BYTES, BANKS
from vidrial.layout.algebra import ComposedLayout, Layout, product
from vidrial.layout.copies import TiledCopy
from vidrial.layout.epilogue import Epilogue
from vidrial.layout.mma import TiledMma
from vidrial.layout.smem import Pipeline, SmemLayout
from vidrial.layout.wgmma import DEPTH, ROWS, WARPGROUP, Descriptor, WarpgroupMma

WIDTH, HEIGHT, MARGIN = 44, 20, 26
# A letter of the title.
LETTER = 6.7
Drawable: TypeAlias = Layout | ComposedLayout | SmemLayout | TiledCopy | TiledMma | WarpgroupMma | Epilogue | Pipeline
Part: TypeAlias = Literal["A", "B", "C"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One rectangle of a drawing: its place, what is written in it, and a hue in [0, 1)."""

    row: int
    column: int
    text: str
    hue: float


def draw(described: Drawable, part: Part = "C") -> str:
    """An SVG document.

    Layout: a cell an element, its index; SmemLayout: a cell 16 bytes, its number, the banks' group in colour; TiledCopy: a cell
    16 bytes, `thread.step`; TiledMma, WarpgroupMma: one of A (m x k), B (n x k) and the accumulator C (m x n), a cell an element,
    `thread.value` of the atom (of the warps that hold the same, the first), the warp in colour. Of wgmma, C has a cell for two columns,
    A in registers is one step of k, and an operand in shared memory, which it reads by itself, is its tile: a cell 16 bytes,
    `part.step` of k (a part: 64 rows of A, n of B), the banks' group in colour. Epilogue: a cell 16 bytes of the tile, `thread.step` that
    stores it, the warp that computed it in colour. Pipeline: a row a step, a column a buffer: the work item that it holds, and what becomes
    of it: `read` (also by what runs on), `here` (has landed, too), `...` (on its way), `<-` (begins to be filled), each in a colour.

    Raises:
        ArgumentError: the object is of another type, a layout has other than one or two modes, or there is no such part.
    """
    if isinstance(described, (Layout, ComposedLayout)):
        return _svg(str(described), list(_layout_cells(described)))
    if isinstance(described, SmemLayout):
        title = f"{described.rows} x {described.columns} {described.dtype}: 16 bytes per cell, colour = banks"
        return _svg(title, list(_tile_cells(described)))
    if isinstance(described, TiledCopy):
        tile = described.tile
        pieces = "" if described.atom.bytes == VECTOR_BYTES else f" in pieces of {described.atom.bytes} bytes"
        title = f"{described.threads} threads copy {tile.rows} x {tile.columns} {tile.dtype}{pieces}: thread.step"
        return _svg(title, list(_copy_cells(described)))
    if isinstance(described, (TiledMma, WarpgroupMma)):
        if part not in ("A", "B", "C"):
            raise ArgumentError(f"a {type(described).__name__} has no part {part!r}; accepted: 'A', 'B', 'C'")
        return _mma(described, part)
    if isinstance(described, Epilogue):
        tile = described.tile
        title = f"{described.threads} threads store {tile.rows} x {tile.columns} {tile.dtype}: thread.step, colour = warp that computed it"
        return _svg(title, list(_epilogue_cells(described)))
    if isinstance(described, Pipeline):
        title = f"{described.stages} buffers, step by step: the work item in each"
        return _svg(title, list(_ring_cells(described)))
    names = "Layout, ComposedLayout, SmemLayout, TiledCopy, TiledMma, WarpgroupMma, Epilogue, Pipeline"
    raise ArgumentError(f"a {type(described).__name__} cannot be drawn; accepted: {names}")


def _mma(mma: TiledMma | WarpgroupMma, part: Part) -> str:
    if isinstance(mma, TiledMma):
        title = f"{part} of {mma.warps[0]} x {mma.warps[1]} warps, {mma.atom.name}: thread.value"
        return _svg(title, list(_accumulator_cells(mma) if part == "C" else _operand_cells(mma, "AB".index(part))))
    title = f"{part} of {mma.warpgroups} warpgroup{'s' if mma.warpgroups > 1 else ''}, {mma.atom.name}"
    if part == "C":
        return _svg(f"{title}: thread.value of two columns per cell", list(_pair_cells(mma)))
    read = mma.A if part == "A" else mma.B
    if read is None:
        return _svg(f"{title}, a step of k: thread.value", list(_fragment_cells(mma)))
    return _svg(f"{title}: part.step of k, colour = banks", list(_descriptor_cells(read)))


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
    groups = BANKS * BANK_BYTES // VECTOR_BYTES
    for row in range(tile.rows):
        for column in range(tile.columns // vector):
            chunk = tile.offset(row, column * vector) // vector
            yield Cell(row, column, str(chunk), chunk % groups / groups)


def _copy_cells(copy: TiledCopy) -> Iterator[Cell]:
    for thread in range(copy.threads):
        for i, (row, _) in enumerate(copy.steps):
            yield Cell(copy.row(thread) + row, copy.column(thread) // copy.vector, f"{thread}.{i}", thread % WARP / WARP)


def _epilogue_cells(epilogue: Epilogue) -> Iterator[Cell]:
    vector = VECTOR_BYTES // epilogue.tile.dtype.bytes
    rows, columns = epilogue.pairs()
    computed = np.empty((epilogue.tile.rows, epilogue.tile.columns), int)
    computed[rows, columns] = computed[rows, columns + 1] = np.arange(epilogue.threads)[:, None, None, None] // WARP
    for cell in _copy_cells(epilogue.copy):
        warp = int(computed[cell.row, cell.column * vector])
        yield dataclasses.replace(cell, hue=warp / max(epilogue.threads // WARP, 1))


def _ring_cells(ring: Pipeline) -> Iterator[Cell]:
    for step in ring.steps(2 * ring.stages):
        # Of each buffer the newest item that has begun to be filled; nothing was in the one that is refilled first.
        for item in range(step.fetched - ring.stages + 1, step.fetched + 1):
            state = 3 if item == step.fetched else 2 if item > step.landed else 1 if item > step.item else 0
            text = f"{item} {('read', 'here', '...', '<-')[state]}"
            if item >= 0:
                yield Cell(step.item, item % ring.stages, text, state / 4)


def _accumulator_cells(mma: TiledMma) -> Iterator[Cell]:
    rows, columns = mma.coordinates()
    for (thread, i, j, value), row in np.ndenumerate(rows):
        yield Cell(int(row), int(columns[thread, i, j, value]), f"{thread}.{value}", thread // WARP / (mma.threads // WARP))


def _pair_cells(mma: WarpgroupMma) -> Iterator[Cell]:
    rows, columns = (x[..., ::2] for x in mma.coordinates())
    for (thread, i, j, pair), row in np.ndenumerate(rows):
        text = f"{thread}.{4 * j + 2 * pair}"
        yield Cell(int(row), int(columns[thread, i, j, pair]) // 2, text, thread // WARP / (mma.threads // WARP))


def _operand_cells(mma: TiledMma, side: int) -> Iterator[Cell]:
    layout, extent, depth = (mma.atom.a_layout, mma.atom.b_layout)[side], mma.atom.shape[side], mma.atom.shape[2]
    atoms, step = ((mma.m_atoms, mma.step_m), (mma.n_atoms, mma.step_n))[side]
    for w in range(mma.warps[side]):
        warp = w * (1, mma.warps[0])[side]
        for lane, value in np.ndindex(WARP, layout.mode(1).size):
            k, i = divmod(layout(lane, value), extent)
            for atom, k_step in np.ndindex(atoms, mma.k_steps):
                row = mma.warp_origin(warp)[side] + atom * step + i
                yield Cell(row, k_step * depth + k, f"{warp * WARP + lane}.{value}", w / mma.warps[side])


def _fragment_cells(mma: WarpgroupMma) -> Iterator[Cell]:
    layout = mma.atom.a_layout
    for thread, value, m in np.ndindex(mma.threads, layout.mode(1).size, mma.m_atoms):
        group, t = divmod(thread, WARPGROUP)
        k, row = divmod(layout(t, value), ROWS)
        yield Cell((group * mma.m_atoms + m) * ROWS + row, k, f"{thread}.{value}", thread // WARP / (mma.threads // WARP))


def _descriptor_cells(read: Descriptor) -> Iterator[Cell]:
    vector = VECTOR_BYTES // read.tile.dtype.bytes
    for cell in _tile_cells(read.tile):
        outer, k = (cell.column * vector, cell.row) if read.transposed else (cell.row, cell.column * vector)
        yield dataclasses.replace(cell, text=f"{outer // read.extent}.{k // DEPTH}")


def _svg(title: str, cells: list[Cell]) -> str:
    rows, columns = 1 + max(c.row for c in cells), 1 + max(c.column for c in cells)
    width, height = MARGIN + max(columns * WIDTH, math.ceil(len(title) * LETTER)), 2 * MARGIN + rows * HEIGHT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="ui-monospace, monospace" font-size="10" text-anchor="middle">',
        f"<title>{_escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{MARGIN}" y="14" text-anchor="start" font-size="11" fill="#333">{_escape(title)}</text>',
    ]
    lines += [f'<text x="{MARGIN + (c + 0.5) * WIDTH:g}" y="{2 * MARGIN - 5}" fill="#999">{c}</text>' for c in range(columns)]
    lines += [f'<text x="{MARGIN / 2:g}" y="{2 * MARGIN + (r + 0.7) * HEIGHT:g}" fill="#999">{r}</text>' for r in range(rows)]
    for cell in cells:
        x, y = MARGIN + cell.column * WIDTH, 2 * MARGIN + cell.row * HEIGHT
        lines.append(
            f'<rect class="cell" x="{x}" y="{y}" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="2" '
            f'fill="hsl({360 * cell.hue:.0f}, 62%, 83%)"/>'
            f'<text x="{x + WIDTH / 2:g}" y="{y + 0.7 * HEIGHT:g}" fill="#222">{_escape(cell.text)}</text>'
        )
    return "\n".join([*lines, "</svg>"])


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
