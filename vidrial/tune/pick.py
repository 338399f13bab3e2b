"""Which config a call takes: what was measured, what the calibrated model says, what the cost model predicts."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, cast

from vidrial.build import cubins as build
from vidrial.device import Device
from vidrial.errors import FrozenError
from vidrial.spec.choices import config_order, describe
from vidrial.spec.fields import C, P, fields, size_class, specialized
from vidrial.spec.op import Op, Stage
from vidrial.tune.model import Model, work
from vidrial.tune.ranking import Ranking, forget, generation, local, log, measured_here, say_if_outdated, shipped, sizes, top_configs

# From so many measured problems on, the model decides between them; with fewer, the nearest one's order does.
CALIBRATED = 3
PICKS = 4096
# While compiling is frozen: how far down the predicted order one that is compiled is looked for.
FROZEN_DEPTH = 128


class Choice(NamedTuple, Generic[C]):
    """A config, and where the choice comes from: `ranking`, `shipped`, `model` (calibrated) or `predicted` (nothing was measured)."""

    config: C
    origin: str


def choose_config(op: Op[P, C], problem: P, device: Device, fixed: tuple[tuple[str, object], ...] = ()) -> Choice[C]:
    """The config that a call takes, its choices of the names in `fixed` (name, value) kept; compiles nothing, and is remembered.

    In this order: what this machine measured, what came with Vidrial for this very kind of GPU, the calibrated model over their
    leading configs, the prediction. A ranking of another device or of other templates never counts.

    Raises:
        ConfigError: no config is legal. FrozenError: compiling is frozen and no legal config is compiled.
    """
    return _pick(op, cast(Hashable, problem), device, fixed, generation())


def freeze(on: bool = True) -> None:
    """From now on (`on=False`: no longer) calls compile nothing: they take a config that is compiled already, and the log says
    where that is not the first choice. Calls made before are decided again, too."""
    build.freeze(on)
    forget()


@functools.lru_cache(maxsize=PICKS)
def _pick(op: Op, problem: Any, device: Device, fixed: tuple[tuple[str, object], ...], generation: int) -> Choice:
    asked = dict(fixed)
    choices = (
        pick
        for pick in _choices(op, problem, device)
        if all(getattr(pick.config, name) == value for name, value in fixed) and op.reject(problem, pick.config, device) is None
    )
    first = next(choices, None) or Choice(op.predicted(problem, device, asked), "predicted")
    if not build.frozen() or _compiled(op, problem, first.config, device):
        return first
    predicted = (Choice(c.config, "predicted") for c in itertools.islice(op.ranked(problem, device, asked), FROZEN_DEPTH))
    for choice in itertools.chain(choices, predicted):
        if _compiled(op, problem, choice.config, device):
            log.warning("%s: frozen, so %s in place of %s for %s", op.name, describe(choice.config), describe(first.config), problem)
            return choice
    raise FrozenError(
        f"{op.name}: no legal config for {problem} is compiled, and compiling is frozen; "
        "call it once or vidrial.prepare it before freeze(), or freeze(False)"
    )


def _choices(op: Op, problem: Any, device: Device) -> Iterator[Choice]:
    """Measured configs, the best choice first, legal or not."""
    yield from (Choice(ranked.config, "ranking") for ranked in measured_here(op, problem, device))
    known = _known(op, tuple(fields(problem, "static").items()), device, generation())
    yield from (Choice(config, origin) for config, origin in _ordered(known, op, problem, device))


@dataclass(frozen=True)
class _Known:
    """What is known of an op for one set of static facts on one device."""

    mine: tuple[Ranking, ...]
    theirs: tuple[Ranking, ...]
    model: Model
    candidates: tuple[Any, ...]
    problems: int


def _ordered(known: _Known, op: Op, problem: Any, device: Device) -> Iterator[tuple[Any, str]]:
    this = size_class(problem)
    for rankings, origin in ((known.mine, "ranking"), (known.theirs, "shipped")):
        for measured in (r.nearest(problem) for r in rankings if size_class(r.measured[0].problem) == this):
            same = sizes(measured.problem) == sizes(problem)
            if same or known.problems < CALIBRATED:
                yield from ((r.config, origin) for r in measured.configs if same or not specialized(r.config))
    possible = [c for c in known.candidates if op.estimate(problem, c, device) is not None]
    predicted = {c: known.model.ms(c, work(op, problem, c, device)) for c in possible}
    yield from ((c, "model") for c in sorted(possible, key=lambda c: (predicted[c], config_order(c))))


@functools.lru_cache(maxsize=256)
def _known(op: Op, static: tuple[tuple[str, Any], ...], device: Device, generation: int) -> _Known:
    mine, theirs = local(op, dict(static), device), shipped(op, device.key, static=dict(static))
    if not mine and not theirs:
        say_if_outdated(op, device)
    by_sizes = {sizes(m.problem): m for r in (*theirs, *mine) for m in r.measured}
    points: dict[Any, list[tuple[Sequence[float], float]]] = {}
    for measured in by_sizes.values():
        # What breaks a rule at the size that it was measured at was not.
        for ranked in (r for r in measured.configs if op.estimate(measured.problem, r.config, device) is not None):
            points.setdefault(ranked.config, []).append((work(op, measured.problem, ranked.config, device), ranked.timing.median_ms))
    return _Known(tuple(mine), tuple(theirs), Model.fit(points), top_configs(by_sizes.values()), len(by_sizes))


def _compiled(op: Op, problem: Any, config: Any, device: Device) -> bool:
    return all(_built(_Binary(s.binary, s), device.arch, generation()) for s in op.stages(problem, config))


@dataclass(frozen=True)
class _Binary:
    """A stage that stands for all of one binary."""

    key: Hashable
    stage: Stage = field(compare=False)


@functools.lru_cache(maxsize=PICKS)
def _built(binary: _Binary, arch: str, generation: int) -> bool:
    stage = binary.stage
    return build.look_up(stage.kernel.source(stage.problem, stage.config), arch)[1] is not None
