"""What the backward pass is asked, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from vidrial import dynamic
from vidrial.kernels.power_retention.problem import Chunked, Problem


@dataclass(frozen=True)
class Gradient(Problem):
    """The forward problem, with y [b, t, hq, e] and its normaliser [b, hq, t] float32, and dy, of y's shape and any strides -> dq, dk, dv of the
    shapes of q, k, v, dlog_g [b, t, h] float32, all contiguous.

    `initial`: a state lay before the first token, whose gradient is asked for; `final`: there is a gradient of the one behind the last token;
    `kept`: the snapshots of the forward pass are there, too.
    """

    dy_stride: tuple[int, int, int] = dynamic(keyed=False)

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.hq // self.h

    @property
    def forward(self) -> Problem:
        """What the forward pass was asked."""
        return Problem(**{field.name: getattr(self, field.name) for field in fields(Problem)})

    @property
    def dq_stride(self) -> tuple[int, int, int]:
        """Of a contiguous dq."""
        return self.t * self.hq * self.d, self.hq * self.d, self.d

    @property
    def dk_stride(self) -> tuple[int, int, int]:
        """Of a contiguous dk."""
        return self.t * self.h * self.d, self.h * self.d, self.d

    @property
    def dv_stride(self) -> tuple[int, int, int]:
        """Of a contiguous dv."""
        return self.t * self.h * self.e, self.h * self.e, self.e


@dataclass(frozen=True)
class ChunkedGradient(Gradient, Chunked):
    """The problem once the op's config has cut its sequence: what the stages are asked.

    `leaves`: the state behind the last token has a gradient.
    """

    @property
    def adjoints(self) -> int:
        """Chunks behind which the state has an adjoint."""
        return max(0, self.chunks - (not self.leaves))

    @property
    def padded(self) -> int:
        """Tokens of a row of the tables: whole chunks."""
        return self.chunks * self.chunk
