"""Sweep flash attention on this machine's GPU and write the ranking that comes with Vidrial for it.

    python -m vidrial.sweeps.flash_attention --seconds 350
    python -m vidrial.sweeps.flash_attention --only "d=64 full; d=96 causal" --seconds 60

Writes results/<device key>/flash_attention.json with every result. With $OUT, copies it there, and the trials' journals, compressed:
`gunzip` them, and `vidrial report` makes a page of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vidrial.kernels.flash_attention.op import Config, example, op
from vidrial.kernels.flash_attention.problem import Problem
from vidrial.sweeps.common import Program

SECONDS, TRIALS = 350.0, 64


LENGTHS, FEW_LENGTHS = (8192, 4096, 2048, 1021, 16384, 257), (8192, 1021, 16384)


def at(lengths: Sequence[int], b: int = 2, **common: Any) -> list[Problem]:
    """The problems of these lengths; `common` as in the op's `example`."""
    return [example(t=t, b=b, **common) for t in lengths]


# Problems, and the group's weight in the time. Many short sequences are what a small encoder has.
GROUPS: dict[str, tuple[Sequence[Problem], float]] = {
    "d=128 causal": (at(LENGTHS, d=128, causal=True), 2.0),
    "d=128 full": (at(LENGTHS, d=128), 2.0),
    "d=64 causal": (at(LENGTHS, d=64, causal=True), 2.0),
    "d=64 full": (at(LENGTHS, d=64), 2.0),
    "d=64 full, many short": (at((197, 77, 257, 50, 511), b=32, h=12, d=64), 1.0),
    "d=128 causal, one sequence": (at((1025, 257, 2049, 513), b=1, d=128, causal=True), 1.0),
    "d=128 causal, 4 queries per key": (at(FEW_LENGTHS, b=1, h=8, hq=32, d=128, causal=True), 1.0),
    "d=128 causal, 8 queries per key": (at(FEW_LENGTHS, b=1, h=4, hq=32, d=128, causal=True), 1.0),
    "d=256 causal": (at(FEW_LENGTHS, h=8, d=256, causal=True), 0.7),
    "d=96 causal": (at(FEW_LENGTHS, d=96, causal=True), 1.0),
    "d=192 e=128 causal": (at(FEW_LENGTHS, d=192, e=128, causal=True), 1.0),
}


def facts(p: Problem) -> Mapping[str, object]:
    """What tells problems apart here."""
    return {"t": p.tk, "b": p.b, "h": f"{p.hq}/{p.h}", "d": p.d if p.d == p.e else f"{p.d}/{p.e}", "mask": "causal" if p.causal else "full"}


def program() -> Program[Problem, Config]:
    """What is swept."""
    groups = {name: problems for name, (problems, _) in GROUPS.items()}
    return Program(op, "vidrial.sweeps.flash_attention", groups, {name: weight for name, (_, weight) in GROUPS.items()}, facts)


if __name__ == "__main__":
    program().main(__doc__, SECONDS, TRIALS)
