"""Which configs were fastest for such inputs; and, from that, which config a call takes.

    pick(op, problem, device)      # (config, where the choice comes from)

A ranking is one JSON document: what one device measured for one op (its very templates), one set of static facts and one size
class. Those of this machine lie in the cache; those that come with Vidrial in `sweeps/results/<device key>/<op>.json`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import os
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vidrial import build
from vidrial.device import Device
from vidrial.errors import FrozenError, SweepError, VidrialError
from vidrial.files import locked
from vidrial.kernel import Kernel
from vidrial.model import Model, work
from vidrial.op import Op
from vidrial.problem import StaticView, fields, keyed_fields, size_class, specialized
from vidrial.space import config_order, describe
from vidrial.store import Store
from vidrial.timing import Timing
from vidrial.trial import Trial, decode, encode, latest

SCHEMA = 1
# Configs kept of each measured problem; of those, how many stand by for problems that were not measured, and how many in all.
KEPT, LEADERS, CANDIDATES = 16, 3, 12
# From so many measured problems on, the model decides between them; with fewer, the nearest one's order does.
CALIBRATED = 3
PICKS = 4096
# While compiling is frozen: how far down the predicted order one that is compiled is looked for.
FROZEN_DEPTH = 128

log = logging.getLogger("vidrial")


@dataclass(frozen=True)
class Ranked:
    """A measured config; `tied`: within the noise of the one before it or after it, and placed by order of declaration."""

    config: Any
    timing: Timing
    tied: bool = False


@dataclass(frozen=True)
class Measured:
    """One problem's configs, fastest first."""

    problem: Any
    configs: tuple[Ranked, ...]


@dataclass(frozen=True)
class Ranking:
    """What one device measured for the problems of one size class. `device` is `Device.key`, `digest` that of the op's templates."""

    op: str
    digest: str
    device: str
    device_name: str
    versions: str
    measured: tuple[Measured, ...]

    @classmethod
    def from_trials(cls, op: Op, device: Device, trials: Iterable[Trial]) -> Ranking | None:
        """The ranking of one problem's trials; None if none is ok."""
        good = [t for t in latest(trials).values() if t.ok]
        if not good:
            return None
        configs = rank([(t.config, t.timing) for t in good if t.timing is not None])
        return cls(op.name, op.digest(), device.key, device.name, good[0].versions, (Measured(good[0].problem, configs[:KEPT]),))

    @classmethod
    def from_json(cls, op: Op, data: Any) -> Ranking:
        """The ranking that `to_json` wrote.

        Raises:
            SweepError: it is of another schema or damaged.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise SweepError(f"a ranking of {op.name} is not of schema {SCHEMA}; sweep again to replace it")
        plain = {**data, "measured": []}
        del plain["schema"]
        ranking: Ranking = decode(cls, plain)
        measured = []
        for entry in data.get("measured", ()):
            configs = tuple(decode(Ranked, r, {"config": op.config}) for r in entry["configs"])
            measured.append(Measured(decode(op.problem, entry["problem"]), configs))
        return dataclasses.replace(ranking, measured=tuple(measured))

    def to_json(self) -> Any:
        """The ranking as JSON."""
        return {"schema": SCHEMA, **encode(self)}

    @property
    def key(self) -> str:
        """Name of its document in the cache."""
        problem = self.measured[0].problem
        return _family(self.op, self.digest, fields(problem, "static"), self.device) + _sha(size_class(problem))

    def merged(self, other: Ranking) -> Ranking:
        """Both rankings' problems; where both measured one, `other` counts."""
        mine = {sizes(m.problem): m for m in self.measured} | {sizes(m.problem): m for m in other.measured}
        return dataclasses.replace(other, measured=tuple(mine[key] for key in sorted(mine)))

    def save(self, op: Op) -> None:
        """Put the ranking into the cache, joined with what is there."""
        store = Store.shared()
        # Sweeps of two lengths of one class may end at the same moment.
        with locked(store.root / "rankings.lock"):
            before = _load(op, store.read_json("ranking", self.key), f"ranking {self.key}")
            store.write_json("ranking", self.key, (before.merged(self) if before else self).to_json())
        forget()

    def nearest(self, problem: Any) -> Measured:
        """The measured problem that is nearest in size, by ratio."""
        return min(self.measured, key=lambda m: distance(m.problem, problem))


class Pick(NamedTuple):
    """A config, and where the choice comes from: `ranking`, `shipped`, `model` (calibrated) or `predicted` (nothing was measured)."""

    config: Any
    origin: str


def rank(configs: Sequence[tuple[Any, Timing]]) -> tuple[Ranked, ...]:
    """Fastest first; those that tie with the fastest of their group in order of declaration, and marked."""
    waiting = sorted(configs, key=lambda c: (c[1].median_ms, config_order(c[0])))
    ranked: list[Ranked] = []
    while waiting:
        leader = waiting[0][1]
        group = [c for c in waiting if c[1].ties(leader)]
        waiting = [c for c in waiting if not c[1].ties(leader)]
        ranked += [Ranked(config, timing, len(group) > 1) for config, timing in sorted(group, key=lambda c: config_order(c[0]))]
    return tuple(ranked)


def sizes(problem: Any) -> tuple[int, ...]:
    """Values of the fields that make up the size class: problems that agree in them were measured alike."""
    return tuple(keyed_fields(problem).values())


def distance(a: Any, b: Any) -> float:
    """How far two problems are apart: the sum of the logarithms of their sizes' ratios."""
    return sum(abs(math.log(max(1, x) / max(1, y))) for x, y in zip(sizes(a), sizes(b), strict=True))


def leading(measured: Iterable[Measured]) -> tuple[Any, ...]:
    """The configs that stand by for problems that were not measured: those that lead most of the measured ones.

    What bakes a length in does not: it would have to be compiled for every other one.
    """
    wins: dict[Any, int] = {}
    for one in measured:
        for place, ranked in enumerate(one.configs[:LEADERS]):
            if not specialized(ranked.config):
                wins[ranked.config] = wins.get(ranked.config, 0) + LEADERS - place
    return tuple(sorted(wins, key=lambda c: (-wins[c], config_order(c)))[:CANDIDATES])


def pick(op: Op, problem: Any, device: Device, fixed: tuple[tuple[str, Any], ...] = ()) -> Pick:
    """The config that a call takes, its choices of the names in `fixed` (name, value) kept; compiles nothing, and is remembered.

    In this order: what this machine measured, what came with Vidrial for this very kind of GPU, the calibrated model over their
    leading configs, the prediction. A ranking of another device or of other templates never counts.

    Raises:
        ConfigError: no config is legal. FrozenError: compiling is frozen and no legal config is compiled.
    """
    return _pick(op, problem, device, fixed, _state.generation)


def freeze(on: bool = True) -> None:
    """From now on (`on=False`: no longer) calls compile nothing: they take a config that is compiled already, and the log says
    where that is not the first choice. Calls made before are decided again, too."""
    build.freeze(on)
    forget()


def forget() -> None:
    """Read the rankings again at the next pick, and decide again what was picked."""
    with _state.lock:
        _state.generation += 1


def generation() -> int:
    """A number that changes when picks may: with new rankings, `freeze` and `forget`."""
    return _state.generation


def shipped_folder() -> Path | None:
    """Where the rankings that come with Vidrial lie, installed or in the source tree; None if there are none."""
    spec = importlib.util.find_spec("vidrial.sweeps")
    for folder in (spec and spec.submodule_search_locations) or ():
        if Path(folder, "results").is_dir():
            return Path(folder, "results")
    return None


def shipped_devices() -> list[str]:
    """Keys of the devices that Vidrial comes with rankings for."""
    folder = shipped_folder()
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder else []


def local(op: Op, static: Mapping[str, Any], device: Device) -> list[Ranking]:
    """This machine's rankings of an op for such static facts."""
    store, start = Store.shared(), _family(op.name, _digest(op, _state.generation), static, device.key)
    found = (_load(op, store.read_json("ranking", key), f"ranking {key}") for key in store.keys("ranking") if key.startswith(start))
    return [ranking for ranking in found if ranking is not None]


def shipped(op: Op, device_key: str, folder: Path | None = None, static: Mapping[str, Any] | None = None) -> list[Ranking]:
    """The rankings in `folder` (by default those that come with Vidrial) of this kind of device and the op's present templates.

    With `static`, only those for such static facts.
    """
    folder = folder or shipped_folder()
    path = Path(folder or "", device_key, f"{op.name}.json")
    if folder is None or not path.is_file():
        return []
    try:
        entries, digest = json.loads(path.read_text())["rankings"], _digest(op, _state.generation)
        current = [entry for entry in entries if (entry["digest"], entry["device"]) == (digest, device_key) and _is_of(entry, static)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        log.warning("%s is ignored: %s: %s", path, type(error).__name__, error)
        return []
    return [ranking for ranking in (_load(op, entry, str(path)) for entry in current) if ranking is not None]


def _is_of(entry: Any, static: Mapping[str, Any] | None) -> bool:
    """Whether a ranking's JSON is for these static facts (None: any): what is not is not decoded."""
    return static is None or encode(static).items() <= entry["measured"][0]["problem"].items()


def publish(op: Op, rankings: Sequence[Ranking], folder: Path) -> list[Path]:
    """Write rankings to `folder/<device key>/<op>.json`, joined with those of the same templates there; the files written.

    Raises:
        SweepError: the folder cannot be written.
    """
    written = []
    for device in sorted({r.device for r in rankings}):
        kept = {r.key: r for r in shipped(op, device, folder)}
        for ranking in (r for r in rankings if r.device == device):
            kept[ranking.key] = kept[ranking.key].merged(ranking) if ranking.key in kept else ranking
        path = folder / device / f"{op.name}.json"
        staged = path.with_suffix(f".{uuid.uuid4().hex}")
        text = json.dumps({"schema": SCHEMA, "rankings": [kept[k].to_json() for k in sorted(kept)]}, indent=1, allow_nan=False)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            staged.write_text(text + "\n")
            os.replace(staged, path)
        except OSError as error:
            raise SweepError(f"rankings cannot be written to {path} ({error}); name another folder. The cache has them as well") from None
        written.append(path)
    forget()
    return written


@dataclass
class _State:
    """`generation` changes when picks may."""

    generation: int = 0
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


_state = _State()


@functools.lru_cache(maxsize=PICKS)
def _pick(op: Op, problem: Any, device: Device, fixed: tuple[tuple[str, Any], ...], generation: int) -> Pick:
    asked = dict(fixed)
    choices = (
        pick
        for pick in _choices(op, problem, device)
        if all(getattr(pick.config, name) == value for name, value in fixed) and op.reject(problem, pick.config, device) is None
    )
    first = next(choices, None) or Pick(op.predicted(problem, device, asked), "predicted")
    if not build.frozen() or _compiled(op, problem, first.config, device):
        return first
    predicted = (Pick(config, "predicted") for config in op.space(problem, device, FROZEN_DEPTH, asked))
    for choice in itertools.chain(choices, predicted):
        if _compiled(op, problem, choice.config, device):
            log.warning("%s: frozen, so %s in place of %s for %s", op.name, describe(choice.config), describe(first.config), problem)
            return choice
    raise FrozenError(
        f"{op.name}: no legal config for {problem} is compiled, and compiling is frozen; "
        "call it once or vidrial.prepare it before freeze(), or freeze(False)"
    )


def _choices(op: Op, problem: Any, device: Device) -> Iterator[Pick]:
    """Measured configs, the best choice first, legal or not."""
    yield from (Pick(ranked.config, "ranking") for ranked in _measured(op, problem, device))
    known = _known(op, tuple(fields(problem, "static").items()), device, _state.generation)
    yield from (Pick(config, origin) for config, origin in _ordered(known, op, problem, device))


def _measured(op: Op, problem: Any, device: Device) -> tuple[Ranked, ...]:
    """What this machine measured at these very sizes: one document, where all that is known takes many."""
    key = _family(op.name, _digest(op, _state.generation), fields(problem, "static"), device.key) + _sha(size_class(problem))
    ranking = _load(op, Store.shared().read_json("ranking", key), f"ranking {key}")
    return next((m.configs for m in ranking.measured if sizes(m.problem) == sizes(problem)), ()) if ranking else ()


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
def _digest(op: Op, generation: int) -> str:
    """The digest of an op's templates, which is looked at anew with the rankings: every new problem asks for it."""
    return op.digest()


@functools.lru_cache(maxsize=256)
def _known(op: Op, static: tuple[tuple[str, Any], ...], device: Device, generation: int) -> _Known:
    mine, theirs = local(op, dict(static), device), shipped(op, device.key, static=dict(static))
    by_sizes = {sizes(m.problem): m for r in (*theirs, *mine) for m in r.measured}
    points: dict[Any, list[tuple[Sequence[float], float]]] = {}
    for measured in by_sizes.values():
        for ranked in measured.configs:
            points.setdefault(ranked.config, []).append((work(op, measured.problem, ranked.config, device), ranked.timing.median_ms))
    return _Known(tuple(mine), tuple(theirs), Model.fit(points), leading(by_sizes.values()), len(by_sizes))


def _compiled(op: Op, problem: Any, config: Any, device: Device) -> bool:
    stages = ((s.kernel, StaticView(s.problem, s.config), s.config) for s in op.stages(problem, config))
    return all(_built(*stage, device.arch, _state.generation) for stage in stages)


@functools.lru_cache(maxsize=PICKS)
def _built(kernel: Kernel, view: StaticView, config: Any, arch: str, generation: int) -> bool:
    return build.look_up(kernel.source(view, config), arch)[1] is not None


def _family(op: str, digest: str, static: Mapping[str, Any], device: str) -> str:
    """What begins the keys of all rankings that differ in size class alone."""
    return f"{op}-{device}-{_sha([digest, static])}-"


def _load(op: Op, data: Any, what: str) -> Ranking | None:
    if data is None:
        return None
    try:
        return Ranking.from_json(op, data)
    except (VidrialError, KeyError, TypeError) as error:
        log.warning("%s is ignored: %s", what, error)
        return None


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(encode(value), sort_keys=True).encode()).hexdigest()[:16]
