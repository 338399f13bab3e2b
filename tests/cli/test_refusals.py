"""What the function refuses, the command line refuses with the same sentence, and the other way round: both say what the rules say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vidrial.cli import main as cli
from vidrial.errors import VidrialError
from vidrial.kernels.flash_attention import flash_attention
from vidrial.kernels.power_retention import power_retention, power_retention_vjp
from vidrial.spec.registry import find_op

EXAMPLES = Path(__file__).parents[2] / "examples"
NAN = float("nan")


def zeros(*shape: int, dtype: str = "float16") -> np.ndarray:
    """Of any size: all elements share one."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def qkv(b: int = 1, t: int = 100, hq: int = 16, h: int = 16, d: int = 64, e: int = 64, dtype: str = "float16") -> tuple[np.ndarray, ...]:
    return zeros(b, t, hq, d, dtype=dtype), zeros(b, t, h, d, dtype=dtype), zeros(b, t, h, e, dtype=dtype)


def example(name: str, function: str) -> Any:
    op = find_op(f"{EXAMPLES}/{name}/{name}.py:op")
    return getattr(sys.modules[op.problem.__module__], function)


# A call, and what asks the command line for the same.
POWER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "--hq 3 --h 2": ({"hq": 3, "h": 2}, {}),
    "--d 48 --e 64": ({"d": 48}, {}),
    "--e 48": ({"e": 48}, {}),
    "--degree 3": ({}, {"degree": 3}),
    "--degree 6": ({}, {"degree": 6}),
    "--scale nan": ({}, {"scale": NAN}),
    "--scale 1e300": ({}, {"scale": 1e300}),
    "--t 99999999999": ({"t": 99999999999}, {}),
    "--dtype float32": ({"dtype": "float32"}, {}),
    "--dtype int32": ({"dtype": "int32"}, {}),
    "--normalize mean": ({}, {"normalize": "mean"}),
    "--b 100000": ({"b": 100000}, {}),
}
FLASH: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "--hq 3 --h 2": ({"hq": 3, "h": 2}, {}),
    "--hq 2000 --h 1": ({"hq": 2000, "h": 1}, {}),
    "--d 48 --e 64": ({"d": 48}, {}),
    "--e 48": ({"e": 48}, {}),
    "--scale nan": ({}, {"scale": NAN}),
    "--scale 0": ({}, {"scale": 0.0}),
    "--softcap nan": ({}, {"softcap": NAN}),
    "--softcap 0": ({}, {"softcap": 0.0}),
    "--t 99999999999": ({"t": 99999999999}, {}),
    "--dtype float32": ({"dtype": "float32"}, {}),
    "--b 1000000": ({"b": 1000000}, {}),
}
CALLS: dict[str, Any] = {
    **{f"power_retention {w}": (lambda s=s, o=o: power_retention(*qkv(**s), target="host", **o)) for w, (s, o) in POWER.items()},
    **{
        f"power_retention_backward {w}": (lambda s=s, o=o: power_retention_vjp(*qkv(**s), target="host", **o))
        for w, (s, o) in POWER.items()
    },
    **{f"flash_attention {w}": (lambda s=s, o=o: flash_attention(*qkv(**s), target="host", **o)) for w, (s, o) in FLASH.items()},
    "softmax --n 10 --dtype float16": lambda: example("softmax", "softmax")(np.zeros((3, 10), np.float16)),
    "gemm --dtype float32": lambda: example("gemm", "linear")(np.zeros((3, 8), np.float32), np.zeros((5, 8), np.float32)),
}
DEFAULTS = {
    "power_retention": "--t 100 --gated false",
    "flash_attention": "--t 100 --d 64",
    "power_retention_backward": "--t 100 --gated false",
}


def asked(words: str, command: str) -> list[str]:
    """The command line for a case: sizes that it does not give are those of `qkv`."""
    name, *given = words.split()
    defaults = DEFAULTS.get(name, "").split()
    pairs = dict(zip(defaults[::2], defaults[1::2], strict=True)) | dict(zip(given[::2], given[1::2], strict=True))
    where = name if name in DEFAULTS else f"{EXAMPLES}/{name}/{name}.py:op"
    return [command, where, *(w for pair in pairs.items() for w in pair), *([] if command == "check" else ["--arch", "h200"])]


@pytest.mark.parametrize("case", CALLS)
def test_the_function_and_the_command_line_refuse_alike(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(VidrialError) as raised:
        CALLS[case]()
    for command in ("explain", "check", "source"):
        with pytest.raises(SystemExit) as ended:
            cli.main(asked(case, command))
        assert (ended.value.code, capsys.readouterr().err) == (2, f"vidrial: {raised.value}\n"), command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("gemm --k 99999999999", "argument k: 99999999999 does not fit int"),
        ("softmax --n 99999999999", "argument n: 99999999999 does not fit int"),
        ("gemm --dtype float32 --m 0", "m=0 is not a size; accepted: at least 1"),
    ],
)
def test_what_no_array_can_be_is_refused_too(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("explain", "compile", "check"):
        with pytest.raises(SystemExit) as ended:
            cli.main(asked(words, command))
        captured = capsys.readouterr()
        assert ended.value.code == 2 and captured.err.startswith(f"vidrial: {said}") and "Traceback" not in captured.err
