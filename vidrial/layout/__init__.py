"""CuTe's objects as values: layouts, instruction atoms, tiles in shared memory, copies and MMAs; each proves itself and prints as C++.

Public names are those of `__all__`.
"""

from __future__ import annotations

from vidrial.layout.algebra import ComposedLayout, Layout, Swizzle
from vidrial.layout.atoms import VECTOR, CopyAtom, MMA_16x8x8, MMA_16x8x16, MmaAtom, cp_async, ldmatrix, wgmma
from vidrial.layout.attention import AttentionTiles, attention_tiles
from vidrial.layout.barriers import Barrier, Barriers, Meeting, NamedBarriers, Roles, TmaRing
from vidrial.layout.copies import LoadMatrix, LoadVector, TiledCopy
from vidrial.layout.drawing import draw
from vidrial.layout.epilogue import Epilogue
from vidrial.layout.gradient import GradientTiles, gradient_tiles
from vidrial.layout.mma import Accumulator, TiledMma
from vidrial.layout.occupancy import Occupancy
from vidrial.layout.schedule import Scheduler, equal_groups
from vidrial.layout.smem import Pipeline, SharedMemory, SmemLayout, Transposed
from vidrial.layout.tma import TensorMap, TmaTile
from vidrial.layout.wgmma import WarpgroupMma

__all__ = [
    "Accumulator",
    "AttentionTiles",
    "Barrier",
    "Barriers",
    "ComposedLayout",
    "CopyAtom",
    "Epilogue",
    "GradientTiles",
    "Layout",
    "LoadMatrix",
    "LoadVector",
    "MMA_16x8x16",
    "MMA_16x8x8",
    "Meeting",
    "MmaAtom",
    "NamedBarriers",
    "Occupancy",
    "Pipeline",
    "Roles",
    "Scheduler",
    "SharedMemory",
    "SmemLayout",
    "Swizzle",
    "TensorMap",
    "TiledCopy",
    "TiledMma",
    "TmaRing",
    "TmaTile",
    "Transposed",
    "VECTOR",
    "WarpgroupMma",
    "attention_tiles",
    "cp_async",
    "draw",
    "equal_groups",
    "gradient_tiles",
    "ldmatrix",
    "wgmma",
]
