"""One of two processes that train a layer with power retention, by gloo: `distributed.py RANK FOLDER`. Leaves its gradients as FOLDER/RANK.npz."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn

from vidrial.kernels.power_retention import power_retention

WIDTH, HEADS, T = 32, 2, 20


class Layer(nn.Module):
    """x [B, T, WIDTH] -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.gate, self.out = nn.Linear(WIDTH, 3 * HEADS * 32), nn.Linear(WIDTH, HEADS), nn.Linear(HEADS * 32, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, 32)).unbind(2)
        return self.out(power_retention(q, k, v, nn.functional.logsigmoid(self.gate(x) + 3)).flatten(2))


def layer() -> Layer:
    torch.manual_seed(0)
    return Layer()


def batch() -> torch.Tensor:
    """One sequence for each of two processes."""
    return torch.randn(2, T, WIDTH, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, np.ndarray]:
    """Of the mean square of the layer's output."""
    model(x).square().mean().backward()
    found: dict[str, Any] = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {name: (g.full_tensor() if hasattr(g, "full_tensor") else g).numpy() for name, g in found.items()}


def main(rank: int, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mine = batch()[rank : rank + 1]
    made = {f"ddp {name}": g for name, g in gradients(nn.parallel.DistributedDataParallel(layer()), mine).items()}
    mesh = distributed.device_mesh.init_device_mesh("cpu", (2,))
    sharded = fully_shard(layer(), mesh=mesh)
    made |= {f"fsdp {name}": g for name, g in gradients(sharded, mine).items()}
    np.savez(folder / f"{rank}.npz", **made)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
