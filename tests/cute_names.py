"""What CuTe calls the wgmma atoms that Vidrial renders itself."""

from __future__ import annotations

from vidrial.dtypes import DType
from vidrial.layout.atoms import MmaAtom

EXTENDED = "#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED\n"
TYPES = {DType.bfloat16: "F32BF16BF16", DType.float16: "F32F16F16"}


def cute_wgmma(atom: MmaAtom) -> str:
    """The C++ type of CuTe's own atom. Those of most N are found behind EXTENDED alone."""
    major = "cute::SM90::GMMA::Major::"
    b = "MN" if atom.name.endswith(".trans") else "K"
    return f"cute::SM90::GMMA::MMA_64x{atom.shape[1]}x16_{TYPES[atom.a]}_{'SS' if '.ss' in atom.name else 'RS'}<{major}K, {major}{b}>"
