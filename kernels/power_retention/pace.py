"""How long the parts of the kernels take on a warpgroup, in seconds, for their costs.

Fitted to the trials of the sweeps that lie beside the rankings (docs/sweeping.md); tests/power_retention/test_cost_model.py holds them.
"""

from __future__ import annotations

from vidrial import Device

# Times that mma.sync takes what wgmma takes.
MMA_SYNC = 1.79
# Products of a warpgroup that has the tensor cores to itself, in times of what they take at the tensor rate: of the output, of the scan.
ATTEND_PRODUCTS, SCAN_PRODUCTS = 1.04, 0.483
# Of their time at the tensor rate, what the products of each further warpgroup of the CTA add.
SHARED = 0.308
# A weight; an element of phi(k) of the scan.
WEIGHT, FEATURE = 12.8e-12, 10.0e-12
# What the overlapped order of a block of keys leaves of its weights' time, and of its step's.
OVERLAPPED = 0.7
# A step of the loop over blocks of keys and over the state, for each 128 rows of a CTA that meet in its barrier; over a scan's tokens, for
# each warpgroup. NOTE: all rows that were measured are 32 a warp: that 64 take twice as long is prudence.
KEYS_STEP, STATE_STEP, TOKENS_STEP = 0.274e-6, 0.0402e-6, 0.105e-6
# What a ring that is one stage short waits for, a step.
FETCH = 0.0719e-6
# The output's first loads and its last stores, for each 128 rows.
OUTPUT = 1.87e-6
# A snapshot's 64 x 64 elements.
SNAPSHOT = 0.106e-6
# A pass of the gates' CTA over its threads' tokens.
GATES_PASS = 2.63e-6


def efficiency(mma: str) -> float:
    """Share of the tensor rate that the instruction reaches."""
    return 1.0 if mma == "wgmma" else 1 / MMA_SYNC


def products(flops: float, warpgroups: float, mma: str, alone: float, device: Device) -> float:
    """Seconds of a CTA's products, shared by its warpgroups; `alone`: ATTEND_PRODUCTS or SCAN_PRODUCTS."""
    rate = device.tensor_tflops * 1e12 / device.sms * efficiency(mma)
    return flops / warpgroups / rate * (alone + SHARED * (warpgroups - 1))
