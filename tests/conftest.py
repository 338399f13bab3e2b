from __future__ import annotations

from pathlib import Path

import pytest

from vidrial.device import Device
from vidrial.errors import ToolchainError

GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What lies in tests/gpu is marked `gpu`, and skipped where there is none."""
    on_gpu = [item for item in items if GPU_TESTS in item.path.parents]
    if not on_gpu:
        return
    skip = None
    try:
        Device.current()
    except ToolchainError:
        skip = pytest.mark.skip(reason="no GPU")
    for item in on_gpu:
        item.add_marker(pytest.mark.gpu)
        if skip:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the user's cache: the tests of one run share one of their own."""
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))
