"""What the programs here share: the cases, and what is recorded of a run."""

from __future__ import annotations

import datetime
import gzip
import importlib.metadata
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Required, TypedDict

from vidrial import Device, ToolchainError

RESULTS = Path(__file__).parent / "results"
DISTRIBUTION = "vidrial-dsl"
PACKAGES = ("cupy-cuda13x", "nvidia-cuda-nvrtc", "nvidia-cutlass", "numpy")


class Case(TypedDict, total=False):
    """Keywords of a problem of power retention: those of `vidrial.kernels.power_retention.op.example` that vary here."""

    t: Required[int]
    b: int
    h: int
    hq: int


def this_device() -> Device:
    """The GPU that is measured.

    Raises:
        SystemExit: there is none.
    """
    try:
        return Device.current(0)
    except ToolchainError as error:
        raise SystemExit(f"this needs a GPU: {error}") from None


def facts(device: Device, module: str) -> dict[str, Any]:
    """What is recorded of a run: GPU, driver, versions, command, date."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(query, capture_output=True, encoding="utf-8", errors="replace", timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    versions = {}
    for name in (DISTRIBUTION, *PACKAGES):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "source tree" if name == DISTRIBUTION else "not installed"
    return {
        "gpu": device.name,
        "device": device.key,
        "driver": driver,
        "versions": versions,
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned columns, the last one to the left."""
    lines = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join([*(c.rjust(w) for c, w in zip(line[:-1], widths, strict=False)), line[-1]]) for line in lines)


def write_json(path: Path, data: Any) -> Path:
    """Write a JSON file, its folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def copy_journal(journal: Path, device: Device, out: str | None) -> None:
    """Copy a sweep's journal, compressed, to the folder `out`, by device; nothing if that is None."""
    if out:
        folder = Path(out, device.key)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{journal.name}.gz").write_bytes(gzip.compress(journal.read_bytes()))


def copy_out(paths: Sequence[Path], out: str | None) -> None:
    """Copy files to the folder `out`, by device; nothing if that is None."""
    for path in paths if out else ():
        folder = Path(str(out), path.parent.name)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
