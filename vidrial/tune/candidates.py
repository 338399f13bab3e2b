"""What a config needs before it can be measured: its binaries, and something legal at the small problem to be checked by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from vidrial.build.nvrtc import Cubin
from vidrial.device import Device
from vidrial.errors import CompileError, TemplateError
from vidrial.spec.choices import describe
from vidrial.spec.op import Op, Stage
from vidrial.spec.source import Source
from vidrial.tune.trial import KernelResources

# `build_many` with all but its sources given.
BuildMany = Callable[[Mapping[Hashable, tuple[Source, str]]], Iterator[tuple[Hashable, Cubin | CompileError]]]

# Why a source has no binary.
Failure: TypeAlias = CompileError | TemplateError


def check_configs(op: Op, small: Any, problem: Any, config: Any, device: Device) -> tuple[Any, ...]:
    """Configs that are legal at `small` and together run every source that `config` runs on `problem`; none if there are no such.

    A config that is legal there stands for itself. Else its parts are checked under other shared choices, together or one by one.
    Lengths that a config bakes in are left aside: at `small` it bakes in those of `small`.
    """
    wanted = {_binary(stage, lengths=False) for stage in op.stages(problem, config)}
    parts = {name: getattr(config, name) for name in op.parts}
    variants = [parts, *({name: value} for name, value in parts.items())]
    found: list[Any] = []
    candidates = (dataclasses.replace(shared, **kept) for kept in variants for shared in op.shared())
    for candidate in (config, *candidates):
        if op.reject(small, candidate, device) is None:
            covered = wanted & {_binary(stage, lengths=False) for stage in op.stages(small, candidate)}
            if covered:
                found.append(candidate)
                wanted -= covered
        if not wanted:
            return tuple(found)
    return ()


class Builds:
    """The binaries of one sweep's configs.

    Args:
        small: the problem that configs are checked at.
        build: compiles sources, in any order.
    """

    def __init__(self, op: Op, problem: Any, small: Any, device: Device, build: BuildMany) -> None:
        self._op, self._problem, self._small, self._device, self._build = op, problem, small, device, build
        self._known: dict[Hashable, KernelResources | Failure] = {}

    def check_configs(self, config: Any) -> tuple[Any, ...]:
        """What a config is checked by at the small problem."""
        return check_configs(self._op, self._small, self._problem, config, self._device)

    def resources(self, config: Any) -> tuple[KernelResources, ...]:
        """What a config's kernels take, as far as they have been compiled."""
        found = (self._known.get(_binary(stage)) for stage in self._op.stages(self._problem, config))
        return tuple(r for r in found if isinstance(r, KernelResources))

    def ready(self, configs: Sequence[Any]) -> Iterator[tuple[Any, Failure | None]]:
        """(config, None) for each config as soon as its binaries are there, or (config, why it does not compile)."""
        needs = {config: self._stages(config) for config in configs}
        sources: dict[Hashable, tuple[Source, str]] = {}
        smem: dict[Hashable, int] = {}
        for config, stages in needs.items():
            for key, stage in stages.items():
                if key in self._known or key in sources:
                    continue
                try:
                    sources[key] = stage.kernel.source(stage.problem, stage.config), describe(config)
                    smem[key] = stage.kernel.resolve(stage.problem, stage.config).smem_bytes
                except TemplateError as error:
                    self._known[key] = error
        waiting = dict(needs)
        yield from self._done(waiting)
        for key, built in self._build(sources):
            self._known[key] = _resources(sources[key][0].entry, built, smem[key]) if isinstance(built, Cubin) else built
            yield from self._done(waiting)

    def _done(self, waiting: dict[Any, dict[Hashable, Stage]]) -> Iterator[tuple[Any, Failure | None]]:
        """Those of `waiting` that wait for nothing any more; they are removed from it."""
        for config in [c for c, stages in waiting.items() if all(key in self._known for key in stages)]:
            own = [self._known[_binary(stage)] for stage in self._op.stages(self._problem, config)]
            del waiting[config]
            yield config, next((r for r in own if not isinstance(r, KernelResources)), None)

    def _stages(self, config: Any) -> dict[Hashable, Stage]:
        """The binaries of a config, and of what stands in for it when it is checked."""
        stages = [
            *self._op.stages(self._problem, config),
            *(s for p in self.check_configs(config) for s in self._op.stages(self._small, p)),
        ]
        return {_binary(stage): stage for stage in stages}


def _binary(stage: Stage, lengths: bool = True) -> Hashable:
    """What decides a stage's binary; a template that cannot be rendered is a failure of this very stage."""
    try:
        return stage.kernel.binary(stage.problem, stage.config, lengths)
    except TemplateError:
        return stage.kernel.name, stage.problem, stage.config


def _resources(kernel: str, cubin: Cubin, smem: int) -> KernelResources:
    r = cubin.resources
    return KernelResources(kernel, r.registers, r.spill_stores + r.spill_loads, smem + r.static_smem, cubin.notes)
