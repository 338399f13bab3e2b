"""Sweep the backward pass of power retention on this machine's GPU and write the ranking that comes with Vidrial for it.

    python -m vidrial.sweeps.power_retention_backward --seconds 200

As `vidrial.sweeps.power_retention`, beside it.
"""

from __future__ import annotations

from collections.abc import Mapping

from vidrial.kernels.power_retention.back.op import Config, example, op
from vidrial.kernels.power_retention.back.problem import Gradient
from vidrial.sweeps.common import Case, Program
from vidrial.sweeps.power_retention import facts as forward_facts

SECONDS = 200.0
# What the benchmarks name comes first.
GROUPS: dict[str, tuple[Case, ...]] = {
    "d=64": ({"t": 65536}, {"t": 10007}, {"t": 16384}, {"t": 65536, "h": 8}, {"t": 4096, "b": 8}, {"t": 2049}, {"t": 513}),
    "d=128": ({"t": 16384}, {"t": 4099}, {"t": 1025}),
}
# With d = 128 everything takes longer.
WEIGHTS = {"d=64": 0.6, "d=128": 0.4}


def facts(p: Gradient) -> Mapping[str, object]:
    """What tells problems apart here."""
    return forward_facts(p)


def program() -> Program[Gradient, Config]:
    """What is swept."""
    groups = {name: [example(d=int(name.partition("=")[2]), **case) for case in cases] for name, cases in GROUPS.items()}
    return Program(op, "vidrial.sweeps.power_retention_backward", groups, WEIGHTS, facts)


if __name__ == "__main__":
    program().main(__doc__, SECONDS)
