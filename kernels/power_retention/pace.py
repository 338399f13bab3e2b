"""How long the parts of the kernels take on a warpgroup, in seconds, for their costs.

Fitted to the trials of the sweeps that lie beside the rankings (docs/sweeping.md); tests/power_retention/test_cost_model.py holds them.
"""

from __future__ import annotations

from vidrial import Device

# Share of the tensor rate that wgmma reaches; times that mma.sync takes what wgmma takes.
REACHED, MMA_SYNC = 0.89, 1.37
# Products of a warpgroup that has the tensor cores to itself, in times of what they take at the rate reached: with keys and values, with the
# state, whose elements of phi(q) are made meanwhile. Those of the scan are hidden by its elements of phi(k).
KEYS_PRODUCTS, STATE_PRODUCTS = 0.978, 0.59
# Of their time at that rate, what the products of each further warpgroup of the CTA add.
SHARED = 0.333
# A weight; an element of phi(k) of the scan.
WEIGHT, FEATURE = 14.0e-12, 29.1e-12
# What the overlapped order of a block of keys leaves of its weights' time, and of its step's.
OVERLAPPED = 0.591
# A step of the loop over blocks of keys and over the state, for each 128 rows of a CTA that meet in its barrier; over a scan's tokens, for
# each warpgroup. NOTE: all rows that were measured are 32 a warp: that 64 take twice as long is prudence.
KEYS_STEP, STATE_STEP, TOKENS_STEP = 0.261e-6, 0.194e-6, 0.0731e-6
# What a step of attend waits for if the ring is one stage short: of 2, or of 3 in the overlapped order, which reads two of them. The serial one
# and the scan lose nothing by it.
FETCH = 0.0547e-6
# The output's first loads and its last stores, for each 128 rows.
OUTPUT = 1.97e-6
# A snapshot's 64 x 64 elements.
SNAPSHOT = 0.126e-6
# A pass of the gates' CTA over its threads' tokens.
GATES_PASS = 2.7e-6


def efficiency(mma: str) -> float:
    """Share of the tensor rate that the instruction reaches."""
    return REACHED if mma == "wgmma" else REACHED / MMA_SYNC


def products(flops: float, warpgroups: float, mma: str, alone: float, device: Device) -> float:
    """Seconds of a CTA's products, shared by its warpgroups; `alone`: KEYS_PRODUCTS or STATE_PRODUCTS, 0 if hidden."""
    rate = device.tensor_tflops * 1e12 / device.sms * efficiency(mma)
    return flops / warpgroups / rate * (alone + SHARED * (warpgroups - 1))
