"""Flash attention's mma.sync kernel before anything runs: which configs are legal and why, what they compile to."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from vidrial.build.cubins import build_many
from vidrial.build.nvrtc import Cubin
from vidrial.device import Device
from vidrial.errors import ArgumentError, ConfigError, TemplateError, UnsupportedError
from vidrial.kernels.flash_attention.op import Config, example, op, stages
from vidrial.kernels.flash_attention.sm80 import Config as Sm80
from vidrial.kernels.flash_attention.sm80 import flash_sm80, work
from vidrial.spec.choices import describe
from vidrial.spec.fields import fields
from vidrial.spec.source import Tiles

H200, A100, RTX = Device.of("h200"), Device.of("a100"), Device.of("rtx3090")
PROBLEMS: dict[str, dict[str, Any]] = {
    "d = 64": {"t": 4093, "d": 64},
    "d = 64, causal, fp16": {"t": 4093, "d": 64, "causal": True, "dtype": "float16"},
    "d = 128": {"t": 4093, "d": 128},
    "d = 128, causal, grouped by 4": {"t": 4093, "h": 4, "hq": 16, "d": 128, "causal": True},
    "d = 128, window, cap": {"t": 4093, "d": 128, "causal": True, "left": 1000, "softcap": 30.0},
    "d = 32": {"t": 300, "d": 32},
    "d = 96, causal": {"t": 1021, "d": 96, "causal": True},
    "d = 192, e = 128": {"t": 1021, "d": 192, "e": 128, "causal": True},
    "d = 256": {"t": 1021, "d": 256},
    "one query": {"t": 8191, "tq": 1, "h": 8, "hq": 64, "d": 128},
}


@pytest.mark.parametrize("device", [A100, H200], ids=lambda device: device.arch)
def test_the_configs_predicted_best_compile_without_spills(device: Device) -> None:
    sources = {}
    for name, keywords in PROBLEMS.items():
        p = example(**keywords)
        for config in (c.config for c in op.space(p, device, limit=2, fixed={"path": "sm80"}).legal):
            for stage in stages(p, config):
                source = stage.kernel.source(stage.problem, stage.config)
                sources[source.text] = source, f"{name}: {stage.kernel.name} {describe(config.sm80)}"
    assert {source.entry for source, _ in sources.values()} == {"flash_sm80", "flash_combine"}
    # And those that registers just allow.
    for keywords, choices in (
        ({"d": 64}, Sm80(m=1, warps=8, blocks=2)),
        ({"d": 64, "causal": True}, Sm80(m=2, warps=4, blocks=2)),
        ({"d": 128}, Sm80(m=1, warps=4, blocks=3, keys=64)),
        ({"d": 128, "causal": True, "hq": 64}, Sm80(m=2, keys=32, warps=4, blocks=1)),
        ({"d": 96}, Sm80(m=2, warps=4, blocks=2)),
        ({"d": 192, "e": 128, "causal": True}, Sm80(m=2, keys=32, warps=4, blocks=1)),
        ({"d": 256, "causal": True, "left": 99}, Sm80(m=1, warps=8, blocks=1)),
    ):
        p = example(t=1000, **keywords)
        assert flash_sm80.broken_rule(p, choices, device) is None
        source = flash_sm80.source(p, choices)
        sources[source.text] = source, f"{keywords}: {describe(choices)}"
    built = {sources[text][1]: cubin for text, cubin in build_many(sources, device.arch, jobs=2)}
    assert len(built) >= 17 and all(isinstance(cubin, Cubin) and cubin.arch == device.arch for cubin in built.values())
    resources = {what: cubin.resources for what, cubin in built.items() if isinstance(cubin, Cubin)}
    wrong = [f"{what}: {r}" for what, r in resources.items() if r.spill_stores or r.spill_loads or not 16 <= r.registers <= 255]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("device", [A100, H200, RTX], ids=lambda device: device.name)
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_card_has_a_config(name: str, device: Device) -> None:
    chosen = op.predicted(example(**PROBLEMS[name]), device)
    assert chosen.path == "sm80" or device is H200
    # Hopper has both.
    assert op.predicted(example(**PROBLEMS[name]), device, {"path": "sm80"}).path == "sm80"


def test_what_the_other_path_does_not_serve_is_served() -> None:
    assert op.predicted(example(t=0, tq=5), H200).path == "sm80"
    with pytest.raises(ConfigError, match="a100 is sm_80"):
        op.check_config(example(t=100), Config(path="sm90"), A100)


@pytest.mark.parametrize("name", PROBLEMS)
def test_another_length_compiles_nothing(name: str) -> None:
    facts = PROBLEMS[name]
    p = example(**facts)
    group = p.group
    other = example(**facts | {"t": 7 * p.tk + 13, "tq": 1001, "b": 3, "h": 5, "hq": 5 * group, "scale": 0.3})
    config = op.predicted(p, H200, {"path": "sm80"})
    texts = [stage.kernel.source(stage.problem, stage.config).text for stage in stages(p, config)]
    assert texts == [stage.kernel.source(stage.problem, stage.config).text for stage in stages(other, config)]
    first, second = ([bytes(s.kernel.pack(s.problem, s.config)) for s in stages(x, config)] for x in (p, other))
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_static_facts_change_the_source() -> None:
    changed: tuple[dict[str, Any], ...] = (
        {},
        {"e": 32},
        {"dtype": "float16"},
        {"causal": True},
        {"left": 3},
        {"softcap": 3.0},
        {"hq": 32},
        {"causal": True, "left": 3},
    )
    assert len({flash_sm80.source(example(**{"t": 1000, "d": 64} | facts), Sm80()).text for facts in changed}) == len(changed)


def test_tiles_may_not_read_what_a_launch_decides() -> None:
    p = example(t=100)
    dynamic = fields(p, "dynamic")
    assert {"b", "tq", "tk", "h", "left", "right"} <= set(dynamic)
    for name in dynamic:
        nosy = dataclasses.replace(flash_sm80, tiles=lambda p, c, name=name: Tiles(threads=getattr(p, name)))
        with pytest.raises(TemplateError, match=rf"Problem\.{name} is not known before the launch"):
            nosy.resolve(p, Sm80())


BROKEN: dict[str, tuple[dict[str, Any], Sm80, str]] = {
    "registers": (
        {"d": 128},
        Sm80(m=2, warps=4, blocks=1),
        "192 accumulators, 0 of queries and some 72 other registers per thread: 1 CTAs",
    ),
    "queries in registers": ({"d": 128}, Sm80(m=2, keys=32, blocks=1, queries="registers"), "160 accumulators, 64 of queries"),
    "shared memory": ({"d": 256}, Sm80(keys=64, warps=8, blocks=1, stages=3), "bytes of shared memory: a CTA has"),
    "splits": ({"d": 64, "h": 1, "tq": 1}, Sm80(keys=64, splits=16), "splits=16: 1000 keys are fewer blocks of 64"),
    "splits of many": ({"d": 64, "h": 64}, Sm80(splits=2), "1024 tiles of rows fill the 108 SMs"),
    "threads": ({"d": 32}, Sm80(keys=32, warps=8), "256 threads cannot copy 32 x 32"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_says_so(case: str) -> None:
    keywords, choices, reason = BROKEN[case]
    found = flash_sm80.reject(example(t=1000, **keywords), choices, A100)
    assert found is not None and reason in found
    with pytest.raises(ConfigError, match="is not legal for"):
        flash_sm80.check(example(t=1000, **keywords), choices, A100)


@pytest.mark.parametrize(
    ("keywords", "reason"),
    [
        ({"d": 48}, "D=48 is not served; accepted: 32, 64, 96"),
        ({"e": 512}, "E=512 is not served"),
        ({"dtype": "float32"}, "dtype float32 is not served; accepted: bfloat16, float16"),
        ({"scale": float("nan")}, "scale=nan is not served; accepted: None, or a number from 1e-09"),
        ({"scale": -1.0}, "scale=-1.0 is not served.*Negate q"),
        ({"softcap": 0.0}, "softcap=0.0 is not served"),
    ],
    ids=str,
)
def test_what_calls_refuse_has_no_config(keywords: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        op.predicted(example(**{"t": 1000} | keywords), H200)
    with pytest.raises(ArgumentError, match="q has 3 heads and k has 2"):
        example(t=100, h=2, hq=3)
    with pytest.raises(UnsupportedError, match="q has 2000 heads for each of k's; accepted: at most 1024"):
        example(t=100, h=1, hq=2000)


def test_the_work_of_masks() -> None:
    """64 rows a CTA, bands of 16, blocks of 64 keys."""
    shape, none = (64, 16, 64), (-1, -1)
    assert dataclasses.astuple(work(256, 256, 1, none, shape)) == (4 * 16, 4 * 16, 256, 256)
    # Causal: CTA i sees i whole blocks and its own diagonal one, which every band sees a part of.
    assert dataclasses.astuple(work(256, 256, 1, (-1, 0), shape)) == (4 * 10, 4 * 10, 256, 256)
    # Of blocks of 16 keys the bands of a CTA see 1, 2, 3 and 4 on the diagonal, and wait for 4.
    assert dataclasses.astuple(work(64, 64, 1, (-1, 0), (64, 16, 16))) == (10, 16, 64, 64)
    # 192 queries before the first key see none: their CTAs read nothing.
    assert dataclasses.astuple(work(256, 64, 1, (-1, 0), shape)) == (4, 4, 64, 64)
    assert dataclasses.astuple(work(64, 256, 1, (0, 0), shape)) == (4, 4, 64, 64)
    assert dataclasses.astuple(work(1, 256, 8, (-1, 0), shape)) == (4 * 4, 4 * 4, 8, 256)
    assert dataclasses.astuple(work(5, 0, 1, none, shape)) == (0, 0, 0, 0)
