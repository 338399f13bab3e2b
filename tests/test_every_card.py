"""Every op runs on every GPU of the table: what a call takes there without a measurement compiles, and spills nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vidrial.build.cubins import cubin_of
from vidrial.build.nvrtc import compile_source
from vidrial.build.toolchain import supported_archs
from vidrial.device import SUFFIXED, TABLE, Device
from vidrial.errors import ToolchainError
from vidrial.spec.op import Op
from vidrial.spec.registry import find_op
from vidrial.tune.shortlist import predicted

EXAMPLES = Path(__file__).parents[1] / "examples"
# The op, its smallest problem that launches all that its choices may.
OPS: dict[str, tuple[str, dict[str, Any]]] = {
    "power_retention": ("power_retention", {"t": 3000, "d": 32}),
    "power_retention_backward": ("power_retention_backward", {"t": 3000, "d": 32}),
    "flash_attention": ("flash_attention", {"t": 300, "d": 64}),
    "gemm": (f"{EXAMPLES}/gemm/gemm.py:op", {}),
    "softmax": (f"{EXAMPLES}/softmax/softmax.py:op", {"n": 1000}),
    "scan": (f"{EXAMPLES}/scan/scan.py:op", {"t": 1000}),
}
KERNEL = 'extern "C" __global__ void k(float* x) { x[0] = 1; }'


@pytest.mark.parametrize("gpu", [device.name for device in TABLE])
@pytest.mark.parametrize("name", OPS)
def test_an_op_compiles_for_a_card_without_spills(name: str, gpu: str) -> None:
    reference, keywords = OPS[name]
    op, device = find_op(reference), Device.of(gpu)
    problem = op.example(**keywords)
    stages = op.stages(problem, predicted(op, problem, device))
    assert stages
    for stage in stages:
        resources = cubin_of(stage.kernel, stage.problem, stage.config, device.arch).resources
        assert (stage.kernel.name, resources.spill_stores + resources.spill_loads) == (stage.kernel.name, 0)
        assert 0 < resources.registers <= 255
        occupancy = stage.kernel.occupancy(stage.problem, stage.config, device, resources.registers)
        assert occupancy.ctas >= 1, f"{stage.kernel.name} does not fit an SM of {gpu}: {occupancy}"


def test_what_hopper_alone_has_is_taken_on_hopper_alone() -> None:
    def kernels(name: str, gpu: str) -> set[str]:
        op: Op = find_op(OPS[name][0])
        problem, device = op.example(**OPS[name][1]), Device.of(gpu)
        return {stage.kernel.name for stage in op.stages(problem, predicted(op, problem, device))}

    assert kernels("gemm", "h100") == {"gemm_tma"} and kernels("flash_attention", "h100") == {"flash_sm90"}
    for device in TABLE:
        if device.arch != "sm_90a":
            assert kernels("gemm", device.name) == {"gemm"} and "flash_sm80" in kernels("flash_attention", device.name)


def test_this_nvrtc_knows_every_architecture_of_the_table() -> None:
    assert {device.capability for device in TABLE} <= set(supported_archs())


@pytest.mark.parametrize("arch", [f"{arch}{suffix}" for arch in SUFFIXED for suffix in "af"])
def test_suffixes_are_compiled_for(arch: str) -> None:
    cubin = compile_source(KERNEL, "k", Device.of(arch).arch)
    assert cubin.arch == arch and cubin.image[:4] == b"\x7fELF"


def test_an_architecture_that_this_nvrtc_does_not_know_is_named_with_those_that_it_does() -> None:
    with pytest.raises(
        ToolchainError, match=r"NVRTC \d+\.\d+ does not compile for sm_999; it knows .*sm_80, .*sm_121.*pip install --upgrade"
    ):
        compile_source(KERNEL, "k", "sm_999")
