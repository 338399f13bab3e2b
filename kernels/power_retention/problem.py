"""What power retention is asked: the one Problem, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass

from vidrial import DType, dynamic, static


@dataclass(frozen=True)
class Problem:
    """q [b, t, hq, d], k [b, t, h, d], v [b, t, h, e], log_g [b, t, h] -> y [b, t, hq, e]; strides in elements, of all but the last axis.

    `initial`: a state lies before the first token; `final`: the one behind the last token is asked for; `kept`: tokens of
    a chunk whose states are given out for the backward pass, which reads them then in place of its own, or 0. What ranks configs without states ranks
    them with states, too.
    """

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
    initial: bool = dynamic(keyed=False, default=False)
    final: bool = dynamic(keyed=False, default=False)
    kept: int = dynamic(keyed=False, default=0)

    @property
    def weight_scale(self) -> float:
        """Factor of a weight: (scale q . k)^degree = weight_scale (q . k)^degree."""
        return self.scale**self.degree

    @property
    def pair_tiles(self) -> int:
        """8 x 8 tiles of the symmetric square of d features: one per pair of blocks I <= J."""
        return self.d // 8 * (self.d // 8 + 1) // 2

    @property
    def keeps_z(self) -> bool:
        """Whether Z is part of the state: for the normaliser, or for who reads the state later."""
        return self.normalized or self.initial or self.final

    @property
    def snapshot(self) -> int:
        """Elements of one head's state: Z [d, d] if it is kept, then 64 rows of e per pair tile."""
        return (self.d * self.d if self.keeps_z else 0) + self.pair_tiles * 64 * self.e

    @property
    def state_shapes(self) -> dict[str, tuple[int, int, int, int]]:
        """Of S and Z, as `PowerState` has them."""
        return {"s": (self.b, self.h, 64 * self.pair_tiles, self.e), "z": (self.b, self.h, self.d, self.d)}


@dataclass(frozen=True)
class Chunked(Problem):
    """The problem once the op's config has cut its sequence: what the stages are asked.

    `chunk` tokens share a state; `stateful`: a state may come before a chunk, so that there is more than one, or a state `enters` before the
    first one or `leaves` behind the last one.
    """

    stateful: bool = static()
    enters: bool = static()
    leaves: bool = static()
    chunk: int = dynamic()

    @property
    def chunks(self) -> int:
        """Chunks of a sequence, the last one perhaps shorter."""
        return -(-self.t // self.chunk)

    @property
    def keeps_z(self) -> bool:
        """The same as known before the launch."""
        return self.normalized or self.enters or self.leaves
