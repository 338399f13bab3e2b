"""Facts of a GPU: asked of the driver where there is one, taken from a table where there is none."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

from vidrial.errors import ArgumentError, ToolchainError
from vidrial.settings import prepare_cupy

KB, MB, GB = 1 << 10, 1 << 20, 1 << 30
# Alike on every architecture that is served: threads of a warp and, at most, of a CTA; bytes of the widest load (of a vector of cp.async,
# a row of ldmatrix, a swizzle's unit), of a kernel's parameters, and of shared memory that the system takes of every CTA.
WARP, CTA_THREADS = 32, 1024
VECTOR_BYTES, PARAMETER_BYTES, RESERVED_SMEM = 16, 4096, 1024
# The one architecture that has wgmma, and setmaxnreg as Roles uses it.
HOPPER = "sm_90a"
# Architectures from Blackwell on come with features of their own ("a": the cubin runs on this very compute capability) and of their family
# ("f": on it and on later ones of the same major, sm_100f on 10.0 and 10.3, sm_120f on 12.0 and 12.1; NVIDIA's programming guide, 5.1.2).
SUFFIXED = ("sm_100", "sm_103", "sm_110", "sm_120", "sm_121")
# The GPU of the table that stands in where there is none.
DEFAULT_GPU = "h200"
INSTALL_CUPY = "pip install cupy-cuda13x==14.2.0"

# Attribute numbers of cudaDeviceGetAttribute, by field of Device.
ATTRIBUTES = {
    "sms": 16,
    "smem_per_block": 97,
    "smem_per_sm": 81,
    "registers_per_sm": 82,
    "threads_per_sm": 39,
    "l2_bytes": 38,
    "memory_clock_khz": 36,
}
BUS_BITS, MAJOR, MINOR = 37, 75, 76


@dataclasses.dataclass(frozen=True)
class Device:
    """One GPU as the rules, the analysis and the rankings see it. Sizes in bytes, clocks in kHz.

    `tensor_tflops` (dense bf16, float32 accumulation) and `bandwidth_gbs` (1e9 bytes per second) are what a good kernel reaches:
    measured on the H200, elsewhere estimated as 80 % and 90 % of the data sheet. `memory_bytes` is all of the GPU's memory, 0 if not known;
    GPUs that differ in it alone rank configs alike.
    """

    name: str
    arch: str
    sms: int
    smem_per_block: int
    smem_per_sm: int
    threads_per_sm: int
    l2_bytes: int
    memory_clock_khz: int
    tensor_tflops: float
    bandwidth_gbs: float
    registers_per_sm: int = 65536
    memory_bytes: int = 0

    @property
    def capability(self) -> int:
        """Compute capability times ten: 90 for sm_90a."""
        return _capability(self.arch)

    def smem_rules(self, least: int, ctas: int = 1) -> Iterator[tuple[bool, str]]:
        """Rules of a kernel whose CTA takes `least` bytes of shared memory at least, with `ctas` of them on an SM.

        Its tiles are asked for the exact number; where this many are too many they need not be made, which costs milliseconds.
        """
        if least > self.smem_per_block:
            yield False, f"at least {least} bytes of shared memory: a CTA has {self.smem_per_block} on {self.name}"
        if ctas * (least + RESERVED_SMEM) > self.smem_per_sm:
            yield False, f"{ctas} CTAs of at least {least} bytes of shared memory: an SM has {self.smem_per_sm} on {self.name}"

    @property
    def key(self) -> str:
        """Identity for rankings: GPUs with one key rank configs alike. The memory clock counts in steps of 100 MHz."""
        clock = round(self.memory_clock_khz / 1e5) * 100
        return f"{table_arch(self.arch)}-{self.sms}sm-{self.smem_per_sm // KB}kb-l2_{self.l2_bytes // MB}mb-{clock}mhz"

    @classmethod
    def of(cls, name: str) -> Device:
        """A GPU of the table by name (`h200`), or the first one of an architecture (`sm_90a`, `sm_90`), for which it is then compiled: with the
        features of that compute capability (`sm_100a`) or family (`sm_100f`) alone, if it is named so.

        Raises:
            ArgumentError: neither is in the table.
        """
        wanted = name.lower()
        for device in TABLE:
            if wanted == device.name:
                return device
            if table_arch(wanted) == device.arch:
                return device if wanted == device.arch else dataclasses.replace(device, arch=arch_name(wanted))
        known = sorted({d.arch for d in TABLE}, key=_capability)
        raise ArgumentError(
            f"device {name!r} is not in the table; accepted: {', '.join(d.name for d in TABLE)}, "
            f"or one of their architectures, {', '.join(known)}, from {SUFFIXED[0]} on also with a or f behind it ({SUFFIXED[0]}a)"
        )

    @classmethod
    def current(cls, index: int | None = None) -> Device:
        """The GPU of CUDA index `index`, by default the current one.

        Raises:
            ToolchainError: CuPy, the driver or the GPU is missing.
        """
        prepare_cupy()
        try:
            from cupy.cuda import runtime
        except (ImportError, OSError) as error:
            raise cupy_missing(error) from error
        try:
            chosen = runtime.getDevice() if index is None else index
            return _ask(runtime, int(chosen))
        except (runtime.CUDARuntimeError, ImportError, OverflowError) as error:
            which = "" if index is None else f" {index}"
            raise ToolchainError(
                f"no usable CUDA GPU{which}: {error}. Check nvidia-smi and CUDA_VISIBLE_DEVICES, or name a target with Device.of('h200')"
            ) from error

    @classmethod
    def default(cls) -> Device:
        """The current GPU if there is one, else the table's stand-in, an H200."""
        try:
            return cls.current()
        except ToolchainError:
            return cls.of(DEFAULT_GPU)


@functools.cache
def _capability(arch: str) -> int:
    return int(re.sub(r"\D", "", arch))


@functools.lru_cache
def _ask(runtime: Any, index: int) -> Device:
    """The facts of a GPU, which stay: every new problem asks for them, and the driver takes its time."""
    properties = runtime.getDeviceProperties(index)
    label, memory = properties["name"].decode(), int(properties["totalGlobalMem"])
    value = {field: int(runtime.deviceGetAttribute(number, index)) for field, number in ATTRIBUTES.items()}
    bus_bits, major, minor = (int(runtime.deviceGetAttribute(number, index)) for number in (BUS_BITS, MAJOR, MINOR))
    arch = arch_name(f"sm_{major}{minor}")
    tflops, bandwidth = _throughput(label, arch, value["sms"], value["memory_clock_khz"], bus_bits)
    return Device(name=label, arch=arch, tensor_tflops=tflops, bandwidth_gbs=bandwidth, memory_bytes=memory, **value)


def cupy_missing(error: Exception) -> ToolchainError:
    """What to do where `import cupy` raises: it is not there, or cannot make its cache folder, which it does at import."""
    helps = "set CUPY_CACHE_DIR to a folder that can be written" if isinstance(error, OSError) else f"install it: {INSTALL_CUPY}"
    return ToolchainError(f"CuPy cannot be imported ({error}); {helps}")


def gpu_count() -> int:
    """How many CUDA GPUs this process can see; 0 without CuPy or a driver."""
    prepare_cupy()
    try:
        from cupy.cuda import runtime
    except (ImportError, OSError):
        return 0
    try:
        return int(runtime.getDeviceCount())
    except runtime.CUDARuntimeError:
        return 0


def arch_name(arch: str) -> str:
    """The architecture to compile for. NOTE: plain sm_90 accepts wgmma silently and traps in its place, so it is never used."""
    return "sm_90a" if arch == "sm_90" else arch


def table_arch(arch: str) -> str:
    """The architecture of a row of the table for one that may have a suffix: `sm_100` for `sm_100a` and `sm_100f`, `sm_90a` for `sm_90`."""
    return next((known for known in SUFFIXED if arch in (f"{known}a", f"{known}f")), arch_name(arch))


def _throughput(label: str, arch: str, sms: int, memory_clock_khz: int, bus_bits: int) -> tuple[float, float]:
    """TFLOP/s and GB/s: the table's for a GPU that it names, else the nearest one's scaled by SMs, and 90 % of the (double rate) bus."""
    words = re.sub(r"[^a-z0-9]", "", label.lower())
    for device in TABLE:
        if device.name in words and device.arch == arch and device.sms == sms:
            return device.tensor_tflops, device.bandwidth_gbs
    nearest = min(TABLE, key=lambda d: (d.arch != arch, abs(d.capability - int(re.sub(r"\D", "", arch)))))
    return nearest.tensor_tflops * sms / nearest.sms, 0.9 * 2 * memory_clock_khz * 1e3 * bus_bits / 8 / 1e9


# Threads and shared memory of an SM, and registers (64 K everywhere), by compute capability: NVIDIA's programming guide, table 30, and libcu++'s
# arch_traits.h. The rest of a row that nobody here could ask a driver about has its sources above it.
TABLE = (
    Device("h200", "sm_90a", 132, 227 * KB, 228 * KB, 2048, 60 * MB, 3_201_000, 781.0, 4300.0, memory_bytes=139 * GB),
    Device("h100", "sm_90a", 132, 227 * KB, 228 * KB, 2048, 50 * MB, 2_619_000, 791.0, 3000.0, memory_bytes=79 * GB),
    Device("a100", "sm_80", 108, 163 * KB, 164 * KB, 2048, 40 * MB, 1_593_000, 250.0, 1830.0, memory_bytes=79 * GB),
    Device("rtx3090", "sm_86", 82, 99 * KB, 100 * KB, 1536, 6 * MB, 9_751_000, 57.0, 842.0, memory_bytes=23 * GB),
    # Jetson AGX Orin 64 GB, by its technical brief (v1.2): 16 SMs, 4 MB of L2, 256 bits of LPDDR5-6400, 170 sparse INT8 TOPS, a quarter of them
    # dense float16. A few GB are the system's.
    Device("orin", "sm_87", 16, 163 * KB, 164 * KB, 1536, 4 * MB, 3_200_000, 34.0, 184.0, memory_bytes=60 * GB),
    Device("l40s", "sm_89", 142, 99 * KB, 100 * KB, 1536, 96 * MB, 9_001_000, 290.0, 778.0, memory_bytes=44 * GB),
    Device("rtx4090", "sm_89", 128, 99 * KB, 100 * KB, 1536, 72 * MB, 10_501_000, 132.0, 907.0, memory_bytes=23 * GB),
    Device("b200", "sm_100", 148, 227 * KB, 228 * KB, 2048, 126 * MB, 3_996_000, 1800.0, 7200.0, memory_bytes=178 * GB),
    # HGX B300: SMs, L2, memory clock as of the B200, dense bf16 (2.25 PFLOP/s) too, by NVIDIA's data sheet of HGX; 270 GB of HBM3E that can be
    # used, 7.7 TB/s (verda.com on GB300 and B300). Its GB300 sibling has 152 SMs.
    Device("b300", "sm_103", 148, 227 * KB, 228 * KB, 2048, 126 * MB, 3_996_000, 1800.0, 7000.0, memory_bytes=268 * GB),
    # Jetson AGX Thor (T5000): 20 SMs, 256 bits of LPDDR5X, 273 GB/s, 517 sparse float16 TFLOP/s (NVIDIA's introduction of Jetson Thor); 32 MB of
    # L2 and 232448 bytes of shared memory per CTA as asked of its driver (apache/tvm#20259).
    Device("thor", "sm_110", 20, 227 * KB, 228 * KB, 1536, 32 * MB, 4_266_000, 207.0, 246.0, memory_bytes=122 * GB),
    Device("rtx5090", "sm_120", 170, 99 * KB, 100 * KB, 1536, 96 * MB, 14_001_000, 167.0, 1610.0, memory_bytes=31 * GB),
    # DGX Spark (GB10): 48 SMs (6144 CUDA cores), 24 MB of L2 (techpowerup.com, gb10.c4342), 256 bits of LPDDR5X, 273 GB/s, 1 PFLOP/s of sparse FP4
    # (NVIDIA's data sheet), an eighth of that dense bf16; 121 GB of its memory are seen.
    Device("gb10", "sm_121", 48, 99 * KB, 100 * KB, 1536, 24 * MB, 4_266_000, 100.0, 246.0, memory_bytes=121 * GB),
)
