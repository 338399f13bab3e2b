"""Power retention's kernels before anything runs: which configs are legal and why, what they compile to, what they need."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

import pytest

from vidrial.build.cubins import build_many
from vidrial.build.nvrtc import Cubin
from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.errors import ArgumentError, ConfigError, TemplateError
from vidrial.kernels.power_retention import attend, gates, scan, scan_wgmma
from vidrial.kernels.power_retention.op import Config, chunked, example, op, stages, workspace
from vidrial.spec.choices import describe
from vidrial.spec.fields import fields
from vidrial.spec.source import Tiles

H200, A100 = Device.of("h200"), Device.of("a100")
PROBLEMS: dict[str, dict[str, Any]] = {
    "short": {"t": 333, "d": 64},
    "medium": {"t": 10_007, "d": 64},
    "long, D = 128": {"t": 65_537, "h": 8, "d": 128},
    "E != D, fp16": {"t": 10_007, "d": 128, "e": 64, "dtype": "float16"},
    "D = 32, no gates": {"t": 5_001, "d": 32, "gated": False, "normalize": "none"},
    "degree 4": {"t": 2_001, "d": 64, "degree": 4},
}


@pytest.mark.parametrize("device", [A100, H200], ids=lambda device: device.arch)
def test_the_configs_predicted_best_compile_without_spills(device: Device) -> None:
    sources = {}
    for name, keywords in PROBLEMS.items():
        p = example(**keywords)
        for config in list(op.space(p, device, limit=3))[: 2 if name == "medium" else 1]:
            for stage in stages(p, config):
                source = stage.kernel.source(stage.problem, stage.config)
                sources[source.text] = source, f"{name}: {stage.kernel.name} {describe(stage.config)}"
    assert {source.entry for source, _ in sources.values()} >= {"power_gates", "power_scan", "power_attend"}
    built = {sources[text][1]: cubin for text, cubin in build_many(sources, device.arch, jobs=2)}
    assert all(isinstance(cubin, Cubin) and cubin.arch == device.arch and cubin.image[:4] == b"\x7fELF" for cubin in built.values())
    resources = {what: cubin.resources for what, cubin in built.items() if isinstance(cubin, Cubin)}
    wrong = [f"{what}: {r}" for what, r in resources.items() if r.spill_stores or r.spill_loads or not 16 <= r.registers <= 255]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", PROBLEMS)
def test_another_length_compiles_nothing(name: str) -> None:
    p = example(**PROBLEMS[name])
    config = op.predicted(p, H200)
    other = example(**PROBLEMS[name] | {"t": 7 * p.t + 13, "b": 3, "h": 5, "hq": 10, "scale": 0.3})
    texts = [stage.kernel.source(stage.problem, stage.config).text for stage in stages(p, config)]
    assert texts == [stage.kernel.source(stage.problem, stage.config).text for stage in stages(other, config)]
    first, second = ([bytes(s.kernel.pack(s.problem, s.config)) for s in stages(x, config)] for x in (p, other))
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_static_facts_change_the_source() -> None:
    p = example(t=1000, d=64)
    config = op.predicted(p, A100)
    texts = {
        stages(x, config)[-1].kernel.source(stages(x, config)[-1].problem, config.attend).text
        for x in (
            p,
            *(example(**{"t": 1000, "d": 64, **k}) for k in ({"e": 32}, {"dtype": "float16"}, {"gated": False}, {"normalize": "none"})),
        )
    }
    assert len(texts) == 5


@pytest.mark.parametrize("kernel", op.kernels, ids=lambda kernel: kernel.name)
def test_tiles_may_not_read_what_a_launch_decides(kernel: Any) -> None:
    configs = (Config(scan=scan.Config(segments=2, mma=mma)) for mma in ("sync", "wgmma"))
    problems = (example(t=5000), dataclasses.replace(example(t=5000), initial=True))
    problem = next(s.problem for config in configs for p in problems for s in stages(p, config) if s.kernel is kernel)
    dynamic = fields(problem, "dynamic")
    assert {"t", "b", "h", "chunk"} <= set(dynamic)
    for name in dynamic:
        nosy = dataclasses.replace(kernel, tiles=lambda p, c, name=name: Tiles(threads=getattr(p, name)))
        with pytest.raises(TemplateError, match=rf"{type(problem).__name__}\.{name} is not known before the launch"):
            nosy.resolve(problem, kernel.config())
    with pytest.raises(TemplateError, match=r"Chunked\.t is not known before the launch"):
        dataclasses.replace(kernel, tiles=lambda p, c: Tiles(threads=p.chunks)).resolve(problem, kernel.config())


def read(kernel: Any, problem: Any, config: Any) -> set[str]:
    """Names of the problem's fields that decide a kernel's binary."""
    return {name for (owner, name), _ in kernel.binary(problem, config)[1] if owner == "problem"}


def test_only_what_its_tiles_or_its_template_read_decides_a_binary() -> None:
    config = Config(chunk=256, scan=scan.Config(columns=32, segments=2))
    asked = {s.kernel.name: (s.kernel, s.problem, s.config) for s in stages(example(t=5000), config)}
    assert read(*asked["power_gates"]) == set()
    assert read(*asked["power_carry"]) == {"gated", "normalized", "d", "e"}
    assert read(*asked["power_scan"]) == {"dtype", "d", "e", "gated", "normalized", "leaves"}
    assert read(*asked["power_attend"]) == {"dtype", "d", "e", "degree", "gated", "normalized", "stateful", "enters"}

    def binaries(config: Config, **facts: Any) -> dict[str, Any]:
        return {s.kernel.name: s.binary for s in stages(example(**{"t": 5000} | facts), config)}

    first = binaries(config)
    # What a stage is told of another one's part is an argument: no other binary.
    others = binaries(dataclasses.replace(config, scan=scan.Config(columns=32, segments=4), attend=attend.Config(keys=32)))
    assert [name for name in first if first[name] != others[name]] == ["power_attend"]
    assert [name for name, binary in binaries(config, dtype="float16").items() if binary != first[name]] == ["power_scan", "power_attend"]
    assert [name for name, binary in binaries(config, degree=4).items() if binary != first[name]] == ["power_attend"]
    assert binaries(config, t=777, b=3, h=5, scale=0.3) == first
    # The same binaries are the same sources, and others are others.
    changed = {"t": 777, "h": 3, "d": 32, "e": 32, "degree": 4, "dtype": "float16", "gated": False, "normalize": "none"}
    every = [s for name, value in changed.items() for s in stages(example(**{"t": 5000, name: value}), config)]
    texts: dict[Any, set[str]] = {}
    for stage in every:
        texts.setdefault(stage.binary, set()).add(stage.kernel.source(stage.problem, stage.config).text)
    assert all(len(of_one) == 1 for of_one in texts.values()) and len(set().union(*texts.values())) == len(texts) > 12


ASKED = chunked(example(t=1000, h=1), 256)
HALF, SCAN_90 = DType.float16, scan_wgmma.power_scan_wgmma


def by_wgmma(**choices: Any) -> scan.Config:
    """A config of the scan that is legal for D = E = 64, but for what `choices` change."""
    return scan.Config(**{"stages": 4, "tiles": 2, "mma": "wgmma"} | choices)


BROKEN: dict[str, tuple[Any, Any, Any, str]] = {
    "columns": (scan.power_scan, dataclasses.replace(ASKED, e=32), scan.Config(columns=64), "columns=64 must divide d=64 and e=32"),
    "tokens": (scan.power_scan, dataclasses.replace(ASKED, chunk=96), scan.Config(), "tokens=64 must divide chunk=96"),
    "segments": (scan.power_scan, ASKED, scan.Config(segments=4), "segments=4 must be fewer than the 4 chunks"),
    "scan's shared memory": (
        scan.power_scan,
        dataclasses.replace(ASKED, d=128, e=128, chunk=128),
        scan.Config(stages=5),
        "bytes of shared memory",
    ),
    "rows": (attend.power_attend, dataclasses.replace(ASKED, chunk=64), attend.Config(), "the 128 rows of a CTA must divide chunk=64"),
    "keys": (attend.power_attend, ASKED, attend.Config(keys=128, m=2, warps=2, blocks=1), "keys=128 must divide the 64 rows of a CTA"),
    "registers": (attend.power_attend, ASKED, attend.Config(m=4, keys=128, blocks=1), "accumulators"),
    "tiles": (scan.power_scan, ASKED, scan.Config(tiles=2), "tiles=2: by mma.sync a warp owns one"),
    "wgmma elsewhere": (attend.power_attend, ASKED, attend.Config(mma="wgmma"), "wgmma is an instruction of sm_90a; a100 is sm_80"),
    "scan by wgmma elsewhere": (SCAN_90, ASKED, by_wgmma(), "wgmma is an instruction of sm_90a; a100 is sm_80"),
}
BROKEN_ON_HOPPER: dict[str, tuple[Any, Any, Any, str]] = {
    "float16": (
        attend.power_attend,
        dataclasses.replace(ASKED, dtype=HALF),
        attend.Config(mma="wgmma"),
        "the range of bfloat16; got float16",
    ),
    "warps": (attend.power_attend, ASKED, attend.Config(mma="wgmma", warps=2), "warpgroups of 4 warps; got warps=2"),
    "ring": (attend.power_attend, ASKED, attend.Config(mma="wgmma", stages=2), "stages=2: wgmma reads one stage while"),
    "scan's float16": (SCAN_90, dataclasses.replace(ASKED, dtype=HALF), by_wgmma(), "got float16"),
    "few features": (SCAN_90, dataclasses.replace(ASKED, d=32), by_wgmma(), "64 rows of Z; got d=32"),
    "scan's columns": (SCAN_90, ASKED, by_wgmma(columns=128), "columns=128 must divide d=64 and e=64"),
    "scan's ring": (SCAN_90, ASKED, by_wgmma(stages=3), "stages=3: a block that is read"),
    "scan's tokens": (SCAN_90, ASKED, by_wgmma(tokens=32), "tokens=32: a block's products run on"),
    "scan's registers": (SCAN_90, dataclasses.replace(ASKED, d=128, e=128), by_wgmma(columns=128, tiles=5), "320 accumulators per thread"),
    "scan's segments": (SCAN_90, ASKED, by_wgmma(segments=4), "segments=4 must be fewer than the 4 chunks"),
}


@pytest.mark.parametrize(("device", "case"), [(A100, case) for case in BROKEN] + [(H200, case) for case in BROKEN_ON_HOPPER])
def test_a_broken_rule_says_so(device: Device, case: str) -> None:
    kernel, problem, config, reason = (BROKEN if device is A100 else BROKEN_ON_HOPPER)[case]
    found = kernel.reject(problem, config, device)
    assert found is not None and reason in found
    with pytest.raises(ConfigError, match="is not legal for"):
        kernel.check(problem, config, device)


UNSERVED: dict[str, tuple[dict[str, Any], str]] = {
    "float32": ({"dtype": "float32"}, "q: dtype float32 is not served; accepted: bfloat16, float16"),
    "int32": ({"dtype": "int32"}, "q: dtype int32 is not served"),
    "d": ({"d": 77}, "D=77 is not served; accepted: 32, 64, 128. Pad with zeros"),
    "d = 0": ({"d": 0}, "D=0 is not served"),
    "d below 0": ({"d": -64}, "D=-64 is not served"),
    "e = 0": ({"e": 0}, "E=0 is not served"),
    "odd degree": ({"degree": 3}, "degree=3: an odd power's weights change sign, so their sum is no normaliser; accepted: 2, 4"),
    "degree below 0": ({"degree": -1}, "degree=-1: an odd power's weights"),
    "heads": ({"hq": 3, "h": 2}, "q has 3 heads and k has 2; accepted: a multiple of k's heads"),
    "fewer query heads": ({"hq": 1, "h": 2}, "q has 1 heads and k has 2"),
    "many heads": ({"b": 2, "h": 40_000}, "q has B x HQ = 80000 heads; accepted: at most 65535"),
    "elements": ({"t": 2**22}, "q has 4294967296 elements; accepted: at most 2^31"),
    "scale": ({"scale": float("inf")}, "scale=inf is not served; accepted: None, or a number of at most 1e+09 in magnitude"),
    "scale is no number": ({"scale": float("nan")}, "scale=nan is not served"),
}


@pytest.mark.parametrize("case", UNSERVED)
def test_what_calls_refuse_no_config_is_legal_for(case: str) -> None:
    keywords, reason = UNSERVED[case]
    problem = example(**{"t": 10, **keywords})
    space = op.space(problem, H200)
    assert not space.legal and all(reason in found for found in space.reasons())
    with pytest.raises(ConfigError, match=f"^{re.escape(reason)}"):
        op.predicted(problem, H200)


def test_an_example_takes_the_words_of_a_call() -> None:
    with pytest.raises(ArgumentError, match="normalize='foo' is not known; accepted: 'sum', 'none'"):
        example(t=10, normalize="foo")
    assert not example(t=10, normalize="none").normalized and example(t=10, hq=0).hq == 0


def test_the_rules_of_the_op() -> None:
    assert op.reject(example(t=5000, degree=4), Config(chunk=128), H200) == "degree 4 has the attention form only: chunk=0"
    assert op.reject(example(t=500), Config(chunk=512), H200) == "chunk=512 holds all 500 tokens: chunk=0 is the same without a state"
    with pytest.raises(ConfigError, match=r"Config\.chunk=100 is not a choice; accepted: .*128"):
        op.check_config(example(t=5000), Config(chunk=100), H200)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_space(name: str) -> None:
    p = example(**PROBLEMS[name])
    begin = time.perf_counter()
    space = op.space(p, H200)
    assert time.perf_counter() - begin < 5  # 1 s on a quiet machine
    seconds = [candidate.seconds for candidate in space.legal]
    # Degree 4 has no scan, so the space is that of one kernel.
    assert (len(seconds) == 256 if p.degree == 2 else 20 < len(seconds) < 256) and seconds == sorted(seconds) and seconds[0] > 1e-6
    assert len({candidate.config for candidate in space.legal}) == len(seconds)
    for candidate in space.legal[::50]:
        assert op.reject(p, candidate.config, H200) is None
        assert abs(op.seconds(p, candidate.config, H200) - candidate.seconds) < 1e-9
    reasons = space.reasons()
    assert sum(map(len, reasons.values())) == len(space.rejected) > 0
    assert all(len(reason) > 20 for reason in reasons)


@pytest.mark.parametrize(
    ("device", "facts", "fixed"),
    [
        ("h200", {"t": 2000, "h": 2}, {}),
        ("h200", {"t": 70_001}, {"chunk": 512}),
        ("a100", {"t": 5001, "d": 128, "b": 2, "h": 3}, {}),
        ("rtx3090", {"t": 70_001, "d": 32, "dtype": "float16", "gated": False}, {}),
        ("h200", {"t": 777, "degree": 4}, {}),
    ],
)
def test_the_prediction_is_the_first_of_the_space_and_makes_few_tiles(device: str, facts: Any, fixed: Any) -> None:
    problem, gpu = example(**facts), Device.of(device)
    for kernel in op.kernels:
        kernel._tiles.clear()
    found = op.predicted(problem, gpu, fixed)
    assert 1 <= sum(kernel._tiles.made for kernel in op.kernels) <= 16
    assert found == op.space(problem, gpu, 1, fixed).legal[0].config


def test_short_sequences_take_no_state() -> None:
    for d in (32, 64, 128):
        assert op.predicted(example(t=200, d=d), H200).chunk == 0
        assert op.predicted(example(t=100_000, h=8, d=d), H200).chunk >= 128
    assert op.predicted(example(t=50_000, degree=4), H200).chunk == 0
    assert op.predicted(example(t=0), H200).chunk == 0
    assert op.predicted(example(t=5_000), H200, {"chunk": 256}).chunk == 256


@pytest.mark.parametrize(("d", "e"), [(32, 32), (64, 64), (128, 128), (128, 32), (32, 128)])
def test_the_size_of_a_state(d: int, e: int) -> None:
    monomials = d * (d + 1) // 2
    held = example(t=1, d=d, e=e, normalize="none").snapshot
    # Whole tiles of 64 products: a bit more than the monomials that are needed.
    assert held % (64 * e) == 0 and monomials * e <= held <= 1.25 * monomials * e
    assert example(t=1, d=d, e=e).snapshot == held + d * d
    p, config = example(t=5000, b=2, h=3, d=d, e=e), Config(chunk=512, scan=scan.Config(segments=3))
    buffers = workspace(p, config)
    assert buffers["snapshots"].shape == (6, 10, held + d * d) and buffers["ends"].shape == (6, 2, held + d * d)
    assert buffers["a"].shape == (6, 5120, 2) and buffers["to_end"].shape == buffers["to_block"].shape == (6, 5120)
    assert not workspace(example(t=5000, gated=False), Config(chunk=0))


def test_the_number_of_launches() -> None:
    p, once, thrice = example(t=5000), Config(chunk=512), Config(chunk=512, scan=scan.Config(segments=3))
    assert [s.kernel.name for s in stages(p, thrice)] == ["power_gates", "power_scan", "power_carry", "power_attend"]
    assert [s.kernel.name for s in stages(p, once)] == ["power_gates", "power_scan", "power_attend"]
    assert [s.kernel.name for s in stages(example(t=5000, gated=False), Config(chunk=0))] == ["power_attend"]
    assert stages(p, thrice)[0].kernel is gates.power_gates


def test_the_workspace_of_a_call_fits_into_the_gpu() -> None:
    """T = 4M, D = 128: the config predicted fastest would take more than there is; the one that is taken costs little more."""
    p, h200 = example(t=4_000_000, h=4, d=128), Device.of("h200")
    arrays = op.array_bytes(p)
    unlimited = op.predicted(p, dataclasses.replace(h200, memory_bytes=0))
    small = dataclasses.replace(h200, memory_bytes=arrays + op.workspace_bytes(p, unlimited) - 1)
    reason = op.reject(p, unlimited, small)
    assert reason is not None and re.search(r"GiB of workspace beside .* GiB of inputs and outputs: h200 has", reason)
    fits = op.predicted(p, small)
    assert (
        op.reject(p, fits, small) is None
        and op.reject(p, unlimited, dataclasses.replace(small, memory_bytes=small.memory_bytes + 1)) is None
    )
    assert op.workspace_bytes(p, fits) < op.workspace_bytes(p, unlimited)
    assert op.seconds(p, unlimited, h200) < op.seconds(p, fits, h200) < 1.5 * op.seconds(p, unlimited, h200)
    assert op.workspace_bytes(p, fits) == sum(b.bytes for b in op.workspace(p, fits).values()) > 1 << 30
    assert small.key == h200.key
