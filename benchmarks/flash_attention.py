"""Flash attention, forward, beside torch's SDPA (cuDNN, FlashAttention-2) and FlashAttention-4, in one run. Needs a GPU, torch, CuPy.

    python benchmarks/flash_attention.py                              # every case
    python benchmarks/flash_attention.py --cases F1,F2,T --seconds 200
    python benchmarks/flash_attention.py --path sm80                  # ours by the path of every card; another results file
    python benchmarks/flash_attention.py --show benchmarks/results/flash_attention_h200.json   # its tables and plot; needs no GPU

GPU time by CUDA events: single calls with a cold L2, the host ahead, in another order in every round; and of some cases back to back,
in turn, under the power cap; cuBLAS in the same rounds. Errors against float64 on some heads and rows. FLOPs are those of the pairs that
the mask leaves. Writes results/flash_attention_<gpu>.json after every case, and a plot; `--merge` keeps the rows of other cases that are
there already. `--seconds` is for the whole run: the last cases are left out, and said.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.accuracy import Exact, softmax
from benchmarks.clock import SleepClock, per_call, repeated, shuffled
from benchmarks.common import RESULTS, bus_id, read_results, run_facts, select, short, slug
from benchmarks.flash_record import CASES, FA4, PEERS, Case, Row, line, plot, show
from benchmarks.peers import OverBudget, flash_attention_4, peer_errors, sdpa, within
from benchmarks.record import CUBLAS, OURS, SDPA, Book, Entry
from vidrial.call import apply
from vidrial.device import Device
from vidrial.errors import VidrialError
from vidrial.kernels.flash_attention import flash_attention
from vidrial.kernels.flash_attention.op import example, op
from vidrial.kernels.flash_attention.problem import Problem
from vidrial.spec.choices import describe
from vidrial.tune.pick import choose_config
from vidrial.tune.timing import Run, Timing, drift, slowdowns

CUBLAS_SIZE, GRAPH_CALLS = 8192, 8
WARM_SECONDS, LOOP_SECONDS, LOOP_ROUNDS = 0.2, 0.3, 3
# For the tables and the plot at the end; a first case, as long as nothing is known; a first call of a peer that compiles, at most.
END_SECONDS, FIRST_SECONDS, PEER_SECONDS = 5.0, 10.0, 60.0


class Bench:
    """One GPU: a stream that torch works on, the clock on it, cuBLAS as the yardstick of every round, and when all must be done."""

    def __init__(self, rounds: int, until: float, path: str = "") -> None:
        import torch

        self.torch, self.rounds, self.until = torch, rounds, until
        self.fixed: dict[str, object] = {"path": path} if path else {}
        self.device = Device.current(0)
        torch.cuda.set_stream(torch.cuda.Stream())
        self.clock = SleepClock(torch)
        a, b, c = (torch.randn(CUBLAS_SIZE, CUBLAS_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        self.cublas: Run = lambda: torch.mm(a, b, out=c)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    def case(self, case: Case, peers: Sequence[str], run: int) -> Row:
        """Everything about one case."""
        x = inputs(case)
        problem = problem_of(case)
        config, origin = choose_config(op, problem, self.device, tuple(self.fixed.items()))
        exact, runs, entries = Exact(x, rows=softmax(case.causal)), dict[str, Run](), dict[str, Entry]()
        for name in (OURS, *peers):
            entries[name], made = self._first(name, case, x, exact)
            if made is not None:
                runs[name] = made
            else:
                print(f"    {name}: {entries[name].note}", flush=True)
        runs[CUBLAS] = self.cublas
        calls = [GRAPH_CALLS if case.graph and name != CUBLAS else 1 for name in runs]
        burst = self._burst(list(runs.values()))
        for name, many, timing in zip(runs, calls, burst, strict=True):
            entries[name] = timed(entries.get(name, Entry()), per_call(timing, many))
        sustained = dict[str, Entry]()
        if case.sustained:
            sustained = {n: timed(Entry(), t) for n, t in zip(runs, self._sustained(list(runs.values()), burst), strict=True)}
        chosen = f"{config.path} {describe(getattr(config, config.path))}"
        return Row(case, chosen, origin, entries, sustained, run)

    def _first(self, name: str, case: Case, x: Mapping[str, Any], exact: Exact) -> tuple[Entry, Run | None]:
        """Call once, which compiles, and compare; what is to be timed. What cannot says why: a peer, or ours by an error of its own."""
        begin, expected = time.perf_counter(), (VidrialError,) if name == OURS else peer_errors()
        try:
            with contextlib.nullcontext() if name == OURS else within(max(1.0, min(PEER_SECONDS, self.left))):
                run = implementation(name, case, x, self.fixed)
                distance = exact.distance(output(name, run()))
                self.torch.cuda.synchronize()
                seconds = time.perf_counter() - begin
                run = self._captured(run) if case.graph else run
        except expected as error:
            self.torch.cuda.empty_cache()
            return Entry(note=short(str(error) if isinstance(error, OverBudget) else error)), None
        if seconds > 1.0:
            print(f"    {name}: first call {seconds:.1f} s", flush=True)
        return Entry(relative=distance.relative, worst=distance.max_error), run

    def _captured(self, run: Run) -> Run:
        """A CUDA graph of several calls."""
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            repeated(run, GRAPH_CALLS)()
        replay: Run = graph.replay
        return replay

    def _burst(self, runs: Sequence[Run]) -> list[Timing]:
        """Single calls, each from a cold L2."""
        until = time.perf_counter() + WARM_SECONDS
        while time.perf_counter() < until:
            self.cublas()
            runs[0]()
            self.torch.cuda.synchronize()
        for run in runs:
            run()
            self.clock.lead(run)
        return shuffled(runs, self.clock, self.rounds)

    def _sustained(self, runs: Sequence[Run], burst: Sequence[Timing]) -> list[Timing]:
        """Back to back, a loop of LOOP_SECONDS of each in every round; the round before, which heats the GPU, does not count."""
        counts = [max(1, round(LOOP_SECONDS * 1e3 / timing.median_ms)) for timing in burst]
        loops = [repeated(run, count) for run, count in zip(runs, counts, strict=True)]
        shuffled(loops, self.clock, 1)
        return [per_call(timing, count) for timing, count in zip(shuffled(loops, self.clock, LOOP_ROUNDS), counts, strict=True)]


def timed(entry: Entry, timing: Timing) -> Entry:
    """The entry with its time."""
    return replace(entry, ms=timing.median_ms, iqr=timing.iqr_ms, samples=timing.samples)


def implementation(name: str, case: Case, x: Mapping[str, Any], fixed: Mapping[str, object] | None = None) -> Callable[[], Any]:
    """A call of ours, choices of the op's own `fixed`, or of a peer."""
    if name == OURS and fixed:
        return lambda: apply(op, problem_of(case), x, **fixed)["y"]
    if name == OURS:
        return lambda: flash_attention(x["q"], x["k"], x["v"], causal=case.causal)
    if name == FA4:
        return flash_attention_4(x, case.causal)
    return sdpa(x, name, case.causal)


def problem_of(case: Case) -> Problem:
    """The op's problem."""
    return example(t=case.t, b=case.b, h=case.h, hq=case.query_heads, d=case.d, e=case.values, causal=case.causal, dtype=case.dtype)


def output(name: str, returned: Any) -> Any:
    """y [b, t, hq, e] of what an implementation returned: SDPA has heads before rows, FlashAttention-4 may add lse."""
    y = returned[0] if isinstance(returned, tuple) else returned
    return y.transpose(1, 2) if name in SDPA else y


def inputs(case: Case, device: str = "cuda") -> dict[str, Any]:
    """Normal q, k, v, on the current GPU or another device."""
    import torch

    generator, dtype = torch.Generator(device).manual_seed(0), getattr(torch, case.dtype)
    shapes = {"q": (case.query_heads, case.d), "k": (case.h, case.d), "v": (case.h, case.values)}
    return {n: torch.randn((case.b, case.t, *shape), generator=generator, device=device, dtype=dtype) for n, shape in shapes.items()}


def absent() -> dict[str, str]:
    """Peers that are not there, with the reason."""
    try:
        import flash_attn.cute  # noqa: F401
    except peer_errors() as error:
        return {FA4: short(error)}
    return {}


def measure(bench: Bench, cases: Sequence[Case], peers: Sequence[str], book: Book, path: Path) -> Book:
    """The cases that there is time for; the file is written after each, and says what was not run."""
    begun, rows, seconds = time.monotonic(), list[Row](), [FIRST_SECONDS]
    for number, case in enumerate(cases, 1):
        begin = time.monotonic()
        if bench.left < max(seconds[-3:]) + END_SECONDS:
            print(f"no time for {len(cases) - len(rows)} cases: {', '.join(c.name for c in cases[number - 1 :])}", flush=True)
            break
        rows.append(bench.case(case, peers, len(book.runs) - 1))
        seconds.append(time.monotonic() - begin)
        print(f"[{number}/{len(cases)}] {case.name}: {line(rows[-1])}; {rows[-1].origin}, {seconds[-1]:.1f} s", flush=True)
        book.runs[-1].update(seconds=round(time.monotonic() - begun, 1), not_run=[c.name for c in cases[number:]])
        book = book.with_row(rows[-1])
        book.save(path)
        bench.torch.cuda.empty_cache()
    trouble = drift([row.entries[CUBLAS].ms or 0.0 for row in rows])
    failed = [f"ours FAILED at {row.case.name}: {row.entries[OURS].note}" for row in rows if row.entries[OURS].note]
    print(*filter(None, (trouble, *slowdowns(bus_id()), *failed)), sep="\n")
    return book


def draw(rows: Sequence[Row], gpu: str, path: Path) -> None:
    """Print the tables; the plot beside the results file."""
    print(show(rows))
    try:
        plotted = plot(rows, gpu, path.with_suffix(".png"))
    except ImportError as error:
        print(f"no plot: {error}; where matplotlib is, --show {path.name} draws it")
        return
    print(f"written to {path}{' and .png' if plotted else ''}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="groups, comma-separated: " + ", ".join(dict.fromkeys(case.group for case in CASES)))
    parser.add_argument("--seconds", type=float, default=600, help="for the whole run, at most, about")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each implementation")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--merge", action="store_true", help="keep the rows of other cases that results/ or --out has")
    parser.add_argument("--no-peers", action="store_true", help="ours and cuBLAS only")
    parser.add_argument("--path", choices=("sm80", "sm90"), default="", help="ours by this path, not by the one that a call takes")
    parser.add_argument("--show", type=Path, help="a results file, of which to print the tables and draw the plot; measures nothing")
    return parser.parse_args()


def main() -> None:
    """The command."""
    begun, options = time.monotonic(), parse()
    if options.show:
        book = Book.load(options.show, read_results(options.show, "gpu", "rows")["gpu"], Row.from_json)
        draw(book.rows, book.gpu, options.show)
        return
    cases = select(options.cases, CASES)
    import torch

    with torch.no_grad():
        bench, missing = Bench(options.rounds, begun + options.seconds, options.path), {} if options.no_peers else absent()
        gpu = torch.cuda.get_device_name(0)
        print(
            f"{gpu}, torch {torch.__version__}, {len(cases)} cases", *(f"no {n}: {why}" for n, why in missing.items()), sep="\n", flush=True
        )
        path = options.out / f"flash_attention_{slug(gpu)}{options.path and '_' + options.path}.json"
        kept = path if path.is_file() else RESULTS / path.name
        book = Book.load(kept, gpu, Row.from_json) if options.merge else Book(gpu)
        book = Book(gpu, (*book.runs, {**run_facts(torch), "rounds": options.rounds, "absent": missing}), book.rows)
        peers = [] if options.no_peers else [name for name in PEERS if name not in missing]
        draw(measure(bench, cases, peers, book, path).rows, gpu, path)


if __name__ == "__main__":
    main()
