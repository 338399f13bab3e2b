"""The peers: `retention` (its Triton path), torch's SDPA and FlashAttention-4, as functions to be timed.

`retention` tunes every kernel on its first call with new head sizes, for minutes. Most of that is compiling, which `compile_ahead`
spreads over processes that fill Triton's cache on disk; what is timed to choose a config is then timed in one process, alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.common import CHUNK, Case, short

ROOT = Path(__file__).parent.parent
AHEAD_LENGTH = 16 * CHUNK
TIMEOUT_SECONDS = 300
MODULES = ("_attention", "_update_state", "_discumsum", "_query_state")
SDPA_BACKENDS = {"SDPA flash": "FLASH_ATTENTION", "SDPA cuDNN": "CUDNN_ATTENTION"}


class OverBudget(Exception):
    """A peer took longer than it was given."""


def peer_errors() -> tuple[type[Exception], ...]:
    """What a peer that cannot run a case may raise."""
    known = (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        OverBudget,
    )
    try:
        from triton.errors import TritonError
    except ImportError:
        return known
    return (*known, TritonError)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise OverBudget in the block when it takes longer; in the main thread only."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise OverBudget(f"did not finish within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def retention(x: Mapping[str, Any], chunk: int) -> Callable[[], Any]:
    """A call of `retention.power_retention`, degree 2: chunks of that many tokens, attention up to one of them; 0: attention only.

    Raises:
        ImportError: retention, or what it needs (torch, triton, einops), is not installed.
    """
    from retention import power_retention

    q, k, v, log_g = (x[name] for name in ("q", "k", "v", "log_g"))
    size = chunk or None
    return lambda: power_retention(Q=q, K=k, V=v, log_G=log_g, deg=2, chunk_size=size)


def sdpa(x: Mapping[str, Any], name: str, causal: bool = True) -> Callable[[], Any]:
    """A call of torch's softmax attention by the backend of that name, on the same q, k, v; its result is [b, hq, t, e]."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    backend = getattr(SDPBackend, SDPA_BACKENDS[name])
    q, k, v = (x[n].transpose(1, 2) for n in "qkv")
    grouped = q.shape[1] != k.shape[1]

    def run() -> Any:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return run


def flash_attention_4(x: Mapping[str, Any], causal: bool) -> Callable[[], Any]:
    """A call of FlashAttention-4 (the CuTe DSL package) on the same q, k, v; its result is y [b, t, hq, e], or y and lse.

    Raises:
        ImportError: flash_attn.cute, or what it needs, is not installed.
    """
    from flash_attn.cute import flash_attn_func

    q, k, v = (x[name] for name in "qkv")
    return lambda: flash_attn_func(q, k, v, causal=causal)


def inputs(case: Case, seed: int = 0, device: str = "cuda") -> dict[str, Any]:
    """Normal q, k, v in bf16 and log_g = logsigmoid(normal + case.gates) in float32, on the current GPU or another device."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)

    def normal(heads: int, *width: int, dtype: Any = torch.bfloat16) -> Any:
        return torch.randn((case.b, case.t, heads, *width), generator=generator, device=device, dtype=dtype)

    gates = torch.nn.functional.logsigmoid(normal(case.h, dtype=torch.float32) + case.gates)
    return {"q": normal(case.query_heads, case.d), "k": normal(case.h, case.d), "v": normal(case.h, case.d), "log_g": gates}


def compile_ahead(cases: Sequence[Case], jobs: int, seconds: float = TIMEOUT_SECONDS) -> str:
    """Fill Triton's cache with the peer's kernels for the families of these cases, in `jobs` processes; what came of it, as a reason."""
    families: dict[tuple[int, int, bool], tuple[int, int, int, bool]] = {}
    for case in cases:
        group = case.query_heads // case.h
        for chunk in case.peer_chunks:
            whole = chunk == 0 or case.t <= chunk
            # The first case of a family is the one that the peer tunes itself on.
            families.setdefault((case.d, group, whole), (case.d, group, case.h, whole))
    begin = time.perf_counter()
    job = json.dumps(list(families.values()))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(i), str(jobs), job],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(jobs)
    ]
    failures = []
    for process in running:
        try:
            _, errors = process.communicate(timeout=max(1.0, begin + seconds - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
            _, errors = process.communicate()
            failures.append("stopped for time")
            continue
        if process.returncode:
            failures.append(short(errors.strip().splitlines()[-1] if errors.strip() else f"exit code {process.returncode}"))
    trouble = f"; {len(failures)} of them failed: {failures[0]}" if failures else ""
    return f"retention's kernels compiled ahead in {jobs} processes, {time.perf_counter() - begin:.0f} s{trouble}"


def share(index: int, jobs: int, families: Sequence[tuple[int, int, int, bool]]) -> None:
    """Compile every `jobs`-th config of each of the peer's kernels, by running it once.

    `families`: head size, query heads per key head, key heads, and whether it is the attention form.
    """
    import importlib

    import torch
    from triton.runtime.autotuner import Autotuner

    for name in MODULES:
        module = importlib.import_module(f"retention.{name}.triton")
        for tuner in vars(module).values():
            if isinstance(tuner, Autotuner):
                _take_share(tuner, index, jobs)
    with torch.no_grad():
        for d, group, h, whole in families:
            case = Case("ahead", 1, h, CHUNK if whole else AHEAD_LENGTH, d, hq=h * group)
            retention(inputs(case), CHUNK)()
            torch.cuda.synchronize()


def _take_share(tuner: Any, index: int, jobs: int) -> None:
    """Have a tuner run each config of its share once, time nothing, and keep no result."""

    def run_once(call: Callable[[], Any], quantiles: Any) -> list[float]:
        call()
        return [0.0, 0.0, 0.0]

    whole = tuner.prune_configs
    tuner.prune_configs = lambda keywords: whole(keywords)[index::jobs] or whole(keywords)[:1]
    tuner.cache_results = False
    tuner._do_bench = run_once


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One process of compile_ahead.")
    parser.add_argument("index", type=int)
    parser.add_argument("jobs", type=int)
    parser.add_argument("families", type=json.loads)
    options = parser.parse_args()
    share(options.index, options.jobs, options.families)
