"""Source -> cubin through the cache: one, or many in parallel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

from vidrial.build.nvrtc import Cubin, Resources, compile_source, cubin_key
from vidrial.build.once import begin, once
from vidrial.build.pool import TIMEOUT_SECONDS, CompilePool, Job
from vidrial.build.store import Store
from vidrial.build.toolchain import nvrtc
from vidrial.device import Device
from vidrial.errors import CompileError, CompileStopped, FrozenError
from vidrial.spec.kernel import Kernel
from vidrial.spec.source import Source

Name = TypeVar("Name", bound=Hashable)
Compiler = Callable[[Iterable[Job]], Iterator[tuple[Hashable, Cubin | CompileError]]]
_frozen: list[bool] = []


def freeze(on: bool) -> None:
    """Whether `build` refuses to compile from now on."""
    _frozen[:] = [True] if on else []


def frozen() -> bool:
    """Whether `build` refuses to compile."""
    return bool(_frozen)


def look_up(source: Source, arch: str) -> tuple[str, Cubin | None]:
    """The key of a source's cubin, and the cubin if it is in the cache.

    Raises:
        ToolchainError: a header is missing; or the cubin is not in the cache, and NVRTC is missing.
    """
    key = cubin_key(source.text, arch)
    entry = Store.shared().get(key)
    if entry is None:
        # The library itself may be of another version than its files' names said: what it compiles goes by its own.
        nvrtc()
        certain = cubin_key(source.text, arch)
        if certain != key:
            key, entry = certain, Store.shared().get(certain)
    if entry is None:
        return key, None
    return key, Cubin(entry.image, arch, Resources(**entry.meta["resources"]), "", 0.0, entry.meta.get("notes", ""))


def _publish(key: str, cubin: Cubin, source: Source) -> Cubin:
    meta = {"entry": source.entry, "arch": cubin.arch, "resources": asdict(cubin.resources), "seconds": round(cubin.seconds, 3)}
    meta |= {"notes": cubin.notes}
    Store.shared().put(key, cubin.image, source.text, meta)
    return cubin


def _compile(key: str, source: Source, arch: str, config: str) -> Cubin:
    return _publish(key, compile_source(source.text, source.entry, arch, config=config, includes=source.include_dirs), source)


def build(source: Source, arch: str, config: str = "", beside: Sequence[tuple[Source, str]] = ()) -> Cubin:
    """The cubin of a source: out of the cache, else compiled and published there, once for all threads. `config` appears in errors.

    `beside`: (source, config) of others that will be asked for next: where this one has to be compiled, they begin to compile in threads of
    their own, which NVRTC lets run side by side.

    Raises:
        CompileError: the source does not compile, or not within `TIMEOUT_SECONDS`. ToolchainError: NVRTC or a header is missing.
        FrozenError: it is not compiled yet, and compiling is frozen.
    """
    key, cubin = look_up(source, arch)
    if cubin is None and frozen():
        raise FrozenError(
            f"kernel {source.entry} for {arch} is not compiled, and compiling is frozen: {config}; "
            "prepare it before freeze(), or freeze(False)"
        )

    if cubin is not None:
        return cubin
    for other, its_config in beside:
        its_key, found = look_up(other, arch)
        if found is None:
            begin(its_key, partial(_compile, its_key, other, arch, its_config))
    try:
        return once(key, partial(_compile, key, source, arch, config), TIMEOUT_SECONDS)
    except TimeoutError:
        raise CompileStopped(
            f"kernel {source.entry} for {arch} did not compile within {TIMEOUT_SECONDS:g} s: {config}; "
            "make it smaller, or begin a new process if it has compiled before"
        ) from None


def build_many(
    sources: Mapping[Name, tuple[Source, str]], arch: str, jobs: int | None = None, compiler: Compiler | None = None
) -> Iterator[tuple[Name, Cubin | CompileError]]:
    """The cubins of many (source, config's text), in the order in which they are done; equal texts compile once.

    A source that does not compile yields its error in place of a cubin. `compiler`: what compiles, in place of `jobs` processes here.
    """
    waiting: dict[str, list[Name]] = {}
    for name, (source, _) in sources.items():
        key, cubin = look_up(source, arch)
        if cubin is not None:
            yield name, cubin
        else:
            waiting.setdefault(key, []).append(name)
    if not waiting:
        return
    first = ((key, *sources[names[0]]) for key, names in waiting.items())
    todo = (Job(key, source.text, source.entry, arch, config, source.include_dirs) for key, source, config in first)
    with contextlib.ExitStack() as stack:
        compile_many = compiler or stack.enter_context(CompilePool(jobs)).compile_many
        for done, result in compile_many(todo):
            names = waiting[str(done)]
            if isinstance(result, Cubin):
                _publish(str(done), result, sources[names[0]][0])
            yield from ((name, result) for name in names)


def cubin_of(kernel: Kernel, problem: Any, config: Any, arch: str | None = None) -> Cubin:
    """The compiled kernel of a config for `arch` (by default the current GPU's, else the H200's); needs no GPU.

    Raises:
        ConfigError: the config breaks a rule. CompileError: the source does not compile.
    """
    device = Device.default() if arch is None else Device.of(arch)
    kernel.check(problem, config, device)
    return build(kernel.source(problem, config), device.arch)
