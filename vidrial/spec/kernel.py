"""One kernel: two dataclasses, a few small pure functions and one template.

softmax = Kernel(name="softmax", template=HERE / "softmax.cu.j2", problem=Problem, config=Config, args=ARGS, tiles=tiles, grid=grid, cost=cost)
softmax.source(problem, config)      # the rendered C++
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, cast

from vidrial.device import CTA_THREADS, RESERVED_SMEM, WARP, Device
from vidrial.errors import ArgumentError, ConfigError, DescriptionError, LayoutError, TemplateError
from vidrial.layout.barriers import never_completed
from vidrial.layout.occupancy import Occupancy
from vidrial.layout.tma import TensorMap
from vidrial.spec.authored import grid_fault, guarded, guarded_rules, mapping_fault, of_type
from vidrial.spec.choices import check_choices, check_config_fields
from vidrial.spec.cost import Cost
from vidrial.spec.digest import closure_digest, code_digest, state_of, tiles_asked_for
from vidrial.spec.fields import REMEMBERED, ByReads, C, P, Static, check_record, fields
from vidrial.spec.geometry import Geometry
from vidrial.spec.source import Arguments, Source, Tiles, include_folders, render

# Members of `struct Tiles` that are no fact of a problem or config.
RESERVED = frozenset({"threads", "min_blocks", "Smem"})


def _no_rules(problem: object, config: object, device: Device) -> Iterable[tuple[bool, str]]:
    return ()


def _no_scalars(problem: object, config: object) -> Mapping[str, object]:
    return {}


def _no_maps(problem: object, config: object, tiles: Tiles) -> Mapping[str, TensorMap]:
    return {}


@dataclass(frozen=True, eq=False)
class Kernel(Generic[P, C]):
    """A kernel's description, of its author's own problem P and config C.

    Args:
        name: of the `extern "C" __global__` function, and in the cache.
        template: the Jinja template that names `tiles`, `args`, `p` (static facts), `c` (config).
        problem: a frozen dataclass of `static` and `dynamic` fields.
        config: a frozen dataclass of `choice` fields.
        args: the kernel's one parameter; scalars are fields or properties of the problem by name, or in `scalars(problem, config)`.
        tiles: (static facts, config) -> Tiles; may not read a dynamic field.
        grid: (problem, config) -> CTAs along x, y, z.
        rules: (problem, config, device) -> (holds, reason) pairs beyond what the tiles themselves demand.
        cost: (problem, config, device) -> Cost; without it configs keep their order of declaration.
        maps: (problem, config, tiles) -> argument of type TensorMap -> which of the op's arrays it is, with its true extents and strides.
    """

    name: str
    template: Path
    problem: type[P]
    config: type[C]
    args: Arguments
    tiles: Callable[[P, C], Tiles]
    grid: Callable[[P, C], tuple[int, int, int]]
    rules: Callable[[P, C, Device], Iterable[tuple[bool, str]]] = _no_rules
    cost: Callable[[P, C, Device], Cost] | None = None
    scalars: Callable[[P, C], Mapping[str, object]] = _no_scalars
    maps: Callable[[P, C, Tiles], Mapping[str, TensorMap]] = _no_maps
    _tiles: ByReads[Tiles] = field(init=False, repr=False)
    _reads: ByReads[str] = field(init=False, repr=False)

    def resolve(self, problem: P, config: C) -> Tiles:
        """Everything that is known before the launch; one object for all problems and configs that agree in what `tiles` reads.

        Raises:
            LayoutError: the objects refuse this config.
        """
        return self._tiles(Static(problem, config))

    def source(self, problem: P, config: C, guard: int = 0) -> Source:
        """The rendered C++ of a config; depends alone on what `tiles` and the template read: static fields, those that the config bakes
        in, and choices.

        `guard`: unused bytes between regions of shared memory.
        """
        return self._render(Static(problem, config), guard)

    def binary(self, problem: P, config: C, lengths: bool = True) -> Hashable:
        """What decides the binary: all that `source` reads, with its values; with `lengths` False, but for dynamic fields baked in."""
        static = Static(problem, config)
        self._reads(static, (state_of(self.template.stat()), self._asked_for()))
        left_out = set() if lengths else {("problem", name) for name in fields(problem, "dynamic")}
        return self.name, tuple((read, value) for read, value in static.reads.items() if read not in left_out)

    def _asked_for(self) -> frozenset[str]:
        return tiles_asked_for(self.template, include_folders(self.template)) - RESERVED

    def _render(self, static: Static, guard: int = 0) -> Source:
        tiles = self._tiles(static)
        tiles = tiles.with_facts(self._facts(static, self._asked_for() - tiles.members.keys()))
        names = {"tiles": tiles.guarded(guard), "args": self.args, "p": static.problem, "c": static.config}
        return render(self.template, self.name, names)

    def _facts(self, static: Static, names: Iterable[str]) -> dict[str, Any]:
        """The static facts and choices of such names; what neither record has is the compiler's to refuse."""
        facts = {}
        for name in sorted(names):
            of_problem, of_config = _has(self.problem, name), _has(self.config, name)
            if of_problem and of_config:
                raise TemplateError(
                    f"{self.template.name}: Tiles::{name} is a field of {self.problem.__qualname__} and of {self.config.__qualname__}; "
                    "rename one, or give it in tiles()"
                )
            if of_problem or of_config:
                facts[name] = getattr(static.problem if of_problem else static.config, name)
        return facts

    def reject(self, problem: P, config: C, device: Device) -> str | None:
        """The reason of the first rule that the config breaks, or None: the one statement of legality."""
        broken = self.broken_rule(problem, config, device)
        if broken is not None:
            return broken
        try:
            tiles = self.resolve(problem, config)
        except (LayoutError, ConfigError) as error:
            return str(error)
        return _refusal(tiles, device)

    def broken_rule(self, problem: P, config: C, device: Device) -> str | None:
        """The reason of the first of the kernel's own rules that the config breaks, or None. It may still be illegal: tiles cost
        milliseconds, and are not asked."""
        for holds, reason in self.rules(problem, config, device):
            if not holds:
                return reason
        return None

    def check(self, problem: P, config: C, device: Device) -> None:
        """Refuse an illegal config.

        Raises:
            ConfigError: with the rule's reason.
        """
        check_choices(config)
        reason = self.reject(problem, config, device)
        if reason is not None:
            raise ConfigError(f"{self.name}: {config} is not legal for {problem}: {reason}")

    def seconds(self, problem: P, config: C, device: Device) -> float:
        """Predicted time of one launch, 0 without a cost model."""
        return self.cost(problem, config, device).seconds(device) if self.cost is not None else 0.0

    def geometry(self, problem: P, config: C) -> Geometry:
        """Grid, threads and dynamic shared memory of the launch."""
        tiles = self.resolve(problem, config)
        return Geometry(self.grid(problem, config), tiles.threads, tiles.smem_bytes)

    def pack(self, problem: P, config: C) -> bytearray:
        """The packed parameter struct, pointers null.

        Raises:
            ArgumentError: a scalar has no value.
        """
        given = self.scalars(problem, config)
        found = {name: getattr(problem, name) for name in self.args.scalars if name not in given and hasattr(problem, name)}
        return self.args.pack(found | dict(given))

    def tensor_maps(self, problem: P, config: C) -> dict[int, tuple[str, TensorMap]]:
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

    def occupancy(self, problem: P, config: C, device: Device, registers: int) -> Occupancy:
        """CTAs an SM holds, and what limits them, for a register count (from the cubin, or an estimate)."""
        tiles = self.resolve(problem, config)
        return Occupancy.of(device, threads=tiles.threads, smem=tiles.smem_bytes, registers=registers)

    def digest(self) -> str:
        """sha256 of the code of the template and its include closure: rankings of other code do not count.

        Raises:
            TemplateError: an include that cannot be followed, with file and line.
        """
        return code_digest(self.template, include_folders(self.template))

    def text_digest(self) -> str:
        """sha256 of the template and its include closure as they are, comments and all."""
        return closure_digest(f'#include "{self.template.name}"', include_folders(self.template))

    def __post_init__(self) -> None:
        owner = f"kernel {self.name}"
        if not isinstance(self.name, str) or not (self.name.isidentifier() and self.name.isascii()):
            raise ArgumentError(f"kernel {self.name!r}: the name is that of a C++ function; accepted: letters, digits and underscores")
        if not isinstance(self.template, Path) or not self.template.is_file():
            raise ArgumentError(
                f"{owner}: template {self.template} does not exist; give a Path, Path(__file__).with_name('{self.name}.cu.j2')"
            )
        if not isinstance(self.args, Arguments):
            raise DescriptionError(f'{owner}: args is {self.args!r}; give Arguments(x="float const*", n="int")')
        check_record(f"{owner}: problem", self.problem)
        check_record(f"{owner}: config", self.config)
        check_config_fields(owner, self.config)
        faults = {
            "tiles": of_type(Tiles, call="Tiles(threads=...)"),
            "grid": grid_fault,
            "scalars": of_type(Mapping, call="a dictionary of name -> number"),
            "maps": mapping_fault("TensorMap", TensorMap),
        } | ({"cost": of_type(Cost, call="Cost(flops=..., bytes=..., ctas=...)")} if self.cost is not None else {})
        for name, fault in faults.items():
            object.__setattr__(self, name, guarded(getattr(self, name), owner, name, fault))
        object.__setattr__(self, "rules", guarded_rules(self.rules, owner, "rules"))
        object.__setattr__(self, "_tiles", ByReads(lambda static: self.tiles(cast(P, static.problem), cast(C, static.config))))
        # The text itself, kilobytes of it, is not kept.
        object.__setattr__(self, "_reads", ByReads(lambda static: self._render(static).entry))


def _has(record: type, name: str) -> bool:
    return name in {f.name for f in dataclasses.fields(record)} or isinstance(getattr(record, name, None), property)


@functools.lru_cache(maxsize=REMEMBERED)
def _refusal(tiles: Tiles, device: Device) -> str | None:
    """Why a device cannot launch a CTA of these tiles, or None."""
    for name, member in tiles.members.items():
        if (arch := getattr(type(member), "ARCH", device.arch)) != device.arch:
            return f"{name} is a {type(member).__name__}, which {arch} alone has; {device.name} is {device.arch}"
    if tiles.threads % WARP or not WARP <= tiles.threads <= CTA_THREADS:
        return f"{tiles.threads} threads per CTA: must be a multiple of {WARP}, at most {CTA_THREADS}"
    for name, member in tiles.members.items():
        if (reason := never_completed(name, member, tiles.threads)) is not None:
            return reason
    if tiles.smem_bytes > device.smem_per_block:
        return f"{tiles.smem_bytes} bytes of shared memory: a CTA has {device.smem_per_block} on {device.name}"
    if tiles.min_blocks * (tiles.smem_bytes + RESERVED_SMEM) > device.smem_per_sm:
        return f"{tiles.min_blocks} CTAs of {tiles.smem_bytes} bytes of shared memory: an SM has {device.smem_per_sm} on {device.name}"
    if tiles.min_blocks * tiles.threads > device.threads_per_sm:
        return f"{tiles.min_blocks} CTAs of {tiles.threads} threads: an SM holds {device.threads_per_sm} on {device.name}"
    return None
