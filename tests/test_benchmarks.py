from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import compile as bench_compile
from benchmarks import power_retention as bench
from benchmarks import styles, warm_path
from benchmarks.common import CASES, RESULTS, Case, Work, geometric_mean, select, short, slug, table
from benchmarks.peers import OverBudget, peer_errors, within
from benchmarks.record import CUBLAS, CUBLAS_FLOPS, Book, Entry, Row, plot, show, summary
from vidrial.device import Device
from vidrial.host.target import compile_host


def row(case: Case, ms: float, peer: float | None = None) -> Row:
    """A row with made-up times."""
    entries = {
        "ours": Entry(ms, 0.01, 25, ms + 0.02, 2e-3, 1e-3),
        "retention C=1024": Entry(peer, 0.1, 25, 9.0, 3e-3, 2e-3) if peer else Entry(note="RuntimeError: no"),
        "retention C=512": Entry(99.0, 0.1, 25, 9.0, 3e-3, 2e-3) if peer else Entry(note="did not finish within 7 s"),
        "SDPA flash": Entry(2 * ms, 0.0, 25),
        CUBLAS: Entry(1.4, 0.0, 25),
    }
    return Row(case, "chunk=512 scan.tokens=64", "predicted", entries)


def test_flops_by_hand() -> None:
    # One head, d = 2, chunks of 4, 4 and 2 tokens: 23 pairs of 4 d FLOPs; 8 updates and 6 queries of a state of 3 rows x 2.
    work = Work.of(Case("x", 1, 1, 10, d=2, chunk=4))
    assert (work.intra, work.state) == (23 * 8, 2 * 3 * 2 * (8 + 6))
    # Two query heads on one state, two sequences: queries count for each head, updates once.
    grouped = Work.of(Case("x", 2, 1, 10, d=2, chunk=4, hq=2))
    assert (grouped.intra, grouped.state) == (4 * 23 * 8, 2 * 3 * 2 * (2 * 8 + 4 * 6))
    alone = Work.of(Case("x", 1, 1, 10, d=2, chunk=16))
    assert (alone.intra, alone.state) == (55 * 8, 0)


def test_flops_of_cases() -> None:
    by_name = {case.name: case.work for case in CASES}
    assert by_name["S B1 H16 T65536 d64"].flops == 16 * 4 * 64 * 64 * 1024 * 1025 / 2 + 2 * 2080 * 64 * 16 * 2 * 64512 == 687_194_767_360
    assert by_name["P2 B1 H8 T65536 d64"].flops * 2 == by_name["S B1 H16 T65536 d64"].flops
    assert by_name["P8 B1 HQ24 H2 T16384 d128"].state == 2 * 8256 * 128 * (2 + 24) * 15360


# From 8 x 8 pair tiles at 790 TFLOP/s; short sequences without chunks, which is less there.
FLOORS = {
    (1, 16, 4096, 64): 43.5,
    (1, 16, 16384, 64): 227,
    (1, 16, 65536, 64): 945,
    (1, 64, 65536, 64): 3779,
    (1, 16, 16384, 128): 1392,
    (1, 16, 65536, 128): 6171,
    (1, 16, 4096, 128): 87,
}


@pytest.mark.parametrize("case", FLOORS)
def test_floor(case: tuple[int, int, int, int]) -> None:
    b, h, t, d = case
    assert Case("x", b, h, t, d).work.floor_ms * 1e3 == pytest.approx(FLOORS[case], abs=0.6)


def test_cases() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(CASES) == 14
    assert sorted(case.t for case in CASES if case.in_series) == [1000, 4096, 5001, 10007, 16384, 33333, 65536]
    assert [case.t for case in select("P7", CASES)] == [33333, 10007, 5001, 1000]
    assert select("", CASES) == list(CASES)
    with pytest.raises(SystemExit, match="no case P99; there are L, P2, P3"):
        select("P2,P99", CASES)
    # The peer's tuning carries over between neighbours: each family stands in one piece.
    families = [(case.d, case.query_heads // case.h) for case in CASES]
    assert [f for i, f in enumerate(families) if i == 0 or f != families[i - 1]] == [(64, 1), (128, 1), (128, 12)]


def test_derived() -> None:
    case = Case("P2", 1, 8, 65536)
    made = row(case, 2.0, 9.0)
    assert made.ratio == 4.5 and made.peer.ms == 9.0
    assert made.tflops == pytest.approx(case.work.flops / 2e9)
    assert made.share_of_cublas == pytest.approx(case.work.flops / 2.0 / (CUBLAS_FLOPS / 1.4))
    assert made.share_of_floor == pytest.approx(case.work.floor_ms / 2.0)
    failed = row(case, 2.0)
    assert failed.ratio is None and failed.peer.note


def test_table() -> None:
    text = show([row(Case("P7", 1, 16, 1000), 0.1, 0.4), row(Case("P7", 1, 16, 5001), 0.2, 0.2), row(Case("P4", 1, 16, 65536, d=128), 9.0)])
    lines = text.splitlines()
    assert lines[1].split()[:8] == ["P7", "B1", "H16", "T1000", "d64", "512", "0.1000", "(0.0100)"] and " 4.00 " in lines[1]
    assert "P4 B1 H16 T65536 d128: retention C=512: did not finish within 7 s" in lines
    assert "odd lengths (P7): 2.00 times as fast as retention (geometric mean of 2), worst 1.00 at P7 B1 H16 T5001 d64" in lines
    assert summary([]) == []
    assert len({len(line) for line in lines[:4]}) == 1


def test_results_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "power_retention_h200.json"
    book = Book("NVIDIA H200", ({"date": "today"},))
    for case, ms in ((CASES[0], 3.0), (CASES[1], 5.0), (CASES[0], 2.0)):
        book = book.with_row(row(case, ms, 9.0))
    book.save(path)
    data = json.loads(path.read_text())
    assert data["gpu"] == "NVIDIA H200" and [r["name"] for r in data["rows"]] == [CASES[1].name, CASES[0].name]
    assert data["rows"][1]["ratio"] == 4.5 and data["rows"][1]["entries"]["ours"]["ms"] == 2.0
    assert Book.load(path, "NVIDIA H200", Row.from_json) == book
    assert Book.load(path, "NVIDIA H100", Row.from_json) == Book("NVIDIA H100")
    assert Book.load(tmp_path / "none.json", "x", Row.from_json).rows == ()


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    assert plot([row(case, case.t / 3e4, case.t / 5e3) for case in CASES], "a GPU", path)
    data = path.read_bytes()
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and (width, height) == (1050, 675)
    assert not plot([row(CASES[0], 1.0)], "a GPU", tmp_path / "none.png") and not (tmp_path / "none.png").exists()


def test_budget() -> None:
    begin = time.monotonic()
    with pytest.raises(OverBudget, match="did not finish within 0.05 s"), within(0.05):
        while time.monotonic() - begin < 5:
            pass
    assert time.monotonic() - begin < 2
    with within(0.05):
        pass
    time.sleep(0.1)
    assert OverBudget in peer_errors()


def test_small_things() -> None:
    assert geometric_mean([1.0, 4.0, 16.0]) == pytest.approx(4.0)
    assert table(("a", "bb"), [("xxx", "1")]) == "a    bb\nxxx   1"
    assert slug("NVIDIA H200") == "h200" and slug("NVIDIA H100 80GB HBM3") == "h100_80gb_hbm3"
    assert short(ValueError("a\n  b")) == "ValueError: a b" and len(short("x" * 500)) == 100


def test_exact_rows_agree_with_the_reference() -> None:
    torch = pytest.importorskip("torch")
    from benchmarks.accuracy import Exact
    from benchmarks.peers import inputs
    from vidrial.kernels.power_retention.op import check, example, reference

    case = Case("x", 2, 1, 67, d=32, hq=3)
    x = inputs(case, device="cpu")
    problem = example(t=67, b=2, h=1, hq=3, d=32)
    arrays = {name: (v.view(torch.uint16) if name != "log_g" else v).numpy() for name, v in x.items()}
    expected = reference(problem, arrays)
    exact = torch.from_numpy(expected["y"])
    assert max(Exact(x, chunk=16).distance(exact)) < 1e-12
    wrong = exact.clone()
    wrong[0, 66, 0, 5] += 0.25
    found = Exact(x, chunk=16).distance(wrong)
    assert found.max_error == pytest.approx(0.25 * expected["conditioning"][0, 66, 0] / float(x["v"].abs().max()))
    rounded = exact.bfloat16()
    judged = check(problem, arrays, {"y": rounded.view(torch.uint16).numpy()}, expected)
    assert Exact(x, chunk=16).distance(rounded).relative == pytest.approx(judged.relative, rel=0.2)


class FakeClock:
    """Every run takes 2 ms."""

    def sample(self, run: Any) -> Any:
        run()
        return lambda: 2.0

    def wait(self) -> None:
        pass

    def lead(self, run: Any) -> None:
        run()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[bench.Bench]:
    """The benchmark without a GPU: ours and the peer on the CPU, SDPA as torch has it there, a clock that says 2 ms."""
    torch = pytest.importorskip("torch")
    from benchmarks import peers

    made = bench.Bench.__new__(bench.Bench)
    made.torch = SimpleNamespace(cuda=SimpleNamespace(synchronize=lambda: None, empty_cache=lambda: None))
    made.rounds, made.budget, made.device, made.clock, made.cublas = 5, 5.0, Device.of("h200"), FakeClock(), lambda: None
    monkeypatch.setattr(bench, "inputs", lambda case: peers.inputs(case, device="cpu"))
    monkeypatch.setattr(bench, "WARM_SECONDS", 0.01)
    monkeypatch.setattr(bench, "CALL_MS", 4.0)

    def peer(x: Any, chunk: int) -> Any:
        if chunk == 512:
            raise RuntimeError("no kernel")
        return lambda: bench.power_retention(x["q"], x["k"], x["v"], x["log_g"])

    monkeypatch.setattr(bench, "retention", peer)
    monkeypatch.setattr(bench, "sdpa", lambda x, name: lambda: None)
    with torch.no_grad():
        yield made


def test_case_from_end_to_end(fake: bench.Bench) -> None:
    case = Case("x", 1, 1, 300, d=32, chunk=128, peer_chunks=(512, 128, 0))
    made = fake.case(case, peers=True, run=3)
    assert list(made.entries) == ["ours", "retention C=512", "retention C=128", "retention attention", "SDPA flash", "SDPA cuDNN", CUBLAS]
    assert made.entries["retention C=512"] == Entry(note="RuntimeError: no kernel")
    assert made.ratio == 1.0 and made.ours.samples == 5 and made.run == 3
    assert made.ours.relative is not None and 1e-4 < made.ours.relative < 5e-3 and made.peer.relative == made.ours.relative
    assert made.ours.call_ms is not None and made.config.startswith("chunk=")
    assert list(fake.case(case, peers=False, run=0).entries) == ["ours", CUBLAS]


def test_warm_path_report() -> None:
    calls = {"us_a_launch": 12.0, "call_us": 48.0, "launches": 4, "bare_us_a_launch": 7.0, "us_between_calls_on_gpu": 49.0}
    first = {
        "first_ms": 130.0,
        "imports_ms": 900.0,
        "cuda_ms": 200.0,
        "first_with_its_imports_ms": 140.0,
        "second_ms": 0.2,
        "cold_first_ms": 6000.0,
    }
    maps = {"maps": 3, "launch_us": 12.1, "call_us": 20.0, "encode_us": 3.5}
    lines = warm_path.report({"calls": calls, "processes": first, "maps": None})
    assert warm_path.report({"calls": calls, "processes": first, "maps": maps}) == [*lines, *warm_path.maps_report(maps)]
    assert warm_path.maps_report(maps)[0].startswith("MISS 12.1 us of host time per launch with 3 tensor maps (at most 12, aim 9)")
    assert warm_path.maps_report({**maps, "launch_us": 12.0})[0].startswith("ok  ")
    assert [line[:4] for line in lines] == ["ok  ", "    ", "    ", "MISS", "    "]
    assert "kept up" in lines[2] and "(at most 100)" in lines[3]
    assert warm_path.host_us(lambda: time.sleep(1e-4), lambda: None) > 100


def compile_row(name: str, style: str, registers: int, cpu: float, spills: int = 0) -> bench_compile.Row:
    return bench_compile.Row(name, style, "sm_80", "", cpu, cpu, 0.5, 0.5, 1.5, registers, spills, 0, 0, None)


def test_compile_verdicts() -> None:
    rows = [compile_row("gemm", "ours", 166, 1.0), compile_row("gemm", "cute", 160, 20.0), compile_row("scan", "ours", 255, 2.5, 8)]
    said = bench_compile.verdicts(rows, ["new.cu.j2"])
    assert said[0] == "MISS gemm sm_80: 166 registers, CuTe 160; 1.00 s, CuTe 20.0 s (20 times)"
    assert said[1].startswith("MISS at most 2 s") and "scan sm_80 2.50 / 0.50" in said[1] and "gemm" not in said[1]
    assert said[2] == "MISS no spills; scan sm_80 8 bytes" and said[3].endswith("; not new.cu.j2")
    assert bench_compile.verdicts(rows[:1], [])[0].startswith("ok  ")


def test_compile_covers_every_template() -> None:
    found = bench_compile.units(("sm_90a",), (64, 128), cute=True)
    assert bench_compile.missing_templates(found) == []
    assert sum(unit.style == "cute" for unit in found) == 2
    assert len({(unit.source.text, unit.arch) for unit in found}) == len(found)
    unit = next(u for u in found if u.source.entry == "power_gates")
    made = bench_compile.measure(unit, 1)
    assert 16 <= made.registers <= 128 and made.spills == 0 and 0 < made.cpu < 60 and made.seconds_pch is not None
    assert json.loads(json.dumps(bench_compile.document([made], ["ok"], 1)))["rows"][0]["registers"] == made.registers
    assert made.sass is None or made.sass > 100


def bf16(x: np.ndarray) -> np.ndarray:
    """float -> bf16 bits, nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def wide(x: np.ndarray) -> np.ndarray:
    """bf16 bits -> float64."""
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def test_our_tiles_compute() -> None:
    """What is compared with CuTe's style for registers is a GEMM and an attention, not something smaller."""
    rng = np.random.default_rng(0)
    pair = styles.gemm()
    a, b = (bf16(rng.standard_normal((128, 192))) for _ in range(2))
    c = np.full((128, 128), 0x7FC0, np.uint16)
    args = styles.Arguments(a="E*", b="E*", c="E*", m="int", n="int", k="int")
    run = compile_host(pair.ours.text, "gemm", include_dirs=pair.ours.include_dirs)
    run.launch((1, 1, 1), 128, pair.smem, args.pack({"m": 128, "n": 128, "k": 192}), {0: a, 8: b, 16: c})
    np.testing.assert_allclose(wide(c), wide(a) @ wide(b).T, rtol=2**-7, atol=0.05)

    pair = styles.attention(64)
    q, k, v = (bf16(rng.standard_normal((2, 128, 64))) for _ in range(3))
    o = np.full((2, 128, 64), 0x7FC0, np.uint16)
    args = styles.Arguments(q="E*", k="E*", v="E*", o="E*", t="int", scale_log2="float")
    run = compile_host(pair.ours.text, "attention", include_dirs=pair.ours.include_dirs)
    run.launch((2, 2, 1), 128, pair.smem, args.pack({"t": 128, "scale_log2": 0.125 * np.log2(np.e)}), {0: q, 8: k, 16: v, 24: o})
    weight = np.exp(0.125 * wide(q) @ wide(k).swapaxes(1, 2))
    np.testing.assert_allclose(wide(o), weight @ wide(v) / weight.sum(-1, keepdims=True), atol=0.02)


def test_versions_of_nvrtc_are_told_side_by_side() -> None:
    from benchmarks.nvrtc_versions import Row, shown, summary

    old, new = [Row(168, 0, 900, 0.5), Row(128, 8, 100, 0.25, ("C7517",))], [Row(160, 0, 880, 0.5), Row(refused="k: it spills 96 bytes")]
    assert summary(old) == "2 of 2 kernels; 148.0 registers on average, 1 spill, 1 with notes; 1000 instructions, 0.8 s"
    assert summary(new) == "1 of 2 kernels; 160.0 registers on average, 0 spill, 0 with notes; 880 instructions, 0.5 s"
    lines = [line.split() for line in shown(["a", "b"], ["13.0", "13.5"], [old, new]).splitlines()]
    assert lines[1] == ["a", "168", "160", "0", "0", "900", "880", "0.50", "0.50", "-", "-"]
    assert lines[2][:10] == ["b", "128", "0", "8", "0", "100", "0", "0.25", "0.00", "C7517"] and lines[2][10:] == [
        "k:",
        "it",
        "spills",
        "96",
        "bytes",
    ]


def test_the_other_nvrtc_was_no_worse_and_no_better() -> None:
    """Why 13.0 stays: the committed table."""
    found = json.loads((RESULTS / "nvrtc_versions.json").read_text())
    old, new = found["summary"]
    assert (old, new) == ("13.0", "13.5") and len(found["kernels"]) > 80
    for row in found["kernels"]:
        assert row[new]["refused"] == row[old]["refused"] == "" and row[new]["notes"] == row[old]["notes"], row["kernel"]
        assert row[new]["spills"] == 0 and abs(row[new]["registers"] - row[old]["registers"]) <= 8, row["kernel"]
