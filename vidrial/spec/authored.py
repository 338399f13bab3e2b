"""The functions of an author, called so that a slip is said where it was made: by the op or kernel, the function, the file and the line."""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

from vidrial.errors import DescriptionError, VidrialError

F = TypeVar("F", bound=Callable[..., Any])
GUARDED = "__vidrial_guarded__"
# Says what is wrong with a result, or None.
Fault = Callable[[Any], "str | None"]


def guarded(function: F, owner: str, name: str, fault: Fault) -> F:
    """`function`, the field `name` of `owner`: what it raises but Vidrial's own errors, and a result that has a fault, is a DescriptionError."""
    if not callable(function):
        raise DescriptionError(f"{owner}: {name} is {function!r}, which cannot be called; give a function")
    if getattr(function, GUARDED, False):
        return function

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        try:
            result = function(*arguments, **keywords)
        except VidrialError:
            raise
        except Exception as error:  # an author's code may raise anything
            raise _raised(owner, name, function, error) from error
        said = fault(result)
        if said is not None:
            raise DescriptionError(f"{owner}: {name}() gives {_short(result)}, {said}; see {_home(function)}")
        return result

    setattr(call, GUARDED, True)
    return cast(F, call)


def guarded_rules(function: F, owner: str, name: str) -> F:
    """The same of rules, which give (holds, reason) pairs."""
    if getattr(function, GUARDED, False):
        return function
    made = guarded(
        function, owner, name, lambda found: None if isinstance(found, Iterable) else "which is no series of (holds, reason) pairs"
    )

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Iterator[tuple[bool, str]]:
        try:
            for rule in made(*arguments, **keywords):
                if not (isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[1], str)):
                    raise DescriptionError(
                        f"{owner}: {name}() yields {_short(rule)}, which is no pair (it holds, the reason if it does not); see {_home(function)}"
                    )
                yield rule
        except VidrialError:
            raise
        except Exception as error:  # an author's code may raise anything
            raise _raised(owner, name, function, error) from error

    setattr(call, GUARDED, True)
    return cast(F, call)


def _raised(owner: str, name: str, function: Callable[..., Any], error: Exception) -> DescriptionError:
    return DescriptionError(f"{owner}: {name}() raises {type(error).__name__}: {' '.join(str(error).split())}; at {place(error, function)}")


def place(error: BaseException, function: Callable[..., Any] | None = None) -> str:
    """file:line of the last frame of an exception that is of the author's file, else of the last one."""
    frames = traceback.extract_tb(error.__traceback__)
    code = getattr(inspect.unwrap(function), "__code__", None) if function is not None else None
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    if own:
        return f"{own[-1].filename}:{own[-1].lineno}"
    return _home(function) if function is not None else f"{frames[-1].filename}:{frames[-1].lineno}"


def _home(function: Callable[..., Any]) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else getattr(function, "__qualname__", repr(function))


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:100]}..."


def of_type(*kinds: type, call: str = "") -> Fault:
    """The fault of what is of none of these types."""
    names = " or ".join(kind.__name__ for kind in kinds)
    return lambda found: None if isinstance(found, kinds) else f"which is no {names}; give {call or names}"


def grid_fault(found: object) -> str | None:
    """What is wrong with a grid."""
    if isinstance(found, tuple) and len(found) == 3 and all(isinstance(n, int) and not isinstance(n, bool) for n in found):
        return None
    return "which is not three counts of CTAs; give a tuple of three integers (x, y, z), by // and not by /"


def mapping_fault(what: str, kind: type) -> Fault:
    """The fault of what is no mapping of names to objects of a type."""

    def fault(found: object) -> str | None:
        if not isinstance(found, Mapping):
            return f"which is no dictionary of name -> {what}"
        wrong = [name for name, value in found.items() if not (isinstance(name, str) and isinstance(value, kind))]
        return f"where {wrong[0]} is no {what}; give name -> {what}" if wrong else None

    return fault


def sequence_fault(kind: type) -> Fault:
    """The fault of what is no sequence of objects of a type."""

    def fault(found: object) -> str | None:
        if not isinstance(found, Sequence) or any(not isinstance(entry, kind) for entry in found):
            return f"which is no sequence of {kind.__name__}s; a single one wants a comma: ({kind.__name__}(...),)"
        return None

    return fault
