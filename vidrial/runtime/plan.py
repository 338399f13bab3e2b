"""An op for one problem, config and target, ready to run: the warm path is one look-up, a few pointers written, and the launches."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import struct
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from vidrial.build.cubins import build
from vidrial.build.nvrtc import Cubin
from vidrial.device import Device
from vidrial.errors import FrozenError
from vidrial.layout.tma import TensorMap
from vidrial.runtime.arrays import capturing
from vidrial.runtime.launch import Binary, Launch
from vidrial.runtime.tensor_map import encode
from vidrial.spec.choices import describe
from vidrial.spec.op import Op, Stage
from vidrial.spec.source import TENSOR_MAP_BYTES, Source

POINTER = ctypes.sizeof(ctypes.c_size_t)
# Encoded maps of one argument: an allocator hands out the same few addresses again and again.
MAPS_KEPT = 64


class Workspace:
    """Where each of an op's workspace buffers lies in one allocation of `bytes`; `zeroed`: those to set to 0, and how many bytes they have."""

    def __init__(self, op: Op, problem: Any, config: Any) -> None:
        self.offsets: dict[str, int] = {}
        self.zeroed: dict[str, int] = {}
        self.bytes = 0
        for name, buffer in op.workspace(problem, config).items():
            self.offsets[name] = self.bytes
            if buffer.zeroed:
                self.zeroed[name] = buffer.bytes
            self.bytes += buffer.bytes


class CudaPlan:
    """The launches of an op on one GPU.

    Raises (when made):
        ConfigError: the config is not legal for the problem. CompileError, ToolchainError, LaunchError: it does not compile or load.
        FrozenError: it would have to be compiled while that is frozen, or loaded while the current stream is being captured.
    """

    def __init__(self, op: Op, problem: Any, config: Any, index: int) -> None:
        device = Device.current(index)
        op.check_config(problem, config, device)
        self.config, self.index = config, index
        # Makes the plan of a config with so many bytes of workspace at most; set by who chose this one.
        self.smaller: Callable[[int], CudaPlan] | None = None
        self.outputs = op.outputs(problem)
        self.workspace = Workspace(op, problem, config)
        self._lock = threading.Lock()
        self._launches: list[_Launch] = []
        stages = op.stages(problem, config)
        wanted = [(stage.kernel.source(stage.problem, stage.config), describe(stage.config)) for stage in stages]
        for i, stage in enumerate(stages):
            binary = _binary(_Wanted(*wanted[i], tuple(wanted[i + 1 :])), device.arch, index)
            with binary.on_device():
                self._launches.append(_Launch(binary, stage, self.workspace))

    @property
    def stages(self) -> int:
        """How many launches it is."""
        return len(self._launches)

    def on_device(self) -> contextlib.AbstractContextManager[object]:
        """The plan's GPU as the current one, until the end of the block."""
        return self._launches[0].binary.on_device()

    def run(self, pointers: Mapping[str, int], workspace: int, stream: int, stage: int | None = None) -> None:
        """Enqueue all launches, or the one of index `stage`, on `stream`.

        Args:
            pointers: addresses of the op's inputs and outputs by name.
            workspace: address of `self.workspace.bytes` bytes, aligned to 256.
        """
        with self.on_device():
            self.enqueue(pointers, workspace, stream, stage)

    def enqueue(self, pointers: Mapping[str, int], workspace: int, stream: int, stage: int | None = None) -> None:
        """`run` where the plan's GPU is the current one."""
        table = dict(pointers)
        for name, offset in self.workspace.offsets.items():
            table[name] = workspace + offset
        address = table.get
        # The structs are this plan's own: one thread at a time writes them, and the driver copies them at each launch.
        with self._lock:
            for launch in self._launches if stage is None else self._launches[stage : stage + 1]:
                for pack, offset, names in launch.slots:
                    pack(launch.packed, offset, *[address(name, 0) for name in names])
                for tensor in launch.maps:
                    tensor.write(launch.packed, address(tensor.map.array, 0))
                for name, size in launch.zeroed:
                    launch.binary.zero(table[name], size, stream)
                launch.run(stream)


class _Map:
    """A tensor map in a launch's struct, from byte `offset` on; encoded once per address, of which the last few are kept."""

    def __init__(self, offset: int, map: TensorMap) -> None:
        self.offset, self.map = offset, map
        self._encoded: dict[int, bytes] = {}

    def write(self, packed: bytearray, pointer: int) -> None:
        """Put the map of the array at `pointer` in its place."""
        encoded = self._encoded.get(pointer)
        if encoded is None:
            if len(self._encoded) >= MAPS_KEPT:
                self._encoded.clear()
            encoded = self._encoded[pointer] = encode(self.map, pointer)
        packed[self.offset : self.offset + TENSOR_MAP_BYTES] = encoded


class _Launch(Launch):
    """One stage. `slots`: what packs pointers that lie together into its struct, from which byte on, and their names; `maps`: its tensor maps;
    `zeroed`: names and bytes of its buffers that are 0 before it."""

    def __init__(self, binary: Binary, stage: Stage, workspace: Workspace) -> None:
        self.packed = stage.kernel.pack(stage.problem, stage.config)
        super().__init__(binary, stage.kernel.geometry(stage.problem, stage.config), self.packed)
        runs: list[tuple[int, list[str]]] = []
        for name, offset in stage.kernel.args.pointers.items():
            if runs and offset == runs[-1][0] + POINTER * len(runs[-1][1]):
                runs[-1][1].append(name)
            else:
                runs.append((offset, [name]))
        self.zeroed = tuple((name, size) for name, size in workspace.zeroed.items() if name in stage.kernel.args.pointers)
        self.maps = tuple(_Map(offset, map) for offset, (_, map) in stage.kernel.tensor_maps(stage.problem, stage.config).items())
        self.slots = tuple((struct.Struct(f"={len(names)}Q").pack_into, offset, tuple(names)) for offset, names in runs)


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """A source, its config in words, and those of the launches behind it, which compile beside it."""

    source: Source
    config: str
    beside: tuple[tuple[Source, str], ...] = dataclasses.field(compare=False)


@lru_cache(maxsize=1024)
def _binary(wanted: _Wanted, arch: str, index: int) -> Binary:
    source = wanted.source
    if capturing():
        raise FrozenError(
            f"kernel {source.entry} is not loaded, and the current stream is being captured into a CUDA graph: "
            "call once before the capture, or vidrial.prepare(op, problem)"
        )
    cubin: Cubin = build(source, arch, wanted.config, wanted.beside)
    return Binary.load(cubin, source.entry, index)
