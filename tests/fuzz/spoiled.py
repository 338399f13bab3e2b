"""What no call accepts, and the word that its refusal must contain: the argument's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Change = Callable[[dict[str, Any], dict[str, Any]], None]


@dataclass(frozen=True)
class Wrong:
    """`change` spoils the arrays (by name) or the keywords of a call; the error must say `word`."""

    word: str
    change: Change
    ops: tuple[str, ...] = ("power_retention", "flash_attention")
    library: str = ""
    where: Callable[[Any], bool] = lambda case: True

    def applies(self, case: Any) -> bool:
        return case.op in self.ops and self.library in ("", case.library) and self.where(case)


def _array(name: str, change: Callable[[Any], Any]) -> Change:
    def spoil(arrays: dict[str, Any], _: dict[str, Any]) -> None:
        arrays[name] = change(arrays[name])

    return spoil


def _option(name: str, value: Any) -> Change:
    def spoil(_: dict[str, Any], options: dict[str, Any]) -> None:
        options[name] = value

    return spoil


def _astype(name: str, label: str) -> Change:
    def change(x: Any) -> Any:
        return x.astype(label) if isinstance(x, np.ndarray) else x.to(getattr(__import__("torch"), label))

    return _array(name, change)


def _negative(x: Any) -> Any:
    import torch

    return torch.complex(x.float(), x.float()).conj().imag.to(torch.float32)


def _sparse(x: Any) -> Any:
    return x.contiguous().to_sparse()


def _nested(x: Any) -> Any:
    import torch

    return torch.nested.nested_tensor(list(x))


def _shape(x: Any) -> Any:
    return x[..., :-1] if x.shape[-1] > 1 else x[..., None, :]


def _numbers(value: Any) -> Any:
    return lambda case: value


POWER, FLASH = ("power_retention",), ("flash_attention",)
WRONG = {
    "q is a list": Wrong("list", _array("q", lambda x: x.tolist())),
    "k is None": Wrong("NoneType", _array("k", lambda x: None)),
    "v is a number": Wrong("float", _array("v", lambda x: 1.0)),
    "q of float64": Wrong("q", _astype("q", "float64")),
    "k of int32": Wrong("k", _astype("k", "int32")),
    "v of another dtype": Wrong("v", _astype("v", "uint8")),
    "q of rank 3": Wrong("q", _array("q", lambda x: x[:, :, 0])),
    "k of rank 5": Wrong("k", _array("k", lambda x: x[None])),
    "q of 31 features": Wrong("31", _array("q", _shape), where=lambda c: c.d == 32),
    "v of 31 features": Wrong("31", _array("v", _shape), where=lambda c: c.e == 32),
    "k of fewer tokens": Wrong("shape", _array("k", lambda x: x[:, 1:]), where=lambda c: c.t > c.split),
    "heads that do not divide": Wrong("heads", lambda a, o: a.update({n: a[n][:, :, :0] for n in "kv"})),
    "masked": Wrong("masked", _array("k", lambda x: np.ma.masked_array(x)), library="numpy"),
    "objects": Wrong("object", _array("v", lambda x: x.astype(object)), library="numpy"),
    "complex": Wrong("complex64", _astype("q", "complex64")),
    "strings": Wrong("str", _array("q", lambda x: np.full(x.shape, "a")), library="numpy"),
    "records": Wrong("q", _array("q", lambda x: np.zeros(x.shape, "f4,f4")), library="numpy"),
    "two libraries": Wrong(
        "library", _array("v", lambda x: __import__("torch").zeros(x.shape)), library="numpy", where=lambda c: c.dtype == "float32"
    ),
    "negative bit": Wrong("negative", _array("v", _negative), library="torch", where=lambda c: c.dtype == "float32" and not c.gradient),
    "conjugate": Wrong("complex64", _array("v", lambda x: __import__("torch").complex(x.float(), x.float()).conj()), library="torch"),
    "sparse": Wrong("sparse", _array("k", _sparse), library="torch", where=lambda c: min(c.b, c.t - c.split) > 0 and not c.gradient),
    "nested": Wrong("nested", _array("k", _nested), library="torch", where=lambda c: min(c.b, c.t - c.split) > 0 and not c.gradient),
    "no memory": Wrong("meta", _array("q", lambda x: x.to("meta")), library="torch", where=lambda c: not c.gradient),
    "requires a gradient": Wrong("gradient", _array("q", lambda x: x.detach().requires_grad_()), FLASH, "torch"),
    "target": Wrong("target", _option("target", "gpu")),
    "scale is a string": Wrong("scale", _option("scale", "1")),
    "scale is NaN": Wrong("scale", _option("scale", np.nan)),
    "scale is infinite": Wrong("scale", _option("scale", np.inf)),
    "scale is an array": Wrong("scale", _option("scale", np.ones(2))),
    "scale is a list": Wrong("scale", _option("scale", [1.0])),
    "scale beyond a float32's fourth power": Wrong(
        "scale", lambda a, o: o.update(degree=4, scale=1e9, chunk=None), POWER, where=lambda c: not c.split and not c.final
    ),
    "degree 3": Wrong("degree", _option("degree", 3), POWER),
    "degree 2.5": Wrong("degree", _option("degree", 2.5), POWER),
    "degree is a list": Wrong("degree", _option("degree", [2]), POWER),
    "normalize": Wrong("normalize", _option("normalize", "mean"), POWER),
    "normalize is an array": Wrong("normalize", _option("normalize", np.zeros(2)), POWER),
    "chunk 100": Wrong("chunk", _option("chunk", 100), POWER),
    "chunk -1": Wrong("chunk", _option("chunk", -1), POWER),
    "chunk True": Wrong("chunk", _option("chunk", True), POWER),
    "final state 1": Wrong("output_final_state", _option("output_final_state", 1), POWER),
    "a tuple for a state": Wrong("initial_state", _option("initial_state", (1, 2)), POWER),
    "log_g of float64": Wrong("log_g", _astype("log_g", "float64"), POWER, where=lambda c: bool(c.gates)),
    "log_g of float16": Wrong("log_g", _astype("log_g", "float16"), POWER, where=lambda c: bool(c.gates)),
    "log_g of rank 4": Wrong("log_g", _array("log_g", lambda x: x[..., None]), POWER, where=lambda c: bool(c.gates)),
    "log_g of fewer tokens": Wrong("log_g", _array("log_g", lambda x: x[:, 1:]), POWER, where=lambda c: bool(c.gates) and c.t > c.split),
    "window is a list": Wrong("window", _option("window", [1, 2]), FLASH),
    "window -1": Wrong("window", _option("window", (-1, 0)), FLASH),
    "window 1.5": Wrong("window", _option("window", (1.5, None)), FLASH),
    "window NaN": Wrong("window", _option("window", (np.nan, None)), FLASH),
    "window of three": Wrong("window", _option("window", (1, 2, 3)), FLASH),
    "softcap 0": Wrong("softcap", _option("softcap", 0.0), FLASH),
    "softcap NaN": Wrong("softcap", _option("softcap", np.nan), FLASH),
    "softcap is a list": Wrong("softcap", _option("softcap", [1]), FLASH),
    "causal 1": Wrong("causal", _option("causal", 1), FLASH),
    "causal is a list": Wrong("causal", _option("causal", []), FLASH),
    "return_lse": Wrong("return_lse", _option("return_lse", None), FLASH),
    "x of rank 3": Wrong("x", _array("x", lambda x: x[None]), ("softmax", "scan")),
    "x of int32": Wrong("x", _astype("x", "int32"), ("softmax", "scan")),
    "x is a list": Wrong("list", _array("x", lambda x: x.tolist()), ("softmax", "scan")),
    "b of another k": Wrong("shapes", _array("b", lambda x: x[:, 1:]), ("gemm",)),
    "a of float32": Wrong("dtypes", _astype("a", "float32"), ("gemm",)),
}
