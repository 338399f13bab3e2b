"""The sweep's page: one HTML file that needs no network, from journals or from trials in memory.

The problem of a trial is here its facts by name, and its config a line of text: a journal is reported whether or not its op is there.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vidrial.build.files import writing
from vidrial.device import TABLE, Device
from vidrial.errors import SweepError
from vidrial.report.page import Section, Table, chart, page
from vidrial.spec.choices import describe
from vidrial.spec.op import Op
from vidrial.tune.codec import decode, encode
from vidrial.tune.journal import SET_ASIDE, read_journal
from vidrial.tune.trial import PlainTrial, Status, Trial, latest

LISTED, REASONS = 400, 20  # configs of one problem in the table of all trials; reasons of failures that are shown at once


def plain(trial: Trial[Any, Any]) -> PlainTrial:
    """A trial in memory as a journal gives it without its op."""
    return Trial.from_plain_json(encode(trial))


def read_journals(paths: Sequence[Path]) -> list[PlainTrial]:
    """The trials of journals, of files or of folders of `.jsonl` files; a torn last line, as of a sweep that goes on, is left out.

    Of a folder, journals that a newer sweep of the same thing has set aside are left out as well.

    Raises:
        SweepError: a file cannot be read, is no journal, is of another schema, or is damaged before its last line.
    """
    trials: list[PlainTrial] = []
    for path in paths:
        for file in sorted(f for f in path.glob("**/*.jsonl") if not SET_ASIDE.search(f.name)) if path.is_dir() else [path]:
            try:
                data = file.read_bytes()
            except OSError as error:
                raise SweepError(f"journal {file} cannot be read: {error}") from None
            trials += read_journal(file, data, Trial.from_plain_json)[1]
    if not trials:
        rankings = [file.name for path in paths if path.is_dir() for file in path.glob("**/*.json")]
        held = f"rankings ({rankings[0]}), which keep the fastest alone" if rankings else "no journal (*.jsonl)"
        raise SweepError(
            f"no trial to report in {', '.join(map(str, paths))}: it has {held}; a report is of a sweep's journal: vidrial sweep OP, or name other ones"
        )
    return trials


def rejected_trials(op: Op[Any, Any], trials: Sequence[PlainTrial]) -> list[PlainTrial]:
    """What the op's rules forbid for the problems of `trials`, for devices of the table or of this machine: a sweep does not note that."""
    devices = {device.key: device for device in (Device.default(), *TABLE)}
    made = []
    for known in {json.dumps([t.device, t.problem]): t for t in trials if t.op == op.name and t.device in devices}.values():
        space = op.space(decode(op.problem, known.problem), devices[known.device], limit=0)
        blank: PlainTrial = Trial(
            op.name, known.problem, "", Status.rejected, device=known.device, versions=known.versions, time=known.time, gpu=known.gpu
        )
        made += [replace(blank, config=describe(r.config), reason=r.reason) for r in space.rejected]
    return made


@dataclass(frozen=True)
class Group:
    """The trials of one problem on one device, one per config, fastest first; `label` tells it from the others, `length` places it.

    `series`: what it shares with others that differ in length only; a line joins these.
    """

    label: str
    length: float
    trials: tuple[PlainTrial, ...]
    series: str = ""

    @property
    def timed(self) -> tuple[PlainTrial, ...]:
        """Those that were checked and timed."""
        return tuple(trial for trial in self.trials if trial.ok)


def group(trials: Iterable[PlainTrial]) -> tuple[str, list[Group]]:
    """(what the lengths are, the groups by rising length). The axis is the number that differs most among the problems."""
    problems: dict[str, list[PlainTrial]] = {}
    for trial in trials:
        problems.setdefault(json.dumps([trial.op, trial.device, trial.problem], sort_keys=True), []).append(trial)
    facts = [
        {"op": t.op, "device": t.device} | {k: v for k, v in t.problem.items() if not isinstance(v, list)} for t, *_ in problems.values()
    ]

    def kinds(names: Sequence[str]) -> int:
        """How many problems these facts tell apart."""
        return len({tuple(str(fact.get(n)) for n in names) for fact in facts})

    differ = [n for n in dict.fromkeys(name for fact in facts for name in fact) if kinds([n]) > 1]
    numeric = [n for n in differ if all(type(fact.get(n)) in (int, float) for fact in facts)]
    axis = max(numeric, key=lambda n: kinds([n])) if numeric else next((n for n in ("t", "n") if n in facts[0]), "problem")
    # Of the other facts the ones that tell problems apart which those before them do not.
    apart: list[str] = []
    for name in differ:
        if name != axis and kinds([*apart, name]) > kinds(apart):
            apart.append(name)
    names, groups = [n for n in differ if n == axis or n in apart] or [axis], []
    for number, (fact, found) in enumerate(zip(facts, problems.values(), strict=True), 1):
        label = ", ".join(f"{n}={fact.get(n)}" for n in names if n in fact) or f"problem {number}"
        ordered = tuple(sorted(latest(found).values(), key=lambda trial: trial.ms))
        groups.append(Group(label, float(fact.get(axis, number)), ordered, ", ".join(f"{n}={fact.get(n)}" for n in apart)))
    return axis, sorted(groups, key=lambda g: (g.length, g.label))


def write_report(trials: Sequence[PlainTrial], out: Path) -> Path:
    """Write the page and return its path.

    Raises:
        SweepError: there is nothing to report. ArgumentError: the file cannot be written.
    """
    if not trials:
        raise SweepError("no trial to report; sweep first")
    axis, groups = group(trials)
    measured = [_winners(groups), _times(axis, groups), *_ratios(axis, groups)]
    sections = [*measured, _failures(groups), _resources(groups), _noise(groups), _all(groups)]
    with writing(out, "--out"):
        out.write_text(page(title(trials), _summary(trials, groups), sections), encoding="utf-8")
    return out


def title(trials: Sequence[PlainTrial]) -> str:
    """What was swept, on which devices."""
    names = {device.key: f"{device.name} ({device.key})" for device in TABLE}
    return f"{', '.join(sorted({t.op for t in trials}))} on {', '.join(sorted({names.get(t.device, t.device) for t in trials}))}"


def _summary(trials: Sequence[PlainTrial], groups: Sequence[Group]) -> list[str]:
    counts = {s.name: sum(t.status is s for g in groups for t in g.trials) for s in Status}
    times, gpus = sorted(t.time for t in trials if t.time), sorted({t.gpu for t in trials if t.gpu})
    lines = [
        f"{len(groups)} problem{'s' * (len(groups) != 1)}, {sum(len(g.trials) for g in groups)} configs: "
        + ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    ]
    lines += [f"{times[0]} to {times[-1]}"] if times else []
    lines += [f"measured by GPUs {', '.join(gpus)}"] if len(gpus) > 1 else []
    return lines + sorted({t.versions for t in trials if t.versions})


def _winners(groups: Sequence[Group]) -> Section:
    chosen = [dict(word.partition("=")[::2] for word in g.timed[0].config.split()) for g in groups if g.timed]
    every = list(dict.fromkeys(name for choices in chosen for name in choices))
    shared = {name: chosen[0].get(name, "") for name in every if len(chosen) > 1 and len({c.get(name) for c in chosen}) == 1}
    names = [name for name in every if name not in shared]
    cells, waiting = [], iter(chosen)
    for g in groups:
        if not g.timed:
            cells.append([g.label, "", "none of its configs could be timed", *[""] * (3 + len(names))])
            continue
        choices, best = next(waiting), g.timed[0]
        ties = sum(t.timing is not None and best.timing is not None and best.timing.ties(t.timing) for t in g.timed[1:])
        errors = [f"{best.check.relative:.3g}", f"{best.check.max_error:.3g}"] if best.check else ["", ""]
        own = [choices.get(name, "") for name in names]
        within = f"{ties} more" if ties else "no other"
        cells.append([g.label, f"{best.ms:.4f}", within, f"{g.timed[-1].ms / best.ms:.2f}", *errors, *own])
    notes = ["Where others are within the noise of the fastest, calls take the first of them in order of declaration."]
    notes += [f"All winners have {' '.join(f'{name}={value}' for name, value in shared.items())}."] if shared else []
    columns = ["problem", "#ms", "within noise", "#slowest / fastest", "#error (norm)", "#error (worst)", *(f"#{name}" for name in names)]
    return Section("Winners", notes, tables=[Table(columns, cells)])


def _times(axis: str, groups: Sequence[Group]) -> Section:
    timed = [g for g in groups if g.timed]
    points = [[(g.length, t.ms, f"{g.label}\n{t.config}\n{t.ms:.4f} ms") for t in g.timed] for g in timed]
    drawn = chart(axis, points, series=[g.series for g in timed])
    note = "Blue: the fastest; grey: every other config that passed its check. Both axes are logarithmic; hover for the config."
    return Section(f"Time of every config by {axis}", [note if drawn else "No config was timed."], drawn)


def _ratios(axis: str, groups: Sequence[Group]) -> list[Section]:
    """Every config's time over the fastest one's; those that win somewhere are followed across the lengths. Nothing for one length."""
    timed = [g for g in groups if g.timed]
    if len({g.length for g in timed}) < 2:
        return []
    points, paths = [], dict[str, list[tuple[float, float]]]((g.timed[0].config, []) for g in timed)
    for g in timed:
        ratios = [(t.config, t.ms / g.timed[0].ms) for t in g.timed]
        points.append([(g.length, ratio, f"{g.label}\n{config}\n{ratio:.3f} times") for config, ratio in ratios])
        for config, ratio in ratios:
            if config in paths:
                paths[config].append((g.length, ratio))
    note = "Each line is a config that is the fastest somewhere: where lines cross, another one takes over. Hover for the config."
    return [Section("How much slower than the fastest", [note], chart(axis, points, "times the fastest", paths, [g.series for g in timed]))]


def _failures(groups: Sequence[Group]) -> Section:
    heading, reasons = "What failed or was rejected, and why", dict[tuple[str, str], list[PlainTrial]]()
    for trial in (t for g in groups for t in g.trials if t.status is not Status.ok):
        reasons.setdefault((trial.status.name, trial.reason), []).append(trial)
    if not reasons:
        return Section(heading, ["Every config that was tried passed its check and was timed."])
    # What went wrong comes before what a rule forbade.
    ordered = sorted(reasons.items(), key=lambda item: (item[0][0] == Status.rejected.name, -len(item[1])))
    cells = [[str(len(found)), status, reason, found[0].config] for (status, reason), found in ordered]
    columns, left = ["#configs", "status", "because", "for instance"], len(cells) - REASONS
    more = [Table(columns, cells[REASONS:], f"and for {left} more reasons")] if left > 0 else []
    return Section(heading, tables=[Table(columns, cells[:REASONS]), *more])


def _resources(groups: Sequence[Group]) -> Section:
    taken = [(g.label, r) for g in groups for t in g.timed[:1] for r in t.resources]
    cells = [[label, r.kernel, str(r.registers), str(r.spill_bytes), str(r.smem_bytes)] for label, r in taken]
    columns = ["problem", "kernel", "#registers per thread", "#spilled bytes per thread", "#shared bytes per CTA"]
    return Section("Resources of the winners", [] if cells else ["None noted."], tables=[Table(columns, cells)] if cells else [])


def _noise(groups: Sequence[Group]) -> Section:
    cells = []
    for g in groups:
        spreads = [t.timing.iqr_ms / t.timing.median_ms for t in g.timed if t.timing is not None and t.timing.median_ms > 0]
        if spreads:
            # How far the reference kernel's times lie apart, GPU by GPU.
            told = sorted((t.gpu, t.reference_ms) for t in g.timed if t.reference_ms > 0)
            times = [[ms for _, ms in of_gpu] for _, of_gpu in itertools.groupby(told, key=lambda entry: entry[0])]
            drift = f"{max(max(t) / min(t) - 1 for t in times):.1%}" if times else ""
            cells.append([g.label, f"{statistics.median(spreads):.2%}", f"{max(spreads):.2%}", drift])
    note = (
        "Interquartile range of a config's samples, relative to their median; and how far the times of a fixed reference kernel lie apart."
    )
    return Section("Noise", [note], tables=[Table(["problem", "#typical", "#worst", "#drift of the GPU"], cells)])


def _all(groups: Sequence[Group]) -> Section:
    tables = []
    for g in groups:
        shown = [(t, t.timing) for t in g.trials[:LISTED]]
        cells = [[t.config, *((f"{x.median_ms:.4f}", f"{x.iqr_ms:.4f}") if x else ("", "")), t.status.name, t.reason] for t, x in shown]
        more = f", the first {LISTED} here" if len(g.trials) > LISTED else ""
        tables.append(Table(["config", "#ms", "#IQR", "status", "because"], cells, f"{g.label}: {len(g.trials)} configs{more}"))
    return Section("All trials", tables=tables)
