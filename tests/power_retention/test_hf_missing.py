"""What needs transformers says so where it is not installed."""

from __future__ import annotations

import importlib
import sys

import pytest

from vidrial.errors import ToolchainError


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "vidrial.kernels.power_retention.hf", raising=False)
    with pytest.raises(ToolchainError, match=r"transformers cannot be imported .*pip install 'vidrial-dsl\[hf\]'"):
        importlib.import_module("vidrial.kernels.power_retention.hf")
