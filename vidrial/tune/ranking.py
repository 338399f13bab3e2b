"""Which configs were fastest for such inputs: rankings, where they lie, and which of them count.

A ranking is one JSON document: what one device measured for one op (its very templates), one set of static facts and one size
class. Those of this machine lie in the cache; those that come with Vidrial in `sweeps/results/<device key>/<op>.json`. `pick` takes a
call's config from them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import json
import logging
import math
import os
import threading
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from vidrial.build.files import locked, parse_json
from vidrial.build.store import Store
from vidrial.device import Device
from vidrial.errors import ArgumentError, SweepError, VidrialError
from vidrial.installation import own_ops
from vidrial.spec.choices import check_choices, config_order
from vidrial.spec.digest import LEXER
from vidrial.spec.fields import C, P, fields, keyed_fields, least_values, size_class, specialized
from vidrial.spec.op import Op
from vidrial.spec.registry import reference_of
from vidrial.tune.codec import UNREADABLE, decode, encode
from vidrial.tune.shortlist import predicted
from vidrial.tune.timing import Timing
from vidrial.tune.trial import Trial, latest

SCHEMA = 1
# Configs kept of each measured problem; of those, how many stand by for problems that were not measured, and how many in all.
KEPT, LEADERS, CANDIDATES = 16, 3, 12
log = logging.getLogger("vidrial")


@dataclass(frozen=True)
class RankedConfig(Generic[C]):
    """A measured config; `tied`: within the noise of the one before it or after it, and placed by order of declaration."""

    config: C
    timing: Timing
    tied: bool = False


@dataclass(frozen=True)
class ProblemTimings(Generic[P, C]):
    """One problem's configs, fastest first."""

    problem: P
    configs: tuple[RankedConfig[C], ...]


@dataclass(frozen=True)
class Ranking(Generic[P, C]):
    """What one device measured for the problems of one size class. `device` is `Device.key`, `digest` that of the op's templates."""

    op: str
    digest: str
    device: str
    device_name: str
    versions: str
    measured: tuple[ProblemTimings[P, C], ...]

    @classmethod
    def from_trials(cls, op: Op[P, C], device: Device, trials: Iterable[Trial[P, C]]) -> Ranking[P, C] | None:
        """The ranking of one problem's trials, the cost model's own choice always among them; None if none is ok."""
        good = [t for t in latest(trials).values() if t.ok]
        if not good:
            return None
        problem, configs = good[0].problem, rank([(t.config, t.timing) for t in good if t.timing is not None])
        kept = [c for i, c in enumerate(configs) if i < KEPT]
        if len(configs) > KEPT:
            own = predicted(op, problem, device)
            kept += [c for c in configs[KEPT:] if c.config == own]
        return cls(op.name, op.digest(), device.key, device.name, good[0].versions, (ProblemTimings(problem, tuple(kept)),))

    @classmethod
    def from_json(cls, op: Op[P, C], data: object) -> Ranking[P, C]:
        """The ranking that `to_json` wrote. Choices that the config has gained since take their defaults. What is damaged, and a config that
        makes a choice that is none any more, is left out and said once; a problem without others with it.

        Raises:
            SweepError: it is of another schema or damaged as a whole.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise SweepError(f"a ranking of {op.name} is not of schema {SCHEMA}; sweep again to replace it")
        plain = {**data, "measured": []}
        del plain["schema"]
        ranking: Ranking = decode(cls, plain)
        found = [_timings(op, entry) for entry in data["measured"]]
        measured = [entry for entry in found if entry is not None and entry.configs]
        # All are of the family and size class that the ranking's name says.
        alike = [entry for entry in measured if _is_like(entry.problem, measured[0].problem)]
        if len(alike) < len(measured):
            _say_once(f"{op.name}: a ranking holds problems of several kinds; those unlike the first one are ignored")
        measured = alike
        return dataclasses.replace(ranking, measured=tuple(measured))

    def to_json(self) -> dict[str, Any]:
        """The ranking as JSON."""
        return {"schema": SCHEMA, **encode(self)}

    @property
    def key(self) -> str:
        """Name of its document in the cache."""
        problem = self.measured[0].problem
        return _family(self.op, self.digest, fields(problem, "static"), self.device) + _sha(size_class(problem))

    def merged(self, other: Ranking[P, C]) -> Ranking[P, C]:
        """Both rankings' problems; where both measured one, `other` counts."""
        mine = {sizes(m.problem): m for m in self.measured} | {sizes(m.problem): m for m in other.measured}
        return dataclasses.replace(other, measured=tuple(mine[key] for key in sorted(mine)))

    def save(self, op: Op[P, C]) -> None:
        """Put the ranking into the cache, joined with what is there: sweeps of two lengths of one class may end at the same moment."""

        def joined(data: Any) -> dict[str, Any]:
            before = _load(op, data, f"ranking {self.key}", self.key)
            return (before.merged(self) if before else self).to_json()

        Store.shared().update_json("ranking", self.key, joined)
        forget()


def rank(configs: Sequence[tuple[Any, Timing]]) -> tuple[RankedConfig, ...]:
    """Fastest first; those that tie with the fastest of their group in order of declaration, and marked."""
    waiting = sorted(configs, key=lambda c: (c[1].median_ms, config_order(c[0])))
    ranked: list[RankedConfig] = []
    while waiting:
        leader = waiting[0][1]
        group = [c for c in waiting if c[1].ties(leader)]
        waiting = [c for c in waiting if not c[1].ties(leader)]
        ranked += [RankedConfig(config, timing, len(group) > 1) for config, timing in sorted(group, key=lambda c: config_order(c[0]))]
    return tuple(ranked)


def sizes(problem: Any) -> tuple[int, ...]:
    """Values of the fields that make up the size class: problems that agree in them were measured alike."""
    return tuple(keyed_fields(problem).values())


def top_configs(measured: Iterable[ProblemTimings[P, C]]) -> tuple[C, ...]:
    """The configs that stand by for problems that were not measured: those that lead most of the measured ones.

    What bakes a length in does not: it would have to be compiled for every other one.
    """
    wins: dict[Any, int] = {}
    for one in measured:
        for place, ranked in enumerate(one.configs[:LEADERS]):
            if not specialized(ranked.config):
                wins[ranked.config] = wins.get(ranked.config, 0) + LEADERS - place
    return tuple(sorted(wins, key=lambda c: (-wins[c], config_order(c)))[:CANDIDATES])


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
    found = (_load(op, store.read_json("ranking", key), f"ranking {key}", key) for key in store.keys("ranking") if key.startswith(start))
    return [ranking for ranking in found if ranking is not None]


def measured_here(op: Op, problem: Any, device: Device) -> tuple[RankedConfig, ...]:
    """What this machine measured at these very sizes: one document, where `local` reads many."""
    key = _family(op.name, _digest(op, _state.generation), fields(problem, "static"), device.key) + _sha(size_class(problem))
    ranking = _load(op, Store.shared().read_json("ranking", key), f"ranking {key}", key)
    return next((m.configs for m in ranking.measured if sizes(m.problem) == sizes(problem)), ()) if ranking else ()


def shipped(op: Op[P, C], device_key: str, folder: Path | None = None, static: Mapping[str, object] | None = None) -> list[Ranking[P, C]]:
    """The rankings in `folder` (by default those that come with Vidrial) of this kind of device and the op's present templates.

    With `static`, only those for such static facts.
    """
    digest = _digest(op, _state.generation)
    path, entries = _shipped_entries(op, device_key, folder)
    current = [entry for entry in entries if _is_of(entry, digest, device_key, static, str(path))]
    return [ranking for ranking in (_load(op, entry, str(path)) for entry in current) if ranking is not None]


def _shipped_entries(op: Op, device_key: str, folder: Path | None = None) -> tuple[Path, Sequence[Any]]:
    """The file of an op's rankings for a kind of device, and what it holds."""
    folder = folder or shipped_folder()
    path = Path(folder or "", device_key, f"{op.name}.json")
    if folder is None or not path.is_file():
        return path, ()
    try:
        stat = path.stat()
        return path, _read_entries(path, stat.st_mtime_ns, stat.st_size)
    except (OSError, ValueError, LookupError, TypeError) as error:
        _say_once(f"{path} is ignored: {type(error).__name__}: {error}")
        return path, ()


@functools.lru_cache(maxsize=2)
def _read_entries(path: Path, _modified: int, _size: int) -> Sequence[Any]:
    entries: Sequence[Any] = list(parse_json(path.read_bytes())["rankings"])
    return entries


@dataclass(frozen=True)
class Standing:
    """How many rankings there are of an op for a kind of device, from this machine and shipped with Vidrial; and how many of other
    templates or of another schema, which do not count."""

    local: int
    shipped: int
    outdated_local: int
    outdated_shipped: int

    @classmethod
    def of(cls, op: Op, device: Device) -> Standing:
        """What the cache and the folder of shipped rankings hold now."""
        store, digest = Store.shared(), _digest(op, _state.generation)
        keys = (key for key in store.keys("ranking") if key.startswith(f"{op.name}-{device.key}-"))
        local = [_counts(store.read_json("ranking", key), digest) for key in keys]
        theirs = [_counts(entry, digest) for entry in _shipped_entries(op, device.key)[1]]
        return cls(sum(local), sum(theirs), len(local) - sum(local), len(theirs) - sum(theirs))

    @property
    def outdated(self) -> str:
        """What there is that does not count, as a sentence's beginning and end; "" if there is nothing."""
        counted = ((self.outdated_local, "from this machine"), (self.outdated_shipped, "shipped with Vidrial"))
        there = " and ".join(f"{count} {where}" for count, where in counted if count)
        return f"{there} are of other templates and do not count" if there else ""


def until_swept(op: Op) -> str:
    """What calls do where nothing was measured, and the command that changes it."""
    return f"calls take the cost model's choice until you run {sweep_command(op)}"


def sweep_command(op: Op) -> str:
    """The command line that measures an op; what its problems need is in capitals."""
    needed = [name for name, p in inspect.signature(op.example).parameters.items() if p.default is p.empty and p.kind is p.KEYWORD_ONLY]
    return " ".join([f"vidrial sweep {_reference(op)}", *(f"--{name} {name.upper()}" for name in needed)])


def say_if_outdated(op: Op, device: Device) -> None:
    """Log one line, once in a process, if all rankings of an op for a kind of device are of other templates."""
    if op in _state.asked:
        return
    _state.asked.add(op)
    standing = Standing.of(op, device)
    if standing.outdated and not standing.local and not standing.shipped:
        _say_once(f"{op.name} on {device.name}: of its rankings, {standing.outdated}: {until_swept(op)}")


def _counts(entry: Any, digest: str) -> bool:
    return isinstance(entry, dict) and (entry.get("digest"), entry.get("schema")) == (digest, SCHEMA)


def _reference(op: Op) -> str:
    """How a command line names an op."""
    with contextlib.suppress(ArgumentError):
        reference = reference_of(op)
        return op.name if own_ops().get(op.name) == reference else reference
    return op.name


def _is_of(entry: Any, digest: str, device: str, static: Mapping[str, Any] | None, what: str) -> bool:
    """Whether a ranking's JSON is of these templates and device, and for these static facts (None: any): what is not is not decoded."""
    try:
        if (entry["digest"], entry["device"]) != (digest, device):
            return False
        return static is None or encode(static).items() <= entry["measured"][0]["problem"].items()
    except UNREADABLE as error:
        _say_once(f"{what}: a ranking is ignored: {type(error).__name__}: {error}")
        return False


def publish(op: Op[P, C], rankings: Sequence[Ranking[P, C]], folder: Path) -> list[Path]:
    """Write rankings to `folder/<device key>/<op>.json`, joined with those of the same templates there; the files written.

    Raises:
        SweepError: the folder cannot be written, or a file there cannot be read: what others put there is not written over.
    """
    written = []
    for device in sorted({r.device for r in rankings}):
        path = folder / device / f"{op.name}.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.parent):
                text = json.dumps(
                    {"schema": SCHEMA, "rankings": _joined(op, path, [r for r in rankings if r.device == device])},
                    indent=1,
                    allow_nan=False,
                )
                staged = path.with_suffix(f".{uuid.uuid4().hex}")
                staged.write_text(text + "\n", encoding="utf-8")
                os.replace(staged, path)
        except OSError as error:
            raise SweepError(f"rankings cannot be written to {path} ({error}); name another folder. The cache has them as well") from None
        written.append(path)
    forget()
    return written


def _joined(op: Op[P, C], path: Path, rankings: Sequence[Ranking[P, C]]) -> list[Any]:
    """The rankings in a file, of them those of these very templates, and these, as JSON. What does not decode stays as it is."""
    digest, kept = op.digest(), dict[str, Any]()
    try:
        there = parse_json(path.read_bytes())["rankings"] if path.exists() else []
        for entry in there:
            if entry["digest"] == digest:
                known = _load(op, entry, str(path))
                kept[known.key if known is not None else _sha(entry)] = entry
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SweepError(
            f"{path} holds rankings that cannot be read ({type(error).__name__}: {error}), and is left as it is: "
            "move it away, or name another folder. The cache has yours as well"
        ) from None
    for ranking in rankings:
        before = _load(op, kept.get(ranking.key), str(path))
        kept[ranking.key] = (before.merged(ranking) if before is not None else ranking).to_json()
    return [kept[key] for key in sorted(kept)]


@dataclass
class _State:
    """`generation` changes when picks may; `said` is what was logged and need not be again, `asked` the ops whose rankings were
    looked through for outdated ones."""

    generation: int = 0
    said: set[str] = dataclasses.field(default_factory=set)
    asked: set[Op] = dataclasses.field(default_factory=set)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


_state = _State()


@functools.lru_cache(maxsize=256)
def _digest(op: Op, generation: int) -> str:
    """The digest of an op's templates, which is looked at anew with the rankings: every new problem asks for it.

    Lexing all templates takes longer than the rest of a first call, so the cache has the digest of texts that were lexed before.
    """
    store, key = Store.shared(), f"{LEXER}-{op.text_digest()}"
    known = store.read_json("digest", key)
    if not isinstance(known, str):
        known = op.digest()
        store.write_json("digest", key, known)
    return known


def _family(op: str, digest: str, static: Mapping[str, Any], device: str) -> str:
    """What begins the keys of all rankings that differ in size class alone."""
    return f"{op}-{device}-{_sha([digest, static])}-"


def _load(op: Op, data: Any, what: str, key: str | None = None) -> Ranking | None:
    """The ranking of a JSON document; None, said once, if it is damaged or, of a document in the cache, not what its name says."""
    if data is None:
        return None
    try:
        ranking = Ranking.from_json(op, data)
    except UNREADABLE as error:
        _say_once(f"{what} is ignored: {error}")
        return None
    if not ranking.measured:
        return None
    if key is not None and ranking.key != key:
        _say_once(f"{what} is ignored: it holds {ranking.key}")
        return None
    return ranking


def _timings(op: Op, data: Any) -> ProblemTimings | None:
    """A measured problem with its configs, or None if the problem is none."""
    try:
        problem, entries = decode(op.problem, data["problem"]), list(data["configs"])
        least = least_values(problem)
        for name, value in fields(problem, "dynamic").items():
            if not least[name] <= value < 2**63 if name in least else isinstance(value, float) and not math.isfinite(value):
                raise SweepError(f"{name}={value} was never measured")
    except UNREADABLE as error:
        _say_once(f"{op.name}: a problem that was measured is ignored: {type(error).__name__}: {error}")
        return None
    return ProblemTimings(problem, tuple(ranked for ranked in (_ranked(op, entry) for entry in entries) if ranked is not None))


def _ranked(op: Op, data: Any) -> RankedConfig | None:
    """A measured config, or None if it is no config of the op's any more, or no timing."""
    try:
        config = decode(op.config, data["config"])
        check_choices(config)
        ranked: RankedConfig = decode(RankedConfig, {**data, "config": None})
        ranked.timing.check()
    except UNREADABLE as error:
        text = str(error) if isinstance(error, VidrialError) else f"{type(error).__name__}: {error}"
        _say_once(f"{op.name}: a config that was measured is ignored: {text}")
        return None
    return dataclasses.replace(ranked, config=config)


def _is_like(a: Any, b: Any) -> bool:
    return fields(a, "static") == fields(b, "static") and size_class(a) == size_class(b)


def _say_once(text: str) -> None:
    """Log a line, if it is the first time in this process."""
    with _state.lock:
        if text in _state.said:
            return
        _state.said.add(text)
    log.warning("%s", text)


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(encode(value), sort_keys=True).encode()).hexdigest()[:16]
