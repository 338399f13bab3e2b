"""Ops by reference, and problems from keywords: what a command line or another process is told, as text."""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from vidrial.errors import ArgumentError
from vidrial.names import resolve
from vidrial.op import Op
from vidrial.problem import keyed_fields

# Name -> where its op lies; imported when asked for.
KNOWN = {"power_retention": "vidrial.kernels.power_retention.op:op"}


def find_op(reference: str) -> Op:
    """The op of a known name, of `module:attribute`, or of `path/to/file.py:attribute`.

    Raises:
        ArgumentError: there is no such op.
    """
    target = KNOWN.get(reference, reference)
    if ":" not in target:
        raise ArgumentError(f"op {reference!r} is not known; accepted: {', '.join(KNOWN)}, module:attribute, or path/to/file.py:attribute")
    found = resolve(target)
    if not isinstance(found, Op):
        raise ArgumentError(f"{reference!r} names a {type(found).__name__}, not an Op; give the Op's own name after the colon")
    return found


def parse_keywords(op: Op, words: Sequence[str]) -> dict[str, list[Any]]:
    """`--t 10007 --d=64 --gated false` -> name -> its values, one a mention, typed as the op's `example` annotates them.

    Raises:
        ArgumentError: a keyword that `example` does not take, a value of another type, or one that is missing.
    """
    accepted = _parameters(op)
    waiting, found = list(words), dict[str, list[Any]]()
    while waiting:
        word = waiting.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in accepted:
            raise ArgumentError(f"{word!r} is not an option of this command or a keyword of its op {op.name}: {usage(op)}")
        if not equals:
            if not waiting:
                raise ArgumentError(f"--{name} needs a value: {usage(op)}")
            text = waiting.pop(0)
        found.setdefault(name, []).append(_value(name, text, accepted[name]))
    return found


def make_problem(op: Op, keywords: Mapping[str, Any]) -> Any:
    """The problem that `op.example` makes of the keywords.

    Raises:
        ArgumentError: a keyword is missing, or a size is not positive.
    """
    required = [n for n, p in inspect.signature(op.example).parameters.items() if p.default is p.empty and n not in keywords]
    if required:
        raise ArgumentError(f"{op.name} needs {', '.join(f'--{name}' for name in required)}; its keywords: {usage(op)}")
    problem = op.example(**keywords)
    for name, size in keyed_fields(problem).items():
        if isinstance(size, int) and size < 1:
            raise ArgumentError(f"{name}={size} is not a size; accepted: at least 1")
    return problem


def usage(op: Op) -> str:
    """The keywords of an op with their defaults, on one line."""
    parameters = inspect.signature(op.example).parameters.values()
    return " ".join(f"--{p.name} {p.default}" if p.default is not p.empty else f"--{p.name} ..." for p in parameters)


def _parameters(op: Op) -> dict[str, Any]:
    hints = get_type_hints(op.example)
    return {name: hints.get(name, str) for name in inspect.signature(op.example).parameters}


def _value(name: str, text: str, annotation: Any) -> Any:
    choices = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    for kind in choices:
        if kind is types.NoneType and text.lower() == "none":
            return None
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind in (int, float, str):
            try:
                return kind(text)
            except ValueError:
                continue
    names = " or ".join("none" if kind is types.NoneType else "true, false" if kind is bool else str(kind.__name__) for kind in choices)
    raise ArgumentError(f"--{name} {text!r} is not a value of it; accepted: {names}")
