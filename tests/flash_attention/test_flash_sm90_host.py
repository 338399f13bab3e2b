"""The kernel of flash attention for Hopper, compiled for the CPU: TMA, barriers, roles and wgmma emulated, against the float64 reference."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flash_host import assert_right, peaked, run
from machine_code import faults

from vidrial.build.cubins import build_many
from vidrial.build.nvrtc import Cubin
from vidrial.device import Device
from vidrial.errors import LaunchError
from vidrial.host import plan as plans
from vidrial.host.target import SCHEDULES, Schedule
from vidrial.kernels.flash_attention.op import Config, check, example, op, reference, sample, stages
from vidrial.kernels.flash_attention.sm90 import Config as Sm90
from vidrial.kernels.flash_attention.sm90 import flash_sm90
from vidrial.spec.choices import describe
from vidrial.templates import TEMPLATES

H200 = Device.of("h200")
# Other roles run as soon as they can: what is released, or written, a few instructions early shows.
EAGER = SCHEDULES[2]


def config(*choices: Any) -> Config:
    """groups, keys, stages, overlap, turns, schedule."""
    return Config(path="sm90", sm90=Sm90(*choices))


TWO = config(2, 64, 3, 1, "skip", "dynamic")
THREE = config(3, 64, 4, 1, "skip", "dynamic")
FOUR = config(4, 64, 2, 1, "skip", "one")
TURNS = config(2, 80, 3, 1, "ping_pong", "dynamic")
SERIAL = config(4, 96, 3, 0, "skip", "dynamic")
ALONE = config(1, 64, 2, 1, "skip", "one")

CASES: dict[str, tuple[dict[str, Any], Config]] = {
    **{f"t = {t}": ({"t": t, "h": 1, "d": 64}, TWO) for t in (1, 7, 63, 64, 65, 128, 129, 257)},
    **{f"t = {t}, causal": ({"t": t, "h": 1, "d": 128, "causal": True}, THREE) for t in (1, 63, 65, 129, 192, 257)},
    "four warpgroups, causal, batch": ({"t": 321, "b": 2, "h": 2, "d": 64, "causal": True}, FOUR),
    "in turn": ({"t": 129, "b": 2, "h": 2, "d": 128}, TURNS),
    "in turn, causal, three": ({"t": 300, "h": 1, "d": 64, "causal": True}, config(3, 64, 3, 1, "ping_pong", "one")),
    "serial": ({"t": 193, "h": 2, "d": 64}, SERIAL),
    "serial, causal, fewer queries": ({"t": 300, "tq": 65, "h": 1, "d": 64, "causal": True}, SERIAL),
    "one warpgroup": ({"t": 65, "h": 3, "d": 128, "causal": True}, ALONE),
    "one query": ({"t": 257, "tq": 1, "h": 2, "d": 64, "causal": True}, ALONE),
    "one query, grouped by 8": ({"t": 129, "tq": 1, "h": 2, "hq": 16, "d": 128}, ALONE),
    "more queries": ({"t": 63, "tq": 129, "h": 1, "d": 64}, FOUR),
    "rows without keys": ({"t": 65, "tq": 300, "h": 1, "d": 64, "causal": True}, TWO),
    "grouped by 3, causal, heads apart": ({"t": 131, "h": 1, "hq": 3, "d": 64, "causal": True}, TWO),
    "grouped by 3, heads side by side": ({"t": 131, "h": 2, "hq": 6, "d": 64, "causal": True}, THREE),
    "grouped by 4, causal": ({"t": 131, "h": 2, "hq": 8, "d": 128, "causal": True}, config(2, 128, 2, 1, "skip", "dynamic")),
    "fp16, causal": ({"t": 193, "h": 1, "d": 64, "causal": True, "dtype": "float16"}, FOUR),
    "window": ({"t": 400, "h": 1, "d": 64, "left": 100, "right": 20}, TWO),
    "window to the left, causal, in turn": ({"t": 400, "h": 1, "d": 64, "left": 100, "causal": True}, config(3, 64, 3, 1, "ping_pong", "dynamic")),
    "window to the right": ({"t": 129, "tq": 200, "h": 1, "d": 64, "right": 20}, TWO),
    "a window of one key": ({"t": 129, "h": 1, "d": 64, "left": 0, "right": 0}, THREE),
    "soft cap, causal, fp16": ({"t": 129, "h": 1, "d": 64, "softcap": 5.0, "causal": True, "dtype": "float16"}, TWO),
    "d = 32": ({"t": 129, "h": 1, "d": 32}, TWO),
    "d = 96, causal": ({"t": 129, "h": 1, "d": 96, "causal": True}, TWO),
    "d = 192, e = 128": ({"t": 129, "h": 1, "d": 192, "e": 128, "causal": True}, TWO),
    "d = 256": ({"t": 129, "h": 1, "d": 256, "causal": True}, config(2, 64, 2, 1, "skip", "dynamic")),
    "e < d": ({"t": 70, "h": 1, "hq": 2, "d": 96, "e": 32}, TWO),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_kernel(case: str) -> None:
    keywords, chosen = CASES[case]
    p = example(**keywords)
    inputs = sample(p, 1)
    results, _ = run(p, chosen, inputs)
    assert_right(p, inputs, results)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_schedules_change_no_bit(schedule: Schedule) -> None:
    p = example(t=257, h=1, hq=2, d=64, causal=True, left=90)
    inputs = sample(p, 4)
    first, _ = run(p, TWO, inputs)
    again, _ = run(p, TWO, inputs, schedule)
    assert_right(p, inputs, again)
    assert (first["y"] == again["y"]).all() and (first["lse"] == again["lse"]).all()


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers(sanitizer: str) -> None:
    p = example(t=129, tq=70, h=1, hq=3, d=96, causal=True, left=60)
    inputs = sample(p, 5)
    results, _ = run(p, THREE, inputs, sanitizer=sanitizer)
    assert_right(p, inputs, results)


@pytest.mark.parametrize("chosen", [TWO, SERIAL, TURNS], ids=str)
@pytest.mark.parametrize("growing", [False, True])
def test_the_reference_moves(chosen: Config, growing: bool) -> None:
    p = example(t=257, h=1, d=64 if chosen is SERIAL else 128, causal=True)
    inputs = peaked(p, "growing" if growing else "peaked")
    results, _ = run(p, chosen, inputs)
    assert_right(p, inputs, results)


def test_nan_stays_in_its_head_and_later_keys_reach_no_earlier_row() -> None:
    p = example(t=257, h=2, d=64, causal=True)
    inputs = sample(p, 7)
    clean, _ = run(p, TWO, inputs)
    nan = p.dtype.round(np.full(p.d, np.nan, np.float32))
    inputs["k"][0, 200, 0] = nan
    results, _ = run(p, TWO, inputs)
    y, wanted = p.dtype.widen(results["y"]), p.dtype.widen(clean["y"])
    assert np.isnan(y[0, 200:, 0]).all()
    assert np.array_equal(y[0, :200, 0], wanted[0, :200, 0]) and np.array_equal(y[0, :, 1], wanted[0, :, 1])


# Few stages, so that a stage that is released too early is filled again at once.
SHORT, SHORT_SERIAL = config(2, 64, 2, 1, "skip", "dynamic"), config(4, 96, 2, 0, "skip", "dynamic")
OVERWRITTEN = r"its {} at the shared address 0x\w+ was overwritten before the wait"
WAIT_QK, WAIT_PV = "QK::template wait<{}>(); QK::fence(s);", "PV::template wait<0>(); PV::fence(o);"
BEHIND_WAIT = f"{WAIT_PV}\n          v.release();\n          pack();\n          softmax.rescale(o);\n"
PASS, RELEASE_Q = "pass_over = [&] { k.next(); k.release(); v.next(); v.release(); };", "&& lane == 0) Bars::q_empty::arrive(bars);"
FULL_Q = "if (at.all.begin < at.all.end) { Bars::q_full::wait(bars, parity); parity ^= 1; }"


@dataclasses.dataclass(frozen=True)
class Plant:
    """`wrong` in place of `right`: what the host target says of it, or wrong values if nothing."""

    right: str
    wrong: str
    message: str | None = None
    config: Config = SHORT
    also: tuple[str, str] | None = None  # replaced before


# NOTE: V of a tile's last block may be released early: what comes next waits for Q's release, which is behind the wait.
PLANTED = {
    "fewer bytes announced than come": Plant(
        "Bars::q_full::expect(bars, Tiles::BoxQ::kBytes);", "Bars::q_full::expect(bars, Tiles::BoxQ::kBytes - 16);", "16 bytes more came"
    ),
    "output not rescaled": Plant("softmax.rescale(o);\n        });\n        product", "});\n        product"),
    "rows beyond the end stored": Plant("bool const there = query < p.tq;", "bool const there = query <= p.tq;", "array (y|lse) was written .* behind its end"),
    "K's stage released before the wait": Plant(
        f"{WAIT_QK.format(1)}\n          k.release();", f"k.release();\n          {WAIT_QK.format(1)}", OVERWRITTEN.format("B")
    ),
    "K's first stage released before the wait": Plant(
        f"{WAIT_QK.format(0)}\n        k.release();", f"k.release();\n        {WAIT_QK.format(0)}", OVERWRITTEN.format("B")
    ),
    "V's stage released before the wait": Plant(
        BEHIND_WAIT, BEHIND_WAIT.replace("v.release();", "").replace(WAIT_PV, f"v.release(); {WAIT_PV}"), OVERWRITTEN.format("B")
    ),
    "serial: K's stage released before the wait": Plant(
        f"{WAIT_QK.format(0)}\n          next_turn();\n          k.release();",
        f"k.release(); {WAIT_QK.format(0)}\n          next_turn();",
        OVERWRITTEN.format("B"),
        SHORT_SERIAL,
    ),
    "serial: V's stage released before the wait": Plant(
        f"product(v.next());\n          {WAIT_PV}\n          v.release();",
        f"product(v.next());\n          v.release(); {WAIT_PV}",
        OVERWRITTEN.format("B"),
        SHORT_SERIAL,
    ),
    "weights packed before the wait": Plant(
        BEHIND_WAIT, "pack();\n" + BEHIND_WAIT.replace("pack();", ""), "its A, register 0, was written before the wait"
    ),
    "output rescaled before the wait": Plant(
        BEHIND_WAIT,
        "softmax.rescale(o);\n" + BEHIND_WAIT.replace("softmax.rescale(o);", ""),
        "its accumulator 0 was written before the wait",
    ),
    "Q of the next tile fetched at once": Plant("Bars::q_empty::wait_free(bars, parity);", "", r"deadlock(?s:.)*barrier q_full\[0\]"),
    "Q released at the start": Plant(
        FULL_Q,
        FULL_Q.replace("parity ^= 1;", f"parity ^= 1; if (true {RELEASE_Q}"),
        "A at the shared|deadlock",
        also=(f"if (at.all.begin < at.all.end {RELEASE_Q}", ""),
    ),
    "Q released before the last scores are waited for": Plant(
        "scores(stage);\n          product",
        f"scores(stage); if (j == own.begin {RELEASE_Q}\n          product",
        OVERWRITTEN.format("A"),
        also=(f"if (at.all.begin < at.all.end {RELEASE_Q}", f"if (own.end - own.begin < 2 && at.all.begin < at.all.end {RELEASE_Q}"),
    ),
    "blocks that lie behind its rows not passed over": Plant("kSkip && j > own.end; --j) pass_over();", "false;) {}", "deadlock"),
    "blocks that lie before its rows not passed over": Plant("kSkip && j > at.all.begin; --j) pass_over();", "false;) {}", "deadlock"),
    "one block not passed over": Plant("int j = own.begin; kSkip", "int j = own.begin - 1; kSkip", "deadlock"),
    "V of a block not passed over": Plant(PASS, PASS.replace("v.next(); v.release();", ""), "deadlock"),
    "a block passed over without its release": Plant(PASS, PASS.replace(" v.release();", ""), r"deadlock(?s:.)*barrier v\.empty\["),
}  # fmt: skip


def planted(header: str, plant: Plant) -> str:
    for right, wrong in (*((plant.also,) if plant.also else ()), (plant.right, plant.wrong)):
        assert header.count(right) == 1, (header.count(right), right)
        header = header.replace(right, wrong)
    return header


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant = PLANTED[name]
    header = planted(Path(TEMPLATES, "flash_attention", "flash_sm90.cuh").read_text(), plant)
    compile_host = plans.compile_host

    def compile_wrong(text: str, *arguments: Any, **options: Any) -> Any:
        return compile_host(text.replace('#include "flash_sm90.cuh"', header), *arguments, **options)

    monkeypatch.setattr(plans, "compile_host", compile_wrong)
    p = example(t=400, b=1, h=3, d=64, causal=True, left=70)
    inputs = peaked(p, "growing")
    if plant.message:
        with pytest.raises(LaunchError, match=plant.message):
            run(p, plant.config, inputs, EAGER)
    else:
        results, _ = run(p, plant.config, inputs, EAGER)
        assert not check(p, inputs, results, reference(p, inputs)).ok


@pytest.mark.parametrize("chosen", [SHORT, SHORT_SERIAL], ids=str)
def test_what_they_are_planted_in_is_right(chosen: Config) -> None:
    p = example(t=400, b=1, h=3, d=64, causal=True, left=70)
    inputs = peaked(p, "growing")
    for schedule in (EAGER, *(Schedule(order=seed, eager=True) for seed in (1, 2, 3))):
        results, _ = run(p, chosen, inputs, schedule)
        assert_right(p, inputs, results)


@pytest.mark.parametrize(
    ("keywords", "chosen"),
    [
        ({"t": 257, "h": 2, "d": 64, "causal": True}, TWO),
        ({"t": 193, "h": 1, "d": 128}, TURNS),
        ({"t": 300, "h": 1, "d": 64, "left": 70, "right": 9}, TWO),
        ({"t": 131, "h": 2, "hq": 8, "d": 64, "causal": True}, FOUR),
    ],
)
def test_costs_are_what_is_counted(keywords: dict[str, Any], chosen: Config) -> None:
    p = example(**keywords)
    _, counted = run(p, chosen, sample(p, 8))
    stats = counted["flash_sm90"]
    assert flash_sm90.cost is not None
    cost = flash_sm90.cost(p, chosen.sm90, H200)
    per_key = 2 * 64 * chosen.sm90.keys * (p.d + p.e)
    instructions = p.d // 16 + chosen.sm90.keys // 16
    # wgmma is counted by each of its four warps, per instruction of one block of keys.
    assert cost.flops == stats.wgmma // instructions // WGMMA_WARPS * per_key
    assert stats.wgmma % (instructions * WGMMA_WARPS) == 0


# How often the host target counts one wgmma.
WGMMA_WARPS = 1


PICKED: dict[str, tuple[dict[str, Any], tuple[Config, ...]]] = {
    "d = 128": ({"d": 128}, (THREE, config(3, 80, 3, 1, "skip", "dynamic"), config(2, 128, 2, 1, "ping_pong", "one"))),
    "d = 128, causal": ({"d": 128, "causal": True}, (THREE, config(3, 80, 3, 1, "skip", "dynamic"), ALONE)),
    "d = 128, causal, grouped by 4": ({"d": 128, "causal": True, "hq": 64}, (THREE,)),
    "d = 64": ({"d": 64}, (FOUR, SERIAL, config(3, 128, 4, 1, "skip", "dynamic"))),
    "d = 64, causal": ({"d": 64, "causal": True}, (FOUR, config(1, 128, 3, 1, "skip", "one"))),
    "d = 96": ({"d": 96}, (THREE,)),
    "d = 256, causal": ({"d": 256, "causal": True}, (config(2, 64, 2, 1, "skip", "dynamic"),)),
    "d = 192, e = 128": ({"d": 192, "e": 128, "causal": True}, (TWO,)),
    "window, cap": ({"d": 128, "causal": True, "left": 1000, "softcap": 30.0}, (TWO,)),
}


def test_what_is_picked_runs_on_as_it_is_written() -> None:
    """wgmma and TMA are there, no trap, no spill, no wgmma serialised or waited for by ptxas (C75xx)."""
    sources = {}
    for name, (keywords, configs) in PICKED.items():
        p = example(t=4093, **keywords)
        for chosen in configs:
            assert flash_sm90.broken_rule(p, chosen.sm90, H200) is None
            source = flash_sm90.source(p, chosen.sm90)
            sources[source.text] = source, f"{name}: {describe(chosen.sm90)}"
    built = {sources[text][1]: cubin for text, cubin in build_many(sources, "sm_90a", jobs=2)}
    assert len(built) == len(sources) >= 16
    for what, cubin in built.items():
        assert isinstance(cubin, Cubin), (what, cubin)
        assert faults(cubin, wgmma=True, tma=True) == [], what


def test_another_length_compiles_nothing() -> None:
    for keywords in ({"d": 128, "causal": True}, {"d": 64, "h": 4, "hq": 32}):
        texts = {flash_sm90.source(example(t=t, b=b, **keywords), THREE.sm90).text for t, b in ((1, 1), (1021, 2), (8192, 3))}
        assert len(texts) == 1


@pytest.mark.parametrize("name", ["a100", "rtx3090", "h200"])
def test_only_hopper_takes_this_path(name: str) -> None:
    device = Device.of(name)
    p = example(t=1021, d=128)
    legal = flash_sm90.broken_rule(p, THREE.sm90, device) is None
    assert legal == (device.arch == "sm_90a")
    best = next(iter(op.ranked(p, device)))
    assert stages(p, best.config)[0].part == ("sm90" if legal else "sm80")


def test_strides_that_tma_cannot_take_are_left_to_the_other_path() -> None:
    import dataclasses

    p = example(t=1021, d=64)
    odd = dataclasses.replace(p, k_stride=(p.k_stride[0], p.k_stride[1] + 4, p.k_stride[2]))
    reason = flash_sm90.broken_rule(odd, THREE.sm90, H200)
    assert reason is not None and "k has a stride of" in reason
