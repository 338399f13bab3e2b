"""The backward pass without running it: machine code, lengths, rules, and costs beside what the host target counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from back_host import NARROW, Adjoint, Config, Tokens

from vidrial.build.cubins import build_many
from vidrial.build.nvrtc import Cubin
from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.errors import ConfigError
from vidrial.host.plan import HostPlan, poison
from vidrial.host.target import HostStats
from vidrial.kernels.power_retention.back import op as back_op
from vidrial.kernels.power_retention.back.op import example, op, outputs, sample, stages
from vidrial.kernels.power_retention.back.problem import Gradient
from vidrial.kernels.power_retention.back.scan_wgmma import Config as AdjointWgmma
from vidrial.kernels.power_retention.back.tokens_wgmma import Config as TokensWgmma
from vidrial.layout.access import flops, tiled_objects
from vidrial.layout.mma import TiledMma
from vidrial.layout.wgmma import WarpgroupMma
from vidrial.spec.choices import describe
from vidrial.spec.op import Stage
from vidrial.sweeps.power_retention_backward import program
from vidrial.tune.session import DIFFERENCE, LEAST_DIFFERENCE

H200, A100, RTX4090 = (Device.of(name) for name in ("h200", "a100", "rtx4090"))
PROBLEMS: dict[str, dict[str, Any]] = {
    "short": {"t": 333, "d": 64},
    "medium": {"t": 10_007, "d": 64},
    "long, D = 128": {"t": 65_537, "h": 8, "d": 128},
    "E > D": {"t": 10_007, "d": 64, "e": 128},
    "E < D, fp16": {"t": 10_007, "d": 128, "e": 64, "dtype": "float16"},
    "D = 32, no gates": {"t": 5_001, "d": 32, "gated": False, "normalize": "none"},
    "degree 4": {"t": 2_001, "d": 64, "degree": 4},
}
# What the host target counts of global memory, by sectors of 32 bytes.
BYTES_TOLERANCE = 0.02


ON_HOPPER = ("power_back_scan_wgmma", "power_back_carry", "power_back_query_wgmma", "power_back_keys_wgmma")


@pytest.mark.parametrize("device", [A100, H200], ids=lambda device: device.arch)
def test_configs_compile_without_spills(device: Device) -> None:
    """Those predicted best, and with every block and number of CTAs that the rules allow."""
    sources = {}
    for name, keywords in PROBLEMS.items():
        p = example(**keywords)
        best = op.predicted(p, device)
        others = [Tokens(block, 4, 3, blocks) for block, blocks in ((16, 3), (32, 2), (32, 3), (64, 1))]
        tried = [best, *(replace(best, query=c, keys=c) for c in others)]
        if device is H200 and p.dtype is DType.bfloat16:
            by_wgmma = op.predicted(p, device, {"mma": "wgmma"})
            kept, three = TokensWgmma(32, 4, 4, 2, "registers"), TokensWgmma(32, 4, 2, 3)
            tried += [by_wgmma, replace(by_wgmma, query_wgmma=kept, keys_wgmma=three)]
        for config in tried:
            for stage in stages(p, config):
                if stage.kernel.reject(stage.problem, stage.config, device) is None:
                    source = stage.kernel.source(stage.problem, stage.config)
                    sources[source.text] = source, f"{name}: {stage.kernel.name} {describe(stage.config)}"
    there = {kernel.name for kernel in op.kernels if "back" in kernel.name and (device is H200 or kernel.name not in ON_HOPPER)}
    assert {source.entry for source, _ in sources.values()} >= there
    wrong = []
    for text, cubin in build_many(sources, device.arch, jobs=2):
        if not isinstance(cubin, Cubin) or cubin.resources.spill_stores or cubin.resources.spill_loads:
            wrong.append(f"{sources[text][1]}: {cubin.resources if isinstance(cubin, Cubin) else cubin}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", PROBLEMS)
def test_another_length_compiles_nothing(name: str) -> None:
    p = example(**PROBLEMS[name])
    config = op.predicted(p, H200)
    other = example(**PROBLEMS[name] | {"t": 7 * p.t + 13, "b": 3, "h": 5, "hq": 10, "scale": 0.3})
    assert [s.binary for s in stages(p, config)] == [s.binary for s in stages(other, config)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("d", [32, 64, 128])
@pytest.mark.parametrize("e", [32, 64, 128])
def test_every_problem_has_a_config_on_every_card(d: int, e: int, dtype: str) -> None:
    """But for the fourth power with D and E of 128, whose accumulators no thread has registers for beside what it needs."""
    for device in (H200, A100, RTX4090):
        for degree in (2, 4):
            p = example(t=3000, d=d, e=e, dtype=dtype, degree=degree)
            if (degree, d, e) == (4, 128, 128):
                with pytest.raises(ConfigError, match="160 accumulators and some 128 other registers per thread"):
                    op.predicted(p, device)
            else:
                assert op.predicted(p, device).chunk >= 0


REJECTED: dict[str, tuple[dict[str, Any], Config, str]] = {
    "registers": ({"t": 999, "d": 128}, NARROW, "accumulators and some 100 other registers per thread"),
    "block and rows": ({"t": 999}, replace(NARROW, query=Tokens(64, 2, 3, 1)), "block=64 must divide the 32 rows"),
    "chunk and length": ({"t": 99}, NARROW, "chunk=128 holds all 99 tokens"),
    "degree 4 in chunks": ({"t": 999, "degree": 4}, NARROW, "degree 4 has the attention form only"),
    "columns": ({"t": 999, "d": 32}, replace(NARROW, adjoint=Adjoint(columns=64)), "columns=64 must divide d=32"),
    "dtype": ({"t": 999, "dtype": "float32"}, NARROW, "dtype float32 is not served"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_what_is_not_legal(case: str) -> None:
    keywords, config, reason = REJECTED[case]
    assert reason in str(op.reject(example(**keywords), config, H200))


WGMMA = replace(
    NARROW,
    mma="wgmma",
    adjoint_wgmma=AdjointWgmma(64, 4, 4, 32, 2, 3),
    query_wgmma=TokensWgmma(32, 4, 3, 2, "registers"),
    keys_wgmma=TokensWgmma(32, 4, 2, 2),
)
COSTED: dict[str, tuple[dict[str, Any], Config]] = {
    "grouped": ({"t": 389, "h": 1, "hq": 2, "d": 32}, NARROW),
    "E < D": ({"t": 515, "h": 1, "d": 64, "e": 32}, NARROW),
    "small blocks": ({"t": 300, "h": 2, "d": 64}, replace(NARROW, query=Tokens(16, 2, 3, 1), keys=Tokens(16, 2, 3, 1))),
    "one chunk": ({"t": 129, "h": 2, "d": 64, "e": 32}, replace(NARROW, chunk=0)),
    "wgmma, grouped": ({"t": 389, "h": 1, "hq": 2, "d": 32}, WGMMA),
    "wgmma, D = 64, segments": ({"t": 389, "h": 1, "d": 64, "e": 32}, WGMMA),
    "one chunk, no sum": ({"t": 300, "h": 1, "hq": 3, "d": 64, "normalize": "none"}, replace(NARROW, chunk=0, keys=Tokens(64, 4, 3, 1))),
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("case", COSTED)
def test_costs_are_what_is_counted(case: str, gated: bool) -> None:
    keywords, config = COSTED[case]
    p = example(**keywords, gated=gated)
    launched = 0
    for stage, stats in counted(p, config):
        cost = stage.kernel.cost(stage.problem, stage.config, H200) if stage.kernel.cost else None
        assert cost is not None and stats.read_bytes is not None and stats.written_bytes is not None
        assert cost.flops == issued(stage, stats), stage.kernel.name
        touched = stats.read_bytes + stats.written_bytes
        assert abs(cost.bytes - touched) <= BYTES_TOLERANCE * touched, (stage.kernel.name, cost.bytes, touched)
        launched += 1
    joined = config.mma == "wgmma" and p.d == 64
    assert launched == 3 + bool(config.chunk) + gated + (gated and bool(config.chunk)) + joined


def counted(p: Gradient, config: Config) -> list[tuple[Stage, HostStats]]:
    """The backward pass's own launches, and what each did."""
    results = {name: poison(buffer.shape, buffer.dtype) for name, buffer in outputs(p).items()}
    stats = HostPlan(op, p, config, "accesses").run({**sample(p, 1), **results})
    return [(stage, stats[stage.kernel.name]) for stage in stages(p, config) if "back" in stage.kernel.name]


def issued(stage: Stage, stats: HostStats) -> int:
    """Operations of all MMAs."""
    objects = tiled_objects(stage.kernel.resolve(stage.problem, stage.config).members)
    return sum(
        flops(objects[names[0]], n)
        for names, n in stats.objects.items()
        if names and isinstance(objects[names[0]], TiledMma | WarpgroupMma)
    )


def test_a_sample_beyond_what_a_cpu_evaluates_repeats_rows_of_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    exact = back_op.forward_pass

    def counted_pass(p: Gradient, arrays: Any) -> dict[str, np.ndarray]:
        asked.append(p.b * p.hq * p.t**2 // 2)
        return exact(p, arrays)

    monkeypatch.setattr(back_op, "forward_pass", counted_pass)
    p = example(t=57, b=2, h=2, hq=6, d=32)
    whole = sample(p, 3)
    monkeypatch.setattr(back_op, "EXACT_PAIRS", asked.pop() - 1)
    monkeypatch.setattr(back_op, "ROWS", 8)
    found = sample(p, 3)
    assert asked == [3 * 16**2 // 2]
    assert all(np.array_equal(found[n], whole[n]) for n in ("q", "k", "v", "log_g", "dy"))
    # Rows 8 to 15 of the first three heads, which the first key head serves: those of the first sequence stand where they are.
    for n, axis in (("y", 1), ("norm", 2)):
        assert found[n].shape == whole[n].shape and found[n].dtype == whole[n].dtype
        rows = np.moveaxis(found[n], axis, 0)
        assert np.array_equal(rows[8:], rows[:-8])
    assert np.array_equal(found["y"][0, 8:16, :3], whole["y"][0, 8:16, :3]) and np.array_equal(found["y"][1, :, 3:], found["y"][0, :, :3])
    np.testing.assert_allclose(found["norm"][0, :3, 8:16], whole["norm"][0, :3, 8:16], rtol=1e-6)
    assert sample(example(t=57, b=2, h=6, d=32, normalize="none"), 3).keys() == {"q", "k", "v", "log_g", "dy"}
    # Whatever is swept: at most seconds.
    monkeypatch.undo()
    assert all(min(q.t, 2 * back_op.ROWS) ** 2 * q.hq // q.h <= 2 * back_op.EXACT_PAIRS for q in swept())


def swept() -> list[Gradient]:
    return [p for problems in program().groups.values() for p in problems]


def test_what_a_sweep_compares_at_the_problem_itself_may_differ_less_than_it_is() -> None:
    p = example(t=9, h=1, d=32)
    x = sample(p, 0)
    exact = op.reference(p, x)
    right = {n: exact[n].astype(np.float32) if b.dtype is DType.float32 else b.dtype.round(exact[n]) for n, b in outputs(p).items()}
    found = op.check(p, x, right, exact)
    assert found.ok and max(LEAST_DIFFERENCE, DIFFERENCE * found.relative_bound) < 0.5
    wrong = op.check(p, x, right | {"dv": p.dtype.round(1.01 * exact["dv"])}, exact)
    assert not wrong.ok and wrong.relative == pytest.approx(0.01 / back_op.BOUNDS["dv"] * found.relative_bound, rel=0.1)


def test_the_dtypes_are_those_of_the_forward_pass() -> None:
    assert {buffer.dtype for buffer in op.inputs(example(t=9)).values()} == {DType.bfloat16, DType.float32}
