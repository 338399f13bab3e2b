"""`vidrial check`: every kernel here is right under every schedule and sanitizer, and planted bugs are found with their line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vidrial as vd
from vidrial.cli import main as cli
from vidrial.errors import ArgumentError, CheckError, ConfigError, DescriptionError, LaunchError, ToolchainError, UnsupportedError
from vidrial.host.check import GUARD_BYTES, Outcome, Report, assert_op_correct, check
from vidrial.host.cover import Case, cases, covering, diverse_configs, features, small_problems
from vidrial.host.plan import HostPlan
from vidrial.host.target import SCHEDULES, Schedule
from vidrial.kernels.power_retention import attend
from vidrial.layout.atoms import MMA_16x8x16
from vidrial.layout.smem import SharedMemory
from vidrial.spec.choices import axes
from vidrial.spec.op import Op
from vidrial.spec.registry import find_op

EXAMPLE = Path(__file__).parents[2] / "examples/softmax"
SOFTMAX = f"{EXAMPLE / 'softmax.py'}:op"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line: exit code, standard output, standard error."""

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(words))
        return int(ended.value.code or 0), *capsys.readouterr()

    return call


def launched(op: Op, report: Report) -> set[str]:
    return {s.kernel.name for o in report.outcomes for s in op.stages(o.problem, o.config)}


def test_power_retention() -> None:
    op = find_op("power_retention")
    report = check(op, [op.small(op.example(t=t, initial=t == 129, final=t == 129)) for t in (1, 129, 257)], configs=4)
    assert report.ok, report
    # Both forms, by both instructions, with states and without, so that every kernel runs, plain and under both sanitizers.
    assert launched(op, report) == {kernel.name for kernel in op.kernels}
    longer = [o for o in report.outcomes if o.problem.t > 1]
    assert {(o.config.chunk > 0, o.sanitizer) for o in longer} == {(c, s) for c in (False, True) for s in (None, "address", "thread")}
    assert len({o.config for o in report.outcomes}) == 4 and report.not_run[0].startswith("chunk=1024, ")
    assert report.not_run[-1] == "its gradients (vidrial check power_retention_backward)"
    assert all(o.schedules >= 2 and o.check is not None and o.check.ok for o in report.outcomes)


def test_power_retention_at_other_facts() -> None:
    op = find_op("power_retention")
    facts: dict[str, Any] = {"d": 32, "hq": 4, "h": 2, "dtype": "float16", "normalize": "none"}
    assert_op_correct(op, [op.example(t=t, **facts) for t in (7, 263)], 2, sanitizers=(None,))


def test_softmax(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("check", SOFTMAX, "--m", "5", "--n", "63", "--n", "1000", "--dtype", "bfloat16", "--configs", "3")
    assert code == 0
    assert "dtype=bfloat16 m=5" in out and "all 9 right" in out
    # What calls take first, then a config that makes choices which they do not.
    rows = [line.split() for line in out.splitlines() if " address " in line]
    assert [row[0] for row in rows] == ["n=63", "n=1000", "n=1000"]
    assert len({row[1] for row in rows}) >= 2 and "not run: row_threads=" in out
    # No terminal: a line per run.
    assert err.count("\n") == 9 and "check 6 of 6: right, " in err and "choices 3 of 3: right, " in err


# In the example's template: what stands there, what stands there instead; what is said, and a part of the line that is named.
BUGS = {
    "missing barrier": ("    __syncthreads();\n", "", "data race", "parts[first + w].x"),
    "mask off by one": ("i < vectors; i += Tiles::row_threads) y", "i <= vectors; i += Tiles::row_threads) y", "heap-buffer", "i <= v"),
    "static array of a helper too small": (
        "parts[Tiles::threads / 32]",
        "parts[Tiles::threads / 32 - 1]",
        "use-after-poison",
        "parts[warp] =",
    ),
    "wrong values": ("1.f / row.sum", "1.001f / row.sum", "wrong values", ""),
    "early return": ("  Part part;\n  if", "  if (row >= args.m) return;\n  Part part;\n  if", "have returned", "__syncthreads"),
    "no C++": ("  return v;\n}", "  return w;\n}", "does not compile", "return w;"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str, tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    right, wrong, said, line = BUGS[bug]
    template, description = tmp_path / "softmax.cu.j2", tmp_path / "planted.py"
    text = (EXAMPLE / template.name).read_text()
    assert text.count(right) == 1
    template.write_text(text.replace(right, wrong))
    # Few configs: several warps share a row, rows are read twice, and two are a CTA's.
    source = (EXAMPLE / "softmax.py").read_text().replace("vd.choice(128, 32, 8, 256, 512)", "vd.choice(64)")
    description.write_text(source.replace("vd.choice(1, 2, 4, 8, 16)", "vd.choice(2)").replace("vd.choice(0, 1, 2, 4, 8)", "vd.choice(0)"))
    code, out, err = run("check", f"{description}:op", "--m", "3", "--n", "129", "--configs", "1")
    assert code == 1 and err.count("\n") == 3
    assert said in " ".join(out.split())
    if line:
        numbers = [n for n, x in enumerate(template.read_text().splitlines(), 1) if line in x]
        assert any(f"softmax.cu.j2:{n}" in out for n in numbers), out
    assert "FAILED" in out and "failed" in out


def test_no_compiler_is_no_finding(run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, _, err = run("check", SOFTMAX, "--n", "7", "--quick")
    assert code == 2 and "apt-get install g" in err
    with pytest.raises(ToolchainError, match="no-such-compiler"):
        assert_op_correct(find_op(SOFTMAX))


def test_the_helper_raises_what_a_test_shows() -> None:
    op = find_op(SOFTMAX)
    impossible = dataclasses.replace(op, check=lambda *_: vd.Check(1.0, float("nan"), 1e-3, 1e-3))
    said = r"softmax: 1 of 1 runs failed\n.*row_threads=.*plain, 3 schedules: FAILED: wrong values: of no element alone; 1.0e\+00 relative"
    with pytest.raises(CheckError, match=said):
        assert_op_correct(impossible, [op.example(n=3, m=2)], configs=1, sanitizers=(None,))
    assert issubclass(CheckError, AssertionError)


def test_outcomes_keep_a_summary_and_the_report() -> None:
    outcome = Outcome(1, vd.Check, "thread", 2, None, "data race\n  at a.cu:3\nwhole report:\nlong", 0.0)
    assert outcome.summary == "data race\n  at a.cu:3"


def test_unlike_configs() -> None:
    op = find_op("power_retention")
    problem = small_problems(op, {"t": 257, "d": 32})[0]
    device = vd.Device.of("h200")
    first, second, third = diverse_configs(op, problem, 3)
    assert first == op.predicted(problem, device)
    kernels = [{s.kernel.name for s in op.stages(problem, c)} for c in (first, second)]
    # Of 32 features no warpgroup has its fill.
    assert kernels[0] | kernels[1] == {k.name for k in op.kernels} - {"power_scan_wgmma", "power_states"}
    # But where a state is asked for, which by itself is one problem of all that are checked.
    (states,) = [c.run for c in cases(op, {"t": 257}) if c.run.initial or c.run.final]
    assert states.initial and states.final and "power_states" in {s.kernel.name for s in op.stages(states, op.predicted(states, device))}
    assert third not in (first, second) and op.reject(problem, third, device) is None
    only = dataclasses.replace(find_op(SOFTMAX), rules=lambda p, c: iter([(c == type(c)(), "no")]))
    assert diverse_configs(only, only.example(n=129), 3) == [only.config()]
    with pytest.raises(ArgumentError, match="softmax: problems=0, configs=None check nothing"):
        check(only, [])


def test_sizes_that_are_left_open_are_aligned_and_odd() -> None:
    softmax, gemm, scan = (find_op(f"{EXAMPLE.parent / name / name}.py:op") for name in ("softmax", "gemm", "scan"))
    assert [(c.run.m, c.run.n) for c in cases(softmax) if not c.spare] == [(37, n) for n in (1, 129, 257, 264, 4099)]
    assert [c.run.n for c in cases(softmax) if c.spare] == [130, 132, 265, 266, 268]
    # What is given is kept, and what is cut is known.
    assert cases(softmax, {"n": 77, "m": 50}) == [Case(softmax.example(n=77, m=50), softmax.example(n=77, m=37))]
    # Keywords that have defaults: these, and their odd neighbours; others for what rows of other alignments allow.
    sizes = [(c.run.m, c.run.n, c.run.k) for c in cases(gemm)]
    # Then its flags: the one that is off, and the one that is on.
    assert sizes[:4] == [(197, 136, 456), (197, 137, 457)] + 2 * [(197, 136, 456)] and [c.spare for c in cases(gemm)] == 4 * [False] + 8 * [
        True
    ]
    assert [(c.run.gelu, c.run.biased) for c in cases(gemm)][1:5] == [(False, True), (True, True), (False, False), (False, True)]
    assert not any(c.run.gelu for c in cases(gemm, {"gelu": False}))
    # Flags that exclude each other are on one by one.
    power = find_op("power_retention")
    one = dataclasses.replace(power, rules=lambda p, c: [*power.rules(p, c), (not (p.initial and p.final), "of one call")])
    assert [(c.run.initial, c.run.final) for c in cases(one, {"t": 257})] == [*2 * [(False, False)], (True, False), (False, True)]
    assert sizes[4:] == [
        (197, n, k) for n, k in ((138, 458), (140, 460), *((136 + d, 456) for d in (1, 2, 4)), *((136, 456 + d) for d in (1, 2, 4)))
    ]
    long = [case for case in cases(scan) if not case.spare][-1]
    assert (long.asked.t, long.run.t) == (1_000_003, 70_001)
    # Of several lengths no two are equal.

    def example(*, m: int, n: int) -> Any:
        return softmax.example(m=m, n=n)

    both = dataclasses.replace(softmax, example=example)
    assert [(c.asked.m, c.asked.n) for c in cases(both)] == [
        (1, 1),
        (129, 131),
        (257, 259),
        (264, 280),
        (4099, 4101),
        (130, 134),
        (132, 140),
        # Rows are cut to 37: only the other size alone makes problems that are not there yet.
        (264, 281),
        (264, 282),
        (264, 284),
    ]


def test_lengths_that_no_config_serves_are_left_out() -> None:
    softmax = find_op(SOFTMAX)
    eighths = dataclasses.replace(softmax, rules=lambda p, c: iter([(p.n % 8 == 0, "n: accepted: multiples of 8")]))
    assert [c.run.n for c in cases(eighths) if not c.spare] == [264]
    none = dataclasses.replace(softmax, rules=lambda p, c: iter([(False, "never")]))
    with pytest.raises(ConfigError, match=r"no --n was given, and no length that was tried is served; give --n \.\.\.: .*never"):
        cases(none)


@pytest.mark.parametrize("name", ["softmax", "scan", "gemm"])
def test_every_choice_that_is_legal_is_made(name: str) -> None:
    op, device = find_op(f"{EXAMPLE.parent / name / name}.py:op"), vd.Device.of("h200")
    problems, seen = [case.run for case in cases(op)][::-1], set()
    rows = list(covering(op, problems, seen))
    assert all(op.reject(*row, device) is None for row in rows)
    made = set().union(*(features(op, *row) for row in rows))
    # Of float32 no vector has 8 elements: 16 bytes are loaded at once.
    missing = {(n, v) for n, values in axes(op.config).items() for v in values} - made
    assert missing == ({("vector", 8)} if name == "softmax" else set())
    assert {kernel for kind, kernel in made if kind == ""} == {kernel.name for kernel in op.kernels}
    # All parts vary at once.
    assert len(rows) <= {"softmax": 8, "scan": 5, "gemm": 18}[name]
    # And pairs.
    before = len(seen)
    more = [next(covering(op, problems[:1], seen, pairs=True)) for _ in range(2)]
    assert len(seen) > before and more[0] != more[1]


def test_the_config_of_a_call_comes_first_and_is_said_if_it_is_not_legal_once_cut() -> None:
    op = find_op(SOFTMAX)
    wide = op.config(vector=4, keep=0)
    case = Case(op.example(m=3, n=1000), op.example(m=3, n=63))
    report = check(op, [case], 1, (None,), config=wide)
    assert report.ok and [o.config for o in report.outcomes] == [op.predicted(case.run, vd.Device.of("h200"))]
    assert report.notes == ("row_threads=128 rows=1 vector=4 keep=0, for m=3 n=1000, is not legal for m=3 n=63: vector=4 must divide n=63, "
                            "or the second row is not aligned to it, so not run",)  # fmt: skip
    assert "vector=2, 4, 8" in report.not_run
    with pytest.raises(ConfigError, match="softmax: row_threads=128 rows=1 vector=4 keep=0, for m=3 n=1000, is not legal"):
        check(op, [case], config=wide, only=True)
    said = [o.config for o in check(op, [op.example(m=3, n=64)], 1, (None,), config=wide).outcomes]
    assert said == [wide]


def test_nothing_new_begins_when_time_is_over() -> None:
    op = find_op(SOFTMAX)
    report = check(op, [op.example(m=3, n=64)], sanitizers=(None,), minutes=0)
    # What a call takes is run in any case.
    assert report.ok and len(report.outcomes) == 1 and "plain for lack of time (--minutes)" in report.not_run[0]
    assert not any("gradients" in said for said in report.not_run)


@pytest.mark.parametrize("backward", ["power_retention_backward", f"{EXAMPLE.parent / 'scan/scan.py'}:op", "nowhere"])
def test_that_gradients_were_not_run_is_said_with_what_runs_them(backward: str) -> None:
    op, other = find_op(SOFTMAX), find_op("power_retention_backward" if backward == "nowhere" else backward)
    other = dataclasses.replace(other) if backward == "nowhere" else other
    report = check(dataclasses.replace(op, backward=other), [op.example(m=3, n=64)], sanitizers=(None,), config=op.config(), only=True)
    said = (
        "by power_retention_backward (op power_retention_backward cannot be found"
        if backward == "nowhere"
        else f"(vidrial check {backward})"
    )
    assert report.ok and len(report.not_run) == 1 and said in str(report)


def test_failures_that_say_the_same_are_one() -> None:
    texts = (f"{SCHEDULES[2]}: block (0, 0, 0): race\n  write of size 4 at a.cu.j2:7", "block (3, 0, 0): race\n  write of size 8 at a.cu.j2:7",
             "block (0, 0, 0): race\n  write of size 4 at a.cu.j2:9", "")  # fmt: skip
    report = Report("a", tuple(Outcome(i, vd.Check, None, 3, None, text, 0.0, choices=f"x={i}") for i, text in enumerate(texts)))
    assert [[o.problem for o in group] for group in report.groups()] == [[0, 1], [2]]
    assert str(report).count("the same: 1 with x=1, plain, 3 schedules") == 1 and str(report).startswith("a: 3 of 4 runs failed")


def test_schedules_are_said_in_words() -> None:
    assert [str(schedule) for schedule in (*SCHEDULES, Schedule(order=7))] == [
        "copies at the wait, threads rising",
        "copies at issue, threads falling",
        "copies at the wait, threads shuffled (5), waiters first",
        "copies at the wait, threads shuffled (7)",
    ]


def test_wrong_values_name_the_output_and_the_first_element() -> None:
    op = find_op(SOFTMAX)

    def reference(p: Any, x: Any) -> dict[str, Any]:
        exact = op.reference(p, x)
        exact["y"][1, 2:] += 0.5
        return exact

    report = check(dataclasses.replace(op, reference=reference), [op.example(m=2, n=5)], 1, (None,))
    found = re.search(r"wrong values: y: 3 of 10 elements, the first y\[1, 2\]: expected (0\.\d+), got (0\.\d+); ", str(report))
    assert found is not None and float(found[1]) - float(found[2]) == pytest.approx(0.5, abs=1e-5)


def test_a_reference_without_an_output_is_refused() -> None:
    op = find_op(SOFTMAX)
    other = dataclasses.replace(op, reference=lambda p, x: {"out": np.zeros((p.m, p.n))})
    with pytest.raises(DescriptionError, match=r"op softmax: reference\(\) gives out; its outputs have y"):
        check(other, [op.example(m=2, n=5)], 1, (None,))


# A kernel of two regions: each thread fills its own 16 bytes of the first, and reads what is there.
REGIONS = """#include <vidrial/prelude.cuh>
#pragma nv_hdrstop
#include <vidrial/tile/smem.cuh>
{{ tiles }}
{{ args }}
extern "C" __global__ void __launch_bounds__(Tiles::threads) regions(__grid_constant__ Args const args) {
  VIDRIAL_SHARED_MEMORY(raw);
  float* const first = reinterpret_cast<float*>(raw + Tiles::Smem::First);
  float* const second = reinterpret_cast<float*>(raw + Tiles::Smem::Second);
  int const t = threadIdx.x;
  second[t] = 1.f;
  __syncthreads();
  WRITE
  __syncthreads();
  args.y[t] = second[t] + (t < 31 ? first[t] : 0.f);
}
"""
WRITES = {
    "plain": (None, "first[t + 1] = 2.f;", "written right behind the end of a region"),
    "address": ("address", "first[t + 1] = 2.f;", "use-after-poison"),
    "ldmatrix": (
        None,
        "uint32_t r; cute::SM75_U32x1_LDSM_N::copy(*reinterpret_cast<cute::uint128_t*>(first + 4 * t + 4), r); first[t] = r;",
        "not in shared memory",
    ),
    "cp.async": (
        None,
        "cute::SM80_CP_ASYNC_CACHEALWAYS<float>::copy(args.y[t], first[t + 1]); cute::cp_async_wait<0>();",
        "not in shared memory",
    ),
}


@dataclasses.dataclass(frozen=True)
class Nothing:
    n: int = vd.dynamic()


@dataclasses.dataclass(frozen=True)
class One:
    threads: int = vd.choice(32)


def regions_op(folder: Path, write: str) -> Op:
    template = folder / "regions.cu.j2"
    template.write_text(REGIONS.replace("WRITE", write))
    kernel = vd.Kernel(
        "regions",
        template,
        Nothing,
        One,
        vd.Arguments(y="float*", n="int"),
        lambda p, c: vd.Tiles(threads=32, smem=SharedMemory(First=128, Second=1024)),
        lambda p, c: (1, 1, 1),
    )
    return vd.Op.of(
        kernel,
        example=lambda n: Nothing(n),
        sample=lambda p, seed: {},
        reference=lambda p, x: {"y": np.zeros(32)},
        check=lambda p, x, y, z: vd.Check(float(np.isnan(y["y"][:31]).sum()), 0.0, 0.5, 0.5),
        inputs=lambda p: {},
        outputs=lambda p: {"y": vd.Buffer((32,), vd.DType.float32)},
        small=lambda p: p,
    )


@pytest.mark.parametrize("how", WRITES)
def test_an_overflow_into_the_next_region_is_found(how: str, tmp_path: Path) -> None:
    sanitizer, write, said = WRITES[how]
    op = regions_op(tmp_path, write)
    # As on the GPU, the second region begins where the first one ends, or where its alignment allows.
    report = check(op, [Nothing(1)], 1, (sanitizer,))
    assert not report.ok and said in str(report)
    if how != "plain":
        assert f"regions.cu.j2:{1 + REGIONS.split('WRITE')[0].count(chr(10))}" in str(report)
    assert check(regions_op(tmp_path, "first[t] = 2.f;"), [Nothing(1)], 1, (sanitizer,)).ok


def test_guards_move_regions_and_nothing_else() -> None:
    plain = SharedMemory(First=100, Second=100, Third=2048)
    assert plain.members() == {"First": 0, "Second": 128, "Third": 1024} and plain.gaps() == ((100, 28), (228, 796))
    guarded = plain.guarded(GUARD_BYTES)
    assert guarded.members() == {"First": 0, "Second": 1152, "Third": 3072} and guarded.gaps() == ((100, 1052), (1252, 1820))
    assert [guarded.size(name) for name in guarded.members()] == [100, 100, 2048]
    assert all(size >= GUARD_BYTES for _, size in guarded.gaps())
    # But for regions across which something else lies later: that of the GEMM's C, where it is larger than the stages of A.
    assert SharedMemory(First=256, Second=100, Third=2048).join("Second").guarded(GUARD_BYTES).members() == {
        "First": 0, "Second": 256, "Third": 2048
    }  # fmt: skip
    gemm = find_op(f"{EXAMPLE.parent / 'gemm/gemm.py'}:op")
    for columns, gaps in ((128, ()), (64, ((24576, GUARD_BYTES),))):
        config = gemm.kernels[0].config(rows=128, columns=columns, depth=32, stages=3, warps=4, blocks=2, load=2, store=2, mma="wgmma")
        assert gemm.kernels[0].resolve(gemm.example(n=137, k=457), config).guarded(GUARD_BYTES).smem.gaps() == gaps


def test_the_high_water_mark_does_not_see_guards(tmp_path: Path) -> None:
    op = regions_op(tmp_path, "first[t] = 2.f;")
    y = np.zeros(32, np.float32)
    for guard, start in ((0, 1024), (GUARD_BYTES, 2048)):
        stats = HostPlan(op, Nothing(1), One(), guard=guard).run({"y": y})["regions"]
        assert stats.shared_memory_high_water == start + 32 * 4
        assert (y[:31] == 3).all()


def test_what_is_not_emulated_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    op = find_op("power_retention")
    problem = op.example(t=129, h=1, d=32)
    config = op.predicted(problem, vd.Device.of("a100"))
    newer = {dtype: dataclasses.replace(atom, arch=100, name="tcgen05 like mma.sync") for dtype, atom in MMA_16x8x16.items()}
    monkeypatch.setattr(attend, "MMA_16x8x16", newer)
    # Another kernel object, whose tiles nobody has kept.
    kernel = dataclasses.replace(attend.power_attend)
    last = dataclasses.replace(op.stages(problem, config)[-1], kernel=kernel)
    op = dataclasses.replace(op, stages=lambda p, c: (last,))
    with pytest.raises(UnsupportedError, match=r"power_attend: PS is made of tcgen05 like mma\.sync, which begins with sm_100; the host"):
        HostPlan(op, problem, config)
    device = dataclasses.replace(vd.Device.of("h200"), arch="sm_80")
    monkeypatch.setattr(vd.Device, "of", classmethod(lambda cls, name: device))
    report = check(op, [problem], 1, (None,))
    assert not report.ok and "begins with sm_100" in str(report)


def test_inputs_are_read_only(tmp_path: Path) -> None:
    op = regions_op(tmp_path, "first[t] = 2.f;")
    wrong = dataclasses.replace(op, sample=lambda p, seed: {"y": np.zeros(32, np.float32)}, outputs=lambda p: {}, inputs=op.outputs)
    report = check(wrong, [Nothing(1)], 1, (None,))
    assert "which is read-only" in str(report)
    with pytest.raises(LaunchError, match="read-only"):
        x = np.zeros(32, np.float32)
        x.flags.writeable = False
        HostPlan(op, Nothing(1), One()).run({"y": x})
