"""docs/api.md, of the public names and their docstrings: `python docs/api.py` writes it; the site puts signatures and docstrings in."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import ModuleType

PAGE = Path(__file__).with_name("api.md")
# Namespace -> what it is for; the first one is `import vidrial as vd`.
NAMESPACES = {
    "vidrial": "describing kernels and ops, calling them, errors",
    "vidrial.layout": "CuTe's objects as values ([device_api.md](device_api.md) has their device side)",
    "vidrial.tune": "sweeps and rankings ([sweeping.md](sweeping.md))",
    "vidrial.testing": "kernels on the CPU ([host_target.md](host_target.md))",
    "vidrial.traced": "ops inside JAX's transformations ([jax.md](jax.md))",
    "vidrial.flops": "FLOPs and sizes of a model's weights and state ([context_and_flops.md](context_and_flops.md))",
    "vidrial.icl": "what context is worth to a model ([context_and_flops.md](context_and_flops.md))",
    "vidrial.kernels.flash_attention": "flash attention ([flash_attention.md](flash_attention.md))",
    "vidrial.kernels.power_retention": "power retention ([power_retention.md](power_retention.md))",
    "vidrial.kernels.power_retention.metamorphosis": "a trained model's attention swapped for it ([models.md](models.md))",
}
HEAD = """# Python API

Every public name with the first sentence of its docstring; the site (`make docs`) has signatures and docstrings behind it, and so has
`python -c "import vidrial; help(vidrial.Op)"`. A name that is not here is Vidrial's own affair and may change. (`python docs/api.py` writes this
page.)
"""


def public(module: ModuleType) -> dict[str, object]:
    """The public names of a module that are no modules themselves, in alphabetical order."""
    found = {name: getattr(module, name) for name in sorted(module.__all__, key=str.lower)}
    return {name: value for name, value in found.items() if not inspect.ismodule(value)}


def summary(value: object) -> str:
    """The first sentence of a docstring; of a plain value, itself."""
    if not callable(value):
        return f"a {type(value).__name__}" if len(repr(value)) > 60 else f"`{value!r}`"
    text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    return text.replace("|", "\\|")


def page() -> str:
    """The text of docs/api.md."""
    text = HEAD
    for name, purpose in NAMESPACES.items():
        names = public(importlib.import_module(name))
        rows = "".join(f"| `{n}` | {summary(value)} |\n" for n, value in names.items())
        text += f"\n## `{name}`: {purpose}\n\n| name | |\n|---|---|\n{rows}\n" + "".join(f"::: {name}.{n}\n" for n in names)
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
