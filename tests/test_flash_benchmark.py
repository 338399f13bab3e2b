"""benchmarks/flash_attention.py without a GPU: ours and the peers on the CPU, the clock made up."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import flash_attention as bench
from benchmarks.accuracy import Exact, softmax
from benchmarks.clock import LEAD_CYCLES, SleepClock, per_call, repeated, shuffled
from benchmarks.flash_record import CASES, CUDNN, FA2, FA4, PEERS, Case, Row, line, plot, show, summary
from benchmarks.record import CUBLAS, CUBLAS_FLOPS, OURS, Book, Entry
from vidrial.device import Device
from vidrial.tune.timing import Timing

torch = pytest.importorskip("torch")


class FakeClock:
    """Every run takes as many milliseconds as it says by `tick`."""

    def __init__(self) -> None:
        self.now, self.leads = 0.0, 0

    def tick(self, ms: float) -> None:
        self.now += ms

    def sample(self, run: Callable[[], Any]) -> Callable[[], float]:
        begin = self.now
        run()
        taken = self.now - begin
        return lambda: taken

    def wait(self) -> None:
        pass

    def lead(self, run: Callable[[], Any]) -> None:
        run()
        self.leads += 1


class FakeGraph:
    """What was captured runs again on `replay`."""

    captured: Callable[[], Any]

    def replay(self) -> None:
        self.captured()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[bench.Bench]:
    """The benchmark on the CPU: ours takes 2 ms, FlashAttention-4 3 (its result is y and lse), FA2 4, cuBLAS 1; cuDNN serves no d = 32."""
    made = bench.Bench.__new__(bench.Bench)
    cuda = SimpleNamespace(synchronize=lambda: None, empty_cache=lambda: None, CUDAGraph=FakeGraph)
    made.torch = SimpleNamespace(cuda=cuda)
    clock = FakeClock()
    made.rounds, made.until, made.device, made.clock = 5, time.monotonic() + 1000, Device.of("h200"), clock
    made.fixed = {}
    made.cublas = lambda: clock.tick(1.0)

    @contextlib.contextmanager
    def graph(into: FakeGraph) -> Iterator[None]:
        begin = clock.now
        yield
        taken = clock.now - begin
        into.captured = lambda: clock.tick(taken)

    cuda.graph = graph
    whole = bench.implementation

    def implementation(name: str, case: Case, x: Any, fixed: Any = None) -> Callable[[], Any]:
        if name == CUDNN and case.d == 32:
            raise RuntimeError("no engine")
        run = whole(OURS, case, x)

        def call() -> Any:
            clock.tick({OURS: 2.0, FA4: 3.0, FA2: 4.0, CUDNN: 6.0}[name])
            y = run()
            # NOTE: as the peers return it.
            return (y, None) if name == FA4 else y.transpose(1, 2) if name in (CUDNN, FA2) else y

        return call

    monkeypatch.setattr(bench, "implementation", implementation)
    monkeypatch.setattr(bench, "inputs", lambda case, whole=bench.inputs: whole(case, "cpu"))
    monkeypatch.setattr(bench, "WARM_SECONDS", 0.001)
    monkeypatch.setattr(bench, "LOOP_SECONDS", 0.012)
    monkeypatch.setattr(bench, "bus_id", lambda: "0")
    monkeypatch.setattr(bench, "slowdowns", lambda _: [])
    with torch.no_grad():
        yield made


SMALL = Case("F1", 1, 1, 65, d=32, hq=2, sustained=True)


def test_flops_by_hand() -> None:
    # 5 queries see 1, 2, 3, 4, 5 keys; 2 (d + e) each; two batches of three query heads.
    assert Case("x", 2, 1, 5, d=8, e=4, hq=3).flops == 15 * 2 * 12 * 6
    assert Case("x", 2, 3, 5, d=8, causal=False).flops == 25 * 4 * 8 * 6
    assert Case("F2", 2, 16, 8192, causal=False).flops == 4 * 2 * 16 * 128 * 8192**2


def test_cases() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(CASES) and names[:2] == ["F1 B2 H16 T8192 d128 causal", "F2 B2 H16 T8192 d128 full"]
    asked = {
        (t, d, causal) for t in (1021, 2048, 4093, 4096, 6007, 8191, 8192, 10007, 16384) for d in (64, 128) for causal in (True, False)
    }
    series = [(c.t, c.d, c.causal) for c in CASES if c.in_series and c.b == 2]
    assert asked <= set(series) and sorted(c.t for c in CASES if c.group == "F7") == [257, 513, 1000, 1025, 1537, 2049, 3001, 4097, 8193]
    assert [c.name for c in CASES if c.group in ("F3", "F4", "F9")] == [
        "F9 B1 HQ32 H8 T16411 d128 causal", "F4 B2 H8 T8192 d256 causal", "F3 B2 H32 T8192 d64 causal"]  # fmt: skip
    small = [c for c in CASES if c.group == "F8"]
    assert sorted(c.t for c in small) == [50, 77, 197, 257, 511] and all(c.graph and not c.causal and c.b * c.h == 384 for c in small)
    assert [c.t for c in CASES if c.sustained] == [8192] * 4


def test_the_order_is_another_one_in_every_round() -> None:
    clock, seen = FakeClock(), list[int]()
    runs = [lambda i=i: (seen.append(i), clock.tick(float(i + 1)))[0] for i in range(4)]
    found = shuffled(runs, clock, rounds=15)
    rounds = [tuple(seen[i : i + 4]) for i in range(0, 60, 4)]
    assert len(seen) == 60 and all(sorted(r) == [0, 1, 2, 3] for r in rounds) and len(set(rounds)) > 5
    assert {r[0] for r in rounds} == {0, 1, 2, 3}, "each was first once"
    assert found == [Timing(float(i + 1), 0.0, 15) for i in range(4)]
    assert per_call(Timing(8.0, 4.0, 3), 8) == Timing(1.0, 0.5, 3)


def test_a_sample_stands_behind_a_flush_and_a_sleep_that_the_host_needs() -> None:
    said, events = list[str](), itertools.count()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.number = next(events)
            assert enable_timing

        def record(self) -> None:
            said.append(f"event {self.number}")

        def elapsed_time(self, end: Event) -> float:
            return float(end.number - self.number)

    cuda = SimpleNamespace(Event=Event, synchronize=lambda: said.append("wait"), _sleep=lambda cycles: said.append(f"sleep {cycles}"))
    made = SimpleNamespace(cuda=cuda, uint8="u8", empty=lambda n, dtype, device: SimpleNamespace(zero_=lambda: said.append(f"flush {n}")))
    clock = SleepClock(made)
    elapsed = clock.sample(lambda: said.append("run"))
    assert said == [f"flush {256 << 20}", f"sleep {LEAD_CYCLES}", "event 0", "run", "event 1"] and elapsed() == 1.0
    clock.lead(lambda: time.sleep(0.01))
    said.clear()
    clock.sample(lambda: None)
    # 10 ms twice, at 2 GHz at most.
    assert 40_000_000 <= int(said[1].split()[1]) <= 400_000_000


def test_a_case_from_end_to_end(fake: bench.Bench) -> None:
    row = fake.case(SMALL, PEERS, run=3)
    assert list(row.entries) == [OURS, CUDNN, FA2, FA4, CUBLAS] and row.entries[CUDNN] == Entry(note="RuntimeError: no engine")
    assert {name: e.ms for name, e in row.entries.items() if e.ms} == {OURS: 2.0, FA2: 4.0, FA4: 3.0, CUBLAS: 1.0}
    assert (row.ratio(FA2), row.ratio(FA4), row.ratio(CUDNN), row.best()) == (2.0, 1.5, None, 1.5)
    assert row.tflops(OURS) == pytest.approx(SMALL.flops / 2e9) and row.share_of_cublas == pytest.approx(SMALL.flops / 2 / CUBLAS_FLOPS)
    # Rounding y to bf16, and nothing else: the same for all, whatever order of axes they return.
    errors = {name: row.error(name) for name in (OURS, FA2, FA4)}
    assert len(set(errors.values())) == 1 and 5e-4 < errors[OURS] < 3e-3 and row.error_ratio == 1.0
    assert {name: e.ms for name, e in row.sustained.items()} == {OURS: 2.0, FA2: 4.0, FA4: 3.0, CUBLAS: 1.0}
    assert row.entries[OURS].samples == 5 and row.sustained[OURS].samples == 3 and row.run == 3
    assert row.config.startswith("sm90 groups=1 keys=80 stages=3") and row.origin == "predicted"
    assert fake.clock.leads == 4
    alone = fake.case(Case("x", 1, 2, 33, d=64, causal=False, dtype="float16"), (), run=0)
    assert list(alone.entries) == [OURS, CUBLAS] and alone.sustained == {} and alone.best() is None and 1e-5 < alone.error(OURS) < 4e-4


def test_ours_by_another_path_than_a_call_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    long, fixed, device = Case("F1", 1, 16, 2048, d=64), {"path": "sm80"}, Device.of("h200")
    assert bench.choose_config(bench.op, bench.problem_of(long), device).config.path == "sm90"
    monkeypatch.setattr(bench, "apply", lambda op, p, x, **fixed: (asked.append((p.tq, fixed)), {"y": "here"})[1])
    assert bench.implementation(OURS, long, {}, fixed)() == "here" and asked == [(2048, {"path": "sm80"})]
    assert bench.choose_config(bench.op, bench.problem_of(long), device, tuple(fixed.items())).config.path == "sm80"


def test_graphs_are_timed_per_call(fake: bench.Bench) -> None:
    row = fake.case(Case("F8", 2, 2, 50, d=64, causal=False, graph=True), (CUDNN, FA4), run=0)
    assert {name: e.ms for name, e in row.entries.items()} == {OURS: 2.0, CUDNN: 6.0, FA4: 3.0, CUBLAS: 1.0}


def test_a_wrong_result_is_seen(fake: bench.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours off by one per cent; and with a NaN in a row that is looked at."""
    whole = bench.implementation
    for spoil in (lambda y: y * 1.01, lambda y: y.index_fill(1, torch.tensor([64]), math.nan)):
        monkeypatch.setattr(
            bench, "implementation", lambda n, c, x, f=None, s=spoil: (lambda: s(whole(n, c, x)())) if n == OURS else whole(n, c, x)
        )
        row = fake.case(SMALL, (FA2,), run=0)
        assert summary([row])[-1] == "ERRORS beyond 1.25 times FA2's: F1 B1 HQ2 H1 T65 d32 causal"
    # What ours says of itself costs its case alone; what nobody expects ends the run.
    monkeypatch.setattr(bench, "implementation", lambda n, c, x, f=None: whole(n, c, {**x, "k": x["k"][:, :, :, :8]} if n == OURS else x))
    row = fake.case(SMALL, (FA2,), run=0)
    assert row.entries[OURS].note.startswith("ArgumentError: k has shape") and row.ratio(FA2) is None and row.tflops(FA2)
    assert row.sustained.keys() == {FA2, CUBLAS}
    assert f"{SMALL.name}: ours: ArgumentError: k has shape" in show([row]) and "- TFLOP/s, FA2" in line(row)
    monkeypatch.setattr(bench, "implementation", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        fake.case(SMALL, (), run=0)


@pytest.mark.parametrize("causal", [True, False])
def test_exact_rows_agree_with_the_reference(causal: bool) -> None:
    from vidrial.kernels.flash_attention.op import check, example, reference

    case = Case("x", 2, 1, 67, d=32, e=64, hq=3, causal=causal)
    x = bench.inputs(case, "cpu")
    problem = example(t=67, b=2, h=1, hq=3, d=32, e=64, causal=causal)
    arrays = {name: v.view(torch.uint16).numpy() for name, v in x.items()}
    expected = reference(problem, arrays)
    exact = torch.from_numpy(expected["y"])
    assert max(Exact(x, rows=softmax(causal)).distance(exact)) < 1e-12
    assert min(Exact(x, rows=softmax(not causal)).distance(exact)) > 0.1
    wrong = exact.clone()
    wrong[0, 66, 0, 5] += 0.25
    found = Exact(x, rows=softmax(causal)).distance(wrong)
    assert found.max_error == pytest.approx(0.25 / expected["spread"][0, 66, 0, 5])
    results = {"y": exact.bfloat16().view(torch.uint16).numpy(), "lse": expected["lse"].astype("float32")}
    judged = check(problem, arrays, results, expected)
    assert Exact(x, rows=softmax(causal)).distance(exact.bfloat16()).relative == pytest.approx(judged.relative, rel=0.2)


def made_up(case: Case, ms: float, cudnn: float | None = None) -> Row:
    entries = {OURS: Entry(ms, 0.01, 15, None, 2e-3, 1e-3), CUDNN: Entry(cudnn, 0.1, 15, None, 2e-3, 1e-3) if cudnn else Entry(note="no"),
               FA2: Entry(3 * ms, 0.1, 15, None, 1.9e-3, 1e-3), CUBLAS: Entry(1.4)}  # fmt: skip
    return Row(case, "sm90 groups=3 keys=64", "shipped", entries, {OURS: Entry(2 * ms), FA2: Entry(3 * ms)} if case.sustained else {})


def test_tables() -> None:
    rows = [made_up(CASES[0], 0.7, 0.9), made_up(CASES[1], 1.4)]
    text = show(rows)
    lines = text.splitlines()
    assert len({len(x) for x in lines[:3]}) == 1
    tflops = CASES[0].flops / 0.7e9
    assert f"F1 B2 H16 T8192 d128 causal  0.7000 (0.0100)      {tflops:.0f}" in lines[1]
    assert f"{tflops * 0.7 / 0.9:.0f} (1.29)" in lines[1] and f"{tflops / 3:.0f} (3.00)" in lines[1] and "- (-)" in lines[1]
    assert lines[1].endswith("2.0e-03 / 2.0e-03 / 1.9e-03 / -")
    assert lines[4].startswith("sustained ") and f"{tflops / 2:.0f}" in lines[5] and "(1.50)" in lines[5]
    assert "F2 B2 H16 T8192 d128 full: SDPA cuDNN: no" in lines
    assert "all, cuDNN: 1.29 times as fast (geometric mean of 1), worst 1.29 at F1 B2 H16 T8192 d128 causal" in lines
    assert "sustained, the best peer: 1.50 times as fast (geometric mean of 2), worst 1.50 at F1 B2 H16 T8192 d128 causal" in lines
    assert "ERRORS" not in text and summary([]) == []
    beside = f"cuDNN {tflops * 0.7 / 0.9:.0f} (1.29), FA2 {tflops / 3:.0f} (3.00); sustained {tflops / 2:.0f}"
    assert line(rows[0]) == f"{tflops:.0f} TFLOP/s, {beside}; error 2.0e-03"


def test_results_file_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path, book = tmp_path / "new" / "flash_attention_h200.json", Book("NVIDIA H200", ({"date": "today"},))
    for case in CASES:
        book = book.with_row(made_up(case, case.flops / 7e11, case.flops / 6e11))
    book.save(path)
    data = json.loads(path.read_text())
    assert data["rows"][0]["ratio"] == {CUDNN: pytest.approx(7 / 6), FA2: pytest.approx(3)} and data["rows"][0]["tflops"][
        OURS
    ] == pytest.approx(700)
    assert Book.load(path, "NVIDIA H200", Row.from_json) == book
    monkeypatch.setattr(sys, "argv", ["flash_attention.py", "--show", str(path)])
    bench.main()
    assert "and .png" in (said := capsys.readouterr().out) and "F9 B1 HQ32 H8 T16411 d128 causal  " in said
    assert path.with_suffix(".png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not plot([made_up(CASES[-1], 1.0)], "a GPU", tmp_path / "none.png") and not (tmp_path / "none.png").exists()
    # Where there is no matplotlib the tables are printed all the same.
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    bench.main()
    assert "no plot: " in capsys.readouterr().out


def test_what_there_is_no_time_for_is_said_and_kept(fake: bench.Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases, path = [Case("T", 1, 1, t, d=32) for t in (33, 34, 35)], tmp_path / "x.json"
    whole, saved = fake.case, list[list[str]]()

    def case(one: Case, peers: Any, run: int) -> Row:
        if path.is_file():
            saved.append(json.loads(path.read_text())["runs"][0]["not_run"])
        if one.t == 34:
            # This one takes all but nothing of what is left.
            fake.until = time.monotonic() + bench.END_SECONDS
        return whole(one, peers, run)

    fake.case = case
    book = bench.measure(fake, cases, (FA2,), Book("g", ({},)), path)
    assert [row.case.t for row in book.rows] == [33, 34] and saved == [[c.name for c in cases[1:]]]
    written = json.loads(path.read_text())
    assert written["runs"][0]["not_run"] == ["T B1 H1 T35 d32 causal"] and len(written["rows"]) == 2
    assert "no time for 1 cases: T B1 H1 T35 d32 causal" in capsys.readouterr().out
    # A run that may take no time begins nothing, and writes nothing.
    fake.until = time.monotonic()
    assert bench.measure(fake, cases, (), Book("g", ({},)), tmp_path / "none.json").rows == () and not (tmp_path / "none.json").exists()


def test_the_command(fake: bench.Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[int, float]] = []

    def made(rounds: int, until: float, path: str = "") -> bench.Bench:
        asked.append((rounds, until - time.monotonic()))
        return fake

    monkeypatch.setattr(bench, "Bench", made)
    monkeypatch.setattr(bench, "CASES", (SMALL, Case("F3", 1, 1, 40, d=32)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    path = tmp_path / "flash_attention_h200.json"
    for words in (["--cases", "F1", "--rounds", "7", "--seconds", "50"], ["--cases", "F3", "--merge", "--no-peers"]):
        monkeypatch.setattr(sys, "argv", ["flash_attention.py", *words, "--out", str(tmp_path)])
        bench.main()
    said, written = capsys.readouterr().out, json.loads(path.read_text())
    assert asked[0][0] == 7 and 40 < asked[0][1] <= 50
    assert [row["name"] for row in written["rows"]] == ["F1 B1 HQ2 H1 T65 d32 causal", "F3 B1 H1 T40 d32 causal"]
    assert [list(row["entries"]) for row in written["rows"]] == [[OURS, CUDNN, FA2, CUBLAS], [OURS, CUBLAS]] and written["rows"][1][
        "run"
    ] == 1
    first, second = written["runs"]
    assert "flash_attn" in first["absent"][FA4] and "no FlashAttention-4: " in said and second["absent"] == {}
    assert (
        first["command"].startswith("python benchmarks/flash_attention.py --cases F1") and first["packages"]["torch"] == torch.__version__
    )
    assert first["not_run"] == [] and first["rounds"] == 7
    monkeypatch.setattr(sys, "argv", ["flash_attention.py", "--cases", "F77"])
    with pytest.raises(SystemExit, match="no case F77; there are F1, F3"):
        bench.main()


def test_peers_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peers' calls themselves, on the CPU: torch's math backend in SDPA's place, a package in FlashAttention-4's."""
    from benchmarks import peers

    monkeypatch.setattr(peers, "SDPA_BACKENDS", dict.fromkeys((CUDNN, FA2), "MATH"))
    given: dict[str, Any] = {}
    cute = SimpleNamespace(flash_attn_func=lambda q, k, v, **options: (given.update(options), (q, None))[1])
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(cute=cute))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    for case in (Case("x", 2, 2, 50, d=32, hq=4), Case("x", 2, 2, 50, d=32, e=64, causal=False)):
        x = bench.inputs(case, "cpu")
        exact = Exact(x, rows=softmax(case.causal))
        for name in (OURS, CUDNN, FA2):
            assert exact.distance(bench.output(name, bench.implementation(name, case, x)())).relative < 5e-3
        y = bench.output(FA4, bench.implementation(FA4, case, x)())
        assert y is x["q"] and given == {"causal": case.causal}
    assert bench.absent() == {}


def test_a_repeated_run() -> None:
    seen: list[int] = []
    repeated(lambda: seen.append(1), 5)()
    assert len(seen) == 5
