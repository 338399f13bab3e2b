"""Is the sweep's answer right? Three questions to this machine's GPU, about power retention:

    python -m vidrial.sweeps.validate --search      # a search within a budget beside an exhaustive one, three problems; 4 minutes
    python -m vidrial.sweeps.validate --lengths     # at 40 random lengths: the config that a call picks beside the best kept one; 2 minutes
    python -m vidrial.sweeps.validate --cold        # seconds that a sweep of 48 configs takes, nothing compiled; a minute

Each begins with an empty cache of its own, writes its part of results/<device key>/validation.json, and copies that to $OUT.
`--lengths` needs the ranking that `vidrial.sweeps.power_retention` writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vidrial.kernels.power_retention.op import Config, Problem, example, op, rules
from vidrial.sweeps.common import RESULTS, copy_out, facts, table, this_device, write_json

from vidrial.bench import CudaBench
from vidrial.build import build_many
from vidrial.device import Device
from vidrial.ranking import forget, leading, pick, shipped
from vidrial.space import describe
from vidrial.sweep import sweep
from vidrial.trial import latest
from vidrial.worker import Job

JOBS, TRIALS, SEARCH_CASES = 16, 48, ({"t": 10007}, {"t": 4096, "b": 8}, {"t": 1000})
LENGTHS, SHORTEST, LONGEST, SEED, ROUNDS = 40, 65, 20000, 4, 20
COLD_CASE = {"t": 10007}
# Values of each choice that the exhaustive search tries; its parts are varied one at a time, since their times add.
REDUCED: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "": {"chunk": (0, 512, 1024, 2048)},
    "scan": {"tokens": (64, 32), "stages": (3, 4), "columns": (64,), "segments": (1, 2, 4)},
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


def search(seconds: float) -> dict[str, Any]:
    """Per problem: the winner of a search of TRIALS configs over that of an exhaustive one, both timed again in turn."""
    cases: list[dict[str, Any]] = []
    for i, case in enumerate(SEARCH_CASES):
        problem, share = example(**case), seconds / len(SEARCH_CASES)
        common: dict[str, Any] = {"jobs": JOBS, "limit": 20.0, "progress": False}
        budgeted = sweep(reduced_op, problem, trials=TRIALS, **common)
        # The first one compiles for all.
        whole = sweep(reduced_op, problem, exhaustive=True, seconds=share * (1.4 if i == 0 else 0.8), **common)
        ours, best = budgeted.winner.config, whole.winner.config
        ratio = 1.0
        if ours != best:
            again = latest(sweep(reduced_op, problem, configs=[best, ours], **common).trials)
            ratio = again[ours].ms / again[best].ms
        cases.append({
            "case": case, "ratio": ratio, "budgeted": describe(ours), "exhaustive": describe(best), "ms": whole.winner.ms,
            "budgeted_configs": len(latest(budgeted.trials)), "exhaustive_configs": len(latest(whole.trials)),
            "budgeted_seconds": round(budgeted.seconds, 1), "exhaustive_seconds": round(whole.seconds, 1),
        })  # fmt: skip
        print(f"  {case}: {ratio:.3f}", flush=True)
    return {"cases": cases, "worst": max(case["ratio"] for case in cases), "bound": 1.03}


def lengths(seconds: float) -> dict[str, Any]:
    """At random lengths, what a call picks over the fastest of the kept candidates, timed in turn."""
    device, begun = this_device(), time.monotonic()
    random_lengths = random.Random(SEED).sample(range(SHORTEST, LONGEST + 1), LENGTHS)
    problems = [example(t=t) for t in random_lengths]
    static = {name: getattr(problems[0], name) for name in ("dtype", "d", "e", "degree", "gated", "normalized")}
    measured = [m for r in shipped(op, device.key) for m in r.measured if all(getattr(m.problem, k) == v for k, v in static.items())]
    if not measured:
        raise SystemExit(f"no ranking is shipped for {device.key}; run python -m vidrial.sweeps.power_retention first")
    origins = Counter(pick(op, m.problem, device).origin for m in measured)
    kept, picks = leading(measured), {p.t: pick(op, p, device) for p in problems}
    legal = {p.t: [c for c in dict.fromkeys([picks[p.t].config, *kept]) if op.reject(p, c, device) is None] for p in problems}
    # Sources do not depend on the length; whether there is a state is one of their facts.
    every = (stage for p in problems for c in legal[p.t] for stage in op.stages(p, c))
    stages = {(s.kernel.name, s.config, getattr(s.problem, "stateful", None)): s for s in every}
    list(build_many({key: (s.kernel.source(s.problem, s.config), "") for key, s in stages.items()}, device.arch, JOBS))
    bench, rows = CudaBench(op, 0), list[dict[str, Any]]()
    bench.prepare(problems[0], op.small(problems[0]), (0,))
    for problem in problems:
        if time.monotonic() - begun > seconds:
            break
        configs = legal[problem.t]
        job = Job("time", problem, configs=tuple(configs), rounds=ROUNDS)
        timings, _ = bench.measure(problem, configs, job, lambda _: None)
        best = min(range(len(configs)), key=lambda i: timings[i].median_ms)
        rows.append({
            "t": problem.t, "origin": picks[problem.t].origin, "ratio": timings[0].median_ms / timings[best].median_ms,
            "ms": timings[0].median_ms, "best_ms": timings[best].median_ms, "noise": timings[0].noise_ms / timings[0].median_ms,
            "picked": describe(configs[0]), "best": describe(configs[best]), "candidates": len(configs),
        })  # fmt: skip
    ratios = [row["ratio"] for row in rows]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return {"shipped_problems": dict(origins), "kept": [describe(c) for c in kept], "lengths": rows, "asked": LENGTHS,
            "geometric_mean": mean, "worst": max(ratios), "bound": 1.05}  # fmt: skip


def cold(seconds: float) -> dict[str, Any]:
    """Seconds of one sweep with nothing compiled."""
    begin = time.monotonic()
    result = sweep(op, example(**COLD_CASE), trials=TRIALS, jobs=JOBS, limit=20.0, progress=False)
    taken = time.monotonic() - begin
    return {"case": COLD_CASE, "seconds": round(taken, 1), "configs": len(latest(result.trials)), "jobs": JOBS, "cores": os.cpu_count(),
            "winner": describe(result.winner.config), "ms": result.winner.ms, "failures": {s.name: n for s, n in result.failures.items()},
            "bound": 30.0}  # fmt: skip


PARTS: Mapping[str, tuple[Callable[[float], dict[str, Any]], float]] = {
    "search": (search, 240.0), "lengths": (lengths, 120.0), "cold": (cold, 90.0)}  # fmt: skip


def run(name: str, seconds: float | None, results: Path, device: Device) -> dict[str, Any]:
    """One part, with an empty cache; its record is in the file before the next one begins."""
    part, usual = PARTS[name]
    path = results / device.key / "validation.json"
    with tempfile.TemporaryDirectory(prefix="vidrial-validate-") as cache:
        os.environ["VIDRIAL_CACHE_DIR"] = cache
        forget()
        begin = time.monotonic()
        found = part(seconds or usual) | {"run": facts(device, "vidrial.sweeps.validate")}
        found["run"]["seconds"] = round(time.monotonic() - begin, 1)
    known = json.loads(path.read_text()) if path.is_file() else {}
    copy_out([write_json(path, known | {name: found})], os.environ.get("OUT"))
    return found


def show(name: str, found: dict[str, Any]) -> str:
    """A part's result as text."""
    took = f"{found['run']['seconds']:.0f} s"
    if name == "search":
        cases = [(" ".join(f"{k}={v}" for k, v in c["case"].items()), f"{c['ratio']:.3f}", f"{c['ms']:.4f}", c["budgeted_configs"],
                  c["exhaustive_configs"], c["budgeted_seconds"], c["exhaustive_seconds"], c["budgeted"]) for c in found["cases"]]  # fmt: skip
        text = table(("case", "ratio", "ms", "configs", "of", "s", "of", "budgeted winner"), cases)
        return f"{text}\nworst {found['worst']:.3f} (at most {found['bound']}), {took}"
    if name == "lengths":
        worst = sorted(found["lengths"], key=lambda row: -row["ratio"])[:5]
        lines = [(w["t"], w["origin"], f"{w['ratio']:.3f}", f"{w['ms']:.4f}", f"{w['noise']:.1%}", w["picked"], w["best"]) for w in worst]
        text = table(("T", "origin", "ratio", "ms", "noise", "picked", "best"), lines)
        said = f"geometric mean {found['geometric_mean']:.4f} (at most {found['bound']}), worst {found['worst']:.3f}"
        return (f"{text}\n{said}; {len(found['lengths'])} of {found['asked']} lengths, {len(found['kept'])} candidates, "
                f"picks at swept lengths in an empty cache: {found['shipped_problems']}; {took}")  # fmt: skip
    return (f"cold sweep: {found['seconds']} s (at most {found['bound']:g}) for {found['configs']} configs on {found['cores']} cores; "
            f"{found['ms']:.4f} ms: {found['winner']}; failures {found['failures']}")  # fmt: skip


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (part, usual) in PARTS.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"{part.__doc__} ({usual:g} s)")
    parser.add_argument("--seconds", type=float, help="for each part, about")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    device = this_device()
    wanted = [name for name in PARTS if getattr(options, name)] or list(PARTS)
    said = []
    for name in wanted:
        said.append(f"\n{name}\n{show(name, run(name, options.seconds, options.results, device))}")
        print(f"{name} done", flush=True)
    print(*said, sep="\n")


if __name__ == "__main__":
    main()
