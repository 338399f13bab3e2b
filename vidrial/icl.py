"""What context is worth: a model's loss against the number of tokens before the predicted one, with errors.

The main measure is `by_context`: the same target tokens are predicted from more and more context, so that what they are cancels. A model is
any function from tokens [windows, t] to the losses of all but the first token of each, [windows, t - 1], in nats. Errors are over windows.
"""

from __future__ import annotations

import hashlib
import itertools
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vidrial.errors import ArgumentError, ArgumentTypeError

__all__ = [
    "Curve",
    "Knee",
    "Losses",
    "Slope",
    "by_context",
    "by_position",
    "excess",
    "knee",
    "load",
    "losses",
    "positions",
    "slope",
]

Floats: TypeAlias = NDArray[np.float64]
Predict: TypeAlias = Callable[[NDArray[np.int64]], ArrayLike]
# Knots that a knee is looked for at, on a logarithmic grid between the curve's second point and its last but one.
KNOTS = 60
# A bend below this, of the curve's size, is rounding.
ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Losses:
    """Loss [windows, length] of every position: column i has i + 1 tokens of context. `targets` is a digest of what was predicted."""

    values: Floats
    targets: str = ""

    def save(self, path: str | Path) -> None:
        """Write an .npz that `load` and `vidrial icl` read."""
        _save(path, losses=self.values, targets=np.array(self.targets))


@dataclass(frozen=True, eq=False)
class Curve:
    """Loss at several amounts of context.

    `context` [points] is the least context of a point's targets, in tokens; `log2` [points] the mean of its logarithm, which lines are fitted
    against; `weight` [points] how many targets per window it is the mean of; `values` [windows, points].
    """

    context: NDArray[np.int64]
    log2: Floats
    weight: NDArray[np.int64]
    values: Floats
    targets: str = ""

    @property
    def mean(self) -> Floats:
        """Over the windows, [points]."""
        found: Floats = self.values.mean(0)
        return found

    @property
    def error(self) -> Floats:
        """The standard error of the mean, [points]; NaN of a single window."""
        return _error(self.values)

    def between(self, low: float | None = None, high: float | None = None) -> Curve:
        """The points whose context is at least `low` and at most `high` tokens.

        Raises:
            ArgumentError: fewer than two are.
        """
        low, high = low or 0, np.inf if high is None else high
        kept = (self.context >= low) & (self.context <= high)
        if kept.sum() < 2:
            raise ArgumentError(
                f"{kept.sum()} points of the curve lie between {low:g} and {high:g} tokens; its contexts: {self.context.tolist()}. "
                "Accepted: limits that two or more of them lie between"
            )
        return Curve(self.context[kept], self.log2[kept], self.weight[kept], self.values[:, kept], self.targets)

    def save(self, path: str | Path) -> None:
        """Write an .npz that `load` and `vidrial icl` read."""
        _save(path, context=self.context, log2=self.log2, weight=self.weight, values=self.values, targets=np.array(self.targets))


@dataclass(frozen=True)
class Slope:
    """Nats per doubling of the context, with its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Knee:
    """Where a curve bends: tokens of context, with the ends of their interval, and nats per doubling on either side."""

    at: float
    low: float
    high: float
    before: float
    after: float


def losses(predict: Predict, tokens: ArrayLike, length: int, windows: int, batch: int = 16) -> Losses:
    """The losses of `windows` stretches of `length` predicted tokens each, spread over a stream of tokens [n] without overlap.

    `predict` is called with at most `batch` windows at once.

    Raises:
        ArgumentTypeError, ArgumentError: tokens or a number cannot be, the stream is too short, or `predict` returns something else than losses.
    """
    stream = _stream(tokens)
    _positive(length=length, windows=windows, batch=batch)
    _enough(stream, windows * length + 1, f"{windows} windows of {length} predicted tokens")
    starts = np.linspace(0, len(stream) - 1 - length, windows).astype(np.int64)
    cut = stream[starts[:, None] + np.arange(length + 1)]
    return Losses(_predicted(predict, cut, batch), _digest(cut[:, 1:]))


def by_context(
    predict: Predict, tokens: ArrayLike, contexts: Sequence[int], targets: int = 32, windows: int = 512, batch: int = 16
) -> Curve:
    """The loss of the same `windows` x `targets` tokens, from 1 or more tokens of context to many: a point for each of `contexts`.

    Each target of a window is predicted from the given number of tokens before the window's first target, and from the targets before
    itself. Targets are spread over the stream of tokens [n] without overlap.

    Raises:
        ArgumentTypeError, ArgumentError: as `losses`; or `contexts` does not rise.
    """
    stream, context = _stream(tokens), np.asarray(contexts)
    _positive(targets=targets, windows=windows, batch=batch, **{f"contexts[{i}]": c for i, c in enumerate(context.tolist())})
    if context.ndim != 1 or len(context) == 0 or (np.diff(context) <= 0).any():
        raise ArgumentError(f"contexts={context.tolist()}; accepted: numbers of tokens that rise")
    longest = int(context[-1])
    _enough(stream, longest + windows * targets, f"{windows} windows of {targets} targets behind {longest} tokens of context")
    starts = np.linspace(longest, len(stream) - targets, windows).astype(np.int64)
    values = []
    for c in context.tolist():
        cut = stream[starts[:, None] + np.arange(-c, targets)]
        values.append(_predicted(predict, cut, batch)[:, -targets:].mean(1))
    log2 = np.log2(context[:, None] + np.arange(targets)).mean(1)
    predicted = stream[starts[:, None] + np.arange(targets)]
    return Curve(context.astype(np.int64), log2, np.full(len(context), targets), np.stack(values, 1), _digest(predicted))


def positions(length: int) -> list[int]:
    """Where the bins of `by_position` begin, and the end of the last: 1, 2, 4, 8, 12, 16, 24, 32, 48, ... tokens of context."""
    _positive(length=length)
    steps = itertools.chain([1, 2, 4], *([2**i, 3 * 2 ** (i - 1)] for i in range(3, length.bit_length() + 1)))
    return [*itertools.takewhile(lambda edge: edge <= length, steps), length + 1]


def by_position(found: Losses | ArrayLike, edges: Sequence[int] | None = None) -> Curve:
    """The loss by position in the window, [windows, length] cut into bins of context: a point for each.

    Windows differ in what they hold, and so do positions: two models differ by `excess` alone, and a knee of one curve is no evidence.

    Raises:
        ArgumentTypeError, ArgumentError: losses are no finite matrix, or edges do not rise within it.
    """
    given = found if isinstance(found, Losses) else Losses(_matrix(found, "losses"))
    length = given.values.shape[1]
    edge = np.asarray(positions(length) if edges is None else edges)
    if edge.ndim != 1 or len(edge) < 2 or edge[0] < 1 or edge[-1] > length + 1 or (np.diff(edge) <= 0).any():
        raise ArgumentError(f"edges={edge.tolist()}; accepted: two or more tokens of context that rise, from 1 to {length + 1}")
    bins = list(itertools.pairwise(edge.tolist()))
    log2 = np.array([np.log2(np.arange(a, b)).mean() for a, b in bins])
    values = np.stack([given.values[:, a - 1 : b - 1].mean(1) for a, b in bins], 1)
    return Curve(edge[:-1].astype(np.int64), log2, np.diff(edge), values, given.targets)


def excess(curve: Curve, against: Curve) -> Curve:
    """How much more `curve` loses than `against` at each point, window by window: what both predicted cancels.

    Raises:
        ArgumentError: they are not of the same windows, points and targets.
    """
    if curve.values.shape != against.values.shape or (curve.context != against.context).any():
        found = [f"{c.values.shape[0]} windows at {c.context.tolist()} tokens" for c in (curve, against)]
        raise ArgumentError(f"the curves are of {found[0]} and {found[1]}; accepted: curves of the same windows and points")
    if curve.targets and against.targets and curve.targets != against.targets:
        raise ArgumentError("the curves predict different tokens; measure both models on the same ones, or nothing cancels")
    return Curve(curve.context, curve.log2, curve.weight, curve.values - against.values, curve.targets)


def slope(curve: Curve, low: float | None = None, high: float | None = None) -> Slope:
    """The line through the points with `low` to `high` tokens of context, each weighed by its targets.

    Raises:
        ArgumentError: fewer than two points lie there.
    """
    part = curve.between(low, high)
    w = part.weight / part.weight.sum()
    x = part.log2 - w @ part.log2
    # Each window's own slope; the mean of them is the slope of the mean.
    own = part.values @ (w * x) / (w @ x**2)
    return Slope(float(own.mean()), float(_error(own[:, None])[0]))


def knee(
    curve: Curve, low: float | None = None, high: float | None = None, confidence: float = 0.99, samples: int = 1000, seed: int = 0
) -> Knee | None:
    """Where the curve bends: the join of the two lines that fit it best; None unless a bootstrap excludes that it is one line.

    Windows are drawn again, whole, `samples` times. The largest bend of the curve, in its errors, over all places where a knee could be, is
    compared with the largest bends of the drawn curves around the mean: so the choice of the place is paid for, and a straight
    curve gives None as often as `confidence` says. The interval of `at` holds that part of the drawn curves, too.

    Raises:
        ArgumentError: fewer than four points or two windows, or the confidence is not between 0 and 1.
    """
    part = curve.between(low, high)
    n, points = part.values.shape
    if points < 4 or n < 2:
        raise ArgumentError(f"{points} points of {n} windows; accepted: 4 points or more, of 2 windows or more")
    if not 0 < confidence < 1:
        raise ArgumentError(f"confidence={confidence}; accepted: between 0 and 1")
    _positive(samples=samples)
    knots = np.linspace(part.log2[1], part.log2[-2], KNOTS)
    bends = _bends(part, knots)
    own = part.values @ bends.T  # [windows, knots]
    rounding = ROUNDING * float(np.abs(part.values).max() * np.sqrt(part.weight.sum())) + np.finfo(float).tiny
    mean, error = own.mean(0), np.maximum(_error(own), rounding)
    generator = np.random.default_rng(seed)
    drawn = np.stack([np.bincount(generator.integers(0, n, n), minlength=n) @ own / n for _ in range(samples)])
    straight = np.quantile((np.abs(drawn - mean) / error).max(1), confidence)
    if (np.abs(mean) / error).max() <= max(straight, 1.0):
        return None
    best = int(np.argmax(np.abs(mean)))
    side = (1 - confidence) / 2
    ends = np.quantile(knots[np.argmax(np.abs(drawn), 1)], [side, 1 - side])
    lines = np.stack((np.ones(points), part.log2, np.maximum(part.log2 - knots[best], 0)), 1)
    root = np.sqrt(part.weight)[:, None]
    (_, before, bend), *_ = np.linalg.lstsq(lines * root, part.mean * root[:, 0], rcond=None)
    return Knee(float(2 ** knots[best]), float(2 ** ends[0]), float(2 ** ends[1]), float(before), float(before + bend))


def _bends(curve: Curve, knots: Floats) -> Floats:
    """[knots, points]: what the squared product with a curve's means is, is how much a join at the knot improves the weighted fit of a line."""
    root = np.sqrt(curve.weight)
    line, _ = np.linalg.qr(np.stack((np.ones_like(curve.log2), curve.log2), 1) * root[:, None])
    hinge = np.maximum(curve.log2 - knots[:, None], 0) * root
    hinge -= hinge @ line @ line.T
    made: Floats = hinge / np.linalg.norm(hinge, axis=1, keepdims=True) * root
    return made


def load(path: str | Path) -> Losses | Curve:
    """What `save` wrote; or any .npz with an array `losses` [windows, length].

    Raises:
        ArgumentError: there is no such file, or it holds neither.
    """
    # NOTE: of what is no zip NumPy makes one array, or advises to unpickle it.
    if Path(path).is_file() and not zipfile.is_zipfile(path):
        raise ArgumentError(f"{path} is no .npz; accepted: losses [windows, length] by that name, or what Curve.save writes")
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise ArgumentError(f"{path}: no such file; accepted: an .npz of losses, or one that Curve.save wrote") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ArgumentError(f"{path} cannot be read as an .npz ({error}); accepted: one of losses, or one that Curve.save wrote") from None
    targets = str(held.get("targets", ""))
    if "losses" in held:
        return Losses(_matrix(held["losses"], f"losses of {path}"), targets)
    shapes = {name: held[name].shape for name in ("context", "log2", "weight", "values") if name in held}
    if len(shapes) < 4 or {shapes[name] for name in ("context", "log2", "weight")} != {shapes["values"][-1:]}:
        raise ArgumentError(
            f"{path} holds {', '.join(held) or 'no named arrays'}; accepted: losses [windows, length], or what Curve.save writes"
        )
    return Curve(held["context"], held["log2"], held["weight"], _matrix(held["values"], f"values of {path}"), targets)


def _save(path: str | Path, **arrays: Any) -> None:
    try:
        # A file of that very name: NumPy appends .npz to other names.
        with open(path, "wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise ArgumentError(f"{path} cannot be written: {error.strerror}; name a file in a folder that exists") from None


def _error(values: Floats) -> Floats:
    """Standard error of the mean of the first axis."""
    n = len(values)
    found: Floats = values.std(0, ddof=1) / n**0.5 if n > 1 else np.full(values.shape[1], np.nan)
    return found


def _stream(tokens: ArrayLike) -> NDArray[np.int64]:
    stream = np.asarray(tokens)
    if stream.ndim != 1 or stream.dtype.kind not in "iu":
        raise ArgumentTypeError(f"tokens are {stream.dtype} {list(stream.shape)}; accepted: integers [n]")
    return stream.astype(np.int64, copy=False)


def _positive(**numbers: Any) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ArgumentError(f"{name}={value!r}; accepted: an integer, 1 or more")


def _enough(stream: NDArray[np.int64], needed: int, what: str) -> None:
    if len(stream) < needed:
        raise ArgumentError(f"the stream has {len(stream)} tokens; {what}, without overlap, need {needed}")


def _matrix(values: ArrayLike, name: str) -> Floats:
    found = np.asarray(values)
    if found.dtype.kind != "f" or found.ndim != 2 or 0 in found.shape:
        raise ArgumentTypeError(f"{name}: {found.dtype} {list(found.shape)}; accepted: floating point [windows, positions]")
    if not np.isfinite(found).all():
        raise ArgumentError(
            f"{name}: {int((~np.isfinite(found)).sum())} of {found.size} are not finite; accepted: finite numbers. Leave such windows out"
        )
    return found.astype(np.float64, copy=False)


def _batches(cut: NDArray[np.int64], batch: int) -> Iterator[NDArray[np.int64]]:
    for begin in range(0, len(cut), batch):
        yield cut[begin : begin + batch]


def _predicted(predict: Predict, cut: NDArray[np.int64], batch: int) -> Floats:
    """Losses of all but the first token of each window."""
    found = []
    for part in _batches(cut, batch):
        values = _matrix(predict(part), "the losses of `predict`")
        if values.shape != (len(part), part.shape[1] - 1):
            wanted = f"[{len(part)}, {part.shape[1] - 1}]"
            raise ArgumentError(
                f"`predict` made losses {list(values.shape)} of tokens {list(part.shape)}; accepted: {wanted}, none of the first"
            )
        found.append(values)
    return np.concatenate(found)


def _digest(predicted: NDArray[np.int64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(predicted, "<i8").tobytes()).hexdigest()[:16]
