"""The corpus, batches, training, what a preset is, and the mixers that are compared with power retention, in plain torch."""

from __future__ import annotations

import hashlib
import json
import math
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decoder import Decoder
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import vidrial as vd
from vidrial.kernels.power_retention.metamorphosis import metamorphose

HERE = Path(__file__).parent
# One file of sixteen is held out, by the hash of its name.
HELD_OUT = 16
# Tokens that share a state in `degree_one`.
CHUNK = 256


@dataclass(frozen=True)
class Preset:
    """What is trained, and how: a step takes `batch` windows of `t` bytes.

    `base`, `layerwise` and `tune` are numbers of steps, from nothing, layer by layer, and end to end; `seconds` ends a training early.
    Curves predict the last `targets` bytes of `windows` windows from the `contexts` before them.
    """

    config: dict[str, Any]
    t: int
    batch: int
    base: int
    layerwise: int
    tune: int
    contexts: tuple[int, ...]
    targets: int
    windows: int
    evaluate: int
    window: int
    with_tests: bool = False
    device: str = "cpu"
    seconds: float = math.inf
    lr: float = 3e-3
    warmup: int = 50

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 on a GPU, whose kernels take no float32."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device != "cpu")


def _config(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "charlm",
        "vocab_size": 256,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }


PRESETS = {
    "cpu": Preset(
        _config(128, 4, 4),
        t=256,
        batch=4,
        base=4000,
        layerwise=40,
        tune=40,
        contexts=(8, 16, 32, 64, 128, 240),
        targets=16,
        windows=128,
        evaluate=32,
        window=16,
    ),
    "h200": Preset(
        _config(512, 8, 8),
        t=8192,
        batch=4,
        base=300,
        layerwise=20,
        tune=10,
        contexts=(64, 128, 256, 512, 1024, 2048, 4096, 8128),
        targets=64,
        windows=128,
        evaluate=16,
        window=256,
        with_tests=True,
        device="cuda",
        seconds=75,
        lr=1e-3,
    ),
}


def corpus(with_tests: bool = False) -> tuple[Tensor, Tensor]:
    """The bytes of Python's standard library, for training and held out, uint8; `with_tests` adds its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        content = path.read_bytes()
        tests = "/test" in f"/{name}" or "idle_test" in name
        if "site-packages" in name or len(content) < 600 or (tests and not with_tests):
            continue
        parts[hashlib.sha256(name.encode()).digest()[0] % HELD_OUT == 0].append(content)
    train, held = (torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8) for files in parts)
    return train, held


class Text:
    """Bytes of a corpus as batches of windows [batch, t + 1]."""

    def __init__(self, preset: Preset) -> None:
        self.preset = preset
        self.train, self.held = (x.to(preset.device) for x in corpus(preset.with_tests))

    def windows(self, text: Tensor, starts: Tensor, t: int) -> Tensor:
        """Windows of t tokens of a text, int64."""
        return text[starts.to(text.device)[:, None] + torch.arange(t, device=text.device)].long()

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Without end; the same ones for the same seed."""
        p, generator = self.preset, torch.Generator().manual_seed(seed)
        while True:
            yield self.windows(self.train, torch.randint(len(self.train) - p.t - 1, (p.batch,), generator=generator), p.t + 1)

    def loss(self, model: nn.Module) -> float:
        """Nats per held-out byte, over `evaluate` windows that lie as far from each other as they can."""
        p, total = self.preset, 0.0
        starts = torch.linspace(0, len(self.held) - p.t - 2, p.evaluate).long()
        with torch.no_grad(), p.autocast():
            for part in torch.split(starts, p.batch):
                total += float(loss_of(model, self.windows(self.held, part, p.t + 1))) * len(part)
        return total / p.evaluate


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean of the nats per byte of windows [batch, t + 1]."""
    return functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())


@dataclass
class Run:
    """What a training did: the held-out loss after some steps, and what it took."""

    losses: dict[int, float]
    steps: int
    tokens: int
    seconds: float
    ended_early: bool = False


def train(model: nn.Module, text: Text, steps: int, lr: float, warmup: int, seed: int = 7, look: Sequence[int] = ()) -> Run:
    """AdamW, a cosine to a tenth behind a warm-up, gradients clipped at 1; gates do not decay. `look` are steps before which it evaluates."""
    p = text.preset
    gates = [x for n, x in model.named_parameters() if "g_proj" in n]
    others = [x for n, x in model.named_parameters() if "g_proj" not in n]
    groups = [{"params": others, "weight_decay": 0.05}, {"params": gates, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=(0.9, 0.95))
    run, batches = Run({}, 0, 0, 0.0), text.batches(seed)
    for step in range(steps):
        if step in look:
            run.losses[step] = text.loss(model)
        if run.seconds > p.seconds:
            run.ended_early = True
            break
        began = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        with p.autocast():
            loss: Any = loss_of(model, next(batches))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if p.device != "cpu":
            torch.cuda.synchronize()
        run.seconds += time.monotonic() - began
        run.steps, run.tokens = step + 1, run.tokens + p.batch * p.t
    run.losses[run.steps] = text.loss(model)
    return run


def fresh(config: dict[str, Any], seed: int = 0) -> Decoder:
    """A decoder with nothing learnt: normal weights of 0.02, those that write into the residual stream smaller."""
    torch.manual_seed(seed)
    model = Decoder(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            last = name.endswith(("o_proj.weight", "c_proj.weight"))
            nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * config["num_hidden_layers"]) if last else 1))
    return model


def with_mixer(model: Decoder, mixer: str) -> Decoder:
    """A model with another mixer in every layer: `softmax`, `window:16`, `degree1`, `power:2` or `power:4`; what it is stays in its config."""
    kind, _, number = mixer.partition(":")
    counted = number.isdecimal() and int(number) > 0
    if kind == "power" and (counted or not number):
        return metamorphose(model, degree=int(number or 2))
    if kind not in ("softmax", "window", "degree1") or (not counted if kind == "window" else number):
        raise vd.ArgumentError(f"mixer {mixer!r} is not known; accepted: softmax, window:16, degree1, power:2, power:4")
    layers: Any = model.model.layers
    for attention in (layer.self_attn for layer in layers):
        if kind == "window":
            attention.window = int(number)
        elif kind == "degree1":
            width, d = attention.k_proj.in_features, attention.head_dim
            heads = attention.k_proj.out_features // d
            attention.g_proj, attention.out_norm = nn.Linear(width, heads), nn.RMSNorm(d, 1e-6)
            with torch.no_grad():
                attention.g_proj.weight.zero_()
                attention.g_proj.bias.copy_(torch.linspace(math.log(11), math.log(127), heads))
            attention.mixer = degree_one
    model.config = {**model.config, "mixer": mixer}
    return model


def degree_one(attention: Any, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Gated linear attention, a norm per head in the normaliser's place: y_i = norm(sum_j exp(a_i - a_j) (q_i . k_j) v_j), chunk by chunk."""
    log_g = functional.logsigmoid(attention.g_proj(hidden).float()).transpose(1, 2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out: list[Tensor] = []
    state: Tensor | None = None
    for one_q, one_k, one_v, g in zip(*(torch.split(x, CHUNK, 2) for x in (q, k, v, log_g)), strict=True):
        a = g.cumsum(-1)
        later = torch.ones(a.shape[-1], a.shape[-1], dtype=torch.bool, device=a.device).triu(1)
        decay = (a[..., :, None] - a[..., None, :]).masked_fill(later, -torch.inf).exp()
        y = (one_q @ one_k.transpose(-1, -2) * decay) @ one_v
        new = (one_k * (a[..., -1:] - a).exp()[..., None]).transpose(-1, -2) @ one_v
        if state is not None:
            y = y + (one_q * a.exp()[..., None]) @ state
            new = new + state * a[..., -1].exp()[..., None, None]
        state = new
        out.append(y)
    normed: Tensor = attention.out_norm(torch.cat(out, 2).to(v.dtype))
    return normed.transpose(1, 2)


def read(folder: str | Path) -> Decoder:
    """A model of `Decoder.write`, whatever its mixer; float32."""
    path = Path(folder)
    config = json.loads((path / "config.json").read_text(encoding="utf-8")) if (path / "config.json").is_file() else {}
    if not {"mixer", "vidrial"} & config.keys():
        return Decoder.read(folder).float()
    swap = config.pop("vidrial", None)
    model = with_mixer(Decoder(config), config["mixer"]) if swap is None else metamorphose(Decoder(config), **swap)
    weights = {}
    for file in sorted(path.glob("*.safetensors")):
        weights.update(load_file(file))
    parameters = dict(model.named_parameters())
    if parameters.keys() != weights.keys():
        raise vd.ArgumentError(f"{path} is not the model of its config.json; it differs in {sorted(parameters.keys() ^ weights.keys())}")
    model.load_state_dict(weights, strict=False)
    return model


def toy() -> Decoder:
    """The softmax model that comes along: 0.8 M parameters, 4.1 M bytes seen."""
    return read(HERE / "softmax")


def predictor(model: nn.Module, preset: Preset) -> Any:
    """Tokens [windows, n + 1] of NumPy -> nats of the n last ones, for vidrial.icl."""

    def losses(tokens: Any) -> Any:
        x = torch.from_numpy(np.ascontiguousarray(tokens)).long().to(preset.device)
        found = []
        with torch.no_grad(), preset.autocast():
            for part in torch.split(x, max(1, preset.batch * preset.t // x.shape[1])):
                logits = model(part[:, :-1]).float()
                found.append(functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none"))
        return torch.cat(found).cpu().numpy()

    return losses
