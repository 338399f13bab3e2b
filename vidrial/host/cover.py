"""What `check` runs: problems of aligned and of odd sizes, and configs that together make every choice."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeAlias

from vidrial.device import DEFAULT_GPU, Device
from vidrial.errors import ArgumentError, ConfigError
from vidrial.spec.chosen import taken
from vidrial.spec.fields import KEYED, KIND, C, P
from vidrial.spec.op import Op
from vidrial.spec.registry import make_problem

# Lengths that no keyword gives: one element; one past a power of two and past its double, which no tile divides and by which a state is
# carried over two chunks of 128; one that is aligned and no power of two; and one that `small` cuts to what enters every loop again.
ONE, ODD, ALIGNED, LONG = 1, (129, 257), 264, 1_000_003
# Where `small` leaves it as it is.
UNCUT = 4099
# Each with what is added to sizes that have a default.
FIRST = ((ONE, 1), (ODD[0], 1), (ODD[1], 0), (ALIGNED, 0), (LONG, 1))
# Aligned to 2 and to 4 elements, and so much beyond an aligned size: taken for choices that no other size allows.
SPARE, BEYOND = (130, 132), (1, 2, 4)
# Of several lengths each next one is so much more, times its alignment: equal extents hide a wrong stride.
APART = 2
# A kernel that no config has launched yet counts for as much as so many values of choices.
KERNEL_WEIGHT = 16

Feature: TypeAlias = "tuple[str, Any] | frozenset[tuple[str, Any]]"


@dataclass(frozen=True)
class Case(Generic[P]):
    """A problem that is asked, and what is run of it. `spare`: only for choices that no other case allows."""

    asked: P
    run: P
    spare: bool = False


def cases(op: Op[P, C], keywords: Mapping[str, Any] | None = None, device: Device | None = None) -> list[Case[P]]:
    """Problems of the op's `example` that are quick to check, aligned and odd in every size that the keywords leave open.

    Lengths without a default are 1, 129, 257, 264 and one that `small` cuts; sizes with one take it and its odd neighbour. Flags are at
    their defaults; then those that are off are on, all together, or one by one where they exclude each other, and then those that are on
    are off. What no config serves is left out, unless nothing else is left.

    Raises:
        ArgumentError: `example` requires a keyword that is no length, or refuses the ones given. ConfigError: the op serves no such problem.
    """
    device, given = device or Device.of(DEFAULT_GPU), dict(keywords or {})
    unnamed = [p for p in inspect.signature(op.example, eval_str=True).parameters.values() if p.name not in given]
    open_ = [p for p in unnamed if p.annotation is int]
    flags = [{p.name: not value for p in unnamed if p.annotation is bool and p.default is value} for value in (False, True)]
    sizes = {f.name for f in dataclasses.fields(op.problem) if f.metadata.get(KIND) == "dynamic" and f.metadata.get(KEYED, True)}
    lengths = [p.name for p in open_ if p.default is p.empty]
    defaults = {p.name: p.default for p in open_ if p.name in sizes and p.default is not p.empty}
    first = FIRST if lengths else ((0, 0), (0, 1))
    tried: list[tuple[int, dict[str, int], dict[str, bool], bool]]
    tried = [(length, dict.fromkeys(defaults, beyond), {}, False) for length, beyond in first]
    tried += [(ODD[1], {}, turned, False) for turned in flags if turned]
    tried += [(n, dict.fromkeys(defaults, n & -n), {}, True) for n in SPARE]
    # One size alone that is not aligned.
    alone = [name for name in (*lengths, *defaults) if len(lengths) + len(defaults) > 1]
    tried += [(ALIGNED, {name: beyond}, {}, True) for name in alone for beyond in BEYOND]
    found: dict[P, Case[P]] = {}
    refused: list[ArgumentError | ConfigError] = []
    for length, beyond, turned, spare in tried:
        others = {name: default + beyond.get(name, 0) for name, default in defaults.items()}
        try:
            case = _case(op, given | others | turned, {name: beyond.get(name, 0) for name in lengths}, length, device)
        except (ArgumentError, ConfigError) as error:
            refused.append(error)
            # They come last.
            tried += [(length, beyond, {name: value}, spare) for name, value in turned.items() if len(turned) > 1]
        else:
            found.setdefault(case.run, replace(case, spare=spare))
    if not found and lengths and len(set(map(type, refused))) == 1 and isinstance(refused[0], ConfigError):
        wanted = " ".join(f"--{name} ..." for name in lengths)
        raise ConfigError(
            f"no {', '.join(f'--{n}' for n in lengths)} was given, and no length that was tried is served; give {wanted}: {refused[0]}"
        )
    if not found:
        raise refused[0]
    return list(found.values())


def _case(op: Op[P, C], given: Mapping[str, Any], lengths: Mapping[str, int], length: int, device: Device) -> Case[P]:
    """A problem whose `lengths` are all about `length`, each by so much beyond it."""

    def made(at: int) -> P:
        step = APART * (at & -at) if at > 1 else 0
        problem = make_problem(op, {**given, **{name: at + i * step + beyond for i, (name, beyond) in enumerate(lengths.items())}})
        # What is cut to a small one may be another problem.
        op.check_problem(problem, device)
        return problem

    if length != LONG:
        asked = made(length)
        return Case(asked, op.small(asked))
    try:
        asked = made(LONG)
        run = op.small(asked)
        cut = all(getattr(run, name, 0) < LONG for name in lengths)
    except ConfigError:
        cut = False
    if not cut:
        asked = made(UNCUT)
        run = op.small(asked)
    return Case(asked, run)


def small_problems(op: Op[P, C], keywords: Mapping[str, Any] | None = None) -> list[P]:
    """The problems that `check` runs where none are given: those of `cases`.

    Raises:
        ArgumentError: `example` requires a keyword that is no length. ConfigError: the op serves no such problem.
    """
    return [case.run for case in cases(op, keywords) if not case.spare]


def features(op: Op, problem: Any, config: Any, pairs: bool = False) -> set[Feature]:
    """The kernels that a config launches and the choices that it makes for them; with `pairs`, each two choices that a launch takes."""
    made = taken(op, problem, config)
    found: set[Feature] = {("", s.kernel.name) for s in op.stages(problem, config)}
    found.update(made.items())
    if pairs:
        parts = {name.partition(".")[0] if "." in name else "" for name in made}
        for part in parts:
            together = [item for item in made.items() if (item[0].partition(".")[0] if "." in item[0] else "") in ("", part)]
            found |= {frozenset(pair) for pair in itertools.combinations(together, 2)}
    return found


def covering(
    op: Op[P, C], problems: Sequence[P], seen: set[Feature], device: Device | None = None, pairs: bool = False
) -> Iterator[tuple[P, C]]:
    """Legal configs, at these problems in turn, each with the most that is not `seen` yet, which grows; until nothing new is left."""
    pools = {problem: _Pool(op, problem, device or Device.of(DEFAULT_GPU), pairs) for problem in problems}
    while pools:
        for problem, pool in list(pools.items()):
            config = pool.best(seen)
            if config is None:
                del pools[problem]
            else:
                seen |= features(op, problem, config, pairs)
                yield problem, config


def diverse_configs(op: Op[P, C], problem: P, count: int) -> list[C]:
    """The config predicted best, then, `count` in all, legal ones that launch other kernels and make other choices, the most at once first.

    Raises:
        ConfigError: no config is legal.
    """
    first = op.predicted(problem, Device.of(DEFAULT_GPU))
    others = covering(op, [problem], features(op, problem, first))
    return [first, *(config for _, config in itertools.islice(others, count - 1))]


class _Pool:
    """The configs of one problem that its rules allow: combinations of own choices, and with each, by part, those of the part, fastest first."""

    def __init__(self, op: Op, problem: Any, device: Device, pairs: bool) -> None:
        self._op, self._problem, self._device, self._pairs = op, problem, device, pairs
        self._shared: dict[Any, dict[str, list[Any]]] | None = None
        self._features: dict[Any, set[Feature]] = {}

    def best(self, seen: set[Feature]) -> Any:
        """The legal config with the most features that are not in `seen`; None if none has any."""
        while True:
            ranked = [(self._gain(shared, seen), -i, shared) for i, shared in enumerate(self._known())]
            if not any(gain for gain, _, _ in ranked):
                return None
            _, _, shared = max(ranked, key=lambda entry: entry[:2])
            config = shared
            for part, variants in self._known()[shared].items():
                config = replace(config, **{part: getattr(max(variants, key=lambda v: self._new(v, part, seen)), part)})
            if not self._refused(shared, config):
                return config

    def _refused(self, shared: Any, config: Any) -> bool:
        """Whether the tiles of a config are refused; what is to blame is not asked again."""
        by_part = self._known()[shared]
        for part, variants in by_part.items():
            if self._op.reject(self._problem, config, self._device, part) is not None:
                variants[:] = [v for v in variants if getattr(v, part) != getattr(config, part)]
                if not variants:
                    del self._known()[shared]
                return True
        if self._op.reject(self._problem, config, self._device) is not None:
            del self._known()[shared]
            return True
        return False

    def _known(self) -> dict[Any, dict[str, list[Any]]]:
        if self._shared is None:
            op, problem, device, self._shared = self._op, self._problem, self._device, {}
            allowed = [(seconds, s) for s in op.shared() if (seconds := op.estimate(problem, s, device, "")) is not None]
            for _, shared in sorted(allowed, key=lambda entry: entry[0]):
                parts = [part for part in op.parts if op.launches(problem, shared, part)]
                by_part = {part: [c.config for c in op.estimates(problem, shared, device, part)] for part in parts}
                if all(by_part.values()):
                    self._shared[shared] = by_part
        return self._shared

    def _gain(self, shared: Any, seen: set[Feature]) -> int:
        by_part = self._known()[shared]
        own = self._new(shared, "", seen)
        return own + sum(max(self._new(v, part, seen) for v in variants) for part, variants in by_part.items())

    def _new(self, config: Any, part: str, seen: set[Feature]) -> int:
        """How much of what a part of a config adds (of the op's own choices, with part "") is new."""
        if (config, part) not in self._features:
            stages = [s for s in self._op.stages(self._problem, config) if s.part == part]
            own = {(n, v) for n, v in taken(self._op, self._problem, config).items() if (n.partition(".")[0] if "." in n else "") == part}
            found: set[Feature] = {("", s.kernel.name) for s in stages}
            found.update(own)
            if self._pairs:
                found |= {frozenset(pair) for pair in itertools.combinations(own, 2)}
                shared = {(n, v) for n, v in taken(self._op, self._problem, config).items() if "." not in n}
                found |= {frozenset((a, b)) for a in own for b in shared if part}
            self._features[config, part] = found
        new = self._features[config, part] - seen
        return sum(KERNEL_WEIGHT if isinstance(feature, tuple) and feature[0] == "" else 1 for feature in new)
