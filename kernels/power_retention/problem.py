"""What power retention is asked: the one Problem, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass

from vidrial import DType, dynamic, static


@dataclass(frozen=True)
class Problem:
    """q [b, t, hq, d], k [b, t, h, d], v [b, t, h, e], log_g [b, t, h] -> y [b, t, hq, e]; strides in elements, of all but the last axis."""

    dtype: DType = static()
    d: int = static()
    e: int = static()
    degree: int = static()
    gated: bool = static()
    normalized: bool = static()
    b: int = dynamic()
    t: int = dynamic()
    hq: int = dynamic()
    h: int = dynamic()
    scale: float = dynamic(keyed=False)
    q_stride: tuple[int, int, int] = dynamic(keyed=False)
    k_stride: tuple[int, int, int] = dynamic(keyed=False)
    v_stride: tuple[int, int, int] = dynamic(keyed=False)
    y_stride: tuple[int, int, int] = dynamic(keyed=False)
    log_g_stride: tuple[int, int, int] = dynamic(keyed=False)

    @property
    def weight_scale(self) -> float:
        """Factor of a weight: (scale q . k)^degree = weight_scale (q . k)^degree."""
        return self.scale**self.degree

    @property
    def pair_tiles(self) -> int:
        """8 x 8 tiles of the symmetric square of d features: one per pair of blocks I <= J."""
        return self.d // 8 * (self.d // 8 + 1) // 2

    @property
    def snapshot(self) -> int:
        """Elements of one head's state: Z [d, d] if there is a normaliser, then 64 rows of e per pair tile."""
        return (self.d * self.d if self.normalized else 0) + self.pair_tiles * 64 * self.e


@dataclass(frozen=True)
class Chunked(Problem):
    """The problem once the op's config has cut its sequence: what the stages are asked.

    `chunk` tokens share a state; `stateful`: a state may come before a chunk, so that there is more than one.
    """

    stateful: bool = static()
    chunk: int = dynamic()

    @property
    def chunks(self) -> int:
        """Chunks of a sequence, the last one perhaps shorter."""
        return -(-self.t // self.chunk)
