"""Sweep power retention on this machine's GPU and write the ranking that comes with Vidrial for it.

    python -m vidrial.sweeps.power_retention --seconds 240

Writes results/<device key>/power_retention.json with every result. With $OUT, copies it there, and the trials' journals, compressed:
`gunzip` them, and `vidrial report` makes a page of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from vidrial.kernels.power_retention.op import Config, example, op
from vidrial.kernels.power_retention.problem import Problem
from vidrial.sweeps.common import Case, Program

SECONDS = 240.0
# Problems of one head size share their static facts, and so their binaries. In a group the problems that the benchmarks name come first,
# the most expensive ones foremost: what is left when the time is over is the cheapest to do without.
GROUPS: dict[str, tuple[Case, ...]] = {
    "d=64": (
        {"t": 10007}, {"t": 65536, "h": 8}, {"t": 16384, "b": 2}, {"t": 33333}, {"t": 4096, "b": 8}, {"t": 5001}, {"t": 1000},
        {"t": 65536}, {"t": 2049}, {"t": 257}, {"t": 65}, {"t": 513}, {"t": 129}, {"t": 20001},
    ),
    "d=128": (
        {"t": 16384}, {"t": 65536}, {"t": 16384, "h": 2, "hq": 24}, {"t": 4099}, {"t": 1025}, {"t": 33333}, {"t": 10007}, {"t": 257},
        {"t": 65}, {"t": 4099, "h": 2, "hq": 24}, {"t": 1025, "h": 2, "hq": 24}, {"t": 33333, "h": 2, "hq": 24}, {"t": 2049}, {"t": 513},
    ),
}  # fmt: skip
# With d = 128 more is compiled and everything takes longer.
WEIGHTS = {"d=64": 0.45, "d=128": 0.55}


def facts(p: Problem) -> Mapping[str, object]:
    """What tells problems apart here."""
    return {"t": p.t, "b": p.b, "h": f"{p.hq}/{p.h}", "d": p.d}


def program() -> Program[Problem, Config]:
    """What is swept."""
    groups = {name: [example(d=int(name.partition("=")[2]), **case) for case in cases] for name, cases in GROUPS.items()}
    return Program(op, "vidrial.sweeps.power_retention", groups, WEIGHTS, facts)


if __name__ == "__main__":
    program().main(__doc__, SECONDS)
