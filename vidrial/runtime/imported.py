"""What waits for a library to be imported: an op for torch, a structure of arrays for torch and JAX. Nothing here imports either."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

from vidrial.errors import ArgumentError

T = TypeVar("T")


def when_imported(name: str, call: Callable[[], object]) -> None:
    """Call it now, or as soon as that module is imported."""
    if sys.modules.get(name) is not None:
        call()
        return
    waiting = next((finder for finder in sys.meta_path if isinstance(finder, _WhenImported) and finder.name == name), None)
    if waiting is None:
        waiting = _WhenImported(name)
        sys.meta_path.insert(0, waiting)
    waiting.calls.append(call)


class _WhenImported(MetaPathFinder):
    """The first finder of modules until one is imported: what waits for it is called right behind it."""

    def __init__(self, name: str) -> None:
        self.name, self.calls = name, list[Callable[[], object]]()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """That of the module, whose loader then calls what waits; none of anything else."""
        if name != self.name:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            while self.calls:
                self.calls.pop(0)()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def pytree(*arrays: str) -> Callable[[type[T]], type[T]]:
    """A decorator that makes a frozen dataclass a tree of arrays to torch and JAX: what their transformations take, carry and give back.

    `arrays`: the fields that are arrays; the others are part of its structure. It is taken apart and put together as it is, without its
    `__post_init__`: while it is mapped its arrays have an axis more, or are none at all. Of classes of one name, as when a notebook's cell runs again,
    JAX's exports hold the first.

    Raises:
        ArgumentError: the class is no dataclass, or has no such field.
    """

    def decorate(cls: Any) -> Any:
        known = [field.name for field in fields(cls)] if isinstance(cls, type) and is_dataclass(cls) else []
        if not known or not set(arrays) <= set(known):
            what = f"a dataclass with the fields {', '.join(known)}" if known else "no dataclass with fields"
            raise ArgumentError(f"pytree({', '.join(map(repr, arrays))}): {cls!r} is {what}; accepted: a dataclass that has those fields")
        name, rest = f"{cls.__module__}.{cls.__qualname__}", [field for field in known if field not in arrays]

        def flatten(x: Any) -> tuple[list[Any], tuple[Any, ...]]:
            return [getattr(x, name) for name in arrays], tuple(getattr(x, name) for name in rest)

        def with_keys(key: Callable[[str], Any]) -> Callable[[Any], Any]:
            def flatten_with_keys(x: Any) -> Any:
                children, context = flatten(x)
                return list(zip(map(key, arrays), children, strict=True)), context

            return flatten_with_keys

        def restore(children: Any, context: Any) -> Any:
            made = object.__new__(cls)
            for field, value in (*zip(arrays, children, strict=True), *zip(rest, context, strict=True)):
                object.__setattr__(made, field, value)
            return made

        def tell_jax() -> None:
            from jax import tree_util

            named = with_keys(tree_util.GetAttrKey)
            tree_util.register_pytree_with_keys(cls, named, lambda context, children: restore(children, context), flatten)
            export: Any = sys.modules.get("jax.export")
            if export is not None:  # earlier versions of JAX have none
                with suppress(ValueError):  # the name is taken
                    export.register_pytree_node_serialization(
                        cls,
                        serialized_name=name,
                        serialize_auxdata=lambda context: json.dumps(context).encode(),
                        deserialize_auxdata=lambda data: tuple(json.loads(data)),
                    )

        def tell_torch() -> None:
            from torch.serialization import add_safe_globals
            from torch.utils import _pytree

            # A checkpoint that holds one loads without a word, and so does an exported program, whose file has its example inputs.
            add_safe_globals([cls])
            _pytree.register_pytree_node(
                cls,
                flatten,
                restore,
                serialized_type_name=name,
                to_dumpable_context=list,
                from_dumpable_context=tuple,
                flatten_with_keys_fn=with_keys(_pytree.GetAttrKey),
            )

        when_imported("jax", tell_jax)
        when_imported("torch", tell_torch)
        return cls

    return decorate
