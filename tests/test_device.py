from __future__ import annotations

import dataclasses

import pytest

from vidrial.device import TABLE, Device, arch_name, table_arch
from vidrial.errors import ArgumentError, ToolchainError

ARCHS = {"sm_100": "b200", "sm_103": "b300", "sm_110": "thor", "sm_120": "rtx5090", "sm_121": "gb10"}


class FakeRuntime:
    """An RTX 6000 Ada, which is not in the table, or an H200, which is."""

    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self, name: bytes, attributes: dict[int, int]) -> None:
        self.name, self.attributes = name, attributes

    def getDevice(self) -> int:  # noqa: N802
        return 0

    def getDeviceProperties(self, index: int) -> dict[str, object]:  # noqa: N802
        if index:
            raise self.CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        return {"name": self.name, "totalGlobalMem": 48 << 30}

    def deviceGetAttribute(self, number: int, index: int) -> int:  # noqa: N802
        return self.attributes[number]


def attributes(device: Device, bus_bits: int) -> dict[int, int]:
    return {
        16: device.sms,
        97: device.smem_per_block,
        81: device.smem_per_sm,
        82: 65536,
        39: device.threads_per_sm,
        38: device.l2_bytes,
        36: device.memory_clock_khz,
        37: bus_bits,
        75: device.capability // 10,
        76: device.capability % 10,
    }


def test_memory_is_a_fact_of_a_device_and_no_part_of_its_key() -> None:
    assert all(23 << 30 <= device.memory_bytes < 288 << 30 for device in TABLE)
    h200 = Device.of("h200")
    assert dataclasses.replace(h200, memory_bytes=70 << 30).key == h200.key


def test_table_h200() -> None:
    device = Device.of("h200")
    assert (device.arch, device.sms, device.smem_per_block, device.smem_per_sm) == ("sm_90a", 132, 232448, 233472)
    assert (device.l2_bytes, device.tensor_tflops, device.bandwidth_gbs, device.capability) == (60 << 20, 781.0, 4300.0, 90)


@pytest.mark.parametrize(
    ("name", "found"), [("sm_90a", "h200"), ("sm_90", "h200"), ("sm_80", "a100"), ("H100", "h100"), ("sm_120", "rtx5090")]
)
def test_of(name: str, found: str) -> None:
    assert Device.of(name).name == found


@pytest.mark.parametrize("name", ["h300", "sm_70", "", "sm_80a", "sm_90f", "sm_100b", "sm_101a", "h200a"])
def test_unknown_device_lists_the_known(name: str) -> None:
    with pytest.raises(ArgumentError, match="h200.*rtx4090.*sm_80.*sm_121, from sm_100 on also with a or f behind it"):
        Device.of(name)


@pytest.mark.parametrize(
    ("name", "row", "arch"),
    [
        ("sm_87", "orin", "sm_87"),
        ("sm_103", "b300", "sm_103"),
        ("sm_110", "thor", "sm_110"),
        ("sm_121", "gb10", "sm_121"),
        *((f"{arch}{suffix}", row, f"{arch}{suffix}") for arch, row in ARCHS.items() for suffix in "af"),
        ("SM_100A", "b200", "sm_100a"),
        ("Thor", "thor", "sm_110"),
    ],
)
def test_every_architecture_and_its_suffixes(name: str, row: str, arch: str) -> None:
    """With a suffix it is the same GPU, compiled for with more features: its rankings are the GPU's."""
    device, plain = Device.of(name), Device.of(row)
    assert device == dataclasses.replace(plain, arch=arch)
    assert (device.key, device.capability) == (plain.key, plain.capability)
    assert device.capability == int(arch.strip("sm_af"))


def test_names_and_keys_are_unique_and_plausible() -> None:
    assert len({d.name for d in TABLE}) == len({d.key for d in TABLE}) == len(TABLE)
    for device in TABLE:
        assert 0 < device.smem_per_sm - device.smem_per_block <= 1024
        assert device.smem_per_block > 48 << 10 and device.threads_per_sm % 32 == 0
        assert arch_name(device.arch) == table_arch(device.arch) == device.arch != "sm_90"


@pytest.mark.parametrize("field", ["sms", "l2_bytes", "smem_per_sm", "memory_clock_khz"])
def test_key_tells_gpus_apart(field: str) -> None:
    device = Device.of("h200")
    assert dataclasses.replace(device, **{field: getattr(device, field) * 2}).key != device.key


def test_key_ignores_the_name_and_small_clock_differences() -> None:
    device = Device.of("h200")
    assert dataclasses.replace(device, name="NVIDIA H200", memory_clock_khz=3_210_000).key == device.key


def test_current_gpu_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    h200 = Device.of("h200")
    monkeypatch.setattr("cupy.cuda.runtime", FakeRuntime(b"NVIDIA H200", attributes(h200, 6144)))
    current = Device.current()
    assert dataclasses.replace(current, name="h200", memory_bytes=h200.memory_bytes) == h200 and current.memory_bytes == 48 << 30
    assert current.key == h200.key


def test_current_gpu_that_the_table_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    ada = dataclasses.replace(Device.of("rtx4090"), sms=142, memory_clock_khz=10_001_000)
    monkeypatch.setattr("cupy.cuda.runtime", FakeRuntime(b"NVIDIA RTX 6000 Ada Generation", attributes(ada, 384)))
    current = Device.current()
    assert (current.arch, current.sms) == ("sm_89", 142)
    assert current.bandwidth_gbs == pytest.approx(0.9 * 960, rel=1e-3)
    assert current.tensor_tflops == pytest.approx(290.0)


def test_no_such_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cupy.cuda.runtime", FakeRuntime(b"NVIDIA H200", {}))
    with pytest.raises(ToolchainError, match="GPU 3: cudaErrorInvalidDevice"):
        Device.current(3)
    monkeypatch.setattr(Device, "current", classmethod(lambda cls: (_ for _ in ()).throw(ToolchainError("none"))))
    assert Device.default() == Device.of("h200")
