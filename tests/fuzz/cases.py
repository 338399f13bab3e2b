"""One problem of the fuzzer, a line of Python; how they are drawn, and how one that fails becomes smaller."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .families import FAMILIES, Family
from .spoiled import WRONG

LENGTHS = (0, 1, 2, 7, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 255, 256, 257, 300, 390)
LONG = (511, 513, 600, 1025)
# How an array lies in memory. The first ones any library has, the others NumPy alone.
LAYOUTS = ("contiguous", "strided", "padded", "aligned rows", "offset", "transposed", "last axis first", "expanded")
NUMPY_LAYOUTS = ("negative", "swapped", "read-only", "packed", "subclass")
GATES = ("", "memory", "short", "zero", "closed", "minus infinity", "positive", "nan", "mixed")
VALUES = ("normal", "normal", "normal", "integers", "large", "zeros")
PLANTED = (np.nan, np.inf, -np.inf)
Items = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Case:
    """A call. `target` cuda: CPU arrays that NumPy serves; host: the kernels on the CPU, with the configs of `family`.

    t: tokens, or keys; tq: queries of flash attention. options: keywords of the call. layouts: argument -> how it lies ("fused": q, k and v are
    views of one projection). planted: (argument, batch, token, head, value). gradient: "vjp", "autograd" or none. split: tokens that come before the
    call, in its initial state; final: the final state is asked for. wrong: what is spoiled, so that the call must be refused.
    """

    op: str
    seed: int
    target: str = "cuda"
    family: str = ""
    library: str = "numpy"
    dtype: str = "float32"
    b: int = 1
    t: int = 65
    tq: int = 65
    h: int = 1
    group: int = 1
    d: int = 32
    e: int = 32
    gates: str = ""
    values: str = "normal"
    options: Items = ()
    layouts: Items = ()
    planted: tuple[Any, ...] = ()
    gradient: str = ""
    split: int = 0
    final: bool = False
    wrong: str = ""

    def __repr__(self) -> str:
        said = [
            (f.name, getattr(self, f.name))
            for f in dataclasses.fields(self)
            if f.default is dataclasses.MISSING or getattr(self, f.name) != f.default
        ]
        # So that the line is Python where `nan` and `inf` are imported.
        return f"Case({', '.join(f'{name}={value!r}' for name, value in said)})"

    @property
    def keywords(self) -> dict[str, Any]:
        return dict(self.options)

    @property
    def names(self) -> tuple[str, ...]:
        """The arguments that are arrays."""
        if self.op == "power_retention":
            return ("q", "k", "v", "log_g") if self.gates else ("q", "k", "v")
        return {"flash_attention": ("q", "k", "v"), "gemm": ("a", "b", "bias")}.get(self.op, ("x",))


class Dice:
    """What is drawn, by one seed."""

    def __init__(self, seed: int, target: str) -> None:
        self.rng = np.random.default_rng([seed, len(target)])

    def of(self, choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)


def draw(seed: int, target: str = "cuda", family: str | None = None) -> Case:
    """The problem of that seed: one that NumPy serves, or, `target` host, of a family."""
    dice = Dice(seed, target)
    if target == "host":
        name = family or dice.of(sorted(FAMILIES))
        return _finish(dice, _of_family(dice, name, FAMILIES[name], seed))
    shape = {"b": dice.of((1, 1, 1, 2, 3, 0)), "h": dice.of((1, 1, 2, 3)), "group": dice.of((1, 1, 2, 3, 5)), "t": dice.of(LENGTHS)}
    if shape["b"] <= 1 and dice.chance(0.15):
        shape |= {"t": dice.of(LONG), "group": 1}
    library = dice.of(("numpy", "numpy", "torch"))
    dtype = dice.of(("float32", "float32", "float16", "bfloat16" if library == "torch" else "float16"))
    case = Case(dice.of(("power_retention", "power_retention", "flash_attention")), seed, library=library, dtype=dtype, **shape)
    return _finish(dice, _power(dice, case) if case.op == "power_retention" else _flash(dice, case))


def _power(dice: Dice, case: Case) -> Case:
    d, e = dice.of(((32, 32), (32, 64), (64, 32), (64, 64), (128, 32)))
    options: dict[str, Any] = {}
    if dice.chance(0.25):
        options["degree"] = dice.of((2, 4))
    if dice.chance(0.3):
        options["normalize"] = dice.of(("none", "sum"))
    if dice.chance(0.4):
        options["scale"] = dice.of((0.5, -0.3, 1, 1e-3, 1e-10, 0.0, 20.0, 3e4, np.float32(0.25)))
    if dice.chance(0.5):
        options["chunk"] = dice.of((None, 0, 128, 256, 1024)) if options.get("degree") != 4 else dice.of((None, 0))
    case = replace(case, d=d, e=e, gates=dice.of(GATES), options=tuple(options.items()))
    if dice.chance(0.35):
        gradient = "autograd" if case.library == "torch" and dice.chance(0.6) else "vjp"
        case = replace(case, gradient=gradient, t=min(case.t, 300), group=min(case.group, 2), h=min(case.h, 2), d=min(d, 64))
    if options.get("degree") != 4 and dice.chance(0.2):
        case = replace(case, split=min(dice.of((0, 1, 64, 130)), case.t), final=dice.chance(0.7))
    return case


def _flash(dice: Dice, case: Case) -> Case:
    d, e = dice.of(((32, 32), (64, 32), (32, 96), (96, 96), (128, 64), (192, 128)))
    options: dict[str, Any] = {"causal": True} if dice.chance(0.5) else {}
    if dice.chance(0.3):
        options["window"] = dice.of(((5, 0), (0, 0), (40, 17), (None, 3), (100, None), (None, None), (10**12, 2.0)))
    if dice.chance(0.3):
        options["softcap"] = dice.of((1.0, 20.0, 1e-9, 50))
    if dice.chance(0.3):
        options["scale"] = dice.of((1.0, 0.3, 1e-3, 1e-9, 3))
    if dice.chance(0.6):
        options["return_lse"] = True
    tq = case.t if dice.chance(0.4) else dice.of(LENGTHS)
    return replace(case, d=d, e=e, tq=tq, options=tuple(options.items()))


def _of_family(dice: Dice, name: str, family: Family, seed: int) -> Case:
    # NumPy has no bfloat16 of its own.
    library = "torch" if family.dtype == "bfloat16" or dice.chance(0.4) else "numpy"
    shape = {"b": dice.of((1, 1, 2)), "h": dice.of((1, 1, 2)), "group": family.group or dice.of((1, 2, 3)), "t": dice.of(family.lengths)}
    case = Case(family.op, seed, "host", name, library, family.dtype, **shape, d=family.d, e=family.e, options=family.options)
    if family.op == "power_retention":
        scale = (("scale", dice.of((0.5, -0.3, 1e-3, 0.0, 3e4))),) if dice.chance(0.3) else ()
        gates = dice.of(GATES[1:]) if family.gated else ""
        case = replace(case, gates=gates, options=(*case.options, *scale))
        return replace(case, gradient="autograd" if library == "torch" and dice.chance(0.5) else "vjp") if family.backward else case
    if family.op == "flash_attention":
        tq = case.t if dice.chance(0.5) else dice.of(family.lengths)
        drawn = {"window": ((5, 3), (0, 40), (70, None), (33, 0)), "softcap": (1.0, 20.0)}
        options = {key: dice.of(drawn.get(key, (value,))) for key, value in family.options}
        if options.get("window") == (33, 0):
            options["window"] = (33, 1)  # a side of 0 is the causal mask, which is another family
        return replace(case, tq=tq, options=(*options.items(), *((("return_lse", True),) if dice.chance(0.7) else ())))
    return replace(case, tq=dice.of(family.lengths), d=dice.of((8, 33, 200)))


def _finish(dice: Dice, case: Case) -> Case:
    """How the arguments lie, what is in them, and perhaps what is wrong."""
    layouts = (*LAYOUTS, *NUMPY_LAYOUTS) if case.library == "numpy" else LAYOUTS
    fused = case.names[:3] == ("q", "k", "v") and case.t == (case.t if case.op == "power_retention" else case.tq) and dice.chance(0.15)
    lie: dict[str, str] = {}
    for name in case.names:
        if fused and name in "qkv":
            lie[name] = "fused"
        elif dice.chance(0.5):
            lie[name] = dice.of(layouts)
    if case.gradient == "vjp" and dice.chance(0.5):
        lie["dy"] = dice.of(LAYOUTS)
    case = replace(case, values=dice.of(VALUES), layouts=tuple((n, x) for n, x in lie.items() if x != "contiguous"))
    if dice.chance(0.12):
        return replace(case, wrong=dice.of(sorted(kind for kind, it in WRONG.items() if it.applies(case))))
    tokens = {"q": case.tq if case.op == "flash_attention" else case.t, "x": case.tq}
    if min(case.b, case.t, case.tq) > 0 and not case.split and not case.final and dice.chance(0.25):
        name = dice.of([n for n in case.names if n in ("q", "k", "v", "x", "a")])
        token = int(dice.rng.integers(tokens.get(name, case.t)))
        head = int(dice.rng.integers(case.h * (case.group if name == "q" else 1)))
        case = replace(case, planted=((name, int(dice.rng.integers(case.b)), token, head, dice.of(PLANTED)),))
    return case


def smaller(case: Case) -> Iterator[Case]:
    """Cases with less in them, the boldest first."""
    for name, value in (("gradient", ""), ("planted", ()), ("final", False), ("split", 0), ("layouts", ()), ("options", ())):
        if getattr(case, name) != value and not (case.target == "host" and name == "options"):
            yield replace(case, **{name: value})
    for items in ("options", "layouts"):
        for item in getattr(case, items):
            if case.target != "host" or items == "layouts" or item not in FAMILIES[case.family].options:
                yield replace(case, **{items: tuple(x for x in getattr(case, items) if x != item)})
    least = min(FAMILIES[case.family].lengths, default=0) if case.family else 0
    for name, low in (("b", 1), ("h", 1), ("group", 1), ("t", max(least, 1)), ("tq", 1), ("d", 32), ("e", 32)):
        now = getattr(case, name)
        fixed = case.target == "host" and (name in ("d", "e") or (name == "group" and FAMILIES[case.family].group))
        for value in dict.fromkeys((low, now // 2, now - 1)):
            if low <= value < now and not fixed and (name not in ("d", "e") or value == low) and _keeps_planted(case, name, value):
                yield replace(case, **{name: value})
    for name, value in (("values", "normal"), ("gates", "memory" if case.gates else ""), ("library", "numpy"), ("dtype", "float32")):
        if getattr(case, name) != value and not (case.target == "host" and name in ("dtype", "library")):
            yield replace(case, **{name: value})


def _keeps_planted(case: Case, name: str, value: int) -> bool:
    """Whether what is planted still lies within a dimension of that size, and the tokens of an initial state do."""
    of_query = [n == "q" for n, *_ in case.planted]
    for (_, b, token, head, _), query in zip(case.planted, of_query, strict=True):
        heads = (value if name == "h" else case.h) * ((value if name == "group" else case.group) if query else 1)
        if (name == "b" and b >= value) or (name in ("t", "tq") and token >= value) or head >= heads:
            return False
    return not (name == "t" and value < case.split)
