"""Power retention by mma.sync and by wgmma, at odd lengths, on a GPU."""

from __future__ import annotations

import pytest
from power_gpu import compile_all, errors, run_guarded

from vidrial.device import Device
from vidrial.kernels.power_retention.attend import Config as Attend
from vidrial.kernels.power_retention.op import Config, chunked, example, op, reference, sample
from vidrial.kernels.power_retention.scan import Config as Scan
from vidrial.spec.choices import describe

LENGTHS = (1, 2, 7, 63, 64, 65, 127, 129, 257, 383, 513, 641, 1000, 1021)
SYNC, WGMMA = (Scan(64, 3, 4, 64, 1), Attend()), (Scan(64, 4, 4, 64, 1, 5, "wgmma"), Attend(64, 2, 4, 4, 2, "wgmma"))
INSTRUCTIONS: dict[str, tuple[dict[str, int], tuple[Scan, Attend]]] = {
    "mma.sync, D = 64": ({"d": 64}, SYNC),
    "wgmma, D = 64": ({"d": 64}, WGMMA),
    "wgmma, D = 128": ({"d": 128}, (Scan(64, 5, 8, 128, 1, 3, "wgmma"), Attend(64, 2, 8, 4, 1, "wgmma"))),
    "wgmma, E = 32 < D = 64": ({"d": 64, "e": 32}, (Scan(64, 4, 4, 32, 1, 3, "wgmma"), Attend(64, 2, 4, 3, 2, "wgmma"))),
    "wgmma, half of E = 64": ({"d": 64}, (Scan(64, 4, 4, 32, 1, 3, "wgmma"), Attend(64, 2, 8, 4, 1, "wgmma"))),
    "wgmma, E = 64 < D = 128": ({"d": 128, "e": 64}, (Scan(64, 4, 8, 64, 1, 2, "wgmma"), Attend(64, 2, 4, 3, 1, "wgmma"))),
    "wgmma, E = 128 > D = 64": ({"d": 64, "e": 128}, (Scan(64, 4, 8, 128, 1, 2, "wgmma"), Attend(32, 2, 4, 4, 2, "wgmma"))),
}


@pytest.mark.parametrize("case", INSTRUCTIONS)
def test_odd_lengths_by_either_instruction(case: str) -> None:
    sizes, (scan, attend) = INSTRUCTIONS[case]
    configs, device = [Config(chunk, scan if chunk else Scan(), attend) for chunk in (0, 256, 512)], Device.current()
    longest = example(t=LENGTHS[-1], **sizes)
    if (reason := op.reject(longest, configs[-1], device)) is not None:
        pytest.skip(f"not on {device.name}: {reason}")
    compile_all({case: longest}, {case: configs})
    wrong = []
    for t in LENGTHS:
        p = example(t=t, b=2, h=1, hq=2, **sizes)
        inputs = sample(p, t)
        exact = reference(p, inputs)
        for config in (c for c in configs if c.chunk < t):
            y, intact = run_guarded(p, config, inputs)
            again, _ = run_guarded(p, config, inputs)
            found = errors(p, inputs, y, chunked(p, config.chunk).chunk, exact) + ([] if intact else ["guards"])
            wrong += [f"{t}: {describe(config)}: {e}" for e in found + ([] if (y == again).all() else ["another run differs"])]
    assert not wrong, "\n".join(wrong)
