"""For the tests of an op's author: its kernels on the CPU, values, races and memory errors. No GPU is needed.

def test_softmax():
    vidrial.testing.assert_op_correct(op)
"""

from __future__ import annotations

from vidrial.host.check import Outcome, Report, assert_op_correct, check
from vidrial.host.cover import Case, cases, diverse_configs, small_problems
from vidrial.host.plan import HostPlan, poison
from vidrial.host.target import SCHEDULES, HostStats, Schedule

__all__ = [
    "SCHEDULES",
    "Case",
    "HostPlan",
    "HostStats",
    "Outcome",
    "Report",
    "Schedule",
    "assert_op_correct",
    "cases",
    "check",
    "diverse_configs",
    "poison",
    "small_problems",
]
