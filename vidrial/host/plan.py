"""An op on the CPU: the GPU kernels themselves, compiled by g++ and run thread by thread."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from functools import lru_cache
from typing import Any, Generic, cast

import numpy as np
from numpy.typing import NDArray

from vidrial.device import DEFAULT_GPU, Device
from vidrial.dtypes import DType
from vidrial.errors import LaunchError, UnsupportedError
from vidrial.host.target import SCHEDULES, HostBinary, HostStats, Schedule, compile_host
from vidrial.host.tensor_map import pack
from vidrial.layout.access import tiled_objects
from vidrial.layout.barriers import Barriers
from vidrial.layout.mma import atoms_of
from vidrial.layout.schedule import Scheduler
from vidrial.spec.fields import C, P
from vidrial.spec.op import Buffer, Op, Stage
from vidrial.spec.source import TENSOR_MAP_BYTES, Tiles

# CTAs that share the tiles of a static or dynamic schedule, so that each works on several, as on a GPU.
RESIDENT_CTAS = 3
# The newest architecture (80 for sm_80) whose instructions the host target has.
NEWEST_EMULATED = 90


class HostPlan(Generic[P, C]):
    """The launches of an op on the CPU: the same sources, compiled by g++.

    Args:
        sanitizer: that of `compile_host`.
        guard: bytes between regions of shared memory, which nothing may touch; 0 leaves shared memory as it is on the GPU.

    Raises (when made):
        ConfigError: the config is not legal. UnsupportedError: it uses an instruction that the host target does not emulate.
        CompileError, ToolchainError: it does not compile.
    """

    def __init__(self, op: Op[P, C], problem: P, config: C, sanitizer: str | None = None, guard: int = 0) -> None:
        op.check_config(problem, config, Device.of(DEFAULT_GPU))
        self.config = config
        self._outputs, self._workspace = op.outputs(problem), op.workspace(problem, config)
        self._launches: list[tuple[HostBinary, Tiles, Stage, bytearray]] = []
        for stage in op.stages(problem, config):
            tiles = stage.kernel.resolve(stage.problem, stage.config).guarded(guard)
            _refuse_what_has_no_emulation(stage.kernel.name, tiles)
            source = stage.kernel.source(stage.problem, stage.config, guard)
            objects = tuple(tiled_objects(tiles.members))
            binary = compile_host(source.text, stage.kernel.name, objects=objects, sanitizer=sanitizer, include_dirs=source.include_dirs)
            packed = stage.kernel.pack(stage.problem, stage.config)
            for offset, (name, map) in stage.kernel.tensor_maps(stage.problem, stage.config).items():
                packed[offset : offset + TENSOR_MAP_BYTES] = pack(map, name)
            self._launches.append((binary, tiles, stage, packed))

    def run(self, arrays: Mapping[str, NDArray[Any]], schedule: Schedule = SCHEDULES[0]) -> dict[str, HostStats]:
        """Run all launches on NumPy arrays (bfloat16 as uint16 bits), outputs in place; what each kernel did, by its name."""
        every, stats = {**arrays, **_poisoned(self._workspace)}, {}
        for binary, tiles, stage, packed in self._launches:
            grid = _grid(stage.kernel.geometry(stage.problem, stage.config).grid, tiles)
            if 0 not in grid:
                for name in stage.kernel.args.pointers:
                    if name in self._workspace and self._workspace[name].zeroed:
                        every[name][...] = 0
                pointers = {offset: every[name] for name, offset in stage.kernel.args.pointers.items() if name in every}
                maps = stage.kernel.tensor_maps(stage.problem, stage.config)
                pointers |= {offset: every[map.array] for offset, (_, map) in maps.items()}
                try:
                    stats[stage.kernel.name] = binary.launch(grid, tiles.threads, tiles.smem or 0, packed, pointers, schedule)
                except LaunchError as error:
                    arguments = {offset: name for name, offset in stage.kernel.args.pointers.items()}
                    raise LaunchError(_named(str(error), arguments | {o: map.array for o, (_, map) in maps.items()}, every)) from error
        return stats

    def results(self, inputs: Mapping[str, NDArray[Any]], schedule: Schedule = SCHEDULES[0]) -> dict[str, NDArray[Any]]:
        """The outputs of a run on these inputs, by name; an element that nothing wrote is NaN."""
        outputs = self.outputs()
        self.run({**inputs, **outputs}, schedule)
        return outputs

    def outputs(self) -> dict[str, NDArray[Any]]:
        """New arrays for the op's outputs, all NaN."""
        return _poisoned(self._outputs)


def _grid(grid: tuple[int, int, int], tiles: Tiles) -> tuple[int, int, int]:
    """The launch's grid; where CTAs take tiles until there are none left, few of them."""
    barriers = (member for member in tiles.members.values() if isinstance(member, Barriers))
    schedules = [one for member in barriers for one in member.members.values() if isinstance(one, Scheduler)]
    return (min(grid[0], RESIDENT_CTAS), *grid[1:]) if any(schedule.kind != "one" for schedule in schedules) else grid


def _poisoned(buffers: Mapping[str, Buffer]) -> dict[str, NDArray[Any]]:
    return {name: poison(buffer.shape, buffer.dtype) for name, buffer in buffers.items()}


def _named(message: str, pointers: Mapping[int, str], arrays: Mapping[str, object]) -> str:
    """A launch's message with arrays by their names, and the pointers that are null."""
    message = re.sub(r"the array at offset (\d+) of the arguments", lambda found: f"array {pointers[int(found[1])]}", message)
    null = ", ".join(name for name in pointers.values() if name not in arrays)
    note = f"\n  null pointers, for which the op has no input, output or workspace of that name: {null}" if null else ""
    said, mark, report = message.partition("\nwhole ")
    return said + note + mark + report


def _refuse_what_has_no_emulation(kernel: str, tiles: Tiles) -> None:
    for name, member in tiles.members.items():
        for atom in atoms_of(member):
            if atom.arch > NEWEST_EMULATED:
                raise UnsupportedError(
                    f"{kernel}: {name} is made of {atom.name}, which begins with sm_{atom.arch}; the host target emulates instructions "
                    f"up to sm_{NEWEST_EMULATED}: mma.sync, wgmma, ldmatrix, cp.async. Take a config without it, or run this one on a GPU"
                )


def poison(shape: tuple[int, ...], dtype: DType) -> NDArray[Any]:
    """A NumPy array of NaN (all bits set; bfloat16 as uint16): an element that nothing wrote shows."""
    bits: NDArray[Any] = np.full(shape, np.iinfo(f"uint{dtype.bits}").max, f"uint{dtype.bits}")
    return bits if dtype is DType.bfloat16 else bits.view(dtype.label)


def predicted_plan(op: Op[P, C], problem: P, fixed: tuple[tuple[str, object], ...] = ()) -> HostPlan[P, C]:
    """The plan of the config that the cost model predicts fastest on the H200, with `fixed` (name, value) choices of the op's own; the last
    few are remembered."""
    return _predicted_plan(op, cast(Hashable, problem), fixed)


@lru_cache(maxsize=64)
def _predicted_plan(op: Op, problem: Any, fixed: tuple[tuple[str, object], ...]) -> HostPlan:
    return HostPlan(op, problem, op.predicted(problem, Device.of(DEFAULT_GPU), dict(fixed)))
