"""Power retention as an op: gates, scan, carry and attend in sequence, and the chunk that they share.

With `chunk` 0 the whole sequence is one chunk: the attention form, no state. Otherwise chunks of that many tokens carry a state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

import numpy as np

from vidrial import ArgumentError, ArgumentTypeError, Buffer, Check, DType, Op, Stage, UnsupportedError, VidrialError, choice, part
from vidrial.kernels.arrays import normal, strides
from vidrial.kernels.power_retention import attend, gates, scan, scan_wgmma
from vidrial.kernels.power_retention.problem import Chunked, Problem
from vidrial.kernels.power_retention.reference import attention_form, final_state

# Tokens that may share a state, 0 for none; the first one is the default.
CHUNKS = (1024, 0, 128, 256, 512, 2048, 4096)
# What is served, of calls and of problems alike.
DTYPES, DIMS, DEGREES, NORMALIZE = (DType.bfloat16, DType.float16), (32, 64, 128), (2, 4), ("sum", "none")
MAX_ELEMENTS = 2**31
MAX_HEADS = 65535  # batch times heads: a dimension of the grid
MAX_FACTOR = 1e18  # of scale^degree: times a sum of weights it is a float32
# Rows of tables are padded to this many tokens when the sequence is one chunk: every tile's rows divide it.
PADDING = 512
# Tokens over which the gates of a sample add up to some e^-30.
MEMORY = 1000
# Relative to the norm, and of the worst element weighted by its conditioning, for outputs rounded to 16 bits:
# rounding the exact result to bf16 alone costs 1.7e-3 of the norm, the state form 2.8e-3.
RELATIVE_BOUND, WORST_BOUND = 5e-3, 2e-3
# Of a final state, relative to its norm: it is summed of products of bf16, 2.3e-3; of float16 each factor is rounded to bf16 before, 3.8e-3.
STATE_BOUND = {DType.bfloat16: 3.5e-3, DType.float16: 5.5e-3}
# Tokens that make the state which a sample begins with.
STATE_TOKENS = 40
SMALLEST = {DType.float16: 2.0**-24, DType.bfloat16: 2.0**-126, DType.float32: 2.0**-126}


@dataclass(frozen=True)
class Config:
    """`chunk` tokens share a state, 0 for none; how the state is scanned; how the output is made."""

    chunk: int = choice(*CHUNKS)
    scan: scan.Config = part(scan.Config)
    attend: attend.Config = part(attend.Config)


# By the instruction that a config names.
SCANS = {"sync": scan.power_scan, "wgmma": scan_wgmma.power_scan_wgmma}

# Tokens of a chunk whose states a forward pass keeps for the backward pass, by whether D E is more than 64 x 64.
KEPT_CHUNKS = {False: 1024, True: 2048}
# From how many chunks on they are kept unasked, if they take no more memory than q, k, v and y, and at most 1 / KEPT_SHARE of the GPU's.
KEPT_FROM, KEPT_SHARE = 8, 64


def kept_chunk(p: Problem, chunk: int | None, recompute: bool | None, memory: int) -> int:
    """Tokens of a chunk whose states a forward pass shall keep; 0: none, the backward pass scans again. It depends on no pick and on nothing free.

    `chunk`: what the caller asks for; `memory`: bytes of all of the GPU's, 0 if not known.
    """
    size = KEPT_CHUNKS[p.d * p.e > 64 * 64] if chunk is None else chunk
    # NOTE: without a normaliser Z is part of a final state's scan alone, and its backward pass need not have a gradient of it.
    if recompute or p.degree != 2 or not 0 < size < p.t or (p.final and not p.normalized):
        return 0
    if recompute is False:
        return size
    kept = sum(buffer.bytes for buffer in snapshot_buffer(chunked(p, size)).values())
    arrays = p.b * p.t * p.dtype.bytes * (p.hq + p.h) * (p.d + p.e)
    return size if p.t >= KEPT_FROM * size and kept <= min(arrays, (memory or kept * KEPT_SHARE) // KEPT_SHARE) else 0


def whole_chunk(p: Problem) -> int:
    """Tokens of the one chunk of the attention form: the padded length."""
    return -(-max(p.t, 1) // PADDING) * PADDING


@lru_cache(maxsize=256)
def chunked(p: Problem, chunk: int) -> Chunked:
    """What the stages are asked when a config has this `chunk`; of a whole space's configs these are the few that differ."""
    return Chunked(**vars(p), stateful=chunk > 0 or p.initial, enters=p.initial, leaves=p.final, chunk=chunk or whole_chunk(p))


def scans(p: Chunked) -> bool:
    """Whether tokens reach a state that is asked for."""
    return p.t > 0 and (p.chunks > 1 or p.leaves)


def scan_stages(p: Chunked, c: scan.Config) -> list[Stage]:
    """The states before all chunks, and the one behind them if it is asked for."""
    launches: list[Stage] = [Stage(SCANS[c.mma], p, c, "scan")] if scans(p) else []
    if p.enters or p.leaves:
        launches.append(Stage(scan.power_states, p, scan.CarryConfig(segments=c.segments), "scan"))
    elif launches and c.segments > 1:
        launches.append(Stage(scan.power_carry, p, scan.CarryConfig(segments=c.segments), "scan"))
    return launches


def stages(p: Problem, c: Config) -> list[Stage]:
    asked = chunked(p, c.chunk)
    launches: list[Stage] = [Stage(gates.power_gates, asked, gates.Config(block=c.attend.keys))] if p.gated else []
    return [*launches, *scan_stages(asked, c.scan), Stage(attend.power_attend, asked, c.attend, "attend")]


def degree_refusal(degree: Any, normalize: Any) -> UnsupportedError | None:
    """Why weights are no power of that degree, or None."""
    # The exact type comes first: to ask the abstract one takes a tenth of a launch.
    if (type(degree) is int or isinstance(degree, Integral)) and degree in DEGREES:
        return None
    odd = isinstance(degree, Integral) and degree % 2 == 1 and normalize == "sum"
    why = "an odd power's weights change sign, so their sum is no normaliser" if odd else "no other degree has a kernel"
    why = why if isinstance(degree, Integral) else "it is no integer"
    return UnsupportedError(f"degree={degree!r}: {why}; accepted: {', '.join(map(str, DEGREES))}")


def max_scale(degree: int) -> float:
    """The largest scale that is served, in magnitude."""
    return float(MAX_FACTOR ** (1 / degree))


def scale_refusal(scale: Any, degree: int) -> ArgumentError | None:
    """Why scores are not scaled so, or None."""
    number = type(scale) is float or isinstance(scale, Real)
    if number and abs(scale) <= max_scale(degree):
        return None
    return ArgumentError(f"scale={scale!r} is not served; accepted: None, or a number of at most {max_scale(degree):g} in magnitude")


def normalize_refusal(normalize: Any) -> ArgumentError | None:
    """Why rows are not normalised so, or None."""
    if isinstance(normalize, str) and normalize in NORMALIZE:
        return None
    return ArgumentError(f"normalize={normalize!r} is not known; accepted: {', '.join(map(repr, NORMALIZE))}")


def shape_refusal(dtype: DType, d: int, e: int, hq: int, h: int, dtypes: tuple[DType, ...] = DTYPES) -> VidrialError | None:
    """Why no kernel serves such elements, head sizes and heads, or None."""
    if dtype not in dtypes:
        return ArgumentTypeError(f"q: dtype {dtype} is not served; accepted: {', '.join(map(str, dtypes))}")
    if h < 1 or hq % h:
        return ArgumentError(f"q has {hq} heads and k has {h}; accepted: a multiple of k's heads")
    for name, size in (("D", d), ("E", e)):
        if size not in DIMS:
            return UnsupportedError(
                f"{name}={size} is not served; accepted: {', '.join(map(str, DIMS))}. Pad with zeros, which changes nothing but `scale`'s default"
            )
    return None


def refusal(p: Problem, dtypes: tuple[DType, ...] = DTYPES) -> VidrialError | None:
    """Why no config serves a problem, or None: what calls raise, and the first rule."""
    refused = shape_refusal(p.dtype, p.d, p.e, p.hq, p.h, dtypes) or degree_refusal(p.degree, "sum" if p.normalized else "none")
    if refused is not None:
        return refused
    if p.b * p.hq > MAX_HEADS:
        return UnsupportedError(f"q has B x HQ = {p.b * p.hq} heads; accepted: at most {MAX_HEADS}. Split the batch")
    for name, elements in (("q", p.hq * p.d), ("k", p.h * p.d), ("v", p.h * p.e), ("y", p.hq * p.e)):
        if p.b * p.t * elements > MAX_ELEMENTS:
            return UnsupportedError(f"{name} has {p.b * p.t * elements} elements; accepted: at most 2^31. Split the batch or the heads")
    return scale_refusal(p.scale, p.degree)


def rules(p: Problem, c: Config) -> Iterator[tuple[bool, str]]:
    # Asked of every config: a reason is written when it is needed.
    if (refused := refusal(p)) is not None:
        yield False, str(refused)
    if c.chunk and p.degree != 2:
        yield False, f"degree {p.degree} has the attention form only: chunk=0"
    if (p.initial or p.final) and p.degree != 2:
        yield False, f"degree {p.degree} has no state"
    if p.kept and p.kept != c.chunk:
        yield False, f"chunk={c.chunk}: the states that are kept are of chunk={p.kept}"
    if c.chunk and c.chunk >= p.t:
        yield False, f"chunk={c.chunk} holds all {p.t} tokens: chunk=0 is the same without a state"


def inputs(p: Problem) -> dict[str, Buffer]:
    """Rows of q, k and v are read by vectors; log_g is read with whatever strides it has."""
    shapes = {"q": (p.b, p.t, p.hq, p.d), "k": (p.b, p.t, p.h, p.d), "v": (p.b, p.t, p.h, p.e)}
    buffers = {name: Buffer(shape, p.dtype, (*getattr(p, f"{name}_stride"), 1)) for name, shape in shapes.items()}
    buffers |= {"log_g": Buffer((p.b, p.t, p.h), DType.float32, p.log_g_stride, aligned=False)} if p.gated else {}
    return buffers | (state_buffers(p, "initial") if p.initial else {})


def outputs(p: Problem) -> dict[str, Buffer]:
    kept = snapshot_buffer(chunked(p, p.kept)) if p.kept else {}
    return {"y": Buffer((p.b, p.t, p.hq, p.e), p.dtype)} | (state_buffers(p, "final") if p.final else {}) | kept


def state_buffers(p: Problem, name: str) -> dict[str, Buffer]:
    """A state's S and Z, or their gradients."""
    return {f"{name}_{field}": Buffer(shape, DType.float32) for field, shape in p.state_shapes.items()}


def snapshot_buffer(p: Chunked) -> dict[str, Buffer]:
    """The state before each chunk."""
    return {"snapshots": Buffer((p.b * p.h, p.chunks, p.snapshot), DType.bfloat16)}


def scan_buffers(p: Chunked, segments: int) -> dict[str, Buffer]:
    """What `scan_stages` writes beside what is given out."""
    ends = segments if p.leaves else segments - 1
    return ({} if p.kept else snapshot_buffer(p)) | ({"ends": Buffer((p.b * p.h, ends, p.snapshot), DType.float32)} if ends else {})


def workspace(p: Problem, c: Config) -> dict[str, Buffer]:
    asked, heads = chunked(p, c.chunk), p.b * p.h
    buffers: dict[str, Buffer] = {}
    if p.gated:
        padded, f32 = asked.chunks * asked.chunk, DType.float32
        buffers |= {"a": Buffer((heads, padded, 2), f32), "to_block": Buffer((heads, padded), f32)}
        if scans(asked):
            buffers["to_end"] = Buffer((heads, padded), f32)
    return buffers | (scan_buffers(asked, c.scan.segments) if asked.stateful or asked.leaves else {})


def example(
    *,
    t: int,
    b: int = 1,
    h: int = 16,
    hq: int | None = None,
    d: int = 64,
    e: int | None = None,
    degree: int = 2,
    gated: bool = True,
    normalize: str = "sum",
    dtype: str = "bfloat16",
    scale: float | None = None,
    initial: bool = False,
    final: bool = False,
) -> Problem:
    """A problem with contiguous arrays: `h` heads of keys, `hq` of queries (as many), keys `d` wide, values `e` (as wide). `initial`: a state
    comes before the first token; `final`: the one behind the last is asked for.

    Raises:
        ArgumentError: `normalize` is not known.
    """
    if (refused := normalize_refusal(normalize)) is not None:
        raise refused
    hq, e = h if hq is None else hq, d if e is None else e
    return Problem(
        dtype=DType.of(dtype),
        d=d,
        e=e,
        degree=degree,
        gated=gated,
        normalized=normalize == "sum",
        b=b,
        t=t,
        hq=hq,
        h=h,
        scale=max(d, 1) ** -0.5 if scale is None else scale,
        q_stride=strides(t, hq, d),
        k_stride=strides(t, h, d),
        v_stride=strides(t, h, e),
        y_stride=strides(t, hq, e),
        log_g_stride=(t * h, h, 1),
        initial=initial,
        final=final,
    )


def small(p: Problem) -> Problem:
    """The same op at an odd length past two of its chunks, few heads: quick to check."""
    group, h = p.hq // p.h, min(p.h, 2)
    return example(
        t=min(p.t, 2309),
        b=1,
        h=h,
        hq=h * group,
        d=p.d,
        e=p.e,
        degree=p.degree,
        gated=p.gated,
        normalize="sum" if p.normalized else "none",
        dtype=p.dtype.name,
        scale=p.scale,
        initial=p.initial,
        final=p.final,
    )


def sample(p: Problem, seed: int) -> dict[str, np.ndarray]:
    """Normal q, k, v; log_g = logsigmoid(normal + 4), beyond MEMORY tokens flattened in proportion.

    So the gates forget much, but nothing altogether: what they have forgotten is not read, and a config ranked on such luck would
    serve a model with a longer memory badly.
    """
    rng = np.random.default_rng(seed)
    shapes = {"q": (p.b, p.t, p.hq, p.d), "k": (p.b, p.t, p.h, p.d), "v": (p.b, p.t, p.h, p.e)}
    arrays = {name: normal(rng, shape, p.dtype) for name, shape in shapes.items()}
    if p.gated:
        arrays["log_g"] = -np.log1p(np.exp(-rng.standard_normal((p.b, p.t, p.h), np.float32) - 4)) * np.float32(
            min(1.0, MEMORY / max(p.t, 1))
        )
    return arrays | (draw_state(p, rng, "initial") if p.initial else {})


def draw_state(p: Problem, rng: np.random.Generator, name: str) -> dict[str, np.ndarray]:
    """A state of the problem's shapes, which some tokens made."""
    s, z = final_state(rng.standard_normal((p.b, STATE_TOKENS, p.h, p.d)), rng.standard_normal((p.b, STATE_TOKENS, p.h, p.e)))
    return {f"{name}_s": s.astype(np.float32), f"{name}_z": z.astype(np.float32)}


def initial_state(p: Problem, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
    """S and Z before the first token, in float64; None where there is none."""
    return (inputs["initial_s"].astype(np.float64), inputs["initial_z"].astype(np.float64)) if p.initial else None


def reference(p: Problem, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    (q, k, v), initial = (p.dtype.widen(inputs[n]) for n in "qkv"), initial_state(p, inputs)
    normalize = "sum" if p.normalized else "none"
    exact = attention_form(q, k, v, inputs.get("log_g"), degree=p.degree, scale=p.scale, normalize=normalize, initial=initial)
    found = {"y": exact.y, "conditioning": exact.conditioning, "v_max": np.array(np.abs(v).max(initial=0.0))}
    if p.final:
        found["final_s"], found["final_z"] = final_state(k, v, inputs.get("log_g"), initial)
    return found


def check(p: Problem, inputs: Mapping[str, np.ndarray], results: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> Check:
    """The weighted error alone would not see a wrong multiplicity, the norm alone not a wrong element: both count. A final state's error counts
    in times of its own bound."""
    y, exact = p.dtype.widen(results["y"]), expected["y"]
    error = np.abs(y - exact)
    norm = float(np.linalg.norm(exact))
    # What rounding at u may be off by is u times this, and half of the smallest number that the dtype has.
    size = float(expected["v_max"]) / np.maximum(expected["conditioning"][..., None], 1e-300) + SMALLEST[p.dtype] / 2 / WORST_BOUND
    worst = (error / size).max(initial=0.0)
    states = [state_error(results[f"final_{name}"], expected[f"final_{name}"]) for name in ("s", "z") if p.final]
    relative = [float(np.linalg.norm(error)) / max(norm, 1e-30), *(RELATIVE_BOUND / STATE_BOUND[p.dtype] * state for state in states)]
    return Check(max(relative), float(worst), RELATIVE_BOUND, WORST_BOUND)


def state_error(found: np.ndarray, exact: np.ndarray) -> float:
    """Of a state, or of the gradient of one, the error's norm over the state's own."""
    return float(np.linalg.norm(found - exact)) / max(float(np.linalg.norm(exact)), 1e-30)


op = Op(
    name="power_retention",
    kernels=(gates.power_gates, *SCANS.values(), scan.power_carry, scan.power_states, attend.power_attend),
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
