"""Ops by reference, and problems from keywords: what a command line or another process is given, as text."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from vidrial.errors import ArgumentError, ToolchainError, VidrialError
from vidrial.installation import ENTRY_POINTS, named_ops
from vidrial.spec.fields import C, P, keyed_fields, least_values
from vidrial.spec.op import Op


def reference_of(op: Op) -> str:
    """The name under which another process finds an op.

    Raises:
        ArgumentError: it is not an attribute of the module that its functions or dataclasses are from.
    """
    homes = (op.problem, op.stages, op.sample, op.reference, op.config, op.rules, op.outputs)
    for module in (sys.modules.get(getattr(home, "__module__", "")) for home in homes):
        for name, value in vars(module).items() if module else ():
            if value is op:
                return f"{_importable(module)}:{name}"
    raise ArgumentError(f"op {op.name} cannot be found by another process: keep it at the top level of the module of its dataclasses")


def resolve(reference: str) -> Any:
    """What `module:attribute` or `file.py:attribute` names.

    Raises:
        ArgumentError: there is no such module, file or attribute, or it cannot be imported.
    """
    home, _, name = reference.rpartition(":")
    try:
        return getattr(_load_file(str(Path(home).resolve())) if home.endswith(".py") else importlib.import_module(home), name)
    except VidrialError:
        raise
    except (ImportError, AttributeError, ValueError, TypeError, OSError) as error:
        raise ArgumentError(f"{reference!r} names nothing ({error}); accepted: module:attribute or file.py:attribute") from error
    except (Exception, SystemExit) as error:
        raise ArgumentError(f"{reference!r} cannot be imported: {_on_one_line(error)}") from error


@functools.lru_cache
def _load_file(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"vidrial_user_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Annotations are resolved through sys.modules.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _importable(module: Any) -> str:
    if module.__name__ != "__main__":
        file = str(module.__file__ or "")
        return file if module.__name__.startswith("vidrial_user_") else str(module.__name__)
    spec = getattr(module, "__spec__", None)
    return str(spec.name) if spec is not None else str(Path(module.__file__).resolve())


def find_op(reference: str) -> Op:
    """The op of a known name, of `module:attribute`, or of `path/to/file.py:attribute`.

    Raises:
        ArgumentError: there is no such op, or the module of its entry point cannot be imported.
    """
    known = named_ops()
    if reference in known:
        return _entry_point(reference, known[reference])
    if ":" not in reference:
        names = "".join(f"{name}, " for name in known)
        meant = f"; {reference}:op, if op is what the file calls it" if reference.endswith(".py") else ""
        raise ArgumentError(f"op {reference!r} is not known; accepted: {names}module:attribute, or path/to/file.py:attribute{meant}")
    return _checked(reference, resolve(reference))


def _entry_point(name: str, reference: str) -> Op:
    try:
        found = importlib.metadata.EntryPoint(name, reference, ENTRY_POINTS).load()
    except ToolchainError:
        raise
    except (Exception, SystemExit) as error:
        # Whatever another package's module raises, the caller is told which op it was.
        raise ArgumentError(f"op {name}: its entry point {reference} cannot be imported: {_on_one_line(error)}") from error
    return _checked(name, found)


def _on_one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _checked(reference: str, found: object) -> Op:
    if not isinstance(found, Op):
        raise ArgumentError(f"{reference!r} names a {type(found).__name__}, not an Op; give the Op's own name after the colon")
    return found


def parse_keywords(op: Op, words: Sequence[str]) -> dict[str, list[Any]]:
    """`--t 10007 --d=64 --gated false` -> name -> its values, one per mention, typed as the op's `example` annotates them.

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


def make_problem(op: Op[P, C], keywords: Mapping[str, Any]) -> P:
    """The problem that `op.example` makes of the keywords.

    Raises:
        ArgumentError: a keyword is missing, or a size is not positive.
    """
    required = [n for n, p in inspect.signature(op.example).parameters.items() if p.default is p.empty and n not in keywords]
    if required:
        raise ArgumentError(f"{op.name} needs {', '.join(f'--{name}' for name in required)}; its keywords: {usage(op)}")
    problem = op.example(**keywords)
    sizes = keyed_fields(problem)
    for name, least in least_values(problem).items():
        if isinstance(size := sizes[name], int) and size < least:
            raise ArgumentError(f"{name}={size} is not a size; accepted: at least {least}")
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
