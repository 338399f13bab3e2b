"""The verdict on a case: "" for a right result or a refusal that was due, else what is wrong."""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Mapping
from typing import Any

import numpy as np

from examples.gemm import gemm
from examples.scan import scan
from examples.softmax import softmax
from vidrial.errors import VidrialError
from vidrial.kernels import flash_attention as flash_package
from vidrial.kernels import power_retention as power_package
from vidrial.kernels.flash_attention.op import Y_BOUNDS as flash_bounds
from vidrial.kernels.flash_attention.op import check as check_flash
from vidrial.kernels.flash_attention.op import example as flash_example
from vidrial.kernels.flash_attention.reference import attention, visible
from vidrial.kernels.power_retention import op as power
from vidrial.kernels.power_retention.back import op as back
from vidrial.kernels.power_retention.reference import LOWEST_LOG_GATE, Gradients, attention_form, gradients, pair_rows

from .arrays import COLUMN, Made, make
from .cases import Case
from .families import configs_of
from .spoiled import WRONG

Arrays = dict[str, Any]
# Half an ulp, relative; and the smallest number, of what results are rounded to.
HALF_ULP = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST = {"float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126}
LARGEST = {"float32": 3.4e38, "float16": 65504.0, "bfloat16": 3.38e38}
# NumPy's float32, of the terms that are summed; the tests of power retention have 2e-7 for friendlier inputs.
FLOAT32 = 1e-6
# Of a token that gates have forgotten: the kernels do not read it.
FORGOTTEN = -80.0
# Rows before a value that is not finite that it may reach in the kernels (docs/power_retention.md).
BAND = 127
# Gradients, of each head but for its worst row in a hundred, which WORST_ROW bounds: closed gates and degree 4 have rows in which one or two
# keys count (tests/back_host.py); and that of the gates.
GRADIENT_BOUND, DLOG_G_BOUND = 8e-3, 1.5e-2
# How much inputs are changed to see what rounding may change of a gradient, and how many times that it may be off.
NUDGE, NUDGES = 2.0**-22, 30.0


class Wrong(Exception):
    """What is wrong with a result."""


def judge(case: Case) -> str:
    """ "" if the call is right, or refused where it must be; never an exception."""
    try:
        with np.errstate(all="ignore"), configs_of(case.family):
            _judge(case)
    except Wrong as found:
        return str(found)
    return ""


def _judge(case: Case) -> None:
    made = make(case)
    options = {
        **case.keywords,
        **({"target": "host"} if case.target == "host" and case.op in ("power_retention", "flash_attention") else {}),
    }
    state = _state(case, made) if case.split else None
    if case.wrong:
        WRONG[case.wrong].change(made.arrays, options)
    try:
        found = _call(case, made, options, state)
    except VidrialError as error:
        if not case.wrong:
            raise Wrong(f"refused: {type(error).__name__}: {error}") from error
        if WRONG[case.wrong].word not in str(error):
            raise Wrong(f"the refusal does not say {WRONG[case.wrong].word!r}: {error}") from error
        return
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise Wrong(f"untyped: {type(error).__name__}: {error} ({where.filename}:{where.lineno})") from error
    finally:
        if made.altered():
            raise Wrong("altered: what was passed is another array now")
    if case.wrong:
        raise Wrong(f"accepted: {case.wrong}")
    results = {name: _plain(case, made, name, x) for name, x in found.items()}
    {"power_retention": _check_power, "flash_attention": _check_flash}.get(case.op, _check_example)(case, made, results)


# --- the call ---


def _call(case: Case, made: Made, options: Arrays, state: Any) -> Arrays:
    arrays = made.arrays
    if case.op == "softmax":
        return {"y": softmax.softmax(arrays["x"])}
    if case.op == "scan":
        return {"y": scan.scan(arrays["x"])}
    if case.op == "gemm":
        return {"y": gemm.linear(arrays["a"], arrays["b"], arrays["bias"])}
    inputs = {name: arrays[name] for name in case.names}
    if case.op == "flash_attention":
        y = flash_package.flash_attention(**inputs, **options)
        return {"y": y[0], "lse": y[1]} if options.get("return_lse") is True else {"y": y}
    if state is not None:
        options.setdefault("initial_state", state)
    if case.final:
        options.setdefault("output_final_state", True)
    if case.gradient == "autograd":
        inputs = {name: x.detach().requires_grad_() if hasattr(x, "detach") and x.is_floating_point() else x for name, x in inputs.items()}
    if case.gradient != "vjp":
        y = power_package.power_retention(**inputs, **options)
    else:
        y, vjp = power_package.power_retention_vjp(**inputs, **options)
    found: Arrays = {"y": y} if not case.final else {"y": y[0], "S": y[1].S, "Z": y[1].Z}
    if case.gradient == "vjp":
        back = vjp(arrays["dy"])
        found |= {name: getattr(back, name) for name in ("dq", "dk", "dv", "dlog_g") if getattr(back, name) is not None}
    if case.gradient == "autograd":
        found["y"].backward(arrays["dy"])
        found |= {f"d{name}": x.grad for name, x in inputs.items()}
    return found


def _state(case: Case, made: Made) -> Any:
    """What the tokens before the call leave behind, as an initial state."""
    s, z = _exact_state(case, made, slice(0, case.split))
    s, z = np.ascontiguousarray(s, np.float32), np.ascontiguousarray(z, np.float32)
    if case.library == "torch":
        import torch

        return power_package.PowerState(torch.from_numpy(s), torch.from_numpy(z))
    return power_package.PowerState(s, z)


def _exact_state(case: Case, made: Made, tokens: slice) -> tuple[np.ndarray, np.ndarray]:
    k, v, gates = made.values["k"][:, tokens], made.values["v"][:, tokens], _gates(case, made)[:, tokens]
    first, second, _ = pair_rows(case.d)
    decay = np.exp(np.flip(np.cumsum(np.flip(gates, 1), 1), 1) - gates)[..., None]
    s = np.einsum("bthp,bthe->bhpe", decay * k[..., first] * k[..., second], v)
    return s, np.einsum("bthc,bthd->bhcd", decay * k, k)


def _gates(case: Case, made: Made) -> np.ndarray:
    if not case.gates:
        return np.zeros((case.b, case.t, case.h))
    return np.clip(made.values["log_g"], LOWEST_LOG_GATE, 0.0)


# --- what every result must be ---


def _plain(case: Case, made: Made, name: str, x: Any) -> np.ndarray:
    """A result in float64; it must be contiguous, of the inputs' library and dtype, in memory of its own."""
    expected = "float32" if name in ("lse", "S", "Z", "dlog_g") else case.dtype
    if case.library == "torch":
        import torch

        # What torch adds up in a tensor's `grad` lies as the tensor does.
        lies = x.is_contiguous() or (case.gradient == "autograd" and name.startswith("d"))
        if type(x) is not torch.Tensor or str(x.dtype) != f"torch.{expected}" or not lies:
            raise Wrong(
                f"{name} is {type(x).__name__}, {getattr(x, 'dtype', '')}, or not contiguous; right: {expected}, a contiguous tensor"
            )
        if name == "y" and x.requires_grad != (case.gradient == "autograd"):
            raise Wrong(f"{name}.requires_grad is {x.requires_grad}")
        x = x.detach()
        raw = x.view(torch.uint16).numpy() if expected == "bfloat16" else x.numpy()
        value = x.double().numpy()
    else:
        if type(x) is not np.ndarray or x.dtype != np.dtype(expected) or not x.dtype.isnative or not x.flags.c_contiguous:
            raise Wrong(
                f"{name} is {type(x).__name__}, {getattr(x, 'dtype', '')}, or not contiguous; right: {expected}, a contiguous ndarray"
            )
        raw, value = x, x.astype(np.float64)
    if raw.size and any(np.may_share_memory(raw, memory) for memory, _ in made.memory):
        raise Wrong(f"{name} lies in the memory of an input")
    return value


def _shape(name: str, got: np.ndarray, exact: np.ndarray) -> None:
    if got.shape != exact.shape:
        raise Wrong(f"{name} has shape {list(got.shape)}; right: {list(exact.shape)}")


def _hold(name: str, got: np.ndarray, exact: np.ndarray, bound: np.ndarray, free: np.ndarray | None = None) -> None:
    """Every element is within its bound; where the exact one is not finite, neither is it. `free`: where anything may be."""
    _shape(name, got, exact)
    free = np.zeros(exact.shape, bool) if free is None else np.broadcast_to(free, exact.shape)
    finite = np.isfinite(exact)
    hidden = ~finite & np.isfinite(got) & ~free
    spoiled = finite & ~np.isfinite(got) & ~free
    for what, mask in (("finite where it must not be", hidden), ("not finite", spoiled)):
        if mask.any():
            at = tuple(int(i) for i in np.argwhere(mask)[0])
            raise Wrong(f"{name} is {what} at {at} and {int(mask.sum())} elements in all: {got[at]}; right: {exact[at]}")
    error = np.where(finite & ~free, np.abs(got - np.where(finite, exact, 0)), 0)
    share = error / np.maximum(np.broadcast_to(bound, exact.shape), 1e-300)
    if (share > 1).any():
        at = tuple(int(i) for i in np.unravel_index(int(np.nanargmax(share)), share.shape))
        bounds, count = np.broadcast_to(bound, exact.shape), int((share > 1).sum())
        raise Wrong(f"wrong: {name} at {at} is {got[at]}; right: {exact[at]} within {bounds[at]:.1e} ({count} of {share.size} elements)")


def _rounding(case: Case, exact: np.ndarray) -> np.ndarray:
    bound: np.ndarray = HALF_ULP[case.dtype] * np.abs(exact) * 1.001 + SMALLEST[case.dtype]
    return bound


# --- power retention ---


def _check_power(case: Case, made: Made, results: Mapping[str, np.ndarray]) -> None:
    options = _power_options(case)
    x, log_g = made.values, made.values.get("log_g")
    exact = attention_form(x["q"], x["k"], x["v"], log_g, **options)
    y, cond, tail = exact.y[:, case.split :], exact.conditioning[:, case.split :], slice(case.split, None)
    v_max = np.abs(x["v"])[np.isfinite(x["v"])].max(initial=0.0)
    free = np.abs(y) > 0.999 * LARGEST[case.dtype]
    if case.target == "host":
        free = free | _reached(case, made)
        _check_on_host(case, made, results["y"], y, cond, free)
    else:
        _hold("y", results["y"], y, FLOAT32 * v_max / np.maximum(cond, 1e-300)[..., None] + _rounding(case, y), free)
    if case.final:
        for name, state in zip(("S", "Z"), _exact_state(case, made, slice(None)), strict=True):
            size = np.linalg.norm(np.nan_to_num(state), axis=(2, 3), keepdims=True)
            _hold(name, results[name], state, 1e-5 * size + 1e-30)
    if case.gradient:
        touched = ~np.isfinite(exact.y).all((1, 3)).reshape(case.b, case.h, case.group).all(-1)
        for name, b, _, head, _ in case.planted:
            touched[b, head // case.group if name == "q" else head] = True
        if case.target == "host":
            _check_gradients_on_host(case, made, results, touched)
        else:
            # Where everything cancels rounding decides whether the normaliser is at its floor.
            low = (cond < 1e-7).any(1).reshape(case.b, case.h, case.group).any(-1)
            _check_gradients(case, made, results, touched | low, tail)


def _power_options(case: Case) -> dict[str, Any]:
    given = case.keywords
    scale = given.get("scale")
    return {
        "degree": given.get("degree", 2),
        "scale": case.d**-0.5 if scale is None else float(scale),
        "normalize": given.get("normalize", "sum"),
    }


def _reached(case: Case, made: Made) -> np.ndarray:
    """Where a kernel may give anything for a value that is not finite: what gates have forgotten, and rows that share a block with it."""
    free = np.zeros((case.b, case.t, case.h, case.group, case.e), bool)
    sums, rows = np.cumsum(np.nan_to_num(_gates(case, made)), 1), np.arange(case.t)
    places = [(name, b, token, head // case.group if name == "q" else head) for name, b, token, head, _ in case.planted]
    if case.gates:
        places += [("log_g", *(int(i) for i in at)) for at in np.argwhere(np.isnan(made.values["log_g"]))]
    for name, b, token, head in places:
        forgotten = (rows > token) & (sums[b, :, head] - sums[b, token, head] < FORGOTTEN)
        free[b, forgotten, head] = True
        if name == "v":
            free[b, (rows < token) & (rows >= token - BAND), head, :, COLUMN] = True
    return free.reshape(case.b, case.t, case.h * case.group, case.e)


def _check_on_host(case: Case, made: Made, got: np.ndarray, exact: np.ndarray, cond: np.ndarray, free: np.ndarray) -> None:
    """The op's own check, of what is finite."""
    _hold("y", got, exact, np.array(np.inf), free)
    kept = np.isfinite(exact) & ~free
    normalize = _power_options(case)["normalize"]
    p = power.example(t=case.t, b=case.b, h=case.h, hq=case.h * case.group, d=case.d, e=case.e, dtype=case.dtype, normalize=normalize)
    v = made.values["v"]
    expected = {"y": np.where(kept, exact, 0), "conditioning": np.nan_to_num(cond), "v_max": np.abs(v)[np.isfinite(v)].max(initial=0.0)}
    _ok("y", power.check(p, {}, {"y": p.dtype.round(np.where(kept, got, 0))}, expected))


def _ok(name: str, found: Any) -> None:
    if not found.ok:
        raise Wrong(
            f"wrong: {name} by {found.relative:.1e} (at most {found.relative_bound:.0e}), worst {found.max_error:.1e} (at most {found.max_error_bound:.0e})"
        )


def _exact_gradients(case: Case, made: Made, nudge: np.random.Generator | None = None) -> Gradients:
    def moved(x: np.ndarray) -> np.ndarray:
        return x if nudge is None else x * (1 + NUDGE * nudge.standard_normal(x.shape))

    tail = slice(case.split, None)
    q, k, v = (moved(made.values[name][:, tail]) for name in "qkv")
    log_g = made.values["log_g"][:, tail] if case.gates else None
    initial = _exact_state(case, made, slice(0, case.split)) if case.split else None
    if initial is not None:
        initial = (moved(initial[0]), initial[1])
    return gradients(q, k, v, log_g, moved(made.values["dy"][:, tail]), initial=initial, **_power_options(case))


def _check_gradients(case: Case, made: Made, results: Mapping[str, np.ndarray], free: np.ndarray, tail: slice) -> None:
    """NumPy's: float32, and what a nudge of the inputs changes many times over."""
    exact = _exact_gradients(case, made)
    rng = np.random.default_rng(case.seed)
    others = [_exact_gradients(case, made, rng) for _ in range(2)]
    sizes = {"dq": exact.q_terms, "dk": exact.k_terms, "dlog_g": exact.g_terms}
    for name in ("dq", "dk", "dv", *(["dlog_g"] if case.gates else [])):
        right = getattr(exact, name)
        rows = np.linalg.norm(right, axis=-1) if right.ndim == 4 else np.abs(right)
        size = np.maximum(rows, sizes.get(name, rows))
        moved = np.max([np.linalg.norm(getattr(o, name) - right, axis=(1, 3) if right.ndim == 4 else 1) for o in others], 0)
        head_size = np.linalg.norm(size, axis=1)
        bound = 2e-5 * (size + head_size[:, None] / math.sqrt(max(size.shape[1], 1))) + NUDGES * moved[:, None]
        # A token's gate sums over all later ones.
        bound = bound + 2e-6 * head_size[:, None] if name == "dlog_g" else bound
        anything = free if right.shape[2] == case.h else free.repeat(case.group, 1)
        bound, anything = (bound[..., None], anything[:, None, :, None]) if right.ndim == 4 else (bound, anything[:, None, :])
        rounding = _rounding(case, right) if name != "dlog_g" else 2.0**-24 * np.abs(right) + 1e-38
        _hold(name, results[name], right, bound + rounding, anything | (np.abs(right) > 0.999 * LARGEST[case.dtype]))


def _check_gradients_on_host(case: Case, made: Made, results: Mapping[str, np.ndarray], free: np.ndarray) -> None:
    options = _power_options(case)
    normalize = options.pop("normalize")
    p = back.example(
        t=case.t,
        b=case.b,
        h=case.h,
        hq=case.h * case.group,
        d=case.d,
        e=case.e,
        dtype=case.dtype,
        normalize=normalize,
        gated=bool(case.gates),
    )
    exact = _exact_gradients(case, made)._asdict()
    expected, found = {}, {}
    for name, x in exact.items():
        if x is None:
            continue
        heads = free if x.shape[2] == case.h else free.repeat(case.group, 1)
        dirty = heads[:, None, :].reshape(case.b, 1, -1, *([1] * (x.ndim - 3)))
        expected[name] = np.where(dirty, 0.0, x)
        if name in results:
            _shape(name, results[name], x)
            found[name] = np.where(dirty, 0.0, results[name])
    rounded = {name: x if name == "dlog_g" else p.dtype.round(x) for name, x in found.items()}
    rows = back.row_errors(p, rounded, expected)
    for name, error in rows.items():
        usual = np.sort(error, axis=1)[:, : case.t - (-(-case.t // 100) if case.t > 10 else 0)]
        if not (np.sqrt((usual**2).mean(1)) <= GRADIENT_BOUND).all():
            raise Wrong(f"wrong: {name} by {np.sqrt((usual**2).mean(1))} of the heads; at most {GRADIENT_BOUND}")
        if not (error <= back.WORST_ROW).all():
            raise Wrong(f"wrong: a row of {name} by {np.max(error):.2f}; at most {back.WORST_ROW}")
    if case.gates:
        # Of what cancels in it (g_terms) that much is how y was rounded, and all that is left where rows see one key that counts.
        sizes = (np.linalg.norm(expected[name], axis=(0, 1)) for name in ("dlog_g", "g_terms"))
        bound = sum(x * size for x, size in zip((DLOG_G_BOUND, HALF_ULP[case.dtype]), sizes, strict=True))
        error = np.linalg.norm(found["dlog_g"] - expected["dlog_g"], axis=(0, 1))
        if not (error <= bound + 1e-30).all():
            raise Wrong(f"wrong: dlog_g of the heads by {error}; at most {bound}")


# --- flash attention ---


def _check_flash(case: Case, made: Made, results: Mapping[str, np.ndarray]) -> None:
    given, x = case.keywords, made.values
    left, right = (-1 if side is None else int(min(side, 1 << 40)) for side in given.get("window") or (None, None))
    causal = bool(given.get("causal")) or right == 0
    options = {"causal": causal, "window": (left, right), "scale": given.get("scale"), "softcap": given.get("softcap")}
    exact = attention(x["q"], x["k"], x["v"], **options)
    clean = attention(*(np.nan_to_num(x[name], posinf=0.0, neginf=0.0) for name in "qkv"), **options)
    free, free_lse = _reached_in_flash(case, causal, (left, right))
    if case.target == "host":
        _hold("y", results["y"], exact.y, np.array(np.inf), free)
        kept = np.isfinite(exact.y) & ~free
        known = (np.isfinite(exact.lse) | (exact.lse == -np.inf)) & ~free_lse
        problem = flash_example(t=case.t, tq=case.tq, b=case.b, h=case.h, hq=case.h * case.group, d=case.d, e=case.e, dtype=case.dtype)
        lse = results.get("lse", exact.lse)
        rounded = {"y": problem.dtype.round(np.where(kept, results["y"], 0)), "lse": np.where(known, lse, 0)}
        # Beside that, what a float16 does not hold: of a weight 2^-25, and of y.
        held = SMALLEST[case.dtype] / 2 * (1 + np.abs(np.nan_to_num(x["v"], posinf=0.0, neginf=0.0)).sum(1)).repeat(case.group, 1)[:, None]
        clean = clean._replace(spread=clean.spread + held / flash_bounds[problem.dtype][1])
        right_ones = {
            "y": np.where(kept, exact.y, 0),
            "lse": np.where(known, exact.lse, 0),
            "spread": np.where(kept, clean.spread, 0),
            "reach": clean.reach,
        }
        if "lse" in results and not (np.isnan(lse) | known | free_lse).all():
            raise Wrong("lse is finite where it must not be")
        _ok("y, lse", check_flash(problem, {}, rounded, right_ones))
        return
    reach = clean.reach.transpose(0, 2, 1)[..., None]
    _hold("y", results["y"], exact.y, clean.spread * (2e-6 + 1e-6 * reach) + _rounding(case, exact.y), free)
    if "lse" in results:
        empty = exact.lse == -np.inf
        if not ((results["lse"] == -np.inf) == empty).all():
            raise Wrong("wrong: lse of rows that see no key, or of others, is or is not -inf")
        _hold("lse", np.where(empty, 0, results["lse"]), np.where(empty, 0, exact.lse), 2e-6 * (1 + clean.reach), free_lse)


def _reached_in_flash(case: Case, causal: bool, window: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Where the kernels may give anything: for an infinity in q or k, which may be a weight of 0; and, in a value's column, rows that do
    not see it (docs/flash_attention.md)."""
    y, lse = np.zeros((case.b, case.tq, case.h, case.group, case.e), bool), np.zeros((case.b, case.h, case.group, case.tq), bool)
    if case.target == "host":
        for name, b, token, head, value in case.planted:
            sees = visible(np.arange(case.tq), np.array([token]), case.t - case.tq, causal, window)[:, 0]
            if name == "v":
                y[b, ~sees, head, :, COLUMN] = True
            elif math.isinf(value):
                rows, group = (sees, slice(None)) if name == "k" else (np.arange(case.tq) == token, head % case.group)
                key_head = head if name == "k" else head // case.group
                y[b, rows, key_head, group] = True
                lse[b, key_head, group, rows] = True
    hq = case.h * case.group
    return y.reshape(case.b, case.tq, hq, case.e), lse.reshape(case.b, hq, case.tq)


# --- the examples ---


def _check_example(case: Case, made: Made, results: Mapping[str, np.ndarray]) -> None:
    x = made.values
    if case.op == "softmax":
        e = np.exp(x["x"] - x["x"].max(-1, keepdims=True))
        exact = e / e.sum(-1, keepdims=True)
        bound = 1e-5 * np.abs(exact) + 1e-37
    elif case.op == "scan":
        exact = np.cumsum(x["x"], 1)
        bound = 2.0**-24 * 300 * np.cumsum(np.abs(np.nan_to_num(x["x"], posinf=0, neginf=0)), 1) + 1e-37
    else:
        exact = x["a"] @ x["b"].T + x["bias"]
        sizes = np.abs(np.nan_to_num(x["a"], posinf=0, neginf=0)) @ np.abs(x["b"]).T
        bound = 1e-6 * sizes + _rounding(case, exact)
    _hold("y", results["y"], exact, bound)


if __name__ == "__main__":
    sys.exit("run python -m tests.fuzz")
