"""The backward pass of power retention as an op: its stages in sequence, and the chunk that they share.

With `chunk` 0 the whole sequence is one chunk: no state. Otherwise the states before the chunks are scanned again, as the forward pass did, with a
chunk of the backward pass's own; those behind them, the adjoint, are scanned in reverse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from typing import Any

import numpy as np

from vidrial import Buffer, Check, DType, Op, Stage, choice, part
from vidrial.kernels.arrays import normal
from vidrial.kernels.power_retention import gates as forward_gates
from vidrial.kernels.power_retention import scan as forward_scan
from vidrial.kernels.power_retention.back import gates, rows, scan_wgmma, tokens, tokens_wgmma
from vidrial.kernels.power_retention.back import scan as back_scan
from vidrial.kernels.power_retention.back.problem import ChunkedGradient, Gradient
from vidrial.kernels.power_retention.op import (
    CHUNKS,
    SCANS,
    SMALLEST,
    STATE_BOUND,
    draw_state,
    initial_state,
    scan_buffers,
    scan_stages,
    snapshot_buffer,
    state_buffers,
    state_error,
    whole_chunk,
)
from vidrial.kernels.power_retention.op import Config as forward_config
from vidrial.kernels.power_retention.op import chunked as forward_chunked
from vidrial.kernels.power_retention.op import example as forward_example
from vidrial.kernels.power_retention.op import inputs as forward_inputs
from vidrial.kernels.power_retention.op import rules as forward_rules
from vidrial.kernels.power_retention.op import sample as forward_sample
from vidrial.kernels.power_retention.op import small as forward_small
from vidrial.kernels.power_retention.problem import Chunked
from vidrial.kernels.power_retention.reference import attention_form, final_state, gradients

NAMES = ("dq", "dk", "dv", "dlog_g")
# Pairs of a query and a key, of all heads, up to which a sample is of an exact forward pass: seconds of a CPU. Beyond them rows of a sequence repeat.
EXACT_PAIRS, ROWS = 2**26, 2048
# Of the norm of each gradient, head by head: roundings to bf16 as docs/power_retention.md lists them. dq and dk have 2.6e-3 in the middle.
BOUNDS = {"dq": 3.5e-3, "dk": 3.5e-3, "dv": 3.5e-3, "dlog_g": 1.5e-2}
# A single row of few keys may be off by more: what the state form sums, or y as rounded, nearly cancels there. A row that is wrong is off by its size.
WORST_ROW = 0.25


@dataclass(frozen=True)
class Config:
    """`chunk` tokens share a state, 0 for none; `mma`: by which instruction the backward pass's own kernels multiply; how the state and its adjoint
    are scanned; how dq is made, and dk and dv. By wgmma the parts of that name say how."""

    chunk: int = choice(*CHUNKS)
    mma: str = choice("sync", "wgmma")
    scan: forward_scan.Config = part(forward_scan.Config)
    adjoint: back_scan.Config = part(back_scan.Config)
    query: tokens.Config = part(tokens.Config)
    keys: tokens.Config = part(tokens.Config)
    adjoint_wgmma: scan_wgmma.Config = part(scan_wgmma.Config)
    query_wgmma: tokens_wgmma.Config = part(tokens_wgmma.Config)
    keys_wgmma: tokens_wgmma.Config = part(tokens_wgmma.Config)

    @property
    def of_query(self) -> tokens.Config:
        """The config of dq."""
        return self.query_wgmma if self.mma == "wgmma" else self.query

    @property
    def of_keys(self) -> tokens.Config:
        """The config of dk and dv."""
        return self.keys_wgmma if self.mma == "wgmma" else self.keys


def adjoint_segments(p: Gradient, c: Config) -> int:
    """Segments of the adjoint's scan: by mma.sync there is one."""
    return c.adjoint_wgmma.segments if c.mma == "wgmma" and scan_wgmma.serves(p) else 1


@lru_cache(maxsize=256)
def chunked(p: Gradient, chunk: int) -> ChunkedGradient:
    """What the stages are asked when a config has this `chunk`."""
    stateful = chunk > 0 or p.initial or p.final
    return ChunkedGradient(**vars(p), stateful=stateful, enters=p.initial, leaves=p.final, chunk=chunk or whole_chunk(p))


@lru_cache(maxsize=256)
def before(p: Gradient, chunk: int) -> Chunked:
    """The forward problem whose states before all chunks are asked for again; of Z there is as much as in the adjoint."""
    return replace(forward_chunked(p.forward, chunk), normalized=p.keeps_z, final=False, leaves=False)


def stages(p: Gradient, c: Config) -> list[Stage]:
    asked, forward = chunked(p, c.chunk), before(p, c.chunk)
    if p.t == 0:
        return adjoint_stages(p, c) if p.initial else []
    launches: list[Stage] = []
    if p.gated:
        launches.append(Stage(forward_gates.power_gates, forward, forward_gates.Config(block=c.of_query.block)))
    launches.append(Stage(rows.power_back_rows, asked, rows.Config(block=c.of_keys.block)))
    if asked.stateful:
        launches += [] if p.kept else scan_stages(forward, c.scan)
        launches += adjoint_stages(p, c)
    if c.mma == "wgmma":
        launches.append(Stage(tokens_wgmma.power_back_query_wgmma, asked, c.query_wgmma, "query_wgmma"))
        launches.append(Stage(tokens_wgmma.power_back_keys_wgmma, asked, c.keys_wgmma, "keys_wgmma"))
    else:
        launches += [Stage(tokens.power_back_query, asked, c.query, "query"), Stage(tokens.power_back_keys, asked, c.keys, "keys")]
    if p.gated:
        if asked.stateful:
            launches.append(Stage(gates.power_back_cross, asked, gates.Config()))
        launches.append(Stage(gates.power_back_gates, asked, gates.Config()))
    return launches


def adjoint_stages(p: Gradient, c: Config) -> list[Stage]:
    """The scan of the adjoint, and what joins its segments."""
    asked = chunked(p, c.chunk)
    if c.mma == "sync" or not scan_wgmma.serves(p):
        return [Stage(back_scan.power_back_scan, asked, c.adjoint, "adjoint")]
    launches: list[Stage] = [Stage(scan_wgmma.power_back_scan_wgmma, asked, c.adjoint_wgmma, "adjoint_wgmma")]
    if (segments := c.adjoint_wgmma.segments) > 1:
        launches.append(Stage(scan_wgmma.power_back_carry, asked, forward_scan.CarryConfig(segments=segments), "adjoint_wgmma"))
    return launches


def rules(p: Gradient, c: Config) -> Iterator[tuple[bool, str]]:
    yield from forward_rules(p, forward_config(c.chunk))
    if c.mma == "wgmma":
        yield not (p.initial or p.final), "by wgmma no state comes before the first token or is read behind the last: mma=sync"


def inputs(p: Gradient) -> dict[str, Buffer]:
    """What the forward pass was given, what it made, and the gradient of y and of the state behind the last token."""
    y = (p.b, p.t, p.hq, p.e)
    made = {"y": Buffer(y, p.dtype), "norm": Buffer((p.b, p.hq, p.t), DType.float32)} if p.normalized else {}
    if p.final:
        made |= state_buffers(p, "d_final") | (state_buffers(p, "final") if p.gated else {})
    if p.kept:
        made |= snapshot_buffer(before(p, p.kept))
    return {**forward_inputs(p.forward), **made, "dy": Buffer(y, p.dtype, (*p.dy_stride, 1))}


def outputs(p: Gradient) -> dict[str, Buffer]:
    shapes = {"dq": (p.b, p.t, p.hq, p.d), "dk": (p.b, p.t, p.h, p.d), "dv": (p.b, p.t, p.h, p.e)}
    buffers = {name: Buffer(shape, p.dtype) for name, shape in shapes.items()}
    buffers |= {"dlog_g": Buffer((p.b, p.t, p.h), DType.float32)} if p.gated else {}
    return buffers | (state_buffers(p, "d_initial") if p.initial else {})


def workspace(p: Gradient, c: Config) -> dict[str, Buffer]:
    asked, heads, q_heads, f32 = chunked(p, c.chunk), p.b * p.h, p.b * p.hq, DType.float32
    padded = asked.padded
    buffers = {"rows": Buffer((q_heads, padded, 2), f32), "from_block": Buffer((q_heads, padded, 2), f32)}
    buffers |= {"dot_q": Buffer((q_heads, padded), f32), "dot_k": Buffer((heads, padded), f32)}
    if p.gated:
        buffers |= {"a": Buffer((heads, padded, 2), f32), "to_block": Buffer((heads, padded), f32)}
    if asked.stateful:
        buffers["from_start"] = Buffer((q_heads, padded), f32)
        if asked.keeps_z:
            buffers["from_start_z"] = Buffer((q_heads, padded), f32)
        if p.gated:
            buffers |= {"to_end": Buffer((heads, padded), f32), "cross": Buffer((heads, asked.chunks), f32)}
        buffers["adjoint"] = Buffer((heads, asked.chunks, p.snapshot), DType.bfloat16)
        buffers |= {} if p.kept else scan_buffers(before(p, c.chunk), c.scan.segments)
        # Of the state's segments, and once these are joined of the adjoint's.
        if (segments := adjoint_segments(p, c)) > (1 if p.kept else c.scan.segments):
            buffers["ends"] = Buffer((heads, segments - 1, p.snapshot), f32)
    return buffers


@wraps(forward_example)  # whose keywords the command line asks for
def example(**keywords: Any) -> Gradient:
    p = forward_example(**keywords)
    return Gradient(**vars(p), dy_stride=p.y_stride)


def small(p: Gradient) -> Gradient:
    """The same op at an odd length past two of its chunks, few heads: quick to check."""
    found = forward_small(p.forward)
    return Gradient(**vars(found), dy_stride=found.y_stride)


def sample(p: Gradient, seed: int) -> dict[str, np.ndarray]:
    """The forward op's sample, what an exact forward pass makes of it, and a normal dy.

    Beyond EXACT_PAIRS, where such a pass takes a CPU minutes, y and its normaliser are the last ROWS rows of as much of the sequence as comes
    before twice ROWS, again and again: right in size, which is all that a time or two configs beside each other need.
    """
    arrays = forward_sample(p.forward, seed)
    exact, rng = p.b * p.hq * p.t**2 <= 2 * EXACT_PAIRS, np.random.default_rng(seed + 1)
    found = forward_pass(p, arrays) if exact else repeated_rows(p, arrays)
    if p.final:
        found |= ({} if exact or not p.gated else draw_state(p, rng, "final")) | draw_state(p, rng, "d_final")
    return {**arrays, **found, "dy": normal(rng, (p.b, p.t, p.hq, p.e), p.dtype)}


def forward_pass(p: Gradient, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """y, rounded, its normaliser and the final state, as far as the backward pass reads them, from float64."""
    (q, k, v), initial, made = (p.dtype.widen(inputs[n]) for n in "qkv"), initial_state(p, inputs), dict[str, np.ndarray]()
    if p.final and p.gated:
        s, z = final_state(k, v, inputs.get("log_g"), initial)
        made |= {"final_s": s.astype(np.float32), "final_z": z.astype(np.float32)}
    if p.normalized:
        found = attention_form(q, k, v, inputs.get("log_g"), degree=p.degree, scale=p.scale, initial=initial)
        made["y"] = p.dtype.round(found.y.astype(np.float32))
        made["norm"] = np.ascontiguousarray(found.norm.transpose(0, 2, 1), np.float32)
    return made


def repeated_rows(p: Gradient, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`forward_pass` of the first key head of the first sequence, up to 2 ROWS tokens of it; its second half for all tokens and heads."""
    group, t = p.hq // p.h, min(p.t, 2 * ROWS)
    few = {name: inputs[name][:1, :t, : group if name == "q" else 1] for name in ("q", "k", "v", "log_g") if name in inputs}
    found = forward_pass(replace(p, b=1, t=t, h=1, hq=group, initial=False, final=False), few)
    if not found:
        return {}
    tokens, heads = t // 2 + np.arange(p.t) % (t - t // 2), np.arange(p.hq) % group
    norm = np.broadcast_to(found["norm"][0][np.ix_(heads, tokens)], (p.b, p.hq, p.t))
    y = np.broadcast_to(found["y"][0][np.ix_(tokens, heads)], (p.b, p.t, p.hq, p.e))
    return {"y": np.ascontiguousarray(y), "norm": np.ascontiguousarray(norm)}


def reference(p: Gradient, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    q, k, v, dy = (p.dtype.widen(inputs[n]) for n in ("q", "k", "v", "dy"))
    normalize = "sum" if p.normalized else "none"
    d_final = (inputs["d_final_s"].astype(np.float64), inputs["d_final_z"].astype(np.float64)) if p.final else None
    initial = initial_state(p, inputs)
    found = gradients(
        q, k, v, inputs.get("log_g"), dy, degree=p.degree, scale=p.scale, normalize=normalize, initial=initial, d_final=d_final
    )
    exact = {name: x for name, x in found._asdict().items() if x is not None}
    if p.initial:
        # Z is read as its symmetric part.
        exact["d_initial_s"], exact["d_initial_z"] = exact["d_s"], (exact["d_z"] + exact["d_z"].swapaxes(-1, -2)) / 2
    return exact


def row_errors(p: Gradient, results: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of each row of dq, dk and dv the error's norm over the row's own, or over that of the terms that cancel in it, whichever is more: [B, T, heads].

    Terms and rows are about equal in size; where the terms are many times as large, as in a row that sees two keys of which one counts, the error
    says how y was rounded.
    """
    found = {}
    for name, terms in (("dq", "q_terms"), ("dk", "k_terms"), ("dv", None)):
        got, exact = p.dtype.widen(results[name]), expected[name]
        size = np.maximum(np.linalg.norm(exact, axis=-1), expected[terms] if terms else SMALLEST[p.dtype])
        found[name] = np.linalg.norm(got - exact, axis=-1) / np.maximum(size, SMALLEST[p.dtype])
    return found


def errors(p: Gradient, results: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of each gradient and each of its heads: the root mean square of its rows' errors; of the gates the error's norm over the gradient's."""
    found = {name: np.sqrt((x**2).mean((0, 1))) for name, x in row_errors(p, results, expected).items()}
    if p.gated:
        exact = expected["dlog_g"]
        size = np.maximum(np.linalg.norm(exact, axis=(0, 1)), np.linalg.norm(expected["g_terms"], axis=(0, 1)) / 8)
        found["dlog_g"] = np.linalg.norm(results["dlog_g"] - exact, axis=(0, 1)) / np.maximum(size, SMALLEST[p.dtype])
    return found


def check(p: Gradient, inputs: Mapping[str, np.ndarray], results: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> Check:
    """The worst of all gradients and heads, each error as many times the gates' bound as it is times its own; and the worst row.

    The bound is one of relative errors, not 1: a sweep takes 16 times as much for two configs' results that differ, and 16 would pass anything.
    """
    bound = BOUNDS["dlog_g"]
    mean = [float(x.max(initial=0.0)) / BOUNDS[name] for name, x in errors(p, results, expected).items()]
    mean += [state_error(results[name], expected[name]) / STATE_BOUND[p.dtype] for name in ("d_initial_s", "d_initial_z") if p.initial]
    worst = max(float(x.max(initial=0.0)) for x in row_errors(p, results, expected).values())
    return Check(max(mean, default=0.0) * bound, worst, bound, WORST_ROW)


# NOTE: right on the host target and compiled, but no GPU has run them yet. Without this line calls take what the cost model says, of these as well.
UNMEASURED = {"mma": ("wgmma",)}

op = Op(
    name="power_retention_backward",
    kernels=(
        forward_gates.power_gates,
        rows.power_back_rows,
        *SCANS.values(),
        forward_scan.power_carry,
        forward_scan.power_states,
        back_scan.power_back_scan,
        tokens.power_back_query,
        tokens.power_back_keys,
        scan_wgmma.power_back_scan_wgmma,
        scan_wgmma.power_back_carry,
        tokens_wgmma.power_back_query_wgmma,
        tokens_wgmma.power_back_keys_wgmma,
        gates.power_back_cross,
        gates.power_back_gates,
    ),
    problem=Gradient,
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
    unmeasured=UNMEASURED,
)
