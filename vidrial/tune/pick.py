"""Which config a call takes: what was measured, what the calibrated model says, what the cost model predicts."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, cast

from vidrial.build import cubins as build
from vidrial.device import Device
from vidrial.errors import FrozenError
from vidrial.spec.choices import config_order, describe
from vidrial.spec.fields import C, P, fields, size_class, specialized
from vidrial.spec.op import Op, Stage
from vidrial.tune.model import CALIBRATED, REACH, Model, Point, distance, work
from vidrial.tune.ranking import (
    ProblemTimings,
    Ranking,
    forget,
    generation,
    local,
    log,
    measured_here,
    say_if_outdated,
    shipped,
    sizes,
    top_configs,
)
from vidrial.tune.shortlist import predicted

PICKS = 4096
# Times the size of a measured problem of its class: so far its order counts, until the model is calibrated.
BESIDE = 1.25
# What a measured config must save, by the model, over the cost model's own choice, at REACH from what was measured; nearer less, farther more.
MARGIN = 0.07
# While compiling is frozen: how far down the predicted order one that is compiled is looked for.
FROZEN_DEPTH = 128


class Choice(NamedTuple, Generic[C]):
    """A config, and where the choice comes from: `ranking`, `shipped`, `model` (calibrated) or `predicted` (nothing was measured)."""

    config: C
    origin: str


def choose_config(op: Op[P, C], problem: P, device: Device, fixed: tuple[tuple[str, object], ...] = ()) -> Choice[C]:
    """The config that a call takes, its choices of the names in `fixed` (name, value) kept; compiles nothing, and is remembered.

    In this order: what this machine measured at these sizes, what came with Vidrial for this very kind of GPU, the calibrated model over
    their leading configs and the cost model's own choice, the prediction. A ranking of another device or of other templates never counts.

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
        for pick in _choices(op, problem, device, fixed)
        if all(getattr(pick.config, name) == value for name, value in fixed) and op.reject(problem, pick.config, device) is None
    )
    first = next(choices, None) or Choice(op.predicted(problem, device, asked), "predicted")
    if not build.frozen() or _compiled(op, problem, first.config, device):
        return first
    others = (Choice(c.config, "predicted") for c in itertools.islice(op.ranked_for_calls(problem, device, asked), FROZEN_DEPTH))
    for choice in itertools.chain(choices, others):
        if _compiled(op, problem, choice.config, device):
            log.warning("%s: frozen, so %s in place of %s for %s", op.name, describe(choice.config), describe(first.config), problem)
            return choice
    raise FrozenError(
        f"{op.name}: no legal config for {problem} is compiled, and compiling is frozen; "
        "call it once or vidrial.prepare it before freeze(), or freeze(False)"
    )


def _choices(op: Op, problem: Any, device: Device, fixed: tuple[tuple[str, object], ...]) -> Iterator[Choice]:
    """Configs, the best choice first, legal or not: measured ones, and among them the cost model's own."""
    yield from (Choice(ranked.config, "ranking") for ranked in measured_here(op, problem, device))
    known = _known(op, tuple(fields(problem, "static").items()), device, generation())
    at = sizes(problem)
    for rankings, origin in ((known.mine, "ranking"), (known.theirs, "shipped")):
        measured = (m for ranking in rankings for m in ranking.measured if sizes(m.problem) == at)
        yield from (Choice(ranked.config, origin) for m in measured for ranked in m.configs)
    own = predicted(op, problem, device, fixed)
    ordered = list(_ordered(known, op, problem, device)) if known.problems else []
    beside = [c for c in ordered if c.config != own]
    if len(beside) < len(ordered):
        lead = next(c for c in ordered if c.config == own)
    else:
        lead = Choice(own, "predicted")
    if beside and _beats(known, op, problem, device, beside[0].config, own):
        yield from ordered
    yield lead
    yield from beside


def _ordered(known: _Known, op: Op, problem: Any, device: Device) -> Iterator[Choice]:
    """Measured configs that no rule forbids here: in the order of the problem beside this one, or by the calibrated model."""
    near, origin = known.nearest(problem)
    configs = [r.config for r in near.configs if not specialized(r.config)]
    possible = [
        c for c in dict.fromkeys([*configs, *known.candidates]) if c in known.model.points and op.estimate(problem, c, device) is not None
    ]
    if known.problems < CALIBRATED and size_class(near.problem) == size_class(problem) and _apart(near, problem) <= math.log(BESIDE):
        possible.sort(key=lambda c: configs.index(c) if c in configs else len(configs))
        yield from (Choice(c, origin) for c in possible)
        return
    ms = {c: known.model.ms(c, sizes(problem), work(op, problem, c, device)) for c in possible}
    yield from (Choice(c, "model") for c in sorted(possible, key=lambda c: (ms[c], config_order(c))))


def _beats(known: _Known, op: Op, problem: Any, device: Device, config: Any, own: Any) -> bool:
    """Whether a measured config is taken in place of the cost model's own choice: nobody shall lose by a sweep of other sizes."""
    x, near = work(op, problem, own, device), known.nearest(problem)[0]
    ms, far = known.model.ms(config, sizes(problem), work(op, problem, config, device)), _apart(near, problem) / math.log(REACH)
    if own in known.model.points:
        return ms <= known.model.ms(own, sizes(problem), x) * (1 - MARGIN * far)
    # Of configs that somebody named, the cost model's own not among them, the best one counts as far as they reach.
    return (far <= 1 and not known.searched(op, device, near)) or ms <= known.model.least_ms(x)


def _apart(near: ProblemTimings, problem: Any) -> float:
    return distance(sizes(near.problem), sizes(problem))


@dataclass(frozen=True)
class _Known:
    """What is known of an op for one set of static facts on one device."""

    mine: tuple[Ranking, ...]
    theirs: tuple[Ranking, ...]
    model: Model
    candidates: tuple[Any, ...]
    problems: int
    _searched: dict[Any, bool] = field(default_factory=dict)

    def nearest(self, problem: Any) -> tuple[ProblemTimings, str]:
        """The measured problem that is nearest in size, this machine's first, and whose it is."""
        every = [
            (m, origin) for rankings, origin in ((self.mine, "ranking"), (self.theirs, "shipped")) for r in rankings for m in r.measured
        ]
        return min(every, key=lambda entry: _apart(entry[0], problem))

    def searched(self, op: Op, device: Device, measured: ProblemTimings) -> bool:
        """Whether a search chose what was measured: it begins with what is predicted fastest, so that the cost model's own choice, or what is
        predicted faster, was measured."""
        at = sizes(measured.problem)
        if at not in self._searched:
            own, configs = predicted(op, measured.problem, device), {r.config for r in measured.configs}
            seconds = op.seconds(measured.problem, own, device)
            self._searched[at] = own in configs or any(op.seconds(measured.problem, c, device) < seconds for c in configs)
        return self._searched[at]


@functools.lru_cache(maxsize=256)
def _known(op: Op, static: tuple[tuple[str, Any], ...], device: Device, generation: int) -> _Known:
    mine, theirs = local(op, dict(static), device), shipped(op, device.key, static=dict(static))
    if not mine and not theirs:
        say_if_outdated(op, device)
    by_sizes = {sizes(m.problem): m for r in (*theirs, *mine) for m in r.measured}
    points: dict[Any, list[Point]] = {}
    for at, measured in by_sizes.items():
        # What breaks a rule at the size that it was measured at was not.
        for ranked in (r for r in measured.configs if op.estimate(measured.problem, r.config, device) is not None):
            x = work(op, measured.problem, ranked.config, device)
            points.setdefault(ranked.config, []).append(Point(at, x, ranked.timing.median_ms))
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
