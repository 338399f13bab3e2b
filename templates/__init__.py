"""Templates and headers of Vidrial's kernels."""

from pathlib import Path

TEMPLATES = Path(__file__).parent
