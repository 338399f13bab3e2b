"""A process of its own: its first call of power_retention up to the launches, on a GPU that records; what it took, as JSON on stdout."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import cupy
import numpy as np
from test_call import H200, Driver, Runtime, Tensor, Torch

from vidrial.build import cubins as build
from vidrial.device import Device
from vidrial.kernels.power_retention import power_retention
from vidrial.kernels.power_retention.op import op
from vidrial.runtime import plan
from vidrial.runtime.launch import Binary


def main() -> None:
    driver, compiled, opened = Driver(), [], []
    cupy.cuda.driver, cupy.cuda.runtime = driver, Runtime()
    sys.modules["torch"] = Torch
    Device.current = classmethod(lambda cls, index=None: H200)
    Binary.load = classmethod(lambda cls, cubin, entry, index: Binary(cubin, 1, entry, index, 232448))
    plan.capturing = lambda: False
    really = build.compile_source
    build.compile_source = lambda *a, **k: compiled.append(a[1]) or really(*a, **k)
    q, k, v = (Tensor(np.zeros((1, 2000, 2, 32), np.uint16), "bfloat16") for _ in range(3))
    known = set(sys.modules)
    sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
    begin = time.perf_counter()
    power_retention(q, k, v)
    seconds = time.perf_counter() - begin
    told = {
        "ms": seconds * 1e3,
        "launches": len(driver.launches),
        "compiled": compiled,
        "tiles": sum(kernel._tiles.made for kernel in op.kernels),
        "opened": list(opened),
        "imported": sorted(set(sys.modules) - known),
        "nvrtc": bool(re.search(r"/libnvrtc\.so", Path("/proc/self/maps").read_text())),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
