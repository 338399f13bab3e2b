"""What a sequence leaves behind: the state of power retention, degree 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from vidrial import ArgumentError, pytree

A = TypeVar("A")  # an array of torch, CuPy, JAX or NumPy


def state_rows(d: int) -> int:
    """Rows of S: products of pairs of d features, in blocks of 8."""
    return d * (d + 8) // 2


@pytree("S", "Z")
@dataclass(frozen=True)
class PowerState(Generic[A]):
    """The state after a sequence, and what one may begin with: S = sum_j decay_j phi(k_j) v_j^T and Z = sum_j decay_j k_j k_j^T.

    Args:
        S: [N, H, P, E], P = D (D + 8) / 2: a row for each product k_a k_b of features a in block I and b in block J of 8 features, I <= J; pairs
            of blocks lexicographic, within one a runs slower than b. Raw products: that those of I < J count twice in (q . k)^2 is left
            to the reader. Where I = J both of k_a k_b and k_b k_a have a row.
        Z: [N, H, D, D], from which the normaliser is scale^2 q^T Z q.
        degree: 2.

    The scale is not part of it: a state may be read with another one. A sequence of which no token was seen has the state 0. To torch and JAX it is a
    tree of two arrays: what they compile, map, scan and export takes and gives it.

    Raises:
        ArgumentError: the degree is another one, or the shapes do not belong together.
    """

    S: A
    Z: A
    degree: int = 2

    def __post_init__(self) -> None:
        if self.degree != 2:
            raise ArgumentError(f"a state of degree {self.degree}: only that of degree 2 is small enough; accepted: 2")
        s, z = (tuple(getattr(x, "shape", ())) for x in (self.S, self.Z))
        if len(s) != 4 or len(z) != 4 or z[2] != z[3] or s[:2] != z[:2] or s[2] != state_rows(z[2]):
            raise ArgumentError(f"S has shape {list(s)} and Z {list(z)}; accepted: [N, H, D (D + 8) / 2, E] and [N, H, D, D]")

    @property
    def d(self) -> int:
        """Features of a key."""
        z: Any = self.Z
        return int(z.shape[-1])


def named(name: str, state: PowerState[A] | None) -> dict[str, A]:
    """A state's arrays by the names that the op has for them, none where there is no state."""
    return {} if state is None else {f"{name}_s": state.S, f"{name}_z": state.Z}
