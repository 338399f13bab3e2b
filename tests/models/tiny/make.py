"""Makes the folders beside it by transformers: `python tests/models/tiny/make.py`, with transformers 5.23.0 and torch installed.

Each holds a config.json and a model.safetensors (float32) as `save_pretrained` writes them, and logits.npz: tokens, and what the model makes of
them. Weights are large enough that each part shows in the logits; sequences are longer than the windows.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, Starcoder2Config, Starcoder2ForCausalLM

HERE = Path(__file__).parent
COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON |= {"max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0}
MODELS = {
    "llama": LlamaForCausalLM(LlamaConfig(**COMMON, intermediate_size=48, attention_bias=True, mlp_bias=True)),
    "qwen3": Qwen3ForCausalLM(
        Qwen3Config(**COMMON, intermediate_size=40, head_dim=16, use_sliding_window=True, sliding_window=7, max_window_layers=1)
    ),
    "starcoder2": Starcoder2ForCausalLM(
        Starcoder2Config(
            **COMMON, intermediate_size=56, sliding_window=9, rope_parameters={"rope_type": "default", "rope_theta": 999999.4420358813}
        )
    ),
}
TOKENS = 24

for name, model in MODELS.items():
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    tokens = torch.randint(0, 64, (2, TOKENS))
    with torch.no_grad():
        logits = model.eval()(tokens).logits
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez(folder / "logits.npz", tokens=tokens.numpy(), logits=logits.numpy())
    print(name, sum(p.stat().st_size for p in folder.iterdir()), "bytes; logits up to", float(logits.abs().max()))
