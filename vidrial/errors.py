"""One class per kind of mistake. Every message names the thing, what came, what is accepted, and what to do."""

from __future__ import annotations


class VidrialError(Exception):
    """Base of everything that Vidrial raises on purpose."""


class ArgumentError(VidrialError, ValueError):
    """An argument has a value that is not accepted."""


class ArgumentTypeError(VidrialError, TypeError):
    """An argument has a type, dtype or device that is not accepted."""


class UnsupportedError(VidrialError, ValueError):
    """A valid request that this version does not serve: it is refused, never answered wrongly."""


class TracedError(UnsupportedError):
    """An array that JAX traces, where an op's own function was asked for its memory."""


class LayoutError(VidrialError, ValueError):
    """A layout, atom or tiled object that cannot be what it claims to be."""


class ConfigError(VidrialError, ValueError):
    """A config that breaks one of its kernel's rules."""


class NoValidConfig(VidrialError, RuntimeError):
    """No config is left: all were rejected, or all failed."""


class TemplateError(VidrialError, ValueError):
    """A template that does not render, or a value that may not reach a source."""


class ToolchainError(VidrialError, RuntimeError):
    """A compiler, header or library is missing or unusable; the message holds the command that installs it."""


class CompileError(VidrialError, RuntimeError):
    """A rendered source that does not compile; names the template's line and the config."""


class CompileStopped(CompileError):
    """A compile that crashed its compiler or took too long: another time, on another machine, it may go through."""


class LaunchError(VidrialError, RuntimeError):
    """A launch that the driver, or the host target, refused or aborted."""


class OutOfMemoryError(LaunchError):
    """The GPU has no room for a call's workspace, with any config."""


class StoreError(VidrialError, OSError):
    """A cache directory that cannot be used as asked."""


class SweepError(VidrialError, RuntimeError):
    """A sweep that cannot go on; what was measured is kept."""


class FrozenError(VidrialError, RuntimeError):
    """A call would have had to compile while compiling is frozen or impossible (a CUDA-graph capture)."""


class CheckError(VidrialError, AssertionError):
    """An op whose kernels are not right on the host target; names the config, what was found and the kernel's line."""
