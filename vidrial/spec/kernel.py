"""One kernel: two dataclasses, a few small pure functions and one template.

softmax = Kernel(name="softmax", template=HERE / "softmax.cu.j2", problem=Problem, config=Config, args=ARGS, tiles=tiles, grid=grid, cost=cost)
softmax.space(problem, device)       # the legal configs, and why the others are not
softmax.source(problem, config)      # the rendered C++
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidrial.device import Device
from vidrial.errors import ArgumentError, ConfigError, LayoutError
from vidrial.layout.copies import LoadMatrix, TiledCopy
from vidrial.layout.counts import Counts
from vidrial.layout.mma import TiledMma
from vidrial.layout.occupancy import Occupancy
from vidrial.layout.tma import TensorMap
from vidrial.layout.wgmma import WarpgroupMma
from vidrial.spec.choices import check_choices, configs
from vidrial.spec.cost import Cost
from vidrial.spec.fields import StaticView, fields
from vidrial.spec.source import Arguments, Source, Tiles, closure_digest, render, vidrial_include
from vidrial.spec.space import Space

SMEM_RESERVED = 1024  # bytes of shared memory that the system takes of every CTA


def _no_rules(problem: Any, config: Any, device: Device) -> Iterable[tuple[bool, str]]:
    return ()


def _no_scalars(problem: Any, config: Any) -> Mapping[str, Any]:
    return {}


def _no_maps(problem: Any, config: Any, tiles: Tiles) -> Mapping[str, TensorMap]:
    return {}


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel's description.

    Args:
        name: of the `extern "C" __global__` function, and in the cache.
        template: the Jinja template that names `tiles`, `args`, `p` (static facts), `c` (config).
        problem, config: frozen dataclasses with `static`, `dynamic` and `choice` fields.
        args: the kernel's one parameter; scalars are found in the problem by name, or in `scalars(problem, config)`.
        tiles: (static facts, config) -> Tiles; may not read a dynamic field.
        grid: (problem, config) -> CTAs along x, y, z.
        rules: (problem, config, device) -> (holds, reason) pairs beyond what the tiles themselves demand.
        cost: (problem, config, device) -> Cost; without it configs keep their order of declaration.
        traffic: (problem, config, tiles) -> name of a tiled member -> what it does in one launch, built by `vidrial.layout.counts`; not needed
            by a kernel whose tiles have no copy, load or MMA.
        maps: (problem, config, tiles) -> argument of type TensorMap -> which of the op's arrays it is, with its true extents and strides.
    """

    name: str
    template: Path
    problem: type
    config: type
    args: Arguments
    tiles: Callable[[Any, Any], Tiles]
    grid: Callable[[Any, Any], tuple[int, int, int]]
    rules: Callable[[Any, Any, Device], Iterable[tuple[bool, str]]] = _no_rules
    cost: Callable[[Any, Any, Device], Cost] | None = None
    scalars: Callable[[Any, Any], Mapping[str, Any]] = _no_scalars
    traffic: Callable[[Any, Any, Tiles], Mapping[str, Counts]] | None = None
    maps: Callable[[Any, Any, Tiles], Mapping[str, TensorMap]] = _no_maps

    def resolve(self, problem: Any, config: Any) -> Tiles:
        """Everything that is known before the launch.

        Raises:
            LayoutError: the objects refuse this config.
        """
        return _resolve(self, problem if isinstance(problem, StaticView) else StaticView(problem, config), config)

    def source(self, problem: Any, config: Any, guard: int = 0) -> Source:
        """The rendered C++ of a config; depends on the static fields of `problem`, and those that the config bakes in, alone.

        `guard`: unused bytes between regions of shared memory.
        """
        view = problem if isinstance(problem, StaticView) else StaticView(problem, config)
        names = {"tiles": self.resolve(view, config).guarded(guard), "args": self.args, "p": view, "c": config}
        return render(self.template, self.name, names)

    def reject(self, problem: Any, config: Any, device: Device) -> str | None:
        """The reason of the first rule that the config breaks, or None: the one statement of legality."""
        broken = self.broken_rule(problem, config, device)
        if broken is not None:
            return broken
        try:
            tiles = self.resolve(problem, config)
        except (LayoutError, ConfigError) as error:
            return str(error)
        if tiles.threads % 32 or not 32 <= tiles.threads <= 1024:
            return f"{tiles.threads} threads per CTA: must be a multiple of 32, at most 1024"
        if tiles.smem_bytes > device.smem_per_block:
            return f"{tiles.smem_bytes} bytes of shared memory: a CTA has {device.smem_per_block} on {device.name}"
        if tiles.min_blocks * (tiles.smem_bytes + SMEM_RESERVED) > device.smem_per_sm:
            return f"{tiles.min_blocks} CTAs of {tiles.smem_bytes} bytes of shared memory: an SM has {device.smem_per_sm} on {device.name}"
        if tiles.min_blocks * tiles.threads > device.threads_per_sm:
            return f"{tiles.min_blocks} CTAs of {tiles.threads} threads: an SM holds {device.threads_per_sm} on {device.name}"
        return None

    def broken_rule(self, problem: Any, config: Any, device: Device) -> str | None:
        """The reason of the first of the kernel's own rules that the config breaks, or None. It may still be illegal: tiles cost
        milliseconds, and are not asked."""
        return next((reason for holds, reason in self.rules(problem, config, device) if not holds), None)

    def check(self, problem: Any, config: Any, device: Device) -> None:
        """Refuse an illegal config.

        Raises:
            ConfigError: with the rule's reason.
        """
        check_choices(config)
        reason = self.reject(problem, config, device)
        if reason is not None:
            raise ConfigError(f"{self.name}: {config} is not legal for {problem}: {reason}; see {self.name}.space(problem, device)")

    def seconds(self, problem: Any, config: Any, device: Device) -> float:
        """Predicted time of one launch, 0 without a cost model."""
        return self.cost(problem, config, device).seconds(device) if self.cost is not None else 0.0

    def space(self, problem: Any, device: Device | None = None) -> Space:
        """All configs for a problem: legal ones ranked by predicted time, rejected ones with their reason."""
        device = device or Device.default()
        return Space.of(configs(self.config), lambda c: self.reject(problem, c, device), lambda c: self.seconds(problem, c, device))

    def geometry(self, problem: Any, config: Any) -> Geometry:
        """Grid, threads and dynamic shared memory of the launch."""
        tiles = self.resolve(problem, config)
        return Geometry(self.grid(problem, config), tiles.threads, tiles.smem_bytes)

    def counts(self, problem: Any, config: Any) -> dict[str, Counts]:
        """What each tiled member does in one launch: the host target counts the same.

        Raises:
            ArgumentError: the tiles have copies, loads or MMAs, and no `traffic` says how often they are at work.
        """
        tiles = self.resolve(problem, config)
        tiled = [name for name, member in tiles.members.items() if isinstance(member, (LoadMatrix, TiledCopy, TiledMma, WarpgroupMma))]
        if self.traffic is None and tiled:
            raise ArgumentError(
                f"kernel {self.name}: nothing says how often {', '.join(tiled)} are at work; give the kernel a traffic function"
            )
        return dict(self.traffic(problem, config, tiles)) if self.traffic is not None else {}

    def pack(self, problem: Any, config: Any) -> bytearray:
        """The packed parameter struct, pointers null.

        Raises:
            ArgumentError: a scalar has no value.
        """
        return self.args.pack(fields(problem, "static") | fields(problem, "dynamic") | dict(self.scalars(problem, config)))

    def tensor_maps(self, problem: Any, config: Any) -> dict[int, tuple[str, TensorMap]]:
        """Offset in the parameter struct -> name and map of each argument of type TensorMap.

        Raises:
            ArgumentError: `maps` has others than the arguments. LayoutError: TMA cannot take such an array.
        """
        maps = self.maps(problem, config, self.resolve(problem, config))
        if set(maps) != set(self.args.maps):
            raise ArgumentError(
                f"kernel {self.name}: maps gives {', '.join(maps) or 'none'}; its arguments of type TensorMap are {', '.join(self.args.maps) or 'none'}"
            )
        return {offset: (name, maps[name]) for name, offset in self.args.maps.items()}

    def occupancy(self, problem: Any, config: Any, device: Device, registers: int) -> Occupancy:
        """CTAs an SM holds, and what limits them, for a register count (from the cubin, or an estimate)."""
        tiles = self.resolve(problem, config)
        return Occupancy.of(device, threads=tiles.threads, smem=tiles.smem_bytes, registers=registers)

    def digest(self) -> str:
        """sha256 of the template and its include closure: rankings of another text do not count."""
        return closure_digest(f'#include "{self.template.name}"', (self.template.parent, vidrial_include()))

    def __post_init__(self) -> None:
        if not self.template.is_file():
            raise ArgumentError(f"kernel {self.name}: template {self.template} does not exist")


@functools.lru_cache(maxsize=8192)
def _resolve(kernel: Kernel, view: StaticView, config: Any) -> Tiles:
    return kernel.tiles(view, config)


GRID_LIMITS = (2**31 - 1, 65535, 65535)
THREADS_LIMIT = 1024


@dataclasses.dataclass(frozen=True)
class Geometry:
    """CTAs along x, y, z; threads of a CTA; bytes of dynamic shared memory.

    Raises:
        ArgumentError: CUDA could not launch it on any GPU.
    """

    grid: tuple[int, int, int]
    block: int
    smem: int = 0

    def __post_init__(self) -> None:
        if len(self.grid) != 3 or any(not 0 <= n <= limit for n, limit in zip(self.grid, GRID_LIMITS, strict=True)):
            raise ArgumentError(
                f"grid {self.grid} is not three counts of CTAs from 0 to {GRID_LIMITS}; let a CTA do more, or split the launch"
            )
        if not 1 <= self.block <= THREADS_LIMIT:
            raise ArgumentError(f"block of {self.block} threads: accepted are 1 to {THREADS_LIMIT}")
        if self.smem < 0:
            raise ArgumentError(f"dynamic shared memory of {self.smem} bytes is negative")

    @property
    def empty(self) -> bool:
        """Whether there is nothing to launch (CUDA itself refuses an empty grid)."""
        return 0 in self.grid
