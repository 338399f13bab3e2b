"""Is the sweep's answer right? Four questions to this machine's GPU, three about power retention, one about flash attention:

    python -m vidrial.sweeps.validate               # all four, within about 6 minutes
    python -m vidrial.sweeps.validate --cold        # seconds that a sweep of 48 configs takes, nothing compiled
    python -m vidrial.sweeps.validate --search      # a search within a budget beside an exhaustive one, three problems
    python -m vidrial.sweeps.validate --lengths     # at 40 random lengths: the config that a call picks beside the best kept one
    python -m vidrial.sweeps.validate --shapes      # the same of flash attention, at 40 random batches, heads and lengths

Each writes its part of results/<device key>/validation.json after every case, and copies that to $OUT: what was found is there whatever
comes after. `--seconds` is for everything; what does not fit into it is left out, and the record says over how much it ran.
`--lengths` and `--shapes` need the rankings that `vidrial.sweeps.power_retention` and `vidrial.sweeps.flash_attention` write.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vidrial import Device, Op, Stage, SweepError, VidrialError, describe
from vidrial.build.cubins import build_many
from vidrial.build.nvrtc import Cubin
from vidrial.kernels.flash_attention.op import example as flash_example
from vidrial.kernels.flash_attention.op import op as flash_op
from vidrial.kernels.power_retention.op import Config, example, op, rules
from vidrial.kernels.power_retention.problem import Problem
from vidrial.spec.fields import fields
from vidrial.spec.registry import reference_of
from vidrial.sweeps.common import RESULTS, C, Case, P, copy_journal, copy_out, facts, table, this_device, write_json
from vidrial.sweeps.flash_attention import facts as flash_facts
from vidrial.tune import Choice, Status, choose_config, forget, latest, shipped, sweep, top_configs
from vidrial.tune.search import Search
from vidrial.tune.workers import CUDA_BENCH, Job, Workers

BENCH = CUDA_BENCH
JOBS, TRIALS, LIMIT = 16, 48, 20.0
SEARCH_CASES: tuple[Case, ...] = ({"t": 10007}, {"t": 4096, "b": 8}, {"t": 1000})
LENGTHS, SHORTEST, LONGEST, SEED, ROUNDS = 40, 65, 20000, 4, 20
COLD_CASE: Case = {"t": 10007}
# Of a problem's time in the search: for the search within a budget; kept back for timing both winners in turn, in seconds.
BUDGETED_SHARE, REMATCH_SECONDS = 0.45, 4.0
# Of the time for the lengths: for compiling.
COMPILE_SHARE = 0.5
# Values of each choice that the exhaustive search tries; its parts are varied one at a time, since their times add.
REDUCED: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "": {"chunk": (0, 512, 1024, 2048)},
    "scan": {"tokens": (64, 32), "stages": (3, 4), "columns": (64,), "segments": (1, 4, 8)},
    "attend": {"m": (2,), "blocks": (1, 2), "stages": (2, 3)},
}


def reduced_rules(p: Problem, c: Config) -> Iterator[tuple[bool, str]]:
    """The op's own rules, and the reduced space."""
    yield from rules(p, c)
    for part, values in REDUCED.items():
        chosen = getattr(c, part) if part else c
        for name, accepted in values.items():
            yield getattr(chosen, name) in accepted, f"{part}.{name} is not in the reduced space"


reduced_op = dataclasses.replace(op, name="power_retention_reduced", rules=reduced_rules)


def cold(seconds: float, device: Device) -> Iterator[dict[str, Any]]:
    """Seconds of one sweep of TRIALS configs with nothing compiled."""
    begin = time.monotonic()
    result = sweep(op, example(**COLD_CASE), trials=TRIALS, seconds=seconds, jobs=JOBS, limit=LIMIT, progress=False)
    taken, tried = time.monotonic() - begin, len(latest(result.trials))
    copy_journal(result.journal, device, os.environ.get("OUT"))
    yield {"case": COLD_CASE, "seconds": round(taken, 1), "configs": tried, "asked": TRIALS, "jobs": JOBS, "cores": os.cpu_count(),
           "winner": describe(result.winner.config), "ms": result.winner.ms, "failures": {s.name: n for s, n in result.failures.items()},
           "notes": list(result.notes), "bound": 30.0, "complete": tried >= TRIALS}  # fmt: skip


def search(seconds: float, device: Device) -> Iterator[dict[str, Any]]:
    """Per problem: the winner of a search of TRIALS configs over that of an exhaustive one, both timed again in turn."""
    begun, cases = time.monotonic(), list[dict[str, Any]]()
    for i, case in enumerate(SEARCH_CASES):
        left = seconds - (time.monotonic() - begun)
        if left < REMATCH_SECONDS and cases:
            break
        # The first one compiles for all.
        share = left * (1.5 if i == 0 else 1.0) / (len(SEARCH_CASES) - i + (0.5 if i == 0 else 0.0))
        cases.append(compare(case, max(share, REMATCH_SECONDS), device))
        told = cases[-1]
        how = "all there are" if told["exhaustive_complete"] else f"at least {told['exhaustive_left']} more were left for lack of time"
        print(
            f"  {told['case']}: {told['ratio']} times the best of {told['exhaustive_configs']} configs, one part varied at a time: {how}",
            flush=True,
        )
        ratios = [c["ratio"] for c in cases if c["ratio"] is not None]
        yield {"cases": cases, "worst": max(ratios, default=None), "bound": 1.03, "asked": len(SEARCH_CASES),
               "complete": len(cases) == len(SEARCH_CASES) and all(c["exhaustive_complete"] for c in cases)}  # fmt: skip


def compare(case: Case, seconds: float, device: Device) -> dict[str, Any]:
    """One problem, searched within a budget; then the rest of the space, as far as the time goes; then both winners in turn."""
    problem, common = example(**case), {"jobs": JOBS, "limit": LIMIT, "progress": False}
    begin = time.monotonic()
    budgeted = sweep(reduced_op, problem, trials=TRIALS, seconds=BUDGETED_SHARE * seconds, **common)  # type: ignore[arg-type]
    left = max(seconds - REMATCH_SECONDS - (time.monotonic() - begin), 1.0)
    whole = sweep(reduced_op, problem, exhaustive=True, resume=True, seconds=left, **common)  # type: ignore[arg-type]
    ours, best, tried = budgeted.winner.config, whole.winner.config, latest(whole.trials)
    copy_journal(whole.journal, device, os.environ.get("OUT"))
    rest = Search(reduced_op, problem, device, sys.maxsize, exhaustive=True).propose({c: t.ms for c, t in tried.items()})
    ratio = 1.0
    if ours != best:
        again = latest(sweep(reduced_op, problem, configs=[best, ours], **common).trials)  # type: ignore[arg-type]
        ratio = again[ours].ms / again[best].ms
    return {
        "case": dict(case), "ratio": round(ratio, 4) if math.isfinite(ratio) else None, "ms": whole.winner.ms,
        "budgeted": describe(ours), "exhaustive": describe(best), "budgeted_configs": len(latest(budgeted.trials)),
        "exhaustive_configs": len(tried), "exhaustive_left": len(rest), "exhaustive_complete": not rest,
        "combinations": len(reduced_op.space(problem, device, limit=sys.maxsize)),
        "budgeted_seconds": round(budgeted.seconds, 1), "exhaustive_seconds": round(whole.seconds, 1), "notes": list(whole.notes),
    }  # fmt: skip


def lengths(seconds: float, device: Device) -> Iterator[dict[str, Any]]:
    """Power retention at random lengths: what a call picks over the fastest of the kept candidates, timed in turn."""
    problems = [example(t=t) for t in random.Random(SEED).sample(range(SHORTEST, LONGEST + 1), LENGTHS)]
    return picks_beside_kept(op, problems, lambda p: {"t": p.t}, seconds, device)


def shapes(seconds: float, device: Device) -> Iterator[dict[str, Any]]:
    """Flash attention at random batches, heads and lengths, two head sizes, both masks: as `--lengths`."""
    rng, families = random.Random(SEED), [(d, causal) for d in (128, 64) for causal in (True, False)]
    problems = []
    for i in range(LENGTHS):
        (d, causal), t = families[i % len(families)], round(math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST))))
        # About as many tokens as the longest has, at most: short sequences come in batches.
        b, h = rng.randint(1, max(1, min(32, LONGEST // t))), rng.choice((4, 8, 12, 16, 32))
        problems.append(flash_example(t=t, b=b, h=h, d=d, causal=causal))
    return picks_beside_kept(flash_op, problems, flash_facts, seconds, device)


def picks_beside_kept(
    op: Op[P, C], problems: Sequence[P], facts: Callable[[P], Mapping[str, object]], seconds: float, device: Device
) -> Iterator[dict[str, Any]]:
    """Of each problem what a call picks, with an empty cache, and the candidates that shipped rankings keep, timed in turn.

    Raises:
        SweepError: nothing is shipped for these problems, or none was timed in time.
    """
    begun, rows, failed = time.monotonic(), list[dict[str, Any]](), list[str]()
    measured = [m for r in shipped(op, device.key) for m in r.measured]
    kept = {
        family: top_configs(m for m in measured if static_facts(m.problem) == family)
        for family in dict.fromkeys(map(static_facts, problems))
    }
    if not any(kept.values()):
        raise SweepError(f"no ranking of these templates is shipped for {device.key}; run python -m vidrial.sweeps.{op.name} first")
    with tempfile.TemporaryDirectory(prefix="vidrial-empty-") as empty, using_cache(empty):
        picks = {p: choose_config(op, p, device) for p in problems}
        origins = Counter(choose_config(op, m.problem, device).origin for m in measured if static_facts(m.problem) in kept)
    asked = {p: [c for c in dict.fromkeys([picks[p].config, *kept[static_facts(p)]]) if legal(op, p, c, device)] for p in problems}
    built = compiled(op, asked, device, begun + COMPILE_SHARE * seconds)
    print(f"  compiled after {time.monotonic() - begun:.0f} s", flush=True)
    with Workers(reference_of(op), BENCH, (0,), Job("prepare", problems[0], op.small(problems[0])), LIMIT) as workers:
        for problem in problems:
            chosen, named = picks[problem], " ".join(f"{name}={value}" for name, value in facts(problem).items())
            configs = [c for c in asked[problem] if stages(op, problem, c).keys() <= built]
            if time.monotonic() - begun > seconds or chosen.config not in configs:
                continue
            ((_, reply),) = workers.run([Job("time", problem, problem, tuple(configs), rounds=ROUNDS)])
            if reply.status is not Status.ok:
                failed.append(f"{named}: {reply.status.name}: {reply.reason}")
                continue
            rows.append({**facts(problem), **row(chosen, configs, reply.timings)})
            ratios = [r["ratio"] for r in rows]
            print(f"  {len(rows)}: {named} {rows[-1]['ratio']:.3f} of {len(configs)} candidates ({chosen.origin})", flush=True)
            names = [describe(c) for found in kept.values() for c in found]
            yield {"shipped_problems": dict(origins), "kept": names, "lengths": rows, "asked": len(problems), "failed": failed,
                   "geometric_mean": math.exp(sum(map(math.log, ratios)) / len(ratios)), "worst": max(ratios), "bound": 1.05,
                   "complete": len(rows) == len(problems)}  # fmt: skip
    if not rows:
        raise SweepError(f"no length was timed within {seconds:.0f} s: {'; '.join(failed) or 'the picks were not compiled in time'}")


def row(chosen: Choice[Any], configs: Sequence[Any], timings: Sequence[Any]) -> dict[str, Any]:
    """What is kept of one problem; the first config is the one that was picked."""
    mine, best = timings[0], min(range(len(configs)), key=lambda i: timings[i].median_ms)
    return {
        "origin": chosen.origin, "ratio": mine.median_ms / timings[best].median_ms, "ms": mine.median_ms,
        "best_ms": timings[best].median_ms, "noise": mine.noise_ms / mine.median_ms, "picked": describe(configs[0]),
        "best": describe(configs[best]), "candidates": len(configs),
    }  # fmt: skip


def static_facts(problem: Any) -> tuple[object, ...]:
    """What a problem shares with others of the same binaries."""
    return tuple(fields(problem, "static").values())


def legal(op: Op[P, C], problem: P, config: C, device: Device) -> bool:
    """Whether a config may run on a problem."""
    return op.reject(problem, config, device) is None


def stages(op: Op[P, C], problem: P, config: C) -> dict[Any, Stage]:
    """What a config runs, by what decides its binary: sources do not depend on the length."""
    return {s.binary: s for s in op.stages(problem, config)}


def compiled(op: Op[P, C], asked: Mapping[P, Sequence[C]], device: Device, until: float) -> set[Any]:
    """Compile of each problem's configs the first ones, then the others, until that time; the binaries that are there."""
    first = {key: s for p, configs in asked.items() for key, s in stages(op, p, configs[0]).items()}
    others = {key: s for p, configs in asked.items() for c in configs[1:] for key, s in stages(op, p, c).items()}
    built: set[Any] = set()
    sources = {key: (s.kernel.source(s.problem, s.config), describe(s.config)) for key, s in (first | others).items()}
    with contextlib.closing(build_many(sources, device.arch, JOBS)) as results:  # type: ignore[type-var]
        for key, result in results:
            if isinstance(result, Cubin):
                built.add(key)
            if time.monotonic() > until:
                break
    return built


@contextlib.contextmanager
def using_cache(folder: str) -> Iterator[None]:
    """Vidrial's cache lies in `folder` meanwhile."""
    before = os.environ.get("VIDRIAL_CACHE_DIR")
    os.environ["VIDRIAL_CACHE_DIR"] = folder
    forget()
    try:
        yield
    finally:
        if before is None:
            del os.environ["VIDRIAL_CACHE_DIR"]
        else:
            os.environ["VIDRIAL_CACHE_DIR"] = before
        forget()


# In this order, what the first ones compile serves the others; seconds of the usual total.
PARTS: Mapping[str, tuple[Callable[[float, Device], Iterator[dict[str, Any]]], float]] = {
    "cold": (cold, 45.0), "search": (search, 165.0), "lengths": (lengths, 80.0), "shapes": (shapes, 80.0)}  # fmt: skip


def run(name: str, seconds: float, results: Path, device: Device) -> dict[str, Any]:
    """One part: its record is in the file, and in $OUT, after every case; the last one, with `error` if it ended by one."""
    path, begin = results / device.key / "validation.json", time.monotonic()
    found, of = dict[str, Any](), facts(device, "vidrial.sweeps.validate")

    def keep() -> None:
        found["run"] = of | {"seconds": round(time.monotonic() - begin, 1)}
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        copy_out([write_json(path, known | {name: found})], os.environ.get("OUT"))

    try:
        for record in PARTS[name][0](seconds, device):
            found = dict(record)
            keep()
    except VidrialError as error:
        # The other parts' answers do not depend on this one's.
        print(f"  {name} ended early: {error}", flush=True)
        found["error"] = str(error)
        keep()
    return found


def line(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    """A part's result as a line of the last table: what was asked, found, its bound, whether it holds, over what it ran, seconds."""
    value: float | None = None
    if name == "cold":
        asked, value, text = f"cold sweep of {TRIALS} configs", found.get("seconds"), "{:.1f} s"
        over = f"{found.get('configs', 0)} configs on {found.get('cores', os.cpu_count())} cores"
    elif name == "search":
        asked, value, text = "budgeted search / exhaustive, worst", found.get("worst"), "{:.3f}"
        every = ", ".join(f"{c['budgeted_configs']} of {c['exhaustive_configs']}{'' if c['exhaustive_complete'] else '+'}"
                          for c in found.get("cases", ()))  # fmt: skip
        over = f"{len(found.get('cases', ()))} problems: {every} configs"
    else:
        of = "power retention" if name == "lengths" else "flash attention"
        asked, value, text = f"pick / best kept, geometric mean, {of}", found.get("geometric_mean"), "{:.3f}"
        over = f"{len(found.get('lengths', ()))} {name}, worst {found.get('worst', math.nan):.3f}"
    over += f"; ended early: {found['error'][:80]}" if "error" in found else ""
    bound = found.get("bound")
    holds = "" if value is None or bound is None else "yes" if value <= bound else "NO"
    holds += "" if found.get("complete") or not holds else " so far"
    told = "-" if value is None else text.format(value)
    return asked, told, "-" if bound is None else f"{bound:g}", holds or "-", f"{found['run']['seconds']:.0f}", over


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (part, usual) in PARTS.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"{part.__doc__} ({usual:g} s)")
    parser.add_argument("--seconds", type=float, help="for everything asked for, about")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    device = this_device()
    wanted = [name for name in PARTS if getattr(options, name)] or list(PARTS)
    usual = sum(PARTS[name][1] for name in wanted)
    begun, total, lines = time.monotonic(), options.seconds or usual, list[tuple[str, ...]]()
    with tempfile.TemporaryDirectory(prefix="vidrial-validate-") as cache, using_cache(cache):
        for i, name in enumerate(wanted):
            # What an earlier part left over, or took too much, is the later ones'.
            left = total - (time.monotonic() - begun)
            seconds = max(left * PARTS[name][1] / sum(PARTS[n][1] for n in wanted[i:]), 1.0)
            print(f"{name}, within {seconds:.0f} s", flush=True)
            lines.append(line(name, run(name, seconds, options.results, device)))
    print(f"\n{table(('question', 'found', 'at most', 'holds', 'seconds', 'over'), lines)}")
    print(f"{time.monotonic() - begun:.0f} s in all; {options.results / device.key / 'validation.json'}")


if __name__ == "__main__":
    main()
