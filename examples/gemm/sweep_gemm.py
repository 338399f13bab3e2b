"""Measure which configs of the GEMM are fastest on this machine's GPU, and how fast they are beside cuBLAS, as torch.matmul calls it.

python examples/gemm/sweep_gemm.py --seconds 20
python examples/gemm/sweep_gemm.py --size 4096 4096 4096 --size 257 4096 4096 --dtype bfloat16 float16 --by tma --seconds 60 --out gemm.json
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
from pathlib import Path
from typing import Any

from gemm import Paths, Problem, example, linear, op

import vidrial as vd

# (m, n, k): square; rows that are aligned to 16 bytes but no multiples of a tile; skinny; tall; wide; rows aligned to 4 bytes, and to 2.
SIZES = (
    (4096, 4096, 4096),
    (8192, 8192, 8192),
    (4000, 4104, 4088),
    (257, 4096, 4096),
    (65536, 1024, 1024),
    (256, 16384, 4096),
    (4099, 4098, 4094),
    (4099, 4097, 4095),
)
# Samples of each; writes over twice the L2 before one; configs of the sweep that are printed.
ROUNDS, FLUSHES, SHOWN = 40, 3, 12
# Relative to the norm: more than both results' rounding.
WRONG = 2.0**-8


@dataclasses.dataclass(frozen=True)
class Row:
    """One size: the fastest config and cuBLAS, timed in turn, the L2 flushed before each sample. Milliseconds; `share` of cuBLAS' speed."""

    m: int
    n: int
    k: int
    dtype: str
    config: str
    ms: float
    iqr_ms: float
    tflops: float
    cublas_ms: float
    cublas_iqr_ms: float
    cublas_tflops: float
    share: float
    ranked: list[tuple[str, float]]

    def __str__(self) -> str:
        return (
            f"m={self.m} n={self.n} k={self.k} {self.dtype}: {self.ms:.4f} ms +- {self.iqr_ms:.4f}, {self.tflops:.0f} TFLOP/s; "
            f"cuBLAS {self.cublas_ms:.4f} +- {self.cublas_iqr_ms:.4f}, {self.cublas_tflops:.0f}; share {self.share:.3f}; {self.config}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs=3, type=int, action="append", metavar=("M", "N", "K"), help="by default some of every kind")
    parser.add_argument("--dtype", nargs="+", default=["float16"], choices=("bfloat16", "float16"))
    parser.add_argument("--by", choices=("threads", "tma"), help="sweep configs of this path alone")
    parser.add_argument("--tile", nargs="+", default=[], metavar="ROWSxCOLUMNS", help="configs of these tiles alone")
    parser.add_argument("--gelu", action="store_true", help="with bias and GELU; cuBLAS' time is that of the product alone")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each size, about")
    parser.add_argument("--out", type=Path, help="write the rows there as JSON")
    arguments = parser.parse_args()
    device, rows = vd.Device.current(), []
    for dtype in arguments.dtype:
        for m, n, k in arguments.size or SIZES:
            problem = example(m=m, n=n, k=k, dtype=dtype, bias=arguments.gelu, gelu=arguments.gelu)
            asked: dict[str, Any] = {}
            if arguments.by is not None or arguments.tile:
                fixed = {"by": arguments.by} if arguments.by is not None else {}
                ranked = (candidate.config for candidate in op.ranked(problem, device, fixed))
                asked["configs"] = [config for config in ranked if not arguments.tile or tile(config) in arguments.tile]
            result = vd.tune.sweep(op, problem, seconds=arguments.seconds, progress=False, **asked)
            row = beside_cublas(problem, result.winner.config)
            row.ranked.extend((spelled(ranked.config), ranked.timing.median_ms) for ranked in result.ranked)
            rows.append(row)
            print(f"{row}\n{SHOWN} of {len(row.ranked)} configs of the sweep, ms, fastest first:")
            print("\n".join(f"  {ms:.4f}  {config}" for config, ms in row.ranked[:SHOWN]))
            print("\n".join(f"note: {note}" for note in result.notes), flush=True)
            if arguments.out is not None:
                arguments.out.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    print("\n".join(map(str, rows)))


def tile(config: Paths) -> str:
    """Rows and columns of C that a CTA makes."""
    part = config.tma if config.by == "tma" else config.threads
    return f"{part.rows}x{part.columns}"


def spelled(config: Paths) -> str:
    """The part of a config that counts."""
    return str(config.tma if config.by == "tma" else config.threads)


def beside_cublas(p: Problem, config: Paths) -> Row:
    """A call, which takes the config that the sweep found, in turn with A B^T alone by torch; the L2 is flushed before each."""
    torch: Any = importlib.import_module("torch")
    generator, dtype = torch.Generator("cuda").manual_seed(0), getattr(torch, p.dtype.label)
    a, b, bias = (torch.randn(shape, device="cuda", generator=generator).to(dtype) for shape in ((p.m, p.k), (p.n, p.k), (p.n,)))
    flushed = torch.empty(2 * vd.Device.current().l2_bytes, dtype=torch.uint8, device="cuda")
    given = (a, b, bias) if p.biased else (a, b)
    runs = (functools.partial(linear, *given, gelu=p.gelu), functools.partial(torch.matmul, a, b.T))
    results = [run() for run in runs]
    samples: list[list[Any]] = [[] for _ in runs]
    for turn in range(ROUNDS):
        for which in (0, 1) if turn % 2 else (1, 0):
            # Longer than the host takes to queue what is timed.
            for _ in range(FLUSHES):
                flushed.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            runs[which]()
            end.record()
            samples[which].append((begin, end))
    torch.cuda.synchronize()
    ours, library = (vd.tune.Timing.of([begin.elapsed_time(end) for begin, end in taken]) for taken in samples)
    # Both round sums of float32, in different orders.
    distance = float((results[0].float() - results[1].float()).norm() / results[1].float().norm())
    if not p.biased and not distance < WRONG:
        raise SystemExit(f"{spelled(config)} is {distance:.2e} of the norm off cuBLAS' result")
    flops = 2e-9 * p.m * p.n * p.k
    return Row(
        m=p.m,
        n=p.n,
        k=p.k,
        dtype=p.dtype.label,
        config=spelled(config),
        ms=ours.median_ms,
        iqr_ms=ours.iqr_ms,
        tflops=flops / ours.median_ms,
        cublas_ms=library.median_ms,
        cublas_iqr_ms=library.iqr_ms,
        cublas_tflops=flops / library.median_ms,
        share=library.median_ms / ours.median_ms,
        ranked=[],
    )


if __name__ == "__main__":
    main()
