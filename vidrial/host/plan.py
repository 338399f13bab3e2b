"""An op on the CPU: the GPU kernels themselves, compiled by g++ and run thread by thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.errors import UnsupportedError
from vidrial.host.target import SCHEDULES, HostBinary, HostStats, Schedule, compile_host
from vidrial.host.tensor_map import pack
from vidrial.layout.mma import atoms_of
from vidrial.spec.op import Op, Stage
from vidrial.spec.source import TENSOR_MAP_BYTES, Tiles

# The newest architecture (80 for sm_80) whose instructions the host target has.
NEWEST_EMULATED = 90


class HostPlan:
    """The launches of an op on the CPU: the same sources, compiled by g++.

    Args:
        sanitizer: that of `compile_host`.
        guard: bytes between regions of shared memory, which nothing may touch; 0 leaves shared memory as it is on the GPU.

    Raises (when made):
        ConfigError: the config is not legal. UnsupportedError: it uses an instruction that the host target does not emulate.
        CompileError, ToolchainError: it does not compile.
    """

    def __init__(self, op: Op, problem: Any, config: Any, sanitizer: str | None = None, guard: int = 0) -> None:
        op.check_config(problem, config, Device.of("h200"))
        self.config = config
        self._buffers = op.workspace(problem, config)
        self._launches: list[tuple[HostBinary, Tiles, Stage, bytearray]] = []
        for stage in op.stages(problem, config):
            tiles = stage.kernel.resolve(stage.problem, stage.config).guarded(guard)
            _refuse_what_has_no_emulation(stage.kernel.name, tiles)
            source = stage.kernel.source(stage.problem, stage.config, guard)
            binary = compile_host(source.text, stage.kernel.name, sanitizer=sanitizer, include_dirs=source.include_dirs)
            packed = stage.kernel.pack(stage.problem, stage.config)
            for offset, (name, map) in stage.kernel.tensor_maps(stage.problem, stage.config).items():
                packed[offset : offset + TENSOR_MAP_BYTES] = pack(map, name)
            self._launches.append((binary, tiles, stage, packed))

    def run(self, arrays: Mapping[str, np.ndarray], schedule: Schedule = SCHEDULES[0]) -> dict[str, HostStats]:
        """Run all launches on NumPy arrays (bfloat16 as uint16 bits), outputs in place; what each kernel did, by its name."""
        every = dict(arrays)
        for name, buffer in self._buffers.items():
            every[name] = poison(buffer.shape, buffer.dtype)
        stats = {}
        for binary, tiles, stage, packed in self._launches:
            grid = stage.kernel.grid(stage.problem, stage.config)
            if 0 not in grid:
                pointers = {offset: every[name] for name, offset in stage.kernel.args.pointers.items() if name in every}
                maps = stage.kernel.tensor_maps(stage.problem, stage.config)
                pointers |= {offset: every[map.array] for offset, (_, map) in maps.items()}
                stats[stage.kernel.name] = binary.launch(grid, tiles.threads, tiles.smem or 0, packed, pointers, schedule)
        return stats


def _refuse_what_has_no_emulation(kernel: str, tiles: Tiles) -> None:
    for name, member in tiles.members.items():
        for atom in atoms_of(member):
            if atom.arch > NEWEST_EMULATED:
                raise UnsupportedError(
                    f"{kernel}: {name} is made of {atom.name}, which begins with sm_{atom.arch}; the host target emulates instructions "
                    f"up to sm_{NEWEST_EMULATED}: mma.sync, wgmma, ldmatrix, cp.async. Take a config without it, or run this one on a GPU"
                )


def poison(shape: tuple[int, ...], dtype: DType) -> np.ndarray:
    """A NumPy array of NaN (all bits set; bfloat16 as uint16): an element that nothing wrote shows."""
    bits: np.ndarray = np.full(shape, np.iinfo(f"uint{dtype.bits}").max, f"uint{dtype.bits}")
    return bits if dtype is DType.bfloat16 else bits.view(dtype.label)
