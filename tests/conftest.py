from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

# Before NumPy and torch are imported, here and in children: there is a process of tests per core already, and idle threads of BLAS spin.
if "PYTEST_XDIST_WORKER" in os.environ:
    for threads in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(threads, "1")

import pytest
from durations import function_of, read_slow

from vidrial.device import Device
from vidrial.errors import ToolchainError

ROOT = Path(__file__).parents[1]
GPU_TESTS, HOST_TESTS = ROOT / "tests/gpu", ROOT / "tests/host"
SLOW = read_slow()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What tests/slow.txt names is marked `slow`, what lies in tests/host `host`; what lies in tests/gpu `gpu`, and skipped where there is none."""
    for item in items:
        if function_of(f"{item.path.relative_to(ROOT)}::{item.nodeid.partition('::')[2]}") in SLOW:
            item.add_marker(pytest.mark.slow)
        if HOST_TESTS in item.path.parents:
            item.add_marker(pytest.mark.host)
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


def pytest_collection_finish() -> None:
    """What the test files made at import stays: the garbage collector need not go through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the user's cache: the tests of one run, in all its processes, share one of their own."""
    base = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"))


@pytest.fixture
def own_tempdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that this process and its children take for the machine's temp folder."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder
