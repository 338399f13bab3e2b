"""The sweep's page: one HTML file that needs no network, and a PNG, from journals."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from vidrial.device import TABLE, Device
from vidrial.errors import SweepError
from vidrial.report.page import Section, chart, page, table, text_of
from vidrial.spec.choices import describe
from vidrial.spec.op import Op
from vidrial.tune.codec import decode, encode
from vidrial.tune.journal import KIND, SCHEMA
from vidrial.tune.timing import Timing
from vidrial.tune.trial import Status, Trial

# Journals of schema 1 do not say which GPU measured.
READABLE = (1, SCHEMA)
# How `Journal` names what it sets aside.
SET_ASIDE = re.compile(r"\.\d{8}T\d{6}-[0-9a-f]{4}\.jsonl$")
LISTED, REASONS = 400, 20  # configs of one problem in the table of all trials; reasons of failures that are shown at once
OK = Status.ok.name


@dataclass(frozen=True)
class Row:
    """One trial as the page shows it, whatever its op: `problem` by field, `config` flattened, as one line."""

    op: str
    problem: dict[str, Any]
    config: str
    status: str
    timing: Timing | None
    error: tuple[float, float] | None
    reason: str
    resources: tuple[dict[str, Any], ...]
    reference_ms: float
    device: str
    versions: str
    time: str
    gpu: str

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Row:
        """The row of a trial as `encode` writes it.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        timing, check = data["timing"], data["check"]
        return cls(
            data["op"],
            dict(data["problem"]),
            " ".join(_words(data["config"])),
            data["status"],
            Timing(float(timing["median_ms"]), float(timing["iqr_ms"]), int(timing["samples"])) if timing else None,
            (float(check["relative"]), float(check["max_error"])) if check else None,
            data["reason"],
            tuple(data["resources"]),
            float(data["reference_ms"]),
            data["device"],
            data["versions"],
            data["time"],
            data.get("gpu", ""),
        )

    @property
    def ok(self) -> bool:
        """Checked and timed."""
        return self.status == OK and self.timing is not None

    @property
    def ms(self) -> float:
        """Median time; infinite if the trial failed."""
        return self.timing.median_ms if self.timing is not None and self.status == OK else math.inf


def rows_of(trials: Iterable[Trial]) -> list[Row]:
    """The rows of trials in memory."""
    return [Row.of(encode(trial)) for trial in trials]


def read_journals(paths: Sequence[Path]) -> list[Row]:
    """The rows of journals, of files or of folders of `.jsonl` files; a torn last line, as of a sweep that goes on, is left out.

    Of a folder, journals that a newer sweep of the same thing has set aside are left out as well.

    Raises:
        SweepError: a file cannot be read, is no journal, is of another schema, or is damaged before its last line.
    """
    rows: list[Row] = []
    for path in paths:
        for file in sorted(f for f in path.glob("**/*.jsonl") if not SET_ASIDE.search(f.name)) if path.is_dir() else [path]:
            rows += _read(file)
    if not rows:
        raise SweepError(f"{', '.join(map(str, paths))}: no trial to report; sweep first, or name other journals")
    return rows


def _read(path: Path) -> Iterator[Row]:
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise SweepError(f"journal {path} cannot be read: {error}") from None
    try:
        header = json.loads(lines[0]) if lines else None
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("kind") != KIND:
        raise SweepError(f"{path} is not a journal: its first line is no header; name the file that a sweep wrote")
    if header.get("schema") not in READABLE:
        accepted = " and ".join(map(str, READABLE))
        raise SweepError(
            f"journal {path} has schema {header.get('schema')}, accepted: {accepted}; report it with the version that wrote it"
        )
    for number, line in enumerate(lines[1:], 2):
        try:
            row = Row.of(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise SweepError(f"journal {path}, line {number} is damaged ({why}); delete that line to report the others") from None
        yield row


def rejected_rows(op: Op, rows: Sequence[Row]) -> list[Row]:
    """What the op's rules forbid for the problems of `rows`, for devices of the table or of this machine: a sweep does not note that."""
    devices = {device.key: device for device in (Device.default(), *TABLE)}
    made = []
    for example in {json.dumps([r.device, r.problem]): r for r in rows if r.op == op.name and r.device in devices}.values():
        space = op.space(decode(op.problem, example.problem), devices[example.device], limit=1)
        made += [
            replace(
                example,
                config=describe(r.config),
                status=Status.rejected.name,
                timing=None,
                error=None,
                reason=r.reason,
                resources=(),
                reference_ms=0.0,
            )
            for r in space.rejected
        ]
    return made


def _words(config: Mapping[str, Any]) -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from (f"{name}.{word}" for word in _words(value))
        else:
            yield f"{name}={value}"


@dataclass(frozen=True)
class Group:
    """The trials of one problem on one device, one per config, fastest first; `label` tells it from the others, `length` places it.

    `series`: what it shares with others that differ in length only; a line joins these.
    """

    label: str
    length: float
    rows: tuple[Row, ...]
    series: str = ""

    @property
    def timed(self) -> tuple[Row, ...]:
        """Those that were checked and timed."""
        return tuple(row for row in self.rows if row.ok)


def group(rows: Iterable[Row]) -> tuple[str, list[Group]]:
    """(what the lengths are, the groups by rising length). The axis is the number that differs most among the problems."""
    problems: dict[str, dict[str, Row]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for row in rows:
        key = json.dumps([row.op, row.device, row.problem], sort_keys=True)
        facts[key] = {"op": row.op, "device": row.device} | {k: v for k, v in row.problem.items() if not isinstance(v, list)}
        kept = problems.setdefault(key, {})
        before = kept.get(row.config)
        # As vidrial.tune.trial.latest has it: a failure always counts, else the last one timed.
        if before is None or (before.status == OK and (row.timing is not None or row.status != OK)):
            kept[row.config] = row
    names = list(dict.fromkeys(name for fact in facts.values() for name in fact))
    differ = [n for n in names if len({str(fact.get(n)) for fact in facts.values()}) > 1]
    numeric = [n for n in differ if all(type(fact.get(n)) in (int, float) for fact in facts.values())]
    one = next(iter(facts.values()))
    values = {n: len({fact[n] for fact in facts.values()}) for n in numeric}
    axis = max(numeric, key=values.__getitem__) if numeric else next((n for n in ("t", "n") if n in one), "problem")
    # Of the other facts the ones that tell problems apart which those before them do not.
    apart: list[str] = []
    for name in (n for n in differ if n != axis):
        if len({tuple(str(f.get(n)) for n in (*apart, name)) for f in facts.values()}) > len(
            {tuple(str(f.get(n)) for n in apart) for f in facts.values()}
        ):
            apart.append(name)
    names = [n for n in differ if n == axis or n in apart]
    groups = []
    for number, (key, kept) in enumerate(problems.items(), 1):
        label = ", ".join(f"{n}={facts[key].get(n)}" for n in names or [axis] if n in facts[key]) or f"problem {number}"
        ordered = tuple(sorted(kept.values(), key=lambda row: row.ms))
        series = ", ".join(f"{n}={facts[key].get(n)}" for n in apart)
        groups.append(Group(label, float(facts[key].get(axis, number)), ordered, series))
    return axis, sorted(groups, key=lambda g: (g.length, g.label))


def write_report(rows: Sequence[Row], out: Path) -> Path:
    """Write the page and return its path.

    Raises:
        SweepError: there is nothing to report, or the file cannot be written.
    """
    if not rows:
        raise SweepError("no trial to report; sweep first")
    axis, groups = group(rows)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page(title(rows), _summary(rows, groups), _sections(axis, groups)))
    except OSError as error:
        raise SweepError(f"{out} cannot be written ({error}); give --out a place that can") from None
    return out


def title(rows: Sequence[Row]) -> str:
    """What was swept, on which devices."""
    names = {device.key: f"{device.name} ({device.key})" for device in TABLE}
    return f"{', '.join(sorted({r.op for r in rows}))} on {', '.join(sorted({names.get(r.device, r.device) for r in rows}))}"


def _summary(rows: Sequence[Row], groups: Sequence[Group]) -> list[str]:
    counts = {s.name: sum(r.status == s.name for g in groups for r in g.rows) for s in Status}
    times = sorted(r.time for r in rows if r.time)
    lines = [
        f"{len(groups)} problem{'s' * (len(groups) != 1)}, {sum(len(g.rows) for g in groups)} configs: "
        + ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    ]
    lines += [f"{times[0]} to {times[-1]}"] if times else []
    gpus = sorted({r.gpu for r in rows if r.gpu})
    lines += [f"measured by GPUs {', '.join(gpus)}"] if len(gpus) > 1 else []
    return lines + sorted({r.versions for r in rows if r.versions})


def _sections(axis: str, groups: Sequence[Group]) -> list[Section]:
    return [
        Section("Winners", _winners(groups)),
        Section(f"Time of every config by {axis}", chart(axis, _points(groups), series=[g.series for g in groups if g.timed])),
        *([Section("How much slower than the fastest", ratios)] if (ratios := _ratios(axis, groups)) else []),
        Section("What failed or was rejected, and why", _failures(groups)),
        Section("Resources of the winners", _resources(groups)),
        Section("Noise", _noise(groups)),
        Section("All trials", _trials(groups)),
    ]


def _points(groups: Sequence[Group]) -> list[list[tuple[float, float, str]]]:
    return [[(g.length, r.ms, f"{g.label}\n{r.config}\n{r.ms:.4f} ms") for r in g.timed] for g in groups if g.timed]


def _ratios(axis: str, groups: Sequence[Group]) -> str:
    """Every config's time over the fastest one's; those that win somewhere are followed across the lengths. Nothing for one length."""
    timed = [g for g in groups if g.timed]
    if len({g.length for g in timed}) < 2:
        return ""
    points = [
        [(g.length, r.ms / g.timed[0].ms, f"{g.label}\n{r.config}\n{r.ms / g.timed[0].ms:.3f} times") for r in g.timed] for g in timed
    ]
    paths: dict[str, list[tuple[float, float]]] = {g.timed[0].config: [] for g in timed}
    for g in timed:
        for r in g.timed:
            if r.config in paths:
                paths[r.config].append((g.length, r.ms / g.timed[0].ms))
    note = "<p>Each line is a config that is the fastest somewhere: where lines cross, another one takes over. Hover for the config.</p>"
    return note + chart(axis, points, "times the fastest", paths, [g.series for g in timed])


def _winners(groups: Sequence[Group]) -> str:
    chosen = [dict(word.partition("=")[::2] for word in g.timed[0].config.split()) for g in groups if g.timed]
    every = list(dict.fromkeys(name for choices in chosen for name in choices))
    shared = {name: chosen[0].get(name, "") for name in every if len(chosen) > 1 and len({c.get(name) for c in chosen}) == 1}
    names = [name for name in every if name not in shared]
    cells, waiting = [], iter(chosen)
    for g in groups:
        if not g.timed:
            cells.append([g.label, "", "none of its configs could be timed", *[""] * (3 + len(names))])
            continue
        choices = next(waiting)
        best, timing = g.timed[0], g.timed[0].timing
        ties = [r for r in g.timed[1:] if timing is not None and r.timing is not None and timing.ties(r.timing)]
        within = f"{len(ties)} more" if ties else "no other"
        errors = [text_of(e) for e in best.error] if best.error else ["", ""]
        own = [choices.get(name, "") for name in names]
        cells.append([g.label, f"{best.ms:.4f}", within, f"{g.timed[-1].ms / best.ms:.2f}", *errors, *own])
    note = "<p>Where others are within the noise of the fastest, calls take the first of them in order of declaration.</p>"
    if shared:
        note += f"<p>All winners have {escape(' '.join(f'{name}={value}' for name, value in shared.items()))}.</p>"
    columns = ["problem", "#ms", "within noise", "#slowest / fastest", "#error (norm)", "#error (worst)", *(f"#{name}" for name in names)]
    return note + table(columns, cells)


def _failures(groups: Sequence[Group]) -> str:
    reasons: dict[tuple[str, str], list[Row]] = {}
    for row in (r for g in groups for r in g.rows if r.status != OK):
        reasons.setdefault((row.status, row.reason), []).append(row)
    if not reasons:
        return "<p>Every config that was tried passed its check and was timed.</p>"
    # What went wrong comes before what a rule forbade.
    ordered = sorted(reasons.items(), key=lambda item: (item[0][0] == Status.rejected.name, -len(item[1])))
    cells = [[str(len(found)), status, reason, found[0].config] for (status, reason), found in ordered]
    columns, left = ["#configs", "status", "because", "for instance"], len(cells) - REASONS
    more = f"<details><summary>and for {left} more reasons</summary>{table(columns, cells[REASONS:])}</details>" if left > 0 else ""
    return table(columns, cells[:REASONS]) + more


def _resources(groups: Sequence[Group]) -> str:
    cells = [
        [g.label, r["kernel"], str(r["registers"]), str(r["spill_bytes"]), str(r["smem_bytes"])]
        for g in groups
        if g.timed
        for r in g.timed[0].resources
    ]
    columns = ["problem", "kernel", "#registers per thread", "#spilled bytes per thread", "#shared bytes per CTA"]
    return table(columns, cells) if cells else "<p>None noted.</p>"


def _noise(groups: Sequence[Group]) -> str:
    cells = []
    for g in groups:
        spreads = [r.timing.iqr_ms / r.timing.median_ms for r in g.timed if r.timing is not None and r.timing.median_ms > 0]
        if spreads:
            drift = f"{max(_drifts(g.timed)):.1%}" if any(r.reference_ms > 0 for r in g.timed) else ""
            cells.append([g.label, f"{statistics.median(spreads):.2%}", f"{max(spreads):.2%}", drift])
    note = (
        "<p>Interquartile range of a config's samples, relative to their median; "
        "and how far the times of a fixed reference kernel lie apart.</p>"
    )
    return note + table(["problem", "#typical", "#worst", "#drift of the GPU"], cells)


def _drifts(rows: Sequence[Row]) -> list[float]:
    """How far the reference kernel's times lie apart, GPU by GPU."""
    times: dict[str, list[float]] = {}
    for row in rows:
        if row.reference_ms > 0:
            times.setdefault(row.gpu, []).append(row.reference_ms)
    return [max(t) / min(t) - 1 for t in times.values()]


def _trials(groups: Sequence[Group]) -> str:
    parts = []
    for g in groups:
        cells = []
        for r in g.rows[:LISTED]:
            times = [f"{r.timing.median_ms:.4f}", f"{r.timing.iqr_ms:.4f}"] if r.timing is not None else ["", ""]
            cells.append([r.config, *times, r.status, r.reason])
        listing = table(["config", "#ms", "#IQR", "status", "because"], cells)
        more = f"<p>and {len(g.rows) - LISTED} more</p>" if len(g.rows) > LISTED else ""
        parts.append(f"<details><summary>{escape(g.label)}: {len(g.rows)} configs</summary>{listing}{more}</details>")
    return "\n".join(parts)
