"""The pages whose Python needs a GPU, run to their ends on one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import PAGES, ROOT, needs_gpu, python_blocks, run_page

from vidrial.tune.pick import freeze
from vidrial.tune.ranking import forget


@pytest.fixture(autouse=True)
def _of_the_page_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A page freezes compiling, and ranks configs: no test behind it in this process may find that."""
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "cache"))
    yield
    freeze(False)
    forget()


@pytest.mark.parametrize("page", [p for p in PAGES if needs_gpu(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_python_runs_on_a_gpu(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert run_page(page, gpu=True) == sum(block.mark != "prints" for block in python_blocks(page))
