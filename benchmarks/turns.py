"""One process of benchmarks/against.py: power retention of the tree on its path, or cuBLAS, timed when it is told to.

    PYTHONPATH=TREE python turns.py op | cublas

It reads one JSON object per line and answers each by one: `{"prepare": case, "config": text or null}` makes the inputs, compiles and
warms up; `{"calls": n}` times so many calls, the L2 flushed and the host ahead before each. It imports nothing of the tree but what a
user calls, and what says which config that call takes, where the tree has it: any commit of the project can be one side.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

FLUSH_BYTES = 256 << 20
LEAD_CYCLES, CYCLES_PER_SECOND = 700_000, 2.0e9
WARM_SECONDS, SEEN, CUBLAS_SIZE = 0.3, 4096, 8192

Run = Callable[[], Any]


class Gpu:
    """The current GPU through torch: inputs of a case, and the stopwatch."""

    def __init__(self, role: str) -> None:
        import torch

        self._torch, self._role = torch, role
        torch.set_grad_enabled(False)
        torch.cuda.set_stream(torch.cuda.Stream())
        self._scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self._cycles = LEAD_CYCLES

    def prepare(self, case: Mapping[str, Any], config: str | None) -> tuple[Run, dict[str, Any]]:
        """A call of the case, compiled and warm, and what is to be said of it."""
        begin = time.perf_counter()
        call, facts = self._cublas() if self._role == "cublas" else self._retention(case, config)
        y = call()
        self._torch.cuda.synchronize()
        facts["first_call_s"] = time.perf_counter() - begin
        until = time.perf_counter() + WARM_SECONDS
        while time.perf_counter() < until:
            call()
            self._torch.cuda.synchronize()
        queued = time.perf_counter()
        call()
        # The GPU sleeps for at least twice as long as the host takes to queue a call.
        self._cycles = max(LEAD_CYCLES, int(2 * (time.perf_counter() - queued) * CYCLES_PER_SECOND))
        self._torch.cuda.synchronize()
        flat = y.flatten()
        facts["y"] = flat[:: max(1, flat.numel() // SEEN)].float().tolist()
        return call, facts

    def times(self, call: Run, calls: int) -> list[float]:
        """Milliseconds of so many calls, behind one that is not counted."""
        cuda, events = self._torch.cuda, []
        for _ in range(calls + 1):
            begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
            self._scratch.zero_()
            cuda._sleep(self._cycles)
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        cuda.synchronize()
        return [float(begin.elapsed_time(end)) for begin, end in events[1:]]

    def _cublas(self) -> tuple[Run, dict[str, Any]]:
        torch = self._torch
        a, b, c = (torch.randn(CUBLAS_SIZE, CUBLAS_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        return lambda: torch.mm(a, b, out=c), {}

    def _retention(self, case: Mapping[str, Any], config: str | None) -> tuple[Run, dict[str, Any]]:
        from vidrial.kernels.power_retention import power_retention

        torch, (b, t, h, hq, d) = self._torch, (case[name] for name in ("b", "t", "h", "hq", "d"))
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(heads: int, *width: int, dtype: Any = torch.bfloat16) -> Any:
            return torch.randn((b, t, heads, *width), generator=generator, device="cuda", dtype=dtype)

        q, k, v = normal(hq, d), normal(h, d), normal(h, d)
        log_g = torch.nn.functional.logsigmoid(normal(h, dtype=torch.float32) + case["gates"])
        sizes = {"t": t, "b": b, "h": h, "hq": hq, "d": d}
        if config is not None:
            pin(sizes, config)
        return lambda: power_retention(q, k, v, log_g), {"config": picked(sizes)}


def picked(sizes: Mapping[str, int]) -> str:
    """The config that a call takes and where it comes from; empty where the tree says that by other names."""
    from vidrial.kernels.power_retention.op import example, op

    try:
        from vidrial.device import Device
        from vidrial.spec.choices import describe
        from vidrial.tune.pick import choose_config
    except ImportError:
        return ""
    choice = choose_config(op, example(**sizes), Device.current(0))
    return f"{describe(choice.config)} ({choice.origin})"


def pin(sizes: Mapping[str, int], text: str) -> None:
    """From now on calls of these sizes take this config: it is put into the process's own cache as if it had been measured."""
    from vidrial.device import Device
    from vidrial.kernels.power_retention.op import example, op
    from vidrial.spec.choices import axes, unflatten
    from vidrial.tune.ranking import ProblemTimings, RankedConfig, Ranking
    from vidrial.tune.timing import Timing

    known, values = axes(op.config), {}
    for word in text.split():
        name, equals, value = word.partition("=")
        if equals and name in known:
            values[name] = next(x for x in known[name] if str(x) == value)
    device, measured = (
        Device.current(0),
        ProblemTimings(example(**sizes), (RankedConfig(unflatten(op.config, values), Timing(1.0, 0.0, 1)),)),
    )
    Ranking(op.name, op.digest(), device.key, device.name, "pinned", (measured,)).save(op)


def serve(gpu: Any, source: TextIO, answers: TextIO) -> None:
    """Answer each line of `source`."""
    call: Run | None = None
    for line in source:
        asked = json.loads(line)
        if "prepare" in asked:
            call = None  # its inputs make room
            call, answer = gpu.prepare(asked["prepare"], asked["config"])
        elif call is None:
            raise SystemExit("nothing was prepared to be timed")
        else:
            answer = {"ms": gpu.times(call, asked["calls"])}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    # What a library prints goes with the errors: the pipe carries answers alone.
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(Gpu(sys.argv[1]), sys.stdin, pipe)
