"""Power retention by wgmma: the same kernels as on a Hopper GPU, on the host target, against the float64 reference."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planting import planted
from power_host import PARTS, assert_right, late_error, plant, run

from vidrial.build.nvrtc import Cubin
from vidrial.build.pool import CompilePool, Job
from vidrial.device import Device
from vidrial.errors import CompileError, LaunchError
from vidrial.host import plan as plans
from vidrial.host.target import SCHEDULES, Schedule
from vidrial.kernels.power_retention import attend, scan, scan_wgmma
from vidrial.kernels.power_retention.attend import Config as Attend
from vidrial.kernels.power_retention.op import RELATIVE_BOUND, Config, check, example, op, reference, sample
from vidrial.kernels.power_retention.scan import Config as Scan
from vidrial.spec.choices import configs
from vidrial.spec.source import Source
from vidrial.tune.pick import choose_config

H200 = Device.of("h200")
SCAN = Scan(tokens=64, stages=4, warps=4, columns=64, segments=1, tiles=5, mma="wgmma")
ATTEND = Attend(keys=64, m=2, warps=4, stages=3, blocks=2, mma="wgmma")
BOTH = Config(128, SCAN, ATTEND)
TWO_WARPGROUPS = Config(256, dataclasses.replace(SCAN, warps=8, tiles=3), Attend(64, 2, 8, 4, 1, "wgmma"))
WIDE = Config(256, Scan(64, 4, 8, 128, 1, 3, "wgmma"), Attend(64, 2, 8, 3, 1, "wgmma"))


def scanned(config: Config, **choices: Any) -> Config:
    """The same with other choices of the scan."""
    return dataclasses.replace(config, scan=dataclasses.replace(config.scan, **choices))


CASES: dict[str, tuple[dict[str, Any], Config]] = {
    "one token": ({"t": 1, "h": 2, "d": 64}, Config(0, Scan(), ATTEND)),
    "attention form, D = 32": ({"t": 193, "h": 1, "d": 32}, Config(0, Scan(), ATTEND)),
    "attention form, E < D = 128, grouped": ({"t": 259, "h": 1, "hq": 3, "d": 128, "e": 32}, Config(0, Scan(), ATTEND)),
    "attention form, long blocks of keys": ({"t": 389, "h": 1, "d": 64}, Config(0, Scan(), Attend(128, 2, 8, 3, 1, "wgmma"))),
    "degree 4, no sum, no gates": (
        {"t": 131, "h": 1, "d": 64, "degree": 4, "normalize": "none", "gated": False},
        Config(0, Scan(), ATTEND),
    ),
    "one token past a chunk": ({"t": 129, "h": 1, "d": 64}, BOTH),
    "five tiles, two batches": ({"t": 391, "b": 2, "h": 1, "d": 64}, BOTH),
    "three segments": ({"t": 643, "h": 1, "hq": 2, "d": 64}, scanned(BOTH, segments=3)),
    "no gates": ({"t": 391, "h": 1, "d": 64, "gated": False}, scanned(BOTH, segments=2)),
    "no sum": ({"t": 391, "h": 1, "d": 64, "normalize": "none"}, scanned(BOTH, segments=2)),
    "two tiles, the last d alone": ({"t": 263, "h": 1, "d": 64}, scanned(BOTH, tiles=2, stages=5)),
    "two warpgroups": ({"t": 777, "h": 1, "d": 64}, TWO_WARPGROUPS),
    "128 tokens per block": ({"t": 521, "h": 1, "d": 64}, scanned(TWO_WARPGROUPS, tokens=128, tiles=2)),
    "D = 128": ({"t": 521, "h": 1, "d": 128}, WIDE),
    "D = 128, half the columns, two tiles": (
        {"t": 263, "h": 1, "d": 128},
        Config(128, dataclasses.replace(SCAN, warps=8, tiles=2), Attend(32, 2, 4, 4, 2, "wgmma")),
    ),
    "E = 128 > D = 64": ({"t": 521, "h": 1, "d": 64, "e": 128}, WIDE),
    "E = 32 < D = 64": ({"t": 263, "h": 1, "d": 64, "e": 32}, scanned(BOTH, columns=32, tiles=3)),
    "E = 64 < D = 128": ({"t": 263, "h": 1, "d": 128, "e": 64}, scanned(BOTH, tiles=3)),
    "three CTAs per SM, 32 keys": ({"t": 391, "h": 1, "d": 64}, Config(256, SCAN, Attend(32, 2, 4, 4, 3, "wgmma"))),
    "three CTAs per SM, 64 keys": ({"t": 391, "h": 1, "d": 64}, Config(256, SCAN, Attend(64, 2, 4, 3, 3, "wgmma"))),
    "scan alone": ({"t": 391, "h": 1, "d": 64}, dataclasses.replace(BOTH, attend=Attend())),
    "attend alone": ({"t": 391, "h": 1, "d": 64}, dataclasses.replace(BOTH, scan=Scan())),
}


@pytest.mark.parametrize("case", CASES)
def test_kernels(case: str) -> None:
    keywords, config = CASES[case]
    p = example(**keywords)
    assert op.reject(p, config, H200) is None
    inputs = sample(p, 21)
    results, stats = run(p, config, inputs)
    assert_right(p, config, inputs, results)
    by_wgmma = [name for name, s in stats.items() if s.wgmma]
    assert by_wgmma == [s.kernel.name for s in op.stages(p, config) if getattr(s.config, "mma", "") == "wgmma"]
    assert all(stats[name].ldmatrix_conflicts == stats[name].shared_load_conflicts == stats[name].mma == 0 for name in by_wgmma)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_schedules_change_no_bit(schedule: Schedule) -> None:
    p, config = example(t=515, h=1, d=64), scanned(BOTH, segments=2)
    inputs = sample(p, 22)
    first, _ = run(p, config, inputs)
    again, _ = run(p, config, inputs, schedule)
    assert_right(p, config, inputs, again)
    assert (first["y"] == again["y"]).all()


@pytest.mark.parametrize("gates", [0.0, 0.01, 20.0, 300.0, np.inf])
def test_gates(gates: float) -> None:
    p, config = example(t=515, h=1, d=64), scanned(BOTH, segments=2)
    inputs = sample(p, 23)
    with np.errstate(invalid="ignore"):
        inputs["log_g"] = (inputs["log_g"] * np.float32(gates)).astype(np.float32)
    results, _ = run(p, config, inputs)
    assert_right(p, config, inputs, results)


@pytest.mark.parametrize(("sanitizer", "t"), [("address", 393), ("thread", 261)])
def test_sanitizers(sanitizer: str, t: int) -> None:
    p, config = example(t=t, h=1, d=64), scanned(BOTH, segments=2)
    inputs = sample(p, 24)
    results, _ = run(p, config, inputs, sanitizer=sanitizer)
    assert_right(p, config, inputs, results)


# One change of the device code each, which the measures or the host target must see: file, what stands there, what stands there instead.
WRONG = {
    "multiplicity": ("power_scan_wgmma", "is_state && first_d + m > 0 ? 2.f : 1.f", "1.f"),
    "a wrapped tile as it is": ("power_scan_wgmma", "block_i <= j ? feature * 8", "true ? feature * 8"),
    "the last pairs left out": ("power_scan_wgmma", "return d < kBlocks / 2 ||", "return d < kBlocks / 2 || false &&"),
    "keys not discounted in the state": ("power_scan_wgmma", "ki[m] = discount(ki[m], stage, own_warp * 32 + m * 8);", ""),
    "rows of Z not discounted": ("power_scan_wgmma", "a[0][r] = discount(a[0][r], stage, k * 16 + r / 2 * 8);", ""),
    "another half of the products": (
        "power_scan_wgmma",
        "update_state(count, stage, block % 2);",
        "update_state(count, stage, (block + 1) % 2);",
    ),
    "factors of the group after": ("power_scan_wgmma", "y)[4] = kj[g % (1 + kAhead)];", "y)[4] = kj[0];"),
    "the last tiles of all left out": ("power_scan_wgmma", "!Tiles::drops_last || stored(M - 1)", "!Tiles::drops_last"),
    "state not discounted over a chunk": ("power_tokens", "return exp2_approx(total.x + total.y);", "return 1.f;"),
    "no normaliser of the state": ("power_query", "QZ::gemm(z, load_q", "if (m > 0) QZ::gemm(z, load_q"),
    "half the rows left out of a block that they see": ("power_attend", "min(mine - kLower, last)", "min(mine - 2 * kLower, last)"),
    "the second 64 rows' keys, in the serial order": (
        "collective/attention",
        "if (m + 1 < M) QK::gemm(s, q, m + 1, 0",
        "if (m + 1 < M) QK::gemm(s, q, m, 0",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_kernel_is_found(case: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    p, config = example(t=515, h=1, d=64), scanned(BOTH, segments=2)
    inputs = sample(p, 25)
    inputs["log_g"] *= np.float32(0.1)
    exact = reference(p, inputs)
    right, _ = run(p, config, inputs)
    assert check(p, inputs, right, exact).ok
    plant(monkeypatch, tmp_path, *WRONG[case])
    if "order" in case:
        request.getfixturevalue("serially")
    results, _ = run(p, config, inputs)
    assert not check(p, inputs, results, exact).ok
    assert not late_error(p, config, results, exact) <= RELATIVE_BOUND


# What wgmma's running on by itself makes possible, and the host target's reason about it; none: the answer is wrong.
EARLY: dict[str, tuple[str, str, str, str | None]] = {
    "no wait for the scores": (
        "collective/attention",
        "if (m == First) QK::template wait<0>();",
        "if (m == First) ;",
        "was written before the wait",
    ),
    "no wait before the state is written": (
        "power_scan_wgmma",
        "    State::template wait<0>();\n    acc.fence();\n    if (n > segment.first) store",
        "    if (n > segment.first) store",
        "its accumulator 0 was written before the wait",
    ),
    "a stage refilled while it is read": (
        "pipeline/ring",
        "kFirst = Stages - Read;",
        "kFirst = Stages - (Ahead ? Read : 1);",
        "was overwritten before the wait",
    ),
    "a stage of tokens refilled while it is read": (
        "pipeline/ring",
        "read = 0, write = kFirst;",
        "read = 0, write = Ahead && Async ? kFirst - 1 : kFirst;",
        None,
    ),
    "no fence": ("pipeline/ring", "if constexpr (Async) fence_async_proxy();", "", "no thread has called fence_async_proxy since"),
}


@pytest.mark.parametrize("case", EARLY)
def test_what_comes_too_early_is_found(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    p, config = example(t=515, h=1, d=64), BOTH
    inputs = sample(p, 26)
    *change, reason = EARLY[case]
    plant(monkeypatch, tmp_path, *change)
    if reason:
        with pytest.raises(LaunchError, match=reason):
            run(p, config, inputs)
    else:
        results, _ = run(p, config, inputs)
        assert not check(p, inputs, results, reference(p, inputs)).ok


def in_serial_order(text: str) -> str:
    """A rendered source whose power_attend takes the order of configs that have no registers for the overlapped one."""
    return text.replace("overlapped = true", "overlapped = false").replace("halves = true", "halves = false")


@pytest.fixture
def serially(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All plans take the serial order from here on; the sources that were changed by it."""
    compile_host, changed = plans.compile_host, []

    def compile_other(text: str, *arguments: Any, **options: Any) -> Any:
        other = in_serial_order(text)
        changed.extend([other] * (other != text))
        return compile_host(other, *arguments, **options)

    monkeypatch.setattr(plans, "compile_host", compile_other)
    return changed


@pytest.mark.parametrize("case", CASES)
def test_the_serial_order(case: str, request: pytest.FixtureRequest) -> None:
    """Sums in another order, so not the same bits; the same products but those of rows that see nothing of a block on the diagonal."""
    keywords, config = CASES[case]
    p = example(**keywords)
    inputs = sample(p, 27)
    _, overlapped = run(p, config, inputs)
    halved = p.t > 64 and attend.halves(op.stages(p, config)[-1].problem, config.attend)
    changed: list[str] = request.getfixturevalue("serially")
    results, stats = run(p, config, inputs)
    assert len(changed) == attend.overlapped(op.stages(p, config)[-1].problem, config.attend)
    assert_right(p, config, inputs, results)
    more = stats["power_attend"].wgmma - overlapped["power_attend"].wgmma
    assert more > 0 if halved else more == 0
    assert (stats["power_attend"].wgmma > 0) == (config.attend.mma == "wgmma")


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("gates", [0.01, 20.0, 300.0])
def test_orders_under_every_schedule(schedule: Schedule, gates: float) -> None:
    for keys in (32, 64):
        p, config = example(t=515, h=1, d=64), Config(256, SCAN, Attend(keys, 2, 4, 4, 2, "wgmma"))
        assert attend.halves(op.stages(p, config)[-1].problem, config.attend)
        inputs = sample(p, 28)
        inputs["log_g"] = (inputs["log_g"] * np.float32(gates)).astype(np.float32)
        results, _ = run(p, config, inputs, schedule)
        assert_right(p, config, inputs, results)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_the_serial_order_under_sanitizers(sanitizer: str, serially: list[str]) -> None:
    p = example(t=261, h=1, d=64)
    inputs = sample(p, 29)
    results, _ = run(p, BOTH, inputs, sanitizer=sanitizer)
    assert_right(p, BOTH, inputs, results)
    assert len(serially) == 1


# As EARLY, of the overlapped order: what stands there, what stands there instead, the host target's reason.
EARLY_OVERLAPPED: dict[str, tuple[str, str, str | None]] = {
    "no wait for the first scores": ("else QK::template wait<0>();\n      CUTE_UNROLL", "CUTE_UNROLL", "was written before the wait"),
    "no wait for the scores behind a product": ("v, before); QK::template wait<1>(); }", "v, before); }", "was written before the wait"),
    "no wait for the other scores": (
        "PV::gemm(o.x[m], fp[m], v, at);\n          QK::template wait<1>();",
        "PV::gemm(o.x[m], fp[m], v, at);",
        "was written before the wait",
    ),
    "the last product of another block": ("v, before); QK::template wait<1>(); }", "v, at); QK::template wait<1>(); }", None),
    "the keys of the upper half": ("QK::gemm(s, q, First, 0, k, at);\n        CUTE", "QK::gemm(s, q, 0, 0, k, at);\n        CUTE", None),
    "the last product left out": (
        "      PV::gemm(o.x[M - 1], fp[M - 1], v, before);\n      PV::template wait<0>();",
        "      PV::template wait<0>();",
        None,
    ),
    "the last product not waited for": (
        "v, before);\n      PV::template wait<0>();",
        "v, before);",
        "was written before the wait|out of scope before the wait|never waited for",
    ),
}


@pytest.mark.parametrize("case", EARLY_OVERLAPPED)
def test_what_comes_too_early_in_the_overlapped_order_is_found(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    p = example(t=515, h=1, d=64)
    inputs = sample(p, 30)
    *change, reason = EARLY_OVERLAPPED[case]
    plant(monkeypatch, tmp_path, "collective/attention", *change)
    # So that there are blocks before the diagonal.
    config = dataclasses.replace(BOTH, chunk=256)
    if reason:
        with pytest.raises(LaunchError, match=reason):
            run(p, config, inputs)
    else:
        results, _ = run(p, config, inputs)
        assert not check(p, inputs, results, reference(p, inputs)).ok


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("tiles", [1, 2, 3, 5])
def test_every_pair_of_blocks_is_met_once(d: int, tiles: int) -> None:
    p = next(s.problem for s in op.stages(example(t=5000, d=d), Config()) if s.kernel is scan.power_scan)
    c = Scan(tiles=tiles, mma="wgmma")
    n, columns = d // 8, d // c.columns
    met: Counter[tuple[int, int]] = Counter()
    for unit in range(scan_wgmma.state_units(p, c)):
        first, block = unit // columns // n * tiles, unit // columns % n
        found = [x for x in range(first, first + tiles) if x < n // 2 or (x == n // 2 and block < n // 2)]
        assert found, "a warpgroup without a tile"
        met.update((min(block, j), max(block, j)) for j in ((block + x) % n for x in found))
    assert met == {(i, j): columns for i in range(n) for j in range(i, n)}
    assert len(met) == p.pair_tiles


def test_what_a_h200_is_predicted_to_take() -> None:
    for keywords in ({"t": 65536, "h": 8}, {"t": 65536, "d": 128}):
        config = op.predicted(example(**keywords), H200)
        assert config.attend.mma == config.scan.mma == "wgmma"
    half = op.predicted(example(t=65536, h=8, dtype="float16"), H200)
    assert half.attend.mma == half.scan.mma == "sync"
    assert op.predicted(example(t=65536, h=8), Device.of("a100")).attend.mma == "sync"
    assert attend.power_attend.reject(op.stages(example(t=5000), BOTH)[-1].problem, ATTEND, H200) is None


@pytest.mark.parametrize("order", ["serial", "overlapped"])
def test_products_run_on(order: str, tmp_path: Path) -> None:
    """ptxas makes each wgmma wait for the one before if registers of theirs are written or read in between (C7510 and on)."""
    sources = {}
    for (shape, config), gated in product(CASES.values(), (True, False)):
        stage = op.stages(example(**{"gated": gated} | shape), config)[-1]
        source = stage.kernel.source(stage.problem, stage.config)
        if config.attend.mma == "wgmma" and (order == "serial" or "overlapped = true" in source.text):
            sources[in_serial_order(source.text) if order == "serial" else source.text] = source
    assert len(sources) > 20
    # The same with scores that are read before they are waited for.
    right = "else QK::template wait<1>();" if order == "serial" else "v, before); QK::template wait<1>(); }"
    folders = planted(tmp_path, "collective/attention", right, right.replace("wait<1>", "wait<2>"), PARTS, "power_retention")
    text, last = next(reversed(sources.items()))
    jobs = [Job(text, text, source.entry, "sm_90a", includes=source.include_dirs) for text, source in sources.items()]
    with CompilePool() as pool:
        for key, cubin in pool.compile_many([*jobs, Job("bad", text, last.entry, "sm_90a", includes=(*folders, *last.include_dirs))]):
            assert isinstance(cubin, CompileError if key == "bad" else Cubin), cubin
            assert key != "bad" or "ptxas serialises its wgmma: (C751" in str(cubin)


FAMILIES: tuple[dict[str, Any], ...] = (
    *({"d": d, "e": e} for d in (64, 128) for e in (64, 128)),
    {"d": 64, "gated": False},
    {"d": 128, "gated": False},
    {"d": 128, "normalize": "none"},
    {"d": 64, "e": 32},
    {"d": 32},
    {"d": 64, "dtype": "float16"},
    {"d": 128, "dtype": "float16"},
)


def test_no_kernel_that_a_call_picks_spills() -> None:
    """Of some lengths of every family: more than 8 bytes, stored and loaded, are found here and forbidden by a rule."""
    sources: dict[str, tuple[Source, str]] = {}
    for family, t in product(FAMILIES, (1000, 20011)):
        problem = example(t=t, **family)
        for config in {choose_config(op, problem, H200).config, op.predicted(problem, H200)}:
            for stage in op.stages(problem, config):
                source = stage.kernel.source(stage.problem, stage.config)
                sources[source.text] = source, f"{family} t={t}: {stage.kernel.name} {stage.config}"
    assert len(sources) > 30
    with CompilePool() as pool:
        for key, cubin in pool.compile_many(
            Job(k, k, source.entry, "sm_90a", "", source.include_dirs) for k, (source, _) in sources.items()
        ):
            assert isinstance(cubin, Cubin), cubin
            assert cubin.resources.spill_stores + cubin.resources.spill_loads <= 8, f"{sources[str(key)][1]}: {cubin.resources}"


def test_attend_is_as_many_ctas_per_sm_as_its_cost_takes_it_for() -> None:
    """A third of the configs at d = 64 and 128: their CTAs per SM, by the registers that ptxas takes, are those of the cost; none spills more
    than 8 bytes."""
    stages = {}
    for d, chunk in ((64, 0), (64, 1024), (128, 0), (128, 1024)):
        problem = op.stages(example(t=9001, h=1, d=d), Config(chunk))[-1].problem
        legal = [c for c in configs(Attend) if c.mma == "wgmma" and attend.power_attend.reject(problem, c, H200) is None]
        stages |= {(d, chunk, c): (problem, attend.power_attend.source(problem, c)) for c in legal[chunk > 0 :: 3]}
    assert len(stages) > 30
    with CompilePool() as pool:
        jobs = [Job(k, source.text, source.entry, "sm_90a", "", source.include_dirs) for k, (_, source) in stages.items()]
        for key, cubin in pool.compile_many(jobs):
            problem, config = stages[key][0], key[2]  # type: ignore[index]
            assert isinstance(cubin, Cubin) and cubin.resources.spill_stores + cubin.resources.spill_loads <= 8, (key, cubin)
            found = attend.power_attend.occupancy(problem, config, H200, cubin.resources.registers).ctas
            assert found == attend.ctas_per_sm(problem, config, H200), (key, cubin.resources.registers)


def test_rules_of_registers() -> None:
    """Three CTAs per SM of 64 keys at d = 64 are legal, since 168 registers do for them in the serial order, and for 32 keys in the other one;
    what spills is not."""
    stage = op.stages(example(t=5000), dataclasses.replace(BOTH, chunk=256, attend=dataclasses.replace(ATTEND, blocks=3)))[-1]
    assert attend.power_attend.reject(stage.problem, stage.config, H200) is None and not attend.overlapped(stage.problem, stage.config)
    again = dataclasses.replace(stage.config, order="serial")
    assert "the order is the serial one already" in str(attend.power_attend.reject(stage.problem, again, H200))
    for order in ("overlapped", "serial"):
        short = dataclasses.replace(stage.config, keys=32, order=order)
        assert attend.power_attend.reject(stage.problem, short, H200) is None
        assert attend.overlapped(stage.problem, short) == (order == "overlapped") and not attend.halves(stage.problem, short)
    tall = dataclasses.replace(stage.config, m=4, keys=32, blocks=1)
    assert "of 4 warps per SM leave 255" in str(attend.power_attend.reject(stage.problem, tall, H200))
    wide = op.stages(example(t=5000, e=128), WIDE)[1]
    assert wide.kernel.reject(wide.problem, wide.config, H200) is None
    longer = dataclasses.replace(wide.config, tokens=128)
    assert "tokens=128 with 192 accumulators" in str(wide.kernel.reject(wide.problem, longer, H200))
