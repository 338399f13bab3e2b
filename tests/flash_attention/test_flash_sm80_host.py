"""The mma.sync kernel of flash attention itself, compiled for the CPU and run thread by thread, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flash_host import assert_right, peaked, run

import vidrial
from vidrial.device import Device
from vidrial.errors import LaunchError
from vidrial.host import plan as plans
from vidrial.host.target import SCHEDULES, Schedule
from vidrial.kernels.flash_attention import flash_attention
from vidrial.kernels.flash_attention.op import Config, check, example, reference, sample, stages
from vidrial.kernels.flash_attention.sm80 import Config as Sm80
from vidrial.templates import TEMPLATES


def config(**choices: Any) -> Config:
    return Config(path="sm80", sm80=Sm80(**choices))


NARROW = config(keys=32, m=1, warps=2, stages=3, blocks=1)
USUAL = config()
TALL = config(keys=32, m=2, warps=4, stages=2, blocks=1)
KEPT = config(keys=64, m=2, warps=2, stages=2, blocks=1, queries="registers")

CASES: dict[str, tuple[dict[str, Any], Config]] = {
    **{f"t = {t}": ({"t": t, "h": 2, "d": 32}, NARROW) for t in (1, 7, 63, 64, 65, 129, 256, 257)},
    **{f"t = {t}, causal": ({"t": t, "h": 1, "d": 64, "causal": True}, USUAL) for t in (1, 7, 63, 65, 128, 129, 257)},
    "batch, causal": ({"t": 129, "b": 3, "h": 2, "d": 32, "causal": True}, TALL),
    "no keys": ({"t": 0, "tq": 70, "h": 2, "d": 32}, NARROW),
    "no keys, causal": ({"t": 0, "tq": 70, "h": 2, "d": 32, "causal": True}, NARROW),
    "no queries": ({"t": 70, "tq": 0, "h": 2, "d": 32}, NARROW),
    "one query": ({"t": 257, "tq": 1, "h": 2, "d": 32, "causal": True}, NARROW),
    "one query, grouped by 8": ({"t": 129, "tq": 1, "h": 2, "hq": 16, "d": 64}, USUAL),
    "fewer queries, causal": ({"t": 257, "tq": 65, "h": 1, "d": 64, "causal": True}, USUAL),
    "more queries": ({"t": 63, "tq": 129, "h": 1, "d": 32}, TALL),
    "rows without keys": ({"t": 70, "tq": 257, "h": 1, "hq": 2, "d": 32, "causal": True}, TALL),
    "grouped by 3, causal": ({"t": 129, "h": 2, "hq": 6, "d": 32, "causal": True}, NARROW),
    "grouped by 4": ({"t": 129, "h": 1, "hq": 4, "d": 64}, KEPT),
    "grouped by 71": ({"t": 65, "tq": 3, "h": 1, "hq": 71, "d": 32, "causal": True}, TALL),
    "fp16": ({"t": 257, "h": 1, "d": 64, "dtype": "float16"}, KEPT),
    "fp16, causal, grouped by 2": ({"t": 129, "h": 1, "hq": 2, "d": 96, "causal": True, "dtype": "float16"}, USUAL),
    "window": ({"t": 257, "h": 1, "d": 32, "left": 40, "right": 17}, NARROW),
    "window to the left, causal": ({"t": 257, "h": 1, "hq": 2, "d": 32, "left": 50, "causal": True}, TALL),
    "window to the left": ({"t": 129, "tq": 200, "h": 1, "d": 32, "left": 20}, NARROW),
    "window to the right": ({"t": 129, "tq": 200, "h": 1, "d": 32, "right": 20}, NARROW),
    "a window of one key": ({"t": 129, "h": 1, "d": 32, "left": 0, "right": 0}, NARROW),
    "a window, few queries": ({"t": 257, "tq": 5, "h": 1, "hq": 3, "d": 32, "left": 70, "causal": True}, NARROW),
    "soft cap": ({"t": 129, "h": 1, "d": 64, "softcap": 3.0}, USUAL),
    "soft cap, causal, window, fp16": (
        {"t": 129, "h": 1, "hq": 2, "d": 32, "softcap": 20.0, "scale": 2.0, "causal": True, "left": 33, "dtype": "float16"},
        KEPT,
    ),
    "d = 96, kept": ({"t": 129, "h": 1, "d": 96}, config(keys=64, m=1, warps=2, blocks=1, queries="registers")),
    "d = 128": ({"t": 129, "h": 1, "d": 128, "causal": True}, config(keys=128, m=1, warps=4, blocks=1)),
    "d = 128, tall": ({"t": 129, "h": 1, "d": 128, "causal": True}, TALL),
    "d = 192, e = 128": ({"t": 129, "h": 1, "d": 192, "e": 128, "causal": True}, USUAL),
    "d = 192": ({"t": 65, "h": 1, "d": 192}, config(keys=32, warps=8, blocks=1)),
    "d = 256": ({"t": 129, "h": 1, "d": 256, "causal": True}, config(warps=8, blocks=1)),
    "split in 2": ({"t": 129, "h": 2, "d": 32}, config(keys=32, warps=2, splits=2)),
    "split in 4, one query, grouped by 3": (
        {"t": 257, "tq": 1, "b": 2, "h": 1, "hq": 3, "d": 64, "e": 96},
        config(keys=32, warps=2, splits=4),
    ),
    "split in 8, causal, fp16": ({"t": 257, "h": 1, "d": 96, "causal": True, "dtype": "float16"}, config(keys=32, warps=4, splits=8)),
    "split in 2, rows without keys": ({"t": 70, "tq": 257, "h": 1, "hq": 2, "d": 32, "causal": True}, config(keys=32, warps=2, splits=2)),
    "split in 4, window, e = 256": (
        {"t": 200, "tq": 70, "h": 1, "d": 32, "e": 256, "left": 60, "right": 3},
        config(keys=32, warps=4, blocks=1, splits=4),
    ),
    "e > d": ({"t": 70, "h": 1, "d": 32, "e": 96}, NARROW),
    "e < d": ({"t": 70, "h": 1, "hq": 2, "d": 96, "e": 32}, TALL),
}


@pytest.mark.parametrize("case", CASES)
def test_kernel(case: str) -> None:
    keywords, chosen = CASES[case]
    p = example(**keywords)
    inputs = sample(p, 1)
    results, _ = run(p, chosen, inputs)
    assert_right(p, inputs, results)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_schedules_change_no_bit(schedule: Schedule) -> None:
    p = example(t=257, h=1, hq=2, d=32, causal=True, left=90)
    inputs = sample(p, 4)
    first, _ = run(p, NARROW, inputs)
    again, _ = run(p, NARROW, inputs, schedule)
    assert_right(p, inputs, again)
    assert (first["y"] == again["y"]).all() and (first["lse"] == again["lse"]).all()


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers(sanitizer: str) -> None:
    p = example(t=129, tq=70, h=1, hq=3, d=96, causal=True, left=60)
    inputs = sample(p, 5)
    results, _ = run(p, NARROW, inputs, sanitizer=sanitizer)
    assert_right(p, inputs, results)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["peaked", "growing", "all alike"])
def test_the_reference_moves(kind: str, dtype: str) -> None:
    p = example(t=257, h=1, hq=2, d=64, causal=True, dtype=dtype)
    inputs = peaked(p, kind)
    results, _ = run(p, KEPT, inputs)
    assert_right(p, inputs, results)


# What must be seen: a reference that stays (weights become infinite), an output that is not rescaled with it, sums that are not, a mask that
# lets one more key through or one fewer, queries of the wrong head, a group's heads in each other's rows, a tail that is read.
PLANTED = {
    "output not rescaled": ("softmax", "o[n][e] *= scale[e / 2];", ";", "growing"),
    "sum not rescaled": ("softmax", "sum[h] *= scale[h];", ";", "growing"),
    "reference of half a quad": ("softmax", "__shfl_xor_sync(~0u, b, 2)), largest", "b), largest", "growing"),
    "a key too many": ("rows", "c < end &&", "c <= end &&", "peaked"),
    "a key too few": ("keys", "query + offset + 1 + right", "query + offset + right", "peaked"),
    "a block too few": ("keys", "(max(visible.end(last), 0) + Keys - 1) / Keys", "max(visible.end(last), 0) / Keys", "peaked"),
    "the first block left out": (
        "flash_sm80",
        "if (item >= all.end - all.begin) return;",
        "if (item >= all.end - all.begin - 1) return;",
        "peaked",
    ),
    "a stage read too early": ("ring", "cute::cp_async_wait<kFirst - 1 - Ahead>();", ";", "peaked"),
    "heads of a group swapped": ("flash_sm80", "(m0 + r) % kPack * p.q_stride[2]", "(1 - (m0 + r) % kPack) * p.q_stride[2]", "peaked"),
    "a part is read twice": ("flash_sm80", "all.begin + part * share", "all.begin", "peaked"),
    "parts weigh the same": ("flash_combine", "y[i].x += w * x.x;", "y[i].x += x.x;", "peaked"),
    "part of a quarter of the lanes": (
        "flash_combine",
        "for (int i = 16; i > 0; i /= 2) sum +=",
        "for (int i = 4; i > 0; i /= 2) sum +=",
        "peaked",
    ),
    "lse in base 2": ("softmax", "0.6931471805599453f * (", "(", "peaked"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_mistake_is_seen(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, right, wrong, kind = PLANTED[planted]
    include = "#include <vidrial/pipeline/ring.cuh>" if name == "ring" else f'#include "{name}.cuh"'
    folder = Path(TEMPLATES, "include/vidrial/pipeline" if name == "ring" else "flash_attention")
    header, main = (folder / f"{name}.cuh").read_text(), Path(TEMPLATES, "flash_attention", "flash_sm80.cuh").read_text()
    assert header.count(right) == 1
    changed, whole = header.replace(right, wrong), include if name == "flash_combine" else '#include "flash_sm80.cuh"'
    if name not in ("flash_sm80", "flash_combine"):
        assert main.count(include) == 1
        changed = main.replace(include, changed)
    compile_host = plans.compile_host

    def compile_wrong(text: str, *arguments: Any, **options: Any) -> Any:
        return compile_host(text.replace(whole, changed), *arguments, **options)

    monkeypatch.setattr(plans, "compile_host", compile_wrong)
    p = example(t=257, h=1, hq=2, d=64, causal=True)
    inputs = peaked(p, kind)
    chosen = replace(KEPT, sm80=replace(KEPT.sm80, splits=8 if "part" in planted else 1, keys=32))
    try:
        results, _ = run(p, chosen, inputs)
    except LaunchError:
        return  # the host target itself says so
    assert not check(p, inputs, results, reference(p, inputs)).ok


def padded(x: np.ndarray, axes: tuple[int, ...], extra: int, fill: Any) -> np.ndarray:
    """The same values in the memory order `axes`, with `extra` more of everything around them, which hold `fill`."""
    whole = np.full([x.shape[a] + extra for a in axes], fill, x.dtype)
    view = whole[tuple(slice(0, x.shape[a]) for a in axes)].transpose(np.argsort(axes))
    view[...] = x
    return view


@pytest.mark.parametrize("group", [1, 2])
def test_strided_inputs_among_nan_through_the_public_function(group: int) -> None:
    p = example(t=129, tq=70, b=2, h=2, hq=2 * group, d=32, e=64, dtype="float16", causal=True, left=100)
    inputs = sample(p, 6)
    nan = np.float16(np.nan)
    q, k = padded(inputs["q"], (0, 2, 1, 3), 8, nan), padded(inputs["k"], (1, 0, 2, 3), 16, nan)
    v = padded(inputs["v"], (0, 1, 2, 3), 8, nan)[:, ::-1][:, ::-1]
    with vidrial.use_target("host"):
        y, lse = flash_attention(q, k, v, causal=True, window=(100, 3), return_lse=True)
    assert y.dtype == np.float16 and y.shape == (2, 70, 2 * group, 64) and lse.dtype == np.float32
    assert_right(p, inputs, {"y": y, "lse": lse})


@pytest.mark.parametrize("keys", [65, 127])
def test_what_lies_behind_the_last_key_is_never_used(keys: int) -> None:
    p = example(t=keys, tq=33, h=1, hq=2, d=32)
    inputs = sample(p, 7)
    k, v = (np.concatenate([inputs[n], np.full_like(inputs[n], 0x7FFF)], 1)[:, :keys] for n in "kv")  # NaN in bfloat16
    assert not k.flags.owndata
    results, _ = run(p, NARROW, {"q": inputs["q"], "k": k, "v": v})
    assert_right(p, inputs, results)


def test_nan_stays_in_its_row_and_its_head() -> None:
    p = example(t=129, h=2, hq=4, d=32, causal=True)
    inputs = sample(p, 8)
    clean, _ = run(p, TALL, inputs)
    nan = 0x7FFF
    inputs["q"][0, 13, 1], inputs["k"][0, 40, 1] = nan, nan
    results, _ = run(p, TALL, inputs)
    y, wrong = p.dtype.widen(results["y"])[0], np.zeros((129, 4), bool)
    wrong[13, 1], wrong[40:, 2:] = True, True
    assert np.array_equal(np.isnan(y).all(-1), wrong) and np.array_equal(np.isnan(y).any(-1), wrong)
    assert np.array_equal(np.isnan(results["lse"][0]), wrong.T)
    # The others' reference may move where that of a neighbour does: right, not the same to the bit.
    exact = reference(p, sample(p, 8))
    held = {"y": np.where(wrong[None, ..., None], clean["y"], results["y"]), "lse": np.where(wrong.T[None], clean["lse"], results["lse"])}
    assert check(p, inputs, held, exact).ok


def test_rows_that_must_be_copied() -> None:
    p = example(t=70, h=2, d=32, dtype="float16")
    inputs = sample(p, 9)
    odd = np.zeros((1, 70, 2, 33), np.float16)
    odd[..., :32] = inputs["q"]
    y = flash_attention(odd[..., :32], inputs["k"], inputs["v"], target="host")
    assert_right(p, inputs, {"y": y, "lse": flash_attention(inputs["q"], inputs["k"], inputs["v"], target="host", return_lse=True)[1]})


def test_torch_on_the_host_target() -> None:
    torch = pytest.importorskip("torch")
    p = example(t=65, h=1, d=32)
    inputs = sample(p, 10)
    q, k, v = (torch.from_numpy(inputs[n].view(np.int16)).view(torch.bfloat16) for n in "qkv")
    y, lse = flash_attention(q, k, v, return_lse=True, target="host")
    assert y.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert_right(p, inputs, {"y": y.view(torch.int16).numpy().view(np.uint16), "lse": lse.numpy()})


def test_blocks_that_nobody_sees_are_not_read() -> None:
    facts: dict[str, Any] = {"t": 257, "h": 1, "d": 32}
    seen = {}
    for name, more in {"full": {}, "causal": {"causal": True}, "window": {"causal": True, "left": 31}}.items():
        p = example(**facts, **more)
        _, stats = run(p, NARROW, sample(p, 1))
        seen[name] = stats["flash_sm80"].cp_async_bytes
    assert seen["window"] < 0.5 * seen["causal"] < 0.5 * 0.7 * seen["full"]


def test_warps_leave_out_what_their_rows_do_not_see() -> None:
    p = example(t=256, h=1, d=32, causal=True)
    wide, narrow = (run(p, config(keys=64, warps=w, m=1, blocks=1), sample(p, 1))[1]["flash_sm80"] for w in (8, 4))
    # 128 rows in one CTA multiply no more than 64 rows in each of two.
    assert 0 < wide.mma <= narrow.mma


COUNTED: dict[str, dict[str, Any]] = {
    "full": {"t": 200, "h": 2, "d": 32},
    "causal": {"t": 333, "h": 1, "d": 64, "causal": True},
    "few queries": {"t": 333, "tq": 37, "b": 2, "h": 1, "hq": 4, "d": 32, "causal": True},
    "rows without keys": {"t": 100, "tq": 333, "h": 1, "d": 32, "causal": True},
    "window": {"t": 333, "h": 1, "hq": 3, "d": 32, "e": 64, "left": 70, "right": 9},
}


@pytest.mark.parametrize(
    "chosen", [USUAL, TALL, NARROW, replace(NARROW, sm80=replace(NARROW.sm80, splits=2))], ids=["usual", "tall", "narrow", "split"]
)
@pytest.mark.parametrize("case", COUNTED)
def test_costs_are_what_is_counted(case: str, chosen: Config) -> None:
    p = example(**COUNTED[case])
    stats = run(p, chosen, sample(p, 1), sanitizer="accesses")[1]
    for stage in stages(p, chosen):
        found, cost = stats[stage.kernel.name], stage.kernel.cost(stage.problem, stage.config, Device.of("h200"))
        assert cost.flops == 2 * 16 * 8 * 16 * found.mma
        assert found.read_bytes is not None and found.written_bytes is not None
        assert abs(cost.bytes - found.read_bytes - found.written_bytes) <= 0.02 * cost.bytes, stage.kernel.name
