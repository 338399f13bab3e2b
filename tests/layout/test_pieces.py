"""Rings, epilogues, copies in pieces and attention's tiles: what is proved of them, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from vidrial.dtypes import DType
from vidrial.errors import LayoutError
from vidrial.layout.access import analyse
from vidrial.layout.algebra import Swizzle
from vidrial.layout.atoms import VECTOR, MMA_16x8x16, cp_async, ldmatrix
from vidrial.layout.attention import attention_tiles
from vidrial.layout.copies import TiledCopy
from vidrial.layout.epilogue import Epilogue
from vidrial.layout.mma import TiledMma
from vidrial.layout.smem import Pipeline, SmemLayout
from vidrial.layout.wgmma import WarpgroupMma

BF16, FLOAT = DType.bfloat16, DType.float32


def test_a_ring_step_by_step() -> None:
    ring = Pipeline(4, read=2, ahead=1)
    assert (ring.first, ring.pending, ring.cpp) == (2, 0, "vidrial::Ring<4, 2, 1>")
    # (item, handed out, refilled, landed, fetched)
    assert [dataclasses.astuple(step) for step in ring.steps(3)] == [(0, 0, 2, 1, 2), (1, 1, 3, 2, 3), (2, 2, 0, 3, 4)]
    assert (Pipeline(3).first, Pipeline(3).pending) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((1,), "a pipeline of 1 stages overlaps nothing; take at least 2"),
        ((2, 2), "2 stages, of which read=2 are read and ahead=0"),
        ((3, 1, 2), "more than read \\+ ahead stages"),
        ((4, 3), "accepted: read of 1 or 2"),
        ((4, 1, -1), "ahead=-1"),
    ],
)
def test_rings_that_cannot_work(arguments: tuple[int, ...], reason: str) -> None:
    with pytest.raises(LayoutError, match=reason):
        Pipeline(*arguments)


def test_a_ring_whose_steps_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof looks at the steps themselves."""
    for field, change in (("refilled", -1), ("landed", -1), ("handed_out", 1)):
        steps = Pipeline.steps

        def wrong(self: Pipeline, count: int, field: str = field, change: int = change, steps: object = steps) -> object:
            return [dataclasses.replace(s, **{field: (getattr(s, field) + change) % 4}) for s in steps(self, count)]  # type: ignore[operator]

        with monkeypatch.context() as m:
            m.setattr(Pipeline, "steps", wrong)
            with pytest.raises(LayoutError, match="step . refills buffer"):
                Pipeline(4, read=2, ahead=1)


MMAS = {
    "sync": TiledMma(MMA_16x8x16[BF16], (2, 2), (128, 64, 64)),
    "bands": TiledMma(MMA_16x8x16[BF16], (4, 1), (192, 64, 64), bands=True),
    "wgmma": WarpgroupMma(BF16, 2, (256, 64, 64), SmemLayout(BF16, 64, 64)),
}


@pytest.mark.parametrize("dtype", [BF16, DType.float16, FLOAT])
@pytest.mark.parametrize("mma", MMAS)
def test_epilogues(mma: str, dtype: DType) -> None:
    m, n, _ = MMAS[mma].tile
    tile = SmemLayout(dtype, m, n)
    epilogue = Epilogue(MMAS[mma], tile)
    assert epilogue.threads == MMAS[mma].threads and epilogue.cpp.startswith(
        "vidrial::Epilogue<cute::UniversalCopy<cute::uint128_t>, vidrial::"
    )
    # Each pair of elements once, where the tile has it.
    rows, columns = (x[..., ::2] for x in MMAS[mma].coordinates())
    assert np.array_equal(epilogue.addresses(), tile.offset(rows, columns) * dtype.bytes)
    assert np.array_equal(np.sort(epilogue.addresses().ravel()), np.arange(0, m * n * dtype.bytes, 2 * dtype.bytes))
    # Swizzled, 16-bit elements meet no bank twice on either side; whole sectors reach memory.
    findings = {f.name.split(".")[1]: f for f in analyse(epilogue, "C")}
    assert findings["take"].ways == 1 and findings["global"].sectors == findings["global"].best_sectors == 16
    assert findings["put"].ways == 1 if dtype.bytes == 2 else findings["put"].ways is not None
    flat = {f.name.split(".")[1]: f for f in analyse(Epilogue(MMAS[mma], SmemLayout(dtype, m, n, swizzle=None)), "C")}
    assert flat["put"].ways == (8 if dtype.bytes == 2 else 4) and flat["take"].ways == 1


def test_epilogues_that_do_not_fit() -> None:
    mma = MMAS["sync"]
    with pytest.raises(LayoutError, match="is 128 x 64 of 16 or 32-bit elements; got 64 x 64 bfloat16"):
        Epilogue(mma, SmemLayout(BF16, 64, 64))
    with pytest.raises(LayoutError, match="an epilogue stores by vector.2, vector.4, vector.8, vector.16, of whole elements; got vector.2"):
        Epilogue(mma, SmemLayout(FLOAT, 128, 64), VECTOR[2])
    with pytest.raises(LayoutError, match="got cp.async"):
        Epilogue(mma, SmemLayout(BF16, 128, 64), cp_async(16))
    # A swizzle that moves single elements, and a tile too wide for steps of whole swizzles.
    with pytest.raises(LayoutError, match="its 16 bytes are not aligned to 16"):
        Epilogue(mma, SmemLayout(BF16, 128, 64, swizzle=Swizzle(3, 0, 6)))
    with pytest.raises(LayoutError, match="128 threads do not store whole rows of it in steps of whole swizzles"):
        Epilogue(TiledMma(MMA_16x8x16[BF16], (2, 2), (128, 128, 64)), SmemLayout(FLOAT, 128, 128))


def test_copies_in_pieces() -> None:
    tile = SmemLayout(BF16, 32, 64)
    whole, pieces = TiledCopy(cp_async(16), tile, 128), TiledCopy(cp_async(4), tile, 128)
    assert (whole.vector, whole.steps) == (pieces.vector, pieces.steps) and np.array_equal(whole.addresses(), pieces.addresses())
    # Neighbouring threads' pieces lie 16 bytes apart: of 32 sectors' worth of a warp's bytes a request touches them all for a quarter.
    shared, memory = analyse(pieces)
    assert (shared.bytes, memory.bytes, memory.sectors, memory.best_sectors) == (4, 4, 16, 4)
    for atom, dtype in ((VECTOR[2], FLOAT), (VECTOR[4], BF16), (ldmatrix(4), BF16)):
        with pytest.raises(LayoutError, match="is made of cp.async"):
            TiledCopy(atom, SmemLayout(dtype, 32, 64), 128)


@pytest.mark.parametrize("mma", ["sync", "wgmma"])
def test_attention_tiles(mma: str) -> None:
    q, k, v = SmemLayout(BF16, 128, 64), SmemLayout(BF16, 32, 64, stages=3), SmemLayout(BF16, 32, 32, stages=3)
    tiles = attention_tiles(q, k, v, 4, mma=mma)
    assert (tiles.QK.tile, tiles.PV.tile) == ((128, 32, 64), (128, 32, 32))
    assert (tiles.rows_per_band, tiles.warps_per_band) == ((32, 1) if mma == "sync" else (128, 4))
    assert set(tiles.members) == {"Q", "K", "V", "QK", "PV", "CopyQ", "CopyK", "CopyV", "rows_per_band", "warps_per_band"}
    assert (tiles.CopyQ.tile, tiles.CopyK.tile, tiles.CopyV.tile) == (q, k, v)
    # float16 values become bfloat16 on their way to weights of bfloat16, by mma.sync only.
    half = [dataclasses.replace(tile, dtype=DType.float16) for tile in (q, k, v)]
    if mma == "sync":
        converted = attention_tiles(*half, 4)
        assert (converted.QK.atom, converted.PV.atom) == (MMA_16x8x16[DType.float16], MMA_16x8x16[BF16])
    else:
        with pytest.raises(LayoutError, match="wgmma takes values as they are stored, float16, and weights of the same type; got bfloat16"):
            attention_tiles(*half, 4, mma=mma)


def test_attention_tiles_that_do_not_fit() -> None:
    q, k, v = SmemLayout(BF16, 128, 64), SmemLayout(BF16, 32, 64), SmemLayout(BF16, 32, 64)
    with pytest.raises(LayoutError, match="k of keys x d, v of keys x e, of one dtype; got 128 x 64 bfloat16, 32 x 96"):
        attention_tiles(q, SmemLayout(BF16, 32, 96), v, 4)
    with pytest.raises(LayoutError, match="of one dtype"):
        attention_tiles(q, k, SmemLayout(DType.float16, 32, 64), 4)
    with pytest.raises(LayoutError, match="2 warps with mma='wgmma'; accepted: 'sync', or 'wgmma' of multiples of 4 warps"):
        attention_tiles(q, k, v, 2, mma="wgmma")
    with pytest.raises(LayoutError, match="4 warps with mma='wmma'"):
        attention_tiles(q, k, v, 4, mma="wmma")
