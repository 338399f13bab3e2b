"""Power retention, forward, beside `retention` 1.0.7 (Triton) and torch's SDPA, in one run, interleaved. Needs a GPU, torch, CuPy.

    python benchmarks/power_retention.py                               # every case; the peer tunes itself for minutes
    python benchmarks/power_retention.py --cases P2,P7 --budget 200    # some of them
    python benchmarks/power_retention.py --no-peers --stages           # what each of our launches takes
    python benchmarks/power_retention.py --backward --cases P2         # forward and backward together, and each launch; prints, writes nothing

GPU time by CUDA events on one stream, the L2 flushed before every sample, warm, implementations in turn, medians. Errors against
float64 on some heads and rows. Writes results/power_retention_<gpu>.json after every case, and a plot; `--merge` keeps the rows of
other cases that are there already.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy import Exact
from benchmarks.common import CASES, RESULTS, Case, bus_id, run_facts, select, short, slug, table
from benchmarks.peers import OverBudget, compile_ahead, inputs, peer_errors, retention, sdpa, within
from benchmarks.record import CUBLAS, OURS, PEER, SDPA, Book, Entry, Row, plot, show
from vidrial.call import cuda_plan
from vidrial.device import HOPPER, Device
from vidrial.kernels.power_retention import power_retention
from vidrial.kernels.power_retention.back import op as back
from vidrial.kernels.power_retention.op import example, op
from vidrial.runtime.plan import CudaPlan
from vidrial.spec.choices import describe
from vidrial.spec.op import Op
from vidrial.tune.pick import choose_config
from vidrial.tune.timing import CudaClock, Timing, drift, measure, slowdowns

WARM_SECONDS, CASE_MS, CALL_MS, LEAST_ROUNDS = 1.0, 4000.0, 150.0, 5
CUBLAS_SIZE = 8192

Run = Callable[[], Any]


class Bench:
    """One GPU: a stream that torch works on, the clock on it, and cuBLAS as the yardstick of every round."""

    def __init__(self, rounds: int, budget: float) -> None:
        import cupy
        import torch

        self.torch, self.rounds, self.budget = torch, rounds, budget
        self.device = Device.current(0)
        self._stream = torch.cuda.Stream()
        torch.cuda.set_stream(self._stream)
        self.clock = CudaClock(self.device.l2_bytes, cupy.cuda.ExternalStream(self._stream.cuda_stream))
        a, b, c = (torch.randn(CUBLAS_SIZE, CUBLAS_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        self.cublas: Run = lambda: torch.mm(a, b, out=c)

    def case(self, case: Case, peers: bool, run: int) -> Row:
        """Everything about one case."""
        x = inputs(case)
        problem = example(t=case.t, b=case.b, h=case.h, hq=case.query_heads, d=case.d)
        config, origin = choose_config(op, problem, self.device)
        exact = Exact(x, case.chunk)
        runs: dict[str, Run] = {OURS: lambda: power_retention(x["q"], x["k"], x["v"], x["log_g"])}
        row = Row(case, describe(config), origin, run=run)
        if peers:
            runs |= {f"{PEER} C={chunk}" if chunk else f"{PEER} attention": self._retention(x, chunk) for chunk in case.peer_chunks}
            runs |= {name: self._sdpa(x, name) for name in SDPA}
        for name in list(runs):
            entry = self._try(name, runs[name], exact)
            row.entries[name] = entry
            if entry.note:
                print(f"    {name}: {entry.note}", flush=True)
                del runs[name]
        runs[CUBLAS] = self.cublas
        for name, timing in zip(runs, self._time(list(runs.values())), strict=True):
            seen = row.entries.get(name, Entry())
            call = None if name == CUBLAS else self._call_ms(runs[name], timing.median_ms)
            row.entries[name] = Entry(timing.median_ms, timing.iqr_ms, timing.samples, call, seen.relative, seen.worst)
        return row

    def _retention(self, x: dict[str, Any], chunk: int) -> Run:
        return lambda: retention(x, chunk)()

    def _sdpa(self, x: dict[str, Any], name: str) -> Run:
        return lambda: sdpa(x, name)()

    def _try(self, name: str, run: Run, exact: Exact) -> Entry:
        """Run once: what compiles and tunes does so here. Ours may raise; a peer that cannot says why."""
        begin = time.perf_counter()
        if name == OURS:
            y = run()
        else:
            try:
                with within(self.budget):
                    y = run()
                    self.torch.cuda.synchronize()
            except peer_errors() as error:
                self.torch.cuda.empty_cache()
                return Entry(note=short(str(error) if isinstance(error, OverBudget) else error))
        self.torch.cuda.synchronize()
        print(f"    {name}: first call {time.perf_counter() - begin:.1f} s", flush=True)
        if name in SDPA:
            return Entry()
        distance = exact.distance(y)
        return Entry(relative=distance.relative, worst=distance.max_error)

    def _time(self, runs: Sequence[Run]) -> list[Timing]:
        """Warm up for a second, then all in turn, as many rounds as fit."""
        until = time.perf_counter() + WARM_SECONDS
        while time.perf_counter() < until:
            self.cublas()
            runs[0]()
            self.torch.cuda.synchronize()
        for run in runs:
            run()
            self.clock.lead(run)
        first = measure(runs, self.clock, rounds=1, warmup=1)
        fitting = int(CASE_MS / sum(timing.median_ms for timing in first))
        return measure(runs, self.clock, rounds=max(LEAST_ROUNDS, min(self.rounds, fitting)), warmup=1)

    def _call_ms(self, run: Run, ms: float) -> float:
        """A call in a row of calls: what a user waits, Python included."""
        count = max(3, min(50, int(CALL_MS / ms)))
        run()
        self.torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            run()
        self.torch.cuda.synchronize()
        return (time.perf_counter() - begin) * 1e3 / count

    def backward(self, case: Case, peers: bool) -> str:
        """A table of forward and backward together, by torch's autograd: ours, and the peer with each of its chunks."""
        x = inputs(case)
        leaves = [x[name].requires_grad_() for name in ("q", "k", "v", "log_g")]
        dy = self.torch.randn_like(x["q"])

        def both(forward: Run) -> Run:
            return lambda: self.torch.autograd.grad(forward(), leaves, dy)

        runs = {OURS: both(lambda: power_retention(*leaves))}
        if peers:
            runs |= {f"{PEER} C={chunk}" if chunk else f"{PEER} attention": both(self._retention(x, chunk)) for chunk in case.peer_chunks}
        lines: list[tuple[str, ...]] = []
        peaks: dict[str, float] = {}
        with self.torch.enable_grad():
            for name in list(runs):
                self.torch.cuda.reset_peak_memory_stats()
                before = self.torch.cuda.memory_allocated()
                try:
                    with within(self.budget):
                        runs[name]()
                        self.torch.cuda.synchronize()
                except peer_errors() as error:
                    if name == OURS:
                        raise
                    lines.append((name, "-", "-", "-", short(str(error))))
                    del runs[name]
                    continue
                peaks[name] = (self.torch.cuda.max_memory_allocated() - before) / 2**30
            timings = self._time(list(runs.values()))
        ours = timings[0].median_ms
        for (name, peak), timing in zip(peaks.items(), timings, strict=True):
            lines.append((name, f"{timing.median_ms:.3f} ({timing.iqr_ms:.3f})", f"{timing.median_ms / ours:.2f}", f"{peak:.2f}", ""))
        return f"{case.name}\n" + table(("forward and backward", "ms (IQR)", "x ours", "peak GiB", ""), lines)

    def stages(self, case: Case) -> str:
        """A table of our launches, forward."""
        x = inputs(case)
        problem = example(t=case.t, b=case.b, h=case.h, hq=case.query_heads, d=case.d)
        return f"{case.name}\n" + self._launches(op, problem, cuda_plan(op, problem, 0), x | {"y": self.torch.empty_like(x["q"])})

    def backward_stages(self, case: Case) -> str:
        """Tables of our launches, backward: those that a call takes, and on Hopper those by wgmma, until a sweep has ranked them."""
        x = inputs(case)
        problem = back.example(t=case.t, b=case.b, h=case.h, hq=case.query_heads, d=case.d)
        norm = self.torch.ones((case.b, case.query_heads, case.t), device="cuda")
        y, dy = (self.torch.randn_like(x["q"]) for _ in range(2))
        made = {"dq": "q", "dk": "k", "dv": "v", "dlog_g": "log_g"}
        tensors = x | {"y": y, "norm": norm, "dy": dy} | {name: self.torch.empty_like(x[of]) for name, of in made.items()}
        plans = [cuda_plan(back.op, problem, 0)]
        if self.device.arch == HOPPER and plans[0].config.mma == "sync":
            plans.append(cuda_plan(back.op, problem, 0, (("mma", "wgmma"),)))
        return "\n".join(
            f"{case.name} backward, mma={plan.config.mma}\n" + self._launches(back.op, problem, plan, tensors) for plan in plans
        )

    def _launches(self, op: Op, problem: Any, plan: CudaPlan, tensors: Mapping[str, Any]) -> str:
        """Of each launch: time, share, and what it reaches by its own account of its work."""
        scratch = self.torch.empty(max(1, plan.workspace.bytes), device="cuda", dtype=self.torch.uint8)
        pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}

        def launch(stage: int | None) -> Run:
            return lambda: plan.run(pointers, scratch.data_ptr(), self._stream.cuda_stream, stage)

        timings = self._time([launch(stage) for stage in (None, *range(plan.stages))])
        whole, lines = timings[0], []
        for stage, timing in zip(op.stages(problem, plan.config), timings[1:], strict=True):
            ctas = stage.kernel.grid(stage.problem, stage.config)
            cost = stage.kernel.cost(stage.problem, stage.config, self.device) if stage.kernel.cost else None
            rates = (
                (f"{cost.flops / timing.median_ms / 1e9:.0f}", f"{cost.bytes / timing.median_ms / 1e6:.0f}", str(math.prod(ctas)))
                if cost
                else ("-",) * 3
            )
            lines.append(
                (
                    stage.kernel.name,
                    f"{timing.median_ms:.4f} ({timing.iqr_ms:.4f})",
                    f"{100 * timing.median_ms / whole.median_ms:.0f}",
                    *rates,
                    describe(stage.config),
                )
            )
        lines.append(("all", f"{whole.median_ms:.4f} ({whole.iqr_ms:.4f})", "100", "-", "-", "-", f"chunk={plan.config.chunk}"))
        return table(("stage", "ms (IQR)", "%", "TFLOP/s", "GB/s", "CTAs", "config"), lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="groups, comma-separated: " + ", ".join(dict.fromkeys(case.group for case in CASES)))
    parser.add_argument("--budget", type=float, default=300, help="seconds that a peer has for its first call of a case")
    parser.add_argument("--rounds", type=int, default=25, help="samples of each implementation, at most")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--merge", action="store_true", help="keep the rows of other cases that results/ or --out has")
    parser.add_argument("--no-peers", action="store_true", help="ours and cuBLAS only")
    parser.add_argument(
        "--peer-jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes that compile the peer's kernels ahead; 0: none"
    )
    parser.add_argument("--backward", action="store_true", help="forward and backward together instead; writes nothing")
    parser.add_argument("--stages", action="store_true", help="the time of each of our launches instead; writes nothing")
    return parser.parse_args()


def main() -> None:
    """The command."""
    options, cases = parse(), []
    cases = select(options.cases, CASES)
    import torch

    with torch.no_grad():
        bench = Bench(options.rounds, options.budget)
        gpu = torch.cuda.get_device_name(0)
        print(f"{gpu}, torch {torch.__version__}, {len(cases)} cases", flush=True)
        if options.backward:
            print(json.dumps(run_facts(torch)), flush=True)
            for case in cases:
                print(bench.backward(case, not options.no_peers), end="\n\n", flush=True)
                print(bench.backward_stages(case), end="\n\n", flush=True)
            return
        if options.stages:
            for case in cases:
                print(bench.stages(case), end="\n\n", flush=True)
            return
        if options.peer_jobs and not options.no_peers:
            print(compile_ahead(cases, options.peer_jobs), flush=True)
        path = options.out / f"power_retention_{slug(gpu)}.json"
        kept = path if path.is_file() else RESULTS / path.name
        book = Book.load(kept, gpu, Row.from_json) if options.merge else Book(gpu)
        book = Book(gpu, (*book.runs, run_facts(torch)), book.rows)
        done: list[Row] = []
        for number, case in enumerate(cases, 1):
            begin = time.perf_counter()
            print(f"[{number}/{len(cases)}] {case.name}", flush=True)
            done.append(bench.case(case, not options.no_peers, len(book.runs) - 1))
            book = book.with_row(done[-1])
            book.save(path)
            torch.cuda.empty_cache()
            print(f"    {done[-1].config} ({done[-1].origin}); {time.perf_counter() - begin:.0f} s", flush=True)
        print(show(book.rows))
        trouble = drift([row.entries[CUBLAS].ms or 0.0 for row in done])
        print(*filter(None, (trouble, *slowdowns(bus_id()))), sep="\n")
        plotted = plot(book.rows, gpu, path.with_suffix(".png"))
        print(f"written to {path}{' and .png' if plotted else ''}")


if __name__ == "__main__":
    main()
