"""An op for one problem, config and target, ready to run: the warm path is one look-up, a few pointers written, and the launches."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from vidrial.build import build
from vidrial.compile import Cubin
from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.host import SCHEDULES, HostBinary, HostStats, Schedule, compile_host
from vidrial.launch import Binary, Geometry
from vidrial.op import Op, Stage
from vidrial.render import Source
from vidrial.space import describe

POINTER = np.dtype(np.uintp).itemsize


class Workspace:
    """Where each of an op's workspace buffers lies in one allocation of `bytes`."""

    def __init__(self, op: Op, problem: Any, config: Any) -> None:
        self.offsets: dict[str, int] = {}
        self.bytes = 0
        for name, buffer in op.workspace(problem, config).items():
            self.offsets[name] = self.bytes
            self.bytes += buffer.bytes


class CudaPlan:
    """The launches of an op on one GPU.

    Raises (when made):
        ConfigError: the config is not legal for the problem. CompileError, ToolchainError, LaunchError: it does not compile or load.
    """

    def __init__(self, op: Op, problem: Any, config: Any, index: int) -> None:
        device = Device.current(index)
        op.check_config(problem, config, device)
        self.config = config
        self.workspace = Workspace(op, problem, config)
        self._lock = threading.Lock()
        self._launches = []
        for stage in op.stages(problem, config):
            binary = _binary(stage.kernel.source(stage.problem, stage.config), device.arch, index, describe(stage.config))
            packed = stage.kernel.pack(stage.problem, stage.config)
            slots = [(offset, name) for name, offset in stage.kernel.args.pointers.items()]
            self._launches.append((binary, stage.kernel.geometry(stage.problem, stage.config), packed, slots))

    @property
    def stages(self) -> int:
        """How many launches it is."""
        return len(self._launches)

    def run(self, pointers: Mapping[str, int], workspace: int, stream: int, stage: int | None = None) -> None:
        """Enqueue all launches, or the one of index `stage`, on `stream`.

        Args:
            pointers: addresses of the op's inputs and outputs by name.
            workspace: address of `self.workspace.bytes` bytes, aligned to 256.
        """
        offsets = self.workspace.offsets
        with self._lock:
            for binary, geometry, packed, slots in self._launches if stage is None else self._launches[stage:stage + 1]:
                for offset, name in slots:
                    address = pointers.get(name, 0) or (workspace + offsets[name] if name in offsets else 0)
                    packed[offset:offset + POINTER] = address.to_bytes(POINTER, "little")
                binary.launch(geometry, packed, stream)


class HostPlan:
    """The launches of an op on the CPU: the same sources, compiled by g++.

    Raises (when made):
        ConfigError: the config is not legal. CompileError, ToolchainError: it does not compile.
    """

    def __init__(self, op: Op, problem: Any, config: Any, sanitizer: str | None = None) -> None:
        op.check_config(problem, config, Device.of("h200"))
        self.config = config
        self._buffers = op.workspace(problem, config)
        self._launches: list[tuple[HostBinary, Geometry, Stage, bytearray]] = []
        for stage in op.stages(problem, config):
            source = stage.kernel.source(stage.problem, stage.config)
            binary = compile_host(source.text, stage.kernel.name, sanitizer=sanitizer, include_dirs=source.include_dirs)
            self._launches.append((binary, stage.kernel.geometry(stage.problem, stage.config), stage, stage.kernel.pack(stage.problem, stage.config)))

    def run(self, arrays: Mapping[str, np.ndarray], schedule: Schedule = SCHEDULES[0]) -> dict[str, HostStats]:
        """Run all launches on NumPy arrays (bfloat16 as uint16 bits), outputs in place; what each kernel did, by its name."""
        every = dict(arrays)
        for name, buffer in self._buffers.items():
            every[name] = poison(buffer.shape, buffer.dtype)
        stats = {}
        for binary, geometry, stage, packed in self._launches:
            if not geometry.empty:
                pointers = {offset: every[name] for name, offset in stage.kernel.args.pointers.items() if name in every}
                stats[stage.kernel.name] = binary.launch(geometry.grid, geometry.block, geometry.smem, packed, pointers, schedule)
        return stats


def poison(shape: tuple[int, ...], dtype: DType) -> np.ndarray:
    """A NumPy array of NaN (all bits set; bfloat16 as uint16): an element that nothing wrote shows."""
    bits: np.ndarray = np.full(shape, np.iinfo(f"uint{dtype.bits}").max, f"uint{dtype.bits}")
    return bits if dtype is DType.bfloat16 else bits.view(dtype.label)


@lru_cache(maxsize=1024)
def _binary(source: Source, arch: str, index: int, config: str) -> Binary:
    cubin: Cubin = build(source, arch, config)
    return Binary.load(cubin, source.entry, index)
