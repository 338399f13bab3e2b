"""The pictures of docs/device_api.md, as `vidrial draw` draws them: `python docs/tiles.py` writes docs/pictures/*.svg."""

from __future__ import annotations

from pathlib import Path

import vidrial as vd
from vidrial.layout import Epilogue, MMA_16x8x16, Pipeline, SmemLayout, TiledCopy, TiledMma, WarpgroupMma, cp_async, draw

PICTURES = Path(__file__).parent / "pictures"


def pictures() -> dict[str, str]:
    """Name of the file, without .svg -> its text."""
    dtype = vd.DType.bfloat16
    tile = SmemLayout(dtype, 16, 64, stages=2)
    copy = TiledCopy(cp_async(16, zero_fill=True), tile, threads=64)
    mma = TiledMma(MMA_16x8x16[dtype], (2, 1), (32, 16, 16), a=SmemLayout(dtype, 32, 16), b=SmemLayout(dtype, 16, 16))
    wgmma = WarpgroupMma(dtype, 1, (64, 16, 32), b=SmemLayout(dtype, 32, 16).transposed)
    return {
        "smem_layout": draw(tile),
        "tiled_copy": draw(copy),
        **{f"tiled_mma_{part}": draw(mma, part) for part in ("A", "B", "C")},
        "warpgroup_mma_B": draw(wgmma, "B"),
        "warpgroup_mma_C": draw(wgmma, "C"),
        "epilogue": draw(Epilogue(mma, SmemLayout(dtype, 32, 16))),
        "ring": draw(Pipeline(4, read=2)),
    }


def write(folder: Path = PICTURES) -> None:
    """Write all pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pictures().items():
        (folder / f"{name}.svg").write_text(text)


if __name__ == "__main__":
    write()
