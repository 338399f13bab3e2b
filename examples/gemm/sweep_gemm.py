"""Measure which configs of the GEMM are fastest on this machine's GPU, and how fast they are beside cuBLAS, as CuPy calls it.

python examples/gemm/sweep_gemm.py --seconds 20
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from gemm import Problem, example, op

import vidrial as vd

# (m, n, k): square; tall; wide; a layer of a model; rows that are aligned to 4 bytes, and to 2.
SIZES = ((4096, 4096, 4096), (8192, 8192, 8192), (65536, 1024, 1024), (256, 16384, 4096), (4099, 4098, 4094), (4099, 4097, 4095))
REPEATS, ROUNDS = 10, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gelu", action="store_true", help="with GELU; cuBLAS' time is that of the product alone")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each size, about")
    arguments = parser.parse_args()
    problems = [example(m=m, n=n, k=k, dtype="float16", gelu=arguments.gelu) for m, n, k in SIZES]
    for result in vd.tune.sweep_lengths(op, problems, seconds=arguments.seconds):
        p, ms, library = result.problem, result.winner.ms, cublas_ms(result.problem)
        tflops = 2e-9 * p.m * p.n * p.k / ms
        print(f"m={p.m} n={p.n} k={p.k}\n{result.table()}\n{tflops:.0f} TFLOP/s, {library / ms:.2f} times cuBLAS ({library:.4f} ms)\n")


def cublas_ms(p: Problem) -> float:
    """Milliseconds of A B^T alone by cuBLAS in float16, the median of some rounds."""
    import cupy

    a, b = (cupy.asarray(x) for x in (op.sample(p, 0)[name] for name in ("a", "b")))
    out: Any = cupy.empty((p.m, p.n), cupy.float16)
    cupy.matmul(a, b.T, out=out)
    times: list[float] = []
    for _ in range(ROUNDS):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        for _ in range(REPEATS):
            cupy.matmul(a, b.T, out=out)
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end) / REPEATS)
    return statistics.median(times)


if __name__ == "__main__":
    main()
