"""Flash attention as an op: which path makes it, and what is right.

`path`: "sm80" is the kernel of every card (mma.sync, cp.async), "sm90" that of Hopper (TMA, wgmma); the device's rules say which may be taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from vidrial import Buffer, Check, DType, Op, Stage, choice, part
from vidrial.kernels.arrays import normal, strides
from vidrial.kernels.flash_attention import combine, sm80, sm90
from vidrial.kernels.flash_attention.problem import UNLIMITED, Problem, heads_refusal, refusal
from vidrial.kernels.flash_attention.reference import attention

# y relative to the norm, and of the worst element to sum_j weight |v_j|. Rounding a weight, and rounding the result, each change an element
# by half an ulp at most, 2^-8 in bf16 and 2^-11 in fp16; the norm by some 0.43 of that, each, independently.
Y_BOUNDS = {DType.bfloat16: (3e-3, 2.0**-7), DType.float16: (4e-4, 2.0**-10)}
# What float32 scores may add to the worst element, per unit of the largest |q| |k| scale of its row, and to lse.
SCORE_BOUND = 2.0**-20
LSE_BOUND = 2e-6


@dataclass(frozen=True)
class Config:
    """By which `path`; how each of them does it."""

    path: str = choice("sm80", "sm90")
    sm80: sm80.Config = part(sm80.Config)
    sm90: sm90.Config = part(sm90.Config)


def stages(p: Problem, c: Config) -> list[Stage]:
    if c.path == "sm90":
        return [Stage(sm90.flash_sm90, p, c.sm90, "sm90")]
    joined = combine.Config(splits=c.sm80.splits)
    return [Stage(sm80.flash_sm80, p, c.sm80, "sm80"), *([Stage(combine.flash_combine, p, joined, "sm80")] if joined.splits > 1 else [])]


def inputs(p: Problem) -> dict[str, Buffer]:
    """Rows are read by vectors or by TMA."""
    shapes = {"q": (p.b, p.tq, p.hq, p.d), "k": (p.b, p.tk, p.h, p.d), "v": (p.b, p.tk, p.h, p.e)}
    return {name: Buffer(shape, p.dtype, (*getattr(p, f"{name}_stride"), 1)) for name, shape in shapes.items()}


def rules(p: Problem, c: Config) -> Iterator[tuple[bool, str]]:
    # Asked of every config: a reason is written when it is needed.
    if (refused := refusal(p)) is not None:
        yield False, str(refused)


def outputs(p: Problem) -> dict[str, Buffer]:
    return {"y": Buffer((p.b, p.tq, p.hq, p.e), p.dtype), "lse": Buffer((p.b, p.hq, p.tq), DType.float32)}


def workspace(p: Problem, c: Config) -> dict[str, Buffer]:
    return sm90.workspace(p, c.sm90) if c.path == "sm90" else combine.workspace(p, c.sm80.splits)


def example(
    *,
    t: int,
    tq: int | None = None,
    b: int = 1,
    h: int = 16,
    hq: int | None = None,
    d: int = 128,
    e: int | None = None,
    causal: bool = False,
    left: int | None = None,
    right: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dtype: str = "bfloat16",
) -> Problem:
    """A problem with contiguous arrays: `t` keys, `tq` queries (as many), `h` heads of keys, `hq` of queries; `left` and `right` limit the window.

    Raises:
        VidrialError: so many heads of queries and of keys do not go together.
    """
    tq, hq, e = t if tq is None else tq, h if hq is None else hq, d if e is None else e
    if (refused := heads_refusal(hq, h)) is not None:
        raise refused
    causal = causal or right == 0
    left, right = UNLIMITED if left is None else left, UNLIMITED if causal or right is None else right
    return Problem(
        dtype=DType.of(dtype),
        d=d,
        e=e,
        causal=causal,
        windowed=max(left, right) >= 0,
        capped=softcap is not None,
        group=hq // h,
        b=b,
        tq=tq,
        tk=t,
        h=h,
        left=left,
        right=right,
        scale=max(d, 1) ** -0.5 if scale is None else scale,
        softcap=0.0 if softcap is None else softcap,
        q_stride=strides(tq, hq, d),
        k_stride=strides(t, h, d),
        v_stride=strides(t, h, e),
        y_stride=strides(tq, hq, e),
    )


def small(p: Problem) -> Problem:
    """The same op at an odd length past a few blocks, few heads: quick to check."""
    tk = min(p.tk, 1021)
    tq = tk if p.tq == p.tk else min(p.tq, 517)
    h = min(p.h, 2)
    base = example(t=tk, tq=tq, h=h, hq=h * p.group, d=p.d, e=p.e, scale=p.scale, dtype=p.dtype.name)
    return replace(
        base,
        causal=p.causal,
        windowed=p.windowed,
        capped=p.capped,
        left=min(p.left, 300),
        right=min(p.right, 300),
        softcap=p.softcap,
    )


def sample(p: Problem, seed: int) -> dict[str, np.ndarray]:
    """Normal q, k and v."""
    rng = np.random.default_rng(seed)
    shapes = {"q": (p.b, p.tq, p.hq, p.d), "k": (p.b, p.tk, p.h, p.d), "v": (p.b, p.tk, p.h, p.e)}
    return {name: normal(rng, shape, p.dtype) for name, shape in shapes.items()}


def reference(p: Problem, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    q, k, v = (p.dtype.widen(inputs[n]) for n in "qkv")
    softcap = p.softcap if p.capped else None
    return attention(q, k, v, causal=p.causal, window=(p.left, p.right), scale=p.scale, softcap=softcap)._asdict()


def check(p: Problem, inputs: Mapping[str, np.ndarray], results: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> Check:
    """Of y and of lse: the norm alone would not see a wrong element, elements alone not many small errors. Reported is what uses most of its
    bound."""
    y, lse, reach = p.dtype.widen(results["y"]), results["lse"].astype(np.float64), expected["reach"]
    relative_bound, worst_bound = Y_BOUNDS[p.dtype]
    empty = expected["lse"] == -np.inf
    lse_error = np.where(empty, np.where(lse == -np.inf, 0.0, np.inf), np.abs(lse - np.where(empty, 0.0, expected["lse"])))
    y_error, score_error = np.abs(y - expected["y"]), 1.0 + reach * (SCORE_BOUND / worst_bound)
    # A row without keys is exactly 0: there nothing may be wrong.
    spread = np.maximum(expected["spread"] * score_error.transpose(0, 2, 1)[..., None], 1e-30)
    known = np.where(empty, 0.0, expected["lse"])
    norms = [
        (_norm(y_error) / max(_norm(expected["y"]), 1e-30), relative_bound),
        (_norm(lse_error) / max(_norm(known), float(np.sqrt(known.size)), 1.0), LSE_BOUND),
    ]
    elements = [((y_error / spread).max(initial=0.0), worst_bound), ((lse_error / (1.0 + reach)).max(initial=0.0), LSE_BOUND)]
    (relative, bound), (worst, element_bound) = (max(found, key=_share) for found in (norms, elements))
    return Check(float(relative), float(worst), bound, element_bound)


def _norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x))


def _share(found: tuple[float, float]) -> float:
    """Which part of its bound an error is; NaN is more than any."""
    error, bound = found
    return float("inf") if np.isnan(error) else error / bound


op = Op(
    name="flash_attention",
    kernels=(sm80.flash_sm80, combine.flash_combine, sm90.flash_sm90),
    problem=Problem,
    config=Config,
    stages=stages,
    inputs=inputs,
    outputs=outputs,
    workspace=workspace,
    sample=sample,
    reference=reference,
    check=check,
    small=small,
    rules=rules,
    example=example,
)
