"""What the fuzzer compiles for the host target: static facts and configs, few, so that lengths and inputs alone are new to a problem."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from examples.gemm import gemm
from examples.scan import scan
from examples.softmax import softmax
from vidrial import call
from vidrial.device import Device
from vidrial.host.plan import HostPlan
from vidrial.kernels.flash_attention import sm80, sm90
from vidrial.kernels.flash_attention.op import Config as FlashConfig
from vidrial.kernels.power_retention import attend
from vidrial.kernels.power_retention import op as power
from vidrial.kernels.power_retention import scan as power_scan
from vidrial.kernels.power_retention.back import op as back
from vidrial.kernels.power_retention.back import scan as back_scan
from vidrial.kernels.power_retention.back import tokens

H200 = Device.of("h200")
SHORT = (1, 2, 7, 31, 33, 64, 65, 128, 129)
# More than two chunks of 128 tokens, the last one of a single token, of all, and of some.
CHUNKED = (257, 300, 384, 385, 390)


@dataclass(frozen=True)
class Family:
    """Static facts of calls, and the configs that serve them: the first legal one is taken. `group` 0: any."""

    op: str
    configs: tuple[Any, ...]
    dtype: str
    d: int = 32
    e: int = 32
    options: tuple[tuple[str, Any], ...] = ()
    gated: bool = False
    backward: tuple[Any, ...] = ()
    lengths: tuple[int, ...] = SHORT
    group: int = 0


SYNC = power.Config(
    128,
    power_scan.Config(tokens=64, stages=3, warps=4, columns=32, segments=1),
    attend.Config(keys=32, m=2, warps=2, stages=2, blocks=2),
)
SEGMENTS = replace(SYNC, scan=replace(SYNC.scan, segments=2))
WGMMA = power.Config(
    128,
    power_scan.Config(tokens=64, stages=3, warps=4, columns=32, segments=2),
    attend.Config(keys=64, m=2, warps=4, stages=3, blocks=1, mma="wgmma"),
)
WHOLE = replace(SYNC, chunk=0)
NARROW = tokens.Config(block=32, warps=4, stages=3, blocks=1)
ADJOINT = back_scan.Config(tokens=64, stages=3, warps=4, columns=32)
BACK = back.Config(chunk=128, scan=SYNC.scan, adjoint=ADJOINT, query=NARROW, keys=NARROW)
SM80 = FlashConfig(path="sm80", sm80=sm80.Config(keys=32, m=1, warps=2, stages=3, blocks=1))
SPLIT = FlashConfig(path="sm80", sm80=sm80.Config(keys=32, m=2, warps=2, stages=2, blocks=1, splits=2))
SM90 = FlashConfig(path="sm90", sm90=sm90.Config(groups=1, keys=64, stages=2, overlap=1, schedule="one"))
DRAWN = FlashConfig(path="sm90", sm90=sm90.Config(groups=2, keys=80, stages=2, overlap=0, turns="ping_pong"))
GEMMS = tuple(gemm.Paths(by="threads", threads=gemm.Config(64, 64, 32, 3, 4, 1, load, store)) for load in (16, 2) for store in (16, 2))

FAMILIES = {
    "power: states": Family("power_retention", (SYNC,), "bfloat16", gated=True, lengths=CHUNKED),
    "power: segments, fp16": Family("power_retention", (SEGMENTS,), "float16", 32, 64, gated=True, lengths=CHUNKED),
    "power: wgmma, no sum": Family("power_retention", (WGMMA,), "bfloat16", 64, 32, (("normalize", "none"),), True, lengths=CHUNKED),
    "power: attention form": Family("power_retention", (WHOLE,), "float16", gated=True),
    "power: no gates": Family("power_retention", (WHOLE,), "bfloat16", 32, 64),
    "power: degree 4": Family("power_retention", (WHOLE,), "float16", 64, 32, (("degree", 4),), True),
    "power: gradient": Family("power_retention", (SYNC,), "bfloat16", gated=True, backward=(BACK,), lengths=CHUNKED),
    "power: gradient, no gates": Family("power_retention", (WHOLE,), "float16", backward=(replace(BACK, chunk=0),)),
    "flash: causal, groups of 3": Family("flash_attention", (SPLIT, SM80), "bfloat16", options=(("causal", True),), group=3),
    "flash: window, cap": Family("flash_attention", (SM80,), "float16", 64, 32, (("window", (5, 3)), ("softcap", 20.0)), group=1),
    "flash: TMA, causal": Family("flash_attention", (SM90, SM80), "bfloat16", 64, 64, (("causal", True),), group=2),
    "flash: TMA, drawn tiles": Family("flash_attention", (DRAWN, SM80), "float16", 32, 64, group=1),
    "softmax": Family("softmax", (softmax.Config(32, 4, 1, 0),), "float32"),
    "scan": Family(
        "scan", (scan.Config(512, scan.Threads(64), scan.Threads(64), scan.Threads(64)),), "float32", lengths=(*SHORT, 513, 1025)
    ),
    "gemm": Family("gemm", GEMMS, "float16", lengths=(1, 7, 33, 64, 128, 129)),
}

_asked = threading.local()
_plan = lru_cache(maxsize=None)(HostPlan)


@contextmanager
def configs_of(name: str) -> Iterator[None]:
    """This thread's calls on the host target take the family's configs; compiled ones stay loaded."""
    _asked.family = FAMILIES[name] if name else None
    try:
        yield
    finally:
        _asked.family = None


def pinned(op: Any, problem: Any, fixed: tuple[Any, ...] = ()) -> Any:
    """In place of `call.predicted_plan`."""
    family: Family | None = getattr(_asked, "family", None)
    if family is None:
        return _chosen(op, problem, fixed)
    for config in family.backward if op.name == back.op.name else family.configs:
        if op.reject(problem, config, H200) is None:
            return _plan(op, problem, config)
    return _chosen(op, problem, fixed)  # which refuses it, or the fuzzer's families are incomplete and it compiles


_chosen = call.predicted_plan
call.predicted_plan = pinned
