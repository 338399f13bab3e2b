"""What a sweep may be told, and who measures for it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidrial.device import Device, gpu_count
from vidrial.errors import ArgumentError, ArgumentTypeError, ToolchainError
from vidrial.progress import Progress
from vidrial.spec.fields import keyed_fields, least_values
from vidrial.spec.op import Op
from vidrial.spec.registry import reference_of, resolve
from vidrial.tune.search import STRATEGIES
from vidrial.tune.workers import CUDA_BENCH, Pool, Workers


@dataclass(frozen=True)
class Options:
    """How to sweep.

    Args:
        device: the GPU's facts; by default asked of the driver. On a Ray cluster, the kind of GPU that measures.
        gpus: how many GPUs measure, `all`, or their CUDA indices; by default one, and all of a Ray cluster.
        ray: address of a Ray cluster (`host:port`, `ray://host:port`, `auto`) whose CPUs compile and whose GPUs measure.
        trials: configs to try at most; 64 unless `seconds` or `exhaustive` is given.
        seconds: time to take, about.
        exhaustive: try every legal config.
        strategy: `rounds`, or `optuna` for a space too large to enumerate (`pip install vidrial-dsl[optuna]`).
        configs: try these alone.
        journal: file of the trials; by default one in the cache for this op, problem and device.
        resume: True to go on with the journal; or the journal to go on with. Else a journal that is there is set aside.
            What failed once by a crash, a time-out or a launch error gets a second chance.
        retry: go on with the journal, and try what failed so again however often it did.
        jobs: processes that compile; by default `Settings.jobs`.
        limit: seconds that one config may take to be checked and timed.
        seed: of the inputs, and of `optuna`.
        progress: True for a bar on stderr, None for one if that is a terminal; or what is told instead.
        bench: what checks and times, as `module:class`.
    """

    device: Device | None = None
    gpus: int | Sequence[int] | str | None = None
    ray: str | None = None
    trials: int | None = None
    seconds: float | None = None
    exhaustive: bool = False
    strategy: str = STRATEGIES[0]
    configs: Sequence[object] | None = None
    journal: Path | str | None = None
    resume: bool | Path | str | None = None
    retry: bool = False
    jobs: int | None = None
    limit: float = 30.0
    seed: int = 0
    progress: bool | Progress | None = None
    bench: str = CUDA_BENCH

    def __post_init__(self) -> None:
        if self.trials is not None and self.trials < 1:
            raise ArgumentError(f"trials={self.trials}; accepted: at least 1, or None")
        for name in ("seconds", "limit"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ArgumentError(f"{name}={value}; accepted: more than 0")
        if self.strategy not in STRATEGIES:
            raise ArgumentError(f"strategy={self.strategy!r} is not known; accepted: {', '.join(STRATEGIES)}")
        if self.exhaustive and self.strategy != STRATEGIES[0]:
            raise ArgumentError(f"strategy={self.strategy!r} samples the space, exhaustive=True tries all of it: give one of them")

    @classmethod
    def of(cls, options: Options | None, changes: dict[str, Any]) -> Options:
        """`options` with some fields changed.

        Raises:
            ArgumentTypeError: there is no such field. ArgumentError: a value is not accepted.
        """
        try:
            return dataclasses.replace(options or cls(), **changes)
        except TypeError as error:
            raise ArgumentTypeError(f"sweep: {error}; accepted: {', '.join(f.name for f in dataclasses.fields(cls))}") from None


@contextlib.contextmanager
def measuring(op: Op, options: Options) -> Iterator[tuple[Pool, Device]]:
    """The processes that measure for a sweep, here or on a Ray cluster, and the one kind of GPU that they have.

    Raises:
        ArgumentError: a GPU that does not exist, or GPUs that are unlike. SweepError: the Ray cluster does not answer.
    """
    reference = reference_of(op)
    resolve(options.bench)
    if options.ray is not None:
        from vidrial.tune.ray import RayWorkers

        gpus = None if options.gpus == "all" else options.gpus
        with RayWorkers(options.ray, reference, options.bench, options.limit, gpus, options.device) as cluster:
            yield cluster, cluster.device
        return
    indices = _indices(1 if options.gpus is None else options.gpus)
    device = options.device or _device(indices)
    with Workers(reference, options.bench, indices, None, options.limit) as workers:
        yield workers, device


def check_problem(op: Op, problem: Any) -> None:
    """Refuse what is no problem of the op's.

    Raises:
        ArgumentTypeError: it is of another type. ArgumentError: a size is less than its field says.
    """
    if not isinstance(problem, op.problem):
        raise ArgumentTypeError(f"{op.name} sweeps a {op.problem.__name__}, not {type(problem).__name__}; make one with op.example(...)")
    sizes = keyed_fields(problem)
    for name, least in least_values(problem).items():
        if sizes[name] < least:
            raise ArgumentError(f"{name}={sizes[name]}: a sweep needs at least {least}")


def _indices(gpus: int | Sequence[int] | str) -> tuple[int, ...]:
    if gpus == "all":
        gpus = max(1, gpu_count())
    indices: tuple[int, ...] = () if isinstance(gpus, str) else tuple(range(gpus)) if isinstance(gpus, int) else tuple(gpus)
    if not indices or min(indices) < 0 or len(set(indices)) < len(indices):
        raise ArgumentError(f"gpus={gpus!r}: accepted are a count from 1 up, 'all', or different CUDA indices")
    return indices


def _device(indices: Sequence[int]) -> Device:
    """The one kind of GPU that all indices are of."""
    there = gpu_count()
    if there and max(indices) >= there:
        which = f"CUDA indices 0 to {there - 1}" if there > 1 else "CUDA index 0 alone"
        raise ArgumentError(f"there is no GPU {max(indices)}: this process sees {which}; see nvidia-smi and CUDA_VISIBLE_DEVICES")
    try:
        devices = [Device.current(index) for index in indices]
    except ToolchainError as error:
        raise ArgumentError(str(error)) from None
    if len({device.key for device in devices}) > 1:
        kinds = ", ".join(f"{index} {device.name}" for index, device in zip(indices, devices, strict=True))
        raise ArgumentError(f"gpus={tuple(indices)} are unlike ({kinds}): their times do not compare; sweep each kind on its own")
    return devices[0]
